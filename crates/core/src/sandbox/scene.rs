//! What people look at: one fold for all who watch a sandbox, and what changed lately, encoded once.
//!
//! A viewer that does not keep up loses nothing and holds nobody up: what it missed is told it as it is by then.

use std::{
    collections::VecDeque,
    sync::{
        Arc, Mutex, OnceLock,
        atomic::{AtomicUsize, Ordering::SeqCst},
    },
    time::Duration,
};

use bytes::Bytes;
use tokio::{
    sync::{Notify, OwnedSemaphorePermit, Semaphore, mpsc, oneshot},
    task::JoinHandle,
    time::{Instant, interval_at},
};
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use trunkline_store::log::{Item, Reader};

use super::{
    Inner,
    artifacts::{Artifact, Change, Event, Fold, Wanted},
    checkpoint::{self, Checkpoint, Restored},
    keep::Record,
    lock,
};
use crate::{
    error::{Error, Kind},
    gate::Gate,
};

/// Steps that are kept for viewers, and the memory that they may take.
const STEPS_MAX: usize = 256;
const STEPS_BYTES_MAX: usize = 512 * 1024;

/// Records that are read at once.
const RECORDS_MAX: usize = 256;

/// Events that become one step, and their bytes besides the last one's. Whatever came at once, a thread is not kept for longer
/// than a step takes, nor is whoever wants to look. What changes is made steps of as many bytes, because it may be much more than
/// what was told: a field is told again as a whole.
const STEP_EVENTS_MAX: usize = 1000;
const STEP_BYTES_MAX: usize = 256 * 1024;

/// What a viewer is handed at once, in bytes besides the last artifact or step. It holds them until its transport took them.
const SIGHT_BYTES: usize = 64 * 1024;

/// A checkpoint is written after so many events; if another sandbox's is being written, it is tried again after so many more.
const CHECKPOINT_EVENTS: u64 = 5000;
const CHECKPOINT_AGAIN_EVENTS: u64 = 100;

/// A scene that nobody watches, and nobody asked for since the last look, is closed; looked at so often.
const IDLE: Duration = Duration::from_secs(30);

/// Requests to catch up that may wait.
const SYNCS_MAX: usize = 64;

/// The artifacts of a sandbox, for all who look at them.
pub(super) struct Scene {
    state: Mutex<State>,
    /// Steps were added, or there will be none any more.
    moved: Notify,
    syncs: mpsc::Sender<oneshot::Sender<()>>,
    viewers: AtomicUsize,
}

/// What artifacts come to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Size {
    /// Memory, about.
    pub(super) bytes: u64,
    /// How many.
    pub(super) count: u64,
}

impl Size {
    pub(super) fn add(&mut self, more: Self) {
        (self.bytes, self.count) = (self.bytes + more.bytes, self.count + more.count);
    }
}

struct State {
    fold: Fold,
    steps: VecDeque<Arc<Step>>,
    /// The number of the first one.
    first: u64,
    bytes: usize,
    is_over: bool,
    /// It is over because the sandbox was removed.
    is_removed: bool,
}

impl State {
    /// Adds a step; the oldest ones go for it. The last one stays, however large it is.
    fn add(&mut self, step: Step) {
        self.bytes += step.bytes;
        self.steps.push_back(Arc::new(step));
        while self.steps.len() > STEPS_MAX || self.bytes > STEPS_BYTES_MAX && self.steps.len() > 1 {
            if let Some(gone) = self.steps.pop_front() {
                self.bytes -= gone.bytes;
                self.first += 1;
            }
        }
    }
}

/// What changed at once.
pub struct Step {
    /// In order.
    pub changes: Vec<Change>,
    /// Events of which all is seen behind it.
    events: u64,
    /// Memory that its changes take, about.
    bytes: usize,
    encoded: OnceLock<Bytes>,
}

impl Step {
    /// What a surface makes of it, once for all viewers.
    pub fn encoded(&self, encode: impl FnOnce(&[Change]) -> Bytes) -> Bytes {
        self.encoded.get_or_init(|| encode(&self.changes)).clone()
    }
}

/// Somebody who looks. It holds nothing of what there is to see.
pub struct Watch {
    scene: Arc<Scene>,
    /// The next step to see.
    next: u64,
    /// The events that are in what it saw.
    events: u64,
    /// What it is shown before any step.
    walk: Option<Walk>,
}

/// Artifacts that are shown, some at a time, each as it is by then.
struct Walk {
    wanted: Wanted,
    /// The next artifact to look at.
    at: u64,
    /// Events that were folded when it began. What changed since is shown again.
    began: u64,
}

impl Walk {
    fn new(wanted: Wanted, began: u64) -> Self {
        Self { wanted, at: 1, began }
    }
}

/// What somebody sees next.
pub enum Sight {
    /// Artifacts as they are.
    Snapshot(Vec<Arc<Artifact>>),
    /// What changed.
    Steps(Vec<Arc<Step>>),
    /// Nothing any more: the sandbox was removed.
    Removed,
    /// Nothing any more from here: a viewer that comes back sees more.
    Over,
}

impl Scene {
    /// Folds a sandbox's events from its last checkpoint on.
    pub(super) async fn open(inner: &Inner, id: &str, since: i64) -> Result<Arc<Self>, Error> {
        let Inner { gate, tracker, stop, checkpoints, .. } = inner;
        let Restored { fold, reader, told } = checkpoint::restore(gate, id, since).await?;
        let (syncs, requests) = mpsc::channel(SYNCS_MAX);
        let kept_to = fold.events();
        let state = State { fold, steps: VecDeque::new(), first: 0, bytes: 0, is_over: false, is_removed: false };
        let (moved, viewers) = (Notify::new(), AtomicUsize::new(0));
        let scene = Arc::new(Self { state: Mutex::new(state), moved, syncs, viewers });
        let driver = Driver {
            scene: scene.clone(),
            gate: gate.clone(),
            id: id.to_owned(),
            since,
            reader,
            requests,
            stop: stop.clone(),
            kept_to,
            looks_at: kept_to + CHECKPOINT_EVENTS,
            told,
            told_since: 0,
            writing: None,
            tracker: tracker.clone(),
            checkpoints: checkpoints.clone(),
        };
        tracker.spawn(driver.run());
        Ok(scene)
    }

    /// Waits until all is folded that was in the log when this was called; false if it closed instead.
    pub(super) async fn sync(&self) -> bool {
        let (done, synced) = oneshot::channel();
        self.syncs.send(done).await.is_ok() && synced.await.is_ok()
    }

    pub(super) fn is_open(&self) -> bool {
        !lock(&self.state).is_over
    }

    pub(super) fn all(&self) -> Vec<Arc<Artifact>> {
        lock(&self.state).fold.artifacts().cloned().collect()
    }

    pub(super) fn size(&self) -> Size {
        let state = lock(&self.state);
        Size { bytes: state.fold.bytes() as u64, count: state.fold.artifacts().len() as u64 }
    }

    pub(super) fn watch(self: Arc<Self>, last_seen: Option<u64>) -> Watch {
        self.viewers.fetch_add(1, SeqCst);
        let (next, events, walk) = {
            let state = lock(&self.state);
            let (next, events) = (state.first + state.steps.len() as u64, state.fold.events());
            (next, events, Walk::new(state.fold.wanted(last_seen.unwrap_or(0)), events))
        };
        Watch { scene: self, next, events, walk: Some(walk) }
    }

    /// Folds what becomes one step, or a few if much changes by it. Each event comes with its time.
    fn push(&self, events: Vec<(i64, Event)>) {
        let mut state = lock(&self.state);
        let before = state.fold.events();
        let mut changes = Vec::new();
        let mut events = events.into_iter().peekable();
        while let Some(at_ms) = events.peek().map(|(at_ms, _)| *at_ms) {
            let together = std::iter::from_fn(|| events.next_if(|(at, _)| *at == at_ms).map(|(_, event)| event));
            changes.extend(state.fold.apply(together, at_ms));
        }
        if changes.is_empty() {
            return;
        }
        let mut changes = changes.into_iter().peekable();
        while changes.peek().is_some() {
            let (mut some, mut bytes) = (Vec::new(), 0);
            while bytes < STEP_BYTES_MAX
                && let Some(change) = changes.next()
            {
                bytes += change.bytes();
                some.push(change);
            }
            let events = if changes.peek().is_some() { before } else { state.fold.events() };
            state.add(Step { changes: some, events, bytes, encoded: OnceLock::new() });
        }
        drop(state);
        self.moved.notify_waiters();
    }

    fn end(&self, is_removed: bool) {
        {
            let mut state = lock(&self.state);
            (state.is_over, state.is_removed) = (true, is_removed);
        }
        self.moved.notify_waiters();
    }
}

impl Watch {
    /// What there is to see next; waits for it. Cancel-safe.
    pub async fn next(&mut self) -> Sight {
        let scene = self.scene.clone();
        let mut moved = std::pin::pin!(scene.moved.notified());
        loop {
            // Before looking, so that nothing is overlooked.
            moved.as_mut().enable();
            if let Some(sight) = self.look() {
                return sight;
            }
            moved.as_mut().await;
            moved.set(scene.moved.notified());
        }
    }

    fn look(&mut self) -> Option<Sight> {
        let state = lock(&self.scene.state);
        let (first, end, events) = (state.first, state.first + state.steps.len() as u64, state.fold.events());
        if self.walk.is_none() && self.next < first {
            self.walk = Some(Walk::new(Wanted::changed_since(self.events), events));
        }
        while let Some(walk) = &mut self.walk {
            if walk.at == 1 {
                walk.began = events;
            }
            let (artifacts, next) = state.fold.walk(walk.wanted, walk.at, SIGHT_BYTES);
            match next {
                Some(at) => walk.at = at,
                None if walk.began == events => (self.walk, self.next, self.events) = (None, end, events),
                None => *walk = Walk::new(Wanted::changed_since(walk.began), events),
            }
            if !artifacts.is_empty() {
                return Some(Sight::Snapshot(artifacts));
            }
        }
        if self.next < end {
            let skip = usize::try_from(self.next - first).unwrap_or(usize::MAX);
            let mut bytes = 0;
            let mut steps = Vec::new();
            for step in state.steps.iter().skip(skip) {
                if bytes >= SIGHT_BYTES {
                    break;
                }
                bytes += step.bytes;
                steps.push(step.clone());
            }
            self.next += steps.len() as u64;
            self.events = steps.last().map_or(self.events, |step| step.events);
            return Some(Sight::Steps(steps));
        }
        state.is_over.then_some(if state.is_removed { Sight::Removed } else { Sight::Over })
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        self.scene.viewers.fetch_sub(1, SeqCst);
    }
}

/// What keeps a scene up to date.
struct Driver {
    scene: Arc<Scene>,
    gate: Gate,
    id: String,
    /// Where the sandbox began.
    since: i64,
    reader: Reader,
    requests: mpsc::Receiver<oneshot::Sender<()>>,
    stop: CancellationToken,
    /// The checkpoint has so many events.
    kept_to: u64,
    /// After so many, another one may be due.
    looks_at: u64,
    /// Bytes of events in the fold, and of those since the checkpoint.
    told: u64,
    told_since: usize,
    /// The checkpoint that is being written, and how many events it has.
    writing: Option<(u64, JoinHandle<Result<(), Error>>)>,
    tracker: TaskTracker,
    checkpoints: Arc<Semaphore>,
}

/// What a driver does next.
enum Turn {
    Records,
    Sync(oneshot::Sender<()>),
    Idle,
    Stop,
}

impl Driver {
    async fn run(mut self) {
        let driven = self.drive().await;
        self.requests.close();
        self.scene.end(driven.as_ref().is_err_and(|error| error.kind == Kind::NotFound));
        match driven {
            // It was removed, and its checkpoint with it.
            Err(error) if error.kind == Kind::NotFound => return self.written(true).await,
            Err(error) if !self.stop.is_cancelled() => {
                tracing::warn!(%error, sandbox = self.id, "no longer folded; the next one to look begins again");
            }
            _ => {}
        }
        self.written(true).await;
        if let Err(error) = self.checkpoint(None) {
            tracing::debug!(%error, sandbox = self.id, "no checkpoint");
        }
        self.written(true).await;
    }

    async fn drive(&mut self) -> Result<(), Error> {
        let mut items = Vec::new();
        // They last as long as this, so that not every record sets a timer.
        let stop = self.stop.clone();
        let mut stopped = std::pin::pin!(stop.cancelled());
        let mut looks = interval_at(Instant::now() + IDLE, IDLE);
        let mut is_used = false;
        loop {
            let turn = tokio::select! {
                // Whoever asks is not kept waiting by what goes on and on.
                biased;
                Some(done) = self.requests.recv() => Turn::Sync(done),
                read = self.reader.next_batch(RECORDS_MAX, &mut items) => {
                    read?;
                    Turn::Records
                }
                _ = looks.tick() => Turn::Idle,
                () = stopped.as_mut() => Turn::Stop,
            };
            match turn {
                Turn::Records => self.fold(&mut items).await?,
                Turn::Sync(done) => {
                    is_used = true;
                    loop {
                        self.reader.available_batch(RECORDS_MAX, &mut items).await?;
                        if items.is_empty() {
                            break;
                        }
                        self.fold(&mut items).await?;
                    }
                    // Whoever asked may have gone.
                    let _ = done.send(());
                }
                Turn::Idle if self.scene.viewers.load(SeqCst) == 0 && !std::mem::take(&mut is_used) => return Ok(()),
                Turn::Idle => {}
                Turn::Stop => return Ok(()),
            }
            let events = lock(&self.scene.state).fold.events();
            if events >= self.looks_at {
                self.written(false).await;
                let permit = self.checkpoints.clone().try_acquire_owned();
                self.looks_at = events + if permit.is_ok() { CHECKPOINT_EVENTS } else { CHECKPOINT_AGAIN_EVENTS };
                // A long text that goes on and on is not written again for each few words of it.
                if let Ok(permit) = permit
                    && lock(&self.scene.state).fold.bytes_since(self.kept_to) <= self.told_since
                {
                    self.checkpoint(Some(permit))?;
                }
            }
        }
    }

    /// Folds what was read, a step at a time.
    async fn fold(&mut self, items: &mut Vec<Item>) -> Result<(), Error> {
        let (mut step, mut bytes, mut is_over) = (Vec::new(), 0, false);
        for item in items.drain(..) {
            match item {
                Item::Record(record) => {
                    let size = record.payload.len();
                    (self.told, self.told_since) = (self.told + size as u64, self.told_since + size);
                    let at_ms = i64::try_from(record.timestamp_ms).unwrap_or(i64::MAX);
                    let told = Record::read(&record.payload, at_ms);
                    for (event, size) in told.events() {
                        step.push((told.at_ms, event));
                        bytes += size;
                        if step.len() >= STEP_EVENTS_MAX || bytes >= STEP_BYTES_MAX {
                            self.scene.push(std::mem::take(&mut step));
                            bytes = 0;
                            tokio::task::yield_now().await;
                        }
                    }
                }
                Item::Gap(gap) => {
                    tracing::warn!(sandbox = self.id, through = %gap.through, "some of its events are gone");
                }
                Item::End { .. } => is_over = true,
                Item::Transient(_) => {}
            }
        }
        self.scene.push(step);
        if is_over { Err(super::missing()) } else { Ok(()) }
    }

    /// Notes what became of the checkpoint that is being written, if there is one; waits for it if it is told to.
    async fn written(&mut self, waits: bool) {
        let Some((events, writing)) = self.writing.take_if(|(_, writing)| waits || writing.is_finished()) else {
            return;
        };
        match writing.await {
            Ok(Ok(())) => self.kept_to = events,
            Ok(Err(error)) => tracing::warn!(%error, sandbox = self.id, "no checkpoint; the next one has more to do"),
            Err(_) => {}
        }
    }

    /// Keeps what changed since the last time, unless that is still being done; the fold goes on meanwhile. Everything that
    /// was read is folded, so the reader's cursor is the mark.
    fn checkpoint(&mut self, permit: Option<OwnedSemaphorePermit>) -> Result<(), Error> {
        if self.writing.is_some() {
            return Ok(());
        }
        let (id, since, cursor, told) = (self.id.clone(), self.since, self.reader.cursor(), self.told);
        let (events, checkpoint) = {
            let state = lock(&self.scene.state);
            let of = checkpoint::Of { id, since, cursor, told };
            (state.fold.events(), Checkpoint::of(&state.fold, self.kept_to, of)?)
        };
        if events == self.kept_to {
            return Ok(());
        }
        let (gate, checkpoints) = (self.gate.clone(), self.checkpoints.clone());
        let writing = self.tracker.spawn(async move {
            // Small ones go together into one commit, when many end with the server.
            let _permit = match permit {
                None if !checkpoint.is_small() => checkpoints.acquire_owned().await.ok(),
                permit => permit,
            };
            checkpoint.write(&gate).await
        });
        (self.writing, self.told_since) = (Some((events, writing)), 0);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use serde_json::{json, value::to_raw_value};

    use super::{
        Arc, AtomicUsize, Change, Event, Fold, Mutex, Notify, STEP_BYTES_MAX, STEPS_BYTES_MAX, Scene, Sight, State,
        VecDeque, Watch, lock, mpsc,
    };

    const TOOLS: usize = 60;
    const EXTRA_BYTES: usize = 60_000;

    fn scene() -> Arc<Scene> {
        let state = State {
            fold: Fold::default(),
            steps: VecDeque::new(),
            first: 0,
            bytes: 0,
            is_over: false,
            is_removed: false,
        };
        let (state, moved, viewers) = (Mutex::new(state), Notify::new(), AtomicUsize::new(0));
        Arc::new(Scene { state, moved, syncs: mpsc::channel(1).0, viewers })
    }

    /// Tells each tool something that its `extra` is told again for.
    fn tell(scene: &Scene, seq: usize) {
        let event = |tool| json!({"type": "tool_start", "id": format!("{tool}"), "seq": seq});
        let events = (0..TOOLS).map(|tool| (1, Event::read(&to_raw_value(&event(tool)).unwrap())));
        scene.push(events.collect());
    }

    /// What a viewer knows by now of what tools were told last.
    fn see(watch: &mut Watch, known: &mut BTreeMap<u64, String>) {
        while let Some(sight) = watch.look() {
            match sight {
                Sight::Snapshot(artifacts) => {
                    let last = artifacts
                        .iter()
                        .map(|artifact| (artifact.seq, json!(artifact.fields)["extra"]["seq"].to_string()));
                    known.extend(last);
                }
                Sight::Steps(steps) => {
                    for change in steps.iter().flat_map(|step| &step.changes) {
                        let Change::Updated(update) = change else { continue };
                        known.insert(update.seq, json!(update)["set"]["seq"].to_string());
                    }
                }
                Sight::Removed | Sight::Over => break,
            }
        }
    }

    #[test]
    fn steps_are_bounded_by_what_they_hold() {
        let scene = scene();
        let event = |tool| json!({"type": "tool_start", "id": format!("{tool}"), "kind": "x".repeat(EXTRA_BYTES)});
        let events = (0..TOOLS).map(|tool| (1, Event::read(&to_raw_value(&event(tool)).unwrap())));
        scene.push(events.collect());
        let (mut watch, mut late) = (scene.clone().watch(None), scene.clone().watch(None));
        let (mut known, mut known_late) = (BTreeMap::new(), BTreeMap::new());
        see(&mut watch, &mut known);
        for seq in 0..20 {
            tell(&scene, seq);
            let state = lock(&scene.state);
            let held = |change: &Change| {
                if let Change::Updated(update) = change { json!(update).to_string().len() } else { 0 }
            };
            let held: usize = state.steps.iter().flat_map(|step| &step.changes).map(held).sum();
            assert!(held <= STEPS_BYTES_MAX + STEP_BYTES_MAX, "{held} bytes in {} steps", state.steps.len());
            assert_eq!(state.steps.iter().map(|step| step.bytes).sum::<usize>(), state.bytes);
            drop(state);
            if seq % 3 == 0 {
                see(&mut watch, &mut known);
            }
        }
        see(&mut watch, &mut known);
        see(&mut late, &mut known_late);
        let expected: BTreeMap<_, _> = (1..=TOOLS as u64).map(|seq| (seq, "19".to_owned())).collect();
        assert_eq!(known, expected);
        assert_eq!(known_late, expected);
    }

    #[test]
    fn who_saw_some_of_what_changed_at_once_is_told_the_rest() {
        let scene = scene();
        let event = |tool| json!({"type": "tool_start", "id": format!("{tool}"), "kind": "x".repeat(EXTRA_BYTES)});
        let events = (0..TOOLS).map(|tool| (1, Event::read(&to_raw_value(&event(tool)).unwrap())));
        scene.push(events.collect());
        let (mut watch, mut known) = (scene.clone().watch(None), BTreeMap::new());
        see(&mut watch, &mut known);
        // Few enough that all of their steps are kept.
        let event = |tool| json!({"type": "tool_start", "id": format!("{tool}"), "seq": 1});
        scene.push((0..8).map(|tool| (1, Event::read(&to_raw_value(&event(tool)).unwrap()))).collect());
        let first = watch.look();
        let seen = if let Some(Sight::Steps(steps)) = &first { steps[0].changes.len() } else { 0 };
        assert!(seen > 0 && seen < 8, "{seen}");
        // What was left of them is gone by the time of the next look, and others changed since.
        let event = |tool| json!({"type": "tool_start", "id": format!("{tool}"), "seq": 2});
        scene.push((8..TOOLS).map(|tool| (1, Event::read(&to_raw_value(&event(tool)).unwrap()))).collect());
        see(&mut watch, &mut known);
        let last = |seq| if seq <= 8 { "1" } else { "2" };
        assert_eq!(known, (1..=TOOLS as u64).map(|seq| (seq, last(seq).to_owned())).collect());
    }
}

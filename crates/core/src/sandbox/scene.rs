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
use trunkline_store::{
    ledger,
    log::{Cursor, Item, Offset, Reader},
};

use super::{
    Inner,
    artifacts::{Artifact, Change, Fold, Kept},
    keep::events_of,
    lock, sql,
};
use crate::{
    error::{Error, Kind},
    gate::Gate,
};

/// Steps that are kept for viewers, and what they may come to, in bytes of events.
const STEPS_MAX: usize = 256;
const STEPS_BYTES_MAX: usize = 512 * 1024;

/// Records that become one step.
const RECORDS_MAX: usize = 256;

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

struct State {
    fold: Fold,
    steps: VecDeque<Arc<Step>>,
    /// The number of the first one.
    first: u64,
    bytes: usize,
    is_over: bool,
}

/// What changed at once.
pub struct Step {
    /// In order.
    pub changes: Vec<Change>,
    /// Events that were folded with it.
    events: u64,
    bytes: usize,
    encoded: OnceLock<Bytes>,
}

impl Step {
    /// What a surface makes of it, once for all viewers.
    pub fn encoded(&self, encode: impl FnOnce(&[Change]) -> Bytes) -> Bytes {
        self.encoded.get_or_init(|| encode(&self.changes)).clone()
    }
}

/// Somebody who looks.
pub struct Watch {
    scene: Arc<Scene>,
    /// The next step to see.
    next: u64,
    /// The events that are in what it saw.
    events: u64,
    /// What it is shown first.
    history: Option<Vec<Arc<Artifact>>>,
}

/// What somebody sees next.
pub enum Sight {
    /// Artifacts as they are.
    Snapshot(Vec<Arc<Artifact>>),
    /// What changed.
    Steps(Vec<Arc<Step>>),
    /// Nothing any more.
    Over,
}

impl Scene {
    /// Folds a sandbox's events from its last checkpoint on.
    pub(super) async fn open(inner: &Inner, id: &str, since: i64) -> Result<Arc<Self>, Error> {
        let Inner { gate, tracker, stop, checkpoints, .. } = inner;
        let (fold, reader) = restore(gate, id, since).await?;
        let (syncs, requests) = mpsc::channel(SYNCS_MAX);
        let kept_to = fold.events();
        let state = State { fold, steps: VecDeque::new(), first: 0, bytes: 0, is_over: false };
        let (moved, viewers) = (Notify::new(), AtomicUsize::new(0));
        let scene = Arc::new(Self { state: Mutex::new(state), moved, syncs, viewers });
        let driver = Driver {
            scene: scene.clone(),
            gate: gate.clone(),
            id: id.to_owned(),
            reader,
            requests,
            stop: stop.clone(),
            kept_to,
            looks_at: kept_to + CHECKPOINT_EVENTS,
            told_bytes: 0,
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

    pub(super) fn watch(self: Arc<Self>, last_seen: Option<u64>) -> Watch {
        self.viewers.fetch_add(1, SeqCst);
        let (next, events, history) = {
            let state = lock(&self.state);
            (state.first + state.steps.len() as u64, state.fold.events(), state.fold.from(last_seen.unwrap_or(0)))
        };
        Watch { scene: self, next, events, history: Some(history) }
    }

    fn push(&self, events: Vec<(i64, Vec<serde_json::Value>)>, bytes: usize) {
        let mut state = lock(&self.state);
        let mut changes = Vec::new();
        for (at_ms, events) in events {
            changes.extend(state.fold.apply(events, at_ms));
        }
        if changes.is_empty() {
            return;
        }
        let events = state.fold.events();
        state.bytes += bytes;
        state.steps.push_back(Arc::new(Step { changes, events, bytes, encoded: OnceLock::new() }));
        // The last one stays, however large it is.
        while state.steps.len() > STEPS_MAX || state.bytes > STEPS_BYTES_MAX && state.steps.len() > 1 {
            if let Some(gone) = state.steps.pop_front() {
                state.bytes -= gone.bytes;
                state.first += 1;
            }
        }
        drop(state);
        self.moved.notify_waiters();
    }

    fn end(&self) {
        lock(&self.state).is_over = true;
        self.moved.notify_waiters();
    }
}

impl Watch {
    /// What there is to see next; waits for it. Cancel-safe.
    pub async fn next(&mut self) -> Sight {
        if let Some(history) = self.history.take()
            && !history.is_empty()
        {
            return Sight::Snapshot(history);
        }
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
        let end = state.first + state.steps.len() as u64;
        if self.next < state.first {
            let missed: Vec<_> = state.fold.changed_since(self.events).map(|kept| kept.artifact).collect();
            (self.next, self.events) = (end, state.fold.events());
            return Some(Sight::Snapshot(missed));
        }
        if self.next < end {
            let skip = usize::try_from(self.next - state.first).unwrap_or(usize::MAX);
            let steps: Vec<_> = state.steps.iter().skip(skip).cloned().collect();
            (self.next, self.events) = (end, steps.last().map_or(self.events, |step| step.events));
            return Some(Sight::Steps(steps));
        }
        state.is_over.then_some(Sight::Over)
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
    reader: Reader,
    requests: mpsc::Receiver<oneshot::Sender<()>>,
    stop: CancellationToken,
    /// The checkpoint has so many events.
    kept_to: u64,
    /// After so many, another one may be due.
    looks_at: u64,
    /// Bytes of events since the checkpoint.
    told_bytes: usize,
    /// The checkpoint that is being written, and how many events it has.
    writing: Option<(u64, JoinHandle<Result<(), ledger::Error>>)>,
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
        if let Err(error) = self.drive().await
            && error.kind != Kind::NotFound
            && !self.stop.is_cancelled()
        {
            tracing::warn!(%error, sandbox = self.id, "no longer folded; the next one to look begins again");
        }
        self.requests.close();
        self.scene.end();
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
                Turn::Records => self.fold(&mut items)?,
                Turn::Sync(done) => {
                    is_used = true;
                    loop {
                        self.reader.available_batch(RECORDS_MAX, &mut items).await?;
                        if items.is_empty() {
                            break;
                        }
                        self.fold(&mut items)?;
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
                    && lock(&self.scene.state).fold.bytes_since(self.kept_to) <= self.told_bytes
                {
                    self.checkpoint(Some(permit))?;
                }
            }
        }
    }

    fn fold(&mut self, items: &mut Vec<Item>) -> Result<(), Error> {
        let (mut events, mut bytes, mut is_over) = (Vec::new(), 0, false);
        for item in items.drain(..) {
            match item {
                Item::Record(record) => {
                    bytes += record.payload.len();
                    let at_ms = i64::try_from(record.timestamp_ms).unwrap_or(i64::MAX);
                    events.push(events_of(&record.payload, at_ms));
                }
                Item::Gap(gap) => {
                    tracing::warn!(sandbox = self.id, through = %gap.through, "some of its events are gone");
                }
                Item::End { .. } => is_over = true,
                Item::Transient(_) => {}
            }
        }
        self.told_bytes += bytes;
        self.scene.push(events, bytes);
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
        let Cursor { epoch, offset } = self.reader.cursor();
        let (events, rest, changed) = {
            let state = lock(&self.scene.state);
            let changed: Vec<Kept> = state.fold.changed_since(self.kept_to).collect();
            (state.fold.events(), state.fold.rest().clone(), changed)
        };
        if events == self.kept_to {
            return Ok(());
        }
        let changed = changed.iter().map(sql::Folded::new).collect::<Result<Arc<[_]>, Error>>()?;
        let rest = sql::json(&rest)?;
        let mark = (epoch.0.to_string(), i64::try_from(offset.0).unwrap_or(i64::MAX), rest);
        let (id, gate) = (self.id.clone(), self.gate.clone());
        let writing = self.tracker.spawn(async move {
            let _permit = permit;
            gate.housekeep(move |tx| sql::put_checkpoint(tx, id.clone(), mark.clone(), changed.clone())).await
        });
        (self.writing, self.told_bytes) = (Some((events, writing)), 0);
        Ok(())
    }
}

/// The fold as of the last checkpoint, and a reader of what came after.
async fn restore(gate: &Gate, id: &str, since: i64) -> Result<(Fold, Reader), Error> {
    let name = id.to_owned();
    let found = gate.glance(move |tx| sql::checkpoint(tx, name.clone())).await?;
    let epoch = gate.id();
    if let Some(((of, folded_to, rest), artifacts)) = found
        && of == epoch
    {
        let restored = artifacts.into_iter().map(|(created_by, changed_by, body)| {
            let artifact: Artifact = serde_json::from_str(&body)?;
            let number = |number: i64| number.unsigned_abs();
            Ok(Kept { artifact: artifact.into(), created_by: number(created_by), changed_by: number(changed_by) })
        });
        let restored: Result<Vec<_>, serde_json::Error> = restored.collect();
        match (restored, serde_json::from_str(&rest)) {
            (Ok(kept), Ok(rest)) => {
                let reader = gate.follow_sandbox(id, Offset(folded_to.unsigned_abs()))?;
                return Ok((Fold::restore(kept, rest), reader));
            }
            // Nothing is lost with it but the time to make it again.
            _ => tracing::warn!(sandbox = id, "its checkpoint cannot be read; folded from the beginning"),
        }
    }
    Ok((Fold::default(), gate.follow_sandbox(id, Offset(since.unsigned_abs()))?))
}

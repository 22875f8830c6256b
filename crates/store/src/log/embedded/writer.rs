//! The writer thread: gather, plan, commit, show, answer.

use std::{
    collections::VecDeque,
    path::{Path, PathBuf},
    sync::Arc,
    task::Poll,
    time::{Duration, Instant},
};

use tokio::sync::{OwnedSemaphorePermit, mpsc, oneshot};

use super::{
    OpenEngine, Shared, payload_bytes,
    plan::{Group, Looked, States},
    reopen::Failure,
};
use crate::log::{
    Append, Appended, Ending, Error, Offset, Options, Topic,
    engine::Engine,
    index::Indexer,
    rows::{Life, Tail, TopicRow},
    window::Eviction,
};

/// Appends after which a group takes no more. Past a few thousand, a larger batch only adds latency.
const GROUP_APPENDS_MAX: usize = 8192;

/// Payload bytes after which a group takes no more.
const GROUP_BYTES_MAX: usize = 8 * 1024 * 1024;

/// Longest wait for those who were just answered to come back with their next append; see [`Writer::gather`].
const GATHER_MAX: Duration = Duration::from_micros(200);

/// After so many waits in vain, the writer waits for one group in 32.
const WAITS_IN_VAIN_MAX: u32 = 5;

/// A commit that is younger than this says that the disk takes writes; who asks does not cause another.
const CHECK_PAUSE: Duration = Duration::from_secs(1);

/// Records that one purge step removes; a step takes about a millisecond.
const PURGE_RECORDS: usize = 1000;

/// Under constant load, a purge step is taken after so many groups.
const GROUPS_PER_PURGE: u32 = 16;

/// A command and its share of the queue's bytes.
pub(super) struct Request {
    pub(super) command: Command,
    pub(super) permit: Option<OwnedSemaphorePermit>,
}

pub(super) enum Command {
    Append {
        append: Append,
        answer: oneshot::Sender<Result<Appended, Error>>,
    },
    AppendEach {
        appends: Vec<Append>,
        answer: oneshot::Sender<Result<Vec<Result<Appended, Error>>, Error>>,
    },
    AppendBatch {
        appends: Vec<Append>,
        answer: oneshot::Sender<Result<Vec<Appended>, Error>>,
    },
    Trim {
        topic: Topic,
        through: u64,
        answer: oneshot::Sender<Result<Offset, Error>>,
    },
    Close {
        topic: Topic,
        answer: oneshot::Sender<Result<Offset, Error>>,
    },
    Delete {
        topic: Topic,
        answer: oneshot::Sender<Result<bool, Error>>,
    },
    ForgetDedup {
        before_ms: u64,
        answer: oneshot::Sender<Result<u64, Error>>,
    },
    Purge {
        topic: Topic,
    },
    Looked {
        looks: Vec<Looked>,
        walked: Option<Vec<u8>>,
        answer: oneshot::Sender<Result<(), Error>>,
    },
    Check {
        answer: oneshot::Sender<Result<(), Error>>,
    },
    Fork {
        life: Life,
        answer: oneshot::Sender<Result<(), Error>>,
    },
    Stop {
        answer: oneshot::Sender<()>,
    },
    /// Blocks the writer until the other end of `until` is gone.
    #[cfg(feature = "test-util")]
    Hold {
        held: oneshot::Sender<()>,
        until: std::sync::mpsc::Receiver<()>,
    },
}

/// An answer that waits for the commit.
enum Answer {
    Append(oneshot::Sender<Result<Appended, Error>>, Result<Appended, Error>),
    AppendEach(oneshot::Sender<Result<Vec<Result<Appended, Error>>, Error>>, Vec<Result<Appended, Error>>),
    AppendBatch(oneshot::Sender<Result<Vec<Appended>, Error>>, Result<Vec<Appended>, Error>),
    Offset(oneshot::Sender<Result<Offset, Error>>, Result<Offset, Error>),
    Delete(oneshot::Sender<Result<bool, Error>>, Result<bool, Error>),
    Count(oneshot::Sender<Result<u64, Error>>, Result<u64, Error>),
    Done(oneshot::Sender<Result<(), Error>>, Result<(), Error>),
}

pub(super) struct Writer {
    pub(super) shared: Arc<Shared>,
    pub(super) engine: Option<Arc<Engine>>,
    /// Nothing is written while there is one.
    pub(super) failure: Option<Failure>,
    pub(super) dir: PathBuf,
    pub(super) options: Arc<Options>,
    pub(super) requests: mpsc::Receiver<Request>,
    pub(super) states: States,
    pub(super) tail: Tail,
    eviction: Eviction,
    purges: VecDeque<(Topic, TopicRow)>,
    indexer: Option<Indexer>,
    groups_since_purge: u32,
    last_group: usize,
    last_commit: Duration,
    committed_at: Option<Instant>,
    /// How often it was waited for callers that did not come, and how many groups are not waited for because of that.
    waits_in_vain: u32,
    groups_to_hurry: u32,
}

impl Writer {
    pub(super) fn new(
        shared: Arc<Shared>,
        engine: Arc<Engine>,
        tail: Tail,
        dir: &Path,
        options: Arc<Options>,
        requests: mpsc::Receiver<Request>,
        indexer: Indexer,
    ) -> Self {
        Self {
            shared,
            engine: Some(engine),
            failure: None,
            dir: dir.to_owned(),
            options,
            requests,
            states: States::default(),
            tail,
            eviction: Eviction::default(),
            purges: VecDeque::new(),
            indexer: Some(indexer),
            groups_since_purge: 0,
            last_group: 0,
            last_commit: Duration::ZERO,
            committed_at: None,
            waits_in_vain: 0,
            groups_to_hurry: 0,
        }
    }

    /// Runs until [`Command::Stop`] or until all handles are gone.
    pub(super) fn run(mut self) {
        let mut stop = None;
        while stop.is_none()
            && let Some(first) = self.wait()
        {
            let mut group = self.gather(first);
            if let Some(at) = group.iter().position(|r| matches!(r.command, Command::Stop { .. }))
                && let Command::Stop { answer } = group.split_off(at).swap_remove(0).command
            {
                stop = Some(answer);
            }
            self.serve(group);
        }
        self.requests.close();
        self.shared.windows.stop();
        if let Some(indexer) = self.indexer.take() {
            if let Some(engine) = &self.engine
                && let Some(chunk) = engine.recent.seal()
            {
                indexer.write(engine, chunk);
            }
            indexer.finish();
        }
        self.close_engine(OpenEngine::Closed);
        if let Some(answer) = stop {
            // Whoever asked may have gone; the log is stopped all the same.
            let _ = answer.send(());
        }
    }

    /// The next request; removes trimmed records while there is none.
    fn wait(&mut self) -> Option<Request> {
        loop {
            if let Poll::Ready(request) = self.wait_for_disk() {
                return request;
            }
            if self.groups_since_purge >= GROUPS_PER_PURGE {
                self.purge_step();
            }
            match self.requests.try_recv() {
                Ok(request) => return Some(request),
                Err(mpsc::error::TryRecvError::Disconnected) => return None,
                Err(mpsc::error::TryRecvError::Empty) if self.purges.is_empty() => {
                    return self.requests.blocking_recv();
                }
                Err(mpsc::error::TryRecvError::Empty) => self.purge_step(),
            }
        }
    }

    /// What waits in the queue. Callers that append one after the other were answered a moment ago and are about to
    /// come back: committing the first few alone would make the rest wait for two fsyncs. So the writer waits until
    /// the group is as large as the last one, but never longer than a quarter of a commit. Callers that are busy with
    /// other things do not come back in that time: the more often it was waited in vain, the more groups go without.
    fn gather(&mut self, first: Request) -> Vec<Request> {
        let (waits, mut waited) = (self.groups_to_hurry == 0, false);
        self.groups_to_hurry = self.groups_to_hurry.saturating_sub(1);
        let (mut bytes, mut appends) = (first.command.payload_bytes(), first.command.appends().len());
        let mut group = Vec::with_capacity(self.last_group + 16);
        group.push(first);
        let deadline = Instant::now() + (self.last_commit / 4).min(GATHER_MAX);
        while appends < GROUP_APPENDS_MAX && bytes < GROUP_BYTES_MAX {
            match self.requests.try_recv() {
                Ok(request) => {
                    bytes += request.command.payload_bytes();
                    appends += request.command.appends().len();
                    group.push(request);
                }
                Err(_) if waits && group.len() < self.last_group && Instant::now() < deadline => {
                    waited = true;
                    std::thread::yield_now();
                }
                Err(_) => break,
            }
        }
        if waited {
            let in_vain = group.len() < self.last_group;
            self.waits_in_vain = if in_vain { (self.waits_in_vain + 1).min(WAITS_IN_VAIN_MAX) } else { 0 };
            self.groups_to_hurry = (1 << self.waits_in_vain) - 1;
        }
        group
    }

    fn serve(&mut self, requests: Vec<Request>) {
        let engine = match self.writable() {
            Ok(engine) => engine,
            Err(error) => return requests.into_iter().for_each(|request| request.command.refuse(&error)),
        };
        let is_fresh = self.committed_at.is_some_and(|at| at.elapsed() < CHECK_PAUSE);
        self.last_group = requests.len();
        self.groups_since_purge += 1;
        let appends = requests.iter().map(|request| request.command.appends().len()).sum();
        let mut group = Group::new(&engine, &mut self.states, self.tail, &self.options, appends);
        group.warm(requests.iter().flat_map(|request| request.command.appends()).map(|append| &append.topic));
        let mut permits = Vec::with_capacity(requests.len());
        let answers: Vec<Answer> = requests
            .into_iter()
            .filter_map(|request| {
                permits.push(request.permit);
                plan(&mut group, request.command, &mut self.purges, is_fresh)
            })
            .collect();
        let begun = Instant::now();
        let committed = match group.commit() {
            Ok(done) => {
                self.last_commit = begun.elapsed();
                if done.tail.stamp != self.tail.stamp {
                    self.committed_at = Some(begun);
                }
                self.tail = done.tail;
                for (topic, trimmed_to) in done.trimmed {
                    if let Some(live) = self.shared.windows.live(&topic) {
                        live.raise_trimmed_to(trimmed_to);
                        live.wake();
                    }
                }
                self.purges.extend(done.purges);
                let records = done.visible.iter().filter(|v| v.end != Some(Ending::Deleted));
                let full = engine.recent.note(records.map(|v| (v.topic.key(), v.offset, v.payload.len())));
                if let (Some(indexer), Some(chunk)) = (&self.indexer, full) {
                    indexer.write(&engine, chunk);
                }
                self.shared.windows.apply(done.visible, self.tail.offset, &mut self.eviction);
                self.eviction.shrink(self.options.window_bytes_max);
                self.states.shrink(self.options.topics_cached_max);
                Ok(())
            }
            Err(error) => Err(self.fail(&error)),
        };
        drop(engine);
        answers.into_iter().for_each(|answer| answer.send(&committed));
    }

    /// The engine, if it takes writes. Opens it again if lists of its records are missing.
    fn writable(&mut self) -> Result<Arc<Engine>, Error> {
        if self.failure.is_none() && self.engine.as_ref().is_some_and(|engine| engine.lists.has_failed()) {
            self.remake_lists();
        }
        match (&self.failure, &self.engine) {
            (Some(failure), _) => Err(failure.error.clone()),
            (None, Some(engine)) => Ok(engine.clone()),
            (None, None) => Err(Error::Stopped),
        }
    }

    /// Removes the next few trimmed records from the disk. Losing a step to a crash only delays the space: the row
    /// remembers how far it got.
    fn purge_step(&mut self) {
        self.groups_since_purge = 0;
        let Some((topic, row)) = self.purges.pop_front() else { return };
        let Ok(engine) = self.writable() else { return };
        match engine.purge(&topic, &row, PURGE_RECORDS) {
            Ok(None) => self.states.purged(&topic, row.trimmed().to),
            Ok(Some(rest)) => self.purges.push_back((topic, rest)),
            Err(error) => tracing::warn!(%error, %topic, "trimmed records were not removed; a later sweep tries again"),
        }
    }
}

/// Plans one command into the group; `None` for those that nobody waits for.
fn plan(
    group: &mut Group<'_>,
    command: Command,
    purges: &mut VecDeque<(Topic, TopicRow)>,
    is_fresh: bool,
) -> Option<Answer> {
    Some(match command {
        Command::Append { append, answer } => Answer::Append(answer, group.append(&append)),
        Command::AppendEach { appends, answer } => {
            Answer::AppendEach(answer, appends.iter().map(|append| group.append(append)).collect())
        }
        Command::AppendBatch { appends, answer } => Answer::AppendBatch(answer, group.append_all(&appends)),
        Command::Trim { topic, through, answer } => Answer::Offset(answer, group.trim(&topic, through)),
        Command::Close { topic, answer } => Answer::Offset(answer, group.close(&topic)),
        Command::Delete { topic, answer } => Answer::Delete(answer, group.delete(&topic)),
        Command::ForgetDedup { before_ms, answer } => Answer::Count(answer, group.forget_dedup(before_ms)),
        Command::Purge { topic } => {
            if let Ok(row) = group.row(&topic)
                && row.trimmed().purged_to < row.trimmed().to
                && !purges.iter().any(|(queued, _)| *queued == topic)
            {
                purges.push_back((topic, row));
            }
            return None;
        }
        Command::Looked { looks, walked, answer } => {
            walked.iter().for_each(|limits| group.walked(limits));
            Answer::Done(answer, group.looked(looks))
        }
        Command::Check { answer } => {
            if !is_fresh {
                group.write_tail();
            }
            Answer::Done(answer, Ok(()))
        }
        Command::Fork { life, answer } => {
            group.fork(life);
            Answer::Done(answer, Ok(()))
        }
        Command::Stop { .. } => return None,
        #[cfg(feature = "test-util")]
        Command::Hold { held, until } => {
            // Both only say that the other side is gone, which ends it as well.
            let _ = held.send(());
            let _ = until.recv();
            return None;
        }
    })
}

impl Command {
    fn payload_bytes(&self) -> usize {
        match self {
            Self::Append { append, .. } => append.payload.len(),
            Self::AppendEach { appends, .. } | Self::AppendBatch { appends, .. } => payload_bytes(appends),
            _ => 0,
        }
    }

    fn appends(&self) -> &[Append] {
        match self {
            Self::Append { append, .. } => std::slice::from_ref(append),
            Self::AppendEach { appends, .. } | Self::AppendBatch { appends, .. } => appends,
            _ => &[],
        }
    }

    fn refuse(self, error: &Error) {
        let refused = Err(error.clone());
        match self {
            Self::Append { answer, .. } => Answer::Append(answer, Err(error.clone())).send(&refused),
            Self::AppendEach { answer, .. } => Answer::AppendEach(answer, Vec::new()).send(&refused),
            Self::AppendBatch { answer, .. } => Answer::AppendBatch(answer, Err(error.clone())).send(&refused),
            Self::Trim { answer, .. } | Self::Close { answer, .. } => {
                Answer::Offset(answer, Err(error.clone())).send(&refused);
            }
            Self::Delete { answer, .. } => Answer::Delete(answer, Err(error.clone())).send(&refused),
            Self::ForgetDedup { answer, .. } => Answer::Count(answer, Err(error.clone())).send(&refused),
            Self::Looked { answer, .. } | Self::Check { answer } | Self::Fork { answer, .. } => {
                Answer::Done(answer, Err(error.clone())).send(&refused);
            }
            Self::Purge { .. } | Self::Stop { .. } => {}
            #[cfg(feature = "test-util")]
            Self::Hold { .. } => {}
        }
    }
}

impl Answer {
    /// Sends the planned answer, or the commit's error in its place. Whoever asked may have gone: that is their right,
    /// and the write stands.
    fn send(self, committed: &Result<(), Error>) {
        fn send<T>(
            answer: oneshot::Sender<Result<T, Error>>,
            planned: Result<T, Error>,
            committed: &Result<(), Error>,
        ) {
            let _ = answer.send(planned.and_then(|value| committed.clone().map(|()| value)));
        }
        match self {
            Self::Append(answer, planned) => send(answer, planned, committed),
            Self::AppendEach(answer, planned) => send(answer, Ok(planned), committed),
            Self::AppendBatch(answer, planned) => send(answer, planned, committed),
            Self::Offset(answer, planned) => send(answer, planned, committed),
            Self::Delete(answer, planned) => send(answer, planned, committed),
            Self::Count(answer, planned) => send(answer, planned, committed),
            Self::Done(answer, planned) => send(answer, planned, committed),
        }
    }
}

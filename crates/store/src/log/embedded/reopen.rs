//! What the writer does after the disk refused: reads go on from the engine as it was, writes are refused, and the engine
//! is opened anew as soon as the disk takes writes again, whether or not anybody appends.

use std::{
    fs::{self, File},
    io::Write as _,
    path::Path,
    sync::Arc,
    task::{Context, Poll, Wake, Waker},
    thread::Thread,
    time::{Duration, Instant},
};

use super::{
    OpenEngine,
    plan::States,
    writer::{Request, Writer},
};
use crate::log::{
    Error,
    engine::{Engine, engine_error, io_error},
};

/// Pause before the engine is opened again. Doubles with each attempt in vain.
const REOPEN_PAUSE_MIN: Duration = Duration::from_millis(100);

/// Longest such pause: how late a disk that works again is noticed.
const REOPEN_PAUSE_MAX: Duration = Duration::from_secs(2);

/// What the disk has to take before the engine is opened again: as much as opening itself writes, so that it is not closed
/// in vain.
const PROBE_BYTES: usize = 1024 * 1024;

/// The same where lists have to be written: more than those of the largest chunk take.
const PROBE_BYTES_FOR_LISTS: usize = 16 * 1024 * 1024;

/// Why nothing is written, and when the engine is opened again.
pub(super) struct Failure {
    pub(super) error: Error,
    retry_at: Instant,
    pause: Duration,
    /// What the disk has to take before the engine is opened again.
    probe_bytes: usize,
}

impl Failure {
    fn new(error: Error, pause: Duration, probe_bytes: usize) -> Self {
        Self { error, retry_at: Instant::now() + pause, pause, probe_bytes }
    }
}

impl Writer {
    /// A write failed: the engine takes no more of them until it is opened again. Readers keep it.
    pub(super) fn fail(&mut self, error: &fjall::Error) -> Error {
        // The disk's own words: the engine says only the first time what the matter is.
        let error = match probe(&self.dir, PROBE_BYTES) {
            Err(cause) => cause,
            Ok(()) => engine_error(error),
        };
        tracing::error!(%error, "log storage refused a batch; nothing of it was acknowledged, reads go on");
        self.states = States::default();
        self.failure = Some(Failure::new(error.clone(), REOPEN_PAUSE_MIN, PROBE_BYTES));
        error
    }

    /// Lists of topics were not written: opening the engine again makes them.
    pub(super) fn remake_lists(&mut self) {
        let error = Error::Unavailable { reason: "the index of the log cannot be written".into() };
        self.states = States::default();
        self.failure = Some(Failure::new(error, REOPEN_PAUSE_MIN, PROBE_BYTES_FOR_LISTS));
        self.try_to_reopen();
    }

    /// The next request while nothing can be written; `None` when all handles are gone. Tries meanwhile to open the engine
    /// again, and returns nothing once it is open.
    pub(super) fn wait_for_disk(&mut self) -> Poll<Option<Request>> {
        let waker = Waker::from(Arc::new(Unpark(std::thread::current())));
        while let Some(failure) = &self.failure {
            let left = failure.retry_at.saturating_duration_since(Instant::now());
            if left.is_zero() {
                self.try_to_reopen();
            } else if let Poll::Ready(request) = self.requests.poll_recv(&mut Context::from_waker(&waker)) {
                return Poll::Ready(request);
            } else {
                std::thread::park_timeout(left);
            }
        }
        Poll::Pending
    }

    fn try_to_reopen(&mut self) {
        let probe_bytes = self.failure.as_ref().map_or(PROBE_BYTES, |failure| failure.probe_bytes);
        let opened = probe(&self.dir, probe_bytes).and_then(|()| self.reopen());
        let Err(error) = opened else {
            self.failure = None;
            return;
        };
        let pause = self.failure.as_ref().map_or(REOPEN_PAUSE_MIN, |failure| failure.pause * 2);
        let is_news = self.failure.as_ref().is_none_or(|failure| failure.error.to_string() != error.to_string());
        if is_news {
            tracing::error!(%error, "log storage cannot be opened again yet");
        }
        self.failure = Some(Failure::new(error, pause.min(REOPEN_PAUSE_MAX), probe_bytes));
    }

    fn reopen(&mut self) -> Result<(), Error> {
        self.close_engine(OpenEngine::Closed);
        let engine = match Engine::reopen(&self.dir, &self.options, self.tail) {
            Ok(engine) => Arc::new(engine),
            Err(error) => {
                // There is none to read from: who asks is told why, instead of waiting.
                self.shared.engine.send_replace(OpenEngine::Failed(error.clone()));
                return Err(error);
            }
        };
        tracing::info!(offset = self.tail.offset, "log storage is available again");
        self.tail.stamp = self.tail.stamp.settled();
        self.engine = Some(engine.clone());
        self.shared.engine.send_replace(OpenEngine::Open(engine));
        Ok(())
    }

    /// Waits for reads that are under way (milliseconds each), so that the directory is free afterwards.
    pub(super) fn close_engine(&mut self, then: OpenEngine) {
        self.engine = None;
        let OpenEngine::Open(mut closing) = self.shared.engine.send_replace(then) else { return };
        while let Err(in_use) = Arc::try_unwrap(closing) {
            closing = in_use;
            std::thread::sleep(Duration::from_millis(1));
        }
    }
}

/// Wakes the writer's thread.
struct Unpark(Thread);

impl Wake for Unpark {
    fn wake(self: Arc<Self>) {
        self.0.unpark();
    }
}

/// Why the disk refuses, in the operating system's words: the engine itself only says that it was poisoned.
fn probe(dir: &Path, bytes: usize) -> Result<(), Error> {
    let path = dir.join("probe");
    let write = || {
        let mut file = File::create(&path)?;
        file.write_all(&vec![0x55; bytes])?;
        file.sync_all()
    };
    let written = write();
    // In any case: a full disk is to be left no fuller.
    let removed = fs::remove_file(&path);
    written.and(removed).map_err(|e| io_error(dir, &e))
}

//! The log of the process: lines on standard error, written by a thread of their own.
//!
//! Nothing that happens to standard error reaches what is logged from: a reader that is gone, a full disk, and a pipe that
//! nobody reads cost lines, and no more.

use std::{
    io::{self, IsTerminal as _, Write},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering::Relaxed},
        mpsc::{Receiver, SyncSender, sync_channel},
    },
    time::{Duration, Instant},
};

use tracing_subscriber::fmt::MakeWriter;

/// Lines that wait for standard error; those beyond it are dropped, and counted.
const LINES_MAX: usize = 4096;

/// Longest wait for the last lines when the process ends.
const FINISH_TIMEOUT: Duration = Duration::from_secs(1);

/// Pause between two attempts to hand over the last word.
const PAUSE: Duration = Duration::from_millis(10);

enum Message {
    Line(Vec<u8>),
    /// Everything before it was written.
    Flush(SyncSender<()>),
}

/// The log's queue. Clones share it.
#[derive(Clone)]
pub(crate) struct Log {
    lines: SyncSender<Message>,
    dropped: Arc<AtomicU64>,
}

impl Log {
    /// As lines for people, or as JSON for machines, by `TRUNKLINE_LOG_FORMAT`.
    pub(crate) fn to_stderr() -> io::Result<Self> {
        let log = Self::to(io::stderr())?;
        let filter = tracing_subscriber::EnvFilter::try_from_env("TRUNKLINE_LOG");
        let filter = filter.unwrap_or_else(|_| "info,fjall=warn,lsm_tree=warn,trunkline_client=warn".into());
        let lines = tracing_subscriber::fmt().with_writer(log.clone()).with_env_filter(filter);
        match std::env::var("TRUNKLINE_LOG_FORMAT").as_deref() {
            Ok("json") => lines.json().flatten_event(true).init(),
            _ => lines.with_ansi(io::stderr().is_terminal()).init(),
        }
        Ok(log)
    }

    fn to(out: impl Write + Send + 'static) -> io::Result<Self> {
        let (lines, waiting) = sync_channel(LINES_MAX);
        let dropped = Arc::new(AtomicU64::new(0));
        let of_thread = dropped.clone();
        std::thread::Builder::new().name("trunkline-stderr".into()).spawn(move || write(&waiting, out, &of_thread))?;
        Ok(Self { lines, dropped })
    }

    /// Waits until what was logged is written, or for [`FINISH_TIMEOUT`].
    pub(crate) fn finish(&self) {
        let (done, is_done) = sync_channel(1);
        let deadline = Instant::now() + FINISH_TIMEOUT;
        while self.lines.try_send(Message::Flush(done.clone())).is_err() {
            if Instant::now() >= deadline {
                return;
            }
            std::thread::sleep(PAUSE);
        }
        // Lines that take longer are lost.
        let _ = is_done.recv_timeout(deadline.saturating_duration_since(Instant::now()));
    }
}

fn write(waiting: &Receiver<Message>, mut out: impl Write, dropped: &AtomicU64) {
    for message in waiting {
        match message {
            Message::Line(line) => {
                // A line that cannot be written is lost; the next one may not be.
                let _ = out.write_all(&line);
                let count = dropped.swap(0, Relaxed);
                if count > 0 {
                    tracing::warn!(count, "log lines dropped: standard error was not read in time");
                }
            }
            Message::Flush(done) => {
                let _ = out.flush();
                // Whoever waited may have given up.
                let _ = done.try_send(());
            }
        }
    }
}

impl Write for Log {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        if self.lines.try_send(Message::Line(line.to_vec())).is_err() {
            self.dropped.fetch_add(1, Relaxed);
        }
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl MakeWriter<'_> for Log {
    type Writer = Self;

    fn make_writer(&self) -> Self {
        self.clone()
    }
}

#[cfg(test)]
mod tests {
    use std::sync::{Mutex, MutexGuard};

    use super::*;

    #[derive(Clone, Default)]
    struct Out(Arc<Mutex<Vec<u8>>>);

    impl Out {
        fn lock(&self) -> MutexGuard<'_, Vec<u8>> {
            self.0.lock().unwrap()
        }
    }

    impl Write for Out {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            let mut all = self.lock();
            if bytes.starts_with(b"bad") {
                return Err(io::ErrorKind::BrokenPipe.into());
            }
            all.extend_from_slice(bytes);
            Ok(bytes.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn a_writer_that_stands_still_or_fails_costs_lines_and_nothing_else() {
        let out = Out::default();
        let mut log = Log::to(out.clone()).unwrap();
        log.write_all(b"bad\n").unwrap();
        log.write_all(b"first\n").unwrap();
        log.finish();
        assert_eq!(out.lock().as_slice(), b"first\n");
        let stands_still = out.lock();
        for _ in 0..LINES_MAX + 100 {
            log.write_all(b"line\n").unwrap();
        }
        log.finish();
        drop(stands_still);
        log.finish();
        let text = String::from_utf8(out.lock().clone()).unwrap();
        assert!((LINES_MAX..=LINES_MAX + 2).contains(&text.lines().count()), "{}", text.len());
        assert_eq!(log.dropped.load(Relaxed), 0, "their number was told");
    }
}

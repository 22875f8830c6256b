//! Background threads that failed for good, and how the program that has them inside hears of it.

use std::{fmt, sync::Arc};

use tokio::sync::watch;

/// Why something that should never end has ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Fault {
    /// What ended.
    pub part: Arc<str>,
    /// What happened to it.
    pub reason: Arc<str>,
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}", self.part, self.reason)
    }
}

/// Where faults are reported and waited for. Clones share it; the first fault stays.
#[derive(Clone, Debug)]
pub struct Faults(Arc<watch::Sender<Option<Fault>>>);

impl Default for Faults {
    fn default() -> Self {
        Self(Arc::new(watch::Sender::new(None)))
    }
}

impl Faults {
    /// Reports that a part has ended. Later reports are logged only.
    pub fn report(&self, part: &str, reason: &str) {
        let fault = Fault { part: part.into(), reason: reason.into() };
        tracing::error!(%fault, "a part of the program failed for good");
        self.0.send_if_modified(|first| {
            let is_first = first.is_none();
            first.get_or_insert(fault);
            is_first
        });
    }

    /// The first report, if there is one.
    #[must_use]
    pub fn first(&self) -> Option<Fault> {
        self.0.borrow().clone()
    }

    /// Waits for the first report. Cancel-safe.
    pub async fn reported(&self) -> Fault {
        let mut reports = self.0.subscribe();
        loop {
            if let Some(fault) = reports.borrow_and_update().clone() {
                return fault;
            }
            if reports.changed().await.is_err() {
                std::future::pending::<()>().await;
            }
        }
    }

    /// A value that reports the part if it is dropped by a panic. The panic's text is on standard error, where the panic
    /// hook puts it.
    #[must_use]
    pub fn guard(&self, part: &'static str) -> Guard {
        Guard { faults: self.clone(), part }
    }
}

/// See [`Faults::guard`].
#[derive(Debug)]
pub struct Guard {
    faults: Faults,
    part: &'static str,
}

impl Drop for Guard {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.faults.report(self.part, "panicked");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_panic_is_reported_and_an_ordinary_end_is_not() {
        let faults = Faults::default();
        let ends = |panics: bool| {
            let guard = faults.guard("worker");
            std::thread::spawn(move || {
                let _guard = guard;
                assert!(!panics, "on purpose");
            })
            .join()
        };
        assert!(ends(false).is_ok());
        assert_eq!(faults.first(), None);
        assert!(ends(true).is_err());
        let fault = faults.reported().await;
        assert_eq!(fault.to_string(), "worker panicked");
        faults.report("another", "ended");
        assert_eq!(faults.reported().await, fault, "the first one is the reason");
    }
}

//! One error for everything that core refuses: a kind that tells a machine what to do, a code that never changes its
//! meaning, and a sentence that says what and why.

use std::{borrow::Cow, time::Duration};

use tokio::task::JoinError;
use trunkline_store::{files, lease, ledger, log};

/// What a caller should make of an error. Closed: the surfaces map each to their status.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Kind {
    /// The request is malformed; repeating it is pointless.
    Invalid,
    /// Nobody knows who is asking.
    Unauthenticated,
    /// The caller may not.
    Denied,
    /// There is no such thing, or the caller may not know of it.
    NotFound,
    /// It exists already, or is taken.
    Exists,
    /// The state of things forbids it for now.
    Precondition,
    /// A limit was hit; wait.
    Exhausted,
    /// Something that is needed is away; retry.
    Unavailable,
    /// It took too long.
    Timeout,
    /// Ended from the server's side.
    Cancelled,
    /// Not offered here.
    Unimplemented,
    /// A defect of the server.
    Internal,
}

/// A refusal.
#[derive(Clone, Debug, thiserror::Error)]
#[error("{message}")]
pub struct Error {
    /// What to make of it.
    pub kind: Kind,
    /// Stable; published codes are never reused.
    pub code: &'static str,
    /// For people: what and why.
    pub message: Cow<'static, str>,
    /// How long to wait before the next attempt, where that is known.
    pub retry_after: Option<Duration>,
}

impl Error {
    /// A refusal without a hint when to retry.
    pub fn new(kind: Kind, code: &'static str, message: impl Into<Cow<'static, str>>) -> Self {
        Self { kind, code, message: message.into(), retry_after: None }
    }

    /// What a caller is answered whose request ran in a task of its own that ended without an answer: the task panicked, or it
    /// was dropped with its runtime because the process ends.
    pub fn of_task(ended: &JoinError) -> Self {
        if ended.is_panic() {
            tracing::error!(%ended, "handler panicked");
            Self::new(Kind::Internal, "ERR_INTERNAL", "handler panicked")
        } else {
            Self::new(Kind::Unavailable, "ERR_UNAVAILABLE", "server shutting down")
        }
    }

    /// Whether the same request can succeed later.
    #[must_use]
    pub fn is_retryable(&self) -> bool {
        matches!(self.kind, Kind::Exhausted | Kind::Unavailable | Kind::Timeout)
    }
}

/// The code of an idempotency key that was used for something else.
pub const KEY_REUSED: &str = "ERR_IDEMPOTENCY_KEY_REUSED";

impl From<log::Error> for Error {
    fn from(error: log::Error) -> Self {
        if let log::Error::DedupReused { .. } = error {
            return Self::new(Kind::Invalid, KEY_REUSED, "this idempotency key was used for other content");
        }
        let kind = match error {
            log::Error::Unavailable { .. } | log::Error::Stopped => Kind::Unavailable,
            log::Error::TooLarge { .. } | log::Error::InvalidTopic { .. } | log::Error::InvalidCursor => Kind::Invalid,
            log::Error::Closed { .. } | log::Error::TailMoved { .. } | log::Error::EpochMismatch { .. } => {
                Kind::Precondition
            }
            _ => Kind::Internal,
        };
        Self::new(kind, "ERR_LOG", error.to_string())
    }
}

impl From<ledger::Error> for Error {
    fn from(error: ledger::Error) -> Self {
        let kind = match error {
            ledger::Error::Unavailable { .. } | ledger::Error::Stopped => Kind::Unavailable,
            _ => Kind::Internal,
        };
        Self::new(kind, "ERR_LEDGER", error.to_string())
    }
}

impl From<files::Error> for Error {
    fn from(error: files::Error) -> Self {
        Self::new(Kind::Unavailable, "ERR_FILES_UNAVAILABLE", error.to_string())
    }
}

impl From<lease::Error> for Error {
    fn from(error: lease::Error) -> Self {
        let (kind, code) = match error {
            lease::Error::Unavailable { .. } => (Kind::Unavailable, "ERR_LEASES"),
            _ => (Kind::Exists, "ERR_HELD"),
        };
        Self::new(kind, code, error.to_string())
    }
}

#[cfg(test)]
mod tests {
    use super::{Error, Kind};

    #[tokio::test]
    #[allow(clippy::disallowed_methods, reason = "test code")]
    async fn a_panic_is_a_defect_and_not_a_shutdown() {
        let panicked = tokio::spawn(async { unreachable!("on purpose") }).await;
        let error = Error::of_task(&panicked.unwrap_err());
        assert_eq!((error.kind, error.is_retryable()), (Kind::Internal, false));
        let dropped = tokio::spawn(std::future::pending::<()>());
        dropped.abort();
        let error = Error::of_task(&dropped.await.unwrap_err());
        assert_eq!((error.kind, error.is_retryable()), (Kind::Unavailable, true));
    }
}

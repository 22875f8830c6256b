//! When to connect again, and when to give up. Everything here is pure.

use std::time::Duration;

use crate::error::{Error, Kind};

/// How a client comes back. By default, the published clients' figures: at once, then after 1, 2, 4 … 30 seconds, each a
/// quarter more or less, and after five attempts in a row no more.
#[derive(Clone, Debug, PartialEq)]
pub struct Reconnect {
    /// Attempts in a row that may fail; `None` for no end. A connection that was accepted begins the count anew.
    pub attempts: Option<u32>,
    /// The wait before the second attempt. The first is made at once.
    pub first: Duration,
    /// The longest wait.
    pub longest: Duration,
    /// Each wait is so many times the last one.
    pub factor: f64,
    /// Each wait is so much longer or shorter, at random: 0.25 is a quarter.
    pub jitter: f64,
    /// The first connection is tried so too. Otherwise its failure is told at once.
    pub at_first: bool,
}

impl Default for Reconnect {
    fn default() -> Self {
        Self {
            attempts: Some(5),
            first: Duration::from_secs(1),
            longest: Duration::from_secs(30),
            factor: 2.0,
            jitter: 0.25,
            at_first: true,
        }
    }
}

impl Reconnect {
    /// Never: the first failure ends the client.
    #[must_use]
    pub fn never() -> Self {
        Self { attempts: Some(0), ..Self::default() }
    }

    /// Without end.
    #[must_use]
    pub fn forever() -> Self {
        Self { attempts: None, ..Self::default() }
    }

    /// So, but not for the first connection: whoever makes it is there to hear why it failed.
    #[must_use]
    pub fn once_connected(self) -> Self {
        Self { at_first: false, ..self }
    }

    /// The wait before an attempt, of which `failed` in a row have failed before; `luck` is in 0..1.
    pub(crate) fn wait(&self, failed: u32, luck: f64) -> Duration {
        if failed == 0 {
            return Duration::ZERO;
        }
        let wait = self.first.as_secs_f64() * self.factor.max(1.0).powi(failed.min(64) as i32 - 1);
        let wait = wait.min(self.longest.as_secs_f64());
        let wait = wait * (1.0 + self.jitter.clamp(0.0, 1.0) * (2.0 * luck - 1.0));
        Duration::try_from_secs_f64(wait).unwrap_or(self.longest)
    }
}

/// What to do while somebody else is connected under the same identity, such as a predecessor that crashed and that the
/// server has not missed yet.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DuplicateRetry {
    /// How often to try again.
    pub attempts: u32,
    /// The wait before each.
    pub delay: Duration,
}

impl Default for DuplicateRetry {
    /// Five times, five seconds apart: the published figures.
    fn default() -> Self {
        Self { attempts: 5, delay: Duration::from_secs(5) }
    }
}

/// How a connection ended.
#[derive(Debug)]
pub(crate) enum End {
    /// It failed, or could not be made.
    Failed(Error),
    /// The server ended it in peace.
    Clean,
    /// The server asked this client to come back.
    Graceful(String),
    /// The server ended this client's session for good.
    Forced(String),
}

/// What has failed so far.
#[derive(Debug, Default, PartialEq)]
pub(crate) struct Record {
    /// Attempts in a row that were not accepted.
    failed: u32,
    /// The same, but a connection that was accepted and ended at once counts too: so that a server that lets in and throws
    /// out again is not stormed.
    unstable: u32,
    /// Refusals in a row because of the identity.
    duplicates: u32,
}

/// How long a connection has to last to be a good one.
pub(crate) const STABLE: Duration = Duration::from_secs(1);

/// What comes next.
#[derive(Debug)]
pub(crate) enum Next {
    /// Another attempt, after a wait. The number of the attempt counts from 1.
    Again { attempt: u32, delay: Duration, because: Error },
    /// The end.
    Stop(Error),
}

impl Record {
    /// A connection was accepted.
    pub(crate) fn accepted(&mut self) {
        self.failed = 0;
        self.duplicates = 0;
    }

    /// A connection ended, after it had lasted; zero if it never was accepted.
    pub(crate) fn ended(
        &mut self,
        end: End,
        lasted: Duration,
        policy: &Reconnect,
        duplicate: Option<&DuplicateRetry>,
        luck: f64,
    ) -> Next {
        let because = match end {
            End::Forced(reason) => {
                return Next::Stop(Error::new(Kind::Disconnected, format!("the server ended the session: {reason}")));
            }
            End::Failed(error) if error.kind() == Kind::Duplicate => return self.duplicate(error, duplicate),
            End::Failed(error) if is_final(&error) => return Next::Stop(error),
            End::Failed(error) => error,
            End::Clean => Error::new(Kind::Unavailable, "the server ended the connection"),
            End::Graceful(reason) => {
                Error::new(Kind::Unavailable, format!("the server asked to connect again: {reason}"))
            }
        };
        if lasted >= STABLE {
            self.unstable = 0;
        }
        // The attempt that follows a connection is the first one; the one that follows a failed first connect is the second.
        let was_up = !lasted.is_zero();
        self.failed += u32::from(!was_up);
        if policy.attempts.is_some_and(|attempts| self.failed >= attempts.max(1) || attempts == 0) {
            let gave_up = if policy.attempts == Some(0) || self.failed == 0 {
                because
            } else {
                let message = format!("gave up after {} attempts: {because}", self.failed);
                Error::new(because.kind(), message).with_source(because)
            };
            return Next::Stop(gave_up);
        }
        self.unstable += u32::from(!was_up || lasted < STABLE);
        let delay = policy.wait(self.unstable, luck).max(because.retry_after().unwrap_or_default());
        Next::Again { attempt: self.failed + 1, delay, because }
    }

    fn duplicate(&mut self, error: Error, policy: Option<&DuplicateRetry>) -> Next {
        match policy {
            Some(policy) if self.duplicates < policy.attempts => {
                self.duplicates += 1;
                Next::Again { attempt: self.duplicates, delay: policy.delay, because: error }
            }
            _ => Next::Stop(error),
        }
    }
}

/// The published list: coming back would be refused again.
fn is_final(error: &Error) -> bool {
    matches!(
        error.kind(),
        Kind::Denied
            | Kind::Unauthenticated
            | Kind::Invalid
            | Kind::NotFound
            | Kind::Unimplemented
            | Kind::Precondition
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    const UP: Duration = Duration::from_secs(60);

    fn seconds(next: &Next) -> Option<(u32, f64)> {
        match next {
            Next::Again { attempt, delay, .. } => Some((*attempt, delay.as_secs_f64())),
            Next::Stop(_) => None,
        }
    }

    fn fail(kind: Kind) -> End {
        End::Failed(Error::new(kind, "no"))
    }

    #[test]
    fn waits_double_up_to_the_longest() {
        let policy = Reconnect::default();
        let waits: Vec<u64> = (0..8).map(|failed| policy.wait(failed, 0.5).as_secs()).collect();
        assert_eq!(waits, [0, 1, 2, 4, 8, 16, 30, 30]);
        assert_eq!(policy.wait(3, 0.0).as_secs_f64(), 3.0);
        assert_eq!(policy.wait(3, 1.0).as_secs_f64(), 5.0);
    }

    #[test]
    fn the_first_attempt_after_a_good_connection_is_made_at_once() {
        let (mut record, policy) = (Record::default(), Reconnect::default());
        let next = record.ended(End::Clean, UP, &policy, None, 0.5);
        assert_eq!(seconds(&next), Some((1, 0.0)));
        let waits: Vec<_> = (0..5)
            .map(|_| seconds(&record.ended(fail(Kind::Unavailable), Duration::ZERO, &policy, None, 0.5)))
            .collect();
        assert_eq!(waits, [Some((2, 1.0)), Some((3, 2.0)), Some((4, 4.0)), Some((5, 8.0)), None]);
    }

    #[test]
    fn who_is_thrown_out_right_after_it_was_let_in_waits_longer_each_time() {
        let (mut record, policy) = (Record::default(), Reconnect::default());
        let mut waits = Vec::new();
        for _ in 0..7 {
            record.accepted();
            let lasted = Duration::from_millis(3);
            waits.push(seconds(&record.ended(End::Graceful("full".into()), lasted, &policy, None, 0.5)).unwrap().1);
        }
        assert_eq!(waits, [1.0, 2.0, 4.0, 8.0, 16.0, 30.0, 30.0]);
        record.accepted();
        assert_eq!(seconds(&record.ended(End::Clean, UP, &policy, None, 0.5)), Some((1, 0.0)));
    }

    #[test]
    fn what_would_be_refused_again_ends_it() {
        for kind in [
            Kind::Denied,
            Kind::Unauthenticated,
            Kind::Duplicate,
            Kind::Invalid,
            Kind::NotFound,
            Kind::Unimplemented,
            Kind::Precondition,
        ] {
            let next = Record::default().ended(fail(kind), UP, &Reconnect::forever(), None, 0.5);
            assert!(matches!(&next, Next::Stop(error) if error.kind() == kind), "{next:?}");
        }
        let next = Record::default().ended(End::Forced("bye".into()), UP, &Reconnect::forever(), None, 0.5);
        assert!(matches!(&next, Next::Stop(error) if error.kind() == Kind::Disconnected));
        let next = Record::default().ended(End::Clean, UP, &Reconnect::never(), None, 0.5);
        assert!(matches!(next, Next::Stop(_)));
    }

    #[test]
    fn a_taken_identity_is_waited_for_only_if_asked() {
        let (mut record, policy) = (Record::default(), Reconnect::default());
        let retry = DuplicateRetry { attempts: 2, delay: Duration::from_secs(5) };
        let mut end = || seconds(&record.ended(fail(Kind::Duplicate), Duration::ZERO, &policy, Some(&retry), 0.5));
        assert_eq!((end(), end(), end()), (Some((1, 5.0)), Some((2, 5.0)), None));
    }

    #[test]
    fn without_an_end_it_goes_on_and_heeds_the_servers_wish() {
        let mut record = Record::default();
        for _ in 0..100 {
            let next = record.ended(fail(Kind::Unavailable), Duration::ZERO, &Reconnect::forever(), None, 0.5);
            assert!(matches!(next, Next::Again { .. }));
        }
    }
}

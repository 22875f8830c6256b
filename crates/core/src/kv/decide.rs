//! What becomes of one key. Pure: the rows are read before and written after.

use super::{Action, Answer, New};
use crate::error::{Error, Kind};

/// A key that is there and has not expired.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Found {
    pub(super) value: Vec<u8>,
    pub(super) expires_ms: Option<i64>,
}

/// What to write.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Change {
    Nothing,
    Store { value: Vec<u8>, expires_ms: Option<i64> },
    Remove,
}

/// The change and the answer for an action on one value. Listing, purging and sets are no such actions.
pub(super) fn decide(action: &Action, found: Option<Found>, now_ms: i64) -> Result<(Change, Answer), Error> {
    let applied = |applied| Answer { applied, ..Answer::default() };
    let store = |new: &New| Change::Store { value: new.value.clone(), expires_ms: expiry(new.ttl, now_ms) };
    Ok(match action {
        Action::Get => {
            let answer = applied(found.is_some());
            (Change::Nothing, Answer { value: found.map(|found| found.value).unwrap_or_default(), ..answer })
        }
        Action::Put(new) => (store(new), applied(true)),
        Action::Delete => (Change::Remove, applied(true)),
        Action::SetIfAbsent(new) => match found {
            None => (store(new), applied(true)),
            Some(found) => (Change::Nothing, Answer { value: found.value, ..applied(false) }),
        },
        Action::CompareAndSet { expected, new } => match found {
            Some(found) if found.value == *expected => (store(new), applied(true)),
            found => (Change::Nothing, mismatch(found)),
        },
        Action::CompareAndDelete { expected } => match found {
            Some(found) if found.value == *expected => (Change::Remove, applied(true)),
            found => (Change::Nothing, mismatch(found)),
        },
        Action::Add { delta, ttl } => add(found.as_ref(), *delta, None, *ttl, now_ms)?,
        Action::AddIf { delta, guard, ttl } => add(found.as_ref(), *delta, Some(*guard), *ttl, now_ms)?,
        Action::List { .. } | Action::Purge { .. } | Action::SetAdd(_) | Action::SetCount => {
            return Err(Error::new(Kind::Internal, "ERR_INTERNAL", "not an action on a value"));
        }
    })
}

/// A lifetime of 0 or less has no end; one that no clock can hold ends with the clock.
pub(super) fn expiry(ttl: i64, now_ms: i64) -> Option<i64> {
    (ttl > 0).then(|| now_ms.saturating_add(ttl.saturating_mul(1000)))
}

fn mismatch(found: Option<Found>) -> Answer {
    Answer { value: found.map(|found| found.value).unwrap_or_default(), ..Answer::default() }
}

fn add(
    found: Option<&Found>,
    delta: i64,
    guard: Option<i64>,
    ttl: i64,
    now_ms: i64,
) -> Result<(Change, Answer), Error> {
    let (current, expires_ms) = match found {
        Some(found) => (number(&found.value)?, found.expires_ms),
        None => (0, expiry(ttl, now_ms)),
    };
    let overflow = || Error::new(Kind::Invalid, "ERR_INVALID_ARGUMENT", "counter would overflow");
    let next = current.checked_add(delta).ok_or_else(overflow)?;
    let passes = guard.is_some_and(|guard| if delta > 0 { next > guard } else { next < guard });
    if passes {
        return Ok((Change::Nothing, Answer { counter: current, ..Answer::default() }));
    }
    let change = Change::Store { value: next.to_string().into_bytes(), expires_ms };
    Ok((change, Answer { counter: next, applied: true, ..Answer::default() }))
}

fn number(value: &[u8]) -> Result<i64, Error> {
    let parsed = std::str::from_utf8(value).ok().and_then(|text| text.parse().ok());
    parsed.ok_or_else(|| Error::new(Kind::Invalid, "ERR_INVALID_ARGUMENT", "value is not an integer"))
}

#[cfg(test)]
mod tests {
    use super::{Action, Change, Found, New, decide};

    const NOW: i64 = 1_000_000;

    fn check(
        action: &Action,
        found: Option<(&str, Option<i64>)>,
        expected: Option<(&str, Option<i64>)>,
        applied: bool,
    ) -> i64 {
        let given = found.map(|(value, expires_ms)| Found { value: value.into(), expires_ms });
        let (change, answer) = decide(action, given.clone(), NOW).unwrap();
        let left = match change {
            Change::Nothing => given.map(|found| (found.value, found.expires_ms)),
            Change::Store { value, expires_ms } => Some((value, expires_ms)),
            Change::Remove => None,
        };
        let expected = expected.map(|(value, expires_ms)| (value.as_bytes().to_vec(), expires_ms));
        assert_eq!((left, answer.applied), (expected, applied), "{action:?} on {found:?}");
        answer.counter
    }

    fn new(value: &str, ttl: i64) -> New {
        New { value: value.into(), ttl }
    }

    #[test]
    fn values() {
        let soon = Some(NOW + 2000);
        check(&Action::Get, None, None, false);
        check(&Action::Get, Some(("a", soon)), Some(("a", soon)), true);
        check(&Action::Put(new("b", 2)), None, Some(("b", soon)), true);
        check(&Action::Put(new("b", 0)), Some(("a", soon)), Some(("b", None)), true);
        check(&Action::Put(new("b", i64::MAX)), None, Some(("b", Some(i64::MAX))), true);
        check(&Action::Delete, Some(("a", None)), None, true);
        check(&Action::Delete, None, None, true);
        check(&Action::SetIfAbsent(new("b", 0)), Some(("a", None)), Some(("a", None)), false);
        check(&Action::SetIfAbsent(new("b", 0)), None, Some(("b", None)), true);
        let swap = |expected: &str| Action::CompareAndSet { expected: expected.into(), new: new("b", 2) };
        check(&swap(""), None, None, false);
        check(&swap("x"), Some(("a", None)), Some(("a", None)), false);
        check(&swap("a"), Some(("a", None)), Some(("b", soon)), true);
        let drop = |expected: &str| Action::CompareAndDelete { expected: expected.into() };
        check(&drop("x"), Some(("a", None)), Some(("a", None)), false);
        check(&drop("a"), Some(("a", None)), None, true);
    }

    #[test]
    fn counters() {
        let soon = Some(NOW + 2000);
        let add = |delta, ttl| Action::Add { delta, ttl };
        assert_eq!(check(&add(1, 2), None, Some(("1", soon)), true), 1);
        assert_eq!(check(&add(1, 9), Some(("9999999", soon)), Some(("10000000", soon)), true), 10_000_000);
        assert_eq!(check(&add(-1, 0), None, Some(("-1", None)), true), -1);
        let guarded = |delta, guard| Action::AddIf { delta, guard, ttl: 0 };
        assert_eq!(check(&guarded(3, 5), Some(("2", None)), Some(("5", None)), true), 5);
        assert_eq!(check(&guarded(1, 5), Some(("5", None)), Some(("5", None)), false), 5);
        assert_eq!(check(&guarded(1, 0), None, None, false), 0);
        assert_eq!(check(&guarded(-1, 0), Some(("1", None)), Some(("0", None)), true), 0);
        assert_eq!(check(&guarded(-1, 0), Some(("0", None)), Some(("0", None)), false), 0);
        for value in ["forty-two", "", "1.5", " 1", &i64::MAX.to_string()] {
            let found = Some(Found { value: value.into(), expires_ms: None });
            assert!(decide(&add(1, 0), found, NOW).is_err(), "{value}");
        }
    }
}

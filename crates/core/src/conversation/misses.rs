//! Ids under which no conversation was found a moment ago: clients that are refused come again and again, and each time the ledger would
//! be read. Only the server makes ids, so that no conversation appears later under an id that was asked for before.

use std::{
    collections::HashMap,
    sync::{Mutex, PoisonError},
    time::{Duration, Instant},
};

use uuid::Uuid;

/// How long a miss is believed.
const BELIEVED: Duration = Duration::from_secs(1);

/// Ids that are known at most: of more, the ledger is asked.
const KNOWN_MAX: usize = 16 * 1024;

#[derive(Default)]
pub(super) struct Misses(Mutex<Known>);

#[derive(Default)]
struct Known {
    misses: HashMap<Uuid, Instant>,
    /// When those that are not believed any more were last forgotten.
    forgot_at: Option<Instant>,
}

impl Misses {
    pub(super) fn has(&self, id: Uuid, now: Instant) -> bool {
        let all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        all.misses.get(&id).is_some_and(|at| now.saturating_duration_since(*at) < BELIEVED)
    }

    pub(super) fn note(&self, id: Uuid, now: Instant) {
        let mut all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let forgets = all.forgot_at.is_none_or(|at| now.saturating_duration_since(at) >= BELIEVED);
        if all.misses.len() >= KNOWN_MAX && forgets {
            all.misses.retain(|_, at| now.saturating_duration_since(*at) < BELIEVED);
            all.forgot_at = Some(now);
        }
        if all.misses.len() < KNOWN_MAX {
            all.misses.insert(id, now);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::{BELIEVED, Duration, Instant, KNOWN_MAX, Misses, Uuid};

    #[test]
    fn a_miss_is_believed_for_a_second_and_no_more_than_so_many() {
        let (misses, begun) = (Misses::default(), Instant::now());
        let (id, late) = (Uuid::from_u128(0), begun + BELIEVED);
        assert!(!misses.has(id, begun));
        (0..=KNOWN_MAX as u128).for_each(|id| misses.note(Uuid::from_u128(id), begun));
        assert!(misses.has(id, begun) && !misses.has(Uuid::from_u128(KNOWN_MAX as u128), begun));
        assert!(misses.has(id, late.checked_sub(Duration::from_millis(1)).unwrap()) && !misses.has(id, late));
        misses.note(id, late);
        assert!(misses.has(id, late) && !misses.has(Uuid::from_u128(1), late));
    }
}

//! Places for streams: one of a few leases for each user before each agent. They are free as soon as the stream ends, and
//! whoever does not take what it is sent loses its place to whoever comes.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError, Weak},
    time::{Duration, Instant},
};

use trunkline_store::lease::Lease;
use uuid::Uuid;

use super::{Conversations, Whose};
use crate::{
    app::Visitor,
    error::{Error, Kind},
};

/// A transport that took nothing for so long may be gone: something is sent at least every 15 seconds.
const STALLED: Duration = Duration::from_secs(20);

/// How long whoever comes too many is told to wait. The published figure.
const RETRY: Duration = Duration::from_secs(30);

/// Who has places.
#[derive(Default)]
pub(super) struct Places(Mutex<HashMap<Whose, Vec<Weak<Place>>>>);

/// A place, as long as it is held.
pub struct Place(Mutex<State>);

struct State {
    /// Nothing once somebody else has it.
    lease: Option<Lease>,
    /// Since when the transport has something that it did not take.
    owed: Option<Instant>,
}

impl Conversations {
    /// A place for a stream of this user before this agent.
    ///
    /// # Errors
    /// `ERR_STREAMS`, with how long to wait, if all are taken by streams that are well; [`Kind::Unavailable`].
    pub async fn place(&self, visitor: &Visitor) -> Result<Arc<Place>, Error> {
        let key = Whose::from(visitor);
        let session = Uuid::new_v4().to_string();
        let held = match self.gate().hold_stream(visitor, &session).await {
            Err(error) if error.kind == Kind::Exhausted && self.0.places.evict(&key, Instant::now()) => {
                self.gate().hold_stream(visitor, &session).await
            }
            held => held,
        };
        let lease = held.map_err(|error| match error.kind {
            Kind::Exhausted => Error { retry_after: Some(RETRY), ..error },
            _ => error,
        })?;
        let place = Arc::new(Place(Mutex::new(State { lease: Some(lease), owed: None })));
        let mut all = self.0.places.all();
        let own = all.entry(key).or_default();
        own.retain(|other| other.strong_count() > 0);
        own.push(Arc::downgrade(&place));
        if all.len().is_power_of_two() {
            all.retain(|_, places| places.iter().any(|place| place.strong_count() > 0));
        }
        Ok(place)
    }
}

impl Places {
    fn all(&self) -> MutexGuard<'_, HashMap<Whose, Vec<Weak<Place>>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes the place of one that does not take what it is sent; answers whether there was one.
    fn evict(&self, key: &Whose, now: Instant) -> bool {
        let all = self.all();
        let places = all.get(key).into_iter().flatten().filter_map(Weak::upgrade);
        places.into_iter().any(|place| place.give_up(now))
    }
}

impl Place {
    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The transport gets something now.
    pub fn owes(&self) {
        self.state().owed.get_or_insert_with(Instant::now);
    }

    /// The transport took all that it got. False if somebody else has the place by now.
    #[must_use]
    pub fn took(&self) -> bool {
        let mut state = self.state();
        state.owed = None;
        state.lease.is_some()
    }

    fn give_up(&self, now: Instant) -> bool {
        let mut state = self.state();
        let is_stalled = state.owed.is_some_and(|since| now.saturating_duration_since(since) >= STALLED);
        is_stalled && state.lease.take().is_some()
    }
}

#[cfg(test)]
mod tests {
    use trunkline_store::lease::{Leases, Policy};

    use super::{Duration, Instant, Mutex, Place, STALLED, State};

    #[tokio::test]
    async fn only_a_stream_that_takes_nothing_gives_its_place_up() {
        let leases = Leases::in_memory();
        let lease = leases.acquire("key", "session", Policy::Reject, Vec::new()).await.unwrap();
        let place = Place(Mutex::new(State { lease: Some(lease), owed: None }));
        let later = |more| Instant::now() + STALLED + Duration::from_secs(more);
        assert!(!place.give_up(later(1000)), "it owes nothing");
        place.owes();
        assert!(!place.give_up(Instant::now()), "it has its time");
        assert!(place.took());
        assert!(!place.give_up(later(1000)), "it took what it got");
        place.owes();
        assert!(place.give_up(later(1)) && !place.give_up(later(1)));
        assert!(!place.took(), "it hears that somebody else has it");
        leases.acquire("key", "other", Policy::Reject, Vec::new()).await.unwrap();
    }
}

//! Places for streams: one of a few leases for each user before each agent. They are free as soon as the stream ends. A stream that
//! does not take what it is sent loses its place to the next one that comes. The oldest stream loses its place to one that comes again
//! after it was refused and waited: a proxy may go on taking what is sent to a client that is gone.

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

/// How long a stream without a place is to wait before it comes again. The published figure.
const RETRY: Duration = Duration::from_secs(30);

/// For how long a refusal counts, from the time at which the refused stream may come again.
const PATIENCE: Duration = Duration::from_secs(120);

/// A stream that comes this much too early has waited: clients' clocks differ from ours.
const EARLY: Duration = Duration::from_secs(1);

/// The places that are held on this node.
#[derive(Default)]
pub(super) struct Places(Mutex<HashMap<Whose, UserPlaces>>);

/// The places of a user before an agent, the oldest first.
#[derive(Default)]
struct UserPlaces {
    places: Vec<Weak<Place>>,
    /// When a stream was refused that did not get a place since.
    refused: Option<Instant>,
}

impl UserPlaces {
    fn is_empty(&self, now: Instant) -> bool {
        let is_over = |at| now.saturating_duration_since(at) > RETRY + PATIENCE;
        self.places.iter().all(|place| place.strong_count() == 0) && self.refused.is_none_or(is_over)
    }

    /// Takes a place from one that does not take what it is sent, or the oldest for one that has waited; answers whether there was one.
    fn evict(&mut self, now: Instant) -> bool {
        let mut places = self.places.iter().filter_map(Weak::upgrade);
        if places.any(|place| place.give_up(now)) {
            return true;
        }
        let waited = self.refused.map(|at| now.saturating_duration_since(at));
        let has_waited = waited.is_some_and(|waited| waited + EARLY >= RETRY && waited <= RETRY + PATIENCE);
        let is_evicted = has_waited && self.places.iter().filter_map(Weak::upgrade).any(|place| place.release());
        match waited {
            // The next one waits, too.
            _ if is_evicted => self.refused = None,
            // The first of several that wait is the one whose time counts.
            Some(waited) if waited <= RETRY + PATIENCE => {}
            _ => self.refused = Some(now),
        }
        is_evicted
    }
}

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
        self.0.places.note(key, &place, Instant::now());
        Ok(place)
    }
}

impl Places {
    fn all(&self) -> MutexGuard<'_, HashMap<Whose, UserPlaces>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn note(&self, key: Whose, place: &Arc<Place>, now: Instant) {
        let mut all = self.all();
        let own = all.entry(key).or_default();
        own.places.retain(|other| other.strong_count() > 0);
        own.places.push(Arc::downgrade(place));
        if all.len().is_power_of_two() {
            all.retain(|_, own| !own.is_empty(now));
        }
    }

    /// See [`UserPlaces::evict`].
    fn evict(&self, key: &Whose, now: Instant) -> bool {
        // Nothing if other nodes have all of them.
        self.all().get_mut(key).is_some_and(|own| own.evict(now))
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

    fn release(&self) -> bool {
        self.state().lease.take().is_some()
    }
}

#[cfg(test)]
mod tests {
    use trunkline_store::lease::{Leases, Policy};

    use super::{Arc, Duration, Instant, Mutex, Place, STALLED, State, UserPlaces};

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

    #[tokio::test]
    async fn the_oldest_gives_its_place_to_one_that_waited() {
        let leases = Leases::in_memory();
        let (mut held, mut places) = (UserPlaces::default(), Vec::new());
        for key in ["one", "two"] {
            let lease = leases.acquire(key, "session", Policy::Reject, Vec::new()).await.unwrap();
            let place = Arc::new(Place(Mutex::new(State { lease: Some(lease), owed: None })));
            held.places.push(Arc::downgrade(&place));
            places.push(place);
        }
        let begun = Instant::now();
        let at = |seconds| begun + Duration::from_secs(seconds);
        assert!(!held.evict(at(0)) && !held.evict(at(1)) && !held.evict(at(28)), "it has not waited");
        assert!(held.evict(at(30)));
        assert!(!places[0].took() && places[1].took());
        assert!(!held.evict(at(31)), "the next one waits, too");
        assert!(!held.evict(at(31 + 151)), "it did not come when it could have");
        assert!(held.evict(at(31 + 151 + 29)));
        assert!(!places[1].took());
        assert!(!held.evict(at(1000)), "there is no place left");
        drop(places);
        assert!(!held.is_empty(at(1001)) && held.is_empty(at(2000)));
    }
}

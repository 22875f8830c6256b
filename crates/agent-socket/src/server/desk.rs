//! What is known of one client: how its runtime is, which turns were begun, and what its sockets had.

use std::{
    collections::{HashMap, HashSet, VecDeque},
    sync::{Mutex as SyncMutex, MutexGuard, PoisonError},
    time::Duration,
};

use tokio::{
    sync::{Mutex, watch},
    time::Instant,
};

use super::Options;
use crate::{
    envelope::{Envelope, Type},
    state::RuntimeState,
    store::{EventStore, StoreError},
};

/// Turns, and requests, that are remembered, so that they are not begun twice.
const KNOWN_MAX: usize = 1000;

/// Events that are read at once to find out how the runtime is.
const FOLD_AT_ONCE: usize = 1000;

/// What a socket had not had when it left is kept for so long, within the store's bound.
const COMES_BACK: Duration = Duration::from_secs(600);

/// Acknowledgements after which the store may trim.
const ACKS_BETWEEN_TRIMS: u32 = 32;

pub(super) struct Desk {
    /// Held while an event is kept: so the order of the store is that of the fold.
    known: Mutex<Known>,
    /// The number of the last event.
    latest: watch::Sender<u64>,
    had: SyncMutex<Had>,
}

#[derive(Default)]
struct Known {
    is_open: bool,
    state: RuntimeState,
    seq: u64,
    turns: Recent<()>,
    /// And whether they are done.
    requests: Recent<bool>,
}

/// The last things of a kind that were heard of, by their ids.
#[derive(Default)]
struct Recent<T> {
    by_id: HashMap<String, T>,
    /// The oldest first.
    order: VecDeque<String>,
}

/// What is to be done about a request.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Taken {
    Now,
    /// Before, and it is not done yet.
    Before,
    Done,
}

/// What its sockets had.
#[derive(Default)]
struct Had {
    sockets: HashMap<String, Place>,
    acks: u32,
}

struct Place {
    seq: u64,
    /// It is not there at the moment.
    left_at: Option<Instant>,
}

impl Default for Desk {
    fn default() -> Self {
        Self { known: Mutex::default(), latest: watch::Sender::new(0), had: SyncMutex::default() }
    }
}

impl Desk {
    /// Finds out how the runtime is to this client, and reports what a former generation left behind. Once.
    pub(super) async fn open(
        &self,
        client_id: &str,
        store: &dyn EventStore,
        options: &Options,
    ) -> Result<(), StoreError> {
        let mut known = self.known.lock().await;
        if known.is_open {
            return Ok(());
        }
        *known = Known::default();
        loop {
            let range = store.get_since_range(client_id, known.seq, None, FOLD_AT_ONCE).await?;
            for event in &range.events {
                known.take(event);
            }
            if !range.more {
                break;
            }
        }
        known.seq = known.seq.max(store.latest_seq(client_id).await?);
        for mut event in known.state.left_behind(&options.runtime_generation, &options.recovered_turns, &HashSet::new())
        {
            event.client_id = Some(client_id.to_owned());
            known.take(&store.append(event).await?);
        }
        known.state.runtime_generation.clone_from(&options.runtime_generation);
        known.is_open = true;
        self.latest.send_replace(known.seq);
        Ok(())
    }

    pub(super) async fn append(&self, store: &dyn EventStore, event: Envelope) -> Result<Envelope, StoreError> {
        let mut known = self.known.lock().await;
        let event = store.append(event).await?;
        known.take(&event);
        self.latest.send_replace(known.seq);
        Ok(event)
    }

    /// How the runtime is, and after which event.
    pub(super) async fn state(&self) -> (RuntimeState, u64) {
        let known = self.known.lock().await;
        (known.state.clone(), known.seq)
    }

    /// Takes a request, if neither it nor the turn that it begins was taken before.
    pub(super) async fn take(&self, request: &Envelope) -> Taken {
        let mut known = self.known.lock().await;
        if let Some(id) = &request.request_id {
            match known.requests.by_id.get(id) {
                Some(true) => return Taken::Done,
                Some(false) => return Taken::Before,
                None => known.requests.add(id, false),
            };
        }
        let begun = request.turn_id.as_ref().filter(|_| request.kind == Type::TurnStart);
        if begun.is_some_and(|turn| !known.turns.add(turn, ())) {
            known.done(request.request_id.as_deref());
            return Taken::Done;
        }
        Taken::Now
    }

    /// What a request asked for is done.
    pub(super) async fn done(&self, request: &str) {
        self.known.lock().await.done(Some(request));
    }

    /// The number of the last event, now and whenever there is another.
    pub(super) fn latest(&self) -> watch::Receiver<u64> {
        self.latest.subscribe()
    }

    /// A socket comes, or comes back, and had everything up to here. Answers what all had.
    pub(super) fn comes(&self, socket: &str, seq: u64) -> Option<u64> {
        let mut had = self.had();
        had.sockets.insert(socket.to_owned(), Place { seq, left_at: None });
        had.by_all()
    }

    /// A socket had everything up to here. Answers what all had, when it is time to trim.
    pub(super) fn acked(&self, socket: &str, seq: u64) -> Option<u64> {
        let mut had = self.had();
        if let Some(place) = had.sockets.get_mut(socket) {
            place.seq = place.seq.max(seq);
        }
        had.acks += 1;
        had.acks.is_multiple_of(ACKS_BETWEEN_TRIMS).then(|| had.by_all())?
    }

    pub(super) fn leaves(&self, socket: &str) {
        if let Some(place) = self.had().sockets.get_mut(socket) {
            place.left_at = Some(Instant::now());
        }
    }

    fn had(&self) -> MutexGuard<'_, Had> {
        self.had.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Had {
    fn by_all(&mut self) -> Option<u64> {
        self.sockets.retain(|_, place| place.left_at.is_none_or(|left| left.elapsed() < COMES_BACK));
        self.sockets.values().map(|place| place.seq).min()
    }
}

impl Known {
    fn take(&mut self, event: &Envelope) {
        self.state.apply(event);
        self.seq = self.seq.max(event.seq.unwrap_or(0));
        if matches!(event.kind, Type::TurnStart | Type::TurnQueued | Type::TurnRunning)
            && let Some(turn) = &event.turn_id
        {
            self.turns.add(turn, ());
        }
    }

    fn done(&mut self, request: Option<&str>) {
        if let Some(is_done) = request.and_then(|id| self.requests.by_id.get_mut(id)) {
            *is_done = true;
        }
    }
}

impl<T> Recent<T> {
    /// Notes another one; false if it is known.
    fn add(&mut self, id: &str, about: T) -> bool {
        if self.by_id.contains_key(id) {
            return false;
        }
        self.by_id.insert(id.to_owned(), about);
        self.order.push_back(id.to_owned());
        if self.order.len() > KNOWN_MAX
            && let Some(oldest) = self.order.pop_front()
        {
            self.by_id.remove(&oldest);
        }
        true
    }
}

//! Events in memory: gone with the process.

use std::{
    collections::{HashMap, VecDeque},
    sync::{Mutex, MutexGuard, PoisonError},
};

use super::{EventStore, Keep, Range, StoreError, StoreFuture};
use crate::envelope::Envelope;

/// Clients that are remembered; beyond it, the one that was quiet for the longest time is forgotten.
const CLIENTS_MAX: usize = 10_000;

/// First in, first out; 500 events a client, unless somebody says otherwise.
#[derive(Default)]
pub struct MemoryStore {
    keep: Keep,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    clients: HashMap<String, Stream>,
    /// Numbers begin behind this one: those of clients that were forgotten are not used again.
    begins_behind: u64,
    /// Counts appends, to know who was quiet.
    clock: u64,
}

#[derive(Default)]
struct Stream {
    events: VecDeque<Envelope>,
    latest: u64,
    /// Events up to this number are gone.
    gone_through: u64,
    /// What is up to here, all had who want it.
    acked: Option<u64>,
    used_at: u64,
}

impl MemoryStore {
    /// Keeps as much of each client as it is told.
    #[must_use]
    pub fn new(keep: Keep) -> Self {
        Self { keep, state: Mutex::default() }
    }

    /// Forgets a client's events, or everybody's. Their numbers are not used again.
    pub fn clear(&self, client_id: Option<&str>) {
        let mut state = self.state();
        let all = state.clients.iter_mut().filter(|(id, _)| client_id.is_none_or(|client| client == *id));
        for (_, stream) in all {
            stream.events.clear();
            stream.gone_through = stream.latest;
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn put(&self, mut event: Envelope) -> Result<Envelope, StoreError> {
        let client = event.client_id.clone().ok_or("an event belongs to a client")?;
        let mut state = self.state();
        let stream = state.stream(&client);
        stream.latest += 1;
        event.seq = Some(stream.latest);
        stream.events.push_back(event.clone());
        stream.trim(self.keep);
        Ok(event)
    }
}

impl State {
    /// A client's, which is used now.
    fn stream(&mut self, client: &str) -> &mut Stream {
        self.clock += 1;
        let (used_at, begins_behind) = (self.clock, self.begins_behind);
        if self.clients.len() >= CLIENTS_MAX && !self.clients.contains_key(client) {
            self.forget_one();
        }
        let new = || Stream { latest: begins_behind, gone_through: begins_behind, ..Stream::default() };
        let stream = self.clients.entry(client.to_owned()).or_insert_with(new);
        stream.used_at = used_at;
        stream
    }

    fn forget_one(&mut self) {
        let quiet = self.clients.iter().min_by_key(|(_, stream)| stream.used_at).map(|(id, _)| id.clone());
        if let Some(stream) = quiet.and_then(|id| self.clients.remove(&id)) {
            self.begins_behind = self.begins_behind.max(stream.latest);
        }
    }
}

impl Stream {
    /// Oldest first: what all had goes before what somebody wants.
    fn trim(&mut self, keep: Keep) {
        while self.events.len() > keep.events
            && let Some(seq) = self.events.front().and_then(|event| event.seq)
            && (self.acked.is_none_or(|acked| seq <= acked) || self.events.len() > keep.events_behind)
        {
            self.events.pop_front();
            self.gone_through = seq;
        }
    }
}

impl EventStore for MemoryStore {
    fn append(&self, event: Envelope) -> StoreFuture<'_, Envelope> {
        let put = self.put(event);
        Box::pin(async move { put })
    }

    fn get_since_range<'a>(
        &'a self,
        client_id: &'a str,
        since: u64,
        until: Option<u64>,
        max: usize,
    ) -> StoreFuture<'a, Range> {
        Box::pin(async move {
            let state = self.state();
            let Some(stream) = state.clients.get(client_id) else { return Ok(Range::default()) };
            // Numbers grow.
            let first = stream.events.partition_point(|event| event.seq <= Some(since));
            let fits = |event: &&Envelope| until.is_none_or(|until| event.seq <= Some(until));
            let mut fitting = stream.events.iter().skip(first).take_while(fits);
            let events: Vec<_> = fitting.by_ref().take(max).cloned().collect();
            let gone_through = (since < stream.gone_through).then_some(stream.gone_through);
            Ok(Range { events, gone_through, more: fitting.next().is_some() })
        })
    }

    fn latest_seq<'a>(&'a self, client_id: &'a str) -> StoreFuture<'a, u64> {
        let latest = self.state().clients.get(client_id).map_or(0, |stream| stream.latest);
        Box::pin(async move { Ok(latest) })
    }

    fn trim<'a>(&'a self, client_id: &'a str, acked: Option<u64>) -> StoreFuture<'a, ()> {
        let mut state = self.state();
        let stream = state.stream(client_id);
        stream.acked = acked;
        stream.trim(self.keep);
        drop(state);
        Box::pin(async { Ok(()) })
    }
}

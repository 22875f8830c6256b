//! How the runtime is to each client: folded from the client's stream, and kept in checkpoints.

use std::{
    collections::{HashMap, HashSet},
    ops::Deref,
    sync::{Arc, Mutex as SyncMutex, MutexGuard, PoisonError, Weak},
};

use tokio::sync::Mutex;
use trunkline_agent_socket::RuntimeState;
use trunkline_core::{
    Error,
    socket::{Permit, Sockets},
};
use trunkline_store::log::{Item, Record};

use super::{agent::Line, record};

/// Events that are folded at once, and after how many a checkpoint is kept.
const FOLD_AT_ONCE: usize = 1000;
const CHECKPOINT_EVENTS: u64 = 2000;

/// Those that somebody is busy with.
#[derive(Default)]
pub(super) struct Desks(SyncMutex<HashMap<String, Weak<Desk>>>);

pub(super) struct Desk {
    permit: Permit,
    /// Held while it is folded, and while what follows from it is told.
    known: Mutex<Known>,
    /// Ids of its sockets that are there.
    sockets: SyncMutex<HashSet<String>>,
    /// Lines to its agent, one for each user who asked for it.
    lines: SyncMutex<Vec<Weak<Line>>>,
}

#[derive(Default)]
struct Known {
    is_open: bool,
    state: RuntimeState,
    /// The last event in it.
    seq: u64,
    /// Events since the checkpoint.
    unkept: u64,
}

impl Desks {
    pub(super) fn desk(&self, permit: &Permit) -> Arc<Desk> {
        let mut desks = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(desk) = desks.get(permit.client()).and_then(Weak::upgrade) {
            return desk;
        }
        if desks.len().is_power_of_two() {
            desks.retain(|_, desk| desk.strong_count() > 0);
        }
        let (known, sockets, lines) = (Mutex::default(), SyncMutex::default(), SyncMutex::default());
        let desk = Desk { permit: permit.note(), known, sockets, lines };
        let desk = Arc::new(desk);
        desks.insert(permit.client().to_owned(), Arc::downgrade(&desk));
        desk
    }

    pub(super) fn all(&self) -> Vec<Arc<Desk>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).values().filter_map(Weak::upgrade).collect()
    }
}

impl Desk {
    /// To say what the server itself has to say.
    pub(super) fn permit(&self) -> &Permit {
        &self.permit
    }

    pub(super) fn client(&self) -> &str {
        self.permit.client()
    }

    /// How the runtime is now, and after which event.
    pub(super) async fn state(&self, sockets: &Sockets) -> Result<(RuntimeState, u64), Error> {
        let mut known = self.known.lock().await;
        known.fold(sockets, &self.permit).await?;
        Ok((known.state.clone(), known.seq))
    }

    /// Tells what a former generation left behind.
    pub(super) async fn settle(
        &self,
        sockets: &Sockets,
        generation: &str,
        recovered: &HashSet<String>,
    ) -> Result<(), Error> {
        let mut known = self.known.lock().await;
        known.fold(sockets, &self.permit).await?;
        if known.state.runtime_generation == generation {
            return Ok(());
        }
        let waiting = sockets.waiting_turns(&self.permit).await?;
        let events = known.state.left_behind(generation, recovered, &waiting);
        if events.is_empty() {
            return Ok(());
        }
        let told = events.iter().map(|event| (self.permit.clone(), record::alone(event))).collect();
        sockets.tell(told).await?;
        known.fold(sockets, &self.permit).await
    }

    /// A socket comes under the id that it had before, or under a new one: a copy of a tab has the id of the tab, which is there.
    pub(super) fn comes(self: &Arc<Self>, wanted: Option<String>) -> SocketId {
        let mut sockets = self.sockets();
        let fresh = || uuid::Uuid::now_v7().to_string();
        let id = wanted.filter(|id| !sockets.contains(id)).unwrap_or_else(fresh);
        sockets.insert(id.clone());
        SocketId { desk: self.clone(), id }
    }

    /// Its lines that have not ended, which nobody else looks at meanwhile.
    pub(super) fn with_lines<T>(&self, look: impl FnOnce(&mut Vec<Weak<Line>>) -> T) -> T {
        let mut lines = self.lines.lock().unwrap_or_else(PoisonError::into_inner);
        lines.retain(|line| line.upgrade().is_some_and(|line| !line.has_ended()));
        look(&mut lines)
    }

    fn sockets(&self) -> MutexGuard<'_, HashSet<String>> {
        self.sockets.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A socket's id, which no other socket of the client has as long as it is there.
pub(super) struct SocketId {
    desk: Arc<Desk>,
    id: String,
}

impl Deref for SocketId {
    type Target = String;

    fn deref(&self) -> &String {
        &self.id
    }
}

impl Drop for SocketId {
    fn drop(&mut self) {
        self.desk.sockets().remove(&self.id);
    }
}

impl Known {
    async fn fold(&mut self, sockets: &Sockets, permit: &Permit) -> Result<(), Error> {
        if !self.is_open {
            *self = Self::default();
            if let Some((seq, state)) = sockets.checkpoint(permit).await?
                && let Ok(state) = serde_json::from_str(&state)
            {
                (self.seq, self.state) = (seq, state);
            }
        }
        let (mut reader, mut items) = (sockets.follow(permit, record::offset(self.seq))?, Vec::new());
        loop {
            reader.available_batch(FOLD_AT_ONCE, &mut items).await?;
            if items.is_empty() {
                break;
            }
            for item in items.drain(..) {
                match item {
                    Item::Record(record) => self.take(&record),
                    // What followed from what is gone is in the checkpoint, or nobody knows it any more.
                    Item::Gap(gap) => self.seq = self.seq.max(record::last_of(gap.through)),
                    Item::Transient(_) | Item::End { .. } => {}
                }
            }
        }
        self.is_open = true;
        if self.unkept >= CHECKPOINT_EVENTS
            && let Ok(state) = serde_json::to_string(&self.state)
        {
            sockets.put_checkpoint(permit, self.seq, state).await?;
            self.unkept = 0;
        }
        Ok(())
    }

    fn take(&mut self, record: &Record) {
        for (seq, body) in record::events(record) {
            (self.seq, self.unkept) = (seq, self.unkept + 1);
            match record::read(seq, body) {
                Some(event) => self.state.apply(&event),
                None => tracing::error!(seq, "an event of a client cannot be read"),
            }
        }
    }
}

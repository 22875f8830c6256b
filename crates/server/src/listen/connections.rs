//! Open connections of all listeners: how many there may be, and which ones make room when there are too many.
//!
//! A connection on which no request is under way can be closed at any time: a client that comes again gets another one. So when
//! a limit is reached, idle connections make room for new ones: first those that never sent a byte, then those of the address
//! that holds most idle ones, oldest first. A new connection is refused only if none is idle.
//!
//! A connection that is told to leave may get another request before its client knows. It counts as any other then, until it
//! has ended: those that make room are gone at once, so that nobody waits for one that is busy.

use std::{
    cmp::Reverse,
    collections::HashMap,
    net::IpAddr,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{
            AtomicBool, AtomicU32, AtomicU64,
            Ordering::{Relaxed, SeqCst},
        },
    },
    time::{Duration, Instant},
};

use prometheus_client::metrics::{counter::Counter, gauge::Gauge};
use tokio::{
    sync::Notify,
    time::{self, timeout, timeout_at},
};

use super::descriptors;

/// Connections that are closed together to make room: looking for them costs a walk over all.
const BATCH: usize = 64;

/// Longest wait for those that were told to make room. They are idle, so it takes them a turn of the scheduler.
const ROOM_TIMEOUT: Duration = Duration::from_secs(1);

/// One of the server's listeners.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Listener {
    /// For agents, tasks and services.
    Grpc,
    /// For browsers and sandboxes.
    Http,
    /// For operators. What bounds the others together leaves room for it.
    Ops,
}

impl Listener {
    /// Its name in log lines.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Grpc => "gRPC",
            Self::Http => "HTTP",
            Self::Ops => "ops",
        }
    }
}

/// How many connections a listener may have, and what is counted of them.
#[derive(Clone, Debug, Default)]
pub(crate) struct Limit {
    /// 0 is no limit.
    pub(crate) most: u32,
    pub(crate) open: Gauge,
    pub(crate) refused: Counter,
    /// Idle connections that made room.
    pub(crate) closed: Counter,
}

/// The connections of a server. Clones share them.
#[derive(Clone)]
pub(crate) struct Connections(Arc<Shared>);

struct Shared {
    limits: [Limit; 3],
    /// Of gRPC and HTTP together, as many as there are descriptors for.
    most: usize,
    begun: Instant,
    open: Mutex<Open>,
    /// A connection has ended.
    left: Notify,
}

#[derive(Default)]
struct Open {
    next: u64,
    connections: HashMap<u64, Arc<State>>,
    /// Those of them that are not told to leave, by listener.
    staying: [usize; 3],
}

struct State {
    listener: Listener,
    address: IpAddr,
    /// Requests and streams under way.
    active: AtomicU32,
    was_active: AtomicBool,
    /// Its transport has not taken all that was said.
    is_sending: AtomicBool,
    has_spoken: AtomicBool,
    /// Milliseconds from the server's start to when it became idle.
    idle_since_ms: AtomicU64,
    is_leaving: AtomicBool,
    leave: Notify,
}

/// An open connection; counted until it is dropped.
pub(crate) struct Connection {
    shared: Arc<Shared>,
    key: u64,
    state: Arc<State>,
}

/// A request under way on a connection.
pub(crate) struct Active(Arc<Connection>);

/// What came of asking for room.
enum Room {
    Taken(Box<Connection>),
    /// Others have been told to leave.
    Soon,
    None,
}

impl Connections {
    pub(crate) fn new(grpc: Limit, http: Limit, ops: Limit) -> Self {
        Self::with_most(grpc, http, ops, descriptors::connections_max())
    }

    fn with_most(grpc: Limit, http: Limit, ops: Limit, most: usize) -> Self {
        let (open, left, begun) = (Mutex::default(), Notify::new(), Instant::now());
        Self(Arc::new(Shared { limits: [grpc, http, ops], most, begun, open, left }))
    }

    /// A place for one more connection; nothing if there is none and no other connection is idle. Waits shortly for those that
    /// make room.
    pub(crate) async fn admit(&self, listener: Listener, address: IpAddr) -> Option<Connection> {
        let admitted = timeout(ROOM_TIMEOUT, async {
            loop {
                let left = self.0.left.notified();
                match self.try_admit(listener, address) {
                    Room::Taken(connection) => return Some(*connection),
                    Room::Soon => left.await,
                    Room::None => return None,
                }
            }
        });
        let admitted = admitted.await.ok().flatten();
        if admitted.is_none() {
            self.0.limit(listener).refused.inc();
        }
        admitted
    }

    /// Closes some idle connections: descriptors have run out.
    pub(crate) fn make_room(&self) {
        let mut open = self.0.open();
        self.0.close_idle(&mut open, None);
    }

    fn try_admit(&self, listener: Listener, address: IpAddr) -> Room {
        let (shared, mut open) = (&self.0, self.0.open());
        let own = shared.limit(listener).most as usize;
        let is_full = |open: &Open| own > 0 && open.staying[listener as usize] >= own;
        let are_full = |open: &Open| listener != Listener::Ops && open.staying[0] + open.staying[1] >= shared.most;
        if is_full(&open) {
            shared.close_idle(&mut open, Some(listener));
        } else if are_full(&open) {
            shared.close_idle(&mut open, None);
        }
        if is_full(&open) || are_full(&open) {
            return Room::None;
        }
        // Those that are told to leave still hold their descriptors.
        if open.connections.len() >= open.staying.iter().sum::<usize>() + BATCH {
            return Room::Soon;
        }
        let state = Arc::new(State {
            listener,
            address,
            active: AtomicU32::new(0),
            was_active: AtomicBool::new(false),
            is_sending: AtomicBool::new(false),
            has_spoken: AtomicBool::new(false),
            idle_since_ms: AtomicU64::new(shared.now_ms()),
            is_leaving: AtomicBool::new(false),
            leave: Notify::new(),
        });
        let key = open.next;
        open.next += 1;
        open.connections.insert(key, state.clone());
        open.staying[listener as usize] += 1;
        shared.limit(listener).open.inc();
        Room::Taken(Box::new(Connection { shared: shared.clone(), key, state }))
    }
}

impl Shared {
    fn open(&self) -> MutexGuard<'_, Open> {
        // Each section leaves a consistent map behind: nothing in it can panic half way.
        self.open.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn limit(&self, listener: Listener) -> &Limit {
        &self.limits[listener as usize]
    }

    fn now_ms(&self) -> u64 {
        u64::try_from(self.begun.elapsed().as_millis()).unwrap_or(u64::MAX)
    }

    /// Tells up to [`BATCH`] idle connections to leave: of this listener, or of gRPC and HTTP.
    fn close_idle(&self, open: &mut Open, listener: Option<Listener>) {
        let counts = |state: &State| match listener {
            Some(listener) => state.listener == listener,
            None => state.listener != Listener::Ops,
        };
        let idle = open.connections.values().filter(|state| counts(state) && state.is_idle());
        let mut all: Vec<_> = idle.cloned().collect();
        let mut of_address: HashMap<IpAddr, usize> = HashMap::new();
        all.iter().for_each(|state| *of_address.entry(state.address).or_default() += 1);
        // At most a quarter of them, so that few do not all go at once.
        let count = (all.len() / 4).clamp(1, BATCH).min(all.len());
        if count == 0 {
            return;
        }
        all.select_nth_unstable_by_key(count - 1, |state| {
            let held = of_address.get(&state.address).copied().unwrap_or_default();
            (state.has_spoken.load(Relaxed), Reverse(held), state.idle_since_ms.load(Relaxed))
        });
        for state in &all[..count] {
            state.is_leaving.store(true, SeqCst);
            // Busy since it was looked at. Whoever makes it busy from now on sees that it is to leave.
            if state.is_busy() {
                state.is_leaving.store(false, SeqCst);
                continue;
            }
            state.leave.notify_one();
            open.staying[state.listener as usize] -= 1;
            self.limit(state.listener).closed.inc();
        }
    }
}

impl State {
    fn is_busy(&self) -> bool {
        self.active.load(SeqCst) > 0 || self.is_sending.load(SeqCst)
    }

    fn is_idle(&self) -> bool {
        !self.is_busy() && !self.is_leaving.load(SeqCst)
    }
}

impl Connection {
    /// Notes that its client has sent something.
    pub(crate) fn has_spoken(&self) {
        self.state.has_spoken.store(true, Relaxed);
    }

    /// Notes a request: the connection makes no room until it is dropped.
    pub(crate) fn begin(self: &Arc<Self>) -> Active {
        self.state.active.fetch_add(1, SeqCst);
        self.state.was_active.store(true, Relaxed);
        self.stay();
        Active(self.clone())
    }

    /// Notes whether its transport has taken all that was said; it makes no room before that.
    pub(crate) fn is_sending(&self, is_sending: bool) {
        if is_sending {
            self.state.is_sending.store(true, SeqCst);
            self.stay();
        } else {
            self.state.idle_since_ms.store(self.shared.now_ms(), Relaxed);
            self.state.is_sending.store(false, SeqCst);
        }
    }

    /// A busy connection makes no room, although it was told to: it is counted again.
    fn stay(&self) {
        if self.state.is_leaving.load(SeqCst) {
            let mut open = self.shared.open();
            if self.state.is_leaving.swap(false, SeqCst) {
                open.staying[self.state.listener as usize] += 1;
            }
        }
    }

    /// Requests and streams under way.
    pub(crate) fn active(&self) -> u32 {
        self.state.active.load(Relaxed)
    }

    /// Whether a request is under way, or what was answered is not sent.
    pub(crate) fn is_busy(&self) -> bool {
        self.state.is_busy()
    }

    /// Whether it had a request.
    pub(crate) fn was_active(&self) -> bool {
        self.state.was_active.load(Relaxed)
    }

    /// Returns when the connection is to be closed: because it makes room, or because no request came until then.
    pub(crate) async fn is_to_leave(&self, until: time::Instant) {
        if timeout_at(until, self.state.leave.notified()).await.is_err() && self.was_active() {
            self.state.leave.notified().await;
        }
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        let mut open = self.shared.open();
        open.connections.remove(&self.key);
        if !self.state.is_leaving.load(SeqCst) {
            open.staying[self.state.listener as usize] -= 1;
        }
        drop(open);
        self.shared.limit(self.state.listener).open.dec();
        self.shared.left.notify_waiters();
    }
}

impl Drop for Active {
    fn drop(&mut self) {
        let Connection { shared, state, .. } = &*self.0;
        if state.active.load(Relaxed) == 1 {
            state.idle_since_ms.store(shared.now_ms(), Relaxed);
        }
        state.active.fetch_sub(1, SeqCst);
    }
}

#[cfg(test)]
mod tests {
    use futures_util::FutureExt as _;

    use super::*;

    const PATIENCE: Duration = Duration::from_secs(3600);

    fn limit(most: u32) -> Limit {
        Limit { most, ..Limit::default() }
    }

    fn address(last: u8) -> IpAddr {
        IpAddr::from([127, 0, 0, last])
    }

    async fn admit(all: &Connections, listener: Listener, last: u8) -> Option<Arc<Connection>> {
        all.admit(listener, address(last)).await.map(Arc::new)
    }

    fn is_leaving(connection: &Connection) -> bool {
        connection.is_to_leave(time::Instant::now() + PATIENCE).now_or_never().is_some()
    }

    #[tokio::test]
    async fn idle_connections_make_room_and_busy_ones_stay() {
        let all = Connections::with_most(limit(2), limit(0), limit(0), 100);
        let (busy, idle) =
            (admit(&all, Listener::Grpc, 1).await.unwrap(), admit(&all, Listener::Grpc, 1).await.unwrap());
        let streams = [busy.begin(), busy.begin()];
        let third = admit(&all, Listener::Grpc, 1).await.unwrap();
        assert!(is_leaving(&idle) && !is_leaving(&busy));
        let _stream = third.begin();
        assert!(admit(&all, Listener::Grpc, 2).await.is_none(), "nothing is idle");
        assert_eq!(all.0.limits[0].refused.get(), 1);
        drop(idle);
        assert!(admit(&all, Listener::Grpc, 2).await.is_none(), "it had made its room already");
        drop(streams);
        admit(&all, Listener::Grpc, 2).await.unwrap();
        assert!(is_leaving(&busy));
        assert_eq!(all.0.limits[0].closed.get(), 2);
    }

    #[tokio::test]
    async fn the_silent_go_first_then_the_address_with_most_then_the_oldest() {
        let all = Connections::with_most(limit(0), limit(5), limit(0), 100);
        let mut open = Vec::new();
        for (last, speaks) in [(1, true), (2, true), (2, true), (3, false), (1, true)] {
            let one = admit(&all, Listener::Http, last).await.unwrap();
            if speaks {
                one.has_spoken();
            }
            open.push((last, one));
        }
        let mut gone = Vec::new();
        while let Some(new) = admit(&all, Listener::Http, 9).await {
            std::mem::forget(new.begin());
            open.retain(|(last, one)| {
                let is_leaving = is_leaving(one);
                gone.extend(is_leaving.then_some(*last));
                !is_leaving
            });
        }
        assert_eq!(gone[0], 3);
        let mut pairs = gone[1..3].to_vec();
        pairs.sort_unstable();
        assert_eq!((pairs, gone.len()), (vec![1, 2], 5), "one of each address that held two");
    }

    #[tokio::test]
    async fn listeners_share_the_descriptors_and_operators_have_their_own() {
        let all = Connections::with_most(limit(0), limit(0), limit(1), 2);
        let (grpc, http) =
            (admit(&all, Listener::Grpc, 1).await.unwrap(), admit(&all, Listener::Http, 1).await.unwrap());
        let _streams = (grpc.begin(), http.begin());
        assert!(admit(&all, Listener::Http, 1).await.is_none() && admit(&all, Listener::Grpc, 1).await.is_none());
        let ops = admit(&all, Listener::Ops, 1).await.unwrap();
        let _request = ops.begin();
        assert!(admit(&all, Listener::Ops, 1).await.is_none());
        drop((grpc, http));
    }

    #[tokio::test(start_paused = true)]
    async fn a_connection_without_a_request_leaves_in_time() {
        let all = Connections::with_most(limit(0), limit(0), limit(0), 100);
        let (silent, busy) =
            (admit(&all, Listener::Grpc, 1).await.unwrap(), admit(&all, Listener::Grpc, 1).await.unwrap());
        drop(busy.begin());
        let until = time::Instant::now() + PATIENCE;
        silent.is_to_leave(until).await;
        assert_eq!(time::Instant::now(), until);
        assert!(timeout(PATIENCE, busy.is_to_leave(until)).await.is_err());
        // It is one time, however often it is asked for.
        assert!(silent.is_to_leave(until).now_or_never().is_some());
    }

    #[tokio::test(start_paused = true)]
    async fn a_connection_that_is_told_to_leave_and_gets_a_request_is_counted() {
        let most = 4 * BATCH;
        let all = Connections::with_most(limit(0), limit(most as u32), limit(0), 10 * most);
        let (mut open, mut told) = (Vec::new(), Vec::new());
        for _ in 0..most {
            open.push(admit(&all, Listener::Http, 1).await.unwrap());
        }
        assert!(admit(&all, Listener::Http, 1).await.is_none(), "none has left");
        open.retain(|one| {
            let is_leaving = is_leaving(one);
            told.extend(is_leaving.then(|| one.clone()));
            !is_leaving
        });
        assert_eq!(told.len(), BATCH);
        // A request, and an answer that is not sent.
        let request = told[0].begin();
        told.iter().skip(1).for_each(|one| one.is_sending(true));
        let begun = time::Instant::now();
        assert!(admit(&all, Listener::Ops, 1).await.is_some() && admit(&all, Listener::Grpc, 1).await.is_some());
        assert_eq!(begun.elapsed(), Duration::ZERO, "nobody waits for connections that are busy");
        drop((request, told, open));
        let left = all.0.open();
        assert_eq!((left.staying, left.connections.len()), ([0; 3], 0));
    }

    #[tokio::test]
    async fn what_is_not_sent_keeps_a_connection() {
        let all = Connections::with_most(limit(1), limit(0), limit(0), 100);
        let one = admit(&all, Listener::Grpc, 1).await.unwrap();
        one.is_sending(true);
        assert!(admit(&all, Listener::Grpc, 1).await.is_none() && one.is_busy() && !is_leaving(&one));
        one.is_sending(false);
        assert!(admit(&all, Listener::Grpc, 1).await.is_some() && is_leaving(&one));
    }
}

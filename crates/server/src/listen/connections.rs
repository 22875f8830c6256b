//! Open connections of all listeners: how many there may be, and which ones make room when there are too many.
//!
//! A connection on which no request is under way can be closed at any time: a client that comes again gets another one. So when
//! a limit is reached, idle connections make room for new ones: first those that sent no byte for a second, then those of the
//! address that holds most idle ones, oldest first. A new connection is refused only if none is idle.
//!
//! A connection that is told to leave may get another request before its client knows. It counts as any other then, until it
//! has ended: those that make room are gone at once, so that nobody waits for one that is busy.

pub(crate) mod exchange;

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
    time::Duration,
};

use prometheus_client::metrics::{counter::Counter, gauge::Gauge};
use tokio::{
    sync::{Notify, futures::Notified},
    time::{Instant, timeout, timeout_at},
};

use super::descriptors;

/// Connections that are closed together to make room: looking for them costs a walk over all.
const BATCH: usize = 64;

/// How long a client may take for its first byte before its connection counts as silent.
const FIRST_BYTE_TIMEOUT: Duration = Duration::from_secs(1);

/// Longest wait for those that were told to make room. They are idle, so it takes them a turn of the scheduler.
const ROOM_TIMEOUT: Duration = Duration::from_secs(1);

/// How long a client may take nothing of what it is to get, before its connection makes room as an idle one.
const STALLED: Duration = Duration::from_secs(30);

/// Interval at which expired connections are closed. Connections that came together expire together, and to close one takes tens
/// of microseconds: at this interval 10,000 of them leave time for other work, and are closed in little more than a second.
const CLOSING_INTERVAL: Duration = Duration::from_micros(125);

/// Largest write that may be pings and the like alone: they go on whether or not a client takes its answers.
const CONTROL_BYTES_MAX: usize = 256;

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
    /// When the next expired connection may be closed.
    next_closing: Mutex<Instant>,
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
    /// Requests and streams under way that end in their own time.
    active: AtomicU32,
    /// Requests that came.
    requests: AtomicU64,
    /// Answers under way that wait for nothing but their client.
    finite: AtomicU32,
    was_active: AtomicBool,
    /// Its transport has not taken all that was said.
    is_sending: AtomicBool,
    /// Milliseconds from the server's start to when its client last took something of what waits for it.
    progress_ms: AtomicU64,
    /// Writes that the transport has taken and that are more than pings. Only the connection's task counts.
    writes: AtomicU64,
    has_spoken: AtomicBool,
    /// Milliseconds from the server's start to when it became idle.
    idle_since_ms: AtomicU64,
    is_leaving: AtomicBool,
    leave: Notify,
    /// See [`Connection::cut_short`].
    is_cut_short: AtomicBool,
}

/// An open connection; counted until it is dropped.
pub(crate) struct Connection {
    shared: Arc<Shared>,
    key: u64,
    state: Arc<State>,
}

/// A request under way on a connection.
pub(crate) struct Active {
    connection: Arc<Connection>,
    is_finite: bool,
}

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
        Self(Arc::new(Shared { limits: [grpc, http, ops], most, begun, open, next_closing: Mutex::new(begun), left }))
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
            requests: AtomicU64::new(0),
            finite: AtomicU32::new(0),
            was_active: AtomicBool::new(false),
            is_sending: AtomicBool::new(false),
            progress_ms: AtomicU64::new(0),
            writes: AtomicU64::new(0),
            has_spoken: AtomicBool::new(false),
            idle_since_ms: AtomicU64::new(shared.now_ms()),
            is_leaving: AtomicBool::new(false),
            leave: Notify::new(),
            is_cut_short: AtomicBool::new(false),
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

    /// When an expired connection is to be closed; each call takes the next time.
    fn take_closing(&self) -> Instant {
        let mut next = self.next_closing.lock().unwrap_or_else(PoisonError::into_inner);
        let at = (*next).max(Instant::now());
        *next = at + CLOSING_INTERVAL;
        at
    }

    fn now_ms(&self) -> u64 {
        u64::try_from(self.begun.elapsed().as_millis()).unwrap_or(u64::MAX)
    }

    /// Tells up to [`BATCH`] idle connections to leave: of this listener, or of gRPC and HTTP.
    fn close_idle(&self, open: &mut Open, listener: Option<Listener>) {
        let now_ms = self.now_ms();
        let counts = |state: &State| match listener {
            Some(listener) => state.listener == listener,
            None => state.listener != Listener::Ops,
        };
        let idle = open.connections.values().filter(|state| counts(state) && state.is_idle(now_ms));
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
            (!state.is_silent(now_ms), Reverse(held), state.idle_since_ms.load(Relaxed))
        });
        for state in &all[..count] {
            state.is_leaving.store(true, SeqCst);
            // Busy since it was looked at. Whoever makes it busy from now on sees that it is to leave.
            if state.is_busy(now_ms) {
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
    /// What waits for nothing but its client counts while the client takes of it.
    fn is_busy(&self, now_ms: u64) -> bool {
        let waits = self.is_sending.load(SeqCst) || self.finite.load(SeqCst) > 0;
        let stalled_ms = now_ms.saturating_sub(self.progress_ms.load(SeqCst));
        self.active.load(SeqCst) > 0 || waits && u128::from(stalled_ms) < STALLED.as_millis()
    }

    /// Whether it sent no byte in the time that it has for one.
    fn is_silent(&self, now_ms: u64) -> bool {
        let idle_ms = now_ms.saturating_sub(self.idle_since_ms.load(Relaxed));
        !self.has_spoken.load(Relaxed) && u128::from(idle_ms) >= FIRST_BYTE_TIMEOUT.as_millis()
    }

    fn is_idle(&self, now_ms: u64) -> bool {
        !self.is_busy(now_ms) && !self.is_leaving.load(SeqCst)
    }
}

impl Connection {
    /// Notes that its client has sent something.
    pub(crate) fn has_spoken(&self) {
        self.state.has_spoken.store(true, Relaxed);
    }

    /// Notes that its client may still be sending when it is closed.
    pub(crate) fn cut_short(&self) {
        self.state.is_cut_short.store(true, Relaxed);
    }

    pub(crate) fn is_cut_short(&self) -> bool {
        self.state.is_cut_short.load(Relaxed)
    }

    /// Notes a request: the connection makes no room until it is dropped; see also [`Active::finite`].
    pub(crate) fn begin(self: &Arc<Self>) -> Active {
        self.state.requests.fetch_add(1, Relaxed);
        self.state.active.fetch_add(1, SeqCst);
        self.state.was_active.store(true, Relaxed);
        self.stay();
        Active { connection: self.clone(), is_finite: false }
    }

    /// Notes whether its transport has taken all that was said; it makes no room before that, unless its client is
    /// [`STALLED`].
    pub(crate) fn is_sending(&self, is_sending: bool) {
        if is_sending {
            self.progresses();
            self.state.is_sending.store(true, SeqCst);
            self.stay();
        } else {
            self.state.idle_since_ms.store(self.shared.now_ms(), Relaxed);
            self.state.is_sending.store(false, SeqCst);
        }
    }

    /// Notes that its transport has taken so many bytes at once.
    pub(crate) fn wrote(&self, bytes: usize) {
        let state = &self.state;
        let is_control = bytes <= CONTROL_BYTES_MAX;
        if !is_control {
            state.writes.store(state.writes.load(Relaxed).wrapping_add(1), Relaxed);
        }
        // A transport that had no room has some: its client reads, whatever that is.
        if state.is_sending.load(Relaxed) || !is_control && state.finite.load(Relaxed) > 0 {
            self.progresses();
            self.stay();
        }
    }

    fn progresses(&self) {
        self.state.progress_ms.store(self.shared.now_ms(), SeqCst);
    }

    /// Changes with every write that is more than pings.
    pub(crate) fn writes(&self) -> u64 {
        self.state.writes.load(Relaxed)
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

    /// Requests and streams under way that end in their own time.
    pub(crate) fn active(&self) -> u32 {
        self.state.active.load(Relaxed)
    }

    /// Whether a request is under way, or what was answered is not sent and its client takes it.
    pub(crate) fn is_busy(&self) -> bool {
        self.state.is_busy(self.shared.now_ms())
    }

    /// Whether it had a request.
    pub(crate) fn was_active(&self) -> bool {
        self.state.was_active.load(Relaxed)
    }

    /// Returns when the connection is to be closed: because it makes room, or because no request came until then and it is its
    /// turn.
    pub(crate) async fn is_to_leave(&self, until: Instant) {
        let is_over = timeout_at(until, self.makes_room()).await.is_ok()
            // A request may come while it waits.
            || !self.was_active() && (self.closing_turn().await || !self.was_active());
        if !is_over {
            self.makes_room().await;
        }
    }

    /// Waits for the turn of this connection among the expired ones, but no longer than until it makes room; true if it does.
    pub(crate) async fn closing_turn(&self) -> bool {
        timeout_at(self.shared.take_closing(), self.makes_room()).await.is_ok()
    }

    /// Returns when the connection is to be closed because it makes room.
    pub(crate) fn makes_room(&self) -> Notified<'_> {
        self.state.leave.notified()
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

impl Active {
    /// From here on the answer is there and waits for nothing but its client: it counts while the client takes of it.
    #[must_use]
    pub(crate) fn finite(mut self) -> Self {
        if !self.is_finite {
            let state = &self.connection.state;
            if state.finite.load(Relaxed) == 0 {
                self.connection.progresses();
            }
            state.finite.fetch_add(1, SeqCst);
            state.active.fetch_sub(1, SeqCst);
            self.is_finite = true;
        }
        self
    }
}

impl Drop for Active {
    fn drop(&mut self) {
        let Connection { shared, state, .. } = &*self.connection;
        if state.active.load(Relaxed) + state.finite.load(Relaxed) == 1 {
            state.idle_since_ms.store(shared.now_ms(), Relaxed);
        }
        let count = if self.is_finite { &state.finite } else { &state.active };
        count.fetch_sub(1, SeqCst);
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
        connection.is_to_leave(Instant::now() + PATIENCE).now_or_never().is_some()
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

    #[tokio::test(start_paused = true)]
    async fn the_silent_go_first_then_the_address_with_most_then_the_oldest() {
        let all = Connections::with_most(limit(0), limit(5), limit(0), 100);
        let mut open = Vec::new();
        for (last, speaks) in [(1, true), (2, true), (2, true), (3, false), (1, false)] {
            let one = admit(&all, Listener::Http, last).await.unwrap();
            if speaks {
                one.has_spoken();
            }
            open.push((last, one));
            if last == 3 {
                tokio::time::advance(FIRST_BYTE_TIMEOUT).await;
            }
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
        let until = Instant::now() + PATIENCE;
        silent.is_to_leave(until).await;
        assert_eq!(Instant::now(), until);
        assert!(timeout(PATIENCE, busy.is_to_leave(until)).await.is_err());
        // It is one time, however often it is asked for.
        assert!(silent.is_to_leave(until).now_or_never().is_some());
    }

    #[tokio::test(start_paused = true)]
    async fn expired_connections_are_closed_one_after_the_other() {
        const COUNT: usize = 1000;
        let all = Connections::with_most(limit(0), limit(0), limit(0), 2 * COUNT);
        let until = Instant::now() + PATIENCE;
        let (mut waiting, mut open) = (tokio::task::JoinSet::new(), Vec::new());
        for n in 0..COUNT {
            let one = admit(&all, Listener::Http, 1).await.unwrap();
            open.push(one.clone());
            waiting.spawn(async move {
                one.is_to_leave(until).await;
                (n, Instant::now())
            });
        }
        tokio::time::sleep_until(until).await;
        tokio::task::yield_now().await;
        let (makes_room, gets_request) = (COUNT - 1, COUNT - 2);
        open[makes_room].state.leave.notify_one();
        let _request = open[gets_request].begin();
        let mut closed = HashMap::new();
        while closed.len() < COUNT - 1 {
            let (n, at) = waiting.join_next().await.unwrap().unwrap();
            closed.insert(n, at - until);
        }
        assert!(closed[&makes_room] <= Duration::from_millis(2), "it does not wait for its turn");
        let mut at: Vec<_> = closed.into_values().collect();
        at.sort();
        let per_ms = Duration::from_millis(1).as_micros() / CLOSING_INTERVAL.as_micros();
        let most = at.chunk_by(|one, other| one == other).map(<[_]>::len).max().unwrap();
        assert!(most as u128 <= per_ms + 2, "{most} at once");
        let longest = *at.last().unwrap();
        assert!(longest <= CLOSING_INTERVAL * COUNT as u32 + Duration::from_millis(2), "{longest:?}");
        assert!(waiting.join_next().now_or_never().is_none(), "the one with a request stays");
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
        let begun = Instant::now();
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

    #[tokio::test(start_paused = true)]
    async fn what_its_client_does_not_take_keeps_no_connection() {
        let all = Connections::with_most(limit(1), limit(0), limit(0), 100);
        let (almost, rest) = (STALLED - Duration::from_secs(1), Duration::from_secs(1));
        let one = admit(&all, Listener::Grpc, 1).await.unwrap();
        let small = || one.wrote(CONTROL_BYTES_MAX);
        let large = || one.wrote(CONTROL_BYTES_MAX + 1);
        one.is_sending(true);
        for _ in 0..3 {
            tokio::time::advance(almost).await;
            assert!(one.is_busy());
            small();
        }
        tokio::time::advance(STALLED).await;
        assert!(!one.is_busy(), "it takes nothing");
        one.is_sending(false);
        let answer = one.begin();
        tokio::time::advance(STALLED * 2).await;
        assert!(one.is_busy(), "nobody knows when it ends");
        let answer = answer.finite();
        for _ in 0..3 {
            tokio::time::advance(almost).await;
            assert!(one.is_busy() && admit(&all, Listener::Grpc, 1).await.is_none());
            large();
        }
        tokio::time::advance(almost).await;
        small();
        tokio::time::advance(rest).await;
        assert!(!one.is_busy() && one.active() == 0, "pings are no progress");
        let other = admit(&all, Listener::Grpc, 1).await;
        assert!(other.is_some() && is_leaving(&one));
        large();
        assert!(one.is_busy() && all.0.open().staying[0] == 2, "it goes on, and is counted again");
        drop((answer, other));
        assert_eq!((all.0.open().staying[0], one.state.finite.load(Relaxed), one.active()), (1, 0, 0));
    }
}

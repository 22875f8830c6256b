//! What was received and is not taken yet: one bounded queue for each kind of thing.

use std::{
    collections::VecDeque,
    pin::Pin,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    task::{Context, Poll, Waker},
};

use futures_util::Stream;
use tokio::sync::Notify;

/// How many times its bound a queue may hold while an answer is waited for: the answer comes behind what is not taken.
const WHILE_ASKING: usize = 64;

/// So much at least: twice what Trunkline sends ahead of what is taken.
const WHILE_ASKING_MIN: usize = 8192;

/// What the last listener leaves behind counts as taken if it is so much.
const LEFT_BYTES: usize = 4 * 1024 * 1024;

/// One kind of thing. Who does not listen loses what comes over the bound; who listens too slowly holds the connection up,
/// and with it the server, which keeps what is durable.
pub(crate) struct Lane<T> {
    what: &'static str,
    bound: usize,
    overflow: Overflow,
    inner: Mutex<Inner<T>>,
    /// Told when there is room again.
    room: Arc<Notify>,
    /// Done to what is taken, or dropped.
    gone: fn(&mut T),
    weight: Weight<T>,
}

/// How large items are, and what may wait of them.
pub(crate) struct Weight<T> {
    pub(crate) of: fn(&T) -> usize,
    /// Bytes over which nothing should be read but for the sake of an answer.
    pub(crate) soft: usize,
    /// Bytes over which nothing may be read.
    pub(crate) hard: usize,
}

impl<T> Weight<T> {
    /// They are small.
    fn none() -> Self {
        Self { of: |_| 0, soft: usize::MAX, hard: usize::MAX }
    }
}

struct Inner<T> {
    queue: VecDeque<T>,
    bytes: usize,
    listeners: usize,
    wakers: Vec<Waker>,
    dropped: u64,
    is_over: bool,
}

/// What becomes of what comes over the bound.
#[derive(Clone, Copy, PartialEq)]
pub(crate) enum Overflow {
    /// It is dropped if nobody listens; who listens holds the connection up.
    Unheard,
    /// It is kept if nobody listens, because the other side keeps count, and sends no more than it may be owed. Of one that does
    /// not, what comes over the utmost bound is dropped.
    Nothing,
    /// The oldest goes: the latest tell enough.
    Oldest,
}

/// How full a lane is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Pressure {
    /// There is room.
    None,
    /// Nothing should be read but for the sake of an answer.
    Soft,
    /// Nothing may be read.
    Hard,
}

impl<T> Lane<T> {
    pub(crate) fn new(what: &'static str, bound: usize, room: Arc<Notify>) -> Arc<Self> {
        Self::of(what, bound, Overflow::Unheard, room)
    }

    pub(crate) fn of(what: &'static str, bound: usize, overflow: Overflow, room: Arc<Notify>) -> Arc<Self> {
        Self::with(what, bound, overflow, room, |_| {}, Weight::none())
    }

    /// One whose items are large, or that does something to each when it is taken, or dropped for want of room.
    pub(crate) fn with(
        what: &'static str,
        bound: usize,
        overflow: Overflow,
        room: Arc<Notify>,
        gone: fn(&mut T),
        weight: Weight<T>,
    ) -> Arc<Self> {
        let (queue, wakers) = (VecDeque::new(), Vec::new());
        let inner = Mutex::new(Inner { queue, bytes: 0, listeners: 0, wakers, dropped: 0, is_over: false });
        Arc::new(Self { what, bound: bound.max(1), overflow, inner, room, gone, weight })
    }

    /// Short and without a wait inside, so a lock of the standard library's; a panic inside leaves nothing half done.
    fn lock(&self) -> MutexGuard<'_, Inner<T>> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes something in. What is dropped because nobody listens is dropped outside of the lock.
    pub(crate) fn push(&self, mut item: T) -> Pressure {
        let mut inner = self.lock();
        if inner.is_over {
            return Pressure::Hard;
        }
        if self.overflow == Overflow::Oldest
            && inner.queue.len() >= self.bound
            && let Some(oldest) = inner.queue.pop_front()
        {
            inner.bytes -= (self.weight.of)(&oldest);
        }
        let unheard = if self.overflow == Overflow::Nothing { self.most() } else { self.bound };
        let is_full = inner.queue.len() >= unheard || inner.bytes >= self.weight.soft;
        if inner.listeners == 0 && is_full && self.overflow != Overflow::Oldest {
            inner.dropped += 1;
            let is_first = inner.dropped == 1;
            drop(inner);
            (self.gone)(&mut item);
            if is_first {
                tracing::warn!(what = self.what, bound = self.bound, "nobody takes what comes: it is dropped");
            }
            return Pressure::None;
        }
        inner.bytes += (self.weight.of)(&item);
        inner.queue.push_back(item);
        let wakers = std::mem::take(&mut inner.wakers);
        let pressure = self.pressure_of(&inner);
        drop(inner);
        wakers.into_iter().for_each(Waker::wake);
        pressure
    }

    fn pressure_of(&self, inner: &Inner<T>) -> Pressure {
        let is_light = inner.queue.len() < self.bound && inner.bytes < self.weight.soft;
        if inner.listeners == 0 || is_light || self.overflow == Overflow::Oldest {
            Pressure::None
        } else if inner.queue.len() < self.most() && inner.bytes < self.weight.hard {
            Pressure::Soft
        } else {
            Pressure::Hard
        }
    }

    fn most(&self) -> usize {
        (self.bound * WHILE_ASKING).max(WHILE_ASKING_MIN)
    }

    /// What waits counts as taken: it must not hold up what comes behind it. Or only if nobody listens.
    pub(crate) fn let_go(&self, only_unheard: bool) {
        let mut inner = self.lock();
        if inner.listeners == 0 || !only_unheard {
            inner.queue.iter_mut().for_each(self.gone);
        }
    }

    pub(crate) fn pressure(&self) -> Pressure {
        self.pressure_of(&self.lock())
    }

    /// Leaves out what is not wanted any more.
    pub(crate) fn retain(&self, wanted: impl FnMut(&T) -> bool) {
        let mut inner = self.lock();
        inner.queue.retain(wanted);
        inner.bytes = inner.queue.iter().map(self.weight.of).sum();
    }

    /// Nothing comes any more; what is there can still be taken.
    pub(crate) fn end(&self) {
        let mut inner = self.lock();
        inner.is_over = true;
        let wakers = std::mem::take(&mut inner.wakers);
        drop(inner);
        wakers.into_iter().for_each(Waker::wake);
    }

    fn poll(&self, cx: &Context<'_>) -> Poll<Option<T>> {
        let mut inner = self.lock();
        let Some(mut item) = inner.queue.pop_front() else {
            if inner.is_over {
                return Poll::Ready(None);
            }
            if !inner.wakers.iter().any(|waker| waker.will_wake(cx.waker())) {
                inner.wakers.push(cx.waker().clone());
            }
            return Poll::Pending;
        };
        if inner.queue.is_empty() && inner.queue.capacity() > self.bound {
            // A burst's room is given back.
            inner.queue = VecDeque::new();
        }
        let before = inner.bytes;
        inner.bytes -= (self.weight.of)(&item);
        let crosses = |bytes: usize| before >= bytes && inner.bytes < bytes;
        let has_room = inner.queue.len() + 1 == self.bound
            || inner.queue.len() + 1 == self.most()
            || crosses(self.weight.soft)
            || crosses(self.weight.hard);
        // Before anybody else can look at what is left.
        (self.gone)(&mut item);
        drop(inner);
        if has_room {
            self.room.notify_one();
        }
        Poll::Ready(Some(item))
    }
}

/// What a client receives, one after the other. Ends when the client has ended and everything was taken; messages of Trunkline that
/// were not taken until then are left to whoever comes next. Several streams of one kind share what comes. Dropping it takes
/// nothing away.
#[must_use = "streams do nothing unless they are polled"]
pub struct Received<T> {
    lane: Arc<Lane<T>>,
}

impl<T> Received<T> {
    pub(crate) fn of(lane: &Arc<Lane<T>>) -> Self {
        lane.lock().listeners += 1;
        Self { lane: Arc::clone(lane) }
    }

    /// The next one, or `None` if the client has ended. Cancellation-safe: nothing is lost if this is dropped.
    pub async fn next(&mut self) -> Option<T> {
        std::future::poll_fn(|cx| self.lane.poll(cx)).await
    }
}

impl<T> Stream for Received<T> {
    type Item = T;

    fn poll_next(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<T>> {
        self.lane.poll(cx)
    }
}

impl<T> Drop for Received<T> {
    fn drop(&mut self) {
        let mut inner = self.lane.lock();
        inner.listeners -= 1;
        let is_much = inner.queue.len() >= self.lane.bound.min(WHILE_ASKING_MIN / 4) || inner.bytes >= LEFT_BYTES;
        if inner.listeners == 0 && is_much {
            // So much that the other side may have stopped.
            inner.queue.iter_mut().for_each(self.lane.gone);
        }
        // Who sleeps on another stream of this lane takes over.
        let wakers = std::mem::take(&mut inner.wakers);
        drop(inner);
        wakers.into_iter().for_each(Waker::wake);
        self.lane.room.notify_one();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lane(bound: usize) -> Arc<Lane<u32>> {
        Lane::new("numbers", bound, Arc::default())
    }

    #[tokio::test]
    async fn what_comes_before_somebody_listens_is_kept_up_to_the_bound() {
        let lane = lane(2);
        assert!((0..5).all(|n| lane.push(n) == Pressure::None));
        let mut numbers = Received::of(&lane);
        lane.end();
        assert_eq!((numbers.next().await, numbers.next().await, numbers.next().await), (Some(0), Some(1), None));
    }

    #[tokio::test]
    async fn who_listens_loses_nothing_and_holds_the_sender_up() {
        let lane = lane(2);
        let mut numbers = Received::of(&lane);
        let most = WHILE_ASKING_MIN as u32;
        let pressure: Vec<_> = (0..=most).map(|n| lane.push(n)).collect();
        assert_eq!(pressure[0], Pressure::None);
        let (soft, hard) = pressure[1..].split_at(WHILE_ASKING_MIN - 2);
        assert!(soft.iter().all(|pressure| *pressure == Pressure::Soft));
        assert_eq!(hard, [Pressure::Hard; 2]);
        for n in 0..=most {
            assert_eq!(numbers.next().await, Some(n));
        }
        lane.room.notified().await;
        assert_eq!(lane.pressure(), Pressure::None);
    }

    #[tokio::test]
    async fn what_is_large_presses_sooner() {
        let weight = Weight { of: |n: &u32| *n as usize, soft: 100, hard: 200 };
        let lane = Lane::with("numbers", 1000, Overflow::Unheard, Arc::default(), |_| {}, weight);
        let mut numbers = Received::of(&lane);
        let pressure: Vec<_> = [60, 60, 60, 60].into_iter().map(|n| lane.push(n)).collect();
        assert_eq!(pressure, [Pressure::None, Pressure::Soft, Pressure::Soft, Pressure::Hard]);
        for expected in [Pressure::Soft, Pressure::Soft, Pressure::None, Pressure::None] {
            numbers.next().await;
            assert_eq!(lane.pressure(), expected);
        }
        lane.room.notified().await;
    }

    #[tokio::test]
    async fn what_is_counted_elsewhere_is_not_dropped() {
        let lane: Arc<Lane<u32>> = Lane::of("numbers", 2, Overflow::Nothing, Arc::default());
        assert!((0..50).all(|n| lane.push(n) == Pressure::None));
        let mut numbers = Received::of(&lane);
        for n in 0..50 {
            assert_eq!(numbers.next().await, Some(n));
        }
    }

    #[tokio::test]
    async fn a_stream_that_is_dropped_while_it_waits_leaves_its_turn_to_another() {
        let lane = lane(2);
        let (mut first, mut second) = (Received::of(&lane), Received::of(&lane));
        let waits = tokio::time::timeout(std::time::Duration::ZERO, first.next()).await;
        assert!(waits.is_err());
        drop(first);
        lane.push(7);
        assert_eq!(second.next().await, Some(7));
    }
}

//! The acknowledgement extension, on the client's side: what was handed out, and how far it is done.

use std::{
    collections::{HashMap, VecDeque},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{
            AtomicBool,
            Ordering::{Acquire, Relaxed, Release},
        },
    },
};

use futures_util::task::AtomicWaker;
use trunkline_proto::own::{Acknowledgement, Delivery};

/// Deliveries that are remembered after they were acknowledged, in case the acknowledgement did not get through: as many as
/// the server lets a client hold.
const REMEMBERED: usize = 4096;

/// Bytes that the server lets a client hold, a little less: it counts more than the payload.
const BYTES: usize = 14 * 1024 * 1024;

/// Shared by the connection and all messages that can be acknowledged.
#[derive(Default)]
pub(crate) struct Acks {
    inner: Mutex<Inner>,
    /// Who writes to the transport.
    pub(crate) writer: AtomicWaker,
    /// Whether there is anything to say: looked at for each parcel that goes out.
    is_due: AtomicBool,
    /// Half of the server's window is taken by what is out; by what of that is done and waits for what was delivered before it.
    /// Looked at for each delivery.
    is_crowded: AtomicBool,
    is_blocked: AtomicBool,
    /// Whether the extension is in force.
    is_on: AtomicBool,
    /// Messages are acknowledged by whoever takes them, who can forget it; otherwise by being taken.
    by_hand: bool,
}

#[derive(Default)]
struct Inner {
    is_on: bool,
    /// Which log the offsets belong to, as the server names it.
    log: String,
    /// Counts connections: shared work of another one is not this client's any more.
    connection: u64,
    /// Counts the times that the server did not know this client any more: offsets of before mean nothing then.
    epoch: u64,
    /// What is out on this connection, in the order of delivery.
    order: VecDeque<Out>,
    /// How much it is.
    out: Amount,
    /// How much of it is done.
    done: Amount,
    /// What was handed out on earlier connections, is not acknowledged, and was not delivered again yet.
    carried: HashMap<u64, Held>,
    /// What was acknowledged last.
    remembered: VecDeque<u64>,
    /// The highest offset that was ever delivered: what is above it was not handed out before.
    highest: u64,
    through: u64,
    shared: Vec<u64>,
}

struct Out {
    offset: u64,
    bytes: usize,
    held: Held,
}

/// Deliveries, and their bytes.
#[derive(Clone, Copy, Default)]
struct Amount {
    count: usize,
    bytes: usize,
}

impl Amount {
    fn add(&mut self, bytes: usize) {
        (self.count, self.bytes) = (self.count + 1, self.bytes + bytes);
    }

    fn take(&mut self, bytes: usize) {
        (self.count, self.bytes) = (self.count - 1, self.bytes - bytes);
    }

    /// Whether it is half of the server's window, or more.
    fn is_half(self) -> bool {
        self.count >= REMEMBERED / 2 || self.bytes >= BYTES / 2
    }
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Held {
    Working,
    Done,
    /// Nobody will say that it is done: it comes again with the next connection.
    Dropped,
}

impl Acks {
    pub(crate) fn new(by_hand: bool) -> Arc<Self> {
        Arc::new(Self { by_hand, ..Self::default() })
    }

    /// Short and without a wait inside; a panic inside leaves nothing half done.
    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A connection begins.
    ///
    /// Offsets mean the same as before if the session was resumed, or the server says that its log is the same.
    pub(crate) fn begin(&self, is_on: bool, resumed: bool, log: &str) {
        let mut inner = self.lock();
        let is_same = resumed || (!log.is_empty() && inner.log == log);
        log.clone_into(&mut inner.log);
        inner.through = 0;
        inner.is_on = is_on;
        self.is_on.store(is_on, Relaxed);
        inner.connection += 1;
        inner.shared.clear();
        self.is_due.store(false, Relaxed);
        let out = std::mem::take(&mut inner.order);
        (inner.out, inner.done) = Default::default();
        if is_same {
            // Of what was delivered twice, the first was handed out.
            for Out { offset, held, .. } in out {
                inner.carried.entry(offset).or_insert(held);
            }
            inner.carried.retain(|_, held| *held != Held::Dropped);
        } else {
            inner.epoch += 1;
            inner.highest = 0;
            inner.carried.clear();
            inner.remembered.clear();
        }
        self.count(&inner);
    }

    /// The connection is over: what was shared is others' now.
    pub(crate) fn end(&self) {
        let mut inner = self.lock();
        inner.connection += 1;
        inner.shared.clear();
    }

    /// Whether the server sends only so much ahead of what is acknowledged.
    pub(crate) fn is_on(&self) -> bool {
        self.is_on.load(Relaxed)
    }

    /// Something was delivered. `None` if it was handed out before: it is acknowledged when that one is.
    pub(crate) fn delivered(self: &Arc<Self>, delivery: &Delivery, bytes: usize) -> Option<Ack> {
        let mut inner = self.lock();
        let offset = delivery.offset;
        let (connection, epoch) = (inner.connection, inner.epoch);
        let ack = |shared| Ack { acks: Arc::clone(self), offset, shared, connection, epoch, is_done: false };
        if delivery.shared {
            return Some(ack(true));
        }
        let known = if offset > inner.highest {
            inner.highest = offset;
            None
        } else if inner.remembered.contains(&offset) || inner.order.iter().any(|out| out.offset == offset) {
            // The history of a workspace that a user comes back to may be delivered twice on one connection.
            Some(Held::Done)
        } else {
            inner.carried.remove(&offset)
        };
        inner.order.push_back(Out { offset, bytes, held: known.unwrap_or(Held::Working) });
        inner.out.add(bytes);
        if known == Some(Held::Done) {
            inner.done.add(bytes);
        }
        self.count(&inner);
        match known {
            None => Some(ack(false)),
            Some(Held::Done) => {
                let is_due = inner.advance();
                self.tell(inner, is_due);
                None
            }
            Some(_) => None,
        }
    }

    /// Whether so much is out that the server will soon give no more.
    pub(crate) fn is_crowded(&self) -> bool {
        self.is_crowded.load(Relaxed)
    }

    /// Whether so much that is done waits for something else that the server will soon give no more.
    pub(crate) fn is_blocked(&self) -> bool {
        self.is_blocked.load(Relaxed)
    }

    /// Whether there is anything to say.
    pub(crate) fn has_more(&self) -> bool {
        self.is_due.load(Acquire)
    }

    /// What there is to say to the server.
    pub(crate) fn take(&self) -> Option<Acknowledgement> {
        if !self.is_due.load(Acquire) {
            return None;
        }
        let mut inner = self.lock();
        self.is_due.store(false, Relaxed);
        Some(Acknowledgement { through: inner.through, shared: std::mem::take(&mut inner.shared) })
    }

    fn count(&self, inner: &Inner) {
        self.is_crowded.store(inner.out.is_half(), Relaxed);
        self.is_blocked.store(inner.done.is_half(), Relaxed);
    }

    fn tell(&self, inner: MutexGuard<'_, Inner>, is_due: bool) {
        self.count(&inner);
        if is_due {
            self.is_due.store(true, Release);
        }
        drop(inner);
        if is_due {
            self.writer.wake();
        }
    }
}

impl Inner {
    /// Everything at the front that is done is acknowledged. Answers whether there was anything.
    fn advance(&mut self) -> bool {
        let before = self.order.len();
        while let Some(Out { offset, bytes, held: Held::Done }) = self.order.front() {
            let (offset, bytes) = (*offset, *bytes);
            self.order.pop_front();
            self.out.take(bytes);
            self.done.take(bytes);
            self.remember(offset);
            self.through = offset;
        }
        self.order.len() < before
    }

    /// Notes how it stands, if it is out on this connection. Most are done in order, and found at once.
    fn note(&mut self, offset: u64, held: Held) -> bool {
        let out = self.order.iter_mut().find(|out| out.offset == offset && out.held == Held::Working);
        let Some(out) = out else { return false };
        out.held = held;
        if held == Held::Done {
            self.done.add(out.bytes);
        }
        true
    }

    fn remember(&mut self, offset: u64) {
        self.remembered.push_back(offset);
        if self.remembered.len() > REMEMBERED {
            self.remembered.pop_front();
        }
    }
}

/// The duty to acknowledge one delivery. Dropped without it, the delivery comes again with the next connection.
pub(crate) struct Ack {
    acks: Arc<Acks>,
    offset: u64,
    shared: bool,
    connection: u64,
    epoch: u64,
    is_done: bool,
}

impl Ack {
    /// Whether it comes again, or is for others by now: shared work of a connection that is gone, and what is of another log.
    pub(crate) fn is_stale(&self) -> bool {
        let inner = self.acks.lock();
        if self.shared { inner.connection != self.connection } else { inner.epoch != self.epoch }
    }

    pub(crate) fn done(mut self) {
        self.is_done = true;
        let mut inner = self.acks.lock();
        if !inner.is_on {
            return;
        }
        let mut is_due = false;
        if self.shared {
            if inner.connection == self.connection {
                inner.shared.push(self.offset);
                is_due = true;
            }
        } else if inner.epoch == self.epoch {
            if inner.note(self.offset, Held::Done) {
                is_due = inner.advance();
            } else {
                // It may come again on a later connection, and is not handed out again then.
                inner.carried.remove(&self.offset);
                inner.remember(self.offset);
            }
        }
        self.acks.tell(inner, is_due);
    }
}

impl Drop for Ack {
    fn drop(&mut self) {
        if !self.is_done && !self.shared {
            let mut inner = self.acks.lock();
            if inner.epoch == self.epoch
                && (inner.note(self.offset, Held::Dropped) || inner.carried.remove(&self.offset).is_some())
                && inner.is_on
                && self.acks.by_hand
            {
                tracing::warn!(
                    offset = self.offset,
                    "a message was dropped without being acknowledged: it comes again with the next connection, and what is \
                     behind it with it"
                );
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use proptest::prelude::*;

    use super::*;

    fn one(offset: u64) -> Delivery {
        Delivery { offset, shared: false }
    }

    fn begun() -> Arc<Acks> {
        let acks = Arc::new(Acks::default());
        acks.begin(true, false, "");
        acks
    }

    #[test]
    fn what_is_done_out_of_order_waits_for_what_came_before() {
        let acks = begun();
        let [a, b, c] = [3, 5, 9].map(|offset| acks.delivered(&one(offset), 1).unwrap());
        b.done();
        assert_eq!(acks.take(), None);
        a.done();
        assert_eq!(acks.take().unwrap().through, 5);
        assert_eq!(acks.take(), None);
        c.done();
        assert_eq!(acks.take().unwrap().through, 9);
    }

    #[test]
    fn what_was_not_done_comes_again_and_what_was_does_not() {
        let acks = begun();
        let [a, b, c] = [3, 5, 9].map(|offset| acks.delivered(&one(offset), 1).unwrap());
        a.done();
        drop(b);
        acks.begin(true, true, "");
        // The acknowledgement of 3 may have been lost, 5 was dropped, 9 is being worked on.
        assert!(acks.delivered(&one(3), 1).is_none());
        let again = acks.delivered(&one(5), 1).unwrap();
        assert!(acks.delivered(&one(9), 1).is_none());
        assert_eq!(acks.take().unwrap().through, 3);
        c.done();
        assert_eq!(acks.take(), None);
        again.done();
        assert_eq!(acks.take().unwrap().through, 9);
    }

    #[test]
    fn a_server_that_forgot_its_client_is_not_told_of_old_offsets() {
        let acks = begun();
        let old = acks.delivered(&one(3), 1).unwrap();
        acks.begin(true, false, "");
        let new = acks.delivered(&one(3), 1).unwrap();
        old.done();
        assert_eq!(acks.take(), None);
        new.done();
        assert_eq!(acks.take().unwrap().through, 3);
    }

    #[test]
    fn a_session_that_is_new_on_the_same_log_remembers() {
        let acks = Arc::new(Acks::default());
        acks.begin(true, false, "log-1");
        let [a, b] = [3, 5].map(|offset| acks.delivered(&one(offset), 1).unwrap());
        a.done();
        acks.begin(true, false, "log-1");
        assert!(acks.delivered(&one(3), 1).is_none() && acks.delivered(&one(5), 1).is_none());
        assert!(!b.is_stale());
        acks.begin(true, false, "log-2");
        assert!(b.is_stale());
        assert!(acks.delivered(&one(5), 1).is_some());
    }

    #[test]
    fn what_is_delivered_twice_on_one_connection_is_handed_out_once() {
        let acks = begun();
        let [a, b] = [3, 5].map(|offset| acks.delivered(&one(offset), 1).unwrap());
        assert!(acks.delivered(&one(3), 1).is_none() && acks.delivered(&one(5), 1).is_none());
        b.done();
        assert_eq!(acks.take(), None);
        a.done();
        assert_eq!(acks.take().unwrap().through, 5);
        assert!(acks.lock().order.is_empty());
    }

    #[test]
    fn what_was_delivered_twice_and_not_done_comes_again_after_a_break() {
        let acks = begun();
        let [a, b] = [3, 5].map(|offset| acks.delivered(&one(offset), 1).unwrap());
        assert!(acks.delivered(&one(3), 1).is_none() && acks.delivered(&one(5), 1).is_none());
        drop(b);
        acks.begin(true, true, "");
        assert!(acks.delivered(&one(3), 1).is_none(), "it is being worked on");
        let again = acks.delivered(&one(5), 1).unwrap();
        assert_eq!(acks.take(), None);
        a.done();
        assert_eq!(acks.take().unwrap().through, 3);
        again.done();
        assert_eq!(acks.take().unwrap().through, 5);
    }

    #[test]
    fn a_window_is_full_by_number_or_by_bytes() {
        let acks = begun();
        let first = acks.delivered(&one(1), BYTES / 2).unwrap();
        assert!(acks.is_crowded() && !acks.is_blocked());
        let second = acks.delivered(&one(2), BYTES / 2).unwrap();
        second.done();
        assert!(acks.is_blocked());
        first.done();
        assert!(!acks.is_crowded() && !acks.is_blocked());
        let many: Vec<_> = (3..3 + REMEMBERED as u64 / 2).map(|n| acks.delivered(&one(n), 1).unwrap()).collect();
        assert!(acks.is_crowded());
        many.into_iter().for_each(Ack::done);
        assert!(!acks.is_crowded());
    }

    #[test]
    fn shared_work_is_acknowledged_one_by_one_and_on_its_own_connection_only() {
        let acks = begun();
        let share = |offset| acks.delivered(&Delivery { offset, shared: true }, 1).unwrap();
        let [a, b] = [4, 6].map(share);
        b.done();
        assert_eq!(acks.take().unwrap().shared, [6]);
        acks.begin(true, true, "");
        assert!(a.is_stale());
        a.done();
        assert_eq!(acks.take(), None);
    }

    proptest! {
        /// Whatever is done in whatever order over whatever breaks: nothing is acknowledged that is not done, and everything is
        /// in the end.
        #[test]
        fn nothing_is_acknowledged_before_it_is_done(order in Just((1..=40_u64).collect::<Vec<_>>()).prop_shuffle(), cut in 0..40_usize) {
            let acks = begun();
            let mut out: HashMap<u64, Ack> = (1..=40).map(|n| (n, acks.delivered(&one(n), 1).unwrap())).collect();
            let (mut done, mut through) = (HashSet::new(), 0);
            for (step, offset) in order.into_iter().enumerate() {
                if step == cut {
                    acks.begin(true, true, "");
                    for n in through + 1..=40 {
                        prop_assert!(acks.delivered(&one(n), 1).is_none());
                    }
                }
                out.remove(&offset).unwrap().done();
                done.insert(offset);
                if let Some(ack) = acks.take() {
                    prop_assert!(ack.through >= through);
                    through = ack.through;
                    prop_assert!((1..=through).all(|n| done.contains(&n)));
                }
            }
            prop_assert_eq!(through, 40);
        }
    }
}

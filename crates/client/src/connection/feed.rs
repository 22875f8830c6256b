//! What goes out. The transport pulls from the queue itself, so that a message takes one hop from who sends it to the wire;
//! the queue outlives the connection.

use std::{
    collections::{HashMap, VecDeque},
    pin::Pin,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicUsize, Ordering::Relaxed},
    },
    task::{Context, Poll, Waker},
};

use futures_util::Stream;
use tokio::sync::{mpsc, oneshot};
use trunkline_proto::v1::{
    ErrorResponse, SendMessage, TaskQuery, UpstreamMessage, task_query::OpType, upstream_message::Payload as Up,
};

use super::Core;
use crate::error::{Error, Kind, Result};

/// Frames that are taken out of the queue at once.
const BATCH: usize = 64;

/// Bulk frames (bodies, tunnels) after so many others, if there are any.
const BULK_EVERY: u32 = 8;

/// Confirmed messages after which the server is asked whether it has them. Before that, when nothing else is to be sent.
const CONFIRM_EVERY: usize = 256;

/// Parcels that may go out behind a confirmed message before the server is asked all the same.
const PARCELS: usize = 16;

/// Confirmed messages that may be on their way at once; then nothing more goes out.
const FLYING_MAX: usize = 4096;

/// A frame that waits to go out.
pub(crate) struct Queued {
    pub(crate) payload: Up,
    pub(crate) mark: Mark,
}

/// What is to be noted when it goes.
#[derive(Clone, Copy)]
pub(crate) enum Mark {
    Nothing,
    /// Its number in `Pending`.
    Request(u64),
    /// Its number in `Flights`.
    Confirm(u64),
}

/// The queue's other end.
pub(crate) struct Feed {
    inner: Mutex<Inner>,
}

struct Inner {
    /// Whose turn it is: the number of the connection.
    connection: u64,
    is_open: bool,
    is_closing: bool,
    /// Before everything else.
    front: VecDeque<Queued>,
    normal: mpsc::Receiver<Queued>,
    bulk: mpsc::Receiver<Queued>,
    since_bulk: u32,
    /// Confirmed messages since the server was last asked.
    unasked: usize,
    /// Parcels that went out since the first of them.
    since_asked: usize,
    /// Wakes the transport.
    waker: Option<Waker>,
}

impl Feed {
    pub(crate) fn new(normal: mpsc::Receiver<Queued>, bulk: mpsc::Receiver<Queued>) -> Self {
        let inner = Inner {
            connection: 0,
            is_open: false,
            is_closing: false,
            front: VecDeque::new(),
            normal,
            bulk,
            since_bulk: 0,
            unasked: 0,
            since_asked: 0,
            waker: None,
        };
        Self { inner: Mutex::new(inner) }
    }

    /// Short and without a wait inside; a panic inside leaves nothing half done.
    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A connection begins, with its first frame. The stream of the one before gets nothing any more, and ends.
    pub(crate) fn begin(&self, core: &Arc<Core>, init: Up) -> Outbound {
        let mut inner = self.lock();
        inner.connection += 1;
        (inner.is_open, inner.unasked, inner.since_asked) = (false, 0, 0);
        let waker = inner.waker.take();
        let connection = inner.connection;
        drop(inner);
        waker.into_iter().for_each(Waker::wake);
        let taken = VecDeque::from([init]);
        Outbound { core: Arc::clone(core), connection, taken, batch: Vec::new() }
    }

    /// What was to go first on the last connection, and somebody waits for: it never went out.
    pub(crate) fn left_over(&self) -> Vec<Queued> {
        let mut inner = self.lock();
        inner.front.drain(..).filter(|queued| !matches!(queued.mark, Mark::Nothing)).collect()
    }

    /// The connection was accepted: these first, then the queue.
    pub(crate) fn open(&self, front: impl IntoIterator<Item = Queued>) {
        let mut inner = self.lock();
        inner.is_open = true;
        inner.front.extend(front);
        let waker = inner.waker.take();
        drop(inner);
        waker.into_iter().for_each(Waker::wake);
    }

    /// No connection gets anything until the next one.
    pub(crate) fn detach(&self) {
        let mut inner = self.lock();
        inner.connection += 1;
        inner.is_open = false;
        let waker = inner.waker.take();
        drop(inner);
        waker.into_iter().for_each(Waker::wake);
    }

    /// What is queued goes out, then the stream ends from this side.
    pub(crate) fn close(&self) {
        let mut inner = self.lock();
        inner.is_closing = true;
        let waker = inner.waker.take();
        drop(inner);
        waker.into_iter().for_each(Waker::wake);
    }

    pub(crate) fn wake(&self) {
        let waker = self.lock().waker.take();
        waker.into_iter().for_each(Waker::wake);
    }

    /// What never went out, at the end.
    pub(crate) fn drain(&self) -> usize {
        let mut inner = self.lock();
        inner.normal.close();
        inner.bulk.close();
        let mut count = inner.front.len();
        inner.front.clear();
        while inner.normal.try_recv().is_ok() {
            count += 1;
        }
        while inner.bulk.try_recv().is_ok() {
            count += 1;
        }
        count
    }
}

impl Inner {
    fn wait(&mut self, cx: &Context<'_>) {
        if !self.waker.as_ref().is_some_and(|waker| waker.will_wake(cx.waker())) {
            self.waker = Some(cx.waker().clone());
        }
    }

    /// Up to a batch of what waits, in the order in which it goes.
    fn take(&mut self, cx: &mut Context<'_>, batch: &mut Vec<Queued>) -> Poll<Option<()>> {
        if let Some(first) = self.front.pop_front() {
            batch.push(first);
            return Poll::Ready(Some(()));
        }
        if self.since_bulk >= BULK_EVERY {
            self.since_bulk = 0;
            if let Poll::Ready(Some(bulk)) = self.bulk.poll_recv(cx) {
                batch.push(bulk);
                return Poll::Ready(Some(()));
            }
        }
        let is_normal_over = match self.normal.poll_recv_many(cx, batch, BATCH) {
            Poll::Ready(1..) => {
                self.since_bulk += 1;
                return Poll::Ready(Some(()));
            }
            Poll::Ready(0) => true,
            Poll::Pending => false,
        };
        match self.bulk.poll_recv(cx) {
            Poll::Ready(Some(bulk)) => {
                batch.push(bulk);
                Poll::Ready(Some(()))
            }
            // Pending may also mean that it is somebody else's turn.
            _ if is_normal_over || (self.is_closing && self.normal.is_empty() && self.bulk.is_empty()) => {
                Poll::Ready(None)
            }
            _ => Poll::Pending,
        }
    }
}

/// The frames of one connection.
pub(crate) struct Outbound {
    core: Arc<Core>,
    connection: u64,
    /// Next to go.
    taken: VecDeque<Up>,
    batch: Vec<Queued>,
}

impl Outbound {
    /// Fills `taken`, if there is anything.
    fn fill(&mut self, cx: &mut Context<'_>) -> Poll<Option<()>> {
        let core = Arc::clone(&self.core);
        let mut inner = core.feed.lock();
        if inner.connection != self.connection {
            return Poll::Ready(None);
        }
        if !inner.is_open {
            inner.wait(cx);
            return Poll::Pending;
        }
        if let Some(ack) = core.acks.take() {
            self.taken.push_back(Up::Acknowledgement(Box::new(ack)));
            return Poll::Ready(Some(()));
        }
        if core.flights.is_full() {
            inner.wait(cx);
            core.acks.writer.register(cx.waker());
            return self.ask_after_confirmed(&mut inner);
        }
        let mut taken = inner.take(cx, &mut self.batch);
        if taken.is_pending() {
            inner.wait(cx);
            core.acks.writer.register(cx.waker());
            // What was to be said before the waker was there wakes nobody.
            if core.acks.has_more() {
                taken = Poll::Ready(Some(()));
            }
        }
        if taken.is_pending() || (taken == Poll::Ready(None) && inner.unasked > 0) {
            return self.ask_after_confirmed(&mut inner);
        }
        if taken == Poll::Ready(None)
            && let Some(ack) = core.acks.take()
        {
            // What was taken until now is not given to a successor.
            self.taken.push_back(Up::Acknowledgement(Box::new(ack)));
            return Poll::Ready(Some(()));
        }
        for queued in self.batch.drain(..) {
            let goes = match queued.mark {
                Mark::Nothing => core.routes.wants(&queued.payload),
                Mark::Request(number) => core.pending().sent(number),
                Mark::Confirm(number) => {
                    inner.unasked += 1;
                    let goes = core.flights.takes_off(number, &queued.payload);
                    // Somebody waits for an answer now: it is read on.
                    core.room.notify_one();
                    goes
                }
            };
            if goes {
                self.taken.push_back(queued.payload);
            }
        }
        inner.since_asked += usize::from(inner.unasked > 0);
        if inner.unasked >= CONFIRM_EVERY || inner.since_asked >= PARCELS {
            return self.ask_after_confirmed(&mut inner);
        }
        taken
    }

    /// Asks whether the messages before are durable. Frames of one stream take effect in order, so any request that is
    /// always answered does.
    fn ask_after_confirmed(&mut self, inner: &mut Inner) -> Poll<Option<()>> {
        if inner.unasked == 0 {
            return Poll::Pending;
        }
        (inner.unasked, inner.since_asked) = (0, 0);
        let request_id = self.core.barrier_id(self.core.flights.barrier());
        let query = TaskQuery { op: OpType::Get.into(), request_id, ..TaskQuery::default() };
        self.taken.push_back(Up::TaskQuery(Box::new(query)));
        Poll::Ready(Some(()))
    }
}

impl Stream for Outbound {
    type Item = UpstreamMessage;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<UpstreamMessage>> {
        loop {
            if let Some(payload) = self.taken.pop_front() {
                return Poll::Ready(Some(UpstreamMessage { payload: Some(payload), ..UpstreamMessage::default() }));
            }
            match self.fill(cx) {
                Poll::Ready(Some(())) => {}
                Poll::Ready(None) => return Poll::Ready(None),
                Poll::Pending => return Poll::Pending,
            }
        }
    }
}

/// Messages whose senders wait until they are durable.
#[derive(Default)]
pub(crate) struct Flights {
    inner: Mutex<Air>,
    /// How many are on their way: looked at for each parcel that goes out.
    count: AtomicUsize,
}

#[derive(Default)]
struct Air {
    next: u64,
    /// Queued: who waits.
    waiting: HashMap<u64, oneshot::Sender<Result<()>>>,
    /// On their way, in order.
    flying: VecDeque<Flight>,
    /// Questions asked so far.
    barriers: u64,
}

struct Flight {
    message: SendMessage,
    reply: oneshot::Sender<Result<()>>,
    /// The question that is asked behind it.
    barrier: u64,
}

impl Flights {
    /// Short and without a wait inside; a panic inside leaves nothing half done.
    fn lock(&self) -> MutexGuard<'_, Air> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn register(&self) -> (u64, oneshot::Receiver<Result<()>>) {
        let (reply, answer) = oneshot::channel();
        let mut air = self.lock();
        air.next += 1;
        let number = air.next;
        air.waiting.insert(number, reply);
        (number, answer)
    }

    pub(crate) fn forget(&self, number: u64) {
        self.lock().waiting.remove(&number);
    }

    /// Whether somebody waits for the server's word.
    pub(crate) fn is_waiting(&self) -> bool {
        self.count.load(Relaxed) > 0
    }

    fn is_full(&self) -> bool {
        self.count.load(Relaxed) >= FLYING_MAX
    }

    /// It goes out now. False if its sender has gone before it did.
    fn takes_off(&self, number: u64, payload: &Up) -> bool {
        let mut air = self.lock();
        let (Some(reply), Up::Send(message)) = (air.waiting.remove(&number), payload) else { return false };
        if reply.is_closed() {
            return false;
        }
        let barrier = air.barriers + 1;
        air.flying.push_back(Flight { message: message.clone(), reply, barrier });
        self.count.store(air.flying.len(), Relaxed);
        true
    }

    fn barrier(&self) -> u64 {
        let mut air = self.lock();
        air.barriers += 1;
        air.barriers
    }

    /// The server has answered: all before that question is durable.
    pub(crate) fn landed(&self, barrier: u64) {
        let mut air = self.lock();
        while air.flying.front().is_some_and(|flight| flight.barrier <= barrier) {
            if let Some(flight) = air.flying.pop_front() {
                let _ = flight.reply.send(Ok(()));
            }
        }
        self.count.store(air.flying.len(), Relaxed);
    }

    /// The server has refused one. False if it is none of these.
    pub(crate) fn refused(&self, error: &ErrorResponse) -> bool {
        let mut air = self.lock();
        let at = air.flying.iter().position(|flight| flight.message.idempotency_key == error.request_id);
        let Some(flight) = at.and_then(|at| air.flying.remove(at)) else { return false };
        self.count.store(air.flying.len(), Relaxed);
        let _ = flight.reply.send(Err(Error::from_response(error)));
        true
    }

    /// A new connection: what was on its way goes again, if the server knows a message that it has seen.
    pub(crate) fn again(&self, knows_keys: bool) -> Vec<Queued> {
        let mut air = self.lock();
        let flying = std::mem::take(&mut air.flying);
        self.count.store(0, Relaxed);
        let mut again = Vec::new();
        // One whose sender has gone is not sent again: it may be what breaks the connection.
        for flight in flying.into_iter().filter(|flight| !flight.reply.is_closed()) {
            if knows_keys {
                air.next += 1;
                let number = air.next;
                air.waiting.insert(number, flight.reply);
                again.push(Queued { payload: Up::Send(flight.message), mark: Mark::Confirm(number) });
            } else {
                let message = "the connection broke before the message was confirmed, and this server does not know a \
                               message that it has seen: it may have been delivered";
                let _ = flight.reply.send(Err(Error::new(Kind::Interrupted, message)));
            }
        }
        again
    }

    pub(crate) fn fail(&self, why: &Error) {
        let mut air = self.lock();
        for flight in air.flying.drain(..) {
            let message = format!("the client ended before the message was confirmed: {why}");
            let _ = flight.reply.send(Err(Error::new(Kind::Interrupted, message).with_source(why.clone())));
        }
        for (_, reply) in air.waiting.drain() {
            let _ = reply.send(Err(why.clone()));
        }
    }
}

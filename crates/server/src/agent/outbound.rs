//! From the connection's task to the transport, and which deliveries have arrived at the client.

use std::{
    collections::VecDeque,
    future::ready,
    pin::Pin,
    sync::{Arc, Mutex, MutexGuard, PoisonError, Weak},
    task::{Context, Poll},
};

use bytes::Bytes;
use futures_util::{FutureExt as _, future::BoxFuture};
use hyper::{Response, body::Frame as BodyFrame};
use prost::Message as _;
use tokio::sync::mpsc;
use tokio_stream::Stream;
use tonic::{Status, body::Body};
use trunkline_core::{
    limits::FRAME_OUT_BYTES_MAX,
    session::{self, Transport},
    task::Receipt,
    work::WorkGroup,
};
use trunkline_proto::{
    own,
    v1::{DownstreamMessage, downstream_message::Payload},
};
use trunkline_store::log::{Offset, Record};

use super::{
    budget::{Budget, Debt},
    oversized,
};
use crate::listen::Arrivals;

/// Deliveries in flight on a stream that are kept apart. Beyond, a delivery of a lane replaces the previous one, and no more
/// shared work is taken.
const IN_FLIGHT_MAX: usize = 256;

/// Parcels between the task and the transport. One: what waits here was read from the log and is not delivered yet.
const PARCELS_MAX: usize = 1;

/// What the entries of a list may take of a frame: the rest is for what stands beside them.
const FRAME_LIST_BYTES_MAX: usize = FRAME_OUT_BYTES_MAX - 64 * 1024;

/// Bytes before an entry of a list, at most.
const ENTRY_OVERHEAD_BYTES: usize = 6;

/// A frame on its way, and whom to tell that it went.
pub(super) struct Frame {
    message: DownstreamMessage,
    delivery: Delivery,
}

enum Delivery {
    /// The transport need not tell that it went.
    Untold,
    /// Neither; its bytes go back to the client's budget.
    Reply { _debt: Debt },
    /// A record of the identity's lanes.
    Lane(session::Delivery),
    /// A record of the group's work; goes back to the group if the frame is dropped.
    Work(Work),
    /// A task for the client; handed out again if the frame is dropped.
    Task(Receipt),
}

/// A piece of a group's work that is out; goes back to the group when dropped.
pub(super) struct Work {
    group: Arc<WorkGroup>,
    record: Option<Arc<Record>>,
}

impl Work {
    pub(super) fn new(group: Arc<WorkGroup>, record: Arc<Record>) -> Self {
        Self { group, record: Some(record) }
    }

    pub(super) fn record(&self) -> Option<&Record> {
        self.record.as_deref()
    }

    pub(super) fn done(mut self) {
        if let Some(record) = self.record.take() {
            self.group.done(record.offset);
        }
    }
}

impl Drop for Work {
    fn drop(&mut self) {
        if let Some(record) = self.record.take() {
            self.group.give_back(record);
        }
    }
}

impl Frame {
    /// What is not counted, because there is one of it.
    pub(super) fn uncounted(payload: Payload) -> Self {
        Self { message: message(payload), delivery: Delivery::Untold }
    }

    /// A reply, counted against the client's budget until the transport takes it. What does not fit a frame is replaced by its
    /// refusal: the client could not take it, and its stream would end.
    pub(super) fn reply(payload: Payload, budget: &Arc<Budget>) -> Self {
        let mut message = message(payload);
        let mut bytes = message.encoded_len();
        if bytes > FRAME_OUT_BYTES_MAX {
            tracing::warn!(bytes, "reply exceeds the frame limit of {FRAME_OUT_BYTES_MAX} bytes; refused");
            message.payload = message.payload.map(|payload| oversized::refusal(payload, bytes));
            bytes = message.encoded_len();
            if bytes > FRAME_OUT_BYTES_MAX {
                // So large is only what the client itself calls the request.
                message.payload = Some(oversized::uncorrelated(bytes));
                bytes = message.encoded_len();
            }
        }
        Self { message, delivery: Delivery::Reply { _debt: budget.take(bytes) } }
    }

    pub(super) fn lane(payload: Payload, delivery: session::Delivery) -> Self {
        Self { message: message(payload), delivery: Delivery::Lane(delivery) }
    }

    pub(super) fn work(payload: Payload, work: Work) -> Self {
        Self { message: message(payload), delivery: Delivery::Work(work) }
    }

    pub(super) fn task(payload: Payload, receipt: Receipt) -> Self {
        Self { message: message(payload), delivery: Delivery::Task(receipt) }
    }

    /// A delivery that the client will acknowledge.
    pub(super) fn unacknowledged(payload: Payload, offset: Offset, shared: bool) -> Self {
        let delivery = Some(own::Delivery { offset: offset.0, shared });
        Self { message: DownstreamMessage { delivery, ..message(payload) }, delivery: Delivery::Untold }
    }

    /// Nothing, if it must not go out any more.
    fn take(self, in_flight: &InFlight) -> Option<DownstreamMessage> {
        match self.delivery {
            Delivery::Untold | Delivery::Reply { .. } => {}
            Delivery::Lane(delivery) => in_flight.track(Tracked::Lane(delivery))?,
            Delivery::Work(work) => in_flight.track(Tracked::Work(work))?,
            Delivery::Task(receipt) => {
                if !receipt.take() {
                    return None;
                }
            }
        }
        Some(self.message)
    }
}

/// As many of a list, from its beginning, as fit one frame together; the rest is for the next page.
pub(super) fn fitting<T: prost::Message>(all: impl IntoIterator<Item = T>) -> Vec<T> {
    fitting_beside(&[] as &[T], all)
}

/// The same, in a frame that has others already.
pub(super) fn fitting_beside<O: prost::Message, T: prost::Message>(
    others: &[O],
    all: impl IntoIterator<Item = T>,
) -> Vec<T> {
    // Tag and length stand before each.
    let mut bytes = others.iter().map(|other| other.encoded_len() + ENTRY_OVERHEAD_BYTES).sum::<usize>();
    let fits = |each: &T| {
        bytes += each.encoded_len() + ENTRY_OVERHEAD_BYTES;
        bytes <= FRAME_LIST_BYTES_MAX
    };
    all.into_iter().take_while(fits).collect()
}

fn message(payload: Payload) -> DownstreamMessage {
    DownstreamMessage { payload: Some(payload), ..DownstreamMessage::default() }
}

/// Frames that go together, or the end.
type Parcel = Result<VecDeque<Frame>, Status>;

/// The task's end of the channel to the transport.
pub(super) struct Outbound {
    // Boxed, because a channel has room for 32 of its items from the start.
    parcels: mpsc::Sender<Box<Parcel>>,
    in_flight: Arc<InFlight>,
    arrivals: Option<Arc<Arrivals>>,
}

/// Room for a parcel.
pub(super) struct Room<'a>(mpsc::Permit<'a, Box<Parcel>>);

impl Room<'_> {
    pub(super) fn send(self, frames: VecDeque<Frame>) {
        self.0.send(Box::new(Ok(frames)));
    }
}

impl Outbound {
    /// Waits for room; nothing if the transport is gone. Cancel-safe.
    pub(super) async fn room(&self) -> Option<Room<'_>> {
        self.parcels.reserve().await.ok().map(Room)
    }

    /// If there is room now.
    pub(super) fn room_now(&self) -> Option<Room<'_>> {
        self.parcels.try_reserve().ok().map(Room)
    }

    /// Sends one frame, when there is room; false if the transport is gone.
    pub(super) async fn send(&self, frame: Frame) -> bool {
        match self.room().await {
            Some(room) => {
                room.send([frame].into());
                true
            }
            None => false,
        }
    }

    /// Ends the stream, when there is room.
    pub(super) async fn end(&self, status: Status) {
        // Nothing is to be done if the transport is gone.
        let _ = self.parcels.send(Box::new(Err(status))).await;
    }

    /// Resolves when the transport is gone.
    pub(super) fn gone(&self) -> impl Future<Output = ()> + Send + 'static {
        let parcels = self.parcels.clone();
        async move { parcels.closed().await }
    }

    pub(super) fn in_flight(&self) -> &Arc<InFlight> {
        &self.in_flight
    }

    /// The transport as the session sees it. It does not keep the stream open.
    pub(super) fn transport(&self) -> impl Transport + 'static {
        WeakTransport { in_flight: Arc::downgrade(&self.in_flight), arrivals: self.arrivals.clone() }
    }
}

/// A stream's transport while it is open; then nothing is in flight.
struct WeakTransport {
    in_flight: Weak<InFlight>,
    arrivals: Option<Arc<Arrivals>>,
}

impl Transport for WeakTransport {
    fn look(&self) {
        if let Some(in_flight) = self.in_flight.upgrade() {
            in_flight.lock().look();
        }
    }

    fn settled(&self) -> BoxFuture<'static, ()> {
        match self.in_flight.upgrade() {
            Some(in_flight) => in_flight.settled().boxed(),
            None => ready(()).boxed(),
        }
    }

    fn answers(&self) -> BoxFuture<'static, bool> {
        match self.arrivals.clone() {
            _ if self.in_flight.strong_count() == 0 => ready(false).boxed(),
            Some(arrivals) => async move { arrivals.answers().await }.boxed(),
            None => ready(true).boxed(),
        }
    }
}

/// A delivery whose arrival is tracked.
enum Tracked {
    Lane(session::Delivery),
    Work(Work),
}

impl Tracked {
    fn arrived(self) {
        match self {
            Self::Lane(delivery) => delivery.done(),
            Self::Work(work) => work.done(),
        }
    }
}

/// Deliveries of a stream that have not arrived, as far as the transport can tell. Those that are left when it is closed or dropped
/// were not delivered: records are read again, work goes back to its group.
pub(crate) struct InFlight(Mutex<Deliveries>);

#[derive(Default)]
struct Deliveries {
    /// None if the transport cannot tell, or the client acknowledges: then a delivery has arrived when the transport takes it.
    arrivals: Option<Arc<Arrivals>>,
    /// In the piece of the body that is being encoded.
    encoding: Vec<Tracked>,
    /// Bytes of the body so far.
    body_bytes: u64,
    /// In the body, with the byte at which each ends.
    sent: VecDeque<(u64, Tracked)>,
    /// Shared work among `sent`.
    work: usize,
    is_closed: bool,
}

impl InFlight {
    fn lock(&self) -> MutexGuard<'_, Deliveries> {
        // Each section leaves a consistent value: nothing in it can panic half way.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// From now on a delivery has arrived when the transport takes it: the client acknowledges.
    pub(super) fn stop_tracking(&self) {
        self.lock().arrivals = None;
    }

    /// Tracks a delivery that is about to be encoded. None if it must not be sent any more.
    fn track(&self, delivery: Tracked) -> Option<()> {
        let mut deliveries = self.lock();
        if deliveries.is_closed {
            return None;
        }
        if deliveries.arrivals.is_none() {
            delivery.arrived();
            return Some(());
        }
        match (deliveries.encoding.last_mut(), delivery) {
            (Some(Tracked::Lane(before)), Tracked::Lane(delivery)) if before.is_within(&delivery) => {
                *before = delivery;
            }
            (_, delivery) => deliveries.encoding.push(delivery),
        }
        Some(())
    }

    /// Gives up what has not arrived by now; frames with deliveries that wait for the transport are not sent any more.
    pub(super) fn close(&self) {
        let mut deliveries = self.lock();
        deliveries.look();
        (deliveries.is_closed, deliveries.work) = (true, 0);
        let left = (std::mem::take(&mut deliveries.encoding), std::mem::take(&mut deliveries.sent));
        // Work goes back to its group.
        drop(deliveries);
        drop(left);
    }

    /// A piece of the body of this size was encoded, with the deliveries since the previous one.
    fn encoded(&self, bytes: usize) {
        let deliveries = &mut *self.lock();
        deliveries.body_bytes += bytes as u64;
        if deliveries.encoding.is_empty() {
            return;
        }
        deliveries.look();
        let Deliveries { arrivals, encoding, body_bytes: end, sent, work, .. } = deliveries;
        if let Some(arrivals) = arrivals {
            arrivals.confirm_up_to(*end);
        }
        let is_full = sent.len() >= IN_FLIGHT_MAX;
        for delivery in encoding.drain(..) {
            *work += usize::from(matches!(delivery, Tracked::Work(_)));
            match (sent.back_mut(), delivery) {
                (Some((at, Tracked::Lane(before))), Tracked::Lane(delivery))
                    if is_full && before.is_within(&delivery) =>
                {
                    (*at, *before) = (*end, delivery);
                }
                (_, delivery) => sent.push_back((*end, delivery)),
            }
        }
    }

    /// Whether [`IN_FLIGHT_MAX`] pieces of shared work are in flight.
    pub(super) fn is_work_full(&self) -> bool {
        let mut deliveries = self.lock();
        deliveries.work >= IN_FLIGHT_MAX && {
            deliveries.look();
            deliveries.work >= IN_FLIGHT_MAX
        }
    }

    /// Resolves when fewer than [`IN_FLIGHT_MAX`] pieces of shared work are in flight. Cancel-safe.
    pub(super) async fn room_for_work(&self) {
        self.arrivals_until(|| !self.is_work_full()).await;
    }

    /// Resolves when what was sent before this call has arrived, or cannot any more.
    async fn settled(self: Arc<Self>) {
        let end = self.lock().sent.back().map_or(0, |(end, _)| *end);
        let arrivals = self.lock().arrivals.clone();
        self.arrivals_until(|| arrivals.as_ref().is_none_or(|arrivals| arrivals.arrived() >= end)).await;
    }

    /// Sends PINGs until it is so, or nothing more arrives.
    async fn arrivals_until(&self, is_so: impl Fn() -> bool) {
        let Some(arrivals) = self.lock().arrivals.clone() else { return };
        loop {
            let changed = arrivals.changed();
            if is_so() || arrivals.is_over() {
                return;
            }
            arrivals.ping_now();
            changed.await;
        }
    }
}

impl Deliveries {
    /// Notes which have arrived.
    fn look(&mut self) {
        let Some(arrivals) = &self.arrivals else { return };
        let arrived = arrivals.arrived();
        while let Some((_, delivery)) = self.sent.pop_front_if(|(end, _)| *end <= arrived) {
            self.work -= usize::from(matches!(delivery, Tracked::Work(_)));
            delivery.arrived();
        }
    }
}

/// The body of a stream's answer, with its bytes counted.
struct Counted {
    body: Body,
    in_flight: Arc<InFlight>,
}

/// Counts the bytes of the answer to a stream, so that its deliveries have places in them.
pub(crate) fn counting(answer: Response<Body>) -> Response<Body> {
    match answer.extensions().get::<Arc<InFlight>>().cloned() {
        Some(in_flight) => answer.map(|body| Body::new(Counted { body, in_flight })),
        None => answer,
    }
}

impl hyper::body::Body for Counted {
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<BodyFrame<Bytes>, Status>>> {
        let polled = Pin::new(&mut self.body).poll_frame(cx);
        if let Poll::Ready(Some(Ok(frame))) = &polled
            && let Some(data) = frame.data_ref()
        {
            self.in_flight.encoded(data.len());
        }
        polled
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }
}

/// The transport's end of the channel. A frame is taken when the transport has room for it, and delivered when it has arrived.
pub(crate) struct Frames {
    parcels: mpsc::Receiver<Box<Parcel>>,
    open: VecDeque<Frame>,
    in_flight: Arc<InFlight>,
}

pub(super) fn channel(arrivals: Option<Arc<Arrivals>>) -> (Outbound, Frames) {
    let (sender, parcels) = mpsc::channel(PARCELS_MAX);
    let deliveries = Deliveries { arrivals: arrivals.clone(), ..Deliveries::default() };
    let in_flight = Arc::new(InFlight(Mutex::new(deliveries)));
    let frames = Frames { parcels, open: VecDeque::new(), in_flight: in_flight.clone() };
    (Outbound { parcels: sender, in_flight, arrivals }, frames)
}

impl Frames {
    pub(super) fn in_flight(&self) -> &Arc<InFlight> {
        &self.in_flight
    }
}

impl Stream for Frames {
    type Item = Result<DownstreamMessage, Status>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        loop {
            while let Some(frame) = self.open.pop_front() {
                if let Some(message) = frame.take(&self.in_flight) {
                    return Poll::Ready(Some(Ok(message)));
                }
            }
            match std::task::ready!(self.parcels.poll_recv(cx)).map(|parcel| *parcel) {
                Some(Ok(frames)) => self.open = frames,
                Some(Err(status)) => return Poll::Ready(Some(Err(status))),
                None => return Poll::Ready(None),
            }
        }
    }
}

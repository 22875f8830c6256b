//! From the connection's task to the transport, and back what of it its client has.

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

/// Deliveries of a stream that are on their way and told apart: beyond, those that one later can stand for are forgotten.
const ON_THEIR_WAY_MAX: usize = 256;

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
    fn take(self, unarrived: &Unarrived) -> Option<DownstreamMessage> {
        match self.delivery {
            Delivery::Untold | Delivery::Reply { .. } => {}
            Delivery::Lane(delivery) => unarrived.begins(OnItsWay::Lane(delivery))?,
            Delivery::Work(work) => unarrived.begins(OnItsWay::Work(work))?,
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
    let mut bytes = 0;
    let fits = |each: &T| {
        // Tag and length stand before each.
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

/// The task's end.
pub(super) struct Outbound {
    // Boxed, because a channel has room for 32 of its items from the start.
    parcels: mpsc::Sender<Box<Parcel>>,
    unarrived: Arc<Unarrived>,
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
        // Whoever is gone does not hear how it ended.
        let _ = self.parcels.send(Box::new(Err(status))).await;
    }

    /// Returns when the transport is gone.
    pub(super) fn gone(&self) -> impl Future<Output = ()> + Send + 'static {
        let parcels = self.parcels.clone();
        async move { parcels.closed().await }
    }

    pub(super) fn unarrived(&self) -> &Arc<Unarrived> {
        &self.unarrived
    }

    /// What the session asks. It keeps nothing of it.
    pub(super) fn transport(&self) -> impl Transport + 'static {
        WeakTransport(Arc::downgrade(&self.unarrived))
    }
}

/// A stream's transport, as long as there is one.
struct WeakTransport(Weak<Unarrived>);

impl Transport for WeakTransport {
    fn look(&self) {
        if let Some(unarrived) = self.0.upgrade() {
            unarrived.lock().look();
        }
    }

    fn settles(&self) -> BoxFuture<'static, ()> {
        match self.0.upgrade() {
            Some(unarrived) => unarrived.settles().boxed(),
            None => ready(()).boxed(),
        }
    }
}

/// A delivery on its way.
enum OnItsWay {
    Lane(session::Delivery),
    Work(Work),
}

impl OnItsWay {
    fn arrives(self) {
        match self {
            Self::Lane(delivery) => delivery.done(),
            Self::Work(work) => work.done(),
        }
    }
}

/// What a stream was given and its client does not have yet, as far as anybody knows. What is left of it in the end was not
/// delivered: records come again, work goes back to its group.
pub(crate) struct Unarrived(Mutex<Deliveries>);

#[derive(Default)]
struct Deliveries {
    /// Nothing where the transport cannot tell, or the client does: then what the transport takes has arrived.
    arrivals: Option<Arc<Arrivals>>,
    /// Those in the piece that it is being given.
    begun: Vec<OnItsWay>,
    /// Bytes that it was given.
    end: u64,
    /// Those it has, and where each ends.
    given: VecDeque<(u64, OnItsWay)>,
    /// How many of them are pieces of work.
    work: usize,
    /// The session is.
    is_over: bool,
}

impl Unarrived {
    fn lock(&self) -> MutexGuard<'_, Deliveries> {
        // Each section leaves a consistent value: nothing in it can panic half way.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// From here on the client itself says what it has.
    pub(super) fn stop_tracking(&self) {
        self.lock().arrivals = None;
    }

    /// Nothing, if it must not go out any more: it is on its way to others, or comes again.
    fn begins(&self, delivery: OnItsWay) -> Option<()> {
        let mut deliveries = self.lock();
        if deliveries.is_over {
            return None;
        }
        if deliveries.arrivals.is_none() {
            delivery.arrives();
            return Some(());
        }
        match (deliveries.begun.last_mut(), delivery) {
            (Some(OnItsWay::Lane(before)), OnItsWay::Lane(delivery)) if before.is_within(&delivery) => {
                *before = delivery;
            }
            (_, delivery) => deliveries.begun.push(delivery),
        }
        Some(())
    }

    /// What has not arrived by now was not delivered, and what was not given to the transport does not go out any more.
    pub(super) fn end(&self) {
        let mut deliveries = self.lock();
        deliveries.look();
        (deliveries.is_over, deliveries.work) = (true, 0);
        let left = (std::mem::take(&mut deliveries.begun), std::mem::take(&mut deliveries.given));
        // Work goes back to its group.
        drop(deliveries);
        drop(left);
    }

    /// The transport has so many more bytes, of everything that it was being given.
    fn gives(&self, bytes: usize) {
        let deliveries = &mut *self.lock();
        deliveries.end += bytes as u64;
        if deliveries.begun.is_empty() {
            return;
        }
        deliveries.look();
        let Deliveries { arrivals, begun, end, given, work, .. } = deliveries;
        if let Some(arrivals) = arrivals {
            arrivals.want(*end);
        }
        let is_full = given.len() >= ON_THEIR_WAY_MAX;
        for delivery in begun.drain(..) {
            *work += usize::from(matches!(delivery, OnItsWay::Work(_)));
            match (given.back_mut(), delivery) {
                (Some((at, OnItsWay::Lane(before))), OnItsWay::Lane(delivery))
                    if is_full && before.is_within(&delivery) =>
                {
                    (*at, *before) = (*end, delivery);
                }
                (_, delivery) => given.push_back((*end, delivery)),
            }
        }
    }

    /// Whether so much work is on its way that no more is taken until some has arrived.
    pub(super) fn has_enough_work(&self) -> bool {
        let mut deliveries = self.lock();
        deliveries.work >= ON_THEIR_WAY_MAX && {
            deliveries.look();
            deliveries.work >= ON_THEIR_WAY_MAX
        }
    }

    /// Returns when some of what is on its way may have arrived, or nothing is. Cancel-safe.
    pub(super) fn moves(&self) -> impl Future<Output = ()> + Send + use<> {
        let moves = self.lock().arrivals.as_ref().map(|arrivals| arrivals.moves());
        async {
            if let Some(moves) = moves {
                moves.await;
            }
        }
    }

    /// Returns when what the transport has by now has arrived, or will not.
    async fn settles(self: Arc<Self>) {
        let (arrivals, end) = {
            let deliveries = self.lock();
            let Some(arrivals) = deliveries.arrivals.clone() else { return };
            (arrivals, deliveries.given.back().map_or(0, |(end, _)| *end))
        };
        while arrivals.arrived() < end && !arrivals.is_over() {
            let moves = arrivals.moves();
            // It may have moved before.
            if arrivals.arrived() < end && !arrivals.is_over() {
                moves.await;
            }
        }
    }
}

impl Deliveries {
    /// Notes what has arrived.
    fn look(&mut self) {
        let Some(arrivals) = &self.arrivals else { return };
        let arrived = arrivals.arrived();
        while let Some((_, delivery)) = self.given.pop_front_if(|(end, _)| *end <= arrived) {
            self.work -= usize::from(matches!(delivery, OnItsWay::Work(_)));
            delivery.arrives();
        }
    }
}

/// The body of a stream's answer, which counts what it gives.
struct Counted {
    body: Body,
    unarrived: Arc<Unarrived>,
}

/// The answer to a stream, so that it is known which deliveries its bytes are.
pub(crate) fn counting(answer: Response<Body>) -> Response<Body> {
    match answer.extensions().get::<Arc<Unarrived>>().cloned() {
        Some(unarrived) => answer.map(|body| Body::new(Counted { body, unarrived })),
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
            self.unarrived.gives(data.len());
        }
        polled
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }
}

/// The transport's end. A frame is taken when the transport asks for it, which it does when the client's flow control lets it
/// write, and delivered when it has arrived.
pub(crate) struct Frames {
    parcels: mpsc::Receiver<Box<Parcel>>,
    open: VecDeque<Frame>,
    unarrived: Arc<Unarrived>,
}

pub(super) fn channel(arrivals: Option<Arc<Arrivals>>) -> (Outbound, Frames) {
    let (sender, parcels) = mpsc::channel(PARCELS_MAX);
    let unarrived = Arc::new(Unarrived(Mutex::new(Deliveries { arrivals, ..Deliveries::default() })));
    let frames = Frames { parcels, open: VecDeque::new(), unarrived: unarrived.clone() };
    (Outbound { parcels: sender, unarrived }, frames)
}

impl Frames {
    pub(super) fn unarrived(&self) -> &Arc<Unarrived> {
        &self.unarrived
    }
}

impl Stream for Frames {
    type Item = Result<DownstreamMessage, Status>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        loop {
            while let Some(frame) = self.open.pop_front() {
                if let Some(message) = frame.take(&self.unarrived) {
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

//! From the connection's task to the transport, and back what the transport took.

use std::{
    collections::VecDeque,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
};

use prost::Message as _;
use tokio::sync::mpsc;
use tokio_stream::Stream;
use tonic::Status;
use trunkline_core::{limits::FRAME_OUT_BYTES_MAX, session, task::Receipt, work::WorkGroup};
use trunkline_proto::{
    own,
    v1::{DownstreamMessage, downstream_message::Payload},
};
use trunkline_store::log::{Offset, Record};

use super::{
    budget::{Budget, Debt},
    oversized,
};

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
    fn take(self) -> Option<DownstreamMessage> {
        match self.delivery {
            Delivery::Untold | Delivery::Reply { .. } => {}
            Delivery::Lane(delivery) => delivery.done(),
            Delivery::Work(work) => work.done(),
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

/// The task's end. Boxed, because a channel has room for 32 of its items from the start.
pub(super) type Outbound = mpsc::Sender<Box<Parcel>>;

/// The transport's end. A frame counts as taken when the transport asks for it, which it does when the client's flow
/// control lets it write.
pub(crate) struct Frames {
    parcels: mpsc::Receiver<Box<Parcel>>,
    open: VecDeque<Frame>,
}

pub(super) fn channel() -> (Outbound, Frames) {
    let (sender, parcels) = mpsc::channel(PARCELS_MAX);
    (sender, Frames { parcels, open: VecDeque::new() })
}

impl Stream for Frames {
    type Item = Result<DownstreamMessage, Status>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        loop {
            while let Some(frame) = self.open.pop_front() {
                if let Some(message) = frame.take() {
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

//! From the connection's task to the transport, and back what the transport took.

use std::{
    collections::VecDeque,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
};

use tokio::sync::mpsc;
use tokio_stream::Stream;
use tonic::Status;
use trunkline_core::{session, task::Receipt, work::WorkGroup};
use trunkline_proto::{
    own,
    v1::{DownstreamMessage, downstream_message::Payload},
};
use trunkline_store::log::{Offset, Record};

/// Parcels between the task and the transport. One: what waits here was read from the log and is not delivered yet.
const PARCELS_MAX: usize = 1;

/// A frame on its way, and whom to tell that it went.
pub(super) struct Frame {
    message: DownstreamMessage,
    delivery: Delivery,
}

enum Delivery {
    /// The transport need not tell that it went.
    Reply,
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
    pub(super) fn reply(payload: Payload) -> Self {
        Self { message: message(payload), delivery: Delivery::Reply }
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
        Self { message: DownstreamMessage { delivery, ..message(payload) }, delivery: Delivery::Reply }
    }

    /// Nothing, if it must not go out any more.
    fn take(self) -> Option<DownstreamMessage> {
        match self.delivery {
            Delivery::Reply => {}
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

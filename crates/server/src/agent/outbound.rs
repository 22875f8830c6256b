//! From the connection's task to the transport, and back what the transport took.

use std::{
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
};

use tokio::sync::mpsc;
use tokio_stream::Stream;
use tonic::Status;
use trunkline_core::{session::Taken, work::WorkGroup};
use trunkline_proto::v1::{DownstreamMessage, downstream_message::Payload};
use trunkline_store::log::{Offset, Record};

/// Frames between the task and the transport. Few: what waits here was read from the log and is not delivered yet.
const FRAMES_MAX: usize = 32;

/// A frame on its way, and whom to tell that it went.
pub(super) struct Frame {
    message: DownstreamMessage,
    delivery: Delivery,
}

enum Delivery {
    /// Nobody keeps account of it.
    Reply,
    /// A record of the identity's lanes.
    Lane(Taken, Offset),
    /// A record of the group's work; goes back to the group if the frame is dropped.
    Work(Work),
}

struct Work {
    group: Arc<WorkGroup>,
    record: Option<Arc<Record>>,
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

    pub(super) fn lane(payload: Payload, taken: Taken, offset: Offset) -> Self {
        Self { message: message(payload), delivery: Delivery::Lane(taken, offset) }
    }

    pub(super) fn work(payload: Payload, group: Arc<WorkGroup>, record: Arc<Record>) -> Self {
        Self { message: message(payload), delivery: Delivery::Work(Work { group, record: Some(record) }) }
    }

    fn take(self) -> DownstreamMessage {
        match self.delivery {
            Delivery::Reply => {}
            Delivery::Lane(taken, offset) => taken.note(offset),
            Delivery::Work(mut work) => {
                if let Some(record) = work.record.take() {
                    work.group.done(record.offset);
                }
            }
        }
        self.message
    }
}

fn message(payload: Payload) -> DownstreamMessage {
    DownstreamMessage { payload: Some(payload), ..DownstreamMessage::default() }
}

/// The task's end. Boxed, because a channel has room for 32 of its items from the start, and a frame is large.
pub(super) type Outbound = mpsc::Sender<Box<Result<Frame, Status>>>;

/// The transport's end. A frame counts as taken when the transport asks for it, which it does when the client's flow
/// control lets it write.
pub(crate) struct Frames(mpsc::Receiver<Box<Result<Frame, Status>>>);

pub(super) fn channel() -> (Outbound, Frames) {
    let (sender, receiver) = mpsc::channel(FRAMES_MAX);
    (sender, Frames(receiver))
}

impl Stream for Frames {
    type Item = Result<DownstreamMessage, Status>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        self.0.poll_recv(cx).map(|frame| frame.map(|frame| (*frame).map(Frame::take)))
    }
}

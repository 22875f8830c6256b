//! Two ends in one process.

use bytes::Bytes;
use tokio::sync::mpsc;

use super::{Broken, Frame, Receiver, Sender, Transport};
use crate::close::Close;

/// Frames that may be on their way; who sends more waits.
const FRAMES_MAX: usize = 256;

/// An end of a pair.
pub struct MemoryTransport {
    sender: MemorySender,
    receiver: MemoryReceiver,
}

/// Its end to send with.
pub struct MemorySender(mpsc::Sender<Frame>);

/// Its end to receive with.
pub struct MemoryReceiver(mpsc::Receiver<Frame>);

impl MemoryTransport {
    /// Two ends: what one sends, the other receives. Either breaks when the other is dropped.
    #[must_use]
    pub fn pair() -> (Self, Self) {
        let ((to_one, one), (to_other, other)) = (mpsc::channel(FRAMES_MAX), mpsc::channel(FRAMES_MAX));
        let end = |sender, receiver| Self { sender: MemorySender(sender), receiver: MemoryReceiver(receiver) };
        (end(to_other, one), end(to_one, other))
    }
}

impl Transport for MemoryTransport {
    type Sender = MemorySender;
    type Receiver = MemoryReceiver;

    fn split(self) -> (MemorySender, MemoryReceiver) {
        (self.sender, self.receiver)
    }
}

impl Sender for MemorySender {
    async fn feed(&mut self, frame: String) -> Result<(), Broken> {
        Ok(self.0.send(Frame::Envelope(Bytes::from(frame))).await?)
    }

    async fn flush(&mut self) -> Result<(), Broken> {
        Ok(())
    }

    async fn ping(&mut self) -> Result<(), Broken> {
        Ok(())
    }

    async fn close(&mut self, close: Close) {
        // Who is gone need not be told.
        let _ = self.0.send(Frame::Closed(Some(close))).await;
    }
}

impl Receiver for MemoryReceiver {
    async fn next(&mut self) -> Option<Result<Frame, Broken>> {
        self.0.recv().await.map(Ok)
    }
}

//! What carries frames: anything with two ends that keeps their order.

mod memory;
#[cfg(feature = "websocket")]
pub mod websocket;

use std::time::Duration;

use tokio::time::timeout;

use crate::close::{Close, code};

pub use memory::{MemoryReceiver, MemorySender, MemoryTransport};

/// Something that came.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Frame {
    /// An envelope, as text or bytes.
    Envelope(bytes::Bytes),
    /// A sign of life of the transport's own.
    Alive,
    /// It was too large, and was not read to its end.
    TooLarge(String),
    /// It said that it was text, and is not UTF-8.
    NotText(String),
    /// The other end closed, and said why.
    Closed(Option<Close>),
}

/// A connection that broke, in the transport's words.
pub type Broken = Box<dyn std::error::Error + Send + Sync>;

/// A connection to one peer. Frames arrive in the order in which they were sent, whole, until it breaks.
pub trait Transport: Send + 'static {
    /// Its end to send with.
    type Sender: Sender;
    /// Its end to receive with.
    type Receiver: Receiver;

    /// Takes it apart, so that one may wait for what comes while the other end does not take more.
    fn split(self) -> (Self::Sender, Self::Receiver);
}

/// The end to send with.
pub trait Sender: Send + 'static {
    /// Puts a frame where [`Sender::flush`] sends it from; waits for room. A frame may already be gone when this is cancelled.
    fn feed(&mut self, frame: String) -> impl Future<Output = Result<(), Broken>> + Send;

    /// Sends what was fed.
    fn flush(&mut self) -> impl Future<Output = Result<(), Broken>> + Send;

    /// Asks for a sign of life of the transport's own, if it has one.
    fn ping(&mut self) -> impl Future<Output = Result<(), Broken>> + Send;

    /// Says why, and ends.
    fn close(&mut self, close: Close) -> impl Future<Output = ()> + Send;
}

/// The end to receive with.
pub trait Receiver: Send + 'static {
    /// What comes next; nothing if there will be nothing any more. Cancel-safe.
    fn next(&mut self) -> impl Future<Output = Option<Result<Frame, Broken>>> + Send;

    /// Reads on after [`Sender::close`] until the other end has closed, too, or for a while: what was on its way when a socket is closed
    /// may otherwise reset it before the other end has read why. Nothing, where that cannot happen.
    fn drain(&mut self) -> impl Future<Output = ()> + Send {
        std::future::ready(())
    }
}

/// Sends frames, and waits until the other end took them.
///
/// # Errors
/// [`code::AWAY`] if it is gone, or does not within `patience`.
pub async fn send(sender: &mut impl Sender, frames: Vec<String>, patience: Duration) -> Result<(), Close> {
    let sent = timeout(patience, async {
        for frame in frames {
            sender.feed(frame).await?;
        }
        sender.flush().await
    });
    let gone = |_| Close::new(code::AWAY, "the other end is gone");
    let too_slow = |_| Close::new(code::AWAY, "the other end takes nothing");
    sent.await.map_err(too_slow)?.map_err(gone)
}

//! axum's WebSocket as a transport.

use std::time::Duration;

use axum::extract::ws::{CloseFrame, Message, WebSocket as Inner};
use bytes::Bytes;
use futures_util::{
    SinkExt as _, StreamExt as _,
    stream::{SplitSink, SplitStream},
};
use tokio::time::timeout;
use tokio_tungstenite::tungstenite::Error as WireError;
use trunkline_agent_socket::{
    Close,
    transport::{Broken, Frame, Receiver, Sender, Transport},
};

/// How long the other end may take to agree that a socket is closed.
const CLOSE_PATIENCE: Duration = Duration::from_secs(2);

pub(super) struct WebSocket(pub(super) Inner);

pub(super) struct Sends(SplitSink<Inner, Message>);

pub(super) struct Receives {
    stream: SplitStream<Inner>,
    /// The other end closed so, and is not answered yet.
    closed: Option<Option<Close>>,
}

impl Transport for WebSocket {
    type Sender = Sends;
    type Receiver = Receives;

    fn split(self) -> (Sends, Receives) {
        let (sender, receiver) = self.0.split();
        (Sends(sender), Receives { stream: receiver, closed: None })
    }
}

impl Sender for Sends {
    async fn feed(&mut self, frame: String) -> Result<(), Broken> {
        Ok(self.0.feed(Message::text(frame)).await?)
    }

    async fn flush(&mut self) -> Result<(), Broken> {
        Ok(self.0.flush().await?)
    }

    async fn ping(&mut self) -> Result<(), Broken> {
        Ok(self.0.send(Message::Ping(Bytes::new())).await?)
    }

    async fn close(&mut self, close: Close) {
        let frame = CloseFrame { code: close.code, reason: close.reason.into() };
        // Who is gone need not be told.
        let _ = self.0.send(Message::Close(Some(frame))).await;
    }
}

impl Receiver for Receives {
    async fn next(&mut self) -> Option<Result<Frame, Broken>> {
        if self.closed.is_none() {
            match self.stream.next().await? {
                Ok(Message::Close(frame)) => {
                    self.closed = Some(frame.map(|frame| Close::new(frame.code, frame.reason.to_string())));
                }
                other => return Some(read(other)),
            }
        }
        // The answer (RFC 6455, section 5.5.1) is written when what follows is read: nothing.
        let _ = timeout(CLOSE_PATIENCE, self.stream.next()).await;
        self.closed.take().map(|close| Ok(Frame::Closed(close)))
    }

    async fn drain(&mut self) {
        let rest = async { while let Some(Ok(_)) = self.stream.next().await {} };
        // Elapsed: it is closed all the same.
        let _ = timeout(CLOSE_PATIENCE, rest).await;
    }
}

/// What came, but for a close.
fn read(message: Result<Message, axum::Error>) -> Result<Frame, Broken> {
    match message {
        Ok(Message::Text(text)) => Ok(Frame::Envelope(text.into())),
        Ok(Message::Binary(bytes)) => Ok(Frame::Envelope(bytes)),
        Ok(Message::Ping(_) | Message::Pong(_) | Message::Close(_)) => Ok(Frame::Alive),
        Err(error) => match *error.into_inner().downcast::<WireError>()? {
            WireError::Capacity(error) => Ok(Frame::TooLarge(error.to_string())),
            WireError::Utf8(error) => Ok(Frame::NotText(format!("a text frame is not UTF-8: {error}"))),
            error => Err(error.into()),
        },
    }
}

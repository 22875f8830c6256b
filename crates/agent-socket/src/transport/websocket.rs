//! Over WebSockets, by tokio-tungstenite: a client's, a server's, or any that was made elsewhere.

use std::time::Duration;

use bytes::Bytes;
use futures_util::{
    SinkExt as _, StreamExt as _,
    stream::{SplitSink, SplitStream},
};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::TcpStream,
    time::timeout,
};
use tokio_tungstenite::{
    MaybeTlsStream, WebSocketStream, accept_async_with_config, connect_async_with_config,
    tungstenite::{
        Message,
        client::IntoClientRequest,
        protocol::{CloseFrame, WebSocketConfig, frame::coding::CloseCode},
    },
};

use super::{Broken, Frame, Receiver, Sender, Transport};
use crate::close::Close;

/// Bytes that are read at once. What is idle holds them, so they are few.
const READ_BYTES: usize = 4 * 1024;

/// Bytes that are written at once.
const WRITE_BYTES: usize = 16 * 1024;

/// How long the other side may take to agree that a socket is closed.
const CLOSE_PATIENCE: Duration = Duration::from_secs(2);

/// A WebSocket.
pub struct WebSocket<S>(WebSocketStream<S>);

/// Its end to send with.
pub struct WebSocketSender<S>(SplitSink<WebSocketStream<S>, Message>);

/// Its end to receive with.
pub struct WebSocketReceiver<S> {
    stream: SplitStream<WebSocketStream<S>>,
    /// The other end closed so, and is not answered yet.
    closed: Option<Option<Close>>,
}

/// How sockets are read and written, for frames of at most so many bytes.
#[must_use]
pub fn config(frame_bytes_max: usize) -> WebSocketConfig {
    WebSocketConfig::default()
        .read_buffer_size(READ_BYTES)
        .write_buffer_size(WRITE_BYTES)
        .max_message_size(Some(frame_bytes_max))
        .max_frame_size(Some(frame_bytes_max))
}

/// Connects to a server, at `ws://…` or, where the feature for it is on, `wss://…`.
///
/// # Errors
/// If there is none, or it does not speak WebSocket there.
pub async fn connect(
    request: impl IntoClientRequest + Unpin + Send,
    frame_bytes_max: usize,
) -> Result<WebSocket<MaybeTlsStream<TcpStream>>, Broken> {
    let (stream, _) = connect_async_with_config(request, Some(config(frame_bytes_max)), true).await?;
    Ok(WebSocket(stream))
}

/// Accepts a client on a connection that was just made.
///
/// # Errors
/// If it does not ask for a WebSocket.
pub async fn accept<S>(stream: S, frame_bytes_max: usize) -> Result<WebSocket<S>, Broken>
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    Ok(WebSocket(accept_async_with_config(stream, Some(config(frame_bytes_max))).await?))
}

impl<S> WebSocket<S> {
    /// One that was made elsewhere.
    pub fn new(stream: WebSocketStream<S>) -> Self {
        Self(stream)
    }
}

impl<S> Transport for WebSocket<S>
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    type Sender = WebSocketSender<S>;
    type Receiver = WebSocketReceiver<S>;

    fn split(self) -> (Self::Sender, Self::Receiver) {
        let (sender, receiver) = self.0.split();
        (WebSocketSender(sender), WebSocketReceiver { stream: receiver, closed: None })
    }
}

impl<S> Sender for WebSocketSender<S>
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
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
        let frame = CloseFrame { code: CloseCode::from(close.code), reason: close.reason.into() };
        // Who is gone need not be told.
        let _ = timeout(CLOSE_PATIENCE, self.0.send(Message::Close(Some(frame)))).await;
    }
}

impl<S> Receiver for WebSocketReceiver<S>
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    async fn next(&mut self) -> Option<Result<Frame, Broken>> {
        if self.closed.is_none() {
            match self.stream.next().await? {
                Ok(Message::Close(frame)) => {
                    let close = frame.map(|frame| Close::new(frame.code.into(), frame.reason.to_string()));
                    self.closed = Some(close);
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
fn read(message: Result<Message, tokio_tungstenite::tungstenite::Error>) -> Result<Frame, Broken> {
    use tokio_tungstenite::tungstenite::Error::{Capacity, Utf8};
    match message {
        Ok(Message::Text(text)) => Ok(Frame::Envelope(text.into())),
        Ok(Message::Binary(bytes)) => Ok(Frame::Envelope(bytes)),
        Ok(Message::Ping(_) | Message::Pong(_) | Message::Frame(_) | Message::Close(_)) => Ok(Frame::Alive),
        Err(Capacity(error)) => Ok(Frame::TooLarge(error.to_string())),
        Err(Utf8(error)) => Ok(Frame::NotText(format!("a text frame is not UTF-8: {error}"))),
        Err(error) => Err(error.into()),
    }
}

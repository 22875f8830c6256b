//! A transport that is read for a while after its connection is over. The kernel resets a socket that is closed with unread bytes, and
//! a reset may overtake what was written last: why a frame or a body was refused.

use std::{
    io::{self, IoSlice},
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
};

use rustix::net::RecvFlags;
use tokio::{
    io::{AsyncRead, AsyncReadExt as _, AsyncWrite, ReadBuf},
    net::TcpStream,
    time::timeout,
};
use tokio_rustls::server::TlsStream;
use tokio_util::task::TaskTracker;

use super::connections::Connection;

/// Longest time for which it is read.
const LINGER_TIMEOUT: Duration = Duration::from_secs(2);

/// Most that is read.
const LINGER_BYTES_MAX: u64 = 16 * 1024 * 1024;

/// What a connection is made of.
pub(super) trait OverTcp {
    fn into_tcp(self) -> TcpStream;
}

impl OverTcp for TcpStream {
    fn into_tcp(self) -> TcpStream {
        self
    }
}

impl OverTcp for TlsStream<TcpStream> {
    fn into_tcp(self) -> TcpStream {
        self.into_inner().0
    }
}

/// The transport of a connection, which is counted while it lingers.
pub(super) struct Lingering<S: OverTcp> {
    /// Until it is dropped.
    stream: Option<S>,
    connection: Arc<Connection>,
    tasks: TaskTracker,
}

impl<S: OverTcp> Lingering<S> {
    pub(super) fn new(stream: S, connection: Arc<Connection>, tasks: TaskTracker) -> Self {
        Self { stream: Some(stream), connection, tasks }
    }

    fn stream(self: Pin<&mut Self>) -> io::Result<Pin<&mut S>>
    where
        S: Unpin,
    {
        self.get_mut().stream.as_mut().map(Pin::new).ok_or_else(|| io::ErrorKind::NotConnected.into())
    }
}

impl<S: OverTcp> Drop for Lingering<S> {
    fn drop(&mut self) {
        let Some(stream) = self.stream.take().map(OverTcp::into_tcp) else { return };
        let unread = match rustix::net::recv(&stream, &mut [0; 1], RecvFlags::PEEK | RecvFlags::DONTWAIT) {
            Ok((bytes, _)) => bytes > 0,
            // More may be on its way.
            Err(rustix::io::Errno::AGAIN) => self.connection.is_cut_short(),
            Err(_) => false,
        };
        // Without its runtime the process is about to end.
        if unread && tokio::runtime::Handle::try_current().is_ok() {
            self.tasks.spawn(linger(stream, self.connection.clone()));
        }
    }
}

/// Ends when the client closes, too, or another connection needs its place.
async fn linger(mut stream: TcpStream, connection: Arc<Connection>) {
    if rustix::net::shutdown(&stream, rustix::net::Shutdown::Write).is_err() {
        return;
    }
    let mut rest = (&mut stream).take(LINGER_BYTES_MAX);
    let mut nowhere = tokio::io::sink();
    let read = timeout(LINGER_TIMEOUT, tokio::io::copy(&mut rest, &mut nowhere));
    tokio::select! {
        _ = read => {}
        () = connection.makes_room() => {}
    }
}

impl<S: OverTcp + AsyncRead + Unpin> AsyncRead for Lingering<S> {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, into: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        self.stream()?.poll_read(cx, into)
    }
}

impl<S: OverTcp + AsyncWrite + Unpin> AsyncWrite for Lingering<S> {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        self.stream()?.poll_write(cx, bytes)
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        slices: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        self.stream()?.poll_write_vectored(cx, slices)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.as_ref().is_some_and(AsyncWrite::is_write_vectored)
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.stream()?.poll_flush(cx)
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.stream()?.poll_shutdown(cx)
    }
}

//! Tunnels through the fabric: streams of bytes, and datagrams, to what is behind a service.
//!
//! A [`Tunnel`] is `AsyncRead` and `AsyncWrite`. Each side may have 1 MiB on the way until the other says that it has read some:
//! credits count bytes. Peers that count frames instead are borne with: to them credit is given early and often. A tunnel does not
//! survive a break of the connection.

use std::{
    collections::VecDeque,
    io,
    pin::Pin,
    task::{Context, Poll, Waker},
    time::Duration,
};

use bytes::Bytes;
use futures_util::{FutureExt as _, Stream as _};
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    time::{Instant, Sleep, sleep},
};
use trunkline_proto::v1::{
    AuthorizationContext, TunnelAck, TunnelClose, TunnelData, TunnelOpen, downstream_message::Payload as Down,
    upstream_message::Payload as Up,
};

pub use trunkline_proto::v1::{tunnel_close::Reason, tunnel_open::Protocol};

use crate::{
    connection::{Client, lane::Received},
    error::{Error, Kind, Result},
    http::CHUNK,
    routes::Frame,
    task::millis,
    topic::Topic,
};

/// What may be on the way before the other side says that it has read some. The published figure, in bytes.
const WINDOW: u64 = 1024 * 1024;

/// What is read before the other side is told. The published figure.
const ACK_EVERY: u64 = 256 * 1024;

/// Reads after which it is told all the same: peers that count frames wait for that.
const ACK_READS: u32 = 8;

/// How long nothing may happen on a tunnel, if it is not said. The published figure.
const IDLE: Duration = Duration::from_secs(300);

/// The longest that may be said: longer is for ever.
const IDLE_MAX: Duration = Duration::from_secs(365 * 24 * 3600);

/// Largest datagram. What UDP has room for, rounded up.
const DATAGRAM_MAX: usize = 64 * 1024;

/// What of a tunnel may wait to be read: sixteen whole frames and more, for peers that count those.
const LEFT_MAX: usize = 8 * 1024 * 1024;

/// Frames that are not read yet. A peer that sends small ones may have many of them on the way.
const FRAMES: usize = 1024;

/// Credits at most this large are of a peer that counts frames.
const FRAMES_AT_MOST: u32 = 64;

/// A tunnel that is to be dialed.
///
/// ```no_run
/// # async fn f(agent: trunkline_client::Agent) -> Result<(), Box<dyn std::error::Error>> {
/// use tokio::io::{AsyncReadExt, AsyncWriteExt};
/// use trunkline_client::{Topic, tunnel::Dial};
/// let mut tunnel = agent.dial(Dial::tcp(Topic::service("gateway", "one")?).hint("db.internal:5432")).await?;
/// tunnel.write_all(b"hello").await?;
/// tunnel.shutdown().await?;
/// let mut answer = Vec::new();
/// tunnel.read_to_end(&mut answer).await?;
/// # Ok(()) }
/// ```
#[derive(Clone, Debug)]
#[must_use = "a tunnel is opened when it is given to dial"]
pub struct Dial {
    open: TunnelOpen,
}

impl Dial {
    /// A stream of bytes to a TCP backend.
    pub fn tcp(to: impl Into<Topic>) -> Self {
        Self::of(Protocol::Tcp, to)
    }

    /// Datagrams to a UDP backend: each write is one, each read is one.
    pub fn udp(to: impl Into<Topic>) -> Self {
        Self::of(Protocol::Udp, to)
    }

    /// A stream to a WebSocket backend, in which each message is preceded by its length in four bytes, big-endian.
    pub fn websocket(to: impl Into<Topic>) -> Self {
        Self::of(Protocol::Websocket, to)
    }

    fn of(protocol: Protocol, to: impl Into<Topic>) -> Self {
        let open = TunnelOpen {
            tunnel_id: uuid::Uuid::new_v4().to_string(),
            target_topic: to.into().as_str().to_owned(),
            protocol: protocol.into(),
            idle_timeout_ms: millis(IDLE),
            ..TunnelOpen::default()
        };
        Self { open }
    }

    /// Where the other side should go, if it lets others say so: `host:port`.
    pub fn hint(mut self, hint: impl Into<String>) -> Self {
        self.open.remote_hint = hint.into();
        self
    }

    /// Closes it when nothing went through for so long, as seen by either side when it reads or writes: 5 minutes without this.
    pub fn idle_timeout(mut self, idle: Duration) -> Self {
        self.open.idle_timeout_ms = millis(idle);
        self
    }

    /// Closes it when more bytes were to go through than this, both ways together.
    pub fn bytes_max(mut self, bytes: u64) -> Self {
        self.open.max_bytes = i64::try_from(bytes).unwrap_or(i64::MAX);
        self
    }

    /// Something for the other side, such as `subprotocols`.
    pub fn metadata(mut self, key: impl Into<String>, value: impl Into<String>) -> Self {
        self.open.metadata.insert(key.into(), value.into());
        self
    }

    /// On behalf of somebody else, by a grant.
    pub fn authorized(mut self, authorization: impl Into<AuthorizationContext>) -> Self {
        self.open.authorization = Some(authorization.into());
        self
    }

    /// One of several backends behind the target.
    pub fn backend(mut self, name: impl Into<String>) -> Self {
        self.open.backend_name = name.into();
        self
    }
}

impl Client {
    /// Opens a tunnel. The contract has no word for "it is open": that it was refused is told by the first read or write.
    ///
    /// # Errors
    /// As [`Client::send`].
    pub async fn dial(&self, dial: Dial) -> Result<Tunnel> {
        let core = &self.core;
        let id = dial.open.tunnel_id.clone();
        let frames = Received::of(&core.routes.open(&id, FRAMES, &core.room));
        let tunnel = Tunnel::new(self.clone(), &dial.open, frames, Box::new(Close(self.clone(), id)));
        // Through the same queue as its data, so that it is before them.
        core.put_bulk(Up::TunnelOpen(Box::new(dial.open))).await?;
        Ok(tunnel)
    }
}

struct Close(Client, String);

impl Drop for Close {
    fn drop(&mut self) {
        self.0.core.routes.close(&self.1);
    }
}

/// A tunnel that somebody opens to this client.
pub struct Incoming {
    open: TunnelOpen,
    tunnel: Tunnel,
}

impl Incoming {
    pub(crate) fn new(client: Client, open: TunnelOpen, frames: Received<Frame>, forget: Box<dyn Send + Sync>) -> Self {
        let mut tunnel = Tunnel::new(client, &open, frames, forget);
        // Who accepts begins with 1: its 0 is the frame that opened it.
        tunnel.seq = 1;
        Self { open, tunnel }
    }

    /// What was asked for: the protocol, the hint, the metadata, on whose behalf.
    #[must_use]
    pub fn request(&self) -> &TunnelOpen {
        &self.open
    }

    /// Takes it.
    #[must_use]
    pub fn accept(self) -> Tunnel {
        self.tunnel
    }

    /// Refuses it, for a reason.
    pub async fn refuse(mut self, why: &str) {
        self.tunnel.is_closed = true;
        let close = refusal(self.tunnel.id.clone(), Reason::Error, why);
        if let Err(error) = self.tunnel.client.core.put_bulk(close).await {
            tracing::debug!(%error, "a refusal of a tunnel did not go out");
        }
    }
}

pub(crate) fn refusal(tunnel_id: String, reason: Reason, why: &str) -> Up {
    Up::TunnelClose(Box::new(TunnelClose { tunnel_id, reason: reason.into(), detail: why.to_owned() }))
}

type Sending = Pin<Box<dyn Future<Output = Result<()>> + Send + Sync>>;

/// A tunnel. `shutdown` ends what is written; what is read goes on. Dropping it closes it.
pub struct Tunnel {
    client: Client,
    id: String,
    frames: Received<Frame>,
    is_datagrams: bool,
    /// Of the next frame.
    seq: u32,
    /// What the other side takes before it must say more.
    credit: u64,
    sending: Option<Sending>,
    /// Read from the wire, and not by the owner yet: what the other side had credit for.
    left: VecDeque<Bytes>,
    left_bytes: usize,
    /// Read by the owner, and not told to the other side yet.
    unacked: u64,
    unacked_reads: u32,
    last_seq: u32,
    is_read_over: bool,
    is_write_over: bool,
    is_closed: bool,
    /// Who waits for what comes.
    waiting: Vec<Waker>,
    /// Why nothing goes any more.
    broken: Option<Error>,
    /// How long nothing may happen; and the end of that, counted from when something was last seen to happen.
    idle: Duration,
    idle_until: Pin<Box<Sleep>>,
    /// What may still go through, both ways.
    bytes_left: u64,
    _forget: Box<dyn Send + Sync>,
}

impl Tunnel {
    fn new(client: Client, open: &TunnelOpen, frames: Received<Frame>, forget: Box<dyn Send + Sync>) -> Self {
        let positive = |n: i64| u64::try_from(n).ok().filter(|n| *n > 0);
        let idle = positive(open.idle_timeout_ms).map_or(IDLE, Duration::from_millis).min(IDLE_MAX);
        Self {
            client,
            id: open.tunnel_id.clone(),
            frames,
            is_datagrams: open.protocol() == Protocol::Udp,
            seq: 0,
            credit: WINDOW,
            sending: None,
            left: VecDeque::new(),
            left_bytes: 0,
            unacked: 0,
            unacked_reads: 0,
            last_seq: 0,
            is_read_over: false,
            is_write_over: false,
            is_closed: false,
            waiting: Vec::new(),
            broken: None,
            idle,
            idle_until: Box::pin(sleep(idle)),
            bytes_left: positive(open.max_bytes).unwrap_or(u64::MAX),
            _forget: forget,
        }
    }

    /// Takes in what came. Answers whether there was anything.
    fn take(&mut self, cx: &mut Context<'_>) -> bool {
        let Poll::Ready(frame) = Pin::new(&mut self.frames).poll_next(cx) else { return false };
        // The two halves may be polled by two tasks, and what came may be for the other one.
        self.waiting.drain(..).for_each(Waker::wake);
        match frame {
            Some(Frame::Down(Down::TunnelData(data))) => {
                self.last_seq = data.seq;
                self.is_read_over |= data.fin;
                self.went(data.data.len());
                self.left_bytes += data.data.len();
                while self.is_datagrams && self.left_bytes > LEFT_MAX {
                    // Nobody reads them: the oldest are lost, as everywhere.
                    self.left_bytes -= self.left.pop_front().map_or(self.left_bytes, |oldest| oldest.len());
                }
                if self.left_bytes > LEFT_MAX {
                    self.broken = Some(Error::new(Kind::Exhausted, "the other side sent more than it had credit for"));
                } else if !data.data.is_empty() {
                    self.left.push_back(data.data);
                }
            }
            Some(Frame::Down(Down::TunnelAck(ack))) => {
                let credits = u64::from(ack.credits);
                // A frame's worth each, of a peer that counts those.
                let credits = if ack.credits <= FRAMES_AT_MOST { credits * CHUNK as u64 } else { credits };
                self.credit = self.credit.saturating_add(credits);
            }
            Some(Frame::Down(Down::TunnelClose(close))) => {
                self.is_closed = true;
                self.broken = closed_by(&close);
                self.is_read_over = true;
            }
            Some(Frame::Down(_)) => {}
            Some(Frame::Failed(error)) => self.broken = Some(error),
            None => self.broken = self.broken.take().or_else(|| Some(crate::connection::closed())),
        }
        true
    }

    /// Something went through.
    fn went(&mut self, bytes: usize) {
        self.idle_until.as_mut().reset(Instant::now() + self.idle);
        match self.bytes_left.checked_sub(bytes as u64) {
            Some(left) => self.bytes_left = left,
            None => {
                self.bytes_left = 0;
                let why = "as many bytes went through the tunnel as may";
                self.broken.get_or_insert(Error::from_proxy(Kind::Exhausted, Reason::Quota.as_str_name(), why));
            }
        }
    }

    /// Whether nothing happened for too long.
    fn is_idle(&mut self, cx: &mut Context<'_>) -> bool {
        if self.idle_until.as_mut().poll(cx).is_pending() {
            return false;
        }
        // The halves may wait in two tasks, of which one is woken.
        self.waiting.drain(..).for_each(Waker::wake);
        let why = format!("nothing went through the tunnel for {:?}", self.idle);
        self.broken.get_or_insert(Error::from_proxy(Kind::Timeout, Reason::IdleTimeout.as_str_name(), &why));
        true
    }

    fn wait<T>(&mut self, cx: &Context<'_>) -> Poll<T> {
        if !self.waiting.iter().any(|waker| waker.will_wake(cx.waker())) {
            self.waiting.push(cx.waker().clone());
        }
        Poll::Pending
    }

    fn error(&self) -> Option<io::Error> {
        self.broken.as_ref().map(io_error)
    }

    /// Tells the other side what was read, if it is enough.
    fn acknowledge(&mut self, read: usize) {
        self.unacked += read as u64;
        self.unacked_reads += u32::from(read > 0);
        let is_due = self.unacked >= ACK_EVERY || self.unacked_reads >= ACK_READS;
        if self.is_datagrams || !is_due {
            return;
        }
        // So many that it cannot be taken for a count of frames.
        let credits = u32::try_from(self.unacked).unwrap_or(u32::MAX).max(FRAMES_AT_MOST + 1);
        let ack = TunnelAck { tunnel_id: self.id.clone(), ack_seq: self.last_seq, credits };
        // If there is no room now, more is told later.
        if self.client.core.try_put(Up::TunnelAck(Box::new(ack))) {
            (self.unacked, self.unacked_reads) = (0, 0);
        }
    }

    fn start(&mut self, data: Bytes, fin: bool) {
        self.went(data.len());
        self.credit = self.credit.saturating_sub(data.len() as u64);
        let frame = TunnelData { tunnel_id: self.id.clone(), seq: self.seq, data, fin };
        self.seq = self.seq.wrapping_add(1);
        let client = self.client.clone();
        self.sending = Some(Box::pin(async move { client.core.put_bulk(Up::TunnelData(Box::new(frame))).await }));
    }

    /// Whether the last frame is in the queue.
    fn poll_sent(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        if let Some(sending) = &mut self.sending {
            match sending.poll_unpin(cx) {
                Poll::Pending => return Poll::Pending,
                Poll::Ready(sent) => {
                    self.sending = None;
                    if let Err(error) = sent {
                        // What is missing in the middle is not hidden by what comes behind it.
                        let told = io_error(&error);
                        self.broken = Some(error);
                        return Poll::Ready(Err(told));
                    }
                }
            }
        }
        Poll::Ready(Ok(()))
    }
}

/// `None` for a peaceful end.
fn closed_by(close: &TunnelClose) -> Option<Error> {
    let kind = match close.reason() {
        Reason::Normal => return None,
        Reason::PeerReset => Kind::Interrupted,
        Reason::IdleTimeout => Kind::Timeout,
        Reason::Quota => Kind::Exhausted,
        Reason::Error if close.detail.contains("ACL_DENIED") => Kind::Denied,
        Reason::Error if close.detail.contains("UNAVAILABLE") => Kind::Unavailable,
        Reason::Error => Kind::Refused,
    };
    Some(Error::from_proxy(kind, close.reason().as_str_name(), &close.detail))
}

fn io_error(error: &Error) -> io::Error {
    let kind = match error.kind() {
        Kind::Denied => io::ErrorKind::PermissionDenied,
        Kind::Timeout => io::ErrorKind::TimedOut,
        Kind::Unavailable => io::ErrorKind::ConnectionRefused,
        Kind::Exhausted => io::ErrorKind::QuotaExceeded,
        Kind::Closed => io::ErrorKind::BrokenPipe,
        _ => io::ErrorKind::ConnectionReset,
    };
    io::Error::new(kind, error.clone())
}

impl AsyncRead for Tunnel {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        loop {
            if let Some(mut piece) = self.left.pop_front() {
                let count = piece.len().min(buf.remaining());
                buf.put_slice(&piece.split_to(count));
                let rest = piece.len();
                // What of a datagram does not fit is lost, as everywhere.
                if !self.is_datagrams && !piece.is_empty() {
                    self.left.push_front(piece);
                }
                self.left_bytes -= count + if self.is_datagrams { rest } else { 0 };
                self.acknowledge(count);
                return Poll::Ready(Ok(()));
            }
            if let Some(error) = self.error() {
                return Poll::Ready(Err(error));
            }
            if self.is_read_over {
                return Poll::Ready(Ok(()));
            }
            if !self.take(cx) {
                // What found no room before.
                self.acknowledge(0);
                if self.is_idle(cx) {
                    continue;
                }
                return self.wait(cx);
            }
        }
    }
}

impl AsyncWrite for Tunnel {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        if self.is_write_over {
            return Poll::Ready(Err(io::Error::new(
                io::ErrorKind::BrokenPipe,
                "this side of the tunnel was shut down",
            )));
        }
        std::task::ready!(self.poll_sent(cx))?;
        if self.is_datagrams && buf.len() > DATAGRAM_MAX {
            let why = format!("a datagram of {} bytes, which has room for {DATAGRAM_MAX}", buf.len());
            return Poll::Ready(Err(io::Error::new(io::ErrorKind::InvalidInput, why)));
        }
        // What came may be the end, or credit behind data that nobody has read yet.
        while self.broken.is_none() && !self.is_closed && self.take(cx) {}
        if self.credit == 0 && !self.is_datagrams && self.broken.is_none() && !self.is_closed && !self.is_idle(cx) {
            return self.wait(cx);
        }
        let least = if self.is_datagrams { buf.len() } else { buf.len().min(1) };
        if self.bytes_left < least as u64 {
            self.went(least);
        }
        if let Some(error) = self.error() {
            return Poll::Ready(Err(error));
        }
        if self.is_closed {
            return Poll::Ready(Err(io::Error::new(io::ErrorKind::BrokenPipe, "the tunnel was closed")));
        }
        let limit =
            if self.is_datagrams { buf.len() } else { CHUNK.min(usize::try_from(self.credit).unwrap_or(CHUNK)) };
        let limit = limit.min(usize::try_from(self.bytes_left).unwrap_or(limit)).max(1);
        let piece = &buf[..buf.len().min(limit)];
        let (count, data) = (piece.len(), Bytes::copy_from_slice(piece));
        self.start(data, false);
        // It is this tunnel's now; what became of it is told by the next write.
        if let Poll::Ready(sent) = self.poll_sent(cx) {
            sent?;
        }
        Poll::Ready(Ok(count))
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.poll_sent(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        std::task::ready!(self.poll_sent(cx))?;
        if !self.is_write_over && !self.is_closed {
            self.is_write_over = true;
            self.start(Bytes::new(), true);
        }
        self.poll_sent(cx)
    }
}

impl Drop for Tunnel {
    fn drop(&mut self) {
        if self.is_closed {
            return;
        }
        // Also if it broke on this side: what opens it may still be in the queue.
        let reason = match self.broken.as_ref().map(Error::code) {
            None => Reason::Normal,
            Some(code) => Reason::from_str_name(code).unwrap_or(Reason::Error),
        };
        let (client, id) = (self.client.clone(), std::mem::take(&mut self.id));
        let sending = self.sending.take();
        // Behind what was written.
        self.client.core.spawn(async move {
            if let Some(sending) = sending {
                // It fails if the client has ended, and then nobody hears of the end either.
                let _ = sending.await;
            }
            let core = &client.core;
            let close = TunnelClose { tunnel_id: id, reason: reason.into(), detail: String::new() };
            let _ = core.put_bulk(Up::TunnelClose(Box::new(close))).await;
        });
    }
}

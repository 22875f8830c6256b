//! HTTP connections: which version each speaks, how long it may take to say what it wants, and its end. One task a connection,
//! as small as it can be: most of them wait.

use std::{net::IpAddr, sync::Arc, time::Duration};

use axum::{
    body::Body,
    http::{Request, Response, header},
};
use futures_util::TryFutureExt as _;
use hyper::{
    body::Incoming,
    rt::Executor,
    server::conn::{http1, http2},
    service::service_fn,
};
use hyper_util::rt::{TokioIo, TokioTimer};
use prometheus_client::metrics::{counter::Counter, family::Family, gauge::Gauge};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::{TcpListener, TcpStream},
    sync::mpsc,
    time::{sleep, timeout},
};
use tokio_rustls::server::TlsStream;
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use tower::ServiceExt as _;

use super::{KEEPALIVE, STREAMS_MAX};
use crate::{http::Site, metrics::Answered};

/// How HTTP/2 begins.
const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

/// How long a client may take for the head of a request, the next one included: longer than clients keep connections that they
/// do not use.
const HEAD_TIMEOUT: Duration = Duration::from_secs(120);

/// How long what was sent may stay unacknowledged. Streams send something every 15 seconds.
const SILENCE: Duration = Duration::from_secs(30);

/// Pause when no connection can be accepted, or the first bytes of one are few.
const PAUSE: Duration = Duration::from_millis(50);

/// Who is at the other end of an HTTP connection.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Peer(pub(crate) IpAddr);

/// What is said over a connection that is one too many.
const BUSY: &[u8] =
    b"HTTP/1.1 503 Service Unavailable\r\nretry-after: 1\r\nconnection: close\r\ncontent-length: 0\r\n\r\n";

/// How many connections a listener takes, and what is counted of them.
#[derive(Clone, Default)]
pub(crate) struct Doors {
    /// 0 is no limit.
    pub(crate) most: u32,
    pub(crate) inside: Gauge,
    pub(crate) refused: Counter,
    pub(crate) answers: Family<Answered, Counter>,
}

/// A connection, as long as it is there.
struct Inside(Gauge);

/// The connection of a request: whoever goes on with it when HTTP is over keeps this.
#[derive(Clone)]
pub(crate) struct Seat(#[allow(dead_code, reason = "held")] Arc<Inside>);

impl Doors {
    fn enter(&self) -> Option<Inside> {
        if self.most > 0 && self.inside.get() >= i64::from(self.most) {
            self.refused.inc();
            return None;
        }
        self.inside.inc();
        Some(Inside(self.inside.clone()))
    }
}

impl Drop for Inside {
    fn drop(&mut self) {
        self.0.dec();
    }
}

/// What all connections of a listener share.
#[derive(Clone)]
pub(super) struct Connections {
    pub(super) site: Site,
    pub(super) doors: Doors,
    pub(super) stop: CancellationToken,
    pub(super) tasks: TaskTracker,
}

impl Connections {
    /// Serves what comes without TLS, until the server stops.
    pub(super) async fn plain(self, listener: TcpListener) {
        while let Some(accepted) = self.stop.run_until_cancelled(listener.accept()).await {
            match accepted {
                Ok((stream, peer)) => match self.doors.enter() {
                    Some(inside) => drop(self.tasks.spawn(self.clone().sniffed(stream, Peer(peer.ip()), inside))),
                    // It hears so if it has room for it, which a new one has.
                    None => drop(stream.try_write(BUSY)),
                },
                Err(error) => {
                    tracing::warn!(%error, "cannot accept connections");
                    sleep(PAUSE).await;
                }
            }
        }
    }

    /// Serves connections whose handshake is done, until the server stops.
    pub(super) async fn encrypted(self, mut streams: mpsc::Receiver<std::io::Result<TlsStream<TcpStream>>>) {
        while let Some(Some(accepted)) = self.stop.run_until_cancelled(streams.recv()).await {
            let Ok(stream) = accepted else { continue };
            let Some(inside) = self.doors.enter() else { continue };
            let (tcp, session) = stream.get_ref();
            if let Ok(peer) = tcp.peer_addr()
                && gives_up(tcp).is_ok()
            {
                let is_http2 = session.alpn_protocol() == Some(b"h2");
                let peer = Peer(peer.ip());
                // Tasks of their own kinds, so that each takes only what it needs.
                if is_http2 {
                    self.tasks.spawn(self.clone().http2(stream, peer, inside));
                } else {
                    self.tasks.spawn(self.clone().http1(stream, peer, inside));
                }
            }
        }
    }

    async fn sniffed(self, stream: TcpStream, peer: Peer, inside: Inside) {
        let begins = timeout(HEAD_TIMEOUT, is_http2(&stream));
        let Some(Ok(Ok(is_http2))) = self.stop.run_until_cancelled(begins).await else { return };
        if stream.set_nodelay(true).is_err() || gives_up(&stream).is_err() {
            return;
        }
        // In tasks of their own: this one was as large as both.
        let (tasks, all) = (self.tasks.clone(), self);
        if is_http2 {
            tasks.spawn(all.http2(stream, peer, inside));
        } else {
            tasks.spawn(all.http1(stream, peer, inside));
        }
    }

    async fn http1(self, stream: impl AsyncRead + AsyncWrite + Send + Unpin + 'static, peer: Peer, inside: Inside) {
        let (Self { site, stop, doors, .. }, seat) = (self, Seat(inside.into()));
        let answer = service_fn(move |request| answer(&site, &doors, request, peer, Some(&seat)));
        let mut serve = http1::Builder::new();
        serve.timer(TokioTimer::new()).header_read_timeout(HEAD_TIMEOUT);
        let connection = serve.serve_connection(TokioIo::new(stream), answer).with_upgrades();
        let mut connection = std::pin::pin!(connection);
        tokio::select! {
            biased;
            // Who goes away ends it, as it likes.
            _ = connection.as_mut() => return,
            () = stop.cancelled() => connection.as_mut().graceful_shutdown(),
        }
        let _ = connection.await;
    }

    async fn http2(self, stream: impl AsyncRead + AsyncWrite + Send + Unpin + 'static, peer: Peer, _inside: Inside) {
        let Self { site, stop, tasks, doors } = self;
        let answer = service_fn(move |request| answer(&site, &doors, request, peer, None));
        let mut serve = http2::Builder::new(Tracked(tasks));
        serve.timer(TokioTimer::new()).max_concurrent_streams(STREAMS_MAX);
        serve.keep_alive_interval(KEEPALIVE.0).keep_alive_timeout(KEEPALIVE.1);
        let mut connection = std::pin::pin!(serve.serve_connection(TokioIo::new(stream), answer));
        tokio::select! {
            _ = connection.as_mut() => return,
            () = stop.cancelled() => connection.as_mut().graceful_shutdown(),
        }
        let _ = connection.await;
    }
}

fn answer(
    site: &Site,
    doors: &Doors,
    mut request: Request<Incoming>,
    peer: Peer,
    seat: Option<&Seat>,
) -> impl Future<Output = Result<Response<Body>, std::convert::Infallible>> + Send + use<> {
    request.extensions_mut().insert(peer);
    // Only such a request ends HTTP.
    if let Some(seat) = seat.filter(|_| request.headers().contains_key(header::UPGRADE)) {
        request.extensions_mut().insert(seat.clone());
    }
    let answers = doors.answers.clone();
    let router = site.router(request.headers(), request.uri()).clone();
    router.oneshot(request.map(Body::new)).inspect_ok(move |answer| {
        answers.get_or_create(&Answered { status: answer.status().as_u16() }).inc();
    })
}

/// Whoever does not say that something came is gone: its streams hold places that others wait for.
fn gives_up(stream: &TcpStream) -> rustix::io::Result<()> {
    rustix::net::sockopt::set_tcp_user_timeout(stream, u32::try_from(SILENCE.as_millis()).unwrap_or(u32::MAX))
}

/// Whether a connection begins as HTTP/2 does. Takes nothing from it.
async fn is_http2(stream: &TcpStream) -> std::io::Result<bool> {
    let mut begins = [0; PREFACE.len()];
    loop {
        let seen = stream.peek(&mut begins).await?;
        if seen == 0 || begins[..seen] != PREFACE[..seen] {
            return Ok(false);
        }
        if seen == PREFACE.len() {
            return Ok(true);
        }
        sleep(PAUSE).await;
    }
}

/// Streams of HTTP/2 are tasks that the server waits for.
#[derive(Clone)]
struct Tracked(TaskTracker);

impl<F: Future<Output: Send> + Send + 'static> Executor<F> for Tracked {
    fn execute(&self, stream: F) {
        self.0.spawn(stream);
    }
}

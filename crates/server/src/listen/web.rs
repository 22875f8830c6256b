//! HTTP connections: which version each speaks, how long it may take to say what it wants, and its end. One task a connection,
//! as small as it can be: most of them wait.

use std::{
    io,
    net::{IpAddr, SocketAddr},
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering::Relaxed},
    },
    task::{Context, Poll},
    time::Duration,
};

use axum::{
    body::Body,
    http::{HeaderValue, Method, Request, Response, StatusCode, header},
};
use bytes::Bytes;
use futures_util::TryFutureExt as _;
use hyper::{
    body::{Body as _, Frame, Incoming, SizeHint},
    server::conn::{http1, http2},
    service::service_fn,
};
use hyper_util::rt::{TokioIo, TokioTimer};
use prometheus_client::metrics::{counter::Counter, family::Family};
use rustix::net::RecvFlags;
use tokio::{
    io::{AsyncRead, AsyncWrite, Interest},
    net::TcpStream,
    time::Instant,
};
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use tower::ServiceExt as _;

use super::{
    Held, KEEPALIVE_TIMEOUT, STREAMS_MAX, Tracked,
    connections::{Active, Connection},
    handshake,
    lingering::{Lingering, OverTcp},
    sending::Sending,
    sends_first_byte, set_up, stops, until_closed,
};
use crate::{http::Site, metrics::Answered, tls::Tls};

/// How HTTP/2 begins.
const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

/// How long a client may take for its first byte, and with HTTP/1 for the head of a request from then on, the next one
/// included: longer than clients keep connections that they do not use.
const HEAD_TIMEOUT: Duration = Duration::from_secs(120);

/// Who is at the other end of a connection.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Peer(pub(crate) IpAddr);

/// What is said over a connection that is one too many.
const BUSY: &[u8] =
    b"HTTP/1.1 503 Service Unavailable\r\nretry-after: 1\r\nconnection: close\r\ncontent-length: 0\r\n\r\n";

/// The connection of a request: whoever goes on with it when HTTP is over keeps this.
#[derive(Clone)]
pub(crate) struct Seat(#[allow(dead_code, reason = "held")] Arc<Active>);

/// What all connections of a listener share.
#[derive(Clone)]
pub(super) struct Web {
    pub(super) site: Site,
    pub(super) answers: Family<Answered, Counter>,
    pub(super) tls: Option<Tls>,
    pub(super) keepalive: Duration,
    pub(super) stop: CancellationToken,
    pub(super) tasks: TaskTracker,
}

/// Refuses a connection. It hears so if it speaks without TLS and has room for it, which a new one has.
pub(super) fn refuse(stream: &TcpStream, is_tls: bool) {
    if !is_tls {
        // As far as it goes: the connection is closed behind it.
        let _ = stream.try_write(BUSY);
    }
}

/// A connection that speaks.
struct Open {
    peer: Peer,
    connection: Arc<Connection>,
    /// By when its first request has to come.
    until: Instant,
}

impl Web {
    /// Finds out what a connection speaks, and goes on with it in a task of that kind, which is smaller than one for all.
    pub(super) async fn serve(self, stream: TcpStream, peer: SocketAddr, connection: Arc<Connection>) {
        let until = Instant::now() + HEAD_TIMEOUT;
        let begins = async {
            if !set_up(&stream) || !sends_first_byte(&stream).await {
                return None;
            }
            connection.has_spoken();
            match &self.tls {
                Some(tls) => Some(Err(Box::pin(handshake(tls, stream, &["h2", "http/1.1"], &connection)).await?)),
                None => {
                    let is_http2 = is_http2(&stream).await.ok()?;
                    Some(Ok((stream, is_http2)))
                }
            }
        };
        let begun = tokio::select! {
            begun = begins => begun,
            () = connection.is_to_leave(until) => return,
            () = stops(&self.stop) => return,
        };
        let (peer, tasks) = (Peer(peer.ip()), self.tasks.clone());
        let open = Open { peer, connection, until };
        match begun {
            None => {}
            Some(Ok((stream, true))) => drop(tasks.spawn(self.http2(stream, open))),
            Some(Ok((stream, false))) => drop(tasks.spawn(self.http1(stream, open))),
            Some(Err(stream)) if stream.get_ref().1.alpn_protocol() == Some(b"h2") => {
                tasks.spawn(self.http2(stream, open));
            }
            Some(Err(stream)) => drop(tasks.spawn(self.http1(stream, open))),
        }
    }

    /// What is not a future is done before it, and what is awaited stays where it is: each would be kept twice otherwise.
    fn http1(
        self,
        stream: impl OverTcp + AsyncRead + AsyncWrite + Send + Unpin + 'static,
        open: Open,
    ) -> impl Future<Output = ()> + Send {
        let Self { site, stop, answers, tasks, .. } = self;
        let Open { peer, connection, .. } = open;
        let stream = Lingering::new(stream, connection.clone(), tasks);
        let (of_request, stream) = (connection.clone(), Sending::new(stream, connection.clone()));
        let answer = service_fn(move |request| answer(&site, &answers, request, peer, &of_request, true));
        let mut serve = http1::Builder::new();
        // Of the first head, too.
        serve.timer(TokioTimer::new()).header_read_timeout(HEAD_TIMEOUT);
        let mut served = serve.serve_connection(TokioIo::new(stream), answer).with_upgrades();
        async move {
            let served = Pin::new(&mut served);
            let leaves = connection.makes_room();
            until_closed(served, http1::UpgradeableConnection::graceful_shutdown, &connection, &stop, leaves).await;
        }
    }

    /// As [`Web::http1`].
    fn http2(
        self,
        stream: impl AsyncRead + AsyncWrite + Send + Unpin + 'static,
        open: Open,
    ) -> impl Future<Output = ()> + Send {
        let Self { site, stop, tasks, answers, keepalive, .. } = self;
        let Open { peer, connection, until } = open;
        let (of_request, stream) = (connection.clone(), Sending::new(stream, connection.clone()));
        let answer = service_fn(move |request| answer(&site, &answers, request, peer, &of_request, false));
        let mut serve = http2::Builder::new(Tracked(tasks));
        serve.timer(TokioTimer::new()).max_concurrent_streams(STREAMS_MAX);
        serve.keep_alive_interval(keepalive).keep_alive_timeout(KEEPALIVE_TIMEOUT);
        let mut served = serve.serve_connection(TokioIo::new(stream), answer);
        async move {
            let served = Pin::new(&mut served);
            let leaves = connection.is_to_leave(until);
            until_closed(served, http2::Connection::graceful_shutdown, &connection, &stop, leaves).await;
        }
    }
}

fn answer(
    site: &Site,
    answers: &Family<Answered, Counter>,
    mut request: Request<Incoming>,
    peer: Peer,
    connection: &Arc<Connection>,
    has_upgrades: bool,
) -> impl Future<Output = Result<Response<Held<Body>>, std::convert::Infallible>> + Send + use<> {
    let active = connection.begin();
    request.extensions_mut().insert(peer);
    // Only browsers say things again by themselves.
    if request.method() == Method::POST && request.headers().contains_key(header::ORIGIN) {
        request.extensions_mut().insert(connection.exchange());
    }
    // Only such a request ends HTTP.
    if has_upgrades && request.headers().contains_key(header::UPGRADE) {
        connection.cut_short();
        request.extensions_mut().insert(Seat(Arc::new(connection.begin())));
    }
    let answers = answers.clone();
    let router = site.router(request.headers(), request.uri()).clone();
    let (request, body) = Read::track(request);
    let connection = connection.clone();
    router.oneshot(request).map_ok(move |mut answer| {
        answers.get_or_create(&Answered { status: answer.status().as_u16() }).inc();
        // hyper reads no more of an unread body, and closes the connection without a word.
        if has_upgrades && !body.is_whole() && answer.status() != StatusCode::SWITCHING_PROTOCOLS {
            answer.headers_mut().insert(header::CONNECTION, HeaderValue::from_static("close"));
            connection.cut_short();
        }
        answer.map(|body| Held::new(body, active))
    })
}

/// Whether the body of a request was read to its end.
struct Read(Arc<AtomicBool>);

struct ReadBody {
    body: Incoming,
    is_whole: Arc<AtomicBool>,
}

impl Read {
    fn track(request: Request<Incoming>) -> (Request<Body>, Self) {
        let is_whole = Arc::new(AtomicBool::new(request.body().is_end_stream()));
        let read = Self(is_whole.clone());
        (request.map(|body| Body::new(ReadBody { body, is_whole })), read)
    }

    fn is_whole(&self) -> bool {
        self.0.load(Relaxed)
    }
}

impl hyper::body::Body for ReadBody {
    type Data = Bytes;
    type Error = hyper::Error;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, hyper::Error>>> {
        let polled = Pin::new(&mut self.body).poll_frame(cx);
        if matches!(polled, Poll::Ready(None)) || self.body.is_end_stream() {
            self.is_whole.store(true, Relaxed);
        }
        polled
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

/// Whether a connection begins as HTTP/2 does. Takes nothing from it. Half a beginning costs nothing while the rest does not
/// come.
async fn is_http2(stream: &TcpStream) -> io::Result<bool> {
    let mut begins = [0; PREFACE.len()];
    loop {
        let ready = stream.ready(Interest::READABLE).await?;
        let decided = stream.try_io(Interest::READABLE, || {
            let (seen, _) = rustix::net::recv(stream, &mut begins[..], RecvFlags::PEEK)?;
            match &begins[..seen] {
                begins if begins == PREFACE => Ok(true),
                begins if !begins.is_empty() && PREFACE.starts_with(begins) && !ready.is_read_closed() => {
                    // What is there already is no news: it is ready again when more comes.
                    Err(io::ErrorKind::WouldBlock.into())
                }
                _ => Ok(false),
            }
        });
        match decided {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            decided => return decided,
        }
    }
}

#[cfg(test)]
mod tests {
    use tokio::{io::AsyncWriteExt as _, net::TcpListener, time::timeout};

    use super::*;

    async fn pair() -> (TcpStream, TcpStream) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let (client, accepted) = tokio::join!(TcpStream::connect(address), listener.accept());
        (client.unwrap(), accepted.unwrap().0)
    }

    #[tokio::test]
    async fn what_a_connection_speaks_is_known_by_how_it_begins() {
        for (begins, expected) in [
            (&[PREFACE, b"more"][..], true),
            (&[&PREFACE[..1], &PREFACE[1..17], &PREFACE[17..]], true),
            (&[b"P", b"OST / HTTP/1.1"], false),
            (&[b"GET / HTTP/1.1"], false),
            (&[&PREFACE[..PREFACE.len() - 1], b"x"], false),
        ] {
            let (mut client, server) = pair().await;
            for to in 1..begins.len() {
                client.write_all(begins[to - 1]).await.unwrap();
                let begun = begins[..to].concat();
                if PREFACE.len() > begun.len() && PREFACE.starts_with(&begun) {
                    assert!(
                        timeout(Duration::from_millis(20), is_http2(&server)).await.is_err(),
                        "it is not known yet"
                    );
                }
            }
            let (spoken, sent) = tokio::join!(is_http2(&server), client.write_all(begins[begins.len() - 1]));
            sent.unwrap();
            assert_eq!(spoken.unwrap(), expected, "{begins:?}");
        }
    }

    #[tokio::test]
    async fn a_first_byte_is_waited_for_and_left() {
        let (mut client, server) = pair().await;
        assert!(timeout(Duration::from_millis(20), sends_first_byte(&server)).await.is_err(), "there is none");
        client.write_all(b"G").await.unwrap();
        assert!(sends_first_byte(&server).await);
        assert_eq!(server.try_read(&mut [0; 2]).unwrap(), 1, "it is not consumed");
        let (client, server) = pair().await;
        let (came, ()) = tokio::join!(sends_first_byte(&server), async { drop(client) });
        assert!(!came);
    }

    #[tokio::test]
    async fn a_connection_that_ends_in_its_beginning_waits_for_nothing() {
        let (mut client, server) = pair().await;
        client.write_all(&PREFACE[..5]).await.unwrap();
        let (spoken, ()) = tokio::join!(is_http2(&server), async { drop(client) });
        assert!(!spoken.unwrap());
    }
}

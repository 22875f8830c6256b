//! The listeners: bound, plain or with TLS, served until they are told to stop.

mod accept;
mod arrivals;
mod call;
mod connections;
mod descriptors;
mod grpc;
mod http2;
mod lingering;
mod sending;
mod sockets;
mod web;

use std::{
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
};

use hyper::{
    body::{Body, Frame, SizeHint},
    rt::Executor,
};
use prometheus_client::metrics::{counter::Counter, family::Family};
use rustls::pki_types::CertificateDer;
use tokio::{
    net::{TcpListener, TcpStream},
    time::{Instant, timeout},
};
use tokio_rustls::server::TlsStream;
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use tonic::service::Routes;
use trunkline_core::limits::FRAME_OUT_BYTES_MAX;
use trunkline_proto::v1::aether_gateway_server::AetherGatewayServer;

pub(crate) use arrivals::Arrivals;
pub(crate) use connections::exchange::Exchange;
pub(crate) use connections::{Connections, Limit};
pub(crate) use descriptors::RESERVED as DESCRIPTORS_RESERVED;
pub use descriptors::raise_limit as raise_descriptor_limit;
pub use sockets::{InheritError, ListenSockets};
pub(crate) use web::{Peer, Seat};

use crate::{
    agent::{Gateway, Service, Surface},
    http::Site,
    metrics::Answered,
    operator::{Admitting, Desk},
    supervise::Supervisor,
    tls::Tls,
};
use accept::Accepting;
use connections::{Active, Connection, Listener};
use grpc::Grpc;
use web::Web;

/// Largest request of operators, in bytes: names, and the origins of an app.
const REQUEST_BYTES_MAX: usize = 256 * 1024;

/// Largest health check, in bytes: the name of a service. Anybody may send one.
const HEALTH_REQUEST_BYTES_MAX: usize = 512;

/// Streams of one HTTP/2 connection. The published contract's figure.
const STREAMS_MAX: u32 = 1000;

/// Longest a client may take for its handshake, from its first byte on.
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(10);

/// How long a silent client may take to answer a ping. The published contract's figure.
const KEEPALIVE_TIMEOUT: Duration = Duration::from_secs(10);

/// How long a connection that makes room, or never had a request, may take to hear that it is over; and one that is new when the
/// server stops, to begin.
const GOODBYE_TIMEOUT: Duration = Duration::from_millis(250);

/// How long one that had requests may take when the server stops: what the system has for it may be under way on a slow line.
const FAREWELL_TIMEOUT: Duration = Duration::from_secs(2);

/// How long what was sent may stay unacknowledged. Streams send something every 15 seconds.
const SILENCE: Duration = Duration::from_secs(30);

/// What listeners share.
#[derive(Clone)]
pub(crate) struct Listeners {
    pub(crate) tls: Option<Tls>,
    pub(crate) connections: Connections,
    /// After how long a silent client is pinged.
    pub(crate) keepalive: Duration,
    /// Runs the accept loops: one that ends is a fault of the server.
    pub(crate) jobs: Supervisor,
}

/// The certificate that a client showed.
#[derive(Clone)]
pub(crate) struct Certificate(pub(crate) Arc<CertificateDer<'static>>);

impl Listeners {
    pub(crate) fn grpc(&self, socket: TcpListener, gateway: Gateway) {
        let patience = Duration::from_secs(gateway.limits.handshake_seconds);
        let (frame_bytes_max, gateway) = (gateway.limits.frame_bytes_max, Arc::new(gateway));
        let operator = Admitting::new(Desk(gateway.clone()), REQUEST_BYTES_MAX);
        let service = AetherGatewayServer::new(Surface(gateway))
            .max_decoding_message_size(frame_bytes_max)
            .max_encoding_message_size(FRAME_OUT_BYTES_MAX);
        let (health, health_service) = tonic_health::server::health_reporter();
        let health_service = health_service.max_decoding_message_size(HEALTH_REQUEST_BYTES_MAX);
        let routes = Routes::new(health_service).add_service(operator).add_service(Service(service));
        let (stop, tasks) = (self.jobs.stop().clone(), self.jobs.tasks().clone());
        let grpc = Grpc::new(routes, self.tls.clone(), patience, self.keepalive, stop, tasks);
        let accepting = self.accepting(socket, Listener::Grpc);
        self.jobs.spawn("gRPC listener", async move {
            health.set_serving::<AetherGatewayServer<Surface>>().await;
            accepting.run(|stream, peer, connection| grpc.clone().serve(stream, peer, connection), drop).await;
            health.set_not_serving::<AetherGatewayServer<Surface>>().await;
        });
    }

    pub(crate) fn http(&self, socket: TcpListener, site: Site, answers: Family<Answered, Counter>) {
        self.web("HTTP listener", self.accepting(socket, Listener::Http), site, answers);
    }

    pub(crate) fn ops(&self, socket: TcpListener, site: Site) {
        self.web("operators' listener", self.accepting(socket, Listener::Ops), site, Family::default());
    }

    fn web(&self, name: &'static str, accepting: Accepting, site: Site, answers: Family<Answered, Counter>) {
        let (tls, stop, tasks) = (self.tls.clone(), self.jobs.stop().clone(), self.jobs.tasks().clone());
        let is_tls = tls.is_some();
        let web = Web { site, answers, tls, keepalive: self.keepalive, stop, tasks };
        self.jobs.spawn(name, async move {
            let serve = |stream, peer, connection| web.clone().serve(stream, peer, connection);
            accepting.run(serve, |stream| web::refuse(&stream, is_tls)).await;
        });
    }

    fn accepting(&self, socket: TcpListener, listener: Listener) -> Accepting {
        let (stop, tasks) = (self.jobs.stop().clone(), self.jobs.tasks().clone());
        let connections = self.connections.clone();
        Accepting { socket, listener, connections, stop, tasks }
    }
}

/// Sets up the socket of a connection; not if it is gone already.
fn set_up(stream: &TcpStream) -> bool {
    // Whoever does not say that something came is gone: its streams hold places that others wait for.
    let silence_ms = u32::try_from(SILENCE.as_millis()).unwrap_or(u32::MAX);
    stream.set_nodelay(true).is_ok() && rustix::net::sockopt::set_tcp_user_timeout(stream, silence_ms).is_ok()
}

/// Waits for the first byte of a client without consuming it; false if the connection ends before. `readable` is not enough:
/// tokio marks an accepted socket as readable before there is any event.
async fn sends_first_byte(stream: &TcpStream) -> bool {
    stream.peek(&mut [0]).await.is_ok_and(|bytes| bytes > 0)
}

/// The connection behind a TLS handshake that is done in time; nothing otherwise.
async fn handshake(
    tls: &Tls,
    stream: TcpStream,
    protocols: &[&str],
    connection: &Connection,
) -> Option<TlsStream<TcpStream>> {
    tokio::select! {
        done = tls.handshake(stream, protocols) => done,
        () = connection.is_to_leave(Instant::now() + HANDSHAKE_TIMEOUT) => None,
    }
}

/// Resolves when the server stops, and what a client that has just connected sent has had time to come: it is answered, or
/// refused such that it tries again.
async fn stops(stop: &CancellationToken) {
    stop.cancelled().await;
    tokio::time::sleep(GOODBYE_TIMEOUT).await;
}

/// An error of serving a connection.
trait IsTimeout {
    /// Whether the client missed a deadline.
    fn is_timeout(&self) -> bool;
}

impl IsTimeout for hyper::Error {
    fn is_timeout(&self) -> bool {
        Self::is_timeout(self)
    }
}

/// Serves a connection until its client closes it, the server stops, or it `leaves`. `close` lets what is under way end, and
/// takes nothing more.
async fn until_closed<E: IsTimeout, S: Future<Output = Result<(), E>>>(
    mut served: Pin<&mut S>,
    close: impl FnOnce(Pin<&mut S>),
    connection: &Connection,
    stop: &CancellationToken,
    leaves: impl Future<Output = ()>,
) {
    let goodbye = tokio::select! {
        biased;
        // A client that goes away ends it, however it likes.
        ended = served.as_mut() => {
            if ended.is_err_and(|error| error.is_timeout()) {
                connection.closing_turn().await;
            }
            return;
        }
        () = stop.cancelled() => if connection.was_active() { FAREWELL_TIMEOUT } else { GOODBYE_TIMEOUT },
        () = leaves => GOODBYE_TIMEOUT,
    };
    // Its first request may be under way, behind a TLS handshake.
    if stop.is_cancelled() && !connection.was_active() && timeout(goodbye, served.as_mut()).await.is_ok() {
        return;
    }
    close(served.as_mut());
    loop {
        let before = connection.writes();
        // With HTTP/2, the rest of an answer may wait for its client where nobody counts it: only that it goes on shows it.
        let is_over = timeout(goodbye, served.as_mut()).await.is_ok();
        if is_over || !connection.is_busy() && connection.writes() == before {
            return;
        }
    }
}

/// A body that keeps its request counted until the transport has it, or it is dropped. One whose size is known waits for nothing
/// but its client.
struct Held<B> {
    body: B,
    _active: Active,
}

impl<B: Body> Held<B> {
    fn new(body: B, active: Active) -> Self {
        let active = if body.size_hint().exact().is_some() { active.finite() } else { active };
        Self { body, _active: active }
    }
}

impl<B: Body + Unpin> Body for Held<B> {
    type Data = B::Data;
    type Error = B::Error;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<B::Data>, B::Error>>> {
        Pin::new(&mut self.body).poll_frame(cx)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
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

#[cfg(test)]
mod tests {
    use std::pin::pin;

    use axum::{body, http::Request};
    use hyper::{
        server::conn::{http1, http2},
        service::service_fn,
    };
    use hyper_util::rt::TokioIo;
    use tokio::{
        io::{AsyncReadExt as _, AsyncWriteExt as _, DuplexStream, duplex},
        task::JoinHandle,
    };

    use super::{sending::Sending, *};

    const ANSWER_BYTES: usize = 100 * 1024;

    async fn connection() -> Arc<Connection> {
        let all = Connections::new(Limit::default(), Limit::default(), Limit::default());
        Arc::new(all.admit(Listener::Http, [127, 0, 0, 1].into()).await.unwrap())
    }

    /// Answers a request with a body of [`ANSWER_BYTES`].
    fn answering(
        connection: &Arc<Connection>,
    ) -> impl hyper::service::Service<
        Request<hyper::body::Incoming>,
        Response = axum::http::Response<Held<body::Body>>,
        Error = std::convert::Infallible,
        Future: Send,
    > + use<> {
        let connection = connection.clone();
        service_fn(move |_: Request<hyper::body::Incoming>| {
            let answer = Held::new(body::Body::from(vec![7; ANSWER_BYTES]), connection.begin());
            async { Ok::<_, std::convert::Infallible>(axum::http::Response::new(answer)) }
        })
    }

    /// A client at the other end of a connection that is served over HTTP/2 until the server stops.
    fn serve_http2(connection: &Arc<Connection>, stop: &CancellationToken) -> (DuplexStream, JoinHandle<()>) {
        let (client, line) = duplex(1024 * 1024);
        let (stop, open) = (stop.clone(), connection.clone());
        let served = http2::Builder::new(Tracked(TaskTracker::new()))
            .serve_connection(TokioIo::new(Sending::new(line, connection.clone())), answering(connection));
        let until = Instant::now() + Duration::from_secs(120);
        let serving = TaskTracker::new().spawn(async move {
            until_closed(pin!(served), http2::Connection::graceful_shutdown, &open, &stop, open.is_to_leave(until))
                .await;
        });
        (client, serving)
    }

    /// A frame of HTTP/2.
    fn frame(kind: u8, flags: u8, stream: u8, payload: &[u8]) -> Vec<u8> {
        let length = u8::try_from(payload.len()).unwrap();
        [&[0, 0, length, kind, flags, 0, 0, 0, stream], payload].concat()
    }

    /// How a client begins that gives every stream a window of so many bytes, and asks for something.
    fn asks(window: u32) -> Vec<u8> {
        let settings = [&[0, 4], window.to_be_bytes().as_slice()].concat();
        // Entries of the table of HPACK: GET, http, /; and a host.
        let request = [0x82, 0x86, 0x84, 0x41, 1, b'x'];
        [b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n".to_vec(), frame(4, 0, 0, &settings), frame(1, 5, 1, &request)].concat()
    }

    /// Reads frames up to one of this kind, and tells its length.
    async fn read_to(client: &mut DuplexStream, kind: u8) -> Option<usize> {
        loop {
            let mut head = [0; 9];
            client.read_exact(&mut head).await.ok()?;
            let length = u32::from_be_bytes([0, head[0], head[1], head[2]]) as usize;
            client.read_exact(&mut vec![0; length]).await.ok()?;
            if head[3] == kind {
                return Some(length);
            }
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_client_that_gives_its_answer_no_room_keeps_no_connection() {
        let (connection, stop) = (connection().await, CancellationToken::new());
        let (mut client, serving) = serve_http2(&connection, &stop);
        client.write_all(&asks(0)).await.unwrap();
        read_to(&mut client, 1).await.unwrap();
        assert!(connection.is_busy());
        for _ in 0..31 {
            tokio::time::sleep(Duration::from_secs(1)).await;
            client.write_all(&frame(6, 0, 0, &[0; 8])).await.unwrap();
            read_to(&mut client, 6).await.unwrap();
        }
        assert!(!connection.is_busy());
        stop.cancel();
        serving.await.unwrap();
    }

    #[tokio::test(start_paused = true)]
    async fn the_rest_of_an_answer_beyond_its_clients_window_is_sent_when_the_server_stops() {
        const PIECE: u32 = 10 * 1024;
        let (connection, stop) = (connection().await, CancellationToken::new());
        let (mut client, serving) = serve_http2(&connection, &stop);
        client.write_all(&asks(PIECE)).await.unwrap();
        let mut taken = read_to(&mut client, 0).await.unwrap();
        assert!(!connection.is_busy(), "the transport has it all, and waits for its client");
        stop.cancel();
        while taken < ANSWER_BYTES {
            tokio::time::sleep(Duration::from_secs(1)).await;
            client.write_all(&frame(8, 0, 1, &PIECE.to_be_bytes())).await.unwrap();
            client.write_all(&frame(8, 0, 0, &PIECE.to_be_bytes())).await.unwrap();
            taken += read_to(&mut client, 0).await.expect("more of the answer");
        }
        serving.await.unwrap();
    }

    #[tokio::test(start_paused = true)]
    async fn connections_that_send_no_head_in_time_end_one_after_the_other() {
        const COUNT: usize = 100;
        let time = Duration::from_secs(1);
        let all = Connections::new(Limit::default(), Limit::default(), Limit::default());
        let (mut serving, mut clients) = (tokio::task::JoinSet::new(), Vec::new());
        for _ in 0..COUNT {
            let connection = Arc::new(all.admit(Listener::Http, [127, 0, 0, 1].into()).await.unwrap());
            let (client, line) = duplex(1024);
            clients.push(client);
            let mut serve = http1::Builder::new();
            serve.timer(hyper_util::rt::TokioTimer::new()).header_read_timeout(time);
            let served = serve.serve_connection(TokioIo::new(line), answering(&connection));
            serving.spawn(async move {
                let (close, never) = (http1::Connection::graceful_shutdown, CancellationToken::new());
                until_closed(pin!(served), close, &connection, &never, connection.makes_room()).await;
                Instant::now()
            });
        }
        let mut ends = serving.join_all().await;
        ends.sort();
        let together = ends.chunk_by(|one, other| one == other).map(<[_]>::len).max().unwrap();
        assert!(together < COUNT / 5, "{together} at once");
    }

    #[tokio::test(start_paused = true)]
    async fn an_answer_on_a_slow_line_is_sent_whole_when_the_server_stops() {
        let connection = connection().await;
        let (mut client, line) = duplex(1024);
        let (stop, open) = (CancellationToken::new(), connection.clone());
        let sending = TokioIo::new(Sending::new(line, connection.clone()));
        let served = http1::Builder::new().serve_connection(sending, answering(&connection));
        let until = Instant::now() + Duration::from_secs(120);
        let stopped = stop.clone();
        let serving = TaskTracker::new().spawn(async move {
            until_closed(pin!(served), http1::Connection::graceful_shutdown, &open, &stopped, open.is_to_leave(until))
                .await;
        });
        client.write_all(b"GET / HTTP/1.1\r\nhost: x\r\n\r\n").await.unwrap();
        let mut read = vec![0; 1024];
        let mut taken = client.read(&mut read).await.unwrap();
        assert!(connection.active() == 0 && connection.is_busy(), "it is answered and not sent");
        stop.cancel();
        loop {
            tokio::time::sleep(Duration::from_secs(1)).await;
            match client.read(&mut read).await.unwrap() {
                0 => break,
                more => taken += more,
            }
        }
        assert!(taken > ANSWER_BYTES, "{taken}");
        serving.await.unwrap();
    }
}

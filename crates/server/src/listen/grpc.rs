//! gRPC connections: HTTP/2 with what the services need of it. One task a connection, one a stream.

use std::{
    convert::Infallible,
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering::Relaxed},
    },
    time::Duration,
};

use axum::http::{Request, Response};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::TcpStream,
    time::Instant,
};
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use tonic::{Status, body::Body, service::Routes};
use tower::ServiceExt as _;

use super::{
    Certificate, Held, Peer, STREAMS_MAX,
    call::{Timely, UntilStop},
    connections::Connection,
    handshake,
    http2::{Incoming, Serving, Settings, StreamHandle},
    sending::Sending,
    sends_first_byte, set_up, stops, until_closed,
};
use crate::{agent::counting, tls::Tls};

/// The one call whose request goes on for as long as its answer. It has a time of its own for the first frame.
const CONNECT: &str = "/aether.v1.AetherGateway/Connect";

/// Calls whose answers are streams without an end of their own. Other answers are complete, and wait for their client only.
const ENDLESS: [&str; 3] = [CONNECT, "/trunkline.v1.Operator/Tail", "/trunkline.v1.Operator/Watch"];

/// The calls that take no credential.
const HEALTH: &str = "/grpc.health.v1.Health/";

/// The one of them without an end.
const WATCH_HEALTH: &str = "/grpc.health.v1.Health/Watch";

/// Streams that a client may open beyond [`STREAMS_MAX`], each to be refused at once. A client keeps to itself what it may not
/// open, and neither it nor anybody else would hear why it waits.
const STREAMS_SPARE: u32 = 100;

/// Bytes that clients may send before they are read, of all connections together. Every connection has [`WINDOW_MIN`] beside
/// it.
const WINDOWS_TOTAL: usize = 1024 * 1024 * 1024;

/// The share of what is left that one connection gets, at most [`WINDOW_MAX`] and at least [`WINDOW_MIN`].
const WINDOW_SHARE: usize = 64;

/// Wide enough for a fast client: its window is what it may send in a round trip.
const WINDOW_MAX: usize = 16 * 1024 * 1024;

/// What any connection gets, however many there are.
const WINDOW_MIN: usize = 1024 * 1024;

/// The share of a connection's window that one stream gets, for two reasons: streams that are not read leave room for the
/// others, and the small frames of one stream do not exhaust the transport's allowance for small frames, which is half of the
/// connection's window and charges a frame of n bytes with 256 - n. One stream fills a sixteenth with frames of 29 bytes
/// without exhausting it.
const STREAM_SHARE: usize = 16;

/// What every client may send on a stream before it knows anything of this server, by RFC 9113.
const STREAM_WINDOW_MIN: usize = 65_535;

/// What is left of [`WINDOWS_TOTAL`].
struct Windows(AtomicUsize);

/// The window of one connection.
struct Window<'a> {
    all: &'a Windows,
    taken: usize,
    bytes: usize,
}

impl Windows {
    fn grant(&self) -> Window<'_> {
        let mut taken = 0;
        let take = |left: usize| {
            taken = (left / WINDOW_SHARE).min(WINDOW_MAX);
            Some(left - taken)
        };
        // The update never refuses.
        let _ = self.0.fetch_update(Relaxed, Relaxed, take);
        Window { all: self, taken, bytes: taken.max(WINDOW_MIN) }
    }
}

impl Window<'_> {
    fn connection(&self) -> u32 {
        u32::try_from(self.bytes).unwrap_or(u32::MAX)
    }

    fn stream(&self) -> u32 {
        u32::try_from((self.bytes / STREAM_SHARE).max(STREAM_WINDOW_MIN)).unwrap_or(u32::MAX)
    }
}

impl Drop for Window<'_> {
    fn drop(&mut self) {
        self.all.0.fetch_add(self.taken, Relaxed);
    }
}

/// A connection that speaks HTTP/2.
struct Open {
    peer: Peer,
    certificate: Option<Certificate>,
    connection: Arc<Connection>,
    /// By when its first request has to come.
    until: Instant,
}

/// What gRPC connections share.
pub(super) struct Grpc {
    routes: Routes,
    tls: Option<Tls>,
    windows: Windows,
    /// How long a client may take for its first request, its TLS handshake included, and for the whole of any request but
    /// [`CONNECT`].
    patience: Duration,
    /// After how long a silent client is pinged.
    keepalive: Duration,
    stop: CancellationToken,
    tasks: TaskTracker,
}

impl Grpc {
    pub(super) fn new(
        routes: Routes,
        tls: Option<Tls>,
        patience: Duration,
        keepalive: Duration,
        stop: CancellationToken,
        tasks: TaskTracker,
    ) -> Arc<Self> {
        let windows = Windows(AtomicUsize::new(WINDOWS_TOTAL));
        Arc::new(Self { routes: routes.prepare(), tls, windows, patience, keepalive, stop, tasks })
    }

    /// Serves one connection to its end.
    pub(super) async fn serve(self: Arc<Self>, stream: TcpStream, peer: SocketAddr, connection: Arc<Connection>) {
        let until = Instant::now() + self.patience;
        let begins = async {
            // Nothing is made for a client that sends nothing.
            if !set_up(&stream) || !sends_first_byte(&stream).await {
                return None;
            }
            connection.has_spoken();
            Some(match &self.tls {
                Some(tls) => Err(Box::pin(handshake(tls, stream, &["h2"], &connection)).await?),
                None => Ok(stream),
            })
        };
        let begun = tokio::select! {
            begun = begins => begun,
            () = connection.is_to_leave(until) => return,
            () = stops(&self.stop) => return,
        };
        let open = |certificate| Open { peer: Peer(peer.ip()), certificate, connection, until };
        match begun {
            None => {}
            Some(Ok(stream)) => Box::pin(self.http2(stream, open(None))).await,
            Some(Err(stream)) => {
                let chain = stream.get_ref().1.peer_certificates();
                let certificate = chain.and_then(|chain| chain.first()).map(|first| first.clone().into_owned());
                let certificate = certificate.map(|one| Certificate(Arc::new(one)));
                Box::pin(self.http2(stream, open(certificate))).await;
            }
        }
    }

    async fn http2(&self, stream: impl AsyncRead + AsyncWrite + Unpin, open: Open) {
        let Open { peer, certificate, connection, until } = open;
        let (window, of_request) = (self.windows.grant(), connection.clone());
        let stream = Sending::new(stream, connection.clone());
        let answer = move |mut request: Request<Incoming>, stream: StreamHandle<'_>| {
            request.extensions_mut().insert(peer);
            if let Some(certificate) = &certificate {
                request.extensions_mut().insert(certificate.clone());
            }
            if request.uri().path() == CONNECT {
                request.extensions_mut().insert(Arc::new(stream.arrivals()));
            }
            self.answer(request, &of_request)
        };
        let settings = Settings {
            streams_max: STREAMS_MAX + STREAMS_SPARE,
            connection_window: window.connection(),
            stream_window: window.stream(),
            keepalive: self.keepalive,
        };
        let served = Serving::new(stream, &settings, self.tasks.clone(), self.stop.clone(), answer);
        let leaves = connection.is_to_leave(until);
        until_closed(std::pin::pin!(served), Serving::close, &connection, &self.stop, leaves).await;
    }

    fn answer(
        &self,
        request: Request<Incoming>,
        connection: &Arc<Connection>,
    ) -> impl Future<Output = Result<Response<Body>, Infallible>> + Send + use<> {
        let active = connection.begin();
        // As of this stream: by the time that its task runs, more may have come.
        let is_beyond = connection.active() > STREAMS_MAX;
        // Whoever asks for health keeps no connection: anybody may, and need not take the answer.
        let active = Some(active).filter(|_| !request.uri().path().starts_with(HEALTH));
        let (routes, patience, stop) = (self.routes.clone(), self.patience, self.stop.clone());
        async move {
            let is_watch = request.uri().path() == WATCH_HEALTH;
            let is_endless = ENDLESS.contains(&request.uri().path());
            let answer = if is_beyond {
                let message =
                    format!("limit of {STREAMS_MAX} streams on one connection reached; open another connection");
                Status::resource_exhausted(message).into_http()
            } else if request.uri().path() == CONNECT {
                counting(routes.oneshot(request).await?)
            } else {
                routes.oneshot(request.map(|body| Timely::new(body, patience))).await?
            };
            Ok(match active {
                _ if is_watch => answer.map(|body| Body::new(UntilStop::new(body, stop))),
                Some(active) if is_endless => answer.map(|body| Body::new(Held::new(body, active))),
                Some(active) => answer.map(|body| Body::new(Held::new(body, active.finite()))),
                None => answer,
            })
        }
    }
}

#[cfg(test)]
mod tests {
    use super::{AtomicUsize, Relaxed, STREAM_SHARE, WINDOW_MAX, WINDOW_MIN, WINDOWS_TOTAL, Windows};

    #[test]
    fn windows_are_wide_for_few_and_bounded_for_all() {
        let windows = Windows(AtomicUsize::new(WINDOWS_TOTAL));
        let all: Vec<_> = (0..50_000).map(|_| windows.grant()).collect();
        assert_eq!(all[0].bytes, WINDOW_MAX);
        assert_eq!((all[49_999].bytes, all[49_999].stream()), (WINDOW_MIN, 65_536));
        let total: usize = all.iter().map(|window| window.bytes).sum();
        assert!(total <= WINDOWS_TOTAL + all.len() * WINDOW_MIN);
        drop(all);
        assert_eq!(windows.0.load(Relaxed), WINDOWS_TOTAL);
    }

    #[test]
    fn one_stream_of_small_frames_fits_the_allowance_of_the_transport() {
        let (frame, charge) = (29, 256 - 29);
        for window in [WINDOW_MIN, WINDOW_MAX] {
            assert!(window / STREAM_SHARE / frame * charge <= window / 2);
        }
    }
}

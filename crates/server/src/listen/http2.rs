//! HTTP/2 for the gRPC listener, on the h2 library itself: deliveries are confirmed by PINGs, for which the number of an answer's
//! stream and PINGs of our own are needed. A server on top of h2 gives access to neither.

use std::{
    convert::Infallible,
    future::poll_fn,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, ready},
    time::Duration,
};

use bytes::Bytes;
use h2::{
    Ping, PingPong, Reason, RecvStream, SendStream,
    server::{Builder, Connection, Handshake, SendResponse},
};
use hyper::{
    Request, Response,
    body::{Body, Frame},
};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    time::{Instant, Sleep, sleep_until},
};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use super::{
    IsTimeout, KEEPALIVE_TIMEOUT, SILENCE,
    arrivals::{Arrivals, WatchedConnection, Watching},
};

/// How a client begins, by RFC 9113, section 3.4.
const PREFACE_BYTES: usize = 24;

/// Largest head of a request.
const HEAD_BYTES_MAX: u32 = 16 * 1024;

/// Interval of the PINGs that confirm deliveries, and how many may be sent without it after a pause. A PING costs each side some
/// microseconds.
const PING_INTERVAL: Duration = Duration::from_millis(20);
const PING_BURST: u32 = 32;

/// Longest time for the answer to a PING while other frames come.
const PONG_TIMEOUT: Duration = Duration::from_secs(120);

/// What a connection may take.
pub(super) struct Settings {
    pub(super) streams_max: u32,
    pub(super) connection_window: u32,
    pub(super) stream_window: u32,
    /// After how long a silent client is pinged.
    pub(super) keepalive: Duration,
}

/// Why serving a connection failed.
pub(super) enum ServeError {
    /// The client did not answer a PING in time.
    PingTimeout,
    /// The transport or the protocol failed.
    Broken,
}

impl IsTimeout for ServeError {
    fn is_timeout(&self) -> bool {
        matches!(self, Self::PingTimeout)
    }
}

impl From<h2::Error> for ServeError {
    fn from(_: h2::Error) -> Self {
        Self::Broken
    }
}

/// A stream that begins.
pub(super) struct StreamHandle<'a> {
    line: &'a Arc<WatchedConnection>,
    stream: u32,
}

impl StreamHandle<'_> {
    /// Tracks how much of its answer has arrived. To be called before the answer.
    pub(super) fn arrivals(&self) -> Arrivals {
        self.line.arrivals(self.stream)
    }
}

/// Serves a connection; resolves when it is closed. Each stream is a task of `tasks`, and is cancelled with its connection.
pub(super) struct Serving<S, A> {
    state: State<S>,
    line: Arc<WatchedConnection>,
    answer: A,
    tasks: TaskTracker,
    stop: CancellationToken,
    keepalive: Duration,
    is_closing: bool,
}

#[allow(clippy::large_enum_variant, reason = "one of each connection, and it begins for a moment only")]
enum State<S> {
    Begins(Handshake<Watching<S>, Bytes>),
    Open(Connection<Watching<S>, Bytes>, Pings),
}

impl<S, A, F, B> Serving<S, A>
where
    S: AsyncRead + AsyncWrite + Unpin,
    A: Fn(Request<Incoming>, StreamHandle<'_>) -> F,
    F: Future<Output = Result<Response<B>, Infallible>> + Send + 'static,
    B: Body<Data = Bytes, Error: Send> + Send + Unpin + 'static,
{
    /// `answer` is called in the order in which streams begin. Those that begin after `stop` are refused such that clients try
    /// again by themselves, elsewhere (RFC 9113, section 8.7).
    pub(super) fn new(stream: S, settings: &Settings, tasks: TaskTracker, stop: CancellationToken, answer: A) -> Self {
        let line = WatchedConnection::new(PREFACE_BYTES);
        let begins = Builder::new()
            .max_concurrent_streams(settings.streams_max)
            .initial_connection_window_size(settings.connection_window)
            .initial_window_size(settings.stream_window)
            .max_header_list_size(HEAD_BYTES_MAX)
            .handshake(Watching::new(stream, line.clone()));
        Self {
            state: State::Begins(begins),
            line,
            answer,
            tasks,
            stop,
            keepalive: settings.keepalive,
            is_closing: false,
        }
    }

    /// Tells the client to open no more streams; resolves when those that it opened have ended.
    pub(super) fn close(mut self: Pin<&mut Self>)
    where
        Self: Unpin,
    {
        match &mut self.state {
            State::Begins(_) => self.is_closing = true,
            State::Open(connection, _) => connection.graceful_shutdown(),
        }
    }

    fn begin(&self, request: Request<RecvStream>, mut respond: SendResponse<Bytes>) {
        if self.stop.is_cancelled() {
            return respond.send_reset(Reason::REFUSED_STREAM);
        }
        let handle = StreamHandle { line: &self.line, stream: respond.stream_id().as_u32() };
        // On the heap, so that a stream holds no room for it once it has its answer.
        let answer = Box::pin((self.answer)(request.map(Incoming), handle));
        self.tasks.spawn(respond_with(answer, respond));
    }
}

impl<S, A, F, B> Future for Serving<S, A>
where
    Self: Unpin,
    S: AsyncRead + AsyncWrite + Unpin,
    A: Fn(Request<Incoming>, StreamHandle<'_>) -> F,
    F: Future<Output = Result<Response<B>, Infallible>> + Send + 'static,
    B: Body<Data = Bytes, Error: Send> + Send + Unpin + 'static,
{
    type Output = Result<(), ServeError>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        loop {
            match &mut self.state {
                State::Begins(begins) => {
                    let mut connection = ready!(Pin::new(begins).poll(cx))?;
                    if self.is_closing {
                        connection.graceful_shutdown();
                    }
                    let pings = connection.ping_pong().ok_or(ServeError::Broken)?;
                    let pings = Pings::new(pings, self.line.clone(), self.keepalive);
                    self.state = State::Open(connection, pings);
                }
                State::Open(connection, pings) => match connection.poll_accept(cx) {
                    Poll::Ready(Some(Ok((request, respond)))) => self.begin(request, respond),
                    Poll::Ready(Some(Err(error))) => return Poll::Ready(Err(error.into())),
                    Poll::Ready(None) => return Poll::Ready(Ok(())),
                    Poll::Pending => match pings.poll(cx) {
                        Poll::Ready(Ok(())) => {}
                        Poll::Ready(Err(error)) => return Poll::Ready(Err(error)),
                        Poll::Pending => return Poll::Pending,
                    },
                },
            }
        }
    }
}

/// Sends PINGs: to confirm deliveries, and to a client that was silent for `keepalive`.
struct Pings {
    line: Arc<WatchedConnection>,
    pings: PingPong,
    keepalive: Duration,
    /// When the PING without an answer was sent, and how long the client may be silent from then on.
    outstanding: Option<(Instant, Duration)>,
    /// Earliest time of the next PING that confirms deliveries: one interval in the past for each of the burst that is left.
    not_before: Instant,
    /// See [`WatchedConnection::activity`], and when it changed.
    activity: u64,
    last_activity: Instant,
    timer: Pin<Box<Sleep>>,
}

impl Pings {
    fn new(pings: PingPong, line: Arc<WatchedConnection>, keepalive: Duration) -> Self {
        let now = Instant::now();
        let timer = Box::pin(sleep_until(now + keepalive));
        let not_before = earliest(now);
        Self {
            activity: line.activity(),
            line,
            pings,
            keepalive,
            outstanding: None,
            not_before,
            last_activity: now,
            timer,
        }
    }

    /// Ready when a PING is to be written, or the client has not answered in time.
    fn poll(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), ServeError>> {
        self.line.task.register(cx.waker());
        loop {
            if self.outstanding.is_some() && self.pings.poll_pong(cx).is_ready() {
                self.outstanding = None;
            }
            let now = Instant::now();
            let activity = self.line.activity();
            if activity != self.activity {
                (self.activity, self.last_activity) = (activity, now);
            }
            let is_unconfirmed = self.line.is_unconfirmed();
            let due = match self.outstanding {
                Some((sent, patience)) => (self.last_activity.max(sent) + patience).min(sent + PONG_TIMEOUT),
                // h2 reads nothing while a PING waits for room. The task is woken when there is room.
                None if self.line.is_full() => now + self.keepalive,
                None if self.line.is_asked() => now,
                None if is_unconfirmed && self.line.take_urgent() => now,
                None if is_unconfirmed => self.not_before.min(self.last_activity + self.keepalive),
                None => self.last_activity + self.keepalive,
            };
            if due <= now {
                return Poll::Ready(match self.outstanding {
                    Some(_) => Err(ServeError::PingTimeout),
                    None => self.send(now, is_unconfirmed),
                });
            }
            if due < self.timer.deadline() || self.timer.is_elapsed() {
                self.timer.as_mut().reset(due);
            }
            ready!(self.timer.as_mut().poll(cx));
        }
    }

    fn send(&mut self, now: Instant, is_unconfirmed: bool) -> Result<(), ServeError> {
        self.pings.send_ping(Ping::opaque())?;
        // After megabytes on a slow line it takes its time; the kernel ends connections that make no progress.
        self.outstanding = Some((now, if is_unconfirmed { SILENCE } else { KEEPALIVE_TIMEOUT }));
        // PINGs that were sent before their time do not add up.
        self.not_before = (self.not_before.max(earliest(now)) + PING_INTERVAL).min(now + PING_INTERVAL);
        Ok(())
    }
}

/// A client that was sent no PING since then may be sent [`PING_BURST`] at once.
fn earliest(now: Instant) -> Instant {
    now.checked_sub(PING_INTERVAL * PING_BURST).unwrap_or(now)
}

/// Sends the answer to a request within its client's window. Ends with its stream, or its connection.
async fn respond_with<B: Body<Data = Bytes> + Unpin>(
    mut answer: Pin<Box<impl Future<Output = Result<Response<B>, Infallible>>>>,
    mut respond: SendResponse<Bytes>,
) {
    let answered = poll_fn(|cx| match answer.as_mut().poll(cx) {
        Poll::Ready(Ok(answer)) => Poll::Ready(Some(answer)),
        Poll::Pending => respond.poll_reset(cx).map(|_| None),
    });
    let Some(answered) = answered.await else { return };
    drop(answer);
    let (head, body) = answered.into_parts();
    let is_all = body.is_end_stream();
    match respond.send_response(Response::from_parts(head, ()), is_all) {
        Ok(stream) if !is_all => send_body(stream, body).await,
        Ok(_) => {}
        // For a stream that is not closed: the head was refused.
        Err(_) => respond.send_reset(Reason::INTERNAL_ERROR),
    }
}

/// Sends a body; holds one piece of it at a time.
async fn send_body<B: Body<Data = Bytes> + Unpin>(mut stream: SendStream<Bytes>, mut body: B) {
    loop {
        let frame = poll_fn(|cx| match Pin::new(&mut body).poll_frame(cx) {
            Poll::Ready(frame) => Poll::Ready(Ok(frame)),
            Poll::Pending => stream.poll_reset(cx).map(Err),
        });
        let sent = match frame.await {
            // The client has reset the stream.
            Err(_) => return,
            Ok(None) => return drop(stream.send_data(Bytes::new(), true)),
            Ok(Some(Err(_))) => return stream.send_reset(Reason::INTERNAL_ERROR),
            Ok(Some(Ok(frame))) => match frame.into_data() {
                Ok(data) => send_data(&mut stream, data).await,
                Err(frame) => match frame.into_trailers() {
                    Ok(trailers) => return drop(stream.send_trailers(trailers)),
                    Err(_) => Ok(()),
                },
            },
        };
        if sent.is_err() {
            return;
        }
    }
}

/// Sends a piece within the client's window.
async fn send_data(stream: &mut SendStream<Bytes>, mut data: Bytes) -> Result<(), h2::Error> {
    while !data.is_empty() {
        stream.reserve_capacity(data.len());
        while stream.capacity() == 0 {
            poll_fn(|cx| stream.poll_capacity(cx)).await.unwrap_or_else(|| Err(Reason::STREAM_CLOSED.into()))?;
        }
        let now = data.split_to(stream.capacity().min(data.len()));
        stream.send_data(now, false)?;
    }
    Ok(())
}

/// The body of a request. What is read opens the client's window again.
pub(super) struct Incoming(RecvStream);

impl Body for Incoming {
    type Data = Bytes;
    type Error = h2::Error;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, h2::Error>>> {
        let stream = &mut self.0;
        match ready!(stream.poll_data(cx)) {
            Some(Ok(data)) => {
                // Refused only for more than was read.
                let _ = stream.flow_control().release_capacity(data.len());
                Poll::Ready(Some(Ok(Frame::data(data))))
            }
            // A client that needs no more of the answer: an end, and no failure (RFC 9113, section 8.1).
            Some(Err(error)) if error.reason() == Some(Reason::NO_ERROR) => Poll::Ready(None),
            Some(Err(error)) => Poll::Ready(Some(Err(error))),
            None => {
                let trailers = ready!(stream.poll_trailers(cx))?;
                Poll::Ready(trailers.map(|trailers| Ok(Frame::trailers(trailers))))
            }
        }
    }

    fn is_end_stream(&self) -> bool {
        self.0.is_end_stream()
    }
}

#[cfg(test)]
mod tests {
    use axum::body;
    use h2::client;
    use tokio::{
        io::{AsyncReadExt as _, AsyncWriteExt as _, DuplexStream, duplex},
        sync::mpsc,
        task::JoinSet,
    };
    use tokio_stream::wrappers::ReceiverStream;

    use super::*;

    const KEEPALIVE: Duration = Duration::from_secs(15);

    type Answer = (mpsc::Sender<Result<Bytes, Infallible>>, Arc<Arrivals>);

    /// A client's end of a connection, its serving, and what its first answer is sent by, with what has arrived of it.
    fn serve(stop: CancellationToken) -> (DuplexStream, JoinSet<Result<(), ServeError>>, mpsc::Receiver<Answer>) {
        let (client, line) = duplex(1024 * 1024);
        let (begins, begun) = mpsc::channel(1);
        let answer = move |_: Request<Incoming>, stream: StreamHandle<'_>| {
            let (pieces, body) = mpsc::channel(1);
            begins.try_send((pieces, Arc::new(stream.arrivals()))).unwrap();
            async { Ok(Response::new(body::Body::from_stream(ReceiverStream::new(body)))) }
        };
        let (connection_window, stream_window) = (65_535, 65_535);
        let settings = Settings { streams_max: 100, connection_window, stream_window, keepalive: KEEPALIVE };
        let served = Serving::new(line, &settings, TaskTracker::new(), stop, answer);
        (client, JoinSet::from_iter([served]), begun)
    }

    #[tokio::test(start_paused = true)]
    async fn a_connection_without_an_answer_to_a_ping_is_closed() {
        let (mut client, mut serving, _begun) = serve(CancellationToken::new());
        client.write_all(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0").await.unwrap();
        let begun = Instant::now();
        let ended = serving.join_next().await.unwrap().unwrap();
        assert!(ended.is_err_and(|error| error.is_timeout()));
        let took = begun.elapsed();
        assert!(took.abs_diff(KEEPALIVE + KEEPALIVE_TIMEOUT) < Duration::from_millis(10), "{took:?}");
        let mut sent = Vec::new();
        client.read_to_end(&mut sent).await.unwrap();
        assert_eq!(sent.windows(5).filter(|head| *head == b"\0\0\x08\x06\0").count(), 1, "one PING");
    }

    #[tokio::test]
    async fn streams_after_the_stop_are_refused_such_that_they_can_be_tried_elsewhere() {
        let stop = CancellationToken::new();
        let (client, _serving, mut begun) = serve(stop.clone());
        let (mut requests, connection) = client::handshake(client).await.unwrap();
        let _connection = JoinSet::from_iter([async { drop(connection.await) }]);
        let (first, _) = requests.send_request(Request::new(()), true).unwrap();
        let (pieces, _) = begun.recv().await.unwrap();
        let mut body = first.await.unwrap().into_body();
        stop.cancel();
        let (late, _) = requests.send_request(Request::new(()), true).unwrap();
        assert_eq!(late.await.unwrap_err().reason(), Some(Reason::REFUSED_STREAM));
        pieces.send(Ok(Bytes::from_static(b"rest"))).await.unwrap();
        assert_eq!(body.data().await.unwrap().unwrap(), "rest");
    }

    #[tokio::test(start_paused = true)]
    async fn pings_before_their_time_do_not_delay_later_ones() {
        let (client, mut serving, mut begun) = serve(CancellationToken::new());
        let (mut requests, connection) = client::handshake(client).await.unwrap();
        let _connection = JoinSet::from_iter([async { drop(connection.await) }]);
        let (answer, _) = requests.send_request(Request::new(()), true).unwrap();
        let (pieces, arrivals) = begun.recv().await.unwrap();
        let mut body = answer.await.unwrap().into_body();
        let mut end = 0;
        for n in 0..400 {
            end += 10;
            arrivals.confirm_up_to(end);
            let changed = arrivals.changed();
            pieces.send(Ok(Bytes::from_static(&[0; 10]))).await.unwrap();
            body.data().await.unwrap().unwrap();
            body.flow_control().release_capacity(10).unwrap();
            // The last ones are confirmed at the interval.
            if n < 390 {
                arrivals.ping_now();
                changed.await;
            }
        }
        let sent = Instant::now();
        while arrivals.arrived() < end {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        assert!(sent.elapsed() <= PING_INTERVAL + Duration::from_millis(5), "{:?}", sent.elapsed());
        drop((pieces, arrivals));
        serving.abort_all();
    }
}

//! Frames of a client, read from the transport as they come.
//!
//! The transport keeps every small piece that nobody reads at a cost of its own, and ends the whole connection, with all the
//! streams on it, when there are too many. So what comes is read on while the stream's task waits for the store or for its
//! client, into one buffer: what waits there costs its own bytes, and they are bounded for each stream and for all of them
//! together. Behind a full buffer the flow control of HTTP/2 makes the client wait.

use std::{
    collections::HashMap,
    net::{IpAddr, Ipv6Addr},
    pin::{Pin, pin},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, AtomicUsize, Ordering::Relaxed},
    },
    task::{Context, Poll, Waker, ready},
};

use axum::body::HttpBody as _;
use bytes::{Buf as _, Bytes, BytesMut};
use prost::Message as _;
use tonic::{Status, body::Body};
use trunkline_proto::v1::UpstreamMessage;

/// Largest first frame, in bytes: an identity, its credentials, 64 extensions and 256 profiles. Before it is checked, a stream
/// may be anybody's.
pub(super) const FIRST_FRAME_BYTES_MAX: usize = 128 * 1024;

/// Bytes that may wait for a stream of which nobody knows whose it is, without being counted.
const UNKNOWN_BYTES_MAX: usize = 4 * 1024;

/// Bytes that may wait beyond those for all streams of which nobody knows whose they are.
const UNKNOWN_TOTAL_MAX: usize = 64 * 1024 * 1024;

/// Those of them that streams from one address may have, so that one peer leaves room for the others.
const UNKNOWN_OF_ADDRESS_MAX: usize = UNKNOWN_TOTAL_MAX / 8;

/// Bytes that are read in one go: what several reads of the transport bring.
const READ_BYTES: usize = 64 * 1024;

/// Bytes that may wait for one stream's task, read and not handled. Some 20,000 small messages.
const AHEAD_BYTES_MAX: usize = 1024 * 1024;

/// Bytes that may wait beyond the first [`READ_BYTES`] of each, for all streams of the server together.
const AHEAD_TOTAL_MAX: usize = 256 * 1024 * 1024;

/// Flag and length before each frame.
const PREFIX_BYTES: usize = 5;

/// What all streams may still keep of what they read. Clones share it.
#[derive(Clone)]
pub(crate) struct Allowance(Arc<Left>);

struct Left {
    ahead: AtomicUsize,
    unknown: Mutex<FirstFrames>,
}

/// What is counted of first frames.
#[derive(Default)]
struct FirstFrames {
    bytes: usize,
    of_address: HashMap<Option<IpAddr>, usize>,
}

impl FirstFrames {
    fn take(&mut self, address: Option<IpAddr>, bytes: usize) -> bool {
        let own = self.of_address.get(&address).copied().unwrap_or_default();
        let fits = self.bytes + bytes <= UNKNOWN_TOTAL_MAX && own + bytes <= UNKNOWN_OF_ADDRESS_MAX;
        if fits {
            self.bytes += bytes;
            self.of_address.insert(address, own + bytes);
        }
        fits
    }

    fn give_back(&mut self, address: Option<IpAddr>, bytes: usize) {
        self.bytes -= bytes;
        if let Some(own) = self.of_address.get_mut(&address) {
            *own -= bytes;
            if *own == 0 {
                self.of_address.remove(&address);
            }
        }
    }
}

impl Left {
    fn unknown(&self) -> MutexGuard<'_, FirstFrames> {
        // Nothing in a section can panic half way.
        self.unknown.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The network of an address: one client of IPv6 has as many addresses as it likes.
fn network(address: IpAddr) -> IpAddr {
    match address.to_canonical() {
        IpAddr::V6(v6) => Ipv6Addr::from_bits(v6.to_bits() >> 64 << 64).into(),
        v4 => v4,
    }
}

impl Default for Allowance {
    fn default() -> Self {
        let (ahead, unknown) = (AtomicUsize::new(AHEAD_TOTAL_MAX), Mutex::default());
        Self(Arc::new(Left { ahead, unknown }))
    }
}

fn take(left: &AtomicUsize, bytes: usize) -> bool {
    left.fetch_update(Relaxed, Relaxed, |left| left.checked_sub(bytes)).is_ok()
}

/// A body that was taken off its request before the library could decode it.
#[derive(Clone)]
pub(crate) struct Detached(Arc<Mutex<Option<Body>>>);

impl Detached {
    pub(crate) fn new(body: Body) -> Self {
        Self(Arc::new(Mutex::new(Some(body))))
    }

    /// The body, once.
    pub(crate) fn take(&self) -> Option<Body> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).take()
    }
}

/// What the stream's task and its read-ahead share. Both run in one task, so the lock is always free.
struct Shared {
    intake: Mutex<Intake>,
    /// The task itself waits for the transport in this turn.
    waits: AtomicBool,
}

/// What was read and is not taken yet.
struct Intake {
    body: Body,
    bytes: BytesMut,
    end: Option<Result<(), Status>>,
    /// Bytes that may be read before the task takes them.
    ahead_max: usize,
    /// How many of them are taken from `allowance`.
    granted: usize,
    allowance: Allowance,
}

impl Intake {
    /// Reads what has come until there are `most` bytes. Pending when the transport has no more.
    fn fill(&mut self, cx: &mut Context<'_>, most: usize) -> Poll<()> {
        while self.end.is_none() && self.bytes.len() < most {
            match ready!(Pin::new(&mut self.body).poll_frame(cx)) {
                // Copied: a piece of a few bytes would keep the whole buffer of the transport.
                Some(Ok(frame)) => {
                    if let Ok(data) = frame.into_data() {
                        self.bytes.extend_from_slice(&data);
                    }
                }
                Some(Err(status)) => self.end = Some(Err(status)),
                None => self.end = Some(Ok(())),
            }
        }
        Poll::Ready(())
    }

    /// As [`Intake::fill`], up to what may wait.
    fn read_ahead(&mut self, cx: &mut Context<'_>) {
        loop {
            let most = (READ_BYTES + self.granted).min(self.ahead_max);
            if self.fill(cx, most).is_pending() || self.end.is_some() {
                return;
            }
            // Full. The task takes of it until it is empty, and reads on by itself then.
            if most == self.ahead_max || !take(&self.allowance.0.ahead, READ_BYTES) {
                return;
            }
            self.granted += READ_BYTES;
        }
    }

    /// Moves all of it, or what lacks of the frame that was begun: no more than that is copied.
    fn move_into(&mut self, taken: &mut BytesMut) {
        if taken.is_empty() {
            *taken = std::mem::take(&mut self.bytes);
        } else {
            let whole = prefix(taken).map_or(PREFIX_BYTES, |(_, length)| length.saturating_add(PREFIX_BYTES));
            let lacks = whole.saturating_sub(taken.len()).min(self.bytes.len());
            taken.extend_from_slice(&self.bytes[..lacks]);
            self.bytes.advance(lacks);
        }
        if self.bytes.is_empty() {
            // The room that it took is not kept.
            self.bytes = BytesMut::new();
            self.allowance.0.ahead.fetch_add(std::mem::take(&mut self.granted), Relaxed);
        }
    }
}

impl Drop for Intake {
    fn drop(&mut self) {
        self.allowance.0.ahead.fetch_add(self.granted, Relaxed);
    }
}

/// Frames of a client, in order.
pub(super) struct Upstream {
    shared: Arc<Shared>,
    taken: BytesMut,
    frame_bytes_max: usize,
    /// Until it is known whose it is: how much of it is counted.
    unknown: Option<Unknown>,
}

/// What a stream of which nobody knows whose it is has taken of the allowance.
struct Unknown {
    counted: usize,
    address: Option<IpAddr>,
    allowance: Allowance,
}

impl Unknown {
    /// Counts `bytes` of the first frame.
    fn count(&mut self, bytes: usize) -> Result<(), Status> {
        let more = bytes.saturating_sub(UNKNOWN_BYTES_MAX + self.counted);
        if more > 0 && !self.allowance.0.unknown().take(self.address, more) {
            return Err(Status::resource_exhausted("too many large first frames at once"));
        }
        self.counted += more;
        Ok(())
    }
}

impl Drop for Unknown {
    fn drop(&mut self) {
        if self.counted > 0 {
            self.allowance.0.unknown().give_back(self.address, self.counted);
        }
    }
}

/// The side that reads on while the stream's task does not.
pub(super) struct ReadAhead(Arc<Shared>);

/// The two sides of a body. Until [`Upstream::admit`], frames are at most [`FIRST_FRAME_BYTES_MAX`] large.
pub(super) fn split(body: Body, allowance: Allowance, address: Option<IpAddr>) -> (Upstream, ReadAhead) {
    let intake = Intake {
        body,
        bytes: BytesMut::new(),
        end: None,
        ahead_max: UNKNOWN_BYTES_MAX,
        granted: 0,
        allowance: allowance.clone(),
    };
    let shared = Arc::new(Shared { intake: Mutex::new(intake), waits: AtomicBool::new(false) });
    let upstream = Upstream {
        shared: shared.clone(),
        taken: BytesMut::new(),
        frame_bytes_max: FIRST_FRAME_BYTES_MAX,
        unknown: Some(Unknown { counted: 0, address: address.map(network), allowance }),
    };
    (upstream, ReadAhead(shared))
}

impl ReadAhead {
    /// Runs `task`, the only user of the other side, and reads on in every turn in which it does not wait for frames itself.
    pub(super) async fn beside<T>(self, task: impl Future<Output = T>) -> T {
        let mut task = pin!(task);
        std::future::poll_fn(|cx| {
            self.0.waits.store(false, Relaxed);
            let done = task.as_mut().poll(cx);
            if done.is_pending() && !self.0.waits.load(Relaxed) {
                self.0.intake().read_ahead(cx);
            }
            done
        })
        .await
    }
}

impl Shared {
    fn intake(&self) -> MutexGuard<'_, Intake> {
        // A panic in between ends the task, and with it both sides.
        self.intake.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Upstream {
    /// The client is known: its first frame counts no more.
    pub(super) fn know(&mut self) {
        self.unknown = None;
    }

    /// Its session has begun: from now on its frames may have `frame_bytes_max` bytes.
    pub(super) fn admit(&mut self, frame_bytes_max: usize) {
        self.know();
        self.frame_bytes_max = frame_bytes_max;
        self.shared.intake().ahead_max = AHEAD_BYTES_MAX;
    }

    /// The next frame; nothing once the client has ended the stream. Cancel-safe.
    ///
    /// # Errors
    /// What the transport says; `OUT_OF_RANGE` for a frame that is too large, `INTERNAL` for one that cannot be read. After an
    /// error the stream is of no use.
    pub(super) async fn message(&mut self) -> Result<Option<UpstreamMessage>, Status> {
        std::future::poll_fn(|cx| {
            let polled = self.poll(cx);
            if polled.is_pending() {
                self.shared.waits.store(true, Relaxed);
            }
            polled
        })
        .await
    }

    /// As [`Upstream::message`]; nothing if none has come yet.
    pub(super) fn come(&mut self) -> Option<Result<Option<UpstreamMessage>, Status>> {
        match self.poll(&mut Context::from_waker(Waker::noop())) {
            Poll::Ready(frame) => Some(frame),
            Poll::Pending => None,
        }
    }

    fn poll(&mut self, cx: &mut Context<'_>) -> Poll<Result<Option<UpstreamMessage>, Status>> {
        loop {
            if let Some(frame) = self.decode()? {
                return Poll::Ready(Ok(Some(frame)));
            }
            let most = if self.unknown.is_some() { self.first_frame_left() } else { READ_BYTES };
            let mut intake = self.shared.intake();
            let filled = intake.fill(cx, most);
            if intake.bytes.is_empty() {
                return match &intake.end {
                    Some(Ok(())) if self.taken.is_empty() => Poll::Ready(Ok(None)),
                    Some(Ok(())) => Poll::Ready(Err(Status::internal("the stream ends within a frame"))),
                    Some(Err(status)) => Poll::Ready(Err(status.clone())),
                    None => {
                        debug_assert!(filled.is_pending(), "something came, or nothing did");
                        Poll::Pending
                    }
                };
            }
            intake.move_into(&mut self.taken);
            drop(intake);
            if let Some(unknown) = &mut self.unknown {
                // Not what came behind it, which is little.
                let whole = prefix(&self.taken).map_or(0, |(_, length)| length.saturating_add(PREFIX_BYTES));
                unknown.count(self.taken.len().min(whole))?;
            }
        }
    }

    /// Bytes that may be read of a first frame: to its end, if that is known.
    fn first_frame_left(&self) -> usize {
        let Some((_, length)) = prefix(&self.taken) else { return UNKNOWN_BYTES_MAX };
        (length.saturating_add(PREFIX_BYTES)).saturating_sub(self.taken.len()).clamp(1, READ_BYTES)
    }

    /// The next frame of what was taken, if it is whole.
    fn decode(&mut self) -> Result<Option<UpstreamMessage>, Status> {
        let Some((flag, length)) = prefix(&self.taken) else { return Ok(None) };
        if flag != 0 {
            return Err(Status::internal("a frame is compressed, which was not agreed on"));
        }
        let most = self.frame_bytes_max;
        if length > most {
            let message = format!("frame of {length} bytes exceeds the limit of {most} bytes");
            return Err(Status::out_of_range(message));
        }
        if self.taken.len() - PREFIX_BYTES < length {
            return Ok(None);
        }
        self.taken.advance(PREFIX_BYTES);
        let frame: Bytes = self.taken.split_to(length).freeze();
        if self.taken.is_empty() {
            // What is left of it would keep all that was read at once.
            self.taken = BytesMut::new();
        }
        let frame = UpstreamMessage::decode(frame);
        frame.map(Some).map_err(|e| Status::internal(format!("a frame cannot be decoded: {e}")))
    }
}

fn prefix(bytes: &[u8]) -> Option<(u8, usize)> {
    let (prefix, _) = bytes.split_first_chunk::<PREFIX_BYTES>()?;
    let [flag, length @ ..] = *prefix;
    Some((flag, u32::from_be_bytes(length) as usize))
}

#[cfg(test)]
#[allow(clippy::panic, reason = "test code")]
mod tests {
    use std::time::Duration;

    use bytes::BufMut as _;
    use futures_util::stream;
    use tokio::sync::mpsc;
    use tokio_stream::{StreamExt as _, wrappers::ReceiverStream};
    use tonic::Code;
    use trunkline_proto::v1::{SendMessage, upstream_message::Payload as Up};

    use super::*;

    fn frame(bytes: usize) -> Bytes {
        let send = SendMessage { payload: vec![7; bytes].into(), ..SendMessage::default() };
        let frame = UpstreamMessage { payload: Some(Up::Send(send)), ..UpstreamMessage::default() };
        let mut encoded = BytesMut::new();
        encoded.put_u8(0);
        encoded.put_u32(u32::try_from(frame.encoded_len()).unwrap());
        frame.encode(&mut encoded).unwrap();
        encoded.freeze()
    }

    fn body(pieces: impl tokio_stream::Stream<Item = Bytes> + Send + 'static) -> Body {
        Body::new(axum::body::Body::from_stream(pieces.map(Ok::<_, std::convert::Infallible>)))
    }

    fn payload(frame: Option<UpstreamMessage>) -> usize {
        match frame.and_then(|frame| frame.payload) {
            Some(Up::Send(send)) => send.payload.len(),
            other => panic!("expected a message, got {other:?}"),
        }
    }

    #[tokio::test]
    async fn frames_are_found_however_they_are_cut() {
        let sizes = [0, 1, 100, 70_000, 5];
        let all: Vec<u8> = sizes.iter().flat_map(|size| frame(*size)).collect();
        for piece in [1, 4, 7, 16 * 1024, all.len()] {
            let pieces: Vec<_> = all.chunks(piece).map(Bytes::copy_from_slice).collect();
            let (mut upstream, ahead) = split(body(stream::iter(pieces)), Allowance::default(), None);
            ahead
                .beside(async {
                    for size in sizes {
                        assert_eq!(payload(upstream.message().await.unwrap()), size);
                    }
                    assert!(upstream.message().await.unwrap().is_none());
                })
                .await;
        }
    }

    #[tokio::test]
    async fn what_cannot_be_a_frame_ends_the_stream() {
        let refusal = async |bytes: Bytes| {
            let (mut upstream, _ahead) = split(body(stream::iter([bytes])), Allowance::default(), None);
            upstream.message().await.unwrap_err().code()
        };
        assert_eq!(refusal(Bytes::from_static(&[1, 0, 0, 0, 0])).await, Code::Internal);
        assert_eq!(refusal(Bytes::from_static(&[0, 0, 0, 0, 1])).await, Code::Internal);
        assert_eq!(refusal(Bytes::from_static(&[0, 0, 0, 0, 1, 0xff])).await, Code::Internal);
        assert_eq!(refusal(frame(FIRST_FRAME_BYTES_MAX)).await, Code::OutOfRange);
        // The length alone is enough: nothing of it has to be read.
        assert_eq!(refusal(Bytes::from_static(&[0, 0, 2, 0, 1])).await, Code::OutOfRange);
    }

    /// A task that waits for something else, and how many bytes went into the buffer meanwhile.
    async fn read_meanwhile(allowance: &Allowance, is_known: bool) -> (usize, Upstream) {
        let (pieces, read) = mpsc::channel::<Bytes>(1);
        let (mut upstream, ahead) = split(body(ReceiverStream::new(read)), allowance.clone(), None);
        if is_known {
            upstream.admit(FIRST_FRAME_BYTES_MAX);
        }
        let send = async {
            let mut sent = 0;
            let small = frame(10);
            // No reader takes longer than this to take a piece that it takes at all.
            while tokio::time::timeout(Duration::from_secs(1), pieces.send(small.clone())).await.is_ok() {
                sent += small.len();
            }
            sent
        };
        let sent = ahead.beside(send).await;
        (sent, upstream)
    }

    #[tokio::test(start_paused = true)]
    async fn the_transport_is_read_while_the_task_waits_up_to_a_bound() {
        let (allowance, slack) = (Allowance::default(), 100);
        let (unknown, _) = read_meanwhile(&allowance, false).await;
        assert!((UNKNOWN_BYTES_MAX..UNKNOWN_BYTES_MAX + slack).contains(&unknown), "{unknown}");
        let (known, mut upstream) = read_meanwhile(&allowance, true).await;
        assert!((AHEAD_BYTES_MAX..AHEAD_BYTES_MAX + slack).contains(&known), "{known}");
        assert!(allowance.0.ahead.load(Relaxed) < AHEAD_TOTAL_MAX);
        let frames = known / frame(10).len();
        for _ in 0..frames - 2 {
            assert_eq!(payload(upstream.message().await.unwrap()), 10);
        }
        assert_eq!(allowance.0.ahead.load(Relaxed), AHEAD_TOTAL_MAX, "what was taken counts no more");
        assert!(take(&allowance.0.ahead, AHEAD_TOTAL_MAX));
        let (alone, upstream) = read_meanwhile(&allowance, true).await;
        assert!((READ_BYTES..READ_BYTES + slack).contains(&alone), "others wait already: {alone}");
        drop(upstream);
        assert_eq!(allowance.0.ahead.load(Relaxed), 0);
    }

    async fn first(allowance: &Allowance, address: IpAddr, bytes: Vec<Bytes>) -> Result<(usize, Upstream), Status> {
        let (mut upstream, _ahead) = split(body(stream::iter(bytes)), allowance.clone(), Some(address));
        upstream.message().await.map(|first| (payload(first), upstream))
    }

    #[tokio::test]
    async fn large_first_frames_of_unknown_clients_are_bounded_together() {
        let allowance = Allowance::default();
        let (one, other) = (IpAddr::from([192, 0, 2, 1]), IpAddr::from([192, 0, 2, 2]));
        let first = async |address, bytes| first(&allowance, address, vec![frame(bytes)]).await.map(|(bytes, _)| bytes);
        assert!(allowance.0.unknown().take(Some(one), UNKNOWN_OF_ADDRESS_MAX - 1000));
        assert_eq!(first(one, 10_000).await.unwrap_err().code(), Code::ResourceExhausted);
        assert_eq!((first(one, 100).await.unwrap(), first(one, 4_500).await.unwrap()), (100, 4_500));
        assert_eq!(first(other, 10_000).await.unwrap(), 10_000, "one peer leaves room for the others");
        for n in 1..8 {
            let full = if n == 7 { UNKNOWN_OF_ADDRESS_MAX + 1000 } else { UNKNOWN_OF_ADDRESS_MAX };
            assert_eq!(allowance.0.unknown().take(Some(IpAddr::from([10, 0, 0, n])), full), n < 7);
        }
        assert!(allowance.0.unknown().take(Some(IpAddr::from([10, 0, 0, 7])), UNKNOWN_OF_ADDRESS_MAX));
        assert_eq!(first(other, 10_000).await.unwrap_err().code(), Code::ResourceExhausted);
        assert_eq!(allowance.0.unknown().bytes, UNKNOWN_TOTAL_MAX - 1000);
    }

    #[tokio::test]
    async fn what_comes_behind_a_first_frame_is_neither_counted_nor_read_on() {
        let allowance = Allowance::default();
        let address = IpAddr::from([192, 0, 2, 1]);
        let pieces = std::iter::once(frame(5_000)).chain((0..100).map(|_| frame(10_000))).collect();
        let (bytes, upstream) = first(&allowance, address, pieces).await.unwrap();
        assert_eq!((bytes, upstream.taken.len()), (5_000, 0));
        let counted = allowance.0.unknown().bytes;
        assert!((900..1_000).contains(&counted), "{counted}");
        let (_, mut known) = first(&allowance, address, vec![frame(5_000)]).await.unwrap();
        assert_eq!(allowance.0.unknown().bytes, 2 * counted);
        known.know();
        assert_eq!(allowance.0.unknown().bytes, counted, "it counts no more when it is known whose it is");
        drop(upstream);
        assert!(allowance.0.unknown().of_address.is_empty());
        drop(known);
    }

    #[test]
    fn addresses_of_one_network_are_one() {
        let network = |address: &str| network(address.parse().unwrap()).to_string();
        assert_eq!(network("2001:db8:1:2:3:4:5:6"), "2001:db8:1:2::");
        assert_eq!((network("192.0.2.1"), network("::ffff:192.0.2.1")), ("192.0.2.1".into(), "192.0.2.1".into()));
    }
}

//! What of an answer has arrived: a client's HTTP/2 answers a PING when it has read all that came before it. The transport is
//! watched for how much of each stream goes before each PING, so the answer tells how much of each stream its client has.
//!
//! What the kernel of the other end acknowledges says less (a balancer acknowledges, too), and what the transport took says
//! nothing: it takes megabytes for a client whose end of the wire is broken.

use std::{
    collections::{HashMap, VecDeque},
    io::{self, IoSlice},
    pin::Pin,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{
            AtomicBool, AtomicU64,
            Ordering::{AcqRel, Acquire, Relaxed, Release, SeqCst},
            fence,
        },
    },
    task::{Context, Poll},
};

use futures_util::task::AtomicWaker;
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    sync::Notify,
};

/// Length, type, flags and stream of a frame, by RFC 9113, section 4.1.
const HEAD_BYTES: usize = 9;

/// Types of frames.
const DATA: u8 = 0;
const RST_STREAM: u8 = 3;
const PING: u8 = 6;

/// Of a PING: it answers one.
const ACK: u8 = 1;

/// What a PING carries.
type Opaque = [u8; 8];

/// What a frame means for delivery.
#[derive(Debug, PartialEq)]
enum Seen {
    /// Bytes of a stream, perhaps of a part of the frame.
    Data {
        stream: u32,
        bytes: usize,
    },
    Ping {
        is_answer: bool,
        opaque: Opaque,
    },
    Reset {
        stream: u32,
    },
}

/// Follows the frames of one direction, however they are cut.
struct Frames {
    /// Bytes before the first frame that are still to come.
    preface: usize,
    head: [u8; HEAD_BYTES],
    head_bytes: usize,
    payload_left: usize,
    opaque: Opaque,
}

impl Frames {
    fn after(preface: usize) -> Self {
        Self { preface, head: [0; HEAD_BYTES], head_bytes: 0, payload_left: 0, opaque: Opaque::default() }
    }

    fn follow(&mut self, mut bytes: &[u8], mut see: impl FnMut(Seen)) {
        let skipped = self.preface.min(bytes.len());
        self.preface -= skipped;
        bytes = &bytes[skipped..];
        while !bytes.is_empty() {
            if self.head_bytes < HEAD_BYTES {
                let (taken, rest) = bytes.split_at((HEAD_BYTES - self.head_bytes).min(bytes.len()));
                self.head[self.head_bytes..][..taken.len()].copy_from_slice(taken);
                self.head_bytes += taken.len();
                bytes = rest;
                if self.head_bytes == HEAD_BYTES {
                    let [high, middle, low, ..] = self.head;
                    self.payload_left = u32::from_be_bytes([0, high, middle, low]) as usize;
                }
            } else {
                let (payload, rest) = bytes.split_at(self.payload_left.min(bytes.len()));
                self.payload(payload, &mut see);
                bytes = rest;
            }
            if self.head_bytes == HEAD_BYTES && self.payload_left == 0 {
                self.head_bytes = 0;
            }
        }
    }

    fn payload(&mut self, payload: &[u8], see: &mut impl FnMut(Seen)) {
        let [_, _, _, kind, flags, stream @ ..] = self.head;
        let stream = u32::from_be_bytes(stream) & (u32::MAX >> 1);
        let before = self.payload_left;
        self.payload_left -= payload.len();
        match kind {
            DATA => see(Seen::Data { stream, bytes: payload.len() }),
            // Of another length it is a mistake, which ends the connection.
            PING if self.head[..3] == [0, 0, 8] => {
                self.opaque[8 - before..][..payload.len()].copy_from_slice(payload);
                if self.payload_left == 0 {
                    see(Seen::Ping { is_answer: flags & ACK != 0, opaque: self.opaque });
                }
            }
            RST_STREAM if self.payload_left == 0 => see(Seen::Reset { stream }),
            _ => {}
        }
    }
}

/// Progress of one answer, in bytes of its body.
#[derive(Default)]
struct Progress {
    /// End of the last delivery in it.
    wanted: AtomicU64,
    arrived: AtomicU64,
    is_over: AtomicBool,
    changed: Arc<Notify>,
}

impl Progress {
    fn close(&self) {
        self.is_over.store(true, Release);
        self.changed.notify_waiters();
    }
}

/// How much of an answer has arrived. It is watched until this is dropped.
pub(crate) struct Arrivals {
    line: Arc<WatchedConnection>,
    stream: u32,
    progress: Arc<Progress>,
}

impl Arrivals {
    /// Bytes of the answer's body that the client's HTTP/2 has read, from the first one on.
    pub(crate) fn arrived(&self) -> u64 {
        self.progress.arrived.load(Acquire)
    }

    /// Sends a PING soon after the answer's body is written up to this byte.
    pub(crate) fn confirm_up_to(&self, end: u64) {
        self.progress.wanted.fetch_max(end, Release);
    }

    /// Whether `arrived` is final: the stream was reset, or the connection is closed. Read it before `arrived`.
    pub(crate) fn is_over(&self) -> bool {
        self.progress.is_over.load(Acquire)
    }

    /// Sends the PING now, whatever the interval of PINGs says.
    pub(crate) fn ping_now(&self) {
        if !self.line.is_urgent.swap(true, AcqRel) {
            self.line.task.wake();
        }
    }

    /// Sends a PING; resolves to whether the client sent anything, or took something that waited for room, after this call. False
    /// when its connection is closed. Without a time limit; cancel-safe.
    pub(crate) async fn answers(&self) -> bool {
        let line = &self.line;
        let before = line.activity();
        loop {
            let heard = line.heard.notified();
            // Each time: an answer to a question before this one takes the flag away.
            line.is_asked.store(true, Relaxed);
            // Against the one of `note_activity`: it sees the question, or is seen here.
            fence(SeqCst);
            line.task.wake();
            if line.is_closed.load(Acquire) {
                return false;
            }
            if line.activity() != before {
                return true;
            }
            heard.await;
        }
    }

    /// Resolves at the next change of `arrived` or `is_over` after this call. Cancel-safe.
    pub(crate) fn changed(&self) -> impl Future<Output = ()> + Send + use<> {
        self.progress.changed.clone().notified_owned()
    }
}

impl Drop for Arrivals {
    fn drop(&mut self) {
        self.line.watch().streams.remove(&self.stream);
    }
}

/// A connection's frames as they pass, and what they mean; shared by its transport, its task and its streams.
pub(super) struct WatchedConnection {
    /// Whether the next PING is sent now.
    is_urgent: AtomicBool,
    /// Wakes the connection's task.
    pub(super) task: AtomicWaker,
    /// Progress reads, and writes for which the client made room.
    activity: AtomicU64,
    /// Whether the last write waits for room.
    is_full: AtomicBool,
    /// Whether `heard` is waited for.
    is_asked: AtomicBool,
    /// At the next activity, and at the end.
    heard: Notify,
    is_closed: AtomicBool,
    watch: Mutex<Watch>,
}

struct Watch {
    sent: Frames,
    received: Frames,
    streams: HashMap<u32, Watched>,
    /// Streams of which a delivery was written after the last PING.
    unconfirmed: Vec<u32>,
    /// PINGs without an answer, with the streams and the bytes of each that went before. At most two: ours and the library's.
    outstanding: VecDeque<(Opaque, Vec<(u32, u64)>)>,
}

struct Watched {
    progress: Arc<Progress>,
    written: u64,
    is_unconfirmed: bool,
}

/// Ends the progress of a stream.
fn close(streams: &mut HashMap<u32, Watched>, stream: u32) {
    if let Some(watched) = streams.remove(&stream) {
        watched.progress.close();
    }
}

impl WatchedConnection {
    /// `preface` bytes are received before the first frame; none are sent.
    pub(super) fn new(preface: usize) -> Arc<Self> {
        let watch = Watch {
            sent: Frames::after(0),
            received: Frames::after(preface),
            streams: HashMap::new(),
            unconfirmed: Vec::new(),
            outstanding: VecDeque::new(),
        };
        Arc::new(Self {
            is_urgent: AtomicBool::new(false),
            task: AtomicWaker::new(),
            activity: AtomicU64::new(0),
            is_full: AtomicBool::new(false),
            is_asked: AtomicBool::new(false),
            heard: Notify::new(),
            is_closed: AtomicBool::new(false),
            watch: Mutex::new(watch),
        })
    }

    fn watch(&self) -> MutexGuard<'_, Watch> {
        // Each section leaves a consistent value: nothing in it can panic half way.
        self.watch.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Watches a stream, of which nothing is written yet.
    pub(super) fn arrivals(self: &Arc<Self>, stream: u32) -> Arrivals {
        let progress: Arc<Progress> = Arc::default();
        let watched = Watched { progress: progress.clone(), written: 0, is_unconfirmed: false };
        self.watch().streams.insert(stream, watched);
        Arrivals { line: self.clone(), stream, progress }
    }

    /// Whether a delivery was written after the last PING.
    pub(super) fn is_unconfirmed(&self) -> bool {
        !self.watch().unconfirmed.is_empty()
    }

    /// Whether the next PING is sent now; false from then on.
    pub(super) fn take_urgent(&self) -> bool {
        self.is_urgent.swap(false, AcqRel)
    }

    /// Whether the last write waits for room.
    pub(super) fn is_full(&self) -> bool {
        self.is_full.load(Relaxed)
    }

    /// Changes with every read, and every write for which the client made room.
    pub(super) fn activity(&self) -> u64 {
        self.activity.load(Relaxed)
    }

    /// Whether a PING is sent now to hear of the client.
    pub(super) fn is_asked(&self) -> bool {
        self.is_asked.load(Relaxed)
    }

    /// Called by the connection's task only.
    fn note_activity(&self) {
        self.activity.store(self.activity.load(Relaxed).wrapping_add(1), Relaxed);
        fence(SeqCst);
        if self.is_asked.load(Relaxed) {
            self.is_asked.store(false, Relaxed);
            self.heard.notify_waiters();
        }
    }

    fn close(&self) {
        self.is_closed.store(true, Release);
        self.heard.notify_waiters();
        for (_, watched) in self.watch().streams.drain() {
            watched.progress.close();
        }
    }

    fn note_write(&self, is_full: bool) {
        if self.is_full.load(Relaxed) != is_full {
            self.is_full.store(is_full, Relaxed);
            if !is_full {
                self.note_activity();
            }
        }
    }

    fn sent(&self, bytes: &[u8]) {
        let watch = &mut *self.watch();
        let Watch { sent, streams, unconfirmed, outstanding, .. } = watch;
        sent.follow(bytes, |seen| match seen {
            Seen::Data { stream, bytes } => {
                if let Some(watched) = streams.get_mut(&stream) {
                    let is_wanted = watched.progress.wanted.load(Acquire) > watched.written;
                    watched.written += bytes as u64;
                    if is_wanted && !std::mem::replace(&mut watched.is_unconfirmed, true) {
                        unconfirmed.push(stream);
                    }
                }
            }
            Seen::Ping { is_answer: false, opaque } => {
                let written = unconfirmed.drain(..).filter_map(|stream| {
                    let watched = streams.get_mut(&stream)?;
                    watched.is_unconfirmed = false;
                    Some((stream, watched.written))
                });
                outstanding.push_back((opaque, written.collect()));
            }
            Seen::Reset { stream } => close(streams, stream),
            Seen::Ping { .. } => {}
        });
    }

    fn received(&self, bytes: &[u8]) {
        self.note_activity();
        let watch = &mut *self.watch();
        let Watch { received, streams, outstanding, .. } = watch;
        let mut arrived = Vec::new();
        received.follow(bytes, |seen| match seen {
            Seen::Ping { is_answer: true, opaque } => {
                if let Some(at) = outstanding.iter().position(|(outstanding, _)| *outstanding == opaque) {
                    arrived.extend(outstanding.remove(at).into_iter().flat_map(|(_, written)| written));
                }
            }
            Seen::Reset { stream } => close(streams, stream),
            _ => {}
        });
        // After all of it is read: a client that resets a stream discards its data, and may answer a PING first.
        for (stream, written) in arrived {
            if let Some(watched) = streams.get(&stream) {
                watched.progress.arrived.fetch_max(written, Release);
                watched.progress.changed.notify_waiters();
            }
        }
    }
}

/// The transport of a connection, watched.
pub(super) struct Watching<S> {
    stream: S,
    line: Arc<WatchedConnection>,
}

impl<S> Watching<S> {
    pub(super) fn new(stream: S, line: Arc<WatchedConnection>) -> Self {
        Self { stream, line }
    }
}

impl<S> Drop for Watching<S> {
    fn drop(&mut self) {
        self.line.close();
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Watching<S> {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, into: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let before = into.filled().len();
        let read = Pin::new(&mut self.stream).poll_read(cx, into);
        if let Some(new @ [_, ..]) = into.filled().get(before..) {
            self.line.received(new);
        }
        read
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Watching<S> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        let written = Pin::new(&mut self.stream).poll_write(cx, bytes);
        self.line.note_write(written.is_pending());
        if let Poll::Ready(Ok(count)) = written {
            self.line.sent(&bytes[..count.min(bytes.len())]);
        }
        written
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        slices: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let written = Pin::new(&mut self.stream).poll_write_vectored(cx, slices);
        self.line.note_write(written.is_pending());
        if let Poll::Ready(Ok(mut count)) = written {
            for slice in slices {
                let taken = count.min(slice.len());
                self.line.sent(&slice[..taken]);
                count -= taken;
            }
        }
        written
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let flushed = Pin::new(&mut self.stream).poll_flush(cx);
        self.line.note_write(flushed.is_pending());
        flushed
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

    fn frame(kind: u8, flags: u8, stream: u8, payload: &[u8]) -> Vec<u8> {
        let length = u32::try_from(payload.len()).unwrap().to_be_bytes();
        // The first bit of a stream's number means nothing.
        [&length[1..], &[kind, flags, 0x80, 0, 0, stream], payload].concat()
    }

    fn ping(flags: u8, number: u8) -> Vec<u8> {
        frame(PING, flags, 0, &[number; 8])
    }

    #[test]
    fn an_answer_to_a_ping_tells_what_went_before_it() {
        let line = WatchedConnection::new(PREFACE.len());
        let (one, other) = (line.arrivals(1), line.arrivals(3));
        let arrived = || [&one, &other].map(Arrivals::arrived);
        one.confirm_up_to(10);
        line.received(PREFACE);
        line.sent(&[frame(DATA, 0, 1, &[0; 10]), frame(DATA, 0, 5, &[0; 7]), ping(0, 1)].concat());
        assert!(!line.is_unconfirmed());
        line.sent(&frame(DATA, 0, 3, &[0; 300]));
        assert!(!line.is_unconfirmed(), "no delivery is in it");
        one.confirm_up_to(12);
        line.sent(&frame(DATA, 0, 1, &[0; 1]));
        assert!(line.is_unconfirmed());
        line.sent(&ping(0, 2));
        line.received(&ping(ACK, 9));
        assert_eq!(arrived(), [0, 0], "of no PING");
        line.received(&ping(ACK, 1));
        assert_eq!(arrived(), [10, 0]);
        line.received(&ping(ACK, 2));
        assert_eq!(arrived(), [11, 0]);
        other.confirm_up_to(600);
        line.sent(&[frame(DATA, 0, 3, &[0; 300]), ping(0, 3)].concat());
        // A client that resets a stream answers the PING after its data, too, and may do so before the reset.
        line.received(&[ping(ACK, 3), frame(RST_STREAM, 0, 3, &[0; 4])].concat());
        assert_eq!(arrived(), [11, 0], "it discards what it has reset");
        assert_eq!([&one, &other].map(Arrivals::is_over), [false, true]);
        drop(other);
        drop(Watching::new((), line.clone()));
        assert!(one.is_over());
        drop(one);
        assert!(line.watch().streams.is_empty());
    }

    #[test]
    fn a_ping_of_another_length_is_nothing() {
        let (mut frames, mut all) = (Frames::after(0), Vec::new());
        for length in [0, 1, 7, 9, 300] {
            for byte in frame(PING, ACK, 0, &vec![1; length]) {
                frames.follow(&[byte], |seen| all.push(seen));
            }
        }
        assert_eq!(all, []);
    }

    proptest! {
        #[test]
        fn frames_are_seen_however_they_are_cut(
            all in proptest::collection::vec((0..8_u8, 0..40_usize), 1..12),
            cuts in proptest::collection::vec(1..20_usize, 1..60),
        ) {
            let bytes: Vec<u8> = all.iter().enumerate().flat_map(|(n, (kind, length))| {
                let length = if *kind == PING { 8 } else { *length };
                frame(*kind, ACK, n as u8, &vec![n as u8; length])
            }).collect();
            let see = |pieces: &mut dyn Iterator<Item = usize>| {
                let (mut frames, mut left, mut data, mut others) = (Frames::after(3), &[&[0; 3], &bytes[..]].concat()[..], [0; 12], vec![]);
                while !left.is_empty() {
                    let (piece, rest) = left.split_at(pieces.next().unwrap_or(usize::MAX).min(left.len()));
                    frames.follow(piece, |seen| match seen {
                        Seen::Data { stream, bytes } => data[stream as usize] += bytes,
                        other => others.push(other),
                    });
                    left = rest;
                }
                (data, others)
            };
            let whole = see(&mut std::iter::empty());
            prop_assert_eq!(&whole, &see(&mut cuts.into_iter()));
            for (n, (kind, length)) in all.iter().enumerate() {
                prop_assert_eq!(whole.0[n], if *kind == DATA { *length } else { 0 });
            }
            let pings = all.iter().filter(|(kind, _)| *kind == PING).count();
            let resets = all.iter().filter(|(kind, length)| *kind == RST_STREAM && *length > 0).count();
            prop_assert_eq!(whole.1.len(), pings + resets);
        }
    }
}

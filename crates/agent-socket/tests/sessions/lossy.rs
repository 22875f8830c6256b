//! Both sides over a transport that loses, delays, repeats and cuts.

use std::{
    collections::{HashMap, VecDeque},
    pin::Pin,
    sync::{Arc, Mutex},
    task::{Context, Poll, ready},
    time::Duration,
};

use proptest::prelude::*;
use serde_json::json;
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    time::{Instant, sleep, timeout},
};
use trunkline_agent_socket::{
    Close, Envelope, Meta, Type,
    client::{Client, Connector, Options},
    parse,
    server::Server,
    store::{EventStore as _, MemoryStore},
    transport::{
        Broken, Frame, MemoryReceiver, MemorySender, MemoryTransport, Receiver, Sender, Transport,
        websocket::{self, WebSocket},
    },
};

use crate::support::{Echo, emit, options};

/// What goes wrong, by chance that can be repeated.
struct Faults {
    random: fastrand::Rng,
    /// Until then.
    until: Instant,
    /// Of a hundred frames.
    lost: u8,
    cut: u8,
    late: u8,
    /// Events that came over the last connection, and may come again over the next.
    recent: VecDeque<bytes::Bytes>,
}

impl Faults {
    fn strikes(&mut self, percent: u8) -> bool {
        Instant::now() < self.until && self.random.u8(..100) < percent
    }
}

type Shared = Arc<Mutex<Faults>>;

struct Lossy(MemoryTransport, Shared);

struct LossySender(MemorySender, Shared, bool);

struct LossyReceiver(MemoryReceiver, Shared, VecDeque<bytes::Bytes>);

impl Transport for Lossy {
    type Sender = LossySender;
    type Receiver = LossyReceiver;

    fn split(self) -> (LossySender, LossyReceiver) {
        let (sender, receiver) = self.0.split();
        let again = self.1.lock().unwrap().recent.drain(..).collect();
        (LossySender(sender, self.1.clone(), true), LossyReceiver(receiver, self.1, again))
    }
}

impl Sender for LossySender {
    async fn feed(&mut self, frame: String) -> Result<(), Broken> {
        // A connection that loses the first frame is one that was never there.
        let is_first = std::mem::take(&mut self.2);
        let (is_lost, is_cut) = {
            let mut faults = self.1.lock().unwrap();
            let (lost, cut) = (faults.lost, faults.cut);
            (!is_first && faults.strikes(lost), faults.strikes(cut))
        };
        if is_cut {
            return Err("cut".into());
        }
        if is_lost { Ok(()) } else { self.0.feed(frame).await }
    }

    async fn flush(&mut self) -> Result<(), Broken> {
        self.0.flush().await
    }

    async fn ping(&mut self) -> Result<(), Broken> {
        self.0.ping().await
    }

    async fn close(&mut self, close: Close) {
        self.0.close(close).await;
    }
}

impl Receiver for LossyReceiver {
    async fn next(&mut self) -> Option<Result<Frame, Broken>> {
        if let Some(again) = self.2.pop_front() {
            return Some(Ok(Frame::Envelope(again)));
        }
        loop {
            let frame = self.0.next().await?;
            let (is_lost, is_cut, is_late) = {
                let mut faults = self.1.lock().unwrap();
                let (lost, cut, late) = (faults.lost, faults.cut, faults.late);
                (faults.strikes(lost), faults.strikes(cut), faults.strikes(late))
            };
            if is_cut {
                return Some(Err("cut".into()));
            }
            let Ok(Frame::Envelope(bytes)) = &frame else { return Some(frame) };
            if is_lost {
                continue;
            }
            if is_late {
                // Cancelled, it would be one that is lost.
                sleep(Duration::from_millis(700)).await;
            }
            if parse(bytes).is_ok_and(|envelope| envelope.seq.is_some()) {
                let mut faults = self.1.lock().unwrap();
                faults.recent.push_back(bytes.clone());
                if faults.recent.len() > 4 {
                    faults.recent.pop_front();
                }
            }
            return Some(frame);
        }
    }
}

fn lossy(server: &Server<Echo>, faults: Faults) -> impl Connector {
    let (server, faults) = (server.clone(), Arc::new(Mutex::new(faults)));
    move || {
        let (server, faults) = (server.clone(), faults.clone());
        async move {
            let (here, there) = MemoryTransport::pair();
            tokio::spawn(async move { server.serve(there).await });
            Ok::<_, Broken>(Lossy(here, faults))
        }
    }
}

/// A stream of bytes that ends behind any of them.
struct Cut<S>(S, usize);

impl<S> Cut<S> {
    fn broken() -> std::io::Error {
        std::io::Error::from(std::io::ErrorKind::ConnectionReset)
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Cut<S> {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<std::io::Result<()>> {
        if self.1 == 0 {
            return Poll::Ready(Err(Self::broken()));
        }
        let mut part = buf.take(self.1);
        ready!(Pin::new(&mut self.0).poll_read(cx, &mut part))?;
        let read = part.filled().len();
        buf.advance(read);
        self.1 -= read;
        Poll::Ready(Ok(()))
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Cut<S> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<std::io::Result<usize>> {
        if self.1 == 0 {
            return Poll::Ready(Err(Self::broken()));
        }
        let most = buf.len().min(self.1);
        let written = ready!(Pin::new(&mut self.0).poll_write(cx, &buf[..most]))?;
        self.1 -= written;
        Poll::Ready(Ok(written))
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<std::io::Result<()>> {
        Pin::new(&mut self.0).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<std::io::Result<()>> {
        Pin::new(&mut self.0).poll_shutdown(cx)
    }
}

/// WebSockets that are cut behind any byte.
fn cut(server: &Server<Echo>, seed: u64, bytes_max: usize, until: Instant) -> impl Connector {
    let (server, random) = (server.clone(), Arc::new(Mutex::new(fastrand::Rng::with_seed(seed))));
    move || {
        let (server, random) = (server.clone(), random.clone());
        async move {
            let is_over = Instant::now() >= until;
            let bytes = || if is_over { usize::MAX } else { random.lock().unwrap().usize(..bytes_max) };
            let (here, there) = tokio::io::duplex(4096);
            let (here, there) = (Cut(here, bytes()), Cut(there, bytes()));
            tokio::spawn(async move {
                let Ok(socket) = websocket::accept(there, 1024 * 1024).await else { return };
                // Whoever was cut comes back.
                let _ = server.serve(socket).await;
            });
            let (socket, _) = tokio_tungstenite::client_async("ws://localhost/agent-socket", here).await?;
            Ok::<_, Broken>(WebSocket::new(socket))
        }
    }
}

/// What a client saw is what is kept.
fn agree(seen: &[Envelope], all: &[Envelope]) {
    let texts = |events: &[Envelope]| {
        let mut texts: HashMap<String, String> = HashMap::new();
        for event in events.iter().filter(|event| event.kind == Type::TurnTextDelta) {
            let text = texts.entry(event.turn_id.clone().unwrap()).or_default();
            text.push_str(event.value()["delta"].as_str().unwrap());
        }
        texts
    };
    assert_eq!(texts(seen), texts(all), "every piece once");
    let others = |events: &[Envelope]| -> Vec<_> {
        let whole = events.iter().filter(|event| event.kind != Type::TurnTextDelta);
        whole.map(|event| (event.seq, event.kind)).collect()
    };
    assert_eq!(others(seen), others(all), "every other event once, in order");
    assert!(seen.windows(2).all(|pair| pair[0].seq < pair[1].seq));
}

async fn converge(
    (store, server, echo): (Arc<MemoryStore>, Server<Echo>, Echo),
    connect: impl Connector,
    until: Instant,
    turns: usize,
) {
    let (client, run) = Client::new(Options::new("c"), connect);
    let run = tokio::spawn(run);
    let seen = Arc::new(Mutex::new(Vec::new()));
    let sees = seen.clone();
    client.on_any(move |envelope| {
        if envelope.seq.is_some() {
            sees.lock().unwrap().push(envelope.clone());
        }
    });
    for turn in 0..turns {
        client.start_turn(&json!({"text": "hi"}), &format!("t-{turn}")).await.unwrap();
        client.resolve_approval("o", &json!({"answer": turn})).await.unwrap();
        client.send(Type::AttachmentReady, &json!({"file": turn}), Meta::default()).await.unwrap();
        for piece in 0..10 {
            emit(&server, "c", Type::TurnTextDelta, json!({"delta": piece.to_string()}), "other").await;
        }
        sleep(Duration::from_secs(2)).await;
    }
    // Everything arrives when the faults are over.
    let ended = turns * 15;
    let mut latest = 0;
    let had = || {
        let mut had: Vec<String> =
            echo.asked.lock().unwrap().iter().map(|(kind, _, what)| format!("{kind} {what}")).collect();
        had.sort();
        had
    };
    let each = |turn| {
        let requests = [
            ("turn_start", json!({"text": "hi"})),
            ("approval_resolve", json!({"answer": turn})),
            ("attachment_ready", json!({"file": turn})),
        ];
        requests.map(|(kind, what)| format!("{kind} {what}"))
    };
    let mut expected: Vec<_> = (0..turns).flat_map(each).collect();
    expected.sort();
    for _ in 0..600 {
        sleep(Duration::from_secs(1)).await;
        latest = store.latest_seq("c").await.unwrap();
        if latest >= ended as u64 && client.seq() == latest && had().len() >= expected.len() && Instant::now() > until {
            break;
        }
    }
    assert_eq!(latest, ended as u64, "each turn ran once");
    assert_eq!(had(), expected, "each request was taken once");
    assert_eq!(client.seq(), latest);
    let all = store.get_since("c", 0).await.unwrap();
    agree(&seen.lock().unwrap(), &all);
    let state = server.state("c").await.unwrap();
    assert_eq!(client.view().borrow().state, Some(state));
    drop(client);
    let _ = timeout(Duration::from_secs(60), run).await.unwrap().unwrap();
}

fn paused(run: impl Future<Output = ()>) {
    let mut runtime = tokio::runtime::Builder::new_current_thread();
    runtime.enable_all().start_paused(true).build().unwrap().block_on(run);
}

fn beginning() -> ((Arc<MemoryStore>, Server<Echo>, Echo), Instant) {
    let (store, echo) = (Arc::new(MemoryStore::default()), Echo::default());
    let server = Server::new(store.clone(), echo.clone(), options("g1"));
    ((store, server, echo), Instant::now() + Duration::from_secs(120))
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 256, failure_persistence: None, ..ProptestConfig::default() })]
    #[test]
    fn both_sides_agree_in_the_end(
        seed in any::<u64>(),
        lost in 0..25_u8,
        cut in 0..8_u8,
        late in 0..20_u8,
        turns in 1..12_usize,
    ) {
        paused(async {
            let (sides, until) = beginning();
            let random = fastrand::Rng::with_seed(seed);
            let faults = Faults { random, until, lost, cut, late, recent: VecDeque::new() };
            let connect = lossy(&sides.1, faults);
            converge(sides, connect, until, turns).await;
        });
    }

    #[test]
    fn wherever_it_is_cut(seed in any::<u64>(), bytes_max in 1..20_000_usize, turns in 1..12_usize) {
        paused(async {
            let (sides, until) = beginning();
            let connect = cut(&sides.1, seed, bytes_max, until);
            converge(sides, connect, until, turns).await;
        });
    }
}

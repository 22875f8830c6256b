//! Sandboxes under load, over plain HTTP with the bytes read as they come, durable with fsync; beside a bare axum server that
//! hands what is posted to who listens through axum's own `Sse`, in the same run.
//!
//! Run by `cargo xtask bench sandbox [section …]`; sections are named in `main`.

#![allow(
    clippy::disallowed_methods,
    clippy::expect_used,
    clippy::panic,
    clippy::print_stdout,
    clippy::unwrap_used,
    dead_code,
    reason = "bench code; shares a part with the others"
)]

mod peer;

use std::{
    collections::{HashMap, VecDeque},
    net::SocketAddr,
    process::Command,
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};

use axum::{
    Router,
    extract::{Path, State},
    http::StatusCode,
    response::{
        IntoResponse as _, Response,
        sse::{Event, Sse},
    },
    routing::{get, post},
};
use bytes::Bytes;
use futures_util::stream;
use hdrhistogram::Histogram;
use peer::{Peer, Stream};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{TcpListener, TcpStream},
    sync::broadcast,
    task::JoinSet,
};
use tokio_stream::StreamExt as _;
use trunkline_proto::v1::{
    KvOperation,
    downstream_message::Payload as Down,
    kv_operation::{OpType, Scope},
    upstream_message::Payload as Up,
};

#[global_allocator]
static ALLOCATOR: tikv_jemallocator::Jemalloc = tikv_jemallocator::Jemalloc;

/// Set for the process that is the bare server.
const BARE: &str = "TRUNKLINE_BENCH_BARE";

/// How long deltas are posted before it counts.
const WARM: Duration = Duration::from_secs(3);

/// How long deltas are posted.
const MEASURE: Duration = Duration::from_secs(5);

/// Sessions that are told to at once, deltas in one request, and bytes of one.
const SESSIONS: usize = 64;
const BATCH: usize = 20;
const DELTA_BYTES: usize = 40;

/// What deltas are made of, and nothing else on the wire is.
const MARK: u8 = b'~';

fn main() {
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().unwrap();
    if std::env::var_os(BARE).is_some() {
        return runtime.block_on(bare());
    }
    let is_wanted = peer::wanted();
    if is_wanted("deltas") {
        runtime.block_on(deltas());
    }
    if is_wanted("beside") {
        runtime.block_on(beside());
    }
    if is_wanted("viewers") {
        runtime.block_on(viewers());
    }
    if is_wanted("history") {
        runtime.block_on(history());
    }
    if is_wanted("idle") {
        runtime.block_on(idle());
    }
}

/// Hands what is posted to a session to who listens to it, as one event each, and nothing else.
async fn bare() {
    type Rooms = Arc<Mutex<HashMap<String, broadcast::Sender<Bytes>>>>;
    fn room(rooms: &Rooms, id: String) -> broadcast::Sender<Bytes> {
        rooms.lock().unwrap().entry(id).or_insert_with(|| broadcast::channel(4096).0).clone()
    }
    async fn tell(State(rooms): State<Rooms>, Path(id): Path<String>, body: Bytes) -> StatusCode {
        // Nobody may listen.
        let _ = room(&rooms, id).send(body);
        StatusCode::ACCEPTED
    }
    async fn watch(State(rooms): State<Rooms>, Path(id): Path<String>) -> Response {
        let events = stream::unfold(room(&rooms, id).subscribe(), |mut heard| async move {
            let body = heard.recv().await.ok()?;
            let event = Event::default().event("artifact_updated").id("1").data(str::from_utf8(&body).unwrap());
            Some((Ok::<_, std::convert::Infallible>(event), heard))
        });
        Sse::new(events).into_response()
    }
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    println!("ready grpc={0} http={0} ops={0}", listener.local_addr().unwrap());
    let router = Router::new()
        .route("/sessions/{id}", post(|| async { StatusCode::CREATED }))
        .route("/sessions/{id}/events", post(tell))
        .route("/sessions/{id}/stream", get(watch));
    let listener = axum::serve::ListenerExt::tap_io(listener, |stream| stream.set_nodelay(true).unwrap());
    axum::serve(listener, router.with_state(Rooms::default())).await.unwrap();
}

fn bare_peer() -> Peer {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.env(BARE, "1");
    Peer::start(command, tempfile::tempdir().unwrap())
}

/// A connection that posts.
struct Poster {
    stream: TcpStream,
    address: SocketAddr,
    answer: Vec<u8>,
}

impl Poster {
    async fn connect(address: SocketAddr) -> Self {
        let stream = TcpStream::connect(address).await.unwrap();
        stream.set_nodelay(true).unwrap();
        Self { stream, address, answer: vec![0; 4096] }
    }

    async fn post(&mut self, path: &str, body: &[u8]) {
        let head = format!("POST {path} HTTP/1.1\r\nhost: {}\r\ncontent-length: {}\r\n\r\n", self.address, body.len());
        self.stream.write_all(&[head.as_bytes(), body].concat()).await.unwrap();
        let mut got = 0;
        loop {
            let read = self.stream.read(&mut self.answer[got..]).await.unwrap();
            assert!(read > 0, "the server ended the connection");
            got += read;
            let text = std::str::from_utf8(&self.answer[..got]).unwrap();
            if let Some((head, body)) = text.split_once("\r\n\r\n") {
                assert!(head.starts_with("HTTP/1.1 20"), "{text}");
                let length = head.lines().find_map(|line| line.strip_prefix("content-length: "));
                if body.len() >= length.map_or(0, |length| length.parse().unwrap()) {
                    return;
                }
            }
        }
    }
}

/// A connection that listens.
async fn listen(address: SocketAddr, path: &str) -> TcpStream {
    let mut stream = TcpStream::connect(address).await.unwrap();
    stream.set_nodelay(true).unwrap();
    stream.write_all(format!("GET {path} HTTP/1.1\r\nhost: {address}\r\n\r\n").as_bytes()).await.unwrap();
    // The head, and what a stream begins with.
    let mut head = Vec::new();
    while !head.windows(4).any(|end| end == b"\r\n\r\n") {
        assert!(stream.read_buf(&mut head).await.unwrap() > 0);
    }
    stream
}

/// Every so many requests, another text begins.
const TEXT_REQUESTS: usize = 50;

/// As [`batch`], behind something that ends the text before.
fn new_text() -> Vec<u8> {
    let begin = b"[{\"type\":\"user_prompt\",\"text\":\"go on\"},";
    [begin, &batch()[1..]].concat()
}

fn batch() -> Vec<u8> {
    let delta = String::from_utf8(vec![MARK; DELTA_BYTES]).unwrap();
    let event = format!("{{\"type\":\"text_delta\",\"delta\":\"{delta}\"}}");
    format!("[{}]", vec![event; BATCH].join(",")).into_bytes()
}

/// One poster and one viewer a session.
async fn deltas() {
    println!("\n-- {BATCH} deltas of {DELTA_BYTES} B a request, {SESSIONS} sessions, one viewer each --");
    let (own, own_cpu) = deltas_at(&Peer::trunkline(), "trunkline").await;
    let (bare, bare_cpu) = deltas_at(&bare_peer(), "bare axum, nothing kept").await;
    println!(
        "{:.0} % of the bare server's rate; {:.2} us of server CPU a delta beside {:.2}",
        100.0 * own / bare,
        own_cpu * 1e6,
        bare_cpu * 1e6
    );
}

async fn deltas_at(peer: &Peer, name: &str) -> (f64, f64) {
    let (address, mut work) = (peer.http, JoinSet::new());
    // What is told before `begun` makes it warm and is not counted.
    let begun = Instant::now() + WARM;
    for session in 0..SESSIONS {
        work.spawn(async move {
            let mut poster = Poster::connect(address).await;
            poster.post(&format!("/sessions/s{session}"), b"").await;
            let mut stream = listen(address, &format!("/sessions/s{session}/stream")).await;
            let sent = Arc::new(Mutex::new((VecDeque::new(), false)));
            let sends = sent.clone();
            let posting = tokio::spawn(async move {
                let (path, body, new) = (format!("/sessions/s{session}/events"), batch(), new_text());
                let mut count = 0;
                while Instant::now() < begun + MEASURE {
                    count += 1;
                    sends.lock().unwrap().0.push_back(Instant::now());
                    poster.post(&path, if count % TEXT_REQUESTS == 0 { &new } else { &body }).await;
                }
                sends.lock().unwrap().1 = true;
            });
            let (mut seen, mut latencies) = (0, Histogram::<u64>::new(3).unwrap());
            let mut buffer = vec![0; 64 * 1024];
            let (mut batches, mut counted) = (0, 0);
            loop {
                {
                    let sent = sent.lock().unwrap();
                    if sent.1 && sent.0.is_empty() {
                        break;
                    }
                }
                let Ok(read) = tokio::time::timeout(Duration::from_millis(100), stream.read(&mut buffer)).await else {
                    continue;
                };
                let read = read.unwrap();
                assert!(read > 0, "the stream ended");
                seen += buffer[..read].iter().filter(|byte| **byte == MARK).count();
                let mut sent = sent.lock().unwrap();
                while seen >= (batches + 1) * BATCH * DELTA_BYTES {
                    batches += 1;
                    let at: Instant = sent.0.pop_front().unwrap();
                    if at >= begun {
                        counted += 1;
                        latencies.record(at.elapsed().as_micros() as u64).unwrap();
                    }
                }
            }
            posting.await.unwrap();
            (counted * BATCH, latencies)
        });
    }
    tokio::time::sleep_until(begun.into()).await;
    let cpu = peer.cpu();
    let (mut count, mut all) = (0, Histogram::<u64>::new(3).unwrap());
    while let Some(done) = work.join_next().await {
        let (deltas, latencies) = done.unwrap();
        count += deltas;
        all.add(latencies).unwrap();
    }
    let (took, cpu) = (begun.elapsed().as_secs_f64(), (peer.cpu() - cpu).as_secs_f64());
    let rate = count as f64 / took;
    let (p50, p99) = (all.value_at_quantile(0.5) as f64 / 1000.0, all.value_at_quantile(0.99) as f64 / 1000.0);
    println!("{name:<26} {rate:>10.0} deltas/s   POST to SSE p50 {p50:>6.2} ms, p99 {p99:>6.2} ms");
    (rate, cpu / count as f64)
}

/// Keys that an agent puts while sandboxes tell as fast as they can, and much of what they told is written down again and again.
async fn beside() {
    const SESSIONS: usize = 8;
    const PUT_INTERVAL: Duration = Duration::from_millis(20);
    println!("\n-- a key beside {SESSIONS} busy sandboxes --");
    let peer = Peer::trunkline();
    let (mut agent, address, end) = (Stream::open(peer.address, "a").await, peer.http, Instant::now() + 2 * MEASURE);
    let mut work = JoinSet::new();
    for session in 0..SESSIONS {
        work.spawn(async move {
            let mut poster = Poster::connect(address).await;
            poster.post(&format!("/sessions/s{session}"), b"").await;
            let _viewer = listen(address, &format!("/sessions/s{session}/stream")).await;
            let output = format!("{{\"type\":\"tool_output_delta\",\"delta\":\"{}\"}}", "x".repeat(200));
            let tool = format!("[{{\"type\":\"tool_start\",\"name\":\"sh\"}},{output},{{\"type\":\"tool_end\"}}]");
            while Instant::now() < end {
                poster.post(&format!("/sessions/s{session}/events"), tool.as_bytes()).await;
            }
        });
    }
    let (mut took, mut ticks) = (Histogram::<u64>::new(3).unwrap(), tokio::time::interval(PUT_INTERVAL));
    while Instant::now() < end {
        ticks.tick().await;
        let begun = Instant::now();
        let put = KvOperation {
            op: OpType::Put.into(),
            scope: Scope::GlobalExclusive.into(),
            key: "k".into(),
            value: vec![7; 100].into(),
            ..KvOperation::default()
        };
        agent.up.send(peer::frame(Up::KvOp(put.into()))).await.unwrap();
        while !matches!(agent.down.next().await.unwrap().unwrap().payload, Some(Down::Kv(answer)) if answer.success) {}
        took.record(begun.elapsed().as_micros() as u64).unwrap();
    }
    work.join_all().await;
    let at = |share| took.value_at_quantile(share) as f64 / 1000.0;
    println!(
        "{} puts: p50 {:.2} ms, p99 {:.2} ms, longest {:.2} ms (bound 100)",
        took.len(),
        at(0.5),
        at(0.99),
        at(1.0)
    );
}

/// One session, many viewers.
async fn viewers() {
    const VIEWERS: usize = 1000;
    println!("\n-- one session, {VIEWERS} viewers --");
    let own = viewers_at(&Peer::trunkline(), "trunkline", VIEWERS).await;
    let bare = viewers_at(&bare_peer(), "bare axum, nothing kept", VIEWERS).await;
    println!("{:.0} % of the bare server's rate", 100.0 * own / bare);
}

async fn viewers_at(peer: &Peer, name: &str, viewers: usize) -> f64 {
    const POSTS: usize = 500;
    let address = peer.http;
    let mut poster = Poster::connect(address).await;
    poster.post("/sessions/s", b"").await;
    let mut work = JoinSet::new();
    for _ in 0..viewers {
        let mut stream = listen(address, "/sessions/s/stream").await;
        work.spawn(async move {
            let (mut seen, mut buffer) = (0, vec![0; 16 * 1024]);
            while seen < POSTS * BATCH * DELTA_BYTES {
                let read = stream.read(&mut buffer).await.unwrap();
                assert!(read > 0, "the stream ended");
                seen += buffer[..read].iter().filter(|byte| **byte == MARK).count();
            }
        });
    }
    let (begun, body) = (Instant::now(), batch());
    for _ in 0..POSTS {
        poster.post("/sessions/s/events", &body).await;
    }
    while let Some(done) = work.join_next().await {
        done.unwrap();
    }
    let rate = (POSTS * BATCH * viewers) as f64 / begun.elapsed().as_secs_f64();
    println!("{name:<26} {:>10.2} M deltas/s delivered", rate / 1e6);
    rate
}

/// A long session is opened: by the first who looks since the server was started, and by the next.
async fn history() {
    const EVENTS: usize = 100_000;
    println!("\n-- a session of {EVENTS} events --");
    let dir = tempfile::tempdir().unwrap();
    let peer = Peer::on(dir.path());
    let mut poster = Poster::connect(peer.http).await;
    poster.post("/sessions/s", b"").await;
    let mut turn = vec![
        "{\"type\":\"turn_start\"}".to_owned(),
        "{\"type\":\"user_prompt\",\"text\":\"do something about it\"}".to_owned(),
    ];
    for tool in 0..4 {
        let delta = "{\"type\":\"text_delta\",\"delta\":\"some words about what is done \"}".to_owned();
        turn.extend(vec![delta; 16]);
        turn.push(format!("{{\"type\":\"tool_start\",\"name\":\"sh\",\"input\":{{\"command\":\"ls {tool}\"}}}}"));
        let output = "{\"type\":\"tool_output_delta\",\"delta\":\"a line that a program has printed\\n\"}".to_owned();
        turn.extend(vec![output; 6]);
        turn.push("{\"type\":\"tool_end\",\"result\":\"ok\"}".to_owned());
    }
    turn.extend(vec!["{\"type\":\"usage\",\"tokens\":7}".to_owned(), "{\"type\":\"turn_end\"}".to_owned()]);
    let body = format!("[{}]", turn.join(","));
    for _ in 0..EVENTS / turn.len() {
        poster.post("/sessions/s/events", body.as_bytes()).await;
    }
    let told = (EVENTS / turn.len()) * turn.len();
    let first = first_byte(peer.http).await;
    // Killed, so that nothing is written on the way out.
    drop(peer);
    let begun = Instant::now();
    let peer = Peer::on(dir.path());
    let started = begun.elapsed();
    let cold = first_byte(peer.http).await;
    let warm = first_byte(peer.http).await;
    println!(
        "{told} events: first artifact after {first:.1?}; after a kill {started:.1?} to start and {cold:.1?}, then {warm:.1?}"
    );
}

/// From the request to the first artifact.
async fn first_byte(address: SocketAddr) -> Duration {
    let begun = Instant::now();
    let mut stream = listen(address, "/sessions/s/stream").await;
    let mut text = Vec::new();
    while !text.windows(17).any(|part| part == b"artifact_snapshot") {
        assert!(stream.read_buf(&mut text).await.unwrap() > 0);
    }
    begun.elapsed()
}

/// Viewers to whom nothing is said.
async fn idle() {
    // Both ends of each connection are files of this shell's limit.
    let most = std::env::var("TRUNKLINE_BENCH_IDLE").ok().and_then(|text| text.parse().ok()).unwrap_or(10_000);
    println!("\n-- {most} idle viewers --");
    idle_at(&Peer::trunkline(), "trunkline", most).await;
    idle_at(&bare_peer(), "bare axum, nothing kept", most).await;
}

async fn idle_at(peer: &Peer, name: &str, most: usize) {
    let mut poster = Poster::connect(peer.http).await;
    poster.post("/sessions/s", b"").await;
    poster.post("/sessions/s/events", &batch()).await;
    let first = listen(peer.http, "/sessions/s/stream").await;
    tokio::time::sleep(Duration::from_secs(1)).await;
    let before = peer.resident();
    let mut streams = vec![first];
    let begun = Instant::now();
    for _ in 0..most {
        streams.push(listen(peer.http, "/sessions/s/stream").await);
    }
    let took = begun.elapsed().as_secs_f64();
    tokio::time::sleep(Duration::from_secs(2)).await;
    let each = (peer.resident() - before) as f64 / most as f64 / 1024.0;
    println!("{name:<26} {:>6.0} new ones a second, {each:>5.1} KiB each", most as f64 / took);
}

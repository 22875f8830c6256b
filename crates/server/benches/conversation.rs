//! Conversations under load: from the moment a user posts until the other tab's stream has it, durable with fsync, over plain
//! HTTP with the bytes read as they come; beside a bare axum server that hands what is posted to who listens, and keeps nothing,
//! in the same run.
//!
//! Run by `cargo xtask bench conversation [section …]`; sections are named in `main`.

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
    collections::HashMap,
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
use peer::Peer;
use serde_json::{Value, json};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{TcpListener, TcpStream},
    sync::broadcast,
    task::JoinSet,
    time::sleep,
};

/// Set for the process that is the bare server.
const BARE: &str = "TRUNKLINE_BENCH_BARE";

const KEY: &str = "app_bench";
const SECRET: &str = "0123456789abcdef0123456789abcdef";
const AGENT: &str = "00000000-0000-4000-8000-000000000001";

const WARM: Duration = Duration::from_secs(2);
const MEASURE: Duration = Duration::from_secs(8);

fn main() {
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().unwrap();
    if std::env::var_os(BARE).is_some() {
        return runtime.block_on(bare());
    }
    let is_wanted = peer::wanted();
    if is_wanted("latency") {
        runtime.block_on(latency());
    }
    if is_wanted("rate") {
        runtime.block_on(rate());
    }
    if is_wanted("idle") {
        runtime.block_on(idle());
    }
}

/// Hands what is posted to a conversation to who listens to it.
async fn bare() {
    type Rooms = Arc<Mutex<HashMap<String, broadcast::Sender<Bytes>>>>;
    fn room(rooms: &Rooms, id: String) -> broadcast::Sender<Bytes> {
        rooms.lock().unwrap().entry(id).or_insert_with(|| broadcast::channel(64).0).clone()
    }
    async fn say(State(rooms): State<Rooms>, Path(id): Path<String>, body: Bytes) -> StatusCode {
        // Nobody may listen.
        let _ = room(&rooms, id).send(body);
        StatusCode::OK
    }
    async fn watch(State(rooms): State<Rooms>, Path(id): Path<String>) -> Response {
        let events = stream::unfold(room(&rooms, id).subscribe(), |mut heard| async move {
            let body = heard.recv().await.ok()?;
            let event = Event::default().event("message").id("1").data(str::from_utf8(&body).unwrap());
            Some((Ok::<_, std::convert::Infallible>(event), heard))
        });
        Sse::new(events).into_response()
    }
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    println!("ready grpc={0} http={0} ops={0}", listener.local_addr().unwrap());
    let router = Router::new()
        .route("/api/v2/sessions", post(|| async { format!("{{\"convo_id\":\"{}\"}}", uuid::Uuid::now_v7()) }))
        .route("/api/v2/agent_convos/{id}/stream_message", post(say))
        .route("/api/v2/agent_convos/{id}/events", get(watch));
    let listener = axum::serve::ListenerExt::tap_io(listener, |stream| stream.set_nodelay(true).unwrap());
    axum::serve(listener, router.with_state(Rooms::default())).await.unwrap();
}

fn bare_peer() -> Peer {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.env(BARE, "1");
    Peer::start(command, tempfile::tempdir().unwrap())
}

fn trunkline() -> Peer {
    let dir = tempfile::tempdir().unwrap();
    let mut command = Command::new(env!("CARGO_BIN_EXE_trunkline"));
    command.args(["serve", "--dev", "--grpc", "127.0.0.1:0", "--http", "127.0.0.1:0", "--ops", "127.0.0.1:0"]);
    command.arg("--data-dir").arg(dir.path()).env("TRUNKLINE_LOG", "error");
    let agent = format!(r#"{{ id = "{AGENT}", identity = "ag::bench::bot::one", name = "Bot" }}"#);
    let app = format!(r#"[{{ name = "bench", key = "{KEY}", secret = "{SECRET}", agents = [{agent}] }}]"#);
    command.env("TRUNKLINE__APPS", app);
    for limit in ["MESSAGES", "SESSIONS"] {
        command.env(format!("TRUNKLINE__CONVERSATION__{limit}_PER_MINUTE"), "0");
    }
    Peer::start(command, dir)
}

/// A user with a conversation.
#[derive(Clone)]
struct User {
    http: SocketAddr,
    token: String,
    convo: String,
}

/// A connection on which a user asks.
struct Asks {
    stream: TcpStream,
    user: User,
    answer: Vec<u8>,
}

impl User {
    async fn begin(http: SocketAddr, n: usize) -> Self {
        let token = trunkline::demo::sign(KEY, SECRET, AGENT, &format!("user-{n}"), 3600).unwrap();
        let mut asks = Self { http, token, convo: String::new() }.asks().await;
        let begun: Value = serde_json::from_str(&asks.post("/api/v2/sessions", "").await).unwrap();
        Self { convo: begun["convo_id"].as_str().unwrap().to_owned(), ..asks.user }
    }

    async fn asks(self) -> Asks {
        let stream = TcpStream::connect(self.http).await.unwrap();
        stream.set_nodelay(true).unwrap();
        Asks { stream, user: self, answer: vec![0; 8192] }
    }

    /// A stream of the conversation, behind what it begins with.
    async fn listen(&self) -> TcpStream {
        let mut stream = TcpStream::connect(self.http).await.unwrap();
        stream.set_nodelay(true).unwrap();
        let (convo, token) = (&self.convo, &self.token);
        let head = format!(
            "GET /api/v2/agent_convos/{convo}/events HTTP/1.1\r\nhost: localhost\r\nauthorization: Bearer {token}\r\n\r\n"
        );
        stream.write_all(head.as_bytes()).await.unwrap();
        let mut head = Vec::new();
        while !head.windows(4).any(|end| end == b"\r\n\r\n") {
            assert!(stream.read_buf(&mut head).await.unwrap() > 0);
        }
        assert!(head.starts_with(b"HTTP/1.1 200"), "{}", String::from_utf8_lossy(&head));
        stream
    }
}

impl Asks {
    async fn post(&mut self, path: &str, body: &str) -> String {
        let (token, length) = (&self.user.token, body.len());
        let head = format!(
            "POST {path} HTTP/1.1\r\nhost: localhost\r\nauthorization: Bearer {token}\r\ncontent-length: {length}\r\n\r\n"
        );
        self.stream.write_all((head + body).as_bytes()).await.unwrap();
        let mut got = 0;
        loop {
            let read = self.stream.read(&mut self.answer[got..]).await.unwrap();
            assert!(read > 0, "the server ended the connection");
            got += read;
            let text = std::str::from_utf8(&self.answer[..got]).unwrap();
            if let Some((head, body)) = text.split_once("\r\n\r\n") {
                assert!(head.starts_with("HTTP/1.1 200"), "{text}");
                let length = head.lines().find_map(|line| line.strip_prefix("content-length: "));
                if body.len() >= length.map_or(0, |length| length.parse().unwrap()) {
                    return body.to_owned();
                }
            }
        }
    }
}

/// Says something, and returns when the other tab has it.
async fn say(asks: &mut Asks, tab: &mut TcpStream, n: usize, read: &mut Vec<u8>) -> Duration {
    let text = format!("message {n} of somebody who has a question about an order");
    let path = format!("/api/v2/agent_convos/{}/stream_message", asks.user.convo);
    let (body, mark) = (json!({ "text": text }).to_string(), format!("message {n} of"));
    let begun = Instant::now();
    let seen = async {
        read.clear();
        while !read.windows(mark.len()).any(|part| part == mark.as_bytes()) {
            assert!(tab.read_buf(read).await.unwrap() > 0, "the stream ended");
        }
        begun.elapsed()
    };
    tokio::join!(seen, asks.post(&path, &body)).0
}

async fn latency() {
    println!(
        "\n-- from a POST until the other tab has it; one message a second and conversation, alone without a pause --"
    );
    println!("{:<26} {:>8} {:>10} {:>9} {:>9}", "", "convos", "messages/s", "p50", "p99");
    for convos in [1, 100, 1000] {
        latency_at(&trunkline(), "trunkline, fsync", convos, Duration::from_secs(1)).await;
        latency_at(&bare_peer(), "bare axum, nothing kept", convos, Duration::from_secs(1)).await;
    }
}

/// Every conversation says the next thing when the last one is there.
async fn rate() {
    println!("\n-- as fast as it goes --");
    println!("{:<26} {:>8} {:>10} {:>9} {:>9}", "", "convos", "messages/s", "p50", "p99");
    for convos in [100, 1000] {
        let own = latency_at(&trunkline(), "trunkline, fsync", convos, Duration::ZERO).await;
        let bare = latency_at(&bare_peer(), "bare axum, nothing kept", convos, Duration::ZERO).await;
        println!("{:.0} % of the bare server's rate", 100.0 * own / bare);
    }
}

async fn latency_at(peer: &Peer, name: &str, convos: usize, pause: Duration) -> f64 {
    let pause = if convos == 1 { Duration::ZERO } else { pause };
    let mut work = JoinSet::new();
    let begun = Instant::now() + WARM + Duration::from_millis(convos as u64);
    for n in 0..convos {
        let user = User::begin(peer.http, n).await;
        work.spawn(async move {
            let (mut tab, mut asks) = (user.listen().await, user.asks().await);
            let (mut read, mut took) = (Vec::new(), Vec::new());
            // Not all in the same moment.
            sleep(pause.mul_f64(fastrand::f64())).await;
            for n in 0.. {
                let each = say(&mut asks, &mut tab, n, &mut read).await;
                let now = Instant::now();
                if now >= begun + MEASURE {
                    break;
                }
                if now >= begun {
                    took.push(each);
                }
                sleep(pause.mul_f64(0.5 + fastrand::f64())).await;
            }
            took
        });
    }
    let mut histogram = Histogram::<u64>::new(3).unwrap();
    for took in work.join_all().await {
        took.into_iter().for_each(|took| histogram.record(took.as_micros() as u64).unwrap());
    }
    let (rate, us) = (histogram.len() as f64 / MEASURE.as_secs_f64(), |q| histogram.value_at_quantile(q));
    println!("{name:<26} {convos:>8} {rate:>10.0} {:>6} us {:>6} us", us(0.5), us(0.99));
    rate
}

/// Streams to which nothing is said, of as many users.
async fn idle() {
    // Both ends of each connection are files of this shell's limit.
    let most = std::env::var("TRUNKLINE_BENCH_IDLE").ok().and_then(|text| text.parse().ok()).unwrap_or(10_000);
    println!("\n-- {most} idle streams, each of a user with a conversation --");
    idle_at(&trunkline(), "trunkline", most).await;
    idle_at(&bare_peer(), "bare axum, nothing kept", most).await;
}

async fn idle_at(peer: &Peer, name: &str, most: usize) {
    let mut users = Vec::with_capacity(most);
    let (http, mut begins) = (peer.http, JoinSet::new());
    for n in 0..most {
        begins.spawn(User::begin(http, n));
        if begins.len() == 64 {
            users.push(begins.join_next().await.unwrap().unwrap());
        }
    }
    users.extend(begins.join_all().await);
    // Whatever the first one brings with it is not counted.
    let mut users = users.into_iter();
    let first = users.next().unwrap().listen().await;
    sleep(Duration::from_secs(1)).await;
    let before = peer.resident();
    let (begun, mut streams, mut opens) = (Instant::now(), vec![first], JoinSet::new());
    for user in users {
        opens.spawn(async move { user.listen().await });
        if opens.len() == 16 {
            streams.push(opens.join_next().await.unwrap().unwrap());
        }
    }
    streams.extend(opens.join_all().await);
    let took = begun.elapsed().as_secs_f64();
    sleep(Duration::from_secs(2)).await;
    let each = (peer.resident().saturating_sub(before)) as f64 / most as f64 / 1024.0;
    println!("{name:<26} {:>6.0} new ones a second, {each:>5.1} KiB each", most as f64 / took);
}

//! The socket surface under load: what a runtime tells clients, durable with fsync, until their sockets have it; beside a bare
//! tokio-tungstenite echo of the same frames, in the same run.
//!
//! Run by `cargo xtask bench socket [section …]`; sections are named in `main`.

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
    net::SocketAddr,
    process::Command,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering::Relaxed},
    },
    time::{Duration, Instant},
};

use futures_util::{
    SinkExt as _, StreamExt as _,
    stream::{SplitSink, SplitStream},
};
use peer::Peer;
use serde_json::{Value, json};
use tokio::{
    net::{TcpListener, TcpStream},
    sync::Notify,
    task::JoinSet,
};
use tokio_tungstenite::{
    MaybeTlsStream, WebSocketStream, accept_async_with_config, connect_async_with_config,
    tungstenite::{Message, protocol::WebSocketConfig},
};

/// In which this program is the bare echo.
const BARE: &str = "TRUNKLINE_BENCH_BARE";

const WARM: Duration = Duration::from_secs(1);
const MEASURE: Duration = Duration::from_secs(5);
const DELTA_BYTES: usize = 64;

/// Envelopes that are on their way at most, over all clients.
const ON_THEIR_WAY: usize = 32 * 1024;

/// Frames that are written at once.
const AT_ONCE: usize = 256;

type Socket = WebSocketStream<MaybeTlsStream<TcpStream>>;
type Sends = SplitSink<Socket, Message>;
type Receives = SplitStream<Socket>;

fn main() {
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().unwrap();
    if std::env::var_os(BARE).is_some() {
        return runtime.block_on(bare());
    }
    let is_wanted = peer::wanted();
    if is_wanted("deltas") {
        runtime.block_on(deltas(1));
        runtime.block_on(deltas(1000));
    }
    if is_wanted("replay") {
        runtime.block_on(replay());
    }
    if is_wanted("idle") {
        runtime.block_on(idle());
    }
}

/// Sends back what comes.
async fn bare() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    println!("ready grpc={0} http={0} ops={0}", listener.local_addr().unwrap());
    loop {
        let (stream, _) = listener.accept().await.unwrap();
        tokio::spawn(async move {
            stream.set_nodelay(true).unwrap();
            let socket = accept_async_with_config(stream, Some(config())).await.unwrap();
            let (sends, receives) = socket.split();
            // Whoever goes away ends it.
            let _ = receives.forward(sends).await;
        });
    }
}

fn bare_peer() -> Peer {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.env(BARE, "1");
    Peer::start(command, tempfile::tempdir().unwrap())
}

/// As the server's own.
fn config() -> WebSocketConfig {
    WebSocketConfig::default().read_buffer_size(4 * 1024).write_buffer_size(16 * 1024)
}

/// The clients of a bench read more at once: they are not what is measured.
async fn connect(http: SocketAddr) -> Socket {
    let config = WebSocketConfig::default();
    connect_async_with_config(format!("ws://{http}/agent-socket"), Some(config), true).await.unwrap().0
}

fn envelope(fields: &Value) -> Message {
    let mut envelope = json!({"protocol": "agent-socket", "version": 1, "ts": 1});
    envelope.as_object_mut().unwrap().extend(fields.as_object().unwrap().clone());
    Message::text(envelope.to_string())
}

async fn next(
    socket: &mut (impl futures_util::Stream<Item = Result<Message, tokio_tungstenite::tungstenite::Error>> + Unpin),
) -> Message {
    loop {
        let message = socket.next().await.unwrap().unwrap();
        match message {
            Message::Text(_) => return message,
            Message::Close(_) => panic!("{message}"),
            _ => {}
        }
    }
}

async fn ui(http: SocketAddr, client: &str) -> Socket {
    let mut socket = connect(http).await;
    socket.send(envelope(&json!({"type": "hello", "clientId": client}))).await.unwrap();
    for _ in 0..2 {
        next(&mut socket).await;
    }
    socket
}

async fn runtime(http: SocketAddr) -> Socket {
    let mut socket = connect(http).await;
    let generation = format!("g{}", std::process::id());
    let payload = json!({"role": "runtime", "runtimeGeneration": generation});
    socket.send(envelope(&json!({"type": "hello", "payload": payload}))).await.unwrap();
    next(&mut socket).await;
    socket
}

/// A piece of text for a client. Each has a number in its payload, so that none is joined to another.
fn delta(client: usize, seq: usize) -> Message {
    let text = "~".repeat(DELTA_BYTES);
    Message::text(format!(
        "{{\"protocol\":\"agent-socket\",\"version\":1,\"type\":\"turn_text_delta\",\"clientId\":\"c{client}\",\
         \"turnId\":\"t\",\"seq\":{seq},\"ts\":1,\"payload\":{{\"delta\":\"{text}\",\"n\":{seq}}}}}"
    ))
}

/// How far everybody is.
#[derive(Default)]
struct Flow {
    sent: AtomicUsize,
    seen: AtomicUsize,
    moved: Notify,
    is_over: AtomicBool,
}

impl Flow {
    fn sees(&self) {
        // Whoever sends is told seldom, so that it is not what is measured.
        if self.seen.fetch_add(1, Relaxed).is_multiple_of(64) {
            self.moved.notify_one();
        }
    }
}

async fn deltas(clients: usize) {
    println!("\n-- deltas of {DELTA_BYTES} B, {clients} client(s) --");
    let (own, own_cpu) = own_deltas(clients).await;
    println!("{:<34} {own:>10.0} envelopes/s", "trunkline, runtime to UI, durable");
    let (bare, bare_cpu) = bare_deltas(clients).await;
    println!("{:<34} {bare:>10.0} envelopes/s", "bare tokio-tungstenite echo");
    println!(
        "{:.0} % of the echo; {:.2} us of server CPU an envelope beside {:.2}",
        100.0 * own / bare,
        own_cpu * 1e6,
        bare_cpu * 1e6
    );
}

async fn own_deltas(clients: usize) -> (f64, f64) {
    let peer = Peer::trunkline();
    let (flow, mut work) = (Arc::new(Flow::default()), JoinSet::new());
    for client in 0..clients {
        let (mut socket, flow) = (ui(peer.http, &format!("c{client}")).await, flow.clone());
        work.spawn(async move {
            loop {
                next(&mut socket).await;
                flow.sees();
            }
        });
    }
    let (mut sends, mut acks) = runtime(peer.http).await.split();
    work.spawn(async move {
        loop {
            next(&mut acks).await;
        }
    });
    let sending = flow.clone();
    work.spawn(async move {
        let mut seq = 0;
        while !sending.is_over.load(Relaxed) {
            while sending.sent.load(Relaxed) - sending.seen.load(Relaxed).min(sending.sent.load(Relaxed))
                > ON_THEIR_WAY - AT_ONCE
            {
                sending.moved.notified().await;
            }
            for _ in 0..AT_ONCE {
                seq += 1;
                sends.feed(delta(seq % clients, seq)).await.unwrap();
            }
            sends.flush().await.unwrap();
            sending.sent.store(seq, Relaxed);
        }
        std::future::pending().await
    });
    let measured = measure(&peer, &flow).await;
    // Before the server is gone, which they would complain about.
    work.shutdown().await;
    measured
}

async fn measure(peer: &Peer, flow: &Flow) -> (f64, f64) {
    tokio::time::sleep(WARM).await;
    let (seen, cpu, begun) = (flow.seen.load(Relaxed), peer.cpu(), Instant::now());
    tokio::time::sleep(MEASURE).await;
    let count = (flow.seen.load(Relaxed) - seen) as f64;
    let rate = count / begun.elapsed().as_secs_f64();
    let cpu = (peer.cpu() - cpu).as_secs_f64() / count;
    flow.is_over.store(true, Relaxed);
    (rate, cpu)
}

/// The same frames, back to whoever sends them.
async fn bare_deltas(clients: usize) -> (f64, f64) {
    let peer = bare_peer();
    let (flow, mut work) = (Arc::new(Flow::default()), JoinSet::new());
    let own = (ON_THEIR_WAY / clients).max(8);
    for client in 0..clients {
        let (sends, receives) = connect(peer.http).await.split();
        work.spawn(echoes(sends, receives, flow.clone(), own, client));
    }
    let measured = measure(&peer, &flow).await;
    // Before the server is gone, which they would complain about.
    work.shutdown().await;
    measured
}

async fn echoes(mut sends: Sends, mut receives: Receives, flow: Arc<Flow>, own: usize, client: usize) {
    let (mut sent, mut seen) = (0, 0);
    let at_once = (own / 4).clamp(1, AT_ONCE);
    loop {
        while sent - seen <= own - at_once {
            for _ in 0..at_once {
                sent += 1;
                sends.feed(delta(client, sent)).await.unwrap();
            }
            sends.flush().await.unwrap();
        }
        for _ in 0..at_once {
            next(&mut receives).await;
            flow.sees();
            seen += 1;
        }
    }
}

/// What a client gets that was away.
async fn replay() {
    const EVENTS: usize = 10_000;
    println!("\n-- replay of {EVENTS} events --");
    let peer = Peer::trunkline();
    let mut socket = runtime(peer.http).await;
    for seq in 1..=EVENTS {
        socket.feed(delta(0, seq)).await.unwrap();
    }
    socket.flush().await.unwrap();
    while !next(&mut socket).await.into_text().unwrap().contains(&format!("\"ack\":{EVENTS}")) {}
    for attempt in ["first", "again"] {
        let begun = Instant::now();
        let mut socket = ui(peer.http, "c0").await;
        let welcome = begun.elapsed();
        socket.send(envelope(&json!({"type": "replay_request", "payload": {"since": 0}}))).await.unwrap();
        let (mut seen, mut frames, mut bytes) = (0, 0, 0);
        while seen < EVENTS {
            let text = next(&mut socket).await.into_text().unwrap();
            let part: Value = serde_json::from_str(&text).unwrap();
            seen += part["payload"]["events"].as_array().unwrap().len();
            (frames, bytes) = (frames + 1, bytes + text.len());
        }
        let took = begun.elapsed();
        println!(
            "{attempt:<8} connected and let in after {welcome:>8.1?}, all there after {took:>8.1?} ({frames} frames, {} KiB)",
            bytes / 1024
        );
    }
}

/// Clients to whom nothing is said.
async fn idle() {
    // Both ends of each connection are files of this shell's limit.
    let most = std::env::var("TRUNKLINE_BENCH_IDLE").ok().and_then(|text| text.parse().ok()).unwrap_or(10_000);
    println!("\n-- {most} idle clients --");
    for (name, peer, is_own) in
        [("trunkline", Peer::trunkline(), true), ("bare tokio-tungstenite echo", bare_peer(), false)]
    {
        let mut sockets = Vec::new();
        let open = async |client: usize| {
            if is_own { ui(peer.http, &format!("c{client}")).await } else { connect(peer.http).await }
        };
        // What the first ones need is everybody's.
        for client in 0..100 {
            sockets.push(open(most + client).await);
        }
        tokio::time::sleep(Duration::from_secs(1)).await;
        let (before, begun) = (peer.resident(), Instant::now());
        for client in 0..most {
            sockets.push(open(client).await);
        }
        let took = begun.elapsed().as_secs_f64();
        tokio::time::sleep(Duration::from_secs(2)).await;
        let each = (peer.resident() - before) as f64 / most as f64 / 1024.0;
        println!("{name:<28} {:>6.0} new ones a second, {each:>5.1} KiB each", most as f64 / took);
    }
}

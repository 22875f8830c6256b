//! The agent surface under load, with the generated client: a server of our own, and beside it a bare echo of the same
//! frames in the same run. Both are processes of their own, so that their CPU is known.
//!
//! Run by `cargo xtask bench agent [section …]`; sections are named in `main`.

#![allow(
    clippy::disallowed_methods,
    clippy::expect_used,
    clippy::panic,
    clippy::print_stdout,
    clippy::unwrap_used,
    dead_code,
    reason = "bench code"
)]

mod peer;

use std::{
    net::SocketAddr,
    pin::Pin,
    process::Command,
    sync::atomic::{AtomicUsize, Ordering::SeqCst},
    time::{Duration, Instant},
};

use peer::{Peer, Stream, frame};
use tokio::sync::mpsc;
use tokio_stream::StreamExt as _;
use tonic::{Request, Response, Status, Streaming};
use trunkline_proto::v1::{
    DownstreamMessage, IncomingMessage, KvOperation, MessageType, SendMessage, SwitchWorkspace, UpstreamMessage,
    UserIdentity,
    aether_gateway_server::{AetherGateway, AetherGatewayServer},
    downstream_message::Payload as Down,
    init_connection::ClientType,
    kv_operation::{OpType, Scope},
    upstream_message::Payload as Up,
};

#[global_allocator]
static ALLOCATOR: tikv_jemallocator::Jemalloc = tikv_jemallocator::Jemalloc;

/// Set for the copy of this program that is the echo.
const ECHO: &str = "TRUNKLINE_BENCH_ECHO";

/// How long senders send.
const MEASURE: Duration = Duration::from_secs(3);

fn main() {
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().unwrap();
    if std::env::var_os(ECHO).is_some() {
        return runtime.block_on(echo());
    }
    let is_wanted = peer::wanted();
    if is_wanted("pairs") {
        runtime.block_on(pairs());
    }
    if is_wanted("ping") {
        // One message is under way at a time: more threads on this side would only wake each other.
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(ping_pong());
    }
    if is_wanted("users") {
        runtime.block_on(users());
    }
    if is_wanted("idle") {
        runtime.block_on(idle());
    }
    if is_wanted("kv") {
        runtime.block_on(kv());
    }
    if is_wanted("backlog") {
        runtime.block_on(backlog());
    }
    if is_wanted("flat") {
        runtime.block_on(flat());
    }
}

/// The barest server there is, as a process of its own.
fn echo_peer() -> Peer {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.env(ECHO, "1");
    Peer::start(command, tempfile::tempdir().unwrap())
}

fn message(target: &str) -> UpstreamMessage {
    frame(Up::Send(SendMessage {
        target_topic: target.to_owned(),
        payload: vec![7; 256].into(),
        message_type: MessageType::Opaque.into(),
        ..SendMessage::default()
    }))
}

/// Sends for [`MEASURE`] as fast as flow control allows; answers how many.
async fn send(up: mpsc::Sender<UpstreamMessage>, message: UpstreamMessage) -> usize {
    let (begun, mut sent) = (Instant::now(), 0);
    while begun.elapsed() < MEASURE {
        for _ in 0..64 {
            up.send(message.clone()).await.unwrap();
        }
        sent += 64;
    }
    // The stream stays open until everything was received.
    std::mem::forget(up);
    sent
}

async fn receive(mut down: Streaming<DownstreamMessage>, count: impl Future<Output = usize>) -> usize {
    tokio::pin!(count);
    let (mut received, mut expected) = (0, usize::MAX);
    while received < expected {
        tokio::select! {
            sent = &mut count, if expected == usize::MAX => expected = sent,
            next = down.next() => {
                if let Some(Down::Msg(_)) = next.expect("the stream goes on").unwrap().payload {
                    received += 1;
                }
            }
        }
    }
    received
}

async fn pairs() {
    println!("\n-- agent to agent, 256 B, pipelined; ours durable with fsync --");
    for pairs in [1, 8, 64] {
        let [(echo, _), (ours, cpu)] =
            [measure(&echo_peer(), pairs, true).await, measure(&Peer::trunkline(), pairs, false).await];
        let share = 100.0 * ours / echo;
        println!(
            "{pairs:>3} pairs {ours:>12.0} messages/s {cpu:>8.2} us CPU each {echo:>12.0} bare echo ({share:.0} %)"
        );
    }
}

/// Messages a second over all pairs, and the server's CPU for each in microseconds.
async fn measure(peer: &Peer, pairs: usize, is_echo: bool) -> (f64, f64) {
    // The streams of an earlier run may still be there.
    static RUNS: AtomicUsize = AtomicUsize::new(0);
    let run = RUNS.fetch_add(1, SeqCst);
    let mut streams = Vec::new();
    for n in 0..pairs {
        let sender = Stream::open(peer.address, &format!("s{n}-{run}")).await;
        let receiver = if is_echo { None } else { Some(Stream::open(peer.address, &format!("r{n}-{run}")).await) };
        streams.push((format!("ag::w::b::r{n}-{run}"), sender, receiver));
    }
    let (cpu, begun) = (peer.cpu(), Instant::now());
    let tasks: Vec<_> = streams
        .into_iter()
        .map(|(target, sender, receiver)| {
            tokio::spawn(async move {
                let (down, keep) = match receiver {
                    Some(receiver) => (receiver.down, Some((receiver.up, sender.down))),
                    None => (sender.down, None),
                };
                let sending = tokio::spawn(send(sender.up, message(&target)));
                let received = receive(down, async { sending.await.unwrap() }).await;
                drop(keep);
                received
            })
        })
        .collect();
    let mut received = 0;
    for task in tasks {
        received += task.await.unwrap();
    }
    let elapsed = begun.elapsed();
    let cpu = peer.cpu() - cpu;
    (received as f64 / elapsed.as_secs_f64(), cpu.as_secs_f64() * 1e6 / received as f64)
}

/// One message under way at a time, there and back over two agents.
async fn ping_pong() {
    println!("\n-- ping-pong over two hops, 256 B --");
    for (what, durability) in [("fsync for each", "machine"), ("--durability process", "process")] {
        let times = round_trips(&Peer::durable(durability)).await;
        let at = |share: f64| times[((times.len() - 1) as f64 * share) as usize].as_micros();
        println!("{what:<22} {:>7} round trips: p50 {} us, p99 {} us", times.len(), at(0.5), at(0.99));
    }
}

/// How long each took, sorted.
async fn round_trips(peer: &Peer) -> Vec<Duration> {
    let (mut one, mut two) = (Stream::open(peer.address, "one").await, Stream::open(peer.address, "two").await);
    let answering = tokio::spawn(async move {
        while let Some(Ok(frame)) = two.down.next().await {
            if let Some(Down::Msg(_)) = frame.payload {
                two.up.send(message("ag::w::b::one")).await.unwrap();
            }
        }
    });
    let (begun, mut times) = (Instant::now(), Vec::new());
    while begun.elapsed() < MEASURE {
        let sent = Instant::now();
        one.up.send(message("ag::w::b::two")).await.unwrap();
        while !matches!(one.down.next().await.unwrap().unwrap().payload, Some(Down::Msg(_))) {}
        times.push(sent.elapsed());
    }
    answering.abort();
    times.sort_unstable();
    times
}

/// One sender to every window on a workspace.
async fn users() {
    println!("\n-- one sender to many users, 256 B --");
    for windows in [200, 1000] {
        let peer = Peer::trunkline();
        let mut receivers = Vec::new();
        for n in 0..windows {
            let user = UserIdentity { user_id: format!("u{n}"), window_id: "w".into() };
            let stream = Stream::open_as(peer.address, ClientType::User(user)).await;
            let switch = SwitchWorkspace { new_workspace_id: "w".into() };
            stream.up.send(frame(Up::SwitchWorkspace(switch.into()))).await.unwrap();
            receivers.push(stream);
        }
        for stream in &mut receivers {
            stream.barrier().await;
        }
        let sender = Stream::open(peer.address, "sender").await;
        let messages = 400_000 / windows;
        let begun = Instant::now();
        let tasks: Vec<_> = receivers.into_iter().map(|s| tokio::spawn(delays(s, messages, begun))).collect();
        for _ in 0..messages {
            let mut frame = message("gu::w");
            if let Some(Up::Send(send)) = &mut frame.payload {
                send.payload = format!("{:0256}", begun.elapsed().as_micros()).into();
            }
            sender.up.send(frame).await.unwrap();
        }
        let mut delays = Vec::new();
        for task in tasks {
            delays.extend(task.await.unwrap());
        }
        let rate = delays.len() as f64 / begun.elapsed().as_secs_f64();
        delays.sort_unstable();
        let at = |share: f64| delays[((delays.len() - 1) as f64 * share) as usize] as f64 / 1000.0;
        println!("{windows:>4} users {rate:>12.0} deliveries/s, delay p50 {:.1} ms, p99 {:.1} ms", at(0.5), at(0.99));
    }
}

/// How long messages were under way, in microseconds since each was given to its stream.
async fn delays(stream: Stream, messages: usize, begun: Instant) -> Vec<u64> {
    let Stream { up, mut down } = stream;
    let mut delays = Vec::with_capacity(messages);
    while delays.len() < messages {
        if let Some(Down::Msg(message)) = down.next().await.unwrap().unwrap().payload {
            let sent: u64 = std::str::from_utf8(&message.payload).unwrap().parse().unwrap();
            delays.push(begun.elapsed().as_micros() as u64 - sent);
        }
    }
    drop(up);
    delays
}

/// Connections that say nothing: how fast they come, what each takes.
async fn idle() {
    println!("\n-- connections, 16 at once --");
    // The first run only warms the machine: memory that its host has not given it yet is slow to touch, whoever does.
    for (name, peer) in [("warm-up", echo_peer()), ("bare echo", echo_peer()), ("ours", Peer::trunkline())] {
        let before = peer.resident();
        let begun = Instant::now();
        let streams = open_many(peer.address).await;
        let rate = streams.len() as f64 / begun.elapsed().as_secs_f64();
        let each = (peer.resident() - before) as f64 / streams.len() as f64 / 1000.0;
        println!("{name:<10} {} connections at {rate:>6.0}/s, {each:.1} kB each", streams.len());
    }
}

/// Idle streams. Both processes need a file for each.
const CONNECTIONS: usize = 10_000;

/// [`CONNECTIONS`] agents, 16 connecting at once.
async fn open_many(address: SocketAddr) -> Vec<Stream> {
    let tasks: Vec<_> = (0..16)
        .map(|part| {
            tokio::spawn(async move {
                let mut streams = Vec::new();
                for n in 0..CONNECTIONS / 16 {
                    streams.push(Stream::open(address, &format!("{part}-{n}")).await);
                }
                streams
            })
        })
        .collect();
    let mut streams = Vec::new();
    for task in tasks {
        streams.extend(task.await.unwrap());
    }
    streams
}

/// Whether the number of connections and topics costs anything.
async fn flat() {
    const TOPICS: usize = 1_000_000;
    println!("\n-- 8 pairs as above, alone and among many --");
    let peer = Peer::trunkline();
    // The first run of each only warms it up: files, caches and the allocator settle.
    measure(&peer, 8, false).await;
    let (alone, _) = measure(&peer, 8, false).await;
    drop(peer);
    let peer = Peer::trunkline();
    let mut sender = Stream::open(peer.address, "sender").await;
    for n in 0..TOPICS {
        sender.up.send(message(&format!("ag::w::other::{n}"))).await.unwrap();
    }
    sender.barrier().await;
    let idle = open_many(peer.address).await;
    measure(&peer, 8, false).await;
    let (among, _) = measure(&peer, 8, false).await;
    let share = 100.0 * among / alone;
    println!(
        "alone {alone:.0} messages/s; with {} idle connections, {TOPICS} topics {among:.0} ({share:.0} %)",
        idle.len()
    );
}

/// Messages that wait for an agent which then comes.
async fn backlog() {
    const QUEUED: usize = 100_000;
    println!("\n-- backlog of an absent agent, 256 B --");
    let peer = Peer::trunkline();
    let mut sender = Stream::open(peer.address, "sender").await;
    for n in 0..QUEUED {
        let mut frame = message("ag::w::b::away");
        if let Some(Up::Send(send)) = &mut frame.payload {
            send.payload = format!("{n:0256}").into();
        }
        sender.up.send(frame).await.unwrap();
    }
    sender.barrier().await;
    let begun = Instant::now();
    let mut away = Stream::open(peer.address, "away").await;
    for n in 0..QUEUED {
        let message = loop {
            if let Some(Down::Msg(message)) = away.down.next().await.unwrap().unwrap().payload {
                break message;
            }
        };
        assert_eq!(std::str::from_utf8(&message.payload).unwrap().parse(), Ok(n), "complete and in order");
    }
    println!("{QUEUED} messages, complete, in order: {:>12.0} /s", QUEUED as f64 / begun.elapsed().as_secs_f64());
}

async fn kv() {
    println!("\n-- key-value store over one stream, 64 B; puts durable with fsync --");
    let peer = Peer::trunkline();
    for window in [32, 512] {
        let rate = operations(&peer, OpType::Put, window).await;
        println!("puts, window {window:<4} {rate:>12.0} /s");
    }
    let rate = operations(&peer, OpType::Get, 512).await;
    println!("gets, window 512  {rate:>12.0} /s");
}

async fn operations(peer: &Peer, op: OpType, window: usize) -> f64 {
    let Stream { up, mut down } = Stream::open(peer.address, &format!("k{window}{op:?}")).await;
    let operation = |n: usize| {
        frame(Up::KvOp(Box::new(KvOperation {
            op: op.into(),
            scope: Scope::GlobalExclusive.into(),
            key: format!("key-{}", n % 1000),
            value: vec![7; 64].into(),
            request_id: n.to_string(),
            ..KvOperation::default()
        })))
    };
    let (begun, mut done) = (Instant::now(), 0);
    for n in 0..window {
        up.send(operation(n)).await.unwrap();
    }
    while begun.elapsed() < MEASURE {
        if let Some(Down::Kv(reply)) = down.next().await.unwrap().unwrap().payload {
            assert!(reply.success);
            up.send(operation(done + window)).await.unwrap();
            done += 1;
        }
    }
    done as f64 / begun.elapsed().as_secs_f64()
}

/// The limit: the same frames, straight back.
struct Echo;

#[tonic::async_trait]
impl AetherGateway for Echo {
    type ConnectStream = Pin<Box<dyn tokio_stream::Stream<Item = Result<DownstreamMessage, Status>> + Send>>;

    async fn connect(
        &self,
        request: Request<Streaming<UpstreamMessage>>,
    ) -> Result<Response<Self::ConnectStream>, Status> {
        let back = request.into_inner().map(|frame| {
            let payload = match frame?.payload {
                Some(Up::Send(send)) => send.payload,
                _ => bytes::Bytes::new(),
            };
            let message = IncomingMessage { payload, ..IncomingMessage::default() };
            Ok(DownstreamMessage { payload: Some(Down::Msg(message)), ..DownstreamMessage::default() })
        });
        Ok(Response::new(Box::pin(back)))
    }
}

async fn echo() {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    println!("ready grpc={0} http={0} ops={0}", listener.local_addr().unwrap());
    let incoming = tonic::transport::server::TcpIncoming::from(listener).with_nodelay(Some(true));
    let server = tonic::transport::Server::builder().add_service(AetherGatewayServer::new(Echo));
    server.serve_with_incoming(incoming).await.unwrap();
}

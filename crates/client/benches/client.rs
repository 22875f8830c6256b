//! The library beside the generated stubs that it stands on, in the same run: what it costs to have its manners.
//!
//! Run by `cargo xtask bench client [section …]`; sections are named in `main`. The other side is a process of its own: a sink that
//! reads frames and does nothing, and a source that sends them as fast as they are taken; or a real server.

#![allow(
    clippy::disallowed_methods,
    clippy::expect_used,
    clippy::print_stdout,
    clippy::unwrap_used,
    reason = "bench code"
)]

use std::{
    io::{BufRead as _, BufReader, Write as _},
    net::SocketAddr,
    pin::Pin,
    process::{Child, Command, Stdio},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    time::{Duration, Instant},
};

use bytes::Bytes;
use tokio::sync::{mpsc, watch};
use tokio_stream::{Stream, StreamExt as _, wrappers::ReceiverStream};
use tonic::{Request, Response, Status, Streaming, transport::Endpoint};
use trunkline_client::{
    Agent, Outgoing, Topic,
    proto::{
        AgentIdentity, ConnectionAck, DownstreamMessage, IncomingMessage, InitConnection, MessageType,
        NegotiatedExtension, SendMessage, UpstreamMessage,
        aether_gateway_client::AetherGatewayClient,
        aether_gateway_server::{AetherGateway, AetherGatewayServer},
        downstream_message::Payload as Down,
        init_connection::ClientType,
        upstream_message::Payload as Up,
    },
};
use trunkline_proto::own::Delivery;

/// Set for the copy of this program that is the other side, or that holds idle clients.
const ROLE: &str = "TRUNKLINE_BENCH_ROLE";
const ADDRESS: &str = "TRUNKLINE_BENCH_ADDRESS";

/// How long each measurement takes, and how often it is made; the median counts.
const MEASURE: Duration = Duration::from_secs(2);
const ROUNDS: usize = 5;

/// What may be on the way to the sink and not read yet.
const WINDOW: u32 = 4 * 1024 * 1024;

/// Deliveries that Trunkline lets a client hold, under this extension.
const AHEAD: u64 = 4096;
const ACK: &str = "https://trunkline.dev/ext/ack/v1";

const PAYLOAD: [u8; 256] = [7; 256];

fn main() {
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().unwrap();
    match std::env::var(ROLE).as_deref() {
        Ok("sink") => return runtime.block_on(serve_bare()),
        Ok("server") => return runtime.block_on(serve()),
        Ok(role) => return runtime.block_on(hold_idle(role)),
        Err(_) => {}
    }
    let wanted: Vec<String> = std::env::args().skip(1).filter(|arg| !arg.starts_with('-')).collect();
    let is_wanted = |name: &str| wanted.is_empty() || wanted.iter().any(|wanted| wanted == name);
    if is_wanted("send") {
        runtime.block_on(send());
    }
    if is_wanted("receive") {
        runtime.block_on(receive());
    }
    if is_wanted("connect") {
        runtime.block_on(connect());
    }
    if is_wanted("idle") {
        runtime.block_on(idle());
    }
    if is_wanted("confirmed") {
        runtime.block_on(confirmed());
    }
}

/// A copy of this program; killed when dropped.
struct Peer {
    child: Child,
    out: BufReader<std::process::ChildStdout>,
}

impl Peer {
    fn start(role: &str, address: Option<&str>) -> Self {
        let mut command = Command::new(std::env::current_exe().unwrap());
        command.env(ROLE, role).env(ADDRESS, address.unwrap_or_default()).env("TRUNKLINE_LOG", "error");
        let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
        let out = BufReader::new(child.stdout.take().unwrap());
        Self { child, out }
    }

    fn line(&mut self) -> String {
        let mut line = String::new();
        self.out.read_line(&mut line).unwrap();
        line.trim().to_owned()
    }

    /// How many frames it read so far.
    fn count(&mut self) -> u64 {
        self.child.stdin.as_mut().unwrap().write_all(b"\n").unwrap();
        self.line().parse().unwrap()
    }
}

impl Drop for Peer {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Reads and counts; to `source` it sends as fast as it can.
struct Bare {
    read: Arc<AtomicU64>,
}

type Frames = Pin<Box<dyn Stream<Item = Result<DownstreamMessage, Status>> + Send>>;

#[tonic::async_trait]
impl AetherGateway for Bare {
    type ConnectStream = Frames;

    async fn connect(&self, request: Request<Streaming<UpstreamMessage>>) -> Result<Response<Frames>, Status> {
        let (mut inbound, read) = (request.into_inner(), Arc::clone(&self.read));
        let first = inbound.message().await?.expect("a first frame");
        let specifier = match first.payload {
            Some(Up::Init(init)) => match init.client_type {
                Some(ClientType::Agent(it)) => it.specifier,
                _ => String::new(),
            },
            _ => String::new(),
        };
        let acks = NegotiatedExtension { uri: ACK.into(), supported: true, ..Default::default() };
        let negotiated_extensions = if specifier == "paced" { vec![acks] } else { Vec::new() };
        let ack = ConnectionAck { session_id: "s".into(), negotiated_extensions, ..Default::default() };
        let (keep, tail) = mpsc::channel::<Result<DownstreamMessage, Status>>(1);
        let done = watch::Sender::new(0_u64);
        let through = done.subscribe();
        tokio::spawn(async move {
            let _keep = keep;
            while let Ok(Some(frame)) = inbound.message().await {
                read.fetch_add(1, Relaxed);
                if let Some(Up::Acknowledgement(ack)) = frame.payload {
                    done.send_replace(ack.through);
                }
            }
        });
        let ack = tokio_stream::once(Ok(down(Down::ConnectionAck(Box::new(ack)))));
        let message = down(Down::Msg(IncomingMessage {
            source_topic: "ag::w::i::s".into(),
            payload: Bytes::from_static(&PAYLOAD),
            ..IncomingMessage::default()
        }));
        match specifier.as_str() {
            "source" => {
                let flood = tokio_stream::iter(std::iter::repeat_with(move || Ok(message.clone())));
                return Ok(Response::new(Box::pin(ack.chain(flood))));
            }
            "paced" => return Ok(Response::new(Box::pin(ack.chain(paced(message, through))))),
            _ => {}
        }
        Ok(Response::new(Box::pin(ack.chain(ReceiverStream::new(tail)))))
    }
}

/// As fast as they are acknowledged, with as many ahead as Trunkline allows.
fn paced(
    message: DownstreamMessage,
    through: watch::Receiver<u64>,
) -> impl Stream<Item = Result<DownstreamMessage, Status>> + Send {
    futures_util::stream::unfold((through, 0, message), |(mut through, last, message)| async move {
        let offset = last + 1;
        if offset > *through.borrow() + AHEAD {
            through.wait_for(|through| offset <= *through + AHEAD).await.ok()?;
        }
        let delivery = Some(Delivery { offset, shared: false });
        let next = DownstreamMessage { delivery, ..message.clone() };
        Some((Ok(next), (through, offset, message)))
    })
}

fn down(payload: Down) -> DownstreamMessage {
    DownstreamMessage { payload: Some(payload), ..DownstreamMessage::default() }
}

async fn serve_bare() {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    println!("{}", listener.local_addr().unwrap());
    let read = Arc::new(AtomicU64::new(0));
    let counted = Arc::clone(&read);
    std::thread::spawn(move || {
        for _ in std::io::stdin().lines() {
            println!("{}", counted.load(Relaxed));
        }
    });
    let incoming = tonic::transport::server::TcpIncoming::from(listener).with_nodelay(Some(true));
    let service = AetherGatewayServer::new(Bare { read });
    // Room enough that the line is never waited for: what is measured is the client.
    tonic::transport::Server::builder()
        .initial_stream_window_size(WINDOW)
        .initial_connection_window_size(WINDOW)
        .add_service(service)
        .serve_with_incoming(incoming)
        .await
        .unwrap();
}

async fn serve() {
    let dir = std::env::temp_dir().join(format!("trunkline-bench-{}", std::process::id()));
    let mut config = trunkline::Config { data_dir: dir, dev: true, ..trunkline::Config::on_free_ports() };
    config.limits.messages_per_second = 0;
    let server = trunkline::Server::start(config).await.unwrap();
    println!("{}", server.addresses().grpc);
    std::future::pending::<()>().await;
}

/// The stubs as they are.
struct Raw {
    up: mpsc::Sender<UpstreamMessage>,
    down: Streaming<DownstreamMessage>,
}

impl Raw {
    async fn connect(address: SocketAddr, specifier: &str) -> Self {
        let channel = Endpoint::from_shared(format!("http://{address}")).unwrap().connect().await.unwrap();
        let (up, frames) = mpsc::channel(1024);
        let (workspace, implementation) = ("w".to_owned(), "raw".to_owned());
        let agent = AgentIdentity { workspace, implementation, specifier: specifier.to_owned() };
        let init = InitConnection { client_type: Some(ClientType::Agent(agent)), ..InitConnection::default() };
        up.send(frame(Up::Init(init.into()))).await.unwrap();
        let mut client = AetherGatewayClient::new(channel);
        let mut down = client.connect(ReceiverStream::new(frames)).await.unwrap().into_inner();
        down.next().await.unwrap().unwrap();
        Self { up, down }
    }
}

fn frame(payload: Up) -> UpstreamMessage {
    UpstreamMessage { payload: Some(payload), ..UpstreamMessage::default() }
}

async fn agent(address: SocketAddr, specifier: &str) -> Agent {
    Agent::builder("w", "sdk", specifier).address(address.to_string()).connect().await.unwrap()
}

fn median(mut rates: Vec<f64>) -> f64 {
    rates.sort_by(f64::total_cmp);
    rates[rates.len() / 2]
}

/// Sends for a while, in a task; answers how many frames a second arrived.
async fn rate(sink: &mut Peer, sends: impl Future<Output = ()> + Send + 'static) -> f64 {
    let (before, begun) = (sink.count(), Instant::now());
    tokio::spawn(sends).await.unwrap();
    (sink.count() - before) as f64 / begun.elapsed().as_secs_f64()
}

/// One client sends 256 bytes as fast as it can, into a sink.
async fn send() {
    let mut sink = Peer::start("sink", None);
    let address: SocketAddr = sink.line().parse().unwrap();
    let raw = Raw::connect(address, "r").await;
    let agent = agent(address, "a").await;
    let to = Topic::agent("w", "i", "s").unwrap();
    let (mut raws, mut ours) = (Vec::new(), Vec::new());
    for _ in 0..ROUNDS {
        // In turns, so that whatever else the machine does falls on both.
        let (up, target) = (raw.up.clone(), to.clone());
        let sends = async move {
            let begun = Instant::now();
            while begun.elapsed() < MEASURE {
                for _ in 0..256 {
                    let message = SendMessage {
                        target_topic: target.as_str().to_owned(),
                        payload: Bytes::from_static(&PAYLOAD),
                        message_type: MessageType::Opaque.into(),
                        ..SendMessage::default()
                    };
                    up.send(frame(Up::Send(message))).await.unwrap();
                }
            }
        };
        raws.push(rate(&mut sink, sends).await);
        let (agent, target) = (agent.clone(), to.clone());
        let sends = async move {
            let begun = Instant::now();
            while begun.elapsed() < MEASURE {
                for _ in 0..256 {
                    agent.send(Outgoing::new(&target, Bytes::from_static(&PAYLOAD))).await.unwrap();
                }
            }
        };
        ours.push(rate(&mut sink, sends).await);
    }
    let (raw, ours) = (median(raws), median(ours));
    println!("\nsend, 256 B, one client into a bare sink (messages/s, median of {ROUNDS})");
    println!("  generated stubs   {raw:>12.0}");
    println!("  Agent::send       {ours:>12.0}   {:>4.0} %   wanted: 500,000 and 80 %", 100.0 * ours / raw);
}

/// One client receives 256 bytes as fast as it can.
async fn receive() {
    let mut source = Peer::start("sink", None);
    let address: SocketAddr = source.line().parse().unwrap();
    let (mut raws, mut ours, mut paced) = (Vec::new(), Vec::new(), Vec::new());
    for _ in 0..ROUNDS {
        let mut raw = Raw::connect(address, "source").await;
        let (begun, mut count) = (Instant::now(), 0_u64);
        while begun.elapsed() < MEASURE {
            for _ in 0..256 {
                std::hint::black_box(raw.down.message().await.unwrap().unwrap());
            }
            count += 256;
        }
        raws.push(count as f64 / begun.elapsed().as_secs_f64());
        drop(raw);
        for (specifier, rates) in [("source", &mut ours), ("paced", &mut paced)] {
            let agent = agent(address, specifier).await;
            let mut messages = agent.messages();
            let (begun, mut count) = (Instant::now(), 0_u64);
            while begun.elapsed() < MEASURE {
                for _ in 0..256 {
                    std::hint::black_box(messages.next().await.unwrap());
                }
                count += 256;
            }
            rates.push(count as f64 / begun.elapsed().as_secs_f64());
        }
    }
    let (raw, ours, paced) = (median(raws), median(ours), median(paced));
    println!("\nreceive, 256 B, one client from a bare source (messages/s, median of {ROUNDS})");
    println!("  generated stubs   {raw:>12.0}");
    println!("  Agent::messages   {ours:>12.0}   {:>4.0} %", 100.0 * ours / raw);
    println!("  … acknowledged    {paced:>12.0}   {:>4.0} %   as on Trunkline", 100.0 * paced / raw);
}

/// From nothing to accepted.
async fn connect() {
    const TIMES: usize = 500;
    let mut bare = Peer::start("sink", None);
    let mut server = Peer::start("server", None);
    let addresses = [("a bare server", bare.line()), ("Trunkline", server.line())];
    println!("\nconnect to ready, one after the other, {TIMES} times");
    for (name, address) in addresses {
        let address: SocketAddr = address.parse().unwrap();
        let (mut raws, mut ours) = (Vec::new(), Vec::new());
        for n in 0..TIMES {
            let begun = Instant::now();
            let raw = Raw::connect(address, &format!("r{n}")).await;
            raws.push(begun.elapsed());
            drop(raw);
            let begun = Instant::now();
            let agent = agent(address, &format!("a{n}")).await;
            ours.push(begun.elapsed());
            drop(agent);
        }
        for (who, mut times) in [("generated stubs", raws), ("Agent::connect", ours)] {
            times.sort();
            let (p50, p99) = (times[TIMES / 2], times[TIMES * 99 / 100]);
            println!("  {name:<14} {who:<16} p50 {p50:>9.1?}   p99 {p99:>9.1?}   wanted: 5 ms");
        }
    }
}

/// What a client takes that does nothing.
async fn idle() {
    let mut bare = Peer::start("sink", None);
    let address = bare.line();
    println!("\nidle clients in one process (resident bytes each, 2,000 of them)");
    for role in ["raw", "sdk"] {
        let mut holder = Peer::start(role, Some(&address));
        let each: f64 = holder.line().parse().unwrap();
        let name = if role == "raw" { "generated stubs" } else { "Agent" };
        println!("  {name:<16} {:>8.1} KiB   wanted: 64 KiB", each / 1024.0);
    }
}

async fn hold_idle(role: &str) {
    const CLIENTS: usize = 2000;
    let address: SocketAddr = std::env::var(ADDRESS).unwrap().parse().unwrap();
    // What the first ones bring with them is not counted.
    let mut raws = vec![Raw::connect(address, "first").await];
    let mut agents = vec![agent(address, "first").await];
    let before = resident();
    for n in 0..CLIENTS {
        if role == "raw" {
            raws.push(Raw::connect(address, &n.to_string()).await);
        } else {
            agents.push(agent(address, &n.to_string()).await);
        }
    }
    tokio::time::sleep(Duration::from_secs(1)).await;
    println!("{}", (resident() - before) as f64 / CLIENTS as f64);
    drop((raws, agents));
}

fn resident() -> usize {
    let statm = std::fs::read_to_string("/proc/self/statm").unwrap();
    statm.split(' ').nth(1).unwrap().parse::<usize>().unwrap() * 4096
}

/// Messages that the server has on its disk, one after the other and many at once.
async fn confirmed() {
    let mut server = Peer::start("server", None);
    let address: SocketAddr = server.line().parse().unwrap();
    let agent = agent(address, "a").await;
    let to = Topic::agent("w", "i", "s").unwrap();
    println!("\nconfirmed sends, 256 B, one client to Trunkline with fsync");
    for at_once in [1, 64, 1024] {
        let begun = Instant::now();
        let mut senders = tokio::task::JoinSet::new();
        for _ in 0..at_once {
            let (agent, to) = (agent.clone(), to.clone());
            senders.spawn(async move {
                let mut count = 0_u64;
                while begun.elapsed() < MEASURE {
                    agent.send_confirmed(Outgoing::new(&to, Bytes::from_static(&PAYLOAD))).await.unwrap();
                    count += 1;
                }
                count
            });
        }
        let count: u64 = senders.join_all().await.into_iter().sum();
        println!("  {at_once:>5} at once   {:>10.0} messages/s", count as f64 / begun.elapsed().as_secs_f64());
    }
}

//! Good clients in hostile company: 10,000 connections that are silent, slow, half open or a flood, on each listener, with and
//! without TLS, beside 100 good agents. The noise of a machine is larger than the effect, so two servers with 100 good agents
//! each are measured at the same time; the company is with one of them, in turn. Printed are the p99 of the good agents before
//! any company, then on the server without and the one with company, the same of the middle second (noise comes in bursts),
//! how long new connections of good agents take, the CPU time of the server with company beyond the other's, how many hostile
//! connections it held when the measurement began, its memory, and how many good connections or requests were refused anywhere.
//!
//! The hostile side is a process of its own; it comes from addresses of 127.0.0.0/8, and ends with the measurement. Two kinds
//! are controls: `none` does nothing, and `elsewhere` are silent connections to the hostile side itself.
//!
//! Run by `cargo xtask bench hostile [gRPC|HTTP|ops …] [plain|TLS] [none|elsewhere|silent|slow|half|flood …]`.

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
    io::{BufRead as _, BufReader},
    net::{Ipv4Addr, SocketAddr},
    path::Path,
    process::{Child, Command, Stdio},
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering::Relaxed},
    },
    time::{Duration, Instant},
};

use hdrhistogram::Histogram;
use peer::{Peer, frame};
use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, DnType, IsCa, KeyPair};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{TcpSocket, TcpStream},
    sync::mpsc,
    time::{interval, sleep, timeout},
};
use tokio_stream::{StreamExt as _, wrappers::ReceiverStream};
use tonic::transport::{Certificate, Channel, ClientTlsConfig, Endpoint};
use trunkline_proto::v1::{
    AgentIdentity, CheckpointOperation, InitConnection, aether_gateway_client::AetherGatewayClient,
    checkpoint_operation::OpType::Load, downstream_message::Payload as Down, init_connection::ClientType,
    upstream_message::Payload as Up,
};

#[global_allocator]
static ALLOCATOR: tikv_jemallocator::Jemalloc = tikv_jemallocator::Jemalloc;

/// Set for the copy of this program that is the hostile side: kind, address, listener, and whether that has TLS.
const HOSTILE: &str = "TRUNKLINE_BENCH_HOSTILE";

/// Connections of the hostile side; of a flood, new ones in a second.
const HOSTILE_MAX: usize = 10_000;
const FLOOD_PER_SECOND: usize = 500;

/// How often slow ones send a byte.
const SLOW_INTERVAL: Duration = Duration::from_secs(5);

/// Good agents, and how often each asks.
const GOOD: usize = 100;
const ASK_INTERVAL: Duration = Duration::from_millis(100);

/// Longest a good client waits for anything.
const PATIENCE: Duration = Duration::from_secs(10);

/// How long good clients are measured.
const SECONDS: usize = 10;
const MEASURE: Duration = Duration::from_secs(SECONDS as u64);

/// How often, in company: half of them with each server.
const ROUNDS: usize = 4;

/// How long the server has for what its company left.
const SETTLE: Duration = Duration::from_secs(3);

/// What the server may hold in the worst company.
const RESIDENT_MAX: usize = 512 * 1024 * 1024;

/// How much longer the slowest hundredth of good requests may take in company, against those of the other server.
const P99_FACTOR_MAX: f64 = 1.2;

/// What the command line may name, of each some.
const TRANSPORTS: [&str; 2] = ["plain", "TLS"];
const LISTENERS: [&str; 3] = ["gRPC", "HTTP", "ops"];

const KINDS: [&str; 6] = ["none", "elsewhere", "silent", "slow", "half", "flood"];

fn main() {
    // Both sides hold thousands of sockets.
    trunkline::raise_descriptor_limit();
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().unwrap();
    if let Ok(what) = std::env::var(HOSTILE) {
        let [kind, address, listener, tls] = what.split(' ').collect::<Vec<_>>().try_into().unwrap();
        return runtime.block_on(hostile(kind, address.parse().unwrap(), listener, tls == "true"));
    }
    let _ = rustls::crypto::ring::default_provider().install_default();
    let mut known = TRANSPORTS.iter().chain(&LISTENERS).chain(&KINDS);
    if let Some(word) = peer::words().iter().find(|word| !known.clone().any(|name| name == word)) {
        panic!("{word:?} is none of {:?}", known.by_ref().collect::<Vec<_>>());
    }
    println!(
        "listener  TLS  company      p99: alone    apart  company        of the middle second      connects apart, company   \
         CPU beyond   held  refused  resident"
    );
    for tls in wanted(TRANSPORTS).map(|tls| tls == "TLS") {
        for kind in wanted(KINDS) {
            for listener in wanted(LISTENERS) {
                // Operators have no TLS. Controls have nothing to do with a listener.
                let is_control = matches!(kind, "none" | "elsewhere");
                if !(tls && listener == "ops" || is_control && listener != "gRPC") {
                    runtime.block_on(company(listener, tls, kind));
                }
            }
        }
    }
}

/// Those that the command line names; all, if it names none of them.
fn wanted<const N: usize>(all: [&'static str; N]) -> impl Iterator<Item = &'static str> {
    let words = peer::words();
    let is_named = move |name: &&str| words.iter().any(|word| word == name);
    let are_named = all.iter().any(&is_named);
    all.into_iter().filter(move |name| !are_named || is_named(name))
}

/// A certificate for the server, and how its clients trust it.
fn certificates(dir: &Path) -> ClientTlsConfig {
    let mut params = CertificateParams::new(Vec::new()).unwrap();
    params.distinguished_name.push(DnType::CommonName, "bench");
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    let issuer = CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap();
    let key = KeyPair::generate().unwrap();
    let own = CertificateParams::new(vec!["localhost".to_owned()]).unwrap().signed_by(&key, &issuer).unwrap();
    std::fs::write(dir.join("cert.pem"), own.pem()).unwrap();
    std::fs::write(dir.join("key.pem"), key.serialize_pem()).unwrap();
    ClientTlsConfig::new().ca_certificate(Certificate::from_pem(issuer.pem())).domain_name("localhost")
}

/// What good ones noticed.
struct Good {
    /// Of each second.
    latencies: Vec<Histogram<u64>>,
    connects: Histogram<u64>,
    refused: usize,
}

fn histogram() -> Histogram<u64> {
    Histogram::new(3).unwrap()
}

/// The slowest hundredth, in milliseconds.
fn p99(of: &Histogram<u64>) -> f64 {
    of.value_at_quantile(0.99) as f64 / 1000.0
}

/// Of the requests of some measurements, or of what else `of` says.
fn sum(measured: &[Good], of: impl Fn(&Good) -> &[Histogram<u64>]) -> f64 {
    let mut sum = histogram();
    measured.iter().flat_map(of).for_each(|one| sum.add(one).unwrap());
    p99(&sum)
}

/// The p99 of the middle one of all seconds.
fn middle(measured: &[Good]) -> f64 {
    let mut seconds: Vec<f64> = measured.iter().flat_map(|good| good.latencies.iter().map(p99)).collect();
    seconds.sort_by(f64::total_cmp);
    seconds[seconds.len() / 2]
}

/// A server and its good agents.
struct Side {
    server: Peer,
    agents: Agents,
}

impl Side {
    async fn start(tls: bool) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let mut command = Peer::serve(&dir.path().join("data"), "machine");
        let trust = tls.then(|| certificates(dir.path()));
        if tls {
            command.env("TRUNKLINE__TLS__CERT", dir.path().join("cert.pem"));
            command.env("TRUNKLINE__TLS__KEY", dir.path().join("key.pem"));
        }
        let server = Peer::start(command, dir);
        let agents = Agents::connect(server.address, trust).await;
        Self { server, agents }
    }

    /// What its agents noticed, and the CPU time that its server took.
    async fn measure(&self) -> (Good, Duration) {
        let before = self.server.cpu();
        let good = self.agents.measure().await;
        (good, self.server.cpu() - before)
    }
}

async fn company(listener: &str, tls: bool, kind: &str) {
    let sides = [Side::start(tls).await, Side::start(tls).await];
    let both = async || tokio::join!(sides[0].measure(), sides[1].measure());
    let ((one, _), (other, _)) = both().await;
    let alone = [one, other];
    let (mut apart, mut among, mut cpu, mut held, mut resident) = (Vec::new(), Vec::new(), 0.0, 0, 0);
    for round in 0..ROUNDS {
        let server = &sides[round % 2].server;
        let address = match listener {
            "gRPC" => server.address,
            "HTTP" => server.http,
            _ => server.ops,
        };
        let before = server.files();
        let hostile = Hostile::start(&format!("{kind} {address} {listener} {tls}"));
        held = held.max(server.files().saturating_sub(before));
        let (mut one, mut other) = both().await;
        if round % 2 == 1 {
            std::mem::swap(&mut one, &mut other);
        }
        resident = resident.max(server.resident());
        drop(hostile);
        cpu += (one.1.as_secs_f64() - other.1.as_secs_f64()) / (ROUNDS * SECONDS) as f64;
        among.push(one.0);
        apart.push(other.0);
        sleep(SETTLE).await;
    }
    let refused: usize = alone.iter().chain(&apart).chain(&among).map(|good| good.refused).sum();
    let [p99_alone, p99_apart, p99_among] = [&alone[..], &apart, &among].map(|all| sum(all, |good| &good.latencies));
    let connects = [&apart, &among].map(|all| sum(all, |good| std::slice::from_ref(&good.connects)));
    let (factor, of_middle) = (p99_among / p99_apart, middle(&among) / middle(&apart));
    let is_good = factor <= P99_FACTOR_MAX && refused == 0 && resident <= RESIDENT_MAX;
    println!(
        "{listener:<8}  {:<3}  {kind:<9} {p99_alone:>7.2} ms {p99_apart:>5.2} ms {p99_among:>5.2} ms ×{factor:.2} \
         {:>8.2} ms {:>5.2} ms ×{of_middle:.2} {:>10.1} ms {:>5.1} ms {:>8.0} ms/s {held:>6} {refused:>8}  {:>4} MiB  {}",
        if tls { "yes" } else { "no" },
        middle(&apart),
        middle(&among),
        connects[0],
        connects[1],
        cpu * 1000.0,
        resident / 1024 / 1024,
        if is_good { "ok" } else { "beyond the limit: ×1.20, 0 refused, 512 MiB" },
    );
}

/// The good ones.
struct Agents {
    streams: Vec<Stream>,
    address: SocketAddr,
    trust: Option<ClientTlsConfig>,
}

type Stream = Arc<tokio::sync::Mutex<peer::Stream>>;

async fn connect(address: SocketAddr, trust: Option<ClientTlsConfig>, name: &str) -> Option<peer::Stream> {
    let scheme = if trust.is_some() { "https" } else { "http" };
    let mut endpoint = Endpoint::from_shared(format!("{scheme}://{address}")).unwrap();
    if let Some(trust) = trust {
        endpoint = endpoint.tls_config(trust).unwrap();
    }
    let channel: Channel = timeout(PATIENCE, endpoint.connect()).await.ok()?.ok()?;
    let (up, frames) = mpsc::channel(64);
    let agent = AgentIdentity { workspace: "w".into(), implementation: "good".into(), specifier: name.into() };
    let init = InitConnection { client_type: Some(ClientType::Agent(agent)), ..InitConnection::default() };
    up.send(frame(Up::Init(init.into()))).await.ok()?;
    let mut client = AetherGatewayClient::new(channel);
    let connected = timeout(PATIENCE, client.connect(ReceiverStream::new(frames))).await.ok()?;
    let mut down = connected.ok()?.into_inner();
    timeout(PATIENCE, down.next()).await.ok()??.ok()?;
    Some(peer::Stream { up, down })
}

/// Asks for something small that the store answers.
async fn ask(stream: &mut peer::Stream) -> Option<()> {
    let load = CheckpointOperation { op: Load.into(), key: "b".into(), ..CheckpointOperation::default() };
    stream.up.send(frame(Up::CheckpointOp(load.into()))).await.ok()?;
    loop {
        let next = timeout(PATIENCE, stream.down.next()).await.ok()??.ok()?;
        if matches!(next.payload, Some(Down::Checkpoint(_))) {
            return Some(());
        }
    }
}

impl Agents {
    async fn connect(address: SocketAddr, trust: Option<ClientTlsConfig>) -> Self {
        let mut streams = Vec::new();
        for n in 0..GOOD {
            let stream = connect(address, trust.clone(), &n.to_string()).await.expect("nobody else is there");
            streams.push(Arc::new(tokio::sync::Mutex::new(stream)));
        }
        Self { streams, address, trust }
    }

    /// Each asks at its own times, and one more agent after the other comes and goes.
    async fn measure(&self) -> Good {
        let latencies = (0..SECONDS).map(|_| histogram()).collect();
        let mut good = Good { latencies, connects: histogram(), refused: 0 };
        let begin = Instant::now();
        let end = begin + MEASURE;
        let mut askers = tokio::task::JoinSet::new();
        for (n, stream) in self.streams.iter().cloned().enumerate() {
            askers.spawn(async move {
                sleep(ASK_INTERVAL * u32::try_from(n).unwrap() / u32::try_from(GOOD).unwrap()).await;
                let (mut ticks, mut took, mut stream) = (interval(ASK_INTERVAL), Vec::new(), stream.lock().await);
                while Instant::now() < end {
                    ticks.tick().await;
                    let begun = Instant::now();
                    let answered = ask(&mut stream).await;
                    took.push(answered.map(|()| (begun - begin, begun.elapsed())));
                    if answered.is_none() {
                        break;
                    }
                }
                took
            });
        }
        let mut n = 0;
        while Instant::now() < end {
            let begun = Instant::now();
            match connect(self.address, self.trust.clone(), &format!("guest-{n}")).await {
                Some(_) => good.connects.record(u64::try_from(begun.elapsed().as_micros()).unwrap()).unwrap(),
                None => good.refused += 1,
            }
            n += 1;
            sleep(ASK_INTERVAL).await;
        }
        for took in askers.join_all().await.into_iter().flatten() {
            match took {
                Some((at, took)) => {
                    let second = (at.as_secs() as usize).min(SECONDS - 1);
                    good.latencies[second].record(u64::try_from(took.as_micros()).unwrap()).unwrap();
                }
                None => good.refused += 1,
            }
        }
        good
    }
}

/// The hostile side, as a process of its own; killed when dropped.
struct Hostile(Child);

impl Hostile {
    /// Returns when all of its connections were tried.
    fn start(what: &str) -> Self {
        let mut command = Command::new(std::env::current_exe().unwrap());
        let mut child = command.env(HOSTILE, what).stdout(Stdio::piped()).spawn().unwrap();
        let mut line = String::new();
        BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).unwrap();
        Self(child)
    }
}

impl Drop for Hostile {
    fn drop(&mut self) {
        // It may be gone already, which is as good.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// From one of 250 addresses, so that there are ports enough.
async fn dial(n: usize, to: SocketAddr) -> Option<TcpStream> {
    let socket = TcpSocket::new_v4().ok()?;
    let last = u8::try_from(n % 250).ok()? + 2;
    socket.bind((Ipv4Addr::new(127, 0, 1, last), 0).into()).ok()?;
    timeout(PATIENCE, socket.connect(to)).await.ok()?.ok()
}

/// How an honest client of a listener begins.
fn begins(listener: &str, tls: bool) -> &'static [u8] {
    match (listener, tls) {
        // The head of a record, and of a ClientHello of 508 bytes in it.
        (_, true) => b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
        ("gRPC", _) => b"PRI * HTTP/2.0\r\n\r\nSM\r\n",
        _ => b"GET / HTTP/1.1\r\nx: yyyyyyyy",
    }
}

async fn hostile(kind: &str, to: SocketAddr, listener: &str, tls: bool) {
    match kind {
        "none" => {
            println!("ready");
            return sleep(10 * MEASURE).await;
        }
        "flood" => {
            println!("ready");
            return flood(to).await;
        }
        _ => {}
    }
    let begins = begins(listener, tls);
    let (tried, mut all) = (Arc::new(AtomicUsize::new(0)), tokio::task::JoinSet::new());
    let to = if kind == "elsewhere" { elsewhere(&mut all).await } else { to };
    for n in 0..HOSTILE_MAX {
        let (tried, kind) = (tried.clone(), kind.to_owned());
        // Some at a time: the queue of a listener is not what is tried here.
        while n - tried.load(Relaxed) >= 256 {
            sleep(Duration::from_millis(1)).await;
        }
        all.spawn(async move {
            let stream = dial(n, to).await;
            tried.fetch_add(1, Relaxed);
            let Some(mut stream) = stream else { return };
            match kind.as_str() {
                "half" => drop(stream.write_all(begins).await),
                "slow" => {
                    // Each at its own time.
                    sleep(SLOW_INTERVAL * u32::try_from(n).unwrap() / u32::try_from(HOSTILE_MAX).unwrap()).await;
                    for byte in begins {
                        if stream.write_all(&[*byte]).await.is_err() {
                            return;
                        }
                        sleep(SLOW_INTERVAL).await;
                    }
                }
                _ => {}
            }
            // Held until the server ends it, or this process ends.
            let _ = stream.read(&mut [0; 1024]).await;
            std::future::pending::<()>().await;
        });
    }
    while tried.load(Relaxed) < HOSTILE_MAX {
        sleep(Duration::from_millis(1)).await;
    }
    println!("ready");
    // Longer than any measurement, and not for ever.
    sleep(10 * MEASURE).await;
}

/// The address of a server that accepts and holds connections, and sends nothing.
async fn elsewhere(all: &mut tokio::task::JoinSet<()>) -> SocketAddr {
    let listener = tokio::net::TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
    let address = listener.local_addr().unwrap();
    all.spawn(async move {
        let mut kept = Vec::new();
        loop {
            kept.push(listener.accept().await.unwrap().0);
        }
    });
    address
}

/// Connections that come, say something that makes no sense, and go.
async fn flood(to: SocketAddr) {
    const NONSENSE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff";
    let mut ticks = interval(Duration::from_secs(1) / u32::try_from(FLOOD_PER_SECOND).unwrap());
    let (begun, mut all) = (Instant::now(), tokio::task::JoinSet::new());
    for n in 0.. {
        if begun.elapsed() > 10 * MEASURE {
            return;
        }
        ticks.tick().await;
        while all.try_join_next().is_some() {}
        while all.len() >= HOSTILE_MAX {
            all.join_next().await;
        }
        all.spawn(async move {
            if let Some(mut stream) = dial(n, to).await {
                // The server may have ended it in between.
                let _ = stream.write_all(NONSENSE).await;
                let _ = timeout(Duration::from_secs(1), stream.read(&mut [0; 1024])).await;
            }
        });
    }
}

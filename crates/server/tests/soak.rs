//! A long life of a server, compressed: clients of every temper come and go, and at the end nothing of them is left.
//!
//! `cargo xtask soak` runs 20 minutes of it, the tests 60 seconds; the time is given in `TRUNKLINE_SOAK_SECONDS`.

#![allow(
    clippy::disallowed_methods,
    clippy::expect_used,
    clippy::panic,
    clippy::print_stdout,
    clippy::unwrap_used,
    dead_code,
    reason = "test code; shares a client with the others"
)]

#[path = "it/client.rs"]
mod client;
#[path = "soak/tempers.rs"]
mod tempers;

use std::{
    fs,
    io::{BufRead as _, BufReader, Read as _, Write as _},
    net::{SocketAddr, TcpStream},
    process::{Child, Command, ExitCode, Stdio},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering::SeqCst},
    },
    time::{Duration, Instant},
};

use client::Client;

const SECONDS: u64 = 60;

/// Memory may not grow by more between the floors of the second and the third third, in MiB, besides the log's own
/// buffers and caches, which fill up to their bounds.
const GROWTH_MIB_MAX: i64 = 24;

/// A life so short does not fill what has a bound elsewhere, so that its memory may grow by as much again.
const SHORT: Duration = Duration::from_secs(300);

/// What memory may not come to at any time, in MiB.
const MEMORY_MIB_MAX: i64 = 640;

/// How often memory is looked at.
const SAMPLES: u32 = 60;

/// How long the server may take to let go of everybody.
const QUIET: Duration = Duration::from_secs(30);

/// What the clients share.
pub(crate) struct Stage {
    pub(crate) grpc: SocketAddr,
    over: AtomicBool,
    /// What they did, each in its own way.
    pub(crate) acts: AtomicU64,
}

impl Stage {
    pub(crate) fn is_over(&self) -> bool {
        self.over.load(SeqCst)
    }
}

fn main() -> ExitCode {
    // `cargo test` names the tests that it wants.
    if std::env::args().skip(1).any(|arg| arg == "--list" || !arg.starts_with('-') && !"soak".contains(&arg)) {
        return ExitCode::SUCCESS;
    }
    let seconds = std::env::var("TRUNKLINE_SOAK_SECONDS").ok().and_then(|text| text.parse().ok()).unwrap_or(SECONDS);
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
    let failures = runtime.block_on(soak(Duration::from_secs(seconds)));
    failures.iter().for_each(|failure| println!("FAILED: {failure}"));
    if failures.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

async fn soak(time: Duration) -> Vec<String> {
    let mut server = Server::start();
    let idle = server.sockets();
    let stage = Arc::new(Stage { grpc: server.grpc, over: AtomicBool::new(false), acts: AtomicU64::new(0) });
    let cast = tempers::all(&stage);
    let (begun, mut resident, mut ours) = (Instant::now(), Vec::new(), Vec::new());
    while begun.elapsed() < time {
        tokio::time::sleep(time / SAMPLES).await;
        let (all, buffered) = (server.resident(), server.buffered());
        resident.push(all);
        ours.push(all - buffered);
    }
    stage.over.store(true, SeqCst);
    let mut failures = Vec::new();
    for (name, actor) in cast {
        if tokio::time::timeout(QUIET, actor).await.map_or(true, |joined| joined.is_err()) {
            failures.push(format!("{name} did not end well"));
        }
    }
    println!("{} acts in {} s", stage.acts.load(SeqCst), begun.elapsed().as_secs());
    println!("memory in MiB: {resident:?}\nwithout the log's buffers: {ours:?}");
    let thirds: Vec<i64> = ours.chunks(ours.len().div_ceil(3)).map(floor).collect();
    println!("floors of its thirds: {thirds:?}");
    let growth_max = if time < SHORT { 2 * GROWTH_MIB_MAX } else { GROWTH_MIB_MAX };
    if thirds[2] > thirds[1] + growth_max {
        failures.push(format!("memory grew: {thirds:?} MiB"));
    }
    if resident.iter().any(|&mib| mib > MEMORY_MIB_MAX) {
        failures.push(format!("memory came to more than {MEMORY_MIB_MAX} MiB"));
    }
    failures.extend(server.quiet(idle).await);
    for identity in tempers::identities() {
        if let Err(status) = Client::connect(server.grpc, identity.clone()).await {
            failures.push(format!("a lease is stuck: {status} for {identity:?}"));
        }
    }
    failures.extend(server.end());
    failures
}

/// The lower quartile: what leaks stays and raises it, what large messages and slow readers take for a moment does not.
fn floor(all: &[i64]) -> i64 {
    let mut sorted = all.to_vec();
    sorted.sort_unstable();
    sorted[sorted.len() / 4]
}

/// A process of its own, so that its memory and its log are known.
struct Server {
    child: Child,
    grpc: SocketAddr,
    ops: SocketAddr,
    _dir: tempfile::TempDir,
    log: std::path::PathBuf,
}

impl Server {
    fn start() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let log = dir.path().join("log.txt");
        let mut command = Command::new(env!("CARGO_BIN_EXE_trunkline"));
        command.args(["serve", "--dev", "--grpc", "127.0.0.1:0", "--http", "127.0.0.1:0", "--ops", "127.0.0.1:0"]);
        // What a day of retention does, in minutes: what is old goes while clients come and go.
        command.env("TRUNKLINE__RETENTION__SWEEP_SECONDS", "5").env("TRUNKLINE__RETENTION__LANE_MIB_MAX", "16");
        command.arg("--data-dir").arg(dir.path().join("data"));
        command.stdout(Stdio::piped()).stderr(fs::File::create(&log).unwrap());
        let mut child = command.spawn().unwrap();
        let mut line = String::new();
        BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).unwrap();
        let address = |name: &str| line.split_whitespace().find_map(|word| word.strip_prefix(name)).unwrap().parse();
        Self { grpc: address("grpc=").unwrap(), ops: address("ops=").unwrap(), child, _dir: dir, log }
    }

    /// Its memory, in MiB.
    fn resident(&self) -> i64 {
        let statm = fs::read_to_string(format!("/proc/{}/statm", self.child.id())).unwrap();
        statm.split(' ').nth(1).unwrap().parse::<i64>().unwrap() * 4096 / 1024 / 1024
    }

    /// What of it the log fills up to a bound, in MiB.
    fn buffered(&self) -> i64 {
        let metrics = self.metrics();
        let line = metrics.lines().find_map(|line| line.strip_prefix("trunkline_log_buffered_bytes "));
        line.unwrap().parse::<i64>().unwrap() / 1024 / 1024
    }

    /// Files that it opened for clients; the store opens and closes tables of its own.
    fn sockets(&self) -> usize {
        let all = fs::read_dir(format!("/proc/{}/fd", self.child.id())).unwrap();
        let targets = all.filter_map(|entry| fs::read_link(entry.ok()?.path()).ok());
        targets.filter(|target| target.to_string_lossy().starts_with("socket:")).count()
    }

    fn metrics(&self) -> String {
        let mut stream = TcpStream::connect(self.ops).unwrap();
        stream.write_all(b"GET /metrics HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n").unwrap();
        let mut text = String::new();
        stream.read_to_string(&mut text).unwrap();
        text
    }

    /// Waits until nobody is attached and their sockets are closed.
    async fn quiet(&self, idle: usize) -> Option<String> {
        let begun = Instant::now();
        loop {
            let text = self.metrics();
            let attached =
                text.lines().filter(|line| line.starts_with("trunkline_connections{") && !line.ends_with(" 0"));
            let attached: Vec<&str> = attached.collect();
            let sockets = self.sockets();
            if attached.is_empty() && sockets <= idle {
                return None;
            }
            if begun.elapsed() > QUIET {
                return Some(format!("still there: {attached:?}, {sockets} sockets, {idle} at the start"));
            }
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    }

    /// Tells it to stop, and reads what it logged.
    fn end(&mut self) -> Vec<String> {
        let mut failures = Vec::new();
        assert!(Command::new("kill").arg(self.child.id().to_string()).status().unwrap().success());
        if !self.child.wait().unwrap().success() {
            failures.push("the server did not end well".to_owned());
        }
        let log = fs::read_to_string(&self.log).unwrap();
        let bad = log.lines().filter(|line| line.contains("panicked") || line.contains(" ERROR "));
        failures.extend(bad.take(10).map(|line| format!("in the log: {line}")));
        failures
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // It may be gone already, which is as good.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

//! The binary as a process: its one line, its exit, what it refuses.

use std::{
    io::{BufRead as _, BufReader, Read as _},
    net::SocketAddr,
    path::Path,
    process::{Child, Command, Stdio},
};

use tonic::Code;
use trunkline::{Config, Server, StartError};

use crate::client::{Client, agent};

/// `trunkline serve --dev` on free ports, without a limit on rates; killed when dropped.
pub(crate) struct Process {
    child: Child,
    pub(crate) grpc: SocketAddr,
    pub(crate) http: SocketAddr,
    pub(crate) ops: SocketAddr,
}

pub(crate) fn serve(dir: &Path) -> Command {
    serve_on(dir, ([127, 0, 0, 1], 0).into())
}

fn serve_on(dir: &Path, grpc: SocketAddr) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_trunkline"));
    command.args(["serve", "--grpc", &grpc.to_string(), "--ops", "127.0.0.1:0", "--data-dir"]).arg(dir);
    command
        .env("TRUNKLINE__LISTEN__HTTP", "127.0.0.1:0")
        .env("TRUNKLINE__LIMITS__MESSAGES_PER_SECOND", "0")
        .env("TRUNKLINE_LOG", "error");
    command.stdout(Stdio::piped()).stderr(Stdio::piped());
    command
}

impl Process {
    pub(crate) fn start(dir: &Path) -> Self {
        Self::start_on(dir, ([127, 0, 0, 1], 0).into())
    }

    /// At an address that its clients know.
    pub(crate) fn start_on(dir: &Path, grpc: SocketAddr) -> Self {
        Self::started(serve_on(dir, grpc).arg("--dev"))
    }

    /// With its HTTP surfaces at an address that its clients know, and so many milliseconds for sandboxes to come back.
    pub(crate) fn start_http(dir: &Path, http: SocketAddr, grace_ms: u64) -> Self {
        let mut command = serve(dir);
        command.args(["--dev", "--http", &http.to_string()]);
        Self::started(command.env("TRUNKLINE__SANDBOX__GRACE_MS", grace_ms.to_string()))
    }

    /// Under a limit on the size of its files, which behaves as a full disk. The log's journal has 64 MiB from the start.
    pub(crate) fn start_on_a_small_disk(dir: &Path) -> Self {
        let serve = serve(dir);
        let mut command = Command::new("/bin/bash");
        // SIGXFSZ would kill; ignored, the write fails. In blocks of 1 KiB, soft, so that it can be raised.
        command.args(["-c", "trap '' XFSZ; ulimit -S -f 65536; exec \"$0\" \"$@\""]).arg(serve.get_program());
        command.args(serve.get_args()).arg("--dev");
        command.envs(serve.get_envs().filter_map(|(name, value)| Some((name, value?))));
        command.stdout(Stdio::piped()).stderr(Stdio::piped());
        Self::started(&mut command)
    }

    /// Its number.
    pub(crate) fn id(&self) -> u32 {
        self.child.id()
    }

    /// With so many descriptors at most, and its warnings in [`Process::log`].
    pub(crate) fn start_with_descriptors(dir: &Path, most: u32) -> Self {
        let serve = serve(dir);
        let mut command = Command::new("/bin/bash");
        command.args(["-c", &format!("ulimit -n {most}; exec \"$0\" \"$@\"")]).arg(serve.get_program());
        command.args(serve.get_args()).arg("--dev");
        command.envs(serve.get_envs().filter_map(|(name, value)| Some((name, value?))));
        command.env("TRUNKLINE_LOG", "warn").stdout(Stdio::piped()).stderr(Stdio::piped());
        Self::started(&mut command)
    }

    /// Ends it, and answers what it wrote to standard error.
    pub(crate) fn log(mut self) -> String {
        self.child.kill().unwrap();
        let mut text = String::new();
        self.child.stderr.take().unwrap().read_to_string(&mut text).unwrap();
        text
    }

    /// Memory that it holds, in bytes.
    pub(crate) fn resident(&self) -> usize {
        let statm = std::fs::read_to_string(format!("/proc/{}/statm", self.child.id())).unwrap();
        statm.split(' ').nth(1).unwrap().parse::<usize>().unwrap() * 4096
    }

    /// SIGTERM; whether it ended well.
    fn terminate(mut self) -> bool {
        let status = Command::new("kill").arg(self.child.id().to_string()).status().unwrap();
        assert!(status.success());
        self.child.wait().unwrap().success()
    }

    /// Takes the limit away.
    pub(crate) fn make_room(&self) {
        let mut raise = Command::new("prlimit");
        raise.arg(format!("--pid={}", self.child.id())).arg("--fsize=unlimited");
        assert!(raise.status().unwrap().success());
    }

    fn started(command: &mut Command) -> Self {
        let mut child = command.spawn().unwrap();
        let mut line = String::new();
        BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).unwrap();
        let words: Vec<&str> = line.split_whitespace().collect();
        let ["ready", grpc, http, ops] = words[..] else { panic!("not ready: {line:?}") };
        let address = |word: &str, name| word.strip_prefix(name).unwrap().parse::<SocketAddr>().unwrap();
        Self { child, grpc: address(grpc, "grpc="), http: address(http, "http="), ops: address(ops, "ops=") }
    }

    /// SIGKILL.
    pub(crate) fn kill(mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // It may be gone already, which is as good.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn refused(mut command: Command) -> String {
    let mut child = command.spawn().unwrap();
    let mut text = String::new();
    child.stderr.take().unwrap().read_to_string(&mut text).unwrap();
    assert!(!child.wait().unwrap().success());
    text
}

#[test]
fn a_directory_in_use_is_refused_with_the_holders_pid() {
    let dir = tempfile::tempdir().unwrap();
    let process = Process::start(dir.path());
    let text = refused(serve(dir.path()));
    assert!(text.contains(&format!("in use by process {}", process.child.id())), "{text}");
}

#[test]
fn a_mistake_in_the_settings_is_told_before_anything_is_bound() {
    let dir = tempfile::tempdir().unwrap();
    let mut command = serve(dir.path());
    command.env("TRUNKLINE__LIMITS__MESAGE_BURST", "1");
    let text = refused(command);
    assert!(
        text.contains("TRUNKLINE__LIMITS__MESAGE_BURST") && text.contains("did you mean limits.message_burst?"),
        "{text}"
    );
    let mut command = serve(dir.path());
    command.args(["--config", "/no/such/file"]);
    assert!(refused(command).contains("/no/such/file"));
}

#[test]
fn it_stops_when_it_is_told_to() {
    let dir = tempfile::tempdir().unwrap();
    assert!(Process::start(dir.path()).terminate());
    Process::start(dir.path()).kill();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn standard_error_that_cannot_be_written_costs_the_log_and_nothing_else() {
    type Output = (&'static str, fn() -> Stdio);
    let outputs: [Output; 3] = [
        ("a full disk", || std::fs::File::create("/dev/full").unwrap().into()),
        ("a reader that is gone", Stdio::piped),
        ("a reader that does not read", Stdio::piped),
    ];
    for (what, stderr) in outputs {
        let dir = tempfile::tempdir().unwrap();
        let mut command = serve(dir.path());
        // More than a pipe holds, by far.
        command.arg("--dev").env("TRUNKLINE_LOG", "trace").stderr(stderr());
        let mut process = Process::started(&mut command);
        if what == "a reader that is gone" {
            drop(process.child.stderr.take());
        }
        let mut client = Client::connect(process.grpc, agent("one")).await.unwrap();
        for n in 0..200 {
            client.send("ag::ws::impl::one", n.to_string()).await;
        }
        assert_eq!(client.numbers(200).await.len(), 200, "{what}");
        let ended = tokio::task::spawn_blocking(move || process.terminate());
        // It is told why, as ever.
        while let Ok(Some(_)) = client.next().await {}
        assert!(ended.await.unwrap(), "{what}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn without_dev_nobody_gets_in_without_a_credential() {
    let dir = tempfile::tempdir().unwrap();
    let config = Config { data_dir: dir.path().to_owned(), ..Config::on_free_ports() };
    let server = Server::start(config).await.unwrap();
    let refused = Client::connect(server.addresses().grpc, agent("a")).await.err().unwrap();
    assert_eq!(refused.code(), Code::Unauthenticated);
    assert_eq!(refused.message(), "anonymous connection as Agent requires a matching API key credential");
    server.stop().await;
}

#[tokio::test]
async fn dev_does_not_leave_this_machine() {
    let dir = tempfile::tempdir().unwrap();
    let mut config = Config { data_dir: dir.path().to_owned(), dev: true, ..Config::on_free_ports() };
    config.listen.grpc = ([0, 0, 0, 0], 0).into();
    assert!(matches!(Server::start(config).await.err(), Some(StartError::DevBeyondLoopback(_))));
}

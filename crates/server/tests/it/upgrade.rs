//! The listening sockets outlive the process: clients that come while no server accepts wait for the next one.

pub(crate) mod stories;

use std::{
    fs,
    io::{BufRead as _, BufReader, Read as _, Write as _},
    net::{SocketAddr, TcpListener, TcpStream},
    path::Path,
    process::{Child, ChildStdout, Command, Stdio},
    sync::mpsc,
    time::Duration,
};

use command_fds::{CommandFdExt as _, FdMapping};
use tokio::{sync::watch, task::JoinSet};

use crate::{
    client::{Client, agent},
    kills,
    process::serve,
};

/// A server whose standard output is read on: each program that takes over says that it is ready.
pub(crate) struct Upgradable {
    child: Child,
    stdout: BufReader<ChildStdout>,
    grpc: SocketAddr,
    http: SocketAddr,
    ops: SocketAddr,
}

impl Upgradable {
    fn start(mut command: Command) -> Self {
        let mut child = command.spawn().unwrap();
        let mut stdout = BufReader::new(child.stdout.take().unwrap());
        let [grpc, http, ops] = ready(&mut stdout);
        Self { child, stdout, grpc, http, ops }
    }

    /// Waits for the program that takes over: it listens where this one did.
    fn upgraded(mut self) -> Self {
        assert_eq!(ready(&mut self.stdout), [self.grpc, self.http, self.ops]);
        self
    }

    fn signal(&self, signal: &str) {
        let status = Command::new("kill").args(["-s", signal, &self.child.id().to_string()]).status().unwrap();
        assert!(status.success());
    }
}

impl Drop for Upgradable {
    fn drop(&mut self) {
        // It may be gone already, which is as good.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn ready(stdout: &mut BufReader<ChildStdout>) -> [SocketAddr; 3] {
    let mut line = String::new();
    stdout.read_line(&mut line).unwrap();
    let words: Vec<&str> = line.split_whitespace().collect();
    let ["ready", grpc, http, ops] = words[..] else { panic!("not ready: {line:?}") };
    [("grpc=", grpc), ("http=", http), ("ops=", ops)]
        .map(|(name, word)| word.strip_prefix(name).unwrap().parse().unwrap())
}

/// What a listener answers on a new connection, however long it takes to accept it.
fn get(address: SocketAddr, path: &str) -> String {
    let mut stream = TcpStream::connect(address).unwrap();
    stream.set_read_timeout(Some(Duration::from_secs(30))).unwrap();
    write!(stream, "GET {path} HTTP/1.1\r\nhost: {address}\r\nconnection: close\r\n\r\n").unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    answer
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_upgrade_keeps_the_process_refuses_no_client_and_loses_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let mut command = serve(dir.path());
    command.arg("--dev");
    let mut server = Upgradable::start(command);
    let (grpc, http, ops) = (server.grpc, server.http, server.ops);
    let (enough, stopping) = watch::channel(false);
    let (seen, mut watching) = watch::channel(0);
    let mut senders = JoinSet::from_iter([kills::send(grpc, 0, stopping)]);
    let _receivers = JoinSet::from_iter([kills::receive(grpc, 0, seen)]);
    // New clients all the time, on each listener.
    let (stop, stopped) = mpsc::channel::<()>();
    let comers = std::thread::spawn(move || {
        let mut served = 0;
        while stopped.try_recv() == Err(mpsc::TryRecvError::Empty) {
            for (address, path) in [(ops, "/livez"), (http, "/sessions")] {
                let answer = get(address, path);
                assert!(answer.starts_with("HTTP/1.1 200"), "{path}: {answer:?}");
            }
            TcpStream::connect(grpc).unwrap();
            served += 1;
        }
        served
    });
    for upgrade in 1..=3 {
        watching.wait_for(|seen| *seen >= upgrade * 200).await.unwrap();
        server.signal("USR2");
        server = tokio::task::spawn_blocking(move || server.upgraded()).await.unwrap();
        assert!(server.child.try_wait().unwrap().is_none(), "the process is another one");
    }
    enough.send(true).unwrap();
    let durable = senders.join_next().await.unwrap().unwrap();
    let all = watching.wait_for(|seen| *seen >= durable);
    assert!(tokio::time::timeout(Duration::from_secs(30), all).await.is_ok(), "{durable} are durable");
    drop(stop);
    assert!(tokio::task::spawn_blocking(|| comers.join().unwrap()).await.unwrap() > 0);
    server.signal("TERM");
    assert!(tokio::task::spawn_blocking(move || server.child.wait().unwrap().success()).await.unwrap());
}

#[test]
fn signals_that_come_while_a_program_takes_over_end_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let mut command = serve(dir.path());
    command.arg("--dev");
    let mut server = Upgradable::start(command);
    let begun = std::time::Instant::now();
    let mut upgrades = 0;
    while begun.elapsed() < Duration::from_secs(4) {
        // Again and again until the next one is ready: at any moment of its start.
        let (is_ready, waits) = mpsc::channel::<()>();
        let pid = server.child.id().to_string();
        let signals = std::thread::spawn(move || {
            while waits.try_recv() == Err(mpsc::TryRecvError::Empty) {
                assert!(Command::new("kill").args(["-s", "USR2", &pid]).status().unwrap().success());
            }
        });
        server = server.upgraded();
        drop(is_ready);
        signals.join().unwrap();
        upgrades += 1;
    }
    assert!(upgrades > 1);
    assert!(server.child.try_wait().unwrap().is_none(), "the process has ended");
}

#[test]
fn a_program_that_cannot_serve_does_not_take_over() {
    let dir = tempfile::tempdir().unwrap();
    let program = dir.path().join("trunkline");
    fs::copy(env!("CARGO_BIN_EXE_trunkline"), &program).unwrap();
    let template = serve(&dir.path().join("data"));
    let mut command = Command::new(&program);
    command.args(template.get_args()).arg("--dev");
    command.envs(template.get_envs().filter_map(|(name, value)| Some((name, value?))));
    command.stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut server = Upgradable::start(command);
    let broken = dir.path().join("broken");
    fs::write(&broken, "#!/bin/sh\necho error: not for this machine >&2\nexit 3\n").unwrap();
    fs::set_permissions(&broken, std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
    fs::rename(&broken, &program).unwrap();
    server.signal("USR2");
    let mut line = String::new();
    BufReader::new(server.child.stderr.take().unwrap()).read_line(&mut line).unwrap();
    assert!(line.contains("no upgrade") && line.contains("error: not for this machine"), "{line}");
    assert!(get(server.ops, "/readyz").starts_with("HTTP/1.1 200"));
}

/// A server that is given its sockets by the program that starts it.
fn activated(dir: &Path, sockets: &[TcpListener; 3], names: &str) -> Command {
    let mut command = serve(dir);
    command.arg("--dev").env("LISTEN_FDS", "3").env("LISTEN_FDNAMES", names);
    let passed = sockets.iter().zip(3..);
    let passed = passed.map(|(socket, child_fd)| FdMapping { parent_fd: socket.try_clone().unwrap().into(), child_fd });
    command.fd_mappings(passed.collect()).unwrap();
    command
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn clients_that_come_while_no_process_runs_are_served_by_the_next() {
    let dir = tempfile::tempdir().unwrap();
    let sockets = [(); 3].map(|()| TcpListener::bind("127.0.0.1:0").unwrap());
    let [grpc, http, ops] = sockets.each_ref().map(|socket| socket.local_addr().unwrap());
    let mut server = Upgradable::start(activated(dir.path(), &sockets, "grpc:http:ops"));
    assert_eq!([server.grpc, server.http, server.ops], [grpc, http, ops]);
    let mut client = Client::connect(grpc, agent("a")).await.unwrap();
    for _ in 0..3 {
        server.signal("KILL");
        server.child.wait().unwrap();
        while client.next().await.is_ok_and(|frame| frame.is_some()) {}
        // At once, as stock clients come again.
        let mut comers = JoinSet::from_iter([async move { Client::connect(grpc, agent("a")).await }]);
        let asked = std::thread::spawn(move || get(ops, "/livez"));
        assert!(comers.try_join_next().is_none());
        server = Upgradable::start(activated(dir.path(), &sockets, "grpc:http:ops"));
        client = comers.join_next().await.unwrap().unwrap().unwrap();
        assert!(asked.join().unwrap().starts_with("HTTP/1.1 200"));
    }
}

#[test]
fn a_socket_for_none_of_the_listeners_is_refused_with_its_address() {
    let dir = tempfile::tempdir().unwrap();
    let sockets = [(); 3].map(|()| TcpListener::bind("127.0.0.1:0").unwrap());
    let output = activated(dir.path(), &sockets, "grpc:http:web").output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(!output.status.success());
    assert!(
        said.contains("inherited socket 2") && said.contains(&sockets[2].local_addr().unwrap().to_string()),
        "{said}"
    );
}

#[test]
fn a_server_that_admits_everybody_takes_no_socket_beyond_this_machine() {
    let dir = tempfile::tempdir().unwrap();
    let sockets = ["127.0.0.1:0", "0.0.0.0:0", "127.0.0.1:0"].map(|address| TcpListener::bind(address).unwrap());
    let output = activated(dir.path(), &sockets, "grpc:http:ops").output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(!output.status.success());
    assert!(said.contains("--dev") && said.contains(&sockets[1].local_addr().unwrap().to_string()), "{said}");
}

//! A server in a process of its own, and streams to it: what the benches of this package share.

use std::{
    io::{BufRead as _, BufReader},
    net::SocketAddr,
    process::{Child, Command, Stdio},
    time::Duration,
};

use tokio::sync::mpsc;
use tokio_stream::{StreamExt as _, wrappers::ReceiverStream};
use tonic::{Streaming, transport::Endpoint};
use trunkline_proto::v1::{
    AgentIdentity, CheckpointOperation, DownstreamMessage, InitConnection, UpstreamMessage,
    aether_gateway_client::AetherGatewayClient, checkpoint_operation::OpType::Load,
    downstream_message::Payload as Down, init_connection::ClientType, upstream_message::Payload as Up,
};

/// Which sections the command line asks for: those that it names, or all.
pub(crate) fn wanted() -> impl Fn(&str) -> bool {
    let wanted = words();
    move |name| wanted.is_empty() || wanted.iter().any(|wanted| wanted == name)
}

/// The words of the command line, without the options that cargo adds.
pub(crate) fn words() -> Vec<String> {
    std::env::args().skip(1).filter(|arg| !arg.starts_with('-')).collect()
}

/// A server in a process of its own; killed when dropped.
pub(crate) struct Peer {
    pub(crate) child: Child,
    pub(crate) address: SocketAddr,
    pub(crate) http: SocketAddr,
    pub(crate) ops: SocketAddr,
    _dir: Option<tempfile::TempDir>,
}

impl Peer {
    pub(crate) fn trunkline() -> Self {
        Self::durable("machine")
    }

    pub(crate) fn durable(what: &str) -> Self {
        let dir = tempfile::tempdir().unwrap();
        Self::start(Self::serve(dir.path(), what), dir)
    }

    /// On data that outlives it.
    pub(crate) fn on(dir: &std::path::Path) -> Self {
        Self::started(Self::serve(dir, "machine"))
    }

    pub(crate) fn serve(dir: &std::path::Path, durability: &str) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_trunkline"));
        command.args(["serve", "--dev", "--grpc", "127.0.0.1:0", "--http", "127.0.0.1:0", "--ops", "127.0.0.1:0"]);
        command.arg("--data-dir").arg(dir).args(["--durability", durability]).env("TRUNKLINE_LOG", "error");
        command
            .env("TRUNKLINE__LIMITS__MESSAGES_PER_SECOND", "0")
            .env("TRUNKLINE__LIMITS__CONNECTIONS_PER_WORKSPACE", "0");
        command
    }

    pub(crate) fn start(command: Command, dir: tempfile::TempDir) -> Self {
        Self::started(command).owning(dir)
    }

    fn owning(mut self, dir: tempfile::TempDir) -> Self {
        self._dir = Some(dir);
        self
    }

    fn started(mut command: Command) -> Self {
        let mut child = command.stdout(Stdio::piped()).spawn().unwrap();
        let mut line = String::new();
        BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).unwrap();
        let address = |name| line.split_whitespace().find_map(|word| word.strip_prefix(name)).expect(&line);
        let [address, http, ops] = ["grpc=", "http=", "ops="].map(|name| address(name).parse().unwrap());
        Self { address, http, ops, child, _dir: None }
    }

    /// Memory that it holds, in bytes.
    pub(crate) fn resident(&self) -> usize {
        let statm = std::fs::read_to_string(format!("/proc/{}/statm", self.child.id())).unwrap();
        statm.split(' ').nth(1).unwrap().parse::<usize>().unwrap() * 4096
    }

    /// Files that it has open, connections among them.
    pub(crate) fn files(&self) -> usize {
        std::fs::read_dir(format!("/proc/{}/fd", self.child.id())).unwrap().count()
    }

    /// CPU that the process took so far. A tick is a hundredth of a second on every Linux that there is.
    pub(crate) fn cpu(&self) -> Duration {
        let stat = std::fs::read_to_string(format!("/proc/{}/stat", self.child.id())).unwrap();
        let fields: Vec<&str> = stat[stat.rfind(')').unwrap() + 2..].split(' ').collect();
        let ticks: u64 = fields[11].parse::<u64>().unwrap() + fields[12].parse::<u64>().unwrap();
        Duration::from_millis(ticks * 10)
    }
}

impl Drop for Peer {
    fn drop(&mut self) {
        // It may be gone already, which is as good.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

pub(crate) struct Stream {
    pub(crate) up: mpsc::Sender<UpstreamMessage>,
    pub(crate) down: Streaming<DownstreamMessage>,
}

impl Stream {
    pub(crate) async fn open(address: SocketAddr, specifier: &str) -> Self {
        let agent = AgentIdentity { workspace: "w".into(), implementation: "b".into(), specifier: specifier.into() };
        Self::open_as(address, ClientType::Agent(agent)).await
    }

    pub(crate) async fn open_as(address: SocketAddr, who: ClientType) -> Self {
        let channel = Endpoint::from_shared(format!("http://{address}")).unwrap().connect().await.unwrap();
        let (up, frames) = mpsc::channel(1024);
        let init = InitConnection { client_type: Some(who), ..InitConnection::default() };
        up.send(frame(Up::Init(init.into()))).await.unwrap();
        let mut client = AetherGatewayClient::new(channel).max_decoding_message_size(32 * 1024 * 1024);
        let mut down = client.connect(ReceiverStream::new(frames)).await.unwrap().into_inner();
        down.next().await.unwrap().unwrap();
        Self { up, down }
    }

    /// Returns when all that was sent before is done: operations of one stream take effect in order.
    pub(crate) async fn barrier(&mut self) {
        let load = CheckpointOperation { op: Load.into(), key: "b".into(), ..CheckpointOperation::default() };
        self.up.send(frame(Up::CheckpointOp(load.into()))).await.unwrap();
        while !matches!(self.down.next().await.unwrap().unwrap().payload, Some(Down::Checkpoint(_))) {}
    }
}

pub(crate) fn frame(payload: Up) -> UpstreamMessage {
    UpstreamMessage { payload: Some(payload), ..UpstreamMessage::default() }
}

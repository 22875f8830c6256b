//! A raw `aether.v1` stream, and what makes scenarios read as prose.

use std::{
    net::SocketAddr,
    sync::atomic::{AtomicU32, Ordering::Relaxed},
    time::Duration,
};

use tokio::{net::TcpListener, sync::mpsc, task::JoinHandle};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{
    Code, Status, Streaming,
    transport::{Channel, Endpoint},
};
use trunkline::{Config, Server};
use trunkline_core::limits::Limits;
use trunkline_proto::v1::{
    AgentIdentity, CheckpointOperation, ConnectionAck, DownstreamMessage, ErrorResponse, IncomingMessage,
    InitConnection, MessageType, SendMessage, TaskIdentity, UpstreamMessage,
    aether_gateway_client::AetherGatewayClient, checkpoint_operation::OpType, downstream_message::Payload as Down,
    init_connection::ClientType, upstream_message::Payload as Up,
};

/// What a client declares that says what it has.
pub(crate) const ACK_EXTENSION: &str = "https://trunkline.dev/ext/ack/v1";

/// Nothing here takes longer unless it hangs.
const PATIENCE: Duration = Duration::from_secs(20);

/// A server without a limit on rates, in a directory of its own.
pub(crate) async fn server(dir: &std::path::Path) -> Server {
    let limits = Limits { messages_per_second: 0, ..Limits::default() };
    Server::start(Config { data_dir: dir.to_owned(), dev: true, limits, ..Config::on_free_ports() }).await.unwrap()
}

pub(crate) struct Client {
    up: mpsc::Sender<UpstreamMessage>,
    down: Streaming<DownstreamMessage>,
    pub(crate) ack: ConnectionAck,
}

pub(crate) fn agent(specifier: &str) -> InitConnection {
    let agent = AgentIdentity { workspace: "ws".into(), implementation: "impl".into(), specifier: specifier.into() };
    InitConnection { client_type: Some(ClientType::Agent(agent)), ..InitConnection::default() }
}

pub(crate) fn worker() -> InitConnection {
    let task = TaskIdentity { workspace: "ws".into(), implementation: "work".into(), ..TaskIdentity::default() };
    InitConnection { client_type: Some(ClientType::Task(task)), ..InitConnection::default() }
}

pub(crate) fn lane(specifier: &str) -> String {
    format!("ag::ws::impl::{specifier}")
}

impl Client {
    pub(crate) async fn connect(grpc: SocketAddr, init: InitConnection) -> Result<Self, Status> {
        let endpoint = Endpoint::from_shared(format!("http://{grpc}")).unwrap();
        let channel = endpoint.connect().await.map_err(|e| Status::unavailable(e.to_string()))?;
        Self::connect_over(channel, init).await
    }

    pub(crate) async fn connect_over(channel: Channel, init: InitConnection) -> Result<Self, Status> {
        let (up, frames) = mpsc::channel(64);
        let init = UpstreamMessage { payload: Some(Up::Init(init.into())), ..UpstreamMessage::default() };
        up.send(init).await.unwrap();
        // Takes frames of 4 MiB, as the published clients do.
        let mut client = AetherGatewayClient::new(channel);
        let down = client.connect(ReceiverStream::new(frames)).await?.into_inner();
        let mut client = Self { up, down, ack: ConnectionAck::default() };
        match client.next().await? {
            Some(Down::ConnectionAck(ack)) => client.ack = *ack,
            other => panic!("expected an acknowledgement, got {other:?}"),
        }
        Ok(client)
    }

    /// As [`Client::connect`], for somebody whose last connection has just ended.
    pub(crate) async fn connect_when_free(grpc: SocketAddr, init: InitConnection) -> Self {
        let begun = std::time::Instant::now();
        loop {
            match Self::connect(grpc, init.clone()).await {
                Err(taken) if taken.code() == Code::AlreadyExists && begun.elapsed() < PATIENCE => {}
                connected => return connected.unwrap(),
            }
        }
    }

    pub(crate) async fn next(&mut self) -> Result<Option<Down>, Status> {
        let frame = tokio::time::timeout(PATIENCE, self.down.message()).await.expect("a frame, or the end");
        Ok(frame?.map(|frame| frame.payload.expect("a payload")))
    }

    /// As [`Client::next`], however long it takes.
    pub(crate) async fn next_whenever(&mut self) -> Result<Option<Down>, Status> {
        Ok(self.down.message().await?.map(|frame| frame.payload.expect("a payload")))
    }

    /// The next frame as it is.
    pub(crate) async fn frame(&mut self) -> DownstreamMessage {
        let frame = tokio::time::timeout(PATIENCE, self.down.message()).await.expect("a frame, or the end");
        frame.unwrap().expect("a frame")
    }

    /// The next message; what else comes is passed over.
    pub(crate) async fn message(&mut self) -> IncomingMessage {
        loop {
            match self.next().await.unwrap() {
                Some(Down::Msg(message)) => return message,
                Some(Down::Config(_) | Down::ProgressUpdate(_)) => {}
                other => panic!("expected a message, got {other:?}"),
            }
        }
    }

    /// The next error; what else comes is passed over.
    pub(crate) async fn error(&mut self) -> ErrorResponse {
        loop {
            match self.next().await.unwrap() {
                Some(Down::Error(error)) => return *error,
                Some(Down::Config(_) | Down::Msg(_) | Down::ProgressUpdate(_)) => {}
                other => panic!("expected an error, got {other:?}"),
            }
        }
    }

    pub(crate) async fn numbers(&mut self, count: usize) -> Vec<usize> {
        let mut numbers = Vec::new();
        while numbers.len() < count {
            numbers.push(std::str::from_utf8(&self.message().await.payload).unwrap().parse().unwrap());
        }
        numbers
    }

    pub(crate) async fn send(&self, target: &str, payload: impl Into<bytes::Bytes>) {
        let message = SendMessage {
            target_topic: target.into(),
            payload: payload.into(),
            message_type: MessageType::Chat.into(),
            ..SendMessage::default()
        };
        self.put(Up::Send(message)).await;
    }

    pub(crate) async fn put(&self, payload: Up) {
        self.up.send(UpstreamMessage { payload: Some(payload), ..UpstreamMessage::default() }).await.unwrap();
    }

    /// `None` if the connection is gone.
    pub(crate) async fn raw(&self, frame: UpstreamMessage) -> Option<()> {
        self.up.send(frame).await.ok()
    }

    /// Everything sent before is durable: frames of one stream take effect in order. Messages that arrive meanwhile are
    /// passed over.
    pub(crate) async fn barrier(&mut self) {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let request_id = NEXT.fetch_add(1, Relaxed).to_string();
        let load = CheckpointOperation {
            op: OpType::Load.into(),
            key: "barrier".into(),
            request_id: request_id.clone(),
            ..CheckpointOperation::default()
        };
        self.put(Up::CheckpointOp(load.into())).await;
        loop {
            match self.next().await.unwrap() {
                Some(Down::Checkpoint(reply)) if reply.request_id == request_id => return,
                Some(Down::Msg(_) | Down::Config(_) | Down::ProgressUpdate(_)) => {}
                other => panic!("expected the barrier's reply, got {other:?}"),
            }
        }
    }

    /// What came of the requests before, of which at most one failed.
    pub(crate) async fn outcome(&mut self) -> Option<ErrorResponse> {
        let load =
            CheckpointOperation { op: OpType::Load.into(), key: "outcome".into(), ..CheckpointOperation::default() };
        self.put(Up::CheckpointOp(load.into())).await;
        let mut error = None;
        loop {
            match self.next().await.unwrap() {
                Some(Down::Checkpoint(_)) => return error,
                Some(Down::Error(found)) => error = Some(*found),
                Some(Down::Msg(_) | Down::Config(_) | Down::ProgressUpdate(_)) => {}
                other => panic!("expected an outcome, got {other:?}"),
            }
        }
    }

    /// Says goodbye, and does not wait.
    pub(crate) fn says_goodbye(self) -> Streaming<DownstreamMessage> {
        self.down
    }

    /// Says goodbye and waits until the server has let go.
    pub(crate) async fn close(self) {
        let Self { up, mut down, .. } = self;
        drop(up);
        while let Ok(Some(_)) = tokio::time::timeout(PATIENCE, down.message()).await.expect("the end") {}
    }

    /// How the stream ends, whatever comes before; `None` is a clean end.
    pub(crate) async fn end(&mut self) -> Option<Code> {
        loop {
            match self.next().await {
                Ok(Some(_)) => {}
                Ok(None) => return None,
                Err(status) => return Some(status.code()),
            }
        }
    }
}

/// A line to a server that can be cut, as no client that can still say goodbye does.
pub(crate) struct Line {
    pub(crate) grpc: SocketAddr,
    carries: JoinHandle<()>,
}

impl Line {
    /// For one connection.
    pub(crate) async fn to(grpc: SocketAddr) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let here = listener.local_addr().unwrap();
        let carries = tokio::spawn(async move {
            let (mut near, _) = listener.accept().await.unwrap();
            let mut far = tokio::net::TcpStream::connect(grpc).await.unwrap();
            let _ = tokio::io::copy_bidirectional(&mut near, &mut far).await;
        });
        Self { grpc: here, carries }
    }

    /// From now on nothing gets through.
    pub(crate) async fn cut(self) {
        self.carries.abort();
        // An error is its end.
        let _ = self.carries.await;
    }
}

//! A server that does what the test says, frame by frame: for what a real one does rarely, differently, or not yet.

use std::{net::SocketAddr, pin::Pin, time::Duration};

use tokio::sync::mpsc;
use tokio_stream::{
    Stream, StreamExt as _,
    wrappers::{ReceiverStream, TcpListenerStream},
};
use tonic::{Request, Response, Status, Streaming};
use trunkline_client::{
    Agent, Builder, Principal, Reconnect,
    proto::{
        ConnectionAck, DownstreamMessage, InitConnection, Signal, UpstreamMessage,
        aether_gateway_server::{AetherGateway, AetherGatewayServer},
        downstream_message::Payload as Down,
        upstream_message::Payload as Up,
    },
};

use crate::server::soon;

/// The acknowledgement extension, which tells Trunkline from others.
pub(crate) const ACK: &str = "https://trunkline.dev/ext/ack/v1";

pub(crate) struct Peer {
    pub(crate) address: SocketAddr,
    lines: mpsc::Receiver<Line>,
    serving: tokio::task::JoinHandle<()>,
}

/// One connection of a client.
pub(crate) struct Line {
    pub(crate) init: InitConnection,
    up: Streaming<UpstreamMessage>,
    down: mpsc::Sender<Result<DownstreamMessage, Status>>,
}

type Frames = Pin<Box<dyn Stream<Item = Result<DownstreamMessage, Status>> + Send>>;

struct Gateway(mpsc::Sender<Line>);

#[tonic::async_trait]
impl AetherGateway for Gateway {
    type ConnectStream = Frames;

    async fn connect(&self, request: Request<Streaming<UpstreamMessage>>) -> Result<Response<Frames>, Status> {
        let mut up = request.into_inner();
        let Some(Up::Init(init)) = up.message().await?.and_then(|frame| frame.payload) else {
            return Err(Status::invalid_argument("first message must be InitConnection"));
        };
        let (down, frames) = mpsc::channel(64);
        let _ = self.0.send(Line { init: *init, up, down }).await;
        Ok(Response::new(Box::pin(ReceiverStream::new(frames))))
    }
}

impl Peer {
    pub(crate) async fn begin() -> Self {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let (sender, lines) = mpsc::channel(64);
        let service = AetherGatewayServer::new(Gateway(sender)).max_decoding_message_size(16 * 1024 * 1024);
        let serving = tokio::spawn(async move {
            let incoming = TcpListenerStream::new(listener);
            let _ = tonic::transport::Server::builder().add_service(service).serve_with_incoming(incoming).await;
        });
        Self { address, lines, serving }
    }

    pub(crate) async fn line(&mut self) -> Line {
        soon(self.lines.recv()).await.expect("a connection")
    }

    /// Connects a client, and accepts it as Trunkline would.
    pub(crate) async fn accept<P: Principal>(&mut self, builder: Builder<P>) -> (P, Line) {
        self.accept_as(builder, trunkline()).await
    }

    pub(crate) async fn accept_as<P: Principal>(&mut self, builder: Builder<P>, ack: ConnectionAck) -> (P, Line) {
        let connects = tokio::spawn(builder.address(self.address.to_string()).connect());
        let line = self.line().await;
        line.ack(ack).await;
        (soon(connects).await.unwrap().unwrap(), line)
    }

    pub(crate) async fn agent(&mut self) -> (Agent, Line) {
        self.accept(agent()).await
    }
}

impl Drop for Peer {
    fn drop(&mut self) {
        self.serving.abort();
    }
}

/// An agent that comes back at once.
pub(crate) fn agent() -> Builder<Agent> {
    Agent::builder("ws", "impl", "a").reconnect(quick())
}

/// Waits that a test can afford.
pub(crate) fn quick() -> Reconnect {
    Reconnect { first: Duration::from_millis(5), longest: Duration::from_millis(20), ..Reconnect::default() }
}

/// How Trunkline greets.
pub(crate) fn trunkline() -> ConnectionAck {
    ConnectionAck {
        session_id: "session-1".into(),
        server_supported_extensions: vec![ACK.into()],
        ..ConnectionAck::default()
    }
}

/// How another server greets.
pub(crate) fn stock() -> ConnectionAck {
    ConnectionAck { session_id: "session-1".into(), ..ConnectionAck::default() }
}

impl Line {
    pub(crate) async fn ack(&self, ack: ConnectionAck) {
        self.put(Down::ConnectionAck(ack.into())).await;
    }

    pub(crate) async fn put(&self, payload: Down) {
        self.frame(DownstreamMessage { payload: Some(payload), ..DownstreamMessage::default() }).await;
    }

    pub(crate) async fn frame(&self, frame: DownstreamMessage) {
        self.down.send(Ok(frame)).await.unwrap();
    }

    pub(crate) async fn signal(&self, signal: i32, reason: &str) {
        self.put(Down::Signal(Signal { r#type: signal, reason: reason.into() }.into())).await;
    }

    /// Ends it with an error.
    pub(crate) async fn fail(self, status: Status) {
        let _ = self.down.send(Err(status)).await;
    }

    /// The client's next frame.
    pub(crate) async fn next(&mut self) -> Up {
        soon(self.up.next()).await.expect("the stream goes on").unwrap().payload.expect("a payload")
    }

    /// The text of the client's next message.
    pub(crate) async fn text(&mut self) -> String {
        match self.next().await {
            Up::Send(message) => String::from_utf8(message.payload.to_vec()).unwrap(),
            other => panic!("expected a message, got {other:?}"),
        }
    }

    /// The client has said goodbye.
    pub(crate) async fn ended(&mut self) -> bool {
        !matches!(soon(self.up.next()).await, Some(Ok(_)))
    }

    /// Both directions apart.
    pub(crate) fn split(self) -> (Streaming<UpstreamMessage>, mpsc::Sender<Result<DownstreamMessage, Status>>) {
        (self.up, self.down)
    }
}

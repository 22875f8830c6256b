//! Sends any bytes as frames of `aether.v1` to a server, from each kind of principal: the server never panics, and a stream
//! that it does not end answers the request that follows.
//!
//! An input is a principal's number (1 byte), then frames, each after its length (2 bytes, little-endian).

#![no_main]
#![allow(clippy::panic, clippy::unwrap_used, clippy::expect_used, reason = "that is how a fuzzer is told")]

use std::{cell::RefCell, time::Duration};

use bytes::{Buf, BufMut as _, Bytes};
use libfuzzer_sys::fuzz_target;
use prost::Message as _;
use tokio::{runtime::Runtime, sync::mpsc};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{
    Status, Streaming,
    codec::{Codec, DecodeBuf, Decoder, EncodeBuf, Encoder},
    codegen::http::uri::PathAndQuery,
    transport::{Channel, Endpoint},
};
use trunkline::{Config, Server, config::Durability};
use trunkline_core::limits::Limits;
use trunkline_proto::v1::{
    AgentIdentity, BridgeIdentity, DownstreamMessage, InitConnection, KvOperation, MetricsBridgeIdentity,
    OrchestratorIdentity, ServiceIdentity, TaskIdentity, UpstreamMessage, UserIdentity, WorkflowEngineIdentity,
    downstream_message::Payload as Down, init_connection::ClientType, upstream_message::Payload as Up,
};

/// Nothing takes longer unless it hangs.
const PATIENCE: Duration = Duration::from_secs(20);

/// Inputs for one server, so that what they leave there does not add up.
const INPUTS_MAX: usize = 5000;

/// Longest frame of an input.
const FRAME_BYTES_MAX: usize = 1024;

struct Bench {
    runtime: Runtime,
    server: Option<Server>,
    dir: tempfile::TempDir,
    channel: Channel,
    streams: Vec<Option<Stream>>,
    inputs: usize,
}

struct Stream {
    up: mpsc::Sender<Bytes>,
    down: Streaming<Bytes>,
}

thread_local! {
    static BENCH: RefCell<Option<Bench>> = const { RefCell::new(None) };
}

fuzz_target!(|input: &[u8]| {
    let Some((principal, frames)) = input.split_first() else { return };
    BENCH.with_borrow_mut(|bench| {
        if bench.as_ref().is_some_and(|bench| bench.inputs >= INPUTS_MAX)
            && let Some(Bench { runtime, server, dir, .. }) = bench.take()
        {
            runtime.block_on(server.expect("a server").stop());
            drop(dir);
        }
        let bench = bench.get_or_insert_with(Bench::new);
        bench.inputs += 1;
        bench.run(usize::from(*principal), frames);
    });
});

impl Bench {
    fn new() -> Self {
        let (runtime, dir) = (Runtime::new().unwrap(), tempfile::tempdir().unwrap());
        let limits = Limits { messages_per_second: 0, audit_events_per_second: 0, ..Limits::default() };
        let data_dir = dir.path().to_owned();
        let config = Config { data_dir, dev: true, limits, durability: Durability::Process, ..Config::on_free_ports() };
        let server = runtime.block_on(Server::start(config)).unwrap();
        let endpoint = Endpoint::from_shared(format!("http://{}", server.addresses().grpc)).unwrap();
        let channel = runtime.block_on(endpoint.connect()).unwrap();
        let streams = principals().iter().map(|_| None).collect();
        Self { runtime, server: Some(server), dir, channel, streams, inputs: 0 }
    }

    fn run(&mut self, principal: usize, frames: &[u8]) {
        let (number, frames) = (principal % self.streams.len(), split(frames));
        let (channel, open) = (self.channel.clone(), self.streams[number].take());
        self.streams[number] = self.runtime.block_on(async {
            let stream = match open {
                Some(stream) => stream,
                None => Stream::open(channel, principals()[number].clone()).await,
            };
            tokio::time::timeout(PATIENCE, stream.exchange(frames)).await.expect("an answer, or the end")
        });
    }
}

impl Stream {
    /// Again while the server has not noticed yet that the last one is gone.
    async fn open(channel: Channel, init: ClientType) -> Self {
        let init = InitConnection { client_type: Some(init), ..InitConnection::default() };
        let init = UpstreamMessage { payload: Some(Up::Init(init.into())), ..UpstreamMessage::default() };
        let begun = std::time::Instant::now();
        loop {
            let (up, frames) = mpsc::channel(64);
            up.send(init.encode_to_vec().into()).await.unwrap();
            let mut client = tonic::client::Grpc::new(channel.clone());
            client.ready().await.unwrap();
            let path = PathAndQuery::from_static("/aether.v1.AetherGateway/Connect");
            let request = tonic::Request::new(ReceiverStream::new(frames));
            let opened = async {
                let mut down = client.streaming(request, path, Raw).await?.into_inner();
                down.message().await?.ok_or_else(|| Status::unavailable("no acknowledgement"))?;
                Ok::<_, Status>(Self { up, down })
            };
            match opened.await {
                Ok(stream) => return stream,
                Err(status) => assert!(begun.elapsed() < PATIENCE, "{status}"),
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }

    /// Answers the stream, unless the server ended it.
    async fn exchange(mut self, frames: Vec<Bytes>) -> Option<Self> {
        for frame in frames {
            self.up.send(frame).await.ok()?;
        }
        let asked = KvOperation { key: "fuzz".into(), request_id: "the last one".into(), ..KvOperation::default() };
        let asked = UpstreamMessage { payload: Some(Up::KvOp(asked.into())), ..UpstreamMessage::default() };
        self.up.send(asked.encode_to_vec().into()).await.ok()?;
        loop {
            let frame = self.down.message().await.ok()??;
            let frame = DownstreamMessage::decode(frame).expect("a frame of the contract");
            match frame.payload {
                Some(Down::Kv(reply)) if reply.request_id == "the last one" => return Some(self),
                Some(Down::Error(error)) if error.request_id == "the last one" => return Some(self),
                Some(_) => {}
                None => panic!("a frame without a payload"),
            }
        }
    }
}

fn principals() -> Vec<ClientType> {
    let (implementation, specifier, workspace) = ("impl".to_owned(), "one".to_owned(), "ws".to_owned());
    vec![
        ClientType::Orchestrator(OrchestratorIdentity {
            implementation: implementation.clone(),
            specifier: specifier.clone(),
            ..OrchestratorIdentity::default()
        }),
        ClientType::Agent(AgentIdentity {
            workspace: workspace.clone(),
            implementation: implementation.clone(),
            specifier: specifier.clone(),
        }),
        ClientType::Task(TaskIdentity {
            workspace,
            implementation: implementation.clone(),
            unique_specifier: specifier.clone(),
        }),
        ClientType::User(UserIdentity { user_id: "ann".into(), window_id: "w1".into() }),
        ClientType::Service(ServiceIdentity {
            implementation: implementation.clone(),
            specifier: specifier.clone(),
            ..ServiceIdentity::default()
        }),
        ClientType::Bridge(BridgeIdentity { implementation, specifier }),
        ClientType::WorkflowEngine(WorkflowEngineIdentity::default()),
        ClientType::MetricsBridge(MetricsBridgeIdentity::default()),
    ]
}

fn split(mut bytes: &[u8]) -> Vec<Bytes> {
    let mut frames = Vec::new();
    while let Some((length, rest)) = bytes.split_first_chunk() {
        let length = (usize::from(u16::from_le_bytes(*length)) % FRAME_BYTES_MAX).min(rest.len());
        frames.push(Bytes::copy_from_slice(&rest[..length]));
        bytes = &rest[length..];
    }
    frames
}

/// Frames as they are.
#[derive(Clone, Copy)]
struct Raw;

impl Codec for Raw {
    type Encode = Bytes;
    type Decode = Bytes;
    type Encoder = Self;
    type Decoder = Self;

    fn encoder(&mut self) -> Self {
        *self
    }

    fn decoder(&mut self) -> Self {
        *self
    }
}

impl Encoder for Raw {
    type Item = Bytes;
    type Error = Status;

    fn encode(&mut self, item: Bytes, buffer: &mut EncodeBuf<'_>) -> Result<(), Status> {
        buffer.put(item);
        Ok(())
    }
}

impl Decoder for Raw {
    type Item = Bytes;
    type Error = Status;

    fn decode(&mut self, buffer: &mut DecodeBuf<'_>) -> Result<Option<Bytes>, Status> {
        Ok(Some(buffer.copy_to_bytes(buffer.remaining())))
    }
}

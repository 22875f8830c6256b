//! What the published suite does not try of the handshake.

use std::time::{Duration, Instant};

use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Code, transport::Endpoint};
use trunkline::{Config, Server};
use trunkline_core::limits::Limits;
use trunkline_proto::v1::{
    CheckpointOperation, MessageType, SendMessage, UpstreamMessage, aether_gateway_client::AetherGatewayClient,
    checkpoint_operation::OpType, downstream_message::Payload as Down, upstream_message::Payload as Up,
};

use crate::client::{agent, lane, server};

fn frame(payload: Up) -> UpstreamMessage {
    UpstreamMessage { payload: Some(payload), ..UpstreamMessage::default() }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_says_nothing_is_sent_away() {
    let dir = tempfile::tempdir().unwrap();
    let limits = Limits { handshake_seconds: 1, ..Limits::default() };
    assert_eq!(Limits::default().handshake_seconds, 30, "the published figure");
    let config = Config { data_dir: dir.path().to_owned(), dev: true, limits, ..Config::on_free_ports() };
    let server = Server::start(config).await.unwrap();
    let endpoint = Endpoint::from_shared(format!("http://{}", server.addresses().grpc)).unwrap();
    let (_up, frames) = mpsc::channel(1);
    let mut client = AetherGatewayClient::new(endpoint.connect().await.unwrap());
    let mut down = client.connect(ReceiverStream::new(frames)).await.unwrap().into_inner();
    let begun = Instant::now();
    let status = down.message().await.err().unwrap();
    assert_eq!((status.code(), status.message()), (Code::DeadlineExceeded, "timeout waiting for InitConnection"));
    assert!(begun.elapsed() > Duration::from_millis(900), "{:?}", begun.elapsed());
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn frames_right_behind_the_first_are_handled_in_order() {
    let dir = tempfile::tempdir().unwrap();
    let server = server(dir.path()).await;
    let endpoint = Endpoint::from_shared(format!("http://{}", server.addresses().grpc)).unwrap();
    let (up, frames) = mpsc::channel(256);
    up.send(frame(Up::Init(agent("one").into()))).await.unwrap();
    for n in 0..100 {
        let message = SendMessage {
            target_topic: lane("one"),
            payload: n.to_string().into(),
            message_type: MessageType::Chat.into(),
            ..SendMessage::default()
        };
        up.send(frame(Up::Send(message))).await.unwrap();
    }
    let load = CheckpointOperation { op: OpType::Load.into(), key: "k".into(), ..CheckpointOperation::default() };
    up.send(frame(Up::CheckpointOp(load.into()))).await.unwrap();
    let mut client = AetherGatewayClient::new(endpoint.connect().await.unwrap());
    let mut down = client.connect(ReceiverStream::new(frames)).await.unwrap().into_inner();
    let (mut first, mut numbers, mut answered) = (true, Vec::new(), false);
    while numbers.len() < 100 || !answered {
        match down.message().await.unwrap().unwrap().payload.unwrap() {
            Down::ConnectionAck(_) => assert!(first, "the acknowledgement comes first"),
            Down::Msg(message) => {
                numbers.push(std::str::from_utf8(&message.payload).unwrap().parse::<usize>().unwrap());
            }
            Down::Checkpoint(_) => answered = true,
            Down::Config(_) => {}
            other => panic!("{other:?}"),
        }
        first = false;
    }
    assert_eq!(numbers, (0..100).collect::<Vec<_>>());
    server.stop().await;
}

//! What is too much is refused with how long to wait, and harms nobody else.

use tonic::Code;
use trunkline::{Config, Server};
use trunkline_core::limits::Limits;
use trunkline_proto::v1::{
    KvOperation,
    downstream_message::Payload as Down,
    kv_operation::{OpType, Scope},
    upstream_message::Payload as Up,
};

use crate::client::{Client, agent, lane};

async fn server(dir: &std::path::Path, limits: Limits) -> Server {
    Server::start(Config { data_dir: dir.to_owned(), dev: true, limits, ..Config::on_free_ports() }).await.unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_burst_passes_and_the_rest_is_told_to_wait() {
    let dir = tempfile::tempdir().unwrap();
    let limits = Limits { messages_per_second: 1, message_burst: 3, ..Limits::default() };
    let server = server(dir.path(), limits).await;
    let mut client = Client::connect(server.addresses().grpc, agent("one")).await.unwrap();
    for n in 0..5 {
        client.send(&lane("away"), n.to_string()).await;
    }
    for _ in 3..5 {
        let error = client.error().await;
        assert_eq!((error.code.as_str(), error.retryable, error.retry_after_ms), ("ERR_RATE_LIMITED", true, 1000));
    }
    let mut away = Client::connect(server.addresses().grpc, agent("away")).await.unwrap();
    assert_eq!(away.numbers(3).await, [0, 1, 2]);
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_full_workspace_takes_nobody_until_somebody_leaves() {
    let dir = tempfile::tempdir().unwrap();
    let server = server(dir.path(), Limits { connections_per_workspace: 2, ..Limits::default() }).await;
    let grpc = server.addresses().grpc;
    let one = Client::connect(grpc, agent("one")).await.unwrap();
    let two = Client::connect(grpc, agent("two")).await.unwrap();
    let refused = Client::connect(grpc, agent("three")).await.err().unwrap();
    assert_eq!(refused.code(), Code::ResourceExhausted);
    assert_eq!(refused.message(), "quota exceeded for connections in workspace 'ws': current 2, limit 2");
    assert_eq!(refused.metadata().get("grpc-retry-pushback-ms").unwrap(), "1000");
    // Whoever comes back to its own session needs no other's place.
    let mut init = agent("two");
    init.resume_session_id = two.ack.session_id.clone();
    let again = Client::connect(grpc, init).await.unwrap();
    assert!(again.ack.resumed);
    drop(two);
    one.close().await;
    Client::connect(grpc, agent("three")).await.unwrap().close().await;
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn sizes_are_those_of_the_settings() {
    let dir = tempfile::tempdir().unwrap();
    let limits = Limits { payload_bytes_max: 1000, frame_bytes_max: 10_000, ..Limits::default() };
    let server = server(dir.path(), limits).await;
    let grpc = server.addresses().grpc;
    let mut client = Client::connect(grpc, agent("one")).await.unwrap();
    client.send(&lane("one"), vec![1; 1000]).await;
    assert_eq!(client.message().await.payload.len(), 1000);
    client.send(&lane("one"), vec![1; 1001]).await;
    let error = client.error().await;
    assert_eq!(error.code, "ERR_PAYLOAD_TOO_LARGE");
    assert_eq!(error.message, "message payload size 1001 exceeds maximum of 1000 bytes");
    client.send(&lane("one"), vec![1; 10_000]).await;
    assert_eq!(client.end().await, Some(Code::ResourceExhausted));
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_set_takes_as_many_members_as_the_settings_say() {
    let dir = tempfile::tempdir().unwrap();
    let server = server(dir.path(), Limits { kv_members_per_set: 2, ..Limits::default() }).await;
    let mut client = Client::connect(server.addresses().grpc, agent("one")).await.unwrap();
    let mut add = async |number: usize, member: &str| {
        let number = number.to_string();
        let operation = KvOperation {
            op: OpType::SetAdd.into(),
            scope: Scope::WorkspaceExclusive.into(),
            key: "voters".into(),
            request_id: number.clone(),
            value: member.as_bytes().to_vec().into(),
            ..KvOperation::default()
        };
        client.put(Up::KvOp(operation.into())).await;
        loop {
            match client.next().await.unwrap() {
                Some(Down::Kv(reply)) if reply.success => return Ok((reply.applied, reply.counter_value)),
                Some(Down::Error(error)) if error.request_id == number => return Err(error.code),
                // A refusal has a reply, too.
                Some(Down::Kv(_) | Down::Config(_)) => {}
                other => panic!("expected a reply, got {other:?}"),
            }
        }
    };
    let large = "x".repeat(4097);
    let steps = [
        ("ann", Ok((true, 1))),
        ("bob", Ok((true, 2))),
        ("eve", Err("ERR_QUOTA_001".to_owned())),
        // It is a member already.
        ("ann", Ok((false, 2))),
        (&large, Err("ERR_INVALID_ARGUMENT".to_owned())),
    ];
    for (number, (member, expected)) in steps.into_iter().enumerate() {
        assert_eq!(add(number, member).await, expected, "{number}");
    }
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_report_of_progress_is_no_larger_than_a_message() {
    use trunkline_proto::v1::{ProgressReport, upstream_message::Payload as Up};
    let dir = tempfile::tempdir().unwrap();
    let server = server(dir.path(), Limits { payload_bytes_max: 1000, ..Limits::default() }).await;
    let grpc = server.addresses().grpc;
    let mut one = Client::connect(grpc, agent("one")).await.unwrap();
    let mut two = Client::connect(grpc, agent("two")).await.unwrap();
    let report = |bytes| Up::Progress(Box::new(ProgressReport { summary: "x".repeat(bytes), ..Default::default() }));
    one.put(report(1001)).await;
    assert_eq!(one.error().await.code, "ERR_PAYLOAD_TOO_LARGE");
    one.put(report(900)).await;
    loop {
        use trunkline_proto::v1::downstream_message::Payload as Down;
        match two.next().await.unwrap().unwrap() {
            Down::Config(_) => {}
            Down::ProgressUpdate(update) => break assert_eq!(update.summary.len(), 900),
            other => panic!("{other:?}"),
        }
    }
    server.stop().await;
}

//! The server ends by telling everybody, within its deadline.

use std::time::{Duration, Instant};

use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
    task::JoinSet,
};
use tonic::Code;
use trunkline::{Config, Server};
use trunkline_proto::v1::{ExtensionDeclaration, downstream_message::Payload as Down, signal::SignalType};

use crate::client::{ACK_EXTENSION, Client, agent, lane, server};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn clients_are_told_and_new_ones_refused() {
    let dir = tempfile::tempdir().unwrap();
    let server = server(dir.path()).await;
    let grpc = server.addresses().grpc;
    let mut clients = Vec::new();
    for n in 0..50 {
        let mut init = agent(&n.to_string());
        let acknowledges = n % 2 == 0;
        if acknowledges {
            init.extensions = vec![ExtensionDeclaration { uri: ACK_EXTENSION.into(), ..Default::default() }];
        }
        clients.push((acknowledges, Client::connect(grpc, init).await.unwrap()));
    }
    let stopping = JoinSet::from_iter([server.stop()]);
    for (acknowledges, client) in &mut clients {
        let mut signals = Vec::new();
        let end = loop {
            match client.next().await {
                Ok(Some(Down::Signal(signal))) => signals.push(signal.r#type()),
                Ok(Some(_)) => {}
                Ok(None) => break Code::Ok,
                Err(status) => break status.code(),
            }
        };
        if *acknowledges {
            assert_eq!((end, signals), (Code::Ok, vec![SignalType::GracefulDisconnect]));
        } else {
            // For clients of the published SDKs, a signal is the end: they would stay away.
            assert_eq!((end, signals), (Code::Unavailable, vec![]));
        }
    }
    stopping.join_all().await;
    assert!(Client::connect(grpc, agent("late")).await.is_err());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_client_that_does_not_read_does_not_hold_it_up() {
    let dir = tempfile::tempdir().unwrap();
    let mut config = Config { data_dir: dir.path().to_owned(), dev: true, ..Config::on_free_ports() };
    config.limits.messages_per_second = 0;
    config.shutdown.timeout_seconds = 3;
    let server = Server::start(config).await.unwrap();
    let grpc = server.addresses().grpc;
    let wedged = Client::connect(grpc, agent("wedged")).await.unwrap();
    let mut sender = Client::connect(grpc, agent("sender")).await.unwrap();
    for _ in 0..64 {
        sender.send(&lane("wedged"), vec![7; 512 * 1024]).await;
    }
    sender.barrier().await;
    let begun = Instant::now();
    server.stop().await;
    assert!(begun.elapsed() < Duration::from_secs(10), "{:?}", begun.elapsed());
    drop(wedged);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_kept_connection_is_served_nothing_more() {
    let dir = tempfile::tempdir().unwrap();
    let server = server(dir.path()).await;
    let http = server.addresses().http;
    let ask = |path: &str| format!("GET {path} HTTP/1.1\r\nhost: {http}\r\n\r\n");
    // One that keeps the server busy, and one that had its answer.
    let busy = Client::connect(server.addresses().grpc, agent("busy")).await.unwrap();
    let mut kept = TcpStream::connect(http).await.unwrap();
    kept.write_all(ask("/sessions").as_bytes()).await.unwrap();
    let mut answer = vec![0; 4096];
    let bytes = kept.read(&mut answer).await.unwrap();
    assert!(answer.starts_with(b"HTTP/1.1 200"), "{}", String::from_utf8_lossy(&answer[..bytes]));
    let mut stopping = JoinSet::from_iter([server.stop()]);
    let mut rest = Vec::new();
    // Gone by the time that the next request comes, or it gets no answer.
    let _ = kept.readable().await;
    let _ = kept.write_all(ask("/sessions/stream").as_bytes()).await;
    let more = tokio::time::timeout(Duration::from_secs(5), kept.read_to_end(&mut rest)).await.unwrap();
    assert!(rest.is_empty(), "{more:?}: {}", String::from_utf8_lossy(&rest));
    drop(busy);
    stopping.join_next().await.unwrap().unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_connection_whose_request_was_not_read_says_that_it_ends() {
    let dir = tempfile::tempdir().unwrap();
    let server = server(dir.path()).await;
    let http = server.addresses().http;
    for (path, sent, says_so) in [("/nothing", 10, true), ("/nothing", 0, false), ("/sessions/one", 2, false)] {
        let mut stream = TcpStream::connect(http).await.unwrap();
        let length = if says_so { 1_000_000 } else { sent };
        let request = format!(
            "POST {path} HTTP/1.1\r\nhost: {http}\r\ncontent-length: {length}\r\n\r\n{}",
            "{}".repeat(sent / 2)
        );
        stream.write_all(request.as_bytes()).await.unwrap();
        let mut answer = vec![0; 4096];
        let bytes = stream.read(&mut answer).await.unwrap();
        let answer = String::from_utf8_lossy(&answer[..bytes]).to_lowercase();
        assert_eq!(answer.contains("connection: close"), says_so, "{path}: {answer}");
    }
    server.stop().await;
}

//! What operators are told is true.

use std::net::SocketAddr;

use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
};

use crate::client::{Client, agent, lane, server};

/// The status and the body.
pub(crate) async fn get(address: SocketAddr, path: &str) -> (u16, String) {
    let mut stream = TcpStream::connect(address).await.unwrap();
    let request = format!("GET {path} HTTP/1.1\r\nhost: {address}\r\nconnection: close\r\n\r\n");
    stream.write_all(request.as_bytes()).await.unwrap();
    let mut text = String::new();
    stream.read_to_string(&mut text).await.unwrap();
    let (head, body) = text.split_once("\r\n\r\n").unwrap();
    (head.split(' ').nth(1).unwrap().parse().unwrap(), body.to_owned())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn figures_count_what_happened() {
    let dir = tempfile::tempdir().unwrap();
    let server = server(dir.path()).await;
    let (grpc, ops) = (server.addresses().grpc, server.addresses().ops);
    let mut one = Client::connect(grpc, agent("one")).await.unwrap();
    let refused = Client::connect(grpc, agent("one")).await;
    assert!(refused.is_err());
    one.send(&lane("one"), "1").await;
    one.numbers(1).await;
    one.send("nowhere", "1").await;
    one.error().await;
    let (status, text) = get(ops, "/metrics").await;
    assert_eq!(status, 200);
    for line in [
        "trunkline_handshakes_total{code=\"ok\"} 1",
        "trunkline_handshakes_total{code=\"already_exists\"} 1",
        "trunkline_messages_accepted_total 1",
        "trunkline_messages_delivered_total 1",
        "trunkline_requests_refused_total{code=\"ERR_INVALID_TOPIC\"} 1",
        "trunkline_connections{kind=\"agent\"} 1",
        "trunkline_connections{kind=\"user\"} 0",
        "trunkline_store_up{part=\"log\"} 1",
        "trunkline_store_up{part=\"ledger\"} 1",
    ] {
        assert!(text.lines().any(|found| found == line), "{line}\n{text}");
    }
    assert!(text.ends_with("# EOF\n"));
    server.stop().await;
}

/// A page whose name somebody points at this machine reads no figures of a server that admits everybody.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn operators_of_a_server_that_admits_everybody_ask_it_under_its_own_name() {
    let dir = tempfile::tempdir().unwrap();
    let server = server(dir.path()).await;
    for (host, status) in [("localhost", 200), ("127.0.0.1:9090", 200), ("pointed.here.example", 403)] {
        let mut stream = TcpStream::connect(server.addresses().ops).await.unwrap();
        let request = format!("GET /metrics HTTP/1.1\r\nhost: {host}\r\nconnection: close\r\n\r\n");
        stream.write_all(request.as_bytes()).await.unwrap();
        let mut text = String::new();
        stream.read_to_string(&mut text).await.unwrap();
        assert!(text.starts_with(&format!("HTTP/1.1 {status} ")), "{host}: {text}");
    }
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn it_is_ready_until_it_stops_and_alive_until_it_ends() {
    let dir = tempfile::tempdir().unwrap();
    let server = server(dir.path()).await;
    let (grpc, ops) = (server.addresses().grpc, server.addresses().ops);
    for path in ["/livez", "/startupz", "/readyz", "/healthz"] {
        let (status, text) = get(ops, path).await;
        assert_eq!(status, 200, "{path}: {text}");
    }
    assert_eq!(get(ops, "/nothing").await.0, 404);
    // A client that does not read keeps the server draining for a while.
    let wedged = Client::connect(grpc, agent("wedged")).await.unwrap();
    let sender = Client::connect(grpc, agent("sender")).await.unwrap();
    for _ in 0..64 {
        sender.send(&lane("wedged"), vec![7; 512 * 1024]).await;
    }
    // The store was stopped behind the server's back: it lives, and is not ready.
    server.store().log.stop().await;
    let (status, text) = get(ops, "/readyz").await;
    assert_eq!((status, get(ops, "/livez").await.0), (503, 200), "{text}");
    assert!(text.contains("log: ") && text.contains("ledger: ok"), "{text}");
    drop((wedged, sender));
    server.stop().await;
    assert!(TcpStream::connect(ops).await.is_err());
}

//! What the listeners bear: clients that are silent, fast, many on one connection, or more than there are descriptors.

use std::{net::SocketAddr, time::Duration};

use futures_util::stream;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
    time::{Instant, timeout},
};
use tonic::{
    Code, Status, Streaming,
    body::Body,
    transport::{Channel, Endpoint},
};
use tonic_health::pb::{
    HealthCheckRequest, HealthCheckResponse, health_check_response::ServingStatus, health_client::HealthClient,
};
use tower::ServiceExt as _;
use trunkline::{Config, Server};
use trunkline_core::limits::Limits;

use crate::{
    client::{Client, agent, lane, server},
    process::Process,
};

/// Nothing here takes longer unless it hangs.
const PATIENCE: Duration = Duration::from_secs(20);

async fn channel(grpc: SocketAddr) -> Channel {
    Endpoint::from_shared(format!("http://{grpc}")).unwrap().connect().await.unwrap()
}

/// Connections that say nothing.
async fn silent(address: SocketAddr, count: usize) -> Vec<TcpStream> {
    let mut all = Vec::new();
    for _ in 0..count {
        all.push(TcpStream::connect(address).await.unwrap());
    }
    all
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn small_messages_wait_for_a_store_that_does_not_answer() {
    let dir = tempfile::tempdir().unwrap();
    let server = server(dir.path()).await;
    let grpc = server.addresses().grpc;
    let shared = channel(grpc).await;
    let sender = Client::connect_over(shared.clone(), agent("sender")).await.unwrap();
    let mut neighbour = Client::connect_over(shared, agent("neighbour")).await.unwrap();
    let mut receiver = Client::connect(grpc, agent("receiver")).await.unwrap();
    // More than the stream's window and what its task takes, and less than with what is read ahead.
    let count = 21_000;
    let hold = server.store().log.hold().await;
    let sends = async {
        for n in 0..count {
            sender.send(&lane("receiver"), format!("{n:050}")).await;
        }
    };
    // The transport of the client takes them all although not one is on disk.
    timeout(PATIENCE, sends).await.unwrap();
    for _ in 0..10 {
        neighbour.barrier().await;
    }
    drop(hold);
    assert_eq!(receiver.numbers(count).await, (0..count).collect::<Vec<_>>());
    drop(sender);
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_client_that_does_not_read_its_replies_is_not_cut_for_small_messages() {
    let dir = tempfile::tempdir().unwrap();
    let server = server(dir.path()).await;
    let grpc = server.addresses().grpc;
    let mut sender = Client::connect(grpc, agent("sender")).await.unwrap();
    let mut receiver = Client::connect(grpc, agent("receiver")).await.unwrap();
    // Each is refused, which the client does not read, until the server reads nothing more of it.
    for _ in 0..20_000 {
        sender.send("nowhere", "0123456789").await;
    }
    sender.send(&lane("receiver"), "1").await;
    for _ in 0..20_000 {
        sender.error().await;
    }
    assert_eq!(receiver.numbers(1).await, [1]);
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_stream_of_a_connection_is_served_or_refused() {
    let dir = tempfile::tempdir().unwrap();
    let server = server(dir.path()).await;
    let shared = channel(server.addresses().grpc).await;
    let connecting: Vec<_> =
        (0..1100).map(|n| tokio::spawn(Client::connect_over(shared.clone(), agent(&n.to_string())))).collect();
    let (mut served, mut refused) = (Vec::new(), 0);
    for one in connecting {
        match timeout(PATIENCE, one).await.expect("an answer").unwrap() {
            Ok(client) => served.push(client),
            Err(status) => {
                assert_eq!(status.code(), Code::ResourceExhausted, "{status}");
                refused += 1;
            }
        }
    }
    assert_eq!((served.len(), refused), (1000, 100));
    served.pop().unwrap().close().await;
    let late = async {
        // The server may see later than its client that the other one has ended.
        while let Err(full) = Client::connect_over(shared.clone(), agent("late")).await {
            assert_eq!(full.code(), Code::ResourceExhausted, "{full}");
        }
    };
    timeout(PATIENCE, late).await.unwrap();
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_first_frame_is_small() {
    let dir = tempfile::tempdir().unwrap();
    let server = server(dir.path()).await;
    let mut init = agent("one");
    init.credentials.insert("x-api-key".into(), "k".repeat(200 * 1024));
    let refused = Client::connect(server.addresses().grpc, init).await.err().unwrap();
    assert_eq!(refused.code(), Code::ResourceExhausted, "{refused}");
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn connections_that_ask_for_nothing_end() {
    let dir = tempfile::tempdir().unwrap();
    let limits = Limits { handshake_seconds: 3, ..Limits::default() };
    let config = Config { data_dir: dir.path().to_owned(), dev: true, limits, ..Config::on_free_ports() };
    let server = Server::start(config).await.unwrap();
    let grpc = server.addresses().grpc;
    let mut active = Client::connect(grpc, agent("one")).await.unwrap();
    let half = b"PRI * HTTP/2.0\r\n".as_slice();
    let whole = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0".as_slice();
    for begin in [b"".as_slice(), half, whole] {
        let mut stream = TcpStream::connect(grpc).await.unwrap();
        stream.write_all(begin).await.unwrap();
        let closed = async { while stream.read(&mut [0; 1024]).await.unwrap_or(0) > 0 {} };
        timeout(PATIENCE, closed).await.unwrap();
    }
    active.barrier().await;
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn silent_connections_do_not_use_up_the_descriptors() {
    let dir = tempfile::tempdir().unwrap();
    let process = Process::start_with_descriptors(dir.path(), 256);
    let mut one = Client::connect(process.grpc, agent("one")).await.unwrap();
    let (_grpc, _http) = (silent(process.grpc, 300).await, silent(process.http, 300).await);
    for n in 0..10 {
        one.send(&lane("one"), n.to_string()).await;
        let begun = Instant::now();
        Client::connect(process.grpc, agent(&n.to_string())).await.unwrap().barrier().await;
        assert!(begun.elapsed() < Duration::from_secs(5));
    }
    assert_eq!(one.numbers(10).await, (0..10).collect::<Vec<_>>());
    let log = process.log();
    assert!(log.lines().count() < 20, "{log}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_silent_connection_gets_no_http2_state() {
    let dir = tempfile::tempdir().unwrap();
    let server = server(dir.path()).await;
    let grpc = server.addresses().grpc;
    let silent = TcpStream::connect(grpc).await.unwrap();
    // The server accepts in order: the silent one is accepted by now.
    Client::connect(grpc, agent("one")).await.unwrap().close().await;
    let heard = silent.try_read(&mut [0; 64]).map_err(|error| error.kind());
    assert_eq!(heard, Err(std::io::ErrorKind::WouldBlock), "the server is silent, too");
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn good_clients_do_not_notice_hostile_ones() {
    let dir = tempfile::tempdir().unwrap();
    let process = Process::start(dir.path());
    let mut good = Vec::new();
    for n in 0..10 {
        good.push(Client::connect(process.grpc, agent(&n.to_string())).await.unwrap());
    }
    let before = process.resident();
    let half = b"PRI * HTTP/2.0\r\n".as_slice();
    let nonsense = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\xff\xff\xff\xff\xff\xff\xff\xff\xff".as_slice();
    let head = b"GET / HTTP/1.1\r\nx: y".as_slice();
    let mut hostile = Vec::new();
    for address in [process.grpc, process.http, process.ops] {
        for begin in [b"".as_slice(), half, nonsense, head] {
            for mut one in silent(address, 100).await {
                // What is refused at once is as hostile as the rest.
                let _ = one.write_all(begin).await;
                hostile.push(one);
            }
        }
    }
    for n in 0..20 {
        for (which, client) in good.iter_mut().enumerate() {
            client.send(&lane(&which.to_string()), n.to_string()).await;
        }
        for client in &mut good {
            assert_eq!(timeout(PATIENCE, client.numbers(1)).await.unwrap(), [n]);
        }
        let guest = agent(&format!("guest-{n}"));
        timeout(PATIENCE, Client::connect(process.grpc, guest)).await.unwrap().unwrap().barrier().await;
        assert_eq!(crate::ops::get(process.ops, "/livez").await.0, 200);
    }
    let grown = process.resident().saturating_sub(before);
    assert!(grown < 64 * 1024 * 1024, "{grown} bytes for {} connections", hostile.len());
}

/// What is answered to a call whose request never ends.
async fn endless(channel: &Channel, path: &str) -> Code {
    let never = axum::body::Body::from_stream(stream::pending::<Result<bytes::Bytes, std::convert::Infallible>>());
    let request = axum::http::Request::post(format!("http://localhost{path}"));
    let request = request.header("content-type", "application/grpc").header("te", "trailers");
    let answer = timeout(PATIENCE, channel.clone().oneshot(request.body(Body::new(never)).unwrap()));
    let answer = answer.await.expect("an answer");
    Status::from_header_map(answer.unwrap().headers()).expect("a status").code()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn requests_that_do_not_end_are_refused_in_time() {
    let dir = tempfile::tempdir().unwrap();
    let limits = Limits { handshake_seconds: 3, ..Limits::default() };
    let config = Config { data_dir: dir.path().to_owned(), dev: true, limits, ..Config::on_free_ports() };
    let server = Server::start(config).await.unwrap();
    let channel = channel(server.addresses().grpc).await;
    let health = "/grpc.health.v1.Health";
    for path in [&format!("{health}/Check"), &format!("{health}/Watch"), "/trunkline.v1.Operator/ListApps"] {
        assert_eq!(endless(&channel, path).await, Code::DeadlineExceeded, "{path}");
    }
    let service = "x".repeat(1000);
    let refused = HealthClient::new(channel).check(HealthCheckRequest { service }).await.unwrap_err();
    assert_eq!(refused.code(), Code::OutOfRange, "{refused}");
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nothing_is_read_of_an_operators_request_before_the_operator_is_known() {
    let dir = tempfile::tempdir().unwrap();
    let server = Server::start(Config { data_dir: dir.path().to_owned(), ..Config::on_free_ports() }).await.unwrap();
    let channel = channel(server.addresses().grpc).await;
    assert_eq!(endless(&channel, "/trunkline.v1.Operator/CreateApp").await, Code::Unauthenticated);
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_watches_health_keeps_no_connection_and_holds_up_no_stop() {
    let dir = tempfile::tempdir().unwrap();
    let limits = Limits { grpc_connections: 2, ..Limits::default() };
    let config = Config { data_dir: dir.path().to_owned(), dev: true, limits, ..Config::on_free_ports() };
    let server = Server::start(config).await.unwrap();
    let grpc = server.addresses().grpc;
    let (mut first, mut second) = (watch(grpc).await, watch(grpc).await);
    let mut one = Client::connect(grpc, agent("one")).await.unwrap();
    one.barrier().await;
    let made_room = async {
        tokio::select! {
            _ = end(&mut first) => true,
            _ = end(&mut second) => false,
        }
    };
    let mut left = if timeout(PATIENCE, made_room).await.unwrap() { second } else { first };
    let begun = Instant::now();
    let (ended, ()) = tokio::join!(timeout(PATIENCE, end(&mut left)), server.stop());
    assert!(begun.elapsed() < Duration::from_secs(2), "{:?}", begun.elapsed());
    let ended = ended.unwrap();
    assert_eq!((ended.code(), ended.message()), (Code::Unavailable, "server shutting down"));
}

/// Watches the health of a server over a connection of its own.
async fn watch(grpc: SocketAddr) -> Streaming<HealthCheckResponse> {
    let watch = HealthClient::new(channel(grpc).await).watch(HealthCheckRequest::default()).await;
    let mut watch = watch.unwrap().into_inner();
    assert_eq!(watch.message().await.unwrap().unwrap().status(), ServingStatus::Serving);
    watch
}

/// How a watch ends.
async fn end(watch: &mut Streaming<HealthCheckResponse>) -> Status {
    loop {
        match watch.message().await {
            Ok(Some(_)) => {}
            Ok(None) => return Status::ok("it ended"),
            Err(status) => return status,
        }
    }
}

/// Asks for the health of a server over HTTP/2, with no room for the answer, and reads the head of it.
async fn ask_without_room(grpc: SocketAddr) -> TcpStream {
    let frame = |kind: u8, flags: u8, stream: u8, payload: &[u8]| {
        let length = u8::try_from(payload.len()).unwrap();
        [&[0, 0, length, kind, flags, 0, 0, 0, stream], payload].concat()
    };
    // POST and http by the table of HPACK, and the rest by name.
    let mut head = vec![0x83, 0x86];
    let fields = [
        (":path", "/grpc.health.v1.Health/Check"),
        (":authority", "x"),
        ("content-type", "application/grpc"),
        ("te", "trailers"),
    ];
    for (name, value) in fields {
        head.push(0);
        for text in [name, value] {
            head.push(u8::try_from(text.len()).unwrap());
            head.extend_from_slice(text.as_bytes());
        }
    }
    let begins = [
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n".to_vec(),
        frame(4, 0, 0, &[0, 4, 0, 0, 0, 0]),
        frame(1, 4, 1, &head),
        frame(0, 1, 1, &[0; 5]),
    ];
    let mut stream = TcpStream::connect(grpc).await.unwrap();
    stream.write_all(&begins.concat()).await.unwrap();
    loop {
        let mut head = [0; 9];
        stream.read_exact(&mut head).await.unwrap();
        let length = u32::from_be_bytes([0, head[0], head[1], head[2]]) as usize;
        stream.read_exact(&mut vec![0; length]).await.unwrap();
        if head[3] == 1 {
            return stream;
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_takes_no_answer_about_health_keeps_no_connection() {
    let dir = tempfile::tempdir().unwrap();
    let limits = Limits { grpc_connections: 2, ..Limits::default() };
    let config = Config { data_dir: dir.path().to_owned(), dev: true, limits, ..Config::on_free_ports() };
    let server = Server::start(config).await.unwrap();
    let grpc = server.addresses().grpc;
    let _open = (ask_without_room(grpc).await, ask_without_room(grpc).await);
    Client::connect(grpc, agent("one")).await.unwrap().barrier().await;
    server.stop().await;
}

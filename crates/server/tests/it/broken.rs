//! Wires that broke at the client's end: the server writes, and nothing arrives. What was sent meanwhile comes when the client is
//! back, and nothing that it had comes again.

use std::{
    io,
    net::SocketAddr,
    ops::Range,
    sync::Mutex,
    time::{Duration, Instant},
};

use crate::{
    client::{ACK_EXTENSION, Client, agent, lane, server, worker},
    tls::{Authority, config, endpoint},
};
use hyper_util::rt::TokioIo;
use socket2::{SockFilter, SockRef};
use tokio::{net::TcpStream, task::JoinSet};
use tonic::{
    Code,
    transport::{Channel, Endpoint},
};
use trunkline::{Config, Server};
use trunkline_proto::v1::ExtensionDeclaration;

/// Nothing here takes longer unless it hangs.
const PATIENCE: Duration = Duration::from_secs(20);

/// Messages that a client gets on each wire, and that are sent into it when it is broken.
const HEARD: usize = 5;
const LOST: usize = 10;

/// The client's end of a connection.
pub(crate) struct End(std::net::TcpStream);

impl End {
    /// From here on its kernel takes nothing, and nobody is told: BPF_RET | BPF_K, 0.
    pub(crate) fn breaks(&self) {
        SockRef::from(&self.0).attach_filter(&[SockFilter::new(0x06, 0, 0, 0)]).unwrap();
    }
}

pub(crate) async fn over(endpoint: Endpoint, grpc: SocketAddr) -> (Channel, End) {
    let stream = TcpStream::connect(grpc).await.unwrap().into_std().unwrap();
    let end = End(stream.try_clone().unwrap());
    let stream = Mutex::new(Some(TcpStream::from_std(stream).unwrap()));
    let once = tower::service_fn(move |_| {
        let stream = stream.lock().unwrap().take().ok_or_else(|| io::Error::from(io::ErrorKind::NotConnected));
        async { stream.map(TokioIo::new) }
    });
    (endpoint.connect_with_connector(once).await.unwrap(), end)
}

/// How many messages transports were handed so far.
async fn delivered(ops: SocketAddr) -> u64 {
    let (_, metrics) = crate::ops::get(ops, "/metrics").await;
    let line = metrics.lines().find_map(|line| line.strip_prefix("trunkline_messages_delivered_total "));
    line.expect(&metrics).parse().unwrap()
}

async fn until_delivered(ops: SocketAddr, count: u64) {
    let begun = Instant::now();
    while delivered(ops).await < count {
        assert!(begun.elapsed() < PATIENCE, "fewer than {count}");
    }
}

/// Returns when all of them are accepted.
async fn send(sender: &mut Client, numbers: Range<usize>, bytes: usize) {
    for n in numbers {
        sender.send(&lane("one"), format!("{}{n}", "0".repeat(bytes - n.to_string().len().min(bytes)))).await;
    }
    sender.barrier().await;
}

/// Rounds of a client whose wire breaks, and that comes back on another one. Its messages have so many bytes.
async fn comes_back(server: Server, endpoint: Endpoint, rounds: usize, bytes: usize) {
    let addresses = server.addresses();
    let mut sender = Client::connect_over(endpoint.connect().await.unwrap(), agent("sender")).await.unwrap();
    let (mut session, mut sent, mut gone) = (String::new(), 0, Vec::new());
    for round in 0..rounds {
        let mut init = agent("one");
        init.resume_session_id = session;
        let (channel, end) = over(endpoint.clone(), addresses.grpc).await;
        let mut one = Client::connect_over(channel, init).await.unwrap();
        assert_eq!(one.ack.resumed, round > 0);
        // What the wire before took with it, and something new: all of it once, and in order.
        let lost = if round > 0 { LOST } else { 0 };
        send(&mut sender, sent..sent + HEARD, bytes).await;
        sent += HEARD;
        assert_eq!(one.numbers(lost + HEARD).await, (sent - HEARD - lost..sent).collect::<Vec<_>>());
        // The last PING is written before the answer to the first of these, and its answer is read before the second.
        one.barrier().await;
        one.barrier().await;
        end.breaks();
        let before = delivered(addresses.ops).await;
        send(&mut sender, sent..sent + LOST, bytes).await;
        sent += LOST;
        // Of large ones, most wait for room.
        until_delivered(addresses.ops, before + if bytes > 1000 { 1 } else { LOST as u64 }).await;
        session = one.ack.session_id.clone();
        // Kept open: a client without a wire ends nothing.
        gone.push((one, end));
    }
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_was_sent_into_a_broken_wire_comes_when_its_client_is_back_and_nothing_twice() {
    // At the same time, because each return waits 500 ms for the previous wire.
    let mut all = JoinSet::new();
    for bytes in [1, 1, 1, 1, 1, 1, 1, 40 * 1024, 200 * 1024, 1024 * 1024] {
        all.spawn(async move {
            let dir = tempfile::tempdir().unwrap();
            let server = server(dir.path()).await;
            let endpoint = Endpoint::from_shared(format!("http://{}", server.addresses().grpc)).unwrap();
            comes_back(server, endpoint, 10, bytes).await;
        });
    }
    all.join_all().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn so_it_does_behind_tls() {
    let dir = tempfile::tempdir().unwrap();
    let authority = Authority::new("ours");
    let server = Server::start(Config { dev: true, ..config(dir.path(), &authority) }).await.unwrap();
    let endpoint = endpoint(&server, &authority, None);
    comes_back(server, endpoint, 3, 1).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn shared_work_that_was_sent_into_a_broken_wire_goes_to_another() {
    for says_goodbye in [true, false] {
        shared_work_goes_to_another(says_goodbye).await;
    }
}

async fn shared_work_goes_to_another(says_goodbye: bool) {
    let dir = tempfile::tempdir().unwrap();
    let server = server(dir.path()).await;
    let addresses = server.addresses();
    let sender = Client::connect(addresses.grpc, agent("sender")).await.unwrap();
    let endpoint = Endpoint::from_shared(format!("http://{}", addresses.grpc)).unwrap();
    let (channel, end) = over(endpoint, addresses.grpc).await;
    let mut one = Client::connect_over(channel, worker()).await.unwrap();
    sender.send("tb::ws::work", "0").await;
    assert_eq!(one.numbers(1).await, [0]);
    one.barrier().await;
    one.barrier().await;
    end.breaks();
    for n in 1..4 {
        sender.send("tb::ws::work", n.to_string()).await;
    }
    until_delivered(addresses.ops, 4).await;
    // Of one that says goodbye, the server waits for an answer; of one that is gone it knows at once.
    let _open = if says_goodbye {
        Some((one.says_goodbye(), end))
    } else {
        drop((one, end));
        None
    };
    let mut another = Client::connect(addresses.grpc, worker()).await.unwrap();
    let mut got = another.numbers(3).await;
    got.sort_unstable();
    assert_eq!(got, [1, 2, 3]);
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_newcomer_takes_the_place_of_a_client_that_answers_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let server = server(dir.path()).await;
    let grpc = server.addresses().grpc;
    let mut sender = Client::connect(grpc, agent("sender")).await.unwrap();
    let endpoint = Endpoint::from_shared(format!("http://{grpc}")).unwrap();
    for acknowledges in [false, true] {
        let mut init = agent("one");
        if acknowledges {
            init.extensions = vec![ExtensionDeclaration { uri: ACK_EXTENSION.into(), ..Default::default() }];
        }
        let (channel, end) = over(endpoint.clone(), grpc).await;
        let mut one = Client::connect_over(channel, init).await.unwrap();
        one.barrier().await;
        // A client that is there keeps its identity, however often it is asked, and the refusal comes soon.
        for _ in 0..3 {
            let begun = Instant::now();
            assert_eq!(Client::connect(grpc, agent("one")).await.err().unwrap().code(), Code::AlreadyExists);
            assert!(begun.elapsed() < Duration::from_secs(1), "{:?}", begun.elapsed());
        }
        end.breaks();
        sender.send(&lane("one"), "0").await;
        sender.barrier().await;
        let begun = Instant::now();
        let mut newcomer = Client::connect(grpc, agent("one")).await.unwrap();
        assert!(begun.elapsed() < PATIENCE, "{:?}", begun.elapsed());
        assert!(!newcomer.ack.resumed);
        assert_eq!(newcomer.numbers(1).await, [0], "what was on its way to the other");
        newcomer.barrier().await;
        newcomer.close().await;
    }
    server.stop().await;
}

//! The clients of a soak, by temper. Each goes on until the stage is over, and panics when the server broke a promise.

use std::{net::TcpStream, sync::Arc, time::Duration};

use tokio::{io::AsyncWriteExt as _, task::JoinHandle};
use tonic::Code;
use trunkline_proto::v1::{
    AgentIdentity, InitConnection, KvOperation, SwitchWorkspace, UserIdentity,
    downstream_message::Payload as Down,
    init_connection::ClientType,
    kv_operation::{OpType, Scope},
    upstream_message::Payload as Up,
};

use crate::{
    Stage,
    client::{Client, agent, lane, worker},
};

/// Pairs that must never miss anything.
const PAIRS: usize = 4;

/// Clients of each other temper.
const EACH: usize = 4;

pub(crate) fn all(stage: &Arc<Stage>) -> Vec<(String, JoinHandle<()>)> {
    let mut cast = Vec::new();
    for n in 0..PAIRS {
        cast.push((format!("pair {n}"), tokio::spawn(pair(stage.clone(), n))));
    }
    for n in 0..EACH {
        cast.push((format!("caller {n}"), tokio::spawn(caller(stage.clone(), n))));
        cast.push((format!("resumer {n}"), tokio::spawn(resumer(stage.clone(), n))));
        cast.push((format!("slow reader {n}"), tokio::spawn(slow_reader(stage.clone(), n))));
        cast.push((format!("mover {n}"), tokio::spawn(mover(stage.clone(), n))));
        cast.push((format!("worker {n}"), tokio::spawn(odd_jobs(stage.clone()))));
        cast.push((format!("keeper {n}"), tokio::spawn(keeper(stage.clone(), n))));
        cast.push((format!("giant {n}"), tokio::spawn(giant(stage.clone(), n))));
        cast.push((format!("babbler {n}"), tokio::spawn(babbler(stage.clone()))));
        cast.push((format!("half-open {n}"), tokio::spawn(half_open(stage.clone()))));
    }
    cast
}

/// Everybody who comes under a name of their own.
pub(crate) fn identities() -> Vec<InitConnection> {
    let names = ["resumer", "slow", "keeper", "giant"];
    let each = names.into_iter().flat_map(|name| (0..EACH).map(move |n| agent(&format!("{name}{n}"))));
    let pairs = (0..PAIRS).flat_map(|n| [agent(&format!("from{n}")), agent(&format!("to{n}"))]);
    each.chain(pairs).chain((0..EACH).map(user)).chain((0..EACH).map(crowd)).collect()
}

/// One of many who hear each other's broadcasts.
fn crowd(n: usize) -> InitConnection {
    let agent = AgentIdentity { workspace: "crowd".into(), implementation: "impl".into(), specifier: n.to_string() };
    InitConnection { client_type: Some(ClientType::Agent(agent)), ..InitConnection::default() }
}

fn user(n: usize) -> InitConnection {
    let user = UserIdentity { user_id: format!("mover{n}"), window_id: "w".into() };
    InitConnection { client_type: Some(ClientType::User(user)), ..InitConnection::default() }
}

async fn rest(milliseconds: u64) {
    tokio::time::sleep(Duration::from_millis(fastrand::u64(0..milliseconds))).await;
}

async fn come(stage: &Stage, init: InitConnection) -> Client {
    stage.acts.fetch_add(1, std::sync::atomic::Ordering::SeqCst);
    Client::connect_when_free(stage.grpc, init).await
}

/// Numbers from one to the other, who leaves now and then and misses none, and gets none twice.
async fn pair(stage: Arc<Stage>, n: usize) {
    let mut from = come(&stage, agent(&format!("from{n}"))).await;
    let (mut sent, mut got) = (0, 0);
    while !stage.is_over() {
        let mut to = come(&stage, agent(&format!("to{n}"))).await;
        for _ in 0..fastrand::usize(1..200) {
            from.send(&lane(&format!("to{n}")), sent.to_string()).await;
            sent += 1;
        }
        from.barrier().await;
        let some = fastrand::usize(0..=sent - got);
        assert_eq!(to.numbers(some).await, (got..got + some).collect::<Vec<_>>());
        // What was taken beyond that is read too: the transport counts it as delivered.
        let rest = sent - got - some;
        assert_eq!(to.numbers(rest).await, (got + some..sent).collect::<Vec<_>>());
        got = sent;
        to.close().await;
        self::rest(100).await;
    }
}

/// Comes, says something to everybody, and hangs up: politely or not.
async fn caller(stage: Arc<Stage>, n: usize) {
    while !stage.is_over() {
        let mut client = come(&stage, crowd(n)).await;
        client.send("ga::crowd", vec![7; fastrand::usize(0..2000)]).await;
        if fastrand::bool() {
            client.barrier().await;
            client.close().await;
        }
        rest(50).await;
    }
}

/// Takes its own session over, again and again; the streams that it left end.
async fn resumer(stage: Arc<Stage>, n: usize) {
    let mut client = come(&stage, agent(&format!("resumer{n}"))).await;
    while !stage.is_over() {
        let mut init = agent(&format!("resumer{n}"));
        init.resume_session_id.clone_from(&client.ack.session_id);
        let next = Client::connect(stage.grpc, init).await.unwrap();
        assert!(next.ack.resumed);
        if fastrand::bool() {
            assert_eq!(client.end().await, Some(Code::Cancelled));
        }
        client = next;
        rest(100).await;
    }
}

/// Gets more than the transport holds, and reads it late; all of it, in order.
async fn slow_reader(stage: Arc<Stage>, n: usize) {
    let padding = " ".repeat(64 * 1024);
    let mut begins = 0;
    while !stage.is_over() {
        let mut slow = come(&stage, agent(&format!("slow{n}"))).await;
        let ends = begins + 100;
        for number in begins..ends {
            slow.send(&lane(&format!("slow{n}")), format!("{number}{padding}")).await;
        }
        rest(2000).await;
        let mut expected = begins;
        while expected < ends {
            let message = slow.message().await;
            let number: u64 = std::str::from_utf8(&message.payload).unwrap().trim_end().parse().unwrap();
            // What it closed behind before the transport could say that it had it comes again: it acknowledges nothing itself.
            if number >= begins {
                assert_eq!(number, expected);
                expected += 1;
            }
        }
        slow.close().await;
        begins = ends;
    }
}

/// A user from workspace to workspace.
async fn mover(stage: Arc<Stage>, n: usize) {
    while !stage.is_over() {
        let client = come(&stage, user(n)).await;
        for _ in 0..fastrand::usize(0..10) {
            let new_workspace_id = ["", "ws", "other", "bad::name"][fastrand::usize(0..4)].to_owned();
            client.put(Up::SwitchWorkspace(SwitchWorkspace { new_workspace_id }.into())).await;
            client.send("gu::ws", "hello").await;
        }
        rest(50).await;
    }
}

/// A task that shares work and leaves some of it.
async fn odd_jobs(stage: Arc<Stage>) {
    while !stage.is_over() {
        let client = come(&stage, worker()).await;
        for _ in 0..10 {
            client.send("tb::ws::work", "1").await;
        }
        rest(200).await;
    }
}

/// Counts, and finds its count again.
async fn keeper(stage: Arc<Stage>, n: usize) {
    let mut count = 0;
    while !stage.is_over() {
        let mut client = come(&stage, agent(&format!("keeper{n}"))).await;
        for _ in 0..20 {
            let operation = KvOperation {
                op: OpType::Increment.into(),
                scope: Scope::GlobalExclusive.into(),
                key: "count".into(),
                ..KvOperation::default()
            };
            client.put(Up::KvOp(operation.into())).await;
        }
        let mut replies = 0;
        while replies < 20 {
            match client.next().await.unwrap() {
                Some(Down::Kv(reply)) => {
                    count += 1;
                    replies += 1;
                    assert_eq!(reply.counter_value, count);
                }
                Some(Down::Config(_) | Down::Msg(_)) => {}
                other => panic!("expected a reply, got {other:?}"),
            }
        }
        rest(50).await;
    }
}

/// Sends what is too large for a message, and then for a frame.
async fn giant(stage: Arc<Stage>, n: usize) {
    while !stage.is_over() {
        let mut client = come(&stage, agent(&format!("giant{n}"))).await;
        client.send(&lane("nobody"), vec![7; 2 * 1024 * 1024]).await;
        assert_eq!(client.error().await.code, "ERR_PAYLOAD_TOO_LARGE");
        client.send(&lane("nobody"), vec![7; 5 * 1024 * 1024]).await;
        assert_eq!(client.end().await, Some(Code::ResourceExhausted));
        rest(1000).await;
    }
}

/// Garbage, in three languages.
async fn babbler(stage: Arc<Stage>) {
    while !stage.is_over() {
        stage.acts.fetch_add(1, std::sync::atomic::Ordering::SeqCst);
        let bytes: Vec<u8> = (0..fastrand::usize(1..5000)).map(|_| fastrand::u8(..)).collect();
        if let Ok(mut stream) = tokio::net::TcpStream::connect(stage.grpc).await {
            let preface: &[u8] = if fastrand::bool() { b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" } else { b"" };
            // The server may have hung up already, which is its right.
            let _ = stream.write_all(preface).await;
            let _ = stream.write_all(&bytes).await;
        }
        let mut nobody = agent("");
        assert_eq!(Client::connect(stage.grpc, nobody.clone()).await.err().unwrap().code(), Code::InvalidArgument);
        nobody.client_type = None;
        assert_eq!(Client::connect(stage.grpc, nobody).await.err().unwrap().code(), Code::InvalidArgument);
        rest(200).await;
    }
}

/// Opens a socket and says nothing.
async fn half_open(stage: Arc<Stage>) {
    let mut sockets = Vec::new();
    while !stage.is_over() {
        stage.acts.fetch_add(1, std::sync::atomic::Ordering::SeqCst);
        sockets.push(TcpStream::connect(stage.grpc).unwrap());
        if sockets.len() > 20 {
            sockets.swap_remove(fastrand::usize(0..sockets.len()));
        }
        rest(200).await;
    }
}

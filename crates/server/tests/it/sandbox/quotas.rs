//! A sandbox is the least trusted of all: what it tells takes what it may, and holds nobody up.

use std::time::{Duration, Instant};

use serde_json::{Value, json};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpSocket,
};
use trunkline_core::sandbox;
use trunkline_proto::v1::{
    KvOperation,
    downstream_message::Payload as Down,
    kv_operation::{OpType, Scope},
    upstream_message::Payload as Up,
};

use super::{Web, server, server_with};
use crate::{
    client::{Client, agent},
    process::Process,
};

const MIB: usize = 1024 * 1024;

async fn artifacts_bytes(web: &Web, id: &str) -> usize {
    web.get(&format!("/sessions/{id}/artifacts")).await.1.to_string().len()
}

/// What a process takes in memory now.
fn resident(process: &Process) -> usize {
    let status = std::fs::read_to_string(format!("/proc/{}/status", process.id())).unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap();
    line.trim().trim_end_matches(" kB").parse::<usize>().unwrap() * 1024
}

/// Writes a key, and answers how long it waited for that.
async fn put(client: &mut Client, number: usize) -> Duration {
    let operation = KvOperation {
        op: OpType::Put.into(),
        scope: Scope::GlobalExclusive.into(),
        key: "k".into(),
        value: number.to_string().into(),
        request_id: number.to_string(),
        ..KvOperation::default()
    };
    let begun = Instant::now();
    client.put(Up::KvOp(operation.into())).await;
    loop {
        if let Some(Down::Kv(answer)) = client.next().await.unwrap() {
            assert!(answer.success, "{answer:?}");
            return begun.elapsed();
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_a_sandbox_tells_takes_no_more_than_it_may_and_holds_nobody_up() {
    let dir = tempfile::tempdir().unwrap();
    let process = Process::start(dir.path());
    let web = Web::new(process.http);
    web.make("s").await;
    // What is read from the disk and on its way is bounded as a whole, and is there once.
    let large = "x".repeat(MIB - 200);
    web.tell("s", json!({"type": "turn_start", "id": "t"})).await;
    let mut client = Client::connect(process.grpc, agent("beside")).await.unwrap();
    put(&mut client, 0).await;
    let before = resident(&process);
    let done = std::sync::Arc::new(std::sync::atomic::AtomicBool::new(false));
    let beside = {
        let done = done.clone();
        tokio::spawn(async move {
            let (mut slowest, mut number) = (Duration::ZERO, 1);
            while !done.load(std::sync::atomic::Ordering::SeqCst) {
                slowest = slowest.max(put(&mut client, number).await);
                number += 1;
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
            (slowest, number)
        })
    };
    let (mut accepted, mut refused) = (0, 0);
    for n in 0..300 {
        if n == 20 {
            // So many events that a checkpoint of all that is large is written meanwhile.
            let states = (0..5100).map(|n| json!({"type": "status", "id": "s", "text": n.to_string()}));
            web.tell("s", Value::from(states.collect::<Vec<_>>())).await;
        }
        let event = json!({"type": "x", "n": n, "d": large});
        match web.post("/sessions/s/events", event.to_string()).await {
            (202, _) => accepted += 1,
            (429, problem) => {
                assert!(
                    problem["error"]["message"].as_str().unwrap().contains("sandbox.artifacts_mib_max"),
                    "{problem}"
                );
                refused += 1;
            }
            other => panic!("{other:?}"),
        }
    }
    assert!(accepted > 20 && accepted < 40 && refused == 300 - accepted, "{accepted}");
    assert_eq!(web.artifacts("s").await.len(), 2 + accepted);
    // It can still say that its turn ended, and not much more.
    web.tell("s", json!({"type": "turn_end", "id": "t"})).await;
    assert_eq!(web.artifacts("s").await[0]["status"], "done");
    done.store(true, std::sync::atomic::Ordering::SeqCst);
    let (slowest, count) = beside.await.unwrap();
    let grown = resident(&process).saturating_sub(before);
    eprintln!("grown by {} MiB; slowest of {count} keys {slowest:?}", grown / MIB);
    assert!(slowest < Duration::from_secs(1), "{slowest:?} for a key");
    // 32 MiB of artifacts; the log's windows, and the answer that was made of them.
    assert!(grown < 160 * MIB, "{} MiB", grown / MIB);
    // Room is made by removing it.
    assert_eq!(web.ask(web.request(reqwest::Method::DELETE, "/sessions/s")).await.0, 204);
    web.make("s").await;
    web.tell("s", json!({"type": "x", "d": large})).await;
    assert_eq!(web.artifacts("s").await.len(), 1);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_number_of_artifacts_and_what_lies_on_disk_have_a_limit() {
    let dir = tempfile::tempdir().unwrap();
    let options = sandbox::Options { artifacts_max: 100, events_mib_max: 1, ..sandbox::Options::default() };
    let server = server_with(dir.path(), options).await;
    let web = Web::new(server.addresses().http);
    for id in ["many", "long", "replaced"] {
        web.make(id).await;
    }
    let texts = |count: usize| Value::from((0..count).map(|n| json!({"type": "text", "text": n})).collect::<Vec<_>>());
    web.tell("many", texts(99)).await;
    let refused = web.post("/sessions/many/events", texts(2).to_string()).await;
    assert_eq!((refused.0, refused.1["error"]["code"].as_str()), (429, Some("quota_001")), "{}", refused.1);
    web.tell("many", texts(1)).await;
    assert_eq!(web.artifacts("many").await.len(), 100);
    // What is replaced makes no new artifact, as often as it comes.
    let status = |n: usize| json!({"type": "status", "id": "s", "text": n.to_string()});
    for n in 0..50 {
        web.tell("replaced", Value::from((0..20).map(|m| status(n * 20 + m)).collect::<Vec<_>>())).await;
    }
    assert_eq!(web.artifacts("replaced").await[0]["text"], "999");
    let text = json!({"type": "status", "id": "s", "text": "x".repeat(300_000)}).to_string();
    for _ in 0..3 {
        assert_eq!(web.post("/sessions/long/events", text.clone()).await.0, 202);
    }
    let refused = web.post("/sessions/long/events", text).await;
    assert!(refused.0 == 429 && refused.1.to_string().contains("sandbox.events_mib_max"), "{}", refused.1);
    web.tell("long", json!({"type": "turn_end"})).await;
    // The same after a restart.
    server.stop().await;
    let options = sandbox::Options { artifacts_max: 100, ..sandbox::Options::default() };
    let server = server_with(dir.path(), options).await;
    let web = Web::new(server.addresses().http);
    assert_eq!(web.post("/sessions/many/events", texts(1).to_string()).await.0, 429);
    web.tell("long", json!({"type": "text", "text": "more"})).await;
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn many_small_fields_take_the_room_that_they_need() {
    let dir = tempfile::tempdir().unwrap();
    let server =
        server_with(dir.path(), sandbox::Options { artifacts_mib_max: 2, ..sandbox::Options::default() }).await;
    let web = Web::new(server.addresses().http);
    web.make("s").await;
    let mut wide = json!({"type": "tool_start", "id": "t"});
    wide.as_object_mut().unwrap().extend((0..20_000).map(|n| (n.to_string(), json!(1))));
    let refused = web.post("/sessions/s/events", wide.to_string()).await;
    assert!(refused.0 == 429 && refused.1.to_string().contains("sandbox.artifacts_mib_max"), "{}", refused.1);
    // The same as one field is small.
    web.tell("s", json!({"type": "tool_start", "id": "t", "input": wide})).await;
    assert_eq!(web.artifacts("s").await.len(), 1);
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_comes_again_takes_no_more_of_the_disk() {
    let dir = tempfile::tempdir().unwrap();
    let server = server_with(dir.path(), sandbox::Options { events_mib_max: 1, ..sandbox::Options::default() }).await;
    let web = Web::new(server.addresses().http);
    web.make("s").await;
    let _stream = web.open("/sessions/s/commands").await;
    let keyed = async |path: &str, key: &str, body: &Value| {
        let request = web.request(reqwest::Method::POST, path).header("idempotency-key", key);
        web.ask(request.body(body.to_string())).await.0
    };
    let large = "x".repeat(200_000);
    let event = json!({"type": "status", "id": "s", "text": large});
    let command = json!({"type": "prompt", "text": large});
    for (path, body) in [("/sessions/s/events", event), ("/sessions/s/commands", command)] {
        for _ in 0..10 {
            assert_eq!(keyed(path, "1", &body).await, 202);
        }
        for key in ["2", "3", "4", "5"] {
            assert_eq!(keyed(path, key, &body).await, 202, "{path}: there is room for five");
        }
        assert_eq!(keyed(path, "6", &body).await, 429, "{path}: there is no more");
    }
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_event_that_others_cannot_read_takes_nothing_with_it() {
    let dir = tempfile::tempdir().unwrap();
    let server = server(dir.path()).await;
    let web = Web::new(server.addresses().http);
    web.make("s").await;
    let deep = format!("{}{}", "[".repeat(5000), "]".repeat(5000));
    let events = format!(
        "[{{\"type\":\"text\",\"text\":\"a\"}},{{\"type\":\"u\",\"cost\":1e999,\"deep\":{deep}}},\n{{\"type\":\"summary\",\"summary\":\"s\"}}]"
    );
    let mut watch = web.open("/sessions/s/stream").await;
    assert_eq!(web.post("/sessions/s/events", events).await.0, 202);
    for _ in 0..2 {
        watch.expect("artifact_created").await;
    }
    let artifacts = web.artifacts("s").await;
    assert_eq!((artifacts.len(), &artifacts[0]["text"]), (2, &json!("a")));
    assert_eq!((&artifacts[1]["type"], &artifacts[1]["data"]["cost"]), (&json!("u"), &json!("1e999")));
    assert_eq!(artifacts[1]["data"]["deep"], deep);
    assert_eq!(web.get("/sessions/s").await.1["summary"], "s");
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn viewers_that_do_not_read_share_what_they_are_shown() {
    const VIEWERS: usize = 500;
    let dir = tempfile::tempdir().unwrap();
    let process = Process::start(dir.path());
    let web = Web::new(process.http);
    web.make("s").await;
    let piece = json!({"type": "text_delta", "id": "t", "delta": "\u{e4}".repeat(250_000)}).to_string();
    for _ in 0..4 {
        assert_eq!(web.post("/sessions/s/events", piece.clone()).await.0, 202);
    }
    assert!(artifacts_bytes(&web, "s").await > 2_000_000 - 1000);
    let before = resident(&process);
    let mut viewers = Vec::new();
    for n in 0..VIEWERS {
        // The system takes little of what is for it.
        let viewer = TcpSocket::new_v4().unwrap();
        viewer.set_recv_buffer_size(4096).unwrap();
        let mut viewer = viewer.connect(process.http).await.unwrap();
        let request = format!("GET /sessions/s/stream HTTP/1.1\r\nhost: {}\r\n\r\n", process.http);
        viewer.write_all(request.as_bytes()).await.unwrap();
        viewers.push(viewer);
        if n % 50 == 0 {
            // Each of them comes to another version of it.
            web.tell("s", json!({"type": "text_delta", "id": "t", "delta": "more"})).await;
        }
    }
    // Each has begun to take it.
    for viewer in &mut viewers {
        let (mut begun, mut some) = (Vec::new(), vec![0; 512]);
        while !begun.windows(17).any(|window| window == b"artifact_snapshot") {
            let read = viewer.read(&mut some).await.unwrap();
            assert!(read > 0, "{}", String::from_utf8_lossy(&begun));
            begun.extend_from_slice(&some[..read]);
        }
    }
    let grown = resident(&process).saturating_sub(before);
    eprintln!("{VIEWERS} viewers take {} MiB", grown / MIB);
    assert!(grown < VIEWERS * 320 * 1024, "{} MiB", grown / MIB);
    // One that reads is told all of it.
    let mut watch = web.open("/sessions/s/stream").await;
    let shown = watch.expect("artifact_snapshot").await;
    assert_eq!(shown.data["artifact"]["text"].as_str().unwrap().chars().count(), 1_000_000 + 40);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_checkpoint_of_many_pieces_is_what_was_there() {
    let dir = tempfile::tempdir().unwrap();
    let options = sandbox::Options { artifacts_max: 100, ..sandbox::Options::default() };
    let server = server_with(dir.path(), options).await;
    let web = Web::new(server.addresses().http);
    web.make("s").await;
    for n in 0..20 {
        let text = |id: u64| json!({"type": "text_delta", "id": id.to_string(), "delta": "x".repeat(40_000 + n)});
        web.tell("s", Value::from((0..15).map(text).collect::<Vec<_>>())).await;
    }
    let before = web.artifacts("s").await;
    server.stop().await;
    // What goes on is folded on what was kept, in as many pieces.
    for _ in 0..2 {
        let server = server_with(dir.path(), options).await;
        let web = Web::new(server.addresses().http);
        assert_eq!(web.artifacts("s").await, before);
        server.stop().await;
    }
    let server = server_with(dir.path(), options).await;
    let web = Web::new(server.addresses().http);
    let more = |id: u64| json!({"type": "text_delta", "id": id.to_string(), "delta": "more"});
    web.tell("s", Value::from((5..10).map(more).collect::<Vec<_>>())).await;
    let after = web.artifacts("s").await;
    server.stop().await;
    let server = server_with(dir.path(), options).await;
    assert_eq!(Web::new(server.addresses().http).artifacts("s").await, after);
    let length = |artifact: &Value| artifact["text"].as_str().unwrap().len();
    for (id, (before, after)) in before.iter().zip(&after).enumerate() {
        assert_eq!(length(after), length(before) + if (5..10).contains(&id) { 4 } else { 0 });
    }
    server.stop().await;
}

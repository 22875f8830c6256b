//! Runtimes that die, come back, lie or are displaced; and UIs that do not keep up.

use std::{net::SocketAddr, time::Duration};

use serde_json::{Value, json};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
    time::timeout,
};
use trunkline::{Config, Server};
use trunkline_agent_socket::{Close, close::code};
use trunkline_core::limits::Limits;

use super::{Frame, PATIENCE, Socket, server};
use crate::process::Process;

async fn acked(runtime: &mut Socket, seq: u64) {
    while runtime.expect("ack").await["ack"] != seq {}
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_a_runtime_said_nothing_of_the_next_one_gets() {
    let dir = tempfile::tempdir().unwrap();
    let server = server(dir.path()).await;
    let http = server.addresses().http;
    let (mut tab, _, _) = Socket::hello(http, "c", json!({})).await;
    let (mut first, _) = Socket::runtime(http, "g1").await;
    // Nobody says in the server's place what only the server says.
    tab.say(json!({"type": "turn_start", "turnId": "t", "ask": 999, "prev": 7, "own": 1})).await;
    let asked = first.expect("turn_start").await;
    assert_eq!((&asked["turnId"], &asked["prev"], &asked["own"]), (&json!("t"), &Value::Null, &json!(1)));
    assert_ne!(asked["ask"], 999);
    drop(first);
    let (mut second, _) = Socket::runtime(http, "g2").await;
    assert_eq!(second.expect("turn_start").await["ask"], asked["ask"]);
    second.say(json!({"type": "turn_running", "clientId": "c", "turnId": "t", "seq": 1})).await;
    acked(&mut second, 1).await;
    tab.expect("turn_queued").await;
    tab.expect("turn_running").await;
    // An answer is had when the runtime says so.
    tab.say(json!({"type": "approval_resolve", "operationId": "o"})).await;
    let answer = second.expect("approval_resolve").await;
    second.say(json!({"type": "ack", "ask": answer["ask"]})).await;
    second.say(json!({"type": "turn_phase", "clientId": "c", "turnId": "t", "seq": 2})).await;
    acked(&mut second, 2).await;
    drop(second);
    let (mut third, _) = Socket::runtime(http, "g3").await;
    tab.say(json!({"type": "turn_start", "turnId": "u"})).await;
    assert_eq!(third.expect("turn_start").await["turnId"], "u", "the others are had");
    server.stop().await;
}

/// What a UI asks is said until it is acknowledged, over lost connections and killed servers, and the runtime has it once.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_request_is_acknowledged_and_taken_once() {
    let dir = tempfile::tempdir().unwrap();
    let requests = [
        json!({"type": "turn_start", "turnId": "never", "requestId": "r-1"}),
        json!({"type": "turn_aborted", "turnId": "never", "requestId": "r-2"}),
        json!({"type": "approval_resolve", "operationId": "o", "requestId": "r-3", "payload": {"approved": true}}),
        json!({"type": "attachment_ready", "requestId": "r-4"}),
    ];
    for round in 0..3 {
        let process = Process::start(dir.path());
        for request in &requests {
            // A socket for each: it does not matter where it is said again.
            let (mut tab, welcome, _) = Socket::hello(process.http, "c", json!({})).await;
            assert_eq!(welcome["payload"]["acksRequests"], true);
            tab.say(request.clone()).await;
            let acknowledgement = tab.answer("ack").await;
            assert_eq!(acknowledgement["requestId"], request["requestId"]);
            assert_eq!(acknowledgement["payload"], Value::Null);
        }
        if round == 1 {
            let (mut runtime, _) = Socket::runtime(process.http, "g1").await;
            for kind in ["approval_resolve", "attachment_ready"] {
                let asked = runtime.expect(kind).await;
                runtime.say(json!({"type": "ack", "ask": asked["ask"]})).await;
            }
            let (mut tab, _, _) = Socket::hello(process.http, "c", json!({})).await;
            tab.say(json!({"type": "turn_start", "turnId": "last", "requestId": "r-5"})).await;
            assert_eq!(runtime.expect("turn_start").await["turnId"], "last");
            runtime.say(json!({"type": "turn_done", "clientId": "c", "turnId": "last", "seq": 1})).await;
            acked(&mut runtime, 1).await;
        }
        process.kill();
    }
    // All of it was had, once.
    let process = Process::start(dir.path());
    let (mut runtime, _) = Socket::runtime(process.http, "g2").await;
    let (mut tab, _, _) = Socket::hello(process.http, "c", json!({})).await;
    for request in &requests {
        tab.say(request.clone()).await;
    }
    tab.say(json!({"type": "turn_start", "turnId": "other", "requestId": "r-6"})).await;
    assert_eq!(runtime.expect("turn_start").await["turnId"], "other");
}

/// What a socket had is known when it comes back; a copy of a tab is another socket.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_a_socket_had_is_known_after_a_restart() {
    let dir = tempfile::tempdir().unwrap();
    let come = async |http, socket: &str| {
        let mut tab = Socket::open(http).await;
        tab.say(json!({"type": "hello", "clientId": "c", "socketId": socket})).await;
        let welcome = tab.expect("welcome").await;
        tab.expect("state_snapshot").await;
        (tab, welcome)
    };
    let process = Process::start(dir.path());
    let (mut runtime, _) = Socket::runtime(process.http, "g1").await;
    let (mut tab, welcome) = come(process.http, "one").await;
    assert_eq!((&welcome["socketId"], &welcome["payload"]["ackedSeq"]), (&json!("one"), &Value::Null));
    for seq in 1..=3 {
        runtime.say(json!({"type": "turn_phase", "clientId": "c", "turnId": "t", "seq": seq})).await;
        acked(&mut runtime, seq).await;
    }
    let mut last = Value::Null;
    for _ in 0..3 {
        last = tab.expect("turn_phase").await["seq"].clone();
    }
    tab.say(json!({"type": "ack", "ack": last})).await;
    tab.say(json!({"type": "state_request"})).await;
    tab.expect("state_snapshot").await;
    // Its copy says nothing of itself.
    let (mut copy, welcome) = come(process.http, "one").await;
    assert_ne!(welcome["socketId"], "one");
    assert_eq!(welcome["payload"]["ackedSeq"], Value::Null);
    copy.say(json!({"type": "ack", "ack": 1})).await;
    // What is acknowledged is on disk, and with it what came before.
    for request in ["r-1", "r-2"] {
        tab.say(json!({"type": "turn_start", "turnId": request, "requestId": request})).await;
        while tab.answer("ack").await["requestId"] != request {}
    }
    process.kill();
    let process = Process::start(dir.path());
    let (tab, welcome) = come(process.http, "one").await;
    assert_eq!((&welcome["socketId"], &welcome["payload"]["ackedSeq"]), (&json!("one"), &last));
    drop(tab);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn of_two_sockets_of_one_runtime_the_later_one_tells() {
    let dir = tempfile::tempdir().unwrap();
    let server = server(dir.path()).await;
    let http = server.addresses().http;
    let (mut old, _) = Socket::runtime(http, "g1").await;
    let event = |seq: u64| json!({"type": "turn_phase", "clientId": "c", "turnId": "t", "seq": seq, "payload": seq});
    old.say(event(1)).await;
    acked(&mut old, 1).await;
    let (mut new, welcome) = Socket::runtime(http, "g1").await;
    assert_eq!(welcome["payload"]["latestSeq"], 1);
    new.say(event(2)).await;
    acked(&mut new, 2).await;
    old.say(event(2)).await;
    // What it tells is not kept: it is displaced, or told that it is.
    old.say(json!({"type": "turn_phase", "clientId": "other", "seq": 3})).await;
    let (mut tab, _, _) = Socket::hello(http, "c", json!({})).await;
    tab.say(json!({"type": "replay_request", "payload": {"since": 0}})).await;
    let replayed = tab.expect("replay_events").await;
    let told: Vec<_> = replayed["payload"]["events"].as_array().unwrap().iter().map(|e| e["payload"].clone()).collect();
    assert_eq!(told, [1, 2]);
    // Another runtime has the client: the former one's words are nobody's.
    let (mut other, _) = Socket::runtime(http, "g2").await;
    other.say(json!({"type": "turn_start", "clientId": "c", "turnId": "v", "seq": 1})).await;
    acked(&mut other, 1).await;
    new.say(event(3)).await;
    new.expect("ack").await;
    tab.expect("runtime_generation_changed").await;
    tab.expect("turn_lost").await;
    tab.expect("turn_start").await;
    tab.say(json!({"type": "state_request"})).await;
    assert_eq!(tab.expect("state_snapshot").await["payload"]["activeTurn"]["id"], "v");
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_runtime_goes_on_with_what_it_recovered_whoever_looks() {
    let dir = tempfile::tempdir().unwrap();
    let server = server(dir.path()).await;
    let http = server.addresses().http;
    let (mut first, _) = Socket::runtime(http, "g1").await;
    first.say(json!({"type": "turn_start", "clientId": "c", "turnId": "t", "seq": 1})).await;
    first.say(json!({"type": "turn_queued", "clientId": "c", "turnId": "waits", "seq": 2})).await;
    acked(&mut first, 2).await;
    drop(first);
    let mut second = Socket::open(http).await;
    let payload = json!({"role": "runtime", "runtimeGeneration": "g2", "recoveredTurns": ["t"]});
    second.say(json!({"type": "hello", "payload": payload})).await;
    second.expect("welcome").await;
    // Nobody looked until now.
    let (mut tab, _, state) = Socket::hello(http, "c", json!({"versions": [1]})).await;
    assert_eq!((&state["payload"]["activeTurn"]["id"], &state["payload"]["brainQueue"]), (&json!("t"), &Value::Null));
    tab.say(json!({"type": "replay_request", "payload": {"since": 0}})).await;
    let replayed = tab.expect("replay_events").await;
    let types: Vec<_> = replayed["payload"]["events"].as_array().unwrap().iter().map(|e| e["type"].clone()).collect();
    assert_eq!(
        types,
        ["turn_start", "turn_queued", "runtime_generation_changed", "runtime_recovered", "turn_lost"].map(Value::from)
    );
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_has_no_room_for_what_the_server_adds_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let server = server(dir.path()).await;
    let http = server.addresses().http;
    let (mut runtime, welcome) = Socket::runtime(http, "g1").await;
    let most = usize::try_from(welcome["payload"]["frameBytesMax"].as_u64().unwrap()).unwrap();
    let (mut tab, _, _) = Socket::hello(http, "c", json!({})).await;
    let text = |bytes: usize| json!({"type": "turn_start", "turnId": "t", "payload": "x".repeat(bytes)});
    tab.say(text(most - 5000)).await;
    let Frame::Envelope(frame) = runtime.next().await else { panic!("closed") };
    assert!(frame.len() <= most);
    tab.say(text(most - 500)).await;
    let close: Close = tab.closed().await;
    assert_eq!(close.code, code::TOO_LARGE);
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_ui_that_does_not_keep_up_gets_pieces_joined_and_misses_nothing() {
    const PIECES: usize = 6000;
    let dir = tempfile::tempdir().unwrap();
    let server = server(dir.path()).await;
    let http = server.addresses().http;
    let (mut tab, welcome, _) = Socket::hello(http, "c", json!({})).await;
    let (mut runtime, _) = Socket::runtime(http, "g1").await;
    let piece = |number: usize| format!("{number:>8}{}", "~".repeat(2000));
    // Far more than the buffers in between take.
    for number in 0..PIECES {
        let kind = if number == PIECES / 2 { "turn_phase" } else { "turn_text_delta" };
        let payload = json!({"delta": piece(number)});
        runtime.say(json!({"type": kind, "clientId": "c", "turnId": "t", "seq": number + 1, "payload": payload})).await;
    }
    acked(&mut runtime, PIECES as u64).await;
    tokio::time::sleep(Duration::from_millis(200)).await;
    let (mut seen, mut joined, mut last) = (0, 0, welcome["payload"]["latestSeq"].clone());
    while seen < PIECES {
        let Frame::Envelope(frame) = tab.next().await else { panic!("closed") };
        let event: Value = serde_json::from_slice(&frame).unwrap();
        let count = event["joined"].as_u64().map_or(1, |count| usize::try_from(count).unwrap());
        let expected: String = (seen..seen + count).map(piece).collect();
        assert_eq!(event["payload"]["delta"], expected);
        assert_eq!((event["type"] == "turn_phase", &event["prev"]), (seen == PIECES / 2, &last));
        (seen, joined, last) = (seen + count, joined + usize::from(count > 1), event["seq"].clone());
    }
    assert!(joined > 0);
    server.stop().await;
}

/// A WebSocket of which every byte is written and read by hand.
async fn by_hand(http: SocketAddr) -> TcpStream {
    let mut stream = TcpStream::connect(http).await.unwrap();
    let upgrade = format!(
        "GET /agent-socket HTTP/1.1\r\nhost: {http}\r\nconnection: upgrade\r\nupgrade: websocket\r\nsec-websocket-version: 13\r\n\
         sec-websocket-key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
    );
    stream.write_all(upgrade.as_bytes()).await.unwrap();
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        head.push(stream.read_u8().await.unwrap());
    }
    assert!(head.starts_with(b"HTTP/1.1 101"), "{}", String::from_utf8_lossy(&head));
    stream
}

/// A frame of a client, with a mask that changes nothing.
fn masked(opcode: u8, payload: &[u8]) -> Vec<u8> {
    let mut frame = vec![0x80 | opcode];
    match u16::try_from(payload.len()) {
        Ok(length @ ..=125) => frame.push(0x80 | length as u8),
        Ok(length) => frame.extend([&[0x80 | 126][..], &length.to_be_bytes()].concat()),
        Err(_) => frame.extend([&[0x80 | 127][..], &(payload.len() as u64).to_be_bytes()].concat()),
    }
    frame.extend([0; 4]);
    frame.extend(payload);
    frame
}

/// The code of the close that comes next; then the end, and no reset.
async fn close_code(stream: &mut TcpStream) -> u16 {
    let mut rest = Vec::new();
    timeout(PATIENCE, stream.read_to_end(&mut rest)).await.unwrap().unwrap();
    assert_eq!(rest[0], 0x88, "{rest:?}");
    u16::from_be_bytes([rest[2], rest[3]])
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_close_is_answered_and_a_refusal_read_whatever_was_on_its_way() {
    let dir = tempfile::tempdir().unwrap();
    let server = server(dir.path()).await;
    let http = server.addresses().http;
    let mut stream = by_hand(http).await;
    stream.write_all(&masked(0x8, &1000_u16.to_be_bytes())).await.unwrap();
    assert_eq!(close_code(&mut stream).await, 1000, "as it was asked for");
    let mut stream = by_hand(http).await;
    stream.write_all(&masked(0x1, b"\xff\xfe")).await.unwrap();
    let answer = masked(0x8, &1007_u16.to_be_bytes());
    stream.write_all(&answer).await.unwrap();
    assert_eq!(close_code(&mut stream).await, 1007);
    // Much larger than what may be, and than what the kernel takes.
    let mut stream = by_hand(http).await;
    stream.write_all(&masked(0x1, &vec![b'x'; 12 * 1024 * 1024])).await.unwrap();
    assert_eq!(close_code(&mut stream).await, 1009);
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_client_that_says_too_much_is_heard_at_the_rate_that_is_set() {
    let dir = tempfile::tempdir().unwrap();
    let limits = Limits { messages_per_second: 50, message_burst: 1, ..Limits::default() };
    let config = Config { data_dir: dir.path().to_owned(), dev: true, limits, ..Config::on_free_ports() };
    let server = Server::start(config).await.unwrap();
    let (mut tab, _, _) = Socket::hello(server.addresses().http, "c", json!({})).await;
    let begun = std::time::Instant::now();
    for _ in 0..31 {
        tab.say(json!({"type": "state_request"})).await;
    }
    for _ in 0..31 {
        tab.expect("state_snapshot").await;
    }
    // The first one is free, and the last one is answered before it is paid for.
    assert!(begun.elapsed() >= Duration::from_millis(29 * 20), "{:?}", begun.elapsed());
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_turn_waits_visibly_when_its_runtime_leaves_before_it_says_anything() {
    let dir = tempfile::tempdir().unwrap();
    let server = server(dir.path()).await;
    let http = server.addresses().http;
    let (mut runtime, _) = Socket::runtime(http, "g1").await;
    let (mut tab, _, _) = Socket::hello(http, "c", json!({})).await;
    tab.say(json!({"type": "turn_start", "turnId": "t", "payload": {"text": "hello"}})).await;
    assert_eq!(tab.expect("turn_queued").await["turnId"], "t");
    runtime.expect("turn_start").await;
    drop(runtime);
    tab.say(json!({"type": "state_request"})).await;
    let state = tab.expect("state_snapshot").await;
    assert!(state.to_string().contains("\"t\""), "{state}");
    let (mut runtime, _) = Socket::runtime(http, "g1").await;
    assert_eq!(runtime.expect("turn_start").await["turnId"], "t");
    server.stop().await;
}

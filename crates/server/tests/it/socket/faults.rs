//! Runtimes that die, come back, lie or are displaced; and UIs that do not keep up.

use std::time::Duration;

use serde_json::{Value, json};
use trunkline_agent_socket::{Close, close::code};

use super::{Frame, Socket, server};

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

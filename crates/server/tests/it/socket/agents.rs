//! An agent on gRPC, which knows nothing of sockets, is a client's runtime.

use std::{
    collections::BTreeMap,
    time::{Duration, Instant},
};

use serde_json::{Value, json};
use trunkline_agent_socket::close::code;
use trunkline_proto::v1::{
    InitConnection, MessageType, ProgressReport, SendMessage, UserIdentity, init_connection::ClientType,
    upstream_message::Payload as Up,
};

use super::{Frame, Socket, rights::open, server};
use crate::{
    client::{Client, agent, lane},
    sandbox::rights::World,
};

async fn say(agent: &Client, target: &str, payload: &'static [u8], kind: MessageType) {
    let message = SendMessage {
        target_topic: target.to_owned(),
        payload: payload.into(),
        message_type: kind.into(),
        ..SendMessage::default()
    };
    agent.put(Up::Send(message)).await;
}

/// A request is sent once, and acknowledged as often as it is said.
async fn requests_are_sent_once(tab: &mut Socket, one: &mut Client) {
    let stop = json!({"type": "turn_aborted", "turnId": "t-2", "requestId": "r-1"});
    let answer =
        json!({"type": "approval_resolve", "operationId": "o", "requestId": "r-2", "payload": {"approved": true}});
    tab.say(stop.clone()).await;
    tab.expect_both("turn_aborted", "r-1").await;
    for request in [&stop, &answer, &answer, &stop] {
        tab.say(request.clone()).await;
        assert_eq!(tab.expect("ack").await["requestId"], request["requestId"]);
    }
    assert_eq!(one.message().await.message_type, i32::from(MessageType::Control));
    assert_eq!(one.message().await.message_type, i32::from(MessageType::Opaque));
    tab.say(json!({"type": "turn_start", "turnId": "t-3", "payload": "after", "requestId": "r-3"})).await;
    tab.expect_both("turn_running", "r-3").await;
    assert_eq!(&one.message().await.payload[..], b"after");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_agent_answers_a_client_and_knows_nothing_of_it() {
    let dir = tempfile::tempdir().unwrap();
    let server = server(dir.path()).await;
    let (http, grpc) = (server.addresses().http, server.addresses().grpc);
    let hello = json!({"agent": lane("one")});
    let (mut tab, _, _) = Socket::hello(http, "web-a", hello.clone()).await;
    let (mut second, _, _) = Socket::hello(http, "web-a", hello.clone()).await;
    // It is away: what is asked waits for it.
    tab.say(json!({"type": "turn_start", "turnId": "t-1", "payload": {"text": "hello"}})).await;
    for tab in [&mut tab, &mut second] {
        assert_eq!(tab.expect("turn_queued").await["payload"]["text"], "hello");
    }
    let mut one = Client::connect(grpc, agent("one")).await.unwrap();
    let asked = one.message().await;
    assert_eq!((&asked.payload[..], asked.source_topic.as_str()), (&b"hello"[..], "us::dev::web-a"));
    assert_eq!(asked.message_type, i32::from(MessageType::Chat));
    say(&one, &asked.source_topic, br#"{"type":"turn_text_delta","payload":{"delta":"h"}}"#, MessageType::Opaque).await;
    say(&one, &asked.source_topic, b"hi", MessageType::Chat).await;
    for tab in [&mut tab, &mut second] {
        let mut last = Value::Null;
        for (kind, field, text) in
            [("turn_text_delta", "delta", "h"), ("turn_text_delta", "delta", "hi"), ("turn_done", "text", "hi")]
        {
            let event = tab.expect(kind).await;
            assert_eq!((&event["payload"][field], &event["turnId"]), (&json!(text), &json!("t-1")));
            last = event;
        }
        assert_eq!(last["runtimeGeneration"], lane("one"));
    }
    // Said again, it is not begun again.
    tab.say(json!({"type": "turn_start", "turnId": "t-1", "payload": {"text": "hello"}})).await;
    tab.say(json!({"type": "turn_start", "turnId": "t-2", "payload": "now"})).await;
    tab.expect("turn_running").await;
    assert_eq!(&one.message().await.payload[..], b"now");
    requests_are_sent_once(&mut tab, &mut one).await;

    // What is said while nobody looks is there for who comes back.
    drop((tab, second));
    say(&one, &asked.source_topic, b"are you there?", MessageType::Chat).await;
    let (mut tab, _, _) = Socket::hello(http, "web-a", hello).await;
    tab.say(json!({"type": "replay_request", "payload": {"since": 0}})).await;
    // By number: what comes by itself may be in the replay, too.
    let mut texts = BTreeMap::new();
    while texts.len() < 2 {
        let Frame::Envelope(frame) = tab.next().await else { panic!("closed") };
        let frame: Value = serde_json::from_slice(&frame).unwrap();
        let events = match frame["type"].as_str().unwrap() {
            "replay_events" => frame["payload"]["events"].as_array().unwrap().clone(),
            _ => vec![frame],
        };
        let answers = events.iter().filter(|event| event["type"] == "turn_done");
        texts.extend(
            answers.map(|event| (event["seq"].as_u64(), event["payload"]["text"].as_str().unwrap().to_owned())),
        );
    }
    assert_eq!(texts.into_values().collect::<Vec<_>>(), ["hi", "are you there?"]);
    for (payload, code) in [(json!({"agent": "us::a::b"}), code::UNREADABLE), (json!({"agent": 7}), code::UNREADABLE)] {
        let mut socket = Socket::open(http).await;
        socket.say(json!({"type": "hello", "clientId": "c", "payload": payload})).await;
        assert_eq!(socket.closed().await.code, code);
    }
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn only_its_own_agent_speaks_to_a_client() {
    let dir = tempfile::tempdir().unwrap();
    let server = server(dir.path()).await;
    let (http, grpc) = (server.addresses().http, server.addresses().grpc);
    let (mut tab, _, _) = Socket::hello(http, "web-a", json!({"agent": lane("one")})).await;
    let mut one = Client::connect(grpc, agent("one")).await.unwrap();
    let mut two = Client::connect(grpc, agent("two")).await.unwrap();
    tab.say(json!({"type": "turn_start", "turnId": "t-1", "payload": {"text": "hello"}})).await;
    tab.expect("turn_running").await;
    let window = one.message().await.source_topic;
    let report = |summary: &str| ProgressReport {
        recipient: window.clone(),
        state: "running".into(),
        summary: summary.into(),
        ..ProgressReport::default()
    };
    say(&two, &window, br#"{"type":"approval_request","operationId":"o","payload":{}}"#, MessageType::Opaque).await;
    say(&two, &window, b"I am your agent", MessageType::Chat).await;
    two.put(Up::Progress(report("pretends").into())).await;
    two.barrier().await;
    one.put(Up::Progress(report("works").into())).await;
    one.barrier().await;
    assert_eq!(tab.expect("turn_phase").await["payload"]["phase"], "works");
    say(&one, &window, b"hi", MessageType::Chat).await;
    assert_eq!(tab.expect("turn_text_delta").await["payload"]["delta"], "hi");
    assert_eq!(tab.expect("turn_done").await["payload"]["text"], "hi");
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn users_of_one_client_ask_in_their_own_names() {
    let mut world = World::new().await;
    let mut key = async |kind: &str, holder: &str, scope: &str, workspaces: &str| {
        let reply = world.key(kind, holder, scope, workspaces).await;
        assert!(reply.success, "{}", reply.error);
        reply.plaintext_token
    };
    let (ann, bob) = (key("user", "ann", "socket:web-*", "*").await, key("user", "bob", "socket:web-*", "*").await);
    let less = key("user", "ann", "socket:web-*", "w").await;
    let secret = key("agent", "ag::ws::impl::one", "connect", "*").await;
    let init = InitConnection { credentials: [("x-api-key".to_owned(), secret)].into(), ..agent("one") };
    let mut one = Client::connect(world.server.addresses().grpc, init).await.unwrap();
    let hello = json!({"type": "hello", "clientId": "web-a", "payload": {"agent": lane("one")}});
    let ask = |turn: &str| json!({"type": "turn_start", "turnId": turn, "payload": {"text": turn}});
    let mut tabs = Vec::new();
    for token in [&ann, &bob] {
        let mut tab = open(&world, token, None).await.ok().unwrap();
        tab.say(hello.clone()).await;
        tab.expect("welcome").await;
        tab.expect("state_snapshot").await;
        tabs.push(tab);
    }
    for (tab, (user, turn)) in tabs.iter_mut().zip([("ann", "a-1"), ("bob", "b-1")]) {
        tab.say(ask(turn)).await;
        let asked = one.message().await;
        assert_eq!((asked.source_topic, &asked.payload[..]), (format!("us::{user}::web-a"), turn.as_bytes()));
    }
    // Nor does a token with less than the one that is there speak by that one's rights.
    let mut tab = open(&world, &less, None).await.ok().unwrap();
    tab.say(hello).await;
    tab.closed().await;
    drop(tabs);
    world.server.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_window_that_is_not_left_yet_keeps_no_other_user_waiting() {
    let mut world = World::new().await;
    let mut key = async |holder: &str, scope: &str| {
        let reply = world.key("user", holder, scope, "*").await;
        assert!(reply.success, "{}", reply.error);
        reply.plaintext_token
    };
    let (ann, bob) = (key("ann", "socket:web-*").await, key("bob", "socket:web-*").await);
    let identity = ClientType::User(UserIdentity { user_id: "ann".into(), window_id: "web-a".into() });
    let credentials = [("x-api-key".to_owned(), key("ann", "connect").await)].into();
    let window = InitConnection { client_type: Some(identity), credentials, ..InitConnection::default() };
    let window = Client::connect(world.server.addresses().grpc, window).await.unwrap();
    let hello = json!({"type": "hello", "clientId": "web-a", "payload": {"agent": lane("one")}});
    let begun = Instant::now();
    let mut tabs = Vec::new();
    for token in [&ann, &ann, &bob] {
        let mut tab = open(&world, token, None).await.ok().unwrap();
        tab.say(hello.clone()).await;
        tabs.push(tab);
    }
    tabs[2].expect("welcome").await;
    assert!(begun.elapsed() < Duration::from_secs(4), "it waits for the window of another user");
    // What is said while the line is not open is not lost.
    tabs[0].say(json!({"type": "turn_start", "turnId": "t-1", "payload": {"text": "hello"}})).await;
    window.close().await;
    for tab in &mut tabs[..2] {
        tab.expect("welcome").await;
        tab.expect("state_snapshot").await;
    }
    tabs[0].expect("turn_queued").await;
    world.server.stop().await;
}

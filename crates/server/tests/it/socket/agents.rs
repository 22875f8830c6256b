//! An agent on gRPC, which knows nothing of sockets, is a client's runtime.

use std::collections::BTreeMap;

use serde_json::{Value, json};
use trunkline_agent_socket::close::code;
use trunkline_proto::v1::{MessageType, SendMessage, upstream_message::Payload as Up};

use super::{Frame, Socket, server};
use crate::client::{Client, agent, lane};

async fn say(agent: &Client, target: &str, payload: &'static [u8], kind: MessageType) {
    let message = SendMessage {
        target_topic: target.to_owned(),
        payload: payload.into(),
        message_type: kind.into(),
        ..SendMessage::default()
    };
    agent.put(Up::Send(message)).await;
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
    tab.say(json!({"type": "turn_aborted", "turnId": "t-2"})).await;
    tab.expect("turn_aborted").await;
    assert_eq!(one.message().await.message_type, i32::from(MessageType::Control));

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

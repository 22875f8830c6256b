//! Agents that know nothing of conversations, and operators, at the other end.

use serde_json::{Value, json};
use trunkline_agent_socket::close::code;
use trunkline_core::conversation::Options;
use trunkline_proto::v1::{
    InitConnection, MessageType, ProgressReport, SendMessage, TokenCreateRequest, TokenOperation, UserIdentity,
    downstream_message::Payload as Down, init_connection::ClientType, token_operation::OpType,
    upstream_message::Payload as Up,
};

use super::{
    AGENT, OTHER_AGENT, SECRET, begin, claims, hs256, say, server, server_with, show, sign, texts, user, watch,
};
use crate::{
    client::{Client, agent},
    sandbox::Web,
    socket::Socket,
};

pub(super) async fn tell(client: &Client, lane: &str, kind: MessageType, payload: impl Into<bytes::Bytes>) {
    tell_as(client, lane, kind, payload, "").await;
}

async fn tell_as(client: &Client, lane: &str, kind: MessageType, payload: impl Into<bytes::Bytes>, key: &str) {
    let message = SendMessage {
        target_topic: lane.to_owned(),
        payload: payload.into(),
        message_type: kind.into(),
        idempotency_key: key.to_owned(),
        ..SendMessage::default()
    };
    client.put(Up::Send(message)).await;
}

fn operator(user: &str) -> InitConnection {
    let user = UserIdentity { user_id: user.to_owned(), window_id: "desk".to_owned() };
    InitConnection { client_type: Some(ClientType::User(user)), ..InitConnection::default() }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_an_agent_says_again_under_its_key_is_said_once_and_nothing_else_is() {
    let dir = tempfile::tempdir().unwrap();
    let server = server(dir.path()).await;
    let ann = user(server.addresses().http, "ann");
    let convo = begin(&ann).await;
    let lane = format!("us::ann::{convo}");
    let mut one = Client::connect(server.addresses().grpc, agent("one")).await.unwrap();
    for text in ["once", "once", "another"] {
        tell_as(&one, &lane, MessageType::Chat, text, "k").await;
    }
    let error = one.error().await;
    assert_eq!((error.code.as_str(), error.request_id.as_str()), ("ERR_IDEMPOTENCY_KEY_REUSED", "k"));
    // What it said as a whole that it had streamed, it may say again, though nothing is streamed any more.
    let piece = json!({"type": "delta", "id": "m", "text": "streamed"}).to_string();
    tell(&one, &lane, MessageType::Opaque, piece).await;
    for _ in 0..2 {
        tell_as(&one, &lane, MessageType::Opaque, json!({"type": "delta", "id": "m", "done": true}).to_string(), "d")
            .await;
    }
    // Under a name of its own it is something else.
    tell_as(&one, &lane, MessageType::Opaque, json!({"type": "delta", "id": "m", "done": true}).to_string(), "e").await;
    let error = one.error().await;
    assert_eq!((error.code.as_str(), error.request_id.as_str()), ("ERR_INVALID_ARGUMENT", "e"));
    assert_eq!(texts(&show(&ann, &convo).await), ["once", "streamed"]);
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_agent_that_knows_nothing_of_it_is_a_chat_bot() {
    let dir = tempfile::tempdir().unwrap();
    let server = server(dir.path()).await;
    let ann = user(server.addresses().http, "ann");
    let convo = begin(&ann).await;
    let mut tab = watch(&ann, &convo).await;
    // It is away: what is said waits for it.
    let (_, said) = say(&ann, &convo, "hello").await;
    tab.expect("message").await;
    let mut one = Client::connect(server.addresses().grpc, agent("one")).await.unwrap();
    let asked = one.message().await;
    let lane = format!("us::ann::{convo}");
    assert_eq!((&asked.payload[..], asked.source_topic.as_str()), (&b"hello"[..], lane.as_str()));
    assert_eq!((asked.message_type, asked.workspace.as_str()), (MessageType::Chat.into(), "ws"));
    let about = asked.about.unwrap().entries;
    let entry = |name: &str| about[name].as_str();
    assert_eq!((entry("convo_id"), entry("message_id")), (convo.as_str(), said["message_id"].as_str().unwrap()));
    assert_eq!((entry("turn_number"), entry("content_type"), entry("from")), ("1", "text/plain", "appuser"));
    // It reports progress, and answers.
    let report = |state: &str, summary: &str| ProgressReport {
        recipient: lane.clone(),
        state: state.to_owned(),
        summary: summary.to_owned(),
        ..ProgressReport::default()
    };
    one.put(Up::Progress(report("running", "looks it up").into())).await;
    let typing = tab.expect("typing").await.data;
    let expected = json!({"type": "typing", "convo_id": convo, "kind": "thinking", "state": "start",
        "label": "looks it up"});
    assert_eq!(typing, expected);
    one.put(Up::Progress(report("completed", "").into())).await;
    assert_eq!(tab.expect("typing").await.data["state"], "stop");
    one.send(&lane, "hi ann").await;
    let answer = tab.expect("message").await.data["message"].clone();
    assert_eq!(
        (&answer["content"], &answer["from"], &answer["turn_number"]),
        (&json!("hi ann"), &json!("ai_agent"), &json!(1))
    );
    let ada = json!({"id": AGENT, "kind": "ai_agent", "name": "Ada", "photo_url": "", "initial": "A"});
    assert_eq!(answer["participant"], ada);
    let done = tab.expect("turn_done").await.data;
    assert_eq!((&done["reason"], done["at"].is_i64()), (&json!("ok"), true));
    // Said again under the same name, it is said once.
    say(&ann, &convo, "more").await;
    tab.expect("message").await;
    for _ in 0..2 {
        tell_as(&one, &lane, MessageType::Chat, r#"{"text": "first", "more": true}"#, "a").await;
    }
    tell(&one, &lane, MessageType::Chat, r#"{"text": "second"}"#).await;
    for text in ["first", "second"] {
        assert_eq!(tab.expect("message").await.data["message"]["content"], text);
    }
    tab.expect("turn_done").await;
    assert_eq!(texts(&show(&ann, &convo).await), ["hello", "hi ann", "more", "first", "second"]);
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_streamed_comes_piece_by_piece_and_whole() {
    let dir = tempfile::tempdir().unwrap();
    let server = server(dir.path()).await;
    let ann = user(server.addresses().http, "ann");
    let convo = begin(&ann).await;
    let one = Client::connect(server.addresses().grpc, agent("one")).await.unwrap();
    let lane = format!("us::ann::{convo}");
    let mut tab = watch(&ann, &convo).await;
    let mut stock = ann.open(&format!("/api/v2/agent_convos/{convo}/events")).await;
    stock.expect("ready").await;
    say(&ann, &convo, "hello").await;
    let delta = |text: &str| json!({"type": "delta", "id": "m", "text": text}).to_string();
    tell(&one, &lane, MessageType::Opaque, delta("a ")).await;
    tell(&one, &lane, MessageType::Opaque, delta("b ")).await;
    tab.expect("message").await;
    tab.expect("typing").await;
    let first = tab.expect("delta").await;
    let id = first.data["message_id"].clone();
    let expected = json!({"type": "delta", "convo_id": convo, "message_id": id, "index": 0, "text": "a "});
    assert_eq!(first.data, expected);
    assert_eq!(tab.expect("delta").await.data["index"], 1);
    drop((tab, one));
    server.stop().await;
    // The server, and the tab, go on in the middle of it.
    let server = self::server(dir.path()).await;
    let ann = user(server.addresses().http, "ann");
    let mut one = Client::connect(server.addresses().grpc, agent("one")).await.unwrap();
    tell(&one, &lane, MessageType::Opaque, delta("c")).await;
    let mut tab = super::watch_after(&ann, &convo, Some(&first.id)).await;
    for (index, text) in [(1, "b "), (2, "c")] {
        let delta = tab.expect("delta").await.data;
        assert_eq!((&delta["index"], &delta["text"], &delta["message_id"]), (&json!(index), &json!(text), &id));
    }
    tell(&one, &lane, MessageType::Opaque, json!({"type": "delta", "id": "m", "done": true}).to_string()).await;
    let whole = tab.expect("message").await.data["message"].clone();
    assert_eq!((&whole["content"], &whole["id"]), (&json!("a b c"), &id));
    tab.expect("turn_done").await;
    // Or the agent says it whole.
    tell(&one, &lane, MessageType::Opaque, json!({"type": "delta", "id": "n", "text": "x"}).to_string()).await;
    tell(&one, &lane, MessageType::Chat, json!({"id": "n", "text": "xyz"}).to_string()).await;
    assert_eq!(tab.expect("delta").await.data["done"], true, "of the one before");
    tab.expect("typing").await;
    let id = tab.expect("delta").await.data["message_id"].clone();
    let whole = tab.expect("message").await.data["message"].clone();
    assert_eq!((&whole["content"], &whole["id"]), (&json!("xyz"), &id));
    assert_eq!(texts(&show(&ann, &convo).await), ["hello", "a b c", "xyz"]);
    // Whoever comes in the middle of it has it from its beginning; an agent that was started again begins it anew.
    let again = json!({"type": "delta", "id": "o", "text": "0", "start": true});
    tell(&one, &lane, MessageType::Opaque, again.to_string()).await;
    for text in ["1", "2"] {
        tell(&one, &lane, MessageType::Opaque, json!({"type": "delta", "id": "o", "text": text}).to_string()).await;
        one.barrier().await;
    }
    let mut late = watch(&ann, &convo).await;
    assert_eq!(late.expect("delta").await.data["done"], true, "of the one before");
    for text in ["0", "1", "2"] {
        assert_eq!(late.expect("delta").await.data["text"], text);
    }
    drop(late);
    // What was not streamed cannot be done.
    tell_as(&one, &lane, MessageType::Opaque, json!({"type": "delta", "id": "m", "done": true}).to_string(), "late")
        .await;
    let error = one.error().await;
    assert_eq!((error.code.as_str(), error.request_id.as_str()), ("ERR_INVALID_ARGUMENT", "late"));
    // Who does not ask for pieces gets none.
    stock.expect("message").await;
    stock.expect("typing").await;
    assert_eq!(stock.expect("closed").await.data["reason"], "shutdown");
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_character_that_was_cut_in_two_is_whole_again() {
    let dir = tempfile::tempdir().unwrap();
    let server = server(dir.path()).await;
    let ann = user(server.addresses().http, "ann");
    let convo = begin(&ann).await;
    let lane = format!("us::ann::{convo}");
    let one = Client::connect(server.addresses().grpc, agent("one")).await.unwrap();
    let mut tab = watch(&ann, &convo).await;
    say(&ann, &convo, "hello").await;
    tab.expect("message").await;
    // As JavaScript cuts text; an emoji is two of its characters.
    let piece = |text: &str| format!(r#"{{"type": "delta", "id": "m", "text": "{text}"}}"#);
    tell(&one, &lane, MessageType::Opaque, piece(r"a\ud83d")).await;
    tab.expect("typing").await;
    assert_eq!(tab.expect("delta").await.data["text"], "a");
    drop(one);
    server.stop().await;
    let server = self::server(dir.path()).await;
    let ann = user(server.addresses().http, "ann");
    let one = Client::connect(server.addresses().grpc, agent("one")).await.unwrap();
    let mut tab = watch(&ann, &convo).await;
    assert_eq!(tab.expect("delta").await.data["text"], "a");
    for (sent, shown) in
        [(r"\ude00b", "\u{1f600}b"), (r"\ude00\ud83d", "\u{fffd}"), ("c", "\u{fffd}c"), (r"\ud83d", "")]
    {
        tell(&one, &lane, MessageType::Opaque, piece(sent)).await;
        assert_eq!(tab.expect("delta").await.data["text"], shown);
    }
    tell(&one, &lane, MessageType::Opaque, json!({"type": "delta", "id": "m", "done": true}).to_string()).await;
    let whole = "a\u{1f600}b\u{fffd}\u{fffd}c\u{fffd}";
    assert_eq!(tab.expect("message").await.data["message"]["content"], whole);
    tab.expect("turn_done").await;
    // What comes whole is text all the same, and no JSON; nor is the user refused.
    tell(&one, &lane, MessageType::Chat, r#"{"text": "cut \ud83d"}"#).await;
    assert_eq!(tab.expect("delta").await.data["done"], true, "of the one before");
    assert_eq!(tab.expect("message").await.data["message"]["content"], "cut \u{fffd}");
    let path = format!("/api/v2/agent_convos/{convo}/stream_message");
    assert_eq!(ann.post(&path, r#"{"text": "\ude00 cut"}"#).await.0, 200);
    assert_eq!(tab.expect("message").await.data["message"]["content"], "\u{fffd} cut");
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn agents_say_how_a_conversation_is() {
    let dir = tempfile::tempdir().unwrap();
    let server = server(dir.path()).await;
    let ann = user(server.addresses().http, "ann");
    let convo = begin(&ann).await;
    let mut one = Client::connect(server.addresses().grpc, agent("one")).await.unwrap();
    let lane = format!("us::ann::{convo}");
    let mut tab = watch(&ann, &convo).await;
    let path = format!("/api/v2/agent_convos/{convo}/stream_message");
    let named = |key: &str| {
        let request = ann.request(reqwest::Method::POST, &path).body(json!({"text": "hello"}).to_string());
        ann.ask(request.header("idempotency-key", key))
    };
    let accepted = named("k").await;
    assert_eq!(accepted.0, 200);
    tab.expect("message").await;
    let control = async |one: &Client, said: Value| tell(one, &lane, MessageType::Control, said.to_string()).await;
    control(&one, json!({"type": "turn_done", "reason": "temporary_failure"})).await;
    let error = tab.expect("error").await.data;
    assert_eq!((&error["reason"], &error["convo_id"]), (&json!("temporary_failure"), &json!(convo)));
    assert_eq!(tab.expect("turn_done").await.data["reason"], "temporary_failure");
    control(&one, json!({"type": "convo_state", "state": "escalated"})).await;
    let state = tab.expect("convo_state").await.data;
    let expected = json!({"type": "convo_state", "agent_id": AGENT, "convo_id": convo, "state": "escalated",
        "prev_state": "open", "closed_user_message": "A person was asked to help."});
    assert_eq!(state, expected);
    control(&one, json!({"type": "convo_state", "state": "resolved", "closed_user_message": "Bye."})).await;
    assert_eq!(tab.expect("convo_state").await.data["closed_user_message"], "Bye.");
    assert_eq!(say(&ann, &convo, "more").await.0, 409);
    assert_eq!(named("k").await, accepted, "what was accepted before is so still");
    let shown = show(&ann, &convo).await;
    assert_eq!((&shown["state"], &shown["closed"]), (&json!("resolved"), &json!(true)));
    // Who is locked out is so in every conversation.
    let second = begin(&ann).await;
    let other = format!("us::ann::{second}");
    let lockout = json!({"type": "lockout", "reason": "rage", "seconds": 3600, "user_message": "Take a break."});
    let mut tab = watch(&ann, &second).await;
    tell(&one, &other, MessageType::Control, lockout.to_string()).await;
    assert_eq!(tab.expect("convo_state").await.data["state"], "rage_locked");
    let (_, begun) = ann.post("/api/v2/sessions", "").await;
    let lockout = &begun["lockout"];
    assert_eq!(
        (&lockout["locked_out"], &lockout["reason"], &lockout["permanent"]),
        (&json!(true), &json!("rage"), &json!(false))
    );
    assert_eq!((&lockout["user_message"], lockout["expires_at"].is_string()), (&json!("Take a break."), true));
    let (status, limited) = say(&ann, begun["convo_id"].as_str().unwrap(), "let me in").await;
    assert_eq!(status, 429);
    assert!(limited["retry_after_seconds"].as_u64().unwrap() > 3500, "{limited}");
    for (kind, payload, code) in [
        (MessageType::Control, r#"{"type": "convo_state", "state": "gone"}"#, "ERR_INVALID_ARGUMENT"),
        (MessageType::ToolCall, "{}", "ERR_INVALID_ARGUMENT"),
        (MessageType::Chat, " ", "ERR_INVALID_ARGUMENT"),
        (MessageType::Control, r#"{"type": "join"}"#, "ERR_INVALID_ARGUMENT"),
    ] {
        tell(&one, &lane, kind, payload).await;
        assert_eq!(one.error().await.code, code, "{payload}");
    }
    server.stop().await;
    // Also after a restart, until the agent lets it in.
    let server = self::server(dir.path()).await;
    let ann = user(server.addresses().http, "ann");
    let convo = begin(&ann).await;
    assert_eq!(say(&ann, &convo, "let me in").await.0, 429);
    let mut one = Client::connect(server.addresses().grpc, agent("one")).await.unwrap();
    tell(&one, &format!("us::ann::{convo}"), MessageType::Control, r#"{"type": "lockout", "reason": "none"}"#).await;
    one.barrier().await;
    assert_eq!(say(&ann, &convo, "thank you").await.0, 200);
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_agent_that_goes_away_in_a_turn_is_missed() {
    let dir = tempfile::tempdir().unwrap();
    let server = server_with(dir.path(), Options { agent_grace_seconds: 1, ..Options::default() }).await;
    let ann = user(server.addresses().http, "ann");
    let convo = begin(&ann).await;
    let mut one = Client::connect(server.addresses().grpc, agent("one")).await.unwrap();
    let mut tab = watch(&ann, &convo).await;
    say(&ann, &convo, "hello").await;
    tab.expect("message").await;
    one.message().await;
    one.close().await;
    assert_eq!(tab.expect("turn_done").await.data["reason"], "unavailable");
    // What is said while it is away waits for it, and it is not missed again.
    say(&ann, &convo, "are you there?").await;
    tab.expect("message").await;
    let mut one = Client::connect(server.addresses().grpc, agent("one")).await.unwrap();
    let asked = one.message().await;
    assert_eq!(&asked.payload[..], b"are you there?");
    one.send(&asked.source_topic, "yes").await;
    assert_eq!(tab.expect("message").await.data["message"]["content"], "yes");
    assert_eq!(tab.expect("turn_done").await.data["reason"], "ok");
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_agent_that_does_not_come_back_with_the_server_is_missed() {
    let dir = tempfile::tempdir().unwrap();
    let options = Options { agent_grace_seconds: 1, ..Options::default() };
    let server = server_with(dir.path(), options.clone()).await;
    let ann = user(server.addresses().http, "ann");
    let convo = begin(&ann).await;
    let mut one = Client::connect(server.addresses().grpc, agent("one")).await.unwrap();
    say(&ann, &convo, "hello").await;
    one.message().await;
    // It is known that the turn is open within a moment.
    tokio::time::sleep(std::time::Duration::from_millis(1200)).await;
    drop(one);
    server.stop().await;
    let server = server_with(dir.path(), options).await;
    let mut tab = watch(&user(server.addresses().http, "ann"), &convo).await;
    assert_eq!(tab.expect("turn_done").await.data["reason"], "unavailable");
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_an_agent_says_again_changes_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let server = server(dir.path()).await;
    let ann = user(server.addresses().http, "ann");
    let convo = begin(&ann).await;
    let lane = format!("us::ann::{convo}");
    let mut one = Client::connect(server.addresses().grpc, agent("one")).await.unwrap();
    let mut tab = watch(&ann, &convo).await;
    // Nobody asked: it ends no turn, also when it comes again while one is open.
    tell_as(&one, &lane, MessageType::Chat, "by the way", "k").await;
    tab.expect("message").await;
    say(&ann, &convo, "hello").await;
    tab.expect("message").await;
    tell_as(&one, &lane, MessageType::Chat, "by the way", "k").await;
    one.barrier().await;
    // What it streamed and says again is at its end for whoever saw pieces of it.
    for _ in 0..2 {
        let piece = json!({"type": "delta", "id": "m", "text": "hi", "start": true});
        tell(&one, &lane, MessageType::Opaque, piece.to_string()).await;
        tell_as(&one, &lane, MessageType::Chat, json!({"id": "m", "text": "hi"}).to_string(), "m").await;
    }
    let mut seen = Vec::new();
    while seen.len() < 8 {
        let event = tab.next().await.unwrap();
        seen.push(if event.data["done"] == true { "end".to_owned() } else { event.name });
    }
    assert_eq!(seen, ["typing", "delta", "message", "turn_done", "end", "typing", "delta", "end"]);
    assert_eq!(texts(&show(&ann, &convo).await), ["by the way", "hello", "hi"]);
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_agent_that_takes_too_long_has_failed() {
    let dir = tempfile::tempdir().unwrap();
    let server = server_with(dir.path(), Options { turn_seconds: 1, ..Options::default() }).await;
    let ann = user(server.addresses().http, "ann");
    let convo = begin(&ann).await;
    let _one = Client::connect(server.addresses().grpc, agent("one")).await.unwrap();
    let mut tab = watch(&ann, &convo).await;
    say(&ann, &convo, "hello").await;
    tab.expect("message").await;
    tab.expect("error").await;
    assert_eq!(tab.expect("turn_done").await.data["reason"], "temporary_failure");
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nobody_connects_as_the_user_of_a_conversation() {
    let dir = tempfile::tempdir().unwrap();
    let server = server(dir.path()).await;
    let (http, grpc) = (server.addresses().http, server.addresses().grpc);
    let convo = begin(&user(http, "ann")).await;
    let window = |user: &str, window: &str| {
        let user = UserIdentity { user_id: user.to_owned(), window_id: window.to_owned() };
        InitConnection { client_type: Some(ClientType::User(user)), ..InitConnection::default() }
    };
    let refused = Client::connect(grpc, window("ann", &convo)).await.err().unwrap();
    assert_eq!(refused.code(), tonic::Code::PermissionDenied, "{refused}");
    let unused = uuid::Uuid::now_v7().to_string();
    for (user, name) in [("ann", "desk"), ("bob", convo.as_str()), ("ann", unused.as_str())] {
        Client::connect(grpc, window(user, name)).await.unwrap();
    }
    // Nor by way of a socket, whose clients are windows of their users.
    let convo = begin(&user(http, "dev")).await;
    let mut socket = Socket::open(http).await;
    socket.say(json!({"type": "hello", "clientId": convo, "payload": {"agent": "ag::ws::impl::one"}})).await;
    assert_eq!(socket.closed().await.code, code::POLICY);
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn operators_join_and_leave() {
    let dir = tempfile::tempdir().unwrap();
    let server = server(dir.path()).await;
    let ann = user(server.addresses().http, "ann");
    let convo = begin(&ann).await;
    let lane = format!("us::ann::{convo}");
    let mut tab = watch(&ann, &convo).await;
    let mut one = Client::connect(server.addresses().grpc, agent("one")).await.unwrap();
    let mut eve = Client::connect(server.addresses().grpc, operator("eve")).await.unwrap();
    tell(&eve, &lane, MessageType::Control, r#"{"type": "join"}"#).await;
    eve.barrier().await;
    say(&ann, &convo, "hello").await;
    let heard = eve.message().await;
    assert_eq!((&heard.payload[..], heard.source_topic.as_str()), (&b"hello"[..], lane.as_str()));
    assert_eq!(heard.about.unwrap().entries["from"], "appuser");
    one.message().await;
    one.send(&lane, "I do not know").await;
    let heard = eve.message().await;
    assert_eq!(heard.about.unwrap().entries["from"], "ai_agent");
    eve.send(&lane, "but I do").await;
    tab.expect("message").await;
    tab.expect("message").await;
    tab.expect("turn_done").await;
    let message = tab.expect("message").await.data["message"].clone();
    assert_eq!((&message["content"], &message["from"]), (&json!("but I do"), &json!("human_agent")));
    assert_eq!(message["participant"]["name"], "eve");
    tell(&eve, &lane, MessageType::Control, r#"{"type": "leave"}"#).await;
    eve.barrier().await;
    say(&ann, &convo, "thank you").await;
    one.message().await;
    assert_eq!(eve.outcome().await, None);
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn only_who_may_write_in_the_workspace_takes_part() {
    let dir = tempfile::tempdir().unwrap();
    let config = trunkline::Config { dev: false, ..super::config(dir.path(), Options::default()) };
    let mut server = trunkline::Server::start(config).await.unwrap();
    let admin = server.take_admin_key().unwrap().reveal().to_owned();
    let ann = user(server.addresses().http, "ann");
    let convo = begin(&ann).await;
    let lane = format!("us::ann::{convo}");
    let with = |init: InitConnection, key: &str| InitConnection {
        credentials: [("x-api-key".to_owned(), key.to_owned())].into(),
        ..init
    };
    // An administrator as an agent of another workspace has no rule for this one.
    let elsewhere = trunkline_proto::v1::AgentIdentity {
        workspace: "elsewhere".into(),
        implementation: "impl".into(),
        specifier: "x".into(),
    };
    let init = InitConnection { client_type: Some(ClientType::Agent(elsewhere)), ..InitConnection::default() };
    let mut stranger = Client::connect(server.addresses().grpc, with(init, &admin)).await.unwrap();
    stranger.send(&lane, "psst").await;
    assert_eq!(stranger.error().await.code, "ERR_PERMISSION_DENIED");
    for (pattern, may) in [("elsewhere", false), ("ws", true)] {
        let create = TokenCreateRequest {
            name: "desk".into(),
            principal_type: "user".into(),
            workspace_patterns: vec![pattern.into()],
            created_by: "eve".into(),
            ..TokenCreateRequest::default()
        };
        let create =
            TokenOperation { op: OpType::Create.into(), create_request: Some(create), ..TokenOperation::default() };
        stranger.put(Up::TokenOp(create.into())).await;
        let Some(Down::Token(made)) = stranger.next().await.unwrap() else { panic!("no key") };
        let init = with(operator("eve"), &made.plaintext_token);
        let mut eve = Client::connect_when_free(server.addresses().grpc, init).await;
        eve.send(&lane, "I am here").await;
        assert_eq!(eve.outcome().await.map(|error| error.code), (!may).then(|| "ERR_PERMISSION_DENIED".to_owned()));
        eve.close().await;
    }
    // Its own agent needs none.
    let mut one = Client::connect(server.addresses().grpc, with(agent("one"), &admin)).await.unwrap();
    one.send(&lane, "hello").await;
    one.barrier().await;
    assert_eq!(texts(&show(&ann, &convo).await), ["I am here", "hello"]);
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_agent_greets_and_is_told_in_json_if_it_likes() {
    let dir = tempfile::tempdir().unwrap();
    let server = server(dir.path()).await;
    let ann = Web::new(server.addresses().http).with(&sign(&hs256(), &claims("ann", OTHER_AGENT), SECRET));
    let convo = begin(&ann).await;
    let shown = show(&ann, &convo).await;
    assert_eq!((texts(&shown), &shown["messages"][0]["turn_number"]), (vec!["Hello!"], &json!(0)));
    let (_, said) = say(&ann, &convo, "hi").await;
    let mut two = Client::connect(server.addresses().grpc, agent("two")).await.unwrap();
    let told: Value = serde_json::from_slice(&two.message().await.payload).unwrap();
    let expected =
        json!({"text": "hi", "convo_id": convo, "message_id": said["message_id"], "turn_number": 1, "files": []});
    assert_eq!(told, expected);
    server.stop().await;
}

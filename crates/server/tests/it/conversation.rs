//! Conversations of apps' users with agents, over real HTTP and gRPC.

mod agents;
mod files;
mod kills;
mod repeats;
mod streams;
mod tokens;

use std::{net::SocketAddr, path::Path, time::SystemTime};

use base64::{Engine as _, engine::general_purpose::URL_SAFE_NO_PAD};
use ring::hmac;
use serde_json::{Value, json};
use trunkline::{Config, Server};
use trunkline_core::{conversation, limits::Limits};

use crate::{
    client::lane,
    sandbox::{Events, Web},
};

const KEY: &str = "app_shop";
const SECRET: &str = "0123456789abcdef0123456789abcdef";
pub(super) const AGENT: &str = "11111111-1111-4111-8111-111111111111";
const OTHER_AGENT: &str = "22222222-2222-4222-8222-222222222222";
const ORIGIN: &str = "https://shop.example.org";

/// Two apps; the first one with two agents.
fn config(dir: &Path, conversation: conversation::Options) -> Config {
    let agents = json!([
        {"id": AGENT, "identity": lane("one"), "name": "Ada"},
        {"id": OTHER_AGENT, "identity": lane("two"), "name": "Bob", "greeting": "Hello!", "payload": "json",
            "attachments": {"max_files_per_message": 2, "max_files_per_convo": 3, "max_file_size_bytes": 100_000,
                "allowed_mime_types": ["image/*", "text/plain"]}},
    ]);
    let apps = json!([
        {"name": "shop", "key": KEY, "secret": SECRET, "former_secret": "f".repeat(32), "origins": [ORIGIN],
            "agents": agents},
        {"name": "other", "key": "app_other", "secret": "o".repeat(32), "origins": ["https://other.example.org"]},
    ]);
    Config {
        data_dir: dir.to_owned(),
        dev: true,
        limits: Limits { messages_per_second: 0, ..Limits::default() },
        apps: serde_json::from_value(apps).unwrap(),
        conversation,
        ..Config::on_free_ports()
    }
}

pub(super) async fn server(dir: &Path) -> Server {
    server_with(dir, conversation::Options::default()).await
}

async fn server_with(dir: &Path, options: conversation::Options) -> Server {
    Server::start(config(dir, options)).await.unwrap()
}

fn now() -> i64 {
    let age = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap();
    i64::try_from(age.as_secs()).unwrap()
}

fn claims(user: &str, agent: &str) -> Value {
    json!({"iss": KEY, "aud": "valet-sdk", "company_api_key": KEY, "agent_uuid": agent, "source_key": user,
        "iat": now(), "exp": now() + 900})
}

/// A token as an app's backend signs it, written down here once more.
fn sign(header: &Value, claims: &Value, secret: &str) -> String {
    let part = |json: &Value| URL_SAFE_NO_PAD.encode(json.to_string());
    let said = format!("{}.{}", part(header), part(claims));
    let key = hmac::Key::new(hmac::HMAC_SHA256, secret.as_bytes());
    format!("{said}.{}", URL_SAFE_NO_PAD.encode(hmac::sign(&key, said.as_bytes())))
}

fn hs256() -> Value {
    json!({"alg": "HS256", "typ": "JWT"})
}

/// A user in front of the first agent.
fn user(http: SocketAddr, name: &str) -> Web {
    Web::new(http).with(&sign(&hs256(), &claims(name, AGENT), SECRET))
}

async fn begin(web: &Web) -> String {
    let (status, begun) = web.post("/api/v2/sessions", "").await;
    assert_eq!(status, 200, "{begun}");
    begun["convo_id"].as_str().unwrap().to_owned()
}

async fn say(web: &Web, convo: &str, text: &str) -> (u16, Value) {
    web.post(&format!("/api/v2/agent_convos/{convo}/stream_message"), json!({"text": text}).to_string()).await
}

async fn show(web: &Web, convo: &str) -> Value {
    let (status, shown) = web.get(&format!("/api/v2/agent_convos/{convo}")).await;
    assert_eq!(status, 200, "{shown}");
    shown
}

async fn watch(web: &Web, convo: &str) -> Events {
    watch_after(web, convo, None).await
}

async fn watch_after(web: &Web, convo: &str, last: Option<&str>) -> Events {
    let mut events = web.open_after(&format!("/api/v2/agent_convos/{convo}/events?deltas=1"), last).await;
    let ready = events.expect("ready").await;
    assert_eq!((&ready.data["type"], ready.data["resumed"] == last.is_some()), (&json!("ready"), true));
    events
}

fn texts(shown: &Value) -> Vec<&str> {
    shown["messages"].as_array().unwrap().iter().map(|message| message["content"].as_str().unwrap()).collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_user_talks_and_what_was_said_is_there() {
    let dir = tempfile::tempdir().unwrap();
    let server = server(dir.path()).await;
    let ann = user(server.addresses().http, "ann");
    let (status, begun) = ann.post("/api/v2/sessions", "").await;
    assert_eq!(status, 200);
    assert_eq!(begun["attachment_policy"]["max_files_per_message"], 5);
    let free = json!({"locked_out": false, "expires_at": null, "permanent": false, "reason": null,
        "user_message": null});
    assert_eq!(begun["lockout"], free);
    let convo = begun["convo_id"].as_str().unwrap();
    let mut tab = watch(&ann, convo).await;
    let (status, said) = say(&ann, convo, "hello").await;
    assert_eq!((status, &said["status"]), (200, &json!("accepted")), "{said}");
    let event = tab.expect("message").await;
    let message = json!({"id": said["message_id"], "content": "hello", "from": "appuser", "turn_number": 1,
        "created_at": event.data["message"]["created_at"], "participant": null, "files": []});
    let expected =
        json!({"type": "message", "action": "create", "agent_id": AGENT, "convo_id": convo, "message": message});
    assert_eq!(event.data, expected);
    let shown = show(&ann, convo).await;
    assert_eq!(shown["messages"], json!([message]));
    assert_eq!((&shown["state"], &shown["closed"], &shown["id"]), (&json!("open"), &json!(false), &json!(convo)));
    assert_eq!(shown["last_message_at"], message["created_at"]);
    // The newest first, and only those of this user.
    let second = begin(&ann).await;
    begin(&user(server.addresses().http, "bob")).await;
    let (_, list) = ann.get("/api/v2/agent_convos").await;
    let ids: Vec<_> =
        list["agent_convos"].as_array().unwrap().iter().map(|head| head["id"].as_str().unwrap()).collect();
    assert_eq!(ids, [second.as_str(), convo]);
    assert_eq!(list["agent_convos"][0]["last_message_at"], Value::Null);
    assert_eq!(list["agent_convos"][1]["last_message_at"], message["created_at"]);
    let (_, list) = ann.get(&format!("/api/v2/agent_convos?limit=1&before={second}")).await;
    assert_eq!(list["agent_convos"][0]["id"], convo);
    // What is somebody else's is not there.
    let bob = user(server.addresses().http, "bob");
    for path in [format!("/api/v2/agent_convos/{convo}"), format!("/api/v2/agent_convos/{convo}/events")] {
        assert_eq!(bob.get(&path).await.0, 404);
    }
    assert_eq!(say(&bob, convo, "hello").await.0, 404);
    assert_eq!(ann.get("/api/v2/agent_convos/nothing").await.0, 404);
    server.stop().await;
    // All of it is there for the next server.
    let server = self::server(dir.path()).await;
    let ann = user(server.addresses().http, "ann");
    assert_eq!(show(&ann, convo).await, shown);
    say(&ann, convo, "again").await;
    assert_eq!(show(&ann, convo).await["messages"][1]["turn_number"], 2);
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_said_twice_under_one_name_is_said_once() {
    let dir = tempfile::tempdir().unwrap();
    let server = server(dir.path()).await;
    let ann = user(server.addresses().http, "ann");
    let convo = begin(&ann).await;
    let path = format!("/api/v2/agent_convos/{convo}/stream_message");
    let named = |text: &str, key: &str| {
        let request = ann.request(reqwest::Method::POST, &path).body(json!({"text": text}).to_string());
        ann.ask(request.header("idempotency-key", key))
    };
    let (first, again) = tokio::join!(named("hello", "k-1"), named("hello", "k-1"));
    assert_eq!((first.0, again.0), (200, 200));
    assert_eq!(first.1, again.1);
    assert_eq!(named("hello", "k-2").await.0, 200);
    assert_eq!(named("something else", "k-1").await.0, 422);
    assert_eq!(named("hello", "k-1").await, first);
    let shown = show(&ann, &convo).await;
    assert_eq!(texts(&shown), ["hello", "hello"]);
    assert_eq!(shown["messages"][1]["turn_number"], 2);
    // What came twice changed nothing.
    assert_eq!(say(&ann, &convo, "third").await.0, 200);
    assert_eq!(show(&ann, &convo).await["messages"][2]["turn_number"], 3);
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_cannot_be_said_is_refused_with_the_reason() {
    let dir = tempfile::tempdir().unwrap();
    let options = conversation::Options { messages_per_minute: 3, sessions_per_minute: 2, ..Default::default() };
    let server = server_with(dir.path(), options).await;
    let ann = user(server.addresses().http, "ann");
    let convo = begin(&ann).await;
    let path = format!("/api/v2/agent_convos/{convo}/stream_message");
    let mut tab = watch(&ann, &convo).await;
    for (body, expected) in [
        (json!({"text": " "}).to_string(), 422),
        (json!({"text": "x".repeat(33 * 1024)}).to_string(), 413),
        ("{".to_owned(), 400),
        (json!({"text": "x", "message_id": uuid::Uuid::now_v7()}).to_string(), 404),
    ] {
        let (status, refused) = ann.post(&path, body).await;
        assert_eq!(status, expected, "{refused}");
        assert!(refused["error"]["message"].is_string());
    }
    assert_eq!(say(&ann, &convo, "hello").await.0, 200);
    // Too much within a minute.
    let response =
        ann.request(reqwest::Method::POST, &path).body(json!({"text": "x"}).to_string()).send().await.unwrap();
    assert_eq!(response.status(), 429);
    let after: u64 = response.headers()["retry-after"].to_str().unwrap().parse().unwrap();
    let limited: Value = response.json().await.unwrap();
    assert!((1..=60).contains(&after) && limited["retry_after_seconds"] == after, "{limited}");
    assert_eq!((&limited["status"], &limited["state"]), (&json!("rate_limited"), &json!("open")));
    assert_eq!(limited["convo_id"], *convo);
    tab.expect("message").await;
    let ended = tab.expect("turn_done").await.data;
    assert_eq!((&ended["reason"], &ended["convo_id"]), (&json!("rate_limited"), &json!(convo)));
    assert!(ended["retry_after_seconds"].is_u64() && ended["at"].is_i64());
    begin(&ann).await;
    let (status, refused) = ann.post("/api/v2/sessions", "").await;
    assert_eq!(status, 429, "{refused}");
    // Others are not held back by it.
    begin(&user(server.addresses().http, "bob")).await;
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn history_comes_whole_and_in_pages() {
    let dir = tempfile::tempdir().unwrap();
    let options = conversation::Options { messages_per_minute: 0, ..Default::default() };
    let server = server_with(dir.path(), options).await;
    let ann = user(server.addresses().http, "ann");
    let convo = begin(&ann).await;
    for n in 0..300 {
        assert_eq!(say(&ann, &convo, &format!("{n} \"quoted\"\n")).await.0, 200);
    }
    let whole = show(&ann, &convo).await;
    let ids: Vec<_> = whole["messages"].as_array().unwrap().iter().map(|m| m["id"].as_str().unwrap()).collect();
    assert_eq!((ids.len(), texts(&whole)[299]), (300, "299 \"quoted\"\n"));
    let page = async |query: &str| {
        let (status, page) = ann.get(&format!("/api/v2/agent_convos/{convo}?{query}")).await;
        assert_eq!(status, 200, "{page}");
        let messages = page["messages"].as_array().unwrap().clone();
        messages.iter().map(|m| m["id"].as_str().unwrap().to_owned()).collect::<Vec<_>>()
    };
    assert_eq!(page("limit=2").await, ids[298..]);
    assert_eq!(page(&format!("after={}", ids[10])).await, ids[11..]);
    assert_eq!(page(&format!("after={}&limit=3", ids[10])).await, ids[11..14]);
    assert_eq!(page(&format!("before={}&limit=3", ids[10])).await, ids[7..10]);
    assert!(page(&format!("after={}", ids[299])).await.is_empty());
    for query in ["limit=0", "limit=x", "after=x", &format!("after={}", uuid::Uuid::now_v7())] {
        assert_eq!(ann.get(&format!("/api/v2/agent_convos/{convo}?{query}")).await.0, 400, "{query}");
    }
    server.stop().await;
}

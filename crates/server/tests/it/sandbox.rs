//! Sandboxes: made, told what to do, watched; over real HTTP.

mod eventsource;
mod keys;
mod library;
mod limits;
mod quotas;
pub(crate) mod rights;
mod streams;

use std::{net::SocketAddr, path::Path, time::Duration};

use eventsource_stream::Eventsource as _;
use futures_util::{Stream, StreamExt as _};
use reqwest::{Method, RequestBuilder, StatusCode};
use serde_json::{Value, json};
use trunkline::{Config, Server};
use trunkline_core::sandbox;

use crate::process::Process;

/// Nothing here takes longer unless it hangs.
const PATIENCE: Duration = Duration::from_secs(20);

async fn server(dir: &Path) -> Server {
    server_with(dir, sandbox::Options::default()).await
}

async fn server_with(dir: &Path, sandbox: sandbox::Options) -> Server {
    Server::start(Config { data_dir: dir.to_owned(), dev: true, sandbox, ..Config::on_free_ports() }).await.unwrap()
}

/// Somebody with an HTTP client.
#[derive(Clone)]
pub(crate) struct Web {
    base: String,
    client: reqwest::Client,
    token: Option<String>,
}

impl Web {
    pub(crate) fn new(http: SocketAddr) -> Self {
        // Somebody else may have done it.
        let _ = rustls::crypto::ring::default_provider().install_default();
        Self { base: format!("http://{http}"), client: reqwest::Client::new(), token: None }
    }

    pub(crate) fn with(&self, token: &str) -> Self {
        Self { token: Some(token.to_owned()), ..self.clone() }
    }

    pub(crate) fn request(&self, method: Method, path: &str) -> RequestBuilder {
        let request = self.client.request(method, format!("{}{path}", self.base));
        match &self.token {
            Some(token) => request.bearer_auth(token),
            None => request,
        }
    }

    pub(crate) async fn ask(&self, request: RequestBuilder) -> (u16, Value) {
        let response = request.timeout(PATIENCE).send().await.unwrap();
        let status = response.status();
        let text = response.text().await.unwrap();
        (status.as_u16(), serde_json::from_str(&text).unwrap_or(Value::String(text)))
    }

    pub(crate) async fn get(&self, path: &str) -> (u16, Value) {
        self.ask(self.request(Method::GET, path)).await
    }

    async fn delete(&self, path: &str) -> (u16, Value) {
        self.ask(self.request(Method::DELETE, path)).await
    }

    pub(crate) async fn post(&self, path: &str, body: impl Into<reqwest::Body>) -> (u16, Value) {
        self.ask(self.request(Method::POST, path).body(body)).await
    }

    async fn make(&self, id: &str) {
        assert_eq!(self.post(&format!("/sessions/{id}"), "").await.0, 201);
    }

    async fn tell(&self, id: &str, events: Value) {
        let told = self.post(&format!("/sessions/{id}/events"), events.to_string()).await;
        assert_eq!(told.0, 202, "{}", told.1);
    }

    async fn prompt(&self, id: &str, text: &str) -> u16 {
        let command = json!({"type": "prompt", "text": text});
        self.post(&format!("/sessions/{id}/commands"), command.to_string()).await.0
    }

    async fn artifacts(&self, id: &str) -> Vec<Value> {
        let (status, artifacts) = self.get(&format!("/sessions/{id}/artifacts")).await;
        assert_eq!(status, 200);
        artifacts.as_array().unwrap().clone()
    }

    async fn status(&self, id: &str) -> String {
        self.get(&format!("/sessions/{id}")).await.1["status"].as_str().unwrap_or("gone").to_owned()
    }

    async fn becomes(&self, id: &str, status: &str) {
        let begun = std::time::Instant::now();
        while self.status(id).await != status {
            assert!(begun.elapsed() < PATIENCE, "{id} does not become {status}");
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }

    pub(crate) async fn open(&self, path: &str) -> Events {
        self.open_after(path, None).await
    }

    pub(crate) async fn open_after(&self, path: &str, last: Option<&str>) -> Events {
        let mut request = self.request(Method::GET, path);
        if let Some(last) = last {
            request = request.header("last-event-id", last);
        }
        Events::of(request.send().await.unwrap())
    }
}

/// A stream of events as a client reads it.
pub(crate) struct Events(std::pin::Pin<Box<dyn Stream<Item = Option<Event>> + Send>>);

#[derive(Clone, Debug)]
pub(crate) struct Event {
    pub(crate) name: String,
    pub(crate) id: String,
    pub(crate) data: Value,
}

impl Events {
    pub(crate) fn of(response: reqwest::Response) -> Self {
        assert_eq!(response.status(), StatusCode::OK);
        assert_eq!(response.headers()["content-type"], "text/event-stream");
        let events = response.bytes_stream().eventsource().map(|event| {
            let event = event.ok()?;
            Some(Event { name: event.event, id: event.id, data: serde_json::from_str(&event.data).unwrap() })
        });
        Self(Box::pin(events))
    }

    /// The next one; nothing if the stream ended, however it did.
    pub(crate) async fn next(&mut self) -> Option<Event> {
        tokio::time::timeout(PATIENCE, self.0.next()).await.expect("an event, or the end").flatten()
    }

    pub(crate) async fn expect(&mut self, name: &str) -> Event {
        let next = self.next().await.unwrap_or_else(|| panic!("{name}, not the end"));
        assert_eq!(next.name, name, "{next:?}");
        next
    }

    async fn command(&mut self) -> (String, String) {
        let command = self.expect("command").await;
        (command.id, command.data["text"].as_str().unwrap_or_default().to_owned())
    }

    pub(crate) async fn ends(&mut self) {
        let next = self.next().await;
        assert!(next.is_none(), "{next:?}");
    }
}

/// What a page shows that applies what it hears.
#[derive(Default)]
struct Screen(std::collections::BTreeMap<u64, Value>);

impl Screen {
    fn hear(&mut self, event: &Event) {
        let data = &event.data;
        match event.name.as_str() {
            "artifact_snapshot" => {
                let artifact = &data["artifact"];
                self.0.insert(artifact["seq"].as_u64().unwrap(), artifact.clone());
            }
            "artifact_created" => {
                let artifact = &data["artifact"];
                let before = self.0.insert(artifact["seq"].as_u64().unwrap(), artifact.clone());
                assert!(before.is_none(), "{artifact} is there already");
            }
            "artifact_updated" => {
                let artifact = self.0.get_mut(&data["seq"].as_u64().unwrap()).expect("something that is there");
                let field = data["field"].as_str().unwrap();
                if let Some(more) = data.get("append") {
                    let text = artifact[field].as_str().unwrap().to_owned() + more.as_str().unwrap();
                    artifact[field] = text.into();
                } else {
                    artifact[field] = data["set"].clone();
                }
                artifact["updatedAt"] = data["updatedAt"].clone();
            }
            other => panic!("unknown event {other}"),
        }
        let seq = if event.name == "artifact_updated" { &data["seq"] } else { &data["artifact"]["seq"] };
        let (number, _) = event.id.split_once('.').unwrap();
        assert_eq!(number, seq.to_string(), "its id begins with its number");
    }

    fn shows(&self) -> Vec<Value> {
        self.0.values().cloned().collect()
    }
}

/// The list of sessions, with `count` of them, each with a summary.
async fn roll(web: &Web, query: &str, count: usize) -> Events {
    let mut all = web.open(&format!("/sessions/stream{query}")).await;
    for _ in 0..count {
        assert_eq!(all.expect("session_snapshot").await.data["session"]["summary"], "fixes");
    }
    assert_eq!(all.expect("session_snapshot_end").await.data, json!({"sessions": count}));
    all
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_session_from_its_making_to_its_end() {
    let dir = tempfile::tempdir().unwrap();
    let server = server(dir.path()).await;
    let web = Web::new(server.addresses().http);
    assert_eq!(web.get("/sessions").await, (200, json!([])));
    let (mut all, mut others) = (roll(&web, "", 0).await, roll(&web, "?project=other", 0).await);

    let (status, made) = web.post("/sessions/s1?project=p", "").await;
    assert_eq!(status, 201);
    let keys: Vec<_> = made.as_object().unwrap().keys().cloned().collect();
    assert_eq!(keys, ["createdAt", "id", "lastHeartbeat", "project", "status", "summary"]);
    assert_eq!(
        (&made["id"], &made["status"], &made["project"], &made["summary"]),
        (&json!("s1"), &json!("bootstrapping"), &json!("p"), &Value::Null)
    );
    assert_eq!(web.post("/sessions/s1", "").await, (200, made.clone()), "it is there");
    assert_eq!(web.post("/sessions/s2", json!({"project": "q"}).to_string()).await.1["project"], "q");
    assert_eq!(web.get("/sessions?project=p").await.1, json!([made]));
    assert_eq!(all.expect("session_created").await.data, json!({"session": made}));
    assert_eq!(all.expect("session_created").await.data["session"]["id"], "s2");

    assert_eq!(web.prompt("s1", "too soon").await, 409);
    let mut commands = web.open("/sessions/s1/commands").await;
    assert_eq!(all.expect("session_updated").await.data, json!({"id": "s1", "fields": {"status": "live"}}));
    assert_eq!(web.prompt("s1", "fix the bug").await, 202);
    let abort = web.post("/sessions/s1/commands", json!({"type": "abort"}).to_string()).await;
    assert_eq!(abort.0, 202);
    assert_eq!(commands.expect("command").await.data, json!({"type": "prompt", "text": "fix the bug"}));
    assert_eq!(commands.expect("command").await.data, json!({"type": "abort"}));

    let before = web.get("/sessions/s1").await.1["lastHeartbeat"].as_i64().unwrap();
    tokio::time::sleep(Duration::from_millis(2)).await;
    web.tell("s1", json!({"type": "heartbeat"})).await;
    assert!(web.get("/sessions/s1").await.1["lastHeartbeat"].as_i64().unwrap() > before);
    web.tell("s1", json!({"type": "turn_end"})).await;
    assert_eq!(web.status("s1").await, "idle");
    web.tell("s1", json!([{"type": "turn_start"}, {"type": "summary", "summary": "fixes"}])).await;
    assert_eq!(all.expect("session_updated").await.data, json!({"id": "s1", "fields": {"status": "idle"}}));
    let expected = json!({"id": "s1", "fields": {"status": "live", "summary": "fixes"}});
    assert_eq!(all.expect("session_updated").await.data, expected, "and no heartbeat in between");

    drop(commands);
    assert_eq!(all.expect("session_updated").await.data, json!({"id": "s1", "fields": {"status": "disconnected"}}));
    assert_eq!(web.prompt("s1", "too late").await, 409);
    web.tell("s1", json!({"type": "turn_end"})).await;
    assert_eq!(web.status("s1").await, "disconnected", "events do not bring it back");

    let mut late = roll(&web, "?project=p", 1).await;
    let mut watched = web.open("/sessions/s1/stream").await;
    watched.expect("artifact_snapshot").await;
    assert_eq!(web.delete("/sessions/s1").await.0, 204);
    while watched.next().await.is_some_and(|event| event.name != "session_removed") {}
    assert!(watched.next().await.is_none());
    assert_eq!(all.expect("session_removed").await.data, json!({"id": "s1"}));
    assert_eq!(late.expect("session_removed").await.data, json!({"id": "s1"}));
    for path in ["/sessions/s1", "/sessions/s1/artifacts", "/sessions/s1/stream", "/sessions/s1/commands"] {
        let (status, problem) = web.get(path).await;
        assert_eq!((status, &problem["error"]["code"]), (404, &json!("not_found")), "{path}");
    }
    assert_eq!(web.delete("/sessions/s1").await.0, 404);
    web.make("s1").await;
    assert_eq!(web.artifacts("s1").await, Vec::<Value>::new(), "a new one of that name begins anew");
    web.post("/sessions/o?project=other", "").await;
    assert_eq!(others.expect("session_created").await.data["session"]["id"], "o", "the only one of its project");
    server.stop().await;
    all.expect("session_created").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn refusals_come_in_their_order_and_say_why() {
    let dir = tempfile::tempdir().unwrap();
    let server = server(dir.path()).await;
    let web = Web::new(server.addresses().http);
    web.make("s").await;
    let large = "x".repeat(2 * 1024 * 1024);
    let unknown = json!({"type": "dance"}).to_string();
    for (path, body, expected, code) in [
        ("/sessions/none/events", "nonsense", 404, "not_found"),
        ("/sessions/none/commands", large.as_str(), 404, "not_found"),
        ("/sessions/s/events", "nonsense", 400, "invalid_argument"),
        ("/sessions/s/events", "[]", 400, "invalid_argument"),
        ("/sessions/s/events", "[{\"type\": \"text\"}, {\"typ\": 1}]", 400, "invalid_argument"),
        ("/sessions/s/events", "7", 400, "invalid_argument"),
        ("/sessions/s/events", large.as_str(), 413, "too_large"),
        ("/sessions/s/commands", large.as_str(), 413, "too_large"),
        ("/sessions/s/commands", "{}", 400, "invalid_argument"),
        ("/sessions/s/commands", "{\"type\": \"prompt\"}", 400, "invalid_argument"),
        ("/sessions/s/commands", unknown.as_str(), 422, "unknown_command"),
        ("/sessions/s/commands", "{\"type\": \"abort\"}", 409, "not_connected"),
        ("/sessions/s2", "{\"project\": 7}", 400, "invalid_argument"),
        ("/sessions/s2", "{", 400, "invalid_argument"),
        ("/sessions/stream", "", 400, "invalid_argument"),
        ("/sessions/a%20b", "", 400, "invalid_identifier"),
        ("/sessions/a:b", "", 400, "invalid_identifier"),
        ("/nowhere", "", 404, "not_found"),
    ] {
        let (status, problem) = web.post(path, body.to_owned()).await;
        assert_eq!((status, problem["error"]["code"].as_str()), (expected, Some(code)), "{path} {problem}");
        assert!(problem["error"]["message"].as_str().is_some_and(|message| !message.is_empty()));
    }
    assert!(web.post("/sessions/s/events", "[{\"type\": \"text\"}, {}]").await.1.to_string().contains("event 1"));
    assert_eq!(web.post(&format!("/sessions/{}", "i".repeat(129)), "").await.0, 400);
    assert_eq!(web.post(&format!("/sessions/{}", "i".repeat(128)), "").await.0, 201);
    assert_eq!(web.post("/sessions/a.b_c~d-E9", "").await.0, 201);
    let artifacts = web.artifacts("s").await;
    assert_eq!(artifacts, Vec::<Value>::new(), "what was refused left nothing");
    assert_eq!(web.ask(web.request(Method::HEAD, "/sessions/s/commands")).await.0, 405);
    assert_eq!(web.status("s").await, "bootstrapping", "asking for the head of a stream opens none");
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_sent_again_under_its_key_takes_effect_once() {
    let dir = tempfile::tempdir().unwrap();
    let server = server(dir.path()).await;
    let web = Web::new(server.addresses().http);
    web.make("s").await;
    let mut commands = web.open("/sessions/s/commands").await;
    let keyed = |path: &str, key: &str, body: Value| {
        web.ask(web.request(Method::POST, path).header("idempotency-key", key.to_owned()).body(body.to_string()))
    };
    for _ in 0..3 {
        let events = json!([{"type": "text_delta", "delta": "a"}, {"type": "text_delta", "delta": "b"}]);
        assert_eq!(keyed("/sessions/s/events", "e1", events).await.0, 202);
        let prompt = json!({"type": "prompt", "text": "once"});
        assert_eq!(keyed("/sessions/s/commands", "c1", prompt).await.0, 202);
    }
    assert_eq!(web.prompt("s", "last").await, 202);
    assert_eq!(web.artifacts("s").await[0]["text"], "ab");
    assert_eq!((commands.command().await.1, commands.command().await.1), ("once".into(), "last".into()));
    let too_long = keyed("/sessions/s/events", &"k".repeat(300), json!({"type": "text"})).await;
    assert_eq!(too_long.0, 400);
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_gives_no_sign_of_life_is_removed() {
    let dir = tempfile::tempdir().unwrap();
    let options = sandbox::Options { bootstrap_ms: 2000, ..sandbox::Options::default() };
    let server = server_with(dir.path(), options).await;
    let web = Web::new(server.addresses().http);
    let mut all = web.open("/sessions/stream").await;
    all.expect("session_snapshot_end").await;
    for id in ["silent", "telling", "there"] {
        web.make(id).await;
        all.expect("session_created").await;
    }
    let there = web.open("/sessions/there/commands").await;
    all.expect("session_updated").await;
    // As long as it tells something, and not for good.
    for _ in 0..30 {
        web.tell("telling", json!({"type": "status", "text": "starting"})).await;
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    assert_eq!(all.expect("session_removed").await.data, json!({"id": "silent"}));
    assert_eq!(web.get("/sessions/silent").await.0, 404);
    assert_eq!((web.status("telling").await, web.status("there").await), ("bootstrapping".into(), "live".into()));
    assert_eq!(all.expect("session_removed").await.data, json!({"id": "telling"}));
    assert_eq!((web.get("/sessions/telling").await.0, web.status("there").await), (404, "live".into()));
    drop(there);
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nothing_that_was_acknowledged_is_lost_with_the_process() {
    let dir = tempfile::tempdir().unwrap();
    let mut process = Process::start_http(dir.path(), ([127, 0, 0, 1], 0).into(), 10_000);
    let mut web = Web::new(process.http);
    web.make("s").await;
    web.make("left").await;
    let mut commands = web.open("/sessions/s/commands").await;
    let _left = web.open("/sessions/left/commands").await;
    let (mut told, mut asked) = (0, 0);
    for round in 0..6 {
        for _ in 0..=round {
            let events = json!([{"type": "user_prompt", "text": told.to_string()}]);
            web.tell("s", events).await;
            told += 1;
        }
        let before = web.artifacts("s").await;
        assert_eq!(before.len(), told);
        assert_eq!(web.prompt("s", &asked.to_string()).await, 202);
        let (last, text) = commands.command().await;
        assert_eq!(text, asked.to_string());
        asked += 1;
        // Taken, and nobody there to deliver it.
        process.kill();
        let http = web.base.strip_prefix("http://").unwrap().parse().unwrap();
        process = Process::start_http(dir.path(), http, 10_000);
        web = Web::new(process.http);
        assert_eq!(web.artifacts("s").await, before, "all of it, to the letter");
        assert_eq!(web.status("s").await, "live", "it has its grace");
        assert_eq!(web.prompt("s", &asked.to_string()).await, 202);
        commands = web.open_after("/sessions/s/commands", Some(&last)).await;
        assert_eq!(commands.command().await.1, asked.to_string(), "what was taken in the grace, once");
        asked += 1;
    }
    process.kill();
    process = Process::start_http(dir.path(), ([127, 0, 0, 1], 0).into(), 300);
    web = Web::new(process.http);
    assert_eq!(web.prompt("left", "in the grace").await, 202);
    web.becomes("left", "disconnected").await;
    assert_eq!(web.prompt("left", "after it").await, 409);
    let mut back = web.open("/sessions/left/commands").await;
    assert_eq!(back.command().await.1, "in the grace", "it was acknowledged");
}

/// Sends until it is answered; the key makes it take effect once.
async fn insist(web: &Web, path: &str, key: &str, body: &Value) {
    let begun = std::time::Instant::now();
    loop {
        let request = web.request(Method::POST, path).header("idempotency-key", key).body(body.to_string());
        match request.timeout(Duration::from_secs(2)).send().await {
            Ok(answer) if answer.status() == StatusCode::ACCEPTED => return,
            Ok(answer) => assert!(answer.status().is_server_error() || answer.status() == 409, "{answer:?}"),
            Err(_) => {}
        }
        assert!(begun.elapsed() < PATIENCE, "{path} is not answered");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn twenty_kills_while_everybody_is_busy() {
    const KILLS: usize = 20;
    let dir = tempfile::tempdir().unwrap();
    let mut process = Process::start_http(dir.path(), ([127, 0, 0, 1], 0).into(), 10_000);
    let (http, web) = (process.http, Web::new(process.http));
    let done = std::sync::Arc::new(std::sync::atomic::AtomicBool::new(false));
    let mut tellers = Vec::new();
    for session in 0..4 {
        let id = format!("s{session}");
        web.make(&id).await;
        let (web, done) = (web.clone(), done.clone());
        tellers.push(tokio::spawn(async move {
            let mut count = 0;
            while !done.load(std::sync::atomic::Ordering::SeqCst) {
                let events = json!([
                    {"type": "user_prompt", "text": count.to_string()},
                    {"type": "text_delta", "delta": "so"},
                    {"type": "text_delta", "delta": " on"},
                ]);
                insist(&web, &format!("/sessions/{id}/events"), &count.to_string(), &events).await;
                count += 1;
            }
            (id, count)
        }));
    }
    for kill in 0..KILLS {
        tokio::time::sleep(Duration::from_millis(20 + 7 * kill as u64)).await;
        process.kill();
        process = Process::start_http(dir.path(), http, 10_000);
    }
    done.store(true, std::sync::atomic::Ordering::SeqCst);
    for teller in tellers {
        let (id, count) = teller.await.unwrap();
        let artifacts = web.artifacts(&id).await;
        let told: Vec<_> =
            artifacts.iter().map(|a| (a["kind"].as_str().unwrap(), a["text"].as_str().unwrap())).collect();
        let texts: Vec<_> = (0..count).map(|n| n.to_string()).collect();
        let expected: Vec<_> = texts.iter().flat_map(|n| [("user_prompt", n.as_str()), ("text", "so on")]).collect();
        assert_eq!(told, expected, "{id}: each once, in order");
        assert!(count > KILLS, "{id} told {count} times");
    }
}

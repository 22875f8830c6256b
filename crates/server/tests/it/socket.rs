//! The socket surface, as browsers and runtimes see it.

use std::{
    net::SocketAddr,
    path::Path,
    sync::{Arc, Mutex},
    time::Duration,
};

use serde_json::{Value, json};
use tokio::{task::JoinHandle, time::timeout};
use trunkline::{Config, Server};
use trunkline_agent_socket::{
    Close, Meta, Type,
    client::{self, Client},
    close::code,
    runtime::{self, Runtime},
    server::{Ask, Emitter, Handlers},
    transport::{
        Frame, Receiver as _, Sender as _, Transport as _,
        websocket::{self, WebSocketReceiver, WebSocketSender},
    },
};

use crate::{process::Process, sandbox::Web};

mod agents;
mod faults;
mod rights;

const PATIENCE: Duration = Duration::from_secs(20);
const FRAME_BYTES_MAX: usize = 4 * 1024 * 1024;

type Stream = tokio_tungstenite::MaybeTlsStream<tokio::net::TcpStream>;

async fn server(dir: &Path) -> Server {
    Server::start(Config { data_dir: dir.to_owned(), dev: true, ..Config::on_free_ports() }).await.unwrap()
}

/// A socket on which nothing is said by itself.
pub(crate) struct Socket {
    sender: WebSocketSender<Stream>,
    receiver: WebSocketReceiver<Stream>,
}

impl Socket {
    pub(crate) async fn open(http: SocketAddr) -> Self {
        let socket = websocket::connect(format!("ws://{http}/agent-socket"), FRAME_BYTES_MAX).await.unwrap();
        let (sender, receiver) = socket.split();
        Self { sender, receiver }
    }

    /// One that said hello, and had its answer: a welcome, and the state.
    async fn hello(http: SocketAddr, client: &str, payload: Value) -> (Self, Value, Value) {
        let mut socket = Self::open(http).await;
        socket.say(json!({"type": "hello", "clientId": client, "payload": payload})).await;
        let welcome = socket.expect("welcome").await;
        let state = socket.expect("state_snapshot").await;
        (socket, welcome, state)
    }

    async fn runtime(http: SocketAddr, generation: &str) -> (Self, Value) {
        let mut socket = Self::open(http).await;
        let payload = json!({"role": "runtime", "runtimeGeneration": generation});
        socket.say(json!({"type": "hello", "payload": payload})).await;
        let welcome = socket.expect("welcome").await;
        (socket, welcome)
    }

    async fn raw(&mut self, frame: String) {
        self.sender.feed(frame).await.unwrap();
        // Whoever was refused already does not hear the rest.
        let _ = self.sender.flush().await;
    }

    pub(crate) async fn say(&mut self, fields: Value) {
        let mut envelope = json!({"protocol": "agent-socket", "version": 1, "ts": 1});
        envelope.as_object_mut().unwrap().extend(fields.as_object().unwrap().clone());
        self.raw(envelope.to_string()).await;
    }

    async fn next(&mut self) -> Frame {
        loop {
            match timeout(PATIENCE, self.receiver.next()).await.unwrap() {
                Some(Ok(Frame::Alive)) => {}
                Some(Ok(frame)) => return frame,
                other => panic!("{other:?}"),
            }
        }
    }

    async fn expect(&mut self, kind: &str) -> Value {
        let Frame::Envelope(frame) = self.next().await else { panic!("no {kind}") };
        let envelope: Value = serde_json::from_slice(&frame).unwrap();
        assert_eq!(envelope["type"], kind, "{envelope}");
        envelope
    }

    /// The next two: an event, and that a request was taken, which comes another way and may come before it.
    async fn expect_both(&mut self, kind: &str, request: &str) {
        let mut both = Vec::new();
        while both.len() < 2 {
            let Frame::Envelope(frame) = self.next().await else { panic!("no {kind}") };
            let envelope: Value = serde_json::from_slice(&frame).unwrap();
            both.push(if envelope["type"] == "ack" { envelope["requestId"].clone() } else { envelope["type"].clone() });
        }
        assert!(both.contains(&json!(kind)) && both.contains(&json!(request)), "{both:?}");
    }

    /// The next of its kind, after anything else.
    async fn answer(&mut self, kind: &str) -> Value {
        loop {
            let Frame::Envelope(frame) = self.next().await else { panic!("no {kind}") };
            let envelope: Value = serde_json::from_slice(&frame).unwrap();
            if envelope["type"] == kind {
                return envelope;
            }
        }
    }

    pub(crate) async fn closed(&mut self) -> Close {
        loop {
            match self.next().await {
                Frame::Closed(Some(close)) => return close,
                Frame::Envelope(_) => {}
                other => panic!("{other:?}"),
            }
        }
    }
}

/// Answers every turn with its text, in three pieces.
#[derive(Clone, Default)]
struct Echo {
    asked: Arc<Mutex<Vec<Type>>>,
}

impl Handlers for Echo {
    async fn asked(&self, ask: Ask, emitter: Emitter) {
        let turn = ask.envelope.turn_id.clone();
        self.asked.lock().unwrap().push(ask.envelope.kind);
        if ask.envelope.kind != Type::TurnStart {
            return;
        }
        let text = ask.payload()["text"].as_str().unwrap_or("nothing").to_owned();
        let emit = async |kind, payload: Value| {
            let meta = Meta { turn_id: turn.clone(), ..Meta::default() };
            emitter.emit(&ask.client_id, kind, &payload, meta).await.unwrap();
        };
        emit(Type::TurnRunning, json!({})).await;
        for piece in ["you ", "said ", &text] {
            emit(Type::TurnTextDelta, json!({"delta": piece})).await;
        }
        emit(Type::TurnDone, json!({})).await;
    }
}

type Run = JoinHandle<Result<(), Close>>;

fn runtime(http: SocketAddr, generation: &str, echo: Echo) -> (Runtime, Run) {
    let options = runtime::Options { pause: Duration::from_millis(10), ..runtime::Options::new(generation) };
    let connect = move || websocket::connect(format!("ws://{http}/agent-socket"), FRAME_BYTES_MAX);
    let (runtime, run) = Runtime::new(options, echo, connect);
    (runtime, tokio::spawn(run))
}

fn client(http: SocketAddr, id: &str) -> (Client, Run) {
    let options = client::Options { pause: Duration::from_millis(10), ..client::Options::new(id) };
    let connect = move || websocket::connect(format!("ws://{http}/agent-socket"), FRAME_BYTES_MAX);
    let (client, run) = Client::new(options, connect);
    (client, tokio::spawn(run))
}

/// What a client's handlers see: types, and the text so far.
fn watch(client: &Client) -> Arc<Mutex<(Vec<Type>, String)>> {
    let seen = Arc::new(Mutex::new((Vec::new(), String::new())));
    let sees = seen.clone();
    client.on_any(move |envelope| {
        if envelope.seq.is_none() {
            return;
        }
        let mut seen = sees.lock().unwrap();
        seen.0.push(envelope.kind);
        seen.1.push_str(envelope.value()["delta"].as_str().unwrap_or_default());
    });
    seen
}

async fn until(what: impl Fn() -> bool) {
    let waits = async {
        while !what() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    timeout(PATIENCE, waits).await.unwrap();
}

fn count(seen: &Mutex<(Vec<Type>, String)>, kind: Type) -> usize {
    seen.lock().unwrap().0.iter().filter(|seen| **seen == kind).count()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_turn_runs_in_the_runtime_and_every_tab_sees_it() {
    let dir = tempfile::tempdir().unwrap();
    let server = server(dir.path()).await;
    let http = server.addresses().http;
    let echo = Echo::default();
    let (runtime, run) = runtime(http, "g1", echo.clone());
    timeout(PATIENCE, runtime.is_connected().wait_for(|is_there| *is_there)).await.unwrap().unwrap();
    let (mut tab, welcome, state) = Socket::hello(http, "web-a", json!({})).await;
    assert_eq!(state["payload"]["runtime"], "attached");
    assert!(welcome["socketId"].is_string() && welcome["payload"]["frameBytesMax"].is_u64());
    let (client, _run) = client(http, "web-a");
    let seen = watch(&client);
    for _ in 0..3 {
        client.start_turn(&json!({"text": "hi"}), "t-1").await.unwrap();
    }
    until(|| count(&seen, Type::TurnDone) == 1).await;
    assert_eq!(seen.lock().unwrap().1, "you said hi");
    let mut last = welcome["payload"]["latestSeq"].as_u64().unwrap();
    let queued = tab.expect("turn_queued").await;
    assert_eq!((&queued["prev"], &queued["turnId"]), (&json!(last), &json!("t-1")));
    last = queued["seq"].as_u64().unwrap();
    for kind in ["turn_running", "turn_text_delta", "turn_text_delta", "turn_text_delta", "turn_done"] {
        let event = tab.expect(kind).await;
        assert_eq!(
            (&event["prev"], &event["clientId"], &event["turnId"]),
            (&json!(last), &json!("web-a"), &json!("t-1"))
        );
        assert_eq!(event["runtimeGeneration"], "g1");
        last = event["seq"].as_u64().unwrap();
    }
    client.abort_turn("t-1").await.unwrap();
    client.resolve_approval("o", &json!({"approved": true})).await.unwrap();
    until(|| echo.asked.lock().unwrap().len() == 3).await;
    assert_eq!(
        *echo.asked.lock().unwrap(),
        [Type::TurnStart, Type::TurnAborted, Type::ApprovalResolve],
        "a turn runs once"
    );
    // Another client's stream is another one.
    let (mut other, _, _) = Socket::hello(http, "web-b", json!({})).await;
    other.say(json!({"type": "replay_request", "payload": {"since": 0}})).await;
    assert_eq!(other.expect("replay_events").await["payload"]["events"], json!([]));
    drop(runtime);
    timeout(PATIENCE, run).await.unwrap().unwrap().unwrap();
    server.stop().await;
    assert_eq!(tab.closed().await.code, code::AWAY);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_asked_without_a_runtime_waits_for_one() {
    let dir = tempfile::tempdir().unwrap();
    let server = server(dir.path()).await;
    let http = server.addresses().http;
    let (mut tab, _, state) = Socket::hello(http, "c", json!({})).await;
    assert_eq!(state["payload"]["runtime"], "away");
    for turn in ["t-1", "t-2", "t-1"] {
        tab.say(json!({"type": "turn_start", "turnId": turn, "payload": {"text": turn}})).await;
    }
    let mut seen = Vec::new();
    while seen.len() < 3 {
        let Frame::Envelope(frame) = tab.next().await else { panic!("closed") };
        let event: Value = serde_json::from_slice(&frame).unwrap();
        seen.push((
            event["type"].as_str().unwrap().to_owned(),
            event["turnId"].clone(),
            event["payload"]["text"].clone(),
        ));
    }
    seen.sort_by_key(|(kind, turn, _)| (kind.clone(), turn.to_string()));
    assert_eq!(seen[0].0, "state_snapshot", "to whom asked twice");
    assert_eq!(seen[1], ("turn_queued".to_owned(), json!("t-1"), json!("t-1")));
    assert_eq!(seen[2], ("turn_queued".to_owned(), json!("t-2"), json!("t-2")));
    // One that was not begun is not begun any more.
    tab.say(json!({"type": "turn_aborted", "turnId": "t-1"})).await;
    assert_eq!(tab.expect("turn_aborted").await["turnId"], "t-1");
    tab.say(json!({"type": "state_request"})).await;
    tab.expect("state_snapshot").await;
    let (mut runtime, welcome) = Socket::runtime(http, "g1").await;
    assert_eq!(welcome["payload"]["latestSeq"], 0);
    let asked = runtime.expect("turn_start").await;
    assert_eq!((&asked["turnId"], &asked["clientId"]), (&json!("t-2"), &json!("c")));
    assert!(asked["socketId"].is_string() && asked["ask"].is_u64());
    // What it tells is kept when it is acknowledged; told again, it is kept once.
    for _ in 0..2 {
        runtime.say(json!({"type": "turn_done", "clientId": "c", "turnId": "t-2", "seq": 1})).await;
    }
    runtime.say(json!({"type": "turn_start", "clientId": "c", "turnId": "t-3", "seq": 2})).await;
    let mut acked = 0;
    while acked < 2 {
        acked = runtime.expect("ack").await["ack"].as_u64().unwrap();
    }
    tab.expect("turn_done").await;
    tab.expect("turn_start").await;
    drop(runtime);
    let (mut runtime, welcome) = Socket::runtime(http, "g1").await;
    assert_eq!(welcome["payload"]["latestSeq"], 2, "it need not tell that again");
    runtime.say(json!({"type": "turn_done", "clientId": "c", "turnId": "t-3", "seq": 3})).await;
    runtime.expect("ack").await;
    tab.expect("turn_done").await;
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn another_generation_says_what_was_lost() {
    let dir = tempfile::tempdir().unwrap();
    let server = server(dir.path()).await;
    let http = server.addresses().http;
    let (mut first, _) = Socket::runtime(http, "g1").await;
    for (number, client) in [(1, "here"), (3, "away")] {
        first.say(json!({"type": "turn_start", "clientId": client, "turnId": "t", "seq": number})).await;
        let tool = json!({"type": "tool_start", "clientId": client, "operationId": "o", "payload": {"name": "shell"}});
        first.say(tool).await;
    }
    first.say(json!({"type": "turn_phase", "clientId": "away", "turnId": "t", "seq": 5, "payload": "late"})).await;
    while first.expect("ack").await["ack"] != 5 {}
    let (mut here, _, state) = Socket::hello(http, "here", json!({})).await;
    assert_eq!(
        (&state["payload"]["activeTurn"]["id"], &state["payload"]["tool"]["name"]),
        (&json!("t"), &json!("shell"))
    );
    drop(first);
    let (_second, _) = Socket::runtime(http, "g2").await;
    for kind in ["runtime_generation_changed", "tool_lost", "turn_lost"] {
        assert_eq!(here.expect(kind).await["runtimeGeneration"], "g2");
    }
    // Whoever comes later finds the same.
    let (mut away, welcome, state) =
        Socket::hello(http, "away", json!({"versions": [1], "runtimeGeneration": "g1"})).await;
    assert_eq!(state["payload"]["tool"]["status"], "lost");
    assert_eq!(welcome["runtimeGeneration"], "g2");
    away.say(json!({"type": "replay_request", "payload": {"since": 0}})).await;
    let replayed = away.expect("replay_events").await;
    let types: Vec<_> =
        replayed["payload"]["events"].as_array().unwrap().iter().map(|event| event["type"].clone()).collect();
    let expected = ["turn_start", "tool_start", "turn_phase", "runtime_generation_changed", "tool_lost", "turn_lost"]
        .map(Value::from);
    assert_eq!(types, expected);
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_not_allowed_closes_the_socket_and_no_other() {
    let dir = tempfile::tempdir().unwrap();
    let server = server(dir.path()).await;
    let http = server.addresses().http;
    let (mut witness, _, _) = Socket::hello(http, "other", json!({})).await;
    let hello = json!({"protocol": "agent-socket", "version": 1, "type": "hello", "clientId": "c", "ts": 1});
    let with = |field: &str, value: Value| {
        let mut envelope = hello.clone();
        envelope[field] = value;
        envelope.to_string()
    };
    let large = format!("{{\"a\":\"{}\"}}", "x".repeat(2 * 1024 * 1024));
    for (frame, code, named) in [
        ("not json".to_owned(), code::UNREADABLE, "JSON"),
        (with("type", json!("turn_started")), code::UNREADABLE, "type"),
        (with("turnId", json!(7)), code::UNREADABLE, "turnId"),
        (with("clientId", json!("a b")), code::UNREADABLE, "clientId"),
        (with("clientId", Value::Null), code::UNREADABLE, "clientId"),
        (with("payload", json!({"role": "runtime"})), code::UNREADABLE, "runtimeGeneration"),
        (with("payload", json!({"role": "king"})), code::UNREADABLE, "payload"),
        (with("protocol", json!("other")), code::PROTOCOL, "protocol"),
        (with("version", json!(2)), code::PROTOCOL, "version"),
        (with("type", json!("turn_start")), code::POLICY, "hello"),
        (large, code::TOO_LARGE, ""),
    ] {
        let mut socket = Socket::open(http).await;
        socket.raw(frame).await;
        let close = socket.closed().await;
        assert_eq!(close.code, code, "{close}");
        assert!(close.reason.contains(named), "{close}");
    }
    witness.say(json!({"type": "state_request"})).await;
    witness.expect("state_snapshot").await;
    // No WebSocket, no socket.
    assert_eq!(Web::new(http).get("/agent-socket").await.0, 400);
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn runtimes_and_clients_of_the_process_itself_need_no_network() {
    let dir = tempfile::tempdir().unwrap();
    let server = server(dir.path()).await;
    let (runtime, run) = Runtime::new(runtime::Options::new("g1"), Echo::default(), server.inside());
    let run = tokio::spawn(run);
    let (client, _run) = client(server.addresses().http, "c");
    let seen = watch(&client);
    client.start_turn(&json!({"text": "hi"}), "t").await.unwrap();
    until(|| count(&seen, Type::TurnDone) == 1).await;
    assert_eq!(seen.lock().unwrap().1, "you said hi");
    drop(runtime);
    timeout(PATIENCE, run).await.unwrap().unwrap().unwrap();
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn twenty_kills_while_everybody_is_busy() {
    const KILLS: usize = 20;
    let dir = tempfile::tempdir().unwrap();
    let mut process = Process::start_http(dir.path(), ([127, 0, 0, 1], 0).into(), 10_000);
    let http = process.http;
    let echo = Echo::default();
    let (runtime, _run) = runtime(http, "g1", echo.clone());
    let clients: Vec<_> = (0..4).map(|number| client(http, &format!("c{number}"))).collect();
    let seen: Vec<_> = clients.iter().map(|(client, _)| watch(client)).collect();
    let mut turns = 0;
    for kill in 0..KILLS {
        for _ in 0..3 {
            for (client, _) in &clients {
                client.start_turn(&json!({"text": format!("{turns}. ")}), &format!("t-{turns}")).await.unwrap();
            }
            turns += 1;
        }
        tokio::time::sleep(Duration::from_millis(20 + 7 * kill as u64)).await;
        process.kill();
        process = Process::start_http(dir.path(), http, 10_000);
    }
    let all = || seen.iter().all(|seen| count(seen, Type::TurnDone) == turns);
    let waits = async {
        while !all() {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    let waited = timeout(Duration::from_secs(60), waits).await;
    let counts: Vec<_> = seen.iter().map(|seen| count(seen, Type::TurnDone)).collect();
    assert!(waited.is_ok(), "{counts:?} of {turns}");
    for seen in &seen {
        assert_eq!(count(seen, Type::TurnRunning), turns, "each turn ran once");
        assert_eq!(count(seen, Type::TurnTextDelta), 3 * turns, "every piece once");
    }
    assert_eq!(echo.asked.lock().unwrap().len(), 4 * turns);
    drop(runtime);
}

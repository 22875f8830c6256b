//! A runtime that does what it is told, and sockets that say exactly what a test says.

use std::{
    sync::{Arc, Mutex},
    time::Duration,
};

use serde_json::{Value, json};
use tokio::{task::JoinHandle, time::timeout};
use trunkline_agent_socket::{
    Close, Envelope, Meta, Type,
    link::Terms,
    parse,
    server::{Ask, Emitter, Handlers, Options, Server},
    store::{EventStore, MemoryStore},
    transport::{Frame, MemoryReceiver, MemorySender, MemoryTransport, Receiver as _, Sender as _, Transport as _},
};

pub(crate) const PATIENCE: Duration = Duration::from_secs(20);

/// What it was asked: the type, the turn, the payload.
type Asked = (Type, Option<String>, Value);

/// Answers every turn with three pieces of text, and notes what it was asked.
#[derive(Clone, Default)]
pub(crate) struct Echo {
    pub(crate) asked: Arc<Mutex<Vec<Asked>>>,
}

impl Echo {
    fn note(&self, ask: &Ask) {
        let noted = (ask.envelope.kind, ask.envelope.turn_id.clone(), ask.payload());
        self.asked.lock().unwrap().push(noted);
    }
}

impl Handlers for Echo {
    async fn start_turn(&self, ask: Ask, emitter: Emitter) {
        self.note(&ask);
        let turn = ask.turn_id().unwrap_or("none");
        let emit = async |kind, payload: Value| {
            emitter.emit(&ask.client_id, kind, &payload, Meta::turn(turn)).await.unwrap();
        };
        emit(Type::TurnQueued, json!({})).await;
        for piece in ["you ", "said ", ask.payload()["text"].as_str().unwrap_or("nothing")] {
            emit(Type::TurnTextDelta, json!({"delta": piece})).await;
        }
        emit(Type::TurnDone, json!({})).await;
    }

    async fn abort_turn(&self, ask: Ask, _: Emitter) {
        self.note(&ask);
    }

    async fn resolve_approval(&self, ask: Ask, _: Emitter) {
        self.note(&ask);
    }

    async fn attachment(&self, ask: Ask, _: Emitter) {
        self.note(&ask);
    }
}

pub(crate) fn options(generation: &str) -> Options {
    Options::new(generation)
}

pub(crate) fn server() -> Server<Echo> {
    Server::new(MemoryStore::default(), Echo::default(), options("g1"))
}

pub(crate) fn with_store(store: impl EventStore, generation: &str) -> Server<Echo> {
    Server::new(store, Echo::default(), options(generation))
}

pub(crate) fn with_terms(terms: Terms) -> Server<Echo> {
    Server::new(MemoryStore::default(), Echo::default(), Options { terms, ..options("g1") })
}

/// A socket on which nothing is said by itself.
pub(crate) struct Socket {
    sender: MemorySender,
    receiver: MemoryReceiver,
    pub(crate) served: JoinHandle<Result<(), Close>>,
}

impl Socket {
    pub(crate) fn open(server: &Server<Echo>) -> Self {
        let (here, there) = MemoryTransport::pair();
        let (sender, receiver) = here.split();
        let server = server.clone();
        Self { sender, receiver, served: tokio::spawn(async move { server.serve(there).await }) }
    }

    /// One that said hello, and had its answer: a welcome, and the state.
    pub(crate) async fn hello(server: &Server<Echo>, client: &str, payload: Value) -> (Self, Value, Value) {
        let mut socket = Self::open(server);
        socket.say(json!({"type": "hello", "clientId": client, "payload": payload})).await;
        let welcome = socket.expect("welcome").await;
        let state = socket.expect("state_snapshot").await;
        (socket, welcome, state)
    }

    pub(crate) async fn raw(&mut self, frame: &str) {
        self.sender.feed(frame.to_owned()).await.unwrap();
    }

    pub(crate) async fn say(&mut self, fields: Value) {
        let mut envelope = json!({"protocol": "agent-socket", "version": 1, "ts": 1});
        envelope.as_object_mut().unwrap().extend(fields.as_object().unwrap().clone());
        self.raw(&envelope.to_string()).await;
    }

    pub(crate) async fn next(&mut self) -> Frame {
        timeout(PATIENCE, self.receiver.next()).await.unwrap().unwrap().unwrap()
    }

    pub(crate) async fn envelope(&mut self) -> Value {
        match self.next().await {
            Frame::Envelope(frame) => {
                parse(&frame).unwrap();
                serde_json::from_slice(&frame).unwrap()
            }
            other => panic!("{other:?}"),
        }
    }

    pub(crate) async fn expect(&mut self, kind: &str) -> Value {
        let envelope = self.envelope().await;
        assert_eq!(envelope["type"], kind, "{envelope}");
        envelope
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

pub(crate) async fn emit(server: &Server<Echo>, client: &str, kind: Type, payload: Value, turn: &str) -> Envelope {
    server.emitter().emit(client, kind, &payload, Meta::turn(turn)).await.unwrap()
}

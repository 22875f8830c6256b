//! A server inside of a program, in a few words, and with a store of the program's own.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex},
    time::Duration,
};

use serde_json::{Value, json};
use trunkline::{Sandbox, Server, SessionStore, StoreFuture, Told};

use super::Web;

/// Keeps everything in a map, unless it is told to refuse.
#[derive(Clone, Default)]
struct Map(Arc<Mutex<Kept>>);

#[derive(Default)]
struct Kept {
    sessions: BTreeMap<String, (Sandbox, Vec<Told>)>,
    refuses: bool,
}

impl Map {
    fn with<T: Send + 'static>(&self, run: impl FnOnce(&mut Kept) -> T) -> StoreFuture<'static, T> {
        let mut kept = self.0.lock().unwrap();
        let done = if kept.refuses { Err("it is full".into()) } else { Ok(run(&mut kept)) };
        Box::pin(std::future::ready(done))
    }
}

impl SessionStore for Map {
    fn load(&self) -> StoreFuture<'_, Vec<(Sandbox, Vec<Told>)>> {
        self.with(|kept| kept.sessions.values().cloned().collect())
    }

    fn save<'a>(&'a self, session: &'a Sandbox) -> StoreFuture<'a, ()> {
        self.with(|kept| {
            let entry = kept.sessions.entry(session.id.clone()).or_insert_with(|| (session.clone(), Vec::new()));
            entry.0 = session.clone();
        })
    }

    fn append<'a>(&'a self, id: &'a str, told: &'a Told) -> StoreFuture<'a, ()> {
        self.with(|kept| kept.sessions.get_mut(id).unwrap().1.push(told.clone()))
    }

    fn remove<'a>(&'a self, id: &'a str) -> StoreFuture<'a, ()> {
        self.with(|kept| drop(kept.sessions.remove(id)))
    }
}

fn web(server: &Server) -> Web {
    Web::new(([127, 0, 0, 1], server.port()).into())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_server_in_memory_leaves_nothing() {
    let builder = Server::builder().bootstrap_timeout(Duration::from_millis(200));
    let server = builder.clone().start().await.unwrap();
    let made = server.create_session("s", Some("p")).await.unwrap();
    assert_eq!(server.session("s").await.unwrap(), Some(made.clone()));
    assert_eq!(server.sessions(Some("p")).await.unwrap(), [made]);
    assert_eq!(server.sessions(Some("q")).await.unwrap(), []);
    assert!(server.create_session("no id", None).await.is_err());
    web(&server).becomes("s", "gone").await;
    server.create_session("t", None).await.unwrap();
    server.close().await;
    let server = builder.start().await.unwrap();
    assert_eq!(server.sessions(None).await.unwrap(), []);
    server.close().await;

    let dir = tempfile::tempdir().unwrap();
    let kept = Server::builder().data_dir(dir.path());
    let server = kept.clone().start().await.unwrap();
    server.create_session("t", None).await.unwrap();
    server.close().await;
    let server = kept.start().await.unwrap();
    assert_eq!(server.sessions(None).await.unwrap().len(), 1);
    server.close().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn sessions_live_in_a_store_of_ones_own() {
    let store = Map::default();
    let server = Server::builder().store(store.clone()).start().await.unwrap();
    let web_one = web(&server);
    web_one.make("s").await;
    web_one.make("gone").await;
    let commands = web_one.open("/sessions/s/commands").await;
    for n in 0..20 {
        let body =
            json!([{"type": "user_prompt", "text": n.to_string()}, {"type": "text_delta", "delta": "a"}]).to_string();
        for _ in 0..2 {
            let request = web_one.request(reqwest::Method::POST, "/sessions/s/events").header("idempotency-key", n);
            assert_eq!(web_one.ask(request.body(body.clone())).await.0, 202);
        }
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    web_one.tell("s", json!([{"type": "turn_end"}, {"type": "summary", "summary": "counts"}])).await;
    assert_eq!(web_one.delete("/sessions/gone").await.0, 204);
    let before = web_one.artifacts("s").await;
    assert_eq!(before.len(), 40, "each once");
    assert_eq!(store.0.lock().unwrap().sessions.keys().cloned().collect::<Vec<_>>(), ["s"]);

    store.0.lock().unwrap().refuses = true;
    let refused = web_one.post("/sessions/s/events", json!({"type": "text"}).to_string()).await;
    assert_eq!((refused.0, refused.1["error"]["code"].as_str()), (503, Some("session_store")), "{}", refused.1);
    assert!(refused.1.to_string().contains("it is full"));
    assert_eq!(web_one.artifacts("s").await, before, "what was not kept is not shown");
    store.0.lock().unwrap().refuses = false;
    server.close().await;
    drop(commands);

    let server = Server::builder().store(store.clone()).start().await.unwrap();
    let web_two = web(&server);
    assert_eq!(web_two.artifacts("s").await, before, "to the letter");
    let session = web_two.get("/sessions/s").await.1;
    assert_eq!((&session["status"], &session["summary"]), (&json!("idle"), &json!("counts")), "it has its grace");
    web_two.tell("s", json!({"type": "text_delta", "delta": "more"})).await;
    assert_eq!(web_two.artifacts("s").await.len(), 41);
    assert_eq!(web_two.get("/sessions/gone").await.0, 404);
    let _: Value = web_two.delete("/sessions/s").await.1;
    assert!(store.0.lock().unwrap().sessions.is_empty());
    server.close().await;
}

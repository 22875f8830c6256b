//! A server inside of a program, in a few words, and with a store of the program's own.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex},
    task::Poll,
    time::Duration,
};

use serde_json::{Value, json};
use trunkline::{Sandbox, Server, SessionStore, StoreFuture, Told};
use trunkline_store::ledger;

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

/// As [`Map`], but with a mistake in it.
struct PanicsOnRemove(Map);

impl SessionStore for PanicsOnRemove {
    fn load(&self) -> StoreFuture<'_, Vec<(Sandbox, Vec<Told>)>> {
        self.0.load()
    }

    fn save<'a>(&'a self, session: &'a Sandbox) -> StoreFuture<'a, ()> {
        self.0.save(session)
    }

    fn append<'a>(&'a self, id: &'a str, told: &'a Told) -> StoreFuture<'a, ()> {
        self.0.append(id, told)
    }

    fn remove<'a>(&'a self, id: &'a str) -> StoreFuture<'a, ()> {
        panic!("on purpose: {id}")
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

/// The job that removes sandboxes which never came is gone for good then, and a server that goes on as if nothing had happened
/// would keep them for ever.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_background_job_that_panics_is_a_fault_of_the_server() {
    let store = PanicsOnRemove(Map::default());
    let server = Server::builder().bootstrap_timeout(Duration::from_millis(50)).store(store).start().await.unwrap();
    let ops = Web::new(server.addresses().ops);
    assert_eq!(ops.get("/readyz").await.0, 200);
    server.create_session("s", None).await.unwrap();
    let fault = tokio::time::timeout(super::PATIENCE, server.failed()).await.expect("the program is told");
    assert_eq!(&*fault.part, "sandbox timer");
    let (status, text) = ops.get("/readyz").await;
    assert!(status == 503 && text.to_string().contains("sandbox timer"), "{status}: {text}");
    server.close().await;
}

/// As with an HTTP client that goes before it is answered. Each session is alone, so that no other one's timer helps.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_session_whose_maker_goes_is_removed_in_time() {
    let server = Server::builder().bootstrap_timeout(Duration::from_millis(20)).start().await.unwrap();
    let mut made = 0;
    for polls in 1..16 {
        let id = format!("s{polls}");
        {
            let mut left = polls;
            let mut making = std::pin::pin!(server.create_session(&id, None));
            std::future::poll_fn(|cx| {
                left -= 1;
                if making.as_mut().poll(cx).is_ready() || left == 0 { Poll::Ready(()) } else { Poll::Pending }
            })
            .await;
        }
        // Behind what was begun.
        let behind: Result<(), ledger::Error> = server.store().ledger.write(|_| Box::pin(async { Ok(()) })).await;
        behind.unwrap();
        let gone = async {
            while server.session(&id).await.unwrap().is_some() {
                made |= 1 << polls;
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        };
        tokio::time::timeout(super::PATIENCE, gone).await.unwrap_or_else(|_| panic!("{id} stays after {polls} polls"));
    }
    assert_ne!(made, 0, "none was made");
    server.close().await;
}

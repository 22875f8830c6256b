//! What is sent again under its key changes nothing; what is something else is refused.

use std::sync::{
    Arc, Mutex,
    atomic::{AtomicUsize, Ordering::SeqCst},
};

use reqwest::Method;
use serde_json::{Value, json};
use trunkline::{Sandbox, Server, SessionStore, StoreFuture, Told};

use super::{Web, rights::World, server};

async fn keyed(web: &Web, path: &str, key: &str, body: Value) -> (u16, Value) {
    web.ask(web.request(Method::POST, path).header("idempotency-key", key.to_owned()).body(body.to_string())).await
}

fn code(answer: &(u16, Value)) -> (u16, &str) {
    (answer.0, answer.1["error"]["code"].as_str().unwrap_or_default())
}

const REUSED: (u16, &str) = (422, "idempotency_key_reused");

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_same_again_changes_nothing_and_something_else_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let server = server(dir.path()).await;
    let web = Web::new(server.addresses().http);
    web.make("s").await;
    let mut commands = web.open("/sessions/s/commands").await;
    web.becomes("s", "live").await;
    let events = "/sessions/s/events";
    let (ends, begins) = (json!([{"type": "turn_end"}]), json!([{"type": "turn_start"}]));
    assert_eq!(keyed(&web, events, "a", ends.clone()).await.0, 202);
    assert_eq!(web.status("s").await, "idle");
    assert_eq!(keyed(&web, events, "b", begins.clone()).await.0, 202);
    assert_eq!(keyed(&web, events, "a", ends).await.0, 202);
    assert_eq!(web.status("s").await, "live", "that turn ended before this one began");
    assert_eq!(code(&keyed(&web, events, "a", begins).await), REUSED);
    // The same is what means the same to the log: pieces of one text.
    let piece = |delta: &str| json!({"type": "text_delta", "delta": delta});
    assert_eq!(keyed(&web, events, "c", json!([piece("on"), piece("ce")])).await.0, 202);
    assert_eq!(keyed(&web, events, "c", json!([piece("onc"), piece("e")])).await.0, 202);
    assert_eq!(code(&keyed(&web, events, "c", json!([piece("twice")])).await), REUSED);
    let texts: Vec<_> =
        web.artifacts("s").await.iter().filter_map(|shown| shown["text"].as_str().map(String::from)).collect();
    assert_eq!(texts, ["once"]);

    let path = "/sessions/s/commands";
    let prompt = |text: &str| json!({"type": "prompt", "text": text});
    assert_eq!(keyed(&web, path, "a", prompt("one")).await.0, 202, "events and commands have their own keys");
    assert_eq!(code(&keyed(&web, path, "a", prompt("other")).await), REUSED);
    assert_eq!(commands.command().await.1, "one");
    drop(commands);
    web.becomes("s", "disconnected").await;
    assert_eq!(keyed(&web, path, "a", prompt("one")).await.0, 202, "it was accepted, whatever is so now");
    assert_eq!(keyed(&web, path, "new", prompt("one")).await.0, 409);
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn keys_are_those_of_whoever_gives_them() {
    let mut world = World::new().await;
    let admin = world.web.clone();
    let ann = world.holder("user", "ann", "sandbox:write", "*").await;
    let bob = world.holder("user", "bob", "sandbox:write", "*").await;
    admin.make("s").await;
    let mut commands = admin.open("/sessions/s/commands").await;
    admin.becomes("s", "live").await;
    let prompt = |text: &str| json!({"type": "prompt", "text": text});
    for (web, text) in [(&ann, "of ann"), (&bob, "of bob"), (&ann, "of ann")] {
        assert_eq!(keyed(web, "/sessions/s/commands", "1", prompt(text)).await.0, 202);
    }
    assert_eq!(keyed(&ann, "/sessions/s/commands", "2", prompt("last")).await.0, 202);
    let told = [commands.command().await.1, commands.command().await.1, commands.command().await.1];
    assert_eq!(told, ["of ann", "of bob", "last"], "nobody uses up another one's");
    world.server.stop().await;
}

/// Keeps nothing, but counts; refuses to save when it is told to.
#[derive(Clone, Default)]
struct Counting {
    appended: Arc<Mutex<Vec<Told>>>,
    refusals: Arc<AtomicUsize>,
}

impl SessionStore for Counting {
    fn load(&self) -> StoreFuture<'_, Vec<(Sandbox, Vec<Told>)>> {
        Box::pin(std::future::ready(Ok(Vec::new())))
    }

    fn save<'a>(&'a self, _session: &'a Sandbox) -> StoreFuture<'a, ()> {
        Box::pin(std::future::ready(Ok(())))
    }

    fn append<'a>(&'a self, _id: &'a str, told: &'a Told) -> StoreFuture<'a, ()> {
        let refuses = self.refusals.fetch_update(SeqCst, SeqCst, |left| left.checked_sub(1)).is_ok();
        if refuses {
            return Box::pin(std::future::ready(Err("not now".into())));
        }
        self.appended.lock().unwrap().push(told.clone());
        Box::pin(std::future::ready(Ok(())))
    }

    fn remove<'a>(&'a self, _id: &'a str) -> StoreFuture<'a, ()> {
        Box::pin(std::future::ready(Ok(())))
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_store_of_ones_own_has_each_once() {
    let store = Counting::default();
    let server = Server::builder().store(store.clone()).start().await.unwrap();
    let web = Web::new(([127, 0, 0, 1], server.port()).into());
    web.make("s").await;
    let text = |text: &str| json!({"type": "text", "text": text});
    store.refusals.store(1, SeqCst);
    assert_eq!(keyed(&web, "/sessions/s/events", "k", text("a")).await.0, 503);
    for _ in 0..2 {
        assert_eq!(keyed(&web, "/sessions/s/events", "k", text("a")).await.0, 202);
    }
    assert_eq!(code(&keyed(&web, "/sessions/s/events", "k", text("b")).await), REUSED);
    assert_eq!(store.appended.lock().unwrap().len(), 1);
    assert_eq!(web.artifacts("s").await.len(), 1);
    server.close().await;
}

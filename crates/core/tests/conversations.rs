//! Apps, conversations, what is attached and who is locked out: the same on every ledger.

#![allow(clippy::disallowed_methods, clippy::panic, clippy::unwrap_used, reason = "test code")]

use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering::SeqCst},
    },
    time::Duration,
};

use futures_util::TryStreamExt as _;
use tokio::time::timeout;
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use trunkline_core::{
    Kind,
    app::{Agent, Apps, AttachmentPolicy, Change, Payload, Visitor},
    caller::{Caller, Credential},
    conversation::{Conversations, Options, Page, Part, Parts, files::Asker},
    gate::Gate,
    identity::Identity,
    registry::Registry,
    session::{self, Sessions},
    task::{self, Tasks},
};
use trunkline_store::{
    Store,
    ledger::{self, Ledger},
    log::Clock,
};
use uuid::Uuid;

const CHAT: i32 = 1;
const CONTROL: i32 = 2;
const OPAQUE: i32 = 6;

fn admin() -> Caller {
    Caller::new(Identity::orchestrator("root", "x").unwrap(), "session".into(), Credential::none(true))
}

fn agent() -> Agent {
    Agent {
        id: Uuid::from_u128(7),
        identity: "ag::ws::bot::main".into(),
        name: "Ada".into(),
        photo_url: None,
        greeting: Some("Hello!".into()),
        payload: Payload::Text,
        attachments: AttachmentPolicy { max_files_per_convo: 2, ..AttachmentPolicy::default() },
    }
}

async fn open(store: Store) -> Conversations {
    open_with(store, Clock::system(), Options { draft_hours: 0, ..Options::default() }).await
}

async fn open_with(store: Store, clock: Clock, options: Options) -> Conversations {
    let gate = Gate::open(store).await.unwrap();
    let tracker = TaskTracker::new();
    let registry = Registry::open(gate.clone()).await.unwrap();
    let parts = Parts {
        apps: Apps::open(gate.clone(), Vec::new(), tracker.clone()).await.unwrap(),
        sessions: Sessions::new(gate.clone(), session::Options::default()),
        tasks: Tasks::new(gate.clone(), registry, task::Options::default(), tracker.clone(), clock.clone()),
        options,
        text_bytes_max: 1024,
        own_url: "http://here".into(),
        clock,
        tracker,
        stop: CancellationToken::new(),
    };
    Conversations::open(gate, parts).await.unwrap()
}

fn visitor(talks: &Conversations, user: &str) -> Visitor {
    let app = talks.apps().get(&admin(), "shop").unwrap();
    talks.apps().visitor(app, agent().id, user).unwrap()
}

async fn contents(talks: &Conversations, visitor: &Visitor, id: Uuid) -> Vec<String> {
    let seat = talks.find(visitor, &id.to_string()).await.unwrap();
    let (mut history, mut all) = (talks.history(seat.permit()).unwrap(), Vec::new());
    loop {
        let some = history.next().await.unwrap();
        if some.is_empty() {
            return all;
        }
        all.extend(some.into_iter().map(|message| message.content));
    }
}

/// Attached, sent, fetched; and no more than may be. Answers the file.
async fn attached(talks: &Conversations, ann: &Visitor, id: Uuid) -> String {
    let seat = talks.find(ann, &id.to_string()).await.unwrap();
    let (draft, stale) = (Uuid::now_v7(), Uuid::now_v7());
    for draft in [draft, stale] {
        let mut incoming = talks.receive(&seat, draft, "a.txt", "text/plain").await.unwrap();
        incoming.write(b"hello").await.unwrap();
        incoming.finish().await.unwrap();
    }
    assert!(talks.receive(&seat, draft, "b.txt", "text/plain").await.is_err());
    for _ in 0..2 {
        assert_eq!(talks.post(&seat, "look", Some(draft), "").await.unwrap(), draft);
    }
    assert_eq!(contents(talks, ann, id).await, ["Hello!", "look"]);
    talks.sweep().await.unwrap();
    assert_eq!(talks.post(&seat, "look", Some(stale), "").await.err().unwrap().kind, Kind::NotFound);
    let page = Page { after: None, before: None, limit: 1 };
    let last = talks.page(seat.permit(), page).await.unwrap().remove(0);
    let kept = talks.find_file(&last.files[0].id.to_string(), Asker::Visitor(ann)).await.unwrap();
    let content = talks.content(&kept, None).await.unwrap();
    let content: Vec<_> = content.try_collect().await.unwrap();
    assert_eq!((kept.byte_size, content.concat()), (5, b"hello".to_vec()));
    last.files[0].id.to_string()
}

async fn everything(database: Option<String>) {
    let dir = tempfile::tempdir().unwrap();
    let migrations = trunkline_core::migrations();
    let options = trunkline_store::Options { migrations: migrations.clone(), ..trunkline_store::Options::default() };
    let mut store = Store::open(dir.path(), options).unwrap();
    if let Some(url) = database {
        store.ledger = Ledger::open_postgres(&url, &migrations, ledger::Options::default()).await.unwrap();
    }
    let talks = open(store.clone()).await;
    let apps = talks.apps();
    let nobody = Caller::new(Identity::user("x", "y").unwrap(), String::new(), Credential::none(false));
    assert_eq!(apps.create(&nobody, "shop", "", Vec::new()).await.err().unwrap().kind, Kind::Denied);
    let origins = vec!["https://shop.example.org".to_owned()];
    apps.create(&admin(), "shop", "", origins.clone()).await.unwrap();
    assert_eq!(apps.create(&admin(), "shop", "", Vec::new()).await.err().unwrap().kind, Kind::Exists);
    let wrong = Agent { identity: "us::ann::x".into(), ..agent() };
    assert_eq!(apps.change(&admin(), "shop", Change::Agent(wrong.into())).await.err().unwrap().kind, Kind::Invalid);
    apps.change(&admin(), "shop", Change::Agent(agent().into())).await.unwrap();
    let secret = apps.rotate(&admin(), "shop").await.unwrap();

    // Another server on the same rows knows all of it.
    let talks = open(store.clone()).await;
    let app = talks.apps().get(&admin(), "shop").unwrap();
    assert_eq!((&app.origins, &app.agents, app.secrets().count()), (&origins, &vec![agent()], 2));
    assert_eq!(app.secrets().next().unwrap(), secret.as_bytes());

    quiet_ones_end(store.clone()).await;
    let (ann, bob) = (visitor(&talks, "ann"), visitor(&talks, "bob"));
    let mut ids = Vec::new();
    for _ in 0..3 {
        ids.push(talks.create(&ann).await.unwrap().id);
    }
    ids.reverse();
    let listed = async |before, most| {
        let all = talks.list(&ann, before, most).await.unwrap();
        all.into_iter().map(|(row, _)| row.id).collect::<Vec<_>>()
    };
    assert_eq!((listed(None, 10).await, listed(Some(ids[0]), 1).await), (ids.clone(), vec![ids[1]]));
    assert!(talks.list(&bob, None, 10).await.unwrap().is_empty());
    assert_eq!(talks.find(&bob, &ids[0].to_string()).await.err().unwrap().kind, Kind::NotFound);

    let file = attached(&talks, &ann, ids[0]).await;
    let seat = talks.find(&ann, &ids[0].to_string()).await.unwrap();

    // Locked out, also for the next server, until it is let in.
    let bot = Caller::new(Identity::parse("ag::ws::bot::main").unwrap(), String::new(), Credential::none(false));
    let lane = seat.row().lane();
    let part = talks.part(&bot, &lane).await.unwrap().unwrap();
    talks.say(&part, CHAT, b"hi", "").await.unwrap().done().await.unwrap();
    talks.say(&part, CONTROL, br#"{"type":"lockout","reason":"hack"}"#, "").await.unwrap().done().await.unwrap();
    let other = open(store.clone()).await;
    assert!(other.lockout(&visitor(&other, "ann")).is_some() && other.lockout(&visitor(&other, "bob")).is_none());
    talks.say(&part, CONTROL, br#"{"type":"lockout","reason":"none"}"#, "").await.unwrap().done().await.unwrap();
    assert!(talks.lockout(&ann).is_none());
    keys_are_used_once(&talks, &part, &ann).await;

    assert_eq!(talks.erase(&nobody, "shop", "ann").await.err().unwrap().kind, Kind::Denied);
    assert_eq!(talks.erase(&admin(), "shop", "ann").await.unwrap(), 3);
    assert!(talks.list(&ann, None, 10).await.unwrap().is_empty());
    assert!(talks.find_file(&file, Asker::Visitor(&ann)).await.is_err());
    // Whoever held it still writes nothing.
    assert_eq!(talks.post(&seat, "hello?", None, "").await.err().unwrap().kind, Kind::NotFound);
    assert!(talks.receive(&seat, Uuid::now_v7(), "late.txt", "text/plain").await.is_err());
    talks.apps().remove(&admin(), "shop").await.unwrap();
    assert!(open(store).await.apps().list(&admin()).unwrap().is_empty());
}

/// Hours go by without a word.
async fn quiet_ones_end(store: Store) {
    let ahead = Arc::new(AtomicU64::new(0));
    let (shift, real) = (ahead.clone(), Clock::system());
    let clock = Clock::new(move || real.now_ms() + shift.load(SeqCst));
    let options = Options { assumed_resolved_minutes: 60, feedback_minutes: 10, ..Options::default() };
    let talks = open_with(store, clock, options).await;
    let job = tokio::spawn(talks.clone().settle_quiet());
    let (eve, bot) = (visitor(&talks, "eve"), Identity::parse("ag::ws::bot::main").unwrap());
    let bot = Caller::new(bot, String::new(), Credential::none(false));
    let [open, asked, escalated, rated] = [(); 4].map(|()| talks.create(&eve));
    let (open, asked, escalated, rated) = tokio::join!(open, asked, escalated, rated);
    let [open, asked, escalated, rated] = [open, asked, escalated, rated].map(|row| row.unwrap().id);
    let say = async |id: Uuid, payload: &'static str| {
        let lane = talks.find(&eve, &id.to_string()).await.unwrap().row().lane();
        let part = talks.part(&bot, &lane).await.unwrap().unwrap();
        talks.say(&part, CONTROL, payload.as_bytes(), "").await.unwrap().done().await.unwrap();
    };
    let becomes = async |id: Uuid, word: &str| loop {
        let seat = talks.find(&eve, &id.to_string()).await.unwrap();
        let state = talks.standing(seat.permit()).await.unwrap().state;
        if serde_json::to_value(state).unwrap() == word {
            return;
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    };
    let within = async |id, word| timeout(Duration::from_secs(20), becomes(id, word)).await.unwrap();
    say(escalated, r#"{"type":"convo_state","state":"escalated"}"#).await;
    say(rated, r#"{"type":"convo_state","state":"pending_feedback"}"#).await;
    let seat = talks.find(&eve, &asked.to_string()).await.unwrap();
    talks.post(&seat, "anybody there?", None, "").await.unwrap();
    ahead.store(11 * 60_000, SeqCst);
    within(rated, "auto_resolved").await;
    // All were looked at in the order in which they were due, those that stay as they are before.
    within(open, "open").await;
    ahead.store(61 * 60_000, SeqCst);
    within(open, "assumed_resolved").await;
    // What an agent opens again is looked at again. (The log's clock is the machine's, for which an hour has gone by already.)
    say(open, r#"{"type":"convo_state","state":"open"}"#).await;
    within(open, "assumed_resolved").await;
    // Who waits for an answer, or for a person, goes on waiting, over several looks by now.
    within(asked, "open").await;
    within(escalated, "escalated").await;
    job.abort();
}

/// What an agent says again under one key, as its answer was lost, takes effect once; something else under it is refused.
async fn keys_are_used_once(talks: &Conversations, part: &Part, ann: &Visitor) {
    let say = async |kind, payload: &str, key| match talks.say(part, kind, payload.as_bytes(), key).await {
        Ok(told) => told.done().await.map_err(|error| error.code),
        Err(error) => Err(error.code),
    };
    let piece = |text| format!(r#"{{"type":"delta","id":"a","text":"{text}"}}"#);
    for (text, key) in [("one ", "p1"), ("two", "p2"), ("two", "p2"), ("one ", "p1"), ("!", "p3"), ("!", "p3")] {
        assert_eq!(say(OPAQUE, &piece(text), key).await, Ok(()));
    }
    assert_eq!(say(CHAT, "before", "t1").await, Ok(()));
    for (kind, payload, key) in
        [(OPAQUE, piece("other"), "p1"), (CHAT, "other".to_owned(), "p1"), (OPAQUE, piece("x"), "t1")]
    {
        assert_eq!(say(kind, &payload, key).await, Err("ERR_IDEMPOTENCY_KEY_REUSED"), "{payload}");
    }
    for _ in 0..2 {
        assert_eq!(say(OPAQUE, r#"{"type":"delta","id":"a","done":true}"#, "d").await, Ok(()));
    }
    let page = talks.page(part.permit(), Page { after: None, before: None, limit: 2 }).await.unwrap();
    assert_eq!(page.iter().map(|message| &*message.content).collect::<Vec<_>>(), ["before", "one two!"]);

    let (rage, none) = (r#"{"type":"lockout","reason":"rage"}"#, r#"{"type":"lockout","reason":"none"}"#);
    assert_eq!(say(CONTROL, rage, "l1").await, Ok(()));
    assert_eq!(say(CONTROL, none, "l2").await, Ok(()));
    assert_eq!(say(CONTROL, rage, "l1").await, Ok(()));
    assert!(talks.lockout(ann).is_none(), "it was let in since then");
    // This one does not change the conversation, which is locked.
    assert_eq!(say(CONTROL, rage, "l3").await, Ok(()));
    assert_eq!(say(CONTROL, none, "l2").await, Ok(()));
    assert!(talks.lockout(ann).is_some(), "it was locked out since then");
    for key in ["l1", "l3", "p1", "t1"] {
        assert_eq!(say(CONTROL, none, key).await, Err("ERR_IDEMPOTENCY_KEY_REUSED"), "{key}");
    }
    assert!(talks.lockout(ann).is_some());
    assert_eq!(say(CONTROL, none, "l4").await, Ok(()));
    assert_eq!(say(CONTROL, rage, "l3").await, Ok(()));
    assert!(talks.lockout(ann).is_none());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn on_sqlite() {
    everything(None).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn on_postgres() {
    let database = trunkline_store::conformance::postgres::database().await;
    everything(Some(database)).await;
}

//! Messages that sessions were lost over: the same on every ledger.

#![allow(clippy::disallowed_methods, clippy::panic, clippy::unwrap_used, reason = "test code")]

use std::time::Duration;

use tokio::{task::JoinHandle, time::timeout};
use trunkline_core::{
    Kind,
    caller::{Caller, Credential},
    gate::Gate,
    identity::Identity,
    session::{Options, Session, Sessions, dead_letter::Oldest},
};
use trunkline_store::{
    Store,
    ledger::{self, Ledger, Relay},
    log::{Append, Item, Offset, Topic},
};

const PATIENCE: Duration = Duration::from_secs(20);

const LANE: &str = "ag::w::bot::one";

struct World {
    store: Store,
    sessions: Sessions,
    relay: JoinHandle<()>,
    _dir: tempfile::TempDir,
}

impl World {
    async fn new(database: Option<String>) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let migrations = trunkline_core::migrations();
        let options =
            trunkline_store::Options { migrations: migrations.clone(), ..trunkline_store::Options::default() };
        let mut store = Store::open(dir.path(), options).unwrap();
        if let Some(url) = database {
            store.ledger = Ledger::open_postgres(&url, &migrations, ledger::Options::default()).await.unwrap();
        }
        let relay = tokio::spawn(Relay::new(store.ledger.clone(), store.log.clone()).run());
        let gate = Gate::open(store.clone()).await.unwrap();
        let options = Options { lost_sessions_max: 2, ..Options::default() };
        Self { store, sessions: Sessions::new(gate, options), relay, _dir: dir }
    }

    async fn say(&self, topic: &str, payload: &[u8]) {
        let append = Append::new(&Topic::new(topic).unwrap(), payload.to_vec());
        self.store.log.append(append).await.unwrap();
    }

    async fn attach(&self) -> Session {
        self.attach_with("").await
    }

    async fn attach_with(&self, resume: &str) -> Session {
        let identity = Identity::parse(LANE).unwrap();
        self.sessions.attach(identity, Credential::none(true), resume).await.unwrap()
    }

    /// A session is lost while its client has what comes next; answers what that was, and whether it is a dead letter now.
    async fn lose(&self, mut session: Session) -> (Vec<u8>, bool) {
        let (payload, offset) = next(&mut session).await;
        let dead = session.lost_over(Oldest { lane: Some(offset), shared: None }).await.unwrap();
        if dead.lane {
            session.delivery(offset).done();
            session.save().await.unwrap();
        }
        (payload, dead.lane)
    }
}

async fn next(session: &mut Session) -> (Vec<u8>, Offset) {
    loop {
        if let Item::Record(record) = timeout(PATIENCE, session.reader.next()).await.unwrap().unwrap() {
            return (record.payload.to_vec(), record.offset);
        }
    }
}

fn operator(is_admin: bool) -> Caller {
    Caller::new(Identity::orchestrator("operator", "desk").unwrap(), "s".into(), Credential::none(is_admin))
}

/// Reports of progress are given up as well, and are of no use later.
async fn progress(world: &World, admin: &Caller) {
    let (pages, progress) = (world.sessions.dead_letters(admin, LANE, None, 1).await.unwrap(), "pg::w");
    assert!(pages.is_empty());
    let mut session = world.attach().await;
    let (_, offset) = next(&mut session).await;
    session.delivery(offset).done();
    session.save().await.unwrap();
    drop(session);
    world.say(progress, b"half").await;
    assert_eq!(world.lose(world.attach().await).await, (b"half".to_vec(), false));
    assert_eq!(world.lose(world.attach().await).await, (b"half".to_vec(), true));
    let [dead] = &world.sessions.dead_letters(admin, LANE, None, 0).await.unwrap()[..] else { panic!("one") };
    let refused = world.sessions.retry_dead_letter(admin, dead.id).await.unwrap_err();
    assert_eq!(refused.kind, Kind::Precondition);
    world.sessions.remove_dead_letter(admin, dead.id).await.unwrap();
    assert!(world.sessions.dead_letters(admin, "", None, 0).await.unwrap().is_empty());
}

async fn suite(world: World) {
    for text in [&b"bad"[..], b"good"] {
        world.say(LANE, text).await;
    }
    assert_eq!(world.lose(world.attach().await).await, (b"bad".to_vec(), false));
    // One that its client goes on with was not lost, also if it was the last: what was given up is delivered again, behind the others.
    let flaps = world.attach().await;
    let id = flaps.id().to_owned();
    assert_eq!(world.lose(flaps).await, (b"bad".to_vec(), true));
    let mut resumed = world.attach_with(&id).await;
    for expected in [&b"good"[..], b"bad"] {
        let (payload, offset) = next(&mut resumed).await;
        assert_eq!(payload, expected);
        if expected == b"good" {
            resumed.delivery(offset).done();
        }
    }
    resumed.save().await.unwrap();
    drop(resumed);
    world.say(LANE, b"good").await;
    let first = world.attach().await;
    assert_eq!(world.lose(first).await, (b"bad".to_vec(), false));
    let last = world.attach().await;
    assert_eq!(world.lose(last).await, (b"bad".to_vec(), true));
    let (admin, anyone) = (operator(true), operator(false));
    let [dead] = &world.sessions.dead_letters(&admin, "", None, 0).await.unwrap()[..] else { panic!("one") };
    assert_eq!((&*dead.owner, dead.record.topic.as_str(), dead.lost_sessions, dead.size), (LANE, LANE, 2, 3));
    let whole = world.sessions.dead_letter(&admin, dead.id).await.unwrap();
    assert_eq!((&whole.record.payload[..], whole.record.offset), (&b"bad"[..], dead.record.offset));
    for refused in [
        world.sessions.dead_letters(&anyone, "", None, 0).await.map(drop),
        world.sessions.dead_letter(&anyone, dead.id).await.map(drop),
        world.sessions.retry_dead_letter(&anyone, dead.id).await.map(drop),
        world.sessions.remove_dead_letter(&anyone, dead.id).await,
    ] {
        assert_eq!(refused.unwrap_err().kind, Kind::Denied);
    }
    // What comes behind it is delivered, and it itself when an operator says so.
    let mut session = world.attach().await;
    let (payload, offset) = next(&mut session).await;
    assert_eq!(payload, b"good");
    session.delivery(offset).done();
    world.sessions.retry_dead_letter(&admin, dead.id).await.unwrap();
    let (payload, offset) = next(&mut session).await;
    assert_eq!(payload, b"bad");
    assert_eq!(world.sessions.remove_dead_letter(&admin, dead.id).await.unwrap_err().kind, Kind::NotFound);
    // Counted anew, and a session that is resumed counts for nothing.
    session.lost_over(Oldest { lane: Some(offset), shared: None }).await.unwrap();
    let id = session.id().to_owned();
    session.save().await.unwrap();
    drop(session);
    assert_eq!(world.lose(world.attach_with(&id).await).await, (b"bad".to_vec(), false));
    progress(&world, &admin).await;
    world.relay.abort();
    world.store.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn on_sqlite() {
    suite(World::new(None).await).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn on_postgres() {
    let database = trunkline_store::conformance::postgres::database().await;
    suite(World::new(Some(database)).await).await;
}

//! Whose the exclusive keys are, also those that earlier versions stored.

#![allow(clippy::panic, clippy::unwrap_used, reason = "test code")]

mod sql;

use std::{
    pin::Pin,
    sync::{Arc, Mutex},
};

use tokio::task::JoinSet;
use trunkline_core::{
    Error,
    caller::{Caller, Credential},
    checkpoint,
    gate::{
        Gate,
        rules::{Level, Name},
    },
    identity::Identity,
    kv::{self, Action, Answer, New, Request, Scope},
    limits::Limits,
    rule::{self, Grant},
};
use trunkline_store::Store;

const OWN: [Scope; 4] = [Scope::User, Scope::UserWorkspace, Scope::GlobalExclusive, Scope::WorkspaceExclusive];

/// As many as the ledger reads at once.
const READERS: usize = 4;

type Running = Pin<Box<dyn Future<Output = Result<Answer, Error>> + Send>>;

struct World {
    store: Store,
    gate: Gate,
    _dir: tempfile::TempDir,
}

impl World {
    async fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let migrations = trunkline_core::migrations();
        let options = trunkline_store::Options { migrations, ..trunkline_store::Options::default() };
        let store = Store::open(dir.path(), options).unwrap();
        Self { gate: Gate::open(store.clone()).await.unwrap(), store, _dir: dir }
    }

    async fn start(&self, by: &Caller, scope: Scope, key: &str, workspace: &str, action: Action) -> Running {
        let (key, user_id, workspace) = (key.to_owned(), "ann".to_owned(), workspace.to_owned());
        let request = Request { scope, key, user_id, workspace, action };
        let allowed = kv::allow(&self.gate, by, by.identity.workspace(), request, &Limits::default()).unwrap();
        kv::run(&self.gate, by, allowed, true, &Limits::default()).await.unwrap()
    }

    async fn run(&self, by: &Caller, scope: Scope, key: &str, workspace: &str, action: Action) -> Answer {
        self.start(by, scope, key, workspace, action).await.await.unwrap()
    }

    async fn get(&self, by: &Caller, scope: Scope, workspace: &str) -> String {
        String::from_utf8(self.run(by, scope, "k", workspace, Action::Get).await.value).unwrap()
    }

    async fn put(&self, by: &Caller, scope: Scope, value: &str) {
        let new = New { value: value.into(), ttl: 0 };
        assert!(self.run(by, scope, "k", "", Action::Put(new)).await.applied);
    }

    /// The server knows of the identity from then on.
    async fn comes(&self, by: &Caller) {
        checkpoint::save(&self.gate, by, "c", b"x".to_vec(), 0, &Limits::default()).await.unwrap();
    }
}

fn bot(workspace: &str) -> Caller {
    Caller::new(Identity::agent(workspace, "bot", "main").unwrap(), "s".into(), Credential::none(false))
}

/// An agent that may also list what is its own over all workspaces.
async fn lister(world: &World) -> Caller {
    let (admin, bot) = (Identity::orchestrator("root", "x").unwrap(), bot("a"));
    let grant = Grant {
        principal: Name::new("agent", bot.identity.to_string()),
        resource: Name::new("kv_scope", "global-exclusive"),
        level: Level::READ,
        expires_at: None,
        reason: String::new(),
        granted_by: String::new(),
    };
    rule::grant(&world.gate, &Caller::new(admin, "s".into(), Credential::none(true)), grant).await.unwrap();
    bot
}

#[tokio::test]
async fn agents_of_one_name_in_two_workspaces_share_no_exclusive_key() {
    let world = World::new().await;
    let (ann, eve) = (bot("a"), bot("b"));
    for scope in OWN {
        world.put(&ann, scope, "ann's").await;
        for named in ["", "a", "b"] {
            assert_eq!(world.get(&eve, scope, named).await, "", "{scope:?} naming {named:?}");
        }
        world.run(&eve, scope, "k", "a", Action::Delete).await;
        assert_eq!(world.get(&ann, scope, "").await, "ann's", "{scope:?}");
    }
    let lengths = async |caller| {
        let keys = kv::snapshot(&world.gate, caller).await.unwrap();
        [keys.workspace_exclusive.len(), keys.global_exclusive.len()]
    };
    assert_eq!((lengths(&ann).await, lengths(&eve).await), ([1, 1], [0, 0]));
}

#[tokio::test]
async fn a_listing_holds_up_no_write_and_sees_those_before_it() {
    let world = World::new().await;
    let ann = lister(&world).await;
    // Everything that reads is busy, and only what writes is not.
    let (release, released) = std::sync::mpsc::sync_channel::<()>(1);
    let (started, mut starts) = tokio::sync::mpsc::channel(READERS);
    let (released, mut readers) = (Arc::new(Mutex::new(released)), JoinSet::new());
    for _ in 0..READERS {
        let (ledger, started, released) = (world.store.ledger.clone(), started.clone(), released.clone());
        readers.spawn(async move {
            let read = ledger.read(move |_| {
                let _ = (started.try_send(()), released.lock().unwrap().recv());
                Box::pin(std::future::ready(Ok::<_, trunkline_store::ledger::Error>(())))
            });
            read.await.unwrap();
        });
    }
    for _ in 0..READERS {
        starts.recv().await.unwrap();
    }
    let put = || Action::Put(New { value: b"v".to_vec(), ttl: 0 });
    let before = world.start(&ann, Scope::GlobalExclusive, "before", "", put()).await;
    let list = Action::List { limit: 0, cursor: String::new() };
    let mut listing = world.start(&ann, Scope::GlobalExclusive, "", "", list).await;
    let behind = world.start(&ann, Scope::GlobalExclusive, "other", "", put()).await;
    assert!(before.await.unwrap().applied && behind.await.unwrap().applied, "writes do not wait for a listing");
    assert!(futures_util::poll!(&mut listing).is_pending(), "it is read by what reads");
    drop(release);
    let listed = listing.await.unwrap().entries;
    assert!(listed.contains(&("before".to_owned(), b"v".to_vec())), "{listed:?}");
}

#[tokio::test]
async fn pages_end_where_their_bytes_do() {
    let world = World::new().await;
    let ann = lister(&world).await;
    for number in 0..5 {
        let value = vec![number; if number == 3 { 1 } else { 1 << 20 }];
        let key = format!("k{number}");
        world.run(&ann, Scope::GlobalExclusive, &key, "", Action::Put(New { value, ttl: 0 })).await;
    }
    let (mut pages, mut cursor) = (Vec::new(), String::new());
    loop {
        let action = Action::List { limit: 1000, cursor };
        let page = world.run(&ann, Scope::GlobalExclusive, "k", "", action).await;
        assert!(page.entries.iter().all(|(key, value)| key.as_bytes()[1] - b'0' == value[0]));
        pages.push(page.entries.into_iter().map(|(key, _)| key).collect::<Vec<_>>().join(" "));
        cursor = page.next_cursor;
        if cursor.is_empty() {
            break;
        }
    }
    assert_eq!(pages, ["k0 k1", "k2 k3 k4"]);
    let keys = kv::snapshot(&world.gate, &ann).await.unwrap();
    assert_eq!((keys.global_exclusive.len(), keys.is_cut), (2, true));
}

#[tokio::test]
async fn keys_of_earlier_versions_go_to_the_owners_that_are_known() {
    let world = World::new().await;
    let (ann, bob, eve) = (bot("a"), bot("b"), bot("c"));
    world.comes(&ann).await;
    world.comes(&bob).await;
    for namespace in ["agent::bot::main", "agent::bot::main::user::ann", "agent::bot::main::workspace::a"] {
        sql::keep_as_before(&world.store, namespace).await;
    }
    kv::settle(&world.gate, "c").await.unwrap();
    for owner in [&ann, &bob] {
        assert_eq!(world.get(owner, Scope::GlobalExclusive, "").await, "old");
        assert_eq!(world.get(owner, Scope::User, "").await, "old");
        assert_eq!(world.get(owner, Scope::WorkspaceExclusive, "a").await, "old");
        let members = world.run(owner, Scope::GlobalExclusive, "set", "", Action::SetCount).await;
        assert_eq!(members.counter, 2);
        let again = New { value: b"older".to_vec(), ttl: 0 };
        assert!(!world.run(owner, Scope::GlobalExclusive, "set", "", Action::SetAdd(again)).await.applied);
    }
    assert_eq!(world.get(&eve, Scope::GlobalExclusive, "").await, "");
    assert_eq!(world.get(&eve, Scope::WorkspaceExclusive, "a").await, "");
    // Both have their own from here on, and nothing is left of the space that they shared.
    world.put(&ann, Scope::GlobalExclusive, "new").await;
    assert_eq!(world.get(&bob, Scope::GlobalExclusive, "").await, "old");
    assert_eq!(sql::rows(&world.store).await, [12, 12, 6]);
    kv::settle(&world.gate, "").await.unwrap();
    assert_eq!(world.get(&ann, Scope::GlobalExclusive, "").await, "new");
}

#[tokio::test]
async fn keys_without_a_known_owner_are_out_of_reach_until_the_operator_gives_them() {
    let world = World::new().await;
    let (ann, eve) = (bot("a"), bot("b"));
    sql::keep_as_before(&world.store, "agent::bot::main").await;
    sql::keep_as_before(&world.store, "task::bot::main").await;
    // The workspace that keys are about is their owner's, if nobody else is known.
    sql::keep_as_before(&world.store, "agent::bot::main::user::ann::workspace::a").await;
    kv::settle(&world.gate, "").await.unwrap();
    assert_eq!(world.get(&ann, Scope::UserWorkspace, "").await, "old");
    assert_eq!(world.get(&ann, Scope::GlobalExclusive, "").await, "");
    // Being first is no claim.
    world.comes(&eve).await;
    kv::settle(&world.gate, "").await.unwrap();
    assert_eq!(world.get(&eve, Scope::GlobalExclusive, "").await, "");
    world.put(&ann, Scope::GlobalExclusive, "new").await;
    kv::settle(&world.gate, "a").await.unwrap();
    assert_eq!(world.get(&ann, Scope::GlobalExclusive, "").await, "new", "what is newer stays");
    assert_eq!(world.run(&ann, Scope::GlobalExclusive, "set", "", Action::SetCount).await.counter, 2);
    let task = Caller::new(Identity::unique_task("a", "bot", "main").unwrap(), "s".into(), Credential::none(false));
    assert_eq!(world.get(&task, Scope::GlobalExclusive, "").await, "old");
    assert_eq!(world.get(&eve, Scope::GlobalExclusive, "").await, "");
    assert!(kv::settle(&world.gate, "a::b").await.is_err());
}

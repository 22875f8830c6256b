//! Whose the exclusive keys are, also those that earlier versions stored.

#![allow(clippy::panic, clippy::unwrap_used, reason = "test code")]

mod sql;

use trunkline_core::{
    caller::{Caller, Credential},
    checkpoint,
    gate::Gate,
    identity::Identity,
    kv::{self, Action, Answer, New, Request, Scope},
    limits::Limits,
};
use trunkline_store::Store;

const OWN: [Scope; 4] = [Scope::User, Scope::UserWorkspace, Scope::GlobalExclusive, Scope::WorkspaceExclusive];

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

    async fn run(&self, by: &Caller, scope: Scope, key: &str, workspace: &str, action: Action) -> Answer {
        let (key, user_id, workspace) = (key.to_owned(), "ann".to_owned(), workspace.to_owned());
        let request = Request { scope, key, user_id, workspace, action };
        let allowed = kv::allow(&self.gate, by, by.identity.workspace(), request, &Limits::default()).unwrap();
        kv::run(&self.gate, by, allowed, true, &Limits::default()).await.unwrap().await.unwrap()
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
        let own = kv::own_keys(&world.gate, caller).await.unwrap();
        [own.in_workspace.len(), own.everywhere.len()]
    };
    assert_eq!((lengths(&ann).await, lengths(&eve).await), ([1, 1], [0, 0]));
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

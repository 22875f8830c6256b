//! Checkpoints: named blobs that belong to one identity.

use std::time::Duration;

use bytes::Bytes;
use trunkline_client::{
    Agent, Client, UniqueTask, User,
    kv::{Checkpoints, Keep},
};

use crate::world_state::{WS, World, plain, until};

async fn save(checkpoints: &Checkpoints, key: &str, data: &'static str) {
    checkpoints.save(key, data, Keep::Default).await.unwrap();
}

async fn load(checkpoints: &Checkpoints, key: &str) -> Option<Bytes> {
    checkpoints.load(key).await.unwrap().map(|found| found.data)
}

async fn keys(checkpoints: &Checkpoints) -> Vec<String> {
    let mut keys = checkpoints.list().await.unwrap();
    keys.sort_unstable();
    keys
}

#[tokio::test]
async fn every_principal_saves_loads_lists_and_deletes() {
    let world = World::begin().await;
    let mut clients = world.ordinary().await;
    clients.push(("orchestrator", plain(&world.admin())));
    for (name, client) in clients {
        let checkpoints = client.checkpoints();
        save(&checkpoints, "progress", "step 1").await;
        let loaded = checkpoints.load("progress").await.unwrap().unwrap();
        assert_eq!(loaded.data, "step 1", "{name}");
        assert_eq!(checkpoints.load("progress").await.unwrap().unwrap(), loaded, "{name}: when it was saved stays");
        assert_eq!(keys(&checkpoints).await, ["progress"], "{name}");
        checkpoints.delete("progress").await.unwrap();
        assert_eq!(load(&checkpoints, "progress").await, None, "{name}");
        assert!(keys(&checkpoints).await.is_empty(), "{name}");
    }
}

#[tokio::test]
async fn a_missing_checkpoint_is_nothing_and_no_error() {
    let world = World::begin().await;
    let checkpoints = world.agent("worker").await.checkpoints();
    assert_eq!(checkpoints.load("never-saved").await.unwrap(), None);
    checkpoints.delete("never-saved").await.unwrap();
}

#[tokio::test]
async fn saving_again_replaces() {
    let world = World::begin().await;
    let checkpoints = world.agent("worker").await.checkpoints();
    for data in ["one", "two", "three"] {
        save(&checkpoints, "k", data).await;
    }
    assert_eq!(load(&checkpoints, "k").await.unwrap(), "three");
    assert_eq!(keys(&checkpoints).await, ["k"]);
}

#[tokio::test]
async fn the_empty_key_is_the_default_checkpoint() {
    let world = World::begin().await;
    let checkpoints = world.agent("worker").await.checkpoints();
    save(&checkpoints, "", "state").await;
    for key in ["", "default"] {
        assert_eq!(load(&checkpoints, key).await.unwrap(), "state", "{key:?}");
    }
    assert_eq!(keys(&checkpoints).await, ["default"]);
}

#[tokio::test]
async fn several_keys_live_side_by_side() {
    let world = World::begin().await;
    let checkpoints = world.agent("worker").await.checkpoints();
    let names: Vec<String> = (0..5).map(|n| format!("part-{n}")).collect();
    for name in &names {
        checkpoints.save(name, name.clone(), Keep::Default).await.unwrap();
    }
    assert_eq!(keys(&checkpoints).await, names);
    for name in &names {
        assert_eq!(load(&checkpoints, name).await.unwrap(), *name);
    }
}

#[tokio::test]
async fn data_is_binary_exact() {
    let world = World::begin().await;
    let checkpoints = world.agent("worker").await.checkpoints();
    for size in [1, 64 * 1024, 512 * 1024] {
        let data: Bytes = (0..size).map(|n| u8::try_from((n * 7 + n / 256) % 256).unwrap()).collect();
        checkpoints.save("blob", data.clone(), Keep::Default).await.unwrap();
        assert_eq!(load(&checkpoints, "blob").await, Some(data), "{size} bytes");
    }
}

#[tokio::test]
async fn a_checkpoint_expires() {
    let world = World::begin().await;
    let checkpoints = world.agent("worker").await.checkpoints();
    checkpoints.save("brief", "x", Keep::For(Duration::from_secs(2))).await.unwrap();
    checkpoints.save("lasting", "y", Keep::Forever).await.unwrap();
    checkpoints.save("server default", "z", Keep::Default).await.unwrap();
    assert_eq!(load(&checkpoints, "brief").await.unwrap(), "x");
    until("it expires", async || load(&checkpoints, "brief").await.is_none()).await;
    assert_eq!(keys(&checkpoints).await, ["lasting", "server default"]);
    assert_eq!(load(&checkpoints, "lasting").await.unwrap(), "y");
    assert_eq!(load(&checkpoints, "server default").await.unwrap(), "z");
}

#[tokio::test]
async fn a_checkpoint_outlives_the_connection() {
    let world = World::begin().await;
    let first = world.connect(Agent::builder(WS, "worker", "a")).await;
    save(&first.checkpoints(), "k", "kept").await;
    first.close().await;
    let second = world.connect(Agent::builder(WS, "worker", "a")).await;
    assert_eq!(load(&second.checkpoints(), "k").await.unwrap(), "kept");
}

#[tokio::test]
async fn checkpoints_are_private_to_their_identity() {
    let world = World::begin().await;
    let owner = world.connect(Agent::builder(WS, "worker", "a")).await.checkpoints();
    save(&owner, "k", "mine").await;
    let strangers: [(&str, Client); 4] = [
        ("other specifier", plain(&world.connect(Agent::builder(WS, "worker", "b")).await)),
        ("other implementation", plain(&world.connect(Agent::builder(WS, "other", "a")).await)),
        ("other workspace", plain(&world.connect(Agent::builder("elsewhere", "worker", "a")).await)),
        ("other principal type", plain(&world.connect(UniqueTask::builder(WS, "worker", "a")).await)),
    ];
    for (name, stranger) in strangers {
        let stranger = stranger.checkpoints();
        assert_eq!(load(&stranger, "k").await, None, "{name}");
        assert!(keys(&stranger).await.is_empty(), "{name}");
        save(&stranger, "k", "theirs").await;
        stranger.delete("k").await.unwrap();
        assert_eq!(load(&owner, "k").await.unwrap(), "mine", "{name}");
    }
}

#[tokio::test]
async fn windows_of_a_user_have_their_own_checkpoints() {
    let world = World::begin().await;
    let left = world.connect(User::builder("ann", "left")).await;
    let right = world.connect(User::builder("ann", "right")).await;
    save(&left.checkpoints(), "k", "left").await;
    assert_eq!(load(&right.checkpoints(), "k").await, None);
}

// Not ported: `test_sdk_sync_round_trip` and `test_sdk_async_round_trip`, as every test here makes that trip. Of
// `test_save_load_list_delete`, that the answer to a save tells its time: it is not handed on here.

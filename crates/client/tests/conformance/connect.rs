//! Every principal is let in and welcomed.

use std::{
    collections::HashSet,
    time::{SystemTime, UNIX_EPOCH},
};

use trunkline_client::{
    Agent, Bridge, Client, MetricsBridge, Orchestrator, Outgoing, Service, UniqueTask, User, Welcome, Worker,
    WorkflowEngine, kv::Scope,
};
use uuid::Uuid;

use crate::world_messaging::{WS, World, done, heard, hears, next, place, plain, say, soon};

/// One client of each kind, with its name.
async fn everybody(world: &World) -> Vec<(&'static str, Client)> {
    vec![
        ("agent", plain(world.agent("a").await)),
        ("unique task", plain(world.task("t").await)),
        ("worker", plain(world.worker("job").await)),
        ("user", plain(world.user("alice", "w").await)),
        ("orchestrator", plain(world.orchestrator("o").await)),
        ("service", plain(world.service("s").await)),
        ("bridge", plain(world.bridge("b").await)),
        ("workflow engine", plain(world.engine().await)),
        ("metrics bridge", plain(world.metrics().await)),
    ]
}

fn now_ms() -> i64 {
    i64::try_from(SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_millis()).unwrap()
}

fn check_fresh(who: &str, welcome: &Welcome) {
    assert!(Uuid::parse_str(&welcome.session_id).is_ok(), "{who}: {welcome:?}");
    assert!(!welcome.resumed, "{who}");
    assert_eq!(welcome.reconnections, 0, "{who}");
    assert!((welcome.first_connected_ms - now_ms()).abs() < 60_000, "{who}: {welcome:?}");
    assert!(!welcome.server_version.is_empty(), "{who}");
}

#[tokio::test]
async fn the_first_connection_of_every_principal_is_welcomed() {
    let world = World::begin().await;
    for (who, client) in everybody(&world).await {
        assert!(client.is_connected(), "{who}");
        check_fresh(who, &client.welcome().unwrap());
        done(&client).await;
    }
}

#[tokio::test]
async fn every_connection_has_its_own_session_id() {
    let world = World::begin().await;
    let clients = everybody(&world).await;
    let ids: HashSet<String> = clients.iter().map(|(_, client)| client.welcome().unwrap().session_id.clone()).collect();
    assert_eq!(ids.len(), clients.len());
}

#[tokio::test]
async fn only_agents_and_tasks_are_told_their_config() {
    let world = World::begin().await;
    for (who, client) in everybody(&world).await {
        done(&client).await;
        if matches!(who, "agent" | "unique task" | "worker") {
            next(client.configs()).await;
        }
        // Nothing comes after the last answer but what is there already.
        let mut configs = client.configs();
        soon(client.close()).await;
        assert!(soon(configs.next()).await.is_none(), "{who}");
    }
}

#[tokio::test]
async fn the_config_of_a_new_agent_is_empty() {
    let world = World::begin().await;
    let config = next(world.agent("a").await.configs()).await;
    assert_eq!(config, Default::default());
}

#[tokio::test]
async fn the_config_holds_what_the_agent_stored_for_itself() {
    let world = World::begin().await;
    let first = world.agent("a").await;
    first.kv(Scope::WorkspaceExclusive(None)).put("here", &b"\x00local"[..]).await.unwrap();
    first.kv(Scope::GlobalExclusive).put("everywhere", &b"\xffmine"[..]).await.unwrap();
    soon(first.close()).await;

    let config = next(world.agent("a").await.configs()).await;
    assert_eq!(config.workspace_exclusive_kv, [("here".into(), b"\x00local"[..].into())].into());
    assert_eq!(config.global_exclusive_kv, [("everywhere".into(), b"\xffmine"[..].into())].into());
}

#[tokio::test]
async fn a_worker_learns_its_id_from_the_welcome_and_signs_with_it() {
    let world = World::begin().await;
    let (receiver, worker) = (world.agent("a").await, world.worker("render").await);
    let assigned = worker.welcome().unwrap().assigned_id.clone();
    assert!(Uuid::parse_str(&assigned).is_ok(), "{assigned}");
    assert_eq!(worker.identity().as_str(), format!("ta::{WS}::render::{assigned}"));
    say(&worker, place(&receiver), "who am I").await;
    assert_eq!(hears(&receiver, "who am I").await.source(), worker.identity().as_str());
}

#[tokio::test]
async fn dots_and_at_signs_are_ordinary_characters_of_names() {
    let world = World::begin().await;
    let agent = world.connect(Agent::builder(WS, "com.example.chat-agent", "pod.7")).await;
    let user = world.connect(User::builder("alice.x@example.com", "tab.1")).await;
    user.send_to_agent(WS, "com.example.chat-agent", "pod.7", "hello").await.unwrap();
    let message = hears(&agent, "hello").await;
    assert_eq!(message.source(), "us::alice.x@example.com::tab.1");
    user.send(Outgoing::new(message.sender().unwrap(), "to myself")).await.unwrap();
    assert_eq!(heard(&user).await.text(), "to myself");
}

#[tokio::test]
async fn identities_are_as_the_server_writes_them() {
    let world = World::begin().await;
    let cases: [(Client, &str); 8] = [
        (plain(world.connect(Agent::builder(WS, "i", "s")).await), "ag::ws::i::s"),
        (plain(world.connect(UniqueTask::builder(WS, "i", "s")).await), "tu::ws::i::s"),
        (plain(world.connect(User::builder("u", "w")).await), "us::u::w"),
        (plain(world.connect(Service::builder("i", "s")).await), "sv::i::s"),
        (plain(world.connect(Bridge::builder("i", "s")).await), "br::i::s"),
        (plain(world.connect(Orchestrator::builder("i").specifier("s").profile("p")).await), "orc::i::s"),
        (plain(world.connect(WorkflowEngine::builder()).await), "wfe::shard0"),
        (plain(world.connect(MetricsBridge::builder()).await), "metrics::shard0"),
    ];
    let admin = world.admin().await;
    for (client, identity) in cases {
        assert_eq!(client.identity().as_str(), identity);
        let session = admin.get_session(&client.welcome().unwrap().session_id).await.unwrap();
        assert_eq!(session.identity, identity);
    }
    let worker = world.connect(Worker::builder(WS, "i")).await;
    let session = admin.get_session(&worker.welcome().unwrap().session_id).await.unwrap();
    assert_eq!(session.identity, worker.identity().as_str());
}

// Not ported:
// - test_sdk_*: they prove the published Python client; here every test does the same for this library.

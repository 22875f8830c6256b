//! Starting what is not running: agents that are away are announced to an orchestrator.

use std::collections::{BTreeSet, HashMap};

use futures_util::StreamExt as _;
use trunkline_client::{
    Agent, Credentials, Kind, Message, Orchestrator, Received,
    task::{Assignment, NewTask},
};

use crate::world_state::{WS, World, refused, silence, soon, until};

/// What is registered, and under which profile its agents are started.
const IMPL: &str = "support";
const PROFILE: &str = "process";

/// A world in which agents of one implementation can be started.
async fn registered() -> World {
    let world = World::begin().await;
    world.register(IMPL, PROFILE, &[("image", "example/agent:1"), ("cpu", "1")]).await;
    world
}

async fn orchestrator(world: &World, profiles: &[&str]) -> Orchestrator {
    let builder = Orchestrator::builder(world.name("orc"));
    world.connect(profiles.iter().fold(builder, |builder, profile| builder.profile(*profile))).await
}

async fn started(assignments: &mut Received<Assignment>) -> Assignment {
    soon(assignments.next()).await.unwrap()
}

async fn message(messages: &mut Received<Message>) -> Message {
    soon(messages.next()).await.unwrap()
}

/// It says to start this agent, and how.
fn check(start: &Assignment, orchestrator: &Orchestrator, specifier: &str) {
    assert_eq!((&*start.task_type, &*start.profile), ("agent_startup", PROFILE));
    assert_eq!(start.assigned_to, orchestrator.identity().as_str());
    let target = (&*start.workspace, &*start.target_implementation, &*start.specifier);
    assert_eq!(target, (WS, IMPL, specifier));
    assert_eq!((&*start.launch_params["image"], &*start.launch_params["profile"]), ("example/agent:1", PROFILE));
    assert!(!start.task_id.is_empty());
}

#[tokio::test]
async fn a_message_to_an_offline_agent_starts_it_and_reaches_it() {
    let world = registered().await;
    let (orchestrator, user) = (orchestrator(&world, &[PROFILE]).await, world.user().await);
    user.send_to_agent(WS, IMPL, "alice", "anybody home?").await.unwrap();
    let start = started(&mut orchestrator.assignments()).await;
    check(&start, &orchestrator, "alice");
    let agent =
        world.connect(Agent::builder(&*start.workspace, &*start.target_implementation, &*start.specifier)).await;
    let message = message(&mut agent.messages()).await;
    assert_eq!((&*message.text(), message.source()), ("anybody home?", user.identity().as_str()));
    let why = soon(agent.configs().next()).await.unwrap().task_context;
    let expected = [("task_id", &*start.task_id), ("workspace", WS), ("implementation", IMPL), ("specifier", "alice")];
    for (key, value) in expected {
        assert_eq!(why.get(key).map(String::as_str), Some(value), "{key}");
    }
}

#[tokio::test]
async fn a_start_token_admits_the_started_agent_and_nobody_else() {
    let world = registered().await;
    let orchestrator = orchestrator(&world, &[PROFILE]).await;
    world.user().await.send_to_agent(WS, IMPL, "alice", "anybody home?").await.unwrap();
    let start = started(&mut orchestrator.assignments()).await;
    let token = start.auth_token().unwrap();
    let agent = Agent::builder(WS, IMPL, "alice").credentials(Credentials::task_token(token));
    let agent = world.connect(agent).await;
    assert_eq!(message(&mut agent.messages()).await.text(), "anybody home?");
    let other = Agent::builder(WS, IMPL, "mallory").credentials(Credentials::task_token(token));
    let error = refused("somebody else", world.try_connect(other).await);
    assert_eq!(error.kind(), Kind::Denied, "{error:?}");
}

#[tokio::test]
async fn a_targeted_task_for_an_offline_agent_starts_it() {
    let world = registered().await;
    let (orchestrator, boss) = (orchestrator(&world, &[PROFILE]).await, world.agent("boss").await);
    let target = format!("ag::{WS}::{IMPL}::bob");
    let task = NewTask::new("work").for_agent(target).payload("work").launch_param("cpu", "4");
    let created = boss.tasks().create(task).await.unwrap();
    assert_eq!(created.status, "orchestration_triggered");
    let start = started(&mut orchestrator.assignments()).await;
    check(&start, &orchestrator, "bob");
    assert_ne!(start.task_id, created.task_id);
    assert_eq!(start.launch_params["cpu"], "4");
    let agent = world.connect(Agent::builder(WS, IMPL, "bob")).await;
    let work = started(&mut agent.assignments()).await;
    assert_eq!((&work.task_id, &*work.payload), (&created.task_id, &b"work"[..]));
}

#[tokio::test]
async fn a_launch_request_starts_an_agent() {
    let world = registered().await;
    let orchestrator = orchestrator(&world, &[PROFILE]).await;
    let task = world.admin().launch_agent(IMPL, WS, "carol", HashMap::new()).await.unwrap();
    let start = started(&mut orchestrator.assignments()).await;
    check(&start, &orchestrator, "carol");
    assert_eq!(start.task_id, task);
}

#[tokio::test]
async fn repeated_messages_are_one_start() {
    let world = registered().await;
    let (orchestrator, user) = (orchestrator(&world, &[PROFILE]).await, world.user().await);
    for n in 0..5 {
        user.send_to_agent(WS, IMPL, "alice", format!("{n}")).await.unwrap();
    }
    let mut assignments = orchestrator.assignments();
    check(&started(&mut assignments).await, &orchestrator, "alice");
    // A later start comes next.
    user.send_to_agent(WS, IMPL, "bob", "hello").await.unwrap();
    check(&started(&mut assignments).await, &orchestrator, "bob");
    silence("two were started", assignments.next()).await;
}

#[tokio::test]
async fn different_specifiers_are_started_separately() {
    let world = registered().await;
    let (orchestrator, user) = (orchestrator(&world, &[PROFILE]).await, world.user().await);
    for specifier in ["alice", "bob"] {
        user.send_to_agent(WS, IMPL, specifier, "hello").await.unwrap();
    }
    let mut assignments = orchestrator.assignments();
    let mut specifiers = BTreeSet::new();
    for _ in 0..2 {
        specifiers.insert(started(&mut assignments).await.specifier.clone());
    }
    assert_eq!(specifiers, BTreeSet::from(["alice".to_owned(), "bob".to_owned()]));
}

#[tokio::test]
async fn orchestrators_of_other_profiles_are_left_alone() {
    let world = registered().await;
    let earlier = orchestrator(&world, &["earlier"]).await;
    let right = orchestrator(&world, &[PROFILE]).await;
    let later = orchestrator(&world, &["later"]).await;
    world.user().await.send_to_agent(WS, IMPL, "alice", "hello").await.unwrap();
    check(&started(&mut right.assignments()).await, &right, "alice");
    for other in [earlier, later] {
        silence("another profile", other.assignments().next()).await;
    }
}

#[tokio::test]
async fn one_of_two_orchestrators_gets_the_work() {
    let world = registered().await;
    let (one, two) = (orchestrator(&world, &[PROFILE]).await, orchestrator(&world, &[PROFILE]).await);
    world.user().await.send_to_agent(WS, IMPL, "alice", "hello").await.unwrap();
    let mut both = futures_util::stream::select(one.assignments(), two.assignments());
    assert_eq!(soon(both.next()).await.unwrap().specifier, "alice");
    silence("one is enough", both.next()).await;
}

#[tokio::test]
async fn an_orchestrator_that_comes_later_gets_the_waiting_work() {
    let world = registered().await;
    let user = world.user().await;
    user.send_to_agent(WS, IMPL, "alice", "hello").await.unwrap();
    // Frames take effect in order: when this is answered, the message has been handled.
    user.checkpoints().list().await.unwrap();
    let orchestrator = orchestrator(&world, &[PROFILE]).await;
    check(&started(&mut orchestrator.assignments()).await, &orchestrator, "alice");
}

#[tokio::test]
async fn what_is_unregistered_or_online_is_not_started() {
    let world = registered().await;
    let (orchestrator, user) = (orchestrator(&world, &[PROFILE]).await, world.user().await);
    let online = world.connect(Agent::builder(WS, IMPL, "alice")).await;
    user.send_to_agent(WS, "unknown", "x", "hello").await.unwrap();
    user.send_to_agent(WS, IMPL, "alice", "you are there").await.unwrap();
    assert_eq!(message(&mut online.messages()).await.text(), "you are there");
    user.send_to_agent(WS, IMPL, "bob", "hello").await.unwrap();
    let mut assignments = orchestrator.assignments();
    check(&started(&mut assignments).await, &orchestrator, "bob");
    silence("one was started", assignments.next()).await;
}

#[tokio::test]
async fn profiles_are_listed_with_their_orchestrator() {
    let world = World::begin().await;
    let _orchestrator = orchestrator(&world, &["first", "second"]).await;
    until("it is listed", async || {
        let all = world.admin().orchestrators().await.unwrap();
        all.iter()
            .any(|each| BTreeSet::from_iter(&each.profiles) == BTreeSet::from([&"first".into(), &"second".into()]))
    })
    .await;
}

// Not ported: `test_sdk_orchestrator_starts_an_agent`, as every test here does so.

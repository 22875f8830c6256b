//! Who may write where. What is refused is an error to the sender, does not arrive, and leaves the connection as it is.

use trunkline_client::{
    AccessLevel, Agent, Client, Kind, MessageType, Outgoing, Topic, kv::Scope, proto::AclGrantRequest, task::Progress,
};

use crate::world_messaging::{
    OTHER, WS, World, denied, done, heard_nothing, hears, next, place, plain, say, soon, topic,
};

// The fixed matrix: what a kind of principal may never do.

#[tokio::test]
async fn a_user_may_not_write_to_the_platforms_topics() {
    let world = World::begin().await;
    let user = world.user_on(WS, "alice", "w").await;
    for to in ["event::*", "event::ws", "event::receiver0", "metric::*", "metric::receiver0", "pg::ws", "uu::bob"] {
        denied(&user, topic(to)).await;
    }
}

#[tokio::test]
async fn who_lives_in_a_workspace_may_not_write_to_all_windows_of_a_user() {
    let world = World::begin().await;
    let (window, service) = (world.user("alice", "w1").await, world.service("s").await);
    let (agent, task, worker) = (world.agent("a").await, world.task("t").await, world.worker("job").await);
    let senders: [&Client; 3] = [&agent, &task, &worker];
    for sender in senders {
        denied(sender, Topic::user("alice").unwrap()).await;
    }
    say(&service, Topic::user("alice").unwrap(), "allowed").await;
    hears(&window, "allowed").await;
}

const ANYWHERE: [&str; 9] = [
    "ag::ws::worker::x",
    "tu::ws::job::x",
    "us::alice::w1",
    "ga::ws",
    "gu::ws",
    "uu::alice",
    "sv::svc::pod",
    "event::*",
    "metric::*",
];

#[tokio::test]
async fn the_metrics_bridge_may_not_write_anywhere() {
    let world = World::begin().await;
    let metrics = world.metrics().await;
    for to in ANYWHERE {
        denied(&metrics, topic(to)).await;
    }
}

#[tokio::test]
async fn an_orchestrator_may_write_to_agents_and_tasks_only() {
    let world = World::begin().await;
    let orchestrator = world.orchestrator("o").await;
    for to in &ANYWHERE[2..] {
        denied(&orchestrator, topic(to)).await;
    }
    world.grant(&orchestrator, WS, AccessLevel::Write).await;
    let (agent, task) = (world.agent("a").await, world.task("t").await);
    orchestrator.send_to_agent(WS, "worker", "a", "status").await.unwrap();
    assert_eq!(hears(&agent, "status").await.kind(), MessageType::Control);
    orchestrator.send_to_task(WS, "job", "t", "status").await.unwrap();
    assert_eq!(hears(&task, "status").await.kind(), MessageType::Control);
}

#[tokio::test]
async fn services_and_bridges_may_write_to_all_windows_of_a_user_and_to_each() {
    let world = World::begin().await;
    let window = world.user("alice", "w1").await;
    for sender in [plain(world.service("s").await), plain(world.bridge("b").await)] {
        for to in [Topic::user("alice").unwrap(), place(&window)] {
            say(&sender, &to, "hello").await;
            assert_eq!(hears(&window, "hello").await.source(), sender.identity().as_str(), "{to}");
        }
    }
}

#[tokio::test]
async fn an_agent_may_not_write_messages_to_progress() {
    let world = World::begin().await;
    let agent = world.agent("a").await;
    denied(&agent, Topic::progress(WS).unwrap()).await;
}

#[tokio::test]
async fn what_is_refused_never_arrives() {
    let world = World::begin().await;
    let (user, agent) = (world.user("alice", "w").await, world.agent("a").await);
    denied(&user, Topic::events()).await;
    say(&user, place(&agent), "allowed").await;
    hears(&agent, "allowed").await;
}

#[tokio::test]
async fn a_send_that_is_not_waited_for_is_refused_too() {
    let world = World::begin().await;
    let user = world.user("alice", "w").await;
    user.send(Outgoing::new(Topic::events(), "x").of(MessageType::Event)).await.unwrap();
    let error = next(user.refusals()).await;
    assert_eq!((error.kind(), error.code()), (Kind::Denied, "ERR_PERMISSION_DENIED"));
    assert!(error.to_string().contains("event::"), "{error}");
}

// Access to a workspace: what holds without a rule.

#[tokio::test]
async fn who_lives_in_no_workspace_needs_a_grant_to_write_into_one() {
    let world = World::begin().await;
    let (agent, user) = (world.agent("a").await, world.user_on(WS, "alice", "w").await);
    let guests = [plain(world.service("s").await), plain(world.bridge("b").await)];
    let places: [(Topic, &Client); 3] =
        [(place(&agent), &agent), (Topic::agents(WS).unwrap(), &agent), (Topic::users(WS).unwrap(), &user)];
    for sender in &guests {
        for (to, _) in &places {
            denied(sender, to).await;
        }
        world.grant(sender, WS, AccessLevel::Write).await;
        for (to, receiver) in &places {
            say(sender, to, "allowed").await;
            hears(receiver, "allowed").await;
        }
    }
}

#[tokio::test]
async fn a_grant_for_one_workspace_does_not_open_another() {
    let world = World::begin().await;
    let service = world.service("s").await;
    world.grant(&service, WS, AccessLevel::Write).await;
    denied(&service, Topic::agents(OTHER).unwrap()).await;
}

#[tokio::test]
async fn a_grant_to_read_is_not_enough_to_write() {
    let world = World::begin().await;
    let service = world.service("s").await;
    world.grant(&service, WS, AccessLevel::Read).await;
    denied(&service, Topic::agents(WS).unwrap()).await;
}

#[tokio::test]
async fn an_agent_may_write_into_another_workspace() {
    let world = World::begin().await;
    let (here, there) = (world.agent("a").await, world.agent_in(OTHER, "b").await);
    here.send_to_agent(OTHER, "worker", "b", "neighbour").await.unwrap();
    assert_eq!(hears(&there, "neighbour").await.source(), "ag::ws::worker::a");
}

// Access to a workspace: by rules.

#[tokio::test]
async fn a_rule_can_shut_a_user_out_of_a_workspace() {
    let world = World::begin().await;
    let (user, agent) = (world.user("alice", "w").await, world.agent("a").await);
    say(&user, place(&agent), "before").await;
    hears(&agent, "before").await;
    world.grant(&user, WS, AccessLevel::None).await;
    denied(&user, place(&agent)).await;
    world.revoke(user.identity().as_str(), WS).await;
    say(&user, place(&agent), "after").await;
    hears(&agent, "after").await;
}

#[tokio::test]
async fn a_rule_for_a_user_covers_all_of_its_windows_and_no_other_user() {
    let world = World::begin().await;
    let (agent, citizen) = (world.agent("a").await, world.user("bob", "w1").await);
    let windows = [world.user("alice", "w1").await, world.user("alice", "w2").await];
    world.grant(&windows[0], WS, AccessLevel::None).await;
    for window in &windows {
        denied(window, place(&agent)).await;
    }
    say(&citizen, place(&agent), "hello").await;
    hears(&agent, "hello").await;
}

#[tokio::test]
async fn a_rule_can_keep_an_agent_from_connecting() {
    let world = World::begin().await;
    world.grant_to("ag::ws::worker::a", "workspace", WS, AccessLevel::None).await;
    let error = world.refused(Agent::builder(WS, "worker", "a")).await;
    assert_eq!(error.kind(), Kind::Denied, "{error:?}");
    world.revoke("ag::ws::worker::a", WS).await;
    let agent = world.agent("a").await;
    done(&agent).await;
}

#[tokio::test]
async fn an_agent_that_may_read_connects_and_hears_but_does_not_write() {
    let world = World::begin().await;
    let listener = world.agent("listener").await;
    world.grant_to("ag::ws::worker::reader", "workspace", WS, AccessLevel::Read).await;
    let reader = world.agent("reader").await;
    denied(&reader, place(&listener)).await;
    say(&listener, place(&reader), "you may read this").await;
    hears(&reader, "you may read this").await;
    heard_nothing(&listener, &[&listener]).await;
}

#[tokio::test]
async fn an_agent_that_may_write_or_more_writes() {
    let world = World::begin().await;
    let listener = world.agent("listener").await;
    for (specifier, level) in [("writer", AccessLevel::Write), ("manager", AccessLevel::Manage)] {
        world.grant_to(&format!("ag::ws::worker::{specifier}"), "workspace", WS, level).await;
        let agent = world.agent(specifier).await;
        say(&agent, place(&listener), specifier).await;
        hears(&listener, specifier.to_owned()).await;
    }
}

#[tokio::test]
async fn a_rule_holds_for_who_is_connected_already() {
    let world = World::begin().await;
    let (agent, other) = (world.agent("a").await, world.agent("b").await);
    say(&agent, place(&other), "before").await;
    hears(&other, "before").await;
    world.grant(&agent, WS, AccessLevel::Read).await;
    denied(&agent, place(&other)).await;
}

#[tokio::test]
async fn a_grant_whose_time_is_over_grants_nothing() {
    let world = World::begin().await;
    let service = world.service("s").await;
    let over = AclGrantRequest {
        principal_type: "service".into(),
        principal_id: service.identity().as_str().into(),
        resource_type: "workspace".into(),
        resource_id: WS.into(),
        access_level: AccessLevel::Write as i32,
        granted_by: "conformance".into(),
        expires_at: 1,
        ..AclGrantRequest::default()
    };
    // A server may also refuse to make it.
    let _ = world.admin().await.grant(over).await;
    denied(&service, Topic::agents(WS).unwrap()).await;
}

// Requests that are for other principals.

#[tokio::test]
async fn a_user_may_not_use_keys() {
    let world = World::begin().await;
    let user = world.user_on(WS, "alice", "w").await;
    let kv = user.kv(Scope::workspace());
    let refused = [
        ("get", kv.get("k").await.map(|_| ())),
        ("put", kv.put("k", "v").await),
        ("list", kv.list("").await.map(|_| ())),
        ("delete", kv.delete("k").await),
        ("increment", kv.increment("k").await.map(|_| ())),
    ];
    for (what, refused) in refused {
        assert_eq!(refused.unwrap_err().kind(), Kind::Denied, "{what}");
    }
    done(&user).await;
}

#[tokio::test]
async fn orchestrators_and_bridges_may_not_use_keys() {
    let world = World::begin().await;
    for client in [plain(world.orchestrator("o").await), plain(world.bridge("b").await)] {
        let error = client.kv(Scope::Global).put("k", "v").await.unwrap_err();
        assert_eq!(error.kind(), Kind::Denied, "{:?}: {error:?}", client.identity());
    }
}

#[tokio::test]
async fn a_user_may_not_report_progress() {
    let world = World::begin().await;
    let (user, agent) = (world.user_on(WS, "alice", "w").await, world.agent("a").await);
    user.report(Progress::running("t").summary("almost there")).await.unwrap();
    assert_eq!(next(user.refusals()).await.code(), "ERR_INVALID_PRINCIPAL");
    world.task("t").await.report(Progress::running("t").summary("allowed")).await.unwrap();
    assert_eq!(soon(agent.progress().next()).await.unwrap().summary, "allowed");
}

// Not ported:
// - test_user_may_not_publish_to[user progress]: pg::us::{user} is no topic that can be built here.
// - test_only_users_may_switch_workspace: only User has switch_workspace here.

//! Who receives what, from whom, and what the server says about it.

use std::collections::HashSet;

use prost::Message as _;
use trunkline_client::{
    AccessLevel, Agent, Client, Kind, MessageType, Outgoing, Service, Topic, UniqueTask, Worker, proto::IncomingMessage,
};

use crate::world_messaging::{
    OTHER, WS, World, done, heard, heard_nothing, hears, next, place, plain, say, soon, texts, topic,
};

// Directed.

#[tokio::test]
async fn agents_write_to_each_other() {
    let world = World::begin().await;
    let (a, b) = (world.agent("a").await, world.agent("b").await);
    a.send(Outgoing::chat(place(&b), "ping")).await.unwrap();
    let got = hears(&b, "ping").await;
    assert_eq!((got.kind(), got.source()), (MessageType::Chat, "ag::ws::worker::a"));
    b.send(Outgoing::chat(got.sender().unwrap(), "pong")).await.unwrap();
    let back = hears(&a, "pong").await;
    assert_eq!((back.kind(), back.source()), (MessageType::Chat, "ag::ws::worker::b"));
}

#[tokio::test]
async fn the_type_of_a_message_is_carried_through() {
    let world = World::begin().await;
    let (a, b) = (world.agent("a").await, world.agent("b").await);
    use MessageType::{Chat, Control, Event, Opaque, ToolCall};
    for kind in [Chat, Control, ToolCall, Event, Opaque] {
        a.send(Outgoing::new(place(&b), "x").of(kind)).await.unwrap();
        assert_eq!(hears(&b, "x").await.kind(), kind);
    }
}

#[tokio::test]
async fn an_agent_and_a_user_write_to_each_other() {
    let world = World::begin().await;
    let (agent, user) = (world.agent("a").await, world.user("alice", "w1").await);
    user.send_to_agent(WS, "worker", "a", "question").await.unwrap();
    assert_eq!(hears(&agent, "question").await.source(), "us::alice::w1");
    agent.send_to_window("alice", "w1", "answer").await.unwrap();
    assert_eq!(hears(&user, "answer").await.source(), "ag::ws::worker::a");
}

#[tokio::test]
async fn a_message_reaches_one_window_only() {
    let world = World::begin().await;
    let agent = world.agent("a").await;
    let (left, right) = (world.user("alice", "left").await, world.user("alice", "right").await);
    say(&agent, place(&left), "for the left window").await;
    hears(&left, "for the left window").await;
    heard_nothing(&agent, &[&right]).await;
}

#[tokio::test]
async fn an_agent_and_a_unique_task_write_to_each_other() {
    let world = World::begin().await;
    let (agent, task) = (world.agent("a").await, world.task("job-1").await);
    agent.send_to_task(WS, "job", "job-1", "start").await.unwrap();
    assert_eq!(hears(&task, "start").await.source(), "ag::ws::worker::a");
    task.send_to_agent(WS, "worker", "a", "done").await.unwrap();
    assert_eq!(hears(&agent, "done").await.source(), "tu::ws::job::job-1");
}

#[tokio::test]
async fn a_worker_is_reached_under_its_assigned_id() {
    let world = World::begin().await;
    let agent = world.agent("a").await;
    let (worker, other) = (world.worker("render").await, world.worker("render").await);
    worker.send_to_agent(WS, "worker", "a", "hello").await.unwrap();
    let address = hears(&agent, "hello").await.sender().unwrap();
    assert_eq!(address, place(&worker));
    say(&agent, address, "just for you").await;
    assert_eq!(hears(&worker, "just for you").await.source(), "ag::ws::worker::a");
    heard_nothing(&agent, &[&other]).await;
}

#[tokio::test]
async fn services_and_bridges_are_written_to_and_write_back_with_a_grant() {
    let world = World::begin().await;
    let agent = world.agent("a").await;
    for guest in [plain(world.service("s").await), plain(world.bridge("b").await)] {
        let name = guest.identity();
        say(&agent, place(&guest), "request").await;
        assert_eq!(hears(&guest, "request").await.source(), "ag::ws::worker::a", "{name}");
        world.grant(&guest, WS, AccessLevel::Write).await;
        say(&guest, place(&agent), "response").await;
        assert_eq!(hears(&agent, "response").await.source(), name.as_str());
    }
}

#[tokio::test]
async fn a_message_to_any_service_reaches_one_instance() {
    let world = World::begin().await;
    let agent = world.agent("a").await;
    let instances = [world.service("pod-0").await, world.service("pod-1").await];
    agent.send_to_service("svc", None, "any of you").await.unwrap();
    done(&agent).await;
    for instance in &instances {
        say(&agent, place(instance), "marker").await;
    }
    let mut hits = 0;
    for instance in &instances {
        let message = heard(instance).await;
        if message.text() == "any of you" {
            hits += 1;
            hears(instance, "marker").await;
        }
    }
    assert_eq!(hits, 1);
}

#[tokio::test]
async fn a_message_to_any_service_without_one_is_to_be_tried_later() {
    let world = World::begin().await;
    let agent = world.agent("a").await;
    agent.send_to_service("nobody", None, "anybody?").await.unwrap();
    let told = next(agent.refusals()).await;
    let nobody = Outgoing::new(Topic::any_service("nobody").unwrap(), "anybody?");
    let answered = soon(agent.send_confirmed(nobody)).await.unwrap_err();
    for error in [told, answered] {
        assert_eq!((error.kind(), error.code()), (Kind::Unavailable, "ERR_SV_UNAVAILABLE"), "{error:?}");
        assert!(error.is_retryable());
    }
}

#[tokio::test]
async fn a_directed_message_reaches_nobody_else() {
    let world = World::begin().await;
    let (a, b, c) = (world.agent("a").await, world.agent("b").await, world.agent("c").await);
    let namesake = world.agent_in(OTHER, "b").await;
    say(&a, place(&b), "private").await;
    hears(&b, "private").await;
    heard_nothing(&a, &[&a, &b, &c, &namesake]).await;
}

#[tokio::test]
async fn an_agent_may_write_to_itself() {
    let world = World::begin().await;
    let agent = world.agent("a").await;
    agent.send(Outgoing::new(place(&agent), "note to self")).await.unwrap();
    assert_eq!(hears(&agent, "note to self").await.source(), agent.identity().as_str());
}

// The source is the server's word.

#[tokio::test]
async fn the_source_is_the_senders_identity() {
    let world = World::begin().await;
    let receiver = world.agent("receiver").await;
    let (service, bridge) = (world.service("s").await, world.bridge("b").await);
    world.grant(&service, WS, AccessLevel::Write).await;
    world.grant(&bridge, WS, AccessLevel::Write).await;
    let (agent, task, user) = (world.agent("a").await, world.task("t").await, world.user("alice", "w").await);
    let senders: [&Client; 5] = [&agent, &task, &user, &service, &bridge];
    for sender in senders {
        let name = sender.identity();
        say(sender, place(&receiver), name.as_str().to_owned()).await;
        assert_eq!(hears(&receiver, name.as_str().to_owned()).await.source(), name.as_str());
    }
}

#[tokio::test]
async fn the_source_cannot_be_forged_by_the_payload() {
    let world = World::begin().await;
    let (a, b) = (world.agent("a").await, world.agent("b").await);
    let forged = IncomingMessage {
        source_topic: "ag::other::root::0".into(),
        payload: "trust me".into(),
        message_type: MessageType::Control.into(),
        ..IncomingMessage::default()
    };
    let forged = forged.encode_to_vec();
    say(&a, place(&b), forged.clone()).await;
    let got = hears(&b, forged).await;
    assert_eq!((got.source(), got.kind()), ("ag::ws::worker::a", MessageType::Opaque));
}

#[tokio::test]
async fn a_message_names_the_workspace_of_its_sender() {
    let world = World::begin().await;
    let (a, b) = (world.agent("a").await, world.agent("b").await);
    say(&a, place(&b), "x").await;
    assert_eq!(hears(&b, "x").await.workspace(), WS);
}

// Broadcasts.

#[tokio::test]
async fn a_broadcast_to_agents_reaches_each_of_the_workspace_and_its_sender() {
    let world = World::begin().await;
    let sender = world.agent("sender").await;
    let others = [world.agent("a").await, world.agent("b").await, world.agent("c").await];
    sender.broadcast_to_agents(WS, "all hands").await.unwrap();
    for agent in others.iter().chain([&sender]) {
        assert_eq!(hears(agent, "all hands").await.source(), "ag::ws::worker::sender");
    }
}

#[tokio::test]
async fn a_broadcast_to_agents_stays_in_its_workspace_and_with_agents() {
    let world = World::begin().await;
    let (sender, inside, outside) =
        (world.agent("sender").await, world.agent("a").await, world.agent_in(OTHER, "a").await);
    let (task, user) = (world.task("t").await, world.user_on(WS, "alice", "w").await);
    say(&sender, Topic::agents(WS).unwrap(), "all hands").await;
    hears(&inside, "all hands").await;
    say(&sender, Topic::agents(OTHER).unwrap(), "to the others").await;
    hears(&outside, "to the others").await;
    heard_nothing(&sender, &[&inside, &outside, &task, &user]).await;
}

#[tokio::test]
async fn a_user_may_broadcast_to_agents() {
    let world = World::begin().await;
    let (user, agent) = (world.user("alice", "w").await, world.agent("a").await);
    say(&user, Topic::agents(WS).unwrap(), "from a human").await;
    assert_eq!(hears(&agent, "from a human").await.source(), "us::alice::w");
}

#[tokio::test]
async fn a_broadcast_to_users_reaches_each_that_is_on_the_workspace_and_nobody_else() {
    let world = World::begin().await;
    let (agent, colleague) = (world.agent("a").await, world.agent("b").await);
    let inside =
        [world.user_on(WS, "u1", "w").await, world.user_on(WS, "u2", "w").await, world.user_on(WS, "u3", "w").await];
    let (elsewhere, nowhere) = (world.user_on(OTHER, "u4", "w").await, world.user("u5", "w").await);
    agent.broadcast_to_users(WS, "dear users").await.unwrap();
    for user in &inside {
        assert_eq!(hears(user, "dear users").await.source(), "ag::ws::worker::a");
    }
    heard_nothing(&agent, &[&elsewhere, &nowhere, &colleague, &agent]).await;
}

#[tokio::test]
async fn a_message_to_a_user_on_a_workspace_reaches_its_windows_there() {
    let world = World::begin().await;
    let agent = world.agent("a").await;
    let (here, also_here) = (world.user_on(WS, "alice", "w1").await, world.user_on(WS, "alice", "w2").await);
    let (away, other) = (world.user_on(OTHER, "alice", "w3").await, world.user_on(WS, "bob", "w").await);
    agent.send_to_user_in("alice", WS, "for you, here").await.unwrap();
    hears(&here, "for you, here").await;
    hears(&also_here, "for you, here").await;
    heard_nothing(&agent, &[&away, &other]).await;
}

#[tokio::test]
async fn a_message_to_a_user_reaches_all_windows_wherever_they_are() {
    let world = World::begin().await;
    let service = world.service("s").await;
    let windows = [
        world.user_on(WS, "alice", "w1").await,
        world.user_on(OTHER, "alice", "w2").await,
        world.user("alice", "w3").await,
    ];
    let stranger = world.user_on(WS, "bob", "w").await;
    service.send_to_user("alice", "password changed").await.unwrap();
    for window in &windows {
        assert_eq!(hears(window, "password changed").await.source(), "sv::svc::s");
    }
    heard_nothing(&service, &[&stranger]).await;
}

// Work for any worker.

#[tokio::test]
async fn work_goes_to_exactly_one_worker() {
    let world = World::begin().await;
    let agent = world.agent("a").await;
    let workers = [world.worker("render").await, world.worker("render").await, world.worker("render").await];
    let frames: HashSet<String> = (0..12).map(|n| format!("frame {n}")).collect();
    for frame in &frames {
        agent.send_to_task(WS, "render", "", frame.clone()).await.unwrap();
    }
    done(&agent).await;
    let mut taken = Vec::new();
    let mut arrivals = futures_util::stream::select_all(workers.iter().map(|worker| worker.messages()));
    while taken.len() < frames.len() {
        let message = soon(futures_util::StreamExt::next(&mut arrivals)).await.unwrap();
        assert_eq!(message.source(), "ag::ws::worker::a");
        taken.push(message.text().into_owned());
    }
    assert_eq!(taken.iter().cloned().collect::<HashSet<_>>(), frames);
    // None comes twice.
    drop(arrivals);
    heard_nothing(&agent, &[&workers[0], &workers[1], &workers[2]]).await;
}

#[tokio::test]
async fn work_does_not_reach_other_implementations_or_unique_tasks() {
    let world = World::begin().await;
    let (agent, worker) = (world.agent("a").await, world.worker("render").await);
    let other_kind = world.worker("encode").await;
    let unique = world.connect(UniqueTask::builder(WS, "render", "job-1")).await;
    let elsewhere = world.connect(Worker::builder(OTHER, "render")).await;
    say(&agent, Topic::any_task(WS, "render").unwrap(), "frame").await;
    hears(&worker, "frame").await;
    heard_nothing(&agent, &[&other_kind, &unique, &elsewhere]).await;
}

// Topics that do not exist.

#[test]
fn topics_that_do_not_exist_cannot_be_built() {
    let long = format!("ag::{}", "x".repeat(253));
    let bad = ["", "nonsense", "zz::ws::impl::spec", "::ws::impl::spec", "AG::ws::impl::spec", &long];
    for bad in bad {
        let error = bad.parse::<Topic>().unwrap_err();
        assert_eq!(error.kind(), Kind::Invalid, "{bad:?}");
    }
}

#[tokio::test]
async fn a_topic_that_nothing_can_be_sent_to_is_refused_and_nothing_more() {
    let world = World::begin().await;
    let agent = world.agent("a").await;
    for bad in ["orc::i::s", "wfe::shard0", "metrics::shard0"] {
        agent.send(Outgoing::new(topic(bad), "to nowhere")).await.unwrap();
        let error = next(agent.refusals()).await;
        assert_eq!((error.kind(), error.code()), (Kind::Invalid, "ERR_INVALID_TOPIC"), "{bad}: {error:?}");
        say(&agent, place(&agent), "still fine").await;
        hears(&agent, "still fine").await;
    }
}

// By the helpers of each principal.

#[tokio::test]
async fn what_is_sent_to_agents_has_the_type_that_is_published_for_its_sender() {
    let world = World::begin().await;
    let receiver = world.agent("receiver").await;
    let (engine, orchestrator) = (world.engine().await, world.orchestrator("o").await);
    world.grant(&engine, WS, AccessLevel::Write).await;
    world.grant(&orchestrator, WS, AccessLevel::Write).await;
    engine.send_to_agent(WS, "worker", "receiver", "1").await.unwrap();
    assert_eq!(hears(&receiver, "1").await.kind(), MessageType::Control);
    orchestrator.send_to_agent(WS, "worker", "receiver", "2").await.unwrap();
    assert_eq!(hears(&receiver, "2").await.kind(), MessageType::Control);
    world.task("t").await.send_to_agent(WS, "worker", "receiver", "3").await.unwrap();
    assert_eq!(hears(&receiver, "3").await.kind(), MessageType::Opaque);
}

#[tokio::test]
async fn a_handler_hears_messages_in_order() {
    let world = World::begin().await;
    let a = world.agent("a").await;
    let echo = world.agent("b").await;
    let hand = echo.clone();
    echo.on_message(move |message| {
        let hand = hand.clone();
        async move { hand.send(Outgoing::new(message.sender().unwrap(), message.payload().clone())).await }
    });
    for text in ["one", "two", "three"] {
        a.send_to_agent(WS, "worker", "b", text).await.unwrap();
    }
    assert_eq!(texts(&a, 3).await, ["one", "two", "three"]);
}

#[tokio::test]
async fn a_service_notifies_every_window_of_a_user() {
    let world = World::begin().await;
    let windows = [world.user("alice", "w1").await, world.user("alice", "w2").await];
    let service = world.connect(Service::builder("news", "pod")).await;
    service.send_to_user("alice", "news").await.unwrap();
    for window in &windows {
        hears(window, "news").await;
    }
    let agent = world.connect(Agent::builder(WS, "i", "s")).await;
    agent.send_to_service("news", Some("pod"), "thanks").await.unwrap();
    assert_eq!(hears(&service, "thanks").await.source(), "ag::ws::i::s");
}

// Not ported:
// - test_unknown_topic_is_an_error_and_nothing_more, test_sdk_reports_a_refused_send_through_on_error: their topics cannot
//   be built here, which topics_that_do_not_exist_cannot_be_built shows; the old dotted form is read as what it means.
// - test_sdk_agents_talk_and_typed_callbacks_fire: there is one handler for all types here.

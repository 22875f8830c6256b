//! Events flow to the workflow engine, metrics to the metrics bridge.

use std::collections::HashMap;

use prost::Message as _;
use trunkline_client::{
    AccessLevel, Client, Kind, MessageType, MetricBuilder, Outgoing, Topic, WorkflowEngine,
    proto::{Metric, MetricEntry},
};

use crate::world_messaging::{
    OTHER, WS, World, denied, done, heard, heard_nothing, hears, next, place, plain, say, soon, texts, topic,
};

async fn publish(from: &Client, to: Topic, metric: &Metric) -> trunkline_client::Result<()> {
    soon(from.send_confirmed(Outgoing::new(to, metric.encode_to_vec()).of(MessageType::Metric))).await
}

fn metric(name: &str, qty: f64) -> Metric {
    MetricBuilder::new().trace(format!("trace of {name}")).add(name, "count", qty).build()
}

/// The next metric, which is this one.
async fn arrives(bridge: &Client, metric: &Metric) -> String {
    let message = heard(bridge).await;
    assert_eq!(message.kind(), MessageType::Metric);
    assert_eq!(message.metric().unwrap(), *metric);
    message.source().to_owned()
}

// Events.

#[tokio::test]
async fn an_event_reaches_the_workflow_engine() {
    let world = World::begin().await;
    let engine = world.engine().await;
    let (agent, task) = (world.agent("a").await, world.task("t").await);
    let (worker, service) = (world.worker("job").await, world.service("s").await);
    agent.send_event("by the agent").await.unwrap();
    let event = hears(&engine, "by the agent").await;
    assert_eq!((event.kind(), event.source()), (MessageType::Event, agent.identity().as_str()));
    task.send_event("by the task").await.unwrap();
    assert_eq!(hears(&engine, "by the task").await.source(), task.identity().as_str());
    worker.send_event("by the worker").await.unwrap();
    assert_eq!(hears(&engine, "by the worker").await.source(), worker.identity().as_str());
    service.send_event("by the service").await.unwrap();
    assert_eq!(hears(&engine, "by the service").await.source(), service.identity().as_str());
}

#[tokio::test]
async fn every_spelling_of_the_topic_of_events_works() {
    let world = World::begin().await;
    let (engine, agent) = (world.engine().await, world.agent("a").await);
    for to in [Topic::events(), Topic::events_of(WS).unwrap(), topic("event::receiver0")] {
        say(&agent, &to, to.as_str().to_owned()).await;
        hears(&engine, to.as_str().to_owned()).await;
    }
}

#[tokio::test]
async fn events_keep_their_order() {
    let world = World::begin().await;
    let (engine, agent) = (world.engine().await, world.agent("a").await);
    let numbers: Vec<String> = (0..30).map(|n| n.to_string()).collect();
    for number in &numbers {
        agent.send_event(number.clone()).await.unwrap();
    }
    assert_eq!(texts(&engine, 30).await, numbers);
}

#[tokio::test]
async fn an_event_reaches_neither_agents_nor_the_metrics_bridge() {
    let world = World::begin().await;
    let (engine, metrics) = (world.engine().await, world.metrics().await);
    let (sender, colleague) = (world.agent("a").await, world.agent("b").await);
    sender.send_event("event").await.unwrap();
    hears(&engine, "event").await;
    heard_nothing(&sender, &[&colleague]).await;
    let marker = metric("marker", 1.0);
    sender.send_metric(marker.clone()).await.unwrap();
    arrives(&metrics, &marker).await;
}

#[tokio::test]
async fn an_event_for_another_workspace_takes_the_capability() {
    let world = World::begin().await;
    let agent = world.agent("a").await;
    let elsewhere = Topic::events_of(OTHER).unwrap();
    // Also without an engine.
    denied(&agent, &elsewhere).await;
    let engine = world.engine().await;
    denied(&agent, &elsewhere).await;
    let name = agent.identity();
    world.grant_to(name.as_str(), "capability", "capability/event_broadcast", AccessLevel::Write).await;
    say(&agent, &elsewhere, "allowed").await;
    hears(&engine, "allowed").await;
}

#[tokio::test]
async fn events_wait_for_the_workflow_engine() {
    let world = World::begin().await;
    let engine = world.engine().await;
    done(&engine).await;
    soon(engine.close()).await;
    let agent = world.agent("a").await;
    agent.send_event("while it is away").await.unwrap();
    let engine = world.engine().await;
    hears(&engine, "while it is away").await;
}

#[tokio::test]
async fn the_workflow_engine_commands_where_it_was_granted() {
    let world = World::begin().await;
    let (engine, agent) = (world.engine().await, world.agent("a").await);
    denied(&engine, place(&agent)).await;
    world.grant(&engine, WS, AccessLevel::Write).await;
    engine.send_to_agent(WS, "worker", "a", "do it").await.unwrap();
    assert_eq!(hears(&agent, "do it").await.kind(), MessageType::Control);
}

#[tokio::test]
async fn the_workflow_engine_reaches_every_window_and_signs_with_its_topic() {
    let world = World::begin().await;
    let engine: WorkflowEngine = world.engine().await;
    let windows = [world.user("alice", "w1").await, world.user_on(WS, "alice", "w2").await];
    engine.send_to_user("alice", "news").await.unwrap();
    for window in &windows {
        assert_eq!(hears(window, "news").await.source(), "event::receiver0");
    }
    engine.send_to_window("alice", "w1", "for one").await.unwrap();
    assert_eq!(hears(&windows[0], "for one").await.source(), "event::receiver0");
}

// Metrics.

#[tokio::test]
async fn a_metric_reaches_the_metrics_bridge_unchanged() {
    let world = World::begin().await;
    let bridge = world.metrics().await;
    let sent = MetricBuilder::new()
        .trace("t-1")
        .add("tokens", "llm", 12.5)
        .add("calls", "count", 1.0)
        .tag("model", "small")
        .client_timestamp_ms(1_700_000_000_123)
        .build();
    let (agent, task) = (world.agent("a").await, world.task("t").await);
    let (worker, service) = (world.worker("job").await, world.service("s").await);
    agent.send_metric(sent.clone()).await.unwrap();
    assert_eq!(arrives(&bridge, &sent).await, agent.identity().as_str());
    task.send_metric(sent.clone()).await.unwrap();
    assert_eq!(arrives(&bridge, &sent).await, task.identity().as_str());
    worker.send_metric(sent.clone()).await.unwrap();
    assert_eq!(arrives(&bridge, &sent).await, worker.identity().as_str());
    service.send_metric(sent.clone()).await.unwrap();
    assert_eq!(arrives(&bridge, &sent).await, service.identity().as_str());
}

#[tokio::test]
async fn every_spelling_of_the_topic_of_metrics_works() {
    let world = World::begin().await;
    let (bridge, agent) = (world.metrics().await, world.agent("a").await);
    for to in [Topic::metrics(), Topic::metrics_of(WS).unwrap(), topic("metric::receiver0")] {
        let sent = metric(to.as_str(), 1.0);
        publish(&agent, to, &sent).await.unwrap();
        arrives(&bridge, &sent).await;
    }
}

#[tokio::test]
async fn a_metric_reaches_neither_agents_nor_the_workflow_engine() {
    let world = World::begin().await;
    let (engine, bridge) = (world.engine().await, world.metrics().await);
    let (sender, colleague) = (world.agent("a").await, world.agent("b").await);
    let sent = metric("m", 1.0);
    sender.send_metric(sent.clone()).await.unwrap();
    arrives(&bridge, &sent).await;
    heard_nothing(&sender, &[&colleague]).await;
    sender.send_event("marker").await.unwrap();
    hears(&engine, "marker").await;
}

#[tokio::test]
async fn a_metric_at_the_limit_of_entries_is_accepted() {
    let world = World::begin().await;
    let (bridge, agent) = (world.metrics().await, world.agent("a").await);
    let sent = (0..1024).fold(MetricBuilder::new(), |metric, n| metric.add(format!("m{n}"), "count", f64::from(n)));
    let sent = sent.build();
    agent.send_metric(sent.clone()).await.unwrap();
    arrives(&bridge, &sent).await;
}

fn bad_metrics() -> Vec<(&'static str, Metric, &'static str)> {
    let entry = MetricEntry { name: "m".into(), qty: 1.0, ..MetricEntry::default() };
    let many = Metric { entries: vec![entry.clone(); 1025], ..Metric::default() };
    let tags: HashMap<String, String> = (0..65).map(|n| (n.to_string(), String::new())).collect();
    let tagged = Metric { entries: vec![entry], metadata: tags, ..Metric::default() };
    let one_of_two = MetricBuilder::new().add("a", "count", 1.0).add("b", "count", -0.5).build();
    vec![
        ("no entries", Metric { trace_id: "t".into(), ..Metric::default() }, "ERR_METRIC_EMPTY"),
        ("1025 entries", many, "ERR_METRIC_EMPTY"),
        ("65 metadata keys", tagged, "ERR_METRIC_INVALID"),
        ("entry without name", metric("", 1.0), "ERR_METRIC_INVALID_ENTRY"),
        ("not a number", metric("m", f64::NAN), "ERR_METRIC_INVALID_ENTRY"),
        ("infinite", metric("m", f64::INFINITY), "ERR_METRIC_INVALID_ENTRY"),
        ("negative", metric("m", -1.0), "ERR_METRIC_NEGATIVE_FORBIDDEN"),
        ("one negative of two", one_of_two, "ERR_METRIC_NEGATIVE_FORBIDDEN"),
    ]
}

#[tokio::test]
async fn a_malformed_metric_is_refused_and_does_not_arrive() {
    let world = World::begin().await;
    let (bridge, agent) = (world.metrics().await, world.agent("a").await);
    for (what, bad, code) in bad_metrics() {
        assert_eq!(publish(&agent, Topic::metrics(), &bad).await.unwrap_err().code(), code, "{what}");
        agent.send_metric(bad).await.unwrap();
        assert_eq!(next(agent.refusals()).await.code(), code, "{what}");
        done(&agent).await;
    }
    for (payload, code) in [(&b"\xff\xff\xff\xff"[..], "ERR_METRIC_INVALID"), (b"", "ERR_METRIC_EMPTY")] {
        let no_metric = Outgoing::new(Topic::metrics(), payload).of(MessageType::Metric);
        assert_eq!(soon(agent.send_confirmed(no_metric)).await.unwrap_err().code(), code, "{payload:?}");
    }
    let good = metric("good", 1.0);
    agent.send_metric(good.clone()).await.unwrap();
    arrives(&bridge, &good).await;
}

#[tokio::test]
async fn a_negative_metric_takes_the_credit_capability() {
    let world = World::begin().await;
    let (bridge, agent) = (world.metrics().await, world.agent("a").await);
    let name = agent.identity();
    world.grant_to(name.as_str(), "capability", "capability/metric_credit", AccessLevel::Admin).await;
    let credit = metric("tokens", -3.0);
    agent.send_metric(credit.clone()).await.unwrap();
    arrives(&bridge, &credit).await;
}

#[tokio::test]
async fn a_metric_for_another_workspace_takes_the_capability() {
    let world = World::begin().await;
    let agent = world.agent("a").await;
    let error = publish(&agent, Topic::metrics_of(OTHER).unwrap(), &metric("m", 1.0)).await.unwrap_err();
    assert_eq!((error.kind(), error.code()), (Kind::Denied, "ERR_PERMISSION_DENIED"));
    done(&agent).await;
}

#[tokio::test]
async fn an_event_that_is_json_is_read_as_json() {
    let world = World::begin().await;
    let (engine, agent) = (world.engine().await, plain(world.agent("a").await));
    let order = serde_json::json!({"type": "order.placed", "id": 17});
    agent.send(Outgoing::json(Topic::events(), &order).unwrap().of(MessageType::Event)).await.unwrap();
    assert_eq!(heard(&engine).await.json::<serde_json::Value>().unwrap(), order);
}

// Not ported:
// - test_sdk_*: they prove the published Python client; the helpers and the builder that they use are used above.

//! What operators are shown, and clients are told when they connect, is so.

use std::time::Duration;

use futures_util::FutureExt as _;
use trunkline::{Config, Server};
use trunkline_client::{
    AccessLevel, Kind, Orchestrator,
    admin::{Admin, ConnectionFilter, grant, principal},
    kv::Scope,
};
use trunkline_proto::v1::{
    BridgeIdentity, InitConnection, MessageType, MetricsBridgeIdentity, ProgressReport, SendMessage, UserIdentity,
    WorkflowEngineIdentity, downstream_message::Payload as Down, init_connection::ClientType,
    upstream_message::Payload as Up,
};

use crate::client::{Client, agent, lane, server};

async fn admin(server: &Server) -> trunkline_client::Client {
    let who = Orchestrator::builder("desk").specifier("one").profile("none");
    who.address(server.addresses().grpc.to_string()).connect().await.unwrap().into()
}

fn now_s() -> i64 {
    std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap().as_secs() as i64
}

async fn total(admin: &Admin) -> i64 {
    admin.get_workspace("ws").await.unwrap().total_messages
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_is_there_where_from_and_what_flows() {
    let dir = tempfile::tempdir().unwrap();
    let server = server(dir.path()).await;
    let client = admin(&server).await;
    let admin = client.admin();
    let mut ann = Client::connect(server.addresses().grpc, agent("ann")).await.unwrap();
    let bob = Client::connect(server.addresses().grpc, agent("bob")).await.unwrap();
    for (target, count) in [(lane("bob"), 3), ("ga::ws".to_owned(), 2)] {
        for _ in 0..count {
            ann.send(&target, "hi").await;
        }
    }
    ann.send("nonsense", "hi").await;
    assert_eq!(ann.error().await.code, "ERR_INVALID_TOPIC");
    ann.barrier().await;
    let (sessions, _) = admin.sessions(ConnectionFilter::default()).await.unwrap();
    let one = sessions.iter().find(|one| one.identity == lane("ann")).unwrap();
    assert_eq!(one.remote_addr, "127.0.0.1");
    assert!((now_s() - one.last_activity).abs() <= 2 && one.last_activity >= one.connected_at, "{one:?}");
    let flow = admin.message_flow("ws").await.unwrap();
    let edges: Vec<_> = flow.edges.iter().map(|edge| (&*edge.from, &*edge.to, edge.count)).collect();
    let (ann_lane, bob_lane) = (lane("ann"), lane("bob"));
    assert_eq!(edges, [(&*ann_lane, &*bob_lane, 3), (&*ann_lane, "ga::ws", 2)]);
    assert_eq!(flow.nodes.len(), 2);
    assert_eq!(total(&admin).await, 5);
    assert!(admin.info().await.unwrap().num_goroutines > 0);
    // Samples are taken once a second.
    let begun = std::time::Instant::now();
    while admin.stats().await.unwrap().messages_per_second <= 0.0 {
        assert!(begun.elapsed() < Duration::from_secs(10));
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    ann.close().await;
    // What is over still counts, and does not flow.
    assert_eq!((total(&admin).await, admin.message_flow("ws").await.unwrap().edges), (5, Vec::new()));
    let seen = client.connection_status(principal("agent", &lane("ann"))).await.unwrap();
    assert!(!seen.is_connected && (now_s() - seen.last_seen_s).abs() <= 2, "{seen:?}");
    let never = client.connection_status(principal("agent", &lane("eve"))).await.unwrap();
    assert_eq!((never.is_connected, never.last_seen_s), (false, 0));
    assert_eq!(client.connection_status(principal("user", "ann")).await.unwrap().last_seen_s, 0);
    let user = UserIdentity { user_id: "ann".into(), window_id: "w".into() };
    let user = InitConnection { client_type: Some(ClientType::User(user)), ..InitConnection::default() };
    Client::connect(server.addresses().grpc, user).await.unwrap().close().await;
    let seen = client.connection_status(principal("user", "ann")).await.unwrap();
    assert!(!seen.is_connected && (now_s() - seen.last_seen_s).abs() <= 2, "{seen:?}");
    drop(bob);
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_comes_is_told_the_shared_keys_that_it_may_read() {
    let dir = tempfile::tempdir().unwrap();
    let server = server(dir.path()).await;
    let client = admin(&server).await;
    let rules = client.admin();
    let config = async |name: &str| {
        let mut one = Client::connect(server.addresses().grpc, agent(name)).await.unwrap();
        let Some(Down::Config(config)) = one.next().await.unwrap() else { panic!("a snapshot") };
        let names = |all: &std::collections::HashMap<String, bytes::Bytes>| {
            let mut names: Vec<_> = all.keys().cloned().collect();
            names.sort();
            names
        };
        (names(&config.kv), names(&config.global_kv))
    };
    for scope in ["global", "workspace"] {
        let writer = principal("agent", &lane("writer"));
        rules.grant(grant(&writer, "kv_scope", scope, AccessLevel::Write)).await.unwrap();
    }
    let writer = trunkline_client::Agent::builder("ws", "impl", "writer");
    let writer: trunkline_client::Client =
        writer.address(server.addresses().grpc.to_string()).connect().await.unwrap().into();
    writer.kv(Scope::Global).put("everywhere", "1").await.unwrap();
    writer.kv(Scope::Workspace(None)).put("here", "2").await.unwrap();
    writer.close().await;
    assert_eq!(config("writer").await, (vec!["here".to_owned()], vec!["everywhere".to_owned()]));
    assert_eq!(config("stranger").await, (Vec::new(), Vec::new()));
    let reader = principal("agent", &lane("reader"));
    rules.grant(grant(&reader, "kv_scope", "global", AccessLevel::Read)).await.unwrap();
    assert_eq!(config("reader").await, (Vec::new(), vec!["everywhere".to_owned()]));
    rules.grant(grant(&reader, "kv_key", "everywhere", AccessLevel::None)).await.unwrap();
    assert_eq!(config("reader").await, (Vec::new(), Vec::new()));
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn metrics_may_be_json_and_the_bridge_is_told() {
    let dir = tempfile::tempdir().unwrap();
    let server = server(dir.path()).await;
    let grpc = server.addresses().grpc;
    let bridge = ClientType::MetricsBridge(MetricsBridgeIdentity::default());
    let bridge = InitConnection { client_type: Some(bridge), ..InitConnection::default() };
    let mut bridge = Client::connect(grpc, bridge).await.unwrap();
    let mut one = Client::connect(grpc, agent("one")).await.unwrap();
    let publish = async |one: &Client, payload: &'static [u8]| {
        let message_type = MessageType::Metric.into();
        let (target_topic, payload) = ("metric::*".to_owned(), payload.into());
        one.put(Up::Send(SendMessage { target_topic, payload, message_type, ..SendMessage::default() })).await;
    };
    publish(&one, br#" {"cpu": 0.4}"#).await;
    let told = bridge.message().await;
    assert_eq!((&told.payload[..], told.message_type), (&br#" {"cpu": 0.4}"#[..], MessageType::Metric.into()));
    assert_eq!(told.about.unwrap().entries["content_type"], "application/json");
    for (wrong, code) in [
        (&br#"{"tokens": [1, {"of": -3}]}"#[..], "ERR_METRIC_NEGATIVE_FORBIDDEN"),
        (br#"{"tokens": -1, "tokens": 1}"#, "ERR_METRIC_NEGATIVE_FORBIDDEN"),
        (b"{}", "ERR_METRIC_EMPTY"),
        (b"{\"cpu\": 0.4", "ERR_METRIC_INVALID"),
        (b"cpu=0.4", "ERR_METRIC_INVALID"),
    ] {
        publish(&one, wrong).await;
        assert_eq!(one.error().await.code, code, "{wrong:?}");
    }
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_engine_and_bridges_reach_every_workspace_by_a_fallback() {
    let dir = tempfile::tempdir().unwrap();
    let server = server(dir.path()).await;
    let grpc = server.addresses().grpc;
    let rules = admin(&server).await.admin();
    let mut one = Client::connect(grpc, agent("one")).await.unwrap();
    let engine = ClientType::WorkflowEngine(WorkflowEngineIdentity::default());
    let bridge = BridgeIdentity { implementation: "relay".into(), specifier: "main".into() };
    let init = |client_type| InitConnection { client_type: Some(client_type), ..InitConnection::default() };
    let mut engine = Client::connect(grpc, init(engine)).await.unwrap();
    let mut bridge = Client::connect(grpc, init(ClientType::Bridge(bridge))).await.unwrap();
    for (number, sender, category) in
        [(1, &mut engine, "workflow_engine_workspace"), (2, &mut bridge, "bridge_workspace")]
    {
        sender.send(&lane("one"), "0").await;
        assert_eq!(sender.error().await.code, "ERR_PERMISSION_DENIED");
        rules.set_fallback(category, AccessLevel::Write, "").await.unwrap();
        sender.send(&lane("one"), number.to_string()).await;
        assert_eq!(one.numbers(1).await, [number]);
        rules.set_fallback(category, AccessLevel::None, "").await.unwrap();
        sender.send(&lane("one"), "0").await;
        assert_eq!(sender.error().await.code, "ERR_PERMISSION_DENIED");
    }
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn names_with_dots_are_refused_with_the_right_form() {
    let dir = tempfile::tempdir().unwrap();
    let server = server(dir.path()).await;
    let mut one = Client::connect(server.addresses().grpc, agent("one")).await.unwrap();
    one.send("us.alice.tab-1", "hi").await;
    let refused = one.error().await;
    assert_eq!(refused.code, "ERR_INVALID_TOPIC");
    assert!(refused.message.contains("us::alice::tab-1"), "{refused:?}");
    let report = ProgressReport { recipient: "us.alice.tab-1".into(), ..ProgressReport::default() };
    one.put(Up::Progress(report.into())).await;
    let refused = one.error().await;
    assert!(refused.message.contains("us::alice::tab-1"), "{refused:?}");
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_switched_off_is_no_failure() {
    let dir = tempfile::tempdir().unwrap();
    let mut config = Config { data_dir: dir.path().to_owned(), dev: true, ..Config::on_free_ports() };
    config.tasks.begin_seconds = 0;
    let server = Server::start(config).await.unwrap();
    // By then, everything that ends at once has ended.
    let mut one = Client::connect(server.addresses().grpc, agent("one")).await.unwrap();
    one.barrier().await;
    assert!(server.failed().now_or_never().is_none());
    assert_eq!(admin(&server).await.admin().get_session("none").await.unwrap_err().kind(), Kind::NotFound);
    server.stop().await;
}

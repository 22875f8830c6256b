//! What the server holds for one client is bounded in bytes, and what a client gets fits a frame.

use std::time::Duration;

use trunkline_proto::v1::{
    self as wire,
    downstream_message::Payload as Down,
    init_connection::ClientType,
    kv_operation::{OpType, Scope},
    upstream_message::Payload as Up,
};

use crate::{
    client::{Client, agent, server},
    ops::get,
};

const MIB: usize = 1024 * 1024;

fn key(op: OpType, name: &str, value: Vec<u8>) -> Up {
    Up::KvOp(Box::new(wire::KvOperation {
        op: op.into(),
        scope: Scope::WorkspaceExclusive.into(),
        key: name.into(),
        value: value.into(),
        request_id: name.into(),
        ..Default::default()
    }))
}

async fn kv(client: &mut Client) -> wire::KvResponse {
    loop {
        match client.next().await.unwrap().unwrap() {
            Down::Config(_) => {}
            Down::Kv(reply) => return *reply,
            other => panic!("expected a reply, got {other:?}"),
        }
    }
}

fn orchestrator() -> wire::InitConnection {
    let identity =
        wire::OrchestratorIdentity { implementation: "o".into(), specifier: "1".into(), ..Default::default() };
    wire::InitConnection { client_type: Some(ClientType::Orchestrator(identity)), ..Default::default() }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_client_that_does_not_read_has_little_read_for_it_and_gets_all_when_it_does() {
    const GETS: usize = 150;
    let dir = tempfile::tempdir().unwrap();
    let server = server(dir.path()).await;
    let (grpc, ops) = (server.addresses().grpc, server.addresses().ops);
    let bytes = async || {
        let (_, text) = get(ops, "/metrics").await;
        let line = text.lines().find_map(|line| line.strip_prefix("trunkline_agent_replies_bytes ").map(str::to_owned));
        line.expect("the figure").parse::<usize>().unwrap()
    };
    let mut client = Client::connect(grpc, agent("one")).await.unwrap();
    client.put(key(OpType::Put, "k", vec![7; MIB - 1024])).await;
    assert!(kv(&mut client).await.success);
    for _ in 0..GETS {
        client.put(key(OpType::Get, "k", Vec::new())).await;
    }
    let mut most = 0;
    while most < 31 * MIB {
        most = most.max(bytes().await);
        tokio::task::yield_now().await;
    }
    for _ in 0..GETS {
        assert_eq!(kv(&mut client).await.value.len(), MIB - 1024);
        most = most.max(bytes().await);
    }
    assert!(most < 34 * MIB, "{most}");
    client.barrier().await;
    let given_back = async {
        while bytes().await > 0 {
            tokio::task::yield_now().await;
        }
    };
    tokio::time::timeout(Duration::from_secs(10), given_back).await.expect("nothing is out any more");
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_agent_with_more_keys_than_a_frame_connects_and_hears_of_it() {
    let dir = tempfile::tempdir().unwrap();
    let server = server(dir.path()).await;
    let grpc = server.addresses().grpc;
    let mut client = Client::connect(grpc, agent("one")).await.unwrap();
    for n in 0..5 {
        client.put(key(OpType::Put, &format!("k{n}"), vec![7; 1_000_000])).await;
        assert!(kv(&mut client).await.success);
    }
    client.close().await;
    let mut client = Client::connect_when_free(grpc, agent("one")).await;
    let Some(Down::Config(config)) = client.next().await.unwrap() else { panic!("a snapshot") };
    let mut keys: Vec<_> = config.workspace_exclusive_kv.keys().cloned().collect();
    keys.sort();
    assert_eq!((keys, config.incomplete), (vec!["k0".to_owned(), "k1".into(), "k2".into()], true));
    // A listing, which takes a rule, tells all of them page by page.
    let mut admin = Client::connect(grpc, orchestrator()).await.unwrap();
    let rule = wire::AclGrantRequest {
        principal_type: "agent".into(),
        principal_id: crate::client::lane("one"),
        resource_type: "kv_scope".into(),
        resource_id: "workspace-exclusive".into(),
        access_level: 10,
        ..Default::default()
    };
    let op = wire::acl_operation::OpType::Grant.into();
    admin.put(Up::AclOp(Box::new(wire::AclOperation { op, grant_request: Some(rule), ..Default::default() }))).await;
    let Some(Down::Acl(reply)) = admin.next().await.unwrap() else { panic!("a reply") };
    assert!(reply.success, "{}", reply.error);
    let (mut cursor, mut listed) = (String::new(), Vec::new());
    loop {
        let (op, scope) = (OpType::List.into(), Scope::WorkspaceExclusive.into());
        client.put(Up::KvOp(Box::new(wire::KvOperation { op, scope, cursor, ..Default::default() }))).await;
        let page = kv(&mut client).await;
        assert!(page.success);
        listed.extend(page.keys);
        cursor = page.next_cursor;
        if cursor.is_empty() {
            break;
        }
    }
    assert_eq!(listed, ["k0", "k1", "k2", "k3", "k4"]);
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_list_without_a_limit_is_cut_to_a_frame_and_says_how_much_there_is() {
    const PROGRAMS: usize = 24;
    let dir = tempfile::tempdir().unwrap();
    let server = server(dir.path()).await;
    let mut admin = Client::connect(server.addresses().grpc, orchestrator()).await.unwrap();
    for n in 0..PROGRAMS {
        let program = wire::AgentRegistrationInfo {
            implementation: format!("p{n:02}"),
            description: "x".repeat(240 * 1024),
            launch_params: [("profile".to_owned(), "p".to_owned())].into(),
            ..Default::default()
        };
        let op = wire::agent_operation::OpType::Register.into();
        admin.put(Up::AgentOp(Box::new(wire::AgentOperation { op, agent: Some(program), ..Default::default() }))).await;
        let Some(Down::Agent(reply)) = admin.next().await.unwrap() else { panic!("a reply") };
        assert!(reply.success, "{}", reply.error);
    }
    let mut found = Vec::new();
    while found.len() < PROGRAMS {
        let filter = Some(wire::AgentFilter { offset: found.len() as i32, ..Default::default() });
        let op = wire::agent_operation::OpType::List.into();
        admin.put(Up::AgentOp(Box::new(wire::AgentOperation { op, filter, ..Default::default() }))).await;
        let Some(Down::Agent(reply)) = admin.next().await.unwrap() else { panic!("a reply") };
        assert_eq!((reply.success, reply.total_count as usize), (true, PROGRAMS));
        assert!(!reply.agents.is_empty() && reply.agents.len() < PROGRAMS);
        found.extend(reply.agents.into_iter().map(|agent| agent.implementation));
    }
    assert_eq!(found, (0..PROGRAMS).map(|n| format!("p{n:02}")).collect::<Vec<_>>());
    server.stop().await;
}

//! What principals report is kept as they told it, stamped by the server, and found again by those who may look.

use trunkline::{Config, Server};
use trunkline_core::limits::Limits;
use trunkline_proto::v1::{
    AuditEntry, AuditQuery, AuditQueryResponse, InitConnection, OrchestratorIdentity, SubmitAuditEventRequest,
    SubmitAuditEventResponse, downstream_message::Payload as Down, init_connection::ClientType,
    upstream_message::Payload as Up,
};

use crate::client::{Client, agent, server};

fn admin() -> InitConnection {
    let orchestrator =
        OrchestratorIdentity { implementation: "o".into(), specifier: "1".into(), ..OrchestratorIdentity::default() };
    InitConnection { client_type: Some(ClientType::Orchestrator(orchestrator)), ..InitConnection::default() }
}

fn event(operation: &str) -> SubmitAuditEventRequest {
    SubmitAuditEventRequest {
        event_type: "task".into(),
        operation: operation.into(),
        success: true,
        client_request_id: operation.into(),
        ..SubmitAuditEventRequest::default()
    }
}

async fn submit(client: &mut Client, event: SubmitAuditEventRequest) -> SubmitAuditEventResponse {
    client.put(Up::SubmitAuditEvent(event.into())).await;
    loop {
        match client.next().await.unwrap() {
            Some(Down::SubmitAuditEventResponse(reply)) => return *reply,
            Some(Down::Config(_)) => {}
            other => panic!("expected a reply, got {other:?}"),
        }
    }
}

async fn query(client: &mut Client, query: AuditQuery) -> AuditQueryResponse {
    client.put(Up::AuditQuery(query.into())).await;
    loop {
        match client.next().await.unwrap() {
            Some(Down::AuditResponse(reply)) => return *reply,
            Some(Down::Config(_)) => {}
            other => panic!("expected a reply, got {other:?}"),
        }
    }
}

async fn found(client: &mut Client, wanted: AuditQuery) -> Vec<AuditEntry> {
    let reply = query(client, wanted).await;
    assert!(reply.success, "{}", reply.error);
    reply.entries
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn events_are_kept_as_told_and_stamped() {
    let dir = tempfile::tempdir().unwrap();
    let server = server(dir.path()).await;
    let grpc = server.addresses().grpc;
    let mut one = Client::connect(grpc, agent("one")).await.unwrap();
    let metadata = [("db_Password", "hunter2"), ("actor_id", "ag::other::root::0"), ("note", "token of thanks")];
    let told = SubmitAuditEventRequest {
        resource_type: "service".into(),
        resource_id: "web-1".into(),
        success: false,
        error_message: "disk full".into(),
        metadata: metadata.map(|(name, value)| (name.to_owned(), value.to_owned())).into(),
        ..event("deploy")
    };
    let reply = submit(&mut one, told).await;
    assert!(reply.success && reply.client_request_id == "deploy", "{reply:?}");
    let mut admin = Client::connect(grpc, admin()).await.unwrap();
    let all = found(&mut admin, AuditQuery::default()).await;
    let [entry] = &all[..] else { panic!("one entry: {all:?}") };
    assert_eq!((entry.actor_type.as_str(), entry.actor_id.as_str()), ("agent", "ag::ws::impl::one"));
    assert_eq!((entry.session_id.as_str(), entry.source.as_str()), (one.ack.session_id.as_str(), "principal"));
    assert_eq!((entry.workspace.as_str(), entry.resource_id.as_str()), ("ws", "web-1"));
    assert_eq!((entry.success, entry.error_message.as_str()), (false, "disk full"));
    assert_eq!(
        entry.metadata_json,
        r#"{"actor_id":"ag::other::root::0","db_Password":"[REDACTED]","note":"token of thanks"}"#
    );
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn they_are_found_by_what_they_say_newest_first() {
    let dir = tempfile::tempdir().unwrap();
    let server = server(dir.path()).await;
    let grpc = server.addresses().grpc;
    let mut one = Client::connect(grpc, agent("one")).await.unwrap();
    for n in 0..5 {
        let told = SubmitAuditEventRequest { success: n != 3, ..event(&format!("op-{n}")) };
        assert!(submit(&mut one, told).await.success);
    }
    let mut admin = Client::connect(grpc, admin()).await.unwrap();
    let own = SubmitAuditEventRequest { event_type: "custom".into(), ..event("own") };
    assert!(submit(&mut admin, own).await.success);
    let mut operations = async |wanted: AuditQuery| -> Vec<String> {
        found(&mut admin, wanted).await.into_iter().map(|entry| entry.operation).collect()
    };
    let all = AuditQuery::default();
    assert_eq!(operations(all.clone()).await, ["own", "op-4", "op-3", "op-2", "op-1", "op-0"]);
    let cases = [
        (AuditQuery { event_type: "custom".into(), ..all.clone() }, vec!["own"]),
        (AuditQuery { only_failures: true, ..all.clone() }, vec!["op-3"]),
        (AuditQuery { operation: "op-1".into(), ..all.clone() }, vec!["op-1"]),
        (AuditQuery { actor_type: "Orchestrator".into(), ..all.clone() }, vec!["own"]),
        (AuditQuery { exclude_actor_types: vec!["Agent".into(), String::new()], ..all.clone() }, vec!["own"]),
        (AuditQuery { exclude_workspaces: vec!["ws".into()], ..all.clone() }, vec!["own"]),
        (AuditQuery { limit: 2, offset: 1, ..all.clone() }, vec!["op-4", "op-3"]),
        (AuditQuery { start_time: i64::MAX, ..all.clone() }, vec![]),
        (AuditQuery { workspace: "x' OR 1=1 --".into(), ..all.clone() }, vec![]),
    ];
    for (wanted, expected) in cases {
        assert_eq!(operations(wanted.clone()).await, expected, "{wanted:?}");
    }
    let page = query(&mut admin, AuditQuery { limit: 2, ..all }).await;
    assert_eq!((page.entries.len(), page.total_count), (2, 6));
    let too_many = AuditQuery { exclude_workspaces: vec!["w".into(); 17], ..AuditQuery::default() };
    assert!(query(&mut admin, too_many).await.error.contains("at most 16"));
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_may_not_is_told_so_and_too_many_wait() {
    let dir = tempfile::tempdir().unwrap();
    let limits = Limits { audit_events_per_second: 3, ..Limits::default() };
    let config = Config { data_dir: dir.path().to_owned(), dev: true, limits, ..Config::on_free_ports() };
    let server = Server::start(config).await.unwrap();
    let mut one = Client::connect(server.addresses().grpc, agent("one")).await.unwrap();
    let cases = [
        (SubmitAuditEventRequest { event_type: "auth".into(), ..event("x") }, "ERR_AUDIT_TYPE_FORBIDDEN"),
        (SubmitAuditEventRequest { workspace: "other".into(), ..event("x") }, "ERR_PERMISSION_DENIED"),
        (SubmitAuditEventRequest { error_message: "x".repeat(5000), ..event("x") }, "ERR_INVALID_ARGUMENT"),
        (event("x"), "ERR_AUDIT_RATE_LIMITED"),
    ];
    for (told, code) in cases {
        let reply = submit(&mut one, told).await;
        assert_eq!((reply.success, reply.error_code.as_str()), (false, code));
        assert_eq!(code == "ERR_AUDIT_RATE_LIMITED", reply.error_message.contains("retry after 333 ms"));
    }
    let reply = query(&mut one, AuditQuery::default()).await;
    assert_eq!((reply.success, reply.error.as_str()), (false, "insufficient permissions for audit query"));
    assert!(query(&mut one, AuditQuery { workspace: "ws".into(), ..AuditQuery::default() }).await.success);
    server.stop().await;
}

/// What one principal reports must not make the trail unreadable for those who look after it: a page stays below what clients
/// take, and those behind it are found.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_page_of_large_events_stays_below_what_clients_take() {
    let dir = tempfile::tempdir().unwrap();
    let server = server(dir.path()).await;
    let grpc = server.addresses().grpc;
    let mut one = Client::connect(grpc, agent("one")).await.unwrap();
    let metadata: std::collections::HashMap<_, _> =
        (0..64).map(|n| (format!("{n:02}"), "\u{1}".repeat(4096))).collect();
    for n in 0..12 {
        let large = SubmitAuditEventRequest { metadata: metadata.clone(), ..event(&format!("large-{n:02}")) };
        assert!(submit(&mut one, large).await.success);
    }
    for n in 0..12 {
        assert!(submit(&mut one, event(&format!("small-{n:02}"))).await.success);
    }
    let mut admin = Client::connect(grpc, admin()).await.unwrap();
    let (mut operations, mut pages) = (Vec::new(), 0);
    loop {
        let offset = i32::try_from(operations.len()).unwrap();
        let page = query(&mut admin, AuditQuery { limit: 100, offset, ..AuditQuery::default() }).await;
        assert!(page.success && page.total_count == 24, "{}", page.error);
        assert!(prost::Message::encoded_len(&page) < 4 * 1024 * 1024, "{} entries", page.entries.len());
        if page.entries.is_empty() {
            break;
        }
        operations.extend(page.entries.into_iter().map(|entry| entry.operation));
        pages += 1;
    }
    assert!(pages > 10, "one large event has 1.5 MB: {pages}");
    let newest_first =
        ["small", "large"].into_iter().flat_map(|what| (0..12).rev().map(move |n| format!("{what}-{n:02}")));
    assert_eq!(operations, newest_first.collect::<Vec<_>>());
    server.stop().await;
}

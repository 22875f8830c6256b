//! No field of the contract is passed over unnoticed, and what restricts a request is kept or the request is refused.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use prost::Message as _;
use prost_types::{DescriptorProto, FileDescriptorSet};
use trunkline_proto::v1::{
    self as wire, ErrorResponse, ResourceAccessRequest, SendMessage, downstream_message::Payload as Down,
    upstream_message::Payload as Up,
};

use crate::client::{Client, agent, lane, server};

/// Of each field that a client may send: the message, the field (`*` for all of them), whether it is read, refused or
/// ignored, and the file of the agent surface that does so, or the reason.
const FIELDS: &str = include_str!("contract.csv");

/// Where those files are.
const SURFACE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/src/agent");

struct Handling {
    message: &'static str,
    field: &'static str,
    kind: &'static str,
    place: &'static str,
}

/// By message and field, with a dot between them.
fn table() -> BTreeMap<String, Handling> {
    let rows = FIELDS.lines().skip(1).map(|line| {
        let parts: Vec<_> = line.splitn(4, ',').collect();
        let [message, field, kind, place] = parts[..] else { panic!("four columns: {line}") };
        (format!("{message}.{field}"), Handling { message, field, kind, place })
    });
    rows.collect()
}

/// Every message that can come from a client, by its name within its package, with its fields and the messages in them.
fn upstream() -> BTreeMap<String, Vec<(String, Option<String>)>> {
    fn collect(message: &DescriptorProto, prefix: &str, all: &mut BTreeMap<String, DescriptorProto>) {
        let name = format!("{prefix}{}", message.name());
        message.nested_type.iter().for_each(|nested| collect(nested, &format!("{name}."), all));
        all.insert(name, message.clone());
    }
    let set = FileDescriptorSet::decode(wire::DESCRIPTORS).unwrap();
    let mut all = BTreeMap::new();
    for file in &set.file {
        let package = format!(".{}.", file.package());
        file.message_type.iter().for_each(|message| collect(message, &package, &mut all));
    }
    let (mut found, mut next) = (BTreeMap::new(), VecDeque::from([".aether.v1.UpstreamMessage".to_owned()]));
    while let Some(name) = next.pop_front() {
        let local = name.trim_start_matches(".aether.v1.").trim_start_matches(".trunkline.v1.").to_owned();
        if found.contains_key(&local) {
            continue;
        }
        let fields = all[&name].field.iter().map(|field| {
            // What an entry of a map holds counts as the map's.
            let inner = all.get(field.type_name()).and_then(|inner| match &inner.options {
                Some(options) if options.map_entry() => {
                    let value = inner.field.iter().find(|field| field.name() == "value").unwrap();
                    all.contains_key(value.type_name()).then(|| value.type_name().to_owned())
                }
                _ => Some(field.type_name().to_owned()),
            });
            (field.name().to_owned(), inner)
        });
        let fields: Vec<_> = fields.collect();
        next.extend(fields.iter().filter_map(|(_, inner)| inner.clone()));
        found.insert(local, fields);
    }
    found
}

/// Whether a file names a field: as itself, or as the variant that it is of a `oneof`.
fn names(place: &str, field: &str) -> bool {
    let text = std::fs::read_to_string(format!("{SURFACE}/{place}")).unwrap_or_else(|e| panic!("{place}: {e}"));
    let capital = |word: &str| word[..1].to_uppercase() + &word[1..];
    let variant: String = field.split('_').map(capital).collect();
    text.split(|c: char| !c.is_alphanumeric() && c != '_').any(|word| word == field || word == variant)
}

#[test]
fn every_field_that_a_client_may_send_is_read_refused_or_ignored_with_a_reason() {
    let (table, upstream) = (table(), upstream());
    let mut used = BTreeSet::new();
    let (mut next, mut seen) = (VecDeque::from(["UpstreamMessage".to_owned()]), BTreeSet::new());
    while let Some(message) = next.pop_front() {
        if !seen.insert(message.clone()) {
            continue;
        }
        if table.contains_key(&format!("{message}.*")) {
            used.insert(format!("{message}.*"));
            continue;
        }
        for (field, inner) in &upstream[&message] {
            let key = format!("{message}.{field}");
            assert!(table.contains_key(&key), "{key} is not in contract.csv");
            used.insert(key);
            let inner = inner.iter().map(|inner| inner.trim_start_matches(".aether.v1."));
            next.extend(inner.map(|inner| inner.trim_start_matches(".trunkline.v1.").to_owned()));
        }
    }
    let stale: Vec<_> = table.keys().filter(|key| !used.contains(*key)).collect();
    assert!(stale.is_empty(), "not in the contract, or not reached: {stale:?}");
}

#[test]
fn the_table_names_where_a_field_is_read_or_refused() {
    for Handling { message, field, kind, place } in table().into_values() {
        match kind {
            "read" => assert!(names(place, field), "{place} does not read {message}.{field}"),
            // Operations that are refused whole do not look at their fields.
            "refused" if matches!(message, "SendMessage" | "CreateTaskRequest" | "RetryPolicy" | "UpstreamMessage") => {
                assert!(names(place, field), "{place} does not refuse {message}.{field}");
            }
            "refused" => assert!(std::path::Path::new(&format!("{SURFACE}/{place}")).exists(), "{place}"),
            "ignored" => assert!(place.len() > 20, "{message}.{field} is ignored for no reason"),
            other => panic!("{other} is no handling"),
        }
    }
}

fn boxed<T: Default>(fill: impl FnOnce(&mut T)) -> Box<T> {
    let mut message = T::default();
    fill(&mut message);
    message.into()
}

/// What was answered to a request, up to the error with this id.
async fn refusal(client: &mut Client, id: &str) -> (Option<Down>, ErrorResponse) {
    let mut typed = None;
    loop {
        match client.next().await.unwrap().unwrap() {
            Down::Config(_) => {}
            Down::Error(error) => {
                assert_eq!(error.request_id, id, "{error:?}");
                return (typed, *error);
            }
            reply => assert!(typed.replace(reply).is_none(), "one typed reply"),
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn operations_that_are_not_built_are_answered_by_type_and_id() {
    let dir = tempfile::tempdir().unwrap();
    let server = server(dir.path()).await;
    let mut client = Client::connect(server.addresses().grpc, agent("one")).await.unwrap();
    let id = || "r-1".to_owned();
    let operations = [
        Up::WorkflowOp(boxed(|op: &mut wire::WorkflowOperation| op.request_id = id())),
        Up::AuthorityGrantOp(boxed(|op: &mut wire::AuthorityGrantOperation| op.request_id = id())),
        Up::ProxyHttpRequest(boxed(|op: &mut wire::ProxyHttpRequest| op.request_id = id())),
        Up::TunnelOpen(boxed(|op: &mut wire::TunnelOpen| op.tunnel_id = id())),
        Up::ResolveAuthorityRequest(boxed(|op: &mut wire::ResolveAuthorityRequest| op.request_id = id())),
        Up::AuthorityRequestOp(boxed(|op: &mut wire::AuthorityRequestOperation| op.client_request_id = id())),
        Up::AccessCheck(boxed(|op: &mut wire::AccessCheckOperation| op.request_id = id())),
        Up::BatchAccessCheck(boxed(|op: &mut wire::BatchAccessCheckOperation| op.request_id = id())),
    ];
    for operation in operations {
        client.put(operation).await;
        let (typed, error) = refusal(&mut client, "r-1").await;
        let refused = match typed.expect("a typed reply") {
            Down::WorkflowResponse(reply) => (reply.request_id, !reply.success && !reply.error.is_empty()),
            Down::AuthorityGrant(reply) => (reply.request_id, !reply.success && !reply.error.is_empty()),
            Down::ProxyHttpResponse(reply) => {
                let kind = reply.error.map(|error| error.kind());
                (reply.request_id, kind == Some(wire::proxy_error::Kind::SidecarUnavailable))
            }
            Down::TunnelClose(reply) => {
                let is_error = reply.reason() == wire::tunnel_close::Reason::Error;
                (reply.tunnel_id, is_error)
            }
            Down::ResolveAuthorityResponse(reply) => (reply.request_id, !reply.ok && !reply.error.is_empty()),
            Down::AuthorityRequestResponse(reply) => {
                (reply.client_request_id, !reply.success && !reply.error.is_empty())
            }
            Down::AccessCheckResponse(reply) => (reply.request_id, !reply.success && reply.decision.is_none()),
            Down::BatchAccessCheckResponse(reply) => (reply.request_id, !reply.success && reply.decisions.is_empty()),
            other => panic!("{other:?}"),
        };
        assert_eq!(refused, (id(), true));
        assert_eq!(error.code, "ERR_NOT_IMPLEMENTED");
    }
    // What follows a refused call or tunnel is not answered piece by piece.
    client.put(Up::ProxyHttpBodyChunk(boxed(|chunk: &mut wire::ProxyHttpBodyChunk| chunk.request_id = id()))).await;
    client.put(Up::TunnelData(boxed(|data: &mut wire::TunnelData| data.tunnel_id = id()))).await;
    client.barrier().await;
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_message_under_conditions_is_refused_and_not_delivered() {
    let dir = tempfile::tempdir().unwrap();
    let server = server(dir.path()).await;
    let mut client = Client::connect(server.addresses().grpc, agent("one")).await.unwrap();
    let access = ResourceAccessRequest { correlation_id: "check".into(), ..Default::default() };
    let checked = || SendMessage {
        target_topic: lane("one"),
        payload: "checked".into(),
        checked_access: Some(access.clone().into()),
        ..SendMessage::default()
    };
    let continued = SendMessage {
        target_topic: lane("one"),
        payload: "continued".into(),
        authority_continuation: Some(Box::default()),
        ..SendMessage::default()
    };
    for (message, name) in [
        (checked(), "check"),
        (SendMessage { idempotency_key: "key".into(), ..checked() }, "key"),
        (
            SendMessage { target_topic: "tk::ws::3f1c1f9e-51c9-4f5a-9f0e-2f4f3f1c1f9e::msg".into(), ..checked() },
            "check",
        ),
        (SendMessage { idempotency_key: "key".into(), ..continued }, "key"),
    ] {
        client.put(Up::Send(message)).await;
        let (typed, error) = refusal(&mut client, name).await;
        assert_eq!((typed, error.code.as_str()), (None, "ERR_NOT_IMPLEMENTED"));
    }
    client.send(&lane("one"), "plain").await;
    assert_eq!(client.message().await.payload, "plain", "nothing else came");
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_task_with_limits_that_would_not_be_kept_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let server = server(dir.path()).await;
    let mut client = Client::connect(server.addresses().grpc, agent("one")).await.unwrap();
    let task = || wire::CreateTaskRequest { task_type: "t".into(), request_id: "r-1".into(), ..Default::default() };
    let by_code = wire::RetryPolicy { retryable_status_codes: vec![503], ..Default::default() };
    for request in [
        wire::CreateTaskRequest { required_downstream_authority_hops: 1, ..task() },
        wire::CreateTaskRequest { retry_policy: Some(by_code), ..task() },
        wire::CreateTaskRequest { target_offline_policy: 99, ..task() },
    ] {
        client.put(Up::CreateTask(request.into())).await;
        let (typed, _) = refusal(&mut client, "r-1").await;
        let Some(Down::CreateTask(reply)) = typed else { panic!("{typed:?}") };
        assert!(!reply.success && reply.request_id == "r-1", "{reply:?}");
    }
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_condition_that_an_operation_on_keys_does_not_have_is_refused() {
    use wire::kv_operation::{OpType, Scope};
    let dir = tempfile::tempdir().unwrap();
    let server = server(dir.path()).await;
    let mut client = Client::connect(server.addresses().grpc, agent("one")).await.unwrap();
    let on = |op: OpType| wire::KvOperation {
        op: op.into(),
        scope: Scope::WorkspaceExclusive.into(),
        key: "k".into(),
        request_id: "r-1".into(),
        ..Default::default()
    };
    for operation in [
        wire::KvOperation { expected_value: "old".into(), value: "new".into(), ..on(OpType::Put) },
        wire::KvOperation { expected_value: "old".into(), ..on(OpType::Delete) },
        wire::KvOperation { guard_value: 5, ..on(OpType::Increment) },
        wire::KvOperation { delta_value: 5, ..on(OpType::Decrement) },
        wire::KvOperation { target_identity: lane("two"), ..on(OpType::Get) },
        wire::KvOperation { scope: 99, ..on(OpType::Get) },
    ] {
        client.put(Up::KvOp(operation.into())).await;
        let (typed, error) = refusal(&mut client, "r-1").await;
        let Some(Down::Kv(reply)) = typed else { panic!("{typed:?}") };
        assert!(!reply.success && error.code == "ERR_INVALID_ARGUMENT", "{error:?}");
    }
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_filter_that_cannot_be_kept_lets_nothing_through() {
    use wire::init_connection::ClientType;
    let dir = tempfile::tempdir().unwrap();
    let server = server(dir.path()).await;
    // With --dev an orchestrator administers the server.
    let orchestrator =
        wire::OrchestratorIdentity { implementation: "o".into(), specifier: "1".into(), ..Default::default() };
    let init = wire::InitConnection { client_type: Some(ClientType::Orchestrator(orchestrator)), ..Default::default() };
    let mut client = Client::connect(server.addresses().grpc, init).await.unwrap();
    let task = wire::CreateTaskRequest {
        task_type: "t".into(),
        workspace: "ws".into(),
        request_id: "t".into(),
        ..Default::default()
    };
    let mut other = Client::connect(server.addresses().grpc, agent("one")).await.unwrap();
    other.put(Up::CreateTask(task.into())).await;
    loop {
        match other.next().await.unwrap().unwrap() {
            Down::Config(_) => {}
            Down::CreateTask(reply) => break assert!(reply.success, "{reply:?}"),
            reply => panic!("{reply:?}"),
        }
    }

    let filter = |filter| {
        Up::SessionOp(boxed(|op: &mut wire::SessionOperation| {
            op.op = wire::session_operation::OpType::List.into();
            op.filter = Some(filter);
        }))
    };
    client.put(filter(wire::ConnectionFilter { r#type: 99, ..Default::default() })).await;
    let Some(Down::SessionResponse(reply)) = client.next().await.unwrap() else { panic!("a reply") };
    assert!(!reply.success && reply.connections.is_empty(), "{reply:?}");

    let creator =
        |kind: &str, id: &str| Some(wire::PrincipalRef { principal_type: kind.into(), principal_id: id.into() });
    let list = |filter: wire::TaskFilter| {
        Up::TaskQuery(boxed(|query: &mut wire::TaskQuery| {
            query.op = wire::task_query::OpType::List.into();
            query.filter = Some(wire::TaskFilter { workspace: "ws".into(), ..filter });
        }))
    };
    let found = [
        (wire::TaskFilter::default(), Some(1)),
        (wire::TaskFilter { status: 99, ..Default::default() }, None),
        (wire::TaskFilter { statuses: vec![99], ..Default::default() }, None),
        (wire::TaskFilter { exclude_statuses: vec![99], ..Default::default() }, None),
        (wire::TaskFilter { creator_actor: creator("agent", ""), ..Default::default() }, None),
        (wire::TaskFilter { creator_actor: creator("agent", &lane("one")), ..Default::default() }, Some(1)),
        (wire::TaskFilter { creator_actor: creator("user", &lane("one")), ..Default::default() }, Some(0)),
    ];
    for (filter, expected) in found {
        client.put(list(filter.clone())).await;
        let Some(Down::TaskQuery(reply)) = client.next().await.unwrap() else { panic!("a reply") };
        assert_eq!(reply.success.then_some(reply.tasks.len()), expected, "{filter:?}");
    }
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_agent_speaks_the_extensions_that_its_program_is_registered_with() {
    use wire::init_connection::ClientType;
    let dir = tempfile::tempdir().unwrap();
    let server = server(dir.path()).await;
    let orchestrator =
        wire::OrchestratorIdentity { implementation: "o".into(), specifier: "1".into(), ..Default::default() };
    let init = wire::InitConnection { client_type: Some(ClientType::Orchestrator(orchestrator)), ..Default::default() };
    let mut admin = Client::connect(server.addresses().grpc, init).await.unwrap();
    let program = wire::AgentRegistrationInfo {
        implementation: "impl".into(),
        launch_params: [("profile".to_owned(), "p".to_owned())].into(),
        extensions: vec!["urn:known".into()],
        ..Default::default()
    };
    admin
        .put(Up::AgentOp(boxed(|op: &mut wire::AgentOperation| {
            op.op = wire::agent_operation::OpType::Register.into();
            op.agent = Some(program);
        })))
        .await;
    let Some(Down::Agent(reply)) = admin.next().await.unwrap() else { panic!("a reply") };
    assert!(reply.success, "{reply:?}");
    let declares = |init: wire::InitConnection, uri: &str| wire::InitConnection {
        extensions: vec![wire::ExtensionDeclaration { uri: uri.into(), required: true, ..Default::default() }],
        ..init
    };
    let grpc = server.addresses().grpc;
    let one = Client::connect(grpc, declares(agent("one"), "urn:known")).await.unwrap();
    assert!(one.ack.negotiated_extensions[0].supported, "{:?}", one.ack);
    // Only what is registered, and only for the program's agents.
    for init in [declares(agent("two"), "urn:unknown"), declares(crate::client::worker(), "urn:known")] {
        let mut refused = Client::connect(grpc, init).await.unwrap();
        assert!(!refused.ack.negotiated_extensions[0].supported);
        assert_eq!(refused.end().await, Some(tonic::Code::FailedPrecondition));
    }
    server.stop().await;
}

//! Each operation as it goes over the wire, and its reply: also of those that no server here offers yet.

use std::time::Duration;

use trunkline_client::{
    AccessLevel, Client, Kind, WorkflowEngine,
    admin::{AuditEvent, AuditQuery, ConnectionFilter, PrincipalRef, WorkspaceInfo},
    authority::{GrantCache, OnBehalf, Resolver},
    proto::{self, downstream_message::Payload as Down, upstream_message::Payload as Up},
    task::{NewTask, Wait},
    workflow::{Request, WorkflowOp},
};

use crate::{
    peer::{Line, Peer},
    server::soon,
};

/// Runs one operation against a reply, and gives back what went over the wire.
async fn run<T, F>(peer: &mut Peer, operation: impl FnOnce(Client) -> F, reply: impl FnOnce(&Up) -> Down) -> (Up, T)
where
    T: Send + 'static,
    F: Future<Output = T> + Send + 'static,
{
    let (agent, mut line) = peer.agent().await;
    let asks = tokio::spawn(operation((*agent).clone()));
    let asked = line.next().await;
    line.put(reply(&asked)).await;
    (asked, soon(asks).await.unwrap())
}

macro_rules! op {
    ($asked:expr, $variant:path) => {
        match $asked {
            $variant(op) => op,
            other => panic!("expected another request than {other:?}"),
        }
    };
}

fn grant(asked: &Up, success: bool) -> Down {
    let Up::AuthorityGrantOp(op) = asked else { panic!("{asked:?}") };
    let grant = proto::AclAuthorityGrantInfo { grant_id: "g-1".into(), ..Default::default() };
    Down::AuthorityGrant(Box::new(proto::AuthorityGrantResponse {
        success,
        error: if success { String::new() } else { "grant not found".into() },
        grants: vec![grant.clone()],
        grant: Some(grant),
        request_id: op.request_id.clone(),
        ..Default::default()
    }))
}

#[tokio::test]
async fn grants() {
    use proto::authority_grant_operation::OpType as Op;
    let mut peer = Peer::begin().await;
    let (asked, granted) = run(
        &mut peer,
        async |client| {
            let request = proto::AuthorityGrantExchangeRequest { reason: "why".into(), ..Default::default() };
            client.authority().exchange(request).await
        },
        |asked| grant(asked, true),
    )
    .await;
    let op = op!(asked, Up::AuthorityGrantOp);
    assert_eq!((op.op(), op.exchange_request.unwrap().reason.as_str()), (Op::Exchange, "why"));
    assert_eq!(granted.unwrap().grant_id, "g-1");

    let (asked, refused) =
        run(&mut peer, async |client| client.authority().get("g-9").await, |asked| grant(asked, false)).await;
    assert_eq!(op!(asked, Up::AuthorityGrantOp).grant_id, "g-9");
    assert_eq!(refused.unwrap_err().kind(), Kind::NotFound);

    let (asked, _) = run(
        &mut peer,
        async |client| client.authority().extend("g-1", Duration::from_secs(60)).await,
        |asked| grant(asked, true),
    )
    .await;
    let op = op!(asked, Up::AuthorityGrantOp);
    assert_eq!((op.op(), op.renew_request.unwrap().extend_seconds), (Op::Renew, 60));

    let (asked, mine) =
        run(&mut peer, async |client| client.authority().mine(Default::default()).await, |asked| grant(asked, true))
            .await;
    assert_eq!(op!(asked, Up::AuthorityGrantOp).op(), Op::ListMyGrants);
    assert_eq!(mine.unwrap().len(), 1);
    let (asked, revoked) =
        run(&mut peer, async |client| client.authority().revoke("g-1").await, |asked| grant(asked, true)).await;
    assert_eq!(op!(asked, Up::AuthorityGrantOp).op(), Op::Revoke);
    revoked.unwrap();
}

#[tokio::test]
async fn requests_for_authority_and_their_answers() {
    use proto::authority_request_operation::OpType as Op;
    let mut peer = Peer::begin().await;
    let reply = |asked: &Up| {
        let Up::AuthorityRequestOp(op) = asked else { panic!("{asked:?}") };
        let request = proto::AuthorityRequest { request_id: "r-1".into(), ..Default::default() };
        Down::AuthorityRequestResponse(Box::new(proto::AuthorityRequestOperationResponse {
            success: true,
            client_request_id: op.client_request_id.clone(),
            requests: vec![request.clone()],
            request: Some(request),
            ..Default::default()
        }))
    };
    let (asked, request) = run(&mut peer, async |client| client.authority().ask(Default::default()).await, reply).await;
    let create = op!(asked, Up::AuthorityRequestOp).create.unwrap();
    assert_eq!(create.requested_duration_seconds, 1800);
    assert_eq!(create.requested_access_level(), proto::AccessLevel::Readwrite);
    assert_eq!(request.unwrap().request_id, "r-1");
    let (asked, waiting) =
        run(&mut peer, async |client| client.authority().waiting(Default::default()).await, reply).await;
    assert_eq!(op!(asked, Up::AuthorityRequestOp).op(), Op::ListPending);
    assert_eq!(waiting.unwrap().len(), 1);
    let (asked, withdrawn) =
        run(&mut peer, async |client| client.authority().withdraw("r-1", "done").await, reply).await;
    let op = op!(asked, Up::AuthorityRequestOp);
    assert_eq!((op.op(), op.request_id.as_str(), op.reason.as_str()), (Op::Cancel, "r-1", "done"));
    withdrawn.unwrap();
    let (agent, _line) = peer.agent().await;
    let target = proto::AuthorityRequestRoutingTarget::default();
    let wanted = proto::CreateAuthorityRequestPayload { routing_target: Some(target), ..Default::default() };
    assert_eq!(agent.authority().ask(wanted).await.unwrap_err().kind(), Kind::Invalid, "routed to nobody");
}

#[tokio::test]
async fn checks_of_access_and_who_a_grant_stands_for() {
    let mut peer = Peer::begin().await;
    let access = || proto::ResourceAccessRequest { resource_id: "prod".into(), ..Default::default() };
    let (asked, decision) = run(
        &mut peer,
        async move |client| client.check_access(access(), Some(OnBehalf::of("user", "a").by("g").into())).await,
        |asked| {
            let Up::AccessCheck(op) = asked else { panic!("{asked:?}") };
            let decision = Some(proto::AccessDecisionReceipt { allowed: true, ..Default::default() });
            let (request_id, success) = (op.request_id.clone(), true);
            Down::AccessCheckResponse(
                proto::AccessCheckResponse { request_id, success, decision, ..Default::default() }.into(),
            )
        },
    )
    .await;
    assert_eq!(op!(asked, Up::AccessCheck).authorization.unwrap().authority_mode, "on_behalf_of");
    assert!(decision.unwrap().allowed);
    let (_, decisions) = run(
        &mut peer,
        async move |client| client.check_accesses(vec![access(), access()], None).await,
        |asked| {
            let Up::BatchAccessCheck(op) = asked else { panic!("{asked:?}") };
            let decisions = op.access.iter().map(|_| proto::AccessDecisionReceipt::default()).collect();
            let (request_id, success) = (op.request_id.clone(), true);
            Down::BatchAccessCheckResponse(
                proto::BatchAccessCheckResponse { request_id, success, decisions, ..Default::default() }.into(),
            )
        },
    )
    .await;
    assert_eq!(decisions.unwrap().len(), 2);
}

/// Answers one request of a cache or a resolver.
async fn resolve(line: &mut Line) {
    let Up::ResolveAuthorityRequest(op) = line.next().await else { panic!("expected a request") };
    let subject = op.subject;
    let authority = Some(proto::ResolvedAuthority { subject, ..Default::default() });
    let reply =
        proto::ResolveAuthorityResponse { request_id: op.request_id, ok: true, authority, ..Default::default() };
    line.put(Down::ResolveAuthorityResponse(reply.into())).await;
}

#[tokio::test]
async fn a_resolver_remembers_until_the_grant_is_void() {
    let mut peer = Peer::begin().await;
    let (agent, mut line) = peer.agent().await;
    let resolver = Resolver::new(&agent);
    let mut notices = agent.notices();
    for _ in 0..2 {
        let asks = tokio::spawn({
            let resolver = resolver.clone();
            async move {
                let first = resolver.resolve("g", "user", "alice").await.unwrap();
                let second = resolver.resolve("g", "user", "alice").await.unwrap();
                assert_eq!(first, second);
            }
        });
        resolve(&mut line).await;
        soon(asks).await.unwrap();
        let void = proto::AuthorityGrantRevocation { grant_id: "g".into(), ..Default::default() };
        line.put(Down::AuthorityGrantRevocation(void.into())).await;
        soon(notices.next()).await.unwrap();
    }
}

#[tokio::test]
async fn a_cache_of_grants_asks_once_for_each() {
    let mut peer = Peer::begin().await;
    let (agent, mut line) = peer.agent().await;
    let cache = GrantCache::new(&agent);
    let asks: Vec<_> = (0..10)
        .map(|_| {
            let cache = cache.clone();
            tokio::spawn(async move { cache.get_or_exchange("k", Default::default()).await.unwrap().grant_id })
        })
        .collect();
    let asked = line.next().await;
    line.put(grant(&asked, true)).await;
    for ask in asks {
        assert_eq!(soon(ask).await.unwrap(), "g-1");
    }
    let mut notices = agent.notices();
    let void = proto::AuthorityGrantRevocation { grant_id: "g-1".into(), ..Default::default() };
    line.put(Down::AuthorityGrantRevocation(void.into())).await;
    soon(notices.next()).await.unwrap();
    assert!(cache.list().await.is_empty());
}

#[tokio::test]
async fn workflows() {
    let mut peer = Peer::begin().await;
    let reply = |asked: &Up| {
        let Up::WorkflowOp(op) = asked else { panic!("{asked:?}") };
        let reply = proto::WorkflowResponse {
            success: !op.id.is_empty() || op.op() != WorkflowOp::GetRule,
            error: "rule not found".into(),
            data: "[1,2]".into(),
            total_count: 2,
            request_id: op.request_id.clone(),
            ..Default::default()
        };
        Down::WorkflowResponse(reply.into())
    };
    let (asked, listed) = run(
        &mut peer,
        async |client| client.workflows().run(Request::new(WorkflowOp::ListExecutions).status("running")).await,
        reply,
    )
    .await;
    assert_eq!(op!(asked, Up::WorkflowOp).status_filter, "running");
    let listed = listed.unwrap();
    assert_eq!((listed.json::<Vec<i32>>().unwrap(), listed.total), (vec![1, 2], 2));
    let (_, missing) =
        run(&mut peer, async |client| client.workflows().run(Request::new(WorkflowOp::GetRule)).await, reply).await;
    assert_eq!(missing.unwrap_err().kind(), Kind::NotFound);
    let (asked, made) = run(
        &mut peer,
        async |client| client.workflows().create_schedule("prod", &serde_json::json!({"every": "1h"}), true).await,
        reply,
    )
    .await;
    let op = op!(asked, Up::WorkflowOp);
    assert_eq!(
        (op.op(), op.workspace.as_str(), &op.data[..]),
        (WorkflowOp::UpsertSchedule, "prod", &b"{\"every\":\"1h\"}"[..])
    );
    made.unwrap();
    let (agent, _line) = peer.agent().await;
    for workspace in ["", "*", "prod-*"] {
        let refused = agent.workflows().create_schedule(workspace, &1, false).await.unwrap_err();
        assert_eq!(refused.kind(), Kind::Invalid, "{workspace:?}");
    }
}

#[tokio::test]
async fn the_engine_answers_what_it_is_asked() {
    let mut peer = Peer::begin().await;
    let (engine, mut line) = peer.accept(WorkflowEngine::builder()).await;
    let mut notices = engine.notices();
    let asked = proto::WorkflowOperation { request_id: "q".into(), ..Default::default() };
    line.put(Down::WorkflowOp(asked.into())).await;
    let Some(trunkline_client::Notice::Workflow(asked)) = soon(notices.next()).await else {
        panic!("expected a question")
    };
    engine.answer(&asked, proto::WorkflowResponse { success: true, ..Default::default() }).await.unwrap();
    let answered = op!(line.next().await, Up::WorkflowResponse);
    assert_eq!((answered.request_id.as_str(), answered.success), ("q", true));
}

#[tokio::test]
async fn groups_roles_and_explanations() {
    use proto::acl_operation::OpType as Op;
    let mut peer = Peer::begin().await;
    let reply = |asked: &Up| {
        let Up::AclOp(op) = asked else { panic!("{asked:?}") };
        let reply = proto::AclResponse {
            success: true,
            request_id: op.request_id.clone(),
            groups: vec![Default::default()],
            explanation: Some(proto::AclAccessExplanationInfo { allowed: true, ..Default::default() }),
            ..Default::default()
        };
        Down::Acl(reply.into())
    };
    let (asked, groups) = run(&mut peer, async |client| client.admin().groups().await, reply).await;
    assert_eq!(op!(asked, Up::AclOp).op(), Op::ListGroups);
    assert_eq!(groups.unwrap().len(), 1);
    let alice = || PrincipalRef { principal_type: "user".into(), principal_id: "alice".into() };
    let (asked, _) =
        run(&mut peer, async move |client| client.admin().add_group_member("staff", &alice()).await, reply).await;
    let op = op!(asked, Up::AclOp);
    assert_eq!(
        (op.op(), op.name.as_str(), op.member_request.unwrap().member_id.as_str()),
        (Op::AddGroupMember, "staff", "alice")
    );
    let (asked, _) =
        run(&mut peer, async move |client| client.admin().assign_role("editor", &alice()).await, reply).await;
    let op = op!(asked, Up::AclOp);
    assert_eq!((op.op(), op.assignment_request.unwrap().assignee_type.as_str()), (Op::AssignRole, "user"));
    let (asked, explained) = run(
        &mut peer,
        async move |client| client.admin().explain(alice(), "workspace", "prod", AccessLevel::Write).await,
        reply,
    )
    .await;
    assert_eq!(op!(asked, Up::AclOp).required_level, 20);
    assert!(explained.unwrap().allowed);
}

#[tokio::test]
async fn what_cannot_be_is_refused_on_this_side() {
    let mut peer = Peer::begin().await;
    let (agent, _line) = peer.agent().await;
    let tasks = agent.tasks();
    let refused = [
        tasks.wait_for("t", Wait::for_tasks::<String>([])).await.map(drop),
        tasks.pause("t", Wait::hibernate("", ["wake"])).await.map(drop),
    ];
    for refused in refused {
        assert_eq!(refused.unwrap_err().kind(), Kind::Invalid);
    }
}

#[tokio::test]
async fn administrators_operations_keep_what_they_are_given() {
    let world = crate::server::World::begin().await;
    let admin = world.connect(trunkline_client::Orchestrator::builder("ops").profile("none")).await.admin();
    let workspace =
        WorkspaceInfo { workspace_id: "prod".into(), display_name: "Production".into(), ..Default::default() };
    admin.create_workspace(workspace.clone()).await.unwrap();
    assert_eq!(admin.get_workspace("prod").await.unwrap().display_name, "Production");
    assert!(admin.create_workspace(workspace).await.is_err(), "it is there already");
    let (token, secret) = admin
        .create_token(proto::TokenCreateRequest {
            name: "ci".into(),
            principal_type: "agent".into(),
            ..Default::default()
        })
        .await
        .unwrap();
    assert!(!secret.is_empty());
    admin.revoke_token(&token.id).await.unwrap();
    assert!(admin.get_token(&token.id).await.unwrap().revoked);
    let (sessions, count) = admin.sessions(ConnectionFilter::default()).await.unwrap();
    assert_eq!((sessions.len(), count), (1, 1));
    assert!(admin.connection_status(admin.identity().principal()).await.unwrap().is_connected);
    let agent = world.agent("a").await;
    agent.audit(AuditEvent::new("custom", "sent_invoice").resource("invoice", "17").with("total", "12")).await.unwrap();
    let created = agent.tasks().create(NewTask::new("own").once("only")).await.unwrap();
    assert_eq!(agent.tasks().create(NewTask::new("own").once("only")).await.unwrap().task_id, created.task_id);
    let query = AuditQuery { operation: "sent_invoice".into(), ..AuditQuery::default() };
    let (entries, _) = admin.query_audit(query).await.unwrap();
    assert_eq!(entries[0].resource_id, "17");
    let victim = world.agent("victim").await;
    let id = victim.welcome().unwrap().session_id.clone();
    admin.disconnect(&id, "enough").await.unwrap();
    assert_eq!(soon(victim.ended()).await.kind(), Kind::Disconnected);
    world.end().await;
}

//! Administration: workspaces, the registry of agents, sessions, tokens, rules; and that all of it is reserved.

use std::collections::{BTreeSet, HashMap};

use trunkline_client::{
    AccessLevel, Agent, Client, Kind, MetricsBridge, Service, Signal, State, Worker,
    admin::{
        AclRuleInfo, AgentRegistrationInfo, ConnectionFilter, PrincipalRef, TokenCreateRequest, TokenInfo,
        WorkspaceInfo,
    },
    proto::{AclRuleFilter, AgentResourceSchemaEntry, PrincipalType},
};

use crate::world_state::{
    WS, World, denied, invalid, is_now, named, plain, principal, refused, registration, rule, rule_of, session,
    silence, soon, until,
};

// Workspaces.

fn place(id: &str, display_name: &str) -> WorkspaceInfo {
    WorkspaceInfo { workspace_id: id.to_owned(), display_name: display_name.to_owned(), ..WorkspaceInfo::default() }
}

#[tokio::test]
async fn a_workspace_is_created_updated_and_deleted() {
    let world = World::begin().await;
    let admin = world.admin();
    let metadata = HashMap::from([("tier".to_owned(), "gold".to_owned())]);
    let first = WorkspaceInfo { description: "a place".into(), metadata, ..place("new", "First") };
    admin.create_workspace(first).await.unwrap();
    let info = admin.get_workspace("new").await.unwrap();
    assert_eq!((&*info.workspace_id, &*info.display_name, &*info.description), ("new", "First", "a place"));
    assert_eq!(info.metadata["tier"], "gold");
    is_now("created", info.created_at);

    admin.update_workspace(place("new", "Second")).await.unwrap();
    let info = admin.get_workspace("new").await.unwrap();
    assert_eq!((&*info.display_name, &*info.description), ("Second", "a place"));

    admin.delete_workspace("new").await.unwrap();
    let info = admin.get_workspace("new").await.unwrap();
    assert_eq!(info.description, "");
    assert!(!info.metadata.contains_key("tier"));
}

#[tokio::test]
async fn a_workspace_that_nobody_created_can_be_read_anyway() {
    let world = World::begin().await;
    let info = world.admin().get_workspace("nowhere").await.unwrap();
    assert_eq!((&*info.workspace_id, &*info.display_name), ("nowhere", "nowhere"));
}

#[tokio::test]
async fn a_workspace_counts_its_connections() {
    let world = World::begin().await;
    let agents = [world.agent("worker").await, world.agent("worker").await];
    let worker = world.connect(Worker::builder(WS, "job")).await;
    let user = world.user().await;
    user.switch_workspace(WS).await.unwrap();
    // Frames take effect in order: when this is answered, the user is there.
    user.checkpoints().list().await.unwrap();
    let info = world.admin().get_workspace(WS).await.unwrap();
    assert_eq!((info.active_agents, info.active_tasks, info.active_users), (2, 1, 1));
    let (listed, _) = world.admin().workspaces(0, 0).await.unwrap();
    let listed = listed.iter().find(|each| each.workspace_id == WS).unwrap();
    assert_eq!(listed.active_agents, 2);
    drop((agents, worker, user));
}

#[tokio::test]
async fn a_workspace_in_use_cannot_be_deleted() {
    let world = World::begin().await;
    let admin = world.admin();
    admin.create_workspace(place(WS, "Busy")).await.unwrap();
    let agent = world.agent("worker").await;
    refused("in use", admin.delete_workspace(WS).await);
    assert_eq!(admin.get_workspace(WS).await.unwrap().display_name, "Busy");
    agent.close().await;
    admin.delete_workspace(WS).await.unwrap();
}

#[tokio::test]
async fn workspace_operations_are_reserved() {
    let world = World::begin().await;
    for (name, client) in world.ordinary().await {
        let admin = client.admin();
        denied(name, admin.workspaces(0, 0).await);
        denied(name, admin.create_workspace(place(WS, "Mine")).await);
        denied(name, admin.delete_workspace(WS).await);
    }
}

#[tokio::test]
async fn a_category_grant_opens_one_kind_of_operation() {
    let world = World::begin().await;
    let agent = world.agent("worker").await;
    world.grant(&agent, "admin", "admin/workspaces", AccessLevel::Admin).await;
    agent.admin().get_workspace(WS).await.unwrap();
    denied("another kind", agent.admin().agents("", 0, 0).await);
}

// The registry of agents.

async fn implementations(world: &World) -> Vec<String> {
    let (agents, _) = world.admin().agents("", 0, 0).await.unwrap();
    agents.into_iter().map(|agent| agent.implementation).collect()
}

#[tokio::test]
async fn an_agent_is_registered_updated_and_deleted() {
    let world = World::begin().await;
    let admin = world.admin();
    let agent = AgentRegistrationInfo {
        launch_params: HashMap::from([("image".to_owned(), "a:1".to_owned())]),
        capabilities: HashMap::from([("streaming".to_owned(), true)]),
        extensions: vec!["urn:x".to_owned()],
        ..registration("support", "local")
    };
    admin.register_agent(agent.clone()).await.unwrap();
    let info = admin.get_agent("support").await.unwrap();
    assert_eq!((&*info.implementation, &*info.orchestrator_profile), ("support", "local"));
    assert_eq!(info.description, agent.description);
    let params = [("image", "a:1"), ("profile", "local")].map(|(key, value)| (key.to_owned(), value.to_owned()));
    assert_eq!(info.launch_params, HashMap::from(params));
    assert_eq!((info.capabilities, info.extensions), (agent.capabilities, agent.extensions));

    let better = AgentRegistrationInfo { description: "better".into(), ..registration("support", "k8s") };
    admin.update_agent(better).await.unwrap();
    let info = admin.get_agent("support").await.unwrap();
    assert_eq!((&*info.orchestrator_profile, &*info.description), ("k8s", "better"));

    assert_eq!(implementations(&world).await, ["support"]);
    admin.delete_agent("support").await.unwrap();
    assert_eq!(refused("gone", admin.get_agent("support").await).kind(), Kind::NotFound);
    assert!(implementations(&world).await.is_empty());
}

#[tokio::test]
async fn an_agent_needs_a_profile_and_a_launch_an_agent() {
    let world = World::begin().await;
    invalid("no profile", world.admin().register_agent(registration("support", "")).await);
    let answer = world.admin().launch_agent("unknown", WS, "x", HashMap::new()).await;
    assert_eq!(refused("unknown", answer).kind(), Kind::NotFound);
}

#[tokio::test]
async fn a_resource_prefix_belongs_to_one_implementation() {
    let world = World::begin().await;
    let admin = world.admin();
    let claim = |implementation| AgentRegistrationInfo {
        resource_schema: vec![AgentResourceSchemaEntry {
            resource_type_prefix: "invoice".into(),
            permission_verbs: vec!["read".into()],
            ..AgentResourceSchemaEntry::default()
        }],
        ..registration(implementation, "local")
    };
    admin.register_agent(claim("first")).await.unwrap();
    let error = refused("it is taken", admin.register_agent(claim("second")).await);
    assert!(error.to_string().starts_with("ERR_PREFIX_CONFLICT"), "{error}");
    admin.delete_agent("first").await.unwrap();
    admin.register_agent(claim("second")).await.unwrap();
}

#[tokio::test]
async fn the_registry_of_agents_is_reserved() {
    let world = World::begin().await;
    for (name, client) in world.ordinary().await {
        denied(name, client.admin().register_agent(registration("support", "local")).await);
    }
    assert!(implementations(&world).await.is_empty());
}

// Sessions.

#[tokio::test]
async fn a_session_is_described() {
    let world = World::begin().await;
    let mut clients = world.ordinary().await;
    clients.push(("orchestrator", plain(&world.admin())));
    clients.push(("metrics bridge", plain(&world.connect(MetricsBridge::builder()).await)));
    for (name, client) in clients {
        let kind = match name {
            "agent" => PrincipalType::PrincipalAgent,
            "task" => PrincipalType::PrincipalTask,
            "user" => PrincipalType::PrincipalUser,
            "service" => PrincipalType::PrincipalService,
            "bridge" => PrincipalType::PrincipalBridge,
            "orchestrator" => PrincipalType::PrincipalOrchestrator,
            _ => PrincipalType::PrincipalMetricsBridge,
        };
        let found = world.admin().get_session(&session(&client)).await.unwrap();
        assert_eq!((found.session_id.clone(), found.r#type()), (session(&client), kind), "{name}");
        assert_eq!(found.identity, client.identity().as_str(), "{name}");
        assert_eq!(found.workspace, client.identity().workspace().unwrap_or_default(), "{name}");
        is_now(name, found.connected_at);
    }
}

fn connections(kind: PrincipalType, workspace: &str) -> ConnectionFilter {
    ConnectionFilter { r#type: kind.into(), workspace: workspace.to_owned(), ..ConnectionFilter::default() }
}

#[tokio::test]
async fn sessions_are_listed_by_workspace_and_type() {
    let world = World::begin().await;
    let (one, two, task) = (world.agent("worker").await, world.agent("worker").await, world.task().await);
    let elsewhere = world.agent_in("elsewhere", "worker").await;
    let of = |clients: &[&Client]| clients.iter().map(|client| session(client)).collect::<BTreeSet<_>>();
    let cases = [
        ("a workspace", connections(PrincipalType::Unspecified, WS), of(&[&one, &two, &task])),
        ("its agents", connections(PrincipalType::PrincipalAgent, WS), of(&[&one, &two])),
        ("its users", connections(PrincipalType::PrincipalUser, WS), of(&[])),
        ("all agents", connections(PrincipalType::PrincipalAgent, ""), of(&[&one, &two, &elsewhere])),
    ];
    for (what, filter, expected) in cases {
        let (found, total) = world.admin().sessions(filter).await.unwrap();
        assert_eq!(total, found.len() as u64, "{what}");
        assert_eq!(found.into_iter().map(|each| each.session_id).collect::<BTreeSet<_>>(), expected, "{what}");
    }
    let limited = ConnectionFilter { limit: 1, ..connections(PrincipalType::Unspecified, WS) };
    assert_eq!(world.admin().sessions(limited).await.unwrap().0.len(), 1);
}

#[tokio::test]
async fn an_ended_session_is_no_longer_listed() {
    let world = World::begin().await;
    let agent = world.agent("worker").await;
    let id = session(&agent);
    agent.close().await;
    refused("it has ended", world.admin().get_session(&id).await);
    assert_eq!(world.admin().sessions(connections(PrincipalType::Unspecified, WS)).await.unwrap(), (vec![], 0));
}

#[tokio::test]
async fn a_disconnect_tells_the_victim_and_frees_its_identity() {
    let world = World::begin().await;
    let (victim, witness) = (world.connect(Agent::builder(WS, "worker", "victim")).await, world.agent("worker").await);
    world.admin().disconnect(&session(&victim), "maintenance").await.unwrap();
    let signal = soon(victim.signals().next()).await.unwrap();
    assert!(matches!(&signal, Signal::ForceDisconnect(reason) if !reason.is_empty()), "{signal:?}");
    let why = soon(victim.ended()).await;
    assert_eq!(why.kind(), Kind::Disconnected, "{why:?}");
    assert!(!victim.is_connected(), "it does not come back by itself");
    assert!(matches!(&*victim.state().borrow(), State::Ended { .. }));
    until("its identity is free", async || world.try_connect(Agent::builder(WS, "worker", "victim")).await.is_ok())
        .await;
    witness.checkpoints().list().await.unwrap();
}

#[tokio::test]
async fn an_unknown_session_is_an_error() {
    let world = World::begin().await;
    for id in ["", "nobody"] {
        refused(id, world.admin().get_session(id).await);
        refused(id, world.admin().disconnect(id, "").await);
    }
}

#[tokio::test]
async fn session_operations_are_reserved() {
    let world = World::begin().await;
    let other = world.agent("worker").await;
    for (name, client) in world.ordinary().await {
        let admin = client.admin();
        denied(name, admin.sessions(ConnectionFilter::default()).await);
        denied(name, admin.get_session(&session(&other)).await);
        denied(name, admin.disconnect(&session(&other), "").await);
    }
    other.checkpoints().list().await.unwrap();
    silence("it stays", other.signals().next()).await;
}

// Who is connected.

async fn is_connected(asker: &Client, who: &PrincipalRef) -> trunkline_client::Result<bool> {
    let connected = asker.connection_status(who.clone()).await?.is_connected;
    Ok(connected)
}

#[tokio::test]
async fn the_connection_status_of_oneself_needs_no_permission() {
    let world = World::begin().await;
    let agent = world.agent("worker").await;
    assert!(is_connected(&agent, &principal(&agent)).await.unwrap());
}

#[tokio::test]
async fn the_connection_status_of_others_needs_the_capability() {
    let world = World::begin().await;
    let (asker, online) = (world.agent("worker").await, world.agent("worker").await);
    denied("not yet", is_connected(&asker, &principal(&online)).await);
    world.grant(&asker, "capability", "capability/query_connections", AccessLevel::Read).await;
    assert!(is_connected(&asker, &principal(&online)).await.unwrap());
    assert!(!is_connected(&asker, &named("agent", "ag::ws::worker::nobody")).await.unwrap());
}

// Tokens.

async fn new_token(world: &World, token: TokenCreateRequest) -> (TokenInfo, String) {
    let name = world.name("token");
    let token = TokenCreateRequest { name, principal_type: "Agent".into(), ..token };
    world.admin().create_token(token).await.unwrap()
}

async fn token_ids(world: &World, include_revoked: bool) -> Vec<String> {
    let (tokens, _) = world.admin().tokens(include_revoked, 1000, 0).await.unwrap();
    tokens.into_iter().map(|token| token.id).collect()
}

#[tokio::test]
async fn a_token_is_created_with_its_secret_once() {
    let world = World::begin().await;
    let request = TokenCreateRequest {
        workspace_patterns: vec!["team-*".into()],
        scopes: vec!["connect".into()],
        created_by: "ops".into(),
        expires_in_hours: 2,
        ..TokenCreateRequest::default()
    };
    let (token, secret) = new_token(&world, request).await;
    assert!(secret.len() >= 32);
    assert_eq!((&*token.principal_type, &*token.created_by, token.revoked), ("Agent", "ops", false));
    assert_eq!((&*token.workspace_patterns, &*token.scopes), (&["team-*".into()][..], &["connect".into()][..]));
    is_now("two hours before it expires", token.expires_at - 7200);
    assert_eq!(world.admin().get_token(&token.id).await.unwrap().name, token.name);
    assert_eq!(token_ids(&world, false).await, [token.id]);
}

#[tokio::test]
async fn tokens_differ_and_have_defaults() {
    let world = World::begin().await;
    let (token, secret) = new_token(&world, TokenCreateRequest::default()).await;
    let (_, other) = new_token(&world, TokenCreateRequest::default()).await;
    assert_ne!(secret, other);
    assert_eq!((&*token.workspace_patterns, &*token.scopes), (&["*".into()][..], &["connect".into()][..]));
    assert_eq!(token.expires_at, 0);
}

#[tokio::test]
async fn a_revoked_token_is_listed_on_request_only() {
    let world = World::begin().await;
    let (token, _) = new_token(&world, TokenCreateRequest::default()).await;
    world.admin().revoke_token(&token.id).await.unwrap();
    assert!(token_ids(&world, false).await.is_empty());
    assert_eq!(token_ids(&world, true).await, [&*token.id]);
    assert!(world.admin().get_token(&token.id).await.unwrap().revoked);
}

#[tokio::test]
async fn a_deleted_token_is_gone() {
    let world = World::begin().await;
    let (token, _) = new_token(&world, TokenCreateRequest::default()).await;
    world.admin().delete_token(&token.id).await.unwrap();
    assert!(token_ids(&world, true).await.is_empty());
    assert_eq!(refused("gone", world.admin().get_token(&token.id).await).kind(), Kind::NotFound);
}

#[tokio::test]
async fn an_incomplete_token_is_refused() {
    let world = World::begin().await;
    let cases = [("no name", "", "Agent"), ("no principal type", "n", ""), ("user token without a user", "n", "User")];
    for (what, name, principal_type) in cases {
        let (name, principal_type) = (name.to_owned(), principal_type.to_owned());
        let request = TokenCreateRequest { name, principal_type, ..TokenCreateRequest::default() };
        invalid(what, world.admin().create_token(request).await);
    }
}

#[tokio::test]
async fn token_operations_are_reserved() {
    let world = World::begin().await;
    for (name, client) in world.ordinary().await {
        let request =
            TokenCreateRequest { name: "n".into(), principal_type: "Agent".into(), ..TokenCreateRequest::default() };
        denied(name, client.admin().create_token(request).await);
    }
    assert!(token_ids(&world, true).await.is_empty());
}

// Rules.

/// Rules for a user.
async fn rules_for(world: &World, user: &str) -> Vec<AclRuleInfo> {
    rules(world, rule_of(&named("user", user), "", "")).await
}

async fn rules(world: &World, filter: AclRuleFilter) -> Vec<AclRuleInfo> {
    world.admin().rules(filter).await.unwrap().0
}

#[tokio::test]
async fn a_rule_is_granted_listed_and_revoked() {
    let world = World::begin().await;
    let (admin, ann) = (world.admin(), named("user", "ann"));
    let levels = [
        (AccessLevel::None, "NONE"),
        (AccessLevel::Read, "READ"),
        (AccessLevel::Write, "READWRITE"),
        (AccessLevel::Manage, "MANAGE"),
        (AccessLevel::Admin, "ADMIN"),
    ];
    for (level, name) in levels {
        let granted = world.grant_to(&ann, "workspace", WS, level).await;
        assert_eq!((granted.access_level, &*granted.access_level_name), (level as i32, name));
        let [listed] = &rules_for(&world, "ann").await[..] else { panic!("one rule is listed") };
        assert_eq!(listed.rule_id, granted.rule_id, "{name}");
        assert_eq!((&*listed.resource_type, &*listed.resource_id), ("workspace", WS), "{name}");
        assert_eq!((&*listed.granted_by, &*listed.reason), ("conformance", "because"), "{name}");
        assert_eq!(admin.get_rule(&granted.rule_id).await.unwrap(), *listed, "{name}");
        admin.revoke_of(rule_of(&ann, "workspace", WS)).await.unwrap();
        assert!(rules_for(&world, "ann").await.is_empty(), "{name}");
    }
}

#[tokio::test]
async fn rules_are_filtered() {
    let world = World::begin().await;
    let (ann, bob) = (named("user", "ann"), named("user", "bob"));
    world.grant_to(&ann, "workspace", WS, AccessLevel::Read).await;
    world.grant_to(&bob, "workspace", WS, AccessLevel::Read).await;
    world.grant_to(&ann, "kv_scope", "global", AccessLevel::Read).await;
    assert_eq!(rules(&world, rule_of(&named("", ""), "workspace", WS)).await.len(), 2);
    assert_eq!(rules(&world, rule_of(&ann, "", "")).await.len(), 2);
    assert_eq!(rules(&world, rule_of(&named("", "ann"), "kv_scope", "")).await.len(), 1);
}

#[tokio::test]
async fn granting_again_replaces_the_level() {
    let world = World::begin().await;
    let ann = named("user", "ann");
    let first = world.grant_to(&ann, "workspace", WS, AccessLevel::Read).await;
    let second = world.grant_to(&ann, "workspace", WS, AccessLevel::Manage).await;
    assert_eq!(first.rule_id, second.rule_id);
    let levels: Vec<i32> = rules_for(&world, "ann").await.iter().map(|rule| rule.access_level).collect();
    assert_eq!(levels, [AccessLevel::Manage as i32]);
}

#[tokio::test]
async fn a_rule_is_revoked_by_its_id() {
    let world = World::begin().await;
    let granted = world.grant_to(&named("user", "ann"), "workspace", WS, AccessLevel::Read).await;
    world.admin().revoke(&granted.rule_id).await.unwrap();
    assert!(rules_for(&world, "ann").await.is_empty());
}

#[tokio::test]
async fn revoking_what_is_not_there_is_an_error() {
    let world = World::begin().await;
    refused("by names", world.admin().revoke_of(rule_of(&named("user", "ann"), "workspace", WS)).await);
    refused("by id", world.admin().revoke("00000000-0000-0000-0000-000000000000").await);
}

#[tokio::test]
async fn a_level_outside_the_scale_or_too_wide_a_pattern_is_refused() {
    let world = World::begin().await;
    for level in [-10, 15, 60] {
        let grant = rule(&named("user", "ann"), "workspace", WS, level);
        invalid(&format!("level {level}"), world.admin().grant(grant).await);
    }
    let grant = rule(&named("agent", "ag::*"), "workspace", WS, AccessLevel::Read as i32);
    invalid("too wide", world.admin().grant(grant).await);
}

#[tokio::test]
async fn an_identity_pattern_covers_all_instances() {
    let world = World::begin().await;
    let target = world.connect(Agent::builder(WS, "worker", "target")).await;
    world.grant_to(&named("service", "sv::mail::*"), "workspace", WS, AccessLevel::Write).await;
    let mut messages = target.messages();
    for instance in ["one", "two"] {
        let service = world.connect(Service::builder("mail", instance)).await;
        service.send_to_agent(WS, "worker", "target", instance).await.unwrap();
        assert_eq!(soon(messages.next()).await.unwrap().source(), service.identity().as_str());
    }
}

#[tokio::test]
async fn the_fallbacks_are_those_of_development() {
    let world = World::begin().await;
    let cases = [
        ("user_workspace", 20, "READWRITE"),
        ("agent_workspace", 20, "READWRITE"),
        ("task_workspace", 20, "READWRITE"),
        ("agent_kv_scope", 0, "NONE"),
        ("service_kv_scope", 0, "NONE"),
    ];
    for (category, level, name) in cases {
        let policy = world.admin().fallback(category).await.unwrap();
        assert_eq!((&*policy.rule_category, policy.fallback_access_level), (category, level));
        assert_eq!(policy.fallback_access_level_name, name, "{category}");
    }
}

#[tokio::test]
async fn a_fallback_can_be_set_for_a_new_category() {
    let world = World::begin().await;
    let admin = world.admin();
    assert_eq!(refused("unknown", admin.fallback("cat_thing").await).kind(), Kind::NotFound);
    for level in [AccessLevel::Read, AccessLevel::None] {
        admin.set_fallback("cat_thing", level, "conformance").await.unwrap();
        let policy = admin.fallback("cat_thing").await.unwrap();
        assert_eq!((policy.fallback_access_level, &*policy.updated_by), (level as i32, "conformance"));
    }
}

#[tokio::test]
async fn granting_is_reserved() {
    let world = World::begin().await;
    for (name, client) in world.ordinary().await {
        let grant = rule(&named("user", "ann"), "workspace", WS, AccessLevel::Read as i32);
        refused(name, client.admin().grant(grant).await);
    }
    assert!(rules_for(&world, "ann").await.is_empty());
}

#[tokio::test]
async fn a_workspace_manager_may_share_the_workspace_up_to_writing() {
    let world = World::begin().await;
    let manager = world.agent("worker").await;
    world.grant(&manager, "workspace", WS, AccessLevel::Manage).await;
    let ann = named("user", "ann");
    let share = async |workspace: &str, level: AccessLevel| {
        manager.admin().grant(rule(&ann, "workspace", workspace, level as i32)).await
    };
    share(WS, AccessLevel::Write).await.unwrap();
    refused("more than writing", share(WS, AccessLevel::Manage).await);
    refused("another workspace", share("elsewhere", AccessLevel::Read).await);
    let levels: Vec<i32> = rules_for(&world, "ann").await.iter().map(|rule| rule.access_level).collect();
    assert_eq!(levels, [AccessLevel::Write as i32]);
}

// Not ported: `test_workspace_creation_needs_data`, as data is always given here; the `test_sdk_…` ones are what every test here
// does. Explanations (`test_explanation_…`, `test_rule_for_another_workspace_does_not_count`, the last line of
// `test_granting_again_replaces_the_level`), groups and roles (`test_group_members_share_the_groups_rules`,
// `test_role_gives_its_rules_to_whoever_holds_it`, `test_unknown_group_and_role_are_errors`): the server does not have them yet.

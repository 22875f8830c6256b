//! Without `--dev`, a key opens what it is for and nothing else.

use tonic::Code;
use trunkline::{Config, Server};
use trunkline_proto::v1::{
    InitConnection, OrchestratorIdentity, SwitchWorkspace, TokenCreateRequest, TokenOperation, TokenResponse,
    UserIdentity, downstream_message::Payload as Down, init_connection::ClientType, signal::SignalType,
    token_operation::OpType, upstream_message::Payload as Up,
};

use crate::{
    broken,
    client::{Client, agent},
    sandbox::Web,
    sql,
};

struct World {
    server: Server,
    admin: Client,
    _dir: tempfile::TempDir,
}

fn with_key(init: InitConnection, key: &str) -> InitConnection {
    InitConnection { credentials: [("x-api-key".to_owned(), key.to_owned())].into(), ..init }
}

fn orchestrator() -> InitConnection {
    let orchestrator = OrchestratorIdentity { implementation: "ops".into(), ..OrchestratorIdentity::default() };
    InitConnection { client_type: Some(ClientType::Orchestrator(orchestrator)), ..InitConnection::default() }
}

fn user(user: &str) -> InitConnection {
    let user = UserIdentity { user_id: user.into(), window_id: "w".into() };
    InitConnection { client_type: Some(ClientType::User(user)), ..InitConnection::default() }
}

impl World {
    async fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let config = Config { data_dir: dir.path().to_owned(), ..Config::on_free_ports() };
        let mut server = Server::start(config).await.unwrap();
        let key = server.take_admin_key().expect("the first start makes one");
        assert!(server.take_admin_key().is_none());
        let admin = Client::connect(server.addresses().grpc, with_key(orchestrator(), key.reveal())).await.unwrap();
        Self { server, admin, _dir: dir }
    }

    async fn token(&mut self, operation: TokenOperation) -> TokenResponse {
        self.admin.put(Up::TokenOp(operation.into())).await;
        match self.admin.next().await.unwrap() {
            Some(Down::Token(reply)) => *reply,
            other => panic!("expected a token reply, got {other:?}"),
        }
    }

    async fn key(&mut self, kind: &str, created_by: &str, pattern: &str) -> TokenResponse {
        let create_request = Some(TokenCreateRequest {
            name: "test".into(),
            principal_type: kind.into(),
            workspace_patterns: vec![pattern.into()],
            created_by: created_by.into(),
            ..TokenCreateRequest::default()
        });
        let reply =
            self.token(TokenOperation { op: OpType::Create.into(), create_request, ..TokenOperation::default() }).await;
        assert!(reply.success, "{}", reply.error);
        reply
    }

    async fn refused(&self, init: InitConnection) -> (Code, String) {
        let refused = Client::connect(self.server.addresses().grpc, init).await.err().expect("a refusal");
        (refused.code(), refused.message().to_owned())
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_key_opens_what_it_is_for() {
    let mut world = World::new().await;
    let grpc = world.server.addresses().grpc;
    let key = world.key("agent", "ag::ws::impl::o*", "w*").await.plaintext_token;
    Client::connect(grpc, with_key(agent("one"), &key)).await.unwrap();

    let (code, why) = world.refused(with_key(agent("two"), &key)).await;
    assert_eq!(
        (code, why.as_str()),
        (Code::PermissionDenied, "API key principal id mismatch: key=ag::ws::impl::o*, claimed=ag::ws::impl::two")
    );
    let (code, why) = world.refused(with_key(user("ann"), &key)).await;
    assert_eq!(
        (code, why.as_str()),
        (Code::PermissionDenied, "API key principal type mismatch: key=Agent, claimed=User")
    );
    let elsewhere = world.key("agent", "", "prod-*").await.plaintext_token;
    let (code, why) = world.refused(with_key(agent("one"), &elsewhere)).await;
    assert_eq!((code, why.as_str()), (Code::PermissionDenied, "API key not authorized for workspace ws"));
    assert_eq!(world.refused(with_key(agent("one"), "guess")).await.0, Code::Unauthenticated);
    // Nobody administers by claiming a kind.
    assert_eq!(world.refused(orchestrator()).await.0, Code::Unauthenticated);
    world.server.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_users_key_holds_for_the_workspaces_they_switch_to() {
    let mut world = World::new().await;
    let key = world.key("User", "ann", "team-*").await.plaintext_token;
    let mut ann = Client::connect(world.server.addresses().grpc, with_key(user("ann"), &key)).await.unwrap();
    for (workspace, expected) in [("team-a", None), ("prod", Some("ERR_PERMISSION_DENIED"))] {
        ann.put(Up::SwitchWorkspace(SwitchWorkspace { new_workspace_id: workspace.into() }.into())).await;
        if let Some(code) = expected {
            let Some(Down::Error(error)) = ann.next().await.unwrap() else { panic!("no error") };
            assert_eq!(error.code, code);
        }
        ann.barrier().await;
    }
    world.server.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn revoking_a_key_ends_its_sessions() {
    let mut world = World::new().await;
    let made = world.key("agent", "", "*").await;
    let init = with_key(agent("one"), &made.plaintext_token);
    let mut one = Client::connect(world.server.addresses().grpc, init.clone()).await.unwrap();
    let token_id = made.created_token.unwrap().id;
    let reply = world.token(TokenOperation { op: OpType::Revoke.into(), token_id, ..TokenOperation::default() }).await;
    assert!(reply.success, "{}", reply.error);
    assert_eq!(one.end().await, Some(Code::Cancelled));
    assert_eq!(world.refused(init).await.0, Code::Unauthenticated);
    world.server.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_key_that_expires_ends_its_sessions() {
    let mut world = World::new().await;
    let made = world.key("agent", "", "*").await;
    let (id, init) = (made.created_token.unwrap().id, with_key(agent("one"), &made.plaintext_token));
    sql::expire_token(world.server.store(), &id, sql::now() + 5).await;
    let mut one = Client::connect(world.server.addresses().grpc, init.clone()).await.unwrap();
    let lasting = world.key("agent", "", "*").await.plaintext_token;
    let mut two = Client::connect(world.server.addresses().grpc, with_key(agent("two"), &lasting)).await.unwrap();
    let signal = loop {
        match one.next().await.unwrap() {
            Some(Down::Signal(signal)) => break signal,
            Some(Down::Config(_)) => {}
            other => panic!("expected a signal, got {other:?}"),
        }
    };
    assert_eq!((signal.r#type(), signal.reason.as_str()), (SignalType::ForceDisconnect, "its credential has expired"));
    assert_eq!(one.end().await, Some(Code::Unauthenticated));
    assert_eq!(world.refused(init).await.0, Code::Unauthenticated);
    two.barrier().await;
    world.server.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn only_administrators_make_keys() {
    let mut world = World::new().await;
    let key = world.key("orchestrator", "", "*").await.plaintext_token;
    let mut other = Client::connect(world.server.addresses().grpc, with_key(orchestrator(), &key)).await.unwrap();
    other.put(Up::TokenOp(TokenOperation { request_id: "r".into(), ..TokenOperation::default() }.into())).await;
    let Some(Down::Error(error)) = other.next().await.unwrap() else { panic!("no error") };
    assert_eq!((error.code.as_str(), error.request_id.as_str()), ("ERR_PERMISSION_DENIED", "r"));
    world.server.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_key_is_for_a_name_or_for_how_names_begin() {
    let mut world = World::new().await;
    let grpc = world.server.addresses().grpc;
    let key = world.key("agent", "ag::ws::impl::o?e[1]", "*").await.plaintext_token;
    Client::connect(grpc, with_key(agent("o?e[1]"), &key)).await.unwrap();
    assert_eq!(world.refused(with_key(agent("one1"), &key)).await.0, Code::PermissionDenied);
    let create_request = Some(TokenCreateRequest {
        name: "test".into(),
        principal_type: "agent".into(),
        created_by: "ag::*::impl::one".into(),
        ..TokenCreateRequest::default()
    });
    let reply =
        world.token(TokenOperation { op: OpType::Create.into(), create_request, ..TokenOperation::default() }).await;
    assert!(!reply.success && reply.error.contains("may end in *"), "{}", reply.error);
    world.server.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn guessing_makes_guessers_wait_and_nobody_else() {
    let mut world = World::new().await;
    let good = world.key("agent", "", "*").await.plaintext_token;
    for n in 0..5 {
        // Under whatever name: it is not the name that guesses.
        let (code, why) = world.refused(with_key(agent(&n.to_string()), "guess")).await;
        assert_eq!((code, why.contains("not found")), (Code::Unauthenticated, true), "{why}");
    }
    for secret in ["guess", "another"] {
        let (code, why) = world.refused(with_key(agent("one"), secret)).await;
        assert_eq!((code, why.as_str()), (Code::Unauthenticated, "auth temporarily throttled after repeated failures"));
    }
    // Whoever has a key comes from the same address, as behind a proxy, and under a name that guessers have tried.
    Client::connect(world.server.addresses().grpc, with_key(agent("one"), &good)).await.unwrap().barrier().await;
    world.server.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn wrong_bearers_of_an_address_do_not_shut_out_right_ones() {
    let mut world = World::new().await;
    let good = world.key("user", "ann", "*").await.plaintext_token;
    let web = Web::new(world.server.addresses().http);
    for _ in 0..5 {
        assert_eq!(web.with("guess").get("/sessions").await.0, 401);
    }
    assert_eq!(web.with("guess").get("/sessions").await.0, 429);
    assert_ne!(web.with(&good).get("/sessions").await.0, 429);
    assert_ne!(web.with(&good).get("/sessions").await.0, 401);
    world.server.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_key_that_is_revoked_while_its_client_connects_leaves_nobody_in() {
    let mut world = World::new().await;
    let grpc = world.server.addresses().grpc;
    for n in 0..30 {
        let made = world.key("agent", "", "*").await;
        let (init, id) = (with_key(agent(&n.to_string()), &made.plaintext_token), made.created_token.unwrap().id);
        let connecting = tokio::spawn(Client::connect(grpc, init));
        // At a different moment each time.
        tokio::time::sleep(std::time::Duration::from_micros(n * 100)).await;
        let revoke = TokenOperation { op: OpType::Revoke.into(), token_id: id, ..TokenOperation::default() };
        assert!(world.token(revoke).await.success);
        if let Ok(mut client) = connecting.await.unwrap() {
            assert!(client.end().await.is_some(), "it was let in, and is put out");
        }
    }
    world.server.stop().await;
}

/// A lifetime that is a mistake must not become a key for ever.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_key_that_would_expire_before_it_is_made_is_refused() {
    let mut world = World::new().await;
    for (expires_in_hours, is_made) in [(-1, false), (0, true), (1, true)] {
        let create_request = Some(TokenCreateRequest {
            name: "test".into(),
            principal_type: "agent".into(),
            expires_in_hours,
            ..TokenCreateRequest::default()
        });
        let create = TokenOperation { op: OpType::Create.into(), create_request, ..TokenOperation::default() };
        let reply = world.token(create).await;
        assert_eq!(reply.success, is_made, "{expires_in_hours}: {}", reply.error);
    }
    world.server.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn another_key_does_not_take_the_place_of_a_client_that_answers_nothing() {
    let mut world = World::new().await;
    let grpc = world.server.addresses().grpc;
    let [first, second] = [world.key("agent", "", "*").await, world.key("agent", "", "*").await];
    let endpoint = tonic::transport::Endpoint::from_shared(format!("http://{grpc}")).unwrap();
    let (channel, end) = broken::over(endpoint, grpc).await;
    let _silent = Client::connect_over(channel, with_key(agent("one"), &first.plaintext_token)).await.unwrap();
    end.breaks();
    let (code, text) = world.refused(with_key(agent("one"), &second.plaintext_token)).await;
    assert_eq!(code, Code::AlreadyExists, "{text}");
    Client::connect(grpc, with_key(agent("one"), &first.plaintext_token)).await.unwrap();
    world.server.stop().await;
}

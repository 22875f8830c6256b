//! Without `--dev`, a bearer token opens what it is for and nothing else.

use reqwest::Method;
use serde_json::json;
use trunkline::{Config, Server, config::HttpConfig};
use trunkline_core::limits::Limits;
use trunkline_proto::v1::{
    InitConnection, OrchestratorIdentity, TokenCreateRequest, TokenOperation, TokenResponse,
    downstream_message::Payload as Down, init_connection::ClientType, token_operation::OpType,
    upstream_message::Payload as Up,
};

use super::{PATIENCE, Web};
use crate::{client::Client, sql};

pub(crate) struct World {
    pub(crate) server: Server,
    admin: Client,
    pub(crate) web: Web,
    _dir: tempfile::TempDir,
}

impl World {
    pub(crate) async fn new() -> Self {
        Self::with(Limits::default()).await
    }

    async fn with(limits: Limits) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let http = HttpConfig { allowed_origins: vec!["https://app.example".into()] };
        let config = Config { data_dir: dir.path().to_owned(), http, limits, ..Config::on_free_ports() };
        let mut server = Server::start(config).await.unwrap();
        let key = server.take_admin_key().unwrap();
        let orchestrator = OrchestratorIdentity { implementation: "ops".into(), ..OrchestratorIdentity::default() };
        let init = InitConnection {
            client_type: Some(ClientType::Orchestrator(orchestrator)),
            credentials: [("x-api-key".to_owned(), key.reveal().to_owned())].into(),
            ..InitConnection::default()
        };
        let admin = Client::connect(server.addresses().grpc, init).await.unwrap();
        let web = Web::new(server.addresses().http).with(key.reveal());
        Self { server, admin, web, _dir: dir }
    }

    async fn token(&mut self, operation: TokenOperation) -> TokenResponse {
        self.admin.put(Up::TokenOp(operation.into())).await;
        match self.admin.next().await.unwrap() {
            Some(Down::Token(reply)) => *reply,
            other => panic!("expected a token reply, got {other:?}"),
        }
    }

    pub(crate) async fn key(&mut self, kind: &str, holder: &str, scope: &str, project: &str) -> TokenResponse {
        let request = TokenCreateRequest {
            name: "test".into(),
            principal_type: kind.into(),
            workspace_patterns: vec![project.into()],
            scopes: vec![scope.into()],
            created_by: holder.into(),
            ..TokenCreateRequest::default()
        };
        let op = OpType::Create.into();
        self.token(TokenOperation { op, create_request: Some(request), ..TokenOperation::default() }).await
    }

    pub(crate) async fn revoke(&mut self, id: &str) -> bool {
        let op = OpType::Revoke.into();
        self.token(TokenOperation { op, token_id: id.to_owned(), ..TokenOperation::default() }).await.success
    }

    pub(crate) async fn holder(&mut self, kind: &str, holder: &str, scope: &str, project: &str) -> Web {
        let reply = self.key(kind, holder, scope, project).await;
        assert!(reply.success, "{}", reply.error);
        self.web.with(&reply.plaintext_token)
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn each_token_opens_what_it_is_for() {
    let mut world = World::new().await;
    let admin = world.web.clone();
    for (id, project) in [("mine", "p"), ("other", "q")] {
        assert_eq!(admin.post(&format!("/sessions/{id}?project={project}"), "").await.0, 201);
    }
    let nobody = Web { token: None, ..admin.clone() };
    let stranger = admin.with("guessed");
    let connects = world.holder("user", "eve", "connect", "*").await;
    let reads = world.holder("user", "ann", "sandbox:read", "p").await;
    let writes = world.holder("user", "ben", "sandbox:write", "p").await;
    let sandbox = world.holder("sandbox", "mine", "connect", "p").await;
    let agent = world.holder("agent", "ag::w::i::s", "connect", "*").await;
    let event = json!({"type": "heartbeat"}).to_string();
    let prompt = json!({"type": "prompt", "text": "x"}).to_string();
    let statuses = async |who: &Web, id: &str| {
        [
            who.get(&format!("/sessions/{id}")).await.0,
            who.get(&format!("/sessions/{id}/artifacts")).await.0,
            who.post(&format!("/sessions/{id}/events"), event.clone()).await.0,
            who.post(&format!("/sessions/{id}/commands"), prompt.clone()).await.0,
        ]
    };
    assert_eq!(statuses(&nobody, "mine").await, [401; 4]);
    assert_eq!(statuses(&connects, "mine").await, [404; 4], "it does not even learn that it is there");
    assert_eq!(statuses(&reads, "mine").await, [200, 200, 403, 403]);
    assert_eq!(statuses(&writes, "mine").await, [200, 200, 403, 409]);
    assert_eq!(statuses(&sandbox, "mine").await, [200, 200, 202, 403]);
    assert_eq!(statuses(&agent, "mine").await, [403; 4]);
    for who in [&reads, &writes, &sandbox] {
        assert_eq!(statuses(who, "other").await, [404; 4]);
        let (_, seen) = who.get("/sessions").await;
        assert_eq!(seen.as_array().unwrap().iter().map(|s| s["id"].as_str().unwrap()).collect::<Vec<_>>(), ["mine"]);
    }
    assert_eq!(writes.post("/sessions/new?project=q", "").await.0, 404, "not in that project");
    assert_eq!(writes.post("/sessions/new", "").await.0, 404, "nor in none");
    assert_eq!(reads.post("/sessions/new?project=p", "").await.0, 403);
    assert_eq!(writes.post("/sessions/new?project=p", "").await.0, 201);
    assert_eq!(reads.delete("/sessions/new").await.0, 403);
    assert_eq!(writes.delete("/sessions/new").await.0, 204);
    let refused = world.key("sandbox", "no id", "connect", "*").await;
    assert!(!refused.success && refused.error.contains("no sandbox id"), "{}", refused.error);
    // Guessing makes the guesser wait.
    for _ in 0..5 {
        assert_eq!(stranger.get("/sessions").await.0, 401);
    }
    assert_eq!(stranger.get("/sessions").await.0, 429);
    world.server.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn streams_take_tokens_as_browsers_send_them_and_end_with_them() {
    let mut world = World::new().await;
    let admin = world.web.clone();
    assert_eq!(admin.post("/sessions/s?project=p", "").await.0, 201);
    let reply = world.key("user", "ann", "sandbox:read", "p").await;
    let (id, token) = (reply.created_token.unwrap().id, reply.plaintext_token);
    let browser = Web { token: None, ..admin.clone() };
    let mut by_address = browser.open(&format!("/sessions/s/stream?access_token={token}")).await;
    let mut by_header = admin.with(&token).open("/sessions/stream").await;
    by_header.expect("session_snapshot").await;
    by_header.expect("session_snapshot_end").await;
    let cookie = |request: reqwest::RequestBuilder| request.header("cookie", format!("a=b; trunkline_token={token}"));
    let by_cookie = cookie(browser.request(Method::GET, "/sessions/s/stream")).send().await.unwrap();
    assert_eq!(by_cookie.status(), 200);
    // Only streams do: elsewhere a page could have been sent there by somebody else.
    assert_eq!(browser.get(&format!("/sessions?access_token={token}")).await.0, 401);
    assert_eq!(browser.ask(cookie(browser.request(Method::GET, "/sessions"))).await.0, 401);
    let revoke = TokenOperation { op: OpType::Revoke.into(), token_id: id, ..TokenOperation::default() };
    assert!(world.token(revoke).await.success);
    for stream in [&mut by_address, &mut by_header] {
        assert_eq!(stream.expect("closed").await.data, json!({"reason": "auth_expiring"}));
        stream.ends().await;
    }
    // One that expires does the same.
    let reply = world.key("user", "ann", "sandbox:read", "p").await;
    sql::expire_token(world.server.store(), &reply.created_token.unwrap().id, sql::now() + 5).await;
    let mut stream = admin.with(&reply.plaintext_token).open("/sessions/s/stream").await;
    assert_eq!(stream.expect("closed").await.data, json!({"reason": "auth_expiring"}));
    stream.ends().await;
    world.server.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_token_has_so_many_streams() {
    let mut world = World::with(Limits { event_streams_per_token: 2, ..Limits::default() }).await;
    let admin = world.web.clone();
    assert_eq!(admin.post("/sessions/s?project=p", "").await.0, 201);
    let reads = world.holder("user", "ann", "sandbox:read", "p").await;
    let open = async |who: &Web| who.request(Method::GET, "/sessions/s/stream").send().await.unwrap();
    let (one, two) = (open(&reads).await, open(&reads).await);
    assert_eq!((one.status().as_u16(), two.status().as_u16()), (200, 200));
    let refused = open(&reads).await;
    assert_eq!((refused.status().as_u16(), refused.headers()["retry-after"].to_str().unwrap()), (429, "1"));
    assert_eq!(open(&admin).await.status(), 200, "others have their own");
    drop(one);
    let again = async { while open(&reads).await.status() != 200 {} };
    tokio::time::timeout(PATIENCE, again).await.unwrap();
    drop(two);
    world.server.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_sandbox_obeys_in_the_project_in_which_it_began() {
    let mut world = World::new().await;
    let admin = world.web.clone();
    let ours = world.holder("user", "ann", "sandbox:write", "ours").await;
    let theirs = world.holder("user", "eve", "sandbox:write", "theirs").await;
    // Its key names no project.
    let sandbox = world.holder("sandbox", "s", "connect", "*").await;
    let heartbeat = json!({"type": "heartbeat"}).to_string();
    assert_eq!(ours.post("/sessions/s?project=ours", "").await.0, 201);
    assert_eq!(sandbox.post("/sessions/s/events", heartbeat.clone()).await.0, 202);
    let mut commands = sandbox.open("/sessions/s/commands").await;
    assert_eq!(ours.delete("/sessions/s").await.0, 204);
    commands.ends().await;
    // Anybody may use the id again, and finds nobody there.
    assert_eq!(theirs.post("/sessions/s?project=theirs", "").await.0, 201);
    assert_eq!(sandbox.request(Method::GET, "/sessions/s/commands").send().await.unwrap().status(), 404);
    assert_eq!(sandbox.post("/sessions/s/events", heartbeat.clone()).await.0, 404);
    assert_eq!(sandbox.get("/sessions/s").await.0, 404);
    let prompt = json!({"type": "prompt", "text": "x"}).to_string();
    assert_eq!(theirs.post("/sessions/s/commands", prompt).await.0, 409);
    assert_eq!(theirs.delete("/sessions/s").await.0, 204);
    assert_eq!(ours.post("/sessions/s?project=ours", "").await.0, 201);
    assert_eq!(sandbox.post("/sessions/s/events", heartbeat.clone()).await.0, 202);
    // No project is one, too.
    let free = world.holder("sandbox", "f", "connect", "*").await;
    assert_eq!(admin.post("/sessions/f", "").await.0, 201);
    assert_eq!(free.post("/sessions/f/events", heartbeat.clone()).await.0, 202);
    assert_eq!(admin.delete("/sessions/f").await.0, 204);
    assert_eq!(theirs.post("/sessions/f?project=theirs", "").await.0, 201);
    assert_eq!(free.post("/sessions/f/events", heartbeat).await.0, 404);
    world.server.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn pages_of_foreign_origins_are_refused() {
    let world = World::new().await;
    let web = world.web.clone();
    let from =
        |method: Method, origin: &str| web.request(method, "/sessions/s").header("origin", origin.to_owned()).send();
    assert_eq!(from(Method::POST, "https://evil.example").await.unwrap().status(), 403);
    assert_eq!(from(Method::POST, "null").await.unwrap().status(), 403);
    assert_eq!(web.get("/sessions").await.1, json!([]), "nothing was made");
    assert_eq!(from(Method::POST, &web.base).await.unwrap().status(), 201, "its own pages");
    let allowed = from(Method::GET, "https://app.example").await.unwrap();
    assert_eq!(
        (allowed.status().as_u16(), allowed.headers()["access-control-allow-origin"].to_str().unwrap()),
        (200, "https://app.example")
    );
    let preflight = web.client.request(Method::OPTIONS, format!("{}/sessions/s", web.base));
    let preflight = preflight.header("origin", "https://app.example").header("access-control-request-method", "DELETE");
    let preflight = preflight.send().await.unwrap();
    assert!(preflight.headers()["access-control-allow-methods"].to_str().unwrap().contains("DELETE"));
    let config = Config {
        http: HttpConfig { allowed_origins: vec!["app.example".into()] },
        dev: true,
        ..Config::on_free_ports()
    };
    let dir = tempfile::tempdir().unwrap();
    let refused = Server::start(Config { data_dir: dir.path().to_owned(), ..config }).await.err().unwrap();
    assert!(refused.to_string().contains("app.example"), "{refused}");
    world.server.stop().await;
}

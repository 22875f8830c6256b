//! A server, clients of every kind, and what they hear.
//!
//! What nobody may hear is shown by what is heard next: a marker that is sent later.

use std::{ops::Deref, time::Duration};

use bytes::Bytes;
use tempfile::TempDir;
use trunkline::{Config, Server, config::Durability};
use trunkline_client::{
    AccessLevel, Agent, Bridge, Builder, Client, Error, Kind, Message, MetricsBridge, Orchestrator, Outgoing,
    Principal, Received, Reconnect, Service, Topic, UniqueTask, User, Worker, WorkflowEngine,
    admin::Admin,
    proto::{AclGrantRequest, AclRuleFilter},
};

/// Nothing here takes longer unless it hangs.
const PATIENCE: Duration = Duration::from_secs(20);

/// Where most of it happens.
pub(crate) const WS: &str = "ws";
/// And elsewhere.
pub(crate) const OTHER: &str = "elsewhere";

pub(crate) struct World {
    address: String,
    _server: Server,
    _dir: TempDir,
}

impl World {
    /// With the limit of messages that the suite expects.
    pub(crate) async fn begin() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let mut config = Config { data_dir: dir.path().to_owned(), dev: true, ..Config::on_free_ports() };
        config.durability = Durability::Process;
        (config.limits.messages_per_second, config.limits.message_burst) = (100, 200);
        let server = Server::start(config).await.unwrap();
        Self { address: server.addresses().grpc.to_string(), _server: server, _dir: dir }
    }

    pub(crate) fn at<P: Principal>(&self, builder: Builder<P>) -> Builder<P> {
        builder.address(&self.address).reconnect(Reconnect::never())
    }

    pub(crate) async fn connect<P: Principal>(&self, builder: Builder<P>) -> P {
        soon(self.at(builder).connect()).await.unwrap()
    }

    /// Why it is not let in.
    pub(crate) async fn refused<P: Principal>(&self, builder: Builder<P>) -> Error {
        soon(self.at(builder).connect()).await.err().expect("it is refused")
    }

    pub(crate) async fn agent(&self, specifier: &str) -> Agent {
        self.agent_in(WS, specifier).await
    }

    pub(crate) async fn agent_in(&self, workspace: &str, specifier: &str) -> Agent {
        self.connect(Agent::builder(workspace, "worker", specifier)).await
    }

    pub(crate) async fn task(&self, specifier: &str) -> UniqueTask {
        self.connect(UniqueTask::builder(WS, "job", specifier)).await
    }

    pub(crate) async fn worker(&self, implementation: &str) -> Worker {
        self.connect(Worker::builder(WS, implementation)).await
    }

    /// On no workspace.
    pub(crate) async fn user(&self, name: &str, window: &str) -> User {
        self.connect(User::builder(name, window)).await
    }

    pub(crate) async fn user_on(&self, workspace: &str, name: &str, window: &str) -> User {
        let user = self.connect(User::builder(name, window).workspace(workspace)).await;
        done(&user).await;
        user
    }

    pub(crate) async fn service(&self, specifier: &str) -> Service {
        self.connect(Service::builder("svc", specifier)).await
    }

    pub(crate) async fn bridge(&self, specifier: &str) -> Bridge {
        self.connect(Bridge::builder("brg", specifier)).await
    }

    pub(crate) async fn orchestrator(&self, specifier: &str) -> Orchestrator {
        self.connect(Orchestrator::builder("orc").specifier(specifier).profile("none")).await
    }

    pub(crate) async fn engine(&self) -> WorkflowEngine {
        self.connect(WorkflowEngine::builder()).await
    }

    pub(crate) async fn metrics(&self) -> MetricsBridge {
        self.connect(MetricsBridge::builder()).await
    }

    /// Somebody who may do everything.
    pub(crate) async fn admin(&self) -> Admin {
        self.connect(Orchestrator::builder("admin").profile("none")).await.admin()
    }

    /// Makes a rule for a workspace.
    pub(crate) async fn grant(&self, who: &Client, workspace: &str, level: AccessLevel) {
        self.grant_to(who.identity().as_str(), "workspace", workspace, level).await;
    }

    /// Makes a rule for somebody who may not be there yet.
    pub(crate) async fn grant_to(&self, identity: &str, resource_type: &str, resource: &str, level: AccessLevel) {
        let (principal_type, principal_id) = principal(identity);
        let rule = AclGrantRequest {
            principal_type,
            principal_id,
            resource_type: resource_type.into(),
            resource_id: resource.into(),
            access_level: level as i32,
            granted_by: "conformance".into(),
            ..AclGrantRequest::default()
        };
        self.admin().await.grant(rule).await.unwrap();
    }

    /// Removes the rule for a workspace.
    pub(crate) async fn revoke(&self, identity: &str, workspace: &str) {
        let (principal_type, principal_id) = principal(identity);
        let (resource_type, resource_id) = ("workspace".into(), workspace.into());
        let rule = AclRuleFilter { principal_type, principal_id, resource_type, resource_id, ..Default::default() };
        self.admin().await.revoke_of(rule).await.unwrap();
    }
}

/// Without its principal's own methods, for lists of several kinds.
pub(crate) fn plain(principal: impl Deref<Target = Client>) -> Client {
    principal.clone()
}

/// By what rules know somebody: a user for all of its windows, everybody else by the identity.
pub(crate) fn principal(identity: &str) -> (String, String) {
    let (prefix, rest) = identity.split_once("::").expect("it is an identity");
    let kind = match prefix {
        "ag" => "agent",
        "tu" | "ta" => "task",
        "us" => return ("user".into(), rest.split("::").next().unwrap_or_default().into()),
        "sv" => "service",
        "br" => "bridge",
        "orc" => "orchestrator",
        "wfe" => "workflow_engine",
        other => panic!("no rules for {other}"),
    };
    (kind.into(), identity.into())
}

pub(crate) async fn soon<T>(what: impl Future<Output = T>) -> T {
    tokio::time::timeout(PATIENCE, what).await.expect("it happens soon")
}

/// Returns when the server has dealt with what was sent before: the frames of one client take effect in order.
pub(crate) async fn done(client: &Client) {
    soon(client.checkpoints().load("barrier")).await.unwrap();
}

/// The next of anything.
pub(crate) async fn next<T>(mut received: Received<T>) -> T {
    soon(received.next()).await.expect("the client is connected")
}

/// The next message.
pub(crate) async fn heard(client: &Client) -> Message {
    next(client.messages()).await
}

/// The next message, which is this one.
#[track_caller]
pub(crate) fn hears(client: &Client, payload: impl Into<Bytes>) -> impl Future<Output = Message> {
    let (at, payload) = (std::panic::Location::caller(), payload.into());
    async move {
        let message = heard(client).await;
        assert!(*message.payload() == payload, "{:?} instead of {payload:?}, at {at}", message.text());
        message
    }
}

/// The payloads of the next messages.
pub(crate) async fn texts(client: &Client, count: usize) -> Vec<String> {
    let mut texts = Vec::with_capacity(count);
    while texts.len() < count {
        texts.push(heard(client).await.text().into_owned());
    }
    texts
}

/// Where somebody is reached.
pub(crate) fn place(client: &Client) -> Topic {
    client.identity().topic().expect("it can be written to")
}

/// A topic from its text.
pub(crate) fn topic(text: &str) -> Topic {
    text.parse().unwrap()
}

/// Sends, and returns when the server has it.
pub(crate) async fn say(from: &Client, to: impl Into<Topic>, payload: impl Into<Bytes>) {
    soon(from.send_confirmed(Outgoing::new(to, payload))).await.unwrap();
}

/// The server does not take a message, and the client goes on.
pub(crate) async fn denied(from: &Client, to: impl Into<Topic>) {
    let to = to.into();
    let error = soon(from.send_confirmed(Outgoing::new(&to, "denied"))).await.expect_err(to.as_str());
    assert_eq!((error.kind(), error.code()), (Kind::Denied, "ERR_PERMISSION_DENIED"), "{to}");
    assert!(!error.is_retryable(), "{to}");
    done(from).await;
}

/// What they hear next is a marker that is sent to each now, so they heard nothing before.
pub(crate) async fn heard_nothing(from: &Client, bystanders: &[&Client]) {
    for bystander in bystanders {
        say(from, place(bystander), "marker").await;
        let message = heard(bystander).await;
        assert_eq!(message.text(), "marker", "{:?} hears only what is for it", bystander.identity());
    }
}

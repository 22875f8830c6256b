//! A server of one test's own, an operator who may do everything there, and ways to wait.

use std::{
    collections::HashMap,
    ops::Deref,
    sync::atomic::{AtomicU32, Ordering},
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use tempfile::TempDir;
use trunkline::Server;
use trunkline_client::{
    AccessLevel, Agent, Builder, Client, Error, Kind, Orchestrator, Principal, Service, UniqueTask, User,
    admin::{AclRuleInfo, Admin, AgentRegistrationInfo, PrincipalRef},
    proto::{AclGrantRequest, AclRuleFilter},
};

/// Nothing here takes longer unless it hangs.
pub(crate) const PATIENCE: Duration = Duration::from_secs(20);

/// Silence that counts as "nothing came", where no later frame can prove it.
const QUIET: Duration = Duration::from_millis(150);

/// Where the clients of a test live.
pub(crate) const WS: &str = "ws";

pub(crate) struct World {
    _server: Server,
    address: String,
    operator: Orchestrator,
    names: AtomicU32,
    /// Kept for a server that does not own its directory.
    _data: Option<TempDir>,
}

impl World {
    pub(crate) async fn begin() -> Self {
        Self::of(Server::builder().start().await.unwrap(), None).await
    }

    /// With limits of its own.
    pub(crate) async fn begin_with(change: impl FnOnce(&mut trunkline::Config)) -> Self {
        let data = tempfile::tempdir().unwrap();
        let data_dir = data.path().to_owned();
        let mut config = trunkline::Config { data_dir, dev: true, ..trunkline::Config::on_free_ports() };
        change(&mut config);
        Self::of(Server::start(config).await.unwrap(), Some(data)).await
    }

    async fn of(server: Server, data: Option<TempDir>) -> Self {
        let address = server.addresses().grpc.to_string();
        let operator = Orchestrator::builder("operator").profile("none").address(&address).connect().await.unwrap();
        Self { _server: server, address, operator, names: AtomicU32::new(0), _data: data }
    }

    /// A name that nobody has yet.
    pub(crate) fn name(&self, prefix: &str) -> String {
        format!("{prefix}-{}", self.names.fetch_add(1, Ordering::Relaxed))
    }

    pub(crate) async fn connect<P: Principal>(&self, builder: Builder<P>) -> P {
        self.try_connect(builder).await.unwrap()
    }

    pub(crate) async fn try_connect<P: Principal>(&self, builder: Builder<P>) -> Result<P, Error> {
        soon(builder.address(&self.address).connect()).await
    }

    /// Agent of a new name, in the test's workspace.
    pub(crate) async fn agent(&self, implementation: &str) -> Agent {
        self.agent_in(WS, implementation).await
    }

    pub(crate) async fn agent_in(&self, workspace: &str, implementation: &str) -> Agent {
        self.connect(Agent::builder(workspace, implementation, self.name("a"))).await
    }

    pub(crate) async fn task(&self) -> UniqueTask {
        self.connect(UniqueTask::builder(WS, "job", self.name("t"))).await
    }

    /// A user's window that is on no workspace.
    pub(crate) async fn user(&self) -> User {
        self.connect(User::builder(self.name("u"), "window")).await
    }

    pub(crate) async fn service(&self) -> Service {
        self.connect(Service::builder(self.name("sv"), "one")).await
    }

    pub(crate) fn admin(&self) -> Admin {
        self.operator.admin()
    }

    /// Lets somebody do something, by a rule.
    pub(crate) async fn grant(&self, who: &Client, kind: &str, id: &str, level: AccessLevel) -> AclRuleInfo {
        self.grant_to(&principal(who), kind, id, level).await
    }

    pub(crate) async fn grant_to(&self, who: &PrincipalRef, kind: &str, id: &str, level: AccessLevel) -> AclRuleInfo {
        self.admin().grant(rule(who, kind, id, level as i32)).await.unwrap()
    }

    /// Puts an implementation into the registry. Its agents are started under the profile.
    pub(crate) async fn register(&self, implementation: &str, profile: &str, params: &[(&str, &str)]) {
        let launch_params = params.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect();
        let agent = AgentRegistrationInfo { launch_params, ..registration(implementation, profile) };
        self.admin().register_agent(agent).await.unwrap();
    }

    /// One client of each kind that administers nothing.
    pub(crate) async fn ordinary(&self) -> Vec<(&'static str, Client)> {
        let bridge = self.connect(trunkline_client::Bridge::builder(self.name("br"), "one")).await;
        vec![
            ("agent", plain(&self.agent("worker").await)),
            ("task", plain(&self.task().await)),
            ("user", plain(&self.user().await)),
            ("service", plain(&self.service().await)),
            ("bridge", plain(&bridge)),
        ]
    }
}

pub(crate) fn registration(implementation: &str, profile: &str) -> AgentRegistrationInfo {
    AgentRegistrationInfo {
        implementation: implementation.to_owned(),
        orchestrator_profile: profile.to_owned(),
        description: "a test's own".to_owned(),
        launch_params: HashMap::new(),
        ..AgentRegistrationInfo::default()
    }
}

/// A client without its type.
pub(crate) fn plain(client: &impl Deref<Target = Client>) -> Client {
    Client::clone(client)
}

/// As whom rules name a client.
pub(crate) fn principal(client: &Client) -> PrincipalRef {
    let identity = client.identity().to_string();
    let (prefix, rest) = identity.split_once("::").unwrap();
    let (kind, id) = match prefix {
        "us" => ("user", rest.split("::").next().unwrap()),
        "ag" => ("agent", &*identity),
        "tu" | "ta" => ("task", &*identity),
        "sv" => ("service", &*identity),
        "br" => ("bridge", &*identity),
        "orc" => ("orchestrator", &*identity),
        other => panic!("no rule names a {other}"),
    };
    named(kind, id)
}

pub(crate) fn named(kind: &str, id: &str) -> PrincipalRef {
    PrincipalRef { principal_type: kind.to_owned(), principal_id: id.to_owned() }
}

pub(crate) fn rule(who: &PrincipalRef, kind: &str, id: &str, access_level: i32) -> AclGrantRequest {
    AclGrantRequest {
        principal_type: who.principal_type.clone(),
        principal_id: who.principal_id.clone(),
        resource_type: kind.to_owned(),
        resource_id: id.to_owned(),
        access_level,
        granted_by: "conformance".to_owned(),
        reason: "because".to_owned(),
        ..AclGrantRequest::default()
    }
}

pub(crate) fn rule_of(who: &PrincipalRef, kind: &str, id: &str) -> AclRuleFilter {
    AclRuleFilter {
        principal_type: who.principal_type.clone(),
        principal_id: who.principal_id.clone(),
        resource_type: kind.to_owned(),
        resource_id: id.to_owned(),
        ..AclRuleFilter::default()
    }
}

/// The session that a client has now.
pub(crate) fn session(client: &Client) -> String {
    client.welcome().unwrap().session_id.clone()
}

pub(crate) async fn soon<T>(what: impl Future<Output = T>) -> T {
    tokio::time::timeout(PATIENCE, what).await.expect("it happens soon")
}

/// Asks again and again until the answer is yes.
pub(crate) async fn until(what: &str, mut probe: impl AsyncFnMut() -> bool) {
    let asked = async {
        while !probe().await {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    tokio::time::timeout(PATIENCE, asked).await.unwrap_or_else(|_| panic!("never: {what}"));
}

/// Nothing comes for a moment.
pub(crate) async fn silence<T>(what: &str, next: impl Future<Output = T>) {
    assert!(tokio::time::timeout(QUIET, next).await.is_err(), "{what}");
}

/// Why it was refused.
pub(crate) fn refused<T>(what: &str, answer: Result<T, Error>) -> Error {
    match answer {
        Ok(_) => panic!("{what}: it was not refused"),
        Err(error) => error,
    }
}

/// It was refused because the caller may not.
pub(crate) fn denied<T>(what: &str, answer: Result<T, Error>) {
    let error = refused(what, answer);
    assert_eq!(error.kind(), Kind::Denied, "{what}: {error:?}");
}

/// It was refused because it makes no sense.
pub(crate) fn invalid<T>(what: &str, answer: Result<T, Error>) {
    let error = refused(what, answer);
    assert_eq!(error.kind(), Kind::Invalid, "{what}: {error:?}");
}

/// A time of the server's, in Unix seconds, is about now.
pub(crate) fn is_now(what: &str, seconds: i64) {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs();
    assert!(i64::try_from(now).unwrap().abs_diff(seconds) < 60, "{what}: {seconds} is not about {now}");
}

//! The nine principals, each with what it can send.

use bytes::Bytes;
use trunkline_proto::v1::{
    AgentIdentity, BridgeIdentity, Metric, MetricsBridgeIdentity, OrchestratorIdentity, ServiceIdentity, TaskIdentity,
    UserIdentity, WorkflowEngineIdentity, WorkflowOperation, WorkflowResponse, init_connection::ClientType,
    upstream_message::Payload as Up,
};

use prost::Message as _;

use crate::{
    connection::{Client, Core, feed::Mark},
    error::{Error, Result},
    identity::{Principal, sealed::Sealed},
    message::{MessageType, Outgoing},
    options::Builder,
    routes::switch,
    topic::Topic,
};

/// A typed client over a [`Client`].
macro_rules! principal {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Clone, Debug)]
        pub struct $name {
            client: Client,
        }

        impl std::ops::Deref for $name {
            type Target = Client;

            fn deref(&self) -> &Client {
                &self.client
            }
        }

        impl $name {
            /// What it shares with all others.
            #[must_use]
            pub fn client(&self) -> &Client {
                &self.client
            }
        }

        impl From<$name> for Client {
            fn from(principal: $name) -> Self {
                principal.client
            }
        }

        impl Sealed for $name {}

        impl Principal for $name {
            fn from_client(client: Client) -> Self {
                Self { client }
            }
        }
    };
}

/// The send helpers of a principal. The type of what is sent to agents and tasks is `CONTROL` for the platform's own, and `OPAQUE`
/// for others: the published rule.
macro_rules! sends {
    ($name:ident, $kind:ident: $($what:ident),* $(,)?) => {
        impl $name {
            $(sends!(@$what $kind);)*
        }
    };
    (@to_agent $kind:ident) => {
        /// Sends to one agent.
        ///
        /// # Errors
        /// As [`Client::send`], and [`Topic::agent`].
        pub async fn send_to_agent(
            &self,
            workspace: &str,
            implementation: &str,
            specifier: &str,
            payload: impl Into<Bytes>,
        ) -> Result<()> {
            let to = Topic::agent(workspace, implementation, specifier)?;
            self.send(Outgoing::new(to, payload).of(MessageType::$kind)).await
        }
    };
    (@to_task $kind:ident) => {
        /// Sends to one unique task; without a specifier, to any one task of the implementation.
        ///
        /// # Errors
        /// As [`Client::send`], and [`Topic::task`].
        pub async fn send_to_task(
            &self,
            workspace: &str,
            implementation: &str,
            specifier: &str,
            payload: impl Into<Bytes>,
        ) -> Result<()> {
            let to = Topic::task(workspace, implementation, specifier)?;
            self.send(Outgoing::new(to, payload).of(MessageType::$kind)).await
        }
    };
    (@to_window $kind:ident) => {
        /// Sends to one window of a user.
        ///
        /// # Errors
        /// As [`Client::send`], and [`Topic::window`].
        pub async fn send_to_window(&self, user: &str, window: &str, payload: impl Into<Bytes>) -> Result<()> {
            self.send(Outgoing::new(Topic::window(user, window)?, payload)).await
        }
    };
    (@to_user_in $kind:ident) => {
        /// Sends to a user's windows that are on a workspace.
        ///
        /// # Errors
        /// As [`Client::send`], and [`Topic::user_in`].
        pub async fn send_to_user_in(&self, user: &str, workspace: &str, payload: impl Into<Bytes>) -> Result<()> {
            self.send(Outgoing::new(Topic::user_in(user, workspace)?, payload)).await
        }
    };
    (@to_user $kind:ident) => {
        /// Sends to all windows of a user.
        ///
        /// # Errors
        /// As [`Client::send`], and [`Topic::user`].
        pub async fn send_to_user(&self, user: &str, payload: impl Into<Bytes>) -> Result<()> {
            self.send(Outgoing::new(Topic::user(user)?, payload)).await
        }
    };
    (@to_agents $kind:ident) => {
        /// Sends to all agents of a workspace.
        ///
        /// # Errors
        /// As [`Client::send`], and [`Topic::agents`].
        pub async fn broadcast_to_agents(&self, workspace: &str, payload: impl Into<Bytes>) -> Result<()> {
            self.send(Outgoing::new(Topic::agents(workspace)?, payload).of(MessageType::$kind)).await
        }
    };
    (@to_users $kind:ident) => {
        /// Sends to all users that are on a workspace.
        ///
        /// # Errors
        /// As [`Client::send`], and [`Topic::users`].
        pub async fn broadcast_to_users(&self, workspace: &str, payload: impl Into<Bytes>) -> Result<()> {
            self.send(Outgoing::new(Topic::users(workspace)?, payload)).await
        }
    };
    (@to_service $kind:ident) => {
        /// Sends to one service; without a specifier, to any one of the implementation.
        ///
        /// # Errors
        /// As [`Client::send`], and [`Topic::service`].
        pub async fn send_to_service(
            &self,
            implementation: &str,
            specifier: Option<&str>,
            payload: impl Into<Bytes>,
        ) -> Result<()> {
            let to = match specifier {
                Some(specifier) => Topic::service(implementation, specifier)?,
                None => Topic::any_service(implementation)?,
            };
            self.send(Outgoing::new(to, payload)).await
        }
    };
    (@event $kind:ident) => {
        /// Sends an event to the workflow engine.
        ///
        /// # Errors
        /// As [`Client::send`].
        pub async fn send_event(&self, payload: impl Into<Bytes>) -> Result<()> {
            self.send(Outgoing::new(Topic::events(), payload).of(MessageType::Event)).await
        }
    };
    (@metric $kind:ident) => {
        /// Sends a metric to the metrics bridge.
        ///
        /// # Errors
        /// As [`Client::send`].
        pub async fn send_metric(&self, metric: impl Into<Metric>) -> Result<()> {
            let payload = metric.into().encode_to_vec();
            self.send(Outgoing::new(Topic::metrics(), payload).of(MessageType::Metric)).await
        }
    };
}

principal! {
    /// A long-lived participant of a workspace: `ag::{workspace}::{implementation}::{specifier}`. One connection has an identity at
    /// a time.
    #[doc = include_str!("../docs/agent.md")]
    Agent
}

sends!(Agent, Opaque: to_agent, to_task, to_window, to_user_in, to_agents, to_users, to_service, event, metric);

impl Agent {
    /// An agent that is not connected yet.
    pub fn builder(
        workspace: impl Into<String>,
        implementation: impl Into<String>,
        specifier: impl Into<String>,
    ) -> Builder<Self> {
        let (workspace, implementation, specifier) = (workspace.into(), implementation.into(), specifier.into());
        Builder::new(ClientType::Agent(AgentIdentity { workspace, implementation, specifier }))
    }

    /// The agent that an orchestrator started this process as: `AETHER_WORKSPACE`, `AETHER_IMPLEMENTATION` and
    /// `AETHER_SPECIFIER`, and what [`Builder::from_env`] reads.
    pub fn from_env() -> Builder<Self> {
        let var = |name: &str| std::env::var(name).unwrap_or_default();
        let (workspace, implementation) = (var("AETHER_WORKSPACE"), var("AETHER_IMPLEMENTATION"));
        Self::builder(workspace, implementation, var("AETHER_SPECIFIER")).from_env()
    }
}

principal! {
    /// A named task: `tu::{workspace}::{implementation}::{specifier}`. One connection has an identity at a time.
    #[doc = include_str!("../docs/unique_task.md")]
    UniqueTask
}

sends!(UniqueTask, Opaque: to_agent, to_task, to_window, event, metric);

impl UniqueTask {
    /// A task that is not connected yet.
    pub fn builder(
        workspace: impl Into<String>,
        implementation: impl Into<String>,
        specifier: impl Into<String>,
    ) -> Builder<Self> {
        let (workspace, implementation, unique_specifier) = (workspace.into(), implementation.into(), specifier.into());
        let mut builder = Builder::new(ClientType::Task(TaskIdentity { workspace, implementation, unique_specifier }));
        if matches!(&builder.who, ClientType::Task(task) if task.unique_specifier.is_empty()) {
            builder.wrong(Error::invalid("a unique task has a specifier; one without is a Worker"));
        }
        builder
    }
}

principal! {
    /// One of many that share the work of an implementation: `ta::{workspace}::{implementation}::{id}`, with an id that the server
    /// gives.
    #[doc = include_str!("../docs/worker.md")]
    Worker
}

sends!(Worker, Opaque: to_agent, to_task, to_window, event, metric);

impl Worker {
    /// A worker that is not connected yet.
    pub fn builder(workspace: impl Into<String>, implementation: impl Into<String>) -> Builder<Self> {
        let (workspace, implementation) = (workspace.into(), implementation.into());
        Builder::new(ClientType::Task(TaskIdentity { workspace, implementation, ..TaskIdentity::default() }))
    }
}

principal! {
    /// One window of a user: `us::{user}::{window}`.
    #[doc = include_str!("../docs/user.md")]
    User
}

sends!(User, Opaque: to_agent, to_task, to_window, to_user_in);

impl User {
    /// A user's window that is not connected yet.
    pub fn builder(user: impl Into<String>, window: impl Into<String>) -> Builder<Self> {
        let (user_id, window_id) = (user.into(), window.into());
        Builder::new(ClientType::User(UserIdentity { user_id, window_id }))
    }

    /// Goes to a workspace: hears what is said to its users, and acts for it. Returns when it is there. Again after each reconnect.
    ///
    /// # Errors
    /// [`Kind::Denied`](crate::Kind::Denied) if it may not: then it stays where it is. [`Kind::Invalid`](crate::Kind::Invalid) if it
    /// is empty.
    pub async fn switch_workspace(&self, workspace: &str) -> Result<()> {
        crate::topic::check(workspace)?;
        self.go(workspace).await
    }

    /// Leaves the workspace that it is on.
    ///
    /// # Errors
    /// As [`Client::send`].
    pub async fn leave_workspace(&self) -> Result<()> {
        self.go("").await
    }

    async fn go(&self, workspace: &str) -> Result<()> {
        let core = &self.core;
        let going = Going(Some(core));
        core.routes.goes(workspace);
        core.put(switch(workspace), Mark::Nothing, core.options.send_timeout).await?;
        // The server says nothing if it worked. What is asked behind it is answered when it is done.
        core.settled().await?;
        going.there();
        core.routes.went()
    }

    /// The workspace that it last went to.
    #[must_use]
    pub fn workspace(&self) -> Option<String> {
        self.core.routes.workspace()
    }
}

/// Takes back where a user wanted to go, if that is not known to have been handled.
struct Going<'a>(Option<&'a Core>);

impl Going<'_> {
    fn there(mut self) {
        self.0 = None;
    }
}

impl Drop for Going<'_> {
    fn drop(&mut self) {
        if let Some(core) = self.0 {
            core.routes.stays();
        }
    }
}

impl Builder<User> {
    /// Goes to a workspace as soon as it is connected.
    pub fn workspace(mut self, workspace: impl Into<String>) -> Self {
        self.options.workspace = Some(workspace.into());
        self
    }
}

principal! {
    /// Starts agents that are needed and not there: `orc::{implementation}::{specifier}`. [`orchestrate`](crate::orchestrate) does
    /// the work around it.
    #[doc = include_str!("../docs/orchestrator.md")]
    Orchestrator
}

sends!(Orchestrator, Control: to_agent, to_task);

impl Orchestrator {
    /// An orchestrator that is not connected yet, for at least one [`profile`](Builder::profile).
    pub fn builder(implementation: impl Into<String>) -> Builder<Self> {
        let (implementation, specifier) = (implementation.into(), format!("{:08x}", fastrand::u32(..)));
        let identity = OrchestratorIdentity { implementation, specifier, ..OrchestratorIdentity::default() };
        Builder::new(ClientType::Orchestrator(identity))
    }
}

impl Builder<Orchestrator> {
    /// Names the instance; eight random digits without this.
    pub fn specifier(mut self, specifier: impl Into<String>) -> Self {
        if let ClientType::Orchestrator(identity) = &mut self.who {
            identity.specifier = specifier.into();
        }
        self
    }

    /// A kind of agent that it starts, such as `docker`.
    pub fn profile(mut self, profile: impl Into<String>) -> Self {
        if let ClientType::Orchestrator(identity) = &mut self.who {
            identity.supported_profiles.push(profile.into());
        }
        self
    }
}

principal! {
    /// Receives all events, and tells others what to do: `wfe::shard0`. There is one.
    #[doc = include_str!("../docs/workflow_engine.md")]
    WorkflowEngine
}

sends!(WorkflowEngine, Control: to_agent, to_task, to_agents, to_users, to_window, to_user_in, to_user, metric);

impl WorkflowEngine {
    /// A workflow engine that is not connected yet.
    pub fn builder() -> Builder<Self> {
        Builder::new(ClientType::WorkflowEngine(WorkflowEngineIdentity::default()))
    }

    /// Answers what somebody asked of the engine: see [`Notice::Workflow`](crate::Notice::Workflow).
    ///
    /// # Errors
    /// As [`Client::send`].
    pub async fn answer(&self, asked: &WorkflowOperation, answer: WorkflowResponse) -> Result<()> {
        let answer = WorkflowResponse { request_id: asked.request_id.clone(), ..answer };
        let timeout = self.core.options.send_timeout;
        self.core.put(Up::WorkflowResponse(Box::new(answer)), Mark::Nothing, timeout).await
    }
}

impl Builder<WorkflowEngine> {
    /// Tells instances apart, for servers that let several in.
    pub fn instance(mut self, id: impl Into<String>) -> Self {
        if let ClientType::WorkflowEngine(identity) = &mut self.who {
            identity.instance_id = id.into();
        }
        self
    }
}

principal! {
    /// Receives all metrics, and sends nothing: `metrics::shard0`. There is one.
    #[doc = include_str!("../docs/metrics_bridge.md")]
    MetricsBridge
}

impl MetricsBridge {
    /// A metrics bridge that is not connected yet.
    pub fn builder() -> Builder<Self> {
        Builder::new(ClientType::MetricsBridge(MetricsBridgeIdentity::default()))
    }
}

impl Builder<MetricsBridge> {
    /// Tells instances apart, for servers that let several in.
    pub fn instance(mut self, id: impl Into<String>) -> Self {
        if let ClientType::MetricsBridge(identity) = &mut self.who {
            identity.instance_id = id.into();
        }
        self
    }
}

principal! {
    /// Brings messages from elsewhere into any workspace: `br::{implementation}::{specifier}`.
    #[doc = include_str!("../docs/bridge.md")]
    Bridge
}

sends!(Bridge, Opaque: to_agent, to_task, to_window, to_user_in, to_user, to_agents, to_users);

impl Bridge {
    /// A bridge that is not connected yet.
    pub fn builder(implementation: impl Into<String>, specifier: impl Into<String>) -> Builder<Self> {
        let (implementation, specifier) = (implementation.into(), specifier.into());
        Builder::new(ClientType::Bridge(BridgeIdentity { implementation, specifier }))
    }
}

principal! {
    /// Serves all workspaces, over messages and over HTTP: `sv::{implementation}::{specifier}`.
    #[doc = include_str!("../docs/service.md")]
    Service
}

sends!(Service, Opaque: to_agent, to_task, to_window, to_user_in, to_user, to_service, event, metric);

impl Service {
    /// A service that is not connected yet.
    pub fn builder(implementation: impl Into<String>, specifier: impl Into<String>) -> Builder<Self> {
        let (implementation, specifier) = (implementation.into(), specifier.into());
        Builder::new(ClientType::Service(ServiceIdentity { implementation, specifier, no_pool_consumer: false }))
    }
}

impl Builder<Service> {
    /// Does not work on tasks of its implementation's pool.
    pub fn declines_pool_tasks(mut self) -> Self {
        if let ClientType::Service(identity) = &mut self.who {
            identity.no_pool_consumer = true;
        }
        self
    }
}

/// What cannot be seen by the checks of names.
pub(crate) fn check(who: &ClientType) -> Result<()> {
    if let ClientType::Orchestrator(identity) = who
        && identity.supported_profiles.is_empty()
    {
        return Err(Error::invalid("an orchestrator starts agents of at least one profile"));
    }
    Ok(())
}

//! Tasks: what the published suite does not look at.

mod attempts;
mod starts;
mod told;
mod waits;
mod work;

use std::{collections::HashMap, time::Duration};

use trunkline::{Config, Server};
use trunkline_core::{limits::Limits, task};
use trunkline_proto::v1::{
    AclGrantRequest, AclOperation, AgentIdentity, AgentOperation, AgentRegistrationInfo, BackoffStrategy,
    CheckpointOperation, CreateTaskRequest, CreateTaskResponse, InitConnection, OrchestratorIdentity, RetryPolicy,
    ServiceIdentity, TaskAssignment, TaskAssignmentMode as Mode, TaskEvent, TaskFilter, TaskInfo, TaskOperation,
    TaskOperationResponse, TaskQuery, TaskQueryResponse, TaskStatus as Status, TaskSubscriptionOperation, UserIdentity,
    WaitSpec, WorkflowEngineIdentity, acl_operation, agent_operation, checkpoint_operation,
    downstream_message::Payload as Down, init_connection::ClientType, task_operation::OpType as Op, task_query,
    task_subscription_operation, upstream_message::Payload as Up,
};

use crate::client::Client;

/// A server whose patience with absent workers is a second.
async fn server(dir: &std::path::Path) -> Server {
    let tasks = task::Options {
        grace_seconds: 1,
        grace_background_seconds: 1,
        grace_batch_seconds: 1,
        launch_seconds: 1,
        launches_max: 2,
        ..task::Options::default()
    };
    let limits = Limits { messages_per_second: 0, ..Limits::default() };
    let config = Config { data_dir: dir.to_owned(), dev: true, tasks, limits, ..Config::on_free_ports() };
    Server::start(config).await.unwrap()
}

fn named(implementation: &str, specifier: &str) -> InitConnection {
    let (workspace, implementation) = ("ws".to_owned(), implementation.to_owned());
    let agent = AgentIdentity { workspace, implementation, specifier: specifier.to_owned() };
    InitConnection { client_type: Some(ClientType::Agent(agent)), ..InitConnection::default() }
}

fn orchestrator(specifier: &str) -> InitConnection {
    let (implementation, specifier) = ("orc".to_owned(), specifier.to_owned());
    let supported_profiles = vec!["local".to_owned()];
    let orchestrator = OrchestratorIdentity { implementation, specifier, supported_profiles };
    InitConnection { client_type: Some(ClientType::Orchestrator(orchestrator)), ..InitConnection::default() }
}

fn service(declines: bool) -> InitConnection {
    let service = ServiceIdentity { implementation: "miner".into(), specifier: "s".into(), no_pool_consumer: declines };
    InitConnection { client_type: Some(ClientType::Service(service)), ..InitConnection::default() }
}

fn user(window: &str) -> InitConnection {
    let user = UserIdentity { user_id: "ann".into(), window_id: window.into() };
    InitConnection { client_type: Some(ClientType::User(user)), ..InitConnection::default() }
}

fn engine() -> InitConnection {
    let engine = ClientType::WorkflowEngine(WorkflowEngineIdentity::default());
    InitConnection { client_type: Some(engine), ..InitConnection::default() }
}

fn pool() -> CreateTaskRequest {
    CreateTaskRequest {
        task_type: "dig".into(),
        assignment_mode: Mode::Pool.into(),
        target_implementation: "miner".into(),
        request_id: "c".into(),
        ..CreateTaskRequest::default()
    }
}

fn own() -> CreateTaskRequest {
    CreateTaskRequest { assignment_mode: Mode::SelfAssign.into(), ..pool() }
}

fn fixed(delay: i64, attempts: i32) -> RetryPolicy {
    let backoff = BackoffStrategy::Fixed.into();
    RetryPolicy { max_attempts: attempts, backoff, initial_delay_ms: delay, ..RetryPolicy::default() }
}

impl Client {
    async fn wait_for<T>(&mut self, mut is_it: impl FnMut(Down) -> Option<T>) -> T {
        loop {
            let next = self.next().await.unwrap().expect("the stream goes on");
            if let Some(found) = is_it(next) {
                return found;
            }
        }
    }

    async fn ask(&mut self, request: CreateTaskRequest) -> CreateTaskResponse {
        self.put(Up::CreateTask(request.into())).await;
        self.wait_for(|down| if let Down::CreateTask(reply) = down { Some(*reply) } else { None }).await
    }

    async fn create(&mut self, request: CreateTaskRequest) -> String {
        let reply = self.ask(request).await;
        assert!(reply.success, "{}: {}", reply.error_code, reply.error_message);
        reply.task_id
    }

    async fn op_with(&mut self, op: Op, id: &str, reason: &str, wait: Option<WaitSpec>) -> TaskOperationResponse {
        let (task_id, reason) = (id.to_owned(), reason.to_owned());
        let operation = TaskOperation { op: op.into(), task_id, reason, wait_spec: wait, ..TaskOperation::default() };
        self.put(Up::TaskOp(operation.into())).await;
        self.wait_for(|down| if let Down::TaskOp(reply) = down { Some(*reply) } else { None }).await
    }

    async fn op(&mut self, op: Op, id: &str) -> TaskInfo {
        let reply = self.op_with(op, id, "", None).await;
        assert!(reply.success, "{op:?}: {}", reply.error);
        reply.task.unwrap()
    }

    async fn refused(&mut self, op: Op, id: &str) -> String {
        let reply = self.op_with(op, id, "", None).await;
        assert!(!reply.success, "{op:?}");
        reply.error
    }

    async fn pause(&mut self, id: &str, wait: WaitSpec) -> TaskInfo {
        let reply = self.op_with(Op::Pause, id, "", Some(wait)).await;
        assert!(reply.success, "{}", reply.error);
        reply.task.unwrap()
    }

    async fn query(&mut self, query: TaskQuery) -> TaskQueryResponse {
        self.put(Up::TaskQuery(query.into())).await;
        self.wait_for(|down| if let Down::TaskQuery(reply) = down { Some(*reply) } else { None }).await
    }

    async fn task(&mut self, id: &str) -> TaskInfo {
        let op = task_query::OpType::Get.into();
        let reply = self.query(TaskQuery { op, task_id: id.to_owned(), ..TaskQuery::default() }).await;
        reply.task.unwrap_or_else(|| panic!("{}", reply.error))
    }

    async fn list(&mut self, filter: TaskFilter) -> TaskQueryResponse {
        let op = task_query::OpType::List.into();
        self.query(TaskQuery { op, filter: Some(filter), ..TaskQuery::default() }).await
    }

    async fn assignment(&mut self) -> TaskAssignment {
        self.wait_for(|down| if let Down::TaskAssignment(assignment) = down { Some(*assignment) } else { None }).await
    }

    async fn event(&mut self) -> TaskEvent {
        self.wait_for(|down| if let Down::TaskEvent(event) = down { Some(*event) } else { None }).await
    }

    async fn becomes(&mut self, id: &str, status: Status) -> TaskInfo {
        let begun = std::time::Instant::now();
        loop {
            let task = self.task(id).await;
            if task.status == i32::from(status) {
                return task;
            }
            assert!(begun.elapsed() < Duration::from_secs(15), "{task:?} does not become {status:?}");
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }

    async fn follow(&mut self, id: &str, recursive: bool, since: i64) -> String {
        let op = task_subscription_operation::OpType::Subscribe.into();
        let (task_id, start_timestamp_unix_ms) = (id.to_owned(), since);
        let subscribe =
            TaskSubscriptionOperation { op, task_id, recursive, start_timestamp_unix_ms, ..Default::default() };
        self.put(Up::TaskSubscriptionOp(subscribe.into())).await;
        let reply = self
            .wait_for(|down| if let Down::TaskSubscriptionResponse(reply) = down { Some(*reply) } else { None })
            .await;
        assert!(reply.success, "{}", reply.error);
        reply.subscription_id
    }

    async fn register(&mut self, implementation: &str) {
        let launch_params =
            HashMap::from([("profile".to_owned(), "local".to_owned()), ("a".to_owned(), "1".to_owned())]);
        let implementation = implementation.to_owned();
        let agent = Some(AgentRegistrationInfo { implementation, launch_params, ..AgentRegistrationInfo::default() });
        let op = agent_operation::OpType::Register.into();
        self.put(Up::AgentOp(AgentOperation { op, agent, ..AgentOperation::default() }.into())).await;
        let reply = self.wait_for(|down| if let Down::Agent(reply) = down { Some(*reply) } else { None }).await;
        assert!(reply.success, "{}", reply.error);
    }

    async fn checkpoint(&mut self, key: &str) {
        let op = checkpoint_operation::OpType::Save.into();
        let save = CheckpointOperation { op, key: key.to_owned(), ..CheckpointOperation::default() };
        self.put(Up::CheckpointOp(save.into())).await;
        self.wait_for(|down| matches!(down, Down::Checkpoint(_)).then_some(())).await;
    }

    async fn wait_until_gone(&mut self, id: &str) {
        let begun = std::time::Instant::now();
        while self.task(id).await.disconnected_at == 0 {
            assert!(begun.elapsed() < Duration::from_secs(15), "{id} is not left");
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }

    async fn manage(&mut self, who: &str, workspace: &str) {
        let request = AclGrantRequest {
            principal_type: "agent".into(),
            principal_id: who.into(),
            resource_type: "workspace".into(),
            resource_id: workspace.into(),
            access_level: 30,
            granted_by: "test".into(),
            reason: "test".into(),
            ..AclGrantRequest::default()
        };
        let op = acl_operation::OpType::Grant.into();
        let grant = AclOperation { op, grant_request: Some(request), ..AclOperation::default() };
        self.put(Up::AclOp(grant.into())).await;
        let reply = self.wait_for(|down| if let Down::Acl(reply) = down { Some(*reply) } else { None }).await;
        assert!(reply.success, "{}", reply.error);
    }
}

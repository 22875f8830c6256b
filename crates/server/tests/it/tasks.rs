//! Work is handed out once, finishes, retries, waits and wakes: what the published suite does not look at.

use std::{collections::HashMap, time::Duration};

use trunkline::{Config, Server};
use trunkline_core::{limits::Limits, task};
use trunkline_proto::v1::{
    AclGrantRequest, AclOperation, AgentIdentity, AgentOperation, AgentRegistrationInfo, BackoffStrategy,
    CheckpointOperation, CreateTaskRequest, CreateTaskResponse, HibernationDescriptor, InitConnection,
    OrchestratorIdentity, ProgressReport, RetryPolicy, ServiceIdentity, SwitchWorkspace, TaskAssignment,
    TaskAssignmentMode as Mode, TaskCompletionEvent, TaskEvent, TaskFilter, TaskInfo, TaskOperation,
    TaskOperationResponse, TaskPriority, TaskQuery, TaskQueryResponse, TaskStatus as Status, TaskSubscriptionOperation,
    UserIdentity, WaitReason, WaitSpec, WorkflowEngineIdentity, acl_operation, agent_operation, checkpoint_operation,
    downstream_message::Payload as Down, init_connection::ClientType, task_event::Event, task_operation::OpType as Op,
    task_query, task_subscription_operation, upstream_message::Payload as Up,
};

use crate::{
    client::{Client, agent},
    process::Process,
};

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
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_thousand_tasks_are_shared_evenly_and_each_is_done_once() {
    let dir = tempfile::tempdir().unwrap();
    let server = server(dir.path()).await;
    let grpc = server.addresses().grpc;
    let mut boss = Client::connect(grpc, agent("boss")).await.unwrap();
    let crew: Vec<_> = ["one", "two"]
        .into_iter()
        .map(|name| {
            tokio::spawn(async move {
                let mut worker = Client::connect(grpc, named("miner", name)).await.unwrap();
                let mut done = Vec::new();
                while let Ok(Some(down)) = worker.next().await {
                    match down {
                        Down::TaskAssignment(assignment) if assignment.task_type == "dig" => {
                            let op = Op::Complete.into();
                            let task_id = assignment.task_id.clone();
                            worker.put(Up::TaskOp(TaskOperation { op, task_id, ..Default::default() }.into())).await;
                            done.push(assignment.task_id);
                        }
                        Down::TaskAssignment(_) => break,
                        _ => {}
                    }
                }
                done
            })
        })
        .collect();
    for _ in 0..1000 {
        boss.create(pool()).await;
    }
    // One each for the end: nobody gets a second one before the other has its first.
    for _ in 0..2 {
        boss.create(CreateTaskRequest { task_type: "end".into(), ..pool() }).await;
    }
    let mut all = Vec::new();
    for worker in crew {
        let done = tokio::time::timeout(Duration::from_secs(20), worker).await.expect("an end").unwrap();
        assert!(done.len() > 300, "{} of 1000", done.len());
        all.extend(done);
    }
    all.sort();
    all.dedup();
    assert_eq!(all.len(), 1000);
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_comes_gets_what_is_urgent_first_then_what_is_old() {
    let dir = tempfile::tempdir().unwrap();
    let server = server(dir.path()).await;
    let grpc = server.addresses().grpc;
    for init in [named("miner", "m"), service(false)] {
        let mut boss = Client::connect_when_free(grpc, agent("boss")).await;
        let mut wanted = Vec::new();
        for priority in [TaskPriority::Low, TaskPriority::High, TaskPriority::Unspecified, TaskPriority::High] {
            wanted.push(boss.create(CreateTaskRequest { priority: priority.into(), ..pool() }).await);
        }
        let mut worker = Client::connect(grpc, init).await.unwrap();
        for at in [1, 3, 2, 0] {
            assert_eq!(worker.assignment().await.task_id, wanted[at]);
        }
        for id in &wanted {
            worker.op(Op::Complete, id).await;
        }
        boss.close().await;
        worker.close().await;
    }
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn agents_of_the_workspace_come_before_services_and_who_declines_gets_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let server = server(dir.path()).await;
    let grpc = server.addresses().grpc;
    let mut boss = Client::connect(grpc, agent("boss")).await.unwrap();
    let declining = Client::connect(grpc, service(true)).await.unwrap();
    let first = boss.create(pool()).await;
    assert_eq!(boss.task(&first).await.assigned_to, "");
    declining.close().await;
    let mut service = Client::connect_when_free(grpc, service(false)).await;
    assert_eq!(service.assignment().await.task_id, first);
    let mut worker = Client::connect(grpc, named("miner", "m")).await.unwrap();
    let second = boss.create(pool()).await;
    assert_eq!(worker.assignment().await.task_id, second);
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn names_priorities_graces_and_refusals() {
    let dir = tempfile::tempdir().unwrap();
    let server = server(dir.path()).await;
    let grpc = server.addresses().grpc;
    let mut boss = Client::connect(grpc, agent("boss")).await.unwrap();
    for (workspace, implementation) in [("a::b", "miner"), ("x*", "miner"), ("ws", "a b")] {
        let request =
            CreateTaskRequest { workspace: workspace.into(), target_implementation: implementation.into(), ..pool() };
        let reply = boss.ask(request).await;
        assert_eq!((reply.error_code.as_str(), reply.request_id.as_str()), ("ERR_INVALID_IDENTIFIER", "c"));
        let error = boss.error().await;
        assert_eq!((error.code.as_str(), error.request_id.as_str()), ("ERR_INVALID_IDENTIFIER", "c"));
    }
    for key in ["authority_grant_id", "root_authority_grant_id", "_hibernation_checkpoint_key", "trigger_timestamp_ms"]
    {
        let metadata = HashMap::from([(key.to_owned(), "x".to_owned())]);
        let reply = boss.ask(CreateTaskRequest { metadata, ..pool() }).await;
        assert_eq!(reply.error_code, "ERR_INVALID_ARGUMENT");
        assert!(reply.error_message.contains(key), "{}", reply.error_message);
    }
    assert_eq!(boss.list(TaskFilter::default()).await.total_count, 0, "nothing was kept");

    let key = |workspace: &str| CreateTaskRequest { idempotency_key: "k".into(), workspace: workspace.into(), ..own() };
    let first = boss.create(key("ws")).await;
    assert_eq!(boss.create(key("ws")).await, first);
    let mut other = Client::connect(grpc, agent("other")).await.unwrap();
    assert_ne!(other.create(key("ws")).await, first, "names are their creators'");
    // One that was refused under a name does not use it up.
    let bad = CreateTaskRequest { idempotency_key: "late".into(), target_implementation: String::new(), ..pool() };
    assert!(!boss.ask(bad).await.success);
    boss.create(CreateTaskRequest { idempotency_key: "late".into(), ..pool() }).await;
    assert_eq!(boss.task(&first).await.priority, 30);
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn failures_are_tried_again_by_themselves_and_then_kept() {
    let dir = tempfile::tempdir().unwrap();
    let server = server(dir.path()).await;
    let grpc = server.addresses().grpc;
    let mut boss = Client::connect(grpc, agent("boss")).await.unwrap();
    let mut worker = Client::connect(grpc, named("miner", "m")).await.unwrap();
    let request = CreateTaskRequest { retry_policy: Some(fixed(20, 3)), ..pool() };
    let id = boss.create(request).await;
    for attempt in 1..=3 {
        assert_eq!(worker.assignment().await.task_id, id);
        let reply = worker.op_with(Op::Fail, &id, "cave-in", None).await;
        let failed = reply.task.unwrap();
        assert_eq!((failed.attempt, failed.status), (attempt, Status::Failed.into()));
        assert_eq!(failed.retry_at_unix_ms > 0, attempt < 3);
    }
    let dead = boss.list(TaskFilter { dead_letters: true, ..TaskFilter::default() }).await;
    assert_eq!(dead.tasks.iter().map(|task| &task.task_id).collect::<Vec<_>>(), [&id]);
    boss.op(Op::Retry, &id).await;
    assert_eq!(worker.assignment().await.task_id, id);
    worker.op(Op::Claim, &id).await;
    let started = boss.task(&id).await.started_at;
    assert_eq!(worker.op(Op::Claim, &id).await.started_at, started, "claimed twice, started once");
    worker.op(Op::Complete, &id).await;
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_has_ended_stays_so_and_is_told_once() {
    let dir = tempfile::tempdir().unwrap();
    let server = server(dir.path()).await;
    let grpc = server.addresses().grpc;
    let mut boss = Client::connect(grpc, agent("boss")).await.unwrap();
    let mut worker = Client::connect(grpc, named("miner", "m")).await.unwrap();
    let mut engine = Client::connect(grpc, engine()).await.unwrap();
    let on_statuses = vec![Status::Completed.into()];
    let wanted = Some(TaskCompletionEvent { enabled: true, event_name: String::new(), on_statuses });
    let id = boss.create(CreateTaskRequest { completion_event: wanted.clone(), ..pool() }).await;
    worker.assignment().await;
    worker.op(Op::Complete, &id).await;
    // Its answer may have been lost, so the same is said again; anything else is refused.
    worker.op(Op::Complete, &id).await;
    assert!(boss.refused(Op::Complete, &id).await.contains("not in a completable state"));
    assert!(worker.refused(Op::Fail, &id).await.contains("not in a failable state"));
    let failed = boss.create(CreateTaskRequest { completion_event: wanted, ..pool() }).await;
    worker.assignment().await;
    worker.op(Op::Fail, &failed).await;
    boss.send("event::*", "after").await;
    let event = engine.message().await;
    let body: serde_json::Value = serde_json::from_slice(&event.payload).unwrap();
    assert_eq!((event.message_type, event.workspace.as_str()), (4, "ws"));
    assert_eq!(
        (body["event_names"][0].as_str(), body["data"]["task_id"].as_str()),
        (Some("task.completed"), Some(&*id))
    );
    assert_eq!(engine.message().await.payload, "after", "exactly one");

    let cancelled = boss.create(pool()).await;
    worker.assignment().await;
    worker.op(Op::Claim, &cancelled).await;
    boss.op(Op::Cancel, &cancelled).await;
    let told = worker.event().await;
    let Some(Event::StatusChanged(change)) = told.event else { panic!("{told:?}") };
    assert_eq!((told.task_id, change.to_status), (cancelled.clone(), Status::Cancelled.into()));
    assert!(worker.refused(Op::Complete, &cancelled).await.contains("completable"), "too late");
    assert!(worker.refused(Op::Reject, &cancelled).await.contains("invalid task state transition"));
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn waits_end_by_what_they_wait_for() {
    let dir = tempfile::tempdir().unwrap();
    let server = server(dir.path()).await;
    let grpc = server.addresses().grpc;
    let mut boss = Client::connect(grpc, agent("boss")).await.unwrap();
    let (a, b) = (boss.create(own()).await, boss.create(own()).await);
    let wait_for = |on: &[&String]| {
        Some(WaitSpec { depends_on: on.iter().map(|id| (*id).clone()).collect(), ..WaitSpec::default() })
    };
    let all = boss.create(own()).await;
    let any = boss.create(own()).await;
    for id in [&all, &any] {
        boss.op(Op::Claim, id).await;
    }
    assert!(!boss.op_with(Op::WaitFor, &all, "", wait_for(&[&all])).await.success, "not for itself");
    assert_eq!(boss.task(&all).await.status, i32::from(Status::Running));
    assert!(boss.op_with(Op::WaitFor, &all, "", wait_for(&[&a, &b])).await.success);
    let wait = WaitSpec { wake_on_any: true, ..wait_for(&[&a, &b]).unwrap() };
    assert!(boss.op_with(Op::WaitFor, &any, "", Some(wait)).await.success);
    let circle = boss.op_with(Op::WaitFor, &b, "", wait_for(&[&all])).await;
    assert!(!circle.success, "b is awaited by what it would wait for");
    boss.op(Op::Complete, &a).await;
    boss.becomes(&any, Status::Running).await;
    assert_eq!(boss.task(&all).await.status, i32::from(Status::WaitingDependency));
    boss.op(Op::Fail, &b).await;
    boss.becomes(&all, Status::Running).await;
    // What has ended already is no reason to wait.
    assert!(boss.op_with(Op::WaitFor, &all, "", wait_for(&[&a])).await.success);
    boss.becomes(&all, Status::Running).await;

    let timed = WaitSpec { reason: WaitReason::Input.into(), timeout_ms: 50, ..WaitSpec::default() };
    boss.pause(&all, timed.clone()).await;
    assert_eq!(boss.becomes(&all, Status::Failed).await.error, "wait timeout");
    let soon = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap().as_millis() as i64 + 50;
    boss.pause(&any, WaitSpec { timeout_ms: 0, scheduled_wake_unix_ms: soon, ..timed }).await;
    boss.becomes(&any, Status::Running).await;
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_message_ends_the_wait_for_it() {
    let dir = tempfile::tempdir().unwrap();
    let server = server(dir.path()).await;
    let grpc = server.addresses().grpc;
    let mut worker = Client::connect(grpc, named("miner", "m")).await.unwrap();
    let ann = Client::connect(grpc, user("w")).await.unwrap();
    let id = worker.create(own()).await;
    worker.op(Op::Claim, &id).await;
    let input_match = HashMap::from([("thread".to_owned(), "7".to_owned())]);
    let expected_principal = "us::ann".to_owned();
    let wait = WaitSpec { reason: WaitReason::Input.into(), expected_principal, input_match, ..WaitSpec::default() };
    worker.pause(&id, wait).await;
    ann.send("ag::ws::miner::m", r#"{"thread": "8"}"#).await;
    worker.message().await;
    assert_eq!(worker.task(&id).await.status, i32::from(Status::WaitingInput));
    ann.send("ag::ws::miner::m", r#"{"thread": "7"}"#).await;
    // Its worker is told twice: the message, and that the task goes on.
    let event = worker.event().await;
    assert_eq!(event.task_id, id);
    assert_eq!(worker.becomes(&id, Status::Running).await.wait_spec, None);
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn hibernated_work_goes_on_with_a_fresh_worker() {
    let dir = tempfile::tempdir().unwrap();
    let server = server(dir.path()).await;
    let grpc = server.addresses().grpc;
    let mut boss = Client::connect(grpc, agent("boss")).await.unwrap();
    let mut worker = Client::connect(grpc, named("miner", "one")).await.unwrap();
    let sleep = |timeout_ms, policy: &str| WaitSpec {
        reason: WaitReason::Hibernation.into(),
        timeout_ms,
        hibernation: Some(HibernationDescriptor {
            checkpoint_key: "cp".into(),
            resume_session_id: "sess".into(),
            escalation_policy: policy.into(),
            ..HibernationDescriptor::default()
        }),
        ..WaitSpec::default()
    };
    let id = boss.create(pool()).await;
    worker.assignment().await;
    worker.op(Op::Claim, &id).await;
    let refused = worker.op_with(Op::Pause, &id, "", Some(sleep(0, ""))).await;
    assert!(refused.error.contains("requires a saved checkpoint with key \"cp\""), "{}", refused.error);
    worker.checkpoint("cp").await;
    let pause = TaskOperation {
        op: Op::Pause.into(),
        task_id: id.clone(),
        wait_spec: Some(sleep(0, "")),
        ..TaskOperation::default()
    };
    worker.put(Up::TaskOp(pause.into())).await;
    // The answer and this come in any order.
    let told = worker.wait_for(|down| if let Down::TaskHibernated(told) = down { Some(*told) } else { None }).await;
    boss.becomes(&id, Status::Hibernated).await;
    assert_eq!((told.task_id.as_str(), told.descriptor.unwrap().checkpoint_key.as_str()), (id.as_str(), "cp"));
    worker.close().await;
    let mut fresh = Client::connect(grpc, named("miner", "two")).await.unwrap();
    tokio::time::sleep(Duration::from_millis(1300)).await;
    assert_eq!(boss.task(&id).await.status, i32::from(Status::Hibernated), "nobody has to be there");
    boss.op(Op::Resume, &id).await;
    let again = fresh.assignment().await;
    assert_eq!(
        (again.task_id.as_str(), again.checkpoint_key.as_str(), again.resume_session_id.as_str()),
        (&*id, "cp", "sess")
    );
    fresh.checkpoint("cp").await;
    fresh.op(Op::Claim, &id).await;
    fresh.pause(&id, sleep(500, "retry")).await;
    assert_eq!(fresh.assignment().await.task_id, id, "its timeout wakes it");
    fresh.op(Op::Claim, &id).await;
    fresh.pause(&id, sleep(50, "alert")).await;
    tokio::time::sleep(Duration::from_millis(200)).await;
    assert_eq!(boss.task(&id).await.status, i32::from(Status::Hibernated));
    boss.op(Op::Resume, &id).await;
    fresh.assignment().await;
    fresh.op(Op::Claim, &id).await;
    fresh.pause(&id, sleep(50, "fail")).await;
    assert_eq!(boss.becomes(&id, Status::Failed).await.error, "wait timeout");
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_worker_that_is_gone_keeps_its_tasks_for_their_grace() {
    let dir = tempfile::tempdir().unwrap();
    let server = server(dir.path()).await;
    let grpc = server.addresses().grpc;
    let mut boss = Client::connect(grpc, agent("boss")).await.unwrap();
    let mut one = Client::connect(grpc, named("miner", "one")).await.unwrap();
    let (begun, untouched) = (boss.create(pool()).await, boss.create(pool()).await);
    one.assignment().await;
    one.assignment().await;
    one.op(Op::Claim, &begun).await;
    drop(one);
    boss.wait_until_gone(&begun).await;
    // Back in time: it is told again of all that it has, and nothing was lost.
    let mut one = Client::connect_when_free(grpc, named("miner", "one")).await;
    let mut again = [one.assignment().await.task_id, one.assignment().await.task_id];
    again.sort();
    let mut both = [begun.clone(), untouched.clone()];
    both.sort();
    assert_eq!(again, both);
    assert_eq!(boss.task(&begun).await.disconnected_at, 0);
    drop(one);
    let mut two = Client::connect(grpc, named("miner", "two")).await.unwrap();
    // What was not begun goes to somebody else; what was begun has failed.
    assert_eq!(two.assignment().await.task_id, untouched);
    let failed = boss.becomes(&begun, Status::Failed).await;
    assert_eq!(failed.error, "worker disconnected and did not reconnect within grace window (1000ms)");
    server.stop().await;
}

impl Client {
    async fn wait_until_gone(&mut self, id: &str) {
        let begun = std::time::Instant::now();
        while self.task(id).await.disconnected_at == 0 {
            assert!(begun.elapsed() < Duration::from_secs(15), "{id} is not left");
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_killed_server_is_nobodys_absence() {
    let dir = tempfile::tempdir().unwrap();
    let process = Process::start(dir.path());
    let mut boss = Client::connect(process.grpc, agent("boss")).await.unwrap();
    let mut worker = Client::connect(process.grpc, named("miner", "m")).await.unwrap();
    let (mine, waiting) = (
        boss.create(pool()).await,
        boss.create(CreateTaskRequest { target_implementation: "other".into(), ..pool() }).await,
    );
    worker.assignment().await;
    worker.op(Op::Claim, &mine).await;
    process.kill();
    let process = Process::start(dir.path());
    let mut worker = Client::connect(process.grpc, named("miner", "m")).await.unwrap();
    assert_eq!(worker.assignment().await.task_id, mine);
    worker.op(Op::Complete, &mine).await;
    let mut other = Client::connect(process.grpc, named("other", "o")).await.unwrap();
    assert_eq!(other.assignment().await.task_id, waiting);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn lists_are_paged_counted_and_kept_from_strangers() {
    let dir = tempfile::tempdir().unwrap();
    let server = server(dir.path()).await;
    let grpc = server.addresses().grpc;
    let mut boss = Client::connect(grpc, agent("boss")).await.unwrap();
    let mut made = Vec::new();
    for _ in 0..25 {
        made.push(boss.create(pool()).await);
    }
    let (mut seen, mut page_token, mut pages) = (Vec::new(), String::new(), 0);
    loop {
        let page = boss.list(TaskFilter { limit: 5, page_token, ..TaskFilter::default() }).await;
        assert_eq!(page.total_count, 25);
        seen.extend(page.tasks.into_iter().map(|task| task.task_id));
        pages += 1;
        page_token = page.next_page_token;
        if page_token.is_empty() {
            break;
        }
    }
    assert_eq!(pages, 5, "the last full page is known to be the last");
    seen.sort();
    made.sort();
    assert_eq!(seen, made);
    let offset = boss.list(TaskFilter { limit: 10, offset: 20, ..TaskFilter::default() }).await;
    assert_eq!(offset.tasks.len(), 5);
    let mut stranger = Client::connect(grpc, service(true)).await.unwrap();
    let refused = stranger.list(TaskFilter { workspace: "ws".into(), ..TaskFilter::default() }).await;
    assert!(!refused.success && refused.error.contains("not authorized to list tasks"), "{}", refused.error);
    assert_eq!(stranger.list(TaskFilter::default()).await.total_count, 0, "its own, which are none");
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_follows_a_task_sees_its_children_and_its_past() {
    let dir = tempfile::tempdir().unwrap();
    let server = server(dir.path()).await;
    let grpc = server.addresses().grpc;
    let mut boss = Client::connect(grpc, agent("boss")).await.unwrap();
    let parent =
        boss.create(CreateTaskRequest { correlation_id: "corr".into(), context_id: "ctx".into(), ..own() }).await;
    let mut viewer = Client::connect(grpc, agent("viewer")).await.unwrap();
    let op = task_subscription_operation::OpType::Subscribe.into();
    let subscribe = TaskSubscriptionOperation { op, task_id: parent.clone(), ..Default::default() };
    viewer.put(Up::TaskSubscriptionOp(subscribe.into())).await;
    let refused = viewer
        .wait_for(|down| if let Down::TaskSubscriptionResponse(reply) = down { Some(*reply) } else { None })
        .await;
    assert_eq!((refused.success, refused.error.as_str()), (false, "task not found"));

    let mut admin = Client::connect(grpc, orchestrator("o")).await.unwrap();
    admin.follow(&parent, true, 0).await;
    let child = boss.create(CreateTaskRequest { parent_task_id: parent.clone(), ..own() }).await;
    let info = boss.task(&child).await;
    assert_eq!((&info.parent_task_id, &info.root_task_id, info.correlation_id.as_str()), (&parent, &parent, "corr"));
    assert_eq!(info.context_id, "ctx");
    boss.put(Up::Progress(ProgressReport { task_id: child.clone(), completion: 0.5, ..Default::default() }.into()))
        .await;
    viewer
        .put(Up::Progress(ProgressReport { task_id: child.clone(), completion: 0.9, ..Default::default() }.into()))
        .await;
    viewer.barrier().await;
    boss.op(Op::Complete, &child).await;
    let mut told = Vec::new();
    while told.len() < 6 {
        let event = admin.event().await;
        let what = match event.event.unwrap() {
            Event::StatusChanged(change) => format!("{}>{}", change.from_status, change.to_status),
            Event::Progress(progress) => format!("{} %", progress.progress * 100.0),
            Event::ChildLifecycle(child) => child.lifecycle,
            other => panic!("{other:?}"),
        };
        let of = if event.task_id == parent { "parent" } else { "child" };
        if !(of == "parent" && what == "0>1") {
            told.push(format!("{of} {what}"));
        }
        if told.len() == 5 {
            // Whoever is no party reports into the void: there is no sixth.
            break;
        }
    }
    told.sort();
    assert_eq!(told, ["child 0>1", "child 1>3", "child 50 %", "parent completed", "parent spawned"]);

    // From a time on, everything again, in order.
    admin.follow(&child, false, 1).await;
    let mut again = Vec::new();
    while again.len() < 3 {
        again.push(admin.event().await.event.unwrap());
    }
    assert!(matches!(&again[..], [Event::StatusChanged(_), Event::Progress(_), Event::StatusChanged(_)]), "{again:?}");
    boss.send(&format!("tk::ws::{child}::events"), "mine").await;
    assert_eq!(boss.error().await.code, "ERR_PERMISSION_DENIED", "the lane is the server's");
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_user_hears_what_is_said_about_its_task_in_every_window() {
    let dir = tempfile::tempdir().unwrap();
    let server = server(dir.path()).await;
    let grpc = server.addresses().grpc;
    let switch = async |client: &Client| {
        let to = SwitchWorkspace { new_workspace_id: "ws".into() };
        client.put(Up::SwitchWorkspace(to.into())).await;
    };
    let mut ann = Client::connect(grpc, user("one")).await.unwrap();
    switch(&ann).await;
    let mut worker = Client::connect(grpc, named("miner", "m")).await.unwrap();
    let metadata = HashMap::from([
        ("subject_participant".to_owned(), "true".to_owned()),
        ("thread_id".to_owned(), "t7".to_owned()),
    ]);
    let id = ann.create(CreateTaskRequest { metadata, ..pool() }).await;
    worker.assignment().await;
    worker.op(Op::Claim, &id).await;
    let running = ann
        .wait_for(|down| match down {
            Down::ProgressUpdate(update) if update.metadata.contains_key("status") => Some(*update),
            _ => None,
        })
        .await;
    assert_eq!((running.recipient.as_str(), running.metadata["thread_id"].as_str()), ("us::ann", "t7"));
    let lane = format!("tk::ws::{id}::msg");
    worker.send(&lane, "one").await;
    worker.send(&lane, "two").await;
    for text in ["one", "two"] {
        let message = ann.wait_for(|down| if let Down::Msg(message) = down { Some(message) } else { None }).await;
        assert_eq!((message.payload.as_ref(), message.source_topic.as_str()), (text.as_bytes(), "ag::ws::miner::m"));
    }
    // Another window, later: the whole turn again.
    let mut other = Client::connect(grpc, user("two")).await.unwrap();
    switch(&other).await;
    for text in ["one", "two"] {
        let message = other.wait_for(|down| if let Down::Msg(message) = down { Some(message) } else { None }).await;
        assert_eq!(message.payload, text);
    }
    let mut stranger = Client::connect(grpc, service(true)).await.unwrap();
    stranger.send(&lane, "mine").await;
    assert_eq!(stranger.error().await.code, "ERR_PERMISSION_DENIED");
    stranger.send("tk::ws::00000000-0000-0000-0000-000000000000::msg", "nobody's").await;
    assert_eq!(stranger.error().await.code, "ERR_PERMISSION_DENIED");
    worker.op(Op::Complete, &id).await;
    for client in [&mut ann, &mut other] {
        client
            .wait_for(|down| match down {
                Down::ProgressUpdate(update) => (update.metadata.get("status")? == "completed").then_some(()),
                _ => None,
            })
            .await;
    }
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_tasks_token_admits_whom_it_names_until_the_task_ends() {
    let dir = tempfile::tempdir().unwrap();
    let server = server(dir.path()).await;
    let grpc = server.addresses().grpc;
    let mut boss = Client::connect(grpc, agent("boss")).await.unwrap();
    let wanted = |target: &str| CreateTaskRequest { target_identity: target.into(), ..own() };
    let without = boss.ask(wanted("ag::ws::miner::m")).await;
    assert_eq!((without.success, without.task_token.as_str()), (true, ""), "it takes MANAGE");
    let mut admin = Client::connect(grpc, orchestrator("o")).await.unwrap();
    admin.manage("ag::ws::impl::boss", "ws").await;
    assert_eq!(boss.ask(wanted("ag::_system::miner::m")).await.task_token, "");
    let created = boss.ask(wanted("ag::ws::miner::m")).await;
    let come = |specifier: &str| {
        let mut init = named("miner", specifier);
        init.credentials.insert("token".into(), created.task_token.clone());
        init
    };
    let refused = Client::connect(grpc, come("other")).await.err().unwrap();
    assert_eq!(refused.code(), tonic::Code::PermissionDenied);
    assert_eq!(refused.message(), "token issued for ag::ws::miner::m, not ag::ws::miner::other");
    let mut worker = Client::connect(grpc, come("m")).await.unwrap();
    assert_eq!(boss.becomes(&created.task_id, Status::Running).await.assigned_to, "ag::ws::miner::m");
    let child = worker.create(own()).await;
    let child = worker.task(&child).await;
    assert_eq!(child.parent_task_id, created.task_id, "what its session makes is part of it");
    worker.op(Op::Complete, &created.task_id).await;
    worker.close().await;
    let refused = Client::connect(grpc, come("m")).await.err().unwrap();
    assert_eq!(refused.code(), tonic::Code::Unauthenticated);
    server.stop().await;
}

impl Client {
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

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn parties_are_parties_wherever_they_are() {
    let dir = tempfile::tempdir().unwrap();
    let server = server(dir.path()).await;
    let grpc = server.addresses().grpc;
    // A user's other window.
    let mut one = Client::connect(grpc, user("one")).await.unwrap();
    let id = one.create(CreateTaskRequest { workspace: "ws".into(), ..pool() }).await;
    let mut two = Client::connect(grpc, user("two")).await.unwrap();
    assert_eq!(two.op(Op::Cancel, &id).await.status, i32::from(Status::Cancelled));
    // An assignee that lives elsewhere.
    let mut admin = Client::connect(grpc, orchestrator("o")).await.unwrap();
    admin.register("guest").await;
    let guest = AgentIdentity { workspace: "elsewhere".into(), implementation: "guest".into(), specifier: "g".into() };
    let guest = InitConnection { client_type: Some(ClientType::Agent(guest)), ..InitConnection::default() };
    let mut guest = Client::connect(grpc, guest).await.unwrap();
    let targeted = CreateTaskRequest {
        assignment_mode: Mode::Targeted.into(),
        target_agent_id: "ag::elsewhere::guest::g".into(),
        workspace: "ws".into(),
        ..pool()
    };
    let id = one.create(targeted).await;
    assert_eq!(guest.assignment().await.task_id, id);
    guest.op(Op::Complete, &id).await;
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_start_for_many_messages_and_another_when_it_has_failed() {
    let dir = tempfile::tempdir().unwrap();
    let server = server(dir.path()).await;
    let grpc = server.addresses().grpc;
    let mut first = Client::connect(grpc, orchestrator("one")).await.unwrap();
    first.register("bot").await;
    let mut senders = Vec::new();
    for n in 0..4 {
        senders.push(Client::connect(grpc, user(&n.to_string())).await.unwrap());
    }
    for _ in 0..25 {
        for sender in &senders {
            for agent in ["alice", "bob"] {
                sender.send(&format!("ag::ws::bot::{agent}"), "hello").await;
            }
            sender.send("ag::ws::unknown::x", "hello").await;
        }
    }
    let (a, b) = (first.assignment().await, first.assignment().await);
    let mut specifiers = [a.specifier.clone(), b.specifier.clone()];
    specifiers.sort();
    assert_eq!(specifiers, ["alice", "bob"]);
    assert_eq!(a.launch_params["a"], "1");
    // Alice comes with her token; the messages are all there.
    let (alice, bob) = if a.specifier == "alice" { (a, b) } else { (b, a) };
    let mut init = named("bot", "alice");
    init.credentials.insert("token".into(), alice.launch_params["auth_token"].clone());
    let mut agent = Client::connect(grpc, init).await.unwrap();
    for _ in 0..100 {
        agent.message().await;
    }
    assert_eq!(first.task(&alice.task_id).await.assigned_to, "ag::ws::bot::alice");
    // Bob's orchestrator does nothing: it is asked once more, and then the start has failed for good.
    assert_eq!(first.assignment().await.task_id, bob.task_id);
    let dead = first.becomes(&bob.task_id, Status::Failed).await;
    assert_eq!(dead.error, "the agent did not come after 2 launches");
    senders[0].send("ag::ws::bot::bob", "again").await;
    assert_ne!(first.assignment().await.task_id, bob.task_id);
    // Who says goodbye is done; a new message starts another.
    agent.close().await;
    first.becomes(&alice.task_id, Status::Completed).await;
    senders[0].send("ag::ws::bot::alice", "again").await;
    let again = first.assignment().await;
    assert_eq!(again.specifier, "alice");
    assert_ne!(again.task_id, alice.task_id);
    let mut late = named("bot", "alice");
    late.credentials.insert("token".into(), alice.launch_params["auth_token"].clone());
    let refused = Client::connect(grpc, late).await.err().unwrap();
    assert_eq!(refused.code(), tonic::Code::Unauthenticated, "its token ended with it");
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn starts_are_spread_and_wait_for_an_orchestrator() {
    let dir = tempfile::tempdir().unwrap();
    let server = server(dir.path()).await;
    let grpc = server.addresses().grpc;
    let mut one = Client::connect(grpc, orchestrator("one")).await.unwrap();
    one.register("bot").await;
    one.close().await;
    let sender = Client::connect(grpc, user("w")).await.unwrap();
    sender.send("ag::ws::bot::early", "hello").await;
    let mut one = Client::connect_when_free(grpc, orchestrator("one")).await;
    assert_eq!(one.assignment().await.specifier, "early");
    let mut two = Client::connect(grpc, orchestrator("two")).await.unwrap();
    for n in 0..5 {
        sender.send(&format!("ag::ws::bot::{n}"), "hello").await;
    }
    // With the one that it has, the first gets two more.
    for (orchestrator, count) in [(&mut one, 2), (&mut two, 3)] {
        for _ in 0..count {
            orchestrator.assignment().await;
        }
    }
    // Work for somebody who is being started already waits for it.
    let mut boss = Client::connect(grpc, agent("boss")).await.unwrap();
    let targeted = CreateTaskRequest {
        assignment_mode: Mode::Targeted.into(),
        target_agent_id: "ag::ws::bot::0".into(),
        ..pool()
    };
    let reply = boss.ask(targeted).await;
    assert_eq!((reply.success, reply.status.as_str()), (true, "orchestration_triggered"));
    let mut bot = Client::connect(grpc, named("bot", "0")).await.unwrap();
    assert_eq!(bot.assignment().await.task_id, reply.task_id);
    server.stop().await;
}

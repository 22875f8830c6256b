//! Tasks: made, changed, looked at, followed, and worked on.

use std::{collections::HashMap, fmt, ops::Deref, time::Duration};

use bytes::Bytes;
use prost::Message as _;
use trunkline_proto::own::TaskLimits;
use trunkline_proto::v1::{
    AuthorizationContext, CreateTaskRequest, CreateTaskResponse, HibernationDescriptor, ProgressReport, ProgressStep,
    TaskOperation, TaskQuery, TaskSubscriptionOperation, WaitReason, WaitSpec, downstream_message::Payload as Down,
    task_operation::OpType, task_query, task_subscription_operation, upstream_message::Payload as Up,
};

pub use trunkline_proto::v1::{
    BackoffStrategy, ProgressKind, ProgressUpdate, RetryPolicy, TargetOfflinePolicy, TaskAssignmentMode, TaskClass,
    TaskCompletionEvent, TaskEvent, TaskFilter, TaskInfo, TaskPriority, TaskStatus,
};

use crate::{
    connection::{Ask, Client, feed::Mark, fits, lane::Received},
    error::{Error, Result},
    reply,
};

/// A task that was given to this client.
#[derive(Clone, PartialEq)]
pub struct Assignment(pub(crate) Box<trunkline_proto::v1::TaskAssignment>);

impl Deref for Assignment {
    type Target = trunkline_proto::v1::TaskAssignment;

    fn deref(&self) -> &Self::Target {
        &self.0
    }
}

impl Assignment {
    /// The token that an agent is to be started with, if the server made one.
    #[must_use]
    pub fn auth_token(&self) -> Option<&str> {
        self.0.launch_params.get("auth_token").map(String::as_str)
    }
}

impl fmt::Debug for Assignment {
    /// Without the parameters: one of them is a token.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let trunkline_proto::v1::TaskAssignment { task_id, task_type, target_implementation, specifier, .. } = &*self.0;
        write!(f, "Assignment {{ {task_id:?}, type: {task_type:?}, for: {target_implementation:?} {specifier:?} }}")
    }
}

/// A task that is to be made.
///
/// ```
/// use trunkline_client::task::NewTask;
/// let own = NewTask::new("summarize");
/// let pooled = NewTask::new("render").for_pool("renderer").payload("{}").workspace("prod");
/// let sent = NewTask::new("review").for_agent("ag::prod::reviewer::main").once("order-17");
/// ```
#[derive(Clone, Debug)]
#[must_use = "a task is made when it is given to create"]
pub struct NewTask {
    request: CreateTaskRequest,
}

impl NewTask {
    /// A task of a type, for its creator itself.
    pub fn new(task_type: impl Into<String>) -> Self {
        let request = CreateTaskRequest { task_type: task_type.into(), ..CreateTaskRequest::default() };
        Self { request }
    }

    /// In a workspace other than the creator's own.
    pub fn workspace(mut self, workspace: impl Into<String>) -> Self {
        self.request.workspace = workspace.into();
        self
    }

    /// For one agent, named `implementation.specifier` or by its whole identity.
    pub fn for_agent(mut self, agent: impl Into<String>) -> Self {
        self.request.target_agent_id = agent.into();
        self.request.assignment_mode = TaskAssignmentMode::Targeted.into();
        self
    }

    /// For any one agent of an implementation in the workspace, or any one of its services.
    pub fn for_pool(mut self, implementation: impl Into<String>) -> Self {
        self.request.target_implementation = implementation.into();
        self.request.assignment_mode = TaskAssignmentMode::Pool.into();
        self
    }

    /// How long a worker that has begun may take altogether; without, what the server says for the task's class.
    pub fn execution_timeout(mut self, timeout: Duration) -> Self {
        self.limits().execution_ms = i64::try_from(timeout.as_millis()).unwrap_or(i64::MAX);
        self
    }

    /// How long a worker that has begun may say nothing of it; see [`Client::report`].
    pub fn report_timeout(mut self, timeout: Duration) -> Self {
        self.limits().report_ms = i64::try_from(timeout.as_millis()).unwrap_or(i64::MAX);
        self
    }

    /// After how many workers that were lost over it, one after the other and without a report, it is a dead letter.
    pub fn lost_sessions_max(mut self, most: u32) -> Self {
        self.limits().lost_sessions_max = most.into();
        self
    }

    fn limits(&mut self) -> &mut TaskLimits {
        self.request.limits.get_or_insert_default()
    }

    /// What it is about. Up to 512 KiB.
    pub fn payload(mut self, payload: impl Into<Bytes>) -> Self {
        self.request.payload = payload.into();
        self
    }

    /// A label.
    pub fn metadata(mut self, key: impl Into<String>, value: impl Into<String>) -> Self {
        self.request.metadata.insert(key.into(), value.into());
        self
    }

    /// A parameter for the orchestrator that starts the agent.
    pub fn launch_param(mut self, key: impl Into<String>, value: impl Into<String>) -> Self {
        self.request.launch_param_overrides.insert(key.into(), value.into());
        self
    }

    /// How urgent it is.
    pub fn priority(mut self, priority: TaskPriority) -> Self {
        self.request.priority = priority.into();
        self
    }

    /// What class it is of.
    pub fn class(mut self, class: TaskClass) -> Self {
        self.request.task_class = class.into();
        self
    }

    /// What is done when it fails.
    pub fn retry(mut self, policy: RetryPolicy) -> Self {
        self.request.retry_policy = Some(policy);
        self
    }

    /// What happens while the target is away.
    pub fn when_offline(mut self, policy: TargetOfflinePolicy) -> Self {
        self.request.target_offline_policy = policy.into();
        self
    }

    /// A key under which it is made once, however often that is asked for. Then it is also asked for again by itself if the
    /// connection breaks.
    pub fn once(mut self, key: impl Into<String>) -> Self {
        self.request.idempotency_key = key.into();
        self
    }

    /// The task that it is part of.
    pub fn parent(mut self, task_id: impl Into<String>) -> Self {
        self.request.parent_task_id = task_id.into();
        self
    }

    /// What it belongs to: a context, such as a conversation.
    pub fn context(mut self, id: impl Into<String>) -> Self {
        self.request.context_id = id.into();
        self
    }

    /// What it belongs to: others with the same id.
    pub fn correlation(mut self, id: impl Into<String>) -> Self {
        self.request.correlation_id = id.into();
        self
    }

    /// An event that is sent when it ends.
    pub fn completion_event(mut self, event: TaskCompletionEvent) -> Self {
        self.request.completion_event = Some(event);
        self
    }

    /// On behalf of somebody else, by a grant.
    pub fn authorized(mut self, authorization: impl Into<AuthorizationContext>) -> Self {
        self.request.authorization = Some(authorization.into());
        self
    }

    /// How often whoever works on it may hand its authority on.
    pub fn downstream_hops(mut self, hops: u32) -> Self {
        self.request.required_downstream_authority_hops = hops;
        self
    }

    /// Anything else that the contract has.
    pub fn with(mut self, change: impl FnOnce(&mut CreateTaskRequest)) -> Self {
        change(&mut self.request);
        self
    }
}

/// A task that was made.
#[derive(Clone, PartialEq)]
#[non_exhaustive]
pub struct Created {
    /// Its id.
    pub task_id: String,
    /// How it stands, in the server's word: `running`, `assigned`, `pending`.
    pub status: String,
    /// Who works on it, if that is known.
    pub assigned_to: Option<String>,
    /// A token for whoever works on it.
    pub token: Option<String>,
    /// The grant that it was given.
    pub grant_id: Option<String>,
}

impl fmt::Debug for Created {
    /// Without the token.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { task_id, status, assigned_to, token, grant_id } = self;
        let has_token = token.is_some();
        write!(f, "Created {{ {task_id:?}, {status:?}, {assigned_to:?}, token: {has_token}, grant: {grant_id:?} }}")
    }
}

/// What a task waits for.
#[derive(Clone, Debug)]
#[must_use = "a wait begins when it is given to pause or wait_for"]
pub struct Wait {
    spec: WaitSpec,
}

impl Wait {
    /// Input, by a message from anybody who may.
    pub fn for_input() -> Self {
        Self { spec: WaitSpec { reason: WaitReason::Input.into(), ..WaitSpec::default() } }
    }

    /// Authority, by the request for it.
    pub fn for_authority(request_id: impl Into<String>) -> Self {
        let authority_request_id = request_id.into();
        Self { spec: WaitSpec { reason: WaitReason::Authority.into(), authority_request_id, ..WaitSpec::default() } }
    }

    /// Other tasks to end: all of them.
    pub fn for_tasks<T: Into<String>>(tasks: impl IntoIterator<Item = T>) -> Self {
        let depends_on = tasks.into_iter().map(Into::into).collect();
        Self { spec: WaitSpec { reason: WaitReason::Dependency.into(), depends_on, ..WaitSpec::default() } }
    }

    /// Sleeps, its state being in a checkpoint, until an event of one of these types.
    pub fn hibernate<T: Into<String>>(checkpoint_key: impl Into<String>, wake_on: impl IntoIterator<Item = T>) -> Self {
        let hibernation = Some(HibernationDescriptor {
            checkpoint_key: checkpoint_key.into(),
            wake_event_types: wake_on.into_iter().map(Into::into).collect(),
            ..HibernationDescriptor::default()
        });
        Self { spec: WaitSpec { reason: WaitReason::Hibernation.into(), hibernation, ..WaitSpec::default() } }
    }

    /// Any one of the tasks is enough.
    pub fn any(mut self) -> Self {
        self.spec.wake_on_any = true;
        self
    }

    /// Only from this principal.
    pub fn from(mut self, principal: impl Into<String>) -> Self {
        self.spec.expected_principal = principal.into();
        self
    }

    /// At most so long; then the task fails.
    pub fn timeout(mut self, timeout: Duration) -> Self {
        self.spec.timeout_ms = millis(timeout);
        self
    }

    /// Until this time at the latest, in Unix milliseconds; then the task goes on.
    pub fn until_ms(mut self, unix_ms: i64) -> Self {
        self.spec.scheduled_wake_unix_ms = unix_ms;
        self
    }

    /// Anything else that the contract has.
    pub fn with(mut self, change: impl FnOnce(&mut WaitSpec)) -> Self {
        change(&mut self.spec);
        self
    }
}

pub(crate) fn millis(duration: Duration) -> i64 {
    i64::try_from(duration.as_millis()).unwrap_or(i64::MAX)
}

/// One page of a list of tasks.
#[derive(Clone, Debug, PartialEq, Default)]
#[non_exhaustive]
pub struct Page {
    /// The tasks.
    pub tasks: Vec<TaskInfo>,
    /// How many there are in all.
    pub total: u64,
    /// For [`TaskFilter::page_token`](trunkline_proto::v1::TaskFilter) of the next page; empty for none.
    pub next: String,
}

/// What can be done with tasks. Made by [`Client::tasks`].
#[derive(Clone, Debug)]
pub struct Tasks {
    client: Client,
    attempt: i64,
}

impl Client {
    /// What can be done with tasks.
    #[must_use]
    pub fn tasks(&self) -> Tasks {
        Tasks { client: self.clone(), attempt: 0 }
    }

    /// Tells others how work goes on: a moment's news, in order with what is sent. What the server has against it comes to
    /// [`Client::refusals`].
    ///
    /// # Errors
    /// As [`Client::send`].
    pub async fn report(&self, progress: Progress) -> Result<()> {
        fits(progress.report.encoded_len())?;
        let timeout = self.core.options.send_timeout;
        self.core.put(Up::Progress(Box::new(progress.report)), Mark::Nothing, timeout).await
    }
}

impl Tasks {
    /// The same, where what is said of a task holds for one attempt: an assignment names it. Refused once another one is under way,
    /// so that a worker that lost a task does not end it for the one that has it now.
    #[must_use]
    pub fn of_attempt(mut self, attempt: i64) -> Self {
        self.attempt = attempt;
        self
    }

    /// Makes a task.
    ///
    /// # Errors
    /// What the server refused, with its code.
    pub async fn create(&self, task: NewTask) -> Result<Created> {
        let ask = Ask { idempotent: !task.request.idempotency_key.is_empty(), ..Ask::change("create a task") };
        let build = |request_id| Up::CreateTask(Box::new(CreateTaskRequest { request_id, ..task.request }));
        let reply = reply!(self.client.core.ask(ask, build).await?, Down::CreateTask)?;
        let CreateTaskResponse { success, task_id, status, error_code, error_message, .. } = *reply;
        if !success {
            return Err(Error::from_code(&error_code, &error_message));
        }
        let some = |text: String| Some(text).filter(|text| !text.is_empty());
        Ok(Created {
            task_id,
            status,
            assigned_to: some(reply.assigned_to),
            token: some(reply.task_token),
            grant_id: some(reply.authority_grant_id),
        })
    }

    /// One task.
    ///
    /// # Errors
    /// [`Kind::NotFound`](crate::Kind::NotFound) also if it may not be seen.
    pub async fn get(&self, task_id: &str) -> Result<TaskInfo> {
        let (op, task_id) = (task_query::OpType::Get.into(), task_id.to_owned());
        let build = |request_id| Up::TaskQuery(Box::new(TaskQuery { op, task_id, request_id, ..TaskQuery::default() }));
        let reply = reply!(self.client.core.ask(Ask::read("get a task"), build).await?, Down::TaskQuery)?;
        match reply.task {
            Some(task) if reply.success => Ok(task),
            _ => Err(Error::from_words(&reply.error)),
        }
    }

    /// One page of the tasks that fit.
    ///
    /// # Errors
    /// What the server refused.
    pub async fn list(&self, filter: TaskFilter) -> Result<Page> {
        let (op, filter) = (task_query::OpType::List.into(), Some(filter));
        let build = |request_id| Up::TaskQuery(Box::new(TaskQuery { op, filter, request_id, ..TaskQuery::default() }));
        let reply = reply!(self.client.core.ask(Ask::read("list tasks"), build).await?, Down::TaskQuery)?;
        if !reply.success {
            return Err(Error::from_words(&reply.error));
        }
        let total = u64::try_from(reply.total_count).unwrap_or(0);
        Ok(Page { tasks: reply.tasks, total, next: reply.next_page_token })
    }

    /// Takes a task that waits for somebody.
    ///
    /// # Errors
    /// What the server refused; also if somebody else was faster.
    pub async fn claim(&self, task_id: &str) -> Result<TaskInfo> {
        // The published figure.
        self.operate(OpType::Claim, task_id, "", None, Some(Duration::from_secs(5))).await
    }

    /// The work is done.
    ///
    /// # Errors
    /// What the server refused; also if the task has ended.
    pub async fn complete(&self, task_id: &str) -> Result<TaskInfo> {
        self.operate(OpType::Complete, task_id, "", None, None).await
    }

    /// The work failed.
    ///
    /// # Errors
    /// As [`Tasks::complete`].
    pub async fn fail(&self, task_id: &str, reason: &str) -> Result<TaskInfo> {
        self.operate(OpType::Fail, task_id, reason, None, None).await
    }

    /// The work is not wanted any more.
    ///
    /// # Errors
    /// As [`Tasks::complete`].
    pub async fn cancel(&self, task_id: &str, reason: &str) -> Result<TaskInfo> {
        self.operate(OpType::Cancel, task_id, reason, None, None).await
    }

    /// Once more, after it failed or was cancelled.
    ///
    /// # Errors
    /// What the server refused.
    pub async fn retry(&self, task_id: &str) -> Result<TaskInfo> {
        self.operate(OpType::Retry, task_id, "", None, None).await
    }

    /// The worker declines it.
    ///
    /// # Errors
    /// What the server refused.
    pub async fn reject(&self, task_id: &str, reason: &str) -> Result<TaskInfo> {
        self.operate(OpType::Reject, task_id, reason, None, None).await
    }

    /// It waits for something.
    ///
    /// # Errors
    /// [`Kind::Invalid`](crate::Kind::Invalid) for hibernation without a checkpoint; what the server refused.
    pub async fn pause(&self, task_id: &str, wait: Wait) -> Result<TaskInfo> {
        if wait.spec.hibernation.as_ref().is_some_and(|descriptor| descriptor.checkpoint_key.is_empty()) {
            return Err(Error::invalid("hibernation takes the key of a checkpoint"));
        }
        self.operate(OpType::Pause, task_id, "", Some(wait.spec), None).await
    }

    /// It waits for other tasks.
    ///
    /// # Errors
    /// [`Kind::Invalid`](crate::Kind::Invalid) if there are none; what the server refused.
    pub async fn wait_for(&self, task_id: &str, wait: Wait) -> Result<TaskInfo> {
        if wait.spec.depends_on.is_empty() {
            return Err(Error::invalid("waiting for tasks takes at least one"));
        }
        self.operate(OpType::WaitFor, task_id, "", Some(wait.spec), None).await
    }

    /// It goes on.
    ///
    /// # Errors
    /// What the server refused.
    pub async fn resume(&self, task_id: &str) -> Result<TaskInfo> {
        self.operate(OpType::Resume, task_id, "", None, None).await
    }

    async fn operate(
        &self,
        op: OpType,
        task_id: &str,
        reason: &str,
        wait_spec: Option<WaitSpec>,
        timeout: Option<Duration>,
    ) -> Result<TaskInfo> {
        let (op, task_id, reason) = (op.into(), task_id.to_owned(), reason.to_owned());
        let attempt = self.attempt;
        let build =
            |request_id| Up::TaskOp(Box::new(TaskOperation { op, task_id, reason, request_id, wait_spec, attempt }));
        let ask = Ask { timeout, ..Ask::change("change a task") };
        let reply = reply!(self.client.core.ask(ask, build).await?, Down::TaskOp)?;
        if reply.success { Ok(reply.task.unwrap_or_default()) } else { Err(Error::from_words(&reply.error)) }
    }

    /// Follows a task, and with `recursive` those that it makes. Goes on after a reconnect where it was.
    ///
    /// # Errors
    /// What the server refused.
    pub async fn follow(&self, task_id: &str, recursive: bool) -> Result<Following> {
        self.follow_since(task_id, recursive, None).await
    }

    /// As [`Tasks::follow`], but from its beginning: what happened already is told first.
    ///
    /// # Errors
    /// As [`Tasks::follow`].
    pub async fn replay(&self, task_id: &str, recursive: bool) -> Result<Following> {
        self.follow_since(task_id, recursive, Some(1)).await
    }

    async fn follow_since(&self, task_id: &str, recursive: bool, since_ms: Option<i64>) -> Result<Following> {
        let core = &self.client.core;
        let mut begun = None;
        let build = |client_request_id: String| {
            let lane = core.routes.follow(&client_request_id, task_id, recursive, since_ms, &core.room);
            let events = Received::of(&lane);
            begun = Some(Following { events, id: client_request_id.clone(), client: self.client.clone() });
            Up::TaskSubscriptionOp(Box::new(TaskSubscriptionOperation {
                op: task_subscription_operation::OpType::Subscribe.into(),
                task_id: task_id.to_owned(),
                recursive,
                client_request_id,
                start_timestamp_unix_ms: since_ms.unwrap_or(0),
                ..TaskSubscriptionOperation::default()
            }))
        };
        // Not made again by itself: the subscription is, with the connection.
        let reply = core.ask(Ask::change("follow a task"), build).await;
        let Some(following) = begun else { return Err(reply.err().unwrap_or_else(crate::connection::closed)) };
        let reply = reply!(reply?, Down::TaskSubscriptionResponse)?;
        if reply.success { Ok(following) } else { Err(Error::from_words(&reply.error)) }
    }
}

/// The events of a task. Dropping it ends the subscription.
pub struct Following {
    events: Received<TaskEvent>,
    id: String,
    client: Client,
}

impl Following {
    /// The next event, or `None` if the client has ended, or the task is not there any more after a reconnect.
    pub async fn next(&mut self) -> Option<TaskEvent> {
        self.events.next().await
    }
}

impl futures_util::Stream for Following {
    type Item = TaskEvent;

    fn poll_next(
        mut self: std::pin::Pin<&mut Self>,
        cx: &mut std::task::Context<'_>,
    ) -> std::task::Poll<Option<TaskEvent>> {
        std::pin::Pin::new(&mut self.events).poll_next(cx)
    }
}

impl Drop for Following {
    fn drop(&mut self) {
        let core = &self.client.core;
        core.routes.unfollow(&self.id);
        core.tell_unwanted();
    }
}

/// News of work.
///
/// ```
/// use trunkline_client::task::Progress;
/// let progress = Progress::running("t-1").completion(0.5).summary("50 of 100").step("validate", 2, 4);
/// ```
#[derive(Clone, Debug)]
#[must_use = "news is told when it is given to report"]
pub struct Progress {
    report: ProgressReport,
}

impl Progress {
    /// Work on a task, that goes on. The task may be anything that both sides know.
    pub fn running(task_id: impl Into<String>) -> Self {
        let report = ProgressReport {
            task_id: task_id.into(),
            state: "running".to_owned(),
            completion: -1.0,
            ..ProgressReport::default()
        };
        Self { report }
    }

    /// In another state, such as `finishing` or `idle`.
    pub fn state(mut self, state: impl Into<String>) -> Self {
        self.report.state = state.into();
        self
    }

    /// How much is done, from 0 to 1; without this, nobody knows.
    pub fn completion(mut self, part: f64) -> Self {
        self.report.completion = part;
        self
    }

    /// In words.
    pub fn summary(mut self, summary: impl Into<String>) -> Self {
        self.report.summary = summary.into();
        self
    }

    /// In a step of several.
    pub fn step(mut self, name: impl Into<String>, sequence: i32, total: i32) -> Self {
        let step = self.report.step.take().unwrap_or_default();
        self.report.step = Some(ProgressStep { name: name.into(), sequence, total_steps: total, ..step });
        self
    }

    /// More about the step.
    pub fn step_detail(mut self, detail: impl Into<String>, step_type: impl Into<String>) -> Self {
        let step = self.report.step.take().unwrap_or_default();
        self.report.step = Some(ProgressStep { detail: detail.into(), step_type: step_type.into(), ..step });
        self
    }

    /// For one principal, or `us::{user}` for all windows of a user; without this, for the workspace.
    pub fn to(mut self, recipient: impl Into<String>) -> Self {
        self.report.recipient = recipient.into();
        self
    }

    /// The request that it is about.
    pub fn request(mut self, id: impl Into<String>) -> Self {
        self.report.request_id = id.into();
        self
    }

    /// What kind of work it is.
    pub fn kind(mut self, kind: ProgressKind) -> Self {
        self.report.kind = kind.into();
        self
    }

    /// Labels.
    pub fn metadata(mut self, metadata: HashMap<String, String>) -> Self {
        self.report.metadata = metadata;
        self
    }
}

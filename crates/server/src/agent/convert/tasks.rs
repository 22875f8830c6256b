//! Tasks, between the contract and core.

use std::collections::BTreeMap;

use trunkline_core::{
    Error, Kind,
    identity::{Identity, PrincipalKind},
    message::Notice,
    task::{
        Backoff, CompletionEvent, Create, Event, Filter, Handout, Hibernation, Mode, OfflinePolicy, Operation, Receipt,
        RetryPolicy, STARTUP, Task, TaskEvent, TaskLimits, Wait, WaitReason,
        state::{State, Status},
    },
};
use trunkline_proto::{
    own,
    v1::{
        self as wire, BackoffStrategy, CreateTaskRequest, HibernationDescriptor, ProgressKind, ProgressUpdate,
        TargetOfflinePolicy, TaskAssignment, TaskAssignmentMode, TaskCompletionEvent, TaskFilter, TaskInfo,
        TaskOperation, TaskPriority, WaitSpec, task_operation::OpType,
    },
};

/// Metadata in which a worker finds where to go on; also fields of the assignment.
const CHECKPOINT_KEY: &str = "_hibernation_checkpoint_key";
const RESUME_SESSION: &str = "_hibernation_resume_session_id";

/// The launch parameter with the token for the agent that is started.
const AUTH_TOKEN: &str = "auth_token";

/// What a client wants to be done.
pub(in crate::agent) fn create(request: CreateTaskRequest) -> Create {
    let mode = match TaskAssignmentMode::try_from(request.assignment_mode) {
        Ok(TaskAssignmentMode::Targeted) => Mode::Targeted,
        Ok(TaskAssignmentMode::Pool) => Mode::Pool,
        // The published server takes numbers that it does not know so too.
        Ok(TaskAssignmentMode::SelfAssign) | Err(_) => Mode::SelfAssign,
    };
    let offline = match TargetOfflinePolicy::try_from(request.target_offline_policy) {
        Ok(TargetOfflinePolicy::Queue) => OfflinePolicy::Queue,
        Ok(TargetOfflinePolicy::Reject) => OfflinePolicy::Reject,
        _ => OfflinePolicy::Orchestrate,
    };
    Create {
        kind: request.task_type,
        workspace: request.workspace,
        mode,
        target: request.target_agent_id,
        implementation: request.target_implementation,
        payload: request.payload.into(),
        metadata: request.metadata.into_iter().collect(),
        launch_overrides: request.launch_param_overrides.into_iter().collect(),
        class: request.task_class,
        priority: request.priority.into(),
        context: request.context_id,
        correlation: request.correlation_id,
        root: request.root_task_id,
        parent: request.parent_task_id,
        retry: request.retry_policy.map(retry),
        completion: request.completion_event.filter(|event| event.enabled).map(completion),
        key: request.idempotency_key,
        token_for: request.target_identity,
        offline,
        limits: request.limits.map(limits).unwrap_or_default(),
    }
}

fn retry(policy: wire::RetryPolicy) -> RetryPolicy {
    let backoff = match BackoffStrategy::try_from(policy.backoff) {
        Ok(BackoffStrategy::Fixed) => Backoff::Fixed,
        Ok(BackoffStrategy::ExplicitSchedule) => Backoff::Schedule,
        _ => Backoff::Exponential,
    };
    RetryPolicy {
        max_attempts: policy.max_attempts.into(),
        backoff,
        initial_delay_ms: policy.initial_delay_ms,
        max_delay_ms: policy.max_delay_ms,
        jitter: policy.jitter_factor,
        schedule_ms: policy.schedule_ms,
    }
}

fn limits(limits: own::TaskLimits) -> TaskLimits {
    let own::TaskLimits { execution_ms, report_ms, lost_sessions_max } = limits;
    TaskLimits { execution_ms, report_ms, lost_sessions_max }
}

fn completion(event: TaskCompletionEvent) -> CompletionEvent {
    CompletionEvent { name: event.event_name, on_statuses: event.on_statuses }
}

/// What a client asks of a task; nothing for a number that means nothing.
pub(in crate::agent) fn operation(operation: TaskOperation) -> Option<Operation> {
    let (reason, wait) = (operation.reason, operation.wait_spec.map(wait));
    Some(match OpType::try_from(operation.op).ok()? {
        OpType::Retry => Operation::Retry,
        OpType::Cancel => Operation::Cancel(reason),
        OpType::Complete => Operation::Complete,
        OpType::Fail => Operation::Fail(reason),
        OpType::Pause => Operation::Pause(wait),
        OpType::WaitFor => Operation::WaitFor(wait),
        OpType::Resume => Operation::Resume,
        OpType::Reject => Operation::Reject(reason),
        OpType::Claim => Operation::Claim,
    })
}

fn wait(spec: WaitSpec) -> Wait {
    let reason = match wire::WaitReason::try_from(spec.reason) {
        Ok(wire::WaitReason::Authority) => WaitReason::Authority,
        Ok(wire::WaitReason::Dependency) => WaitReason::Dependency,
        Ok(wire::WaitReason::Hibernation) => WaitReason::Hibernation,
        Ok(wire::WaitReason::Input | wire::WaitReason::Unspecified) | Err(_) => WaitReason::Input,
    };
    let hibernation = |descriptor: HibernationDescriptor| Hibernation {
        checkpoint_key: descriptor.checkpoint_key,
        resume_session: descriptor.resume_session_id,
        wake_event_types: descriptor.wake_event_types,
        escalation_policy: descriptor.escalation_policy,
    };
    Wait {
        reason,
        expected_principal: spec.expected_principal,
        input_match: spec.input_match.into_iter().collect(),
        authority_request: spec.authority_request_id,
        depends_on: spec.depends_on,
        wake_on_any: spec.wake_on_any,
        timeout_ms: spec.timeout_ms,
        wake_at_ms: spec.scheduled_wake_unix_ms,
        hibernation: spec.hibernation.map(hibernation),
    }
}

fn wait_spec(wait: &Wait) -> WaitSpec {
    let reason = match wait.reason {
        WaitReason::Input => wire::WaitReason::Input,
        WaitReason::Authority => wire::WaitReason::Authority,
        WaitReason::Dependency => wire::WaitReason::Dependency,
        WaitReason::Hibernation => wire::WaitReason::Hibernation,
    };
    WaitSpec {
        reason: reason.into(),
        expected_principal: wait.expected_principal.clone(),
        input_match: wait.input_match.clone().into_iter().collect(),
        authority_request_id: wait.authority_request.clone(),
        depends_on: wait.depends_on.clone(),
        wake_on_any: wait.wake_on_any,
        timeout_ms: wait.timeout_ms,
        scheduled_wake_unix_ms: wait.wake_at_ms,
        hibernation: wait.hibernation.as_ref().map(descriptor),
    }
}

pub(in crate::agent) fn descriptor(hibernation: &Hibernation) -> HibernationDescriptor {
    HibernationDescriptor {
        checkpoint_key: hibernation.checkpoint_key.clone(),
        resume_session_id: hibernation.resume_session.clone(),
        wake_event_types: hibernation.wake_event_types.clone(),
        escalation_policy: hibernation.escalation_policy.clone(),
    }
}

/// The statuses of these numbers; 0 stands for none. A number that means nothing is refused, because without it the filter
/// would let more through.
fn statuses(numbers: &[i32]) -> Result<Vec<Status>, Error> {
    let unknown =
        |number: i32| Error::new(Kind::Invalid, "ERR_INVALID_ARGUMENT", format!("unknown task status {number}"));
    let named = numbers.iter().filter(|number| **number != 0);
    named.map(|number| Status::from_number(*number).ok_or_else(|| unknown(*number))).collect()
}

/// Which tasks a client wants to see.
///
/// # Errors
/// [`Kind::Invalid`] for a filter that cannot be kept.
pub(in crate::agent) fn filter(filter: TaskFilter) -> Result<Filter, Error> {
    let mut wanted = statuses(&filter.statuses)?;
    if wanted.is_empty() {
        wanted = statuses(&[filter.status])?;
    }
    let (creator, is_kind) = creator(filter.creator_actor)?;
    // No task has a grant.
    let is_granted = !filter.authority_grant_id.is_empty() || !filter.root_authority_grant_id.is_empty();
    Ok(Filter {
        workspace: filter.workspace,
        kind: filter.task_type,
        statuses: wanted,
        except_statuses: statuses(&filter.exclude_statuses)?,
        dead_letters: filter.dead_letters,
        parent: filter.parent_task_id,
        descendants: filter.include_descendants,
        root: filter.root_task_id,
        correlation: filter.correlation_id,
        context: filter.context_id,
        creator,
        never: never(&filter.subject_type, &filter.authority_mode) || is_granted || !is_kind,
        subject: match (filter.subject_type.as_str(), filter.subject_id.as_str()) {
            ("user", "") => "*".to_owned(),
            _ => filter.subject_id,
        },
        class: filter.task_class,
        except_classes: filter.exclude_task_classes,
        priority: filter.priority.into(),
        min_priority: filter.min_priority.into(),
        changed_after: filter.status_timestamp_after_unix_ms,
        limit: filter.limit.into(),
        offset: filter.offset.into(),
        page_token: filter.page_token,
    })
}

/// The identity that made the tasks, and whether it is of the kind that is asked for with it.
fn creator(actor: Option<wire::PrincipalRef>) -> Result<(String, bool), Error> {
    let Some(actor) = actor else { return Ok((String::new(), true)) };
    if actor.principal_id.is_empty() && !actor.principal_type.is_empty() {
        let message = "creator_actor requires principal_id";
        return Err(Error::new(Kind::Invalid, "ERR_INVALID_ARGUMENT", message));
    }
    let is_kind = actor.principal_type.is_empty()
        || Identity::parse(&actor.principal_id)
            .is_ok_and(|identity| PrincipalKind::parse(&actor.principal_type) == Some(identity.kind()));
    Ok((actor.principal_id, is_kind))
}

/// Whether no task has such a subject or acts by such an authority: subjects are users, and everybody acts for itself.
fn never(subject_type: &str, authority_mode: &str) -> bool {
    !matches!(subject_type, "" | "user") || !matches!(authority_mode, "" | "direct")
}

fn seconds(at: Option<i64>) -> i64 {
    at.map_or(0, |at| at / 1000)
}

fn number(count: i64) -> i32 {
    i32::try_from(count).unwrap_or(i32::MAX)
}

fn parent(task: Option<impl ToString>) -> String {
    task.map(|parent| parent.to_string()).unwrap_or_default()
}

/// A task as clients see it.
pub(in crate::agent) fn info(task: &Task) -> TaskInfo {
    let spec = &task.spec;
    let attempts = spec.retry.as_ref().map_or(3, RetryPolicy::attempts);
    TaskInfo {
        task_id: task.id.to_string(),
        task_type: task.kind.clone(),
        status: task.state.status() as i32,
        workspace: task.workspace.clone(),
        target_topic: task.target.clone(),
        assigned_to: task.assignee.clone(),
        created_at: task.created_at / 1000,
        started_at: seconds(task.started_at),
        completed_at: seconds(task.ended_at),
        attempt: number(task.failures),
        max_attempts: number(attempts),
        error: task.error.clone(),
        assignments: task.attempt,
        lost_sessions: task.lost_sessions,
        metadata: metadata(task).into_iter().collect(),
        subject_type: if task.subject.is_empty() { String::new() } else { "user".to_owned() },
        subject_id: task.subject.clone(),
        creator_actor_id: task.creator.clone(),
        parent_task_id: parent(task.parent),
        task_class: task.class,
        disconnected_at: seconds(task.disconnected_at),
        grace_window_ms: task.grace_ms,
        wait_spec: task.wait.as_ref().map(wait_spec),
        depends_on: task.wait.as_ref().map(|wait| wait.depends_on.clone()).unwrap_or_default(),
        context_id: task.context.clone(),
        paused_at: seconds(task.paused_at),
        priority: TaskPriority::try_from(number(task.priority)).map_or(number(task.priority), i32::from),
        correlation_id: task.correlation.clone(),
        root_task_id: task.root_id(),
        completion_event: spec.completion.as_ref().map(|event| TaskCompletionEvent {
            enabled: true,
            event_name: event.name.clone(),
            on_statuses: event.on_statuses.clone(),
        }),
        retry_at_unix_ms: task.retry_at.filter(|_| task.state == State::Retrying).unwrap_or(0),
        ..TaskInfo::default()
    }
}

fn metadata(task: &Task) -> BTreeMap<String, String> {
    let mut metadata = task.spec.metadata.clone();
    if let Some(hibernation) = &task.hibernation {
        metadata.insert(CHECKPOINT_KEY.to_owned(), hibernation.checkpoint_key.clone());
        metadata.insert(RESUME_SESSION.to_owned(), hibernation.resume_session.clone());
    }
    metadata
}

/// A task for its worker, and what is to be told when it arrived.
pub(in crate::agent) fn assignment(handout: Handout) -> (TaskAssignment, Receipt) {
    let Handout { task, payload, token, receipt } = handout;
    let mut launch_params: std::collections::HashMap<_, _> = task.spec.launch_params.clone().into_iter().collect();
    if let Some(token) = &token {
        launch_params.insert(AUTH_TOKEN.to_owned(), token.reveal().to_owned());
    }
    let is_start = task.kind == STARTUP;
    let target = Identity::parse(&task.target).ok().filter(|_| is_start);
    let hibernation = task.hibernation.clone().unwrap_or_default();
    let assignment = TaskAssignment {
        attempt: task.attempt,
        task_id: task.id.to_string(),
        assigned_to: task.assignee.clone(),
        metadata: metadata(&task).into_iter().collect(),
        assigned_at: seconds(task.assigned_at),
        profile: launch_params.get("profile").cloned().unwrap_or_default(),
        launch_params,
        target_implementation: task.implementation.clone(),
        workspace: task.workspace.clone(),
        specifier: target.map(|target| target.specifier().to_owned()).unwrap_or_default(),
        payload: payload.into(),
        task_class: task.class,
        checkpoint_key: hibernation.checkpoint_key,
        resume_session_id: hibernation.resume_session,
        authorization: None,
        task_type: task.kind,
    };
    (assignment, receipt)
}

/// Something that happened to a task.
pub(in crate::agent) fn event(event: TaskEvent, subscription_id: String) -> wire::TaskEvent {
    use wire::task_event::Event as Wire;
    let happened = match event.event {
        Event::StatusChanged { from, to, reason } => {
            Wire::StatusChanged(wire::TaskStatusChangedEvent { from_status: from, to_status: to, reason })
        }
        Event::Progress { state, completion, summary, metadata } => Wire::Progress(wire::TaskProgressEvent {
            state,
            progress: completion,
            message: summary,
            metadata: metadata.into_iter().collect(),
        }),
        Event::Child { task, status, lifecycle, .. } => Wire::ChildLifecycle(wire::TaskChildLifecycleEvent {
            child_task_id: task.to_string(),
            child_status: status,
            lifecycle,
        }),
    };
    wire::TaskEvent {
        task_id: event.task.to_string(),
        emitted_at_unix_ms: event.at_ms,
        workspace: event.workspace,
        parent_task_id: parent(event.parent),
        subscription_id,
        event: Some(happened),
    }
}

/// The server's word on a task, for its creator.
pub(in crate::agent) fn notice(notice: Notice, workspace: String, timestamp_ms: u64) -> ProgressUpdate {
    ProgressUpdate {
        task_id: notice.task.to_string(),
        workspace,
        state: notice.state,
        summary: notice.summary,
        recipient: notice.recipient,
        metadata: notice.metadata.into_iter().collect(),
        timestamp_ms: timestamp_ms as i64,
        kind: ProgressKind::Task.into(),
        ..ProgressUpdate::default()
    }
}

//! `task`: made, shown, followed, changed.

use std::collections::HashMap;

use serde_json::{Value, json};
use trunkline_core::identity::Identity;
use trunkline_proto::v1::{
    BackoffStrategy, CreateTaskRequest, RetryPolicy, TaskAssignmentMode, TaskEvent, TaskFilter, TaskInfo,
    TaskOperation, TaskPriority, TaskQuery, TaskQueryResponse, TaskStatus, TaskSubscriptionOperation,
    downstream_message::Payload as Down, task_event::Event, task_operation::OpType, task_query,
    task_subscription_operation, upstream_message::Payload as Up,
};

use super::{
    Done, block_on,
    client::{Connect, Stream},
    payload, say,
};

type Error = Box<dyn std::error::Error>;

/// Tasks of one page; the server's own limit.
const PAGE: i32 = 1000;

/// Cells of a progress bar.
const BAR: usize = 20;

#[derive(clap::Subcommand)]
pub(crate) enum Task {
    /// Has something done, by any worker of an implementation or by one principal.
    Create(Create),
    /// Lists the tasks of a workspace, the one that was changed last first.
    List(List),
    /// Shows a task and what is below it.
    Show(One),
    /// Follows a task, and what is below it, to its end.
    Watch(One),
    /// Calls a task off.
    Cancel(Change),
    /// Has a task done once more that failed, was cancelled, or is a dead letter.
    Retry(Change),
    /// Says that a task is done.
    Complete(Change),
    /// Says that a task failed.
    Fail(Change),
}

#[derive(clap::Args)]
pub(crate) struct Create {
    /// What kind of work it is.
    kind: String,
    /// Where it belongs.
    #[arg(long, short)]
    workspace: String,
    /// Any one worker of this implementation does it.
    #[arg(long, value_name = "IMPLEMENTATION", required_unless_present = "target", conflicts_with = "target")]
    pool: Option<String>,
    /// This principal does it, such as `ag::demo::greeter::bob`; it is started if it is away.
    #[arg(long, value_name = "IDENTITY")]
    target: Option<String>,
    /// What its worker gets; `-` reads standard input.
    #[arg(long, default_value = "")]
    payload: String,
    /// What else is known of it; may be repeated.
    #[arg(long = "metadata", value_name = "KEY=VALUE")]
    metadata: Vec<String>,
    /// Who comes first: xlow, low, normal, high, preempt.
    #[arg(long, default_value = "normal")]
    priority: String,
    /// So many tries in all, further and further apart.
    #[arg(long, value_name = "COUNT")]
    attempts: Option<i32>,
    /// The same name again makes no second task.
    #[arg(long, value_name = "NAME")]
    idempotency_key: Option<String>,
    /// Follows it to its end.
    #[arg(long)]
    watch: bool,
    #[command(flatten)]
    ask: Ask,
}

#[derive(clap::Args)]
pub(crate) struct List {
    /// Of which workspace [default: all that may be seen].
    #[arg(long, short)]
    workspace: Option<String>,
    /// Only with this status, such as `running`; may be repeated.
    #[arg(long)]
    status: Vec<String>,
    /// Only of this kind.
    #[arg(long = "type", value_name = "KIND")]
    kind: Option<String>,
    /// Only those that failed as often as they may.
    #[arg(long)]
    dead_letters: bool,
    /// At most so many.
    #[arg(long, default_value_t = 50)]
    limit: i32,
    #[command(flatten)]
    ask: Ask,
}

#[derive(clap::Args)]
pub(crate) struct One {
    /// Its id.
    id: String,
    #[command(flatten)]
    ask: Ask,
}

#[derive(clap::Args)]
pub(crate) struct Change {
    /// Its id.
    id: String,
    /// Why.
    #[arg(long, default_value = "")]
    reason: String,
    #[command(flatten)]
    ask: Ask,
}

#[derive(clap::Args)]
pub(crate) struct Ask {
    /// For programs: one JSON value a line.
    #[arg(long)]
    json: bool,
    /// Who asks [default: an orchestrator of its own, which an administrator's key is good for].
    #[arg(long = "as", value_name = "IDENTITY")]
    who: Option<String>,
    #[command(flatten)]
    connect: Connect,
}

impl Ask {
    async fn attach(&self) -> Result<Stream, Error> {
        self.attach_as(&uuid::Uuid::new_v4().to_string()).await
    }

    /// Under this specifier, unless somebody was named.
    async fn attach_as(&self, specifier: &str) -> Result<Stream, Error> {
        let identity = match &self.who {
            Some(who) => Identity::parse(who)?,
            None => Identity::orchestrator("trunkline-cli", specifier)?,
        };
        self.connect.attach(&identity).await
    }

    fn show(&self, task: &TaskInfo) {
        if self.json { say(as_json(task)) } else { say(line(task)) }
    }
}

pub(crate) fn run(task: Task) -> Done {
    block_on(async {
        match task {
            Task::Create(args) => create(args).await,
            Task::List(args) => list(args).await,
            Task::Show(args) => show(args).await,
            Task::Watch(args) => watch(&mut args.ask.attach().await?, &args.id, args.ask.json).await,
            Task::Cancel(args) => change(OpType::Cancel, args).await,
            Task::Retry(args) => change(OpType::Retry, args).await,
            Task::Complete(args) => change(OpType::Complete, args).await,
            Task::Fail(args) => change(OpType::Fail, args).await,
        }
    })
}

async fn create(args: Create) -> Done {
    let payload = payload(args.payload)?;
    let priority = TaskPriority::from_str_name(&format!("TASK_PRIORITY_{}", args.priority.to_uppercase()));
    let priority = priority.ok_or_else(|| format!("unknown priority {:?}", args.priority))?;
    let pair = |text: &String| {
        let (key, value) = text.split_once('=').ok_or_else(|| format!("{text:?} is no KEY=VALUE"))?;
        Ok::<_, String>((key.to_owned(), value.to_owned()))
    };
    let retry = |max_attempts| RetryPolicy {
        max_attempts,
        backoff: BackoffStrategy::Exponential.into(),
        jitter_factor: 0.1,
        ..RetryPolicy::default()
    };
    let mode = if args.pool.is_some() { TaskAssignmentMode::Pool } else { TaskAssignmentMode::Targeted };
    let request = CreateTaskRequest {
        task_type: args.kind,
        workspace: args.workspace,
        assignment_mode: mode.into(),
        target_implementation: args.pool.unwrap_or_default(),
        target_agent_id: args.target.unwrap_or_default(),
        payload: payload.into(),
        metadata: args.metadata.iter().map(pair).collect::<Result<_, _>>()?,
        priority: priority.into(),
        retry_policy: args.attempts.map(retry),
        idempotency_key: args.idempotency_key.unwrap_or_default(),
        request_id: "create".to_owned(),
        ..CreateTaskRequest::default()
    };
    let mut stream = match request.idempotency_key.as_str() {
        "" => args.ask.attach().await?,
        // Names are their creator's: whoever gives the same one is the same.
        key => args.ask.attach_as(&key.bytes().take(48).map(|byte| format!("{byte:02x}")).collect::<String>()).await?,
    };
    stream.put(Up::CreateTask(request.into())).await?;
    let created = loop {
        if let Down::CreateTask(reply) = stream.next().await? {
            break reply;
        }
    };
    if !created.success {
        return Err(format!("{}: {}", created.error_code, created.error_message).into());
    }
    let task = get(&mut stream, &created.task_id).await?;
    args.ask.show(&task);
    if args.watch { watch(&mut stream, &created.task_id, args.ask.json).await } else { Ok(()) }
}

async fn list(args: List) -> Done {
    let statuses = args.status.iter().map(|status| status_number(status)).collect::<Result<_, _>>()?;
    let filter = TaskFilter {
        workspace: args.workspace.unwrap_or_default(),
        statuses,
        task_type: args.kind.unwrap_or_default(),
        dead_letters: args.dead_letters,
        limit: args.limit,
        ..TaskFilter::default()
    };
    let mut stream = args.ask.attach().await?;
    let (tasks, total) = query(&mut stream, filter).await?;
    tasks.iter().for_each(|task| args.ask.show(task));
    if !args.ask.json {
        say(format_args!("{} of {total}", tasks.len()));
    }
    Ok(())
}

/// A task, and the tree below it.
async fn show(args: One) -> Done {
    let mut stream = args.ask.attach().await?;
    let task = get(&mut stream, &args.id).await?;
    let below = TaskFilter {
        workspace: task.workspace.clone(),
        parent_task_id: args.id.clone(),
        include_descendants: true,
        limit: PAGE,
        ..TaskFilter::default()
    };
    let (mut below, _) = query(&mut stream, below).await?;
    below.sort_by(|a, b| a.task_id.cmp(&b.task_id));
    if args.ask.json {
        let children: Vec<Value> = below.iter().map(as_json).collect();
        let mut value = as_json(&task);
        value["descendants"] = children.into();
        say(value);
        return Ok(());
    }
    say(line(&task));
    for (name, value) in details(&task) {
        say(format_args!("  {name}: {value}"));
    }
    branch(&below, &args.id, 1);
    Ok(())
}

fn branch(all: &[TaskInfo], parent: &str, depth: usize) {
    for child in all.iter().filter(|task| task.parent_task_id == parent) {
        say(format_args!("{}└ {}", "  ".repeat(depth), line(child)));
        branch(all, &child.task_id, depth + 1);
    }
}

/// Ends when the task does; an error if that was no success.
async fn watch(stream: &mut Stream, id: &str, json: bool) -> Done {
    let subscribe = TaskSubscriptionOperation {
        op: task_subscription_operation::OpType::Subscribe.into(),
        task_id: id.to_owned(),
        recursive: true,
        // From its beginning.
        start_timestamp_unix_ms: 1,
        ..TaskSubscriptionOperation::default()
    };
    stream.put(Up::TaskSubscriptionOp(subscribe.into())).await?;
    let mut told = 0;
    loop {
        match stream.next().await? {
            Down::TaskSubscriptionResponse(reply) if !reply.success => return Err(reply.error.into()),
            Down::TaskEvent(event) => {
                tell(&event, json);
                // Whether that is the end is told by the task: one that failed may be tried again.
                if let Some(Event::StatusChanged(change)) = &event.event
                    && event.task_id == id
                {
                    told = change.to_status;
                    let op = task_query::OpType::Get.into();
                    let get = TaskQuery { op, task_id: id.to_owned(), ..TaskQuery::default() };
                    stream.put(Up::TaskQuery(get.into())).await?;
                }
            }
            Down::TaskQuery(reply) => {
                // What is told of it comes behind; the end is told before this ends.
                if let Some(ended) = reply.task.as_ref().filter(|task| task.status == told).and_then(ended) {
                    return ended;
                }
            }
            _ => {}
        }
    }
}

fn ended(task: &TaskInfo) -> Option<Done> {
    match TaskStatus::try_from(task.status).ok()? {
        TaskStatus::Completed => Some(Ok(())),
        TaskStatus::Failed if task.retry_at_unix_ms > 0 => None,
        status @ (TaskStatus::Failed | TaskStatus::Cancelled | TaskStatus::Rejected) => {
            Some(Err(format!("{}: {}", word(status as i32), task.error).into()))
        }
        _ => None,
    }
}

fn tell(event: &TaskEvent, json: bool) {
    let id = &event.task_id;
    let (text, value) = match &event.event {
        Some(Event::StatusChanged(change)) => {
            let (from, to, reason) = (word(change.from_status), word(change.to_status), &change.reason);
            (format!("{to} {reason}"), json!({"from": from, "to": to, "reason": reason}))
        }
        Some(Event::Progress(progress)) => {
            let done = (progress.progress.clamp(0.0, 1.0) * BAR as f64) as usize;
            let bar = "#".repeat(done) + &"-".repeat(BAR - done);
            let (state, percent, message) = (&progress.state, progress.progress * 100.0, &progress.message);
            let text = format!("[{bar}] {percent:.0} % {state} {message}");
            (text, json!({"state": state, "progress": progress.progress, "message": message}))
        }
        Some(Event::ChildLifecycle(child)) => {
            let (child_id, lifecycle, status) = (&child.child_task_id, &child.lifecycle, word(child.child_status));
            (
                format!("child {child_id} {lifecycle}: {status}"),
                json!({"child": child_id, "lifecycle": lifecycle, "status": status}),
            )
        }
        _ => return,
    };
    if json {
        say(json!({"task_id": id, "at_ms": event.emitted_at_unix_ms, "event": value}));
    } else {
        say(format_args!("{id} {}", text.trim_end()));
    }
}

async fn change(op: OpType, args: Change) -> Done {
    let mut stream = args.ask.attach().await?;
    let operation = TaskOperation { op: op.into(), task_id: args.id, reason: args.reason, ..TaskOperation::default() };
    stream.put(Up::TaskOp(operation.into())).await?;
    loop {
        if let Down::TaskOp(reply) = stream.next().await? {
            if !reply.success {
                return Err(reply.error.into());
            }
            args.ask.show(&reply.task.unwrap_or_default());
            return Ok(());
        }
    }
}

async fn get(stream: &mut Stream, id: &str) -> Result<TaskInfo, Error> {
    let op = task_query::OpType::Get.into();
    let get = TaskQuery { op, task_id: id.to_owned(), ..TaskQuery::default() };
    stream.put(Up::TaskQuery(get.into())).await?;
    loop {
        if let Down::TaskQuery(reply) = stream.next().await? {
            let TaskQueryResponse { task, error, .. } = *reply;
            return task.ok_or_else(|| error.into());
        }
    }
}

async fn query(stream: &mut Stream, filter: TaskFilter) -> Result<(Vec<TaskInfo>, i32), Error> {
    let op = task_query::OpType::List.into();
    let list = TaskQuery { op, filter: Some(filter), ..TaskQuery::default() };
    stream.put(Up::TaskQuery(list.into())).await?;
    loop {
        if let Down::TaskQuery(reply) = stream.next().await? {
            return if reply.success { Ok((reply.tasks, reply.total_count)) } else { Err(reply.error.into()) };
        }
    }
}

fn word(status: i32) -> String {
    let name = TaskStatus::try_from(status).map_or("?", |status| status.as_str_name());
    name.trim_start_matches("TASK_STATUS_").to_lowercase()
}

fn status_number(text: &str) -> Result<i32, String> {
    let status = TaskStatus::from_str_name(&format!("TASK_STATUS_{}", text.to_uppercase()));
    status.map(i32::from).ok_or_else(|| format!("unknown status {text:?}"))
}

fn line(task: &TaskInfo) -> String {
    let assigned_to = if task.assigned_to.is_empty() { "-" } else { &task.assigned_to };
    let error = if task.error.is_empty() { String::new() } else { format!(" ({})", task.error) };
    format!("{} {} {} {} {assigned_to}{error}", task.task_id, word(task.status), task.workspace, task.task_type)
}

fn details(task: &TaskInfo) -> Vec<(&'static str, String)> {
    let mut metadata: Vec<_> = task.metadata.iter().map(|(key, value)| format!("{key}={value}")).collect();
    metadata.sort();
    let all = [
        ("creator", task.creator_actor_id.clone()),
        ("for", task.target_topic.clone()),
        ("parent", task.parent_task_id.clone()),
        ("correlation", task.correlation_id.clone()),
        ("context", task.context_id.clone()),
        (
            "failed",
            if task.attempt > 0 { format!("{} of {} times", task.attempt, task.max_attempts) } else { String::new() },
        ),
        ("waits for", task.depends_on.join(" ")),
        ("metadata", metadata.join(" ")),
    ];
    all.into_iter().filter(|(_, value)| !value.is_empty()).collect()
}

fn as_json(task: &TaskInfo) -> Value {
    let metadata: &HashMap<String, String> = &task.metadata;
    json!({
        "task_id": task.task_id,
        "type": task.task_type,
        "status": word(task.status),
        "workspace": task.workspace,
        "assigned_to": task.assigned_to,
        "target": task.target_topic,
        "creator": task.creator_actor_id,
        "parent_task_id": task.parent_task_id,
        "root_task_id": task.root_task_id,
        "correlation_id": task.correlation_id,
        "context_id": task.context_id,
        "priority": task.priority,
        "class": task.task_class,
        "created_at": task.created_at,
        "started_at": task.started_at,
        "completed_at": task.completed_at,
        "attempt": task.attempt,
        "max_attempts": task.max_attempts,
        "error": task.error,
        "depends_on": task.depends_on,
        "metadata": metadata,
    })
}

//! `task`: made, shown, followed, changed.

mod shown;

use std::{cell::Cell, time::Duration};

use serde_json::{Value, json};
use trunkline_client::{
    Client, State,
    proto::task_event::Event,
    task::{BackoffStrategy, NewTask, RetryPolicy, TaskFilter, TaskInfo, TaskPriority, TaskStatus, Tasks},
};

use self::shown::Shown;
use super::{
    Done, Fault, block_on,
    client::Connect,
    output::{Output, Row, plain},
    payload, say,
};

/// Tasks of one page; the server's own limit.
const PAGE: i32 = 1000;

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
    /// So many seconds for a worker that has begun; then it has failed.
    #[arg(long, value_name = "SECONDS", value_parser = clap::value_parser!(u64).range(1..))]
    execution_timeout: Option<u64>,
    /// So many seconds that a worker that has begun may say nothing of it.
    #[arg(long, value_name = "SECONDS", value_parser = clap::value_parser!(u64).range(1..))]
    report_timeout: Option<u64>,
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
    #[arg(long, default_value_t = 50, value_parser = clap::value_parser!(i32).range(1..))]
    limit: i32,
    #[command(flatten)]
    output: Output,
    #[command(flatten)]
    whom: Whom,
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

#[derive(Clone, clap::Args)]
pub(crate) struct Ask {
    /// For programs: one JSON value a line.
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    whom: Whom,
}

#[derive(Clone, clap::Args)]
pub(crate) struct Whom {
    /// Who asks [default: an orchestrator of its own, which an administrator's key is good for].
    #[arg(long = "as", value_name = "IDENTITY")]
    who: Option<String>,
    #[command(flatten)]
    connect: Connect,
}

impl Whom {
    async fn open(&self) -> Result<Client, Fault> {
        self.open_as(&uuid::Uuid::new_v4().to_string()).await
    }

    /// Under this specifier, unless somebody was named.
    async fn open_as(&self, specifier: &str) -> Result<Client, Fault> {
        let own = format!("orc::trunkline-cli::{specifier}");
        self.connect.client_as(Some(self.who.as_ref().unwrap_or(&own))).await
    }
}

impl Ask {
    fn show(&self, task: &TaskInfo) {
        if self.json { say(as_json(task)) } else { say(plain(&line(task))) }
    }
}

pub(crate) fn run(task: Task) -> Done {
    block_on(async {
        match task {
            Task::Create(args) => create(args).await?,
            Task::List(args) => list(args).await?,
            Task::Show(args) => show(args).await?,
            Task::Watch(args) => {
                let client = args.ask.whom.open().await?;
                watch(&client, &args.id, args.ask.json).await?;
                client.close().await;
            }
            Task::Cancel(args) => change(args, async |tasks, id, reason| tasks.cancel(id, reason).await).await?,
            Task::Retry(args) => change(args, async |tasks, id, _| tasks.retry(id).await).await?,
            Task::Complete(args) => change(args, async |tasks, id, _| tasks.complete(id).await).await?,
            Task::Fail(args) => change(args, async |tasks, id, reason| tasks.fail(id, reason).await).await?,
        }
        Ok(())
    })
}

async fn create(args: Create) -> Result<(), Fault> {
    let client = match &args.idempotency_key {
        None => args.ask.whom.open().await?,
        // Names are their creator's: whoever gives the same one is the same.
        Some(key) => {
            args.ask.whom.open_as(&key.bytes().take(48).map(|byte| format!("{byte:02x}")).collect::<String>()).await?
        }
    };
    let (ask, follows) = (args.ask.clone(), args.watch);
    let created = client.tasks().create(wanted(args)?).await?;
    ask.show(&client.tasks().get(&created.task_id).await?);
    if follows {
        watch(&client, &created.task_id, ask.json).await?;
    }
    client.close().await;
    Ok(())
}

fn wanted(args: Create) -> Result<NewTask, Fault> {
    let priority = TaskPriority::from_str_name(&format!("TASK_PRIORITY_{}", args.priority.to_uppercase()));
    let priority = priority.ok_or_else(|| Fault::usage(format!("unknown priority {:?}", args.priority)))?;
    let mut task = NewTask::new(args.kind).workspace(args.workspace).payload(payload(args.payload)?).priority(priority);
    task = match (args.pool, args.target) {
        (Some(pool), _) => task.for_pool(pool),
        (None, target) => task.for_agent(target.unwrap_or_default()),
    };
    for text in &args.metadata {
        let pair = text.split_once('=').ok_or_else(|| Fault::usage(format!("{text:?} is no KEY=VALUE")))?;
        task = task.metadata(pair.0, pair.1);
    }
    if let Some(max_attempts) = args.attempts {
        let backoff = BackoffStrategy::Exponential.into();
        task = task.retry(RetryPolicy { max_attempts, backoff, jitter_factor: 0.1, ..RetryPolicy::default() });
    }
    if let Some(seconds) = args.execution_timeout {
        task = task.execution_timeout(Duration::from_secs(seconds));
    }
    if let Some(seconds) = args.report_timeout {
        task = task.report_timeout(Duration::from_secs(seconds));
    }
    Ok(match args.idempotency_key {
        Some(key) => task.once(key),
        None => task,
    })
}

async fn list(args: List) -> Done {
    let statuses = args.status.iter().map(|status| status_number(status)).collect::<Result<_, _>>()?;
    let filter = TaskFilter {
        workspace: args.workspace.unwrap_or_default(),
        statuses,
        task_type: args.kind.unwrap_or_default(),
        dead_letters: args.dead_letters,
        ..TaskFilter::default()
    };
    let client = args.whom.open().await?;
    let total = Cell::new((0, 0));
    let rows = || async {
        let (found, in_all) = all(&client, filter.clone(), usize::try_from(args.limit).unwrap_or(0)).await?;
        total.set((found.len(), in_all));
        Ok(found.iter().map(|task| if args.output.is_json() { whole(task) } else { row(task) }).collect())
    };
    args.output.show_with(rows, || say(format_args!("{} of {}", total.get().0, total.get().1))).await?;
    client.close().await;
    Ok(())
}

/// The tasks that fit, page by page, up to `most`; and how many there are in all.
async fn all(client: &Client, mut filter: TaskFilter, most: usize) -> Result<(Vec<TaskInfo>, u64), Fault> {
    let mut tasks = Vec::new();
    loop {
        filter.limit = i32::try_from(most - tasks.len()).map_or(PAGE, |left| left.min(PAGE));
        let page = client.tasks().list(filter.clone()).await?;
        tasks.extend(page.tasks);
        filter.page_token = page.next;
        if filter.page_token.is_empty() || tasks.len() >= most {
            tasks.truncate(most);
            return Ok((tasks, page.total));
        }
    }
}

fn row(task: &TaskInfo) -> Row {
    vec![
        ("task", json!(task.task_id)),
        ("status", json!(word(task.status))),
        ("workspace", json!(task.workspace)),
        ("type", json!(task.task_type)),
        ("assigned_to", json!(task.assigned_to)),
        ("error", json!(task.error)),
    ]
}

/// A task, and the tree below it.
async fn show(args: One) -> Result<(), Fault> {
    let client = args.ask.whom.open().await?;
    let task = client.tasks().get(&args.id).await?;
    let below = TaskFilter {
        workspace: task.workspace.clone(),
        parent_task_id: args.id.clone(),
        include_descendants: true,
        ..TaskFilter::default()
    };
    let (mut below, _) = all(&client, below, usize::MAX).await?;
    client.close().await;
    below.sort_by(|a, b| a.task_id.cmp(&b.task_id));
    if args.ask.json {
        let children: Vec<Value> = below.iter().map(as_json).collect();
        let mut value = as_json(&task);
        value["descendants"] = children.into();
        say(value);
        return Ok(());
    }
    say(plain(&line(&task)));
    for (name, value) in details(&task) {
        say(plain(&format!("  {name}: {value}")));
    }
    branch(&below, &args.id, 1);
    Ok(())
}

fn branch(all: &[TaskInfo], parent: &str, depth: usize) {
    for child in all.iter().filter(|task| task.parent_task_id == parent) {
        say(format_args!("{}└ {}", "  ".repeat(depth), plain(&line(child))));
        branch(all, &child.task_id, depth + 1);
    }
}

/// Ends when the task does; an error if that was no success.
async fn watch(client: &Client, id: &str, json: bool) -> Result<(), Fault> {
    let mut events = client.tasks().replay(id, true).await?;
    let mut shown = Shown::new(json);
    loop {
        let Some(event) = events.next().await else {
            return Err(match &*client.state().borrow() {
                State::Ended { because, .. } => because.clone().into(),
                _ => Fault::Ended(
                    "the task cannot be followed any more, or more happened than could be shown".to_owned(),
                ),
            });
        };
        shown.tell(&event);
        // Whether that is the end is told by the task: one that failed may be tried again.
        if let Some(Event::StatusChanged(change)) = &event.event
            && event.task_id == id
        {
            let task = client.tasks().get(id).await?;
            // What is told of it comes behind; the end is told before this ends.
            if task.status == change.to_status
                && let Some(ended) = ended(&task)
            {
                return ended;
            }
        }
    }
}

fn ended(task: &TaskInfo) -> Option<Result<(), Fault>> {
    match TaskStatus::try_from(task.status).ok()? {
        TaskStatus::Completed => Some(Ok(())),
        TaskStatus::Failed if task.retry_at_unix_ms > 0 => None,
        status @ (TaskStatus::Failed | TaskStatus::Cancelled | TaskStatus::Rejected) => {
            Some(Err(Fault::Ended(format!("{}: {}", word(status as i32), task.error))))
        }
        _ => None,
    }
}

async fn change(
    args: Change,
    operate: impl AsyncFnOnce(&Tasks, &str, &str) -> trunkline_client::Result<TaskInfo>,
) -> Result<(), Fault> {
    let client = args.ask.whom.open().await?;
    args.ask.show(&operate(&client.tasks(), &args.id, &args.reason).await?);
    client.close().await;
    Ok(())
}

fn word(status: i32) -> String {
    let name = TaskStatus::try_from(status).map_or("?", |status| status.as_str_name());
    name.trim_start_matches("TASK_STATUS_").to_lowercase()
}

fn status_number(text: &str) -> Result<i32, Fault> {
    let status = TaskStatus::from_str_name(&format!("TASK_STATUS_{}", text.to_uppercase()));
    status.map(i32::from).ok_or_else(|| Fault::usage(format!("unknown status {text:?}")))
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
    Value::Object(whole(task).into_iter().map(|(name, value)| (name.to_owned(), value)).collect())
}

fn whole(task: &TaskInfo) -> Row {
    vec![
        ("task_id", json!(task.task_id)),
        ("type", json!(task.task_type)),
        ("status", json!(word(task.status))),
        ("workspace", json!(task.workspace)),
        ("assigned_to", json!(task.assigned_to)),
        ("target", json!(task.target_topic)),
        ("creator", json!(task.creator_actor_id)),
        ("parent_task_id", json!(task.parent_task_id)),
        ("root_task_id", json!(task.root_task_id)),
        ("correlation_id", json!(task.correlation_id)),
        ("context_id", json!(task.context_id)),
        ("priority", json!(task.priority)),
        ("class", json!(task.task_class)),
        ("created_at", json!(task.created_at)),
        ("started_at", json!(task.started_at)),
        ("completed_at", json!(task.completed_at)),
        ("attempt", json!(task.attempt)),
        ("max_attempts", json!(task.max_attempts)),
        ("error", json!(task.error)),
        ("depends_on", json!(task.depends_on)),
        ("metadata", json!(task.metadata)),
    ]
}

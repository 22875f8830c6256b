//! New tasks, and the agents that are started for them.

use std::{collections::BTreeMap, sync::Arc};

use trunkline_store::ledger::WriteTx;
use uuid::Uuid;

use super::{
    CompletionEvent, Mode, RetryPolicy, Spec, Task, Tasks, attend::TOKEN_MS, events, own_queue, pool_queue, sql,
    start_queue, state::State,
};
use crate::{
    caller::Caller,
    error::{Error, Kind},
    gate::{CreateTask, IssueToken, TouchTask},
    identity::{self, Identity, PrincipalKind, SEPARATOR, identifier},
    registry,
    token::{Secret, digest},
};

/// Priority of a task that names none. The published figure.
const NORMAL: i64 = 30;

/// How long the name of a task is remembered, in milliseconds. The published figure.
const KEY_MS: i64 = 24 * 3600 * 1000;

/// Bytes of each text, and of all metadata together.
const TEXT_BYTES_MAX: usize = 1024;
const METADATA_BYTES_MAX: usize = 64 * 1024;

/// Entries of a retry schedule.
const SCHEDULE_MAX: usize = 1000;

/// Metadata that means something to the server: a client that could set it would borrow somebody else's rights.
const RESERVED: [&str; 4] = ["authority_", "root_authority_grant_id", "parent_authority_grant_id", "_hibernation_"];

/// When an agent's start was asked for; from where it reads on when it comes.
const TRIGGER: &str = "trigger_timestamp_ms";

/// The kind of the tasks that start agents.
pub const STARTUP: &str = "agent_startup";

/// What a targeted task does while its target is away.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum OfflinePolicy {
    /// It waits, and an orchestrator is asked to start the target.
    #[default]
    Orchestrate,
    /// It waits.
    Queue,
    /// It is refused.
    Reject,
}

/// A task that somebody wants.
#[derive(Clone, Debug)]
pub struct Create {
    /// What kind of work it is.
    pub kind: String,
    /// Empty for the caller's own.
    pub workspace: String,
    /// Never [`Mode::Startup`].
    pub mode: Mode,
    /// Of a targeted task.
    pub target: String,
    /// Of a pool task.
    pub implementation: String,
    /// What its worker gets.
    pub payload: Vec<u8>,
    /// Whatever.
    pub metadata: BTreeMap<String, String>,
    /// Over those that the target's implementation is registered with.
    pub launch_overrides: BTreeMap<String, String>,
    /// The published number.
    pub class: i32,
    /// 0 for normal.
    pub priority: i64,
    /// See [`Task`].
    pub context: String,
    /// See [`Task`].
    pub correlation: String,
    /// See [`Task`].
    pub root: String,
    /// An id; empty for the task that the caller's session stands for.
    pub parent: String,
    /// See [`Spec`].
    pub retry: Option<RetryPolicy>,
    /// See [`Spec`].
    pub completion: Option<CompletionEvent>,
    /// A second task of this name, in the workspace and by the creator, is the first. Empty for none.
    pub key: String,
    /// Who shall be able to come in with a token for this task; empty for nobody.
    pub token_for: String,
    /// While the target is away.
    pub offline: OfflinePolicy,
}

/// What came of it.
#[derive(Debug)]
pub struct Created {
    /// Its id.
    pub id: Uuid,
    /// The published word for what happened; empty for a task that was there before.
    pub status: &'static str,
    /// Who has it.
    pub assigned_to: String,
    /// For whom the caller named.
    pub token: Option<Secret>,
}

/// An agent, or a unique task, that is to be started.
#[derive(Clone, Debug)]
pub(super) struct Start {
    pub(super) identity: Identity,
    pub(super) workspace: String,
    pub(super) creator: String,
    pub(super) subject: String,
    pub(super) overrides: BTreeMap<String, String>,
    pub(super) metadata: BTreeMap<String, String>,
    pub(super) priority: i64,
    pub(super) now: i64,
}

/// What a transaction that creates answers.
enum Outcome {
    New { task: Box<Task>, start: Option<Box<Task>>, due_at: Option<i64> },
    Known(Uuid),
}

impl Tasks {
    /// Makes a task. What one caller asks takes effect in the order in which this was called; the future that comes back waits
    /// for the disk, and need not be waited for. Whoever gets the task is told before that future is ready.
    ///
    /// # Errors
    /// In the published order and with its codes: `ERR_INVALID_IDENTIFIER`, `TASK_PAYLOAD_TOO_LARGE`,
    /// `ERR_INVALID_ARGUMENT`, `ERR_PERMISSION_DENIED`, `ERR_TASK_CREATE_FAILED`.
    pub async fn create(
        &self,
        caller: &Caller,
        home: Option<&str>,
        bound: Option<Uuid>,
        wanted: Create,
    ) -> Result<impl Future<Output = Result<Created, Error>> + Send + use<>, Error> {
        let workspace = if wanted.workspace.is_empty() { home.unwrap_or_default() } else { &wanted.workspace };
        let workspace = identity::workspace(workspace)?;
        if !wanted.implementation.is_empty() {
            identifier("target_implementation", &wanted.implementation)?;
        }
        self.check(&wanted)?;
        self.0.gate.authorize(caller, CreateTask(&workspace))?;
        let token = self.token_for(caller, &wanted);
        let mut task = self.new_task(caller, workspace, &wanted)?;
        let parent =
            if wanted.parent.is_empty() { bound.map(|id| id.to_string()) } else { Some(wanted.parent.clone()) };
        let place = match task.mode {
            Mode::Pool => self.place_for(&mut task),
            _ => None,
        };
        let spec = sql::json(&*task.spec)?;
        let plan = Plan {
            caller: caller.clone(),
            key: wanted.key,
            explicit_parent: !wanted.parent.is_empty(),
            parent,
            payload: wanted.payload,
            spec,
            token: token.as_ref().map(|(identity, secret)| (identity.clone(), digest(secret.reveal()))),
            offline: wanted.offline,
            overrides: wanted.launch_overrides,
            task,
        };
        let plan = Arc::new(plan);
        let (tasks, planned) = (self.clone(), plan.clone());
        let submitted = self.0.gate.submit_task(move |tx| {
            let (tasks, plan) = (tasks.clone(), planned.clone());
            Box::pin(async move { tasks.put(tx, &plan).await })
        });
        let submitted = match submitted.await {
            Ok(submitted) => submitted,
            Err(error) => {
                place.iter().for_each(|place| self.give_up(place));
                return Err(error);
            }
        };
        let tasks = self.clone();
        let done = self.spawn(async move {
            let outcome = submitted.ended().await;
            let status = tasks.created(outcome, place, &plan).await?;
            let token = token.filter(|_| !status.1.is_empty()).map(|(_, secret)| secret);
            Ok(Created { id: status.0, status: status.1, assigned_to: status.2, token })
        });
        let stopped = || Error::new(Kind::Unavailable, "ERR_UNAVAILABLE", "the server is stopping");
        Ok(async move { done.await.unwrap_or_else(|_| Err(stopped())) })
    }

    /// After the commit: whoever is concerned is told.
    async fn created(
        &self,
        outcome: Result<Outcome, Error>,
        place: Option<super::assign::Place>,
        plan: &Plan,
    ) -> Result<(Uuid, &'static str, String), Error> {
        let give_up = || place.iter().for_each(|place| self.give_up(place));
        let (task, start, due_at) = match outcome {
            Ok(Outcome::New { task, start, due_at }) => (task, start, due_at),
            Ok(Outcome::Known(id)) => {
                give_up();
                return Ok((id, "", String::new()));
            }
            Err(error) => {
                give_up();
                return Err(error);
            }
        };
        self.watch_at(due_at);
        let (id, assignee) = (task.id, task.assignee.clone());
        let status = match task.mode {
            Mode::Pool => "pending_pool",
            _ if !assignee.is_empty() => "assigned",
            _ if start.is_some() || task.mode == Mode::Startup => "orchestration_triggered",
            _ => "pending",
        };
        match &place {
            Some(place) => self.floor().workers.fill(place, id),
            None if !assignee.is_empty() => {
                let mut floor = self.floor();
                floor.workers.hold(&assignee, id);
                if !floor.workers.is_there(&assignee) {
                    // It left while its task was on the way to the disk.
                    self.gone(&task);
                }
            }
            None => {}
        }
        if task.state == State::Pending {
            self.floor().workers.note(&task.queue);
            self.serve_queue(&task.queue).await;
        } else if task.mode != Mode::SelfAssign {
            self.hand(*task, plan.payload.clone(), None);
        }
        if let Some(start) = start {
            self.floor().workers.note(&start.queue);
            self.serve_queue(&start.queue).await;
        }
        Ok((id, status, assignee))
    }

    /// Has an agent or a unique task started that somebody writes to, if it is away, its program is known, and nobody starts
    /// it already. Returns at once.
    pub fn wake_up(&self, name: &str, implementation: &str, by: &Caller) {
        if !self.0.registry.knows(implementation) {
            return;
        }
        {
            let mut floor = self.floor();
            if floor.workers.is_there(name) || !floor.starting.insert(name.to_owned()) {
                return;
            }
        }
        let Ok(identity) = Identity::parse(name) else { return };
        let start = self.start(&identity, String::new(), by.subject.id.clone());
        let (tasks, name) = (self.clone(), name.to_owned());
        self.spawn(async move {
            let begun = tasks.begin(start).await;
            if let Err(error) = &begun {
                tracing::warn!(%error, agent = name, "not started; the next message asks again");
            }
            if !matches!(begun, Ok(Some(_))) {
                tasks.floor().starting.remove(&name);
            }
        });
    }

    fn start(&self, identity: &Identity, creator: String, subject: String) -> Start {
        Start {
            identity: identity.clone(),
            workspace: identity.workspace().unwrap_or_default().to_owned(),
            creator,
            subject,
            overrides: BTreeMap::new(),
            metadata: BTreeMap::new(),
            priority: NORMAL,
            now: self.now(),
        }
    }

    /// Starts an agent on somebody's request; answers the task that stands for it.
    ///
    /// # Errors
    /// [`Kind::NotFound`] if its implementation is not registered, [`Kind::Precondition`] if it is there already.
    pub async fn launch(
        &self,
        caller: &Caller,
        identity: &Identity,
        overrides: BTreeMap<String, String>,
    ) -> Result<Uuid, Error> {
        if self.floor().workers.is_there(&identity.to_string()) {
            let message = format!("{identity} is connected already");
            return Err(Error::new(Kind::Precondition, "ERR_FAILED_PRECONDITION", message));
        }
        let start = self.start(identity, caller.identity.to_string(), caller.subject.id.clone());
        let begun = self.begin(Start { overrides, ..start }).await?;
        let unknown = || {
            let message = format!("agent not found: {}", identity.implementation().unwrap_or_default());
            Error::new(Kind::NotFound, "ERR_NOT_FOUND", message)
        };
        begun.ok_or_else(unknown)
    }

    /// Answers the task that stands for the start, if the implementation is known.
    async fn begin(&self, start: Start) -> Result<Option<Uuid>, Error> {
        let tasks = self.clone();
        let begun = self.spawn(async move {
            let times = tasks.0.times;
            let begun = tasks.write(move |tx| {
                let start = start.clone();
                Box::pin(async move { begin(tx, &start, &times).await })
            });
            match begun.await? {
                Begun::New(task, due_at) => {
                    tasks.watch_at(due_at);
                    tasks.floor().workers.note(&task.queue);
                    tasks.serve_queue(&task.queue).await;
                    Ok(Some(task.id))
                }
                Begun::Known(id) => Ok(Some(id)),
                Begun::Unknown => Ok(None),
            }
        });
        begun.await.unwrap_or_else(|_| Err(Error::new(Kind::Unavailable, "ERR_UNAVAILABLE", "the server is stopping")))
    }

    fn check(&self, wanted: &Create) -> Result<(), Error> {
        let most = self.0.options.payload_bytes_max;
        if wanted.payload.len() > most {
            let message = format!("task payload size {} exceeds maximum {most} bytes", wanted.payload.len());
            return Err(Error::new(Kind::Invalid, "TASK_PAYLOAD_TOO_LARGE", message));
        }
        let texts = [&wanted.kind, &wanted.target, &wanted.context, &wanted.correlation, &wanted.root, &wanted.key];
        if let Some(text) = texts.into_iter().find(|text| text.len() > TEXT_BYTES_MAX || text.contains('\0')) {
            let message =
                format!("a text of a task may have {TEXT_BYTES_MAX} bytes without NUL; one has {}", text.len());
            return Err(invalid(message));
        }
        for map in [&wanted.metadata, &wanted.launch_overrides] {
            let size: usize = map.iter().map(|(key, value)| key.len() + value.len()).sum();
            if size > METADATA_BYTES_MAX || map.iter().any(|(key, value)| key.contains('\0') || value.contains('\0')) {
                return Err(invalid(format!(
                    "metadata may have {METADATA_BYTES_MAX} bytes without NUL; it has {size}"
                )));
            }
        }
        let is_reserved = |key: &&String| {
            RESERVED.iter().any(|reserved| key.starts_with(reserved)) || *key == TRIGGER && wanted.kind != STARTUP
        };
        if let Some(key) = wanted.metadata.keys().find(is_reserved) {
            return Err(invalid(format!("metadata {key:?} is the server's to set")));
        }
        if wanted.retry.as_ref().is_some_and(|retry| retry.schedule_ms.len() > SCHEDULE_MAX) {
            return Err(invalid(format!("a retry schedule may have {SCHEDULE_MAX} entries")));
        }
        Ok(())
    }

    /// A token, if one was asked for and may be given.
    fn token_for(&self, caller: &Caller, wanted: &Create) -> Option<(String, Secret)> {
        if wanted.token_for.is_empty() {
            return None;
        }
        let identity = Identity::parse(&wanted.token_for).ok()?;
        let allowed = self.0.gate.authorize(caller, IssueToken(&identity));
        tracing::info!(by = %caller.identity, target = %identity, issued = allowed.is_ok(), "token for a task");
        allowed.ok()?;
        Some((identity.to_string(), Secret::random().ok()?))
    }

    fn new_task(&self, caller: &Caller, workspace: String, wanted: &Create) -> Result<Task, Error> {
        let now = self.now();
        let creator = caller.identity.to_string();
        let (mut target, mut implementation) = (String::new(), String::new());
        let queue = match wanted.mode {
            Mode::SelfAssign => own_queue(&creator),
            Mode::Pool => {
                if wanted.implementation.is_empty() {
                    return Err(failed("target_implementation is required"));
                }
                implementation.clone_from(&wanted.implementation);
                pool_queue(&workspace, &implementation)
            }
            Mode::Targeted | Mode::Startup => {
                if wanted.target.is_empty() {
                    return Err(failed("target_agent_id is required"));
                }
                let identity = Identity::parse(&wanted.target).map_err(|error| failed(&error.message))?;
                let found = identity.implementation();
                found.ok_or_else(|| failed("the target has no implementation"))?.clone_into(&mut implementation);
                target = identity.to_string();
                own_queue(&target)
            }
        };
        let is_own = wanted.mode == Mode::SelfAssign;
        let spec = Spec {
            metadata: wanted.metadata.clone(),
            launch_params: BTreeMap::new(),
            retry: wanted.retry.clone(),
            completion: wanted.completion.clone(),
        };
        Ok(Task {
            workspace,
            kind: wanted.kind.clone(),
            mode: wanted.mode,
            class: wanted.class,
            priority: if wanted.priority == 0 { NORMAL } else { wanted.priority },
            state: if is_own { State::Assigned } else { State::Pending },
            root: wanted.root.clone(),
            correlation: wanted.correlation.clone(),
            context: wanted.context.clone(),
            target,
            implementation,
            queue,
            assignee: if is_own { creator.clone() } else { String::new() },
            assigned_at: is_own.then_some(now),
            grace_ms: self.0.options.grace_ms(wanted.class),
            subject: if caller.identity.kind() == PrincipalKind::User {
                caller.subject.id.clone()
            } else {
                String::new()
            },
            creator,
            spec: Arc::new(spec),
            ..Task::blank(now, wanted.mode)
        })
    }

    /// A place with a worker, if nothing else waits for one: then the task is the worker's from the start.
    fn place_for(&self, task: &mut Task) -> Option<super::assign::Place> {
        let mut floor = self.floor();
        if floor.workers.is_waiting(&task.queue) {
            return None;
        }
        let place = floor.workers.reserve(&task.queue)?;
        task.state = State::Assigned;
        task.assignee.clone_from(&place.identity);
        task.assigned_at = Some(task.created_at);
        Some(place)
    }

    async fn put(&self, tx: &mut WriteTx, plan: &Plan) -> Result<Outcome, Error> {
        let mut task = plan.task.clone();
        if !plan.key.is_empty()
            && let Some(id) = sql::key(tx.as_read(), &task.workspace, &task.creator, &plan.key, task.created_at).await?
        {
            return Ok(Outcome::Known(id));
        }
        self.inherit(tx, plan, &mut task).await?;
        let mut start = None;
        if task.mode == Mode::Targeted
            && let Some(only) = self.target(tx, plan, &mut task, &mut start).await?
        {
            return Ok(only);
        }
        let due_at = super::decide::due(&task, &self.0.times);
        task.has_token = plan.token.is_some();
        sql::insert(tx, &task, &plan.spec, &plan.payload, None, due_at).await?;
        if !plan.key.is_empty() {
            sql::put_key(tx, &task, &plan.key, task.created_at.saturating_add(KEY_MS)).await?;
        }
        if let Some((identity, hash)) = &plan.token {
            sql::put_token(tx, hash, &task, identity, task.created_at.saturating_add(TOKEN_MS)).await?;
        }
        events::tell(tx, None, &task).await?;
        Ok(Outcome::New { task: Box::new(task), start, due_at })
    }

    /// What a child has of its parent.
    async fn inherit(&self, tx: &mut WriteTx, plan: &Plan, task: &mut Task) -> Result<(), Error> {
        let Some(parent) = &plan.parent else { return Ok(()) };
        let found = match super::decide::id(parent) {
            Some(id) => sql::get(tx.as_read(), id).await?,
            None => None,
        };
        let found = found
            .filter(|found| !plan.explicit_parent || self.0.gate.authorize(&plan.caller, TouchTask(found)).is_ok());
        let Some(found) = found else {
            return if plan.explicit_parent { Err(failed("parent task not found")) } else { Ok(()) };
        };
        task.parent = Some(found.id);
        if task.root.is_empty() {
            task.root = found.root_id();
        }
        if task.correlation.is_empty() {
            task.correlation.clone_from(&found.correlation);
        }
        if task.context.is_empty() {
            task.context.clone_from(&found.context);
        }
        Ok(())
    }

    /// Whether the target is there, and if not, what its task does meanwhile. Answers, if there is nothing else to do.
    async fn target(
        &self,
        tx: &mut WriteTx,
        plan: &Plan,
        task: &mut Task,
        start: &mut Option<Box<Task>>,
    ) -> Result<Option<Outcome>, Error> {
        if registry::params(tx.as_read(), &task.implementation).await?.is_none() {
            return Err(failed(&format!("implementation {} is not registered", task.implementation)));
        }
        let is_start = task.kind == STARTUP;
        if self.floor().workers.is_there(&task.target) && !is_start {
            task.assignee.clone_from(&task.target);
            task.assigned_at = Some(task.created_at);
            task.state = State::Assigned;
            return Ok(None);
        }
        match plan.offline {
            OfflinePolicy::Reject => return Err(failed(&format!("{} is not connected", task.target))),
            OfflinePolicy::Queue if !is_start => return Ok(None),
            OfflinePolicy::Queue | OfflinePolicy::Orchestrate => {}
        }
        let identity = Identity::parse(&task.target)?;
        let wanted = Start {
            workspace: identity.workspace().unwrap_or(&task.workspace).to_owned(),
            identity,
            creator: task.creator.clone(),
            subject: plan.caller.subject.id.clone(),
            overrides: plan.overrides.clone(),
            metadata: task.spec.metadata.iter().filter(|(key, _)| *key == TRIGGER).map(owned).collect(),
            priority: task.priority,
            now: task.created_at,
        };
        match begin(tx, &wanted, &self.0.times).await? {
            Begun::New(begun, due_at) if is_start => Ok(Some(Outcome::New { task: begun, start: None, due_at })),
            Begun::Known(id) if is_start => Ok(Some(Outcome::Known(id))),
            Begun::New(begun, _) => {
                *start = Some(begun);
                Ok(None)
            }
            Begun::Known(id) => {
                *start = sql::get(tx.as_read(), id).await?.map(Box::new);
                Ok(None)
            }
            Begun::Unknown => Err(failed(&format!("implementation {} has no profile", task.implementation))),
        }
    }
}

/// What the transaction of a new task needs.
struct Plan {
    caller: Caller,
    task: Task,
    spec: String,
    payload: Vec<u8>,
    key: String,
    parent: Option<String>,
    /// The caller named it, so it has to be there.
    explicit_parent: bool,
    /// For whom, and the digest.
    token: Option<(String, String)>,
    offline: OfflinePolicy,
    overrides: BTreeMap<String, String>,
}

enum Begun {
    New(Box<Task>, Option<i64>),
    Known(Uuid),
    /// Nobody knows how.
    Unknown,
}

/// Puts the task of an agent's start, if there is none and its implementation is registered with a profile.
async fn begin(tx: &mut WriteTx, start: &Start, times: &super::Times) -> Result<Begun, Error> {
    let identity = start.identity.to_string();
    if let Some(known) = sql::start_of(tx.as_read(), &identity).await? {
        return Ok(Begun::Known(known.id));
    }
    let implementation = start.identity.implementation().unwrap_or_default();
    let Some(mut params) = registry::params(tx.as_read(), implementation).await? else { return Ok(Begun::Unknown) };
    params.extend(start.overrides.iter().map(owned));
    let Some(profile) = params.get("profile").filter(|profile| !profile.is_empty()) else { return Ok(Begun::Unknown) };
    let queue = start_queue(profile);
    let mut metadata = start.metadata.clone();
    metadata.entry(TRIGGER.to_owned()).or_insert_with(|| start.now.to_string());
    let task = Task {
        workspace: start.workspace.clone(),
        kind: STARTUP.to_owned(),
        mode: Mode::Startup,
        priority: start.priority,
        creator: start.creator.clone(),
        target: identity.clone(),
        implementation: implementation.to_owned(),
        subject: start.subject.clone(),
        queue,
        grace_ms: 30_000,
        spec: Arc::new(Spec { metadata, launch_params: params, ..Spec::default() }),
        ..Task::blank(start.now, Mode::Startup)
    };
    let due_at = super::decide::due(&task, times);
    let spec = sql::json(&*task.spec)?;
    if !sql::insert(tx, &task, &spec, &[], Some(&identity), due_at).await? {
        // Only a race on a shared ledger comes here; the other one's start is as good.
        return Ok(sql::start_of(tx.as_read(), &identity).await?.map_or(Begun::Unknown, |task| Begun::Known(task.id)));
    }
    events::tell(tx, None, &task).await?;
    Ok(Begun::New(Box::new(task), due_at))
}

impl Task {
    /// A task of which nothing is known but that it is made now.
    pub(super) fn blank(now: i64, mode: Mode) -> Self {
        Self {
            id: Uuid::now_v7(),
            workspace: String::new(),
            kind: String::new(),
            mode,
            class: 0,
            priority: NORMAL,
            state: State::Pending,
            creator: String::new(),
            parent: None,
            root: String::new(),
            correlation: String::new(),
            context: String::new(),
            target: String::new(),
            implementation: String::new(),
            subject: String::new(),
            queue: String::new(),
            assignee: String::new(),
            launcher: String::new(),
            avoid: String::new(),
            ended_by: String::new(),
            created_at: now,
            updated_at: now,
            queued_at: now,
            assigned_at: None,
            started_at: None,
            ended_at: None,
            paused_at: None,
            disconnected_at: None,
            retry_at: None,
            failures: 0,
            launches: 0,
            grace_ms: 0,
            error: String::new(),
            wait: None,
            hibernation: None,
            has_token: false,
            version: 0,
            spec: Arc::default(),
        }
    }
}

fn owned((key, value): (&String, &String)) -> (String, String) {
    (key.clone(), value.clone())
}

fn invalid(message: String) -> Error {
    Error::new(Kind::Invalid, "ERR_INVALID_ARGUMENT", message)
}

fn failed(why: &str) -> Error {
    Error::new(Kind::Precondition, "ERR_TASK_CREATE_FAILED", format!("failed to create task: {why}"))
}

impl Identity {
    /// What program it is; users and the singletons are none.
    #[must_use]
    pub fn implementation(&self) -> Option<&str> {
        match self {
            Self::Agent(named) | Self::UniqueTask(named) | Self::Task(named) => Some(&named.implementation),
            Self::Orchestrator(unplaced) | Self::Bridge(unplaced) | Self::Service(unplaced) => {
                Some(&unplaced.implementation)
            }
            Self::User { .. } | Self::WorkflowEngine | Self::MetricsBridge => None,
        }
    }

    /// Which one of its program.
    #[must_use]
    pub fn specifier(&self) -> &str {
        let text = match self {
            Self::Agent(named) | Self::UniqueTask(named) | Self::Task(named) => &named.specifier,
            Self::Orchestrator(unplaced) | Self::Bridge(unplaced) | Self::Service(unplaced) => &unplaced.specifier,
            Self::User { window, .. } => window,
            Self::WorkflowEngine | Self::MetricsBridge => "shard0",
        };
        debug_assert!(!text.contains(SEPARATOR), "parts of names were checked");
        text
    }
}

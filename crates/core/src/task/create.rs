//! New tasks, and the agents that are started for them.

use std::{collections::BTreeMap, sync::Arc};

use trunkline_store::ledger::WriteTx;
use uuid::Uuid;

use super::{
    CompletionEvent, Mode, NORMAL, RetryPolicy, Spec, Task, TaskLimits, Tasks,
    assign::Place,
    attend::TOKEN_MS,
    decide, events, own_queue, pool_queue, sql,
    start::{Begun, STARTUP, TRIGGER, begin, subject},
    state::State,
};
use crate::{
    caller::Caller,
    error::{Error, Kind},
    gate::{CreateTask, IssueToken, TouchTask},
    identity::{self, Identity, identifier},
    registry,
    token::{Secret, digest},
};

/// How long the name of a task is remembered, in milliseconds. The published figure.
const KEY_MS: i64 = 24 * 3600 * 1000;

/// Bytes of each text, and of all metadata together.
const TEXT_BYTES_MAX: usize = 1024;
const METADATA_BYTES_MAX: usize = 64 * 1024;

/// Entries of a retry schedule.
const SCHEDULE_MAX: usize = 1000;

/// Statuses that a completion event names; there are ten.
const STATUSES_MAX: usize = 32;

/// Metadata that means something to the server: a client that could set it would borrow somebody else's rights.
const RESERVED: [&str; 4] = ["authority_", "root_authority_grant_id", "parent_authority_grant_id", "_hibernation_"];

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
    /// Over what its class allows: 0 is that, less than 0 no limit.
    pub limits: TaskLimits,
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

/// What a transaction that creates answers.
enum Outcome {
    New { task: Box<Task>, start: Option<Box<Task>> },
    Known(Uuid),
}

impl Tasks {
    /// Makes a task. What one caller asks takes effect in the order in which this was called; the future that comes back waits
    /// for the disk, and need not be waited for. Whoever gets the task is told before that future is ready.
    ///
    /// # Errors
    /// In the published order and with its codes: `ERR_INVALID_IDENTIFIER`, `TASK_PAYLOAD_TOO_LARGE`,
    /// `ERR_INVALID_ARGUMENT`, `ERR_PERMISSION_DENIED`, `ERR_QUOTA_001`, `ERR_TASK_CREATE_FAILED`.
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
        // What is no identity is refused with what else is wrong with the task.
        let target = Identity::parse(&wanted.target).ok().filter(|_| wanted.mode == Mode::Targeted);
        let create = CreateTask {
            workspace: &workspace,
            target: target.as_ref(),
            is_launch: wanted.kind == STARTUP,
            overrides: &wanted.launch_overrides,
            home,
            has_completion_event: wanted.completion.is_some(),
        };
        self.0.gate.authorize(caller, create)?;
        self.check_room(caller, &workspace, &wanted.key).await?;
        let token = self.token_for(caller, &wanted);
        let mut task = self.new_task(caller, workspace, &wanted)?;
        let parent =
            if wanted.parent.is_empty() { bound.map(|id| id.to_string()) } else { Some(wanted.parent.clone()) };
        let spec = sql::json(&*task.spec)?;
        let place = match task.mode {
            Mode::Pool => self.place_for(&mut task),
            _ => None,
        };
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
        Ok(async move { done.await.unwrap_or_else(|ended| Err(Error::of_task(&ended))) })
    }

    /// Whether the workspace may have another task, or the caller has made this one already, by its name.
    async fn check_room(&self, caller: &Caller, workspace: &str, key: &str) -> Result<(), Error> {
        let room = self.floor().open.check(workspace, self.0.options.open_per_workspace);
        if room.is_ok() || key.is_empty() {
            return room;
        }
        let (workspace, creator, key, now) =
            (workspace.to_owned(), caller.identity.to_string(), key.to_owned(), self.now());
        let known = self.read(move |tx| {
            let (workspace, creator, key) = (workspace.clone(), creator.clone(), key.clone());
            Box::pin(async move { Ok(sql::key(tx, &workspace, &creator, &key, now).await?) })
        });
        if known.await?.is_some() { Ok(()) } else { room }
    }

    /// After the commit: whoever is concerned is told.
    async fn created(
        &self,
        outcome: Result<Outcome, Error>,
        place: Option<Place>,
        plan: &Plan,
    ) -> Result<(Uuid, &'static str, String), Error> {
        let give_up = || place.iter().for_each(|place| self.give_up(place));
        let (task, start) = match outcome {
            Ok(Outcome::New { task, start }) => (task, start),
            Ok(Outcome::Known(id)) => {
                give_up();
                return Ok((id, "", String::new()));
            }
            Err(error) => {
                give_up();
                return Err(error);
            }
        };
        let (id, assignee) = (task.id, task.assignee.clone());
        let status = match task.mode {
            Mode::Pool => "pending_pool",
            _ if !assignee.is_empty() => "assigned",
            _ if start.is_some() || task.mode == Mode::Startup => "orchestration_triggered",
            _ => "pending",
        };
        self.floor().open.note(None, &task);
        match &place {
            Some(place) => self.floor().workers.fill(place, id),
            None if !assignee.is_empty() => self.floor().workers.hold(&assignee, id),
            None => {}
        }
        if task.state == State::Pending {
            self.offer(&task).await;
        } else if task.mode != Mode::SelfAssign {
            self.hand(*task, plan.payload.clone(), None);
        } else if !self.floor().workers.is_there(&assignee) {
            // It left while its task was on the way to the disk.
            self.gone(&task);
        }
        if let Some(start) = start {
            self.offer(&start).await;
        }
        Ok((id, status, assignee))
    }

    fn check(&self, wanted: &Create) -> Result<(), Error> {
        let most = self.0.options.payload_bytes_max;
        if wanted.payload.len() > most {
            let message = format!("task payload size {} exceeds maximum {most} bytes", wanted.payload.len());
            return Err(Error::new(Kind::Invalid, "TASK_PAYLOAD_TOO_LARGE", message));
        }
        let texts = [&wanted.kind, &wanted.target, &wanted.context, &wanted.correlation, &wanted.root, &wanted.key];
        let name = wanted.completion.as_ref().map(|completion| &completion.name);
        if let Some(text) =
            texts.into_iter().chain(name).find(|text| text.len() > TEXT_BYTES_MAX || text.contains('\0'))
        {
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
        let statuses = wanted.completion.as_ref().map_or(0, |completion| completion.on_statuses.len());
        if statuses > STATUSES_MAX {
            return Err(invalid(format!("a completion event may name {STATUSES_MAX} statuses")));
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
        Some((identity.to_string(), Secret::task_token().ok()?))
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
            limits: self.0.options.limits(wanted.class).or(wanted.limits),
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
            attempt: i64::from(is_own),
            grace_ms: self.0.options.grace_ms(wanted.class),
            subject: subject(caller),
            creator,
            spec: Arc::new(spec),
            ..Task::blank(now, wanted.mode)
        })
    }

    /// A place with a worker, if nothing else waits for one: then the task is the worker's from the start.
    fn place_for(&self, task: &mut Task) -> Option<Place> {
        let mut floor = self.floor();
        if floor.workers.is_waiting(&task.queue) {
            return None;
        }
        let place = floor.workers.reserve(&task.queue)?;
        task.state = State::Assigned;
        task.taken_by(&place.identity, task.created_at);
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
        let due_at = decide::due(&task, &self.0.times);
        task.has_token = plan.token.is_some();
        sql::insert(tx, &task, &plan.spec, &plan.payload, None, due_at).await?;
        if !plan.key.is_empty() {
            sql::put_key(tx, &task, &plan.key, task.created_at.saturating_add(KEY_MS)).await?;
        }
        if let Some((identity, hash)) = &plan.token {
            sql::put_token(tx, hash, &task, identity, task.created_at.saturating_add(TOKEN_MS)).await?;
        }
        events::tell(tx, None, &task).await?;
        Ok(Outcome::New { task: Box::new(task), start })
    }

    /// What a child has of its parent.
    async fn inherit(&self, tx: &mut WriteTx, plan: &Plan, task: &mut Task) -> Result<(), Error> {
        let Some(parent) = &plan.parent else { return Ok(()) };
        let found = match decide::id(parent) {
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
            task.taken_by(&task.target.clone(), task.created_at);
            task.state = State::Assigned;
            return Ok(None);
        }
        match plan.offline {
            OfflinePolicy::Reject => return Err(failed(&format!("{} is not connected", task.target))),
            OfflinePolicy::Queue if !is_start => return Ok(None),
            OfflinePolicy::Queue | OfflinePolicy::Orchestrate => {}
        }
        let identity = Identity::parse(&task.target)?;
        let mut wanted = self.start(&identity, task.creator.clone(), &plan.caller);
        wanted.overrides.clone_from(&plan.overrides);
        wanted.metadata = task.spec.metadata.iter().filter(|(key, _)| *key == TRIGGER).map(owned).collect();
        wanted.priority = task.priority;
        match begin(tx, &wanted, &self.0.times).await? {
            Begun::New(begun) if is_start => Ok(Some(Outcome::New { task: begun, start: None })),
            Begun::Known(id) if is_start => Ok(Some(Outcome::Known(id))),
            Begun::New(begun) => {
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

fn owned((key, value): (&String, &String)) -> (String, String) {
    (key.clone(), value.clone())
}

fn invalid(message: String) -> Error {
    Error::new(Kind::Invalid, "ERR_INVALID_ARGUMENT", message)
}

fn failed(why: &str) -> Error {
    Error::new(Kind::Precondition, "ERR_TASK_CREATE_FAILED", format!("failed to create task: {why}"))
}

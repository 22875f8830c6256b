//! What parties ask of a task, and what follows from every change.

use tokio::task::JoinHandle;
use trunkline_store::ledger::{ReadTx, TxFuture, WriteTx};
use uuid::Uuid;

use super::{
    Hibernation, Mode, Task, Tasks, Times, Wait, WaitReason,
    attend::Floor,
    decide::{self, Context, Request},
    events,
    mailbox::{Mail, lock},
    sql,
    state::State,
};
use crate::{
    caller::Caller,
    checkpoint,
    error::{Error, Kind},
    gate::TouchTask,
    token::{Secret, digest},
};

/// Tasks that one may wait for.
const DEPENDENCIES_MAX: usize = 1000;

/// Tasks that may wait for one: when it ends, all of them are looked at in its transaction.
const WAITERS_MAX: i64 = 1000;

/// Tasks that one may wait for together with what those wait for: they are looked at to find a circle, in one statement of some
/// milliseconds.
const CIRCLE_MAX: i64 = 2000;

/// Longest reason, in bytes.
const REASON_BYTES_MAX: usize = 4096;

/// Most that is kept of what a task waits for, in bytes of text.
const WAIT_BYTES_MAX: usize = 64 * 1024;

/// What a party asks.
#[derive(Clone, Debug, PartialEq)]
pub enum Operation {
    /// It begins.
    Claim,
    /// It is done.
    Complete,
    /// It failed; empty for no reason.
    Fail(String),
    /// It is called off; the reason, if there is one, is kept.
    Cancel(String),
    /// Once more.
    Retry,
    /// It is declined; empty for no reason.
    Reject(String),
    /// It waits, if it is said for what.
    Pause(Option<Wait>),
    /// It waits for other tasks.
    WaitFor(Option<Wait>),
    /// It goes on.
    Resume,
}

/// A task before a change and after it.
#[derive(Clone, Debug)]
pub(super) struct Changed {
    pub(super) before: Task,
    pub(super) after: Task,
    /// When it is due now.
    pub(super) due_at: Option<i64>,
    /// Others have to be looked at, because they waited for it.
    pub(super) nudged: bool,
}

/// Decides, writes, and tells whom it concerns: all in the transaction.
pub(super) async fn step(
    tx: &mut WriteTx,
    task: &Task,
    request: &Request,
    context: Context,
    times: &Times,
) -> Result<Changed, Error> {
    let decided = decide::apply(task, request, context)?;
    let mut changed = Changed { before: task.clone(), after: decided.task, due_at: None, nudged: false };
    if decided.is_repeat {
        return Ok(changed);
    }
    let (before, after) = (&changed.before, &mut changed.after);
    let waits = after.state == State::WaitingDependency;
    // If what it waits for has ended already, it goes on at once, the way in which it does later.
    let is_over = waits && context.dependencies_ended;
    changed.due_at = if is_over { Some(context.now) } else { decide::due(after, times) };
    if before.disconnected_at.is_some() && is_lost(before, after) {
        sql::put_loss(tx, &before.assignee, &events::lost_event(before, after)).await?;
    }
    if !sql::update(tx, after, changed.due_at).await? {
        return Err(Error::new(Kind::Unavailable, "ERR_CONFLICT", format!("task {} was changed meanwhile", after.id)));
    }
    after.version += 1;
    if waits || before.state == State::WaitingDependency {
        let on = after.wait.as_ref().filter(|_| waits).map_or(&[][..], |wait| &wait.depends_on);
        sql::wait_for(tx, after.id, on).await?;
    }
    if after.mode == Mode::Startup {
        starts(tx, before, after).await?;
    }
    if after.state.is_terminal() && !before.state.is_terminal() {
        if after.has_token || after.mode == Mode::Startup {
            sql::revoke_tokens(tx, after.id).await?;
        }
        changed.nudged = sql::nudge_waiters(tx, after.id, context.now).await? > 0;
    }
    events::tell(tx, Some(before.state), after).await?;
    Ok(changed)
}

/// Whether somebody does not have a task any more, without having said so.
fn is_lost(before: &Task, after: &Task) -> bool {
    let has = |task: &Task| task.state.is_held() && task.assignee == before.assignee;
    let has_come = after.state.is_held() && before.mode == Mode::Startup;
    !before.assignee.is_empty()
        && has(before)
        && !has(after)
        && !has_come
        && after.ended_by != before.assignee
        && !after.state.is_waiting()
}

/// One agent is started once at a time.
async fn starts(tx: &mut WriteTx, before: &Task, after: &Task) -> Result<(), Error> {
    match (before.state.is_terminal(), after.state.is_terminal()) {
        (false, true) => Ok(sql::end_start(tx, after.id).await?),
        (true, false) if !sql::begin_start(tx, after.id, &after.target).await? => {
            let message = format!("startup task already exists for {}", after.target);
            Err(Error::new(Kind::Precondition, "ERR_TASK_STATE", message))
        }
        _ => Ok(()),
    }
}

/// One who says what became of an attempt that is over says nothing of the one that is under way.
fn check_attempt(task: &Task, attempt: i64) -> Result<(), Error> {
    if attempt == 0 || attempt == task.attempt && task.state != State::Pending {
        return Ok(());
    }
    let message = format!("attempt {attempt} of task {} is over: the last one is {}", task.id, task.attempt);
    Err(Error::new(Kind::Precondition, "ERR_TASK_ATTEMPT", message))
}

/// The answer to everybody who may not know of a task.
pub(super) fn missing() -> Error {
    Error::new(Kind::NotFound, "ERR_NOT_FOUND", "task not found")
}

impl Tasks {
    /// Does what a party asks, if `attempt` is the one that is under way, or 0. What one caller asks takes effect in the order in
    /// which this was called; the future that comes back waits for the disk, and need not be waited for.
    ///
    /// # Errors
    /// [`Kind::NotFound`] if there is none or the caller may not know of it, [`Kind::Invalid`] and [`Kind::Precondition`]
    /// with the published texts, [`Kind::Unavailable`].
    pub async fn operate(
        &self,
        caller: &Caller,
        id: &str,
        operation: Operation,
        attempt: i64,
    ) -> Result<impl Future<Output = Result<Task, Error>> + Send + use<>, Error> {
        let request = request(caller, operation)?;
        let id = decide::id(id).ok_or_else(missing)?;
        let worker_is_there = request != Request::Resume || self.assignee_is_there(id).await?;
        let (caller, gate, times, context) =
            (caller.clone(), self.0.gate.clone(), self.0.times, self.context(worker_is_there));
        let submitted = self.0.gate.submit_task(move |tx| {
            let (caller, gate, request) = (caller.clone(), gate.clone(), request.clone());
            Box::pin(async move {
                let task = sql::get(tx.as_read(), id).await?.ok_or_else(missing)?;
                gate.authorize(&caller, TouchTask(&task)).map_err(|_| missing())?;
                check_attempt(&task, attempt)?;
                let (request, dependencies_ended) = checked(tx, &task, request).await?;
                let context = Context { dependencies_ended, ..context };
                step(tx, &task, &request, context, &times).await
            })
        });
        let (submitted, tasks) = (submitted.await?, self.clone());
        let done = self.spawn(async move {
            let changed = submitted.ended().await?;
            let after = changed.after.clone();
            tasks.settle(changed).await;
            Ok(after)
        });
        Ok(async move { done.await.unwrap_or_else(|ended| Err(Error::of_task(&ended))) })
    }

    /// The worker of a task said how it goes on: that is noted where it matters.
    pub(crate) async fn reported(&self, caller: &Caller, task: &Task) -> Result<(), Error> {
        let by = caller.identity.to_string();
        if task.assignee != by || !decide::notes_report(task, self.now()) {
            return Ok(());
        }
        let (id, times, context) = (task.id, self.0.times, self.context(true));
        let noted = self.write(move |tx| {
            let by = by.clone();
            Box::pin(async move {
                let task = sql::get(tx.as_read(), id).await?.filter(|task| task.state.is_held() && task.assignee == by);
                let Some(task) = task else { return Ok(None) };
                step(tx, &task, &Request::Report, context, &times).await.map(Some)
            })
        });
        if let Some(changed) = noted.await? {
            self.watch_at(changed.due_at);
        }
        Ok(())
    }

    /// Only what waits is looked at by whether its worker is there.
    async fn assignee_is_there(&self, id: Uuid) -> Result<bool, Error> {
        let assignee = self.0.gate.glance(move |tx| Box::pin(sql::assignee_of_waiting(tx, id))).await?;
        Ok(assignee.is_none_or(|assignee| self.floor().workers.is_there(&assignee)))
    }

    /// What follows from a change, once it is on disk.
    pub(super) async fn settle(&self, changed: Changed) {
        self.note_inputs(&changed);
        let Changed { before, after, nudged, .. } = &changed;
        self.watch_at(changed.due_at);
        if *nudged {
            self.watch_at(Some(0));
        }
        let was_held = before.state.is_held() && !before.assignee.is_empty();
        let is_held = after.state.is_held() && !after.assignee.is_empty();
        let (mut freed, mut is_gone) = (None, false);
        {
            let mut floor = self.floor();
            floor.open.note(Some(before), after);
            if was_held && !(is_held && after.assignee == before.assignee) {
                floor.release(&before.assignee, before.id);
                freed = Some(before.assignee.clone());
            }
            if is_held && !(was_held && after.assignee == before.assignee) {
                floor.workers.hold(&after.assignee, after.id);
            }
            is_gone |= is_held && after.disconnected_at.is_none() && !floor.workers.is_there(&after.assignee);
            if after.state == State::Pending && !after.queue.is_empty() {
                floor.workers.note(&after.queue);
            }
            if after.mode == Mode::Startup && after.state.is_terminal() {
                floor.starting.remove(&after.target);
            }
            Self::signal(&floor, before, after);
        }
        if is_gone {
            self.gone(after);
        }
        if after.state == State::Pending && !after.queue.is_empty() {
            self.serve_queue(&after.queue).await;
        }
        if let Some(freed) = freed {
            self.serve_worker(&freed).await;
        }
    }

    /// A worker whose task somebody else ended, or that goes on with it, or may leave it, is told.
    fn signal(floor: &Floor, before: &Task, after: &Task) {
        let Some(mailbox) = floor.mailboxes.get(&before.assignee) else { return };
        if after.state == State::Hibernated && before.state != State::Hibernated {
            let hibernation = after.wait.as_ref().and_then(|wait| wait.hibernation.clone()).unwrap_or_default();
            mailbox.tell(Mail::Hibernated(after.id, Box::new(hibernation)));
        }
        let is_ended = after.state.is_terminal() && after.ended_by != before.assignee;
        let goes_on = before.state.is_waiting() && after.state == State::Running;
        if is_lost(before, after) {
            mailbox.tell(Mail::Event(Box::new(events::lost_event(before, after))));
        } else if before.state != after.state && (is_ended || goes_on) {
            mailbox.tell(Mail::Event(Box::new(events::status_event(before, after))));
        }
    }

    /// Another token for the agent that is to be started. Those before it stay good: the agent may be on its way with one.
    pub(super) async fn new_token(&self, task: &Task) -> Result<Secret, Error> {
        let secret = Secret::task_token()?;
        let (hash, task, until) =
            (digest(secret.reveal()), task.clone(), self.now().saturating_add(super::attend::TOKEN_MS));
        let put = self.write(move |tx| {
            let (hash, task) = (hash.clone(), task.clone());
            Box::pin(async move { Ok(sql::put_token(tx, &hash, &task, &task.target, until).await?) })
        });
        put.await.map(|()| secret)
    }

    pub(super) fn context(&self, worker_is_there: bool) -> Context {
        let mut bytes = [0; 4];
        // Without randomness there is no jitter, which harms nobody.
        let _ = getrandom::fill(&mut bytes);
        let roll = f64::from(i32::from_be_bytes(bytes)) / f64::from(i32::MAX);
        Context { now: self.now(), roll: roll.clamp(-1.0, 1.0), worker_is_there, dependencies_ended: false }
    }

    pub(super) fn floor(&self) -> std::sync::MutexGuard<'_, Floor> {
        lock(&self.0.floor)
    }

    pub(super) fn spawn<T: Send + 'static>(&self, work: impl Future<Output = T> + Send + 'static) -> JoinHandle<T> {
        self.0.tracker.spawn(work)
    }

    /// Something that nobody waits for: if it panics, tasks wait that nobody looks at any more, which is a fault of the program.
    pub(super) fn spawn_job(&self, work: impl Future<Output = ()> + Send + 'static) -> JoinHandle<()> {
        let on_panic = self.0.gate.guard("work on tasks");
        self.spawn(async move {
            let _on_panic = on_panic;
            work.await;
        })
    }

    pub(super) async fn read<T: Send + 'static>(
        &self,
        run: impl for<'a> Fn(&'a mut ReadTx) -> TxFuture<'a, T, Error> + Send + Sync + 'static,
    ) -> Result<T, Error> {
        self.0.gate.read_tasks(run).await
    }

    pub(super) async fn write<T: Send + 'static>(
        &self,
        run: impl for<'a> Fn(&'a mut WriteTx) -> TxFuture<'a, T, Error> + Send + Sync + 'static,
    ) -> Result<T, Error> {
        self.0.gate.housekeep(run).await
    }
}

fn invalid(message: impl Into<std::borrow::Cow<'static, str>>) -> Error {
    Error::new(Kind::Invalid, "ERR_INVALID_ARGUMENT", message)
}

/// What an operation asks for, with the published texts for what is missing.
fn request(caller: &Caller, operation: Operation) -> Result<Request, Error> {
    let by = caller.identity.to_string();
    let or = |reason: String, otherwise: &str| {
        if reason.len() > REASON_BYTES_MAX || reason.contains('\0') {
            return Err(invalid(format!("a reason may have {REASON_BYTES_MAX} bytes")));
        }
        Ok(if reason.is_empty() { otherwise.to_owned() } else { reason })
    };
    Ok(match operation {
        Operation::Claim => Request::Claim { by },
        Operation::Complete => Request::Complete { by },
        Operation::Fail(reason) => Request::Fail { by, reason: or(reason, "task failed")? },
        Operation::Cancel(reason) => Request::Cancel { by, reason: or(reason, "Task cancelled")? },
        Operation::Retry => Request::Retry,
        Operation::Reject(reason) => Request::Reject { by, reason: or(reason, "rejected")? },
        Operation::Pause(wait) => {
            let wait = wait.ok_or_else(|| invalid("invalid request: wait_spec required for PAUSE"))?;
            Request::Pause(bounded(wait)?)
        }
        Operation::WaitFor(wait) => {
            let wait = wait.filter(|wait| wait.depends_on.iter().any(|id| !id.trim().is_empty()));
            let wait = wait.ok_or_else(|| invalid("invalid request: wait_spec.depends_on required for WAIT_FOR"))?;
            Request::Pause(Wait { reason: WaitReason::Dependency, ..bounded(wait)? })
        }
        Operation::Resume => Request::Resume,
    })
}

fn bounded(wait: Wait) -> Result<Wait, Error> {
    let hibernation = wait.hibernation.iter().flat_map(|hibernation| {
        let own = [&hibernation.checkpoint_key, &hibernation.resume_session, &hibernation.escalation_policy];
        own.into_iter().chain(&hibernation.wake_event_types)
    });
    let texts = [&wait.expected_principal, &wait.authority_request].into_iter();
    let texts = texts.chain(wait.input_match.iter().flat_map(|(key, value)| [key, value]));
    let bytes: usize = texts.chain(&wait.depends_on).chain(hibernation).map(String::len).sum();
    if bytes > WAIT_BYTES_MAX {
        return Err(invalid(format!("invalid request: wait_spec has {bytes} bytes, {WAIT_BYTES_MAX} are allowed")));
    }
    Ok(wait)
}

/// What a request takes besides the state of its own task; and whether what it would wait for has ended already.
async fn checked(tx: &mut WriteTx, task: &Task, request: Request) -> Result<(Request, bool), Error> {
    match request {
        Request::Pause(mut wait) => {
            wait.depends_on.retain(|id| !id.trim().is_empty());
            if !wait.depends_on.is_empty() {
                check_dependencies(tx, task, &wait.depends_on).await?;
            }
            if wait.reason == WaitReason::Hibernation {
                check_hibernation(tx, task, wait.hibernation.as_ref()).await?;
            }
            let ended = wait.reason == WaitReason::Dependency && has_ended(tx, &wait).await?;
            Ok((Request::Pause(wait), ended))
        }
        // There is nobody to go on with.
        Request::Resume if task.state == State::Hibernated || task.assignee.is_empty() => Ok((Request::Wake, false)),
        other => Ok((other, false)),
    }
}

/// Whether what a task waits for has ended. One that is gone has.
pub(super) async fn has_ended(tx: &mut WriteTx, wait: &Wait) -> Result<bool, Error> {
    let mut ended = 0;
    for id in &wait.depends_on {
        let found = sql::state_of(tx.as_read(), id).await?;
        ended += usize::from(found.is_none_or(|(state, _)| state.is_terminal()));
    }
    Ok(if wait.wake_on_any && !wait.depends_on.is_empty() { ended > 0 } else { ended == wait.depends_on.len() })
}

async fn check_dependencies(tx: &mut WriteTx, task: &Task, on: &[String]) -> Result<(), Error> {
    if on.len() > DEPENDENCIES_MAX {
        return Err(invalid(format!("a task may wait for {DEPENDENCIES_MAX} others")));
    }
    let own = task.id.to_string();
    for id in on {
        let found = sql::state_of(tx.as_read(), id).await?;
        if found.is_none_or(|(_, workspace)| workspace != task.workspace) || *id == own {
            return Err(Error::new(Kind::NotFound, "ERR_NOT_FOUND", format!("dependency not found: {id}")));
        }
        if sql::others_wait(tx.as_read(), id, &own, WAITERS_MAX).await? {
            let message = format!("quota exceeded for tasks that wait for task {id}: limit {WAITERS_MAX}");
            return Err(Error::new(Kind::Exhausted, "ERR_QUOTA_001", message));
        }
    }
    // As if it waited already: an error undoes that.
    sql::wait_for(tx, task.id, on).await?;
    let awaited = sql::awaited_by(tx.as_read(), &own, CIRCLE_MAX + 1).await?;
    if awaited.contains(&own) {
        return Err(invalid("invalid request: the tasks would wait for each other"));
    }
    if awaited.len() as i64 > CIRCLE_MAX {
        return Err(invalid(format!("invalid request: a task may wait for {CIRCLE_MAX} others, theirs included")));
    }
    Ok(())
}

/// In the published order.
async fn check_hibernation(tx: &mut WriteTx, task: &Task, hibernation: Option<&Hibernation>) -> Result<(), Error> {
    let Some(hibernation) = hibernation else {
        return Err(invalid("hibernation requires wait_spec.hibernation with a checkpoint_key"));
    };
    let key = &hibernation.checkpoint_key;
    if key.is_empty() {
        return Err(invalid("hibernation requires a non-empty wait_spec.hibernation.checkpoint_key"));
    }
    let identity = &task.assignee;
    if identity.is_empty() {
        return Err(invalid("hibernation requires the task to have an assignee identity for checkpoint scoping"));
    }
    if !checkpoint::exists(tx.as_read(), identity, key).await? {
        let message = format!("hibernation requires a saved checkpoint with key {key:?} for identity {identity}");
        return Err(Error::new(Kind::Precondition, "ERR_TASK_STATE", message));
    }
    Ok(())
}

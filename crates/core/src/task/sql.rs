//! Rows of tasks. What changes is in `tasks`, what never does in `task_bodies`, so that a change writes little.

use std::sync::Arc;

use trunkline_store::ledger::{Error, Migration, ReadTx, Row, TxFuture, Value, WriteTx};
use uuid::Uuid;

use super::{Filter, Mode, Task, TaskEvent, state::State};

pub(crate) const MIGRATIONS: &[Migration] = &[TABLES, HELD_IN_ORDER, ATTEMPTS];

/// What a worker has is read a piece at a time, in order.
const HELD_IN_ORDER: Migration = Migration {
    name: "task_0002_held_in_order",
    sql: "CREATE INDEX tasks_held_in_order ON tasks (holder, priority DESC, queued_at, id) WHERE holder IS NOT NULL;
        DROP INDEX tasks_held",
};

/// Attempts are told apart, and who lost one is told.
const ATTEMPTS: Migration = Migration {
    name: "task_0003_attempts",
    sql: "ALTER TABLE tasks ADD COLUMN attempt BIGINT NOT NULL DEFAULT 0;
        ALTER TABLE tasks ADD COLUMN lost_sessions BIGINT NOT NULL DEFAULT 0;
        ALTER TABLE tasks ADD COLUMN begun_at BIGINT;
        ALTER TABLE tasks ADD COLUMN reported_at BIGINT;
        CREATE TABLE task_losses (identity TEXT NOT NULL, task TEXT NOT NULL, event TEXT NOT NULL, lost_at BIGINT NOT NULL,
            PRIMARY KEY (identity, task));
        CREATE INDEX task_losses_lost_at ON task_losses (lost_at)",
};

const TABLES: Migration = Migration {
    name: "task_0001_tasks",
    sql: "CREATE TABLE tasks (id TEXT PRIMARY KEY, workspace TEXT NOT NULL, kind TEXT NOT NULL, mode TEXT NOT NULL,
            class BIGINT NOT NULL, priority BIGINT NOT NULL, creator TEXT NOT NULL, parent TEXT NOT NULL,
            root TEXT NOT NULL, correlation TEXT NOT NULL, context TEXT NOT NULL, target TEXT NOT NULL,
            implementation TEXT NOT NULL, subject TEXT NOT NULL, queue TEXT NOT NULL, created_at BIGINT NOT NULL,
            grace_ms BIGINT NOT NULL, has_token BIGINT NOT NULL, start_key TEXT,
            state TEXT NOT NULL, assignee TEXT NOT NULL, launcher TEXT NOT NULL, avoid TEXT NOT NULL,
            ended_by TEXT NOT NULL, updated_at BIGINT NOT NULL, queued_at BIGINT NOT NULL, assigned_at BIGINT,
            started_at BIGINT, ended_at BIGINT, paused_at BIGINT, disconnected_at BIGINT, retry_at BIGINT,
            failures BIGINT NOT NULL, launches BIGINT NOT NULL, error TEXT NOT NULL, wait TEXT, hibernation TEXT,
            due_at BIGINT, holder TEXT, version BIGINT NOT NULL);
        CREATE TABLE task_bodies (task TEXT PRIMARY KEY, spec TEXT NOT NULL, payload BYTES NOT NULL);
        CREATE TABLE task_waits (on_task TEXT NOT NULL, waiter TEXT NOT NULL, PRIMARY KEY (on_task, waiter));
        CREATE INDEX task_waits_waiter ON task_waits (waiter);
        CREATE TABLE task_tokens (hash TEXT PRIMARY KEY, task TEXT NOT NULL, identity TEXT NOT NULL,
            expires_at BIGINT NOT NULL);
        CREATE INDEX task_tokens_task ON task_tokens (task);
        CREATE TABLE task_keys (workspace TEXT NOT NULL, creator TEXT NOT NULL, name TEXT NOT NULL, task TEXT NOT NULL,
            expires_at BIGINT NOT NULL, PRIMARY KEY (workspace, creator, name));
        CREATE INDEX task_keys_expiry ON task_keys (expires_at);
        CREATE INDEX tasks_queue ON tasks (queue, priority DESC, queued_at, id) WHERE state = 'pending';
        CREATE INDEX tasks_held ON tasks (holder) WHERE holder IS NOT NULL;
        CREATE INDEX tasks_input ON tasks (assignee) WHERE state = 'waiting_input';
        CREATE INDEX tasks_running ON tasks (subject, workspace) WHERE subject <> '' AND state = 'running';
        CREATE INDEX tasks_due ON tasks (due_at) WHERE due_at IS NOT NULL;
        CREATE INDEX tasks_listed ON tasks (workspace, updated_at, id);
        CREATE INDEX tasks_parent ON tasks (parent) WHERE parent <> '';
        CREATE INDEX tasks_root ON tasks (root) WHERE root <> '';
        CREATE INDEX tasks_correlation ON tasks (correlation) WHERE correlation <> '';
        CREATE INDEX tasks_context ON tasks (context) WHERE context <> '';
        CREATE UNIQUE INDEX tasks_start ON tasks (start_key) WHERE start_key IS NOT NULL",
};

/// The columns that [`task`] reads, in its order.
macro_rules! columns {
    () => {
        "t.id, t.workspace, t.kind, t.mode, t.class, t.priority, t.creator, t.parent, t.root, t.correlation, t.context,
        t.target, t.implementation, t.subject, t.queue, t.created_at, t.grace_ms, t.has_token, t.state, t.assignee,
        t.launcher, t.avoid, t.ended_by, t.updated_at, t.queued_at, t.assigned_at, t.started_at, t.ended_at,
        t.paused_at, t.disconnected_at, t.retry_at, t.failures, t.launches, t.error, t.wait, t.hibernation, t.version,
        t.attempt, t.lost_sessions, t.begun_at, t.reported_at, b.spec"
    };
}

/// All tasks that fit what follows.
macro_rules! select {
    ($rest:literal) => {
        concat!("SELECT ", columns!(), " FROM tasks t JOIN task_bodies b ON b.task = t.id ", $rest)
    };
}

/// How many columns those are.
const COLUMNS: usize = 42;

const INSERT: &str = "INSERT INTO tasks (id, workspace, kind, mode, class, priority, creator, parent, root, correlation,
        context, target, implementation, subject, queue, created_at, grace_ms, has_token, start_key, state, assignee,
        launcher, avoid, ended_by, updated_at, queued_at, assigned_at, started_at, ended_at, paused_at, disconnected_at,
        retry_at, failures, launches, error, wait, hibernation, due_at, holder, attempt, lost_sessions, begun_at, reported_at,
        version)
    VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13, $14, $15, $16, $17, $18, $19, $20, $21, $22, $23, $24,
        $25, $26, $27, $28, $29, $30, $31, $32, $33, $34, $35, $36, $37, $38, $39, $40, $41, $42, $43, $44)
    ON CONFLICT DO NOTHING";

const UPDATE: &str = "UPDATE tasks SET state = $3, assignee = $4, launcher = $5, avoid = $6, ended_by = $7,
        updated_at = $8, queued_at = $9, assigned_at = $10, started_at = $11, ended_at = $12, paused_at = $13,
        disconnected_at = $14, retry_at = $15, failures = $16, launches = $17, error = $18, wait = $19, hibernation = $20,
        due_at = $21, holder = $22, attempt = $23, lost_sessions = $24, begun_at = $25, reported_at = $26,
        version = version + 1
    WHERE id = $1 AND version = $2";

const BY_ID: &str = select!("WHERE t.id = $1");

const HEAD: &str = select!(
    "WHERE t.queue = $1 AND t.state = 'pending' AND t.avoid <> $2 ORDER BY t.priority DESC, t.queued_at, t.id LIMIT 1"
);

const IS_WAITING: &str = "SELECT id FROM tasks WHERE queue = $1 AND state = 'pending' LIMIT 1";

const WAITING: &str = "SELECT DISTINCT queue FROM tasks WHERE state = 'pending' AND queue <> ''";

const TO_HAND_OUT: &str = "SELECT id, priority, queued_at FROM tasks WHERE holder = $1 AND priority <= $2
        AND (priority < $2 OR queued_at > $3 OR (queued_at = $3 AND id > $4))
        AND (mode <> 'self_assign' OR assigned_at <> created_at) AND (mode <> 'startup' OR state = 'starting')
    ORDER BY priority DESC, queued_at, id LIMIT $5";

const DUE: &str = "SELECT id, due_at FROM tasks WHERE due_at IS NOT NULL AND due_at <= $1 ORDER BY due_at LIMIT $2";

const NEXT_DUE: &str = "SELECT due_at FROM tasks WHERE due_at IS NOT NULL ORDER BY due_at LIMIT 1";

const START: &str = select!("WHERE t.start_key IS NOT NULL AND t.start_key = $1");

/// Puts a new task; answers whether it is there now, which it is not if an agent is being started already.
pub(super) async fn insert(
    tx: &mut WriteTx,
    task: &Task,
    spec: &str,
    payload: &[u8],
    start_key: Option<&str>,
    due_at: Option<i64>,
) -> Result<bool, Error> {
    let id = task.id.to_string();
    let fixed: [Value; 19] = [
        id.as_str().into(),
        task.workspace.as_str().into(),
        task.kind.as_str().into(),
        task.mode.word().into(),
        i64::from(task.class).into(),
        task.priority.into(),
        task.creator.as_str().into(),
        parent(task).into(),
        task.root.as_str().into(),
        task.correlation.as_str().into(),
        task.context.as_str().into(),
        task.target.as_str().into(),
        task.implementation.as_str().into(),
        task.subject.as_str().into(),
        task.queue.as_str().into(),
        task.created_at.into(),
        task.grace_ms.into(),
        task.has_token.into(),
        start_key.into(),
    ];
    let mut params = Vec::from(fixed);
    params.extend(changing(task, due_at)?);
    params.push(task.version.into());
    if tx.execute(INSERT, &params).await? == 0 {
        return Ok(false);
    }
    let body = [id.into(), spec.into(), payload.into()];
    tx.execute("INSERT INTO task_bodies (task, spec, payload) VALUES ($1, $2, $3)", &body).await?;
    Ok(true)
}

/// Puts a task as it is now, if it is still as it was; answers whether.
pub(super) async fn update(tx: &mut WriteTx, task: &Task, due_at: Option<i64>) -> Result<bool, Error> {
    let mut params = vec![task.id.to_string().into(), task.version.into()];
    params.extend(changing(task, due_at)?);
    Ok(tx.execute(UPDATE, &params).await? == 1)
}

/// The columns that change, as [`INSERT`] and [`UPDATE`] name them.
fn changing(task: &Task, due_at: Option<i64>) -> Result<[Value; 24], Error> {
    let holder = task.state.is_held() && !task.assignee.is_empty();
    Ok([
        task.state.word().into(),
        task.assignee.as_str().into(),
        task.launcher.as_str().into(),
        task.avoid.as_str().into(),
        task.ended_by.as_str().into(),
        task.updated_at.into(),
        task.queued_at.into(),
        task.assigned_at.into(),
        task.started_at.into(),
        task.ended_at.into(),
        task.paused_at.into(),
        task.disconnected_at.into(),
        task.retry_at.into(),
        task.failures.into(),
        task.launches.into(),
        task.error.as_str().into(),
        json_opt(task.wait.as_ref())?.into(),
        json_opt(task.hibernation.as_ref())?.into(),
        due_at.into(),
        // A column of its own, because SQLite builds a table for every IN of an index's condition.
        holder.then_some(task.assignee.as_str()).into(),
        task.attempt.into(),
        task.lost_sessions.into(),
        task.begun_at.into(),
        task.reported_at.into(),
    ])
}

pub(super) async fn get(tx: &mut ReadTx, id: Uuid) -> Result<Option<Task>, Error> {
    tx.query_opt(BY_ID, &[id.to_string().into()]).await?.as_ref().map(task).transpose()
}

pub(super) async fn payload(tx: &mut ReadTx, id: Uuid) -> Result<Vec<u8>, Error> {
    let row = tx.query_opt("SELECT payload FROM task_bodies WHERE task = $1", &[id.to_string().into()]).await?;
    row.map_or(Ok(Vec::new()), |row| row.bytes(0).map(<[u8]>::to_vec))
}

/// What a worker should get next from a queue.
pub(super) async fn head(tx: &mut ReadTx, queue: &str, worker: &str) -> Result<Option<Task>, Error> {
    tx.query_opt(HEAD, &[queue.into(), worker.into()]).await?.as_ref().map(task).transpose()
}

/// Whether anything waits in a queue.
pub(super) async fn is_waiting(tx: &mut ReadTx, queue: &str) -> Result<bool, Error> {
    Ok(tx.query_opt(IS_WAITING, &[queue.into()]).await?.is_some())
}

/// The queues in which something waits.
pub(super) fn waiting(tx: &mut ReadTx) -> TxFuture<'_, Vec<String>, Error> {
    Box::pin(async move {
        let rows = tx.query(WAITING, &[]).await?;
        rows.iter().map(|row| row.text(0).map(ToOwned::to_owned)).collect()
    })
}

/// What somebody has, and of each whether it is taken for gone.
pub(super) async fn held_ids(tx: &mut ReadTx, identity: &str) -> Result<Vec<(Uuid, bool)>, Error> {
    let rows = tx.query("SELECT id, disconnected_at FROM tasks WHERE holder = $1", &[identity.into()]).await?;
    rows.iter().map(|row| Ok((uuid(row, 0)?, row.int_opt(1)?.is_some()))).collect()
}

/// A task that somebody has, by its place among those: most urgent first, and then longest first.
#[derive(Clone, Debug)]
pub(super) struct HeldAt {
    pub(super) id: Uuid,
    priority: i64,
    queued_at: i64,
}

impl HeldAt {
    /// Before all of them.
    pub(super) fn start() -> Self {
        Self { id: Uuid::nil(), priority: i64::MAX, queued_at: i64::MIN }
    }
}

/// What somebody has and has to be told of, behind a place: not what it gave itself, nor its own start.
pub(super) async fn to_hand_out(
    tx: &mut ReadTx,
    identity: &str,
    after: Option<&HeldAt>,
    most: i64,
) -> Result<Vec<HeldAt>, Error> {
    let start = HeldAt::start();
    let HeldAt { id, priority, queued_at } = after.unwrap_or(&start);
    let params = [identity.into(), (*priority).into(), (*queued_at).into(), id.to_string().into(), most.into()];
    let rows = tx.query(TO_HAND_OUT, &params).await?;
    rows.iter().map(|row| Ok(HeldAt { id: uuid(row, 0)?, priority: row.int(1)?, queued_at: row.int(2)? })).collect()
}

/// What of somebody's waits for a message.
pub(super) async fn awaiting_input(tx: &mut ReadTx, identity: &str) -> Result<Vec<Task>, Error> {
    let sql = select!("WHERE t.assignee = $1 AND t.state = 'waiting_input' ORDER BY t.paused_at, t.id");
    tx.query(sql, &[identity.into()]).await?.iter().map(task).collect()
}

/// What runs in a workspace for a user.
pub(super) async fn running_for(tx: &mut ReadTx, user: &str, workspace: &str) -> Result<Vec<Task>, Error> {
    let sql = select!(
        "WHERE t.subject = $1 AND t.workspace = $2 AND t.subject <> '' AND t.state = 'running' ORDER BY t.id LIMIT 100"
    );
    tx.query(sql, &[user.into(), workspace.into()]).await?.iter().map(task).collect()
}

/// Tasks that are due, longest first.
pub(super) fn due(tx: &mut ReadTx, now: i64, most: i64) -> TxFuture<'_, Vec<Uuid>, Error> {
    Box::pin(async move { tx.query(DUE, &[now.into(), most.into()]).await?.iter().map(|row| uuid(row, 0)).collect() })
}

pub(super) fn next_due(tx: &mut ReadTx) -> TxFuture<'_, Option<i64>, Error> {
    Box::pin(async move { tx.query_opt(NEXT_DUE, &[]).await?.map(|row| row.int(0)).transpose() })
}

/// The start of an agent that is under way.
pub(super) async fn start_of(tx: &mut ReadTx, identity: &str) -> Result<Option<Task>, Error> {
    tx.query_opt(START, &[identity.into()]).await?.as_ref().map(task).transpose()
}

/// The agent may be started again.
pub(super) async fn end_start(tx: &mut WriteTx, id: Uuid) -> Result<(), Error> {
    tx.execute("UPDATE tasks SET start_key = NULL WHERE id = $1", &[id.to_string().into()]).await.map(drop)
}

/// The agent is being started again; answers whether nobody else does that.
pub(super) async fn begin_start(tx: &mut WriteTx, id: Uuid, identity: &str) -> Result<bool, Error> {
    if start_of(tx.as_read(), identity).await?.is_some() {
        return Ok(false);
    }
    let sql = "UPDATE tasks SET start_key = $2 WHERE id = $1";
    Ok(tx.execute(sql, &[id.to_string().into(), identity.into()]).await? == 1)
}

/// Notes what a task waits for, in place of what it waited for before.
pub(super) async fn wait_for(tx: &mut WriteTx, waiter: Uuid, on: &[String]) -> Result<(), Error> {
    let waiter = waiter.to_string();
    tx.execute("DELETE FROM task_waits WHERE waiter = $1", &[waiter.as_str().into()]).await?;
    for task in on {
        let sql = "INSERT INTO task_waits (on_task, waiter) VALUES ($1, $2) ON CONFLICT DO NOTHING";
        tx.execute(sql, &[task.as_str().into(), waiter.as_str().into()]).await?;
    }
    Ok(())
}

/// What a task waits for, and what those wait for, and so on.
pub(super) async fn awaited_by(tx: &mut ReadTx, waiter: &str, most: i64) -> Result<Vec<String>, Error> {
    let sql = "WITH RECURSIVE awaited (id) AS (SELECT on_task FROM task_waits WHERE waiter = $1
        UNION SELECT w.on_task FROM task_waits w JOIN awaited a ON w.waiter = a.id) SELECT id FROM awaited LIMIT $2";
    let rows = tx.query(sql, &[waiter.into(), most.into()]).await?;
    rows.iter().map(|row| row.text(0).map(ToOwned::to_owned)).collect()
}

/// Whether so many others wait for a task already.
pub(super) async fn others_wait(tx: &mut ReadTx, on: &str, waiter: &str, many: i64) -> Result<bool, Error> {
    let last = "SELECT 1 FROM task_waits WHERE on_task = $1 AND waiter <> $2 LIMIT 1 OFFSET $3";
    Ok(tx.query_opt(last, &[on.into(), waiter.into(), (many - 1).into()]).await?.is_some())
}

/// Has those looked at that wait for a task; answers how many. In two steps: a subquery would make SQLite build a table of
/// its own for every task that ends, and most have nobody who waits.
pub(super) async fn nudge_waiters(tx: &mut WriteTx, on: Uuid, now: i64) -> Result<u64, Error> {
    let on = on.to_string();
    if tx.query_opt("SELECT 1 FROM task_waits WHERE on_task = $1 LIMIT 1", &[on.as_str().into()]).await?.is_none() {
        return Ok(0);
    }
    let nudge = "UPDATE tasks SET due_at = $2 WHERE state = 'waiting_dependency'
        AND id IN (SELECT waiter FROM task_waits WHERE on_task = $1)";
    tx.execute(nudge, &[on.into(), now.into()]).await
}

/// Sets when a task is due, and nothing else.
pub(super) async fn set_due(tx: &mut WriteTx, id: Uuid, due_at: Option<i64>) -> Result<(), Error> {
    tx.execute("UPDATE tasks SET due_at = $2 WHERE id = $1", &[id.to_string().into(), due_at.into()]).await.map(drop)
}

/// A task's state and workspace, if it is there.
pub(super) async fn state_of(tx: &mut ReadTx, id: &str) -> Result<Option<(State, String)>, Error> {
    let row = tx.query_opt("SELECT state, workspace FROM tasks WHERE id = $1", &[id.into()]).await?;
    row.map(|row| Ok((state(&row, 0)?, row.text(1)?.to_owned()))).transpose()
}

/// Somebody can come in with the secret of this digest, for this task.
pub(super) async fn put_token(
    tx: &mut WriteTx,
    hash: &str,
    task: &Task,
    identity: &str,
    until: i64,
) -> Result<(), Error> {
    let sql = "INSERT INTO task_tokens (hash, task, identity, expires_at) VALUES ($1, $2, $3, $4)";
    let params = [hash.into(), task.id.to_string().into(), identity.into(), until.into()];
    tx.execute(sql, &params).await.map(drop)
}

/// Nobody can come in for this task any more.
pub(super) async fn revoke_tokens(tx: &mut WriteTx, task: Uuid) -> Result<(), Error> {
    tx.execute("DELETE FROM task_tokens WHERE task = $1", &[task.to_string().into()]).await.map(drop)
}

/// For whom and for which task a token is good.
pub(super) fn token(tx: &mut ReadTx, hash: String, now: i64) -> TxFuture<'_, Option<(String, Uuid)>, Error> {
    Box::pin(async move {
        let sql = "SELECT identity, task FROM task_tokens WHERE hash = $1 AND expires_at > $2";
        let row = tx.query_opt(sql, &[hash.into(), now.into()]).await?;
        row.map(|row| Ok((row.text(0)?.to_owned(), uuid(&row, 1)?))).transpose()
    })
}

/// The task that a name stands for.
pub(super) async fn key(
    tx: &mut ReadTx,
    workspace: &str,
    creator: &str,
    name: &str,
    now: i64,
) -> Result<Option<Uuid>, Error> {
    let sql = "SELECT task FROM task_keys WHERE workspace = $1 AND creator = $2 AND name = $3 AND expires_at > $4";
    let row = tx.query_opt(sql, &[workspace.into(), creator.into(), name.into(), now.into()]).await?;
    row.map(|row| uuid(&row, 0)).transpose()
}

pub(super) async fn put_key(tx: &mut WriteTx, task: &Task, name: &str, until: i64) -> Result<(), Error> {
    let sql = "INSERT INTO task_keys (workspace, creator, name, task, expires_at) VALUES ($1, $2, $3, $4, $5)
        ON CONFLICT (workspace, creator, name) DO UPDATE SET task = excluded.task, expires_at = excluded.expires_at";
    let params = [
        task.workspace.as_str().into(),
        task.creator.as_str().into(),
        name.into(),
        task.id.to_string().into(),
        until.into(),
    ];
    tx.execute(sql, &params).await.map(drop)
}

/// Removes names and tokens whose time is over.
pub(super) fn sweep(tx: &mut WriteTx, now: i64) -> TxFuture<'_, (), Error> {
    Box::pin(async move {
        tx.execute("DELETE FROM task_keys WHERE expires_at <= $1", &[now.into()]).await?;
        let forgotten = now.saturating_sub(LOSS_MS);
        tx.execute("DELETE FROM task_losses WHERE lost_at <= $1", &[forgotten.into()]).await?;
        tx.execute("DELETE FROM task_tokens WHERE expires_at <= $1", &[now.into()]).await.map(drop)
    })
}

/// How long a worker that lost a task has to come back and hear of it, in milliseconds; and of how many it hears.
const LOSS_MS: i64 = 24 * 3600 * 1000;
const LOSSES_MAX: i64 = 100;

/// Keeps what a worker that is away has lost: the last loss of each task, as the event that tells it.
pub(super) async fn put_loss(tx: &mut WriteTx, identity: &str, event: &TaskEvent) -> Result<(), Error> {
    let sql = "INSERT INTO task_losses (identity, task, event, lost_at) VALUES ($1, $2, $3, $4)
        ON CONFLICT (identity, task) DO UPDATE SET event = excluded.event, lost_at = excluded.lost_at";
    let params = [identity.into(), event.task.to_string().into(), json_opt(Some(event))?.into(), event.at_ms.into()];
    tx.execute(sql, &params).await.map(drop)
}

/// What a worker lost and does not have again, the last first.
pub(super) async fn losses(tx: &mut ReadTx, identity: &str) -> Result<Vec<TaskEvent>, Error> {
    let sql = "SELECT task, event FROM task_losses l WHERE identity = $1
            AND NOT EXISTS (SELECT 1 FROM tasks t WHERE t.id = l.task AND t.holder = $1)
        ORDER BY lost_at DESC, task LIMIT $2";
    let rows = tx.query(sql, &[identity.into(), LOSSES_MAX.into()]).await?;
    // One of another version is not told, rather than nothing at all to a worker that comes.
    let read = |row| from_json_opt(row, 1, "loss").inspect_err(|error| tracing::warn!(%error, identity, "not told"));
    Ok(rows.iter().filter_map(|row| read(row).ok().flatten()).collect())
}

/// A worker has heard of one.
pub(super) async fn remove_loss(tx: &mut WriteTx, identity: &str, task: Uuid) -> Result<(), Error> {
    let sql = "DELETE FROM task_losses WHERE identity = $1 AND task = $2";
    tx.execute(sql, &[identity.into(), task.to_string().into()]).await.map(drop)
}

/// Pool tasks that somebody was given before a time and has not begun, although it has begun others: the least urgent of them.
pub(super) async fn not_begun(tx: &mut ReadTx, identity: &str, before: i64, most: i64) -> Result<Vec<Uuid>, Error> {
    let sql = "SELECT t.id FROM tasks t WHERE t.holder = $1 AND t.state = 'assigned' AND t.mode = 'pool' AND t.assigned_at <= $2
            AND EXISTS (SELECT 1 FROM tasks r WHERE r.holder = $1 AND r.state = 'running' AND r.mode = 'pool')
        ORDER BY t.priority, t.queued_at DESC, t.id DESC LIMIT $3";
    let rows = tx.query(sql, &[identity.into(), before.into(), most.into()]).await?;
    rows.iter().map(|row| uuid(row, 0)).collect()
}

/// Whether somebody has begun what it has, of what is not its own start.
pub(super) async fn has_begun(tx: &mut ReadTx, identity: &str) -> Result<bool, Error> {
    let sql = "SELECT 1 FROM tasks WHERE holder = $1 AND state = 'running' AND mode <> 'startup' LIMIT 1";
    Ok(tx.query_opt(sql, &[identity.into()]).await?.is_some())
}

/// Forgets a task and what hangs on it.
pub(super) async fn remove(tx: &mut WriteTx, id: Uuid) -> Result<(), Error> {
    let id = id.to_string();
    for sql in [
        "DELETE FROM task_waits WHERE waiter = $1",
        "DELETE FROM task_tokens WHERE task = $1",
        "DELETE FROM task_bodies WHERE task = $1",
        "DELETE FROM tasks WHERE id = $1",
    ] {
        tx.execute(sql, &[id.as_str().into()]).await?;
    }
    Ok(())
}

/// By which index a list is read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum By {
    Nothing,
    Workspace,
    Parent,
    Ancestor,
    Root,
    Correlation,
    Context,
}

impl By {
    /// The one that fits fewest tasks, of what was named.
    pub(super) fn of(filter: &Filter) -> Self {
        match filter {
            Filter { parent, descendants: true, .. } if !parent.is_empty() => Self::Ancestor,
            Filter { parent, .. } if !parent.is_empty() => Self::Parent,
            Filter { correlation, .. } if !correlation.is_empty() => Self::Correlation,
            Filter { context, .. } if !context.is_empty() => Self::Context,
            Filter { root, .. } if !root.is_empty() => Self::Root,
            Filter { workspace, .. } if !workspace.is_empty() => Self::Workspace,
            _ => Self::Nothing,
        }
    }
}

/// What every list is filtered by: `$1` to `$16`, where empty texts and zeros fit all.
macro_rules! fitting {
    ($by:literal) => {
        concat!(
            " WHERE ",
            $by,
            " AND ($1 = '' OR t.workspace = $1) AND ($2 = '' OR t.kind = $2)
            AND ($3 = '' OR $3 LIKE '%,' || t.state || ',%') AND ($4 = '' OR $4 NOT LIKE '%,' || t.state || ',%')
            AND ($5 = '' OR t.root = $5 OR t.id = $5) AND ($6 = '' OR t.correlation = $6)
            AND ($7 = '' OR t.context = $7) AND ($8 = '' OR t.creator = $8)
            AND ($9 = '' OR t.subject = $9 OR ($9 = '*' AND t.subject <> ''))
            AND (CAST($10 AS BIGINT) = 0 OR t.class = CAST($10 AS BIGINT))
            AND ($11 = '' OR $11 NOT LIKE '%,' || CAST(t.class AS TEXT) || ',%')
            AND (CAST($12 AS BIGINT) = 0 OR t.priority = CAST($12 AS BIGINT)) AND t.priority >= $13
            AND t.updated_at >= $14 AND ($15 = '' OR t.creator = $15 OR t.assignee = $15) AND $16 = $16"
        )
    };
}

/// A page, and a count, of the tasks that fit.
macro_rules! listing {
    ($by:literal) => {
        (
            concat!(
                "SELECT ",
                columns!(),
                " FROM tasks t JOIN task_bodies b ON b.task = t.id",
                fitting!($by),
                " AND (t.updated_at < $17 OR (t.updated_at = $17 AND t.id < $18))
                ORDER BY t.updated_at DESC, t.id DESC LIMIT $19 OFFSET $20"
            ),
            concat!("SELECT COUNT(*) FROM (SELECT 1 FROM tasks t", fitting!($by), " LIMIT $17) AS counted"),
        )
    };
}

/// The statements for a piece of a page, and for a count.
fn listing(by: By) -> (&'static str, &'static str) {
    match by {
        By::Nothing => listing!("1 = 1"),
        By::Workspace => listing!("t.workspace = $1"),
        By::Parent => listing!("t.parent = $16 AND t.parent <> ''"),
        By::Ancestor => listing!(
            "t.id IN (WITH RECURSIVE below (id) AS (SELECT k.id FROM tasks k WHERE k.parent = $16 AND k.parent <> ''
                UNION SELECT k.id FROM tasks k JOIN below p ON k.parent = p.id WHERE k.parent <> '')
                SELECT id FROM below LIMIT 10000)"
        ),
        By::Root => listing!("(t.id = $5 OR (t.root = $5 AND t.root <> ''))"),
        By::Correlation => listing!("t.correlation = $6 AND t.correlation <> ''"),
        By::Context => listing!("t.context = $7 AND t.context <> ''"),
    }
}

/// Some of the tasks that fit, by time of change, each with the bytes of its row: those behind a time and an id, as many as
/// `limit` says, after `offset` others.
pub(super) async fn list(
    tx: &mut ReadTx,
    by: By,
    fitting: &[Value; 16],
    (at, id): &(i64, String),
    (limit, offset): (i64, i64),
) -> Result<Vec<(Task, usize)>, Error> {
    let mut params = fitting.to_vec();
    params.extend([(*at).into(), id.as_str().into(), limit.into(), offset.into()]);
    let rows = tx.query(listing(by).0, &params).await?;
    rows.iter().map(|row| Ok((task(row)?, row.bytes_in_all()))).collect()
}

/// How many tasks fit, if not more than `most`.
pub(super) async fn count(tx: &mut ReadTx, by: By, fitting: &[Value; 16], most: i64) -> Result<i64, Error> {
    let mut params = fitting.to_vec();
    params.push(most.into());
    tx.query_opt(listing(by).1, &params).await?.map_or(Ok(0), |row| row.int(0))
}

/// What is below a task, in a workspace.
pub(super) async fn descendants(tx: &mut ReadTx, of: Uuid, workspace: &str, most: i64) -> Result<Vec<Uuid>, Error> {
    let sql = "WITH RECURSIVE below (id) AS (SELECT k.id FROM tasks k WHERE k.parent = $1 AND k.parent <> ''
            AND k.workspace = $2
        UNION SELECT k.id FROM tasks k JOIN below p ON k.parent = p.id WHERE k.parent <> '' AND k.workspace = $2)
        SELECT id FROM below LIMIT $3";
    let rows = tx.query(sql, &[of.to_string().into(), workspace.into(), most.into()]).await?;
    rows.iter().map(|row| uuid(row, 0)).collect()
}

pub(super) fn counts(tx: &mut ReadTx) -> TxFuture<'_, Vec<(State, i64)>, Error> {
    Box::pin(async move {
        let rows = tx.query("SELECT state, COUNT(*) FROM tasks GROUP BY state", &[]).await?;
        rows.iter().map(|row| Ok((state(row, 0)?, row.int(1)?))).collect()
    })
}

/// How many tasks of each workspace have not ended, without the starts of agents; a workspace may be there more than once.
pub(super) fn open(tx: &mut ReadTx) -> TxFuture<'_, Vec<(String, u64)>, Error> {
    Box::pin(async move {
        let sql = "SELECT workspace, state, COUNT(*) FROM tasks WHERE mode <> 'startup' GROUP BY workspace, state";
        let mut open = Vec::new();
        for row in tx.query(sql, &[]).await? {
            if !state(&row, 1)?.is_terminal() {
                open.push((row.text(0)?.to_owned(), row.int(2)?.unsigned_abs()));
            }
        }
        Ok(open)
    })
}

/// Whoever has something is taken for gone from now on.
pub(super) fn everybody_is_gone(tx: &mut WriteTx, now: i64) -> TxFuture<'_, (), Error> {
    Box::pin(async move {
        let sql = "UPDATE tasks SET disconnected_at = $1, due_at = $1 + grace_ms
            WHERE holder IS NOT NULL AND disconnected_at IS NULL";
        tx.execute(sql, &[now.into()]).await.map(drop)
    })
}

/// Who had a task that waits.
pub(super) async fn assignee_of_waiting(tx: &mut ReadTx, id: Uuid) -> Result<Option<String>, Error> {
    let sql = "SELECT assignee FROM tasks WHERE id = $1 AND paused_at IS NOT NULL";
    tx.query_opt(sql, &[id.to_string().into()]).await?.map(|row| row.text(0).map(ToOwned::to_owned)).transpose()
}

/// Reads [`columns`].
pub(super) fn task(row: &Row) -> Result<Task, Error> {
    debug_assert!(row.0.len() >= COLUMNS, "the columns of a task");
    let text = |column| row.text(column).map(ToOwned::to_owned);
    Ok(Task {
        id: uuid(row, 0)?,
        workspace: text(1)?,
        kind: text(2)?,
        mode: Mode::parse(row.text(3)?).ok_or_else(|| unreadable("mode", row))?,
        class: i32::try_from(row.int(4)?).map_err(|_| unreadable("class", row))?,
        priority: row.int(5)?,
        creator: text(6)?,
        parent: if row.text(7)?.is_empty() { None } else { Some(uuid(row, 7)?) },
        root: text(8)?,
        correlation: text(9)?,
        context: text(10)?,
        target: text(11)?,
        implementation: text(12)?,
        subject: text(13)?,
        queue: text(14)?,
        created_at: row.int(15)?,
        grace_ms: row.int(16)?,
        has_token: row.int(17)? != 0,
        state: state(row, 18)?,
        assignee: text(19)?,
        launcher: text(20)?,
        avoid: text(21)?,
        ended_by: text(22)?,
        updated_at: row.int(23)?,
        queued_at: row.int(24)?,
        assigned_at: row.int_opt(25)?,
        started_at: row.int_opt(26)?,
        ended_at: row.int_opt(27)?,
        paused_at: row.int_opt(28)?,
        disconnected_at: row.int_opt(29)?,
        retry_at: row.int_opt(30)?,
        failures: row.int(31)?,
        launches: row.int(32)?,
        error: text(33)?,
        wait: from_json_opt(row, 34, "wait")?,
        hibernation: from_json_opt(row, 35, "hibernation")?,
        version: row.int(36)?,
        attempt: row.int(37)?,
        lost_sessions: row.int(38)?,
        begun_at: row.int_opt(39)?,
        reported_at: row.int_opt(40)?,
        spec: Arc::new(serde_json::from_str(row.text(41)?).map_err(|_| unreadable("spec", row))?),
    })
}

fn parent(task: &Task) -> String {
    task.parent.map_or_else(String::new, |parent| parent.to_string())
}

fn uuid(row: &Row, column: usize) -> Result<Uuid, Error> {
    Uuid::try_parse(row.text(column)?).map_err(|_| unreadable("id", row))
}

fn state(row: &Row, column: usize) -> Result<State, Error> {
    State::parse(row.text(column)?).ok_or_else(|| unreadable("state", row))
}

/// Text for the ledger.
pub(super) fn json<T: serde::Serialize>(value: &T) -> Result<String, Error> {
    serde_json::to_string(value).map_err(|e| Error::Statement { reason: e.to_string().into() })
}

fn json_opt<T: serde::Serialize>(value: Option<&T>) -> Result<Option<String>, Error> {
    value.map(json).transpose()
}

fn from_json_opt<T: serde::de::DeserializeOwned>(row: &Row, column: usize, name: &str) -> Result<Option<T>, Error> {
    match row.0.get(column) {
        Some(Value::Text(text)) => serde_json::from_str(text).map(Some).map_err(|_| unreadable(name, row)),
        _ => Ok(None),
    }
}

fn unreadable(what: &str, row: &Row) -> Error {
    let id = row.text(0).unwrap_or("?");
    Error::Statement { reason: format!("{what} of task {id} cannot be read").into() }
}

impl Mode {
    fn word(self) -> &'static str {
        match self {
            Self::SelfAssign => "self_assign",
            Self::Targeted => "targeted",
            Self::Pool => "pool",
            Self::Startup => "startup",
        }
    }

    fn parse(word: &str) -> Option<Self> {
        [Self::SelfAssign, Self::Targeted, Self::Pool, Self::Startup].into_iter().find(|mode| mode.word() == word)
    }
}

/// Creators and assignees of tasks.
pub(crate) fn parties(tx: &mut ReadTx) -> TxFuture<'_, Vec<String>, Error> {
    Box::pin(async move {
        let rows = tx.query("SELECT creator FROM tasks UNION SELECT assignee FROM tasks", &[]).await?;
        rows.iter().map(|row| row.text(0).map(str::to_owned)).collect()
    })
}

#[cfg(test)]
mod tests {
    use trunkline_store::ledger::{Ledger, Options};

    use super::*;

    #[tokio::test]
    async fn others_that_wait_are_counted_and_looked_at() {
        let dir = tempfile::tempdir().unwrap();
        let ledger = Ledger::open_sqlite(&dir.path().join("ledger"), &crate::migrations(), Options::default()).unwrap();
        let (on, other) = (Uuid::from_u128(1), Uuid::from_u128(2));
        let done = ledger.write(move |tx| {
            Box::pin(async move {
                let spec = "{\"metadata\":{},\"launch_params\":{}}";
                for n in 10..13 {
                    let state = if n == 12 { State::Running } else { State::WaitingDependency };
                    let task = Task { id: Uuid::from_u128(n), state, ..Task::blank(0, Mode::Pool) };
                    insert(tx, &task, spec, &[], None, None).await?;
                    wait_for(tx, task.id, &[on.to_string()]).await?;
                }
                let first = Uuid::from_u128(10).to_string();
                let on = on.to_string();
                let full = (
                    others_wait(tx.as_read(), &on, "x", 3).await?,
                    others_wait(tx.as_read(), &on, "x", 4).await?,
                    others_wait(tx.as_read(), &on, &first, 3).await?,
                );
                let nudged = nudge_waiters(tx, Uuid::from_u128(1), 5).await?;
                Ok::<_, Error>((full, nudged, nudge_waiters(tx, other, 5).await?))
            })
        });
        assert_eq!(done.await.unwrap(), ((true, false, false), 2, 0));
    }
}

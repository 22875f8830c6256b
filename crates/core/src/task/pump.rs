//! What time does to tasks. One loop sleeps until the next one is due, however many wait.

use std::{sync::atomic::Ordering::SeqCst, time::Duration};

use tokio::time::{Instant, sleep_until};
use trunkline_store::ledger::WriteTx;
use uuid::Uuid;

use super::{
    Task, Tasks,
    decide::{self, Alarm, Context, Request},
    operate::{Changed, has_ended, step},
    sql,
    state::State,
};
use crate::error::Error;

/// Tasks that are looked at in one go.
const BATCH: i64 = 500;

/// How often workers are compared, and tasks that one loses at once.
const BALANCE_PAUSE: Duration = Duration::from_secs(5);
const BALANCE_MAX: usize = 50;

/// Pause after the ledger refused.
const RETRY_PAUSE_MS: i64 = 500;

/// When a task is looked at again that could not be changed.
const SETBACK_MS: i64 = 60_000;

/// The clock is looked at so often, because it may be set; the ledger is not.
const CLOCK_PAUSE: Duration = Duration::from_secs(1);

impl Tasks {
    /// Notes, at the start of a server, that everybody who had something is away for now, what waits, and how much is open.
    ///
    /// # Errors
    /// [`crate::Kind::Unavailable`].
    pub async fn recover(&self) -> Result<(), Error> {
        let now = self.now();
        self.0.gate.housekeep(move |tx| sql::everybody_is_gone(tx, now)).await.map_err(unavailable)?;
        let waiting = self.0.gate.glance(sql::waiting).await?;
        let open = self.0.gate.glance(sql::open).await?;
        let mut floor = self.floor();
        floor.open.load(open);
        waiting.iter().for_each(|queue| floor.workers.note(queue));
        Ok(())
    }

    /// Does what is due, when it is. Ends with its task.
    pub async fn run(self) {
        loop {
            let done = self.tick().await;
            if let Err(error) = &done {
                tracing::warn!(%error, "due tasks wait");
                self.watch_at(Some(self.now().saturating_add(RETRY_PAUSE_MS)));
            }
            self.sleep().await;
        }
    }

    /// Does everything that is due; answers how many tasks that were.
    ///
    /// # Errors
    /// [`crate::Kind::Unavailable`]; the next time goes on.
    pub async fn tick(&self) -> Result<usize, Error> {
        let mut count = 0;
        loop {
            self.0.next_due.clear();
            let now = self.now();
            let due = self.0.gate.glance(move |tx| sql::due(tx, now, BATCH)).await?;
            count += due.len();
            let is_all = due.len() < BATCH as usize;
            self.look_at(due).await?;
            if is_all {
                let next = self.0.gate.glance(sql::next_due).await?;
                self.watch_at(next);
                return Ok(count);
            }
        }
    }

    /// Every few seconds, has pool tasks that a worker was given [`Options::begin_seconds`](super::Options::begin_seconds) ago and
    /// has not begun, although it has begun others, wait again, if another worker has less to do. Does not end, also if there is nothing to do.
    pub async fn balance(self) {
        if self.0.options.begin_seconds == 0 {
            return std::future::pending().await;
        }
        loop {
            tokio::time::sleep(BALANCE_PAUSE).await;
            if let Err(error) = self.balance_once().await {
                tracing::warn!(%error, "what workers have not begun stays with them for now");
            }
        }
    }

    /// One look at all workers.
    async fn balance_once(&self) -> Result<(), Error> {
        let overloaded = self.floor().workers.overloaded();
        let wait = i64::try_from(self.0.options.begin_seconds.saturating_mul(1000)).unwrap_or(i64::MAX);
        let (context, times, before) = (self.context(true), self.0.times, self.now().saturating_sub(wait));
        for (identity, most) in overloaded {
            let most = i64::try_from(most.min(BALANCE_MAX)).unwrap_or(0);
            let taken = self.write(move |tx| {
                let identity = identity.clone();
                Box::pin(async move {
                    let mut taken = Vec::new();
                    for id in sql::not_begun(tx.as_read(), &identity, before, most).await? {
                        if let Some(task) = sql::get(tx.as_read(), id).await? {
                            taken.push(step(tx, &task, &Request::PutBack, context, &times).await?);
                        }
                    }
                    Ok(taken)
                })
            });
            for changed in taken.await? {
                self.settle(changed).await;
            }
        }
        Ok(())
    }

    async fn look_at(&self, due: Vec<Uuid>) -> Result<(), Error> {
        let mut submitted = Vec::with_capacity(due.len());
        for id in due {
            let (tasks, context) = (self.clone(), self.context(false));
            let look = self.0.gate.submit_task(move |tx| {
                let tasks = tasks.clone();
                Box::pin(async move { tasks.look(tx, id, context).await })
            });
            submitted.push((id, look.await?));
        }
        for (id, looked) in submitted {
            match looked.ended().await {
                Ok(Some(changed)) => self.settle(changed).await,
                Ok(None) => {}
                Err(error) => {
                    // It must hold up neither the others nor, by being due for ever, this loop.
                    tracing::warn!(%error, task = %id, "a due task was not changed; it is looked at again later");
                    let later = Some(self.now().saturating_add(SETBACK_MS));
                    self.write(move |tx| Box::pin(async move { Ok(sql::set_due(tx, id, later).await?) })).await?;
                }
            }
        }
        Ok(())
    }

    /// One task that may be due, in its transaction.
    async fn look(&self, tx: &mut WriteTx, id: Uuid, context: Context) -> Result<Option<Changed>, Error> {
        let Some(task) = sql::get(tx.as_read(), id).await? else { return Ok(None) };
        let dependencies_ended = match &task.wait {
            Some(wait) if task.state == State::WaitingDependency => has_ended(tx, wait).await?,
            _ => false,
        };
        let worker_is_there = self.floor().workers.is_there(&task.assignee);
        let context = Context { worker_is_there, dependencies_ended, ..context };
        let times = &self.0.times;
        match decide::alarm(&task, context, times) {
            Alarm::Do(request) => {
                let changed = step(tx, &task, &request, context, times).await;
                return changed.map(Some);
            }
            Alarm::Tell => {
                tracing::warn!(task = %task.id, workspace = task.workspace, "hibernated for longer than its timeout");
                let told = Task { retry_at: Some(context.now), ..task };
                sql::update(tx, &told, decide::due(&told, times)).await?;
            }
            Alarm::Forget => sql::remove(tx, task.id).await?,
            Alarm::Nothing => sql::set_due(tx, task.id, decide::due(&task, times)).await?,
        }
        Ok(None)
    }

    /// A task of this may be due earlier than the pump knows.
    pub(super) fn watch(&self, task: &Task) {
        self.watch_at(decide::due(task, &self.0.times));
    }

    pub(super) fn watch_at(&self, due_at: Option<i64>) {
        self.0.next_due.not_later_than(due_at);
    }

    /// Queues that could not be served are looked at again soon: all of them at once, and not by a server that stops.
    pub(super) fn look_again(&self) {
        if self.0.tracker.is_closed() || self.0.looking_again.swap(true, SeqCst) {
            return;
        }
        let tasks = self.clone();
        self.spawn_job(async move {
            tokio::time::sleep(Duration::from_millis(RETRY_PAUSE_MS.unsigned_abs())).await;
            tasks.0.looking_again.store(false, SeqCst);
            let waiting = tasks.floor().workers.all_waiting();
            for queue in waiting {
                tasks.serve_queue(&queue).await;
            }
        });
    }

    async fn sleep(&self) {
        loop {
            let left = self.0.next_due.get().map(|due_at| due_at.saturating_sub(self.now()));
            if left.is_some_and(|left| left <= 0) {
                return;
            }
            let pause = left.map_or(CLOCK_PAUSE, |left| Duration::from_millis(left.unsigned_abs()).min(CLOCK_PAUSE));
            tokio::select! {
                () = sleep_until(Instant::now() + pause) => {}
                () = self.0.next_due.moved() => {}
            }
        }
    }

    /// Removes names and tokens whose time is over.
    ///
    /// # Errors
    /// [`crate::Kind::Unavailable`].
    pub async fn sweep(&self) -> Result<(), Error> {
        let now = self.now();
        self.0.gate.housekeep(move |tx| sql::sweep(tx, now)).await.map_err(unavailable)
    }
}

fn unavailable(error: trunkline_store::ledger::Error) -> Error {
    error.into()
}

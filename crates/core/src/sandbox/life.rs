//! How sandboxes come, change and go: their rows, and what others hear of it.

use std::{
    sync::{Arc, atomic::Ordering::SeqCst},
    time::Duration,
};

use serde::{Deserialize, Serialize};
use tokio::time::sleep;
use trunkline_store::ledger::{Outgoing, TxFuture, WriteTx};

use super::{
    Active, Sandbox, Sandboxes, Standing, checkpoint, lock, missing, sql,
    state::{Happening, Status},
};
use crate::{error::Error, message, topic};

/// Signs of life are written down so often; a crash finds the later ones in the log.
const BEATS_PAUSE: Duration = Duration::from_secs(5);

/// Pause after the ledger refused.
const RETRY_PAUSE_MS: i64 = 500;

/// What became of a sandbox, as the topic `sandboxes` tells it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(super) struct Notice {
    pub(super) id: String,
    pub(super) project: Option<String>,
    pub(super) version: i64,
    pub(super) what: What,
}

/// What became of it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum What {
    Created(Sandbox),
    Updated { status: Option<Status>, summary: Option<String> },
    Removed,
}

impl Sandboxes {
    pub(super) async fn standing(&self, id: &str) -> Result<Option<Standing>, Error> {
        // Only those that somebody is busy with are worth it, and only they are here.
        let active = lock(&self.0.active).get(id).cloned();
        if let Some(known) = active.as_ref().and_then(|active| active.known.get()) {
            return Ok(Some(known));
        }
        let (name, changed) = (id.to_owned(), active.as_ref().map_or(0, |active| active.known.changed.load(SeqCst)));
        let found = self.0.gate.glance(move |tx| {
            let id = name.clone();
            Box::pin(async move { sql::get(tx, &id).await })
        });
        let found = found.await?.filter(|standing| !standing.removed);
        if let (Some(active), Some(found)) = (active, &found) {
            active.known.keep(found, changed);
        }
        Ok(found)
    }

    pub(super) async fn all(&self, project: Option<&str>) -> Result<Vec<Standing>, Error> {
        let project = project.map(ToOwned::to_owned);
        self.0.gate.glance(move |tx| sql::all(tx, project.clone())).await
    }

    /// Puts a new row; answers the one that is there otherwise. Completes even if nobody waits for it: a row of which its due
    /// time is not known here, or that a store of the program's own does not have, would stay as it is.
    pub(super) async fn make(&self, sandbox: Sandbox) -> Result<(Sandbox, bool), Error> {
        let sandboxes = self.clone();
        let made = self.0.tracker.spawn(async move { sandboxes.put_new(sandbox).await });
        made.await.unwrap_or_else(|ended| Err(Error::of_task(&ended)))
    }

    async fn put_new(&self, sandbox: Sandbox) -> Result<(Sandbox, bool), Error> {
        let due_at = self.after(self.0.options.bootstrap_ms);
        // Greater than all that was said of a former one of that id.
        let version = sandbox.created_at.saturating_mul(1000);
        let mut standing =
            Standing { sandbox, due_at, since: 0, commands_to: 0, duty: 0, removed: false, version, signs_to: 0 };
        loop {
            standing.since = i64::try_from(self.0.gate.records()).unwrap_or(i64::MAX);
            standing.commands_to = standing.since;
            let row = standing.clone();
            let made = self.0.gate.housekeep(move |tx| make(tx, row.clone())).await?;
            match made {
                Made::New => {
                    self.0.next_due.not_later_than(standing.due_at);
                    self.save(&standing.sandbox.id).await?;
                    return Ok((standing.sandbox, true));
                }
                Made::Known(known) => return Ok((self.shown(*known), false)),
                Made::StillThere => self.clear_away(&standing.sandbox.id).await?,
            }
        }
    }

    /// Something happened. Answers the row as it is now, if it is there; if it is said of whose stream, only if that has its
    /// place. Completes even if nobody waits for it.
    pub(super) async fn change(
        &self,
        id: &str,
        happened: Vec<Happening>,
        whose: Option<Whose>,
    ) -> Result<Option<Standing>, Error> {
        let (sandboxes, id, now) = (self.clone(), id.to_owned(), self.now());
        let done = self.0.tracker.spawn(async move {
            let active = sandboxes.active(&id);
            // Until it is written: a row that is read meanwhile is not kept.
            let _changing = active.known.changes();
            let name = id.clone();
            let changed = sandboxes.0.gate.housekeep(move |tx| {
                let (id, happened) = (name.clone(), happened.clone());
                Box::pin(async move { change(tx, &id, &happened, whose, now).await })
            });
            let changed: Option<Standing> = changed.await?;
            if changed.as_ref().is_some_and(|changed| !changed.removed) {
                sandboxes.save(&id).await?;
            }
            Ok(changed)
        });
        done.await.unwrap_or_else(|ended| Err(Error::of_task(&ended)))
    }

    /// Removes a sandbox: first for everybody who looks, then what it told.
    pub(super) async fn unmake(&self, id: &str) -> Result<(), Error> {
        let active = self.active(id);
        let _changing = active.known.changes();
        let gone = id.to_owned();
        let removed = self.0.gate.housekeep(move |tx| {
            let id = gone.clone();
            Box::pin(async move { unmake(tx, &id).await })
        });
        if !removed.await? {
            return Err(missing());
        }
        self.clear_away(id).await
    }

    /// Removes what a sandbox that nobody sees any more has left behind.
    async fn clear_away(&self, id: &str) -> Result<(), Error> {
        if let Some(active) = lock(&self.0.active).remove(id)
            && let Some(stint) = lock(&active.stint).take()
        {
            stint.end(false);
        }
        // Whoever reads them sees their end.
        self.0.gate.forget_sandbox(id).await?;
        self.forget(id).await?;
        checkpoint::forget(&self.0.gate, id).await?;
        let gone = id.to_owned();
        self.0.gate.housekeep(move |tx| sql::remove(tx, gone.clone())).await?;
        Ok(())
    }

    /// Looks, at the start of a server, after those that were there when the last one ended.
    ///
    /// # Errors
    /// [`crate::Kind::Unavailable`].
    pub async fn recover(&self) -> Result<(), Error> {
        self.load().await?;
        let (grace, now) = (self.after(self.0.options.grace_ms.max(1)), self.now());
        let bootstrap = self.after(self.0.options.bootstrap_ms);
        for standing in self.0.gate.glance(sql::unsettled).await? {
            let id = standing.sandbox.id.clone();
            if standing.removed {
                self.clear_away(&id).await?;
                continue;
            }
            // What was loaded is from another time than its records.
            let heard = if self.0.keeper.is_none() { self.0.gate.sandbox_events(&id).await?.last_ms } else { 0 };
            let heard = i64::try_from(heard).unwrap_or(i64::MAX);
            let due_at = match standing.sandbox.status {
                // What was told meanwhile did not arrive.
                Status::Bootstrapping => Some(bootstrap),
                status => status.takes_commands().then_some(grace),
            };
            self.0.gate.housekeep(move |tx| settle(tx, standing.clone(), due_at, heard)).await?;
        }
        tracing::debug!(took_ms = self.now() - now, "sandboxes are looked after");
        Ok(())
    }

    /// Does what sandboxes are due for, when they are. Ends with the server.
    pub async fn run(self) {
        while !self.0.stop.is_cancelled() {
            if let Err(error) = self.tick().await {
                tracing::warn!(%error, "sandboxes that are due wait");
                self.0.next_due.not_later_than(Some(self.now().saturating_add(RETRY_PAUSE_MS)));
            }
            let left = self.0.next_due.get().map(|due_at| due_at.saturating_sub(self.now()).max(0));
            let pause = left.map_or(BEATS_PAUSE, |left| Duration::from_millis(left.unsigned_abs()).min(BEATS_PAUSE));
            tokio::select! {
                () = sleep(pause) => {}
                () = self.0.next_due.moved() => {}
                () = self.0.stop.cancelled() => {}
            }
        }
        // What came in last.
        if let Err(error) = self.note_beats().await {
            tracing::debug!(%error, "signs of life are in the log only");
        }
    }

    async fn tick(&self) -> Result<(), Error> {
        let now = self.now();
        if self.0.next_due.get().is_some_and(|due_at| due_at <= now) {
            self.0.next_due.clear();
            let due = self.0.gate.glance(move |tx| sql::due(tx, now)).await?;
            for standing in due {
                if let Some(later) = self.due_again(&standing).filter(|later| *later > now) {
                    self.0.gate.housekeep(move |tx| sql::postpone(tx, standing.sandbox.id.clone(), later)).await?;
                    continue;
                }
                let id = standing.sandbox.id;
                let after = self.change(&id, vec![Happening::TimeUp], None).await?;
                if after.is_some_and(|after| after.removed) {
                    tracing::info!(sandbox = id, "gave no sign of life in time and is removed");
                    self.clear_away(&id).await?;
                }
            }
            let next = self.0.gate.glance(sql::next_due).await?;
            self.0.next_due.not_later_than(next);
        }
        self.note_beats().await
    }

    /// When the time of a sandbox is up that has no stream yet, and tells something all the same.
    fn due_again(&self, standing: &Standing) -> Option<i64> {
        let Standing { sandbox, .. } = standing;
        let beat = lock(&self.0.active).get(&sandbox.id).map_or(0, |active| active.beat.load(SeqCst));
        let bootstrap = i64::try_from(self.0.options.bootstrap_ms).unwrap_or(i64::MAX);
        (sandbox.status == Status::Bootstrapping).then(|| beat.max(sandbox.last_heartbeat).saturating_add(bootstrap))
    }

    /// Writes signs of life down, and forgets those that nobody is busy with any more.
    async fn note_beats(&self) -> Result<(), Error> {
        let mut beats = Vec::new();
        {
            let mut active = lock(&self.0.active);
            active.retain(|id, one| {
                let beat = one.beat.load(SeqCst);
                let is_new = beat > one.beat_noted.load(SeqCst);
                if is_new {
                    beats.push((id.clone(), beat));
                }
                is_new || is_busy(one)
            });
        }
        if beats.is_empty() {
            return Ok(());
        }
        let noted = beats.clone();
        self.0.gate.housekeep(move |tx| sql::note_beats(tx, noted.clone())).await?;
        let active = lock(&self.0.active);
        for (id, beat) in beats {
            if let Some(one) = active.get(&id) {
                one.beat_noted.fetch_max(beat, SeqCst);
            }
        }
        Ok(())
    }

    pub(super) fn after(&self, ms: u64) -> Option<i64> {
        (ms > 0).then(|| self.now().saturating_add(i64::try_from(ms).unwrap_or(i64::MAX)))
    }
}

/// Whether somebody holds it, or something of it goes on.
fn is_busy(active: &Arc<Active>) -> bool {
    let has_scene = active.scene.try_lock().map_or(true, |scene| scene.as_ref().is_some_and(|scene| scene.is_open()));
    Arc::strong_count(active) > 1 || has_scene || lock(&active.stint).is_some()
}

/// Of which command stream a change tells, by its number, or of which record.
#[derive(Clone, Copy, Debug)]
pub(super) enum Whose {
    /// One that takes the place of what there is.
    Newcomer(i64),
    /// One that had a place, if it still has it.
    Holder(i64),
    /// A record, by its offset, that says something of the sandbox: it takes effect once, and not after a later one.
    Record(i64),
}

enum Made {
    New,
    Known(Box<Sandbox>),
    /// Its predecessor is not gone altogether.
    StillThere,
}

fn make(tx: &mut WriteTx, row: Standing) -> TxFuture<'_, Made, Error> {
    Box::pin(async move {
        match sql::get(tx.as_read(), &row.sandbox.id).await? {
            Some(known) if known.removed => Ok(Made::StillThere),
            Some(known) => Ok(Made::Known(known.sandbox.into())),
            None => {
                sql::insert(tx, &row).await?;
                tell(tx, &row, What::Created(row.sandbox.clone())).await?;
                Ok(Made::New)
            }
        }
    })
}

async fn change(
    tx: &mut WriteTx,
    id: &str,
    happened: &[Happening],
    whose: Option<Whose>,
    now: i64,
) -> Result<Option<Standing>, Error> {
    let Some(before) = sql::get(tx.as_read(), id).await?.filter(|row| !row.removed) else { return Ok(None) };
    let mut after = before.clone();
    match whose {
        Some(Whose::Newcomer(number)) => after.duty = number,
        Some(Whose::Holder(number)) if before.duty != number => return Ok(None),
        Some(Whose::Record(offset)) if before.signs_to >= offset => return Ok(None),
        Some(Whose::Record(offset)) => after.signs_to = offset,
        _ => {}
    }
    happened.iter().for_each(|what| after.happens(what, now));
    if after == before {
        return Ok(Some(after));
    }
    let (was, is) = (&before.sandbox, &after.sandbox);
    let status = (was.status != is.status).then_some(is.status);
    let summary = if was.summary == is.summary { None } else { is.summary.clone() };
    if after.removed || status.is_some() || summary.is_some() {
        after.version += 1;
        let what = if after.removed { What::Removed } else { What::Updated { status, summary } };
        tell(tx, &after, what).await?;
    }
    sql::update(tx, &after).await?;
    Ok(Some(after))
}

/// Puts a row that was kept elsewhere, if there is none; answers whether.
pub(super) fn restore(tx: &mut WriteTx, row: Standing) -> TxFuture<'_, bool, trunkline_store::ledger::Error> {
    Box::pin(async move {
        let is_new = sql::get(tx.as_read(), &row.sandbox.id).await?.is_none();
        if is_new {
            sql::insert(tx, &row).await?;
        }
        Ok(is_new)
    })
}

async fn unmake(tx: &mut WriteTx, id: &str) -> Result<bool, Error> {
    let Some(mut row) = sql::get(tx.as_read(), id).await?.filter(|row| !row.removed) else { return Ok(false) };
    (row.removed, row.due_at) = (true, None);
    row.version += 1;
    tell(tx, &row, What::Removed).await?;
    sql::update(tx, &row).await?;
    Ok(true)
}

/// At the start: its stream is gone, but it has its grace.
fn settle(
    tx: &mut WriteTx,
    mut row: Standing,
    grace: Option<Option<i64>>,
    heard: i64,
) -> TxFuture<'_, (), trunkline_store::ledger::Error> {
    Box::pin(async move {
        row.duty = 0;
        row.sandbox.last_heartbeat = row.sandbox.last_heartbeat.max(heard);
        if let Some(grace) = grace {
            row.due_at = grace;
        }
        sql::update(tx, &row).await
    })
}

async fn tell(tx: &mut WriteTx, row: &Standing, what: What) -> Result<(), Error> {
    let (id, project, version) = (row.sandbox.id.clone(), row.sandbox.project.clone(), row.version);
    let payload = message::json(&Notice { id, project, version, what })?.into();
    Ok(tx.send(&Outgoing { topic: topic::sandboxes()?, payload }).await?)
}

impl Standing {
    fn happens(&mut self, what: &Happening, now: i64) {
        match self.sandbox.status.after(what) {
            Some(status) => self.sandbox.status = status,
            None => self.removed = true,
        }
        if let Happening::Summary(summary) = what {
            self.sandbox.summary = Some(summary.clone());
        }
        match what {
            Happening::Opened | Happening::TimeUp => self.due_at = None,
            Happening::Closed => self.duty = 0,
            _ => {}
        }
        if !matches!(what, Happening::TimeUp | Happening::Closed) {
            self.sandbox.last_heartbeat = self.sandbox.last_heartbeat.max(now);
        }
    }
}

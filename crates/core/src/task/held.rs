//! What a worker has, when it comes and when it goes. A worker may have tens of thousands of tasks: they are changed a piece
//! at a time, so that the transactions of others come in between, and handed out as far as there is room.

use trunkline_store::ledger::{self, ReadTx, WriteTx};
use uuid::Uuid;

use super::{
    Mode, Task, Tasks, Times,
    attend::Desk,
    decide::{Context, Request, is_deadly},
    operate::{Changed, step},
    sql::{self, HeldAt},
    state::State,
};
use crate::error::Error;

/// Tasks that one transaction changes: some ten milliseconds of the ledger's writer.
const PIECE: usize = 100;

/// Tasks that are looked at in one go for a mailbox, whose room is less.
const PAGE: i64 = 256;

/// A worker that is here again has what it had: all that says otherwise is changed, and the task that its session stands for
/// begins.
pub(super) async fn come_back(
    tasks: &Tasks,
    identity: &str,
    (away, is_same): (Vec<Uuid>, bool),
    bound: Option<Uuid>,
) -> Result<(Option<Task>, Vec<Changed>), Error> {
    let (context, times) = (tasks.context(true), tasks.0.times);
    let mut changes = Vec::new();
    let away: Vec<Uuid> = away.into_iter().filter(|id| Some(*id) != bound).collect();
    for piece in away.chunks(PIECE) {
        let (identity, piece) = (identity.to_owned(), piece.to_vec());
        let back = tasks.write(move |tx| {
            let (identity, piece) = (identity.clone(), piece.clone());
            Box::pin(async move {
                let mut buried = Vec::new();
                for id in piece {
                    let Some(task) = held(tx.as_read(), id, &identity).await? else { continue };
                    if task.disconnected_at.is_none() {
                        continue;
                    }
                    // Another process, and the next one that would be lost over it.
                    if !is_same && is_deadly(&task) {
                        buried.push(step(tx, &task, &Request::Bury, context, &times).await?);
                    } else {
                        step(tx, &task, &Request::Back { is_same }, context, &times).await?;
                    }
                }
                Ok(buried)
            })
        });
        changes.append(&mut back.await?);
    }
    let Some(bound) = bound else { return Ok((None, changes)) };
    let identity = identity.to_owned();
    let begun = tasks.write(move |tx| {
        let identity = identity.clone();
        Box::pin(async move {
            let Some(task) = sql::get(tx.as_read(), bound).await? else { return Ok((None, None)) };
            // Whoever waits for something goes on waiting, with its worker there.
            if !task.state.is_held() && task.state != State::Pending && !task.state.is_terminal() {
                return Ok((Some(task), None));
            }
            let changed = step(tx, &task, &Request::Start { by: identity }, context, &times).await?;
            Ok((Some(changed.after.clone()), Some(changed)))
        })
    });
    let (stands_for, begun) = begun.await?;
    changes.extend(begun);
    Ok((stands_for, changes))
}

/// What somebody's leaving means for what it has.
#[derive(Clone)]
pub(super) struct Leaving {
    pub(super) identity: String,
    /// How often it had come back from earlier ones that are under way.
    pub(super) returns: u64,
    /// What it was not told of.
    pub(super) untold: Vec<Uuid>,
    /// What is done with it.
    pub(super) done: Option<Uuid>,
    /// It neither said goodbye nor was sent away.
    pub(super) is_lost: bool,
}

/// Changes all that somebody who left has, as long as it is not back.
pub(super) async fn leave(tasks: &Tasks, leaving: Leaving) -> Result<(), Error> {
    let (times, context) = (tasks.0.times, tasks.context(false));
    // What is left to change; nothing before the first piece, which finds out.
    let mut rest: Option<Vec<Uuid>> = None;
    loop {
        let (here, leaving, known) = (tasks.clone(), leaving.clone(), rest.clone());
        let left = tasks.write(move |tx| {
            let (here, leaving, known) = (here.clone(), leaving.clone(), known.clone());
            Box::pin(async move {
                // Whoever comes back has what it had, and its next leaving sees to all of it.
                if here.floor().is_back(&leaving.identity, leaving.returns) {
                    return Ok((Vec::new(), Vec::new()));
                }
                let mut rest = match known {
                    Some(rest) => rest,
                    None => {
                        sql::held_ids(tx.as_read(), &leaving.identity).await?.into_iter().map(|(id, _)| id).collect()
                    }
                };
                let piece = rest.split_off(rest.len().saturating_sub(PIECE));
                Ok((left(tx, &leaving, piece, context, &times).await?, rest))
            })
        });
        let (changes, more) = left.await?;
        for changed in changes {
            tasks.settle(changed).await;
        }
        if more.is_empty() {
            return Ok(());
        }
        rest = Some(more);
    }
}

async fn left(
    tx: &mut WriteTx,
    leaving: &Leaving,
    piece: Vec<Uuid>,
    context: Context,
    times: &Times,
) -> Result<Vec<Changed>, Error> {
    let Leaving { identity, untold, done, is_lost, .. } = leaving;
    // Of one that begins what it works on, the rest had no part in it.
    let begins = sql::has_begun(tx.as_read(), identity).await?;
    let mut changes = Vec::new();
    for id in piece {
        let Some(task) = held(tx.as_read(), id, identity).await? else { continue };
        let request = if *done == Some(id) && task.state == State::Running {
            Request::Complete { by: identity.clone() }
        } else if task.state == State::Assigned && task.mode == Mode::Pool && untold.contains(&id) {
            Request::PutBack
        } else if task.disconnected_at.is_none() {
            Request::Gone { is_lost: *is_lost && (task.state == State::Running || !begins) }
        } else {
            continue;
        };
        changes.push(step(tx, &task, &request, context, times).await?);
    }
    Ok(changes)
}

/// The task, if this is who has it.
async fn held(tx: &mut ReadTx, id: Uuid, identity: &str) -> Result<Option<Task>, ledger::Error> {
    Ok(sql::get(tx, id).await?.filter(|task| task.state.is_held() && task.assignee == identity))
}

impl Desk {
    /// Puts into the mailbox what the ledger says that the identity has and the session was not told, as far as there is
    /// room; answers where to go on if there is more.
    pub(super) async fn catch_up(&self, mut after: Option<HeldAt>) -> Result<Option<HeldAt>, Error> {
        loop {
            let (identity, from) = (self.identity.clone(), after.clone());
            let page = self.tasks.read(move |tx| {
                let (identity, from) = (identity.clone(), from.clone());
                Box::pin(async move { Ok::<_, Error>(sql::to_hand_out(tx, &identity, from.as_ref(), PAGE).await?) })
            });
            let page = page.await?;
            let is_last = (page.len() as i64) < PAGE;
            for at in page {
                if self.mailbox.is_full() {
                    // The one before it, so that this one is looked at again.
                    return Ok(Some(after.unwrap_or_else(HeldAt::start)));
                }
                if !self.mailbox.has(at.id) {
                    self.hand_out(at.id).await?;
                }
                after = Some(at);
            }
            if is_last {
                return Ok(None);
            }
        }
    }

    /// Hands out one task, if it is still the identity's.
    async fn hand_out(&self, id: Uuid) -> Result<(), Error> {
        let identity = self.identity.clone();
        let found = self.tasks.read(move |tx| {
            let identity = identity.clone();
            Box::pin(async move {
                let Some(task) = held(tx, id, &identity).await? else { return Ok::<_, Error>(None) };
                Ok(Some((task, sql::payload(tx, id).await?)))
            })
        });
        let Some((task, payload)) = found.await? else { return Ok(()) };
        let token = match task.mode {
            Mode::Startup => Some(self.tasks.new_token(&task).await?),
            _ => None,
        };
        self.mailbox.hand(task, payload, token);
        Ok(())
    }
}

//! A sandbox's command stream: a lease, which a newer stream takes over, and a place in its commands.

use std::sync::{Arc, Mutex, atomic::Ordering::SeqCst};

use bytes::Bytes;
use tokio::sync::Notify;
use trunkline_store::{
    lease::{Lease, Loss},
    log::{Item, Offset, Reader},
};
use uuid::Uuid;

use super::{Active, Sandboxes, Seat, life::Whose, lock, missing, sql, state::Happening, stopped};
use crate::error::Error;

/// What a sandbox is told.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Command {
    /// Its place in the log: what the sandbox says that it had, when it comes back.
    pub offset: u64,
    /// As it was sent.
    pub body: Bytes,
}

/// A command stream while it lasts. Dropping it ends it: the sandbox is disconnected, unless another stream took over or the
/// server stops.
pub struct Duty {
    sandboxes: Sandboxes,
    id: String,
    active: Arc<Active>,
    lease: Lease,
    number: i64,
    begins: u64,
    reader: Reader,
    stint: Arc<Stint>,
}

/// What two streams of one sandbox agree on: who took which command.
#[derive(Default)]
pub(super) struct Stint {
    state: Mutex<State>,
    ended: Notify,
}

#[derive(Default)]
struct State {
    is_over: bool,
    /// Another stream took over.
    is_replaced: bool,
    /// The last command that the transport took.
    taken: u64,
    phase: Phase,
}

/// How far the opening of a stream is, whose end may come before it.
#[derive(Default)]
enum Phase {
    /// The row does not say so yet.
    #[default]
    Opening,
    Open,
    /// It ended in between.
    Abandoned,
}

impl Stint {
    /// Takes no more, because another stream took over or because it ends; answers what it took last.
    pub(super) fn end(&self, is_replaced: bool) -> u64 {
        let taken = {
            let mut state = lock(&self.state);
            state.is_over = true;
            state.is_replaced |= is_replaced;
            state.taken
        };
        self.ended.notify_one();
        taken
    }
}

impl Stint {
    /// The row says that the stream is open. False if it has ended by now, which the row is to say then.
    fn opened(&self) -> bool {
        let mut state = lock(&self.state);
        let is_there = !matches!(state.phase, Phase::Abandoned);
        state.phase = Phase::Open;
        is_there
    }

    /// The stream ended. False if the row does not say yet that it was open: then whoever opens it sees to its end.
    fn abandon(&self) -> bool {
        let mut state = lock(&self.state);
        let is_open = matches!(state.phase, Phase::Open);
        if !is_open {
            state.phase = Phase::Abandoned;
        }
        is_open
    }
}

impl Sandboxes {
    /// Opens the command stream of a sandbox, in place of the one that there is. It goes on behind what the sandbox says that
    /// it had last, or else behind what the transport took.
    ///
    /// # Errors
    /// [`crate::Kind::NotFound`] if it was removed in the meantime, [`crate::Kind::Unavailable`].
    pub async fn attend(&self, seat: &Seat, last_had: Option<u64>) -> Result<Duty, Error> {
        let id = seat.standing.sandbox.id.clone();
        let active = self.active(&id);
        // Of two that open at once, one is the newer in every respect.
        let opening = active.clone();
        let _order = opening.order.lock().await;
        let lease = self.0.gate.hold_sandbox(&seat.permit, &Uuid::new_v4().to_string()).await?;
        let number = i64::try_from(lease.holder().epoch.0).unwrap_or(i64::MAX);
        let stint = Arc::new(Stint::default());
        let former = lock(&active.stint).replace(stint.clone());
        let taken = former.as_ref().map_or(0, |former| former.end(true));
        if former.is_some() {
            let why = "if two programs attach as this sandbox, each takes the commands from the other";
            tracing::warn!(sandbox = id, "a command stream takes the place of one that is open; {why}");
        }
        active.beat.fetch_max(self.now(), SeqCst);
        let reader = self.0.gate.commands_of(&seat.permit, Offset::START)?;
        // From here on the end of the duty is the end of the stream.
        let mut duty = Duty { sandboxes: self.clone(), id, active, lease, number, begins: 0, reader, stint };
        let (sandboxes, id, stint) = (self.clone(), duty.id.clone(), duty.stint.clone());
        // It goes on though nobody waits for it any more, and so does what follows from that.
        let opened = self.0.tracker.spawn(async move {
            let row = sandboxes.change(&id, vec![Happening::Opened], Some(Whose::Newcomer(number))).await;
            if !stint.opened() {
                sandboxes.closed(id, number).await;
            }
            row
        });
        let row = opened.await.unwrap_or_else(|_| Err(stopped()))?.ok_or_else(missing)?;
        let known = row.commands_to.unsigned_abs().max(taken);
        let after = last_had.filter(|offset| *offset <= self.0.gate.records()).unwrap_or(known);
        lock(&duty.stint.state).taken = after;
        duty.begins = after;
        duty.reader = self.0.gate.commands_of(&seat.permit, Offset(after))?;
        Ok(duty)
    }

    /// Notes the end of a command stream that no other one took over.
    async fn closed(&self, id: String, number: i64) {
        if let Err(error) = self.change(&id, vec![Happening::Closed], Some(Whose::Holder(number))).await {
            tracing::error!(%error, sandbox = id, "its end is not noted; the next start of the server finds it");
        }
    }
}

impl Duty {
    /// The next command; waits for it. Nothing if another stream took over, the sandbox was removed, or the server stops.
    /// Cancel-safe.
    ///
    /// # Errors
    /// [`crate::Kind::Unavailable`].
    pub async fn next(&mut self) -> Result<Option<Command>, Error> {
        loop {
            if lock(&self.stint.state).is_over {
                return Ok(None);
            }
            let item = tokio::select! {
                biased;
                () = self.stint.ended.notified() => return Ok(None),
                loss = self.lease.lost() => {
                    lock(&self.stint.state).is_replaced |= loss == Loss::Transferred;
                    return Ok(None);
                }
                () = self.sandboxes.0.stop.cancelled() => return Ok(None),
                item = self.reader.next() => item?,
            };
            match item {
                Item::Record(record) => {
                    return Ok(Some(Command { offset: record.offset.0, body: record.payload.clone() }));
                }
                Item::End { .. } => return Ok(None),
                Item::Gap(gap) => tracing::warn!(sandbox = self.id, through = %gap.through, "commands are gone"),
                Item::Transient(_) => {}
            }
        }
    }

    /// The place after which its commands come. A sandbox that had none of them says this when it comes back.
    #[must_use]
    pub fn begins(&self) -> u64 {
        self.begins
    }

    /// Whether [`Duty::next`] ended because another stream took over.
    #[must_use]
    pub fn is_replaced(&self) -> bool {
        lock(&self.stint.state).is_replaced
    }

    /// The transport takes a command now. False if another stream took over: then it must not be told.
    #[must_use]
    pub fn take(&self, offset: u64) -> bool {
        {
            let mut state = lock(&self.stint.state);
            if state.is_over {
                return false;
            }
            state.taken = offset;
        }
        let (sandboxes, id) = (self.sandboxes.clone(), self.id.clone());
        let through = i64::try_from(offset).unwrap_or(i64::MAX);
        self.sandboxes.0.tracker.spawn(async move {
            let name = id.clone();
            let noted = sandboxes.0.gate.housekeep(move |tx| sql::note_commands(tx, name.clone(), through));
            if let Err(error) = noted.await {
                tracing::warn!(%error, sandbox = id, "after a crash it is told a command again, unless it says better");
            }
        });
        true
    }
}

impl Drop for Duty {
    fn drop(&mut self) {
        let own = |stint: &mut Arc<Stint>| Arc::ptr_eq(stint, &self.stint);
        let was_last = lock(&self.active.stint).take_if(own).is_some();
        let _ = self.stint.end(false);
        // Without its runtime the process is about to end; the next one gives everybody its grace.
        if !was_last || self.sandboxes.0.stop.is_cancelled() || tokio::runtime::Handle::try_current().is_err() {
            return;
        }
        if self.stint.abandon() {
            let (sandboxes, id, number) = (self.sandboxes.clone(), self.id.clone(), self.number);
            self.sandboxes.0.tracker.spawn(async move { sandboxes.closed(id, number).await });
        }
    }
}

//! Whether the log is as far as the ledger knows it to be, looked at when both are opened.
//!
//! A restored backup, a copy of a directory that was in use, or a power loss without syncs can put yesterday's log beside
//! today's ledger. Positions in the ledger then lie beyond the log's tail, and would hide what is appended next until it
//! has grown past them. So the log gets a new epoch: cursors that clients hold are refused instead of misread, and the
//! ledger's own positions are taken over as far as the log goes.

use trunkline_store::{
    Store,
    ledger::{self, ReadTx, TxFuture, WriteTx},
    log::{Cursor, Epoch},
};

use crate::{error::Error, sandbox, session, socket};

/// Opens nothing to anybody before the log and what the ledger says of it fit together.
///
/// # Errors
/// [`crate::Kind::Unavailable`]: the next start begins again.
pub(super) async fn reconcile(store: &Store) -> Result<(), Error> {
    let tail = store.log.tail();
    // If nothing was appended since it was forked, numbers of no epoch are what that was for, and the ledger was not written.
    let is_forked = store.log.forked_from().is_some_and(|before| before.offset == tail.offset);
    let known = store.ledger.read(move |tx| greatest(tx, tail.epoch, !is_forked)).await;
    let known = known.map_err(|e: ledger::Error| Error::from(e))?.unsigned_abs();
    if known > tail.offset.0 {
        store.log.fork().await?;
        tracing::error!(
            known,
            tail = tail.offset.0,
            "the ledger knows the log beyond its tail: the log is older than the ledger, and what was appended in between is \
             missing; the log goes on under a new epoch"
        );
    }
    let (now, before) = (store.log.epoch(), store.log.forked_from());
    let written = store.ledger.write(move |tx| take_over(tx, before, Cursor { epoch: now, ..tail })).await;
    written.map_err(|e: ledger::Error| Error::from(e))
}

/// The greatest offset of the epoch that any row knows; also those of no epoch, `with_any`.
fn greatest(tx: &mut ReadTx, epoch: Epoch, with_any: bool) -> TxFuture<'_, i64, ledger::Error> {
    Box::pin(async move {
        let any = if with_any { sandbox::sql::greatest_of_any(tx).await? } else { 0 };
        let positions = session::sql::greatest(tx, epoch).await?.max(any);
        Ok(positions.max(sandbox::sql::greatest(tx, epoch).await?).max(socket::sql::greatest(tx, epoch).await?))
    })
}

/// Carries what rows know of the epoch before over to this one, as far as the log goes; again and again does no harm.
fn take_over(tx: &mut WriteTx, before: Option<Cursor>, tail: Cursor) -> TxFuture<'_, (), ledger::Error> {
    Box::pin(async move {
        if let Some(before) = before {
            session::sql::take_over(tx, before, tail.epoch).await?;
            sandbox::sql::take_over(tx, before, tail.epoch).await?;
            socket::sql::take_over(tx, before, tail.epoch).await?;
        }
        sandbox::sql::pull_back(tx, tail.offset).await?;
        session::sql::note_tail(tx, tail, session::sql::now()).await
    })
}

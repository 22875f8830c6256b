//! The smallest question there is.

use trunkline_store::ledger::{Error, ReadTx, TxFuture};

/// Whether the ledger answers.
pub(super) fn ping(tx: &mut ReadTx) -> TxFuture<'_, (), Error> {
    Box::pin(async move { tx.query("SELECT 1", &[]).await.map(drop) })
}

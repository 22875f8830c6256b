//! Rows that a test needs as a crash leaves them.

use trunkline_store::ledger::{Error, TxFuture, WriteTx};

/// A sandbox that begins at an offset, and was told its commands to there.
pub(crate) fn insert_sandbox(tx: &mut WriteTx, at: i64) -> TxFuture<'_, u64, Error> {
    Box::pin(async move {
        let insert = "INSERT INTO sandboxes (id, project, status, summary, created_at, last_heartbeat, due_at, since,
            commands_to, duty, removed, version) VALUES ('s', '', 'ended', '', 0, 0, NULL, $1, $1, 0, 0, 0)";
        tx.execute(insert, &[at.into()]).await
    })
}

//! What the door has no way to do.

use trunkline_store::ledger;

use super::Home;

/// A sequence begins with nothing.
pub(crate) fn forget_everything(home: &Home) {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let store = runtime.block_on(home.open());
    let cleared = store.ledger.write(|tx| {
        Box::pin(async move {
            for sql in [
                "DELETE FROM tasks",
                "DELETE FROM task_bodies",
                "DELETE FROM task_waits",
                "DELETE FROM task_tokens",
                "DELETE FROM task_keys",
                "DELETE FROM outbox",
            ] {
                tx.execute(sql, &[]).await?;
            }
            Ok::<_, ledger::Error>(())
        })
    });
    runtime.block_on(cleared).unwrap();
}

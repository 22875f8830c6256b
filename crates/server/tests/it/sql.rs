//! What no surface has a way to do.

use trunkline_store::{Store, ledger};

/// Has an API key end at a moment, in Unix seconds. By the hour is as exact as clients can ask for it.
pub(crate) async fn expire_token(store: &Store, id: &str, at: i64) {
    let id = id.to_owned();
    let changed = store.ledger.write(move |tx| {
        let id = id.clone();
        Box::pin(
            async move { tx.execute("UPDATE tokens SET expires_at = $2 WHERE id = $1", &[id.into(), at.into()]).await },
        )
    });
    let changed: Result<_, ledger::Error> = changed.await;
    assert_eq!(changed.unwrap(), 1);
}

/// Gives a task a payload of any size, as a server with other limits may have.
pub(crate) async fn put_task_payload(store: &Store, task: &str, payload: Vec<u8>) {
    let task = task.to_owned();
    let changed = store.ledger.write(move |tx| {
        let values = [task.clone().into(), payload.clone().into()];
        Box::pin(async move { tx.execute("UPDATE task_bodies SET payload = $2 WHERE task = $1", &values).await })
    });
    let changed: Result<_, ledger::Error> = changed.await;
    assert_eq!(changed.unwrap(), 1);
}

/// Unix seconds.
pub(crate) fn now() -> i64 {
    i64::try_from(trunkline_store::log::Clock::system().now_ms() / 1000).unwrap()
}

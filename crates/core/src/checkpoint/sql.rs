//! Rows of checkpoints. Expired ones are invisible, and go when their owner saves or with the next sweep.

use trunkline_store::ledger::{Error, Migration, ReadTx, TxFuture, WriteTx};

use super::Checkpoint;

pub(crate) const MIGRATIONS: &[Migration] = &[TABLE, BY_EXPIRY];

const BY_EXPIRY: Migration = Migration {
    name: "checkpoint_0002_by_expiry",
    sql: "CREATE INDEX checkpoints_by_expiry ON checkpoints (expires_at) WHERE expires_at IS NOT NULL",
};

const TABLE: Migration = Migration {
    name: "checkpoint_0001_checkpoints",
    sql: "CREATE TABLE checkpoints (
        owner TEXT NOT NULL,
        name TEXT NOT NULL,
        data BYTES NOT NULL,
        saved_at BIGINT NOT NULL,
        expires_at BIGINT,
        PRIMARY KEY (owner, name))",
};

/// False if that would be more than `most`.
pub(crate) fn save(
    tx: &mut WriteTx,
    owner: String,
    name: String,
    data: Vec<u8>,
    now: i64,
    expires_at: Option<i64>,
    most: i64,
) -> TxFuture<'_, bool, Error> {
    Box::pin(async move {
        let own = [owner.as_str().into(), now.into()];
        tx.execute("DELETE FROM checkpoints WHERE owner = $1 AND expires_at <= $2", &own).await?;
        let others = "SELECT COUNT(*) FROM checkpoints WHERE owner = $1 AND name <> $2";
        let others = tx.query_opt(others, &[owner.as_str().into(), name.as_str().into()]).await?;
        if others.map_or(Ok(0), |row| row.int(0))? >= most {
            return Ok(false);
        }
        let params = [owner.into(), name.into(), data.into(), now.into(), expires_at.into()];
        tx.execute(
            "INSERT INTO checkpoints (owner, name, data, saved_at, expires_at) VALUES ($1, $2, $3, $4, $5)
            ON CONFLICT (owner, name) DO UPDATE
            SET data = excluded.data, saved_at = excluded.saved_at, expires_at = excluded.expires_at",
            &params,
        )
        .await?;
        Ok(true)
    })
}

pub(crate) fn load(tx: &mut ReadTx, owner: String, name: String, now: i64) -> TxFuture<'_, Option<Checkpoint>, Error> {
    Box::pin(async move {
        let select = "SELECT data, saved_at FROM checkpoints
            WHERE owner = $1 AND name = $2 AND (expires_at IS NULL OR expires_at > $3)";
        let row = tx.query_opt(select, &[owner.into(), name.into(), now.into()]).await?;
        row.map(|row| Ok(Checkpoint { data: row.bytes(0)?.to_vec(), saved_at: row.int(1)? })).transpose()
    })
}

pub(crate) fn delete(tx: &mut WriteTx, owner: String, name: String) -> TxFuture<'_, (), Error> {
    Box::pin(async move {
        let remove = "DELETE FROM checkpoints WHERE owner = $1 AND name = $2";
        tx.execute(remove, &[owner.into(), name.into()]).await.map(drop)
    })
}

pub(crate) fn list(tx: &mut ReadTx, owner: String, now: i64) -> TxFuture<'_, Vec<String>, Error> {
    Box::pin(async move {
        let select = "SELECT name FROM checkpoints
            WHERE owner = $1 AND (expires_at IS NULL OR expires_at > $2) ORDER BY name";
        let rows = tx.query(select, &[owner.into(), now.into()]).await?;
        rows.iter().map(|row| row.text(0).map(str::to_owned)).collect()
    })
}

/// Removes some that have expired, up to `most`; answers how many. Their owners may never come again.
pub(crate) fn expire(tx: &mut WriteTx, now: i64, most: i64) -> TxFuture<'_, i64, Error> {
    Box::pin(async move {
        let expired = "SELECT owner, name FROM checkpoints WHERE expires_at <= $1 ORDER BY expires_at LIMIT $2";
        let rows = tx.query(expired, &[now.into(), most.into()]).await?;
        for row in &rows {
            tx.execute("DELETE FROM checkpoints WHERE owner = $1 AND name = $2", &row.0).await?;
        }
        Ok(rows.len() as i64)
    })
}

/// Identities that have checkpoints.
pub(crate) fn owners(tx: &mut ReadTx) -> TxFuture<'_, Vec<String>, Error> {
    Box::pin(async move {
        let rows = tx.query("SELECT DISTINCT owner FROM checkpoints", &[]).await?;
        rows.iter().map(|row| row.text(0).map(str::to_owned)).collect()
    })
}

#[cfg(test)]
mod tests {
    use trunkline_store::ledger::{Ledger, Options};

    use super::*;

    #[tokio::test]
    async fn what_expired_goes_without_its_owner() {
        let dir = tempfile::tempdir().unwrap();
        let ledger = Ledger::open_sqlite(&dir.path().join("ledger"), MIGRATIONS, Options::default()).unwrap();
        for (owner, expires_at) in [("a", Some(10)), ("b", Some(20)), ("c", Some(30)), ("d", Some(99)), ("e", None)] {
            let saved = ledger.write(move |tx| save(tx, owner.to_owned(), "k".into(), vec![1], 0, expires_at, 10));
            assert!(saved.await.unwrap());
        }
        for expected in [2, 1, 0] {
            assert_eq!(ledger.write(|tx| expire(tx, 30, 2)).await.unwrap(), expected);
        }
        for (owner, is_there) in [("a", false), ("c", false), ("d", true), ("e", true)] {
            let found = ledger.read(move |tx| load(tx, owner.to_owned(), "k".into(), 0)).await.unwrap();
            assert_eq!(found.is_some(), is_there, "{owner}");
        }
    }
}

//! Rows of checkpoints. Expired ones are invisible, and go when their owner saves.

use trunkline_store::ledger::{Error, Migration, ReadTx, TxFuture, WriteTx};

use super::Checkpoint;

pub(crate) const MIGRATIONS: &[Migration] = &[Migration {
    name: "checkpoint_0001_checkpoints",
    sql: "CREATE TABLE checkpoints (
        owner TEXT NOT NULL,
        name TEXT NOT NULL,
        data BYTES NOT NULL,
        saved_at BIGINT NOT NULL,
        expires_at BIGINT,
        PRIMARY KEY (owner, name))",
}];

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

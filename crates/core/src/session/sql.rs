//! Where identities stopped reading, by scope.

use trunkline_store::{
    ledger::{Error, Migration, ReadTx, TxFuture, WriteTx},
    log::{Cursor, Epoch},
};

/// Owner and scope of the log's own row; identities have other names.
const LOG: (&str, &str) = ("log", "tail");

pub(crate) const MIGRATIONS: &[Migration] = &[Migration {
    name: "session_0001_positions",
    sql: "CREATE TABLE positions (
        owner TEXT NOT NULL,
        scope TEXT NOT NULL,
        epoch TEXT NOT NULL,
        position BIGINT NOT NULL,
        PRIMARY KEY (owner, scope))",
}];

/// Positions only move forward within an epoch, so a session that ended late cannot take its successor back.
pub(crate) fn save(
    tx: &mut WriteTx,
    owner: String,
    epoch: String,
    positions: Vec<(String, i64)>,
) -> TxFuture<'_, (), Error> {
    Box::pin(async move {
        for (scope, position) in positions {
            let params = [owner.as_str().into(), scope.into(), epoch.as_str().into(), position.into()];
            tx.execute(
                "INSERT INTO positions (owner, scope, epoch, position) VALUES ($1, $2, $3, $4)
                ON CONFLICT (owner, scope) DO UPDATE SET epoch = excluded.epoch, position = excluded.position
                WHERE positions.epoch <> excluded.epoch OR positions.position < excluded.position",
                &params,
            )
            .await?;
        }
        Ok(())
    })
}

/// The position, if it is of this epoch.
pub(crate) fn load(tx: &mut ReadTx, owner: String, scope: String, epoch: String) -> TxFuture<'_, Option<i64>, Error> {
    Box::pin(async move {
        let select = "SELECT position FROM positions WHERE owner = $1 AND scope = $2 AND epoch = $3";
        let row = tx.query_opt(select, &[owner.into(), scope.into(), epoch.into()]).await?;
        row.map(|row| row.int(0)).transpose()
    })
}

/// Identities that stopped reading somewhere.
pub(crate) fn owners(tx: &mut ReadTx) -> TxFuture<'_, Vec<String>, Error> {
    Box::pin(async move {
        let rows = tx.query("SELECT DISTINCT owner FROM positions", &[]).await?;
        rows.iter().map(|row| row.text(0).map(str::to_owned)).collect()
    })
}

/// Notes how far the log is.
pub(crate) fn note_tail(tx: &mut WriteTx, tail: Cursor) -> TxFuture<'_, (), Error> {
    let (owner, scope) = LOG;
    let position = i64::try_from(tail.offset.0).unwrap_or(i64::MAX);
    save(tx, owner.to_owned(), name(tail.epoch), vec![(scope.to_owned(), position)])
}

/// The greatest position of the epoch.
pub(crate) async fn greatest(tx: &mut ReadTx, epoch: Epoch) -> Result<i64, Error> {
    let select = "SELECT COALESCE(MAX(position), 0) FROM positions WHERE epoch = $1";
    tx.query_opt(select, &[name(epoch).into()]).await?.map_or(Ok(0), |row| row.int(0))
}

/// Makes positions of the epoch `before` ones of `now`, up to where that epoch ended.
pub(crate) async fn take_over(tx: &mut WriteTx, before: Cursor, now: Epoch) -> Result<(), Error> {
    let update = "UPDATE positions SET epoch = $2, position = CASE WHEN position > $3 THEN $3 ELSE position END
        WHERE epoch = $1";
    let end = i64::try_from(before.offset.0).unwrap_or(i64::MAX);
    tx.execute(update, &[name(before.epoch).into(), name(now).into(), end.into()]).await.map(drop)
}

/// As the rows have it.
fn name(epoch: Epoch) -> String {
    epoch.0.simple().to_string()
}

//! Where identities stopped reading, by scope.

use trunkline_store::{
    ledger::{Error, Migration, ReadTx, TxFuture, WriteTx},
    log::{Clock, Cursor, Epoch},
};

use super::dead_letter::sql::DEAD_LETTERS;

/// Owner and scope of the log's own row; identities have other names.
pub(super) const LOG: (&str, &str) = ("log", "tail");

pub(crate) const MIGRATIONS: &[Migration] = &[POSITIONS, SAVED_AT, DEAD_LETTERS];

/// When somebody was there, in Unix seconds; 0 is not known.
const SAVED_AT: Migration = Migration {
    name: "session_0002_saved_at",
    sql: "ALTER TABLE positions ADD COLUMN saved_at BIGINT NOT NULL DEFAULT 0",
};

const POSITIONS: Migration = Migration {
    name: "session_0001_positions",
    sql: "CREATE TABLE positions (
        owner TEXT NOT NULL,
        scope TEXT NOT NULL,
        epoch TEXT NOT NULL,
        position BIGINT NOT NULL,
        PRIMARY KEY (owner, scope))",
};

/// Where somebody stopped, as it was saved.
#[derive(Clone, Copy)]
pub(crate) struct Position {
    pub(crate) offset: u64,
    saved_at: i64,
}

impl Position {
    /// It was not saved for so long that it is again when its owner comes, lest it is taken for an absentee's.
    pub(crate) fn is_old(self) -> bool {
        self.saved_at < now() - OLD_SECONDS
    }
}

const OLD_SECONDS: i64 = 24 * 60 * 60;

/// Positions only move forward within an epoch, so a session that ended late cannot take its successor back.
pub(crate) fn save(
    tx: &mut WriteTx,
    owner: String,
    epoch: String,
    positions: Vec<(String, i64)>,
    now: i64,
) -> TxFuture<'_, (), Error> {
    Box::pin(async move {
        for (scope, position) in positions {
            let params = [owner.as_str().into(), scope.into(), epoch.as_str().into(), position.into(), now.into()];
            tx.execute(
                "INSERT INTO positions (owner, scope, epoch, position, saved_at) VALUES ($1, $2, $3, $4, $5)
                ON CONFLICT (owner, scope) DO UPDATE
                SET epoch = excluded.epoch, position = excluded.position, saved_at = excluded.saved_at
                WHERE positions.epoch <> excluded.epoch OR positions.position <= excluded.position",
                &params,
            )
            .await?;
        }
        Ok(())
    })
}

/// The position, if it is of this epoch.
pub(crate) fn load(
    tx: &mut ReadTx,
    owner: String,
    scope: String,
    epoch: String,
) -> TxFuture<'_, Option<Position>, Error> {
    Box::pin(async move {
        let select = "SELECT position, saved_at FROM positions WHERE owner = $1 AND scope = $2 AND epoch = $3";
        let row = tx.query_opt(select, &[owner.into(), scope.into(), epoch.into()]).await?;
        row.map(|row| Ok(Position { offset: row.int(0)?.unsigned_abs(), saved_at: row.int(1)? })).transpose()
    })
}

/// When a position was saved last: of an owner, or of those whose names begin so, if that is not empty; 0 if there is none.
pub(super) fn last_saved(tx: &mut ReadTx, owner: String, prefix: String) -> TxFuture<'_, i64, Error> {
    Box::pin(async move {
        // Not by a range: engines sort names by the language that they are set to.
        let select = "SELECT COALESCE(MAX(saved_at), 0) FROM positions
            WHERE owner = $1 OR ($2 <> '' AND SUBSTR(owner, 1, LENGTH($2)) = $2)";
        tx.query_opt(select, &[owner.into(), prefix.into()]).await?.map_or(Ok(0), |row| row.int(0))
    })
}

/// Identities that stopped reading somewhere.
pub(crate) fn owners(tx: &mut ReadTx) -> TxFuture<'_, Vec<String>, Error> {
    Box::pin(async move {
        let rows = tx.query("SELECT DISTINCT owner FROM positions", &[]).await?;
        rows.iter().map(|row| row.text(0).map(str::to_owned)).collect()
    })
}

/// Gives rows of which it is not known when they were saved the time `now`, up to `most`; answers how many.
pub(super) fn date(tx: &mut WriteTx, now: i64, most: i64) -> TxFuture<'_, u64, Error> {
    Box::pin(async move {
        let update = "UPDATE positions SET saved_at = $1
            WHERE (owner, scope) IN (SELECT owner, scope FROM positions WHERE saved_at = 0 LIMIT $2)";
        tx.execute(update, &[now.into(), most.into()]).await
    })
}

/// The next `most` owners of positions after `after`, in order, each with the time of its last save.
pub(super) fn last_saves(tx: &mut ReadTx, after: String, most: i64) -> TxFuture<'_, Vec<(String, i64)>, Error> {
    Box::pin(async move {
        let select = "SELECT owner, MAX(saved_at) FROM positions WHERE owner > $1 AND owner <> $2
            GROUP BY owner ORDER BY owner LIMIT $3";
        let rows = tx.query(select, &[after.into(), LOG.0.into(), most.into()]).await?;
        rows.iter().map(|row| Ok((row.text(0)?.to_owned(), row.int(1)?))).collect()
    })
}

/// Notes that owners are there at `now`, and forgets the positions of others, unless one was saved since `before`.
pub(super) fn settle(
    tx: &mut WriteTx,
    here: Vec<String>,
    gone: Vec<String>,
    now: i64,
    before: i64,
) -> TxFuture<'_, (), Error> {
    Box::pin(async move {
        let touch = "UPDATE positions SET saved_at = $2 WHERE owner = $1";
        for owner in here {
            tx.execute(touch, &[owner.into(), now.into()]).await?;
        }
        let forget = "DELETE FROM positions WHERE owner = $1
            AND NOT EXISTS (SELECT 1 FROM positions p WHERE p.owner = $1 AND p.saved_at >= $2)";
        for owner in gone {
            tx.execute(forget, &[owner.into(), before.into()]).await?;
        }
        Ok(())
    })
}

/// Notes how far the log is.
pub(crate) fn note_tail(tx: &mut WriteTx, tail: Cursor, now: i64) -> TxFuture<'_, (), Error> {
    let (owner, scope) = LOG;
    let position = i64::try_from(tail.offset.0).unwrap_or(i64::MAX);
    save(tx, owner.to_owned(), name(tail.epoch), vec![(scope.to_owned(), position)], now)
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

/// Takes positions for saved so many seconds earlier.
#[cfg(test)]
pub(super) fn age(tx: &mut WriteTx, by: i64) -> TxFuture<'_, u64, Error> {
    Box::pin(async move { tx.execute("UPDATE positions SET saved_at = saved_at - $1", &[by.into()]).await })
}

/// The time as rows have it.
pub(crate) fn now() -> i64 {
    i64::try_from(Clock::system().now_ms() / 1000).unwrap_or(i64::MAX)
}

/// As the rows have it.
fn name(epoch: Epoch) -> String {
    epoch.0.simple().to_string()
}

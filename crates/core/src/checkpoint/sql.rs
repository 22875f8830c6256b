//! Rows of checkpoints. Expired ones are invisible, and go when their owner saves or with the next sweep.

use trunkline_store::ledger::{Error, Migration, ReadTx, TxFuture, WriteTx};

use super::{Checkpoint, SWEEP_STEP, too_large, too_many};
use crate::identity::SEPARATOR;

pub(crate) const MIGRATIONS: &[Migration] = &[TABLE, BY_EXPIRY, USE, BY_AGE];

/// Rows have their data before their time: without this, looking at times reads all data.
const BY_AGE: Migration = Migration {
    name: "checkpoint_0004_by_age",
    sql: "CREATE INDEX checkpoints_by_age ON checkpoints (owner, saved_at)",
};

/// How much is kept of the principals that have a limit together, see [`account`].
const USE: Migration = Migration {
    name: "checkpoint_0003_use",
    sql: "CREATE TABLE checkpoint_use (account TEXT PRIMARY KEY, bytes BIGINT NOT NULL)",
};

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

/// What is to be kept.
#[derive(Clone)]
pub(crate) struct New {
    pub(crate) owner: String,
    pub(crate) name: String,
    pub(crate) data: Vec<u8>,
    pub(crate) now: i64,
    pub(crate) expires_at: Option<i64>,
}

/// How much is kept at most.
#[derive(Clone, Copy)]
pub(crate) struct Quota {
    /// Of one owner.
    pub(crate) checkpoints: i64,
    /// Of all owners of one account; 0 is no limit.
    pub(crate) bytes: i64,
}

/// Keeps it, unless that would be more than `quota`.
pub(crate) fn save(tx: &mut WriteTx, new: New, quota: Quota) -> TxFuture<'_, (), crate::Error> {
    Box::pin(async move {
        let New { owner, name, data, now, expires_at } = new;
        let expired = "SELECT name FROM checkpoints WHERE owner = $1 AND expires_at <= $2 LIMIT $3";
        for row in tx.query(expired, &[owner.as_str().into(), now.into(), SWEEP_STEP.into()]).await? {
            remove(tx, &owner, row.text(0)?).await?;
        }
        let others = "SELECT COUNT(*) FROM checkpoints
            WHERE owner = $1 AND name <> $2 AND (expires_at IS NULL OR expires_at > $3)";
        let others = tx.query_opt(others, &[owner.as_str().into(), name.as_str().into(), now.into()]).await?;
        if others.map_or(Ok(0), |row| row.int(0))? >= quota.checkpoints {
            return Err(too_many(quota.checkpoints));
        }
        let (account, before, bytes) = (account(&owner), length(tx, &owner, &name).await?, data.len() as i64);
        let is_charged = bytes == before || charge(tx, &account, bytes - before, quota.bytes).await?;
        if !is_charged || (1..bytes).contains(&quota.bytes) {
            return Err(too_large(&account, quota.bytes));
        }
        let params = [owner.into(), name.into(), data.into(), now.into(), expires_at.into()];
        tx.execute(
            "INSERT INTO checkpoints (owner, name, data, saved_at, expires_at) VALUES ($1, $2, $3, $4, $5)
            ON CONFLICT (owner, name) DO UPDATE
            SET data = excluded.data, saved_at = excluded.saved_at, expires_at = excluded.expires_at",
            &params,
        )
        .await?;
        Ok(())
    })
}

/// Who shares one limit of bytes: the principals that live in a workspace, the windows of a user, the instances of an
/// implementation. Owners are written identities.
fn account(owner: &str) -> String {
    let parts: Vec<&str> = owner.splitn(3, SEPARATOR).collect();
    match parts[..] {
        ["ag" | "tu" | "ta", workspace, _] => ["workspace", workspace].join(SEPARATOR),
        [kind, name, ..] => [kind, name].join(SEPARATOR),
        _ => owner.to_owned(),
    }
}

/// Counts bytes in, or out; false if that would be more than `most`.
async fn charge(tx: &mut WriteTx, account: &str, bytes: i64, most: i64) -> Result<bool, Error> {
    let most = if most > 0 && bytes > 0 { most } else { i64::MAX };
    let count = "INSERT INTO checkpoint_use (account, bytes) VALUES ($1, $2)
        ON CONFLICT (account) DO UPDATE SET bytes = checkpoint_use.bytes + excluded.bytes
        WHERE checkpoint_use.bytes + excluded.bytes <= $3";
    Ok(tx.execute(count, &[account.into(), bytes.into(), most.into()]).await? > 0)
}

/// Bytes of a checkpoint, expired or not.
async fn length(tx: &mut WriteTx, owner: &str, name: &str) -> Result<i64, Error> {
    let select = "SELECT CAST(LENGTH(data) AS BIGINT) FROM checkpoints WHERE owner = $1 AND name = $2";
    tx.query_opt(select, &[owner.into(), name.into()]).await?.map_or(Ok(0), |row| row.int(0))
}

async fn remove(tx: &mut WriteTx, owner: &str, name: &str) -> Result<(), Error> {
    let bytes = length(tx, owner, name).await?;
    let remove = "DELETE FROM checkpoints WHERE owner = $1 AND name = $2";
    if tx.execute(remove, &[owner.into(), name.into()]).await? > 0 {
        charge(tx, &account(owner), -bytes, 0).await?;
    }
    Ok(())
}

/// Counts what earlier versions kept without counting.
pub(crate) fn count_up(tx: &mut WriteTx) -> TxFuture<'_, (), Error> {
    Box::pin(async move {
        if tx.query_opt("SELECT account FROM checkpoint_use LIMIT 1", &[]).await?.is_some() {
            return Ok(());
        }
        for row in
            tx.query("SELECT owner, CAST(SUM(LENGTH(data)) AS BIGINT) FROM checkpoints GROUP BY owner", &[]).await?
        {
            charge(tx, &account(row.text(0)?), row.int(1)?, 0).await?;
        }
        Ok(())
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
    Box::pin(async move { remove(tx, &owner, &name).await })
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
            remove(tx, row.text(0)?, row.text(1)?).await?;
        }
        Ok(rows.len() as i64)
    })
}

/// The next `most` tasks with assigned ids after `after` that have checkpoints, in order, each with the time of its last save.
pub(crate) fn last_saves(tx: &mut ReadTx, after: String, most: i64) -> TxFuture<'_, Vec<(String, i64)>, Error> {
    Box::pin(async move {
        let select = "SELECT owner, MAX(saved_at) FROM checkpoints WHERE owner > $1 AND owner LIKE 'ta::%'
            GROUP BY owner ORDER BY owner LIMIT $2";
        let rows = tx.query(select, &[after.into(), most.into()]).await?;
        rows.iter().map(|row| Ok((row.text(0)?.to_owned(), row.int(1)?))).collect()
    })
}

/// Removes some of an owner's, up to `most`; answers how many.
pub(crate) fn forget(tx: &mut WriteTx, owner: String, most: i64) -> TxFuture<'_, i64, Error> {
    Box::pin(async move {
        let select = "SELECT name FROM checkpoints WHERE owner = $1 LIMIT $2";
        let rows = tx.query(select, &[owner.as_str().into(), most.into()]).await?;
        for row in &rows {
            remove(tx, &owner, row.text(0)?).await?;
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

    const QUOTA: Quota = Quota { checkpoints: 10, bytes: 100 };

    fn new(owner: &str, name: &str, bytes: usize, expires_at: Option<i64>) -> New {
        New { owner: owner.to_owned(), name: name.to_owned(), data: vec![1; bytes], now: 0, expires_at }
    }

    async fn keep(ledger: &Ledger, new: New) -> Result<(), crate::Error> {
        ledger.write(move |tx| save(tx, new.clone(), QUOTA)).await
    }

    async fn used(ledger: &Ledger, account: &'static str) -> i64 {
        let select = "SELECT bytes FROM checkpoint_use WHERE account = $1";
        let used = ledger.read(move |tx| {
            Box::pin(async move {
                tx.query_opt(select, &[account.into()]).await?.map_or(Ok::<_, Error>(-1), |row| row.int(0))
            })
        });
        used.await.unwrap()
    }

    #[tokio::test]
    async fn a_workspace_keeps_so_many_bytes() {
        let dir = tempfile::tempdir().unwrap();
        let ledger = Ledger::open_sqlite(&dir.path().join("ledger"), MIGRATIONS, Options::default()).unwrap();
        keep(&ledger, new("ag::w::i::a", "k", 60, None)).await.unwrap();
        keep(&ledger, new("tu::w::i::b", "k", 40, None)).await.unwrap();
        for refused in
            [new("ta::w::i::c", "k", 1, None), new("ag::w::i::a", "k", 61, None), new("us::u::1", "k", 101, None)]
        {
            let error = keep(&ledger, refused).await.unwrap_err();
            assert_eq!((error.kind, error.code), (crate::Kind::Exhausted, "ERR_QUOTA"));
        }
        // Others have limits of their own, and what is smaller than what it replaces is always kept.
        keep(&ledger, new("us::u::1", "k", 100, None)).await.unwrap();
        keep(&ledger, new("us::u::2", "k", 1, None)).await.unwrap_err();
        keep(&ledger, new("ag::w::i::a", "k", 20, Some(5))).await.unwrap();
        assert_eq!((used(&ledger, "workspace::w").await, used(&ledger, "us::u").await), (60, 100));
        // What is deleted, expired or forgotten counts no longer.
        ledger.write(|tx| delete(tx, "tu::w::i::b".into(), "k".into())).await.unwrap();
        ledger.write(|tx| delete(tx, "tu::w::i::b".into(), "k".into())).await.unwrap();
        assert_eq!(used(&ledger, "workspace::w").await, 20);
        assert_eq!(ledger.write(|tx| expire(tx, 5, 10)).await.unwrap(), 1);
        assert_eq!(ledger.write(|tx| forget(tx, "us::u::1".into(), 10)).await.unwrap(), 1);
        assert_eq!((used(&ledger, "workspace::w").await, used(&ledger, "us::u").await), (0, 0));
    }

    #[tokio::test]
    async fn what_was_kept_before_it_was_counted_counts() {
        let dir = tempfile::tempdir().unwrap();
        let ledger = Ledger::open_sqlite(&dir.path().join("ledger"), MIGRATIONS, Options::default()).unwrap();
        for (owner, bytes) in [("ag::w::i::a", 30), ("ag::w::i::b", 40), ("us::u::1", 5)] {
            keep(&ledger, new(owner, "k", bytes, None)).await.unwrap();
        }
        let forget_use =
            ledger.write(|tx| Box::pin(async move { tx.execute("DELETE FROM checkpoint_use", &[]).await }));
        let forgotten: Result<u64, Error> = forget_use.await;
        forgotten.unwrap();
        for _ in 0..2 {
            ledger.write(count_up).await.unwrap();
            assert_eq!((used(&ledger, "workspace::w").await, used(&ledger, "us::u").await), (70, 5));
        }
    }

    #[tokio::test]
    async fn tasks_that_cannot_come_again_are_found() {
        let dir = tempfile::tempdir().unwrap();
        let ledger = Ledger::open_sqlite(&dir.path().join("ledger"), MIGRATIONS, Options::default()).unwrap();
        for (owner, now) in [("ta::w::i::1", 10), ("ta::w::i::2", 30), ("ag::w::i::3", 10), ("ta::w::i::4", 10)] {
            keep(&ledger, New { now, ..new(owner, "k", 1, None) }).await.unwrap();
        }
        let saves = |after: &'static str| ledger.read(move |tx| last_saves(tx, after.to_owned(), 2));
        assert_eq!(saves("").await.unwrap(), [("ta::w::i::1".into(), 10), ("ta::w::i::2".into(), 30)]);
        assert_eq!(saves("ta::w::i::2").await.unwrap(), [("ta::w::i::4".into(), 10)]);
    }

    #[tokio::test]
    async fn what_expired_goes_without_its_owner() {
        let dir = tempfile::tempdir().unwrap();
        let ledger = Ledger::open_sqlite(&dir.path().join("ledger"), MIGRATIONS, Options::default()).unwrap();
        for (owner, expires_at) in [("a", Some(10)), ("b", Some(20)), ("c", Some(30)), ("d", Some(99)), ("e", None)] {
            keep(&ledger, new(owner, "k", 1, expires_at)).await.unwrap();
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

//! Rows of sandboxes, and checkpoints of their artifacts. Texts that are not there are empty.

use std::sync::Arc;

use trunkline_store::ledger::{Error, Migration, ReadTx, Row, TxFuture, WriteTx};

use super::{Sandbox, Standing, artifacts::Kept, state::Status};

pub(crate) const MIGRATIONS: &[Migration] = &[Migration {
    name: "sandbox_0001_sandboxes",
    sql: "CREATE TABLE sandboxes (id TEXT PRIMARY KEY, project TEXT NOT NULL, status TEXT NOT NULL, summary TEXT NOT NULL,
            created_at BIGINT NOT NULL, last_heartbeat BIGINT NOT NULL, due_at BIGINT, since BIGINT NOT NULL,
            commands_to BIGINT NOT NULL, duty BIGINT NOT NULL, removed BIGINT NOT NULL, version BIGINT NOT NULL);
        CREATE INDEX sandboxes_project ON sandboxes (project);
        CREATE INDEX sandboxes_due ON sandboxes (due_at) WHERE due_at IS NOT NULL;
        CREATE TABLE sandbox_folds (sandbox TEXT PRIMARY KEY, epoch TEXT NOT NULL, folded_to BIGINT NOT NULL,
            rest TEXT NOT NULL);
        CREATE TABLE sandbox_artifacts (sandbox TEXT NOT NULL, seq BIGINT NOT NULL, created_by BIGINT NOT NULL,
            changed_by BIGINT NOT NULL, body TEXT NOT NULL, PRIMARY KEY (sandbox, seq))",
}];

macro_rules! columns {
    () => {
        "id, project, status, summary, created_at, last_heartbeat, due_at, since, commands_to, duty, removed, version"
    };
}

const GET: &str = concat!("SELECT ", columns!(), " FROM sandboxes WHERE id = $1");
const ALL: &str = concat!("SELECT ", columns!(), " FROM sandboxes WHERE removed = 0 ORDER BY created_at, id");
const OF: &str =
    concat!("SELECT ", columns!(), " FROM sandboxes WHERE project = $1 AND removed = 0 ORDER BY created_at, id");
const DUE: &str = concat!("SELECT ", columns!(), " FROM sandboxes WHERE due_at <= $1 ORDER BY due_at LIMIT 500");
const CONNECTED: &str =
    concat!("SELECT ", columns!(), " FROM sandboxes WHERE removed <> 0 OR status IN ('bootstrapping', 'live', 'idle')");

/// A sandbox, whether or not it is being removed.
pub(super) async fn get(tx: &mut ReadTx, id: &str) -> Result<Option<Standing>, Error> {
    tx.query_opt(GET, &[id.into()]).await?.as_ref().map(standing).transpose()
}

/// All sandboxes, or those of a project, oldest first.
pub(super) fn all(tx: &mut ReadTx, project: Option<String>) -> TxFuture<'_, Vec<Standing>, Error> {
    Box::pin(async move {
        let rows = match project {
            Some(project) => tx.query(OF, &[project.into()]).await?,
            None => tx.query(ALL, &[]).await?,
        };
        rows.iter().map(standing).collect()
    })
}

/// How many there are of each status.
pub(super) fn counts(tx: &mut ReadTx) -> TxFuture<'_, [(Status, i64); Status::ALL.len()], Error> {
    Box::pin(async move {
        let mut counts = Status::ALL.map(|status| (status, 0));
        let rows = tx.query("SELECT status, COUNT(*) FROM sandboxes WHERE removed = 0 GROUP BY status", &[]).await?;
        for row in &rows {
            let (word, count) = (row.text(0)?, row.int(1)?);
            counts.iter_mut().filter(|(status, _)| status.word() == word).for_each(|(_, known)| *known = count);
        }
        Ok(counts)
    })
}

/// Those that a server which starts has to look after.
pub(super) fn unsettled(tx: &mut ReadTx) -> TxFuture<'_, Vec<Standing>, Error> {
    Box::pin(async move { tx.query(CONNECTED, &[]).await?.iter().map(standing).collect() })
}

/// Those whose time is up.
pub(super) fn due(tx: &mut ReadTx, now: i64) -> TxFuture<'_, Vec<Standing>, Error> {
    Box::pin(async move { tx.query(DUE, &[now.into()]).await?.iter().map(standing).collect() })
}

/// When the next one's time is up.
pub(super) fn next_due(tx: &mut ReadTx) -> TxFuture<'_, Option<i64>, Error> {
    Box::pin(async move {
        let found = tx.query_opt("SELECT due_at FROM sandboxes WHERE due_at IS NOT NULL ORDER BY due_at LIMIT 1", &[]);
        found.await?.map_or(Ok(None), |row| row.int_opt(0))
    })
}

pub(super) async fn insert(tx: &mut WriteTx, row: &Standing) -> Result<(), Error> {
    let sql =
        concat!("INSERT INTO sandboxes (", columns!(), ") VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12)");
    let sandbox = &row.sandbox;
    let params = [
        sandbox.id.as_str().into(),
        sandbox.project.as_deref().unwrap_or_default().into(),
        sandbox.status.word().into(),
        sandbox.summary.as_deref().unwrap_or_default().into(),
        sandbox.created_at.into(),
        sandbox.last_heartbeat.into(),
        row.due_at.into(),
        row.since.into(),
        row.commands_to.into(),
        row.duty.into(),
        i64::from(row.removed).into(),
        row.version.into(),
    ];
    tx.execute(sql, &params).await.map(drop)
}

/// Writes what can change, and counts the version.
pub(super) async fn update(tx: &mut WriteTx, row: &Standing) -> Result<(), Error> {
    let sql = "UPDATE sandboxes SET status = $2, summary = $3, last_heartbeat = $4, due_at = $5, commands_to = $6,
        duty = $7, removed = $8, version = $9 WHERE id = $1";
    let sandbox = &row.sandbox;
    let params = [
        sandbox.id.as_str().into(),
        sandbox.status.word().into(),
        sandbox.summary.as_deref().unwrap_or_default().into(),
        sandbox.last_heartbeat.into(),
        row.due_at.into(),
        row.commands_to.into(),
        row.duty.into(),
        i64::from(row.removed).into(),
        row.version.into(),
    ];
    tx.execute(sql, &params).await.map(drop)
}

/// Notes signs of life that came in the meantime.
pub(super) fn note_beats(tx: &mut WriteTx, beats: Vec<(String, i64)>) -> TxFuture<'_, (), Error> {
    Box::pin(async move {
        for (id, at) in beats {
            let sql = "UPDATE sandboxes SET last_heartbeat = $2 WHERE id = $1 AND last_heartbeat < $2";
            tx.execute(sql, &[id.into(), at.into()]).await?;
        }
        Ok(())
    })
}

/// Notes how far a sandbox was told its commands.
pub(super) fn note_commands(tx: &mut WriteTx, id: String, through: i64) -> TxFuture<'_, (), Error> {
    Box::pin(async move {
        let sql = "UPDATE sandboxes SET commands_to = $2 WHERE id = $1 AND commands_to < $2";
        tx.execute(sql, &[id.into(), through.into()]).await.map(drop)
    })
}

/// Removes the row of a sandbox that is being removed, and its checkpoint.
pub(super) fn remove(tx: &mut WriteTx, id: String) -> TxFuture<'_, (), Error> {
    Box::pin(async move {
        for sql in [
            "DELETE FROM sandbox_artifacts WHERE sandbox = $1",
            "DELETE FROM sandbox_folds WHERE sandbox = $1",
            "DELETE FROM sandboxes WHERE id = $1 AND removed <> 0",
        ] {
            tx.execute(sql, &[id.as_str().into()]).await?;
        }
        Ok(())
    })
}

/// How far a checkpoint goes: the log's epoch, the offset, and what of the fold is not in artifacts.
pub(super) type Mark = (String, i64, String);

/// A checkpoint's mark and artifacts: when each was made and changed, and its JSON.
pub(super) type Checkpoint = (Mark, Vec<(i64, i64, String)>);

/// The checkpoint of a sandbox's artifacts, if there is one.
pub(super) fn checkpoint(tx: &mut ReadTx, id: String) -> TxFuture<'_, Option<Checkpoint>, Error> {
    Box::pin(async move {
        let sql = "SELECT epoch, folded_to, rest FROM sandbox_folds WHERE sandbox = $1";
        let Some(found) = tx.query_opt(sql, &[id.as_str().into()]).await? else { return Ok(None) };
        let mark = (found.text(0)?.to_owned(), found.int(1)?, found.text(2)?.to_owned());
        let sql = "SELECT created_by, changed_by, body FROM sandbox_artifacts WHERE sandbox = $1 ORDER BY seq";
        let rows = tx.query(sql, &[id.into()]).await?;
        let artifact = |row: &Row| Ok((row.int(0)?, row.int(1)?, row.text(2)?.to_owned()));
        Ok(Some((mark, rows.iter().map(artifact).collect::<Result<_, Error>>()?)))
    })
}

/// An artifact of a checkpoint, encoded. The artifact itself is let go: whoever goes on folding would have to copy it.
pub(super) struct Folded {
    seq: u64,
    created_by: u64,
    changed_by: u64,
    body: String,
}

impl Folded {
    pub(super) fn new(kept: &Kept) -> Result<Self, crate::Error> {
        let Kept { artifact, created_by, changed_by } = kept;
        Ok(Self { seq: artifact.seq, created_by: *created_by, changed_by: *changed_by, body: json(&**artifact)? })
    }
}

/// Puts what changed since the last checkpoint, unless a later one is there or the sandbox is gone.
pub(super) fn put_checkpoint(
    tx: &mut WriteTx,
    id: String,
    mark: Mark,
    changed: Arc<[Folded]>,
) -> TxFuture<'_, (), Error> {
    Box::pin(async move {
        let (epoch, folded_to, rest) = mark;
        let known = "SELECT epoch FROM sandbox_folds WHERE sandbox = $1";
        let known = tx.query_opt(known, &[id.as_str().into()]).await?;
        if known.is_some_and(|known| known.text(0).is_ok_and(|known| known != epoch)) {
            // Of another log: nothing of it goes on.
            for sql in
                ["DELETE FROM sandbox_artifacts WHERE sandbox = $1", "DELETE FROM sandbox_folds WHERE sandbox = $1"]
            {
                tx.execute(sql, &[id.as_str().into()]).await?;
            }
        }
        let sql = "INSERT INTO sandbox_folds (sandbox, epoch, folded_to, rest)
            SELECT id, CAST($2 AS TEXT), CAST($3 AS BIGINT), CAST($4 AS TEXT) FROM sandboxes WHERE id = $1 AND removed = 0
            ON CONFLICT (sandbox) DO UPDATE SET folded_to = excluded.folded_to, rest = excluded.rest
                WHERE sandbox_folds.folded_to < excluded.folded_to";
        if tx.execute(sql, &[id.as_str().into(), epoch.into(), folded_to.into(), rest.into()]).await? == 0 {
            return Ok(());
        }
        for folded in &*changed {
            let sql = "INSERT INTO sandbox_artifacts (sandbox, seq, created_by, changed_by, body)
                VALUES ($1, $2, $3, $4, $5) ON CONFLICT (sandbox, seq) DO UPDATE SET created_by = excluded.created_by,
                    changed_by = excluded.changed_by, body = excluded.body";
            let number = |number: u64| i64::try_from(number).unwrap_or(i64::MAX).into();
            let Folded { seq, created_by, changed_by, body } = folded;
            let params =
                [id.as_str().into(), number(*seq), number(*created_by), number(*changed_by), body.as_str().into()];
            tx.execute(sql, &params).await?;
        }
        Ok(())
    })
}

/// JSON for a column.
pub(super) fn json(value: &impl serde::Serialize) -> Result<String, crate::Error> {
    serde_json::to_string(value)
        .map_err(|e| crate::Error::new(crate::Kind::Internal, "ERR_INTERNAL", format!("a row cannot be written: {e}")))
}

fn standing(row: &Row) -> Result<Standing, Error> {
    let text = |column| row.text(column).map(ToOwned::to_owned);
    let some = |column| text(column).map(|text| Some(text).filter(|text| !text.is_empty()));
    let unknown = |word: &str| Error::Statement { reason: format!("sandbox of unknown status {word:?}").into() };
    let status = row.text(2)?;
    Ok(Standing {
        sandbox: Sandbox {
            id: text(0)?,
            project: some(1)?,
            status: Status::parse(status).ok_or_else(|| unknown(status))?,
            summary: some(3)?,
            created_at: row.int(4)?,
            last_heartbeat: row.int(5)?,
        },
        due_at: row.int_opt(6)?,
        since: row.int(7)?,
        commands_to: row.int(8)?,
        duty: row.int(9)?,
        removed: row.int(10)? != 0,
        version: row.int(11)?,
    })
}

//! Rows of sandboxes, and checkpoints of their artifacts. Texts that are not there are empty.

use std::sync::Arc;

use trunkline_store::{
    ledger::{Error, Migration, ReadTx, Row, TxFuture, Value, WriteTx},
    log::{Cursor, Epoch, Offset},
};

use super::{
    Sandbox, Standing,
    artifacts::{Kept, Pieces},
    state::Status,
};

/// Limits of one page of a checkpoint that is read: versions of artifacts, and bytes of them besides the last one.
const READ_PAGE: i64 = 2048;
const READ_BYTES: i64 = 1024 * 1024;

/// Artifacts of a checkpoint that are removed at once.
const REMOVE_PAGE: i64 = 64;

pub(crate) const MIGRATIONS: &[Migration] = &[
    Migration {
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
    },
    Migration {
        name: "sandbox_0002_pieces",
        sql: "CREATE TABLE sandbox_versions (sandbox TEXT NOT NULL, seq BIGINT NOT NULL, changed_by BIGINT NOT NULL,
                created_by BIGINT NOT NULL, body TEXT NOT NULL, PRIMARY KEY (sandbox, seq, changed_by));
            INSERT INTO sandbox_versions (sandbox, seq, changed_by, created_by, body)
                SELECT sandbox, seq, changed_by, created_by, body FROM sandbox_artifacts;
            DROP TABLE sandbox_artifacts;
            ALTER TABLE sandbox_folds ADD COLUMN bytes BIGINT NOT NULL DEFAULT 0;
            ALTER TABLE sandbox_folds ADD COLUMN artifacts BIGINT NOT NULL DEFAULT 0;
            ALTER TABLE sandbox_folds ADD COLUMN told BIGINT NOT NULL DEFAULT 0;
            ALTER TABLE sandboxes ADD COLUMN signs_to BIGINT NOT NULL DEFAULT 0",
    },
];

macro_rules! columns {
    () => {
        "id, project, status, summary, created_at, last_heartbeat, due_at, since, commands_to, duty, removed, version, signs_to"
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
    let sql = concat!(
        "INSERT INTO sandboxes (",
        columns!(),
        ") VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13)"
    );
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
        row.signs_to.into(),
    ];
    tx.execute(sql, &params).await.map(drop)
}

/// Writes what can change, and counts the version.
pub(super) async fn update(tx: &mut WriteTx, row: &Standing) -> Result<(), Error> {
    let sql = "UPDATE sandboxes SET status = $2, summary = $3, last_heartbeat = $4, due_at = $5, commands_to = $6,
        duty = $7, removed = $8, version = $9, signs_to = $10 WHERE id = $1";
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
        row.signs_to.into(),
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

/// Gives a sandbox that has not come yet more time.
pub(super) fn postpone(tx: &mut WriteTx, id: String, due_at: i64) -> TxFuture<'_, (), Error> {
    Box::pin(async move {
        let sql = "UPDATE sandboxes SET due_at = $2 WHERE id = $1 AND status = 'bootstrapping' AND removed = 0";
        tx.execute(sql, &[id.into(), due_at.into()]).await.map(drop)
    })
}

/// Notes how far a sandbox was told its commands.
pub(super) fn note_commands(tx: &mut WriteTx, id: String, through: i64) -> TxFuture<'_, (), Error> {
    Box::pin(async move {
        let sql = "UPDATE sandboxes SET commands_to = $2 WHERE id = $1 AND commands_to < $2";
        tx.execute(sql, &[id.into(), through.into()]).await.map(drop)
    })
}

/// Removes the row of a sandbox that is being removed.
pub(super) fn remove(tx: &mut WriteTx, id: String) -> TxFuture<'_, (), Error> {
    Box::pin(
        async move { tx.execute("DELETE FROM sandboxes WHERE id = $1 AND removed <> 0", &[id.into()]).await.map(drop) },
    )
}

/// How far a checkpoint goes, and what it comes to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Mark {
    /// The log's.
    pub(super) epoch: String,
    pub(super) folded_to: i64,
    /// What of the fold is not in artifacts.
    pub(super) rest: String,
    /// Memory that the artifacts take, how many they are, and bytes of events that are in them.
    pub(super) bytes: i64,
    pub(super) artifacts: i64,
    pub(super) told: i64,
}

/// The mark of a sandbox's checkpoint, if there is one.
pub(super) fn mark(tx: &mut ReadTx, id: String) -> TxFuture<'_, Option<Mark>, Error> {
    Box::pin(async move {
        let sql = "SELECT epoch, folded_to, rest, bytes, artifacts, told FROM sandbox_folds WHERE sandbox = $1";
        let Some(row) = tx.query_opt(sql, &[id.into()]).await? else { return Ok(None) };
        let (epoch, folded_to, rest) = (row.text(0)?.to_owned(), row.int(1)?, row.text(2)?.to_owned());
        Ok(Some(Mark { epoch, folded_to, rest, bytes: row.int(3)?, artifacts: row.int(4)?, told: row.int(5)? }))
    })
}

/// An artifact of a checkpoint in one of its versions, as it is kept.
pub(super) struct Version {
    pub(super) seq: i64,
    pub(super) changed_by: i64,
    pub(super) created_by: i64,
    pub(super) body: String,
}

/// Some artifacts of a checkpoint in all of their versions, from behind one of them.
pub(super) fn artifacts(tx: &mut ReadTx, id: String, after: (i64, i64)) -> TxFuture<'_, Vec<Version>, Error> {
    Box::pin(async move {
        // How long they are is known without reading them.
        let sql = "SELECT seq, changed_by, CAST(octet_length(body) AS BIGINT) FROM sandbox_versions
            WHERE sandbox = $1 AND (seq, changed_by) > ($2, $3) ORDER BY seq, changed_by LIMIT $4";
        let lengths = tx.query(sql, &[id.as_str().into(), after.0.into(), after.1.into(), READ_PAGE.into()]).await?;
        let (mut through, mut bytes) = (after, 0);
        for row in &lengths {
            if bytes >= READ_BYTES {
                break;
            }
            (through, bytes) = ((row.int(0)?, row.int(1)?), bytes + row.int(2)?);
        }
        let sql = "SELECT seq, changed_by, created_by, body FROM sandbox_versions
            WHERE sandbox = $1 AND (seq, changed_by) > ($2, $3) AND (seq, changed_by) <= ($4, $5)
            ORDER BY seq, changed_by";
        let between = [after.0, after.1, through.0, through.1].map(Into::into);
        let rows = tx.query(sql, &[&[id.into()], &between[..]].concat()).await?;
        let version = |row: &Row| {
            let body = row.text(3)?.to_owned();
            Ok(Version { seq: row.int(0)?, changed_by: row.int(1)?, created_by: row.int(2)?, body })
        };
        rows.iter().map(version).collect()
    })
}

/// An artifact of a checkpoint, encoded.
pub(super) struct Folded {
    seq: u64,
    created_by: u64,
    changed_by: u64,
    body: String,
}

impl Folded {
    pub(super) fn new(kept: &Kept) -> Result<Self, crate::Error> {
        let Kept { artifact, created_by, changed_by } = kept;
        let mut body = bytes::BytesMut::new();
        Pieces::new(artifact.clone()).write(&mut body, usize::MAX);
        let body = String::from_utf8(body.into()).map_err(|e| unwritable(&e))?;
        Ok(Self { seq: artifact.seq, created_by: *created_by, changed_by: *changed_by, body })
    }

    /// How large it is.
    pub(super) fn bytes(&self) -> usize {
        64 + self.body.len()
    }

    /// Which version of which artifact it is.
    pub(super) fn version(&self) -> (u64, u64) {
        (self.seq, self.changed_by)
    }
}

/// Puts versions of artifacts, unless the sandbox that began there is gone.
pub(super) fn put_artifacts(tx: &mut WriteTx, id: String, since: i64, piece: Arc<[Folded]>) -> TxFuture<'_, (), Error> {
    Box::pin(async move {
        for Folded { seq, created_by, changed_by, body } in &*piece {
            let sql = "INSERT INTO sandbox_versions (sandbox, seq, changed_by, created_by, body)
                SELECT id, CAST($3 AS BIGINT), CAST($4 AS BIGINT), CAST($5 AS BIGINT), CAST($6 AS TEXT)
                    FROM sandboxes WHERE id = $1 AND since = $2 AND removed = 0
                ON CONFLICT (sandbox, seq, changed_by) DO UPDATE SET created_by = excluded.created_by,
                    body = excluded.body";
            let params = [
                id.as_str().into(),
                since.into(),
                number(*seq),
                number(*changed_by),
                number(*created_by),
                body.as_str().into(),
            ];
            tx.execute(sql, &params).await?;
        }
        Ok(())
    })
}

/// Puts the mark of a checkpoint whose artifacts are there, unless a later one is there or the sandbox is gone; answers whether.
pub(super) fn put_mark(tx: &mut WriteTx, id: String, since: i64, mark: Mark) -> TxFuture<'_, bool, Error> {
    Box::pin(async move {
        let sql = "INSERT INTO sandbox_folds (sandbox, epoch, folded_to, rest, bytes, artifacts, told)
            SELECT id, CAST($3 AS TEXT), CAST($4 AS BIGINT), CAST($5 AS TEXT), CAST($6 AS BIGINT), CAST($7 AS BIGINT),
                CAST($8 AS BIGINT) FROM sandboxes WHERE id = $1 AND since = $2 AND removed = 0
            ON CONFLICT (sandbox) DO UPDATE SET epoch = excluded.epoch, folded_to = excluded.folded_to,
                rest = excluded.rest, bytes = excluded.bytes, artifacts = excluded.artifacts, told = excluded.told
                WHERE sandbox_folds.epoch <> excluded.epoch OR sandbox_folds.folded_to < excluded.folded_to";
        let Mark { epoch, folded_to, rest, bytes, artifacts, told } = mark;
        let params = [
            id.into(),
            since.into(),
            epoch.into(),
            folded_to.into(),
            rest.into(),
            bytes.into(),
            artifacts.into(),
            told.into(),
        ];
        Ok(tx.execute(sql, &params).await? > 0)
    })
}

/// Removes what came before these versions of artifacts.
pub(super) fn remove_older(tx: &mut WriteTx, id: String, versions: Vec<(u64, u64)>) -> TxFuture<'_, (), Error> {
    Box::pin(async move {
        for (seq, changed_by) in versions {
            let sql = "DELETE FROM sandbox_versions WHERE sandbox = $1 AND seq = $2 AND changed_by < $3";
            tx.execute(sql, &[id.as_str().into(), number(seq), number(changed_by)]).await?;
        }
        Ok(())
    })
}

/// Puts a checkpoint of one piece.
pub(super) fn put_checkpoint(
    tx: &mut WriteTx,
    id: String,
    since: i64,
    piece: Arc<[Folded]>,
    mark: Mark,
    versions: Vec<(u64, u64)>,
) -> TxFuture<'_, (), Error> {
    Box::pin(async move {
        put_artifacts(tx, id.clone(), since, piece).await?;
        if put_mark(tx, id.clone(), since, mark).await? {
            remove_older(tx, id, versions).await?;
        }
        Ok(())
    })
}

/// Removes a checkpoint's mark.
pub(super) fn remove_mark(tx: &mut WriteTx, id: String) -> TxFuture<'_, (), Error> {
    Box::pin(async move { tx.execute("DELETE FROM sandbox_folds WHERE sandbox = $1", &[id.into()]).await.map(drop) })
}

/// Removes some of a checkpoint's artifacts; answers whether there were any.
pub(super) fn remove_artifacts(tx: &mut WriteTx, id: String) -> TxFuture<'_, bool, Error> {
    Box::pin(async move {
        let sql = "DELETE FROM sandbox_versions WHERE sandbox = $1 AND seq IN
            (SELECT seq FROM sandbox_versions WHERE sandbox = $1 ORDER BY seq LIMIT $2)";
        Ok(tx.execute(sql, &[id.into(), REMOVE_PAGE.into()]).await? > 0)
    })
}

fn number(number: u64) -> Value {
    i64::try_from(number).unwrap_or(i64::MAX).into()
}

fn unwritable(error: &impl std::fmt::Display) -> crate::Error {
    crate::Error::new(crate::Kind::Internal, "ERR_INTERNAL", format!("a row cannot be written: {error}"))
}

/// JSON for a column.
pub(super) fn json(value: &impl serde::Serialize) -> Result<String, crate::Error> {
    serde_json::to_string(value).map_err(|e| unwritable(&e))
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
        signs_to: row.int(12)?,
    })
}

/// The greatest offset of the epoch that a checkpoint goes to.
pub(crate) async fn greatest(tx: &mut ReadTx, epoch: Epoch) -> Result<i64, Error> {
    let select = "SELECT COALESCE(MAX(folded_to), 0) FROM sandbox_folds WHERE epoch = $1";
    tx.query_opt(select, &[epoch.0.to_string().into()]).await?.map_or(Ok(0), |row| row.int(0))
}

/// The greatest offset that any sandbox began at, was told its commands to, or gave signs at: their epoch is not kept.
pub(crate) async fn greatest_of_any(tx: &mut ReadTx) -> Result<i64, Error> {
    let select =
        "SELECT COALESCE(MAX(commands_to), 0), COALESCE(MAX(since), 0), COALESCE(MAX(signs_to), 0) FROM sandboxes";
    let Some(row) = tx.query_opt(select, &[]).await? else { return Ok(0) };
    Ok(row.int(0)?.max(row.int(1)?).max(row.int(2)?))
}

/// Makes checkpoints of the epoch `before` ones of `now`. Those beyond its end are of events that the log does not have.
pub(crate) async fn take_over(tx: &mut WriteTx, before: Cursor, now: Epoch) -> Result<(), Error> {
    let (epoch, end) = (before.epoch.0.to_string(), i64::try_from(before.offset.0).unwrap_or(i64::MAX));
    let beyond = "DELETE FROM sandbox_versions
        WHERE sandbox IN (SELECT sandbox FROM sandbox_folds WHERE epoch = $1 AND folded_to > $2)";
    tx.execute(beyond, &[epoch.as_str().into(), end.into()]).await?;
    let beyond = "DELETE FROM sandbox_folds WHERE epoch = $1 AND folded_to > $2";
    tx.execute(beyond, &[epoch.as_str().into(), end.into()]).await?;
    let others = "UPDATE sandbox_folds SET epoch = $2 WHERE epoch = $1";
    tx.execute(others, &[epoch.into(), now.0.to_string().into()]).await.map(drop)
}

/// No sandbox begins, was told its commands, or gave signs beyond the tail.
pub(crate) async fn pull_back(tx: &mut WriteTx, tail: Offset) -> Result<(), Error> {
    let tail = i64::try_from(tail.0).unwrap_or(i64::MAX);
    tx.execute("UPDATE sandboxes SET commands_to = $1 WHERE commands_to > $1", &[tail.into()]).await?;
    tx.execute("UPDATE sandboxes SET signs_to = $1 WHERE signs_to > $1", &[tail.into()]).await?;
    tx.execute("UPDATE sandboxes SET since = $1 WHERE since > $1", &[tail.into()]).await.map(drop)
}

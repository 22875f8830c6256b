//! Rows of the audit trail.

use trunkline_store::{
    ledger::{Error, Migration, ReadTx, Row, TxFuture, Value, WriteTx},
    log::Clock,
};

use super::{EXCLUDED_MAX, Entry, Event, Filter};
use crate::limits::{COUNT_MAX, LIST_BYTES_MAX};

pub(crate) const MIGRATIONS: &[Migration] = &[Migration {
    name: "audit_0001_trail",
    sql: "CREATE TABLE audit (id BIGINT PRIMARY KEY, at BIGINT NOT NULL, kind TEXT NOT NULL, actor_kind TEXT NOT NULL,
            actor TEXT NOT NULL, session TEXT NOT NULL, resource_kind TEXT NOT NULL, resource_id TEXT NOT NULL,
            operation TEXT NOT NULL, workspace TEXT NOT NULL, success BIGINT NOT NULL, error TEXT NOT NULL,
            metadata TEXT NOT NULL);
        CREATE INDEX audit_by_workspace ON audit (workspace, id);
        CREATE INDEX audit_by_actor ON audit (actor, id)",
}];

/// Ids of one millisecond.
const IDS_PER_MS: i64 = 1 << 20;

const LAST: &str = "SELECT COALESCE(MAX(id), 0) FROM audit";

const INSERT: &str =
    "INSERT INTO audit (id, at, kind, actor_kind, actor, session, resource_kind, resource_id, operation,
        workspace, success, error, metadata)
    VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13)";

/// What fits a filter, with [`EXCLUDED_MAX`] places for each of both exclusions. The first term names the index.
macro_rules! fitting {
    ($by:literal) => {
        concat!(
            " WHERE ",
            $by,
            " AND ($1 = 0 OR at >= $1) AND ($2 = 0 OR at <= $2) AND ($3 = '' OR kind = $3)
            AND ($4 = '' OR actor_kind = $4) AND ($5 = '' OR actor = $5) AND ($6 = '' OR resource_kind = $6)
            AND ($7 = '' OR resource_id = $7) AND ($8 = '' OR operation = $8) AND ($9 = '' OR workspace = $9)
            AND ($10 = 0 OR success = 0)
            AND actor_kind NOT IN ($11, $12, $13, $14, $15, $16, $17, $18, $19, $20, $21, $22, $23, $24, $25, $26)
            AND workspace NOT IN ($27, $28, $29, $30, $31, $32, $33, $34, $35, $36, $37, $38, $39, $40, $41, $42)"
        )
    };
}

/// A piece of a page, and a count up to a bound, of the events that fit.
macro_rules! listing {
    ($by:literal) => {
        (
            concat!(
                "SELECT id, at, kind, actor_kind, actor, session, resource_kind, resource_id, operation, workspace, success,
                    error, metadata FROM audit",
                fitting!($by),
                " AND id < $43 ORDER BY id DESC LIMIT $44 OFFSET $45"
            ),
            concat!("SELECT COUNT(*) FROM (SELECT 1 FROM audit", fitting!($by), " LIMIT $43) AS counted"),
        )
    };
}

/// Events that are read at a time: one may have 3 MiB, and a page ends where its bytes do.
const PIECE: i64 = 16;

const REMOVE: &str = "DELETE FROM audit WHERE id < $1";

/// Fills the places of an exclusion that are not used: neither a kind nor a workspace is called so.
const NOBODY: &str = "::";

pub(super) fn insert(tx: &mut WriteTx, entry: Entry) -> TxFuture<'_, (), crate::Error> {
    Box::pin(async move {
        let last = tx.query_opt(LAST, &[]).await?.map_or(Ok(0), |row| row.int(0))?;
        let now_ms = i64::try_from(Clock::system().now_ms()).unwrap_or(i64::MAX);
        let Event { kind, operation, resource_kind, resource_id, workspace, success, error, metadata } = entry.event;
        let metadata = serde_json::to_string(&metadata).unwrap_or_default();
        let params = [
            (now_ms * IDS_PER_MS).max(last + 1).into(),
            entry.at.into(),
            kind.into(),
            entry.actor_kind.into(),
            entry.actor.into(),
            entry.session.into(),
            resource_kind.into(),
            resource_id.into(),
            operation.into(),
            workspace.into(),
            i64::from(success).into(),
            error.into(),
            metadata.into(),
        ];
        tx.execute(INSERT, &params).await?;
        Ok(())
    })
}

/// A page, and how many events fit, up to [`COUNT_MAX`].
pub(super) fn select(tx: &mut ReadTx, filter: Filter) -> TxFuture<'_, (Vec<Entry>, i64), Error> {
    Box::pin(async move {
        let (page, count) = match &filter {
            Filter { actor, .. } if !actor.is_empty() => listing!("actor = $5"),
            Filter { workspace, .. } if !workspace.is_empty() => listing!("workspace = $9"),
            _ => listing!("1 = 1"),
        };
        let (limit, mut offset) = (usize::try_from(filter.limit).unwrap_or(0), filter.offset);
        let mut params = params(filter);
        let fitting = params.len();
        params.push(COUNT_MAX.into());
        let total = tx.query_opt(count, &params).await?.map_or(Ok(0), |row| row.int(0))?;
        let (mut entries, mut bytes, mut before) = (Vec::new(), 0, i64::MAX);
        while entries.len() < limit {
            params.truncate(fitting);
            let most = PIECE.min((limit - entries.len()) as i64);
            params.extend([before.into(), most.into(), offset.into()]);
            let rows = tx.query(page, &params).await?;
            for row in &rows {
                bytes += row.bytes_in_all();
                if !entries.is_empty() && bytes > LIST_BYTES_MAX {
                    return Ok((entries, total));
                }
                entries.push(entry(row)?);
            }
            let Some(last) = rows.last().filter(|_| rows.len() as i64 == most) else { break };
            (before, offset) = (last.int(0)?, 0);
        }
        Ok((entries, total))
    })
}

/// What [`fitting`] takes.
fn params(filter: Filter) -> Vec<Value> {
    let mut params: Vec<Value> = vec![
        filter.from.max(0).into(),
        filter.to.max(0).into(),
        filter.kind.into(),
        filter.actor_kind.into(),
        filter.actor.into(),
        filter.resource_kind.into(),
        filter.resource_id.into(),
        filter.operation.into(),
        filter.workspace.into(),
        i64::from(filter.only_failures).into(),
    ];
    for excluded in [filter.except_actor_kinds, filter.except_workspaces] {
        let unused = std::iter::repeat_with(|| NOBODY.to_owned());
        params.extend(excluded.into_iter().chain(unused).take(EXCLUDED_MAX).map(Value::from));
    }
    params
}

/// By id, which begins with the time.
pub(super) fn remove(tx: &mut WriteTx, before: i64) -> TxFuture<'_, (), crate::Error> {
    Box::pin(async move {
        let id = before.saturating_mul(1000).saturating_mul(IDS_PER_MS);
        tx.execute(REMOVE, &[id.into()]).await?;
        Ok(())
    })
}

fn entry(row: &Row) -> Result<Entry, Error> {
    let text = |column| row.text(column).map(ToOwned::to_owned);
    Ok(Entry {
        id: row.int(0)?,
        at: row.int(1)?,
        actor_kind: text(3)?,
        actor: text(4)?,
        session: text(5)?,
        event: Event {
            kind: text(2)?,
            resource_kind: text(6)?,
            resource_id: text(7)?,
            operation: text(8)?,
            workspace: text(9)?,
            success: row.int(10)? != 0,
            error: text(11)?,
            metadata: serde_json::from_str(row.text(12)?).unwrap_or_default(),
        },
    })
}

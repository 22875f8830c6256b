//! Rows of rules and fallbacks. Every change takes the next version, so that whoever keeps them in memory can tell
//! whether it has missed one.

use trunkline_store::ledger::{Error, Migration, ReadTx, Row, TxFuture, WriteTx};

use crate::gate::rules::{Fallback, Level, Name, Rule, Rules};

/// The published fallbacks: what everybody may do until rules say otherwise.
pub(crate) const MIGRATIONS: &[Migration] = &[Migration {
    name: "rule_0001_rules",
    sql: "CREATE TABLE rules (id TEXT NOT NULL, principal_kind TEXT NOT NULL, principal_id TEXT NOT NULL,
            resource_kind TEXT NOT NULL, resource_id TEXT NOT NULL, level BIGINT NOT NULL, granted_by TEXT NOT NULL,
            granted_at BIGINT NOT NULL, expires_at BIGINT, reason TEXT NOT NULL,
            PRIMARY KEY (principal_kind, principal_id, resource_kind, resource_id));
        CREATE TABLE rule_fallbacks (category TEXT PRIMARY KEY, level BIGINT NOT NULL, updated_by TEXT NOT NULL,
            updated_at BIGINT NOT NULL);
        CREATE TABLE rule_version (version BIGINT NOT NULL);
        INSERT INTO rule_version (version) VALUES (0);
        INSERT INTO rule_fallbacks (category, level, updated_by, updated_at) VALUES
            ('user_workspace', 20, '_system', 0), ('agent_workspace', 20, '_system', 0),
            ('task_workspace', 20, '_system', 0), ('user_agent', 20, '_system', 0), ('agent_agent', 20, '_system', 0),
            ('global_read', 20, '_system', 0), ('orchestrator_system', 20, '_system', 0),
            ('user_kv_scope', 0, '_system', 0), ('agent_kv_scope', 0, '_system', 0),
            ('task_kv_scope', 0, '_system', 0), ('service_kv_scope', 0, '_system', 0),
            ('agent_kv_key', 20, '_system', 0), ('task_kv_key', 20, '_system', 0)",
}];

const NEXT_VERSION: &str = "UPDATE rule_version SET version = version + 1 RETURNING version";

const PUT: &str = "INSERT INTO rules (id, principal_kind, principal_id, resource_kind, resource_id, level, granted_by,
        granted_at, expires_at, reason) VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10)
    ON CONFLICT (principal_kind, principal_id, resource_kind, resource_id) DO UPDATE SET level = excluded.level,
        granted_by = excluded.granted_by, granted_at = excluded.granted_at, expires_at = excluded.expires_at,
        reason = excluded.reason
    RETURNING id";

const REMOVE: &str = "DELETE FROM rules WHERE principal_kind = $1 AND principal_id = $2 AND resource_kind = $3
    AND resource_id = $4";

const PUT_FALLBACK: &str =
    "INSERT INTO rule_fallbacks (category, level, updated_by, updated_at) VALUES ($1, $2, $3, $4)
    ON CONFLICT (category) DO UPDATE SET level = excluded.level, updated_by = excluded.updated_by,
        updated_at = excluded.updated_at";

/// Answers the rule as it is kept, and the version.
pub(crate) fn put(tx: &mut WriteTx, rule: Rule) -> TxFuture<'_, (Rule, i64), Error> {
    Box::pin(async move {
        let params = [
            rule.id.as_str().into(),
            rule.principal.kind.as_str().into(),
            rule.principal.id.as_str().into(),
            rule.resource.kind.as_str().into(),
            rule.resource.id.as_str().into(),
            rule.level.number().into(),
            rule.granted_by.as_str().into(),
            rule.granted_at.into(),
            rule.expires_at.into(),
            rule.reason.as_str().into(),
        ];
        let kept = tx.query_opt(PUT, &params).await?;
        let id = kept.map_or(Ok(rule.id.clone()), |row| row.text(0).map(str::to_owned))?;
        Ok((Rule { id, ..rule }, next_version(tx).await?))
    })
}

/// Answers whether there was one, and the version.
pub(crate) fn remove(tx: &mut WriteTx, principal: Name, resource: Name) -> TxFuture<'_, (bool, i64), Error> {
    Box::pin(async move {
        let params = [principal.kind.into(), principal.id.into(), resource.kind.into(), resource.id.into()];
        let removed = tx.execute(REMOVE, &params).await? > 0;
        Ok((removed, next_version(tx).await?))
    })
}

pub(crate) fn put_fallback(tx: &mut WriteTx, category: String, fallback: Fallback) -> TxFuture<'_, i64, Error> {
    Box::pin(async move {
        let level = fallback.level.number();
        let params = [category.into(), level.into(), fallback.updated_by.into(), fallback.updated_at.into()];
        tx.execute(PUT_FALLBACK, &params).await?;
        next_version(tx).await
    })
}

async fn next_version(tx: &mut WriteTx) -> Result<i64, Error> {
    tx.query_opt(NEXT_VERSION, &[]).await?.map_or(Ok(0), |row| row.int(0))
}

/// Everything, and the version that it is.
pub(crate) fn load(tx: &mut ReadTx) -> TxFuture<'_, (Rules, i64), Error> {
    Box::pin(async move {
        let mut rules = Rules::default();
        let columns =
            "SELECT id, principal_kind, principal_id, resource_kind, resource_id, level, granted_by, granted_at,
            expires_at, reason FROM rules";
        for row in tx.query(columns, &[]).await? {
            rules.put(rule(&row)?);
        }
        for row in tx.query("SELECT category, level, updated_by, updated_at FROM rule_fallbacks", &[]).await? {
            let (level, updated_by, updated_at) = (level(&row, 1)?, row.text(2)?.to_owned(), row.int(3)?);
            rules.set_fallback(row.text(0)?.to_owned(), Fallback { level, updated_by, updated_at });
        }
        let version = tx.query_opt("SELECT version FROM rule_version", &[]).await?;
        Ok((rules, version.map_or(Ok(0), |row| row.int(0))?))
    })
}

fn rule(row: &Row) -> Result<Rule, Error> {
    Ok(Rule {
        id: row.text(0)?.to_owned(),
        principal: Name::new(row.text(1)?, row.text(2)?),
        resource: Name::new(row.text(3)?, row.text(4)?),
        level: level(row, 5)?,
        granted_by: row.text(6)?.to_owned(),
        granted_at: row.int(7)?,
        expires_at: row.int_opt(8)?,
        reason: row.text(9)?.to_owned(),
    })
}

fn level(row: &Row, column: usize) -> Result<Level, Error> {
    let number = row.int(column)?;
    Level::new(number).map_err(|_| Error::Statement { reason: format!("{number} is no access level").into() })
}

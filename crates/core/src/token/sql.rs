//! Rows of API keys. Lists are kept as lines.

use trunkline_store::ledger::{Error, Migration, ReadTx, Row, TxFuture, WriteTx};

use super::Token;
use crate::identity::PrincipalKind;

pub(crate) const MIGRATIONS: &[Migration] = &[
    Migration {
    name: "token_0001_tokens",
    sql: "CREATE TABLE tokens (id TEXT PRIMARY KEY, hash TEXT NOT NULL UNIQUE, name TEXT NOT NULL, kind TEXT NOT NULL,
        created_by TEXT NOT NULL, workspace_patterns TEXT NOT NULL, scopes TEXT NOT NULL, created_at BIGINT NOT NULL,
        expires_at BIGINT, last_used_at BIGINT, revoked_at BIGINT)",
    },
    Migration { name: "token_0002_project", sql: "ALTER TABLE tokens ADD COLUMN acts_in TEXT NOT NULL DEFAULT ''" },
];

const INSERT: &str = "INSERT INTO tokens (id, hash, name, kind, created_by, workspace_patterns, scopes, created_at,
    expires_at) VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9)";

const ALL: &str = "SELECT id, name, kind, created_by, workspace_patterns, scopes, created_at, expires_at, last_used_at,
    revoked_at, acts_in FROM tokens ORDER BY created_at DESC, id";

/// Kind of the administrator's key. Not empty, so that a row that lost its kind opens nothing.
const ANY_KIND: &str = "*";

/// A key is noted as used at most once a minute, so that connecting does not wait for the disk each time.
const USED: &str =
    "SELECT id, name, kind, created_by, workspace_patterns, scopes, created_at, expires_at, last_used_at,
    revoked_at, acts_in FROM tokens WHERE hash = $1 AND revoked_at IS NULL AND (expires_at IS NULL OR expires_at > $2)";
const IS_GOOD: &str = "SELECT id FROM tokens WHERE id = $1 AND revoked_at IS NULL
    AND (expires_at IS NULL OR expires_at > $2)";
const BIND: &str = "UPDATE tokens SET acts_in = $2 WHERE id = $1 AND acts_in = ''";
const BOUND: &str = "SELECT acts_in FROM tokens WHERE id = $1";
const NOTE_USE: &str = "UPDATE tokens SET last_used_at = $2 WHERE hash = $1";
const USE_INTERVAL: i64 = 60;

pub(super) fn insert(tx: &mut WriteTx, token: Token, hash: String) -> TxFuture<'_, (), Error> {
    Box::pin(async move {
        let params = [
            token.id.into(),
            hash.into(),
            token.name.into(),
            token.kind.map_or(ANY_KIND, PrincipalKind::rule_word).into(),
            token.created_by.into(),
            token.workspace_patterns.join("\n").into(),
            token.scopes.join("\n").into(),
            token.created_at.into(),
            token.expires_at.into(),
        ];
        tx.execute(INSERT, &params).await.map(drop)
    })
}

/// Only if there is no key yet; answers whether.
pub(super) fn insert_first(tx: &mut WriteTx, token: Token, hash: String) -> TxFuture<'_, bool, Error> {
    Box::pin(async move {
        if tx.query_opt("SELECT id FROM tokens LIMIT 1", &[]).await?.is_some() {
            return Ok(false);
        }
        insert(tx, token, hash).await?;
        Ok(true)
    })
}

pub(super) fn all(tx: &mut ReadTx) -> TxFuture<'_, Vec<Token>, Error> {
    Box::pin(async move { tx.query(ALL, &[]).await?.iter().map(token).collect() })
}

/// Whether the key is there and can be used.
pub(super) fn is_good(tx: &mut ReadTx, id: String, now: i64) -> TxFuture<'_, bool, Error> {
    Box::pin(async move { Ok(tx.query_opt(IS_GOOD, &[id.into(), now.into()]).await?.is_some()) })
}

/// The key with this hash if it can be used.
pub(super) fn usable(tx: &mut ReadTx, hash: String, now: i64) -> TxFuture<'_, Option<Token>, Error> {
    Box::pin(async move { tx.query_opt(USED, &[hash.into(), now.into()]).await?.as_ref().map(token).transpose() })
}

/// Whether a use of now is worth a write.
pub(super) fn is_use_to_be_noted(token: &Token, now: i64) -> bool {
    token.last_used_at.is_none_or(|last| now - last >= USE_INTERVAL)
}

/// The key with this hash if it can be used, noting that it was.
pub(super) fn used(tx: &mut WriteTx, hash: String, now: i64) -> TxFuture<'_, Option<Token>, Error> {
    Box::pin(async move {
        let Some(found) = usable(tx.as_read(), hash.clone(), now).await? else { return Ok(None) };
        if is_use_to_be_noted(&found, now) {
            tx.execute(NOTE_USE, &[hash.into(), now.into()]).await?;
        }
        Ok(Some(found))
    })
}

/// Before the project in which a key acts, so that none is one, too.
const BOUND_TO: &str = "=";

/// Has a sandbox's key act in a project, unless it acts in one already; answers whether it acts in this one.
pub(super) fn bind(tx: &mut WriteTx, id: String, project: String) -> TxFuture<'_, bool, Error> {
    Box::pin(async move {
        let project = [BOUND_TO, &project].concat();
        tx.execute(BIND, &[id.as_str().into(), project.as_str().into()]).await?;
        let row = tx.query_opt(BOUND, &[id.into()]).await?;
        row.map_or(Ok(false), |row| Ok(row.text(0)? == project))
    })
}

/// Answers whether there was one.
pub(super) fn revoke(tx: &mut WriteTx, id: String, now: i64, remove: bool) -> TxFuture<'_, bool, Error> {
    Box::pin(async move {
        let rows = if remove {
            tx.execute("DELETE FROM tokens WHERE id = $1", &[id.into()]).await?
        } else {
            tx.execute("UPDATE tokens SET revoked_at = $2 WHERE id = $1", &[id.into(), now.into()]).await?
        };
        Ok(rows > 0)
    })
}

fn token(row: &Row) -> Result<Token, Error> {
    let lines = |column| Ok::<_, Error>(row.text(column)?.lines().map(str::to_owned).collect());
    let unknown = |word: &str| Error::Statement { reason: format!("API key for unknown kind {word:?}").into() };
    let kind = match row.text(2)? {
        ANY_KIND => None,
        word => Some(PrincipalKind::parse(word).ok_or_else(|| unknown(word))?),
    };
    Ok(Token {
        id: row.text(0)?.to_owned(),
        name: row.text(1)?.to_owned(),
        kind,
        created_by: row.text(3)?.to_owned(),
        workspace_patterns: lines(4)?,
        scopes: lines(5)?,
        created_at: row.int(6)?,
        expires_at: row.int_opt(7)?,
        last_used_at: row.int_opt(8)?,
        revoked_at: row.int_opt(9)?,
        acts_in: row.text(10)?.strip_prefix(BOUND_TO).map(str::to_owned),
    })
}

/// Whom keys are bound to.
pub(crate) fn bindings(tx: &mut ReadTx) -> TxFuture<'_, Vec<String>, Error> {
    Box::pin(async move {
        let rows = tx.query("SELECT DISTINCT created_by FROM tokens", &[]).await?;
        rows.iter().map(|row| row.text(0).map(str::to_owned)).collect()
    })
}

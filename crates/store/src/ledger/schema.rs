//! Bringing a schema up to date: checked, forward only, recorded.

use sha2::{Digest as _, Sha256};

use super::{Error, Migration, Row};

/// Where applied migrations are recorded, and the ledger's own id.
pub(super) const BOOKKEEPING: &str = "CREATE TABLE IF NOT EXISTS ledger_migrations (
    position BIGINT NOT NULL, name TEXT PRIMARY KEY, checksum TEXT NOT NULL, applied_ms BIGINT NOT NULL);
CREATE TABLE IF NOT EXISTS ledger_id (id TEXT NOT NULL);";

pub(super) const APPLIED: &str = "SELECT name, checksum FROM ledger_migrations ORDER BY position";
pub(super) const RECORD: &str =
    "INSERT INTO ledger_migrations (position, name, checksum, applied_ms) VALUES ($1, $2, $3, $4)";
pub(super) const ID: &str = "SELECT id FROM ledger_id";
pub(super) const NAME: &str = "INSERT INTO ledger_id (id) VALUES ($1)";

/// What is still to be applied, with the position to record: what was applied must be known and unchanged.
pub(super) fn missing<'a>(applied: &[Row], wanted: &'a [Migration]) -> Result<Vec<(usize, &'a Migration)>, Error> {
    let mut missing: Vec<_> = wanted.iter().collect();
    for row in applied {
        let (name, recorded) = (row.text(0)?, row.text(1)?);
        let Some(known) = missing.iter().position(|migration| migration.name == name) else {
            let reason = format!("migration {name} was applied and is not known here: written by a newer version?");
            return Err(Error::Schema { reason: reason.into() });
        };
        if checksum(missing.remove(known).sql) != recorded {
            return Err(Error::Schema { reason: format!("migration {name} was changed after it was applied").into() });
        }
    }
    Ok((applied.len()..).zip(missing).collect())
}

pub(super) fn checksum(sql: &str) -> String {
    Sha256::digest(sql.as_bytes()).iter().map(|byte| format!("{byte:02x}")).collect()
}

pub(super) fn now_ms() -> i64 {
    crate::log::Clock::system().now_ms() as i64
}

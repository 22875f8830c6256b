//! Rows of apps.

use std::sync::Arc;

use trunkline_store::ledger::{Error as LedgerError, Migration, ReadTx, Row, TxFuture, WriteTx};

use super::App;
use crate::{
    error::{Error, Kind},
    message::json,
};

pub(crate) const MIGRATIONS: &[Migration] = &[Migration {
    name: "app_0001_apps",
    sql: "CREATE TABLE apps (name TEXT PRIMARY KEY, public_key TEXT NOT NULL UNIQUE, secret TEXT NOT NULL,
            former_secret TEXT NOT NULL, origins TEXT NOT NULL, agents TEXT NOT NULL)",
}];

pub(super) fn all(tx: &mut ReadTx) -> TxFuture<'_, Vec<App>, LedgerError> {
    Box::pin(async move {
        let sql = "SELECT name, public_key, secret, former_secret, origins, agents FROM apps";
        let rows = tx.query(sql, &[]).await?;
        // One that cannot be read is not there, and is named in the log.
        Ok(rows
            .iter()
            .filter_map(|row| read(row).inspect_err(|error| tracing::error!(%error, "an app")).ok())
            .collect())
    })
}

fn read(row: &Row) -> Result<App, Error> {
    let text = |column| row.text(column).map(ToOwned::to_owned);
    let unreadable = |e: serde_json::Error| Error::new(Kind::Internal, "ERR_INTERNAL", format!("row of an app: {e}"));
    Ok(App {
        name: text(0)?,
        key: text(1)?,
        secret: text(2)?,
        former_secret: Some(text(3)?).filter(|secret| !secret.is_empty()),
        origins: serde_json::from_str(row.text(4)?).map_err(unreadable)?,
        agents: serde_json::from_str(row.text(5)?).map_err(unreadable)?,
    })
}

pub(super) fn put(tx: &mut WriteTx, app: Arc<App>) -> TxFuture<'_, (), Error> {
    Box::pin(async move {
        let list = |json: Vec<u8>| String::from_utf8_lossy(&json).into_owned();
        let sql = "INSERT INTO apps (name, public_key, secret, former_secret, origins, agents) VALUES ($1, $2, $3, $4, $5, $6)
            ON CONFLICT (name) DO UPDATE SET secret = excluded.secret, former_secret = excluded.former_secret,
                origins = excluded.origins, agents = excluded.agents";
        let params = [
            app.name.as_str().into(),
            app.key.as_str().into(),
            app.secret.as_str().into(),
            app.former_secret.clone().unwrap_or_default().into(),
            list(json(&app.origins)?).into(),
            list(json(&app.agents)?).into(),
        ];
        tx.execute(sql, &params).await?;
        Ok(())
    })
}

pub(super) fn remove(tx: &mut WriteTx, name: String) -> TxFuture<'_, (), Error> {
    Box::pin(async move {
        tx.execute("DELETE FROM apps WHERE name = $1", &[name.into()]).await?;
        Ok(())
    })
}

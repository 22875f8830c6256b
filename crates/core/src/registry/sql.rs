//! Rows of programs.

use std::collections::BTreeMap;

use trunkline_store::ledger::{Error, Migration, ReadTx, Row, TxFuture, WriteTx};

use super::{Program, plain};

pub(crate) const MIGRATIONS: &[Migration] = &[Migration {
    name: "registry_0001_programs",
    sql: "CREATE TABLE programs (implementation TEXT PRIMARY KEY, description TEXT NOT NULL, launch_params TEXT NOT NULL,
            resources TEXT NOT NULL, capabilities TEXT NOT NULL, extensions TEXT NOT NULL, registered_at BIGINT NOT NULL,
            updated_at BIGINT NOT NULL);
        CREATE TABLE program_prefixes (prefix TEXT PRIMARY KEY, implementation TEXT NOT NULL)",
}];

const GET: &str =
    "SELECT implementation, description, launch_params, resources, capabilities, extensions, registered_at,
    updated_at FROM programs WHERE implementation = $1";

const ALL: &str =
    "SELECT implementation, description, launch_params, resources, capabilities, extensions, registered_at,
    updated_at FROM programs ORDER BY implementation";

const PUT: &str =
    "INSERT INTO programs (implementation, description, launch_params, resources, capabilities, extensions,
        registered_at, updated_at) VALUES ($1, $2, $3, $4, $5, $6, $7, $8)
    ON CONFLICT (implementation) DO UPDATE SET description = excluded.description,
        launch_params = excluded.launch_params, resources = excluded.resources, capabilities = excluded.capabilities,
        extensions = excluded.extensions, updated_at = excluded.updated_at";

const OWNER: &str = "SELECT implementation FROM program_prefixes WHERE prefix = $1 AND implementation <> $2";
const FREE: &str = "DELETE FROM program_prefixes WHERE implementation = $1";
const OWN: &str = "INSERT INTO program_prefixes (prefix, implementation) VALUES ($1, $2)";

/// How a program is started, if it is known.
pub(crate) async fn params(tx: &mut ReadTx, implementation: &str) -> Result<Option<BTreeMap<String, String>>, Error> {
    Ok(find(tx, implementation).await?.map(|program| program.launch_params))
}

pub(super) fn get(tx: &mut ReadTx, implementation: String) -> TxFuture<'_, Option<Program>, Error> {
    Box::pin(async move { find(tx, &implementation).await })
}

/// By its whole name, or by what comes before a colon.
async fn find(tx: &mut ReadTx, implementation: &str) -> Result<Option<Program>, Error> {
    let exact = tx.query_opt(GET, &[implementation.into()]).await?;
    let found = match exact {
        Some(found) => Some(found),
        None => tx.query_opt(GET, &[plain(implementation).into()]).await?,
    };
    found.as_ref().map(program).transpose()
}

pub(super) fn all(tx: &mut ReadTx) -> TxFuture<'_, Vec<Program>, Error> {
    Box::pin(async move { tx.query(ALL, &[]).await?.iter().map(program).collect() })
}

pub(super) fn names(tx: &mut ReadTx) -> TxFuture<'_, Vec<String>, Error> {
    Box::pin(async move {
        let rows = tx.query("SELECT implementation FROM programs", &[]).await?;
        rows.iter().map(|row| row.text(0).map(ToOwned::to_owned)).collect()
    })
}

/// Answers a prefix that another program has, and which one; then nothing is changed.
pub(super) fn put(tx: &mut WriteTx, program: Program) -> TxFuture<'_, Option<(String, String)>, Error> {
    Box::pin(async move {
        let name = program.implementation.as_str();
        for resource in &program.resources {
            if let Some(row) = tx.query_opt(OWNER, &[resource.prefix.as_str().into(), name.into()]).await? {
                return Ok(Some((resource.prefix.clone(), row.text(0)?.to_owned())));
            }
        }
        let params = [
            name.into(),
            program.description.as_str().into(),
            json(&program.launch_params)?.into(),
            json(&program.resources)?.into(),
            json(&program.capabilities)?.into(),
            json(&program.extensions)?.into(),
            program.registered_at.into(),
            program.updated_at.into(),
        ];
        tx.execute(PUT, &params).await?;
        tx.execute(FREE, &[name.into()]).await?;
        for resource in &program.resources {
            tx.execute(OWN, &[resource.prefix.as_str().into(), name.into()]).await?;
        }
        Ok(None)
    })
}

/// Answers whether there was one.
pub(super) fn remove(tx: &mut WriteTx, implementation: String) -> TxFuture<'_, bool, Error> {
    Box::pin(async move {
        tx.execute(FREE, &[implementation.as_str().into()]).await?;
        Ok(tx.execute("DELETE FROM programs WHERE implementation = $1", &[implementation.into()]).await? > 0)
    })
}

fn program(row: &Row) -> Result<Program, Error> {
    Ok(Program {
        implementation: row.text(0)?.to_owned(),
        description: row.text(1)?.to_owned(),
        launch_params: from_json(row, 2)?,
        resources: from_json(row, 3)?,
        capabilities: from_json(row, 4)?,
        extensions: from_json(row, 5)?,
        registered_at: row.int(6)?,
        updated_at: row.int(7)?,
    })
}

fn json<T: serde::Serialize>(value: &T) -> Result<String, Error> {
    serde_json::to_string(value).map_err(|e| Error::Statement { reason: e.to_string().into() })
}

fn from_json<T: serde::de::DeserializeOwned>(row: &Row, column: usize) -> Result<T, Error> {
    let unreadable = |e: serde_json::Error| Error::Statement { reason: format!("program: {e}").into() };
    serde_json::from_str(row.text(column)?).map_err(unreadable)
}

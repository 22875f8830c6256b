//! Rows of workspaces.

use trunkline_store::ledger::{Error, Migration, ReadTx, TxFuture, WriteTx};

use super::Workspace;

pub(crate) const MIGRATIONS: &[Migration] = &[Migration {
    name: "workspace_0001_workspaces",
    sql: "CREATE TABLE workspaces (id TEXT PRIMARY KEY, display_name TEXT NOT NULL, description TEXT NOT NULL,
            tenant_id TEXT NOT NULL, created_at BIGINT NOT NULL, updated_at BIGINT NOT NULL);
        CREATE TABLE workspace_metadata (workspace TEXT NOT NULL, name TEXT NOT NULL, value TEXT NOT NULL,
            PRIMARY KEY (workspace, name))",
}];

const INSERT: &str = "INSERT INTO workspaces (id, display_name, description, tenant_id, created_at, updated_at)
    VALUES ($1, $2, $3, $4, $5, $6) ON CONFLICT DO NOTHING";

const UPDATE: &str = "UPDATE workspaces SET
        display_name = CASE WHEN $2 = '' THEN display_name ELSE $2 END,
        description = CASE WHEN $3 = '' THEN description ELSE $3 END,
        tenant_id = CASE WHEN $4 = '' THEN tenant_id ELSE $4 END,
        updated_at = $5
    WHERE id = $1";

const SET: &str = "INSERT INTO workspace_metadata (workspace, name, value) VALUES ($1, $2, $3)
    ON CONFLICT (workspace, name) DO UPDATE SET value = excluded.value";

/// Answers whether it was not there before.
pub(super) fn insert(tx: &mut WriteTx, workspace: Workspace) -> TxFuture<'_, bool, Error> {
    Box::pin(async move {
        let params = [
            workspace.id.as_str().into(),
            workspace.display_name.as_str().into(),
            workspace.description.as_str().into(),
            workspace.tenant_id.as_str().into(),
            workspace.created_at.into(),
            workspace.updated_at.into(),
        ];
        if tx.execute(INSERT, &params).await? == 0 {
            return Ok(false);
        }
        set(tx, &workspace).await?;
        Ok(true)
    })
}

/// Answers whether there was one.
pub(super) fn update(tx: &mut WriteTx, changes: Workspace, at: i64, most: usize) -> TxFuture<'_, bool, Error> {
    Box::pin(async move {
        let params = [
            changes.id.as_str().into(),
            changes.display_name.as_str().into(),
            changes.description.as_str().into(),
            changes.tenant_id.as_str().into(),
            at.into(),
        ];
        if tx.execute(UPDATE, &params).await? == 0 {
            return Ok(false);
        }
        set(tx, &changes).await?;
        let count = "SELECT COUNT(*) FROM workspace_metadata WHERE workspace = $1";
        let count = tx.query_opt(count, &[changes.id.as_str().into()]).await?.map_or(Ok(0), |row| row.int(0))?;
        if count > most as i64 {
            return Err(Error::Constraint { reason: format!("more than {most} entries of metadata").into() });
        }
        Ok(true)
    })
}

async fn set(tx: &mut WriteTx, workspace: &Workspace) -> Result<(), Error> {
    for (name, value) in &workspace.metadata {
        let params = [workspace.id.as_str().into(), name.as_str().into(), value.as_str().into()];
        tx.execute(SET, &params).await?;
    }
    Ok(())
}

pub(super) fn delete(tx: &mut WriteTx, id: String) -> TxFuture<'_, (), Error> {
    Box::pin(async move {
        tx.execute("DELETE FROM workspace_metadata WHERE workspace = $1", &[id.as_str().into()]).await?;
        tx.execute("DELETE FROM workspaces WHERE id = $1", &[id.into()]).await.map(drop)
    })
}

pub(super) fn all(tx: &mut ReadTx) -> TxFuture<'_, Vec<Workspace>, Error> {
    Box::pin(async move {
        let mut all = Vec::new();
        let columns =
            "SELECT id, display_name, description, tenant_id, created_at, updated_at FROM workspaces ORDER BY id";
        for row in tx.query(columns, &[]).await? {
            all.push(Workspace {
                id: row.text(0)?.to_owned(),
                display_name: row.text(1)?.to_owned(),
                description: row.text(2)?.to_owned(),
                tenant_id: row.text(3)?.to_owned(),
                created_at: row.int(4)?,
                updated_at: row.int(5)?,
                ..Workspace::default()
            });
        }
        for row in tx.query("SELECT workspace, name, value FROM workspace_metadata", &[]).await? {
            let id = row.text(0)?;
            if let Some(workspace) = all.iter_mut().find(|workspace| workspace.id == id) {
                workspace.metadata.insert(row.text(1)?.to_owned(), row.text(2)?.to_owned());
            }
        }
        Ok(all)
    })
}

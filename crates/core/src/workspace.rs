//! Workspaces that administrators describe. One need not be described to be used.

mod sql;

use std::collections::BTreeMap;

pub(crate) use sql::MIGRATIONS;

use crate::{
    caller::Caller,
    error::{Error, Kind},
    gate::Administer,
    identity,
    presence::Filter,
    rule::now,
    session::Sessions,
};

/// Bytes of a description, and of each piece of metadata.
const TEXT_BYTES_MAX: usize = 16 * 1024;

/// Pieces of metadata.
const METADATA_MAX: usize = 256;

/// What is known of a workspace.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Workspace {
    /// Its name in topics.
    pub id: String,
    /// For people; the id unless somebody said otherwise.
    pub display_name: String,
    /// For people.
    pub description: String,
    /// Whose it is.
    pub tenant_id: String,
    /// Whatever else.
    pub metadata: BTreeMap<String, String>,
    /// When it was described first, in Unix seconds; 0 if nobody did.
    pub created_at: i64,
    /// When that was changed last.
    pub updated_at: i64,
}

/// Describes a workspace that nobody described yet.
///
/// # Errors
/// [`Kind::Denied`], [`Kind::Exists`], [`Kind::Invalid`] for a name that is none or too much text.
pub async fn create(sessions: &Sessions, caller: &Caller, mut wanted: Workspace) -> Result<Workspace, Error> {
    sessions.gate().authorize(caller, Administer("workspaces"))?;
    wanted.id = identity::workspace(&wanted.id)?;
    check(&wanted)?;
    if wanted.display_name.is_empty() {
        wanted.display_name.clone_from(&wanted.id);
    }
    (wanted.created_at, wanted.updated_at) = (now(), now());
    let row = wanted.clone();
    if sessions.gate().housekeep(move |tx| sql::insert(tx, row.clone())).await? {
        return Ok(wanted);
    }
    let message = format!("workspace {} exists already", wanted.id);
    Err(Error::new(Kind::Exists, "ERR_ALREADY_EXISTS", message))
}

/// Changes what is said of a workspace: texts that are not empty replace the old ones, metadata is merged.
///
/// # Errors
/// [`Kind::Denied`], [`Kind::NotFound`], [`Kind::Invalid`].
pub async fn update(sessions: &Sessions, caller: &Caller, changes: Workspace) -> Result<(), Error> {
    sessions.gate().authorize(caller, Administer("workspaces"))?;
    check(&changes)?;
    let id = changes.id.clone();
    let at = now();
    if sessions.gate().housekeep(move |tx| sql::update(tx, changes.clone(), at, METADATA_MAX)).await? {
        return Ok(());
    }
    Err(Error::new(Kind::NotFound, "ERR_NOT_FOUND", format!("workspace not found: {id}")))
}

/// Forgets what was said of a workspace, if anything was. Rules and keys stay.
///
/// # Errors
/// [`Kind::Denied`], [`Kind::Precondition`] while somebody is connected there.
pub async fn delete(sessions: &Sessions, caller: &Caller, id: &str) -> Result<(), Error> {
    sessions.gate().authorize(caller, Administer("workspaces"))?;
    let connected = sessions.presence().list(&Filter { workspace: Some(id.to_owned()), ..Filter::default() }).len();
    if connected > 0 {
        let message = format!("cannot delete workspace {id}: has {connected} active connections");
        return Err(Error::new(Kind::Precondition, "ERR_IN_USE", message));
    }
    let id = id.to_owned();
    sessions.gate().housekeep(move |tx| sql::delete(tx, id.clone())).await?;
    Ok(())
}

/// What is known of a workspace: of one that nobody described, its name.
///
/// # Errors
/// [`Kind::Denied`], [`Kind::Invalid`] for a name that is none.
pub async fn get(sessions: &Sessions, caller: &Caller, id: &str) -> Result<Workspace, Error> {
    let id = identity::workspace(id)?;
    let all = list(sessions, caller, "").await?;
    let undescribed = || Workspace { display_name: id.clone(), id: id.clone(), ..Workspace::default() };
    Ok(all.into_iter().find(|workspace| workspace.id == id).unwrap_or_else(undescribed))
}

/// The workspaces that are described or that somebody is connected in, by id; of one tenant, if one is named.
///
/// # Errors
/// [`Kind::Denied`].
pub async fn list(sessions: &Sessions, caller: &Caller, tenant_id: &str) -> Result<Vec<Workspace>, Error> {
    let permit = sessions.gate().authorize(caller, Administer("workspaces"))?;
    let described = sessions.gate().look(&permit, sql::all).await?;
    let mut all: BTreeMap<String, Workspace> =
        described.into_iter().map(|workspace| (workspace.id.clone(), workspace)).collect();
    for id in sessions.presence().list(&Filter::default()).into_iter().filter_map(|connection| connection.workspace) {
        let undescribed = || Workspace { display_name: id.clone(), id: id.clone(), ..Workspace::default() };
        all.entry(id.clone()).or_insert_with(undescribed);
    }
    all.retain(|_, workspace| tenant_id.is_empty() || workspace.tenant_id == tenant_id);
    Ok(all.into_values().collect())
}

fn check(workspace: &Workspace) -> Result<(), Error> {
    let Workspace { display_name, description, tenant_id, metadata, .. } = workspace;
    let texts = [display_name, description, tenant_id].into_iter().chain(metadata.iter().flat_map(|(k, v)| [k, v]));
    if texts.into_iter().any(|text| text.len() > TEXT_BYTES_MAX) || metadata.len() > METADATA_MAX {
        let message =
            format!("a text of a workspace may have {TEXT_BYTES_MAX} bytes, its metadata {METADATA_MAX} entries");
        return Err(Error::new(Kind::Invalid, "ERR_INVALID_ARGUMENT", message));
    }
    Ok(())
}

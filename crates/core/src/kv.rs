//! Keys and values that principals keep, alone or together, in eight scopes; counters, sets and conditional writes.
//!
//! | scope | who shares it | needs |
//! | --- | --- | --- |
//! | global | everybody | – |
//! | workspace | everybody | a workspace |
//! | user shared | everybody | a user |
//! | user workspace shared | everybody | a user and a workspace |
//! | the four exclusive ones | nobody: they belong to one identity | the same as their shared ones |
//!
//! Two agents of the same name in different workspaces are two identities and share no exclusive key, whichever
//! workspace a request names.
//!
//! Values are bytes. A counter is a decimal number in a value, so that reading and counting go together. A set is a kind
//! of its own: it is not listed, and reading it as a value is refused. What has expired is not there.

mod decide;
mod home;
mod sql;

use std::future::Future;

pub use home::settle;
pub(crate) use sql::MIGRATIONS;
use trunkline_store::log::Clock;

use crate::{
    caller::Caller,
    error::{Error, Kind},
    gate::{Gate, Keep, KeepPermit, UseKeys},
    identity::{Identity, SEPARATOR, identifier, workspace},
    limits::{KV_KEY_CHARS_MAX, KV_LIST_MAX, Limits, SNAPSHOT_BYTES_MAX},
};

/// Keys that one step of a sweep removes: a few milliseconds of the ledger's writer.
const SWEEP_STEP: i64 = 500;

/// Where a key lies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scope {
    /// Shared by everybody.
    Global,
    /// Shared in a workspace.
    Workspace,
    /// One's own, about a user.
    User,
    /// One's own, about a user in a workspace.
    UserWorkspace,
    /// One's own.
    GlobalExclusive,
    /// One's own, in a workspace.
    WorkspaceExclusive,
    /// Shared, about a user.
    UserShared,
    /// Shared, about a user in a workspace.
    UserWorkspaceShared,
}

/// What to do with a key.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Action {
    /// Read the value.
    Get,
    /// Set the value.
    Put(New),
    /// List keys that begin with the key.
    List {
        /// How many at most; 0 for the published 100.
        limit: usize,
        /// Where the last page ended; empty for the first.
        cursor: String,
    },
    /// Remove the key.
    Delete,
    /// Add to the counter; a new one lives for `ttl` seconds.
    Add {
        /// How much.
        delta: i64,
        /// 0 is for ever.
        ttl: i64,
    },
    /// Add to the counter unless it would pass the guard: a ceiling for a positive `delta`, a floor for a negative one.
    AddIf {
        /// How much; not 0.
        delta: i64,
        /// The last value allowed.
        guard: i64,
        /// 0 is for ever.
        ttl: i64,
    },
    /// Set the value if there is none.
    SetIfAbsent(New),
    /// Set the value if it is the expected one.
    CompareAndSet {
        /// What it has to be.
        expected: Vec<u8>,
        /// What it becomes.
        new: New,
    },
    /// Remove the key if its value is the expected one.
    CompareAndDelete {
        /// What it has to be.
        expected: Vec<u8>,
    },
    /// Remove another principal's keys that begin with the key.
    Purge {
        /// Whose.
        target: Identity,
    },
    /// Add a member to the set.
    SetAdd(New),
    /// Count the members of the set.
    SetCount,
}

/// A value to be stored.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct New {
    /// The bytes.
    pub value: Vec<u8>,
    /// Seconds that it lives; 0 is for ever.
    pub ttl: i64,
}

/// What a client asks for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Request {
    /// Where.
    pub scope: Scope,
    /// Which key, or how keys have to begin.
    pub key: String,
    /// About which user, where the scope needs one.
    pub user_id: String,
    /// In which workspace, if not one's own.
    pub workspace: String,
    /// What to do.
    pub action: Action,
}

/// What came of it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Answer {
    /// The value that was read, or that stood in the way of a comparison.
    pub value: Vec<u8>,
    /// Keys and values of a listing, by key.
    pub entries: Vec<(String, Vec<u8>)>,
    /// The counter, or how many.
    pub counter: i64,
    /// It took effect; for a read, there is such a key.
    pub applied: bool,
    /// Where the next page begins; empty after the last one.
    pub next_cursor: String,
}

/// A request that was allowed.
pub struct Allowed {
    permit: KeepPermit,
    owner: String,
    request: Request,
}

impl Scope {
    /// Its name in rules.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Global => "global",
            Self::Workspace => "workspace",
            Self::User => "user",
            Self::UserWorkspace => "user-workspace",
            Self::GlobalExclusive => "global-exclusive",
            Self::WorkspaceExclusive => "workspace-exclusive",
            Self::UserShared => "user-shared",
            Self::UserWorkspaceShared => "user-workspace-shared",
        }
    }

    /// It is the principal's own.
    #[must_use]
    pub fn is_exclusive(self) -> bool {
        matches!(self, Self::User | Self::UserWorkspace | Self::GlobalExclusive | Self::WorkspaceExclusive)
    }

    fn has_user(self) -> bool {
        matches!(self, Self::User | Self::UserWorkspace | Self::UserShared | Self::UserWorkspaceShared)
    }

    /// It is a workspace's.
    #[must_use]
    pub fn has_workspace(self) -> bool {
        matches!(self, Self::Workspace | Self::UserWorkspace | Self::WorkspaceExclusive | Self::UserWorkspaceShared)
    }
}

impl Action {
    /// It changes nothing.
    #[must_use]
    pub fn is_read(&self) -> bool {
        matches!(self, Self::Get | Self::List { .. } | Self::SetCount)
    }

    fn new_value(&self) -> Option<&New> {
        match self {
            Self::Put(new) | Self::SetIfAbsent(new) | Self::CompareAndSet { new, .. } | Self::SetAdd(new) => Some(new),
            _ => None,
        }
    }

    fn has_key(&self) -> bool {
        !matches!(self, Self::List { .. } | Self::Purge { .. })
    }
}

/// The workspace that a request is about: the one that it names, or else the caller's own.
#[must_use]
pub fn workspace_of<'a>(request: &'a Request, home: Option<&'a str>) -> &'a str {
    if request.workspace.is_empty() { home.unwrap_or_default() } else { &request.workspace }
}

/// Under which name the keys of a scope lie. Its parts cannot contain what joins them, so that no two namespaces meet.
///
/// # Errors
/// [`Kind::Invalid`] naming what the scope needs and the request lacks.
pub(crate) fn namespace(request: &Request, caller: &Identity, home: Option<&str>) -> Result<String, Error> {
    let scope = request.scope;
    let mut parts = Vec::new();
    let owner = if let Action::Purge { target } = &request.action { target } else { caller };
    if scope.is_exclusive() {
        parts.extend(own(owner)?);
    }
    if scope.has_user() {
        if request.user_id.is_empty() {
            let needs = if scope.has_workspace() { "both user ID and workspace" } else { "a user ID" };
            let word = if scope.has_workspace() { "user-workspace" } else { "user" };
            return Err(invalid(format!("{word} scope requires {needs}")));
        }
        parts.extend(["user".to_owned(), identifier("user ID", &request.user_id)?]);
    }
    if scope.has_workspace() {
        let name = workspace_of(request, home);
        if name.is_empty() {
            let needs = if scope.has_user() { "both user ID and workspace" } else { "a workspace" };
            let word = if scope.has_user() { "user-workspace" } else { "workspace" };
            return Err(invalid(format!("{word} scope requires {needs}")));
        }
        parts.extend(["workspace".to_owned(), workspace(name)?]);
    }
    if parts.is_empty() {
        parts.push("global".to_owned());
    }
    Ok(parts.join(SEPARATOR))
}

/// The parts of an identity that begin the namespaces of its exclusive keys. Non-unique tasks have a new identity with
/// every connection, so they own no keys.
fn own(identity: &Identity) -> Result<Vec<String>, Error> {
    let parts: &[&str] = match identity {
        Identity::Agent(named) => &["ag", &named.workspace, &named.implementation, &named.specifier],
        Identity::UniqueTask(named) => &["tu", &named.workspace, &named.implementation, &named.specifier],
        Identity::Service(unplaced) => &["service", &unplaced.implementation, &unplaced.specifier],
        _ => return Err(invalid("exclusive scopes require non-empty agent implementation and specifier".to_owned())),
    };
    Ok(parts.iter().map(|part| (*part).to_owned()).collect())
}

/// Checks a request of a caller whose workspace is `home`.
///
/// # Errors
/// [`Kind::Denied`], [`Kind::Invalid`], and `ERR_QUOTA_001` for a value over the limit.
pub fn allow(
    gate: &Gate,
    caller: &Caller,
    home: Option<&str>,
    request: Request,
    limits: &Limits,
) -> Result<Allowed, Error> {
    if let Some(new) = request.action.new_value().filter(|new| new.value.len() > limits.kv_value_bytes_max) {
        let (size, most) = (new.value.len(), limits.kv_value_bytes_max);
        let workspace = workspace_of(&request, home);
        let message =
            format!("quota exceeded for kv_value_size in workspace '{workspace}': current {size}, limit {most}");
        return Err(Error::new(Kind::Invalid, "ERR_QUOTA_001", message));
    }
    let permit = gate.authorize(caller, UseKeys { request: &request, home })?;
    if request.action.has_key() {
        check_key(&request.key)?;
    }
    let owner = namespace(&request, &caller.identity, home)?;
    Ok(Allowed { permit, owner, request })
}

fn check_key(key: &str) -> Result<(), Error> {
    if key.is_empty() {
        return Err(invalid("key cannot be empty".to_owned()));
    }
    if key.chars().count() > KV_KEY_CHARS_MAX {
        return Err(invalid(format!("key exceeds maximum length of {KV_KEY_CHARS_MAX} characters")));
    }
    Ok(())
}

/// Does what was allowed. What one caller asks one after the other takes effect in that order; the future says how each
/// ended, and changes are durable then. With `after_writes`, a read sees what the caller asked to write before; a listing may
/// also see what it asks to write while that is read.
///
/// # Errors
/// [`Kind::Unavailable`]; the rest comes with the future.
pub async fn run(
    gate: &Gate,
    caller: &Caller,
    allowed: Allowed,
    after_writes: bool,
    limits: &Limits,
) -> Result<std::pin::Pin<Box<dyn Future<Output = Result<Answer, Error>> + Send>>, Error> {
    let Allowed { permit, owner, request } = allowed;
    let now_ms = now_ms();
    let is_listing = matches!(request.action, Action::List { .. });
    if request.action.is_read() && (!after_writes || is_listing) {
        // A page is too much to be read among the writes, which wait for each other. It waits until they are done instead.
        let before =
            if after_writes { Some(gate.submit_write(&permit, |tx, _| sql::nothing(tx)).await?) } else { None };
        let (gate, caller) = (gate.clone(), caller.clone());
        return Ok(Box::pin(async move {
            if let Some(before) = before {
                before.ended().await?;
            }
            let read = gate.read(&permit, move |tx, _| sql::read(tx, owner.clone(), request.clone(), now_ms));
            Ok(readable(&gate, &caller, read.await?))
        }));
    }
    let quota = sql::Quota { keys: limits.kv_keys_per_namespace.into(), members: limits.kv_members_per_set.into() };
    let (for_reply, for_caller) = (gate.clone(), caller.clone());
    let written =
        gate.submit_write(&permit, move |tx, _| sql::write(tx, owner.clone(), request.clone(), now_ms, quota)).await?;
    Ok(Box::pin(async move { Ok(readable(&for_reply, &for_caller, written.ended().await?)) }))
}

/// The keys of the snapshot that a principal gets when it connects.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Snapshot {
    /// What it keeps for itself in its workspace.
    pub workspace_exclusive: Vec<(String, Vec<u8>)>,
    /// What it keeps for itself over all workspaces.
    pub global_exclusive: Vec<(String, Vec<u8>)>,
    /// What is shared in its workspace, if it may read that.
    pub workspace: Vec<(String, Vec<u8>)>,
    /// What is shared by all, if it may read that.
    pub global: Vec<(String, Vec<u8>)>,
    /// There are more keys, which a listing tells.
    pub is_cut: bool,
}

/// What a principal keeps for itself, and what it may read of what is shared: of each scope as many keys from the first as fit a page,
/// and of all together as many as fit [`SNAPSHOT_BYTES_MAX`], one's own first. Principals without a name of their own keep nothing.
///
/// # Errors
/// [`Kind::Unavailable`].
pub async fn snapshot(gate: &Gate, caller: &Caller) -> Result<Snapshot, Error> {
    let (mut keys, mut room) = (Snapshot::default(), SNAPSHOT_BYTES_MAX);
    let Snapshot { workspace_exclusive, global_exclusive, workspace, global, is_cut } = &mut keys;
    let scopes = [
        (Scope::WorkspaceExclusive, workspace_exclusive),
        (Scope::GlobalExclusive, global_exclusive),
        (Scope::Workspace, workspace),
        (Scope::Global, global),
    ];
    for (scope, found) in scopes {
        let action = Action::List { limit: KV_LIST_MAX, cursor: String::new() };
        let (key, user_id, workspace) = (String::new(), String::new(), String::new());
        let (request, home) = (Request { scope, key, user_id, workspace, action }, caller.identity.workspace());
        // What is one's own takes no permission.
        let is_own = matches!(scope, Scope::WorkspaceExclusive | Scope::GlobalExclusive);
        let permit = match is_own {
            true => gate.authorize(caller, Keep),
            false => gate.authorize(caller, UseKeys { request: &request, home }),
        };
        let (Ok(keep), Ok(owner)) = (permit, namespace(&request, &caller.identity, home)) else { continue };
        let now_ms = now_ms();
        let read = gate.read(&keep, move |tx, _| sql::read(tx, owner.clone(), request.clone(), now_ms));
        let Answer { mut entries, next_cursor, .. } = read.await?;
        if !is_own {
            entries.retain(|(key, _)| gate.may_see_key(caller, key));
        }
        let (listed, fits) = (entries.len(), |(key, value): &(String, Vec<u8>)| {
            let left = room.checked_sub(key.len() + value.len() + ENTRY_OVERHEAD_BYTES);
            room = left.unwrap_or(room);
            left.is_some()
        });
        *found = entries.into_iter().take_while(fits).collect();
        if !next_cursor.is_empty() || found.len() < listed {
            *is_cut = true;
            tracing::debug!(identity = %caller.identity, scope = scope.name(), "more keys than a snapshot holds");
        }
    }
    Ok(keys)
}

/// Bytes around a key and its value in a snapshot, at most.
const ENTRY_OVERHEAD_BYTES: usize = 16;

/// Removes keys that have expired, for good; answers how many. Until then they only take room.
///
/// # Errors
/// [`Kind::Unavailable`].
pub async fn sweep(gate: &Gate) -> Result<u64, Error> {
    let mut removed = 0;
    loop {
        let now_ms = now_ms();
        let (step, may_be_more) = gate.housekeep(move |tx| sql::expire(tx, now_ms, SWEEP_STEP)).await?;
        removed += step.unsigned_abs();
        if !may_be_more {
            return Ok(removed);
        }
    }
}

/// Leaves out listed keys that a rule keeps from the caller.
fn readable(gate: &Gate, caller: &Caller, mut answer: Answer) -> Answer {
    if !answer.entries.is_empty() {
        answer.entries.retain(|(key, _)| gate.may_see_key(caller, key));
    }
    answer
}

/// How many a page holds.
fn page(limit: usize) -> usize {
    if limit == 0 { 100 } else { limit.min(KV_LIST_MAX) }
}

fn invalid(message: String) -> Error {
    Error::new(Kind::Invalid, "ERR_INVALID_ARGUMENT", message)
}

fn now_ms() -> i64 {
    // Not the wall clock itself: keys must not expire by a step of it.
    i64::try_from(Clock::system().now_ms()).unwrap_or(i64::MAX)
}

#[cfg(test)]
mod tests {
    use super::{Action, Identity, Request, Scope, namespace};

    #[test]
    fn namespaces_never_meet() {
        let identities =
            [Identity::agent("w", "i", "s"), Identity::unique_task("w", "i", "s"), Identity::service("i", "s")];
        let scopes = [
            Scope::Global,
            Scope::Workspace,
            Scope::User,
            Scope::UserWorkspace,
            Scope::GlobalExclusive,
            Scope::WorkspaceExclusive,
            Scope::UserShared,
            Scope::UserWorkspaceShared,
        ];
        let mut all = Vec::new();
        for identity in identities {
            for scope in scopes {
                let (user_id, workspace) = ("global".to_owned(), "user".to_owned());
                let request = Request { scope, key: "k".into(), user_id, workspace, action: Action::Get };
                let name = namespace(&request, identity.as_ref().unwrap(), None).unwrap();
                all.push((scope.is_exclusive(), name));
            }
        }
        let shared: std::collections::BTreeSet<_> = all.iter().filter(|(own, _)| !own).collect();
        let own: std::collections::BTreeSet<_> = all.iter().filter(|(own, _)| *own).collect();
        assert_eq!((shared.len(), own.len()), (4, 12));
    }

    #[test]
    fn exclusive_namespaces_differ_by_workspace() {
        let scopes = [Scope::User, Scope::UserWorkspace, Scope::GlobalExclusive, Scope::WorkspaceExclusive];
        for make in [Identity::agent, Identity::unique_task] {
            let (a, b) = (make("a", "bot", "main").unwrap(), make("b", "bot", "main").unwrap());
            for scope in scopes {
                let (user_id, workspace) = ("ann".to_owned(), "a".to_owned());
                let request = Request { scope, key: "k".into(), user_id, workspace, action: Action::Get };
                let names = [&a, &b].map(|identity| namespace(&request, identity, None).unwrap());
                assert_ne!(names[0], names[1], "{scope:?}");
                let purge = Request { action: Action::Purge { target: a.clone() }, ..request };
                assert_eq!(namespace(&purge, &b, None).unwrap(), names[0], "a purge is of the target's keys");
            }
        }
    }

    #[test]
    fn what_a_scope_needs_is_named() {
        let check = |scope, identity: Result<Identity, _>, expected: &str| {
            let (key, user_id, workspace) = ("k".to_owned(), String::new(), String::new());
            let request = Request { scope, key, user_id, workspace, action: Action::Get };
            assert_eq!(namespace(&request, &identity.unwrap(), None).unwrap_err().message, expected);
        };
        check(Scope::Workspace, Identity::service("i", "s"), "workspace scope requires a workspace");
        check(Scope::UserShared, Identity::service("i", "s"), "user scope requires a user ID");
        let both = "user-workspace scope requires both user ID and workspace";
        check(Scope::UserWorkspaceShared, Identity::service("i", "s"), both);
        let own = "exclusive scopes require non-empty agent implementation and specifier";
        check(Scope::GlobalExclusive, Identity::task("w", "i"), own);
    }
}

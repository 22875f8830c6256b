//! API keys: who may claim to be whom by a secret. The secret is shown once, when the key is made; what is kept is its
//! digest, which is enough for 256 random bits.

mod sql;

use std::sync::Arc;

use base64::{Engine as _, engine::general_purpose::URL_SAFE};
use sha2::{Digest as _, Sha256};
use uuid::Uuid;

pub(crate) use sql::{MIGRATIONS, bindings};

use crate::{
    caller::{Access, Caller, Credential},
    error::{Error, Kind},
    gate::{Administer, Gate, MintUserKeys},
    identity::{Identity, PrincipalKind, SEPARATOR, is_bound_to},
    rule::now,
    session::Sessions,
};

/// Scope of a user's key that opens sandboxes, to watch them.
pub const SANDBOX_READ: &str = "sandbox:read";

/// Scope of a user's key that opens sandboxes, to make them and tell them what to do as well.
pub const SANDBOX_WRITE: &str = "sandbox:write";

/// Scopes of a user's key that name clients of the socket surface by a shell pattern behind this word: whose streams it shows.
pub const SOCKET_UI: &str = "socket:";

/// As [`SOCKET_UI`]: whose runtime it is.
pub const SOCKET_RUNTIME: &str = "socket-runtime:";

/// Random bytes of a secret.
const SECRET_BYTES: usize = 32;

/// Patterns, scopes and names that a key may have, in bytes of each.
const TEXT_BYTES_MAX: usize = 512;

/// Patterns or scopes of a key.
const LIST_MAX: usize = 64;

/// A key, without its secret.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Token {
    /// Its id.
    pub id: String,
    /// What people call it; need not be unique.
    pub name: String,
    /// Which kind of principal may use it; nothing for the administrator's, which every kind may.
    pub kind: Option<PrincipalKind>,
    /// Whom it is for: a user's id for users; for others an identity, which may end in `*`, or any text, which then binds
    /// nothing.
    pub created_by: String,
    /// Shell patterns of the workspaces that it opens; `*` does not match `/`.
    pub workspace_patterns: Vec<String>,
    /// What it is for, in the client's words.
    pub scopes: Vec<String>,
    /// When it was made, in Unix seconds.
    pub created_at: i64,
    /// When it ends.
    pub expires_at: Option<i64>,
    /// When it was last used to connect.
    pub last_used_at: Option<i64>,
    /// When it was revoked.
    pub revoked_at: Option<i64>,
    /// The project in which a sandbox's key acted first, which may be none (empty). It acts in no other.
    pub acts_in: Option<String>,
}

/// A key to be made.
#[derive(Clone, Debug)]
pub struct New {
    /// See [`Token::name`].
    pub name: String,
    /// See [`Token::kind`].
    pub kind: PrincipalKind,
    /// See [`Token::created_by`]; empty for `admin`.
    pub created_by: String,
    /// See [`Token::workspace_patterns`]; empty for all.
    pub workspace_patterns: Vec<String>,
    /// See [`Token::scopes`]; empty for `connect`.
    pub scopes: Vec<String>,
    /// 0 for never.
    pub expires_in_hours: i64,
}

/// What API keys and tokens of tasks begin with. Those that earlier versions made begin with anything, and are as good.
const KEY_PREFIX: &str = "tlk_";
const TASK_TOKEN_PREFIX: &str = "tlt_";

/// A secret, to be shown once. It does not show itself.
pub struct Secret(String);

impl Secret {
    pub(crate) fn random() -> Result<Self, Error> {
        let mut bytes = [0; SECRET_BYTES];
        let failed = |e: getrandom::Error| Error::new(Kind::Internal, "ERR_INTERNAL", format!("no randomness: {e}"));
        getrandom::fill(&mut bytes).map_err(failed)?;
        Ok(Self(URL_SAFE.encode(bytes)))
    }

    /// An API key. Its beginning is known to scanners for secrets, and is no option of a command line.
    fn key() -> Result<Self, Error> {
        Ok(Self(KEY_PREFIX.to_owned() + &Self::random()?.0))
    }

    /// A task's token; see [`Secret::key`].
    pub(crate) fn task_token() -> Result<Self, Error> {
        Ok(Self(TASK_TOKEN_PREFIX.to_owned() + &Self::random()?.0))
    }

    /// The text to be shown.
    #[must_use]
    pub fn reveal(&self) -> &str {
        &self.0
    }
}

impl std::fmt::Debug for Secret {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Secret(…)")
    }
}

pub(crate) fn digest(secret: &str) -> String {
    Sha256::digest(secret.as_bytes()).iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Makes the administrator's key if there is no key at all yet.
///
/// # Errors
/// [`Kind::Unavailable`].
pub async fn bootstrap(gate: &Gate) -> Result<Option<Secret>, Error> {
    let (secret, token) = (Secret::key()?, admin());
    let hash = digest(secret.reveal());
    let made = gate.housekeep(move |tx| sql::insert_first(tx, token.clone(), hash.clone())).await?;
    Ok(made.then_some(secret))
}

/// Makes another administrator's key, for whoever holds the data directory itself.
///
/// # Errors
/// [`Kind::Unavailable`].
pub async fn admin_key(gate: &Gate) -> Result<Secret, Error> {
    let (secret, token) = (Secret::key()?, admin());
    let hash = digest(secret.reveal());
    gate.housekeep(move |tx| sql::insert(tx, token.clone(), hash.clone())).await?;
    Ok(secret)
}

fn admin() -> Token {
    Token {
        id: Uuid::new_v4().to_string(),
        name: "admin".to_owned(),
        kind: None,
        created_by: "_system".to_owned(),
        workspace_patterns: vec!["*".to_owned()],
        scopes: vec!["*".to_owned()],
        created_at: now(),
        expires_at: None,
        last_used_at: None,
        revoked_at: None,
        acts_in: None,
    }
}

/// Makes a key.
///
/// # Errors
/// [`Kind::Denied`]; [`Kind::Invalid`] for what is missing or too long.
pub async fn create(gate: &Gate, caller: &Caller, new: New) -> Result<(Token, Secret), Error> {
    gate.authorize(caller, Administer("tokens"))?;
    if new.name.is_empty() {
        return Err(invalid("name is required"));
    }
    if new.kind == PrincipalKind::User {
        gate.authorize(caller, MintUserKeys)?;
        if new.created_by.trim().is_empty() {
            return Err(invalid("created_by (the target user id) is required for user tokens"));
        }
    }
    if new.kind == PrincipalKind::Sandbox {
        Identity::sandbox(&new.created_by)?;
    }
    if new.expires_in_hours < 0 {
        return Err(invalid("expires_in_hours is negative; 0 is never"));
    }
    let binding = new.created_by.strip_suffix('*').unwrap_or(&new.created_by);
    if new.created_by.contains(SEPARATOR) && binding.contains('*') {
        return Err(invalid("created_by: an identity may end in *, and has none before"));
    }
    let texts = [&new.name, &new.created_by].into_iter().chain(&new.workspace_patterns).chain(&new.scopes);
    if texts.into_iter().any(|text| text.len() > TEXT_BYTES_MAX || text.contains(char::is_control))
        || new.workspace_patterns.len() > LIST_MAX
        || new.scopes.len() > LIST_MAX
    {
        return Err(invalid("a name, pattern or scope is too long or has control characters, or there are too many"));
    }
    if new.workspace_patterns.iter().any(|pattern| glob::Pattern::new(pattern).is_err()) {
        return Err(invalid("a workspace pattern cannot be read"));
    }
    let clients =
        |scope: &String| scope.strip_prefix(SOCKET_UI).or(scope.strip_prefix(SOCKET_RUNTIME)).map(glob::Pattern::new);
    if new.scopes.iter().filter_map(clients).any(|pattern| pattern.is_err()) {
        return Err(invalid("a pattern of clients cannot be read"));
    }
    let or = |list: Vec<String>, default: &str| if list.is_empty() { vec![default.to_owned()] } else { list };
    let (secret, created_at) = (Secret::key()?, now());
    let token = Token {
        id: Uuid::new_v4().to_string(),
        name: new.name,
        kind: Some(new.kind),
        created_by: if new.created_by.is_empty() { "admin".to_owned() } else { new.created_by },
        workspace_patterns: or(new.workspace_patterns, "*"),
        scopes: or(new.scopes, "connect"),
        created_at,
        expires_at: (new.expires_in_hours > 0)
            .then(|| created_at.saturating_add(new.expires_in_hours.saturating_mul(3600))),
        last_used_at: None,
        revoked_at: None,
        acts_in: None,
    };
    let (row, hash) = (token.clone(), digest(secret.reveal()));
    gate.housekeep(move |tx| sql::insert(tx, row.clone(), hash.clone())).await?;
    tracing::info!(token = token.id, by = caller.subject.id, "API key created");
    Ok((token, secret))
}

/// The keys, newest first; revoked ones if asked for.
///
/// # Errors
/// [`Kind::Denied`].
pub async fn list(gate: &Gate, caller: &Caller, with_revoked: bool) -> Result<Vec<Token>, Error> {
    let permit = gate.authorize(caller, Administer("tokens"))?;
    let mut tokens = gate.look(&permit, sql::all).await?;
    tokens.retain(|token| with_revoked || token.revoked_at.is_none());
    Ok(tokens)
}

/// The key with this id.
///
/// # Errors
/// [`Kind::Denied`], [`Kind::NotFound`].
pub async fn get(gate: &Gate, caller: &Caller, id: &str) -> Result<Token, Error> {
    let tokens = list(gate, caller, true).await?;
    tokens.into_iter().find(|token| token.id == id).ok_or_else(|| missing(id))
}

/// Revokes a key, or removes it altogether. Sessions that came in with it are ended.
///
/// # Errors
/// [`Kind::Denied`], [`Kind::NotFound`].
pub async fn revoke(sessions: &Sessions, caller: &Caller, id: &str, remove: bool) -> Result<(), Error> {
    let gate = sessions.gate();
    let permit = gate.authorize(caller, Administer("tokens"))?;
    let (key, at) = (id.to_owned(), now());
    if !gate.housekeep(move |tx| sql::revoke(tx, key.clone(), at, remove)).await? {
        return Err(missing(id));
    }
    tracing::info!(token = id, by = caller.subject.id, "API key revoked");
    gate.revoked(id);
    for connection in sessions.presence().with_token(id) {
        sessions.presence().bid_farewell(&connection.session, "its API key was revoked");
        gate.revoke(&permit, &connection.identity, &connection.session).await?;
    }
    Ok(())
}

/// What a secret gives to whom claims to be `claimed`.
///
/// # Errors
/// [`Kind::Unauthenticated`] for a secret that is none, [`Kind::Denied`] for one that is for somebody else.
pub async fn authenticate(gate: &Gate, secret: &str, claimed: &Identity) -> Result<Credential, Error> {
    let found = look_up(gate, secret).await?;
    check_binding(&found, claimed)?;
    Ok(credential(found))
}

/// The key with this secret. Only what is one costs more than a read: at most one write a key and interval, to note its use.
async fn look_up(gate: &Gate, secret: &str) -> Result<Token, Error> {
    let (hash, at) = (digest(secret), now());
    let found = gate.glance(move |tx| sql::usable(tx, hash.clone(), at)).await?.ok_or_else(unknown)?;
    if sql::is_use_to_be_noted(&found, at) {
        let (id, hash) = (found.id.clone(), digest(secret));
        let noted = gate.housekeep(move |tx| sql::used(tx, hash.clone(), at)).await;
        if let Err(error) = noted {
            tracing::warn!(%error, token = id, "use of an API key not noted");
        }
    }
    Ok(found)
}

/// Who comes with a secret alone, as over HTTP: an administrator, a user, or a sandbox.
///
/// # Errors
/// [`Kind::Unauthenticated`] for a secret that is none, [`Kind::Denied`] for one of somebody who comes another way.
pub async fn bearer(gate: &Gate, secret: &str) -> Result<(Identity, Credential), Error> {
    let found = look_up(gate, secret).await?;
    let identity = match found.kind {
        None => Identity::user("admin", "http")?,
        Some(PrincipalKind::User) => Identity::user(&found.created_by, "http")?,
        Some(PrincipalKind::Sandbox) => Identity::sandbox(&found.created_by)?,
        Some(kind) => {
            let message = format!("this API key is for principals of kind {kind}, which connect over gRPC");
            return Err(Error::new(Kind::Denied, "ERR_PERMISSION_DENIED", message));
        }
    };
    Ok((identity, credential(found)))
}

fn credential(token: Token) -> Credential {
    let gives = |scope: &str| token.scopes.iter().any(|own| own == scope);
    let is_user = token.kind == Some(PrincipalKind::User);
    let named = |word: &str| -> Arc<[glob::Pattern]> {
        let patterns = token.scopes.iter().filter(|_| is_user).filter_map(|scope| scope.strip_prefix(word));
        patterns.filter_map(|pattern| glob::Pattern::new(pattern).ok()).collect()
    };
    Credential {
        is_admin: token.kind.is_none(),
        task: None,
        expires_at: token.expires_at,
        workspaces: token.workspace_patterns.iter().filter_map(|pattern| glob::Pattern::new(pattern).ok()).collect(),
        sandboxes: match token.kind {
            Some(PrincipalKind::User) if gives(SANDBOX_WRITE) => Access::Write,
            Some(PrincipalKind::User) if gives(SANDBOX_READ) => Access::Read,
            _ => Access::None,
        },
        shows: named(SOCKET_UI),
        serves: named(SOCKET_RUNTIME),
        token: Some(token.id),
        acts_in: token.acts_in.map(Into::into),
    }
}

/// Has the key of a sandbox act in a project from now on. The id of a sandbox that was removed is anybody's to use again, in
/// a project of theirs, and its key shall not obey there.
///
/// # Errors
/// [`Kind::NotFound`] if it acts in another one already, as if there were no such sandbox; [`Kind::Unavailable`].
pub(crate) async fn bind(gate: &Gate, credential: &Credential, project: &str) -> Result<(), Error> {
    let (Some(id), None) = (&credential.token, &credential.acts_in) else { return Ok(()) };
    let (id, project) = (id.clone(), project.to_owned());
    let is_bound = gate.housekeep(move |tx| sql::bind(tx, id.clone(), project.clone())).await?;
    if is_bound { Ok(()) } else { Err(crate::sandbox::missing()) }
}

/// Whether the key that a session came in with is still good. To be asked once the session is listed: a key that is revoked
/// before that is found here, and one that is revoked after it ends the session.
///
/// # Errors
/// [`Kind::Unauthenticated`] if not, [`Kind::Unavailable`].
pub async fn confirm(gate: &Gate, credential: &Credential) -> Result<(), Error> {
    let Some(id) = credential.token.clone() else { return Ok(()) };
    let at = now();
    if gate.glance(move |tx| sql::is_good(tx, id.clone(), at)).await? {
        return Ok(());
    }
    Err(unknown())
}

fn unknown() -> Error {
    let message = "credential authentication failed: authentication failed: token not found or expired/revoked";
    Error::new(Kind::Unauthenticated, "ERR_UNAUTHENTICATED", message)
}

fn check_binding(token: &Token, claimed: &Identity) -> Result<(), Error> {
    let denied = |message: String| Err(Error::new(Kind::Denied, "ERR_PERMISSION_DENIED", message));
    let Some(kind) = token.kind else { return Ok(()) };
    if kind != claimed.kind() {
        return denied(format!("API key principal type mismatch: key={kind}, claimed={}", claimed.kind()));
    }
    let bound = &token.created_by;
    let fits = match claimed {
        Identity::User { user, .. } => user == bound,
        // Words that are no identity only say who made the key.
        other if bound.contains(SEPARATOR) => is_bound_to(bound, other),
        _ => true,
    };
    if !fits {
        return denied(format!("API key principal id mismatch: key={bound}, claimed={claimed}"));
    }
    Ok(())
}

fn missing(id: &str) -> Error {
    Error::new(Kind::NotFound, "ERR_NOT_FOUND", format!("token not found: {id}"))
}

fn invalid(message: &'static str) -> Error {
    Error::new(Kind::Invalid, "ERR_INVALID_ARGUMENT", message)
}

/// Patterns of the workspaces that a credential opens.
pub(crate) fn opens(patterns: &Arc<[glob::Pattern]>, workspace: &str) -> bool {
    let options = glob::MatchOptions { require_literal_separator: true, ..glob::MatchOptions::new() };
    patterns.iter().any(|pattern| pattern.as_str() == "*" || pattern.matches_with(workspace, options))
}

#[cfg(test)]
mod tests {
    use super::{Identity, PrincipalKind, Secret, Token, check_binding, digest};

    fn token(kind: Option<PrincipalKind>, created_by: &str) -> Token {
        Token {
            id: String::new(),
            name: String::new(),
            kind,
            created_by: created_by.into(),
            workspace_patterns: Vec::new(),
            scopes: Vec::new(),
            created_at: 0,
            expires_at: None,
            last_used_at: None,
            revoked_at: None,
            acts_in: None,
        }
    }

    #[test]
    fn keys_are_bound_to_whom_they_are_for() {
        let check = |kind, created_by: &str, claimed: Result<Identity, _>, fits: bool| {
            assert_eq!(check_binding(&token(kind, created_by), &claimed.unwrap()).is_ok(), fits, "{created_by}");
        };
        let (agent, user) = (Some(PrincipalKind::Agent), Some(PrincipalKind::User));
        check(None, "_system", Identity::orchestrator("i", "s"), true);
        check(agent, "ops", Identity::agent("w", "i", "s"), true);
        check(agent, "ops", Identity::service("i", "s"), false);
        check(agent, "ag::w::i::s", Identity::agent("w", "i", "s"), true);
        check(agent, "ag::w::i::s", Identity::agent("w", "i", "t"), false);
        check(agent, "ag::w::i::*", Identity::agent("w", "i", "t"), true);
        check(agent, "ag::*::i::t", Identity::agent("w", "i", "t"), false);
        check(agent, "ag::w::i::?", Identity::agent("w", "i", "t"), false);
        check(agent, "ag::w::i::a?", Identity::agent("w", "i", "a?"), true);
        check(user, "alice", Identity::user("alice", "w1"), true);
        check(user, "alice", Identity::user("drew", "w1"), false);
        check(Some(PrincipalKind::Task), "ops", Identity::task("w", "i"), true);
    }

    #[test]
    fn secrets_differ_and_do_not_show_themselves() {
        let (a, b) = (Secret::key().unwrap(), Secret::key().unwrap());
        assert!(a.reveal().starts_with("tlk_") && Secret::task_token().unwrap().reveal().starts_with("tlt_"));
        assert_ne!(a.reveal(), b.reveal());
        assert_eq!(a.reveal().len(), 48);
        assert!(!format!("{a:?}").contains(a.reveal()));
        assert_eq!(digest("").len(), 64);
    }
}

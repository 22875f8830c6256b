//! What principals report of their own doings, to be looked up later. Who reports is stamped by the server; what looks like
//! a secret is blanked out before it is kept.

mod sql;

use std::collections::BTreeMap;

pub(crate) use sql::MIGRATIONS;
use trunkline_store::log::Clock;

use crate::{
    caller::Caller,
    error::{Error, Kind},
    gate::{Gate, ReadTrail, SubmitTrail},
    rule::now,
};

/// Kinds, or workspaces, that a query can leave out.
pub const EXCLUDED_MAX: usize = 16;

/// What a principal may report about; the rest is for the server to say.
const KINDS: [&str; 4] = ["message", "kv", "task", "custom"];

/// Bytes of each text of an event.
const TEXT_BYTES_MAX: usize = 4096;

/// Pieces of metadata.
const METADATA_MAX: usize = 64;

/// Entries of one answer at most, and where no limit is named. The published figures.
const PAGE_MAX: i64 = 500;
const PAGE: i64 = 100;

/// A piece of metadata whose name contains one of these is blanked out. The published list.
const SECRETS: [&str; 11] = [
    "password",
    "passwd",
    "api_key",
    "apikey",
    "secret",
    "token",
    "bearer",
    "authorization",
    "credential",
    "private_key",
    "privatekey",
];

/// What was there instead.
const REDACTED: &str = "[REDACTED]";

/// Something that happened, in its reporter's words.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Event {
    /// `message`, `kv`, `task` or `custom`.
    pub kind: String,
    /// What was done.
    pub operation: String,
    /// To what kind of thing.
    pub resource_kind: String,
    /// To which one.
    pub resource_id: String,
    /// Where; empty for the reporter's own workspace.
    pub workspace: String,
    /// Whether it worked.
    pub success: bool,
    /// Why not.
    pub error: String,
    /// Whatever else.
    pub metadata: BTreeMap<String, String>,
}

/// An event as it is kept.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    /// Grows with time.
    pub id: i64,
    /// When it was reported, in Unix seconds.
    pub at: i64,
    /// The reporter's kind, as rules name it.
    pub actor_kind: String,
    /// The reporter.
    pub actor: String,
    /// Its session.
    pub session: String,
    /// What it reported.
    pub event: Event,
}

/// Which events; empty texts and zeros match all.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Filter {
    /// From then on, in Unix seconds.
    pub from: i64,
    /// Up to then.
    pub to: i64,
    /// See [`Event::kind`].
    pub kind: String,
    /// See [`Entry::actor_kind`]; in any spelling.
    pub actor_kind: String,
    /// See [`Entry::actor`].
    pub actor: String,
    /// See [`Event::resource_kind`].
    pub resource_kind: String,
    /// See [`Event::resource_id`].
    pub resource_id: String,
    /// See [`Event::operation`].
    pub operation: String,
    /// See [`Event::workspace`].
    pub workspace: String,
    /// Only what did not work.
    pub only_failures: bool,
    /// Kinds of reporters to leave out, at most [`EXCLUDED_MAX`].
    pub except_actor_kinds: Vec<String>,
    /// Workspaces to leave out, at most as many.
    pub except_workspaces: Vec<String>,
    /// At most so many.
    pub limit: i64,
    /// Behind so many.
    pub offset: i64,
}

/// Keeps an event; durable when it returns.
///
/// # Errors
/// `ERR_AUDIT_TYPE_FORBIDDEN`, `ERR_PERMISSION_DENIED` for another workspace without the capability,
/// `ERR_INVALID_ARGUMENT` for too much text, [`Kind::Unavailable`].
pub async fn submit(gate: &Gate, caller: &Caller, home: Option<&str>, mut event: Event) -> Result<(), Error> {
    if !KINDS.contains(&event.kind.as_str()) {
        let message = format!("event type not permitted for principal-submitted events: {}", event.kind);
        return Err(Error::new(Kind::Denied, "ERR_AUDIT_TYPE_FORBIDDEN", message));
    }
    if event.workspace.is_empty() {
        home.unwrap_or_default().clone_into(&mut event.workspace);
    }
    let permit = gate.authorize(caller, SubmitTrail { workspace: &event.workspace, home })?;
    check(&event)?;
    for (name, value) in &mut event.metadata {
        let name = name.to_lowercase();
        if SECRETS.iter().any(|secret| name.contains(secret)) {
            REDACTED.clone_into(value);
        }
    }
    let entry = Entry {
        id: 0,
        at: now(),
        actor_kind: caller.subject.kind.clone(),
        actor: caller.identity.to_string(),
        session: caller.session.clone(),
        event,
    };
    gate.keep_trail(&permit, move |tx| sql::insert(tx, entry.clone())).await
}

/// The events that fit, newest first, and how many there are in all, counted up to [`crate::limits::COUNT_MAX`]. A page ends
/// after [`crate::limits::LIST_BYTES_MAX`] even if more events were asked for; the next one begins behind the events that it has.
///
/// # Errors
/// [`Kind::Denied`], [`Kind::Invalid`], [`Kind::Unavailable`].
pub async fn query(gate: &Gate, caller: &Caller, mut filter: Filter) -> Result<(Vec<Entry>, i64), Error> {
    let permit = gate.authorize(caller, ReadTrail { workspace: &filter.workspace })?;
    let excluded = [&filter.except_actor_kinds, &filter.except_workspaces];
    if excluded.iter().any(|list| list.len() > EXCLUDED_MAX) {
        let message = format!("at most {EXCLUDED_MAX} kinds or workspaces can be left out");
        return Err(Error::new(Kind::Invalid, "ERR_INVALID_ARGUMENT", message));
    }
    filter.limit = if filter.limit <= 0 { PAGE } else { filter.limit.min(PAGE_MAX) };
    filter.offset = filter.offset.max(0);
    filter.actor_kind = plain(&filter.actor_kind);
    filter.except_actor_kinds = filter.except_actor_kinds.iter().map(|kind| plain(kind)).collect();
    gate.read_trail(&permit, move |tx| sql::select(tx, filter.clone())).await
}

/// Removes what is older than so many days; with 0 nothing.
///
/// # Errors
/// [`Kind::Unavailable`].
pub async fn sweep(gate: &Gate, days: u64) -> Result<(), Error> {
    if days == 0 {
        return Ok(());
    }
    let age = i64::try_from(days.saturating_mul(86_400)).unwrap_or(i64::MAX);
    // Not the wall clock itself: a step of it must not end the trail.
    let now = i64::try_from(Clock::system().now_ms() / 1000).unwrap_or(i64::MAX);
    let before = now.saturating_sub(age).max(0);
    gate.housekeep(move |tx| sql::remove(tx, before)).await
}

fn check(event: &Event) -> Result<(), Error> {
    let Event { operation, resource_kind, resource_id, workspace, error, metadata, .. } = event;
    let texts = [operation, resource_kind, resource_id, workspace, error];
    let mut texts = texts.into_iter().chain(metadata.iter().flat_map(|(name, value)| [name, value]));
    if texts.any(|text| text.len() > TEXT_BYTES_MAX || text.contains('\0')) || metadata.len() > METADATA_MAX {
        let message =
            format!("a text of an audit event may have {TEXT_BYTES_MAX} bytes, its metadata {METADATA_MAX} entries");
        return Err(Error::new(Kind::Invalid, "ERR_INVALID_ARGUMENT", message));
    }
    Ok(())
}

/// `WorkflowEngine`, `workflow-engine` and `workflow_engine` are one.
fn plain(kind: &str) -> String {
    let (mut plain, mut before) = (String::new(), ' ');
    for c in kind.chars() {
        if c.is_uppercase() && before.is_lowercase() {
            plain.push('_');
        }
        plain.extend(if c == '-' || c == ' ' { '_' } else { c }.to_lowercase());
        before = c;
    }
    plain
}

#[cfg(test)]
mod tests {
    use super::plain;

    #[test]
    fn kinds_are_read_in_any_spelling() {
        for text in ["WorkflowEngine", "workflow_engine", "Workflow Engine", "workflow-engine", "WORKFLOW_ENGINE"] {
            assert_eq!(plain(text), "workflow_engine", "{text}");
        }
        assert_eq!(plain("Agent"), "agent");
    }
}

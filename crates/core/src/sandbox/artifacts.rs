//! Events of a sandbox, folded into what people look at: pure, and total on any JSON.
//!
//! An artifact is something with a place of its own on the screen: a prompt, a text, a tool's run. Its number never changes,
//! and numbers have no holes. [`Fold::apply`] answers what changed; whoever has the artifacts from before and applies the
//! changes in order has the artifacts from after.

mod step;

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    sync::Arc,
};

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use self::step::{Step, text};

/// Text of one field that is kept, in bytes; what is appended beyond it is left out, and the artifact says `truncated`. A
/// page that shows more than this does not move any more.
const TEXT_BYTES_MAX: usize = 4 * 1024 * 1024;

/// Names that an artifact's own fields cannot have: an event's go into `extra`.
const RESERVED: [&str; 8] = ["seq", "id", "kind", "status", "createdAt", "updatedAt", "truncated", "extra"];

/// Something to look at.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Artifact {
    /// From 1, without holes, in the order in which they came to be.
    pub seq: u64,
    /// The event's, or else made from kind and number. Unique within a kind.
    pub id: String,
    /// What it is; see docs/protocol/sandbox.md.
    pub kind: String,
    /// How far it is.
    pub status: String,
    /// Unix milliseconds.
    pub created_at: i64,
    /// Of the last event that changed it.
    pub updated_at: i64,
    /// The rest.
    #[serde(flatten)]
    pub fields: Map<String, Value>,
}

/// What happened to the artifacts.
#[derive(Clone, Debug, PartialEq)]
pub enum Change {
    /// There is another one.
    Created(Arc<Artifact>),
    /// A field of one is another.
    Updated(Update),
}

/// A field that changed.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Update {
    /// Of which artifact.
    pub seq: u64,
    /// Which field.
    pub field: String,
    /// How.
    #[serde(flatten)]
    pub how: How,
    /// When, in Unix milliseconds: the artifact's `updatedAt` from now on.
    pub updated_at: i64,
}

/// What becomes of a field.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum How {
    /// Text at its end.
    Append(String),
    /// A new value.
    Set(Value),
}

/// What events say about the sandbox itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Sign {
    /// A turn began.
    TurnStarted,
    /// A turn ended.
    TurnEnded,
    /// What it is about, in short.
    Summary(String),
}

/// The types of events that say something about the sandbox itself.
pub const SIGNS: [&str; 3] = ["turn_start", "turn_end", "summary"];

/// What an event says about the sandbox itself, if anything.
#[must_use]
pub fn sign(event: &Value) -> Option<Sign> {
    match event.get("type").and_then(Value::as_str)? {
        "turn_start" => Some(Sign::TurnStarted),
        "turn_end" => Some(Sign::TurnEnded),
        "summary" => {
            let mut event = event.as_object()?.clone();
            Some(Sign::Summary(text(&mut event, &["summary", "text"]).unwrap_or_default()))
        }
        _ => None,
    }
}

/// An artifact, and when it came to be and changed, counted in events: what a checkpoint keeps.
#[derive(Clone, Debug)]
pub struct Kept {
    /// The artifact.
    pub artifact: Arc<Artifact>,
    /// The event that made it, by its number.
    pub created_by: u64,
    /// The last one that changed it.
    pub changed_by: u64,
}

/// All artifacts of a sandbox after some of its events.
#[derive(Clone, Debug, Default)]
pub struct Fold {
    entries: Vec<Kept>,
    /// By kind and id.
    named: HashMap<(String, String), u64>,
    rest: Rest,
}

/// What of a fold is not in its artifacts.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Rest {
    /// Events that were folded.
    events: u64,
    /// What events without an id are about, by kind.
    current: BTreeMap<String, u64>,
    /// Those that the end of the turn ends.
    running: BTreeSet<u64>,
}

impl Fold {
    /// Goes on where a fold was.
    #[must_use]
    pub fn restore(entries: Vec<Kept>, rest: Rest) -> Self {
        let name = |entry: &Kept| ((entry.artifact.kind.clone(), entry.artifact.id.clone()), entry.artifact.seq);
        Self { named: entries.iter().map(name).collect(), entries, rest }
    }

    /// What of it is not in its artifacts.
    #[must_use]
    pub fn rest(&self) -> &Rest {
        &self.rest
    }

    /// Events that were folded.
    #[must_use]
    pub fn events(&self) -> u64 {
        self.rest.events
    }

    /// All artifacts, by number.
    pub fn artifacts(&self) -> impl ExactSizeIterator<Item = &Arc<Artifact>> {
        self.entries.iter().map(|entry| &entry.artifact)
    }

    /// What changed since so many events were folded, by number.
    pub fn changed_since(&self, events: u64) -> impl Iterator<Item = Kept> {
        self.entries.iter().filter(move |entry| entry.changed_by > events).cloned()
    }

    /// What those come to that changed since so many events were folded: bytes of text, about.
    #[must_use]
    pub fn bytes_since(&self, events: u64) -> usize {
        let changed = self.entries.iter().filter(|entry| entry.changed_by > events);
        let texts = changed.flat_map(|entry| entry.artifact.fields.values().filter_map(Value::as_str));
        texts.map(str::len).sum()
    }

    /// For somebody who saw artifact `seq` last: that one, all later ones, and those before it that changed after it came to
    /// be. Everything, if there is none of that number.
    #[must_use]
    pub fn from(&self, seq: u64) -> Vec<Arc<Artifact>> {
        let known = usize::try_from(seq).ok().and_then(|seq| seq.checked_sub(1)).and_then(|at| self.entries.get(at));
        let created_by = known.map(|entry| entry.created_by);
        let fits = |entry: &&Kept| created_by.is_none_or(|by| entry.artifact.seq >= seq || entry.changed_by > by);
        self.entries.iter().filter(fits).map(|entry| entry.artifact.clone()).collect()
    }

    /// Folds what came at once. What became of one artifact is told in one change for each field, and what came to be is told
    /// as it is in the end.
    pub fn apply(&mut self, events: impl IntoIterator<Item = Value>, at_ms: i64) -> Vec<Change> {
        let known = self.entries.len();
        let mut step = Step { created_behind: known as u64, updates: Vec::new(), at_ms, fold: self };
        for event in events {
            step.fold.rest.events += 1;
            step.event(event);
        }
        let updates = step.updates;
        let created = self.entries.iter().skip(known).map(|entry| Change::Created(entry.artifact.clone()));
        updates.into_iter().map(Change::Updated).chain(created).collect()
    }
}

#[cfg(test)]
mod tests;

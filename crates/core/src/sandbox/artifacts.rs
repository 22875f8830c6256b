//! Events of a sandbox, folded into what people look at: pure, and total on any JSON.
//!
//! An artifact is something with a place of its own on the screen: a prompt, a text, a tool's run. Its number never changes,
//! and numbers have no holes. [`Fold::apply`] answers what changed; whoever has the artifacts from before and applies the
//! changes in order has the artifacts from after.

mod json;
mod pieces;
mod step;

use std::{
    borrow::Cow,
    collections::{BTreeMap, BTreeSet, HashMap},
    sync::Arc,
};

use serde::{
    Deserialize, Serialize,
    de::{Error as _, IgnoredAny},
};
use serde_json::value::RawValue;

pub(super) use self::json::VALUE_BYTES;
pub use self::{
    json::{Fields, Json, Text},
    pieces::Pieces,
};
use self::{
    json::{fields_bytes, fields_len},
    step::{Step, take_as_text},
};

/// Text of one field that is kept, in bytes; what is appended beyond it is left out, and the artifact says `truncated`. A
/// page that shows more than this does not move any more.
const TEXT_BYTES_MAX: usize = 4 * 1024 * 1024;

/// What of an event's fields is kept in `extra`, in bytes; what is beyond is left out, and the artifact says `truncated`. All
/// of it is told again with each change.
const EXTRA_BYTES_MAX: usize = 64 * 1024;

/// Memory of an artifact's fields: two texts as long as they may be, and as much again as two events. What would make it more is
/// left out, and the artifact says `truncated`. A checkpoint has an artifact in one row, and every other write waits for that.
const FIELDS_BYTES_MAX: usize = 10 * 1024 * 1024;

/// Memory of an artifact besides its fields, about.
pub(super) const ARTIFACT_BYTES: usize = 512;

/// Names that an artifact's own fields cannot have: an event's go into `extra`.
const RESERVED: [&str; 8] = ["seq", "id", "kind", "status", "createdAt", "updatedAt", "truncated", "extra"];

/// Something to look at. Clones share what is large of it.
#[derive(Clone, Debug, PartialEq, Serialize)]
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
    pub fields: Fields,
}

impl Artifact {
    /// An artifact from its JSON.
    ///
    /// # Errors
    /// For what is none.
    pub fn parse(json: &str) -> Result<Self, serde_json::Error> {
        let mut fields: Fields = serde_json::from_str(json)?;
        let missing = |name: &str| serde_json::Error::custom(format!("an artifact without {name}"));
        let mut text = |name: &str| {
            let text = fields.remove(name).and_then(|value| value.as_text().map(Text::to_string));
            text.ok_or_else(|| missing(name))
        };
        let (id, kind, status) = (text("id")?, text("kind")?, text("status")?);
        let mut number = |name: &str| {
            let number = fields.remove(name).and_then(|value| value.as_raw()?.parse::<i64>().ok());
            number.ok_or_else(|| missing(name))
        };
        let (seq, created_at, updated_at) = (number("seq")?, number("createdAt")?, number("updatedAt")?);
        if let Some(extra) = fields.get_mut("extra")
            && let Some(own) = extra.as_fields()
        {
            *extra = Json::Fields(own);
        }
        Ok(Self { seq: seq.unsigned_abs(), id, kind, status, created_at, updated_at, fields })
    }

    /// Memory that it takes, about.
    #[must_use]
    pub fn bytes(&self) -> usize {
        // Its id is known by name, too.
        ARTIFACT_BYTES + 2 * self.id.len() + fields_bytes(&self.fields)
    }
}

/// What happened to the artifacts.
#[derive(Clone, Debug, PartialEq)]
pub enum Change {
    /// There is another one.
    Created(Arc<Artifact>),
    /// A field of one is another.
    Updated(Update),
}

impl Change {
    /// Memory that it takes, about.
    pub(super) fn bytes(&self) -> usize {
        match self {
            Self::Created(artifact) => artifact.bytes(),
            Self::Updated(Update { field, how: How::Append(text), .. }) => VALUE_BYTES + field.len() + text.len(),
            Self::Updated(Update { field, how: How::Set(value), .. }) => field.len() + value.bytes(),
        }
    }
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
    Set(Json),
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

/// The types of events that are pieces of one text: each with the kind of artifact and the field that it is at the end of. Of
/// others it is not known what they are.
pub(super) const DELTAS: [(&str, Delta); 4] = [
    ("text_delta", Delta { kind: "text", field: "text" }),
    ("thinking_delta", Delta { kind: "thinking", field: "text" }),
    ("tool_input_delta", Delta { kind: "tool", field: "input" }),
    ("tool_output_delta", Delta { kind: "tool", field: "output" }),
];

/// What a piece of text is of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Delta {
    kind: &'static str,
    field: &'static str,
}

impl Delta {
    /// By the type of an event.
    pub(super) fn of(name: &str) -> Option<Self> {
        DELTAS.iter().find(|(known, _)| *known == name).map(|(_, delta)| *delta)
    }
}

/// An event, read: of any JSON.
#[derive(Clone, Debug, PartialEq)]
pub enum Event {
    /// A piece of text and nothing else, with the id that it gives. By far the most.
    Piece(Delta, Option<String>, Text),
    /// An object with a type that is text, and its other fields.
    Typed(String, Fields),
    /// Any other JSON.
    Other(Json),
}

impl Event {
    /// Reads an event as it was told.
    #[must_use]
    pub fn read(told: &RawValue) -> Self {
        Self::read_piece(told.get()).unwrap_or_else(|| Self::read_any(told))
    }

    fn read_any(told: &RawValue) -> Self {
        if let Ok(mut fields) = serde_json::from_str::<Fields>(told.get())
            && fields.get("type").is_some_and(|kind| kind.as_text().is_some())
            && let Some(kind) = fields.remove("type")
        {
            return Self::Typed(kind.into_text().to_string(), fields);
        }
        Self::Other(Json::read(told))
    }

    /// Reads what is a piece of text, written as [`Events::parse`](super::Events::parse) joins them. Nothing for what means
    /// more than that.
    fn read_piece(told: &str) -> Option<Self> {
        #[derive(Deserialize)]
        #[serde(deny_unknown_fields)]
        struct Piece<'a> {
            #[serde(rename = "type")]
            _kind: IgnoredAny,
            #[serde(borrow)]
            delta: Cow<'a, str>,
            #[serde(default)]
            id: String,
        }
        let (kind, _) = told.strip_prefix("{\"type\":\"")?.split_once('"')?;
        let of = Delta::of(kind)?;
        let Piece { delta, id, .. } = serde_json::from_str(told).ok()?;
        Some(Self::Piece(of, Some(id).filter(|id| !id.is_empty()), (&*delta).into()))
    }

    /// What a record says that is no JSON at all.
    pub(super) fn unreadable(told: &[u8]) -> Self {
        Self::Other(Json::Text((&*String::from_utf8_lossy(told)).into()))
    }

    /// What it says about the sandbox itself, if anything.
    #[must_use]
    pub fn sign(self) -> Option<Sign> {
        let Self::Typed(kind, mut fields) = self else { return None };
        match &*kind {
            "turn_start" => Some(Sign::TurnStarted),
            "turn_end" => Some(Sign::TurnEnded),
            "summary" => {
                let summary = take_as_text(&mut fields, &["summary", "text"]).unwrap_or_default();
                Some(Sign::Summary(summary.to_string()))
            }
            _ => None,
        }
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
    /// By kind, then id.
    named: HashMap<Box<str>, HashMap<Box<str>, u64>>,
    /// Memory that they take, about.
    bytes: usize,
    rest: Rest,
}

/// Some of the artifacts: those from a number on, and those that changed after so many events. By default all.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Wanted {
    from: u64,
    changed_since: u64,
}

impl Wanted {
    /// Those that changed after so many events were folded.
    #[must_use]
    pub fn changed_since(events: u64) -> Self {
        Self { from: u64::MAX, changed_since: events }
    }
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
        let mut fold =
            Self { bytes: entries.iter().map(|entry| entry.artifact.bytes()).sum(), rest, ..Self::default() };
        for Kept { artifact, .. } in &entries {
            fold.name(&artifact.kind, &artifact.id, artifact.seq);
        }
        fold.entries = entries;
        fold
    }

    fn name(&mut self, kind: &str, id: &str, seq: u64) {
        match self.named.get_mut(kind) {
            Some(named) => drop(named.insert(id.into(), seq)),
            None => drop(self.named.insert(kind.into(), [(id.into(), seq)].into())),
        }
    }

    fn find(&self, kind: &str, id: &str) -> Option<u64> {
        self.named.get(kind)?.get(id).copied()
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

    /// Memory that the artifacts take, about: their text, and a fixed amount for each and for each field.
    #[must_use]
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// All artifacts, by number.
    pub fn artifacts(&self) -> impl ExactSizeIterator<Item = &Arc<Artifact>> {
        self.entries.iter().map(|entry| &entry.artifact)
    }

    /// What changed since so many events were folded, by number.
    pub fn changed_since(&self, events: u64) -> impl Iterator<Item = Kept> {
        self.entries.iter().filter(move |entry| entry.changed_by > events).cloned()
    }

    /// What those come to that changed since so many events were folded: bytes of their fields, about as they were told.
    #[must_use]
    pub fn bytes_since(&self, events: u64) -> usize {
        let changed = self.entries.iter().filter(|entry| entry.changed_by > events);
        changed.map(|entry| fields_len(&entry.artifact.fields)).sum()
    }

    /// What somebody wants who saw artifact `seq` last: that one, all later ones, and those before it that changed after it
    /// came to be. Everything, if there is none of that number.
    #[must_use]
    pub fn wanted(&self, seq: u64) -> Wanted {
        let known = usize::try_from(seq).ok().and_then(|seq| seq.checked_sub(1)).and_then(|at| self.entries.get(at));
        known.map_or(Wanted::default(), |known| Wanted { from: seq, changed_since: known.created_by })
    }

    /// Those that are wanted from number `at` on, up to `bytes` of them and the next one; and the number to go on at.
    #[must_use]
    pub fn walk(&self, wanted: Wanted, at: u64, bytes: usize) -> (Vec<Arc<Artifact>>, Option<u64>) {
        let (mut found, mut found_bytes) = (Vec::new(), 0);
        let skip = usize::try_from(at.saturating_sub(1)).unwrap_or(usize::MAX);
        for Kept { artifact, changed_by, .. } in self.entries.iter().skip(skip) {
            if artifact.seq < wanted.from && *changed_by <= wanted.changed_since {
                continue;
            }
            if found_bytes >= bytes {
                return (found, Some(artifact.seq));
            }
            found_bytes += artifact.bytes();
            found.push(artifact.clone());
        }
        (found, None)
    }

    /// Folds what came at once. What became of one artifact is told in one change for each field, and what came to be is told
    /// as it is in the end.
    pub fn apply(&mut self, events: impl IntoIterator<Item = Event>, at_ms: i64) -> Vec<Change> {
        let known = self.entries.len();
        let mut step = Step::new(self, at_ms);
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

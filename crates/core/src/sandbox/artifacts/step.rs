//! What each event does.

use std::{borrow::Cow, collections::HashMap, sync::Arc};

use super::{
    Artifact, Delta, EXTRA_BYTES_MAX, Event, FIELDS_BYTES_MAX, Fields, Fold, How, Json, Kept, RESERVED, TEXT_BYTES_MAX,
    Text, Update, VALUE_BYTES, json::fields_bytes,
};

/// Events that came at once, being folded.
pub(super) struct Step<'a> {
    pub(super) fold: &'a mut Fold,
    /// Later ones are told whole.
    created_behind: u64,
    pub(super) updates: Vec<Update>,
    /// Where the update of a field of an artifact is.
    places: HashMap<u64, HashMap<String, usize>>,
    /// What the fields of artifacts come to that were looked at.
    sizes: HashMap<u64, usize>,
    at_ms: i64,
}

impl<'a> Step<'a> {
    pub(super) fn new(fold: &'a mut Fold, at_ms: i64) -> Self {
        let created_behind = fold.entries.len() as u64;
        Self { fold, created_behind, updates: Vec::new(), places: HashMap::new(), sizes: HashMap::new(), at_ms }
    }
}

impl Step<'_> {
    pub(super) fn event(&mut self, event: Event) {
        let (kind, fields) = match event {
            Event::Piece(of, id, delta) => return self.delta(of, id.as_deref(), &delta, Fields::new()),
            Event::Typed(kind, fields) => (kind, fields),
            Event::Other(other) => return self.custom(null(), other),
        };
        match kind.as_str() {
            "user_prompt" => self.whole("user_prompt", "done", fields, &["text", "prompt"]),
            "text" => self.full("text", fields),
            "thinking" => self.full("thinking", fields),
            "tool_start" => self.tool_start(fields),
            "tool_end" => self.tool_end(fields),
            "file_change" => self.whole("file_change", "done", fields, &[]),
            "plan" => self.state("plan", fields),
            "usage" => self.state("usage", fields),
            "status" => self.state("status", fields),
            "question" => self.asked("question", fields),
            "answer" => self.answered("question", "answer", fields, &["answer", "text"]),
            "approval_request" => self.asked("approval", fields),
            "approval" => self.answered("approval", "decision", fields, &["decision", "approved"]),
            "error" => self.whole("error", "error", fields, &["message", "error", "text"]),
            "turn_start" => self.turn_start(fields),
            "turn_end" => self.turn_end(fields),
            "summary" | "heartbeat" => {}
            name => match Delta::of(name) {
                Some(of) => self.piece(of, fields),
                None => self.custom(Json::Text(name.into()), Json::of(&fields)),
            },
        }
    }

    /// Something that is not told in the vocabulary.
    fn custom(&mut self, kind: Json, data: Json) {
        self.settle_texts();
        let fields = Fields::from([("type".to_owned(), kind), ("data".to_owned(), data)]);
        self.create("custom", None, "done", fields);
    }

    /// Something that comes as a whole.
    fn whole(&mut self, kind: &str, status: &str, mut fields: Fields, texts: &[&str]) {
        self.settle_texts();
        let id = take_id(&mut fields);
        if let (Some(text), Some(name)) = (take_as_text(&mut fields, texts), texts.first()) {
            fields.insert((*name).to_owned(), text.into());
        }
        match id.as_deref().and_then(|id| self.find(kind, id)) {
            Some(seq) => self.set_all(seq, fields),
            None => drop(self.create(kind, id, status, fields)),
        }
    }

    /// A piece of text with other fields.
    fn piece(&mut self, of: Delta, mut fields: Fields) {
        let id = take_id(&mut fields);
        let delta = take_as_text(&mut fields, &["delta", "text"]).unwrap_or_default();
        self.delta(of, id.as_deref(), &delta, fields);
    }

    /// Text at the end of a field: of the artifact with that id, or the current one of its kind, or a new one.
    fn delta(&mut self, Delta { kind, field }: Delta, id: Option<&str>, delta: &Text, fields: Fields) {
        let is_tool = kind == "tool";
        if !is_tool {
            self.settle_texts_but(kind);
        }
        let seq = self.about(kind, id).unwrap_or_else(|| {
            let status = if is_tool { "running" } else { "streaming" };
            let seq = self.create(kind, id.map(ToOwned::to_owned), status, Fields::new());
            self.fold.rest.running.insert(seq);
            seq
        });
        if id.is_none() && self.fold.rest.current.get(kind) != Some(&seq) {
            self.fold.rest.current.insert(kind.to_owned(), seq);
        }
        if !is_tool {
            self.reopen(seq);
        }
        self.append(seq, field, delta);
        // What pieces make is not also set.
        if !fields.is_empty() {
            self.set_all_but(seq, fields, &[field, &beside(field)]);
        }
    }

    /// A text that is complete: what was told of it in pieces is replaced.
    fn full(&mut self, kind: &str, mut fields: Fields) {
        let id = take_id(&mut fields);
        let text = take_as_text(&mut fields, &["text", "content"]).unwrap_or_default();
        self.settle_texts_but(kind);
        let seq = self.about(kind, id.as_deref()).unwrap_or_else(|| self.create(kind, id, "done", Fields::new()));
        self.replace(seq, "text", text);
        self.set_all(seq, fields);
        self.end(seq, "done");
    }

    fn tool_start(&mut self, mut fields: Fields) {
        self.settle_texts();
        let id = take_id(&mut fields);
        let seq = match id.as_deref().and_then(|id| self.find("tool", id)) {
            Some(seq) => seq,
            None => {
                let seq = self.create("tool", id, "running", Fields::new());
                self.fold.rest.running.insert(seq);
                seq
            }
        };
        self.fold.rest.current.insert("tool".to_owned(), seq);
        self.set_all(seq, fields);
    }

    fn tool_end(&mut self, mut fields: Fields) {
        let id = take_id(&mut fields);
        let is_error =
            says_error(&fields) || fields.get("isError").is_some_and(|is_error| is_error.as_raw() == Some("true"));
        let seq =
            self.about("tool", id.as_deref()).unwrap_or_else(|| self.create("tool", id, "running", Fields::new()));
        self.set_all(seq, fields);
        self.end(seq, if is_error { "error" } else { "done" });
    }

    /// Something of which there is one in a turn, or one of an id.
    fn state(&mut self, kind: &str, mut fields: Fields) {
        let id = take_id(&mut fields);
        if kind == "status"
            && let Some(text) = take_as_text(&mut fields, &["text", "status", "message"])
        {
            fields.insert("text".to_owned(), text.into());
        }
        match self.about(kind, id.as_deref()) {
            Some(seq) => self.set_all(seq, fields),
            None => {
                let is_nameless = id.is_none();
                let seq = self.create(kind, id, "done", fields);
                if is_nameless {
                    self.fold.rest.current.insert(kind.to_owned(), seq);
                }
            }
        }
    }

    fn asked(&mut self, kind: &str, mut fields: Fields) {
        self.settle_texts();
        let id = take_id(&mut fields);
        let seq = match id.as_deref().and_then(|id| self.find(kind, id)) {
            Some(seq) => {
                self.set_all(seq, fields);
                self.set_status(seq, "open");
                seq
            }
            None => self.create(kind, id, "open", fields),
        };
        self.fold.rest.current.insert(kind.to_owned(), seq);
    }

    fn answered(&mut self, kind: &str, field: &str, mut fields: Fields, names: &[&str]) {
        let id = take_id(&mut fields);
        let seq = self.about(kind, id.as_deref()).unwrap_or_else(|| self.create(kind, id, "open", Fields::new()));
        let answer = names.iter().find_map(|name| fields.remove(*name)).unwrap_or_else(null);
        let word = match (kind, &answer) {
            ("approval", Json::Text(word)) => word.to_string(),
            ("approval", Json::Raw(raw)) => raw.get().to_owned(),
            _ => String::new(),
        };
        let status =
            match (&*word, answer.as_text().is_some()) {
                ("true", false)
                | ("approve" | "approved" | "allow" | "allowed" | "accept" | "accepted" | "yes", true) => "approved",
                ("false", false)
                | ("deny" | "denied" | "reject" | "rejected" | "decline" | "declined" | "no", true) => "denied",
                _ => "answered",
            };
        self.set(seq, field, answer);
        self.set_all(seq, fields);
        self.end(seq, status);
    }

    fn turn_start(&mut self, mut fields: Fields) {
        self.end_turn("interrupted");
        let id = take_id(&mut fields).or_else(|| take_text(&mut fields, "turnId"));
        let seq = match id.as_deref().and_then(|id| self.find("turn", id)) {
            Some(seq) => {
                self.set_all(seq, fields);
                self.set_status(seq, "running");
                seq
            }
            None => self.create("turn", id, "running", fields),
        };
        self.fold.rest.current.insert("turn".to_owned(), seq);
    }

    fn turn_end(&mut self, mut fields: Fields) {
        let id = take_id(&mut fields).or_else(|| take_text(&mut fields, "turnId"));
        let is_error = says_error(&fields);
        if let Some(seq) = self.about("turn", id.as_deref()) {
            self.set_all(seq, fields);
            self.end(seq, if is_error { "error" } else { "done" });
        } else if id.is_some() || !fields.is_empty() {
            self.create("turn", id, if is_error { "error" } else { "done" }, fields);
        }
        self.end_turn("done");
    }

    /// What was going on in the turn does not any more.
    fn end_turn(&mut self, turn: &str) {
        for seq in std::mem::take(&mut self.fold.rest.running) {
            let is_tool = self.artifact(seq).is_some_and(|artifact| artifact.kind == "tool");
            self.set_status(seq, if is_tool { "interrupted" } else { "done" });
        }
        if let Some(seq) = self.fold.rest.current.get("turn").copied() {
            self.set_status(seq, turn);
        }
        self.fold.rest.current.clear();
    }

    /// A text without a name ends where something else begins.
    fn settle_texts(&mut self) {
        self.settle_texts_but("");
    }

    fn settle_texts_but(&mut self, kind: &str) {
        for other in ["text", "thinking"] {
            if other != kind
                && let Some(seq) = self.fold.rest.current.get(other).copied()
            {
                self.end(seq, "done");
            }
        }
    }

    fn find(&self, kind: &str, id: &str) -> Option<u64> {
        self.fold.find(kind, id)
    }

    /// The artifact that an event of a kind is about.
    fn about(&self, kind: &str, id: Option<&str>) -> Option<u64> {
        match id {
            Some(id) => self.find(kind, id),
            None => self.fold.rest.current.get(kind).copied(),
        }
    }

    fn artifact(&self, seq: u64) -> Option<&Artifact> {
        let at = usize::try_from(seq).ok()?.checked_sub(1)?;
        self.fold.entries.get(at).map(|entry| &*entry.artifact)
    }

    fn create(&mut self, kind: &str, id: Option<String>, status: &str, fields: Fields) -> u64 {
        let (seq, at_ms) = (self.fold.entries.len() as u64 + 1, self.at_ms);
        // A name that somebody gave may be the one that would be made.
        let id = id.unwrap_or_else(|| {
            let mut made = format!("{kind}-{seq}");
            while self.find(kind, &made).is_some() {
                made.push('+');
            }
            made
        });
        self.fold.name(kind, &id, seq);
        let artifact = Artifact {
            seq,
            id,
            kind: kind.to_owned(),
            status: status.to_owned(),
            created_at: at_ms,
            updated_at: at_ms,
            fields: Fields::new(),
        };
        let by = self.fold.rest.events;
        self.fold.bytes += artifact.bytes();
        self.fold.entries.push(Kept { artifact: Arc::new(artifact), created_by: by, changed_by: by });
        self.set_all(seq, fields);
        seq
    }

    /// Memory that the fields of an artifact take, about. They are counted once, as there may be many.
    fn size(&mut self, seq: u64) -> usize {
        if let Some(size) = self.sizes.get(&seq) {
            return *size;
        }
        let size = self.artifact(seq).map_or(0, |artifact| fields_bytes(&artifact.fields));
        self.sizes.insert(seq, size);
        size
    }

    /// The artifact, to be changed.
    fn change(&mut self, seq: u64) -> Option<&mut Artifact> {
        let (by, at_ms) = (self.fold.rest.events, self.at_ms);
        let at = usize::try_from(seq).ok()?.checked_sub(1)?;
        let entry = self.fold.entries.get_mut(at)?;
        entry.changed_by = by;
        let artifact = Arc::make_mut(&mut entry.artifact);
        artifact.updated_at = at_ms;
        Some(artifact)
    }

    fn tell(&mut self, seq: u64, field: &str, how: How) {
        if seq > self.created_behind {
            return;
        }
        let updated_at = self.at_ms;
        let places = self.places.entry(seq).or_default();
        let Some(update) = places.get(field).and_then(|place| self.updates.get_mut(*place)) else {
            places.insert(field.to_owned(), self.updates.len());
            return self.updates.push(Update { seq, field: field.to_owned(), how, updated_at });
        };
        match (&mut update.how, how) {
            (How::Append(before), How::Append(more)) => before.push_str(&more),
            (How::Set(Json::Text(before)), How::Append(more)) => before.push_str(&more),
            (before, how) => *before = how,
        }
    }

    /// As [`Step::tell`], for text at the end of a field, which mostly goes on where the last one ended.
    fn tell_more(&mut self, seq: u64, field: &str, more: &str) {
        let last = self.updates.last_mut().filter(|update| update.seq == seq && update.field == field);
        match last.map(|update| &mut update.how) {
            Some(How::Append(text)) => text.push_str(more),
            Some(How::Set(Json::Text(text))) => text.push_str(more),
            _ => self.tell(seq, field, How::Append(more.to_owned())),
        }
    }

    fn append(&mut self, seq: u64, field: &str, delta: &Text) {
        let size = self.size(seq);
        // Behind what was left out, nothing fits.
        let Some(artifact) = self.artifact(seq).filter(|artifact| !artifact.fields.contains_key("truncated")) else {
            return;
        };
        let field = match artifact.fields.get(field) {
            None | Some(Json::Text(_)) => Cow::Borrowed(field),
            // It came as something else than text.
            Some(_) => Cow::Owned(beside(field)),
        };
        let known = artifact.fields.get(&*field).and_then(Json::as_text).map(Text::len);
        let mut kept = Cow::Borrowed(delta);
        let taken = if known.is_none() { size + field.len() + VALUE_BYTES } else { size };
        let room = TEXT_BYTES_MAX.saturating_sub(known.unwrap_or(0)).min(FIELDS_BYTES_MAX.saturating_sub(taken));
        let is_cut = delta.len() > room && kept.to_mut().truncate(room);
        if known.is_none() {
            self.set(seq, &field, Json::Text(kept.into_owned()));
        } else {
            kept.parts().for_each(|more| self.extend(seq, &field, more));
        }
        if is_cut {
            self.set(seq, "truncated", yes());
        }
    }

    /// Adds to text that is there.
    fn extend(&mut self, seq: u64, field: &str, more: &str) {
        if let Some(artifact) = self.change(seq)
            && let Some(Json::Text(text)) = artifact.fields.get_mut(field)
        {
            text.push_str(more);
            self.fold.bytes += more.len();
            *self.sizes.entry(seq).or_default() += more.len();
        }
        self.tell_more(seq, field, more);
    }

    fn replace(&mut self, seq: u64, field: &str, mut text: Text) {
        let is_cut = text.truncate(TEXT_BYTES_MAX);
        let known = self.artifact(seq).and_then(|artifact| artifact.fields.get(field)).and_then(Json::as_text);
        match known.and_then(|known| text.behind(known)) {
            Some(more) => self.append(seq, field, &more),
            None => self.set(seq, field, text.into()),
        }
        if is_cut {
            self.set(seq, "truncated", yes());
        }
    }

    fn set(&mut self, seq: u64, field: &str, value: Json) {
        let Some(artifact) = self.artifact(seq).filter(|artifact| artifact.fields.get(field) != Some(&value)) else {
            return;
        };
        let before = artifact.fields.get(field).map_or(0, |known| field.len() + known.bytes());
        let bytes = field.len() + value.bytes();
        let size = (self.size(seq) + bytes).saturating_sub(before);
        if size > FIELDS_BYTES_MAX && bytes > before && field != "truncated" {
            return self.set(seq, "truncated", yes());
        }
        self.sizes.insert(seq, size);
        if let Some(artifact) = self.change(seq) {
            artifact.fields.insert(field.to_owned(), value.clone());
        }
        self.fold.bytes = (self.fold.bytes + bytes).saturating_sub(before);
        self.tell(seq, field, How::Set(value));
    }

    /// An event's fields; those whose names are taken go into `extra`.
    fn set_all(&mut self, seq: u64, fields: Fields) {
        self.set_all_but(seq, fields, &[]);
    }

    fn set_all_but(&mut self, seq: u64, fields: Fields, taken: &[&str]) {
        let is_own = |name: &str| !RESERVED.contains(&name) && !taken.contains(&name);
        let (own, others): (Fields, Fields) = fields.into_iter().partition(|(name, _)| is_own(name));
        own.into_iter().for_each(|(name, value)| self.set(seq, &name, value));
        if others.is_empty() {
            return;
        }
        let known = self.artifact(seq).and_then(|artifact| artifact.fields.get("extra"));
        let mut extra = known.and_then(Json::as_fields).unwrap_or_default();
        let mut is_cut = false;
        for (name, value) in others {
            let before = extra.get(&name).map_or(0, |before| name.len() + before.bytes());
            if fields_bytes(&extra) - before + name.len() + value.bytes() > EXTRA_BYTES_MAX {
                is_cut = true;
            } else {
                extra.insert(name, value);
            }
        }
        self.set(seq, "extra", Json::Fields(extra));
        if is_cut {
            self.set(seq, "truncated", yes());
        }
    }

    fn set_status(&mut self, seq: u64, status: &str) {
        if self.artifact(seq).is_none_or(|artifact| artifact.status == status) {
            return;
        }
        if let Some(artifact) = self.change(seq) {
            status.clone_into(&mut artifact.status);
        }
        self.tell(seq, "status", How::Set(Json::Text(status.into())));
    }

    /// A text that is being told again.
    fn reopen(&mut self, seq: u64) {
        self.set_status(seq, "streaming");
        self.fold.rest.running.insert(seq);
    }

    fn end(&mut self, seq: u64, status: &str) {
        self.set_status(seq, status);
        self.fold.rest.running.remove(&seq);
        self.fold.rest.current.retain(|_, current| *current != seq);
    }
}

/// Where text goes that belongs to a field that is none.
fn beside(field: &str) -> String {
    format!("{field}Text")
}

fn null() -> Json {
    Json::of(&())
}

fn yes() -> Json {
    Json::of(&true)
}

/// Whether an event says that something failed.
fn says_error(fields: &Fields) -> bool {
    fields.get("error").is_some_and(|error| !matches!(error.as_raw(), Some("null" | "false")))
}

/// The id that an event gives, as text.
fn take_id(fields: &mut Fields) -> Option<String> {
    take_text(fields, "id").filter(|id| !id.is_empty())
}

fn take_text(fields: &mut Fields, name: &str) -> Option<String> {
    let is_number = |raw: &str| raw.starts_with(|first: char| first == '-' || first.is_ascii_digit());
    let is_text = |value: &Json| value.as_text().is_some() || value.as_raw().is_some_and(is_number);
    fields.get(name).is_some_and(is_text).then(|| fields.remove(name)).flatten().map(|id| id.into_text().to_string())
}

/// The first of these fields that is there, as text.
pub(super) fn take_as_text(fields: &mut Fields, names: &[&str]) -> Option<Text> {
    names.iter().find_map(|name| fields.remove(*name)).map(Json::into_text)
}

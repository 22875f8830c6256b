//! What sandboxes tell and are told, as it comes: checked, and kept in as few bytes as mean the same.

use std::{borrow::Cow, fmt};

use bytes::Bytes;
use serde::{
    Deserialize, Deserializer,
    de::{Error as _, IgnoredAny, MapAccess, Visitor},
};
use serde_json::{Value, value::RawValue};

use super::{
    artifacts::{self, ARTIFACT_BYTES, Change, Event, Fold, SIGNS, Sign, VALUE_BYTES},
    invalid,
    keep::Record,
};
use crate::{
    error::{Error, Kind},
    json,
};

/// Events in one request.
const EVENTS_MAX: usize = 10_000;

/// What a sandbox tells at once, read.
pub struct Events {
    /// What is kept of it.
    pub(super) body: Bytes,
    pub(super) count: u64,
    /// Memory of what is folded from what is kept, besides its bytes: at most so much.
    pub(super) overhead: usize,
    pub(super) signs: Vec<Sign>,
    /// Those that are signs, of life or of something else.
    signs_count: u64,
}

/// The type of events that are a sign of life and nothing else.
const HEARTBEAT: &str = "heartbeat";

/// Memory of what one event comes to, besides its bytes and its fields: an artifact, with what every one of its kind has.
pub(super) const EVENT_BYTES: usize = ARTIFACT_BYTES + 2 * VALUE_BYTES;

/// Longest body of a few signs, in bytes.
const SIGNS_BYTES_MAX: usize = 4096;

impl Events {
    /// How many.
    #[must_use]
    pub fn count(&self) -> u64 {
        self.count
    }

    /// Folds what the log keeps of it, as readers of the log do. Answers what changed.
    pub fn apply_to(&self, fold: &mut Fold, at_ms: i64) -> Vec<Change> {
        let record = Record::read(&self.body, at_ms);
        fold.apply(record.events().map(|(event, _)| event), record.at_ms)
    }

    /// Whether it is signs alone, and small.
    pub(super) fn is_small_sign(&self) -> bool {
        self.signs_count == self.count && self.body.len() <= SIGNS_BYTES_MAX
    }

    /// Reads one event, or several in a list. Pieces of one text become one piece: the fold makes no difference, and the log
    /// keeps less.
    ///
    /// # Errors
    /// [`Kind::Invalid`] for what is neither.
    pub fn parse(body: Bytes) -> Result<Self, Error> {
        let read = |e: serde_json::Error| invalid(format!("the body is no JSON: {e}"));
        // By far the most: nothing but pieces.
        if let Some(Pieces { joined, count }) = Pieces::alike(&body)
            && count <= EVENTS_MAX
        {
            let (overhead, count) = (joined.overhead, count as u64);
            let body = joined.end().map_or(body, Bytes::from);
            return Ok(Self { body, count, overhead, signs: Vec::new(), signs_count: 0 });
        }
        let events: Vec<&RawValue> = if body.trim_ascii_start().starts_with(b"[") {
            serde_json::from_slice(&body).map_err(read)?
        } else {
            vec![serde_json::from_slice(&body).map_err(read)?]
        };
        if events.is_empty() || events.len() > EVENTS_MAX {
            return Err(invalid(format!("1 to {EVENTS_MAX} events are allowed, not {}", events.len())));
        }
        let (mut signs, mut signs_count, mut joined) = (Vec::new(), 0, Joined::default());
        for (at, event) in events.iter().enumerate() {
            if let Ok(piece) = json::object::<Piece<'_>>(event.get().as_bytes())
                && piece.is_one()
            {
                joined.piece(&piece);
                continue;
            }
            let kind: Kinded<'_> = json::object(event.get().as_bytes())
                .map_err(|_| invalid(format!("event {at} is no object with a \"type\" that is text")))?;
            signs_count += u64::from(SIGNS.contains(&&*kind.kind) || kind.kind == HEARTBEAT);
            if SIGNS.contains(&&*kind.kind) {
                // As it will be kept.
                let mended = whole_characters(event.get()).and_then(|mended| RawValue::from_string(mended).ok());
                signs.extend(Event::read(mended.as_deref().unwrap_or(event)).sign());
            }
            joined.whole(event.get(), kind.overhead);
        }
        let (overhead, count) = (joined.overhead, events.len() as u64);
        let kept = joined.end();
        let mended = whole_characters(kept.as_deref().or(str::from_utf8(&body).ok()).unwrap_or_default());
        Ok(Self { body: mended.or(kept).map_or(body, Bytes::from), count, overhead, signs, signs_count })
    }
}

/// JSON without halves of characters, if it has any. Programs that cut texts without looking write them, as `\ud83d` and
/// `\ude00`; they are no text, and what has one would not be read again. Each becomes a replacement character.
fn whole_characters(json: &str) -> Option<String> {
    let half = |from: &str| {
        let number = from.strip_prefix("\\u").and_then(|digits| u16::from_str_radix(digits.get(..4)?, 16).ok());
        number.filter(|number| (0xd800..0xe000).contains(number))
    };
    let (mut mended, mut rest, mut is_mended) = (String::new(), json, false);
    while let Some(at) = rest.find('\\') {
        let (before, escape) = rest.split_at(at);
        let length = match (half(escape), escape.get(6..).and_then(half)) {
            (Some(..0xdc00), Some(0xdc00..)) => 12,
            (Some(_), _) => 0,
            (None, _) => escape.char_indices().nth(2).map_or(escape.len(), |(end, _)| end),
        };
        mended.push_str(before);
        mended.push_str(if length == 0 { "\\ufffd" } else { &escape[..length] });
        is_mended |= length == 0;
        rest = &escape[if length == 0 { 6 } else { length }..];
    }
    is_mended.then(|| mended + rest)
}

/// What every event has, and what it comes to.
struct Kinded<'a> {
    kind: Cow<'a, str>,
    /// Memory besides its bytes, at most.
    overhead: usize,
}

/// The fields of an event that count more than others: an id is also a name.
#[derive(Deserialize)]
#[serde(field_identifier, rename_all = "camelCase")]
enum Field {
    Type,
    Id,
    TurnId,
    #[serde(other)]
    Other,
}

impl<'de> Deserialize<'de> for Kinded<'de> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_map(Telling)
    }
}

struct Telling;

impl<'de> Visitor<'de> for Telling {
    type Value = Kinded<'de>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an event")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut fields: A) -> Result<Kinded<'de>, A::Error> {
        #[derive(Deserialize)]
        struct Word<'a>(#[serde(borrow)] Cow<'a, str>);
        let (mut kind, mut overhead) = (None, EVENT_BYTES);
        while let Some(field) = fields.next_key::<Field>()? {
            overhead += VALUE_BYTES;
            match field {
                Field::Type if kind.is_some() => return Err(A::Error::duplicate_field("type")),
                Field::Type => kind = Some(fields.next_value::<Word<'_>>()?.0),
                Field::Id | Field::TurnId => overhead += fields.next_value::<&RawValue>()?.get().len(),
                Field::Other => drop(fields.next_value::<IgnoredAny>()?),
            }
        }
        let kind = kind.ok_or_else(|| A::Error::missing_field("type"))?;
        Ok(Kinded { kind, overhead })
    }
}

/// A piece of a text, and nothing else. The text is as it was written, in its quotes.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Piece<'a> {
    #[serde(rename = "type")]
    kind: &'a str,
    #[serde(borrow)]
    delta: &'a RawValue,
    #[serde(borrow, default)]
    id: Option<&'a RawValue>,
}

/// A list of nothing but pieces, joined while it is read.
struct Pieces<'a> {
    joined: Joined<'a>,
    count: usize,
}

impl<'a> Pieces<'a> {
    /// Reads what most programs write: each piece as the one before but for its text, without spaces. Nothing for everything
    /// else, which is read with more care.
    fn alike(body: &'a [u8]) -> Option<Self> {
        const BEGIN: &str = "{\"type\":\"";
        const DELTA: &str = "_delta\",\"delta\":\"";
        let mut rest = str::from_utf8(body).ok()?.strip_prefix('[')?;
        let kind = &rest.strip_prefix(BEGIN)?[..rest.find(DELTA)?.checked_sub(BEGIN.len())? + "_delta".len()];
        let is_known = artifacts::Delta::of(kind).is_some();
        let head = rest.get(..BEGIN.len() + kind.len() + DELTA.len() - "_delta".len()).filter(|_| is_known)?;
        let mut pieces = Self { joined: Joined::default(), count: 0 };
        pieces.joined.text.reserve(body.len());
        loop {
            rest = rest.strip_prefix(head)?;
            let (text, behind) = rest.split_at(text_end(rest)?);
            pieces.joined.add(kind, None, text);
            pieces.count += 1;
            rest = behind.strip_prefix("\"}")?;
            match rest {
                "]" => return Some(pieces),
                _ => rest = rest.strip_prefix(',')?,
            }
        }
    }
}

/// Where a text ends, if it is JSON without numbers for characters: those need more care.
fn text_end(rest: &str) -> Option<usize> {
    let (bytes, mut at) = (rest.as_bytes(), 0);
    loop {
        match bytes.get(at)? {
            b'"' => return Some(at),
            b'\\' if matches!(bytes.get(at + 1)?, b'"' | b'\\' | b'/' | b'b' | b'f' | b'n' | b'r' | b't') => at += 2,
            b'\\' | ..b' ' => return None,
            _ => at += 1,
        }
    }
}

impl Piece<'_> {
    fn is_one(&self) -> bool {
        artifacts::Delta::of(self.kind).is_some() && self.delta.get().starts_with('"')
    }
}

/// Events as they will be kept.
#[derive(Default)]
struct Joined<'a> {
    text: String,
    /// The piece that the last one was, if it was one: what it is of.
    open: Option<(&'a str, Option<&'a str>)>,
    /// Some pieces were joined.
    is_shorter: bool,
    /// Memory of what they come to, besides their bytes: at most so much.
    overhead: usize,
}

impl<'a> Joined<'a> {
    fn piece(&mut self, piece: &Piece<'a>) {
        self.add(piece.kind, piece.id.map(RawValue::get), &piece.delta.get()[1..piece.delta.get().len() - 1]);
    }

    /// Adds a piece: its type, its id as JSON, its text as it stands between its quotes.
    fn add(&mut self, kind: &'a str, id: Option<&'a str>, delta: &str) {
        let of = (kind, id);
        if self.open == Some(of) {
            self.is_shorter = true;
        } else {
            self.close();
            self.overhead += EVENT_BYTES + 3 * VALUE_BYTES + id.map_or(0, str::len);
            self.text.push_str("{\"type\":");
            // What was read as a plain string needs no escapes.
            self.text.extend(["\"", kind, "\""]);
            if let Some(id) = id {
                self.text.extend([",\"id\":", id]);
            }
            self.text.push_str(",\"delta\":\"");
            self.open = Some(of);
        }
        self.text.push_str(delta);
    }

    fn whole(&mut self, event: &str, overhead: usize) {
        self.close();
        self.overhead += overhead;
        self.text.push_str(event);
    }

    fn end_piece(&mut self) {
        if self.open.take().is_some() {
            self.text.push_str("\"}");
        }
    }

    /// Ends what was before, if anything was.
    fn close(&mut self) {
        self.end_piece();
        self.text.push(if self.text.is_empty() { '[' } else { ',' });
    }

    /// All of them, if that is shorter than what came.
    fn end(mut self) -> Option<String> {
        self.end_piece();
        self.text.push(']');
        self.is_shorter.then_some(self.text)
    }
}

/// Something that a sandbox can be told.
pub struct Order(pub(super) Bytes);

impl Order {
    /// Reads a command: `{"type": "prompt", "text": …}` or `{"type": "abort"}`. What else is in it, is passed on.
    ///
    /// # Errors
    /// [`Kind::Invalid`] for what is none, with code `ERR_UNKNOWN_COMMAND` if it only has another type.
    pub fn parse(body: Bytes) -> Result<Self, Error> {
        let value: Value = serde_json::from_slice(&body).map_err(|e| invalid(format!("the body is no JSON: {e}")))?;
        match value.get("type").and_then(Value::as_str) {
            None => Err(invalid("a command is an object with a \"type\" that is text".to_owned())),
            Some("prompt") if !value.get("text").is_some_and(Value::is_string) => {
                Err(invalid("a prompt has a \"text\" that is text".to_owned()))
            }
            Some("prompt" | "abort") => Ok(Self(body)),
            Some(other) => {
                let message = format!("unknown command type {other:?}; there are \"prompt\" and \"abort\"");
                Err(Error::new(Kind::Invalid, UNKNOWN_COMMAND, message))
            }
        }
    }
}

/// The code of a command of unknown type: its status is not that of other bad requests.
pub const UNKNOWN_COMMAND: &str = "ERR_UNKNOWN_COMMAND";

#[cfg(test)]
mod tests {
    use bytes::Bytes;
    use serde_json::{Value, json};

    use super::Events;

    fn kept(body: &Value) -> Value {
        let events = Events::parse(Bytes::from(body.to_string())).unwrap();
        serde_json::from_slice(&events.body).unwrap()
    }

    #[test]
    fn pieces_of_one_text_are_kept_as_one() {
        let piece = |kind: &str, id: &str, delta: &str| json!({"type": kind, "id": id, "delta": delta});
        let told = json!([
            {"type": "text_delta", "delta": "a\n"},
            {"type": "text_delta", "delta": "\"b\\"},
            {"type": "text_delta", "delta": ""},
            piece("text_delta", "1", "c"),
            piece("text_delta", "1", "d"),
            piece("tool_output_delta", "1", "e"),
            {"type": "turn_end"},
            piece("tool_output_delta", "1", "f"),
            {"type": "text_delta", "delta": "g", "more": true},
            {"type": "text_delta", "delta": "h"},
            {"type": "text_delta", "delta": 7},
            {"type": "text_delta", "delta": "i"},
            {"type": "other_delta", "delta": "j"},
            {"type": "other_delta", "delta": "k"},
        ]);
        let expected = json!([
            {"type": "text_delta", "delta": "a\n\"b\\"},
            piece("text_delta", "1", "cd"),
            piece("tool_output_delta", "1", "e"),
            {"type": "turn_end"},
            piece("tool_output_delta", "1", "f"),
            {"type": "text_delta", "delta": "g", "more": true},
            {"type": "text_delta", "delta": "h"},
            {"type": "text_delta", "delta": 7},
            {"type": "text_delta", "delta": "i"},
            {"type": "other_delta", "delta": "j"},
            {"type": "other_delta", "delta": "k"},
        ]);
        assert_eq!(kept(&told), expected);
        assert_eq!(Events::parse(Bytes::from(told.to_string())).unwrap().count, 14);
        let alone = json!({"type": "text_delta", "delta": "as it came"});
        assert_eq!(kept(&alone), alone);
        assert_eq!(kept(&json!([alone, {"type": "status"}])), json!([alone, {"type": "status"}]));
    }

    #[test]
    fn what_is_read_in_haste_is_read_the_same() {
        let piece = |delta: &str| format!("{{\"type\":\"text_delta\",\"delta\":\"{delta}\"}}");
        let alike =
            |deltas: &[&str]| format!("[{}]", deltas.iter().map(|delta| piece(delta)).collect::<Vec<_>>().join(","));
        let kept = |body: String| Events::parse(Bytes::from(body)).map(|told| (told.body, told.count));
        assert_eq!(kept(alike(&["a", "", "ü~"])).unwrap(), (Bytes::from(alike(&["aü~"])), 3));
        assert_eq!(kept(alike(&["a", "\\n\\\"", "b"])).unwrap(), (Bytes::from(alike(&["a\\n\\\"b"])), 3));
        assert_eq!(kept(alike(&["alone"])).unwrap(), (Bytes::from(alike(&["alone"])), 1));
        // Halves of a character that were told apart become one again; alone, they are none.
        let kept_text = |deltas: &[&str]| kept(alike(deltas)).map(|(body, _)| body);
        assert_eq!(kept_text(&["\\ud83d", "\\ude00"]).unwrap(), Bytes::from(alike(&["\\ud83d\\ude00"])));
        for (told, kept) in [("\\uD83D!", "\\ufffd!"), ("\\ude00\\ud83d", "\\ufffd\\ufffd"), ("\\\\ud83d", "\\\\ud83d")]
        {
            assert_eq!(kept_text(&["a", told]).unwrap(), Bytes::from(alike(&[&format!("a{kept}")])));
        }
        for broken in ["a\nb", "\\", "\"", "\\x", "\\u12", "\\ud800"] {
            let carefully = kept(alike(&["a", broken]).replacen('[', "[ ", 1));
            assert_eq!(kept(alike(&["a", broken])).is_err(), carefully.is_err(), "{broken:?}");
        }
        for text in ["\\\\", "\\\"", "a\\/\\b\\f\\n\\r\\t", "\\u0041", "\\ud83d\\ude00", "ü", " ", "{}[],:"] {
            let body = alike(&["a", text, "b"]);
            let carefully = kept(body.replacen('[', "[ ", 1)).unwrap();
            assert_eq!(kept(body.clone()).unwrap(), carefully, "{text:?}");
            assert!(!body.starts_with("[ ") && carefully.1 == 3);
        }
        assert!(kept(alike(&["a"]) + "]").is_err());
        for list in ["[[\"status\"]]", "[[\"text_delta\",\"a\"]]", "[{\"type\":\"status\"},[\"status\"]]"] {
            assert!(kept(list.to_owned()).is_err(), "{list}");
        }
        assert!(kept(alike(&["a"]).replace(']', ",]")).is_err());
    }
}

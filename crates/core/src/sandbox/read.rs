//! What sandboxes tell and are told, as it comes: checked, and kept in as few bytes as mean the same.

use std::{borrow::Cow, fmt};

use bytes::Bytes;
use serde::{
    Deserialize, Deserializer,
    de::{Error as _, SeqAccess, Visitor},
};
use serde_json::{Value, value::RawValue};

use super::{
    artifacts::{SIGNS, Sign, sign},
    invalid,
};
use crate::error::{Error, Kind};

/// Events in one request.
const EVENTS_MAX: usize = 10_000;

/// Room for what is usually told at once.
const JOINED_BYTES: usize = 1024;

/// What a sandbox tells at once, read.
pub struct Events {
    /// What is kept of it.
    pub(super) body: Bytes,
    pub(super) count: u64,
    pub(super) signs: Vec<Sign>,
}

impl Events {
    /// How many.
    #[must_use]
    pub fn count(&self) -> u64 {
        self.count
    }

    /// Reads one event, or several in a list. Pieces of one text become one piece: the fold makes no difference, and the log
    /// keeps less.
    ///
    /// # Errors
    /// [`Kind::Invalid`] for what is neither.
    pub fn parse(body: Bytes) -> Result<Self, Error> {
        let read = |e: serde_json::Error| invalid(format!("the body is no JSON: {e}"));
        let is_list = body.trim_ascii_start().starts_with(b"[");
        // By far the most: nothing but pieces.
        if let Some(Pieces { joined, count }) = Pieces::alike(&body)
            && count <= EVENTS_MAX
        {
            return Ok(Self { body: joined.end().map_or(body, Bytes::from), count: count as u64, signs: Vec::new() });
        }
        if is_list
            && let Ok(Pieces { joined, count }) = serde_json::from_slice(&body)
            && (1..=EVENTS_MAX).contains(&count)
        {
            let body = joined.end().map_or_else(|| body.clone(), Bytes::from);
            return Ok(Self { body, count: count as u64, signs: Vec::new() });
        }
        let events: Vec<&RawValue> = if is_list {
            serde_json::from_slice(&body).map_err(read)?
        } else {
            vec![serde_json::from_slice(&body).map_err(read)?]
        };
        if events.is_empty() || events.len() > EVENTS_MAX {
            return Err(invalid(format!("1 to {EVENTS_MAX} events are allowed, not {}", events.len())));
        }
        let (mut signs, mut joined) = (Vec::new(), Joined::default());
        for (at, event) in events.iter().enumerate() {
            if let Ok(piece) = serde_json::from_str::<Piece<'_>>(event.get())
                && piece.is_one()
            {
                joined.piece(&piece);
                continue;
            }
            let kind: Kinded<'_> = serde_json::from_str(event.get())
                .map_err(|_| invalid(format!("event {at} is no object with a \"type\" that is text")))?;
            if SIGNS.contains(&&*kind.kind) {
                signs.extend(sign(&serde_json::from_str(event.get()).map_err(read)?));
            }
            joined.whole(event.get());
        }
        let count = events.len() as u64;
        let body = joined.end().map_or(body, Bytes::from);
        Ok(Self { body, count, signs })
    }
}

/// What every event has.
#[derive(Deserialize)]
struct Kinded<'a> {
    #[serde(rename = "type", borrow)]
    kind: Cow<'a, str>,
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
    /// Reads what most programs write: each piece as the one before but for its text, without spaces and escapes. Nothing for
    /// everything else, which is read with more care.
    fn alike(body: &'a [u8]) -> Option<Self> {
        const BEGIN: &str = "{\"type\":\"";
        const DELTA: &str = "_delta\",\"delta\":\"";
        let mut rest = str::from_utf8(body).ok()?.strip_prefix('[')?;
        let kind = &rest.strip_prefix(BEGIN)?[..rest.find(DELTA)?.checked_sub(BEGIN.len())? + "_delta".len()];
        let is_word = kind.bytes().all(|byte| byte.is_ascii_lowercase() || byte == b'_');
        let head = rest.get(..BEGIN.len() + kind.len() + DELTA.len() - "_delta".len()).filter(|_| is_word)?;
        let mut pieces = Self { joined: Joined::default(), count: 0 };
        pieces.joined.text.reserve(body.len());
        loop {
            rest = rest.strip_prefix(head)?;
            let end = rest.bytes().position(|byte| matches!(byte, b'"' | b'\\' | ..b' '))?;
            let (text, behind) = rest.split_at(end);
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

impl<'de> Deserialize<'de> for Pieces<'de> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Join;
        impl<'de> Visitor<'de> for Join {
            type Value = Pieces<'de>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a list of pieces")
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<Pieces<'de>, A::Error> {
                let mut pieces = Pieces { joined: Joined::default(), count: 0 };
                pieces.joined.text.reserve(JOINED_BYTES);
                while let Some(piece) = list.next_element::<Piece<'de>>()? {
                    if !piece.is_one() {
                        return Err(A::Error::custom("no piece"));
                    }
                    pieces.joined.piece(&piece);
                    pieces.count += 1;
                }
                Ok(pieces)
            }
        }
        deserializer.deserialize_seq(Join)
    }
}

impl Piece<'_> {
    fn is_one(&self) -> bool {
        self.kind.ends_with("_delta") && self.delta.get().starts_with('"')
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

    fn whole(&mut self, event: &str) {
        self.close();
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
        ]);
        assert_eq!(kept(&told), expected);
        assert_eq!(Events::parse(Bytes::from(told.to_string())).unwrap().count, 12);
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
        for broken in ["a\nb", "\\", "\"", "\\x"] {
            assert!(kept(alike(&["a", broken])).is_err(), "{broken:?}");
        }
        assert!(kept(alike(&["a"]) + "]").is_err());
        assert!(kept(alike(&["a"]).replace(']', ",]")).is_err());
    }
}

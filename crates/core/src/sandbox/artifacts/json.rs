//! Values of artifacts: text that grows at its end, and JSON as it was written.

use std::{collections::BTreeMap, fmt, sync::Arc};

use serde::{
    Deserialize, Deserializer, Serialize, Serializer,
    de::{DeserializeSeed, MapAccess, SeqAccess, Visitor},
};
use serde_json::value::RawValue;

/// Deepest nesting that is shown as JSON. Common parsers stop at 128 levels, and viewers get values inside of others.
const DEPTH_MAX: usize = 100;

/// Text is kept in parts of about this size, which clones share.
const PART_BYTES: usize = 16 * 1024;

/// Memory of a value besides its bytes, about: what it takes in its map, with its name's place.
pub(in crate::sandbox) const VALUE_BYTES: usize = 128;

/// The fields of an artifact or of an event, by name.
pub type Fields = BTreeMap<String, Json>;

/// A value.
#[derive(Clone, Debug)]
pub enum Json {
    /// Text, decoded.
    Text(Text),
    /// Any other JSON, as it was written but for its line breaks. Every common parser can read it.
    Raw(Arc<RawValue>),
    /// An object that is put together here.
    Fields(Fields),
}

/// Text that mostly grows at its end. Clones share all of it but the last part.
#[derive(Clone, Default)]
pub struct Text {
    parts: Vec<Arc<str>>,
    /// Less than a part.
    end: String,
    len: usize,
}

impl Text {
    /// Its length in bytes.
    #[must_use]
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there is nothing in it.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Adds text at the end.
    pub fn push_str(&mut self, more: &str) {
        self.len += more.len();
        let mut rest = more;
        while self.end.len() + rest.len() >= PART_BYTES {
            let room = rest.floor_char_boundary(PART_BYTES.saturating_sub(self.end.len()).max(4));
            let (now, later) = rest.split_at(room);
            self.end.push_str(now);
            self.parts.push(std::mem::take(&mut self.end).into());
            rest = later;
        }
        self.end.push_str(rest);
    }

    /// Its parts, in order.
    pub fn parts(&self) -> impl Iterator<Item = &str> {
        self.parts.iter().map(|part| &**part).chain(Some(&*self.end).filter(|end| !end.is_empty()))
    }

    /// The part of that number.
    pub(super) fn part(&self, number: usize) -> Option<&str> {
        self.parts
            .get(number)
            .map(|part| &**part)
            .or_else(|| Some(&*self.end).filter(|end| number == self.parts.len() && !end.is_empty()))
    }

    /// What of it comes after `start`, if it begins with that.
    pub(super) fn behind(&self, start: &Self) -> Option<Self> {
        if self.len < start.len {
            return None;
        }
        let (mut rest, mut expected) = (Self::default(), start.parts());
        let mut next = "";
        for part in self.parts() {
            let mut part = part;
            while !part.is_empty() {
                if next.is_empty() {
                    next = expected.next().unwrap_or_default();
                }
                if next.is_empty() {
                    rest.push_str(part);
                    break;
                }
                let same = part.len().min(next.len());
                if part.as_bytes()[..same] != next.as_bytes()[..same] {
                    return None;
                }
                // One of them ends there, and so at a whole character of both.
                (part, next) = (part.get(same..)?, next.get(same..)?);
            }
        }
        Some(rest)
    }

    /// Keeps at most so many bytes, of whole characters; answers whether something was left out.
    pub(super) fn truncate(&mut self, most: usize) -> bool {
        if self.len <= most {
            return false;
        }
        let (mut kept, mut room) = (Self::default(), most);
        for part in self.parts() {
            let now = &part[..part.floor_char_boundary(room.min(part.len()))];
            kept.push_str(now);
            room -= now.len();
            if now.len() < part.len() {
                break;
            }
        }
        *self = kept;
        true
    }
}

impl From<&str> for Text {
    fn from(text: &str) -> Self {
        let mut own = Self::default();
        own.push_str(text);
        own
    }
}

impl PartialEq for Text {
    fn eq(&self, other: &Self) -> bool {
        if self.len != other.len {
            return false;
        }
        self.behind(other).is_some()
    }
}

impl fmt::Display for Text {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.parts().try_for_each(|part| f.write_str(part))
    }
}

impl fmt::Debug for Text {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}", self.to_string())
    }
}

impl Json {
    /// A value as it was written. What common parsers cannot read (numbers beyond a double's range, very deep nesting, half
    /// a character) becomes text that says what was written.
    pub(super) fn read(raw: &RawValue) -> Self {
        let written = raw.get();
        if written.starts_with('"') {
            return match serde_json::from_str::<std::borrow::Cow<'_, str>>(written) {
                Ok(text) => Self::Text((&*text).into()),
                Err(_) => Self::Text(written.into()),
            };
        }
        if !is_readable(written) {
            return Self::Text(written.into());
        }
        // Line breaks are never inside of strings, and an event of a stream is one line.
        let line = written.contains(['\n', '\r']).then(|| RawValue::from_string(written.replace(['\n', '\r'], "")));
        match line {
            None => Self::Raw(raw.to_owned().into()),
            Some(Ok(line)) => Self::Raw(line.into()),
            Some(Err(_)) => Self::Text(written.into()),
        }
    }

    /// JSON made here.
    pub(super) fn of(value: &impl Serialize) -> Self {
        match serde_json::value::to_raw_value(value) {
            Ok(raw) => Self::Raw(raw.into()),
            Err(_) => Self::Text(Text::default()),
        }
    }

    /// Its text, if it is text.
    #[must_use]
    pub fn as_text(&self) -> Option<&Text> {
        if let Self::Text(text) = self { Some(text) } else { None }
    }

    /// As it was written, if it is neither text nor put together here.
    pub(super) fn as_raw(&self) -> Option<&str> {
        if let Self::Raw(raw) = self { Some(raw.get()) } else { None }
    }

    /// As text: JSON as it was written, and nothing for null.
    pub(super) fn into_text(self) -> Text {
        match self {
            Self::Text(text) => text,
            Self::Raw(raw) if raw.get() == "null" => Text::default(),
            Self::Raw(raw) => raw.get().into(),
            Self::Fields(_) => serde_json::to_string(&self).unwrap_or_default().as_str().into(),
        }
    }

    /// Its fields, if it is an object.
    pub(super) fn as_fields(&self) -> Option<Fields> {
        match self {
            Self::Fields(fields) => Some(fields.clone()),
            Self::Raw(raw) => serde_json::from_str(raw.get()).ok(),
            Self::Text(_) => None,
        }
    }

    /// Its length in bytes: of a text as it reads, of other JSON as it was written.
    fn len(&self) -> usize {
        match self {
            Self::Text(text) => text.len(),
            Self::Raw(raw) => raw.get().len(),
            Self::Fields(fields) => fields_len(fields),
        }
    }

    /// Memory that it takes, about.
    pub(super) fn bytes(&self) -> usize {
        VALUE_BYTES
            + match self {
                Self::Text(text) => text.len(),
                Self::Raw(raw) => raw.get().len(),
                Self::Fields(fields) => fields_bytes(fields),
            }
    }
}

/// Bytes of fields, with their names.
pub(super) fn fields_len(fields: &Fields) -> usize {
    fields.iter().map(|(name, value)| name.len() + value.len()).sum()
}

/// Memory that fields take, about.
pub(super) fn fields_bytes(fields: &Fields) -> usize {
    fields.iter().map(|(name, value)| name.len() + value.bytes()).sum()
}

impl PartialEq for Json {
    fn eq(&self, other: &Self) -> bool {
        match (self, other) {
            (Self::Text(a), Self::Text(b)) => a == b,
            (Self::Raw(a), Self::Raw(b)) => a.get() == b.get(),
            (Self::Fields(a), Self::Fields(b)) => a == b,
            _ => false,
        }
    }
}

impl From<Text> for Json {
    fn from(text: Text) -> Self {
        Self::Text(text)
    }
}

impl Serialize for Text {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl Serialize for Json {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self {
            Self::Text(text) => text.serialize(serializer),
            Self::Raw(raw) => raw.serialize(serializer),
            Self::Fields(fields) => fields.serialize(serializer),
        }
    }
}

impl<'de> Deserialize<'de> for Json {
    /// Only from JSON, as serde_json reads it.
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        <&RawValue>::deserialize(deserializer).map(Self::read)
    }
}

/// Whether common parsers can read it, inside of what it is shown in.
fn is_readable(json: &str) -> bool {
    let mut deserializer = serde_json::Deserializer::from_str(json);
    Readable(DEPTH_MAX).deserialize(&mut deserializer).is_ok()
}

/// Reads anything of at most so many levels and keeps nothing.
#[derive(Clone, Copy)]
struct Readable(usize);

impl Readable {
    fn inside<E: serde::de::Error>(self) -> Result<Self, E> {
        self.0.checked_sub(1).map(Self).ok_or_else(|| E::custom("nested too deeply"))
    }
}

impl<'de> DeserializeSeed<'de> for Readable {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<(), D::Error> {
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Readable {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("JSON")
    }

    fn visit_bool<E>(self, _: bool) -> Result<(), E> {
        Ok(())
    }

    fn visit_i64<E>(self, _: i64) -> Result<(), E> {
        Ok(())
    }

    fn visit_u64<E>(self, _: u64) -> Result<(), E> {
        Ok(())
    }

    fn visit_f64<E: serde::de::Error>(self, number: f64) -> Result<(), E> {
        if number.is_finite() { Ok(()) } else { Err(E::custom("number out of range")) }
    }

    fn visit_str<E>(self, _: &str) -> Result<(), E> {
        Ok(())
    }

    fn visit_unit<E>(self) -> Result<(), E> {
        Ok(())
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<(), A::Error> {
        let inside = self.inside::<A::Error>()?;
        while seq.next_element_seed(inside)?.is_some() {}
        Ok(())
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<(), A::Error> {
        let inside = self.inside::<A::Error>()?;
        while map.next_key_seed(inside)?.is_some() {
            map.next_value_seed(inside)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::{Json, PART_BYTES, Text};
    use proptest::prelude::*;
    use serde_json::value::RawValue;

    fn read(written: &str) -> Json {
        Json::read(&RawValue::from_string(written.to_owned()).unwrap())
    }

    #[test]
    fn what_others_cannot_read_is_text() {
        let deep = |levels: usize| format!("{}{}", "[".repeat(levels), "]".repeat(levels));
        for written in ["1e999", "[1e999]", "{\"a\":-1e400}", "[\"\\ud83d\"]", "{\"\\ude00\":1}", &deep(101)] {
            assert_eq!(read(written), Json::Text(written.into()), "{written}");
        }
        for written in ["null", "12345678901234567890123", "1e308", "{\"a\":[true,\"b\"]}", &deep(100)] {
            assert_eq!(read(written).as_raw(), Some(written));
        }
        assert_eq!(read("{\r\n \"a\":\n1}").as_raw(), Some("{ \"a\":1}"), "an event is one line");
        assert_eq!(read("\"a\\nb\""), Json::Text("a\nb".into()));
        assert_eq!(read("\"\\ud83d\""), Json::Text("\"\\ud83d\"".into()));
    }

    proptest! {
        #[test]
        fn text_is_the_same_however_it_came(
            pieces in prop::collection::vec(("[aä\u{1f600}\"\n]{0,3}", 0..12_000_usize), 0..12),
            most in 0..100_000_usize,
        ) {
            let pieces: Vec<_> = pieces.iter().map(|(text, times)| text.repeat(*times)).collect();
            let whole = pieces.concat();
            let mut text = Text::default();
            pieces.iter().for_each(|piece| text.push_str(piece));
            prop_assert_eq!(&text.to_string(), &whole);
            prop_assert_eq!(text.len(), whole.len());
            prop_assert_eq!(&text, &Text::from(&*whole));
            prop_assert!(text.parts().all(|part| !part.is_empty() && part.len() <= PART_BYTES + 4));
            prop_assert_eq!(text.part(0), text.parts().next());
            prop_assert_eq!(Text::from(&*(whole.clone() + "more")).behind(&text), Some("more".into()));
            if let Some(last) = whole.chars().next_back() {
                let shorter = &whole[..whole.len() - last.len_utf8()];
                prop_assert_eq!(Text::from(shorter).behind(&text), None);
                prop_assert_ne!(&text, &Text::from(&*(shorter.to_owned() + "b")));
            }
            let is_cut = text.truncate(most);
            prop_assert_eq!(text.to_string(), &whole[..whole.floor_char_boundary(most.min(whole.len()))]);
            prop_assert_eq!(is_cut, most < whole.len());
        }
    }
}

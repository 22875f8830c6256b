//! Reading JSON from clients.

use std::fmt;

use serde::{
    Deserialize, Deserializer,
    de::{Error as _, Unexpected, Visitor},
};

/// Reads an object. What is derived for a struct takes a list of its fields' values as well, in their order, which no
/// client means.
///
/// # Errors
/// For what is no object, or not the one that is wanted.
pub fn object<'a, T: Deserialize<'a>>(json: &'a [u8]) -> serde_json::Result<T> {
    match json.trim_ascii_start().first() {
        Some(b'[') => Err(serde_json::Error::invalid_type(Unexpected::Seq, &"an object")),
        _ => serde_json::from_slice(json),
    }
}

/// A string of JSON in which half a surrogate pair may stand: what cuts text between UTF-16 units, as JavaScript does, leaves one at
/// each side of the cut.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Cut {
    /// The half that it begins with, if nothing of it is before that.
    pub begins: Option<Half>,
    /// What is between. Halves without the other one are U+FFFD.
    pub text: String,
    /// The half that it ends with.
    pub ends: Option<Half>,
}

/// Half a surrogate pair.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, Deserialize)]
#[serde(transparent)]
pub struct Half(u16);

impl Half {
    /// The character of which this is the first half, if the other one fits.
    #[must_use]
    pub fn join(self, second: Self) -> Option<char> {
        char::decode_utf16([self.0, second.0]).next()?.ok()
    }
}

/// Bytes of half a pair where serde_json leaves one: as UTF-8 would have it.
const HALF_BYTES: usize = 3;

impl Cut {
    /// The text alone, with U+FFFD for each half.
    #[must_use]
    pub fn lossy(self) -> String {
        let whole = |half: Option<Half>| half.map_or("", |_| "\u{fffd}");
        if self.begins.is_none() && self.ends.is_none() {
            return self.text;
        }
        [whole(self.begins), &self.text, whole(self.ends)].concat()
    }

    fn read(mut bytes: &[u8]) -> Self {
        let begins = bytes.first_chunk().and_then(half).filter(|half| (0xDC00..).contains(&half.0));
        bytes = if begins.is_some() { &bytes[HALF_BYTES..] } else { bytes };
        let ends = bytes.last_chunk().and_then(half).filter(|half| (..0xDC00).contains(&half.0));
        bytes = if ends.is_some() { &bytes[..bytes.len() - HALF_BYTES] } else { bytes };
        let mut text = String::with_capacity(bytes.len());
        while !bytes.is_empty() {
            let valid = match str::from_utf8(bytes) {
                Ok(valid) => valid,
                Err(error) => str::from_utf8(&bytes[..error.valid_up_to()]).unwrap_or_default(),
            };
            text.push_str(valid);
            bytes = &bytes[valid.len()..];
            if !bytes.is_empty() {
                text.push(char::REPLACEMENT_CHARACTER);
                let skipped = if bytes.first_chunk().and_then(half).is_some() { HALF_BYTES } else { 1 };
                bytes = &bytes[skipped..];
            }
        }
        Self { begins, text, ends }
    }
}

fn half(bytes: &[u8; HALF_BYTES]) -> Option<Half> {
    match bytes {
        [0xED, high @ 0xA0..=0xBF, low @ 0x80..=0xBF] => {
            Some(Half(0xD000 | u16::from(high & 0x3F) << 6 | u16::from(low & 0x3F)))
        }
        _ => None,
    }
}

impl<'de> Deserialize<'de> for Cut {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Text;
        impl Visitor<'_> for Text {
            type Value = Cut;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a string")
            }

            fn visit_str<E>(self, text: &str) -> Result<Cut, E> {
                Ok(Cut { text: text.to_owned(), ..Cut::default() })
            }

            fn visit_bytes<E>(self, bytes: &[u8]) -> Result<Cut, E> {
                Ok(Cut::read(bytes))
            }
        }
        // Of strings, serde_json takes halves of pairs only as bytes.
        deserializer.deserialize_bytes(Text)
    }
}

/// For fields: a string, with U+FFFD for half a surrogate pair.
///
/// # Errors
/// For what is no string.
pub fn lossy<'de, D: Deserializer<'de>>(deserializer: D) -> Result<String, D::Error> {
    Cut::deserialize(deserializer).map(Cut::lossy)
}

/// As [`lossy`], for fields that may be missing; they need `default`, too.
///
/// # Errors
/// For what is no string.
pub fn lossy_option<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<String>, D::Error> {
    Ok(Option::<Cut>::deserialize(deserializer)?.map(Cut::lossy))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(json: &str) -> Cut {
        serde_json::from_str(json).unwrap()
    }

    #[test]
    fn halves_at_the_ends_are_kept_and_others_replaced() {
        let cut = |begins: Option<u16>, text: &str, ends: Option<u16>| Cut {
            begins: begins.map(Half),
            text: text.into(),
            ends: ends.map(Half),
        };
        for (json, expected) in [
            (r#""""#, cut(None, "", None)),
            (r#""a😀b""#, cut(None, "a😀b", None)),
            (r#""a\ud83d\ude00b""#, cut(None, "a😀b", None)),
            (r#""a\ud83d""#, cut(None, "a", Some(0xD83D))),
            (r#""\ude00b""#, cut(Some(0xDE00), "b", None)),
            (r#""\ud83d""#, cut(None, "", Some(0xD83D))),
            (r#""\ude00""#, cut(Some(0xDE00), "", None)),
            (r#""\ude00\ud83d""#, cut(Some(0xDE00), "", Some(0xD83D))),
            // The wrong way round, and in the middle.
            (r#""\ud83da\ude00""#, cut(None, "\u{fffd}a\u{fffd}", None)),
            (r#""\ud83d\ud83d""#, cut(None, "\u{fffd}", Some(0xD83D))),
        ] {
            assert_eq!(read(json), expected, "{json}");
        }
        assert_eq!(read(r#""\ude00a\ud83d""#).lossy(), "\u{fffd}a\u{fffd}");
        assert!(serde_json::from_str::<Cut>("[1]").is_err() && serde_json::from_str::<Cut>("1").is_err());
    }

    proptest::proptest! {
        #[test]
        fn what_was_cut_anywhere_is_whole_again(text: String, at: proptest::sample::Index) {
            let units: Vec<u16> = text.encode_utf16().collect();
            let (first, second) = units.split_at(if units.is_empty() { 0 } else { at.index(units.len()) });
            let json = |units: &[u16]| {
                let escaped: String = units.iter().map(|unit| format!("\\u{unit:04x}")).collect();
                read(&format!("\"{escaped}\""))
            };
            let (first, second) = (json(first), json(second));
            let middle = first.ends.zip(second.begins).map(|(first, second)| first.join(second).unwrap());
            let middle = middle.map_or(String::new(), String::from);
            proptest::prop_assert_eq!([first.text, middle, second.text].concat(), text);
        }
    }
}

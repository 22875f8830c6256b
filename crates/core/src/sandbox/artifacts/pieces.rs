//! An artifact as JSON, a piece at a time: what nobody takes is not made.

use std::{
    ops::Bound::{Excluded, Unbounded},
    sync::Arc,
};

use bytes::{BufMut as _, BytesMut};
use serde::Serialize;

use super::{Artifact, Json};

/// What is still to be written of an artifact. Holds the artifact, which shares what is large of it with those that come after.
pub struct Pieces {
    artifact: Arc<Artifact>,
    has_begun: bool,
    /// The last field that was begun.
    field: Option<String>,
    /// How much of that was written: parts of a text, or bytes of other JSON.
    written: usize,
    /// It was written to its end.
    is_whole: bool,
}

impl Pieces {
    /// All of it.
    #[must_use]
    pub fn new(artifact: Arc<Artifact>) -> Self {
        Self { artifact, has_begun: false, field: None, written: 0, is_whole: true }
    }

    /// Writes what comes next, until `out` has about `most` bytes; answers whether there is more.
    pub fn write(&mut self, out: &mut BytesMut, most: usize) -> bool {
        if !self.has_begun {
            self.begin(out);
        }
        loop {
            if self.is_whole && !self.begin_field(out) {
                out.put_u8(b'}');
                return false;
            }
            self.go_on(out, most);
            if out.len() >= most {
                return true;
            }
        }
    }

    fn begin(&mut self, out: &mut BytesMut) {
        self.has_begun = true;
        let Artifact { seq, id, kind, status, created_at, updated_at, .. } = &*self.artifact;
        out.put_slice(b"{\"seq\":");
        put(out, seq);
        for (name, text) in [("id", id), ("kind", kind), ("status", status)] {
            out.put_slice(format!(",\"{name}\":").as_bytes());
            put(out, text);
        }
        out.put_slice(format!(",\"createdAt\":{created_at},\"updatedAt\":{updated_at}").as_bytes());
    }

    /// Writes the name of the next field; false if there is none.
    fn begin_field(&mut self, out: &mut BytesMut) -> bool {
        let after = self.field.as_deref().map_or(Unbounded, Excluded);
        let Some((name, value)) = self.artifact.fields.range::<str, _>((after, Unbounded)).next() else { return false };
        out.put_u8(b',');
        put(out, name);
        out.put_u8(b':');
        if value.as_text().is_some() {
            out.put_u8(b'"');
        }
        (self.field, self.written, self.is_whole) = (Some(name.clone()), 0, false);
        true
    }

    /// Writes more of the field that was begun.
    fn go_on(&mut self, out: &mut BytesMut, most: usize) {
        let value = self.field.as_deref().and_then(|name| self.artifact.fields.get(name));
        match value {
            Some(Json::Text(text)) => {
                while out.len() < most {
                    let Some(part) = text.part(self.written) else {
                        out.put_u8(b'"');
                        self.is_whole = true;
                        return;
                    };
                    put_text(out, part);
                    self.written += 1;
                }
            }
            Some(Json::Raw(raw)) => {
                let rest = &raw.get().as_bytes()[self.written..];
                let now = rest.len().min(most.saturating_sub(out.len()).max(1));
                out.put_slice(&rest[..now]);
                self.written += now;
                self.is_whole = now == rest.len();
            }
            Some(fields @ Json::Fields(_)) => {
                put(out, fields);
                self.is_whole = true;
            }
            None => self.is_whole = true,
        }
    }
}

fn put(out: &mut BytesMut, value: &impl Serialize) {
    let start = out.len();
    if let Err(error) = serde_json::to_writer((&mut *out).writer(), value) {
        out.truncate(start);
        out.put_slice(b"null");
        tracing::error!(%error, "a value of an artifact cannot be written");
    }
}

/// Writes text as it stands between the quotes of JSON.
fn put_text(out: &mut BytesMut, text: &str) {
    let (bytes, mut from) = (text.as_bytes(), 0);
    for (at, byte) in bytes.iter().enumerate() {
        let escape: &[u8] = match byte {
            b'"' => b"\\\"",
            b'\\' => b"\\\\",
            b'\n' => b"\\n",
            b'\r' => b"\\r",
            b'\t' => b"\\t",
            0x08 => b"\\b",
            0x0c => b"\\f",
            ..0x20 => b"\\u00",
            _ => continue,
        };
        out.put_slice(&bytes[from..at]);
        out.put_slice(escape);
        if escape == b"\\u00" {
            out.put_slice(format!("{byte:02x}").as_bytes());
        }
        from = at + 1;
    }
    out.put_slice(&bytes[from..]);
}

#[cfg(test)]
mod tests {
    use super::{Arc, Artifact, BytesMut, Json, Pieces};
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn pieces_are_the_whole(
            texts in prop::collection::btree_map("[a-z\"\\\\]{1,4}", ("[\u{0}-\u{1f}a\"\\\\ä]{0,40}", 0..900_usize), 0..5),
            most in 1..50_000_usize,
        ) {
            let mut artifact = Artifact {
                seq: 7,
                id: "an \"id\"".into(),
                kind: "text".into(),
                status: "done".into(),
                created_at: 1,
                updated_at: 2,
                fields: texts.iter().map(|(name, (text, times))| (name.clone(), Json::Text((&*text.repeat(*times)).into()))).collect(),
            };
            artifact.fields.insert("raw".into(), Json::of(&texts));
            artifact.fields.insert("extra".into(), Json::Fields([("kind".to_owned(), Json::of(&1))].into()));
            let mut pieces = Pieces::new(artifact.clone().into());
            let (mut whole, mut is_over) = (Vec::new(), false);
            while !is_over {
                let mut out = BytesMut::new();
                is_over = !pieces.write(&mut out, most);
                prop_assert!(is_over || out.len() >= most);
                // A part of a text in which every character is escaped, or what an artifact begins with.
                prop_assert!(out.len() <= most + 6 * 17_000);
                whole.extend_from_slice(&out);
            }
            let whole = String::from_utf8(whole).unwrap();
            prop_assert_eq!(&whole, &serde_json::to_string(&artifact).unwrap());
            prop_assert_eq!(Artifact::parse(&whole).unwrap(), artifact);
        }
    }

    #[test]
    fn a_piece_is_no_longer_than_asked_for() {
        let text = "x".repeat(1 << 20);
        let fields = [("text".to_owned(), Json::Text((&*text).into())), ("z".to_owned(), Json::of(&vec![1; 200_000]))];
        let (id, kind, status) = (String::new(), String::new(), String::new());
        let artifact = Artifact { seq: 1, id, kind, status, created_at: 0, updated_at: 0, fields: fields.into() };
        let mut pieces = Pieces::new(Arc::new(artifact));
        loop {
            let mut out = BytesMut::new();
            let has_more = pieces.write(&mut out, 64 * 1024);
            assert!(out.len() <= 80 * 1024 + 200, "{}", out.len());
            if !has_more {
                break;
            }
        }
    }
}

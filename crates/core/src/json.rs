//! Reading JSON from clients.

use serde::{
    Deserialize,
    de::{Error as _, Unexpected},
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

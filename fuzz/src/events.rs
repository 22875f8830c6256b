//! Reads any bytes as what a sandbox tells: what is accepted is folded, and the fold is the same for events that come together
//! and for the same events one by one.

#![no_main]
#![allow(clippy::panic, clippy::unwrap_used, reason = "that is how a fuzzer is told")]

use bytes::Bytes;
use libfuzzer_sys::fuzz_target;
use serde_json::{Value, value::RawValue};
use trunkline_core::sandbox::{Events, artifacts::Fold};

const AT_MS: i64 = 1_000;

fuzz_target!(|body: &[u8]| {
    let Ok(events) = Events::parse(Bytes::copy_from_slice(body)) else { return };
    let mut together = Fold::default();
    events.apply_to(&mut together, AT_MS);
    // Pieces of one text are joined; nothing else is left out.
    assert!((1..=events.count()).contains(&together.events()));
    let Ok(list) = serde_json::from_slice::<Vec<&RawValue>>(body) else { return };
    // Halves of one character are joined if they come together, and replaced if they do not.
    if body.windows(3).any(|window| window.eq_ignore_ascii_case(b"\\ud")) {
        return;
    }
    let mut one_by_one = Fold::default();
    for event in list {
        let event = Events::parse(Bytes::copy_from_slice(event.get().as_bytes())).unwrap();
        event.apply_to(&mut one_by_one, AT_MS);
    }
    assert_eq!(shown(&together), shown(&one_by_one));
});

fn shown(fold: &Fold) -> Vec<Value> {
    fold.artifacts().map(|artifact| serde_json::to_value(&**artifact).unwrap()).collect()
}

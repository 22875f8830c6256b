//! Reads any bytes as a record of a lane: it never panics, and a payload is a part of the record, not a copy of something else.

#![no_main]
#![allow(clippy::panic, clippy::unwrap_used, reason = "that is how a fuzzer is told")]

use libfuzzer_sys::fuzz_target;
use trunkline_core::message::{self, Envelope, Said};
use trunkline_store::log::{Offset, Record, Topic};

fuzz_target!(|bytes: &[u8]| {
    for topic in ["ag::w::i::s", "pg::w"] {
        let record = Record {
            topic: Topic::new(topic).unwrap(),
            offset: Offset(1),
            timestamp_ms: 0,
            payload: bytes.to_vec().into(),
        };
        if let Ok(Said::Message(envelope)) = message::decode(&record) {
            assert!(bytes.ends_with(&envelope.payload));
            assert_eq!(Envelope::decode(&record).unwrap(), envelope);
        }
    }
});

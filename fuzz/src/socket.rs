//! Reads whatever comes as an envelope: it never panics, takes memory in proportion to the frame, and what it reads it writes
//! so that it is read the same. Run by `cargo xtask test fuzz`.

#![no_main]
#![allow(clippy::panic, reason = "that is how a fuzzer is told")]

use std::alloc::System;

use cap::Cap;
use libfuzzer_sys::fuzz_target;
use trunkline_agent_socket::{RuntimeState, parse, serialize};

#[global_allocator]
static MEMORY: Cap<System> = Cap::new(System, usize::MAX);

/// Bytes that reading a frame may take for each of its own, with buffers that double, and besides.
const TIMES: usize = 8;
const BESIDES: usize = 1024;

fuzz_target!(|frame: &[u8]| {
    // More than this is refused, which ends the run.
    let before = MEMORY.allocated();
    let limited = MEMORY.set_limit(before + TIMES * frame.len() + BESIDES);
    let parsed = parse(frame);
    assert!(limited.is_ok() && MEMORY.set_limit(usize::MAX).is_ok());
    let Ok(envelope) = parsed else { return };
    let again = parse(serialize(&envelope).as_bytes());
    assert_eq!(again.as_ref(), Ok(&envelope));
    RuntimeState::default().apply(&envelope);
});

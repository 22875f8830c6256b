//! The published conformance suite, told by this library, against a server in the same process.

#![allow(clippy::expect_used, clippy::panic, clippy::unwrap_used, reason = "test code")]

mod world_messaging;
mod world_state;

mod admin;
mod audit;
mod checkpoints;
mod connect;
mod events;
mod handshake;
mod identity;
mod kv;
mod messaging;
mod offline;
mod orchestration;
mod payloads;
mod permissions;
mod progress;
mod tasks;
mod workspace_switch;

//! The library against a real server.

#![allow(
    clippy::disallowed_methods,
    clippy::expect_used,
    clippy::panic,
    clippy::print_stdout,
    clippy::unwrap_used,
    reason = "test code"
)]

mod connection;
mod coord;
mod delivery;
mod operations;
mod orchestrate;
mod peer;
mod relay;
mod server;
mod tasks;

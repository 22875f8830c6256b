//! A real server on free ports, bytes in and bytes out. One file a promise.

#![allow(clippy::disallowed_methods, clippy::expect_used, clippy::panic, clippy::unwrap_used, reason = "test code")]

mod acks;
mod audit;
mod broken;
mod budget;
mod cli;
mod client;
mod contract;
mod conversation;
mod credentials;
mod durability;
mod edge;
mod handshake;
mod identity;
mod kills;
mod limits;
mod ops;
mod positions;
mod process;
mod sandbox;
mod shown;
mod shutdown;
mod socket;
mod sql;
mod tasks;
mod tls;
mod upgrade;

//! Both sides, over transports that keep their word and over one that does not.

#![allow(clippy::disallowed_methods, clippy::unwrap_used, clippy::panic, reason = "tests")]
#![cfg(all(feature = "websocket", feature = "sqlite"))]

mod lossy;
mod said;
mod support;

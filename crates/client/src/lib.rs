//! The Rust SDK for every principal. Nothing is here yet: the crate holds the place that ARCHITECTURE.md gives it.

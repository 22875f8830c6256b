//! The suites that every back end runs: one meaning, several engines.
//!
//! Each suite is a list of async functions; `log_suite!` and its siblings turn it into one test per function for a
//! back end. The functions panic where the contract is broken.

#![allow(
    clippy::disallowed_methods,
    clippy::expect_used,
    clippy::panic,
    clippy::unwrap_used,
    missing_docs,
    reason = "test code"
)]

pub mod lease;
pub mod ledger;
pub mod log;
pub mod postgres;

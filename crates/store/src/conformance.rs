//! The suites that every back end runs: one meaning, several engines.
//!
//! Each suite is a list of async functions; `log_suite!` and its siblings turn it into one test per function for a
//! back end. The functions panic where the contract is broken.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, missing_docs, reason = "test code")]

pub mod lease;
pub mod ledger;
pub mod log;

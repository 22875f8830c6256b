//! What can go wrong, and how it is told.
//!
//! Needs a server: `trunkline serve --dev`, or any other at `TRUNKLINE_SERVER`. Run with
//! `cargo run -p trunkline-client --example errors`.

#![allow(clippy::print_stdout, reason = "an example")]

use trunkline_client::{Agent, DuplicateRetry, Kind, Reconnect, Topic};

#[tokio::main]
async fn main() -> trunkline_client::Result<()> {
    let first = Agent::builder("production", "worker", "1").from_env().connect().await?;
    // The connection is the lock on the identity.
    let second = Agent::builder("production", "worker", "1").from_env().connect().await;
    match second {
        Err(error) if error.kind() == Kind::Duplicate => println!("taken: {error} (retry: {})", error.is_retryable()),
        Err(error) => return Err(error),
        Ok(_) => println!("this server lets two in"),
    }
    // Names that cannot be are refused before anything is sent.
    if let Err(error) = Topic::agent("production", "two::parts", "1") {
        println!("{:?}: {error}", error.kind());
    }
    first.close().await;
    // A predecessor that the server still believes in is waited for; breaks are ridden out without end.
    let patient = Agent::builder("production", "worker", "1").from_env();
    let patient = patient.retry_on_duplicate(DuplicateRetry::default()).reconnect(Reconnect::forever());
    patient.connect().await?.close().await;
    Ok(())
}

//! What an agent remembers for its successor.
//!
//! Needs a server: `trunkline serve --dev`, or any other at `TRUNKLINE_SERVER`. Run with
//! `cargo run -p trunkline-client --example checkpoints`.

#![allow(clippy::print_stdout, reason = "an example")]

use std::time::Duration;

use trunkline_client::{Agent, kv::Keep};

#[tokio::main]
async fn main() -> trunkline_client::Result<()> {
    let agent = Agent::builder("prod", "indexer", "main").from_env().connect().await?;
    let checkpoints = agent.checkpoints();
    checkpoints.save("my-state", r#"{"step": 5}"#, Keep::For(Duration::from_secs(3600))).await?;
    if let Some(found) = checkpoints.load("my-state").await? {
        println!("restored {:?}", found.data);
    }
    println!("keys: {:?}", checkpoints.list().await?);
    checkpoints.delete("my-state").await?;
    agent.close().await;
    Ok(())
}

//! A user in a browser tab, who writes to an agent and moves between workspaces.
//!
//! Needs a server: `trunkline serve --dev`, or any other at `TRUNKLINE_SERVER`. Run with
//! `cargo run -p trunkline-client --example user`.

#![allow(clippy::print_stdout, reason = "an example")]

use trunkline_client::{Agent, User};

#[tokio::main]
async fn main() -> trunkline_client::Result<()> {
    let agent = Agent::builder("production", "data-processor", "one").from_env().connect().await?;
    let user = User::builder("alice", "tab-1").workspace("production").from_env().connect().await?;
    let (mut asked, mut told) = (agent.messages(), user.messages());
    user.send_to_agent("production", "data-processor", "one", r#"{"action": "process", "data": [1, 2, 3]}"#).await?;
    if let Some(message) = asked.next().await {
        println!("{} asks for {}", message.source(), message.text());
    }
    agent.broadcast_to_users("production", "It is done").await?;
    if let Some(message) = told.next().await {
        println!("{}: {}", message.source(), message.text());
    }
    user.switch_workspace("staging").await?;
    println!("{} is on {:?} now", user.identity(), user.workspace());
    user.close().await;
    agent.close().await;
    Ok(())
}

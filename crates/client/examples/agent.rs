//! An agent that answers, and another one that asks.
//!
//! Needs a server: `trunkline serve --dev`, or any other at `TRUNKLINE_SERVER`. Run with
//! `cargo run -p trunkline-client --example agent`.

#![allow(clippy::print_stdout, reason = "an example")]

use trunkline_client::{Agent, Outgoing, Topic};

#[tokio::main]
async fn main() -> trunkline_client::Result<()> {
    let support = Agent::builder("production", "support", "one").from_env().connect().await?;
    let hand = support.clone();
    support.on_message(move |message| {
        let hand = hand.clone();
        async move {
            println!("received from {}: {}", message.source(), message.text());
            let Some(sender) = message.sender() else { return Ok(()) };
            hand.send(Outgoing::chat(sender, "At your service")).await
        }
    });

    let processor = Agent::builder("production", "data-processor", "one").from_env().connect().await?;
    if let Some(welcome) = processor.welcome() {
        println!("connected with session {} (resumed: {})", welcome.session_id, welcome.resumed);
    }
    let mut messages = processor.messages();
    processor.send_to_agent("production", "support", "one", "Hello!").await?;
    processor
        .send(Outgoing::json(Topic::window("alice", "tab-1")?, &serde_json::json!({"status": "complete"}))?)
        .await?;
    if let Some(answer) = messages.next().await {
        println!("{}: {}", answer.source(), answer.text());
    }
    processor.broadcast_to_agents("production", "announcement").await?;
    processor.close().await;
    support.close().await;
    Ok(())
}

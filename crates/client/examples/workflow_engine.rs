//! The workflow engine: hears events, and tells agents what to do.
//!
//! Needs a server: `trunkline serve --dev`, or any other at `TRUNKLINE_SERVER`. Run with
//! `cargo run -p trunkline-client --example workflow_engine`.

#![allow(clippy::print_stdout, reason = "an example")]

use trunkline_client::{Agent, WorkflowEngine};

#[tokio::main]
async fn main() -> trunkline_client::Result<()> {
    let engine = WorkflowEngine::builder().from_env().connect().await?;
    let agent = Agent::builder("prod", "processor", "one").from_env().connect().await?;
    let (mut events, mut commands) = (engine.messages(), agent.messages());
    agent.send_event(r#"{"id": 17}"#).await?;
    if let Some(event) = events.next().await {
        println!("event from {}: {}", event.source(), event.text());
        let command = serde_json::json!({"action": "process", "event": event.json::<serde_json::Value>()?["id"]});
        engine.send_to_agent("prod", "processor", "one", command.to_string()).await.ok();
    }
    // Without a rule for its workspace, the engine may not command: that is told here.
    tokio::select! {
        Some(command) = commands.next() => println!("command: {}", command.text()),
        Some(refusal) = async { engine.refusals().next().await } => println!("refused: {refusal}"),
    }
    engine.close().await;
    agent.close().await;
    Ok(())
}

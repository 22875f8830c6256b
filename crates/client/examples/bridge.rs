//! A bridge: brings messages from another network into workspaces that its rules open.
//!
//! Needs a server: `trunkline serve --dev`, or any other at `TRUNKLINE_SERVER`. Run with
//! `cargo run -p trunkline-client --example bridge`.

#![allow(clippy::print_stdout, reason = "an example")]

use trunkline_client::{AccessLevel, Agent, Bridge, Orchestrator, admin::grant};

#[tokio::main]
async fn main() -> trunkline_client::Result<()> {
    let bridge = Bridge::builder("example-bridge", "instance-1").from_env().connect().await?;
    let admin = Orchestrator::builder("ops").profile("none").from_env().connect().await?;
    let rule = grant(&bridge.identity().principal(), "workspace", "prod", AccessLevel::Write);
    let rule = admin.admin().grant(rule).await?;

    let agent = Agent::builder("prod", "my-agent", "instance-1").from_env().connect().await?;
    let (mut inside, mut outside) = (agent.messages(), bridge.messages());
    bridge.send_to_agent("prod", "my-agent", "instance-1", r#"{"from": "discord", "text": "Hello!"}"#).await?;
    if let Some(message) = inside.next().await {
        println!("{}: {}", message.source(), message.text());
    }
    agent
        .send(trunkline_client::Outgoing::chat(trunkline_client::Topic::bridge("example-bridge", "instance-1")?, "Hi"))
        .await?;
    if let Some(message) = outside.next().await {
        println!("to the other network: {}", message.text());
    }
    admin.admin().revoke(&rule.rule_id).await?;
    bridge.close().await;
    agent.close().await;
    admin.close().await;
    Ok(())
}

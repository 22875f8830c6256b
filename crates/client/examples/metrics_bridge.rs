//! The metrics bridge: hears metrics, to hand them to a store of figures.
//!
//! Needs a server: `trunkline serve --dev`, or any other at `TRUNKLINE_SERVER`. Run with
//! `cargo run -p trunkline-client --example metrics_bridge`.

#![allow(clippy::print_stdout, reason = "an example")]

use trunkline_client::{Agent, MetricBuilder, MetricsBridge};

#[tokio::main]
async fn main() -> trunkline_client::Result<()> {
    let bridge = MetricsBridge::builder().from_env().connect().await?;
    let agent = Agent::builder("prod", "writer", "one").from_env().connect().await?;
    let mut metrics = bridge.messages();
    agent.send_metric(MetricBuilder::new().trace("t-1").add("tokens", "llm", 1200.0).tag("model", "small")).await?;
    if let Some(message) = metrics.next().await {
        println!("metric from {}: {:?}", message.source(), message.metric()?.entries);
    }
    bridge.close().await;
    agent.close().await;
    Ok(())
}

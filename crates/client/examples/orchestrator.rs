//! An orchestrator that starts a process for an agent that is needed.
//!
//! Needs a server: `trunkline serve --dev`, or any other at `TRUNKLINE_SERVER`. Run with
//! `cargo run -p trunkline-client --example orchestrator`.

#![allow(clippy::print_stdout, reason = "an example")]

use trunkline_client::{
    Agent, Orchestrator,
    admin::AgentRegistrationInfo,
    orchestrate::{self, Options, Process},
};

#[tokio::main]
async fn main() -> trunkline_client::Result<()> {
    let orchestrator = Orchestrator::builder("local").profile("example-process").from_env().connect().await?;
    let registered = AgentRegistrationInfo {
        implementation: "example-worker".into(),
        orchestrator_profile: "example-process".into(),
        ..AgentRegistrationInfo::default()
    };
    orchestrator.admin().register_agent(registered).await?;

    // A real one would be an agent that connects by Agent::from_env().
    let (lines, mut printed) = tokio::sync::mpsc::channel(16);
    let process = Process::new("/bin/sh").argument("-c").argument("echo I am $AETHER_IMPLEMENTATION; sleep 60");
    let process = process.output(move |line| {
        // If nobody looks, the line is gone.
        let _ = lines.try_send(line);
    });
    let crew = orchestrate::run(&orchestrator, process, Options::default());

    let other = Agent::builder("prod", "caller", "main").from_env().connect().await?;
    other.send_to_agent("prod", "example-worker", &std::process::id().to_string(), "Wake up").await?;
    if let Some(line) = printed.recv().await {
        println!("{}: {}", line.identity, line.text);
    }
    crew.stop().await;
    orchestrator.admin().delete_agent("example-worker").await?;
    other.close().await;
    orchestrator.close().await;
    Ok(())
}

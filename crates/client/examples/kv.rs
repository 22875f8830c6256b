//! Keys and their values, numbers with a ceiling, and a lock.
//!
//! Needs a server: `trunkline serve --dev`, or any other at `TRUNKLINE_SERVER`. Run with
//! `cargo run -p trunkline-client --example kv`.

#![allow(clippy::print_stdout, reason = "an example")]

use std::time::Duration;

use trunkline_client::{Agent, kv::Scope};

#[tokio::main]
async fn main() -> trunkline_client::Result<()> {
    let agent = Agent::builder("production", "configurer", "main").from_env().connect().await?;
    // Its own; those that others share take a rule.
    let kv = agent.kv(Scope::WorkspaceExclusive(None));
    kv.put_for("config", r#"{"debug": true}"#, Duration::from_secs(3600)).await?;
    println!("config is {:?}", kv.get("config").await?);
    println!("visits: {}", kv.increment("visits").await?);
    println!("within the limit: {}", kv.increment_if("used", 3, 10).await?.applied);
    if kv.set_if_absent("lock", "me", Duration::from_secs(30)).await? {
        println!("the lock is ours");
        kv.compare_and_delete("lock", "me").await?;
    }
    println!("{} have signed up", kv.set_add("guests", "alice", None).await?.value);
    agent.close().await;
    Ok(())
}

//! Tasks: made, found, claimed, ended, followed.
//!
//! Needs a server: `trunkline serve --dev`, or any other at `TRUNKLINE_SERVER`. Run with
//! `cargo run -p trunkline-client --example tasks`.

#![allow(clippy::print_stdout, reason = "an example")]

use trunkline_client::{
    Agent,
    task::{NewTask, TaskFilter},
};

#[tokio::main]
async fn main() -> trunkline_client::Result<()> {
    let agent = Agent::builder("prod", "planner", "main").from_env().connect().await?;
    let tasks = agent.tasks();
    let made = tasks.create(NewTask::new("data-processing").payload("{}").metadata("batch", "7")).await?;
    let mut events = tasks.follow(&made.task_id, false).await?;
    tasks.claim(&made.task_id).await?;
    let page = tasks.list(TaskFilter { workspace: "prod".into(), limit: 50, ..TaskFilter::default() }).await?;
    println!("found {} of {} tasks", page.tasks.len(), page.total);
    tasks.fail(&made.task_id, "the disk was full").await?;
    tasks.retry(&made.task_id).await?;
    tasks.cancel(&made.task_id, "not wanted any more").await?;
    println!("{}: {:?}", made.task_id, tasks.get(&made.task_id).await?.status());
    if let Some(event) = events.next().await {
        println!("heard {event:?}");
    }
    agent.close().await;
    Ok(())
}

//! A named task, and workers that share what comes.
//!
//! Needs a server: `trunkline serve --dev`, or any other at `TRUNKLINE_SERVER`. Run with
//! `cargo run -p trunkline-client --example task`.

#![allow(clippy::print_stdout, reason = "an example")]

use trunkline_client::{MetricBuilder, UniqueTask, Worker, task::Progress};

#[tokio::main]
async fn main() -> trunkline_client::Result<()> {
    let report = UniqueTask::builder("prod", "report-gen", "daily-report").from_env().connect().await?;
    let worker = Worker::builder("prod", "data-processor").at_least_once().from_env().connect().await?;
    println!("{} and {}", report.identity(), worker.identity());

    let mut work = worker.messages();
    report.send_to_task("prod", "data-processor", "", "batch 50").await?;
    if let Some(piece) = work.next().await {
        worker.report(Progress::running("task-123").completion(0.5).summary("batch 50 of 100")).await?;
        println!("worked on {}", piece.text());
        // Until here, it would go to another worker if this one vanished.
        piece.acknowledge();
    }
    worker.send_event(r#"{"type": "task.done"}"#).await?;
    worker.send_metric(MetricBuilder::new().add("batches", "work", 1.0)).await?;
    report.close().await;
    worker.close().await;
    Ok(())
}

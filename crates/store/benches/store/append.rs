//! Durable appends: throughput by concurrency and size, and the latency of one at a time.

use std::{
    io::Write as _,
    time::{Duration, Instant},
};

use trunkline_store::log::{Append, Log, Options, Topic};

use crate::{
    MEASURE,
    report::Report,
    timing::{percentile, rate},
};

pub(crate) async fn run(report: &mut Report) {
    println!("\n-- append, fsync before every answer --");
    for size in [64, 256, 4096] {
        for appenders in [1, 16, 64, 512] {
            let bare = bare_fjall(appenders, size);
            let (ours, latencies) = ours(appenders, size).await;
            report.row(
                format!("append {size} B, {appenders} appenders"),
                ours,
                "records/s",
                Some(("bare fjall", bare)),
            );
            if appenders == 1 {
                let file = bare_file(size);
                report.row(
                    format!("append {size} B, 1 appender, against a file"),
                    ours,
                    "records/s",
                    Some(("file+fdatasync", file)),
                );
                report.row(
                    format!("append {size} B, p50"),
                    percentile(&latencies, 0.5).as_secs_f64() * 1e6,
                    "us",
                    None,
                );
                report.row(
                    format!("append {size} B, p99"),
                    percentile(&latencies, 0.99).as_secs_f64() * 1e6,
                    "us",
                    None,
                );
            }
        }
    }
}

/// `appenders` tasks, each appending one record after the other, spread over 10 topics.
async fn ours(appenders: usize, size: usize) -> (f64, Vec<Duration>) {
    let dir = tempfile::tempdir().unwrap();
    let log = Log::open(dir.path(), Options::default()).unwrap();
    let begun = Instant::now();
    let tasks: Vec<_> = (0..appenders)
        .map(|n| {
            let (log, topic) = (log.clone(), Topic::new(&format!("topic-{}", n % 10)).unwrap());
            tokio::spawn(async move {
                let payload = bytes::Bytes::from(vec![7; size]);
                let mut latencies = Vec::new();
                while begun.elapsed() < MEASURE {
                    let sent = Instant::now();
                    log.append(Append::new(&topic, payload.clone())).await.unwrap();
                    latencies.push(sent.elapsed());
                }
                latencies
            })
        })
        .collect();
    let mut latencies = Vec::new();
    for task in tasks {
        latencies.extend(task.await.unwrap());
    }
    let rate = latencies.len() as f64 / begun.elapsed().as_secs_f64();
    latencies.sort_unstable();
    log.stop().await;
    (rate, latencies)
}

/// Batches of `batch` records straight into fjall, each committed with `fdatasync`.
fn bare_fjall(batch: usize, size: usize) -> f64 {
    let dir = tempfile::tempdir().unwrap();
    let database = fjall::Database::builder(dir.path()).manual_journal_persist(true).open().unwrap();
    let keyspace = database.keyspace("records", fjall::KeyspaceCreateOptions::default).unwrap();
    let payload = vec![7_u8; size];
    let mut key = 0_u64;
    rate(|| {
        let mut writes = database.batch().durability(Some(fjall::PersistMode::SyncData));
        for _ in 0..batch {
            key += 1;
            writes.insert(&keyspace, key.to_be_bytes(), payload.as_slice());
        }
        writes.commit().unwrap();
        batch
    })
}

/// Sequential writes to a preallocated file, each followed by `fdatasync`.
fn bare_file(size: usize) -> f64 {
    let mut file = tempfile::tempfile().unwrap();
    file.set_len(256 * 1024 * 1024).unwrap();
    file.sync_all().unwrap();
    let payload = vec![7_u8; size];
    rate(|| {
        file.write_all(&payload).unwrap();
        file.sync_data().unwrap();
        1
    })
}

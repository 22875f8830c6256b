//! Reading: catch-up from disk, and fan-out of one topic to many live readers.

use std::time::Instant;

use trunkline_store::log::{Append, Item, Log, Options, Topic};

use crate::report::Report;

const RECORDS: usize = 1_000_000;

pub(crate) async fn run(report: &mut Report) {
    println!("\n-- reading, 256 B records --");
    let channel = channel().await;
    for topics in [1, 1000] {
        let rate = catch_up(topics).await;
        report.row(format!("catch-up from disk, {topics} topics"), rate, "records/s", Some(("channel", channel)));
    }
    for readers in [1, 100, 1000, 10_000] {
        let rate = fan_out(readers).await;
        report.row(format!("fan-out of one topic to {readers} readers"), rate, "records/s", Some(("channel", channel)));
    }
}

/// An in-memory channel between two tasks: what handing over a record costs at least.
async fn channel() -> f64 {
    let (send, mut receive) = tokio::sync::mpsc::channel(1024);
    let payload = bytes::Bytes::from(vec![7; 256]);
    let begun = Instant::now();
    let sender = tokio::spawn(async move {
        for _ in 0..RECORDS {
            send.send(payload.clone()).await.unwrap();
        }
    });
    let mut received = Vec::new();
    while receive.recv_many(&mut received, 256).await > 0 {
        received.clear();
    }
    sender.await.unwrap();
    RECORDS as f64 / begun.elapsed().as_secs_f64()
}

async fn fill(log: &Log, topics: &[Topic], records: usize) {
    let payload = bytes::Bytes::from(vec![7; 256]);
    let mut written = 0;
    while written < records {
        let batch = (0..1000).map(|n| Append::new(&topics[(written + n) % topics.len()], payload.clone())).collect();
        log.append_batch(batch).await.unwrap();
        written += 1000;
    }
}

async fn catch_up(topics: usize) -> f64 {
    let dir = tempfile::tempdir().unwrap();
    let log = Log::open(dir.path(), Options::default()).unwrap();
    let topics: Vec<_> = (0..topics).map(|n| Topic::new(&format!("topic-{n}")).unwrap()).collect();
    fill(&log, &topics, RECORDS).await;
    let mut reader = log.reader();
    for topic in &topics {
        reader.follow_from_start(topic).unwrap();
    }
    let begun = Instant::now();
    let (mut read, mut items) = (0, Vec::new());
    while read < RECORDS {
        reader.next_batch(1024, &mut items).await.unwrap();
        read += items.len();
        items.clear();
    }
    let rate = RECORDS as f64 / begun.elapsed().as_secs_f64();
    drop(reader);
    log.stop().await;
    rate
}

/// Readers wait at the tail while records are appended in batches of 100; counted is what all of them got.
async fn fan_out(readers: usize) -> f64 {
    let dir = tempfile::tempdir().unwrap();
    let log = Log::open(dir.path(), Options::default()).unwrap();
    let topic = Topic::new("topic").unwrap();
    let records = (20_000_000 / readers).clamp(2_000, 1_000_000) / 100 * 100;
    let tasks: Vec<_> = (0..readers)
        .map(|_| {
            let mut reader = log.reader();
            reader.follow_from_tail(&topic).unwrap();
            tokio::spawn(async move {
                let (mut read, mut items) = (0, Vec::new());
                while read < records {
                    reader.next_batch(256, &mut items).await.unwrap();
                    read += items.iter().filter(|item| matches!(item, Item::Record(_))).count();
                    items.clear();
                }
            })
        })
        .collect();
    let payload = bytes::Bytes::from(vec![7; 256]);
    let begun = Instant::now();
    for _ in 0..records / 100 {
        log.append_batch(vec![Append::new(&topic, payload.clone()); 100]).await.unwrap();
    }
    for task in tasks {
        task.await.unwrap();
    }
    let rate = (records * readers) as f64 / begun.elapsed().as_secs_f64();
    log.stop().await;
    rate
}

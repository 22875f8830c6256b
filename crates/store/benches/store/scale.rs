//! What grows and what does not: memory, reopening, and the cost of an append beside idle topics and readers.

use std::time::Instant;

use trunkline_store::log::{Append, Log, Options, Reader, Topic};

use crate::report::{Report, rate, resident};

const TOPICS: usize = 1_000_000;
const READERS: usize = 10_000;

pub(crate) async fn run(report: &mut Report) {
    println!("\n-- scale --");
    idle_topics(report).await;
    idle_readers(report).await;
    reopening(report).await;
}

/// Appends one record to each of `topics` in turn, in batches of 1000, and answers the rate.
async fn appends(log: &Log, topics: &[Topic], total: usize) -> f64 {
    let payload = bytes::Bytes::from(vec![7; 256]);
    let begun = Instant::now();
    for start in (0..total).step_by(1000) {
        let batch = (start..start + 1000).map(|n| Append::new(&topics[n % topics.len()], payload.clone())).collect();
        log.append_batch(batch).await.unwrap();
    }
    total as f64 / begun.elapsed().as_secs_f64()
}

/// The same by 64 tasks, each with one append under way: what a client sees.
async fn single_appends(log: &Log, topics: &std::sync::Arc<Vec<Topic>>, total: usize) -> f64 {
    let next = std::sync::Arc::new(std::sync::atomic::AtomicUsize::new(0));
    let begun = Instant::now();
    let tasks: Vec<_> = (0..64)
        .map(|_| {
            let (log, topics, next) = (log.clone(), topics.clone(), next.clone());
            tokio::spawn(async move {
                let payload = bytes::Bytes::from(vec![7; 256]);
                loop {
                    let n = next.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
                    if n >= total {
                        return;
                    }
                    log.append(Append::new(&topics[n % topics.len()], payload.clone())).await.unwrap();
                }
            })
        })
        .collect();
    for task in tasks {
        task.await.unwrap();
    }
    total as f64 / begun.elapsed().as_secs_f64()
}

fn topics(count: usize) -> Vec<Topic> {
    (0..count).map(|n| Topic::new(&format!("topic-{n:07}")).unwrap()).collect()
}

/// Both logs hold as many records; only the number of topics differs. The second million is measured.
async fn idle_topics(report: &mut Report) {
    let (mut rates, mut singles) = (Vec::new(), Vec::new());
    for count in [10, TOPICS] {
        let dir = tempfile::tempdir().unwrap();
        let log = Log::open(dir.path(), Options::default()).unwrap();
        let topics = std::sync::Arc::new(topics(count));
        appends(&log, &topics, TOPICS).await;
        singles.push(single_appends(&log, &topics, TOPICS).await);
        rates.push(appends(&log, &topics, TOPICS).await);
        if count == TOPICS {
            let begun = Instant::now();
            for n in 0..1000 {
                let status = log.status(&topics[n * 997]).await.unwrap();
                assert_eq!(status.records, 3);
            }
            report.row("looking up one topic of a million", begun.elapsed().as_secs_f64() * 1e3, "us", None);
        }
        log.stop().await;
    }
    report.row("append by 64, 1,000,000 topics", singles[1], "records/s", Some(("10 topics", singles[0])));
    report.row("append in batches of 1000, 1,000,000 topics", rates[1], "records/s", Some(("10 topics", rates[0])));
    let per_topic = state_memory().await;
    report.row("memory of an idle topic", per_topic, "B", None);
}

/// What the writer holds for a million topics that were used once: the same appends with and without its cache.
async fn state_memory() -> f64 {
    let mut resident_with = Vec::new();
    for topics_cached_max in [1, 2 * TOPICS] {
        let dir = tempfile::tempdir().unwrap();
        let log = Log::open(dir.path(), Options { topics_cached_max, ..Options::default() }).unwrap();
        let before = resident();
        let topics = topics(TOPICS);
        appends(&log, &topics, TOPICS).await;
        drop(topics);
        // Let flushes end, so that both runs hold the same memtables.
        log.stop().await;
        let log_again = Log::open(dir.path(), Options { topics_cached_max, ..Options::default() }).unwrap();
        log_again.stop().await;
        resident_with.push(resident() as f64 - before as f64);
    }
    (resident_with[1] - resident_with[0]).max(0.0) / TOPICS as f64
}

async fn idle_readers(report: &mut Report) {
    let dir = tempfile::tempdir().unwrap();
    let log = Log::open(dir.path(), Options::default()).unwrap();
    let busy = topics(10);
    appends(&log, &busy, 200_000).await;
    let without = appends(&log, &busy, 500_000).await;
    let before = resident();
    let readers: Vec<Reader> = (0..READERS)
        .map(|n| {
            let mut reader = log.reader();
            reader.follow_from_tail(&Topic::new(&format!("idle-{n}")).unwrap()).unwrap();
            reader
        })
        .collect();
    let per_reader = (resident() - before) as f64 / READERS as f64;
    let with = appends(&log, &busy, 500_000).await;
    report.row("append, 10,000 idle readers", with, "records/s", Some(("no readers", without)));
    report.row("memory of an idle reader", per_reader, "B", None);
    drop(readers);
    log.stop().await;
}

async fn reopening(report: &mut Report) {
    let dir = tempfile::tempdir().unwrap();
    let log = Log::open(dir.path(), Options::default()).unwrap();
    let topics = topics(1000);
    let gib = 1024 * 1024 * 1024;
    // Not compressible, so that 5 GiB are 5 GiB on disk.
    let mut seed = 7_u64;
    let mut noise = || {
        seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (seed >> 33) as u8
    };
    let noise: Vec<u8> = (0..8 * 1024 * 1024).map(|_| noise()).collect();
    let noise = bytes::Bytes::from(noise);
    let mut written = 0;
    let begun = Instant::now();
    while written < 5 * gib {
        let batch = (0..500).map(|n| Append::new(&topics[n], noise.slice(n * 16_000..n * 16_000 + 4096))).collect();
        log.append_batch(batch).await.unwrap();
        written += 500 * 4096;
    }
    report.row("writing 5 GiB", 5.0 * 1024.0 / begun.elapsed().as_secs_f64(), "MiB/s", None);
    log.stop().await;
    let mut opened = None;
    let opens = rate(|| {
        drop(opened.take());
        let begun = Instant::now();
        opened = Some((Log::open(dir.path(), Options::default()).unwrap(), begun.elapsed()));
        1
    });
    let (log, last) = opened.unwrap();
    report.row("reopening 5 GiB", last.as_secs_f64().max(1.0 / opens), "s", None);
    log.stop().await;
}

//! What an idle topic and an idle reader take, by the bytes that are allocated for them.
//!
//! A program of its own because counting allocations slows them. Run by `cargo xtask bench store`.

#![allow(clippy::disallowed_methods, clippy::print_stdout, clippy::unwrap_used, reason = "bench code")]

#[path = "store/report.rs"]
mod report;

use report::Report;
use trunkline_store::log::{Append, Log, Offset, Options, Reader, Topic};

#[global_allocator]
static ALLOCATOR: cap::Cap<tikv_jemallocator::Jemalloc> = cap::Cap::new(tikv_jemallocator::Jemalloc, usize::MAX);

const TOPICS: usize = 1_000_000;
const READERS: usize = 10_000;

fn main() {
    let wanted: Vec<String> = std::env::args().skip(1).filter(|arg| !arg.starts_with('-')).collect();
    if !wanted.is_empty() && !wanted.iter().any(|section| section == "memory") {
        return;
    }
    println!("\n-- memory --");
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
    let dir = tempfile::tempdir().unwrap();
    let per_topic = runtime.block_on(idle_topic(dir.path()));
    let mut report = Report::default();
    report.row("an idle topic of a million, used since the start", per_topic, "B", None);
    let per_reader = runtime.block_on(idle_reader());
    report.row("an idle reader of 10,000, with its topic", per_reader, "B", None);
    report.write_json("store-memory");
}

async fn idle_topic(dir: &std::path::Path) -> f64 {
    // Next to no block cache: it would be counted.
    let options = || Options { cache_bytes: 1024 * 1024, ..Options::default() };
    let topic = |n: usize| Topic::new(&format!("topic-{n:07}")).unwrap();
    let log = Log::open(dir, options()).unwrap();
    for start in (0..TOPICS).step_by(1000) {
        log.append_batch((start..start + 1000).map(|n| Append::new(&topic(n), "x")).collect()).await.unwrap();
    }
    log.stop().await;
    let log = Log::open(dir, options()).unwrap();
    let before = ALLOCATOR.allocated();
    let tasks: Vec<_> = (0..64)
        .map(|part| {
            let log = log.clone();
            // Trims nothing, but makes the writer look at the topic.
            tokio::spawn(async move {
                for n in (part..TOPICS).step_by(64) {
                    log.trim(&topic(n), Offset::START).await.unwrap();
                }
            })
        })
        .collect();
    for task in tasks {
        task.await.unwrap();
    }
    let allocated = ALLOCATOR.allocated() - before;
    log.stop().await;
    allocated as f64 / TOPICS as f64
}

async fn idle_reader() -> f64 {
    let dir = tempfile::tempdir().unwrap();
    let log = Log::open(dir.path(), Options::default()).unwrap();
    let mut readers: Vec<Reader> = Vec::with_capacity(READERS);
    let before = ALLOCATOR.allocated();
    for n in 0..READERS {
        let mut reader = log.reader();
        reader.follow_from_tail(&Topic::new(&format!("idle-{n}")).unwrap()).unwrap();
        readers.push(reader);
    }
    // The handles themselves lie in the vector, which was made before.
    let allocated = ALLOCATOR.allocated() - before + READERS * size_of::<Reader>();
    drop(readers);
    log.stop().await;
    allocated as f64 / READERS as f64
}

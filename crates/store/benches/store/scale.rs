//! What must not grow: the cost of an append beside idle topics and readers, and the time to reopen.

use std::{
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering::Relaxed},
    },
    time::Instant,
};

use trunkline_store::log::{Append, Log, Options, Reader, Topic};

use crate::report::Report;

const TOPICS: usize = 1_000_000;
const READERS: usize = 10_000;

/// Both sides take turns, so that a machine whose speed drifts slows both.
const ROUNDS: usize = 4;

struct Side {
    _dir: tempfile::TempDir,
    log: Log,
    topics: Arc<Vec<Topic>>,
    /// Seconds taken by all rounds so far.
    by_one: f64,
    by_batch: f64,
}

impl Side {
    /// A log with a million records over so many topics.
    async fn new(topics: usize) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let log = Log::open(dir.path(), Options::default()).unwrap();
        let topics = Arc::new((0..topics).map(|n| Topic::new(&format!("topic-{n:07}")).unwrap()).collect());
        let mut side = Self { _dir: dir, log, topics, by_one: 0.0, by_batch: 0.0 };
        side.append_batches(TOPICS).await;
        side.by_batch = 0.0;
        side
    }

    /// To each topic in turn, in batches of 1000.
    async fn append_batches(&mut self, records: usize) {
        let payload = bytes::Bytes::from(vec![7; 256]);
        let begun = Instant::now();
        for start in (0..records).step_by(1000) {
            let topic = |n| &self.topics[n % self.topics.len()];
            let batch = (start..start + 1000).map(|n| Append::new(topic(n), payload.clone())).collect();
            self.log.append_batch(batch).await.unwrap();
        }
        self.by_batch += begun.elapsed().as_secs_f64();
    }

    /// The same by 64 tasks, each with one append under way: what a client sees.
    async fn append_one_by_one(&mut self, records: usize) {
        let next = Arc::new(AtomicUsize::new(0));
        let begun = Instant::now();
        let tasks: Vec<_> = (0..64)
            .map(|_| {
                let (log, topics, next) = (self.log.clone(), self.topics.clone(), next.clone());
                tokio::spawn(async move {
                    let payload = bytes::Bytes::from(vec![7; 256]);
                    loop {
                        let n = next.fetch_add(1, Relaxed);
                        if n >= records {
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
        self.by_one += begun.elapsed().as_secs_f64();
    }
}

/// Rounds of as many records on both sides; prints rates, and the costs of the second in terms of the first.
async fn compare(report: &mut Report, sides: &mut [Side; 2], names: [&'static str; 2], records: usize) {
    for _ in 0..ROUNDS {
        for side in &mut *sides {
            side.append_one_by_one(records).await;
            side.append_batches(records).await;
        }
    }
    let rate = |seconds: f64| (ROUNDS * records) as f64 / seconds;
    let [few, many] = sides;
    let (name, limit) = (names[1], names[0]);
    report.row(format!("append by 64, {name}"), rate(many.by_one), "records/s", Some((limit, rate(few.by_one))));
    let limit = Some((limit, rate(few.by_batch)));
    report.row(format!("append in batches of 1000, {name}"), rate(many.by_batch), "records/s", limit);
}

/// Both logs hold as many records; only the number of topics differs.
pub(crate) async fn idle_topics(report: &mut Report) {
    println!("\n-- many topics --");
    let mut sides = [Side::new(10).await, Side::new(TOPICS).await];
    compare(report, &mut sides, ["10 topics", "1,000,000 topics"], TOPICS).await;
    let [_, many] = sides;
    let begun = Instant::now();
    for n in 0..1000 {
        assert_eq!(many.log.status(&many.topics[n * 997]).await.unwrap().records, 1 + 2 * ROUNDS as u64);
    }
    report.row("looking up one topic of a million", begun.elapsed().as_secs_f64() * 1e3, "us", None);
    let begun = Instant::now();
    let (mut read, mut items) = (0, Vec::new());
    for part in many.topics.chunks(100).take(100) {
        let mut reader = many.log.reader();
        part.iter().for_each(|topic| reader.follow_from_start(topic).unwrap());
        let before = read;
        while read < before + part.len() * (1 + 2 * ROUNDS) {
            items.clear();
            reader.next_batch(1024, &mut items).await.unwrap();
            read += items.len();
        }
    }
    report.row(
        "catching up on 10,000 of a million topics",
        read as f64 / begun.elapsed().as_secs_f64(),
        "records/s",
        None,
    );
}

pub(crate) async fn idle_readers(report: &mut Report) {
    println!("\n-- many idle readers --");
    let mut sides = [Side::new(10).await, Side::new(10).await];
    let follow = |n| {
        let mut reader = sides[1].log.reader();
        reader.follow_from_tail(&Topic::new(&format!("idle-{n}")).unwrap()).unwrap();
        reader
    };
    let readers: Vec<Reader> = (0..READERS).map(follow).collect();
    compare(report, &mut sides, ["no readers", "10,000 idle readers"], TOPICS / 2).await;
    drop(readers);
}

/// Set for the copy of this program that fills a log and dies.
const FILL: &str = "TRUNKLINE_BENCH_FILL";

pub(crate) async fn reopening(report: &mut Report) {
    println!("\n-- reopening --");
    let dir = tempfile::tempdir().unwrap();
    let begun = Instant::now();
    let mut fill = std::process::Command::new(std::env::current_exe().unwrap());
    fill.env(FILL, dir.path()).stderr(std::process::Stdio::null()).status().unwrap();
    report.row("writing 5 GiB", 5.0 * 1024.0 / begun.elapsed().as_secs_f64(), "MiB/s", None);
    for how in ["its process was killed", "it was stopped"] {
        let begun = Instant::now();
        let log = Log::open(dir.path(), Options::default()).unwrap();
        report.row(format!("reopening 5 GiB after {how}"), begun.elapsed().as_secs_f64(), "s", None);
        log.stop().await;
    }
}

/// In the copy that [`reopening`] starts, fills the log and aborts.
pub(crate) async fn fill_if_asked() {
    let Some(dir) = std::env::var_os(FILL) else { return };
    let log = Log::open(dir.as_ref(), Options::default()).unwrap();
    let topics: Vec<_> = (0..1000).map(|n| Topic::new(&format!("topic-{n}")).unwrap()).collect();
    // Not compressible, so that 5 GiB are 5 GiB on disk.
    let mut seed = 7_u64;
    let mut noise = || {
        seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (seed >> 33) as u8
    };
    let noise: bytes::Bytes = (0..8 * 1024 * 1024).map(|_| noise()).collect();
    let mut written = 0;
    while written < 5_u64 << 30 {
        let batch = (0..500).map(|n| Append::new(&topics[n], noise.slice(n * 16_000..n * 16_000 + 4096))).collect();
        log.append_batch(batch).await.unwrap();
        written += 500 * 4096;
    }
    std::process::abort();
}

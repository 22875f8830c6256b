//! Rows: write transactions of two rows, and point reads, beside a bare SQLite that does the same without queues.

use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    time::Instant,
};

use trunkline_store::ledger::{Error, Ledger, Migration, Options};

use crate::{
    MEASURE,
    report::{Report, rate},
};

const SCHEMA: &[Migration] = &[Migration {
    name: "0001_bench",
    sql: "CREATE TABLE facts (id BIGINT PRIMARY KEY, text TEXT NOT NULL); \
          CREATE TABLE audit (id BIGINT PRIMARY KEY, text TEXT NOT NULL)",
}];
const FACT: &str = "INSERT INTO facts (id, text) VALUES ($1, $2)";
const AUDIT: &str = "INSERT INTO audit (id, text) VALUES ($1, $2)";
const READ: &str = "SELECT text FROM facts WHERE id = $1";
const TEXT: &str = "what happened to whom, in about sixty bytes of ordinary text..";

pub(crate) async fn run(report: &mut Report) {
    println!("\n-- ledger, SQLite, fsync before every answer --");
    for in_flight in [32, 512] {
        let bare = bare_writes(in_flight);
        let ours = writes(in_flight).await;
        report.row(format!("two-row transactions, {in_flight} in flight"), ours, "tx/s", Some(("bare rusqlite", bare)));
    }
    let (ours, bare) = reads().await;
    report.row("point reads, 512 in flight", ours, "reads/s", Some(("bare rusqlite", bare)));
}

fn open(dir: &tempfile::TempDir) -> Ledger {
    Ledger::open_sqlite(&dir.path().join("ledger.sqlite"), SCHEMA, Options::default()).unwrap()
}

async fn write(ledger: &Ledger, id: i64) {
    let both = ledger.write(move |tx| {
        Box::pin(async move {
            tx.execute(FACT, &[id.into(), TEXT.into()]).await?;
            tx.execute(AUDIT, &[id.into(), TEXT.into()]).await?;
            Ok::<_, Error>(())
        })
    });
    both.await.unwrap();
}

/// `in_flight` tasks, each doing `step` again and again; answers steps a second.
async fn in_flight<F: Future<Output = ()> + Send>(
    in_flight: usize,
    step: impl Fn(u64) -> F + Clone + Send + Sync + 'static,
) -> f64 {
    let next = Arc::new(AtomicU64::new(0));
    let begun = Instant::now();
    let tasks: Vec<_> = (0..in_flight)
        .map(|_| {
            let (step, next) = (step.clone(), next.clone());
            tokio::spawn(async move {
                while begun.elapsed() < 2 * MEASURE {
                    step(next.fetch_add(1, Relaxed)).await;
                }
            })
        })
        .collect();
    for task in tasks {
        task.await.unwrap();
    }
    next.load(Relaxed) as f64 / begun.elapsed().as_secs_f64()
}

async fn writes(tasks: usize) -> f64 {
    let dir = tempfile::tempdir().unwrap();
    let ledger = open(&dir);
    let shared = ledger.clone();
    let rate = in_flight(tasks, move |id| {
        let ledger = shared.clone();
        async move { write(&ledger, id as i64).await }
    })
    .await;
    ledger.stop().await;
    rate
}

async fn reads() -> (f64, f64) {
    let dir = tempfile::tempdir().unwrap();
    let ledger = open(&dir);
    let fill: Vec<_> = (0..100)
        .map(|part| {
            let ledger = ledger.clone();
            tokio::spawn(async move {
                for id in 0..1000 {
                    write(&ledger, part * 1000 + id).await;
                }
            })
        })
        .collect();
    for task in fill {
        task.await.unwrap();
    }
    let shared = ledger.clone();
    let ours = in_flight(512, move |n| {
        let ledger = shared.clone();
        async move {
            let id = (n * 7919 % 100_000) as i64;
            let read = ledger.read(move |tx| Box::pin(async move { tx.query_opt(READ, &[id.into()]).await }));
            assert!(read.await.unwrap_or_else(|e: Error| panic!("{e}")).is_some());
        }
    })
    .await;
    ledger.stop().await;
    let connection = rusqlite::Connection::open(dir.path().join("ledger.sqlite")).unwrap();
    let mut id = 0_i64;
    let bare = rate(|| {
        id = (id + 7919) % 100_000;
        let mut read = connection.prepare_cached(READ).unwrap();
        let text: String = read.query_row([id], |row| row.get(0)).unwrap();
        assert!(!text.is_empty());
        1
    });
    (ours, bare)
}

/// One thread, `group` savepoints a commit, no queue and no answers.
fn bare_writes(group: usize) -> f64 {
    let dir = tempfile::tempdir().unwrap();
    let connection = rusqlite::Connection::open(dir.path().join("bare.sqlite")).unwrap();
    connection.pragma_update(None, "journal_mode", "WAL").unwrap();
    connection.pragma_update(None, "synchronous", "FULL").unwrap();
    connection.execute_batch(SCHEMA[0].sql).unwrap();
    let run = |sql: &str| connection.prepare_cached(sql).unwrap().execute([]).unwrap();
    let mut id = 0_i64;
    rate(|| {
        run("BEGIN IMMEDIATE");
        for _ in 0..group {
            id += 1;
            run("SAVEPOINT one");
            for sql in [FACT, AUDIT] {
                connection.prepare_cached(sql).unwrap().execute((id, TEXT)).unwrap();
            }
            run("RELEASE one");
        }
        run("COMMIT");
        group
    })
}

//! Rows: write transactions of two rows, and point reads, beside a bare SQLite that does the same without queues.

use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    time::Instant,
};

use trunkline_store::{
    conformance::postgres,
    ledger::{Error, Ledger, Migration, Options},
};

use crate::{MEASURE, report::Report, timing::rate};

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
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name);
    for tasks in [32, 512] {
        let bare = bare_writes(tasks);
        let ledger = Ledger::open_sqlite(&path(&format!("{tasks}")), SCHEMA, Options::default()).unwrap();
        let ours = writes(&ledger, tasks).await;
        ledger.stop().await;
        report.row(format!("two-row transactions, {tasks} in flight"), ours, "tx/s", Some(("bare rusqlite", bare)));
    }
    let ledger = Ledger::open_sqlite(&path("reads"), SCHEMA, Options::default()).unwrap();
    let ours = reads(&ledger).await;
    ledger.stop().await;
    report.row("point reads, 512 in flight", ours, "reads/s", Some(("bare rusqlite", bare_reads(&path("reads")))));

    println!("\n-- ledger, PostgreSQL, fsync before every answer --");
    for tasks in [32, 512] {
        let bare = bare_postgres(&postgres::database().await, &[FACT, AUDIT]).await;
        let ledger = Ledger::open_postgres(&postgres::database().await, SCHEMA, Options::default()).await.unwrap();
        let ours = writes(&ledger, tasks).await;
        ledger.stop().await;
        let limit = Some(("bare tokio-postgres", bare));
        report.row(format!("two-row transactions, {tasks} in flight"), ours, "tx/s", limit);
    }
    let url = postgres::database().await;
    let ledger = Ledger::open_postgres(&url, SCHEMA, Options::default()).await.unwrap();
    let ours = reads(&ledger).await;
    ledger.stop().await;
    let bare = bare_postgres(&url, &[]).await;
    report.row("point reads, 512 in flight", ours, "reads/s", Some(("bare tokio-postgres", bare)));
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

async fn writes(ledger: &Ledger, tasks: usize) -> f64 {
    let shared = ledger.clone();
    in_flight(tasks, move |id| {
        let ledger = shared.clone();
        async move { write(&ledger, id as i64).await }
    })
    .await
}

/// Rows that point reads choose from.
const ROWS: i64 = 100_000;

async fn reads(ledger: &Ledger) -> f64 {
    for first in (0..ROWS).step_by(1000) {
        let fill = ledger.write(move |tx| {
            Box::pin(async move {
                for id in first..first + 1000 {
                    tx.execute(FACT, &[id.into(), TEXT.into()]).await?;
                }
                Ok::<_, Error>(())
            })
        });
        fill.await.unwrap();
    }
    let shared = ledger.clone();
    in_flight(512, move |n| {
        let ledger = shared.clone();
        async move {
            let id = n as i64 * 7919 % ROWS;
            let read = ledger.read(move |tx| Box::pin(async move { tx.query_opt(READ, &[id.into()]).await }));
            assert!(read.await.unwrap_or_else(|e: Error| panic!("{e}")).is_some());
        }
    })
    .await
}

fn bare_reads(path: &std::path::Path) -> f64 {
    let connection = rusqlite::Connection::open(path).unwrap();
    let mut id = 0;
    rate(|| {
        id = (id + 7919) % ROWS;
        let mut read = connection.prepare_cached(READ).unwrap();
        let text: String = read.query_row([id], |row| row.get(0)).unwrap();
        assert!(!text.is_empty());
        1
    })
}

/// As many connections as the ledger has, each with one transaction after the other: inserts by `changes` and a commit,
/// or point reads without one.
async fn bare_postgres(url: &str, changes: &'static [&'static str]) -> f64 {
    let next = Arc::new(AtomicU64::new(1));
    let connect = || async {
        let (client, connection) = tokio_postgres::connect(url, tokio_postgres::NoTls).await.unwrap();
        tokio::spawn(connection);
        client
    };
    if !changes.is_empty() {
        connect().await.batch_execute(SCHEMA[0].sql).await.unwrap();
    }
    let begun = Instant::now();
    let mut tasks = Vec::new();
    for _ in 0..16 {
        let (client, next) = (connect().await, next.clone());
        tasks.push(tokio::spawn(async move {
            let mut statements = Vec::new();
            for sql in changes {
                statements.push(client.prepare(sql).await.unwrap());
            }
            let read = client.prepare(READ).await.unwrap();
            while begun.elapsed() < 2 * MEASURE {
                let id = next.fetch_add(1, Relaxed) as i64;
                if changes.is_empty() {
                    client.query_one(&read, &[&(id * 7919 % ROWS)]).await.unwrap();
                    continue;
                }
                client.batch_execute("BEGIN ISOLATION LEVEL SERIALIZABLE").await.unwrap();
                for statement in &statements {
                    client.execute(statement, &[&id, &TEXT]).await.unwrap();
                }
                client.batch_execute("COMMIT").await.unwrap();
            }
        }));
    }
    for task in tasks {
        task.await.unwrap();
    }
    next.load(Relaxed) as f64 / begun.elapsed().as_secs_f64()
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

//! Power losses. A child works on a store and its system calls are recorded; then the directory is made as a disk may hold
//! it when the power goes at any moment: what was not synced is there, or not, or in part. Every such directory opens, and
//! holds all that was acknowledged.
//!
//! `TRUNKLINE_TEST_POWER_CUTS` is the number of cuts of each recording, of which there are four.
//! `TRUNKLINE_TEST_POWER_SEED` takes the same cuts again, as far as the recordings are alike.

#![allow(
    clippy::disallowed_methods,
    clippy::expect_used,
    clippy::panic,
    clippy::print_stdout,
    clippy::unwrap_used,
    reason = "test code"
)]

mod disk;
mod trace;

use std::{collections::BTreeMap, path::Path, process::Command};

use disk::{Dice, Disk};
use trace::{Event, Trace};
use trunkline_store::{
    Durability, Options, Store, ledger,
    ledger::Migration,
    log::{self, Append, Item, Topic},
};

const CHILD_DIR: &str = "TRUNKLINE_TEST_CHILD_DIR";
const CHILD_LIFE: &str = "TRUNKLINE_TEST_CHILD_LIFE";
const CUTS: &str = "TRUNKLINE_TEST_POWER_CUTS";
const SEED: &str = "TRUNKLINE_TEST_POWER_SEED";

const SCHEMA: &[Migration] =
    &[Migration { name: "0001", sql: "CREATE TABLE rows (life BIGINT NOT NULL, n BIGINT NOT NULL)" }];

/// Topics, each with a writer of its own, and what each writes.
const TOPICS: usize = 4;
const APPENDS: usize = 60;

/// Cuts of one recording where their number is not given: some ten seconds.
const CUTS_DEFAULT: usize = 30;

/// Where images are put. Opening one syncs a lot, which need not reach a disk.
const IN_MEMORY: &str = "/dev/shm";

fn options() -> Options {
    // Small, so that chunks are indexed, windows shrink and topics are trimmed all the time.
    let log = log::Options { chunk_records: 40, window_bytes_max: 10_000, ..log::Options::default() };
    let ledger = ledger::Options { durability: Durability::Machine, ..ledger::Options::default() };
    Options { log, ledger, migrations: SCHEMA.to_vec(), bucket: None }
}

fn scratch() -> tempfile::TempDir {
    tempfile::tempdir_in(IN_MEMORY).or_else(|_| tempfile::tempdir()).unwrap()
}

fn topic(n: usize) -> Topic {
    Topic::new(&format!("t{n}")).unwrap()
}

/// What the child acknowledges, one line each: a topic, or `l` for the ledger, and its number in this life.
fn say(of: &str, number: usize) {
    println!("{of} {number}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn child() {
    let (Some(dir), Some(life)) = (std::env::var_os(CHILD_DIR), std::env::var_os(CHILD_LIFE)) else { return };
    let life: usize = life.to_str().unwrap().parse().unwrap();
    let store = Store::open(Path::new(&dir), options()).unwrap();
    let mut tasks = tokio::task::JoinSet::new();
    for t in 0..TOPICS {
        let (log, topic) = (store.log.clone(), topic(t));
        tasks.spawn(async move {
            for n in 0..APPENDS {
                let payload = format!("{life} {n} {}", "x".repeat(n * n * 7 % 9_000));
                let append = Append::new(&topic, payload).dedup(format!("{life} {n}"));
                log.append(append).await.unwrap();
                say(&format!("{t}"), n);
            }
        });
    }
    let (log, ledger) = (store.log.clone(), store.ledger.clone());
    tasks.spawn(async move {
        let topic = Topic::new("trimmed").unwrap();
        for n in 0..APPENDS {
            let appended = log.append(Append::new(&topic, "y".repeat(200))).await.unwrap();
            match n % 10 {
                4 => assert_eq!(log.trim(&topic, appended.offset).await.unwrap(), appended.offset),
                9 => assert!(log.delete(&topic).await.unwrap()),
                _ => {}
            }
        }
    });
    tasks.spawn(async move {
        for n in 0..APPENDS / 2 {
            let row = [(life as i64).into(), (n as i64).into()];
            let write = ledger.write(move |tx| {
                let row = row.clone();
                Box::pin(async move { tx.execute("INSERT INTO rows VALUES ($1, $2)", &row).await })
            });
            let written: Result<u64, ledger::Error> = write.await;
            written.unwrap();
            say("l", n);
        }
    });
    tasks.join_all().await;
    store.stop().await;
}

/// Lets a child live on `dir`, and records it.
fn record(dir: &Path, life: usize) -> Trace {
    let out = tempfile::NamedTempFile::new().unwrap();
    let mut strace = Command::new("strace");
    strace.args(["-f", "-qq", "-y", "-xx", "-s", "100000000", "-e", trace::CALLS, "-o"]).arg(out.path());
    strace.arg(std::env::current_exe().unwrap()).args(["--exact", "child", "--nocapture", "--test-threads=1"]);
    let output = strace.env(CHILD_DIR, dir).env(CHILD_LIFE, life.to_string()).output().expect("strace is installed");
    assert!(
        output.status.success(),
        "{}{}",
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
    Trace::read(&std::fs::read_to_string(out.path()).unwrap(), dir)
}

/// What was acknowledged, by life and by what: how many, which come in order.
type Acknowledged = BTreeMap<(usize, String), usize>;

fn note(acknowledged: &mut Acknowledged, life: usize, line: &str) {
    let mut words = line.split_whitespace();
    let (Some(of), Some(Ok(number)), None) = (words.next(), words.next().map(str::parse::<usize>), words.next()) else {
        return;
    };
    let count = acknowledged.entry((life, of.to_owned())).or_default();
    assert_eq!(*count, number, "acknowledged in order");
    *count += 1;
}

/// Opens what a cut left, and holds it against what was acknowledged.
async fn check(dir: &Path, acknowledged: &Acknowledged, what: &str) {
    let store = Store::open(dir, options()).unwrap_or_else(|e| panic!("{what}: {e}"));
    let mut found = Acknowledged::new();
    for t in 0..TOPICS {
        let mut reader = store.log.reader();
        reader.follow_from_start(&topic(t)).unwrap();
        loop {
            let mut items = Vec::new();
            reader.available_batch(1024, &mut items).await.unwrap_or_else(|e| panic!("{what}: {e}"));
            if items.is_empty() {
                break;
            }
            for item in items {
                let Item::Record(record) = item else { panic!("{what}: {item:?}") };
                let mut words = std::str::from_utf8(&record.payload).unwrap().split(' ');
                let (life, n): (usize, usize) =
                    (words.next().unwrap().parse().unwrap(), words.next().unwrap().parse().unwrap());
                let count = found.entry((life, t.to_string())).or_default();
                assert_eq!(*count, n, "{what}: topic {t}, life {life}: in order, once");
                *count += 1;
            }
        }
    }
    let rows = store
        .ledger
        .read(|tx| Box::pin(async move { tx.query("SELECT life, n FROM rows ORDER BY life, n", &[]).await }));
    let rows: Result<Vec<_>, ledger::Error> = rows.await;
    for row in rows.unwrap_or_else(|e| panic!("{what}: {e}")) {
        *found.entry((row.int(0).unwrap() as usize, "l".into())).or_default() += 1;
    }
    for (of, count) in acknowledged {
        let there = found.get(of).copied().unwrap_or_default();
        assert!(there >= *count, "{what}: {of:?}: {count} were acknowledged, {there} are there");
    }
    let taken = store.log.append(Append::new(&Topic::new("after").unwrap(), "taken")).await;
    taken.unwrap_or_else(|e| panic!("{what}: {e}"));
    store.stop().await;
}

/// Cuts the power again and again while a life is recorded; answers the last image, and what it has to hold.
async fn cut(dir: &Path, life: usize, before: &Acknowledged, dice: &Dice) -> (tempfile::TempDir, Acknowledged) {
    let mut disk = Disk::load(dir);
    let trace = record(dir, life);
    let cuts = std::env::var(CUTS).ok().and_then(|cuts| cuts.parse().ok()).unwrap_or(CUTS_DEFAULT);
    // Ascending, so that the recording is played once.
    let mut at: Vec<usize> = (0..cuts).map(|_| dice.below(trace.events.len())).collect();
    at.sort_unstable();
    let (mut position, mut acknowledged) = (0, before.clone());
    for upto in at {
        while position < upto {
            match &trace.events[position] {
                Event::Said(line) => note(&mut acknowledged, life, line),
                Event::Call(call) => disk.apply(call),
            }
            position += 1;
        }
        let image = disk.after_power_loss(dice);
        check(
            &image.path().join("data"),
            &acknowledged,
            &format!("life {life}, cut at {position}, seed {}", dice.seed),
        )
        .await;
    }
    let (calls, sum) = (trace.events.len(), acknowledged.values().sum::<usize>());
    println!("life {life}: {cuts} cuts of {calls} calls, {sum} acknowledged");
    (disk.after_power_loss(dice), acknowledged)
}

/// As the engine does when one is full: in the next life it writes tables of the others and removes them, so that the only
/// journal may begin with what a cut tears.
fn begin_another_journal(log: &Path) {
    let number = |entry: std::fs::DirEntry| entry.file_name().to_str()?.strip_suffix(".jnl")?.parse::<u64>().ok();
    let last = std::fs::read_dir(log).unwrap().flatten().filter_map(number).max().unwrap();
    std::fs::write(log.join(format!("{}.jnl", last + 1)), [0; 65536]).unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_was_acknowledged_survives_every_power_loss() {
    let seed = std::env::var(SEED).ok().and_then(|seed| seed.parse().ok()).unwrap_or_else(|| {
        std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap().as_nanos() as u64
    });
    println!("seed {seed}");
    let dice = Dice::new(seed);
    let root = scratch();
    let (mut image, mut acknowledged) = cut(&root.path().join("data"), 0, &Acknowledged::new(), &dice).await;
    for life in 1..4 {
        if life == 3 {
            begin_another_journal(&image.path().join("data/log"));
        }
        (image, acknowledged) = cut(&image.path().join("data"), life, &acknowledged, &dice).await;
    }
    drop((image, acknowledged));
}

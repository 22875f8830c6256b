//! A child process appends as fast as it can and is killed with SIGKILL at random moments, 200 times over one data
//! directory. After each kill, every acknowledged append is there, in order, once.
//!
//! Not a libtest: the same program is both, the child and the one that kills it.

#![allow(
    clippy::disallowed_methods,
    clippy::expect_used,
    clippy::panic,
    clippy::print_stdout,
    clippy::unwrap_used,
    reason = "test code"
)]

use std::{
    collections::HashMap,
    io::{BufRead as _, BufReader},
    path::Path,
    process::{Command, Stdio},
    time::{Duration, Instant},
};

use trunkline_store::log::{Append, Cursor, Item, Log, Offset, Options, Topic};

const ROUNDS: usize = 200;
const TASKS: usize = 24;
const TOPICS: usize = 5;

/// Every so many rounds the whole log is read again, not only what is new.
const FULL_CHECK_ROUNDS: usize = 40;

fn main() {
    let args: Vec<String> = std::env::args().collect();
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
    match &args[1..] {
        [word, dir, round] if word == "child" => runtime.block_on(child(Path::new(dir), round)),
        // Whoever lists tests, or runs another one by its name, means the others.
        [first, ..] if first == "--list" || !first.starts_with('-') => {}
        _ => {
            runtime.block_on(kill_again_and_again());
            println!("test result: ok. 1 passed; 0 failed; 0 ignored; 0 measured; 0 filtered out");
        }
    }
}

fn topic(task: usize) -> Topic {
    Topic::new(&format!("t{}", task % TOPICS)).unwrap()
}

/// Appends until it is killed, and says each acknowledged one on standard output: task, number, offset.
async fn child(dir: &Path, round: &str) {
    let log = Log::open(dir, Options { window_bytes_max: 100_000, chunk_records: 500, ..Options::default() }).unwrap();
    let tasks: Vec<_> = (0..TASKS)
        .map(|task| {
            let (log, topic, round) = (log.clone(), topic(task), round.to_owned());
            tokio::spawn(async move {
                for number in 0.. {
                    let id = format!("{round}:{task}:{number}");
                    let payload = format!("{id}:{}", "x".repeat(number * 37 % 700));
                    let append = Append::new(&topic, payload);
                    // Some are repeated, as a client does that did not hear the answer.
                    let repeats = number % 5 == 0;
                    let append = if repeats { append.dedup(id) } else { append };
                    let offset = log.append(append.clone()).await.unwrap().offset;
                    say(task, number, offset);
                    if repeats {
                        assert_eq!(log.append(append).await.unwrap().offset, offset);
                    }
                }
            })
        })
        .collect();
    for task in tasks {
        task.await.unwrap();
    }
}

/// One line, written at once: the output is a pipe, and standard output is buffered by lines.
fn say(task: usize, number: usize, offset: Offset) {
    println!("{task} {number} {offset}");
}

/// What was acknowledged in one round: for each task, the offsets of its numbers.
type Acknowledged = Vec<Vec<u64>>;

async fn kill_again_and_again() {
    let dir = tempfile::tempdir().unwrap();
    let mut seed = 0x5eed_u64;
    let mut all: Vec<Acknowledged> = Vec::new();
    let mut read_to: Option<Cursor> = None;
    let (mut acknowledged, mut repairs) = (0, 0);
    for round in 0..ROUNDS {
        seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        let alive = Duration::from_micros((seed >> 33) % 40_000);
        let acks = one_life(dir.path(), round, alive);
        acknowledged += acks.iter().map(Vec::len).sum::<usize>();
        all.push(acks);
        let log = Log::open(dir.path(), Options::default()).unwrap();
        repairs += usize::from(log.repair().is_some());
        let full = round % FULL_CHECK_ROUNDS == FULL_CHECK_ROUNDS - 1 || round == ROUNDS - 1;
        let from = read_to.filter(|_| !full);
        check(&log, from, if from.is_some() { &all[round..] } else { &all }, if from.is_some() { round } else { 0 })
            .await;
        read_to = Some(log.tail());
        log.stop().await;
    }
    println!("{ROUNDS} kills, {acknowledged} acknowledged appends, {repairs} torn tails repaired");
    assert!(acknowledged > ROUNDS * TASKS, "the child got to work");
}

fn one_life(dir: &Path, round: usize, alive: Duration) -> Acknowledged {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["child", dir.to_str().unwrap(), &round.to_string()]).stdout(Stdio::piped());
    let mut child = command.spawn().unwrap();
    let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
    let mut acks: Acknowledged = vec![Vec::new(); TASKS];
    let mut note = |line: std::io::Result<String>| {
        let line = line.unwrap();
        let fields: Option<Vec<u64>> = line.split(' ').map(|field| field.parse().ok()).collect();
        // The last line may be cut in the middle.
        if let Some(&[task, number, offset]) = fields.as_deref()
            && number as usize == acks[task as usize].len()
        {
            acks[task as usize].push(offset);
        }
    };
    let first = lines.next();
    first.into_iter().for_each(&mut note);
    let born = Instant::now();
    std::thread::scope(|scope| {
        scope.spawn(|| {
            // How long it lives is the point of this test; nothing waits for a condition here.
            std::thread::sleep(alive.saturating_sub(born.elapsed()));
            child.kill().unwrap();
            child.wait().unwrap();
        });
        lines.for_each(note);
    });
    acks
}

/// Reads all topics from `from` and holds what was acknowledged from `first_round` on against it.
async fn check(log: &Log, from: Option<Cursor>, rounds: &[Acknowledged], first_round: usize) {
    let start = Cursor { offset: Offset::START, ..log.tail() };
    let mut reader = log.reader_at(from.unwrap_or(start)).unwrap();
    for task in 0..TOPICS {
        reader.follow(&topic(task)).unwrap();
    }
    // The next number of each round's tasks, and what was found of them.
    let mut found: HashMap<(usize, usize), Vec<u64>> = HashMap::new();
    let mut last = from.map_or(0, |cursor| cursor.offset.0);
    loop {
        let mut items = Vec::new();
        reader.available_batch(1024, &mut items).await.unwrap();
        if items.is_empty() {
            break;
        }
        for item in items {
            let Item::Record(record) = item else { panic!("{item:?}") };
            assert!(record.offset.0 > last, "offsets grow");
            last = record.offset.0;
            let text = std::str::from_utf8(&record.payload).unwrap();
            let mut fields = text.split(':').map(str::parse::<usize>);
            let mut field = || fields.next().unwrap().unwrap();
            let (round, task, number) = (field(), field(), field());
            assert_eq!(record.topic, topic(task));
            let offsets = found.entry((round, task)).or_default();
            assert_eq!(number, offsets.len(), "round {round}, task {task}: in order, once");
            offsets.push(last);
        }
    }
    for (index, acks) in rounds.iter().enumerate() {
        for (task, acked) in acks.iter().enumerate() {
            let offsets = found.remove(&(first_round + index, task)).unwrap_or_default();
            assert!(
                offsets.starts_with(acked),
                "round {}, task {task}: all acknowledged are there",
                first_round + index
            );
        }
    }
}

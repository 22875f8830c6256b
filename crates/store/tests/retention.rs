//! Sweeps against a plain model: whatever is appended, trimmed, deleted, however time passes and limits change, after a sweep
//! exactly what the limits allow is left; and topics with nothing to trim are neither looked at nor kept for ever.

#![allow(clippy::disallowed_methods, clippy::expect_used, clippy::panic, clippy::unwrap_used, reason = "test code")]

use std::{
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering::SeqCst},
    },
    time::Duration,
};

use proptest::{prelude::*, test_runner::Config};
use trunkline_store::log::{Append, Class, Clock, Cursor, Item, Log, Offset, Options, Retention, Topic};

const TOPICS: usize = 8;

#[derive(Clone, Debug)]
enum Step {
    Append { topic: usize, records: usize, bytes: usize },
    Trim { topic: usize, share: u8 },
    Delete { topic: usize },
    Pass { ms: u64 },
    Sweep,
    Reopen { limits: Option<u8> },
}

fn step() -> impl Strategy<Value = Step> {
    let topic = 0..TOPICS;
    prop_oneof![
        8 => (topic.clone(), 1..30_usize, 0..40_usize)
            .prop_map(|(topic, records, bytes)| Step::Append { topic, records, bytes }),
        1 => (topic.clone(), any::<u8>()).prop_map(|(topic, share)| Step::Trim { topic, share }),
        1 => topic.prop_map(|topic| Step::Delete { topic }),
        6 => (0..800_u64).prop_map(|ms| Step::Pass { ms }),
        6 => Just(Step::Sweep),
        1 => prop::option::of(any::<u8>()).prop_map(|limits| Step::Reopen { limits }),
    ]
}

/// A record that the log holds.
struct Held {
    offset: u64,
    at_ms: u64,
    bytes: u64,
}

struct World {
    log: Log,
    now_ms: Arc<AtomicU64>,
    options: Options,
    topics: Vec<(Topic, Vec<Held>)>,
}

/// Limits that differ by what is varied.
fn classes(varied: u8) -> Vec<Retention> {
    let varied = u64::from(varied);
    vec![
        Retention { age: Some(Duration::from_millis(500 + 10 * varied)), ..Retention::default() },
        Retention { records: Some(10 + varied), ..Retention::default() },
        Retention { bytes: Some(200 + varied), age: Some(Duration::from_secs(1)), ..Retention::default() },
        Retention::default(),
    ]
}

fn class(name: &str) -> Class {
    Class(name.as_bytes().last().copied().unwrap_or_default() % 4)
}

impl World {
    fn new(dir: &Path) -> Self {
        let now_ms = Arc::new(AtomicU64::new(1_000_000));
        let clock = now_ms.clone();
        let options = Options {
            clock: Clock::new(move || clock.load(SeqCst)),
            classify: class,
            classes: classes(0),
            chunk_records: 20,
            topics_cached_max: 2,
            ..Options::default()
        };
        let log = Log::open(dir, options.clone()).unwrap();
        let topics = (0..TOPICS).map(|n| (Topic::new(&format!("t{n}")).unwrap(), Vec::new())).collect();
        Self { log, now_ms, options, topics }
    }

    async fn take(&mut self, dir: &Path, step: Step) {
        match step {
            Step::Append { topic, records, bytes } => {
                let at_ms = self.now_ms.load(SeqCst);
                let (name, held) = &mut self.topics[topic];
                for _ in 0..records {
                    let appended = self.log.append(Append::new(name, vec![b'x'; bytes])).await.unwrap();
                    held.push(Held { offset: appended.offset.0, at_ms, bytes: bytes as u64 });
                }
            }
            Step::Trim { topic, share } => {
                let (name, held) = &mut self.topics[topic];
                let count = held.len() * usize::from(share) / 255;
                if let Some(last) = held.drain(..count).next_back() {
                    self.log.trim(name, Offset(last.offset)).await.unwrap();
                }
            }
            Step::Delete { topic } => {
                let (name, held) = &mut self.topics[topic];
                held.clear();
                self.log.delete(name).await.unwrap();
            }
            Step::Pass { ms } => drop(self.now_ms.fetch_add(ms, SeqCst)),
            Step::Sweep => self.sweep().await,
            Step::Reopen { limits } => {
                self.log.stop().await;
                self.options.classes = limits.map_or_else(|| self.options.classes.clone(), classes);
                self.log = Log::open(dir, self.options.clone()).unwrap();
            }
        }
    }

    async fn sweep(&mut self) {
        self.log.sweep().await.unwrap();
        let now_ms = self.now_ms.load(SeqCst);
        for (topic, held) in &mut self.topics {
            let limits = self.options.classes[usize::from(class(topic.as_str()).0)];
            let oldest = limits.age.map_or(0, |age| now_ms - age.as_millis() as u64);
            let records = usize::try_from(limits.records.unwrap_or(u64::MAX)).unwrap();
            let mut left: Vec<Held> = Vec::new();
            let mut bytes = 0;
            for record in held.drain(..).rev() {
                bytes += record.bytes;
                if record.at_ms < oldest || left.len() >= records || bytes > limits.bytes.unwrap_or(u64::MAX) {
                    break;
                }
                left.push(record);
            }
            left.reverse();
            *held = left;
            let status = self.log.status(topic).await.unwrap();
            let wanted = (held.len() as u64, held.iter().map(|record| record.bytes).sum::<u64>());
            assert_eq!((status.records, status.bytes), wanted, "{topic} at {now_ms}");
        }
    }

    /// Once all has expired, topics that expire are forgotten, and those that do not are left alone.
    async fn rest(&mut self) {
        for _ in 0..3 {
            self.now_ms.fetch_add(10_000, SeqCst);
            self.sweep().await;
            // What was trimmed is noted until it is purged.
            while self.log.sweep().await.unwrap().topics > 0 {}
        }
        for (topic, _) in &self.topics {
            if self.options.classes[usize::from(class(topic.as_str()).0)].age.is_some() {
                let status = self.log.status(topic).await.unwrap();
                assert_eq!((status.tail, status.trimmed_to), (Offset::START, Offset::START), "{topic} is forgotten");
            }
        }
        // They begin anew.
        for topic in 0..TOPICS {
            self.take(Path::new(""), Step::Append { topic, records: 3, bytes: 1 }).await;
        }
        self.sweep().await;
        for (topic, held) in &self.topics {
            let mut reader = self.log.reader_at(Cursor { offset: Offset::START, ..self.log.tail() });
            let reader = reader.as_mut().unwrap();
            reader.follow(topic).unwrap();
            let mut seen = Vec::new();
            while seen.len() < held.len() {
                if let Item::Record(record) = reader.next().await.unwrap() {
                    seen.push(record.offset.0);
                }
            }
            assert_eq!(seen, held.iter().map(|record| record.offset).collect::<Vec<_>>(), "{topic}");
        }
    }
}

proptest! {
    #![proptest_config(Config { cases: 48, ..Config::default() })]

    #[test]
    fn what_the_limits_allow_is_left(steps in prop::collection::vec(step(), 1..60)) {
        let dir = tempfile::tempdir().unwrap();
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            let mut world = World::new(dir.path());
            for step in steps {
                world.take(dir.path(), step).await;
            }
            world.rest().await;
            world.log.stop().await;
        });
    }
}

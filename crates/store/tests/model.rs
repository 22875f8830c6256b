//! The log against a plain model in memory: random appends, trims, closings, deletions, reopenings, and readers that
//! join, follow, unfollow, resume and leave at random. No loss, no duplicate, no disorder, every gap reported.

#![allow(clippy::disallowed_methods, clippy::expect_used, clippy::panic, clippy::unwrap_used, reason = "test code")]

use std::{collections::BTreeMap, path::Path, time::Duration};

use proptest::prelude::{Just, Strategy, any, prop_oneof};
use trunkline_store::log::{Append, Cursor, Ending, Error, Item, Log, Offset, Options, Reader, Topic};

const TOPICS: usize = 4;

#[derive(Clone, Debug)]
enum Step {
    Append { topic: usize, records: usize, bytes: usize },
    Trim { topic: usize, share: u8 },
    Close { topic: usize },
    Delete { topic: usize },
    Reopen,
    Join { topics: [bool; TOPICS], share: u8 },
    Follow { reader: usize, topic: usize, from_start: bool },
    Unfollow { reader: usize, topic: usize },
    Resume { reader: usize },
    Leave { reader: usize },
    Read { reader: usize, items: usize },
}

fn step() -> impl Strategy<Value = Step> {
    let (topic, reader) = (0..TOPICS, 0..8_usize);
    prop_oneof![
        8 => (topic.clone(), 1..60_usize, 0..200_usize)
            .prop_map(|(topic, records, bytes)| Step::Append { topic, records, bytes }),
        2 => (topic.clone(), any::<u8>()).prop_map(|(topic, share)| Step::Trim { topic, share }),
        1 => topic.clone().prop_map(|topic| Step::Close { topic }),
        1 => topic.clone().prop_map(|topic| Step::Delete { topic }),
        1 => Just(Step::Reopen),
        3 => (any::<[bool; TOPICS]>(), any::<u8>()).prop_map(|(topics, share)| Step::Join { topics, share }),
        2 => (reader.clone(), topic.clone(), any::<bool>())
            .prop_map(|(reader, topic, from_start)| Step::Follow { reader, topic, from_start }),
        1 => (reader.clone(), topic).prop_map(|(reader, topic)| Step::Unfollow { reader, topic }),
        1 => reader.clone().prop_map(|reader| Step::Resume { reader }),
        1 => reader.clone().prop_map(|reader| Step::Leave { reader }),
        8 => (reader, 1..80_usize).prop_map(|(reader, items)| Step::Read { reader, items }),
    ]
}

/// What a topic went through, all of it, in order.
#[derive(Clone, Debug, PartialEq)]
enum Event {
    Record(Vec<u8>),
    Closed,
    Deleted,
}

#[derive(Default)]
struct ModelTopic {
    events: BTreeMap<u64, Event>,
    trimmed_to: u64,
    closed: bool,
}

/// A reader, and how far it is in each topic that it follows.
struct ModelReader {
    reader: Reader,
    positions: BTreeMap<usize, u64>,
}

struct World {
    log: Log,
    options: Options,
    topics: Vec<(Topic, ModelTopic)>,
    readers: Vec<ModelReader>,
    written: u64,
}

impl World {
    fn new(dir: &Path, window_bytes_max: usize) -> Self {
        let options = Options { window_bytes_max, chunk_records: 20, ..Options::default() };
        let topics = (0..TOPICS).map(|n| (Topic::new(&format!("t{n}")).unwrap(), ModelTopic::default())).collect();
        Self { log: Log::open(dir, options.clone()).unwrap(), options, topics, readers: Vec::new(), written: 0 }
    }

    async fn take(&mut self, dir: &Path, step: Step) {
        match step {
            Step::Append { topic, records, bytes } => self.append(topic, records, bytes).await,
            Step::Trim { topic, share } => self.trim(topic, share).await,
            Step::Close { topic } => {
                let (name, model) = &mut self.topics[topic];
                let offset = self.log.close(name).await.unwrap().0;
                if !std::mem::replace(&mut model.closed, true) {
                    model.events.insert(offset, Event::Closed);
                }
            }
            Step::Delete { topic } => self.delete(topic).await,
            Step::Reopen => {
                let cursors: Vec<Cursor> = self.readers.iter().map(|r| r.reader.cursor()).collect();
                for reader in &mut self.readers {
                    reader.reader = self.log.reader();
                }
                self.log.stop().await;
                self.log = Log::open(dir, self.options.clone()).unwrap();
                assert_eq!(self.log.repair(), None);
                for (index, cursor) in cursors.into_iter().enumerate() {
                    self.resume(index, cursor);
                }
            }
            Step::Join { topics, share } => self.join(topics, share),
            Step::Follow { reader, topic, from_start } => self.follow(reader, topic, from_start),
            Step::Unfollow { reader, topic } => {
                if let Some(reader) = pick(&mut self.readers, reader) {
                    reader.reader.unfollow(&self.topics[topic].0);
                    reader.positions.remove(&topic);
                }
            }
            Step::Resume { reader } => {
                if !self.readers.is_empty() {
                    let index = reader % self.readers.len();
                    self.resume(index, self.readers[index].reader.cursor());
                }
            }
            Step::Leave { reader } => {
                if !self.readers.is_empty() {
                    self.readers.swap_remove(reader % self.readers.len());
                }
            }
            Step::Read { reader, items } => self.read(reader, items).await,
        }
    }

    async fn append(&mut self, topic: usize, records: usize, bytes: usize) {
        let (name, model) = &mut self.topics[topic];
        let payloads: Vec<Vec<u8>> = (0..records)
            .map(|_| {
                self.written += 1;
                [&self.written.to_be_bytes()[..], &vec![7; bytes]].concat()
            })
            .collect();
        let appends = payloads.iter().map(|payload| Append::new(name, payload.clone())).collect();
        match self.log.append_batch(appends).await {
            Ok(appended) => {
                assert!(!model.closed);
                model.events.extend(appended.iter().map(|a| a.offset.0).zip(payloads.into_iter().map(Event::Record)));
            }
            Err(Error::Closed { .. }) => assert!(model.closed),
            Err(other) => panic!("{other}"),
        }
    }

    async fn trim(&mut self, topic: usize, share: u8) {
        let tail = self.log.tail().offset.0;
        let (name, model) = &mut self.topics[topic];
        let through = tail * u64::from(share) / 255;
        let trimmed_to = self.log.trim(name, Offset(through)).await.unwrap().0;
        let last = model.events.range(..=through).rfind(|(_, event)| **event != Event::Closed).map(|(o, _)| *o);
        model.trimmed_to = model.trimmed_to.max(last.unwrap_or(0));
        assert_eq!(trimmed_to, model.trimmed_to, "a trim ends at the last record that it covers");
    }

    async fn delete(&mut self, topic: usize) {
        let (name, model) = &mut self.topics[topic];
        let there = model.events.last_key_value().is_some_and(|(_, event)| *event != Event::Deleted);
        assert_eq!(self.log.delete(name).await.unwrap(), there);
        if there {
            let offset = self.log.tail().offset.0;
            model.events.insert(offset, Event::Deleted);
            model.trimmed_to = offset;
            model.closed = false;
        }
    }

    fn join(&mut self, topics: [bool; TOPICS], share: u8) {
        if self.readers.len() >= 8 {
            return;
        }
        let tail = self.log.tail();
        let at = tail.offset.0 * u64::from(share) / 255;
        let mut reader = self.log.reader_at(Cursor { offset: Offset(at), ..tail }).unwrap();
        let mut positions = BTreeMap::new();
        for topic in (0..TOPICS).filter(|topic| topics[*topic]) {
            reader.follow(&self.topics[topic].0).unwrap();
            positions.insert(topic, at);
        }
        self.readers.push(ModelReader { reader, positions });
    }

    fn follow(&mut self, reader: usize, topic: usize, from_start: bool) {
        let tail = self.log.tail().offset.0;
        let Some(reader) = pick(&mut self.readers, reader) else { return };
        let name = &self.topics[topic].0;
        if from_start {
            reader.reader.follow_from_start(name).unwrap();
        } else {
            reader.reader.follow_from_tail(name).unwrap();
        }
        reader.positions.entry(topic).or_insert(if from_start { 0 } else { tail });
    }

    /// As a client does: a new reader from the cursor. What it had of topics that were added behind the cursor is
    /// skipped, as promised; what it had read beyond comes again, so positions go back at most to the cursor.
    fn resume(&mut self, index: usize, cursor: Cursor) {
        let old = &mut self.readers[index];
        let mut reader = self.log.reader_at(cursor).unwrap();
        for (topic, position) in &mut old.positions {
            reader.follow(&self.topics[*topic].0).unwrap();
            *position = cursor.offset.0;
        }
        old.reader = reader;
    }

    async fn read(&mut self, reader: usize, items: usize) {
        let mut read = Vec::new();
        let Some(reader) = pick(&mut self.readers, reader) else { return };
        reader.reader.available_batch(items, &mut read).await.unwrap();
        assert!(read.len() <= items + 2 * TOPICS, "asked for {items}, got {}", read.len());
        for item in read {
            check(&self.topics, &mut reader.positions, item);
        }
    }

    /// In the end everybody reads to the tail, and then nothing retained is missing.
    async fn finish(mut self) {
        for mut reader in std::mem::take(&mut self.readers) {
            loop {
                let mut read = Vec::new();
                reader.reader.available_batch(500, &mut read).await.unwrap();
                if read.is_empty() {
                    break;
                }
                for item in read {
                    check(&self.topics, &mut reader.positions, item);
                }
            }
            for (topic, position) in reader.positions {
                let missing = self.topics[topic].1.events.range(position + 1..).next();
                assert_eq!(missing, None, "topic {topic} was read to {position}");
            }
        }
        self.log.stop().await;
    }
}

fn pick(readers: &mut [ModelReader], index: usize) -> Option<&mut ModelReader> {
    let count = readers.len();
    (count > 0).then(|| &mut readers[index % count])
}

/// An item must be the very next thing that happened to its topic, or a gap over things that were trimmed.
fn check(topics: &[(Topic, ModelTopic)], positions: &mut BTreeMap<usize, u64>, item: Item) {
    let find = |topic: &Topic| topics.iter().position(|(name, _)| name == topic).unwrap();
    let (index, through, event) = match item {
        Item::Record(r) => (find(&r.topic), r.offset.0, Some(Event::Record(r.payload.to_vec()))),
        Item::End { topic, offset, why: Ending::Closed } => (find(&topic), offset.0, Some(Event::Closed)),
        Item::End { topic, offset, why: Ending::Deleted } => (find(&topic), offset.0, Some(Event::Deleted)),
        Item::Gap(gap) => (find(&gap.topic), gap.through.0, None),
        Item::Transient(_) => panic!("nothing was published"),
    };
    let model = &topics[index].1;
    let position = positions.get_mut(&index).expect("an item of a followed topic");
    match event {
        // Behind a gap that ended at the deletion, the deletion itself is told.
        Some(Event::Deleted) if through == *position => {
            assert_eq!(model.events.get(&through), Some(&Event::Deleted));
        }
        Some(event) => {
            let next = model.events.range(*position + 1..).next();
            assert_eq!(next, Some((&through, &event)), "topic {index} behind {position}");
        }
        None => {
            assert!(
                through <= model.trimmed_to,
                "a gap of topic {index} to {through}, trimmed to {}",
                model.trimmed_to
            );
            assert!(model.events.range(*position + 1..=through).next().is_some(), "an empty gap behind {position}");
        }
    }
    *position = through;
}

proptest::proptest! {
    #![proptest_config(proptest::test_runner::Config { cases: 96, ..Default::default() })]

    #[test]
    fn the_log_is_its_model(
        steps in proptest::collection::vec(step(), 1..60),
        window_bytes_max in prop_oneof![Just(0_usize), Just(3_000), Just(1_000_000)],
    ) {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
        runtime.block_on(async {
            let dir = tempfile::tempdir().unwrap();
            let all = async {
                let mut world = World::new(dir.path(), window_bytes_max);
                for step in steps {
                    world.take(dir.path(), step).await;
                }
                world.finish().await;
            };
            tokio::time::timeout(Duration::from_secs(60), all).await.expect("nothing hangs");
        });
    }
}

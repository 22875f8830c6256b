//! The lists on disk: a fjall database of their own, so that writing them never makes an append wait for its journal.
//!
//! | keyspace | key | value |
//! | --- | --- | --- |
//! | `lists` | topic key (16), first offset of a chunk (8) | the topic's offsets in that chunk |
//! | `meta` | a word | how far the lists go (8), the epoch of the log that they belong to (16), and a [`Stamp`] |
//!
//! A chunk's lists are ingested as one sorted table, past journal and memtable. The mark follows; if a crash comes before
//! it, a chunk that begins at the same offset is written again. It need not end at the same one.

use std::{
    fs, io,
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering::Relaxed},
    },
};

use fjall::{
    Database, Keyspace, KeyspaceCreateOptions, PersistMode,
    compaction::Leveled,
    config::{CompressionPolicy, FilterPolicy},
};

use super::{
    super::{
        Epoch, Error, TopicKey,
        engine::{JOURNAL_BYTES_MAX, WORKERS, corrupt, engine_error, io_error, wait_for_flush},
        journal::{Check, Seal, Stamp},
    },
    Chunk, merge, stand_back,
};
use crate::durable;

const META_WRITTEN_TO: &str = "indexed";

pub(in crate::log) struct Lists {
    database: Database,
    lists: Keyspace,
    meta: Keyspace,
    owner: Epoch,
    seal: Seal,
    /// Of the latest mark.
    marks: AtomicU64,
    /// A chunk was not written, or the database failed: the mark must not pass what is missing.
    has_failed: AtomicBool,
}

impl Lists {
    pub(in crate::log) fn buffered_bytes(&self) -> u64 {
        self.database.write_buffer_size() + self.database.cache_size()
    }

    /// Opens the lists of the log `owner`, which ends at `tail`. Makes them anew if they cannot be read or are not this
    /// log's: nothing is lost with them but the time to make them.
    pub(in crate::log) fn open(
        dir: &Path,
        cache_bytes: u64,
        owner: Epoch,
        seal: Seal,
        tail: u64,
    ) -> Result<Self, Error> {
        let open = || {
            fs::create_dir_all(dir).map_err(|e| Refused::Now(io_error(dir, &e)))?;
            let check = Check { seal: &seal, acknowledged: None, settle: false, has_tables: false };
            check.run(dir).map_err(Refused::of)?;
            let opened = Self::open_database(dir, cache_bytes, owner, seal).map_err(|e| Refused::by_engine(&e));
            opened.and_then(|lists| lists.check(tail))
        };
        let damage = match open() {
            Ok(lists) => return Ok(lists),
            Err(Refused::Now(error)) => return Err(error),
            Err(Refused::Damaged(damage)) => damage,
        };
        tracing::warn!(error = %damage, "the index is made anew");
        // Not `Keyspace::clear`: fjall 3.1 repeats that at the next opening, on what was ingested after it too.
        let renew = || {
            durable::remove_tree(dir)?;
            fs::create_dir_all(dir)
        };
        renew().map_err(|e| io_error(dir, &e))?;
        let lists = Self::open_database(dir, cache_bytes, owner, seal).map_err(|e| engine_error(&e))?;
        durable::sync_tree(dir).map_err(|e| io_error(dir, &e))?;
        Ok(lists)
    }

    fn open_database(dir: &Path, cache_bytes: u64, owner: Epoch, seal: Seal) -> Result<Self, fjall::Error> {
        let open = || {
            // The database's threads start from this one.
            stand_back();
            Database::builder(dir)
                .cache_size(cache_bytes)
                .worker_threads(WORKERS)
                .manual_journal_persist(true)
                .journal_compression(fjall::CompressionType::None)
                .max_journaling_size(JOURNAL_BYTES_MAX)
                .open()
        };
        let opened = std::thread::scope(|scope| scope.spawn(open).join());
        let database = opened.unwrap_or_else(|panic| std::panic::resume_unwind(panic))?;
        // Chunks come as tables of a few megabytes. Merging sixteen with as much again costs each list two rewrites, where
        // the defaults would rewrite 256 MB for every four.
        let compaction = Leveled::default().with_l0_threshold(16).with_table_target_size(8 * 1024 * 1024);
        let lists = database.keyspace("lists", || {
            KeyspaceCreateOptions::default()
                // Keys are digests, values a few bytes: nothing to compress. Lists are sought, never asked for by key.
                .data_block_compression_policy(CompressionPolicy::disabled())
                .filter_policy(FilterPolicy::disabled())
                .compaction_strategy(Arc::new(compaction))
        })?;
        let meta = database.keyspace("meta", KeyspaceCreateOptions::default)?;
        let (marks, has_failed) = (AtomicU64::new(0), AtomicBool::new(false));
        Ok(Self { lists, meta, database, owner, seal, marks, has_failed })
    }

    /// Whether these are the lists of the log that ends at `tail`; goes on with the marks.
    fn check(self, tail: u64) -> Result<Self, Refused> {
        let Some(mark) = self.mark().map_err(Refused::of)? else { return Ok(self) };
        if mark.owner != *self.owner.0.as_bytes() || mark.written_to > tail {
            return Err(Refused::Damaged(corrupt("the index belongs to another log".into())));
        }
        self.marks.store(mark.stamp.number, Relaxed);
        Ok(self)
    }

    /// The lists know all records up to here.
    pub(in crate::log) fn written_to(&self) -> Result<u64, Error> {
        Ok(self.mark()?.map_or(0, |mark| mark.written_to))
    }

    fn mark(&self) -> Result<Option<Mark>, Error> {
        let value = self.meta.get(META_WRITTEN_TO).map_err(|e| engine_error(&e))?;
        Ok(value.as_deref().and_then(Mark::decode))
    }

    /// Whether lists are missing that only opening the engine again makes.
    pub(in crate::log) fn has_failed(&self) -> bool {
        self.has_failed.load(Relaxed)
    }

    /// Writes the lists of the chunk behind the last one that was written. After an error nothing is written any more.
    pub(in crate::log) fn write(&self, chunk: &Chunk) -> Result<(), fjall::Error> {
        if self.has_failed() {
            return Err(fjall::Error::Poisoned);
        }
        self.try_to_write(chunk).inspect_err(|_| self.has_failed.store(true, Relaxed))
    }

    fn try_to_write(&self, chunk: &Chunk) -> Result<(), fjall::Error> {
        let entries = merge(chunk.runs.iter().chain([&chunk.unsorted]).cloned());
        let mut lists = self.lists.start_ingestion()?;
        let mut encoded = Vec::new();
        for list in entries.chunk_by(|(key, _), (next, _)| key == next) {
            encoded.clear();
            encode(list.iter().map(|(_, offset)| *offset), &mut encoded);
            lists.write(key(list[0].0, chunk.first), &encoded[..])?;
        }
        lists.finish()?;
        // Written last: what it covers is there. Synced, so that a crash leaves the lists of one chunk at most without it.
        let number = self.marks.load(Relaxed);
        let stamp = Stamp { number, synced: number }.next(true);
        let mut mark = chunk.last.to_be_bytes().to_vec();
        mark.extend(self.owner.0.as_bytes());
        mark.extend(self.seal.stamp(stamp));
        let mut batch = self.database.batch().durability(Some(PersistMode::SyncData));
        batch.insert(&self.meta, META_WRITTEN_TO, mark);
        wait_for_flush(&self.database, &[&self.meta])?;
        batch.commit()?;
        self.marks.store(stamp.number, Relaxed);
        Ok(())
    }

    /// The lists that can hold the topic's offsets with `after < offset <= through`, in order.
    pub(in crate::log) fn find(
        &self,
        topic: TopicKey,
        after: u64,
        through: u64,
    ) -> impl DoubleEndedIterator<Item = Result<Vec<u64>, Error>> + use<> {
        // The list that `after` itself falls into starts at or before it.
        let first = (after > 0).then(|| self.lists.range(key(topic, 0)..=key(topic, after)).next_back()).flatten();
        let later = (through > after).then(|| self.lists.range(key(topic, after + 1)..=key(topic, through)));
        first.into_iter().chain(later.into_iter().flatten()).map(|guard| {
            let value = guard.value().map_err(|e| engine_error(&e))?;
            decode(&value).ok_or_else(|| corrupt("topic list cannot be read".into()))
        })
    }

    /// Removes the topic's lists. Only for the writer, and for a topic that has no records: a list with newer ones is then
    /// written later than this.
    pub(in crate::log) fn forget_all(&self, topic: TopicKey) -> Result<(), Error> {
        self.remove(self.lists.range(key(topic, 0)..=key(topic, u64::MAX)))
    }

    /// Removes the topic's lists of what lies at or below `through`.
    pub(in crate::log) fn forget(&self, topic: TopicKey, through: u64) -> Result<(), Error> {
        let mut lists = self.lists.range(key(topic, 0)..=key(topic, through)).rev();
        // The newest list may go on behind the mark, so it stays until a later one is below the mark too.
        lists.next();
        self.remove(lists)
    }

    fn remove(&self, mut lists: impl Iterator<Item = fjall::Guard>) -> Result<(), Error> {
        let remove = |list: fjall::Guard| {
            wait_for_flush(&self.database, &[&self.lists])?;
            self.lists.remove(list.key()?)
        };
        lists.try_for_each(remove).map_err(|e| {
            self.has_failed.store(true, Relaxed);
            engine_error(&e)
        })
    }
}

/// How far the lists go.
struct Mark {
    written_to: u64,
    owner: [u8; 16],
    stamp: Stamp,
}

impl Mark {
    fn decode(value: &[u8]) -> Option<Self> {
        let (written_to, rest) = value.split_first_chunk()?;
        let (owner, rest) = rest.split_first_chunk()?;
        let stamp = Stamp::decode(rest).unwrap_or_default();
        Some(Self { written_to: u64::from_be_bytes(*written_to), owner: *owner, stamp })
    }
}

/// Why lists were not opened.
enum Refused {
    /// The disk refuses; the lists may be whole.
    Now(Error),
    /// They have to be made anew.
    Damaged(Error),
}

impl Refused {
    fn of(error: Error) -> Self {
        if matches!(error, Error::Unavailable { .. }) { Self::Now(error) } else { Self::Damaged(error) }
    }

    fn by_engine(error: &fjall::Error) -> Self {
        use io::ErrorKind::{AlreadyExists, InvalidData, NotFound, UnexpectedEof};
        match error {
            // Files that are missing, cut, or there although they should not be: a creation that did not end.
            fjall::Error::Io(e) | fjall::Error::Storage(fjall::LsmError::Io(e))
                if matches!(e.kind(), AlreadyExists | InvalidData | NotFound | UnexpectedEof) =>
            {
                Self::Damaged(engine_error(error))
            }
            other => Self::of(engine_error(other)),
        }
    }
}

fn key(topic: TopicKey, first: u64) -> [u8; 24] {
    let mut key = [0; 24];
    key[..16].copy_from_slice(&topic.0);
    key[16..].copy_from_slice(&first.to_be_bytes());
    key
}

/// Differences as LEB128: one byte an offset in a busy topic.
fn encode(offsets: impl Iterator<Item = u64>, bytes: &mut Vec<u8>) {
    let mut previous = 0;
    for offset in offsets {
        let mut rest = offset - previous;
        previous = offset;
        while rest >= 0x80 {
            bytes.push(rest as u8 | 0x80);
            rest >>= 7;
        }
        bytes.push(rest as u8);
    }
}

/// The offsets of an encoded list; `None` if it is no such list.
fn decode(bytes: &[u8]) -> Option<Vec<u64>> {
    let mut offsets = Vec::with_capacity(bytes.len());
    let (mut offset, mut difference, mut shift) = (0_u64, 0_u64, 0);
    for byte in bytes {
        difference |= u64::from(byte & 0x7f).checked_shl(shift)?;
        shift += 7;
        if byte & 0x80 == 0 {
            offset = offset.checked_add(difference)?;
            offsets.push(offset);
            (difference, shift) = (0, 0);
        }
    }
    (shift == 0).then_some(offsets)
}

#[cfg(test)]
mod tests {
    use super::{decode, encode};

    proptest::proptest! {
        #[test]
        fn lists_are_decoded_as_encoded(mut offsets: std::collections::BTreeSet<u64>) {
            offsets.remove(&0);
            let offsets: Vec<_> = offsets.into_iter().collect();
            let mut bytes = Vec::new();
            encode(offsets.iter().copied(), &mut bytes);
            proptest::prop_assert_eq!(decode(&bytes), Some(offsets));
        }

        #[test]
        fn any_bytes_are_decoded_or_refused(bytes: Vec<u8>) {
            let _ = decode(&bytes);
        }
    }
}

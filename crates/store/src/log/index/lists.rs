//! The lists on disk: a fjall database of their own, so that writing them never makes an append wait for its journal.
//!
//! | keyspace | key | value |
//! | --- | --- | --- |
//! | `lists` | topic key (16), first offset of a chunk (8) | the topic's offsets in that chunk |
//! | `meta` | a word | how far the lists go (8), and the epoch of the log that they belong to (16) |
//!
//! A chunk's lists are ingested as one sorted table, past journal and memtable. The mark follows; if a crash takes it
//! back, the same chunk is written again, under the same keys.

use std::{fs, io, path::Path, sync::Arc};

use fjall::{
    Database, Keyspace, KeyspaceCreateOptions, PersistMode,
    compaction::Leveled,
    config::{CompressionPolicy, FilterPolicy},
};

use super::{
    super::{
        Epoch, Error, TopicKey,
        engine::{JOURNAL_BYTES_MAX, WORKERS, corrupt, engine_error, io_error},
        journal,
    },
    Chunk, merge, stand_back,
};

const META_WRITTEN_TO: &str = "indexed";

pub(in crate::log) struct Lists {
    database: Database,
    lists: Keyspace,
    meta: Keyspace,
    owner: Epoch,
}

impl Lists {
    pub(in crate::log) fn buffered_bytes(&self) -> u64 {
        self.database.write_buffer_size() + self.database.cache_size()
    }

    /// Opens the lists of the log `owner`, which ends at `tail`. Makes them anew if they cannot be read or are not this
    /// log's: nothing is lost with them but the time to make them.
    pub(in crate::log) fn open(dir: &Path, cache_bytes: u64, owner: Epoch, tail: u64) -> Result<Self, Error> {
        fs::create_dir_all(dir).map_err(|e| io_error(dir, &e))?;
        if let Err(error) = journal::check(dir) {
            tracing::warn!(%error, "the index is made anew");
            remove(dir)?;
        }
        let lists = Self::open_database(dir, cache_bytes, owner).map_err(|e| engine_error(&e))?;
        match lists.mark()? {
            Some((written_to, epoch)) if epoch != owner.0.as_bytes() || written_to > tail => {
                tracing::warn!("the index belongs to another log and is made anew");
                // Not `Keyspace::clear`: fjall 3.1 repeats that at the next opening, on what was ingested after it too.
                drop(lists);
                remove(dir)?;
                Self::open_database(dir, cache_bytes, owner).map_err(|e| engine_error(&e))
            }
            _ => Ok(lists),
        }
    }

    fn open_database(dir: &Path, cache_bytes: u64, owner: Epoch) -> Result<Self, fjall::Error> {
        fs::create_dir_all(dir)?;
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
        Ok(Self { lists, meta: database.keyspace("meta", KeyspaceCreateOptions::default)?, database, owner })
    }

    /// The lists know all records up to here.
    pub(in crate::log) fn written_to(&self) -> Result<u64, Error> {
        Ok(self.mark()?.map_or(0, |(written_to, _)| written_to))
    }

    fn mark(&self) -> Result<Option<(u64, Vec<u8>)>, Error> {
        let value = self.meta.get(META_WRITTEN_TO).map_err(|e| engine_error(&e))?;
        Ok(value.as_ref().and_then(|value| {
            let (written_to, owner) = value.split_first_chunk()?;
            Some((u64::from_be_bytes(*written_to), owner.to_vec()))
        }))
    }

    pub(in crate::log) fn write(&self, chunk: &Chunk) -> Result<(), fjall::Error> {
        let entries = merge(chunk.runs.iter().chain([&chunk.unsorted]).cloned());
        let mut lists = self.lists.start_ingestion()?;
        let mut encoded = Vec::new();
        for list in entries.chunk_by(|(key, _), (next, _)| key == next) {
            encoded.clear();
            encode(list.iter().map(|(_, offset)| *offset), &mut encoded);
            lists.write(key(list[0].0, chunk.first), &encoded[..])?;
        }
        lists.finish()?;
        // Written last: what it covers is there. Killing the process does not take back what the operating system has.
        let mut mark = chunk.last.to_be_bytes().to_vec();
        mark.extend(self.owner.0.as_bytes());
        let mut batch = self.database.batch().durability(Some(PersistMode::Buffer));
        batch.insert(&self.meta, META_WRITTEN_TO, mark);
        batch.commit()
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
        for list in self.lists.range(key(topic, 0)..=key(topic, u64::MAX)) {
            let key = list.key().map_err(|e| engine_error(&e))?;
            self.lists.remove(key).map_err(|e| engine_error(&e))?;
        }
        Ok(())
    }

    /// Removes the topic's lists of what lies at or below `through`.
    pub(in crate::log) fn forget(&self, topic: TopicKey, through: u64) -> Result<(), Error> {
        let mut lists = self.lists.range(key(topic, 0)..=key(topic, through)).rev();
        // The newest list may go on behind the mark, so it stays until a later one is below the mark too.
        lists.next();
        for list in lists {
            let key = list.key().map_err(|e| engine_error(&e))?;
            self.lists.remove(key).map_err(|e| engine_error(&e))?;
        }
        Ok(())
    }
}

fn remove(dir: &Path) -> Result<(), Error> {
    match fs::remove_dir_all(dir) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(io_error(dir, &error)),
        _ => Ok(()),
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

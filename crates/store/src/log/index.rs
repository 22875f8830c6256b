//! Which offsets belong to a topic.
//!
//! Records are stored under their offset alone, so that every append, whatever its topic, goes to the end of one
//! sorted run: the cost of an append does not depend on the number of topics. What belongs to a topic is told by
//! lists of offsets. The writer keeps the lists of the latest records in memory, a *chunk* at a time; a full chunk is
//! written, sorted by topic, by the index thread, and then forgotten. After a crash, the lists that were only in memory
//! are made again from the records behind the last chunk that was written.

use std::{
    collections::{HashMap, VecDeque},
    sync::{Arc, Mutex, mpsc},
};

use super::{
    Epoch, TopicKey,
    engine::Engine,
    window::{KeyHasher, lock},
};

/// A chunk is full with so many records or payload bytes, whichever comes first. Reopening reads at most what is not
/// indexed yet: [`CHUNKS_WAITING_MAX`] + 2 chunks.
const CHUNK_RECORDS: usize = 32 * 1024;
const CHUNK_BYTES: usize = 16 * 1024 * 1024;

/// Full chunks that may wait for the index thread; then the writer waits for it.
const CHUNKS_WAITING_MAX: usize = 2;

/// Lists written in one batch.
const LISTS_PER_BATCH: usize = 4096;

/// The lists of a stretch of the log. They are chained through one vector, so that a topic with one record costs a
/// slot of a table and no allocation.
#[derive(Default)]
pub(super) struct Chunk {
    entries: Vec<Entry>,
    /// Each topic's last entry.
    topics: HashMap<TopicKey, u32, KeyHasher>,
    bytes: usize,
}

struct Entry {
    offset: u64,
    /// The entry before it of the same topic; [`NONE`] for the first.
    previous: u32,
}

const NONE: u32 = u32::MAX;

/// The chunks that are not on disk.
#[derive(Default)]
pub(super) struct Recent(Mutex<Chunks>);

#[derive(Default)]
struct Chunks {
    /// Waiting for the index thread, oldest first.
    full: VecDeque<Arc<Chunk>>,
    open: Chunk,
}

/// Offsets of a topic found in memory, and where memory begins: below it, the disk knows.
pub(super) struct InMemory {
    pub(super) offsets: Vec<u64>,
    pub(super) begins_at: u64,
}

impl Recent {
    /// Notes committed records; answers the chunk that this filled.
    pub(super) fn note(&self, records: impl Iterator<Item = (TopicKey, u64, usize)>) -> Option<Arc<Chunk>> {
        let mut chunks = lock(&self.0);
        records.for_each(|(key, offset, bytes)| chunks.open.note(key, offset, bytes));
        if chunks.open.is_full() { chunks.seal() } else { None }
    }

    /// The chunk that is being filled, to be written before its time.
    pub(super) fn seal(&self) -> Option<Arc<Chunk>> {
        lock(&self.0).seal()
    }

    fn forget(&self, chunk: &Arc<Chunk>) {
        lock(&self.0).full.retain(|kept| !Arc::ptr_eq(kept, chunk));
    }

    /// The topic's offsets with `after < offset <= through` that are in memory.
    pub(super) fn offsets(&self, key: TopicKey, after: u64, through: u64) -> InMemory {
        let chunks = lock(&self.0);
        let all = chunks.full.iter().map(|chunk| &**chunk).chain(std::iter::once(&chunks.open));
        let mut found = InMemory { offsets: Vec::new(), begins_at: u64::MAX };
        for chunk in all {
            found.begins_at = found.begins_at.min(chunk.first().unwrap_or(u64::MAX));
            let start = found.offsets.len();
            let backwards = chunk.backwards(key).skip_while(|offset| *offset > through);
            found.offsets.extend(backwards.take_while(|offset| *offset > after));
            found.offsets[start..].reverse();
        }
        found
    }
}

impl Chunks {
    fn seal(&mut self) -> Option<Arc<Chunk>> {
        self.open.first()?;
        // The next chunk is likely to be like this one.
        let next = Chunk {
            entries: Vec::with_capacity(self.open.entries.len()),
            topics: HashMap::with_capacity_and_hasher(self.open.topics.len(), KeyHasher),
            bytes: 0,
        };
        let full = Arc::new(std::mem::replace(&mut self.open, next));
        self.full.push_back(full.clone());
        Some(full)
    }
}

impl Chunk {
    fn note(&mut self, key: TopicKey, offset: u64, bytes: usize) {
        let at = self.entries.len() as u32;
        let previous = self.topics.insert(key, at).unwrap_or(NONE);
        self.entries.push(Entry { offset, previous });
        self.bytes += bytes;
    }

    fn is_full(&self) -> bool {
        self.entries.len() >= CHUNK_RECORDS || self.bytes >= CHUNK_BYTES
    }

    fn first(&self) -> Option<u64> {
        self.entries.first().map(|entry| entry.offset)
    }

    /// The topic's offsets, newest first.
    fn backwards(&self, key: TopicKey) -> impl Iterator<Item = u64> {
        let mut at = self.topics.get(&key).copied().unwrap_or(NONE);
        std::iter::from_fn(move || {
            let entry = self.entries.get(at as usize)?;
            at = entry.previous;
            Some(entry.offset)
        })
    }
}

/// The index thread's inbox.
pub(super) struct Indexer {
    chunks: mpsc::SyncSender<(Arc<Engine>, Arc<Chunk>)>,
    thread: std::thread::JoinHandle<()>,
}

impl Indexer {
    pub(super) fn start(epoch: Epoch) -> std::io::Result<Self> {
        let (chunks, inbox) = mpsc::sync_channel::<(Arc<Engine>, Arc<Chunk>)>(CHUNKS_WAITING_MAX);
        let thread = std::thread::Builder::new().name("trunkline-index".into()).spawn(move || {
            for (engine, chunk) in inbox {
                // When the disk refuses, the writer finds out with its next batch and opens the engine again, which
                // makes these lists anew.
                if let Err(error) = write(&engine, epoch, &chunk) {
                    tracing::warn!(%error, "topic lists were not written; they will be made again");
                }
            }
        })?;
        Ok(Self { chunks, thread })
    }

    /// Waits while [`CHUNKS_WAITING_MAX`] chunks wait already.
    pub(super) fn write(&self, engine: &Arc<Engine>, chunk: Arc<Chunk>) {
        // The thread ends only after this handle is gone; were it gone all the same, reopening makes the lists anew.
        let _ = self.chunks.send((engine.clone(), chunk));
    }

    /// Returns when all that was handed over is written.
    pub(super) fn finish(self) {
        drop(self.chunks);
        if self.thread.join().is_err() {
            tracing::error!("the index thread panicked; its lists are made again at the next start");
        }
    }
}

pub(super) fn write(engine: &Engine, epoch: Epoch, chunk: &Arc<Chunk>) -> Result<(), fjall::Error> {
    let (Some(first), Some(last)) = (chunk.first(), chunk.entries.last()) else { return Ok(()) };
    let mut topics: Vec<TopicKey> = chunk.topics.keys().copied().collect();
    topics.sort_unstable();
    let mut offsets = Vec::new();
    for part in topics.chunks(LISTS_PER_BATCH) {
        let mut batch = engine.index.database.batch();
        for key in part {
            offsets.clear();
            offsets.extend(chunk.backwards(*key));
            offsets.reverse();
            batch.insert(&engine.index.lists, index_key(*key, first), encode(&offsets));
        }
        batch.commit()?;
    }
    // Written last: what it covers is there.
    engine.index.put_indexed_to(epoch, last.offset)?;
    engine.recent.forget(chunk);
    Ok(())
}

pub(super) fn index_key(topic: TopicKey, first: u64) -> [u8; 24] {
    let mut key = [0; 24];
    key[..16].copy_from_slice(&topic.0);
    key[16..].copy_from_slice(&first.to_be_bytes());
    key
}

/// Differences as LEB128: one byte an offset in a busy topic.
fn encode(offsets: &[u64]) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(offsets.len() + 8);
    let mut previous = 0;
    for offset in offsets {
        let mut rest = offset - previous;
        previous = *offset;
        while rest >= 0x80 {
            bytes.push(rest as u8 | 0x80);
            rest >>= 7;
        }
        bytes.push(rest as u8);
    }
    bytes
}

/// The offsets of an encoded list; `None` if it is no such list.
pub(super) fn decode(bytes: &[u8]) -> Option<Vec<u64>> {
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
            proptest::prop_assert_eq!(decode(&encode(&offsets)), Some(offsets));
        }

        #[test]
        fn any_bytes_are_decoded_or_refused(bytes: Vec<u8>) {
            let _ = decode(&bytes);
        }
    }
}

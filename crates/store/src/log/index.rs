//! Which offsets belong to a topic.
//!
//! Records are stored under their offset alone, so that every append, whatever its topic, goes to the end of one
//! sorted run: the cost of an append does not depend on the number of topics. What belongs to a topic is told by
//! lists of offsets. The writer keeps the lists of the latest records in memory, a *chunk* at a time; a full chunk is
//! written, sorted by topic, by the index thread, and then forgotten. After a crash, the lists that were only in memory
//! are made again from the records behind the last chunk that was written.

mod lists;

use std::{
    collections::VecDeque,
    sync::{Arc, Mutex, mpsc},
};

use super::{TopicKey, engine::Engine, window::lock};
use crate::fault::Faults;

pub(super) use lists::Lists;

/// A chunk is full with [`super::Options::chunk_records`] or so many payload bytes, whichever comes first. Reopening reads
/// at most what is not indexed yet: [`CHUNKS_WAITING_MAX`] + 2 chunks, about 200 MB.
const CHUNK_BYTES: usize = 64 * 1024 * 1024;

/// Full chunks that may wait for the index thread; then the writer waits for it.
const CHUNKS_WAITING_MAX: usize = 1;

/// Entries are sorted so many at a time. Whoever looks for a topic goes through those that are not sorted yet, a
/// nanosecond each.
const RUN_ENTRIES: usize = 2048;

/// Runs are merged up to this size, so that there are few of them and no merge takes longer than a fifth of a
/// millisecond.
const MERGED_RUN_ENTRIES_MAX: usize = 32 * 1024;

/// A record's topic and offset.
type Entry = (TopicKey, u64);

/// A stretch of the log: which record belongs to which topic.
///
/// Kept as sorted runs, not as a table by topic: with a million topics each insertion into a table is a cache miss,
/// where sorting a few thousand entries at a time stays in the cache.
#[derive(Default)]
pub(super) struct Chunk {
    /// Each sorted; together in the order of the log.
    runs: Vec<Vec<Entry>>,
    /// The latest, in the order of the log.
    unsorted: Vec<Entry>,
    first: u64,
    last: u64,
    records: usize,
    bytes: usize,
}

/// The chunks that are not on disk.
pub(super) struct Recent {
    chunk_records: usize,
    chunks: Mutex<Chunks>,
}

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
    pub(super) fn new(chunk_records: usize) -> Self {
        Self { chunk_records: chunk_records.max(1), chunks: Mutex::default() }
    }

    /// Notes committed records; answers the chunk that this filled.
    pub(super) fn note(&self, records: impl Iterator<Item = (TopicKey, u64, usize)>) -> Option<Arc<Chunk>> {
        let mut chunks = lock(&self.chunks);
        records.for_each(|(key, offset, bytes)| chunks.open.note(key, offset, bytes));
        let is_full = chunks.open.records >= self.chunk_records || chunks.open.bytes >= CHUNK_BYTES;
        if is_full { chunks.seal() } else { None }
    }

    /// The chunk that is being filled, to be written before its time.
    pub(super) fn seal(&self) -> Option<Arc<Chunk>> {
        lock(&self.chunks).seal()
    }

    pub(super) fn forget(&self, chunk: &Arc<Chunk>) {
        lock(&self.chunks).full.retain(|kept| !Arc::ptr_eq(kept, chunk));
    }

    /// The topic's offsets with `after < offset <= through` that are in memory.
    pub(super) fn offsets(&self, key: TopicKey, after: u64, through: u64) -> InMemory {
        let chunks = lock(&self.chunks);
        let all = chunks.full.iter().map(|chunk| &**chunk).chain(std::iter::once(&chunks.open));
        let mut found = InMemory { offsets: Vec::new(), begins_at: u64::MAX };
        for chunk in all.filter(|chunk| chunk.records > 0) {
            found.begins_at = found.begins_at.min(chunk.first);
            chunk.find(key, after, through, &mut found.offsets);
        }
        found
    }
}

impl Chunks {
    fn seal(&mut self) -> Option<Arc<Chunk>> {
        if self.open.records == 0 {
            return None;
        }
        let full = Arc::new(std::mem::take(&mut self.open));
        self.full.push_back(full.clone());
        Some(full)
    }
}

impl Chunk {
    fn note(&mut self, key: TopicKey, offset: u64, bytes: usize) {
        if self.records == 0 {
            self.first = offset;
        }
        self.last = offset;
        self.records += 1;
        self.bytes += bytes;
        self.unsorted.push((key, offset));
        if self.unsorted.len() == RUN_ENTRIES {
            let mut run = std::mem::replace(&mut self.unsorted, Vec::with_capacity(RUN_ENTRIES));
            run.sort_unstable();
            self.push_run(run);
        }
    }

    fn push_run(&mut self, mut run: Vec<Entry>) {
        while let Some(before) = self.runs.pop_if(|b| b.len() == run.len() && b.len() < MERGED_RUN_ENTRIES_MAX) {
            run = merge([before, run].into_iter());
        }
        self.runs.push(run);
    }

    /// Adds the topic's offsets with `after < offset <= through`, ascending.
    fn find(&self, key: TopicKey, after: u64, through: u64, found: &mut Vec<u64>) {
        for run in &self.runs {
            let start = run.partition_point(|entry| *entry <= (key, after));
            let own = run[start..].iter().take_while(|(other, offset)| *other == key && *offset <= through);
            found.extend(own.map(|(_, offset)| *offset));
        }
        let own = self.unsorted.iter().filter(|(other, offset)| *other == key && after < *offset && *offset <= through);
        found.extend(own.map(|(_, offset)| *offset));
    }
}

/// The entries of sorted runs as one run.
fn merge(runs: impl Iterator<Item = Vec<Entry>>) -> Vec<Entry> {
    let mut all = runs.reduce(|mut all, run| {
        all.extend(run);
        all
    });
    // The stable sort finds the runs and merges them.
    all.iter_mut().for_each(|all| all.sort());
    all.unwrap_or_default()
}

/// The index thread's inbox.
pub(super) struct Indexer {
    chunks: mpsc::SyncSender<(Arc<Engine>, Arc<Chunk>)>,
    thread: std::thread::JoinHandle<()>,
}

impl Indexer {
    pub(super) fn start(faults: &Faults) -> std::io::Result<Self> {
        let (chunks, inbox) = mpsc::sync_channel::<(Arc<Engine>, Arc<Chunk>)>(CHUNKS_WAITING_MAX);
        let on_panic = faults.guard("log index");
        let thread = std::thread::Builder::new().name("trunkline-index".into()).spawn(move || {
            let _on_panic = on_panic;
            stand_back();
            for (engine, chunk) in inbox {
                // The writer finds out with its next batch and opens the engine again, which makes these lists anew, and
                // those of the chunks that came after it.
                match engine.lists.write(&chunk) {
                    Ok(()) => engine.recent.forget(&chunk),
                    Err(error) => tracing::warn!(%error, "topic lists were not written; they will be made again"),
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

/// Makes the calling thread, and those that it starts, give way to the ones that callers wait for.
fn stand_back() {
    // Elsewhere the niceness is the whole process's.
    #[cfg(target_os = "linux")]
    if let Err(error) = rustix::process::nice(19) {
        tracing::debug!(%error, "index work keeps its priority");
    }
}

#[cfg(test)]
mod tests {
    use super::{Chunk, MERGED_RUN_ENTRIES_MAX, TopicKey};

    #[test]
    fn runs_are_searched_like_the_log() {
        let mut chunk = Chunk::default();
        let log: Vec<_> =
            (1..=3 * MERGED_RUN_ENTRIES_MAX as u64).map(|n| (TopicKey([(n * n % 11) as u8; 16]), 2 * n)).collect();
        log.iter().for_each(|(key, offset)| chunk.note(*key, *offset, 1));
        assert!(
            chunk.runs.len() > 2 && chunk.runs.iter().all(|run| run.len() <= MERGED_RUN_ENTRIES_MAX && run.is_sorted())
        );
        let end = 2 * log.len() as u64;
        for (after, through) in
            [(0, u64::MAX), (0, 7), (end / 2, end / 2 + 900), (end - 5, end), (end, u64::MAX), (9, 9)]
        {
            for topic in 0..12 {
                let key = TopicKey([topic; 16]);
                let mut found = Vec::new();
                chunk.find(key, after, through, &mut found);
                let own = log.iter().filter(|(other, offset)| *other == key && after < *offset && *offset <= through);
                assert_eq!(found, own.map(|(_, offset)| *offset).collect::<Vec<_>>(), "{topic}: {after}..={through}");
            }
        }
    }
}

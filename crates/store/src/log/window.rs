//! Recent records of the topics that somebody follows, and the applied watermark.
//!
//! The rule that makes reading right: the writer pushes a batch into the windows, then moves the watermark, then wakes
//! readers; a reader loads the watermark first and takes nothing above it. So what a reader sees is always a complete
//! prefix of the log, however many topics it merges.
//!
//! The locks here are plain mutexes: each is held for a copy of some pointers, never across an await or a disk access.

use std::{
    collections::{HashMap, VecDeque},
    hash::{BuildHasher, Hasher},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering::SeqCst},
    },
};

use bytes::Bytes;
use tokio::sync::Notify;

use super::{Ending, Error, Item, Offset, Record, Topic, TopicKey, Transient};

/// Transients a topic remembers for readers that have not come around yet; a reader that is further behind loses the
/// oldest. 256 covers a burst of typing and progress ticks between two turns of a busy executor.
const TRANSIENTS_MAX: usize = 256;

/// Wakes one reader. Set by writers, cleared by the reader before it looks.
#[derive(Default)]
pub(super) struct Signal {
    raised: AtomicBool,
    notify: Notify,
}

impl Signal {
    fn raise(&self) {
        if !self.raised.swap(true, SeqCst) {
            self.notify.notify_one();
        }
    }

    /// Must be called before looking for news: what is pushed afterwards raises the signal again.
    pub(super) fn clear(&self) {
        self.raised.store(false, SeqCst);
    }

    /// Cancel-safe: a wake-up that nobody takes is kept for the next wait.
    pub(super) async fn raised(&self) {
        self.notify.notified().await;
    }
}

/// The followed topics of a log, and how far its records are visible.
pub(super) struct Windows {
    watermark: AtomicU64,
    topics: Mutex<HashMap<TopicKey, Arc<LiveTopic>, KeyHasher>>,
    next_reader: AtomicU64,
    stopped: AtomicBool,
}

/// A topic with at least one reader.
pub(super) struct LiveTopic {
    pub(super) topic: Topic,
    /// The last offset that was pushed here; 0 until the first push, so a new reader looks at the disk first.
    tail: AtomicU64,
    trimmed_to: AtomicU64,
    transient_seq: AtomicU64,
    window: Mutex<Window>,
    readers: Mutex<HashMap<u64, Arc<Signal>>>,
}

struct Window {
    items: VecDeque<Item>,
    /// Every record above this offset (up to the tail) is in `items`. Nothing is, until the first push.
    complete_above: u64,
    transients: VecDeque<Arc<Transient>>,
}

/// A committed record, or end, on its way to the readers of its topic.
pub(super) struct Visible {
    pub(super) topic: Topic,
    pub(super) offset: u64,
    /// The topic's tail before it.
    pub(super) previous_tail: u64,
    pub(super) timestamp_ms: u64,
    pub(super) end: Option<Ending>,
    pub(super) payload: Bytes,
}

/// What the writer pushed and must forget again, oldest first, when memory runs short.
#[derive(Default)]
pub(super) struct Eviction {
    queue: VecDeque<(Arc<LiveTopic>, u64, usize)>,
    bytes: usize,
}

impl Windows {
    pub(super) fn new(watermark: u64) -> Self {
        Self {
            watermark: AtomicU64::new(watermark),
            topics: Mutex::default(),
            next_reader: AtomicU64::new(1),
            stopped: AtomicBool::new(false),
        }
    }

    pub(super) fn watermark(&self) -> u64 {
        self.watermark.load(SeqCst)
    }

    /// The error of a reader whose log went away.
    pub(super) fn check_running(&self) -> Result<(), Error> {
        if self.stopped.load(SeqCst) { Err(Error::Stopped) } else { Ok(()) }
    }

    pub(super) fn reader_id(&self) -> u64 {
        self.next_reader.fetch_add(1, SeqCst)
    }

    /// Registers a reader. From the next batch on, the writer pushes the topic's records into its window; batches
    /// whose push is over are below the watermark when this returns. Both follow from holding the map's lock, which
    /// the writer holds from its first push to its move of the watermark.
    pub(super) fn follow(&self, topic: &Topic, reader: u64, signal: &Arc<Signal>) -> Arc<LiveTopic> {
        let mut topics = lock(&self.topics);
        let live = topics.entry(topic.key()).or_insert_with(|| Arc::new(LiveTopic::new(topic)));
        lock(&live.readers).insert(reader, signal.clone());
        live.clone()
    }

    pub(super) fn unfollow(&self, live: &LiveTopic, reader: u64) {
        let mut topics = lock(&self.topics);
        let mut readers = lock(&live.readers);
        readers.remove(&reader);
        if readers.is_empty() {
            topics.remove(&live.topic.key());
            lock(&live.window).clear();
        }
    }

    pub(super) fn live(&self, topic: &Topic) -> Option<Arc<LiveTopic>> {
        lock(&self.topics).get(&topic.key()).cloned()
    }

    /// Makes a committed batch visible and wakes its readers.
    pub(super) fn apply(&self, batch: Vec<Visible>, watermark: u64, eviction: &mut Eviction) {
        let mut touched: Vec<Arc<LiveTopic>> = Vec::new();
        let topics = lock(&self.topics);
        for visible in batch {
            let Some(live) = topics.get(&visible.topic.key()) else { continue };
            if touched.last().is_none_or(|last| !Arc::ptr_eq(last, live)) {
                touched.push(live.clone());
            }
            live.push(visible, eviction);
        }
        self.watermark.store(watermark, SeqCst);
        drop(topics);
        touched.sort_unstable_by_key(Arc::as_ptr);
        touched.dedup_by(|a, b| Arc::ptr_eq(a, b));
        touched.iter().for_each(|live| live.wake());
    }

    /// Nothing follows any more: readers that wait at the tail are told so.
    pub(super) fn stop(&self) {
        self.stopped.store(true, SeqCst);
        let topics: Vec<_> = lock(&self.topics).values().cloned().collect();
        topics.iter().for_each(|live| live.wake());
    }
}

impl LiveTopic {
    fn new(topic: &Topic) -> Self {
        Self {
            topic: topic.clone(),
            tail: AtomicU64::new(0),
            trimmed_to: AtomicU64::new(0),
            transient_seq: AtomicU64::new(0),
            window: Mutex::new(Window {
                items: VecDeque::new(),
                complete_above: u64::MAX,
                transients: VecDeque::new(),
            }),
            readers: Mutex::default(),
        }
    }

    fn push(self: &Arc<Self>, visible: Visible, eviction: &mut Eviction) {
        let Visible { topic, offset, previous_tail, timestamp_ms, end, payload } = visible;
        let bytes = payload.len() + size_of::<Record>() + size_of::<Item>();
        let item = match end {
            Some(why) => Item::End { topic, offset: Offset(offset), why },
            None => Item::Record(Arc::new(Record { topic, offset: Offset(offset), timestamp_ms, payload })),
        };
        let mut window = lock(&self.window);
        if window.complete_above == u64::MAX {
            window.complete_above = previous_tail;
        }
        window.items.push_back(item);
        drop(window);
        self.tail.store(offset, SeqCst);
        eviction.queue.push_back((self.clone(), offset, bytes));
        eviction.bytes += bytes;
    }

    pub(super) fn push_transient(&self, payload: Bytes, after: u64) {
        let transient = Arc::new(Transient { topic: self.topic.clone(), after: Offset(after), payload });
        let mut window = lock(&self.window);
        if window.transients.len() == TRANSIENTS_MAX {
            window.transients.pop_front();
        }
        window.transients.push_back(transient);
        self.transient_seq.fetch_add(1, SeqCst);
        drop(window);
        self.wake();
    }

    pub(super) fn wake(&self) {
        lock(&self.readers).values().for_each(|signal| signal.raise());
    }

    pub(super) fn tail(&self) -> u64 {
        self.tail.load(SeqCst)
    }

    pub(super) fn trimmed_to(&self) -> u64 {
        self.trimmed_to.load(SeqCst)
    }

    pub(super) fn raise_trimmed_to(&self, offset: u64) {
        self.trimmed_to.fetch_max(offset, SeqCst);
    }

    pub(super) fn transient_seq(&self) -> u64 {
        self.transient_seq.load(SeqCst)
    }

    /// Whether the window holds every record above `position`, also those from before this topic was followed.
    pub(super) fn complete_above(&self, position: u64) -> bool {
        lock(&self.window).complete_above <= position
    }

    /// Appends to `out` up to `most` items with `after < offset <= through`; false if the window no longer holds all
    /// of them, and then `out` is as before.
    pub(super) fn take(&self, after: u64, through: u64, most: usize, out: &mut Vec<Item>) -> bool {
        if self.tail() <= after {
            return true;
        }
        let window = lock(&self.window);
        if window.complete_above > after {
            return false;
        }
        let start = behind(&window.items, after);
        out.extend(window.items.range(start..).take_while(|item| item_offset(item) <= through).take(most).cloned());
        true
    }

    /// How many retained items are above `after`; nothing if the window does not hold all of them.
    pub(super) fn count(&self, after: u64) -> Option<usize> {
        let (window, after) = (lock(&self.window), after.max(self.trimmed_to()));
        (window.complete_above <= after).then(|| window.items.len() - behind(&window.items, after))
    }

    /// The transients numbered above `seen`, oldest first, as far as they are remembered; and the newest number.
    pub(super) fn transients(&self, seen: u64) -> (Vec<Arc<Transient>>, u64) {
        let window = lock(&self.window);
        let newest = self.transient_seq();
        let fresh = usize::try_from(newest - seen).unwrap_or(usize::MAX).min(window.transients.len());
        (window.transients.range(window.transients.len() - fresh..).cloned().collect(), newest)
    }
}

impl Window {
    fn clear(&mut self) {
        self.items = VecDeque::new();
        self.transients = VecDeque::new();
        self.complete_above = u64::MAX;
    }
}

impl Eviction {
    /// Forgets the oldest items until at most `bytes_max` are held.
    pub(super) fn shrink(&mut self, bytes_max: usize) {
        while self.bytes > bytes_max
            && let Some((live, offset, bytes)) = self.queue.pop_front()
        {
            self.bytes -= bytes;
            let mut window = lock(&live.window);
            if window.items.front().is_some_and(|item| item_offset(item) == offset) {
                window.items.pop_front();
                window.complete_above = offset;
            }
        }
    }
}

/// The place in the log of what a window holds; a window never holds transients or gaps among its items.
pub(super) fn item_offset(item: &Item) -> u64 {
    match item {
        Item::Record(record) => record.offset.0,
        Item::End { offset, .. } => offset.0,
        Item::Gap(gap) => gap.through.0,
        Item::Transient(transient) => transient.after.0,
    }
}

pub(super) fn item_topic(item: &Item) -> &Topic {
    match item {
        Item::Record(record) => &record.topic,
        Item::End { topic, .. } => topic,
        Item::Gap(gap) => &gap.topic,
        Item::Transient(transient) => &transient.topic,
    }
}

/// The index of the first item above `after`. Looked for from the end, in growing steps: most readers are near it, and what
/// lies further back is in no cache.
fn behind(items: &VecDeque<Item>, after: u64) -> usize {
    let (mut low, mut high, mut step) = (0, items.len(), 1);
    while high > 0 {
        let at = high.saturating_sub(step);
        if item_offset(&items[at]) <= after {
            low = at + 1;
            break;
        }
        high = at;
        step *= 2;
    }
    while low < high {
        let middle = low.midpoint(high);
        if item_offset(&items[middle]) <= after {
            low = middle + 1;
        } else {
            high = middle;
        }
    }
    low
}

/// A panic while holding one of these locks cannot leave half a change: each section is a few moves.
pub(super) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Topic keys are digests already: their first eight bytes are the hash.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct KeyHasher;

impl BuildHasher for KeyHasher {
    type Hasher = FirstBytes;
    fn build_hasher(&self) -> FirstBytes {
        FirstBytes(0)
    }
}

/// See [`KeyHasher`].
pub(super) struct FirstBytes(u64);

impl Hasher for FirstBytes {
    fn write(&mut self, bytes: &[u8]) {
        if let Some(first) = bytes.first_chunk() {
            self.0 = u64::from_ne_bytes(*first);
        }
    }
    fn write_usize(&mut self, _length_prefix: usize) {}
    fn finish(&self) -> u64 {
        self.0
    }
}

#[cfg(test)]
mod tests {
    use std::collections::VecDeque;

    use super::{Item, behind};
    use crate::log::{Ending, Offset, Topic};

    #[test]
    fn the_first_item_behind_an_offset_is_found() {
        let topic = Topic::new("t").unwrap();
        let item = |n: u64| Item::End { topic: topic.clone(), offset: Offset(2 * n + 1), why: Ending::Closed };
        for length in 0..70 {
            let items: VecDeque<_> = (0..length).map(item).collect();
            for after in 0..2 * length + 3 {
                let expected = items.partition_point(|item| super::item_offset(item) <= after);
                assert_eq!(behind(&items, after), expected, "{length} {after}");
            }
        }
    }
}

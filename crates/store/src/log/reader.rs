//! The only read path: forward from a position over a set of topics, from memory or disk, then waiting at the tail.

use std::{
    cmp::Reverse,
    collections::{BinaryHeap, VecDeque},
    sync::Arc,
};

use tokio::task::JoinHandle;

use super::{
    Cursor, Ending, Epoch, Error, Gap, Item, Offset, READER_TOPICS_MAX, Record, Topic,
    embedded::Shared,
    engine::{Engine, corrupt},
    rows::StoredRecord,
    window::{LiveTopic, Signal, item_offset, item_topic},
};

/// Items that one read from the disk yields at most: a few milliseconds of work on a blocking thread.
const DISK_ITEMS_MAX: usize = 1024;

/// Payload bytes that a reader which catches up holds over all of its topics, besides one record a topic.
const DISK_BYTES_MAX: usize = 4 * 1024 * 1024;

/// Payload bytes from memory after which one batch takes no more, so that a reader whose client is slow does not keep
/// many large records from being forgotten.
const BATCH_BYTES_MAX: usize = 1024 * 1024;

/// Walks forward over a changing set of topics and waits at the tail.
///
/// - **Order**: items come in offset order over all followed topics; a topic that is added with a position behind the
///   cursor first yields what it has before the others go on.
/// - **Completeness**: every retained record above a topic's starting position is yielded once; trimmed history is
///   yielded as a [`Gap`], once.
/// - **Pull**: a reader that is not asked holds no queue. It costs well under 2 KiB while it waits.
/// - **Cancellation**: dropping the future of [`Reader::next`] or [`Reader::next_batch`] loses nothing.
pub struct Reader {
    shared: Arc<Shared>,
    epoch: Epoch,
    id: u64,
    signal: Arc<Signal>,
    topics: Vec<Followed>,
    /// Fetched and not yet handed out.
    pending: VecDeque<Item>,
    /// The cursor: the highest offset handed out, or where reading starts.
    handed: u64,
    /// Something was handed out: from now on the cursor only moves forward.
    started: bool,
    catch_up: CatchUp,
}

struct Followed {
    live: Arc<LiveTopic>,
    /// Everything up to here was fetched.
    position: u64,
    /// The window may lack records above `position`: look at the disk first.
    on_disk: bool,
    transients_seen: u64,
}

impl Followed {
    /// Appends up to `most` items, and a gap before them if there is one; false if some are only on disk.
    fn take(&self, watermark: u64, most: usize, out: &mut Vec<Item>) -> bool {
        if self.on_disk && !self.live.complete_above(self.position) {
            return false;
        }
        let gap = gap(&self.live.topic, self.position, self.live.trimmed_to()).filter(|gap| gap.through.0 <= watermark);
        let after = gap.as_ref().map_or(self.position, |gap| gap.through.0);
        out.extend(gap.map(Item::Gap));
        self.live.take(after, watermark, most, out)
    }
}

/// A catch-up from disk between two calls.
enum CatchUp {
    Idle,
    Ready(Box<Merge>),
    Running(JoinHandle<Result<Box<Merge>, Error>>),
}

impl Reader {
    pub(super) fn new(shared: Arc<Shared>, at: u64) -> Self {
        let id = shared.windows.reader_id();
        Self {
            epoch: shared.epoch(),
            shared,
            id,
            signal: Arc::default(),
            topics: Vec::new(),
            pending: VecDeque::new(),
            handed: at,
            started: false,
            catch_up: CatchUp::Idle,
        }
    }

    /// Follows `topic` from this reader's cursor. A topic that is followed already is left where it is.
    ///
    /// # Errors
    /// [`Error::TooManyTopics`] beyond [`READER_TOPICS_MAX`].
    pub fn follow(&mut self, topic: &Topic) -> Result<(), Error> {
        self.follow_from(topic, Offset(self.handed))
    }

    /// Follows `topic` from behind `after`; use it with offsets that this log gave. An offset beyond the tail is taken for
    /// the tail, with a warning, and counted.
    ///
    /// # Errors
    /// As [`Reader::follow`].
    pub fn follow_from(&mut self, topic: &Topic, after: Offset) -> Result<(), Error> {
        let Some(live) = self.register(topic)? else { return Ok(()) };
        let after = self.shared.clamp(topic, after);
        let on_disk = after.0 < self.shared.windows.watermark();
        self.insert(Followed { transients_seen: live.transient_seq(), live, position: after.0, on_disk });
        Ok(())
    }

    /// Follows `topic` with all that is retained of it.
    ///
    /// # Errors
    /// As [`Reader::follow`].
    pub fn follow_from_start(&mut self, topic: &Topic) -> Result<(), Error> {
        self.follow_from(topic, Offset::START)
    }

    /// Follows what is appended to `topic` from now on.
    ///
    /// # Errors
    /// As [`Reader::follow`].
    pub fn follow_from_tail(&mut self, topic: &Topic) -> Result<(), Error> {
        let Some(live) = self.register(topic)? else { return Ok(()) };
        let position = self.shared.windows.watermark();
        self.insert(Followed { transients_seen: live.transient_seq(), live, position, on_disk: false });
        Ok(())
    }

    fn register(&self, topic: &Topic) -> Result<Option<Arc<LiveTopic>>, Error> {
        if self.follows(topic) {
            return Ok(None);
        }
        if self.topics.len() >= READER_TOPICS_MAX {
            return Err(Error::TooManyTopics);
        }
        Ok(Some(self.shared.windows.follow(topic, self.id, &self.signal)))
    }

    fn insert(&mut self, followed: Followed) {
        self.catch_up = CatchUp::Idle;
        if !self.started {
            self.handed = self.handed.min(followed.position);
        }
        self.topics.push(followed);
    }

    /// Whether `topic` is followed.
    #[must_use]
    pub fn follows(&self, topic: &Topic) -> bool {
        self.topics.iter().any(|followed| followed.live.topic == *topic)
    }

    /// Stops following; what was fetched of the topic and not handed out is dropped.
    pub fn unfollow(&mut self, topic: &Topic) {
        let Some(index) = self.topics.iter().position(|followed| followed.live.topic == *topic) else { return };
        let followed = self.topics.swap_remove(index);
        self.shared.windows.unfollow(&followed.live, self.id);
        self.catch_up = CatchUp::Idle;
        self.pending.retain(|item| item_topic(item) != topic);
    }

    /// Everything up to here was handed out: what to resume from. Until the first item it is the lowest position that a
    /// topic is followed from; then it only moves forward, also while a topic that was added later yields its history.
    #[must_use]
    pub fn cursor(&self) -> Cursor {
        Cursor { epoch: self.epoch, offset: Offset(self.handed) }
    }

    /// The next item; waits at the tail.
    ///
    /// # Errors
    /// [`Error::Stopped`] when the log stops, [`Error::Unavailable`] or [`Error::Corrupt`] when the disk cannot be read.
    pub async fn next(&mut self) -> Result<Item, Error> {
        loop {
            if let Some(item) = self.pending.pop_front() {
                self.started = true;
                self.handed = self.handed.max(item_offset(&item));
                return Ok(item);
            }
            let mut items = Vec::new();
            self.fetch(DISK_ITEMS_MAX, &mut items, true).await?;
            self.pending.extend(items);
        }
    }

    /// Appends 1 to `most` items to `out`, fewer if they are large; waits at the tail until there is one.
    ///
    /// # Errors
    /// As [`Reader::next`].
    pub async fn next_batch(&mut self, most: usize, out: &mut Vec<Item>) -> Result<(), Error> {
        self.batch(most, out, true).await
    }

    /// As [`Reader::next_batch`], but appends nothing if there is nothing up to the tail as of the call.
    ///
    /// # Errors
    /// As [`Reader::next`].
    pub async fn available_batch(&mut self, most: usize, out: &mut Vec<Item>) -> Result<(), Error> {
        self.batch(most, out, false).await
    }

    async fn batch(&mut self, most: usize, out: &mut Vec<Item>, wait: bool) -> Result<(), Error> {
        let start = out.len();
        if self.pending.is_empty() {
            self.fetch(most, out, wait).await?;
        } else {
            out.extend(self.pending.drain(..most.min(self.pending.len())));
        }
        self.started |= out.len() > start;
        self.handed = out[start..].iter().map(item_offset).fold(self.handed, u64::max);
        Ok(())
    }

    /// Cancel-safe: `out` and the positions change together, without an await between them.
    async fn fetch(&mut self, most: usize, out: &mut Vec<Item>, wait: bool) -> Result<(), Error> {
        let start = out.len();
        loop {
            self.shared.windows.check_running()?;
            self.signal.clear();
            if self.continue_catch_up(most, out).await? {
                if out.len() > start {
                    return Ok(());
                }
                continue;
            }
            let watermark = self.shared.windows.watermark();
            if !self.take_from_windows(watermark, most, out) {
                self.begin_catch_up(watermark);
                continue;
            }
            if out.len() > start || !wait {
                return Ok(());
            }
            self.signal.raised().await;
        }
    }

    /// Takes what is new from memory. False if some of it is only on disk, and then nothing changed.
    fn take_from_windows(&mut self, watermark: u64, most: usize, out: &mut Vec<Item>) -> bool {
        let start = out.len();
        let mut sources = 0;
        for followed in &self.topics {
            let before = out.len();
            if !followed.take(watermark, most, out) {
                out.truncate(start);
                return false;
            }
            sources += usize::from(out.len() > before);
        }
        if sources > 1 {
            out[start..].sort_by_key(item_offset);
        }
        let within = within(most, BATCH_BYTES_MAX, &out[start..]);
        let full = within == most || start + within < out.len();
        out.truncate(start + within);
        let through = out.last().filter(|_| full).map_or(watermark, item_offset);
        for followed in &mut self.topics {
            followed.position = followed.position.max(through);
            followed.on_disk = false;
        }
        self.take_transients(through, start, out);
        true
    }

    fn take_transients(&mut self, through: u64, start: usize, out: &mut Vec<Item>) {
        let before = out.len();
        for followed in &mut self.topics {
            if followed.live.transient_seq() == followed.transients_seen {
                continue;
            }
            let (transients, newest) = followed.live.transients(followed.transients_seen);
            let due = transients.partition_point(|transient| transient.after.0 <= through);
            followed.transients_seen = newest - (transients.len() - due) as u64;
            out.extend(transients.into_iter().take(due).map(Item::Transient));
        }
        if out.len() > before {
            // Stable: a transient keeps its place behind the record that it was published after.
            out[start..].sort_by_key(|item| (item_offset(item), matches!(item, Item::Transient(_))));
        }
    }

    fn begin_catch_up(&mut self, through: u64) {
        let sources = self.topics.iter().enumerate().filter(|(_, f)| f.on_disk || f.live.tail() > f.position);
        let sources = sources.map(|(index, f)| Source::new(index, f)).collect();
        for followed in &mut self.topics {
            // Whoever reads from the disk is behind, and transients are for those who are not.
            followed.transients_seen = followed.live.transient_seq();
        }
        self.catch_up =
            CatchUp::Ready(Box::new(Merge { through, sources, heads: BinaryHeap::new(), items: Vec::new() }));
    }

    /// One step of a catch-up if there is one: false if not.
    async fn continue_catch_up(&mut self, most: usize, out: &mut Vec<Item>) -> Result<bool, Error> {
        if let CatchUp::Ready(_) = &self.catch_up {
            let permit = self.shared.disk_reads.clone().acquire_owned().await.map_err(|_| Error::Stopped)?;
            let engine = self.shared.engine().await?;
            let CatchUp::Ready(mut merge) = std::mem::replace(&mut self.catch_up, CatchUp::Idle) else {
                return Ok(true);
            };
            let most = most.clamp(1, DISK_ITEMS_MAX);
            self.catch_up = CatchUp::Running(tokio::task::spawn_blocking(move || {
                let read = merge.read(&engine, most);
                drop((engine, permit));
                read.map(|()| merge)
            }));
        }
        let CatchUp::Running(handle) = &mut self.catch_up else { return Ok(false) };
        let joined = handle.await;
        self.catch_up = CatchUp::Idle;
        let mut merge = joined.map_err(|e| corrupt(format!("reading from disk failed: {e}")))??;
        self.accept(&mut merge, out);
        if !merge.is_done() {
            self.catch_up = CatchUp::Ready(merge);
        }
        Ok(true)
    }

    fn accept(&mut self, merge: &mut Merge, out: &mut Vec<Item>) {
        for (index, item) in merge.items.drain(..) {
            self.topics[index].position = item_offset(&item);
            out.push(item);
        }
        if merge.is_done() {
            for followed in &mut self.topics {
                followed.position = followed.position.max(merge.through);
                followed.on_disk = false;
            }
        }
    }
}

impl Drop for Reader {
    fn drop(&mut self) {
        for followed in &self.topics {
            self.shared.windows.unfollow(&followed.live, self.id);
        }
    }
}

/// How many of the items fit: `most`, and no further one once there are `bytes_max`.
fn within(most: usize, bytes_max: usize, items: &[Item]) -> usize {
    let mut bytes = 0;
    let fits = items.iter().take(most).take_while(|item| {
        let before = bytes;
        bytes += if let Item::Record(record) = item { record.payload.len() } else { 0 };
        before < bytes_max
    });
    fits.count()
}

/// A merge of several topics from disk, in offset order, up to a watermark.
struct Merge {
    through: u64,
    sources: Vec<Source>,
    /// The lowest place of each source that has one.
    heads: BinaryHeap<Reverse<(u64, usize)>>,
    /// What the last step yielded, each with the index of its topic.
    items: Vec<(usize, Item)>,
}

/// One topic of a merge.
struct Source {
    index: usize,
    live: Arc<LiveTopic>,
    /// Everything up to here was listed.
    listed_to: u64,
    /// Everything up to here was yielded.
    yielded_to: u64,
    offsets: VecDeque<u64>,
    /// To be yielded at its place, before any offset behind it.
    gap: Option<Gap>,
    /// What the topic's row says; trims from then on are noted at the live topic.
    trimmed_to: u64,
    deleted: bool,
    exhausted: bool,
    row_seen: bool,
}

impl Merge {
    fn is_done(&self) -> bool {
        self.heads.is_empty() && self.sources.iter().all(|source| source.exhausted)
    }

    /// Yields up to `most` items into `self.items`, or fewer where a gap or the byte budget ends the step.
    fn read(&mut self, engine: &Engine, most: usize) -> Result<(), Error> {
        if self.heads.is_empty() {
            for at in 0..self.sources.len() {
                self.list(engine, at)?;
            }
        }
        let mut picked: Vec<(u64, usize)> = Vec::with_capacity(most);
        while picked.len() < most
            && let Some(Reverse((offset, at))) = self.heads.pop()
        {
            let source = &mut self.sources[at];
            if source.gap.as_ref().is_some_and(|gap| gap.through.0 == offset) {
                if picked.is_empty() {
                    self.items.extend(source.take_gap());
                    return self.list(engine, at);
                }
                self.heads.push(Reverse((offset, at)));
                break;
            }
            source.offsets.pop_front();
            picked.push((offset, at));
            self.list(engine, at)?;
        }
        self.fetch(engine, &picked)
    }

    /// Makes sure that the source's next place is among the heads.
    fn list(&mut self, engine: &Engine, at: usize) -> Result<(), Error> {
        let head = self.sources[at].list(engine, self.through)?;
        self.heads.extend(head.map(|offset| Reverse((offset, at))));
        Ok(())
    }

    fn fetch(&mut self, engine: &Engine, picked: &[(u64, usize)]) -> Result<(), Error> {
        let offsets: Vec<u64> = picked.iter().map(|(offset, _)| *offset).collect();
        let mut bytes = 0;
        let mut records = Vec::with_capacity(offsets.len());
        for part in offsets.chunks(DISK_ITEMS_MAX / 16) {
            let part = engine.get_many(part)?;
            bytes += part.iter().map(|record| record.payload.len()).sum::<usize>();
            records.extend(part);
            if bytes > DISK_BYTES_MAX {
                break;
            }
        }
        let mut records = records.into_iter().peekable();
        for (done, (offset, at)) in picked.iter().enumerate() {
            let source = &mut self.sources[*at];
            let trimmed = source.find_gap();
            let Some(record) = records.next_if(|record| record.offset == *offset && !trimmed) else {
                if done == 0 && !trimmed {
                    return Err(corrupt(format!(
                        "record {offset} of topic {} is listed and missing",
                        source.live.topic
                    )));
                }
                self.put_back(&picked[done..]);
                return Ok(());
            };
            source.yielded_to = *offset;
            self.items.push((source.index, item(&source.live.topic, record)));
        }
        Ok(())
    }

    /// Undoes picks that were not fetched, or that a trim overtook.
    fn put_back(&mut self, picked: &[(u64, usize)]) {
        for (offset, at) in picked.iter().rev() {
            self.sources[*at].offsets.push_front(*offset);
        }
        self.heads.clear();
        for (at, source) in self.sources.iter_mut().enumerate() {
            source.drop_trimmed();
            self.heads.extend(source.head().map(|offset| Reverse((offset, at))));
        }
    }
}

impl Source {
    fn new(index: usize, followed: &Followed) -> Self {
        Self {
            index,
            live: followed.live.clone(),
            listed_to: followed.position,
            yielded_to: followed.position,
            offsets: VecDeque::new(),
            gap: None,
            trimmed_to: 0,
            deleted: false,
            exhausted: false,
            row_seen: false,
        }
    }

    fn head(&self) -> Option<u64> {
        self.gap.as_ref().map(|gap| gap.through.0).or_else(|| self.offsets.front().copied())
    }

    /// Lists the next stretch if none is left, and tells the next place.
    fn list(&mut self, engine: &Engine, through: u64) -> Result<Option<u64>, Error> {
        while self.head().is_none() && !self.exhausted {
            if !std::mem::replace(&mut self.row_seen, true) {
                let Some(row) = engine.row(&self.live.topic)? else {
                    // There is none, or not any more; then lists may still tell of it.
                    self.exhausted = true;
                    break;
                };
                (self.trimmed_to, self.deleted) = (row.trimmed().to, row.deleted);
                self.listed_to = self.listed_to.max(row.since);
            }
            self.offsets = engine.offsets(self.live.topic.key(), self.listed_to, through, DISK_ITEMS_MAX)?.into();
            self.exhausted = self.offsets.len() < DISK_ITEMS_MAX;
            self.listed_to = self.offsets.back().map_or(self.listed_to, |last| *last);
            self.find_gap();
        }
        Ok(self.head())
    }

    /// Trimming raises the mark before it removes anything, so looking at the mark *after* reading finds every trim
    /// that can have taken something out of it. True if there is a gap that was not yielded.
    fn find_gap(&mut self) -> bool {
        let trimmed_to = self.trimmed_to.max(self.live.trimmed_to());
        if let Some(gap) = gap(&self.live.topic, self.yielded_to, trimmed_to) {
            self.gap = Some(gap);
            self.drop_trimmed();
        }
        self.gap.is_some()
    }

    fn drop_trimmed(&mut self) {
        if let Some(gap) = &self.gap {
            let through = gap.through.0;
            self.offsets.retain(|offset| *offset > through);
            self.listed_to = self.listed_to.max(through);
        }
    }

    fn take_gap(&mut self) -> Vec<(usize, Item)> {
        let Some(gap) = self.gap.take() else { return Vec::new() };
        let (topic, offset) = (gap.topic.clone(), gap.through);
        self.yielded_to = offset.0;
        let mut items = vec![(self.index, Item::Gap(gap))];
        if std::mem::take(&mut self.deleted) {
            items.push((self.index, Item::End { topic, offset, why: Ending::Deleted }));
        }
        items
    }
}

fn gap(topic: &Topic, position: u64, trimmed_to: u64) -> Option<Gap> {
    let gap = || Gap { topic: topic.clone(), after: Offset(position), through: Offset(trimmed_to) };
    (trimmed_to > position).then(gap)
}

fn item(topic: &Topic, stored: StoredRecord) -> Item {
    let (topic, offset) = (topic.clone(), Offset(stored.offset));
    if stored.is_end {
        return Item::End { topic, offset, why: Ending::Closed };
    }
    Item::Record(Arc::new(Record { topic, offset, timestamp_ms: stored.timestamp_ms, payload: stored.payload }))
}

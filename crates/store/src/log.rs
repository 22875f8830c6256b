//! The log: many topics, one strictly increasing [`Offset`], durable when an append returns.
//!
//! ```text
//!              trimmed                 retained                  not yet written
//!        ┌────────────────────┬──────────────────────────────┬───────────────────
//! offset │ 1 … trimmed_to     │ trimmed_to+1 …        tail   │ tail+1 …
//!        └────────────────────┴──────────────────────────────┴───────────────────
//! reader   Gap(.., trimmed_to)   Record … Record … (End)        waits
//!
//!   append ──► bounded queue ──► one writer ──► batch + fsync ──► windows ──► watermark ──► wake readers
//!                                                   │                             │
//!                                                 disk ◄──────────── Reader ──────┘ emits nothing above it
//! ```
//!
//! - **Durable**: [`Log::append`] returns an offset only after the batch that holds the record was fsynced, or, with
//!   [`Durability::Process`], after the operating system has it.
//! - **Order**: offsets grow over the whole log in the order of commit. They are not contiguous within a topic and
//!   nobody computes with them. Each topic is read in append order, by every reader.
//! - **Transients**: [`Log::publish`] is at most once, has no offset and is never stored. A slow reader loses
//!   transients, never records.
//! - **Trimming is never silent**: a reader whose cursor lies below what was trimmed gets a [`Gap`].
//! - **Epoch**: a log that is lost and recreated has another [`Epoch`]; a [`Cursor`] of the old one is refused.
//! - **Cancellation**: an append whose future is dropped before it was queued is not written; once queued it is
//!   written whether or not anybody waits for the answer.
//!
//! ```
//! # async fn demo() -> Result<(), Box<dyn std::error::Error>> {
//! use trunkline_store::log::{Append, Item, Log, Options, Topic};
//! let dir = tempfile::tempdir()?;
//! let log = Log::open(dir.path(), Options::default())?;
//! let topic = Topic::new("orders")?;
//! let offset = log.append(Append::new(&topic, "first")).await?.offset;
//!
//! let mut reader = log.reader();
//! reader.follow_from_start(&topic)?;
//! let Item::Record(record) = reader.next().await? else { panic!("a record") };
//! assert_eq!((record.offset, &record.payload[..]), (offset, &b"first"[..]));
//! # Ok(()) }
//! # tokio::runtime::Runtime::new().unwrap().block_on(demo()).unwrap();
//! ```

mod clock;
mod create;
mod embedded;
mod engine;
mod index;
mod journal;
mod reader;
mod rows;
mod torn;
mod window;

use std::{fmt, str::FromStr, sync::Arc, time::Duration};

use bytes::Bytes;
use sha2::{Digest, Sha256};
use uuid::Uuid;

use crate::Durability;
pub use clock::Clock;
pub use embedded::{Log, Submitted, SubmittedEach};
pub use journal::Repair;
#[cfg(feature = "test-util")]
pub use journal::check_journals;
pub use reader::Reader;

/// Longest topic name, in bytes. Names are routing keys that people read; 512 leaves room for three identifiers of
/// 128 bytes, their separators and a suffix.
pub const TOPIC_BYTES_MAX: usize = 512;

/// Largest payload of one record, in bytes. Surfaces have tighter limits of their own (1 MiB for a message); this one
/// keeps a single record from filling the writer's queue.
pub const PAYLOAD_BYTES_MAX: usize = 8 * 1024 * 1024;

/// Most records in one atomic append. Bounds how long one caller can hold the writer.
pub const BATCH_RECORDS_MAX: usize = 4096;

/// Largest atomic append, in payload bytes.
pub const BATCH_BYTES_MAX: usize = 16 * 1024 * 1024;

/// Most topics that one reader can follow. A reader looks at the tail of each of its topics when it wakes, so this
/// bounds what one wake-up costs.
pub const READER_TOPICS_MAX: usize = 4096;

/// A topic's name. Cheap to clone; equality and hashing are those of the name.
///
/// Any string of 1 to [`TOPIC_BYTES_MAX`] bytes is a name. Topics come into being with their first append, and the
/// log finds a topic by a 128-bit digest of the name, so that a million topics need no table in memory.
#[derive(Clone)]
pub struct Topic(Arc<TopicName>);

struct TopicName {
    key: TopicKey,
    name: Box<str>,
}

/// The first 128 bits of the SHA-256 of a topic's name: what the topic's records are stored under.
///
/// A cryptographic digest, because names come from clients: nobody can choose a name that lands on another's records.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct TopicKey(pub(crate) [u8; 16]);

impl Topic {
    /// Checks the name's length.
    ///
    /// # Errors
    /// [`Error::InvalidTopic`] for an empty name or one over [`TOPIC_BYTES_MAX`] bytes.
    pub fn new(name: &str) -> Result<Self, Error> {
        if name.is_empty() || name.len() > TOPIC_BYTES_MAX {
            return Err(Error::InvalidTopic { bytes: name.len() });
        }
        Ok(Self(Arc::new(TopicName { key: TopicKey(digest(name.as_bytes())), name: name.into() })))
    }

    /// The name as given.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0.name
    }

    pub(crate) fn key(&self) -> TopicKey {
        self.0.key
    }
}

impl PartialEq for Topic {
    fn eq(&self, other: &Self) -> bool {
        self.0.key == other.0.key
    }
}
impl Eq for Topic {}
impl std::hash::Hash for Topic {
    fn hash<H: std::hash::Hasher>(&self, state: &mut H) {
        self.0.key.hash(state);
    }
}
impl fmt::Debug for Topic {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Topic({})", self.as_str())
    }
}
impl fmt::Display for Topic {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// 128 bits of SHA-256.
pub(crate) fn digest(bytes: &[u8]) -> [u8; 16] {
    let mut out = [0; 16];
    out.copy_from_slice(&Sha256::digest(bytes)[..16]);
    out
}

/// A position in the log. Grows with every record of every topic; not contiguous; compare, never compute.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Offset(pub u64);

impl Offset {
    /// Before the first record: reading from here reads everything that is retained.
    pub const START: Self = Self(0);
}

impl fmt::Display for Offset {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// Names one life of a log. A recreated log has a new one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Epoch(pub Uuid);

/// Where a reader stopped: everything up to and including `offset` was read, in the log named by `epoch`.
///
/// Printed and parsed as `<epoch>-<offset>`, the epoch as 32 hex digits.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Cursor {
    /// The log that the offset belongs to.
    pub epoch: Epoch,
    /// The last offset that was read.
    pub offset: Offset,
}

impl fmt::Display for Cursor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}-{}", self.epoch.0.simple(), self.offset)
    }
}

impl FromStr for Cursor {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self, Error> {
        let parse = || {
            let (epoch, offset) = text.split_once('-')?;
            let epoch = Uuid::try_parse(epoch).ok().filter(|_| epoch.len() == 32)?;
            Some(Self { epoch: Epoch(epoch), offset: Offset(offset.parse().ok()?) })
        };
        parse().ok_or(Error::InvalidCursor)
    }
}

/// One durable record as readers get it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Record {
    /// The topic that it was appended to.
    pub topic: Topic,
    /// Its place in the log.
    pub offset: Offset,
    /// When the writer took it, Unix milliseconds. Never smaller than that of an earlier record, also when the
    /// machine's clock goes back.
    pub timestamp_ms: u64,
    /// What was appended, byte for byte.
    pub payload: Bytes,
}

/// One at-most-once message as readers get it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Transient {
    /// The topic that it was published on.
    pub topic: Topic,
    /// The log's tail when it was published: it is delivered after the records up to here.
    pub after: Offset,
    /// What was published, byte for byte.
    pub payload: Bytes,
}

/// History that a reader asked for and that is no longer there.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Gap {
    /// The topic that was trimmed.
    pub topic: Topic,
    /// The reader had read up to here.
    pub after: Offset,
    /// The last offset that is gone; reading goes on behind it.
    pub through: Offset,
}

/// Why a topic ended for a reader.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ending {
    /// [`Log::close`]: no record follows, what there is stays readable.
    Closed,
    /// [`Log::delete`]: what there was is gone; a later append starts the topic anew.
    Deleted,
}

/// What a [`Reader`] yields.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Item {
    /// A durable record.
    Record(Arc<Record>),
    /// An at-most-once message.
    Transient(Arc<Transient>),
    /// Trimmed history.
    Gap(Gap),
    /// The topic ended at `offset`.
    End {
        /// The topic that ended.
        topic: Topic,
        /// The place of the end in the log.
        offset: Offset,
        /// Closed or deleted.
        why: Ending,
    },
}

/// One record to append. Built by [`Append::new`] and the setters.
#[derive(Clone, Debug)]
pub struct Append {
    pub(crate) topic: Topic,
    pub(crate) payload: Bytes,
    pub(crate) dedup: Option<Box<str>>,
    pub(crate) content: Option<ContentDigest>,
    pub(crate) with_first: bool,
    pub(crate) expected_tail: Option<Offset>,
}

impl Append {
    /// A record for `topic`.
    pub fn new(topic: &Topic, payload: impl Into<Bytes>) -> Self {
        Self {
            topic: topic.clone(),
            payload: payload.into(),
            dedup: None,
            content: None,
            with_first: false,
            expected_tail: None,
        }
    }

    /// How large its payload is.
    #[must_use]
    pub fn bytes(&self) -> usize {
        self.payload.len()
    }

    /// Writes the record only if none that the topic holds was appended with `id`; otherwise the append answers with that
    /// one's offset and [`Appended::duplicate`]. Once the record is trimmed, or the topic was deleted, the id is new. Ids
    /// are remembered for at least [`Options::dedup_window`]; time in which the log is not open does not count.
    #[must_use]
    pub fn dedup(mut self, id: impl Into<Box<str>>) -> Self {
        self.dedup = Some(id.into());
        self
    }

    /// As [`Append::dedup`], and the append is refused with [`Error::DedupReused`] if the id was used with other content. What
    /// the content is, is the caller's to say; a payload may have more in it.
    #[must_use]
    pub fn dedup_with(mut self, id: impl Into<Box<str>>, content: ContentDigest) -> Self {
        self.content = Some(content);
        self.dedup(id)
    }

    /// In [`Log::append_batch`], writes the record only if the first one of the batch is written: if that is a duplicate, this
    /// one is answered as the same duplicate, whatever it has become meanwhile.
    #[must_use]
    pub fn with_first(mut self) -> Self {
        self.with_first = true;
        self
    }

    /// Writes the record only if the topic's last offset is this one ([`Offset::START`] for a topic without records),
    /// else answers [`Error::TailMoved`].
    #[must_use]
    pub fn expect_tail(mut self, tail: Offset) -> Self {
        self.expected_tail = Some(tail);
        self
    }
}

/// What an append says, in short: equal for equal content. 128 bits of SHA-256, because clients choose what they say.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct ContentDigest(pub(crate) [u8; 16]);

impl ContentDigest {
    /// Of these parts, one after the other. Parts whose lengths vary come last, or with their lengths.
    #[must_use]
    pub fn of(parts: &[&[u8]]) -> Self {
        let digest = parts.iter().fold(Sha256::new(), Sha256::chain_update).finalize();
        let mut out = [0; 16];
        out.copy_from_slice(&digest[..16]);
        Self(out)
    }
}

/// The answer to one [`Append`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Appended {
    /// Where the record is.
    pub offset: Offset,
    /// The dedup id was known: nothing was written, and `offset` is where the first one went.
    pub duplicate: bool,
}

/// How long and how much of a topic is kept. `None` is no limit; what exceeds any limit is trimmed by [`Log::sweep`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Retention {
    /// Records older than this are trimmed.
    pub age: Option<Duration>,
    /// At most so many payload bytes a topic.
    pub bytes: Option<u64>,
    /// At most so many records a topic.
    pub records: Option<u64>,
}

impl Retention {
    /// Nothing from before is kept.
    fn oldest_ms(&self, now_ms: u64) -> u64 {
        self.age.map_or(0, |age| now_ms.saturating_sub(age.as_millis() as u64))
    }

    /// Whether records and payload bytes of a topic are too many.
    fn exceeded_by(&self, (records, bytes): (u64, u64)) -> bool {
        self.records.is_some_and(|max| records > max) || self.bytes.is_some_and(|max| bytes > max)
    }
}

/// Index into [`Options::classes`]: topics of one class share a [`Retention`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Class(pub u8);

/// How a log is opened.
#[derive(Clone, Debug)]
pub struct Options {
    /// What an appended record survives.
    pub durability: Durability,
    /// What records are stamped with and retention is measured against.
    pub clock: Clock,
    /// Tells the class of a topic from its name, once, when the topic comes into being.
    pub classify: fn(&str) -> Class,
    /// Retention by class; a class beyond the end keeps everything.
    pub classes: Vec<Retention>,
    /// How long dedup ids are remembered at least.
    pub dedup_window: Duration,
    /// Memory for recent records, over all topics, in bytes. Readers that are further behind read from disk.
    pub window_bytes_max: usize,
    /// Appends that may wait in the writer's queue; the next one waits outside.
    pub queue_appends_max: usize,
    /// Payload bytes that may wait in the writer's queue.
    pub queue_bytes_max: usize,
    /// Topics whose state the writer keeps in memory (under 200 bytes each); others are looked up on disk when next used.
    pub topics_cached_max: usize,
    /// Memory for blocks read from disk, in bytes.
    pub cache_bytes: u64,
    /// Records whose place in their topics is kept in memory (24 bytes each, three times over) before it is written. Fewer
    /// make more and smaller tables on disk.
    pub chunk_records: usize,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            durability: Durability::default(),
            clock: Clock::system(),
            classify: |_| Class(0),
            classes: Vec::new(),
            dedup_window: Duration::from_hours(24),
            window_bytes_max: 64 * 1024 * 1024,
            queue_appends_max: 8192,
            queue_bytes_max: 64 * 1024 * 1024,
            topics_cached_max: 2 * 1024 * 1024,
            cache_bytes: 64 * 1024 * 1024,
            chunk_records: 256 * 1024,
        }
    }
}

impl Options {
    fn retention(&self, class: Class) -> Retention {
        self.classes.get(usize::from(class.0)).copied().unwrap_or_default()
    }
}

/// Where a topic stands.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct TopicStatus {
    /// Its last offset; [`Offset::START`] if it never had a record.
    pub tail: Offset,
    /// Everything up to here is gone; [`Offset::START`] if nothing was trimmed.
    pub trimmed_to: Offset,
    /// When its last record was appended, in Unix milliseconds; 0 if there is none.
    pub last_ms: u64,
    /// Records that are retained.
    pub records: u64,
    /// Payload bytes that are retained.
    pub bytes: u64,
    /// Whether it was closed.
    pub closed: bool,
}

/// What [`Log::sweep`] did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Swept {
    /// Topics looked at: those that may have had something to trim, or all, if the limits were others before.
    pub topics: u64,
    /// Topics that had something to trim.
    pub trimmed: u64,
    /// Topics forgotten, because they had been empty for as long as their records are kept.
    pub forgotten: u64,
    /// Dedup ids forgotten.
    pub dedup_ids: u64,
}

/// Why the log refused.
#[derive(Clone, Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The topic's name is empty or too long.
    #[error("topic name of {bytes} bytes; 1 to {TOPIC_BYTES_MAX} are allowed")]
    InvalidTopic {
        /// Length of the name.
        bytes: usize,
    },
    /// The text is no cursor.
    #[error("not a cursor: expected <32 hex digits>-<offset>")]
    InvalidCursor,
    /// The cursor is of another life of the log.
    #[error("cursor is of log {given}, this is log {current}: history was recreated, start anew", given = given.0.simple(), current = current.0.simple())]
    EpochMismatch {
        /// The cursor's epoch.
        given: Epoch,
        /// The log's epoch.
        current: Epoch,
    },
    /// The cursor lies beyond the log's end: it cannot be from this log.
    #[error("cursor at offset {given} is beyond the tail {tail}")]
    BeyondTail {
        /// The cursor's offset.
        given: Offset,
        /// The log's tail.
        tail: Offset,
    },
    /// The append is larger than a limit.
    #[error("append of {actual} {unit}; at most {max} are allowed")]
    TooLarge {
        /// What was counted.
        unit: &'static str,
        /// How much it was.
        actual: usize,
        /// The limit.
        max: usize,
    },
    /// A batch without records.
    #[error("append without records")]
    Empty,
    /// The reader follows too many topics.
    #[error("a reader can follow at most {READER_TOPICS_MAX} topics")]
    TooManyTopics,
    /// The topic was closed.
    #[error("topic {topic} is closed")]
    Closed {
        /// Which one.
        topic: Topic,
    },
    /// The dedup id was used for something else.
    #[error("the dedup id was used for other content, at offset {offset} of topic {topic}")]
    DedupReused {
        /// Which topic.
        topic: Topic,
        /// Where that is.
        offset: Offset,
    },
    /// Another writer was faster.
    #[error("tail of topic {topic} is {actual}, expected {expected}")]
    TailMoved {
        /// Which topic.
        topic: Topic,
        /// What the caller expected.
        expected: Offset,
        /// What it is.
        actual: Offset,
    },
    /// The disk refused (full, read-only, permission, I/O error). Nothing of the append was acknowledged; appends are
    /// taken again as soon as the disk takes them.
    #[error("log storage unavailable: {reason}")]
    Unavailable {
        /// What the operating system said.
        reason: Arc<str>,
    },
    /// What is on disk cannot be read as a log.
    #[error("log storage corrupt: {reason}")]
    Corrupt {
        /// What was found.
        reason: Arc<str>,
    },
    /// The log is shutting down.
    #[error("log is stopped")]
    Stopped,
}

impl Error {
    /// Whether the same call can succeed later without the caller changing anything.
    #[must_use]
    pub fn is_retryable(&self) -> bool {
        matches!(self, Self::Unavailable { .. } | Self::Stopped)
    }
}

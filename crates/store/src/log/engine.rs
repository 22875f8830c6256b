//! What is on disk: two fjall databases, how they are encoded, opened and repaired.
//!
//! The index is a database of its own, so that writing lists never makes an append wait for the journal. It is not
//! fsynced: what a crash takes from its end, mark included, is made again from the records.
//!
//! | keyspace | key | value |
//! | --- | --- | --- |
//! | `records` | offset (8) | [`StoredRecord`] |
//! | `topics` | topic name | [`TopicRow`], written when a topic is created, trimmed, closed or deleted |
//! | `dedup` | topic key (16), digest of the id (16) | offset (8) |
//! | `dedup_age` | timestamp (8), the key in `dedup` | nothing |
//! | `meta` | a word | epoch, format, and the tail (offset, timestamp) as of every batch |
//! | index: `lists` | topic key (16), first offset of a chunk (8) | the topic's offsets in that chunk ([`super::index`]) |
//! | index: `meta` | a word | how far the lists go, and whose they are |
//!
//! Integers are big-endian, so that keys sort as numbers do.

use std::{fs, io, path::Path, sync::Arc};

use bytes::Bytes;
use fjall::{Database, Keyspace, KeyspaceCreateOptions, PersistMode};
use uuid::Uuid;

use super::{
    Class, Epoch, Error, Offset, Options, Topic, TopicKey,
    index::{self, Recent, index_key},
    journal::{self, Repair},
};

/// Flush a memtable at this size. Reopening replays what was not flushed, so it is kept well below what a second
/// replays (about 200 MB).
const MEMTABLE_BYTES: u64 = 64 * 1024 * 1024;

/// Journals are kept until all keyspaces flushed what they hold; past this, stragglers are flushed. Bounds replay.
const JOURNAL_BYTES_MAX: u64 = 256 * 1024 * 1024;

/// Version of the encodings of this file.
const FORMAT: u8 = 1;

const META_EPOCH: &str = "epoch";
const META_FORMAT: &str = "format";
const META_INDEXED: &str = "indexed";
const META_TAIL: &str = "tail";

/// Open handles on the database.
pub(super) struct Engine {
    pub(super) database: Database,
    pub(super) records: Keyspace,
    pub(super) topics: Keyspace,
    pub(super) dedup: Keyspace,
    pub(super) dedup_age: Keyspace,
    meta: Keyspace,
    pub(super) index: Index,
    /// The part of the index that is not on disk yet.
    pub(super) recent: Recent,
}

/// The handles on the index.
pub(super) struct Index {
    pub(super) database: Database,
    pub(super) lists: Keyspace,
    meta: Keyspace,
}

/// The log's end as of the last batch.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Tail {
    pub(super) offset: u64,
    pub(super) timestamp_ms: u64,
}

/// What the writer knows of a topic. `records` and `bytes` count from the topic's beginning and never shrink, so that
/// the retained amount is a difference and the place to trim to is found by binary search.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct TopicState {
    pub(super) exists: bool,
    pub(super) tail: u64,
    pub(super) records: u64,
    pub(super) bytes: u64,
    pub(super) row: TopicRow,
}

/// A topic's row.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct TopicRow {
    pub(super) class: Class,
    pub(super) closed: bool,
    pub(super) deleted: bool,
    pub(super) trimmed_to: u64,
    /// Everything up to here was also removed from the disk; at most `trimmed_to`.
    pub(super) purged_to: u64,
    pub(super) trimmed_records: u64,
    pub(super) trimmed_bytes: u64,
}

impl Index {
    /// Opens the index, or makes it anew if it cannot be read: nothing is lost with it but the time to list all records.
    fn open(dir: &Path, cache_bytes: u64) -> Result<Self, fjall::Error> {
        fs::create_dir_all(dir)?;
        if let Err(error) = journal::check(dir) {
            tracing::warn!(%error, "the index is made anew");
            fs::remove_dir_all(dir)?;
        }
        let database = Database::builder(dir)
            .cache_size(cache_bytes)
            .worker_threads(1)
            .manual_journal_persist(true)
            .journal_compression(fjall::CompressionType::None)
            .max_journaling_size(JOURNAL_BYTES_MAX)
            .open()?;
        Ok(Self { lists: keyspace(&database, "lists")?, meta: keyspace(&database, "meta")?, database })
    }

    fn indexed_to(&self, epoch: Epoch) -> Result<u64, fjall::Error> {
        let value = self.meta.get(META_INDEXED)?;
        let mark = value.as_ref().and_then(|value| {
            let (offset, owner) = value.split_first_chunk()?;
            (owner == epoch.0.as_bytes()).then(|| u64::from_be_bytes(*offset))
        });
        Ok(mark.unwrap_or(0))
    }

    /// Hands what was written to the operating system, so that killing the process does not take it back.
    pub(super) fn put_indexed_to(&self, epoch: Epoch, offset: u64) -> Result<(), fjall::Error> {
        let mut value = offset.to_be_bytes().to_vec();
        value.extend(epoch.0.as_bytes());
        let mut batch = self.database.batch().durability(Some(PersistMode::Buffer));
        batch.insert(&self.meta, META_INDEXED, value);
        batch.commit()
    }
}

fn keyspace(database: &Database, name: &str) -> Result<Keyspace, fjall::Error> {
    database.keyspace(name, || KeyspaceCreateOptions::default().max_memtable_size(MEMTABLE_BYTES))
}

/// A record as stored: a fixed header, then the payload.
#[derive(Clone, Debug)]
pub(super) struct StoredRecord {
    pub(super) offset: u64,
    pub(super) topic: TopicKey,
    pub(super) is_end: bool,
    pub(super) timestamp_ms: u64,
    pub(super) records: u64,
    pub(super) bytes: u64,
    pub(super) payload: Bytes,
}

const RECORD_HEADER_BYTES: usize = 41;

impl Engine {
    /// Opens or creates the databases in `dir`, repairing a torn tail.
    pub(super) fn open(dir: &Path, options: &Options) -> Result<(Self, Option<Repair>), Error> {
        fs::create_dir_all(dir).map_err(|e| io_error(dir, &e))?;
        let repair = journal::check(dir)?;
        let engine = Self::open_databases(dir, options).map_err(|e| engine_error(&e))?;
        engine.check_format()?;
        engine.index_the_rest()?;
        Ok((engine, repair))
    }

    fn open_databases(dir: &Path, options: &Options) -> Result<Self, fjall::Error> {
        let database = Database::builder(dir)
            .cache_size(options.cache_bytes)
            .manual_journal_persist(true)
            .journal_compression(fjall::CompressionType::None)
            .max_journaling_size(JOURNAL_BYTES_MAX)
            .open()?;
        let keyspace = |name: &str| keyspace(&database, name);
        Ok(Self {
            records: keyspace("records")?,
            topics: keyspace("topics")?,
            dedup: keyspace("dedup")?,
            dedup_age: keyspace("dedup_age")?,
            meta: keyspace("meta")?,
            index: Index::open(&dir.join("index"), options.cache_bytes / 4)?,
            recent: Recent::default(),
            database,
        })
    }

    fn check_format(&self) -> Result<(), Error> {
        match self.meta.get(META_FORMAT).map_err(|e| engine_error(&e))? {
            None => {
                let mut batch = self.batch();
                batch.insert(&self.meta, META_FORMAT, [FORMAT]);
                batch.insert(&self.meta, META_EPOCH, *Uuid::new_v4().as_bytes());
                batch.commit().map_err(|e| engine_error(&e))
            }
            Some(found) if *found == [FORMAT] => Ok(()),
            Some(found) => Err(corrupt(format!(
                "log format {found:?} was written by another version; this one reads format {FORMAT}"
            ))),
        }
    }

    /// A batch that is on disk when its commit returns.
    pub(super) fn batch(&self) -> fjall::OwnedWriteBatch {
        self.database.batch().durability(Some(PersistMode::SyncData))
    }

    pub(super) fn epoch(&self) -> Result<Epoch, Error> {
        let bytes = self.meta.get(META_EPOCH).map_err(|e| engine_error(&e))?;
        let uuid = bytes.and_then(|b| Uuid::from_slice(&b).ok());
        uuid.map(Epoch).ok_or_else(|| corrupt("no epoch".into()))
    }

    pub(super) fn tail(&self) -> Result<Tail, Error> {
        let Some(bytes) = self.meta.get(META_TAIL).map_err(|e| engine_error(&e))? else {
            return Ok(Tail::default());
        };
        let mut fields = Fields(&bytes);
        let tail = (|| Some(Tail { offset: fields.u64()?, timestamp_ms: fields.u64()? }))();
        tail.ok_or_else(|| corrupt("tail cannot be read".into()))
    }

    pub(super) fn put_tail(&self, batch: &mut fjall::OwnedWriteBatch, tail: Tail) {
        let mut value = Vec::with_capacity(16);
        value.extend(tail.offset.to_be_bytes());
        value.extend(tail.timestamp_ms.to_be_bytes());
        batch.insert(&self.meta, META_TAIL, value);
    }

    pub(super) fn row(&self, topic: &Topic) -> Result<Option<TopicRow>, Error> {
        let bytes = self.topics.get(topic.as_str()).map_err(|e| engine_error(&e))?;
        bytes.map(|b| TopicRow::decode(&b)).transpose()
    }

    pub(super) fn put_row(&self, batch: &mut fjall::OwnedWriteBatch, topic: &Topic, row: TopicRow) {
        batch.insert(&self.topics, topic.as_str(), row.encode());
    }

    /// Lists the records behind the last chunk that was written. An index of another log is made anew.
    fn index_the_rest(&self) -> Result<(), Error> {
        let epoch = self.epoch()?;
        let mut indexed_to = self.index.indexed_to(epoch).map_err(|e| engine_error(&e))?;
        if indexed_to > self.tail()?.offset {
            indexed_to = 0;
        }
        if indexed_to == 0 {
            self.index.lists.clear().map_err(|e| engine_error(&e))?;
        }
        for record in self.scan(indexed_to, u64::MAX) {
            let record = record?;
            if let Some(full) = self.recent.note(std::iter::once((record.topic, record.offset, record.payload.len()))) {
                index::write(self, epoch, &full).map_err(|e| engine_error(&e))?;
            }
        }
        Ok(())
    }

    /// What is known of a topic: its row and its last record.
    pub(super) fn state(&self, topic: &Topic) -> Result<TopicState, Error> {
        let Some(row) = self.row(topic)? else { return Ok(TopicState::default()) };
        let last = self.last(topic.key(), row.trimmed_to, u64::MAX)?;
        Ok(TopicState {
            exists: true,
            tail: last.as_ref().map_or(row.trimmed_to, |r| r.offset),
            records: last.as_ref().map_or(row.trimmed_records, |r| r.records),
            bytes: last.as_ref().map_or(row.trimmed_bytes, |r| r.bytes),
            row,
        })
    }

    /// The topic's offsets with `after < offset <= through`, in order: all of them, or at least `most`.
    pub(super) fn offsets(&self, key: TopicKey, after: u64, through: u64, most: usize) -> Result<Vec<u64>, Error> {
        // Memory first: what the index thread moves to the disk meanwhile is then found twice, not missed.
        let memory = self.recent.offsets(key, after, through);
        let mut offsets = Vec::new();
        let on_disk = through.min(memory.begins_at - 1);
        for list in self.lists(key, after, on_disk) {
            offsets.extend(list?.into_iter().filter(|offset| *offset > after && *offset <= on_disk));
            if offsets.len() >= most {
                return Ok(offsets);
            }
        }
        offsets.extend(memory.offsets);
        Ok(offsets)
    }

    /// The topic's last record with `after < offset <= through`.
    pub(super) fn last(&self, key: TopicKey, after: u64, through: u64) -> Result<Option<StoredRecord>, Error> {
        let memory = self.recent.offsets(key, after, through);
        if let Some(last) = memory.offsets.last() {
            return self.get(*last);
        }
        let on_disk = through.min(memory.begins_at - 1);
        for list in self.lists(key, after, on_disk).rev() {
            if let Some(last) = list?.into_iter().rfind(|offset| *offset > after && *offset <= on_disk) {
                return self.get(last);
            }
        }
        Ok(None)
    }

    /// The lists on disk that can hold the topic's offsets with `after < offset <= through`.
    fn lists(
        &self,
        key: TopicKey,
        after: u64,
        through: u64,
    ) -> impl DoubleEndedIterator<Item = Result<Vec<u64>, Error>> + use<> {
        // The list that `after` itself falls into starts at or before it.
        let first = self.index.lists.range(index_key(key, 0)..=index_key(key, after)).next_back();
        let later =
            (through > after).then(|| self.index.lists.range(index_key(key, after + 1)..=index_key(key, through)));
        first.into_iter().chain(later.into_iter().flatten()).map(|guard| {
            let value = guard.value().map_err(|e| engine_error(&e))?;
            index::decode(&value).ok_or_else(|| corrupt("topic list cannot be read".into()))
        })
    }

    /// The records of all topics with `after < offset <= through`, in order, from one consistent view.
    pub(super) fn scan(&self, after: u64, through: u64) -> impl Iterator<Item = Result<StoredRecord, Error>> + use<> {
        let range = self.records.range(after.saturating_add(1).to_be_bytes()..=through.to_be_bytes());
        range.map(|guard| {
            let (key, value) = guard.into_inner().map_err(|e| engine_error(&e))?;
            let offset = Fields(&key).u64().ok_or_else(|| corrupt(format!("record under key {key:02x?}")))?;
            StoredRecord::decode(offset, &value.into())
        })
    }

    pub(super) fn get(&self, offset: u64) -> Result<Option<StoredRecord>, Error> {
        let value = self.records.get(offset.to_be_bytes()).map_err(|e| engine_error(&e))?;
        value.map(|value| StoredRecord::decode(offset, &value.into())).transpose()
    }

    /// The records at `offsets` (ascending), in order; those that were removed are left out. Offsets that lie close
    /// together are read in one sweep, others one by one.
    pub(super) fn get_many(&self, offsets: &[u64]) -> Result<Vec<StoredRecord>, Error> {
        let (Some(first), Some(last)) = (offsets.first(), offsets.last()) else { return Ok(Vec::new()) };
        if last - first > 8 * offsets.len() as u64 {
            return offsets.iter().filter_map(|offset| self.get(*offset).transpose()).collect();
        }
        let mut wanted = offsets.iter().copied().peekable();
        let mut records = Vec::with_capacity(offsets.len());
        for record in self.scan(first - 1, *last) {
            let record = record?;
            while wanted.next_if(|offset| *offset < record.offset).is_some() {}
            if wanted.next_if_eq(&record.offset).is_some() {
                records.push(record);
            }
        }
        Ok(records)
    }

    /// Removes up to about `most` of the records that `row` says are trimmed, and notes how far that went; answers the
    /// row as it is now, or nothing once all are gone. Not fsynced: a step that a crash loses is taken again.
    pub(super) fn purge(&self, topic: &Topic, mut row: TopicRow, most: usize) -> Result<Option<TopicRow>, Error> {
        let mut batch = self.database.batch();
        let offsets = self.offsets(topic.key(), row.purged_to, row.trimmed_to, most)?;
        let done = offsets.len() < most;
        row.purged_to = offsets.last().copied().filter(|_| !done).unwrap_or(row.trimmed_to);
        offsets.iter().for_each(|offset| batch.remove(&self.records, offset.to_be_bytes()));
        // The newest list may go on behind the mark, so it stays until a later one is below the mark too.
        // The row may have been trimmed further or reopened meanwhile: only this field of it is ours.
        if let Some(current) = self.row(topic)? {
            self.put_row(&mut batch, topic, TopicRow { purged_to: row.purged_to, ..current });
        }
        batch.commit().map_err(|e| engine_error(&e))?;
        let mut lists = self.index.lists.range(index_key(topic.key(), 0)..=index_key(topic.key(), row.purged_to)).rev();
        // The newest list may go on behind the mark, so it stays until a later one is below the mark too.
        lists.next();
        for list in lists {
            let key = list.key().map_err(|e| engine_error(&e))?;
            self.index.lists.remove(key).map_err(|e| engine_error(&e))?;
        }
        Ok((!done).then_some(row))
    }

    pub(super) fn put_record(&self, batch: &mut fjall::OwnedWriteBatch, record: &StoredRecord) -> Bytes {
        let value = record.encode();
        batch.insert(&self.records, record.offset.to_be_bytes(), value.clone());
        value.slice(RECORD_HEADER_BYTES..)
    }
}

impl StoredRecord {
    fn encode(&self) -> Bytes {
        let mut value = Vec::with_capacity(RECORD_HEADER_BYTES + self.payload.len());
        value.push(u8::from(self.is_end));
        value.extend(self.timestamp_ms.to_be_bytes());
        value.extend(self.records.to_be_bytes());
        value.extend(self.bytes.to_be_bytes());
        value.extend(self.topic.0);
        value.extend_from_slice(&self.payload);
        Bytes::from(value)
    }

    fn decode(offset: u64, value: &Bytes) -> Result<Self, Error> {
        let parse = || {
            let mut fields = Fields(value);
            let is_end = fields.u8()? != 0;
            let (timestamp_ms, records, bytes) = (fields.u64()?, fields.u64()?, fields.u64()?);
            let topic = TopicKey(*fields.0.first_chunk()?);
            let payload = value.slice(RECORD_HEADER_BYTES..);
            Some(Self { offset, topic, is_end, timestamp_ms, records, bytes, payload })
        };
        parse().ok_or_else(|| corrupt(format!("record at offset {offset} cannot be read")))
    }
}

impl TopicRow {
    fn encode(self) -> Vec<u8> {
        let mut value = vec![FORMAT, self.class.0, u8::from(self.closed) | u8::from(self.deleted) << 1];
        for number in [self.trimmed_to, self.purged_to, self.trimmed_records, self.trimmed_bytes] {
            value.extend(number.to_be_bytes());
        }
        value
    }

    pub(super) fn decode(bytes: &[u8]) -> Result<Self, Error> {
        let parse = || {
            let mut fields = Fields(bytes);
            let (FORMAT, class, flags) = (fields.u8()?, fields.u8()?, fields.u8()?) else { return None };
            Some(Self {
                class: Class(class),
                closed: flags & 1 != 0,
                deleted: flags & 2 != 0,
                trimmed_to: fields.u64()?,
                purged_to: fields.u64()?,
                trimmed_records: fields.u64()?,
                trimmed_bytes: fields.u64()?,
            })
        };
        parse().ok_or_else(|| corrupt("topic row cannot be read".into()))
    }

    pub(super) fn trimmed_to(&self) -> Offset {
        Offset(self.trimmed_to)
    }
}

/// Big-endian fields off the front of a slice; `None` when it is too short.
struct Fields<'a>(&'a [u8]);

impl Fields<'_> {
    fn u8(&mut self) -> Option<u8> {
        let (first, rest) = self.0.split_first()?;
        self.0 = rest;
        Some(*first)
    }

    fn u64(&mut self) -> Option<u64> {
        let (first, rest) = self.0.split_first_chunk()?;
        self.0 = rest;
        Some(u64::from_be_bytes(*first))
    }
}

pub(super) fn corrupt(reason: String) -> Error {
    Error::Corrupt { reason: reason.into() }
}

pub(super) fn io_error(path: &Path, error: &io::Error) -> Error {
    Error::Unavailable { reason: Arc::from(format!("{}: {error}", path.display())) }
}

/// Driver errors become the log's own once, here.
pub(super) fn engine_error(error: &fjall::Error) -> Error {
    match error {
        fjall::Error::Io(e) | fjall::Error::Storage(fjall::LsmError::Io(e)) => {
            Error::Unavailable { reason: e.to_string().into() }
        }
        fjall::Error::Poisoned => {
            Error::Unavailable { reason: "an earlier write failed; the log is being reopened".into() }
        }
        fjall::Error::Locked => Error::Unavailable { reason: "another process has the log open".into() },
        other => corrupt(other.to_string()),
    }
}

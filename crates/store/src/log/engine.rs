//! What is on disk: how it is opened, repaired and read. The lists of [`super::index`] are a database of their own.
//!
//! | keyspace | key | value |
//! | --- | --- | --- |
//! | `records` | offset (8) | [`StoredRecord`] |
//! | `topics` | topic name | [`TopicRow`], written when a topic is created, trimmed, closed or deleted |
//! | `due` | class (1), timestamp (8), topic name | nothing: when [`super::embedded`]'s sweep has to look at the topic |
//! | `dedup` | topic key (16), digest of the id (16) | [`UsedId`] |
//! | `dedup_age` | timestamp (8), the key in `dedup` | nothing |
//! | `meta` | a word | epoch, [`Life`], format, the retention that was applied, and as of every batch the tail: offset, timestamp, [`Stamp`] |
//!
//! Integers are big-endian, so that keys sort as numbers do.

use std::{io, ops::Bound, path::Path, sync::Arc, time::Duration};

use bytes::Bytes;
use fjall::{Database, Keyspace, KeyspaceCreateOptions, PersistMode, config::FilterPolicy};
use uuid::Uuid;

use super::{
    Class, Durability, Epoch, Error, Options, Topic, TopicKey, create,
    index::{Lists, Recent},
    journal::{Check, Cut, Repair, Seal, Stamp},
    rows::{FORMAT, Fields, Life, RECORD_HEADER_BYTES, StoredRecord, Tail, TopicRow, TopicState, UsedId},
    torn,
};

/// Flush a memtable at this size. Reopening replays what was not flushed, so it is kept well below what a second
/// replays (about 200 MB).
const MEMTABLE_BYTES: u64 = 64 * 1024 * 1024;

/// Journals are kept until all keyspaces flushed what they hold; past this, stragglers are flushed. Bounds replay.
pub(super) const JOURNAL_BYTES_MAX: u64 = 256 * 1024 * 1024;

/// Threads of each database that flush and compact. With more than one, fjall's first passes compactions on in a busy
/// loop until another is free, which takes a core from everybody else.
pub(super) const WORKERS: usize = 1;

const META_EPOCH: &str = "epoch";
const META_LIFE: &str = "life";
const META_FORMAT: &str = "format";
const META_TAIL: &str = "tail";
const META_RETENTION: &str = "retention";

/// Open handles on the database.
pub(super) struct Engine {
    pub(super) database: Database,
    pub(super) records: Keyspace,
    pub(super) topics: Keyspace,
    pub(super) due: Keyspace,
    pub(super) dedup: Keyspace,
    pub(super) dedup_age: Keyspace,
    meta: Keyspace,
    seal: Seal,
    persist: PersistMode,
    pub(super) life: Life,
    /// Which offsets belong to a topic: as far as that is on disk,
    pub(super) lists: Lists,
    /// and what is not yet.
    pub(super) recent: Recent,
}

/// Memtables of a keyspace that wait to be flushed, and tables of its first level, with which a commit waits. One below what
/// fjall itself waits for: it does not look whether its worker is still there, and would wait for ever.
const SEALED_MAX: usize = 3;
const FIRST_LEVEL_MAX: usize = 29;

/// Waits until what is committed next finds room.
///
/// # Errors
/// If the database has failed, so that there will be none.
pub(super) fn wait_for_flush(database: &Database, keyspaces: &[&Keyspace]) -> Result<(), fjall::Error> {
    let is_full = |k: &&Keyspace| k.sealed_memtable_count() >= SEALED_MAX || k.l0_table_count() >= FIRST_LEVEL_MAX;
    while keyspaces.iter().any(is_full) {
        // It says so if the database has failed.
        database.persist(PersistMode::Buffer)?;
        std::thread::sleep(FLUSH_PAUSE);
    }
    Ok(())
}

/// Between two looks whether there is room again.
const FLUSH_PAUSE: Duration = Duration::from_millis(5);

fn options_for_all() -> KeyspaceCreateOptions {
    KeyspaceCreateOptions::default().max_memtable_size(MEMTABLE_BYTES)
}

impl Engine {
    /// Opens or creates the databases in `dir`; cuts off what was not acknowledged and cannot be kept.
    pub(super) fn open(dir: &Path, options: &Options) -> Result<(Self, Option<Repair>), Error> {
        create::open_or_make(dir, || Self::open_in(dir, options, None))
    }

    /// Opens them again after a write failed: exactly what was acknowledged is there, which ends with batch `acknowledged`.
    pub(super) fn reopen(dir: &Path, options: &Options, acknowledged: Tail) -> Result<Self, Error> {
        let (engine, _) = Self::open_in(dir, options, Some(acknowledged.stamp.number))?;
        let found = engine.tail()?;
        if (found.offset, found.stamp.number) != (acknowledged.offset, acknowledged.stamp.number) {
            let (found, acknowledged) = (found.offset, acknowledged.offset);
            return Err(corrupt(format!("reopened at offset {found}, acknowledged was {acknowledged}")));
        }
        Ok(engine)
    }

    fn open_in(dir: &Path, options: &Options, acknowledged: Option<u64>) -> Result<(Self, Option<Repair>), Error> {
        let (seal, settle) = (Seal::load(dir)?, options.durability == Durability::Machine);
        let cut = Check { seal: &seal, acknowledged, settle, has_tables: true }.run(dir)?;
        let database = Database::builder(dir)
            .cache_size(options.cache_bytes)
            .worker_threads(WORKERS)
            .manual_journal_persist(true)
            .journal_compression(fjall::CompressionType::None)
            .max_journaling_size(JOURNAL_BYTES_MAX)
            .open()
            .map_err(|e| engine_error(&e))?;
        let keyspace = |name: &str| database.keyspace(name, options_for_all).map_err(|e| engine_error(&e));
        // Tables hold disjoint stretches of offsets, so at most one is asked for a record, and it has it.
        let records = || options_for_all().filter_policy(FilterPolicy::disabled());
        let meta = keyspace("meta")?;
        if let Some(cut) = cut.as_ref().filter(|cut| cut.reaches > 0) {
            settle_cut(dir, &tail(&meta)?, cut)?;
        }
        let epoch = epoch(&database, &meta, &seal)?;
        let engine = Self {
            records: database.keyspace("records", records).map_err(|e| engine_error(&e))?,
            topics: keyspace("topics")?,
            due: keyspace("due")?,
            dedup: keyspace("dedup")?,
            dedup_age: keyspace("dedup_age")?,
            lists: Lists::open(&dir.join("index"), options.cache_bytes / 4, epoch, seal, tail(&meta)?.offset)?,
            recent: Recent::new(options.chunk_records),
            seal,
            persist: match options.durability {
                Durability::Machine => PersistMode::SyncData,
                Durability::Process => PersistMode::Buffer,
            },
            life: life(&meta, epoch)?,
            meta,
            database,
        };
        engine.list_the_rest()?;
        Ok((engine, cut.map(|cut| cut.repair)))
    }

    /// A batch with room for so many entries; as durable as the log is, when its commit returns.
    pub(super) fn batch(&self, capacity: usize) -> fjall::OwnedWriteBatch {
        let batch = fjall::OwnedWriteBatch::with_capacity(self.database.clone(), capacity);
        batch.durability(Some(self.persist))
    }

    /// Memory for what is not in tables yet and for blocks that were read; both are bounded.
    pub(super) fn buffered_bytes(&self) -> u64 {
        self.database.write_buffer_size() + self.database.cache_size() + self.lists.buffered_bytes()
    }

    pub(super) fn tail(&self) -> Result<Tail, Error> {
        tail(&self.meta)
    }

    /// Commits `batch`.
    pub(super) fn commit(&self, batch: fjall::OwnedWriteBatch) -> Result<(), fjall::Error> {
        let all = [&self.records, &self.topics, &self.due, &self.dedup, &self.dedup_age, &self.meta];
        wait_for_flush(&self.database, &all)?;
        batch.commit()
    }

    /// Ends `batch` with the tail as of it, and stamps it. Must be the last that is put into it.
    pub(super) fn put_tail(&self, batch: &mut fjall::OwnedWriteBatch, tail: Tail) {
        batch.insert(&self.meta, META_TAIL, tail.encode(&self.seal));
    }

    pub(super) fn put_life(&self, batch: &mut fjall::OwnedWriteBatch, life: Life) {
        batch.insert(&self.meta, META_LIFE, life.encode());
    }

    /// The stamp of the batch after the one that `tail` is of.
    pub(super) fn next_stamp(&self, tail: Tail) -> Stamp {
        tail.stamp.next(self.persist == PersistMode::SyncData)
    }

    pub(super) fn row(&self, topic: &Topic) -> Result<Option<TopicRow>, Error> {
        let bytes = self.topics.get(topic.as_str()).map_err(|e| engine_error(&e))?;
        bytes.map(|b| TopicRow::decode(&b)).transpose()
    }

    pub(super) fn put_row(&self, batch: &mut fjall::OwnedWriteBatch, topic: &Topic, row: &TopicRow) {
        batch.insert(&self.topics, topic.as_str(), row.encode());
    }

    pub(super) fn remove_row(&self, batch: &mut fjall::OwnedWriteBatch, topic: &Topic) {
        batch.remove(&self.topics, topic.as_str());
    }

    /// The topic is to be looked at once its class keeps nothing from `at` any more; 0 is now.
    pub(super) fn put_due(&self, batch: &mut fjall::OwnedWriteBatch, class: Class, at: u64, topic: &Topic) {
        batch.insert(&self.due, due_key(class, at, topic.as_str()), []);
    }

    pub(super) fn remove_due(&self, batch: &mut fjall::OwnedWriteBatch, class: Class, at: u64, topic: &Topic) {
        batch.remove(&self.due, due_key(class, at, topic.as_str()));
    }

    /// The topics of a class that are to be looked at, up to those from before `before`, with the times that they are kept
    /// under; behind the last one of an earlier call.
    pub(super) fn due(
        &self,
        class: Class,
        after: Option<(u64, &Topic)>,
        before: u64,
        most: usize,
    ) -> Result<Vec<(u64, Topic)>, Error> {
        let start = match after {
            Some((at, topic)) => Bound::Excluded(due_key(class, at, topic.as_str())),
            None => Bound::Included(due_key(class, 0, "")),
        };
        let entries = self.due.range((start, Bound::Excluded(due_key(class, before, "")))).take(most);
        let entry = |guard: fjall::Guard| {
            let key = guard.key().map_err(|e| engine_error(&e))?;
            let mut fields = Fields(&key);
            let at = fields.u8().and_then(|_| fields.u64());
            let topic = std::str::from_utf8(fields.0).ok().and_then(|name| Topic::new(name).ok());
            at.zip(topic).ok_or_else(|| corrupt(format!("due topic under key {key:02x?}")))
        };
        entries.map(entry).collect()
    }

    /// Which limits the topics were all looked at with, as [`Engine::put_retention`] noted them.
    pub(super) fn retention(&self) -> Result<Option<Vec<u8>>, Error> {
        Ok(self.meta.get(META_RETENTION).map_err(|e| engine_error(&e))?.map(|value| value.to_vec()))
    }

    pub(super) fn put_retention(&self, batch: &mut fjall::OwnedWriteBatch, limits: &[u8]) {
        batch.insert(&self.meta, META_RETENTION, limits);
    }

    /// Lists the records behind the last chunk that was written.
    fn list_the_rest(&self) -> Result<(), Error> {
        for record in self.scan(self.lists.written_to()?, u64::MAX) {
            let record = record?;
            if let Some(full) = self.recent.note(std::iter::once((record.topic, record.offset, record.payload.len()))) {
                self.lists.write(&full).map_err(|e| engine_error(&e))?;
                self.recent.forget(&full);
            }
        }
        Ok(())
    }

    /// What is known of a topic: its row and its last record.
    pub(super) fn state(&self, topic: &Topic) -> Result<TopicState, Error> {
        Ok(self.state_and_time(topic)?.0)
    }

    /// As [`Engine::state`], and when the last record was appended; 0 if there is none.
    pub(super) fn state_and_time(&self, topic: &Topic) -> Result<(TopicState, u64), Error> {
        let Some(row) = self.row(topic)? else { return Ok(Default::default()) };
        let trimmed = row.trimmed();
        let last = self.last(topic.key(), row.begins_behind(), u64::MAX)?;
        let state = TopicState {
            exists: true,
            tail: last.as_ref().map_or(trimmed.to, |r| r.offset),
            records: last.as_ref().map_or(trimmed.records, |r| r.records),
            bytes: last.as_ref().map_or(trimmed.bytes, |r| r.bytes),
            row,
        };
        Ok((state, last.map_or(0, |record| record.timestamp_ms)))
    }

    /// The topic's offsets with `after < offset <= through`, in order: all of them, or at least `most`.
    pub(super) fn offsets(&self, key: TopicKey, after: u64, through: u64, most: usize) -> Result<Vec<u64>, Error> {
        // Memory first: what the index thread moves to the disk meanwhile is then found twice, not missed.
        let memory = self.recent.offsets(key, after, through);
        let mut offsets = Vec::new();
        let on_disk = through.min(memory.begins_at - 1);
        for list in self.lists.find(key, after, on_disk) {
            // Lists that a crash left without their mark are made again, of other lengths: they overlap.
            let after = offsets.last().copied().unwrap_or(after);
            offsets.extend(list?.into_iter().filter(|offset| *offset > after && *offset <= on_disk));
            if offsets.len() >= most {
                return Ok(offsets);
            }
        }
        offsets.extend(memory.offsets);
        Ok(offsets)
    }

    /// How many retained records the topic has above `after`, as far as `most`.
    pub(super) fn unread(&self, topic: &Topic, after: u64, most: usize) -> Result<u64, Error> {
        let Some(row) = self.row(topic)? else { return Ok(0) };
        let offsets = self.offsets(topic.key(), after.max(row.begins_behind()), u64::MAX, most)?;
        Ok(offsets.len().min(most) as u64)
    }

    /// The topic's last record with `after < offset <= through`.
    pub(super) fn last(&self, key: TopicKey, after: u64, through: u64) -> Result<Option<StoredRecord>, Error> {
        let memory = self.recent.offsets(key, after, through);
        if let Some(last) = memory.offsets.last() {
            return self.get(*last);
        }
        let on_disk = through.min(memory.begins_at - 1);
        for list in self.lists.find(key, after, on_disk).rev() {
            if let Some(last) = list?.into_iter().rfind(|offset| *offset > after && *offset <= on_disk) {
                return self.get(last);
            }
        }
        Ok(None)
    }

    /// The topic's first record behind `after`.
    pub(super) fn first(&self, key: TopicKey, after: u64) -> Result<Option<StoredRecord>, Error> {
        let offsets = self.offsets(key, after, u64::MAX, 1)?;
        offsets.into_iter().find_map(|offset| self.get(offset).transpose()).transpose()
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

    /// What this dedup id was used for last, if the id is remembered.
    pub(super) fn known_id(&self, key: &[u8; 32]) -> Result<Option<UsedId>, Error> {
        let value = self.dedup.get(key).map_err(|e| engine_error(&e))?;
        Ok(value.and_then(|value| UsedId::decode(&value)))
    }

    /// The same, if the topic still holds the record.
    pub(super) fn kept_id(&self, key: &[u8; 32], topic: &Topic) -> Result<Option<UsedId>, Error> {
        let Some(used) = self.known_id(key)? else { return Ok(None) };
        Ok(self.row(topic)?.filter(|row| used.offset > row.begins_behind()).map(|_| used))
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
    pub(super) fn purge(&self, topic: &Topic, row: &TopicRow, most: usize) -> Result<Option<TopicRow>, Error> {
        let mut batch = self.database.batch();
        let trimmed = row.trimmed();
        let offsets = self.offsets(topic.key(), trimmed.purged_to.max(row.since), trimmed.to, most)?;
        let done = offsets.len() < most;
        let purged_to = offsets.last().copied().filter(|_| !done).unwrap_or(trimmed.to);
        offsets.iter().for_each(|offset| batch.remove(&self.records, offset.to_be_bytes()));
        // The row may have been trimmed further or reopened meanwhile: only this field of it is ours.
        if let Some(mut current) = self.row(topic)? {
            current.set_purged_to(purged_to);
            self.put_row(&mut batch, topic, &current);
        }
        self.commit(batch).map_err(|e| engine_error(&e))?;
        self.lists.forget(topic.key(), purged_to)?;
        let mut rest = row.clone();
        rest.set_purged_to(purged_to);
        Ok((!done).then_some(rest))
    }

    pub(super) fn put_record(&self, batch: &mut fjall::OwnedWriteBatch, record: &StoredRecord) -> Bytes {
        let value = record.encode();
        batch.insert(&self.records, record.offset.to_be_bytes(), value.clone());
        value.slice(RECORD_HEADER_BYTES..)
    }
}

fn due_key(class: Class, at: u64, name: &str) -> Vec<u8> {
    let mut key = vec![class.0];
    key.extend(at.to_be_bytes());
    key.extend(name.as_bytes());
    key
}

/// Whether the tables hold what was acknowledged, so that what was cut off the journals was not. If they do not, the journals
/// are put back at the next start; this one must not write.
fn settle_cut(dir: &Path, tail: &Tail, cut: &Cut) -> Result<(), Error> {
    if tail.stamp.number < cut.reaches {
        let file = cut.repair.file.display();
        return Err(corrupt(format!("journal {file} is damaged at its beginning, before acknowledged records")));
    }
    torn::remove(dir).map_err(|e| io_error(dir, &e))
}

/// The log's own, made with the log.
fn epoch(database: &Database, meta: &Keyspace, seal: &Seal) -> Result<Epoch, Error> {
    let get = |word| meta.get(word).map_err(|e| engine_error(&e));
    match get(META_FORMAT)? {
        None => {
            let mut batch = database.batch().durability(Some(PersistMode::SyncData));
            batch.insert(meta, META_FORMAT, [FORMAT]);
            batch.insert(meta, META_EPOCH, *Uuid::new_v4().as_bytes());
            let tail = Tail { stamp: Stamp::default().next(true), ..Tail::default() };
            batch.insert(meta, META_TAIL, tail.encode(seal));
            batch.commit().map_err(|e| engine_error(&e))?;
        }
        Some(found) if *found == [FORMAT] => {}
        Some(found) => {
            let reason = format!("log format {found:?} was written by another version; this one reads format {FORMAT}");
            return Err(corrupt(reason));
        }
    }
    let uuid = get(META_EPOCH)?.and_then(|bytes| Uuid::from_slice(&bytes).ok());
    uuid.map(Epoch).ok_or_else(|| corrupt("no epoch".into()))
}

/// What a log is called that was made as `first`.
fn life(meta: &Keyspace, first: Epoch) -> Result<Life, Error> {
    let found = meta.get(META_LIFE).map_err(|e| engine_error(&e))?;
    found.map_or(Ok(Life { epoch: first, forked_from: None }), |bytes| Life::decode(&bytes))
}

fn tail(meta: &Keyspace) -> Result<Tail, Error> {
    let Some(bytes) = meta.get(META_TAIL).map_err(|e| engine_error(&e))? else {
        return Ok(Tail::default());
    };
    Tail::decode(&bytes).ok_or_else(|| corrupt("tail cannot be read".into()))
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

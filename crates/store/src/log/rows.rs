//! What the log keeps, as it is in memory and as it is stored. Integers are big-endian, so that keys sort as numbers do.

use bytes::Bytes;
use uuid::Uuid;

use super::{
    Class, ContentDigest, Cursor, Epoch, Error, Offset, Topic, TopicKey,
    engine::corrupt,
    journal::{STAMP_BYTES, Seal, Stamp},
};

/// Version of the encodings of this file.
pub(super) const FORMAT: u8 = 2;

/// What the log is called, which its lists are not told: they stay valid when it is called anew.
#[derive(Clone, Copy, Debug)]
pub(super) struct Life {
    pub(super) epoch: Epoch,
    /// Where its last epoch ended, if it had another.
    pub(super) forked_from: Option<Cursor>,
}

/// The log's end as of the last batch.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Tail {
    pub(super) offset: u64,
    pub(super) timestamp_ms: u64,
    /// Which batch that was.
    pub(super) stamp: Stamp,
}

/// What the writer knows of a topic. `records` and `bytes` count from the topic's beginning and never shrink, so that
/// the retained amount is a difference and the place to trim to is found by binary search.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct TopicState {
    pub(super) exists: bool,
    pub(super) tail: u64,
    pub(super) records: u64,
    pub(super) bytes: u64,
    pub(super) row: TopicRow,
}

/// A topic's row.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct TopicRow {
    pub(super) class: Class,
    pub(super) closed: bool,
    pub(super) deleted: bool,
    /// The log's end when the topic began. Lists may tell earlier records of one of that name that was forgotten.
    pub(super) since: u64,
    /// Most topics were never trimmed; apart, this leaves the state of a topic in one cache line.
    trimmed: Option<Box<Trimmed>>,
}

/// What is gone from a topic.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Trimmed {
    /// Everything up to here.
    pub(super) to: u64,
    /// Everything up to here was also removed from the disk; at most `to`.
    pub(super) purged_to: u64,
    pub(super) records: u64,
    pub(super) bytes: u64,
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

pub(super) const RECORD_HEADER_BYTES: usize = 41;

impl Life {
    pub(super) fn encode(self) -> Vec<u8> {
        let mut value = self.epoch.0.as_bytes().to_vec();
        if let Some(before) = self.forked_from {
            value.extend(before.epoch.0.as_bytes());
            value.extend(before.offset.0.to_be_bytes());
        }
        value
    }

    pub(super) fn decode(bytes: &[u8]) -> Result<Self, Error> {
        let parse = || {
            let (epoch, rest) = bytes.split_first_chunk()?;
            let (before, offset) = rest.split_first_chunk()?;
            let offset = Offset(u64::from_be_bytes(*offset.first_chunk()?));
            let before = Cursor { epoch: Epoch(Uuid::from_bytes(*before)), offset };
            Some(Self { epoch: Epoch(Uuid::from_bytes(*epoch)), forked_from: Some(before) })
        };
        parse().ok_or_else(|| corrupt("epoch cannot be read".into()))
    }
}

impl Tail {
    pub(super) fn encode(self, seal: &Seal) -> Vec<u8> {
        let mut value = Vec::with_capacity(16 + STAMP_BYTES);
        value.extend(self.offset.to_be_bytes());
        value.extend(self.timestamp_ms.to_be_bytes());
        value.extend(seal.stamp(self.stamp));
        value
    }

    pub(super) fn decode(bytes: &[u8]) -> Option<Self> {
        let mut fields = Fields(bytes);
        let (offset, timestamp_ms) = (fields.u64()?, fields.u64()?);
        // Earlier versions wrote none.
        Some(Self { offset, timestamp_ms, stamp: Stamp::decode(fields.0).unwrap_or_default() })
    }
}

impl StoredRecord {
    pub(super) fn encode(&self) -> Bytes {
        let mut value = Vec::with_capacity(RECORD_HEADER_BYTES + self.payload.len());
        value.push(u8::from(self.is_end));
        value.extend(self.timestamp_ms.to_be_bytes());
        value.extend(self.records.to_be_bytes());
        value.extend(self.bytes.to_be_bytes());
        value.extend(self.topic.0);
        value.extend_from_slice(&self.payload);
        Bytes::from(value)
    }

    pub(super) fn decode(offset: u64, value: &Bytes) -> Result<Self, Error> {
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

impl TopicState {
    /// Records and payload bytes that were not trimmed.
    pub(super) fn retained(&self) -> (u64, u64) {
        let (records, bytes) = self.row.trimmed.as_ref().map_or((0, 0), |trimmed| (trimmed.records, trimmed.bytes));
        (self.records - records, self.bytes - bytes)
    }

    /// Nothing is left of it, here or on the disk, but that it was there.
    pub(super) fn is_spent(&self) -> bool {
        self.exists && !self.row.closed && self.retained().0 == 0 && !self.row.is_unpurged()
    }
}

impl TopicRow {
    /// Trimmed records still take space.
    pub(super) fn is_unpurged(&self) -> bool {
        self.trimmed.as_ref().is_some_and(|trimmed| trimmed.purged_to < trimmed.to)
    }

    pub(super) fn trimmed(&self) -> Trimmed {
        self.trimmed.as_deref().copied().unwrap_or_default()
    }

    /// All that is retained lies behind this.
    pub(super) fn begins_behind(&self) -> u64 {
        self.since.max(self.trimmed().to)
    }

    pub(super) fn set_trimmed(&mut self, trimmed: Trimmed) {
        self.trimmed = (trimmed != Trimmed::default()).then(|| Box::new(trimmed));
    }

    pub(super) fn set_purged_to(&mut self, purged_to: u64) {
        self.set_trimmed(Trimmed { purged_to, ..self.trimmed() });
    }

    pub(super) fn encode(&self) -> Vec<u8> {
        let mut value = vec![FORMAT, self.class.0, u8::from(self.closed) | u8::from(self.deleted) << 1];
        let Trimmed { to, purged_to, records, bytes } = self.trimmed();
        for number in [to, purged_to, records, bytes, self.since] {
            value.extend(number.to_be_bytes());
        }
        value
    }

    pub(super) fn decode(bytes: &[u8]) -> Result<Self, Error> {
        let parse = || {
            let mut fields = Fields(bytes);
            let (FORMAT, class, flags) = (fields.u8()?, fields.u8()?, fields.u8()?) else { return None };
            let (to, purged_to) = (fields.u64()?, fields.u64()?);
            let trimmed = Trimmed { to, purged_to, records: fields.u64()?, bytes: fields.u64()? };
            let (closed, deleted, since) = (flags & 1 != 0, flags & 2 != 0, fields.u64()?);
            let mut row = Self { class: Class(class), closed, deleted, since, trimmed: None };
            row.set_trimmed(trimmed);
            Some(row)
        };
        parse().ok_or_else(|| corrupt("topic row cannot be read".into()))
    }
}

/// Big-endian fields off the front of a slice; `None` when it is too short.
pub(super) struct Fields<'a>(pub(super) &'a [u8]);

impl Fields<'_> {
    pub(super) fn u8(&mut self) -> Option<u8> {
        let (first, rest) = self.0.split_first()?;
        self.0 = rest;
        Some(*first)
    }

    pub(super) fn u64(&mut self) -> Option<u64> {
        let (first, rest) = self.0.split_first_chunk()?;
        self.0 = rest;
        Some(u64::from_be_bytes(*first))
    }
}

/// What a dedup id was used for: offset (8), timestamp (8), digest of the content (16) if the append had one.
#[derive(Clone, Copy)]
pub(super) struct UsedId {
    pub(super) offset: u64,
    /// The record's timestamp, under which the id's age is noted.
    pub(super) at_ms: u64,
    pub(super) content: Option<ContentDigest>,
}

impl UsedId {
    /// Rows of earlier versions have the offset alone.
    pub(super) fn decode(value: &[u8]) -> Option<Self> {
        let mut fields = Fields(value);
        let (offset, at_ms) = (fields.u64()?, fields.u64().unwrap_or(0));
        let content = fields.0.first_chunk().map(|content| ContentDigest(*content));
        Some(Self { offset, at_ms, content })
    }

    pub(super) fn encode(self) -> Vec<u8> {
        let content = self.content.map(|content| content.0);
        let offset = self.offset.to_be_bytes().into_iter().chain(self.at_ms.to_be_bytes());
        offset.chain(content.into_iter().flatten()).collect()
    }

    /// Refuses other content. What has none is the same as anything.
    pub(super) fn check(self, topic: &Topic, content: Option<ContentDigest>) -> Result<Self, Error> {
        match (self.content, content) {
            (Some(first), Some(again)) if first != again => {
                Err(Error::DedupReused { topic: topic.clone(), offset: Offset(self.offset) })
            }
            _ => Ok(self),
        }
    }
}

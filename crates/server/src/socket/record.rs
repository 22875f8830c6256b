//! How events lie in the log: several of one client in a record, because a record costs more than an event.
//!
//! An event's number is made of its record's offset and its place in the record, so it grows as the log does, is never used
//! twice, and says where to read on.

use bytes::{BufMut as _, Bytes, BytesMut};
use trunkline_agent_socket::{Envelope, envelope, parse};
use trunkline_store::log::{Offset, Record};

/// Of an event's number, the bits that are its place. What is left is enough for 2^43 records in a browser's numbers.
const PLACE_BITS: u32 = 10;

/// Events of one record, and their bytes.
const EVENTS_MAX: usize = 256;
const BYTES_MAX: usize = 64 * 1024;

/// Bytes of the length before each event.
const LENGTH_BYTES: usize = 4;

/// A record in the making.
#[derive(Default)]
pub(super) struct Pack {
    bytes: BytesMut,
    count: usize,
}

impl Pack {
    pub(super) fn has_room(&self) -> bool {
        self.count < EVENTS_MAX && self.bytes.len() < BYTES_MAX
    }

    /// Adds an event: all of it that does not follow from where it is. Answers how many bytes more it is now.
    pub(super) fn push(&mut self, event: &Envelope) -> usize {
        let mut body = String::with_capacity(96 + event.payload.as_ref().map_or(0, |payload| payload.get().len()));
        event.body(&mut body);
        // Frames are smaller than this can tell.
        self.bytes.put_u32(u32::try_from(body.len()).unwrap_or(u32::MAX));
        self.bytes.put_slice(body.as_bytes());
        self.count += 1;
        LENGTH_BYTES + body.len()
    }

    pub(super) fn freeze(self) -> Bytes {
        self.bytes.freeze()
    }
}

/// A record of one event.
pub(super) fn alone(event: &Envelope) -> Bytes {
    let mut pack = Pack::default();
    pack.push(event);
    pack.freeze()
}

/// The events of a record, with their numbers, as they were [pushed](Pack::push).
pub(super) fn events(record: &Record) -> impl Iterator<Item = (u64, &str)> {
    let (mut rest, first) = (&record.payload[..], record.offset.0 << PLACE_BITS);
    let mut place = 0;
    std::iter::from_fn(move || {
        let (length, behind) = rest.split_first_chunk::<LENGTH_BYTES>()?;
        let length = usize::try_from(u32::from_be_bytes(*length)).ok()?;
        let body = behind.get(..length)?;
        rest = &behind[length..];
        place += 1;
        Some((first + place - 1, str::from_utf8(body).unwrap_or_default()))
    })
}

/// An event from what is kept of it.
pub(super) fn read(seq: u64, body: &str) -> Option<Envelope> {
    let mut whole = String::with_capacity(64 + body.len());
    envelope::begin(&mut whole, None, None);
    whole.push_str(body);
    let mut event = parse(whole.as_bytes()).ok()?;
    event.seq = Some(seq);
    Some(event)
}

/// The record of an event.
pub(super) fn offset(seq: u64) -> u64 {
    seq >> PLACE_BITS
}

/// The last number that an event of a record may have.
pub(super) fn last_of(offset: Offset) -> u64 {
    (offset.0 << PLACE_BITS) | ((1 << PLACE_BITS) - 1)
}

#[cfg(test)]
mod tests {
    use super::{EVENTS_MAX, Offset, PLACE_BITS, Pack, Record, events, last_of, offset, read};
    use trunkline_agent_socket::{Envelope, Type};
    use trunkline_store::log::Topic;

    #[test]
    fn what_is_packed_is_there_with_its_number() {
        let mut pack = Pack::default();
        let event = |number: u64| Envelope { ts: 7, ..Envelope::new(Type::TurnPhase).with(&number) };
        let mut count = 0;
        while pack.has_room() {
            pack.push(&event(count));
            count += 1;
        }
        assert_eq!(count, EVENTS_MAX as u64);
        let record = |offset, payload| Record {
            topic: Topic::new("t").unwrap(),
            offset: Offset(offset),
            timestamp_ms: 0,
            payload,
        };
        let packed = record(3, pack.freeze());
        let found: Vec<_> = events(&packed).map(|(seq, body)| read(seq, body).unwrap()).collect();
        for (place, found) in (0..).zip(&found) {
            let seq = Some((3 << PLACE_BITS) + place);
            assert_eq!(*found, Envelope { seq, ..event(place) });
            assert_eq!(offset(found.seq.unwrap()), 3);
        }
        assert!(found.last().unwrap().seq < Some(last_of(Offset(3))) && last_of(Offset(3)) < 4 << PLACE_BITS);
        // Half a record is as much as there is of it.
        let half = record(3, packed.payload.slice(..packed.payload.len() / 2));
        assert!(events(&half).count() < EVENTS_MAX);
        assert_eq!(events(&record(1, "".into())).count(), 0);
    }
}

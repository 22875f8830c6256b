//! The acknowledgement extension: what a client was given and is not done with.

use std::collections::{BTreeMap, VecDeque};

use trunkline_core::{
    Error, Kind,
    session::{Delivery, dead_letter::Oldest},
};
use trunkline_proto::own::Acknowledgement;
use trunkline_store::log::{Offset, Record};

use super::outbound::Work;

/// Deliveries that one client may hold; then it gets no more until it acknowledges some.
const DELIVERED_MAX: usize = 4096;

/// Bytes of such deliveries, to the same end; one of any size is always given.
const BYTES_MAX: u64 = 16 * 1024 * 1024;

/// The same for shared work, which meanwhile nobody else can do.
const SHARED_MAX: usize = 256;

/// What is out with a client that acknowledges.
#[derive(Default)]
pub(super) struct Acks {
    /// In the order of delivery, with their sizes.
    delivered: VecDeque<(Delivery, u32)>,
    bytes: u64,
    /// Shared work, by offset; what is left at the end goes back to its group.
    shared: BTreeMap<u64, Work>,
    /// The last that was acknowledged.
    last: u64,
}

impl Acks {
    /// Whether the client may be given more.
    pub(super) fn takes_records(&self) -> bool {
        self.delivered.len() < DELIVERED_MAX && self.bytes < BYTES_MAX
    }

    /// Whether the client may be given more shared work.
    pub(super) fn takes_work(&self) -> bool {
        self.shared.len() < SHARED_MAX
    }

    /// How much is out with the client.
    pub(super) fn count(&self) -> u64 {
        (self.delivered.len() + self.shared.len()) as u64
    }

    /// What the client has longest.
    pub(super) fn oldest(&self) -> Oldest<Option<Offset>, Option<&Record>> {
        let lane = self.delivered.front().map(|(delivery, _)| delivery.offset());
        Oldest { lane, shared: self.shared.first_key_value().and_then(|(_, work)| work.record()) }
    }

    /// What the client has longest is not delivered again.
    pub(super) fn give_up(&mut self, oldest: &Oldest<bool, bool>) {
        if oldest.lane
            && let Some((delivery, bytes)) = self.delivered.pop_front()
        {
            self.bytes -= u64::from(bytes);
            delivery.done();
        }
        if oldest.shared
            && let Some((_, work)) = self.shared.pop_first()
        {
            work.done();
        }
    }

    pub(super) fn delivered(&mut self, delivery: Delivery, bytes: usize) {
        let bytes = u32::try_from(bytes).unwrap_or(u32::MAX);
        self.bytes += u64::from(bytes);
        self.delivered.push_back((delivery, bytes));
    }

    pub(super) fn shared(&mut self, offset: Offset, work: Work) {
        self.shared.insert(offset.0, work);
    }

    /// Takes note of what the client is done with. Shared work that is not out with it is passed over: it may have been
    /// acknowledged before.
    pub(super) fn acknowledge(&mut self, ack: &Acknowledgement) -> Result<(), Error> {
        ack.shared.iter().filter_map(|offset| self.shared.remove(offset)).for_each(Work::done);
        if ack.through == 0 {
            return Ok(());
        }
        // The history of a workspace that a user comes back to may be out twice.
        let Some(at) = self.delivered.iter().position(|(delivery, _)| delivery.offset().0 == ack.through) else {
            if ack.through == self.last {
                return Ok(());
            }
            let message = format!("acknowledgement of offset {}, which is not out with this client", ack.through);
            return Err(Error::new(Kind::Invalid, "ERR_INVALID_ARGUMENT", message));
        };
        for (delivery, bytes) in self.delivered.drain(..=at) {
            self.bytes -= u64::from(bytes);
            delivery.done();
        }
        self.last = ack.through;
        Ok(())
    }
}

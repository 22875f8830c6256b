//! Leases of one process.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex},
};

use tokio::sync::watch;

use super::{Decide, Error, FencingEpoch, Holder, Lease, Loss, Release, lock};

#[derive(Clone, Default)]
pub(super) struct Memory {
    table: Arc<Mutex<Table>>,
}

#[derive(Default)]
struct Table {
    epoch: u64,
    held: HashMap<String, Vec<Entry>>,
}

struct Entry {
    holder: Holder,
    loss: watch::Sender<Option<Loss>>,
}

impl Memory {
    pub(super) fn grant(&self, key: &str, session: &str, decide: &Decide) -> Result<Lease, Error> {
        let mut table = lock(&self.table);
        let grant = decide(&table.holders(key))?;
        table.end(key, |holder| grant.ends.contains(&holder.epoch), grant.why);
        table.epoch += 1;
        let epoch = FencingEpoch(table.epoch);
        let holder = Holder { session: session.to_owned(), epoch, slot: grant.slot, note: grant.note };
        let (loss, lost) = watch::channel(None);
        table.held.entry(key.to_owned()).or_default().push(Entry { holder: holder.clone(), loss });
        Ok(Lease { key: key.to_owned(), holder, loss: lost, release: Release::Memory(self.clone()) })
    }

    pub(super) fn revoke(&self, key: &str, session: Option<&str>) -> usize {
        lock(&self.table).end(key, |holder| session.is_none_or(|session| holder.session == session), Loss::Revoked)
    }

    pub(super) fn holders(&self, key: &str) -> Vec<Holder> {
        lock(&self.table).holders(key)
    }

    pub(super) fn release(&self, key: &str, epoch: FencingEpoch) {
        lock(&self.table).end(key, |holder| holder.epoch == epoch, Loss::Revoked);
    }
}

impl Table {
    fn holders(&self, key: &str) -> Vec<Holder> {
        let mut holders: Vec<_> = self.held.get(key).into_iter().flatten().map(|entry| entry.holder.clone()).collect();
        holders.sort_by_key(|holder| holder.slot);
        holders
    }

    fn end(&mut self, key: &str, whose: impl Fn(&Holder) -> bool, why: Loss) -> usize {
        let Some(held) = self.held.get_mut(key) else { return 0 };
        let before = held.len();
        held.retain(|entry| {
            let ends = whose(&entry.holder);
            if ends {
                entry.loss.send_replace(Some(why));
            }
            !ends
        });
        let ended = before - held.len();
        if held.is_empty() {
            self.held.remove(key);
        }
        ended
    }
}

//! Leases: who holds a key right now.
//!
//! A connection is a lease on its identity: whoever holds it is connected, and whoever lost it is not. Leases hang on
//! the process that took them, not on a timer each: in the embedded profile they live in memory and end with the
//! process, so acquiring one never waits for a disk.
//!
//! - **Fencing**: every acquisition has an [`FencingEpoch`], greater than all before it. What a former holder still
//!   does can be told apart by its smaller epoch; its release cannot touch its successor's lease.
//! - **Conflict** is the caller's choice, by [`Policy`].
//! - **Release** is by dropping the [`Lease`]; a successor can acquire the key at once.
//! - **Loss** is told by [`Lease::lost`].
//!
//! ```
//! # async fn demo() -> Result<(), trunkline_store::lease::Error> {
//! use trunkline_store::lease::{Error, Leases, Policy};
//! let leases = Leases::in_memory();
//! let held = leases.acquire("agent/1", "session-a", Policy::Reject, &b""[..]).await?;
//! let refused = leases.acquire("agent/1", "session-b", Policy::Reject, &b""[..]).await;
//! assert!(matches!(refused, Err(Error::Held { .. })));
//! drop(held);
//! leases.acquire("agent/1", "session-b", Policy::Reject, &b""[..]).await?;
//! # Ok(()) }
//! # tokio::runtime::Runtime::new().unwrap().block_on(demo()).unwrap();
//! ```

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use bytes::Bytes;
use tokio::sync::watch;

/// Grows with every acquisition of any key.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct FencingEpoch(pub u64);

/// What happens when the key is taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Policy {
    /// The newcomer is refused with [`Error::Held`].
    Reject,
    /// The holder loses the lease to the newcomer.
    Replace,
    /// Up to so many hold the key at once, each in a slot; with none free the newcomer is refused.
    Slots(u32),
}

/// Who holds a key.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Holder {
    /// The session that acquired it.
    pub session: String,
    /// Its fencing epoch.
    pub epoch: FencingEpoch,
    /// Its slot; 0 unless the policy is [`Policy::Slots`].
    pub slot: u32,
    /// What the session attached, for its successor to read.
    pub note: Bytes,
}

/// Why a lease ended before it was released.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Loss {
    /// Somebody acquired the key with [`Policy::Replace`].
    Replaced,
    /// The same client resumed in a new session.
    Transferred,
    /// Somebody ended it with [`Leases::revoke`].
    Revoked,
}

/// Why a lease was not given.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The key is taken; with slots, by as many as there are.
    #[error("lease {key} is held by session {}", holder.session)]
    Held {
        /// The key.
        key: String,
        /// One that holds it.
        holder: Holder,
    },
    /// The session that the lease should be taken over from does not hold it.
    #[error("lease {key} is not held by session {session}")]
    NotHolder {
        /// The key.
        key: String,
        /// The session that was named.
        session: String,
    },
}

/// The leases of a store; clones share them.
#[derive(Clone, Default)]
pub struct Leases {
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

/// A key held. Dropping it releases the key, unless it was lost before.
pub struct Lease {
    table: Arc<Mutex<Table>>,
    key: String,
    holder: Holder,
    loss: watch::Receiver<Option<Loss>>,
}

impl Leases {
    /// Leases of this process.
    #[must_use]
    pub fn in_memory() -> Self {
        Self::default()
    }

    /// Takes `key` for `session`.
    ///
    /// # Errors
    /// [`Error::Held`] as the policy says.
    pub async fn acquire(
        &self,
        key: &str,
        session: &str,
        policy: Policy,
        note: impl Into<Bytes>,
    ) -> Result<Lease, Error> {
        let mut table = lock(&self.table);
        let holders = table.held.get(key).map_or(&[][..], Vec::as_slice);
        let slot = match policy {
            Policy::Reject => holders.is_empty().then_some(0),
            Policy::Replace => Some(0),
            Policy::Slots(slots) => (0..slots).find(|slot| holders.iter().all(|entry| entry.holder.slot != *slot)),
        };
        let Some(slot) = slot else {
            let held = holders.first().map(|entry| entry.holder.clone());
            let nobody = || Holder { session: String::new(), epoch: FencingEpoch(0), slot: 0, note: Bytes::new() };
            return Err(Error::Held { key: key.to_owned(), holder: held.unwrap_or_else(nobody) });
        };
        if policy == Policy::Replace {
            table.end(key, |_| true, Loss::Replaced);
        }
        Ok(self.insert(&mut table, key, session, slot, note.into()))
    }

    /// Takes `key` over from the session that holds it, for the same client in a new session. The old lease is lost with
    /// [`Loss::Transferred`]; `note` makes the new note from the old one.
    ///
    /// # Errors
    /// [`Error::NotHolder`] if `from` does not hold it.
    pub async fn transfer(
        &self,
        key: &str,
        from: &str,
        to: &str,
        note: impl FnOnce(&Bytes) -> Bytes,
    ) -> Result<Lease, Error> {
        let mut table = lock(&self.table);
        let entry = table.held.get(key).and_then(|held| held.iter().find(|entry| entry.holder.session == from));
        let Some(old) = entry.map(|entry| entry.holder.clone()) else {
            return Err(Error::NotHolder { key: key.to_owned(), session: from.to_owned() });
        };
        table.end(key, |holder| holder.epoch == old.epoch, Loss::Transferred);
        Ok(self.insert(&mut table, key, to, old.slot, note(&old.note)))
    }

    /// Ends the leases on `key`, or only that of `session`; answers how many there were.
    pub async fn revoke(&self, key: &str, session: Option<&str>) -> usize {
        lock(&self.table).end(key, |holder| session.is_none_or(|session| holder.session == session), Loss::Revoked)
    }

    /// Who holds `key`, by slot.
    #[must_use]
    pub async fn holders(&self, key: &str) -> Vec<Holder> {
        let table = lock(&self.table);
        let mut holders: Vec<_> = table.held.get(key).into_iter().flatten().map(|entry| entry.holder.clone()).collect();
        holders.sort_by_key(|holder| holder.slot);
        holders
    }

    fn insert(&self, table: &mut Table, key: &str, session: &str, slot: u32, note: Bytes) -> Lease {
        table.epoch += 1;
        let holder = Holder { session: session.to_owned(), epoch: FencingEpoch(table.epoch), slot, note };
        let (loss, lost) = watch::channel(None);
        table.held.entry(key.to_owned()).or_default().push(Entry { holder: holder.clone(), loss });
        Lease { table: self.table.clone(), key: key.to_owned(), holder, loss: lost }
    }
}

impl Table {
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

impl Lease {
    /// The key.
    #[must_use]
    pub fn key(&self) -> &str {
        &self.key
    }

    /// Who holds it: this lease's session, epoch, slot and note.
    #[must_use]
    pub fn holder(&self) -> &Holder {
        &self.holder
    }

    /// Whether it was not lost so far.
    #[must_use]
    pub fn is_held(&self) -> bool {
        self.loss.borrow().is_none()
    }

    /// Waits until the lease is lost. Cancel-safe.
    pub async fn lost(&mut self) -> Loss {
        // The sender goes only together with a loss, or with this lease's release.
        match self.loss.wait_for(Option::is_some).await {
            Ok(loss) => loss.unwrap_or(Loss::Revoked),
            Err(_) => Loss::Revoked,
        }
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        let mut table = lock(&self.table);
        let epoch = self.holder.epoch;
        table.end(&self.key, |holder| holder.epoch == epoch, Loss::Revoked);
    }
}

/// A panic while holding the lock cannot leave half a change: each section is a few moves.
fn lock(table: &Mutex<Table>) -> MutexGuard<'_, Table> {
    table.lock().unwrap_or_else(PoisonError::into_inner)
}

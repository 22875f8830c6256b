//! Leases: who holds a key right now.
//!
//! A connection is a lease on its identity: whoever holds it is connected, and whoever lost it is not. A lease hangs on
//! its node, not on a timer of its own. In the embedded profile the node is the process: leases live in memory, end with
//! it, and never wait for a disk. In the clustered profile they are rows of the ledger, and each node has one row with a
//! heartbeat ([`Leases::join`]).
//!
//! - **Fencing**: every acquisition has a [`FencingEpoch`], greater than all before it. What a former holder still
//!   does can be told apart by its smaller epoch; its release cannot touch its successor's lease.
//! - **Conflict** is the caller's choice, by [`Policy`].
//! - **Release** is by dropping the [`Lease`]; on this node a successor can acquire the key at once, on others within
//!   moments.
//! - **Loss** is told by [`Lease::lost`].
//! - **Self-fencing**: a node that cannot renew its heartbeat takes its leases for lost before any other node may.
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

mod memory;
mod node;

use std::{
    num::NonZeroU32,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use bytes::Bytes;
use tokio::sync::watch;

use self::{memory::Memory, node::Node};
use crate::ledger::{self, Ledger};

pub(crate) use node::MIGRATIONS;
pub use node::Options;

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
    Slots(NonZeroU32),
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
    /// This node could not renew its heartbeat in time, or left.
    Fenced,
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
    /// The ledger does not answer, or this node is fenced; whether a lease was given is not known, and if it was, it is
    /// released.
    #[error("leases unavailable: {reason}")]
    Unavailable {
        /// Why.
        reason: Arc<str>,
    },
}

/// The leases of a store; clones share them.
#[derive(Clone)]
pub struct Leases {
    engine: Engine,
}

#[derive(Clone)]
enum Engine {
    Memory(Memory),
    Node(Arc<Node>),
}

/// A key held. Dropping it releases the key, unless it was lost before.
pub struct Lease {
    key: String,
    holder: Holder,
    loss: watch::Receiver<Option<Loss>>,
    release: Release,
}

/// Where a lease is given back.
enum Release {
    Memory(Memory),
    Node { node: Arc<Node>, id: String },
}

/// What becomes of a key's holders, and the place of a new one.
struct Grant {
    ends: Vec<FencingEpoch>,
    why: Loss,
    slot: u32,
    note: Bytes,
}

/// Decides on the holders of a key, by slot. Pure: the clustered engine may ask again.
type Decide = Box<dyn Fn(&[Holder]) -> Result<Grant, Error> + Send + Sync>;

impl Leases {
    /// Leases of this process.
    #[must_use]
    pub fn in_memory() -> Self {
        Self { engine: Engine::Memory(Memory::default()) }
    }

    /// Leases that nodes share through a ledger. This process becomes one of the nodes, until [`Leases::leave`].
    ///
    /// # Errors
    /// [`Error::Unavailable`] if the ledger does not answer.
    pub async fn join(ledger: Ledger, options: Options) -> Result<Self, Error> {
        Ok(Self { engine: Engine::Node(Node::join(ledger, options).await?) })
    }

    /// Takes `key` for `session`. An asker that goes away leaves no lease behind.
    ///
    /// # Errors
    /// [`Error::Held`] as the policy says, [`Error::Unavailable`].
    pub async fn acquire(
        &self,
        key: &str,
        session: &str,
        policy: Policy,
        note: impl Into<Bytes>,
    ) -> Result<Lease, Error> {
        let (held, note) = (key.to_owned(), note.into());
        self.grant(key, session, Box::new(move |holders| by_policy(&held, policy, &note, holders))).await
    }

    /// Takes `key` over from the session that holds it, for the same client in a new session. The old lease is lost with
    /// [`Loss::Transferred`]; `note` makes the new note from the old one, and may be asked more than once.
    ///
    /// # Errors
    /// [`Error::NotHolder`] if `from` does not hold it, [`Error::Unavailable`].
    pub async fn transfer(
        &self,
        key: &str,
        from: &str,
        to: &str,
        note: impl Fn(&Bytes) -> Bytes + Send + Sync + 'static,
    ) -> Result<Lease, Error> {
        let (held, from) = (key.to_owned(), from.to_owned());
        self.grant(key, to, Box::new(move |holders| by_transfer(&held, &from, &note, holders))).await
    }

    async fn grant(&self, key: &str, session: &str, decide: Decide) -> Result<Lease, Error> {
        match &self.engine {
            Engine::Memory(memory) => memory.grant(key, session, &decide),
            Engine::Node(node) => node.grant(key, session, decide).await,
        }
    }

    /// Ends the leases on `key`, or only that of `session`; answers how many there were.
    ///
    /// # Errors
    /// [`Error::Unavailable`].
    pub async fn revoke(&self, key: &str, session: Option<&str>) -> Result<usize, Error> {
        match &self.engine {
            Engine::Memory(memory) => Ok(memory.revoke(key, session)),
            Engine::Node(node) => node.revoke(key, session).await,
        }
    }

    /// Who holds `key`, by slot.
    ///
    /// # Errors
    /// [`Error::Unavailable`].
    pub async fn holders(&self, key: &str) -> Result<Vec<Holder>, Error> {
        match &self.engine {
            Engine::Memory(memory) => Ok(memory.holders(key)),
            Engine::Node(node) => node.holders(key).await,
        }
    }

    /// Ends this node's leases and takes it out of the cluster, so that others need not wait for it. In memory, nothing.
    pub async fn leave(&self) {
        match &self.engine {
            Engine::Memory(_) => {}
            Engine::Node(node) => node.leave().await,
        }
    }
}

fn by_policy(key: &str, policy: Policy, note: &Bytes, holders: &[Holder]) -> Result<Grant, Error> {
    let slot = match policy {
        Policy::Reject => holders.is_empty().then_some(0),
        Policy::Replace => Some(0),
        Policy::Slots(slots) => (0..slots.get()).find(|slot| holders.iter().all(|holder| holder.slot != *slot)),
    };
    if slot.is_none()
        && let Some(holder) = holders.first()
    {
        return Err(Error::Held { key: key.to_owned(), holder: holder.clone() });
    }
    let replaced = if policy == Policy::Replace { holders } else { &[] };
    let ends = replaced.iter().map(|holder| holder.epoch).collect();
    Ok(Grant { ends, why: Loss::Replaced, slot: slot.unwrap_or(0), note: note.clone() })
}

fn by_transfer(key: &str, from: &str, note: &impl Fn(&Bytes) -> Bytes, holders: &[Holder]) -> Result<Grant, Error> {
    let Some(old) = holders.iter().find(|holder| holder.session == from) else {
        return Err(Error::NotHolder { key: key.to_owned(), session: from.to_owned() });
    };
    Ok(Grant { ends: vec![old.epoch], why: Loss::Transferred, slot: old.slot, note: note(&old.note) })
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

    /// Whether it was not lost so far. On a node whose heartbeat is late, this turns before anybody else may acquire the
    /// key (if clocks run equally fast and the machine is not suspended; [`FencingEpoch`] is for when they do not).
    #[must_use]
    pub fn is_held(&self) -> bool {
        let is_live = match &self.release {
            Release::Memory(_) => true,
            Release::Node { node, .. } => node.is_live(),
        };
        is_live && self.loss.borrow().is_none()
    }

    /// Waits until the lease is lost. Cancel-safe.
    pub fn lost(&self) -> impl Future<Output = Loss> + Send + 'static {
        let mut loss = self.loss.clone();
        async move {
            match loss.wait_for(Option::is_some).await {
                Ok(loss) => loss.unwrap_or(Loss::Revoked),
                // The sender goes only together with a loss, or with this lease's release.
                Err(_) => Loss::Revoked,
            }
        }
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        match &self.release {
            Release::Memory(memory) => memory.release(&self.key, self.holder.epoch),
            Release::Node { node, id } => node.release(&self.key, id),
        }
    }
}

impl From<ledger::Error> for Error {
    fn from(error: ledger::Error) -> Self {
        Self::Unavailable { reason: error.to_string().into() }
    }
}

/// A panic while holding the lock cannot leave half a change: each section is a few moves.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

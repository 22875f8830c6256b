//! The one door: only the gate holds the store, and everything that it does for somebody takes a permit.
//!
//! [`Gate::authorize`] turns a caller and an [`Intent`] into the intent's permit. A permit has no constructor outside of
//! this module, so that whoever forgets to ask cannot go on.

mod policy;

use trunkline_store::{
    Store,
    lease::{self, Lease, Policy},
    ledger::{self, ReadTx, TxFuture, WriteTx},
    log::{self, Append, Cursor, Reader, Submitted, Topic},
};

use crate::{caller::Caller, error::Error, identity::Identity, topic::Target};

/// Decides, and does what was decided. Clones share the store.
#[derive(Clone)]
pub struct Gate {
    store: Store,
}

/// Something that a caller wants to do.
pub trait Intent {
    /// What allows it.
    type Permit;

    /// Whether the caller may, by the rules of `gate/policy.rs`.
    ///
    /// # Errors
    /// [`crate::Kind::Denied`], which never tells whether the thing exists.
    fn decide(self, caller: &Caller) -> Result<Self::Permit, Error>;
}

/// To send a message to a target.
pub struct Send<'a>(pub &'a Target);

/// To be connected under one's identity, and to hear what is said to it.
pub struct Attend;

/// To keep rows of one's own.
pub struct Keep;

/// Allows appending to one topic.
pub struct SendPermit {
    topic: Topic,
}

/// Allows holding one identity and reading its lanes.
pub struct AttendPermit {
    identity: Identity,
}

/// Allows transactions on what belongs to one identity.
pub struct KeepPermit {
    owner: String,
}

impl Gate {
    /// The gate before `store`. There is one.
    #[must_use]
    pub fn new(store: Store) -> Self {
        Self { store }
    }

    /// Decides on current policy, for this one request.
    ///
    /// # Errors
    /// As [`Intent::decide`].
    pub fn authorize<I: Intent>(&self, caller: &Caller, intent: I) -> Result<I::Permit, Error> {
        intent.decide(caller).inspect_err(|error| {
            tracing::debug!(caller = %caller.identity, code = error.code, reason = %error, "denied");
        })
    }

    /// Queues a durable record; the answer says when it is on disk.
    ///
    /// # Errors
    /// As [`log::Log::submit`].
    pub async fn submit(&self, permit: &SendPermit, payload: Vec<u8>) -> Result<Submitted, log::Error> {
        self.store.log.submit(Append::new(&permit.topic, payload)).await
    }

    /// A reader for the lanes of the permit's identity.
    #[must_use]
    pub fn reader(&self, _permit: &AttendPermit) -> Reader {
        self.store.log.reader()
    }

    /// Where the log ends now.
    #[must_use]
    pub fn tail(&self, _permit: &AttendPermit) -> Cursor {
        self.store.log.tail()
    }

    /// Takes the identity's lease, or refuses because it is taken.
    ///
    /// # Errors
    /// [`lease::Error::Held`].
    pub async fn hold(&self, permit: &AttendPermit, session: &str, note: Vec<u8>) -> Result<Lease, lease::Error> {
        self.store.leases.acquire(&permit.identity.to_string(), session, Policy::Reject, note).await
    }

    /// Takes the identity's lease over from a session of the same client.
    ///
    /// # Errors
    /// [`lease::Error::NotHolder`].
    pub async fn take_over(
        &self,
        permit: &AttendPermit,
        from: &str,
        session: &str,
        note: impl Fn(&[u8]) -> Vec<u8> + std::marker::Send + Sync + 'static,
    ) -> Result<Lease, lease::Error> {
        self.store.leases.transfer(&permit.identity.to_string(), from, session, move |old| note(old).into()).await
    }

    /// One write transaction on what belongs to the permit's owner, whose name the closure gets.
    ///
    /// # Errors
    /// As [`ledger::Ledger::write`].
    pub async fn write<T, E>(
        &self,
        permit: &KeepPermit,
        run: impl for<'a> Fn(&'a mut WriteTx, String) -> TxFuture<'a, T, E> + std::marker::Send + Sync + 'static,
    ) -> Result<T, E>
    where
        T: std::marker::Send + 'static,
        E: From<ledger::Error> + std::marker::Send + 'static,
    {
        let owner = permit.owner.clone();
        self.store.ledger.write(move |tx| run(tx, owner.clone())).await
    }

    /// One read transaction on what belongs to the permit's owner.
    ///
    /// # Errors
    /// As [`ledger::Ledger::read`].
    pub async fn read<T, E>(
        &self,
        permit: &KeepPermit,
        run: impl for<'a> Fn(&'a mut ReadTx, String) -> TxFuture<'a, T, E> + std::marker::Send + Sync + 'static,
    ) -> Result<T, E>
    where
        T: std::marker::Send + 'static,
        E: From<ledger::Error> + std::marker::Send + 'static,
    {
        let owner = permit.owner.clone();
        self.store.ledger.read(move |tx| run(tx, owner.clone())).await
    }
}

//! The door to sandboxes: their topics, and the lease of their command streams.

use bytes::Bytes;
use trunkline_store::{
    lease::{Lease, Policy},
    log::{Append, Offset, Reader, Topic},
};

use super::Gate;
use crate::{
    error::Error,
    sandbox::Sandbox,
    topic::{sandbox_commands, sandbox_events, sandboxes},
};

/// To do something with a sandbox.
pub struct UseSandbox<'a> {
    pub(crate) id: &'a str,
    pub(crate) project: &'a str,
    pub(crate) need: SandboxNeed,
}

/// What somebody wants of a sandbox.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SandboxNeed {
    /// To watch it.
    Read,
    /// To make it, to tell it what to do, to remove it.
    Write,
    /// To be it.
    Act,
}

impl<'a> UseSandbox<'a> {
    /// To do something with this one.
    pub(crate) fn new(sandbox: &'a Sandbox, need: SandboxNeed) -> Self {
        Self { id: &sandbox.id, project: sandbox.project.as_deref().unwrap_or_default(), need }
    }
}

/// Allows what was asked for, on one sandbox.
#[derive(Clone)]
pub struct SandboxPermit {
    pub(super) id: String,
    pub(super) need: SandboxNeed,
}

impl SandboxPermit {
    /// Its id, if the permit was given for that.
    fn of(&self, need: SandboxNeed) -> Result<&str, Error> {
        if self.need == need { Ok(&self.id) } else { Err(crate::sandbox::missing()) }
    }
}

impl Gate {
    /// Appends what a sandbox tells; with a key, only once. Durable when it returns.
    pub(crate) async fn tell_sandbox(&self, permit: &SandboxPermit, body: Bytes, key: &str) -> Result<(), Error> {
        self.append_once(&sandbox_events(permit.of(SandboxNeed::Act)?)?, body, key).await
    }

    /// Appends what a sandbox is told; with a key, only once. Durable when it returns.
    pub(crate) async fn command_sandbox(&self, permit: &SandboxPermit, body: Bytes, key: &str) -> Result<(), Error> {
        self.append_once(&sandbox_commands(permit.of(SandboxNeed::Write)?)?, body, key).await
    }

    /// Appends what a sandbox told before this server: for the server itself.
    pub(crate) async fn restore_sandbox(&self, id: &str, body: Bytes) -> Result<(), Error> {
        self.append_once(&sandbox_events(id)?, body, "").await
    }

    async fn append_once(&self, topic: &Topic, body: Bytes, key: &str) -> Result<(), Error> {
        let append = Append::new(topic, body);
        let append = if key.is_empty() { append } else { append.dedup(key) };
        Ok(self.0.store.log.append(append).await.map(drop)?)
    }

    /// The command stream's lease, in place of whoever has it.
    pub(crate) async fn hold_sandbox(&self, permit: &SandboxPermit, session: &str) -> Result<Lease, Error> {
        let key = format!("sx::{}", permit.of(SandboxNeed::Act)?);
        Ok(self.0.store.leases.acquire(&key, session, Policy::Replace, Vec::new()).await?)
    }

    /// A sandbox's commands from behind an offset.
    pub(crate) fn commands_of(&self, permit: &SandboxPermit, after: Offset) -> Result<Reader, Error> {
        self.read_from(&sandbox_commands(permit.of(SandboxNeed::Act)?)?, after)
    }

    /// What a sandbox told from behind an offset: for the server itself, to show it to whom it may be shown.
    pub(crate) fn follow_sandbox(&self, id: &str, after: Offset) -> Result<Reader, Error> {
        self.read_from(&sandbox_events(id)?, after)
    }

    fn read_from(&self, topic: &Topic, after: Offset) -> Result<Reader, Error> {
        let mut reader = self.0.store.log.reader();
        reader.follow_from(topic, after)?;
        Ok(reader)
    }

    /// What becomes of sandboxes from now on: for the server itself, to tell whom it may be told.
    pub(crate) fn follow_sandboxes(&self) -> Result<Reader, Error> {
        let mut reader = self.0.store.log.reader();
        reader.follow_from_tail(&sandboxes()?)?;
        Ok(reader)
    }

    /// When a sandbox last told anything, in Unix milliseconds; 0 if it never did.
    pub(crate) async fn sandbox_heard(&self, id: &str) -> Result<i64, Error> {
        let status = self.0.store.log.status(&sandbox_events(id)?).await?;
        Ok(i64::try_from(status.last_ms).unwrap_or(i64::MAX))
    }

    /// Removes what a sandbox told and was told.
    pub(crate) async fn forget_sandbox(&self, id: &str) -> Result<(), Error> {
        self.0.store.log.delete(&sandbox_events(id)?).await?;
        self.0.store.log.delete(&sandbox_commands(id)?).await?;
        Ok(())
    }
}

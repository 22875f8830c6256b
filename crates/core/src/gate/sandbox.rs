//! The door to sandboxes: their topics, and the lease of their command streams.

use bytes::Bytes;
use trunkline_store::{
    lease::{Lease, Policy},
    log::{Append, Appended, ContentDigest, Offset, Reader, Topic, TopicStatus},
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
    /// Who got it: whoever names what it sends has names of its own.
    pub(super) by: String,
}

/// What is sent under a name, once: the name, empty for none, and what is sent.
#[derive(Clone, Debug)]
pub(crate) struct Once {
    pub(crate) key: String,
    pub(crate) content: ContentDigest,
}

impl SandboxPermit {
    /// What is sent under a name, to the log. Names are their sender's: nobody can use up another one's.
    pub(crate) fn name(&self, once: &Once) -> String {
        format!("{}\n{}", self.by, once.key)
    }

    /// Its id, if the permit was given for that.
    fn of(&self, need: SandboxNeed) -> Result<&str, Error> {
        if self.need == need { Ok(&self.id) } else { Err(crate::sandbox::missing()) }
    }
}

impl Gate {
    /// Appends what a sandbox tells; under a name, only once. Durable when it returns.
    pub(crate) async fn tell_sandbox(
        &self,
        permit: &SandboxPermit,
        body: Bytes,
        once: Option<Once>,
    ) -> Result<Appended, Error> {
        self.append_once(&sandbox_events(permit.of(SandboxNeed::Act)?)?, body, permit, once).await
    }

    /// Appends what a sandbox is told; under a name, only once. Durable when it returns.
    pub(crate) async fn command_sandbox(
        &self,
        permit: &SandboxPermit,
        body: Bytes,
        once: Option<Once>,
    ) -> Result<Appended, Error> {
        self.append_once(&sandbox_commands(permit.of(SandboxNeed::Write)?)?, body, permit, once).await
    }

    /// Whether a sandbox told something under this name, or was told it, as the permit allows. Refuses a name that was given to
    /// something else.
    pub(crate) async fn sandbox_was_told(&self, permit: &SandboxPermit, once: &Once) -> Result<bool, Error> {
        let topic = match permit.need {
            SandboxNeed::Act => sandbox_events(&permit.id)?,
            SandboxNeed::Read | SandboxNeed::Write => sandbox_commands(&permit.id)?,
        };
        Ok(self.0.store.log.find_dedup_with(&topic, &permit.name(once), once.content).await?.is_some())
    }

    /// Appends what a sandbox told before this server: for the server itself.
    pub(crate) async fn restore_sandbox(&self, id: &str, body: Bytes) -> Result<(), Error> {
        Ok(self.0.store.log.append(Append::new(&sandbox_events(id)?, body)).await.map(drop)?)
    }

    async fn append_once(
        &self,
        topic: &Topic,
        body: Bytes,
        permit: &SandboxPermit,
        once: Option<Once>,
    ) -> Result<Appended, Error> {
        let append = Append::new(topic, body);
        let append = match once {
            Some(once) => append.dedup_with(permit.name(&once), once.content),
            None => append,
        };
        Ok(self.0.store.log.append(append).await?)
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

    /// What is kept of what a sandbox told.
    pub(crate) async fn sandbox_events(&self, id: &str) -> Result<TopicStatus, Error> {
        Ok(self.0.store.log.status(&sandbox_events(id)?).await?)
    }

    /// What is kept of what a sandbox was told.
    pub(crate) async fn sandbox_commands(&self, id: &str) -> Result<TopicStatus, Error> {
        Ok(self.0.store.log.status(&sandbox_commands(id)?).await?)
    }

    /// Removes what a sandbox told and was told.
    pub(crate) async fn forget_sandbox(&self, id: &str) -> Result<(), Error> {
        self.0.store.log.delete(&sandbox_events(id)?).await?;
        self.0.store.log.delete(&sandbox_commands(id)?).await?;
        Ok(())
    }
}

//! The door to streams of UIs.

use bytes::Bytes;
use trunkline_store::log::{Append, Item, Offset, Reader, Topic};

use super::Gate;
use crate::{
    error::{Error, Kind},
    topic::{socket_events, socket_teller},
};

/// To do something with a client's stream.
pub struct UseSocket<'a> {
    pub(crate) client: &'a str,
    pub(crate) need: SocketNeed,
}

/// What somebody wants of a client's stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SocketNeed {
    /// To show it, and to ask the runtime.
    Show,
    /// To be its runtime.
    Serve,
    /// To say what the server itself has to say.
    Note,
}

/// Allows what was asked for, on one client's stream.
#[derive(Clone, Debug)]
pub struct SocketPermit {
    pub(super) client: String,
    pub(super) need: SocketNeed,
}

impl SocketPermit {
    /// Whose stream it is.
    #[must_use]
    pub fn client(&self) -> &str {
        &self.client
    }

    /// The same, for what the server itself has to say in that stream.
    #[must_use]
    pub fn note(&self) -> Self {
        Self { client: self.client.clone(), need: SocketNeed::Note }
    }

    pub(crate) fn topic(&self) -> Result<Option<Topic>, Error> {
        socket_events(&self.client).map(Some)
    }
}

impl Gate {
    pub(crate) fn follow_socket(&self, permit: &SocketPermit, after: u64) -> Result<Reader, Error> {
        let mut reader = self.0.store.log.reader();
        reader.follow_from(&socket_events(&permit.client)?, Offset(after))?;
        Ok(reader)
    }

    /// Appends what a runtime, or the server itself, tells clients, and how far it is.
    pub(crate) async fn tell_sockets(
        &self,
        told: Vec<(SocketPermit, Bytes)>,
        number: Option<(&str, u64)>,
    ) -> Result<(), Error> {
        let mut last: Option<(String, Topic)> = None;
        let mut appends = Vec::with_capacity(told.len() + 1);
        for (permit, body) in told {
            if permit.need == SocketNeed::Show {
                return Err(refused());
            }
            let topic = match last.take() {
                // Most that is told at once is told to one client.
                Some((client, topic)) if client == permit.client => topic,
                _ => socket_events(&permit.client)?,
            };
            appends.push(Append::new(&topic, body));
            last = Some((permit.client, topic));
        }
        if let Some((teller, number)) = number {
            appends.push(Append::new(&socket_teller(teller)?, number.to_string()));
        }
        Ok(self.0.store.log.append_batch(appends).await.map(drop)?)
    }

    /// As [`Gate::tell_sockets`], unless it was told under this name before, within a day.
    pub(crate) async fn tell_socket_once(&self, permit: &SocketPermit, body: Bytes, name: &str) -> Result<(), Error> {
        if permit.need == SocketNeed::Show {
            return Err(refused());
        }
        let append = Append::new(&socket_events(&permit.client)?, body).dedup(name);
        Ok(self.0.store.log.append_batch(vec![append]).await.map(drop)?)
    }

    pub(crate) async fn sockets_told_to(&self, teller: &str) -> Result<u64, Error> {
        let topic = socket_teller(teller)?;
        let tail = self.0.store.log.status(&topic).await?.tail;
        let mut reader = self.0.store.log.reader();
        reader.follow_from(&topic, Offset(tail.0.saturating_sub(1)))?;
        let mut items = Vec::new();
        reader.available_batch(1, &mut items).await?;
        let number = items.iter().rev().find_map(|item| match item {
            Item::Record(record) => str::from_utf8(&record.payload).ok()?.parse().ok(),
            _ => None,
        });
        Ok(number.unwrap_or(0))
    }
}

/// Whoever has nothing to do with a client does not learn whether it is there.
pub(super) fn refused() -> Error {
    Error::new(Kind::Denied, "ERR_PERMISSION_DENIED", "the credential does not open this client")
}

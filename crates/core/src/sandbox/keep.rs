//! A place of one's own for sandboxes: for programs that have a server inside and keep its sessions elsewhere.

use std::{pin::Pin, sync::Arc};

use bytes::Bytes;
use serde_json::value::RawValue;

use super::{Active, Sandbox, Sandboxes, Standing, artifacts::Event, life, lock, state::Status};
use crate::{
    error::{Error, KEY_REUSED, Kind},
    gate::{Once, SandboxPermit},
};

/// Keys of one session that are remembered while somebody is busy with it; beyond it all are forgotten, and what is sent again
/// then is kept again.
const KEYS_MAX: usize = 10_000;

/// Why a store refused, in its words.
pub type StoreError = Box<dyn std::error::Error + Send + Sync>;

/// What a store answers with.
pub type StoreFuture<'a, T> = Pin<Box<dyn Future<Output = Result<T, StoreError>> + Send + 'a>>;

/// What a sandbox told at once.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Told {
    /// When, in Unix milliseconds.
    pub at_ms: i64,
    /// One event or a list of them, as JSON.
    pub events: Bytes,
}

/// Where sessions are kept instead of in the server's own store. What is answered 202 was [appended](SessionStore::append)
/// before, in the order of the events of its session; a refusal is answered as 503. Commands are not kept: those that were
/// not delivered end with the server.
pub trait SessionStore: Send + Sync + 'static {
    /// All sessions, each with what it told, in order. Asked once, at the start.
    fn load(&self) -> StoreFuture<'_, Vec<(Sandbox, Vec<Told>)>>;

    /// Keeps a session that is new or has changed.
    fn save<'a>(&'a self, session: &'a Sandbox) -> StoreFuture<'a, ()>;

    /// Keeps what a session told, behind what it told before.
    fn append<'a>(&'a self, id: &'a str, told: &'a Told) -> StoreFuture<'a, ()>;

    /// Forgets a session and all that it told.
    fn remove<'a>(&'a self, id: &'a str) -> StoreFuture<'a, ()>;
}

/// A store, and the order in which it is asked.
#[derive(Clone)]
pub(super) struct Keeper {
    store: Arc<dyn SessionStore>,
    order: Arc<tokio::sync::Mutex<()>>,
}

impl Keeper {
    pub(super) fn new(store: Arc<dyn SessionStore>) -> Self {
        Self { store, order: Arc::default() }
    }
}

impl Sandboxes {
    /// Keeps what a sandbox tells, first in the store of its own, if there is one. Answers what the log keeps.
    pub(super) async fn keep(
        &self,
        permit: &SandboxPermit,
        id: &str,
        active: &Active,
        events: Bytes,
        once: Option<&Once>,
    ) -> Result<Bytes, Error> {
        let Some(keeper) = &self.0.keeper else { return Ok(events) };
        let told = Told { at_ms: self.now(), events };
        let Some(once) = once else {
            keeper.store.append(id, &told).await.map_err(|e| refused(&*e))?;
            return Ok(dated(&told));
        };
        // What the log has is in the store, too; what the store alone has, the log refused before.
        let name = permit.name(once);
        let kept = lock(&active.kept).get(&name).copied();
        let is_kept = match kept {
            Some(kept) if kept != once.content => return Err(reused()),
            Some(_) => true,
            None => self.0.gate.sandbox_was_told(permit, once).await?,
        };
        if !is_kept {
            keeper.store.append(id, &told).await.map_err(|e| refused(&*e))?;
            let mut kept = lock(&active.kept);
            if kept.len() >= KEYS_MAX {
                kept.clear();
            }
            kept.insert(name, once.content);
        }
        Ok(dated(&told))
    }

    /// Saves a session as it is by now. Of several, the last one is saved last.
    pub(super) async fn save(&self, id: &str) -> Result<(), Error> {
        let Some(keeper) = &self.0.keeper else { return Ok(()) };
        let _order = keeper.order.lock().await;
        match self.standing(id).await? {
            Some(standing) => keeper.store.save(&self.shown(standing.sandbox)).await.map_err(|e| refused(&*e)),
            None => Ok(()),
        }
    }

    pub(super) async fn forget(&self, id: &str) -> Result<(), Error> {
        let Some(keeper) = &self.0.keeper else { return Ok(()) };
        let _order = keeper.order.lock().await;
        keeper.store.remove(id).await.map_err(|e| refused(&*e))
    }

    /// Puts what the store has into a server that has nothing.
    pub(super) async fn load(&self) -> Result<(), Error> {
        let Some(keeper) = &self.0.keeper else { return Ok(()) };
        for (sandbox, told) in keeper.store.load().await.map_err(|e| refused(&*e))? {
            let id = sandbox.id.clone();
            crate::identity::Identity::sandbox(&id)?;
            let since = i64::try_from(self.0.gate.records()).unwrap_or(i64::MAX);
            let version = self.now().saturating_mul(1000);
            // Those that had not come by then have as long again.
            let is_new = sandbox.status == Status::Bootstrapping;
            let due_at = self.after(self.0.options.bootstrap_ms).filter(|_| is_new);
            let row = Standing {
                sandbox,
                due_at,
                since,
                commands_to: since,
                duty: 0,
                removed: false,
                version,
                signs_to: since,
            };
            if !self.0.gate.housekeep(move |tx| life::restore(tx, row.clone())).await? {
                // A directory that was kept as well knows it.
                continue;
            }
            for told in told {
                self.0.gate.restore_sandbox(&id, dated(&told)).await?;
            }
        }
        Ok(())
    }
}

/// Events with the time that they are from, which is not that of their record.
fn dated(told: &Told) -> Bytes {
    let mut bytes = format!("{{\"{AT}\":{},\"{EVENTS}\":", told.at_ms).into_bytes();
    bytes.extend_from_slice(&told.events);
    bytes.push(b'}');
    bytes.into()
}

/// The names of those two. No event is such an object: every event has a type.
const AT: &str = "$at";
const EVENTS: &str = "$events";

/// What a record says, and when that is from.
pub(super) struct Record<'a> {
    /// Unix milliseconds.
    pub(super) at_ms: i64,
    list: List<'a>,
}

enum List<'a> {
    Events(Vec<&'a RawValue>),
    /// No JSON. The server accepts none, but a store of a program's own may have it.
    Other(&'a [u8]),
}

impl<'a> Record<'a> {
    /// Takes a record apart; whatever it is, it is some event.
    pub(super) fn read(payload: &'a [u8], at_ms: i64) -> Self {
        #[derive(serde::Deserialize)]
        #[serde(deny_unknown_fields)]
        struct Dated<'a> {
            #[serde(rename = "$at")]
            at_ms: i64,
            #[serde(rename = "$events", borrow)]
            events: &'a RawValue,
        }
        if payload.starts_with(b"{\"$at\"")
            && let Ok(dated) = serde_json::from_slice::<Dated<'_>>(payload)
        {
            return Self { at_ms: dated.at_ms, list: list(dated.events.get().as_bytes()) };
        }
        Self { at_ms, list: list(payload) }
    }

    /// Its events, each read when it is asked for, with the bytes that it was told in. As [`Events::parse`] takes a body apart,
    /// so that whatever was accepted is read: an event alone, and not for what is wrong with another one.
    ///
    /// [`Events::parse`]: super::Events::parse
    pub(super) fn events(&self) -> impl Iterator<Item = (Event, usize)> {
        let (events, other) = match &self.list {
            List::Events(events) => (&events[..], None),
            List::Other(bytes) => (&[][..], Some(*bytes)),
        };
        let other = other.into_iter().map(|bytes| (Event::unreadable(bytes), bytes.len()));
        events.iter().map(|event| (Event::read(event), event.get().len())).chain(other)
    }
}

fn list(told: &[u8]) -> List<'_> {
    let is_list = told.trim_ascii_start().starts_with(b"[");
    let events = match is_list {
        true => serde_json::from_slice(told),
        false => serde_json::from_slice(told).map(|event| vec![event]),
    };
    events.map_or(List::Other(told), List::Events)
}

fn reused() -> Error {
    Error::new(Kind::Invalid, KEY_REUSED, "this idempotency key was used for other content")
}

fn refused(error: &(dyn std::error::Error + Send + Sync)) -> Error {
    Error::new(Kind::Unavailable, "ERR_SESSION_STORE", format!("the session store refused: {error}"))
}

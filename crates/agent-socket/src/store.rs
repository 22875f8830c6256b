//! Where events are kept, so that whoever was away gets them.

mod memory;
#[cfg(feature = "sqlite")]
mod sql;

use std::{pin::Pin, sync::Arc};

use crate::envelope::Envelope;

pub use memory::MemoryStore;
#[cfg(feature = "sqlite")]
pub use sql::SqliteStore;

/// Events of one client that are kept if nobody asks for more. The published figure.
pub const EVENTS_MAX: usize = 500;

/// Why a store failed, in its words.
pub type StoreError = Box<dyn std::error::Error + Send + Sync>;

/// What a store answers with.
pub type StoreFuture<'a, T> = Pin<Box<dyn Future<Output = Result<T, StoreError>> + Send + 'a>>;

/// Events from a part of a client's stream.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Range {
    /// In order, each with its number.
    pub events: Vec<Envelope>,
    /// What was asked for began before this number, and events up to it are not kept any more.
    pub gone_through: Option<u64>,
    /// There are more in what was asked for.
    pub more: bool,
}

/// How much of a client's stream is kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Keep {
    /// This many events, whoever had them.
    pub events: usize,
    /// Up to this many, if somebody did not have them yet.
    pub events_behind: usize,
}

impl Default for Keep {
    fn default() -> Self {
        Self { events: EVENTS_MAX, events_behind: EVENTS_MAX * 8 }
    }
}

/// Keeps events of clients in order. Numbers of one client's events grow and are never used twice, also when everything was
/// trimmed.
pub trait EventStore: Send + Sync + 'static {
    /// Keeps an event behind all others of its `client_id`, and gives it its number. When it is answered, it is as safe as
    /// this store makes anything.
    fn append(&self, event: Envelope) -> StoreFuture<'_, Envelope>;

    /// Events behind `since`, up to and with `until` if that is given, and at most `max`.
    fn get_since_range<'a>(
        &'a self,
        client_id: &'a str,
        since: u64,
        until: Option<u64>,
        max: usize,
    ) -> StoreFuture<'a, Range>;

    /// All events behind `since`.
    fn get_since<'a>(&'a self, client_id: &'a str, since: u64) -> StoreFuture<'a, Vec<Envelope>> {
        Box::pin(async move { Ok(self.get_since_range(client_id, since, None, usize::MAX).await?.events) })
    }

    /// The number of a client's last event; 0 if it never had one.
    fn latest_seq<'a>(&'a self, client_id: &'a str) -> StoreFuture<'a, u64>;

    /// Forgets what is beyond the store's bounds. What is up to `acked` was had by all who want it; without it, nobody wants
    /// anything.
    fn trim<'a>(&'a self, client_id: &'a str, acked: Option<u64>) -> StoreFuture<'a, ()>;
}

/// A store that several have.
impl<S: EventStore + ?Sized> EventStore for Arc<S> {
    fn append(&self, event: Envelope) -> StoreFuture<'_, Envelope> {
        (**self).append(event)
    }

    fn get_since_range<'a>(
        &'a self,
        client_id: &'a str,
        since: u64,
        until: Option<u64>,
        max: usize,
    ) -> StoreFuture<'a, Range> {
        (**self).get_since_range(client_id, since, until, max)
    }

    fn latest_seq<'a>(&'a self, client_id: &'a str) -> StoreFuture<'a, u64> {
        (**self).latest_seq(client_id)
    }

    fn trim<'a>(&'a self, client_id: &'a str, acked: Option<u64>) -> StoreFuture<'a, ()> {
        (**self).trim(client_id, acked)
    }
}

//! Events in a file: they survive the process, and the machine.

use std::{
    path::Path,
    sync::{Mutex, MutexGuard, PoisonError},
};

use rusqlite::{Connection, OptionalExtension as _, params};

use super::{EventStore, Keep, Range, StoreError, StoreFuture};
use crate::envelope::{Envelope, parse};

const SCHEMA: &str = "
    CREATE TABLE IF NOT EXISTS clients (client TEXT PRIMARY KEY, latest INTEGER NOT NULL, gone_through INTEGER NOT NULL,
        acked INTEGER) WITHOUT ROWID;
    CREATE TABLE IF NOT EXISTS events (client TEXT NOT NULL, seq INTEGER NOT NULL, envelope TEXT NOT NULL,
        PRIMARY KEY (client, seq)) WITHOUT ROWID;";

/// Events are trimmed after so many appends of one client.
const TRIM_EVERY: i64 = 100;

/// Events in an SQLite database. An append is on disk when it is answered; it blocks its thread for as long as the disk takes.
pub struct SqliteStore {
    keep: Keep,
    connection: Mutex<Connection>,
}

impl SqliteStore {
    /// Opens or makes the database.
    ///
    /// # Errors
    /// If it cannot be opened, or is something else.
    pub fn open(path: &Path, keep: Keep) -> Result<Self, StoreError> {
        let connection = Connection::open(path)?;
        connection.pragma_update(None, "journal_mode", "WAL")?;
        connection.pragma_update(None, "synchronous", "FULL")?;
        connection.execute_batch(SCHEMA)?;
        Ok(Self { keep, connection: Mutex::new(connection) })
    }

    fn connection(&self) -> MutexGuard<'_, Connection> {
        self.connection.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn put(&self, mut event: Envelope) -> Result<Envelope, StoreError> {
        let client = event.client_id.clone().ok_or("an event belongs to a client")?;
        let mut connection = self.connection();
        let tx = connection.transaction()?;
        let seq: i64 = tx
            .prepare_cached(
                "INSERT INTO clients (client, latest, gone_through) VALUES (?1, 1, 0)
                    ON CONFLICT (client) DO UPDATE SET latest = latest + 1 RETURNING latest",
            )?
            .query_row([&client], |row| row.get(0))?;
        event.seq = Some(seq.unsigned_abs());
        tx.prepare_cached("INSERT INTO events (client, seq, envelope) VALUES (?1, ?2, ?3)")?.execute(params![
            client,
            seq,
            event.to_json()
        ])?;
        if seq % TRIM_EVERY == 0 {
            trim(&tx, &client, self.keep)?;
        }
        tx.commit()?;
        Ok(event)
    }

    fn range(&self, client: &str, since: u64, until: Option<u64>, max: usize) -> Result<Range, StoreError> {
        let connection = self.connection();
        let gone: Option<i64> = connection
            .prepare_cached("SELECT gone_through FROM clients WHERE client = ?1")?
            .query_row([client], |row| row.get(0))
            .optional()?;
        let gone = gone.unwrap_or(0).unsigned_abs();
        let number = |number: u64| i64::try_from(number).unwrap_or(i64::MAX);
        let most = i64::try_from(max).unwrap_or(i64::MAX).saturating_add(1);
        let mut select = connection.prepare_cached(
            "SELECT envelope FROM events WHERE client = ?1 AND seq > ?2 AND seq <= ?3 ORDER BY seq LIMIT ?4",
        )?;
        let rows = select
            .query_map(params![client, number(since), number(until.unwrap_or(u64::MAX)), most], |row| {
                row.get::<_, String>(0)
            })?;
        let mut events = Vec::new();
        for row in rows {
            events.push(parse(row?.as_bytes())?);
        }
        let more = events.len() > max;
        events.truncate(max);
        Ok(Range { events, gone_through: (since < gone).then_some(gone), more })
    }

    fn latest(&self, client: &str) -> Result<u64, StoreError> {
        let connection = self.connection();
        let latest: Option<i64> = connection
            .prepare_cached("SELECT latest FROM clients WHERE client = ?1")?
            .query_row([client], |row| row.get(0))
            .optional()?;
        Ok(latest.unwrap_or(0).unsigned_abs())
    }

    fn note_acked(&self, client: &str, acked: Option<u64>) -> Result<(), StoreError> {
        let mut connection = self.connection();
        let tx = connection.transaction()?;
        let acked = acked.map(|acked| i64::try_from(acked).unwrap_or(i64::MAX));
        tx.prepare_cached(
            "INSERT INTO clients (client, latest, gone_through, acked) VALUES (?1, 0, 0, ?2)
                ON CONFLICT (client) DO UPDATE SET acked = excluded.acked",
        )?
        .execute(params![client, acked])?;
        trim(&tx, client, self.keep)?;
        Ok(tx.commit()?)
    }
}

/// As the store in memory does it: what all had goes before what somebody wants.
fn trim(tx: &rusqlite::Transaction<'_>, client: &str, keep: Keep) -> Result<(), StoreError> {
    let acked: Option<Option<i64>> = tx
        .prepare_cached("SELECT acked FROM clients WHERE client = ?1")?
        .query_row([client], |row| row.get(0))
        .optional()?;
    let newest_beyond = |count: usize| -> Result<i64, StoreError> {
        let count = i64::try_from(count).unwrap_or(i64::MAX);
        let found = tx
            .prepare_cached("SELECT seq FROM events WHERE client = ?1 ORDER BY seq DESC LIMIT 1 OFFSET ?2")?
            .query_row(params![client, count], |row| row.get(0))
            .optional()?;
        Ok(found.unwrap_or(0))
    };
    let had = acked.flatten().unwrap_or(i64::MAX);
    let through = newest_beyond(keep.events)?.min(had).max(newest_beyond(keep.events_behind)?);
    if through > 0 {
        tx.prepare_cached("DELETE FROM events WHERE client = ?1 AND seq <= ?2")?.execute(params![client, through])?;
        let sql = "UPDATE clients SET gone_through = max(gone_through, ?2) WHERE client = ?1";
        tx.prepare_cached(sql)?.execute(params![client, through])?;
    }
    Ok(())
}

impl EventStore for SqliteStore {
    fn append(&self, event: Envelope) -> StoreFuture<'_, Envelope> {
        let put = self.put(event);
        Box::pin(async move { put })
    }

    fn get_since_range<'a>(
        &'a self,
        client_id: &'a str,
        since: u64,
        until: Option<u64>,
        max: usize,
    ) -> StoreFuture<'a, Range> {
        Box::pin(async move { self.range(client_id, since, until, max) })
    }

    fn latest_seq<'a>(&'a self, client_id: &'a str) -> StoreFuture<'a, u64> {
        Box::pin(async move { self.latest(client_id) })
    }

    fn trim<'a>(&'a self, client_id: &'a str, acked: Option<u64>) -> StoreFuture<'a, ()> {
        Box::pin(async move { self.note_acked(client_id, acked) })
    }
}

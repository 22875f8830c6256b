//! The only way from rows to records: a transaction leaves a row in the outbox, and the relay appends it to the log.
//!
//! A row is removed after its append returned. A crash between the two repeats the append, which the log recognises by
//! its dedup id (the ledger's id and the row's number), so that each row becomes exactly one record.
//!
//! A row that can never be appended (its topic is closed, it is larger than the log takes, it cannot be decoded) is removed
//! with an error in the program's log, so that the rows after it go on. Every other error of the log, a damaged log among
//! them, says nothing about a row: all rows stay, in order, until the log takes appends again.

use std::{sync::atomic::Ordering::SeqCst, time::Duration};

use bytes::Bytes;

use super::{Engine, Error, Ledger, Migration, ReadTx, Row, TxFuture};
use crate::log::{self, Append, Log, Topic};

pub(super) const MIGRATIONS: &[Migration] = &[Migration {
    name: "store_0001_outbox",
    sql: "CREATE TABLE outbox (id AUTO_ID, topic TEXT NOT NULL, payload BYTES NOT NULL)",
}];

pub(super) const INSERT: &str = "INSERT INTO outbox (topic, payload) VALUES ($1, $2)";
/// How long payloads are says the database without reading them.
const SIZES: &str = "SELECT CAST(LENGTH(payload) AS BIGINT) FROM outbox ORDER BY id LIMIT $1";
const NEXT: &str = "SELECT id, topic, payload FROM outbox ORDER BY id LIMIT $1";
const REMOVE: &str = "DELETE FROM outbox WHERE id = $1";
const REMOVE_THROUGH: &str = "DELETE FROM outbox WHERE id <= $1";

/// Rows relayed in one go. Their appends share a batch of the log, their removal a transaction.
const ROWS_MAX: i64 = 1024;

/// Payload bytes after which one go takes no more: rows pile up while the log takes no appends.
const BYTES_MAX: i64 = 8 * 1024 * 1024;

/// Pause before the next attempt when the log or the ledger refuses.
const RETRY_PAUSE: Duration = Duration::from_millis(200);

/// How often rows that other nodes wrote are looked for; those of this process announce themselves. A NOTIFY with each
/// would make PostgreSQL commit their transactions one after the other.
const OTHERS_POLL: Duration = Duration::from_millis(50);

/// What a transaction wants appended.
#[derive(Clone, Debug)]
pub struct Outgoing {
    /// To which topic.
    pub topic: Topic,
    /// What.
    pub payload: Bytes,
}

/// Carries outbox rows to the log, in order: what a transaction sent that began after another had returned comes after
/// what that one sent. One relay a ledger; a second one (while nodes hand over) does no harm.
pub struct Relay {
    ledger: Ledger,
    log: Log,
}

impl Relay {
    /// A relay from `ledger` to `log`.
    #[must_use]
    pub fn new(ledger: Ledger, log: Log) -> Self {
        Self { ledger, log }
    }

    /// Relays until the ledger or the log stops. Rows that wait from before are relayed first.
    pub async fn run(self) {
        loop {
            match self.step().await {
                Ok(0) => self.ledger.outbox_written(OTHERS_POLL).await,
                Ok(_) => {}
                Err(error) if error.is_final() => return,
                Err(error) => {
                    tracing::warn!(%error, "outbox waits");
                    tokio::time::sleep(RETRY_PAUSE).await;
                }
            }
        }
    }

    /// Relays what waits, up to a limit; answers how many rows that was.
    ///
    /// # Errors
    /// What the ledger or the log said; the rows stay.
    pub async fn step(&self) -> Result<usize, RelayError> {
        let written = self.ledger.outbox.commits.load(SeqCst);
        let (rows, is_all) = self.ledger.read(next).await?;
        let ids = rows.iter().map(|row| row.int(0)).collect::<Result<Vec<_>, _>>()?;
        let (mut appends, mut hopeless) = (Vec::with_capacity(rows.len()), Vec::new());
        for (id, row) in ids.iter().zip(&rows) {
            match self.append(*id, row) {
                Ok(append) => appends.push((*id, append)),
                Err(error) => hopeless.push(Hopeless::new(*id, row.text(1).unwrap_or_default(), error)),
            }
        }
        let batch = appends.iter().map(|(_, append)| append.clone()).collect();
        match self.log.append_batch(batch).await {
            Ok(_) | Err(log::Error::Empty) => {}
            // One of them cannot be appended: find out which.
            Err(error) if condemns(&error) => self.one_by_one(appends, &mut hopeless).await?,
            Err(error) => return Err(error.into()),
        }
        let count = ids.len();
        if count > 0 {
            self.remove(ids).await?;
        }
        if is_all {
            self.ledger
                .outbox
                .relayed
                .send_if_modified(|relayed| written > std::mem::replace(relayed, written.max(*relayed)));
        }
        for Hopeless { row, topic, error } in hopeless {
            tracing::error!(%error, row, topic, "outbox row could never be appended and was removed");
        }
        Ok(count)
    }

    /// Where transactions commit one after the other, in the order of their rows, nothing can have come between these.
    async fn remove(&self, ids: Vec<i64>) -> Result<(), Error> {
        let is_serial = matches!(self.ledger.engine, Engine::Sqlite(_));
        let remove = self.ledger.write(move |tx| {
            let ids = ids.clone();
            Box::pin(async move {
                if let Some(last) = ids.last().filter(|_| is_serial) {
                    tx.execute(REMOVE_THROUGH, &[(*last).into()]).await?;
                    return Ok::<_, Error>(());
                }
                for id in ids {
                    tx.execute(REMOVE, &[id.into()]).await?;
                }
                Ok(())
            })
        });
        remove.await
    }

    fn append(&self, id: i64, row: &Row) -> Result<Append, RelayError> {
        let dedup = format!("{}:{id}", self.ledger.id);
        Ok(Append::new(&Topic::new(row.text(1)?)?, row.bytes(2)?.to_vec()).dedup(dedup))
    }

    async fn one_by_one(&self, appends: Vec<(i64, Append)>, hopeless: &mut Vec<Hopeless>) -> Result<(), RelayError> {
        for (id, append) in appends {
            let topic = append.topic.clone();
            match self.log.append(append).await {
                Ok(_) => {}
                Err(error) if condemns(&error) => hopeless.push(Hopeless::new(id, topic.as_str(), error.into())),
                Err(error) => return Err(error.into()),
            }
        }
        Ok(())
    }
}

/// The rows of one go, and whether there are no others.
fn next(tx: &mut ReadTx) -> TxFuture<'_, (Vec<Row>, bool), Error> {
    Box::pin(async move {
        let sizes = tx.query(SIZES, &[ROWS_MAX.into()]).await?;
        let (mut count, mut bytes) = (0_i64, 0);
        for size in &sizes {
            if bytes >= BYTES_MAX {
                break;
            }
            bytes += size.int(0)?;
            count += 1;
        }
        let rows = if count == 0 { Vec::new() } else { tx.query(NEXT, &[count.into()]).await? };
        Ok((rows, count < ROWS_MAX && count == sizes.len() as i64))
    })
}

/// Whether the error is about what is appended and will be the same at every attempt. Whatever else the log says is about
/// the log, and passes or is repaired.
fn condemns(error: &log::Error) -> bool {
    matches!(error, log::Error::TooLarge { .. } | log::Error::InvalidTopic { .. } | log::Error::Closed { .. })
}

/// A row that can never be appended.
struct Hopeless {
    row: i64,
    topic: String,
    error: RelayError,
}

impl Hopeless {
    fn new(row: i64, topic: &str, error: RelayError) -> Self {
        Self { row, topic: topic.to_owned(), error }
    }
}

/// Why the relay could not go on.
#[derive(Clone, Debug, thiserror::Error)]
pub enum RelayError {
    /// The ledger refused.
    #[error(transparent)]
    Ledger(#[from] Error),
    /// The log refused.
    #[error(transparent)]
    Log(#[from] log::Error),
}

impl RelayError {
    fn is_final(&self) -> bool {
        matches!(self, Self::Ledger(Error::Stopped) | Self::Log(log::Error::Stopped))
    }
}

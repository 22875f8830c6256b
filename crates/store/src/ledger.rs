//! The ledger: things that are looked up and changed, as rows.
//!
//! One SQL text serves both engines, within these limits: parameters are `$1`, `$2`, …; values are 64-bit integers,
//! text, floats, bytes and NULL ([`Value`]); booleans are integers 0 and 1; upserts are
//! `INSERT … ON CONFLICT … DO UPDATE … WHERE`; `RETURNING` is there. Where the engines' words differ, migrations use
//! `BYTES` for a column of bytes, `AUTO_ID` for an integer key that counts up and `SORTED_TEXT` for text that sorts by its
//! bytes.
//!
//! - **Durable**: [`Ledger::write`] returns after the commit that holds its transaction was fsynced.
//! - **Isolation**: a write transaction sees no other one's unfinished work, and its reads stay true until it commits.
//! - **All or nothing**: a closure that answers an error leaves nothing behind, outbox rows included.
//! - **Cancellation**: once [`Ledger::write`] was polled, the transaction runs to its end whether or not anybody waits.
//! - **Closures run in place** on the embedded engine: they may await their transaction and nothing else, and should do
//!   no work of their own worth mentioning; one that waits for anything else is refused with [`Error::Waited`].
//!   They can be run again (on the clustered engine, after a serialization failure), so they must not have effects
//!   besides their transaction.
//!
//! ```
//! # async fn demo() -> Result<(), Box<dyn std::error::Error>> {
//! use trunkline_store::ledger::{Error, Ledger, Migration, Options};
//! const SCHEMA: &[Migration] =
//!     &[Migration { name: "0001_pets", sql: "CREATE TABLE pets (name TEXT PRIMARY KEY, legs BIGINT NOT NULL)" }];
//! let dir = tempfile::tempdir()?;
//! let ledger = Ledger::open_sqlite(&dir.path().join("ledger.sqlite"), SCHEMA, Options::default())?;
//! ledger
//!     .write(|tx| {
//!         Box::pin(async move { tx.execute("INSERT INTO pets VALUES ($1, $2)", &["cat".into(), 4.into()]).await })
//!     })
//!     .await?;
//! let legs = ledger
//!     .read(|tx| {
//!         Box::pin(async move {
//!             let row = tx.query_opt("SELECT legs FROM pets WHERE name = $1", &["cat".into()]).await?;
//!             row.map(|row| row.int(0)).transpose()
//!         })
//!     })
//!     .await?;
//! assert_eq!(legs, Some(4));
//! # Ok(()) }
//! # tokio::runtime::Runtime::new().unwrap().block_on(demo()).unwrap();
//! ```

mod dialect;
mod outbox;
mod postgres;
mod schema;
mod sqlite;
mod transaction;

use std::{
    future::Future,
    path::Path,
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering::SeqCst},
    },
    time::Duration,
};

use tokio::sync::{Notify, Semaphore, oneshot, watch};

use crate::{
    Durability,
    fault::{Fault, Faults},
    lease,
};

pub use outbox::{Outgoing, Relay, RelayError};
pub use transaction::{ReadTx, WriteTx};

/// One value of a row or a statement's parameter.
#[derive(Clone, Debug, PartialEq)]
pub enum Value {
    /// NULL.
    Null,
    /// `BIGINT`.
    Int(i64),
    /// `DOUBLE PRECISION`.
    Float(f64),
    /// `TEXT`.
    Text(String),
    /// `BYTES` in migrations.
    Bytes(Vec<u8>),
}

/// One row of an answer.
#[derive(Clone, Debug, PartialEq)]
pub struct Row(pub Vec<Value>);

/// One step of a schema. Applied once, in the order given, and never changed afterwards.
#[derive(Clone, Copy, Debug)]
pub struct Migration {
    /// Unique; the order is that of the list, not of the names.
    pub name: &'static str,
    /// Statements separated by semicolons.
    pub sql: &'static str,
}

/// Read transactions at a time that may take long; see [`Ledger::scan`].
const SCANS_MAX: usize = 2;

/// How a ledger is opened.
#[derive(Clone, Copy, Debug)]
pub struct Options {
    /// What a committed transaction survives. PostgreSQL has a setting of its own for it.
    pub durability: Durability,
    /// Transactions that may wait; the next one waits outside.
    pub queue_max: usize,
}

impl Default for Options {
    fn default() -> Self {
        Self { durability: Durability::default(), queue_max: 4096 }
    }
}

/// What a transaction's closure answers.
pub type TxFuture<'a, T, E> = Pin<Box<dyn Future<Output = Result<T, E>> + Send + 'a>>;

/// A handle on the ledger; clones share it.
#[derive(Clone)]
pub struct Ledger {
    engine: Engine,
    outbox: Arc<Outbox>,
    scans: Arc<Semaphore>,
    faults: Faults,
    id: Arc<str>,
}

/// What is known of outbox rows that this process wrote.
#[derive(Default)]
struct Outbox {
    /// There are some, whether or not anybody waits for the transactions that wrote them.
    written: Notify,
    /// How many transactions wrote some.
    commits: AtomicU64,
    /// The rows of so many of those are records.
    relayed: watch::Sender<u64>,
}

impl Outbox {
    /// A transaction that wrote rows has committed; its caller has not been answered yet.
    fn committed(&self) {
        self.commits.fetch_add(1, SeqCst);
        self.written.notify_one();
    }
}

#[derive(Clone)]
enum Engine {
    Sqlite(sqlite::Sqlite),
    Postgres(postgres::Postgres),
}

/// A write transaction that has its place in the order. It runs to its end whether or not anybody waits.
pub struct Submitted<T, E>(Pending<T, E>);

impl<T, E: From<Error>> Submitted<T, E> {
    /// Waits until it has ended.
    ///
    /// # Errors
    /// As [`Ledger::write`].
    pub async fn ended(self) -> Result<T, E> {
        match self.0 {
            Pending::Queued(answered) => answered.await.map_err(|_| Error::Stopped)?,
            Pending::Ended(ended) => ended,
        }
    }
}

enum Pending<T, E> {
    Queued(oneshot::Receiver<Result<T, E>>),
    Ended(Result<T, E>),
}

impl Ledger {
    /// Opens or creates the ledger in one SQLite file and brings its schema up to date. Blocks.
    ///
    /// # Errors
    /// [`Error::Unavailable`] if the file cannot be used, [`Error::Schema`] if it was migrated otherwise than
    /// `migrations` say (an applied one was changed, or is not known here: a newer version wrote the file).
    pub fn open_sqlite(path: &Path, migrations: &[Migration], options: Options) -> Result<Self, Error> {
        let (outbox, faults) = (Arc::new(Outbox::default()), Faults::default());
        let (engine, id) = sqlite::Sqlite::open(path, &with_own(migrations), options, outbox.clone(), &faults)?;
        Ok(Self::new(Engine::Sqlite(engine), outbox, faults, &id))
    }

    /// Opens the ledger in a PostgreSQL database, given by a connection URL, and brings its schema up to date, while
    /// other nodes that do the same wait.
    ///
    /// # Errors
    /// As [`Ledger::open_sqlite`].
    pub async fn open_postgres(url: &str, migrations: &[Migration], options: Options) -> Result<Self, Error> {
        let outbox = Arc::new(Outbox::default());
        let (engine, id) = postgres::Postgres::open(url, &with_own(migrations), options, outbox.clone()).await?;
        Ok(Self::new(Engine::Postgres(engine), outbox, Faults::default(), &id))
    }

    fn new(engine: Engine, outbox: Arc<Outbox>, faults: Faults, id: &str) -> Self {
        Self { engine, outbox, scans: Arc::new(Semaphore::new(SCANS_MAX)), faults, id: id.into() }
    }

    /// Runs one write transaction; durable when it returns. See the [module documentation](self).
    ///
    /// # Errors
    /// The closure's own, or [`Error`] as its `From`: [`Error::Unavailable`] if the disk refuses the commit (nothing of
    /// it is kept), [`Error::Stopped`].
    pub async fn write<T, E>(
        &self,
        run: impl for<'a> Fn(&'a mut WriteTx) -> TxFuture<'a, T, E> + Send + Sync + 'static,
    ) -> Result<T, E>
    where
        T: Send + 'static,
        E: From<Error> + Send + 'static,
    {
        self.submit(run).await?.ended().await
    }

    /// Hands a write transaction over; what it answers says how it ended. Transactions that one caller submits one
    /// after the other take effect in that order, so that they can be under way at once.
    ///
    /// # Errors
    /// [`Error::Stopped`]; the transaction's own errors come with the future.
    pub async fn submit<T, E>(
        &self,
        run: impl for<'a> Fn(&'a mut WriteTx) -> TxFuture<'a, T, E> + Send + Sync + 'static,
    ) -> Result<Submitted<T, E>, E>
    where
        T: Send + 'static,
        E: From<Error> + Send + 'static,
    {
        let pending = match &self.engine {
            Engine::Sqlite(engine) => Pending::Queued(engine.submit(run).await?),
            // Its transactions run side by side, so the order needs the end of this one.
            Engine::Postgres(engine) => Pending::Ended(engine.write(run).await),
        };
        Ok(Submitted(pending))
    }

    /// Runs one read transaction on a consistent view that holds every commit that returned before.
    ///
    /// # Errors
    /// The closure's own, or [`Error`] as its `From`.
    pub async fn read<T, E>(
        &self,
        run: impl for<'a> Fn(&'a mut ReadTx) -> TxFuture<'a, T, E> + Send + Sync + 'static,
    ) -> Result<T, E>
    where
        T: Send + 'static,
        E: From<Error> + Send + 'static,
    {
        match &self.engine {
            Engine::Sqlite(engine) => engine.read(run).await,
            Engine::Postgres(engine) => engine.read(run).await,
        }
    }

    /// As [`Ledger::read`], for queries whose cost is that of a list and not of a look-up. At most two run at a time, and the
    /// others wait for those; look-ups never wait for a list.
    ///
    /// # Errors
    /// As [`Ledger::read`].
    pub async fn scan<T, E>(
        &self,
        run: impl for<'a> Fn(&'a mut ReadTx) -> TxFuture<'a, T, E> + Send + Sync + 'static,
    ) -> Result<T, E>
    where
        T: Send + 'static,
        E: From<Error> + Send + 'static,
    {
        let place = self.scans.clone().acquire_owned().await.map_err(|_| Error::Stopped)?;
        self.read(move |tx| {
            // The job holds it and not its asker, who may go before the query has ended.
            let _held = &place;
            run(tx)
        })
        .await
    }

    /// Waits until the outbox rows of every write of this process that has returned by now are records: whoever appends past the
    /// outbox to a topic that rows go to comes behind them then. At once if none waits. Waits for ever without a [`Relay`].
    pub async fn outbox_relayed(&self) {
        let through = self.outbox.commits.load(SeqCst);
        // An error would mean that the outbox is gone, which this handle has.
        let _ = self.outbox.relayed.subscribe().wait_for(|relayed| *relayed >= through).await;
    }

    /// See [`crate::Store::guard`].
    pub(crate) fn guard(&self, part: &'static str) -> crate::fault::Guard {
        self.faults.guard(part)
    }

    /// Waits until one of its threads has failed for good. The ledger then answers nothing, or [`Error::Stopped`], and
    /// the process should end with the reason.
    pub async fn failed(&self) -> Fault {
        self.faults.reported().await
    }

    /// Waits for outbox rows; those of other nodes are looked for every `poll`.
    async fn outbox_written(&self, poll: Duration) {
        match &self.engine {
            Engine::Sqlite(_) => self.outbox.written.notified().await,
            // Woken or not, there may be rows.
            Engine::Postgres(_) => drop(tokio::time::timeout(poll, self.outbox.written.notified()).await),
        }
    }

    /// Finishes what waits and closes the file; later calls get [`Error::Stopped`].
    pub async fn stop(&self) {
        match &self.engine {
            Engine::Sqlite(engine) => engine.stop().await,
            Engine::Postgres(engine) => engine.stop().await,
        }
    }
}

/// The store's own tables come first.
fn with_own(migrations: &[Migration]) -> Vec<Migration> {
    [outbox::MIGRATIONS, lease::MIGRATIONS, migrations].concat()
}

/// Why the ledger refused.
#[derive(Clone, Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A constraint of the schema forbids the change; the transaction was undone.
    #[error("constraint violated: {reason}")]
    Constraint {
        /// Which, in the engine's words.
        reason: Arc<str>,
    },
    /// The statement or a value's type is wrong: a mistake in the program.
    #[error("statement refused: {reason}")]
    Statement {
        /// What is wrong with it.
        reason: Arc<str>,
    },
    /// The closure waited for something else than its transaction: a mistake in the program.
    #[error("a transaction awaited something else than its own statements")]
    Waited,
    /// The closure panicked: a mistake in the program. Nothing of the transaction is kept.
    #[error("a transaction panicked")]
    Panicked,
    /// The applied migrations are not those of this version.
    #[error("schema of the ledger: {reason}")]
    Schema {
        /// What differs.
        reason: Arc<str>,
    },
    /// The disk or the database server refused; nothing of the transaction is kept.
    #[error("ledger unavailable: {reason}")]
    Unavailable {
        /// What it said.
        reason: Arc<str>,
    },
    /// The ledger is shutting down.
    #[error("ledger is stopped")]
    Stopped,
}

impl Row {
    /// The integer in this column.
    ///
    /// # Errors
    /// [`Error::Statement`] if it is none.
    pub fn int(&self, column: usize) -> Result<i64, Error> {
        match self.value(column)? {
            Value::Int(value) => Ok(*value),
            other => Err(mismatch(column, "an integer", other)),
        }
    }

    /// The integer in this column, or nothing for NULL.
    ///
    /// # Errors
    /// [`Error::Statement`] if it is neither.
    pub fn int_opt(&self, column: usize) -> Result<Option<i64>, Error> {
        if *self.value(column)? == Value::Null { Ok(None) } else { self.int(column).map(Some) }
    }

    /// The float in this column.
    ///
    /// # Errors
    /// [`Error::Statement`] if it is none.
    pub fn float(&self, column: usize) -> Result<f64, Error> {
        match self.value(column)? {
            Value::Float(value) => Ok(*value),
            other => Err(mismatch(column, "a float", other)),
        }
    }

    /// The text in this column.
    ///
    /// # Errors
    /// [`Error::Statement`] if it is none.
    pub fn text(&self, column: usize) -> Result<&str, Error> {
        match self.value(column)? {
            Value::Text(value) => Ok(value),
            other => Err(mismatch(column, "text", other)),
        }
    }

    /// The bytes in this column.
    ///
    /// # Errors
    /// [`Error::Statement`] if it is none.
    pub fn bytes(&self, column: usize) -> Result<&[u8], Error> {
        match self.value(column)? {
            Value::Bytes(value) => Ok(value),
            other => Err(mismatch(column, "bytes", other)),
        }
    }

    /// The size of its texts and bytes, for those who read until so many.
    #[must_use]
    pub fn bytes_in_all(&self) -> usize {
        let size = |value: &Value| match value {
            Value::Text(text) => text.len(),
            Value::Bytes(bytes) => bytes.len(),
            Value::Null | Value::Int(_) | Value::Float(_) => 8,
        };
        self.0.iter().map(size).sum()
    }

    fn value(&self, column: usize) -> Result<&Value, Error> {
        let missing = || Error::Statement { reason: format!("no column {column} in a row of {}", self.0.len()).into() };
        self.0.get(column).ok_or_else(missing)
    }
}

fn mismatch(column: usize, wanted: &str, found: &Value) -> Error {
    let found = match found {
        Value::Null => "NULL",
        Value::Int(_) => "an integer",
        Value::Float(_) => "a float",
        Value::Text(_) => "text",
        Value::Bytes(_) => "bytes",
    };
    Error::Statement { reason: format!("column {column} holds {found}, not {wanted}").into() }
}

impl From<i64> for Value {
    fn from(value: i64) -> Self {
        Self::Int(value)
    }
}
impl From<f64> for Value {
    fn from(value: f64) -> Self {
        Self::Float(value)
    }
}
impl From<bool> for Value {
    fn from(value: bool) -> Self {
        Self::Int(value.into())
    }
}
impl From<&str> for Value {
    fn from(value: &str) -> Self {
        Self::Text(value.to_owned())
    }
}
impl From<String> for Value {
    fn from(value: String) -> Self {
        Self::Text(value)
    }
}
impl From<&[u8]> for Value {
    fn from(value: &[u8]) -> Self {
        Self::Bytes(value.to_vec())
    }
}
impl From<Vec<u8>> for Value {
    fn from(value: Vec<u8>) -> Self {
        Self::Bytes(value)
    }
}
impl<T: Into<Self>> From<Option<T>> for Value {
    fn from(value: Option<T>) -> Self {
        value.map_or(Self::Null, Into::into)
    }
}

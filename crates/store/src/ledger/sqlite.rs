//! The embedded engine: one thread writes, [`READERS`] threads read, many write transactions share a commit.
//!
//! The writer takes what waits, opens one SQLite transaction, runs each closure in a savepoint of it and commits once:
//! one fsync for all. If SQLite itself rolls that transaction back (a full disk, an I/O error), the rest of the group is
//! refused without being run outside of it. A reader answers each query from a snapshot that is taken after it was asked.
//!
//! A closure that panics gets [`Error::Panicked`] as its answer and leaves nothing behind; its thread goes on.

use std::{
    any::Any,
    collections::HashMap,
    future::Future,
    panic::{AssertUnwindSafe, catch_unwind},
    path::Path,
    pin::pin,
    sync::{Arc, Mutex, PoisonError},
    task::{Context, Poll, Waker},
    time::Duration,
};

use rusqlite::{OpenFlags, config::DbConfig, types::ValueRef};
use tokio::sync::{mpsc, oneshot};
use tokio_util::task::TaskTracker;
use uuid::Uuid;

use super::{
    Durability, Error, Migration, Options, Outbox, ReadTx, Row, TxFuture, Value, WriteTx, dialect, schema, transaction,
};
use crate::fault::Faults;

/// Transactions in one commit at most. Past a few hundred, a larger group only adds latency.
const GROUP_MAX: usize = 1024;

/// Threads that read, each with a connection. Twice as many as [`super::SCANS_MAX`], so that look-ups always find one.
const READERS: usize = 4;

/// How long to wait for a lock that another program (a backup, a shell) holds on the file.
const BUSY_TIMEOUT: Duration = Duration::from_secs(5);

/// Statements kept compiled, a connection. The whole program has a few hundred.
const STATEMENTS_MAX: usize = 512;

/// A job for a thread: runs in place and puts its answer where its asker waits, or says how it ends after the commit.
type ReadJob = Box<dyn FnOnce(&mut ReadTx) + Send>;
type WriteJob = Box<dyn FnOnce(&mut WriteTx) -> Box<dyn Pending> + Send>;

/// A transaction that ran and waits for the commit.
trait Pending: Any {
    fn keeps(&self) -> bool;
    fn finish(self: Box<Self>, committed: Result<(), Error>);
}

struct Ran<T, E> {
    result: Result<T, E>,
    answer: oneshot::Sender<Result<T, E>>,
}

impl<T: 'static, E: From<Error> + 'static> Pending for Ran<T, E> {
    fn keeps(&self) -> bool {
        self.result.is_ok()
    }

    /// Whoever asked may have gone; the transaction stands all the same.
    fn finish(self: Box<Self>, committed: Result<(), Error>) {
        let result = self.result.and_then(|value| committed.map(|()| value).map_err(E::from));
        let _ = self.answer.send(result);
    }
}

enum Job<J> {
    Run(J),
    Stop(oneshot::Sender<()>),
}

#[derive(Clone)]
pub(super) struct Sqlite {
    writes: mpsc::Sender<Job<WriteJob>>,
    reads: mpsc::Sender<Job<ReadJob>>,
    /// The threads that read.
    readers: TaskTracker,
}

impl Sqlite {
    /// Opens the file, migrates it, starts the threads; answers the ledger's id too. `outbox` is raised after each commit
    /// that holds outbox rows.
    pub(super) fn open(
        path: &Path,
        migrations: &[Migration],
        options: Options,
        outbox: Arc<Outbox>,
        faults: &Faults,
    ) -> Result<(Self, String), Error> {
        let mut writer = Connection::open(path, false, options.durability)?;
        writer.migrate(migrations)?;
        let id = writer.id()?;
        let (writes, write_jobs) = mpsc::channel(options.queue_max.max(1));
        let (reads, read_jobs) = mpsc::channel(options.queue_max.max(1));
        let (read_jobs, readers) = (Arc::new(Mutex::new(read_jobs)), TaskTracker::new());
        let no_thread = |e: std::io::Error| unavailable(&format!("cannot start a thread: {e}"));
        for _ in 0..READERS {
            let (connection, jobs) = (Connection::open(path, true, options.durability)?, read_jobs.clone());
            let (running, on_panic) = (readers.token(), faults.guard("ledger reader"));
            let read = move || {
                let _running = (running, on_panic);
                read_loop(connection, &jobs);
            };
            std::thread::Builder::new().name("trunkline-reads".into()).spawn(read).map_err(no_thread)?;
        }
        readers.close();
        let on_panic = faults.guard("ledger writer");
        let write = move || {
            let _on_panic = on_panic;
            write_loop(writer, write_jobs, &outbox);
        };
        std::thread::Builder::new().name("trunkline-ledger".into()).spawn(write).map_err(no_thread)?;
        Ok((Self { writes, reads, readers }, id))
    }

    /// Puts a transaction into the queue.
    pub(super) async fn submit<T, E>(
        &self,
        run: impl for<'a> Fn(&'a mut WriteTx) -> TxFuture<'a, T, E> + Send + Sync + 'static,
    ) -> Result<oneshot::Receiver<Result<T, E>>, Error>
    where
        T: Send + 'static,
        E: From<Error> + Send + 'static,
    {
        let (answer, answered) = oneshot::channel();
        let job: WriteJob = Box::new(move |tx| {
            let result = in_place(|| run(tx));
            Box::new(Ran { result, answer })
        });
        self.writes.send(Job::Run(job)).await.map_err(|_| Error::Stopped)?;
        Ok(answered)
    }

    pub(super) async fn read<T, E>(
        &self,
        run: impl for<'a> Fn(&'a mut ReadTx) -> TxFuture<'a, T, E> + Send + Sync + 'static,
    ) -> Result<T, E>
    where
        T: Send + 'static,
        E: From<Error> + Send + 'static,
    {
        let (answer, answered) = oneshot::channel();
        let job: ReadJob = Box::new(move |tx| {
            // Whoever asked may have gone.
            let _ = answer.send(in_place(|| run(tx)));
        });
        self.reads.send(Job::Run(job)).await.map_err(|_| Error::Stopped)?;
        answered.await.map_err(|_| Error::Stopped)?
    }

    pub(super) async fn stop(&self) {
        let (writer_done, writer_stopped) = oneshot::channel();
        // A thread that is gone already has stopped.
        let _ = self.writes.send(Job::Stop(writer_done)).await;
        let _ = writer_stopped.await;
        let _ = self.reads.send(Job::Stop(oneshot::channel().0)).await;
        self.readers.wait().await;
    }
}

/// Every statement answers at once, so a closure that awaits only its transaction is ready at the first poll.
fn in_place<T, E: From<Error>, F: Future<Output = Result<T, E>>>(run: impl FnOnce() -> F) -> Result<T, E> {
    // What a closure holds goes with it, and what it did to the transaction is undone.
    let polled = catch_unwind(AssertUnwindSafe(|| pin!(run()).poll(&mut Context::from_waker(Waker::noop()))));
    match polled {
        Ok(Poll::Ready(result)) => result,
        Ok(Poll::Pending) => Err(Error::Waited.into()),
        Err(_) => Err(Error::Panicked.into()),
    }
}

fn write_loop(connection: Connection, mut jobs: mpsc::Receiver<Job<WriteJob>>, outbox: &Outbox) {
    let connection = transaction::Connection::Sqlite(connection);
    let mut tx = WriteTx { reads: ReadTx { connection }, wrote_outbox: false };
    while let Some(first) = jobs.blocking_recv() {
        let (group, stop) = gather(first, &mut jobs);
        write_group(&mut tx, group, outbox);
        if let Some(stop) = stop {
            jobs.close();
            drop(tx);
            let _ = stop.send(());
            return;
        }
    }
}

/// One query at a time, so that a long one holds up nobody who waits behind it.
fn read_loop(connection: Connection, jobs: &Mutex<mpsc::Receiver<Job<ReadJob>>>) {
    let mut tx = ReadTx { connection: transaction::Connection::Sqlite(connection) };
    loop {
        let job = {
            // The queue is in order whatever happened to the thread that held it.
            let mut jobs = jobs.lock().unwrap_or_else(PoisonError::into_inner);
            match jobs.blocking_recv() {
                Some(Job::Run(job)) => job,
                Some(Job::Stop(_)) => {
                    // What is queued is still answered; then every reader ends.
                    jobs.close();
                    continue;
                }
                None => return,
            }
        };
        // Without a snapshot each statement still reads a consistent state of its own, so an error here is one of theirs.
        let begun = own(&mut tx.connection).execute("BEGIN", &[]).is_ok();
        job(&mut tx);
        if begun && let Err(error) = own(&mut tx.connection).execute("COMMIT", &[]) {
            tracing::warn!(%error, "ledger snapshot did not end");
        }
    }
}

/// The connection that this engine's threads put into their transactions.
fn own(connection: &mut transaction::Connection) -> &mut Connection {
    match connection {
        transaction::Connection::Sqlite(connection) => connection,
        transaction::Connection::Postgres(_) => unreachable!("the embedded engine has SQLite connections only"),
    }
}

/// What waits, up to a stop.
fn gather<J>(first: Job<J>, jobs: &mut mpsc::Receiver<Job<J>>) -> (Vec<J>, Option<oneshot::Sender<()>>) {
    let mut group = Vec::new();
    let mut next = Some(first);
    while let Some(job) = next {
        match job {
            Job::Run(job) => group.push(job),
            Job::Stop(stop) => return (group, Some(stop)),
        }
        next = if group.len() < GROUP_MAX { jobs.try_recv().ok() } else { None };
    }
    (group, None)
}

/// Runs and commits a group, and answers its callers.
fn write_group(tx: &mut WriteTx, group: Vec<WriteJob>, outbox: &Outbox) {
    let begun = own(&mut tx.reads.connection).execute("BEGIN IMMEDIATE", &[]);
    own(&mut tx.reads.connection).begin_group(begun.err());
    let mut wrote_outbox = false;
    let pending: Vec<_> = group
        .into_iter()
        .map(|job| {
            let ran = in_savepoint(tx, job);
            wrote_outbox |= tx.wrote_outbox && ran.keeps();
            ran
        })
        .collect();
    let connection = own(&mut tx.reads.connection);
    let committed = match connection.end_group() {
        Some(error) => Err(error),
        None => connection.execute("COMMIT", &[]).map(drop),
    };
    if let Err(error) = &committed {
        tracing::error!(%error, "ledger refused a commit; nothing of it is kept");
        if !connection.is_autocommit() {
            // Only an error here would leave the transaction open, and then the next BEGIN says so.
            let _ = connection.execute("ROLLBACK", &[]);
        }
    }
    if committed.is_ok() && wrote_outbox {
        outbox.committed();
    }
    pending.into_iter().for_each(|ran| ran.finish(committed.clone()));
}

/// Runs one job of a group. One that cannot be told apart from the others any more condemns the group.
fn in_savepoint(tx: &mut WriteTx, job: WriteJob) -> Box<dyn Pending> {
    tx.wrote_outbox = false;
    let begun = own(&mut tx.reads.connection).execute("SAVEPOINT one", &[]);
    own(&mut tx.reads.connection).condemn_group(begun);
    let ran = job(tx);
    let connection = own(&mut tx.reads.connection);
    if !connection.is_refusing() {
        let undone = if ran.keeps() { Ok(0) } else { connection.execute("ROLLBACK TO one", &[]) };
        let released = undone.and_then(|_| connection.execute("RELEASE one", &[]));
        connection.condemn_group(released);
    }
    ran
}

/// A connection and its statements, translated once.
pub(super) struct Connection {
    sqlite: rusqlite::Connection,
    translated: HashMap<(usize, usize), String>,
    /// A group of transactions is under way.
    in_group: bool,
    /// Why the group cannot be committed any more: its transaction could not be begun, or SQLite rolled it back by itself.
    /// The statements that follow would run, and be kept, outside of it; they are answered with this.
    refusing: Option<Error>,
}

impl Connection {
    fn open(path: &Path, read_only: bool, durability: Durability) -> Result<Self, Error> {
        let access = if read_only {
            OpenFlags::SQLITE_OPEN_READ_ONLY
        } else {
            OpenFlags::SQLITE_OPEN_READ_WRITE | OpenFlags::SQLITE_OPEN_CREATE
        };
        let flags = access | OpenFlags::SQLITE_OPEN_NO_MUTEX;
        let open = || {
            let sqlite = rusqlite::Connection::open_with_flags(path, flags)?;
            sqlite.busy_timeout(BUSY_TIMEOUT)?;
            if !read_only {
                sqlite.pragma_update(None, "journal_mode", "WAL")?;
            }
            // FULL: the write-ahead log is fsynced with every commit. NORMAL: before it is copied into the database.
            let synchronous = match durability {
                Durability::Machine => "FULL",
                Durability::Process => "NORMAL",
            };
            sqlite.pragma_update(None, "synchronous", synchronous)?;
            sqlite.pragma_update(None, "foreign_keys", true)?;
            // A plan does not depend on what is bound; otherwise some statements are compiled again for each execution.
            sqlite.set_db_config(DbConfig::SQLITE_DBCONFIG_ENABLE_QPSG, true)?;
            sqlite.set_prepared_statement_cache_capacity(STATEMENTS_MAX);
            Ok(Self { sqlite, translated: HashMap::new(), in_group: false, refusing: None })
        };
        open().map_err(|e: rusqlite::Error| match engine_error(&e) {
            Error::Unavailable { reason } => unavailable(&format!("{}: {reason}", path.display())),
            other => other,
        })
    }

    fn is_autocommit(&self) -> bool {
        self.sqlite.is_autocommit()
    }

    fn begin_group(&mut self, refusing: Option<Error>) {
        (self.in_group, self.refusing) = (true, refusing);
    }

    /// Answers why the group cannot be committed, if it cannot.
    fn end_group(&mut self) -> Option<Error> {
        self.in_group = false;
        self.refusing.take()
    }

    fn is_refusing(&self) -> bool {
        self.refusing.is_some()
    }

    fn condemn_group(&mut self, done: Result<u64, Error>) {
        if let Err(error) = done {
            self.refusing.get_or_insert(error);
        }
    }

    /// What an error of a statement means for its group: a full disk, an I/O error and lack of memory can make SQLite roll
    /// back the whole transaction and not just the statement.
    fn refused(&mut self, error: &rusqlite::Error) -> Error {
        let error = engine_error(error);
        if self.in_group && self.sqlite.is_autocommit() {
            self.condemn_group(Err(error.clone()));
        }
        error
    }

    fn run_batch(&mut self, sql: &str) -> Result<(), Error> {
        self.sqlite.execute_batch(sql).map_err(|e| engine_error(&e))
    }

    pub(super) fn query(&mut self, sql: &'static str, params: &[Value]) -> Result<Vec<Row>, Error> {
        if let Some(error) = &self.refusing {
            return Err(error.clone());
        }
        let mut run = || {
            let mut statement = self.sqlite.prepare_cached(translate(&mut self.translated, sql))?;
            let columns = statement.column_count();
            let mut rows = statement.query(rusqlite::params_from_iter(params.iter().map(to_sql)))?;
            let mut all = Vec::new();
            while let Some(row) = rows.next()? {
                let values = (0..columns).map(|column| Ok(from_sql(row.get_ref(column)?)));
                all.push(Row(values.collect::<Result<_, rusqlite::Error>>()?));
            }
            Ok(all)
        };
        let rows = run();
        rows.map_err(|e: rusqlite::Error| self.refused(&e))
    }

    pub(super) fn execute(&mut self, sql: &'static str, params: &[Value]) -> Result<u64, Error> {
        if let Some(error) = &self.refusing {
            return Err(error.clone());
        }
        let mut run = || {
            let mut statement = self.sqlite.prepare_cached(translate(&mut self.translated, sql))?;
            statement.execute(rusqlite::params_from_iter(params.iter().map(to_sql)))
        };
        let rows = run();
        rows.map(|rows| rows as u64).map_err(|e: rusqlite::Error| self.refused(&e))
    }

    /// Applies what is missing, all in one transaction.
    fn migrate(&mut self, migrations: &[Migration]) -> Result<(), Error> {
        self.run_batch(schema::BOOKKEEPING)?;
        self.run_batch("BEGIN IMMEDIATE")?;
        let applied = self.query(schema::APPLIED, &[])?;
        for (position, migration) in schema::missing(&applied, migrations)? {
            self.run_batch(&dialect::sqlite_schema(migration.sql))?;
            let checksum = schema::checksum(migration.sql);
            let params = [(position as i64).into(), migration.name.into(), checksum.into(), schema::now_ms().into()];
            self.execute(schema::RECORD, &params)?;
        }
        self.run_batch("COMMIT")
    }

    fn id(&mut self) -> Result<String, Error> {
        if let Some(row) = self.query(schema::ID, &[])?.first() {
            return Ok(row.text(0)?.to_owned());
        }
        let id = Uuid::new_v4().simple().to_string();
        self.execute(schema::NAME, &[id.as_str().into()])?;
        Ok(id)
    }
}

/// Keyed by where the text lies in the program: statements are constants.
fn translate<'a>(known: &'a mut HashMap<(usize, usize), String>, sql: &'static str) -> &'a str {
    known.entry((sql.as_ptr().addr(), sql.len())).or_insert_with(|| dialect::sqlite_statement(sql))
}

fn to_sql(value: &Value) -> rusqlite::types::ToSqlOutput<'_> {
    use rusqlite::types::ToSqlOutput::Borrowed;
    match value {
        Value::Null => Borrowed(ValueRef::Null),
        Value::Int(value) => Borrowed(ValueRef::Integer(*value)),
        Value::Float(value) => Borrowed(ValueRef::Real(*value)),
        Value::Text(value) => Borrowed(ValueRef::Text(value.as_bytes())),
        Value::Bytes(value) => Borrowed(ValueRef::Blob(value)),
    }
}

fn from_sql(value: ValueRef<'_>) -> Value {
    match value {
        ValueRef::Null => Value::Null,
        ValueRef::Integer(value) => Value::Int(value),
        ValueRef::Real(value) => Value::Float(value),
        ValueRef::Text(value) => Value::Text(String::from_utf8_lossy(value).into_owned()),
        ValueRef::Blob(value) => Value::Bytes(value.to_vec()),
    }
}

fn unavailable(reason: &str) -> Error {
    Error::Unavailable { reason: reason.into() }
}

/// Driver errors become the ledger's own once, here, by code.
fn engine_error(error: &rusqlite::Error) -> Error {
    use rusqlite::ErrorCode::{
        CannotOpen, ConstraintViolation, DatabaseBusy, DatabaseCorrupt, DatabaseLocked, DiskFull, NotADatabase,
        OutOfMemory, PermissionDenied, ReadOnly, SystemIoFailure,
    };
    let reason = || Arc::from(error.to_string());
    match error.sqlite_error_code() {
        Some(ConstraintViolation) => Error::Constraint { reason: reason() },
        Some(
            CannotOpen | DatabaseBusy | DatabaseCorrupt | DatabaseLocked | DiskFull | NotADatabase | OutOfMemory
            | PermissionDenied | ReadOnly | SystemIoFailure,
        ) => Error::Unavailable { reason: reason() },
        _ => Error::Statement { reason: reason() },
    }
}

//! The clustered engine: PostgreSQL over a pool of connections.
//!
//! Write transactions are serializable; one that loses against another is run again from its beginning. Each runs in a
//! task of its own, so that it ends whether or not anybody waits for it.

use std::{
    future::{Future, poll_fn},
    pin::pin,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering::SeqCst},
    },
    task::{Context, Poll, Waker},
    time::Duration,
};

use bytes::BytesMut;
use deadpool_postgres::{Manager, ManagerConfig, Object, Pool, PoolError, RecyclingMethod, Runtime};
use tokio::sync::oneshot;
use tokio_postgres::{
    NoTls,
    error::SqlState,
    types::{IsNull, ToSql, Type, to_sql_checked},
};
use tokio_util::task::TaskTracker;
use uuid::Uuid;

use super::{Error, Migration, Options, Outbox, ReadTx, Row, TxFuture, Value, WriteTx, dialect, schema, transaction};

/// Connections of one node. PostgreSQL's default limit is 100 for all of them together.
const CONNECTIONS_MAX: usize = 16;

/// How often a transaction is run at most before it is given up as [`Error::Unavailable`].
const ATTEMPTS_MAX: u32 = 50;

/// Longest wait for a connection of the pool, and for a new one to be made. Longer means that the server is not there.
const WAIT_TIMEOUT: Duration = Duration::from_secs(30);
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);

/// How long sent bytes may go unacknowledged before the connection counts as broken.
const TCP_TIMEOUT: Duration = Duration::from_secs(10);

/// The server ends a transaction whose node says nothing for so long: one that is cut off must not keep its locks.
/// Closures await statements only, so none is idle on purpose.
const IDLE_TIMEOUT: &str = "-c idle_in_transaction_session_timeout=5s";

/// Key of the advisory lock under which one node migrates while the others wait.
const MIGRATION_LOCK: i64 = 0x7472_756e_6b6c_696e;

#[derive(Clone)]
pub(super) struct Postgres {
    pool: Pool,
    tasks: TaskTracker,
    /// Raised after each commit that holds outbox rows.
    outbox: Arc<Outbox>,
}

impl Postgres {
    /// Connects, migrates; answers the ledger's id too.
    pub(super) async fn open(
        url: &str,
        migrations: &[Migration],
        options: Options,
        outbox: Arc<Outbox>,
    ) -> Result<(Self, String), Error> {
        let mut config: tokio_postgres::Config =
            url.parse().map_err(|e: tokio_postgres::Error| unavailable(&format!("not a PostgreSQL URL: {e}")))?;
        let recycling = ManagerConfig { recycling_method: RecyclingMethod::Fast };
        let given = config.get_options().unwrap_or_default().to_owned();
        config.options(format!("{IDLE_TIMEOUT} {given}")).tcp_user_timeout(TCP_TIMEOUT);
        let pool = Pool::builder(Manager::from_config(config, NoTls, recycling))
            .max_size(CONNECTIONS_MAX.min(options.queue_max.max(1)))
            .runtime(Runtime::Tokio1)
            .wait_timeout(Some(WAIT_TIMEOUT))
            .create_timeout(Some(CONNECT_TIMEOUT))
            .build()
            .map_err(|e| unavailable(&e.to_string()))?;
        let id = Connection::begin(&pool, "BEGIN").await?.migrate(migrations).await?;
        Ok((Self { pool, tasks: TaskTracker::new(), outbox }, id))
    }

    pub(super) async fn write<T, E>(
        &self,
        run: impl for<'a> Fn(&'a mut WriteTx) -> TxFuture<'a, T, E> + Send + Sync + 'static,
    ) -> Result<T, E>
    where
        T: Send + 'static,
        E: From<Error> + Send + 'static,
    {
        let outbox = self.outbox.clone();
        self.in_task(move |pool| async move {
            let mut attempt = 1;
            loop {
                match write_once(&pool, &run).await {
                    Attempt::Done(result) => {
                        return result.map(|(value, wrote_outbox)| {
                            if wrote_outbox {
                                outbox.committed();
                            }
                            value
                        });
                    }
                    Attempt::Lost if attempt < ATTEMPTS_MAX => attempt += 1,
                    Attempt::Lost => return Err(unavailable("the transaction lost against others too often").into()),
                }
                // Spread out those that lost against each other; the id's random bits are as good as any.
                let spread = Uuid::new_v4().as_u128() as u64 % (500 << attempt.min(7));
                tokio::time::sleep(Duration::from_micros(spread)).await;
            }
        })
        .await
    }

    pub(super) async fn read<T, E>(
        &self,
        run: impl for<'a> Fn(&'a mut ReadTx) -> TxFuture<'a, T, E> + Send + Sync + 'static,
    ) -> Result<T, E>
    where
        T: Send + 'static,
        E: From<Error> + Send + 'static,
    {
        self.in_task(move |pool| async move {
            let connection = Connection::begin(&pool, "BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY").await?;
            let waits = connection.waits.clone();
            let mut tx = ReadTx { connection: transaction::Connection::Postgres(connection) };
            let result = only_statements(&waits, run(&mut tx)).await;
            if let transaction::Connection::Postgres(connection) = &mut tx.connection {
                connection.end_unheard();
            }
            result
        })
        .await
    }

    pub(super) async fn stop(&self) {
        self.tasks.close();
        self.tasks.wait().await;
        self.pool.close();
    }

    async fn in_task<T, E, F>(&self, run: impl FnOnce(Pool) -> F + Send + 'static) -> Result<T, E>
    where
        T: Send + 'static,
        E: From<Error> + Send + 'static,
        F: Future<Output = Result<T, E>> + Send,
    {
        if self.tasks.is_closed() {
            return Err(Error::Stopped.into());
        }
        let (answer, answered) = oneshot::channel();
        let pool = self.pool.clone();
        self.tasks.spawn(async move {
            // Whoever asked may have gone; the transaction stands all the same.
            let _ = answer.send(run(pool).await);
        });
        // The task ends without an answer only if its closure panics; its connection is closed then.
        answered.await.map_err(|_| Error::Panicked)?
    }
}

enum Attempt<T> {
    Done(T),
    Lost,
}

async fn write_once<T, E>(
    pool: &Pool,
    run: &(impl for<'a> Fn(&'a mut WriteTx) -> TxFuture<'a, T, E> + Send + Sync),
) -> Attempt<Result<(T, bool), E>>
where
    E: From<Error>,
{
    let connection = match Connection::begin(pool, "BEGIN ISOLATION LEVEL SERIALIZABLE").await {
        Ok(connection) => connection,
        Err(error) => return Attempt::Done(Err(error.into())),
    };
    let waits = connection.waits.clone();
    let reads = ReadTx { connection: transaction::Connection::Postgres(connection) };
    let mut tx = WriteTx { reads, wrote_outbox: false };
    let result = only_statements(&waits, run(&mut tx)).await;
    let wrote_outbox = tx.wrote_outbox;
    let transaction::Connection::Postgres(mut connection) = tx.reads.connection else {
        return Attempt::Done(Err(Error::Stopped.into()));
    };
    let end = if result.is_ok() { "COMMIT" } else { "ROLLBACK" };
    let ended = connection.end(end).await;
    if connection.lost {
        return Attempt::Lost;
    }
    Attempt::Done(result.and_then(|value| ended.map(|()| (value, wrote_outbox)).map_err(E::from)))
}

/// Refuses a closure that waits for something else than a statement, as the embedded engine has to.
async fn only_statements<T, E: From<Error>>(
    waits: &AtomicBool,
    closure: impl Future<Output = Result<T, E>>,
) -> Result<T, E> {
    let mut closure = pin!(closure);
    poll_fn(|cx| match closure.as_mut().poll(cx) {
        Poll::Pending if !waits.load(SeqCst) => Poll::Ready(Err(Error::Waited.into())),
        polled => polled,
    })
    .await
}

/// A connection that is taken out of the pool for one transaction. Dropped in the middle of it, it is closed instead of
/// going back.
pub(super) struct Connection {
    client: Option<Object>,
    /// How the transaction begins; sent together with the first statement, which saves a round trip.
    begin: Option<&'static str>,
    in_transaction: bool,
    /// A statement is under way.
    waits: Arc<AtomicBool>,
    /// The transaction lost against another one and can be run again.
    lost: bool,
}

impl Connection {
    async fn begin(pool: &Pool, begin: &'static str) -> Result<Self, Error> {
        let client = pool.get().await.map_err(|error| match error {
            PoolError::Closed => Error::Stopped,
            PoolError::Backend(error) => engine_error(&error),
            other => unavailable(&other.to_string()),
        })?;
        let begin = Some(begin);
        Ok(Self { client: Some(client), begin, in_transaction: false, waits: Arc::default(), lost: false })
    }

    pub(super) async fn query(&mut self, sql: &str, params: &[Value]) -> Result<Vec<Row>, Error> {
        self.wait(async |client| {
            let statement = client.prepare_cached(sql).await?;
            let params: Vec<&(dyn ToSql + Sync)> = params.iter().map(|value| value as _).collect();
            client.query(&statement, &params).await
        })
        .await?
        .iter()
        .map(from_row)
        .collect()
    }

    pub(super) async fn execute(&mut self, sql: &str, params: &[Value]) -> Result<u64, Error> {
        self.wait(async |client| {
            let statement = client.prepare_cached(sql).await?;
            let params: Vec<&(dyn ToSql + Sync)> = params.iter().map(|value| value as _).collect();
            client.execute(&statement, &params).await
        })
        .await
    }

    async fn batch(&mut self, sql: &str) -> Result<(), Error> {
        self.wait(async |client| client.batch_execute(sql).await).await
    }

    async fn end(&mut self, sql: &'static str) -> Result<(), Error> {
        if !self.in_transaction {
            return Ok(());
        }
        let ended = self.batch(sql).await;
        // A commit that lost has ended its transaction too.
        self.in_transaction = ended.is_err() && !self.lost;
        ended
    }

    /// Ends a transaction that only read: nobody needs to know how that ended, so nobody waits.
    fn end_unheard(&mut self) {
        if let Some(client) = self.client.as_ref().filter(|_| self.in_transaction) {
            // The first poll sends it; whoever has the connection next is heard after it.
            let _ = pin!(client.batch_execute("COMMIT")).poll(&mut Context::from_waker(Waker::noop()));
            self.in_transaction = false;
        }
    }

    async fn wait<T>(
        &mut self,
        statement: impl AsyncFnOnce(&Object) -> Result<T, tokio_postgres::Error>,
    ) -> Result<T, Error> {
        let client = self.client.as_ref().ok_or(Error::Stopped)?;
        let begin = self.begin.take();
        self.in_transaction = true;
        self.waits.store(true, SeqCst);
        let begun = async {
            match begin {
                Some(begin) => client.batch_execute(begin).await,
                None => Ok(()),
            }
        };
        // Each sends with its first poll, so the order of polls is that of the statements.
        let (begun, result) = tokio::join!(biased; begun, statement(client));
        self.waits.store(false, SeqCst);
        begun.and(result).map_err(|error| {
            let conflicts = [SqlState::T_R_SERIALIZATION_FAILURE, SqlState::T_R_DEADLOCK_DETECTED];
            self.lost |= error.code().is_some_and(|code| conflicts.contains(code));
            engine_error(&error)
        })
    }

    async fn migrate(&mut self, migrations: &[Migration]) -> Result<String, Error> {
        self.query("SELECT 1 FROM pg_advisory_xact_lock($1)", &[MIGRATION_LOCK.into()]).await?;
        self.batch(schema::BOOKKEEPING).await?;
        let applied = self.query(schema::APPLIED, &[]).await?;
        for (position, migration) in schema::missing(&applied, migrations)? {
            self.batch(&dialect::postgres_schema(migration.sql)).await?;
            let checksum = schema::checksum(migration.sql);
            let params = [(position as i64).into(), migration.name.into(), checksum.into(), schema::now_ms().into()];
            self.execute(schema::RECORD, &params).await?;
        }
        let id = match self.query(schema::ID, &[]).await?.first() {
            Some(row) => row.text(0)?.to_owned(),
            None => {
                let id = Uuid::new_v4().simple().to_string();
                self.execute(schema::NAME, &[id.as_str().into()]).await?;
                id
            }
        };
        self.end("COMMIT").await?;
        Ok(id)
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        if self.in_transaction
            && let Some(client) = self.client.take()
        {
            drop(Object::take(client));
        }
    }
}

fn from_row(row: &tokio_postgres::Row) -> Result<Row, Error> {
    let value = |(index, column): (usize, &tokio_postgres::Column)| {
        let wrong = |e: tokio_postgres::Error| Error::Statement { reason: e.to_string().into() };
        Ok(match *column.type_() {
            Type::INT8 => row.try_get::<_, Option<i64>>(index).map_err(wrong)?.into(),
            Type::INT4 => row.try_get::<_, Option<i32>>(index).map_err(wrong)?.map(i64::from).into(),
            Type::FLOAT8 => row.try_get::<_, Option<f64>>(index).map_err(wrong)?.into(),
            Type::TEXT | Type::VARCHAR | Type::NAME => row.try_get::<_, Option<String>>(index).map_err(wrong)?.into(),
            Type::BYTEA => row.try_get::<_, Option<Vec<u8>>>(index).map_err(wrong)?.into(),
            ref other => {
                let reason = format!("column {} is of type {other}, which SQLite does not have", column.name());
                return Err(Error::Statement { reason: reason.into() });
            }
        })
    };
    row.columns().iter().enumerate().map(value).collect::<Result<_, _>>().map(Row)
}

impl ToSql for Value {
    fn to_sql(&self, ty: &Type, out: &mut BytesMut) -> Result<IsNull, Box<dyn std::error::Error + Sync + Send>> {
        match self {
            Self::Null => Ok(IsNull::Yes),
            Self::Int(value) if *ty == Type::INT4 => i32::try_from(*value)?.to_sql(ty, out),
            Self::Int(value) if *ty == Type::INT8 => value.to_sql(ty, out),
            Self::Float(value) if *ty == Type::FLOAT8 => value.to_sql(ty, out),
            Self::Text(value) if matches!(*ty, Type::TEXT | Type::VARCHAR) => value.to_sql(ty, out),
            Self::Bytes(value) if *ty == Type::BYTEA => value.to_sql(ty, out),
            other => Err(format!("{other:?} where {ty} is expected").into()),
        }
    }

    fn accepts(_: &Type) -> bool {
        true
    }

    to_sql_checked!();
}

fn unavailable(reason: &str) -> Error {
    Error::Unavailable { reason: reason.into() }
}

/// Driver errors become the ledger's own once, here, by the class of their code.
fn engine_error(error: &tokio_postgres::Error) -> Error {
    let reason: Arc<str> = error.as_db_error().map_or_else(|| error.to_string(), ToString::to_string).into();
    match error.code().map(|code| &code.code()[..2]) {
        Some("23") => Error::Constraint { reason },
        // Connection, transaction rollback, resources, intervention by an operator, system.
        Some("08" | "40" | "53" | "57" | "58") => Error::Unavailable { reason },
        Some(_) => Error::Statement { reason },
        None if error.is_closed() => Error::Unavailable { reason },
        None => match std::error::Error::source(error) {
            Some(source) if source.is::<std::io::Error>() => Error::Unavailable { reason: source.to_string().into() },
            Some(source) => Error::Statement { reason: format!("{reason}: {source}").into() },
            None => Error::Unavailable { reason },
        },
    }
}

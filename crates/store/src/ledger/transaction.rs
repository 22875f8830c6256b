//! What a transaction can do: query, and in a write transaction also change rows and write to the outbox.

use super::{Error, Outgoing, Row, Value, outbox, postgres, sqlite};

/// A read transaction.
pub struct ReadTx {
    pub(super) connection: Connection,
}

/// What a transaction runs on.
pub(super) enum Connection {
    Sqlite(sqlite::Connection),
    Postgres(postgres::Connection),
}

/// A write transaction.
pub struct WriteTx {
    pub(super) reads: ReadTx,
    pub(super) wrote_outbox: bool,
}

impl ReadTx {
    /// All rows of a query.
    ///
    /// # Errors
    /// [`Error::Statement`] or [`Error::Unavailable`].
    pub async fn query(&mut self, sql: &'static str, params: &[Value]) -> Result<Vec<Row>, Error> {
        match &mut self.connection {
            Connection::Sqlite(connection) => connection.query(sql, params),
            Connection::Postgres(connection) => connection.query(sql, params).await,
        }
    }

    /// The first row of a query, if there is one.
    ///
    /// # Errors
    /// As [`ReadTx::query`].
    pub async fn query_opt(&mut self, sql: &'static str, params: &[Value]) -> Result<Option<Row>, Error> {
        Ok(self.query(sql, params).await?.into_iter().next())
    }
}

impl WriteTx {
    /// The same transaction, for reading.
    pub fn as_read(&mut self) -> &mut ReadTx {
        &mut self.reads
    }

    /// All rows of a query, or of a change with `RETURNING`.
    ///
    /// # Errors
    /// [`Error::Constraint`], [`Error::Statement`] or [`Error::Unavailable`].
    pub async fn query(&mut self, sql: &'static str, params: &[Value]) -> Result<Vec<Row>, Error> {
        self.reads.query(sql, params).await
    }

    /// The first row of a query, if there is one.
    ///
    /// # Errors
    /// As [`WriteTx::query`].
    pub async fn query_opt(&mut self, sql: &'static str, params: &[Value]) -> Result<Option<Row>, Error> {
        self.reads.query_opt(sql, params).await
    }

    /// Runs a change; answers how many rows it touched.
    ///
    /// # Errors
    /// As [`WriteTx::query`].
    pub async fn execute(&mut self, sql: &'static str, params: &[Value]) -> Result<u64, Error> {
        match &mut self.reads.connection {
            Connection::Sqlite(connection) => connection.execute(sql, params),
            Connection::Postgres(connection) => connection.execute(sql, params).await,
        }
    }

    /// Has `outgoing` appended to the log once this transaction has committed: exactly once, after what
    /// transactions sent that returned before this one began, also if the process is killed in between.
    ///
    /// # Errors
    /// As [`WriteTx::execute`].
    pub async fn send(&mut self, outgoing: &Outgoing) -> Result<(), Error> {
        self.wrote_outbox = true;
        let params = [outgoing.topic.as_str().into(), outgoing.payload.as_ref().into()];
        self.execute(outbox::INSERT, &params).await.map(drop)
    }
}

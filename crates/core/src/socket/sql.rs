//! Rows of what clients ask of runtimes, and checkpoints of what was told them.

use std::collections::HashSet;

use bytes::Bytes;
use trunkline_store::{
    ledger::{Error as LedgerError, Migration, Outgoing, ReadTx, Row, TxFuture, WriteTx},
    log::{Cursor, Epoch, Topic},
};

use super::{ASKS_BYTES_MAX, ASKS_MAX, Aim, Ask, Asked};
use crate::error::{Error, Kind};

pub(crate) const MIGRATIONS: &[Migration] = &[
    Migration {
    name: "socket_0001_sockets",
    sql: "CREATE TABLE socket_asks (number AUTO_ID, client TEXT NOT NULL, socket TEXT NOT NULL, kind TEXT NOT NULL,
            turn TEXT NOT NULL, body TEXT NOT NULL, asked_at BIGINT NOT NULL, begins BIGINT NOT NULL, taken BIGINT NOT NULL);
        CREATE UNIQUE INDEX socket_asks_turn ON socket_asks (client, turn) WHERE begins = 1 AND turn <> '';
        CREATE INDEX socket_asks_waiting ON socket_asks (client) WHERE taken <> 1;
        CREATE INDEX socket_asks_asked_at ON socket_asks (asked_at);
        CREATE TABLE socket_folds (client TEXT PRIMARY KEY, epoch TEXT NOT NULL, folded_to BIGINT NOT NULL,
            state TEXT NOT NULL)",
    },
    // What requests take is counted, and what waits is found, without reading their bodies.
    Migration {
        name: "socket_0002_bytes",
        sql: "ALTER TABLE socket_asks ADD COLUMN bytes BIGINT NOT NULL DEFAULT 0;
            UPDATE socket_asks SET bytes = LENGTH(body);
            DROP INDEX socket_asks_waiting;
            CREATE INDEX socket_asks_kept ON socket_asks (client, bytes) WHERE taken <> 1;
            CREATE INDEX socket_asks_free ON socket_asks (number, client, bytes) WHERE taken = 0;
            ALTER TABLE socket_folds ADD COLUMN kept_at BIGINT NOT NULL DEFAULT 0;
            CREATE INDEX socket_folds_kept_at ON socket_folds (kept_at)",
    },
    // What clients ask has ids by which it is taken once.
    Migration {
        name: "socket_0003_requests",
        sql: "ALTER TABLE socket_asks ADD COLUMN request TEXT NOT NULL DEFAULT '';
            CREATE UNIQUE INDEX socket_asks_request ON socket_asks (client, request) WHERE request <> ''",
    },
    Migration {
        name: "socket_0004_acks",
        sql: "CREATE TABLE socket_acks (client TEXT NOT NULL, socket TEXT NOT NULL, seq BIGINT NOT NULL, acked_at BIGINT NOT NULL,
                PRIMARY KEY (client, socket));
            CREATE INDEX socket_acks_acked_at ON socket_acks (acked_at)",
    },
];

/// What `taken` says: nobody has it; a runtime was sent it; that runtime said something of it.
const WAITS: i64 = 0;
const CLAIMED: i64 = 2;
const TAKEN: i64 = 1;

/// Sockets of one client whose acknowledgements are kept.
const ACKS_MAX: i64 = 100;

/// Rows that one transaction forgets of each kind: bodies are removed with them.
const SWEEP: i64 = 64;

/// A request that waits, without what it says.
pub(super) struct Waiting {
    pub(super) number: i64,
    pub(super) client: String,
    pub(super) bytes: i64,
}

/// Keeps what is asked, or finds that it need not be kept.
pub(super) fn ask(
    tx: &mut WriteTx,
    ask: Ask,
    aim: Aim,
    now: i64,
    told: Option<(Topic, Bytes)>,
) -> TxFuture<'_, Asked, Error> {
    Box::pin(async move {
        if knows(tx.as_read(), &ask.client, &ask.request).await? {
            return Ok(Asked::Known);
        }
        if aim == Aim::Stop && !ask.turn.is_empty() {
            let sql = "UPDATE socket_asks SET taken = 1 WHERE client = $1 AND turn = $2 AND begins = 1 AND taken = 0";
            if tx.execute(sql, &[ask.client.as_str().into(), ask.turn.as_str().into()]).await? > 0 {
                if !ask.request.is_empty() {
                    insert(tx, Ask { body: String::new(), ..ask }, false, TAKEN, now).await?;
                }
                send(tx, told).await?;
                return Ok(Asked::Stopped);
            }
        }
        let bytes = i64::try_from(ask.body.len()).unwrap_or(i64::MAX);
        let sql = "SELECT COUNT(*), CAST(COALESCE(SUM(bytes), 0) AS BIGINT) FROM socket_asks WHERE client = $1 AND taken <> 1";
        let waiting = tx.query_opt(sql, &[ask.client.as_str().into()]).await?;
        let (count, kept) = waiting.map_or(Ok((0, 0)), |row| Ok::<_, LedgerError>((row.int(0)?, row.int(1)?)))?;
        if count >= ASKS_MAX || kept.saturating_add(bytes) > ASKS_BYTES_MAX {
            let why = format!(
                "{count} things of {kept} bytes that this client asked wait for a runtime, or for its word that it has them; \
                 at most {ASKS_MAX} and {ASKS_BYTES_MAX} bytes are kept"
            );
            return Err(Error::new(Kind::Exhausted, "ERR_QUOTA_001", why));
        }
        if !insert(tx, ask, aim == Aim::Begin, WAITS, now).await? {
            return Ok(Asked::Known);
        }
        if aim == Aim::Begin {
            send(tx, told).await?;
        }
        Ok(Asked::Waits)
    })
}

/// Whether a request was taken before: also one of a client that has no room for another.
pub(super) fn is_known(tx: &mut ReadTx, (client, request): (String, String)) -> TxFuture<'_, bool, LedgerError> {
    Box::pin(async move { knows(tx, &client, &request).await })
}

async fn knows(tx: &mut ReadTx, client: &str, request: &str) -> Result<bool, LedgerError> {
    if request.is_empty() {
        return Ok(false);
    }
    let sql = "SELECT 1 FROM socket_asks WHERE client = $1 AND request = $2 AND request <> ''";
    Ok(tx.query_opt(sql, &[client.into(), request.into()]).await?.is_some())
}

/// False if it is there, or the turn that it begins.
async fn insert(tx: &mut WriteTx, ask: Ask, begins: bool, taken: i64, now: i64) -> Result<bool, LedgerError> {
    let bytes = i64::try_from(ask.body.len()).unwrap_or(i64::MAX);
    let sql = "INSERT INTO socket_asks (client, socket, kind, turn, request, body, asked_at, begins, taken, bytes)
        VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10) ON CONFLICT DO NOTHING";
    let params = [
        ask.client.into(),
        ask.socket.into(),
        ask.kind.into(),
        ask.turn.into(),
        ask.request.into(),
        ask.body.into(),
        now.into(),
        i64::from(begins).into(),
        taken.into(),
        bytes.into(),
    ];
    Ok(tx.execute(sql, &params).await? > 0)
}

async fn send(tx: &mut WriteTx, told: Option<(Topic, Bytes)>) -> Result<(), Error> {
    let Some((topic, payload)) = told else { return Ok(()) };
    Ok(tx.send(&Outgoing { topic, payload }).await?)
}

/// What nobody took, behind a number: numbers, clients and sizes.
pub(super) fn waiting(tx: &mut ReadTx, after: i64, most: i64) -> TxFuture<'_, Vec<Waiting>, LedgerError> {
    Box::pin(async move {
        let sql =
            "SELECT number, client, bytes FROM socket_asks WHERE taken = 0 AND number > $1 ORDER BY number LIMIT $2";
        let rows = tx.query(sql, &[after.into(), most.into()]).await?;
        let waiting =
            |row: &Row| Ok(Waiting { number: row.int(0)?, client: row.text(1)?.to_owned(), bytes: row.int(2)? });
        rows.iter().map(waiting).collect()
    })
}

/// The first request of each client that nobody took.
pub(super) fn first_waiting(tx: &mut ReadTx) -> TxFuture<'_, Vec<(String, i64)>, LedgerError> {
    Box::pin(async move {
        let sql = "SELECT client, MIN(number) FROM socket_asks WHERE taken = 0 GROUP BY client";
        let rows = tx.query(sql, &[]).await?;
        rows.iter().map(|row| Ok((row.text(0)?.to_owned(), row.int(1)?))).collect()
    })
}

/// Those of them that nobody had, which are now somebody's.
pub(super) fn claim(tx: &mut WriteTx, numbers: Vec<i64>) -> TxFuture<'_, Vec<Ask>, Error> {
    Box::pin(async move {
        let mut claimed = Vec::new();
        for number in numbers {
            let sql = "UPDATE socket_asks SET taken = $2 WHERE number = $1 AND taken = $3
                RETURNING client, socket, kind, turn, request, body";
            if let Some(row) = tx.query_opt(sql, &[number.into(), CLAIMED.into(), WAITS.into()]).await? {
                let text = |column| row.text(column).map(ToOwned::to_owned);
                let (client, socket, kind) = (text(0)?, text(1)?, text(2)?);
                claimed.push(Ask { number, client, socket, kind, turn: text(3)?, request: text(4)?, body: text(5)? });
            }
        }
        Ok(claimed)
    })
}

/// Those of them that were claimed and never taken, or all such, are nobody's again.
pub(super) fn release(tx: &mut WriteTx, numbers: Option<Vec<i64>>) -> TxFuture<'_, (), Error> {
    Box::pin(async move {
        let Some(numbers) = numbers else {
            tx.execute("UPDATE socket_asks SET taken = $1 WHERE taken = $2", &[WAITS.into(), CLAIMED.into()]).await?;
            return Ok(());
        };
        for number in numbers {
            let sql = "UPDATE socket_asks SET taken = $2 WHERE number = $1 AND taken = $3";
            tx.execute(sql, &[number.into(), WAITS.into(), CLAIMED.into()]).await?;
        }
        Ok(())
    })
}

/// Turns of a client that nobody took.
pub(super) fn waiting_turns(tx: &mut ReadTx, client: String) -> TxFuture<'_, HashSet<String>, LedgerError> {
    Box::pin(async move {
        let sql = "SELECT turn FROM socket_asks WHERE client = $1 AND begins = 1 AND taken <> 1";
        let rows = tx.query(sql, &[client.into()]).await?;
        rows.iter().map(|row| row.text(0).map(ToOwned::to_owned)).collect()
    })
}

pub(super) fn took(tx: &mut WriteTx, numbers: Vec<i64>) -> TxFuture<'_, (), Error> {
    Box::pin(async move {
        for number in numbers {
            tx.execute("UPDATE socket_asks SET taken = 1 WHERE number = $1", &[number.into()]).await?;
        }
        Ok(())
    })
}

/// Forgets what was taken before `taken`, and some of what nobody took, and of how clients stood, since before `left`; answers
/// how many requests nobody took, and whether there is more.
pub(super) fn sweep(tx: &mut WriteTx, now: i64, taken: i64, left: Option<i64>) -> TxFuture<'_, (u64, bool), Error> {
    Box::pin(async move {
        let sql = "DELETE FROM socket_asks WHERE number IN
            (SELECT number FROM socket_asks WHERE asked_at < $1 AND taken = 1 LIMIT $2)";
        let forgotten = tx.execute(sql, &[taken.into(), SWEEP.into()]).await?;
        let Some(left) = left else { return Ok((0, forgotten >= SWEEP.unsigned_abs())) };
        let sql = "DELETE FROM socket_asks WHERE number IN
            (SELECT number FROM socket_asks WHERE asked_at < $1 AND taken = 0 LIMIT $2)";
        let untaken = tx.execute(sql, &[left.into(), SWEEP.into()]).await?;
        // Those of before the column are from now.
        let sql = "UPDATE socket_folds SET kept_at = $1 WHERE client IN
            (SELECT client FROM socket_folds WHERE kept_at = 0 LIMIT $2)";
        tx.execute(sql, &[now.into(), SWEEP.into()]).await?;
        let sql = "DELETE FROM socket_folds WHERE client IN
            (SELECT client FROM socket_folds WHERE kept_at < $1 AND kept_at > 0 LIMIT $2)";
        let folds = tx.execute(sql, &[left.into(), SWEEP.into()]).await?;
        let sql = "DELETE FROM socket_acks WHERE (client, socket) IN
            (SELECT client, socket FROM socket_acks WHERE acked_at < $1 LIMIT $2)";
        let acks = tx.execute(sql, &[left.into(), SWEEP.into()]).await?;
        Ok((untaken, [forgotten, untaken, folds, acks].into_iter().any(|count| count >= SWEEP.unsigned_abs())))
    })
}

/// Bytes of all that waits, or was sent and not taken.
pub(super) fn waiting_bytes(tx: &mut ReadTx) -> TxFuture<'_, i64, LedgerError> {
    Box::pin(async move {
        let sql = "SELECT CAST(COALESCE(SUM(bytes), 0) AS BIGINT) FROM socket_asks WHERE taken <> 1";
        tx.query_opt(sql, &[]).await?.map_or(Ok(0), |row| row.int(0))
    })
}

pub(super) fn had(tx: &mut ReadTx, client: String, socket: String) -> TxFuture<'_, Option<u64>, LedgerError> {
    Box::pin(async move {
        let sql = "SELECT seq FROM socket_acks WHERE client = $1 AND socket = $2";
        let row = tx.query_opt(sql, &[client.into(), socket.into()]).await?;
        row.map(|row| Ok(row.int(0)?.unsigned_abs())).transpose()
    })
}

/// Unless a later one is there. Of the client's other sockets, those that were heard of longest ago are forgotten.
pub(super) fn put_had(tx: &mut WriteTx, client: String, socket: String, seq: u64, now: i64) -> TxFuture<'_, (), Error> {
    Box::pin(async move {
        let sql = "INSERT INTO socket_acks (client, socket, seq, acked_at) VALUES ($1, $2, $3, $4)
            ON CONFLICT (client, socket) DO UPDATE SET seq = excluded.seq, acked_at = excluded.acked_at
                WHERE socket_acks.seq < excluded.seq";
        let seq = i64::try_from(seq).unwrap_or(i64::MAX);
        tx.execute(sql, &[client.as_str().into(), socket.into(), seq.into(), now.into()]).await?;
        let sql = "DELETE FROM socket_acks WHERE client = $1 AND socket IN
            (SELECT socket FROM socket_acks WHERE client = $1 ORDER BY acked_at DESC, socket LIMIT $2 OFFSET $3)";
        tx.execute(sql, &[client.into(), SWEEP.into(), ACKS_MAX.into()]).await?;
        Ok(())
    })
}

pub(super) fn checkpoint(
    tx: &mut ReadTx,
    client: String,
    epoch: String,
) -> TxFuture<'_, Option<(u64, String)>, LedgerError> {
    Box::pin(async move {
        let sql = "SELECT folded_to, state FROM socket_folds WHERE client = $1 AND epoch = $2";
        let row = tx.query_opt(sql, &[client.into(), epoch.into()]).await?;
        row.map(|row| Ok((row.int(0)?.unsigned_abs(), row.text(1)?.to_owned()))).transpose()
    })
}

/// Unless a later one is there.
pub(super) fn put_checkpoint(
    tx: &mut WriteTx,
    client: String,
    epoch: String,
    folded_to: u64,
    state: String,
    now: i64,
) -> TxFuture<'_, (), Error> {
    Box::pin(async move {
        let sql = "INSERT INTO socket_folds (client, epoch, folded_to, state, kept_at) VALUES ($1, $2, $3, $4, $5)
            ON CONFLICT (client) DO UPDATE SET epoch = excluded.epoch, folded_to = excluded.folded_to,
                state = excluded.state, kept_at = excluded.kept_at
                WHERE socket_folds.epoch <> excluded.epoch OR socket_folds.folded_to < excluded.folded_to";
        let folded_to = i64::try_from(folded_to).unwrap_or(i64::MAX);
        tx.execute(sql, &[client.into(), epoch.into(), folded_to.into(), state.into(), now.into()]).await?;
        Ok(())
    })
}

/// The greatest offset of the epoch that a checkpoint goes to.
pub(crate) async fn greatest(tx: &mut ReadTx, epoch: Epoch) -> Result<i64, LedgerError> {
    let select = "SELECT COALESCE(MAX(folded_to), 0) FROM socket_folds WHERE epoch = $1";
    tx.query_opt(select, &[epoch.0.to_string().into()]).await?.map_or(Ok(0), |row| row.int(0))
}

/// Makes checkpoints of the epoch `before` ones of `now`. Those beyond its end are of events that the log does not have.
pub(crate) async fn take_over(tx: &mut WriteTx, before: Cursor, now: Epoch) -> Result<(), LedgerError> {
    let (epoch, end) = (before.epoch.0.to_string(), i64::try_from(before.offset.0).unwrap_or(i64::MAX));
    let beyond = "DELETE FROM socket_folds WHERE epoch = $1 AND folded_to > $2";
    tx.execute(beyond, &[epoch.as_str().into(), end.into()]).await?;
    // Numbers of events begin at another one now.
    tx.execute("DELETE FROM socket_acks", &[]).await?;
    let others = "UPDATE socket_folds SET epoch = $2 WHERE epoch = $1";
    tx.execute(others, &[epoch.into(), now.0.to_string().into()]).await.map(drop)
}

//! Rows of dead letters, and of what may become one.

use trunkline_store::{
    ledger::{Error, Migration, Outgoing, ReadTx, Row, TxFuture, Value, WriteTx},
    log::{Offset, Record, Topic},
};
use uuid::Uuid;

use super::DeadLetter;

pub(crate) const DEAD_LETTERS: Migration = Migration {
    name: "session_0003_dead_letters",
    sql: "CREATE TABLE delivery_losses (owner TEXT NOT NULL, position BIGINT NOT NULL, epoch TEXT NOT NULL,
            session TEXT NOT NULL, lost_sessions BIGINT NOT NULL, lost_at BIGINT NOT NULL, PRIMARY KEY (owner, position));
        CREATE INDEX delivery_losses_by_session ON delivery_losses (session);
        CREATE INDEX delivery_losses_by_time ON delivery_losses (lost_at);
        CREATE TABLE dead_letters (id TEXT PRIMARY KEY, owner TEXT NOT NULL, topic TEXT NOT NULL, epoch TEXT NOT NULL,
            position BIGINT NOT NULL, sent_at_ms BIGINT NOT NULL, dead_at BIGINT NOT NULL, lost_sessions BIGINT NOT NULL,
            session TEXT NOT NULL, payload BYTES NOT NULL, UNIQUE (owner, epoch, position));
        CREATE INDEX dead_letters_by_owner ON dead_letters (owner, id);
        CREATE INDEX dead_letters_by_session ON dead_letters (session);
        CREATE INDEX dead_letters_by_time ON dead_letters (dead_at)",
};

/// A session that was lost while its client had what lies at a position.
#[derive(Clone)]
pub(super) struct Lost {
    pub(super) owner: String,
    pub(super) epoch: String,
    pub(super) position: i64,
    pub(super) session: String,
    pub(super) now: i64,
    /// It is of a lane, which is delivered in order, and not of shared work.
    pub(super) is_lane: bool,
}

const COUNT: &str = "INSERT INTO delivery_losses (owner, position, epoch, session, lost_sessions, lost_at)
    VALUES ($1, $2, $3, $4, 1, $5)
    ON CONFLICT (owner, position) DO UPDATE SET
        lost_sessions = CASE WHEN delivery_losses.epoch = excluded.epoch THEN delivery_losses.lost_sessions + 1 ELSE 1 END,
        epoch = excluded.epoch, session = excluded.session, lost_at = excluded.lost_at";

const GIVE_UP: &str = "INSERT INTO dead_letters
        (id, owner, topic, epoch, position, sent_at_ms, dead_at, lost_sessions, session, payload)
    VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10) ON CONFLICT (owner, epoch, position) DO NOTHING";

/// Dead letters of one owner; of more, the oldest go.
const LETTERS_MAX: i64 = 1000;

const KEEP_LAST: &str = "DELETE FROM dead_letters WHERE owner = $1 AND id <=
    (SELECT id FROM dead_letters WHERE owner = $1 ORDER BY id DESC LIMIT 1 OFFSET $2)";

/// Forgets what is older than it is kept.
pub(super) fn sweep(tx: &mut WriteTx, before: i64) -> TxFuture<'_, (), Error> {
    Box::pin(async move {
        tx.execute("DELETE FROM delivery_losses WHERE lost_at < $1", &[before.into()]).await?;
        tx.execute("DELETE FROM dead_letters WHERE dead_at < $1", &[before.into()]).await.map(drop)
    })
}

/// Answers whether it is a dead letter now.
pub(super) fn count(tx: &mut WriteTx, lost: Lost, record: Record, most: u32) -> TxFuture<'_, bool, Error> {
    Box::pin(async move {
        let at: [Value; 2] = [lost.owner.as_str().into(), lost.position.into()];
        // Its position was not saved any more.
        let known = "SELECT 1 FROM dead_letters WHERE owner = $1 AND position = $2 AND epoch = $3";
        if tx.query_opt(known, &[at[0].clone(), at[1].clone(), lost.epoch.as_str().into()]).await?.is_some() {
            return Ok(true);
        }
        if lost.is_lane {
            // What comes before the oldest is done.
            tx.execute("DELETE FROM delivery_losses WHERE owner = $1 AND position < $2", &at).await?;
        }
        let params =
            [at[0].clone(), at[1].clone(), lost.epoch.as_str().into(), lost.session.as_str().into(), lost.now.into()];
        tx.execute(COUNT, &params).await?;
        let count = "SELECT lost_sessions FROM delivery_losses WHERE owner = $1 AND position = $2";
        let count = tx.query_opt(count, &at).await?.map_or(Ok(0), |row| row.int(0))?;
        if count < i64::from(most) {
            return Ok(false);
        }
        tx.execute("DELETE FROM delivery_losses WHERE owner = $1 AND position = $2", &at).await?;
        let params = [
            Uuid::now_v7().to_string().into(),
            lost.owner.into(),
            record.topic.as_str().into(),
            lost.epoch.into(),
            lost.position.into(),
            i64::try_from(record.timestamp_ms).unwrap_or(i64::MAX).into(),
            lost.now.into(),
            count.into(),
            lost.session.into(),
            record.payload.as_ref().into(),
        ];
        tx.execute(GIVE_UP, &params).await?;
        tx.execute(KEEP_LAST, &[at[0].clone(), LETTERS_MAX.into()]).await?;
        Ok(true)
    })
}

/// Whether a session was lost over something of one of two owners.
pub(super) fn is_counted(tx: &mut ReadTx, [one, other]: [String; 2], session: String) -> TxFuture<'_, bool, Error> {
    Box::pin(async move {
        let select = "SELECT 1 FROM delivery_losses WHERE session = $1 AND owner IN ($2, $3)
            UNION ALL SELECT 1 FROM dead_letters WHERE session = $1 AND owner IN ($2, $3) LIMIT 1";
        Ok(tx.query_opt(select, &[session.into(), one.into(), other.into()]).await?.is_some())
    })
}

/// Such a session is not counted any more.
pub(super) fn take_back(tx: &mut WriteTx, [one, other]: [String; 2], session: String) -> TxFuture<'_, (), Error> {
    Box::pin(async move {
        let params = [session.into(), one.into(), other.into()];
        let once = "DELETE FROM delivery_losses WHERE session = $1 AND owner IN ($2, $3) AND lost_sessions <= 1";
        tx.execute(once, &params).await?;
        let update = "UPDATE delivery_losses SET lost_sessions = lost_sessions - 1, session = ''
            WHERE session = $1 AND owner IN ($2, $3)";
        tx.execute(update, &params).await.map(drop)
    })
}

/// What is a dead letter since such a session was counted.
pub(super) fn dead_since(
    tx: &mut ReadTx,
    [one, other]: [String; 2],
    session: String,
) -> TxFuture<'_, Vec<DeadLetter>, Error> {
    Box::pin(async move {
        let select = "SELECT id, owner, topic, position, sent_at_ms, dead_at, lost_sessions, payload
            FROM dead_letters WHERE session = $1 AND owner IN ($2, $3)";
        tx.query(select, &[session.into(), one.into(), other.into()]).await?.iter().map(whole).collect()
    })
}

/// With the first 4 KiB of their payloads; an empty owner is all of them.
pub(super) fn list(tx: &mut ReadTx, owner: String, after: String, limit: i64) -> TxFuture<'_, Vec<DeadLetter>, Error> {
    Box::pin(async move {
        let select =
            "SELECT id, owner, topic, position, sent_at_ms, dead_at, lost_sessions, CAST(LENGTH(payload) AS BIGINT),
                SUBSTR(payload, 1, 4096) FROM dead_letters WHERE ($1 = '' OR owner = $1) AND id > $2 ORDER BY id LIMIT $3";
        let rows = tx.query(select, &[owner.into(), after.into(), limit.into()]).await?;
        rows.iter().map(|row| letter(row, row.bytes(8)?.to_vec(), row.int(7)?.unsigned_abs())).collect()
    })
}

/// With its payload.
pub(super) fn get(tx: &mut ReadTx, id: String) -> TxFuture<'_, Option<DeadLetter>, Error> {
    Box::pin(async move {
        let select = "SELECT id, owner, topic, position, sent_at_ms, dead_at, lost_sessions, payload
            FROM dead_letters WHERE id = $1";
        let row = tx.query_opt(select, &[id.into()]).await?;
        row.as_ref().map(whole).transpose()
    })
}

fn whole(row: &Row) -> Result<DeadLetter, Error> {
    let payload = row.bytes(7)?;
    letter(row, payload.to_vec(), payload.len() as u64)
}

fn letter(row: &Row, payload: Vec<u8>, size: u64) -> Result<DeadLetter, Error> {
    let broken = |what: &str| Error::Statement { reason: format!("a row of dead letters has no {what}").into() };
    let record = Record {
        topic: Topic::new(row.text(2)?).map_err(|_| broken("topic"))?,
        offset: Offset(row.int(3)?.unsigned_abs()),
        timestamp_ms: row.int(4)?.unsigned_abs(),
        payload: payload.into(),
    };
    let id = row.text(0)?.parse().map_err(|_| broken("id"))?;
    Ok(DeadLetter { id, owner: row.text(1)?.to_owned(), record, size, at: row.int(5)?, lost_sessions: row.int(6)? })
}

/// Answers whether it was there.
pub(super) fn remove(tx: &mut WriteTx, id: String) -> TxFuture<'_, bool, Error> {
    Box::pin(async move { Ok(tx.execute("DELETE FROM dead_letters WHERE id = $1", &[id.into()]).await? > 0) })
}

/// Has it appended again, if it is still there; answers whether it was.
pub(super) fn send_again(tx: &mut WriteTx, id: String, outgoing: Outgoing) -> TxFuture<'_, bool, Error> {
    Box::pin(async move {
        let was_there = remove(tx, id).await?;
        if was_there {
            tx.send(&outgoing).await?;
        }
        Ok(was_there)
    })
}

//! Rows of conversations, of what users attach, and of who is locked out.

use std::collections::HashMap;

use trunkline_store::ledger::{Error as LedgerError, Migration, ReadTx, Row as LedgerRow, TxFuture, WriteTx};
use uuid::Uuid;

use super::{Lockout, Row, Whose, files::Kept, said::Why};
use crate::error::{Error, KEY_REUSED, Kind};

pub(crate) const MIGRATIONS: &[Migration] = &[
    Migration {
        name: "conversation_0001_conversations",
        sql: "CREATE TABLE conversations (id TEXT PRIMARY KEY, app TEXT NOT NULL, agent TEXT NOT NULL, person TEXT NOT NULL,
            created_at BIGINT NOT NULL);
        CREATE INDEX conversations_person ON conversations (app, person, agent, id);
        CREATE TABLE conversation_drafts (message TEXT PRIMARY KEY, conversation TEXT NOT NULL, created_at BIGINT NOT NULL,
            sent BIGINT NOT NULL);
        CREATE INDEX conversation_drafts_open ON conversation_drafts (created_at) WHERE sent <> 1;
        CREATE INDEX conversation_drafts_conversation ON conversation_drafts (conversation);
        CREATE TABLE conversation_files (id TEXT PRIMARY KEY, conversation TEXT NOT NULL, message TEXT NOT NULL,
            place BIGINT NOT NULL, filename TEXT NOT NULL, content_type TEXT NOT NULL, byte_size BIGINT NOT NULL,
            is_whole BIGINT NOT NULL);
        CREATE INDEX conversation_files_message ON conversation_files (message);
        CREATE INDEX conversation_files_conversation ON conversation_files (conversation);
        CREATE TABLE conversation_lockouts (app TEXT NOT NULL, agent TEXT NOT NULL, person TEXT NOT NULL,
            reason TEXT NOT NULL, expires_at BIGINT, user_message TEXT NOT NULL, PRIMARY KEY (app, agent, person));
        CREATE TABLE conversation_open_turns (conversation TEXT PRIMARY KEY, agent TEXT NOT NULL, turn BIGINT NOT NULL);
        CREATE TABLE conversation_keys (name TEXT PRIMARY KEY, secret TEXT NOT NULL)",
    },
    Migration {
        name: "conversation_0002_lockout_names",
        sql: "CREATE TABLE conversation_lockout_names (conversation TEXT NOT NULL, name TEXT NOT NULL, content BYTES NOT NULL,
                at BIGINT NOT NULL, PRIMARY KEY (conversation, name));
            CREATE INDEX conversation_lockout_names_at ON conversation_lockout_names (at)",
    },
    Migration {
        name: "conversation_0003_look_at",
        sql: "ALTER TABLE conversations ADD COLUMN look_at BIGINT NOT NULL DEFAULT 0;
            CREATE INDEX conversations_look_at ON conversations (look_at)",
    },
];

/// How long the names of lockouts are known, in seconds: as long as other names.
const NAMES_KEPT: i64 = 24 * 60 * 60;

/// What a lockout was said under, where and when, with a digest of what was said.
#[derive(Clone)]
pub(super) struct Named {
    pub(super) conversation: Uuid,
    pub(super) name: String,
    pub(super) content: Vec<u8>,
    /// Unix seconds.
    pub(super) at: i64,
}

fn id(row: &LedgerRow, column: usize) -> Result<Uuid, LedgerError> {
    Uuid::try_parse(row.text(column)?).map_err(|e| LedgerError::Statement { reason: format!("an id: {e}").into() })
}

fn row(row: &LedgerRow) -> Result<Row, LedgerError> {
    let (app, user) = (row.text(1)?.to_owned(), row.text(3)?.to_owned());
    Ok(Row { id: id(row, 0)?, app, agent: id(row, 2)?, user, created_at: row.int(4)? })
}

pub(super) fn insert(tx: &mut WriteTx, new: Row) -> TxFuture<'_, (), Error> {
    Box::pin(async move {
        let sql = "INSERT INTO conversations (id, app, agent, person, created_at) VALUES ($1, $2, $3, $4, $5)";
        let params = [
            new.id.to_string().into(),
            new.app.into(),
            new.agent.to_string().into(),
            new.user.into(),
            new.created_at.into(),
        ];
        tx.execute(sql, &params).await?;
        Ok(())
    })
}

pub(super) fn find(tx: &mut ReadTx, id: Uuid) -> TxFuture<'_, Option<Row>, LedgerError> {
    Box::pin(async move {
        let sql = "SELECT id, app, agent, person, created_at FROM conversations WHERE id = $1";
        tx.query_opt(sql, &[id.to_string().into()]).await?.as_ref().map(row).transpose()
    })
}

/// Those of a user before an agent, newest first, from before one of them.
pub(super) fn list(
    tx: &mut ReadTx,
    Whose { app, agent, user }: Whose,
    before: Option<Uuid>,
    most: i64,
) -> TxFuture<'_, Vec<Row>, LedgerError> {
    Box::pin(async move {
        let sql = "SELECT id, app, agent, person, created_at FROM conversations
            WHERE app = $1 AND person = $2 AND agent = $3 AND id < $4 ORDER BY id DESC LIMIT $5";
        let before = before.unwrap_or(Uuid::max()).to_string();
        let params = [app.into(), user.into(), agent.to_string().into(), before.into(), most.into()];
        tx.query(sql, &params).await?.iter().map(row).collect()
    })
}

/// All of a user of an app.
pub(super) fn of_user(tx: &mut ReadTx, app: String, user: String) -> TxFuture<'_, Vec<Row>, LedgerError> {
    Box::pin(async move {
        let sql = "SELECT id, app, agent, person, created_at FROM conversations WHERE app = $1 AND person = $2";
        tx.query(sql, &[app.into(), user.into()]).await?.iter().map(row).collect()
    })
}

/// Those that are to be looked at by now, the longest overdue first.
pub(super) fn to_look_at(tx: &mut ReadTx, now: i64, most: i64) -> TxFuture<'_, Vec<(Row, i64)>, LedgerError> {
    Box::pin(async move {
        let sql = "SELECT id, app, agent, person, created_at, look_at FROM conversations WHERE look_at <= $1
            ORDER BY look_at LIMIT $2";
        let rows = tx.query(sql, &[now.into(), most.into()]).await?;
        rows.iter().map(|found| Ok((row(found)?, found.int(5)?))).collect()
    })
}

/// When one is looked at again, in Unix milliseconds; if that was to be at `before`, where one is named.
pub(super) fn look_again(tx: &mut WriteTx, id: Uuid, before: Option<i64>, at: i64) -> TxFuture<'_, (), Error> {
    Box::pin(async move {
        let sql = "UPDATE conversations SET look_at = $2 WHERE id = $1 AND (CAST($3 AS BIGINT) < 0 OR look_at = $3)";
        let params = [id.to_string().into(), at.into(), before.unwrap_or(-1).into()];
        Ok(tx.execute(sql, &params).await.map(drop)?)
    })
}

pub(super) fn remove(tx: &mut WriteTx, id: Uuid) -> TxFuture<'_, (), Error> {
    Box::pin(async move {
        let id = [id.to_string().into()];
        tx.execute("DELETE FROM conversation_files WHERE conversation = $1", &id).await?;
        tx.execute("DELETE FROM conversation_drafts WHERE conversation = $1", &id).await?;
        tx.execute("DELETE FROM conversation_lockout_names WHERE conversation = $1", &id).await?;
        tx.execute("DELETE FROM conversations WHERE id = $1", &id).await?;
        Ok(())
    })
}

/// Who is locked out. Those whose time is over are not.
pub(super) fn lockouts(tx: &mut ReadTx) -> TxFuture<'_, Vec<(Whose, Lockout)>, LedgerError> {
    Box::pin(async move {
        let sql = "SELECT app, agent, person, reason, expires_at, user_message FROM conversation_lockouts";
        let read = |row: &LedgerRow| {
            let lockout = read_lockout(row, 3)?;
            let (app, agent, user) = (row.text(0)?.to_owned(), id(row, 1)?, row.text(2)?.to_owned());
            Ok((Whose { app, agent, user }, lockout))
        };
        tx.query(sql, &[]).await?.iter().map(read).collect()
    })
}

/// Reads a lockout from three columns, the first of which is `first`: reason, end, message for the user.
fn read_lockout(row: &LedgerRow, first: usize) -> Result<Lockout, LedgerError> {
    let reason = match row.text(first)? {
        "rage" => Why::Rage,
        "hack" => Why::Hack,
        _ => Why::Permanent,
    };
    let user_message = Some(row.text(first + 2)?.to_owned()).filter(|text| !text.is_empty());
    Ok(Lockout { reason, expires_at: row.int_opt(first + 1)?, user_message })
}

/// Puts a lockout, or removes it, unless that was said under this name before; answers which one there is then.
pub(super) fn put_lockout(
    tx: &mut WriteTx,
    Whose { app, agent, user }: Whose,
    lockout: Option<Lockout>,
    named: Option<Named>,
) -> TxFuture<'_, Option<Lockout>, Error> {
    Box::pin(async move {
        let key = [app.into(), agent.to_string().into(), user.into()];
        if let Some(named) = named
            && !is_new(tx, named).await?
        {
            let sql = "SELECT reason, expires_at, user_message FROM conversation_lockouts
                WHERE app = $1 AND agent = $2 AND person = $3";
            let row = tx.query_opt(sql, &key).await?;
            return Ok(row.map(|row| read_lockout(&row, 0)).transpose()?);
        }
        let Some(Lockout { reason, expires_at, user_message }) = lockout.clone() else {
            let sql = "DELETE FROM conversation_lockouts WHERE app = $1 AND agent = $2 AND person = $3";
            tx.execute(sql, &key).await?;
            return Ok(None);
        };
        let reason = match reason {
            Why::Rage => "rage",
            Why::Hack => "hack",
            Why::Permanent | Why::None => "permanent",
        };
        let sql = "INSERT INTO conversation_lockouts (app, agent, person, reason, expires_at, user_message)
            VALUES ($1, $2, $3, $4, $5, $6) ON CONFLICT (app, agent, person) DO UPDATE SET reason = excluded.reason,
                expires_at = excluded.expires_at, user_message = excluded.user_message";
        let [app, agent, user] = key;
        let text = user_message.unwrap_or_default().into();
        let expires_at = expires_at.map_or(trunkline_store::ledger::Value::Null, Into::into);
        tx.execute(sql, &[app, agent, user, reason.into(), expires_at, text]).await?;
        Ok(lockout)
    })
}

/// Notes a name; answers whether it is new. Refuses one that was given to something else.
async fn is_new(tx: &mut WriteTx, Named { conversation, name, content, at }: Named) -> Result<bool, Error> {
    let key = [conversation.to_string().into(), name.into()];
    let sql = "SELECT content FROM conversation_lockout_names WHERE conversation = $1 AND name = $2";
    if let Some(known) = tx.query_opt(sql, &key).await? {
        let reused = || Error::new(Kind::Invalid, KEY_REUSED, "this idempotency key was used for other content");
        return if known.bytes(0)? == content { Ok(false) } else { Err(reused()) };
    }
    let sql = "INSERT INTO conversation_lockout_names (conversation, name, content, at) VALUES ($1, $2, $3, $4)";
    let [conversation, name] = key;
    tx.execute(sql, &[conversation, name, content.into(), at.into()]).await?;
    Ok(true)
}

pub(super) fn sweep_lockouts(tx: &mut WriteTx, now: i64) -> TxFuture<'_, (), Error> {
    Box::pin(async move {
        tx.execute("DELETE FROM conversation_lockouts WHERE expires_at < $1", &[now.into()]).await?;
        let sql = "DELETE FROM conversation_lockout_names WHERE at < $1";
        tx.execute(sql, &[(now - NAMES_KEPT).into()]).await?;
        Ok(())
    })
}

/// The secret of this name; `new` if there is none yet.
pub(super) fn key<'a>(tx: &'a mut WriteTx, name: &'static str, new: String) -> TxFuture<'a, String, Error> {
    Box::pin(async move {
        let sql = "INSERT INTO conversation_keys (name, secret) VALUES ($1, $2) ON CONFLICT (name) DO NOTHING";
        tx.execute(sql, &[name.into(), new.into()]).await?;
        let found = tx.query_opt("SELECT secret FROM conversation_keys WHERE name = $1", &[name.into()]).await?;
        let missing = || Error::new(Kind::Internal, "ERR_INTERNAL", "a key was not kept");
        Ok(found.ok_or_else(missing)?.text(0)?.to_owned())
    })
}

/// A draft, or room in one for another file: nothing if it was sent, or has, or the conversation has, as many as may be.
pub(super) fn begin_file(tx: &mut WriteTx, file: Kept, now: i64, most: (i64, i64)) -> TxFuture<'_, bool, Error> {
    Box::pin(async move {
        let (message, conversation) = (file.message.to_string(), file.conversation.to_string());
        let sql = "SELECT id FROM conversations WHERE id = $1";
        if tx.query_opt(sql, &[conversation.as_str().into()]).await?.is_none() {
            return Err(super::missing());
        }
        let sql = "INSERT INTO conversation_drafts (message, conversation, created_at, sent) VALUES ($1, $2, $3, 0)
            ON CONFLICT (message) DO NOTHING";
        tx.execute(sql, &[message.as_str().into(), conversation.as_str().into(), now.into()]).await?;
        let sql = "SELECT COUNT(*) FROM conversation_files WHERE message = $1";
        let here = tx.query_opt(sql, &[message.as_str().into()]).await?.map_or(Ok(0), |row| row.int(0))?;
        let sql = "SELECT COUNT(*) FROM conversation_files WHERE conversation = $1";
        let there = tx.query_opt(sql, &[conversation.as_str().into()]).await?.map_or(Ok(0), |row| row.int(0))?;
        if here >= most.0 || there >= most.1 {
            return Ok(false);
        }
        let sql = "INSERT INTO conversation_files (id, conversation, message, place, filename, content_type, byte_size,
                is_whole) VALUES ($1, $2, $3, $4, $5, '', 0, 0)";
        let params =
            [file.id.to_string().into(), conversation.into(), message.into(), here.into(), file.filename.into()];
        tx.execute(sql, &params).await?;
        Ok(true)
    })
}

/// Answers false if there is no such file any more.
pub(super) fn end_file(tx: &mut WriteTx, id: Uuid, content_type: String, bytes: i64) -> TxFuture<'_, bool, Error> {
    Box::pin(async move {
        let sql = "UPDATE conversation_files SET content_type = $2, byte_size = $3, is_whole = 1 WHERE id = $1";
        Ok(tx.execute(sql, &[id.to_string().into(), content_type.into(), bytes.into()]).await? > 0)
    })
}

fn kept(row: &LedgerRow) -> Result<Kept, LedgerError> {
    Ok(Kept {
        id: id(row, 0)?,
        conversation: id(row, 1)?,
        message: id(row, 2)?,
        filename: row.text(3)?.to_owned(),
        content_type: row.text(4)?.to_owned(),
        byte_size: row.int(5)?.unsigned_abs(),
        is_whole: row.int(6)? == 1,
    })
}

pub(super) fn file(tx: &mut ReadTx, id: Uuid) -> TxFuture<'_, Option<Kept>, LedgerError> {
    Box::pin(async move {
        let sql =
            "SELECT id, conversation, message, filename, content_type, byte_size, is_whole FROM conversation_files
            WHERE id = $1";
        tx.query_opt(sql, &[id.to_string().into()]).await?.as_ref().map(kept).transpose()
    })
}

/// The files of a conversation, or of one of its messages, in their order.
pub(super) fn files(
    tx: &mut ReadTx,
    conversation: Uuid,
    message: Option<Uuid>,
) -> TxFuture<'_, Vec<Kept>, LedgerError> {
    Box::pin(async move {
        let sql =
            "SELECT id, conversation, message, filename, content_type, byte_size, is_whole FROM conversation_files
            WHERE conversation = $1 AND (message = $2 OR $2 = '') ORDER BY message, place";
        let message = message.map(|id| id.to_string()).unwrap_or_default();
        tx.query(sql, &[conversation.to_string().into(), message.into()]).await?.iter().map(kept).collect()
    })
}

/// Marks a draft as sent; answers false if there is none in this conversation.
pub(super) fn send_draft(tx: &mut WriteTx, message: Uuid, conversation: Uuid) -> TxFuture<'_, bool, Error> {
    Box::pin(async move {
        let sql = "UPDATE conversation_drafts SET sent = 1 WHERE message = $1 AND conversation = $2 AND sent <> 2";
        Ok(tx.execute(sql, &[message.to_string().into(), conversation.to_string().into()]).await? > 0)
    })
}

/// A draft was not sent after all.
pub(super) fn take_back_draft(tx: &mut WriteTx, message: Uuid) -> TxFuture<'_, (), Error> {
    Box::pin(async move {
        let sql = "UPDATE conversation_drafts SET sent = 0 WHERE message = $1";
        tx.execute(sql, &[message.to_string().into()]).await?;
        Ok(())
    })
}

/// Which turns are open: of which conversation, for which agent.
pub(super) fn open_turns(tx: &mut ReadTx) -> TxFuture<'_, HashMap<Uuid, (String, u64)>, LedgerError> {
    Box::pin(async move {
        let rows = tx.query("SELECT conversation, agent, turn FROM conversation_open_turns", &[]).await?;
        let read = |row: &LedgerRow| Ok((id(row, 0)?, (row.text(1)?.to_owned(), row.int(2)?.unsigned_abs())));
        rows.iter().map(read).collect()
    })
}

pub(super) fn keep_turns(
    tx: &mut WriteTx,
    ended: Vec<Uuid>,
    begun: Vec<(Uuid, String, u64)>,
) -> TxFuture<'_, (), Error> {
    Box::pin(async move {
        for id in ended {
            let sql = "DELETE FROM conversation_open_turns WHERE conversation = $1";
            tx.execute(sql, &[id.to_string().into()]).await?;
        }
        for (id, agent, turn) in begun {
            let sql = "INSERT INTO conversation_open_turns (conversation, agent, turn) VALUES ($1, $2, $3)
                ON CONFLICT (conversation) DO UPDATE SET agent = excluded.agent, turn = excluded.turn";
            let turn = i64::try_from(turn).unwrap_or(i64::MAX);
            tx.execute(sql, &[id.to_string().into(), agent.into(), turn.into()]).await?;
        }
        Ok(())
    })
}

/// Who is erased is not locked out any more: that says something of it, too.
pub(super) fn forget_lockouts(tx: &mut WriteTx, app: String, user: String) -> TxFuture<'_, (), Error> {
    Box::pin(async move {
        let sql = "DELETE FROM conversation_lockouts WHERE app = $1 AND person = $2";
        tx.execute(sql, &[app.into(), user.into()]).await?;
        Ok(())
    })
}

/// Files of a message that came to nothing.
pub(super) fn forget_file(tx: &mut WriteTx, id: Uuid) -> TxFuture<'_, (), Error> {
    Box::pin(async move {
        tx.execute("DELETE FROM conversation_files WHERE id = $1", &[id.to_string().into()]).await?;
        Ok(())
    })
}

/// Drafts from before a moment that were never sent, and their files; some of them.
pub(super) fn stale_drafts(tx: &mut ReadTx, before: i64) -> TxFuture<'_, Vec<(Uuid, Uuid)>, LedgerError> {
    Box::pin(async move {
        let sql = "SELECT message, conversation FROM conversation_drafts WHERE sent <> 1 AND created_at < $1
            ORDER BY created_at LIMIT 1000";
        tx.query(sql, &[before.into()]).await?.iter().map(|row| Ok((id(row, 0)?, id(row, 1)?))).collect()
    })
}

/// A draft that was not sent cannot be sent any more; answers whether it still was none of the sent ones.
pub(super) fn end_draft(tx: &mut WriteTx, message: Uuid) -> TxFuture<'_, bool, Error> {
    Box::pin(async move {
        let sql = "UPDATE conversation_drafts SET sent = 2 WHERE message = $1 AND sent <> 1";
        Ok(tx.execute(sql, &[message.to_string().into()]).await? > 0)
    })
}

/// Forgets a draft that cannot be sent, with its files.
pub(super) fn drop_draft(tx: &mut WriteTx, message: Uuid) -> TxFuture<'_, (), Error> {
    Box::pin(async move {
        let id = [message.to_string().into()];
        tx.execute("DELETE FROM conversation_drafts WHERE message = $1 AND sent <> 1", &id).await?;
        tx.execute("DELETE FROM conversation_files WHERE message = $1", &id).await?;
        Ok(())
    })
}

//! Checkpoints: bytes that a principal keeps under its own name, private to it.

mod sql;

use std::time::{SystemTime, UNIX_EPOCH};

pub(crate) use sql::{MIGRATIONS, last_saves, owners};
use sql::{New, Quota};
use trunkline_store::ledger;

use crate::{
    caller::Caller,
    error::{Error, Kind},
    gate::{Gate, Keep},
    limits::{CHECKPOINT_BYTES_MAX, CHECKPOINT_KEY_BYTES_MAX, CHECKPOINTS_MAX, Limits},
};

/// Checkpoints that one transaction removes: up to 3 MiB each.
const SWEEP_STEP: i64 = 50;

/// The key that an empty one stands for.
const DEFAULT_KEY: &str = "default";

/// What was kept.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Checkpoint {
    /// The bytes.
    pub data: Vec<u8>,
    /// When, in Unix seconds by the server's clock.
    pub saved_at: i64,
}

/// Keeps `data` under `key`, in place of what was there; answers when, in Unix seconds. Durable when it returns. A
/// `ttl` of 0 or less keeps it until it is deleted, else it is gone after so many seconds.
///
/// # Errors
/// [`Kind::Invalid`] for a key or data over the limits, [`Kind::Exhausted`] for too many keys, or too many bytes of the
/// caller's workspace.
pub async fn save(
    gate: &Gate,
    caller: &Caller,
    key: &str,
    data: Vec<u8>,
    ttl: i64,
    limits: &Limits,
) -> Result<i64, Error> {
    let key = checked(key)?;
    if data.len() > CHECKPOINT_BYTES_MAX {
        let message = format!("checkpoint of {} bytes; at most {CHECKPOINT_BYTES_MAX} are allowed", data.len());
        return Err(Error::new(Kind::Invalid, "ERR_INVALID_ARGUMENT", message));
    }
    let now = now();
    let expires_at = (ttl > 0).then(|| now.saturating_add(ttl));
    let keep = gate.authorize(caller, Keep)?;
    let bytes = i64::from(limits.checkpoint_mib_per_workspace) * 1024 * 1024;
    let quota = Quota { checkpoints: CHECKPOINTS_MAX, bytes };
    let save = gate.write(&keep, move |tx, owner| {
        let (name, data) = (key.clone(), data.clone());
        sql::save(tx, New { owner, name, data, now, expires_at }, quota)
    });
    save.await?;
    Ok(now)
}

/// What is kept under `key`, unless it expired.
///
/// # Errors
/// [`Kind::Invalid`] for a key over the limit.
pub async fn load(gate: &Gate, caller: &Caller, key: &str) -> Result<Option<Checkpoint>, Error> {
    let (key, now) = (checked(key)?, now());
    let keep = gate.authorize(caller, Keep)?;
    Ok(gate.read(&keep, move |tx, owner| sql::load(tx, owner, key.clone(), now)).await?)
}

/// Forgets what is kept under `key`, if anything is.
///
/// # Errors
/// [`Kind::Invalid`] for a key over the limit.
pub async fn delete(gate: &Gate, caller: &Caller, key: &str) -> Result<(), Error> {
    let key = checked(key)?;
    let keep = gate.authorize(caller, Keep)?;
    Ok(gate.write(&keep, move |tx, owner| sql::delete(tx, owner, key.clone())).await?)
}

/// All keys, sorted.
///
/// # Errors
/// [`Kind::Unavailable`].
pub async fn list(gate: &Gate, caller: &Caller) -> Result<Vec<String>, Error> {
    let now = now();
    let keep = gate.authorize(caller, Keep)?;
    Ok(gate.read(&keep, move |tx, owner| sql::list(tx, owner, now)).await?)
}

/// Removes what has expired, for good: until then it takes room, and its owner may never come again.
///
/// # Errors
/// [`Kind::Unavailable`].
pub async fn sweep(gate: &Gate) -> Result<(), Error> {
    let now = now();
    while gate.housekeep(move |tx| sql::expire(tx, now, SWEEP_STEP)).await? == SWEEP_STEP {}
    Ok(())
}

fn checked(key: &str) -> Result<String, Error> {
    if key.len() > CHECKPOINT_KEY_BYTES_MAX {
        let message = format!("checkpoint key of {} bytes; at most {CHECKPOINT_KEY_BYTES_MAX} are allowed", key.len());
        return Err(Error::new(Kind::Invalid, "ERR_INVALID_ARGUMENT", message));
    }
    Ok(if key.is_empty() { DEFAULT_KEY.to_owned() } else { key.to_owned() })
}

fn too_many(most: i64) -> Error {
    Error::new(Kind::Exhausted, "ERR_QUOTA", format!("{most} checkpoints are kept already"))
}

fn too_large(account: &str, most: i64) -> Error {
    let message = format!("quota exceeded for checkpoints of {account}: limit {most} bytes together");
    Error::new(Kind::Exhausted, "ERR_QUOTA", message)
}

/// Counts what versions before the limit of bytes kept. To be called before callers are served.
///
/// # Errors
/// [`Kind::Unavailable`].
pub async fn count_up(gate: &Gate) -> Result<(), Error> {
    let counted: Result<(), ledger::Error> = gate.housekeep(sql::count_up).await;
    Ok(counted?)
}

/// Forgets all of an owner that is gone for good.
pub(crate) async fn forget(gate: &Gate, owner: String) -> Result<(), Error> {
    loop {
        let owner = owner.clone();
        if gate.housekeep(move |tx| sql::forget(tx, owner.clone(), SWEEP_STEP)).await? < SWEEP_STEP {
            return Ok(());
        }
    }
}

fn now() -> i64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |age| age.as_secs() as i64)
}

/// Whether something is kept for an identity under `key`, inside a transaction.
pub(crate) async fn exists(tx: &mut ledger::ReadTx, identity: &str, key: &str) -> Result<bool, Error> {
    Ok(sql::load(tx, identity.to_owned(), key.to_owned(), now()).await?.is_some())
}

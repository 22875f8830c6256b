//! Rows of keys. How many keys a namespace has is kept beside them, so that its limit costs a write of a new key only.

use trunkline_store::ledger::{Error as LedgerError, Migration, ReadTx, Row, TxFuture, WriteTx};

use super::{
    Action, Answer, New, Request,
    decide::{Change, Found, decide, expiry},
    invalid, page,
};
use crate::{
    error::{Error, Kind},
    limits::{KV_KEY_CHARS_MAX, KV_MEMBER_BYTES_MAX, KV_PAGE_BYTES_MAX},
};

pub(crate) const MIGRATIONS: &[Migration] = &[Migration {
    name: "kv_0001_keys",
    sql: "CREATE TABLE kv (owner TEXT NOT NULL, key SORTED_TEXT NOT NULL, is_set BIGINT NOT NULL, value BYTES NOT NULL,
            members BIGINT NOT NULL, expires_ms BIGINT, PRIMARY KEY (owner, key));
        CREATE INDEX kv_by_expiry ON kv (expires_ms) WHERE expires_ms IS NOT NULL;
        CREATE TABLE kv_members (owner TEXT NOT NULL, key SORTED_TEXT NOT NULL, member BYTES NOT NULL,
            PRIMARY KEY (owner, key, member));
        CREATE TABLE kv_counts (owner TEXT PRIMARY KEY, keys BIGINT NOT NULL)",
}];

const LOAD: &str = "SELECT is_set, value, members, expires_ms FROM kv WHERE owner = $1 AND key = $2";
const UPDATE: &str = "UPDATE kv SET value = $3, expires_ms = $4 WHERE owner = $1 AND key = $2 AND is_set = 0";
const INSERT: &str = "INSERT INTO kv (owner, key, is_set, value, members, expires_ms) VALUES ($1, $2, $3, $4, $5, $6)";
const REMOVE: &str = "DELETE FROM kv WHERE owner = $1 AND key = $2";

/// Keys of a listing, and something of their values.
macro_rules! listing {
    ($of_value:literal) => {
        concat!(
            "SELECT key, ",
            $of_value,
            " FROM kv WHERE owner = $1 AND key >= $2 AND key < $3 AND key <> $4 AND is_set = 0
                AND (expires_ms IS NULL OR expires_ms > $5) ORDER BY key LIMIT $6"
        )
    };
}

/// How long values are says the database without reading them, so that no more of them are read than a page has room for.
const SIZES: &str = listing!("CAST(LENGTH(value) AS BIGINT)");
const LIST: &str = listing!("value");

const COUNT_IN: &str = "INSERT INTO kv_counts (owner, keys) VALUES ($1, 1)
    ON CONFLICT (owner) DO UPDATE SET keys = kv_counts.keys + 1 WHERE kv_counts.keys < $2";
const COUNT_OUT: &str = "UPDATE kv_counts SET keys = keys - $2 WHERE owner = $1";

const EXPIRED: &str = "SELECT owner, key, members FROM kv WHERE expires_ms <= $1 ORDER BY expires_ms LIMIT $2";
const EXPIRED_OF: &str = "SELECT owner, key, members FROM kv WHERE owner = $1 AND expires_ms <= $2 LIMIT 1000";

const PURGE_MEMBERS: &str = "DELETE FROM kv_members WHERE owner = $1 AND key >= $2 AND key < $3";
const PURGE: &str = "DELETE FROM kv WHERE owner = $1 AND key >= $2 AND key < $3";

const ADD_MEMBER: &str = "INSERT INTO kv_members (owner, key, member) VALUES ($1, $2, $3) ON CONFLICT DO NOTHING";
const COUNT_MEMBER: &str =
    "UPDATE kv SET members = members + 1, expires_ms = $3 WHERE owner = $1 AND key = $2 RETURNING members";
const REMOVE_MEMBERS: &str = "DELETE FROM kv_members WHERE owner = $1 AND key = $2";

/// Members that go in one transaction with the sets that have expired, unless a single set has more: others wait for it.
const EXPIRED_MEMBERS_MAX: i64 = 10_000;

/// How much a namespace may hold; 0 is no limit.
#[derive(Clone, Copy)]
pub(super) struct Quota {
    pub(super) keys: i64,
    /// Of each set.
    pub(super) members: i64,
}

/// Namespaces whose owner has no workspace in it. By prefix and not by range: the database's own collation may sort otherwise.
const WITHOUT_WORKSPACE: &str = "SELECT owner FROM kv_counts
    WHERE owner LIKE 'agent::%' OR owner LIKE 'task::%' OR owner LIKE 'unplaced::%'";

/// Members go before their keys, by which it is told whether the target has the set already.
const COPY: [&str; 3] = [
    "INSERT INTO kv_members (owner, key, member) SELECT $2, key, member FROM kv_members m WHERE owner = $1
        AND NOT EXISTS (SELECT 1 FROM kv WHERE kv.owner = $2 AND kv.key = m.key) ON CONFLICT DO NOTHING",
    "INSERT INTO kv (owner, key, is_set, value, members, expires_ms)
        SELECT $2, key, is_set, value, members, expires_ms FROM kv WHERE owner = $1 ON CONFLICT DO NOTHING",
    "INSERT INTO kv_counts (owner, keys) SELECT $2, COUNT(*) FROM kv WHERE owner = $2 AND owner <> $1
        ON CONFLICT (owner) DO UPDATE SET keys = excluded.keys",
];

const FORGET: [&str; 3] = [
    "DELETE FROM kv_members WHERE owner = $1",
    "DELETE FROM kv WHERE owner = $1",
    "DELETE FROM kv_counts WHERE owner = $1",
];

/// A key's row.
struct Stored {
    is_set: bool,
    members: i64,
    found: Found,
}

pub(super) fn read(tx: &mut ReadTx, owner: String, request: Request, now_ms: i64) -> TxFuture<'_, Answer, Error> {
    Box::pin(async move {
        if let Action::List { limit, cursor } = &request.action {
            return list(tx, &owner, &request.key, *limit, cursor, now_ms).await;
        }
        let row = tx.query_opt(LOAD, &[owner.as_str().into(), request.key.as_str().into()]).await?;
        let stored = live(row.as_ref(), now_ms)?;
        if request.action == Action::SetCount {
            return count(stored);
        }
        Ok(decide(&request.action, value(stored)?, now_ms)?.1)
    })
}

pub(super) fn write(
    tx: &mut WriteTx,
    owner: String,
    request: Request,
    now_ms: i64,
    quota: Quota,
) -> TxFuture<'_, Answer, Error> {
    Box::pin(async move {
        let keys_max = quota.keys;
        let key = request.key.as_str();
        match &request.action {
            action if action.is_read() => read(tx.as_read(), owner, request, now_ms).await,
            Action::Put(New { value, ttl }) => {
                let expires_ms = expiry(*ttl, now_ms);
                store(tx, &owner, key, value.clone(), expires_ms, keys_max, now_ms).await?;
                Ok(Answer { applied: true, ..Answer::default() })
            }
            Action::SetAdd(new) => add_member(tx, &owner, key, new, quota, now_ms).await,
            Action::Purge { .. } => {
                let range = [owner.as_str().into(), key.into(), successor(key).into()];
                tx.execute(PURGE_MEMBERS, &range).await?;
                let counter = tx.execute(PURGE, &range).await? as i64;
                tx.execute(COUNT_OUT, &[owner.into(), counter.into()]).await?;
                Ok(Answer { counter, applied: true, ..Answer::default() })
            }
            Action::Delete => {
                let row = [Row(vec![owner.into(), key.into()])];
                remove(tx, row).await?;
                Ok(Answer { applied: true, ..Answer::default() })
            }
            action => {
                let row = tx.query_opt(LOAD, &[owner.as_str().into(), key.into()]).await?;
                let (change, answer) = decide(action, value(live(row.as_ref(), now_ms)?)?, now_ms)?;
                match change {
                    Change::Nothing => {}
                    Change::Store { value, expires_ms } => {
                        store(tx, &owner, key, value, expires_ms, keys_max, now_ms).await?;
                    }
                    Change::Remove => drop(remove(tx, [Row(vec![owner.into(), key.into()])]).await?),
                }
                Ok(answer)
            }
        }
    })
}

/// Changes nothing: for its place among what changes something.
pub(super) fn nothing(_: &mut WriteTx) -> TxFuture<'_, (), Error> {
    Box::pin(std::future::ready(Ok(())))
}

/// Removes keys that expired before `now_ms`, up to `most`; answers how many, and whether there may be more.
pub(crate) fn expire(tx: &mut WriteTx, now_ms: i64, most: i64) -> TxFuture<'_, (i64, bool), Error> {
    Box::pin(async move {
        let rows = tx.query(EXPIRED, &[now_ms.into(), most.into()]).await?;
        let found = rows.len();
        let rows = affordable(rows)?;
        let is_all = rows.len() == found && (found as i64) < most;
        Ok((remove(tx, rows).await?, !is_all))
    })
}

/// The first of the rows of owner, key and number of members, as owner and key: as many as one transaction removes.
fn affordable(rows: Vec<Row>) -> Result<Vec<Row>, Error> {
    let (mut members, mut some) = (0, Vec::with_capacity(rows.len()));
    for mut row in rows {
        members += row.int(2)?;
        if !some.is_empty() && members > EXPIRED_MEMBERS_MAX {
            break;
        }
        row.0.truncate(2);
        some.push(row);
    }
    Ok(some)
}

/// Namespaces that were stored without the workspace of their owner.
pub(super) fn spaces_without_workspace(tx: &mut ReadTx) -> TxFuture<'_, Vec<String>, LedgerError> {
    Box::pin(async move {
        let rows = tx.query(WITHOUT_WORKSPACE, &[]).await?;
        rows.iter().map(|row| row.text(0).map(str::to_owned)).collect()
    })
}

/// Copies all keys of a namespace to others, which keep what they have, and removes it.
pub(super) fn move_space(tx: &mut WriteTx, from: String, to: Vec<String>) -> TxFuture<'_, (), Error> {
    Box::pin(async move {
        for to in to {
            for statement in COPY {
                tx.execute(statement, &[from.as_str().into(), to.as_str().into()]).await?;
            }
        }
        for statement in FORGET {
            tx.execute(statement, &[from.as_str().into()]).await?;
        }
        Ok(())
    })
}

/// The row if it has not expired.
fn live(row: Option<&Row>, now_ms: i64) -> Result<Option<Stored>, Error> {
    let Some(row) = row else { return Ok(None) };
    let found = Found { value: row.bytes(1)?.to_vec(), expires_ms: row.int_opt(3)? };
    let stored = Stored { is_set: row.int(0)? != 0, members: row.int(2)?, found };
    Ok(Some(stored).filter(|stored| stored.found.expires_ms.is_none_or(|expires| expires > now_ms)))
}

fn value(stored: Option<Stored>) -> Result<Option<Found>, Error> {
    match stored {
        Some(stored) if stored.is_set => Err(invalid("key holds a set".to_owned())),
        stored => Ok(stored.map(|stored| stored.found)),
    }
}

fn count(stored: Option<Stored>) -> Result<Answer, Error> {
    match stored {
        Some(stored) if !stored.is_set => Err(invalid("key holds a value, not a set".to_owned())),
        stored => {
            let applied = stored.is_some();
            Ok(Answer { counter: stored.map_or(0, |stored| stored.members), applied, ..Answer::default() })
        }
    }
}

async fn list(
    tx: &mut ReadTx,
    owner: &str,
    prefix: &str,
    limit: usize,
    cursor: &str,
    now_ms: i64,
) -> Result<Answer, Error> {
    let bound = format!("{}.", mark(owner, prefix));
    let after = match cursor {
        "" | "0" => "",
        cursor => {
            let refused = || invalid("cursor does not belong to this listing".to_owned());
            cursor.strip_prefix(bound.as_str()).ok_or_else(refused)?
        }
    };
    let page = page(limit);
    let from = if after.is_empty() { prefix } else { after };
    let mut params =
        [owner.into(), from.into(), successor(prefix).into(), after.into(), now_ms.into(), (page as i64 + 1).into()];
    let size = |row: &Row| Ok(2 * row.text(0)?.len() + usize::try_from(row.int(1)?).unwrap_or(usize::MAX));
    let sizes = tx.query(SIZES, &params).await?.iter().map(size).collect::<Result<Vec<_>, LedgerError>>()?;
    let count = fitting(&sizes, page);
    params[5] = (count as i64).into();
    let rows = tx.query(LIST, &params).await?;
    let entry = |row: &Row| Ok((row.text(0)?.to_owned(), row.bytes(1)?.to_vec()));
    let entries = rows.iter().map(entry).collect::<Result<Vec<_>, LedgerError>>()?;
    let last = entries.last().filter(|_| count < sizes.len());
    let next_cursor = last.map(|(last, _)| format!("{bound}{last}")).unwrap_or_default();
    Ok(Answer { applied: true, entries, next_cursor, ..Answer::default() })
}

/// How many of the entries of these sizes are a page of at most so many: the first one, however large it is, and as many more
/// as there is room for.
fn fitting(sizes: &[usize], most: usize) -> usize {
    let mut room = KV_PAGE_BYTES_MAX;
    let fits = |size: &&usize| {
        let left = room.checked_sub(**size);
        room = left.unwrap_or(0);
        left.is_some()
    };
    let count = sizes.iter().take(most).take_while(fits).count();
    count.max(sizes.len().min(1))
}

/// What ties a cursor to its listing. A guard against mistakes, not against liars: they see their own keys only anyway.
fn mark(owner: &str, prefix: &str) -> String {
    let sum = |sum: u64, byte: u8| (sum ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3);
    let text = [owner, "\n", prefix].concat();
    format!("{:016x}", text.bytes().fold(0xcbf2_9ce4_8422_2325, sum))
}

/// The first text after all that begin with `prefix`, or one that is after all keys.
fn successor(prefix: &str) -> String {
    let mut chars: Vec<char> = prefix.chars().collect();
    while let Some(last) = chars.pop() {
        // Surrogates are no characters.
        let next = if last == '\u{d7ff}' { Some('\u{e000}') } else { char::from_u32(last as u32 + 1) };
        if let Some(next) = next {
            chars.push(next);
            return chars.into_iter().collect();
        }
    }
    char::MAX.to_string().repeat(KV_KEY_CHARS_MAX + 1)
}

async fn store(
    tx: &mut WriteTx,
    owner: &str,
    key: &str,
    value: Vec<u8>,
    expires_ms: Option<i64>,
    keys_max: i64,
    now_ms: i64,
) -> Result<(), Error> {
    let params = [owner.into(), key.into(), value.into(), expires_ms.into()];
    if tx.execute(UPDATE, &params).await? > 0 {
        return Ok(());
    }
    let [_, _, value, expires] = params;
    make_room(tx, owner, key, keys_max, now_ms).await?;
    let params = [owner.into(), key.into(), 0.into(), value, 0.into(), expires];
    Ok(tx.execute(INSERT, &params).await.map(drop)?)
}

/// Counts a new key in; what lay under it goes.
async fn make_room(tx: &mut WriteTx, owner: &str, key: &str, keys_max: i64, now_ms: i64) -> Result<(), Error> {
    remove(tx, [Row(vec![owner.into(), key.into()])]).await?;
    let count_in = [owner.into(), if keys_max > 0 { keys_max } else { i64::MAX }.into()];
    if tx.execute(COUNT_IN, &count_in).await? > 0 {
        return Ok(());
    }
    let expired = tx.query(EXPIRED_OF, &[owner.into(), now_ms.into()]).await?;
    remove(tx, affordable(expired)?).await?;
    if tx.execute(COUNT_IN, &count_in).await? > 0 {
        return Ok(());
    }
    let message = format!("quota exceeded for kv_keys: limit {keys_max} keys a namespace");
    Err(Error::new(Kind::Precondition, "ERR_QUOTA_001", message))
}

/// Removes rows given as owner and key; answers how many there were.
async fn remove(tx: &mut WriteTx, rows: impl IntoIterator<Item = Row>) -> Result<i64, Error> {
    let mut removed = 0;
    for Row(row) in rows {
        if tx.execute(REMOVE, &row).await? > 0 {
            removed += 1;
            tx.execute(REMOVE_MEMBERS, &row).await?;
            tx.execute(COUNT_OUT, &[row[0].clone(), 1.into()]).await?;
        }
    }
    Ok(removed)
}

async fn add_member(
    tx: &mut WriteTx,
    owner: &str,
    key: &str,
    new: &New,
    quota: Quota,
    now_ms: i64,
) -> Result<Answer, Error> {
    if new.value.len() > KV_MEMBER_BYTES_MAX {
        let bytes = new.value.len();
        return Err(invalid(format!("member of {bytes} bytes; at most {KV_MEMBER_BYTES_MAX} are allowed")));
    }
    let row = tx.query_opt(LOAD, &[owner.into(), key.into()]).await?;
    let stored = live(row.as_ref(), now_ms)?;
    if stored.as_ref().is_some_and(|stored| !stored.is_set) {
        return Err(invalid("key holds a value, not a set".to_owned()));
    }
    let mut expires_ms = expiry(new.ttl, now_ms);
    match &stored {
        None => {
            make_room(tx, owner, key, quota.keys, now_ms).await?;
            let params = [owner.into(), key.into(), 1.into(), Vec::new().into(), 0.into(), expires_ms.into()];
            tx.execute(INSERT, &params).await?;
        }
        // Without a lifetime of its own, a new member leaves the set's alone.
        Some(stored) if new.ttl <= 0 => expires_ms = stored.found.expires_ms,
        Some(_) => {}
    }
    let member = [owner.into(), key.into(), new.value.clone().into()];
    if tx.execute(ADD_MEMBER, &member).await? == 0 {
        return Ok(Answer { counter: stored.map_or(0, |stored| stored.members), ..Answer::default() });
    }
    let members = stored.map_or(0, |stored| stored.members);
    if quota.members > 0 && members >= quota.members {
        // The error undoes the member.
        let message = format!("quota exceeded for kv_members: limit {} members a set", quota.members);
        return Err(Error::new(Kind::Precondition, "ERR_QUOTA_001", message));
    }
    let counted = tx.query_opt(COUNT_MEMBER, &[owner.into(), key.into(), expires_ms.into()]).await?;
    Ok(Answer { counter: counted.map_or(Ok(0), |row| row.int(0))?, applied: true, ..Answer::default() })
}

#[cfg(test)]
mod tests {
    use super::{EXPIRED_MEMBERS_MAX, KV_PAGE_BYTES_MAX, Row, affordable, fitting, successor};

    #[test]
    fn no_more_values_are_read_than_a_page_has_room_for() {
        let third = KV_PAGE_BYTES_MAX / 3;
        assert_eq!(fitting(&[], 10), 0);
        assert_eq!(fitting(&[1, 1, 1], 10), 3);
        assert_eq!(fitting(&[1, 1, 1], 2), 2);
        assert_eq!(fitting(&[third; 1000], 1000), 3);
        assert_eq!(fitting(&[third, third, third + 1, 1], 10), 2, "no smaller one comes before its turn");
        assert_eq!(fitting(&[KV_PAGE_BYTES_MAX + 1, 1], 10), 1, "one goes, however large");
        assert_eq!(fitting(&[1, usize::MAX], 10), 1);
    }

    #[test]
    fn large_sets_expire_in_transactions_of_their_own() {
        let taken = |members: &[i64]| {
            let rows = members.iter().map(|count| Row(vec!["o".into(), "k".into(), (*count).into()])).collect();
            let rows = affordable(rows).unwrap();
            assert!(rows.iter().all(|row| row.0.len() == 2));
            rows.len()
        };
        assert_eq!(taken(&[]), 0);
        assert_eq!(taken(&[0, 5, 0]), 3);
        assert_eq!(taken(&[2 * EXPIRED_MEMBERS_MAX, 0]), 1, "one goes, however large");
        assert_eq!(taken(&[5, EXPIRED_MEMBERS_MAX, 0]), 1);
    }

    #[test]
    fn the_successor_is_behind_everything_with_the_prefix() {
        for (prefix, expected) in [("a", "b"), ("a/", "a0"), ("\u{d7ff}", "\u{e000}"), ("a\u{10ffff}", "b")] {
            assert_eq!(successor(prefix), expected);
        }
        assert!(successor("") > "\u{10ffff}".repeat(256));
    }

    proptest::proptest! {
        #[test]
        fn prefixes_and_successors_order_as_bytes_do(prefix in ".{1,5}", rest in ".{0,5}", other in ".{0,8}") {
            let end = successor(&prefix);
            let is_between = |text: &str| text.as_bytes() >= prefix.as_bytes() && text.as_bytes() < end.as_bytes();
            proptest::prop_assert!(is_between(&[prefix.as_str(), &rest].concat()));
            proptest::prop_assert_eq!(is_between(&other), other.starts_with(&prefix));
        }
    }
}

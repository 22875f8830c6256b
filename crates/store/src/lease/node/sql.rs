//! The rows of leases and nodes.

use std::sync::Arc;

use super::super::{Decide, Error, FencingEpoch, Holder, Loss};
use crate::ledger::{self, Ledger, Migration, Row, Value, WriteTx};

pub(crate) const MIGRATIONS: &[Migration] = &[Migration {
    name: "store_0002_leases",
    sql: "CREATE TABLE lease_nodes (name TEXT PRIMARY KEY, beat BIGINT NOT NULL);
        CREATE TABLE leases (epoch AUTO_ID, id TEXT NOT NULL UNIQUE, key TEXT NOT NULL, slot BIGINT NOT NULL,
            session TEXT NOT NULL, node TEXT NOT NULL, note BYTES NOT NULL, UNIQUE (key, slot));
        CREATE INDEX leases_by_node ON leases (node);
        CREATE TABLE lease_losses (lease TEXT PRIMARY KEY, node TEXT NOT NULL, why BIGINT NOT NULL);
        CREATE INDEX lease_losses_by_node ON lease_losses (node)",
}];

const JOIN: &str = "INSERT INTO lease_nodes (name, beat) VALUES ($1, 0)";
const BEAT: &str = "UPDATE lease_nodes SET beat = beat + 1 WHERE name = $1";
const BEATS: &str = "SELECT name, beat FROM lease_nodes";
const MEMBER: &str = "SELECT name FROM lease_nodes WHERE name = $1";
const COLLECT: &str = "DELETE FROM lease_nodes WHERE name = $1 AND beat = $2";
const FORGET: [&str; 3] = [
    "DELETE FROM lease_nodes WHERE name = $1",
    "DELETE FROM leases WHERE node = $1",
    "DELETE FROM lease_losses WHERE node = $1",
];

const HOLDERS: &str = "SELECT epoch, session, slot, note, id, node FROM leases WHERE key = $1 ORDER BY slot";
const INSERT: &str = "INSERT INTO leases (id, key, slot, session, node, note) VALUES ($1, $2, $3, $4, $5, $6)
    RETURNING epoch";
const REMOVE: &str = "DELETE FROM leases WHERE id = $1";

const LOSE: &str = "INSERT INTO lease_losses (lease, node, why) VALUES ($1, $2, $3)";
const LOSSES: &str = "SELECT lease, why FROM lease_losses WHERE node = $1";
const TOLD: &str = "DELETE FROM lease_losses WHERE lease = $1";

/// What a new lease is to be.
pub(super) struct Wanted {
    pub(super) id: String,
    pub(super) key: String,
    pub(super) session: String,
    pub(super) node: String,
    /// Ids on this key that the node has given back already.
    pub(super) released: Vec<String>,
}

/// A lease that somebody ended.
pub(super) struct Ended {
    pub(super) id: String,
    pub(super) why: Loss,
}

/// A lease as a row.
pub(super) struct Held {
    pub(super) id: String,
    pub(super) node: String,
    pub(super) holder: Holder,
}

/// What a node has to say in a round.
#[derive(Default)]
pub(super) struct Report {
    pub(super) beats: bool,
    pub(super) released: Vec<String>,
    pub(super) told: Vec<String>,
    /// Nodes that are dead, with the heartbeat that they stopped at.
    pub(super) dead: Vec<(String, i64)>,
}

pub(super) async fn insert(ledger: &Ledger, wanted: Wanted, decide: Decide) -> Result<(Holder, Vec<Ended>), Error> {
    let shared = Arc::new((wanted, decide));
    ledger
        .write(move |tx| {
            let shared = shared.clone();
            Box::pin(async move { insert_in(tx, &shared.0, &shared.1).await })
        })
        .await
}

async fn insert_in(tx: &mut WriteTx, wanted: &Wanted, decide: &Decide) -> Result<(Holder, Vec<Ended>), Error> {
    // Conflicts with the collection of this node, if others take it for dead.
    if tx.query_opt(MEMBER, &[wanted.node.as_str().into()]).await?.is_none() {
        return Err(super::fenced());
    }
    for id in &wanted.released {
        tx.execute(REMOVE, &[id.as_str().into()]).await?;
    }
    let held = held(tx.query(HOLDERS, &[wanted.key.as_str().into()]).await?)?;
    let holders: Vec<_> = held.iter().map(|held| held.holder.clone()).collect();
    let grant = decide(&holders)?;
    let ends = held.into_iter().filter(|held| grant.ends.contains(&held.holder.epoch)).collect();
    let ended = end(tx, ends, grant.why).await?;
    let params: [Value; 6] = [
        wanted.id.as_str().into(),
        wanted.key.as_str().into(),
        i64::from(grant.slot).into(),
        wanted.session.as_str().into(),
        wanted.node.as_str().into(),
        grant.note.as_ref().into(),
    ];
    let inserted = tx.query(INSERT, &params).await?;
    let epoch = inserted.first().map_or(Ok(0), |row| row.int(0))?;
    let epoch = FencingEpoch(epoch.unsigned_abs());
    Ok((Holder { session: wanted.session.clone(), epoch, slot: grant.slot, note: grant.note }, ended))
}

async fn end(tx: &mut WriteTx, held: Vec<Held>, why: Loss) -> Result<Vec<Ended>, Error> {
    let mut ended = Vec::with_capacity(held.len());
    for Held { id, node, .. } in held {
        tx.execute(REMOVE, &[id.as_str().into()]).await?;
        tx.execute(LOSE, &[id.as_str().into(), node.into(), code(why).into()]).await?;
        ended.push(Ended { id, why });
    }
    Ok(ended)
}

pub(super) async fn revoke(
    ledger: &Ledger,
    key: String,
    session: Option<String>,
    released: Vec<String>,
) -> Result<Vec<Ended>, Error> {
    let asked = Arc::new((key, session, released));
    ledger
        .write(move |tx| {
            let asked = asked.clone();
            Box::pin(async move {
                let (key, session, released) = asked.as_ref();
                let mut all = held(tx.query(HOLDERS, &[key.as_str().into()]).await?)?;
                all.retain(|held| session.as_ref().is_none_or(|session| held.holder.session == *session));
                all.retain(|held| !released.contains(&held.id));
                end(tx, all, Loss::Revoked).await
            })
        })
        .await
}

pub(super) async fn holders(ledger: &Ledger, key: String) -> Result<Vec<Held>, Error> {
    let rows = ledger.read(move |tx| {
        let key = key.as_str().into();
        Box::pin(async move { tx.query(HOLDERS, &[key]).await })
    });
    Ok(held(rows.await?)?)
}

/// Enters a node, in place of one that it was before.
pub(super) async fn join(ledger: &Ledger, name: String, former: Option<String>) -> Result<(), Error> {
    let names = Arc::new((name, former));
    ledger
        .write(move |tx| {
            let names = names.clone();
            Box::pin(async move {
                if let Some(former) = &names.1 {
                    forget_in(tx, former).await?;
                }
                tx.execute(JOIN, &[names.0.as_str().into()]).await?;
                Ok(())
            })
        })
        .await
}

/// Removes a node with all that it held.
pub(super) async fn forget(ledger: &Ledger, name: String) -> Result<(), Error> {
    let name = Arc::new(name);
    ledger
        .write(move |tx| {
            let name = name.clone();
            Box::pin(async move { forget_in(tx, &name).await })
        })
        .await
}

async fn forget_in(tx: &mut WriteTx, name: &str) -> Result<(), Error> {
    for sql in FORGET {
        tx.execute(sql, &[name.into()]).await?;
    }
    Ok(())
}

/// The losses that a node has to tell its holders, and everybody's heartbeats.
pub(super) async fn look(
    ledger: &Ledger,
    name: String,
    beats: bool,
) -> Result<(Vec<Ended>, Vec<(String, i64)>), Error> {
    ledger
        .read(move |tx| {
            let name = name.as_str().into();
            Box::pin(async move {
                let losses = tx.query(LOSSES, &[name]).await?;
                let losses = losses.iter().map(ended).collect::<Result<_, _>>()?;
                let all = if beats { tx.query(BEATS, &[]).await? } else { Vec::new() };
                let all = all.iter().map(|row| Ok((row.text(0)?.to_owned(), row.int(1)?)));
                Ok((losses, all.collect::<Result<_, ledger::Error>>()?))
            })
        })
        .await
}

/// Writes a node's round; answers whether the node is still a member.
pub(super) async fn report(ledger: &Ledger, name: String, report: Report) -> Result<bool, Error> {
    let shared = Arc::new((name, report));
    ledger
        .write(move |tx| {
            let shared = shared.clone();
            Box::pin(async move {
                let (name, report) = shared.as_ref();
                if report.beats && tx.execute(BEAT, &[name.as_str().into()]).await? == 0 {
                    return Ok(false);
                }
                for id in &report.released {
                    tx.execute(REMOVE, &[id.as_str().into()]).await?;
                }
                for id in &report.told {
                    tx.execute(TOLD, &[id.as_str().into()]).await?;
                }
                for (name, beat) in &report.dead {
                    // Not if it has renewed since, or another node was here first.
                    if tx.execute(COLLECT, &[name.as_str().into(), (*beat).into()]).await? > 0 {
                        forget_in(tx, name).await?;
                    }
                }
                Ok(true)
            })
        })
        .await
}

fn held(rows: Vec<Row>) -> Result<Vec<Held>, ledger::Error> {
    let one = |row: Row| {
        let slot = u32::try_from(row.int(2)?).unwrap_or(u32::MAX);
        let epoch = FencingEpoch(row.int(0)?.unsigned_abs());
        let holder = Holder { session: row.text(1)?.to_owned(), epoch, slot, note: row.bytes(3)?.to_vec().into() };
        Ok(Held { id: row.text(4)?.to_owned(), node: row.text(5)?.to_owned(), holder })
    };
    rows.into_iter().map(one).collect()
}

fn code(why: Loss) -> i64 {
    match why {
        Loss::Replaced => 1,
        Loss::Transferred => 2,
        Loss::Revoked => 3,
        Loss::Fenced => 4,
    }
}

fn ended(row: &Row) -> Result<Ended, ledger::Error> {
    let why = match row.int(1)? {
        1 => Loss::Replaced,
        2 => Loss::Transferred,
        4 => Loss::Fenced,
        // A newer node's reason would still be somebody's decision.
        _ => Loss::Revoked,
    };
    Ok(Ended { id: row.text(0)?.to_owned(), why })
}

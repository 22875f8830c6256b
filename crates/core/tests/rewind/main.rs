//! Yesterday's log beside today's ledger, as after a restore: what is appended from now on arrives.

#![allow(clippy::disallowed_methods, clippy::panic, clippy::unwrap_used, reason = "test code")]

mod sql;

use std::{path::Path, process::Command, time::Duration};

use tokio::time::timeout;
use trunkline_core::{
    caller::Credential,
    gate::Gate,
    identity::Identity,
    session::{self, Session, Sessions},
};
use trunkline_store::{
    Store,
    log::{Append, Item, Topic},
};

const PATIENCE: Duration = Duration::from_secs(20);

/// A unique agent's lane, and that of the work of its program.
const LANES: [&str; 2] = ["ag::ws::bot::main", "tb::ws::worker"];

async fn open(dir: &Path) -> (Store, Sessions) {
    let migrations = trunkline_core::migrations();
    let store = Store::open(dir, trunkline_store::Options { migrations, ..Default::default() }).unwrap();
    let sessions = Sessions::new(Gate::open(store.clone()).await.unwrap(), session::Options::default());
    (store, sessions)
}

async fn append(store: &Store, text: &str) {
    for lane in LANES {
        store.log.append(Append::new(&Topic::new(lane).unwrap(), text.to_owned())).await.unwrap();
    }
}

/// The next of the agent's lane, and the next piece of work; both delivered, and both positions saved.
async fn take(agent: &mut Session, worker: &mut Session) -> [String; 2] {
    let item = timeout(PATIENCE, agent.reader.next()).await.unwrap().unwrap();
    let Item::Record(record) = item else { panic!("{item:?}") };
    agent.delivery(record.offset).done();
    agent.save().await.unwrap();
    let work = worker.work.clone().unwrap();
    let piece = timeout(PATIENCE, work.pull()).await.unwrap().unwrap();
    work.done(piece.offset);
    worker.save().await.unwrap();
    [record, piece].map(|record| String::from_utf8(record.payload.to_vec()).unwrap())
}

async fn attach(sessions: &Sessions) -> (Session, Session) {
    let agent = Identity::agent("ws", "bot", "main").unwrap();
    let worker = Identity::task("ws", "worker").unwrap();
    let credential = || Credential::none(true);
    (sessions.attach(agent, credential(), "").await.unwrap(), sessions.attach(worker, credential(), "").await.unwrap())
}

/// Gives the log a new epoch, and does not tell the ledger, which knows a sandbox from behind the log's tail.
async fn fork_only(dir: &Path) {
    let migrations = trunkline_core::migrations();
    let store = Store::open(dir, trunkline_store::Options { migrations, ..Default::default() }).unwrap();
    let beyond = store.log.tail().offset.0 as i64 + 2;
    store.ledger.write(move |tx| sql::insert_sandbox(tx, beyond)).await.unwrap();
    store.log.fork().await.unwrap();
    store.stop().await;
}

fn copy(from: &Path, to: &Path) {
    assert!(Command::new("cp").arg("-a").arg(from).arg(to).status().unwrap().success());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_comes_after_a_restore_arrives() {
    let dir = tempfile::tempdir().unwrap();
    let (log, backup) = (dir.path().join("log"), dir.path().join("backup"));

    let (store, sessions) = open(dir.path()).await;
    let (mut agent, mut worker) = attach(&sessions).await;
    append(&store, "before").await;
    assert_eq!(take(&mut agent, &mut worker).await, ["before", "before"]);
    store.stop().await;
    drop((agent, worker, sessions, store));
    copy(&log, &backup);

    let (store, sessions) = open(dir.path()).await;
    let before = store.log.tail();
    let (mut agent, mut worker) = attach(&sessions).await;
    for text in ["lost 1", "lost 2", "lost 3"] {
        append(&store, text).await;
        assert_eq!(take(&mut agent, &mut worker).await, [text, text]);
    }
    store.stop().await;
    drop((agent, worker, sessions, store));
    std::fs::remove_dir_all(&log).unwrap();
    std::fs::rename(&backup, &log).unwrap();

    // Twice: the second start finds all in order. The first one after a crash between the log and the ledger.
    fork_only(dir.path()).await;
    for round in ["new 1", "new 2"] {
        let (store, sessions) = open(dir.path()).await;
        assert_ne!(store.log.epoch(), before.epoch, "cursors from before are refused");
        assert_eq!(store.log.forked_from(), Some(before));
        append(&store, round).await;
        let (mut agent, mut worker) = attach(&sessions).await;
        assert_eq!(take(&mut agent, &mut worker).await, [round, round], "and nothing from before again");
        assert_eq!(store.log.clamped(), 0);
        store.stop().await;
    }
}

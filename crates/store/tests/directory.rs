//! A data directory belongs to one process at a time, and to versions that know its format.

#![allow(clippy::panic, clippy::unwrap_used, reason = "test code")]

use std::{
    fs::{self, Permissions},
    os::unix::fs::PermissionsExt as _,
    path::Path,
};

use trunkline_store::{
    OpenError, Options, Store,
    log::{self, Append, Topic},
};

#[tokio::test]
async fn a_directory_in_use_is_refused_with_the_holders_pid() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(dir.path(), Options::default()).unwrap();
    let refused = Store::open(dir.path(), Options::default()).err().unwrap();
    assert!(matches!(&refused, OpenError::InUse { pid, .. } if *pid == std::process::id().to_string()), "{refused}");
    assert!(refused.to_string().contains(&dir.path().display().to_string()));
    store.stop().await;
    drop(store);
    Store::open(dir.path(), Options::default()).unwrap().stop().await;
}

#[tokio::test]
async fn a_newer_format_is_refused_and_left_alone() {
    let dir = tempfile::tempdir().unwrap();
    Store::open(dir.path(), Options::default()).unwrap().stop().await;
    fs::write(dir.path().join("FORMAT"), "2\n").unwrap();
    let refused = Store::open(dir.path(), Options::default()).err().unwrap();
    assert!(matches!(&refused, OpenError::NewerFormat { found, .. } if found == "2"), "{refused}");
    assert_eq!(fs::read_to_string(dir.path().join("FORMAT")).unwrap(), "2\n");
}

/// What a power loss leaves of a file that was not synced.
#[tokio::test]
async fn a_format_that_was_not_written_is_written() {
    for left in [&b""[..], b"\0\0"] {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(dir.path(), Options::default()).unwrap();
        let offset = append(&store).await;
        store.stop().await;
        drop(store);
        fs::write(dir.path().join("FORMAT"), left).unwrap();
        let store = Store::open(dir.path(), Options::default()).unwrap();
        assert_eq!(store.log.tail().offset, offset);
        store.stop().await;
        assert_eq!(fs::read_to_string(dir.path().join("FORMAT")).unwrap(), "1\n");
    }
}

async fn append(store: &Store) -> log::Offset {
    store.log.append(Append::new(&Topic::new("t").unwrap(), "kept")).await.unwrap().offset
}

/// A first start that ended anywhere is begun again.
#[tokio::test]
async fn an_interrupted_first_start_is_begun_again() {
    let leave = |left: fn(&Path)| {
        let dir = tempfile::tempdir().unwrap();
        let log = dir.path().join("log");
        fs::create_dir(&log).unwrap();
        left(&log);
        dir
    };
    let half: [fn(&Path); 6] = [
        |_| {},
        |log| fs::write(log.join("making"), "").unwrap(),
        // It was made, but not all of it need be on the disk.
        |log| {
            fs::write(log.join("making"), "").unwrap();
            fs::create_dir(log.join("keyspaces")).unwrap();
            fs::write(log.join("0.jnl"), [0; 9000]).unwrap();
            fs::write(log.join("version"), "FJL\u{3}").unwrap();
        },
        // As earlier versions leave it.
        |log| {
            fs::create_dir_all(log.join("new/keyspaces/0")).unwrap();
            fs::write(log.join("new/version"), "").unwrap();
        },
        // As an earlier version leaves it on a full disk.
        |log| {
            fs::write(log.join("lock"), "").unwrap();
            fs::create_dir(log.join("keyspaces")).unwrap();
            fs::write(log.join("0.jnl"), "").unwrap();
        },
        |log| {
            fs::create_dir(log.join("keyspaces")).unwrap();
            fs::write(log.join("0.jnl"), [0; 9000]).unwrap();
            fs::write(log.join("version"), "").unwrap();
        },
    ];
    for (index, half) in half.into_iter().enumerate() {
        let dir = leave(half);
        for offset in 1..3 {
            let store = Store::open(dir.path(), Options::default()).unwrap_or_else(|e| panic!("{index}: {e}"));
            assert_eq!(append(&store).await, log::Offset(offset), "{index}");
            store.stop().await;
        }
        assert!(!dir.path().join("log/new").exists() && !dir.path().join("log/making").exists());
    }
}

#[tokio::test]
async fn a_log_with_records_is_not_made_anew() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(dir.path(), Options::default()).unwrap();
    for _ in 0..100 {
        append(&store).await;
    }
    store.stop().await;
    drop(store);
    let marker = fs::read(dir.path().join("log/version")).unwrap();
    fs::remove_file(dir.path().join("log/version")).unwrap();
    let refused = Store::open(dir.path(), Options::default()).err().unwrap();
    assert!(matches!(&refused, OpenError::Log(log::Error::Corrupt { .. })), "{refused}");
    fs::write(dir.path().join("log/version"), marker).unwrap();
    fs::write(dir.path().join("log/making"), "").unwrap();
    let refused = Store::open(dir.path(), Options::default()).err().unwrap().to_string();
    assert!(refused.contains("making"), "{refused}");
    fs::remove_file(dir.path().join("log/making")).unwrap();
    let store = Store::open(dir.path(), Options::default()).unwrap();
    assert_eq!(store.log.tail().offset, log::Offset(100), "nothing was removed");
    store.stop().await;
}

#[tokio::test]
async fn free_space_is_told() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(dir.path(), Options::default()).unwrap();
    assert!(store.free_bytes().unwrap() > 0);
    store.stop().await;
}

/// As a volume that was mounted open to everybody. The secrets of apps are in it.
#[tokio::test]
async fn what_others_could_read_is_closed_to_them() {
    let dir = tempfile::tempdir().unwrap();
    let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
    let open_to_all = |path: &Path, mode| fs::set_permissions(path, Permissions::from_mode(mode)).unwrap();
    open_to_all(dir.path(), 0o755);
    Store::open(dir.path(), Options::default()).unwrap().stop().await;
    let ledger = dir.path().join("ledger.sqlite");
    assert_eq!((mode(dir.path()), mode(&ledger)), (0o700, 0o600));
    // An older version left them so.
    open_to_all(dir.path(), 0o777);
    open_to_all(&ledger, 0o644);
    for name in ["log", "files"] {
        open_to_all(&dir.path().join(name), 0o755);
    }
    let store = Store::open(dir.path(), Options::default()).unwrap();
    for entry in fs::read_dir(dir.path()).unwrap().map(Result::unwrap) {
        let name = entry.file_name().into_string().unwrap();
        if !matches!(name.as_str(), "LOCK" | "FORMAT") {
            assert_eq!(mode(&entry.path()) & 0o077, 0, "{name}");
        }
    }
    assert_eq!(mode(dir.path()), 0o700);
    store.stop().await;
}

#[tokio::test]
async fn a_panic_of_what_goes_on_besides_is_a_fault() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(dir.path(), Options::default()).unwrap();
    let mut jobs = tokio::task::JoinSet::new();
    for panics in [false, true] {
        let on_panic = store.guard("job");
        jobs.spawn(async move {
            let _on_panic = on_panic;
            assert!(!panics, "on purpose");
        });
    }
    // Whether one panicked is what the store is asked for.
    while jobs.join_next().await.is_some() {}
    assert_eq!(store.failed().await.to_string(), "job panicked");
    store.stop().await;
}

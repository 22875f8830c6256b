//! A data directory belongs to one process at a time, and to versions that know its format.

#![allow(clippy::unwrap_used, reason = "test code")]

use std::{fs::Permissions, os::unix::fs::PermissionsExt as _, path::Path};

use trunkline_store::{OpenError, Options, Store};

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
    std::fs::write(dir.path().join("FORMAT"), "2\n").unwrap();
    let refused = Store::open(dir.path(), Options::default()).err().unwrap();
    assert!(matches!(&refused, OpenError::NewerFormat { found, .. } if found == "2"), "{refused}");
    assert_eq!(std::fs::read_to_string(dir.path().join("FORMAT")).unwrap(), "2\n");
}

/// As a volume that was mounted open to everybody. The secrets of apps are in it.
#[tokio::test]
async fn what_others_could_read_is_closed_to_them() {
    let dir = tempfile::tempdir().unwrap();
    let mode = |path: &Path| std::fs::metadata(path).unwrap().permissions().mode() & 0o777;
    let open_to_all = |path: &Path, mode| std::fs::set_permissions(path, Permissions::from_mode(mode)).unwrap();
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
    for entry in std::fs::read_dir(dir.path()).unwrap().map(Result::unwrap) {
        let name = entry.file_name().into_string().unwrap();
        if !matches!(name.as_str(), "LOCK" | "FORMAT") {
            assert_eq!(mode(&entry.path()) & 0o077, 0, "{name}");
        }
    }
    assert_eq!(mode(dir.path()), 0o700);
    store.stop().await;
}

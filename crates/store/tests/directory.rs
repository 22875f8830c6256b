//! A data directory belongs to one process at a time, and to versions that know its format.

#![allow(clippy::unwrap_used, reason = "test code")]

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

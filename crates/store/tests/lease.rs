//! The leases' suite on each back end, and what several nodes owe each other.

#![allow(clippy::disallowed_methods, clippy::expect_used, clippy::panic, clippy::unwrap_used, reason = "test code")]

use std::time::Duration;

use trunkline_store::{
    conformance::postgres::{Gateway, database},
    lease::{Error, Leases, Loss, Options, Policy},
    lease_suite,
    ledger::{self, Ledger},
};

const OPTIONS: Options = Options { ttl: Duration::from_secs(60), losses_poll: Duration::from_millis(20) };

/// Short enough to wait for.
const SHORT: Options = Options { ttl: Duration::from_secs(2), ..OPTIONS };

async fn node(url: &str) -> Leases {
    node_with(url, OPTIONS).await
}

async fn node_with(url: &str, options: Options) -> Leases {
    let ledger = Ledger::open_postgres(url, &[], ledger::Options::default()).await.unwrap();
    Leases::join(ledger, options).await.unwrap()
}

mod memory {
    use super::*;

    lease_suite!(Leases::in_memory());
}

mod sqlite {
    use super::*;

    /// The only node on a ledger in a directory of its own.
    struct Alone {
        leases: Leases,
        _dir: tempfile::TempDir,
    }

    impl std::ops::Deref for Alone {
        type Target = Leases;

        fn deref(&self) -> &Leases {
            &self.leases
        }
    }

    async fn alone() -> Alone {
        let dir = tempfile::tempdir().unwrap();
        let ledger = Ledger::open_sqlite(&dir.path().join("ledger"), &[], ledger::Options::default()).unwrap();
        Alone { leases: Leases::join(ledger, OPTIONS).await.unwrap(), _dir: dir }
    }

    lease_suite!(*alone().await);
}

mod postgres {
    use super::*;

    lease_suite!(node(&database().await).await);
}

#[tokio::test]
async fn a_key_is_held_on_one_node_only() {
    let url = database().await;
    let (a, b) = (node(&url).await, node(&url).await);
    let held = a.acquire("k", "s", Policy::Reject, "note").await.unwrap();
    assert_eq!(b.holders("k").await.unwrap(), [held.holder().clone()]);
    assert!(
        matches!(b.acquire("k", "t", Policy::Reject, "").await, Err(Error::Held { holder, .. }) if holder == *held.holder())
    );
    drop(held);
    let mut attempts = 0;
    let later = loop {
        match b.acquire("k", "t", Policy::Reject, "").await {
            Ok(lease) => break lease,
            // The release is on its way.
            Err(Error::Held { .. }) if attempts < 500 => attempts += 1,
            Err(error) => panic!("{error}"),
        }
        tokio::time::sleep(Duration::from_millis(5)).await;
    };
    assert!(later.is_held());
}

#[tokio::test]
async fn another_node_ends_a_lease_and_its_holder_is_told() {
    let url = database().await;
    let (a, b) = (node(&url).await, node(&url).await);

    let old = a.acquire("replaced", "s", Policy::Replace, "").await.unwrap();
    let new = b.acquire("replaced", "t", Policy::Replace, "").await.unwrap();
    assert_eq!(old.lost().await, Loss::Replaced);
    assert!(new.holder().epoch > old.holder().epoch);

    let old = a.acquire("transferred", "s", Policy::Reject, "1").await.unwrap();
    let new = b.transfer("transferred", "s", "t", |note| [&note[..], b"2"].concat().into()).await.unwrap();
    assert_eq!(old.lost().await, Loss::Transferred);
    assert_eq!(new.holder().note, "12");

    let old = a.acquire("revoked", "s", Policy::Reject, "").await.unwrap();
    assert_eq!(b.revoke("revoked", Some("s")).await.unwrap(), 1);
    assert_eq!(old.lost().await, Loss::Revoked);
    drop(old);
    b.acquire("revoked", "t", Policy::Reject, "").await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn of_many_that_ask_at_once_one_gets_each_key() {
    let url = database().await;
    let nodes = [node(&url).await, node(&url).await];
    let asks: Vec<_> = (0..400)
        .map(|n| {
            let node = nodes[n % 2].clone();
            tokio::spawn(
                async move { node.acquire(&format!("k{}", n / 4), &format!("s{n}"), Policy::Reject, "").await },
            )
        })
        .collect();
    let mut held = Vec::new();
    for ask in asks {
        match ask.await.unwrap() {
            Ok(lease) => held.push(lease),
            Err(Error::Held { .. }) => {}
            Err(error) => panic!("{error}"),
        }
    }
    let mut keys: Vec<_> = held.iter().map(|lease| lease.key().to_owned()).collect();
    keys.sort();
    keys.dedup();
    assert_eq!((held.len(), keys.len()), (100, 100));
}

#[tokio::test]
async fn an_asker_that_goes_away_leaves_no_lease() {
    let node = node(&database().await).await;
    for patience in 0..30 {
        let ask = node.acquire("k", "gone", Policy::Replace, "");
        // It may have been answered before, or not at all.
        let _ = tokio::time::timeout(Duration::from_micros(100 * patience), ask).await;
    }
    tokio::time::timeout(Duration::from_secs(20), async {
        while node.acquire("k", "stays", Policy::Reject, "").await.is_err() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    })
    .await
    .expect("the key is free in the end");
}

/// The promise that everything else rests on: whoever is cut off knows it before anybody takes over.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_that_is_cut_off_fences_itself_before_others_take_over() {
    let url = database().await;
    let gateway = Gateway::open(&url).await;
    let (cut_off, other) = (node_with(gateway.url(), SHORT).await, node_with(&url, SHORT).await);
    let lease = cut_off.acquire("k", "s", Policy::Reject, "").await.unwrap();

    gateway.hold();
    let taken_over = async {
        loop {
            match other.acquire("k", "t", Policy::Reject, "").await {
                Ok(new) => return new,
                // A machine that stalls can make this one fence itself for a while too.
                Err(Error::Held { .. } | Error::Unavailable { .. }) => {}
                Err(error) => panic!("{error}"),
            }
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    };
    let new = tokio::time::timeout(Duration::from_secs(20), taken_over).await.expect("the key is free in the end");
    assert!(!lease.is_held(), "two would hold it");
    assert_eq!(lease.lost().await, Loss::Fenced);
    assert!(new.holder().epoch > lease.holder().epoch);

    gateway.pass();
    tokio::time::timeout(Duration::from_secs(20), async {
        while cut_off.acquire("again", "s", Policy::Reject, "").await.is_err() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    })
    .await
    .expect("the node joins again");
    drop(lease);
    assert!(new.is_held(), "a fenced lease releases nothing");
    assert_eq!(other.holders("k").await.unwrap(), [new.holder().clone()]);
}

#[tokio::test]
async fn a_node_that_leaves_frees_its_keys_at_once() {
    let url = database().await;
    let (a, b) = (node(&url).await, node(&url).await);
    let held = a.acquire("k", "s", Policy::Reject, "").await.unwrap();
    a.leave().await;
    assert_eq!(held.lost().await, Loss::Fenced);
    b.acquire("k", "t", Policy::Reject, "").await.unwrap();
    assert!(matches!(a.acquire("k2", "s", Policy::Reject, "").await, Err(Error::Unavailable { .. })));
}

//! What leases do on every back end.

use std::num::NonZeroU32;

use bytes::Bytes;

use crate::lease::{Error, Leases, Loss, Policy};

/// One test per function of this suite, on the [`Leases`] that `$leases` evaluates to.
#[macro_export]
macro_rules! lease_suite {
    ($leases:expr) => {
        $crate::lease_suite!(@tests $leases;
            a_taken_key_is_refused, dropping_releases, replacing_tells_the_old_holder, slots_are_filled_and_freed,
            a_transfer_keeps_the_note, only_the_holder_is_taken_over, revoking_tells_the_holder,
            epochs_grow, a_late_release_leaves_the_successor_alone,
        );
    };
    (@tests $leases:expr; $($name:ident,)+) => {
        $(#[tokio::test]
        async fn $name() {
            $crate::conformance::lease::$name(&$leases).await;
        })+
    };
}

const NOTE: &[u8] = b"note";
const THREE: NonZeroU32 = NonZeroU32::new(3).unwrap();

pub async fn a_taken_key_is_refused(leases: &Leases) {
    let held = leases.acquire("k", "a", Policy::Reject, NOTE).await.unwrap();
    let refused = leases.acquire("k", "b", Policy::Reject, NOTE).await.err().unwrap();
    assert_eq!(refused, Error::Held { key: "k".into(), holder: held.holder().clone() });
    leases.acquire("other", "b", Policy::Reject, NOTE).await.unwrap();
    assert!(held.is_held());
}

pub async fn dropping_releases(leases: &Leases) {
    // Often, because what is given back is written while others look.
    for _ in 0..100 {
        drop(leases.acquire("k", "a", Policy::Reject, NOTE).await.unwrap());
        assert_eq!(leases.holders("k").await.unwrap(), []);
    }
    leases.acquire("k", "b", Policy::Reject, NOTE).await.unwrap();
}

pub async fn replacing_tells_the_old_holder(leases: &Leases) {
    let old = leases.acquire("k", "a", Policy::Replace, NOTE).await.unwrap();
    let new = leases.acquire("k", "b", Policy::Replace, NOTE).await.unwrap();
    assert_eq!(old.lost().await, Loss::Replaced);
    assert!(!old.is_held() && new.is_held());
    assert_eq!(leases.holders("k").await.unwrap(), [new.holder().clone()]);
}

pub async fn slots_are_filled_and_freed(leases: &Leases) {
    let acquire = async |session| leases.acquire("k", session, Policy::Slots(THREE), NOTE).await;
    let mut held = Vec::new();
    for session in ["a", "b", "c"] {
        held.push(acquire(session).await.unwrap());
    }
    assert_eq!(held.iter().map(|lease| lease.holder().slot).collect::<Vec<_>>(), [0, 1, 2]);
    assert!(matches!(acquire("d").await, Err(Error::Held { .. })));
    drop(held.remove(1));
    assert_eq!(acquire("d").await.unwrap().holder().slot, 1, "the slot that was freed");
}

pub async fn a_transfer_keeps_the_note(leases: &Leases) {
    let old = leases.acquire("k", "a", Policy::Reject, &b"1"[..]).await.unwrap();
    let new = leases.transfer("k", "a", "b", |note| Bytes::from([&note[..], b"2"].concat())).await.unwrap();
    assert_eq!(old.lost().await, Loss::Transferred);
    assert_eq!((new.holder().session.as_str(), &new.holder().note[..]), ("b", &b"12"[..]));
}

pub async fn only_the_holder_is_taken_over(leases: &Leases) {
    let held = leases.acquire("k", "a", Policy::Reject, NOTE).await.unwrap();
    for wrong in ["b", ""] {
        assert!(matches!(leases.transfer("k", wrong, "c", Bytes::clone).await, Err(Error::NotHolder { .. })));
    }
    assert!(matches!(leases.transfer("free", "a", "c", Bytes::clone).await, Err(Error::NotHolder { .. })));
    assert!(held.is_held());
}

pub async fn revoking_tells_the_holder(leases: &Leases) {
    let held = leases.acquire("k", "a", Policy::Reject, NOTE).await.unwrap();
    assert_eq!(leases.revoke("k", Some("b")).await.unwrap(), 0);
    assert!(held.is_held());
    assert_eq!(leases.revoke("k", None).await.unwrap(), 1);
    assert_eq!(held.lost().await, Loss::Revoked);
    leases.acquire("k", "b", Policy::Reject, NOTE).await.unwrap();
}

pub async fn epochs_grow(leases: &Leases) {
    let mut last = None;
    for key in ["a", "b", "a", "c"] {
        let epoch = leases.acquire(key, "s", Policy::Reject, NOTE).await.unwrap().holder().epoch;
        assert!(Some(epoch) > last);
        last = Some(epoch);
    }
}

pub async fn a_late_release_leaves_the_successor_alone(leases: &Leases) {
    let old = leases.acquire("k", "a", Policy::Reject, NOTE).await.unwrap();
    let new = leases.transfer("k", "a", "b", Bytes::clone).await.unwrap();
    drop(old);
    assert!(new.is_held());
    assert_eq!(leases.holders("k").await.unwrap(), [new.holder().clone()]);
}

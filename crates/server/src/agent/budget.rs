//! What clients may have the server hold for them: replies that they have not taken, in bytes, because a client chooses how large
//! they are. One client has many streams, so what they hold is bounded for all of one owner and for all of the server together,
//! too.

use std::{
    collections::HashMap,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError, Weak,
        atomic::{AtomicIsize, AtomicUsize, Ordering::SeqCst},
    },
};

use prometheus_client::metrics::gauge::Gauge;
use tokio::sync::Notify;
use trunkline_core::{caller::Caller, gate::rules::Name};

/// Encoded bytes of replies, on their way and expected, at which no frame of the stream is read until its client reads its own.
/// Room for some thirty of the largest values at once; one more reply of any size may come on top.
pub(super) const REPLIES_BYTES_MAX: usize = 32 * 1024 * 1024;

/// What every stream has of these whatever the others hold, so that each goes on by one request at least.
const REPLIES_BYTES_OWN: usize = 64 * 1024;

/// Bytes beyond those of all streams together at which only streams that hold less than their own go on. Room for eight that
/// hold the most.
const REPLIES_TOTAL_MAX: usize = 256 * 1024 * 1024;

/// Those of them that the streams of one owner may hold, so that one leaves room for the others. Room for two streams that hold
/// the most.
const REPLIES_OWNER_MAX: usize = REPLIES_TOTAL_MAX / 4;

/// What the streams of a server hold together. Clones share it.
#[derive(Clone, Default)]
pub(crate) struct Replies(Arc<All>);

#[derive(Default)]
struct All {
    beyond: Beyond,
    /// Those who have a stream.
    owners: Mutex<HashMap<Owner, Weak<Share>>>,
    /// All bytes.
    total: Gauge,
}

/// Bytes beyond each stream's own, of several.
#[derive(Default)]
struct Beyond {
    /// Below zero for the moment in which they are given back before they are counted.
    bytes: AtomicIsize,
    /// They went below what they may be.
    freed: Notify,
}

/// Who answers for what streams hold.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
enum Owner {
    /// The API key, by id: whoever has it can be as many as it likes.
    Key(String),
    /// Without one, the principal. A user's windows are one.
    Principal(Name),
}

/// What the streams of one owner hold together; gone with the last of them.
pub(super) struct Share {
    owner: Owner,
    beyond: Beyond,
    all: Replies,
}

/// The bytes that are out on one stream.
pub(super) struct Budget {
    used: AtomicUsize,
    freed: Notify,
    share: Arc<Share>,
}

impl Beyond {
    fn is_spent(&self, most: usize) -> bool {
        usize::try_from(self.bytes.load(SeqCst)).is_ok_and(|bytes| bytes >= most)
    }

    /// Wakes those who wait only if there is room again now.
    fn add(&self, more: isize, most: usize) {
        let (before, most) = (self.bytes.fetch_add(more, SeqCst), most as isize);
        if before >= most && before + more < most {
            self.freed.notify_waiters();
        }
    }
}

impl Replies {
    pub(crate) fn new(total: Gauge) -> Self {
        Self(Arc::new(All { total, ..All::default() }))
    }

    /// What the streams of a caller's owner hold together.
    pub(super) fn share_of(&self, caller: &Caller) -> Arc<Share> {
        let principal = || Owner::Principal(caller.subject.clone());
        self.share(caller.credential.token.clone().map_or_else(principal, Owner::Key))
    }

    fn share(&self, owner: Owner) -> Arc<Share> {
        let mut owners = self.owners();
        if let Some(share) = owners.get(&owner).and_then(Weak::upgrade) {
            return share;
        }
        let share = Arc::new(Share { owner: owner.clone(), beyond: Beyond::default(), all: self.clone() });
        owners.insert(owner, Arc::downgrade(&share));
        share
    }

    fn owners(&self) -> MutexGuard<'_, HashMap<Owner, Weak<Share>>> {
        // Nothing in a section can panic half way.
        self.0.owners.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Share {
    fn is_spent(&self) -> bool {
        self.beyond.is_spent(REPLIES_OWNER_MAX) || self.all.0.beyond.is_spent(REPLIES_TOTAL_MAX)
    }

    /// What one stream holds was so many bytes, and is so many now.
    fn note(&self, before: usize, now: usize) {
        self.all.0.total.inc_by(now as i64 - before as i64);
        let more = beyond_own(now) as isize - beyond_own(before) as isize;
        if more != 0 {
            self.beyond.add(more, REPLIES_OWNER_MAX);
            self.all.0.beyond.add(more, REPLIES_TOTAL_MAX);
        }
    }
}

impl Drop for Share {
    fn drop(&mut self) {
        let mut owners = self.all.owners();
        // Its owner may have come again meanwhile.
        if owners.get(&self.owner).is_some_and(|share| share.strong_count() == 0) {
            owners.remove(&self.owner);
        }
    }
}

fn beyond_own(bytes: usize) -> usize {
    bytes.saturating_sub(REPLIES_BYTES_OWN)
}

impl Budget {
    /// One that counts among those of its owner.
    pub(super) fn new(share: Arc<Share>) -> Arc<Self> {
        Arc::new(Self { used: AtomicUsize::new(0), freed: Notify::new(), share })
    }

    /// Takes bytes, however many are left; they come back when the debt is dropped.
    pub(super) fn take(self: &Arc<Self>, bytes: usize) -> Debt {
        let before = self.used.fetch_add(bytes, SeqCst);
        self.share.note(before, before + bytes);
        Debt { budget: self.clone(), bytes }
    }

    /// Whether nothing more should be taken.
    pub(super) fn is_spent(&self) -> bool {
        let used = self.used.load(SeqCst);
        used >= REPLIES_BYTES_MAX || used >= REPLIES_BYTES_OWN && self.share.is_spent()
    }

    /// Resolves when a spent budget is not spent any more; at times without need. Cancel-safe.
    pub(super) async fn freed(&self) {
        // From here on none of them is missed.
        let (of_all, of_owner) = (self.share.all.0.beyond.freed.notified(), self.share.beyond.freed.notified());
        if self.is_spent() {
            tokio::select! {
                () = of_all => {}
                () = of_owner => {}
                () = self.freed.notified() => {}
            }
        }
    }
}

/// Bytes of a budget; dropping it gives them back.
pub(super) struct Debt {
    budget: Arc<Budget>,
    bytes: usize,
}

impl Drop for Debt {
    fn drop(&mut self) {
        let before = self.budget.used.fetch_sub(self.bytes, SeqCst);
        let now = before - self.bytes;
        if [REPLIES_BYTES_MAX, REPLIES_BYTES_OWN].into_iter().any(|most| before >= most && now < most) {
            self.budget.freed.notify_one();
        }
        self.budget.share.note(before, now);
    }
}

#[cfg(test)]
mod tests {
    use futures_util::FutureExt as _;
    use trunkline_core::{caller::Credential, identity::Identity};

    use super::*;

    impl Replies {
        /// A stream of an owner.
        fn stream(&self, owner: usize) -> Arc<Budget> {
            Budget::new(self.share(Owner::Key(owner.to_string())))
        }

        fn beyond(&self) -> isize {
            self.0.beyond.bytes.load(SeqCst)
        }
    }

    fn is_freed(budget: &Budget) -> bool {
        budget.freed().now_or_never().is_some()
    }

    #[test]
    fn a_spent_budget_tells_when_it_has_room_again() {
        let all = Replies::default();
        let budget = all.stream(1);
        let (most, more) = (budget.take(REPLIES_BYTES_MAX - 1), budget.take(1));
        assert!(budget.is_spent() && !is_freed(&budget));
        drop(more);
        assert!(!budget.is_spent() && is_freed(&budget));
        drop(most);
        assert_eq!(all.beyond(), 0);
    }

    #[test]
    fn streams_share_what_they_hold_beyond_their_own() {
        let (all, largest) = (Replies::default(), 1024 * 1024);
        let streams: Vec<_> = (0..1000).map(|owner| all.stream(owner)).collect();
        let mut debts = Vec::new();
        // Each asks for as much as it can.
        for _ in 0..100 {
            for stream in streams.iter().filter(|stream| !stream.is_spent()) {
                debts.push(stream.take(largest));
            }
        }
        assert!(debts.len() * largest <= REPLIES_TOTAL_MAX + streams.len() * largest, "{}", debts.len());
        let late = all.stream(1000);
        assert!(!late.is_spent(), "it holds less than its own");
        let own = late.take(largest);
        let mut freed = Box::pin(late.freed());
        assert!(late.is_spent() && freed.as_mut().now_or_never().is_none());
        debts.clear();
        assert!(!late.is_spent() && freed.now_or_never().is_some(), "others gave back what they held");
        drop(own);
        assert_eq!((all.beyond(), all.0.total.get()), (0, 0));
    }

    #[test]
    fn a_stream_goes_on_when_it_holds_less_than_its_own() {
        let all = Replies::default();
        let others: Vec<_> = (0..9).map(|owner| all.stream(owner).take(REPLIES_BYTES_MAX)).collect();
        let one = all.stream(9);
        let (own, _less) = (one.take(REPLIES_BYTES_OWN), one.take(1));
        assert!(one.is_spent() && !is_freed(&one));
        drop(own);
        assert!(!one.is_spent() && is_freed(&one));
        drop(others);
    }

    #[test]
    fn one_owner_leaves_room_for_the_others() {
        let all = Replies::default();
        let mut held: Vec<_> = (0..8).map(|_| all.stream(1)).collect();
        let mut debts = Vec::new();
        for stream in &held {
            while !stream.is_spent() {
                debts.push(stream.take(1024 * 1024));
            }
        }
        assert!(all.beyond() <= (REPLIES_OWNER_MAX + 8 * 1024 * 1024) as isize, "{}", all.beyond());
        let (same, other) = (all.stream(1), all.stream(2));
        let (mine, others) = (same.take(REPLIES_BYTES_OWN), other.take(REPLIES_BYTES_MAX / 2));
        assert!(same.is_spent() && !other.is_spent());
        let mut freed = Box::pin(same.freed());
        assert!(freed.as_mut().now_or_never().is_none());
        debts.clear();
        assert!(!same.is_spent() && freed.now_or_never().is_some(), "its owner has room again");
        assert_eq!(all.owners().len(), 2);
        held.clear();
        drop((mine, same));
        assert_eq!(all.owners().len(), 1, "nobody is kept who has no stream");
        drop((others, other));
        assert_eq!((all.owners().len(), all.beyond()), (0, 0));
    }

    #[test]
    fn who_pays_is_the_key_or_else_the_principal() {
        let all = Replies::default();
        let share = |identity: &str, key: Option<&str>| {
            let credential = Credential { token: key.map(ToOwned::to_owned), ..Credential::none(false) };
            let caller = Caller::new(Identity::parse(identity).unwrap(), String::new(), credential);
            all.share_of(&caller)
        };
        let (one, two) = (share("ag::ws::a::1", Some("key")), share("ag::ws::a::2", Some("key")));
        assert!(Arc::ptr_eq(&one, &two));
        let (one, two) = (share("ag::ws::a::1", None), share("ag::ws::a::2", None));
        assert!(!Arc::ptr_eq(&one, &two));
        let (one, two) = (share("us::alice::1", None), share("us::alice::2", None));
        assert!(Arc::ptr_eq(&one, &two), "windows of one user");
    }
}

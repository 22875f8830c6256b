//! What clients may have the server hold for them: replies that they have not taken, in bytes, because a client chooses how large
//! they are. One client has many streams, so what they hold is bounded for all of them together, too.

use std::sync::{
    Arc,
    atomic::{AtomicIsize, AtomicUsize, Ordering::SeqCst},
};

use prometheus_client::metrics::gauge::Gauge;
use tokio::sync::Notify;

/// Encoded bytes of replies, on their way and expected, at which no frame of the stream is read until its client reads its own.
/// Room for some thirty of the largest values at once; one more reply of any size may come on top.
pub(super) const REPLIES_BYTES_MAX: usize = 32 * 1024 * 1024;

/// What every stream has of these whatever the others hold, so that each goes on by one request at least.
const REPLIES_BYTES_OWN: usize = 64 * 1024;

/// Bytes beyond those of all streams together at which only streams that hold less than their own go on. Room for eight that
/// hold the most.
const REPLIES_TOTAL_MAX: usize = 256 * 1024 * 1024;

/// What the streams of a server hold together. Clones share it.
#[derive(Clone, Default)]
pub(crate) struct Replies(Arc<All>);

#[derive(Default)]
struct All {
    /// Bytes beyond each stream's own. Below zero for the moment in which they are given back before they are counted.
    beyond: AtomicIsize,
    freed: Notify,
    /// All bytes.
    total: Gauge,
}

/// The bytes that are out on one stream.
#[derive(Default)]
pub(super) struct Budget {
    used: AtomicUsize,
    freed: Notify,
    all: Replies,
}

impl Replies {
    pub(crate) fn new(total: Gauge) -> Self {
        Self(Arc::new(All { total, ..All::default() }))
    }

    fn are_spent(&self) -> bool {
        usize::try_from(self.0.beyond.load(SeqCst)).is_ok_and(|beyond| beyond >= REPLIES_TOTAL_MAX)
    }

    /// What one stream holds was so many bytes, and is so many now.
    fn note(&self, before: usize, now: usize) {
        let All { beyond, freed, total } = &*self.0;
        total.inc_by(now as i64 - before as i64);
        let most = REPLIES_TOTAL_MAX as isize;
        let more = beyond_own(now) as isize - beyond_own(before) as isize;
        let before = beyond.fetch_add(more, SeqCst);
        if before >= most && before + more < most {
            freed.notify_waiters();
        }
    }
}

fn beyond_own(bytes: usize) -> usize {
    bytes.saturating_sub(REPLIES_BYTES_OWN)
}

impl Budget {
    /// One that counts among those of the server.
    pub(super) fn new(all: Replies) -> Arc<Self> {
        Arc::new(Self { all, ..Self::default() })
    }

    /// Takes bytes, however many are left; they come back when the debt is dropped.
    pub(super) fn take(self: &Arc<Self>, bytes: usize) -> Debt {
        let before = self.used.fetch_add(bytes, SeqCst);
        self.all.note(before, before + bytes);
        Debt { budget: self.clone(), bytes }
    }

    /// Whether nothing more should be taken.
    pub(super) fn is_spent(&self) -> bool {
        let used = self.used.load(SeqCst);
        used >= REPLIES_BYTES_MAX || used >= REPLIES_BYTES_OWN && self.all.are_spent()
    }

    /// Resolves when a spent budget is not spent any more; at times without need. Cancel-safe.
    pub(super) async fn freed(&self) {
        // From here on neither is missed.
        let all = self.all.0.freed.notified();
        if self.is_spent() {
            tokio::select! {
                () = all => {}
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
        self.budget.all.note(before, now);
    }
}

#[cfg(test)]
mod tests {
    use futures_util::FutureExt as _;

    use super::*;

    #[test]
    fn a_spent_budget_tells_when_it_has_room_again() {
        let budget = Arc::new(Budget::default());
        let (most, more) = (budget.take(REPLIES_BYTES_MAX - 1), budget.take(1));
        assert!(budget.is_spent() && budget.freed().now_or_never().is_none());
        drop(more);
        assert!(!budget.is_spent() && budget.freed().now_or_never().is_some());
        drop(most);
        assert_eq!(budget.all.0.beyond.load(SeqCst), 0);
    }

    #[test]
    fn streams_share_what_they_hold_beyond_their_own() {
        let (all, largest) = (Replies::default(), 1024 * 1024);
        let streams: Vec<_> = (0..1000).map(|_| Budget::new(all.clone())).collect();
        let mut debts = Vec::new();
        // Each asks for as much as it can.
        for _ in 0..100 {
            for stream in streams.iter().filter(|stream| !stream.is_spent()) {
                debts.push(stream.take(largest));
            }
        }
        assert!(debts.len() * largest <= REPLIES_TOTAL_MAX + streams.len() * largest, "{}", debts.len());
        let late = Budget::new(all.clone());
        assert!(!late.is_spent(), "it holds less than its own");
        let own = late.take(largest);
        let mut freed = Box::pin(late.freed());
        assert!(late.is_spent() && freed.as_mut().now_or_never().is_none());
        debts.clear();
        assert!(!late.is_spent() && freed.now_or_never().is_some(), "others gave back what they held");
        drop(own);
        assert_eq!((all.0.beyond.load(SeqCst), all.0.total.get()), (0, 0));
    }

    #[test]
    fn a_stream_goes_on_when_it_holds_less_than_its_own() {
        let all = Replies::default();
        let others: Vec<_> = (0..9).map(|_| Budget::new(all.clone()).take(REPLIES_BYTES_MAX)).collect();
        let one = Budget::new(all);
        let (own, _less) = (one.take(REPLIES_BYTES_OWN), one.take(1));
        assert!(one.is_spent() && one.freed().now_or_never().is_none());
        drop(own);
        assert!(!one.is_spent() && one.freed().now_or_never().is_some());
        drop(others);
    }
}

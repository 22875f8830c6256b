//! What one client may have the server hold for it: replies that it has not taken, in bytes, because a client chooses how large they are.

use std::sync::{
    Arc,
    atomic::{AtomicUsize, Ordering::SeqCst},
};

use prometheus_client::metrics::gauge::Gauge;
use tokio::sync::Notify;

/// Encoded bytes of replies, on their way and expected, at which no frame of the client is read until it reads its own. Room for
/// some thirty of the largest values at once; one more reply of any size may come on top.
pub(super) const REPLIES_BYTES_MAX: usize = 32 * 1024 * 1024;

/// The bytes that are out with one client.
#[derive(Default)]
pub(super) struct Budget {
    used: AtomicUsize,
    freed: Notify,
    /// The same of all clients.
    total: Gauge,
}

impl Budget {
    /// One that adds to the total of all clients.
    pub(super) fn new(total: Gauge) -> Arc<Self> {
        Arc::new(Self { total, ..Self::default() })
    }

    /// Takes bytes, however many are left; they come back when the debt is dropped.
    pub(super) fn take(self: &Arc<Self>, bytes: usize) -> Debt {
        self.used.fetch_add(bytes, SeqCst);
        self.total.inc_by(bytes as i64);
        Debt { budget: self.clone(), bytes }
    }

    /// Whether nothing more should be taken.
    pub(super) fn is_spent(&self) -> bool {
        self.used.load(SeqCst) >= REPLIES_BYTES_MAX
    }

    /// Resolves when a spent budget is not spent any more; at times without need. Cancel-safe.
    pub(super) async fn freed(&self) {
        self.freed.notified().await;
    }
}

/// Bytes of a budget; dropping it gives them back.
pub(super) struct Debt {
    budget: Arc<Budget>,
    bytes: usize,
}

impl Drop for Debt {
    fn drop(&mut self) {
        self.budget.total.dec_by(self.bytes as i64);
        let before = self.budget.used.fetch_sub(self.bytes, SeqCst);
        if before >= REPLIES_BYTES_MAX && before - self.bytes < REPLIES_BYTES_MAX {
            self.budget.freed.notify_one();
        }
    }
}

#[cfg(test)]
mod tests {
    use futures_util::FutureExt as _;

    use super::{Arc, Budget, REPLIES_BYTES_MAX};

    #[test]
    fn a_spent_budget_tells_when_it_has_room_again() {
        let budget = Arc::new(Budget::default());
        let (most, more) = (budget.take(REPLIES_BYTES_MAX - 1), budget.take(1));
        assert!(budget.is_spent() && budget.freed().now_or_never().is_none());
        drop(more);
        assert!(!budget.is_spent() && budget.freed().now_or_never().is_some());
        drop(most);
        assert!(budget.freed().now_or_never().is_none(), "it was not spent");
    }
}

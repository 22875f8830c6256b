//! When the next thing is due, for a loop that sleeps until then however many things wait.

use std::sync::{Mutex, MutexGuard, PoisonError};

use tokio::sync::Notify;

/// A time in Unix milliseconds that only others make earlier.
pub(crate) struct NextDue {
    at: Mutex<Option<i64>>,
    moved: Notify,
}

impl NextDue {
    /// At once: nobody has looked yet.
    pub(crate) fn now() -> Self {
        Self { at: Mutex::new(Some(0)), moved: Notify::new() }
    }

    pub(crate) fn get(&self) -> Option<i64> {
        *self.lock()
    }

    /// To be called before looking at what is due, so that what is added meanwhile is not overlooked.
    pub(crate) fn clear(&self) {
        *self.lock() = None;
    }

    /// Something is due then; who waits for something later wakes.
    pub(crate) fn not_later_than(&self, due_at: Option<i64>) {
        let Some(due_at) = due_at else { return };
        let mut at = self.lock();
        if at.is_none_or(|at| due_at < at) {
            *at = Some(due_at);
            drop(at);
            self.moved.notify_one();
        }
    }

    /// Waits until it is earlier than it was. Cancel-safe.
    pub(crate) async fn moved(&self) {
        self.moved.notified().await;
    }

    /// A panic while holding the lock cannot leave half a change: each section is one move.
    fn lock(&self) -> MutexGuard<'_, Option<i64>> {
        self.at.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

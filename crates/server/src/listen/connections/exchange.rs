//! A request and its answer: whether the answer can have been heard, once the connection is gone.

use std::sync::{Arc, atomic::Ordering::Relaxed};

use super::{Connection, Shared, State};

/// A request and its answer, as part of their connection. Does not keep it open.
#[derive(Clone)]
pub(crate) struct Exchange {
    shared: Arc<Shared>,
    key: u64,
    state: Arc<State>,
    /// Of the connection's requests.
    number: u64,
}

impl Connection {
    /// The request that came last.
    pub(crate) fn exchange(&self) -> Exchange {
        let number = self.state.requests.load(Relaxed);
        Exchange { shared: self.shared.clone(), key: self.key, state: self.state.clone(), number }
    }
}

impl Exchange {
    pub(crate) fn shares_connection(&self, other: &Self) -> bool {
        self.key == other.key
    }

    /// Whether others came before it.
    pub(crate) fn was_reused(&self) -> bool {
        self.number > 1
    }

    /// Whether no request came after it: an HTTP/1 client that sent another one had its answer.
    pub(crate) fn was_last(&self) -> bool {
        self.state.requests.load(Relaxed) == self.number
    }

    /// Waits until its connection has ended.
    pub(crate) async fn connection_ends(&self) {
        let mut left = std::pin::pin!(self.shared.left.notified());
        loop {
            // Before looking, so that nothing is overlooked.
            left.as_mut().enable();
            if !self.shared.open().connections.contains_key(&self.key) {
                return;
            }
            left.as_mut().await;
            left.set(self.shared.left.notified());
        }
    }
}

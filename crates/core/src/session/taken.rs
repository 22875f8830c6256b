//! The read position of a session: the last record that was delivered.

use std::{
    sync::{
        OnceLock,
        atomic::{AtomicBool, AtomicU64, Ordering::SeqCst},
    },
    time::Duration,
};

use futures_util::future::BoxFuture;
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;

/// A transport whose deliveries arrive at the client after it took them.
pub trait Transport: Send + Sync {
    /// Calls [`Delivery::done`](super::Delivery::done) of the deliveries that have arrived by now.
    fn look(&self);

    /// Resolves when the deliveries that were sent before this call have arrived, or cannot any more. Without a time limit;
    /// cancel-safe.
    fn settled(&self) -> BoxFuture<'static, ()>;

    /// Asks the client; resolves to true when it gives a sign of life after this call, and to false when its connection is closed.
    /// Without a time limit; cancel-safe.
    fn answers(&self) -> BoxFuture<'static, bool>;
}

/// Longest wait for deliveries in flight when a session ends or is taken over: a round trip on a long line.
const SETTLE_TIMEOUT: Duration = Duration::from_millis(500);

/// Longest wait for deliveries in flight before an answer into a conversation. In general the client's PING answer comes
/// microseconds after the answer itself.
const HEARD_TIMEOUT: Duration = Duration::from_millis(100);

/// How long a client may take for a sign of life when another one wants its identity: several round trips, and retransmissions.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(2);

/// The offset of the last record that was delivered, with everything that was yielded before it.
#[derive(Default)]
pub(crate) struct Taken {
    offset: AtomicU64,
    transport: OnceLock<Box<dyn Transport>>,
    /// [`HEARD_TIMEOUT`] has passed once, and nothing has arrived since.
    is_late: AtomicBool,
    /// Its client goes on with another session.
    is_resumed: AtomicBool,
    /// All that its session had to write is written.
    ended: CancellationToken,
}

impl Taken {
    pub(super) fn new(offset: u64) -> Self {
        Self { offset: AtomicU64::new(offset), ..Self::default() }
    }

    /// Sets the transport; later calls change nothing.
    pub(super) fn set_transport(&self, transport: impl Transport + 'static) {
        // An error is the second transport, which is not used.
        let _ = self.transport.set(Box::new(transport));
    }

    /// Notes that its client goes on with another session.
    pub(super) fn resume(&self) {
        self.is_resumed.store(true, SeqCst);
    }

    pub(super) fn is_resumed(&self) -> bool {
        self.is_resumed.load(SeqCst)
    }

    /// The offset as of now.
    pub(crate) fn now(&self) -> u64 {
        self.look();
        self.offset.load(SeqCst)
    }

    /// The offset after what is in flight has settled, or [`SETTLE_TIMEOUT`]: for the end of a session and its successor.
    pub(crate) async fn settled(&self) -> u64 {
        // Elapsed: the rest is delivered again.
        let _ = timeout(SETTLE_TIMEOUT, self.wait_settled()).await;
        self.now()
    }

    /// The offset after what is in flight has settled, or [`HEARD_TIMEOUT`], which a client that answers no PINGs costs once.
    pub(super) async fn heard(&self) -> u64 {
        if !self.is_late.load(SeqCst) {
            let is_late = timeout(HEARD_TIMEOUT, self.wait_settled()).await.is_err();
            self.is_late.store(is_late, SeqCst);
        }
        self.now()
    }

    /// Whether the client gives no sign of life within [`ANSWER_TIMEOUT`]. One that cannot be asked is there. A session whose client is
    /// gone has as long to write what it has to, so that no other takes its place before.
    pub(super) async fn is_silent(&self) -> bool {
        let Some(transport) = self.transport.get() else { return false };
        match timeout(ANSWER_TIMEOUT, transport.answers()).await {
            Ok(true) => false,
            Ok(false) => {
                // Elapsed: it hangs.
                let _ = timeout(ANSWER_TIMEOUT, self.ended.cancelled()).await;
                true
            }
            Err(_) => true,
        }
    }

    /// Notes that its session is over.
    pub(super) fn end(&self) {
        self.ended.cancel();
    }

    async fn wait_settled(&self) {
        if let Some(transport) = self.transport.get() {
            transport.settled().await;
        }
    }

    fn look(&self) {
        if let Some(transport) = self.transport.get() {
            transport.look();
        }
    }

    pub(super) fn note(&self, offset: u64) {
        if self.offset.fetch_max(offset, SeqCst) < offset {
            self.is_late.store(false, SeqCst);
        }
    }

    /// Whether the offset was reached, as of the last look.
    pub(super) fn is_past(&self, offset: u64) -> bool {
        self.offset.load(SeqCst) >= offset
    }
}

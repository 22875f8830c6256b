//! How far a session was delivered to.

use std::{
    sync::{
        OnceLock,
        atomic::{AtomicBool, AtomicU64, Ordering::SeqCst},
    },
    time::Duration,
};

use futures_util::future::BoxFuture;
use tokio::time::timeout;

/// A transport that knows later what its client's side has taken.
pub trait Transport: Send + Sync {
    /// Says [`Delivery::done`](super::Delivery::done) of what was taken by now.
    fn look(&self);

    /// Has the client asked, and returns when it has taken all that was sent before this was called, or will not. Cancel-safe.
    fn settles(&self) -> BoxFuture<'static, ()>;
}

/// How long a client may take to say what it has: a round trip on a long line.
const ANSWER_TIMEOUT: Duration = Duration::from_millis(500);

/// How long somebody may wait for that who is about to say how far it has heard. In general its client says so right behind what
/// it says itself.
const HEARD_TIMEOUT: Duration = Duration::from_millis(100);

/// The last record that its client's side has taken, with everything that was yielded before it.
#[derive(Default)]
pub(crate) struct Taken {
    offset: AtomicU64,
    transport: OnceLock<Box<dyn Transport>>,
    /// Somebody has waited in vain, and nothing has arrived since.
    is_late: AtomicBool,
}

impl Taken {
    pub(super) fn new(offset: u64) -> Self {
        Self { offset: AtomicU64::new(offset), ..Self::default() }
    }

    /// Once.
    pub(super) fn set_transport(&self, transport: impl Transport + 'static) {
        // A second one has nothing that the first one has not.
        let _ = self.transport.set(Box::new(transport));
    }

    /// Looks how far that is now.
    pub(crate) fn now(&self) -> u64 {
        self.look();
        self.offset.load(SeqCst)
    }

    /// The same when nothing is on its way any more, or will not arrive: for the end, and for whoever takes over.
    pub(crate) async fn finally(&self) -> u64 {
        // How far it is then is as good.
        let _ = timeout(ANSWER_TIMEOUT, self.settles()).await;
        self.now()
    }

    /// The same soon, for what its client says that may have heard it. A client that owes an answer is waited for once.
    pub(super) async fn soon(&self) -> u64 {
        if !self.is_late.load(SeqCst) {
            let is_late = timeout(HEARD_TIMEOUT, self.settles()).await.is_err();
            self.is_late.store(is_late, SeqCst);
        }
        self.now()
    }

    async fn settles(&self) {
        if let Some(transport) = self.transport.get() {
            transport.settles().await;
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

    /// Whether it was as far at the last look.
    pub(super) fn is_past(&self, offset: u64) -> bool {
        self.offset.load(SeqCst) >= offset
    }
}

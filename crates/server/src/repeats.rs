//! What browsers say again by themselves: Chromium repeats a POST when a connection that it had used before breaks without an answer, and
//! the page hears nothing of that. So what has no key, and comes again over another connection once the former one has ended, is done once.
//! A connection that was used for nothing else says nothing: proxies make one for each request, and end it.
//!
//! A client that is no browser says nothing again by itself, and two of its connections may well say the same: it has no origin.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use tokio::{sync::watch, time::timeout};
use tokio_util::task::TaskTracker;
use trunkline_core::Error;
use trunkline_store::log::ContentDigest;
use uuid::Uuid;

use crate::listen::Exchange;

/// How long after it was said something may be a repetition. Chromium comes at once, a server that was killed is back by then.
pub(crate) const WINDOW: Duration = Duration::from_secs(10);

/// How long the end of the former connection may take to be seen here, when the new one is there already.
const ENDS: Duration = Duration::from_millis(250);

/// What is known at most; beyond it, what is said again is done again.
const KNOWN_MAX: usize = 64 * 1024;

/// What was said lately. Clones share it.
#[derive(Clone)]
pub(crate) struct Repeats(Arc<Shared>);

struct Shared {
    known: Mutex<Known>,
    tracker: TaskTracker,
}

#[derive(Default)]
struct Known {
    posts: HashMap<Post, Earlier>,
    /// At how many those that are over are forgotten.
    forgets_at: usize,
}

/// What is said to which conversation or session, by whom: in short, because a token may be what tells that.
#[derive(Clone, PartialEq, Eq, Hash)]
pub(crate) struct Post(ContentDigest);

impl Post {
    pub(crate) fn new(to: &str, caller: &str, said: &[u8]) -> Self {
        let length = |text: &str| text.len().to_le_bytes();
        let (to_length, caller_length) = (length(to), length(caller));
        Self(ContentDigest::of(&[&to_length, to.as_bytes(), &caller_length, caller.as_bytes(), said]))
    }
}

#[derive(Clone)]
struct Earlier {
    exchange: Exchange,
    at: Instant,
    /// What came of it, once that is known.
    outcome: watch::Receiver<Option<Uuid>>,
}

impl Repeats {
    pub(crate) fn new(tracker: TaskTracker) -> Self {
        Self(Arc::new(Shared { known: Mutex::default(), tracker }))
    }

    /// Does `work`, or answers what came of it if this is the repetition of what was said over a connection that broke. It goes on
    /// though the asker is gone.
    ///
    /// # Errors
    /// Those of `work`: then it may be said again.
    pub(crate) async fn once(
        &self,
        post: Post,
        exchange: Option<Exchange>,
        work: impl Future<Output = Result<Uuid, Error>> + Send + 'static,
    ) -> Result<Uuid, Error> {
        let Some(exchange) = exchange else { return self.run(work, watch::Sender::new(None)).await };
        let repeated = self.repeated(&post, &exchange).await;
        // Also of what is repeated the answer may be lost.
        let outcome = watch::Sender::new(repeated);
        self.note(post, exchange, outcome.subscribe());
        match repeated {
            Some(id) => Ok(id),
            None => self.run(work, outcome).await,
        }
    }

    async fn run(
        &self,
        work: impl Future<Output = Result<Uuid, Error>> + Send + 'static,
        outcome: watch::Sender<Option<Uuid>>,
    ) -> Result<Uuid, Error> {
        let done = self.0.tracker.spawn(async move {
            let done = work.await;
            if let Ok(id) = &done {
                outcome.send_replace(Some(*id));
            }
            done
        });
        done.await.unwrap_or_else(|ended| Err(Error::of_task(&ended)))
    }

    async fn repeated(&self, post: &Post, exchange: &Exchange) -> Option<Uuid> {
        let mut earlier = self.known().posts.get(post).filter(|earlier| earlier.at.elapsed() < WINDOW).cloned()?;
        // Over one connection, it is said twice.
        if earlier.exchange.shares_connection(exchange) {
            return None;
        }
        timeout(ENDS, earlier.exchange.connection_ends()).await.ok()?;
        if earlier.exchange.was_reused() && earlier.exchange.was_last() {
            return *earlier.outcome.wait_for(Option::is_some).await.ok()?;
        }
        None
    }

    fn note(&self, post: Post, exchange: Exchange, outcome: watch::Receiver<Option<Uuid>>) {
        let mut known = self.known();
        if known.posts.len() >= known.forgets_at {
            known.posts.retain(|_, earlier| earlier.at.elapsed() < WINDOW);
            known.forgets_at = (known.posts.len() * 2).max(1024);
        }
        if known.posts.len() < KNOWN_MAX {
            known.posts.insert(post, Earlier { exchange, at: Instant::now(), outcome });
        }
    }

    fn known(&self) -> MutexGuard<'_, Known> {
        self.0.known.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

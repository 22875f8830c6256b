//! Streams of UIs: what runtimes tell each client lies in the log, what clients ask of runtimes lies in rows until one took it.
//!
//! What is told is not read here: a surface's envelopes are bytes. What is asked has a turn's id, so that a turn that is begun
//! twice is asked for once.

mod sql;

use std::{
    collections::HashMap,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicI64, Ordering::SeqCst},
    },
};

use bytes::Bytes;
use tokio::sync::Notify;
use trunkline_store::log::{Clock, Reader};

pub use crate::gate::{SocketNeed as Need, SocketPermit as Permit};
use crate::{
    caller::Caller,
    error::{Error, Kind},
    gate::{Gate, UseSocket},
};

pub(crate) use sql::MIGRATIONS;

/// Longest id of a client.
const CLIENT_BYTES_MAX: usize = 128;

/// What one client asked and nobody took.
pub(crate) const ASKS_MAX: i64 = 1000;

/// What is handed to a runtime at once.
const ASKS_AT_ONCE: i64 = 256;

/// What was asked is known for so long, so that it is not asked twice.
const KNOWN_MS: i64 = 24 * 60 * 60 * 1000;

/// The streams of a server. Clones share them.
#[derive(Clone)]
pub struct Sockets(Arc<Inner>);

struct Inner {
    gate: Gate,
    clock: Clock,
    /// Runtimes that are there, in the order in which they came.
    posts: Mutex<Vec<Arc<Post>>>,
}

struct Post {
    caller: Caller,
    /// Something may be for it.
    asked: Notify,
    /// What was asked up to here was looked at.
    looked_to: AtomicI64,
    generation: String,
}

/// What a client asks.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Ask {
    /// By which a runtime knows it when it comes twice.
    pub number: i64,
    /// Who asks.
    pub client: String,
    /// From which of its sockets.
    pub socket: String,
    /// The surface's word for what.
    pub kind: String,
    /// The turn that it is about; empty for none.
    pub turn: String,
    /// As the surface will write it.
    pub body: String,
}

/// What is to become of what a client says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Aim {
    /// A turn begins. Of several with one id, the first counts.
    Begin,
    /// A turn stops; if nobody took its beginning, nobody will.
    Stop,
    /// Anything else.
    Other,
}

/// What became of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Asked {
    /// A runtime will have it.
    Waits,
    /// It was said before.
    Known,
    /// The turn was not begun yet, and will not be.
    Stopped,
}

/// A runtime while it is there.
pub struct Duty {
    sockets: Sockets,
    post: Arc<Post>,
}

impl Sockets {
    /// The streams behind `gate`.
    #[must_use]
    pub fn new(gate: Gate, clock: Clock) -> Self {
        Self(Arc::new(Inner { gate, clock, posts: Mutex::default() }))
    }

    /// Lets somebody use a client's stream.
    ///
    /// # Errors
    /// [`Kind::Invalid`] for what is no client's id, [`Kind::Denied`].
    pub fn enter(&self, caller: &Caller, client: &str, need: Need) -> Result<Permit, Error> {
        let fits = |c: char| c.is_ascii_alphanumeric() || "._~-@".contains(c);
        if client.is_empty() || client.len() > CLIENT_BYTES_MAX || !client.chars().all(fits) {
            let why = format!("clientId: 1 to {CLIENT_BYTES_MAX} of A-Z a-z 0-9 . _ ~ - @");
            return Err(Error::new(Kind::Invalid, "ERR_INVALID_ARGUMENT", why));
        }
        self.0.gate.authorize(caller, UseSocket { client, need })
    }

    /// What is told to a client, from behind an offset.
    ///
    /// # Errors
    /// [`Kind::Unavailable`].
    pub fn follow(&self, permit: &Permit, after: u64) -> Result<Reader, Error> {
        self.0.gate.follow_socket(permit, after)
    }

    /// Appends what is told to clients, in order: all of it, or nothing. Of a runtime that numbers what it tells, the last
    /// number is kept with it. Durable when it returns.
    ///
    /// # Errors
    /// [`Kind::Invalid`] if it is too much at once, [`Kind::Unavailable`].
    pub async fn tell(&self, told: Vec<(Permit, Bytes)>, number: Option<(&str, u64)>) -> Result<(), Error> {
        self.0.gate.tell_sockets(told, number).await
    }

    /// The last number of what a runtime told that is kept; 0 if there is none.
    ///
    /// # Errors
    /// [`Kind::Unavailable`].
    pub async fn told_to(&self, generation: &str) -> Result<u64, Error> {
        self.0.gate.sockets_told_to(generation).await
    }

    /// Keeps what a client asks, until a runtime takes it. `told` becomes a record of the client's stream with it: that it
    /// waits, if no runtime is there, or that the turn was stopped.
    ///
    /// # Errors
    /// [`Kind::Exhausted`] if too much waits, [`Kind::Unavailable`].
    pub async fn ask(&self, permit: &Permit, ask: Ask, aim: Aim, told: Option<Bytes>) -> Result<Asked, Error> {
        let (now, row, topic) = (self.now(), Ask { client: permit.client().to_owned(), ..ask }, permit.topic()?);
        let asked =
            self.0.gate.housekeep(move |tx| sql::ask(tx, row.clone(), aim, now, topic.clone().zip(told.clone())));
        let asked = asked.await?;
        if asked == Asked::Waits {
            self.wake(|post| post.serves(permit.client()));
        }
        Ok(asked)
    }

    /// The generation of the runtime that serves a client now.
    #[must_use]
    pub fn generation(&self, client: &str) -> Option<String> {
        self.serving(client).map(|post| post.generation.clone())
    }

    /// A runtime comes. What clients asked of it while it was away is there first.
    ///
    /// # Errors
    /// [`Kind::Denied`] for somebody who is none.
    pub fn attach(&self, caller: &Caller, generation: &str) -> Result<Duty, Error> {
        if !caller.credential.is_admin && caller.credential.serves.is_empty() {
            return Err(Error::new(Kind::Denied, "ERR_PERMISSION_DENIED", "the credential is not a runtime's"));
        }
        let (asked, looked_to) = (Notify::new(), AtomicI64::new(0));
        let post = Arc::new(Post { caller: caller.clone(), asked, looked_to, generation: generation.to_owned() });
        post.asked.notify_one();
        self.posts().push(post.clone());
        Ok(Duty { sockets: self.clone(), post })
    }

    /// A checkpoint of what followed from a client's stream, and how far that was.
    ///
    /// # Errors
    /// [`Kind::Unavailable`].
    pub async fn checkpoint(&self, permit: &Permit) -> Result<Option<(u64, String)>, Error> {
        let (client, epoch) = (permit.client().to_owned(), self.0.gate.id());
        self.0.gate.glance(move |tx| sql::checkpoint(tx, client.clone(), epoch.clone())).await
    }

    /// Keeps one.
    ///
    /// # Errors
    /// [`Kind::Unavailable`].
    pub async fn put_checkpoint(&self, permit: &Permit, folded_to: u64, state: String) -> Result<(), Error> {
        let (client, epoch) = (permit.client().to_owned(), self.0.gate.id());
        let kept = self
            .0
            .gate
            .housekeep(move |tx| sql::put_checkpoint(tx, client.clone(), epoch.clone(), folded_to, state.clone()));
        kept.await
    }

    /// Forgets what was asked and taken long ago.
    ///
    /// # Errors
    /// [`Kind::Unavailable`].
    pub async fn sweep(&self) -> Result<(), Error> {
        let before = self.now() - KNOWN_MS;
        self.0.gate.housekeep(move |tx| sql::sweep(tx, before)).await
    }

    fn now(&self) -> i64 {
        i64::try_from(self.0.clock.now_ms()).unwrap_or(i64::MAX)
    }

    /// Of several runtimes that serve a client, the one that came last does.
    fn serving(&self, client: &str) -> Option<Arc<Post>> {
        self.posts().iter().rev().find(|post| post.serves(client)).cloned()
    }

    fn wake(&self, which: impl Fn(&Post) -> bool) {
        self.posts().iter().filter(|post| which(post)).for_each(|post| post.asked.notify_one());
    }

    fn posts(&self) -> MutexGuard<'_, Vec<Arc<Post>>> {
        self.0.posts.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Post {
    fn serves(&self, client: &str) -> bool {
        UseSocket { client, need: Need::Serve }.fits(&self.caller)
    }
}

impl Duty {
    /// What clients asked; waits for something. Cancel-safe: what was not [taken](Duty::took) comes again to the next one.
    ///
    /// # Errors
    /// [`Kind::Unavailable`].
    pub async fn next(&self) -> Result<Vec<Ask>, Error> {
        loop {
            let after = self.post.looked_to.load(SeqCst);
            let found = self.sockets.0.gate.glance(move |tx| sql::waiting(tx, after, ASKS_AT_ONCE)).await?;
            let Some(last) = found.last().map(|ask| ask.number) else {
                self.post.asked.notified().await;
                continue;
            };
            // Whoever left meanwhile has it looked at again.
            let _ = self.post.looked_to.compare_exchange(after, last, SeqCst, SeqCst);
            let mut serving = HashMap::new();
            let mut is_own = |client: &String| {
                *serving
                    .entry(client.clone())
                    .or_insert_with(|| self.sockets.serving(client).is_some_and(|post| Arc::ptr_eq(&post, &self.post)))
            };
            let own: Vec<_> = found.into_iter().filter(|ask| is_own(&ask.client)).collect();
            if !own.is_empty() {
                return Ok(own);
            }
        }
    }

    /// The transport took it: nobody else will have it.
    ///
    /// # Errors
    /// [`Kind::Unavailable`]: then it comes again.
    pub async fn took(&self, numbers: Vec<i64>) -> Result<(), Error> {
        self.sockets.0.gate.housekeep(move |tx| sql::took(tx, numbers.clone())).await
    }
}

impl Drop for Duty {
    fn drop(&mut self) {
        self.sockets.posts().retain(|post| !Arc::ptr_eq(post, &self.post));
        // What was for this one may be for another one now.
        for post in &*self.sockets.posts() {
            post.looked_to.store(0, SeqCst);
            post.asked.notify_one();
        }
    }
}

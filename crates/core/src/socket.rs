//! Streams of UIs: what runtimes tell each client lies in the log, what clients ask of runtimes lies in rows until one took it.
//!
//! What is told is not read here: a surface's envelopes are bytes. What is asked has a turn's id, so that a turn that is begun
//! twice is asked for once.

mod duty;
pub(crate) mod sql;

use std::{
    collections::{HashMap, HashSet},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, AtomicI64, AtomicU64, Ordering::SeqCst},
    },
    time::Duration,
};

use bytes::Bytes;
use tokio_util::task::TaskTracker;
use trunkline_store::log::{Clock, Reader};

pub use self::duty::Duty;
pub use crate::gate::{SocketNeed as Need, SocketPermit as Permit};
use crate::{
    caller::Caller,
    error::{Error, Kind},
    gate::{Gate, UseSocket},
};

pub(crate) use sql::MIGRATIONS;

use self::duty::Post;

/// Longest id of a client.
const CLIENT_BYTES_MAX: usize = 128;

/// What one client asked and no runtime has, because it waits, or was sent and not answered; and its bytes.
pub(crate) const ASKS_MAX: i64 = 1000;
pub(crate) const ASKS_BYTES_MAX: i64 = 16 * 1024 * 1024;

/// The same of all clients, in bytes, about: whoever may ask under many names fills no disk.
const ALL_ASKS_BYTES_MAX: i64 = 4 * 1024 * 1024 * 1024;

/// All that waits is counted this often at most, in milliseconds.
const COUNT_PAUSE_MS: i64 = 1000;

/// What was asked is known for so long, so that it is not asked twice.
const KNOWN_MS: i64 = 24 * 60 * 60 * 1000;

/// The streams of a server. Clones share them.
#[derive(Clone)]
pub struct Sockets(Arc<Inner>);

struct Inner {
    gate: Gate,
    clock: Clock,
    tracker: TaskTracker,
    /// Runtimes that are there, in the order in which they came.
    posts: Mutex<Vec<Arc<Post>>>,
    /// Changes with those.
    changes: AtomicU64,
    /// A hand-over that has not begun waits for the one that is under way.
    hands_over: AtomicBool,
    hand_over: tokio::sync::Mutex<()>,
    /// Bytes of all that no runtime has: as they were last counted, and what was asked since; and when that was.
    asks_bytes: AtomicI64,
    counted_at: AtomicI64,
    /// Who tells what under which name, so that one connection does it at a time.
    tellers: Mutex<HashMap<String, Arc<tokio::sync::Mutex<u64>>>>,
}

/// A name under which something numbers what it tells. A later one of that name ends it: then nothing is told any more.
pub struct Teller {
    name: String,
    /// The holder's number.
    lock: Arc<tokio::sync::Mutex<u64>>,
    own: u64,
    told_to: u64,
}

impl Teller {
    /// The last number of what was told under this name before.
    #[must_use]
    pub fn told_to(&self) -> u64 {
        self.told_to
    }
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
    /// By which the client knows it when it says it again; empty for what is taken as often as it is said.
    pub request: String,
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

impl Sockets {
    /// The streams behind `gate`; what it begins is in `tracker`. What runtimes had been sent when the server ended, and said
    /// nothing of, is sent again.
    ///
    /// # Errors
    /// [`Kind::Unavailable`].
    pub async fn open(gate: Gate, clock: Clock, tracker: TaskTracker) -> Result<Self, Error> {
        gate.housekeep(|tx| sql::release(tx, None)).await?;
        let asks_bytes = AtomicI64::new(gate.glance(sql::waiting_bytes).await?);
        Ok(Self(Arc::new(Inner {
            gate,
            clock,
            tracker,
            posts: Mutex::default(),
            changes: AtomicU64::new(0),
            hands_over: AtomicBool::new(false),
            hand_over: tokio::sync::Mutex::default(),
            asks_bytes,
            counted_at: AtomicI64::new(0),
            tellers: Mutex::default(),
        })))
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

    /// Appends what is told to clients, in order: all of it, or nothing. Durable when it returns.
    ///
    /// # Errors
    /// [`Kind::Invalid`] if it is too much at once, [`Kind::Unavailable`].
    pub async fn tell(&self, told: Vec<(Permit, Bytes)>) -> Result<(), Error> {
        self.0.gate.tell_sockets(told, None).await
    }

    /// As [`Sockets::tell`], once for a name that the surface gives it; a day later it may be told again.
    ///
    /// # Errors
    /// [`Kind::Unavailable`].
    pub async fn tell_once(&self, permit: &Permit, told: Bytes, name: &str) -> Result<(), Error> {
        self.0.gate.tell_socket_once(permit, told, name).await
    }

    /// Whoever numbers what it tells, in the place of whoever had the name: waits for what that one is telling.
    ///
    /// # Errors
    /// [`Kind::Unavailable`].
    pub async fn teller(&self, name: &str) -> Result<Teller, Error> {
        let lock = {
            let mut tellers = self.0.tellers.lock().unwrap_or_else(PoisonError::into_inner);
            if tellers.len().is_power_of_two() {
                tellers.retain(|_, lock| Arc::strong_count(lock) > 1);
            }
            tellers.entry(name.to_owned()).or_default().clone()
        };
        let own = {
            let mut holder = lock.lock().await;
            *holder += 1;
            *holder
        };
        let told_to = self.0.gate.sockets_told_to(name).await?;
        Ok(Teller { name: name.to_owned(), lock, own, told_to })
    }

    /// As [`Sockets::tell`], and keeps with it how far the teller is. Goes on though nobody waits.
    ///
    /// # Errors
    /// Also [`Kind::Exists`] if a later one has the name.
    pub async fn tell_numbered(&self, told: Vec<(Permit, Bytes)>, teller: &Teller, through: u64) -> Result<(), Error> {
        let (gate, lock, own, name) = (self.0.gate.clone(), teller.lock.clone(), teller.own, teller.name.clone());
        let telling = self.0.tracker.spawn(async move {
            let holder = lock.lock().await;
            if *holder != own {
                let why = "another connection tells under this name";
                return Err(Error::new(Kind::Exists, "ERR_DUPLICATE_IDENTITY", why));
            }
            gate.tell_sockets(told, Some((&name, through))).await
        });
        telling.await.unwrap_or_else(|ended| Err(Error::of_task(&ended)))
    }

    /// Keeps what a client asks, until a runtime takes it; once for each of the client's requests and turns, for a day. `told`
    /// becomes a record of the client's stream with it: that the turn waits, or was stopped.
    ///
    /// # Errors
    /// [`Kind::Exhausted`] if too much waits, [`Kind::Unavailable`].
    pub async fn ask(&self, permit: &Permit, ask: Ask, aim: Aim, told: Option<Bytes>) -> Result<Asked, Error> {
        let bytes = i64::try_from(ask.body.len()).unwrap_or(i64::MAX);
        let is_full = || self.0.asks_bytes.load(SeqCst).saturating_add(bytes) > ALL_ASKS_BYTES_MAX;
        if is_full() {
            self.count().await?;
        }
        let known = (permit.client().to_owned(), ask.request.clone());
        if is_full() && self.0.gate.glance(move |tx| sql::is_known(tx, known.clone())).await? {
            return Ok(Asked::Known);
        }
        if is_full() {
            let why = format!("what clients asked and no runtime has takes {ALL_ASKS_BYTES_MAX} bytes, the limit");
            return Err(Error::new(Kind::Exhausted, "ERR_QUOTA_001", why));
        }
        let (now, row, topic) = (self.now(), Ask { client: permit.client().to_owned(), ..ask }, permit.topic()?);
        let asked =
            self.0.gate.housekeep(move |tx| sql::ask(tx, row.clone(), aim, now, topic.clone().zip(told.clone())));
        let asked = asked.await?;
        if asked == Asked::Waits {
            self.0.asks_bytes.fetch_add(bytes, SeqCst);
            // Should that one go now, whoever comes next is told by its going.
            if let Some(post) = self.serving(permit.client()) {
                post.asked.notify_one();
            }
        }
        Ok(asked)
    }

    /// The generation of the runtime that serves a client now, and the turns that it goes on with.
    #[must_use]
    pub fn generation(&self, client: &str) -> Option<(String, HashSet<String>)> {
        self.serving(client).map(|post| (post.generation.clone(), post.recovered.clone()))
    }

    /// Turns of a client that no runtime has had.
    ///
    /// # Errors
    /// [`Kind::Unavailable`].
    pub async fn waiting_turns(&self, permit: &Permit) -> Result<HashSet<String>, Error> {
        let client = permit.client().to_owned();
        self.0.gate.glance(move |tx| sql::waiting_turns(tx, client.clone())).await
    }

    /// Changes whenever a runtime comes or goes.
    #[must_use]
    pub fn changes(&self) -> u64 {
        self.0.changes.load(SeqCst)
    }

    /// A runtime comes. What clients asked of it while it was away is there first.
    ///
    /// # Errors
    /// [`Kind::Denied`] for somebody who is none.
    pub fn attach(&self, caller: &Caller, generation: &str, recovered: HashSet<String>) -> Result<Duty, Error> {
        if !caller.credential.is_admin && caller.credential.serves.is_empty() {
            return Err(Error::new(Kind::Denied, "ERR_PERMISSION_DENIED", "the credential is not a runtime's"));
        }
        let post = Arc::new(Post::new(caller.clone(), generation.to_owned(), recovered));
        self.posts().push(post.clone());
        self.0.changes.fetch_add(1, SeqCst);
        Ok(Duty::new(self.clone(), post))
    }

    /// The last event that a socket of the client had when it said so, if that is known.
    ///
    /// # Errors
    /// [`Kind::Unavailable`].
    pub async fn had(&self, permit: &Permit, socket: &str) -> Result<Option<u64>, Error> {
        let (client, socket) = (permit.client().to_owned(), socket.to_owned());
        self.0.gate.glance(move |tx| sql::had(tx, client.clone(), socket.clone())).await
    }

    /// Keeps that a socket of the client had everything up to an event. Of one client, that is kept of the last hundred sockets.
    ///
    /// # Errors
    /// [`Kind::Unavailable`].
    pub async fn put_had(&self, permit: &Permit, socket: &str, seq: u64) -> Result<(), Error> {
        let (client, socket, now) = (permit.client().to_owned(), socket.to_owned(), self.now());
        self.0.gate.housekeep(move |tx| sql::put_had(tx, client.clone(), socket.clone(), seq, now)).await
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
        let (client, epoch, now) = (permit.client().to_owned(), self.0.gate.id(), self.now());
        let kept = self
            .0
            .gate
            .housekeep(move |tx| sql::put_checkpoint(tx, client.clone(), epoch.clone(), folded_to, state.clone(), now));
        kept.await
    }

    /// Forgets what was asked and taken long ago; and what no runtime took, and how clients stood, when that is `left` ago.
    /// A turn that no runtime took is told as lost when the next one comes.
    ///
    /// # Errors
    /// [`Kind::Unavailable`].
    pub async fn sweep(&self, left: Option<Duration>) -> Result<(), Error> {
        let now = self.now();
        let taken = now - KNOWN_MS;
        let left = left.map(|left| now.saturating_sub(i64::try_from(left.as_millis()).unwrap_or(i64::MAX)));
        let (mut untaken, mut has_more) = (0, true);
        while has_more {
            let swept = self.0.gate.housekeep(move |tx| sql::sweep(tx, now, taken, left)).await?;
            (untaken, has_more) = (untaken + swept.0, swept.1);
        }
        if untaken > 0 {
            tracing::warn!(untaken, "requests of clients that no runtime took are forgotten");
        }
        self.count().await
    }

    /// Looks how much waits, unless that was just done.
    async fn count(&self) -> Result<(), Error> {
        let (now, last) = (self.now(), self.0.counted_at.load(SeqCst));
        if !(last..last.saturating_add(COUNT_PAUSE_MS)).contains(&now) {
            self.0.counted_at.store(now, SeqCst);
            self.0.asks_bytes.store(self.0.gate.glance(sql::waiting_bytes).await?, SeqCst);
        }
        Ok(())
    }

    fn now(&self) -> i64 {
        i64::try_from(self.0.clock.now_ms()).unwrap_or(i64::MAX)
    }

    /// Of several runtimes that serve a client, the one that came last does.
    fn serving(&self, client: &str) -> Option<Arc<Post>> {
        self.posts().iter().rev().find(|post| post.serves(client)).cloned()
    }

    fn posts(&self) -> MutexGuard<'_, Vec<Arc<Post>>> {
        self.0.posts.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

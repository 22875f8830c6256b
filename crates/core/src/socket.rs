//! Streams of UIs: what runtimes tell each client lies in the log, what clients ask of runtimes lies in rows until one took it.
//!
//! What is told is not read here: a surface's envelopes are bytes. What is asked has a turn's id, so that a turn that is begun
//! twice is asked for once.

mod sql;

use std::{
    collections::{HashMap, HashSet},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicI64, AtomicU64, Ordering::SeqCst},
    },
};

use bytes::Bytes;
use tokio::sync::Notify;
use tokio_util::task::TaskTracker;
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

/// What one client asked and no runtime has: it waits, or was sent and not answered.
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
    tracker: TaskTracker,
    /// Runtimes that are there, in the order in which they came.
    posts: Mutex<Vec<Arc<Post>>>,
    /// Changes with those.
    changes: AtomicU64,
    /// Who tells what under which name, so that one connection does it at a time.
    tellers: Mutex<HashMap<String, Arc<tokio::sync::Mutex<u64>>>>,
}

struct Post {
    caller: Caller,
    /// Something may be for it.
    asked: Notify,
    /// What was asked up to here was looked at.
    looked_to: AtomicI64,
    generation: String,
    recovered: HashSet<String>,
    /// What it was sent, by client and turn, until it says something of it.
    handed: Mutex<HashMap<(String, String), Vec<i64>>>,
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
    /// As the surface will write it.
    pub body: String,
}

/// What is to become of what a client says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Aim {
    /// A turn begins. Of several with one id, the first counts.
    Begin,
    /// A turn began elsewhere: nobody need take it.
    Note,
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
    /// The streams behind `gate`; what it begins is in `tracker`. What runtimes had been sent when the server ended, and said
    /// nothing of, is sent again.
    ///
    /// # Errors
    /// [`Kind::Unavailable`].
    pub async fn open(gate: Gate, clock: Clock, tracker: TaskTracker) -> Result<Self, Error> {
        gate.housekeep(|tx| sql::release(tx, None)).await?;
        let (posts, changes, tellers) = (Mutex::default(), AtomicU64::new(0), Mutex::default());
        Ok(Self(Arc::new(Inner { gate, clock, tracker, posts, changes, tellers })))
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
        let (asked, looked_to, handed) = (Notify::new(), AtomicI64::new(0), Mutex::default());
        let (caller, generation) = (caller.clone(), generation.to_owned());
        let post = Arc::new(Post { caller, asked, looked_to, generation, recovered, handed });
        post.asked.notify_one();
        self.posts().push(post.clone());
        self.0.changes.fetch_add(1, SeqCst);
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
    /// Whether it is this runtime that serves a client now.
    #[must_use]
    pub fn serves(&self, client: &str) -> bool {
        self.sockets.serving(client).is_some_and(|post| Arc::ptr_eq(&post, &self.post))
    }

    /// What clients asked, for this runtime alone; waits for something. What it says nothing of, the next one gets.
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
            let mut own: Vec<_> = found.into_iter().filter(|ask| is_own(&ask.client)).collect();
            let numbers: Vec<_> = own.iter().map(|ask| ask.number).collect();
            // Noted before it is so: whoever goes in between gives back what it may have.
            for ask in &own {
                let key = (ask.client.clone(), ask.turn.clone());
                self.post.handed().entry(key).or_default().push(ask.number);
            }
            let claimed = self.sockets.0.gate.housekeep(move |tx| sql::claim(tx, numbers.clone())).await?;
            for ask in own.extract_if(.., |ask| !claimed.contains(&ask.number)) {
                self.forget(ask.number);
            }
            if !own.is_empty() {
                return Ok(own);
            }
        }
    }

    /// The runtime said something of a client's turn: it has what was asked of that.
    pub fn heard_of(&self, client: &str, turn: &str) {
        let numbers = {
            let mut handed = self.post.handed();
            if handed.is_empty() {
                return;
            }
            handed.remove(&(client.to_owned(), turn.to_owned())).unwrap_or_default()
        };
        self.settle(numbers);
    }

    /// The runtime said that it has something that was asked.
    pub fn has(&self, number: i64) {
        if self.forget(number) {
            self.settle(vec![number]);
        }
    }

    /// Answers whether it was sent that.
    fn forget(&self, number: i64) -> bool {
        let mut found = false;
        self.post.handed().retain(|_, numbers| {
            let count = numbers.len();
            numbers.retain(|own| *own != number);
            found |= numbers.len() < count;
            !numbers.is_empty()
        });
        found
    }

    fn settle(&self, numbers: Vec<i64>) {
        if numbers.is_empty() {
            return;
        }
        let sockets = self.sockets.clone();
        self.sockets.0.tracker.spawn(async move {
            if let Err(error) = sockets.0.gate.housekeep(move |tx| sql::took(tx, numbers.clone())).await {
                tracing::warn!(%error, "after a restart a runtime is asked again what it has");
            }
        });
    }
}

impl Post {
    fn handed(&self) -> MutexGuard<'_, HashMap<(String, String), Vec<i64>>> {
        self.handed.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Duty {
    fn drop(&mut self) {
        self.sockets.posts().retain(|post| !Arc::ptr_eq(post, &self.post));
        self.sockets.0.changes.fetch_add(1, SeqCst);
        let back: Vec<i64> = self.post.handed().drain().flat_map(|(_, numbers)| numbers).collect();
        // Without its runtime the process is about to end, and the next one finds them.
        if tokio::runtime::Handle::try_current().is_err() {
            return;
        }
        let sockets = self.sockets.clone();
        self.sockets.0.tracker.spawn(async move {
            if !back.is_empty()
                && let Err(error) = sockets.0.gate.housekeep(move |tx| sql::release(tx, Some(back.clone()))).await
            {
                tracing::error!(%error, "what a runtime was asked waits for the next start of the server");
            }
            // What was for this one may be for another one now.
            for post in &*sockets.posts() {
                post.looked_to.store(0, SeqCst);
                post.asked.notify_one();
            }
        });
    }
}

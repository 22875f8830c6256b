//! Sandboxes: programs that work somewhere else, told what to do and watched from here.
//!
//! A sandbox is a row, two topics, and a fold. What it tells lies in the log, with pieces of one text joined; what people look
//! at is folded from that ([`artifacts`]) and kept in checkpoints. What it is told lies in the log too, and its command stream
//! is a lease: a new one takes the place of the old one.

pub mod artifacts;
mod checkpoint;
mod duty;
mod keep;
mod life;
mod read;
mod roll;
mod room;
mod scene;
pub(crate) mod sql;
pub mod state;

use std::{
    collections::HashMap,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicI64, AtomicU64, Ordering::SeqCst},
    },
    time::Instant,
};

use serde::{Deserialize, Serialize};
use tokio::sync::Semaphore;
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use trunkline_store::log::{Clock, ContentDigest};

use self::{
    artifacts::{Artifact, Sign},
    duty::Stint,
    keep::Keeper,
    life::Whose,
    room::Room,
    scene::Scene,
    state::{Happening, Status},
};
use crate::{
    caller::Caller,
    due::NextDue,
    error::{Error, Kind},
    gate::{Gate, Once, SandboxPermit, UseSandbox},
    identity::Identity,
    limits::{Limits, TokenBucket},
    token,
};

pub use self::{
    duty::{Command, Duty},
    keep::{SessionStore, StoreError, StoreFuture, Told},
    read::{Events, Order, UNKNOWN_COMMAND},
    roll::{News, Roll},
    scene::{Sight, Step, Watch},
};
pub use crate::gate::SandboxNeed as Need;
pub(crate) use sql::MIGRATIONS;

/// Longest name of a project, and longest summary that is kept, in bytes.
const PROJECT_BYTES_MAX: usize = 256;
const SUMMARY_BYTES_MAX: usize = 4096;

/// A sandbox, as everybody sees it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Sandbox {
    /// Its id.
    pub id: String,
    /// How it is.
    pub status: Status,
    /// What it is about, in its own words.
    pub summary: Option<String>,
    /// To which project it belongs.
    pub project: Option<String>,
    /// Unix milliseconds.
    pub created_at: i64,
    /// When it last told anything, or opened its stream; Unix milliseconds.
    pub last_heartbeat: i64,
}

/// A sandbox, and what only the server knows of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Standing {
    pub(crate) sandbox: Sandbox,
    /// When its time is up.
    due_at: Option<i64>,
    /// The log's end when it was made. What lies before it is of a former one of that id.
    since: i64,
    /// How far it was told its commands.
    commands_to: i64,
    /// Which command stream is its; 0 for none.
    duty: i64,
    /// Nobody sees it any more.
    removed: bool,
    /// Grows with every change that others hear of, also when an id is used again.
    version: i64,
    /// The last record whose signs have taken effect here.
    signs_to: i64,
}

/// How long sandboxes have for what, and how much they may tell.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, Serialize)]
#[serde(deny_unknown_fields, default)]
pub struct Options {
    /// To give a sign of life after they were made, in milliseconds; 0 is for ever. The published figure.
    pub bootstrap_ms: u64,
    /// To come back after the server was started again, in milliseconds; 0 is not at all.
    pub grace_ms: u64,
    /// Memory that the artifacts of one may take, in MiB; 0 is no limit. A day of an agent's text is a few.
    pub artifacts_mib_max: u64,
    /// Artifacts of one; 0 is no limit. One every two seconds for a day.
    pub artifacts_max: u64,
    /// What is kept on disk of the events of one, and of its commands, in MiB each; 0 is no limit.
    pub events_mib_max: u64,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            bootstrap_ms: 180_000,
            grace_ms: 10_000,
            artifacts_mib_max: 32,
            artifacts_max: 50_000,
            events_mib_max: 1024,
        }
    }
}

/// The sandboxes of a server. Clones share them.
#[derive(Clone)]
pub struct Sandboxes(Arc<Inner>);

struct Inner {
    gate: Gate,
    options: Options,
    limits: Limits,
    clock: Clock,
    tracker: TaskTracker,
    stop: CancellationToken,
    /// Those that somebody is busy with.
    active: Mutex<HashMap<String, Arc<Active>>>,
    /// When the next one's time is up.
    next_due: NextDue,
    /// One checkpoint is written at a time: many at once would hold up what waits for the same disk.
    checkpoints: Arc<Semaphore>,
    keeper: Option<Keeper>,
}

/// What is known here of a sandbox that somebody is busy with.
#[derive(Default)]
struct Active {
    /// Held while what a sandbox told changes what it is: so the last word on that is the last in the log, too.
    order: tokio::sync::Mutex<()>,
    /// The last sign of life, and how much of that its row knows.
    beat: AtomicI64,
    beat_noted: AtomicI64,
    /// What it and its artifacts come to.
    room: Mutex<Room>,
    /// What may be told of it, and to it.
    rate: Mutex<Option<TokenBucket>>,
    known: Known,
    /// Names, with who gave them, of what a store of its own keeps already and the log may not.
    kept: Mutex<HashMap<String, ContentDigest>>,
    stint: Mutex<Option<Arc<Stint>>>,
    scene: tokio::sync::Mutex<Option<Arc<Scene>>>,
}

impl Active {
    /// # Errors
    /// [`Kind::Exhausted`] if it was too often lately.
    fn take_one(&self) -> Result<(), Error> {
        let taken = lock(&self.rate).as_mut().map_or(Ok(()), |rate| rate.take(Instant::now()));
        taken.map_err(|wait| {
            let message = "more requests than limits.messages_per_second for this session";
            Error { retry_after: Some(wait), ..Error::new(Kind::Exhausted, "ERR_RATE_LIMITED", message) }
        })
    }
}

/// A row as it was last read, as long as nothing changes it.
#[derive(Default)]
struct Known {
    row: Mutex<Option<Standing>>,
    /// Changes that are under way, and that were.
    changing: AtomicU64,
    changed: AtomicU64,
}

impl Known {
    fn get(&self) -> Option<Standing> {
        lock(&self.row).clone()
    }

    /// Keeps a row that was read, if nothing changed since `changed` were over.
    fn keep(&self, row: &Standing, changed: u64) {
        let mut known = lock(&self.row);
        if self.changing.load(SeqCst) == 0 && self.changed.load(SeqCst) == changed {
            *known = Some(row.clone());
        }
    }

    /// A change, until what this answers is dropped.
    fn changes(&self) -> Changing<'_> {
        self.changing.fetch_add(1, SeqCst);
        *lock(&self.row) = None;
        Changing(self)
    }
}

struct Changing<'a>(&'a Known);

impl Drop for Changing<'_> {
    fn drop(&mut self) {
        let known = lock(&self.0.row);
        self.0.changed.fetch_add(1, SeqCst);
        self.0.changing.fetch_sub(1, SeqCst);
        drop(known);
    }
}

/// A sandbox that the caller may do something with.
pub struct Seat {
    permit: SandboxPermit,
    standing: Standing,
}

fn once(key: &str, content: &[u8]) -> Option<Once> {
    (!key.is_empty()).then(|| Once { key: key.to_owned(), content: ContentDigest::of(&[content]) })
}

impl Seat {
    /// The sandbox.
    #[must_use]
    pub fn sandbox(&self) -> &Sandbox {
        &self.standing.sandbox
    }

    /// Where it began in the log, which tells it from others of its id, that were removed or will be made.
    #[must_use]
    pub fn began(&self) -> u64 {
        self.standing.since.unsigned_abs()
    }
}

impl Sandboxes {
    /// The sandboxes behind `gate`, kept in `store` too if there is one. Of `limits`, the messages a second count. What it
    /// begins is in `tracker`, and ends with `stop`.
    #[must_use]
    pub fn new(
        gate: Gate,
        options: Options,
        limits: Limits,
        tracker: TaskTracker,
        stop: CancellationToken,
        clock: Clock,
        store: Option<Arc<dyn SessionStore>>,
    ) -> Self {
        let (active, next_due, keeper) = (Mutex::default(), NextDue::now(), store.map(Keeper::new));
        let checkpoints = Arc::new(Semaphore::new(1));
        Self(Arc::new(Inner { gate, options, limits, clock, tracker, stop, active, next_due, checkpoints, keeper }))
    }

    /// Makes a sandbox that will come; answers it, and whether it is new.
    ///
    /// # Errors
    /// [`Kind::Invalid`], [`Kind::Denied`], [`Kind::NotFound`] if it is there and the caller may not know of it,
    /// [`Kind::Unavailable`].
    pub async fn create(&self, caller: &Caller, id: &str, project: Option<&str>) -> Result<(Sandbox, bool), Error> {
        Identity::sandbox(id)?;
        let project = project.filter(|project| !project.is_empty());
        if project.is_some_and(|project| project.len() > PROJECT_BYTES_MAX || project.contains(char::is_control)) {
            let why = format!("a project has at most {PROJECT_BYTES_MAX} bytes and no control characters");
            return Err(invalid(why));
        }
        if let Some(known) = self.standing(id).await? {
            self.0.gate.authorize(caller, UseSandbox::new(&known.sandbox, Need::Write))?;
            return Ok((self.shown(known.sandbox), false));
        }
        let now = self.now();
        let sandbox = Sandbox {
            id: id.to_owned(),
            status: Status::Bootstrapping,
            summary: None,
            project: project.map(ToOwned::to_owned),
            created_at: now,
            last_heartbeat: now,
        };
        self.0.gate.authorize(caller, UseSandbox::new(&sandbox, Need::Write))?;
        let made = self.make(sandbox).await?;
        // Somebody else may have made it in the meantime.
        self.0.gate.authorize(caller, UseSandbox::new(&made.0, Need::Write))?;
        Ok(made)
    }

    /// All sandboxes that the caller may watch, or those of a project, oldest first.
    ///
    /// # Errors
    /// [`Kind::Unavailable`].
    pub async fn list(&self, caller: &Caller, project: Option<&str>) -> Result<Vec<Sandbox>, Error> {
        let all = self.all(project).await?.into_iter().map(|standing| self.shown(standing.sandbox));
        Ok(all.filter(|sandbox| self.may_watch(caller, &sandbox.id, sandbox.project.as_deref())).collect())
    }

    /// How many there are, by status: for figures.
    ///
    /// # Errors
    /// [`Kind::Unavailable`].
    pub async fn counts(&self) -> Result<[(Status, i64); Status::ALL.len()], Error> {
        self.0.gate.glance(sql::counts).await
    }

    /// A sandbox that the caller may do something with.
    ///
    /// # Errors
    /// [`Kind::NotFound`] if there is none or the caller may not know of it, [`Kind::Denied`], [`Kind::Unavailable`].
    pub async fn find(&self, caller: &Caller, id: &str, need: Need) -> Result<Seat, Error> {
        let mut standing = self.standing(id).await?.ok_or_else(missing)?;
        let permit = self.0.gate.authorize(caller, UseSandbox::new(&standing.sandbox, need))?;
        if need == Need::Act && matches!(caller.identity, Identity::Sandbox(_)) {
            let project = standing.sandbox.project.as_deref().unwrap_or_default();
            token::bind(&self.0.gate, &caller.credential, project).await?;
        }
        standing.sandbox = self.shown(standing.sandbox);
        Ok(Seat { permit, standing })
    }

    /// Appends what a sandbox tells. Durable when it returns; what it says about the sandbox itself has taken effect. With a
    /// key, only if the caller told nothing under it before: the same again changes nothing.
    ///
    /// # Errors
    /// [`Kind::Exhausted`] if it tells too often, or has told as much as it may; [`KEY_REUSED`](crate::conversation::KEY_REUSED) if it
    /// told something else under this key; [`Kind::NotFound`] if it was removed in the meantime, [`Kind::Unavailable`].
    pub async fn tell(&self, seat: &Seat, events: Events, key: &str) -> Result<(), Error> {
        let Standing { sandbox, .. } = &seat.standing;
        let active = self.active(&sandbox.id);
        active.take_one()?;
        let once = once(key, &events.body);
        if let Err(refused) = self.make_room(&seat.standing, &active, &events).await {
            // It may be there already, and be what there is no more room for.
            return self.if_known(seat, once.as_ref(), refused).await;
        }
        let happened: Vec<_> = events.signs.into_iter().map(happening).collect();
        active.beat.fetch_max(self.now(), SeqCst);
        if happened.is_empty() && self.0.keeper.is_none() {
            return self.0.gate.tell_sandbox(&seat.permit, events.body, once).await.map(drop);
        }
        let (sandboxes, permit, id) = (self.clone(), seat.permit.clone(), sandbox.id.clone());
        // It completes even if nobody waits for it any more.
        let told = self.0.tracker.spawn(async move {
            let _order = active.order.lock().await;
            let body = sandboxes.keep(&permit, &id, &active, events.body, once.as_ref()).await?;
            let appended = sandboxes.0.gate.tell_sandbox(&permit, body, once).await?;
            if happened.is_empty() {
                return Ok(());
            }
            // What came before has taken effect, unless the server failed in between.
            let by = i64::try_from(appended.offset.0).unwrap_or(i64::MAX);
            sandboxes.change(&id, happened, Some(Whose::Record(by))).await.map(drop)
        });
        told.await.unwrap_or_else(|ended| Err(Error::of_task(&ended)))
    }

    /// Tells a sandbox what to do. Durable when it returns, and delivered once its stream is there. With a key, only if it was
    /// told nothing under it before by the caller: the same again changes nothing.
    ///
    /// # Errors
    /// [`Kind::Precondition`] if there is no sandbox to take it, [`Kind::Exhausted`] if it is told too often or too much waits,
    /// [`KEY_REUSED`](crate::conversation::KEY_REUSED) if it was told something else under this key, [`Kind::Unavailable`].
    pub async fn command(&self, seat: &Seat, order: Order, key: &str) -> Result<(), Error> {
        let Sandbox { id, status, .. } = &seat.standing.sandbox;
        let once = once(key, &order.0);
        if !status.takes_commands() {
            let message = format!("no sandbox is connected for {id}: it is {}", status.word());
            let refused = Error::new(Kind::Precondition, "ERR_NOT_CONNECTED", message);
            return self.if_known(seat, once.as_ref(), refused).await;
        }
        let active = self.active(id);
        active.take_one()?;
        if let Err(refused) = self.make_room_for_command(id, &active, order.0.len()).await {
            return self.if_known(seat, once.as_ref(), refused).await;
        }
        self.0.gate.command_sandbox(&seat.permit, order.0, once).await.map(drop)
    }

    /// The same that was accepted before is accepted again, whatever is so by now.
    async fn if_known(&self, seat: &Seat, once: Option<&Once>, refused: Error) -> Result<(), Error> {
        let Some(once) = once else { return Err(refused) };
        if self.0.gate.sandbox_was_told(&seat.permit, once).await? { Ok(()) } else { Err(refused) }
    }

    /// All artifacts, with everything that was acknowledged before.
    ///
    /// # Errors
    /// [`Kind::NotFound`], [`Kind::Unavailable`].
    pub async fn artifacts(&self, seat: &Seat) -> Result<Vec<Arc<Artifact>>, Error> {
        Ok(self.scene(&seat.standing).await?.all())
    }

    /// What there is to see, from what somebody saw last, and then what changes.
    ///
    /// # Errors
    /// [`Kind::NotFound`], [`Kind::Unavailable`].
    pub async fn watch(&self, seat: &Seat, last_seen: Option<u64>) -> Result<Watch, Error> {
        Ok(self.scene(&seat.standing).await?.watch(last_seen))
    }

    /// Removes a sandbox and all that it told; whoever watches it sees the end. Completes even if it is not waited for.
    ///
    /// # Errors
    /// [`Kind::NotFound`] if somebody else did, [`Kind::Unavailable`].
    pub async fn remove(&self, seat: &Seat) -> Result<(), Error> {
        let (sandboxes, id) = (self.clone(), seat.standing.sandbox.id.clone());
        let removed = self.0.tracker.spawn(async move { sandboxes.unmake(&id).await });
        removed.await.unwrap_or_else(|ended| Err(Error::of_task(&ended)))
    }

    fn may_watch(&self, caller: &Caller, id: &str, project: Option<&str>) -> bool {
        let project = project.unwrap_or_default();
        self.0.gate.authorize(caller, UseSandbox { id, project, need: Need::Read }).is_ok()
    }

    /// As its row says, and its last sign of life.
    fn shown(&self, mut sandbox: Sandbox) -> Sandbox {
        if let Some(active) = lock(&self.0.active).get(&sandbox.id) {
            sandbox.last_heartbeat = sandbox.last_heartbeat.max(active.beat.load(SeqCst));
        }
        sandbox
    }

    fn active(&self, id: &str) -> Arc<Active> {
        let made = || {
            let Limits { messages_per_second, message_burst, .. } = self.0.limits;
            let rate = TokenBucket::new(messages_per_second, message_burst, Instant::now());
            Active { rate: Mutex::new(rate), ..Active::default() }.into()
        };
        lock(&self.0.active).entry(id.to_owned()).or_insert_with(made).clone()
    }

    fn now(&self) -> i64 {
        i64::try_from(self.0.clock.now_ms()).unwrap_or(i64::MAX)
    }

    /// The scene of a sandbox, with everything in it that was acknowledged before.
    async fn scene(&self, standing: &Standing) -> Result<Arc<Scene>, Error> {
        let id = standing.sandbox.id.as_str();
        let mut since = standing.since;
        loop {
            let active = self.active(id);
            let scene = {
                let mut scene = active.scene.lock().await;
                match &*scene {
                    Some(scene) => scene.clone(),
                    None => {
                        let opened = Scene::open(&self.0, id, since).await?;
                        scene.insert(opened).clone()
                    }
                }
            };
            if scene.sync().await {
                return Ok(scene);
            }
            // It closed, because nobody looked, or what it shows is gone.
            let mut current = active.scene.lock().await;
            if current.as_ref().is_some_and(|current| Arc::ptr_eq(current, &scene)) {
                *current = None;
            }
            drop(current);
            if self.0.stop.is_cancelled() {
                return Err(stopped());
            }
            since = self.standing(id).await?.ok_or_else(missing)?.since;
        }
    }
}

fn happening(sign: Sign) -> Happening {
    match sign {
        Sign::TurnStarted => Happening::TurnStarted,
        Sign::TurnEnded => Happening::TurnEnded,
        Sign::Summary(mut summary) => {
            summary.truncate(summary.floor_char_boundary(SUMMARY_BYTES_MAX));
            Happening::Summary(summary)
        }
    }
}

/// The answer to everybody who may not know of a sandbox.
pub(crate) fn missing() -> Error {
    Error::new(Kind::NotFound, "ERR_NOT_FOUND", "session not found")
}

fn stopped() -> Error {
    Error::new(Kind::Unavailable, "ERR_UNAVAILABLE", "server shutting down")
}

fn invalid(message: String) -> Error {
    Error::new(Kind::Invalid, "ERR_INVALID_ARGUMENT", message)
}

/// A panic while holding the lock cannot leave half a change: each section is a few moves.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

//! Conversations of apps' users with agents.
//!
//! What was said, and what became of the conversation, are records of its topic, `cv::{id}::events`, for as long as nobody
//! erases it. What is being said, piece by piece, are records of the topic beside it, `cv::{id}::deltas`, for a day. Who
//! types is published. That a conversation is there is a row.
//!
//! To agents its user is `us::{user}::{id}`: what the user says comes from there, and what an agent sends there is said in
//! the conversation (`said.rs`).

mod desk;
pub mod files;
mod misses;
mod places;
mod quiet;
mod record;
pub mod said;
mod sql;
pub mod state;
mod turns;
mod watch;

use std::{
    collections::{BTreeMap, HashMap, VecDeque},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError, Weak,
        atomic::{AtomicU64, Ordering::SeqCst},
    },
    time::{Duration, Instant, UNIX_EPOCH},
};

use sha2::{Digest as _, Sha256};
use tokio::sync::oneshot;
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use trunkline_store::log::{Clock, ContentDigest, Item, Offset};
use uuid::Uuid;

pub use self::{
    places::Place,
    record::Delta,
    watch::{History, Page, Seen, Watch},
};
pub use crate::{error::KEY_REUSED, gate::ConversationPermit as Permit};
pub(crate) use sql::MIGRATIONS;

use self::{
    desk::{Desk, Once, Party, Post, What},
    misses::Misses,
    places::Places,
    said::{LockOut, Said, Typing, Why},
    state::{Act, Event, Message, Participant, Reason, Standing},
    turns::Turns,
};
use crate::{
    app::{Agent, Apps, Visitor},
    caller::{Caller, Credential},
    error::{Error, Kind},
    gate::{Administer, Gate, TakePart, UseConversation},
    identity::{Identity, SEPARATOR},
    limits::TokenBucket,
    message::json,
    session::{Heard, Sessions},
    task::Tasks,
};

/// The code of a conversation that takes no more.
pub const CLOSED: &str = "ERR_CONVERSATION_CLOSED";

/// The code of a user that says too much, or is locked out.
pub const LIMITED: &str = "ERR_CONVERSATION_LIMITED";

/// Conversations that are kept in use for a while after the last time.
const RECENT_MAX: usize = 4096;

/// Users whose rate is remembered; of more, those are forgotten that may do anything.
const RATES_MAX: usize = 100_000;

/// How long anything may take, and how much anybody may say.
#[derive(Clone, Debug, PartialEq, Eq, serde::Deserialize, serde::Serialize)]
#[serde(deny_unknown_fields, default)]
pub struct Options {
    /// Where browsers and agents find this server, such as `https://chat.example.org`; what the request says if empty.
    pub public_url: String,
    /// Messages that a user may send to an agent in a minute; 0 is no limit.
    pub messages_per_minute: u32,
    /// Conversations that it may begin in a minute; 0 is no limit.
    pub sessions_per_minute: u32,
    /// Longest message of a user, in bytes.
    pub message_bytes_max: usize,
    /// A stream ends after so long, so that streams are spread over servers anew. The published figure.
    pub stream_seconds: u64,
    /// How long an agent may be away in the middle of a turn.
    pub agent_grace_seconds: u64,
    /// How long an agent that is there may take for a turn; 0 is no limit.
    pub turn_seconds: u64,
    /// What was uploaded and not sent is forgotten after so long.
    pub draft_hours: u64,
    /// An open conversation in which nothing happened for so long is `assumed_resolved`; 0 is never.
    pub assumed_resolved_minutes: u32,
    /// One that waits for feedback is `auto_resolved` after so long; 0 is never.
    pub feedback_minutes: u32,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            public_url: String::new(),
            messages_per_minute: 60,
            sessions_per_minute: 60,
            message_bytes_max: 32 * 1024,
            stream_seconds: 3600,
            agent_grace_seconds: 5,
            turn_seconds: 600,
            draft_hours: 24,
            assumed_resolved_minutes: 0,
            feedback_minutes: 0,
        }
    }
}

/// A conversation, as it was begun.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Row {
    /// Its id.
    pub id: Uuid,
    /// The name of the app.
    pub app: String,
    /// The agent's id in the app.
    pub agent: Uuid,
    /// What the app calls the user.
    pub user: String,
    /// When it was begun, in Unix milliseconds.
    pub created_at: i64,
}

impl Row {
    /// What agents know the user by, in this conversation.
    #[must_use]
    pub fn lane(&self) -> String {
        format!("us::{}::{}", self.user, self.id)
    }
}

/// A user before an agent: whose streams, rates and lockouts are counted together.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) struct Whose {
    pub(super) app: String,
    pub(super) agent: Uuid,
    pub(super) user: String,
}

impl From<&Visitor> for Whose {
    fn from(visitor: &Visitor) -> Self {
        Self { app: visitor.app().name.clone(), agent: visitor.agent().id, user: visitor.user.to_string() }
    }
}

/// Whether, why and for how long a user is locked out.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Lockout {
    /// Why.
    pub reason: Why,
    /// Until when, in Unix seconds; nothing for good.
    pub expires_at: Option<i64>,
    /// What the user is told.
    pub user_message: Option<String>,
}

/// The conversations of a server. Clones share them.
#[derive(Clone)]
pub struct Conversations(Arc<Inner>);

struct Inner {
    gate: Gate,
    apps: Apps,
    sessions: Sessions,
    tasks: Tasks,
    options: Options,
    clock: Clock,
    tracker: TaskTracker,
    stop: CancellationToken,
    /// Bytes of a message of an agent.
    text_bytes_max: usize,
    own_url: String,
    links: files::Links,
    desks: Mutex<Desks>,
    /// Conversations that were erased.
    erasures: AtomicU64,
    lockouts: Mutex<HashMap<Whose, Lockout>>,
    rates: Mutex<HashMap<Whose, Rates>>,
    turns: Turns,
    places: Places,
    misses: Misses,
}

#[derive(Default)]
struct Desks {
    all: HashMap<Uuid, Weak<Desk>>,
    recent: VecDeque<Arc<Desk>>,
}

/// How much a user has said lately.
struct Rates {
    messages: Option<TokenBucket>,
    sessions: Option<TokenBucket>,
}

impl Rates {
    /// Whether nothing is held back: then it need not be remembered.
    fn is_idle(&self, now: Instant) -> bool {
        [&self.messages, &self.sessions].into_iter().flatten().all(|bucket| bucket.is_full(now))
    }
}

/// A conversation, for the user whose it is.
#[derive(Clone)]
pub struct Seat {
    desk: Arc<Desk>,
    permit: Permit,
    visitor: Visitor,
}

impl Seat {
    /// The conversation.
    #[must_use]
    pub fn row(&self) -> &Row {
        &self.desk.row
    }

    /// That it may be used.
    #[must_use]
    pub fn permit(&self) -> &Permit {
        &self.permit
    }

    /// Whose it is.
    #[must_use]
    pub fn visitor(&self) -> &Visitor {
        &self.visitor
    }
}

/// What a server's conversations need besides the gate.
pub struct Parts {
    /// Whose users.
    pub apps: Apps,
    /// Who is connected.
    pub sessions: Sessions,
    /// What starts agents.
    pub tasks: Tasks,
    /// How long anything may take.
    pub options: Options,
    /// Bytes of a message of an agent.
    pub text_bytes_max: usize,
    /// Where agents find files, unless the options say better.
    pub own_url: String,
    /// The time.
    pub clock: Clock,
    /// What owns what is begun here.
    pub tracker: TaskTracker,
    /// The server stops.
    pub stop: CancellationToken,
}

impl Conversations {
    /// The conversations behind `gate`.
    ///
    /// # Errors
    /// [`Kind::Unavailable`].
    pub async fn open(gate: Gate, parts: Parts) -> Result<Self, Error> {
        let Parts { apps, sessions, tasks, options, text_bytes_max, own_url, clock, tracker, stop } = parts;
        let links = files::Links::open(&gate, clock.clone()).await?;
        let lockouts = gate.glance(sql::lockouts).await?.into_iter().collect();
        Ok(Self(Arc::new(Inner {
            gate,
            apps,
            sessions,
            tasks,
            options,
            clock,
            tracker,
            stop,
            text_bytes_max,
            own_url,
            links,
            desks: Mutex::default(),
            erasures: AtomicU64::new(0),
            lockouts: Mutex::new(lockouts),
            rates: Mutex::default(),
            turns: Turns::default(),
            places: Places::default(),
            misses: Misses::default(),
        })))
    }

    /// The apps whose conversations they are.
    #[must_use]
    pub fn apps(&self) -> &Apps {
        &self.0.apps
    }

    /// How they are set.
    #[must_use]
    pub fn options(&self) -> &Options {
        &self.0.options
    }

    fn gate(&self) -> &Gate {
        &self.0.gate
    }

    /// Unix milliseconds.
    #[must_use]
    pub fn now(&self) -> i64 {
        i64::try_from(self.0.clock.now_ms()).unwrap_or(i64::MAX)
    }

    fn stop(&self) -> &CancellationToken {
        &self.0.stop
    }

    fn text_bytes_max(&self) -> usize {
        self.0.text_bytes_max
    }

    /// Runs what a conversation needs to go on: if it panics, that is a fault of the program.
    fn spawn(&self, run: impl Future<Output = ()> + Send + 'static) {
        let on_panic = self.gate().guard("writer of a conversation");
        self.0.tracker.spawn(async move {
            let _on_panic = on_panic;
            run.await;
        });
    }

    /// Begins a conversation; the agent's greeting is its first message.
    ///
    /// # Errors
    /// [`LIMITED`] for a user that begins too many, [`Kind::Unavailable`].
    pub async fn create(&self, visitor: &Visitor) -> Result<Row, Error> {
        self.take(visitor, |rates| rates.sessions.as_mut())?;
        let row = Row {
            id: Uuid::now_v7(),
            app: visitor.app().name.clone(),
            agent: visitor.agent().id,
            user: visitor.user.to_string(),
            created_at: self.now(),
        };
        let new = row.clone();
        self.gate().housekeep(move |tx| sql::insert(tx, new.clone())).await?;
        if let Some(greeting) = visitor.agent().greeting.clone().filter(|text| !text.trim().is_empty()) {
            let (desk, party) = (self.desk(row.clone()), Party::agent(visitor.agent(), &visitor.agent().identity));
            let text = said::Text { text: greeting, ..said::Text::default() };
            desk.run(self, What::Say(party, Said::Text(text), None, None)).await?;
        }
        Ok(row)
    }

    /// A user's conversations with an agent and how they stand, newest first, from before one of them.
    ///
    /// # Errors
    /// [`Kind::Unavailable`].
    pub async fn list(
        &self,
        visitor: &Visitor,
        before: Option<Uuid>,
        most: usize,
    ) -> Result<Vec<(Row, Standing)>, Error> {
        let of = Whose::from(visitor);
        let most = i64::try_from(most).unwrap_or(i64::MAX);
        let rows = self.gate().glance(move |tx| sql::list(tx, of.clone(), before, most)).await?;
        let mut all = Vec::with_capacity(rows.len());
        for row in rows {
            let standing = self.standing(&Permit::own(row.id)).await?;
            all.push((row, standing));
        }
        Ok(all)
    }

    /// A user's conversation.
    ///
    /// # Errors
    /// [`Kind::NotFound`], also for somebody else's; [`Kind::Unavailable`].
    pub async fn find(&self, visitor: &Visitor, id: &str) -> Result<Seat, Error> {
        let id = Uuid::try_parse(id).map_err(|_| missing())?;
        let desk = self.look_up(id).await?.ok_or_else(missing)?;
        let caller = Caller::app_user(&visitor.app().name, &visitor.user, id)?;
        let permit = self.gate().authorize(&caller, UseConversation { visitor, row: &desk.row })?;
        Ok(Seat { desk, permit, visitor: visitor.clone() })
    }

    /// Says something for the user, once under a key or as what a draft becomes; answers the message's id. Durable, and on its
    /// way to the agent, when it returns.
    ///
    /// # Errors
    /// [`CLOSED`], [`LIMITED`], [`KEY_REUSED`], [`Kind::NotFound`] for a draft that is none, [`Kind::Invalid`],
    /// [`Kind::Unavailable`].
    pub async fn post(&self, seat: &Seat, text: &str, draft: Option<Uuid>, key: &str) -> Result<Uuid, Error> {
        let most = self.0.options.message_bytes_max;
        if text.len() > most {
            let why = format!("a message may have {most} bytes");
            return Err(Error::new(Kind::Invalid, "ERR_TOO_LARGE", why));
        }
        let is_named = draft.is_some() || !key.is_empty();
        let id = match (draft, key) {
            (Some(draft), _) => draft,
            (None, "") => Uuid::now_v7(),
            (None, key) => named(seat.row().id, key),
        };
        if is_named && let Some(offset) = self.gate().find_in_conversation(&seat.permit, &desk::dedup(id)).await? {
            // It was said before, whatever is so now.
            return self.confirm(&seat.permit, offset, text).await.map(|()| id);
        }
        self.admit(seat)?;
        let files = match draft {
            Some(draft) => self.send_draft(seat, draft).await?,
            None => Vec::new(),
        };
        let sent = self.submit(seat, Post { id, content: text.to_owned(), files, is_named }).await;
        if let Err(refused) = sent {
            // Of two at once, the other one may have been accepted.
            if is_named && let Some(offset) = self.gate().find_in_conversation(&seat.permit, &desk::dedup(id)).await? {
                return self.confirm(&seat.permit, offset, text).await.map(|()| id);
            }
            if let Some(draft) = draft {
                // It may be sent again, or is forgotten in time.
                self.gate().housekeep(move |tx| sql::take_back_draft(tx, draft)).await?;
            }
            return Err(refused);
        }
        Ok(id)
    }

    async fn submit(&self, seat: &Seat, post: Post) -> Result<(), Error> {
        if post.content.trim().is_empty() && post.files.is_empty() {
            return Err(Error::new(Kind::Invalid, EMPTY, "text: nothing is said"));
        }
        seat.desk.run(self, What::Post(post)).await
    }

    /// Whether what lies there is the same message.
    async fn confirm(&self, permit: &Permit, offset: Offset, content: &str) -> Result<(), Error> {
        match self.event_at(permit, offset).await? {
            Some(Event::Message(message)) if message.content == content => Ok(()),
            _ => {
                let why = "this Idempotency-Key, or message_id, was used for another message";
                Err(Error::new(Kind::Invalid, KEY_REUSED, why))
            }
        }
    }

    /// Whether the user may say anything now.
    fn admit(&self, seat: &Seat) -> Result<(), Error> {
        if let Some(lockout) = self.lockout(&seat.visitor) {
            let wait = lockout.expires_at.map(|at| Duration::from_secs((at - self.now() / 1000).max(1).unsigned_abs()));
            let why = lockout.user_message.unwrap_or_else(|| "the user is locked out".to_owned());
            let code = if wait.is_some() { LIMITED } else { CLOSED };
            let kind = if wait.is_some() { Kind::Exhausted } else { Kind::Precondition };
            return Err(Error { retry_after: wait, ..Error::new(kind, code, why) });
        }
        let taken = self.take(&seat.visitor, |rates| rates.messages.as_mut());
        taken.inspect_err(|error| self.say_limited(seat, error))
    }

    /// How a conversation stands.
    ///
    /// # Errors
    /// [`Kind::Unavailable`].
    pub async fn standing(&self, permit: &Permit) -> Result<Standing, Error> {
        let tail = self.gate().conversation_status(permit).await?.tail;
        if tail == Offset::START {
            return Ok(Standing::default());
        }
        self.record_at(permit, tail).await?.map_or_else(|| Ok(Standing::default()), |record| record::standing(&record))
    }

    async fn event_at(&self, permit: &Permit, offset: Offset) -> Result<Option<Event>, Error> {
        self.record_at(permit, offset).await?.map(|record| record::event(&record)).transpose()
    }

    async fn record_at(
        &self,
        permit: &Permit,
        offset: Offset,
    ) -> Result<Option<Arc<trunkline_store::log::Record>>, Error> {
        let mut reader = self.gate().follow_conversation(permit, Offset(offset.0.saturating_sub(1)), None)?;
        let mut items = Vec::new();
        reader.available_batch(1, &mut items).await?;
        Ok(items.into_iter().find_map(|item| match item {
            Item::Record(record) if record.offset == offset => Some(record),
            _ => None,
        }))
    }

    /// Somebody who sends to a user's lane, if that is a conversation.
    ///
    /// # Errors
    /// `ERR_PERMISSION_DENIED`; [`Kind::Precondition`] if its app is gone; [`Kind::Unavailable`].
    pub async fn part(&self, caller: &Caller, lane: &str) -> Result<Option<Part>, Error> {
        let Some((user, id)) = conversation_of(lane) else { return Ok(None) };
        let Some(desk) = self.look_up(id).await?.filter(|desk| desk.row.user == user) else { return Ok(None) };
        let Some((_, agent)) = self.apps().agent(&desk.row.app, desk.row.agent) else {
            let why = "the app, or the agent, of this conversation is gone";
            return Err(Error::new(Kind::Precondition, "ERR_FAILED_PRECONDITION", why));
        };
        let permit = self.gate().authorize(caller, take_part(&desk.row, &agent))?;
        let lane = caller.identity.to_string();
        let party = match &caller.identity {
            Identity::User { user, .. } => {
                Party { lane, participant: Participant::new(user, state::Kind::Human, user, None) }
            }
            _ => Party::agent(&agent, &lane),
        };
        Ok(Some(Part { desk, permit, party, heard: None }))
    }

    /// Refuses the lane of a conversation to whoever would connect as a user's window of that name: to its agent, that one
    /// would be the conversation's user.
    ///
    /// # Errors
    /// [`Kind::Denied`]; [`Kind::Unavailable`].
    pub async fn check_window(&self, identity: &Identity) -> Result<(), Error> {
        let lane = identity.to_string();
        let Some((user, id)) = conversation_of(&lane) else { return Ok(()) };
        match self.look_up(id).await? {
            Some(desk) if desk.row.user == user => {
                let why = format!("{lane} is the user of a conversation; windows have other names");
                Err(Error::new(Kind::Denied, "ERR_PERMISSION_DENIED", why))
            }
            _ => Ok(()),
        }
    }

    /// Whether somebody who joined may still take part.
    fn may_take_part(&self, row: &Row, agent: &Agent, lane: &str) -> bool {
        let Ok(identity) = Identity::parse(lane) else { return false };
        let caller = Caller::new(identity, String::new(), Credential::none(false));
        self.gate().authorize(&caller, take_part(row, agent)).is_ok()
    }

    /// What somebody sends to a conversation, in the order of the calls. Resolves, when it is durable, to whether it was.
    ///
    /// # Errors
    /// [`Kind::Invalid`] for what means nothing in a conversation; [`Kind::Unavailable`].
    pub async fn say(&self, part: &Part, kind: i32, payload: &[u8], key: &str) -> Result<Told, Error> {
        let said = said::read(kind, payload)?;
        let (permit, party) = (&part.permit, &part.party);
        let content = ContentDigest::of(&[&kind.to_be_bytes(), payload]);
        let once = (!key.is_empty()).then(|| Once { name: format!("{}\n{key}", party.lane), content });
        match &said {
            Said::Typing(typing) => return self.publish(permit, typing).map(|()| Told(None)),
            Said::LockOut(lock_out) => {
                if let Some(Once { name, content }) = &once {
                    let is_said = self.gate().find_said(permit, name, *content).await?.is_some();
                    if is_said || self.gate().find_piece(permit, name, *content).await?.is_some() {
                        return Ok(Told(None));
                    }
                }
                let named = once.as_ref().map(|once| (once.name.clone(), Sha256::digest(payload).to_vec()));
                self.lock_out(&part.desk, lock_out, named).await?;
                if lock_out.state().is_none() {
                    return Ok(Told(None));
                }
            }
            Said::Join | Said::Leave if party.participant.kind != state::Kind::Human => {
                return Err(Error::new(Kind::Invalid, "ERR_INVALID_ARGUMENT", "only operators join and leave"));
            }
            _ => {
                let joins = party.participant.kind == state::Kind::Human && matches!(said, Said::Text(_));
                if joins {
                    // Whoever speaks hears what follows.
                    drop(part.desk.submit(self, What::Act(Act::Join(party.lane.clone()))).await?);
                }
            }
        }
        let what = What::Say(party.clone(), said, once.map(Box::new), part.heard.clone().map(Box::new));
        part.desk.submit(self, what).await.map(|told| Told(Some(told)))
    }

    /// Tells whoever watches that somebody types, or stops.
    ///
    /// # Errors
    /// [`Kind::Invalid`] for a label that is too long.
    pub fn publish(&self, permit: &Permit, typing: &Typing) -> Result<(), Error> {
        self.gate().publish_to_conversation(permit, json(&watch::Passing::Typing(typing.clone()))?)
    }

    /// A turn came to nothing, because the user said too much.
    fn say_limited(&self, seat: &Seat, error: &Error) {
        let retry_after_seconds = error.retry_after.map(|wait| wait.as_secs().max(1));
        let reason = Reason::RateLimited;
        let limited = watch::Passing::TurnDone { reason, at: self.now() / 1000, retry_after_seconds };
        let told = json(&limited).and_then(|said| self.gate().publish_to_conversation(&seat.permit, said));
        if let Err(error) = told {
            tracing::debug!(%error, "other tabs do not hear that a message was refused");
        }
    }

    /// Why a user cannot say anything, if so.
    #[must_use]
    pub fn lockout(&self, visitor: &Visitor) -> Option<Lockout> {
        let key = Whose::from(visitor);
        let now = self.now() / 1000;
        let lockouts = lock(&self.0.lockouts);
        lockouts.get(&key).filter(|lockout| lockout.expires_at.is_none_or(|at| at > now)).cloned()
    }

    /// Locks a user out, or lets it in again; under a name, with a digest of what was said, once. A name is kept with the lockout,
    /// as not every one changes the conversation.
    async fn lock_out(&self, desk: &Desk, lock_out: &LockOut, named: Option<(String, Vec<u8>)>) -> Result<(), Error> {
        let Row { id, app, agent, user, .. } = desk.row.clone();
        let key = Whose { app, agent, user };
        let lockout = (lock_out.reason != Why::None).then(|| Lockout {
            reason: lock_out.reason,
            expires_at: lock_out.seconds.map(|seconds| self.now() / 1000 + i64::from(seconds)),
            user_message: lock_out.user_message.clone(),
        });
        let row = (key.clone(), lockout);
        let named = named.map(|(name, content)| sql::Named { conversation: id, name, content, at: self.now() / 1000 });
        // A repeated lockout takes effect from its row: an agent repeats it where the reply to the first was lost.
        let stands =
            self.gate().housekeep(move |tx| sql::put_lockout(tx, row.0.clone(), row.1.clone(), named.clone())).await?;
        let mut lockouts = lock(&self.0.lockouts);
        match stands {
            Some(lockout) => drop(lockouts.insert(key, lockout)),
            None => drop(lockouts.remove(&key)),
        }
        Ok(())
    }

    /// Erases what a user of an app said and was told, in all conversations; answers how many those were.
    ///
    /// # Errors
    /// [`Kind::Denied`], [`Kind::Unavailable`]: then it is to be asked for again.
    pub async fn erase(&self, caller: &Caller, app: &str, user: &str) -> Result<usize, Error> {
        self.gate().authorize(caller, Administer("apps"))?;
        let of = (app.to_owned(), user.to_owned());
        let asked = of.clone();
        let rows = self.gate().glance(move |tx| sql::of_user(tx, asked.0.clone(), asked.1.clone())).await?;
        for row in &rows {
            let (id, permit) = (row.id, Permit::own(row.id));
            // Whoever holds it already writes nothing any more.
            let desk = self.desk(row.clone());
            desk.close(self).await?;
            self.turn_ended(row);
            self.gate().forget_conversation(&permit).await?;
            self.remove_files(&permit, None).await?;
            // The row last: by it the rest is found, should this end in between.
            self.gate().housekeep(move |tx| sql::remove(tx, id)).await?;
            self.0.erasures.fetch_add(1, SeqCst);
            lock(&self.0.desks).recent.retain(|desk| desk.row.id != id);
        }
        let asked = of.clone();
        self.gate().housekeep(move |tx| sql::forget_lockouts(tx, asked.0.clone(), asked.1.clone())).await?;
        lock(&self.0.lockouts).retain(|whose, _| (&whose.app, &whose.user) != (&of.0, &of.1));
        Ok(rows.len())
    }

    /// What the server says of a message to agents and operators.
    fn about(&self, row: &Row, message: &Message) -> Result<BTreeMap<String, String>, Error> {
        let from = serde_json::to_value(message.from).unwrap_or_default();
        let mut about: BTreeMap<String, String> = [
            ("convo_id", row.id.to_string()),
            ("message_id", message.id.to_string()),
            ("turn_number", message.turn_number.to_string()),
            ("from", from.as_str().unwrap_or_default().to_owned()),
            ("app", row.app.clone()),
        ]
        .map(|(name, value)| (name.to_owned(), value))
        .into();
        if !message.files.is_empty() {
            let set = self.0.options.public_url.trim_end_matches('/');
            let base = if set.is_empty() { &self.0.own_url } else { set };
            let files = self.0.links.shown(&message.files, base, files::FOR_AGENTS);
            about.insert("files".to_owned(), String::from_utf8_lossy(&json(&files)?).into_owned());
        }
        Ok(about)
    }

    /// Forgets what is not needed any more.
    ///
    /// # Errors
    /// [`Kind::Unavailable`].
    pub async fn sweep(&self) -> Result<(), Error> {
        let now = self.now();
        self.sweep_drafts(now).await?;
        let seconds = now / 1000;
        self.gate().housekeep(move |tx| sql::sweep_lockouts(tx, seconds)).await?;
        lock(&self.0.lockouts).retain(|_, lockout| lockout.expires_at.is_none_or(|at| at > seconds));
        Ok(())
    }

    fn take(&self, visitor: &Visitor, which: impl FnOnce(&mut Rates) -> Option<&mut TokenBucket>) -> Result<(), Error> {
        let key = Whose::from(visitor);
        let now = Instant::now();
        let mut rates = lock(&self.0.rates);
        if rates.len() >= RATES_MAX {
            rates.retain(|_, rate| !rate.is_idle(now));
        }
        let Options { messages_per_minute: messages, sessions_per_minute: sessions, .. } = self.0.options;
        let rate = rates.entry(key).or_insert_with(|| Rates {
            messages: TokenBucket::per_minute(messages, now),
            sessions: TokenBucket::per_minute(sessions, now),
        });
        let Some(Err(wait)) = which(rate).map(|bucket| bucket.take(now)) else { return Ok(()) };
        let error = Error::new(Kind::Exhausted, LIMITED, "this user says too much");
        Err(Error { retry_after: Some(wait.max(Duration::from_secs(1))), ..error })
    }

    async fn look_up(&self, id: Uuid) -> Result<Option<Arc<Desk>>, Error> {
        if let Some(desk) = lock(&self.0.desks).all.get(&id).and_then(Weak::upgrade) {
            return Ok(Some(desk).filter(|desk| !desk.is_gone()));
        }
        if self.0.misses.has(id, Instant::now()) {
            return Ok(None);
        }
        let erasures = self.0.erasures.load(SeqCst);
        let Some(row) = self.gate().glance(move |tx| sql::find(tx, id)).await? else {
            self.0.misses.note(id, Instant::now());
            return Ok(None);
        };
        let desk = self.desk(row);
        if self.0.erasures.load(SeqCst) != erasures && self.gate().glance(move |tx| sql::find(tx, id)).await?.is_none()
        {
            // It was erased since the row was read, and nobody else's desk says so any more.
            desk.forget();
        }
        Ok(Some(desk).filter(|desk| !desk.is_gone()))
    }

    /// The one desk of a conversation.
    fn desk(&self, row: Row) -> Arc<Desk> {
        let mut desks = lock(&self.0.desks);
        if let Some(desk) = desks.all.get(&row.id).and_then(Weak::upgrade) {
            return desk;
        }
        let desk = Arc::new(Desk::new(row));
        desks.all.insert(desk.row.id, Arc::downgrade(&desk));
        desks.recent.push_back(desk.clone());
        if desks.recent.len() > RECENT_MAX {
            desks.recent.pop_front();
            if desks.all.len() > 2 * RECENT_MAX && desks.all.len().is_power_of_two() {
                desks.all.retain(|_, desk| desk.strong_count() > 0);
            }
        }
        desk
    }
}

/// The code of a message that says nothing.
pub const EMPTY: &str = "ERR_EMPTY";

/// Somebody in a conversation besides its user.
pub struct Part {
    desk: Arc<Desk>,
    permit: Permit,
    party: Party,
    heard: Option<Heard>,
}

impl Part {
    /// What is said proves that this was heard, and says so in the same append.
    #[must_use]
    pub fn having_heard(self, heard: Option<Heard>) -> Self {
        Self { heard, ..self }
    }

    /// That it may take part.
    #[must_use]
    pub fn permit(&self) -> &Permit {
        &self.permit
    }
}

impl Party {
    fn agent(agent: &Agent, lane: &str) -> Self {
        let id = agent.id.to_string();
        let participant = Participant::new(&id, state::Kind::Agent, &agent.name, agent.photo_url.clone());
        Self { lane: lane.to_owned(), participant }
    }
}

/// What was handed over to a conversation; resolves to whether it became durable. Dropping it takes nothing back.
pub struct Told(Option<oneshot::Receiver<Result<(), Error>>>);

impl Told {
    /// Waits until it is durable.
    ///
    /// # Errors
    /// Why it is not.
    pub async fn done(self) -> Result<(), Error> {
        let Some(told) = self.0 else { return Ok(()) };
        told.await.unwrap_or_else(|_| Err(Error::new(Kind::Unavailable, "ERR_UNAVAILABLE", "the server stops")))
    }
}

/// The user and the conversation that a lane names, if it may be one: the ids of conversations are UUIDs of version 7.
#[must_use]
pub fn conversation_of(lane: &str) -> Option<(&str, Uuid)> {
    let (user, window) = lane.strip_prefix("us::")?.split_once(SEPARATOR)?;
    let id = Uuid::try_parse(window).ok().filter(|id| window.len() == 36 && id.get_version_num() == 7)?;
    Some((user, id))
}

fn take_part<'a>(row: &'a Row, agent: &'a Agent) -> TakePart<'a> {
    TakePart { row, agent: &agent.identity, workspace: agent.workspace() }
}

/// The id of a message that its sender names: the same for the same name.
fn named(conversation: Uuid, key: &str) -> Uuid {
    let digest = Sha256::new().chain_update(conversation.as_bytes()).chain_update(key.as_bytes()).finalize();
    let mut bytes = [0; 16];
    bytes.copy_from_slice(&digest[..16]);
    uuid::Builder::from_custom_bytes(bytes).into_uuid()
}

/// A moment as the published interface writes it.
#[must_use]
pub fn iso(unix_ms: i64) -> String {
    humantime::format_rfc3339_millis(UNIX_EPOCH + Duration::from_millis(unix_ms.max(0).unsigned_abs())).to_string()
}

/// The error of what is not there, or is somebody else's.
pub(crate) fn missing() -> Error {
    Error::new(Kind::NotFound, "ERR_NOT_FOUND", "there is no such conversation")
}

/// A panic while holding the lock cannot leave half a change: each section is a few calls of a map.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::{conversation_of, iso, named};
    use uuid::Uuid;

    #[test]
    fn conversations_are_known_by_their_lanes() {
        let id = Uuid::now_v7();
        assert_eq!(conversation_of(&format!("us::ann::{id}")), Some(("ann", id)));
        for lane in [
            "us::ann::window".to_owned(),
            format!("us::ann::{}", Uuid::new_v4()),
            format!("us::ann::{}", id.simple()),
            format!("ag::w::i::{id}"),
            "us::ann".to_owned(),
        ] {
            assert_eq!(conversation_of(&lane), None, "{lane}");
        }
    }

    #[test]
    fn named_messages_keep_their_ids() {
        let (one, other) = (Uuid::now_v7(), Uuid::now_v7());
        assert_eq!(named(one, "a"), named(one, "a"));
        assert_ne!(named(one, "a"), named(one, "b"));
        assert_ne!(named(one, "a"), named(other, "a"));
    }

    #[test]
    fn moments_are_written_as_published() {
        assert_eq!(iso(1_763_798_400_123), "2025-11-22T08:00:00.123Z");
    }
}

//! Messages that are not delivered again by themselves: one session after the other was lost while its client had them.
//!
//! Counted is what a client that acknowledges had longest: its oldest lane delivery, and its oldest piece of shared work. A session
//! that ends in any other way than by losing its client counts for nothing, and one that its client resumes is taken off again, also if
//! it was the last: then the dead letter is delivered again. Counts and dead letters are rows, so that neither a restart nor another
//! node begins anew. A dead letter is kept for 30 days, and of one owner the last 1,000 are.

pub(crate) mod sql;

use trunkline_store::{
    ledger::{self, Outgoing},
    log::{Clock, Item, Offset, Record, Topic},
};
use uuid::Uuid;

use super::{Session, Sessions};
use crate::{
    caller::Caller,
    error::{Error, Kind},
    gate::{Administer, Gate},
    identity::Identity,
    topic::{Target, is_progress, own_lane},
};

/// How long a dead letter, and the count of one that may become one, is kept, in seconds.
const KEEP_SECONDS: i64 = 30 * 24 * 60 * 60;

/// Dead letters of one page.
const PAGE_MAX: u32 = 1000;

/// A message that is not delivered again by itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DeadLetter {
    /// Later ones have greater ids.
    pub id: Uuid,
    /// Its receiver: an identity, or the topic of a group of tasks.
    pub owner: String,
    /// The record as it lay in the log. Listed ones have the first 4 KiB of their payload.
    pub record: Record,
    /// Bytes of the whole record.
    pub size: u64,
    /// When it was given up, in Unix seconds.
    pub at: i64,
    /// How many sessions were lost over it.
    pub lost_sessions: i64,
}

/// What a client that acknowledges had longest when it was lost.
#[derive(Clone, Debug, Default)]
pub struct Oldest<Lane, Shared> {
    /// Of its lanes.
    pub lane: Lane,
    /// Of the work that it shares.
    pub shared: Shared,
}

impl Session {
    /// Counts that the client was lost over what it had longest; answers which of both is a dead letter now, which the caller notes as
    /// delivered. Before [`Session::save`]: a crash between the two delivers a dead letter once more.
    ///
    /// # Errors
    /// [`Kind::Unavailable`]; then nothing is counted, unless shared work alone was not.
    pub async fn lost_over(
        &self,
        oldest: Oldest<Option<Offset>, Option<&Record>>,
    ) -> Result<Oldest<bool, bool>, Error> {
        let mut dead = Oldest::default();
        // One that was taken over or ended from here has not lost its client.
        if self.lost_sessions_max == 0 || !self.lease.is_held() {
            return Ok(dead);
        }
        if let Some(offset) = oldest.lane
            && let Some(record) = self.find(offset).await?
        {
            dead.lane = self.count(self.caller.identity.to_string(), &record, true).await?;
        }
        if let Some(record) = oldest.shared {
            dead.shared = self.count(record.topic.to_string(), record, false).await.unwrap_or_else(|error| {
                tracing::warn!(%error, topic = %record.topic, "a session that was lost over shared work is not counted");
                false
            });
        }
        // Its client went on with it before this was counted.
        if self.taken.is_resumed() {
            take_back_loss(&self.gate, &self.caller.identity, &self.caller.session).await?;
        }
        Ok(dead)
    }

    /// A record of lanes that are remembered; the others are not delivered again.
    async fn find(&self, offset: Offset) -> Result<Option<Record>, Error> {
        let (mut reader, mut items) = (self.gate.reader(&self.attend), Vec::new());
        for topic in self.lanes.iter().flat_map(|lanes| &lanes.topics) {
            reader.follow_from(topic, Offset(offset.0.saturating_sub(1)))?;
        }
        reader.available_batch(1, &mut items).await?;
        Ok(items.into_iter().find_map(|item| match item {
            Item::Record(record) if record.offset == offset => Some((*record).clone()),
            _ => None,
        }))
    }

    async fn count(&self, owner: String, record: &Record, is_lane: bool) -> Result<bool, Error> {
        let most = self.lost_sessions_max;
        let lost = sql::Lost {
            owner: owner.clone(),
            epoch: self.log_epoch(),
            position: record.offset.0 as i64,
            session: self.caller.session.clone(),
            now: super::sql::now(),
            is_lane,
        };
        let record = record.clone();
        let dead = self.gate.write(&self.keep, move |tx, _| sql::count(tx, lost.clone(), record.clone(), most));
        let is_dead = dead.await?;
        if is_dead {
            tracing::warn!(owner, sessions = most, "a message is a dead letter: sessions were lost over it");
        }
        Ok(is_dead)
    }
}

/// A session of the identity was not lost: its client goes on with it. What is a dead letter by it is delivered again.
pub(super) async fn take_back_loss(gate: &Gate, identity: &Identity, session: &str) -> Result<(), Error> {
    let group = match identity {
        Identity::Task(named) => {
            let (workspace, implementation) = (named.workspace.clone(), named.implementation.clone());
            Target::AnyTask { workspace, implementation }.topic()?.to_string()
        }
        _ => String::new(),
    };
    let (owners, id) = ([identity.to_string(), group], session.to_owned());
    let of = (owners.clone(), id.clone());
    if gate.glance(move |tx| sql::is_counted(tx, of.0.clone(), of.1.clone())).await? {
        let of = (owners.clone(), id.clone());
        for letter in gate.glance(move |tx| sql::dead_since(tx, of.0.clone(), of.1.clone())).await? {
            // Progress is of no use later.
            let Ok(topic) = again(&letter) else { continue };
            send_again(gate, letter.id, Outgoing { topic, payload: letter.record.payload }).await?;
        }
        let taken = gate.housekeep(move |tx| sql::take_back(tx, owners.clone(), id.clone()));
        taken.await.map_err(|e: ledger::Error| Error::from(e))?;
    }
    Ok(())
}

/// Answers whether it was there.
async fn send_again(gate: &Gate, id: Uuid, outgoing: Outgoing) -> Result<bool, Error> {
    let sent = gate.housekeep(move |tx| sql::send_again(tx, id.to_string(), outgoing.clone()));
    sent.await.map_err(|e: ledger::Error| Error::from(e))
}

/// Forgets what is older than it is kept.
///
/// # Errors
/// [`Kind::Unavailable`].
pub async fn sweep(gate: &Gate) -> Result<(), Error> {
    // By a clock that is not set yet, everything may be old.
    if !Clock::system().is_settled() {
        return Ok(());
    }
    let before = super::sql::now().saturating_sub(KEEP_SECONDS);
    let swept = gate.housekeep(move |tx| sql::sweep(tx, before));
    swept.await.map_err(|e: ledger::Error| Error::from(e))
}

impl Sessions {
    /// The next `limit` dead letters (1,000 for 0 and at most) behind `after`, the oldest first and with the first 4 KiB of their
    /// payloads; of one owner, if one is named.
    ///
    /// # Errors
    /// [`Kind::Denied`], [`Kind::Unavailable`].
    pub async fn dead_letters(
        &self,
        caller: &Caller,
        owner: &str,
        after: Option<Uuid>,
        limit: u32,
    ) -> Result<Vec<DeadLetter>, Error> {
        let permit = self.gate.authorize(caller, Administer("topics"))?;
        let limit = if limit == 0 { PAGE_MAX } else { limit.min(PAGE_MAX) };
        let (owner, after) = (owner.to_owned(), after.map_or_else(String::new, |id| id.to_string()));
        self.gate.look(&permit, move |tx| sql::list(tx, owner.clone(), after.clone(), limit.into())).await
    }

    /// One of them, with its payload.
    ///
    /// # Errors
    /// [`Kind::NotFound`], [`Kind::Denied`], [`Kind::Unavailable`].
    pub async fn dead_letter(&self, caller: &Caller, id: Uuid) -> Result<DeadLetter, Error> {
        let permit = self.gate.authorize(caller, Administer("topics"))?;
        let found = self.gate.look(&permit, move |tx| sql::get(tx, id.to_string())).await?;
        found.ok_or_else(|| missing(id))
    }

    /// Delivers one of them again, to its owner alone, behind all that is there for it; then it is not a dead letter any more. Exactly once,
    /// also if the process is killed meanwhile.
    ///
    /// # Errors
    /// [`Kind::NotFound`], [`Kind::Precondition`] for progress, which is of no use later, [`Kind::Denied`], [`Kind::Unavailable`].
    pub async fn retry_dead_letter(&self, caller: &Caller, id: Uuid) -> Result<DeadLetter, Error> {
        let letter = self.dead_letter(caller, id).await?;
        let topic = again(&letter)?;
        let outgoing = Outgoing { topic, payload: letter.record.payload.clone() };
        if send_again(&self.gate, id, outgoing).await? { Ok(letter) } else { Err(missing(id)) }
    }

    /// Forgets one of them.
    ///
    /// # Errors
    /// [`Kind::NotFound`], [`Kind::Denied`], [`Kind::Unavailable`].
    pub async fn remove_dead_letter(&self, caller: &Caller, id: Uuid) -> Result<(), Error> {
        self.gate.authorize(caller, Administer("topics"))?;
        let removed = self.gate.housekeep(move |tx| sql::remove(tx, id.to_string()));
        let was_there = removed.await.map_err(|e: ledger::Error| Error::from(e))?;
        if was_there { Ok(()) } else { Err(missing(id)) }
    }
}

/// Where it is delivered again. What went to many goes to the one that had it, and not to the others a second time.
fn again(letter: &DeadLetter) -> Result<Topic, Error> {
    let topic = &letter.record.topic;
    if letter.owner == topic.as_str() {
        return Ok(topic.clone());
    }
    if is_progress(topic) {
        let message = format!("dead letter {} is a report of progress, which is not delivered again", letter.id);
        return Err(Error::new(Kind::Precondition, "ERR_INVALID_STATE", message));
    }
    let no_lane = || Error::new(Kind::Internal, "ERR_INTERNAL", format!("{} has no lane", letter.owner));
    own_lane(&Identity::parse(&letter.owner)?)?.ok_or_else(no_lane)
}

fn missing(id: Uuid) -> Error {
    Error::new(Kind::NotFound, "ERR_NOT_FOUND", format!("dead letter not found: {id}"))
}

//! The one door: only the gate holds the store, and everything that it does for somebody takes a permit.
//!
//! [`Gate::authorize`] turns a caller and an [`Intent`] into the intent's permit. A permit has no constructor outside of
//! this module, so that whoever forgets to ask cannot go on.

mod conversation;
mod policy;
mod reconcile;
pub mod rules;
mod sandbox;
mod socket;
mod sql;
mod task;

use std::{
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use tokio::sync::broadcast;
use trunkline_store::{
    Store,
    lease::{self, Lease, Policy},
    ledger::{self, ReadTx, TxFuture, WriteTx},
    log::{self, Append, ContentDigest, Cursor, Item, Offset, Reader, Record, SubmittedEach, Topic},
};

pub use self::conversation::{ConversationPermit, TakePart, UseConversation};
use self::rules::{Fallback, Level, Name, Rule, Rules};
pub(crate) use self::sandbox::Once;
pub use self::sandbox::{SandboxNeed, SandboxPermit, UseSandbox};
pub use self::socket::{SocketNeed, SocketPermit, UseSocket};
pub use self::task::CreateTask;
use crate::{
    caller::Caller,
    error::Error,
    identity::{Identity, PrincipalKind},
    kv,
    rule::{now, sql as rows},
    session::sql as positions,
    task::Task,
    topic::Target,
};

/// Revoked keys that a stream may be behind; one that is further behind asks for its own.
const REVOKED_MAX: usize = 64;

/// Decides, and does what was decided. Clones share the store.
#[derive(Clone)]
pub struct Gate(Arc<Shared>);

struct Shared {
    store: Store,
    /// The rules as they were last heard of, and their version.
    rules: Mutex<(Arc<Rules>, i64)>,
    /// Ids of API keys that are revoked.
    revoked: broadcast::Sender<Arc<str>>,
}

/// What decisions depend on besides the caller and the intent: the rules, and the second, because rules expire. While it
/// is the same, the same question has the same answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AsOf {
    rules: i64,
    second: i64,
}

/// Something that a caller wants to do.
pub trait Intent {
    /// What allows it.
    type Permit;

    /// Whether the caller may, by `gate/policy.rs` and the rules.
    ///
    /// # Errors
    /// [`crate::Kind::Denied`], which never tells whether the thing exists.
    fn decide(self, caller: &Caller, rules: &Rules) -> Result<Self::Permit, Error>;
}

/// To send a message to a target.
pub struct Send<'a>(pub &'a Target);

/// To be connected under one's identity, and to hear what is said to it.
pub struct Attend;

/// To report progress to a recipient.
pub struct Report<'a> {
    pub(crate) recipient: &'a str,
    pub(crate) home: Option<&'a str>,
}

/// To take metrics back.
pub struct CreditMetrics;

/// To act in a workspace.
pub struct Enter<'a>(pub &'a str);

/// To keep rows of one's own.
pub struct Keep;

/// To use keys of the key-value store, from a home workspace.
pub struct UseKeys<'a> {
    pub(crate) request: &'a kv::Request,
    pub(crate) home: Option<&'a str>,
}

/// To look at rules or to change them.
pub struct ChangeRules<'a> {
    /// What the rules are about, if one thing.
    resource: Option<&'a Name>,
    /// What the administrator of everything needs.
    as_admin: Level,
    /// What the administrator of a workspace needs on it.
    on_workspace: Level,
    /// The published words for refusing an operation that is not about one resource.
    refusal: &'static str,
}

impl<'a> ChangeRules<'a> {
    /// To change the rule on a resource that gives, or gave, up to `level`.
    pub(crate) fn one(resource: &'a Name, level: Level) -> Self {
        let on_workspace = if level <= Level::READ_WRITE { Level::MANAGE } else { Level::ADMIN };
        Self { resource: Some(resource), as_admin: Level::ADMIN, on_workspace, refusal: "" }
    }

    /// To see the rules on a resource.
    pub(crate) fn look(resource: &'a Name) -> Self {
        Self { resource: Some(resource), as_admin: Level::READ, on_workspace: Level::READ, refusal: "" }
    }

    /// To see what is about everything.
    pub(crate) fn look_at_all(refusal: &'static str) -> Self {
        Self { resource: None, as_admin: Level::READ, on_workspace: Level::READ, refusal }
    }

    /// To change what is about everything.
    pub(crate) fn all() -> Self {
        let refusal = "this ACL operation requires global admin privileges";
        Self { resource: None, as_admin: Level::ADMIN, on_workspace: Level::ADMIN, refusal }
    }
}

/// To learn whether a principal is connected.
pub struct QueryConnection<'a> {
    pub(crate) kind: PrincipalKind,
    pub(crate) id: &'a str,
}

/// To look at a part of the server.
pub struct Inspect(pub &'static str);

/// To make API keys for users.
pub struct MintUserKeys;

/// To report what one did, in a workspace.
pub struct SubmitTrail<'a> {
    pub(crate) workspace: &'a str,
    pub(crate) home: Option<&'a str>,
}

/// To look up what was reported, in a workspace or, if that is empty, everywhere.
pub struct ReadTrail<'a> {
    pub(crate) workspace: &'a str,
}

/// To look at a task, or to change it.
pub struct TouchTask<'a>(pub(crate) &'a Task);

/// To say something about a task, to those who follow it.
pub struct SayOf<'a>(pub(crate) &'a Task);

/// To report progress on a task.
pub struct ReportOn<'a>(pub(crate) &'a Task);

/// To look at all tasks of a workspace.
pub struct ListTasks<'a>(pub(crate) &'a str);

/// To have somebody else come in with a token.
pub struct IssueToken<'a>(pub(crate) &'a Identity);

/// To administer a part of the server, such as `sessions`.
pub struct Administer(pub &'static str);

/// Allows appending to one topic.
pub struct SendPermit {
    topic: Topic,
}

/// Records that may be appended.
#[derive(Default)]
pub struct Batch {
    appends: Vec<Append>,
    /// What the sender calls each; most are nameless.
    keys: Vec<Box<str>>,
    bytes: usize,
}

impl Batch {
    /// Adds a record to what the permit allows.
    pub fn push(&mut self, permit: &SendPermit, payload: Vec<u8>) {
        self.bytes += payload.len();
        self.appends.push(Append::new(&permit.topic, payload));
        self.keys.push(Box::default());
    }

    /// Adds a record that is written only if `by` did not write one with that key to the topic before. If it did, with other
    /// content, this one is refused.
    pub fn push_once(
        &mut self,
        permit: &SendPermit,
        payload: Vec<u8>,
        by: &Identity,
        key: &str,
        content: ContentDigest,
    ) {
        self.bytes += payload.len();
        self.appends.push(Append::new(&permit.topic, payload).dedup_with(format!("{by}\n{key}"), content));
        self.keys.push(key.into());
    }

    /// What the sender calls each.
    pub(crate) fn take_keys(&mut self) -> Vec<Box<str>> {
        std::mem::take(&mut self.keys)
    }

    /// Their size, in bytes.
    #[must_use]
    pub fn bytes(&self) -> usize {
        self.bytes
    }
}

/// Allows holding one identity and reading its lanes.
pub struct AttendPermit {
    identity: Identity,
}

/// Allows transactions on what belongs to one identity, or to whom its rules open it.
#[derive(Clone)]
pub struct KeepPermit {
    owner: String,
}

/// Allows being on a workspace.
pub struct EnterPermit(());

/// Allows changing rules.
pub struct RulesPermit(());

/// Allows adding to the audit trail.
pub struct SubmitTrailPermit(());

/// Allows looking into the audit trail, as far as was asked for.
pub struct ReadTrailPermit(());

/// Allows administering.
pub struct AdminPermit(());

impl Gate {
    /// The gate before `store`, with the rules that are kept there. There is one.
    ///
    /// # Errors
    /// [`crate::Kind::Unavailable`] if they cannot be read.
    pub async fn open(store: Store) -> Result<Self, Error> {
        reconcile::reconcile(&store).await?;
        let (rules, version) = store.ledger.read(rows::load).await.map_err(|e: ledger::Error| Error::from(e))?;
        let (rules, revoked) = (Mutex::new((Arc::new(rules), version)), broadcast::Sender::new(REVOKED_MAX));
        Ok(Self(Arc::new(Shared { store, rules, revoked })))
    }

    /// The rules that are in force.
    #[must_use]
    pub fn rules(&self) -> Arc<Rules> {
        lock(&self.0.rules).0.clone()
    }

    /// Tells the ids of API keys as they are revoked. Whoever came in with that one, or missed some, has to ask whether its
    /// own is still good.
    #[must_use]
    pub fn revocations(&self) -> broadcast::Receiver<Arc<str>> {
        self.0.revoked.subscribe()
    }

    pub(crate) fn revoked(&self, key: &str) {
        // Nobody listens, then.
        let _ = self.0.revoked.send(key.into());
    }

    /// The present, for decisions.
    #[must_use]
    pub fn as_of(&self) -> AsOf {
        AsOf { rules: lock(&self.0.rules).1, second: now() }
    }

    /// Decides on current policy, for this one request.
    ///
    /// # Errors
    /// As [`Intent::decide`].
    pub fn authorize<I: Intent>(&self, caller: &Caller, intent: I) -> Result<I::Permit, Error> {
        intent.decide(caller, &self.rules()).inspect_err(|error| {
            tracing::debug!(caller = %caller.identity, code = error.code, reason = %error, "denied");
        })
    }

    /// Queues durable records in their order; the answer says when they are on disk.
    ///
    /// # Errors
    /// As [`log::Log::submit_each`].
    pub async fn submit(&self, batch: Batch) -> Result<SubmittedEach, log::Error> {
        self.0.store.log.submit_each(batch.appends).await
    }

    /// A reader for the lanes of the permit's identity.
    #[must_use]
    pub fn reader(&self, _permit: &AttendPermit) -> Reader {
        self.0.store.log.reader()
    }

    /// Where the log ends now.
    #[must_use]
    pub fn tail(&self, _permit: &AttendPermit) -> Cursor {
        self.0.store.log.tail()
    }

    /// The last record of a topic of the permit's identity, if any is retained.
    pub(crate) async fn last(&self, _permit: &AttendPermit, topic: &Topic) -> Result<Option<Arc<Record>>, log::Error> {
        let status = self.0.store.log.status(topic).await?;
        if status.records == 0 {
            return Ok(None);
        }
        let (mut reader, mut items) = (self.0.store.log.reader(), Vec::new());
        reader.follow_from(topic, Offset(status.tail.0.saturating_sub(1)))?;
        reader.available_batch(1, &mut items).await?;
        Ok(items.into_iter().find_map(|item| match item {
            Item::Record(record) => Some(record),
            _ => None,
        }))
    }

    /// Takes the identity's lease, or refuses because it is taken.
    ///
    /// # Errors
    /// [`lease::Error::Held`].
    pub async fn hold(&self, permit: &AttendPermit, session: &str, note: Vec<u8>) -> Result<Lease, lease::Error> {
        self.0.store.leases.acquire(&permit.identity.to_string(), session, Policy::Reject, note).await
    }

    /// Takes the identity's lease over from a session of the same client.
    ///
    /// # Errors
    /// [`lease::Error::NotHolder`].
    pub async fn take_over(
        &self,
        permit: &AttendPermit,
        from: &str,
        session: &str,
        note: impl Fn(&[u8]) -> Vec<u8> + std::marker::Send + Sync + 'static,
    ) -> Result<Lease, lease::Error> {
        self.0.store.leases.transfer(&permit.identity.to_string(), from, session, move |old| note(old).into()).await
    }

    /// Waits until the outbox rows of this process's finished transactions are in the log; at most a second, because appending to a
    /// log that refuses fails by itself. Rows of other nodes are not waited for.
    pub(crate) async fn outbox_relayed(&self) {
        // Whether it was in time makes no difference.
        let _ = tokio::time::timeout(Duration::from_secs(1), self.0.store.ledger.outbox_relayed()).await;
    }

    /// See [`Store::guard`].
    pub(crate) fn guard(&self, part: &'static str) -> trunkline_store::fault::Guard {
        self.0.store.guard(part)
    }

    /// Whether anybody is attached under an identity, on any node.
    ///
    /// # Errors
    /// [`lease::Error::Unavailable`].
    pub(crate) async fn is_held(&self, identity: &str) -> Result<bool, lease::Error> {
        Ok(!self.0.store.leases.holders(identity).await?.is_empty())
    }

    /// Ends a session of an identity; answers whether there was one.
    ///
    /// # Errors
    /// [`lease::Error::Unavailable`].
    pub(crate) async fn revoke(
        &self,
        _permit: &AdminPermit,
        identity: &Identity,
        session: &str,
    ) -> Result<bool, lease::Error> {
        Ok(self.0.store.leases.revoke(&identity.to_string(), Some(session)).await? > 0)
    }

    /// One write transaction on what belongs to the permit's owner, whose name the closure gets.
    ///
    /// # Errors
    /// As [`ledger::Ledger::write`].
    pub async fn write<T, E>(
        &self,
        permit: &KeepPermit,
        run: impl for<'a> Fn(&'a mut WriteTx, String) -> TxFuture<'a, T, E> + std::marker::Send + Sync + 'static,
    ) -> Result<T, E>
    where
        T: std::marker::Send + 'static,
        E: From<ledger::Error> + std::marker::Send + 'static,
    {
        let owner = permit.owner.clone();
        self.0.store.ledger.write(move |tx| run(tx, owner.clone())).await
    }

    /// As [`Gate::write`], but answers as soon as the transaction has its place in the order of the caller's.
    ///
    /// # Errors
    /// As [`ledger::Ledger::submit`].
    pub(crate) async fn submit_write<T, E>(
        &self,
        permit: &KeepPermit,
        run: impl for<'a> Fn(&'a mut WriteTx, String) -> TxFuture<'a, T, E> + std::marker::Send + Sync + 'static,
    ) -> Result<ledger::Submitted<T, E>, E>
    where
        T: std::marker::Send + 'static,
        E: From<ledger::Error> + std::marker::Send + 'static,
    {
        let owner = permit.owner.clone();
        self.0.store.ledger.submit(move |tx| run(tx, owner.clone())).await
    }

    /// A transaction of the server itself, for nobody.
    pub(crate) async fn housekeep<T, E>(
        &self,
        run: impl for<'a> Fn(&'a mut WriteTx) -> TxFuture<'a, T, E> + std::marker::Send + Sync + 'static,
    ) -> Result<T, E>
    where
        T: std::marker::Send + 'static,
        E: From<ledger::Error> + std::marker::Send + 'static,
    {
        self.0.store.ledger.write(run).await
    }

    /// A transaction that decides for itself what its caller may: on tasks, whose parties are in their rows. Answers as soon
    /// as it has its place in the order of the caller's.
    pub(crate) async fn submit_task<T: std::marker::Send + 'static>(
        &self,
        run: impl for<'a> Fn(&'a mut WriteTx) -> TxFuture<'a, T, Error> + std::marker::Send + Sync + 'static,
    ) -> Result<ledger::Submitted<T, Error>, Error> {
        self.0.store.ledger.submit(run).await
    }

    /// A read transaction on tasks.
    pub(crate) async fn read_tasks<T: std::marker::Send + 'static>(
        &self,
        run: impl for<'a> Fn(&'a mut ReadTx) -> TxFuture<'a, T, Error> + std::marker::Send + Sync + 'static,
    ) -> Result<T, Error> {
        self.0.store.ledger.read(run).await
    }

    /// A read transaction that may look at every task. Look-ups do not wait for it.
    pub(crate) async fn scan_tasks<T: std::marker::Send + 'static>(
        &self,
        run: impl for<'a> Fn(&'a mut ReadTx) -> TxFuture<'a, T, ledger::Error> + std::marker::Send + Sync + 'static,
    ) -> Result<T, Error> {
        Ok(self.0.store.ledger.scan(run).await?)
    }

    /// A read transaction of the server itself, for nobody.
    pub(crate) async fn glance<T: std::marker::Send + 'static>(
        &self,
        run: impl for<'a> Fn(&'a mut ReadTx) -> TxFuture<'a, T, ledger::Error> + std::marker::Send + Sync + 'static,
    ) -> Result<T, Error> {
        Ok(self.0.store.ledger.read(run).await?)
    }

    /// A read transaction for an administrator.
    pub(crate) async fn look<T>(
        &self,
        _permit: &AdminPermit,
        run: impl for<'a> Fn(&'a mut ReadTx) -> TxFuture<'a, T, ledger::Error> + std::marker::Send + Sync + 'static,
    ) -> Result<T, Error>
    where
        T: std::marker::Send + 'static,
    {
        Ok(self.0.store.ledger.read(run).await?)
    }

    /// A reader of one topic for an administrator: from the start of what is retained, or from here on.
    ///
    /// # Errors
    /// [`crate::Kind::Invalid`] if it is no name of a topic.
    pub fn tap(&self, _permit: &AdminPermit, topic: &str, from_start: bool) -> Result<Reader, Error> {
        let (mut reader, topic) = (self.0.store.log.reader(), Topic::new(topic)?);
        if from_start {
            reader.follow_from_start(&topic)?;
        } else {
            reader.follow_from_tail(&topic)?;
        }
        Ok(reader)
    }

    /// How many records of each topic lie behind an offset, as far as `most`; for an administrator.
    pub(crate) async fn unread(
        &self,
        _permit: &AdminPermit,
        wanted: Vec<(Topic, Offset)>,
        most: usize,
    ) -> Result<Vec<u64>, Error> {
        Ok(self.0.store.log.unread(wanted, most).await?)
    }

    /// A write transaction on the audit trail.
    pub(crate) async fn keep_trail<T: std::marker::Send + 'static>(
        &self,
        _permit: &SubmitTrailPermit,
        run: impl for<'a> Fn(&'a mut WriteTx) -> TxFuture<'a, T, Error> + std::marker::Send + Sync + 'static,
    ) -> Result<T, Error> {
        self.0.store.ledger.write(run).await
    }

    /// A read transaction on the audit trail, which may look at all of it.
    pub(crate) async fn read_trail<T: std::marker::Send + 'static>(
        &self,
        _permit: &ReadTrailPermit,
        run: impl for<'a> Fn(&'a mut ReadTx) -> TxFuture<'a, T, ledger::Error> + std::marker::Send + Sync + 'static,
    ) -> Result<T, Error> {
        Ok(self.0.store.ledger.scan(run).await?)
    }

    /// What this server's log is called: the same as long as its data is.
    #[must_use]
    pub fn id(&self) -> String {
        self.0.store.log.tail().epoch.0.to_string()
    }

    /// Records that were ever appended.
    #[must_use]
    pub fn records(&self) -> u64 {
        self.0.store.log.tail().offset.0
    }

    /// Memory that the log holds to write and to read faster.
    #[must_use]
    pub fn log_buffered_bytes(&self) -> u64 {
        self.0.store.log.buffered_bytes()
    }

    /// Notes in the ledger how far the log is, so that the next start sees whether the log was taken back.
    ///
    /// # Errors
    /// [`crate::Kind::Unavailable`].
    pub async fn note_tail(&self) -> Result<(), Error> {
        let (tail, now) = (self.0.store.log.tail(), positions::now());
        let noted = self.housekeep(move |tx| positions::note_tail(tx, tail, now)).await;
        noted.map_err(|e: ledger::Error| Error::from(e))
    }

    /// How often something was read from a position beyond the log's tail.
    #[must_use]
    pub fn positions_clamped(&self) -> u64 {
        self.0.store.log.clamped()
    }

    /// Bytes that can still be written to the file system of the data directory; nothing if it does not say.
    #[must_use]
    pub fn free_bytes(&self) -> Option<u64> {
        self.0.store.free_bytes().ok()
    }

    /// Asks the parts of the store whether they answer and take writes, and how fast.
    pub async fn check(&self) -> Vec<(&'static str, Result<Duration, Error>)> {
        let begun = Instant::now();
        let ledger = self.0.store.ledger.read(sql::ping).await;
        let ledger = ledger.map(|()| begun.elapsed()).map_err(|e: ledger::Error| Error::from(e));
        let begun = Instant::now();
        // A read can succeed for as long as the disk is full.
        let log = async {
            self.0.store.log.check().await?;
            self.0.store.log.status(&Topic::new("health")?).await
        };
        let log = log.await.map(|_| begun.elapsed()).map_err(|e: log::Error| Error::from(e));
        vec![("ledger", ledger), ("log", log)]
    }

    /// Whether a listing may show this key to the caller.
    pub(crate) fn may_see_key(&self, caller: &Caller, key: &str) -> bool {
        policy::may_see_key(caller, key, &self.rules())
    }

    /// Keeps a rule and puts it in force; answers it as it is kept.
    pub(crate) async fn put_rule(&self, _permit: &RulesPermit, rule: Rule) -> Result<Rule, Error> {
        let put = self.0.store.ledger.write(move |tx| rows::put(tx, rule.clone()));
        let (rule, version) = put.await.map_err(|e: ledger::Error| Error::from(e))?;
        self.changed(version, |rules| rules.put(rule.clone())).await?;
        Ok(rule)
    }

    /// Removes a rule; answers whether there was one.
    pub(crate) async fn remove_rule(&self, _permit: &RulesPermit, of: Name, on: Name) -> Result<bool, Error> {
        let (principal, resource) = (of.clone(), on.clone());
        let remove = self.0.store.ledger.write(move |tx| rows::remove(tx, of.clone(), on.clone()));
        let (removed, version) = remove.await.map_err(|e: ledger::Error| Error::from(e))?;
        self.changed(version, |rules| drop(rules.remove(&principal, &resource))).await?;
        Ok(removed)
    }

    /// Keeps a fallback and puts it in force.
    pub(crate) async fn put_fallback(
        &self,
        _permit: &RulesPermit,
        category: String,
        fallback: Fallback,
    ) -> Result<Fallback, Error> {
        let (name, set) = (category.clone(), fallback.clone());
        let put = self.0.store.ledger.write(move |tx| rows::put_fallback(tx, name.clone(), set.clone()));
        let version = put.await.map_err(|e: ledger::Error| Error::from(e))?;
        self.changed(version, |rules| rules.set_fallback(category, fallback.clone())).await?;
        Ok(fallback)
    }

    /// Puts a change in force that made the rules this version. If others came between, all are read again.
    async fn changed(&self, version: i64, change: impl FnOnce(&mut Rules)) -> Result<(), Error> {
        {
            let mut current = lock(&self.0.rules);
            if current.1 + 1 == version {
                change(Arc::make_mut(&mut current.0));
                current.1 = version;
                return Ok(());
            }
        }
        let (rules, version) = self.0.store.ledger.read(rows::load).await.map_err(|e: ledger::Error| Error::from(e))?;
        let mut current = lock(&self.0.rules);
        if current.1 < version {
            *current = (Arc::new(rules), version);
        }
        Ok(())
    }

    /// One read transaction on what belongs to the permit's owner.
    ///
    /// # Errors
    /// As [`ledger::Ledger::read`].
    pub async fn read<T, E>(
        &self,
        permit: &KeepPermit,
        run: impl for<'a> Fn(&'a mut ReadTx, String) -> TxFuture<'a, T, E> + std::marker::Send + Sync + 'static,
    ) -> Result<T, E>
    where
        T: std::marker::Send + 'static,
        E: From<ledger::Error> + std::marker::Send + 'static,
    {
        let owner = permit.owner.clone();
        self.0.store.ledger.read(move |tx| run(tx, owner.clone())).await
    }
}

/// A panic while holding the lock cannot leave half a change: what is shared is replaced whole.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

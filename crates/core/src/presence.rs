//! Who is connected to this node: what administrators see, and where one of several services is picked.

use std::{
    collections::{BTreeMap, HashMap},
    net::IpAddr,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, AtomicUsize, Ordering::SeqCst},
    },
};

use trunkline_store::log::{Offset, Topic};
use uuid::Uuid;

use crate::{
    identity::{Identity, PrincipalKind},
    session::Taken,
    work::WorkGroup,
};

/// The sessions that are attached here, by identity. Clones share them.
#[derive(Clone, Default)]
pub struct Presence {
    entries: Arc<Mutex<BTreeMap<String, Entry>>>,
    /// Messages from sessions that are over, by workspace.
    accepted_before: Arc<Mutex<HashMap<String, u64>>>,
    picks: Arc<AtomicUsize>,
}

struct Entry {
    connection: Arc<Connection>,
    taken: Arc<Taken>,
    meter: Arc<Meter>,
    /// Of the messages that were taken from it, those that count for a workspace that it has left.
    accepted_elsewhere: u64,
    farewell: Option<String>,
}

impl Entry {
    /// Messages that count for the workspace that it is in.
    fn accepted_here(&self) -> u64 {
        self.meter.accepted.load(SeqCst).saturating_sub(self.accepted_elsewhere)
    }
}

/// What a session has to do, and did. Written by whoever serves it, a batch at a time.
#[derive(Default)]
pub struct Meter {
    /// Messages and reports of progress that were taken from it.
    pub accepted: AtomicU64,
    /// Messages and reports of progress that it was given.
    pub delivered: AtomicU64,
    /// Of those, what it has to acknowledge and did not yet.
    pub unacknowledged: AtomicU64,
    /// Everything up to here was read for it.
    pub read: AtomicU64,
    /// When its client said something last, in Unix milliseconds; 0 if it has said nothing since it came.
    pub heard_at_ms: AtomicU64,
    /// Messages that were taken from it, by what they were sent to.
    sent_to: Mutex<HashMap<String, Arc<AtomicU64>>>,
    /// What it reads.
    topics: Mutex<Vec<Read>>,
    /// The work that it shares with others.
    work: Option<Arc<WorkGroup>>,
}

/// A topic that a session reads, and from where.
struct Read {
    topic: Topic,
    from: u64,
    /// While it is behind the others: where it joined them, and how far it was delivered.
    behind: Option<(u64, Arc<Taken>)>,
}

impl Read {
    /// What is behind this is still to come, when everything else was read up to `read`.
    fn position(&self, read: u64) -> Offset {
        Offset(match &self.behind {
            Some((joined_at, taken)) if read <= *joined_at => taken.now().max(self.from),
            _ => read.max(self.from),
        })
    }
}

impl Meter {
    pub(crate) fn new(work: Option<Arc<WorkGroup>>) -> Self {
        Self { work, ..Self::default() }
    }

    /// Counts messages to a target. Beyond [`TARGETS_MAX`] targets they are not counted.
    pub(crate) fn counter(&self, target: &str) -> Arc<AtomicU64> {
        let mut all = lock(&self.sent_to);
        match all.get(target) {
            Some(counter) => counter.clone(),
            None if all.len() >= TARGETS_MAX => Arc::default(),
            None => all.entry(target.to_owned()).or_default().clone(),
        }
    }

    /// Messages that were taken from it, by what they were sent to.
    fn sent_to(&self) -> Vec<(String, u64)> {
        let all = lock(&self.sent_to);
        let mut counts: Vec<_> = all.iter().map(|(target, count)| (target.clone(), count.load(SeqCst))).collect();
        counts.retain(|(_, count)| *count > 0);
        counts.sort();
        counts
    }

    /// All that went either way.
    pub(crate) fn traffic(&self) -> u64 {
        self.accepted.load(SeqCst).saturating_add(self.delivered.load(SeqCst))
    }

    /// Notes that a topic is read, from where, and what tells how far it is while it is behind the others.
    pub(crate) fn reads(&self, topic: &Topic, from: u64, behind: Option<(u64, Arc<Taken>)>) {
        lock(&self.topics).push(Read { topic: topic.clone(), from, behind });
    }

    pub(crate) fn reads_no_more(&self, topics: &[Topic]) {
        lock(&self.topics).retain(|read| !topics.contains(&read.topic));
    }

    /// What is to come: behind each of these, and what came back of shared work.
    pub(crate) fn to_come(&self) -> (Vec<(Topic, Offset)>, u64) {
        let (read, work) = (self.read.load(SeqCst), self.work.as_ref().map(|work| work.waiting()));
        let mut behind: Vec<_> =
            lock(&self.topics).iter().map(|each| (each.topic.clone(), each.position(read))).collect();
        let returned = work.map_or(0, |(shared, returned)| {
            behind.push(shared);
            returned
        });
        (behind, returned)
    }
}

/// One attached session.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Connection {
    /// The session's id.
    pub session: String,
    /// Who it is.
    pub identity: Identity,
    /// The workspace that it acts in.
    pub workspace: Option<String>,
    /// Since when, in Unix milliseconds.
    pub connected_at_ms: u64,
    /// The API key that it came in with, by id.
    pub token: Option<String>,
    /// The task whose token it came in with.
    pub task: Option<Uuid>,
    /// Its place among all that ever held an identity.
    pub fencing_epoch: u64,
    /// How often its client came back to it.
    pub reconnections: u32,
    /// Where its client is, if the transport knows.
    pub address: Option<IpAddr>,
    /// When its client said something last, in Unix milliseconds.
    pub heard_at_ms: u64,
}

impl Entry {
    fn shown(&self) -> Connection {
        let heard_at_ms = self.meter.heard_at_ms.load(SeqCst).max(self.connection.connected_at_ms);
        Connection { heard_at_ms, ..(*self.connection).clone() }
    }
}

/// Targets of one session whose messages are counted.
const TARGETS_MAX: usize = 256;

/// Workspaces whose messages are counted beyond the sessions that sent them.
const WORKSPACES_MAX: usize = 10_000;

/// Which connections; what is `None` fits all.
#[derive(Clone, Debug, Default)]
pub struct Filter {
    /// Of which kind.
    pub kind: Option<PrincipalKind>,
    /// In which workspace.
    pub workspace: Option<String>,
}

impl Presence {
    /// Notes a session, in place of the one before it that it took over.
    pub(crate) fn enter(&self, connection: Connection, taken: Arc<Taken>, meter: Arc<Meter>) {
        let key = connection.identity.to_string();
        let entry = Entry { connection: connection.into(), taken, meter, accepted_elsewhere: 0, farewell: None };
        let former = lock(&self.entries).insert(key, entry);
        if let Some(former) = former {
            self.count_up(&former);
        }
    }

    /// Notes where a session's client is.
    pub(crate) fn came_from(&self, identity: &Identity, address: IpAddr) {
        if let Some(entry) = lock(&self.entries).get_mut(&identity.to_string()) {
            Arc::make_mut(&mut entry.connection).address = Some(address);
        }
    }

    /// Every session, with what it has to do.
    pub(crate) fn meters(&self) -> Vec<(Arc<Connection>, Arc<Meter>)> {
        lock(&self.entries).values().map(|entry| (entry.connection.clone(), entry.meter.clone())).collect()
    }

    /// How far the session that holds the identity now got with delivering.
    pub(crate) fn taken(&self, identity: &Identity) -> Option<Arc<Taken>> {
        Some(self.holder(identity)?.1)
    }

    /// The session that holds the identity here, and how far it got with delivering.
    pub(crate) fn holder(&self, identity: &Identity) -> Option<(Arc<Connection>, Arc<Taken>)> {
        let entries = lock(&self.entries);
        entries.get(&identity.to_string()).map(|entry| (entry.connection.clone(), entry.taken.clone()))
    }

    /// Forgets a session, unless its identity has a successor already.
    pub(crate) fn leave(&self, identity: &Identity, session: &str) {
        let mut entries = lock(&self.entries);
        let key = identity.to_string();
        if entries.get(&key).is_some_and(|entry| entry.connection.session == session)
            && let Some(entry) = entries.remove(&key)
        {
            drop(entries);
            self.count_up(&entry);
        }
    }

    /// What a session sent counts for its workspace when it is over, too.
    fn count_up(&self, entry: &Entry) {
        let Some(workspace) = &entry.connection.workspace else { return };
        let mut all = lock(&self.accepted_before);
        if all.contains_key(workspace) || all.len() < WORKSPACES_MAX {
            *all.entry(workspace.clone()).or_default() += entry.accepted_here();
        }
    }

    /// Messages and reports of progress from sessions in a workspace, since this process started.
    #[must_use]
    pub fn accepted_in(&self, workspace: &str) -> u64 {
        let before = lock(&self.accepted_before).get(workspace).copied().unwrap_or(0);
        let entries = lock(&self.entries);
        let here = entries.values().filter(|entry| entry.connection.workspace.as_deref() == Some(workspace));
        before + here.map(Entry::accepted_here).sum::<u64>()
    }

    /// Messages of each session in a workspace that is there, by what they were sent to: who, to what, how many.
    #[must_use]
    pub fn flow(&self, workspace: &str) -> Vec<(Identity, String, u64)> {
        // Counted without the lock that everybody takes who comes and goes.
        let here = self.meters().into_iter().filter(|(one, _)| one.workspace.as_deref() == Some(workspace));
        let all = here.flat_map(|(connection, meter)| {
            meter.sent_to().into_iter().map(move |(to, count)| (connection.identity.clone(), to, count))
        });
        all.collect()
    }

    /// Notes that a session acts in another workspace now.
    pub(crate) fn moved(&self, identity: &Identity, workspace: Option<String>) {
        if let Some(entry) = lock(&self.entries).get_mut(&identity.to_string()) {
            self.count_up(entry);
            entry.accepted_elsewhere = entry.meter.accepted.load(SeqCst);
            Arc::make_mut(&mut entry.connection).workspace = workspace;
        }
    }

    /// Notes what a session is to be told when it is ended; answers whom it belongs to.
    pub(crate) fn bid_farewell(&self, session: &str, reason: &str) -> Option<Identity> {
        let mut entries = lock(&self.entries);
        let entry = entries.values_mut().find(|entry| entry.connection.session == session)?;
        entry.farewell = Some(reason.to_owned());
        Some(entry.connection.identity.clone())
    }

    /// What the session is to be told now that it is ended.
    #[must_use]
    pub fn farewell(&self, identity: &Identity) -> Option<String> {
        lock(&self.entries).get(&identity.to_string())?.farewell.clone()
    }

    /// The sessions that fit, by identity.
    #[must_use]
    pub fn list(&self, filter: &Filter) -> Vec<Connection> {
        let fits = |connection: &&Arc<Connection>| {
            filter.kind.is_none_or(|kind| connection.identity.kind() == kind)
                && (filter.workspace.is_none() || connection.workspace == filter.workspace)
        };
        let entries = lock(&self.entries);
        entries.values().filter(|entry| fits(&&entry.connection)).map(Entry::shown).collect()
    }

    /// The sessions that came in with an API key.
    pub(crate) fn with_token(&self, token: &str) -> Vec<Connection> {
        let entries = lock(&self.entries);
        let all = entries.values().map(|entry| &entry.connection);
        let fit = all.filter(|connection| connection.token.as_deref() == Some(token));
        fit.map(|connection| (**connection).clone()).collect()
    }

    /// The session with this id.
    #[must_use]
    pub fn get(&self, session: &str) -> Option<Connection> {
        let entries = lock(&self.entries);
        entries.values().find(|entry| entry.connection.session == session).map(Entry::shown)
    }

    /// Whether the principal that rules name so is connected; a user by any window.
    #[must_use]
    pub fn is_connected(&self, kind: PrincipalKind, id: &str) -> bool {
        let entries = lock(&self.entries);
        match kind {
            PrincipalKind::User => {
                let windows = format!("us::{id}::");
                entries.range(windows.clone()..).next().is_some_and(|(key, _)| key.starts_with(&windows))
            }
            _ => entries.contains_key(id),
        }
    }

    /// How many are connected, by kind; kinds of which nobody is are left out.
    #[must_use]
    pub fn counts(&self) -> HashMap<PrincipalKind, usize> {
        let mut counts = HashMap::new();
        for entry in lock(&self.entries).values() {
            *counts.entry(entry.connection.identity.kind()).or_default() += 1;
        }
        counts
    }

    /// How many are connected.
    #[must_use]
    pub fn count(&self) -> usize {
        lock(&self.entries).len()
    }

    /// One of the connected services of an implementation, each in turn.
    pub(crate) fn pick_service(&self, implementation: &str) -> Option<Identity> {
        let entries = lock(&self.entries);
        let prefix = format!("sv::{implementation}::");
        let all: Vec<_> = entries.range(prefix.clone()..).take_while(|(key, _)| key.starts_with(&prefix)).collect();
        let pick = self.picks.fetch_add(1, SeqCst).checked_rem(all.len())?;
        Some(all[pick].1.connection.identity.clone())
    }
}

/// A panic while holding the lock cannot leave half a change: each section is one call of the map.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::{Connection, Filter, Identity, Presence, PrincipalKind};

    fn enter(presence: &Presence, identity: Result<Identity, crate::Error>, session: &str) -> Identity {
        let identity = identity.unwrap();
        let workspace = identity.workspace().map(ToOwned::to_owned);
        let connection = Connection {
            session: session.into(),
            identity: identity.clone(),
            workspace,
            connected_at_ms: 0,
            token: None,
            task: None,
            fencing_epoch: 0,
            reconnections: 0,
            address: None,
            heard_at_ms: 0,
        };
        presence.enter(connection, Default::default(), Default::default());
        identity
    }

    #[test]
    fn services_are_picked_in_turn() {
        let presence = Presence::default();
        assert_eq!(presence.pick_service("s"), None);
        let all = ["a", "b", "c"].map(|name| enter(&presence, Identity::service("s", name), name));
        enter(&presence, Identity::service("s2", "x"), "x");
        let mut picked: Vec<_> = (0..3).map(|_| presence.pick_service("s").unwrap().to_string()).collect();
        picked.sort();
        assert_eq!(picked, all.map(|identity| identity.to_string()));
    }

    #[test]
    fn who_left_late_leaves_the_successor_alone() {
        let presence = Presence::default();
        let agent = enter(&presence, Identity::agent("w", "i", "s"), "first");
        enter(&presence, Identity::agent("w", "i", "s"), "second");
        presence.leave(&agent, "first");
        assert!(presence.get("second").is_some() && presence.get("first").is_none());
        presence.leave(&agent, "second");
        assert_eq!(presence.count(), 0);
    }

    #[test]
    fn users_are_connected_by_any_window() {
        let presence = Presence::default();
        enter(&presence, Identity::user("ann", "w1"), "1");
        enter(&presence, Identity::agent("w", "i", "s"), "2");
        assert!(presence.is_connected(PrincipalKind::User, "ann"));
        assert!(!presence.is_connected(PrincipalKind::User, "an"));
        assert!(presence.is_connected(PrincipalKind::Agent, "ag::w::i::s"));
        let filter = Filter { kind: Some(PrincipalKind::User), workspace: None };
        assert_eq!(presence.list(&filter).len(), 1);
        assert_eq!(presence.list(&Filter { kind: None, workspace: Some("w".into()) }).len(), 1);
    }
}

//! Work for any one of many: the tasks of one implementation compete for what is sent to `tb::{workspace}::{impl}`.
//!
//! All tasks of a group pull from one reader, so that each record goes to exactly one of them, whoever is free first.
//! What a task pulled and did not get rid of goes back to the others. The group's position is the last record before
//! the oldest one that is still out, so that a crash repeats work and loses none. Records that were sent while nobody
//! was there wait for the first to come.

use std::{
    collections::{BTreeMap, HashMap, VecDeque},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering::SeqCst},
    },
};

use tokio::sync::{Notify, OnceCell};
use trunkline_store::log::{Item, Offset, Reader, Record, Topic};

use crate::{
    error::Error,
    gate::{AttendPermit, Gate, KeepPermit},
    identity::Identity,
    session::{load_position, save_position},
    topic::Target,
};

/// The groups that somebody works in. Clones share them.
#[derive(Clone)]
pub struct WorkGroups {
    gate: Gate,
    groups: Arc<Mutex<HashMap<String, Opening>>>,
}

/// A group, or its place while the first to join opens it and the others wait.
type Opening = Arc<OnceCell<Arc<WorkGroup>>>;

/// The tasks of one implementation in one workspace, on this node.
pub struct WorkGroup {
    topic: Topic,
    epoch: String,
    reader: tokio::sync::Mutex<Reader>,
    out: Mutex<Out>,
    returned: Notify,
    /// The position that is durable.
    saved: AtomicU64,
}

#[derive(Default)]
struct Out {
    /// What came back, to be pulled again first.
    returned: VecDeque<Arc<Record>>,
    /// Pulled and neither done nor returned: its offset, and the one that was pulled before it.
    pulled: BTreeMap<u64, u64>,
    last: u64,
}

impl WorkGroups {
    /// Groups behind `gate`.
    #[must_use]
    pub fn new(gate: Gate) -> Self {
        Self { gate, groups: Arc::default() }
    }

    /// The group of a non-unique task; nothing for everybody else.
    pub(crate) async fn join(
        &self,
        identity: &Identity,
        attend: &AttendPermit,
        keep: &KeepPermit,
    ) -> Result<Option<Arc<WorkGroup>>, Error> {
        let Identity::Task(named) = identity else { return Ok(None) };
        let (workspace, implementation) = (named.workspace.clone(), named.implementation.clone());
        let topic = Target::AnyTask { workspace, implementation }.topic()?;
        let cell = {
            let mut groups = lock(&self.groups);
            // Groups that everybody left go, whenever somebody joins one.
            groups
                .retain(|_, cell| Arc::strong_count(cell) > 1 || cell.get().is_some_and(|g| Arc::strong_count(g) > 1));
            groups.entry(topic.to_string()).or_default().clone()
        };
        let open = async || {
            let tail = self.gate.tail(attend);
            let epoch = tail.epoch.0.simple().to_string();
            let from = load_position(&self.gate, keep, topic.as_str(), &epoch).await?.unwrap_or(0);
            let mut reader = self.gate.reader(attend);
            reader.follow_from(&topic, Offset(from))?;
            // As the reader takes it.
            let from = from.min(tail.offset.0);
            let out = Mutex::new(Out { last: from, ..Out::default() });
            let (topic, reader) = (topic.clone(), tokio::sync::Mutex::new(reader));
            let (returned, saved) = (Notify::new(), AtomicU64::new(from));
            Ok::<_, Error>(Arc::new(WorkGroup { topic, epoch, reader, out, returned, saved }))
        };
        cell.get_or_try_init(open).await.cloned().map(Some)
    }
}

impl WorkGroup {
    /// The next record for whoever asks first. Cancel-safe. The record must be given to [`WorkGroup::done`] or
    /// [`WorkGroup::give_back`].
    ///
    /// # Errors
    /// As [`Reader::next`].
    pub async fn pull(&self) -> Result<Arc<Record>, Error> {
        loop {
            if let Some(record) = self.pull_returned() {
                return Ok(record);
            }
            let next = async {
                let mut reader = self.reader.lock().await;
                reader.next().await
            };
            let item = tokio::select! {
                item = next => item?,
                () = self.returned.notified() => continue,
            };
            match item {
                Item::Record(record) => {
                    let mut out = lock(&self.out);
                    let before = std::mem::replace(&mut out.last, record.offset.0);
                    out.pulled.insert(record.offset.0, before);
                    return Ok(record);
                }
                // It was nobody's yet, so there is nobody to tell but the operator.
                Item::Gap(gap) => tracing::warn!(topic = %gap.topic, through = %gap.through, "work was trimmed undone"),
                Item::Transient(_) | Item::End { .. } => {}
            }
        }
    }

    fn pull_returned(&self) -> Option<Arc<Record>> {
        let mut out = lock(&self.out);
        let record = out.returned.pop_front();
        if !out.returned.is_empty() {
            self.returned.notify_one();
        }
        record
    }

    /// The record has arrived.
    pub fn done(&self, offset: Offset) {
        lock(&self.out).pulled.remove(&offset.0);
    }

    /// The record was not delivered: somebody else shall have it.
    pub fn give_back(&self, record: Arc<Record>) {
        lock(&self.out).returned.push_back(record);
        self.returned.notify_one();
    }

    /// Behind what nobody was given anything yet, and how many pieces came back and wait for somebody else.
    pub(crate) fn waiting(&self) -> ((Topic, Offset), u64) {
        let out = lock(&self.out);
        ((self.topic.clone(), Offset(out.last)), out.returned.len() as u64)
    }

    /// The last record before the oldest one that is still out.
    fn position(&self) -> u64 {
        let out = lock(&self.out);
        out.pulled.first_key_value().map_or(out.last, |(_, before)| *before)
    }

    /// Whether something was pulled that is neither done nor back.
    #[must_use]
    pub fn is_out(&self) -> bool {
        !lock(&self.out).pulled.is_empty()
    }

    /// Whether it got further since its position was made durable.
    pub(crate) fn has_news(&self) -> bool {
        self.position() != self.saved.load(SeqCst)
    }

    /// Makes the group's position durable; does nothing if that has not changed.
    pub(crate) async fn save(&self, gate: &Gate, keep: &KeepPermit) -> Result<(), Error> {
        let position = self.position();
        if position != self.saved.load(SeqCst) {
            save_position(gate, keep, self.topic.as_str(), &self.epoch, position).await?;
            // Members save at the same time, and positions only move forward.
            self.saved.fetch_max(position, SeqCst);
        }
        Ok(())
    }
}

/// A panic while holding the lock cannot leave half a change: each section is a few moves.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

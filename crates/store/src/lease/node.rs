//! Leases of one node among several that share a ledger.
//!
//! A lease is a row that names its node; a node is a row with a counter, its heartbeat. No clock is compared with
//! another machine's: a node is dead for its observer when the counter stood still for [`Options::ttl`] of the
//! *observer's* clock, and it fences itself when its own last renewal *began* three quarters of that ago. What the one
//! saw last was renewed before it saw it, so the node stops first.
//!
//! Who ends another node's lease leaves a row that says why; each node looks for its own such rows.

mod heartbeat;
mod sql;

use std::{
    collections::HashMap,
    sync::{Arc, Mutex},
    time::Duration,
};

use tokio::{
    sync::{Notify, oneshot, watch},
    time::Instant,
};
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use uuid::Uuid;

use super::{Decide, Error, Holder, Lease, Loss, Release, lock};
use crate::ledger::Ledger;

pub(crate) use sql::MIGRATIONS;

/// How a node takes part.
#[derive(Clone, Copy, Debug)]
pub struct Options {
    /// How long a node's heartbeat may stand still before the others take its leases for free. It is renewed four times
    /// in that time.
    pub ttl: Duration,
    /// How often a node looks whether others ended leases of its own.
    pub losses_poll: Duration,
}

impl Default for Options {
    fn default() -> Self {
        Self { ttl: Duration::from_secs(10), losses_poll: Duration::from_millis(50) }
    }
}

pub(super) struct Node {
    ledger: Ledger,
    options: Options,
    state: Mutex<State>,
    /// There is something to release.
    wake: Notify,
    leaving: CancellationToken,
    tasks: TaskTracker,
}

#[derive(Default)]
struct State {
    /// Nothing while the node is fenced.
    member: Option<Member>,
    /// By lease id; asked-for ones included, so that no loss can come too early.
    held: HashMap<String, watch::Sender<Option<Loss>>>,
    /// Lease ids by key: given back here, and still rows in the ledger.
    released: HashMap<String, Vec<String>>,
}

#[derive(Clone)]
struct Member {
    name: String,
    /// From here on the node is fenced, unless it renews.
    until: Instant,
}

impl Node {
    pub(super) async fn join(ledger: Ledger, options: Options) -> Result<Arc<Self>, Error> {
        let node = Arc::new(Self {
            ledger,
            options,
            state: Mutex::default(),
            wake: Notify::new(),
            leaving: CancellationToken::new(),
            tasks: TaskTracker::new(),
        });
        let name = heartbeat::join(&node, None).await?;
        // Ends with `leave`. It has no other way to fail than by fencing the node, which it then tries to undo.
        node.tasks.spawn(heartbeat::run(node.clone(), name));
        Ok(node)
    }

    pub(super) async fn grant(self: &Arc<Self>, key: &str, session: &str, decide: Decide) -> Result<Lease, Error> {
        let (node, key, session) = (self.clone(), key.to_owned(), session.to_owned());
        let (answer, answered) = oneshot::channel();
        self.tasks.spawn(async move {
            // Whoever asked may have gone: then the lease is dropped here, and with that released.
            let _ = answer.send(node.insert(key, session, decide).await);
        });
        answered.await.map_err(|_| fenced())?
    }

    async fn insert(self: Arc<Self>, key: String, session: String, decide: Decide) -> Result<Lease, Error> {
        let id = Uuid::new_v4().simple().to_string();
        let (asked, lost) = self.ask(&key, &id)?;
        let wanted =
            sql::Wanted { id: id.clone(), key: key.clone(), session, node: asked.name, released: asked.released };
        match sql::insert(&self.ledger, wanted, decide).await {
            Ok((holder, ended)) => {
                self.tell(&ended);
                Ok(Lease { key, holder, loss: lost, release: Release::Node { node: self, id } })
            }
            Err(error) => {
                if matches!(error, Error::Unavailable { .. }) {
                    // It may be there all the same.
                    self.release(&key, &id);
                }
                lock(&self.state).held.remove(&id);
                Err(error)
            }
        }
    }

    fn ask(&self, key: &str, id: &str) -> Result<(Asked, watch::Receiver<Option<Loss>>), Error> {
        let mut state = lock(&self.state);
        let name = state.member.as_ref().ok_or_else(fenced)?.name.clone();
        let released = state.released.get(key).cloned().unwrap_or_default();
        let (loss, lost) = watch::channel(None);
        state.held.insert(id.to_owned(), loss);
        Ok((Asked { name, released }, lost))
    }

    pub(super) async fn revoke(&self, key: &str, session: Option<&str>) -> Result<usize, Error> {
        let released = lock(&self.state).released.get(key).cloned().unwrap_or_default();
        let ended = sql::revoke(&self.ledger, key.to_owned(), session.map(ToOwned::to_owned), released).await?;
        self.tell(&ended);
        Ok(ended.len())
    }

    pub(super) async fn holders(&self, key: &str) -> Result<Vec<Holder>, Error> {
        // Before looking: what leaves the ledger meanwhile may have been read, and is not released here any more.
        let released = lock(&self.state).released.get(key).cloned().unwrap_or_default();
        let rows = sql::holders(&self.ledger, key.to_owned()).await?;
        Ok(rows.into_iter().filter(|row| !released.contains(&row.id)).map(|row| row.holder).collect())
    }

    /// Gives a lease back; does nothing if it was lost.
    pub(super) fn release(&self, key: &str, id: &str) {
        let mut state = lock(&self.state);
        if state.held.remove(id).is_some() {
            state.released.entry(key.to_owned()).or_default().push(id.to_owned());
            self.wake.notify_one();
        }
    }

    pub(super) fn is_live(&self) -> bool {
        lock(&self.state).member.as_ref().is_some_and(|member| Instant::now() < member.until)
    }

    pub(super) async fn leave(&self) {
        self.leaving.cancel();
        self.tasks.close();
        self.tasks.wait().await;
    }

    /// Tells those of this node that lost.
    fn tell(&self, ended: &[sql::Ended]) {
        let mut state = lock(&self.state);
        for ended in ended {
            if let Some(loss) = state.held.remove(&ended.id) {
                loss.send_replace(Some(ended.why));
            }
        }
    }
}

struct Asked {
    name: String,
    released: Vec<String>,
}

fn fenced() -> Error {
    Error::Unavailable { reason: "this node is fenced: it could not renew its heartbeat, or has left".into() }
}

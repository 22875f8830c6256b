//! The list of sandboxes, for those who watch it: as it is, and then what becomes of each.

use std::collections::{HashMap, VecDeque};

use trunkline_store::log::{Item, Reader};

use super::{
    Sandbox, Sandboxes,
    life::{Notice, What},
    state::Status,
};
use crate::{
    caller::Caller,
    error::{Error, Kind},
};

/// Somebody who watches the list.
pub struct Roll {
    sandboxes: Sandboxes,
    caller: Caller,
    project: Option<String>,
    reader: Reader,
    /// What each is known by: changes reach the log a moment after the rows that were read.
    versions: HashMap<String, i64>,
    pending: VecDeque<News>,
}

/// What became of a sandbox.
#[derive(Clone, Debug, PartialEq)]
pub enum News {
    /// It is there.
    Snapshot(Sandbox),
    /// The end of the snapshots, with their number: a sandbox that a viewer knew before and that is in none of them was removed.
    SnapshotEnd(usize),
    /// It came.
    Created(Sandbox),
    /// It changed.
    Updated {
        /// Which one.
        id: String,
        /// What it is now, if that is another status.
        status: Option<Status>,
        /// What it is about now, if that is something else.
        summary: Option<String>,
    },
    /// It is gone.
    Removed {
        /// Which one.
        id: String,
    },
}

impl Sandboxes {
    /// The list of sandboxes that the caller may watch, or those of a project.
    ///
    /// # Errors
    /// [`Kind::Unavailable`].
    pub async fn roll(&self, caller: &Caller, project: Option<&str>) -> Result<Roll, Error> {
        // From before the rows are read, so that nothing falls in between.
        let reader = self.0.gate.follow_sandboxes()?;
        let (mut versions, mut pending) = (HashMap::new(), VecDeque::new());
        for standing in self.all(project).await? {
            let sandbox = self.shown(standing.sandbox);
            if self.may_watch(caller, &sandbox.id, sandbox.project.as_deref()) {
                versions.insert(sandbox.id.clone(), standing.version);
                pending.push_back(News::Snapshot(sandbox));
            }
        }
        pending.push_back(News::SnapshotEnd(pending.len()));
        let (sandboxes, caller, project) = (self.clone(), caller.clone(), project.map(ToOwned::to_owned));
        Ok(Roll { sandboxes, caller, project, reader, versions, pending })
    }
}

impl Roll {
    /// What comes next, and whatever else is there by now; waits for it. Cancel-safe.
    ///
    /// # Errors
    /// [`Kind::Unavailable`]: whoever comes back is told everything again.
    pub async fn next(&mut self) -> Result<Vec<News>, Error> {
        let mut items = Vec::new();
        while self.pending.is_empty() {
            self.reader.next_batch(256, &mut items).await?;
            for item in items.drain(..) {
                match item {
                    Item::Record(record) => self.hear(&record.payload),
                    Item::Gap(_) => {
                        let why = "what became of sandboxes is not kept for so long";
                        return Err(Error::new(Kind::Unavailable, "ERR_HISTORY_TRIMMED", why));
                    }
                    Item::Transient(_) | Item::End { .. } => {}
                }
            }
        }
        Ok(self.pending.drain(..).collect())
    }

    fn hear(&mut self, payload: &[u8]) {
        let Ok(notice) = serde_json::from_slice::<Notice>(payload) else {
            return tracing::error!("a record of sandboxes cannot be read");
        };
        let Notice { id, project, version, what } = notice;
        if self.project.is_some() && self.project != project {
            return;
        }
        if !self.sandboxes.may_watch(&self.caller, &id, project.as_deref()) {
            return;
        }
        if self.versions.get(&id).is_some_and(|known| *known >= version) {
            return;
        }
        let is_known = self.versions.contains_key(&id);
        let news = match what {
            What::Created(sandbox) => News::Created(sandbox),
            // It was removed before the rows were read.
            What::Updated { .. } | What::Removed if !is_known => return,
            What::Updated { status, summary } => News::Updated { id: id.clone(), status, summary },
            What::Removed => News::Removed { id: id.clone() },
        };
        match news {
            News::Removed { .. } => drop(self.versions.remove(&id)),
            _ => drop(self.versions.insert(id, version)),
        }
        self.pending.push_back(news);
    }
}

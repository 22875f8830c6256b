//! Checkpoints of a sandbox's artifacts: a cache, written and read in small pieces, because every transaction holds up all
//! others for as long as it takes.
//!
//! A piece is a few artifacts, each in the version that it has after one of the events. The mark comes last: it says after how
//! many events the checkpoint is, and of each artifact the last version up to there counts. Older versions are removed after
//! that, so that a checkpoint that ends early changes nothing.

use std::sync::Arc;

use trunkline_store::log::{Cursor, Offset, Reader};

use super::{
    artifacts::{Artifact, Fold, Kept},
    sql,
};
use crate::{error::Error, gate::Gate};

/// JSON of artifacts in one transaction, besides the last artifact: a few milliseconds of the ledger's writer.
const PIECE_BYTES: usize = 256 * 1024;

/// Reads of a checkpoint that another one replaced meanwhile, before everything is folded from the beginning.
const ATTEMPTS_MAX: usize = 5;

/// A fold, and where it stands.
pub(super) struct Restored {
    pub(super) fold: Fold,
    pub(super) reader: Reader,
    /// Bytes of events that are in it.
    pub(super) told: u64,
}

/// The fold of a sandbox as of its last checkpoint, and a reader of what came after. `since` is where the sandbox began.
pub(super) async fn restore(gate: &Gate, id: &str, since: i64) -> Result<Restored, Error> {
    let mut is_bad = false;
    for _ in 0..ATTEMPTS_MAX {
        let Some(mark) = mark(gate, id).await? else { break };
        // Should it be replaced while it is read, it is read again; otherwise this is what becomes of it.
        is_bad = true;
        // One of another log, or of a former sandbox of that id, is none.
        if mark.epoch != gate.id() || mark.folded_to < since {
            break;
        }
        let rest = serde_json::from_str(&mark.rest).map(|rest| Fold::restore(Vec::new(), rest));
        let kept = match &rest {
            Ok(fold) => read(gate, id, fold.events()).await?,
            Err(_) => None,
        };
        if self::mark(gate, id).await?.as_ref() != Some(&mark) {
            continue;
        }
        // Those of before the number was kept have none.
        let is_whole = |kept: &Vec<Kept>| mark.told == 0 || kept.len() as u64 == mark.artifacts.unsigned_abs();
        let (Ok(fold), Some(kept)) = (rest, kept.filter(is_whole)) else {
            tracing::warn!(sandbox = id, "its checkpoint cannot be read; folded from the beginning");
            break;
        };
        let reader = gate.follow_sandbox(id, Offset(mark.folded_to.unsigned_abs()))?;
        let fold = Fold::restore(kept, fold.rest().clone());
        return Ok(Restored { fold, reader, told: mark.told.unsigned_abs() });
    }
    if is_bad {
        forget(gate, id).await?;
    }
    let reader = gate.follow_sandbox(id, Offset(since.unsigned_abs()))?;
    Ok(Restored { fold: Fold::default(), reader, told: 0 })
}

pub(super) async fn mark(gate: &Gate, id: &str) -> Result<Option<sql::Mark>, Error> {
    let id = id.to_owned();
    gate.glance(move |tx| sql::mark(tx, id.clone())).await
}

/// The artifacts after so many events; nothing if one cannot be read.
async fn read(gate: &Gate, id: &str, events: u64) -> Result<Option<Vec<Kept>>, Error> {
    let mut all: Vec<Kept> = Vec::new();
    let mut after = (0, 0);
    loop {
        let (id, from) = (id.to_owned(), after);
        let page = gate.glance(move |tx| sql::artifacts(tx, id.clone(), from)).await?;
        let Some(last) = page.last() else {
            // Numbers have no holes, so a missing one shows.
            let is_whole = all.iter().enumerate().all(|(at, kept)| kept.artifact.seq == at as u64 + 1);
            return Ok(is_whole.then_some(all));
        };
        after = (last.seq, last.changed_by);
        for row in page {
            let changed_by = row.changed_by.unsigned_abs();
            if changed_by > events {
                continue;
            }
            let Ok(artifact) = Artifact::parse(&row.body) else { return Ok(None) };
            let kept = Kept { artifact: artifact.into(), created_by: row.created_by.unsigned_abs(), changed_by };
            match all.last_mut().filter(|last| last.artifact.seq == kept.artifact.seq) {
                // Of several versions, the last one counts.
                Some(last) => *last = kept,
                None => all.push(kept),
            }
        }
    }
}

/// Removes the checkpoint of a sandbox: its mark last, so that what is left of it, should this end early, is still known for what
/// it is.
pub(super) async fn forget(gate: &Gate, id: &str) -> Result<(), Error> {
    loop {
        let name = id.to_owned();
        if !gate.housekeep(move |tx| sql::remove_artifacts(tx, name.clone())).await? {
            break;
        }
    }
    let name = id.to_owned();
    Ok(gate.housekeep(move |tx| sql::remove_mark(tx, name.clone())).await?)
}

/// What a checkpoint is of.
pub(super) struct Of {
    pub(super) id: String,
    /// Where the sandbox began: a later one of that id is another.
    pub(super) since: i64,
    pub(super) cursor: Cursor,
    /// Bytes of events that are in the fold.
    pub(super) told: u64,
}

/// A checkpoint that is to be written.
pub(super) struct Checkpoint {
    of: Of,
    mark: sql::Mark,
    changed: Vec<Kept>,
}

impl Checkpoint {
    /// What changed in a fold after so many events.
    pub(super) fn of(fold: &Fold, kept_to: u64, of: Of) -> Result<Self, Error> {
        let number = |number: u64| i64::try_from(number).unwrap_or(i64::MAX);
        let mark = sql::Mark {
            epoch: of.cursor.epoch.0.to_string(),
            folded_to: number(of.cursor.offset.0),
            rest: sql::json(fold.rest())?,
            bytes: number(fold.bytes() as u64),
            artifacts: number(fold.artifacts().len() as u64),
            told: number(of.told),
        };
        Ok(Self { of, mark, changed: fold.changed_since(kept_to).collect() })
    }

    /// Whether it is one piece.
    pub(super) fn is_small(&self) -> bool {
        self.changed.iter().map(|kept| kept.artifact.bytes()).sum::<usize>() <= PIECE_BYTES
    }

    /// Writes it, a piece at a time; nothing if the sandbox is gone.
    pub(super) async fn write(self, gate: &Gate) -> Result<(), Error> {
        let is_small = self.is_small();
        let Self { of: Of { id, since, .. }, mark, changed } = self;
        let mut written: Vec<Vec<(u64, u64)>> = Vec::new();
        let mut changed = changed.into_iter();
        while changed.len() > 0 {
            let (mut piece, mut bytes) = (Vec::new(), 0);
            while (is_small || bytes < PIECE_BYTES)
                && let Some(kept) = changed.next()
            {
                let folded = sql::Folded::new(&kept)?;
                bytes += folded.bytes();
                piece.push(folded);
            }
            let versions: Vec<_> = piece.iter().map(sql::Folded::version).collect();
            let (name, piece): (_, Arc<[_]>) = (id.clone(), piece.into());
            if is_small {
                let write = gate.housekeep(move |tx| {
                    sql::put_checkpoint(tx, name.clone(), since, piece.clone(), mark.clone(), versions.clone())
                });
                return Ok(write.await?);
            }
            written.push(versions);
            gate.housekeep(move |tx| sql::put_artifacts(tx, name.clone(), since, piece.clone())).await?;
        }
        let name = id.clone();
        if !gate.housekeep(move |tx| sql::put_mark(tx, name.clone(), since, mark.clone())).await? {
            return Ok(());
        }
        for versions in written {
            let name = id.clone();
            gate.housekeep(move |tx| sql::remove_older(tx, name.clone(), versions.clone())).await?;
        }
        Ok(())
    }
}

//! What is kept of principals that do not come back.

use std::time::Duration;

use trunkline_store::{ledger, log::Clock};

use super::sql;
use crate::{checkpoint, error::Error, gate::Gate};

/// Owners that are looked at in one step, by a reader of the ledger: some milliseconds.
const LOOK: i64 = 10_000;

/// Owners whose rows go in one transaction.
const STEP: usize = 100;

/// Forgets principals that have not been there for a long time: where they stopped reading, and the checkpoints of tasks under
/// assigned ids, which nobody can come back for. Whoever comes back later is new: its own lane begins with all that is
/// retained, the others at the tail.
pub struct Absentees {
    gate: Gate,
    away: Duration,
    /// The last owner of positions that was looked at, and of checkpoints.
    after: [String; 2],
    /// No position is without a time any more.
    is_dated: bool,
}

impl Absentees {
    /// Those that were away for at least `away`. Let it be longer than records of lanes are kept, or they come again.
    #[must_use]
    pub fn new(gate: Gate, away: Duration) -> Self {
        Self { gate, away, after: Default::default(), is_dated: false }
    }

    /// Looks at the next 10,000 principals, and after the last at the first again; answers how many were forgotten. None in the
    /// first minutes of the process: its clock may be wrong, and whoever was attached to the last one is on the way.
    ///
    /// # Errors
    /// [`crate::Kind::Unavailable`]; the next call goes on.
    pub async fn sweep(&mut self) -> Result<usize, Error> {
        if Clock::system().is_settled() { self.sweep_at(sql::now()).await } else { Ok(0) }
    }

    async fn sweep_at(&mut self, now: i64) -> Result<usize, Error> {
        let before = now.saturating_sub(i64::try_from(self.away.as_secs()).unwrap_or(i64::MAX));
        if !self.is_dated {
            let dated: Result<u64, ledger::Error> = self.gate.housekeep(move |tx| sql::date(tx, now, LOOK)).await;
            self.is_dated = dated? == 0;
        }
        Ok(self.sweep_positions(now, before).await? + self.sweep_checkpoints(before).await?)
    }

    async fn sweep_positions(&mut self, now: i64, before: i64) -> Result<usize, Error> {
        let [after, _] = self.after.clone();
        let (absent, last) = older(self.gate.glance(move |tx| sql::last_saves(tx, after.clone(), LOOK)).await?, before);
        let mut forgotten = 0;
        for owners in absent.chunks(STEP) {
            let (mut here, mut gone) = (Vec::new(), Vec::new());
            for owner in owners {
                let is_here = self.gate.is_held(owner).await?;
                if is_here { &mut here } else { &mut gone }.push(owner.clone());
            }
            forgotten += gone.len();
            self.gate.housekeep(move |tx| sql::settle(tx, here.clone(), gone.clone(), now, before)).await?;
        }
        self.after[0] = last.unwrap_or_default();
        Ok(forgotten)
    }

    async fn sweep_checkpoints(&mut self, before: i64) -> Result<usize, Error> {
        let [_, after] = self.after.clone();
        let saves = self.gate.glance(move |tx| checkpoint::last_saves(tx, after.clone(), LOOK)).await?;
        let (absent, last) = older(saves, before);
        let mut forgotten = 0;
        for owner in absent {
            if !self.gate.is_held(&owner).await? {
                checkpoint::forget(&self.gate, owner).await?;
                forgotten += 1;
            }
        }
        self.after[1] = last.unwrap_or_default();
        Ok(forgotten)
    }
}

/// The owners of one step whose last save was before `before`; and its last owner, if there may be more behind it.
fn older(saves: Vec<(String, i64)>, before: i64) -> (Vec<String>, Option<String>) {
    let is_full = saves.len() as i64 == LOOK;
    let last = saves.last().filter(|_| is_full).map(|(owner, _)| owner.clone());
    (saves.into_iter().filter(|(_, at)| *at < before).map(|(owner, _)| owner).collect(), last)
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "test code")]
mod tests {
    use trunkline_store::{Options, Store};

    use super::*;
    use crate::{
        caller::Credential,
        identity::Identity,
        limits::Limits,
        session::{self, Session, Sessions},
    };

    const AWAY: Duration = Duration::from_secs(1000);

    struct Node {
        _dir: tempfile::TempDir,
        store: Store,
        sessions: Sessions,
        absentees: Absentees,
    }

    impl Node {
        async fn new() -> Self {
            let dir = tempfile::tempdir().unwrap();
            let options = Options { migrations: crate::migrations(), ..Default::default() };
            let store = Store::open(dir.path(), options).unwrap();
            let gate = Gate::open(store.clone()).await.unwrap();
            let sessions = Sessions::new(gate.clone(), session::Options::default());
            Self { _dir: dir, store, sessions, absentees: Absentees::new(gate, AWAY) }
        }

        async fn attach(&self, identity: Identity) -> Session {
            self.sessions.attach(identity, Credential::none(true), "").await.unwrap()
        }

        /// Who is known, after a sweep so many seconds from now.
        async fn known_after(&mut self, seconds: i64) -> (usize, Vec<String>) {
            let forgotten = self.absentees.sweep_at(sql::now() + seconds).await.unwrap();
            let mut known = self.sessions.gate().glance(sql::owners).await.unwrap();
            known.extend(self.sessions.gate().glance(checkpoint::owners).await.unwrap());
            known.retain(|owner| owner != sql::LOG.0);
            (forgotten, known)
        }
    }

    #[tokio::test]
    async fn who_does_not_come_back_is_forgotten_and_who_is_there_is_not() {
        let mut node = Node::new().await;
        let stays = node.attach(Identity::agent("w", "stays", "1").unwrap()).await;
        drop(node.attach(Identity::user("goes", "1").unwrap()).await);
        let task = node.attach(Identity::task("w", "goes").unwrap()).await;
        let gate = node.sessions.gate().clone();
        checkpoint::save(&gate, &task.caller, "k", vec![1], 0, &Limits::default()).await.unwrap();
        let (here, left, task_id) =
            ("ag::w::stays::1".to_owned(), "us::goes::1".to_owned(), task.caller.identity.to_string());
        assert_eq!(node.known_after(990).await, (0, vec![here.clone(), left, task_id.clone()]));
        assert_eq!(node.known_after(1010).await, (1, vec![here.clone(), task_id]), "the task is there");
        drop(task);
        assert_eq!(node.known_after(1010).await, (1, vec![here.clone()]));
        drop(stays);
        // It was seen by the last sweeps.
        assert_eq!(node.known_after(2000).await, (0, vec![here]));
        assert_eq!(node.known_after(2020).await, (1, Vec::new()));
        node.store.stop().await;
    }

    #[tokio::test]
    async fn who_comes_back_late_is_dated_before_it_is_there() {
        let mut node = Node::new().await;
        let user = || Identity::user("late", "1").unwrap();
        drop(node.attach(user()).await);
        node.store.ledger.write(|tx| sql::age(tx, 2 * 24 * 60 * 60)).await.unwrap();
        // Although nothing was delivered.
        drop(node.attach(user()).await);
        assert_eq!(node.known_after(0).await, (0, vec!["us::late::1".to_owned()]));
        node.store.stop().await;
    }
}

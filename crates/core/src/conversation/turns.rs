//! Turns that wait for an agent: whose agent goes away, or takes too long, is told to its user.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use uuid::Uuid;

use super::{
    Conversations, Row,
    desk::{Desk, What},
    sql,
    state::{Act, Reason},
};
use crate::identity::{Identity, PrincipalKind};

/// How often it is looked at what has taken too long, while there is anything.
const PAUSE: Duration = Duration::from_millis(500);

/// The turns that are open, by agent.
#[derive(Default)]
pub(super) struct Turns(Mutex<HashMap<String, Waiting>>);

/// What waits for one agent.
#[derive(Default)]
struct Waiting {
    /// It was there in the meantime.
    was_there: bool,
    /// Since when it is away, having been there.
    left: Option<Instant>,
    /// When each turn began, or else when the agent came; and which one it is of its conversation.
    turns: HashMap<Uuid, (Instant, u64)>,
}

/// How long an agent may take.
#[derive(Clone, Copy)]
struct Patience {
    away: Duration,
    turn: Option<Duration>,
}

impl Waiting {
    /// What has come to an end, by what is so now. Pure but for what it remembers.
    fn look(&mut self, is_there: bool, now: Instant, patience: Patience) -> Vec<(Uuid, u64, Reason)> {
        if is_there {
            if !self.was_there {
                // What had waited for it begins now.
                self.turns.values_mut().for_each(|(begun, _)| *begun = now);
            }
            (self.was_there, self.left) = (true, None);
            let Some(most) = patience.turn else { return Vec::new() };
            let late = self.turns.extract_if(|_, (begun, _)| now.saturating_duration_since(*begun) >= most);
            return late.map(|(id, (_, turn))| (id, turn, Reason::TemporaryFailure)).collect();
        }
        if !self.was_there {
            return Vec::new();
        }
        let left = *self.left.get_or_insert(now);
        if now.saturating_duration_since(left) < patience.away {
            return Vec::new();
        }
        self.turns.drain().map(|(id, (_, turn))| (id, turn, Reason::Unavailable)).collect()
    }
}

impl Turns {
    fn all(&self) -> MutexGuard<'_, HashMap<String, Waiting>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Conversations {
    /// A user said something.
    pub(super) fn turn_begun(&self, row: &Row, turn: u64) {
        let Some((_, agent)) = self.apps().agent(&row.app, row.agent) else { return };
        {
            let mut all = self.0.turns.all();
            let waiting = all.entry(agent.identity.clone()).or_default();
            waiting.turns.insert(row.id, (Instant::now(), turn));
            waiting.was_there |= self.is_there(&agent.identity);
        }
        if let Ok(Identity::Agent(named)) = Identity::parse(&agent.identity)
            && let Ok(by) = crate::caller::Caller::app_user(&row.app, &row.user, row.id)
        {
            self.0.tasks.wake_up(&agent.identity, &named.implementation, &by);
        }
    }

    pub(super) fn turn_ended(&self, row: &Row) {
        let mut all = self.0.turns.all();
        all.retain(|_, waiting| {
            waiting.turns.remove(&row.id);
            !waiting.turns.is_empty()
        });
    }

    fn is_there(&self, agent: &str) -> bool {
        self.0.sessions.presence().is_connected(PrincipalKind::Agent, agent)
    }

    /// Ends turns whose agents went away or take too long, until the server stops.
    pub async fn run(self) {
        let options = self.options();
        let turn = (options.turn_seconds > 0).then(|| Duration::from_secs(options.turn_seconds));
        let patience = Patience { away: Duration::from_secs(options.agent_grace_seconds), turn };
        let mut looks = tokio::time::interval(PAUSE);
        let mut kept = self.find_turns().await;
        while self.stop().run_until_cancelled(looks.tick()).await.is_some() {
            let over: Vec<_> = {
                let mut all = self.0.turns.all();
                let over = all
                    .iter_mut()
                    .flat_map(|(agent, waiting)| waiting.look(self.is_there(agent), Instant::now(), patience))
                    .collect();
                all.retain(|_, waiting| !waiting.turns.is_empty());
                over
            };
            // Together: one does not wait for the other's disk.
            let ends = over.into_iter().map(async |(id, turn, reason)| {
                if let Err(error) = self.end_turn(id, turn, reason).await {
                    tracing::warn!(%error, conversation = %id, "its user does not hear that its agent is away");
                }
            });
            futures_util::future::join_all(ends).await;
            if let Err(error) = self.keep_turns(&mut kept).await {
                tracing::warn!(%error, "open turns are not kept; the next look tries again");
            }
        }
    }

    async fn end_turn(&self, id: Uuid, turn: u64, reason: Reason) -> Result<(), crate::Error> {
        let Some(desk): Option<Arc<Desk>> = self.look_up(id).await? else { return Ok(()) };
        desk.run(self, What::Act(Act::EndTurn(reason, Some(turn)))).await
    }

    /// Turns that were open when the server ended. Their agents had been there, as far as is known: whoever does not come back
    /// is missed.
    async fn find_turns(&self) -> HashMap<Uuid, (String, u64)> {
        let found = self.gate().glance(sql::open_turns).await;
        let found: HashMap<_, _> = found.unwrap_or_else(|error| {
            tracing::warn!(%error, "turns that were open before are not looked after");
            HashMap::new()
        });
        let mut all = self.0.turns.all();
        for (id, (agent, turn)) in &found {
            let waiting = all.entry(agent.clone()).or_default();
            waiting.was_there = true;
            waiting.turns.entry(*id).or_insert((Instant::now(), *turn));
        }
        found
    }

    /// Keeps which turns are open now, as far as that changed.
    async fn keep_turns(&self, kept: &mut HashMap<Uuid, (String, u64)>) -> Result<(), crate::Error> {
        let now: HashMap<Uuid, (String, u64)> = {
            let all = self.0.turns.all();
            let of = |(agent, waiting): (&String, &Waiting)| {
                // Whoever never came is waited for.
                let turns = waiting.turns.iter().filter(|_| waiting.was_there);
                turns.map(|(id, (_, turn))| (*id, (agent.clone(), *turn))).collect::<Vec<_>>()
            };
            all.iter().flat_map(of).collect()
        };
        let ended: Vec<_> = kept.keys().filter(|id| !now.contains_key(id)).copied().collect();
        let begun = now.iter().filter(|(id, turn)| kept.get(id) != Some(turn));
        let begun: Vec<_> = begun.map(|(id, (agent, turn))| (*id, agent.clone(), *turn)).collect();
        if !ended.is_empty() || !begun.is_empty() {
            self.gate().housekeep(move |tx| sql::keep_turns(tx, ended.clone(), begun.clone())).await?;
            *kept = now;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::{Duration, Instant, Patience, Reason, Uuid, Waiting};

    #[test]
    fn turns_end_when_their_agent_is_gone_or_late() {
        let (start, id) = (Instant::now(), Uuid::now_v7());
        let at = |seconds| start + Duration::from_secs(seconds);
        let patience = Patience { away: Duration::from_secs(5), turn: Some(Duration::from_secs(60)) };
        let begun = || Waiting { turns: [(id, (start, 7))].into(), ..Waiting::default() };
        // Whoever never came may come.
        let mut waiting = begun();
        assert_eq!(waiting.look(false, at(1000), patience), []);
        // When it comes, it has its time.
        assert_eq!(waiting.look(true, at(1001), patience), []);
        assert_eq!(waiting.look(true, at(1060), patience), []);
        assert_eq!(waiting.look(true, at(1061), patience), [(id, 7, Reason::TemporaryFailure)]);
        assert_eq!(waiting.look(true, at(1062), patience), []);
        // Whoever was there may be away for a moment, and no longer.
        let mut waiting = begun();
        assert_eq!(waiting.look(true, at(1), patience), []);
        assert_eq!(waiting.look(false, at(2), patience), []);
        assert_eq!(waiting.look(true, at(6), patience), []);
        assert_eq!(waiting.look(false, at(7), patience), []);
        assert_eq!(waiting.look(false, at(11), patience), []);
        assert_eq!(waiting.look(false, at(12), patience), [(id, 7, Reason::Unavailable)]);
        assert_eq!(waiting.look(false, at(13), patience), []);
    }
}

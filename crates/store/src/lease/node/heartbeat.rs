//! A node's one task: renews the heartbeat, tells losses, gives leases back, collects dead nodes, fences itself.

use std::{collections::HashMap, sync::Arc, time::Duration};

use tokio::time::{Instant, sleep, sleep_until, timeout};
use uuid::Uuid;

use super::{
    Member, Node,
    sql::{self, Report},
};
use crate::lease::{Error, Loss, lock};

/// Leases given back in one transaction at most.
const RELEASES_MAX: usize = 500;

/// Pause before a fenced node tries to join again.
const REJOIN_PAUSE: Duration = Duration::from_millis(200);

/// How long a node that leaves tries to say so. Otherwise the others notice after [`super::Options::ttl`].
const LEAVE_TIMEOUT: Duration = Duration::from_secs(2);

enum End {
    Left,
    Fenced,
}

/// Makes the node a member, under a name that was never used.
pub(super) async fn join(node: &Node, former: Option<String>) -> Result<String, Error> {
    let began = Instant::now();
    let name = Uuid::new_v4().simple().to_string();
    sql::join(&node.ledger, name.clone(), former).await?;
    lock(&node.state).member = Some(Member { name: name.clone(), until: began + fence_after(node) });
    Ok(name)
}

pub(super) async fn run(node: Arc<Node>, mut name: String) {
    loop {
        let end = serve(&node, &name).await;
        fence(&node);
        if matches!(end, End::Left) {
            return forget(&node, name).await;
        }
        tracing::error!("node fenced: its heartbeat was not renewed in time, its leases are lost");
        let Some(again) = rejoin(&node, &name).await else { return };
        tracing::warn!("node is a member again");
        name = again;
    }
}

/// Works as a member until that ends.
async fn serve(node: &Node, name: &str) -> End {
    let mut watch = Watch::default();
    let mut fails = false;
    let mut beat_at = Instant::now() + beat_every(node);
    loop {
        let Some(until) = lock(&node.state).member.as_ref().map(|member| member.until) else { return End::Fenced };
        let began = Instant::now();
        let beats = began >= beat_at;
        let done = tokio::select! {
            done = round(node, name, beats.then_some(&mut watch)) => done,
            () = sleep_until(until) => return End::Fenced,
        };
        match &done {
            Ok(true) if beats => {
                beat_at = began + beat_every(node);
                if let Some(member) = &mut lock(&node.state).member {
                    member.until = began + fence_after(node);
                }
            }
            Ok(false) => return End::Fenced,
            Err(error) if !fails => tracing::warn!(%error, "node cannot renew its heartbeat"),
            Ok(true) | Err(_) => {}
        }
        fails = done.is_err();
        let more = !lock(&node.state).released.is_empty();
        tokio::select! {
            () = node.leaving.cancelled() => return End::Left,
            () = sleep_until(until) => return End::Fenced,
            () = node.wake.notified(), if !more => {}
            () = sleep(if more { Duration::ZERO } else { node.options.losses_poll }) => {}
        }
    }
}

/// One look and, if there is something to say, one transaction; answers whether the node is still a member.
async fn round(node: &Node, name: &str, watch: Option<&mut Watch>) -> Result<bool, Error> {
    let beats = watch.is_some();
    let (losses, others) = sql::look(&node.ledger, name.to_owned(), beats).await?;
    node.tell(&losses);
    let dead = watch.map_or_else(Vec::new, |watch| watch.dead(others, name, Instant::now(), node.options.ttl));
    for (name, _) in &dead {
        tracing::warn!(node = name, "another node is dead; its leases are free");
    }
    let released: Vec<_> = {
        let state = lock(&node.state);
        state
            .released
            .iter()
            .flat_map(|(key, ids)| ids.iter().map(|id| (key.clone(), id.clone())))
            .take(RELEASES_MAX)
            .collect()
    };
    let told: Vec<_> = losses.into_iter().map(|ended| ended.id).collect();
    let report = Report { beats, told, dead, released: released.iter().map(|(_, id)| id.clone()).collect() };
    if !report.beats && report.told.is_empty() && report.released.is_empty() {
        return Ok(true);
    }
    let is_member = sql::report(&node.ledger, name.to_owned(), report).await?;
    let mut state = lock(&node.state);
    for (key, id) in released {
        if let Some(ids) = state.released.get_mut(&key) {
            ids.retain(|other| *other != id);
            if ids.is_empty() {
                state.released.remove(&key);
            }
        }
    }
    Ok(is_member)
}

/// From now on nothing is held here.
fn fence(node: &Node) {
    let mut state = lock(&node.state);
    state.member = None;
    // The rows go with the node's.
    state.released.clear();
    for (_, loss) in state.held.drain() {
        loss.send_replace(Some(Loss::Fenced));
    }
}

async fn rejoin(node: &Node, former: &str) -> Option<String> {
    let attempts = async {
        loop {
            match join(node, Some(former.to_owned())).await {
                Ok(name) => return name,
                Err(error) => tracing::debug!(%error, "node cannot join again yet"),
            }
            sleep(REJOIN_PAUSE).await;
        }
    };
    tokio::select! {
        name = attempts => Some(name),
        () = node.leaving.cancelled() => None,
    }
}

async fn forget(node: &Node, name: String) {
    match timeout(LEAVE_TIMEOUT, sql::forget(&node.ledger, name)).await {
        Ok(Ok(())) => {}
        Ok(Err(error)) => tracing::warn!(%error, "node could not say that it leaves"),
        Err(_) => tracing::warn!("node could not say in time that it leaves"),
    }
}

fn beat_every(node: &Node) -> Duration {
    node.options.ttl / 4
}

fn fence_after(node: &Node) -> Duration {
    node.options.ttl * 3 / 4
}

/// When each node's heartbeat was first seen at the count where it still is.
#[derive(Default)]
struct Watch(HashMap<String, (i64, Instant)>);

impl Watch {
    /// Those whose heartbeat stood still for `ttl`.
    fn dead(&mut self, beats: Vec<(String, i64)>, own: &str, now: Instant, ttl: Duration) -> Vec<(String, i64)> {
        let before = std::mem::take(&mut self.0);
        let mut dead = Vec::new();
        for (name, beat) in beats.into_iter().filter(|(name, _)| name != own) {
            let since = before.get(&name).filter(|(seen, _)| *seen == beat).map_or(now, |(_, since)| *since);
            if now - since >= ttl {
                dead.push((name.clone(), beat));
            }
            self.0.insert(name, (beat, since));
        }
        dead
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_heartbeat_that_stands_still_is_death_after_the_ttl() {
        let ttl = Duration::from_secs(10);
        let begin = Instant::now();
        let mut watch = Watch::default();
        let mut look = |at: u64, beats: &[(&str, i64)]| {
            let beats = beats.iter().map(|(name, beat)| ((*name).to_owned(), *beat)).collect();
            let dead = watch.dead(beats, "own", begin + Duration::from_secs(at), ttl);
            dead.into_iter().map(|(name, _)| name).collect::<Vec<_>>()
        };
        assert!(look(0, &[("own", 1), ("a", 5), ("b", 7)]).is_empty());
        assert!(look(9, &[("own", 1), ("a", 5), ("b", 8)]).is_empty());
        assert_eq!(look(10, &[("own", 1), ("a", 5), ("b", 8), ("new", 0)]), ["a"], "the own one never is");
        assert!(look(18, &[("a", 6), ("b", 8)]).is_empty(), "it lived after all");
        assert_eq!(look(19, &[("a", 6), ("b", 8), ("new", 0)]), ["b"], "who was away is watched anew");
    }
}

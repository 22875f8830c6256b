//! Coordination over keys.

use std::{sync::Arc, time::Duration};

use tokio::sync::Mutex;
use trunkline_client::{AccessLevel, Agent, Orchestrator, admin::grant, coord::Coord, kv::Scope};

use crate::server::{World, soon};

/// Two that may both use the keys of their workspace.
async fn two(world: &World) -> [(Agent, Coord); 2] {
    let admin = world.connect(Orchestrator::builder("ops").profile("none")).await;
    let mut both = Vec::new();
    for name in ["a", "b"] {
        let agent = world.agent(name).await;
        let rule = grant(&agent.identity().principal(), "kv_scope", "workspace", AccessLevel::Write);
        admin.admin().grant(rule).await.unwrap();
        let coord = agent.coord(Scope::workspace()).ttl(Duration::from_secs(3));
        both.push((agent, coord));
    }
    both.try_into().unwrap()
}

#[tokio::test]
async fn a_lock_is_one_holders_at_a_time_and_outlasts_its_time_to_live() {
    let world = World::begin().await;
    let [(first, a), (_second, b)] = two(&world).await;
    let lease = a.try_lock("index").await.unwrap().unwrap();
    assert!(b.try_lock("index").await.unwrap().is_none());
    assert!(b.holder("index").await.unwrap().unwrap().starts_with("ag::ws::impl::a/"));
    // It is renewed while it is held.
    tokio::time::sleep(Duration::from_secs(4)).await;
    assert!(lease.is_held() && b.try_lock("index").await.unwrap().is_none());
    assert!(lease.release().await.unwrap());
    let lease = b.try_lock("index").await.unwrap().unwrap();
    drop(lease);
    // A holder that vanishes loses it in time.
    let lease = soon(a.lock("index")).await.unwrap();
    drop(first);
    std::mem::forget(lease);
    world.end().await;
}

#[tokio::test]
async fn a_lease_that_was_taken_away_is_lost() {
    let world = World::begin().await;
    let [(agent, a), _] = two(&world).await;
    let lease = a.try_lock("index").await.unwrap().unwrap();
    agent.kv(Scope::workspace()).put("_sys/coord/index", "somebody else").await.unwrap();
    soon(lease.lost()).await;
    assert!(!lease.is_held());
    assert!(!lease.release().await.unwrap());
    world.end().await;
}

#[tokio::test]
async fn one_leads_at_a_time() {
    let world = World::begin().await;
    let [(_first, a), (_second, b)] = two(&world).await;
    let leading = Arc::new(Mutex::new(()));
    let lead = |coord: Coord| {
        let leading = Arc::clone(&leading);
        async move {
            let led = coord.lead("cluster", || async {
                let _alone = leading.try_lock().expect("nobody else leads");
                tokio::time::sleep(Duration::from_millis(50)).await;
            });
            led.await.unwrap();
        }
    };
    let all = async { tokio::join!(lead(a.clone()), lead(b.clone()), lead(a), lead(b)) };
    soon(Box::pin(all)).await;
    world.end().await;
}

#[tokio::test]
async fn places_are_counted_and_once_is_once() {
    let world = World::begin().await;
    let [(_first, a), (_second, b)] = two(&world).await;
    let one = a.try_acquire("workers", 2).await.unwrap().unwrap();
    let two = b.try_acquire("workers", 2).await.unwrap().unwrap();
    assert!(a.try_acquire("workers", 2).await.unwrap().is_none());
    one.release().await.unwrap();
    let three = a.try_acquire("workers", 2).await.unwrap().unwrap();
    drop(two);
    let mut four = None;
    while four.is_none() {
        four = soon(b.try_acquire("workers", 2)).await.unwrap();
    }
    drop((three, four));
    assert!(a.once("migrate", None).await.unwrap());
    assert!(!b.once("migrate", None).await.unwrap());
    world.end().await;
}

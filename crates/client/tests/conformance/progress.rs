//! Reports of progress: stamped by the server, and shown to whom they are for.

use std::time::{SystemTime, UNIX_EPOCH};

use trunkline_client::{
    Client,
    proto::{ProgressKind, ProgressUpdate},
    task::Progress,
};

use crate::world_messaging::{OTHER, WS, World, done, next, plain};

async fn report(from: &Client, to: &str, summary: &str) {
    from.report(Progress::running("t").to(to).summary(summary)).await.unwrap();
    done(from).await;
}

/// The next report, which is this one.
async fn sees(client: &Client, summary: &str) -> ProgressUpdate {
    let update = next(client.progress()).await;
    assert_eq!(update.summary, summary, "seen by {:?}", client.identity());
    update
}

/// What they see next is a marker for each, so they saw nothing before.
async fn saw_nothing(from: &Client, bystanders: &[&Client]) {
    for bystander in bystanders {
        report(from, bystander.identity().as_str(), "marker").await;
        sees(bystander, "marker").await;
    }
}

fn now_ms() -> i64 {
    i64::try_from(SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_millis()).unwrap()
}

#[tokio::test]
async fn a_report_arrives_complete_and_stamped() {
    let world = World::begin().await;
    let (worker, watcher) = (world.agent("a").await, world.agent("b").await);
    let progress = Progress::running("t-1")
        .completion(0.25)
        .summary("loading")
        .request("r-1")
        .metadata([("rows".into(), "10".into())].into())
        .kind(ProgressKind::App)
        .step("load", 2, 8)
        .step_detail("page 2", "io");
    worker.report(progress).await.unwrap();
    let update = sees(&watcher, "loading").await;
    assert_eq!((&*update.source, &*update.workspace), (worker.identity().as_str(), WS));
    assert!((update.timestamp_ms - now_ms()).abs() < 60_000);
    assert_eq!((&*update.task_id, &*update.state, update.completion), ("t-1", "running", 0.25));
    assert_eq!((&*update.request_id, &*update.recipient), ("r-1", ""));
    assert_eq!(update.metadata, [("rows".into(), "10".into())].into());
    assert_eq!(update.kind(), ProgressKind::App);
    let step = update.step.unwrap();
    assert_eq!((&*step.name, &*step.detail, &*step.step_type), ("load", "page 2", "io"));
    assert_eq!((step.sequence, step.total_steps), (2, 8));
}

#[tokio::test]
async fn a_report_reaches_agents_and_users_of_the_workspace_but_its_sender() {
    let world = World::begin().await;
    let (worker, user) = (world.agent("a").await, world.user_on(WS, "alice", "w").await);
    let colleagues = [world.agent("b").await, world.agent("c").await];
    report(&worker, "", "for all").await;
    let watchers: [&Client; 3] = [&colleagues[0], &colleagues[1], &user];
    for watcher in watchers {
        assert_eq!(sees(watcher, "for all").await.source, worker.identity().as_str());
    }
    saw_nothing(&colleagues[0], &[&worker]).await;
}

#[tokio::test]
async fn a_report_stays_in_the_workspace() {
    let world = World::begin().await;
    let (worker, inside) = (world.agent("a").await, world.agent("b").await);
    let (neighbour, outside) = (world.agent_in(OTHER, "a").await, world.agent_in(OTHER, "b").await);
    let (visitor, nowhere) = (world.user_on(OTHER, "alice", "w").await, world.user("bob", "w").await);
    report(&worker, "", "inside").await;
    sees(&inside, "inside").await;
    saw_nothing(&neighbour, &[&outside, &visitor]).await;
    saw_nothing(&worker, &[&nowhere]).await;
}

#[tokio::test]
async fn tasks_report_but_do_not_watch() {
    let world = World::begin().await;
    let (worker, other, watcher) = (world.task("t1").await, world.task("t2").await, world.agent("a").await);
    report(&worker, "", "by a task").await;
    assert_eq!(sees(&watcher, "by a task").await.source, worker.identity().as_str());
    // Nothing comes after the last answer but what is there already.
    done(&other).await;
    let mut progress = other.progress();
    other.close().await;
    assert!(progress.next().await.is_none());
}

#[tokio::test]
async fn a_report_for_an_agent_is_seen_by_it_alone() {
    let world = World::begin().await;
    let (worker, chosen, other) = (world.agent("a").await, world.agent("b").await, world.agent("c").await);
    let user = world.user_on(WS, "alice", "w").await;
    let name = chosen.identity();
    report(&worker, name.as_str(), "for one").await;
    assert_eq!(sees(&chosen, "for one").await.recipient, name.as_str());
    saw_nothing(&worker, &[&other, &user]).await;
}

#[tokio::test]
async fn a_report_for_a_user_is_seen_in_every_window() {
    let world = World::begin().await;
    let worker = world.agent("a").await;
    let windows = [world.user("alice", "w1").await, world.user_on(OTHER, "alice", "w2").await];
    let (stranger, colleague) = (world.user_on(WS, "bob", "w").await, world.agent("b").await);
    report(&worker, "us::alice", "for alice").await;
    for window in &windows {
        assert_eq!(sees(window, "for alice").await.recipient, "us::alice");
    }
    saw_nothing(&worker, &[&stranger, &colleague]).await;
}

#[tokio::test]
async fn a_report_for_a_window_is_seen_by_it_alone_and_once() {
    let world = World::begin().await;
    let worker = world.agent("a").await;
    // Both also see what is for the workspace.
    let (chosen, other) = (world.user_on(WS, "alice", "w1").await, world.user_on(WS, "alice", "w2").await);
    report(&worker, "us::alice::w1", "for a window").await;
    sees(&chosen, "for a window").await;
    saw_nothing(&worker, &[&other, &chosen]).await;
}

#[tokio::test]
async fn a_user_whose_name_begins_as_anothers_sees_nothing_of_it() {
    let world = World::begin().await;
    let worker = world.agent("a").await;
    let (full, prefix) = (world.user("alice", "w").await, world.user("ali", "w").await);
    report(&worker, "us::alice", "for alice").await;
    sees(&full, "for alice").await;
    report(&worker, "us::ali", "for ali").await;
    sees(&prefix, "for ali").await;
    saw_nothing(&worker, &[&full]).await;
}

#[tokio::test]
async fn reports_keep_their_order() {
    let world = World::begin().await;
    let (worker, watcher) = (world.agent("a").await, world.agent("b").await);
    for n in 0..20 {
        let progress = Progress::running("t").completion(f64::from(n) / 20.0).summary(n.to_string());
        worker.report(progress).await.unwrap();
    }
    for n in 0..20 {
        sees(&watcher, &n.to_string()).await;
    }
}

#[tokio::test]
async fn a_service_reports_to_a_user() {
    let world = World::begin().await;
    let (service, user) = (world.service("s").await, world.user("alice", "w").await);
    report(&service, "us::alice", "for alice").await;
    assert_eq!(sees(&user, "for alice").await.source, service.identity().as_str());
}

#[tokio::test]
async fn nobody_else_may_report() {
    let world = World::begin().await;
    let (watcher, worker) = (world.agent("a").await, world.task("t").await);
    let others = [
        plain(world.user_on(WS, "alice", "w").await),
        plain(world.orchestrator("o").await),
        plain(world.bridge("b").await),
    ];
    for other in &others {
        other.report(Progress::running("t").summary("refused")).await.unwrap();
        assert_eq!(next(other.refusals()).await.code(), "ERR_INVALID_PRINCIPAL", "{:?}", other.identity());
    }
    report(&worker, "", "allowed").await;
    sees(&watcher, "allowed").await;
}

#[tokio::test]
async fn a_user_sees_nothing_of_a_workspace_after_leaving_it() {
    let world = World::begin().await;
    let (worker, user) = (world.agent("a").await, world.user_on(WS, "alice", "w").await);
    report(&worker, "", "before").await;
    sees(&user, "before").await;
    user.switch_workspace(OTHER).await.unwrap();
    done(&user).await;
    report(&worker, "", "after").await;
    saw_nothing(&worker, &[&user]).await;
}

// Not ported:
// - test_sdk_report_reaches_agent_and_user: every test here is by an SDK.

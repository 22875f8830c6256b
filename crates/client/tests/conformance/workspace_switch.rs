//! Users move between workspaces while they are connected. A switch has no answer; `done` tells when it has happened.

use trunkline_client::{AccessLevel, Client, Kind, Topic, User, admin::ConnectionFilter};

use crate::world_messaging::{OTHER, WS, World, done, heard_nothing, hears, place, plain, say, soon, texts};

async fn switch(user: &User, workspace: &str) {
    user.switch_workspace(workspace).await.unwrap();
    assert_eq!(user.workspace().as_deref(), Some(workspace));
    done(user).await;
}

fn users(workspace: &str) -> Topic {
    Topic::users(workspace).unwrap()
}

fn session(client: &Client) -> String {
    client.welcome().unwrap().session_id.clone()
}

#[tokio::test]
async fn a_new_user_is_on_no_workspace() {
    let world = World::begin().await;
    let (agent, user) = (world.agent("a").await, world.user("alice", "w").await);
    assert_eq!(user.workspace(), None);
    say(&agent, users(WS), "dear users").await;
    heard_nothing(&agent, &[&user]).await;
    let admin = world.admin().await;
    assert_eq!(admin.get_session(&session(&user)).await.unwrap().workspace, "");
}

#[tokio::test]
async fn a_switch_opens_the_workspaces_broadcasts() {
    let world = World::begin().await;
    let (agent, user) = (world.agent("a").await, world.user("alice", "w").await);
    switch(&user, WS).await;
    say(&agent, users(WS), "welcome").await;
    hears(&user, "welcome").await;
    agent.send_to_user_in("alice", WS, "personally").await.unwrap();
    hears(&user, "personally").await;
}

#[tokio::test]
async fn a_user_can_be_on_a_workspace_from_the_start() {
    let world = World::begin().await;
    let agent = world.agent("a").await;
    let user = world.connect(User::builder("alice", "w").workspace(WS)).await;
    done(&user).await;
    assert_eq!(user.workspace().as_deref(), Some(WS));
    agent.broadcast_to_users(WS, "welcome").await.unwrap();
    hears(&user, "welcome").await;
}

#[tokio::test]
async fn a_switch_closes_the_workspace_before() {
    let world = World::begin().await;
    let (here, there) = (world.agent("a").await, world.agent_in(OTHER, "a").await);
    let user = world.user_on(WS, "alice", "w").await;
    switch(&user, OTHER).await;
    say(&here, users(WS), "you have left").await;
    say(&there, users(OTHER), "you have arrived").await;
    hears(&user, "you have arrived").await;
    heard_nothing(&here, &[&user]).await;
}

#[tokio::test]
async fn a_switch_there_and_back() {
    let world = World::begin().await;
    let (agent, user) = (world.agent("a").await, world.user_on(WS, "alice", "w").await);
    switch(&user, OTHER).await;
    switch(&user, WS).await;
    say(&agent, users(WS), "good to have you back").await;
    hears(&user, "good to have you back").await;
}

#[tokio::test]
async fn a_switch_keeps_the_session_and_direct_messages() {
    let world = World::begin().await;
    let (agent, user) = (world.agent("a").await, world.user_on(WS, "alice", "w").await);
    let before = session(&user);
    switch(&user, OTHER).await;
    say(&agent, place(&user), "direct").await;
    hears(&user, "direct").await;
    assert_eq!(session(&user), before);
    let admin = world.admin().await;
    assert_eq!(admin.get_session(&before).await.unwrap().identity, "us::alice::w");
}

#[tokio::test]
async fn a_switch_to_where_it_is_changes_nothing() {
    let world = World::begin().await;
    let (agent, user) = (world.agent("a").await, world.user_on(WS, "alice", "w").await);
    switch(&user, WS).await;
    say(&agent, users(WS), "once").await;
    say(&agent, users(WS), "and once more").await;
    assert_eq!(texts(&user, 2).await, ["once", "and once more"]);
}

#[tokio::test]
async fn a_switch_is_about_one_window() {
    let world = World::begin().await;
    let agent = world.agent("a").await;
    let (stays, leaves) = (world.user_on(WS, "alice", "w1").await, world.user_on(WS, "alice", "w2").await);
    switch(&leaves, OTHER).await;
    say(&agent, users(WS), "who is left?").await;
    hears(&stays, "who is left?").await;
    heard_nothing(&agent, &[&leaves]).await;
}

#[tokio::test]
async fn a_switch_that_works_is_silent() {
    let world = World::begin().await;
    let user = world.user("alice", "w").await;
    switch(&user, WS).await;
    let (mut refusals, mut configs, mut signals) = (user.refusals(), user.configs(), user.signals());
    soon(user.close()).await;
    assert!(refusals.next().await.is_none());
    assert!(configs.next().await.is_none());
    assert!(signals.next().await.is_none());
}

#[tokio::test]
async fn sessions_show_the_workspace_that_a_user_is_on() {
    let world = World::begin().await;
    let admin = world.admin().await;
    let user = world.user_on(WS, "alice", "w").await;
    let id = session(&user);
    let listed = async |workspace: &str| {
        let filter = ConnectionFilter { workspace: workspace.into(), ..ConnectionFilter::default() };
        let (sessions, _) = admin.sessions(filter).await.unwrap();
        sessions.iter().any(|each| each.session_id == id)
    };
    assert!(listed(WS).await);
    switch(&user, OTHER).await;
    assert!(listed(OTHER).await);
    assert!(!listed(WS).await);
}

#[tokio::test]
async fn a_switch_takes_the_right_to_read() {
    let world = World::begin().await;
    let agent = world.agent("a").await;
    let (out, guest) = (world.user("outcast", "w").await, world.user("guest", "w").await);
    world.grant(&out, WS, AccessLevel::None).await;
    world.grant(&guest, WS, AccessLevel::Read).await;
    switch(&guest, WS).await;
    let error = out.switch_workspace(WS).await.unwrap_err();
    assert_eq!(error.kind(), Kind::Denied, "{error:?}");
    say(&agent, users(WS), "members only").await;
    hears(&guest, "members only").await;
    heard_nothing(&agent, &[&out]).await;
}

#[tokio::test]
async fn a_switch_that_is_refused_leaves_the_user_where_it_was() {
    let world = World::begin().await;
    let (agent, user) = (world.agent("a").await, world.user_on(WS, "alice", "w").await);
    world.grant(&user, OTHER, AccessLevel::None).await;
    assert!(user.switch_workspace(OTHER).await.is_err());
    assert_eq!(user.workspace().as_deref(), Some(WS), "and it is not asked for again");
    say(&agent, users(WS), "still here").await;
    hears(&user, "still here").await;
}

#[tokio::test]
async fn a_workspace_with_a_name_that_cannot_be_is_refused_before_it_is_sent() {
    let world = World::begin().await;
    let user = world.user_on(WS, "alice", "w").await;
    let watched = plain(user.clone());
    for bad in ["", "a::b", "a*"] {
        assert_eq!(user.switch_workspace(bad).await.unwrap_err().kind(), Kind::Invalid, "{bad:?}");
    }
    assert_eq!(user.workspace().as_deref(), Some(WS));
    done(&watched).await;
}

// Not ported:
// - test_agent_keeps_its_workspace: only User has switch_workspace here.
// - test_sdk_user_switches_workspace: every test here is by an SDK.

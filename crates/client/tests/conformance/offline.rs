//! Messages for somebody who is away wait until that somebody returns.

use trunkline_client::{Agent, Builder, Client, MessageType, Outgoing, Principal, Topic, UniqueTask, User};

use crate::world_messaging::{WS, World, done, heard, heard_nothing, hears, place, plain, say, soon, texts, topic};

/// Connects once and leaves.
async fn visit<P: Principal + std::ops::Deref<Target = Client>>(world: &World, builder: Builder<P>) {
    let client = world.connect(builder).await;
    done(&client).await;
    soon(client.close()).await;
}

/// Numbered messages, with something in front; they are on the server when this returns.
async fn burst(sender: &Client, to: &Topic, prefix: &str, count: usize) -> Vec<String> {
    let texts: Vec<String> = (0..count).map(|n| format!("{prefix}{n}")).collect();
    for text in &texts {
        sender.send(Outgoing::chat(to, text.clone())).await.unwrap();
    }
    done(sender).await;
    texts
}

fn away() -> Builder<Agent> {
    Agent::builder(WS, "worker", "away")
}

fn away_topic() -> Topic {
    Topic::agent(WS, "worker", "away").unwrap()
}

#[tokio::test]
async fn messages_wait_for_who_returns() {
    let world = World::begin().await;
    let sender = world.agent("sender").await;
    visit(&world, away()).await;
    visit(&world, UniqueTask::builder(WS, "job", "away")).await;
    visit(&world, User::builder("alice", "away")).await;
    messages_wait(&world, &sender).await;
}

#[tokio::test]
async fn messages_wait_for_who_never_came() {
    let world = World::begin().await;
    let sender = world.agent("sender").await;
    messages_wait(&world, &sender).await;
}

async fn messages_wait(world: &World, sender: &Agent) {
    let places = ["ag::ws::worker::away", "tu::ws::job::away", "us::alice::away"];
    let mut sent = Vec::new();
    for place in places {
        sent = burst(sender, &topic(place), "", 15).await;
    }
    let returned = [
        plain(world.connect(away()).await),
        plain(world.connect(UniqueTask::builder(WS, "job", "away")).await),
        plain(world.connect(User::builder("alice", "away")).await),
    ];
    for (client, place) in returned.iter().zip(places) {
        for text in &sent {
            let message = heard(client).await;
            assert_eq!((&*message.text(), message.kind()), (text.as_str(), MessageType::Chat), "{place}");
            assert_eq!(message.source(), "ag::ws::worker::sender", "{place}");
        }
    }
}

#[tokio::test]
async fn waiting_messages_come_before_new_ones() {
    let world = World::begin().await;
    let sender = world.agent("sender").await;
    visit(&world, away()).await;
    let mut sent = burst(&sender, &away_topic(), "old ", 15).await;
    let back = world.connect(away()).await;
    sent.extend(burst(&sender, &away_topic(), "new ", 15).await);
    assert_eq!(texts(&back, 30).await, sent);
}

#[tokio::test]
async fn messages_of_several_senders_keep_their_order_while_they_wait() {
    let world = World::begin().await;
    let senders = [world.agent("s0").await, world.agent("s1").await, world.agent("s2").await];
    visit(&world, away()).await;
    for n in 0..6 {
        for sender in &senders {
            sender.send(Outgoing::new(away_topic(), n.to_string())).await.unwrap();
        }
    }
    for sender in &senders {
        done(sender).await;
    }
    let back = world.connect(away()).await;
    let mut next = [0, 0, 0];
    for _ in 0..18 {
        let message = heard(&back).await;
        let sender = senders.iter().position(|each| each.identity().as_str() == message.source()).unwrap();
        assert_eq!(message.text(), next[sender].to_string(), "from {}", message.source());
        next[sender] += 1;
    }
    assert_eq!(next, [6, 6, 6]);
}

#[tokio::test]
async fn what_came_during_an_absence_comes_once() {
    let world = World::begin().await;
    let sender = world.agent("sender").await;
    visit(&world, away()).await;
    for absence in ["first ", "second "] {
        let sent = burst(&sender, &away_topic(), absence, 5).await;
        let back = world.connect(away()).await;
        assert_eq!(texts(&back, 5).await, sent);
        heard_nothing(&sender, &[&back]).await;
        soon(back.close()).await;
    }
}

#[tokio::test]
async fn nobody_else_gets_what_waits() {
    let world = World::begin().await;
    let sender = world.agent("sender").await;
    visit(&world, away()).await;
    let sent = burst(&sender, &away_topic(), "", 3).await;
    let (somebody_else, back) = (world.agent("somebody-else").await, world.connect(away()).await);
    heard_nothing(&sender, &[&somebody_else]).await;
    assert_eq!(texts(&back, 3).await, sent);
}

#[tokio::test]
async fn to_write_to_who_is_away_is_no_error() {
    let world = World::begin().await;
    let sender = world.agent("sender").await;
    say(&sender, Topic::agent(WS, "unregistered", "nobody").unwrap(), "anybody there?").await;
    done(&sender).await;
    let mut refusals = sender.refusals();
    soon(sender.close()).await;
    assert!(soon(refusals.next()).await.is_none());
}

#[tokio::test]
async fn a_window_catches_up_on_what_went_to_all_windows() {
    let world = World::begin().await;
    let service = world.service("s").await;
    let window = world.user("alice", "w1").await;
    say(&service, Topic::user("alice").unwrap(), "seen").await;
    hears(&window, "seen").await;
    done(&window).await;
    soon(window.close()).await;
    say(&service, Topic::user("alice").unwrap(), "missed").await;
    let back = world.user("alice", "w1").await;
    hears(&back, "missed").await;
    say(&service, Topic::user("alice").unwrap(), "new").await;
    hears(&back, "new").await;
    heard_nothing(&service, &[&back]).await;
}

#[tokio::test]
async fn what_was_not_acknowledged_comes_again() {
    let world = World::begin().await;
    let sender = world.agent("sender").await;
    let first = world.connect(away().at_least_once()).await;
    assert!(first.welcome().unwrap().acknowledges());
    let sent = burst(&sender, &place(&first), "", 5).await;
    heard(&first).await.acknowledge();
    assert_eq!(texts(&first, 4).await, sent[1..]);
    soon(first.close()).await;
    let second = world.connect(away().at_least_once()).await;
    assert_eq!(texts(&second, 4).await, sent[1..]);
}

// Not ported:
// - test_sdk_agent_receives_what_it_missed: every test here is by an SDK.

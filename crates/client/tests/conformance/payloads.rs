//! Payloads arrive bit for bit, and messages in the order in which they were sent.

use std::collections::HashMap;

use bytes::Bytes;
use trunkline_client::{Agent, Kind, MessageType, Outgoing, Topic};

use crate::world_messaging::{WS, World, done, heard, heard_nothing, hears, next, place, say, soon, texts};

const MIB: usize = 1024 * 1024;

fn random(size: usize) -> Bytes {
    let mut bytes = vec![0; size];
    fastrand::Rng::with_seed(17).fill(&mut bytes);
    bytes.into()
}

// Payloads.

#[tokio::test]
async fn a_payload_of_any_size_arrives_exactly() {
    let world = World::begin().await;
    let (a, b) = (world.agent("a").await, world.agent("b").await);
    for size in [0, 1, 64 * 1024, MIB] {
        let payload = random(size);
        a.send(Outgoing::new(place(&b), payload.clone())).await.unwrap();
        let got = heard(&b).await;
        assert_eq!(got.payload().len(), size);
        assert!(*got.payload() == payload, "{size} bytes");
        assert_eq!(got.source(), "ag::ws::worker::a");
    }
}

#[tokio::test]
async fn every_byte_survives() {
    let world = World::begin().await;
    let (a, b) = (world.agent("a").await, world.agent("b").await);
    let payload: Vec<u8> = (0..=255).cycle().take(768).collect();
    for kind in [MessageType::Chat, MessageType::Opaque] {
        a.send(Outgoing::new(place(&b), payload.clone()).of(kind)).await.unwrap();
        hears(&b, payload.clone()).await;
    }
}

#[tokio::test]
async fn a_large_payload_arrives_exactly_by_a_broadcast() {
    let world = World::begin().await;
    let sender = world.agent("a").await;
    let receivers = [world.user_on(WS, "alice", "w").await, world.user_on(WS, "bob", "w").await];
    let payload = random(256 * 1024);
    sender.broadcast_to_users(WS, payload.clone()).await.unwrap();
    for receiver in &receivers {
        assert!(*heard(receiver).await.payload() == payload);
    }
}

#[tokio::test]
async fn a_payload_that_is_one_byte_too_long_is_refused() {
    let world = World::begin().await;
    let (a, b) = (world.agent("a").await, world.agent("b").await);
    let error = soon(a.send_confirmed(Outgoing::new(place(&b), vec![0; MIB + 1]))).await.unwrap_err();
    assert_eq!(error.code(), "ERR_PAYLOAD_TOO_LARGE");
    assert!(!error.is_retryable());
    say(&a, place(&b), "next").await;
    hears(&b, "next").await;
}

#[tokio::test]
async fn the_largest_payload_waits_for_who_is_away() {
    let world = World::begin().await;
    let sender = world.agent("a").await;
    soon(world.agent("away").await.close()).await;
    let payload = random(MIB);
    say(&sender, Topic::agent(WS, "worker", "away").unwrap(), payload.clone()).await;
    let back = world.agent("away").await;
    assert!(*heard(&back).await.payload() == payload);
}

// Order.

fn numbers(range: std::ops::Range<usize>) -> Vec<String> {
    range.map(|n| n.to_string()).collect()
}

#[tokio::test]
async fn messages_of_one_sender_arrive_in_order() {
    let world = World::begin().await;
    let (a, b) = (world.agent("a").await, world.agent("b").await);
    for number in numbers(0..100) {
        a.send(Outgoing::new(place(&b), number)).await.unwrap();
    }
    assert_eq!(texts(&b, 100).await, numbers(0..100));
}

#[tokio::test]
async fn confirmed_messages_keep_their_order_too() {
    let world = World::begin().await;
    let (a, b) = (world.agent("a").await, world.agent("b").await);
    let sends = numbers(0..100).into_iter().map(|number| a.send_confirmed(Outgoing::new(place(&b), number)));
    for sent in soon(futures_util::future::join_all(sends)).await {
        sent.unwrap();
    }
    assert_eq!(texts(&b, 100).await, numbers(0..100));
}

#[tokio::test]
async fn a_thousand_messages_keep_their_order_for_each_sender() {
    let world = World::begin().await;
    let receiver = world.agent("receiver").await;
    let mut senders = Vec::new();
    for n in 0..10 {
        senders.push(world.agent(&format!("sender-{n}")).await);
    }
    for number in numbers(0..100) {
        for sender in &senders {
            sender.send(Outgoing::new(place(&receiver), number.clone())).await.unwrap();
        }
    }
    let mut of_each: HashMap<String, Vec<String>> = HashMap::new();
    for _ in 0..1000 {
        let message = heard(&receiver).await;
        of_each.entry(message.source().to_owned()).or_default().push(message.text().into_owned());
    }
    assert_eq!(of_each.len(), senders.len());
    for (sender, received) in of_each {
        assert_eq!(received, numbers(0..100), "{sender}");
    }
    heard_nothing(&senders[0], &[&receiver]).await;
}

#[tokio::test]
async fn order_holds_across_types_and_sizes() {
    let world = World::begin().await;
    let (a, b) = (world.agent("a").await, world.agent("b").await);
    let kinds = [MessageType::Chat, MessageType::Control, MessageType::ToolCall, MessageType::Opaque];
    let payloads: Vec<String> =
        (0..60).map(|n| format!("{n:04}{}", ".".repeat(if n % 5 == 0 { 20_000 } else { 0 }))).collect();
    for (n, payload) in payloads.iter().enumerate() {
        a.send(Outgoing::new(place(&b), payload.clone()).of(kinds[n % 4])).await.unwrap();
    }
    assert!(texts(&b, payloads.len()).await == payloads);
}

#[tokio::test]
async fn a_broadcast_has_the_same_order_for_everybody() {
    let world = World::begin().await;
    let sender = world.agent("a").await;
    let receivers =
        [world.user_on(WS, "u1", "w").await, world.user_on(WS, "u2", "w").await, world.user_on(WS, "u3", "w").await];
    for number in numbers(0..20) {
        sender.broadcast_to_users(WS, number).await.unwrap();
    }
    for receiver in &receivers {
        assert_eq!(texts(receiver, 20).await, numbers(0..20));
    }
}

// Flood protection.

#[tokio::test]
async fn who_sends_too_fast_is_told_to_slow_down() {
    let world = World::begin().await;
    let (sender, receiver) = (world.agent("a").await, world.user("alice", "w").await);
    // More than the burst by so much that a slow machine is fast enough.
    for number in numbers(0..1000) {
        sender.send(Outgoing::new(place(&receiver), number)).await.unwrap();
    }
    let error = next(sender.refusals()).await;
    assert!(["ERR_RATE_LIMITED", "ERR_QUOTA_001"].contains(&error.code()), "{error:?}");
    assert_eq!(error.kind(), Kind::Exhausted);
    assert!(error.is_retryable());
    assert!(error.retry_after().is_some_and(|after| !after.is_zero()), "{error:?}");
    done(&sender).await;
}

#[tokio::test]
async fn nothing_is_lost_if_the_receiver_listens_late() {
    let world = World::begin().await;
    let (sender, slow) = (world.agent("a").await, world.connect(Agent::builder(WS, "worker", "slow").inbox(8)).await);
    let _listens: trunkline_client::Received<_> = slow.messages();
    for number in numbers(0..100) {
        sender.send(Outgoing::new(place(&slow), number)).await.unwrap();
    }
    done(&sender).await;
    assert_eq!(texts(&slow, 100).await, numbers(0..100));
}

// Not ported:
// - test_sdk_payload_arrives_exactly, test_sdk_messages_arrive_in_order: every test here is by an SDK.

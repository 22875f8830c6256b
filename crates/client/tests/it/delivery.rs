//! When a message counts as delivered, and what a backlog does to everything else. Against a server.

use std::{
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering::SeqCst},
    },
    time::Duration,
};

use tokio::sync::Notify;
use trunkline_client::{Agent, Client, Outgoing, Topic, kv::Scope, task::Progress};

use crate::server::{World, soon};

fn reader() -> Topic {
    Topic::agent("ws", "impl", "reader").unwrap()
}

fn to_sender() -> Topic {
    Topic::agent("ws", "impl", "sender").unwrap()
}

/// So many messages for a reader who is away, numbered.
async fn backlog(sender: &Client, count: usize) {
    for n in 0..count {
        sender.send(Outgoing::chat(reader(), n.to_string())).await.unwrap();
    }
    sender.settled().await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_handler_that_asks_gets_its_answers_however_long_the_backlog_is() {
    const COUNT: usize = 12_000;
    let world = World::begin().await;
    let sender = world.agent("sender").await;
    let builder = Agent::builder("ws", "impl", "reader").inbox(4).request_timeout(Duration::from_secs(5));
    let reader = world.connect(builder).await;
    let (seen, done) = (Arc::new(AtomicUsize::new(0)), Arc::new(Notify::new()));
    reader.on_message({
        let (client, seen, done) = (reader.client().clone(), Arc::clone(&seen), Arc::clone(&done));
        move |message| {
            let (client, seen, done) = (client.clone(), Arc::clone(&seen), Arc::clone(&done));
            async move {
                assert_eq!(message.text(), seen.load(SeqCst).to_string());
                // One answer after the other, each behind what the server has for us.
                match seen.load(SeqCst) % 200 {
                    n if n % 20 == 0 => drop(client.kv(Scope::GlobalExclusive).get("k").await?),
                    110 => client.send_confirmed(Outgoing::chat(to_sender(), "got it")).await?,
                    _ => {}
                }
                if seen.fetch_add(1, SeqCst) + 1 == COUNT {
                    done.notify_one();
                }
                Ok::<_, trunkline_client::Error>(())
            }
        }
    });
    // After the handler is registered: a message that exceeds the inbox without a handler is dropped.
    backlog(&sender, COUNT).await;
    soon(done.notified()).await;
    world.end().await;
}

#[tokio::test]
async fn what_lies_here_when_a_client_closes_is_its_successors() {
    let world = World::begin().await;
    let sender = world.agent("sender").await;
    backlog(&sender, 5).await;
    let first = world.agent("reader").await;
    let mut messages = first.messages();
    assert_eq!(soon(messages.next()).await.unwrap().text(), "0");
    // All of it is here by now.
    first.settled().await.unwrap();
    soon(first.close()).await;
    assert!(soon(messages.next()).await.is_none(), "nothing is handled twice");
    let second = world.agent("reader").await;
    let mut messages = second.messages();
    for n in 1..5 {
        assert_eq!(soon(messages.next()).await.unwrap().text(), n.to_string());
    }
    world.end().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_waits_for_progress_gets_it_although_messages_wait() {
    let world = World::begin().await;
    let sender = world.agent("sender").await;
    backlog(&sender, 10).await;
    let reader = world.agent("reader").await;
    let (tell, told) = tokio::sync::oneshot::channel();
    let (mut progress, mut tell) = (reader.progress(), Some(tell));
    let waits = tokio::spawn(async move {
        while let Some(update) = progress.next().await {
            if update.summary == "last" {
                return;
            }
        }
    });
    let mut waits = Some(waits);
    reader.on_message(move |_| {
        // The first one waits for the end of somebody's work.
        let (waits, tell) = (waits.take(), tell.take());
        async move {
            if let (Some(waits), Some(tell)) = (waits, tell) {
                waits.await.unwrap();
                tell.send(()).unwrap();
            }
            Ok::<_, trunkline_client::Error>(())
        }
    });
    for n in 0..6000 {
        sender.report(Progress::running("t").summary(n.to_string())).await.unwrap();
    }
    sender.report(Progress::running("t").summary("last")).await.unwrap();
    soon(told).await.unwrap();
    world.end().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn messages_that_nobody_listens_to_do_not_hold_progress_up() {
    let world = World::begin().await;
    let sender = world.agent("sender").await;
    backlog(&sender, 1000).await;
    let reader = world.agent("reader").await;
    let mut progress = reader.progress();
    let reports = tokio::spawn({
        let sender = sender.client().clone();
        async move {
            for n in 0..6000 {
                sender.report(Progress::running("t").summary(n.to_string())).await.unwrap();
            }
            sender.settled().await.unwrap();
        }
    });
    for n in 0..6000 {
        assert_eq!(soon(progress.next()).await.unwrap().summary, n.to_string());
    }
    reports.await.unwrap();
    // They are there all the same.
    assert_eq!(soon(reader.messages().next()).await.unwrap().text(), "0");
    world.end().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn large_messages_that_nobody_listens_to_do_not_hold_progress_up() {
    let world = World::begin().await;
    let sender = world.agent("sender").await;
    let large = vec![b'x'; 1_000_000];
    for _ in 0..40 {
        sender.send(Outgoing::new(reader(), large.clone())).await.unwrap();
    }
    sender.settled().await.unwrap();
    let reader = world.agent("reader").await;
    let mut progress = reader.progress();
    sender.report(Progress::running("t").summary("here")).await.unwrap();
    assert_eq!(soon(progress.next()).await.unwrap().summary, "here");
    // Who takes them is given all that are left, one window after the other.
    let mut messages = reader.messages();
    for _ in 0..30 {
        assert_eq!(soon(messages.next()).await.unwrap().payload().len(), large.len());
    }
    world.end().await;
}

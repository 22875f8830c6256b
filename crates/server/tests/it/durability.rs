//! What was accepted arrives: in order, once or again, never not.

use trunkline::{Config, Server};
use trunkline_proto::v1::{SendMessage, downstream_message::Payload as Down, upstream_message::Payload as Up};

use crate::{
    client::{Client, agent, lane, server, worker},
    process::Process,
};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_was_sent_to_somebody_away_survives_a_kill() {
    let dir = tempfile::tempdir().unwrap();
    let mut process = Process::start(dir.path());
    let mut sender = Client::connect(process.grpc, agent("sender")).await.unwrap();
    for round in 0..5 {
        for n in 0..200 {
            sender.send(&lane("away"), (round * 200 + n).to_string()).await;
        }
        sender.barrier().await;
        process.kill();
        process = Process::start(dir.path());
        sender = Client::connect(process.grpc, agent("sender")).await.unwrap();
    }
    let mut away = Client::connect(process.grpc, agent("away")).await.unwrap();
    assert_eq!(away.numbers(1000).await, (0..1000).collect::<Vec<_>>());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_kill_repeats_and_skips_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let process = Process::start(dir.path());
    let mut sender = Client::connect(process.grpc, agent("sender")).await.unwrap();
    let mut receiver = Client::connect(process.grpc, agent("receiver")).await.unwrap();
    for n in 0..100 {
        sender.send(&lane("receiver"), n.to_string()).await;
    }
    assert_eq!(receiver.numbers(100).await, (0..100).collect::<Vec<_>>());
    for n in 100..150 {
        sender.send(&lane("receiver"), n.to_string()).await;
    }
    sender.barrier().await;
    process.kill();
    let process = Process::start(dir.path());
    let mut receiver = Client::connect(process.grpc, agent("receiver")).await.unwrap();
    let mut last = receiver.numbers(1).await[0];
    assert!(last <= 100, "nothing is skipped");
    while last < 149 {
        let next = receiver.numbers(1).await[0];
        assert_eq!(next, last + 1);
        last = next;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_long_queue_reaches_a_slow_reader_whole() {
    let dir = tempfile::tempdir().unwrap();
    let server = server(dir.path()).await;
    let grpc = server.addresses().grpc;
    let mut sender = Client::connect(grpc, agent("sender")).await.unwrap();
    for n in 0..100_000 {
        sender.send(&lane("slow"), n.to_string()).await;
    }
    sender.barrier().await;
    let mut slow = Client::connect(grpc, agent("slow")).await.unwrap();
    let mut bystander = Client::connect(grpc, agent("bystander")).await.unwrap();
    // While the slow one does not read, others are not delayed.
    sender.send(&lane("bystander"), "1").await;
    assert_eq!(bystander.numbers(1).await, [1]);
    assert_eq!(slow.numbers(100_000).await, (0..100_000).collect::<Vec<_>>());
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn whoever_read_some_gets_the_rest() {
    let dir = tempfile::tempdir().unwrap();
    let server = server(dir.path()).await;
    let grpc = server.addresses().grpc;
    let mut sender = Client::connect(grpc, agent("sender")).await.unwrap();
    let mut receiver = Client::connect(grpc, agent("receiver")).await.unwrap();
    for n in 0..20 {
        sender.send(&lane("receiver"), n.to_string()).await;
    }
    assert_eq!(receiver.numbers(20).await, (0..20).collect::<Vec<_>>());
    receiver.close().await;
    for n in 20..30 {
        sender.send(&lane("receiver"), n.to_string()).await;
    }
    sender.barrier().await;
    let mut receiver = Client::connect(grpc, agent("receiver")).await.unwrap();
    assert_eq!(receiver.numbers(10).await, (20..30).collect::<Vec<_>>());
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_message_with_a_name_is_delivered_once_and_its_errors_carry_it() {
    let dir = tempfile::tempdir().unwrap();
    let process = Process::start(dir.path());
    let named = |target: &str, key: &str, number: usize| {
        Up::Send(SendMessage {
            target_topic: target.into(),
            payload: number.to_string().into(),
            idempotency_key: key.into(),
            ..SendMessage::default()
        })
    };
    let mut sender = Client::connect(process.grpc, agent("sender")).await.unwrap();
    sender.put(named(&lane("one"), "a", 1)).await;
    sender.put(named(&lane("one"), "a", 1)).await;
    sender.put(named(&lane("one"), "b", 3)).await;
    sender.put(named("nowhere", "c", 4)).await;
    let error = sender.error().await;
    assert_eq!((error.code.as_str(), error.request_id.as_str()), ("ERR_INVALID_TOPIC", "c"));
    sender.put(named(&lane("one"), &"k".repeat(129), 5)).await;
    assert_eq!(sender.error().await.code, "ERR_INVALID_ARGUMENT");
    let reused = |error: trunkline_proto::v1::ErrorResponse| {
        assert_eq!((error.code.as_str(), error.request_id.as_str()), ("ERR_IDEMPOTENCY_KEY_REUSED", "a"));
        assert!(!error.retryable);
    };
    // Another message under that name is not the same one, and its sender hears so.
    sender.put(named(&lane("one"), "a", 2)).await;
    reused(sender.error().await);
    sender.barrier().await;
    process.kill();
    let process = Process::start(dir.path());
    // Whoever did not hear that it was durable sends it again; another's name is another's.
    let mut sender = Client::connect(process.grpc, agent("sender")).await.unwrap();
    let mut other = Client::connect(process.grpc, agent("other")).await.unwrap();
    sender.put(named(&lane("one"), "a", 1)).await;
    sender.barrier().await;
    sender.put(named(&lane("one"), "a", 6)).await;
    reused(sender.error().await);
    other.put(named(&lane("one"), "a", 7)).await;
    other.barrier().await;
    let mut one = Client::connect(process.grpc, agent("one")).await.unwrap();
    assert_eq!(one.numbers(3).await, [1, 3, 7]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_retention_removed_unread_is_told() {
    let dir = tempfile::tempdir().unwrap();
    let server = server(dir.path()).await;
    let grpc = server.addresses().grpc;
    let mut sender = Client::connect(grpc, agent("sender")).await.unwrap();
    for n in 0..3 {
        sender.send(&lane("away"), n.to_string()).await;
    }
    sender.barrier().await;
    let (log, topic) = (server.store().log.clone(), trunkline_store::log::Topic::new(&lane("away")).unwrap());
    let through = log.status(&topic).await.unwrap().tail;
    sender.send(&lane("away"), "3").await;
    sender.barrier().await;
    log.trim(&topic, through).await.unwrap();
    let mut away = Client::connect(grpc, agent("away")).await.unwrap();
    let error = away.error().await;
    assert_eq!(error.code, "ERR_HISTORY_TRIMMED");
    assert!(error.message.ends_with(&format!("through {through}")), "{}", error.message);
    assert_eq!(away.numbers(1).await, [3]);
    away.close().await;
    let mut away = Client::connect(grpc, agent("away")).await.unwrap();
    sender.send(&lane("away"), "4").await;
    assert_eq!(away.numbers(1).await, [4], "it is told once");
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn work_goes_to_every_task_where_that_is_set() {
    let dir = tempfile::tempdir().unwrap();
    let mut config = Config { data_dir: dir.path().to_owned(), dev: true, ..Config::on_free_ports() };
    config.messages.broadcast_tasks_in = vec!["w?".into()];
    let server = Server::start(config).await.unwrap();
    let grpc = server.addresses().grpc;
    let mut sender = Client::connect(grpc, agent("sender")).await.unwrap();
    sender.send("tb::ws::work", "0").await;
    sender.barrier().await;
    let mut one = Client::connect(grpc, worker()).await.unwrap();
    let mut other = Client::connect(grpc, worker()).await.unwrap();
    sender.send("tb::ws::work", "1").await;
    sender.send("tb::ws::work", "2").await;
    assert_eq!(one.numbers(2).await, [1, 2]);
    assert_eq!(other.numbers(2).await, [1, 2]);
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn work_waits_for_the_first_worker_and_survives_a_kill() {
    let dir = tempfile::tempdir().unwrap();
    let process = Process::start(dir.path());
    let mut sender = Client::connect(process.grpc, agent("sender")).await.unwrap();
    for n in 0..50 {
        sender.send("tb::ws::work", n.to_string()).await;
    }
    sender.barrier().await;
    process.kill();
    let process = Process::start(dir.path());
    let (mut one, mut other) = (
        Client::connect(process.grpc, worker()).await.unwrap(),
        Client::connect(process.grpc, worker()).await.unwrap(),
    );
    assert_ne!(one.ack.assigned_id, other.ack.assigned_id);
    let mut all = Vec::new();
    while all.len() < 50 {
        let frame = tokio::select! { frame = one.next() => frame, frame = other.next() => frame };
        match frame.unwrap() {
            Some(Down::Msg(message)) => {
                all.push(std::str::from_utf8(&message.payload).unwrap().parse::<usize>().unwrap());
            }
            Some(Down::Config(_)) => {}
            other => panic!("{other:?}"),
        }
    }
    all.sort_unstable();
    assert_eq!(all, (0..50).collect::<Vec<_>>(), "each once");
}

/// The client is told, by name, of each message that the disk had no room for; everything else arrives.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_full_disk_is_told_and_heals() {
    let dir = tempfile::tempdir().unwrap();
    let process = Process::start_on_a_small_disk(dir.path());
    let mut sender = Client::connect(process.grpc, agent("sender")).await.unwrap();
    let put = async |client: &mut Client, n: usize| {
        let message = SendMessage {
            target_topic: lane("away"),
            payload: format!("{n}{}", " ".repeat(512 * 1024)).into(),
            idempotency_key: n.to_string(),
            ..SendMessage::default()
        };
        client.put(Up::Send(message)).await;
        client.outcome().await
    };
    let mut sent = 0;
    let refused = loop {
        if let Some(error) = put(&mut sender, sent).await {
            break error;
        }
        sent += 1;
        assert!(sent < 1000, "the limit was never met");
    };
    assert_eq!((refused.code.as_str(), refused.request_id), ("ERR_PUBLISH_FAILED", sent.to_string()));
    assert!(refused.retryable && sent > 50, "after {sent}");
    process.make_room();
    while let Some(error) = put(&mut sender, sent).await {
        assert_eq!(error.code, "ERR_PUBLISH_FAILED");
        tokio::time::sleep(std::time::Duration::from_millis(20)).await;
    }
    let mut away = Client::connect(process.grpc, agent("away")).await.unwrap();
    let mut found = Vec::new();
    while found.last() != Some(&sent) {
        found.push(std::str::from_utf8(&away.message().await.payload).unwrap().trim_end().parse().unwrap());
    }
    assert_eq!(found, (0..=sent).collect::<Vec<usize>>());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn shared_work_that_fits_no_frame_is_told_of_once() {
    let dir = tempfile::tempdir().unwrap();
    let server = server(dir.path()).await;
    let grpc = server.addresses().grpc;
    let mut sender = Client::connect(grpc, agent("sender")).await.unwrap();
    sender.send("tb::ws::work", "0").await;
    sender.barrier().await;
    let topic = trunkline_store::log::Topic::new("tb::ws::work").unwrap();
    let large = trunkline_store::log::Append::new(&topic, vec![0; 5_000_000]);
    server.store().log.append(large).await.unwrap();
    sender.send("tb::ws::work", "1").await;
    sender.barrier().await;
    let mut one = Client::connect(grpc, worker()).await.unwrap();
    assert_eq!(one.numbers(1).await, [0]);
    assert_eq!(one.error().await.code, "ERR_MESSAGE_TOO_LARGE");
    assert_eq!(one.numbers(1).await, [1]);
    one.close().await;
    let mut other = Client::connect(grpc, worker()).await.unwrap();
    sender.send("tb::ws::work", "2").await;
    assert_eq!(other.numbers(1).await, [2]);
    server.stop().await;
}

//! Agents that are started because somebody wants them.

use trunkline_proto::v1::{CreateTaskRequest, TaskAssignmentMode as Mode, TaskStatus as Status};

use super::{named, orchestrator, pool, server, user};
use crate::client::{Client, agent};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_start_for_many_messages_and_another_when_it_has_failed() {
    let dir = tempfile::tempdir().unwrap();
    let server = server(dir.path()).await;
    let grpc = server.addresses().grpc;
    let mut first = Client::connect(grpc, orchestrator("one")).await.unwrap();
    first.register("bot").await;
    let mut senders = Vec::new();
    for n in 0..4 {
        senders.push(Client::connect(grpc, user(&n.to_string())).await.unwrap());
    }
    for _ in 0..25 {
        for sender in &senders {
            for agent in ["alice", "bob"] {
                sender.send(&format!("ag::ws::bot::{agent}"), "hello").await;
            }
            sender.send("ag::ws::unknown::x", "hello").await;
        }
    }
    let (a, b) = (first.assignment().await, first.assignment().await);
    let mut specifiers = [a.specifier.clone(), b.specifier.clone()];
    specifiers.sort();
    assert_eq!(specifiers, ["alice", "bob"]);
    assert_eq!(a.launch_params["a"], "1");
    // Alice comes with her token; the messages are all there.
    let (alice, bob) = if a.specifier == "alice" { (a, b) } else { (b, a) };
    let mut init = named("bot", "alice");
    init.credentials.insert("token".into(), alice.launch_params["auth_token"].clone());
    let mut agent = Client::connect(grpc, init).await.unwrap();
    for _ in 0..100 {
        agent.message().await;
    }
    assert_eq!(first.task(&alice.task_id).await.assigned_to, "ag::ws::bot::alice");
    // Bob's orchestrator does nothing: it is asked once more, and then the start has failed for good.
    assert_eq!(first.assignment().await.task_id, bob.task_id);
    let dead = first.becomes(&bob.task_id, Status::Failed).await;
    assert_eq!(dead.error, "the agent did not come after 2 launches");
    senders[0].send("ag::ws::bot::bob", "again").await;
    assert_ne!(first.assignment().await.task_id, bob.task_id);
    // Who says goodbye is done; a new message starts another.
    agent.close().await;
    first.becomes(&alice.task_id, Status::Completed).await;
    senders[0].send("ag::ws::bot::alice", "again").await;
    let again = first.assignment().await;
    assert_eq!(again.specifier, "alice");
    assert_ne!(again.task_id, alice.task_id);
    let mut late = named("bot", "alice");
    late.credentials.insert("token".into(), alice.launch_params["auth_token"].clone());
    let refused = Client::connect(grpc, late).await.err().unwrap();
    assert_eq!(refused.code(), tonic::Code::Unauthenticated, "its token ended with it");
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn starts_are_spread_and_wait_for_an_orchestrator() {
    let dir = tempfile::tempdir().unwrap();
    let server = server(dir.path()).await;
    let grpc = server.addresses().grpc;
    let mut one = Client::connect(grpc, orchestrator("one")).await.unwrap();
    one.register("bot").await;
    one.close().await;
    let sender = Client::connect(grpc, user("w")).await.unwrap();
    sender.send("ag::ws::bot::early", "hello").await;
    let mut one = Client::connect_when_free(grpc, orchestrator("one")).await;
    assert_eq!(one.assignment().await.specifier, "early");
    let mut two = Client::connect(grpc, orchestrator("two")).await.unwrap();
    for n in 0..5 {
        sender.send(&format!("ag::ws::bot::{n}"), "hello").await;
    }
    // With the one that it has, the first gets two more.
    for (orchestrator, count) in [(&mut one, 2), (&mut two, 3)] {
        for _ in 0..count {
            orchestrator.assignment().await;
        }
    }
    // Work for somebody who is being started already waits for it.
    let mut boss = Client::connect(grpc, agent("boss")).await.unwrap();
    let targeted = CreateTaskRequest {
        assignment_mode: Mode::Targeted.into(),
        target_agent_id: "ag::ws::bot::0".into(),
        ..pool()
    };
    let reply = boss.ask(targeted).await;
    assert_eq!((reply.success, reply.status.as_str()), (true, "orchestration_triggered"));
    let mut bot = Client::connect(grpc, named("bot", "0")).await.unwrap();
    assert_eq!(bot.assignment().await.task_id, reply.task_id);
    server.stop().await;
}

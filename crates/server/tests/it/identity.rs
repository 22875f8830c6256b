//! One connection an identity; a resumed one takes over at once.

use tonic::Code;
use trunkline_proto::v1::{
    InitConnection, SwitchWorkspace, UserIdentity, init_connection::ClientType, upstream_message::Payload as Up,
};

use crate::client::{Client, agent, lane, server, worker};

fn resume(specifier: &str, session: &str) -> InitConnection {
    InitConnection { resume_session_id: session.into(), ..agent(specifier) }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_duplicate_is_refused_and_the_holder_stays() {
    let dir = tempfile::tempdir().unwrap();
    let server = server(dir.path()).await;
    let grpc = server.addresses().grpc;
    let mut holder = Client::connect(grpc, agent("one")).await.unwrap();
    for init in [agent("one"), resume("one", "no such session")] {
        let refused = Client::connect(grpc, init).await.err().unwrap();
        assert_eq!(refused.code(), Code::AlreadyExists);
        let since = "DuplicateIdentityError: identity (ag::ws::impl::one) already connected since 20";
        assert!(refused.message().starts_with(since), "{}", refused.message());
        assert!(refused.message().contains("trunkline session disconnect"), "{}", refused.message());
    }
    holder.barrier().await;
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn resuming_takes_over_and_the_old_stream_ends() {
    let dir = tempfile::tempdir().unwrap();
    let server = server(dir.path()).await;
    let grpc = server.addresses().grpc;
    let mut sender = Client::connect(grpc, agent("sender")).await.unwrap();
    let first = Client::connect(grpc, agent("one")).await.unwrap();
    let (mut current, mut sent) = (first, 0);
    for round in 1..6 {
        let mut next = Client::connect(grpc, resume("one", &current.ack.session_id)).await.unwrap();
        assert!(next.ack.resumed);
        assert_eq!(next.ack.reconnection_count, round);
        assert_eq!(next.ack.initial_connection_unix_ms, current.ack.initial_connection_unix_ms);
        assert_ne!(next.ack.session_id, current.ack.session_id);
        assert_eq!(current.end().await, Some(Code::Cancelled));
        let spent = Client::connect(grpc, resume("one", &current.ack.session_id)).await.err().unwrap();
        assert_eq!(spent.code(), Code::AlreadyExists);
        // The old stream's end leaves the new one alone.
        for _ in 0..10 {
            sender.send(&lane("one"), sent.to_string()).await;
            sent += 1;
        }
        sender.barrier().await;
        assert_eq!(next.numbers(10).await, (sent - 10..sent).collect::<Vec<_>>());
        current = next;
    }
    let last = current.ack.session_id.clone();
    current.close().await;
    let fresh = Client::connect(grpc, resume("one", &last)).await.unwrap();
    assert!(!fresh.ack.resumed);
    assert_eq!(fresh.ack.reconnection_count, 0);
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_window_that_was_away_catches_up_on_its_workspace() {
    let dir = tempfile::tempdir().unwrap();
    let server = server(dir.path()).await;
    let grpc = server.addresses().grpc;
    let user = || {
        let user = UserIdentity { user_id: "alice".into(), window_id: "w".into() };
        InitConnection { client_type: Some(ClientType::User(user)), ..InitConnection::default() }
    };
    let switch = |to: &str| Up::SwitchWorkspace(SwitchWorkspace { new_workspace_id: to.into() }.into());
    let mut sender = Client::connect(grpc, agent("sender")).await.unwrap();
    sender.send("gu::ws", "0").await;
    sender.barrier().await;

    let mut window = Client::connect(grpc, user()).await.unwrap();
    window.put(switch("ws")).await;
    window.barrier().await;
    sender.send("gu::ws", "1").await;
    assert_eq!(window.numbers(1).await, [1], "nothing from before the first visit");
    window.put(switch("elsewhere")).await;
    window.barrier().await;
    sender.send("gu::ws", "2").await;
    sender.barrier().await;
    window.close().await;
    sender.send("uw::alice::ws", "3").await;
    sender.barrier().await;

    let mut window = Client::connect(grpc, user()).await.unwrap();
    window.put(switch("us")).await;
    window.put(switch("ws")).await;
    sender.send("gu::ws", "4").await;
    let mut numbers = Vec::new();
    let mut refusals = 0;
    while numbers.len() < 3 {
        match window.next().await.unwrap() {
            Some(trunkline_proto::v1::downstream_message::Payload::Msg(message)) => numbers.push(message.payload),
            Some(trunkline_proto::v1::downstream_message::Payload::Error(error)) => {
                assert_eq!(error.code, "ERR_WORKSPACE_SWITCH_FAILED");
                refusals += 1;
            }
            other => panic!("{other:?}"),
        }
    }
    assert_eq!(numbers, ["2", "3", "4"], "the gap once, in order");
    assert_eq!(refusals, 1, "a reserved word is no workspace");
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_worker_is_reached_under_the_id_of_its_session_too() {
    let dir = tempfile::tempdir().unwrap();
    let server = server(dir.path()).await;
    let grpc = server.addresses().grpc;
    let sender = Client::connect(grpc, agent("sender")).await.unwrap();
    let mut one = Client::connect(grpc, worker()).await.unwrap();
    assert!(!one.ack.assigned_id.is_empty());
    // The published Go client knows itself by it.
    assert_eq!(one.ack.session_id, one.ack.assigned_id);
    sender.send(&format!("ta::ws::work::{}", one.ack.session_id), "0").await;
    assert_eq!(one.numbers(1).await, [0]);
    server.stop().await;
}

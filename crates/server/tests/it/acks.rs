//! The acknowledgement extension: what a client is not done with comes again.

use std::{net::SocketAddr, time::Duration};

use tonic::Code;
use trunkline::{Config, Server};
use trunkline_client::Operator;
use trunkline_proto::{
    own::{Acknowledgement, Delivery},
    v1::{
        ExtensionDeclaration, InitConnection, SwitchWorkspace, UserIdentity, downstream_message::Payload as Down,
        init_connection::ClientType, upstream_message::Payload as Up,
    },
};

use crate::{
    client::{ACK_EXTENSION, Client, Line, agent, lane, server, worker},
    process::Process,
};

fn acknowledging(mut init: InitConnection) -> InitConnection {
    init.extensions = vec![ExtensionDeclaration { uri: ACK_EXTENSION.into(), required: true, ..Default::default() }];
    init
}

/// The next delivery, with the number in it.
async fn delivery(client: &mut Client) -> (Delivery, usize) {
    loop {
        let frame = client.frame().await;
        if let Some(Down::Msg(message)) = frame.payload {
            let number = std::str::from_utf8(&message.payload).unwrap().parse().unwrap();
            return (frame.delivery.expect("every delivery has its place"), number);
        }
    }
}

async fn acknowledge(client: &Client, through: u64, shared: &[u64]) {
    client.put(Up::Acknowledgement(Acknowledgement { through, shared: shared.to_vec() }.into())).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_client_that_dies_between_delivery_and_acknowledgement_gets_it_again() {
    let dir = tempfile::tempdir().unwrap();
    let server = server(dir.path()).await;
    let grpc = server.addresses().grpc;
    let mut sender = Client::connect(grpc, agent("sender")).await.unwrap();
    for n in 0..10 {
        sender.send(&lane("one"), n.to_string()).await;
    }
    sender.barrier().await;
    for first in [0, 4, 8] {
        let mut one = Client::connect_when_free(grpc, acknowledging(agent("one"))).await;
        assert!(one.ack.negotiated_extensions[0].supported);
        let mut places = Vec::new();
        for n in first..10 {
            let (delivery, number) = delivery(&mut one).await;
            assert_eq!((number, delivery.shared), (n, false));
            places.push(delivery.offset);
        }
        assert!(places.is_sorted());
        // It was given all of them, is done with four or less, and dies.
        if let Some(through) = places.get(3) {
            acknowledge(&one, *through, &[]).await;
            one.barrier().await;
        }
        drop(one);
    }
    // Nobody else's deliveries carry anything.
    let mut plain = Client::connect_when_free(grpc, agent("one")).await;
    while let Some(frame) = Some(plain.frame().await) {
        assert_eq!(frame.delivery, None);
        if matches!(frame.payload, Some(Down::Msg(_))) {
            break;
        }
    }
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn acknowledgements_survive_a_kill_of_the_server_or_are_repeated() {
    let dir = tempfile::tempdir().unwrap();
    let process = Process::start(dir.path());
    let sender = Client::connect(process.grpc, agent("sender")).await.unwrap();
    let mut one = Client::connect(process.grpc, acknowledging(agent("one"))).await.unwrap();
    for n in 0..20 {
        sender.send(&lane("one"), n.to_string()).await;
    }
    let mut last = 0;
    for n in 0..10 {
        let (delivery, number) = delivery(&mut one).await;
        assert_eq!(number, n);
        last = delivery.offset;
    }
    acknowledge(&one, last, &[]).await;
    one.barrier().await;
    process.kill();
    let process = Process::start(dir.path());
    let mut one = Client::connect(process.grpc, acknowledging(agent("one"))).await.unwrap();
    let (_, mut number) = delivery(&mut one).await;
    assert!(number <= 10, "nothing is skipped");
    while number < 19 {
        let (_, next) = delivery(&mut one).await;
        assert_eq!(next, number + 1);
        number = next;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn shared_work_that_was_not_acknowledged_goes_to_others() {
    let dir = tempfile::tempdir().unwrap();
    let server = server(dir.path()).await;
    let grpc = server.addresses().grpc;
    let mut sender = Client::connect(grpc, agent("sender")).await.unwrap();
    let mut one = Client::connect(grpc, acknowledging(worker())).await.unwrap();
    for n in 0..6 {
        sender.send("tb::ws::work", n.to_string()).await;
    }
    sender.barrier().await;
    let mut places = Vec::new();
    for n in 0..6 {
        let (delivery, number) = delivery(&mut one).await;
        assert_eq!((number, delivery.shared), (n, true));
        places.push(delivery.offset);
    }
    acknowledge(&one, 0, &[places[1], places[4], u64::MAX]).await;
    one.barrier().await;
    let mut other = Client::connect(grpc, worker()).await.unwrap();
    drop(one);
    let mut rest = other.numbers(4).await;
    rest.sort_unstable();
    assert_eq!(rest, [0, 2, 3, 5]);
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn lies_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let server = server(dir.path()).await;
    let grpc = server.addresses().grpc;
    let mut one = Client::connect(grpc, acknowledging(agent("one"))).await.unwrap();
    acknowledge(&one, 77, &[]).await;
    assert_eq!(one.error().await.code, "ERR_INVALID_ARGUMENT");
    let mut plain = Client::connect(grpc, agent("plain")).await.unwrap();
    acknowledge(&plain, 0, &[]).await;
    assert_eq!(plain.error().await.code, "ERR_EXTENSION_UNSUPPORTED");
    assert_eq!(plain.ack.server_supported_extensions, [ACK_EXTENSION]);
    server.stop().await;
}

/// The history of a workspace that a user comes back to lies behind what the user got elsewhere.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn history_of_a_workspace_is_not_lost_when_the_user_leaves_before_it_came() {
    let dir = tempfile::tempdir().unwrap();
    let server = server(dir.path()).await;
    let grpc = server.addresses().grpc;
    let user = || {
        let user = UserIdentity { user_id: "ann".into(), window_id: "1".into() };
        acknowledging(InitConnection { client_type: Some(ClientType::User(user)), ..InitConnection::default() })
    };
    let switch = |to: &str| Up::SwitchWorkspace(SwitchWorkspace { new_workspace_id: to.into() }.into());
    let sender = Client::connect(grpc, agent("sender")).await.unwrap();
    let mut ann = Client::connect(grpc, user()).await.unwrap();
    ann.put(switch("ws")).await;
    ann.barrier().await;
    ann.put(switch("")).await;
    ann.barrier().await;
    for n in 0..5 {
        sender.send("uw::ann::ws", n.to_string()).await;
    }
    sender.send("us::ann::1", "100").await;
    let (elsewhere, number) = delivery(&mut ann).await;
    assert_eq!(number, 100);
    acknowledge(&ann, elsewhere.offset, &[]).await;
    ann.put(switch("ws")).await;
    for n in 0..5 {
        let (history, number) = delivery(&mut ann).await;
        assert!(number == n && history.offset < elsewhere.offset);
        if n == 1 {
            acknowledge(&ann, history.offset, &[]).await;
        }
    }
    ann.barrier().await;
    ann.close().await;
    let mut ann = Client::connect(grpc, user()).await.unwrap();
    ann.put(switch("ws")).await;
    for n in 2..5 {
        assert_eq!(delivery(&mut ann).await.1, n);
    }
    server.stop().await;
}

async fn giving_up(dir: &std::path::Path) -> Server {
    let mut config = Config { data_dir: dir.to_owned(), dev: true, ..Config::on_free_ports() };
    config.messages.lost_sessions_max = 3;
    Server::start(config).await.unwrap()
}

async fn operator(server: &Server) -> Operator {
    Operator::builder().address(server.addresses().grpc.to_string()).connect().await.unwrap()
}

/// A client that can die without a goodbye: by cutting its line.
async fn mortal(grpc: SocketAddr, init: InitConnection) -> (Client, Line) {
    loop {
        let line = Line::to(grpc).await;
        match Client::connect(line.grpc, init.clone()).await {
            Ok(client) => return (client, line),
            // The one before has just died.
            Err(taken) => assert_eq!(taken.code(), Code::AlreadyExists),
        }
    }
}

/// Connects, is given everything up to `last`, is done with what comes before `first`, and dies.
async fn die_over(grpc: SocketAddr, init: InitConnection, first: usize, last: usize) {
    let (mut client, line) = mortal(grpc, acknowledging(init)).await;
    let mut done = None;
    loop {
        let (delivery, number) = delivery(&mut client).await;
        done = if number < first { Some(delivery.offset) } else { done };
        if number == last {
            break;
        }
    }
    if let Some(through) = done {
        acknowledge(&client, through, &[]).await;
        client.barrier().await;
    }
    line.cut().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_message_that_its_clients_die_of_is_a_dead_letter_until_it_is_retried() {
    let dir = tempfile::tempdir().unwrap();
    let mut server = giving_up(dir.path()).await;
    let mut sender = Client::connect(server.addresses().grpc, agent("sender")).await.unwrap();
    for n in 0..4 {
        sender.send(&lane("one"), n.to_string()).await;
    }
    sender.barrier().await;
    die_over(server.addresses().grpc, agent("one"), 1, 3).await;
    die_over(server.addresses().grpc, agent("one"), 0, 3).await;
    // What was counted is known to the next process, and a server that stops is no client that died.
    let one = Client::connect_when_free(server.addresses().grpc, acknowledging(agent("one"))).await;
    server.stop().await;
    drop(one);
    server = giving_up(dir.path()).await;
    let operator = operator(&server).await;
    // Nor is one that says goodbye.
    let mut one = Client::connect(server.addresses().grpc, acknowledging(agent("one"))).await.unwrap();
    assert_eq!(delivery(&mut one).await.1, 1);
    one.close().await;
    assert!(operator.dead_letters("", None).await.unwrap().is_empty());
    die_over(server.addresses().grpc, agent("one"), 0, 3).await;
    let mut one = Client::connect_when_free(server.addresses().grpc, acknowledging(agent("one"))).await;
    for n in 2..4 {
        let (delivery, number) = delivery(&mut one).await;
        assert_eq!(number, n);
        acknowledge(&one, delivery.offset, &[]).await;
    }
    let dead = operator.dead_letters("", None).await.unwrap();
    assert_eq!(dead, operator.dead_letters(&lane("one"), None).await.unwrap());
    assert!(operator.dead_letters(&lane("sender"), None).await.unwrap().is_empty());
    let [letter] = &dead[..] else { panic!("{dead:?}") };
    assert!(operator.dead_letters("", Some(&letter.id)).await.unwrap().is_empty());
    assert_eq!((&letter.owner, &letter.topic, letter.lost_sessions), (&lane("one"), &lane("one"), 3));
    assert!(letter.payload.is_empty() && letter.size > 1 && letter.sent_at_ms > 0 && letter.dead_at > 0);
    assert_eq!((&letter.source_topic, &*letter.workspace), (&lane("sender"), "ws"));
    let whole = operator.dead_letter(&*letter.id).await.unwrap();
    assert_eq!((&whole.payload[..], &whole.source_topic, &*whole.workspace), (&b"1"[..], &lane("sender"), "ws"));
    // Once.
    operator.retry_dead_letter(&*letter.id).await.unwrap();
    assert_eq!(delivery(&mut one).await.1, 1);
    for refused in
        [operator.retry_dead_letter(&*letter.id).await.map(drop), operator.remove_dead_letter(&*letter.id).await]
    {
        assert_eq!(refused.unwrap_err().kind(), trunkline_client::Kind::NotFound);
    }
    assert!(operator.dead_letters("", None).await.unwrap().is_empty());
    assert_eq!(operator.dead_letter("x").await.unwrap_err().kind(), trunkline_client::Kind::Invalid);
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_client_that_goes_on_with_its_session_has_not_died() {
    let dir = tempfile::tempdir().unwrap();
    let server = giving_up(dir.path()).await;
    let grpc = server.addresses().grpc;
    let mut sender = Client::connect(grpc, agent("sender")).await.unwrap();
    sender.send(&lane("one"), "7").await;
    sender.barrier().await;
    let mut session = String::new();
    for _ in 0..6 {
        let resumes = InitConnection { resume_session_id: session.clone(), ..acknowledging(agent("one")) };
        let (mut one, line) = mortal(grpc, resumes).await;
        assert_eq!(delivery(&mut one).await.1, 7);
        session.clone_from(&one.ack.session_id);
        line.cut().await;
    }
    assert!(operator(&server).await.dead_letters("", None).await.unwrap().is_empty());
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn shared_work_that_its_tasks_die_of_is_a_dead_letter_and_the_rest_is_done() {
    let dir = tempfile::tempdir().unwrap();
    let server = giving_up(dir.path()).await;
    let grpc = server.addresses().grpc;
    let mut sender = Client::connect(grpc, agent("sender")).await.unwrap();
    for n in 0..3 {
        sender.send("tb::ws::work", n.to_string()).await;
    }
    sender.barrier().await;
    let operator = operator(&server).await;
    // Any task dies of 0, and does the others.
    for _ in 0..3 {
        let (mut one, line) = mortal(grpc, acknowledging(worker())).await;
        loop {
            let (delivery, number) = delivery(&mut one).await;
            if number == 0 {
                break;
            }
            acknowledge(&one, 0, &[delivery.offset]).await;
            one.barrier().await;
        }
        line.cut().await;
    }
    let begun = std::time::Instant::now();
    let letter = loop {
        if let Some(letter) = operator.dead_letters("tb::ws::work", None).await.unwrap().pop() {
            break letter;
        }
        assert!(begun.elapsed() < Duration::from_secs(10), "no dead letter");
        tokio::time::sleep(Duration::from_millis(10)).await;
    };
    assert_eq!((letter.lost_sessions, &*letter.topic), (3, "tb::ws::work"));
    let mut one = Client::connect(grpc, acknowledging(worker())).await.unwrap();
    operator.retry_dead_letter(letter.id).await.unwrap();
    let mut left = Vec::new();
    while left.last() != Some(&0) {
        left.push(delivery(&mut one).await.1);
    }
    assert!(left.len() <= 3, "{left:?}");
    server.stop().await;
}

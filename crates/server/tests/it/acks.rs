//! The acknowledgement extension: what a client is not done with comes again.

use trunkline_proto::{
    own::{Acknowledgement, Delivery},
    v1::{
        ExtensionDeclaration, InitConnection, SwitchWorkspace, UserIdentity, downstream_message::Payload as Down,
        init_connection::ClientType, upstream_message::Payload as Up,
    },
};

use crate::{
    client::{ACK_EXTENSION, Client, agent, lane, server, worker},
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

//! Where a client goes on after the server was killed: nothing that was said meanwhile is missed, and nothing that it had a moment
//! before comes again.

use std::time::Duration;

use trunkline_proto::v1::{
    InitConnection, ProgressReport, ServiceIdentity, SwitchWorkspace, UserIdentity,
    downstream_message::Payload as Down, init_connection::ClientType, upstream_message::Payload as Up,
};

use crate::{
    client::{Client, agent, lane, worker},
    process::Process,
};

/// Within this, positions of a client that nothing is delivered to are durable: the promise is 50 ms, and this machine has other work.
const SAVED_WITHIN: Duration = Duration::from_secs(2);

fn window() -> InitConnection {
    let user = UserIdentity { user_id: "ann".into(), window_id: "w1".into() };
    InitConnection { client_type: Some(ClientType::User(user)), ..InitConnection::default() }
}

fn service() -> InitConnection {
    let service =
        ServiceIdentity { implementation: "mail".into(), specifier: "1".into(), ..ServiceIdentity::default() };
    InitConnection { client_type: Some(ClientType::Service(service)), ..InitConnection::default() }
}

fn report(recipient: &str, summary: &str) -> Up {
    let (recipient, summary) = (recipient.to_owned(), summary.to_owned());
    Up::Progress(Box::new(ProgressReport { recipient, summary, ..ProgressReport::default() }))
}

async fn switch(client: &mut Client) {
    client.put(Up::SwitchWorkspace(SwitchWorkspace { new_workspace_id: "ws".into() }.into())).await;
    client.barrier().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_window_that_was_given_nothing_misses_nothing_after_a_kill() {
    let dir = tempfile::tempdir().unwrap();
    let process = Process::start(dir.path());
    let mut ann = Client::connect(process.grpc, window()).await.unwrap();
    switch(&mut ann).await;
    let reader = Client::connect(process.grpc, agent("reader")).await.unwrap();
    process.kill();
    drop((ann, reader));
    let process = Process::start(dir.path());
    let mut one = Client::connect(process.grpc, agent("one")).await.unwrap();
    let mut mail = Client::connect(process.grpc, service()).await.unwrap();
    mail.send("uu::ann", "to all windows").await;
    mail.barrier().await;
    for target in ["gu::ws", "uw::ann::ws"] {
        one.send(target, target).await;
    }
    one.put(report("us::ann", "for ann")).await;
    one.put(report("", "for all of ws")).await;
    one.barrier().await;
    let mut ann = Client::connect(process.grpc, window()).await.unwrap();
    switch_and_hear(&mut ann).await;
    let mut reader = Client::connect(process.grpc, agent("reader")).await.unwrap();
    loop {
        match reader.next().await.unwrap().unwrap() {
            Down::Config(_) => {}
            Down::ProgressUpdate(update) => break assert_eq!(update.summary, "for all of ws"),
            other => panic!("{other:?}"),
        }
    }
}

/// All that was said while the window was away, in any order between lanes.
async fn switch_and_hear(ann: &mut Client) {
    ann.put(Up::SwitchWorkspace(SwitchWorkspace { new_workspace_id: "ws".into() }.into())).await;
    let mut heard = Vec::new();
    while heard.len() < 5 {
        heard.push(match ann.next().await.unwrap().unwrap() {
            Down::Msg(message) => String::from_utf8(message.payload.to_vec()).unwrap(),
            Down::ProgressUpdate(update) => update.summary,
            other => panic!("{other:?}"),
        });
    }
    heard.sort();
    assert_eq!(heard, ["for all of ws", "for ann", "gu::ws", "to all windows", "uw::ann::ws"]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_was_delivered_a_moment_before_a_kill_does_not_come_again() {
    let dir = tempfile::tempdir().unwrap();
    let process = Process::start(dir.path());
    let mut one = Client::connect(process.grpc, agent("one")).await.unwrap();
    let mut task = Client::connect(process.grpc, worker()).await.unwrap();
    one.send(&lane("one"), "1").await;
    one.send("tb::ws::work", "1").await;
    assert_eq!((one.numbers(1).await, task.numbers(1).await), (vec![1], vec![1]));
    // Nothing tells a client that its position was saved.
    tokio::time::sleep(SAVED_WITHIN).await;
    process.kill();
    let process = Process::start(dir.path());
    let mut one = Client::connect(process.grpc, agent("one")).await.unwrap();
    let mut task = Client::connect(process.grpc, worker()).await.unwrap();
    one.send(&lane("one"), "2").await;
    one.send("tb::ws::work", "2").await;
    assert_eq!((one.numbers(1).await, task.numbers(1).await), (vec![2], vec![2]));
}

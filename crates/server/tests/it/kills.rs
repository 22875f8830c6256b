//! The server is killed again and again under load; its clients come back by themselves, and nothing that was durable is
//! lost or out of order.

use std::{net::SocketAddr, time::Duration};

use tokio::sync::watch;
use trunkline_proto::v1::{
    CheckpointOperation, InitConnection, SendMessage, UpstreamMessage, checkpoint_operation::OpType,
    downstream_message::Payload as Down, upstream_message::Payload as Up,
};

use crate::{
    client::{Client, agent, lane},
    process::Process,
};

const KILLS: usize = 50;
const PAIRS: usize = 4;

/// Messages of one sender between two kills, at least.
const PER_KILL: usize = 400;

/// Messages between two questions whether all of them are durable.
const PER_BARRIER: usize = 40;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn fifty_kills_under_load_lose_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let free = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let mut process = Process::start_on(dir.path(), free);
    let (enough, stopping) = watch::channel(false);
    let mut senders = Vec::new();
    let mut receivers = Vec::new();
    let mut progress = Vec::new();
    for pair in 0..PAIRS {
        let (seen, watching) = watch::channel(0);
        progress.push(watching);
        senders.push(tokio::spawn(send(free, pair, stopping.clone())));
        receivers.push(tokio::spawn(receive(free, pair, seen)));
    }
    let mut goal = 0;
    for _ in 0..KILLS {
        goal += PER_KILL;
        for watching in &mut progress {
            watching.wait_for(|seen| *seen >= goal).await.unwrap();
        }
        // In the middle of whatever they do now.
        process.kill();
        process = Process::start_on(dir.path(), free);
    }
    enough.send(true).unwrap();
    for (pair, (sender, watching)) in senders.into_iter().zip(&mut progress).enumerate() {
        let durable = sender.await.unwrap();
        let all = watching.wait_for(|seen| *seen >= durable);
        let arrived = tokio::time::timeout(Duration::from_secs(30), all).await;
        assert!(arrived.is_ok(), "pair {pair}: {durable} are durable");
    }
    for receiver in receivers {
        assert!(!receiver.is_finished(), "a receiver found a gap");
        receiver.abort();
    }
}

/// Numbers from 0 on, each again until it is known to be durable; answers how many are.
pub(crate) async fn send(grpc: SocketAddr, pair: usize, stopping: watch::Receiver<bool>) -> usize {
    let mut durable = 0;
    while !*stopping.borrow() {
        let Ok(mut client) = reconnect(grpc, agent(&format!("s{pair}"))).await else { continue };
        while !*stopping.borrow() && batch(&mut client, pair, durable).await.is_some() {
            durable += PER_BARRIER;
        }
    }
    durable
}

/// `None` if the connection ended before all of it was known to be durable.
async fn batch(client: &mut Client, pair: usize, from: usize) -> Option<()> {
    for n in from..from + PER_BARRIER {
        let target_topic = lane(&format!("r{pair}"));
        let send = SendMessage { target_topic, payload: n.to_string().into(), ..SendMessage::default() };
        client.offer(Up::Send(send)).await?;
    }
    let load = CheckpointOperation { op: OpType::Load.into(), key: "b".into(), ..CheckpointOperation::default() };
    client.offer(Up::CheckpointOp(load.into())).await?;
    loop {
        match client.next().await.ok()?? {
            Down::Checkpoint(_) => return Some(()),
            // Whatever was not durable is refused before the barrier is answered.
            Down::Error(_) => return None,
            _ => {}
        }
    }
}

/// Tells how far the numbers are complete. They may come again, after the sender or the receiver came back; none may be
/// missing, and none may come before the one before it.
pub(crate) async fn receive(grpc: SocketAddr, pair: usize, seen: watch::Sender<usize>) {
    let mut complete = 0;
    loop {
        let Ok(mut client) = reconnect(grpc, agent(&format!("r{pair}"))).await else { continue };
        while let Ok(Some(frame)) = client.next().await {
            if let Down::Msg(message) = frame {
                let number: usize = std::str::from_utf8(&message.payload).unwrap().parse().unwrap();
                assert!(number <= complete, "pair {pair}: {number} came, and {complete} did not");
                complete = complete.max(number + 1);
                seen.send_replace(complete);
            }
        }
    }
}

/// As a client that comes back by itself: again and again, with a pause.
async fn reconnect(grpc: SocketAddr, init: InitConnection) -> Result<Client, ()> {
    let connected = Client::connect(grpc, init).await;
    if connected.is_err() {
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    connected.map_err(drop)
}

impl Client {
    /// As [`Client::put`], for a connection that may be gone.
    async fn offer(&self, payload: Up) -> Option<()> {
        self.raw(UpstreamMessage { payload: Some(payload), ..UpstreamMessage::default() }).await
    }
}

//! Raw streams that come back as the published Go and TypeScript clients do, after what may happen to a server or to a wire. The
//! published Python clients have the same stories in `conformance/trunkline`.

use std::{
    net::{SocketAddr, TcpListener},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering::Relaxed},
    },
    time::Duration,
};

use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
    sync::watch,
    task::JoinSet,
    time::timeout,
};
use tonic::{Code, Status};
use trunkline_proto::v1::{
    InitConnection, TaskIdentity, UserIdentity, downstream_message::Payload as Down, init_connection::ClientType,
};

use super::{Upgradable, activated};
use crate::client::{Client, agent};

/// The published clients wait 1 s before their first attempt, and up to a quarter more.
const BACKOFF: Duration = Duration::from_secs(1);

/// Longest time in which one of them is back and has heard all.
const BACK: Duration = Duration::from_secs(10);

/// How often each thing happens.
const ROUNDS: usize = 3;

/// How a client takes the end of its stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Sdk {
    /// Gives up after five attempts in a row, and on codes that no other attempt would change.
    Go,
    /// Comes again for ever, whatever the end was.
    TypeScript,
}

impl Sdk {
    fn gives_up(self, status: &Status, attempts: u32) -> bool {
        use Code::{AlreadyExists, InvalidArgument, NotFound, PermissionDenied, Unauthenticated, Unimplemented};
        let last = [Unauthenticated, PermissionDenied, AlreadyExists, InvalidArgument, NotFound, Unimplemented];
        self == Self::Go && (attempts >= 5 || last.contains(&status.code()))
    }
}

/// Ends only by giving up.
async fn client(sdk: Sdk, address: SocketAddr, mut init: InitConnection, heard: watch::Sender<Vec<usize>>) {
    let mut attempts = 0;
    loop {
        let ended = match Client::connect(address, init.clone()).await {
            Ok(mut client) => {
                attempts = 0;
                init.resume_session_id.clone_from(&client.ack.session_id);
                loop {
                    match client.next_whenever().await {
                        Ok(Some(Down::Msg(message))) => {
                            let number = std::str::from_utf8(&message.payload).unwrap().parse().unwrap();
                            heard.send_modify(|heard| heard.push(number));
                        }
                        Ok(Some(_)) => {}
                        Ok(None) => break Status::ok(""),
                        Err(status) => break status,
                    }
                }
            }
            Err(status) => status,
        };
        attempts += 1;
        assert!(!sdk.gives_up(&ended, attempts), "{sdk:?} stays away: {ended}");
        tokio::time::sleep(BACKOFF * 2_u32.pow(attempts - 1)).await;
    }
}

/// A relay of which each direction can be broken: it discards what comes, and neither end notices.
pub(crate) struct Wire {
    pub(crate) address: SocketAddr,
    is_broken: Arc<[AtomicBool; 2]>,
    connections: Arc<AtomicUsize>,
    cut: watch::Sender<()>,
    _relay: JoinSet<()>,
}

pub(crate) const UP: usize = 0;
pub(crate) const DOWN: usize = 1;

impl Wire {
    pub(crate) fn to(server: SocketAddr) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        listener.set_nonblocking(true).unwrap();
        let listener = tokio::net::TcpListener::from_std(listener).unwrap();
        let (cut, is_broken) = (watch::channel(()).0, Arc::new([AtomicBool::new(false), AtomicBool::new(false)]));
        let (cutting, broken, connections) = (cut.clone(), is_broken.clone(), Arc::new(AtomicUsize::new(0)));
        let counts = connections.clone();
        let relay = async move {
            let mut connections = JoinSet::new();
            loop {
                let (client, _) = listener.accept().await.unwrap();
                counts.fetch_add(1, Relaxed);
                let (broken, mut cut) = (broken.clone(), cutting.subscribe());
                connections.spawn(async move {
                    let Ok(server) = TcpStream::connect(server).await else { return };
                    let ((mut from_client, mut to_client), (mut from_server, mut to_server)) =
                        (client.into_split(), server.into_split());
                    tokio::select! {
                        () = relay(&mut from_client, &mut to_server, &broken[UP]) => {}
                        () = relay(&mut from_server, &mut to_client, &broken[DOWN]) => {}
                        _ = cut.changed() => {}
                    }
                });
            }
        };
        Self { address, is_broken, connections, cut, _relay: JoinSet::from_iter([relay]) }
    }

    /// How many there were.
    pub(crate) fn connections(&self) -> usize {
        self.connections.load(Relaxed)
    }

    /// What comes from now on arrives.
    pub(crate) fn heals(&self) {
        self.is_broken.iter().for_each(|direction| direction.store(false, Relaxed));
    }

    pub(crate) fn breaks(&self, direction: usize) {
        self.is_broken[direction].store(true, Relaxed);
    }

    /// Ends the connections that there are; new ones are whole.
    fn cut(&self) {
        self.cut.send_replace(());
        self.heals();
    }
}

async fn relay(
    from: &mut tokio::net::tcp::OwnedReadHalf,
    to: &mut tokio::net::tcp::OwnedWriteHalf,
    is_broken: &AtomicBool,
) {
    let mut buffer = vec![0; 64 * 1024];
    while let Ok(bytes @ 1..) = from.read(&mut buffer).await {
        if !is_broken.load(Relaxed) && to.write_all(&buffer[..bytes]).await.is_err() {
            return;
        }
    }
}

/// Who listens, and what they have heard.
struct Cast {
    topics: Vec<String>,
    heard: Vec<(String, watch::Receiver<Vec<usize>>)>,
    clients: JoinSet<()>,
    sent: usize,
}

impl Cast {
    /// Under names that end alike.
    fn connect(address: SocketAddr, suffix: &str) -> Self {
        let mut cast = Self { topics: Vec::new(), heard: Vec::new(), clients: JoinSet::new(), sent: 0 };
        for sdk in [Sdk::Go, Sdk::TypeScript] {
            let name = format!("{sdk:?}-{suffix}").to_lowercase();
            let task =
                TaskIdentity { workspace: "ws".into(), implementation: "impl".into(), unique_specifier: name.clone() };
            let user = UserIdentity { user_id: name.clone(), window_id: "window".into() };
            let init = |client_type| InitConnection { client_type: Some(client_type), ..InitConnection::default() };
            for (topic, init) in [
                (format!("ag::ws::impl::{name}"), agent(&name)),
                (format!("tu::ws::impl::{name}"), init(ClientType::Task(task))),
                (format!("us::{name}::window"), init(ClientType::User(user))),
            ] {
                let (hears, heard) = watch::channel(Vec::new());
                cast.heard.push((format!("{sdk:?} at {topic}"), heard));
                cast.topics.push(topic);
                cast.clients.spawn(client(sdk, address, init, hears));
            }
        }
        cast
    }

    /// Sends a number to all; returns when it is durable.
    async fn send(&mut self, grpc: SocketAddr) {
        let mut sender = Client::connect_when_free(grpc, agent("sender")).await;
        for topic in &self.topics {
            sender.send(topic, self.sent.to_string()).await;
        }
        sender.barrier().await;
        sender.close().await;
        self.sent += 1;
    }

    /// Returns when all have heard all, in time.
    async fn all_heard(&mut self) {
        let sent = self.sent;
        let has_all = |heard: &Vec<usize>| (0..sent).all(|number| heard.contains(&number));
        for (who, heard) in &mut self.heard {
            let all = timeout(BACK, heard.wait_for(has_all)).await.is_ok_and(|open| open.is_ok());
            assert!(all, "{who} heard {:?} of {sent}", heard.borrow());
        }
        assert!(self.clients.try_join_next().is_none(), "one of them stays away");
    }

    fn heard_at_most(&self, doubles: usize) {
        for (who, heard) in &self.heard {
            let heard = heard.borrow();
            assert!(heard.len() <= self.sent + doubles, "{who} heard {heard:?} of {}", self.sent);
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn clients_are_back_after_a_kill_a_restart_and_an_upgrade() {
    let dir = tempfile::tempdir().unwrap();
    let sockets = [(); 3].map(|()| TcpListener::bind("127.0.0.1:0").unwrap());
    let start = || Upgradable::start(activated(dir.path(), &sockets, "grpc:http:ops"));
    let mut server = start();
    let grpc = server.grpc;
    let mut cast = Cast::connect(grpc, "one");
    cast.send(grpc).await;
    cast.all_heard().await;
    for round in 0..ROUNDS {
        for signal in ["TERM", "USR2", "KILL"] {
            // Just before, so that it may be under way.
            cast.send(grpc).await;
            server.signal(signal);
            server = match signal {
                "USR2" => tokio::task::spawn_blocking(move || server.upgraded()).await.unwrap(),
                _ => {
                    server.child.wait().unwrap();
                    start()
                }
            };
            cast.send(grpc).await;
            cast.all_heard().await;
            // Only a kill repeats, and only what was heard less than 50 ms before it: the last number, and the one before.
            cast.heard_at_most(2 * if signal == "KILL" { round + 1 } else { round });
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn clients_miss_nothing_of_a_wire_that_broke_in_one_direction() {
    let dir = tempfile::tempdir().unwrap();
    let server = crate::client::server(dir.path()).await;
    let grpc = server.addresses().grpc;
    for (direction, name) in [(UP, "up"), (DOWN, "down")] {
        let wire = Wire::to(grpc);
        let mut cast = Cast::connect(wire.address, name);
        cast.send(grpc).await;
        cast.all_heard().await;
        for _ in 0..ROUNDS {
            wire.breaks(direction);
            for _ in 0..5 {
                cast.send(grpc).await;
            }
            wire.cut();
            cast.send(grpc).await;
            cast.all_heard().await;
            // Until the server knows it, too.
            tokio::time::sleep(Duration::from_millis(300)).await;
        }
        // What was heard and could not be answered for comes again.
        cast.heard_at_most(if direction == UP { cast.sent } else { 0 });
    }
    server.stop().await;
}

//! A hundred clients of all kinds while connections are cut at random and the server is killed and started again: nothing that was
//! confirmed is lost or reordered for handlers that acknowledge, no task is leaked, and memory stays flat.
//!
//! Short as a test; `cargo xtask faults` makes it ten minutes.

#![allow(
    clippy::disallowed_methods,
    clippy::expect_used,
    clippy::panic,
    clippy::print_stdout,
    clippy::unwrap_used,
    reason = "test code"
)]

use std::{
    collections::{BTreeMap, HashMap},
    io::{BufRead as _, BufReader},
    net::SocketAddr,
    process::{Child, Command, Stdio},
    sync::{
        Arc, Mutex,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    time::{Duration, Instant},
};

use tokio::{
    net::{TcpListener, TcpStream},
    task::{AbortHandle, JoinSet},
};
use trunkline_client::{
    AccessLevel, Agent, Bridge, Builder, Client, Error, Message, MetricsBridge, Orchestrator, Outgoing, Principal,
    Reconnect, Service, Topic, UniqueTask, User, Worker, WorkflowEngine, proto::AclGrantRequest,
};

/// Set for the copy of this program that is the server.
const DIR: &str = "TRUNKLINE_FAULTS_DIR";
const PORT: &str = "TRUNKLINE_FAULTS_PORT";

/// How long the faults go on.
const SECONDS: &str = "TRUNKLINE_FAULTS_SECONDS";

/// Nothing takes longer once the faults are over.
const PATIENCE: Duration = Duration::from_secs(90);

fn main() {
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().unwrap();
    if std::env::var_os(DIR).is_some() {
        return runtime.block_on(serve());
    }
    let seconds = std::env::var(SECONDS).map_or(20, |seconds| seconds.parse().unwrap());
    runtime.block_on(run(Duration::from_secs(seconds)));
    println!("test result: ok");
}

async fn serve() {
    let mut config = trunkline::Config {
        data_dir: std::env::var(DIR).unwrap().into(),
        dev: true,
        ..trunkline::Config::on_free_ports()
    };
    config.listen.grpc = format!("127.0.0.1:{}", std::env::var(PORT).unwrap()).parse().unwrap();
    config.limits.messages_per_second = 0;
    let server = trunkline::Server::start(config).await.unwrap();
    println!("{}", server.addresses().grpc);
    std::future::pending::<()>().await;
}

/// The server, in a process of its own that can be killed.
struct Server {
    child: Child,
    address: SocketAddr,
    dir: tempfile::TempDir,
}

impl Server {
    fn begin() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let (child, address) = Self::start(dir.path(), 0);
        Self { child, address, dir }
    }

    fn start(dir: &std::path::Path, port: u16) -> (Child, SocketAddr) {
        let mut command = Command::new(std::env::current_exe().unwrap());
        command.env(DIR, dir).env(PORT, port.to_string()).stdout(Stdio::piped());
        let mut child = command.spawn().unwrap();
        let mut line = String::new();
        BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).unwrap();
        (child, line.trim().parse().expect("the server's address"))
    }

    fn kill_and_start(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
        let (child, _) = Self::start(self.dir.path(), self.address.port());
        self.child = child;
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Lines to the server that can be cut.
struct Lines {
    address: SocketAddr,
    open: Arc<Mutex<Vec<AbortHandle>>>,
    _accepts: JoinSet<()>,
}

impl Lines {
    async fn to(server: SocketAddr) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let open: Arc<Mutex<Vec<AbortHandle>>> = Arc::default();
        let opened = Arc::clone(&open);
        let mut accepts = JoinSet::new();
        accepts.spawn(async move {
            let mut carries = JoinSet::new();
            loop {
                let (mut near, _) = listener.accept().await.unwrap();
                while carries.try_join_next().is_some() {}
                let carry = carries.spawn(async move {
                    if let Ok(mut far) = TcpStream::connect(server).await {
                        let _ = tokio::io::copy_bidirectional(&mut near, &mut far).await;
                    }
                });
                let mut open = opened.lock().unwrap();
                open.retain(|line| !line.is_finished());
                open.push(carry);
            }
        });
        Self { address, open, _accepts: accepts }
    }

    fn cut_one(&self) {
        let open = self.open.lock().unwrap();
        if !open.is_empty() {
            open[fastrand::usize(..open.len())].abort();
        }
    }
}

/// What everybody sent and got.
#[derive(Default)]
struct Book {
    /// By receiver and sender: the last number that was confirmed.
    confirmed: Mutex<HashMap<(String, String), u64>>,
    /// By receiver and sender: the last number that came.
    got: Mutex<HashMap<(String, String), u64>>,
    /// What came to any one of several, by sender: the number is the place. Small, so that the clients' memory can be seen.
    shared: Mutex<HashMap<String, Vec<bool>>>,
    /// What came again, though it was for one alone, and of what was for any one of several.
    repeats: AtomicU64,
    shared_repeats: AtomicU64,
    total: AtomicU64,
    wrong: Mutex<Vec<String>>,
}

impl Book {
    /// Each number of a sender comes after the one before it. One that came before may come again.
    fn take(&self, receiver: &str, message: &Message) {
        self.total.fetch_add(1, Relaxed);
        let text = message.text();
        let (to, number) = text.split_once(' ').unwrap();
        let number: u64 = number.parse().unwrap();
        if to.starts_with("tb::") {
            let mut shared = self.shared.lock().unwrap();
            let seen = shared.entry(message.source().to_owned()).or_default();
            let place = number as usize;
            if seen.len() <= place {
                seen.resize(place + 1, false);
            }
            if std::mem::replace(&mut seen[place], true) {
                self.shared_repeats.fetch_add(1, Relaxed);
            }
            return;
        }
        let key = (to.to_owned(), message.source().to_owned());
        let mut got = self.got.lock().unwrap();
        let last = got.entry(key).or_default();
        if number == *last + 1 {
            *last = number;
        } else if number <= *last {
            self.repeats.fetch_add(1, Relaxed);
        } else {
            let wrong = format!("{receiver} got {number} of {} after {last}", message.source());
            self.wrong.lock().unwrap().push(wrong);
            *last = number;
        }
    }

    /// What was confirmed and did not come.
    fn missing(&self) -> Vec<String> {
        let (got, shared) = (self.got.lock().unwrap(), self.shared.lock().unwrap());
        let confirmed = self.confirmed.lock().unwrap();
        let late = confirmed.iter().filter(|((to, from), last)| {
            if to.starts_with("tb::") {
                let seen = shared.get(from);
                !(1..=**last).all(|number| seen.is_some_and(|seen| seen.get(number as usize) == Some(&true)))
            } else {
                got.get(&(to.clone(), from.clone())).copied().unwrap_or(0) < **last
            }
        });
        late.map(|((to, from), last)| format!("{from} to {to}: {last} confirmed")).collect()
    }
}

struct World {
    server: Server,
    lines: Lines,
    book: Arc<Book>,
    /// By kind, for the table.
    clients: Vec<(&'static str, Client)>,
}

impl World {
    async fn connect<P: Principal + std::ops::Deref<Target = Client>>(
        &mut self,
        kind: &'static str,
        who: Builder<P>,
    ) -> P {
        let forever = Reconnect {
            attempts: None,
            first: Duration::from_millis(50),
            longest: Duration::from_secs(1),
            ..Reconnect::default()
        };
        let who = who.reconnect(forever).at_least_once().send_timeout(Duration::from_secs(300));
        let connected = who.address(self.lines.address.to_string()).connect().await.unwrap();
        self.clients.push((kind, (*connected).clone()));
        let (book, name) = (Arc::clone(&self.book), connected.identity().to_string());
        connected.on_message(move |message| {
            book.take(&name, &message);
            async { Ok::<(), Error>(()) }
        });
        connected
    }
}

/// Who sends to whom.
type Routes = Vec<(Client, Vec<Topic>)>;

async fn everybody(world: &mut World) -> Routes {
    let admin = world.connect("orchestrator", Orchestrator::builder("o").profile("none").specifier("0")).await;
    let mut routes: Routes = Vec::new();
    let own = |client: &Client| client.identity().topic().unwrap();
    let mut agents = Vec::new();
    for n in 0..40 {
        agents.push(world.connect("agent", Agent::builder("w", "agent", n.to_string())).await);
    }
    let mut tasks = Vec::new();
    for n in 0..15 {
        tasks.push(world.connect("unique task", UniqueTask::builder("w", "task", n.to_string())).await);
    }
    for _ in 0..15 {
        world.connect("worker", Worker::builder("w", "worker")).await;
    }
    let mut users = Vec::new();
    for n in 0..16 {
        users.push(world.connect("user", User::builder(format!("u{n}"), "1").workspace("w")).await);
    }
    let mut services = Vec::new();
    for n in 0..6 {
        services.push(world.connect("service", Service::builder("service", n.to_string())).await);
    }
    world.connect("workflow engine", WorkflowEngine::builder()).await;
    world.connect("metrics bridge", MetricsBridge::builder()).await;
    for n in 1..3 {
        world.connect("orchestrator", Orchestrator::builder("o").profile("none").specifier(n.to_string())).await;
    }
    for n in 0..3 {
        let bridge = world.connect("bridge", Bridge::builder("bridge", n.to_string())).await;
        let rule = AclGrantRequest {
            principal_type: "bridge".into(),
            principal_id: bridge.identity().to_string(),
            resource_type: "workspace".into(),
            resource_id: "w".into(),
            access_level: AccessLevel::Write as i32,
            granted_by: "test".into(),
            ..AclGrantRequest::default()
        };
        admin.admin().grant(rule).await.unwrap();
        routes.push(((*bridge).clone(), vec![own(&agents[n]), own(&users[n])]));
    }
    let any_worker = Topic::any_task("w", "worker").unwrap();
    for (n, agent) in agents.iter().enumerate() {
        let mut to = vec![own(&agents[(n + 7) % 40]), own(&tasks[n % 15]), own(&users[n % 16]), own(&services[n % 6])];
        to.push(any_worker.clone());
        to.push(Topic::events());
        routes.push(((**agent).clone(), to));
    }
    for (n, user) in users.iter().enumerate() {
        routes.push(((**user).clone(), vec![own(&agents[n])]));
    }
    for (n, task) in tasks.iter().enumerate() {
        routes.push(((**task).clone(), vec![own(&agents[n])]));
    }
    routes
}

/// Numbers its messages, and has several under way at once.
async fn sends(client: Client, to: Topic, book: Arc<Book>, until: Instant) {
    let source = client.identity().to_string();
    let (mut number, mut under_way) = (0, std::collections::VecDeque::new());
    while Instant::now() < until || !under_way.is_empty() {
        if Instant::now() < until && under_way.len() < 4 {
            number += 1;
            let message = Outgoing::new(&to, format!("{to} {number}")).of(trunkline_client::MessageType::Event);
            let client = client.clone();
            let mut sent = Box::pin(async move { client.send_confirmed(message).await });
            // It is in the queue after the first poll, in its order.
            if futures_util::poll!(&mut sent).is_pending() {
                under_way.push_back(sent);
                tokio::time::sleep(Duration::from_millis(fastrand::u64(50..400))).await;
                continue;
            }
        }
        if let Some(sent) = under_way.pop_front() {
            sent.await.unwrap();
            *book.confirmed.lock().unwrap().entry((to.to_string(), source.clone())).or_default() += 1;
        }
    }
}

/// Cuts and kills, and looks at memory.
async fn faults(world: &mut World, last: Duration) -> (usize, usize, Vec<usize>) {
    let (begun, mut cuts, mut kills, mut memory) = (Instant::now(), 0, 0, Vec::new());
    let kill_every = (last / 4).clamp(Duration::from_secs(5), Duration::from_secs(20));
    let (mut next_kill, mut next_look) = (kill_every, last / 20);
    while begun.elapsed() < last {
        tokio::time::sleep(Duration::from_millis(fastrand::u64(20..200))).await;
        world.lines.cut_one();
        cuts += 1;
        if begun.elapsed() > next_kill {
            world.server.kill_and_start();
            kills += 1;
            next_kill = begun.elapsed() + kill_every;
        }
        if begun.elapsed() > next_look {
            memory.push(resident());
            next_look += last / 20;
        }
    }
    (cuts, kills, memory)
}

fn resident() -> usize {
    let statm = std::fs::read_to_string("/proc/self/statm").unwrap();
    statm.split(' ').nth(1).unwrap().parse::<usize>().unwrap() * 4096
}

fn tasks() -> usize {
    tokio::runtime::Handle::current().metrics().num_alive_tasks()
}

async fn run(last: Duration) {
    let server = Server::begin();
    let lines = Lines::to(server.address).await;
    let before = tasks();
    let mut world = World { server, lines, book: Arc::default(), clients: Vec::new() };
    let routes = everybody(&mut world).await;
    let mut kinds: BTreeMap<&str, usize> = BTreeMap::new();
    for (kind, _) in &world.clients {
        *kinds.entry(kind).or_default() += 1;
    }
    println!("{} clients: {kinds:?}", world.clients.len());
    let (until, mut senders) = (Instant::now() + last, JoinSet::new());
    for (client, topics) in routes {
        for to in topics {
            senders.spawn(sends(client.clone(), to, Arc::clone(&world.book), until));
        }
    }
    let (cuts, kills, memory) = faults(&mut world, last).await;
    let book = Arc::clone(&world.book);
    let settled = async {
        while let Some(sent) = senders.join_next().await {
            sent.expect("every message is confirmed in the end");
        }
        while !book.missing().is_empty() {
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    };
    if tokio::time::timeout(PATIENCE, settled).await.is_err() {
        panic!("not all of what was confirmed came: {:#?}", world.book.missing());
    }
    let confirmed: u64 = world.book.confirmed.lock().unwrap().values().sum();
    let count = |counter: &AtomicU64| counter.load(Relaxed);
    let (total, repeats, shared) =
        (count(&world.book.total), count(&world.book.repeats), count(&world.book.shared_repeats));
    println!("{cuts} cuts, {kills} kills; {confirmed} messages confirmed, {total} handed out");
    println!("handed out again: {repeats}, and {shared} of those that any one of several could do");
    let megabytes: Vec<usize> = memory.iter().map(|bytes| bytes / 1_000_000).collect();
    println!("resident memory of the clients, MB: {megabytes:?}");
    let wrong = world.book.wrong.lock().unwrap().clone();
    assert!(wrong.is_empty(), "{} out of order: {wrong:#?}", wrong.len());
    assert!(confirmed > 1000);
    // Flat: the last quarter is not above the second one by more than noise.
    let quarter = memory.len() / 4;
    let mean = |part: &[usize]| part.iter().sum::<usize>() / part.len().max(1);
    let (early, late) = (mean(&memory[quarter..2 * quarter]), mean(&memory[3 * quarter..]));
    assert!(late < early + early / 5 + 20_000_000, "memory grew from {early} to {late}");
    end(world, before).await;
}

async fn end(world: World, before: usize) {
    let World { clients, lines, server, .. } = world;
    let mut closes = JoinSet::new();
    for (_, client) in clients {
        closes.spawn(async move { client.close().await });
    }
    let unsent: usize = closes.join_all().await.into_iter().sum();
    assert_eq!(unsent, 0);
    drop((lines, server));
    // The transport's own tasks end a moment later.
    let gone = async {
        while tasks() > before {
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    };
    let ended = tokio::time::timeout(PATIENCE, gone).await;
    println!("tasks: {before} before, {} after", tasks());
    ended.expect("no task is left");
}

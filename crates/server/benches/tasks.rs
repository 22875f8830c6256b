//! Tasks under load, with the generated client over real streams, durable with fsync.
//!
//! Run by `cargo xtask bench tasks [section …]`; sections are named in `main`.

#![allow(
    clippy::disallowed_methods,
    clippy::expect_used,
    clippy::panic,
    clippy::print_stdout,
    clippy::unwrap_used,
    dead_code,
    reason = "bench code; shares a part with the others"
)]

mod peer;

use std::{
    collections::HashSet,
    sync::Arc,
    time::{Duration, Instant},
};

use peer::{Peer, Stream, frame};
use tokio::{
    sync::{Semaphore, mpsc},
    task::JoinHandle,
};
use tokio_stream::StreamExt as _;
use trunkline_proto::v1::{
    AgentIdentity, AgentOperation, AgentRegistrationInfo, CreateTaskRequest, OrchestratorIdentity, SendMessage,
    TaskAssignmentMode, TaskOperation, UpstreamMessage, UserIdentity, WaitSpec, agent_operation,
    downstream_message::Payload as Down, init_connection::ClientType, task_operation::OpType,
    upstream_message::Payload as Up,
};

#[global_allocator]
static ALLOCATOR: tikv_jemallocator::Jemalloc = tikv_jemallocator::Jemalloc;

/// How long tasks are created.
const MEASURE: Duration = Duration::from_secs(5);

/// Tasks that are not done yet, at any time.
const IN_FLIGHT: usize = 64;

/// A long queue, and many that sleep; fewer to look at something.
fn many() -> usize {
    std::env::var("TRUNKLINE_BENCH_MANY").ok().and_then(|text| text.parse().ok()).unwrap_or(1_000_000)
}

fn main() {
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().unwrap();
    let is_wanted = peer::wanted();
    if is_wanted("flow") {
        runtime.block_on(flow());
    }
    if is_wanted("queue") {
        runtime.block_on(queue());
    }
    if is_wanted("sleep") {
        runtime.block_on(sleep());
    }
    if is_wanted("start") {
        runtime.block_on(start());
    }
}

fn agent(implementation: &str, specifier: &str) -> ClientType {
    let (workspace, implementation) = ("w".to_owned(), implementation.to_owned());
    ClientType::Agent(AgentIdentity { workspace, implementation, specifier: specifier.to_owned() })
}

fn create(implementation: &str, payload: Vec<u8>, request_id: String) -> UpstreamMessage {
    frame(Up::CreateTask(Box::new(CreateTaskRequest {
        task_type: "work".into(),
        workspace: "w".into(),
        assignment_mode: TaskAssignmentMode::Pool.into(),
        target_implementation: implementation.into(),
        payload: payload.into(),
        request_id,
        ..CreateTaskRequest::default()
    })))
}

fn operation(op: OpType, task_id: String, wait_spec: Option<WaitSpec>) -> UpstreamMessage {
    let operation = TaskOperation { op: op.into(), task_id, wait_spec, ..TaskOperation::default() };
    frame(Up::TaskOp(operation.into()))
}

fn percentile(sorted: &[Duration], share: f64) -> Duration {
    sorted[((sorted.len() - 1) as f64 * share) as usize]
}

/// Create, assign, complete: each with its commit.
async fn flow() {
    println!("\n-- create, assign, complete; {IN_FLIGHT} in flight --");
    for workers in [1, 16, 64] {
        let peer = Peer::trunkline();
        let free = Arc::new(Semaphore::new(IN_FLIGHT));
        let begun = Instant::now();
        let mut crew: Vec<JoinHandle<Vec<Duration>>> = Vec::new();
        let (done, mut finished) = mpsc::channel::<()>(workers);
        for n in 0..workers {
            let stream = Stream::open_as(peer.address, agent("miner", &n.to_string())).await;
            crew.push(tokio::spawn(work(stream, begun, free.clone(), done.clone())));
        }
        drop(done);
        let mut boss = Stream::open_as(peer.address, agent("boss", "b")).await;
        let (cpu, started, mut created) = (peer.cpu(), Instant::now(), 0_u64);
        let drain = tokio::spawn(async move { while boss.down.next().await.is_some_and(|next| next.is_ok()) {} });
        while started.elapsed() < MEASURE {
            free.acquire().await.unwrap().forget();
            let mut payload = vec![7; 256];
            payload[..8].copy_from_slice(&(begun.elapsed().as_nanos() as u64).to_be_bytes());
            boss.up.send(create("miner", payload, created.to_string())).await.unwrap();
            created += 1;
        }
        let _all = free.acquire_many(IN_FLIGHT as u32).await.unwrap();
        let (elapsed, cpu) = (started.elapsed(), peer.cpu() - cpu);
        free.close();
        drop(peer);
        let mut latencies = Vec::new();
        for worker in crew {
            latencies.extend(worker.await.unwrap());
        }
        finished.close();
        drain.abort();
        latencies.sort_unstable();
        let (p50, p99) = (percentile(&latencies, 0.5), percentile(&latencies, 0.99));
        let rate = created as f64 / elapsed.as_secs_f64();
        let each = cpu.as_secs_f64() * 1e6 / created as f64;
        println!(
            "{workers:>3} workers {rate:>10.0} tasks/s {each:>8.1} us CPU each   create to assignment p50 {p50:>9.1?} p99 {p99:>9.1?}"
        );
    }
}

/// Completes what it gets; answers how long after its creation each arrived.
async fn work(stream: Stream, begun: Instant, free: Arc<Semaphore>, _done: mpsc::Sender<()>) -> Vec<Duration> {
    let (mut latencies, Stream { up, mut down }) = (Vec::new(), stream);
    while let Some(Ok(next)) = down.next().await {
        match next.payload {
            Some(Down::TaskAssignment(assignment)) => {
                let sent = u64::from_be_bytes(*assignment.payload.first_chunk().unwrap());
                latencies.push(begun.elapsed() - Duration::from_nanos(sent));
                up.send(operation(OpType::Complete, assignment.task_id, None)).await.unwrap();
            }
            Some(Down::TaskOp(reply)) => {
                assert!(reply.success, "{}", reply.error);
                free.add_permits(1);
            }
            _ => {}
        }
    }
    latencies
}

/// Puts so many tasks into a queue that nobody works on; answers their ids, and whose they are.
async fn fill(peer: &Peer, implementation: &'static str, count: usize) -> (Vec<String>, Stream) {
    let Stream { up, mut down } = Stream::open_as(peer.address, agent("filler", implementation)).await;
    let sender = tokio::spawn(async move {
        for n in 0..count {
            up.send(create(implementation, vec![7; 64], n.to_string())).await.unwrap();
        }
        up
    });
    let mut ids = Vec::with_capacity(count);
    while ids.len() < count {
        if let Some(Down::CreateTask(reply)) = down.next().await.unwrap().unwrap().payload {
            assert!(reply.success, "{}", reply.error_message);
            ids.push(reply.task_id);
        }
    }
    (ids, Stream { up: sender.await.unwrap(), down })
}

/// From a worker's word that it is done to its next task, one after the other.
async fn queue() {
    println!("\n-- from one task to the next, by how many are queued --");
    for queued in [100, many()] {
        let peer = Peer::trunkline();
        let begun = Instant::now();
        // As many as are taken below, and some behind them.
        drop(fill(&peer, "miner", queued.max(1200)).await);
        let filled = begun.elapsed();
        let mut worker = Stream::open_as(peer.address, agent("miner", "m")).await;
        let mut held: Vec<String> = Vec::new();
        let (mut latencies, mut done) = (Vec::new(), None);
        while latencies.len() < 1000 {
            let Some(Down::TaskAssignment(assignment)) = worker.down.next().await.unwrap().unwrap().payload else {
                continue;
            };
            held.push(assignment.task_id);
            if let Some(done) = done.take() {
                latencies.push(Instant::now() - done);
            } else if held.len() < 100 {
                continue;
            }
            done = Some(Instant::now());
            worker.up.send(operation(OpType::Complete, held.pop().unwrap(), None)).await.unwrap();
        }
        latencies.sort_unstable();
        let (p50, p99) = (percentile(&latencies, 0.5), percentile(&latencies, 0.99));
        println!("{queued:>9} queued (in {filled:>6.1?})   p50 {p50:>9.1?} p99 {p99:>9.1?}");
    }
}

/// Tasks that wait for one that does not end, each with a timeout of its own.
async fn sleep() {
    println!("\n-- {} tasks asleep --", many());
    let peer = Peer::trunkline();
    let first = fill(&peer, "never", 1).await.0.remove(0);
    // Whoever made them has them wait.
    let (ids, Stream { up, mut down }) = fill(&peer, "sleeper", many()).await;
    let sender = tokio::spawn(async move {
        for id in ids {
            let depends_on = vec![first.clone()];
            let wait = WaitSpec { depends_on, timeout_ms: 86_400_000, ..WaitSpec::default() };
            up.send(operation(OpType::WaitFor, id, Some(wait))).await.unwrap();
        }
        up
    });
    let mut asleep = 0;
    while asleep < many() {
        if let Some(Down::TaskOp(reply)) = down.next().await.unwrap().unwrap().payload {
            assert!(reply.success, "{}", reply.error);
            asleep += 1;
        }
    }
    let _up = sender.await.unwrap();
    // What others hear of them leaves behind the answers.
    let begun = Instant::now();
    let mut cpu = peer.cpu();
    loop {
        tokio::time::sleep(Duration::from_secs(1)).await;
        let before = std::mem::replace(&mut cpu, peer.cpu());
        if cpu - before < Duration::from_millis(50) {
            break;
        }
        assert!(begun.elapsed() < Duration::from_secs(1200), "it does not come to rest");
    }
    let rested = begun.elapsed();
    tokio::time::sleep(Duration::from_secs(10)).await;
    let share = (peer.cpu() - cpu).as_secs_f64() * 10.0;
    println!("{share:.1} % of a core ({rested:.0?} after the last); {} MiB", peer.resident() / 1024 / 1024);
}

/// A message each to agents that are away.
async fn start() {
    const AGENTS: usize = 1000;
    println!("\n-- {AGENTS} different agents, each started by its first message --");
    let peer = Peer::trunkline();
    let orchestrator = OrchestratorIdentity {
        implementation: "orc".into(),
        specifier: "o".into(),
        supported_profiles: vec!["local".into()],
    };
    let mut orchestrator = Stream::open_as(peer.address, ClientType::Orchestrator(orchestrator)).await;
    let registration = AgentRegistrationInfo {
        implementation: "bot".into(),
        launch_params: [("profile".to_owned(), "local".to_owned())].into(),
        ..AgentRegistrationInfo::default()
    };
    let register = agent_operation::OpType::Register.into();
    let register = AgentOperation { op: register, agent: Some(registration), ..AgentOperation::default() };
    orchestrator.up.send(frame(Up::AgentOp(register.into()))).await.unwrap();
    while !matches!(orchestrator.down.next().await.unwrap().unwrap().payload, Some(Down::Agent(_))) {}
    let user = UserIdentity { user_id: "u".into(), window_id: "w".into() };
    let user = Stream::open_as(peer.address, ClientType::User(user)).await;
    let begun = Instant::now();
    for round in 0..3 {
        for n in 0..AGENTS {
            let target_topic = format!("ag::w::bot::{n}");
            let message = SendMessage { target_topic, payload: vec![round].into(), ..SendMessage::default() };
            user.up.send(frame(Up::Send(message))).await.unwrap();
        }
    }
    let (mut started, mut launches, mut streams) = (HashSet::new(), 0, Vec::new());
    while started.len() < AGENTS {
        if let Some(Down::TaskAssignment(launch)) = orchestrator.down.next().await.unwrap().unwrap().payload {
            launches += 1;
            streams.push(Stream::open_as(peer.address, agent("bot", &launch.specifier)).await);
            started.insert(launch.specifier);
        }
    }
    println!("{launches} launches, all there after {:.2?}", begun.elapsed());
    assert_eq!(launches, AGENTS, "one each");
}

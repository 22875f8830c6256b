//! Attempts: how long each may take, which of them somebody speaks of, and how many may be lost.

use std::time::{Duration, Instant};

use trunkline::{Config, Server};
use trunkline_core::{limits::Limits, task::Options};
use trunkline_proto::{
    own::TaskLimits,
    v1::{
        CreateTaskRequest, ProgressReport, TaskClass, TaskFilter, TaskInfo, TaskOperation, TaskOperationResponse,
        TaskStatus as Status, downstream_message::Payload as Down, task_event::Event, task_operation::OpType as Op,
        upstream_message::Payload as Up,
    },
};

use super::{fixed, named, pool, server};
use crate::client::{Client, Line, agent};

/// Why five lost workers bury a task.
const WHY: &str = "5 sessions ended while they had it, one after the other and without a report";

async fn with(dir: &std::path::Path, tasks: Options) -> Server {
    let limits = Limits { messages_per_second: 0, ..Limits::default() };
    let config = Config { data_dir: dir.to_owned(), dev: true, tasks, limits, ..Config::on_free_ports() };
    Server::start(config).await.unwrap()
}

fn limits(execution_ms: i64, report_ms: i64) -> Option<TaskLimits> {
    Some(TaskLimits { execution_ms, report_ms, lost_sessions_max: 0 })
}

async fn say_of(client: &mut Client, op: Op, id: &str, attempt: i64) -> TaskOperationResponse {
    let operation = TaskOperation { op: op.into(), task_id: id.to_owned(), attempt, ..TaskOperation::default() };
    client.put(Up::TaskOp(operation.into())).await;
    client.wait_for(|down| if let Down::TaskOp(reply) = down { Some(*reply) } else { None }).await
}

/// What a worker is told that lost a task: its id, and why.
async fn loss(client: &mut Client) -> (String, String) {
    let told = client.wait_for(|down| match down {
        Down::TaskEvent(event) if event.subscription_id.is_empty() => Some(*event),
        _ => None,
    });
    let told = told.await;
    let Some(Event::StatusChanged(changed)) = told.event else { panic!("{told:?}") };
    (told.task_id, changed.reason)
}

async fn until(client: &mut Client, id: &str, is_it: impl Fn(&TaskInfo) -> bool) -> TaskInfo {
    let begun = Instant::now();
    loop {
        let task = client.task(id).await;
        if is_it(&task) {
            return task;
        }
        assert!(begun.elapsed() < Duration::from_secs(20), "{task:?}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_begins_and_hangs_loses_the_task_and_is_told() {
    let dir = tempfile::tempdir().unwrap();
    let server = server(dir.path()).await;
    let grpc = server.addresses().grpc;
    let mut boss = Client::connect(grpc, agent("boss")).await.unwrap();
    let mut hangs = Client::connect(grpc, named("miner", "hangs")).await.unwrap();
    // As long as nobody begins, no limit counts.
    let retried = CreateTaskRequest { limits: limits(400, 0), retry_policy: Some(fixed(1, 3)), ..pool() };
    let id = boss.create(retried).await;
    let first = hangs.assignment().await;
    assert_eq!((first.task_id.as_str(), first.attempt), (&*id, 1));
    tokio::time::sleep(Duration::from_millis(600)).await;
    assert_eq!(boss.task(&id).await.status(), Status::Queued);
    let begun = Instant::now();
    assert!(say_of(&mut hangs, Op::Claim, &id, 1).await.success);
    let mut healthy = Client::connect(grpc, named("miner", "healthy")).await.unwrap();
    let second = healthy.assignment().await;
    assert_eq!((second.task_id.as_str(), second.attempt), (&*id, 2), "not to the one that hangs");
    assert!(begun.elapsed() >= Duration::from_millis(400));
    assert_eq!(loss(&mut hangs).await, (id.clone(), "not done within 400 ms".to_owned()));
    // What it says of its attempt ends nothing of the other one's.
    let late = say_of(&mut hangs, Op::Fail, &id, 1).await;
    assert!(!late.success, "{late:?}");
    assert!(say_of(&mut healthy, Op::Claim, &id, 2).await.success);
    let wrong = say_of(&mut healthy, Op::Fail, &id, 1).await;
    assert_eq!(wrong.error, format!("attempt 1 of task {id} is over: the last one is 2"));
    let done = say_of(&mut healthy, Op::Complete, &id, 2).await;
    assert!(done.success, "{done:?}");
    assert_eq!(done.task.unwrap().assignments, 2);
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_reports_keeps_the_task() {
    let dir = tempfile::tempdir().unwrap();
    let tasks = Options { report_batch_seconds: 1, ..Options::default() };
    let server = with(dir.path(), tasks).await;
    let grpc = server.addresses().grpc;
    let mut boss = Client::connect(grpc, agent("boss")).await.unwrap();
    let mut worker = Client::connect(grpc, named("miner", "m")).await.unwrap();
    // By its class, by its own, and not at all.
    let by_class = boss.create(CreateTaskRequest { task_class: TaskClass::Batch.into(), ..pool() }).await;
    let by_own = boss.create(CreateTaskRequest { limits: limits(0, 1000), ..pool() }).await;
    let endless =
        boss.create(CreateTaskRequest { task_class: TaskClass::Batch.into(), limits: limits(-1, -1), ..pool() }).await;
    for _ in 0..3 {
        worker.assignment().await;
    }
    for id in [&by_class, &by_own, &endless] {
        assert!(say_of(&mut worker, Op::Claim, id, 0).await.success);
    }
    let begun = Instant::now();
    while begun.elapsed() < Duration::from_millis(2500) {
        let report = ProgressReport { task_id: by_own.clone(), state: "running".into(), ..ProgressReport::default() };
        worker.put(Up::Progress(report.into())).await;
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    let failed = boss.task(&by_class).await;
    assert_eq!((failed.status(), &*failed.error), (Status::Failed, "its worker said nothing of it for 1000 ms"));
    assert_eq!(boss.task(&by_own).await.status(), Status::Running);
    assert_eq!(boss.task(&endless).await.status(), Status::Running);
    until(&mut boss, &by_own, |task| task.status() == Status::Failed).await;
    assert_eq!(boss.task(&endless).await.status(), Status::Running);
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_a_hung_worker_did_not_begin_goes_to_others() {
    let dir = tempfile::tempdir().unwrap();
    let server = with(dir.path(), Options { begin_seconds: 1, ..Options::default() }).await;
    let grpc = server.addresses().grpc;
    let mut boss = Client::connect(grpc, agent("boss")).await.unwrap();
    let mut hangs = Client::connect(grpc, named("miner", "hangs")).await.unwrap();
    let mut all = Vec::new();
    for _ in 0..40 {
        all.push(boss.create(pool()).await);
    }
    for _ in 0..40 {
        hangs.assignment().await;
    }
    assert!(say_of(&mut hangs, Op::Claim, &all[0], 0).await.success);
    // It works on what it has, one after the other, and gets the rest of the other's.
    let mut healthy = Client::connect(grpc, named("miner", "healthy")).await.unwrap();
    let (mut done, mut completed) = (Vec::new(), 0);
    while completed < 39 {
        let op = |op: Op, task_id: String| {
            Up::TaskOp(TaskOperation { op: op.into(), task_id, attempt: 2, ..Default::default() }.into())
        };
        match healthy.next().await.unwrap().expect("the stream goes on") {
            Down::TaskAssignment(assignment) => {
                assert_eq!(assignment.attempt, 2);
                healthy.put(op(Op::Claim, assignment.task_id.clone())).await;
                healthy.put(op(Op::Complete, assignment.task_id.clone())).await;
                done.push(assignment.task_id);
            }
            Down::TaskOp(reply) => {
                assert!(reply.success, "{reply:?}");
                completed += usize::from(reply.task.unwrap().status() == Status::Completed);
            }
            _ => {}
        }
    }
    assert!(!done.contains(&all[0]), "what it has begun stays with it");
    let (lost, why) = loss(&mut hangs).await;
    assert!(done.contains(&lost) && why == "attempt 1 is over", "{lost} {why}");
    // It may not begin what is somebody else's by now.
    let late = boss.create(pool()).await;
    assert_eq!(healthy.assignment().await.task_id, late);
    assert!(!say_of(&mut hangs, Op::Claim, &late, 0).await.success);
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_task_that_its_workers_die_of_is_a_dead_letter() {
    let dir = tempfile::tempdir().unwrap();
    let server = with(dir.path(), Options { lost_sessions_max: 5, ..Options::default() }).await;
    let grpc = server.addresses().grpc;
    let mut boss = Client::connect(grpc, agent("boss")).await.unwrap();
    let poison = boss.create(CreateTaskRequest { retry_policy: Some(fixed(1, 3)), ..pool() }).await;
    // One that its worker says something of, and one that it never begins.
    let (reported, harmless) = (boss.create(pool()).await, boss.create(pool()).await);
    for death in 1..=5 {
        let line = Line::to(grpc).await;
        let mut worker = Client::connect_when_free(line.grpc, named("miner", "m")).await;
        for _ in 0..3 {
            worker.assignment().await;
        }
        assert!(say_of(&mut worker, Op::Claim, &poison, 0).await.success);
        assert!(say_of(&mut worker, Op::Claim, &reported, 0).await.success);
        let report = ProgressReport { task_id: reported.clone(), state: "running".into(), ..ProgressReport::default() };
        worker.put(Up::Progress(report.into())).await;
        worker.task(&reported).await;
        line.cut().await;
        let lost = i64::from(death);
        until(&mut boss, &poison, |task| task.lost_sessions == lost).await;
    }
    // The next one that comes hears of it instead of being given it.
    let mut worker = Client::connect_when_free(grpc, named("miner", "m")).await;
    let (lost, why) = loss(&mut worker).await;
    assert_eq!((lost.as_str(), why.as_str()), (&*poison, WHY));
    let dead = boss.task(&poison).await;
    assert_eq!(dead.status(), Status::Failed);
    assert_eq!(dead.error, WHY);
    assert_eq!((dead.attempt, dead.assignments), (0, 1), "it never failed by a worker's word");
    let dead = boss.list(TaskFilter { dead_letters: true, ..TaskFilter::default() }).await.tasks;
    assert_eq!(dead.iter().map(|task| &*task.task_id).collect::<Vec<_>>(), [&*poison]);
    assert_eq!(boss.task(&reported).await.status(), Status::Running);
    assert_eq!(boss.task(&harmless).await.lost_sessions, 0);
    for _ in 0..2 {
        worker.assignment().await;
    }
    // An operator may try it again.
    boss.op(Op::Retry, &poison).await;
    let again = worker.assignment().await;
    assert_eq!((again.task_id.as_str(), again.attempt), (&*poison, 2));
    assert_eq!(boss.task(&poison).await.lost_sessions, 0);
    server.stop().await;
}

/// A stop of the server, a goodbye, and a process that lost only its connection are no deaths.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn not_every_end_of_a_session_is_a_loss() {
    let dir = tempfile::tempdir().unwrap();
    let tasks = Options { lost_sessions_max: 1, ..Options::default() };
    let server = with(dir.path(), tasks).await;
    let grpc = server.addresses().grpc;
    let mut boss = Client::connect(grpc, agent("boss")).await.unwrap();
    let mut worker = Client::connect(grpc, named("miner", "m")).await.unwrap();
    let id = boss.create(pool()).await;
    worker.assignment().await;
    assert!(say_of(&mut worker, Op::Claim, &id, 0).await.success);
    server.stop().await;
    let server = with(dir.path(), tasks).await;
    let grpc = server.addresses().grpc;
    let mut boss = Client::connect(grpc, agent("boss")).await.unwrap();
    let mut worker = Client::connect(grpc, named("miner", "m")).await.unwrap();
    worker.assignment().await;
    assert_eq!(boss.task(&id).await.lost_sessions, 0);
    worker.close().await;
    let line = Line::to(grpc).await;
    let mut worker = Client::connect_when_free(line.grpc, named("miner", "m")).await;
    worker.assignment().await;
    assert_eq!(boss.task(&id).await.lost_sessions, 0);
    line.cut().await;
    until(&mut boss, &id, |task| task.lost_sessions == 1).await;
    // A process that goes on with a session, even one that is not there any more.
    let again = trunkline_proto::v1::InitConnection { resume_session_id: "gone".into(), ..named("miner", "m") };
    let mut worker = Client::connect_when_free(grpc, again).await;
    worker.assignment().await;
    let task = boss.task(&id).await;
    assert_eq!((task.status(), task.lost_sessions), (Status::Running, 0));
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_lost_a_task_while_it_was_away_is_told_when_it_is_back() {
    let dir = tempfile::tempdir().unwrap();
    let server = server(dir.path()).await;
    let grpc = server.addresses().grpc;
    let mut boss = Client::connect(grpc, agent("boss")).await.unwrap();
    let mut away = Client::connect(grpc, named("miner", "away")).await.unwrap();
    let (begun, waiting) = (boss.create(pool()).await, boss.create(pool()).await);
    away.assignment().await;
    away.assignment().await;
    assert!(say_of(&mut away, Op::Claim, &begun, 0).await.success);
    drop(away);
    // One failed when its grace was over, the other went to somebody else.
    let mut other = Client::connect(grpc, named("miner", "other")).await.unwrap();
    assert_eq!(other.assignment().await.task_id, waiting);
    until(&mut boss, &begun, |task| task.status() == Status::Failed).await;
    let mut back = Client::connect_when_free(grpc, named("miner", "away")).await;
    let mut lost = [loss(&mut back).await, loss(&mut back).await];
    lost.sort_by_key(|(id, _)| *id == waiting);
    assert_eq!(lost[0].0, begun);
    assert!(lost[0].1.starts_with("worker disconnected"), "{lost:?}");
    assert_eq!(lost[1], (waiting.clone(), "attempt 1 is over".to_owned()));
    drop(back);
    // Once.
    let mut back = Client::connect_when_free(grpc, named("miner", "away")).await;
    let next = boss.create(pool()).await;
    let told = back.wait_for(|down| match down {
        Down::TaskEvent(_) => Some(None),
        Down::TaskAssignment(assignment) => Some(Some(assignment.task_id)),
        _ => None,
    });
    assert_eq!(told.await, Some(next));
    server.stop().await;
}

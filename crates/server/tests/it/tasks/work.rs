//! Work is handed out once, to whoever has room, and ends once.

use std::{collections::HashMap, time::Duration};

use trunkline::{Config, Server};
use trunkline_core::task::Options;
use trunkline_proto::v1::{
    CreateTaskRequest, TaskAssignmentMode as Mode, TaskCompletionEvent, TaskFilter, TaskOperation, TaskPriority,
    TaskStatus as Status, downstream_message::Payload as Down, task_event::Event, task_operation::OpType as Op,
    upstream_message::Payload as Up,
};

use super::{engine, fixed, named, orchestrator, own, pool, server, service};
use crate::{
    client::{Client, agent},
    process::Process,
    sql,
};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_thousand_tasks_are_shared_evenly_and_each_is_done_once() {
    let dir = tempfile::tempdir().unwrap();
    let server = server(dir.path()).await;
    let grpc = server.addresses().grpc;
    let mut boss = Client::connect(grpc, agent("boss")).await.unwrap();
    let crew: Vec<_> = ["one", "two"]
        .into_iter()
        .map(|name| {
            tokio::spawn(async move {
                let mut worker = Client::connect(grpc, named("miner", name)).await.unwrap();
                let mut done = Vec::new();
                while let Ok(Some(down)) = worker.next().await {
                    match down {
                        Down::TaskAssignment(assignment) if assignment.task_type == "dig" => {
                            let op = Op::Complete.into();
                            let task_id = assignment.task_id.clone();
                            worker.put(Up::TaskOp(TaskOperation { op, task_id, ..Default::default() }.into())).await;
                            done.push(assignment.task_id);
                        }
                        Down::TaskAssignment(_) => break,
                        _ => {}
                    }
                }
                done
            })
        })
        .collect();
    for _ in 0..1000 {
        boss.create(pool()).await;
    }
    // One each for the end: nobody gets a second one before the other has its first.
    for _ in 0..2 {
        boss.create(CreateTaskRequest { task_type: "end".into(), ..pool() }).await;
    }
    let mut all = Vec::new();
    for worker in crew {
        let done = tokio::time::timeout(Duration::from_secs(20), worker).await.expect("an end").unwrap();
        assert!(done.len() > 300, "{} of 1000", done.len());
        all.extend(done);
    }
    all.sort();
    all.dedup();
    assert_eq!(all.len(), 1000);
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_comes_gets_what_is_urgent_first_then_what_is_old() {
    let dir = tempfile::tempdir().unwrap();
    let server = server(dir.path()).await;
    let grpc = server.addresses().grpc;
    for init in [named("miner", "m"), service(false)] {
        let mut boss = Client::connect_when_free(grpc, agent("boss")).await;
        let mut wanted = Vec::new();
        for priority in [TaskPriority::Low, TaskPriority::High, TaskPriority::Unspecified, TaskPriority::High] {
            wanted.push(boss.create(CreateTaskRequest { priority: priority.into(), ..pool() }).await);
        }
        let mut worker = Client::connect(grpc, init).await.unwrap();
        for at in [1, 3, 2, 0] {
            assert_eq!(worker.assignment().await.task_id, wanted[at]);
        }
        for id in &wanted {
            worker.op(Op::Complete, id).await;
        }
        boss.close().await;
        worker.close().await;
    }
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn agents_of_the_workspace_come_before_services_and_who_declines_gets_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let server = server(dir.path()).await;
    let grpc = server.addresses().grpc;
    let mut boss = Client::connect(grpc, agent("boss")).await.unwrap();
    let declining = Client::connect(grpc, service(true)).await.unwrap();
    let first = boss.create(pool()).await;
    assert_eq!(boss.task(&first).await.assigned_to, "");
    declining.close().await;
    let mut service = Client::connect_when_free(grpc, service(false)).await;
    assert_eq!(service.assignment().await.task_id, first);
    let mut worker = Client::connect(grpc, named("miner", "m")).await.unwrap();
    let second = boss.create(pool()).await;
    assert_eq!(worker.assignment().await.task_id, second);
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn names_priorities_graces_and_refusals() {
    let dir = tempfile::tempdir().unwrap();
    let server = server(dir.path()).await;
    let grpc = server.addresses().grpc;
    let mut boss = Client::connect(grpc, agent("boss")).await.unwrap();
    for (workspace, implementation) in [("a::b", "miner"), ("x*", "miner"), ("ws", "a b")] {
        let request =
            CreateTaskRequest { workspace: workspace.into(), target_implementation: implementation.into(), ..pool() };
        let reply = boss.ask(request).await;
        assert_eq!((reply.error_code.as_str(), reply.request_id.as_str()), ("ERR_INVALID_IDENTIFIER", "c"));
        let error = boss.error().await;
        assert_eq!((error.code.as_str(), error.request_id.as_str()), ("ERR_INVALID_IDENTIFIER", "c"));
    }
    for key in ["authority_grant_id", "root_authority_grant_id", "_hibernation_checkpoint_key", "trigger_timestamp_ms"]
    {
        let metadata = HashMap::from([(key.to_owned(), "x".to_owned())]);
        let reply = boss.ask(CreateTaskRequest { metadata, ..pool() }).await;
        assert_eq!(reply.error_code, "ERR_INVALID_ARGUMENT");
        assert!(reply.error_message.contains(key), "{}", reply.error_message);
    }
    assert_eq!(boss.list(TaskFilter::default()).await.total_count, 0, "nothing was kept");

    let key = |workspace: &str| CreateTaskRequest { idempotency_key: "k".into(), workspace: workspace.into(), ..own() };
    let first = boss.create(key("ws")).await;
    assert_eq!(boss.create(key("ws")).await, first);
    let mut other = Client::connect(grpc, agent("other")).await.unwrap();
    assert_ne!(other.create(key("ws")).await, first, "names are their creators'");
    // One that was refused under a name does not use it up.
    let bad = CreateTaskRequest { idempotency_key: "late".into(), target_implementation: String::new(), ..pool() };
    assert!(!boss.ask(bad).await.success);
    boss.create(CreateTaskRequest { idempotency_key: "late".into(), ..pool() }).await;
    assert_eq!(boss.task(&first).await.priority, 30);
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn failures_are_tried_again_by_themselves_and_then_kept() {
    let dir = tempfile::tempdir().unwrap();
    let server = server(dir.path()).await;
    let grpc = server.addresses().grpc;
    let mut boss = Client::connect(grpc, agent("boss")).await.unwrap();
    let mut worker = Client::connect(grpc, named("miner", "m")).await.unwrap();
    let request = CreateTaskRequest { retry_policy: Some(fixed(20, 3)), ..pool() };
    let id = boss.create(request).await;
    for attempt in 1..=3 {
        assert_eq!(worker.assignment().await.task_id, id);
        let reply = worker.op_with(Op::Fail, &id, "cave-in", None).await;
        let failed = reply.task.unwrap();
        assert_eq!((failed.attempt, failed.status), (attempt, Status::Failed.into()));
        assert_eq!(failed.retry_at_unix_ms > 0, attempt < 3);
    }
    let dead = boss.list(TaskFilter { dead_letters: true, ..TaskFilter::default() }).await;
    assert_eq!(dead.tasks.iter().map(|task| &task.task_id).collect::<Vec<_>>(), [&id]);
    boss.op(Op::Retry, &id).await;
    assert_eq!(worker.assignment().await.task_id, id);
    worker.op(Op::Claim, &id).await;
    let started = boss.task(&id).await.started_at;
    assert_eq!(worker.op(Op::Claim, &id).await.started_at, started, "claimed twice, started once");
    worker.op(Op::Complete, &id).await;
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_has_ended_stays_so_and_is_told_once() {
    let dir = tempfile::tempdir().unwrap();
    let server = server(dir.path()).await;
    let grpc = server.addresses().grpc;
    let mut boss = Client::connect(grpc, agent("boss")).await.unwrap();
    let mut worker = Client::connect(grpc, named("miner", "m")).await.unwrap();
    let mut engine = Client::connect(grpc, engine()).await.unwrap();
    let on_statuses = vec![Status::Completed.into()];
    let wanted = Some(TaskCompletionEvent { enabled: true, event_name: String::new(), on_statuses });
    let id = boss.create(CreateTaskRequest { completion_event: wanted.clone(), ..pool() }).await;
    worker.assignment().await;
    worker.op(Op::Complete, &id).await;
    // Its answer may have been lost, so the same is said again; anything else is refused.
    worker.op(Op::Complete, &id).await;
    assert!(boss.refused(Op::Complete, &id).await.contains("not in a completable state"));
    assert!(worker.refused(Op::Fail, &id).await.contains("not in a failable state"));
    let failed = boss.create(CreateTaskRequest { completion_event: wanted, ..pool() }).await;
    worker.assignment().await;
    worker.op(Op::Fail, &failed).await;
    boss.send("event::*", "after").await;
    let event = engine.message().await;
    let body: serde_json::Value = serde_json::from_slice(&event.payload).unwrap();
    assert_eq!((event.message_type, event.workspace.as_str()), (4, "ws"));
    assert_eq!(
        (body["event_names"][0].as_str(), body["data"]["task_id"].as_str()),
        (Some("task.completed"), Some(&*id))
    );
    assert_eq!(engine.message().await.payload, "after", "exactly one");

    let cancelled = boss.create(pool()).await;
    worker.assignment().await;
    worker.op(Op::Claim, &cancelled).await;
    boss.op(Op::Cancel, &cancelled).await;
    let told = worker.event().await;
    let Some(Event::StatusChanged(change)) = told.event else { panic!("{told:?}") };
    assert_eq!((told.task_id, change.to_status), (cancelled.clone(), Status::Cancelled.into()));
    assert!(worker.refused(Op::Complete, &cancelled).await.contains("completable"), "too late");
    assert!(worker.refused(Op::Reject, &cancelled).await.contains("invalid task state transition"));
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_worker_that_is_gone_keeps_its_tasks_for_their_grace() {
    let dir = tempfile::tempdir().unwrap();
    let server = server(dir.path()).await;
    let grpc = server.addresses().grpc;
    let mut boss = Client::connect(grpc, agent("boss")).await.unwrap();
    let mut one = Client::connect(grpc, named("miner", "one")).await.unwrap();
    let (begun, untouched) = (boss.create(pool()).await, boss.create(pool()).await);
    one.assignment().await;
    one.assignment().await;
    one.op(Op::Claim, &begun).await;
    drop(one);
    boss.wait_until_gone(&begun).await;
    // Back in time: it is told again of all that it has, and nothing was lost.
    let mut one = Client::connect_when_free(grpc, named("miner", "one")).await;
    let mut again = [one.assignment().await.task_id, one.assignment().await.task_id];
    again.sort();
    let mut both = [begun.clone(), untouched.clone()];
    both.sort();
    assert_eq!(again, both);
    assert_eq!(boss.task(&begun).await.disconnected_at, 0);
    drop(one);
    let mut two = Client::connect(grpc, named("miner", "two")).await.unwrap();
    // What was not begun goes to somebody else; what was begun has failed.
    assert_eq!(two.assignment().await.task_id, untouched);
    let failed = boss.becomes(&begun, Status::Failed).await;
    assert_eq!(failed.error, "worker disconnected and did not reconnect within grace window (1000ms)");
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_killed_server_is_nobodys_absence() {
    let dir = tempfile::tempdir().unwrap();
    let process = Process::start(dir.path());
    let mut boss = Client::connect(process.grpc, agent("boss")).await.unwrap();
    let mut worker = Client::connect(process.grpc, named("miner", "m")).await.unwrap();
    let (mine, waiting) = (
        boss.create(pool()).await,
        boss.create(CreateTaskRequest { target_implementation: "other".into(), ..pool() }).await,
    );
    worker.assignment().await;
    worker.op(Op::Claim, &mine).await;
    process.kill();
    let process = Process::start(dir.path());
    let mut worker = Client::connect(process.grpc, named("miner", "m")).await.unwrap();
    assert_eq!(worker.assignment().await.task_id, mine);
    worker.op(Op::Complete, &mine).await;
    let mut other = Client::connect(process.grpc, named("other", "o")).await.unwrap();
    assert_eq!(other.assignment().await.task_id, waiting);
}

/// More than its mailbox holds, so that it is read a piece at a time; and more than one transaction changes when it goes and
/// comes.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_worker_that_comes_back_gets_each_of_its_many_tasks_once_and_the_urgent_ones_first() {
    const COUNT: usize = 700;
    let dir = tempfile::tempdir().unwrap();
    let server = server(dir.path()).await;
    let grpc = server.addresses().grpc;
    let mut boss = Client::connect(grpc, agent("boss")).await.unwrap();
    Client::connect(grpc, orchestrator("o")).await.unwrap().register("miner").await;
    let worker = Client::connect(grpc, named("miner", "m")).await.unwrap();
    let mut ids = Vec::new();
    for n in 0..COUNT {
        let priority = if n % 100 == 99 { TaskPriority::High } else { TaskPriority::Normal };
        let task = CreateTaskRequest {
            assignment_mode: Mode::Targeted.into(),
            target_agent_id: "ag::ws::miner::m".into(),
            priority: priority.into(),
            ..pool()
        };
        ids.push(boss.create(task).await);
    }
    // It never took most of them.
    drop(worker);
    let mut worker = Client::connect_when_free(grpc, named("miner", "m")).await;
    let mut order = Vec::new();
    while order.len() < COUNT {
        order.push(worker.assignment().await.task_id);
    }
    let urgent: Vec<_> = ids.iter().skip(99).step_by(100).cloned().collect();
    assert_eq!(order[..urgent.len()], urgent);
    let mut each = order.clone();
    each.sort();
    ids.sort();
    assert_eq!(each, ids);
    // They are its own again: nobody is taken for gone.
    for id in &order {
        boss.op(Op::Cancel, id).await;
    }
    server.stop().await;
}

/// A list of what others fill is cut by bytes, and goes on behind.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_page_of_large_tasks_stays_below_what_clients_take() {
    let dir = tempfile::tempdir().unwrap();
    let server = server(dir.path()).await;
    let mut boss = Client::connect(server.addresses().grpc, agent("boss")).await.unwrap();
    let mut ids = Vec::new();
    for _ in 0..100 {
        let metadata = HashMap::from([("large".to_owned(), "x".repeat(60 * 1024))]);
        ids.push(boss.create(CreateTaskRequest { metadata, ..own() }).await);
    }
    let (mut found, mut pages, mut page_token) = (Vec::new(), 0, String::new());
    loop {
        let page = boss.list(TaskFilter { limit: 1000, page_token, ..TaskFilter::default() }).await;
        assert!(page.success && page.total_count == 100, "{}", page.error);
        assert!(prost::Message::encoded_len(&page) < 4 * 1024 * 1024, "{} tasks", page.tasks.len());
        found.extend(page.tasks.into_iter().map(|task| task.task_id));
        pages += 1;
        page_token = page.next_page_token;
        if page_token.is_empty() {
            break;
        }
    }
    assert!(pages > 2, "{pages}");
    found.sort();
    ids.sort();
    assert_eq!(found, ids);
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_workspace_has_as_many_open_tasks_as_the_settings_say() {
    let dir = tempfile::tempdir().unwrap();
    let tasks = Options { open_per_workspace: 2, ..Options::default() };
    let config = Config { data_dir: dir.path().to_owned(), dev: true, tasks, ..Config::on_free_ports() };
    let server = Server::start(config.clone()).await.unwrap();
    let mut boss = Client::connect(server.addresses().grpc, agent("boss")).await.unwrap();
    let one = boss.create(own()).await;
    boss.create(pool()).await;
    assert_eq!(boss.ask(own()).await.error_code, "ERR_QUOTA_001");
    boss.op(Op::Complete, &one).await;
    let two = boss.create(own()).await;
    server.stop().await;
    // Counted again from the rows.
    let server = Server::start(config).await.unwrap();
    let mut boss = Client::connect_when_free(server.addresses().grpc, agent("boss")).await;
    assert_eq!(boss.ask(own()).await.error_code, "ERR_QUOTA_001");
    // What was made already is not made again, and so needs no room.
    let named = || CreateTaskRequest { idempotency_key: "n".into(), ..own() };
    boss.op(Op::Complete, &two).await;
    let made = boss.create(named()).await;
    assert_eq!(boss.create(named()).await, made);
    assert_eq!(boss.ask(own()).await.error_code, "ERR_QUOTA_001");
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_attempt_at_a_task_that_fits_no_frame_fails_and_its_workers_stream_goes_on() {
    let dir = tempfile::tempdir().unwrap();
    let server = server(dir.path()).await;
    let grpc = server.addresses().grpc;
    let mut boss = Client::connect(grpc, agent("boss")).await.unwrap();
    let large = boss.create(pool()).await;
    sql::put_task_payload(server.store(), &large, vec![7; 5_000_000]).await;
    let small = boss.create(pool()).await;
    let mut worker = Client::connect(grpc, named("miner", "m")).await.unwrap();
    let (mut refused, mut given) = (String::new(), String::new());
    while refused.is_empty() || given.is_empty() {
        match worker.next().await.unwrap().expect("the stream goes on") {
            Down::Error(error) => refused = error.code,
            Down::TaskAssignment(assignment) => given = assignment.task_id,
            _ => {}
        }
    }
    assert_eq!((refused.as_str(), given), ("ERR_MESSAGE_TOO_LARGE", small));
    boss.becomes(&large, Status::Failed).await;
    server.stop().await;
}

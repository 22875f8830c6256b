//! Who sees a task, hears of it, and may touch it.

use std::collections::HashMap;

use trunkline_proto::v1::{
    AdminQuery, AgentIdentity, CreateTaskRequest, InitConnection, ProgressReport, SwitchWorkspace,
    TaskAssignmentMode as Mode, TaskFilter, TaskStatus as Status, TaskSubscriptionOperation, admin_query,
    downstream_message::Payload as Down, init_connection::ClientType, task_event::Event, task_operation::OpType as Op,
    task_subscription_operation, upstream_message::Payload as Up,
};

use super::{named, orchestrator, own, pool, server, service, user};
use crate::client::{Client, Line, agent};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn lists_are_paged_counted_and_kept_from_strangers() {
    let dir = tempfile::tempdir().unwrap();
    let server = server(dir.path()).await;
    let grpc = server.addresses().grpc;
    let mut boss = Client::connect(grpc, agent("boss")).await.unwrap();
    let mut made = Vec::new();
    for _ in 0..25 {
        made.push(boss.create(pool()).await);
    }
    let (mut seen, mut page_token, mut pages) = (Vec::new(), String::new(), 0);
    loop {
        let page = boss.list(TaskFilter { limit: 5, page_token, ..TaskFilter::default() }).await;
        assert_eq!(page.total_count, 25);
        seen.extend(page.tasks.into_iter().map(|task| task.task_id));
        pages += 1;
        page_token = page.next_page_token;
        if page_token.is_empty() {
            break;
        }
    }
    assert_eq!(pages, 5, "the last full page is known to be the last");
    seen.sort();
    made.sort();
    assert_eq!(seen, made);
    let offset = boss.list(TaskFilter { limit: 10, offset: 20, ..TaskFilter::default() }).await;
    assert_eq!(offset.tasks.len(), 5);
    let mut ann = Client::connect(grpc, user("1")).await.unwrap();
    let anns = ann.create(CreateTaskRequest { workspace: "ws".into(), ..own() }).await;
    let of = |subject_type: &str, subject_id: &str, authority_mode: &str| TaskFilter {
        subject_type: subject_type.into(),
        subject_id: subject_id.into(),
        authority_mode: authority_mode.into(),
        ..TaskFilter::default()
    };
    for (filter, count) in [
        (of("user", "", ""), 1),
        (of("user", "ann", "direct"), 1),
        (of("", "ann", ""), 1),
        (of("user", "ben", ""), 0),
        (of("agent", "", ""), 0),
        (of("", "", "delegated"), 0),
        (TaskFilter { authority_grant_id: "g".into(), ..TaskFilter::default() }, 0),
        (TaskFilter::default(), 26),
    ] {
        let page = boss.list(filter.clone()).await;
        assert_eq!((page.success, page.total_count), (true, count), "{filter:?}");
    }
    let mut admin = Client::connect(grpc, orchestrator("o")).await.unwrap();
    ann.op(Op::Claim, &anns).await;
    let stats = AdminQuery { op: admin_query::OpType::GetStats.into(), ..AdminQuery::default() };
    admin.put(Up::AdminQuery(stats.into())).await;
    let stats = admin.wait_for(|down| if let Down::Admin(reply) = down { reply.stats } else { None }).await;
    assert_eq!((stats.total_tasks, stats.pending_tasks, stats.running_tasks), (26, 25, 1));
    let mut stranger = Client::connect(grpc, service(true)).await.unwrap();
    let refused = stranger.list(TaskFilter { workspace: "ws".into(), ..TaskFilter::default() }).await;
    assert!(!refused.success && refused.error.contains("not authorized to list tasks"), "{}", refused.error);
    assert_eq!(stranger.list(TaskFilter::default()).await.total_count, 0, "its own, which are none");
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_follows_a_task_sees_its_children_and_its_past() {
    let dir = tempfile::tempdir().unwrap();
    let server = server(dir.path()).await;
    let grpc = server.addresses().grpc;
    let mut boss = Client::connect(grpc, agent("boss")).await.unwrap();
    let parent =
        boss.create(CreateTaskRequest { correlation_id: "corr".into(), context_id: "ctx".into(), ..own() }).await;
    let mut viewer = Client::connect(grpc, agent("viewer")).await.unwrap();
    let op = task_subscription_operation::OpType::Subscribe.into();
    let subscribe = TaskSubscriptionOperation { op, task_id: parent.clone(), ..Default::default() };
    viewer.put(Up::TaskSubscriptionOp(subscribe.into())).await;
    let refused = viewer
        .wait_for(|down| if let Down::TaskSubscriptionResponse(reply) = down { Some(*reply) } else { None })
        .await;
    assert_eq!((refused.success, refused.error.as_str()), (false, "task not found"));

    let mut admin = Client::connect(grpc, orchestrator("o")).await.unwrap();
    admin.follow(&parent, true, 0).await;
    let child = boss.create(CreateTaskRequest { parent_task_id: parent.clone(), ..own() }).await;
    let info = boss.task(&child).await;
    assert_eq!((&info.parent_task_id, &info.root_task_id, info.correlation_id.as_str()), (&parent, &parent, "corr"));
    assert_eq!(info.context_id, "ctx");
    boss.put(Up::Progress(ProgressReport { task_id: child.clone(), completion: 0.5, ..Default::default() }.into()))
        .await;
    viewer
        .put(Up::Progress(ProgressReport { task_id: child.clone(), completion: 0.9, ..Default::default() }.into()))
        .await;
    viewer.barrier().await;
    boss.op(Op::Complete, &child).await;
    let mut told = Vec::new();
    while told.len() < 6 {
        let event = admin.event().await;
        let what = match event.event.unwrap() {
            Event::StatusChanged(change) => format!("{}>{}", change.from_status, change.to_status),
            Event::Progress(progress) => format!("{} %", progress.progress * 100.0),
            Event::ChildLifecycle(child) => child.lifecycle,
            other => panic!("{other:?}"),
        };
        let of = if event.task_id == parent { "parent" } else { "child" };
        if !(of == "parent" && what == "0>1") {
            told.push(format!("{of} {what}"));
        }
        if told.len() == 5 {
            // Whoever is no party reports into the void: there is no sixth.
            break;
        }
    }
    told.sort();
    assert_eq!(told, ["child 0>1", "child 1>3", "child 50 %", "parent completed", "parent spawned"]);

    // From a time on, everything again, in order.
    admin.follow(&child, false, 1).await;
    let mut again = Vec::new();
    while again.len() < 3 {
        again.push(admin.event().await.event.unwrap());
    }
    assert!(matches!(&again[..], [Event::StatusChanged(_), Event::Progress(_), Event::StatusChanged(_)]), "{again:?}");
    boss.send(&format!("tk::ws::{child}::events"), "mine").await;
    assert_eq!(boss.error().await.code, "ERR_PERMISSION_DENIED", "the lane is the server's");
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_user_hears_what_is_said_about_its_task_in_every_window() {
    let dir = tempfile::tempdir().unwrap();
    let server = server(dir.path()).await;
    let grpc = server.addresses().grpc;
    let switch = async |client: &Client| {
        let to = SwitchWorkspace { new_workspace_id: "ws".into() };
        client.put(Up::SwitchWorkspace(to.into())).await;
    };
    let mut ann = Client::connect(grpc, user("one")).await.unwrap();
    switch(&ann).await;
    let mut worker = Client::connect(grpc, named("miner", "m")).await.unwrap();
    let metadata = HashMap::from([
        ("subject_participant".to_owned(), "true".to_owned()),
        ("thread_id".to_owned(), "t7".to_owned()),
    ]);
    let id = ann.create(CreateTaskRequest { metadata, ..pool() }).await;
    worker.assignment().await;
    worker.op(Op::Claim, &id).await;
    let running = ann
        .wait_for(|down| match down {
            Down::ProgressUpdate(update) if update.metadata.contains_key("status") => Some(*update),
            _ => None,
        })
        .await;
    assert_eq!((running.recipient.as_str(), running.metadata["thread_id"].as_str()), ("us::ann", "t7"));
    let lane = format!("tk::ws::{id}::msg");
    worker.send(&lane, "one").await;
    worker.send(&lane, "two").await;
    for text in ["one", "two"] {
        let message = ann.wait_for(|down| if let Down::Msg(message) = down { Some(message) } else { None }).await;
        assert_eq!((message.payload.as_ref(), message.source_topic.as_str()), (text.as_bytes(), "ag::ws::miner::m"));
    }
    // Another window, later: the whole turn again.
    let mut other = Client::connect(grpc, user("two")).await.unwrap();
    switch(&other).await;
    for text in ["one", "two"] {
        let message = other.wait_for(|down| if let Down::Msg(message) = down { Some(message) } else { None }).await;
        assert_eq!(message.payload, text);
    }
    let mut stranger = Client::connect(grpc, service(true)).await.unwrap();
    stranger.send(&lane, "mine").await;
    assert_eq!(stranger.error().await.code, "ERR_PERMISSION_DENIED");
    stranger.send("tk::ws::00000000-0000-0000-0000-000000000000::msg", "nobody's").await;
    assert_eq!(stranger.error().await.code, "ERR_PERMISSION_DENIED");
    worker.op(Op::Complete, &id).await;
    for client in [&mut ann, &mut other] {
        client
            .wait_for(|down| match down {
                Down::ProgressUpdate(update) => (update.metadata.get("status")? == "completed").then_some(()),
                _ => None,
            })
            .await;
    }
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_tasks_token_admits_whom_it_names_until_the_task_ends() {
    let dir = tempfile::tempdir().unwrap();
    let server = server(dir.path()).await;
    let grpc = server.addresses().grpc;
    let mut boss = Client::connect(grpc, agent("boss")).await.unwrap();
    let wanted = |target: &str| CreateTaskRequest { target_identity: target.into(), ..own() };
    let without = boss.ask(wanted("ag::ws::miner::m")).await;
    assert_eq!((without.success, without.task_token.as_str()), (true, ""), "it takes MANAGE");
    let mut admin = Client::connect(grpc, orchestrator("o")).await.unwrap();
    admin.manage("ag::ws::impl::boss", "ws").await;
    assert_eq!(boss.ask(wanted("ag::_system::miner::m")).await.task_token, "");
    let created = boss.ask(wanted("ag::ws::miner::m")).await;
    let come = |specifier: &str| {
        let mut init = named("miner", specifier);
        init.credentials.insert("token".into(), created.task_token.clone());
        init
    };
    let refused = Client::connect(grpc, come("other")).await.err().unwrap();
    assert_eq!(refused.code(), tonic::Code::PermissionDenied);
    assert_eq!(refused.message(), "token issued for ag::ws::miner::m, not ag::ws::miner::other");
    let mut worker = Client::connect(grpc, come("m")).await.unwrap();
    assert_eq!(boss.becomes(&created.task_id, Status::Running).await.assigned_to, "ag::ws::miner::m");
    let child = worker.create(own()).await;
    let child = worker.task(&child).await;
    assert_eq!(child.parent_task_id, created.task_id, "what its session makes is part of it");
    worker.op(Op::Complete, &created.task_id).await;
    worker.close().await;
    let refused = Client::connect(grpc, come("m")).await.err().unwrap();
    assert_eq!(refused.code(), tonic::Code::Unauthenticated);
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn whoever_stands_for_a_task_may_lose_its_line_and_not_for_long() {
    let dir = tempfile::tempdir().unwrap();
    let server = server(dir.path()).await;
    let grpc = server.addresses().grpc;
    let mut boss = Client::connect(grpc, agent("boss")).await.unwrap();
    let mut admin = Client::connect(grpc, orchestrator("o")).await.unwrap();
    admin.manage("ag::ws::impl::boss", "ws").await;
    let wanted = CreateTaskRequest { target_identity: "ag::ws::miner::m".into(), ..own() };
    let created = boss.ask(wanted).await;
    let mut init = named("miner", "m");
    init.credentials.insert("token".into(), created.task_token.clone());

    let line = Line::to(grpc).await;
    let lost = Client::connect(line.grpc, init.clone()).await.unwrap();
    boss.becomes(&created.task_id, Status::Running).await;
    line.cut().await;
    boss.wait_until_gone(&created.task_id).await;
    drop(lost);

    let line = Line::to(grpc).await;
    let again = Client::connect(line.grpc, init.clone()).await.unwrap();
    let task = boss.task(&created.task_id).await;
    assert_eq!((task.status(), task.disconnected_at), (Status::Running, 0), "it came back in time, by its token");
    line.cut().await;
    let task = boss.becomes(&created.task_id, Status::Failed).await;
    assert_eq!(task.error, "worker disconnected and did not reconnect within grace window (1000ms)");
    drop(again);
    let refused = Client::connect(grpc, init).await.err().unwrap();
    assert_eq!(refused.code(), tonic::Code::Unauthenticated, "its token went with it");
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn parties_are_parties_wherever_they_are() {
    let dir = tempfile::tempdir().unwrap();
    let server = server(dir.path()).await;
    let grpc = server.addresses().grpc;
    // A user's other window.
    let mut one = Client::connect(grpc, user("one")).await.unwrap();
    let id = one.create(CreateTaskRequest { workspace: "ws".into(), ..pool() }).await;
    let mut two = Client::connect(grpc, user("two")).await.unwrap();
    assert_eq!(two.op(Op::Cancel, &id).await.status, i32::from(Status::Cancelled));
    // An assignee that lives elsewhere.
    let mut admin = Client::connect(grpc, orchestrator("o")).await.unwrap();
    admin.register("guest").await;
    let guest = AgentIdentity { workspace: "elsewhere".into(), implementation: "guest".into(), specifier: "g".into() };
    let guest = InitConnection { client_type: Some(ClientType::Agent(guest)), ..InitConnection::default() };
    let mut guest = Client::connect(grpc, guest).await.unwrap();
    let targeted = CreateTaskRequest {
        assignment_mode: Mode::Targeted.into(),
        target_agent_id: "ag::elsewhere::guest::g".into(),
        workspace: "ws".into(),
        ..pool()
    };
    let id = one.create(targeted).await;
    assert_eq!(guest.assignment().await.task_id, id);
    guest.op(Op::Complete, &id).await;
    server.stop().await;
}

//! Tasks that wait, and what ends it.

use std::{collections::HashMap, time::Duration};

use trunkline_proto::v1::{
    HibernationDescriptor, TaskOperation, TaskStatus as Status, WaitReason, WaitSpec,
    downstream_message::Payload as Down, task_operation::OpType as Op, upstream_message::Payload as Up,
};

use super::{named, own, pool, server, user};
use crate::client::{Client, agent};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn waits_end_by_what_they_wait_for() {
    let dir = tempfile::tempdir().unwrap();
    let server = server(dir.path()).await;
    let grpc = server.addresses().grpc;
    let mut boss = Client::connect(grpc, agent("boss")).await.unwrap();
    let (a, b) = (boss.create(own()).await, boss.create(own()).await);
    let wait_for = |on: &[&String]| {
        Some(WaitSpec { depends_on: on.iter().map(|id| (*id).clone()).collect(), ..WaitSpec::default() })
    };
    let all = boss.create(own()).await;
    let any = boss.create(own()).await;
    for id in [&all, &any] {
        boss.op(Op::Claim, id).await;
    }
    assert!(!boss.op_with(Op::WaitFor, &all, "", wait_for(&[&all])).await.success, "not for itself");
    assert_eq!(boss.task(&all).await.status, i32::from(Status::Running));
    assert!(boss.op_with(Op::WaitFor, &all, "", wait_for(&[&a, &b])).await.success);
    let wait = WaitSpec { wake_on_any: true, ..wait_for(&[&a, &b]).unwrap() };
    assert!(boss.op_with(Op::WaitFor, &any, "", Some(wait)).await.success);
    let circle = boss.op_with(Op::WaitFor, &b, "", wait_for(&[&all])).await;
    assert!(!circle.success, "b is awaited by what it would wait for");
    boss.op(Op::Complete, &a).await;
    boss.becomes(&any, Status::Running).await;
    assert_eq!(boss.task(&all).await.status, i32::from(Status::WaitingDependency));
    boss.op(Op::Fail, &b).await;
    boss.becomes(&all, Status::Running).await;
    // What has ended already is no reason to wait.
    assert!(boss.op_with(Op::WaitFor, &all, "", wait_for(&[&a])).await.success);
    boss.becomes(&all, Status::Running).await;

    let timed = WaitSpec { reason: WaitReason::Input.into(), timeout_ms: 50, ..WaitSpec::default() };
    boss.pause(&all, timed.clone()).await;
    assert_eq!(boss.becomes(&all, Status::Failed).await.error, "wait timeout");
    let soon = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap().as_millis() as i64 + 50;
    boss.pause(&any, WaitSpec { timeout_ms: 0, scheduled_wake_unix_ms: soon, ..timed }).await;
    boss.becomes(&any, Status::Running).await;
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_message_ends_the_wait_for_it() {
    let dir = tempfile::tempdir().unwrap();
    let server = server(dir.path()).await;
    let grpc = server.addresses().grpc;
    let mut worker = Client::connect(grpc, named("miner", "m")).await.unwrap();
    let ann = Client::connect(grpc, user("w")).await.unwrap();
    let id = worker.create(own()).await;
    worker.op(Op::Claim, &id).await;
    let input_match = HashMap::from([("thread".to_owned(), "7".to_owned())]);
    let expected_principal = "us::ann".to_owned();
    let wait = WaitSpec { reason: WaitReason::Input.into(), expected_principal, input_match, ..WaitSpec::default() };
    worker.pause(&id, wait).await;
    ann.send("ag::ws::miner::m", r#"{"thread": "8"}"#).await;
    worker.message().await;
    assert_eq!(worker.task(&id).await.status, i32::from(Status::WaitingInput));
    ann.send("ag::ws::miner::m", r#"{"thread": "7"}"#).await;
    // Its worker is told twice: the message, and that the task goes on.
    let event = worker.event().await;
    assert_eq!(event.task_id, id);
    assert_eq!(worker.becomes(&id, Status::Running).await.wait_spec, None);
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn hibernated_work_goes_on_with_a_fresh_worker() {
    let dir = tempfile::tempdir().unwrap();
    let server = server(dir.path()).await;
    let grpc = server.addresses().grpc;
    let mut boss = Client::connect(grpc, agent("boss")).await.unwrap();
    let mut worker = Client::connect(grpc, named("miner", "one")).await.unwrap();
    let sleep = |timeout_ms, policy: &str| WaitSpec {
        reason: WaitReason::Hibernation.into(),
        timeout_ms,
        hibernation: Some(HibernationDescriptor {
            checkpoint_key: "cp".into(),
            resume_session_id: "sess".into(),
            escalation_policy: policy.into(),
            ..HibernationDescriptor::default()
        }),
        ..WaitSpec::default()
    };
    let id = boss.create(pool()).await;
    worker.assignment().await;
    worker.op(Op::Claim, &id).await;
    let refused = worker.op_with(Op::Pause, &id, "", Some(sleep(0, ""))).await;
    assert!(refused.error.contains("requires a saved checkpoint with key \"cp\""), "{}", refused.error);
    worker.checkpoint("cp").await;
    let pause = TaskOperation {
        op: Op::Pause.into(),
        task_id: id.clone(),
        wait_spec: Some(sleep(0, "")),
        ..TaskOperation::default()
    };
    worker.put(Up::TaskOp(pause.into())).await;
    // The answer and this come in any order.
    let told = worker.wait_for(|down| if let Down::TaskHibernated(told) = down { Some(*told) } else { None }).await;
    boss.becomes(&id, Status::Hibernated).await;
    assert_eq!((told.task_id.as_str(), told.descriptor.unwrap().checkpoint_key.as_str()), (id.as_str(), "cp"));
    worker.close().await;
    let mut fresh = Client::connect(grpc, named("miner", "two")).await.unwrap();
    tokio::time::sleep(Duration::from_millis(1300)).await;
    assert_eq!(boss.task(&id).await.status, i32::from(Status::Hibernated), "nobody has to be there");
    boss.op(Op::Resume, &id).await;
    let again = fresh.assignment().await;
    assert_eq!(
        (again.task_id.as_str(), again.checkpoint_key.as_str(), again.resume_session_id.as_str()),
        (&*id, "cp", "sess")
    );
    fresh.checkpoint("cp").await;
    fresh.op(Op::Claim, &id).await;
    fresh.pause(&id, sleep(500, "retry")).await;
    assert_eq!(fresh.assignment().await.task_id, id, "its timeout wakes it");
    fresh.op(Op::Claim, &id).await;
    fresh.pause(&id, sleep(50, "alert")).await;
    tokio::time::sleep(Duration::from_millis(200)).await;
    assert_eq!(boss.task(&id).await.status, i32::from(Status::Hibernated));
    boss.op(Op::Resume, &id).await;
    fresh.assignment().await;
    fresh.op(Op::Claim, &id).await;
    fresh.pause(&id, sleep(50, "fail")).await;
    assert_eq!(boss.becomes(&id, Status::Failed).await.error, "wait timeout");
    server.stop().await;
}

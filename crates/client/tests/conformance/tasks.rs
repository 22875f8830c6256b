//! Tasks: three ways of assigning them, their life cycle, and who may touch them.

use std::collections::BTreeSet;

use futures_util::StreamExt as _;
use trunkline_client::{
    AccessLevel, Agent, Client, Error, Kind, Received, Service, User,
    proto::{ProgressKind, ProgressUpdate, TaskFilter, task_event},
    task::{Assignment, Created, NewTask, Page, Progress, TaskClass, TaskInfo, TaskPriority, TaskStatus, Wait},
};

use crate::world_state::{WS, World, invalid, is_now, plain, refused, silence, soon, until};

/// An id that no task has.
const NOBODY: &str = "00000000-0000-0000-0000-000000000000";

fn work() -> NewTask {
    NewTask::new("work")
}

fn digging() -> NewTask {
    NewTask::new("dig").for_pool("miner")
}

async fn create(client: &Client, task: NewTask) -> Created {
    let created = client.tasks().create(task).await.unwrap();
    assert!(looks_like_an_id(&created.task_id), "{}", created.task_id);
    created
}

fn looks_like_an_id(id: &str) -> bool {
    id.len() == NOBODY.len() && id.split('-').map(str::len).eq([8, 4, 4, 4, 12])
}

async fn own(client: &Client) -> String {
    create(client, work()).await.task_id
}

/// A task of one's own that was begun.
async fn begun(client: &Client) -> String {
    let id = own(client).await;
    client.tasks().claim(&id).await.unwrap();
    id
}

async fn get(client: &Client, id: &str) -> TaskInfo {
    client.tasks().get(id).await.unwrap()
}

async fn status(client: &Client, id: &str) -> TaskStatus {
    get(client, id).await.status()
}

/// The assignment of this task.
async fn given(assignments: &mut Received<Assignment>, id: &str) -> Assignment {
    soon(async {
        loop {
            let assignment = assignments.next().await.unwrap();
            if assignment.task_id == id {
                return assignment;
            }
        }
    })
    .await
}

/// News of this task in this state.
async fn told(progress: &mut Received<ProgressUpdate>, id: &str, state: &str) -> ProgressUpdate {
    soon(async {
        loop {
            let update = progress.next().await.unwrap();
            if (&*update.task_id, &*update.state) == (id, state) {
                return update;
            }
        }
    })
    .await
}

async fn list(client: &Client, filter: TaskFilter) -> Page {
    client.tasks().list(filter).await.unwrap()
}

async fn listed(client: &Client, filter: TaskFilter) -> BTreeSet<String> {
    list(client, filter).await.tasks.into_iter().map(|task| task.task_id).collect()
}

fn set(ids: &[&str]) -> BTreeSet<String> {
    ids.iter().map(|id| (*id).to_owned()).collect()
}

// For its creator itself.

#[tokio::test]
async fn a_self_assigned_task_belongs_to_its_creator() {
    let world = World::begin().await;
    let agent = world.agent("worker").await;
    let identity = agent.identity().to_string();
    let created = create(&agent, work()).await;
    assert_eq!((&*created.status, created.assigned_to.as_deref()), ("assigned", Some(&*identity)));
    let task = get(&agent, &created.task_id).await;
    assert_eq!((&task.assigned_to, &task.creator_actor_id), (&identity, &identity));
    assert_eq!(task.status(), TaskStatus::Queued);
    assert_eq!(task.workspace, WS, "its creator's");
    silence("it is not announced", agent.assignments().next()).await;
}

#[tokio::test]
async fn several_principals_may_create_tasks() {
    let world = World::begin().await;
    let creators = [
        ("agent", plain(&world.agent("worker").await)),
        ("unique task", plain(&world.task().await)),
        ("user", plain(&world.connect(User::builder("ann", "window").workspace(WS)).await)),
    ];
    for (name, creator) in creators {
        let id = create(&creator, work().workspace(WS)).await.task_id;
        assert_eq!(get(&creator, &id).await.creator_actor_id, creator.identity().as_str(), "{name}");
    }
}

#[tokio::test]
async fn a_task_carries_what_its_creator_said() {
    let world = World::begin().await;
    let agent = world.agent("worker").await;
    let task = NewTask::new("translate")
        .metadata("lang", "fr")
        .correlation("corr-1")
        .context("ctx-1")
        .class(TaskClass::Background)
        .priority(TaskPriority::High);
    let id = create(&agent, task).await.task_id;
    own(&agent).await;
    let task = get(&agent, &id).await;
    assert_eq!((&*task.task_type, &*task.metadata["lang"]), ("translate", "fr"));
    assert_eq!((&*task.correlation_id, &*task.context_id), ("corr-1", "ctx-1"));
    assert_eq!((task.task_class(), task.priority()), (TaskClass::Background, TaskPriority::High));
    is_now("created", task.created_at);
    let filter = TaskFilter { context_id: "ctx-1".into(), ..TaskFilter::default() };
    assert_eq!(listed(&agent, filter).await, set(&[&id]));
}

// For one agent.

#[tokio::test]
async fn a_targeted_task_reaches_the_online_agent() {
    let world = World::begin().await;
    world.register("reviewer", "local", &[]).await;
    let (boss, worker) = (world.agent("boss").await, world.agent("reviewer").await);
    let bystander = world.agent("reviewer").await;
    let identity = worker.identity().to_string();
    let task = NewTask::new("translate")
        .for_agent(&*identity)
        .payload(&b"\x00\xff text"[..])
        .metadata("lang", "fr")
        .class(TaskClass::Interactive);
    let created = create(&boss, task).await;
    assert_eq!((&*created.status, created.assigned_to.as_deref()), ("assigned", Some(&*identity)));
    let assignment = given(&mut worker.assignments(), &created.task_id).await;
    assert_eq!((&*assignment.task_type, &assignment.assigned_to), ("translate", &identity));
    assert_eq!(assignment.payload, &b"\x00\xff text"[..]);
    assert_eq!(assignment.metadata["lang"], "fr");
    assert_eq!(assignment.task_class(), TaskClass::Interactive);
    is_now("assigned", assignment.assigned_at);
    silence("one got it", bystander.assignments().next()).await;
}

#[tokio::test]
async fn a_targeted_task_needs_a_registered_implementation() {
    let world = World::begin().await;
    let (boss, worker) = (world.agent("boss").await, world.agent("unregistered").await);
    let answer = boss.tasks().create(work().for_agent(worker.identity().as_str())).await;
    assert_eq!(refused("not registered", answer).code(), "ERR_TASK_CREATE_FAILED");
    silence("nobody got it", worker.assignments().next()).await;
}

#[tokio::test]
async fn a_targeted_task_needs_a_proper_target() {
    let world = World::begin().await;
    let agent = world.agent("boss").await;
    for target in ["", "nonsense", "ag::too::short"] {
        refused(target, agent.tasks().create(work().for_agent(target)).await);
    }
}

#[tokio::test]
async fn a_targeted_task_for_an_absent_agent_waits_for_it() {
    let world = World::begin().await;
    world.register("reviewer", "local", &[]).await;
    let boss = world.agent("boss").await;
    let created = create(&boss, work().for_agent("ag::ws::reviewer::w1").payload("later")).await;
    assert_eq!(created.status, "orchestration_triggered");
    let worker = world.connect(Agent::builder(WS, "reviewer", "w1")).await;
    let assignment = given(&mut worker.assignments(), &created.task_id).await;
    assert_eq!((&*assignment.payload, &*assignment.assigned_to), (&b"later"[..], "ag::ws::reviewer::w1"));
}

// For a pool.

#[tokio::test]
async fn a_pool_task_reaches_one_worker() {
    let world = World::begin().await;
    let (boss, one, two) = (world.agent("boss").await, world.agent("miner").await, world.agent("miner").await);
    let created = create(&boss, digging().payload("here").metadata("depth", "3")).await;
    assert_eq!(created.status, "pending_pool");
    let mut both = futures_util::stream::select(one.assignments(), two.assignments());
    let assignment = soon(both.next()).await.unwrap();
    assert_eq!((&assignment.task_id, &*assignment.task_type), (&created.task_id, "dig"));
    assert_eq!((&*assignment.payload, &*assignment.metadata["depth"]), (&b"here"[..], "3"));
    assert_eq!(get(&boss, &created.task_id).await.assigned_to, assignment.assigned_to);
    assert!([one.identity().as_str(), two.identity().as_str()].contains(&&*assignment.assigned_to));
    silence("one is enough", both.next()).await;
}

#[tokio::test]
async fn pool_tasks_are_spread_over_the_workers() {
    let world = World::begin().await;
    let (boss, one, two) = (world.agent("boss").await, world.agent("miner").await, world.agent("miner").await);
    let mut wanted = BTreeSet::new();
    for _ in 0..8 {
        wanted.insert(create(&boss, digging()).await.task_id);
    }
    let mut both = futures_util::stream::select(one.assignments(), two.assignments());
    let (mut tasks, mut workers) = (BTreeSet::new(), BTreeSet::new());
    for _ in 0..8 {
        let assignment = soon(both.next()).await.unwrap();
        assert!(tasks.insert(assignment.task_id.clone()), "each is handed out once");
        workers.insert(assignment.assigned_to.clone());
    }
    silence("each is handed out once", both.next()).await;
    assert_eq!(tasks, wanted);
    assert_eq!(workers.len(), 2, "none is left idle");
}

#[tokio::test]
async fn a_pool_task_waits_for_a_worker_and_is_handed_out_once() {
    let world = World::begin().await;
    let boss = world.agent("boss").await;
    let created = create(&boss, digging().payload("patience")).await;
    assert_eq!(created.status, "pending_pool");
    assert_eq!(status(&boss, &created.task_id).await, TaskStatus::Queued);
    let filter = TaskFilter { status: TaskStatus::Queued.into(), ..TaskFilter::default() };
    assert_eq!(listed(&boss, filter).await, set(&[&created.task_id]));
    let first = world.agent("miner").await;
    assert_eq!(given(&mut first.assignments(), &created.task_id).await.payload, "patience");
    let second = world.agent("miner").await;
    silence("it is handed out once", second.assignments().next()).await;
}

#[tokio::test]
async fn a_pool_task_is_for_one_implementation_in_one_workspace() {
    let world = World::begin().await;
    let elsewhere = world.agent_in("elsewhere", "miner").await;
    let carpenter = world.agent("carpenter").await;
    let boss = world.agent("boss").await;
    create(&boss, digging()).await;
    silence("another workspace", elsewhere.assignments().next()).await;
    silence("another implementation", carpenter.assignments().next()).await;
}

#[tokio::test]
async fn a_pool_task_may_go_to_a_service() {
    let world = World::begin().await;
    let service = world.connect(Service::builder("miner", "one")).await;
    let boss = world.agent("boss").await;
    let created = create(&boss, digging()).await;
    given(&mut service.assignments(), &created.task_id).await;
}

#[tokio::test]
async fn a_service_may_decline_pool_tasks() {
    let world = World::begin().await;
    let service = world.connect(Service::builder("miner", "one").declines_pool_tasks()).await;
    let boss = world.agent("boss").await;
    create(&boss, digging()).await;
    silence("it declines them", service.assignments().next()).await;
}

#[tokio::test]
async fn a_pool_task_needs_an_implementation() {
    let world = World::begin().await;
    let answer = world.agent("boss").await.tasks().create(work().for_pool("")).await;
    assert_eq!(refused("no implementation", answer).code(), "ERR_TASK_CREATE_FAILED");
}

#[tokio::test]
async fn a_cancelled_pool_task_is_not_handed_out() {
    let world = World::begin().await;
    let boss = world.agent("boss").await;
    let id = create(&boss, digging()).await.task_id;
    boss.tasks().cancel(&id, "").await.unwrap();
    silence("it is cancelled", world.agent("miner").await.assignments().next()).await;
}

// Creation: limits and refusals.

#[tokio::test]
async fn an_idempotency_key_creates_one_task() {
    let world = World::begin().await;
    let agent = world.agent("worker").await;
    let first = create(&agent, work().once("key")).await.task_id;
    assert_eq!(create(&agent, work().once("key")).await.task_id, first);
    let other = create(&agent, work().once("other key")).await.task_id;
    assert_ne!(other, first);
    assert_eq!(listed(&agent, TaskFilter::default()).await, set(&[&first, &other]));
}

#[tokio::test]
async fn the_payload_limit_is_512_kibibytes() {
    const LIMIT: usize = 512 * 1024;
    let world = World::begin().await;
    let agent = world.agent("worker").await;
    create(&agent, work().payload(vec![b'x'; LIMIT])).await;
    let error = refused("a byte more", agent.tasks().create(work().payload(vec![b'x'; LIMIT + 1])).await);
    assert_eq!(error.code(), "TASK_PAYLOAD_TOO_LARGE");
}

#[tokio::test]
async fn an_invalid_identifier_is_refused() {
    let world = World::begin().await;
    let agent = world.agent("worker").await;
    for task in [digging().workspace("bad::ws"), digging().workspace("bad ws"), work().for_pool("bad*impl")] {
        let what = format!("{task:?}");
        let error = refused(&what, agent.tasks().create(task).await);
        assert_eq!((error.code(), error.kind()), ("ERR_INVALID_IDENTIFIER", Kind::Invalid), "{what}");
    }
}

#[tokio::test]
async fn a_service_needs_a_grant_to_create_a_task() {
    let world = World::begin().await;
    let service = world.service().await;
    let error = refused("no grant", service.tasks().create(work().workspace(WS)).await);
    assert_eq!((error.code(), error.kind()), ("ERR_PERMISSION_DENIED", Kind::Denied));
    world.grant(&service, "workspace", WS, AccessLevel::Write).await;
    create(&service, work().workspace(WS)).await;
}

#[tokio::test]
async fn a_workspace_is_required() {
    let world = World::begin().await;
    invalid("a service lives in none", world.service().await.tasks().create(work()).await);
}

// The life of a task.

#[tokio::test]
async fn a_claim_starts_and_complete_finishes() {
    let world = World::begin().await;
    let agent = world.agent("worker").await;
    let id = own(&agent).await;
    let claimed = agent.tasks().claim(&id).await.unwrap();
    assert_eq!(claimed.status(), TaskStatus::Running);
    is_now("started", claimed.started_at);
    let completed = agent.tasks().complete(&id).await.unwrap();
    assert_eq!(completed.status(), TaskStatus::Completed);
    assert!(completed.completed_at >= completed.started_at);
    assert_eq!(status(&agent, &id).await, TaskStatus::Completed);
}

#[tokio::test]
async fn the_assigned_worker_completes_and_the_creator_is_told() {
    let world = World::begin().await;
    let (boss, worker) = (world.agent("boss").await, world.agent("miner").await);
    let id = create(&boss, digging()).await.task_id;
    given(&mut worker.assignments(), &id).await;
    worker.tasks().claim(&id).await.unwrap();
    worker.tasks().complete(&id).await.unwrap();
    let mut news = boss.progress();
    for state in ["running", "completed"] {
        let update = told(&mut news, &id, state).await;
        assert_eq!(update.kind(), ProgressKind::Task, "{state}");
        assert_eq!((&*update.recipient, &*update.workspace), (boss.identity().as_str(), WS), "{state}");
    }
    assert_eq!(status(&boss, &id).await, TaskStatus::Completed);
    silence("the worker knows", worker.progress().next()).await;
}

#[tokio::test]
async fn a_failure_keeps_its_reason() {
    let world = World::begin().await;
    let agent = world.agent("worker").await;
    let id = begun(&agent).await;
    let failed = agent.tasks().fail(&id, "out of coal").await.unwrap();
    assert_eq!((failed.status(), &*failed.error), (TaskStatus::Failed, "out of coal"));
    assert_eq!(get(&agent, &id).await.error, "out of coal");
}

#[tokio::test]
async fn a_failure_is_reported_to_the_creator() {
    let world = World::begin().await;
    let (boss, worker) = (world.agent("boss").await, world.agent("miner").await);
    let id = create(&boss, digging()).await.task_id;
    given(&mut worker.assignments(), &id).await;
    worker.tasks().fail(&id, "cave-in").await.unwrap();
    let update = told(&mut boss.progress(), &id, "failed").await;
    assert!(update.summary.contains("cave-in"), "{}", update.summary);
}

#[tokio::test]
async fn a_retry_queues_a_failed_task_again() {
    let world = World::begin().await;
    let agent = world.agent("worker").await;
    let id = own(&agent).await;
    agent.tasks().fail(&id, "hiccup").await.unwrap();
    let retried = agent.tasks().retry(&id).await.unwrap();
    assert_eq!((retried.status(), &*retried.assigned_to, &*retried.error), (TaskStatus::Queued, "", ""));
    agent.tasks().claim(&id).await.unwrap();
    assert_eq!(agent.tasks().complete(&id).await.unwrap().status(), TaskStatus::Completed);
}

#[tokio::test]
async fn cancel_ends_a_task() {
    let world = World::begin().await;
    let agent = world.agent("worker").await;
    for (what, id) in [("queued", own(&agent).await), ("running", begun(&agent).await)] {
        assert_eq!(agent.tasks().cancel(&id, "").await.unwrap().status(), TaskStatus::Cancelled, "{what}");
        assert_eq!(status(&agent, &id).await, TaskStatus::Cancelled, "{what}");
    }
}

#[tokio::test]
async fn a_cancelled_task_may_be_retried() {
    let world = World::begin().await;
    let boss = world.agent("boss").await;
    let id = create(&boss, digging()).await.task_id;
    boss.tasks().cancel(&id, "").await.unwrap();
    assert_eq!(boss.tasks().retry(&id).await.unwrap().status(), TaskStatus::Queued);
    given(&mut world.agent("miner").await.assignments(), &id).await;
}

#[tokio::test]
async fn a_failed_pool_task_is_handed_out_again_after_retry() {
    let world = World::begin().await;
    let (boss, worker) = (world.agent("boss").await, world.agent("miner").await);
    let mut assignments = worker.assignments();
    let id = create(&boss, digging()).await.task_id;
    given(&mut assignments, &id).await;
    worker.tasks().fail(&id, "hiccup").await.unwrap();
    boss.tasks().retry(&id).await.unwrap();
    given(&mut assignments, &id).await;
}

#[tokio::test]
async fn reject_declines_a_task_for_good() {
    let world = World::begin().await;
    let (boss, worker) = (world.agent("boss").await, world.agent("miner").await);
    let id = create(&boss, digging()).await.task_id;
    given(&mut worker.assignments(), &id).await;
    let rejected = worker.tasks().reject(&id, "not my job").await.unwrap();
    assert_eq!((rejected.status(), &*rejected.error), (TaskStatus::Rejected, "not my job"));
    refused("it was rejected", boss.tasks().retry(&id).await);
}

#[tokio::test]
async fn pause_and_resume() {
    let world = World::begin().await;
    let agent = world.agent("worker").await;
    let id = begun(&agent).await;
    let paused = agent.tasks().pause(&id, Wait::for_input().from("us::ann")).await.unwrap();
    assert_eq!(paused.status(), TaskStatus::WaitingInput);
    assert_eq!(paused.wait_spec.unwrap().expected_principal, "us::ann");
    let resumed = agent.tasks().resume(&id).await.unwrap();
    assert_eq!((resumed.status(), resumed.wait_spec), (TaskStatus::Running, None));
}

#[tokio::test]
async fn pause_needs_a_running_task() {
    let world = World::begin().await;
    let agent = world.agent("worker").await;
    let id = own(&agent).await;
    invalid("it is queued", agent.tasks().pause(&id, Wait::for_input()).await);
    assert_eq!(status(&agent, &id).await, TaskStatus::Queued);
}

#[tokio::test]
async fn a_task_waits_for_another_task() {
    let world = World::begin().await;
    let agent = world.agent("worker").await;
    let (first, second) = (own(&agent).await, begun(&agent).await);
    let waiting = agent.tasks().wait_for(&second, Wait::for_tasks([&*first])).await.unwrap();
    assert_eq!(waiting.status(), TaskStatus::WaitingDependency);
    assert_eq!(waiting.depends_on, [&*first]);
    agent.tasks().claim(&first).await.unwrap();
    agent.tasks().complete(&first).await.unwrap();
    until("the second goes on", async || status(&agent, &second).await == TaskStatus::Running).await;
}

#[tokio::test]
async fn a_task_cannot_wait_for_one_that_does_not_exist() {
    let world = World::begin().await;
    let agent = world.agent("worker").await;
    let id = begun(&agent).await;
    let error = refused("nobody", agent.tasks().wait_for(&id, Wait::for_tasks([NOBODY])).await);
    assert_eq!(error.kind(), Kind::NotFound, "{error:?}");
    assert_eq!(status(&agent, &id).await, TaskStatus::Running);
}

/// Any operation, by its name.
async fn operate(client: &Client, op: &str, id: &str) -> Result<TaskInfo, Error> {
    let tasks = client.tasks();
    match op {
        "claim" => tasks.claim(id).await,
        "complete" => tasks.complete(id).await,
        "fail" => tasks.fail(id, "").await,
        "cancel" => tasks.cancel(id, "").await,
        "retry" => tasks.retry(id).await,
        "reject" => tasks.reject(id, "").await,
        "resume" => tasks.resume(id).await,
        other => panic!("no operation {other}"),
    }
}

#[tokio::test]
async fn a_finished_task_refuses() {
    let world = World::begin().await;
    let agent = world.agent("worker").await;
    let cases = [
        ("complete", "cancel"),
        ("complete", "retry"),
        ("complete", "claim"),
        ("complete", "fail"),
        ("fail", "cancel"),
        ("cancel", "cancel"),
        ("cancel", "claim"),
    ];
    for (last, op) in cases {
        let id = begun(&agent).await;
        let before = operate(&agent, last, &id).await.unwrap().status();
        refused(&format!("{op} after {last}"), operate(&agent, op, &id).await);
        assert_eq!(status(&agent, &id).await, before, "{op} after {last}");
    }
}

// Who may see and touch a task.

#[tokio::test]
async fn strangers_cannot_tell_that_a_task_exists() {
    let world = World::begin().await;
    let owner = world.agent("worker").await;
    let id = own(&owner).await;
    let strangers = [
        ("colleague", plain(&world.agent("worker").await)),
        ("outsider", plain(&world.agent_in("elsewhere", "worker").await)),
        ("user", plain(&world.connect(User::builder("ann", "window").workspace(WS)).await)),
        ("service", plain(&world.service().await)),
    ];
    for (name, stranger) in strangers {
        let missing = refused(name, stranger.tasks().get(NOBODY).await);
        assert_eq!(missing.kind(), Kind::NotFound, "{name}");
        assert_eq!(refused(name, stranger.tasks().get(&id).await).to_string(), missing.to_string(), "{name}");
        for op in ["claim", "complete", "fail", "cancel", "retry", "reject", "resume"] {
            let error = refused(op, operate(&stranger, op, &id).await);
            assert_eq!(error.to_string(), missing.to_string(), "{name}: {op}");
        }
        refused(name, stranger.tasks().follow(&id, false).await);
    }
    assert_eq!(status(&owner, &id).await, TaskStatus::Queued);
}

#[tokio::test]
async fn a_workspace_manager_may_touch_any_task() {
    let world = World::begin().await;
    let (owner, manager) = (world.agent("worker").await, world.agent("worker").await);
    let id = own(&owner).await;
    refused("not yet", manager.tasks().get(&id).await);
    world.grant(&manager, "workspace", WS, AccessLevel::Manage).await;
    assert_eq!(get(&manager, &id).await.task_id, id);
    manager.tasks().cancel(&id, "").await.unwrap();
}

// Lists.

#[tokio::test]
async fn a_list_shows_the_tasks_of_the_workspace() {
    let world = World::begin().await;
    let agent = world.agent("worker").await;
    let outsider = world.agent_in("elsewhere", "worker").await;
    own(&outsider).await;
    let mine = BTreeSet::from([own(&agent).await, own(&agent).await, own(&agent).await]);
    assert_eq!(listed(&agent, TaskFilter::default()).await, mine);
    assert_eq!(list(&agent, TaskFilter::default()).await.total, 3);
    assert_eq!(listed(&agent, TaskFilter { workspace: WS.into(), ..TaskFilter::default() }).await, mine);
}

#[tokio::test]
async fn a_list_by_type_and_status() {
    let world = World::begin().await;
    let agent = world.agent("worker").await;
    let mut made = Vec::new();
    for (kind, ops) in [
        ("queued", &[][..]),
        ("running", &["claim"]),
        ("done", &["claim", "complete"]),
        ("failed", &["claim", "fail"]),
        ("off", &["cancel"]),
    ] {
        let id = create(&agent, NewTask::new(kind)).await.task_id;
        for op in ops {
            operate(&agent, op, &id).await.unwrap();
        }
        made.push(id);
    }
    let [queued, running, done, failed, off] = &made[..] else { panic!("five were made") };
    let of_type = |task_type: &str| TaskFilter { task_type: task_type.to_owned(), ..TaskFilter::default() };
    let of_status = |status: TaskStatus| TaskFilter { status: status.into(), ..TaskFilter::default() };
    let codes = |all: &[TaskStatus]| all.iter().map(|status| i32::from(*status)).collect();
    let some = codes(&[TaskStatus::Failed, TaskStatus::Cancelled]);
    let others = codes(&[TaskStatus::Running, TaskStatus::Completed, TaskStatus::Failed, TaskStatus::Cancelled]);
    let cases = [
        ("type", of_type("done"), set(&[done])),
        ("no such type", of_type("no such type"), set(&[])),
        ("queued", of_status(TaskStatus::Queued), set(&[queued])),
        ("running", of_status(TaskStatus::Running), set(&[running])),
        ("completed", of_status(TaskStatus::Completed), set(&[done])),
        ("several", TaskFilter { statuses: some, ..TaskFilter::default() }, set(&[failed, off])),
        ("all but", TaskFilter { exclude_statuses: others, ..TaskFilter::default() }, set(&[queued])),
    ];
    for (what, filter, expected) in cases {
        assert_eq!(listed(&agent, filter).await, expected, "{what}");
    }
}

#[tokio::test]
async fn a_list_by_correlation() {
    let world = World::begin().await;
    let agent = world.agent("worker").await;
    let first = create(&agent, work().correlation("corr")).await.task_id;
    let second = create(&agent, work().correlation("corr")).await.task_id;
    own(&agent).await;
    let filter = TaskFilter { correlation_id: "corr".into(), ..TaskFilter::default() };
    assert_eq!(listed(&agent, filter).await, set(&[&first, &second]));
}

#[tokio::test]
async fn pages_together_are_the_whole_list() {
    let world = World::begin().await;
    let agent = world.agent("worker").await;
    let mut wanted = BTreeSet::new();
    for _ in 0..5 {
        wanted.insert(own(&agent).await);
    }
    let (mut seen, mut page_token) = (Vec::new(), String::new());
    loop {
        let page = list(&agent, TaskFilter { limit: 2, page_token, ..TaskFilter::default() }).await;
        assert!(page.tasks.len() <= 2);
        seen.extend(page.tasks.into_iter().map(|task| task.task_id));
        page_token = page.next;
        if page_token.is_empty() {
            break;
        }
    }
    assert_eq!(seen.len(), wanted.len(), "none comes twice");
    assert_eq!(BTreeSet::from_iter(seen), wanted);
}

#[tokio::test]
async fn a_made_up_page_token_is_refused() {
    let world = World::begin().await;
    let filter = TaskFilter { page_token: "not-a-token".into(), ..TaskFilter::default() };
    invalid("made up", world.agent("worker").await.tasks().list(filter).await);
}

// Following a task.

#[tokio::test]
async fn a_follower_sees_a_task_change() {
    let world = World::begin().await;
    let agent = world.agent("worker").await;
    let id = own(&agent).await;
    let mut events = agent.tasks().follow(&id, false).await.unwrap();
    agent.tasks().claim(&id).await.unwrap();
    agent.tasks().complete(&id).await.unwrap();
    for to in [TaskStatus::Running, TaskStatus::Completed] {
        soon(async {
            loop {
                let event = events.next().await.unwrap();
                assert_eq!((&event.task_id, &*event.workspace), (&id, WS));
                if matches!(event.event, Some(task_event::Event::StatusChanged(change)) if change.to_status() == to) {
                    break;
                }
            }
        })
        .await;
    }
}

#[tokio::test]
async fn a_follower_sees_progress() {
    let world = World::begin().await;
    let agent = world.agent("worker").await;
    let id = own(&agent).await;
    let mut events = agent.tasks().follow(&id, false).await.unwrap();
    agent.report(Progress::running(&*id).completion(0.5).summary("half way")).await.unwrap();
    let progress = soon(async {
        loop {
            let event = events.next().await.unwrap();
            assert_eq!(event.task_id, id);
            if let Some(task_event::Event::Progress(progress)) = event.event {
                return progress;
            }
        }
    })
    .await;
    assert!((progress.progress - 0.5).abs() < 1e-9, "{}", progress.progress);
}

#[tokio::test]
async fn who_follows_no_longer_hears_nothing() {
    let world = World::begin().await;
    let agent = world.agent("worker").await;
    let id = own(&agent).await;
    let following = agent.tasks().follow(&id, false).await.unwrap();
    let mut stays = agent.tasks().follow(&id, false).await.unwrap();
    drop(following);
    agent.tasks().cancel(&id, "").await.unwrap();
    soon(stays.next()).await.unwrap();
    silence("it was dropped", agent.task_events().next()).await;
}

// Not ported: `test_without_request_id_there_is_no_reply`, as every request here has an id, and that a pause has a reason, as
// every `Wait` has one. The `test_sdk_…` ones are what every test here does.

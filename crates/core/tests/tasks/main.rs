//! Tasks against plain rules: random requests of several workers, crashes between any two commits, workers that come and go
//! and lose what is sent to them, and a clock that jumps. No task is lost, held by two workers, done twice, or left without
//! somebody beyond its grace; what others hear of a task is what happened to it, once and in order.
//!
//! `TRUNKLINE_SEED=n` runs one sequence; a failure names its seed.

#![allow(
    clippy::disallowed_methods,
    clippy::expect_used,
    clippy::panic,
    clippy::print_stderr,
    clippy::unwrap_used,
    reason = "test code"
)]

mod sql;

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    future::Future,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering::SeqCst},
    },
};

use fastrand::Rng;
use tokio_util::task::TaskTracker;
use trunkline_core::{
    Kind,
    caller::{Caller, Credential},
    checkpoint,
    gate::Gate,
    identity::Identity,
    limits::Limits,
    registry::{Program, Registry},
    task::{
        Arrival, Backoff, Create, Desk, Event, Filter, Hibernation, Leave, Mail, Mode, OfflinePolicy, Operation,
        Options, RetryPolicy, Task, TaskEvent, TaskLimits, Tasks, Wait, WaitReason,
        decide::AVOID_MS,
        state::{Change, State},
    },
};
use trunkline_store::{
    Durability, Store,
    ledger::{self, Ledger, Relay},
    log::{self, Clock, Item, Topic},
};

/// Sequences in the test command; each has so many steps.
const SEQUENCES: u64 = 2000;
const SEQUENCES_SHARED: u64 = 150;
const STEPS: usize = 40;

/// Pool tasks that a worker has at a time.
const ROOM: usize = 2;

/// The grace of every class, in milliseconds.
const GRACE_MS: i64 = 5000;

const WORKERS: [&str; 4] = ["ag::w::miner::1", "ag::w::miner::2", "sv::miner::3", "ag::w::boss::b"];
const BOSS: usize = 3;

/// Where processes find their data: all in a directory, or the ledger in a database.
struct Home {
    store: Store,
    database: Option<String>,
}

impl Home {
    /// As a process opens it; its connections are those of the runtime that this is called in.
    async fn open(&self) -> Store {
        let mut store = self.store.clone();
        if let Some(url) = &self.database {
            let migrations = trunkline_core::migrations();
            store.ledger = Ledger::open_postgres(url, &migrations, ledger::Options::default()).await.unwrap();
        }
        store
    }
}

struct World<'a> {
    home: &'a Home,
    clock: Arc<AtomicU64>,
    rng: Rng,
    node: Option<Node>,
    /// Tasks whose making was answered, and those whose making was under way in a crash.
    known: HashSet<uuid::Uuid>,
    maybe: usize,
    /// Answers that said that a task is done.
    done: HashMap<uuid::Uuid, usize>,
    log: Vec<String>,
}

struct Node {
    runtime: tokio::runtime::Runtime,
    store: Store,
    tasks: Tasks,
    gate: Gate,
    tracker: TaskTracker,
    desks: Vec<Option<Present>>,
    sessions: u64,
}

/// A worker that is there, and what it was handed.
struct Present {
    desk: Desk,
    has: HashSet<uuid::Uuid>,
}

fn options() -> Options {
    let grace = GRACE_MS as u64 / 1000;
    Options {
        in_flight_per_worker: ROOM,
        grace_seconds: grace,
        grace_background_seconds: grace,
        grace_batch_seconds: grace,
        pool_wait_seconds: 0,
        start_wait_seconds: 0,
        keep_done_days: 0,
        keep_failed_days: 0,
        ..Options::default()
    }
}

fn caller(worker: usize) -> Caller {
    let is_boss = worker == BOSS;
    Caller::new(Identity::parse(WORKERS[worker]).unwrap(), "session".into(), Credential::none(is_boss))
}

impl World<'_> {
    /// A new process on the same data.
    fn boot(&mut self) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let (home, clock) = (self.home, self.clock.clone());
        let tracker = TaskTracker::new();
        let (store, gate, tasks) = runtime.block_on(async {
            let store = home.open().await;
            let gate = Gate::open(store.clone()).await.unwrap();
            let registry = Registry::open(gate.clone()).await.unwrap();
            let clock = Clock::new(move || clock.load(SeqCst));
            let tasks = Tasks::new(gate.clone(), registry, options(), tracker.clone(), clock);
            tasks.recover().await.unwrap();
            (store, gate, tasks)
        });
        let desks = WORKERS.iter().map(|_| None).collect();
        self.node = Some(Node { runtime, store, tasks, gate, tracker, desks, sessions: 0 });
        // Every node begins by looking at what is due.
        self.node().tick();
    }

    fn node(&mut self) -> &mut Node {
        self.node.as_mut().unwrap()
    }

    /// The process is gone, wherever it was; what it handed to the ledger may be there or not.
    fn crash(&mut self) {
        let node = self.node.take().unwrap();
        // Desks live in the process; nothing of it runs any more.
        let Node { runtime, desks, .. } = node;
        runtime.shutdown_background();
        std::mem::forget(desks);
    }

    fn now(&self) -> i64 {
        self.clock.load(SeqCst) as i64
    }

    fn all(&mut self) -> Vec<Task> {
        let node = self.node();
        let filter = Filter { workspace: "w".into(), limit: 1000, ..Filter::default() };
        node.runtime.block_on(node.tasks.list(&caller(BOSS), Some("w"), filter)).unwrap().tasks
    }

    fn some(&mut self) -> Option<Task> {
        let all = self.all();
        if all.is_empty() { None } else { Some(all[self.rng.usize(..all.len())].clone()) }
    }

    fn note(&mut self, text: impl std::fmt::Display) {
        self.log.push(format!("{:>8} {text}", self.now() % 10_000_000));
    }

    fn step(&mut self) {
        match self.rng.u32(..100) {
            0..22 => self.create(),
            22..62 => self.operate(),
            62..76 => self.come_or_go(),
            76..84 => self.read(),
            84..94 => self.pass_time(),
            94..97 => self.crash_during(),
            _ => {
                self.note("crash");
                self.crash();
                self.boot();
            }
        }
    }

    fn wanted(&mut self) -> Create {
        let parent = if self.rng.u32(..4) == 0 { self.some().map(|task| task.id.to_string()) } else { None };
        let retry =
            RetryPolicy { max_attempts: 3, backoff: Backoff::Fixed, initial_delay_ms: 700, ..RetryPolicy::default() };
        let mode = match self.rng.u32(..10) {
            0..6 => Mode::Pool,
            6..8 => Mode::Targeted,
            _ => Mode::SelfAssign,
        };
        Create {
            kind: "work".into(),
            workspace: "w".into(),
            mode,
            target: if mode == Mode::Targeted { WORKERS[self.rng.usize(..3)].into() } else { String::new() },
            implementation: if mode == Mode::Pool { "miner".into() } else { String::new() },
            payload: b"dig".to_vec(),
            metadata: BTreeMap::new(),
            launch_overrides: BTreeMap::new(),
            class: self.rng.i32(..4),
            priority: i64::from(self.rng.u32(..3)) * 10 + 10,
            context: String::new(),
            correlation: String::new(),
            root: String::new(),
            parent: parent.unwrap_or_default(),
            retry: self.rng.bool().then_some(retry),
            completion: None,
            key: String::new(),
            token_for: String::new(),
            offline: OfflinePolicy::Queue,
            limits: TaskLimits::default(),
        }
    }

    fn create(&mut self) {
        let wanted = self.wanted();
        self.note(format!("create {:?} {}", wanted.mode, wanted.target));
        let node = self.node();
        let created = node.runtime.block_on(async {
            let created = node.tasks.create(&caller(BOSS), Some("w"), None, wanted).await?;
            created.await
        });
        match created {
            Ok(created) => drop(self.known.insert(created.id)),
            Err(error) => panic!("not created: {error}"),
        }
        self.node().quiet();
    }

    /// What somebody asks of a task is done if, and only if, the table says so.
    fn operate(&mut self) {
        let Some(before) = self.some() else { return };
        let worker = self.rng.usize(..WORKERS.len());
        let is_party = [&before.creator, &before.assignee].into_iter().any(|party| party == WORKERS[worker]);
        let (operation, change) = self.operation(&before);
        let who = caller(worker);
        self.note(format!(
            "{} {:?} of {} {} ({})",
            WORKERS[worker],
            operation,
            before.id,
            before.state.word(),
            before.assignee
        ));
        let node = self.node();
        let done = node.runtime.block_on(async {
            let done = node.tasks.operate(&who, &before.id.to_string(), operation.clone(), 0).await?;
            done.await
        });
        node.quiet();
        let is_repeat = match change {
            Change::Claim => before.state == State::Running,
            Change::Complete => before.state == State::Completed && before.ended_by == WORKERS[worker],
            Change::Reject => before.state == State::Rejected && before.ended_by == WORKERS[worker],
            Change::Fail => {
                matches!(before.state, State::Failed | State::Retrying | State::DeadLetter)
                    && before.ended_by == WORKERS[worker]
                    && before.error == "because"
            }
            _ => false,
        };
        // Who resumes a task that nobody has wakes it.
        let nobodys = before.state == State::Hibernated || before.assignee.is_empty();
        let wakes = change == Change::Resume && nobodys && before.state.allows(Change::Wake);
        let expected = is_party && (is_repeat || wakes || before.state.allows(change));
        match &done {
            Ok(_) => assert!(expected, "{change:?} of {before:?} by {} was done", WORKERS[worker]),
            Err(error) => assert!(!expected, "{change:?} of {before:?} by {}: {error}", WORKERS[worker]),
        }
        if !is_party {
            assert_eq!(done.as_ref().err().unwrap().kind, Kind::NotFound);
        }
        if done.is_ok() && change == Change::Complete && !is_repeat {
            *self.done.entry(before.id).or_default() += 1;
        }
    }

    fn operation(&mut self, task: &Task) -> (Operation, Change) {
        let wait = |reason, depends_on: Vec<String>, timeout_ms| Wait {
            reason,
            expected_principal: String::new(),
            input_match: BTreeMap::new(),
            authority_request: String::new(),
            depends_on,
            wake_on_any: false,
            timeout_ms,
            wake_at_ms: 0,
            hibernation: None,
        };
        let because = || "because".to_owned();
        match self.rng.u32(..20) {
            0..4 => (Operation::Claim, Change::Claim),
            4..9 => (Operation::Complete, Change::Complete),
            9..12 => (Operation::Fail(because()), Change::Fail),
            12 => (Operation::Cancel(because()), Change::Cancel),
            13..15 => (Operation::Retry, Change::Retry),
            15 => (Operation::Reject(because()), Change::Reject),
            16 => (Operation::Pause(Some(wait(WaitReason::Input, Vec::new(), 3000))), Change::AwaitInput),
            17 if !task.assignee.is_empty() => {
                let hibernation = Hibernation { checkpoint_key: "k".into(), ..Hibernation::default() };
                self.save_checkpoint(&task.assignee);
                let at = self.now() + 2000;
                let wait = Wait {
                    hibernation: Some(hibernation),
                    wake_at_ms: at,
                    ..wait(WaitReason::Hibernation, Vec::new(), 0)
                };
                (Operation::Pause(Some(wait)), Change::Hibernate)
            }
            18 => {
                let others: Vec<_> = self.all().into_iter().filter(|other| other.id < task.id).collect();
                // Only older ones, so that there is no circle.
                let Some(other) = self.rng.choice(&others).map(|other| other.id.to_string()) else {
                    return (Operation::Resume, Change::Resume);
                };
                (Operation::WaitFor(Some(wait(WaitReason::Dependency, vec![other], 9000))), Change::AwaitDependency)
            }
            _ => (Operation::Resume, Change::Resume),
        }
    }

    fn save_checkpoint(&mut self, identity: &str) {
        let who = Caller::new(Identity::parse(identity).unwrap(), "s".into(), Credential::none(false));
        let node = self.node();
        node.runtime.block_on(checkpoint::save(&node.gate, &who, "k", vec![1], 0, &Limits::default())).unwrap();
    }

    fn come_or_go(&mut self) {
        let worker = self.rng.usize(..WORKERS.len());
        let (resumes, clean) = (self.rng.bool(), self.rng.bool());
        let present = self.node().desks[worker].take();
        match present {
            Some(present) if resumes => {
                self.note(format!("{} resumes", WORKERS[worker]));
                let has = present.has.clone();
                self.arrive(worker, true, has);
                // The session before it ends after the next one has begun.
                self.leave(present, clean);
            }
            Some(present) => {
                self.note(format!("{} leaves", WORKERS[worker]));
                self.leave(present, clean);
            }
            None => {
                self.note(format!("{} comes", WORKERS[worker]));
                self.arrive(worker, false, HashSet::new());
            }
        }
    }

    fn leave(&mut self, present: Present, clean: bool) {
        let node = self.node();
        node.runtime.block_on(present.desk.leave(if clean { Leave::Goodbye } else { Leave::Lost }));
        node.quiet();
    }

    fn arrive(&mut self, worker: usize, resumed: bool, has: HashSet<uuid::Uuid>) {
        let identity = Identity::parse(WORKERS[worker]).unwrap();
        let node = self.node();
        node.sessions += 1;
        let session = format!("s{}", node.sessions);
        let arrival = Arrival { resumed, is_same: resumed, ..Arrival::default() };
        let desk = node.runtime.block_on(node.tasks.arrive(&identity, &session, arrival)).unwrap();
        node.desks[worker] = Some(Present { desk, has });
        node.quiet();
    }

    /// Workers read what came for them, or lose it on the way.
    fn read(&mut self) {
        for (worker, name) in WORKERS.iter().enumerate() {
            let loses = self.rng.u32(..5) == 0;
            let Some(mut present) = self.node().desks[worker].take() else { continue };
            loop {
                let node = self.node();
                let Some(mail) = node.runtime.block_on(present.desk.try_next()).unwrap() else { break };
                let Mail::Handout(handout) = mail else { continue };
                if loses {
                    drop(handout);
                    break;
                }
                let id = handout.task.id;
                assert_eq!(handout.task.assignee, *name);
                assert_eq!(handout.payload, b"dig");
                assert!(handout.receipt.take());
                present.has.insert(id);
                let others = node.desks.iter().flatten();
                assert!(others.into_iter().all(|other| !other.has.contains(&id)), "{id} is with two workers");
                let text = format!("{} got {id}", *name);
                self.note(text);
            }
            self.node().desks[worker] = Some(present);
            self.node().quiet();
        }
    }

    fn pass_time(&mut self) {
        let jump = match self.rng.u32(..10) {
            0..5 => self.rng.i64(0..1500),
            5..8 => self.rng.i64(1000..GRACE_MS * 2),
            8 => self.rng.i64(0..86_400_000),
            _ => -self.rng.i64(0..60_000),
        };
        self.note(format!("{jump} ms pass"));
        self.clock.store((self.now() + jump) as u64, SeqCst);
        self.node().tick();
    }

    /// Something is asked, and the process is gone before it is answered.
    fn crash_during(&mut self) {
        let (polls, what, worker) = (self.rng.usize(..40), self.rng.u32(..8), self.rng.usize(..WORKERS.len()));
        let (wanted, target) = (self.wanted(), self.some());
        self.note(format!("crash after {polls} polls of {what}, {} {target:?}", WORKERS[worker]));
        let present = self.node().desks[worker].take();
        let node = self.node();
        let tasks = node.tasks.clone();
        let work = async move {
            let boss = caller(BOSS);
            let id = target.as_ref().map(|task| task.id.to_string()).unwrap_or_default();
            let operate = async |who: &Caller, operation| {
                // Whatever came of it: nobody hears of it.
                if let Ok(done) = tasks.operate(who, &id, operation, 0).await {
                    drop(done.await);
                }
            };
            match (what, present) {
                (0, _) => {
                    if let Ok(created) = tasks.create(&boss, Some("w"), None, wanted).await {
                        drop(created.await);
                    }
                }
                (1, _) => operate(&boss, Operation::Retry).await,
                (2, _) => operate(&boss, Operation::Cancel(String::new())).await,
                (3, _) => operate(&caller(worker), Operation::Complete).await,
                (4, _) => operate(&caller(worker), Operation::Fail("crash".into())).await,
                (5, _) => drop(tasks.tick().await),
                (_, Some(present)) => present.desk.leave(if what == 6 { Leave::Goodbye } else { Leave::Lost }).await,
                (_, None) => {
                    let identity = Identity::parse(WORKERS[worker]).unwrap();
                    // Its process is gone with it.
                    std::mem::forget(tasks.arrive(&identity, "crashed", Arrival::default()).await);
                }
            }
        };
        node.runtime.block_on(some_polls(work, polls));
        self.maybe += usize::from(what == 0);
        self.crash();
        self.boot();
    }

    /// What has to hold whenever nothing is under way.
    fn check(&mut self, before: &HashMap<uuid::Uuid, Task>) -> HashMap<uuid::Uuid, Task> {
        let (all, now) = (self.all(), self.now());
        let ids: HashSet<_> = all.iter().map(|task| task.id).collect();
        assert!(self.known.is_subset(&ids), "a task was lost");
        assert!(ids.len() <= self.known.len() + self.maybe, "a task was made twice");
        for task in &all {
            if let Some(before) = before.get(&task.id) {
                assert!(task.version >= before.version, "{task:?} was undone");
                let moved = before.state.is_held() && task.state.is_held() && before.assignee != task.assignee;
                let had = WORKERS.iter().position(|name| *name == before.assignee).unwrap_or(BOSS);
                let was_taken = moved && self.node().desks[had].is_some();
                assert!(!was_taken, "{before:?} was taken from somebody who is there: {task:?}");
            }
            let is_there = WORKERS.iter().position(|name| *name == task.assignee);
            let is_there = is_there.is_some_and(|worker| self.node().desks[worker].is_some());
            if task.state.is_held() {
                assert!(!task.assignee.is_empty(), "{task:?} is held by nobody");
                match task.disconnected_at {
                    None => assert!(is_there, "{task:?} is held by somebody who is away"),
                    Some(at) => {
                        assert!(!is_there, "{task:?} is held by somebody who is there");
                        assert!(now < at + GRACE_MS || at > now, "{task:?} is nobody's at {now}");
                    }
                }
            }
        }
        self.check_queues(&all, now);
        self.check_workers(&all);
        all.into_iter().map(|task| (task.id, task)).collect()
    }

    /// Nobody who has room waits for something that waits for it.
    fn check_queues(&mut self, all: &[Task], now: i64) {
        let load = |worker: usize| all.iter().filter(|t| t.state.is_held() && t.assignee == WORKERS[worker]).count();
        for task in all.iter().filter(|task| task.state == State::Pending) {
            for (worker, name) in WORKERS.iter().enumerate() {
                let takes = match task.mode {
                    Mode::Pool => worker < 3,
                    Mode::Targeted => task.target == *name,
                    Mode::SelfAssign => task.creator == *name,
                    Mode::Startup => false,
                };
                let avoided = task.avoid == *name && now < task.queued_at + AVOID_MS;
                let is_there = self.node().desks[worker].is_some();
                assert!(
                    !(takes && is_there && !avoided && load(worker) < ROOM),
                    "{task:?} waits while {} has room",
                    *name
                );
            }
        }
    }

    /// Two workers who are there do not both have a task: whoever lost it was told, or it was never told.
    fn check_workers(&mut self, all: &[Task]) {
        let holders: HashMap<_, _> =
            all.iter().filter(|t| t.state.is_held()).map(|t| (t.id, t.assignee.clone())).collect();
        for (worker, name) in WORKERS.iter().enumerate() {
            let Some(present) = &mut self.node().desks[worker] else { continue };
            // What was finished, called off or retried by somebody is known to be over.
            present.has.retain(|id| holders.get(id).is_some_and(|holder| holder == name));
        }
    }

    /// What was said of each task is what happened to it.
    fn check_events(&mut self) {
        let all = self.all();
        let node = self.node();
        let store = node.store.clone();
        node.runtime.block_on(async {
            let relay = Relay::new(store.ledger.clone(), store.log.clone());
            while relay.step().await.unwrap() > 0 {}
            for task in all {
                let mut reader = store.log.reader();
                reader.follow_from_start(&Topic::new(&format!("tk::w::{}::events", task.id)).unwrap()).unwrap();
                let (mut items, mut status) = (Vec::new(), 0);
                reader.available_batch(1000, &mut items).await.unwrap();
                for item in items {
                    let Item::Record(record) = item else { panic!("{item:?}") };
                    let event = TaskEvent::decode(&record).unwrap();
                    if let Event::StatusChanged { from, to, .. } = event.event {
                        assert_eq!(from, status, "events of {task:?}");
                        status = to;
                    }
                }
                assert_eq!(status, task.state.status() as i32, "events of {task:?}");
            }
        });
        for (id, times) in &self.done {
            assert_eq!(*times, 1, "{id} was done {times} times");
        }
    }

    fn run(&mut self) {
        self.boot();
        let mut before = HashMap::new();
        for _ in 0..STEPS {
            self.step();
            before = self.check(&before);
        }
        self.check_events();
    }
}

impl Node {
    /// Waits until nothing is under way.
    fn quiet(&mut self) {
        self.tracker.close();
        self.runtime.block_on(self.tracker.wait());
        self.tracker.reopen();
    }

    fn tick(&mut self) {
        self.runtime.block_on(self.tasks.tick()).unwrap();
        self.quiet();
    }
}

/// Runs some of the work.
async fn some_polls(work: impl Future<Output = ()>, polls: usize) {
    tokio::pin!(work);
    let mut left = polls;
    std::future::poll_fn(|cx| {
        if left == 0 || work.as_mut().poll(cx).is_ready() {
            return std::task::Poll::Ready(());
        }
        left -= 1;
        // What it waits for may come from a thread of the ledger; looked at again at once.
        cx.waker().wake_by_ref();
        std::task::Poll::Pending
    })
    .await;
}

#[test]
fn tasks_keep_their_promises() {
    check(|store| Home { store, database: None }, SEQUENCES);
}

#[test]
fn tasks_keep_their_promises_on_postgres() {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let database = runtime.block_on(trunkline_store::conformance::postgres::database());
    check(|store| Home { store, database: Some(database) }, SEQUENCES_SHARED);
}

fn check(home: impl FnOnce(Store) -> Home, sequences: u64) {
    let dir = tempfile::tempdir().unwrap();
    let options = trunkline_store::Options {
        bucket: None,
        log: log::Options { durability: Durability::Process, ..log::Options::default() },
        ledger: ledger::Options { durability: Durability::Process, ..ledger::Options::default() },
        migrations: trunkline_core::migrations(),
    };
    let home = home(Store::open(dir.path(), options).unwrap());
    register(&home);
    let only = std::env::var("TRUNKLINE_SEED").ok().map(|seed| seed.parse::<u64>().expect("a number"));
    let seeds = only.map_or(0..sequences, |seed| seed..seed + 1);
    for seed in seeds {
        sql::forget_everything(&home);
        let mut world = World {
            home: &home,
            clock: Arc::new(AtomicU64::new(1_800_000_000_000)),
            rng: Rng::with_seed(seed),
            node: None,
            known: HashSet::new(),
            maybe: 0,
            done: HashMap::new(),
            log: Vec::new(),
        };
        let run = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| world.run()));
        if run.is_err() {
            std::mem::forget(world.node.take());
            world.log.iter().for_each(|line| eprintln!("{line}"));
            panic!("run again with TRUNKLINE_SEED={seed}");
        }
        world.crash();
    }
}

/// Targeted tasks take a program that is known.
fn register(home: &Home) {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        let registry = Registry::open(Gate::open(home.open().await).await.unwrap()).await.unwrap();
        let launch_params = [("profile".to_owned(), "none".to_owned())].into();
        let program = Program { implementation: "miner".into(), launch_params, ..Program::default() };
        registry.put(&caller(BOSS), program).await.unwrap();
        // Services have no workspace of their own; this one may do work in this one.
    });
}

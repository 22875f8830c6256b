//! Tasks: work that is handed out once, finishes, retries, waits and wakes.
//!
//! A task is a row. Every change of it is decided by a pure function ([`decide`]) inside the transaction that writes it, with
//! what others are to hear of it in the outbox of the same transaction. Who is connected and has room for work is known in
//! memory (`assign`) and can be lost with the process at any time: the rows say who has what, and are handed out again.
//!
//! - **Order**: what one session asks takes effect in the order in which it asked.
//! - **Durability**: an answered change is on disk, and what it says to others leaves after it and exactly once.
//! - **Delivery**: the row says who has a task before that worker is told. A worker that comes under its identity, and did not
//!   resume, is told again of everything that it has; one that resumes, of what it was not told yet.
//! - **Cancellation**: once asked, a change happens whether or not anybody waits.

mod assign;
mod attend;
mod create;
pub mod decide;
mod events;
mod held;
mod input;
mod mailbox;
mod open;
mod operate;
mod pump;
mod query;
mod retry;
mod sql;
mod start;
pub mod state;

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, atomic::AtomicBool},
};

use serde::{Deserialize, Serialize};
use tokio_util::task::TaskTracker;
use trunkline_store::log::Clock;
use uuid::Uuid;

pub use self::{
    attend::{Arrival, Desk, Leave},
    create::{Create, Created, OfflinePolicy},
    decide::Times,
    events::{Event, TaskEvent},
    mailbox::{Handout, Mail, Receipt},
    operate::Operation,
    query::{Filter, Page},
    retry::{Backoff, RetryPolicy},
    start::STARTUP,
};
pub(crate) use sql::{MIGRATIONS, parties};

use self::{attend::Floor, state::State};
use crate::{due::NextDue, gate::Gate, registry::Registry};

/// Priority of a task that names none. The published figure.
const NORMAL: i64 = 30;

/// How a task finds who does it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Mode {
    /// Its creator does it.
    SelfAssign,
    /// One principal does it.
    Targeted,
    /// Any one worker of an implementation does it.
    Pool,
    /// An orchestrator starts an agent for it, which is then what it stands for.
    Startup,
}

/// A task, without its payload.
#[derive(Clone, Debug, PartialEq)]
pub struct Task {
    /// Sorts by creation.
    pub id: Uuid,
    /// Where it belongs.
    pub workspace: String,
    /// What kind of work it is, in its creator's words.
    pub kind: String,
    /// How it finds who does it.
    pub mode: Mode,
    /// The published number of its class; 0 if none was named.
    pub class: i32,
    /// Larger first.
    pub priority: i64,
    /// Where it stands.
    pub state: State,
    /// Who made it; empty for the server.
    pub creator: String,
    /// The task that it is part of.
    pub parent: Option<Uuid>,
    /// The first of its ancestors; empty for itself.
    pub root: String,
    /// What its creator relates it to.
    pub correlation: String,
    /// The same, for a conversation or the like.
    pub context: String,
    /// Whom it is for: the identity of a targeted task, and of the agent that is to be started.
    pub target: String,
    /// Whom it is for: the implementation of a pool task, and of the agent that is to be started.
    pub implementation: String,
    /// The user that it is for: who made it, or whose message started the agent.
    pub subject: String,
    /// Where it waits while it is pending; empty if only a claim ends that.
    pub queue: String,
    /// Who has it.
    pub assignee: String,
    /// The orchestrator that was asked to start its agent.
    pub launcher: String,
    /// Who shall not have it for a moment, for having failed it.
    pub avoid: String,
    /// Who ended it; empty for the server.
    pub ended_by: String,
    /// Unix milliseconds, as the following.
    pub created_at: i64,
    /// Of the last change.
    pub updated_at: i64,
    /// Since when it waits for somebody to take it.
    pub queued_at: i64,
    /// When its assignee got it.
    pub assigned_at: Option<i64>,
    /// When the work first began.
    pub started_at: Option<i64>,
    /// When it ended.
    pub ended_at: Option<i64>,
    /// When it was paused.
    pub paused_at: Option<i64>,
    /// Since when its assignee is away.
    pub disconnected_at: Option<i64>,
    /// When it is tried again; of a waiting task, when an operator was told of it.
    pub retry_at: Option<i64>,
    /// How often it failed.
    pub failures: i64,
    /// How often an orchestrator was asked.
    pub launches: i64,
    /// How often it was assigned: the number of the attempt that is under way, or was last.
    pub attempt: i64,
    /// Sessions that ended while they had it, since it was last reported on.
    pub lost_sessions: i64,
    /// When the attempt's worker began.
    pub begun_at: Option<i64>,
    /// When the attempt's worker last said something of it.
    pub reported_at: Option<i64>,
    /// How long its assignee may be away, in milliseconds.
    pub grace_ms: i64,
    /// Why it failed, was cancelled or was declined.
    pub error: String,
    /// What it waits for.
    pub wait: Option<Wait>,
    /// Where whoever gets it next begins.
    pub hibernation: Option<Hibernation>,
    /// Somebody can come in with a token of its.
    pub has_token: bool,
    /// Counts its changes.
    pub version: i64,
    /// What never changes.
    pub spec: Arc<Spec>,
}

/// What its creator said of a task, besides what it is looked up by.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Spec {
    /// Whatever its creator wants to be with it.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub metadata: BTreeMap<String, String>,
    /// How its agent is started.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub launch_params: BTreeMap<String, String>,
    /// When it is tried again; without, it is not.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub retry: Option<RetryPolicy>,
    /// Whom to tell when it ends.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub completion: Option<CompletionEvent>,
    /// How long a worker may take.
    #[serde(skip_serializing_if = "TaskLimits::is_none")]
    pub limits: TaskLimits,
}

/// How long a worker may take, and how many may be lost over a task; 0 is no limit.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct TaskLimits {
    /// Milliseconds from when it begins until it has ended the task.
    pub execution_ms: i64,
    /// Milliseconds that it may say nothing, once it has begun.
    pub report_ms: i64,
    /// Sessions that end while they have it, one after the other without a report, before it is a dead letter.
    pub lost_sessions_max: i64,
}

impl TaskLimits {
    fn is_none(&self) -> bool {
        *self == Self::default()
    }

    /// What was asked for, over these: 0 asks for these, less than 0 for no limit.
    fn or(self, asked: Self) -> Self {
        let one = |own: i64, asked: i64| if asked == 0 { own } else { asked.max(0) };
        Self {
            execution_ms: one(self.execution_ms, asked.execution_ms),
            report_ms: one(self.report_ms, asked.report_ms),
            lost_sessions_max: one(self.lost_sessions_max, asked.lost_sessions_max),
        }
    }
}

/// An event for the workflow engine when a task ends.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct CompletionEvent {
    /// Its name; empty for `task.{status}`.
    pub name: String,
    /// Published numbers of the statuses that count; empty for all.
    pub on_statuses: Vec<i32>,
}

/// What a task waits for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum WaitReason {
    /// A message.
    Input,
    /// A permission.
    Authority,
    /// Other tasks.
    Dependency,
    /// Time, or somebody who resumes it; nobody has to be there meanwhile.
    Hibernation,
}

impl WaitReason {
    fn state(self) -> State {
        match self {
            Self::Input => State::WaitingInput,
            Self::Authority => State::WaitingAuthority,
            Self::Dependency => State::WaitingDependency,
            Self::Hibernation => State::Hibernated,
        }
    }

    /// Its word, in events.
    #[must_use]
    pub fn word(self) -> &'static str {
        match self {
            Self::Input => "input",
            Self::Authority => "authority",
            Self::Dependency => "dependency",
            Self::Hibernation => "hibernation",
        }
    }
}

/// A wait, and what ends it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Wait {
    /// For what.
    pub reason: WaitReason,
    /// From whom a message is expected; a user's covers all windows.
    pub expected_principal: String,
    /// Pieces that the message's JSON has to have.
    pub input_match: BTreeMap<String, String>,
    /// Which permission.
    pub authority_request: String,
    /// Which tasks.
    pub depends_on: Vec<String>,
    /// One of them is enough.
    pub wake_on_any: bool,
    /// After so long it failed; 0 is never.
    pub timeout_ms: i64,
    /// Then it goes on; Unix milliseconds, 0 is never.
    pub wake_at_ms: i64,
    /// Where whoever goes on begins.
    pub hibernation: Option<Hibernation>,
}

/// Where whoever gets a hibernated task begins.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Hibernation {
    /// A checkpoint of the worker that left it.
    pub checkpoint_key: String,
    /// A session of that worker.
    pub resume_session: String,
    /// Kept for the worker.
    pub wake_event_types: Vec<String>,
    /// What a timeout does: `fail`, `retry` or `alert`.
    pub escalation_policy: String,
}

/// Where pending tasks wait. Its text sorts those of one implementation together.
pub(crate) fn pool_queue(workspace: &str, implementation: &str) -> String {
    format!("pool::{implementation}::{workspace}")
}

/// The queue of what is for one principal.
pub(crate) fn own_queue(identity: &str) -> String {
    format!("to::{identity}")
}

/// The queue of agents that are to be started.
pub(crate) fn start_queue(profile: &str) -> String {
    format!("start::{profile}")
}

/// What an operator sets about tasks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Options {
    /// Largest payload of a task, in bytes. The published default.
    pub payload_bytes_max: usize,
    /// Tasks of one workspace that have not ended; 0 is no limit.
    pub open_per_workspace: u64,
    /// Pool tasks that one worker has at a time. The published bound of what a worker is given when it comes.
    pub in_flight_per_worker: usize,
    /// How long a pool task waits for a worker, in seconds; 0 is forever. The published default.
    pub pool_wait_seconds: u64,
    /// How long a start waits for an orchestrator. The published default.
    pub start_wait_seconds: u64,
    /// How long an orchestrator has until the agent comes. The published time after which a start is taken for lost.
    pub launch_seconds: u64,
    /// How often an agent's start is tried. The published figure.
    pub launches_max: u32,
    /// How long a worker may be away from an interactive task, in seconds. The published default.
    pub grace_seconds: u64,
    /// From one of class background.
    pub grace_background_seconds: u64,
    /// From one of class batch.
    pub grace_batch_seconds: u64,
    /// How long an attempt of an interactive task may take from when its worker begins, in seconds; 0 is forever, as the published
    /// server has it.
    pub execution_seconds: u64,
    /// Of class background.
    pub execution_background_seconds: u64,
    /// Of class batch.
    pub execution_batch_seconds: u64,
    /// How long the worker of an interactive task that has begun may say nothing of it, in seconds; 0 is forever.
    pub report_seconds: u64,
    /// Of class background.
    pub report_background_seconds: u64,
    /// Of class batch.
    pub report_batch_seconds: u64,
    /// Sessions that may end while they have a task, one after the other without a report, before it is a dead letter; 0 is no
    /// limit.
    pub lost_sessions_max: u32,
    /// How long a pool task stays with a worker that has begun others and not this one, if another worker has less to do, in
    /// seconds; 0 is forever.
    pub begin_seconds: u64,
    /// How long completed, cancelled and rejected tasks are kept; 0 is forever. The published default.
    pub keep_done_days: u64,
    /// How long failed ones are kept. The published default.
    pub keep_failed_days: u64,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            payload_bytes_max: 512 * 1024,
            open_per_workspace: 1_000_000,
            in_flight_per_worker: 100,
            pool_wait_seconds: 3600,
            start_wait_seconds: 1800,
            launch_seconds: 300,
            launches_max: 3,
            grace_seconds: 30,
            grace_background_seconds: 600,
            grace_batch_seconds: 300,
            execution_seconds: 0,
            execution_background_seconds: 0,
            execution_batch_seconds: 0,
            report_seconds: 0,
            report_background_seconds: 0,
            report_batch_seconds: 0,
            lost_sessions_max: 20,
            begin_seconds: 30,
            keep_done_days: 7,
            keep_failed_days: 14,
        }
    }
}

impl Options {
    fn times(&self) -> Times {
        Times {
            pool_wait: ms(self.pool_wait_seconds),
            start_wait: ms(self.start_wait_seconds),
            launch: ms(self.launch_seconds),
            launches_max: i64::from(self.launches_max.max(1)),
            keep_done: ms(self.keep_done_days.saturating_mul(86_400)),
            keep_failed: ms(self.keep_failed_days.saturating_mul(86_400)),
        }
    }

    /// By the published classes.
    fn grace_ms(&self, class: i32) -> i64 {
        ms(by_class(class, [self.grace_seconds, self.grace_background_seconds, self.grace_batch_seconds]))
    }

    /// What a class allows.
    fn limits(&self, class: i32) -> TaskLimits {
        let execution = [self.execution_seconds, self.execution_background_seconds, self.execution_batch_seconds];
        let report = [self.report_seconds, self.report_background_seconds, self.report_batch_seconds];
        TaskLimits {
            execution_ms: ms(by_class(class, execution)),
            report_ms: ms(by_class(class, report)),
            lost_sessions_max: self.lost_sessions_max.into(),
        }
    }
}

fn ms(seconds: u64) -> i64 {
    i64::try_from(seconds.saturating_mul(1000)).unwrap_or(i64::MAX)
}

/// Interactive, background, batch.
fn by_class(class: i32, [interactive, background, batch]: [u64; 3]) -> u64 {
    match class {
        2 => background,
        3 => batch,
        _ => interactive,
    }
}

/// The tasks of this node. Clones share them.
#[derive(Clone)]
pub struct Tasks(Arc<Shared>);

struct Shared {
    gate: Gate,
    registry: Registry,
    options: Options,
    times: Times,
    floor: Mutex<Floor>,
    /// What is under way; waited for when the server stops.
    tracker: TaskTracker,
    clock: Clock,
    /// When the next task is due, as far as is known, and who waits for it.
    next_due: NextDue,
    /// Queues that could not be served are going to be looked at again.
    looking_again: AtomicBool,
}

impl Tasks {
    /// The tasks behind `gate`. What goes on behind an answer runs in `tracker`.
    #[must_use]
    pub fn new(gate: Gate, registry: Registry, options: Options, tracker: TaskTracker, clock: Clock) -> Self {
        let times = options.times();
        let floor = Mutex::new(Floor::new(options.in_flight_per_worker.max(1)));
        let looking_again = AtomicBool::new(false);
        Self(Arc::new(Shared {
            gate,
            registry,
            options,
            times,
            floor,
            tracker,
            clock,
            next_due: NextDue::now(),
            looking_again,
        }))
    }

    /// The programs that can be started.
    #[must_use]
    pub fn registry(&self) -> &Registry {
        &self.0.registry
    }

    fn now(&self) -> i64 {
        i64::try_from(self.0.clock.now_ms()).unwrap_or(i64::MAX)
    }
}

impl Task {
    /// A task of which nothing is known but that it is made now.
    pub(super) fn blank(now: i64, mode: Mode) -> Self {
        Self {
            id: Uuid::now_v7(),
            workspace: String::new(),
            kind: String::new(),
            mode,
            class: 0,
            priority: NORMAL,
            state: State::Pending,
            creator: String::new(),
            parent: None,
            root: String::new(),
            correlation: String::new(),
            context: String::new(),
            target: String::new(),
            implementation: String::new(),
            subject: String::new(),
            queue: String::new(),
            assignee: String::new(),
            launcher: String::new(),
            avoid: String::new(),
            ended_by: String::new(),
            created_at: now,
            updated_at: now,
            queued_at: now,
            assigned_at: None,
            started_at: None,
            ended_at: None,
            paused_at: None,
            disconnected_at: None,
            retry_at: None,
            failures: 0,
            launches: 0,
            attempt: 0,
            lost_sessions: 0,
            begun_at: None,
            reported_at: None,
            grace_ms: 0,
            error: String::new(),
            wait: None,
            hibernation: None,
            has_token: false,
            version: 0,
            spec: Arc::default(),
        }
    }
}

//! What a request does to a task: pure. The ledger applies what is decided here, if the task is still as it was.

use uuid::Uuid;

use super::{
    Mode, Task, Wait, WaitReason,
    state::{Change, State},
};
use crate::error::{Error, Kind};

/// How long a task that was retried is kept from the worker that failed it, so that another one can take it.
pub const AVOID_MS: i64 = 1000;

/// What somebody, or time, wants of a task.
#[derive(Clone, Debug, PartialEq)]
pub enum Request {
    /// A worker gets it.
    Assign {
        /// The worker.
        to: String,
    },
    /// An orchestrator gets it, to start an agent.
    Launch {
        /// The orchestrator.
        by: String,
    },
    /// Nobody has it any more.
    PutBack,
    /// Whom it is about has come.
    Start {
        /// Who.
        by: String,
    },
    /// Its worker begins.
    Claim {
        /// Who says so.
        by: String,
    },
    /// Done.
    Complete {
        /// Who says so.
        by: String,
    },
    /// Not done.
    Fail {
        /// Who says so.
        by: String,
        /// Why.
        reason: String,
    },
    /// Called off.
    Cancel {
        /// By whom.
        by: String,
        /// Why.
        reason: String,
    },
    /// Once more.
    Retry,
    /// Wait.
    Pause(Wait),
    /// Go on.
    Resume,
    /// Go on, with whoever gets it.
    Wake,
    /// Declined.
    Reject {
        /// By whom.
        by: String,
        /// Why.
        reason: String,
    },
    /// The worker that failed it may have it again.
    Unavoid,
    /// Its worker is gone.
    Gone {
        /// Its session was lost over this task, as far as is known: it neither said goodbye nor was sent away.
        is_lost: bool,
    },
    /// Its worker is there again.
    Back {
        /// It is the process that was here before, which only lost its connection.
        is_same: bool,
    },
    /// Its worker says how it goes on.
    Report,
    /// Too many sessions were lost over it.
    Bury,
}

/// What a decision takes besides the task.
#[derive(Clone, Copy, Debug)]
pub struct Context {
    /// Unix milliseconds.
    pub now: i64,
    /// Between -1 and 1, for jitter.
    pub roll: f64,
    /// Whether the task's worker is connected.
    pub worker_is_there: bool,
    /// Whether what it waits for has ended.
    pub dependencies_ended: bool,
}

/// How long tasks may take, in milliseconds; 0 is forever.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Times {
    /// For a worker to take a pool task.
    pub pool_wait: i64,
    /// For an orchestrator to take a start.
    pub start_wait: i64,
    /// For a started agent to come.
    pub launch: i64,
    /// How often an agent's start is tried.
    pub launches_max: i64,
    /// For which a completed, cancelled or rejected task is kept.
    pub keep_done: i64,
    /// For which a failed one is kept.
    pub keep_failed: i64,
}

/// A task after a request.
#[derive(Clone, Debug, PartialEq)]
pub struct Step {
    /// The task as it is now.
    pub task: Task,
    /// Nothing changed: the same was said before, by the same.
    pub is_repeat: bool,
}

/// Decides.
///
/// # Errors
/// [`Kind::Precondition`] with the published text if the task's state forbids it.
pub fn apply(task: &Task, request: &Request, context: Context) -> Result<Step, Error> {
    if is_repeat(task, request) {
        return Ok(Step { task: task.clone(), is_repeat: true });
    }
    if let Some(change) = change(request)
        && !task.state.allows(change)
    {
        return Err(refusal(task, request, change));
    }
    let mut next = Task { updated_at: context.now, ..task.clone() };
    match request {
        Request::Assign { to } => {
            next.taken_by(to, context.now);
            next.state = State::Assigned;
        }
        Request::Launch { by } => {
            next.taken_by(by, context.now);
            next.launcher.clone_from(by);
            next.launches += 1;
            next.state = State::Starting;
        }
        Request::PutBack => {
            next.nobodys();
            next.state = State::Pending;
        }
        Request::Start { by } => {
            next.assignee.clone_from(by);
            next.disconnected_at = None;
            next.running(context.now);
        }
        Request::Claim { by } => {
            if next.assignee.is_empty() {
                next.taken_by(by, context.now);
            }
            next.running(context.now);
        }
        Request::Complete { by } => next.ended(State::Completed, by, "", context.now),
        Request::Fail { by, reason } => fail(&mut next, by, reason, context),
        Request::Cancel { by, reason } => next.ended(State::Cancelled, by, reason, context.now),
        Request::Reject { by, reason } => next.ended(State::Rejected, by, reason, context.now),
        Request::Retry => next.tried_again(context.now),
        Request::Pause(wait) => {
            next.state = wait.reason.state();
            next.paused_at = Some(context.now);
            next.wait = Some(wait.clone());
            next.retry_at = None;
        }
        Request::Resume => {
            next.resumed();
            // Its worker has the grace from now on, if it is away.
            next.disconnected_at = (!context.worker_is_there && !next.assignee.is_empty()).then_some(context.now);
            next.running(context.now);
        }
        Request::Wake => {
            next.hibernation = task.wait.as_ref().and_then(|wait| wait.hibernation.clone());
            next.resumed();
            next.nobodys();
            next.queued_at = context.now;
            next.state = State::Pending;
        }
        Request::Unavoid => next.avoid.clear(),
        Request::Gone { is_lost } => next.gone(*is_lost, context.now),
        Request::Back { is_same } => next.back(*is_same),
        Request::Report => (next.reported_at, next.lost_sessions) = (Some(context.now), 0),
        Request::Bury => next.buried(context.now),
    }
    Ok(Step { task: next, is_repeat: false })
}

/// The row of the table that a request takes; some take none.
fn change(request: &Request) -> Option<Change> {
    Some(match request {
        Request::Assign { .. } => Change::Assign,
        Request::Launch { .. } => Change::Launch,
        Request::PutBack => Change::PutBack,
        Request::Start { .. } => Change::Start,
        Request::Claim { .. } => Change::Claim,
        Request::Complete { .. } => Change::Complete,
        Request::Fail { .. } | Request::Bury => Change::Fail,
        Request::Cancel { .. } => Change::Cancel,
        Request::Retry => Change::Retry,
        Request::Pause(wait) => match wait.reason {
            WaitReason::Input => Change::AwaitInput,
            WaitReason::Authority => Change::AwaitAuthority,
            WaitReason::Dependency => Change::AwaitDependency,
            WaitReason::Hibernation => Change::Hibernate,
        },
        Request::Resume => Change::Resume,
        Request::Wake => Change::Wake,
        Request::Reject { .. } => Change::Reject,
        Request::Unavoid | Request::Gone { .. } | Request::Back { .. } | Request::Report => return None,
    })
}

/// Whether the same was said before by the same: its answer may have been lost on the way.
fn is_repeat(task: &Task, request: &Request) -> bool {
    match (task.state, request) {
        (State::Running, Request::Claim { .. }) => true,
        (State::Completed, Request::Complete { by }) => task.ended_by == *by,
        (State::Rejected, Request::Reject { by, reason }) => task.ended_by == *by && task.error == *reason,
        (State::Failed | State::Retrying | State::DeadLetter, Request::Fail { by, reason }) => {
            task.ended_by == *by && task.error == *reason
        }
        _ => false,
    }
}

fn fail(next: &mut Task, by: &str, reason: &str, context: Context) {
    next.failures += 1;
    let (state, retry_at) = match &next.spec.retry {
        Some(policy) if next.failures < policy.attempts() => {
            let delay = policy.delay_ms(next.failures, context.roll);
            (State::Retrying, Some(context.now.saturating_add(delay)))
        }
        Some(_) => (State::DeadLetter, None),
        // An agent that could not be started has had its tries.
        None if next.mode == Mode::Startup && next.state == State::Starting => (State::DeadLetter, None),
        None => (State::Failed, None),
    };
    next.ended(state, by, reason, context.now);
    next.retry_at = retry_at;
}

/// When a task has to be looked at again, by itself, in Unix milliseconds.
#[must_use]
pub fn due(task: &Task, times: &Times) -> Option<i64> {
    let after = |from: i64, time: i64| (time > 0).then(|| from.saturating_add(time));
    let grace = task.disconnected_at.and_then(|at| after(at, task.grace_ms.max(1)));
    match task.state {
        State::Pending => {
            let wait = match task.mode {
                Mode::Pool => after(task.queued_at, times.pool_wait),
                Mode::Startup => after(task.queued_at, times.start_wait),
                Mode::SelfAssign | Mode::Targeted => None,
            };
            let avoid = (!task.avoid.is_empty()).then(|| task.queued_at.saturating_add(AVOID_MS));
            earliest([wait, avoid])
        }
        State::Starting => earliest([task.assigned_at.and_then(|at| after(at, times.launch)), grace]),
        State::Assigned => grace,
        State::Running => earliest([grace, execution_ends(task), report_due(task)]),
        State::Retrying => task.retry_at,
        State::WaitingInput | State::WaitingAuthority | State::WaitingDependency | State::Hibernated => {
            let (wait, paused_at) = (task.wait.as_ref()?, task.paused_at?);
            // An alert was given already; the next one comes after as long again.
            let from = task.retry_at.unwrap_or(paused_at);
            earliest([after(from, wait.timeout_ms), Some(wait.wake_at_ms).filter(|at| *at > 0)])
        }
        State::Completed | State::Cancelled | State::Rejected => after(task.updated_at, times.keep_done),
        State::Failed | State::DeadLetter => after(task.updated_at, times.keep_failed),
    }
}

/// When the attempt of a running task has taken as long as it may.
fn execution_ends(task: &Task) -> Option<i64> {
    let most = task.spec.limits.execution_ms;
    task.begun_at.filter(|_| most > 0).map(|at| at.saturating_add(most))
}

/// When its worker has said nothing for as long as it may.
fn report_due(task: &Task) -> Option<i64> {
    let most = task.spec.limits.report_ms;
    task.reported_at.max(task.begun_at).filter(|_| most > 0).map(|at| at.saturating_add(most))
}

/// Whether what its worker says now has to be noted: not each time, but in time.
#[must_use]
pub fn notes_report(task: &Task, now: i64) -> bool {
    let last = task.reported_at.max(task.begun_at).unwrap_or(0);
    let part = task.spec.limits.report_ms / 4;
    task.state == State::Running && (task.lost_sessions > 0 || part > 0 && now.saturating_sub(last) >= part)
}

/// Whether as many sessions were lost over a task as may be.
#[must_use]
pub fn is_deadly(task: &Task) -> bool {
    let most = task.spec.limits.lost_sessions_max;
    most > 0 && task.mode != Mode::Startup && task.lost_sessions >= most
}

/// What time wants of a task.
#[derive(Clone, Debug, PartialEq)]
pub enum Alarm {
    /// Nothing yet.
    Nothing,
    /// This.
    Do(Box<Request>),
    /// An operator should know that it waits for so long, and nothing else.
    Tell,
    /// It has been kept long enough.
    Forget,
}

/// What a task that is due needs.
#[must_use]
pub fn alarm(task: &Task, context: Context, times: &Times) -> Alarm {
    let now = context.now;
    let has_come = |at: Option<i64>| at.is_some_and(|at| at <= now);
    let is_due = has_come(due(task, times));
    let by = String::new;
    match task.state {
        // It came back, and the row does not say so.
        state if state.is_held() && task.disconnected_at.is_some() && context.worker_is_there => {
            Alarm::Do(Request::Back { is_same: false }.into())
        }
        State::Pending if is_due && !task.avoid.is_empty() => Alarm::Do(Request::Unavoid.into()),
        State::Pending if is_due => {
            let reason = match task.mode {
                Mode::Startup => format!("no orchestrator took it within {} s", times.start_wait / 1000),
                _ => format!("no worker took it within {} s", times.pool_wait / 1000),
            };
            Alarm::Do(Request::Cancel { by: by(), reason }.into())
        }
        State::Starting if is_due && task.launches < times.launches_max => Alarm::Do(Request::PutBack.into()),
        State::Starting if is_due => {
            let reason = format!("the agent did not come after {} launches", task.launches);
            Alarm::Do(Request::Fail { by: by(), reason }.into())
        }
        State::Assigned | State::Running if is_due && is_deadly(task) => Alarm::Do(Request::Bury.into()),
        // What nobody began goes to somebody else.
        State::Assigned if is_due && task.mode != Mode::SelfAssign => Alarm::Do(Request::PutBack.into()),
        State::Running if has_come(execution_ends(task)) => {
            let reason = format!("not done within {} ms", task.spec.limits.execution_ms);
            Alarm::Do(Request::Fail { by: by(), reason }.into())
        }
        State::Running if has_come(report_due(task)) => {
            let reason = format!("its worker said nothing of it for {} ms", task.spec.limits.report_ms);
            Alarm::Do(Request::Fail { by: by(), reason }.into())
        }
        State::Assigned | State::Running if is_due => {
            let grace = task.grace_ms;
            let reason = format!("worker disconnected and did not reconnect within grace window ({grace}ms)");
            Alarm::Do(Request::Fail { by: by(), reason }.into())
        }
        State::Retrying if is_due => Alarm::Do(Request::Retry.into()),
        state if state.is_waiting() => wait_alarm(task, context),
        state if state.is_terminal() && is_due => Alarm::Forget,
        _ => Alarm::Nothing,
    }
}

fn wait_alarm(task: &Task, context: Context) -> Alarm {
    let Some(wait) = &task.wait else { return Alarm::Nothing };
    let go_on =
        if context.worker_is_there && task.state != State::Hibernated { Request::Resume } else { Request::Wake };
    let from = task.retry_at.or(task.paused_at).unwrap_or(context.now);
    if wait.timeout_ms > 0 && from.saturating_add(wait.timeout_ms) <= context.now {
        let escalation = match &wait.hibernation {
            Some(hibernation) if task.state == State::Hibernated => hibernation.escalation_policy.as_str(),
            _ => "fail",
        };
        return match escalation {
            "retry" => Alarm::Do(Request::Wake.into()),
            "alert" => Alarm::Tell,
            _ => Alarm::Do(Request::Fail { by: String::new(), reason: "wait timeout".to_owned() }.into()),
        };
    }
    if wait.wake_at_ms > 0 && wait.wake_at_ms <= context.now {
        return Alarm::Do(go_on.into());
    }
    if task.state == State::WaitingDependency && context.dependencies_ended {
        return Alarm::Do(go_on.into());
    }
    Alarm::Nothing
}

fn earliest<const N: usize>(times: [Option<i64>; N]) -> Option<i64> {
    times.into_iter().flatten().min()
}

/// The published texts.
fn refusal(task: &Task, request: &Request, change: Change) -> Error {
    let id = task.id;
    let transition = |operation: &str| {
        let (from, to) = (task.state.word(), change.target().word());
        format!("{operation}: invalid task state transition: {from} → {to}")
    };
    let text = match request {
        Request::Claim { .. } => {
            format!("task {id} not found or not in a claimable state (pending, assigned, starting, or running)")
        }
        Request::Complete { .. } => format!("task {id} not found or not in a completable state"),
        Request::Fail { .. } | Request::Bury => format!("task {id} not found or not in a failable state"),
        Request::Cancel { .. } => format!("task {id} not found or already completed/failed/cancelled"),
        Request::Retry => format!("task {id} not found or not in retryable state"),
        Request::Pause(_) => transition("PauseTask"),
        Request::Resume | Request::Wake => transition("ResumeTask"),
        Request::Reject { .. } => transition("RejectTask"),
        Request::Start { .. } => format!("task {id} not in assigned, starting, or running state"),
        Request::Assign { .. } | Request::Launch { .. } => format!("task {id} not found or not in pending state"),
        Request::PutBack | Request::Unavoid | Request::Gone { .. } | Request::Back { .. } | Request::Report => {
            format!("task {id} is not held")
        }
    };
    Error::new(Kind::Precondition, "ERR_TASK_STATE", text)
}

impl Task {
    pub(super) fn taken_by(&mut self, worker: &str, now: i64) {
        worker.clone_into(&mut self.assignee);
        self.assigned_at = Some(now);
        self.attempt += 1;
        self.disconnected_at = None;
        self.avoid.clear();
    }

    fn nobodys(&mut self) {
        self.assignee.clear();
        self.assigned_at = None;
        self.disconnected_at = None;
        (self.begun_at, self.reported_at) = (None, None);
    }

    fn running(&mut self, now: i64) {
        if self.state != State::Running {
            (self.begun_at, self.reported_at) = (Some(now), None);
        }
        self.state = State::Running;
        self.started_at = self.started_at.or(Some(now));
    }

    fn gone(&mut self, is_lost: bool, now: i64) {
        self.disconnected_at = Some(now);
        self.lost_sessions += i64::from(is_lost);
    }

    fn back(&mut self, is_same: bool) {
        self.disconnected_at = None;
        self.lost_sessions -= i64::from(is_same && self.lost_sessions > 0);
    }

    fn buried(&mut self, now: i64) {
        let count = self.lost_sessions;
        let reason = format!("{count} sessions ended while they had it, one after the other and without a report");
        self.ended(State::DeadLetter, "", &reason, now);
    }

    fn resumed(&mut self) {
        (self.wait, self.paused_at, self.retry_at) = (None, None, None);
    }

    fn ended(&mut self, state: State, by: &str, why: &str, now: i64) {
        self.state = state;
        by.clone_into(&mut self.ended_by);
        why.clone_into(&mut self.error);
        self.ended_at = Some(now);
        self.disconnected_at = None;
        self.resumed();
    }

    fn tried_again(&mut self, now: i64) {
        // Also one that was too slow, or gone.
        let failed_it = (self.ended_by == self.assignee || self.ended_by.is_empty()) && self.mode == Mode::Pool;
        if self.state != State::Retrying {
            self.lost_sessions = 0;
        }
        self.avoid = if failed_it { self.assignee.clone() } else { String::new() };
        self.nobodys();
        (self.started_at, self.ended_at, self.retry_at) = (None, None, None);
        self.ended_by.clear();
        self.error.clear();
        self.queued_at = now;
        self.state = State::Pending;
    }

    /// The id of the first of its ancestors, which may be its own.
    #[must_use]
    pub fn root_id(&self) -> String {
        if self.root.is_empty() { self.id.to_string() } else { self.root.clone() }
    }
}

/// Reads an id; whoever names something else means no task.
#[must_use]
pub fn id(text: &str) -> Option<Uuid> {
    Uuid::try_parse(text).ok()
}

#[cfg(test)]
mod tests {
    use super::{Alarm, Context, Mode, Request, State, Task, Times, alarm, due};

    const TIMES: Times =
        Times { pool_wait: 100, start_wait: 200, launch: 50, launches_max: 2, keep_done: 1000, keep_failed: 2000 };

    fn at(now: i64) -> Context {
        Context { now, roll: 0.0, worker_is_there: false, dependencies_ended: false }
    }

    #[test]
    fn every_ended_task_is_forgotten_in_its_time_and_no_other() {
        for state in State::all() {
            let task = Task { state, assignee: "ag::w::i::s".into(), ..Task::blank(0, Mode::Targeted) };
            let kept = match state {
                State::Completed | State::Cancelled | State::Rejected => Some(1000),
                State::Failed | State::DeadLetter => Some(2000),
                _ => None,
            };
            if kept.is_some() || state.is_terminal() {
                assert_eq!(due(&task, &TIMES), kept, "{state:?}");
            }
            let forgotten = alarm(&task, at(2000), &TIMES) == Alarm::Forget;
            assert_eq!(forgotten, kept.is_some(), "{state:?}");
            assert_ne!(alarm(&task, at(999), &TIMES), Alarm::Forget, "{state:?}");
        }
        let forever = Times { keep_done: 0, ..TIMES };
        assert_eq!(due(&Task { state: State::Completed, ..Task::blank(0, Mode::Pool) }, &forever), None);
    }

    #[test]
    fn only_who_is_away_loses_what_it_has() {
        for state in State::all().filter(|state| state.is_held()) {
            let assignee = "ag::w::i::s".to_owned();
            let task = Task { state, assignee, disconnected_at: Some(0), ..Task::blank(0, Mode::Targeted) };
            let back = Alarm::Do(Request::Back { is_same: false }.into());
            let there = Context { worker_is_there: true, ..at(1_000_000) };
            assert_eq!(alarm(&task, there, &TIMES), back, "{state:?}");
            let away = alarm(&task, at(1_000_000), &TIMES);
            assert!(matches!(&away, Alarm::Do(request) if !matches!(**request, Request::Back { .. })));
        }
    }

    #[test]
    fn nobody_waits_for_ever_for_somebody() {
        let pool = Task::blank(0, Mode::Pool);
        assert_eq!(due(&pool, &TIMES), Some(100));
        assert!(matches!(alarm(&pool, at(100), &TIMES), Alarm::Do(_)));
        assert_eq!(alarm(&pool, at(99), &TIMES), Alarm::Nothing);
        let again = Task { queued_at: 1000, ..pool };
        assert_eq!(due(&again, &TIMES), Some(1100), "counted from when it was queued last");
        assert_eq!(due(&Task::blank(0, Mode::Startup), &TIMES), Some(200));
        assert_eq!(due(&Task::blank(0, Mode::Targeted), &TIMES), None);
    }
}

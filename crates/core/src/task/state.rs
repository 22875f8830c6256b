//! The states of a task and what leads from which to which: the only place that knows. [`table`] prints it, and the
//! documentation shows what it printed.

/// Where a task stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum State {
    /// Waits for somebody to take it.
    Pending,
    /// Somebody has it, and did not say yet that the work began.
    Assigned,
    /// An orchestrator starts the agent that it is about.
    Starting,
    /// Somebody works on it.
    Running,
    /// Waits for a message.
    WaitingInput,
    /// Waits for somebody's permission.
    WaitingAuthority,
    /// Waits for other tasks.
    WaitingDependency,
    /// Waits, and nobody has to be there meanwhile.
    Hibernated,
    /// Failed, and will be tried again by itself.
    Retrying,
    /// Done.
    Completed,
    /// Failed for good, unless somebody retries it.
    Failed,
    /// Called off.
    Cancelled,
    /// Declined by whoever had it.
    Rejected,
    /// Failed as often as it may; kept for somebody to look at and to retry.
    DeadLetter,
}

/// What clients are told of a state. The published contract's numbers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Status {
    /// Nobody works on it yet.
    Queued = 1,
    /// Somebody does.
    Running = 2,
    /// Done.
    Completed = 3,
    /// Failed.
    Failed = 4,
    /// Called off.
    Cancelled = 5,
    /// Waits for a message.
    WaitingInput = 6,
    /// Waits for a permission.
    WaitingAuthority = 7,
    /// Waits for other tasks.
    WaitingDependency = 8,
    /// Waits without a worker.
    Hibernated = 9,
    /// Declined.
    Rejected = 10,
}

/// What happens to a task.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Change {
    /// A worker gets it.
    Assign,
    /// An orchestrator gets it, to start an agent.
    Launch,
    /// Whoever had it is gone, or it never arrived.
    PutBack,
    /// The agent that it is about has come, or who came with the task's token.
    Start,
    /// A worker says that it begins.
    Claim,
    /// Done.
    Complete,
    /// Not done.
    Fail,
    /// Called off.
    Cancel,
    /// Once more.
    Retry,
    /// Pause for a message.
    AwaitInput,
    /// Pause for a permission.
    AwaitAuthority,
    /// Pause for other tasks.
    AwaitDependency,
    /// Pause without a worker.
    Hibernate,
    /// Go on, with the same worker.
    Resume,
    /// Go on, with whoever gets it.
    Wake,
    /// Declined.
    Reject,
}

use Change as C;
use State as S;

/// Every change: from where, to where. `Fail` leads to one of three, by the task's policy.
const TABLE: [(Change, &[State], &[State]); 16] = [
    (C::Assign, &[S::Pending], &[S::Assigned]),
    (C::Launch, &[S::Pending], &[S::Starting]),
    (C::PutBack, &[S::Assigned, S::Starting, S::Running], &[S::Pending]),
    (C::Start, &[S::Pending, S::Assigned, S::Starting, S::Running], &[S::Running]),
    (C::Claim, &[S::Pending, S::Assigned, S::Starting, S::Running], &[S::Running]),
    (C::Complete, &[S::Assigned, S::Starting, S::Running], &[S::Completed]),
    (
        C::Fail,
        &[
            S::Assigned,
            S::Starting,
            S::Running,
            S::WaitingInput,
            S::WaitingAuthority,
            S::WaitingDependency,
            S::Hibernated,
        ],
        &[S::Failed, S::Retrying, S::DeadLetter],
    ),
    (
        C::Cancel,
        &[
            S::Pending,
            S::Assigned,
            S::Starting,
            S::Running,
            S::WaitingInput,
            S::WaitingAuthority,
            S::WaitingDependency,
            S::Hibernated,
            S::Retrying,
        ],
        &[S::Cancelled],
    ),
    (C::Retry, &[S::Retrying, S::Failed, S::Cancelled, S::DeadLetter], &[S::Pending]),
    (C::AwaitInput, &[S::Running, S::WaitingInput], &[S::WaitingInput]),
    (C::AwaitAuthority, &[S::Running, S::WaitingAuthority], &[S::WaitingAuthority]),
    (C::AwaitDependency, &[S::Pending, S::Running, S::WaitingDependency], &[S::WaitingDependency]),
    (C::Hibernate, &[S::Running, S::Hibernated], &[S::Hibernated]),
    (C::Resume, &[S::Assigned, S::Running, S::WaitingInput, S::WaitingAuthority, S::WaitingDependency], &[S::Running]),
    (C::Wake, &[S::WaitingInput, S::WaitingAuthority, S::WaitingDependency, S::Hibernated], &[S::Pending]),
    (C::Reject, &[S::Pending, S::Assigned, S::WaitingInput, S::WaitingAuthority], &[S::Rejected]),
];

impl State {
    /// All of them, with their words in the ledger.
    const WORDS: [(Self, &'static str); 14] = [
        (S::Pending, "pending"),
        (S::Assigned, "assigned"),
        (S::Starting, "starting"),
        (S::Running, "running"),
        (S::WaitingInput, "waiting_input"),
        (S::WaitingAuthority, "waiting_authority"),
        (S::WaitingDependency, "waiting_dependency"),
        (S::Hibernated, "hibernated"),
        (S::Retrying, "retrying"),
        (S::Completed, "completed"),
        (S::Failed, "failed"),
        (S::Cancelled, "cancelled"),
        (S::Rejected, "rejected"),
        (S::DeadLetter, "dlq"),
    ];

    /// All states.
    pub fn all() -> impl Iterator<Item = Self> {
        Self::WORDS.iter().map(|(state, _)| *state)
    }

    /// Its word.
    #[must_use]
    pub fn word(self) -> &'static str {
        Self::WORDS.iter().find(|(state, _)| *state == self).map_or("", |(_, word)| word)
    }

    /// The state of a word.
    #[must_use]
    pub fn parse(word: &str) -> Option<Self> {
        Self::WORDS.iter().find(|(_, known)| *known == word).map(|(state, _)| *state)
    }

    /// What clients are told.
    #[must_use]
    pub fn status(self) -> Status {
        match self {
            S::Pending | S::Assigned | S::Starting => Status::Queued,
            S::Running => Status::Running,
            S::WaitingInput => Status::WaitingInput,
            S::WaitingAuthority => Status::WaitingAuthority,
            S::WaitingDependency => Status::WaitingDependency,
            S::Hibernated => Status::Hibernated,
            S::Completed => Status::Completed,
            S::Retrying | S::Failed | S::DeadLetter => Status::Failed,
            S::Cancelled => Status::Cancelled,
            S::Rejected => Status::Rejected,
        }
    }

    /// Nothing happens to it any more by itself.
    #[must_use]
    pub fn is_terminal(self) -> bool {
        matches!(self, S::Completed | S::Failed | S::Cancelled | S::Rejected | S::DeadLetter)
    }

    /// Somebody has it who has to be there.
    #[must_use]
    pub fn is_held(self) -> bool {
        matches!(self, S::Assigned | S::Starting | S::Running)
    }

    /// It was paused.
    #[must_use]
    pub fn is_waiting(self) -> bool {
        matches!(self, S::WaitingInput | S::WaitingAuthority | S::WaitingDependency | S::Hibernated)
    }

    /// Whether the change can happen to a task in this state.
    #[must_use]
    pub fn allows(self, change: Change) -> bool {
        change.sources().contains(&self)
    }
}

impl Status {
    /// Its word, in notices and in the names of completion events.
    #[must_use]
    pub fn word(self) -> &'static str {
        match self {
            Self::Queued => "pending",
            Self::Running => "running",
            Self::Completed => "completed",
            Self::Failed => "failed",
            Self::Cancelled => "cancelled",
            Self::WaitingInput => "waiting_input",
            Self::WaitingAuthority => "waiting_authority",
            Self::WaitingDependency => "waiting_dependency",
            Self::Hibernated => "hibernated",
            Self::Rejected => "rejected",
        }
    }

    /// The states that read so.
    pub fn states(self) -> impl Iterator<Item = State> {
        State::all().filter(move |state| state.status() == self)
    }

    /// The published number's status.
    #[must_use]
    pub fn from_number(number: i32) -> Option<Self> {
        State::all().map(State::status).find(|status| *status as i32 == number)
    }
}

impl Change {
    /// The states that it can happen in.
    #[must_use]
    pub fn sources(self) -> &'static [State] {
        TABLE.iter().find(|(change, ..)| *change == self).map_or(&[], |(_, from, _)| from)
    }

    /// The state that it leads to; the first, where the policy decides.
    #[must_use]
    pub fn target(self) -> State {
        let found = TABLE.iter().find(|(change, ..)| *change == self).and_then(|(_, _, to)| to.first());
        found.copied().unwrap_or(State::Failed)
    }
}

/// The table, in Markdown.
#[must_use]
pub fn table() -> String {
    let words =
        |states: &[State]| states.iter().map(|state| format!("`{}`", state.word())).collect::<Vec<_>>().join(" ");
    let rows = TABLE.iter().map(|(change, from, to)| format!("| {change:?} | {} | {} |\n", words(from), words(to)));
    let status = |state: State| format!("| `{}` | {:?} |\n", state.word(), state.status());
    ["| change | from | to |\n| --- | --- | --- |\n".to_owned()]
        .into_iter()
        .chain(rows)
        .chain(["\n| state | as clients see it |\n| --- | --- |\n".to_owned()])
        .chain(State::all().map(status))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::{Change, State, Status, TABLE, table};

    #[test]
    fn words_are_read_back_and_every_status_has_a_state() {
        for state in State::all() {
            assert_eq!(State::parse(state.word()), Some(state));
        }
        for number in 1..=10 {
            let status = Status::from_number(number).unwrap();
            assert!(status.states().all(|state| state.status() == status));
        }
        assert_eq!(Status::from_number(0), None);
    }

    #[test]
    fn nothing_leaves_a_completed_or_rejected_task() {
        for (change, from, to) in TABLE {
            assert!(!from.contains(&State::Completed) && !from.contains(&State::Rejected), "{change:?}");
            assert!(from.iter().all(|state| !state.is_terminal()) || change == Change::Retry, "{change:?}");
            assert_eq!(change.target(), to[0]);
        }
    }

    #[test]
    fn every_state_that_is_not_the_end_can_be_called_off() {
        for state in State::all() {
            assert_eq!(state.allows(Change::Cancel), !state.is_terminal(), "{state:?}");
        }
    }

    #[test]
    fn the_documentation_shows_the_table() {
        let docs = include_str!("../../../../docs/protocol/tasks.md");
        assert!(docs.contains(&table()), "docs/protocol/tasks.md should contain:\n{}", table());
    }
}

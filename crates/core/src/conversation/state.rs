//! What a conversation is at a moment, and what happens to it: pure.
//!
//! | it is | a user's message | an agent's, or an operator's | the agent says that it is … |
//! | --- | --- | --- | --- |
//! | open, escalated, pending_feedback | begins a turn | ends the turn, unless there is more to come | that |
//! | closed: the others | refused | is added | that: also open again |

use serde::{Deserialize, Serialize};
use uuid::Uuid;

/// How a conversation is. The published words.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum State {
    /// It goes on.
    #[default]
    Open,
    /// A person was asked to help.
    Escalated,
    /// It has reached its end.
    Resolved,
    /// It ended without a person: its agent said so, or no feedback came for long.
    AutoResolved,
    /// Nothing happened in it for long.
    AssumedResolved,
    /// The user is locked out for its tone.
    RageLocked,
    /// The user is locked out for what it tried.
    AttemptedHack,
    /// It has ended, and the user may say how it was.
    PendingFeedback,
}

impl State {
    /// All of them.
    pub const ALL: [Self; 8] = [
        Self::Open,
        Self::Escalated,
        Self::Resolved,
        Self::AutoResolved,
        Self::AssumedResolved,
        Self::RageLocked,
        Self::AttemptedHack,
        Self::PendingFeedback,
    ];

    /// Whether the user cannot say anything any more.
    #[must_use]
    pub fn is_closed(self) -> bool {
        !matches!(self, Self::Open | Self::Escalated | Self::PendingFeedback)
    }

    /// What the user is told of it, unless the agent says something better.
    fn words(self) -> Option<&'static str> {
        match self {
            Self::Open => None,
            Self::Escalated => Some("A person was asked to help."),
            Self::PendingFeedback => Some("This conversation has ended. How was it?"),
            Self::Resolved | Self::AutoResolved | Self::AssumedResolved => Some("This conversation has ended."),
            Self::RageLocked | Self::AttemptedHack => Some("This conversation was closed."),
        }
    }
}

/// Who said something. The published words.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Kind {
    /// The end user.
    #[serde(rename = "appuser")]
    User,
    /// An agent.
    #[serde(rename = "ai_agent")]
    Agent,
    /// An operator.
    #[serde(rename = "human_agent")]
    Human,
}

/// Somebody in a conversation, as users see it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Participant {
    /// The agent's id in the app, or the operator's.
    pub id: String,
    /// What it is.
    pub kind: Kind,
    /// What it is called.
    pub name: Option<String>,
    /// Its picture.
    pub photo_url: Option<String>,
    /// What stands there without one.
    pub initial: Option<String>,
}

impl Participant {
    /// Somebody with this name.
    #[must_use]
    pub fn new(id: &str, kind: Kind, name: &str, photo_url: Option<String>) -> Self {
        let initial = name.trim().chars().next().map(|first| first.to_uppercase().collect());
        Self { id: id.to_owned(), kind, name: Some(name.to_owned()), photo_url, initial }
    }
}

/// A file of a message.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct File {
    /// By which it is fetched.
    pub id: Uuid,
    /// What its sender called it.
    pub filename: String,
    /// What it is, by its first bytes.
    pub content_type: String,
    /// How large it is.
    pub byte_size: u64,
}

/// Something that was said.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Message {
    /// Unique, and the same for ever.
    pub id: Uuid,
    /// The text.
    pub content: String,
    /// By what kind of participant.
    pub from: Kind,
    /// In which turn: each message of the user begins one. 0 for what is said before the first.
    pub turn_number: u64,
    /// When, in RFC 3339.
    pub created_at: String,
    /// By whom; nothing for the user.
    pub participant: Option<Participant>,
    /// What was attached.
    pub files: Vec<File>,
}

/// How a turn ended. The published words.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Reason {
    /// It was answered.
    Ok,
    /// It will not be answered.
    Blocked,
    /// The user says too much.
    RateLimited,
    /// The conversation was closed.
    Closed,
    /// The agent went away.
    Unavailable,
    /// The agent failed.
    TemporaryFailure,
}

/// What happens in a conversation, and is kept.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Event {
    /// Something was said.
    Message(Box<Message>),
    /// It is something else now.
    State {
        /// That.
        state: State,
        /// What it was.
        prev_state: State,
        /// What the user is told of it.
        closed_user_message: Option<String>,
    },
    /// A turn ended.
    TurnDone {
        /// How.
        reason: Reason,
        /// When, in Unix seconds.
        at: i64,
        /// After how many seconds the user may go on.
        retry_after_seconds: Option<u64>,
    },
    /// The agent failed.
    Failed {
        /// When, in Unix seconds.
        at: i64,
    },
    /// An operator hears what is said from now on. Not shown.
    Joined(String),
    /// An operator does not any more. Not shown.
    Left(String),
}

/// Where a conversation stands. It is kept with every event, as it is behind that: whoever has the last record knows it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Standing {
    /// How it is.
    #[serde(rename = "s", default, skip_serializing_if = "is_default")]
    pub state: State,
    /// Turns that were begun.
    #[serde(rename = "t", default, skip_serializing_if = "is_default")]
    pub turns: u64,
    /// The last one has not ended.
    #[serde(rename = "o", default, skip_serializing_if = "is_default")]
    pub is_turn_open: bool,
    /// When something was said last, in Unix milliseconds; 0 for never.
    #[serde(rename = "l", default, skip_serializing_if = "is_default")]
    pub last_message_ms: i64,
    /// Lanes of operators that hear what is said.
    #[serde(rename = "h", default, skip_serializing_if = "is_default")]
    pub operators: Vec<String>,
}

fn is_default<T: Default + PartialEq>(value: &T) -> bool {
    *value == T::default()
}

/// What somebody does.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Act {
    /// Says something; a user's begins a turn, anybody else's ends it unless there is more to come.
    Say {
        /// What. Its turn and its time are not filled in yet.
        message: Box<Message>,
        /// There is more to come.
        more: bool,
    },
    /// Ends the turn; a certain one, if it is still open.
    EndTurn(Reason, Option<u64>),
    /// Says how the conversation is, and maybe what the user is told of it.
    Be(State, Option<String>),
    /// Is that from now on, because nothing happened, if it still stands as it stood then.
    Settle(State, Box<Standing>),
    /// Hears what is said from now on.
    Join(String),
    /// Does not any more.
    Leave(String),
}

/// Why something cannot be done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refused {
    /// The conversation is closed.
    Closed(State),
    /// So many operators are there already.
    Crowded,
}

/// Operators that hear one conversation: each has a copy of every message.
pub const OPERATORS_MAX: usize = 8;

/// What follows from an act. Nothing, if it changes nothing.
///
/// # Errors
/// [`Refused`].
pub fn decide(standing: &Standing, act: Act, now_ms: i64) -> Result<Vec<Event>, Refused> {
    let ends = |reason| Event::TurnDone { reason, at: now_ms / 1000, retry_after_seconds: None };
    Ok(match act {
        Act::Say { message, .. } if message.from == Kind::User && standing.state.is_closed() => {
            let _ = message;
            return Err(Refused::Closed(standing.state));
        }
        Act::Say { mut message, more } => {
            let is_users = message.from == Kind::User;
            message.turn_number = standing.turns + u64::from(is_users);
            let ends_turn = !is_users && standing.is_turn_open && !more;
            [Event::Message(message)].into_iter().chain(ends_turn.then(|| ends(Reason::Ok))).collect()
        }
        Act::EndTurn(..) if !standing.is_turn_open => Vec::new(),
        // It has ended, and another one began.
        Act::EndTurn(_, Some(turn)) if turn != standing.turns => Vec::new(),
        Act::EndTurn(Reason::TemporaryFailure, _) => {
            vec![Event::Failed { at: now_ms / 1000 }, ends(Reason::TemporaryFailure)]
        }
        Act::EndTurn(reason, _) => vec![ends(reason)],
        Act::Settle(_, then) if *then != *standing => Vec::new(),
        Act::Settle(state, _) => return decide(standing, Act::Be(state, None), now_ms),
        Act::Be(state, _) if state == standing.state => Vec::new(),
        Act::Be(state, words) => {
            let closed_user_message = words.or(state.words().map(ToOwned::to_owned)).filter(|_| state != State::Open);
            let changed = Event::State { state, prev_state: standing.state, closed_user_message };
            let ends_turn = state.is_closed() && standing.is_turn_open;
            [changed].into_iter().chain(ends_turn.then(|| ends(Reason::Closed))).collect()
        }
        Act::Join(lane) if standing.operators.contains(&lane) => {
            let _ = lane;
            Vec::new()
        }
        Act::Join(_) if standing.operators.len() >= OPERATORS_MAX => return Err(Refused::Crowded),
        Act::Join(lane) => vec![Event::Joined(lane)],
        Act::Leave(lane) if standing.operators.contains(&lane) => vec![Event::Left(lane)],
        Act::Leave(_) => Vec::new(),
    })
}

impl Standing {
    /// Where it stands behind an event.
    pub fn apply(&mut self, event: &Event, now_ms: i64) {
        match event {
            Event::Message(message) => {
                if message.from == Kind::User {
                    self.turns = message.turn_number;
                    self.is_turn_open = true;
                }
                self.last_message_ms = now_ms;
            }
            Event::State { state, .. } => self.state = *state,
            Event::TurnDone { .. } => self.is_turn_open = false,
            Event::Failed { .. } => {}
            Event::Joined(lane) => self.operators.push(lane.clone()),
            Event::Left(lane) => self.operators.retain(|other| other != lane),
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::{Just, Strategy, any, prop_oneof};

    use super::{Act, Event, Kind, Message, OPERATORS_MAX, Reason, Refused, Standing, State, decide};

    fn say(from: Kind, more: bool) -> Act {
        let message = Message {
            id: uuid::Uuid::nil(),
            content: "hi".into(),
            from,
            turn_number: 0,
            created_at: String::new(),
            participant: None,
            files: Vec::new(),
        };
        Act::Say { message: message.into(), more }
    }

    /// The names of what follows, after which `standing` is as it follows from them.
    fn run(standing: &mut Standing, act: Act) -> Result<String, Refused> {
        let events = decide(standing, act, 7000)?;
        let mut names = Vec::new();
        for event in &events {
            standing.apply(event, 7000);
            names.push(match event {
                Event::Message(message) => format!("message {}", message.turn_number),
                Event::State { state, prev_state, closed_user_message } => {
                    format!("{prev_state:?} to {state:?} ({})", closed_user_message.is_some())
                }
                Event::TurnDone { reason, at, .. } => format!("{reason:?} at {at}"),
                Event::Failed { at } => format!("failed at {at}"),
                Event::Joined(lane) => format!("joined {lane}"),
                Event::Left(lane) => format!("left {lane}"),
            });
        }
        Ok(names.join(", "))
    }

    #[test]
    fn a_conversation_goes_on_as_written_down() {
        let mut standing = Standing::default();
        let steps = [
            (say(Kind::Agent, false), "message 0"),
            (say(Kind::User, false), "message 1"),
            (say(Kind::User, false), "message 2"),
            (say(Kind::Agent, true), "message 2"),
            (say(Kind::Agent, false), "message 2, Ok at 7"),
            (Act::EndTurn(Reason::Ok, None), ""),
            (say(Kind::Agent, false), "message 2"),
            (say(Kind::User, false), "message 3"),
            (Act::EndTurn(Reason::Unavailable, Some(2)), ""),
            (Act::EndTurn(Reason::TemporaryFailure, Some(3)), "failed at 7, TemporaryFailure at 7"),
            (Act::Be(State::Escalated, None), "Open to Escalated (true)"),
            (Act::Be(State::Escalated, None), ""),
            (Act::Join("us::ann::desk".into()), "joined us::ann::desk"),
            (Act::Join("us::ann::desk".into()), ""),
            (say(Kind::User, false), "message 4"),
            (say(Kind::Human, false), "message 4, Ok at 7"),
            (Act::Leave("us::ann::desk".into()), "left us::ann::desk"),
            (Act::Leave("us::ann::desk".into()), ""),
            (say(Kind::User, false), "message 5"),
            (Act::Be(State::Resolved, None), "Escalated to Resolved (true), Closed at 7"),
            (say(Kind::Agent, false), "message 5"),
            (Act::Be(State::Open, Some("never shown".into())), "Resolved to Open (false)"),
            (say(Kind::User, false), "message 6"),
        ];
        for (act, expected) in steps {
            assert_eq!(run(&mut standing, act.clone()).unwrap(), expected, "{act:?}");
        }
    }

    #[test]
    fn what_is_closed_takes_nothing_of_the_user() {
        for state in State::ALL {
            let mut standing = Standing { state, ..Standing::default() };
            let refused = run(&mut standing, say(Kind::User, false)).err();
            assert_eq!(refused, state.is_closed().then_some(Refused::Closed(state)));
            assert!(run(&mut standing, say(Kind::Agent, false)).is_ok());
        }
        let operators = (0..OPERATORS_MAX).map(|n| n.to_string()).collect();
        let mut standing = Standing { operators, ..Standing::default() };
        assert_eq!(run(&mut standing, Act::Join("one more".into())), Err(Refused::Crowded));
    }

    fn acts() -> impl Strategy<Value = Act> {
        let from = prop_oneof![Just(Kind::User), Just(Kind::Agent), Just(Kind::Human)];
        prop_oneof![
            (from, any::<bool>()).prop_map(|(from, more)| say(from, more)),
            prop_oneof![Just(Reason::Ok), Just(Reason::TemporaryFailure), Just(Reason::Unavailable)]
                .prop_map(|reason| Act::EndTurn(reason, None)),
            proptest::sample::select(State::ALL.to_vec()).prop_map(|state| Act::Be(state, None)),
            "[ab]".prop_map(Act::Join),
            "[ab]".prop_map(Act::Leave),
        ]
    }

    proptest::proptest! {
        #[test]
        fn turns_end_once_and_records_tell_where_it_stands(acts in proptest::collection::vec(acts(), 0..40)) {
            let (mut standing, mut open, mut turns) = (Standing::default(), false, 0);
            for act in acts {
                let Ok(events) = decide(&standing, act, 7000) else { continue };
                for event in events {
                    standing.apply(&event, 7000);
                    match event {
                        Event::Message(message) if message.from == Kind::User => {
                            turns += 1;
                            proptest::prop_assert_eq!(message.turn_number, turns);
                            open = true;
                        }
                        Event::Message(message) => proptest::prop_assert_eq!(message.turn_number, turns),
                        Event::TurnDone { .. } => {
                            proptest::prop_assert!(open, "a turn ends that was not begun");
                            open = false;
                        }
                        _ => {}
                    }
                    let kept = serde_json::to_vec(&standing).unwrap();
                    proptest::prop_assert_eq!(&serde_json::from_slice::<Standing>(&kept).unwrap(), &standing);
                }
                proptest::prop_assert_eq!(standing.is_turn_open, open);
            }
        }
    }
}

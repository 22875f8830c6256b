//! What an agent's or an operator's message means in a conversation: pure.
//!
//! | type | payload | meaning |
//! | --- | --- | --- |
//! | chat, opaque | text | said |
//! | chat, opaque | `{"text", "more"?, "id"?, "name"?, "photo_url"?}` | said; with an `id`, what was streamed under it, whole |
//! | control | `{"type": "turn_done", "reason"}` | the turn ends |
//! | control | `{"type": "convo_state", "state", "closed_user_message"?}` | the conversation is that now |
//! | control | `{"type": "lockout", "reason", "seconds"? , "user_message"?}` | the user is locked out: for so long, or for good |
//! | control | `{"type": "join"}`, `{"type": "leave"}` | an operator hears what is said, or does not any more |
//! | control, opaque | `{"type": "typing", "state", "kind"?, "label"?}` | somebody types, or stops |
//! | opaque | `{"type": "delta", "id", "text", "start"?}` | a piece of what is being said; with `start`, its first, in place of those before |
//! | opaque | `{"type": "delta", "id", "done": true}` | what was streamed is said |

use serde::Deserialize;

use super::state::{Reason, State};
use crate::{
    error::{Error, Kind},
    json::{self, Cut},
};

/// The published contract's numbers of types.
const UNSPECIFIED: i32 = 0;
const CHAT: i32 = 1;
const CONTROL: i32 = 2;
const OPAQUE: i32 = 6;

/// Longest name that an agent gives to what it streams, and longest label, in bytes.
const NAME_BYTES_MAX: usize = 128;

/// What a message means.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Said {
    /// Something is said.
    Text(Text),
    /// A piece of what is being said.
    Delta {
        /// What the agent calls the whole.
        id: String,
        /// The piece.
        text: Cut,
        /// It is the first one, whatever came before.
        is_start: bool,
    },
    /// What was streamed is said.
    Done {
        /// What the agent calls it.
        id: String,
        /// There is more to come.
        more: bool,
    },
    /// Somebody types, or stops.
    Typing(Typing),
    /// The turn ends.
    EndTurn(Reason),
    /// The conversation is that now.
    Be(State, Option<String>),
    /// The user is locked out.
    LockOut(LockOut),
    /// An operator hears what is said.
    Join,
    /// It does not any more.
    Leave,
}

/// Something that is said.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
pub struct Text {
    /// The words.
    #[serde(deserialize_with = "json::lossy")]
    pub text: String,
    /// There is more to come in this turn.
    #[serde(default)]
    pub more: bool,
    /// Under which it was streamed before.
    #[serde(default, deserialize_with = "json::lossy_option")]
    pub id: Option<String>,
    /// Who says it, if not as the app has it.
    #[serde(default, deserialize_with = "json::lossy_option")]
    pub name: Option<String>,
    /// Its picture.
    #[serde(default, deserialize_with = "json::lossy_option")]
    pub photo_url: Option<String>,
}

/// Somebody types, or thinks, or stops.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, serde::Serialize)]
pub struct Typing {
    /// Which of it.
    #[serde(default)]
    pub kind: Activity,
    /// Whether it begins.
    pub state: Phase,
    /// What is shown.
    #[serde(default, deserialize_with = "json::lossy")]
    pub label: String,
}

/// The published words.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, serde::Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Activity {
    /// It thinks.
    #[default]
    Thinking,
    /// It types.
    Typing,
}

/// The published words.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, serde::Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Phase {
    /// It begins, or goes on.
    Start,
    /// It stops.
    Stop,
}

/// Why a user is locked out, and for how long.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
pub struct LockOut {
    /// Why.
    pub reason: Why,
    /// For how long; nothing for good.
    #[serde(default)]
    pub seconds: Option<u32>,
    /// What the user is told.
    #[serde(default, deserialize_with = "json::lossy_option")]
    pub user_message: Option<String>,
}

impl LockOut {
    /// What becomes of the conversation; nothing if the user is let in again.
    pub(super) fn state(&self) -> Option<State> {
        match self.reason {
            Why::Rage => Some(State::RageLocked),
            Why::Hack => Some(State::AttemptedHack),
            Why::Permanent => Some(State::Resolved),
            Why::None => None,
        }
    }
}

/// The published words.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, serde::Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Why {
    /// For good, for any reason.
    Permanent,
    /// For its tone.
    Rage,
    /// For what it tried.
    Hack,
    /// It may come back.
    None,
}

#[derive(Deserialize)]
struct Named {
    #[serde(rename = "type")]
    kind: String,
}

#[derive(Deserialize)]
struct Delta {
    #[serde(deserialize_with = "json::lossy")]
    id: String,
    #[serde(default)]
    text: Cut,
    #[serde(default)]
    start: bool,
    #[serde(default)]
    done: bool,
    #[serde(default)]
    more: bool,
}

#[derive(Deserialize)]
struct EndTurn {
    reason: Reason,
}

#[derive(Deserialize)]
struct Be {
    state: State,
    #[serde(default, deserialize_with = "json::lossy_option")]
    closed_user_message: Option<String>,
}

/// Reads what was sent to a conversation.
///
/// # Errors
/// [`Kind::Invalid`], naming what is wrong.
pub fn read(kind: i32, payload: &[u8]) -> Result<Said, Error> {
    match kind {
        UNSPECIFIED | CHAT => chat(payload),
        // What the published client sends if its program says nothing else: text, unless it names what it is.
        OPAQUE if json::object::<Named>(payload).is_err() => chat(payload),
        CONTROL | OPAQUE => named(payload),
        other => Err(invalid(format!("a conversation takes chat, control and opaque messages, not type {other}"))),
    }
}

fn chat(payload: &[u8]) -> Result<Said, Error> {
    let said = match json::object::<Text>(payload) {
        Ok(said) => said,
        Err(_) => match str::from_utf8(payload) {
            Ok(text) => Text { text: text.to_owned(), ..Text::default() },
            Err(e) => return Err(invalid(format!("what is said is text: {e}"))),
        },
    };
    if said.text.trim().is_empty() {
        return Err(invalid("nothing is said".to_owned()));
    }
    check_name(said.id.as_deref())?;
    check_name(said.name.as_deref())?;
    Ok(Said::Text(said))
}

fn named(payload: &[u8]) -> Result<Said, Error> {
    let Named { kind } = parse(payload, "type")?;
    Ok(match kind.as_str() {
        "delta" => {
            let Delta { id, text, start: is_start, done, more } = parse(payload, "delta")?;
            check_name(Some(&id))?;
            match (done, text == Cut::default()) {
                (true, true) => Said::Done { id, more },
                (false, false) => Said::Delta { id, text, is_start },
                _ => return Err(invalid("delta: either text, or done".to_owned())),
            }
        }
        "typing" => {
            let typing: Typing = parse(payload, "typing")?;
            check_name(Some(typing.label.as_str()).filter(|label| !label.is_empty()))?;
            Said::Typing(typing)
        }
        "turn_done" => Said::EndTurn(parse::<EndTurn>(payload, "turn_done")?.reason),
        "convo_state" => {
            let Be { state, closed_user_message } = parse(payload, "convo_state")?;
            Said::Be(state, closed_user_message)
        }
        "lockout" => Said::LockOut(parse(payload, "lockout")?),
        "join" => Said::Join,
        "leave" => Said::Leave,
        other => return Err(invalid(format!("type: {other:?} means nothing in a conversation"))),
    })
}

fn parse<'a, T: Deserialize<'a>>(payload: &'a [u8], what: &str) -> Result<T, Error> {
    json::object(payload).map_err(|e| invalid(format!("{what}: {e}")))
}

fn check_name(name: Option<&str>) -> Result<(), Error> {
    if name.is_none_or(|name| !name.is_empty() && name.len() <= NAME_BYTES_MAX) {
        return Ok(());
    }
    Err(invalid(format!("an id, name or label has 1 to {NAME_BYTES_MAX} bytes")))
}

fn invalid(message: String) -> Error {
    Error::new(Kind::Invalid, "ERR_INVALID_ARGUMENT", message)
}

#[cfg(test)]
mod tests {
    use super::{Activity, CHAT, CONTROL, Cut, LockOut, OPAQUE, Phase, Said, Text, Typing, Why, read};
    use crate::conversation::state::{Reason, State};

    #[test]
    fn what_agents_send_has_a_meaning() {
        let text = |text: &str| Text { text: text.into(), ..Text::default() };
        let piece = |text: &str| Cut { text: text.into(), ..Cut::default() };
        for (kind, payload, expected) in [
            (CHAT, "hi", Said::Text(text("hi"))),
            (0, "hi", Said::Text(text("hi"))),
            (OPAQUE, "hi", Said::Text(text("hi"))),
            (OPAQUE, r#"{"text": "hi"}"#, Said::Text(text("hi"))),
            (CHAT, r#"{"text": "hi", "more": true}"#, Said::Text(Text { more: true, ..text("hi") })),
            (CHAT, r#"{"text": "hi", "id": "m"}"#, Said::Text(Text { id: Some("m".into()), ..text("hi") })),
            // What JavaScript leaves of a character that it cut in two.
            (CHAT, r#"{"text": "a\ud83d"}"#, Said::Text(text("a\u{fffd}"))),
            // JSON that is none of it is what it says.
            (CHAT, r#"{"texts": 1}"#, Said::Text(text(r#"{"texts": 1}"#))),
            (CHAT, "42", Said::Text(text("42"))),
            (CHAT, r#"["hi"]"#, Said::Text(text(r#"["hi"]"#))),
            (OPAQUE, r#"["join"]"#, Said::Text(text(r#"["join"]"#))),
            (CONTROL, r#"{"type": "turn_done", "reason": "blocked"}"#, Said::EndTurn(Reason::Blocked)),
            (CONTROL, r#"{"type": "convo_state", "state": "auto_resolved"}"#, Said::Be(State::AutoResolved, None)),
            (
                CONTROL,
                r#"{"type": "lockout", "reason": "rage", "seconds": 60}"#,
                Said::LockOut(LockOut { reason: Why::Rage, seconds: Some(60), user_message: None }),
            ),
            (CONTROL, r#"{"type": "join"}"#, Said::Join),
            (CONTROL, r#"{"type": "leave"}"#, Said::Leave),
            (
                OPAQUE,
                r#"{"type": "delta", "id": "m", "text": "h"}"#,
                Said::Delta { id: "m".into(), text: piece("h"), is_start: false },
            ),
            (
                OPAQUE,
                r#"{"type": "delta", "id": "m", "text": "h", "start": true}"#,
                Said::Delta { id: "m".into(), text: piece("h"), is_start: true },
            ),
            (OPAQUE, r#"{"type": "delta", "id": "m", "done": true}"#, Said::Done { id: "m".into(), more: false }),
            (
                OPAQUE,
                r#"{"type": "typing", "state": "start", "label": "reads"}"#,
                Said::Typing(Typing { kind: Activity::Thinking, state: Phase::Start, label: "reads".into() }),
            ),
        ] {
            assert_eq!(read(kind, payload.as_bytes()).unwrap(), expected, "{payload}");
        }
    }

    #[test]
    fn what_means_nothing_is_refused_with_the_reason() {
        for (kind, payload, expected) in [
            (CHAT, " \n", "nothing is said"),
            (CHAT, r#"{"text": ""}"#, "nothing is said"),
            (3, "{}", "not type 3"),
            (CONTROL, "turn_done", "type: "),
            (CONTROL, r#"["join"]"#, "expected an object"),
            (CONTROL, r#"{"type": "turn_done", "reason": "why"}"#, "turn_done: unknown variant `why`"),
            (CONTROL, r#"{"type": "convo_state"}"#, "convo_state: missing field `state`"),
            (OPAQUE, r#"{"type": "delta", "id": "m"}"#, "either text, or done"),
            (OPAQUE, r#"{"type": "delta", "id": "", "text": "x"}"#, "has 1 to 128 bytes"),
            (OPAQUE, r#"{"type": "welcome"}"#, "means nothing"),
        ] {
            let error = read(kind, payload.as_bytes()).err().unwrap();
            assert!(error.message.contains(expected), "{payload}: {error}");
        }
        assert!(read(CHAT, b"\xff").is_err());
    }

    proptest::proptest! {
        #[test]
        fn any_bytes_are_read_or_refused(kind in 0..8_i32, bytes: Vec<u8>) {
            let _ = read(kind, &bytes);
        }
    }
}

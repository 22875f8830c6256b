//! Names of topics: parsing what clients name as a target, and the only place that builds the log's topics.

use std::fmt;

use trunkline_store::log::{Class, Topic};
use uuid::Uuid;

use crate::{
    error::{Error, Kind},
    identity::{Identity, SEPARATOR, Unplaced, identifier, workspace},
    limits::TARGET_BYTES_MAX,
};

/// Where a message can be sent. Every part was checked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Target {
    /// `ag::{workspace}::{implementation}::{specifier}`: one agent.
    Agent(Address),
    /// `tu::{workspace}::{implementation}::{specifier}`: one unique task.
    UniqueTask(Address),
    /// `ta::{workspace}::{implementation}::{assigned id}`: one task.
    Task(Address),
    /// `tb::{workspace}::{implementation}`: any one of the tasks of an implementation.
    AnyTask {
        /// The workspace.
        workspace: String,
        /// The implementation.
        implementation: String,
    },
    /// `ga::{workspace}`: every agent of a workspace.
    AllAgents {
        /// The workspace.
        workspace: String,
    },
    /// `gu::{workspace}`: every user window that is on a workspace.
    AllUsers {
        /// The workspace.
        workspace: String,
    },
    /// `us::{user}::{window}`: one window.
    Window {
        /// The user.
        user: String,
        /// The window.
        window: String,
    },
    /// `uw::{user}::{workspace}`: a user's windows on a workspace.
    UserIn {
        /// The user.
        user: String,
        /// The workspace.
        workspace: String,
    },
    /// `uu::{user}`: all windows of a user.
    User {
        /// The user.
        user: String,
    },
    /// `sv::{implementation}::{specifier}`: one service.
    Service(Place),
    /// `sv::{implementation}`: any one of the connected services of an implementation. It has no topic: one of them is
    /// picked first.
    AnyService {
        /// The implementation.
        implementation: String,
    },
    /// `br::{implementation}::{specifier}`: one bridge.
    Bridge(Place),
    /// `event::{workspace}`, or `event::*` for the sender's own: the workflow engine.
    Events {
        /// The workspace, if one was named.
        workspace: Option<String>,
    },
    /// `tk::{workspace}::{task}::msg`: whoever follows what is said about a task.
    TaskMessages {
        /// The workspace.
        workspace: String,
        /// The task.
        task: Uuid,
    },
    /// `metric::{workspace}`, or `metric::*` for the sender's own: the metrics bridge.
    Metrics {
        /// The workspace, if one was named.
        workspace: Option<String>,
    },
}

/// Two parts of a name, outside of any workspace.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Place {
    /// The implementation.
    pub implementation: String,
    /// The specifier.
    pub specifier: String,
}

/// The lane of the one workflow engine.
const EVENTS: &str = "event::receiver0";

/// The lane of the one metrics bridge.
const METRICS: &str = "metric::receiver0";

/// Three parts of a name, inside a workspace.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Address {
    /// The workspace.
    pub workspace: String,
    /// The implementation.
    pub implementation: String,
    /// The specifier, or assigned id.
    pub specifier: String,
}

impl Target {
    /// Reads what a client named.
    ///
    /// # Errors
    /// `ERR_INVALID_TOPIC` if it is no topic, `ERR_PERMISSION_DENIED` for topics that only the server writes to.
    pub fn parse(text: &str) -> Result<Self, Error> {
        if text.is_empty() || text.len() > TARGET_BYTES_MAX {
            return Err(invalid("topic length must be 1-256 characters"));
        }
        let parts: Vec<&str> = text.split(SEPARATOR).collect();
        Ok(match parts[..] {
            ["ag", w, i, s] => Self::Agent(Address::new(w, i, s)?),
            ["tu", w, i, s] => Self::UniqueTask(Address::new(w, i, s)?),
            ["ta", w, i, s] => Self::Task(Address::new(w, i, s)?),
            ["tb", w, i] => Self::AnyTask { workspace: space(w)?, implementation: part("impl", i)? },
            ["ga", w] => Self::AllAgents { workspace: space(w)? },
            ["gu", w] => Self::AllUsers { workspace: space(w)? },
            ["us", u, w] => Self::Window { user: part("id", u)?, window: part("specifier", w)? },
            ["uw", u, w] => Self::UserIn { user: part("id", u)?, workspace: space(w)? },
            ["uu", u] => Self::User { user: part("id", u)? },
            ["sv", i] => Self::AnyService { implementation: part("impl", i)? },
            ["sv", i, s] => Self::Service(Place::new(i, s)?),
            ["br", i, s] => Self::Bridge(Place::new(i, s)?),
            ["event", w] => Self::Events { workspace: declared(w)? },
            ["metric", w] => Self::Metrics { workspace: declared(w)? },
            ["tk", w, task, "msg"] => {
                let task = Uuid::try_parse(task).map_err(|_| invalid("no id of a task"))?;
                Self::TaskMessages { workspace: space(w)?, task }
            }
            ["pg" | "tk", _, ..] => {
                let message = format!("not authorized to send to topic {text}");
                return Err(Error::new(Kind::Denied, "ERR_PERMISSION_DENIED", message));
            }
            [prefix, ..] if PREFIXES.contains(&prefix) => {
                return Err(invalid(&format!("wrong number of segments for prefix {prefix}")));
            }
            _ => return Err(dotted(text).unwrap_or_else(|| invalid("invalid topic prefix"))),
        })
    }

    /// A service.
    pub(crate) fn service(service: &Unplaced) -> Self {
        let (implementation, specifier) = (service.implementation.clone(), service.specifier.clone());
        Self::Service(Place { implementation, specifier })
    }

    /// The workspace that the topic is in; those of users and their windows are in none.
    #[must_use]
    pub fn workspace(&self) -> Option<&str> {
        match self {
            Self::Agent(address) | Self::UniqueTask(address) | Self::Task(address) => Some(&address.workspace),
            Self::AnyTask { workspace, .. }
            | Self::AllAgents { workspace }
            | Self::AllUsers { workspace }
            | Self::UserIn { workspace, .. }
            | Self::TaskMessages { workspace, .. } => Some(workspace),
            Self::Events { workspace } | Self::Metrics { workspace } => workspace.as_deref(),
            Self::Window { .. } | Self::User { .. } | Self::Service(_) | Self::AnyService { .. } | Self::Bridge(_) => {
                None
            }
        }
    }

    /// The log's topic for it.
    ///
    /// # Errors
    /// None in practice: parsed targets are shorter than the log's limit.
    pub fn topic(&self) -> Result<Topic, Error> {
        let name = match self {
            Self::Agent(address) => format!("ag::{}", address.joined()),
            Self::UniqueTask(address) => format!("tu::{}", address.joined()),
            Self::Task(address) => format!("ta::{}", address.joined()),
            Self::AnyTask { workspace, implementation } => format!("tb::{workspace}::{implementation}"),
            Self::AllAgents { workspace } => format!("ga::{workspace}"),
            Self::AllUsers { workspace } => format!("gu::{workspace}"),
            Self::Window { user, window } => format!("us::{user}::{window}"),
            Self::UserIn { user, workspace } => format!("uw::{user}::{workspace}"),
            Self::User { user } => format!("uu::{user}"),
            Self::Service(place) => format!("sv::{place}"),
            Self::AnyService { implementation } => return Err(no_service(implementation)),
            Self::Bridge(place) => format!("br::{place}"),
            Self::Events { .. } => EVENTS.to_owned(),
            Self::Metrics { .. } => METRICS.to_owned(),
            Self::TaskMessages { workspace, task } => return task_messages(workspace, *task),
        };
        Ok(Topic::new(&name)?)
    }
}

impl Address {
    fn new(w: &str, implementation: &str, specifier: &str) -> Result<Self, Error> {
        Ok(Self {
            workspace: space(w)?,
            implementation: part("impl", implementation)?,
            specifier: part("specifier", specifier)?,
        })
    }

    fn joined(&self) -> String {
        [self.workspace.as_str(), &self.implementation, &self.specifier].join(SEPARATOR)
    }
}

impl Place {
    fn new(implementation: &str, specifier: &str) -> Result<Self, Error> {
        Ok(Self { implementation: part("impl", implementation)?, specifier: part("specifier", specifier)? })
    }
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}::{}", self.implementation, self.specifier)
    }
}

/// The error of [`Target::AnyService`] while there is none.
pub(crate) fn no_service(implementation: &str) -> Error {
    let message = format!("no healthy sv::{implementation} instances available");
    Error::new(Kind::Unavailable, "ERR_SV_UNAVAILABLE", message)
}

/// The topic of progress in a workspace.
///
/// # Errors
/// None in practice: checked names are shorter than the log's limit. So for the next.
pub(crate) fn progress_in(workspace: &str) -> Result<Topic, Error> {
    Ok(Topic::new(&format!("pg::{workspace}"))?)
}

/// The topic of progress for a user. No workspace is called `us`.
pub(crate) fn progress_for(user: &str) -> Result<Topic, Error> {
    Ok(Topic::new(&format!("pg::us::{user}"))?)
}

/// The topic of what happens to a task. Only the server writes to it.
///
/// # Errors
/// None in practice: a workspace's name and an id are shorter than a topic may be.
pub fn task_events(workspace: &str, task: Uuid) -> Result<Topic, Error> {
    Ok(Topic::new(&format!("tk::{workspace}::{task}::events"))?)
}

/// The topic of what is said about a task.
pub(crate) fn task_messages(workspace: &str, task: Uuid) -> Result<Topic, Error> {
    Ok(Topic::new(&format!("tk::{workspace}::{task}::msg"))?)
}

/// Whether records of this topic are what is said about a task.
#[must_use]
pub fn is_task_messages(topic: &Topic) -> bool {
    topic.as_str().starts_with("tk::") && topic.as_str().ends_with("::msg")
}

/// Whether records of this topic are events of a task.
#[must_use]
pub fn is_task_events(topic: &Topic) -> bool {
    topic.as_str().starts_with("tk::") && topic.as_str().ends_with("::events")
}

/// Whether records of this topic are progress and not messages.
#[must_use]
pub fn is_progress(topic: &Topic) -> bool {
    topic.as_str().starts_with("pg::")
}

/// The topic that is a principal's own; orchestrators have none.
///
/// # Errors
/// None in practice: checked identities are shorter than the log's limit.
pub fn own_lane(identity: &Identity) -> Result<Option<Topic>, Error> {
    let name = match identity {
        Identity::Orchestrator(_) => return Ok(None),
        Identity::WorkflowEngine => EVENTS.to_owned(),
        Identity::MetricsBridge => METRICS.to_owned(),
        other => other.to_string(),
    };
    Ok(Some(Topic::new(&name)?))
}

/// Where an identity's answers say how far it had heard.
const HEARD: &str = "hd";

/// The topic of how far an identity had heard when it answered. Only the server writes to it.
pub(crate) fn heard(identity: &Identity) -> Result<Topic, Error> {
    Ok(Topic::new(&format!("{HEARD}::{identity}"))?)
}

/// What becomes of sandboxes, for those who watch the list of them.
const ROLL: &str = "sandboxes";

/// `sandboxes`: each sandbox that comes, changes or goes.
pub(crate) fn sandboxes() -> Result<Topic, Error> {
    Ok(Topic::new(ROLL)?)
}

/// `sx::{id}::events`: what a sandbox tells.
pub(crate) fn sandbox_events(id: &str) -> Result<Topic, Error> {
    Ok(Topic::new(&format!("sx::{id}::events"))?)
}

/// `sx::{id}::commands`: what a sandbox is told.
pub(crate) fn sandbox_commands(id: &str) -> Result<Topic, Error> {
    Ok(Topic::new(&format!("sx::{id}::commands"))?)
}

/// `sk::{client}::events`: what is told to a client of the socket surface.
pub(crate) fn socket_events(client: &str) -> Result<Topic, Error> {
    Ok(Topic::new(&format!("sk::{client}::events"))?)
}

/// `sk::{teller}::told`: how far somebody is with what it tells clients of the socket surface.
pub(crate) fn socket_teller(teller: &str) -> Result<Topic, Error> {
    Ok(Topic::new(&format!("sk::{teller}::told"))?)
}

/// `cv::{id}::events`: what happens in a conversation.
pub(crate) fn conversation_events(id: Uuid) -> Result<Topic, Error> {
    Ok(Topic::new(&format!("cv::{id}::events"))?)
}

/// `cv::{id}::deltas`: what is being said in it, piece by piece.
pub(crate) fn conversation_deltas(id: Uuid) -> Result<Topic, Error> {
    Ok(Topic::new(&format!("cv::{id}{DELTAS}"))?)
}

/// Whether records of this topic are pieces of what is being said.
#[must_use]
pub(crate) fn is_conversation_deltas(topic: &Topic) -> bool {
    topic.as_str().ends_with(DELTAS)
}

/// What names of those end with.
const DELTAS: &str = "::deltas";

/// Topics of identities and broadcasts: kept for a day, by the published contract.
pub const CLASS_LANE: Class = Class(0);

/// Topics that are kept until somebody deletes them.
pub const CLASS_KEPT: Class = Class(1);

/// The retention class of a topic, by its name.
#[must_use]
pub fn class(name: &str) -> Class {
    let prefix = name.split(SEPARATOR).next().unwrap_or_default();
    match prefix {
        "ag" | "tu" | "ta" | "tb" | "ga" | "gu" | "us" | "uw" | "uu" | "pg" | "tk" | "event" | "metric" | "br"
        | "sv" | "sk" | HEARD | ROLL => CLASS_LANE,
        // What was said is in the conversation itself.
        "cv" if name.ends_with(DELTAS) => CLASS_LANE,
        _ => CLASS_KEPT,
    }
}

/// The workspace of an event or a metric: none if the sender's own is meant, by `*` or by naming the receiver.
fn declared(name: &str) -> Result<Option<String>, Error> {
    if matches!(name, "" | "*" | "receiver0") { Ok(None) } else { space(name).map(Some) }
}

fn space(name: &str) -> Result<String, Error> {
    workspace(name).map_err(|error| invalid(&error.message))
}

fn part(what: &str, value: &str) -> Result<String, Error> {
    identifier(what, value).map_err(|error| invalid(&error.message))
}

/// The published documentation has names with dots, which no published client sends.
pub(crate) fn dotted(text: &str) -> Option<Error> {
    let (prefix, rest) = text.split_once('.')?;
    let is_prefix = PREFIXES.contains(&prefix) && !rest.is_empty() && !text.contains(SEPARATOR);
    is_prefix.then(|| invalid(&format!("parts are separated by `::`: did you mean {}?", text.replace('.', SEPARATOR))))
}

/// How topics begin.
const PREFIXES: [&str; 13] = ["ag", "tu", "ta", "tb", "ga", "gu", "us", "uw", "uu", "sv", "br", "event", "metric"];

fn invalid(why: &str) -> Error {
    Error::new(Kind::Invalid, "ERR_INVALID_TOPIC", format!("invalid target topic: {why}"))
}

#[cfg(test)]
mod tests {
    use super::Target;

    #[test]
    fn targets_are_read_and_written_alike() {
        let lanes = [
            "ag::w::i::s",
            "tu::w::i::s",
            "ta::w::i::s",
            "tb::w::i",
            "ga::w",
            "gu::w",
            "us::u::w",
            "uw::u::w",
            "uu::u",
            "sv::i::s",
            "br::i::s",
            "event::receiver0",
            "metric::receiver0",
        ];
        for text in lanes {
            assert_eq!(Target::parse(text).unwrap().topic().unwrap().as_str(), text);
        }
        assert_eq!(Target::parse("event::w").unwrap().workspace(), Some("w"));
        assert_eq!(Target::parse("metric::*").unwrap().workspace(), None);
        assert_eq!(Target::parse("sv::i").unwrap().topic().unwrap_err().code, "ERR_SV_UNAVAILABLE");
    }

    #[test]
    fn what_is_no_topic_is_refused() {
        let long = format!("ag::w::i::{}", "x".repeat(247));
        for text in [
            "",
            "nonsense",
            "zz::w::i::s",
            "::w::i::s",
            "ag.w.i.s",
            "AG::w::i::s",
            "ag",
            "ag::w",
            "ag::w::i::s::x",
            "ag::w::::s",
            "uu::",
            "ag::us::i::s",
            "ga::*",
            "sv::*",
            "event::receiver1",
            &long,
        ] {
            assert_eq!(Target::parse(text).err().unwrap().code, "ERR_INVALID_TOPIC", "{text}");
        }
        let error = Target::parse("us.alice.tab-1").unwrap_err();
        assert_eq!(
            &*error.message,
            "invalid target topic: parts are separated by `::`: did you mean us::alice::tab-1?"
        );
        assert!(!Target::parse("nonsense.w").unwrap_err().message.contains("::"));
        for text in ["pg::w", "pg::us::u", "tk::w::t::events"] {
            assert_eq!(Target::parse(text).err().unwrap().code, "ERR_PERMISSION_DENIED", "{text}");
        }
    }

    proptest::proptest! {
        #[test]
        fn parsing_never_panics_and_round_trips(text in "(ag|tu|ta|tb|ga|gu|us|uw|uu)?(::[a-z:*é ]{0,4}){0,4}") {
            if let Ok(target) = Target::parse(&text) {
                let topic = target.topic().unwrap();
                proptest::prop_assert_eq!(topic.as_str(), text.as_str());
            }
        }
    }
}

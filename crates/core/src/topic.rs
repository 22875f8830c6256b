//! Names of topics: parsing what clients name as a target, and the only place that builds the log's topics.

use trunkline_store::log::{Class, Topic};

use crate::{
    error::{Error, Kind},
    identity::{Identity, SEPARATOR, identifier, workspace},
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
}

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
    /// `ERR_INVALID_TOPIC` if it is no topic, `ERR_NOT_IMPLEMENTED` for topics whose receivers this version does not
    /// serve.
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
            ["pg" | "tk" | "event" | "metric" | "br" | "sv", _, ..] => {
                let message = format!("sending to {} topics is not supported yet", parts[0]);
                return Err(Error::new(Kind::Unimplemented, "ERR_NOT_IMPLEMENTED", message));
            }
            ["ag" | "tu" | "ta" | "tb" | "ga" | "gu" | "us" | "uw" | "uu", ..] => {
                return Err(invalid(&format!("wrong number of segments for prefix {}", parts[0])));
            }
            _ => return Err(invalid("invalid topic prefix")),
        })
    }

    /// The workspace that the topic is in; those of users and their windows are in none.
    #[must_use]
    pub fn workspace(&self) -> Option<&str> {
        match self {
            Self::Agent(address) | Self::UniqueTask(address) | Self::Task(address) => Some(&address.workspace),
            Self::AnyTask { workspace, .. }
            | Self::AllAgents { workspace }
            | Self::AllUsers { workspace }
            | Self::UserIn { workspace, .. } => Some(workspace),
            Self::Window { .. } | Self::User { .. } => None,
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

/// The topic that is a principal's own; orchestrators have none.
///
/// # Errors
/// None in practice: checked identities are shorter than the log's limit.
pub fn own_lane(identity: &Identity) -> Result<Option<Topic>, Error> {
    let name = match identity {
        Identity::Orchestrator(_) => return Ok(None),
        Identity::WorkflowEngine => "event::receiver0".to_owned(),
        Identity::MetricsBridge => "metric::receiver0".to_owned(),
        other => other.to_string(),
    };
    Ok(Some(Topic::new(&name)?))
}

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
        | "sv" => CLASS_LANE,
        _ => CLASS_KEPT,
    }
}

fn space(name: &str) -> Result<String, Error> {
    workspace(name).map_err(|error| invalid(&error.message))
}

fn part(what: &str, value: &str) -> Result<String, Error> {
    identifier(what, value).map_err(|error| invalid(&error.message))
}

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
        ];
        for text in lanes {
            assert_eq!(Target::parse(text).unwrap().topic().unwrap().as_str(), text);
        }
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
            &long,
        ] {
            assert_eq!(Target::parse(text).err().unwrap().code, "ERR_INVALID_TOPIC", "{text}");
        }
        for text in ["sv::i::s", "event::w", "pg::w", "tk::w::t::events"] {
            assert_eq!(Target::parse(text).err().unwrap().code, "ERR_NOT_IMPLEMENTED", "{text}");
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

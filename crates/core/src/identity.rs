//! Names of principals: what they are made of, how they are written, which are allowed.
//!
//! | kind | canonical string | its own lane |
//! | --- | --- | --- |
//! | agent | `ag::{workspace}::{implementation}::{specifier}` | the same |
//! | unique task | `tu::{workspace}::{implementation}::{specifier}` | the same |
//! | task | `ta::{workspace}::{implementation}::{assigned id}` | the same, and a share of `tb::{workspace}::{implementation}` |
//! | user | `us::{user}::{window}` | the same |
//! | orchestrator | `orc::{implementation}::{specifier}` | none |
//! | workflow engine | `wfe::shard0` | `event::receiver0` |
//! | metrics bridge | `metrics::shard0` | `metric::receiver0` |
//! | bridge | `br::{implementation}::{specifier}` | the same |
//! | service | `sv::{implementation}::{specifier}` | the same |
//! | sandbox | `sx::{id}` | none; it has topics for its events and its commands |

use std::fmt;

use uuid::Uuid;

use crate::{
    error::{Error, Kind},
    limits::IDENTIFIER_BYTES_MAX,
};

/// What joins the parts of a name, and can therefore be in none of them.
pub const SEPARATOR: &str = "::";

/// Longest id of a sandbox, and one that is none, because it is a path of the surface.
const SANDBOX_ID_MAX: usize = 128;
const SANDBOX_RESERVED: &str = "stream";

/// Who a principal is. Built by the constructors, which check every part.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Identity {
    /// A long-running agent.
    Agent(Named),
    /// A task that exists once under its name.
    UniqueTask(Named),
    /// One of many interchangeable tasks; its specifier is the id that the server assigned.
    Task(Named),
    /// A person's browser window.
    User {
        /// The person.
        user: String,
        /// The window.
        window: String,
    },
    /// Starts agents and tasks on demand.
    Orchestrator(Unplaced),
    /// The one engine that events go to.
    WorkflowEngine,
    /// The one bridge that metrics go to.
    MetricsBridge,
    /// Connects another system.
    Bridge(Unplaced),
    /// Serves all workspaces.
    Service(Unplaced),
    /// A program that works somewhere else, and comes over HTTP.
    Sandbox(String),
}

/// Three parts, inside a workspace.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Named {
    /// The workspace.
    pub workspace: String,
    /// What program it is.
    pub implementation: String,
    /// Which one of that program.
    pub specifier: String,
}

/// Two parts, outside of any workspace.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Unplaced {
    /// What program it is.
    pub implementation: String,
    /// Which one of that program.
    pub specifier: String,
}

impl Identity {
    /// An agent.
    ///
    /// # Errors
    /// [`Kind::Invalid`] naming the part that is empty or not allowed; so do the other constructors.
    pub fn agent(workspace: &str, implementation: &str, specifier: &str) -> Result<Self, Error> {
        Named::new(workspace, implementation, specifier).map(Self::Agent)
    }

    /// A task that exists once under its name.
    ///
    /// # Errors
    /// As [`Identity::agent`].
    pub fn unique_task(workspace: &str, implementation: &str, specifier: &str) -> Result<Self, Error> {
        Named::new(workspace, implementation, specifier).map(Self::UniqueTask)
    }

    /// One of many interchangeable tasks, under an id that is made here.
    ///
    /// # Errors
    /// As [`Identity::agent`].
    pub fn task(workspace: &str, implementation: &str) -> Result<Self, Error> {
        Named::new(workspace, implementation, &Uuid::new_v4().to_string()).map(Self::Task)
    }

    /// A window of a user.
    ///
    /// # Errors
    /// As [`Identity::agent`].
    pub fn user(user: &str, window: &str) -> Result<Self, Error> {
        Ok(Self::User { user: identifier("id", user)?, window: identifier("specifier", window)? })
    }

    /// An orchestrator; an empty specifier is replaced by eight random hex digits.
    ///
    /// # Errors
    /// As [`Identity::agent`].
    pub fn orchestrator(implementation: &str, specifier: &str) -> Result<Self, Error> {
        let random = Uuid::new_v4().simple().to_string();
        let specifier = if specifier.is_empty() { &random[..8] } else { specifier };
        Unplaced::new(implementation, specifier).map(Self::Orchestrator)
    }

    /// A bridge.
    ///
    /// # Errors
    /// As [`Identity::agent`].
    pub fn bridge(implementation: &str, specifier: &str) -> Result<Self, Error> {
        Unplaced::new(implementation, specifier).map(Self::Bridge)
    }

    /// A service.
    ///
    /// # Errors
    /// As [`Identity::agent`].
    pub fn service(implementation: &str, specifier: &str) -> Result<Self, Error> {
        Unplaced::new(implementation, specifier).map(Self::Service)
    }

    /// A sandbox.
    ///
    /// # Errors
    /// [`Kind::Invalid`] if it is no id of one.
    pub fn sandbox(id: &str) -> Result<Self, Error> {
        let fits = |c: char| c.is_ascii_alphanumeric() || "._~-".contains(c);
        if id.is_empty() || id.len() > SANDBOX_ID_MAX || !id.chars().all(fits) || id == SANDBOX_RESERVED {
            return Err(invalid(format!(
                "{id:?} is no sandbox id: 1 to {SANDBOX_ID_MAX} of A-Z a-z 0-9 . _ ~ - and not {SANDBOX_RESERVED:?}"
            )));
        }
        Ok(Self::Sandbox(id.to_owned()))
    }

    /// The workspace that it belongs to; users choose theirs after connecting, the others have none.
    #[must_use]
    pub fn workspace(&self) -> Option<&str> {
        match self {
            Self::Agent(named) | Self::UniqueTask(named) | Self::Task(named) => Some(&named.workspace),
            _ => None,
        }
    }

    /// What kind it is.
    #[must_use]
    pub fn kind(&self) -> PrincipalKind {
        match self {
            Self::Agent(_) => PrincipalKind::Agent,
            Self::UniqueTask(_) | Self::Task(_) => PrincipalKind::Task,
            Self::User { .. } => PrincipalKind::User,
            Self::Orchestrator(_) => PrincipalKind::Orchestrator,
            Self::WorkflowEngine => PrincipalKind::WorkflowEngine,
            Self::MetricsBridge => PrincipalKind::MetricsBridge,
            Self::Bridge(_) => PrincipalKind::Bridge,
            Self::Service(_) => PrincipalKind::Service,
            Self::Sandbox(_) => PrincipalKind::Sandbox,
        }
    }

    /// Reads a canonical string.
    ///
    /// # Errors
    /// [`Kind::Invalid`] if it is none.
    pub fn parse(text: &str) -> Result<Self, Error> {
        let parts: Vec<&str> = text.split(SEPARATOR).collect();
        match parts[..] {
            ["ag", w, i, s] => Self::agent(w, i, s),
            ["tu", w, i, s] => Self::unique_task(w, i, s),
            ["ta", w, i, s] => Named::new(w, i, s).map(Self::Task),
            ["us", u, w] => Self::user(u, w),
            ["orc", i, s] if !s.is_empty() => Self::orchestrator(i, s),
            ["wfe", _] => Ok(Self::WorkflowEngine),
            ["metrics", _] => Ok(Self::MetricsBridge),
            ["br", i, s] => Self::bridge(i, s),
            ["sv", i, s] => Self::service(i, s),
            ["sx", id] => Self::sandbox(id),
            _ => Err(invalid(format!("{text:?} is no identity"))),
        }
    }

    /// What program it is; users and the singletons are none.
    #[must_use]
    pub fn implementation(&self) -> Option<&str> {
        match self {
            Self::Agent(named) | Self::UniqueTask(named) | Self::Task(named) => Some(&named.implementation),
            Self::Orchestrator(unplaced) | Self::Bridge(unplaced) | Self::Service(unplaced) => {
                Some(&unplaced.implementation)
            }
            Self::User { .. } | Self::WorkflowEngine | Self::MetricsBridge | Self::Sandbox(_) => None,
        }
    }

    /// Which one of its program.
    #[must_use]
    pub fn specifier(&self) -> &str {
        let text = match self {
            Self::Agent(named) | Self::UniqueTask(named) | Self::Task(named) => &named.specifier,
            Self::Orchestrator(unplaced) | Self::Bridge(unplaced) | Self::Service(unplaced) => &unplaced.specifier,
            Self::User { window, .. } => window,
            Self::Sandbox(id) => id,
            Self::WorkflowEngine | Self::MetricsBridge => "shard0",
        };
        debug_assert!(!text.contains(SEPARATOR), "parts of names were checked");
        text
    }
}

/// The kinds of principals.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum PrincipalKind {
    /// Long-running agents.
    Agent,
    /// Tasks, unique or not.
    Task,
    /// People.
    User,
    /// Services.
    Service,
    /// Bridges to other systems.
    Bridge,
    /// Orchestrators.
    Orchestrator,
    /// The workflow engine.
    WorkflowEngine,
    /// The metrics bridge.
    MetricsBridge,
    /// Sandboxes.
    Sandbox,
}

impl PrincipalKind {
    /// All of them, each with its published name and its word in rules.
    const WORDS: [(Self, &'static str, &'static str); 9] = [
        (Self::Agent, "Agent", "agent"),
        (Self::Task, "Task", "task"),
        (Self::User, "User", "user"),
        (Self::Service, "Service", "service"),
        (Self::Bridge, "Bridge", "bridge"),
        (Self::Orchestrator, "Orchestrator", "orchestrator"),
        (Self::WorkflowEngine, "WorkflowEngine", "workflow_engine"),
        (Self::MetricsBridge, "MetricsBridge", "metrics_bridge"),
        (Self::Sandbox, "Sandbox", "sandbox"),
    ];

    /// All kinds.
    pub fn all() -> impl Iterator<Item = Self> {
        Self::WORDS.iter().map(|(kind, ..)| *kind)
    }

    /// Its word in rules.
    #[must_use]
    pub fn rule_word(self) -> &'static str {
        self.words().1
    }

    fn words(self) -> (&'static str, &'static str) {
        let found = Self::WORDS.iter().find(|(kind, ..)| *kind == self);
        found.map_or(("", ""), |(_, name, word)| (name, word))
    }

    /// The kind of a published name or of a word in rules, in any case; tasks also by how unique they are.
    #[must_use]
    pub fn parse(text: &str) -> Option<Self> {
        let text = text.to_ascii_lowercase();
        if matches!(text.as_str(), "unique_task" | "non_unique_task") {
            return Some(Self::Task);
        }
        let is_it = |name: &str, word: &str| name.to_ascii_lowercase() == text || word == text;
        Self::WORDS.iter().find(|(_, name, word)| is_it(name, word)).map(|(kind, ..)| *kind)
    }
}

impl fmt::Display for PrincipalKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.words().0)
    }
}

impl fmt::Display for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Agent(named) => write!(f, "ag::{named}"),
            Self::UniqueTask(named) => write!(f, "tu::{named}"),
            Self::Task(named) => write!(f, "ta::{named}"),
            Self::User { user, window } => write!(f, "us::{user}::{window}"),
            Self::Orchestrator(unplaced) => write!(f, "orc::{unplaced}"),
            Self::WorkflowEngine => f.write_str("wfe::shard0"),
            Self::MetricsBridge => f.write_str("metrics::shard0"),
            Self::Bridge(unplaced) => write!(f, "br::{unplaced}"),
            Self::Service(unplaced) => write!(f, "sv::{unplaced}"),
            Self::Sandbox(id) => write!(f, "sx::{id}"),
        }
    }
}

impl Named {
    fn new(workspace: &str, implementation: &str, specifier: &str) -> Result<Self, Error> {
        Ok(Self {
            workspace: self::workspace(workspace)?,
            implementation: identifier("impl", implementation)?,
            specifier: identifier("specifier", specifier)?,
        })
    }
}

impl fmt::Display for Named {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}::{}::{}", self.workspace, self.implementation, self.specifier)
    }
}

impl Unplaced {
    fn new(implementation: &str, specifier: &str) -> Result<Self, Error> {
        Ok(Self { implementation: identifier("impl", implementation)?, specifier: identifier("specifier", specifier)? })
    }
}

impl fmt::Display for Unplaced {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}::{}", self.implementation, self.specifier)
    }
}

/// A workspace's name: an identifier that is none of the words which topics use in a workspace's place.
///
/// # Errors
/// As [`identifier`], and for a reserved word.
pub fn workspace(name: &str) -> Result<String, Error> {
    let name = identifier("workspace", name)?;
    // `pg::us::…` is a user's progress, `event::receiver0` the engine's lane.
    if name == "us" || name.starts_with("receiver") {
        return Err(invalid(format!("invalid workspace {name:?}: reserved")));
    }
    Ok(name)
}

/// Whether a credential that is bound to `binding` is good for an identity: the identity itself or, if it ends in `*`, those
/// that begin with what is before that, which names their kind at least. Everything else in it means itself: `?` and
/// brackets are in names, too, and a server's certificate for `*.example.com` is nobody's.
#[must_use]
pub fn is_bound_to(binding: &str, identity: &Identity) -> bool {
    let identity = identity.to_string();
    match binding.strip_suffix('*') {
        Some(begin) => begin.contains(SEPARATOR) && identity.starts_with(begin),
        None => identity == binding,
    }
}

/// Checks one part of a name: 1 to 128 bytes without the separator, a colon at either end, wildcards, spaces or control
/// characters. A colon at an end would let two different names read the same once they are joined.
///
/// # Errors
/// [`Kind::Invalid`] with the published text.
pub fn identifier(what: &str, value: &str) -> Result<String, Error> {
    let length = value.len();
    if value.is_empty() {
        return Err(invalid(format!("invalid {what}: must not be empty")));
    }
    if length > IDENTIFIER_BYTES_MAX {
        return Err(invalid(format!("invalid {what}: length {length} exceeds maximum {IDENTIFIER_BYTES_MAX}")));
    }
    let problem = if value.contains(SEPARATOR) {
        "contains reserved separator \"::\"".to_owned()
    } else if value.starts_with(':') || value.ends_with(':') {
        "starts or ends with ':'".to_owned()
    } else if let Some(bad) = value.bytes().find(|byte| matches!(byte, b'*' | b'>' | 0..=b' ' | 0x7f)) {
        match bad {
            b'*' | b'>' => format!("contains forbidden character '{}' (NATS wildcard)", bad as char),
            b' ' => "contains whitespace".to_owned(),
            0x7f => "contains DEL control character (0x7F)".to_owned(),
            control => format!("contains control character 0x{control:02X}"),
        }
    } else {
        return Ok(value.to_owned());
    };
    Err(invalid(format!("invalid {what} {value:?}: {problem}")))
}

fn invalid(message: String) -> Error {
    Error::new(Kind::Invalid, "ERR_INVALID_IDENTIFIER", message)
}

#[cfg(test)]
mod tests {
    use super::{Identity, PrincipalKind, identifier, is_bound_to, workspace};

    fn check(value: &str, expected: &str) {
        assert_eq!(identifier("impl", value).err().unwrap().message, expected);
    }

    #[test]
    fn bad_identifiers_are_named_with_the_reason() {
        check("", "invalid impl: must not be empty");
        check(&"x".repeat(129), "invalid impl: length 129 exceeds maximum 128");
        check("a::b", "invalid impl \"a::b\": contains reserved separator \"::\"");
        check("a:", "invalid impl \"a:\": starts or ends with ':'");
        check(":a", "invalid impl \":a\": starts or ends with ':'");
        check("a*", "invalid impl \"a*\": contains forbidden character '*' (NATS wildcard)");
        check("a>b", "invalid impl \"a>b\": contains forbidden character '>' (NATS wildcard)");
        check("a b", "invalid impl \"a b\": contains whitespace");
        check("a\tb", "invalid impl \"a\\tb\": contains control character 0x09");
        check("a\u{7f}", "invalid impl \"a\\u{7f}\": contains DEL control character (0x7F)");
    }

    #[test]
    fn ordinary_identifiers_pass() {
        for value in ["a", "com.example.chat-agent", "alice@example.com", "a/b?[c]", "é😀", "a:b", &"x".repeat(128)]
        {
            assert_eq!(identifier("id", value).unwrap(), value);
        }
    }

    #[test]
    fn bindings_are_names_or_how_names_begin() {
        let check = |binding: &str, specifier: &str, fits: bool| {
            let identity = Identity::agent("w", "i", specifier).unwrap();
            assert_eq!(is_bound_to(binding, &identity), fits, "{binding} {identity}");
        };
        for (binding, specifier) in
            [("ag::w::i::s", "s"), ("ag::w::i::*", "s"), ("ag::w*", "s"), ("ag::*", "s"), ("ag::w::i::a?[b]", "a?[b]")]
        {
            check(binding, specifier, true);
        }
        for (binding, specifier) in [
            ("ag::w::i::s", "t"),
            ("ag::w::i::?", "s"),
            ("ag::w::i::[s]", "s"),
            ("ag::*::i::s", "s"),
            ("ag::w::i::a?", "ab"),
            ("*", "s"),
            ("ag*", "s"),
            ("*.example.com", "a.example.com"),
            ("*::*", "s"),
            ("", "s"),
        ] {
            check(binding, specifier, false);
        }
    }

    #[test]
    fn words_that_topics_need_are_no_workspaces() {
        for reserved in ["us", "receiver", "receiver0"] {
            assert!(workspace(reserved).is_err());
        }
        assert!(workspace("users").is_ok());
    }

    #[test]
    fn identities_are_written_canonically() {
        let write = |identity: Result<Identity, super::Error>| identity.unwrap().to_string();
        assert_eq!(write(Identity::agent("w", "i", "s")), "ag::w::i::s");
        assert_eq!(write(Identity::unique_task("w", "i", "s")), "tu::w::i::s");
        assert_eq!(write(Identity::user("u", "w")), "us::u::w");
        assert_eq!(write(Identity::bridge("i", "s")), "br::i::s");
        assert!(write(Identity::task("w", "i")).starts_with("ta::w::i::"));
        assert_ne!(Identity::task("w", "i").unwrap(), Identity::task("w", "i").unwrap());
        assert_ne!(Identity::orchestrator("i", "").unwrap(), Identity::orchestrator("i", "").unwrap());
        assert!(Identity::agent("", "i", "s").is_err());
        for text in ["ag::w::i::s", "tu::w::i::s", "ta::w::i::s", "us::u::w", "orc::i::s", "br::i::s", "sv::i::s"] {
            assert_eq!(write(Identity::parse(text)), text);
        }
        assert_eq!(Identity::parse("wfe::x").unwrap(), Identity::WorkflowEngine);
        for text in ["", "ag", "ag::w::i", "ag::w::i::", "orc::i::", "xx::a::b", "ga::w"] {
            assert!(Identity::parse(text).is_err(), "{text}");
        }
    }

    #[test]
    fn kinds_are_read_in_any_spelling() {
        for text in ["WorkflowEngine", "workflow_engine", "workflowengine"] {
            assert_eq!(PrincipalKind::parse(text), Some(PrincipalKind::WorkflowEngine));
        }
        assert_eq!(PrincipalKind::parse("unique_task"), Some(PrincipalKind::Task));
        assert_eq!(PrincipalKind::parse("robot"), None);
        assert_eq!(PrincipalKind::MetricsBridge.to_string(), "MetricsBridge");
    }
}

//! Names: who somebody is, and where something can be sent. None can be built that the server would not take.

use std::{fmt, str::FromStr, sync::Arc};

use crate::error::{Error, Result};

/// Between the parts of a name.
pub const SEPARATOR: &str = "::";

/// Longest part of a name, in bytes. The published figure.
const PART_BYTES_MAX: usize = 128;

/// Longest topic, in bytes. The published figure.
const TOPIC_BYTES_MAX: usize = 256;

/// A place that something can be sent to, or a principal's own.
///
/// ```
/// use trunkline_client::Topic;
/// let topic = Topic::agent("prod", "support", "main")?;
/// assert_eq!(topic.as_str(), "ag::prod::support::main");
/// assert_eq!("ag::prod::support::main".parse::<Topic>()?, topic);
/// // The form of old texts is read, never written.
/// assert_eq!("ag.prod.support.main".parse::<Topic>()?, topic);
/// assert_eq!(topic.workspace(), Some("prod"));
/// # Ok::<(), trunkline_client::Error>(())
/// ```
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Topic(Arc<str>);

/// What kind of place a topic is: its prefix.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum TopicKind {
    /// `ag`: one agent.
    Agent,
    /// `tu`: one unique task.
    UniqueTask,
    /// `ta`: one task, by the id that the server gave it.
    Task,
    /// `tb`: any one task of an implementation.
    AnyTask,
    /// `us`: one window of a user.
    Window,
    /// `uw`: a user's windows on a workspace.
    UserIn,
    /// `uu`: all windows of a user.
    User,
    /// `ga`: all agents of a workspace.
    Agents,
    /// `gu`: all users that are on a workspace.
    Users,
    /// `sv`: one service, or any one of an implementation.
    Service,
    /// `br`: one bridge.
    Bridge,
    /// `event`: the workflow engine.
    Events,
    /// `metric`: the metrics bridge.
    Metrics,
    /// `pg`: the progress of a workspace. Only the server sends there.
    Progress,
    /// `orc`: an orchestrator. Nothing can be sent there.
    Orchestrator,
    /// `wfe`: the workflow engine's identity. Events go to [`TopicKind::Events`].
    WorkflowEngine,
    /// `metrics`: the metrics bridge's identity. Metrics go to [`TopicKind::Metrics`].
    MetricsBridge,
    /// `tk`: what is said of a task.
    TaskMessages,
    /// `cv`: a conversation's own.
    Conversation,
}

use TopicKind as K;

/// Prefix, kind, and how many parts may follow.
const FORMS: [(&str, TopicKind, &[usize]); 19] = [
    ("ag", K::Agent, &[3]),
    ("tu", K::UniqueTask, &[3]),
    ("ta", K::Task, &[3]),
    ("tb", K::AnyTask, &[2]),
    ("us", K::Window, &[2]),
    ("uw", K::UserIn, &[2]),
    ("uu", K::User, &[1]),
    ("ga", K::Agents, &[1]),
    ("gu", K::Users, &[1]),
    ("sv", K::Service, &[1, 2]),
    ("br", K::Bridge, &[2]),
    ("event", K::Events, &[1]),
    ("metric", K::Metrics, &[1]),
    ("pg", K::Progress, &[1]),
    ("orc", K::Orchestrator, &[2]),
    ("wfe", K::WorkflowEngine, &[1]),
    ("metrics", K::MetricsBridge, &[1]),
    ("tk", K::TaskMessages, &[3]),
    ("cv", K::Conversation, &[2]),
];

impl Topic {
    /// `ag::{workspace}::{implementation}::{specifier}`: one agent.
    ///
    /// # Errors
    /// This and all others here: [`Kind::Invalid`](crate::Kind::Invalid) if a part is empty, longer than 128 bytes, or has a
    /// separator, a colon at an end, a wildcard, a space or a control character in it.
    pub fn agent(workspace: &str, implementation: &str, specifier: &str) -> Result<Self> {
        Self::of("ag", &[workspace, implementation, specifier])
    }

    /// `tu::{workspace}::{implementation}::{specifier}`: one unique task; without a specifier any one of the implementation.
    ///
    /// # Errors
    /// As [`Topic::agent`].
    pub fn task(workspace: &str, implementation: &str, specifier: &str) -> Result<Self> {
        if specifier.is_empty() {
            return Self::any_task(workspace, implementation);
        }
        Self::of("tu", &[workspace, implementation, specifier])
    }

    /// `ta::{workspace}::{implementation}::{id}`: one worker, by the id that the server gave it.
    ///
    /// # Errors
    /// As [`Topic::agent`].
    pub fn worker(workspace: &str, implementation: &str, id: &str) -> Result<Self> {
        Self::of("ta", &[workspace, implementation, id])
    }

    /// `tb::{workspace}::{implementation}`: any one worker of an implementation.
    ///
    /// # Errors
    /// As [`Topic::agent`].
    pub fn any_task(workspace: &str, implementation: &str) -> Result<Self> {
        Self::of("tb", &[workspace, implementation])
    }

    /// `us::{user}::{window}`: one window of a user.
    ///
    /// # Errors
    /// As [`Topic::agent`].
    pub fn window(user: &str, window: &str) -> Result<Self> {
        Self::of("us", &[user, window])
    }

    /// `uw::{user}::{workspace}`: a user's windows that are on a workspace.
    ///
    /// # Errors
    /// As [`Topic::agent`].
    pub fn user_in(user: &str, workspace: &str) -> Result<Self> {
        Self::of("uw", &[user, workspace])
    }

    /// `uu::{user}`: all windows of a user.
    ///
    /// # Errors
    /// As [`Topic::agent`].
    pub fn user(user: &str) -> Result<Self> {
        Self::of("uu", &[user])
    }

    /// `ga::{workspace}`: all agents of a workspace.
    ///
    /// # Errors
    /// As [`Topic::agent`].
    pub fn agents(workspace: &str) -> Result<Self> {
        Self::of("ga", &[workspace])
    }

    /// `gu::{workspace}`: all users that are on a workspace.
    ///
    /// # Errors
    /// As [`Topic::agent`].
    pub fn users(workspace: &str) -> Result<Self> {
        Self::of("gu", &[workspace])
    }

    /// `sv::{implementation}::{specifier}`: one service.
    ///
    /// # Errors
    /// As [`Topic::agent`].
    pub fn service(implementation: &str, specifier: &str) -> Result<Self> {
        Self::of("sv", &[implementation, specifier])
    }

    /// `sv::{implementation}`: any one of the services of an implementation that are connected.
    ///
    /// # Errors
    /// As [`Topic::agent`].
    pub fn any_service(implementation: &str) -> Result<Self> {
        Self::of("sv", &[implementation])
    }

    /// `br::{implementation}::{specifier}`: one bridge.
    ///
    /// # Errors
    /// As [`Topic::agent`].
    pub fn bridge(implementation: &str, specifier: &str) -> Result<Self> {
        Self::of("br", &[implementation, specifier])
    }

    /// `event::*`: the workflow engine, for the sender's own workspace.
    #[must_use]
    pub fn events() -> Self {
        Self(Arc::from("event::*"))
    }

    /// `event::{workspace}`: the workflow engine, for a workspace.
    ///
    /// # Errors
    /// As [`Topic::agent`].
    pub fn events_of(workspace: &str) -> Result<Self> {
        Self::of("event", &[workspace])
    }

    /// `metric::*`: the metrics bridge, for the sender's own workspace.
    #[must_use]
    pub fn metrics() -> Self {
        Self(Arc::from("metric::*"))
    }

    /// `metric::{workspace}`: the metrics bridge, for a workspace.
    ///
    /// # Errors
    /// As [`Topic::agent`].
    pub fn metrics_of(workspace: &str) -> Result<Self> {
        Self::of("metric", &[workspace])
    }

    /// `pg::{workspace}`: a workspace's progress, which only the server sends to.
    ///
    /// # Errors
    /// As [`Topic::agent`].
    pub fn progress(workspace: &str) -> Result<Self> {
        Self::of("pg", &[workspace])
    }

    fn of(prefix: &str, parts: &[&str]) -> Result<Self> {
        for part in parts {
            check(part)?;
        }
        let mut name = prefix.to_owned();
        for part in parts {
            name.push_str(SEPARATOR);
            name.push_str(part);
        }
        if name.len() > TOPIC_BYTES_MAX {
            return Err(Error::invalid(format!("topic {name:?} is longer than {TOPIC_BYTES_MAX} bytes")));
        }
        Ok(Self(name.into()))
    }

    /// As it goes over the wire.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// What kind of place it is.
    #[must_use]
    pub fn kind(&self) -> TopicKind {
        let prefix = self.0.split(SEPARATOR).next().unwrap_or_default();
        // Nothing else can be built.
        FORMS.iter().find(|(known, ..)| *known == prefix).map_or(TopicKind::Agent, |(_, kind, _)| *kind)
    }

    /// What follows the prefix.
    pub fn parts(&self) -> impl Iterator<Item = &str> {
        self.0.split(SEPARATOR).skip(1)
    }

    /// The workspace that it is in; windows, users, services and bridges are in none.
    #[must_use]
    pub fn workspace(&self) -> Option<&str> {
        let mut parts = self.parts();
        match self.kind() {
            K::Agent | K::UniqueTask | K::Task | K::AnyTask | K::Agents | K::Users | K::Progress | K::TaskMessages => {
                parts.next()
            }
            K::UserIn => parts.nth(1),
            K::Events | K::Metrics => parts.next().filter(|name| *name != "*"),
            _ => None,
        }
    }
}

impl FromStr for Topic {
    type Err = Error;

    /// Reads `ag::prod::support::main`, and `ag.prod.support.main` if no part has a dot in it.
    fn from_str(text: &str) -> Result<Self> {
        let Some((prefix, rest)) = text.split_once(SEPARATOR) else { return from_dotted(text) };
        let parts: Vec<&str> = rest.split(SEPARATOR).collect();
        let unknown = || Error::invalid(format!("{text:?} is no topic: its prefix is not known"));
        let (_, kind, counts) = FORMS.iter().find(|(known, ..)| *known == prefix).ok_or_else(unknown)?;
        if !counts.contains(&parts.len()) {
            return Err(Error::invalid(format!("{text:?} is no topic: {prefix} takes {counts:?} parts")));
        }
        if matches!(kind, K::Events | K::Metrics) && parts == ["*"] {
            return Ok(Self(text.into()));
        }
        Self::of(prefix, &parts)
    }
}

/// The form of old texts. One with dots inside of its parts cannot be told apart, and is refused.
fn from_dotted(text: &str) -> Result<Topic> {
    let refused = || Error::invalid(format!("{text:?} is no topic, such as ag::prod::support::main"));
    let (prefix, rest) = text.split_once('.').ok_or_else(refused)?;
    let parts: Vec<&str> = rest.split('.').collect();
    let known = FORMS.iter().any(|(known, _, counts)| *known == prefix && counts.contains(&parts.len()));
    if !known {
        return Err(refused());
    }
    [prefix].into_iter().chain(parts).collect::<Vec<_>>().join(SEPARATOR).parse()
}

impl fmt::Display for Topic {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Debug for Topic {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}", &*self.0)
    }
}

impl AsRef<str> for Topic {
    fn as_ref(&self) -> &str {
        &self.0
    }
}

impl TryFrom<&str> for Topic {
    type Error = Error;

    fn try_from(text: &str) -> Result<Self> {
        text.parse()
    }
}

impl From<&Topic> for Topic {
    fn from(topic: &Topic) -> Self {
        topic.clone()
    }
}

impl PartialEq<str> for Topic {
    fn eq(&self, other: &str) -> bool {
        &*self.0 == other
    }
}

impl PartialEq<&str> for Topic {
    fn eq(&self, other: &&str) -> bool {
        &*self.0 == *other
    }
}

/// Checks one part of a name, by the server's rule.
pub(crate) fn check(part: &str) -> Result<()> {
    let refuse = |why: &str| Err(Error::invalid(format!("{part:?} cannot be part of a name: {why}")));
    if part.is_empty() {
        return refuse("it is empty");
    }
    if part.len() > PART_BYTES_MAX {
        return refuse("it is longer than 128 bytes");
    }
    if part.contains(SEPARATOR) || part.starts_with(':') || part.ends_with(':') {
        return refuse("it has a separator in it, or a colon at an end");
    }
    if part.bytes().any(|byte| matches!(byte, b'*' | b'>' | 0..=b' ' | 0x7f)) {
        return refuse("it has a wildcard, a space or a control character in it");
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn each_kind_has_its_form() {
        let cases: [(Result<Topic>, &str, TopicKind, Option<&str>); 19] = [
            (Topic::agent("w", "i", "s"), "ag::w::i::s", K::Agent, Some("w")),
            (Topic::task("w", "i", "s"), "tu::w::i::s", K::UniqueTask, Some("w")),
            (Topic::task("w", "i", ""), "tb::w::i", K::AnyTask, Some("w")),
            (Topic::worker("w", "i", "1"), "ta::w::i::1", K::Task, Some("w")),
            (Topic::any_task("w", "i"), "tb::w::i", K::AnyTask, Some("w")),
            (Topic::window("u", "1"), "us::u::1", K::Window, None),
            (Topic::user_in("u", "w"), "uw::u::w", K::UserIn, Some("w")),
            (Topic::user("u"), "uu::u", K::User, None),
            (Topic::agents("w"), "ga::w", K::Agents, Some("w")),
            (Topic::users("w"), "gu::w", K::Users, Some("w")),
            (Topic::service("i", "s"), "sv::i::s", K::Service, None),
            (Topic::any_service("i"), "sv::i", K::Service, None),
            (Topic::bridge("i", "s"), "br::i::s", K::Bridge, None),
            (Ok(Topic::events()), "event::*", K::Events, None),
            (Topic::events_of("w"), "event::w", K::Events, Some("w")),
            (Ok(Topic::metrics()), "metric::*", K::Metrics, None),
            (Topic::metrics_of("w"), "metric::w", K::Metrics, Some("w")),
            (Topic::progress("w"), "pg::w", K::Progress, Some("w")),
            ("wfe::shard0".parse(), "wfe::shard0", K::WorkflowEngine, None),
        ];
        for (topic, text, kind, workspace) in cases {
            let topic = topic.unwrap();
            assert_eq!((topic.as_str(), topic.kind(), topic.workspace()), (text, kind, workspace));
            assert_eq!(text.parse::<Topic>().unwrap(), topic);
        }
    }

    #[test]
    fn what_the_server_would_refuse_cannot_be_built() {
        for part in ["", "a::b", ":a", "a:", "a b", "a*", ">", "\u{7f}", "\n", &"x".repeat(129)] {
            assert!(Topic::agent("w", "i", part).is_err(), "{part:?}");
        }
        for text in ["", "ag", "ag::w::i", "ag::w::i::s::x", "xx::w", "ag::w::i::", "ga::*", "event::", "no topic"] {
            assert!(text.parse::<Topic>().is_err(), "{text:?}");
        }
    }

    proptest! {
        #[test]
        fn both_forms_are_read_as_what_they_are(parts in prop::collection::vec("[a-zA-Z0-9_-]{1,12}", 3)) {
            let topic = Topic::agent(&parts[0], &parts[1], &parts[2]).unwrap();
            prop_assert!(topic.as_str().parse::<Topic>().unwrap() == topic);
            prop_assert_eq!(topic.as_str().replace("::", ".").parse::<Topic>().unwrap(), topic);
        }

        #[test]
        fn anything_is_read_or_refused(text in ".{0,60}") {
            if let Ok(topic) = text.parse::<Topic>() {
                prop_assert_eq!(topic.as_str().parse::<Topic>().unwrap(), topic);
            }
        }
    }
}

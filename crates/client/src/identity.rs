//! Who a client is.

use std::fmt;

use trunkline_proto::v1::{PrincipalRef, init_connection::ClientType};

use crate::{
    connection::Client,
    error::Result,
    topic::{SEPARATOR, Topic, check},
};

/// A principal's typed client. Closed: there are as many as the contract has.
pub trait Principal: Clone + Send + Sync + Sized + sealed::Sealed + 'static {
    /// Wraps the connection.
    #[doc(hidden)]
    fn from_client(client: Client) -> Self;
}

pub(crate) mod sealed {
    pub trait Sealed {}
}

/// Who a client is, as the server writes it: `ag::prod::support::main`. Of a worker it has the id that the server gave it.
#[derive(Clone, PartialEq, Eq, Hash)]
pub struct Identity {
    name: String,
}

impl Identity {
    /// Reads a client's claim, and checks it.
    pub(crate) fn of(who: &ClientType) -> Result<Self> {
        let (prefix, parts): (&str, Vec<&str>) = match who {
            ClientType::Agent(it) => ("ag", vec![&it.workspace, &it.implementation, &it.specifier]),
            ClientType::Task(it) if it.unique_specifier.is_empty() => ("ta", vec![&it.workspace, &it.implementation]),
            ClientType::Task(it) => ("tu", vec![&it.workspace, &it.implementation, &it.unique_specifier]),
            ClientType::User(it) => ("us", vec![&it.user_id, &it.window_id]),
            ClientType::Orchestrator(it) => ("orc", vec![&it.implementation, &it.specifier]),
            ClientType::WorkflowEngine(_) => ("wfe", vec!["shard0"]),
            ClientType::MetricsBridge(_) => ("metrics", vec!["shard0"]),
            ClientType::Bridge(it) => ("br", vec![&it.implementation, &it.specifier]),
            ClientType::Service(it) => ("sv", vec![&it.implementation, &it.specifier]),
        };
        for part in &parts {
            check(part)?;
        }
        Ok(Self { name: [prefix].into_iter().chain(parts).collect::<Vec<_>>().join(SEPARATOR) })
    }

    /// With the id that the server gave.
    pub(crate) fn assigned(&self, id: &str) -> Self {
        if !self.name.starts_with("ta::") || id.is_empty() {
            return self.clone();
        }
        let mut parts: Vec<&str> = self.name.split(SEPARATOR).take(3).collect();
        parts.push(id);
        Self { name: parts.join(SEPARATOR) }
    }

    /// As the server writes it.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.name
    }

    /// Where others reach it, if they can.
    #[must_use]
    pub fn topic(&self) -> Option<Topic> {
        let topic: Topic = self.name.parse().ok()?;
        let prefix = self.name.split(SEPARATOR).next()?;
        (!matches!(prefix, "orc" | "wfe" | "metrics")).then_some(topic)
    }

    /// As rules and grants name it. Of a user it is the user, whatever the window.
    #[must_use]
    pub fn principal(&self) -> PrincipalRef {
        let mut parts = self.name.split(SEPARATOR);
        let (kind, id) = match parts.next() {
            Some("ag") => ("agent", self.as_str()),
            Some("us") => ("user", parts.next().unwrap_or_default()),
            Some("orc") => ("orchestrator", self.as_str()),
            Some("wfe") => ("workflow_engine", self.as_str()),
            Some("metrics") => ("metrics_bridge", self.as_str()),
            Some("br") => ("bridge", self.as_str()),
            Some("sv") => ("service", self.as_str()),
            _ => ("task", self.as_str()),
        };
        PrincipalRef { principal_type: kind.to_owned(), principal_id: id.to_owned() }
    }

    /// The workspace that it lives in; users, services, bridges and the platform's own live in none.
    #[must_use]
    pub fn workspace(&self) -> Option<&str> {
        let mut parts = self.name.split(SEPARATOR);
        matches!(parts.next(), Some("ag" | "tu" | "ta")).then(|| parts.next()).flatten()
    }
}

impl fmt::Display for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.name)
    }
}

impl fmt::Debug for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}", self.name)
    }
}

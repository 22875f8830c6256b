#![doc = include_str!("../docs/lib.md")]

pub mod admin;
pub mod authority;
mod connection;
pub mod coord;
mod credentials;
mod error;
mod handler;
pub mod http;
mod identity;
pub mod kv;
mod message;
pub mod operator;
mod options;
pub mod orchestrate;
mod principal;
mod reconnect;
mod routes;
pub mod task;
mod topic;
pub mod tunnel;
pub mod workflow;

pub use admin::AccessLevel;
pub use connection::{Client, Notice, Signal, State, Welcome, lane::Received};
pub use credentials::{Credentials, Tls};
pub use error::{Error, Kind, Result};
pub use identity::{Identity, Principal};
pub use message::{Message, MessageType, MetricBuilder, Outgoing};
pub use operator::Operator;
pub use options::Builder;
pub use principal::{Agent, Bridge, MetricsBridge, Orchestrator, Service, UniqueTask, User, Worker, WorkflowEngine};
pub use reconnect::{DuplicateRetry, Reconnect};
pub use topic::{SEPARATOR, Topic, TopicKind};
/// The contract's own types, for what is passed on as it is.
pub use trunkline_proto::v1 as proto;

/// The reply that a request takes, or the defect that it is another one.
macro_rules! reply {
    ($down:expr, $variant:path) => {
        match $down {
            $variant(reply) => Ok(reply),
            _ => Err($crate::Error::new($crate::Kind::Internal, "the server answered with something else")),
        }
    };
}
pub(crate) use reply;

//! Between the contract's messages and core's plain data.

use trunkline_core::{Error, Kind, identity::Identity, message::Envelope};
use trunkline_proto::v1::{IncomingMessage, InitConnection, init_connection::ClientType};

/// Who the client says it is.
pub(super) fn identity(init: &InitConnection) -> Result<Identity, Error> {
    match &init.client_type {
        Some(ClientType::Agent(a)) => Identity::agent(&a.workspace, &a.implementation, &a.specifier),
        Some(ClientType::Task(t)) if t.unique_specifier.is_empty() => Identity::task(&t.workspace, &t.implementation),
        Some(ClientType::Task(t)) => Identity::unique_task(&t.workspace, &t.implementation, &t.unique_specifier),
        Some(ClientType::User(u)) => Identity::user(&u.user_id, &u.window_id),
        Some(ClientType::Orchestrator(o)) => Identity::orchestrator(&o.implementation, &o.specifier),
        Some(ClientType::WorkflowEngine(_)) => Ok(Identity::WorkflowEngine),
        Some(ClientType::MetricsBridge(_)) => Ok(Identity::MetricsBridge),
        Some(ClientType::Bridge(b)) => Identity::bridge(&b.implementation, &b.specifier),
        Some(ClientType::Service(s)) => Identity::service(&s.implementation, &s.specifier),
        None => Err(Error::new(Kind::Invalid, "ERR_INVALID_IDENTIFIER", "unknown principal type")),
    }
}

/// A message as its receiver gets it.
pub(super) fn incoming(envelope: Envelope) -> IncomingMessage {
    IncomingMessage {
        source_topic: envelope.source,
        payload: envelope.payload,
        message_type: envelope.kind,
        workspace: envelope.workspace,
        ..IncomingMessage::default()
    }
}

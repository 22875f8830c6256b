//! Who is connected: listed, looked at, ended.

use std::time::{SystemTime, UNIX_EPOCH};

use trunkline_core::{
    Error, Kind,
    caller::Caller,
    identity::{Identity, PrincipalKind},
    presence::{self, Connection as Present},
    session::Sessions,
};
use trunkline_proto::v1::{
    ConnectionFilter, ConnectionInfo, ConnectionStatusRequest, ConnectionStatusResponse, PrincipalType,
    SessionOperation, SessionOperationResponse, session_operation::OpType,
};

use super::super::{convert, outbound::fitting};

pub(super) async fn handle(
    sessions: &Sessions,
    caller: &Caller,
    operation: SessionOperation,
) -> SessionOperationResponse {
    let request_id = operation.request_id.clone();
    match run(sessions, caller, operation).await {
        Ok(reply) => SessionOperationResponse { success: true, request_id, ..reply },
        Err(error) => {
            SessionOperationResponse { error: error.to_string(), request_id, ..SessionOperationResponse::default() }
        }
    }
}

async fn run(
    sessions: &Sessions,
    caller: &Caller,
    operation: SessionOperation,
) -> Result<SessionOperationResponse, Error> {
    let invalid = |message: &'static str| Error::new(Kind::Invalid, "ERR_INVALID_ARGUMENT", message);
    if !convert::is_direct(operation.authorization.as_ref()) {
        return Err(invalid("invalid authorization context: authority grants are not supported yet"));
    }
    let (session, empty) = (operation.session_id.as_str(), SessionOperationResponse::default);
    Ok(match OpType::try_from(operation.op) {
        Ok(OpType::Disconnect) if session.is_empty() => return Err(invalid("session_id required for DISCONNECT")),
        Ok(OpType::Disconnect) => {
            sessions.disconnect(caller, session, &operation.reason).await?;
            SessionOperationResponse { message: "session disconnected".to_owned(), ..empty() }
        }
        Ok(OpType::List) => {
            let filter = operation.filter.unwrap_or_default();
            let connections = page(sessions.list(caller, &wanted(&filter)?)?, &filter);
            // The page's, not the whole list's: the published contract has it that way, and its suite insists.
            let total_count = connections.len() as i32;
            SessionOperationResponse { connections, total_count, ..empty() }
        }
        Ok(OpType::Get) if session.is_empty() => return Err(invalid("session_id required for GET")),
        Ok(OpType::Get) => {
            SessionOperationResponse { connection: Some(info(&sessions.get(caller, session)?)), ..empty() }
        }
        Err(_) => return Err(invalid("unknown session operation")),
    })
}

/// Whether somebody is connected.
pub(super) async fn status(
    sessions: &Sessions,
    caller: &Caller,
    request: ConnectionStatusRequest,
) -> ConnectionStatusResponse {
    let refused = |error: String| ConnectionStatusResponse {
        request_id: request.request_id.clone(),
        error,
        ..ConnectionStatusResponse::default()
    };
    let Some(principal) = &request.principal else { return refused("principal is required".to_owned()) };
    let Some(kind) = PrincipalKind::parse(&principal.principal_type) else {
        return refused(format!("invalid principal: unknown principal type {:?}", principal.principal_type));
    };
    let id = principal.principal_id.as_str();
    if id.is_empty() {
        return refused("invalid principal: principal_id is required".to_owned());
    }
    if kind != PrincipalKind::User
        && let Err(error) = Identity::parse(id)
    {
        return refused(format!("invalid principal: {error}"));
    }
    match sessions.last_seen(caller, kind, id).await {
        Ok((connected, last_seen_at)) => ConnectionStatusResponse {
            request_id: request.request_id,
            ok: true,
            connected,
            last_seen_at,
            ..ConnectionStatusResponse::default()
        },
        Err(error) => refused(error.to_string()),
    }
}

/// # Errors
/// [`Kind::Invalid`] for a kind that means nothing: without it the filter would let everything through.
pub(super) fn wanted(filter: &ConnectionFilter) -> Result<presence::Filter, Error> {
    let unknown = |_| {
        let message = format!("unknown principal type {}", filter.r#type);
        Error::new(Kind::Invalid, "ERR_INVALID_ARGUMENT", message)
    };
    let kind = match PrincipalType::try_from(filter.r#type).map_err(unknown)? {
        PrincipalType::Unspecified => None,
        PrincipalType::PrincipalAgent => Some(PrincipalKind::Agent),
        PrincipalType::PrincipalTask => Some(PrincipalKind::Task),
        PrincipalType::PrincipalUser => Some(PrincipalKind::User),
        PrincipalType::PrincipalOrchestrator => Some(PrincipalKind::Orchestrator),
        PrincipalType::PrincipalWorkflowEngine => Some(PrincipalKind::WorkflowEngine),
        PrincipalType::PrincipalMetricsBridge => Some(PrincipalKind::MetricsBridge),
        PrincipalType::PrincipalBridge => Some(PrincipalKind::Bridge),
        PrincipalType::PrincipalService => Some(PrincipalKind::Service),
    };
    Ok(presence::Filter { kind, workspace: Some(filter.workspace.clone()).filter(|name| !name.is_empty()) })
}

/// The page that the filter asks for, as far as it fits a frame.
pub(super) fn page(found: Vec<Present>, filter: &ConnectionFilter) -> Vec<ConnectionInfo> {
    fitting(super::page(found, filter.offset, filter.limit).map(|present| info(&present)))
}

pub(super) fn info(present: &Present) -> ConnectionInfo {
    let (implementation, specifier) = match &present.identity {
        Identity::Agent(named) | Identity::UniqueTask(named) | Identity::Task(named) => {
            (named.implementation.as_str(), named.specifier.as_str())
        }
        Identity::User { user, window } => (user.as_str(), window.as_str()),
        Identity::Orchestrator(name) | Identity::Bridge(name) | Identity::Service(name) => {
            (name.implementation.as_str(), name.specifier.as_str())
        }
        Identity::Sandbox(id) => ("", id.as_str()),
        Identity::WorkflowEngine | Identity::MetricsBridge => ("", ""),
    };
    let kind = match present.identity.kind() {
        PrincipalKind::Agent => PrincipalType::PrincipalAgent,
        PrincipalKind::Task => PrincipalType::PrincipalTask,
        PrincipalKind::User => PrincipalType::PrincipalUser,
        PrincipalKind::Orchestrator => PrincipalType::PrincipalOrchestrator,
        PrincipalKind::WorkflowEngine => PrincipalType::PrincipalWorkflowEngine,
        PrincipalKind::MetricsBridge => PrincipalType::PrincipalMetricsBridge,
        PrincipalKind::Bridge => PrincipalType::PrincipalBridge,
        PrincipalKind::Service => PrincipalType::PrincipalService,
        // The contract has no word for those that come over HTTP.
        PrincipalKind::Sandbox => PrincipalType::Unspecified,
    };
    let connected_at = (present.connected_at_ms / 1000) as i64;
    ConnectionInfo {
        session_id: present.session.clone(),
        r#type: kind.into(),
        identity: present.identity.to_string(),
        workspace: present.workspace.clone().unwrap_or_default(),
        implementation: implementation.to_owned(),
        specifier: specifier.to_owned(),
        connected_at,
        duration: duration(now_s() - connected_at),
        remote_addr: present.address.map(|address| address.to_string()).unwrap_or_default(),
        last_activity: (present.heard_at_ms / 1000) as i64,
    }
}

/// In the published form: the two largest units that it has.
pub(super) fn duration(seconds: i64) -> String {
    match seconds.max(0) {
        s @ ..60 => format!("{s}s"),
        s @ ..3600 => format!("{}m {}s", s / 60, s % 60),
        s @ ..86400 => format!("{}h {}m", s / 3600, s / 60 % 60),
        s => format!("{}d {}h", s / 86400, s / 3600 % 24),
    }
}

pub(super) fn now_s() -> i64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |age| age.as_secs() as i64)
}

#[cfg(test)]
mod tests {
    #[test]
    fn durations_are_written_as_published() {
        let cases = [(42, "42s"), (185, "3m 5s"), (7620, "2h 7m"), (4 * 86400 + 3600, "4d 1h"), (-5, "0s")];
        for (seconds, expected) in cases {
            assert_eq!(super::duration(seconds), expected);
        }
    }
}

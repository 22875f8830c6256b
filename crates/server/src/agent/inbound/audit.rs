//! The audit trail: what principals report, and who looks it up.

use trunkline_core::{
    Error,
    audit::{self, Entry, Event, Filter},
    caller::Caller,
    gate::Gate,
};
use trunkline_proto::v1::{
    AuditEntry, AuditQuery, AuditQueryResponse, SubmitAuditEventRequest, SubmitAuditEventResponse,
};

use super::super::{connection::Connection, convert};

/// The published words for a principal, beside those for the server itself.
const SOURCE: &str = "principal";

pub(super) async fn submit(
    connection: &mut Connection<'_>,
    request: SubmitAuditEventRequest,
) -> SubmitAuditEventResponse {
    let client_request_id = request.client_request_id.clone();
    let submitted = match connection.sender.take_audit_token() {
        Ok(()) => {
            let (gate, session) = (&connection.gateway.gate, &connection.session);
            audit::submit(gate, &session.caller, session.workspace(), event(request)).await
        }
        Err(error) => Err(error),
    };
    let Err(Error { code, message, .. }) = submitted else {
        return SubmitAuditEventResponse { client_request_id, success: true, ..SubmitAuditEventResponse::default() };
    };
    let (error_code, error_message) = (code.to_owned(), message.into_owned());
    SubmitAuditEventResponse { client_request_id, success: false, error_code, error_message }
}

pub(super) async fn query(gate: &Gate, caller: &Caller, query: AuditQuery) -> AuditQueryResponse {
    let request_id = query.request_id.clone();
    let refused = |error: String| AuditQueryResponse {
        request_id: query.request_id.clone(),
        error,
        ..AuditQueryResponse::default()
    };
    if !convert::is_direct(query.authorization.as_ref()) {
        return refused("invalid authorization context".to_owned());
    }
    // What is reported here is reported in one's own name only: its subject is its actor.
    let differ = |one: &str, other: &str| !one.is_empty() && !other.is_empty() && one != other;
    if !matches!(query.authority_mode.as_str(), "" | "direct")
        || !query.authority_grant_id.is_empty()
        || differ(&query.actor_type, &query.subject_type)
        || differ(&query.actor_id, &query.subject_id)
    {
        return AuditQueryResponse { request_id, success: true, ..AuditQueryResponse::default() };
    }
    let filter = filter(&query);
    match audit::query(gate, caller, filter).await {
        Ok((entries, total)) => AuditQueryResponse {
            request_id,
            success: true,
            error: String::new(),
            entries: entries.into_iter().map(|each| entry(each, gate)).collect(),
            total_count: i32::try_from(total).unwrap_or(i32::MAX),
        },
        Err(error) => refused(error.to_string()),
    }
}

fn event(request: SubmitAuditEventRequest) -> Event {
    Event {
        kind: request.event_type,
        operation: request.operation,
        resource_kind: request.resource_type,
        resource_id: request.resource_id,
        workspace: request.workspace,
        success: request.success,
        error: request.error_message,
        metadata: request.metadata.into_iter().collect(),
    }
}

/// The subject of what is done in one's own name is the actor.
fn filter(query: &AuditQuery) -> Filter {
    let either = |one: &str, other: &str| if one.is_empty() { other.to_owned() } else { one.to_owned() };
    let mut except_actor_kinds: Vec<String> =
        query.exclude_actor_types.iter().filter(|kind| !kind.is_empty()).cloned().collect();
    if query.exclude_service_direct {
        except_actor_kinds.push("service".to_owned());
    }
    Filter {
        from: query.start_time,
        to: query.end_time,
        kind: query.event_type.clone(),
        actor_kind: either(&query.actor_type, &query.subject_type),
        actor: either(&query.actor_id, &query.subject_id),
        resource_kind: query.resource_type.clone(),
        resource_id: query.resource_id.clone(),
        operation: query.operation.clone(),
        workspace: query.workspace.clone(),
        only_failures: query.only_failures,
        except_actor_kinds,
        except_workspaces: query.exclude_workspaces.clone(),
        limit: query.limit.into(),
        offset: query.offset.into(),
    }
}

fn entry(entry: Entry, gate: &Gate) -> AuditEntry {
    let Entry { id, at, actor_kind, actor, session, event } = entry;
    AuditEntry {
        audit_id: id,
        timestamp: at,
        event_type: event.kind,
        actor_type: actor_kind.clone(),
        actor_id: actor.clone(),
        resource_type: event.resource_kind,
        resource_id: event.resource_id,
        operation: event.operation,
        workspace: event.workspace,
        session_id: session,
        gateway_id: gate.id(),
        success: event.success,
        error_message: event.error,
        metadata_json: serde_json::to_string(&event.metadata).unwrap_or_default(),
        subject_type: actor_kind.clone(),
        subject_id: actor.clone(),
        root_subject_type: actor_kind,
        root_subject_id: actor,
        authority_mode: "direct".to_owned(),
        source: SOURCE.to_owned(),
        ..AuditEntry::default()
    }
}

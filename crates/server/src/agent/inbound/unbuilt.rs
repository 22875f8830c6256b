//! What this server does not carry out yet. It is refused and never passed over in silence: whole operations, and fields that restrict an operation
//! which is carried out, because that would go further without them than its caller allowed.
//!
//! `tests/it/contract.csv` says of every field of the contract whether it is read, refused or ignored, and why.

use trunkline_core::{Error, Kind};
use trunkline_proto::v1::{
    AccessCheckResponse, AuthorityGrantResponse, AuthorityRequestOperationResponse, BatchAccessCheckResponse,
    CreateTaskRequest, ErrorResponse, ProxyError, ProxyHttpResponse, ResolveAuthorityResponse, SendMessage,
    TargetOfflinePolicy, TokenCreateRequest, TunnelClose, WorkflowResponse, downstream_message::Payload as Down,
    proxy_error, tunnel_close, upstream_message::Payload as Up,
};

use crate::error::response;

/// Answers an operation that is not built: first the typed reply that its client waits for, then the error, both with the
/// operation's id. Frames of a call or a tunnel that was refused get no answer of their own: the refusal has said it.
pub(super) fn refusal(payload: Option<Up>) -> Vec<Down> {
    let error = unsupported("this operation is not supported by this server yet");
    let why = error.to_string();
    let (typed, request_id) = match payload {
        Some(Up::WorkflowOp(op)) => workflow(op.request_id),
        Some(Up::AuthorityGrantOp(op)) => {
            let reply = AuthorityGrantResponse { error: why, request_id: op.request_id.clone(), ..Default::default() };
            (Some(Down::AuthorityGrant(reply.into())), op.request_id)
        }
        Some(Up::ProxyHttpRequest(call)) => proxy(call.request_id, &call.target_topic),
        Some(Up::TunnelOpen(open)) => {
            let reason = tunnel_close::Reason::Error.into();
            let close = TunnelClose { tunnel_id: open.tunnel_id.clone(), reason, detail: why };
            (Some(Down::TunnelClose(close.into())), open.tunnel_id)
        }
        Some(Up::ResolveAuthorityRequest(op)) => {
            let reply =
                ResolveAuthorityResponse { error: why, request_id: op.request_id.clone(), ..Default::default() };
            (Some(Down::ResolveAuthorityResponse(reply.into())), op.request_id)
        }
        Some(Up::AuthorityRequestOp(op)) => {
            let client_request_id = op.client_request_id.clone();
            let reply = AuthorityRequestOperationResponse { error: why, client_request_id, ..Default::default() };
            (Some(Down::AuthorityRequestResponse(reply.into())), op.client_request_id)
        }
        Some(Up::AccessCheck(op)) => {
            let reply = AccessCheckResponse { error: why, request_id: op.request_id.clone(), ..Default::default() };
            (Some(Down::AccessCheckResponse(reply.into())), op.request_id)
        }
        Some(Up::BatchAccessCheck(op)) => {
            let reply =
                BatchAccessCheckResponse { error: why, request_id: op.request_id.clone(), ..Default::default() };
            (Some(Down::BatchAccessCheckResponse(reply.into())), op.request_id)
        }
        Some(Up::WorkflowResponse(reply)) => (None, reply.request_id),
        Some(
            Up::ProxyHttpBodyChunk(_)
            | Up::ProxyHttpResponse(_)
            | Up::TunnelData(_)
            | Up::TunnelClose(_)
            | Up::TunnelAck(_),
        ) => return Vec::new(),
        _ => (None, String::new()),
    };
    let error = Down::Error(ErrorResponse { request_id, ..response(&error) }.into());
    typed.into_iter().chain([error]).collect()
}

fn workflow(request_id: String) -> (Option<Down>, String) {
    // The published words for a server that no engine is connected to.
    let error = "workflow engine not connected".to_owned();
    let reply = WorkflowResponse { error, request_id: request_id.clone(), ..Default::default() };
    (Some(Down::WorkflowResponse(reply.into())), request_id)
}

fn proxy(request_id: String, target: &str) -> (Option<Down>, String) {
    let kind = proxy_error::Kind::SidecarUnavailable.into();
    let error = Some(ProxyError { kind, message: format!("calls to {target} are not supported by this server yet") });
    let reply = ProxyHttpResponse { request_id: request_id.clone(), error, ..Default::default() };
    (Some(Down::ProxyHttpResponse(reply.into())), request_id)
}

/// Refuses a message that its sender wants delivered under conditions only.
pub(super) fn check_send(message: &SendMessage) -> Result<(), Error> {
    if message.checked_access.is_some() {
        return Err(unsupported("checked_access is not supported by this server yet: the message was not sent"));
    }
    if message.authority_continuation.is_some() {
        return Err(unsupported(
            "authority_continuation is not supported by this server yet: the message was not sent",
        ));
    }
    Ok(())
}

/// What a refused message is called by its sender: its own name, or that of the check.
pub(super) fn name(message: &SendMessage) -> &str {
    let checked = message.checked_access.as_ref().map_or("", |access| access.correlation_id.as_str());
    if message.idempotency_key.is_empty() { checked } else { &message.idempotency_key }
}

/// Refuses a task that its creator wants limited in a way that would not be kept.
pub(super) fn check_task(request: &CreateTaskRequest) -> Result<(), Error> {
    if request.required_downstream_authority_hops > 0 {
        return Err(unsupported("required_downstream_authority_hops is not supported by this server yet"));
    }
    // No operation says with which code a task failed.
    if request.retry_policy.as_ref().is_some_and(|policy| !policy.retryable_status_codes.is_empty()) {
        return Err(unsupported("retry_policy.retryable_status_codes is not supported by this server yet"));
    }
    if TargetOfflinePolicy::try_from(request.target_offline_policy).is_err() {
        let message = format!("unknown target_offline_policy {}", request.target_offline_policy);
        return Err(Error::new(Kind::Invalid, "ERR_INVALID_ARGUMENT", message));
    }
    Ok(())
}

/// Scopes of an API key that take nothing away, in the published clients' words.
const FULL_SCOPES: [&str; 2] = ["*", "connect"];

/// Refuses an API key whose scopes would have to limit what it opens over this surface: none does. Scopes for the HTTP
/// surfaces add to a key and need no check here.
pub(super) fn check_scopes(request: &TokenCreateRequest) -> Result<(), Error> {
    let has = |wanted: &str| request.scopes.iter().any(|scope| scope == wanted);
    let is_full = FULL_SCOPES.iter().any(|scope| has(scope)) || has("read") && has("write");
    let adds = |scope: &str| ["sandbox:", "socket:", "socket-runtime:"].iter().any(|http| scope.starts_with(http));
    if is_full || request.scopes.iter().all(|scope| adds(scope)) {
        return Ok(());
    }
    let message = format!(
        "scopes {:?} are not supported by this server: a key is limited by workspace_patterns and access rules",
        request.scopes
    );
    Err(Error::new(Kind::Unimplemented, "ERR_NOT_IMPLEMENTED", message))
}

fn unsupported(message: &'static str) -> Error {
    Error::new(Kind::Unimplemented, "ERR_NOT_IMPLEMENTED", message)
}

#[cfg(test)]
mod tests {
    use super::{TokenCreateRequest, check_scopes};

    #[test]
    fn scopes_that_would_limit_a_key_are_refused() {
        let check = |scopes: &[&str]| {
            let scopes = scopes.iter().map(|&scope| scope.to_owned()).collect();
            check_scopes(&TokenCreateRequest { scopes, ..Default::default() }).is_ok()
        };
        for full in [&[][..], &["connect"], &["*"], &["read", "write"], &["sandbox:read"], &["socket:web-*", "connect"]]
        {
            assert!(check(full), "{full:?}");
        }
        for narrow in [&["read"][..], &["write"], &["kv:read"], &["sandbox:read", "read"], &["Connect"]] {
            assert!(!check(narrow), "{narrow:?}");
        }
    }
}

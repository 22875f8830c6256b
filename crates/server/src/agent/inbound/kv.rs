//! Key-value requests: read, allowed, handed over in order, answered when they are done.

use futures_util::FutureExt as _;
use trunkline_core::{
    Error, Kind,
    identity::Identity,
    kv::{self, Action, Answer, New, Request, Scope},
    limits::{KV_PAGE_BYTES_MAX, Limits},
};
use trunkline_proto::v1::{
    ErrorResponse, KvOperation, KvResponse,
    downstream_message::Payload as Down,
    kv_operation::{OpType, Scope as WireScope},
};

use super::super::{
    connection::{Connection, Request as Running},
    convert,
};
use crate::error::response;

/// The next frame is read while this one is on its way to the disk; answers keep the order of their requests.
pub(super) async fn handle(connection: &mut Connection<'_>, operation: KvOperation) {
    let request_id = operation.request_id.clone();
    let running = match start(connection, operation).await {
        Ok(running) => running,
        Err(error) => {
            let replies = std::future::ready(refusal(&error, request_id)).boxed();
            Running { replies, is_write: false, bytes_max: SMALL_BYTES_MAX }
        }
    };
    connection.wait_for(running);
}

async fn start(connection: &mut Connection<'_>, operation: KvOperation) -> Result<Running, Error> {
    let request_id = operation.request_id.clone();
    if !convert::is_direct(operation.authorization.as_ref()) {
        return Err(Error::new(Kind::Denied, "ERR_PERMISSION_DENIED", INVALID_CONTEXT));
    }
    let request = request(operation)?;
    let (gateway, session) = (connection.gateway, &connection.session);
    let is_write = !request.action.is_read();
    let bytes_max = answer_bytes_max(&request.action, &gateway.limits);
    let allowed = kv::allow(&gateway.gate, &session.caller, session.workspace(), request, &gateway.limits)?;
    let after_writes = connection.is_writing();
    let running = kv::run(&gateway.gate, &session.caller, allowed, after_writes, &gateway.limits).await?;
    let replies = async move {
        match running.await {
            Ok(answer) => vec![Down::Kv(reply(answer, request_id).into())],
            Err(error) => refusal(&error, request_id),
        }
    };
    Ok(Running { replies: replies.boxed(), is_write, bytes_max })
}

/// Bytes of an answer without a value.
const SMALL_BYTES_MAX: usize = 1024;

/// How large an answer may be.
fn answer_bytes_max(action: &Action, limits: &Limits) -> usize {
    SMALL_BYTES_MAX
        + match action {
            Action::List { .. } => KV_PAGE_BYTES_MAX,
            // A comparison that fails answers what is there.
            Action::Get | Action::CompareAndSet { .. } => limits.kv_value_bytes_max,
            _ => 0,
        }
}

/// The refusal of a context that cannot be used, in the published words.
const INVALID_CONTEXT: &str = "invalid authorization context";

/// Both a typed reply and an error with the same id: the clients differ in which of them they wait for, and take the
/// first. The published server sends the error first for a value over its limit and for a context that cannot be used.
fn refusal(error: &Error, request_id: String) -> Vec<Down> {
    let typed = Down::Kv(KvResponse { request_id: request_id.clone(), ..KvResponse::default() }.into());
    let is_error_first = error.code == "ERR_QUOTA_001" || error.message == INVALID_CONTEXT;
    let error = Down::Error(ErrorResponse { request_id, ..response(error) }.into());
    if is_error_first { vec![error, typed] } else { vec![typed, error] }
}

fn reply(answer: Answer, request_id: String) -> KvResponse {
    let Answer { value, entries, counter, applied, next_cursor } = answer;
    KvResponse {
        success: true,
        value: value.into(),
        keys: entries.iter().map(|(key, _)| key.clone()).collect(),
        kv_map: entries.into_iter().map(|(key, value)| (key, value.into())).collect(),
        request_id,
        counter_value: counter,
        applied,
        has_more: !next_cursor.is_empty(),
        next_cursor,
    }
}

fn request(operation: KvOperation) -> Result<Request, Error> {
    let unknown = |_| invalid(format!("unknown KV scope {}", operation.scope));
    let scope = match WireScope::try_from(operation.scope).map_err(unknown)? {
        WireScope::Unspecified | WireScope::Workspace => Scope::Workspace,
        WireScope::Global => Scope::Global,
        WireScope::User => Scope::User,
        WireScope::UserWorkspace => Scope::UserWorkspace,
        WireScope::GlobalExclusive => Scope::GlobalExclusive,
        WireScope::WorkspaceExclusive => Scope::WorkspaceExclusive,
        WireScope::UserShared => Scope::UserShared,
        WireScope::UserWorkspaceShared => Scope::UserWorkspaceShared,
    };
    let action = action(&operation)?;
    let KvOperation { key, user_id, workspace, .. } = operation;
    Ok(Request { scope, key, user_id, workspace, action })
}

fn action(operation: &KvOperation) -> Result<Action, Error> {
    let ttl = operation.ttl;
    let new = || New { value: operation.value.to_vec(), ttl };
    let expected = || operation.expected_value.to_vec();
    let op = OpType::try_from(operation.op).map_err(|_| invalid("unknown KV operation".to_owned()))?;
    check_conditions(op, operation)?;
    Ok(match op {
        OpType::Get => Action::Get,
        OpType::Put => Action::Put(new()),
        OpType::List => {
            Action::List { limit: usize::try_from(operation.limit).unwrap_or(0), cursor: operation.cursor.clone() }
        }
        OpType::Delete => Action::Delete,
        OpType::Increment => Action::Add { delta: 1, ttl },
        OpType::Decrement => Action::Add { delta: -1, ttl },
        OpType::IncrementIf => Action::AddIf { delta: delta(operation)?, guard: operation.guard_value, ttl },
        OpType::DecrementIf => Action::AddIf { delta: -delta(operation)?, guard: operation.guard_value, ttl },
        OpType::SetNx => Action::SetIfAbsent(new()),
        OpType::CompareAndSet => Action::CompareAndSet { expected: expected(), new: new() },
        OpType::CompareAndDelete => Action::CompareAndDelete { expected: expected() },
        OpType::SetAdd => Action::SetAdd(new()),
        OpType::SetCard => Action::SetCount,
        OpType::PurgeIdentity => {
            let target = &operation.target_identity;
            if target.is_empty() {
                return Err(invalid("purge_identity requires target_identity".to_owned()));
            }
            let refused = |e: Error| invalid(format!("invalid target_identity {target:?}: {e}"));
            Action::Purge { target: Identity::parse(target).map_err(refused)? }
        }
    })
}

/// Refuses a condition on an operation that has none: it would be carried out whatever the condition says.
fn check_conditions(op: OpType, operation: &KvOperation) -> Result<(), Error> {
    let compares = matches!(op, OpType::CompareAndSet | OpType::CompareAndDelete);
    let guards = matches!(op, OpType::IncrementIf | OpType::DecrementIf);
    let given = [
        ("expected_value", !compares && !operation.expected_value.is_empty()),
        ("guard_value", !guards && operation.guard_value != 0),
        ("delta_value", !guards && operation.delta_value != 0),
        ("target_identity", op != OpType::PurgeIdentity && !operation.target_identity.is_empty()),
    ];
    match given.into_iter().find(|(_, is_given)| *is_given) {
        Some((field, _)) => Err(invalid(format!("{field} is not supported by {}", op.as_str_name()))),
        None => Ok(()),
    }
}

/// 0 stands for 1.
fn delta(operation: &KvOperation) -> Result<i64, Error> {
    match operation.delta_value {
        0 => Ok(1),
        delta @ 1.. => Ok(delta),
        delta => Err(invalid(format!("delta {delta} is negative"))),
    }
}

fn invalid(message: String) -> Error {
    Error::new(Kind::Invalid, "ERR_INVALID_ARGUMENT", message)
}

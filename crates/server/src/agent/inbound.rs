//! What a client asks for, one frame after the other.

mod admin;
mod agents;
mod audit;
mod conversations;
mod kv;
mod rules;
mod sessions;
mod tasks;
mod tokens;
mod unbuilt;
mod workspaces;

use prost::Message as _;
use tonic::Status;
use trunkline_core::{
    Error, Kind, caller::Caller, checkpoint, conversation::conversation_of, gate::Gate, limits::Limits,
};
use trunkline_proto::{
    own::Acknowledgement,
    v1::{
        CheckpointOperation, CheckpointResponse, ErrorResponse, ProgressReport, SendMessage, UpstreamMessage,
        checkpoint_operation::OpType, downstream_message::Payload as Down, upstream_message::Payload as Up,
    },
};

use super::{connection::Connection, convert, handshake::ACK_EXTENSION};
use crate::error::response;

/// Handles one frame. An error ends the stream; what the stream survives is answered on it.
pub(super) async fn handle(connection: &mut Connection<'_>, frame: UpstreamMessage) -> Result<(), Status> {
    match frame.payload {
        Some(Up::Send(message)) => {
            if let Err(error) = unbuilt::check_send(&message) {
                connection.refuse_message(&error, unbuilt::name(&message));
                return Ok(());
            }
            if message.target_topic.starts_with("tk::") {
                let opened = Box::pin(connection.sender.open_task(&connection.session, &message.target_topic)).await;
                if let Err(error) = opened {
                    connection.refuse_message(&error, &message.idempotency_key);
                    return Ok(());
                }
            }
            if conversation_of(&message.target_topic).is_some() && conversations::send(connection, &message).await {
                return Ok(());
            }
            send(connection, &message);
            connection.submit_if_full().await;
        }
        // On the heap, so that an idle connection does not hold room for every kind of request.
        payload => return Box::pin(other(connection, payload)).await,
    }
    Ok(())
}

async fn other(connection: &mut Connection<'_>, payload: Option<Up>) -> Result<(), Status> {
    match payload {
        Some(Up::KvOp(operation)) => kv::handle(connection, *operation).await,
        Some(Up::Progress(report)) => progress(connection, *report).await,
        Some(Up::CreateTask(request)) => tasks::create(connection, *request).await,
        Some(Up::TaskOp(operation)) => tasks::operate(connection, *operation).await,
        Some(Up::Acknowledgement(ack)) => acknowledge(connection, &ack),
        payload => {
            connection.settle().await;
            return settled(connection, payload).await;
        }
    }
    Ok(())
}

/// What waits until everything before it is done.
async fn settled(connection: &mut Connection<'_>, payload: Option<Up>) -> Result<(), Status> {
    match payload {
        Some(Up::SwitchWorkspace(switch)) => {
            if let Err(error) = connection.session.switch_workspace(&switch.new_workspace_id).await {
                let code = if error.kind == Kind::Denied { error.code } else { "ERR_WORKSPACE_SWITCH_FAILED" };
                connection.refuse(&Error { code, ..error });
            } else {
                tasks::take_part(connection).await;
            }
        }
        Some(Up::TaskQuery(query)) => {
            let reply = tasks::query(connection, *query).await;
            connection.reply(Down::TaskQuery(reply.into()));
        }
        Some(Up::TaskSubscriptionOp(operation)) => {
            let tasks = &connection.gateway.tasks;
            let reply = connection.following.handle(&mut connection.session, tasks, *operation).await;
            connection.reply(Down::TaskSubscriptionResponse(reply.into()));
        }
        Some(Up::SubmitAuditEvent(request)) => {
            let reply = audit::submit(connection, *request).await;
            connection.reply(Down::SubmitAuditEventResponse(reply.into()));
        }
        Some(Up::ConnectionStatusRequest(request)) => {
            let status = sessions::status(&connection.gateway.sessions, &connection.session.caller, *request);
            let reply = Box::pin(status).await;
            connection.reply(Down::ConnectionStatusResponse(reply.into()));
        }
        Some(Up::CheckpointOp(operation)) => {
            let caller = connection.session.caller.clone();
            let reply = checkpoint(&connection.gateway.gate, &caller, &connection.gateway.limits, *operation).await;
            connection.reply(Down::Checkpoint(reply.into()));
        }
        Some(Up::Init(_)) => return Err(Status::invalid_argument("InitConnection already sent")),
        payload => administer(connection, payload).await,
    }
    Ok(())
}

/// What is for administrators.
async fn administer(connection: &mut Connection<'_>, payload: Option<Up>) {
    let caller = connection.session.caller.clone();
    match payload {
        Some(Up::AgentOp(operation)) => {
            let request_id = operation.request_id.clone();
            match agents::handle(connection.gateway, &caller, *operation).await {
                Ok(reply) => connection.reply(Down::Agent(reply.into())),
                Err(error) => connection.reply(Down::Error(ErrorResponse { request_id, ..response(&error) }.into())),
            }
        }
        Some(Up::AclOp(operation)) => {
            let reply = rules::handle(&connection.gateway.gate, &caller, *operation).await;
            connection.reply(Down::Acl(reply.into()));
        }
        Some(Up::SessionOp(operation)) => {
            let reply = sessions::handle(&connection.gateway.sessions, &caller, *operation).await;
            connection.reply(Down::SessionResponse(reply.into()));
        }
        Some(Up::TokenOp(operation)) => {
            let request_id = operation.request_id.clone();
            match tokens::handle(&connection.gateway.sessions, &caller, *operation).await {
                Ok(reply) => connection.reply(Down::Token(reply.into())),
                Err(error) => connection.reply(Down::Error(ErrorResponse { request_id, ..response(&error) }.into())),
            }
        }
        Some(Up::WorkspaceOp(operation)) => {
            let request_id = operation.request_id.clone();
            match workspaces::handle(&connection.gateway.sessions, &caller, *operation).await {
                Ok(reply) => connection.reply(Down::Workspace(reply.into())),
                Err(error) => connection.reply(Down::Error(ErrorResponse { request_id, ..response(&error) }.into())),
            }
        }
        Some(Up::AdminQuery(query)) => {
            let replies = admin::handle(connection.gateway, &caller, *query).await;
            replies.into_iter().for_each(|reply| connection.reply(reply));
        }
        Some(Up::AuditQuery(query)) => {
            let reply = audit::query(&connection.gateway.gate, &caller, *query).await;
            connection.reply(Down::AuditResponse(reply.into()));
        }
        payload => connection.refuse_unbuilt(unbuilt::refusal(payload)),
    }
}

/// One page of a list; a `limit` of 0 is no limit.
fn page<T>(all: Vec<T>, offset: i32, limit: i32) -> impl Iterator<Item = T> {
    let limit = usize::try_from(limit).ok().filter(|limit| *limit > 0).unwrap_or(usize::MAX);
    all.into_iter().skip(usize::try_from(offset).unwrap_or(0)).take(limit)
}

fn acknowledge(connection: &mut Connection<'_>, ack: &Acknowledgement) {
    let done = match &mut connection.acks {
        Some(acks) => acks.acknowledge(ack),
        None => {
            let why = format!("acknowledgements take the extension {ACK_EXTENSION}, which was not declared");
            Err(Error::new(Kind::Precondition, "ERR_EXTENSION_UNSUPPORTED", why))
        }
    };
    connection.acknowledged();
    if let Err(error) = done {
        connection.refuse(&error);
    }
}

/// Success is silent: the next frame is read while this one is on its way to the disk.
fn send(connection: &mut Connection<'_>, message: &SendMessage) {
    let SendMessage { target_topic, payload, message_type, authorization, idempotency_key: key, .. } = message;
    let sent = if convert::is_direct(authorization.as_deref()) {
        connection.sender.send(&connection.session, target_topic, *message_type, payload, key)
    } else {
        let why = format!("not authorized to send to topic {target_topic}");
        Err(Error::new(Kind::Denied, "ERR_PERMISSION_DENIED", why))
    };
    if let Err(error) = sent {
        connection.refuse_message(&error, key);
    }
}

async fn progress(connection: &mut Connection<'_>, mut report: ProgressReport) {
    // The recipient is kept beside the rest of the report.
    let recipient = std::mem::take(&mut report.recipient);
    if conversation_of(&recipient).is_some() && conversations::types(connection, &recipient, &report).await {
        return;
    }
    let reported = connection.sender.report(&connection.session, &recipient, &report.encode_to_vec());
    if !report.task_id.is_empty() && connection.is_writing() {
        // What it asked before may make it a party.
        connection.settle().await;
    }
    let reported = match reported {
        Ok(()) if !report.task_id.is_empty() => {
            connection.sender.report_on(&connection.session, &report.task_id, tasks::progress(&report)).await
        }
        reported => reported,
    };
    if let Err(error) = reported {
        connection.refuse(&error);
    }
    connection.submit_if_full().await;
}

async fn checkpoint(
    gate: &Gate,
    caller: &Caller,
    limits: &Limits,
    operation: CheckpointOperation,
) -> CheckpointResponse {
    let CheckpointOperation { op, key, data, ttl, request_id } = operation;
    let mut reply = CheckpointResponse { success: true, request_id, ..CheckpointResponse::default() };
    let done = match OpType::try_from(op) {
        Ok(OpType::Save) => {
            let saved = checkpoint::save(gate, caller, &key, data.into(), ttl, limits).await;
            saved.map(|saved_at| reply.saved_at = saved_at)
        }
        Ok(OpType::Load) => checkpoint::load(gate, caller, &key).await.map(|found| {
            if let Some(found) = found {
                (reply.data, reply.saved_at) = (found.data.into(), found.saved_at);
            }
        }),
        Ok(OpType::Delete) => checkpoint::delete(gate, caller, &key).await,
        Ok(OpType::List) => checkpoint::list(gate, caller).await.map(|keys| reply.keys = keys),
        Err(_) => Err(Error::new(Kind::Invalid, "ERR_INVALID_ARGUMENT", "unknown checkpoint operation")),
    };
    if let Err(error) = done {
        reply.success = false;
        reply.error = error.to_string();
    }
    reply
}

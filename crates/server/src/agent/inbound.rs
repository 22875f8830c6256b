//! What a client asks for, one frame after the other.

use tonic::Status;
use trunkline_core::{Error, Kind, checkpoint};
use trunkline_proto::v1::{
    CheckpointOperation, CheckpointResponse, SendMessage, UpstreamMessage, checkpoint_operation::OpType,
    downstream_message::Payload as Down, upstream_message::Payload as Up,
};

use super::connection::Connection;

/// Handles one frame. An error ends the stream; what the stream survives is answered on it.
pub(super) async fn handle(connection: &mut Connection<'_>, frame: UpstreamMessage) -> Result<(), Status> {
    match frame.payload {
        Some(Up::Send(message)) => send(connection, message).await,
        Some(Up::SwitchWorkspace(switch)) => {
            connection.settle().await;
            if let Err(error) = connection.session.switch_workspace(&switch.new_workspace_id).await {
                let code = if error.kind == Kind::Denied { error.code } else { "ERR_WORKSPACE_SWITCH_FAILED" };
                connection.refuse(&Error { code, ..error });
            }
        }
        Some(Up::CheckpointOp(operation)) => {
            connection.settle().await;
            let reply = checkpoint(connection, operation).await;
            connection.reply(Down::Checkpoint(reply));
        }
        Some(Up::Init(_)) => return Err(Status::invalid_argument("InitConnection already sent")),
        _ => connection.refuse(&Error::new(
            Kind::Unimplemented,
            "ERR_NOT_IMPLEMENTED",
            "this operation is not supported by this server yet",
        )),
    }
    Ok(())
}

/// Success is silent: the next frame is read while this one is on its way to the disk.
async fn send(connection: &mut Connection<'_>, message: SendMessage) {
    let SendMessage { target_topic, payload, message_type, .. } = message;
    let (sender, session) = (&mut connection.sender, &connection.session);
    match sender.send(session, &target_topic, message_type, payload).await {
        Ok(submitted) => connection.await_append(submitted),
        Err(error) => connection.refuse(&error),
    }
}

async fn checkpoint(connection: &Connection<'_>, operation: CheckpointOperation) -> CheckpointResponse {
    let CheckpointOperation { op, key, data, ttl, request_id } = operation;
    let (gate, caller) = (&connection.gateway.gate, &connection.session.caller);
    let mut reply = CheckpointResponse { success: true, request_id, ..CheckpointResponse::default() };
    let done = match OpType::try_from(op) {
        Ok(OpType::Save) => {
            checkpoint::save(gate, caller, &key, data.into(), ttl).await.map(|saved_at| reply.saved_at = saved_at)
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

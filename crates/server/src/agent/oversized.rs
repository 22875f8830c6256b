//! What is said in place of a reply that does not fit a frame.

use trunkline_core::{Error, Kind, limits::FRAME_OUT_BYTES_MAX};
use trunkline_proto::v1::{
    AclResponse, AdminResponse, AgentResponse, AuditQueryResponse, CheckpointResponse, ErrorResponse, KvResponse,
    SessionOperationResponse, TaskOperationResponse, TaskQueryResponse, TokenResponse, WorkspaceResponse,
    downstream_message::Payload as Down,
};

use crate::error::response;

/// The refusal of a reply of so many bytes: of the same type and with the same id where its client waits for one.
pub(super) fn refusal(payload: Down, bytes: usize) -> Down {
    let refused = refused(bytes);
    let error = refused.to_string();
    macro_rules! typed {
        ($kind:ident, $response:ident, $reply:expr) => {
            Down::$kind(Box::new($response { error, request_id: $reply.request_id, ..$response::default() }))
        };
    }
    match payload {
        Down::Checkpoint(reply) => typed!(Checkpoint, CheckpointResponse, reply),
        Down::Admin(reply) => typed!(Admin, AdminResponse, reply),
        Down::SessionResponse(reply) => typed!(SessionResponse, SessionOperationResponse, reply),
        Down::TaskQuery(reply) => typed!(TaskQuery, TaskQueryResponse, reply),
        Down::TaskOp(reply) => typed!(TaskOp, TaskOperationResponse, reply),
        Down::Workspace(reply) => typed!(Workspace, WorkspaceResponse, reply),
        Down::Agent(reply) => typed!(Agent, AgentResponse, reply),
        Down::Acl(reply) => typed!(Acl, AclResponse, reply),
        Down::Token(reply) => typed!(Token, TokenResponse, reply),
        Down::AuditResponse(reply) => typed!(AuditResponse, AuditQueryResponse, reply),
        // Its contract has no words for why.
        Down::Kv(reply) => Down::Kv(Box::new(KvResponse { request_id: reply.request_id, ..KvResponse::default() })),
        Down::Error(reply) => {
            Down::Error(Box::new(ErrorResponse { request_id: reply.request_id, ..response(&refused) }))
        }
        _ => Down::Error(Box::new(response(&refused))),
    }
}

/// The refusal of a reply whose id is what makes it too large.
pub(super) fn uncorrelated(bytes: usize) -> Down {
    Down::Error(Box::new(response(&refused(bytes))))
}

fn refused(bytes: usize) -> Error {
    let message =
        format!("reply of {bytes} bytes exceeds the frame limit of {FRAME_OUT_BYTES_MAX}; ask for less at once");
    Error::new(Kind::Exhausted, "ERR_REPLY_TOO_LARGE", message)
}

#[cfg(test)]
#[allow(clippy::panic, reason = "test code")]
mod tests {
    use trunkline_proto::v1::{AclResponse, AclRuleInfo, IncomingMessage};

    use super::{Down, refusal};

    #[test]
    fn what_does_not_fit_is_refused_by_type_and_id() {
        let rules = vec![AclRuleInfo { reason: "why".into(), ..Default::default() }];
        let reply = AclResponse { success: true, request_id: "r-1".into(), rules, ..Default::default() };
        let Down::Acl(refused) = refusal(Down::Acl(reply.into()), 5_000_000) else { panic!("its own type") };
        assert_eq!((refused.success, refused.request_id.as_str(), refused.rules.len()), (false, "r-1", 0));
        assert!(refused.error.contains("5000000"), "{}", refused.error);
        let Down::Error(refused) = refusal(Down::Msg(IncomingMessage::default()), 5_000_000) else {
            panic!("an error")
        };
        assert_eq!(refused.code, "ERR_REPLY_TOO_LARGE");
    }
}

//! What agents and operators say in conversations of apps' users.

use trunkline_core::{
    Error, Kind,
    conversation::{
        Part,
        said::{Activity, Phase, Typing},
    },
};
use trunkline_proto::v1::{ErrorResponse, ProgressReport, SendMessage, downstream_message::Payload as Down};

use super::super::{
    connection::{Connection, Request},
    convert,
};
use crate::error::response;

/// States of progress that mean that somebody is at it. Whatever else is said means that it is not any more.
const BUSY: [&str; 6] = ["running", "in_progress", "working", "thinking", "typing", "started"];

/// Bytes of a refusal.
const SMALL_BYTES_MAX: usize = 1024;

/// Longest label, in characters.
const LABEL_CHARS_MAX: usize = 100;

/// Sends a message to a conversation; answers false if its target is none. What follows it on the same stream to the same
/// conversation comes behind it.
pub(super) async fn send(connection: &mut Connection<'_>, message: &SendMessage) -> bool {
    let key = &message.idempotency_key;
    let part = match part(connection, &message.target_topic).await {
        Ok(Some(part)) if convert::is_direct(message.authorization.as_deref()) => {
            // It was written knowing everything that was delivered before it.
            match connection.session.heard().await {
                Ok(heard) => part.having_heard(heard),
                Err(error) => {
                    connection.refuse_message(&error, key);
                    return true;
                }
            }
        }
        Ok(Some(_)) => {
            let why = format!("not authorized to send to topic {}", message.target_topic);
            connection.refuse_message(&Error::new(Kind::Denied, "ERR_PERMISSION_DENIED", why), key);
            return true;
        }
        Ok(None) => return false,
        Err(error) => {
            connection.refuse_message(&error, key);
            return true;
        }
    };
    // What it said before to others is before this for whoever hears both.
    connection.submit().await;
    let said = match connection.sender.take_account(message.payload.len()) {
        Ok(()) => connection.gateway.conversations.say(&part, message.message_type, &message.payload, key).await,
        Err(error) => Err(error),
    };
    match said {
        Ok(told) => {
            connection.gateway.metrics.accepted.inc();
            let key = key.clone();
            let replies = Box::pin(async move {
                let Err(error) = told.done().await else { return Vec::new() };
                vec![Down::Error(ErrorResponse { request_id: key, ..response(&error) }.into())]
            });
            connection.wait_for(Request { replies, is_write: false, bytes_max: SMALL_BYTES_MAX });
        }
        Err(error) => connection.refuse_message(&error, key),
    }
    true
}

/// Shows progress to whoever watches a conversation; answers false if the recipient is none.
pub(super) async fn types(connection: &mut Connection<'_>, recipient: &str, report: &ProgressReport) -> bool {
    let part = match part(connection, recipient).await {
        Ok(Some(part)) => part,
        Ok(None) => return false,
        Err(error) => {
            connection.refuse(&error);
            return true;
        }
    };
    let step = report.step.as_ref().map(|step| step.name.as_str()).filter(|name| !name.is_empty());
    let label: String = step.unwrap_or(&report.summary).chars().take(LABEL_CHARS_MAX).collect();
    let is_busy = BUSY.iter().any(|word| report.state.eq_ignore_ascii_case(word));
    let kind = if report.state.eq_ignore_ascii_case("typing") { Activity::Typing } else { Activity::Thinking };
    let typing = Typing { kind, state: if is_busy { Phase::Start } else { Phase::Stop }, label };
    let shown = match connection.sender.take_account(0) {
        Ok(()) => connection.gateway.conversations.publish(part.permit(), &typing),
        Err(error) => Err(error),
    };
    if let Err(error) = shown {
        connection.refuse(&error);
    }
    true
}

async fn part(connection: &mut Connection<'_>, lane: &str) -> Result<Option<Part>, Error> {
    Box::pin(connection.gateway.conversations.part(&connection.session.caller, lane)).await
}

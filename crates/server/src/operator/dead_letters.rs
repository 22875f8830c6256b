//! Messages that are not delivered again by themselves, as operators see them.

use trunkline_core::{
    Error, Kind,
    caller::Caller,
    message::Envelope,
    session::{Sessions, dead_letter},
};
use trunkline_proto::own::{DeadLetter, ListDeadLettersReply, ListDeadLettersRequest, RemoveDeadLetterReply};
use uuid::Uuid;

pub(super) async fn list(
    sessions: &Sessions,
    caller: &Caller,
    asked: &ListDeadLettersRequest,
) -> Result<ListDeadLettersReply, Error> {
    let after = if asked.after.is_empty() { None } else { Some(id(&asked.after)?) };
    let found = sessions.dead_letters(caller, &asked.owner, after, asked.limit).await?;
    // Of the payload, only what says who sent it was read.
    let listed = |letter| DeadLetter { payload: bytes::Bytes::new(), ..shown(letter) };
    Ok(ListDeadLettersReply { dead_letters: found.into_iter().map(listed).collect() })
}

pub(super) async fn get(sessions: &Sessions, caller: &Caller, asked: &str) -> Result<DeadLetter, Error> {
    Ok(shown(sessions.dead_letter(caller, id(asked)?).await?))
}

pub(super) async fn retry(sessions: &Sessions, caller: &Caller, asked: &str) -> Result<DeadLetter, Error> {
    Ok(shown(sessions.retry_dead_letter(caller, id(asked)?).await?))
}

pub(super) async fn remove(sessions: &Sessions, caller: &Caller, asked: &str) -> Result<RemoveDeadLetterReply, Error> {
    sessions.remove_dead_letter(caller, id(asked)?).await.map(|()| RemoveDeadLetterReply {})
}

fn id(text: &str) -> Result<Uuid, Error> {
    let wrong = |_| Error::new(Kind::Invalid, "ERR_INVALID_ARGUMENT", format!("{text:?} is no id of a dead letter"));
    Uuid::try_parse(text).map_err(wrong)
}

/// A record that is no message is shown as it lies in the log.
fn shown(letter: dead_letter::DeadLetter) -> DeadLetter {
    let record = &letter.record;
    let raw = DeadLetter {
        id: letter.id.to_string(),
        owner: letter.owner,
        topic: record.topic.to_string(),
        payload: record.payload.clone(),
        size: letter.size,
        sent_at_ms: record.timestamp_ms,
        dead_at: letter.at,
        lost_sessions: u32::try_from(letter.lost_sessions).unwrap_or(u32::MAX),
        ..DeadLetter::default()
    };
    match Envelope::decode(record) {
        Ok(Envelope { source, workspace, kind, payload, .. }) => {
            DeadLetter { source_topic: source, workspace, message_type: kind, payload, ..raw }
        }
        Err(_) => raw,
    }
}

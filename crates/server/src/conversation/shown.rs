//! Messages as they are shown: with links to their files.

use serde::Serialize;
use trunkline_core::conversation::{
    files::{Links, Shown as File},
    state::{Kind, Message, Participant},
};

/// A message. The published fields.
#[derive(Serialize)]
pub(super) struct Shown<'a> {
    id: uuid::Uuid,
    content: &'a str,
    from: Kind,
    turn_number: u64,
    created_at: &'a str,
    participant: Option<&'a Participant>,
    files: Vec<File<'a>>,
}

impl<'a> Shown<'a> {
    pub(super) fn new(message: &'a Message, links: &Links, base: &str, seconds: i64) -> Self {
        Self {
            id: message.id,
            content: &message.content,
            from: message.from,
            turn_number: message.turn_number,
            created_at: &message.created_at,
            participant: message.participant.as_ref(),
            files: links.shown(&message.files, base, seconds),
        }
    }
}

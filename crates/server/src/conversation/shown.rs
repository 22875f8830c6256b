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
    participant: Option<Shows<'a>>,
    files: Vec<File<'a>>,
}

/// A participant. The published fields, which are strings there: what is not known is empty.
#[derive(Serialize)]
struct Shows<'a> {
    id: &'a str,
    kind: Kind,
    name: &'a str,
    photo_url: &'a str,
    initial: &'a str,
}

impl<'a> From<&'a Participant> for Shows<'a> {
    fn from(participant: &'a Participant) -> Self {
        let Participant { id, kind, name, photo_url, initial } = participant;
        let [name, photo_url, initial] = [name, photo_url, initial].map(|text| text.as_deref().unwrap_or_default());
        Self { id, kind: *kind, name, photo_url, initial }
    }
}

impl<'a> Shown<'a> {
    pub(super) fn new(message: &'a Message, links: &Links, base: &str, seconds: i64) -> Self {
        Self {
            id: message.id,
            content: &message.content,
            from: message.from,
            turn_number: message.turn_number,
            created_at: &message.created_at,
            participant: message.participant.as_ref().map(Shows::from),
            files: links.shown(&message.files, base, seconds),
        }
    }
}

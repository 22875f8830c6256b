//! A conversation's records: what happened, with where it stands behind that.

use serde::{Deserialize, Serialize};
use trunkline_store::log::Record;
use uuid::Uuid;

use super::state::{Event, Standing};
use crate::{
    error::{Error, Kind},
    json::Half,
    message::json,
};

/// The length of the standing (2), the standing, the event; both are JSON.
pub(super) fn encode(standing: &Standing, event: &Event) -> Result<Vec<u8>, Error> {
    let (standing, event) = (json(standing)?, json(event)?);
    let mut out = Vec::with_capacity(2 + standing.len() + event.len());
    let length = u16::try_from(standing.len());
    let length = length.map_err(|e| Error::new(Kind::Internal, "ERR_INTERNAL", format!("a standing: {e}")))?;
    out.extend(length.to_be_bytes());
    out.extend(standing);
    out.extend(event);
    Ok(out)
}

fn split(payload: &[u8]) -> Option<(&[u8], &[u8])> {
    let (length, rest) = payload.split_first_chunk()?;
    rest.split_at_checked(usize::from(u16::from_be_bytes(*length)))
}

fn unreadable(record: &Record) -> Error {
    let message = format!("record {} of topic {} is none of a conversation", record.offset, record.topic);
    Error::new(Kind::Internal, "ERR_INTERNAL", message)
}

pub(super) fn event(record: &Record) -> Result<Event, Error> {
    let event = split(&record.payload).and_then(|(_, event)| serde_json::from_slice(event).ok());
    event.ok_or_else(|| unreadable(record))
}

pub(super) fn standing(record: &Record) -> Result<Standing, Error> {
    let standing = split(&record.payload).and_then(|(standing, _)| serde_json::from_slice(standing).ok());
    standing.ok_or_else(|| unreadable(record))
}

/// A piece of what is being said, on the topic beside.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Delta {
    /// Of the message that it will be.
    #[serde(rename = "m")]
    pub message_id: Uuid,
    /// Its place among the message's pieces, from 0.
    #[serde(rename = "n")]
    pub index: u64,
    /// The piece; empty with the end.
    #[serde(rename = "t", default, skip_serializing_if = "String::is_empty")]
    pub text: String,
    /// Half a character at the end of the piece, which is not in its text: the other half is to come. Not shown.
    #[serde(rename = "h", default, skip_serializing_if = "Option::is_none")]
    pub(super) half: Option<Half>,
    /// No piece follows: the message does, or nothing will.
    #[serde(rename = "e", default, skip_serializing_if = "std::ops::Not::not")]
    pub is_end: bool,
    /// Who streams it, and what it calls it. Not shown.
    #[serde(rename = "b")]
    pub(super) by: (String, String),
}

pub(super) fn delta(record: &Record) -> Result<Delta, Error> {
    serde_json::from_slice(&record.payload).map_err(|_| unreadable(record))
}

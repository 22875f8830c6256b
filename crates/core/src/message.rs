//! One principal to a topic: checks, the envelope, one append.

use std::time::Instant;

use bytes::Bytes;
use trunkline_store::log::{Record, Submitted};

use crate::{
    error::{Error, Kind},
    gate::{self, Gate},
    limits::{Limits, PAYLOAD_BYTES_MAX, TokenBucket},
    session::Session,
    topic::{Target, own_lane},
};

/// Version of the envelope's encoding.
const FORMAT: u8 = 1;

/// A message as it lies in the log.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Envelope {
    /// The sender's lane, stamped by the server; empty for senders without one.
    pub source: String,
    /// The workspace that it was sent from; empty for senders without one.
    pub workspace: String,
    /// The published contract's number of the message's type; unknown ones are carried unchanged.
    pub kind: i32,
    /// What was sent, byte for byte.
    pub payload: Bytes,
}

impl Envelope {
    /// Format (1), type (4), lengths of source and workspace (2 each), source, workspace, payload.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let mut out = Vec::with_capacity(9 + self.source.len() + self.workspace.len() + self.payload.len());
        out.push(FORMAT);
        out.extend(self.kind.to_be_bytes());
        out.extend((self.source.len() as u16).to_be_bytes());
        out.extend((self.workspace.len() as u16).to_be_bytes());
        out.extend(self.source.as_bytes());
        out.extend(self.workspace.as_bytes());
        out.extend_from_slice(&self.payload);
        out
    }

    /// Reads an envelope; the payload shares the record's memory.
    ///
    /// # Errors
    /// [`Kind::Internal`] if the record is none.
    pub fn decode(record: &Record) -> Result<Self, Error> {
        let bytes = &record.payload;
        let parse = || {
            let header: [u8; 9] = *bytes.first_chunk()?;
            let [FORMAT, k0, k1, k2, k3, s0, s1, w0, w1] = header else { return None };
            let source_end = 9 + usize::from(u16::from_be_bytes([s0, s1]));
            let workspace_end = source_end + usize::from(u16::from_be_bytes([w0, w1]));
            Some(Self {
                source: String::from_utf8(bytes.get(9..source_end)?.to_vec()).ok()?,
                workspace: String::from_utf8(bytes.get(source_end..workspace_end)?.to_vec()).ok()?,
                kind: i32::from_be_bytes([k0, k1, k2, k3]),
                payload: bytes.slice(workspace_end..),
            })
        };
        parse().ok_or_else(|| {
            let message = format!("record {} of topic {} is no message", record.offset, record.topic);
            Error::new(Kind::Internal, "ERR_INTERNAL", message)
        })
    }
}

/// Sends for one session.
pub struct Sender {
    gate: Gate,
    source: String,
    bucket: Option<TokenBucket>,
}

impl Sender {
    /// A sender for `session`, within `limits`.
    ///
    /// # Errors
    /// None in practice; see [`own_lane`].
    pub fn new(gate: Gate, session: &Session, limits: &Limits) -> Result<Self, Error> {
        let source = own_lane(&session.caller.identity)?.map(|lane| lane.to_string()).unwrap_or_default();
        let bucket = TokenBucket::new(limits.messages_per_second, limits.messages_burst, Instant::now());
        Ok(Self { gate, source, bucket })
    }

    /// Checks a message and queues it. What one session sends to one topic keeps its order. The answer, when awaited,
    /// says that the message is durable.
    ///
    /// # Errors
    /// In the published order and with its codes: `ERR_INVALID_TOPIC`, `ERR_PAYLOAD_TOO_LARGE`, `ERR_RATE_LIMITED`,
    /// `ERR_PERMISSION_DENIED`, `ERR_PUBLISH_FAILED`.
    pub async fn send(
        &mut self,
        session: &Session,
        target: &str,
        kind: i32,
        payload: Bytes,
    ) -> Result<Submitted, Error> {
        let target = Target::parse(target)?;
        if payload.len() > PAYLOAD_BYTES_MAX {
            let size = payload.len();
            let message = format!("message payload size {size} exceeds maximum of {PAYLOAD_BYTES_MAX} bytes");
            return Err(Error::new(Kind::Invalid, "ERR_PAYLOAD_TOO_LARGE", message));
        }
        if let Some(Err(wait)) = self.bucket.as_mut().map(|bucket| bucket.take(Instant::now())) {
            let error = Error::new(Kind::Exhausted, "ERR_RATE_LIMITED", "message rate limit exceeded");
            return Err(Error { retry_after: Some(wait), ..error });
        }
        let permit = self.gate.authorize(&session.caller, gate::Send(&target))?;
        let workspace = session.workspace().unwrap_or_default().to_owned();
        let envelope = Envelope { source: self.source.clone(), workspace, kind, payload };
        self.gate.submit(&permit, envelope.encode()).await.map_err(|error| publish_failed(&error))
    }
}

/// The error of a message that did not become durable.
#[must_use]
pub fn publish_failed(cause: &trunkline_store::log::Error) -> Error {
    tracing::warn!(%cause, "message not appended");
    Error::new(Kind::Unavailable, "ERR_PUBLISH_FAILED", "message delivery failed")
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;
    use trunkline_store::log::{Offset, Record, Topic};

    use super::Envelope;

    fn record(payload: Vec<u8>) -> Record {
        Record { topic: Topic::new("t").unwrap(), offset: Offset(1), timestamp_ms: 0, payload: payload.into() }
    }

    proptest::proptest! {
        #[test]
        fn envelopes_are_decoded_as_encoded(source in ".{0,200}", workspace in ".{0,120}", kind: i32, payload: Vec<u8>) {
            let envelope = Envelope { source, workspace, kind, payload: Bytes::from(payload) };
            proptest::prop_assert_eq!(Envelope::decode(&record(envelope.encode())).unwrap(), envelope);
        }

        #[test]
        fn any_bytes_are_decoded_or_refused(bytes: Vec<u8>) {
            let _ = Envelope::decode(&record(bytes));
        }
    }
}

//! What goes from one principal to another.

use std::{borrow::Cow, collections::HashMap, fmt};

use bytes::Bytes;
use prost::Message as _;
use serde::{Serialize, de::DeserializeOwned};
use trunkline_proto::v1::{
    AuthorizationContext, IncomingMessage, Metric, MetricEntry, PrincipalRef, SendMessage,
    upstream_message::Payload as Up,
};

pub use trunkline_proto::v1::MessageType;

use crate::{
    connection::acks::Ack,
    error::{Error, Kind, Result},
    topic::Topic,
};

/// A message to be sent.
///
/// ```
/// use trunkline_client::{Outgoing, Topic};
/// let message = Outgoing::chat(Topic::agent("prod", "support", "main")?, "Hello");
/// let note = Outgoing::json(Topic::window("alice", "tab-1")?, &serde_json::json!({"status": "done"}))?;
/// # Ok::<(), trunkline_client::Error>(())
/// ```
#[derive(Clone, Debug)]
#[must_use = "a message goes out when it is given to send"]
pub struct Outgoing {
    pub(crate) message: SendMessage,
}

impl Outgoing {
    /// Bytes or text without a type of its own (`OPAQUE`). Up to 1 MiB.
    pub fn new(to: impl Into<Topic>, payload: impl Into<Bytes>) -> Self {
        let message = SendMessage {
            target_topic: to.into().as_str().to_owned(),
            payload: payload.into(),
            message_type: MessageType::Opaque.into(),
            ..SendMessage::default()
        };
        Self { message }
    }

    /// Something that a person reads.
    pub fn chat(to: impl Into<Topic>, text: impl Into<Bytes>) -> Self {
        Self::new(to, text).of(MessageType::Chat)
    }

    /// A value as JSON, without a type of its own.
    ///
    /// # Errors
    /// [`Kind::Invalid`] if the value cannot be written as JSON.
    pub fn json(to: impl Into<Topic>, value: &(impl Serialize + ?Sized)) -> Result<Self> {
        Ok(Self::new(to, to_json(value)?))
    }

    /// With a type.
    pub fn of(mut self, kind: MessageType) -> Self {
        self.message.message_type = kind.into();
        self
    }

    /// On behalf of somebody else, by a grant.
    pub fn authorized(mut self, authorization: impl Into<AuthorizationContext>) -> Self {
        self.message.authorization = Some(Box::new(authorization.into()));
        self
    }

    /// The workspace that the sender acts for, if it lives in none.
    pub fn for_workspace(mut self, workspace: impl Into<String>) -> Self {
        self.message.app_workspace = workspace.into();
        self
    }

    /// A key by which Trunkline knows a message that it has seen. Two messages with the same key are one.
    pub fn once(mut self, key: impl Into<String>) -> Self {
        self.message.idempotency_key = key.into();
        self
    }
}

pub(crate) fn to_json(value: &(impl Serialize + ?Sized)) -> Result<Vec<u8>> {
    serde_json::to_vec(value).map_err(|e| Error::invalid(format!("cannot be written as JSON: {e}")).with_source(e))
}

impl From<Outgoing> for Up {
    fn from(outgoing: Outgoing) -> Self {
        Self::Send(outgoing.message)
    }
}

/// A message that was received.
pub struct Message {
    pub(crate) frame: IncomingMessage,
    pub(crate) ack: Option<Ack>,
    pub(crate) offset: Option<u64>,
}

impl Message {
    /// Who sent it, as the server says: `ag::prod::support::main`. Cannot be forged.
    #[must_use]
    pub fn source(&self) -> &str {
        &self.frame.source_topic
    }

    /// Where an answer goes, if the sender can be answered.
    #[must_use]
    pub fn sender(&self) -> Option<Topic> {
        self.frame.source_topic.parse().ok()
    }

    /// What was sent.
    #[must_use]
    pub fn payload(&self) -> &Bytes {
        &self.frame.payload
    }

    /// The payload as text; what is no UTF-8 is replaced.
    #[must_use]
    pub fn text(&self) -> Cow<'_, str> {
        String::from_utf8_lossy(&self.frame.payload)
    }

    /// The payload, read as JSON.
    ///
    /// # Errors
    /// [`Kind::Invalid`] if it is not what was expected.
    pub fn json<T: DeserializeOwned>(&self) -> Result<T> {
        let read = serde_json::from_slice(&self.frame.payload);
        read.map_err(|e| Error::invalid(format!("a message from {}: {e}", self.source())).with_source(e))
    }

    /// The payload of a metric.
    ///
    /// # Errors
    /// [`Kind::Invalid`] if it is none.
    pub fn metric(&self) -> Result<Metric> {
        let read = Metric::decode(self.frame.payload.clone());
        read.map_err(|e| Error::new(Kind::Invalid, format!("no metric: {e}")).with_source(e))
    }

    /// Its type. One that this library does not know is `MESSAGE_TYPE_UNSPECIFIED`.
    #[must_use]
    pub fn kind(&self) -> MessageType {
        self.frame.message_type()
    }

    /// The workspace that it was sent from.
    #[must_use]
    pub fn workspace(&self) -> &str {
        &self.frame.workspace
    }

    /// On whose behalf it was sent, if not the sender's own.
    #[must_use]
    pub fn on_behalf_of(&self) -> Option<&PrincipalRef> {
        self.frame.on_behalf_subject.as_deref()
    }

    /// What Trunkline says of it beside the payload, such as which conversation it is from.
    #[must_use]
    pub fn about(&self) -> Option<&HashMap<String, String>> {
        self.frame.about.as_deref().map(|about| &about.entries)
    }

    /// Its place in the server's log, if the server says it: Trunkline does.
    #[must_use]
    pub fn offset(&self) -> Option<u64> {
        self.offset
    }

    /// The frame as it came.
    #[must_use]
    pub fn frame(&self) -> &IncomingMessage {
        &self.frame
    }

    /// Says that it is done with. Until then, if the client connected [`at_least_once`](crate::Builder::at_least_once), it comes
    /// again with the next connection, also to another process. A client is given up to 4,096 that it has not acknowledged; then
    /// nothing more until it does. Does nothing otherwise.
    pub fn acknowledge(self) {
        if let Some(ack) = self.ack {
            ack.done();
        }
    }
}

impl fmt::Debug for Message {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let IncomingMessage { source_topic, payload, .. } = &self.frame;
        write!(f, "Message {{ from: {source_topic:?}, type: {:?}, {} bytes }}", self.kind(), payload.len())
    }
}

/// A metric to be sent: additions to counters of the metrics bridge.
///
/// ```
/// use trunkline_client::MetricBuilder;
/// let metric = MetricBuilder::new().trace("t-1").add("tokens", "llm", 1200.0).tag("model", "small").build();
/// assert_eq!(metric.entries[0].qty, 1200.0);
/// ```
#[derive(Clone, Debug, Default)]
#[must_use = "a metric goes out when it is given to send_metric"]
pub struct MetricBuilder {
    metric: Metric,
}

impl MetricBuilder {
    /// An empty one.
    pub fn new() -> Self {
        Self::default()
    }

    /// What it belongs to.
    pub fn trace(mut self, id: impl Into<String>) -> Self {
        self.metric.trace_id = id.into();
        self
    }

    /// One more addition: `qty` is how much more, not how much in all.
    pub fn add(mut self, name: impl Into<String>, kind: impl Into<String>, qty: f64) -> Self {
        self.metric.entries.push(MetricEntry { name: name.into(), kind: kind.into(), qty });
        self
    }

    /// A label.
    pub fn tag(mut self, key: impl Into<String>, value: impl Into<String>) -> Self {
        self.metric.metadata.insert(key.into(), value.into());
        self
    }

    /// When it was measured, in Unix milliseconds.
    pub fn client_timestamp_ms(mut self, ms: i64) -> Self {
        self.metric.client_timestamp_ms = ms;
        self
    }

    /// The metric.
    pub fn build(self) -> Metric {
        self.metric
    }
}

impl From<MetricBuilder> for Metric {
    fn from(builder: MetricBuilder) -> Self {
        builder.metric
    }
}

//! One principal to a topic: checks, the envelope, one append.

use std::{
    collections::BTreeMap,
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    task::{Context, Poll},
    time::Instant,
};

use bytes::Bytes;
use trunkline_store::log::{self, Record, SubmittedEach};

use crate::{
    caller::Caller,
    error::{Error, Kind},
    gate::{self, AsOf, Batch, Gate, SendPermit},
    identity::SEPARATOR,
    limits::{IDEMPOTENCY_KEY_BYTES_MAX, Limits, METRIC_ENTRIES_MAX, METRIC_METADATA_MAX, TokenBucket},
    session::{Session, Sessions},
    task::{Event, Tasks},
    topic::{Target, is_progress, own_lane},
};
use uuid::Uuid;

/// Version of the envelope's encoding.
const FORMAT: u8 = 1;

/// The same, around a notice.
const NOTICE: u8 = 2;

/// An envelope with something about the message before its payload.
const ABOUT: u8 = 3;

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
    /// What the server says about it; most messages speak for themselves.
    pub metadata: BTreeMap<String, String>,
}

impl Envelope {
    fn encode(source: &str, workspace: &str, kind: i32, payload: &[u8]) -> Vec<u8> {
        Self::encode_as(FORMAT, source, workspace, kind, payload)
    }

    /// Format (1), type (4), lengths of source and workspace (2 each), source, workspace, payload.
    fn encode_as(format: u8, source: &str, workspace: &str, kind: i32, payload: &[u8]) -> Vec<u8> {
        let mut out = Vec::with_capacity(9 + source.len() + workspace.len() + payload.len());
        out.push(format);
        out.extend(kind.to_be_bytes());
        out.extend((source.len() as u16).to_be_bytes());
        out.extend((workspace.len() as u16).to_be_bytes());
        out.extend(source.as_bytes());
        out.extend(workspace.as_bytes());
        out.extend_from_slice(payload);
        out
    }

    /// Reads an envelope; the payload shares the record's memory.
    ///
    /// # Errors
    /// [`Kind::Internal`] if the record is none.
    pub fn decode(record: &Record) -> Result<Self, Error> {
        if record.payload.first() != Some(&ABOUT) {
            return Self::decode_as(FORMAT, record);
        }
        let mut envelope = Self::decode_as(ABOUT, record)?;
        let about = envelope.payload.split_first_chunk().and_then(|(length, rest)| {
            let length = u32::from_be_bytes(*length) as usize;
            Some((serde_json::from_slice(rest.get(..length)?).ok()?, 4 + length))
        });
        let (metadata, length) = about.ok_or_else(|| no_message(record))?;
        envelope.metadata = metadata;
        envelope.payload = envelope.payload.slice(length..);
        Ok(envelope)
    }

    /// A message of somebody who has no session, and what the server says about it.
    pub(crate) fn with_metadata(
        source: &str,
        workspace: &str,
        kind: i32,
        payload: &[u8],
        metadata: &BTreeMap<String, String>,
    ) -> Result<Vec<u8>, Error> {
        let metadata = json(metadata)?;
        let mut all = Vec::with_capacity(4 + metadata.len() + payload.len());
        all.extend((metadata.len() as u32).to_be_bytes());
        all.extend(metadata);
        all.extend_from_slice(payload);
        Ok(Self::encode_as(ABOUT, source, workspace, kind, &all))
    }

    fn decode_as(format: u8, record: &Record) -> Result<Self, Error> {
        let bytes = &record.payload;
        let parse = || {
            let header: [u8; 9] = *bytes.first_chunk()?;
            let [found, k0, k1, k2, k3, s0, s1, w0, w1] = header;
            if found != format {
                return None;
            }
            let source_end = 9 + usize::from(u16::from_be_bytes([s0, s1]));
            let workspace_end = source_end + usize::from(u16::from_be_bytes([w0, w1]));
            Some(Self {
                source: String::from_utf8(bytes.get(9..source_end)?.to_vec()).ok()?,
                workspace: String::from_utf8(bytes.get(source_end..workspace_end)?.to_vec()).ok()?,
                kind: i32::from_be_bytes([k0, k1, k2, k3]),
                payload: bytes.slice(workspace_end..),
                metadata: BTreeMap::new(),
            })
        };
        parse().ok_or_else(|| no_message(record))
    }
}

fn no_message(record: &Record) -> Error {
    let message = format!("record {} of topic {} is no message", record.offset, record.topic);
    Error::new(Kind::Internal, "ERR_INTERNAL", message)
}

/// The published contract's number for chat.
pub(crate) const CHAT: i32 = 1;

/// The published contract's number for metrics.
const METRIC: i32 = 5;

/// What of a metric has to hold, read from its bytes by the surface.
#[derive(Clone, Debug, PartialEq)]
pub struct Metric {
    /// Name and quantity of each entry.
    pub entries: Vec<(String, f64)>,
    /// How many keys its metadata has.
    pub metadata_keys: usize,
}

/// Reads a metric; the error is the decoder's.
pub type ReadMetric = fn(&[u8]) -> Result<Metric, String>;

/// Payload bytes after which what was accepted is submitted.
const ACCEPTED_BYTES_MAX: usize = 256 * 1024;

/// Sends what one session has to say, within its rate.
pub struct Sender {
    gate: Gate,
    sessions: Sessions,
    tasks: Tasks,
    source: String,
    bucket: Option<TokenBucket>,
    audit_bucket: Option<TokenBucket>,
    payload_bytes_max: usize,
    read_metric: ReadMetric,
    /// Where the last message went: most who send much send it to one target.
    last: Option<Route>,
    accepted: Batch,
    /// Reports on tasks are among those.
    has_reports: bool,
}

/// Messages that are queued. Resolves, when all that were written are durable, to what those that were not are called, and
/// why. Dropping it takes none of them back.
pub struct Sent {
    keys: Vec<Box<str>>,
    submitted: SubmittedEach,
}

impl Sent {
    /// How many they are.
    #[must_use]
    pub fn count(&self) -> usize {
        self.keys.len()
    }
}

impl Future for Sent {
    type Output = Vec<(Box<str>, log::Error)>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let outcome = std::task::ready!(Pin::new(&mut self.submitted).poll(cx));
        let keys = std::mem::take(&mut self.keys).into_iter();
        Poll::Ready(match outcome {
            Ok(each) => keys.zip(each).filter_map(|(key, outcome)| Some((key, outcome.err()?))).collect(),
            Err(error) => keys.map(|key| (key, error.clone())).collect(),
        })
    }
}

/// A target as a client named it.
struct Route {
    name: String,
    target: Target,
    /// That it may be sent to, as long as that stays so.
    granted: Option<(AsOf, SendPermit)>,
    /// How many were sent there, once one was.
    count: Option<Arc<AtomicU64>>,
}

impl Sender {
    /// A sender for `session`, within `limits`.
    ///
    /// # Errors
    /// None in practice; see [`own_lane`].
    pub fn new(
        sessions: Sessions,
        tasks: Tasks,
        session: &Session,
        limits: &Limits,
        read_metric: ReadMetric,
    ) -> Result<Self, Error> {
        let source = own_lane(&session.caller.identity)?.map(|lane| lane.to_string()).unwrap_or_default();
        let bucket = TokenBucket::new(limits.messages_per_second, limits.message_burst, Instant::now());
        Ok(Self {
            gate: sessions.gate().clone(),
            sessions,
            tasks,
            source,
            bucket,
            audit_bucket: TokenBucket::new(
                limits.audit_events_per_second,
                limits.audit_events_per_second,
                Instant::now(),
            ),
            payload_bytes_max: limits.payload_bytes_max,
            read_metric,
            last: None,
            accepted: Batch::default(),
            has_reports: false,
        })
    }

    /// Checks a message and accepts it, to be submitted together with others. What one session sends to one topic keeps
    /// its order. With a `key`, a second message of that name to the same topic changes nothing for at least a day, and one that
    /// says something else is [not written](not_written).
    ///
    /// # Errors
    /// In the published order and with its codes: `ERR_INVALID_TOPIC`, `ERR_PAYLOAD_TOO_LARGE`, `ERR_RATE_LIMITED`,
    /// `ERR_SV_UNAVAILABLE`, `ERR_PERMISSION_DENIED`, `ERR_METRIC_*`; before them `ERR_INVALID_ARGUMENT` for a key that is
    /// too long.
    pub fn send(&mut self, session: &Session, target: &str, kind: i32, payload: &[u8], key: &str) -> Result<(), Error> {
        if key.len() > IDEMPOTENCY_KEY_BYTES_MAX {
            let message = format!("idempotency_key may have {IDEMPOTENCY_KEY_BYTES_MAX} bytes");
            return Err(Error::new(Kind::Invalid, "ERR_INVALID_ARGUMENT", message));
        }
        let mut route = match self.last.take() {
            Some(last) if last.name == target => last,
            _ => Route { name: target.to_owned(), target: Target::parse(target)?, granted: None, count: None },
        };
        self.check_size("message payload", payload.len())?;
        self.take_token("message rate limit exceeded")?;
        let as_of = self.gate.as_of();
        let is_task = matches!(route.target, Target::TaskMessages { .. });
        let permit = match route.granted.take() {
            // That of a task was asked for just now.
            Some((then, permit)) if then == as_of || is_task => permit,
            _ => self.permit(&session.caller, &route.target)?,
        };
        let mut content_type = None;
        if kind == METRIC || matches!(route.target, Target::Metrics { .. }) {
            let is_credit = if let Some(is_negative) = json_metric(payload) {
                content_type = Some("application/json");
                is_negative?
            } else {
                check_metric((self.read_metric)(payload))?
            };
            if is_credit {
                self.gate.authorize(&session.caller, gate::CreditMetrics)?;
            }
        }
        let declared = match &route.target {
            Target::Events { workspace } | Target::Metrics { workspace } => workspace.as_deref(),
            _ => None,
        };
        let workspace = declared.or(session.workspace()).unwrap_or_default();
        let envelope = match content_type {
            None => Envelope::encode(&self.source, workspace, kind, payload),
            Some(content_type) => {
                let about = BTreeMap::from([("content_type".to_owned(), content_type.to_owned())]);
                Envelope::with_metadata(&self.source, workspace, kind, payload, &about)?
            }
        };
        if key.is_empty() {
            self.accepted.push(&permit, envelope);
        } else {
            let content = log::ContentDigest::of(&[&kind.to_be_bytes(), payload]);
            self.accepted.push_once(&permit, envelope, &session.caller.identity, key, content);
        }
        if let Target::Agent(address) | Target::UniqueTask(address) = &route.target {
            self.tasks.wake_up(&route.name, &address.implementation, &session.caller);
        }
        route.count.get_or_insert_with(|| session.meter.counter(&route.name)).fetch_add(1, Relaxed);
        if !matches!(route.target, Target::AnyService { .. } | Target::TaskMessages { .. }) {
            route.granted = Some((as_of, permit));
        }
        self.last = Some(route);
        Ok(())
    }

    /// Takes account of a message that goes to a conversation and not through here.
    ///
    /// # Errors
    /// `ERR_PAYLOAD_TOO_LARGE`, `ERR_RATE_LIMITED`.
    pub fn take_account(&mut self, bytes: usize) -> Result<(), Error> {
        self.check_size("message payload", bytes)?;
        self.take_token("message rate limit exceeded")
    }

    fn check_size(&self, what: &str, size: usize) -> Result<(), Error> {
        let most = self.payload_bytes_max;
        if size <= most {
            return Ok(());
        }
        let message = format!("{what} size {size} exceeds maximum of {most} bytes");
        Err(Error::new(Kind::Invalid, "ERR_PAYLOAD_TOO_LARGE", message))
    }

    /// To be asked before each message about a task, which is looked up.
    ///
    /// # Errors
    /// `ERR_PERMISSION_DENIED`, also if there is no such task; `ERR_INVALID_TOPIC`; [`Kind::Unavailable`].
    pub async fn open_task(&mut self, session: &Session, target: &str) -> Result<(), Error> {
        let parsed = Target::parse(target)?;
        let Target::TaskMessages { workspace, task } = &parsed else { return Ok(()) };
        let denied = || {
            let message = format!("not authorized to send to topic {target}");
            Error::new(Kind::Denied, "ERR_PERMISSION_DENIED", message)
        };
        let as_of = self.gate.as_of();
        let found = self.tasks.find(*task).await?.filter(|task| task.workspace == *workspace).ok_or_else(denied)?;
        let permit = self.gate.authorize(&session.caller, gate::SayOf(&found)).map_err(|_| denied())?;
        let (name, granted) = (target.to_owned(), Some((as_of, permit)));
        self.last = Some(Route { name, target: parsed, granted, count: None });
        Ok(())
    }

    fn permit(&self, caller: &Caller, target: &Target) -> Result<SendPermit, Error> {
        match target {
            Target::TaskMessages { .. } => {
                Err(Error::new(Kind::Denied, "ERR_PERMISSION_DENIED", "messages about a task are asked for one by one"))
            }
            Target::AnyService { implementation } => {
                self.gate.authorize(caller, gate::Send(&self.sessions.pick_service(implementation)?))
            }
            target => self.gate.authorize(caller, gate::Send(target)),
        }
    }

    /// Checks a report of progress and accepts it, as a message.
    ///
    /// # Errors
    /// `ERR_INVALID_PRINCIPAL`, `ERR_INVALID_ARGUMENT` for a recipient that is none, `ERR_PERMISSION_DENIED`,
    /// `ERR_PAYLOAD_TOO_LARGE`, `ERR_RATE_LIMITED`.
    pub fn report(&mut self, session: &Session, recipient: &str, body: &[u8]) -> Result<(), Error> {
        let permit = self.gate.authorize(&session.caller, gate::Report { recipient, home: session.workspace() })?;
        self.check_size("progress report", body.len())?;
        self.take_token("progress report rate limit exceeded")?;
        let workspace = session.workspace().unwrap_or_default();
        let progress = Progress::encode(&self.source, workspace, recipient, body);
        self.accepted.push(&permit, progress);
        Ok(())
    }

    /// Adds what a party of a task reports to the task's events; from anybody else it is none of the task's.
    ///
    /// # Errors
    /// [`Kind::Unavailable`].
    pub async fn report_on(&mut self, session: &Session, task: &str, event: Event) -> Result<(), Error> {
        let task = match self.tasks.get(&session.caller, task).await {
            Err(error) if error.kind == Kind::NotFound => return Ok(()),
            found => found?,
        };
        if let Ok(permit) = self.gate.authorize(&session.caller, gate::ReportOn(&task)) {
            self.accepted.push(&permit, self.tasks.event(&task, event)?);
            self.has_reports = true;
            // It was accepted all the same.
            if let Err(error) = self.tasks.reported(&session.caller, &task).await {
                tracing::warn!(%error, task = %task.id, "that its worker reported is not noted");
            }
        }
        Ok(())
    }

    /// Whether what was accepted should be submitted before more is.
    #[must_use]
    pub fn is_full(&self) -> bool {
        self.accepted.bytes() >= ACCEPTED_BYTES_MAX
    }

    /// Queues what was accepted since the last time. What it resolves to says what became durable.
    ///
    /// # Errors
    /// With what the lost messages are called, for each of which the sender is told why it was [`not_written`].
    pub async fn submit(&mut self) -> Result<Option<Sent>, (Vec<Box<str>>, log::Error)> {
        let mut batch = std::mem::take(&mut self.accepted);
        let keys = batch.take_keys();
        if keys.is_empty() {
            return Ok(None);
        }
        // What became of a task before it is reported on comes before the report.
        if std::mem::take(&mut self.has_reports) {
            self.gate.outbox_relayed().await;
        }
        match self.gate.submit(batch).await {
            Ok(submitted) => Ok(Some(Sent { keys, submitted })),
            Err(error) => Err((keys, error)),
        }
    }

    /// Takes account of one audit event.
    ///
    /// # Errors
    /// `ERR_AUDIT_RATE_LIMITED`, with how long to wait.
    pub fn take_audit_token(&mut self) -> Result<(), Error> {
        let code = "ERR_AUDIT_RATE_LIMITED";
        take(self.audit_bucket.as_mut(), code, "foreign audit submission rate limit exceeded").map_err(|error| {
            // The reply has no place of its own for it.
            let wait = error.retry_after.unwrap_or_default().as_millis();
            Error { message: format!("{error}; retry after {wait} ms").into(), ..error }
        })
    }

    /// Takes account of a new task, which counts as a message: without a bound, one connection could fill the ledger as fast
    /// as its disk takes it.
    ///
    /// # Errors
    /// `ERR_RATE_LIMITED`, with how long to wait.
    pub fn take_task_token(&mut self) -> Result<(), Error> {
        self.take_token("task rate limit exceeded")
    }

    fn take_token(&mut self, refusal: &'static str) -> Result<(), Error> {
        take(self.bucket.as_mut(), "ERR_RATE_LIMITED", refusal)
    }
}

fn take(bucket: Option<&mut TokenBucket>, code: &'static str, refusal: &'static str) -> Result<(), Error> {
    match bucket.map(|bucket| bucket.take(Instant::now())) {
        Some(Err(wait)) => Err(Error { retry_after: Some(wait), ..Error::new(Kind::Exhausted, code, refusal) }),
        _ => Ok(()),
    }
}

/// Whether a number in a metric that is JSON is negative; nothing if it is no JSON object or list. No `Metric` is one.
fn json_metric(payload: &[u8]) -> Option<Result<bool, Error>> {
    let first = payload.iter().find(|byte| !byte.is_ascii_whitespace())?;
    let Signs { is_negative, is_empty } = match first {
        b'{' | b'[' => serde_json::from_slice(payload).ok()?,
        _ => return None,
    };
    let empty = || Error::new(Kind::Invalid, "ERR_METRIC_EMPTY", "metric must include at least one entry");
    Some(if is_empty { Err(empty()) } else { Ok(is_negative) })
}

/// What is looked for in JSON, without keeping any of it.
#[derive(Clone, Copy, Default)]
struct Signs {
    is_negative: bool,
    is_empty: bool,
}

impl<'de> serde::Deserialize<'de> for Signs {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(LookForSigns)
    }
}

struct LookForSigns;

impl<'de> serde::de::Visitor<'de> for LookForSigns {
    type Value = Signs;

    fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("JSON")
    }

    fn visit_bool<E>(self, _: bool) -> Result<Signs, E> {
        Ok(Signs::default())
    }

    fn visit_i64<E>(self, number: i64) -> Result<Signs, E> {
        Ok(Signs { is_negative: number < 0, ..Signs::default() })
    }

    fn visit_u64<E>(self, _: u64) -> Result<Signs, E> {
        Ok(Signs::default())
    }

    fn visit_f64<E>(self, number: f64) -> Result<Signs, E> {
        Ok(Signs { is_negative: number < 0.0, ..Signs::default() })
    }

    fn visit_str<E>(self, _: &str) -> Result<Signs, E> {
        Ok(Signs::default())
    }

    fn visit_unit<E>(self) -> Result<Signs, E> {
        Ok(Signs::default())
    }

    fn visit_seq<A: serde::de::SeqAccess<'de>>(self, mut all: A) -> Result<Signs, A::Error> {
        let mut found = Signs { is_empty: true, ..Signs::default() };
        while let Some(Signs { is_negative, .. }) = all.next_element()? {
            found = Signs { is_negative: found.is_negative || is_negative, is_empty: false };
        }
        Ok(found)
    }

    fn visit_map<A: serde::de::MapAccess<'de>>(self, mut all: A) -> Result<Signs, A::Error> {
        let mut found = Signs { is_empty: true, ..Signs::default() };
        while let Some((serde::de::IgnoredAny, Signs { is_negative, .. })) = all.next_entry()? {
            found = Signs { is_negative: found.is_negative || is_negative, is_empty: false };
        }
        Ok(found)
    }
}

/// Checks a metric's shape; answers whether it takes something back.
fn check_metric(metric: Result<Metric, String>) -> Result<bool, Error> {
    let refused = |code, message: String| Err(Error::new(Kind::Invalid, code, message));
    let Metric { entries, metadata_keys } = match metric {
        Ok(metric) => metric,
        Err(why) => return refused("ERR_METRIC_INVALID", format!("metric payload is not a valid Metric proto: {why}")),
    };
    if entries.is_empty() {
        return refused("ERR_METRIC_EMPTY", "metric must include at least one entry".to_owned());
    }
    if entries.len() > METRIC_ENTRIES_MAX {
        return refused("ERR_METRIC_EMPTY", format!("metric exceeds maximum of {METRIC_ENTRIES_MAX} entries"));
    }
    if metadata_keys > METRIC_METADATA_MAX {
        let message = format!("metric metadata exceeds maximum of {METRIC_METADATA_MAX} keys");
        return refused("ERR_METRIC_INVALID", message);
    }
    for (index, (name, quantity)) in entries.iter().enumerate() {
        if name.is_empty() {
            return refused("ERR_METRIC_INVALID_ENTRY", format!("metric entry {index} has empty name"));
        }
        if !quantity.is_finite() {
            return refused("ERR_METRIC_INVALID_ENTRY", format!("metric entry {index} ({name:?}) has non-finite qty"));
        }
    }
    Ok(entries.iter().any(|(_, quantity)| *quantity < 0.0))
}

/// A report of progress as it lies in the log.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Progress {
    /// The sender's lane, stamped by the server.
    pub source: String,
    /// The workspace that it was sent from.
    pub workspace: String,
    /// For whom among those who hear it: a lane, a user over all windows, or empty for all.
    pub recipient: String,
    /// What was reported, as the surface encodes it.
    pub body: Bytes,
}

impl Progress {
    /// An envelope whose payload is the recipient, with its length (2) before it, and the body.
    fn encode(source: &str, workspace: &str, recipient: &str, body: &[u8]) -> Vec<u8> {
        let mut payload = Vec::with_capacity(2 + recipient.len() + body.len());
        payload.extend((recipient.len() as u16).to_be_bytes());
        payload.extend(recipient.as_bytes());
        payload.extend_from_slice(body);
        Envelope::encode(source, workspace, 0, &payload)
    }

    /// Reads a report; the body shares the record's memory.
    ///
    /// # Errors
    /// [`Kind::Internal`] if the record is none.
    pub fn decode(record: &Record) -> Result<Self, Error> {
        let Envelope { source, workspace, payload, .. } = Envelope::decode(record)?;
        let parse = || {
            let end = 2 + usize::from(u16::from_be_bytes(*payload.first_chunk()?));
            let recipient = String::from_utf8(payload.get(2..end)?.to_vec()).ok()?;
            Some(Self { source, workspace, recipient, body: payload.slice(end..) })
        };
        parse().ok_or_else(|| {
            let message = format!("record {} of topic {} is no progress", record.offset, record.topic);
            Error::new(Kind::Internal, "ERR_INTERNAL", message)
        })
    }

    /// Whether the principal with this lane is meant: never the sender itself.
    #[must_use]
    pub fn is_for(&self, lane: &str) -> bool {
        let to_user = || {
            let window = lane.strip_prefix(self.recipient.as_str());
            self.recipient.starts_with("us::") && window.is_some_and(|window| window.starts_with(SEPARATOR))
        };
        self.source != lane && (self.recipient.is_empty() || self.recipient == lane || to_user())
    }
}

/// What the server tells the creator of a task, on its own lane.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Notice {
    /// Which task.
    pub task: Uuid,
    /// The word of the status that it has now.
    pub state: String,
    /// The same, for people.
    pub summary: String,
    /// Whom it is for, as a lane, or as a user over all windows.
    pub recipient: String,
    /// What else its reader needs.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub metadata: BTreeMap<String, String>,
}

impl Notice {
    pub(crate) fn encode(&self, workspace: &str) -> Result<Vec<u8>, Error> {
        Ok(Envelope::encode_as(NOTICE, "", workspace, 0, &json(self)?))
    }
}

/// What the server says, as JSON.
pub(crate) fn json<T: serde::Serialize>(said: &T) -> Result<Vec<u8>, Error> {
    serde_json::to_vec(said).map_err(|e| Error::new(Kind::Internal, "ERR_INTERNAL", e.to_string()))
}

/// A message of the server's own.
pub(crate) fn server_envelope(workspace: &str, kind: i32, payload: &[u8]) -> Vec<u8> {
    Envelope::encode("", workspace, kind, payload)
}

/// What a record of a lane is.
#[derive(Clone, Debug, PartialEq)]
pub enum Said {
    /// A message.
    Message(Envelope),
    /// A report of progress.
    Progress(Progress),
    /// The server's word on a task, and the task's workspace.
    Notice(Notice, String),
}

/// Reads a record of a lane.
///
/// # Errors
/// [`Kind::Internal`] if the record is none of them.
pub fn decode(record: &Record) -> Result<Said, Error> {
    if record.payload.first() == Some(&NOTICE) {
        let Envelope { workspace, payload, .. } = Envelope::decode_as(NOTICE, record)?;
        let unreadable = |e: serde_json::Error| Error::new(Kind::Internal, "ERR_INTERNAL", format!("notice: {e}"));
        return Ok(Said::Notice(serde_json::from_slice(&payload).map_err(unreadable)?, workspace));
    }
    if is_progress(&record.topic) {
        return Progress::decode(record).map(Said::Progress);
    }
    Envelope::decode(record).map(Said::Message)
}

/// The error of a message that did not become durable.
#[must_use]
pub fn publish_failed() -> Error {
    Error::new(Kind::Unavailable, "ERR_PUBLISH_FAILED", "message delivery failed")
}

/// What the sender of a message is told that was accepted and is not in the log.
#[must_use]
pub fn not_written(error: &log::Error) -> Error {
    match error {
        log::Error::DedupReused { .. } => error.clone().into(),
        _ => publish_failed(),
    }
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;
    use trunkline_store::log::{Offset, Record, Topic};

    use super::{BTreeMap, Envelope};

    fn record(payload: Vec<u8>) -> Record {
        Record { topic: Topic::new("t").unwrap(), offset: Offset(1), timestamp_ms: 0, payload: payload.into() }
    }

    proptest::proptest! {
        #[test]
        fn envelopes_are_decoded_as_encoded(source in ".{0,200}", workspace in ".{0,120}", kind: i32, payload: Vec<u8>) {
            let encoded = Envelope::encode(&source, &workspace, kind, &payload);
            let about = [("key".to_owned(), source.clone())].into();
            let with = Envelope::with_metadata(&source, &workspace, kind, &payload, &about).unwrap();
            let mut envelope =
                Envelope { source, workspace, kind, payload: Bytes::from(payload), metadata: BTreeMap::new() };
            proptest::prop_assert_eq!(&Envelope::decode(&record(encoded)).unwrap(), &envelope);
            envelope.metadata = about;
            proptest::prop_assert_eq!(Envelope::decode(&record(with)).unwrap(), envelope);
        }

        #[test]
        fn any_bytes_are_decoded_or_refused(bytes: Vec<u8>) {
            let _ = Envelope::decode(&record(bytes));
        }
    }
}

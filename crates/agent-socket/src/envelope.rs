//! What is said: one JSON object a frame.

use std::{
    borrow::Cow,
    fmt,
    str::FromStr,
    time::{SystemTime, UNIX_EPOCH},
};

use serde::{
    Deserialize, Deserializer, Serialize,
    de::{DeserializeOwned, MapAccess, Visitor},
};
use serde_json::{Map, Value, value::RawValue};

/// What every envelope says that it is.
pub const PROTOCOL: &str = "agent-socket";

/// The version of the protocol that is spoken here.
pub const VERSION: u64 = 1;

/// Largest number that a browser reads as it was written.
pub const NUMBER_MAX: u64 = (1 << 53) - 1;

macro_rules! types {
    ($($name:ident = $word:literal, $doc:literal;)*) => {
        /// What an envelope is. The set is closed.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
        pub enum Type {
            $(#[doc = $doc] $name,)*
        }

        impl Type {
            /// All of them.
            pub const ALL: &[Self] = &[$(Self::$name),*];

            /// As it is written.
            #[must_use]
            pub fn as_str(self) -> &'static str {
                match self { $(Self::$name => $word,)* }
            }
        }

        impl FromStr for Type {
            type Err = ();

            fn from_str(word: &str) -> Result<Self, ()> {
                match word { $($word => Ok(Self::$name),)* _ => Err(()) }
            }
        }
    };
}

types! {
    Hello = "hello", "A client comes.";
    Welcome = "welcome", "It is let in.";
    Heartbeat = "heartbeat", "Somebody is still there.";
    Ack = "ack", "Everything up to `ack` was had.";
    StateRequest = "state_request", "How is it?";
    StateSnapshot = "state_snapshot", "So it is.";
    ReplayRequest = "replay_request", "What was missed?";
    ReplayEvents = "replay_events", "This was.";
    TurnStart = "turn_start", "A turn begins, or is to begin.";
    TurnQueued = "turn_queued", "It waits.";
    TurnRunning = "turn_running", "It runs.";
    TurnPhase = "turn_phase", "It is in another phase.";
    TurnTextDelta = "turn_text_delta", "A piece of its text.";
    TurnDone = "turn_done", "It ended well.";
    TurnError = "turn_error", "It failed.";
    TurnAborted = "turn_aborted", "It was stopped, or is to be.";
    TurnLost = "turn_lost", "Nobody knows what became of it.";
    ToolStart = "tool_start", "A tool runs.";
    ToolWaitingApproval = "tool_waiting_approval", "It waits for somebody's approval.";
    ToolResult = "tool_result", "It is done.";
    ToolFailed = "tool_failed", "It failed.";
    ToolLost = "tool_lost", "Nobody knows what became of it.";
    ToolRetryAvailable = "tool_retry_available", "It may be tried again.";
    ApprovalRequest = "approval_request", "Somebody is asked.";
    ApprovalResolve = "approval_resolve", "Somebody answers.";
    ApprovalResult = "approval_result", "What came of the answer.";
    AttachmentUploading = "attachment_uploading", "A file is on its way.";
    AttachmentReady = "attachment_ready", "It is there.";
    AttachmentError = "attachment_error", "It is not.";
    RuntimeGenerationChanged = "runtime_generation_changed", "The runtime was started again.";
    RuntimeRecovered = "runtime_recovered", "It goes on where it was.";
}

impl Type {
    /// Whether it is an event: kept, numbered, replayed. The others are said once.
    #[must_use]
    pub fn is_event(self) -> bool {
        self > Self::ReplayEvents
    }

    /// Whether a turn is over with it.
    #[must_use]
    pub fn ends_turn(self) -> bool {
        matches!(self, Self::TurnDone | Self::TurnError | Self::TurnAborted | Self::TurnLost)
    }
}

impl fmt::Display for Type {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// One of them. Its payload and the fields that this version does not know are kept as they came.
#[derive(Clone, Debug)]
pub struct Envelope {
    /// What it is. `type` on the wire.
    pub kind: Type,
    /// Whose stream it is in.
    pub client_id: Option<String>,
    /// Which of its sockets, where that matters.
    pub socket_id: Option<String>,
    /// The runtime that says it.
    pub runtime_generation: Option<String>,
    /// The turn that it is about.
    pub turn_id: Option<String>,
    /// The tool's run or the question that it is about.
    pub operation_id: Option<String>,
    /// Of an event that a client says: by which the server takes it once, however often it is said. Of an `ack`: that one.
    pub request_id: Option<String>,
    /// Its number in the client's stream: larger than all before.
    pub seq: Option<u64>,
    /// The number up to which everything was had.
    pub ack: Option<u64>,
    /// When it was made, in Unix milliseconds.
    pub ts: i64,
    /// What it says.
    pub payload: Option<Box<RawValue>>,
    /// Fields that this version does not know.
    pub extra: Extra,
}

impl PartialEq for Envelope {
    fn eq(&self, other: &Self) -> bool {
        let payload = |envelope: &Self| envelope.payload.as_ref().map(|payload| payload.get().to_owned());
        self.kind == other.kind
            && self.client_id == other.client_id
            && self.socket_id == other.socket_id
            && self.runtime_generation == other.runtime_generation
            && self.turn_id == other.turn_id
            && self.operation_id == other.operation_id
            && self.request_id == other.request_id
            && (self.seq, self.ack, self.ts) == (other.seq, other.ack, other.ts)
            && payload(self) == payload(other)
            && self.extra == other.extra
    }
}

/// Fields that this version does not know, passed on as they came.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Extra(
    /// `,"name":value` for each.
    String,
);

impl Extra {
    /// One of them.
    #[must_use]
    pub fn get(&self, name: &str) -> Option<Value> {
        if self.0.is_empty() {
            return None;
        }
        let fields: Map<String, Value> = serde_json::from_str(&format!("{{{}}}", &self.0[1..])).ok()?;
        fields.get(name).cloned()
    }

    /// Takes out those of these names.
    pub fn remove(&mut self, names: &[&str]) {
        if self.0.is_empty() {
            return;
        }
        let fields: Map<String, Value> = serde_json::from_str(&format!("{{{}}}", &self.0[1..])).unwrap_or_default();
        if names.iter().any(|name| fields.contains_key(*name)) {
            self.0.clear();
            for (name, value) in fields.iter().filter(|(name, _)| !names.contains(&name.as_str())) {
                self.add(name, value);
            }
        }
    }

    /// Adds one that is not there.
    pub fn add(&mut self, name: &str, value: &Value) {
        self.0.push(',');
        push_text(&mut self.0, name);
        self.0.push(':');
        self.0.push_str(&value.to_string());
    }
}

/// Why a frame is no envelope.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ParseError {
    /// It is no JSON object at all.
    #[error("the frame is no JSON object: {0}")]
    NoObject(String),
    /// It is of another protocol.
    #[error("protocol: not {PROTOCOL:?}")]
    Protocol,
    /// It is of a version that is not spoken here.
    #[error("version: not {VERSION}")]
    Version,
    /// A field is not what it has to be.
    #[error("{field}: {why}")]
    Field {
        /// Which one.
        field: &'static str,
        /// What is wrong with it.
        why: String,
    },
}

/// Fields of an envelope besides its type and payload.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Meta {
    /// Whose stream it is in.
    pub client_id: Option<String>,
    /// The turn that it is about.
    pub turn_id: Option<String>,
    /// The tool's run or the question that it is about.
    pub operation_id: Option<String>,
    /// Its number.
    pub seq: Option<u64>,
    /// The number up to which everything was had.
    pub ack: Option<u64>,
    /// The runtime that says it.
    pub runtime_generation: Option<String>,
    /// When it was made, in Unix milliseconds; now, if nothing is said.
    pub ts: Option<i64>,
}

impl Meta {
    /// About a turn.
    #[must_use]
    pub fn turn(id: impl Into<String>) -> Self {
        Self { turn_id: Some(id.into()), ..Self::default() }
    }

    /// About a tool's run or a question.
    #[must_use]
    pub fn operation(id: impl Into<String>) -> Self {
        Self { operation_id: Some(id.into()), ..Self::default() }
    }
}

/// Makes an envelope.
///
/// # Errors
/// If the payload is no JSON: a map whose keys are no text, say.
pub fn make(kind: Type, payload: &impl Serialize, meta: Meta) -> Result<Envelope, serde_json::Error> {
    let payload = serde_json::value::to_raw_value(payload)?;
    let Meta { client_id, turn_id, operation_id, seq, ack, runtime_generation, ts } = meta;
    Ok(Envelope {
        client_id,
        turn_id,
        operation_id,
        seq,
        ack,
        runtime_generation,
        ts: ts.unwrap_or_else(now_ms),
        payload: (payload.get() != "null").then_some(payload),
        ..Envelope::new(kind)
    })
}

/// Reads an envelope from a frame, text or bytes.
///
/// Allocates at most as many bytes as the frame has, a few times: what a field says is kept once.
///
/// # Errors
/// [`ParseError`], which names the field.
pub fn parse(frame: &[u8]) -> Result<Envelope, ParseError> {
    let text = str::from_utf8(frame).map_err(|e| ParseError::NoObject(e.to_string()))?;
    // The parser would repeat whatever else it is.
    if !text.trim_ascii_start().starts_with('{') {
        return Err(ParseError::NoObject("it begins otherwise".to_owned()));
    }
    let wire: Wire<'_> = serde_json::from_str(text).map_err(|e| ParseError::NoObject(e.to_string()))?;
    wire.check()
}

/// Writes an envelope as the text of one frame.
#[must_use]
pub fn serialize(envelope: &Envelope) -> String {
    envelope.to_json()
}

impl Envelope {
    /// An envelope that says nothing but what it is, now.
    #[must_use]
    pub fn new(kind: Type) -> Self {
        Self {
            kind,
            client_id: None,
            socket_id: None,
            runtime_generation: None,
            turn_id: None,
            operation_id: None,
            request_id: None,
            seq: None,
            ack: None,
            ts: now_ms(),
            payload: None,
            extra: Extra::default(),
        }
    }

    /// The same with a payload. What cannot be written as JSON is none.
    #[must_use]
    pub fn with(mut self, payload: &impl Serialize) -> Self {
        self.payload = serde_json::value::to_raw_value(payload).ok();
        self
    }

    /// What it says, as JSON; null if it says nothing, or nothing that can be read.
    #[must_use]
    pub fn value(&self) -> Value {
        self.read().unwrap_or_default()
    }

    /// What it says, read.
    #[must_use]
    pub fn read<T: DeserializeOwned>(&self) -> Option<T> {
        self.payload.as_ref().and_then(|payload| serde_json::from_str(payload.get()).ok())
    }

    /// As one frame.
    #[must_use]
    pub fn to_json(&self) -> String {
        let mut out = String::with_capacity(192 + self.payload.as_ref().map_or(0, |payload| payload.get().len()));
        self.begin(&mut out);
        self.body(&mut out);
        out
    }

    /// Its first part: what tells whose it is and where it stands. [`Envelope::body`] is the rest.
    pub fn begin(&self, out: &mut String) {
        begin(out, self.client_id.as_deref(), self.socket_id.as_deref());
        for (name, number) in [(",\"seq\":", self.seq), (",\"ack\":", self.ack)] {
            if let Some(number) = number {
                out.push_str(name);
                out.push_str(&number.to_string());
            }
        }
    }

    /// Its second part, which is the same for whomever it is sent to: `,"type":…}`.
    pub fn body(&self, out: &mut String) {
        // Known words need no escapes.
        out.extend([",\"type\":\"", self.kind.as_str(), "\""]);
        for (name, text) in [
            (",\"runtimeGeneration\":", &self.runtime_generation),
            (",\"turnId\":", &self.turn_id),
            (",\"operationId\":", &self.operation_id),
            (",\"requestId\":", &self.request_id),
        ] {
            if let Some(text) = text {
                out.push_str(name);
                push_text(out, text);
            }
        }
        out.push_str(",\"ts\":");
        out.push_str(&self.ts.to_string());
        if let Some(payload) = &self.payload {
            out.push_str(",\"payload\":");
            out.push_str(payload.get());
        }
        out.push_str(&self.extra.0);
        out.push('}');
    }
}

/// The first part of every envelope for somebody.
pub fn begin(out: &mut String, client_id: Option<&str>, socket_id: Option<&str>) {
    out.push_str("{\"protocol\":\"agent-socket\",\"version\":1");
    for (name, text) in [(",\"clientId\":", client_id), (",\"socketId\":", socket_id)] {
        if let Some(text) = text {
            out.push_str(name);
            push_text(out, text);
        }
    }
}

fn push_text(out: &mut String, text: &str) {
    if text.bytes().all(|byte| byte >= b' ' && byte != b'"' && byte != b'\\') {
        return out.extend(["\"", text, "\""]);
    }
    // Text can always be written.
    out.push_str(&serde_json::to_string(text).unwrap_or_default());
}

/// Unix milliseconds.
pub(crate) fn now_ms() -> i64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    i64::try_from(since.as_millis()).unwrap_or(i64::MAX)
}

/// The fields as they stand in the frame.
#[derive(Default)]
struct Wire<'a> {
    known: [Option<&'a RawValue>; FIELDS.len()],
    extra: String,
}

const FIELDS: [&str; 13] = [
    "protocol",
    "version",
    "type",
    "clientId",
    "socketId",
    "runtimeGeneration",
    "turnId",
    "operationId",
    "requestId",
    "seq",
    "ack",
    "ts",
    "payload",
];

impl<'de> Deserialize<'de> for Wire<'de> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Fields;
        impl<'de> Visitor<'de> for Fields {
            type Value = Wire<'de>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an envelope")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Wire<'de>, A::Error> {
                let mut wire = Wire::default();
                while let Some(Name(name)) = map.next_key()? {
                    let value: &RawValue = map.next_value()?;
                    // Of two with one name the later counts, as in browsers.
                    match place(&name) {
                        Some(at) => wire.known[at] = Some(value).filter(|value| value.get() != "null"),
                        None => {
                            wire.extra.push(',');
                            push_text(&mut wire.extra, &name);
                            wire.extra.extend([":", value.get()]);
                        }
                    }
                }
                Ok(wire)
            }
        }
        deserializer.deserialize_map(Fields)
    }
}

/// Where a field stands among the known ones: by its length first, which tells most apart.
fn place(name: &str) -> Option<usize> {
    FIELDS.iter().position(|known| known.len() == name.len() && *known == name)
}

#[derive(Deserialize)]
struct Name<'a>(#[serde(borrow)] Cow<'a, str>);

impl Wire<'_> {
    fn check(self) -> Result<Envelope, ParseError> {
        let [protocol, version, kind, client_id, socket_id, generation, turn_id, operation_id, request_id, ..] =
            self.known;
        let [.., seq, ack, ts, payload] = self.known;
        if protocol.and_then(words).is_none_or(|name| name != PROTOCOL) {
            return Err(ParseError::Protocol);
        }
        // It may be written as 1.0.
        if version.is_none_or(|version| version.get() != "1" && read::<f64>(version) != Some(VERSION as f64)) {
            return Err(ParseError::Version);
        }
        let kind = kind.ok_or_else(|| wrong("type", "missing"))?;
        let kind = words(kind).ok_or_else(|| wrong("type", "no text"))?;
        let kind = kind.parse().map_err(|()| wrong("type", &format!("{kind:?} is none of the protocol's types")))?;
        let ts = ts.ok_or_else(|| wrong("ts", "missing"))?;
        Ok(Envelope {
            kind,
            client_id: text("clientId", client_id)?,
            socket_id: text("socketId", socket_id)?,
            runtime_generation: text("runtimeGeneration", generation)?,
            turn_id: text("turnId", turn_id)?,
            operation_id: text("operationId", operation_id)?,
            request_id: text("requestId", request_id)?,
            seq: number("seq", seq)?,
            ack: number("ack", ack)?,
            // Some clocks tell fractions.
            ts: whole(ts).or_else(|| read::<f64>(ts).map(|ts| ts as i64)).ok_or_else(|| wrong("ts", "no number"))?,
            payload: payload.map(ToOwned::to_owned),
            extra: Extra(self.extra),
        })
    }
}

/// Text; most has no escapes, and then needs no parser.
fn words(raw: &RawValue) -> Option<Cow<'_, str>> {
    let plain = raw.get().strip_prefix('"').and_then(|text| text.strip_suffix('"'));
    match plain.filter(|text| !text.contains('\\')) {
        Some(plain) => Some(Cow::Borrowed(plain)),
        None => read(raw),
    }
}

/// A whole number; most are written as digits, and then need no parser.
fn whole<T: FromStr + for<'a> Deserialize<'a>>(raw: &RawValue) -> Option<T> {
    match raw.get() {
        digits if digits.bytes().all(|byte| byte.is_ascii_digit()) => digits.parse().ok(),
        _ => read(raw),
    }
}

fn read<'a, T: Deserialize<'a>>(raw: &'a RawValue) -> Option<T> {
    serde_json::from_str(raw.get()).ok()
}

fn wrong(field: &'static str, why: &str) -> ParseError {
    ParseError::Field { field, why: why.to_owned() }
}

fn text(field: &'static str, raw: Option<&RawValue>) -> Result<Option<String>, ParseError> {
    raw.map(|raw| words(raw).map(Cow::into_owned).ok_or_else(|| wrong(field, "no text"))).transpose()
}

fn number(field: &'static str, raw: Option<&RawValue>) -> Result<Option<u64>, ParseError> {
    let read = |raw: &RawValue| {
        let number = whole::<u64>(raw).filter(|number| *number <= NUMBER_MAX);
        number.ok_or_else(|| wrong(field, "no whole number from 0 to 2^53-1"))
    };
    raw.map(read).transpose()
}

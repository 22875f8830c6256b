//! The server's side of one socket, without the socket: what may be said when, and how what is sent is cut. Pure; time is
//! given to it, as milliseconds of any clock that does not go back.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use serde_json::{
    json,
    value::{RawValue, to_raw_value},
};

use crate::{
    close::{Close, code},
    envelope::{Envelope, Type, VERSION, parse},
};

/// What both sides of a socket agree to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Terms {
    /// How long the first frame, `hello`, may take.
    pub hello_ms: u64,
    /// Whoever has said nothing for so long sends a heartbeat.
    pub heartbeat_ms: u64,
    /// Largest frame, either way, in bytes.
    pub frame_bytes_max: usize,
    /// Events of one answer to a request for replay, if the request does not say less.
    pub replay_events_max: usize,
    /// Text that pieces are joined to for somebody who does not keep up, in bytes.
    pub joined_bytes_max: usize,
}

impl Default for Terms {
    fn default() -> Self {
        Self {
            hello_ms: 10_000,
            heartbeat_ms: 15_000,
            frame_bytes_max: 1024 * 1024,
            replay_events_max: 10_000,
            joined_bytes_max: 16 * 1024,
        }
    }
}

/// Heartbeats of silence after which the other side is gone.
pub const SILENT_BEATS: u64 = 3;

/// Fields that a server adds to what it passes on, and the bytes that it may add, ids included.
const ADDED: [&str; 3] = ["ask", "prev", "joined"];
const ADDED_BYTES_MAX: usize = 4 * 1024;

/// Longest id of a client, a socket, a turn or an operation, in bytes.
pub const ID_BYTES_MAX: usize = 256;

/// As what somebody comes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Role {
    /// It shows a client's stream.
    #[default]
    Ui,
    /// It runs turns of clients.
    Runtime,
}

/// What a `hello` says.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Hello {
    /// The last event that the client saw.
    pub last_seen_seq: Option<u64>,
    /// The runtime that it knows; or, of a runtime, its own.
    pub runtime_generation: Option<String>,
    /// As what it comes.
    #[serde(skip_serializing_if = "is_ui")]
    pub role: Role,
    /// Versions that it speaks besides that of the envelope.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub versions: Vec<u64>,
    /// Of a UI at a Trunkline server: the agent that is to be its runtime.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub agent: Option<String>,
    /// Of a runtime: turns that it goes on with, though its generation is new.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub recovered_turns: Vec<String>,
}

fn is_ui(role: &Role) -> bool {
    *role == Role::Ui
}

/// What a `welcome` says.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Welcome {
    /// The version that is spoken from here on: the highest that both know.
    pub version: u64,
    /// The last event of the client's stream; what comes without being asked for comes behind it. Servers of other makes may
    /// not say.
    pub latest_seq: Option<u64>,
    /// The heartbeat's interval, and the silence that ends the socket.
    pub heartbeat_ms: u64,
    /// See [`Welcome::heartbeat_ms`].
    pub silence_ms: u64,
    /// Largest frame, either way.
    pub frame_bytes_max: u64,
    /// It answers requests that have a `requestId` with an `ack` of it, and takes each once.
    pub acks_requests: bool,
}

/// What a `replay_request` asks for: events behind `since`, up to and with `until`, at most `max`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Replay {
    /// The last one that is there; 0 for all.
    pub since: u64,
    /// The last one that is wanted.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub until: Option<u64>,
    /// How many at once. Who wants more asks again.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max: Option<usize>,
}

/// What a client says.
#[derive(Clone, Debug, PartialEq)]
pub enum Said {
    /// It comes. Once, and first.
    Hello(Hello, Envelope),
    /// It wants to know how the runtime is.
    State,
    /// It wants to have what it missed.
    Replay(Replay),
    /// It had everything up to this number.
    Ack(u64),
    /// Of a runtime: it has what it was asked under this number.
    Has(i64),
    /// Something for the other side: to begin a turn, to answer a question.
    Event(Envelope),
    /// Nothing but that it is there, or what a server has no use for.
    Nothing,
}

/// What time brings.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Due {
    /// A heartbeat is to be sent.
    Heartbeat,
    /// The socket is to be closed.
    Close(Close),
    /// Nothing before then.
    At(u64),
}

/// One socket, as its server sees it.
#[derive(Debug)]
pub struct Link {
    terms: Terms,
    is_in: bool,
    begun_ms: u64,
    heard_ms: u64,
    told_ms: u64,
    asked_ms: u64,
}

impl Link {
    /// A socket that was opened now.
    #[must_use]
    pub fn new(terms: Terms, now_ms: u64) -> Self {
        Self { terms, is_in: false, begun_ms: now_ms, heard_ms: now_ms, told_ms: now_ms, asked_ms: now_ms }
    }

    /// A frame came.
    ///
    /// # Errors
    /// Why the socket is to be closed.
    pub fn hear(&mut self, frame: &[u8], now_ms: u64) -> Result<Said, Close> {
        self.alive(now_ms);
        if frame.len() > self.terms.frame_bytes_max {
            let reason = format!("a frame of {} bytes; {} are allowed", frame.len(), self.terms.frame_bytes_max);
            return Err(Close::new(code::TOO_LARGE, reason));
        }
        let envelope = parse(frame)?;
        check_ids(&envelope)?;
        if envelope.kind == Type::Hello {
            return self.hello(envelope);
        }
        if !self.is_in {
            return Err(Close::new(code::POLICY, format!("{} before hello", envelope.kind)));
        }
        Ok(match envelope.kind {
            Type::StateRequest => Said::State,
            Type::ReplayRequest => Said::Replay(replay(&envelope)?),
            Type::Ack => match (envelope.ack, envelope.extra.get("ask").and_then(|ask| ask.as_i64())) {
                (Some(seq), _) => Said::Ack(seq),
                (None, Some(ask)) => Said::Has(ask),
                (None, None) => Said::Nothing,
            },
            kind if kind.is_event() => Said::Event(self.event(envelope, frame.len())?),
            _ => Said::Nothing,
        })
    }

    /// What is passed on becomes longer by what the server adds, and says nothing in its place.
    fn event(&self, mut envelope: Envelope, bytes: usize) -> Result<Envelope, Close> {
        let most = self.terms.frame_bytes_max - (self.terms.frame_bytes_max / 8).min(ADDED_BYTES_MAX);
        if bytes > most {
            return Err(Close::new(code::TOO_LARGE, format!("an event of {bytes} bytes; {most} are allowed")));
        }
        envelope.extra.remove(&ADDED);
        Ok(envelope)
    }

    fn hello(&mut self, envelope: Envelope) -> Result<Said, Close> {
        if std::mem::replace(&mut self.is_in, true) {
            return Err(Close::new(code::POLICY, "a second hello"));
        }
        let unreadable = |e: serde_json::Error| Close::new(code::UNREADABLE, format!("payload: {e}"));
        let payload = envelope.payload.as_ref().map(|payload| serde_json::from_str::<Option<Hello>>(payload.get()));
        let hello = payload.transpose().map_err(unreadable)?.flatten().unwrap_or_default();
        let last_seen_seq = hello.last_seen_seq.or(envelope.ack);
        let runtime_generation = hello.runtime_generation.or_else(|| envelope.runtime_generation.clone());
        Ok(Said::Hello(Hello { last_seen_seq, runtime_generation, ..hello }, envelope))
    }

    /// Something came that is no frame: the transport's own sign of life.
    pub fn alive(&mut self, now_ms: u64) {
        self.heard_ms = self.heard_ms.max(now_ms);
    }

    /// Something was sent.
    pub fn told(&mut self, now_ms: u64) {
        self.told_ms = self.told_ms.max(now_ms);
    }

    /// A heartbeat was sent, or the transport's own question.
    pub fn asked(&mut self, now_ms: u64) {
        self.asked_ms = self.asked_ms.max(now_ms);
    }

    /// What is due. After a heartbeat, [`Link::told`] and [`Link::asked`] move on. It is due when nothing was said for its interval,
    /// and when nothing was heard: a peer that has nothing to say may know only the transport's question.
    #[must_use]
    pub fn due(&self, now_ms: u64) -> Due {
        let Terms { hello_ms, heartbeat_ms, .. } = self.terms;
        if !self.is_in {
            let until = self.begun_ms + hello_ms;
            let late = || Close::new(code::POLICY, format!("no hello within {hello_ms} ms"));
            return if now_ms >= until { Due::Close(late()) } else { Due::At(until) };
        }
        let silent_at = self.heard_ms + heartbeat_ms * SILENT_BEATS;
        let beat_at = self.told_ms.min(self.heard_ms.max(self.asked_ms)) + heartbeat_ms;
        if now_ms >= silent_at {
            return Due::Close(Close::new(code::AWAY, format!("nothing was heard for {SILENT_BEATS} heartbeats")));
        }
        if now_ms >= beat_at { Due::Heartbeat } else { Due::At(silent_at.min(beat_at)) }
    }

    /// What a welcome says to somebody whose stream goes up to `latest_seq`.
    #[must_use]
    pub fn welcome(&self, hello: &Hello, latest_seq: u64) -> Welcome {
        Welcome {
            version: version_for(&hello.versions),
            latest_seq: Some(latest_seq),
            heartbeat_ms: self.terms.heartbeat_ms,
            silence_ms: self.terms.heartbeat_ms * SILENT_BEATS,
            frame_bytes_max: self.terms.frame_bytes_max as u64,
            acks_requests: true,
        }
    }
}

/// The highest version that both sides speak. The envelope of a `hello` is version 1, whatever else its sender speaks, so one
/// side of version 1 never meets what it cannot read.
#[must_use]
pub fn version_for(offered: &[u64]) -> u64 {
    offered.iter().copied().filter(|version| *version <= VERSION && *version > 0).max().unwrap_or(VERSION)
}

fn check_ids(envelope: &Envelope) -> Result<(), Close> {
    let Envelope { client_id, socket_id, runtime_generation, turn_id, operation_id, request_id, .. } = envelope;
    for (name, id) in [
        ("clientId", client_id),
        ("socketId", socket_id),
        ("runtimeGeneration", runtime_generation),
        ("turnId", turn_id),
        ("operationId", operation_id),
        ("requestId", request_id),
    ] {
        if id.as_ref().is_some_and(|id| id.len() > ID_BYTES_MAX) {
            return Err(Close::new(code::UNREADABLE, format!("{name}: more than {ID_BYTES_MAX} bytes")));
        }
    }
    Ok(())
}

fn replay(envelope: &Envelope) -> Result<Replay, Close> {
    let unreadable = |e: serde_json::Error| Close::new(code::UNREADABLE, format!("payload: {e}"));
    let payload = envelope.payload.as_ref().map(|payload| serde_json::from_str::<Replay>(payload.get()));
    Ok(payload.transpose().map_err(unreadable)?.unwrap_or_default())
}

/// A part of an answer to a request for replay.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct ReplayEvents {
    /// What it begins behind.
    pub since: u64,
    /// Up to here nothing is missing, but for what is gone.
    pub until: u64,
    /// Events that are not kept any more: from behind the first number up to the second.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub gone: Option<(u64, u64)>,
    /// More of what was asked for comes, without being asked for again.
    pub more: bool,
    /// There is more than was asked for.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub rest: bool,
}

/// Cuts an answer to a request for replay so that no frame is too large: `events` are the frames of envelopes, with their
/// numbers. At least one part, and each makes a frame with [`replay_frame`]. An event that is too large for any frame would
/// have been refused when it came.
#[must_use]
pub fn parts(
    of: &ReplayEvents,
    events: Vec<(u64, String)>,
    frame_bytes_max: usize,
) -> Vec<(ReplayEvents, Vec<String>)> {
    // What a frame has besides.
    let room = frame_bytes_max.saturating_sub(1024);
    let (mut parts, mut current, mut bytes, mut since) = (Vec::new(), Vec::new(), 0, of.since);
    let mut last = of.since;
    for (seq, frame) in events {
        if bytes + frame.len() + 1 > room && !current.is_empty() {
            parts.push((ReplayEvents { since, until: last, more: true, ..ReplayEvents::default() }, current));
            (current, bytes, since) = (Vec::new(), 0, last);
        }
        (bytes, last) = (bytes + frame.len() + 1, seq);
        current.push(frame);
    }
    parts.push((ReplayEvents { since, until: of.until, rest: of.rest, ..ReplayEvents::default() }, current));
    parts[0].0.gone = of.gone;
    parts
}

/// One part as a frame for a client.
#[must_use]
pub fn replay_frame(client_id: &str, part: &ReplayEvents, events: &[String]) -> String {
    let mut envelope = Envelope::new(Type::ReplayEvents).with(part);
    envelope.client_id = Some(client_id.to_owned());
    let frame = envelope.to_json();
    // The payload is an object, and the last field.
    let head = frame.strip_suffix("}}").unwrap_or(&frame);
    let mut out = String::with_capacity(head.len() + events.iter().map(|event| event.len() + 1).sum::<usize>() + 16);
    out.extend([head, ",\"events\":["]);
    for (at, event) in events.iter().enumerate() {
        out.extend([if at == 0 { "" } else { "," }, event]);
    }
    out.push_str("]}}");
    out
}

/// Joins pieces of one turn's text that follow each other, for somebody who does not keep up. What is between stays between,
/// the order stays, and a joined piece has the number of its last one and says how many it is, as `joined`.
#[must_use]
pub fn join(events: Vec<Envelope>, joined_bytes_max: usize) -> Vec<Envelope> {
    let mut out: Vec<Joining> = Vec::with_capacity(events.len());
    for event in events {
        let is_joined = out.last_mut().is_some_and(|last| last.takes(&event, joined_bytes_max));
        if !is_joined {
            out.push(Joining { text: piece(&event), envelope: event, count: 1 });
        }
    }
    out.into_iter().map(Joining::end).collect()
}

struct Joining {
    envelope: Envelope,
    text: Option<Piece>,
    count: usize,
}

/// The text of a piece, and what is around it: a field of an object, or the payload itself.
struct Piece {
    text: String,
    field: Option<(&'static str, Beside)>,
}

/// The other fields of an object, as they came: reading numbers as what Rust has for them may change them.
type Beside = BTreeMap<String, Box<RawValue>>;

fn piece(envelope: &Envelope) -> Option<Piece> {
    if envelope.kind != Type::TurnTextDelta {
        return None;
    }
    let payload = envelope.payload.as_ref()?.get();
    if let Ok(text) = serde_json::from_str(payload) {
        return Some(Piece { text, field: None });
    }
    let mut beside: Beside = serde_json::from_str(payload).ok()?;
    ["delta", "text"].into_iter().find_map(|name| {
        let text = serde_json::from_str(beside.get(name)?.get()).ok()?;
        beside.remove(name);
        Some(Piece { text, field: Some((name, std::mem::take(&mut beside))) })
    })
}

impl Joining {
    fn takes(&mut self, event: &Envelope, bytes_max: usize) -> bool {
        let Some(own) = &mut self.text else { return false };
        let is_same = |a: &Envelope, b: &Envelope| {
            (&a.turn_id, &a.operation_id, &a.runtime_generation, &a.extra)
                == (&b.turn_id, &b.operation_id, &b.runtime_generation, &b.extra)
        };
        if !is_same(&self.envelope, event) {
            return false;
        }
        let Some(more) = piece(event) else { return false };
        let is_beside = |a: &Beside, b: &Beside| {
            a.len() == b.len() && a.iter().zip(b).all(|((a, x), (b, y))| a == b && x.get() == y.get())
        };
        let is_alike = match (&own.field, &more.field) {
            (None, None) => true,
            (Some((a, x)), Some((b, y))) => a == b && is_beside(x, y),
            _ => false,
        };
        if !is_alike || own.text.len() + more.text.len() > bytes_max {
            return false;
        }
        own.text.push_str(&more.text);
        (self.envelope.seq, self.envelope.ts, self.count) = (event.seq, event.ts, self.count + 1);
        true
    }

    fn end(self) -> Envelope {
        let Self { mut envelope, text, count } = self;
        if let (Some(Piece { text, field }), 2..) = (text, count) {
            envelope = match field {
                None => envelope.with(&text),
                Some((name, mut fields)) => {
                    fields.extend(to_raw_value(&text).ok().map(|text| (name.to_owned(), text)));
                    envelope.with(&fields)
                }
            };
            envelope.extra.add("joined", &json!(count));
        }
        envelope
    }
}

#[cfg(test)]
mod tests {
    use serde_json::value::RawValue;

    use super::{Due, Envelope, Link, Terms, Type, join};

    #[test]
    fn a_peer_that_only_answers_is_asked_however_much_it_is_told() {
        let terms = Terms { heartbeat_ms: 15_000, ..Terms::default() };
        let mut link = Link::new(terms, 0);
        link.hear(br#"{"protocol":"agent-socket","version":1,"type":"hello","clientId":"c","ts":1}"#, 0).unwrap();
        let mut asked = 0;
        // An event every 5 s.
        for now_ms in (0..600_000).step_by(1000) {
            if now_ms % 5000 == 0 {
                link.told(now_ms);
            }
            match link.due(now_ms) {
                Due::Heartbeat => {
                    asked += 1;
                    link.told(now_ms);
                    link.asked(now_ms);
                    link.alive(now_ms);
                }
                due => assert!(matches!(due, Due::At(_)), "{due:?} after {now_ms} ms"),
            }
        }
        assert_eq!(asked, 39);
        let silent = link.due(link.heard_ms + 45_000);
        assert!(matches!(silent, Due::Close(_)), "{silent:?}");
    }

    #[test]
    fn what_is_beside_a_joined_text_stays_as_it_came() {
        let piece = |payload: &str| Envelope {
            payload: Some(RawValue::from_string(payload.to_owned()).unwrap()),
            ..Envelope::new(Type::TurnTextDelta)
        };
        let number = "12345678901234567890123";
        let with = |text: &str, number: &str| piece(&format!(r#"{{"delta":"{text}","cost":{number}}}"#));
        let joined = join(vec![with("a", number), with("b", number), with("c", "1.0"), with("d", "1.00")], 1000);
        let payloads: Vec<_> = joined.iter().map(|event| event.payload.as_ref().unwrap().get().to_owned()).collect();
        let expected = [
            r#"{"cost":12345678901234567890123,"delta":"ab"}"#,
            r#"{"delta":"c","cost":1.0}"#,
            r#"{"delta":"d","cost":1.00}"#,
        ];
        assert_eq!(payloads, expected);
    }
}

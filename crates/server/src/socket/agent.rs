//! An agent on gRPC as a client's runtime: what the client asks becomes messages of a user, and what the agent answers becomes
//! events of the client. The agent knows nothing of it.

use std::{
    sync::{Arc, Weak},
    time::Duration,
};

use bytes::Bytes;
use prost::Message as _;
use serde_json::{Value, json};
use tokio::{
    sync::{OwnedSemaphorePermit, Semaphore, mpsc},
    time::{Instant, sleep},
};
use trunkline_agent_socket::{Envelope, Type};
use trunkline_core::{
    Error, Kind,
    caller::{Caller, Credential},
    conversation::Conversations,
    identity::Identity,
    message::{self, Said, Sender},
    session::{Session, Sessions},
    socket::{Permit, Teller},
    task::Tasks,
};
use trunkline_proto::v1::{MessageType, ProgressReport};
use trunkline_store::log::{Error as LogError, Item, Record};

use super::{Shared, desk::Desk, record, ui::acknowledged};

/// What a client asks and its line did not get to, and its bytes besides the last one; who asks more is not read on.
const ASKS_MAX: usize = 64;
const ASKS_BYTES_MAX: usize = 2 * 1024 * 1024;

/// Answers that a socket has not taken yet; of more, the asker asks again.
pub(super) const ANSWERS_MAX: usize = 64;

/// Messages that are read at once.
const READ_AT_ONCE: usize = 64;

/// How long a page that was left may take to be left, when it comes again.
const LEAVES: Duration = Duration::from_secs(5);
const PAUSE: Duration = Duration::from_millis(20);

/// Where agents are.
#[derive(Clone)]
pub(crate) struct Agents {
    pub(crate) sessions: Sessions,
    pub(crate) tasks: Tasks,
    pub(crate) conversations: Conversations,
}

/// A user's line to a client's agent, for all sockets of that client that the user has open; ends with the last of them.
/// Each user of a client has a line of its own, so that what one asks is sent in its own name and by its own rights.
pub(super) struct Line {
    agent: String,
    user: String,
    credential: Credential,
    asks: mpsc::Sender<Waiting>,
    /// Bytes that may still wait.
    room: Arc<Semaphore>,
}

/// What a client asks, and the room that it takes until it is done.
struct Waiting {
    ask: Envelope,
    /// To the socket that asks.
    answers: mpsc::Sender<Envelope>,
    _room: OwnedSemaphorePermit,
}

impl Line {
    /// The caller's line to this agent; the one that there is, if it is to the same and was opened with the same rights. Waits
    /// shortly for a page that was just left to leave its window. Cancel-safe.
    ///
    /// # Errors
    /// [`Kind::Exists`] if the client's sockets have another agent, or if the caller's user opened its line with other
    /// rights; [`Kind::Invalid`] for what is no agent; as [`Sessions::attach`].
    pub(super) async fn open(
        shared: &Arc<Shared>,
        caller: &Caller,
        desk: &Arc<Desk>,
        agent: &str,
    ) -> Result<Arc<Self>, Error> {
        if !matches!(Identity::parse(agent), Ok(Identity::Agent(_))) {
            return Err(Error::new(Kind::Invalid, "ERR_INVALID_ARGUMENT", "payload.agent: no agent's identity"));
        }
        let Identity::User { user, .. } = &caller.identity else {
            return Err(Error::new(Kind::Denied, "ERR_PERMISSION_DENIED", "only users have agents"));
        };
        let window = Identity::user(user, desk.client())?;
        let until = Instant::now() + LEAVES;
        let session = loop {
            // In each turn: another socket of this user may have the window, and have opened the line.
            if let Some(line) = find(desk, caller, user, agent)? {
                return Ok(line);
            }
            shared.agents.conversations.check_window(&window).await?;
            match shared.agents.sessions.attach(window.clone(), caller.credential.clone(), "").await {
                Err(error) if error.kind == Kind::Exists && Instant::now() < until => sleep(PAUSE).await,
                attached => break attached?,
            }
        };
        Self::over(shared, session, desk, user, agent).await
    }

    /// The line of a user who has its window. The window is another's after it only, so that there is no other line of this
    /// user meanwhile; but there may be one of another user.
    async fn over(
        shared: &Arc<Shared>,
        session: Session,
        desk: &Arc<Desk>,
        user: &str,
        agent: &str,
    ) -> Result<Arc<Self>, Error> {
        let lane = session.caller.identity.to_string();
        let teller = shared.sockets.teller(&format!("ag::{lane}")).await?;
        let no_metrics = |_: &[u8]| Err("a client of the socket surface sends none".to_owned());
        let Agents { sessions, tasks, .. } = shared.agents.clone();
        let sender = Sender::new(sessions, tasks, &session, &shared.web.limits, no_metrics)?;
        let (asks, asked) = mpsc::channel(ASKS_MAX);
        let credential = session.caller.credential.clone();
        let run = Run {
            shared: shared.clone(),
            session,
            sender,
            agent: agent.to_owned(),
            lane,
            desk: desk.clone(),
            told_to: teller.told_to(),
            teller,
        };
        let room = Arc::new(Semaphore::new(ASKS_BYTES_MAX));
        let line = Arc::new(Self { agent: agent.to_owned(), user: user.to_owned(), credential, asks, room });
        let is_known = desk.with_lines(|known| {
            let checked = check_agent(known, agent);
            if checked.is_ok() {
                known.push(Arc::downgrade(&line));
            }
            checked
        });
        is_known?;
        shared.tasks.spawn(run.run(asked));
        Ok(line)
    }

    pub(super) fn has_ended(&self) -> bool {
        self.asks.is_closed()
    }

    /// Waits until it ends.
    pub(super) async fn ended(&self) {
        self.asks.closed().await;
    }

    /// Something for the agent. If it has a request's id, `answers` gets that it is on disk, or why it is not sent.
    pub(super) async fn ask(&self, envelope: Envelope, answers: &mpsc::Sender<Envelope>) -> Result<(), Error> {
        let ended = || Error::new(Kind::Unavailable, "ERR_UNAVAILABLE", "the line to the agent has ended");
        let bytes = envelope.payload.as_ref().map_or(0, |payload| payload.get().len()).clamp(1, ASKS_BYTES_MAX);
        let bytes = u32::try_from(bytes).unwrap_or(u32::MAX);
        let room = self.room.clone().acquire_many_owned(bytes).await.map_err(|_| ended())?;
        let waiting = Waiting { ask: envelope, answers: answers.clone(), _room: room };
        self.asks.send(waiting).await.map_err(|_| ended())
    }
}

/// The user's line to this agent, if there is one.
fn find(desk: &Desk, caller: &Caller, user: &str, agent: &str) -> Result<Option<Arc<Line>>, Error> {
    desk.with_lines(|known| {
        check_agent(known, agent)?;
        match known.iter().filter_map(Weak::upgrade).find(|line| line.user == user) {
            Some(line) if !line.credential.gives_the_same(&caller.credential) => {
                Err(taken("this user's line to the agent was opened with a token of other rights"))
            }
            found => Ok(found),
        }
    })
}

/// All lines of a client are to one agent.
fn check_agent(known: &[Weak<Line>], agent: &str) -> Result<(), Error> {
    if known.iter().filter_map(Weak::upgrade).any(|line| line.agent != agent) {
        return Err(taken("this client has another agent, as long as its other sockets are there"));
    }
    Ok(())
}

fn taken(why: &'static str) -> Error {
    Error::new(Kind::Exists, "ERR_DUPLICATE_IDENTITY", why)
}

struct Run {
    shared: Arc<Shared>,
    session: Session,
    sender: Sender,
    agent: String,
    /// The user's window, and so what the agent answers to.
    lane: String,
    desk: Arc<Desk>,
    /// By which each message becomes events once, and the last one that did.
    teller: Teller,
    told_to: u64,
}

impl Run {
    async fn run(mut self, mut asks: mpsc::Receiver<Waiting>) {
        let (stop, mut items) = (self.shared.web.stop.clone(), Vec::new());
        let (auth, caller) = (self.shared.web.auth.clone(), self.session.caller.clone());
        // A key that is revoked ends the session by its lease.
        let expired = auth.expired(&caller);
        tokio::pin!(expired);
        let ended = loop {
            let done = tokio::select! {
                ask = asks.recv() => match ask {
                    Some(Waiting { ask, answers, _room }) => self.ask(ask, &answers).await,
                    None => break Ok(()),
                },
                read = self.session.reader.next_batch(READ_AT_ONCE, &mut items) => match read {
                    Ok(()) => self.hear(&mut items).await,
                    Err(error) => break Err(error.into()),
                },
                _ = self.session.lease.lost() => break Ok(()),
                _ = &mut expired => break Ok(()),
                () = stop.cancelled() => break Ok(()),
            };
            if done.is_err() {
                break done;
            }
        };
        if let Err(error) = ended {
            tracing::warn!(%error, lane = self.lane, "a line to an agent ends; the next one goes on where it was");
        }
        if let Err(error) = self.session.save().await {
            tracing::debug!(%error, lane = self.lane, "what it had is read again, and not told again");
        }
    }

    /// What the client asks becomes a message, once, and the asker is answered.
    async fn ask(&mut self, ask: Envelope, answers: &mpsc::Sender<Envelope>) -> Result<(), Error> {
        let turn = ask.turn_id.clone();
        let (kind, body) = match ask.kind {
            Type::TurnStart => (MessageType::Chat, words(&ask.value())),
            Type::TurnAborted => (MessageType::Control, json!({"type": ask.kind.as_str(), "turnId": turn}).to_string()),
            _ => (MessageType::Opaque, ask.to_json()),
        };
        let begun = turn.clone().filter(|_| ask.kind == Type::TurnStart);
        // No turn's id is taken for a request's.
        let key = begun.or_else(|| ask.request_id.as_ref().map(|id| format!("request:{id}"))).unwrap_or_default();
        let sent = match self.sender.send(&self.session, &self.agent, kind.into(), body.as_bytes(), &key) {
            Ok(()) => self.submit().await,
            Err(error) => Err(error),
        };
        let refusal = match sent {
            Ok(()) => {
                self.sent(&ask).await?;
                None
            }
            // The asker comes again.
            Err(error) if error.kind == Kind::Unavailable => return Err(error),
            Err(error) => {
                tracing::debug!(%error, kind = %ask.kind, lane = self.lane, "the agent was not told");
                let why = json!({"error": error.message, "code": error.code});
                if ask.kind == Type::TurnStart {
                    let event = Envelope { turn_id: turn, ..Envelope::new(Type::TurnError).with(&why) };
                    self.tell(vec![event], None).await?;
                }
                Some(why)
            }
        };
        if let Some(request) = ask.request_id {
            let answer = acknowledged(request);
            // A client whose socket ended, or takes too little, says it again.
            let _ = answers.try_send(refusal.map_or(answer.clone(), |why| answer.with(&why)));
        }
        Ok(())
    }

    /// The client is told what came of it, once.
    async fn sent(&self, ask: &Envelope) -> Result<(), Error> {
        let (kind, payload) = match ask.kind {
            Type::TurnStart if self.is_there() => (Type::TurnRunning, ask.value()),
            Type::TurnStart => (Type::TurnQueued, ask.value()),
            Type::TurnAborted => (Type::TurnAborted, json!({})),
            _ => return Ok(()),
        };
        let event = Envelope { turn_id: ask.turn_id.clone(), ..Envelope::new(kind).with(&payload) };
        let name = match (&ask.turn_id, &ask.request_id) {
            (Some(turn), _) if ask.kind == Type::TurnStart => format!("turn:{turn}"),
            (_, Some(request)) => format!("request:{request}"),
            _ => return self.tell(vec![event], None).await,
        };
        let event = Envelope { runtime_generation: Some(self.agent.clone()), ..event };
        self.shared.sockets.tell_once(self.desk.permit(), record::alone(&event), &name).await
    }

    async fn submit(&mut self) -> Result<(), Error> {
        let Ok(sent) = self.sender.submit().await else { return Err(message::publish_failed()) };
        let lost = match sent {
            Some(sent) => sent.await,
            None => Vec::new(),
        };
        match lost.first() {
            // A turn that was begun before, with other words: the first ones count.
            None | Some((_, LogError::DedupReused { .. })) => Ok(()),
            Some((_, error)) => Err(message::not_written(error)),
        }
    }

    fn is_there(&self) -> bool {
        let kind = trunkline_core::identity::PrincipalKind::Agent;
        self.shared.agents.sessions.presence().is_connected(kind, &self.agent)
    }

    /// What is said to the client becomes events.
    async fn hear(&mut self, items: &mut Vec<Item>) -> Result<(), Error> {
        for item in items.drain(..) {
            let Item::Record(record) = item else { continue };
            if record.offset.0 > self.told_to {
                let events = self.events(&record).await?;
                self.tell(events, Some(record.offset.0)).await?;
                self.told_to = record.offset.0;
            }
            self.session.delivery(record.offset).done();
        }
        self.session.save().await
    }

    /// The events of a record. Only what the client's own agent sent is any: others reach the user's lane, too, and would
    /// speak in its name.
    async fn events(&self, record: &Record) -> Result<Vec<Envelope>, Error> {
        let said = message::decode(record)?;
        let is_its_agents = match &said {
            Said::Message(message) => message.source == self.agent,
            Said::Progress(progress) => progress.source == self.agent && progress.is_for(&self.lane),
            Said::Notice(..) => false,
        };
        if !is_its_agents {
            return Ok(Vec::new());
        }
        let (state, _) = self.desk.state(&self.shared.sockets).await?;
        let turn = state.active_turn.map(|turn| turn.id).filter(|turn| !turn.is_empty());
        Ok(match said {
            Said::Message(message) => events_of(message.kind, &message.payload, turn.as_deref()),
            Said::Progress(progress) => phase(&progress.body, turn.as_deref()),
            Said::Notice(..) => Vec::new(),
        })
    }

    async fn tell(&self, mut events: Vec<Envelope>, through: Option<u64>) -> Result<(), Error> {
        let permit: &Permit = self.desk.permit();
        // Agents have no generations: it is the same one for as long as it has that name.
        events.iter_mut().for_each(|event| event.runtime_generation = Some(self.agent.clone()));
        let told: Vec<(Permit, Bytes)> = events.iter().map(|event| (permit.clone(), record::alone(event))).collect();
        match through {
            Some(through) => self.shared.sockets.tell_numbered(told, &self.teller, through).await,
            None => self.shared.sockets.tell(told).await,
        }
    }
}

/// What a turn is begun with, as text: what most programs call it, or all of it.
fn words(payload: &Value) -> String {
    let named = ["text", "prompt", "message", "content"].into_iter().find_map(|name| payload.get(name)?.as_str());
    named.or(payload.as_str()).map_or_else(|| payload.to_string(), ToOwned::to_owned)
}

/// An agent's message as events: JSON that names one of the protocol's events is that event; other text is an answer.
fn events_of(kind: i32, payload: &[u8], turn: Option<&str>) -> Vec<Envelope> {
    let json = serde_json::from_slice::<Value>(payload).ok().filter(Value::is_object);
    let named = json.as_ref().and_then(|json| json.get("type")?.as_str()?.parse::<Type>().ok());
    let text = |json: &Value, name: &str| json.get(name).and_then(Value::as_str).map(ToOwned::to_owned);
    let turn = turn.map(ToOwned::to_owned);
    if let (Some(kind), Some(json)) = (named.filter(|kind| kind.is_event()), &json) {
        let event = match json.get("payload") {
            Some(payload) => Envelope::new(kind).with(payload),
            None => Envelope::new(kind),
        };
        let turn_id = text(json, "turnId").or(turn);
        return vec![Envelope { turn_id, operation_id: text(json, "operationId"), ..event }];
    }
    if kind != i32::from(MessageType::Chat) && kind != i32::from(MessageType::Unspecified) {
        tracing::debug!(kind, "a message that is no event and no answer");
        return Vec::new();
    }
    let answer = String::from_utf8_lossy(payload);
    let event = |kind: Type, payload: Value| Envelope { turn_id: turn.clone(), ..Envelope::new(kind).with(&payload) };
    vec![event(Type::TurnTextDelta, json!({"delta": answer})), event(Type::TurnDone, json!({"text": answer}))]
}

/// An agent's report of progress.
fn phase(body: &[u8], turn: Option<&str>) -> Vec<Envelope> {
    let Ok(report) = ProgressReport::decode(body) else { return Vec::new() };
    let step = report.step.map(|step| step.name).filter(|name| !name.is_empty());
    let phase = step.unwrap_or(if report.summary.is_empty() { report.state } else { report.summary });
    let payload = json!({"phase": phase, "completion": report.completion});
    vec![Envelope { turn_id: turn.map(ToOwned::to_owned), ..Envelope::new(Type::TurnPhase).with(&payload) }]
}

#[cfg(test)]
mod tests {
    use super::{MessageType, events_of, words};
    use serde_json::{Value, json};
    use trunkline_agent_socket::Type;

    #[test]
    fn what_an_agent_says_is_an_event_or_an_answer() {
        let check = |kind: MessageType, payload: &[u8], expected: &[(Type, Option<&str>, Value)]| {
            let found = events_of(kind.into(), payload, Some("active"));
            let found: Vec<_> = found.iter().map(|e| (e.kind, e.turn_id.as_deref(), e.value())).collect();
            assert_eq!(found, expected);
        };
        let active = Some("active");
        check(
            MessageType::Chat,
            b"hi",
            &[(Type::TurnTextDelta, active, json!({"delta": "hi"})), (Type::TurnDone, active, json!({"text": "hi"}))],
        );
        let delta = br#"{"type": "turn_text_delta", "turnId": "t", "payload": {"delta": "h"}}"#;
        check(MessageType::Opaque, delta, &[(Type::TurnTextDelta, Some("t"), json!({"delta": "h"}))]);
        check(MessageType::Chat, br#"{"type": "turn_done"}"#, &[(Type::TurnDone, active, Value::Null)]);
        // What is said once is nothing that an agent says.
        check(MessageType::Opaque, br#"{"type": "welcome"}"#, &[]);
        check(MessageType::Opaque, b"\xff", &[]);
    }

    #[test]
    fn a_turn_begins_with_text() {
        for (payload, expected) in [
            (json!({"text": "a", "more": 1}), "a"),
            (json!({"prompt": "b"}), "b"),
            (json!("c"), "c"),
            (json!({"parts": ["d"]}), r#"{"parts":["d"]}"#),
            (Value::Null, "null"),
        ] {
            assert_eq!(words(&payload), expected);
        }
    }
}

//! What comes in: each frame to who waits for it.

use std::{fmt, sync::Arc};

use prost::Message as _;
use tokio::sync::Notify;
use trunkline_proto::v1::{
    AuthorityGrantRevocation, AuthorityRequestEvent, ConfigSnapshot, DownstreamMessage, ErrorResponse, ProgressUpdate,
    TaskEvent, TaskHibernated, WorkflowOperation, downstream_message::Payload as Down, signal::SignalType,
};

use super::{
    Core, State,
    lane::{Lane, Overflow, Pressure, Weight},
    pending,
};
use crate::{error::Error, message::Message, task::Assignment};

/// What the server asks of the connection.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Signal {
    /// End for good.
    ForceDisconnect(String),
    /// Come back: another node, or the same one after its restart, takes over.
    GracefulDisconnect(String),
}

/// What comes unasked, and rarely.
#[derive(Clone)]
#[non_exhaustive]
pub enum Notice {
    /// Somebody asks for authority, or was answered.
    AuthorityRequest(Box<AuthorityRequestEvent>),
    /// A grant is void from now on.
    Revocation(Box<AuthorityGrantRevocation>),
    /// A task was put to sleep.
    Hibernated(Box<TaskHibernated>),
    /// Somebody asks the workflow engine for something: answer with [`WorkflowEngine::answer`](crate::WorkflowEngine::answer).
    Workflow(Box<WorkflowOperation>),
    /// An answer that nobody waits for: it came too late.
    Unasked(Box<DownstreamMessage>),
}

impl fmt::Debug for Notice {
    /// What it is, and not what it says: an answer can have a secret in it.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::AuthorityRequest(_) => "AuthorityRequest",
            Self::Revocation(_) => "Revocation",
            Self::Hibernated(_) => "Hibernated",
            Self::Workflow(_) => "Workflow",
            Self::Unasked(_) => "Unasked",
        })
    }
}

/// Payloads of messages that are not taken yet: over this, nothing more is read but for the sake of an answer; over eight times
/// this, nothing at all. Trunkline sends 16 MiB ahead.
const MESSAGES_BYTES: usize = 64 * 1024 * 1024;

/// What was received and is not taken yet.
pub(crate) struct Inbox {
    pub(crate) messages: Arc<Lane<Message>>,
    pub(crate) progress: Arc<Lane<ProgressUpdate>>,
    pub(crate) assignments: Arc<Lane<Assignment>>,
    pub(crate) signals: Arc<Lane<Signal>>,
    pub(crate) configs: Arc<Lane<ConfigSnapshot>>,
    pub(crate) refusals: Arc<Lane<Error>>,
    pub(crate) task_events: Arc<Lane<TaskEvent>>,
    pub(crate) notices: Arc<Lane<Notice>>,
}

impl Inbox {
    pub(crate) fn new(bound: usize, at_least_once: bool, room: &Arc<Notify>) -> Self {
        let overflow = if at_least_once { Overflow::Nothing } else { Overflow::Unheard };
        // On Trunkline a message is delivered when it was taken: so the server sends only so much ahead, and answers do not
        // have to wait behind everything that it has.
        let taken = |message: &mut Message| {
            if let Some(ack) = message.ack.take() {
                ack.done();
            }
        };
        let gone = if at_least_once { |_: &mut Message| {} } else { taken };
        let weight =
            Weight { of: |message: &Message| message.payload().len(), soft: MESSAGES_BYTES, hard: 8 * MESSAGES_BYTES };
        Self {
            messages: Lane::with("messages", bound, overflow, Arc::clone(room), gone, weight),
            progress: Lane::new("progress", bound, Arc::clone(room)),
            assignments: Lane::new("assignments", bound, Arc::clone(room)),
            // Nobody has to listen to these, and the last ones tell enough.
            signals: Lane::of("signals", 16, Overflow::Oldest, Arc::clone(room)),
            configs: Lane::of("configs", 16, Overflow::Oldest, Arc::clone(room)),
            refusals: Lane::new("refusals", bound.min(256), Arc::clone(room)),
            task_events: Lane::new("task events", bound, Arc::clone(room)),
            notices: Lane::new("notices", bound.min(256), Arc::clone(room)),
        }
    }

    /// How full the fullest is. Of messages the server may send only so much ahead, if they are acknowledged.
    pub(crate) fn pressure(&self, acknowledged: bool) -> Pressure {
        let all = [
            of_messages(self.messages.pressure(), acknowledged),
            self.progress.pressure(),
            self.assignments.pressure(),
            self.refusals.pressure(),
            self.task_events.pressure(),
            self.notices.pressure(),
        ];
        all.into_iter().max().unwrap_or(Pressure::None)
    }

    pub(crate) fn end(&self) {
        self.messages.end();
        self.progress.end();
        self.assignments.end();
        self.signals.end();
        self.configs.end();
        self.refusals.end();
        self.task_events.end();
        self.notices.end();
    }
}

/// They are read on although they wait: what else comes may be what their taker waits for.
fn of_messages(pressure: Pressure, acknowledged: bool) -> Pressure {
    if acknowledged && pressure == Pressure::Soft { Pressure::None } else { pressure }
}

impl Core {
    /// Hands a frame to whoever waits for it. Answers the signal, if it is one, and whether there is too much of something.
    pub(super) fn receive(&self, frame: DownstreamMessage) -> (Option<Signal>, Pressure) {
        let delivery = frame.delivery;
        let pressure = match frame.payload {
            Some(Down::Msg(frame)) => {
                let ack = match delivery {
                    Some(delivery) => match self.acks.delivered(&delivery, frame.payload.len()) {
                        Some(ack) => Some(ack),
                        // It was handed out before.
                        None => return (None, Pressure::None),
                    },
                    None => None,
                };
                let message = Message { frame, ack, offset: delivery.map(|delivery| delivery.offset) };
                if self.is_for_a_successor(&message) {
                    return (None, Pressure::None);
                }
                let pressure = self.inbox.messages.push(message);
                self.make_way();
                of_messages(pressure, self.acks.is_on())
            }
            Some(Down::ProgressUpdate(update)) => {
                // A report is about a moment: it is done with when it is there.
                match delivery.as_ref().map(|delivery| self.acks.delivered(delivery, update.encoded_len())) {
                    Some(None) => return (None, Pressure::None),
                    Some(Some(ack)) => ack.done(),
                    None => {}
                }
                self.make_way();
                self.inbox.progress.push(*update)
            }
            payload => return self.receive_rare(DownstreamMessage { payload, ..frame }),
        };
        (None, pressure)
    }

    /// Messages that nobody listens to do not hold up what else there is to be told, nor do others for too long: who takes them
    /// may wait for it.
    fn make_way(&self) {
        if self.options.at_least_once {
            return;
        }
        if self.acks.is_blocked() {
            self.inbox.messages.let_go(false);
        } else if self.acks.is_crowded() {
            self.inbox.messages.let_go(true);
        }
    }

    /// What was not taken when this client closes is given to whoever comes next.
    fn is_for_a_successor(&self, message: &Message) -> bool {
        self.closing.is_cancelled() && message.ack.is_some() && !self.options.at_least_once
    }

    /// Leaves what was not taken to whoever comes next.
    pub(super) fn leave_messages(&self) {
        if !self.options.at_least_once {
            self.inbox.messages.retain(|message| message.ack.is_none());
        }
    }

    fn receive_rare(&self, frame: DownstreamMessage) -> (Option<Signal>, Pressure) {
        if let Some((id, ordered)) = pending::asked(&frame) {
            let id = id.to_owned();
            return (None, self.answered(&id, ordered, frame));
        }
        let pressure = match frame.payload {
            Some(Down::Error(error)) => self.refused(&error),
            Some(Down::TaskAssignment(assignment)) => self.inbox.assignments.push(Assignment(assignment)),
            Some(Down::Config(config)) => self.inbox.configs.push(*config),
            Some(Down::Signal(signal)) => {
                let reason = signal.reason;
                let signal = match SignalType::try_from(signal.r#type) {
                    Ok(SignalType::ForceDisconnect) => Signal::ForceDisconnect(reason),
                    Ok(SignalType::GracefulDisconnect) => Signal::GracefulDisconnect(reason),
                    // One that this library does not know.
                    Err(_) => return (None, Pressure::None),
                };
                let pressure = self.inbox.signals.push(signal.clone());
                return (Some(signal), pressure);
            }
            Some(Down::TaskEvent(event)) => match self.routes.task_event(*event) {
                Some(event) => self.inbox.task_events.push(event),
                None => {
                    self.tell_unwanted();
                    Pressure::None
                }
            },
            Some(Down::AuthorityRequestEvent(event)) => self.inbox.notices.push(Notice::AuthorityRequest(event)),
            Some(Down::AuthorityGrantRevocation(revocation)) => {
                self.routes.revoked(&revocation);
                self.inbox.notices.push(Notice::Revocation(revocation))
            }
            Some(Down::TaskHibernated(hibernated)) => self.inbox.notices.push(Notice::Hibernated(hibernated)),
            Some(Down::WorkflowOp(operation)) => self.inbox.notices.push(Notice::Workflow(operation)),
            // Said once, and of no use later; or nothing that this library knows.
            Some(Down::ConnectionAck(_)) | None => Pressure::None,
            Some(payload) => {
                self.routes.frame(payload);
                Pressure::None
            }
        };
        (None, pressure)
    }

    /// The number of one of this client's requests.
    fn number(&self, id: &str) -> Option<u64> {
        id.strip_prefix(&self.prefix)?.strip_prefix('-')?.parse().ok()
    }

    fn answered(&self, id: &str, ordered: Option<pending::Ordered>, frame: DownstreamMessage) -> Pressure {
        let barrier = id.strip_prefix(&self.prefix).and_then(|rest| rest.strip_prefix("-b")?.parse().ok());
        if let Some(barrier) = barrier {
            self.flights.landed(barrier);
            self.feed.wake();
            return Pressure::None;
        }
        if let Some(Down::TaskSubscriptionResponse(reply)) = &frame.payload {
            // Before anything of the subscription comes.
            let refused = (!reply.success).then_some(reply.error.as_str());
            self.routes.subscribed(id, &reply.subscription_id, refused);
            self.tell_unwanted();
        }
        let ordered = ordered.filter(|_| id.is_empty());
        let Some(payload) = frame.payload else { return Pressure::None };
        let left = self.pending().reply(self.number(id), ordered, payload);
        match left {
            // Somebody took it; or it is of a subscription that was taken up again, or given up.
            Some(Down::TaskSubscriptionResponse(_)) | None => Pressure::None,
            Some(payload) => {
                let frame = DownstreamMessage { payload: Some(payload), ..frame };
                self.inbox.notices.push(Notice::Unasked(frame.into()))
            }
        }
    }

    fn refused(&self, error: &ErrorResponse) -> Pressure {
        // Trunkline always says whose request it was.
        let by_order = !matches!(&*self.state.borrow(), State::Connected(welcome) if welcome.is_trunkline());
        if self.pending().refused(self.number(&error.request_id), error, by_order) {
            return Pressure::None;
        }
        if self.number(&error.request_id).is_some() {
            // It was told before, or too late: some refusals come twice, and nobody waits for the second.
            return Pressure::None;
        }
        if !error.request_id.is_empty() && (self.flights.refused(error) || self.routes.refused(error)) {
            return Pressure::None;
        }
        let (response_id, error) = (error.request_id.clone(), Error::from_response(error));
        if response_id.is_empty() && self.routes.switch_refused(&error) {
            return Pressure::None;
        }
        tracing::debug!(code = error.code(), %error, "the server refused something");
        self.inbox.refusals.push(error)
    }
}

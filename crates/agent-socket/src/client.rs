//! The UI's side: every event once and in order, whatever happens to the socket.

mod core;

use std::{
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use serde::Serialize;
use tokio::{
    sync::{mpsc, watch},
    time::{Instant, MissedTickBehavior, interval_at, sleep, timeout},
};

use self::core::{Core, Effect};
use crate::{
    close::{Close, code},
    envelope::{Envelope, Meta, Type, make},
    link::SILENT_BEATS,
    state::RuntimeState,
    transport::{Broken, Frame, Receiver, Sender, Transport, send},
};

/// Requests that wait for the run of the client; who makes more waits.
const ORDERS_MAX: usize = 64;

/// How long a connection may take to be made, and a frame to be taken.
pub(crate) const PATIENCE: Duration = Duration::from_secs(10);

/// What a client is made from.
#[derive(Clone, Debug)]
pub struct Options {
    /// Whose stream it shows.
    pub client_id: String,
    /// At a Trunkline server: the agent that is to be its runtime, such as `ag::prod::chat::one`.
    pub agent: Option<String>,
    /// The last event that it saw; 0 for none.
    pub last_seen_seq: u64,
    /// The runtime that it knows.
    pub runtime_generation: Option<String>,
    /// It says what it had after so many events, and with each heartbeat; 0 is never by itself.
    pub ack_every: u32,
    /// The first pause before it connects again; it doubles, up to the longest, and each is cut by chance by up to a half.
    pub pause: Duration,
    /// The longest pause.
    pub pause_max: Duration,
    /// Whoever has said nothing for so long sends a heartbeat; until the server says more.
    pub heartbeat: Duration,
}

impl Options {
    /// For a client that saw nothing yet.
    #[must_use]
    pub fn new(client_id: impl Into<String>) -> Self {
        Self {
            client_id: client_id.into(),
            agent: None,
            last_seen_seq: 0,
            runtime_generation: None,
            ack_every: 16,
            pause: Duration::from_millis(200),
            pause_max: Duration::from_secs(10),
            heartbeat: Duration::from_secs(15),
        }
    }
}

/// Makes connections.
pub trait Connector: Send + 'static {
    /// What it makes.
    type Transport: Transport;

    /// Makes one.
    fn connect(&mut self) -> impl Future<Output = Result<Self::Transport, Broken>> + Send;
}

impl<T: Transport, F: Future<Output = Result<T, Broken>> + Send, C: FnMut() -> F + Send + 'static> Connector for C {
    type Transport = T;

    fn connect(&mut self) -> impl Future<Output = Result<T, Broken>> + Send {
        self()
    }
}

/// Why something was not said.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// Its payload is no JSON.
    #[error("payload: {0}")]
    Payload(#[from] serde_json::Error),
    /// The client has ended.
    #[error("the client has ended")]
    Ended,
}

type Handler = Arc<dyn Fn(&Envelope) + Send + Sync>;

/// A client. Clones are the same one; when the last is dropped, its run ends.
#[derive(Clone)]
pub struct Client {
    orders: mpsc::Sender<Envelope>,
    shared: Arc<Shared>,
}

struct Shared {
    handlers: Mutex<Vec<(Option<Type>, Handler)>>,
    view: watch::Sender<View>,
}

/// What a client knows.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct View {
    /// It was let in, and the socket is there.
    pub is_connected: bool,
    /// The last event that the handlers had.
    pub seq: u64,
    /// The runtime.
    pub generation: Option<String>,
    /// How it is, if that is known.
    pub state: Option<RuntimeState>,
}

impl Client {
    /// A client, and its run, which connects, comes back when the connection is lost, and calls the handlers. It is to be
    /// polled by one task, and ends when every clone of the client is gone, or when the server says that it need not come
    /// back.
    ///
    /// # Errors
    /// Of the run: what the server said then.
    pub fn new(
        options: Options,
        connector: impl Connector,
    ) -> (Self, impl Future<Output = Result<(), Close>> + Send + 'static) {
        let (orders, ordered) = mpsc::channel(ORDERS_MAX);
        let (seq, generation) = (options.last_seen_seq, options.runtime_generation.clone());
        let view = watch::Sender::new(View { seq, generation, ..View::default() });
        let shared = Arc::new(Shared { handlers: Mutex::default(), view });
        let core = Core::new(&options);
        let run = Run { core, options, shared: shared.clone(), ordered, connector };
        (Self { orders, shared }, run.run())
    }

    /// Calls `handler` for each envelope of a type: events once each, in order. It runs within the client's run, and so must
    /// not block.
    pub fn on(&self, kind: Type, handler: impl Fn(&Envelope) + Send + Sync + 'static) {
        self.shared.handlers().push((Some(kind), Arc::new(handler)));
    }

    /// As [`Client::on`], for all types.
    pub fn on_any(&self, handler: impl Fn(&Envelope) + Send + Sync + 'static) {
        self.shared.handlers().push((None, Arc::new(handler)));
    }

    /// What it knows, now and when it changes.
    #[must_use]
    pub fn view(&self) -> watch::Receiver<View> {
        self.shared.view.subscribe()
    }

    /// The last event that the handlers had.
    #[must_use]
    pub fn seq(&self) -> u64 {
        self.shared.view.borrow().seq
    }

    /// The runtime that it knows.
    #[must_use]
    pub fn generation(&self) -> Option<String> {
        self.shared.view.borrow().generation.clone()
    }

    /// Asks how the runtime is.
    ///
    /// # Errors
    /// [`ClientError::Ended`].
    pub async fn request_state(&self) -> Result<(), ClientError> {
        self.order(Envelope::new(Type::StateRequest)).await
    }

    /// Asks for what was missed, from behind the last event that was seen or from behind `since`. What was seen already is not
    /// handled again.
    ///
    /// # Errors
    /// [`ClientError::Ended`].
    pub async fn request_replay(&self, since: Option<u64>) -> Result<(), ClientError> {
        let since = since.unwrap_or_else(|| self.seq());
        self.order(Envelope::new(Type::ReplayRequest).with(&serde_json::json!({ "since": since }))).await
    }

    /// Begins a turn. It runs once.
    ///
    /// # Errors
    /// [`ClientError`].
    pub async fn start_turn(&self, payload: &impl Serialize, turn_id: &str) -> Result<(), ClientError> {
        self.send(Type::TurnStart, payload, Meta::turn(turn_id)).await
    }

    /// Stops a turn.
    ///
    /// # Errors
    /// [`ClientError`].
    pub async fn abort_turn(&self, turn_id: &str) -> Result<(), ClientError> {
        self.send(Type::TurnAborted, &(), Meta::turn(turn_id)).await
    }

    /// Answers a question.
    ///
    /// # Errors
    /// [`ClientError`].
    pub async fn resolve_approval(&self, operation_id: &str, payload: &impl Serialize) -> Result<(), ClientError> {
        self.send(Type::ApprovalResolve, payload, Meta::operation(operation_id)).await
    }

    /// Says that everything up to `seq` was had, or up to the last event that was.
    ///
    /// # Errors
    /// [`ClientError`].
    pub async fn ack(&self, seq: Option<u64>) -> Result<(), ClientError> {
        let ack = Some(seq.unwrap_or_else(|| self.seq()));
        self.order(Envelope { ack, ..Envelope::new(Type::Ack) }).await
    }

    /// Says anything. An event is a request: it waits for a connection, and is said again, also over the next one, until the
    /// server answers it, which takes it once. A server of another make, which acknowledges no requests, may take it again
    /// after a lost connection. Waits while 256 requests are not answered. What is no event is said now or not at all.
    ///
    /// # Errors
    /// [`ClientError`].
    pub async fn send(&self, kind: Type, payload: &impl Serialize, meta: Meta) -> Result<(), ClientError> {
        self.order(make(kind, payload, meta)?).await
    }

    async fn order(&self, envelope: Envelope) -> Result<(), ClientError> {
        self.orders.send(envelope).await.map_err(|_| ClientError::Ended)
    }
}

impl Shared {
    fn handlers(&self) -> MutexGuard<'_, Vec<(Option<Type>, Handler)>> {
        self.handlers.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn handle(&self, envelope: &Envelope) {
        // A handler may add another one.
        let fitting = |(kind, handler): &(Option<Type>, Handler)| {
            kind.is_none_or(|kind| kind == envelope.kind).then(|| handler.clone())
        };
        let handlers: Vec<_> = self.handlers().iter().filter_map(fitting).collect();
        handlers.iter().for_each(|handler| handler(envelope));
    }
}

struct Run<C> {
    core: Core,
    options: Options,
    shared: Arc<Shared>,
    ordered: mpsc::Receiver<Envelope>,
    connector: C,
}

/// Why a connection ended.
enum Ended {
    /// Nobody has the client any more.
    Unwanted,
    /// The server said that it need not come back.
    Refused(Close),
    /// It broke, or the server said that it may come back.
    Lost,
}

impl<C: Connector> Run<C> {
    async fn run(mut self) -> Result<(), Close> {
        let mut pause = self.options.pause;
        loop {
            let Some(connected) = self.connect().await else { return Ok(()) };
            if let Ok(transport) = connected {
                let ended = self.converse(transport).await;
                if self.core.leave() {
                    pause = self.options.pause;
                }
                self.show();
                match ended {
                    Ended::Unwanted => return Ok(()),
                    Ended::Refused(close) => return Err(close),
                    Ended::Lost => {}
                }
            }
            let cut = 1.0 - fastrand::f64() / 2.0;
            let waits = sleep(pause.mul_f64(cut));
            if self.meanwhile(waits).await.is_none() {
                return Ok(());
            }
            pause = (pause * 2).min(self.options.pause_max);
        }
    }

    async fn connect(&mut self) -> Option<Result<C::Transport, Broken>> {
        // Apart, so that what is ordered is taken meanwhile.
        let Self { connector, ordered, core, .. } = self;
        let connects = timeout(PATIENCE, connector.connect());
        let connected = take_orders(connects, ordered, core).await?;
        Some(connected.unwrap_or_else(|late| Err(late.into())))
    }

    async fn meanwhile<T>(&mut self, what: impl Future<Output = T>) -> Option<T> {
        take_orders(what, &mut self.ordered, &mut self.core).await
    }

    async fn converse(&mut self, transport: C::Transport) -> Ended {
        let (mut sender, mut receiver) = transport.split();
        let hello = self.core.hello();
        if say(&mut sender, vec![hello.to_json()]).await.is_err() {
            return Ended::Lost;
        }
        let mut beats = interval_at(Instant::now() + self.options.heartbeat, self.options.heartbeat);
        beats.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let (mut heard, mut silence) = (Instant::now(), self.options.heartbeat * SILENT_BEATS as u32);
        let mut is_over = false;
        loop {
            if is_over && !self.core.expects_answers() {
                let bye = Close::new(code::NORMAL, "the client ends");
                let _ = timeout(PATIENCE, sender.close(bye)).await;
                return Ended::Unwanted;
            }
            let effects = tokio::select! {
                frame = receiver.next() => {
                    heard = Instant::now();
                    match frame {
                        Some(Ok(Frame::Envelope(frame))) => match self.core.hear(&frame) {
                            Ok(effects) => effects,
                            Err(close) => {
                                let _ = timeout(PATIENCE, sender.close(close.clone())).await;
                                return Ended::Refused(close);
                            }
                        },
                        Some(Ok(Frame::Alive)) => Vec::new(),
                        Some(Ok(Frame::TooLarge(why))) => return Ended::Refused(Close::new(code::TOO_LARGE, why)),
                        Some(Ok(Frame::NotText(why))) => return Ended::Refused(Close::new(code::UNREADABLE, why)),
                        Some(Ok(Frame::Closed(Some(close)))) if !close.may_return() => return Ended::Refused(close),
                        Some(Ok(Frame::Closed(_)) | Err(_)) | None => return Ended::Lost,
                    }
                }
                order = self.ordered.recv(), if !is_over && self.core.has_room() => {
                    is_over = order.is_none();
                    order.map_or_else(Vec::new, |order| self.core.order(order))
                }
                _ = beats.tick() => {
                    // Nobody let it in, or nobody is there.
                    if !self.core.is_in() || heard.elapsed() >= silence {
                        return Ended::Lost;
                    }
                    if self.ordered.is_closed() && self.ordered.is_empty() {
                        return Ended::Unwanted;
                    }
                    self.core.beat()
                }
            };
            if let Some(heartbeat) = self.core.takes_terms() {
                beats = interval_at(Instant::now() + heartbeat, heartbeat);
                silence = heartbeat * SILENT_BEATS as u32;
            }
            if self.carry_out(effects, &mut sender).await.is_err() {
                return Ended::Lost;
            }
        }
    }

    async fn carry_out(&mut self, effects: Vec<Effect>, sender: &mut impl Sender) -> Result<(), Close> {
        let mut frames = Vec::new();
        for effect in effects {
            match effect {
                Effect::Handle(envelope) => self.shared.handle(&envelope),
                Effect::Send(envelope) => frames.push(envelope.to_json()),
            }
        }
        self.show();
        if frames.is_empty() { Ok(()) } else { say(sender, frames).await }
    }

    fn show(&self) {
        let view = self.core.view();
        self.shared.view.send_if_modified(|shown| {
            let is_new = *shown != view;
            *shown = view;
            is_new
        });
    }
}

/// Waits for `what`, and takes orders meanwhile; nothing if nobody has the client any more.
async fn take_orders<T>(
    what: impl Future<Output = T>,
    ordered: &mut mpsc::Receiver<Envelope>,
    core: &mut Core,
) -> Option<T> {
    let mut what = std::pin::pin!(what);
    loop {
        tokio::select! {
            done = &mut what => return Some(done),
            order = ordered.recv(), if core.has_room() => drop(core.order(order?)),
        }
    }
}

pub(crate) async fn say(sender: &mut impl Sender, frames: Vec<String>) -> Result<(), Close> {
    send(sender, frames, PATIENCE).await
}

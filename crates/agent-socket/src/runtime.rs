//! A runtime over a socket: it serves clients of a server elsewhere, and everything that it emits gets there once, in order,
//! whatever happens to the socket.

use std::{
    collections::{HashSet, VecDeque},
    sync::Arc,
    time::Duration,
};

use serde_json::Value;
use tokio::{
    sync::{mpsc, oneshot, watch},
    time::{Instant, MissedTickBehavior, interval_at, sleep, timeout},
};
use tokio_util::task::TaskTracker;

use crate::{
    client::{Connector, PATIENCE, say},
    close::{Close, code},
    envelope::{Envelope, Type, VERSION, parse},
    link::{Hello, Role, SILENT_BEATS, Welcome},
    server::{Ask, EmitError, Emits, Emitted, Emitter, Handlers},
    transport::{Frame, Receiver as _, Sender as _, Transport as _},
};

/// Events that may be on their way; who emits more waits.
const ON_THEIR_WAY_MAX: usize = 4096;

/// Events that are sent at once.
const SEND_AT_ONCE: usize = 256;

/// Requests that are remembered, so that they are not handled twice.
const ASKS_MAX: usize = 10_000;

/// What a runtime is made from.
#[derive(Clone, Debug)]
pub struct Options {
    /// New with every start of the runtime, and nobody else's.
    pub generation: String,
    /// Turns of a former generation that this one goes on with.
    pub recovered_turns: Vec<String>,
    /// As of a client.
    pub pause: Duration,
    /// As of a client.
    pub pause_max: Duration,
    /// As of a client.
    pub heartbeat: Duration,
}

impl Options {
    /// With what is usual besides.
    #[must_use]
    pub fn new(generation: impl Into<String>) -> Self {
        let (pause, pause_max) = (Duration::from_millis(200), Duration::from_secs(10));
        let heartbeat = Duration::from_secs(15);
        Self { generation: generation.into(), recovered_turns: Vec::new(), pause, pause_max, heartbeat }
    }
}

/// A runtime. Clones are the same one; when the last of them and of its emitters is dropped, its run ends.
#[derive(Clone)]
pub struct Runtime {
    orders: mpsc::Sender<Order>,
    is_connected: watch::Receiver<bool>,
}

struct Order {
    event: Envelope,
    kept: oneshot::Sender<Envelope>,
}

impl Emits for Runtime {
    fn emit(&self, event: Envelope) -> Emitted {
        let orders = self.orders.clone();
        Box::pin(async move {
            let (kept, keeps) = oneshot::channel();
            orders.send(Order { event, kept }).await.map_err(|_| EmitError::Ended)?;
            keeps.await.map_err(|_| EmitError::Ended)
        })
    }
}

impl Runtime {
    /// A runtime, and its run, which connects, comes back when the connection is lost, and calls the handlers in tasks of
    /// their own. What handlers emit is kept by the server when it is answered, and its `seq` is this runtime's own number.
    ///
    /// # Errors
    /// Of the run: what the server said when it said that the runtime need not come back.
    pub fn new(
        options: Options,
        handlers: impl Handlers,
        connector: impl Connector,
    ) -> (Self, impl Future<Output = Result<(), Close>> + Send + 'static) {
        let (orders, ordered) = mpsc::channel(SEND_AT_ONCE);
        let (connected, is_connected) = watch::channel(false);
        let weak = orders.downgrade();
        let run = Run {
            options,
            handlers: Arc::new(handlers),
            connector,
            ordered,
            orders: weak,
            connected,
            on_their_way: VecDeque::new(),
            last: 0,
            asks: HashSet::new(),
            asked: VecDeque::new(),
            tasks: TaskTracker::new(),
        };
        (Self { orders, is_connected }, run.run())
    }

    /// By which events are emitted.
    #[must_use]
    pub fn emitter(&self) -> Emitter {
        Emitter::new(self.clone())
    }

    /// Whether the server let it in, now and when that changes.
    #[must_use]
    pub fn is_connected(&self) -> watch::Receiver<bool> {
        self.is_connected.clone()
    }
}

struct Run<H, C> {
    options: Options,
    handlers: Arc<H>,
    connector: C,
    ordered: mpsc::Receiver<Order>,
    /// For handlers; it does not keep the run going by itself.
    orders: mpsc::WeakSender<Order>,
    connected: watch::Sender<bool>,
    /// What the server has not acknowledged, by number.
    on_their_way: VecDeque<Order>,
    last: u64,
    asks: HashSet<u64>,
    asked: VecDeque<u64>,
    tasks: TaskTracker,
}

enum Ended {
    Unwanted,
    Refused(Close),
    Lost,
}

impl<H: Handlers, C: Connector> Run<H, C> {
    async fn run(mut self) -> Result<(), Close> {
        let mut pause = self.options.pause;
        loop {
            let connected = timeout(PATIENCE, self.connector.connect()).await;
            if let Ok(Ok(transport)) = connected {
                let ended = self.converse(transport).await;
                if self.connected.send_replace(false) {
                    pause = self.options.pause;
                }
                match ended {
                    Ended::Unwanted => break,
                    Ended::Refused(close) => return Err(close),
                    Ended::Lost => {}
                }
            }
            if self.ordered.is_closed() && self.ordered.is_empty() && self.on_their_way.is_empty() {
                break;
            }
            sleep(pause.mul_f64(1.0 - fastrand::f64() / 2.0)).await;
            pause = (pause * 2).min(self.options.pause_max);
        }
        self.tasks.close();
        self.tasks.wait().await;
        Ok(())
    }

    async fn converse(&mut self, transport: C::Transport) -> Ended {
        let (mut sender, mut receiver) = transport.split();
        if say(&mut sender, vec![self.hello().to_json()]).await.is_err() {
            return Ended::Lost;
        }
        let mut heartbeat = self.options.heartbeat;
        let mut beats = interval_at(Instant::now() + heartbeat, heartbeat);
        beats.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let (mut heard, mut is_in, mut is_over) = (Instant::now(), false, false);
        loop {
            let frames = tokio::select! {
                frame = receiver.next() => {
                    heard = Instant::now();
                    let frame = match frame {
                        Some(Ok(Frame::Envelope(frame))) => frame,
                        Some(Ok(Frame::Alive)) => continue,
                        Some(Ok(Frame::TooLarge(why))) => return Ended::Refused(Close::new(code::TOO_LARGE, why)),
                        Some(Ok(Frame::NotText(why))) => return Ended::Refused(Close::new(code::UNREADABLE, why)),
                        Some(Ok(Frame::Closed(Some(close)))) if !close.may_return() => return Ended::Refused(close),
                        Some(Ok(Frame::Closed(_)) | Err(_)) | None => return Ended::Lost,
                    };
                    match self.hear(&frame) {
                        Ok(Heard::Welcome(welcome)) => {
                            is_in = true;
                            self.connected.send_replace(true);
                            if welcome.heartbeat_ms > 0 {
                                heartbeat = Duration::from_millis(welcome.heartbeat_ms);
                                beats = interval_at(Instant::now() + heartbeat, heartbeat);
                            }
                            // What it has not got.
                            self.settle(welcome.latest_seq.unwrap_or(0));
                            self.on_their_way.iter().map(|order| order.event.to_json()).collect()
                        }
                        Ok(Heard::Ask(number)) => {
                            let mut has = Envelope::new(Type::Ack);
                            has.extra.add("ask", &number.into());
                            vec![has.to_json()]
                        }
                        Ok(Heard::Nothing) => Vec::new(),
                        Err(close) => return Ended::Refused(close),
                    }
                }
                first = self.ordered.recv(), if is_in && !is_over && self.on_their_way.len() < ON_THEIR_WAY_MAX => {
                    is_over = first.is_none();
                    first.map_or_else(Vec::new, |first| self.take(first))
                }
                _ = beats.tick() => {
                    if !is_in || heard.elapsed() >= heartbeat * SILENT_BEATS as u32 {
                        return Ended::Lost;
                    }
                    vec![Envelope::new(Type::Heartbeat).to_json()]
                }
            };
            if !frames.is_empty() && say(&mut sender, frames).await.is_err() {
                return Ended::Lost;
            }
            // Nobody emits any more, and the server has everything.
            if is_over && self.on_their_way.is_empty() {
                let bye = Close::new(code::NORMAL, "the runtime ends");
                let _ = timeout(PATIENCE, sender.close(bye)).await;
                return Ended::Unwanted;
            }
        }
    }

    fn hello(&self) -> Envelope {
        let hello = Hello {
            last_seen_seq: None,
            runtime_generation: Some(self.options.generation.clone()),
            role: Role::Runtime,
            versions: vec![VERSION],
            agent: None,
            recovered_turns: self.options.recovered_turns.clone(),
        };
        Envelope::new(Type::Hello).with(&hello)
    }

    /// Numbers what is to be told, with what else there is by now.
    fn take(&mut self, first: Order) -> Vec<String> {
        let (mut frames, mut next) = (Vec::new(), Some(first));
        while let Some(mut order) = next {
            self.last += 1;
            order.event.seq = Some(self.last);
            order.event.runtime_generation.get_or_insert_with(|| self.options.generation.clone());
            frames.push(order.event.to_json());
            self.on_their_way.push_back(order);
            next = if frames.len() < SEND_AT_ONCE { self.ordered.try_recv().ok() } else { None };
        }
        frames
    }

    /// The server keeps everything up to a number.
    fn settle(&mut self, seq: u64) {
        while let Some(order) = self.on_their_way.pop_front_if(|order| order.event.seq <= Some(seq)) {
            // Whoever emitted it may not care.
            let _ = order.kept.send(order.event);
        }
    }

    fn hear(&mut self, frame: &[u8]) -> Result<Heard, Close> {
        let envelope = parse(frame)?;
        match envelope.kind {
            Type::Welcome => return Ok(Heard::Welcome(envelope.read().unwrap_or_default())),
            Type::Ack => self.settle(envelope.ack.unwrap_or(0)),
            kind if kind.is_event() => {
                let number = envelope.extra.get("ask").as_ref().and_then(Value::as_u64);
                let begins = kind == Type::TurnStart && envelope.turn_id.is_some();
                self.asked(envelope, number);
                // That it has a turn, it says by the turn's first event: until then, another runtime may have to begin it.
                return Ok(number.filter(|_| !begins).map_or(Heard::Nothing, Heard::Ask));
            }
            _ => {}
        }
        Ok(Heard::Nothing)
    }

    fn asked(&mut self, envelope: Envelope, number: Option<u64>) {
        if number.is_some_and(|number| !self.is_new(number)) {
            return;
        }
        let Some(orders) = self.orders.upgrade() else { return };
        let emitter = Emitter::new(Runtime { orders, is_connected: self.connected.subscribe() });
        let (client_id, socket_id) = (envelope.client_id.clone(), envelope.socket_id.clone());
        let ask = Ask { client_id: client_id.unwrap_or_default(), socket_id: socket_id.unwrap_or_default(), envelope };
        let handlers = self.handlers.clone();
        self.tasks.spawn(async move { handlers.asked(ask, emitter).await });
    }

    fn is_new(&mut self, number: u64) -> bool {
        if !self.asks.insert(number) {
            return false;
        }
        self.asked.push_back(number);
        if self.asked.len() > ASKS_MAX
            && let Some(oldest) = self.asked.pop_front()
        {
            self.asks.remove(&oldest);
        }
        true
    }
}

enum Heard {
    Welcome(Welcome),
    /// It has what it was asked under this number.
    Ask(u64),
    Nothing,
}

//! The one connection that is under every principal: a handle that is cheap to clone, and the task behind it.

pub(crate) mod acks;
mod driver;
pub(crate) mod feed;
mod inbound;
pub(crate) mod lane;
pub(crate) mod pending;

use std::{
    fmt,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{
            AtomicBool,
            Ordering::{Acquire, Release},
        },
    },
    time::Duration,
};

use tokio::{
    runtime::Handle,
    sync::{Notify, mpsc, oneshot, watch},
    task::JoinHandle,
};
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use trunkline_proto::v1::{
    ConfigSnapshot, ConnectionAck, NegotiatedExtension, ProgressUpdate, TaskEvent, TaskQuery,
    downstream_message::Payload as Down, init_connection::ClientType, task_query::OpType,
    upstream_message::Payload as Up,
};

use self::{
    acks::Acks,
    feed::{Feed, Flights, Mark, Queued},
    inbound::Inbox,
    lane::Received,
    pending::{Ordered, Pending},
};
use crate::{
    error::{Error, Kind, Result},
    identity::Identity,
    message::{Message, Outgoing},
    options::{ACK_EXTENSION, Options},
    routes::Routes,
    task::Assignment,
};
pub(crate) use driver::{FRAME_IN_BYTES_MAX, dial};
pub use inbound::{Notice, Signal};

/// A connected client of any principal: what all of them can do. The typed ones, such as [`Agent`](crate::Agent), dereference
/// to it. Clones share one connection; when the last one is dropped, or [`Client::close`] is called, it says
/// goodbye.
#[derive(Clone)]
pub struct Client {
    pub(crate) core: Arc<Core>,
    /// Ends the connection with the last clone.
    _owner: Arc<Owner>,
}

struct Owner(Arc<Closing>);

/// That the client is to end. Looked at for each frame that is sent, so that it is a flag besides.
#[derive(Default)]
pub(crate) struct Closing {
    flag: AtomicBool,
    token: CancellationToken,
}

impl Closing {
    fn cancel(&self) {
        self.flag.store(true, Release);
        self.token.cancel();
    }

    pub(crate) fn is_cancelled(&self) -> bool {
        self.flag.load(Acquire)
    }

    pub(crate) async fn cancelled(&self) {
        self.token.cancelled().await;
    }
}

impl Drop for Owner {
    fn drop(&mut self) {
        self.0.cancel();
    }
}

/// What the handle and the task share.
pub(crate) struct Core {
    pub(crate) options: Options,
    claim: ClientType,
    identity: Mutex<Identity>,
    state: watch::Sender<State>,
    normal: mpsc::Sender<Queued>,
    bulk: mpsc::Sender<Queued>,
    pub(crate) feed: Feed,
    pub(crate) flights: Flights,
    pub(crate) acks: Arc<Acks>,
    pending: Mutex<Pending>,
    pub(crate) inbox: Inbox,
    pub(crate) routes: Routes,
    /// Told when more may be read.
    pub(crate) room: Arc<Notify>,
    /// Makes ids of requests this client's own.
    prefix: String,
    /// Handlers, and what else runs for this client; they end when it ends.
    tasks: TaskTracker,
    /// Where they run: things are dropped outside of it, too.
    runtime: Handle,
    /// Asks the task to end in peace.
    closing: Arc<Closing>,
    /// Requests that are made again with the next connection.
    again: Mutex<Vec<(u64, Up)>>,
}

/// How a client stands.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub enum State {
    /// It was not connected yet.
    Connecting,
    /// The server has accepted it.
    Connected(Arc<Welcome>),
    /// The connection broke, and it will try again.
    Reconnecting {
        /// Counts the attempts since the last connection, from 1.
        attempt: u32,
        /// How long it waits before that.
        delay: Duration,
        /// Why.
        because: Error,
    },
    /// It is over. What was queued and never went out is counted.
    Ended {
        /// Why.
        because: Error,
        /// Frames that were accepted from callers and never went out.
        unsent: usize,
    },
}

/// What the server said when it accepted a client.
#[derive(Clone, Debug, PartialEq, Default)]
#[non_exhaustive]
pub struct Welcome {
    /// Names this session: with it, [`Builder::resume`](crate::Builder::resume) takes it over.
    pub session_id: String,
    /// The server knew the session, and goes on where it was.
    pub resumed: bool,
    /// The id that the server gave a worker; empty for others.
    pub assigned_id: String,
    /// When the session first began, in Unix milliseconds.
    pub first_connected_ms: i64,
    /// How often it was resumed.
    pub reconnections: u32,
    /// The server's version.
    pub server_version: String,
    /// What came of each extension that was declared.
    pub extensions: Vec<NegotiatedExtension>,
    /// Other extensions that the server has.
    pub offered: Vec<String>,
    /// Which log the offsets of deliveries belong to; empty if the server does not say.
    pub(crate) log_epoch: String,
    by_hand: bool,
}

impl Welcome {
    fn of(ack: ConnectionAck, by_hand: bool) -> Self {
        Self {
            by_hand,
            session_id: ack.session_id,
            resumed: ack.resumed,
            assigned_id: ack.assigned_id,
            first_connected_ms: ack.initial_connection_unix_ms,
            reconnections: u32::try_from(ack.reconnection_count).unwrap_or(0),
            server_version: ack.server_version,
            extensions: ack.negotiated_extensions,
            offered: ack.server_supported_extensions,
            log_epoch: ack.log_epoch,
        }
    }

    /// Whether an extension is in force.
    #[must_use]
    pub fn supports(&self, uri: &str) -> bool {
        self.extensions.iter().any(|each| each.uri == uri && each.supported)
    }

    /// Whether messages come again until they are acknowledged: the client connected
    /// [`at_least_once`](crate::Builder::at_least_once), and the server can do that.
    #[must_use]
    pub fn acknowledges(&self) -> bool {
        self.by_hand && self.supports(ACK_EXTENSION)
    }

    /// Whether the server is Trunkline, and not another one that speaks the same contract.
    #[must_use]
    pub fn is_trunkline(&self) -> bool {
        self.supports(ACK_EXTENSION) || self.offered.iter().any(|uri| uri == ACK_EXTENSION)
    }
}

/// How a request is made.
pub(crate) struct Ask {
    /// For people, such as `get a key`.
    pub(crate) what: &'static str,
    pub(crate) ordered: Option<Ordered>,
    /// Making it twice is as good as making it once.
    pub(crate) idempotent: bool,
    pub(crate) timeout: Option<Duration>,
}

impl Ask {
    /// A request that only looks.
    pub(crate) fn read(what: &'static str) -> Self {
        Self { what, ordered: None, idempotent: true, timeout: None }
    }

    /// A request that changes something.
    pub(crate) fn change(what: &'static str) -> Self {
        Self { idempotent: false, ..Self::read(what) }
    }

    pub(crate) fn ordered(self, ordered: Ordered) -> Self {
        Self { ordered: Some(ordered), ..self }
    }

    pub(crate) fn within(self, timeout: Duration) -> Self {
        Self { timeout: Some(timeout), ..self }
    }
}

/// Largest frame that servers take, less what is around a payload. The published figure: one that is larger breaks the connection.
const FRAME_BYTES_MAX: usize = 4 * 1024 * 1024 - 64 * 1024;

pub(crate) fn fits(bytes: usize) -> Result<()> {
    if bytes <= FRAME_BYTES_MAX {
        return Ok(());
    }
    Err(Error::invalid(format!("{bytes} bytes do not fit into a frame, which has room for {FRAME_BYTES_MAX}")))
}

/// What came of putting a frame into the queue.
enum Put {
    Done,
    Full(Queued),
    Over,
}

/// Takes a request back whose asker has gone.
struct Asked<'a> {
    core: &'a Core,
    number: u64,
}

impl Drop for Asked<'_> {
    fn drop(&mut self) {
        self.core.pending().forget(self.number);
        self.core.room.notify_one();
    }
}

/// Takes a message back whose sender has gone before it went out.
struct Waits<'a>(&'a Core, u64);

impl Drop for Waits<'_> {
    fn drop(&mut self) {
        self.0.flights.forget(self.1);
    }
}

impl Core {
    fn new(claim: ClientType, options: Options) -> Result<Self> {
        let identity = Identity::of(&claim)?;
        let (normal, normals) = mpsc::channel(options.outbox.max(1));
        // Bodies come in pieces of 256 KiB.
        let (bulk, bulks) = mpsc::channel(16);
        let (room, acks) = (Arc::new(Notify::new()), Acks::new(options.at_least_once));
        Ok(Self {
            inbox: Inbox::new(options.inbox, options.at_least_once, &room),
            options,
            claim,
            identity: Mutex::new(identity),
            state: watch::Sender::new(State::Connecting),
            normal,
            bulk,
            feed: Feed::new(normals, bulks),
            flights: Flights::default(),
            acks,
            pending: Mutex::default(),
            routes: Routes::default(),
            room,
            prefix: format!("{:08x}", fastrand::u32(..)),
            tasks: TaskTracker::new(),
            runtime: Handle::current(),
            closing: Arc::default(),
            again: Mutex::default(),
        })
    }

    /// Short and without a wait inside, as every lock here; a panic inside leaves nothing half done.
    pub(crate) fn pending(&self) -> MutexGuard<'_, Pending> {
        self.pending.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn identity(&self) -> MutexGuard<'_, Identity> {
        self.identity.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Runs something for this client. [`Client::close`] waits for it.
    pub(crate) fn spawn<T: Send + 'static>(&self, run: impl Future<Output = T> + Send + 'static) -> JoinHandle<T> {
        self.tasks.spawn_on(run, &self.runtime)
    }

    fn again(&self) -> MutexGuard<'_, Vec<(u64, Up)>> {
        self.again.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn request_id(&self, number: u64) -> String {
        format!("{}-{number}", self.prefix)
    }

    pub(crate) fn barrier_id(&self, number: u64) -> String {
        format!("{}-b{number}", self.prefix)
    }

    /// Why nothing can be sent any more, if so.
    pub(crate) fn over(&self) -> Option<Error> {
        match &*self.state.borrow() {
            State::Ended { because, .. } => Some(because.clone()),
            _ if self.closing.is_cancelled() => Some(closed()),
            _ => None,
        }
    }

    /// Puts a frame into the queue, and waits for room as long as it may.
    pub(crate) async fn put(&self, payload: impl Into<Up>, mark: Mark, timeout: Duration) -> Result<()> {
        match self.try_put_into(&self.normal, Queued { payload: payload.into(), mark }) {
            Put::Done => Ok(()),
            Put::Over => Err(self.over().unwrap_or_else(closed)),
            // On the heap, so that the many that find room are small.
            Put::Full(queued) => Box::pin(self.wait_to_put(&self.normal, queued, timeout)).await,
        }
    }

    /// As [`Core::put`], for what is large and in no hurry.
    pub(crate) async fn put_bulk(&self, payload: Up) -> Result<()> {
        match self.try_put_into(&self.bulk, Queued { payload, mark: Mark::Nothing }) {
            Put::Done => Ok(()),
            Put::Over => Err(self.over().unwrap_or_else(closed)),
            Put::Full(queued) => self.wait_to_put(&self.bulk, queued, self.options.send_timeout).await,
        }
    }

    #[inline]
    fn try_put_into(&self, queue: &mpsc::Sender<Queued>, queued: Queued) -> Put {
        if self.closing.is_cancelled() {
            return Put::Over;
        }
        match queue.try_send(queued) {
            Ok(()) => Put::Done,
            Err(mpsc::error::TrySendError::Closed(_)) => Put::Over,
            Err(mpsc::error::TrySendError::Full(queued)) => Put::Full(queued),
        }
    }

    async fn wait_to_put(&self, queue: &mpsc::Sender<Queued>, queued: Queued, timeout: Duration) -> Result<()> {
        match queue.send_timeout(queued, timeout).await {
            Ok(()) => Ok(()),
            Err(mpsc::error::SendTimeoutError::Closed(_)) => Err(self.over().unwrap_or_else(closed)),
            Err(mpsc::error::SendTimeoutError::Timeout(_)) => Err(self.no_room(timeout)),
        }
    }

    fn no_room(&self, waited: Duration) -> Error {
        let state = match &*self.state.borrow() {
            State::Connected(_) => "the server takes no more for now",
            _ => "there is no connection",
        };
        Error::new(Kind::Unavailable, format!("no room in the queue after {waited:?}: {state}"))
    }

    /// Puts a frame into the queue if there is room.
    pub(crate) fn try_put(&self, payload: Up) -> bool {
        self.normal.try_send(Queued { payload, mark: Mark::Nothing }).is_ok()
    }

    /// Ends subscriptions that nobody here wants any more. If there is no room for it now, the next event tries again.
    pub(crate) fn tell_unwanted(&self) {
        self.routes.tell_unwanted(|up| self.try_put(up));
    }

    /// Sends a request, and waits for its answer.
    pub(crate) async fn ask(&self, ask: Ask, build: impl FnOnce(String) -> Up) -> Result<Down> {
        let timeout = ask.timeout.unwrap_or(self.options.request_timeout);
        if let Some(over) = self.over() {
            return Err(over);
        }
        let (number, up, answer) =
            self.pending().register(ask.ordered, ask.idempotent, |number| build(self.request_id(number)));
        let asked = Asked { core: self, number };
        fits(up.encoded_len()).inspect_err(|_| self.pending().forget(number))?;
        // It may be that nothing is read because too much waits to be taken.
        self.room.notify_one();
        let answered = tokio::time::timeout(timeout, async {
            self.put(up, Mark::Request(number), timeout).await?;
            match answer.await {
                Ok(answered) => answered,
                Err(_) => Err(self.over().unwrap_or_else(closed)),
            }
        });
        match answered.await {
            Ok(answered) => answered,
            Err(_) => Err(asked.core.pending().refusal(number).unwrap_or_else(|| self.late(ask.what, timeout))),
        }
    }

    /// Returns when the server has handled everything that was put into the queue before: frames of one client take effect in
    /// order, so any request that is always answered tells.
    pub(crate) async fn settled(&self) -> Result<()> {
        let build = |request_id| {
            Up::TaskQuery(Box::new(TaskQuery { request_id, op: OpType::Get.into(), ..Default::default() }))
        };
        self.ask(Ask::read("handle what was sent"), build).await.map(|_| ())
    }

    fn late(&self, what: &str, timeout: Duration) -> Error {
        let why = match (&*self.state.borrow(), self.inbox.pressure(self.acks.is_on())) {
            (State::Connected(_), lane::Pressure::None) => String::new(),
            (State::Connected(_), _) => "; what was received is not taken fast enough".to_owned(),
            (State::Reconnecting { because, .. }, _) => format!("; there is no connection: {because}"),
            _ => "; there is no connection".to_owned(),
        };
        Error::new(Kind::Timeout, format!("no answer after {timeout:?} to a request to {what}{why}"))
    }
}

pub(crate) fn closed() -> Error {
    Error::new(Kind::Closed, "this client was closed")
}

impl Client {
    pub(crate) async fn connect(claim: ClientType, options: Options) -> Result<Self> {
        crate::principal::check(&claim)?;
        let core = Arc::new(Core::new(claim, options)?);
        if let Some(workspace) = &core.options.workspace {
            crate::topic::check(workspace)?;
            core.routes.set_workspace(workspace);
        }
        let owner = Arc::new(Owner(Arc::clone(&core.closing)));
        let (ready, is_ready) = oneshot::channel();
        core.spawn(driver::run(Arc::clone(&core), ready));
        match is_ready.await {
            Ok(Ok(())) => Ok(Self { core, _owner: owner }),
            Ok(Err(error)) => Err(error),
            Err(_) => Err(closed()),
        }
    }

    /// Who this client is; of a worker with the id that the server gave it.
    #[must_use]
    pub fn identity(&self) -> Identity {
        self.core.identity().clone()
    }

    /// How it stands, and every change of it. A slow watcher sees the latest.
    #[must_use]
    pub fn state(&self) -> watch::Receiver<State> {
        self.core.state.subscribe()
    }

    /// What the server said at the connection that there is now, if there is one.
    #[must_use]
    pub fn welcome(&self) -> Option<Arc<Welcome>> {
        match &*self.core.state.borrow() {
            State::Connected(welcome) => Some(Arc::clone(welcome)),
            _ => None,
        }
    }

    /// Whether there is a connection now.
    #[must_use]
    pub fn is_connected(&self) -> bool {
        self.welcome().is_some()
    }

    /// Waits until it is over, and says why: [`Kind::Closed`] if it was closed here.
    pub async fn ended(&self) -> Error {
        let mut state = self.core.state.subscribe();
        let ended = state.wait_for(|state| matches!(state, State::Ended { .. })).await;
        match ended.as_deref() {
            Ok(State::Ended { because, .. }) => because.clone(),
            _ => closed(),
        }
    }

    /// Sends what is queued, says goodbye, and waits until the server has let go of the identity and all handlers are done; five
    /// seconds at most. Answers how many frames never went out. Requests that wait for an answer fail with [`Kind::Closed`].
    pub async fn close(&self) -> usize {
        let deadline = tokio::time::Instant::now() + self.core.options.close_timeout;
        self.core.closing.cancel();
        self.ended().await;
        self.core.tasks.close();
        // A handler that hangs is left behind.
        let _ = tokio::time::timeout_at(deadline, self.core.tasks.wait()).await;
        match &*self.core.state.borrow() {
            State::Ended { unsent, .. } => *unsent,
            _ => 0,
        }
    }

    /// Puts a message into the queue, in order. Waits while the queue is full, such as during a reconnect, for as long as
    /// [`Builder::send_timeout`](crate::Builder::send_timeout) says. What the server has against it comes to
    /// [`Client::refusals`]; what was on its way when a connection breaks can be lost. [`Client::send_confirmed`] knows.
    ///
    /// # Errors
    /// [`Kind::Unavailable`] if there was no room in time; [`Kind::Invalid`] if it does not fit into a frame (4 MiB); the reason of
    /// the end if it is over.
    pub async fn send(&self, message: Outgoing) -> Result<()> {
        fits(message.message.payload.len())?;
        self.core.put(message, Mark::Nothing, self.core.options.send_timeout).await
    }

    /// Returns when the server has handled everything that was sent before, whatever came of it: refusals are in
    /// [`Client::refusals`] by then. What was on its way when a connection broke is not waited for.
    ///
    /// # Errors
    /// [`Kind::Timeout`] after 10 s; the reason of the end if it is over.
    pub async fn settled(&self) -> Result<()> {
        self.core.settled().await
    }

    /// As [`Client::send`], but fails at once if the queue is full.
    ///
    /// # Errors
    /// [`Kind::Exhausted`] if the queue is full; the reason of the end if it is over.
    pub fn try_send(&self, message: Outgoing) -> Result<()> {
        fits(message.message.payload.len())?;
        let queued = Queued { payload: message.into(), mark: Mark::Nothing };
        match self.core.try_put_into(&self.core.normal, queued) {
            Put::Done => Ok(()),
            Put::Full(_) => Err(Error::new(Kind::Exhausted, "the queue is full")),
            Put::Over => Err(self.core.over().unwrap_or_else(closed)),
        }
    }

    /// Sends a message, and returns when the server has it for good: it survives whatever happens to either side. If the
    /// connection breaks meanwhile, it is sent again with the next one, and Trunkline knows that it has seen it; many can be
    /// under way at once, and keep their order. Dropping this before the message went out takes it back.
    ///
    /// # Errors
    /// What the server refused; [`Kind::Timeout`] if it was not confirmed in time, and [`Kind::Interrupted`] if that cannot be
    /// known any more: a server other than Trunkline does not know a message that it has seen.
    pub async fn send_confirmed(&self, mut message: Outgoing) -> Result<()> {
        if let Some(over) = self.core.over() {
            return Err(over);
        }
        fits(message.message.payload.len())?;
        if message.message.idempotency_key.is_empty() {
            message = message.once(uuid::Uuid::now_v7().to_string());
        }
        let timeout = self.core.options.send_timeout;
        let (number, answer) = self.core.flights.register();
        let _waits = Waits(&self.core, number);
        let confirmed = tokio::time::timeout(timeout, async {
            self.core.put(message, Mark::Confirm(number), timeout).await?;
            answer.await.unwrap_or_else(|_| Err(self.core.over().unwrap_or_else(closed)))
        });
        confirmed.await.unwrap_or_else(|_| Err(self.core.late("confirm a message", timeout)))
    }

    /// The messages that come. Those that came before this was called are kept, up to the bound of
    /// [`Builder::inbox`](crate::Builder::inbox).
    pub fn messages(&self) -> Received<Message> {
        Received::of(&self.core.inbox.messages)
    }

    /// What others report about their work.
    pub fn progress(&self) -> Received<ProgressUpdate> {
        Received::of(&self.core.inbox.progress)
    }

    /// The tasks that are given to this client.
    pub fn assignments(&self) -> Received<Assignment> {
        Received::of(&self.core.inbox.assignments)
    }

    /// What the server asks of the connection. The client does by itself what is asked.
    pub fn signals(&self) -> Received<Signal> {
        Received::of(&self.core.inbox.signals)
    }

    /// What the client keeps for itself, and why it was started: comes after each connection.
    pub fn configs(&self) -> Received<ConfigSnapshot> {
        Received::of(&self.core.inbox.configs)
    }

    /// What the server refused of what has no answer: messages, reports of progress, switches of the workspace.
    pub fn refusals(&self) -> Received<Error> {
        Received::of(&self.core.inbox.refusals)
    }

    /// Events of tasks that this client is told without having asked by [`Tasks::follow`](crate::task::Tasks::follow).
    pub fn task_events(&self) -> Received<TaskEvent> {
        Received::of(&self.core.inbox.task_events)
    }

    /// Everything else that comes unasked.
    pub fn notices(&self) -> Received<Notice> {
        Received::of(&self.core.inbox.notices)
    }

    /// Runs a handler for each message, one after the other, in order. If the client connected
    /// [`at_least_once`](crate::Builder::at_least_once), the message is acknowledged when the handler is done with it.
    ///
    /// A handler that fails is given the same message again, after 0.1 to 30 seconds, until it takes it: what comes behind waits.
    /// To pass over a message, return `Ok`. A panic counts as a failure.
    pub fn on_message<F, R, E>(&self, handler: F)
    where
        F: FnMut(Arc<Message>) -> R + Send + 'static,
        R: Future<Output = std::result::Result<(), E>> + Send + 'static,
        E: fmt::Display + Send + 'static,
    {
        self.core.spawn(crate::handler::messages(self.messages(), handler, self.core.ending()));
    }

    /// Runs a handler for each of what a stream yields, one after the other, until the client ends or nothing comes any more. A
    /// panic in it is logged, and the next one is handled.
    ///
    /// ```no_run
    /// # async fn f(agent: trunkline_client::Agent) {
    /// agent.handle(agent.progress(), |update| async move { println!("{}: {}", update.source, update.summary) });
    /// # }
    /// ```
    pub fn handle<T, F, R>(&self, what: Received<T>, handler: F)
    where
        T: Send + 'static,
        F: FnMut(T) -> R + Send + 'static,
        R: Future<Output = ()> + Send + 'static,
    {
        self.core.spawn(crate::handler::each(what, handler));
    }
}

impl Core {
    /// Changes, at last to the end.
    pub(crate) fn ending(&self) -> watch::Receiver<State> {
        self.state.subscribe()
    }
}

impl fmt::Debug for Client {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Client {{ {:?}, {:?} }}", self.core.identity(), &*self.core.state.borrow())
    }
}

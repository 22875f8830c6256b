//! The runtime's side: events are kept before they are sent, whoever was away gets them, and a turn that is begun twice runs
//! once.

mod desk;
mod socket;

use std::{
    collections::{HashMap, HashSet},
    pin::Pin,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use serde::Serialize;
use serde_json::Value;
use tokio_util::task::TaskTracker;

use self::desk::Desk;
use crate::{
    close::Close,
    envelope::{Envelope, Meta, Type, make},
    link::Terms,
    state::RuntimeState,
    store::{EventStore, StoreError},
    transport::Transport,
};

/// Clients whose state is held in memory. Beyond it those without a socket are let go; what they had is in the store.
const DESKS_MAX: usize = 10_000;

/// What a client asks of the runtime.
#[derive(Clone, Debug)]
pub struct Ask {
    /// Who.
    pub client_id: String,
    /// From which of its sockets.
    pub socket_id: String,
    /// What: `turn_start`, `turn_aborted`, `approval_resolve`, an attachment's, or something of the program's own.
    pub envelope: Envelope,
}

impl Ask {
    /// The turn that it is about.
    #[must_use]
    pub fn turn_id(&self) -> Option<&str> {
        self.envelope.turn_id.as_deref()
    }

    /// What it says.
    #[must_use]
    pub fn payload(&self) -> Value {
        self.envelope.value()
    }
}

/// What a runtime does about what it is asked. Each runs in a task of its own, which the asker's socket does not end; it
/// tells what comes of it by [`Emitter::emit`].
pub trait Handlers: Send + Sync + 'static {
    /// How the runtime is, to this client. Without an answer, it is what follows from the events.
    fn state(&self, client_id: &str) -> impl Future<Output = Option<RuntimeState>> + Send {
        let _ = client_id;
        async { None }
    }

    /// A turn is to begin. Of several with one id, only the first comes here.
    fn start_turn(&self, ask: Ask, emitter: Emitter) -> impl Future<Output = ()> + Send {
        let _ = (ask, emitter);
        async {}
    }

    /// A turn is to stop.
    fn abort_turn(&self, ask: Ask, emitter: Emitter) -> impl Future<Output = ()> + Send {
        let _ = (ask, emitter);
        async {}
    }

    /// A question is answered.
    fn resolve_approval(&self, ask: Ask, emitter: Emitter) -> impl Future<Output = ()> + Send {
        let _ = (ask, emitter);
        async {}
    }

    /// A file comes, is there, or failed to come.
    fn attachment(&self, ask: Ask, emitter: Emitter) -> impl Future<Output = ()> + Send {
        let _ = (ask, emitter);
        async {}
    }

    /// Anything of these, by what it is. For a runtime that wants to see them in one place.
    fn asked(&self, ask: Ask, emitter: Emitter) -> impl Future<Output = ()> + Send {
        async move {
            match ask.envelope.kind {
                Type::TurnStart => self.start_turn(ask, emitter).await,
                Type::TurnAborted => self.abort_turn(ask, emitter).await,
                Type::ApprovalResolve => self.resolve_approval(ask, emitter).await,
                Type::AttachmentUploading | Type::AttachmentReady | Type::AttachmentError => {
                    self.attachment(ask, emitter).await;
                }
                kind => tracing::debug!(%kind, "a client said what only a runtime says"),
            }
        }
    }
}

/// What a server is made from.
pub struct Options {
    /// New with every start of the runtime.
    pub runtime_generation: String,
    /// Turns of a former generation that this one goes on with. All others that ran are reported lost.
    pub recovered_turns: HashSet<String>,
    /// What both sides agree to.
    pub terms: Terms,
}

impl Options {
    /// With what is usual besides.
    #[must_use]
    pub fn new(runtime_generation: impl Into<String>) -> Self {
        let (recovered_turns, terms) = (HashSet::new(), Terms::default());
        Self { runtime_generation: runtime_generation.into(), recovered_turns, terms }
    }
}

/// Why an event was not emitted. Nobody saw it.
#[derive(Debug, thiserror::Error)]
pub enum EmitError {
    /// It is no event, but something that is said once.
    #[error("{0} is no event")]
    NoEvent(Type),
    /// Its payload is no JSON.
    #[error("payload: {0}")]
    Payload(#[from] serde_json::Error),
    /// The store did not keep it.
    #[error("the event store failed: {0}")]
    Store(StoreError),
    /// What would bring it there has ended.
    #[error("the runtime has ended")]
    Ended,
}

/// Serves sockets of any number of clients. Clones share everything.
pub struct Server<H> {
    hub: Hub,
    handlers: Arc<H>,
    tasks: TaskTracker,
}

impl<H> Clone for Server<H> {
    fn clone(&self) -> Self {
        Self { hub: self.hub.clone(), handlers: self.handlers.clone(), tasks: self.tasks.clone() }
    }
}

impl<H: Handlers> Server<H> {
    /// A server that keeps events in `store`.
    #[must_use]
    pub fn new(store: impl EventStore, handlers: H, options: Options) -> Self {
        let shared = Shared { store: Box::new(store), options, desks: Mutex::default() };
        Self { hub: Hub(Arc::new(shared)), handlers: Arc::new(handlers), tasks: TaskTracker::new() }
    }

    /// By which events are emitted.
    #[must_use]
    pub fn emitter(&self) -> Emitter {
        Emitter::new(self.hub.clone())
    }

    /// How the runtime is to a client, as its events say.
    ///
    /// # Errors
    /// If the store does not answer.
    pub async fn state(&self, client_id: &str) -> Result<RuntimeState, StoreError> {
        Ok(self.hub.desk(client_id).await?.state().await.0)
    }

    /// Serves one socket until it ends. Dropping this cuts it.
    ///
    /// # Errors
    /// Why it was closed from here; the other side was told.
    pub async fn serve<T: Transport>(&self, transport: T) -> Result<(), Close> {
        let (sender, receiver) = transport.split();
        socket::serve(self, sender, receiver).await
    }

    /// Waits until no handler runs any more.
    pub async fn settled(&self) {
        self.tasks.close();
        self.tasks.wait().await;
        self.tasks.reopen();
    }
}

/// Emits events to clients. Clones are the same.
#[derive(Clone)]
pub struct Emitter(Arc<dyn Emits>);

/// What an event becomes that is emitted.
pub type Emitted = Pin<Box<dyn Future<Output = Result<Envelope, EmitError>> + Send>>;

/// What keeps events and brings them to clients.
pub(crate) trait Emits: Send + Sync {
    fn emit(&self, event: Envelope) -> Emitted;
}

impl Emitter {
    pub(crate) fn new(emits: impl Emits + 'static) -> Self {
        Self(Arc::new(emits))
    }

    /// Keeps an event of a client, and sends it to all of its sockets. It is kept when this answers; events of one client are
    /// in the order in which this was called.
    ///
    /// # Errors
    /// [`EmitError`]. Then nobody sees it.
    pub async fn emit(
        &self,
        client_id: &str,
        kind: Type,
        payload: &impl Serialize,
        meta: Meta,
    ) -> Result<Envelope, EmitError> {
        if !kind.is_event() {
            return Err(EmitError::NoEvent(kind));
        }
        let mut event = make(kind, payload, meta)?;
        event.client_id = Some(client_id.to_owned());
        self.0.emit(event).await
    }
}

#[derive(Clone)]
struct Hub(Arc<Shared>);

struct Shared {
    store: Box<dyn EventStore>,
    options: Options,
    desks: Mutex<HashMap<String, Arc<Desk>>>,
}

impl Emits for Hub {
    fn emit(&self, mut event: Envelope) -> Emitted {
        let hub = self.clone();
        Box::pin(async move {
            let desk = hub.desk(event.client_id.as_deref().unwrap_or_default()).await.map_err(EmitError::Store)?;
            event.runtime_generation.get_or_insert_with(|| hub.0.options.runtime_generation.clone());
            desk.append(&*hub.0.store, event).await.map_err(EmitError::Store)
        })
    }
}

impl Hub {
    /// The client's desk; made from the store if it is not there.
    async fn desk(&self, client_id: &str) -> Result<Arc<Desk>, StoreError> {
        let desk = {
            let mut desks = self.desks();
            if desks.len() >= DESKS_MAX && !desks.contains_key(client_id) {
                desks.retain(|_, desk| Arc::strong_count(desk) > 1);
            }
            desks.entry(client_id.to_owned()).or_default().clone()
        };
        desk.open(client_id, &*self.0.store, &self.0.options).await?;
        Ok(desk)
    }

    fn desks(&self) -> MutexGuard<'_, HashMap<String, Arc<Desk>>> {
        self.0.desks.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

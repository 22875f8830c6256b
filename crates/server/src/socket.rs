//! The socket surface: `/agent-socket`. See docs/protocol/agent-socket.md.

mod agent;
mod desk;
mod record;
mod runtime;
mod transport;
mod ui;

use std::{sync::Arc, time::Duration};

use axum::{
    Extension, Router,
    extract::{State, WebSocketUpgrade, ws::rejection::WebSocketUpgradeRejection},
    response::Response,
    routing::get,
};
use futures_util::future::BoxFuture;
use tokio::time::{Instant, sleep_until, timeout};
use tokio_util::task::TaskTracker;
use trunkline_agent_socket::{
    Close, Envelope,
    client::Connector,
    close::code,
    link::{Due, Hello, Link, Role, SILENT_BEATS, Said, Terms},
    transport::{Broken, Frame, MemoryTransport, Receiver, Sender, Transport, send},
};
use trunkline_core::{Error, Kind, caller::Caller, socket::Sockets};

pub(crate) use self::agent::Agents;
use self::{desk::Desks, transport::WebSocket};
use crate::{
    error::Refusal,
    http::{self, Asked, Ending, Web},
    listen::Seat,
};

/// Bytes that a socket reads and writes at once. What is idle holds them.
const READ_BYTES: usize = 4 * 1024;
const WRITE_BYTES: usize = 16 * 1024;

/// The surface. Clones share it.
#[derive(Clone)]
pub(crate) struct Surface(Arc<Shared>);

struct Shared {
    sockets: Sockets,
    agents: Agents,
    desks: Desks,
    web: Web,
    terms: Terms,
    tasks: TaskTracker,
}

impl Surface {
    pub(crate) fn new(sockets: Sockets, agents: Agents, web: Web, tasks: TaskTracker) -> Self {
        let terms = Terms { frame_bytes_max: web.limits.payload_bytes_max, ..Terms::default() };
        Self(Arc::new(Shared { sockets, agents, desks: Desks::default(), web, terms, tasks }))
    }

    pub(crate) fn router(self) -> Router {
        Router::new().route("/agent-socket", get(upgrade)).with_state(self)
    }

    /// Serves one socket until it ends.
    async fn serve(self, transport: impl Transport, caller: Arc<Caller>) {
        let (sender, mut receiver) = transport.split();
        let link = Link::new(self.0.terms, 0);
        let ending = Box::pin(http::ending(&self.0.web, caller.clone()));
        let mut socket = Socket { shared: self.0, caller, sender, link, begun: Instant::now(), ending };
        let ended = match socket.hello(&mut receiver).await {
            Ok(Some((hello, envelope))) if hello.role == Role::Runtime => {
                let _ = envelope;
                runtime::serve(&mut socket, &mut receiver, hello).await
            }
            Ok(Some((hello, envelope))) => ui::serve(&mut socket, &mut receiver, &hello, envelope).await,
            Ok(None) => Ok(()),
            Err(close) => Err(close),
        };
        if let Err(close) = ended {
            tracing::debug!(%close, "a socket is closed");
            // It has no longer for this than for anything else.
            let _ = timeout(socket.patience(), socket.sender.close(close)).await;
            receiver.drain().await;
        }
    }
}

/// Sockets of the program that has the server inside, with every right: for a runtime or a client that needs no network.
#[derive(Clone)]
pub struct Inside {
    surface: Surface,
    caller: Arc<Caller>,
}

impl Inside {
    pub(crate) fn new(surface: Surface, caller: Caller) -> Self {
        Self { surface, caller: caller.into() }
    }
}

impl Connector for Inside {
    type Transport = MemoryTransport;

    async fn connect(&mut self) -> Result<MemoryTransport, Broken> {
        let (here, there) = MemoryTransport::pair();
        let (surface, caller) = (self.surface.clone(), self.caller.clone());
        if surface.0.web.stop.is_cancelled() {
            return Err("the server has stopped".into());
        }
        self.surface.0.tasks.spawn(async move { surface.serve(there, caller).await });
        Ok(here)
    }
}

async fn upgrade(
    State(surface): State<Surface>,
    seat: Option<Extension<Seat>>,
    // Before whoever takes the headers.
    upgrade: Result<WebSocketUpgrade, WebSocketUpgradeRejection>,
    asked: Asked,
) -> Result<Response, Refusal> {
    let caller = asked.viewer(&surface.0.web).await?;
    let upgrade = upgrade.map_err(|e| Error::new(Kind::Invalid, "ERR_INVALID_ARGUMENT", e.body_text()))?;
    let held = surface.0.web.streams.open(&caller, "socket")?;
    let most = surface.0.terms.frame_bytes_max;
    let upgrade = upgrade.read_buffer_size(READ_BYTES).write_buffer_size(WRITE_BYTES);
    let upgrade = upgrade.max_message_size(most).max_frame_size(most);
    let tasks = surface.0.tasks.clone();
    Ok(upgrade.on_upgrade(move |socket| async move {
        // As a task that the server waits for, boxed: what brought it here goes away.
        tasks.spawn(Box::pin(async move {
            surface.serve(WebSocket(socket), caller).await;
            drop((held, seat));
        }));
    }))
}

/// One socket, whoever is at the other end.
struct Socket<S> {
    shared: Arc<Shared>,
    caller: Arc<Caller>,
    sender: S,
    link: Link,
    begun: Instant,
    /// The server stops, or what the caller came in with is not good any more.
    ending: BoxFuture<'static, Ending>,
}

impl<S: Sender> Socket<S> {
    fn now(&self) -> u64 {
        u64::try_from(self.begun.elapsed().as_millis()).unwrap_or(u64::MAX)
    }

    /// How long the other end may take no frame.
    fn patience(&self) -> Duration {
        Duration::from_millis(self.shared.terms.heartbeat_ms * SILENT_BEATS)
    }

    /// The first thing that is said; nothing if the other end went away.
    async fn hello(&mut self, receiver: &mut impl Receiver) -> Result<Option<(Hello, Envelope)>, Close> {
        loop {
            let due = self.until_due()?;
            tokio::select! {
                frame = receiver.next() => match self.hear(frame)? {
                    Some(Said::Hello(hello, envelope)) => return Ok(Some((hello, envelope))),
                    Some(_) => {}
                    None => return Ok(None),
                },
                () = sleep_until(due) => {}
                ending = &mut self.ending => return Err(ends(ending)),
            }
        }
    }

    /// When something is due.
    fn until_due(&self) -> Result<Instant, Close> {
        match self.link.due(self.now()) {
            Due::At(at) => Ok(self.begun + Duration::from_millis(at)),
            Due::Heartbeat => Ok(Instant::now()),
            Due::Close(close) => Err(close),
        }
    }

    /// Sends a heartbeat if it is time to.
    async fn beat(&mut self, heartbeat: impl FnOnce() -> Envelope) -> Result<(), Close> {
        if self.link.due(self.now()) != Due::Heartbeat {
            return Ok(());
        }
        // Browsers answer the transport's question by themselves, whatever speaks there.
        let _ = timeout(self.patience(), self.sender.ping()).await;
        self.link.asked(self.now());
        self.send(vec![heartbeat().to_json()]).await
    }

    /// What was said; nothing if the other end is gone.
    fn hear(&mut self, frame: Option<Result<Frame, Broken>>) -> Result<Option<Said>, Close> {
        let now = self.now();
        match frame {
            Some(Ok(Frame::Envelope(frame))) => self.link.hear(&frame, now).map(Some),
            Some(Ok(Frame::Alive)) => {
                self.link.alive(now);
                Ok(Some(Said::Nothing))
            }
            Some(Ok(Frame::TooLarge(why))) => Err(Close::new(code::TOO_LARGE, why)),
            Some(Ok(Frame::NotText(why))) => Err(Close::new(code::UNREADABLE, why)),
            // Whoever breaks or closes comes back if it likes.
            Some(Ok(Frame::Closed(_)) | Err(_)) | None => Ok(None),
        }
    }

    async fn send(&mut self, frames: Vec<String>) -> Result<(), Close> {
        let patience = self.patience();
        send(&mut self.sender, frames, patience).await?;
        self.link.told(self.now());
        Ok(())
    }
}

/// To be connected again, with another token if it was that.
fn ends(ending: Ending) -> Close {
    Close::new(code::AWAY, ending.to_string())
}

/// What an error closes a socket with.
fn failed(error: &Error) -> Close {
    let code = match error.kind {
        Kind::Invalid => code::UNREADABLE,
        Kind::Denied | Kind::Unauthenticated | Kind::NotFound => code::POLICY,
        Kind::Exhausted => code::BUSY,
        _ => {
            tracing::warn!(%error, "a socket is closed");
            code::FAILED
        }
    };
    Close::new(code, error.message.clone())
}

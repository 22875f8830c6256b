//! Wiring: config in, running server out; and the way down, with a deadline.

use std::{net::SocketAddr, sync::Arc, time::Duration};

use axum::http::HeaderValue;
use tokio::net::TcpListener;
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use trunkline_core::{
    app::{self, Apps},
    audit,
    caller::{Caller, Credential},
    checkpoint,
    conversation::{self, Conversations},
    gate::Gate,
    identity::Identity,
    kv,
    limits::Limits,
    registry::Registry,
    sandbox::{Need, Sandbox, Sandboxes, SessionStore},
    session::{self, Absentees, Sessions, dead_letter},
    socket::Sockets,
    task::Tasks,
    token::{self, Secret},
    topic,
};
use trunkline_store::{
    Options, Store,
    fault::Fault,
    ledger::{self, Relay},
    log,
};

use crate::{
    agent::{Allowance, Gateway, Replies},
    auth::Auth,
    config::{Config, ConfigError, Durability, Listen},
    conversation as conversations,
    http::{self, Pages, Site, Web},
    listen::{Connections, InheritError, Limit, ListenSockets, Listeners},
    metrics::Metrics,
    ops::{self, Operations},
    repeats::Repeats,
    sandbox,
    socket::{Agents, Inside, Surface},
    sse::Streams,
    supervise::Supervisor,
    tls::Tls,
};

/// Connections of operators: a part of the descriptors that clients leave free.
const OPS_CONNECTIONS_MAX: u32 = 128;

/// How long requests of operators may take once everything else has ended.
const OPS_TIMEOUT: Duration = Duration::from_secs(1);

/// A running server. Dropping it without [`Server::stop`] leaves it running for as long as its runtime.
pub struct Server {
    addresses: Addresses,
    /// Kept open for the server that takes its place.
    listen_sockets: ListenSockets,
    store: Store,
    stop: CancellationToken,
    tasks: TaskTracker,
    jobs: Supervisor,
    /// Ends what outlives the clients.
    closed: CancellationToken,
    ops_tasks: TaskTracker,
    timeout: Duration,
    admin_key: Option<Secret>,
    sandboxes: Sandboxes,
    inside: Inside,
    /// The directory of a server that keeps nothing.
    dir: Option<tempfile::TempDir>,
}

/// Where a server listens.
#[derive(Clone, Copy, Debug)]
pub struct Addresses {
    /// For agents, tasks and services.
    pub grpc: SocketAddr,
    /// For browsers and sandboxes.
    pub http: SocketAddr,
    /// For operators.
    pub ops: SocketAddr,
}

/// Why a server did not start. Nothing is left behind.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// `--dev` admits everybody, so it serves this machine only.
    #[error("--dev admits everybody and therefore binds loopback addresses only, not {0}")]
    DevBeyondLoopback(SocketAddr),
    /// An address cannot be bound.
    #[error("cannot listen on {address}: {source}")]
    Bind {
        /// Which one.
        address: SocketAddr,
        /// Why.
        source: std::io::Error,
    },
    /// A listening socket that was passed on cannot be used.
    #[error("inherited socket {number}: {source}")]
    Inherit {
        /// Which one, from 0.
        number: usize,
        /// Why.
        source: InheritError,
    },
    /// The listening sockets cannot be used.
    #[error("cannot accept connections: {0}")]
    Accept(std::io::Error),
    /// The settings contradict themselves.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// There is no room for a server that keeps nothing.
    #[error("cannot make a temporary directory: {0}")]
    Memory(std::io::Error),
    /// The data directory cannot be opened.
    #[error(transparent)]
    Store(#[from] trunkline_store::OpenError),
    /// What is kept there cannot be read.
    #[error(transparent)]
    Core(#[from] trunkline_core::Error),
}

impl Server {
    /// Binds the listeners, opens the store and starts serving. Clients that connect while the store is opened wait.
    ///
    /// # Errors
    /// [`StartError`], before anything is served.
    pub async fn start(config: Config) -> Result<Self, StartError> {
        Self::start_with(ListenSockets::bind(&config.listen)?, config, None).await
    }

    /// As [`Server::start`], on sockets that listen already; `config.listen` is checked, and not bound.
    ///
    /// # Errors
    /// [`StartError`], before anything is served.
    pub async fn start_on(sockets: ListenSockets, config: Config) -> Result<Self, StartError> {
        Self::start_with(sockets, config, None).await
    }

    /// Checks settings as [`Server::start`] does before it opens its store; opens and binds nothing.
    ///
    /// # Errors
    /// [`StartError`].
    pub fn check(config: &Config) -> Result<(), StartError> {
        check(config).map(drop)
    }

    pub(crate) async fn start_with(
        listen_sockets: ListenSockets,
        config: Config,
        session_store: Option<Arc<dyn SessionStore>>,
    ) -> Result<Self, StartError> {
        let limits = config.limits;
        let (origins, tls) = check(&config)?;
        let [grpc, http, ops] = listen_sockets.accepting().map_err(StartError::Accept)?;
        // Inherited ones may listen elsewhere than the settings say.
        begin_dev(config.dev, [grpc.1, http.1, ops.1])?;
        let store = open_store(&config).await?;
        let (stop, background, clock) = (CancellationToken::new(), TaskTracker::new(), log::Clock::system());
        let url = format!("{}://{}", if tls.is_some() { "https" } else { "http" }, http.1);
        let own = Own { stop: stop.clone(), tracker: background.clone(), clock: clock.clone(), url };
        let rooms = Rooms::open(&config, store.clone(), own, session_store).await?;
        let Rooms { gate, sandboxes, sockets, sessions, tasks, talks } = rooms.clone();
        let metrics = Arc::new(Metrics::new());
        let (known, ends, jobs) = (gate.clone(), stop.clone(), Supervisor::new(background.clone(), stop.clone()));
        let operations =
            Operations::new(known, sessions.clone(), sandboxes.clone(), metrics.clone(), ends, jobs.clone());
        let auth = Auth::new(gate.clone(), tasks.clone(), config.dev);
        let gateway = Gateway {
            sessions: sessions.clone(),
            metrics: metrics.clone(),
            gate: gate.clone(),
            auth: auth.clone(),
            limits,
            started_at: i64::try_from(clock.now_ms() / 1000).unwrap_or(i64::MAX),
            stop: stop.clone(),
            tasks: tasks.clone(),
            conversations: talks.clone(),
            tracker: background.clone(),
            read_ahead: Allowance::default(),
            replies: Replies::new(metrics.reply_bytes.clone()),
        };
        let streams = Streams::new(limits.event_streams_per_token, metrics.event_streams.clone());
        let (repeats, is_tls) = (Repeats::new(background.clone()), tls.is_some());
        let web = Web { auth, limits, stop: stop.clone(), metrics: metrics.clone(), streams, repeats, is_tls };
        let agents = Agents { sessions, tasks, conversations: talks.clone() };
        let socket = Surface::new(sockets, agents, web.clone(), background.clone());
        let apps = conversations::router(talks, web.clone());
        let surfaces = sandbox::router(sandboxes.clone(), web).merge(socket.clone().router());
        let server = Self {
            admin_key: if config.dev { None } else { token::bootstrap(&gate).await? },
            addresses: Addresses { grpc: grpc.1, http: http.1, ops: ops.1 },
            listen_sockets,
            store: store.clone(),
            stop,
            tasks: background,
            jobs,
            sandboxes,
            inside: Inside::new(socket, owner()?),
            dir: None,
            closed: CancellationToken::new(),
            ops_tasks: TaskTracker::new(),
            timeout: Duration::from_secs(config.shutdown.timeout_seconds),
        };
        server.jobs.spawn_until_stop("message rate", metrics.clone().sample());
        let listeners = server.listeners(tls.clone(), connections(&metrics, &limits), &limits);
        listeners.grpc(grpc.0, gateway);
        let site = http::site(surfaces, Pages { origins, own_hosts_only: config.dev }).with_apps(apps);
        listeners.http(http.0, site, metrics.http_answers.clone());
        server.operators(ops.0, listeners, Site::same(ops::router(operations), config.dev));
        if let Some(tls) = tls {
            server.jobs.spawn("certificate watch", tls.watch(server.stop.clone()));
        }
        server.keep_going(store, rooms, &config);
        Ok(server)
    }

    /// Operators are answered until the end.
    fn operators(&self, socket: TcpListener, others: Listeners, site: Site) {
        let jobs = self.jobs.within(self.ops_tasks.clone(), self.closed.clone());
        Listeners { tls: None, jobs, ..others }.ops(socket, site);
    }

    fn listeners(&self, tls: Option<Tls>, connections: Connections, limits: &Limits) -> Listeners {
        let keepalive = Duration::from_secs(limits.keepalive_seconds);
        Listeners { tls, connections, keepalive, jobs: self.jobs.clone() }
    }

    /// Where it listens.
    #[must_use]
    pub fn addresses(&self) -> Addresses {
        self.addresses
    }

    /// Where it listens for browsers and sandboxes.
    #[must_use]
    pub fn port(&self) -> u16 {
        self.addresses.http.port()
    }

    /// Makes a session for a sandbox, or answers the one that is there.
    ///
    /// # Errors
    /// [`trunkline_core::Kind::Invalid`] for what is no id or no project, [`trunkline_core::Kind::Unavailable`].
    pub async fn create_session(&self, id: &str, project: Option<&str>) -> Result<Sandbox, trunkline_core::Error> {
        Ok(self.sandboxes.create(&owner()?, id, project).await?.0)
    }

    /// The session with this id.
    ///
    /// # Errors
    /// [`trunkline_core::Kind::Unavailable`].
    pub async fn session(&self, id: &str) -> Result<Option<Sandbox>, trunkline_core::Error> {
        match self.sandboxes.find(&owner()?, id, Need::Read).await {
            Ok(seat) => Ok(Some(seat.sandbox().clone())),
            Err(error) if error.kind == trunkline_core::Kind::NotFound => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// All sessions, or those of a project, oldest first.
    ///
    /// # Errors
    /// [`trunkline_core::Kind::Unavailable`].
    pub async fn sessions(&self, project: Option<&str>) -> Result<Vec<Sandbox>, trunkline_core::Error> {
        self.sandboxes.list(&owner()?, project).await
    }

    /// Connects runtimes and clients of `agent_socket` that are in this process, with every right.
    #[must_use]
    pub fn inside(&self) -> Inside {
        self.inside.clone()
    }

    /// As [`Server::stop`].
    pub async fn close(self) {
        self.stop().await;
    }

    pub(crate) fn owning(mut self, dir: tempfile::TempDir) -> Self {
        self.dir = Some(dir);
        self
    }

    /// The administrator's API key, if this start made it: the first one without `--dev`. To be shown once; only its
    /// digest is kept.
    pub fn take_admin_key(&mut self) -> Option<Secret> {
        self.admin_key.take()
    }

    /// Makes another administrator's key in the data directory of a server that is not running: for when the first is lost.
    ///
    /// # Errors
    /// [`StartError`], also if a server is running on it.
    pub async fn make_admin_key(config: &Config) -> Result<Secret, StartError> {
        let store = open_store(config).await?;
        let made = match Gate::open(store.clone()).await {
            Ok(gate) => token::admin_key(&gate).await,
            Err(error) => Err(error),
        };
        store.stop().await;
        Ok(made?)
    }

    /// Its store.
    #[must_use]
    pub fn store(&self) -> &Store {
        &self.store
    }

    /// Takes no more connections, tells the clients, waits for them up to the configured time, closes the store. New
    /// connections are refused at once.
    pub async fn stop(self) {
        let (listen_sockets, ending) = self.ending();
        drop(listen_sockets);
        ending.await;
    }

    /// As [`Server::stop`], but its sockets go on listening: clients that connect wait for what accepts from them next, by
    /// [`Server::start_on`] or [`ListenSockets::exec`].
    pub async fn hand_over(self) -> ListenSockets {
        let (listen_sockets, ending) = self.ending();
        ending.await;
        listen_sockets
    }

    /// Its sockets, and the rest of it, to be awaited until it has ended.
    fn ending(self) -> (ListenSockets, impl Future<Output = ()> + Send) {
        let Self { listen_sockets, stop, tasks, timeout, store, closed, ops_tasks, dir, .. } = self;
        let ending = async move {
            stop.cancel();
            tasks.close();
            if tokio::time::timeout(timeout, tasks.wait()).await.is_err() {
                tracing::warn!(connections = tasks.len(), "connections did not end in time and are cut");
            }
            store.stop().await;
            closed.cancel();
            ops_tasks.close();
            if tokio::time::timeout(OPS_TIMEOUT, ops_tasks.wait()).await.is_err() {
                tracing::warn!("a request of operators did not end in time and is cut");
            }
            drop(dir);
        };
        (listen_sockets, ending)
    }

    /// Waits until a part of the server that must not end has ended before [`Server::stop`]: a background job that panicked,
    /// or a thread of the store. `/readyz` answers 503 from then on. What the part did is not done any more, so the program
    /// should stop the server and start another one, best in a new process; `trunkline serve` ends with exit code 70.
    /// Cancel-safe; waits for ever while all is well.
    pub async fn failed(&self) -> Fault {
        self.jobs.failed().await
    }

    /// What goes on besides, for as long as it runs.
    fn keep_going(&self, store: Store, rooms: Rooms, config: &Config) {
        self.jobs.watch(store.clone());
        let Store { ledger, log, .. } = store;
        self.jobs.spawn_until_stop("outbox relay", Relay::new(ledger, log.clone()).run());
        self.jobs.spawn_until_stop("task timer", Box::pin(rooms.tasks.clone().run()));
        self.jobs.spawn_until_stop("task balancer", rooms.tasks.clone().balance());
        self.jobs.spawn("sandbox timer", rooms.sandboxes.clone().run());
        self.jobs.spawn("conversation timer", rooms.talks.clone().run());
        self.jobs.spawn_until_stop("quiet conversations", rooms.talks.clone().settle_quiet());
        self.sweep(log, rooms, config);
    }

    /// Trims what is older than it is kept, and removes audit events and keys that have expired.
    fn sweep(&self, log: log::Log, rooms: Rooms, config: &Config) {
        let retention = config.retention;
        let Rooms { gate, tasks, sockets, talks, .. } = rooms;
        let stop = self.stop.clone();
        let days = retention.sockets_days;
        let left = (days > 0).then(|| Duration::from_secs(days.saturating_mul(24 * 60 * 60)));
        let mut absentees = config.absence().map(|away| Absentees::new(gate.clone(), away));
        let mut ticks = tokio::time::interval(Duration::from_secs(retention.sweep_seconds.max(1)));
        self.jobs.spawn("retention sweep", async move {
            while stop.run_until_cancelled(ticks.tick()).await.is_some() {
                if let Err(error) = gate.note_tail().await {
                    tracing::warn!(%error, "the log's tail was not noted; the next sweep goes on");
                }
                if let Err(error) = log.sweep().await {
                    tracing::warn!(%error, "retention sweep failed; the next one goes on");
                }
                if let Err(error) = audit::sweep(&gate, retention.audit_days).await {
                    tracing::warn!(%error, "old audit events were not removed; the next sweep goes on");
                }
                if let Err(error) = tasks.sweep().await {
                    tracing::warn!(%error, "expired names of tasks were not removed; the next sweep goes on");
                }
                if let Err(error) = dead_letter::sweep(&gate).await {
                    tracing::warn!(%error, "old dead letters were not removed; the next sweep goes on");
                }
                if let Err(error) = sockets.sweep(left).await {
                    tracing::warn!(%error, "what clients asked long ago was not removed; the next sweep goes on");
                }
                if let Err(error) = talks.sweep().await {
                    tracing::warn!(%error, "drafts that were not sent were not removed; the next sweep goes on");
                }
                if let Some(absentees) = &mut absentees
                    && let Err(error) = absentees.sweep().await
                {
                    tracing::warn!(%error, "principals that do not come back were not forgotten; the next sweep goes on");
                }
                if let Err(error) = checkpoint::sweep(&gate).await {
                    tracing::warn!(%error, "expired checkpoints were not removed; the next sweep goes on");
                }
                if let Err(error) = kv::sweep(&gate).await {
                    tracing::warn!(%error, "expired keys were not removed; the next sweep goes on");
                }
            }
        });
    }
}

/// What core is made of.
#[derive(Clone)]
struct Rooms {
    gate: Gate,
    sandboxes: Sandboxes,
    sockets: Sockets,
    sessions: Sessions,
    tasks: Tasks,
    talks: Conversations,
}

/// What these need of the process.
struct Own {
    stop: CancellationToken,
    tracker: TaskTracker,
    clock: log::Clock,
    /// Where it is, for whoever is told no better.
    url: String,
}

impl Rooms {
    async fn open(
        config: &Config,
        store: Store,
        own: Own,
        session_store: Option<Arc<dyn SessionStore>>,
    ) -> Result<Self, StartError> {
        let Own { stop, tracker, clock, url } = own;
        let (gate, limits) = (Gate::open(store).await?, config.limits);
        kv::settle(&gate, &config.kv.legacy_workspace).await?;
        checkpoint::count_up(&gate).await?;
        let (known, owner, ends) = (gate.clone(), tracker.clone(), stop.clone());
        let sandboxes = Sandboxes::new(known, config.sandbox, limits, owner, ends, clock.clone(), session_store);
        let sockets = Sockets::open(gate.clone(), clock.clone(), tracker.clone()).await?;
        let options = session::Options {
            connections_per_workspace: limits.connections_per_workspace,
            broadcast_tasks: config.messages.broadcast_tasks()?,
            lost_sessions_max: config.messages.lost_sessions_max,
        };
        let sessions = Sessions::new(gate.clone(), options);
        let registry = Registry::open(gate.clone()).await?;
        let tasks = Tasks::new(gate.clone(), registry, config.tasks, tracker.clone(), clock.clone());
        tasks.recover().await?;
        let parts = conversation::Parts {
            apps: Apps::open(gate.clone(), config.apps.clone(), tracker.clone()).await?,
            sessions: sessions.clone(),
            tasks: tasks.clone(),
            options: config.conversation.clone(),
            text_bytes_max: limits.payload_bytes_max,
            own_url: url,
            clock,
            tracker,
            stop,
        };
        let talks = Conversations::open(gate.clone(), parts).await?;
        sandboxes.recover().await?;
        Ok(Self { gate, sandboxes, sockets, sessions, tasks, talks })
    }
}

/// The connections of all listeners, none yet.
fn connections(metrics: &Metrics, limits: &Limits) -> Connections {
    let ops = Limit { most: OPS_CONNECTIONS_MAX, ..Limit::default() };
    let (grpc, http) = (metrics.grpc_limit(limits.grpc_connections), metrics.http_limit(limits.http_connections));
    Connections::new(grpc, http, ops)
}

/// Checks settings without side effects; returns the allowed origins and the certificates that were read.
fn check(config: &Config) -> Result<(Vec<HeaderValue>, Option<Tls>), StartError> {
    let Listen { grpc, http, ops } = config.listen;
    check_dev(config.dev, [grpc, http, ops])?;
    config.check_sizes()?;
    config.messages.broadcast_tasks()?;
    app::check(&config.apps)?;
    let mut origins = http::origins(&config.http.allowed_origins)?;
    // Behind a proxy that changes the host, the server's own pages come from there.
    origins.extend(http::public_origin(&config.conversation.public_url)?);
    Ok((origins, Tls::load(&config.tls)?))
}

/// A server that admits everybody serves this machine only.
fn check_dev(dev: bool, listen: [SocketAddr; 3]) -> Result<(), StartError> {
    match listen.into_iter().find(|address| !address.ip().is_loopback()) {
        Some(address) if dev => Err(StartError::DevBeyondLoopback(address)),
        _ => Ok(()),
    }
}

/// As [`check_dev`], and logs that everybody is admitted.
fn begin_dev(dev: bool, listen: [SocketAddr; 3]) -> Result<(), StartError> {
    check_dev(dev, listen)?;
    if dev {
        tracing::warn!("development mode: everybody on this machine is admitted without a credential");
    }
    Ok(())
}

/// The program that has the server inside.
fn owner() -> Result<Caller, trunkline_core::Error> {
    Ok(Caller::new(Identity::user("owner", "library")?, String::new(), Credential::none(true)))
}

/// Opening replays what the last run left, so it runs where it may block.
async fn open_store(config: &Config) -> Result<Store, trunkline_store::OpenError> {
    let durability = match config.durability {
        Durability::Machine => trunkline_store::Durability::Machine,
        Durability::Process => {
            tracing::warn!("durability \"process\": what was acknowledged last is lost if the machine ends");
            trunkline_store::Durability::Process
        }
    };
    let classes = config.retention();
    let options = Options {
        log: log::Options { durability, classify: topic::class, classes, ..log::Options::default() },
        ledger: ledger::Options { durability, ..ledger::Options::default() },
        migrations: trunkline_core::migrations(),
        bucket: Some(config.files.clone()).filter(|bucket| !bucket.name.is_empty()),
    };
    let dir = config.data_dir.clone();
    let opened = tokio::task::spawn_blocking(move || Store::open(&dir, options)).await;
    opened.unwrap_or_else(|panic| {
        let reason = format!("opening panicked: {panic}").into();
        Err(log::Error::Corrupt { reason }.into())
    })
}

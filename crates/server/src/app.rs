//! Wiring: config in, running server out; and the way down, with a deadline.

use std::{
    net::SocketAddr,
    sync::Arc,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use tokio::net::TcpListener;
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use tonic::transport::server::TcpIncoming;
use trunkline_core::{
    gate::Gate,
    kv,
    session::{self, Sessions},
    token::{self, Secret},
    topic,
};
use trunkline_proto::v1::aether_gateway_server::AetherGatewayServer;
use trunkline_store::{
    Options, Store,
    ledger::{self, Relay},
    log,
};

use crate::{
    agent::{Gateway, Surface},
    auth::Auth,
    config::{Config, ConfigError, Durability, RetentionConfig},
    ops,
};

/// Largest frame that a client gets. The published contract's figure.
const FRAME_OUT_BYTES_MAX: usize = 16 * 1024 * 1024;

/// Streams of one HTTP/2 connection. The published contract's figure.
const STREAMS_MAX: u32 = 1000;

/// How often a silent client is pinged, and how long its answer may take. The published contract's figures.
const KEEPALIVE: (Duration, Duration) = (Duration::from_secs(30), Duration::from_secs(10));

/// A running server. Dropping it without [`Server::stop`] leaves it running for as long as its runtime.
pub struct Server {
    addresses: Addresses,
    store: Store,
    stop: CancellationToken,
    tasks: TaskTracker,
    timeout: Duration,
    admin_key: Option<Secret>,
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
    /// The settings contradict themselves.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// The data directory cannot be opened.
    #[error(transparent)]
    Store(#[from] trunkline_store::OpenError),
    /// What is kept there cannot be read.
    #[error(transparent)]
    Core(#[from] trunkline_core::Error),
}

impl Server {
    /// Opens the store, binds the listeners and starts serving.
    ///
    /// # Errors
    /// [`StartError`], before anything is served.
    pub async fn start(config: Config) -> Result<Self, StartError> {
        let listen = config.listen;
        if config.dev {
            let all = [listen.grpc, listen.http, listen.ops];
            if let Some(address) = all.into_iter().find(|address| !address.ip().is_loopback()) {
                return Err(StartError::DevBeyondLoopback(address));
            }
            tracing::warn!("development mode: everybody on this machine is admitted without a credential");
        }
        let sessions = session::Options {
            connections_per_workspace: config.limits.connections_per_workspace,
            broadcast_tasks: config.messages.broadcast_tasks()?,
        };
        let store = open_store(&config).await?;
        let (grpc, http, ops) = (bind(listen.grpc).await?, bind(listen.http).await?, bind(listen.ops).await?);
        let gate = Gate::open(store.clone()).await?;
        let server = Self {
            admin_key: if config.dev { None } else { token::bootstrap(&gate).await? },
            addresses: Addresses { grpc: grpc.1, http: http.1, ops: ops.1 },
            store: store.clone(),
            stop: CancellationToken::new(),
            tasks: TaskTracker::new(),
            timeout: Duration::from_secs(config.shutdown.timeout_seconds),
        };
        let gateway = Gateway {
            sessions: Sessions::new(gate.clone(), sessions),
            gate: gate.clone(),
            auth: Auth::new(gate.clone(), config.dev),
            limits: config.limits,
            started_at: SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |age| age.as_secs() as i64),
            stop: server.stop.clone(),
            tasks: server.tasks.clone(),
        };
        server.serve_grpc(grpc.0, gateway);
        server.serve_http("http", http.0, ops::no_surfaces());
        server.serve_http("ops", ops.0, ops::router());
        server.relay(store.clone());
        server.sweep(store.log, gate, config.retention);
        Ok(server)
    }

    /// Where it listens.
    #[must_use]
    pub fn addresses(&self) -> Addresses {
        self.addresses
    }

    /// The administrator's API key, if this start made it: the first one without `--dev`. To be shown once; only its
    /// digest is kept.
    pub fn take_admin_key(&mut self) -> Option<Secret> {
        self.admin_key.take()
    }

    /// Its store.
    #[must_use]
    pub fn store(&self) -> &Store {
        &self.store
    }

    /// Takes no more connections, tells the clients, waits for them up to the configured time, closes the store.
    pub async fn stop(self) {
        self.stop.cancel();
        self.tasks.close();
        if tokio::time::timeout(self.timeout, self.tasks.wait()).await.is_err() {
            tracing::warn!(connections = self.tasks.len(), "connections did not end in time and are cut");
        }
        self.store.stop().await;
    }

    fn serve_grpc(&self, listener: TcpListener, gateway: Gateway) {
        let frame_bytes_max = gateway.limits.frame_bytes_max;
        let service = AetherGatewayServer::new(Surface(Arc::new(gateway)))
            .max_decoding_message_size(frame_bytes_max)
            .max_encoding_message_size(FRAME_OUT_BYTES_MAX);
        let (health, health_service) = tonic_health::server::health_reporter();
        let stop = self.stop.clone();
        self.tasks.spawn(async move {
            health.set_serving::<AetherGatewayServer<Surface>>().await;
            let served = tonic::transport::Server::builder()
                .http2_keepalive_interval(Some(KEEPALIVE.0))
                .http2_keepalive_timeout(Some(KEEPALIVE.1))
                .concurrency_limit_per_connection(STREAMS_MAX as usize)
                .max_concurrent_streams(STREAMS_MAX)
                .add_service(health_service)
                .add_service(service)
                .serve_with_incoming_shutdown(
                    TcpIncoming::from(listener).with_nodelay(Some(true)),
                    stop.cancelled_owned(),
                );
            if let Err(error) = served.await {
                tracing::error!(%error, "the gRPC listener ended");
            }
        });
    }

    fn serve_http(&self, name: &'static str, listener: TcpListener, router: axum::Router) {
        let stop = self.stop.clone();
        self.tasks.spawn(async move {
            let served = axum::serve(listener, router).with_graceful_shutdown(stop.cancelled_owned());
            if let Err(error) = served.await {
                tracing::error!(%error, name, "a listener ended");
            }
        });
    }

    /// Carries ledger changes to the log.
    fn relay(&self, store: Store) {
        let stop = self.stop.clone();
        self.tasks.spawn(async move {
            stop.run_until_cancelled(Relay::new(store.ledger, store.log).run()).await;
        });
    }

    /// Trims what is older than it is kept, and removes keys that have expired.
    fn sweep(&self, log: log::Log, gate: Gate, retention: RetentionConfig) {
        let stop = self.stop.clone();
        let mut ticks = tokio::time::interval(Duration::from_secs(retention.sweep_seconds.max(1)));
        self.tasks.spawn(async move {
            while stop.run_until_cancelled(ticks.tick()).await.is_some() {
                if let Err(error) = log.sweep().await {
                    tracing::warn!(%error, "retention sweep failed; the next one goes on");
                }
                if let Err(error) = kv::sweep(&gate).await {
                    tracing::warn!(%error, "expired keys were not removed; the next sweep goes on");
                }
            }
        });
    }
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
    };
    let dir = config.data_dir.clone();
    let opened = tokio::task::spawn_blocking(move || Store::open(&dir, options)).await;
    opened.unwrap_or_else(|panic| {
        let reason = format!("opening panicked: {panic}").into();
        Err(log::Error::Corrupt { reason }.into())
    })
}

async fn bind(address: SocketAddr) -> Result<(TcpListener, SocketAddr), StartError> {
    let bound = async {
        let listener = TcpListener::bind(address).await?;
        let local = listener.local_addr()?;
        Ok((listener, local))
    };
    bound.await.map_err(|source| StartError::Bind { address, source })
}

//! A server in a few words, for programs that have one inside.

use std::{net::SocketAddr, path::PathBuf, sync::Arc, time::Duration};

use trunkline_core::sandbox::SessionStore;

use crate::{
    Config, ListenSockets, Server, StartError,
    config::{Durability, Listen},
};

/// A server to be started: without further words on free ports of the loopback address, open to everybody on this machine,
/// and in memory.
///
/// ```
/// # async fn demo() -> Result<(), Box<dyn std::error::Error>> {
/// use std::time::Duration;
/// let server = trunkline::Server::builder().bootstrap_timeout(Duration::from_secs(60)).start().await?;
/// let session = server.create_session("s1", Some("demo")).await?;
/// assert_eq!(server.sessions(Some("demo")).await?, [session.clone()]);
/// assert_eq!(server.session("s1").await?, Some(session));
/// println!("http://127.0.0.1:{}/sessions", server.port());
/// server.close().await;
/// # Ok(()) }
/// # tokio::runtime::Runtime::new().unwrap().block_on(demo()).unwrap();
/// ```
#[derive(Clone)]
pub struct Builder {
    config: Config,
    store: Option<Arc<dyn SessionStore>>,
    /// Where everything is kept; nothing for memory.
    data_dir: Option<PathBuf>,
}

impl Server {
    /// A server in a few words; [`Server::start`] takes every setting.
    #[must_use]
    pub fn builder() -> Builder {
        let config = Config { dev: true, ..Config::on_free_ports() };
        Builder { config, store: None, data_dir: None }
    }
}

impl Builder {
    /// The port for browsers and sandboxes, on the loopback address; 0, as without this, for a free one.
    #[must_use]
    pub fn port(mut self, port: u16) -> Self {
        let http = SocketAddr::from(([127, 0, 0, 1], port));
        self.config.listen = Listen { http, ..self.config.listen };
        self
    }

    /// How long a new session has to give a sign of life; zero is forever. 180 s without this.
    #[must_use]
    pub fn bootstrap_timeout(mut self, timeout: Duration) -> Self {
        self.config.sandbox.bootstrap_ms = u64::try_from(timeout.as_millis()).unwrap_or(u64::MAX);
        self
    }

    /// Keeps everything in a directory, so that the next server on it goes on.
    #[must_use]
    pub fn data_dir(mut self, dir: impl Into<PathBuf>) -> Self {
        self.data_dir = Some(dir.into());
        self
    }

    /// Keeps everything only as long as the server runs.
    #[must_use]
    pub fn in_memory(mut self) -> Self {
        self.data_dir = None;
        self
    }

    /// Keeps sessions and what they tell in a store of one's own; everything else as without this, in memory or in a directory.
    #[must_use]
    pub fn store(mut self, store: impl SessionStore) -> Self {
        self.store = Some(Arc::new(store));
        self
    }

    /// Starts it.
    ///
    /// # Errors
    /// [`StartError`], before anything is served.
    pub async fn start(self) -> Result<Server, StartError> {
        let Self { mut config, store, data_dir } = self;
        if let Some(dir) = data_dir {
            config.data_dir = dir;
            return Server::start_with(ListenSockets::bind(&config.listen)?, config, store).await;
        }
        // The store is one of files; these live as long as the server, and are never waited for.
        let dir = tempfile::tempdir().map_err(StartError::Memory)?;
        dir.path().clone_into(&mut config.data_dir);
        config.durability = Durability::Process;
        let sockets = ListenSockets::bind(&config.listen)?;
        Ok(Server::start_with(sockets, config, store).await?.owning(dir))
    }
}

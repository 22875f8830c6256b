//! What every client can be told before it connects.

use std::{marker::PhantomData, time::Duration};

use tonic::metadata::{Ascii, MetadataKey, MetadataValue};
use trunkline_proto::v1::{ExtensionDeclaration, init_connection::ClientType};

use crate::{
    connection::Client,
    credentials::{Credentials, Tls},
    error::{Error, Kind, Result},
    identity::Principal,
    reconnect::{DuplicateRetry, Reconnect},
};

/// The acknowledgement extension of this project's server.
pub(crate) const ACK_EXTENSION: &str = "https://trunkline.dev/ext/ack/v1";

/// Where servers listen if nothing is said.
const ADDRESS: &str = "localhost:50051";

/// What a client was told.
#[derive(Clone, Debug)]
pub(crate) struct Options {
    pub(crate) address: String,
    pub(crate) credentials: Credentials,
    pub(crate) tls: Option<Tls>,
    pub(crate) reconnect: Reconnect,
    pub(crate) duplicate: Option<DuplicateRetry>,
    pub(crate) extensions: Vec<ExtensionDeclaration>,
    pub(crate) metadata: Vec<(MetadataKey<Ascii>, MetadataValue<Ascii>)>,
    pub(crate) at_least_once: bool,
    pub(crate) resume: String,
    /// Of a user: where it goes first.
    pub(crate) workspace: Option<String>,
    pub(crate) inbox: usize,
    pub(crate) outbox: usize,
    pub(crate) connect_timeout: Duration,
    pub(crate) request_timeout: Duration,
    pub(crate) state_timeout: Duration,
    pub(crate) send_timeout: Duration,
    pub(crate) close_timeout: Duration,
    pub(crate) keepalive: Option<(Duration, Duration)>,
    /// The first thing that was wrong.
    pub(crate) wrong: Option<Error>,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            address: ADDRESS.to_owned(),
            credentials: Credentials::none(),
            tls: None,
            reconnect: Reconnect::default(),
            duplicate: None,
            extensions: Vec::new(),
            metadata: Vec::new(),
            at_least_once: false,
            resume: String::new(),
            workspace: None,
            inbox: 1024,
            outbox: 1024,
            connect_timeout: Duration::from_secs(30),
            request_timeout: Duration::from_secs(10),
            state_timeout: Duration::from_secs(5),
            send_timeout: Duration::from_secs(30),
            close_timeout: Duration::from_secs(5),
            keepalive: Some((Duration::from_secs(30), Duration::from_secs(10))),
            wrong: None,
        }
    }
}

/// A client that is not connected yet. Made by `builder` of each principal; [`Builder::connect`] connects it.
///
/// What is wrong about an option is said by [`Builder::connect`].
#[derive(Clone, Debug)]
#[must_use = "a builder does nothing until it is connected"]
pub struct Builder<P> {
    pub(crate) who: ClientType,
    pub(crate) options: Options,
    principal: PhantomData<fn() -> P>,
}

impl<P: Principal> Builder<P> {
    pub(crate) fn new(who: ClientType) -> Self {
        Self { who, options: Options::default(), principal: PhantomData }
    }

    /// Where the server is: `host:port`, or with `http://` or `https://`. `localhost:50051` without this.
    pub fn address(mut self, address: impl Into<String>) -> Self {
        self.options.address = address.into();
        self
    }

    /// What the client shows to be let in, besides what it was given before.
    pub fn credentials(mut self, credentials: Credentials) -> Self {
        self.options.credentials = self.options.credentials.and(credentials);
        self
    }

    /// Shows an API key.
    pub fn api_key(self, key: impl Into<String>) -> Self {
        self.credentials(Credentials::api_key(key))
    }

    /// Talks TLS, also to an address without `https://`.
    pub fn tls(mut self, tls: Tls) -> Self {
        self.options.tls = Some(tls);
        self
    }

    /// What the environment says: `TRUNKLINE_SERVER` or `AETHER_GATEWAY` for the address, `TRUNKLINE_API_KEY` or
    /// `AETHER_API_KEY`, `AETHER_AUTH_TOKEN` as the token of a started agent, TLS as [`Tls::from_env`], and
    /// `AETHER_MAX_RECONNECT_ATTEMPTS` (0 for no end).
    pub fn from_env(mut self) -> Self {
        let var = |name: &str| std::env::var(name).ok().filter(|value| !value.is_empty());
        if let Some(address) = var("TRUNKLINE_SERVER").or_else(|| var("AETHER_GATEWAY")) {
            self.options.address = address;
        }
        if let Some(key) = var("TRUNKLINE_API_KEY").or_else(|| var("AETHER_API_KEY")) {
            self = self.api_key(key);
        }
        if let Some(token) = var("AETHER_AUTH_TOKEN") {
            self = self.credentials(Credentials::task_token(token));
        }
        match Tls::from_env(None) {
            Ok(Some(tls)) => self.options.tls = Some(tls),
            Ok(None) => {}
            Err(error) => self.wrong(error),
        }
        if let Some(attempts) = var("AETHER_MAX_RECONNECT_ATTEMPTS") {
            match attempts.parse::<u32>() {
                Ok(0) => self.options.reconnect.attempts = None,
                Ok(attempts) => self.options.reconnect.attempts = Some(attempts),
                Err(_) => {
                    let why = format!("AETHER_MAX_RECONNECT_ATTEMPTS is {attempts:?}, which is no number");
                    self.wrong(Error::invalid(why));
                }
            }
        }
        self
    }

    /// How it comes back when the connection breaks; also how often the first connection is tried.
    pub fn reconnect(mut self, policy: Reconnect) -> Self {
        self.options.reconnect = policy;
        self
    }

    /// Waits for an identity that somebody else is connected under. Without this, connecting fails at once.
    pub fn retry_on_duplicate(mut self, policy: DuplicateRetry) -> Self {
        self.options.duplicate = Some(policy);
        self
    }

    /// Declares an extension. If it is required and the server does not have it, connecting fails.
    pub fn extension(mut self, uri: impl Into<String>, version: impl Into<String>, required: bool) -> Self {
        let (uri, version) = (uri.into(), version.into());
        self.options.extensions.push(ExtensionDeclaration { uri, version, required, ..Default::default() });
        self
    }

    /// Messages and progress count as delivered when this client says so, and come again with the next connection until
    /// then: see [`Message::acknowledge`](crate::Message::acknowledge). Takes a server with the acknowledgement extension,
    /// such as Trunkline; on any other, [`Welcome::acknowledges`](crate::Welcome::acknowledges) is false and what was received
    /// counts as delivered.
    pub fn at_least_once(mut self) -> Self {
        self.options.at_least_once = true;
        self
    }

    /// Takes the place of an earlier connection, by its [`Welcome::session_id`](crate::Welcome::session_id): also if the server
    /// has not noticed yet that it is gone. A client does so by itself for its own connections.
    pub fn resume(mut self, session_id: impl Into<String>) -> Self {
        self.options.resume = session_id.into();
        self
    }

    /// Adds metadata to the gRPC request, for proxies on the way.
    pub fn metadata(mut self, name: &str, value: &str) -> Self {
        match (name.parse(), value.parse()) {
            (Ok(name), Ok(value)) => {
                let mut value: MetadataValue<Ascii> = value;
                value.set_sensitive(true);
                self.options.metadata.push((name, value));
            }
            _ => self.wrong(Error::invalid(format!("{name:?} cannot be metadata"))),
        }
        self
    }

    /// How many things of one kind are kept that are not taken yet: 1,024 without this. Who listens too slowly holds up the
    /// connection at this point; for the sake of requests that wait for an answer it is 64 times as many. Of messages, Trunkline
    /// sends up to 4,096 or 16 MiB ahead of what was taken, whatever is said here, and nothing is held up.
    pub fn inbox(mut self, count: usize) -> Self {
        self.options.inbox = count;
        self
    }

    /// How many frames may wait to go out: 1,024 without this. Then senders wait, for [`Builder::send_timeout`].
    pub fn outbox(mut self, count: usize) -> Self {
        self.options.outbox = count;
        self
    }

    /// How long one attempt to connect may take, up to the server's acknowledgement: 30 s without this.
    pub fn connect_timeout(mut self, timeout: Duration) -> Self {
        self.options.connect_timeout = timeout;
        self
    }

    /// How long requests wait for an answer: without this 10 s, but 5 s for keys and checkpoints.
    pub fn request_timeout(mut self, timeout: Duration) -> Self {
        (self.options.request_timeout, self.options.state_timeout) = (timeout, timeout);
        self
    }

    /// How long a send waits for room while the queue is full, such as during a reconnect, and how long a message waits to be
    /// confirmed: 30 s without this.
    pub fn send_timeout(mut self, timeout: Duration) -> Self {
        self.options.send_timeout = timeout;
        self
    }

    /// Pings the server so often, and takes the connection for dead if it does not answer in time: 30 s and 10 s without this.
    pub fn keepalive(mut self, every: Duration, timeout: Duration) -> Self {
        self.options.keepalive = Some((every, timeout));
        self
    }

    /// Connects, and returns when the server has accepted the client.
    ///
    /// # Errors
    /// What the server refused, by kind: [`Kind::Duplicate`], [`Kind::Denied`], [`Kind::Unauthenticated`], [`Kind::Invalid`],
    /// [`Kind::Precondition`] for an extension that it does not have. [`Kind::Unavailable`] if it could not be reached, after
    /// all attempts of the [`Reconnect`] policy.
    pub async fn connect(self) -> Result<P> {
        let Self { who, mut options, .. } = self;
        if let Some(wrong) = options.wrong.take() {
            return Err(wrong);
        }
        Ok(P::from_client(Client::connect(who, options).await?))
    }

    /// Keeps the first thing that is wrong.
    pub(crate) fn wrong(&mut self, error: Error) {
        self.options.wrong.get_or_insert(error);
    }
}

/// `http://` or `https://` in front of an address that has none.
pub(crate) fn url(options: &Options) -> Result<String> {
    let address = &options.address;
    match address.split_once("://") {
        None => Ok(format!("{}://{address}", if options.tls.is_some() { "https" } else { "http" })),
        Some(("http", rest)) if options.tls.is_some() => Ok(format!("https://{rest}")),
        Some(("http" | "https", _)) => Ok(address.clone()),
        Some((scheme, _)) => {
            Err(Error::new(Kind::Invalid, format!("address {address:?}: {scheme} is neither http nor https")))
        }
    }
}

//! What operators of a Trunkline server do besides what every client can: look into topics, watch, and manage the apps whose
//! end users talk with agents. It needs an administrator's key, holds no identity, and takes nothing from anybody.
//!
//! ```no_run
//! # async fn f() -> trunkline_client::Result<()> {
//! use trunkline_client::Operator;
//! let operator = Operator::builder().address("gateway.example.com:50051").api_key("…").connect().await?;
//! let mut figures = operator.watch(std::time::Duration::from_secs(1), 10).await?;
//! while let Some(now) = figures.next().await? {
//!     println!("{} sessions, {} messages delivered", now.sessions_total, now.delivered);
//! }
//! # Ok(()) }
//! ```

use std::time::Duration;

use tokio::time::timeout;
use tonic::{
    Request, Response, Status, Streaming,
    metadata::{Ascii, MetadataValue},
    transport::Channel,
};
use trunkline_proto::own::{
    AppSecret, AppToken, CreateAppRequest, DeadLetterRequest, EraseAppUserRequest, ListAppsRequest,
    ListDeadLettersRequest, PutAppAgentRequest, RemoveAppAgentRequest, RemoveAppRequest, RotateAppSecretRequest,
    SetAppOriginsRequest, SignAppTokenRequest, TailRequest, WatchRequest, operator_client::OperatorClient,
};

pub use trunkline_proto::own::{App, AppAgent, AttachmentPolicy, DeadLetter, Figures, Standing, TailItem};

use crate::{
    connection::{FRAME_IN_BYTES_MAX, dial},
    credentials::{Credentials, Tls},
    error::{Error, Kind, Result},
    options::Options,
};

/// Where and as whom an operator calls.
#[derive(Clone, Debug, Default)]
#[must_use = "a builder does nothing until it is connected"]
pub struct Builder {
    options: Options,
}

impl Builder {
    /// Where the server is: as for [`Builder::address`](crate::Builder::address).
    pub fn address(mut self, address: impl Into<String>) -> Self {
        self.options.address = address.into();
        self
    }

    /// Shows an administrator's key. A server with `--dev` asks for none.
    pub fn api_key(mut self, key: impl Into<String>) -> Self {
        self.options.credentials = Credentials::api_key(key);
        self
    }

    /// Talks TLS, also to an address without `https://`.
    pub fn tls(mut self, tls: Tls) -> Self {
        self.options.tls = Some(tls);
        self
    }

    /// How long connecting may take: 30 s without this.
    pub fn connect_timeout(mut self, timeout: Duration) -> Self {
        self.options.connect_timeout = timeout;
        self
    }

    /// How long calls wait for an answer: 10 s without this.
    pub fn request_timeout(mut self, timeout: Duration) -> Self {
        self.options.request_timeout = timeout;
        self
    }

    /// Connects. Whether the key is good is said by the first call.
    ///
    /// # Errors
    /// [`Kind::Invalid`] for an address or a key that cannot be meant so, [`Kind::Unavailable`] if nobody is there.
    pub async fn connect(self) -> Result<Operator> {
        let Options { credentials, connect_timeout, request_timeout, .. } = &self.options;
        let key = credentials.map().get("x-api-key").filter(|key| !key.is_empty()).map(|key| key.parse());
        let mut key: Option<MetadataValue<Ascii>> =
            key.transpose().map_err(|_| Error::invalid("the API key has characters that no key has"))?;
        key.iter_mut().for_each(|key| key.set_sensitive(true));
        let late = |_| Error::new(Kind::Unavailable, format!("no connection after {connect_timeout:?}"));
        let channel = timeout(*connect_timeout, dial(&self.options)).await.map_err(late)??;
        let client = OperatorClient::new(channel).max_decoding_message_size(FRAME_IN_BYTES_MAX);
        Ok(Operator { client, key, timeout: *request_timeout })
    }
}

/// The operators' side of a Trunkline server. Clones share the connection, which comes back by itself with the next call.
#[derive(Clone)]
pub struct Operator {
    client: OperatorClient<Channel>,
    key: Option<MetadataValue<Ascii>>,
    timeout: Duration,
}

impl std::fmt::Debug for Operator {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Operator {{ key: {} }}", self.key.is_some())
    }
}

/// Calls one method with a signed request.
macro_rules! call {
    ($self:ident, $method:ident, $request:expr) => {{
        let (mut client, request) = ($self.client.clone(), $self.sign($request));
        $self.answered(client.$method(request)).await
    }};
}

impl Operator {
    /// One that is not connected yet.
    pub fn builder() -> Builder {
        Builder::default()
    }

    fn sign<T>(&self, message: T) -> Request<T> {
        let mut request = Request::new(message);
        if let Some(key) = &self.key {
            request.metadata_mut().insert("x-api-key", key.clone());
        }
        request
    }

    async fn answered<T>(&self, call: impl Future<Output = std::result::Result<Response<T>, Status>>) -> Result<T> {
        match timeout(self.timeout, call).await {
            Ok(answer) => answer.map(Response::into_inner).map_err(|e| refused(&e)),
            Err(_) => Err(Error::new(Kind::Timeout, format!("no answer after {:?}", self.timeout))),
        }
    }

    /// What a topic holds, if `from_start`, and then what comes, without moving anybody's place in it.
    ///
    /// # Errors
    /// [`Kind::Denied`], [`Kind::Invalid`] if it is no topic's name.
    pub async fn tail(&self, topic: impl Into<String>, from_start: bool) -> Result<Stream<TailItem>> {
        Ok(Stream(call!(self, tail, TailRequest { topic: topic.into(), from_start })?))
    }

    /// How the server stands, at once and then so often (200 ms to 60 s), with at most so many sessions: those with the
    /// greatest lag first. Whoever takes them late gets fewer.
    ///
    /// # Errors
    /// [`Kind::Denied`].
    pub async fn watch(&self, interval: Duration, sessions_max: u32) -> Result<Stream<Figures>> {
        let interval_ms = u32::try_from(interval.as_millis()).unwrap_or(u32::MAX).max(1);
        Ok(Stream(call!(self, watch, WatchRequest { interval_ms, sessions_max: sessions_max.max(1) })?))
    }

    /// All apps, by name.
    ///
    /// # Errors
    /// [`Kind::Denied`].
    pub async fn apps(&self) -> Result<Vec<App>> {
        Ok(call!(self, list_apps, ListAppsRequest::default())?.apps)
    }

    /// Makes an app, with this public key or a random one. Answers it and its secret, which is not shown again.
    ///
    /// # Errors
    /// [`Kind::Exists`], [`Kind::Invalid`].
    pub async fn create_app(
        &self,
        name: impl Into<String>,
        key: Option<String>,
        origins: Vec<String>,
    ) -> Result<(App, String)> {
        let request = CreateAppRequest { name: name.into(), key: key.unwrap_or_default(), origins };
        call!(self, create_app, request).map(with_secret)
    }

    /// Says anew which pages of an app may ask; none at all closes it to browsers.
    ///
    /// # Errors
    /// [`Kind::NotFound`], [`Kind::Invalid`].
    pub async fn set_app_origins(&self, name: impl Into<String>, origins: Vec<String>) -> Result<App> {
        call!(self, set_app_origins, SetAppOriginsRequest { name: name.into(), origins })
    }

    /// Adds an agent to an app, or changes the one with its id. Answers it, with its id.
    ///
    /// # Errors
    /// [`Kind::NotFound`], [`Kind::Invalid`].
    pub async fn put_app_agent(&self, app: impl Into<String>, agent: AppAgent) -> Result<AppAgent> {
        call!(self, put_app_agent, PutAppAgentRequest { app: app.into(), agent: Some(agent) })
    }

    /// Removes an agent from an app.
    ///
    /// # Errors
    /// [`Kind::NotFound`].
    pub async fn remove_app_agent(&self, app: impl Into<String>, id: impl Into<String>) -> Result<App> {
        call!(self, remove_app_agent, RemoveAppAgentRequest { app: app.into(), id: id.into() })
    }

    /// Gives an app another secret, and answers it. The one before stays good until [`Operator::retire_app_secret`].
    ///
    /// # Errors
    /// [`Kind::NotFound`], [`Kind::Precondition`] while two are good.
    pub async fn rotate_app_secret(&self, name: impl Into<String>) -> Result<(App, String)> {
        call!(self, rotate_app_secret, RotateAppSecretRequest { name: name.into(), retire: false }).map(with_secret)
    }

    /// Ends the secret before the last.
    ///
    /// # Errors
    /// [`Kind::NotFound`].
    pub async fn retire_app_secret(&self, name: impl Into<String>) -> Result<App> {
        let request = RotateAppSecretRequest { name: name.into(), retire: true };
        call!(self, rotate_app_secret, request).map(|answer| answer.app.unwrap_or_default())
    }

    /// Forgets an app. Its conversations stay until their users are erased.
    ///
    /// # Errors
    /// [`Kind::NotFound`].
    pub async fn remove_app(&self, name: impl Into<String>) -> Result<App> {
        call!(self, remove_app, RemoveAppRequest { name: name.into() })
    }

    /// Signs a token as the app's backend would, to try things out. Good for 15 minutes, or as long as said, in seconds.
    ///
    /// # Errors
    /// [`Kind::NotFound`], [`Kind::Invalid`].
    pub async fn sign_app_token(
        &self,
        app: impl Into<String>,
        agent_id: impl Into<String>,
        user: impl Into<String>,
        lasts: Option<Duration>,
    ) -> Result<String> {
        let seconds = lasts.map_or(0, |lasts| u32::try_from(lasts.as_secs()).unwrap_or(u32::MAX).max(1));
        let request = SignAppTokenRequest { app: app.into(), agent_id: agent_id.into(), user: user.into(), seconds };
        call!(self, sign_app_token, request).map(|AppToken { token }| token)
    }

    /// Erases what a user of an app said, attached and was told. Answers how many conversations there were.
    ///
    /// # Errors
    /// [`Kind::NotFound`].
    pub async fn erase_app_user(&self, app: impl Into<String>, user: impl Into<String>) -> Result<u32> {
        let request = EraseAppUserRequest { app: app.into(), user: user.into() };
        Ok(call!(self, erase_app_user, request)?.conversations)
    }

    /// The dead letters of one owner, or of all for an empty one, the oldest first and without their payloads: the next page, behind
    /// one of them or from the beginning. The last page is empty.
    ///
    /// # Errors
    /// [`Kind::Denied`].
    pub async fn dead_letters(&self, owner: &str, after: Option<&str>) -> Result<Vec<DeadLetter>> {
        let (owner, after) = (owner.to_owned(), after.unwrap_or_default().to_owned());
        Ok(call!(self, list_dead_letters, ListDeadLettersRequest { owner, after, limit: 0 })?.dead_letters)
    }

    /// One of them, with its payload.
    ///
    /// # Errors
    /// [`Kind::NotFound`], [`Kind::Denied`].
    pub async fn dead_letter(&self, id: impl Into<String>) -> Result<DeadLetter> {
        call!(self, get_dead_letter, DeadLetterRequest { id: id.into() })
    }

    /// Has one delivered again, to its owner alone. Answers what it was.
    ///
    /// # Errors
    /// [`Kind::NotFound`], [`Kind::Precondition`] for a report of progress, [`Kind::Denied`].
    pub async fn retry_dead_letter(&self, id: impl Into<String>) -> Result<DeadLetter> {
        call!(self, retry_dead_letter, DeadLetterRequest { id: id.into() })
    }

    /// Forgets one.
    ///
    /// # Errors
    /// [`Kind::NotFound`], [`Kind::Denied`].
    pub async fn remove_dead_letter(&self, id: impl Into<String>) -> Result<()> {
        call!(self, remove_dead_letter, DeadLetterRequest { id: id.into() }).map(drop)
    }
}

fn with_secret(AppSecret { app, secret }: AppSecret) -> (App, String) {
    (app.unwrap_or_default(), secret)
}

/// A call of its own is not a stream: what exists is not somebody else who is connected.
fn refused(status: &Status) -> Error {
    let error = Error::from_status(status);
    if error.kind() == Kind::Duplicate { Error::new(Kind::Exists, status.message()) } else { error }
}

/// What the server tells, until it ends. Dropping it ends it.
#[derive(Debug)]
pub struct Stream<T>(Streaming<T>);

impl<T> Stream<T> {
    /// The next, or `None` if there is nothing more to come. Cancel-safe.
    ///
    /// # Errors
    /// What ended it: [`Kind::Unavailable`] if the server stops or the connection broke, [`Kind::Unauthenticated`] if the key
    /// is not good any more, [`Kind::Denied`] if its right was taken back.
    pub async fn next(&mut self) -> Result<Option<T>> {
        self.0.message().await.map_err(|e| refused(&e))
    }
}

//! Apps: whose end users talk with agents, from which pages, and with which.
//!
//! An app's backend signs a token for each of its users with the app's secret, so that secret is kept as it is: a digest cannot
//! check a signature. Two are good at once while one takes the other's place. Apps come from the settings, where they are
//! read once, or from rows, which an operator changes; either is in memory.

mod sql;

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use serde::{Deserialize, Serialize};
use tokio::sync::watch;
use tokio_util::task::TaskTracker;
use uuid::Uuid;

pub(crate) use self::sql::MIGRATIONS;
use crate::{
    caller::Caller,
    error::{Error, Kind},
    gate::{Administer, Gate},
    identity::{Identity, SEPARATOR, identifier},
    token::Secret,
};

/// Longest name of an app or of an agent, and longest address of a picture or greeting, in bytes.
const NAME_BYTES_MAX: usize = 128;
const TEXT_BYTES_MAX: usize = 2048;

/// Origins, or agents, of one app.
const LIST_MAX: usize = 64;

/// Shortest secret that is taken from outside, in bytes: what the signature's hash has.
const SECRET_BYTES_MIN: usize = 32;

/// Longest id of an end user, in bytes. The published figure.
const USER_BYTES_MAX: usize = 128;

/// Who embeds agents.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct App {
    /// What operators call it: an identifier.
    pub name: String,
    /// Its public id, which tokens name as `company_api_key`.
    pub key: String,
    /// What its backend signs tokens with.
    #[serde(serialize_with = "hidden")]
    secret: String,
    /// The one before, which is still good.
    #[serde(default, serialize_with = "hidden_if_any", skip_serializing_if = "Option::is_none")]
    former_secret: Option<String>,
    /// Whose pages may ask, such as `https://app.example.org`.
    #[serde(default)]
    pub origins: Vec<String>,
    /// With whom its users may talk.
    #[serde(default)]
    pub agents: Vec<Agent>,
}

/// With whom users of an app may talk.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Agent {
    /// What tokens call it.
    pub id: Uuid,
    /// Who it is: `ag::{workspace}::{implementation}::{specifier}`.
    pub identity: String,
    /// What users see.
    pub name: String,
    /// Its picture.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub photo_url: Option<String>,
    /// What a new conversation begins with.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub greeting: Option<String>,
    /// How it is told what users say.
    #[serde(default)]
    pub payload: Payload,
    /// What users may attach.
    #[serde(default)]
    pub attachments: AttachmentPolicy,
}

/// How an agent is told what a user says.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Payload {
    /// As the text alone.
    #[default]
    Text,
    /// As a JSON object with the text, the conversation, the message's id, the turn and the files.
    Json,
}

/// What users may attach. The names are published.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct AttachmentPolicy {
    /// Files of one message.
    pub max_files_per_message: u32,
    /// Files of one conversation.
    pub max_files_per_convo: u32,
    /// Bytes of one file.
    pub max_file_size_bytes: u64,
    /// Which kinds: `image/png`, or all that begin with a word, such as `image/*`.
    pub allowed_mime_types: Vec<String>,
}

impl Default for AttachmentPolicy {
    fn default() -> Self {
        let types = ["image/png", "image/jpeg", "image/gif", "image/webp", "application/pdf", "text/plain"];
        Self {
            max_files_per_message: 5,
            max_files_per_convo: 50,
            max_file_size_bytes: 10 * 1024 * 1024,
            allowed_mime_types: types.map(ToOwned::to_owned).into(),
        }
    }
}

impl AttachmentPolicy {
    /// Whether a kind is among those.
    #[must_use]
    pub fn allows(&self, kind: &str) -> bool {
        self.allowed_mime_types.iter().any(|allowed| match allowed.strip_suffix("/*") {
            Some(family) => kind.split_once('/').is_some_and(|(own, _)| own == family),
            None => allowed == kind,
        })
    }
}

/// A secret that is there is shown as such, and never itself.
fn hidden<S: serde::Serializer>(_secret: &str, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_str("(hidden)")
}

fn hidden_if_any<S: serde::Serializer>(_secret: &Option<String>, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_str("(hidden)")
}

impl std::fmt::Debug for App {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("App").field("name", &self.name).field("key", &self.key).finish_non_exhaustive()
    }
}

impl App {
    /// What tokens may be signed with, the newest first.
    pub fn secrets(&self) -> impl Iterator<Item = &[u8]> {
        [Some(&self.secret), self.former_secret.as_ref()].into_iter().flatten().map(String::as_bytes)
    }

    /// Whether two secrets are good.
    #[must_use]
    pub fn has_former_secret(&self) -> bool {
        self.former_secret.is_some()
    }

    /// The agent that tokens call so.
    #[must_use]
    pub fn agent(&self, id: Uuid) -> Option<&Agent> {
        self.agents.iter().find(|agent| agent.id == id)
    }

    fn check(&self) -> Result<(), Error> {
        identifier("name", &self.name)?;
        identifier("key", &self.key)?;
        if self.secrets().any(|secret| secret.len() < SECRET_BYTES_MIN) {
            return Err(invalid(format!("a secret of app {} has less than {SECRET_BYTES_MIN} bytes", self.name)));
        }
        if self.origins.len() > LIST_MAX || self.agents.len() > LIST_MAX {
            return Err(invalid(format!("an app may have {LIST_MAX} origins and {LIST_MAX} agents")));
        }
        if let Some(origin) = self.origins.iter().find(|origin| !is_origin(origin)) {
            return Err(invalid(format!("{origin:?} is no origin such as https://app.example.org")));
        }
        self.agents.iter().try_for_each(Agent::check)
    }
}

/// Whether apps of the settings can be.
///
/// # Errors
/// [`Kind::Invalid`], naming what cannot.
pub fn check(configured: &[App]) -> Result<(), Error> {
    configured.iter().try_for_each(App::check)
}

/// What a browser calls a page's origin: a scheme, a host and a port that is not the scheme's own, in lower case, and nothing behind.
fn is_origin(text: &str) -> bool {
    let Some((scheme, host)) = text.split_once("://") else { return false };
    if host.ends_with(if scheme == "https" { ":443" } else { ":80" }) {
        return false;
    }
    let is_plain = |c: char| c.is_ascii_graphic() && !c.is_ascii_uppercase() && !"/?#@*\\".contains(c);
    matches!(scheme, "http" | "https") && !host.is_empty() && host.len() <= 255 && host.chars().all(is_plain)
}

impl Agent {
    /// The workspace that it lives in.
    pub(crate) fn workspace(&self) -> &str {
        self.identity.split(SEPARATOR).nth(1).unwrap_or_default()
    }

    fn check(&self) -> Result<(), Error> {
        if !matches!(Identity::parse(&self.identity), Ok(Identity::Agent(_))) {
            let why = format!("{:?} is no agent, such as ag::prod::support::main", self.identity);
            return Err(invalid(why));
        }
        if self.name.trim().is_empty() || self.name.len() > NAME_BYTES_MAX {
            return Err(invalid(format!("an agent's name has 1 to {NAME_BYTES_MAX} bytes")));
        }
        let texts = [&self.photo_url, &self.greeting].into_iter().flatten();
        if texts.map(String::len).any(|bytes| bytes > TEXT_BYTES_MAX) {
            return Err(invalid(format!("photo_url and greeting may have {TEXT_BYTES_MAX} bytes")));
        }
        let is_type = |text: &String| text.split_once('/').is_some_and(|(a, b)| !a.is_empty() && !b.is_empty());
        let types = &self.attachments.allowed_mime_types;
        if types.len() > LIST_MAX || !types.iter().all(is_type) {
            return Err(invalid(format!("allowed_mime_types: up to {LIST_MAX} such as image/png or image/*")));
        }
        Ok(())
    }
}

/// An end user of an app, in front of one of its agents, as a token says. It holds the app as of when the token was
/// admitted, shared with its clones: later changes of the app are not seen.
#[derive(Clone, Debug)]
pub struct Visitor {
    app: Arc<App>,
    agent_index: usize,
    /// What the app calls the user.
    pub user: Arc<str>,
}

impl Visitor {
    /// The app whose user it is.
    #[must_use]
    pub fn app(&self) -> &App {
        &self.app
    }

    /// The agent that the token names.
    #[must_use]
    pub fn agent(&self) -> &Agent {
        &self.app.agents[self.agent_index]
    }
}

/// The apps of a server. Clones share them.
#[derive(Clone)]
pub struct Apps(Arc<Inner>);

struct Inner {
    gate: Gate,
    known: Mutex<Known>,
    /// One change at a time: what is in memory is what is in the rows.
    changing: tokio::sync::Mutex<()>,
    tracker: TaskTracker,
    /// How many changes there were.
    changes: watch::Sender<u64>,
}

#[derive(Clone, Default)]
struct Known {
    by_key: HashMap<String, Arc<App>>,
    /// Names of those that come from the settings.
    configured: Vec<String>,
}

impl Apps {
    /// The apps of the rows, and those of the settings. Changes run in `tracker`, so that each is made in the rows and in
    /// memory even if its caller goes in between.
    ///
    /// # Errors
    /// [`Kind::Invalid`] if one of the settings' cannot be, or has a name or key that another one has;
    /// [`Kind::Unavailable`].
    pub async fn open(gate: Gate, configured: Vec<App>, tracker: TaskTracker) -> Result<Self, Error> {
        let mut known = Known::default();
        for app in gate.glance(sql::all).await? {
            known.by_key.insert(app.key.clone(), app.into());
        }
        for app in configured {
            app.check()?;
            if known.by_key.values().any(|other| other.name == app.name || other.key == app.key) {
                return Err(taken(&app.name));
            }
            known.configured.push(app.name.clone());
            known.by_key.insert(app.key.clone(), app.into());
        }
        let (known, changing, changes) = (Mutex::new(known), tokio::sync::Mutex::default(), watch::Sender::new(0));
        Ok(Self(Arc::new(Inner { gate, known, changing, tracker, changes })))
    }

    /// Tells when an app was changed or removed: then whoever was admitted has to be looked at again.
    #[must_use]
    pub fn changes(&self) -> watch::Receiver<u64> {
        self.0.changes.subscribe()
    }

    fn known(&self) -> MutexGuard<'_, Known> {
        self.0.known.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The app with this public id.
    #[must_use]
    pub fn by_key(&self, key: &str) -> Option<Arc<App>> {
        self.known().by_key.get(key).cloned()
    }

    fn by_name(&self, name: &str) -> Option<Arc<App>> {
        self.known().by_key.values().find(|app| app.name == name).cloned()
    }

    /// An agent of the app with this name.
    pub(crate) fn agent(&self, app: &str, agent: Uuid) -> Option<(Arc<App>, Agent)> {
        let app = self.by_name(app)?;
        let agent = app.agent(agent)?.clone();
        Some((app, agent))
    }

    /// Whether pages of this origin belong to any app.
    #[must_use]
    pub fn knows_origin(&self, origin: &str) -> bool {
        self.known().by_key.values().any(|app| app.origins.iter().any(|own| own == origin))
    }

    /// A user of an app, whose token was found good, before an agent.
    ///
    /// # Errors
    /// [`Kind::Unauthenticated`] for what cannot be a user's id, [`Kind::Denied`] if the agent is none of the app's.
    pub fn visitor(&self, app: Arc<App>, agent: Uuid, user: &str) -> Result<Visitor, Error> {
        let refused = |why: &str| Err(Error::new(Kind::Unauthenticated, "ERR_SOURCE_KEY", format!("source_key {why}")));
        if user.is_empty() || user.len() > USER_BYTES_MAX {
            return refused("has 1 to 128 bytes");
        }
        if is_email(user) {
            return refused("looks like an e-mail address: use an opaque id");
        }
        if let Err(error) = identifier("source_key", user) {
            return refused(&format!("cannot be used: {error}"));
        }
        let Some(agent_index) = app.agents.iter().position(|other| other.id == agent) else {
            return Err(Error::new(Kind::Denied, "ERR_AGENT", "agent_uuid is none of this app's agents"));
        };
        Ok(Visitor { app, agent_index, user: user.into() })
    }

    /// All apps, by name.
    ///
    /// # Errors
    /// [`Kind::Denied`].
    pub fn list(&self, caller: &Caller) -> Result<Vec<Arc<App>>, Error> {
        self.0.gate.authorize(caller, Administer("apps"))?;
        let mut all: Vec<_> = self.known().by_key.values().cloned().collect();
        all.sort_by(|a, b| a.name.cmp(&b.name));
        Ok(all)
    }

    /// The app with this name.
    ///
    /// # Errors
    /// [`Kind::Denied`], [`Kind::NotFound`].
    pub fn get(&self, caller: &Caller, name: &str) -> Result<Arc<App>, Error> {
        self.0.gate.authorize(caller, Administer("apps"))?;
        self.by_name(name).ok_or_else(|| missing(name))
    }

    /// Makes an app; answers its secret, which is not shown again. An empty key is replaced by a random one.
    ///
    /// # Errors
    /// [`Kind::Denied`], [`Kind::Invalid`], [`Kind::Exists`] if its name or key is taken, [`Kind::Unavailable`].
    pub async fn create(
        &self,
        caller: &Caller,
        name: &str,
        key: &str,
        origins: Vec<String>,
    ) -> Result<(Arc<App>, String), Error> {
        self.0.gate.authorize(caller, Administer("apps"))?;
        let secret = Secret::random()?.reveal().to_owned();
        let random = || format!("app_{}", Uuid::new_v4().simple());
        let key = if key.is_empty() { random() } else { key.to_owned() };
        let app = App {
            name: name.to_owned(),
            key,
            secret: secret.clone(),
            former_secret: None,
            origins,
            agents: Vec::new(),
        };
        app.check()?;
        let made = self.complete(|apps| async move {
            let _one = apps.0.changing.lock().await;
            if apps.known().by_key.values().any(|other| other.name == app.name || other.key == app.key) {
                return Err(taken(&app.name));
            }
            apps.keep(app).await
        });
        Ok((made.await?, secret))
    }

    /// Runs a change to its end, whether or not its caller waits for it.
    async fn complete<T, F>(&self, change: impl FnOnce(Self) -> F) -> Result<T, Error>
    where
        T: Send + 'static,
        F: Future<Output = Result<T, Error>> + Send + 'static,
    {
        let changed = self.0.tracker.spawn(change(self.clone()));
        changed.await.unwrap_or_else(|ended| Err(Error::of_task(&ended)))
    }

    /// Changes an app. Completes even if it is not waited for.
    ///
    /// # Errors
    /// [`Kind::Denied`], [`Kind::NotFound`], [`Kind::Precondition`] if it is in the settings, [`Kind::Invalid`],
    /// [`Kind::Unavailable`].
    pub async fn change(&self, caller: &Caller, name: &str, change: Change) -> Result<Arc<App>, Error> {
        self.0.gate.authorize(caller, Administer("apps"))?;
        let name = name.to_owned();
        self.complete(|apps| async move { apps.change_now(&name, change).await }).await
    }

    async fn change_now(&self, name: &str, change: Change) -> Result<Arc<App>, Error> {
        let _one = self.0.changing.lock().await;
        let mut app = App::clone(&*self.changeable(name)?);
        match change {
            Change::Origins(origins) => app.origins = origins,
            Change::Agent(agent) => match app.agents.iter_mut().find(|other| other.id == agent.id) {
                Some(other) => *other = *agent,
                None => app.agents.push(*agent),
            },
            Change::NoAgent(id) => {
                let before = app.agents.len();
                app.agents.retain(|agent| agent.id != id);
                if app.agents.len() == before {
                    return Err(Error::new(Kind::NotFound, "ERR_NOT_FOUND", format!("app {name} has no agent {id}")));
                }
            }
            Change::Secret(secret) => {
                app.former_secret = Some(std::mem::replace(&mut app.secret, secret.reveal().to_owned()));
            }
            Change::NoFormerSecret => app.former_secret = None,
        }
        app.check()?;
        self.keep(app).await
    }

    /// Gives an app another secret; answers it, which is not shown again. The one before stays good until it is retired or
    /// another one comes.
    ///
    /// # Errors
    /// As [`Apps::change`].
    pub async fn rotate(&self, caller: &Caller, name: &str) -> Result<String, Error> {
        let secret = Secret::random()?;
        let shown = secret.reveal().to_owned();
        self.change(caller, name, Change::Secret(secret)).await?;
        Ok(shown)
    }

    /// Forgets an app: none of its tokens is good any more. Its conversations stay until they are erased. Completes even if it
    /// is not waited for.
    ///
    /// # Errors
    /// As [`Apps::change`].
    pub async fn remove(&self, caller: &Caller, name: &str) -> Result<(), Error> {
        self.0.gate.authorize(caller, Administer("apps"))?;
        let name = name.to_owned();
        let removed = self.complete(|apps| async move {
            let _one = apps.0.changing.lock().await;
            let app = apps.changeable(&name)?;
            let own = app.name.clone();
            apps.0.gate.housekeep(move |tx| sql::remove(tx, own.clone())).await?;
            apps.known().by_key.remove(&app.key);
            apps.0.changes.send_modify(|count| *count += 1);
            Ok(())
        });
        removed.await
    }

    fn changeable(&self, name: &str) -> Result<Arc<App>, Error> {
        if self.known().configured.iter().any(|configured| configured == name) {
            let why = format!("app {name} is in the settings, and is changed there");
            return Err(Error::new(Kind::Precondition, "ERR_FAILED_PRECONDITION", why));
        }
        self.by_name(name).ok_or_else(|| missing(name))
    }

    async fn keep(&self, app: App) -> Result<Arc<App>, Error> {
        let app = Arc::new(app);
        let row = app.clone();
        self.0.gate.housekeep(move |tx| sql::put(tx, row.clone())).await?;
        self.known().by_key.insert(app.key.clone(), app.clone());
        self.0.changes.send_modify(|count| *count += 1);
        Ok(app)
    }
}

/// A change of an app. It does not show a secret.
#[derive(Debug)]
pub enum Change {
    /// Its pages.
    Origins(Vec<String>),
    /// An agent, new or in the place of the one with its id.
    Agent(Box<Agent>),
    /// One agent less.
    NoAgent(Uuid),
    /// Another secret.
    Secret(Secret),
    /// The one before is not good any more.
    NoFormerSecret,
}

/// Whether a text is like `somebody@somewhere`.
fn is_email(text: &str) -> bool {
    let Some((local, domain)) = text.rsplit_once('@') else { return false };
    !local.is_empty() && !domain.is_empty()
}

fn missing(name: &str) -> Error {
    Error::new(Kind::NotFound, "ERR_NOT_FOUND", format!("there is no app {name:?}"))
}

fn taken(name: &str) -> Error {
    Error::new(Kind::Exists, "ERR_EXISTS", format!("another app has the name or the key of {name:?}"))
}

fn invalid(message: String) -> Error {
    Error::new(Kind::Invalid, "ERR_INVALID_ARGUMENT", message)
}

#[cfg(test)]
mod tests {
    use super::{AttachmentPolicy, is_email, is_origin};

    #[test]
    fn origins_are_what_browsers_send() {
        for text in
            ["https://a.example.org", "http://localhost:3000", "https://xn--bcher-kva.example", "http://[::1]:443"]
        {
            assert!(is_origin(text), "{text}");
        }
        for text in [
            "",
            "*",
            "null",
            "a.example.org",
            "https://",
            "https://a/",
            "https://A.org",
            "https://*.org",
            "ftp://a",
            "https://a:443",
            "http://a:80",
        ] {
            assert!(!is_origin(text), "{text}");
        }
    }

    #[test]
    fn what_looks_like_an_address_is_seen() {
        assert!(is_email("ann@example.org") && is_email("a@b") && is_email("a@b@c"));
        assert!(!is_email("ann") && !is_email("@ann") && !is_email("ann@") && !is_email("auth0|12"));
    }

    #[test]
    fn kinds_of_files_are_named_alone_or_together() {
        let policy = AttachmentPolicy {
            allowed_mime_types: vec!["image/*".into(), "application/pdf".into()],
            ..AttachmentPolicy::default()
        };
        assert!(policy.allows("image/png") && policy.allows("application/pdf"));
        assert!(!policy.allows("images/png") && !policy.allows("application/zip") && !policy.allows("image"));
    }
}

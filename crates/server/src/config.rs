//! What an operator sets: one TOML file, `TRUNKLINE__SECTION__KEY` variables over it, flags over both. Read once into
//! plain data; a mistake is an error before any port is bound.

use std::{
    fs,
    net::SocketAddr,
    path::{Path, PathBuf},
    time::Duration,
};

use trunkline_core::{
    app::App,
    conversation,
    limits::{CONTENT_BYTES_MAX, Limits},
    sandbox, task,
};
use trunkline_store::{files::Bucket, log::Retention};

const PREFIX: &str = "TRUNKLINE__";

/// All settings, with their defaults.
#[derive(Clone, Debug, serde::Deserialize, serde::Serialize)]
#[serde(deny_unknown_fields, default)]
pub struct Config {
    /// Where everything is kept.
    pub data_dir: PathBuf,
    /// Admit everybody without credentials, on loopback addresses only.
    pub dev: bool,
    /// What a write survives once it is acknowledged.
    pub durability: Durability,
    /// Addresses to listen on.
    pub listen: Listen,
    /// Certificates.
    pub tls: TlsConfig,
    /// Limits for clients.
    pub limits: Limits,
    /// How messages are delivered.
    pub messages: MessagesConfig,
    /// The key-value store.
    pub kv: KvConfig,
    /// Browsers.
    pub http: HttpConfig,
    /// How much users of apps may say, and how long anything about conversations may take.
    pub conversation: conversation::Options,
    /// Apps, besides those that an operator makes.
    pub apps: Vec<App>,
    /// Where files are kept, if not in the data directory: a bucket, if it has a name.
    pub files: Bucket,
    /// How long sandboxes may take for what.
    pub sandbox: sandbox::Options,
    /// How tasks are handed out, and how long everything about them may take.
    pub tasks: task::Options,
    /// How long things are kept.
    pub retention: RetentionConfig,
    /// How the server ends.
    pub shutdown: Shutdown,
}

/// See [`trunkline_store::Durability`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Deserialize, serde::Serialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Durability {
    /// The end of the machine: fsync before each acknowledgement.
    #[default]
    Machine,
    /// The end of the process.
    Process,
}

/// Addresses; port 0 picks a free one.
#[derive(Clone, Copy, Debug, serde::Deserialize, serde::Serialize)]
#[serde(deny_unknown_fields, default)]
pub struct Listen {
    /// For agents, tasks and services.
    pub grpc: SocketAddr,
    /// For browsers and sandboxes.
    pub http: SocketAddr,
    /// For operators.
    pub ops: SocketAddr,
}

/// Certificates for the listeners of agents and of browsers, as PEM files; with both `cert` and `key` these speak TLS 1.3
/// only. Changed files are loaded again within seconds.
#[derive(Clone, Debug, Default, serde::Deserialize, serde::Serialize)]
#[serde(deny_unknown_fields, default)]
pub struct TlsConfig {
    /// The server's certificate, and those between it and its root.
    pub cert: PathBuf,
    /// Its key.
    pub key: PathBuf,
    /// Roots of clients' certificates. The common name of one is the identity that it is good for, which may end in `*`, or
    /// `_anonymous`.
    pub client_ca: PathBuf,
    /// Nobody connects without a certificate.
    pub require_client_cert: bool,
}

/// How messages are delivered.
#[derive(Clone, Debug, serde::Deserialize, serde::Serialize)]
#[serde(deny_unknown_fields, default)]
pub struct MessagesConfig {
    /// Patterns of workspaces in which `tb` goes to every connected task of an implementation and not to one of them.
    pub broadcast_tasks_in: Vec<String>,
    /// Sessions of clients that acknowledge that are lost over a message before it is a dead letter; 0 is never.
    pub lost_sessions_max: u32,
}

impl Default for MessagesConfig {
    fn default() -> Self {
        Self { broadcast_tasks_in: Vec::new(), lost_sessions_max: 20 }
    }
}

impl MessagesConfig {
    /// The patterns, read.
    pub(crate) fn broadcast_tasks(&self) -> Result<Vec<glob::Pattern>, ConfigError> {
        let read = |text: &String| {
            let wrong = |e| ConfigError::Content(format!("messages.broadcast_tasks_in: {text:?}: {e}"));
            glob::Pattern::new(text).map_err(wrong)
        };
        self.broadcast_tasks_in.iter().map(read).collect()
    }
}

/// The key-value store.
#[derive(Clone, Debug, Default, serde::Deserialize, serde::Serialize)]
#[serde(deny_unknown_fields, default)]
pub struct KvConfig {
    /// Workspace whose agents and unique tasks get the exclusive keys that earlier versions stored for their names without
    /// a workspace, where the server does not know the owner. Empty leaves those keys out of reach.
    pub legacy_workspace: String,
}

/// What browsers may do.
#[derive(Clone, Debug, Default, serde::Deserialize, serde::Serialize)]
#[serde(deny_unknown_fields, default)]
pub struct HttpConfig {
    /// Origins, such as `https://app.example.org`, whose pages may use this server besides its own.
    pub allowed_origins: Vec<String>,
}

/// How long things are kept; 0 is forever, and no limit.
#[derive(Clone, Copy, Debug, serde::Deserialize, serde::Serialize)]
#[serde(deny_unknown_fields, default)]
pub struct RetentionConfig {
    /// Messages on the lanes of identities and on broadcasts.
    pub lanes_hours: u64,
    /// Payload of one such lane at most, in MiB.
    pub lane_mib_max: u64,
    /// What principals report to the audit trail.
    pub audit_days: u64,
    /// What clients of the socket surface asked and no runtime took, and how their streams stood when they were last used.
    pub sockets_days: u64,
    /// Where principals stopped reading that have not been there since, and the checkpoints of such tasks under assigned ids. At
    /// least twice as long as lanes are kept, and forever if those are.
    pub absentees_days: u64,
    /// Pause between two sweeps.
    pub sweep_seconds: u64,
}

/// How the server ends.
#[derive(Clone, Copy, Debug, serde::Deserialize, serde::Serialize)]
#[serde(deny_unknown_fields, default)]
pub struct Shutdown {
    /// Connections that are not done after so long are cut.
    pub timeout_seconds: u64,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            data_dir: "trunkline-data".into(),
            dev: false,
            durability: Durability::Machine,
            listen: Listen::default(),
            tls: TlsConfig::default(),
            limits: Limits::default(),
            messages: MessagesConfig::default(),
            kv: KvConfig::default(),
            http: HttpConfig::default(),
            conversation: conversation::Options::default(),
            apps: Vec::new(),
            files: Bucket::default(),
            sandbox: sandbox::Options::default(),
            tasks: task::Options::default(),
            retention: RetentionConfig::default(),
            shutdown: Shutdown::default(),
        }
    }
}

impl Default for Listen {
    fn default() -> Self {
        let local = |port| SocketAddr::from(([127, 0, 0, 1], port));
        Self { grpc: local(50051), http: local(4800), ops: local(9090) }
    }
}

impl Default for RetentionConfig {
    fn default() -> Self {
        Self {
            lanes_hours: 24,
            lane_mib_max: 0,
            audit_days: 90,
            sockets_days: 30,
            absentees_days: 90,
            sweep_seconds: 60,
        }
    }
}

impl Default for Shutdown {
    fn default() -> Self {
        Self { timeout_seconds: 10 }
    }
}

/// What is wrong with the settings.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file cannot be read.
    #[error("config file {}: {source}", path.display())]
    File {
        /// Which file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// A key is unknown or a value is of the wrong kind.
    #[error("config: {0}")]
    Content(String),
}

impl Config {
    /// The defaults, on free ports of the loopback address.
    #[must_use]
    pub fn on_free_ports() -> Self {
        let free = SocketAddr::from(([127, 0, 0, 1], 0));
        Self { listen: Listen { grpc: free, http: free, ops: free }, ..Self::default() }
    }

    /// Reads `file`, if there is one, and the variables that begin with `TRUNKLINE__`.
    ///
    /// # Errors
    /// [`ConfigError`], naming the file or the key.
    pub fn load(file: Option<&Path>, variables: impl Iterator<Item = (String, String)>) -> Result<Self, ConfigError> {
        let content = |source: &dyn std::fmt::Display, why: &dyn std::fmt::Display| {
            ConfigError::Content(format!("{source}: {why}"))
        };
        let mut table = toml::Table::new();
        if let Some(path) = file {
            let text = fs::read_to_string(path);
            let text = text.map_err(|source| ConfigError::File { path: path.to_owned(), source })?;
            table = text.parse().map_err(|e: toml::de::Error| content(&path.display(), &e))?;
            known(&table).map_err(|why| content(&path.display(), &why))?;
        }
        for (name, value) in variables {
            if let Some(key) = name.strip_prefix(PREFIX) {
                let mut alone = toml::Table::new();
                let set = set(&mut alone, key, &value).and_then(|()| known(&alone));
                set.and_then(|()| merge(&mut table, alone)).map_err(|why| content(&name, &why))?;
            }
        }
        table.try_into().map_err(|e: toml::de::Error| ConfigError::Content(e.to_string().trim_end().to_owned()))
    }

    /// Refuses sizes of what would not fit a frame to a client, and times that leave none.
    pub(crate) fn check_sizes(&self) -> Result<(), ConfigError> {
        if self.limits.keepalive_seconds == 0 {
            return Err(ConfigError::Content("limits.keepalive_seconds is 0; at least 1".to_owned()));
        }
        let sizes = [
            ("limits.payload_bytes_max", self.limits.payload_bytes_max),
            ("limits.kv_value_bytes_max", self.limits.kv_value_bytes_max),
            ("tasks.payload_bytes_max", self.tasks.payload_bytes_max),
        ];
        match sizes.into_iter().find(|(_, size)| *size > CONTENT_BYTES_MAX) {
            Some((key, size)) => Err(ConfigError::Content(format!(
                "{key} is {size}; at most {CONTENT_BYTES_MAX} bytes fit a frame to a client"
            ))),
            None => Ok(()),
        }
    }

    /// After how long principals are forgotten that do not come back; nothing if they never are.
    pub(crate) fn absence(&self) -> Option<Duration> {
        let (hours, days) = (self.retention.lanes_hours, self.retention.absentees_days);
        let hours = days.saturating_mul(24).max(hours.saturating_mul(2));
        (days > 0 && self.retention.lanes_hours > 0).then(|| Duration::from_secs(hours.saturating_mul(3600)))
    }

    /// The log's retention by class, in the order of `trunkline_core::topic`'s classes.
    #[must_use]
    pub(crate) fn retention(&self) -> Vec<Retention> {
        let hours = self.retention.lanes_hours;
        let age = (hours > 0).then(|| Duration::from_secs(hours.saturating_mul(3600)));
        let bytes = Some(self.retention.lane_mib_max.saturating_mul(1024 * 1024)).filter(|bytes| *bytes > 0);
        vec![Retention { age, bytes, ..Retention::default() }, Retention::default()]
    }
}

/// Sets `SECTION__KEY` to a value that reads as TOML, or else as text.
fn set(table: &mut toml::Table, key: &str, value: &str) -> Result<(), String> {
    let parsed = format!("v = {value}").parse::<toml::Table>().ok().and_then(|mut table| table.remove("v"));
    let mut value = parsed.unwrap_or_else(|| toml::Value::String(value.to_owned()));
    let path = key.to_lowercase();
    let (sections, last) = path.rsplit_once("__").map_or((None, path.as_str()), |(s, last)| (Some(s), last));
    if last.is_empty() {
        return Err("no key after the prefix".into());
    }
    let mut name = last;
    for section in sections.into_iter().flat_map(|sections| sections.rsplit("__")) {
        value = toml::Table::from_iter([(name.to_owned(), value)]).into();
        name = section;
    }
    table.insert(name.to_owned(), value);
    Ok(())
}

fn merge(into: &mut toml::Table, from: toml::Table) -> Result<(), String> {
    for (key, value) in from {
        match (into.get_mut(&key), value) {
            (Some(toml::Value::Table(section)), toml::Value::Table(more)) => merge(section, more)?,
            (Some(_), toml::Value::Table(_)) => return Err(format!("{key} is not a section")),
            (_, value) => drop(into.insert(key, value)),
        }
    }
    Ok(())
}

/// Refuses the first key that the defaults do not have, with the one that was probably meant.
fn known(table: &toml::Table) -> Result<(), String> {
    let defaults = toml::Table::try_from(Config::default()).map_err(|e| e.to_string())?;
    let known = paths(&defaults, "");
    let Some(unknown) = paths(table, "").into_iter().find(|path| !known.contains(path)) else { return Ok(()) };
    let similarity = |path: &&String| strsim::normalized_damerau_levenshtein(path, &unknown);
    let nearest = known.iter().max_by(|a, b| similarity(a).total_cmp(&similarity(b)));
    Err(match nearest.filter(|path| similarity(path) > 0.6) {
        Some(nearest) => format!("unknown key {unknown}; did you mean {nearest}?"),
        None => format!("unknown key {unknown}; known are {}", known.join(", ")),
    })
}

/// `section.key` of every value.
fn paths(table: &toml::Table, prefix: &str) -> Vec<String> {
    let path = |(key, value): (&String, &toml::Value)| match value {
        toml::Value::Table(section) => paths(section, &format!("{prefix}{key}.")),
        _ => vec![format!("{prefix}{key}")],
    };
    table.iter().flat_map(path).collect()
}

#[cfg(test)]
mod tests {
    use super::Config;

    fn load(file: &str, variables: &[(&str, &str)]) -> Result<Config, String> {
        let path = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(path.path(), file).unwrap();
        let variables = variables.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned()));
        Config::load(Some(path.path()), variables).map_err(|e| e.to_string())
    }

    #[test]
    fn variables_go_before_the_file() {
        let file = "data_dir = \"/from/file\"\n[limits]\nmessages_per_second = 5\n";
        let config = load(file, &[("TRUNKLINE__LIMITS__MESSAGES_PER_SECOND", "0"), ("OTHER", "x")]).unwrap();
        assert_eq!((config.limits.messages_per_second, config.limits.message_burst), (0, 20_000));
        assert_eq!(config.data_dir.to_str(), Some("/from/file"));
        let config = load("", &[("TRUNKLINE__LISTEN__GRPC", "0.0.0.0:1"), ("TRUNKLINE__DATA_DIR", "/d")]).unwrap();
        assert_eq!((config.listen.grpc.to_string(), config.data_dir.to_str()), ("0.0.0.0:1".into(), Some("/d")));
    }

    #[test]
    fn what_would_not_fit_a_frame_is_refused() {
        Config::default().check_sizes().unwrap();
        for key in ["limits.payload_bytes_max", "limits.kv_value_bytes_max", "tasks.payload_bytes_max"] {
            let (table, name) = key.split_once('.').unwrap();
            let config = load(&format!("[{table}]\n{name} = 4194304"), &[]).unwrap();
            assert!(config.check_sizes().unwrap_err().to_string().contains(key));
        }
    }

    #[test]
    fn mistakes_name_the_key() {
        let hint = "unknown key limits.messages_per_secnd; did you mean limits.messages_per_second?";
        assert!(load("[limits]\nmessages_per_secnd = 5", &[]).unwrap_err().contains(hint));
        let error = load("", &[("TRUNKLINE__LISTEN__GPRC", "1")]).unwrap_err();
        assert!(error.contains("TRUNKLINE__LISTEN__GPRC") && error.contains("did you mean listen.grpc?"), "{error}");
        let error = load("[limits]\n[wishes]\nx = 1", &[]).unwrap_err();
        assert!(error.contains("unknown key wishes.x; known are apps,"), "{error}");
        assert!(load("[wishes]", &[]).unwrap_err().contains("wishes"));
        assert!(load("limits = 1", &[]).unwrap_err().contains("limits"));
        assert!(load("dev = true", &[("TRUNKLINE__DEV__X", "1")]).unwrap_err().contains("dev.x"));
        assert!(load("dev = \"yes\"", &[]).unwrap_err().contains("dev"));
        assert!(load("", &[("TRUNKLINE__LIMIT__X", "1")]).unwrap_err().contains("limit"));
        assert!(load("", &[("TRUNKLINE__", "1")]).unwrap_err().contains("TRUNKLINE__"));
        assert!(load("=", &[]).is_err());
    }

    #[test]
    fn the_defaults_are_those_of_the_readme() {
        let config = load("", &[]).unwrap();
        let listen = [config.listen.grpc, config.listen.http, config.listen.ops].map(|address| address.to_string());
        assert_eq!(listen, ["127.0.0.1:50051", "127.0.0.1:4800", "127.0.0.1:9090"]);
        assert!(!config.dev);
    }
}

//! `kv` and `checkpoint`: what a principal keeps.

use std::time::Duration;

use serde_json::{Value, json};
use trunkline_client::{
    Client,
    kv::{Keep, Scope},
};

use super::{
    Done, Fault, block_on,
    client::Connect,
    output::{Output, Row, time},
    payload,
};

/// Whose keys.
#[derive(clap::Args)]
pub(crate) struct Keys {
    /// Whose: global, workspace, user, user-workspace, global-exclusive, workspace-exclusive, user-shared, user-workspace-shared.
    #[arg(long, value_name = "SCOPE", default_value = "workspace")]
    scope: String,
    /// The workspace, for scopes of one.
    #[arg(long, value_name = "NAME")]
    workspace: Option<String>,
    /// The user, for scopes of one.
    #[arg(long, value_name = "ID")]
    user: Option<String>,
    /// As whom [default: a service].
    #[arg(long = "as", value_name = "IDENTITY")]
    whom: Option<String>,
    #[command(flatten)]
    connect: Connect,
    #[command(flatten)]
    output: Output,
}

#[derive(clap::Subcommand)]
pub(crate) enum Kv {
    /// Prints the value of a key.
    Get {
        /// The key.
        key: String,
        #[command(flatten)]
        keys: Keys,
    },
    /// Sets a key.
    Put {
        /// The key.
        key: String,
        /// The value; `-` reads standard input.
        value: String,
        /// For so many seconds [default: for good].
        #[arg(long, value_name = "SECONDS")]
        ttl: Option<u64>,
        #[command(flatten)]
        keys: Keys,
    },
    /// Removes a key, if it is there.
    Delete {
        /// The key.
        key: String,
        #[command(flatten)]
        keys: Keys,
    },
    /// Lists keys and their values.
    List {
        /// Only those that begin so.
        #[arg(default_value = "")]
        prefix: String,
        #[command(flatten)]
        keys: Keys,
    },
    /// Adds to a number, or takes from it, and prints it.
    Increment {
        /// The key.
        key: String,
        /// How much; less than 0 takes.
        #[arg(default_value_t = 1, allow_hyphen_values = true)]
        by: i64,
        #[command(flatten)]
        keys: Keys,
    },
}

impl Keys {
    fn scope(&self) -> Result<Scope, Fault> {
        let user = || self.user.clone().ok_or_else(|| Fault::usage(format!("scope {} takes --user", self.scope)));
        let workspace = self.workspace.clone();
        Ok(match self.scope.as_str() {
            "global" => Scope::Global,
            "workspace" => Scope::Workspace(workspace),
            "user" => Scope::User(user()?),
            "user-workspace" => Scope::UserWorkspace(user()?, workspace),
            "global-exclusive" => Scope::GlobalExclusive,
            "workspace-exclusive" => Scope::WorkspaceExclusive(workspace),
            "user-shared" => Scope::UserShared(user()?),
            "user-workspace-shared" => Scope::UserWorkspaceShared(user()?, workspace),
            other => return Err(Fault::usage(format!("there is no scope {other:?}"))),
        })
    }

    async fn open(&self) -> Result<(Client, trunkline_client::kv::Kv), Fault> {
        let scope = self.scope()?;
        let client = self.connect.client_as(self.whom.as_deref()).await?;
        Ok((client.clone(), client.kv(scope)))
    }
}

/// As text if it is text; else, for programs, as base64 would be another dependency: as an array of bytes.
fn text(value: &[u8]) -> Value {
    match std::str::from_utf8(value) {
        Ok(text) => json!(text),
        Err(_) => json!(value),
    }
}

pub(crate) fn run(command: Kv) -> Done {
    block_on(async {
        match command {
            Kv::Get { key, keys } => {
                let (client, kv) = keys.open().await?;
                let Some(value) = kv.get(&key).await? else {
                    return Err(Fault::not_found(format!("no key {key}")).into());
                };
                if let Ok(plain) = std::str::from_utf8(&value) {
                    keys.output.done(plain, vec![("key", json!(key)), ("value", json!(plain))]);
                } else {
                    keys.output.done(format_args!("{value:?}"), vec![("key", json!(key)), ("value", text(&value))]);
                }
                client.close().await;
            }
            Kv::Put { key, value, ttl, keys } => {
                let (client, kv) = keys.open().await?;
                kv.put_for(&key, payload(value)?, ttl.map(Duration::from_secs)).await?;
                keys.output.done(format_args!("set {key}"), vec![("key", json!(key))]);
                client.close().await;
            }
            Kv::Delete { key, keys } => {
                let (client, kv) = keys.open().await?;
                kv.delete(&key).await?;
                keys.output.done(format_args!("removed {key}"), vec![("key", json!(key))]);
                client.close().await;
            }
            Kv::List { prefix, keys } => {
                let (client, kv) = keys.open().await?;
                let rows = || async {
                    let all = kv.list(&prefix).await?;
                    let row = |(key, value): (String, bytes::Bytes)| -> Row {
                        vec![("key", json!(key)), ("value", text(&value))]
                    };
                    Ok(all.into_iter().map(row).collect())
                };
                keys.output.show(rows).await?;
                client.close().await;
            }
            Kv::Increment { key, by, keys } => {
                let (client, kv) = keys.open().await?;
                let amount =
                    u32::try_from(by.unsigned_abs()).map_err(|_| Fault::usage(format!("{by} is too much at once")))?;
                let counted = if by < 0 {
                    kv.decrement_if(&key, amount, i64::MIN).await?
                } else {
                    kv.increment_if(&key, amount, i64::MAX).await?
                };
                keys.output.done(counted.value, vec![("key", json!(key)), ("value", json!(counted.value))]);
                client.close().await;
            }
        }
        Ok(())
    })
}

#[derive(clap::Subcommand)]
pub(crate) enum Checkpoint {
    /// Prints what was remembered.
    Load(OneCheckpoint),
    /// Remembers something.
    Save {
        #[command(flatten)]
        which: OneCheckpoint,
        /// What; `-` reads standard input.
        data: String,
        /// For so many seconds; 0 for good [default: as the server says].
        #[arg(long, value_name = "SECONDS")]
        ttl: Option<u64>,
    },
    /// Forgets it.
    Delete(OneCheckpoint),
    /// Lists the keys of all that is remembered.
    List(Checkpoints),
}

#[derive(clap::Args)]
pub(crate) struct OneCheckpoint {
    /// Its key.
    key: String,
    #[command(flatten)]
    of: Checkpoints,
}

/// Whose checkpoints. Nobody may be connected as that one meanwhile.
#[derive(clap::Args)]
pub(crate) struct Checkpoints {
    /// Whose: an identity, such as `ag::prod::support::main`.
    #[arg(long = "as", value_name = "IDENTITY")]
    whom: String,
    #[command(flatten)]
    connect: Connect,
    #[command(flatten)]
    output: Output,
}

impl Checkpoints {
    async fn open(&self) -> Result<Client, Fault> {
        self.connect.client_as(Some(&self.whom)).await
    }
}

pub(crate) fn run_checkpoint(command: Checkpoint) -> Done {
    block_on(async {
        match command {
            Checkpoint::Load(OneCheckpoint { key, of }) => {
                let client = of.open().await?;
                let found = client.checkpoints().load(&key).await?;
                let found = found.ok_or_else(|| Fault::not_found(format!("no checkpoint {key} of {}", of.whom)))?;
                let row = vec![("key", json!(key)), ("data", text(&found.data)), ("saved_at", time(found.saved_at_s))];
                of.output.done(String::from_utf8_lossy(&found.data), row);
                client.close().await;
            }
            Checkpoint::Save { which: OneCheckpoint { key, of }, data, ttl } => {
                let client = of.open().await?;
                let keep = match ttl {
                    None => Keep::Default,
                    Some(0) => Keep::Forever,
                    Some(seconds) => Keep::For(Duration::from_secs(seconds)),
                };
                client.checkpoints().save(&key, payload(data)?, keep).await?;
                of.output.done(format_args!("saved {key}"), vec![("key", json!(key))]);
                client.close().await;
            }
            Checkpoint::Delete(OneCheckpoint { key, of }) => {
                let client = of.open().await?;
                client.checkpoints().delete(&key).await?;
                of.output.done(format_args!("forgot {key}"), vec![("key", json!(key))]);
                client.close().await;
            }
            Checkpoint::List(of) => {
                let client = of.open().await?;
                let rows = || async {
                    let keys = client.checkpoints().list().await?;
                    Ok(keys.into_iter().map(|key| vec![("key", json!(key))]).collect())
                };
                of.output.show(rows).await?;
                client.close().await;
            }
        }
        Ok(())
    })
}

//! `app`: whose end users talk with which agents.

use std::time::Duration;

use serde_json::{Value, json};
use trunkline_client::operator::{App, AppAgent, AttachmentPolicy};

use super::{Done, Fault, block_on, client::Connect, output::plain, say};

#[derive(clap::Subcommand)]
pub(crate) enum Apps {
    /// Makes an app and prints its public key and its secret, once.
    Create {
        /// What to call it.
        name: String,
        /// A page's origin that may ask, such as `https://app.example.org`; may be repeated.
        #[arg(long = "origin", value_name = "ORIGIN")]
        origins: Vec<String>,
        /// Its public key [default: a random one].
        #[arg(long, value_name = "KEY", default_value = "")]
        key: String,
        #[command(flatten)]
        connect: Connect,
    },
    /// Lists the apps and their agents.
    List {
        /// Prints JSON, a line for each app.
        #[arg(long)]
        json: bool,
        #[command(flatten)]
        connect: Connect,
    },
    /// Says anew which pages of an app may ask.
    Origins {
        /// The app.
        name: String,
        /// The origins; none at all closes it to browsers.
        origins: Vec<String>,
        #[command(flatten)]
        connect: Connect,
    },
    /// Adds an agent to an app, or changes one, and prints its id.
    Agent(Box<Agent>),
    /// Removes an agent from an app.
    RemoveAgent {
        /// The app.
        name: String,
        /// The agent's id, as listed.
        id: String,
        #[command(flatten)]
        connect: Connect,
    },
    /// Gives an app another secret and prints it, once. The one before stays good until it is retired.
    Rotate {
        /// The app.
        name: String,
        #[command(flatten)]
        connect: Connect,
    },
    /// Ends the secret before the last.
    Retire {
        /// The app.
        name: String,
        #[command(flatten)]
        connect: Connect,
    },
    /// Forgets an app. Its conversations stay until their users are erased.
    Remove {
        /// The app.
        name: String,
        #[command(flatten)]
        connect: Connect,
    },
    /// Signs a token as the app's backend would, to try things out.
    Token {
        /// The app.
        name: String,
        /// The agent's id, as listed.
        agent: String,
        /// The user, as the app calls it.
        user: String,
        /// For how long it is good.
        #[arg(long, default_value_t = 900)]
        seconds: u32,
        #[command(flatten)]
        connect: Connect,
    },
    /// Erases what a user of an app said, attached and was told.
    Erase {
        /// The app.
        name: String,
        /// The user, as the app calls it.
        user: String,
        #[command(flatten)]
        connect: Connect,
    },
}

#[derive(clap::Args)]
pub(crate) struct Agent {
    /// The app.
    app: String,
    /// Who it is: `ag::{workspace}::{implementation}::{specifier}`.
    identity: String,
    /// What users see.
    #[arg(long, default_value = "Assistant")]
    name: String,
    /// Its id: changes the one that has it [default: a new one].
    #[arg(long, value_name = "UUID", default_value = "")]
    id: String,
    /// The address of its picture.
    #[arg(long, value_name = "URL", default_value = "")]
    photo: String,
    /// What a new conversation begins with.
    #[arg(long, value_name = "TEXT", default_value = "")]
    greeting: String,
    /// It is told what users say as JSON, with files, and not as text.
    #[arg(long)]
    json: bool,
    /// Files of one message.
    #[arg(long, value_name = "COUNT", default_value_t = 5)]
    files_per_message: u32,
    /// Files of one conversation.
    #[arg(long, value_name = "COUNT", default_value_t = 50)]
    files_per_conversation: u32,
    /// Bytes of one file.
    #[arg(long, value_name = "BYTES", default_value_t = 10 * 1024 * 1024)]
    file_bytes: u64,
    /// A kind of file that users may attach, such as `image/*`; may be repeated [default: pictures, PDF and text].
    #[arg(long = "file-type", value_name = "TYPE")]
    file_types: Vec<String>,
    #[command(flatten)]
    connect: Connect,
}

/// Kinds of files if nothing is said.
const FILE_TYPES: [&str; 6] = ["image/png", "image/jpeg", "image/gif", "image/webp", "application/pdf", "text/plain"];

pub(crate) fn run(command: Apps) -> Done {
    block_on(async { Ok(asked(command).await?) })
}

async fn asked(command: Apps) -> Result<(), Fault> {
    match command {
        Apps::Create { name, origins, key, connect } => {
            let key = Some(key).filter(|key| !key.is_empty());
            let (app, secret) = connect.operator().await?.create_app(name, key, origins).await?;
            say(format_args!("key {}", app.key));
            say(format_args!("secret {secret} (shown once; its backend signs tokens with it)"));
        }
        Apps::List { json, connect } => {
            let apps = connect.operator().await?.apps().await?;
            if json { apps.iter().for_each(|app| say(as_json(app))) } else { apps.iter().for_each(show) }
        }
        Apps::Origins { name, origins, connect } => {
            show(&connect.operator().await?.set_app_origins(name, origins).await?);
        }
        Apps::Agent(agent) => put_agent(*agent).await?,
        Apps::RemoveAgent { name, id, connect } => {
            show(&connect.operator().await?.remove_app_agent(name, id).await?);
        }
        Apps::Rotate { name, connect } => {
            let (_, secret) = connect.operator().await?.rotate_app_secret(name).await?;
            say(format_args!("secret {secret} (shown once; the one before is good until it is retired)"));
        }
        Apps::Retire { name, connect } => show(&connect.operator().await?.retire_app_secret(name).await?),
        Apps::Remove { name, connect } => {
            let app = connect.operator().await?.remove_app(name).await?;
            say(format_args!("removed {}", app.name));
        }
        Apps::Token { name, agent, user, seconds, connect } => {
            let lasts = Some(Duration::from_secs(seconds.into()));
            say(connect.operator().await?.sign_app_token(name, agent, user, lasts).await?);
        }
        Apps::Erase { name, user, connect } => {
            let conversations = connect.operator().await?.erase_app_user(name, user).await?;
            say(format_args!("erased {conversations} conversations"));
        }
    }
    Ok(())
}

async fn put_agent(agent: Agent) -> Result<(), Fault> {
    let given = Some(agent.file_types).filter(|types| !types.is_empty());
    let attachments = AttachmentPolicy {
        max_files_per_message: agent.files_per_message,
        max_files_per_convo: agent.files_per_conversation,
        max_file_size_bytes: agent.file_bytes,
        allowed_mime_types: given.unwrap_or_else(|| FILE_TYPES.map(ToOwned::to_owned).into()),
    };
    let wanted = AppAgent {
        id: agent.id,
        identity: agent.identity,
        name: agent.name,
        photo_url: agent.photo,
        greeting: agent.greeting,
        json: agent.json,
        attachments: Some(attachments),
    };
    say(agent.connect.operator().await?.put_app_agent(agent.app, wanted).await?.id);
    Ok(())
}

fn as_json(app: &App) -> Value {
    let agent = |agent: &AppAgent| json!({"id": agent.id, "identity": agent.identity, "name": agent.name});
    let agents: Vec<_> = app.agents.iter().map(agent).collect();
    json!({"name": app.name, "key": app.key, "origins": app.origins, "rotating": app.rotating, "agents": agents})
}

fn show(app: &App) {
    let state = if app.rotating { "two secrets" } else { "one secret" };
    say(plain(&format!("{}  {}  {state}  {}", app.name, app.key, app.origins.join(" "))));
    for AppAgent { id, identity, name, .. } in &app.agents {
        say(plain(&format!("  {id}  {identity}  {name}")));
    }
}

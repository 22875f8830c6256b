//! `app`: whose end users talk with which agents.

use trunkline_proto::own::{
    App, AppAgent, AttachmentPolicy, CreateAppRequest, EraseAppUserRequest, ListAppsRequest, PutAppAgentRequest,
    RemoveAppAgentRequest, RemoveAppRequest, RotateAppSecretRequest, SetAppOriginsRequest, SignAppTokenRequest,
    operator_client::OperatorClient,
};

use super::{
    Done, block_on,
    client::{Connect, said},
    say,
};

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

type Client = OperatorClient<tonic::transport::Channel>;

async fn client(connect: &Connect) -> Result<Client, Box<dyn std::error::Error>> {
    Ok(OperatorClient::new(connect.channel().await?))
}

pub(crate) fn run(command: Apps) -> Done {
    block_on(async {
        match command {
            Apps::Create { name, origins, key, connect } => {
                let asked = connect.sign(CreateAppRequest { name, key, origins })?;
                let made = client(&connect).await?.create_app(asked).await.map_err(|e| said(&e))?.into_inner();
                say(format_args!("key {}", made.app.unwrap_or_default().key));
                say(format_args!("secret {} (shown once; its backend signs tokens with it)", made.secret));
            }
            Apps::List { connect } => {
                let asked = connect.sign(ListAppsRequest::default())?;
                let found = client(&connect).await?.list_apps(asked).await.map_err(|e| said(&e))?.into_inner();
                found.apps.iter().for_each(show);
            }
            Apps::Origins { name, origins, connect } => {
                let asked = connect.sign(SetAppOriginsRequest { name, origins })?;
                let app = client(&connect).await?.set_app_origins(asked).await.map_err(|e| said(&e))?;
                show(&app.into_inner());
            }
            Apps::Agent(agent) => put_agent(*agent).await?,
            other => change(other).await?,
        }
        Ok(())
    })
}

async fn put_agent(agent: Agent) -> Done {
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
    let asked = agent.connect.sign(PutAppAgentRequest { app: agent.app, agent: Some(wanted) })?;
    let made = client(&agent.connect).await?.put_app_agent(asked).await.map_err(|e| said(&e))?;
    say(made.into_inner().id);
    Ok(())
}

async fn change(command: Apps) -> Done {
    match command {
        Apps::RemoveAgent { name, id, connect } => {
            let asked = connect.sign(RemoveAppAgentRequest { app: name, id })?;
            show(&client(&connect).await?.remove_app_agent(asked).await.map_err(|e| said(&e))?.into_inner());
        }
        Apps::Rotate { name, connect } => {
            let asked = connect.sign(RotateAppSecretRequest { name, retire: false })?;
            let reply = client(&connect).await?.rotate_app_secret(asked).await.map_err(|e| said(&e))?.into_inner();
            say(format_args!("secret {} (shown once; the one before is good until it is retired)", reply.secret));
        }
        Apps::Retire { name, connect } => {
            let asked = connect.sign(RotateAppSecretRequest { name, retire: true })?;
            let reply = client(&connect).await?.rotate_app_secret(asked).await.map_err(|e| said(&e))?.into_inner();
            show(&reply.app.unwrap_or_default());
        }
        Apps::Remove { name, connect } => {
            let asked = connect.sign(RemoveAppRequest { name })?;
            let app = client(&connect).await?.remove_app(asked).await.map_err(|e| said(&e))?.into_inner();
            say(format_args!("removed {}", app.name));
        }
        Apps::Token { name, agent, user, seconds, connect } => {
            let asked = connect.sign(SignAppTokenRequest { app: name, agent_id: agent, user, seconds })?;
            say(client(&connect).await?.sign_app_token(asked).await.map_err(|e| said(&e))?.into_inner().token);
        }
        Apps::Erase { name, user, connect } => {
            let asked = connect.sign(EraseAppUserRequest { app: name, user })?;
            let reply = client(&connect).await?.erase_app_user(asked).await.map_err(|e| said(&e))?.into_inner();
            say(format_args!("erased {} conversations", reply.conversations));
        }
        Apps::Create { .. } | Apps::List { .. } | Apps::Origins { .. } | Apps::Agent(_) => {}
    }
    Ok(())
}

fn show(app: &App) {
    let state = if app.rotating { "two secrets" } else { "one secret" };
    say(format_args!("{}  {}  {state}  {}", app.name, app.key, app.origins.join(" ")));
    for AppAgent { id, identity, name, .. } in &app.agents {
        say(format_args!("  {id}  {identity}  {name}"));
    }
}

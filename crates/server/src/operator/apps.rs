//! Apps, as operators manage them.

use trunkline_core::{
    Error, Kind,
    app::{self, Apps, Change, Payload},
    caller::Caller,
};
use trunkline_proto::own::{
    App, AppAgent, AppSecret, AppToken, AttachmentPolicy, CreateAppRequest, ListAppsReply, ListAppsRequest,
    PutAppAgentRequest, RemoveAppAgentRequest, RemoveAppRequest, RotateAppSecretRequest, SetAppOriginsRequest,
    SignAppTokenRequest,
};
use uuid::Uuid;

use crate::conversation::token;

/// How long a token is good if nothing is said, in seconds. The published figure.
const TOKEN_SECONDS: u32 = 15 * 60;

pub(super) fn list(apps: &Apps, caller: &Caller, asked: &ListAppsRequest) -> Result<ListAppsReply, Error> {
    let found = if asked.name.is_empty() { apps.list(caller)? } else { vec![apps.get(caller, &asked.name)?] };
    Ok(ListAppsReply { apps: found.iter().map(|app| shown(app)).collect() })
}

pub(super) async fn create(apps: &Apps, caller: &Caller, asked: CreateAppRequest) -> Result<AppSecret, Error> {
    let (app, secret) = apps.create(caller, &asked.name, &asked.key, asked.origins).await?;
    Ok(AppSecret { app: Some(shown(&app)), secret })
}

pub(super) async fn set_origins(apps: &Apps, caller: &Caller, asked: SetAppOriginsRequest) -> Result<App, Error> {
    Ok(shown(&*apps.change(caller, &asked.name, Change::Origins(asked.origins)).await?))
}

pub(super) async fn put_agent(apps: &Apps, caller: &Caller, asked: PutAppAgentRequest) -> Result<AppAgent, Error> {
    let missing = || Error::new(Kind::Invalid, "ERR_INVALID_ARGUMENT", "agent is required");
    let agent = asked.agent.ok_or_else(missing)?;
    let id = if agent.id.is_empty() { Uuid::new_v4() } else { id(&agent.id)? };
    let attachments = agent.attachments.map_or_else(app::AttachmentPolicy::default, |policy| app::AttachmentPolicy {
        max_files_per_message: policy.max_files_per_message,
        max_files_per_convo: policy.max_files_per_convo,
        max_file_size_bytes: policy.max_file_size_bytes,
        allowed_mime_types: policy.allowed_mime_types,
    });
    let any = |text: String| Some(text).filter(|text| !text.is_empty());
    let agent = app::Agent {
        id,
        identity: agent.identity,
        name: agent.name,
        photo_url: any(agent.photo_url),
        greeting: any(agent.greeting),
        payload: if agent.json { Payload::Json } else { Payload::Text },
        attachments,
    };
    let reply = shown_agent(&agent);
    apps.change(caller, &asked.app, Change::Agent(agent.into())).await?;
    Ok(reply)
}

pub(super) async fn remove_agent(apps: &Apps, caller: &Caller, asked: &RemoveAppAgentRequest) -> Result<App, Error> {
    Ok(shown(&*apps.change(caller, &asked.app, Change::NoAgent(id(&asked.id)?)).await?))
}

pub(super) async fn rotate(apps: &Apps, caller: &Caller, asked: &RotateAppSecretRequest) -> Result<AppSecret, Error> {
    let mut secret = String::new();
    if asked.retire {
        apps.change(caller, &asked.name, Change::NoFormerSecret).await?;
    } else {
        secret = apps.rotate(caller, &asked.name).await?;
    }
    Ok(AppSecret { app: Some(shown(&*apps.get(caller, &asked.name)?)), secret })
}

pub(super) async fn remove(apps: &Apps, caller: &Caller, asked: &RemoveAppRequest) -> Result<App, Error> {
    let app = apps.get(caller, &asked.name)?;
    apps.remove(caller, &asked.name).await?;
    Ok(shown(&app))
}

pub(super) fn sign(apps: &Apps, caller: &Caller, asked: &SignAppTokenRequest) -> Result<AppToken, Error> {
    let (app, agent) = (apps.get(caller, &asked.app)?, id(&asked.agent_id)?);
    // What would be refused later is refused now.
    apps.visitor(app.clone(), agent, &asked.user).map_err(|e| Error { kind: Kind::Invalid, ..e })?;
    let seconds = if asked.seconds == 0 { TOKEN_SECONDS } else { asked.seconds };
    Ok(AppToken { token: token::sign(&app, agent, &asked.user, seconds)? })
}

fn id(text: &str) -> Result<Uuid, Error> {
    let wrong = |_| Error::new(Kind::Invalid, "ERR_INVALID_ARGUMENT", format!("{text:?} is no id of an agent"));
    Uuid::try_parse(text).map_err(wrong)
}

fn shown(app: &app::App) -> App {
    App {
        name: app.name.clone(),
        key: app.key.clone(),
        origins: app.origins.clone(),
        agents: app.agents.iter().map(shown_agent).collect(),
        rotating: app.has_former_secret(),
    }
}

fn shown_agent(agent: &app::Agent) -> AppAgent {
    let policy = agent.attachments.clone();
    AppAgent {
        id: agent.id.to_string(),
        identity: agent.identity.clone(),
        name: agent.name.clone(),
        photo_url: agent.photo_url.clone().unwrap_or_default(),
        greeting: agent.greeting.clone().unwrap_or_default(),
        json: agent.payload == Payload::Json,
        attachments: Some(AttachmentPolicy {
            max_files_per_message: policy.max_files_per_message,
            max_files_per_convo: policy.max_files_per_convo,
            max_file_size_bytes: policy.max_file_size_bytes,
            allowed_mime_types: policy.allowed_mime_types,
        }),
    }
}

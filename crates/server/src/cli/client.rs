//! The commands' side of the wire.

use std::path::PathBuf;

use trunkline_client::{self as sdk, Client, Orchestrator, Service, Topic, TopicKind};

use super::{
    Fault,
    profile::{self, Profile},
};

type Error = Box<dyn std::error::Error>;

/// Which server, and with what.
#[derive(Clone, clap::Args)]
pub(crate) struct Connect {
    /// The server's address for agents [default: http://127.0.0.1:50051].
    #[arg(long, value_name = "URL", env = "TRUNKLINE_SERVER")]
    server: Option<String>,
    /// The API key; not needed for a server with --dev.
    // Keys of earlier versions may begin with a hyphen.
    #[arg(long, value_name = "KEY", env = "TRUNKLINE_API_KEY", hide_env_values = true, allow_hyphen_values = true)]
    api_key: Option<String>,
    /// A PEM file with the roots to trust, for an https:// address.
    #[arg(long, value_name = "FILE")]
    ca: Option<PathBuf>,
    /// Which profile of the configuration file says what the flags above do not [default: `default`, if there is one].
    #[arg(long, value_name = "NAME", env = "TRUNKLINE_PROFILE")]
    server_profile: Option<String>,
}

impl Connect {
    /// What the flags, the environment and the profile say together.
    fn place(&self) -> Result<Profile, Error> {
        let Self { server, api_key, ca, server_profile } = self;
        let found = profile::find(server_profile.as_deref())?;
        Ok(Profile {
            server: server.clone().or(found.server),
            api_key: api_key.clone().or(found.api_key),
            ca: ca.clone().or(found.ca),
        })
    }

    /// A client for whoever administers: by its key, and on a server with --dev, where there are none, by its kind.
    pub(crate) async fn administrator(&self) -> Result<Client, Fault> {
        let who = Orchestrator::builder("trunkline-cli").specifier(uuid::Uuid::new_v4()).profile("none");
        Ok(self.with(who)?.connect().await?.into())
    }

    /// A client as somebody, or else as a service.
    pub(crate) async fn client_as(&self, whom: Option<&str>) -> Result<Client, Fault> {
        let Some(whom) = whom else {
            let own = uuid::Uuid::new_v4().to_string();
            return Ok(self
                .with(Service::builder("trunkline-cli", own).declines_pool_tasks())?
                .connect()
                .await?
                .into());
        };
        let topic: Topic = whom.parse()?;
        let parts: Vec<&str> = topic.parts().collect();
        Ok(match (topic.kind(), &parts[..]) {
            (TopicKind::Agent, [w, i, s]) => self.with(sdk::Agent::builder(*w, *i, *s))?.connect().await?.into(),
            (TopicKind::UniqueTask, [w, i, s]) => {
                self.with(sdk::UniqueTask::builder(*w, *i, *s))?.connect().await?.into()
            }
            (TopicKind::Window, [u, w]) => self.with(sdk::User::builder(*u, *w))?.connect().await?.into(),
            (TopicKind::Service, [i, s]) => self.with(Service::builder(*i, *s))?.connect().await?.into(),
            (TopicKind::Bridge, [i, s]) => self.with(sdk::Bridge::builder(*i, *s))?.connect().await?.into(),
            (TopicKind::Task, [w, i, _]) => self.with(sdk::Worker::builder(*w, *i))?.connect().await?.into(),
            (TopicKind::Orchestrator, [i, s]) => {
                let who = Orchestrator::builder(*i).specifier(*s).profile("none");
                self.with(who)?.connect().await?.into()
            }
            (TopicKind::WorkflowEngine, _) => self.with(sdk::WorkflowEngine::builder())?.connect().await?.into(),
            _ => return Err(Fault::usage(format!("nobody can connect as {whom}"))),
        })
    }

    /// As said, and without coming back: a command ends when its connection does.
    pub(crate) fn with<P: sdk::Principal>(&self, builder: sdk::Builder<P>) -> Result<sdk::Builder<P>, Fault> {
        let place = self.place().map_err(|e| Fault::usage(e.to_string()))?;
        let mut builder = builder.address(place.server()).reconnect(sdk::Reconnect::never());
        if let Some(key) = &place.api_key {
            builder = builder.api_key(key);
        }
        if let Some(ca) = &place.ca {
            builder = builder.tls(sdk::Tls::new().root_file(ca)?);
        }
        Ok(builder)
    }

    /// The operators' side of the server.
    pub(crate) async fn operator(&self) -> Result<sdk::Operator, Fault> {
        let place = self.place().map_err(|e| Fault::usage(e.to_string()))?;
        let mut builder = sdk::Operator::builder().address(place.server());
        if let Some(key) = &place.api_key {
            builder = builder.api_key(key);
        }
        if let Some(ca) = &place.ca {
            builder = builder.tls(sdk::Tls::new().root_file(ca)?);
        }
        Ok(builder.connect().await?)
    }
}

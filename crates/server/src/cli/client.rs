//! The commands' side of the wire.

use std::path::PathBuf;

use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{
    Request, Streaming,
    transport::{Certificate, Channel, ClientTlsConfig, Endpoint},
};
use trunkline_core::identity::Identity;
use trunkline_proto::v1::{
    AgentIdentity, BridgeIdentity, DownstreamMessage, InitConnection, OrchestratorIdentity, ServiceIdentity,
    TaskIdentity, UpstreamMessage, UserIdentity, WorkflowEngineIdentity, aether_gateway_client::AetherGatewayClient,
    downstream_message::Payload as Down, init_connection::ClientType, upstream_message::Payload as Up,
};

use trunkline_client::{self as sdk, Client, Orchestrator, Service, Topic, TopicKind};

use super::{
    Fault,
    profile::{self, Profile},
};

type Error = Box<dyn std::error::Error>;

/// Largest frame that a server sends. The published contract's figure.
const FRAME_BYTES_MAX: usize = 16 * 1024 * 1024;

/// Which server, and with what.
#[derive(clap::Args)]
pub(crate) struct Connect {
    /// The server's address for agents [default: http://127.0.0.1:50051].
    #[arg(long, value_name = "URL", env = "TRUNKLINE_SERVER")]
    server: Option<String>,
    /// The API key; not needed for a server with --dev.
    #[arg(long, value_name = "KEY", env = "TRUNKLINE_API_KEY", hide_env_values = true)]
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

    fn with<P: sdk::Principal>(&self, builder: sdk::Builder<P>) -> Result<sdk::Builder<P>, Fault> {
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

    pub(crate) async fn channel(&self) -> Result<Channel, Error> {
        let place = self.place()?;
        let mut endpoint = Endpoint::from_shared(place.server().to_owned())?;
        if let Some(ca) = &place.ca {
            let pem = std::fs::read(ca).map_err(|e| format!("{}: {e}", ca.display()))?;
            endpoint = endpoint.tls_config(ClientTlsConfig::new().ca_certificate(Certificate::from_pem(pem)))?;
        }
        let refused = |e: tonic::transport::Error| {
            let mut cause: &dyn std::error::Error = &e;
            while let Some(deeper) = cause.source() {
                cause = deeper;
            }
            format!("cannot connect to {}: {cause}; is a server running there?", place.server()).into()
        };
        endpoint.connect().await.map_err(refused)
    }

    /// Puts the key where the operators' service looks for it.
    pub(crate) fn sign<T>(&self, message: T) -> Result<Request<T>, Error> {
        let mut request = Request::new(message);
        if let Some(key) = &self.place()?.api_key {
            request.metadata_mut().insert("x-api-key", key.parse()?);
        }
        Ok(request)
    }

    /// The server's address, as other programs want it: without its scheme.
    pub(crate) fn address(&self) -> Result<String, Error> {
        let place = self.place()?;
        let server = place.server();
        Ok(server.split_once("://").map_or(server, |(_, address)| address).to_owned())
    }

    /// A stream of a principal's own.
    pub(crate) async fn attach(&self, identity: &Identity) -> Result<Stream, Error> {
        self.attach_as(client_type(identity)?).await
    }

    /// The same, with all that its kind can say.
    pub(crate) async fn attach_as(&self, client_type: ClientType) -> Result<Stream, Error> {
        let mut client = AetherGatewayClient::new(self.channel().await?).max_decoding_message_size(FRAME_BYTES_MAX);
        let (up, frames) = mpsc::channel(16);
        let credentials = self.place()?.api_key.iter().map(|key| ("x-api-key".to_owned(), key.clone())).collect();
        let init = InitConnection { client_type: Some(client_type), credentials, ..InitConnection::default() };
        up.send(frame(Up::Init(init.into()))).await?;
        let down = client.connect(ReceiverStream::new(frames)).await.map_err(|e| said(&e))?.into_inner();
        let mut stream = Stream { up, down };
        // The acknowledgement, or why not.
        stream.next().await?;
        Ok(stream)
    }
}

/// A stream after its handshake.
pub(crate) struct Stream {
    up: mpsc::Sender<UpstreamMessage>,
    down: Streaming<DownstreamMessage>,
}

impl Stream {
    pub(crate) async fn put(&self, payload: Up) -> Result<(), Error> {
        Ok(self.up.send(frame(payload)).await?)
    }

    pub(crate) async fn next(&mut self) -> Result<Down, Error> {
        loop {
            let frame = self.down.message().await.map_err(|e| said(&e))?.ok_or("the server ended the stream")?;
            match frame.payload {
                Some(Down::Error(error)) => return Err(format!("{}: {}", error.code, error.message).into()),
                Some(Down::Config(_)) | None => {}
                Some(payload) => return Ok(payload),
            }
        }
    }
}

fn frame(payload: Up) -> UpstreamMessage {
    UpstreamMessage { payload: Some(payload), ..UpstreamMessage::default() }
}

/// What the server said, without the machinery around it.
pub(crate) fn said(status: &tonic::Status) -> Error {
    format!("{:?}: {}", status.code(), status.message()).into()
}

fn client_type(identity: &Identity) -> Result<ClientType, Error> {
    Ok(match identity.clone() {
        Identity::Agent(n) => ClientType::Agent(AgentIdentity {
            workspace: n.workspace,
            implementation: n.implementation,
            specifier: n.specifier,
        }),
        Identity::Task(n) => ClientType::Task(TaskIdentity {
            workspace: n.workspace,
            implementation: n.implementation,
            unique_specifier: String::new(),
        }),
        Identity::UniqueTask(n) => ClientType::Task(TaskIdentity {
            workspace: n.workspace,
            implementation: n.implementation,
            unique_specifier: n.specifier,
        }),
        Identity::User { user, window } => ClientType::User(UserIdentity { user_id: user, window_id: window }),
        Identity::Orchestrator(n) => ClientType::Orchestrator(OrchestratorIdentity {
            implementation: n.implementation,
            specifier: n.specifier,
            ..OrchestratorIdentity::default()
        }),
        Identity::WorkflowEngine => ClientType::WorkflowEngine(WorkflowEngineIdentity::default()),
        Identity::MetricsBridge => ClientType::MetricsBridge(Default::default()),
        Identity::Bridge(n) => {
            ClientType::Bridge(BridgeIdentity { implementation: n.implementation, specifier: n.specifier })
        }
        Identity::Service(n) => ClientType::Service(ServiceIdentity {
            implementation: n.implementation,
            specifier: n.specifier,
            ..ServiceIdentity::default()
        }),
        Identity::Sandbox(_) => return Err("sandboxes connect over HTTP".into()),
    })
}

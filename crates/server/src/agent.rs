//! The agent surface: `aether.v1` over gRPC. One task owns each stream.

mod acks;
mod budget;
mod connection;
mod convert;
mod follow;
mod handshake;
mod inbound;
mod outbound;
mod oversized;
mod saves;

use std::{net::IpAddr, sync::Arc};

use rustls::pki_types::CertificateDer;
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use tonic::{Request, Response, Status, Streaming};
use trunkline_core::{conversation::Conversations, gate::Gate, limits::Limits, session::Sessions, task::Tasks};
use trunkline_proto::v1::{UpstreamMessage, aether_gateway_server::AetherGateway};

use crate::{auth::Auth, metrics::Metrics};

/// What the connections share.
pub(crate) struct Gateway {
    pub(crate) sessions: Sessions,
    pub(crate) gate: Gate,
    pub(crate) auth: Auth,
    pub(crate) metrics: Arc<Metrics>,
    pub(crate) limits: Limits,
    /// When the server started, in Unix seconds.
    pub(crate) started_at: i64,
    pub(crate) stop: CancellationToken,
    /// What clients have others do.
    pub(crate) tasks: Tasks,
    /// What users of apps say, and are told.
    pub(crate) conversations: Conversations,
    /// What this program is doing.
    pub(crate) tracker: TaskTracker,
}

/// Who is at the other end of the transport.
pub(crate) struct Peer {
    pub(crate) address: Option<IpAddr>,
    pub(crate) certificate: Option<CertificateDer<'static>>,
}

/// The service: a task for each stream.
#[derive(Clone)]
pub(crate) struct Surface(pub(crate) Arc<Gateway>);

#[tonic::async_trait]
impl AetherGateway for Surface {
    type ConnectStream = outbound::Frames;

    async fn connect(
        &self,
        request: Request<Streaming<UpstreamMessage>>,
    ) -> Result<Response<outbound::Frames>, Status> {
        if self.0.stop.is_cancelled() {
            return Err(Status::unavailable("server shutting down"));
        }
        let (outbound, frames) = outbound::channel();
        let peer = Peer {
            address: request.remote_addr().map(|address| address.ip()),
            certificate: request.peer_certs().and_then(|chain| chain.first().cloned()),
        };
        let (metadata, _, inbound) = request.into_parts();
        self.0.tracker.spawn(connection::run(self.0.clone(), metadata, peer, inbound, outbound));
        Ok(Response::new(frames))
    }
}

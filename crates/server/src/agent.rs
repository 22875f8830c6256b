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
mod upstream;

use std::{
    convert::Infallible,
    net::IpAddr,
    sync::Arc,
    task::{Context, Poll},
};

use axum::http;
use rustls::pki_types::CertificateDer;
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use tonic::{Request, Response, Status, Streaming, body::Body, server::NamedService};
use trunkline_core::{conversation::Conversations, gate::Gate, limits::Limits, session::Sessions, task::Tasks};
use trunkline_proto::v1::{
    UpstreamMessage,
    aether_gateway_server::{AetherGateway, AetherGatewayServer},
};

use crate::{auth::Auth, listen, metrics::Metrics};

pub(crate) use budget::Replies;
pub(crate) use outbound::counting;
pub(crate) use upstream::Allowance;
use upstream::Detached;

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
    /// What streams may read before they handle it.
    pub(crate) read_ahead: Allowance,
    /// What streams may hold of replies that their clients have not taken.
    pub(crate) replies: Replies,
}

/// Who is at the other end of the transport.
pub(crate) struct Peer {
    pub(crate) address: Option<IpAddr>,
    pub(crate) certificate: Option<Arc<CertificateDer<'static>>>,
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
        let extensions = request.extensions();
        let (outbound, frames) = outbound::channel(extensions.get::<Arc<listen::Arrivals>>().cloned());
        let peer = Peer {
            address: extensions.get::<listen::Peer>().map(|peer| peer.0),
            certificate: extensions.get::<listen::Certificate>().map(|certificate| certificate.0.clone()),
        };
        let (metadata, extensions, _) = request.into_parts();
        let body = extensions.get::<Detached>().and_then(Detached::take);
        let body = body.ok_or_else(|| Status::internal("the body of the stream is missing"))?;
        self.0.tracker.spawn(connection::run(self.0.clone(), metadata, peer, body, outbound));
        let in_flight = frames.in_flight().clone();
        let mut answer = Response::new(frames);
        answer.extensions_mut().insert(in_flight);
        Ok(answer)
    }
}

/// The service as a listener serves it. Streams take the bodies of their requests off before the library decodes them.
#[derive(Clone)]
pub(crate) struct Service(pub(crate) AetherGatewayServer<Surface>);

impl NamedService for Service {
    const NAME: &'static str = <AetherGatewayServer<Surface> as NamedService>::NAME;
}

impl tower::Service<http::Request<Body>> for Service {
    type Response = http::Response<Body>;
    type Error = Infallible;
    type Future = <AetherGatewayServer<Surface> as tower::Service<http::Request<Body>>>::Future;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: http::Request<Body>) -> Self::Future {
        let (mut parts, body) = request.into_parts();
        parts.extensions.insert(Detached::new(body));
        self.0.call(http::Request::from_parts(parts, Body::empty()))
    }
}

//! The listeners: bound, plain or with TLS, served until they are told to stop.

mod web;

use std::{net::SocketAddr, sync::Arc, time::Duration};

use tokio::net::TcpListener;
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use tonic::transport::server::TcpIncoming;
use trunkline_core::limits::FRAME_OUT_BYTES_MAX;
use trunkline_proto::{own::operator_server::OperatorServer, v1::aether_gateway_server::AetherGatewayServer};

pub(crate) use web::{Doors, Peer, Seat};

use crate::{
    agent::{Gateway, Surface},
    app::StartError,
    http::Site,
    operator::Desk,
    tls::Tls,
};

/// Streams of one HTTP/2 connection. The published contract's figure.
const STREAMS_MAX: u32 = 1000;

/// How often a silent client is pinged, and how long its answer may take. The published contract's figures.
const KEEPALIVE: (Duration, Duration) = (Duration::from_secs(30), Duration::from_secs(10));

/// What listeners share.
pub(crate) struct Listeners {
    pub(crate) tls: Option<Tls>,
    pub(crate) stop: CancellationToken,
    pub(crate) tasks: TaskTracker,
}

impl Listeners {
    pub(crate) fn grpc(&self, listener: TcpListener, gateway: Gateway) {
        let (frame_bytes_max, gateway) = (gateway.limits.frame_bytes_max, Arc::new(gateway));
        let operator = OperatorServer::new(Desk(gateway.clone()));
        let service = AetherGatewayServer::new(Surface(gateway))
            .max_decoding_message_size(frame_bytes_max)
            .max_encoding_message_size(FRAME_OUT_BYTES_MAX);
        let (health, health_service) = tonic_health::server::health_reporter();
        let router = tonic::transport::Server::builder()
            .http2_keepalive_interval(Some(KEEPALIVE.0))
            .http2_keepalive_timeout(Some(KEEPALIVE.1))
            .concurrency_limit_per_connection(STREAMS_MAX as usize)
            .max_concurrent_streams(STREAMS_MAX)
            .add_service(health_service)
            .add_service(operator)
            .add_service(service);
        let stop = self.stop.clone();
        let incoming = match &self.tls {
            Some(tls) => Ok(tls.clone().accept(listener, &["h2"], stop.clone(), &self.tasks)),
            None => Err(listener),
        };
        self.tasks.spawn(async move {
            health.set_serving::<AetherGatewayServer<Surface>>().await;
            let stopped = async {
                stop.cancelled().await;
                health.set_not_serving::<AetherGatewayServer<Surface>>().await;
            };
            let served = match incoming {
                Ok(streams) => router.serve_with_incoming_shutdown(ReceiverStream::new(streams), stopped).await,
                Err(listener) => {
                    let incoming = TcpIncoming::from(listener).with_nodelay(Some(true));
                    router.serve_with_incoming_shutdown(incoming, stopped).await
                }
            };
            if let Err(error) = served {
                tracing::error!(%error, "the gRPC listener ended");
            }
        });
    }

    pub(crate) fn http(&self, listener: TcpListener, site: Site, doors: Doors) {
        let all = web::Connections { site, doors, stop: self.stop.clone(), tasks: self.tasks.clone() };
        match &self.tls {
            Some(tls) => {
                let streams = tls.clone().accept(listener, &["h2", "http/1.1"], self.stop.clone(), &self.tasks);
                self.tasks.spawn(all.encrypted(streams));
            }
            None => drop(self.tasks.spawn(all.plain(listener))),
        }
    }
}

pub(crate) async fn bind(address: SocketAddr) -> Result<(TcpListener, SocketAddr), StartError> {
    let bound = async {
        let listener = TcpListener::bind(address).await?;
        let local = listener.local_addr()?;
        Ok((listener, local))
    };
    bound.await.map_err(|source| StartError::Bind { address, source })
}

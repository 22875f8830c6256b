//! A server, and clients of it.

use std::time::Duration;

use trunkline::Server;
use trunkline_client::{Agent, Builder, Principal};

/// Nothing here takes longer unless it hangs.
pub(crate) const PATIENCE: Duration = Duration::from_secs(20);

pub(crate) struct World {
    pub(crate) server: Server,
    pub(crate) address: String,
}

impl World {
    pub(crate) async fn begin() -> Self {
        let server = Server::builder().start().await.unwrap();
        let address = server.addresses().grpc.to_string();
        Self { server, address }
    }

    pub(crate) async fn connect<P: Principal>(&self, builder: Builder<P>) -> P {
        builder.address(&self.address).connect().await.unwrap()
    }

    pub(crate) async fn agent(&self, specifier: &str) -> Agent {
        self.connect(Agent::builder("ws", "impl", specifier)).await
    }

    pub(crate) async fn end(self) {
        self.server.close().await;
    }
}

pub(crate) async fn soon<T>(what: impl Future<Output = T>) -> T {
    tokio::time::timeout(PATIENCE, what).await.expect("it happens soon")
}

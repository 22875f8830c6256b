//! The accept loop of every listener.

use std::{io, net::SocketAddr, sync::Arc, time::Duration};

use tokio::{
    net::{TcpListener, TcpStream},
    time::timeout,
};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use super::connections::{Connection, Connections, Listener};
use crate::lines::Lines;

/// Pause after the system has refused to accept: what is short does not come back sooner.
const PAUSE: Duration = Duration::from_millis(100);

/// What accepts, and for whom.
pub(super) struct Accepting {
    pub(super) socket: TcpListener,
    pub(super) listener: Listener,
    pub(super) connections: Connections,
    pub(super) stop: CancellationToken,
    pub(super) tasks: TaskTracker,
}

impl Accepting {
    /// Accepts until the server stops. Each connection is a task of its own, running `serve`; one for which there is no room is
    /// given to `refuse`.
    pub(super) async fn run<S: Future<Output = ()> + Send + 'static>(
        self,
        serve: impl Fn(TcpStream, SocketAddr, Arc<Connection>) -> S,
        refuse: impl Fn(TcpStream),
    ) {
        let (mut failures, mut refusals) = (Lines::default(), Lines::default());
        let listener = self.listener.name();
        while let Some(accepted) = self.stop.run_until_cancelled(self.socket.accept()).await {
            match accepted {
                Ok((stream, peer)) => match self.connections.admit(self.listener, peer.ip()).await {
                    Some(connection) => drop(self.tasks.spawn(serve(stream, peer, connection.into()))),
                    None => {
                        refuse(stream);
                        if let Some(count) = refusals.next() {
                            tracing::warn!(listener, count, "connection limit reached; new connections are refused");
                        }
                    }
                },
                Err(error) if is_of_the_connection(&error) => {}
                Err(error) => {
                    if let Some(count) = failures.next() {
                        tracing::warn!(listener, count, %error, "cannot accept connections; trying again");
                    }
                    self.connections.make_room();
                    // Elapsed, or the server stops: the loop sees which.
                    let _ = timeout(PAUSE, self.stop.cancelled()).await;
                }
            }
        }
    }
}

/// Whether only the connection that was to be accepted is broken, and not the listener.
fn is_of_the_connection(error: &io::Error) -> bool {
    use io::ErrorKind::{ConnectionAborted, ConnectionRefused, ConnectionReset};
    matches!(error.kind(), ConnectionAborted | ConnectionRefused | ConnectionReset)
}

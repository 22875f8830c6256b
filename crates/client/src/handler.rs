//! Runs what was registered for what comes.

use std::{fmt, panic::AssertUnwindSafe, sync::Arc, time::Duration};

use futures_util::FutureExt as _;
use tokio::sync::watch;

use crate::{
    connection::{State, lane::Received},
    message::Message,
};

/// The wait before a handler is tried again; doubled each time, up to the longest.
const FIRST: Duration = Duration::from_millis(100);
const LONGEST: Duration = Duration::from_secs(30);

/// A handler for each message, again and again until it takes it.
pub(crate) async fn messages<F, R, E>(
    mut received: Received<Message>,
    mut handler: F,
    mut state: watch::Receiver<State>,
) where
    F: FnMut(Arc<Message>) -> R + Send + 'static,
    R: Future<Output = Result<(), E>> + Send + 'static,
    E: fmt::Display + Send + 'static,
{
    while let Some(mut message) = received.next().await {
        let ack = message.ack.take();
        let message = Arc::new(message);
        let mut wait = FIRST;
        loop {
            if ack.as_ref().is_some_and(crate::connection::acks::Ack::is_stale) {
                break;
            }
            // A handler may panic before its future is made, too.
            let handled = AssertUnwindSafe(async { handler(Arc::clone(&message)).await }).catch_unwind().await;
            match handled {
                Ok(Ok(())) => break,
                Ok(Err(error)) => {
                    tracing::warn!(%error, from = message.source(), "a handler failed; it is tried again");
                }
                Err(_) => tracing::error!(from = message.source(), "a handler panicked; it is tried again"),
            }
            let is_over = state.wait_for(|state| matches!(state, State::Ended { .. }));
            if tokio::time::timeout(wait, is_over).await.is_ok() {
                return;
            }
            wait = (wait * 2).min(LONGEST);
        }
        if let Some(ack) = ack {
            ack.done();
        }
    }
}

/// A handler for each of anything.
pub(crate) async fn each<T, F, R>(mut received: Received<T>, mut handler: F)
where
    F: FnMut(T) -> R + Send + 'static,
    R: Future<Output = ()> + Send + 'static,
{
    while let Some(item) = received.next().await {
        if AssertUnwindSafe(async { handler(item).await }).catch_unwind().await.is_err() {
            tracing::error!("a handler panicked; it goes on with the next");
        }
    }
}

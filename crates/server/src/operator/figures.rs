//! How the server stands, again and again, for whoever watches.

use std::{sync::Arc, time::Duration};

use futures_util::stream;
use tokio::time::{Instant, MissedTickBehavior};
use tokio_stream::Stream;
use tonic::Status;
use trunkline_core::{Error, caller::Caller, session};
use trunkline_proto::own::{Figures, Standing, WatchRequest};
use trunkline_store::log;

use crate::{agent::Gateway, error::status, metrics::resident_bytes};

/// How often if nothing is said, and the bounds of what may be: a person sees no difference below, a proxy ends what is still
/// for longer.
const INTERVAL_MS: u32 = 1000;
const INTERVAL_MS_MIN: u32 = 200;
const INTERVAL_MS_MAX: u32 = 60_000;

/// Sessions that are told of if nothing is said, and the most.
const SESSIONS: u32 = 200;
const SESSIONS_MAX: u32 = 10_000;

/// Pulled by the transport: who does not read holds up nothing, and gets the present when it does.
pub(super) fn watch(
    gateway: Arc<Gateway>,
    caller: Caller,
    asked: WatchRequest,
) -> impl Stream<Item = Result<Figures, Status>> + Send {
    let or = |given: u32, default: u32| if given == 0 { default } else { given };
    let interval = or(asked.interval_ms, INTERVAL_MS).clamp(INTERVAL_MS_MIN, INTERVAL_MS_MAX);
    let most = or(asked.sessions_max, SESSIONS).min(SESSIONS_MAX) as usize;
    let mut ticks = tokio::time::interval_at(Instant::now(), Duration::from_millis(interval.into()));
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    stream::unfold((gateway, caller, ticks), move |(gateway, caller, mut ticks)| async move {
        ticks.tick().await;
        let figures = figures(&gateway, &caller, most).await.map_err(|e| status(&e));
        Some((figures, (gateway, caller, ticks)))
    })
}

async fn figures(gateway: &Gateway, caller: &Caller, most: usize) -> Result<Figures, Error> {
    let (sessions, total) = gateway.sessions.standings(caller, most).await?;
    let (metrics, now_ms) = (&gateway.metrics, log::Clock::system().now_ms());
    let counts = gateway.sessions.presence().counts().into_iter();
    Ok(Figures {
        unix_ms: now_ms,
        version: env!("CARGO_PKG_VERSION").to_owned(),
        uptime_seconds: (now_ms / 1000).saturating_sub(u64::try_from(gateway.started_at).unwrap_or(0)),
        connections: counts.map(|(kind, count)| (kind.rule_word().to_owned(), count as u32)).collect(),
        accepted: metrics.accepted.get(),
        delivered: metrics.delivered.get(),
        refused: metrics.refused_total.get(),
        records: gateway.gate.records(),
        resident_bytes: resident_bytes(),
        log_buffered_bytes: gateway.gate.log_buffered_bytes(),
        http_connections: u32::try_from(metrics.http_connections.get()).unwrap_or(0),
        sessions: sessions.into_iter().map(standing).collect(),
        sessions_total: u32::try_from(total).unwrap_or(u32::MAX),
    })
}

fn standing(standing: session::Standing) -> Standing {
    let session::Standing { connection, accepted, delivered, unacknowledged, lag } = standing;
    Standing {
        session_id: connection.session.clone(),
        identity: connection.identity.to_string(),
        workspace: connection.workspace.clone().unwrap_or_default(),
        connected_at_ms: connection.connected_at_ms,
        fencing_epoch: connection.fencing_epoch,
        reconnections: connection.reconnections,
        accepted,
        delivered,
        unacknowledged,
        lag,
    }
}

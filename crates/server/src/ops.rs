//! The listener for operators.
//!
//! | path | answers |
//! | --- | --- |
//! | `/livez`, `/healthz` | 200 while the process serves requests at all |
//! | `/startupz` | 200 once everything was opened and bound; before it, nothing listens |
//! | `/readyz` | 200 if the store answers and takes writes, no part of the server has failed and it is not stopping, else 503, with a line for each part |
//! | `/metrics` | figures in Prometheus form |

use std::{
    fmt::Write as _,
    fs,
    sync::Arc,
    time::{Duration, Instant},
};

use axum::{
    Router,
    extract::State,
    http::{StatusCode, header::CONTENT_TYPE},
    response::IntoResponse,
    routing::get,
};
use tokio_util::sync::CancellationToken;
use trunkline_core::{gate::Gate, identity::PrincipalKind, sandbox::Sandboxes, session::Sessions};
use trunkline_store::log;

use crate::{
    http,
    metrics::{Metrics, Of, OfStatus, Part, resident_bytes},
    supervise::Supervisor,
};

/// A store that has not answered after so long is not ready.
const READY_TIMEOUT: Duration = Duration::from_secs(2);

/// What operators look at.
pub(crate) struct Operations {
    gate: Gate,
    sessions: Sessions,
    sandboxes: Sandboxes,
    metrics: Arc<Metrics>,
    stop: CancellationToken,
    jobs: Supervisor,
    started: Instant,
}

impl Operations {
    pub(crate) fn new(
        gate: Gate,
        sessions: Sessions,
        sandboxes: Sandboxes,
        metrics: Arc<Metrics>,
        stop: CancellationToken,
        jobs: Supervisor,
    ) -> Arc<Self> {
        Arc::new(Self { gate, sessions, sandboxes, metrics, stop, jobs, started: Instant::now() })
    }

    /// Each part of the store, and how long it took to answer, or why it did not.
    async fn store(&self) -> Vec<(&'static str, Result<Duration, String>)> {
        match tokio::time::timeout(READY_TIMEOUT, self.gate.check()).await {
            Ok(parts) => parts.into_iter().map(|(part, answer)| (part, answer.map_err(|e| e.to_string()))).collect(),
            Err(_) => vec![("store", Err(format!("no answer within {} s", READY_TIMEOUT.as_secs())))],
        }
    }
}

pub(crate) fn router(operations: Arc<Operations>) -> Router {
    Router::new()
        .route("/livez", get(|| async { "ok\n" }))
        .route("/healthz", get(|| async { "ok\n" }))
        .route("/startupz", get(|| async { "ok\n" }))
        .route("/readyz", get(ready))
        .route("/metrics", get(metrics))
        .with_state(operations)
        .fallback(http::not_found)
        .method_not_allowed_fallback(http::not_allowed)
}

async fn ready(State(operations): State<Arc<Operations>>) -> (StatusCode, String) {
    let (mut is_ready, mut text) = (true, String::new());
    if operations.stop.is_cancelled() {
        is_ready = false;
        text.push_str("server: stopping\n");
    }
    if let Some(fault) = operations.jobs.fault() {
        is_ready = false;
        // Writing to a string cannot fail.
        let _ = writeln!(text, "server: {fault}");
    }
    for (part, answer) in operations.store().await {
        is_ready &= answer.is_ok();
        // Writing to a string cannot fail.
        let _ = match answer {
            Ok(took) => writeln!(text, "{part}: ok ({} us)", took.as_micros()),
            Err(why) => writeln!(text, "{part}: {why}"),
        };
    }
    (if is_ready { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE }, text)
}

async fn metrics(State(operations): State<Arc<Operations>>) -> impl IntoResponse {
    let metrics = &operations.metrics;
    let counts = operations.sessions.presence().counts();
    for kind in PrincipalKind::all() {
        let count = counts.get(&kind).copied().unwrap_or(0);
        metrics.connections.get_or_create(&Of { kind: kind.rule_word() }).set(count as i64);
    }
    // While the store does not answer, what it last said stays.
    if let Ok(Ok(counts)) = tokio::time::timeout(READY_TIMEOUT, operations.sandboxes.counts()).await {
        for (status, count) in counts {
            metrics.sandboxes.get_or_create(&OfStatus { status: status.word() }).set(count);
        }
    }
    for (part, answer) in operations.store().await {
        metrics.store_up.get_or_create(&Part { part }).set(i64::from(answer.is_ok()));
        if let Ok(took) = answer {
            metrics.store_seconds.get_or_create(&Part { part }).set(took.as_secs_f64());
        }
    }
    metrics.records.set(operations.gate.records() as i64);
    metrics.log_buffered_bytes.set(operations.gate.log_buffered_bytes() as i64);
    metrics.positions_clamped.set(operations.gate.positions_clamped() as i64);
    metrics.clock_steps.set(log::Clock::steps() as i64);
    if let Some(free) = operations.gate.free_bytes() {
        metrics.data_free_bytes.set(i64::try_from(free).unwrap_or(i64::MAX));
    }
    metrics.uptime_seconds.set(operations.started.elapsed().as_secs() as i64);
    // Both are 0 where there is no /proc.
    metrics.resident_bytes.set(resident_bytes() as i64);
    metrics.open_files.set(fs::read_dir("/proc/self/fd").map_or(0, |all| all.count() as i64));
    let content_type = "application/openmetrics-text; version=1.0.0; charset=utf-8";
    match metrics.encode() {
        Ok(text) => ([(CONTENT_TYPE, content_type)], text).into_response(),
        Err(_) => StatusCode::INTERNAL_SERVER_ERROR.into_response(),
    }
}

//! How the server is doing, asked over the stream.

use trunkline_core::{Error, Kind, caller::Caller, gate::Inspect, identity::PrincipalKind, task::state::Status};
use trunkline_proto::v1::{
    AdminQuery, AdminResponse, ErrorResponse, GatewayInfo, GatewayStats, HealthCheck, HealthCheckStatus, HealthInfo,
    HealthStatus, admin_query::OpType, downstream_message::Payload as Down,
};

use super::super::Gateway;
use super::sessions::{duration, info, now_s, page, wanted};
use crate::{error::response, metrics::resident_bytes};

/// Who may not ask gets a typed reply that says so, and the error that the published server has for everybody, because
/// its clients and its suite know that one.
pub(super) async fn handle(gateway: &Gateway, caller: &Caller, query: AdminQuery) -> Vec<Down> {
    let request_id = query.request_id.clone();
    let error = match run(gateway, caller, query).await {
        Ok(reply) => return vec![Down::Admin(AdminResponse { success: true, request_id, ..reply }.into())],
        Err(error) => error,
    };
    let typed = AdminResponse { error: error.to_string(), request_id: request_id.clone(), ..AdminResponse::default() };
    if error.kind != Kind::Denied {
        return vec![Down::Admin(typed.into())];
    }
    let published = "This operation is not supported over the streaming API. Use the REST admin API.";
    let error = response(&Error::new(Kind::Unimplemented, "ERR_NOT_IMPLEMENTED", published));
    vec![Down::Admin(typed.into()), Down::Error(ErrorResponse { request_id, ..error }.into())]
}

async fn run(gateway: &Gateway, caller: &Caller, query: AdminQuery) -> Result<AdminResponse, Error> {
    let sessions = &gateway.sessions;
    let (gate, presence, empty) = (sessions.gate(), sessions.presence(), AdminResponse::default);
    let system = || gate.authorize(caller, Inspect("system"));
    let connections = || gate.authorize(caller, Inspect("sessions"));
    Ok(match OpType::try_from(query.op) {
        Ok(OpType::GetHealth) => {
            system()?;
            AdminResponse { health: Some(health(gateway, caller).await), ..empty() }
        }
        Ok(OpType::GetInfo) => {
            system()?;
            let info = GatewayInfo {
                gateway_id: gate.id(),
                version: env!("CARGO_PKG_VERSION").to_owned(),
                started_at: gateway.started_at,
                uptime: duration(now_s() - gateway.started_at),
                go_version: "rust".to_owned(),
                memory_alloc_mb: resident_bytes() as f64 / 1024.0 / 1024.0,
                num_connections: presence.count() as i32,
                num_goroutines: tokio::runtime::Handle::current().metrics().num_alive_tasks() as i32,
            };
            AdminResponse { info: Some(info), ..empty() }
        }
        Ok(OpType::GetStats) => {
            system()?;
            AdminResponse { stats: Some(stats(gateway, caller).await?), ..empty() }
        }
        Ok(OpType::ListConnections) => {
            connections()?;
            let filter = query.filter.unwrap_or_default();
            let all = presence.list(&wanted(&filter)?);
            let total_count = all.len() as i32;
            AdminResponse { connections: page(all, &filter), total_count, ..empty() }
        }
        Ok(OpType::GetConnection) => {
            connections()?;
            let missing = || format!("session not found: {}", query.session_id);
            let found = presence.get(&query.session_id);
            let found = found.ok_or_else(|| Error::new(Kind::NotFound, "ERR_NOT_FOUND", missing()))?;
            AdminResponse { connection: Some(info(&found)), ..empty() }
        }
        Err(_) => return Err(Error::new(Kind::Invalid, "ERR_INVALID_ARGUMENT", "unknown admin query")),
    })
}

async fn health(gateway: &Gateway, caller: &Caller) -> HealthInfo {
    let checks = gateway.sessions.gate().check().await;
    let is_well = checks.iter().all(|(_, outcome)| outcome.is_ok());
    let check = |outcome: Result<std::time::Duration, Error>| match outcome {
        Ok(latency) => {
            let latency = format!("{:.3}ms", latency.as_secs_f64() * 1e3);
            HealthCheck { status: HealthCheckStatus::Ok.into(), latency, error: String::new() }
        }
        Err(error) => {
            HealthCheck { status: HealthCheckStatus::Error.into(), latency: String::new(), error: error.to_string() }
        }
    };
    HealthInfo {
        status: if is_well { HealthStatus::Healthy } else { HealthStatus::Degraded }.into(),
        timestamp: now_s(),
        checks: checks.into_iter().map(|(name, outcome)| (name.to_owned(), check(outcome))).collect(),
        // The checks say why there are none.
        stats: stats(gateway, caller).await.ok(),
    }
}

async fn stats(gateway: &Gateway, caller: &Caller) -> Result<GatewayStats, Error> {
    let (sessions, tasks) = (&gateway.sessions, gateway.tasks.counts(caller).await?);
    let counts = sessions.presence().counts();
    let count = |kind| counts.get(&kind).copied().unwrap_or(0) as i32;
    let sum = |fits: &dyn Fn(Status) -> bool| {
        let fitting = tasks.iter().filter(|(state, _)| fits(state.status()));
        i32::try_from(fitting.map(|(_, count)| count).sum::<i64>()).unwrap_or(i32::MAX)
    };
    Ok(GatewayStats {
        agent_connections: count(PrincipalKind::Agent),
        task_connections: count(PrincipalKind::Task),
        user_connections: count(PrincipalKind::User),
        orchestrator_connections: count(PrincipalKind::Orchestrator),
        workflow_engine_connected: count(PrincipalKind::WorkflowEngine) > 0,
        metrics_bridge_connected: count(PrincipalKind::MetricsBridge) > 0,
        total_messages: sessions.gate().records() as i64,
        messages_per_second: gateway.metrics.accepted_per_second(),
        total_tasks: sum(&|_| true),
        pending_tasks: sum(&|status| status == Status::Queued),
        running_tasks: sum(&|status| status == Status::Running),
        completed_tasks: sum(&|status| status == Status::Completed),
        failed_tasks: sum(&|status| status == Status::Failed),
        ..GatewayStats::default()
    })
}

//! What administrators do: workspaces, tokens, rules, agents, sessions, the audit.
//!
//! Needs a server: `trunkline serve --dev`, or any other at `TRUNKLINE_SERVER`. Run with
//! `cargo run -p trunkline-client --example admin`.

#![allow(clippy::print_stdout, reason = "an example")]

use trunkline_client::{
    AccessLevel, Orchestrator,
    admin::{
        AgentRegistrationInfo, AuditEvent, AuditQuery, ConnectionFilter, TokenCreateRequest, WorkspaceInfo, grant,
        principal,
    },
};

#[tokio::main]
async fn main() -> trunkline_client::Result<()> {
    let client = Orchestrator::builder("ops").profile("none").from_env().connect().await?;
    let admin = client.admin();
    let name = format!("staging-{}", std::process::id());
    let workspace =
        WorkspaceInfo { workspace_id: name.clone(), display_name: "Staging".into(), ..WorkspaceInfo::default() };
    admin.create_workspace(workspace).await?;

    let wanted = TokenCreateRequest {
        name: "ci".into(),
        principal_type: "agent".into(),
        workspace_patterns: vec![name.clone()],
        expires_in_hours: 24,
        ..TokenCreateRequest::default()
    };
    let (token, secret) = admin.create_token(wanted).await?;
    println!("token {} with a secret of {} characters, shown once", token.id, secret.len());
    admin.revoke_token(&token.id).await?;

    let rule = admin.grant(grant(&principal("user", "alice"), "workspace", &name, AccessLevel::Write)).await?;
    admin.revoke(&rule.rule_id).await?;

    let agent = AgentRegistrationInfo {
        implementation: format!("processor-{}", std::process::id()),
        orchestrator_profile: "none".into(),
        ..AgentRegistrationInfo::default()
    };
    admin.register_agent(agent.clone()).await?;
    admin.delete_agent(&agent.implementation).await?;

    let (sessions, count) = admin.sessions(ConnectionFilter::default()).await?;
    println!("{count} connected, such as {}", sessions.first().map_or("nobody", |one| &one.identity));
    admin.audit(AuditEvent::new("custom", "completed_workflow_step").with("workflow", "abc-123")).await?;
    let query = AuditQuery { operation: "completed_workflow_step".into(), limit: 1, ..AuditQuery::default() };
    println!("{} such steps in the audit", admin.query_audit(query).await?.1);
    admin.delete_workspace(&name).await?;
    client.close().await;
    Ok(())
}

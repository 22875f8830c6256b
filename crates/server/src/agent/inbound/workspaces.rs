//! Workspaces: described, looked at, forgotten.

use trunkline_core::{
    Error, Kind,
    caller::Caller,
    identity::{Identity, PrincipalKind},
    presence,
    session::Sessions,
    workspace::{self, Workspace},
};
use trunkline_proto::v1::{
    FlowEdge, FlowNode, MessageFlowInfo, WorkspaceInfo, WorkspaceOperation, WorkspaceResponse,
    workspace_operation::OpType,
};

use super::{
    super::outbound::{fitting, fitting_beside},
    sessions,
};

/// A refusal for want of rights has no typed reply: the published contract has it that way, and its suite insists.
pub(super) async fn handle(
    sessions: &Sessions,
    caller: &Caller,
    operation: WorkspaceOperation,
) -> Result<WorkspaceResponse, Error> {
    let request_id = operation.request_id.clone();
    match run(sessions, caller, operation).await {
        Ok(reply) => Ok(WorkspaceResponse { success: true, request_id, ..reply }),
        Err(error) if error.kind == Kind::Denied => Err(error),
        Err(error) => Ok(WorkspaceResponse { error: error.to_string(), request_id, ..WorkspaceResponse::default() }),
    }
}

async fn run(sessions: &Sessions, caller: &Caller, operation: WorkspaceOperation) -> Result<WorkspaceResponse, Error> {
    let (id, empty) = (operation.workspace_id.as_str(), WorkspaceResponse::default);
    let done = |message: &str| WorkspaceResponse { message: message.to_owned(), ..empty() };
    let data =
        |of: &str| Error::new(Kind::Invalid, "ERR_INVALID_ARGUMENT", format!("workspace data required for {of}"));
    Ok(match OpType::try_from(operation.op) {
        Ok(OpType::List) => {
            let filter = operation.filter.unwrap_or_default();
            let all = workspace::list(sessions, caller, &filter.tenant_id).await?;
            let total_count = all.len() as i32;
            let page = super::page(all, filter.offset, filter.limit);
            let workspaces = fitting(page.map(|each| info(sessions, each)));
            WorkspaceResponse { workspaces, total_count, ..empty() }
        }
        Ok(OpType::Get) => {
            let workspace = info(sessions, workspace::get(sessions, caller, id).await?);
            WorkspaceResponse { workspace: Some(workspace), ..empty() }
        }
        Ok(OpType::Create) => {
            let wanted = operation.workspace.map(described);
            // Who may not, is told that first.
            let created = workspace::create(sessions, caller, wanted.clone().unwrap_or_default()).await;
            let created =
                created.map_err(|e| if wanted.is_none() && e.kind != Kind::Denied { data("CREATE") } else { e })?;
            WorkspaceResponse { workspace: Some(info(sessions, created)), ..done("workspace created successfully") }
        }
        Ok(OpType::Update) => {
            let changes = operation.workspace.map(described).ok_or_else(|| data("UPDATE"))?;
            workspace::update(sessions, caller, Workspace { id: id.to_owned(), ..changes }).await?;
            done("workspace updated successfully")
        }
        Ok(OpType::Delete) => {
            workspace::delete(sessions, caller, id).await?;
            done("workspace deleted successfully")
        }
        Ok(OpType::GetMessageFlow) => {
            let workspace = workspace::get(sessions, caller, id).await?;
            let nodes = fitting(present(sessions, &workspace.id).iter().map(node));
            let flow = sessions.presence().flow(&workspace.id).into_iter().map(edge);
            let edges = fitting_beside(&nodes, flow);
            let (workspace_id, updated_at) = (workspace.id, sessions::now_s());
            let message_flow = Some(MessageFlowInfo { workspace_id, nodes, edges, updated_at });
            WorkspaceResponse { message_flow, ..empty() }
        }
        Err(_) => return Err(Error::new(Kind::Invalid, "ERR_INVALID_ARGUMENT", "unknown workspace operation")),
    })
}

fn present(sessions: &Sessions, workspace: &str) -> Vec<presence::Connection> {
    sessions.presence().list(&presence::Filter { kind: None, workspace: Some(workspace.to_owned()) })
}

fn described(wanted: WorkspaceInfo) -> Workspace {
    Workspace {
        id: wanted.workspace_id,
        display_name: wanted.display_name,
        description: wanted.description,
        tenant_id: wanted.tenant_id,
        metadata: wanted.metadata.into_iter().collect(),
        ..Workspace::default()
    }
}

fn info(sessions: &Sessions, workspace: Workspace) -> WorkspaceInfo {
    let present = present(sessions, &workspace.id);
    let count = |kind| present.iter().filter(|connection| connection.identity.kind() == kind).count() as i32;
    WorkspaceInfo {
        active_agents: count(PrincipalKind::Agent),
        active_tasks: count(PrincipalKind::Task),
        active_users: count(PrincipalKind::User),
        total_messages: i64::try_from(sessions.presence().accepted_in(&workspace.id)).unwrap_or(i64::MAX),
        workspace_id: workspace.id,
        display_name: workspace.display_name,
        description: workspace.description,
        tenant_id: workspace.tenant_id,
        created_at: workspace.created_at,
        updated_at: workspace.updated_at,
        metadata: workspace.metadata.into_iter().collect(),
    }
}

/// As long as the sender's session lasts.
fn edge((from, to, count): (Identity, String, u64)) -> FlowEdge {
    let count = i64::try_from(count).unwrap_or(i64::MAX);
    FlowEdge { from: from.to_string(), to, label: format!("{count} messages"), count }
}

fn node(connection: &presence::Connection) -> FlowNode {
    let info = sessions::info(connection);
    FlowNode {
        id: info.identity.clone(),
        label: format!("{} {}", info.implementation, info.specifier),
        r#type: info.r#type,
        status: "online".to_owned(),
        implementation: info.implementation,
        specifier: info.specifier,
        topic: info.identity,
    }
}

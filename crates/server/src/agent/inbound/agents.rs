//! The registry of programs: described, looked at, forgotten, started.

use trunkline_core::{
    Error, Kind,
    caller::Caller,
    gate::Administer,
    identity::{Identity, PrincipalKind},
    presence,
    registry::{PROFILE, Program, ResourceSchema},
};
use trunkline_proto::v1::{
    AgentLaunchResult, AgentOperation, AgentRegistrationInfo, AgentResourceSchemaEntry, AgentResponse,
    OrchestratorInfo, agent_operation::OpType,
};

use super::super::{Gateway, outbound::fitting};

/// A refusal for want of rights has no typed reply: the published contract has it that way, and its suite insists.
pub(super) async fn handle(
    gateway: &Gateway,
    caller: &Caller,
    operation: AgentOperation,
) -> Result<AgentResponse, Error> {
    let request_id = operation.request_id.clone();
    match run(gateway, caller, operation).await {
        Ok(reply) => Ok(AgentResponse { success: true, request_id, ..reply }),
        Err(error) if error.kind == Kind::Denied => Err(error),
        Err(error) => Ok(AgentResponse { error: error.to_string(), request_id, ..AgentResponse::default() }),
    }
}

async fn run(gateway: &Gateway, caller: &Caller, operation: AgentOperation) -> Result<AgentResponse, Error> {
    let (registry, name) = (gateway.tasks.registry(), operation.implementation.as_str());
    let empty = AgentResponse::default;
    let done = |message: &str| AgentResponse { message: message.to_owned(), ..empty() };
    let data = |of: &str| invalid(format!("agent data required for {of}"));
    Ok(match OpType::try_from(operation.op) {
        Ok(OpType::List) => {
            let filter = operation.filter.unwrap_or_default();
            let all = registry.list(caller, &filter.orchestrator_profile).await?;
            let total_count = all.len() as i32;
            let agents = fitting(super::page(all, filter.offset, filter.limit).map(info));
            AgentResponse { agents, total_count, ..empty() }
        }
        Ok(OpType::Get) => AgentResponse { agent: Some(info(registry.get(caller, name).await?)), ..empty() },
        Ok(OpType::Register) => {
            let wanted = operation.agent.map(program);
            // Who may not, is told that first.
            let put = registry.put(caller, wanted.clone().unwrap_or_default()).await;
            put.map_err(|e| if wanted.is_none() && e.kind != Kind::Denied { data("REGISTER") } else { e })?;
            done("agent registered successfully")
        }
        Ok(OpType::Update) => {
            let wanted = operation.agent.map(program);
            let implementation = name.to_owned();
            let put = registry.put(caller, Program { implementation, ..wanted.clone().unwrap_or_default() }).await;
            put.map_err(|e| if wanted.is_none() && e.kind != Kind::Denied { data("UPDATE") } else { e })?;
            done("agent updated successfully")
        }
        Ok(OpType::Delete) => {
            registry.delete(caller, name).await?;
            done("agent deleted successfully")
        }
        Ok(OpType::Launch) => launch(gateway, caller, operation).await?,
        Ok(OpType::ListOrchestrators) => AgentResponse { orchestrators: orchestrators(gateway, caller)?, ..empty() },
        Err(_) => return Err(invalid("unknown agent operation".to_owned())),
    })
}

async fn launch(gateway: &Gateway, caller: &Caller, operation: AgentOperation) -> Result<AgentResponse, Error> {
    // Whoever may look at a program may start it: both take administration of agents.
    let program = gateway.tasks.registry().get(caller, &operation.implementation).await?;
    let params = operation.launch_params.unwrap_or_default();
    let or = |text: &str| if text.is_empty() { "default".to_owned() } else { text.to_owned() };
    let (workspace, specifier) = (or(&params.workspace), or(&params.specifier));
    let identity = Identity::agent(&workspace, &operation.implementation, &specifier)
        .map_err(|error| invalid(format!("invalid agent identity: {error}")))?;
    let mut overrides: std::collections::BTreeMap<_, _> = params.param_overrides.into_iter().collect();
    overrides.entry("specifier".to_owned()).or_insert_with(|| specifier.clone());
    let task_id = gateway.tasks.launch(caller, &identity, overrides).await?.to_string();
    let name = program.implementation;
    let message = format!("Agent {name}.{specifier} launch triggered: Startup task sent to orchestrator");
    let launch_result = Some(AgentLaunchResult { task_id, message: message.clone() });
    Ok(AgentResponse { message, launch_result, ..AgentResponse::default() })
}

/// Those that are connected, with what each can start.
fn orchestrators(gateway: &Gateway, caller: &Caller) -> Result<Vec<OrchestratorInfo>, Error> {
    gateway.sessions.gate().authorize(caller, Administer("agents"))?;
    let filter = presence::Filter { kind: Some(PrincipalKind::Orchestrator), workspace: None };
    let all = gateway.sessions.presence().list(&filter).into_iter().map(|connection| {
        let orchestrator_id = connection.identity.to_string();
        let mut profiles = gateway.tasks.profiles(&orchestrator_id);
        profiles.sort();
        OrchestratorInfo { orchestrator_id, profiles, connected_at: (connection.connected_at_ms / 1000) as i64 }
    });
    Ok(fitting(all))
}

fn program(info: AgentRegistrationInfo) -> Program {
    let resource = |entry: AgentResourceSchemaEntry| ResourceSchema {
        prefix: entry.resource_type_prefix,
        verbs: entry.permission_verbs,
        id_schema: entry.resource_id_schema,
    };
    let mut launch_params: std::collections::BTreeMap<_, _> = info.launch_params.into_iter().collect();
    if !info.orchestrator_profile.is_empty() {
        launch_params.entry(PROFILE.to_owned()).or_insert(info.orchestrator_profile);
    }
    Program {
        implementation: info.implementation,
        description: info.description,
        launch_params,
        resources: info.resource_schema.into_iter().map(resource).collect(),
        capabilities: info.capabilities.into_iter().collect(),
        extensions: info.extensions,
        registered_at: 0,
        updated_at: 0,
    }
}

fn info(program: Program) -> AgentRegistrationInfo {
    let resource = |schema: ResourceSchema| AgentResourceSchemaEntry {
        resource_type_prefix: schema.prefix,
        permission_verbs: schema.verbs,
        resource_id_schema: schema.id_schema,
    };
    AgentRegistrationInfo {
        implementation: program.implementation,
        orchestrator_profile: program.launch_params.get(PROFILE).cloned().unwrap_or_default(),
        description: program.description,
        launch_params: program.launch_params.into_iter().collect(),
        registered_at: program.registered_at,
        updated_at: program.updated_at,
        resource_schema: program.resources.into_iter().map(resource).collect(),
        capabilities: program.capabilities.into_iter().collect(),
        extensions: program.extensions,
    }
}

fn invalid(message: String) -> Error {
    Error::new(Kind::Invalid, "ERR_INVALID_ARGUMENT", message)
}

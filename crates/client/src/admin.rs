//! What is for administrators: sessions, workspaces, agents, tokens, rules; and the audit, which everybody writes to.

use std::{collections::HashMap, ops::Deref};

use trunkline_proto::v1::{
    AclGroupMemberRequest, AclGroupRequest, AclOperation, AclResponse, AclRoleAssignmentRequest, AclRoleRequest,
    AclSetFallbackRequest, AdminQuery, AdminResponse, AgentFilter, AgentLaunchParams, AgentOperation, AgentResponse,
    AuditQueryResponse, ConnectionStatusRequest, SessionOperation, SessionOperationResponse, SubmitAuditEventRequest,
    TokenFilter, TokenOperation, TokenResponse, WorkspaceFilter, WorkspaceOperation, WorkspaceResponse, acl_operation,
    admin_query, agent_operation, downstream_message::Payload as Down, session_operation, token_operation,
    upstream_message::Payload as Up, workspace_operation,
};

pub use trunkline_proto::v1::{
    AclAccessExplanationInfo, AclAuditEntryInfo, AclAuditFilter, AclFallbackPolicyInfo, AclGrantRequest, AclGroupInfo,
    AclGroupMemberInfo, AclRoleAssignmentInfo, AclRoleInfo, AclRuleFilter, AclRuleInfo, AgentRegistrationInfo,
    AgentResourceSchemaEntry, AuditEntry, AuditQuery, ConnectionFilter, ConnectionInfo, GatewayInfo, GatewayStats,
    HealthInfo, MessageFlowInfo, OrchestratorInfo, PrincipalRef, PrincipalType, TokenCreateRequest, TokenInfo,
    WorkspaceInfo,
};

use crate::{
    connection::{Ask, Client, pending::Ordered},
    error::{Error, Result},
    reply,
};

/// How much somebody may do: [`AccessLevel::Write`] is 20.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(i32)]
#[allow(missing_docs, reason = "the names say it")]
pub enum AccessLevel {
    None = 0,
    Read = 10,
    Write = 20,
    Manage = 30,
    Admin = 40,
    Super = 50,
}

impl From<AccessLevel> for i32 {
    fn from(level: AccessLevel) -> Self {
        level as Self
    }
}

/// A rule that is to be made: that somebody may do so much with something.
///
/// ```
/// use trunkline_client::{AccessLevel, Topic, admin::{grant, principal}};
/// let rule = grant(&principal("bridge", "br::discord::main"), "workspace", "prod", AccessLevel::Write);
/// ```
#[must_use]
pub fn grant(whom: &PrincipalRef, resource_type: &str, resource_id: &str, level: AccessLevel) -> AclGrantRequest {
    AclGrantRequest {
        principal_type: whom.principal_type.clone(),
        principal_id: whom.principal_id.clone(),
        resource_type: resource_type.to_owned(),
        resource_id: resource_id.to_owned(),
        access_level: level.into(),
        ..AclGrantRequest::default()
    }
}

/// Somebody, as rules name it: an [`Identity`](crate::Identity) knows its own.
#[must_use]
pub fn principal(kind: &str, id: &str) -> PrincipalRef {
    PrincipalRef { principal_type: kind.to_owned(), principal_id: id.to_owned() }
}

/// What administrators can do, over any connected client whose rights are wide enough.
///
/// Requests that only look are made again by themselves if the connection breaks.
#[derive(Clone, Debug)]
pub struct Admin {
    client: Client,
}

impl Admin {
    /// Over a client, of which it is a clone.
    #[must_use]
    pub fn new(client: &Client) -> Self {
        Self { client: client.clone() }
    }
}

impl Deref for Admin {
    type Target = Client;

    fn deref(&self) -> &Client {
        &self.client
    }
}

impl Client {
    /// What administrators can do.
    #[must_use]
    pub fn admin(&self) -> Admin {
        Admin::new(self)
    }

    /// Whether somebody is connected. Of oneself anybody may ask.
    ///
    /// # Errors
    /// What the server refused.
    pub async fn connection_status(&self, principal: PrincipalRef) -> Result<ConnectionStatus> {
        let principal = Some(principal);
        let build =
            |request_id| Up::ConnectionStatusRequest(Box::new(ConnectionStatusRequest { request_id, principal }));
        let ask = Ask::read("tell whether somebody is connected");
        let reply = reply!(self.core.ask(ask, build).await?, Down::ConnectionStatusResponse)?;
        if !reply.ok {
            return Err(Error::from_words(&reply.error));
        }
        Ok(ConnectionStatus { is_connected: reply.connected, last_seen_s: reply.last_seen_at })
    }

    /// Writes an event of this client's own into the audit.
    ///
    /// # Errors
    /// What the server refused, with its code.
    pub async fn audit(&self, event: AuditEvent) -> Result<()> {
        let build = |client_request_id| {
            Up::SubmitAuditEvent(Box::new(SubmitAuditEventRequest { client_request_id, ..event.request }))
        };
        let ask = Ask::change("write an event into the audit");
        let reply = reply!(self.core.ask(ask, build).await?, Down::SubmitAuditEventResponse)?;
        if reply.success { Ok(()) } else { Err(Error::from_code(&reply.error_code, &reply.error_message)) }
    }

    /// One page of the audit, the latest first; and how many fit in all.
    ///
    /// # Errors
    /// What the server refused.
    pub async fn query_audit(&self, query: AuditQuery) -> Result<(Vec<AuditEntry>, u64)> {
        let build = |request_id| Up::AuditQuery(Box::new(AuditQuery { request_id, ..query }));
        let reply = reply!(self.core.ask(Ask::read("query the audit"), build).await?, Down::AuditResponse)?;
        let AuditQueryResponse { success, error, entries, total_count, .. } = *reply;
        if success { Ok((entries, u64::try_from(total_count).unwrap_or(0))) } else { Err(Error::from_words(&error)) }
    }
}

/// Whether somebody is connected.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ConnectionStatus {
    /// It is.
    pub is_connected: bool,
    /// When it was last seen, in Unix seconds; 0 if that is not known.
    pub last_seen_s: i64,
}

/// An event for the audit.
///
/// ```
/// use trunkline_client::admin::AuditEvent;
/// let event = AuditEvent::new("custom", "invoice_sent").resource("invoice", "17").with("total", "12.50");
/// ```
#[derive(Clone, Debug)]
#[must_use = "an event is written when it is given to audit"]
pub struct AuditEvent {
    request: SubmitAuditEventRequest,
}

impl AuditEvent {
    /// That something was done. The type is one of `message`, `kv`, `task`, `custom`.
    pub fn new(event_type: impl Into<String>, operation: impl Into<String>) -> Self {
        let (event_type, operation) = (event_type.into(), operation.into());
        Self { request: SubmitAuditEventRequest { event_type, operation, success: true, ..Default::default() } }
    }

    /// What it was done to.
    pub fn resource(mut self, kind: impl Into<String>, id: impl Into<String>) -> Self {
        (self.request.resource_type, self.request.resource_id) = (kind.into(), id.into());
        self
    }

    /// Where.
    pub fn workspace(mut self, workspace: impl Into<String>) -> Self {
        self.request.workspace = workspace.into();
        self
    }

    /// That it failed.
    pub fn failed(mut self, why: impl Into<String>) -> Self {
        (self.request.success, self.request.error_message) = (false, why.into());
        self
    }

    /// A label. Those whose names tell of secrets are not kept by the server.
    pub fn with(mut self, key: impl Into<String>, value: impl Into<String>) -> Self {
        self.request.metadata.insert(key.into(), value.into());
        self
    }
}

/// A page of a list, and how many there are in all.
pub type Listed<T> = Result<(Vec<T>, u64)>;

fn count(total: i32) -> u64 {
    u64::try_from(total).unwrap_or(0)
}

fn limit(limit: u32) -> i32 {
    i32::try_from(limit).unwrap_or(i32::MAX)
}

/// What was not in a reply that says success.
fn absent(what: &str) -> Error {
    Error::new(crate::Kind::NotFound, format!("the server answered without {what}"))
}

/// Who is connected.
impl Admin {
    async fn session(&self, read: bool, operation: SessionOperation) -> Result<SessionOperationResponse> {
        let ask = Ask { idempotent: read, ..Ask::change("administer sessions") };
        let build = |request_id| Up::SessionOp(Box::new(SessionOperation { request_id, ..operation }));
        let reply = reply!(self.client.core.ask(ask, build).await?, Down::SessionResponse)?;
        if reply.success { Ok(*reply) } else { Err(Error::from_words(&reply.error)) }
    }

    /// One page of those who are connected.
    ///
    /// # Errors
    /// This and all others here: what the server refused, and [`Kind::Timeout`](crate::Kind::Timeout) after 10 s.
    pub async fn sessions(&self, filter: ConnectionFilter) -> Listed<ConnectionInfo> {
        let (op, filter) = (session_operation::OpType::List.into(), Some(filter));
        let reply = self.session(true, SessionOperation { op, filter, ..SessionOperation::default() }).await?;
        Ok((reply.connections, count(reply.total_count)))
    }

    /// One session.
    ///
    /// # Errors
    /// As [`Admin::sessions`].
    pub async fn get_session(&self, session_id: &str) -> Result<ConnectionInfo> {
        let (op, session_id) = (session_operation::OpType::Get.into(), session_id.to_owned());
        let reply = self.session(true, SessionOperation { op, session_id, ..SessionOperation::default() }).await?;
        reply.connection.ok_or_else(|| absent("the session"))
    }

    /// Ends somebody's session for good.
    ///
    /// # Errors
    /// As [`Admin::sessions`].
    pub async fn disconnect(&self, session_id: &str, reason: &str) -> Result<()> {
        let (op, session_id, reason) =
            (session_operation::OpType::Disconnect.into(), session_id.to_owned(), reason.to_owned());
        let operation = SessionOperation { op, session_id, reason, ..SessionOperation::default() };
        self.session(false, operation).await.map(|_| ())
    }

    async fn query(&self, op: admin_query::OpType) -> Result<AdminResponse> {
        let build =
            |request_id| Up::AdminQuery(Box::new(AdminQuery { op: op.into(), request_id, ..AdminQuery::default() }));
        let reply = reply!(self.client.core.ask(Ask::read("query the server"), build).await?, Down::Admin)?;
        if reply.success { Ok(*reply) } else { Err(Error::from_words(&reply.error)) }
    }

    /// How the server is.
    ///
    /// # Errors
    /// As [`Admin::sessions`]; published servers do not answer.
    pub async fn health(&self) -> Result<HealthInfo> {
        self.query(admin_query::OpType::GetHealth).await?.health.ok_or_else(|| absent("its health"))
    }

    /// What the server is.
    ///
    /// # Errors
    /// As [`Admin::health`].
    pub async fn info(&self) -> Result<GatewayInfo> {
        self.query(admin_query::OpType::GetInfo).await?.info.ok_or_else(|| absent("what it is"))
    }

    /// The server in figures.
    ///
    /// # Errors
    /// As [`Admin::health`].
    pub async fn stats(&self) -> Result<GatewayStats> {
        self.query(admin_query::OpType::GetStats).await?.stats.ok_or_else(|| absent("its figures"))
    }
}

/// Workspaces.
impl Admin {
    async fn workspace(&self, read: bool, operation: WorkspaceOperation) -> Result<WorkspaceResponse> {
        let ask = Ask { idempotent: read, ..Ask::change("administer workspaces") }.ordered(Ordered::Workspace);
        let build = |request_id| Up::WorkspaceOp(Box::new(WorkspaceOperation { request_id, ..operation }));
        let reply = reply!(self.client.core.ask(ask, build).await?, Down::Workspace)?;
        if reply.success { Ok(*reply) } else { Err(Error::from_words(&reply.error)) }
    }

    fn on_workspace(op: workspace_operation::OpType, id: &str) -> WorkspaceOperation {
        WorkspaceOperation { op: op.into(), workspace_id: id.to_owned(), ..WorkspaceOperation::default() }
    }

    /// One page of the workspaces; a limit of 0 is none.
    ///
    /// # Errors
    /// As [`Admin::sessions`].
    pub async fn workspaces(&self, page: u32, offset: u32) -> Listed<WorkspaceInfo> {
        let filter = WorkspaceFilter { limit: limit(page), offset: limit(offset), ..WorkspaceFilter::default() };
        let list = Self::on_workspace(workspace_operation::OpType::List, "");
        let reply = self.workspace(true, WorkspaceOperation { filter: Some(filter), ..list }).await?;
        Ok((reply.workspaces, count(reply.total_count)))
    }

    /// One workspace.
    ///
    /// # Errors
    /// As [`Admin::sessions`].
    pub async fn get_workspace(&self, id: &str) -> Result<WorkspaceInfo> {
        let reply = self.workspace(true, Self::on_workspace(workspace_operation::OpType::Get, id)).await?;
        reply.workspace.ok_or_else(|| absent("the workspace"))
    }

    /// Makes a workspace.
    ///
    /// # Errors
    /// As [`Admin::sessions`].
    pub async fn create_workspace(&self, workspace: WorkspaceInfo) -> Result<()> {
        let create = Self::on_workspace(workspace_operation::OpType::Create, &workspace.workspace_id);
        self.workspace(false, WorkspaceOperation { workspace: Some(workspace), ..create }).await.map(|_| ())
    }

    /// Changes what is said of a workspace.
    ///
    /// # Errors
    /// As [`Admin::sessions`].
    pub async fn update_workspace(&self, workspace: WorkspaceInfo) -> Result<()> {
        let update = Self::on_workspace(workspace_operation::OpType::Update, &workspace.workspace_id);
        self.workspace(false, WorkspaceOperation { workspace: Some(workspace), ..update }).await.map(|_| ())
    }

    /// Removes a workspace.
    ///
    /// # Errors
    /// As [`Admin::sessions`].
    pub async fn delete_workspace(&self, id: &str) -> Result<()> {
        self.workspace(false, Self::on_workspace(workspace_operation::OpType::Delete, id)).await.map(|_| ())
    }

    /// Who talks with whom in a workspace.
    ///
    /// # Errors
    /// As [`Admin::sessions`].
    pub async fn message_flow(&self, id: &str) -> Result<MessageFlowInfo> {
        let reply = self.workspace(true, Self::on_workspace(workspace_operation::OpType::GetMessageFlow, id)).await?;
        reply.message_flow.ok_or_else(|| absent("the flow"))
    }
}

/// Agents that can be started.
impl Admin {
    async fn agent(&self, read: bool, operation: AgentOperation) -> Result<AgentResponse> {
        let ask = Ask { idempotent: read, ..Ask::change("administer agents") }.ordered(Ordered::Agent);
        let build = |request_id| Up::AgentOp(Box::new(AgentOperation { request_id, ..operation }));
        let reply = reply!(self.client.core.ask(ask, build).await?, Down::Agent)?;
        if reply.success { Ok(*reply) } else { Err(Error::from_words(&reply.error)) }
    }

    fn on_agent(op: agent_operation::OpType, implementation: &str) -> AgentOperation {
        let implementation = implementation.to_owned();
        AgentOperation { op: op.into(), implementation, ..AgentOperation::default() }
    }

    /// One page of the agents that are registered; those of one profile, if it is not empty.
    ///
    /// # Errors
    /// As [`Admin::sessions`].
    pub async fn agents(&self, profile: &str, page: u32, offset: u32) -> Listed<AgentRegistrationInfo> {
        let (orchestrator_profile, limit, offset) = (profile.to_owned(), limit(page), limit(offset));
        let filter = Some(AgentFilter { orchestrator_profile, limit, offset });
        let list = Self::on_agent(agent_operation::OpType::List, "");
        let reply = self.agent(true, AgentOperation { filter, ..list }).await?;
        Ok((reply.agents, count(reply.total_count)))
    }

    /// One registered agent.
    ///
    /// # Errors
    /// As [`Admin::sessions`].
    pub async fn get_agent(&self, implementation: &str) -> Result<AgentRegistrationInfo> {
        let reply = self.agent(true, Self::on_agent(agent_operation::OpType::Get, implementation)).await?;
        reply.agent.ok_or_else(|| absent("the agent"))
    }

    /// Registers an agent, so that orchestrators of its profile start it when it is needed.
    ///
    /// # Errors
    /// As [`Admin::sessions`].
    pub async fn register_agent(&self, agent: AgentRegistrationInfo) -> Result<()> {
        let register = Self::on_agent(agent_operation::OpType::Register, &agent.implementation);
        self.agent(false, AgentOperation { agent: Some(with_profile(agent)), ..register }).await.map(|_| ())
    }

    /// Changes what is said of a registered agent.
    ///
    /// # Errors
    /// As [`Admin::sessions`].
    pub async fn update_agent(&self, agent: AgentRegistrationInfo) -> Result<()> {
        let update = Self::on_agent(agent_operation::OpType::Update, &agent.implementation);
        self.agent(false, AgentOperation { agent: Some(with_profile(agent)), ..update }).await.map(|_| ())
    }

    /// Removes an agent from the registry.
    ///
    /// # Errors
    /// As [`Admin::sessions`].
    pub async fn delete_agent(&self, implementation: &str) -> Result<()> {
        self.agent(false, Self::on_agent(agent_operation::OpType::Delete, implementation)).await.map(|_| ())
    }

    /// Has an agent started. Answers the id of the task that does it.
    ///
    /// # Errors
    /// As [`Admin::sessions`].
    pub async fn launch_agent(
        &self,
        implementation: &str,
        workspace: &str,
        specifier: &str,
        params: HashMap<String, String>,
    ) -> Result<String> {
        let (workspace, specifier) = (workspace.to_owned(), specifier.to_owned());
        let launch_params = Some(AgentLaunchParams { specifier, workspace, param_overrides: params });
        let launch = Self::on_agent(agent_operation::OpType::Launch, implementation);
        let reply = self.agent(false, AgentOperation { launch_params, ..launch }).await?;
        reply.launch_result.map(|result| result.task_id).ok_or_else(|| absent("the task"))
    }

    /// The orchestrators that are connected, and the profiles that they start.
    ///
    /// # Errors
    /// As [`Admin::sessions`].
    pub async fn orchestrators(&self) -> Result<Vec<OrchestratorInfo>> {
        Ok(self.agent(true, Self::on_agent(agent_operation::OpType::ListOrchestrators, "")).await?.orchestrators)
    }
}

/// Published servers look for the profile among the parameters.
fn with_profile(mut agent: AgentRegistrationInfo) -> AgentRegistrationInfo {
    if !agent.orchestrator_profile.is_empty() {
        agent.launch_params.entry("profile".to_owned()).or_insert_with(|| agent.orchestrator_profile.clone());
    }
    agent
}

/// API keys.
impl Admin {
    async fn token(&self, read: bool, operation: TokenOperation) -> Result<TokenResponse> {
        let ask = Ask { idempotent: read, ..Ask::change("administer tokens") }.ordered(Ordered::Token);
        let build = |request_id| Up::TokenOp(Box::new(TokenOperation { request_id, ..operation }));
        let reply = reply!(self.client.core.ask(ask, build).await?, Down::Token)?;
        if reply.success { Ok(*reply) } else { Err(Error::from_words(&reply.error)) }
    }

    fn on_token(op: token_operation::OpType, id: &str) -> TokenOperation {
        TokenOperation { op: op.into(), token_id: id.to_owned(), ..TokenOperation::default() }
    }

    /// One page of the tokens.
    ///
    /// # Errors
    /// As [`Admin::sessions`].
    pub async fn tokens(&self, include_revoked: bool, page: u32, offset: u32) -> Listed<TokenInfo> {
        let filter = Some(TokenFilter { limit: limit(page), offset: limit(offset), include_revoked });
        let list = Self::on_token(token_operation::OpType::List, "");
        let reply = self.token(true, TokenOperation { filter, ..list }).await?;
        Ok((reply.tokens, count(reply.total_count)))
    }

    /// One token, without its secret.
    ///
    /// # Errors
    /// As [`Admin::sessions`].
    pub async fn get_token(&self, id: &str) -> Result<TokenInfo> {
        let reply = self.token(true, Self::on_token(token_operation::OpType::Get, id)).await?;
        reply.token.ok_or_else(|| absent("the token"))
    }

    /// Makes a token. The second value is its secret, which is not shown again.
    ///
    /// # Errors
    /// As [`Admin::sessions`].
    pub async fn create_token(&self, token: TokenCreateRequest) -> Result<(TokenInfo, String)> {
        let create = Self::on_token(token_operation::OpType::Create, "");
        let reply = self.token(false, TokenOperation { create_request: Some(token), ..create }).await?;
        let info = reply.created_token.or(reply.token).ok_or_else(|| absent("the token"))?;
        Ok((info, reply.plaintext_token))
    }

    /// Makes a token void.
    ///
    /// # Errors
    /// As [`Admin::sessions`].
    pub async fn revoke_token(&self, id: &str) -> Result<()> {
        self.token(false, Self::on_token(token_operation::OpType::Revoke, id)).await.map(|_| ())
    }

    /// Makes a token void, and forgets it.
    ///
    /// # Errors
    /// As [`Admin::sessions`].
    pub async fn delete_token(&self, id: &str) -> Result<()> {
        self.token(false, Self::on_token(token_operation::OpType::Delete, id)).await.map(|_| ())
    }
}

/// Who may do what.
impl Admin {
    /// Any operation on rules, as the contract has it.
    ///
    /// # Errors
    /// As [`Admin::sessions`].
    pub async fn rules_op(&self, operation: AclOperation) -> Result<AclResponse> {
        use acl_operation::OpType as Op;
        let reads = [
            Op::ListRules,
            Op::GetRule,
            Op::QueryAudit,
            Op::GetFallbackPolicy,
            Op::GetGroup,
            Op::ListGroups,
            Op::ListGroupMembers,
            Op::GetRole,
            Op::ListRoles,
            Op::ListRoleAssignments,
            Op::ListPrincipalGroups,
            Op::ListPrincipalRoles,
            Op::ExplainAccess,
        ];
        let idempotent = reads.contains(&operation.op());
        let ask = Ask { idempotent, ..Ask::change("administer rules") }.ordered(Ordered::Rules);
        let build = |request_id| Up::AclOp(Box::new(AclOperation { request_id, ..operation }));
        let reply = reply!(self.client.core.ask(ask, build).await?, Down::Acl)?;
        if reply.success { Ok(*reply) } else { Err(Error::from_words(&reply.error)) }
    }

    fn rule(op: acl_operation::OpType) -> AclOperation {
        AclOperation { op: op.into(), ..AclOperation::default() }
    }

    /// One page of the rules that fit.
    ///
    /// # Errors
    /// As [`Admin::sessions`].
    pub async fn rules(&self, filter: AclRuleFilter) -> Listed<AclRuleInfo> {
        let list = Self::rule(acl_operation::OpType::ListRules);
        let reply = self.rules_op(AclOperation { rule_filter: Some(filter), ..list }).await?;
        Ok((reply.rules, count(reply.total_rules)))
    }

    /// One rule, by its id.
    ///
    /// # Errors
    /// As [`Admin::sessions`].
    pub async fn get_rule(&self, rule_id: &str) -> Result<AclRuleInfo> {
        let get = Self::rule(acl_operation::OpType::GetRule);
        let reply = self.rules_op(AclOperation { rule_id: rule_id.to_owned(), ..get }).await?;
        reply.rule.ok_or_else(|| absent("the rule"))
    }

    /// Makes a rule, or changes the one of the same two.
    ///
    /// # Errors
    /// As [`Admin::sessions`].
    pub async fn grant(&self, rule: AclGrantRequest) -> Result<AclRuleInfo> {
        let grant = Self::rule(acl_operation::OpType::Grant);
        let reply = self.rules_op(AclOperation { grant_request: Some(rule), ..grant }).await?;
        // Published servers do not show it.
        Ok(reply.rule.unwrap_or_default())
    }

    /// Removes a rule, by its id.
    ///
    /// # Errors
    /// As [`Admin::sessions`].
    pub async fn revoke(&self, rule_id: &str) -> Result<()> {
        let revoke = Self::rule(acl_operation::OpType::Revoke);
        self.rules_op(AclOperation { rule_id: rule_id.to_owned(), ..revoke }).await.map(|_| ())
    }

    /// Removes the rule of a principal for a resource.
    ///
    /// # Errors
    /// As [`Admin::sessions`].
    pub async fn revoke_of(&self, filter: AclRuleFilter) -> Result<()> {
        let revoke = Self::rule(acl_operation::OpType::Revoke);
        self.rules_op(AclOperation { rule_filter: Some(filter), ..revoke }).await.map(|_| ())
    }

    /// What holds where no rule does, for a category such as `agent_workspace`.
    ///
    /// # Errors
    /// As [`Admin::sessions`].
    pub async fn fallback(&self, category: &str) -> Result<AclFallbackPolicyInfo> {
        let get = Self::rule(acl_operation::OpType::GetFallbackPolicy);
        let reply = self.rules_op(AclOperation { rule_category: category.to_owned(), ..get }).await?;
        reply.fallback_policy.ok_or_else(|| absent("the policy"))
    }

    /// Says what holds where no rule does.
    ///
    /// # Errors
    /// As [`Admin::sessions`].
    pub async fn set_fallback(&self, category: &str, level: AccessLevel, by: &str) -> Result<()> {
        let (rule_category, fallback_access_level) = (category.to_owned(), level as i32);
        let request = AclSetFallbackRequest { rule_category, fallback_access_level, updated_by: by.to_owned() };
        let set = Self::rule(acl_operation::OpType::SetFallbackPolicy);
        self.rules_op(AclOperation { fallback_request: Some(request), ..set }).await.map(|_| ())
    }

    /// Removes rules whose time is over. Answers how many.
    ///
    /// # Errors
    /// As [`Admin::sessions`].
    pub async fn clean_up_rules(&self) -> Result<u64> {
        let reply = self.rules_op(Self::rule(acl_operation::OpType::CleanupExpired)).await?;
        Ok(reply.cleanup_result.map_or(0, |result| u64::try_from(result.deleted_count).unwrap_or(0)))
    }

    /// Removes decisions on access that are older. Answers how many.
    ///
    /// # Errors
    /// As [`Admin::sessions`].
    pub async fn clean_up_decisions(&self, retention_days: u32) -> Result<u64> {
        let clean_up = Self::rule(acl_operation::OpType::CleanupAuditLogs);
        let reply = self.rules_op(AclOperation { retention_days: limit(retention_days), ..clean_up }).await?;
        Ok(reply.cleanup_result.map_or(0, |result| u64::try_from(result.deleted_count).unwrap_or(0)))
    }

    /// One page of the decisions on access.
    ///
    /// # Errors
    /// As [`Admin::sessions`].
    pub async fn decisions(&self, filter: AclAuditFilter) -> Listed<AclAuditEntryInfo> {
        let query = Self::rule(acl_operation::OpType::QueryAudit);
        let reply = self.rules_op(AclOperation { audit_filter: Some(filter), ..query }).await?;
        Ok((reply.audit_entries, count(reply.total_audit_entries)))
    }

    /// Why somebody may or may not.
    ///
    /// # Errors
    /// As [`Admin::sessions`].
    pub async fn explain(
        &self,
        principal: PrincipalRef,
        resource_type: &str,
        resource_id: &str,
        level: AccessLevel,
    ) -> Result<AclAccessExplanationInfo> {
        let explain = AclOperation {
            principal: Some(principal),
            resource_type: resource_type.to_owned(),
            resource_id: resource_id.to_owned(),
            required_level: level as i32,
            ..Self::rule(acl_operation::OpType::ExplainAccess)
        };
        self.rules_op(explain).await?.explanation.ok_or_else(|| absent("an explanation"))
    }
}

/// Groups and roles.
impl Admin {
    fn named(op: acl_operation::OpType, name: &str) -> AclOperation {
        AclOperation { name: name.to_owned(), ..Self::rule(op) }
    }

    /// All groups.
    ///
    /// # Errors
    /// As [`Admin::sessions`].
    pub async fn groups(&self) -> Result<Vec<AclGroupInfo>> {
        Ok(self.rules_op(Self::rule(acl_operation::OpType::ListGroups)).await?.groups)
    }

    /// One group.
    ///
    /// # Errors
    /// As [`Admin::sessions`].
    pub async fn get_group(&self, name: &str) -> Result<AclGroupInfo> {
        let reply = self.rules_op(Self::named(acl_operation::OpType::GetGroup, name)).await?;
        reply.group.ok_or_else(|| absent("the group"))
    }

    /// Makes a group.
    ///
    /// # Errors
    /// As [`Admin::sessions`].
    pub async fn create_group(&self, name: &str, description: &str) -> Result<()> {
        let (name, description) = (name.to_owned(), description.to_owned());
        let create = Self::named(acl_operation::OpType::CreateGroup, &name);
        let group_request = Some(AclGroupRequest { name, description, ..AclGroupRequest::default() });
        self.rules_op(AclOperation { group_request, ..create }).await.map(|_| ())
    }

    /// Removes a group.
    ///
    /// # Errors
    /// As [`Admin::sessions`].
    pub async fn delete_group(&self, name: &str) -> Result<()> {
        self.rules_op(Self::named(acl_operation::OpType::DeleteGroup, name)).await.map(|_| ())
    }

    /// To add takes the one field, to remove the other.
    fn member(op: acl_operation::OpType, group: &str, member: &PrincipalRef) -> AclOperation {
        let (member_type, member_id) = (member.principal_type.clone(), member.principal_id.clone());
        let member_request = Some(AclGroupMemberRequest { member_type, member_id, ..Default::default() });
        AclOperation { member_request, principal: Some(member.clone()), ..Self::named(op, group) }
    }

    /// Puts somebody into a group.
    ///
    /// # Errors
    /// As [`Admin::sessions`].
    pub async fn add_group_member(&self, group: &str, member: &PrincipalRef) -> Result<()> {
        self.rules_op(Self::member(acl_operation::OpType::AddGroupMember, group, member)).await.map(|_| ())
    }

    /// Takes somebody out of a group.
    ///
    /// # Errors
    /// As [`Admin::sessions`].
    pub async fn remove_group_member(&self, group: &str, member: &PrincipalRef) -> Result<()> {
        self.rules_op(Self::member(acl_operation::OpType::RemoveGroupMember, group, member)).await.map(|_| ())
    }

    /// Who is in a group.
    ///
    /// # Errors
    /// As [`Admin::sessions`].
    pub async fn group_members(&self, group: &str) -> Result<Vec<AclGroupMemberInfo>> {
        Ok(self.rules_op(Self::named(acl_operation::OpType::ListGroupMembers, group)).await?.group_members)
    }

    /// All roles.
    ///
    /// # Errors
    /// As [`Admin::sessions`].
    pub async fn roles(&self) -> Result<Vec<AclRoleInfo>> {
        Ok(self.rules_op(Self::rule(acl_operation::OpType::ListRoles)).await?.roles)
    }

    /// One role.
    ///
    /// # Errors
    /// As [`Admin::sessions`].
    pub async fn get_role(&self, name: &str) -> Result<AclRoleInfo> {
        let reply = self.rules_op(Self::named(acl_operation::OpType::GetRole, name)).await?;
        reply.role.ok_or_else(|| absent("the role"))
    }

    /// Makes a role.
    ///
    /// # Errors
    /// As [`Admin::sessions`].
    pub async fn create_role(&self, name: &str, description: &str) -> Result<()> {
        let (name, description) = (name.to_owned(), description.to_owned());
        let create = Self::named(acl_operation::OpType::CreateRole, &name);
        let role_request = Some(AclRoleRequest { name, description, ..AclRoleRequest::default() });
        self.rules_op(AclOperation { role_request, ..create }).await.map(|_| ())
    }

    /// Removes a role.
    ///
    /// # Errors
    /// As [`Admin::sessions`].
    pub async fn delete_role(&self, name: &str) -> Result<()> {
        self.rules_op(Self::named(acl_operation::OpType::DeleteRole, name)).await.map(|_| ())
    }

    fn assignment(op: acl_operation::OpType, role: &str, assignee: &PrincipalRef) -> AclOperation {
        let (assignee_type, assignee_id) = (assignee.principal_type.clone(), assignee.principal_id.clone());
        let assignment_request = Some(AclRoleAssignmentRequest { assignee_type, assignee_id, ..Default::default() });
        AclOperation { assignment_request, principal: Some(assignee.clone()), ..Self::named(op, role) }
    }

    /// Gives somebody a role.
    ///
    /// # Errors
    /// As [`Admin::sessions`].
    pub async fn assign_role(&self, role: &str, assignee: &PrincipalRef) -> Result<()> {
        self.rules_op(Self::assignment(acl_operation::OpType::AssignRole, role, assignee)).await.map(|_| ())
    }

    /// Takes a role from somebody.
    ///
    /// # Errors
    /// As [`Admin::sessions`].
    pub async fn unassign_role(&self, role: &str, assignee: &PrincipalRef) -> Result<()> {
        self.rules_op(Self::assignment(acl_operation::OpType::UnassignRole, role, assignee)).await.map(|_| ())
    }

    /// Who has a role.
    ///
    /// # Errors
    /// As [`Admin::sessions`].
    pub async fn role_assignments(&self, role: &str) -> Result<Vec<AclRoleAssignmentInfo>> {
        Ok(self.rules_op(Self::named(acl_operation::OpType::ListRoleAssignments, role)).await?.role_assignments)
    }

    /// The groups that somebody is in, itself and not by way of another group.
    ///
    /// # Errors
    /// As [`Admin::sessions`].
    pub async fn groups_of(&self, principal: PrincipalRef) -> Result<Vec<AclGroupMemberInfo>> {
        let list = Self::rule(acl_operation::OpType::ListPrincipalGroups);
        Ok(self.rules_op(AclOperation { principal: Some(principal), ..list }).await?.group_members)
    }

    /// The roles that somebody has.
    ///
    /// # Errors
    /// As [`Admin::sessions`].
    pub async fn roles_of(&self, principal: PrincipalRef) -> Result<Vec<AclRoleAssignmentInfo>> {
        let list = Self::rule(acl_operation::OpType::ListPrincipalRoles);
        Ok(self.rules_op(AclOperation { principal: Some(principal), ..list }).await?.role_assignments)
    }
}

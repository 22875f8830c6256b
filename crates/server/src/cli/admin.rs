//! `agent`, `workspace`, `session`, `acl`, `audit`: what administrators look at and change.

use serde_json::json;
use trunkline_client::admin::{
    AclRuleFilter, AclRuleInfo, AgentRegistrationInfo, AuditQuery, ConnectionFilter, PrincipalType, WorkspaceInfo,
    principal,
};
use trunkline_client::{AccessLevel, Client, admin::grant};

use super::{
    Done, Fault, block_on,
    client::Connect,
    output::{Output, Row, pages, time},
};

/// Which server, and how it is printed.
#[derive(clap::Args)]
pub(crate) struct Ask {
    #[command(flatten)]
    pub(super) connect: Connect,
    #[command(flatten)]
    pub(super) output: Output,
}

impl Ask {
    async fn open(&self) -> Result<Client, Fault> {
        self.connect.administrator().await
    }
}

#[derive(clap::Subcommand)]
pub(crate) enum Agent {
    /// Lists the agents that orchestrators can start.
    List {
        /// Only those of a profile.
        #[arg(long, value_name = "NAME", default_value = "")]
        profile: String,
        #[command(flatten)]
        ask: Ask,
    },
    /// Registers an agent, or changes it.
    Register {
        /// What it is called.
        implementation: String,
        /// Which orchestrators can start it.
        #[arg(long, value_name = "NAME", default_value = "local")]
        profile: String,
        /// What it is for.
        #[arg(long, value_name = "TEXT", default_value = "")]
        description: String,
        /// Something for whoever starts it; may be repeated.
        #[arg(long = "param", value_name = "KEY=VALUE", value_parser = pair)]
        params: Vec<(String, String)>,
        #[command(flatten)]
        ask: Ask,
    },
    /// Removes an agent from the registry.
    Remove {
        /// What it is called.
        implementation: String,
        #[command(flatten)]
        ask: Ask,
    },
    /// Has an agent started.
    Launch {
        /// What it is called.
        implementation: String,
        /// Where.
        #[arg(long, value_name = "NAME", default_value = "default")]
        workspace: String,
        /// Which one.
        #[arg(long, value_name = "NAME", default_value = "default")]
        specifier: String,
        #[command(flatten)]
        ask: Ask,
    },
    /// Lists the orchestrators that are connected.
    Orchestrators(Ask),
}

fn pair(text: &str) -> Result<(String, String), String> {
    let split = text.split_once('=').map(|(key, value)| (key.to_owned(), value.to_owned()));
    split.ok_or_else(|| format!("{text:?} is not KEY=VALUE"))
}

pub(crate) fn agent(command: Agent) -> Done {
    block_on(async {
        match command {
            Agent::List { profile, ask } => {
                let client = ask.open().await?;
                let rows = || async {
                    let page = async |offset: i32| client.admin().agents(&profile, 0, offset.unsigned_abs()).await;
                    Ok(pages(usize::MAX, page).await?.iter().map(registered).collect())
                };
                ask.output.show(rows).await?;
                client.close().await;
            }
            Agent::Register { implementation, profile, description, params, ask } => {
                let client = ask.open().await?;
                let agent = AgentRegistrationInfo {
                    implementation: implementation.clone(),
                    orchestrator_profile: profile,
                    description,
                    launch_params: params.into_iter().collect(),
                    ..AgentRegistrationInfo::default()
                };
                client.admin().register_agent(agent).await?;
                let row = vec![("implementation", json!(implementation))];
                ask.output.done(format_args!("registered {implementation}"), row);
                client.close().await;
            }
            Agent::Remove { implementation, ask } => {
                let client = ask.open().await?;
                client.admin().delete_agent(&implementation).await?;
                let row = vec![("implementation", json!(implementation))];
                ask.output.done(format_args!("removed {implementation}"), row);
                client.close().await;
            }
            Agent::Launch { implementation, workspace, specifier, ask } => {
                let client = ask.open().await?;
                let launched =
                    client.admin().launch_agent(&implementation, &workspace, &specifier, Default::default()).await;
                let task = launched?;
                ask.output.done(format_args!("asked for by task {task}"), vec![("task_id", json!(task))]);
                client.close().await;
            }
            Agent::Orchestrators(ask) => {
                let client = ask.open().await?;
                let rows = || async {
                    let all = client.admin().orchestrators().await?.into_iter().map(|one| -> Row {
                        let since = time(one.connected_at);
                        vec![
                            ("identity", json!(one.orchestrator_id)),
                            ("profiles", json!(one.profiles)),
                            ("since", since),
                        ]
                    });
                    Ok(all.collect())
                };
                ask.output.show(rows).await?;
                client.close().await;
            }
        }
        Ok(())
    })
}

fn registered(agent: &AgentRegistrationInfo) -> Row {
    vec![
        ("implementation", json!(agent.implementation)),
        ("profile", json!(agent.orchestrator_profile)),
        ("registered", time(agent.registered_at)),
        ("description", json!(agent.description)),
    ]
}

#[derive(clap::Subcommand)]
pub(crate) enum Workspace {
    /// Lists the workspaces.
    List(Ask),
    /// Makes a workspace.
    Create {
        /// What it is called.
        name: String,
        /// What people read.
        #[arg(long, value_name = "TEXT", default_value = "")]
        display_name: String,
        /// What it is for.
        #[arg(long, value_name = "TEXT", default_value = "")]
        description: String,
        #[command(flatten)]
        ask: Ask,
    },
    /// Removes a workspace.
    Remove {
        /// What it is called.
        name: String,
        #[command(flatten)]
        ask: Ask,
    },
}

pub(crate) fn workspace(command: Workspace) -> Done {
    block_on(async {
        match command {
            Workspace::List(ask) => {
                let client = ask.open().await?;
                let rows = || async {
                    let page = async |offset: i32| client.admin().workspaces(0, offset.unsigned_abs()).await;
                    Ok(pages(usize::MAX, page).await?.iter().map(space).collect())
                };
                ask.output.show(rows).await?;
                client.close().await;
            }
            Workspace::Create { name, display_name, description, ask } => {
                let client = ask.open().await?;
                let workspace_id = name.clone();
                let workspace = WorkspaceInfo { workspace_id, display_name, description, ..WorkspaceInfo::default() };
                client.admin().create_workspace(workspace).await?;
                ask.output.done(format_args!("made {name}"), vec![("workspace", json!(name))]);
                client.close().await;
            }
            Workspace::Remove { name, ask } => {
                let client = ask.open().await?;
                client.admin().delete_workspace(&name).await?;
                ask.output.done(format_args!("removed {name}"), vec![("workspace", json!(name))]);
                client.close().await;
            }
        }
        Ok(())
    })
}

fn space(workspace: &WorkspaceInfo) -> Row {
    vec![
        ("workspace", json!(workspace.workspace_id)),
        ("agents", json!(workspace.active_agents)),
        ("tasks", json!(workspace.active_tasks)),
        ("users", json!(workspace.active_users)),
        ("made", time(workspace.created_at)),
        ("display_name", json!(workspace.display_name)),
    ]
}

#[derive(clap::Subcommand)]
pub(crate) enum Session {
    /// Lists who is connected.
    List {
        /// Only those on a workspace.
        #[arg(long, value_name = "NAME", default_value = "")]
        workspace: String,
        /// Only those of a kind: agent, task, user, orchestrator, workflow_engine, metrics_bridge, bridge, service.
        #[arg(long, value_name = "KIND")]
        kind: Option<String>,
        #[command(flatten)]
        ask: Ask,
    },
    /// Ends a session for good.
    Disconnect {
        /// Its id, as listed.
        id: String,
        /// Why, for whoever it is.
        #[arg(long, value_name = "TEXT", default_value = "disconnected by an operator")]
        reason: String,
        #[command(flatten)]
        ask: Ask,
    },
}

pub(crate) fn session(command: Session) -> Done {
    block_on(async {
        match command {
            Session::List { workspace, kind, ask } => {
                let kind = match kind {
                    Some(kind) => PrincipalType::from_str_name(&format!("PRINCIPAL_{}", kind.to_uppercase()))
                        .ok_or_else(|| Fault::usage(format!("there is no kind {kind:?}")))?,
                    None => PrincipalType::Unspecified,
                };
                let client = ask.open().await?;
                let rows = || async {
                    let filter =
                        ConnectionFilter { workspace: workspace.clone(), r#type: kind.into(), ..Default::default() };
                    // The total is the page's, as the published contract has it.
                    let page = async |offset| {
                        let filter = ConnectionFilter { offset, ..filter.clone() };
                        client.admin().sessions(filter).await.map(|(page, _)| (page, u64::MAX))
                    };
                    let all = pages(usize::MAX, page).await?;
                    let row = |one: trunkline_client::admin::ConnectionInfo| -> Row {
                        vec![
                            ("session", json!(one.session_id)),
                            ("identity", json!(one.identity)),
                            ("workspace", json!(one.workspace)),
                            ("since", time(one.connected_at)),
                            ("address", json!(one.remote_addr)),
                        ]
                    };
                    Ok(all.into_iter().map(row).collect())
                };
                ask.output.show(rows).await?;
                client.close().await;
            }
            Session::Disconnect { id, reason, ask } => {
                let client = ask.open().await?;
                client.admin().disconnect(&id, &reason).await?;
                ask.output.done(format_args!("ended {id}"), vec![("session", json!(id))]);
                client.close().await;
            }
        }
        Ok(())
    })
}

#[derive(clap::Subcommand)]
pub(crate) enum Acl {
    /// Lists the rules.
    List(Ask),
    /// Makes a rule, or changes the one of the same two.
    Grant {
        /// Whom: KIND:ID, such as `user:alice` or `agent:ag::prod::support::main`.
        whom: String,
        /// What: KIND:ID, such as `workspace:prod` or `kv_scope:global`.
        what: String,
        /// How much: none, read, write, manage, admin, super.
        level: String,
        #[command(flatten)]
        ask: Ask,
    },
    /// Removes a rule.
    Revoke {
        /// Its id, as listed.
        id: String,
        #[command(flatten)]
        ask: Ask,
    },
    /// Shows, or says anew, what a kind of principals may do where no rule decides.
    Fallback {
        /// Which: KIND_RESOURCE, such as `bridge_workspace` or `agent_kv_scope`.
        category: String,
        /// How much from now on: none, read, write, manage, admin, super.
        level: Option<String>,
        #[command(flatten)]
        ask: Ask,
    },
}

pub(crate) fn acl(command: Acl) -> Done {
    block_on(async {
        match command {
            Acl::List(ask) => {
                let client = ask.open().await?;
                let rows = || async {
                    let page =
                        async |offset| client.admin().rules(AclRuleFilter { offset, ..Default::default() }).await;
                    Ok(pages(usize::MAX, page).await?.iter().map(rule).collect())
                };
                ask.output.show(rows).await?;
                client.close().await;
            }
            Acl::Grant { whom, what, level, ask } => {
                let (kind, id) = named(&whom)?;
                let (resource, resource_id) = named(&what)?;
                let level = level_of(&level)?;
                let client = ask.open().await?;
                let made = client.admin().grant(grant(&principal(kind, id), resource, resource_id, level)).await?;
                ask.output.done(format_args!("rule {}", made.rule_id), rule(&made));
                client.close().await;
            }
            Acl::Revoke { id, ask } => {
                let client = ask.open().await?;
                client.admin().revoke(&id).await?;
                ask.output.done(format_args!("removed {id}"), vec![("rule", json!(id))]);
                client.close().await;
            }
            Acl::Fallback { category, level, ask } => {
                let level = level.as_deref().map(level_of).transpose()?;
                let client = ask.open().await?;
                if let Some(level) = level {
                    client.admin().set_fallback(&category, level, "").await?;
                }
                let found = client.admin().fallback(&category).await?;
                let row = vec![
                    ("category", json!(found.rule_category)),
                    ("level", json!(found.fallback_access_level_name)),
                    ("by", json!(found.updated_by)),
                ];
                ask.output.print(&[row]);
                client.close().await;
            }
        }
        Ok(())
    })
}

fn named(text: &str) -> Result<(&str, &str), Fault> {
    text.split_once(':').ok_or_else(|| Fault::usage(format!("{text:?} is not KIND:ID")))
}

fn level_of(name: &str) -> Result<AccessLevel, Fault> {
    Ok(match name {
        "none" => AccessLevel::None,
        "read" => AccessLevel::Read,
        "write" => AccessLevel::Write,
        "manage" => AccessLevel::Manage,
        "admin" => AccessLevel::Admin,
        "super" => AccessLevel::Super,
        other => return Err(Fault::usage(format!("there is no level {other:?}"))),
    })
}

fn rule(rule: &AclRuleInfo) -> Row {
    vec![
        ("rule", json!(rule.rule_id)),
        ("whom", json!(format!("{}:{}", rule.principal_type, rule.principal_id))),
        ("what", json!(format!("{}:{}", rule.resource_type, rule.resource_id))),
        ("level", json!(rule.access_level_name)),
        ("until", time(rule.expires_at)),
        ("by", json!(rule.granted_by)),
    ]
}

/// Entries of one page; the server's own limit.
const AUDIT_PAGE: i32 = 500;

#[derive(clap::Args)]
pub(crate) struct Audit {
    /// Only by this one.
    #[arg(long, value_name = "ID", default_value = "")]
    actor: String,
    /// Only this operation.
    #[arg(long, value_name = "NAME", default_value = "")]
    operation: String,
    /// Only in this workspace.
    #[arg(long, value_name = "NAME", default_value = "")]
    workspace: String,
    /// Only what failed.
    #[arg(long)]
    failures: bool,
    /// So many, the latest first.
    #[arg(long, value_name = "COUNT", default_value_t = 50, value_parser = clap::value_parser!(i32).range(1..))]
    limit: i32,
    #[command(flatten)]
    ask: Ask,
}

pub(crate) fn audit(args: &Audit) -> Done {
    block_on(async {
        let client = args.ask.open().await?;
        let rows = || async {
            let query = AuditQuery {
                actor_id: args.actor.clone(),
                operation: args.operation.clone(),
                workspace: args.workspace.clone(),
                only_failures: args.failures,
                ..AuditQuery::default()
            };
            let most = usize::try_from(args.limit).unwrap_or(0);
            let page = async |offset: i32| {
                let limit = args.limit.saturating_sub(offset).min(AUDIT_PAGE);
                // Totals are counted up to a bound.
                let found = client.query_audit(AuditQuery { limit, offset, ..query.clone() }).await;
                found.map(|(entries, _)| (entries, u64::MAX))
            };
            let entries = pages(most, page).await?;
            let row = |entry: trunkline_client::admin::AuditEntry| -> Row {
                vec![
                    ("time", time(entry.timestamp)),
                    ("actor", json!(entry.actor_id)),
                    ("operation", json!(entry.operation)),
                    ("resource", json!(format!("{}:{}", entry.resource_type, entry.resource_id))),
                    ("workspace", json!(entry.workspace)),
                    ("success", json!(entry.success)),
                    ("error", json!(entry.error_message)),
                ]
            };
            Ok(entries.into_iter().map(row).collect())
        };
        args.ask.output.show(rows).await?;
        client.close().await;
        Ok(())
    })
}

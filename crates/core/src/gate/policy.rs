//! Who may do what. Deny by default.
//!
//! Sending, by kind of sender and target (the published matrix):
//!
//! | sender | may send to |
//! | --- | --- |
//! | agent, task | all but `uu` |
//! | user | all but `uu`, `event` and `metric` |
//! | service, bridge, workflow engine | all |
//! | orchestrator | `ag` `tu` `ta` `tb` |
//! | metrics bridge | nothing |
//!
//! and then by workspace: read and write on the target's, or on the sender's own if the target has none. Who has no
//! workspace may reach what has none. Events and metrics for another workspace take a capability instead.
//!
//! The key-value store: exclusive scopes are open to their owner, except for listing (a rule of the published contract);
//! the others by a rule on the key (`kv_key`), or else on the scope (`kv_scope`).

use super::{
    AdminPermit, Administer, Attend, AttendPermit, ChangeRules, ConversationPermit, CreditMetrics, Enter, EnterPermit,
    Inspect, Intent, IssueToken, Keep, KeepPermit, ListTasks, MintUserKeys, QueryConnection, ReadTrail,
    ReadTrailPermit, Report, ReportOn, RulesPermit, SandboxNeed, SandboxPermit, SayOf, Send, SendPermit, SocketNeed,
    SocketPermit, SubmitTrail, SubmitTrailPermit, TakePart, TouchTask, UseConversation, UseKeys, UseSandbox, UseSocket,
    rules::{Decision, Level, Name, Rules, is_pattern},
};
use crate::{
    caller::{Access, Caller},
    error::{Error, Kind},
    identity::{Identity, PrincipalKind, SEPARATOR, identifier},
    kv::{Action, Scope, namespace, workspace_of},
    limits::TARGET_BYTES_MAX,
    rule::now,
    topic::{Target, dotted, progress_for, progress_in, task_events},
};

/// Keys by which instances of the workflow engine agree on who leads.
const COORDINATION_KEYS: &str = "_sys/coord/";

impl Intent for Send<'_> {
    type Permit = SendPermit;

    fn decide(self, caller: &Caller, rules: &Rules) -> Result<SendPermit, Error> {
        let topic = self.0.topic()?;
        if may_send(&caller.identity, self.0) && may_reach(caller, self.0, rules) {
            return Ok(SendPermit { topic });
        }
        Err(denied(format!("not authorized to send to topic {topic}")))
    }
}

fn may_send(sender: &Identity, target: &Target) -> bool {
    let to_all_windows = matches!(target, Target::User { .. });
    match sender.kind() {
        PrincipalKind::Agent | PrincipalKind::Task => !to_all_windows,
        PrincipalKind::User => !to_all_windows && !matches!(target, Target::Events { .. } | Target::Metrics { .. }),
        PrincipalKind::Service | PrincipalKind::Bridge | PrincipalKind::WorkflowEngine => true,
        PrincipalKind::Orchestrator => {
            matches!(target, Target::Agent(_) | Target::UniqueTask(_) | Target::Task(_) | Target::AnyTask { .. })
        }
        PrincipalKind::MetricsBridge | PrincipalKind::Sandbox => false,
    }
}

fn may_reach(caller: &Caller, target: &Target, rules: &Rules) -> bool {
    let own = caller.identity.workspace();
    let capability = match target {
        Target::Events { .. } => Some("capability/event_broadcast"),
        Target::Metrics { .. } => Some("capability/metric_broadcast"),
        _ => None,
    };
    if let Some(capability) = capability {
        return match target.workspace() {
            Some(named) if own != Some(named) => has(caller, rules, "capability", capability, Level::READ_WRITE),
            // An agent's metrics are always welcome.
            _ if matches!((target, &caller.identity), (Target::Metrics { .. }, Identity::Agent(_))) => true,
            _ => own.is_none_or(|own| has(caller, rules, "workspace", own, Level::READ_WRITE)),
        };
    }
    target.workspace().or(own).is_none_or(|workspace| has(caller, rules, "workspace", workspace, Level::READ_WRITE))
}

impl Intent for Report<'_> {
    type Permit = SendPermit;

    /// Reaches whom a message would reach: all of the reporter's workspace, or a window of the user.
    fn decide(self, caller: &Caller, rules: &Rules) -> Result<SendPermit, Error> {
        if !matches!(caller.identity.kind(), PrincipalKind::Agent | PrincipalKind::Task | PrincipalKind::Service) {
            let who = "only agents, tasks, and services can report progress";
            return Err(Error::new(Kind::Denied, "ERR_INVALID_PRINCIPAL", who));
        }
        let invalid = |why: String| Error::new(Kind::Invalid, "ERR_INVALID_ARGUMENT", why);
        let topic = match self.recipient.split(SEPARATOR).collect::<Vec<_>>()[..] {
            ["us", user] => progress_for(&identifier("recipient", user)?)?,
            ["us", user, window] => {
                identifier("recipient", window)?;
                progress_for(&identifier("recipient", user)?)?
            }
            _ => {
                // Not to all of the workspace instead of to the one that was meant.
                if let Some(error) = dotted(self.recipient) {
                    return Err(error);
                }
                let why = "progress from outside of a workspace needs a user as its recipient";
                progress_in(self.home.ok_or_else(|| invalid(why.to_owned()))?)?
            }
        };
        if self.recipient.len() > TARGET_BYTES_MAX {
            return Err(invalid(format!("recipient of {} bytes", self.recipient.len())));
        }
        // Neither a user's window nor a broadcast at home has a workspace of its own to ask for.
        let reaches = |own| has(caller, rules, "workspace", own, Level::READ_WRITE);
        if !caller.identity.workspace().is_none_or(reaches) {
            return Err(denied(format!("not authorized to report progress to topic {topic}")));
        }
        Ok(SendPermit { topic })
    }
}

impl Intent for UseSandbox<'_> {
    type Permit = SandboxPermit;

    /// A sandbox may be itself and see itself; others by their key, per project. Whoever may not even watch it does not
    /// learn that it is there.
    fn decide(self, caller: &Caller, _rules: &Rules) -> Result<SandboxPermit, Error> {
        let by = caller.identity.to_string();
        let permit = SandboxPermit { id: self.id.to_owned(), need: self.need, by };
        let credential = &caller.credential;
        if credential.is_admin {
            return Ok(permit);
        }
        let opens = caller.opens(self.project);
        let is_its_project = credential.acts_in.as_ref().is_none_or(|own| **own == *self.project);
        let is_itself = matches!(&caller.identity, Identity::Sandbox(own) if own == self.id) && is_its_project;
        let may = |need: SandboxNeed| match need {
            SandboxNeed::Read => is_itself || credential.sandboxes >= Access::Read,
            SandboxNeed::Write => credential.sandboxes >= Access::Write,
            SandboxNeed::Act => is_itself,
        };
        match (opens && may(self.need), opens && may(SandboxNeed::Read)) {
            (true, _) => Ok(permit),
            (false, true) => Err(denied("the credential does not allow this".to_owned())),
            (false, false) => Err(crate::sandbox::missing()),
        }
    }
}

impl UseSocket<'_> {
    /// Whether a caller's credential names the client.
    pub(crate) fn fits(&self, caller: &Caller) -> bool {
        let credential = &caller.credential;
        let patterns = match self.need {
            SocketNeed::Show => &credential.shows,
            SocketNeed::Serve => &credential.serves,
            SocketNeed::Note => return credential.is_admin,
        };
        credential.is_admin || crate::token::opens(patterns, self.client)
    }
}

impl Intent for UseSocket<'_> {
    type Permit = SocketPermit;

    /// By the credential alone: it names the clients.
    fn decide(self, caller: &Caller, _rules: &Rules) -> Result<SocketPermit, Error> {
        let permit = SocketPermit { client: self.client.to_owned(), need: self.need };
        if self.fits(caller) { Ok(permit) } else { Err(super::socket::refused()) }
    }
}

impl Intent for UseConversation<'_> {
    type Permit = ConversationPermit;

    /// By the token alone. What is somebody else's is not there.
    fn decide(self, _caller: &Caller, _rules: &Rules) -> Result<ConversationPermit, Error> {
        let Self { visitor, row } = self;
        if row.app == visitor.app().name && row.agent == visitor.agent().id && row.user == *visitor.user {
            return Ok(ConversationPermit { id: row.id });
        }
        Err(crate::conversation::missing())
    }
}

impl Intent for TakePart<'_> {
    type Permit = ConversationPermit;

    /// The agent whose conversation it is, and whoever may write in that one's workspace: programs that live there, operators,
    /// and whom a rule lets in. A fallback lets nobody from elsewhere speak to end users.
    fn decide(self, caller: &Caller, rules: &Rules) -> Result<ConversationPermit, Error> {
        let is_its_agent = caller.identity.to_string() == self.agent;
        let may_write = || {
            let decision = look_up(caller, rules, "workspace", self.workspace);
            let is_here = caller.identity.workspace() == Some(self.workspace);
            let may = is_here || decision.by_rule || caller.identity.kind() == PrincipalKind::User;
            caller.opens(self.workspace) && may && decision.level >= Level::READ_WRITE
        };
        if is_its_agent || may_write() {
            return Ok(ConversationPermit { id: self.row.id });
        }
        let (user, id) = (&self.row.user, self.row.id);
        Err(denied(format!("not authorized to send to topic us::{user}::{id}")))
    }
}

impl Intent for CreditMetrics {
    type Permit = ();

    fn decide(self, caller: &Caller, rules: &Rules) -> Result<(), Error> {
        if has(caller, rules, "capability", "capability/metric_credit", Level::ADMIN) {
            return Ok(());
        }
        let message = "negative metric deltas require additional authorization";
        Err(Error::new(Kind::Denied, "ERR_METRIC_NEGATIVE_FORBIDDEN", message))
    }
}

impl Intent for Attend {
    type Permit = AttendPermit;

    /// Whoever was admitted under an identity may hold it, if it may read the workspace that it lives in.
    fn decide(self, caller: &Caller, rules: &Rules) -> Result<AttendPermit, Error> {
        if let Some(workspace) = caller.identity.workspace() {
            if !caller.opens(workspace) {
                return Err(denied(format!("API key not authorized for workspace {workspace}")));
            }
            let decision = look_up(caller, rules, "workspace", workspace);
            if decision.level < Level::READ {
                let reason = decision.reason(&caller.subject.kind, "workspace");
                return Err(denied(format!("access denied: {reason}")));
            }
        }
        Ok(AttendPermit { identity: caller.identity.clone() })
    }
}

impl Intent for Enter<'_> {
    type Permit = EnterPermit;

    fn decide(self, caller: &Caller, rules: &Rules) -> Result<EnterPermit, Error> {
        if caller.opens(self.0) && has(caller, rules, "workspace", self.0, Level::READ) {
            return Ok(EnterPermit(()));
        }
        Err(denied(format!("not authorized to access workspace {}", self.0)))
    }
}

impl Intent for Keep {
    type Permit = KeepPermit;

    fn decide(self, caller: &Caller, _rules: &Rules) -> Result<KeepPermit, Error> {
        Ok(KeepPermit { owner: caller.identity.to_string() })
    }
}

impl Intent for UseKeys<'_> {
    type Permit = KeepPermit;

    fn decide(self, caller: &Caller, rules: &Rules) -> Result<KeepPermit, Error> {
        use PrincipalKind::{Agent, MetricsBridge, Service, Task, WorkflowEngine};
        let kind = caller.identity.kind();
        if !matches!(kind, Agent | Task | Service | WorkflowEngine | MetricsBridge) {
            let who = "only agents, tasks, services, the metrics bridge, and the workflow engine can access KV store";
            return Err(denied(who.to_owned()));
        }
        let request = self.request;
        let owner = namespace(request, &caller.identity, self.home)?;
        let needed = if request.action.is_read() { Level::READ } else { Level::READ_WRITE };
        let scope = request.scope;
        let allowed = match &request.action {
            Action::Purge { .. } => {
                scope.is_exclusive() && has(caller, rules, "capability", "capability/kv_purge_identity", Level::MANAGE)
            }
            Action::List { .. } => may_use_scope(caller, rules, scope, needed),
            _ if scope.is_exclusive() => true,
            _ if kind == WorkflowEngine && request.key.starts_with(COORDINATION_KEYS) => true,
            _ => {
                let on_key = look_up(caller, rules, "kv_key", &request.key);
                if on_key.by_rule { on_key.level >= needed } else { may_use_scope(caller, rules, scope, needed) }
            }
        };
        if allowed && may_use_workspace(caller, rules, workspace_of(request, self.home), scope, needed) {
            return Ok(KeepPermit { owner });
        }
        Err(denied(format!("not authorized to use keys of scope {}", scope.name())))
    }
}

fn may_use_scope(caller: &Caller, rules: &Rules, scope: Scope, needed: Level) -> bool {
    has(caller, rules, "kv_scope", scope.name(), needed)
}

/// A rule on the scope does not open a workspace that is closed to the caller. One without a workspace of its own has no
/// fallback either, so only a rule counts against it.
fn may_use_workspace(caller: &Caller, rules: &Rules, workspace: &str, scope: Scope, needed: Level) -> bool {
    let own = caller.identity.workspace();
    if !scope.has_workspace() || scope.is_exclusive() || own == Some(workspace) {
        return true;
    }
    let decision = look_up(caller, rules, "workspace", workspace);
    decision.level >= needed || (own.is_none() && !decision.by_rule)
}

pub(super) fn may_see_key(caller: &Caller, key: &str, rules: &Rules) -> bool {
    let on_key = look_up(caller, rules, "kv_key", key);
    !on_key.by_rule || on_key.level >= Level::READ
}

impl Intent for ChangeRules<'_> {
    type Permit = RulesPermit;

    fn decide(self, caller: &Caller, rules: &Rules) -> Result<RulesPermit, Error> {
        if is_admin(caller, rules, "acl", self.as_admin) {
            return Ok(RulesPermit(()));
        }
        let Some(resource) = self.resource else { return Err(denied(self.refusal.to_owned())) };
        if resource.kind != "workspace" || resource.id.is_empty() {
            return Err(denied("ACL operations on non-workspace resources require an admin_acl grant".to_owned()));
        }
        let needed = self.on_workspace;
        let has_it = match is_pattern(&resource.id) {
            true => rules.decide_pattern(&caller.subject, resource, now()) >= needed,
            false => has(caller, rules, "workspace", &resource.id, needed),
        };
        if has_it {
            return Ok(RulesPermit(()));
        }
        let workspace = &resource.id;
        let message = format!("insufficient access on workspace {workspace:?} for this ACL operation (need {needed})");
        Err(denied(message))
    }
}

impl Intent for QueryConnection<'_> {
    type Permit = ();

    fn decide(self, caller: &Caller, rules: &Rules) -> Result<(), Error> {
        let is_own = caller.identity.kind() == self.kind
            && (caller.subject.id == self.id || caller.identity.to_string() == self.id);
        if is_own
            || caller.credential.is_admin
            || has(caller, rules, "capability", "capability/query_connections", Level::READ)
        {
            return Ok(());
        }
        Err(denied("not authorized".to_owned()))
    }
}

impl Intent for Administer {
    type Permit = AdminPermit;

    fn decide(self, caller: &Caller, rules: &Rules) -> Result<AdminPermit, Error> {
        if is_admin(caller, rules, self.0, Level::ADMIN) {
            return Ok(AdminPermit(()));
        }
        let what = self.0;
        let message = format!("admin {what} operations require system-level privileges or an explicit ACL grant");
        Err(denied(message))
    }
}

impl Intent for Inspect {
    type Permit = ();

    fn decide(self, caller: &Caller, rules: &Rules) -> Result<(), Error> {
        if is_admin(caller, rules, self.0, Level::READ) {
            return Ok(());
        }
        Err(denied(format!("looking at {} takes READ on admin/{}", self.0, self.0)))
    }
}

impl Intent for SubmitTrail<'_> {
    type Permit = SubmitTrailPermit;

    fn decide(self, caller: &Caller, rules: &Rules) -> Result<SubmitTrailPermit, Error> {
        let is_own = self.workspace.is_empty() || self.home == Some(self.workspace);
        if is_own || has(caller, rules, "capability", "capability/audit_submit", Level::READ) {
            return Ok(SubmitTrailPermit(()));
        }
        let message =
            "cross-workspace audit submission requires capability/audit_submit on the target workspace".to_owned();
        Err(denied(message))
    }
}

impl Intent for ReadTrail<'_> {
    type Permit = ReadTrailPermit;

    fn decide(self, caller: &Caller, rules: &Rules) -> Result<ReadTrailPermit, Error> {
        let named = !self.workspace.is_empty();
        if is_admin(caller, rules, "audit", Level::READ)
            || named && has(caller, rules, "workspace", self.workspace, Level::READ)
        {
            return Ok(ReadTrailPermit(()));
        }
        Err(denied("insufficient permissions for audit query".to_owned()))
    }
}

impl Intent for MintUserKeys {
    type Permit = ();

    fn decide(self, caller: &Caller, rules: &Rules) -> Result<(), Error> {
        let capability = "capability/mint_user_tokens";
        if has(caller, rules, "capability", capability, Level::MANAGE) || is_admin(caller, rules, "*", Level::ADMIN) {
            return Ok(());
        }
        Err(denied(format!("minting user tokens requires {capability} or global admin (admin/*)")))
    }
}

impl Intent for TouchTask<'_> {
    type Permit = ();

    /// Its parties, wherever they are; the user that it is for; and whoever manages its workspace.
    fn decide(self, caller: &Caller, rules: &Rules) -> Result<(), Error> {
        let (task, name) = (self.0, caller.identity.to_string());
        let is_party = [&task.creator, &task.assignee, &task.launcher].into_iter().any(|party| *party == name);
        let same_workspace = caller.identity.workspace().is_none_or(|own| own == task.workspace);
        let is_subject = caller.identity.kind() == PrincipalKind::User && caller.subject.id == task.subject;
        let manages = || {
            caller.opens(&task.workspace)
                && (has(caller, rules, "workspace", &task.workspace, Level::MANAGE)
                    || is_admin(caller, rules, "tasks", Level::ADMIN))
        };
        if is_party || same_workspace && (is_subject || manages()) {
            return Ok(());
        }
        Err(denied("task not found".to_owned()))
    }
}

impl Intent for SayOf<'_> {
    type Permit = SendPermit;

    /// Its parties, the user that it is for, and whoever may send in its workspace.
    fn decide(self, caller: &Caller, rules: &Rules) -> Result<SendPermit, Error> {
        let task = self.0;
        let target = Target::TaskMessages { workspace: task.workspace.clone(), task: task.id };
        if TouchTask(task).decide(caller, rules).is_ok() {
            return Ok(SendPermit { topic: target.topic()? });
        }
        Send(&target).decide(caller, rules)
    }
}

impl Intent for ReportOn<'_> {
    type Permit = SendPermit;

    /// Only its parties, and only while there is progress to be made.
    fn decide(self, caller: &Caller, _rules: &Rules) -> Result<SendPermit, Error> {
        let (task, name) = (self.0, caller.identity.to_string());
        if !task.state.is_terminal() && [&task.creator, &task.assignee].into_iter().any(|party| *party == name) {
            return Ok(SendPermit { topic: task_events(&task.workspace, task.id)? });
        }
        Err(denied("task not found".to_owned()))
    }
}

impl Intent for ListTasks<'_> {
    type Permit = ();

    fn decide(self, caller: &Caller, rules: &Rules) -> Result<(), Error> {
        if caller.credential.is_admin || caller.opens(self.0) && has(caller, rules, "workspace", self.0, Level::READ) {
            return Ok(());
        }
        Err(denied(format!("not authorized to list tasks of workspace {}", self.0)))
    }
}

impl Intent for IssueToken<'_> {
    type Permit = ();

    fn decide(self, caller: &Caller, rules: &Rules) -> Result<(), Error> {
        let target = self.0;
        let allowed = match (target, target.workspace()) {
            (Identity::Service(service), _) => {
                has(caller, rules, "service_impl", &service.implementation, Level::MANAGE)
            }
            (_, Some(workspace)) if workspace != "_system" => {
                caller.opens(workspace) && has(caller, rules, "workspace", workspace, Level::MANAGE)
            }
            _ => false,
        };
        if allowed { Ok(()) } else { Err(denied(format!("not authorized to issue a token for {target}"))) }
    }
}

fn is_admin(caller: &Caller, rules: &Rules, part: &str, needed: Level) -> bool {
    let has = |id: &str| has(caller, rules, "admin", id, needed);
    caller.credential.is_admin || has("admin/*") || has(&format!("admin/{part}"))
}

pub(super) fn has(caller: &Caller, rules: &Rules, kind: &str, id: &str, needed: Level) -> bool {
    look_up(caller, rules, kind, id).level >= needed
}

fn look_up(caller: &Caller, rules: &Rules, kind: &str, id: &str) -> Decision {
    rules.decide(&caller.subject, &Name::new(kind, id), now())
}

pub(super) fn denied(message: String) -> Error {
    Error::new(Kind::Denied, "ERR_PERMISSION_DENIED", message)
}

#[cfg(test)]
mod tests {
    use uuid::Uuid;

    use super::{Caller, Identity, Intent as _, Level, Report, Rules, Send, Target, TouchTask};
    use crate::{
        caller::Credential,
        gate::rules::{Fallback, category},
        task::{Mode, Task},
    };

    #[test]
    fn the_matrix_holds() {
        let targets = [
            "ag::w::i::s",
            "tu::w::i::s",
            "ta::w::i::s",
            "tb::w::i",
            "ga::w",
            "gu::w",
            "us::u::w",
            "uw::u::w",
            "uu::u",
            "sv::i::s",
            "br::i::s",
            "event::*",
            "event::other",
            "metric::*",
            "metric::other",
        ];
        let grid = [
            (Identity::agent("w", "i", "s"), "yyyyyyyy.yyy.y."),
            (Identity::unique_task("w", "i", "s"), "yyyyyyyy.yyy.y."),
            (Identity::task("w", "i"), "yyyyyyyy.yyy.y."),
            (Identity::user("u", "w"), "yyyyyyyy.yy...."),
            (Identity::service("i", "s"), "......y.yyyy.y."),
            (Identity::bridge("i", "s"), "......y.yyyy.y."),
            (Ok(Identity::WorkflowEngine), "......y.yyyy.y."),
            (Identity::orchestrator("i", "s"), "..............."),
            (Ok(Identity::MetricsBridge), "..............."),
        ];
        let mut rules = Rules::default();
        for kind in ["user", "agent", "task"] {
            let fallback = Fallback { level: Level::READ_WRITE, updated_by: String::new(), updated_at: 0 };
            rules.set_fallback(category(kind, "workspace"), fallback);
        }
        for (identity, expected) in grid {
            let caller = Caller::new(identity.unwrap(), "s".into(), Credential::none(false));
            let may = |target: &str| Send(&Target::parse(target).unwrap()).decide(&caller, &rules).is_ok();
            let row: String = targets.iter().map(|target| if may(target) { 'y' } else { '.' }).collect();
            assert_eq!(row, expected, "{}", caller.identity);
        }
    }

    #[test]
    fn an_apps_user_is_not_the_user_of_that_name() {
        let window = Identity::user("ann", "w").unwrap();
        let ann = Caller::new(window, "s".into(), Credential::none(false));
        let apps = Caller::app_user("shop", "ann", Uuid::now_v7()).unwrap();
        let others = Caller::app_user("club", "ann", Uuid::now_v7()).unwrap();
        let task_of = |of: &Caller| Task { subject: of.subject.id.clone(), ..Task::blank(0, Mode::Startup) };
        let may_touch = |who: &Caller, of: &Caller| TouchTask(&task_of(of)).decide(who, &Rules::default()).is_ok();
        assert!(
            may_touch(&ann, &ann) && !may_touch(&ann, &apps) && !may_touch(&apps, &ann) && !may_touch(&apps, &others)
        );
        let mut rules = Rules::default();
        let fallback = Fallback { level: Level::READ_WRITE, updated_by: String::new(), updated_at: 0 };
        rules.set_fallback(category("user", "workspace"), fallback);
        let target = Target::parse("ag::w::i::s").unwrap();
        assert!(Send(&target).decide(&ann, &rules).is_ok() && Send(&target).decide(&apps, &rules).is_err());
    }

    #[test]
    fn progress_reaches_whom_a_message_reaches() {
        let rules = |level| {
            let mut rules = Rules::default();
            let fallback = Fallback { level, updated_by: String::new(), updated_at: 0 };
            rules.set_fallback(category("agent", "workspace"), fallback);
            rules
        };
        let may = |identity: Result<Identity, _>, recipient: &str, level| {
            let caller = Caller::new(identity.unwrap(), "s".into(), Credential::none(false));
            let home = caller.identity.workspace();
            Report { recipient, home }.decide(&caller, &rules(level)).is_ok()
        };
        for recipient in ["", "us::u", "us::u::w", "ag::w::i::other"] {
            for (level, expected) in [(Level::NONE, false), (Level::READ, false), (Level::READ_WRITE, true)] {
                assert_eq!(
                    may(Identity::agent("w", "i", "s"), recipient, level),
                    expected,
                    "{recipient:?} with {level}"
                );
            }
        }
        assert!(may(Identity::service("i", "s"), "us::u", Level::NONE), "it lives in no workspace");
    }
}

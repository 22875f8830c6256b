//! Who may make which tasks.

use std::collections::BTreeMap;

use super::{
    Administer, Intent, Send,
    policy::{denied, has},
    rules::{Level, Rules},
};
use crate::{caller::Caller, error::Error, identity::Identity, topic::Target};

/// Launch parameters that say which program runs, and where: who sets one of these runs a program of its own choice with the
/// identity and the token of the agent that is started.
const PROGRAM_PARAMS: [&str; 7] = ["profile", "image", "command", "cmd", "entrypoint", "args", "executable"];

/// To make a task in a workspace.
pub struct CreateTask<'a> {
    /// Where the task belongs.
    pub(crate) workspace: &'a str,
    /// Whom it is for, if it is for one principal.
    pub(crate) target: Option<&'a Identity>,
    /// It asks for the start of its target and for nothing else, as an administrator's launch does.
    pub(crate) is_launch: bool,
    /// What its target is started with instead of what is registered, if it has to be started.
    pub(crate) overrides: &'a BTreeMap<String, String>,
    /// The workspace that the caller's session is on.
    pub(crate) home: Option<&'a str>,
    /// It tells the workflow engine of its end.
    pub(crate) has_completion_event: bool,
}

impl Intent for CreateTask<'_> {
    type Permit = ();

    /// Read and write on the task's workspace. A task for one principal takes what a message to that principal takes, and a
    /// completion event what the event itself would. What is started, and with what, is an administrator's to say; only in
    /// its own workspace a caller may override parameters that do not choose the program.
    ///
    /// The workflow engine makes and sends work everywhere; that is what it is for.
    fn decide(self, caller: &Caller, rules: &Rules) -> Result<(), Error> {
        let is_everywhere = caller.identity == Identity::WorkflowEngine || caller.credential.is_admin;
        let opens = |workspace: &str| {
            is_everywhere || caller.opens(workspace) && has(caller, rules, "workspace", workspace, Level::READ_WRITE)
        };
        if !opens(self.workspace) {
            return Err(denied(format!("not authorized to create tasks in workspace {}", self.workspace)));
        }
        if let Some(target) = self.target {
            let may_reach = || {
                let topic = Target::parse(&target.to_string())?;
                Send(&topic).decide(caller, rules).map(drop)
            };
            if !target.workspace().is_none_or(opens) || !is_everywhere && may_reach().is_err() {
                return Err(denied(format!("not authorized to create tasks for {target}")));
            }
            if self.is_launch || self.overrides_take_administration(target) {
                Administer("agents").decide(caller, rules)?;
            }
        }
        if self.has_completion_event {
            Send(&Target::Events { workspace: None }).decide(caller, rules).map_err(|_| {
                denied("not authorized to send events, so not to ask for a completion event".to_owned())
            })?;
        }
        Ok(())
    }
}

impl CreateTask<'_> {
    fn overrides_take_administration(&self, target: &Identity) -> bool {
        let chooses_program = |name: &String| PROGRAM_PARAMS.contains(&name.to_ascii_lowercase().as_str());
        let is_elsewhere = target.workspace().is_none() || target.workspace() != self.home;
        !self.overrides.is_empty() && (is_elsewhere || self.overrides.keys().any(chooses_program))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        caller::Credential,
        gate::rules::{Fallback, Name, Rule, category},
    };

    /// An agent of team a, by the fallback that lets it everywhere, and the rules of the test.
    struct World {
        rules: Rules,
        caller: Caller,
    }

    impl World {
        fn new(identity: Identity) -> Self {
            let mut rules = Rules::default();
            for kind in ["user", "agent", "orchestrator"] {
                let fallback = Fallback { level: Level::READ_WRITE, updated_by: String::new(), updated_at: 0 };
                rules.set_fallback(category(kind, "workspace"), fallback);
            }
            Self { rules, caller: Caller::new(identity, "s".into(), Credential::none(false)) }
        }

        fn agent() -> Self {
            Self::new(Identity::agent("a", "boss", "1").unwrap())
        }

        fn rule(mut self, kind: &str, id: &str, level: Level) -> Self {
            let principal = self.caller.subject.clone();
            self.rules.put(Rule {
                id: String::new(),
                principal,
                resource: Name::new(kind, id),
                level,
                granted_by: String::new(),
                granted_at: 0,
                expires_at: None,
                reason: String::new(),
            });
            self
        }

        fn may(&self, target: &str, overrides: &[&str], is_launch: bool) -> bool {
            let overrides = overrides.iter().map(|name| ((*name).to_owned(), "x".to_owned())).collect();
            let target = Identity::parse(target).unwrap();
            let create = CreateTask {
                workspace: "a",
                target: Some(&target),
                is_launch,
                overrides: &overrides,
                home: Some("a"),
                has_completion_event: false,
            };
            create.decide(&self.caller, &self.rules).is_ok()
        }

        fn may_have_completion_event(&self) -> bool {
            let create = CreateTask {
                workspace: "a",
                target: None,
                is_launch: false,
                overrides: &BTreeMap::new(),
                home: Some("a"),
                has_completion_event: true,
            };
            create.decide(&self.caller, &self.rules).is_ok()
        }
    }

    #[test]
    fn a_task_reaches_whom_a_message_reaches() {
        let world = World::agent();
        assert!(world.may("ag::a::bot::x", &[], false) && world.may("ag::b::bot::x", &[], false));
        let world = world.rule("workspace", "b", Level::NONE);
        assert!(world.may("ag::a::bot::x", &[], false));
        assert!(!world.may("ag::b::bot::x", &[], false) && !world.may("tu::b::bot::x", &[], false));
        let mut world = World::agent();
        world.caller.credential.workspaces = glob::Pattern::new("a").into_iter().collect();
        assert!(world.may("ag::a::bot::x", &[], false), "the key opens it");
        assert!(!world.may("ag::b::bot::x", &[], false), "the key does not");
    }

    #[test]
    fn what_is_started_with_which_program_takes_administration() {
        let world = World::agent();
        assert!(world.may("ag::a::bot::x", &["cpu"], false));
        for name in ["image", "profile", "Command"] {
            assert!(!world.may("ag::a::bot::x", &["cpu", name], false), "{name}");
        }
        assert!(!world.may("ag::b::bot::x", &["cpu"], false), "another workspace's");
        assert!(!world.may("ag::a::bot::x", &[], true), "a launch");
        let world = world.rule("admin", "admin/agents", Level::ADMIN);
        assert!(world.may("ag::a::bot::x", &["image"], false) && world.may("ag::b::bot::x", &["image"], false));
        assert!(world.may("ag::b::bot::x", &[], true));
        let engine = World::new(Identity::WorkflowEngine);
        assert!(engine.may("ag::b::bot::x", &[], false), "it starts work everywhere");
        assert!(!engine.may("ag::b::bot::x", &["image"], false) && !engine.may("ag::b::bot::x", &[], true));
    }

    #[test]
    fn a_completion_event_takes_what_an_event_takes() {
        assert!(World::agent().may_have_completion_event());
        assert!(!World::new(Identity::user("ann", "w").unwrap()).may_have_completion_event());
        assert!(!World::new(Identity::orchestrator("o", "1").unwrap()).may_have_completion_event());
    }
}

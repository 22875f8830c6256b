//! Agents, and unique tasks, that are started because somebody wants them. One start an identity at a time, unique in the
//! ledger; what stands for it is a task that waits for an orchestrator and then is the agent's own.

use std::{collections::BTreeMap, sync::Arc};

use trunkline_store::ledger::WriteTx;
use uuid::Uuid;

use super::{Mode, Spec, Task, Tasks, Times, decide, events, sql, start_queue};
use crate::{
    caller::Caller,
    error::{Error, Kind},
    gate::Administer,
    identity::{Identity, PrincipalKind},
    registry::{self, PROFILE},
};

/// The kind of the tasks that start agents.
pub const STARTUP: &str = "agent_startup";

/// Metadata that says when a start was asked for.
pub(super) const TRIGGER: &str = "trigger_timestamp_ms";

/// Somebody who is to be started.
#[derive(Clone, Debug)]
pub(super) struct Start {
    identity: Identity,
    workspace: String,
    creator: String,
    subject: String,
    pub(super) overrides: BTreeMap<String, String>,
    pub(super) metadata: BTreeMap<String, String>,
    pub(super) priority: i64,
    grace_ms: i64,
    now: i64,
}

/// What came of it.
pub(super) enum Begun {
    New(Box<Task>),
    /// It is being started already.
    Known(Uuid),
    /// Nobody knows how.
    Unknown,
}

impl Tasks {
    /// Has an agent or a unique task started that somebody writes to, if it is away, its program is known, and nobody starts
    /// it already. Returns at once.
    pub fn wake_up(&self, name: &str, implementation: &str, by: &Caller) {
        if !self.0.registry.knows(implementation) {
            return;
        }
        {
            let mut floor = self.floor();
            if floor.workers.is_there(name) || !floor.starting.insert(name.to_owned()) {
                return;
            }
        }
        let start = Identity::parse(name).map(|identity| self.start(&identity, String::new(), by));
        let (tasks, name) = (self.clone(), name.to_owned());
        self.spawn_job(async move {
            let begun = match start {
                Ok(start) => tasks.begin(start).await,
                Err(error) => Err(error),
            };
            if let Err(error) = &begun {
                tracing::warn!(%error, agent = name, "not started; the next message asks again");
            }
            if !matches!(begun, Ok(Some(_))) {
                tasks.floor().starting.remove(&name);
            }
        });
    }

    /// Starts an agent on an administrator's request; answers the task that stands for it.
    ///
    /// # Errors
    /// [`Kind::Denied`], [`Kind::NotFound`] if its implementation is not registered, [`Kind::Precondition`] if it is there
    /// already.
    pub async fn launch(
        &self,
        caller: &Caller,
        identity: &Identity,
        overrides: BTreeMap<String, String>,
    ) -> Result<Uuid, Error> {
        self.0.gate.authorize(caller, Administer("agents"))?;
        if self.floor().workers.is_there(&identity.to_string()) {
            let message = format!("{identity} is connected already");
            return Err(Error::new(Kind::Precondition, "ERR_FAILED_PRECONDITION", message));
        }
        let start = self.start(identity, caller.identity.to_string(), caller);
        let begun = self.begin(Start { overrides, ..start }).await?;
        let unknown = || {
            let message = format!("agent not found: {}", identity.implementation().unwrap_or_default());
            Error::new(Kind::NotFound, "ERR_NOT_FOUND", message)
        };
        begun.ok_or_else(unknown)
    }

    /// A start as it is where nothing else was said.
    pub(super) fn start(&self, identity: &Identity, creator: String, by: &Caller) -> Start {
        Start {
            identity: identity.clone(),
            workspace: identity.workspace().unwrap_or_default().to_owned(),
            creator,
            subject: subject(by),
            overrides: BTreeMap::new(),
            metadata: BTreeMap::new(),
            priority: super::NORMAL,
            grace_ms: self.0.options.grace_ms(0),
            now: self.now(),
        }
    }

    /// Answers the task that stands for the start, if the implementation is known.
    async fn begin(&self, start: Start) -> Result<Option<Uuid>, Error> {
        let tasks = self.clone();
        let begun = self.spawn(async move {
            let times = tasks.0.times;
            let begun = tasks.write(move |tx| {
                let start = start.clone();
                Box::pin(async move { begin(tx, &start, &times).await })
            });
            match begun.await? {
                Begun::New(task) => {
                    tasks.offer(&task).await;
                    Ok(Some(task.id))
                }
                Begun::Known(id) => Ok(Some(id)),
                Begun::Unknown => Ok(None),
            }
        });
        begun.await.unwrap_or_else(|ended| Err(Error::of_task(&ended)))
    }
}

/// Puts the task of a start, if there is none and the implementation is registered with a profile.
pub(super) async fn begin(tx: &mut WriteTx, start: &Start, times: &Times) -> Result<Begun, Error> {
    let identity = start.identity.to_string();
    if let Some(known) = sql::start_of(tx.as_read(), &identity).await? {
        return Ok(Begun::Known(known.id));
    }
    let implementation = start.identity.implementation().unwrap_or_default();
    let Some(mut params) = registry::params(tx.as_read(), implementation).await? else { return Ok(Begun::Unknown) };
    params.extend(start.overrides.iter().map(|(key, value)| (key.clone(), value.clone())));
    let Some(profile) = params.get(PROFILE).filter(|profile| !profile.is_empty()) else { return Ok(Begun::Unknown) };
    let queue = start_queue(profile);
    let mut metadata = start.metadata.clone();
    metadata.entry(TRIGGER.to_owned()).or_insert_with(|| start.now.to_string());
    let task = Task {
        workspace: start.workspace.clone(),
        kind: STARTUP.to_owned(),
        priority: start.priority,
        creator: start.creator.clone(),
        target: identity.clone(),
        implementation: implementation.to_owned(),
        subject: start.subject.clone(),
        queue,
        grace_ms: start.grace_ms,
        spec: Arc::new(Spec { metadata, launch_params: params, ..Spec::default() }),
        ..Task::blank(start.now, Mode::Startup)
    };
    let spec = sql::json(&*task.spec)?;
    if !sql::insert(tx, &task, &spec, &[], Some(&identity), decide::due(&task, times)).await? {
        // Only a race on a shared ledger comes here; the other one's start is as good.
        return Ok(sql::start_of(tx.as_read(), &identity).await?.map_or(Begun::Unknown, |task| Begun::Known(task.id)));
    }
    events::tell(tx, None, &task).await?;
    Ok(Begun::New(Box::new(task)))
}

/// The user that somebody's task is for: itself, if it is one.
pub(super) fn subject(caller: &Caller) -> String {
    match caller.identity.kind() {
        PrincipalKind::User => caller.subject.id.clone(),
        _ => String::new(),
    }
}

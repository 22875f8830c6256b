//! What others hear of a task: its own lane of events, a notice to its creator, an event for the workflow engine. All of it
//! leaves through the outbox of the transaction that changed the task.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use trunkline_store::{
    ledger::{Outgoing, WriteTx},
    log::Record,
};
use uuid::Uuid;

use super::{Mode, Task, Tasks, state::State};
use crate::{
    error::{Error, Kind},
    identity::Identity,
    message::{self, Notice},
    topic::{self, own_lane},
};

/// The published number of a message that is an event.
const EVENT: i32 = 4;

/// Something that happened to a task, as its lane `tk::{workspace}::{id}::events` tells it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct TaskEvent {
    /// Which task.
    pub task: Uuid,
    /// Where it belongs.
    pub workspace: String,
    /// The task that it is part of.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub parent: Option<Uuid>,
    /// Unix milliseconds.
    pub at_ms: i64,
    /// What happened.
    pub event: Event,
}

/// What happened to a task. Statuses are the published numbers.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Event {
    /// Its status, as clients see it, is another one.
    StatusChanged {
        /// 0 for a new task.
        from: i32,
        /// The one that it has now.
        to: i32,
        /// Why, if somebody said so.
        reason: String,
    },
    /// One of its parties reported.
    Progress {
        /// In its words.
        state: String,
        /// 0 to 1.
        completion: f64,
        /// For people.
        summary: String,
        /// Whatever.
        metadata: BTreeMap<String, String>,
    },
    /// One of its children was made (`spawned`), waits or goes on (`transitioned`), or ended (`completed`).
    Child {
        /// Which one.
        task: Uuid,
        /// Where the child belongs.
        workspace: String,
        /// The status that it has.
        status: i32,
        /// See above.
        lifecycle: String,
    },
}

impl TaskEvent {
    /// Reads one.
    ///
    /// # Errors
    /// [`Kind::Internal`] if the record is none.
    pub fn decode(record: &Record) -> Result<Self, Error> {
        serde_json::from_slice(&record.payload).map_err(|e| {
            let message = format!("record {} of topic {} is no event of a task: {e}", record.offset, record.topic);
            Error::new(Kind::Internal, "ERR_INTERNAL", message)
        })
    }

    fn outgoing(&self, lane_of: (&str, Uuid)) -> Result<Outgoing, Error> {
        let payload = message::json(self)?.into();
        Ok(Outgoing { topic: topic::task_events(lane_of.0, lane_of.1)?, payload })
    }
}

/// Tells everybody concerned what became of a task. `before` is its state before, if it is not new.
pub(super) async fn tell(tx: &mut WriteTx, before: Option<State>, task: &Task) -> Result<(), Error> {
    let (from, to) = (before.map(State::status), task.state.status());
    if from == Some(to) && before.is_none_or(|before| before.is_terminal() == task.state.is_terminal()) {
        return Ok(());
    }
    let reason = match &task.wait {
        Some(wait) => wait.reason.word(),
        None => &task.error,
    };
    let event = TaskEvent {
        task: task.id,
        workspace: task.workspace.clone(),
        parent: task.parent,
        at_ms: task.updated_at,
        event: Event::StatusChanged {
            from: from.map_or(0, |from| from as i32),
            to: to as i32,
            reason: reason.to_owned(),
        },
    };
    if from != Some(to) {
        tx.send(&event.outgoing((&task.workspace, task.id))?).await?;
        if before.is_some() {
            notify_creator(tx, task).await?;
            notify_subject(tx, task).await?;
        }
    }
    tell_parent(tx, before, task).await?;
    if task.state.is_terminal() { completion(tx, task).await } else { Ok(()) }
}

impl Tasks {
    /// Something that happened to a task just now, as it lies in the log.
    pub(crate) fn event(&self, task: &Task, event: Event) -> Result<Vec<u8>, Error> {
        let event = TaskEvent {
            task: task.id,
            workspace: task.workspace.clone(),
            parent: task.parent,
            at_ms: self.now(),
            event,
        };
        message::json(&event)
    }
}

/// What became of a task, for its worker.
pub(super) fn status_event(before: &Task, after: &Task) -> TaskEvent {
    let (from, to) = (before.state.status() as i32, after.state.status() as i32);
    TaskEvent {
        task: after.id,
        workspace: after.workspace.clone(),
        parent: after.parent,
        at_ms: after.updated_at,
        event: Event::StatusChanged { from, to, reason: after.error.clone() },
    }
}

/// As [`status_event`], for one who does not have it any more.
pub(super) fn lost_event(before: &Task, after: &Task) -> TaskEvent {
    let event = status_event(before, after);
    match event.event {
        Event::StatusChanged { from, to, reason } if reason.is_empty() => {
            let reason = format!("attempt {} is over", before.attempt);
            TaskEvent { event: Event::StatusChanged { from, to, reason }, ..event }
        }
        _ => event,
    }
}

async fn tell_parent(tx: &mut WriteTx, before: Option<State>, task: &Task) -> Result<(), Error> {
    let Some(parent) = task.parent else { return Ok(()) };
    let was_waiting = before.is_some_and(State::is_waiting);
    let lifecycle = match before {
        None => "spawned",
        Some(_) if task.state.is_terminal() => "completed",
        Some(_) if task.state.is_waiting() || was_waiting => "transitioned",
        Some(_) => return Ok(()),
    };
    // A parent that was forgotten hears nothing.
    let Some((_, workspace)) = super::sql::state_of(tx.as_read(), &parent.to_string()).await? else { return Ok(()) };
    let event = TaskEvent {
        task: parent,
        workspace: workspace.clone(),
        parent: None,
        at_ms: task.updated_at,
        event: Event::Child {
            task: task.id,
            workspace: task.workspace.clone(),
            status: task.state.status() as i32,
            lifecycle: lifecycle.to_owned(),
        },
    };
    Ok(tx.send(&event.outgoing((&workspace, parent))?).await?)
}

/// On the creator's own lane, so that it costs nobody else anything and waits for a creator that is away.
async fn notify_creator(tx: &mut WriteTx, task: &Task) -> Result<(), Error> {
    let Ok(creator) = Identity::parse(&task.creator) else { return Ok(()) };
    let Some(topic) = own_lane(&creator)? else { return Ok(()) };
    let state = task.state.status().word();
    let summary = if task.error.is_empty() { format!("task {state}") } else { format!("task {state}: {}", task.error) };
    let recipient = topic.to_string();
    let notice = Notice { task: task.id, state: state.to_owned(), summary, recipient, metadata: BTreeMap::new() };
    Ok(tx.send(&Outgoing { topic, payload: notice.encode(&task.workspace)?.into() }).await?)
}

/// The user that a task is for, if it takes part in it: all windows. They follow what is said about it while it runs.
async fn notify_subject(tx: &mut WriteTx, task: &Task) -> Result<(), Error> {
    if !task.has_participant() {
        return Ok(());
    }
    let (state, user) = (task.state.status().word(), &task.subject);
    let known = ["thread_id", "message_id"].into_iter();
    let known = known.filter_map(|key| Some((key.to_owned(), task.spec.metadata.get(key)?.clone())));
    let started_at_ms = task.started_at.unwrap_or(task.created_at).to_string();
    let own = [("status", state.to_owned()), ("task_type", task.kind.clone()), ("started_at_ms", started_at_ms)];
    let notice = Notice {
        task: task.id,
        state: state.to_owned(),
        summary: format!("task {state}"),
        recipient: format!("us::{user}"),
        metadata: known.chain(own.map(|(key, value)| (key.to_owned(), value))).collect(),
    };
    let topic = topic::progress_for(user)?;
    Ok(tx.send(&Outgoing { topic, payload: notice.encode(&task.workspace)?.into() }).await?)
}

impl Task {
    /// Whether the user that it is for takes part in it.
    #[must_use]
    pub fn has_participant(&self) -> bool {
        let wanted = self.spec.metadata.get("subject_participant").is_some_and(|flag| flag == "true" || flag == "1");
        wanted && !self.subject.is_empty() && self.mode != Mode::Startup
    }
}

#[derive(Serialize)]
struct Completion<'a> {
    source_agent: &'static str,
    workspace: &'a str,
    event_names: [String; 1],
    data: CompletionData<'a>,
}

#[derive(Serialize)]
struct CompletionData<'a> {
    task_id: Uuid,
    status: &'static str,
    task_type: &'a str,
    correlation_id: &'a str,
    root_task_id: String,
    metadata: &'a BTreeMap<String, String>,
}

/// For the workflow engine, as any other event.
async fn completion(tx: &mut WriteTx, task: &Task) -> Result<(), Error> {
    let (Some(wanted), status) = (&task.spec.completion, task.state.status()) else { return Ok(()) };
    if !wanted.on_statuses.is_empty() && !wanted.on_statuses.contains(&(status as i32)) {
        return Ok(());
    }
    let name = if wanted.name.is_empty() { format!("task.{}", status.word()) } else { wanted.name.clone() };
    let event = Completion {
        source_agent: "orchestrator",
        workspace: &task.workspace,
        event_names: [name],
        data: CompletionData {
            task_id: task.id,
            status: status.word(),
            task_type: &task.kind,
            correlation_id: &task.correlation,
            root_task_id: task.root_id(),
            metadata: &task.spec.metadata,
        },
    };
    let body = message::json(&event)?;
    let topic = topic::Target::Events { workspace: None }.topic()?;
    let payload = message::server_envelope(&task.workspace, EVENT, &body);
    Ok(tx.send(&Outgoing { topic, payload: payload.into() }).await?)
}

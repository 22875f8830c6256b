//! How the runtime is, folded from what it said: pure, and total on any payload.

use std::collections::HashSet;

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::envelope::{Envelope, Type};

/// Bytes of a tool's output that its state shows.
const PREVIEW_BYTES_MAX: usize = 512;

/// Turns that wait, of which the state tells.
const QUEUE_MAX: usize = 100;

/// Where a turn is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum TurnStatus {
    /// It waits.
    Queued,
    /// It runs.
    Running,
    /// It ended well.
    Done,
    /// It failed.
    Error,
    /// It was stopped.
    Aborted,
    /// Nobody knows.
    Lost,
}

/// A turn.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct TurnState {
    /// Its id; empty if whoever began it gave none.
    pub id: String,
    /// Where it is.
    pub status: TurnStatus,
    /// What it is doing, in the runtime's words.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub phase: Option<String>,
    /// Unix milliseconds.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub started_at: Option<i64>,
    /// Unix milliseconds.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub updated_at: Option<i64>,
    /// Why it failed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
}

/// Where a tool's run is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ToolStatus {
    /// There is none.
    #[default]
    Idle,
    /// It waits for somebody's approval.
    WaitingApproval,
    /// It runs.
    Running,
    /// It is done.
    Done,
    /// It failed.
    Failed,
    /// Nobody knows.
    Lost,
}

/// The latest run of a tool.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct ToolState {
    /// Its operation's id.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub id: Option<String>,
    /// The tool's name.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// Where it is.
    pub status: ToolStatus,
    /// The file that it is about.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub path: Option<String>,
    /// The command that it runs.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub command: Option<String>,
    /// Unix milliseconds.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub started_at: Option<i64>,
    /// Unix milliseconds.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub updated_at: Option<i64>,
    /// Its result is in the stream.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub result_seen: Option<bool>,
    /// It may be tried again.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub retryable: Option<bool>,
    /// Why it failed.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
    /// The beginning of what it told.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub output_preview: Option<String>,
}

/// How a runtime is, to one client.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct RuntimeState {
    /// New with every start of the runtime; empty as long as there was none.
    pub runtime_generation: String,
    /// The turn that waits or runs.
    pub active_turn: Option<TurnState>,
    /// The latest run of a tool.
    pub tool: ToolState,
    /// Turns that wait behind the active one, by id; of a runtime's own making, whatever it says.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub brain_queue: Option<Vec<Value>>,
    /// The last run that was lost.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub last_lost_tool: Option<ToolState>,
}

impl RuntimeState {
    /// How it is at the beginning of a generation.
    #[must_use]
    pub fn new(runtime_generation: impl Into<String>) -> Self {
        Self { runtime_generation: runtime_generation.into(), ..Self::default() }
    }

    /// Goes on by one envelope. Those that are no events change nothing.
    pub fn apply(&mut self, envelope: &Envelope) {
        let says = Says { payload: envelope.value(), envelope };
        if envelope.kind.is_event()
            && let Some(generation) = &envelope.runtime_generation
        {
            self.runtime_generation.clone_from(generation);
        }
        match envelope.kind {
            Type::TurnQueued => self.queued(&says),
            Type::TurnStart | Type::TurnRunning | Type::TurnPhase | Type::TurnTextDelta => self.runs(&says),
            kind if kind.ends_turn() => self.ended(&says),
            Type::ToolStart => self.tool_started(&says),
            kind @ (Type::ToolWaitingApproval
            | Type::ToolResult
            | Type::ToolFailed
            | Type::ToolLost
            | Type::ToolRetryAvailable) => self.tool_is(kind, &says),
            Type::ApprovalRequest => self.asked(&says),
            Type::ApprovalResult => self.answered(&says),
            Type::RuntimeGenerationChanged | Type::RuntimeRecovered => {
                if let Some(generation) = says.text(&["runtimeGeneration", "to"])
                    && envelope.runtime_generation.is_none()
                {
                    self.runtime_generation = generation;
                }
            }
            _ => {}
        }
    }

    /// What is to be said when another generation of the runtime goes on from here: that it is another one, and what was lost
    /// or goes on. Nothing, if it is the same, or the first. A turn that waits is lost too, unless it is
    /// `kept` by somebody else than the runtime.
    #[must_use]
    pub fn left_behind(
        &self,
        generation: &str,
        recovered_turns: &HashSet<String>,
        kept: &HashSet<String>,
    ) -> Vec<Envelope> {
        let from = &self.runtime_generation;
        if from.is_empty() || from == generation {
            return Vec::new();
        }
        let mut events =
            vec![Envelope::new(Type::RuntimeGenerationChanged).with(&json!({"from": from, "to": generation}))];
        let is_running = matches!(self.tool.status, ToolStatus::Running | ToolStatus::WaitingApproval);
        let tool = Some(&self.tool).filter(|_| is_running);
        let lost = |turn_id: &str| {
            let payload = json!({"reason": "the runtime was started again"});
            Envelope { turn_id: Some(turn_id.to_owned()), ..Envelope::new(Type::TurnLost).with(&payload) }
        };
        match self.active_turn.as_ref().map(|turn| turn.id.clone()) {
            Some(turn) if recovered_turns.contains(&turn) => {
                let payload = json!({"turnId": turn, "operationId": tool.and_then(|tool| tool.id.clone())});
                let recovered = Envelope::new(Type::RuntimeRecovered).with(&payload);
                events.push(Envelope { turn_id: Some(turn), ..recovered });
            }
            Some(turn) if kept.contains(&turn) => {}
            turn_id => {
                if let Some(tool) = tool {
                    let (operation_id, turn_id) = (tool.id.clone(), turn_id.clone());
                    let lost = Envelope::new(Type::ToolLost).with(&json!({"name": tool.name}));
                    events.push(Envelope { operation_id, turn_id, ..lost });
                }
                events.extend(turn_id.as_deref().map(lost));
            }
        }
        let queued = self.brain_queue.iter().flatten().filter_map(Value::as_str);
        events.extend(queued.filter(|turn| !recovered_turns.contains(*turn) && !kept.contains(*turn)).map(lost));
        for event in &mut events {
            event.runtime_generation = Some(generation.to_owned());
        }
        events
    }

    fn queued(&mut self, says: &Says<'_>) {
        let id = says.turn();
        match &mut self.active_turn {
            Some(turn) if turn.id == id => turn.updated_at = Some(says.envelope.ts),
            Some(_) => {
                let queue = self.brain_queue.get_or_insert_default();
                if queue.len() < QUEUE_MAX && !queue.contains(&Value::from(id.as_str())) {
                    queue.push(id.into());
                }
            }
            None => self.active_turn = Some(says.begun(TurnStatus::Queued)),
        }
    }

    fn runs(&mut self, says: &Says<'_>) {
        // Some pieces do not say of which turn they are.
        let is_same = |turn: &TurnState| says.envelope.turn_id.as_ref().is_none_or(|id| *id == turn.id);
        if !self.active_turn.as_ref().is_some_and(is_same) {
            // Whatever was before gave way to this one.
            self.forget(&says.turn());
            self.active_turn = Some(says.begun(TurnStatus::Running));
        }
        if let Some(turn) = &mut self.active_turn {
            turn.status = TurnStatus::Running;
            turn.updated_at = Some(says.envelope.ts);
            if says.envelope.kind == Type::TurnPhase {
                turn.phase = says.text(&["phase", "name"]).or_else(|| says.payload.as_str().map(ToOwned::to_owned));
            }
        }
    }

    fn ended(&mut self, says: &Says<'_>) {
        let is_active = |turn: &mut TurnState| says.envelope.turn_id.as_ref().is_none_or(|id| *id == turn.id);
        if self.active_turn.take_if(is_active).is_some()
            && matches!(self.tool.status, ToolStatus::Running | ToolStatus::WaitingApproval)
        {
            // Nothing runs without a turn.
            self.tool = ToolState::default();
        }
        if let Some(id) = &says.envelope.turn_id {
            self.forget(id);
        }
    }

    fn forget(&mut self, turn: &str) {
        if let Some(queue) = &mut self.brain_queue {
            queue.retain(|queued| queued != turn);
            if queue.is_empty() {
                self.brain_queue = None;
            }
        }
    }

    fn tool_started(&mut self, says: &Says<'_>) {
        let ts = Some(says.envelope.ts);
        let of_input = |name: &str| says.payload.get("input").and_then(|input| input.get(name)?.as_str());
        let about = |name: &str| says.text(&[name]).or_else(|| of_input(name).map(ToOwned::to_owned));
        self.tool = ToolState {
            id: says.envelope.operation_id.clone(),
            name: says.text(&["name", "tool"]),
            status: ToolStatus::Running,
            path: about("path"),
            command: about("command"),
            started_at: ts,
            updated_at: ts,
            ..ToolState::default()
        };
    }

    fn tool_is(&mut self, kind: Type, says: &Says<'_>) {
        // What is said of an earlier run changes nothing of this one.
        if says.envelope.operation_id.is_some() && self.tool.id.is_some() && says.envelope.operation_id != self.tool.id
        {
            return;
        }
        let tool = &mut self.tool;
        tool.updated_at = Some(says.envelope.ts);
        if tool.id.is_none() {
            tool.id.clone_from(&says.envelope.operation_id);
        }
        if tool.name.is_none() {
            tool.name = says.text(&["name", "tool"]);
        }
        match kind {
            Type::ToolWaitingApproval => tool.status = ToolStatus::WaitingApproval,
            Type::ToolResult => {
                (tool.status, tool.result_seen) = (ToolStatus::Done, Some(true));
                tool.output_preview = says.text(&["outputPreview", "output", "result", "text"]).map(preview);
            }
            Type::ToolFailed => {
                (tool.status, tool.error) = (ToolStatus::Failed, says.text(&["error", "message"]));
                tool.retryable = says.payload.get("retryable").and_then(Value::as_bool).or(tool.retryable);
            }
            Type::ToolRetryAvailable => tool.retryable = Some(true),
            _ => {
                tool.status = ToolStatus::Lost;
                self.last_lost_tool = Some(tool.clone());
            }
        }
    }

    fn asked(&mut self, says: &Says<'_>) {
        if self.tool.status == ToolStatus::Running && says.is_of(&self.tool) {
            (self.tool.status, self.tool.updated_at) = (ToolStatus::WaitingApproval, Some(says.envelope.ts));
        }
    }

    fn answered(&mut self, says: &Says<'_>) {
        if self.tool.status == ToolStatus::WaitingApproval && says.is_of(&self.tool) {
            let is_denied = says.payload.get("approved").is_some_and(|approved| *approved == Value::Bool(false));
            self.tool.status = if is_denied { ToolStatus::Failed } else { ToolStatus::Running };
            self.tool.updated_at = Some(says.envelope.ts);
        }
    }
}

/// An envelope and its payload, read.
struct Says<'a> {
    envelope: &'a Envelope,
    payload: Value,
}

impl Says<'_> {
    fn turn(&self) -> String {
        self.envelope.turn_id.clone().unwrap_or_default()
    }

    fn begun(&self, status: TurnStatus) -> TurnState {
        let ts = Some(self.envelope.ts);
        TurnState { id: self.turn(), status, phase: None, started_at: ts, updated_at: ts, error: None }
    }

    /// The first of these fields that is text.
    fn text(&self, names: &[&str]) -> Option<String> {
        names.iter().find_map(|name| self.payload.get(name)?.as_str()).map(ToOwned::to_owned)
    }

    /// Whether it may be about this run.
    fn is_of(&self, tool: &ToolState) -> bool {
        self.envelope.operation_id.is_none() || tool.id.is_none() || self.envelope.operation_id == tool.id
    }
}

fn preview(mut text: String) -> String {
    text.truncate(text.floor_char_boundary(PREVIEW_BYTES_MAX));
    text
}

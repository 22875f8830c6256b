//! Whether what a UI shows is still so.

use serde::{Deserialize, Serialize};

use crate::state::RuntimeState;

/// What a UI shows.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct LocalUiState {
    /// It waits for an answer.
    pub sending: bool,
    /// The turn that it waits for.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub known_turn_id: Option<String>,
    /// The last event that it saw.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub last_seen_seq: Option<u64>,
    /// The runtime that it knows.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub runtime_generation: Option<String>,
}

/// Why what it shows is not so any more.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum StaleReason {
    /// It waits, and nothing runs.
    ClientThinksSendingButServerIdle,
    /// It waits for a turn, and another one runs.
    ClientTurnMissingOnServer,
    /// The runtime is another one, or the UI knows none.
    RuntimeGenerationChanged,
}

/// What to do about it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum StaleAction {
    /// Wait no more.
    ClearSending,
    /// Show that the end of the turn was lost.
    ShowLostTail,
    /// Ask for what was missed.
    RequestReplay,
}

/// What was found.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct StaleUi {
    /// What is shown is not so any more.
    pub stale: bool,
    /// Why.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<StaleReason>,
    /// What to do.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub action: Option<StaleAction>,
}

/// Compares what a UI shows with how the runtime is. The first row of this table that fits decides; what is not known differs
/// from everything.
///
/// | local | runtime | reason | action |
/// | --- | --- | --- | --- |
/// | another generation | – | `runtime_generation_changed` | `request_replay` |
/// | sending | no active turn | `client_thinks_sending_but_server_idle` | `clear_sending` |
/// | sending, another turn | active turn | `client_turn_missing_on_server` | `show_lost_tail` |
/// | – | – | – | – (not stale) |
#[must_use]
pub fn detect_stale_ui(local: &LocalUiState, state: &RuntimeState) -> StaleUi {
    let stale = |reason, action| StaleUi { stale: true, reason: Some(reason), action: Some(action) };
    if local.runtime_generation.as_deref() != Some(&*state.runtime_generation) {
        return stale(StaleReason::RuntimeGenerationChanged, StaleAction::RequestReplay);
    }
    match &state.active_turn {
        None if local.sending => stale(StaleReason::ClientThinksSendingButServerIdle, StaleAction::ClearSending),
        Some(turn) if local.sending && local.known_turn_id.as_ref() != Some(&turn.id) => {
            stale(StaleReason::ClientTurnMissingOnServer, StaleAction::ShowLostTail)
        }
        _ => StaleUi { stale: false, reason: None, action: None },
    }
}

/// Whether a UI that shows that it waits is to stop showing it: nothing runs that it could wait for, whichever runtime it knew.
#[must_use]
pub fn should_clear_thinking(local: &LocalUiState, state: &RuntimeState) -> bool {
    local.sending && state.active_turn.is_none()
}

/** Whether what a UI shows is still so. */

import type { AgentRuntimeState } from './state.js'

export type LocalUiState = {
  sending: boolean
  knownTurnId?: string | null
  lastSeenSeq?: number
  runtimeGeneration?: string | null
}

export type StaleUiDetection = {
  stale: boolean
  reason?: 'client_thinks_sending_but_server_idle' | 'client_turn_missing_on_server' | 'runtime_generation_changed'
  action?: 'clear_sending' | 'show_lost_tail' | 'request_replay'
}

/**
 * Compares what a UI shows with how the runtime is. The first row of the protocol's table that fits decides; what is not known
 * differs from everything.
 */
export function detectStaleUi(local: LocalUiState, state: AgentRuntimeState): StaleUiDetection {
  if (local.runtimeGeneration !== state.runtimeGeneration) {
    return { stale: true, reason: 'runtime_generation_changed', action: 'request_replay' }
  }
  if (local.sending && !state.activeTurn) {
    return { stale: true, reason: 'client_thinks_sending_but_server_idle', action: 'clear_sending' }
  }
  if (local.sending && local.knownTurnId !== state.activeTurn?.id) {
    return { stale: true, reason: 'client_turn_missing_on_server', action: 'show_lost_tail' }
  }
  return { stale: false }
}

/** Whether a UI that shows that it waits is to stop showing it: nothing runs that it could wait for. */
export function shouldClearThinking(local: LocalUiState, state: AgentRuntimeState): boolean {
  return local.sending && !state.activeTurn
}

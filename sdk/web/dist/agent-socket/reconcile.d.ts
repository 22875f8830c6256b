/** Whether what a UI shows is still so. */
import type { AgentRuntimeState } from './state.js';
export type LocalUiState = {
    sending: boolean;
    knownTurnId?: string | null;
    lastSeenSeq?: number;
    runtimeGeneration?: string | null;
};
export type StaleUiDetection = {
    stale: boolean;
    reason?: 'client_thinks_sending_but_server_idle' | 'client_turn_missing_on_server' | 'runtime_generation_changed';
    action?: 'clear_sending' | 'show_lost_tail' | 'request_replay';
};
/**
 * Compares what a UI shows with how the runtime is. The first row of the protocol's table that fits decides; what is not known
 * differs from everything.
 */
export declare function detectStaleUi(local: LocalUiState, state: AgentRuntimeState): StaleUiDetection;
/** Whether a UI that shows that it waits is to stop showing it: nothing runs that it could wait for. */
export declare function shouldClearThinking(local: LocalUiState, state: AgentRuntimeState): boolean;

/** Whether what a UI shows is still so. */
/**
 * Compares what a UI shows with how the runtime is. The first row of the protocol's table that fits decides; what is not known
 * differs from everything.
 */
export function detectStaleUi(local, state) {
    if (local.runtimeGeneration !== state.runtimeGeneration) {
        return { stale: true, reason: 'runtime_generation_changed', action: 'request_replay' };
    }
    if (local.sending && !state.activeTurn) {
        return { stale: true, reason: 'client_thinks_sending_but_server_idle', action: 'clear_sending' };
    }
    if (local.sending && local.knownTurnId !== state.activeTurn?.id) {
        return { stale: true, reason: 'client_turn_missing_on_server', action: 'show_lost_tail' };
    }
    return { stale: false };
}
/** Whether a UI that shows that it waits is to stop showing it: nothing runs that it could wait for. */
export function shouldClearThinking(local, state) {
    return local.sending && !state.activeTurn;
}
//# sourceMappingURL=reconcile.js.map
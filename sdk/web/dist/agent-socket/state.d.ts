/** How the runtime is, folded from what it said: pure, and total on any payload. */
import { type AgentSocketEnvelope } from './envelope.js';
export type AgentTurnState = {
    id: string;
    status: 'queued' | 'running' | 'done' | 'error' | 'aborted' | 'lost';
    phase?: string;
    startedAt?: number;
    updatedAt?: number;
    error?: string | null;
};
export type AgentToolState = {
    id?: string;
    name?: string;
    status: 'idle' | 'waiting_approval' | 'running' | 'done' | 'failed' | 'lost';
    path?: string | null;
    command?: string | null;
    startedAt?: number | null;
    updatedAt?: number | null;
    resultSeen?: boolean;
    retryable?: boolean;
    error?: string | null;
    outputPreview?: string | null;
};
export type AgentRuntimeState = {
    runtimeGeneration: string;
    activeTurn: AgentTurnState | null;
    tool: AgentToolState;
    brainQueue?: unknown[];
    lastLostTool?: AgentToolState | null;
};
/** How it is before anything was said. */
export declare function initialRuntimeState(runtimeGeneration?: string): AgentRuntimeState;
/** How it is after one more envelope. Those that are no events change nothing. */
export declare function foldRuntimeState(before: AgentRuntimeState, envelope: AgentSocketEnvelope): AgentRuntimeState;

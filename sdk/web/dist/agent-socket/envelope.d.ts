/** What is said: one JSON object a frame. See docs/protocol/agent-socket.md. */
export declare const AGENT_SOCKET_PROTOCOL: "agent-socket";
export declare const AGENT_SOCKET_VERSION: 1;
/** All types. The set is closed. The first eight are said once; the others are events: kept, numbered, replayed. */
export declare const AGENT_SOCKET_EVENT_TYPES: readonly ["hello", "welcome", "heartbeat", "ack", "state_request", "state_snapshot", "replay_request", "replay_events", "turn_start", "turn_queued", "turn_running", "turn_phase", "turn_text_delta", "turn_done", "turn_error", "turn_aborted", "turn_lost", "tool_start", "tool_waiting_approval", "tool_result", "tool_failed", "tool_lost", "tool_retry_available", "approval_request", "approval_resolve", "approval_result", "attachment_uploading", "attachment_ready", "attachment_error", "runtime_generation_changed", "runtime_recovered"];
export type AgentSocketEventType = (typeof AGENT_SOCKET_EVENT_TYPES)[number];
export type AgentSocketEnvelope<T = unknown> = {
    protocol: typeof AGENT_SOCKET_PROTOCOL;
    version: typeof AGENT_SOCKET_VERSION;
    type: AgentSocketEventType;
    clientId?: string;
    socketId?: string;
    runtimeGeneration?: string;
    turnId?: string;
    operationId?: string;
    /** Its number in the client's stream: larger than all before. */
    seq?: number;
    /** Everything up to here was had. */
    ack?: number;
    /** Unix milliseconds. */
    ts: number;
    payload?: T;
};
export type AgentSocketMeta = {
    ts?: number;
    clientId?: string;
    turnId?: string;
    operationId?: string;
    seq?: number;
    ack?: number;
    runtimeGeneration?: string;
};
/** Why a frame is no envelope: `field` names what is wrong, or is `frame` for what is no JSON object. */
export declare class EnvelopeError extends Error {
    readonly field: string;
    constructor(field: string, why: string);
}
/** Whether envelopes of a type are events. */
export declare function isEventType(type: AgentSocketEventType): boolean;
export declare function makeEnvelope<T>(type: AgentSocketEventType, payload?: T, meta?: AgentSocketMeta): AgentSocketEnvelope<T>;
export declare function isAgentSocketEnvelope(value: unknown): value is AgentSocketEnvelope;
/**
 * Reads an envelope from a frame. Fields that are null are left out; those that this version does not know are kept.
 *
 * @throws {EnvelopeError} which names the field.
 */
export declare function parseEnvelope(raw: string | ArrayBuffer | Uint8Array): AgentSocketEnvelope;
export declare function serializeEnvelope(envelope: AgentSocketEnvelope): string;

/** The runtime's side, for one connection: events are kept before they are sent, and a turn that is begun twice runs once. */
import { type AgentSocketEnvelope, type AgentSocketEventType, type AgentSocketMeta } from './envelope.js';
import type { AgentRuntimeState } from './state.js';
import { type AgentSocketEventStore } from './store.js';
import type { AgentSocketTransport } from './transport.js';
export type { AgentSocketEventStore, AgentSocketTransport, AgentRuntimeState, AgentSocketEnvelope };
export type AgentSocketServerHandlers = {
    getState: (clientId: string) => AgentRuntimeState | Promise<AgentRuntimeState>;
    onStartTurn?: (args: {
        clientId: string;
        turnId?: string;
        payload: unknown;
        emit: (event: EmittedEvent) => void;
    }) => void | Promise<void>;
    onAbortTurn?: (args: {
        clientId: string;
        turnId?: string;
        payload: unknown;
    }) => void | Promise<void>;
    onApprovalResolve?: (args: {
        clientId: string;
        operationId?: string;
        payload: unknown;
    }) => void | Promise<void>;
};
/** An event to be emitted: an envelope, or what of one is not always the same. */
export type EmittedEvent = Pick<AgentSocketEnvelope, 'type'> & Partial<AgentSocketEnvelope>;
export type AgentSocketServerOptions = {
    runtimeGeneration: string;
    handlers: AgentSocketServerHandlers;
    store?: AgentSocketEventStore;
};
export declare class AgentSocketServerSession {
    #private;
    constructor(transport: AgentSocketTransport, options: AgentSocketServerOptions);
    /** Keeps an event, and then sends it. What is emitted before the client said hello waits for that, and has no number yet. */
    emit<T>(type: AgentSocketEventType, payload?: T, meta?: AgentSocketMeta): AgentSocketEnvelope<T>;
}
export declare function createAgentSocketServerSession(transport: AgentSocketTransport, options: AgentSocketServerOptions): AgentSocketServerSession;

/** The UI's side: every event once and in order, whatever happens to the socket. */
import { type AgentSocketEnvelope, type AgentSocketEventType, type AgentSocketMeta } from './envelope.js';
import { type AgentRuntimeState } from './state.js';
import { type AgentSocketTransport, type WebSocketLike } from './transport.js';
export type { AgentSocketEnvelope, AgentSocketEventType, AgentSocketTransport, AgentRuntimeState, WebSocketLike };
type Connection = AgentSocketTransport | WebSocketLike;
export type AgentSocketClientOptions = {
    /** Whose stream it shows. */
    clientId: string;
    /** At a Trunkline server: the agent that is to be its runtime, such as `ag::prod::chat::one`. */
    agent?: string;
    /** A connection; or what makes one, which is then asked again, after a pause, whenever a connection is lost. */
    transport: Connection | (() => Connection);
    lastSeenSeq?: number;
    runtimeGeneration?: string | null;
    /** It says what it had after so many events, and with each heartbeat; 0 is never by itself. */
    ackEvery?: number;
    /** The first pause before it connects again, and the longest, in milliseconds. */
    pauseMs?: number;
    pauseMaxMs?: number;
};
export declare class AgentSocketClient {
    #private;
    /** The last event that the handlers had. To be set before a connection is made, or asked for again from there. */
    lastSeenSeq: number;
    constructor(options: AgentSocketClientOptions);
    /** The last event that the handlers had. */
    get seq(): number;
    /** The runtime that it knows. */
    get generation(): string | null;
    /** How the runtime is, if that is known. */
    get state(): AgentRuntimeState | undefined;
    /** Whether it was let in, and the connection is there. */
    get connected(): boolean;
    /** Calls `handler` for each envelope of a type, or of every type for `*`: events once each, in order. */
    on<T>(type: AgentSocketEnvelope<T>['type'] | '*', handler: (event: AgentSocketEnvelope<T>) => void): void;
    /** Connects, and says hello. */
    connect(): void;
    /** Ends the connection, for good. */
    close(): void;
    requestState(): void;
    /** Asks for what was missed. What was seen already is not handled again, unless `lastSeenSeq` was set back. */
    requestReplay(since?: number): void;
    /** Begins a turn. It is said again after a lost connection until something is heard of it, and runs once. */
    startTurn(payload: unknown, turnId: string): void;
    abortTurn(turnId: string): void;
    ack(seq?: number): void;
    /** Says anything else. Without a connection, what is an event waits for one. */
    send<T>(type: AgentSocketEventType, payload?: T, meta?: AgentSocketMeta): void;
    /** A frame came. Called by the transport. */
    handleRaw(raw: string | ArrayBuffer | Uint8Array): void;
}

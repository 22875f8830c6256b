/** Where a runtime keeps events, so that whoever was away gets them. */
import type { AgentSocketEnvelope } from './envelope.js';
export interface AgentSocketEventStore {
    append(event: AgentSocketEnvelope): Promise<void> | void;
    getSince(clientId: string, seq: number): Promise<AgentSocketEnvelope[]> | AgentSocketEnvelope[];
    latestSeq(clientId: string): Promise<number> | number;
    /** Events behind `since`, up to and with `until`, at most `max`. */
    getSinceRange?(clientId: string, since: number, until?: number, max?: number): Promise<AgentSocketEnvelope[]> | AgentSocketEnvelope[];
    trim?(clientId: string): Promise<void> | void;
}
/** First in, first out, in memory; 500 events a client, unless somebody says otherwise. */
export declare class MemoryEventStore implements AgentSocketEventStore {
    #private;
    constructor(options?: {
        maxEvents?: number;
    });
    /** The number for the client's next event. */
    nextSeq(clientId: string): number;
    append(event: AgentSocketEnvelope): void;
    getSince(clientId: string, seq: number): AgentSocketEnvelope[];
    getSinceRange(clientId: string, since: number, until?: number, max?: number): AgentSocketEnvelope[];
    latestSeq(clientId: string): number;
    /** Forgets a client's events, or everybody's. Their numbers are not used again. */
    clear(clientId?: string): void;
}

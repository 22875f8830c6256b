/** What carries frames: anything with two ends that keeps their order. */
export type AgentSocketTransport = {
    send(data: string): void;
    close(code?: number, reason?: string): void;
    onMessage(cb: (data: string | ArrayBuffer | Uint8Array) => void): void;
    onClose(cb: (event?: unknown) => void): void;
    onError?(cb: (error: unknown) => void): void;
};
/** Two ends in one program: what one sends, the other gets a moment later. */
export declare class InMemoryTransport implements AgentSocketTransport {
    #private;
    static pair(): [InMemoryTransport, InMemoryTransport];
    send(data: string): void;
    close(code?: number, reason?: string): void;
    onMessage(cb: (data: string | ArrayBuffer | Uint8Array) => void): void;
    onClose(cb: (event?: unknown) => void): void;
}
/** What of a WebSocket is needed: a browser's, or that of a library. */
export type WebSocketLike = {
    readonly readyState: number;
    binaryType?: string;
    send(data: string): void;
    close(code?: number, reason?: string): void;
    addEventListener(type: 'open' | 'message' | 'close' | 'error', listener: (event: any) => void): void;
};
/** A WebSocket as a transport. What is sent before it is open waits. */
export declare function webSocketTransport(socket: WebSocketLike): AgentSocketTransport;
export declare function isTransport(value: AgentSocketTransport | WebSocketLike): value is AgentSocketTransport;

/** WebSockets of browsers. */
import { type AgentSocketTransport } from '../transport.js';
/** The address of a path of this page's server, for `new WebSocket(…)`. Full addresses are passed through. */
export declare function agentSocketBrowserTransport(path: string): string;
/** What makes connections to a path of this page's server: with it, a client comes back by itself. */
export declare function agentSocketBrowserConnector(path: string): () => AgentSocketTransport;

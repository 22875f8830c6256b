/** WebSockets of the library `ws`, in Node: as a server, and to connect from where there are no browsers' own. */

import { createAgentSocketServerSession, type AgentSocketServerOptions } from '../server.js'
import { MemoryEventStore } from '../store.js'
import { webSocketTransport, type AgentSocketTransport, type WebSocketLike } from '../transport.js'

/** `WebSocketServer`. */
export interface WsServerLike {
  on(event: 'connection', listener: (socket: WebSocketLike) => void): unknown
}

/** Serves every connection of a server, all over one store. Who may connect is for the server to say (`verifyClient`, `handleUpgrade`). */
export function serveAgentSocketWs(server: WsServerLike, options: AgentSocketServerOptions): void {
  const shared = { store: new MemoryEventStore(), ...options }
  server.on('connection', (socket) => void createAgentSocketServerSession(webSocketTransport(socket), shared))
}

/** What makes connections: `agentSocketWsConnector(() => new WebSocket(url, { headers: { authorization: … } }))`. */
export function agentSocketWsConnector(connect: () => WebSocketLike): () => AgentSocketTransport {
  return () => webSocketTransport(connect())
}

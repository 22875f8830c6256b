/** WebSockets of Bun's own server. */

import { createAgentSocketServerSession, type AgentSocketServerOptions } from '../server.js'
import { MemoryEventStore } from '../store.js'
import { BUFFERED_BYTES_MAX, type AgentSocketTransport } from '../transport.js'

/** `ServerWebSocket`. */
export interface BunSocketLike {
  send(data: string): number
  close(code?: number, reason?: string): void
  getBufferedAmount?(): number
}

export interface BunHandlers {
  open(socket: BunSocketLike): void
  message(socket: BunSocketLike, data: string | ArrayBuffer | Uint8Array): void
  close(socket: BunSocketLike, code: number, reason: string): void
}

type Ends = { message?: (data: string | ArrayBuffer | Uint8Array) => void; close?: (event: unknown) => void }

/** For `Bun.serve({ fetch: (request, server) => …server.upgrade(request)…, websocket: agentSocketBunHandlers(…) })`: all over one store. */
export function agentSocketBunHandlers(options: AgentSocketServerOptions): BunHandlers {
  const shared = { store: new MemoryEventStore(), ...options }
  const all = new WeakMap<BunSocketLike, Ends>()
  return {
    open(socket) {
      const ends: Ends = {}
      all.set(socket, ends)
      const transport: AgentSocketTransport = {
        send(data) {
          if ((socket.getBufferedAmount?.() ?? 0) > BUFFERED_BYTES_MAX) socket.close(1013, 'it takes too little')
          else if (socket.send(data) !== 0) return
          throw new Error('the socket is closed')
        },
        close: (code, reason) => socket.close(code, reason),
        onMessage: (cb) => void (ends.message = cb),
        onClose: (cb) => void (ends.close = cb),
      }
      createAgentSocketServerSession(transport, shared)
    },
    message: (socket, data) => all.get(socket)?.message?.(data),
    close: (socket, code, reason) => all.get(socket)?.close?.({ code, reason }),
  }
}

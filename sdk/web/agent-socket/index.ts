/** The agent-socket protocol, version 1: a UI and a long-running runtime stay in step. See docs/protocol/agent-socket.md. */

export * from './envelope.js'
export * from './reconcile.js'
export * from './state.js'
export * from './sql-store.js'
export * from './store.js'
export * from './transport.js'
export { AgentSocketClient, type AgentSocketClientOptions } from './client.js'
export { AgentSocketRuntime, type AgentSocketRuntimeHandlers, type AgentSocketRuntimeOptions, type RuntimeAsk } from './runtime.js'
export {
  AgentSocketServerSession,
  createAgentSocketServerSession,
  type AgentSocketServerHandlers,
  type AgentSocketServerOptions,
  type EmittedEvent,
} from './server.js'

/** What programs write for the npm package has to compile when only the import is another one. Not run. */

import { agentSocketBrowserTransport } from '../agent-socket/adapters/browser.js'
import { AgentSocketClient, type AgentSocketEnvelope, type AgentSocketTransport } from '../agent-socket/client.js'
import {
  AGENT_SOCKET_PROTOCOL,
  AGENT_SOCKET_VERSION,
  detectStaleUi,
  InMemoryTransport,
  isAgentSocketEnvelope,
  makeEnvelope,
  MemoryEventStore,
  parseEnvelope,
  serializeEnvelope,
  shouldClearThinking,
  type AgentRuntimeState,
  type AgentSocketEventStore,
  type AgentSocketEventType,
  type AgentToolState,
  type AgentTurnState,
  type LocalUiState,
  type StaleUiDetection,
} from '../agent-socket/index.js'
import {
  AgentSocketServerSession,
  createAgentSocketServerSession,
  type AgentSocketServerHandlers,
  type AgentSocketServerOptions,
} from '../agent-socket/server.js'

export function browser(saved: Storage, show: (payload: unknown) => void): AgentSocketClient {
  const client = new AgentSocketClient({
    clientId: 'web-a',
    transport: new WebSocket(agentSocketBrowserTransport('/agent-socket')),
    lastSeenSeq: Number(saved.getItem('seq') ?? 0),
    runtimeGeneration: saved.getItem('generation'),
  })
  client.on('turn_text_delta', (event) => show(event.payload))
  client.on<{ name: string }>('tool_start', (event) => show(event.payload?.name))
  client.on('runtime_generation_changed', () => client.requestReplay())
  client.on('*', ({ type, seq }) => show([type, seq]))
  client.connect()
  client.startTurn({ text: 'hello' }, 't-1')
  client.abortTurn('t-1')
  client.ack()
  client.ack(7)
  client.lastSeenSeq = 42
  client.requestReplay(42)
  client.requestState()
  client.send('approval_resolve', { approved: true }, { operationId: 'o' })
  return show([client.seq, client.generation]), client
}

export function runtime(transport: AgentSocketTransport, state: AgentRuntimeState): AgentSocketServerSession {
  const handlers: AgentSocketServerHandlers = {
    getState: async (clientId: string) => (clientId === '' ? Promise.reject(new Error('who?')) : state),
    onStartTurn: async ({ clientId, turnId, payload, emit }) => {
      emit({ type: 'turn_queued', ...(turnId === undefined ? {} : { turnId }), payload })
      emit(makeEnvelope('turn_done', { clientId }))
    },
    onAbortTurn: ({ turnId }) => void turnId,
    onApprovalResolve: async ({ operationId, payload }) => void [operationId, payload],
  }
  const store: AgentSocketEventStore = new MemoryEventStore({ maxEvents: 100 })
  const options: AgentSocketServerOptions = { runtimeGeneration: 'dev-1', handlers, store }
  const session = createAgentSocketServerSession(transport, options)
  const emitted: AgentSocketEnvelope<{ name: string }> = session.emit('tool_start', { name: 'x' }, { operationId: 'o' })
  session.emit('turn_start', emitted.payload, { turnId: 't' })
  return session
}

export function rest(raw: string | ArrayBuffer | Uint8Array): unknown {
  const local: LocalUiState = { sending: true, knownTurnId: 't-1', runtimeGeneration: null }
  const tool: AgentToolState = { status: 'idle', path: null }
  const activeTurn: AgentTurnState | null = { id: 't', status: 'running' }
  const state: AgentRuntimeState = { runtimeGeneration: 'g', activeTurn, tool, brainQueue: [1], lastLostTool: null }
  const stale: StaleUiDetection = detectStaleUi(local, state)
  const type: AgentSocketEventType = parseEnvelope(raw).type
  const [one, other]: [InMemoryTransport, InMemoryTransport] = InMemoryTransport.pair()
  const store = new MemoryEventStore()
  store.append({ ...makeEnvelope(type, { any: 'thing' }, { seq: store.nextSeq('c'), clientId: 'c', ack: 1, ts: 1 }) })
  store.clear('c')
  const text: string = serializeEnvelope(makeEnvelope('heartbeat'))
  return [shouldClearThinking(local, state), stale.action, one, other, store.getSince('c', 0), store.latestSeq('c'), text,
    isAgentSocketEnvelope({}), AGENT_SOCKET_PROTOCOL, AGENT_SOCKET_VERSION]
}

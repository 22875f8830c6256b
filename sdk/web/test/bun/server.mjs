// A runtime in Bun, with its events in a file: `bun server.mjs FILE PORT`. Says on which port it listens.

import { Database } from 'bun:sqlite'

import { agentSocketBunHandlers } from '../../dist/agent-socket/adapters/bun.js'
import { foldRuntimeState, initialRuntimeState, SqlEventStore } from '../../dist/agent-socket/index.js'

const [file, port] = process.argv.slice(2)
const store = new SqlEventStore(new Database(file), { maxEvents: 50 })
const runtimeGeneration = `g${Date.now()}`

const websocket = agentSocketBunHandlers({
  runtimeGeneration,
  store,
  handlers: {
    getState: (clientId) => store.getSince(clientId, 0).reduce(foldRuntimeState, initialRuntimeState(runtimeGeneration)),
    onStartTurn({ turnId, payload, emit }) {
      emit({ type: 'turn_running', turnId })
      emit({ type: 'turn_text_delta', turnId, payload: { delta: `you said: ${payload.text}` } })
      emit({ type: 'turn_done', turnId })
    },
  },
})

const server = Bun.serve({
  hostname: '127.0.0.1',
  port: Number(port),
  fetch: (request, server) => (server.upgrade(request) ? undefined : new Response('WebSocket only', { status: 426 })),
  websocket,
})
console.log(server.port)

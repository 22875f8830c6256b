/** Servers of others as carriers: `ws` in Node and Bun's own, each for real; and events that survive their process. */

import assert from 'node:assert/strict'
import { spawn, type ChildProcess } from 'node:child_process'
import { once } from 'node:events'
import { mkdtempSync, rmSync } from 'node:fs'
import type { AddressInfo } from 'node:net'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { createInterface } from 'node:readline'
import { test } from 'node:test'
import { fileURLToPath } from 'node:url'

import { WebSocket, WebSocketServer } from 'ws'

import { agentSocketWsConnector, serveAgentSocketWs } from '../agent-socket/adapters/ws.js'
import {
  AgentSocketClient,
  AgentSocketRuntime,
  initialRuntimeState,
  InMemoryTransport,
  webSocketTransport,
  type AgentSocketEnvelope,
} from '../agent-socket/index.js'

const ROOT = fileURLToPath(new URL('../../', import.meta.url))

/** A client of a server at a port, and what it sees. */
function client(port: () => number, clientId: string): [AgentSocketClient, AgentSocketEnvelope[], AgentSocketEnvelope[]] {
  const transport = agentSocketWsConnector(() => new WebSocket(`ws://127.0.0.1:${port()}`))
  const made = new AgentSocketClient({ clientId, transport, pauseMs: 20, pauseMaxMs: 100 })
  const [events, replays]: AgentSocketEnvelope[][] = [[], []]
  made.on('*', (event) => event.seq !== undefined && events!.push(event))
  made.on('replay_events', (part) => replays!.push(part))
  made.connect()
  return [made, events!, replays!]
}

async function until(is: () => boolean): Promise<void> {
  for (const begun = Date.now(); !is(); ) {
    assert.ok(Date.now() - begun < 10_000, `not so within 10 s: ${String(is)}`)
    await new Promise((done) => setTimeout(done, 5))
  }
}

const done = (events: AgentSocketEnvelope[]) => events.filter(({ type }) => type === 'turn_done').length

test('a server of `ws`: a turn, a second tab, and replays in parts', async () => {
  const server = new WebSocketServer({ host: '127.0.0.1', port: 0 })
  await once(server, 'listening')
  const port = () => (server.address() as AddressInfo).port
  serveAgentSocketWs(server, {
    runtimeGeneration: 'g1',
    frameCharsMax: 1000,
    handlers: {
      getState: () => initialRuntimeState('g1'),
      onStartTurn({ turnId = '', emit }) {
        for (let piece = 0; piece < 20; piece += 1) emit({ type: 'turn_text_delta', turnId, payload: { delta: `${piece} ` } })
        emit({ type: 'turn_done', turnId })
      },
    },
  })
  const [one, seen] = client(port, 'web')
  one.startTurn({ text: 'hi' }, 't1')
  await until(() => done(seen) === 1)
  const [other, missed, parts] = client(port, 'web')
  await until(() => done(missed) === 1)
  assert.deepEqual(missed.map(({ seq }) => seq), seen.map(({ seq }) => seq))
  assert.ok(parts.length > 1, `${parts.length} parts`)
  one.close()
  other.close()
  server.close()
})

/** Starts the runtime, and waits for its port. */
async function bun(file: string, port = 0): Promise<[ChildProcess, number]> {
  const child = spawn(join(ROOT, 'node_modules/.bin/bun'), [join(ROOT, 'test/bun/server.mjs'), file, String(port)], {
    stdio: ['ignore', 'pipe', 'inherit'],
  })
  for await (const line of createInterface(child.stdout)) return [child, Number(line)]
  return assert.fail('the runtime ended before it listened')
}

test('a runtime in Bun that is killed: its events are there, and its numbers go on', { timeout: 60_000 }, async () => {
  const dir = mkdtempSync(join(tmpdir(), 'trunkline-bun-'))
  let [child, port] = await bun(join(dir, 'events.db'))
  try {
    const [one, seen] = client(() => port, 'web')
    one.startTurn({ text: 'before' }, 't1')
    await until(() => done(seen) === 1)
    child.kill('SIGKILL')
    await once(child, 'exit')
    // Said while it is away, run once when it is back; what ran before does not run again.
    one.startTurn({ text: 'while away' }, 't2')
    one.startTurn({ text: 'before' }, 't1')
    ;[child, port] = await bun(join(dir, 'events.db'), port)
    await until(() => done(seen) === 2)
    const [other, all] = client(() => port, 'web')
    await until(() => done(all) === 2)
    const texts = all.filter(({ type }) => type === 'turn_text_delta').map(({ payload }) => (payload as { delta: string }).delta)
    assert.deepEqual(texts, ['you said: before', 'you said: while away'])
    assert.deepEqual(all.map(({ seq }) => seq), [1, 2, 3, 4, 5, 6])
    assert.deepEqual(seen.map(({ seq }) => seq), [1, 2, 3, 4, 5, 6])
    // The oldest go, and who asks for them is told that they are gone.
    for (let turn = 0; turn < 20; turn += 1) one.startTurn({ text: String(turn) }, `more ${turn}`)
    await until(() => done(seen) === 22)
    const [late, rest, parts] = client(() => port, 'web')
    await until(() => rest.length === 50)
    assert.equal(rest.at(-1)?.seq, 66)
    assert.deepEqual((parts[0]?.payload as { gone: number[] }).gone, [0, 16])
    for (const each of [one, other, late]) each.close()
  } finally {
    child.kill('SIGKILL')
    rmSync(dir, { recursive: true })
  }
})

test('what a runtime emits without a server is bounded, and refused in time', () => {
  const [transport] = InMemoryTransport.pair()
  const handlers = { onStartTurn: () => undefined }
  const runtime = new AgentSocketRuntime({ runtimeGeneration: 'g1', transport: () => transport, handlers })
  const emit = () => runtime.emit('web', 'turn_text_delta', { delta: 'x'.repeat(1024 * 1024) }, { turnId: 't' })
  for (let count = 0; count < 7; count += 1) emit()
  assert.throws(emit, /7 events with \d+ characters are not kept yet/)
  assert.throws(() => runtime.emit('web', 'heartbeat'), /no event/)
  runtime.emit('web', 'turn_done', {}, { turnId: 't' })
})

test('a socket that takes too little is closed, also where only own codes may close', () => {
  const codes: (number | undefined)[] = []
  const socket = {
    readyState: 1,
    bufferedAmount: 17 * 1024 * 1024,
    send: () => assert.fail('it has enough'),
    addEventListener: () => undefined,
    close(code?: number) {
      // As browsers do.
      if (code !== undefined && code !== 1000 && code < 3000) throw new Error('InvalidAccessError')
      codes.push(code)
    },
  }
  assert.throws(() => webSocketTransport(socket).send('x'), /takes too little/)
  assert.deepEqual(codes, [3013])
})

/** Both sides, in one program: the quick starts of the protocol, and what must not get lost. */

import assert from 'node:assert/strict'
import { test } from 'node:test'

import { AgentSocketClient } from '../agent-socket/client.js'
import {
  InMemoryTransport,
  initialRuntimeState,
  makeEnvelope,
  MemoryEventStore,
  serializeEnvelope,
  type AgentSocketEnvelope,
  type AgentSocketTransport,
} from '../agent-socket/index.js'
import { createAgentSocketServerSession, type AgentSocketServerSession } from '../agent-socket/server.js'

/** Everything that is on its way arrives. */
const settled = (): Promise<void> => new Promise((done) => setTimeout(done, 5))

function session(transport: AgentSocketTransport, store: MemoryEventStore, generation = 'g1'): AgentSocketServerSession {
  return createAgentSocketServerSession(transport, {
    runtimeGeneration: generation,
    store,
    handlers: {
      getState: () => initialRuntimeState(generation),
      onStartTurn: ({ turnId = '', payload, emit }) => {
        emit({ type: 'turn_queued', turnId, payload })
        emit({ type: 'turn_text_delta', turnId, payload: { delta: 'hi' } })
        emit({ type: 'turn_done', turnId })
      },
    },
  })
}

function watch(client: AgentSocketClient): AgentSocketEnvelope[] {
  const seen: AgentSocketEnvelope[] = []
  client.on('*', (event) => event.seq !== undefined && seen.push(event))
  return seen
}

test('a turn from its start to its end', async () => {
  const [here, there] = InMemoryTransport.pair()
  const server = session(there, new MemoryEventStore())
  server.emit('turn_phase', { phase: 'before anybody came' })
  const client = new AgentSocketClient({ clientId: 'c', transport: here })
  const seen = watch(client)
  const deltas: unknown[] = []
  client.on<{ delta: string }>('turn_text_delta', ({ payload }) => deltas.push(payload?.delta))
  client.connect()
  client.startTurn({ text: 'hello' }, 't-1')
  client.startTurn({ text: 'hello' }, 't-1')
  await settled()
  server.emit('turn_start', {}, { turnId: 't-2' })
  await settled()
  assert.deepEqual(seen.map(({ type }) => type), ['turn_phase', 'turn_queued', 'turn_text_delta', 'turn_done', 'turn_start'])
  assert.deepEqual(seen.map(({ seq }) => seq), [1, 2, 3, 4, 5])
  assert.deepEqual(deltas, ['hi'])
  assert.equal(client.generation, 'g1')
  assert.equal(client.state?.activeTurn?.id, 't-2')
  client.close()
})

test('who was away gets the rest once', async () => {
  const store = new MemoryEventStore()
  let server: AgentSocketServerSession | undefined
  let cut: InMemoryTransport | undefined
  const client = new AgentSocketClient({
    clientId: 'c',
    pauseMs: 1,
    transport: () => {
      const [here, there] = InMemoryTransport.pair()
      cut = there
      server = session(there, store)
      return here
    },
  })
  const seen = watch(client)
  client.connect()
  await settled()
  server?.emit('turn_phase', { phase: '1' })
  await settled()
  cut?.close(1001)
  client.startTurn({}, 't-1')
  store.append({ ...makeEnvelope('turn_phase', {}, { clientId: 'c', seq: 2 }) })
  for (let tries = 0; tries < 100 && seen.length < 5; tries += 1) await settled()
  assert.deepEqual(seen.map(({ seq }) => seq), [1, 2, 3, 4, 5])
  client.lastSeenSeq = 3
  client.requestReplay(3)
  await settled()
  assert.deepEqual(seen.map(({ seq }) => seq), [1, 2, 3, 4, 5, 4, 5], 'asked for again on purpose')
  client.close()
})

/** A server that closes `cut` connections: every second one before it hears a request, the others before it is heard. */
function cutting(store: MemoryEventStore, cuts: number, decided: unknown[]): () => AgentSocketTransport {
  let connections = 0
  return () => {
    const [here, there] = InMemoryTransport.pair()
    const number = (connections += 1)
    const cut = (): void => there.close(1001)
    createAgentSocketServerSession(
      {
        send: (data) => {
          const { type } = JSON.parse(data as string) as AgentSocketEnvelope
          if (number <= cuts && number % 2 === 0 && type === 'ack') cut()
          else there.send(data)
        },
        close: (code, reason) => there.close(code, reason),
        onMessage: (handler) =>
          there.onMessage((data) => {
            const { type } = JSON.parse(data as string) as AgentSocketEnvelope
            if (number <= cuts && number % 2 === 1 && type === 'approval_resolve') cut()
            else handler(data)
          }),
        onClose: (handler) => there.onClose(handler),
      },
      {
        runtimeGeneration: 'g1',
        store,
        handlers: { getState: () => initialRuntimeState('g1'), onApprovalResolve: ({ payload }) => void decided.push(payload) },
      },
    )
    return here
  }
}

test('a request is said until it is answered, and taken once', async () => {
  for (const cuts of [0, 1, 2, 3, 4, 5]) {
    const decided: unknown[] = []
    const acked: string[] = []
    const events = new MemoryEventStore()
    let seq = 0
    const client = new AgentSocketClient({ clientId: 'c', pauseMs: 1, transport: cutting(events, cuts, decided) })
    client.on('ack', ({ requestId = '' }) => acked.push(requestId))
    client.connect()
    await settled()
    // Whatever else comes answers nothing.
    client.on('ack', () => events.append({ ...makeEnvelope('approval_request', {}, { clientId: 'c', operationId: 'o', seq: (seq += 1) }) }))
    client.send('approval_resolve', { approved: 1 }, { operationId: 'o' })
    client.send('approval_resolve', { approved: 2 }, { operationId: 'o' })
    for (let tries = 0; tries < 200 && new Set(acked).size < 2; tries += 1) await settled()
    assert.deepEqual(decided, [{ approved: 1 }, { approved: 2 }], `${cuts} connections lost`)
    assert.equal(new Set(acked).size, 2)
    client.close()
  }
})

test('a server that acknowledges nothing is asked again while it is not known whether it heard', async () => {
  const heard: AgentSocketEnvelope[] = []
  let peer: InMemoryTransport | undefined
  const client = new AgentSocketClient({
    clientId: 'c',
    pauseMs: 1,
    transport: () => {
      const [here, there] = InMemoryTransport.pair()
      peer = there
      there.onMessage((data) => {
        const envelope = JSON.parse(data as string) as AgentSocketEnvelope
        heard.push(envelope)
        if (envelope.type === 'hello') there.send(serializeEnvelope(makeEnvelope('welcome', { latestSeq: 0, heartbeatMs: 10 })))
      })
      return here
    },
  })
  const times = (): number => heard.filter(({ type }) => type === 'attachment_ready').length
  const beats = async (count: number): Promise<void> => {
    for (let beat = 0; beat < count; beat += 1) {
      await new Promise((done) => setTimeout(done, 10))
      peer?.send(serializeEnvelope(makeEnvelope('heartbeat')))
    }
  }
  client.connect()
  await settled()
  client.send('attachment_ready', { file: 1 })
  await settled()
  assert.equal(times(), 1)
  peer?.close(1001)
  for (let tries = 0; tries < 100 && times() < 2; tries += 1) await settled()
  assert.equal(times(), 2, 'over the next connection')
  await beats(6)
  peer?.close(1001)
  await beats(2)
  assert.equal(times(), 2, 'not any more after it must have been heard')
  client.close()
})

test('what is missing is noticed, and what is gone is told', async () => {
  const [here, there] = InMemoryTransport.pair()
  const client = new AgentSocketClient({ clientId: 'c', transport: here, ackEvery: 2 })
  const said: AgentSocketEnvelope[] = []
  there.onMessage((data) => said.push(JSON.parse(data as string) as AgentSocketEnvelope))
  const tell = async (type: 'welcome' | 'turn_phase' | 'replay_events', payload: unknown, fields = {}): Promise<void> => {
    there.send(serializeEnvelope({ ...makeEnvelope(type, payload), ...fields }))
    await settled()
  }
  const seen = watch(client)
  client.connect()
  await tell('welcome', { latestSeq: 0, heartbeatMs: 15_000 })
  await tell('turn_phase', {}, { seq: 1, prev: 0 })
  await tell('turn_phase', {}, { seq: 3, prev: 2 })
  assert.equal(seen.length, 1, 'it waits for what is before it')
  assert.equal(said.at(-1)?.type, 'replay_request')
  await tell('replay_events', { since: 1, until: 2, more: false, events: [{ ...makeEnvelope('turn_phase'), seq: 2 }] })
  await tell('turn_phase', {}, { seq: 3, prev: 2 })
  assert.deepEqual(seen.map(({ seq }) => seq), [1, 2, 3])
  assert.deepEqual(said.filter(({ type }) => type === 'ack').map(({ ack }) => ack), [2])
  client.close()

  const store = new MemoryEventStore({ maxEvents: 2 })
  const [ours, theirs] = InMemoryTransport.pair()
  session(theirs, store)
  for (let seq = 1; seq <= 5; seq += 1) store.append(makeEnvelope('turn_phase', {}, { clientId: 'c', seq }))
  const late = new AgentSocketClient({ clientId: 'c', transport: ours })
  const gone: unknown[] = []
  late.on<{ gone?: unknown }>('replay_events', ({ payload }) => gone.push(payload?.gone))
  late.connect()
  await settled()
  assert.deepEqual([gone, late.seq, store.nextSeq('c')], [[[0, 3]], 5, 6])
  late.close()
})

test('two tabs of one client over one store see the same', async () => {
  const store = new MemoryEventStore()
  const tabs = [1, 2].map(() => {
    const [here, there] = InMemoryTransport.pair()
    const server = session(there, store)
    const client = new AgentSocketClient({ clientId: 'c', transport: here })
    const seen = watch(client)
    client.connect()
    return { server, client, seen }
  })
  await settled()
  const [one, other] = tabs as [(typeof tabs)[0], (typeof tabs)[0]]
  one.server.emit('turn_phase', { phase: '1' })
  other.server.emit('turn_phase', { phase: '2' })
  one.server.emit('turn_phase', { phase: '3' })
  await settled()
  // Begun in both, it runs once.
  one.client.startTurn({}, 't')
  other.client.startTurn({}, 't')
  await settled()
  for (const { seen, client } of tabs) {
    assert.deepEqual(seen.map(({ seq }) => seq), [1, 2, 3, 4, 5, 6])
    assert.ok(client.connected)
    client.close()
  }
})

test('a store that takes its time keeps the order, and a turn that failed may be begun again', async () => {
  const store = new MemoryEventStore()
  const slow = {
    append: async (event: AgentSocketEnvelope) => {
      await settled()
      store.append(event)
    },
    getSince: async (clientId: string, seq: number) => {
      await settled()
      return store.getSince(clientId, seq)
    },
    latestSeq: async (clientId: string) => {
      await settled()
      return store.latestSeq(clientId)
    },
  }
  let tries = 0
  const client = new AgentSocketClient({
    clientId: 'c',
    pauseMs: 1,
    transport: () => {
      const [here, there] = InMemoryTransport.pair()
      const server = createAgentSocketServerSession(there, {
        runtimeGeneration: 'g',
        store: slow,
        handlers: {
          getState: async () => {
            await settled()
            return initialRuntimeState('g')
          },
          onStartTurn: ({ turnId = '', emit }) => {
            tries += 1
            if (tries < 3) throw new Error('not now')
            emit({ type: 'turn_running', turnId })
            emit({ type: 'turn_done', turnId })
          },
        },
      })
      server.emit('turn_phase', { phase: 'early' })
      return here
    },
  })
  const seen = watch(client)
  const refused: unknown[] = []
  client.on<{ error?: string }>('ack', ({ payload }) => {
    if (payload?.error === undefined) return
    refused.push(payload.error)
    client.startTurn({}, 't')
  })
  client.connect()
  client.startTurn({}, 't')
  for (let waits = 0; waits < 400 && !seen.some(({ type }) => type === 'turn_done'); waits += 1) await settled()
  assert.equal(tries, 3)
  assert.deepEqual(refused, ['Error: not now', 'Error: not now'], 'nothing says it again by itself')
  const seqs = seen.map(({ seq = 0 }) => seq)
  assert.deepEqual(seqs, seqs.map((_, at) => at + 1))
  assert.deepEqual(seen.slice(-2).map(({ type }) => type), ['turn_running', 'turn_done'])
  client.close()
})

test('a quiet side is lost only if it promised heartbeats', async () => {
  const heartbeatMs = 20
  const wait = (beats: number): Promise<void> => new Promise((done) => setTimeout(done, beats * heartbeatMs))
  const handlers = { getState: () => initialRuntimeState('g') }
  // A client of the published package says nothing by itself, and stays; it hears that the server is there.
  const [quiet, there] = InMemoryTransport.pair()
  createAgentSocketServerSession(there, { runtimeGeneration: 'g', handlers, heartbeatMs })
  const heard: string[] = []
  let closed = 0
  quiet.onMessage((data) => heard.push((JSON.parse(data as string) as AgentSocketEnvelope).type))
  quiet.onClose(() => (closed += 1))
  quiet.send(serializeEnvelope({ ...makeEnvelope('hello'), clientId: 'c' }))
  await wait(8)
  assert.equal(closed, 0)
  assert.ok(heard.filter((type) => type === 'heartbeat').length >= 2, String(heard))
  // One that sent heartbeats, and stops, is gone.
  quiet.send(serializeEnvelope(makeEnvelope('heartbeat')))
  await wait(8)
  assert.equal(closed, 1)
  // Our client stays with a server that promised none, and leaves one that did.
  for (const [promised, left] of [[undefined, 0], [heartbeatMs, 1]] as const) {
    const [here, server] = InMemoryTransport.pair()
    let ends = 0
    server.onClose(() => (ends += 1))
    const client = new AgentSocketClient({ clientId: 'c', transport: here })
    client.connect()
    // The interval stays; the promise is that of the last welcome.
    server.send(serializeEnvelope(makeEnvelope('welcome', { latestSeq: 0, heartbeatMs })))
    await settled()
    server.send(serializeEnvelope(makeEnvelope('welcome', { latestSeq: 0, ...(promised === undefined ? {} : { heartbeatMs: promised }) })))
    await wait(10)
    assert.equal(ends, left)
    client.close()
  }
})

test('what is not allowed closes the connection', async () => {
  for (const [frame, code] of [
    ['nothing', 1007],
    [serializeEnvelope(makeEnvelope('turn_start')), 1008],
    [serializeEnvelope({ ...makeEnvelope('hello'), version: 2 as 1 }), 1002],
  ] as const) {
    const [here, there] = InMemoryTransport.pair()
    session(there, new MemoryEventStore())
    const closed = new Promise((done) => here.onClose(done))
    here.send(frame)
    assert.equal(((await closed) as { code: number }).code, code)
  }
})

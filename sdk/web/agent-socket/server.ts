/** The runtime's side, for one connection: events are kept before they are sent, and a turn that is begun twice runs once. */

import {
  isEventType,
  makeEnvelope,
  parseEnvelope,
  serializeEnvelope,
  type AgentSocketEnvelope,
  type AgentSocketEventType,
  type AgentSocketMeta,
} from './envelope.js'
import { SILENT_BEATS } from './life.js'
import type { AgentRuntimeState } from './state.js'
import { MemoryEventStore, type AgentSocketEventStore } from './store.js'
import type { AgentSocketTransport } from './transport.js'

export type { AgentSocketEventStore, AgentSocketTransport, AgentRuntimeState, AgentSocketEnvelope }

export type AgentSocketServerHandlers = {
  getState: (clientId: string) => AgentRuntimeState | Promise<AgentRuntimeState>
  onStartTurn?: (args: {
    clientId: string
    turnId?: string
    payload: unknown
    emit: (event: EmittedEvent) => void
  }) => void | Promise<void>
  onAbortTurn?: (args: { clientId: string; turnId?: string; payload: unknown }) => void | Promise<void>
  onApprovalResolve?: (args: { clientId: string; operationId?: string; payload: unknown }) => void | Promise<void>
}

/** An event to be emitted: an envelope, or what of one is not always the same. */
export type EmittedEvent = Pick<AgentSocketEnvelope, 'type'> & Partial<AgentSocketEnvelope>

export type AgentSocketServerOptions = {
  runtimeGeneration: string
  handlers: AgentSocketServerHandlers
  store?: AgentSocketEventStore
  /** After how long without a word it says that it is there; 15 s, if not given. */
  heartbeatMs?: number
  /** Characters of a frame that it sends, at most, if no single event has more: replays come in parts. 1 MiB, if not given. */
  frameCharsMax?: number
}

const FRAME_CHARS_MAX = 1024 * 1024

const HEARTBEAT_MS = 15_000
/** Turns, and requests, that are remembered, so that they are not begun twice. */
const KNOWN_MAX = 1000
/** How long what a client asked is remembered after its last session. */
const COMES_BACK_MS = 600_000
/** How often a state is asked for again because events came meanwhile. */
const SNAPSHOTS_MAX = 5
const EARLY_MAX = 1000

/** The last things of a kind that were heard of, by their ids. */
class Recent<T> {
  readonly #byId = new Map<string, T>()

  get(id: string): T | undefined {
    return this.#byId.get(id)
  }

  set(id: string, about: T): void {
    this.#byId.set(id, about)
    const oldest = this.#byId.keys().next().value
    if (this.#byId.size > KNOWN_MAX && oldest !== undefined) this.#byId.delete(oldest)
  }

  delete(id: string): void {
    this.#byId.delete(id)
  }
}

/** What all sessions of one client over one store share: its numbers, and the order in which its events are kept. */
class ClientStream {
  static readonly #all = new WeakMap<AgentSocketEventStore, Map<string, WeakRef<ClientStream>>>()

  static #forgetAt = 1024

  /** Those whose sessions left not long ago: nobody else may hold them. */
  static readonly #left = new Map<ClientStream, ReturnType<typeof setTimeout>>()

  readonly sessions = new Set<AgentSocketServerSession>()
  readonly turns = new Recent<true>()
  /** Requests that were taken, and whether they are done. */
  readonly requests = new Recent<boolean>()
  /** The last number that was given to an event, and the last one that is kept. */
  numbered = 0
  kept = 0
  /** What is to be kept, one after the other. */
  work: Promise<void> = Promise.resolve()

  static of(store: AgentSocketEventStore, clientId: string): ClientStream {
    const streams = ClientStream.#all.get(store) ?? new Map<string, WeakRef<ClientStream>>()
    ClientStream.#all.set(store, streams)
    const known = streams.get(clientId)?.deref()
    if (known !== undefined) return known
    // Those of clients that left, when their number has doubled.
    if (streams.size >= ClientStream.#forgetAt) {
      for (const [id, stream] of streams) if (stream.deref() === undefined) streams.delete(id)
      ClientStream.#forgetAt = Math.max(1024, streams.size * 2)
    }
    const stream = new ClientStream()
    streams.set(clientId, new WeakRef(stream))
    return stream
  }

  /** What was asked is known to a client that comes back. */
  leave(session: AgentSocketServerSession): void {
    this.sessions.delete(session)
    const others = ClientStream.#left.get(this)
    clearTimeout(others)
    const forgets = setTimeout(() => ClientStream.#left.delete(this), COMES_BACK_MS)
    // A program that has nothing else to do may end.
    ;(forgets as { unref?: () => void }).unref?.()
    ClientStream.#left.set(this, forgets)
  }
}

export class AgentSocketServerSession {
  readonly #transport: AgentSocketTransport
  readonly #options: AgentSocketServerOptions
  readonly #store: AgentSocketEventStore
  readonly #heartbeatMs: number
  #clientId: string | undefined
  #socketId: string | undefined
  #stream: ClientStream | undefined
  /** The last event that was sent without being asked for. */
  #sent = 0
  #early: (() => void)[] = []
  #beats: ReturnType<typeof setInterval> | undefined
  #heardAt = Date.now()
  #saidAt = Date.now()
  /** Whether the client sends heartbeats: the published package has none, and is not lost when it is quiet. */
  #hasBeats = false
  #isGone = false
  /** What came or is to be kept, one after the other. */
  #work: Promise<void> = Promise.resolve()

  constructor(transport: AgentSocketTransport, options: AgentSocketServerOptions) {
    this.#transport = transport
    this.#options = options
    this.#store = options.store ?? new MemoryEventStore()
    this.#heartbeatMs = options.heartbeatMs ?? HEARTBEAT_MS
    transport.onMessage((data) => {
      // Not when its turn comes: a store or a state may take long.
      this.#heardAt = Date.now()
      this.#then(() => this.#hear(data))
    })
    transport.onClose(() => {
      this.#isGone = true
      clearInterval(this.#beats)
      this.#stream?.leave(this)
    })
  }

  /** Keeps an event, and then sends it to every session of the client over this store. What is emitted before the client said hello waits for that, and has no number yet. */
  emit<T>(type: AgentSocketEventType, payload?: T, meta: AgentSocketMeta = {}): AgentSocketEnvelope<T> {
    if (!isEventType(type)) throw new Error(`${type} is no event`)
    const stream = this.#stream
    if (stream === undefined) {
      if (this.#early.length >= EARLY_MAX) throw new Error(`${EARLY_MAX} events wait for a hello already`)
      this.#early.push(() => this.emit(type, payload, meta))
      return makeEnvelope(type, payload, meta)
    }
    stream.numbered += 1
    const seq = stream.numbered
    const envelope = this.#own(makeEnvelope(type, payload, { ...meta, seq }))
    stream.work = stream.work
      .then(async () => {
        await this.#store.append(envelope)
        stream.kept = Math.max(stream.kept, seq)
        for (const session of stream.sessions) session.#pass(envelope)
      })
      .catch((error: unknown) => {
        // What is not kept is lost: every session that would miss it begins anew.
        for (const session of [this, ...stream.sessions]) session.#transport.close(1011, String(error).slice(0, 100))
      })
    return envelope
  }

  /** Sends an event that was kept. */
  #pass(envelope: AgentSocketEnvelope): void {
    const prev = this.#sent
    this.#sent = Math.max(prev, envelope.seq ?? prev)
    this.#put({ ...envelope, prev } as AgentSocketEnvelope)
  }

  #then(work: () => Promise<void>): void {
    this.#work = this.#work.then(work).catch((error: unknown) => this.#transport.close(1011, String(error).slice(0, 100)))
  }

  async #hear(data: string | ArrayBuffer | Uint8Array): Promise<void> {
    let envelope: AgentSocketEnvelope
    try {
      envelope = parseEnvelope(data)
    } catch (error) {
      const field = (error as { field?: string }).field
      const code = field === 'protocol' || field === 'version' ? 1002 : 1007
      this.#transport.close(code, String((error as Error).message).slice(0, 100))
      return
    }
    if (envelope.type === 'hello') return this.#hello(envelope)
    if (this.#clientId === undefined) {
      this.#transport.close(1008, `${envelope.type} before hello`)
      return
    }
    switch (envelope.type) {
      case 'heartbeat':
        this.#hasBeats = true
        return
      case 'state_request':
        return this.#snapshot()
      case 'replay_request':
        return this.#replay(envelope.payload as { since?: number; until?: number; max?: number } | undefined)
      case 'ack':
        return
    }
    if (isEventType(envelope.type)) return this.#asked(envelope)
  }

  /** Something for the runtime, which has it once. */
  async #asked(envelope: AgentSocketEnvelope): Promise<void> {
    const { requestId } = envelope
    const requests = this.#stream?.requests
    const taken = requestId === undefined ? undefined : requests?.get(requestId)
    // It is acknowledged when it is done.
    if (taken === false) return
    if (taken === true) {
      if (envelope.type === 'turn_start') await this.#snapshot()
      return this.#acknowledge(requestId)
    }
    if (requestId !== undefined) requests?.set(requestId, false)
    try {
      if (envelope.type === 'turn_start' && (await this.#isBegun(envelope))) {
        await this.#snapshot()
        return this.#done(requestId)
      }
    } catch (error) {
      if (requestId !== undefined) requests?.delete(requestId)
      throw error
    }
    this.#run(async () => {
      try {
        await this.#handler(envelope)
      } catch (error) {
        // Begun again, it runs again; what it emitted is in the store, which knows it then.
        if (envelope.type === 'turn_start' && envelope.turnId !== undefined) this.#stream?.turns.delete(envelope.turnId)
        if (requestId === undefined) throw error
        // It is not said again by itself: a handler that fails may have done half of it.
        requests?.set(requestId, true)
        return this.#acknowledge(requestId, { error: String(error).slice(0, 500), code: 'ERR_HANDLER' })
      }
      this.#done(requestId)
    })
  }

  #handler(envelope: AgentSocketEnvelope): void | Promise<void> {
    const { handlers } = this.#options
    if (envelope.type === 'turn_aborted') return handlers.onAbortTurn?.(this.#about(envelope, 'turnId'))
    if (envelope.type === 'approval_resolve') return handlers.onApprovalResolve?.(this.#about(envelope, 'operationId'))
    if (envelope.type !== 'turn_start') return undefined
    const emit = ({ type, payload, turnId, operationId, ts }: EmittedEvent): void => {
      const meta: AgentSocketMeta = {}
      if (turnId !== undefined) meta.turnId = turnId
      if (operationId !== undefined) meta.operationId = operationId
      if (ts !== undefined) meta.ts = ts
      this.emit(type, payload, meta)
    }
    return handlers.onStartTurn?.({ ...this.#about(envelope, 'turnId'), emit })
  }

  #done(requestId: string | undefined): void {
    if (requestId !== undefined) this.#stream?.requests.set(requestId, true)
    this.#acknowledge(requestId)
  }

  #acknowledge(requestId: string | undefined, payload?: { error: string; code: string }): void {
    if (requestId !== undefined) this.#put(this.#own({ ...makeEnvelope('ack', payload), requestId }))
  }

  async #hello(envelope: AgentSocketEnvelope): Promise<void> {
    if (this.#clientId !== undefined || !envelope.clientId) {
      this.#transport.close(this.#clientId === undefined ? 1007 : 1008, 'hello: once, and with a clientId')
      return
    }
    this.#clientId = envelope.clientId
    this.#socketId = envelope.socketId ?? crypto.randomUUID()
    const stream = ClientStream.of(this.#store, envelope.clientId)
    const latest = await this.#store.latestSeq(envelope.clientId)
    if (this.#isGone) return
    // From here on without a pause: what is kept next is sent, and what was kept before is asked for.
    stream.kept = Math.max(stream.kept, latest)
    stream.numbered = Math.max(stream.numbered, stream.kept)
    this.#sent = stream.kept
    stream.sessions.add(this)
    this.#stream = stream
    const heartbeatMs = this.#heartbeatMs
    const silenceMs = heartbeatMs * SILENT_BEATS
    const payload = { version: 1, latestSeq: this.#sent, heartbeatMs, silenceMs, acksRequests: true }
    this.#put(this.#own(makeEnvelope('welcome', payload)))
    const hello = (envelope.payload ?? {}) as { runtimeGeneration?: string | null; versions?: number[] }
    const from = hello.runtimeGeneration ?? envelope.runtimeGeneration ?? null
    const to = this.#options.runtimeGeneration
    if (from !== null && from !== to) this.#put(this.#own(makeEnvelope('runtime_generation_changed', { from, to })))
    this.#beats = setInterval(() => this.#beat(), heartbeatMs / 2)
    // A program that has nothing else to do may end.
    ;(this.#beats as { unref?: () => void }).unref?.()
    // Before anything that is emitted while the state is asked for.
    this.#early.splice(0).forEach((emit) => emit())
    await this.#snapshot()
  }

  #beat(): void {
    const now = Date.now()
    if (this.#hasBeats && now - this.#heardAt >= this.#heartbeatMs * SILENT_BEATS) {
      this.#transport.close(1001, `nothing was heard for ${SILENT_BEATS} heartbeats`)
      return
    }
    if (now - this.#saidAt >= this.#heartbeatMs) this.#put(this.#own(makeEnvelope('heartbeat', { latestSeq: this.#sent })))
  }

  async #snapshot(): Promise<void> {
    const kept = (): number => this.#stream?.kept ?? 0
    let [seq, state] = [kept(), await this.#options.handlers.getState(this.#clientId ?? '')]
    // Of a state that was asked for while events were kept, it is unknown which of them it has in it.
    for (let tries = 0; seq !== kept() && tries < SNAPSHOTS_MAX; tries += 1) {
      ;[seq, state] = [kept(), await this.#options.handlers.getState(this.#clientId ?? '')]
    }
    this.#put(this.#own(makeEnvelope('state_snapshot', { ...state, seq })))
  }

  async #replay(asked: { since?: number; until?: number; max?: number } = {}): Promise<void> {
    const { since = 0, max = 10_000 } = asked
    const until = Math.min(asked.until ?? Infinity, Math.max(this.#sent, this.#stream?.kept ?? 0))
    const all = await this.#store.getSince(this.#clientId ?? '', since)
    const wanted = all.filter(({ seq = 0 }) => seq <= until)
    const events = wanted.slice(0, max)
    const rest = events.length < wanted.length
    const first = wanted[0]?.seq ?? since + 1
    const isGone = first > since + 1
    const parts = inParts(events, this.#options.frameCharsMax ?? FRAME_CHARS_MAX)
    let from = since
    parts.forEach((part, at) => {
      const more = at < parts.length - 1
      const to = more || rest ? part.at(-1)?.seq : Math.max(since, until)
      const payload: Record<string, unknown> = { since: from, until: to, more, events: part }
      if (rest && !more) payload['rest'] = true
      if (isGone && at === 0) payload['gone'] = [since, first - 1]
      this.#put(this.#own(makeEnvelope('replay_events', payload)))
      from = to ?? from
    })
    if (isGone) await this.#snapshot()
  }

  /** Whether a turn runs already, or ran. If not, it is noted that it does. */
  async #isBegun({ turnId }: AgentSocketEnvelope): Promise<boolean> {
    if (turnId === undefined) return false
    const turns = this.#stream?.turns
    if (turns?.get(turnId)) return true
    const kept = await this.#store.getSince(this.#clientId ?? '', 0)
    // Another tab may have begun it in the meantime.
    if (turns?.get(turnId) || kept.some((event) => event.turnId === turnId)) return true
    turns?.set(turnId, true)
    return false
  }

  #about<K extends 'turnId' | 'operationId'>(
    envelope: AgentSocketEnvelope,
    what: K,
  ): { clientId: string; payload: unknown } & { [key in K]?: string } {
    const about: Record<string, unknown> = { clientId: this.#clientId, payload: envelope.payload }
    if (envelope[what] !== undefined) about[what] = envelope[what]
    return about as { clientId: string; payload: unknown } & { [key in K]?: string }
  }

  /** Runs a handler, which what comes next does not wait for. */
  #run(handler: () => void | Promise<void>): void {
    void Promise.resolve()
      .then(handler)
      .catch((error: unknown) => this.#transport.close(1011, String(error).slice(0, 100)))
  }

  #own<T>(envelope: AgentSocketEnvelope<T>): AgentSocketEnvelope<T> {
    const own = { runtimeGeneration: this.#options.runtimeGeneration, ...envelope }
    if (this.#clientId !== undefined) own.clientId = this.#clientId
    if (this.#socketId !== undefined && !isEventType(envelope.type)) own.socketId = this.#socketId
    return own
  }

  #put(envelope: AgentSocketEnvelope): void {
    this.#saidAt = Date.now()
    try {
      this.#transport.send(serializeEnvelope(envelope))
    } catch {
      // Whoever is gone gets it when it is back.
    }
  }
}

/** Events by the frames that they fit: at least one frame, and one event at least in each if there are any. */
function inParts(events: AgentSocketEnvelope[], charsMax: number): AgentSocketEnvelope[][] {
  const parts: AgentSocketEnvelope[][] = [[]]
  let chars = 0
  for (const event of events) {
    const own = serializeEnvelope(event).length
    const part = parts.at(-1)!
    if (part.length > 0 && chars + own > charsMax) {
      parts.push([event])
      chars = own
    } else {
      part.push(event)
      chars += own
    }
  }
  return parts
}

export function createAgentSocketServerSession(
  transport: AgentSocketTransport,
  options: AgentSocketServerOptions,
): AgentSocketServerSession {
  return new AgentSocketServerSession(transport, options)
}

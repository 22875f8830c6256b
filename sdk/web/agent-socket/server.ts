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
}

const HEARTBEAT_MS = 15_000
const TURNS_MAX = 1000
const EARLY_MAX = 1000

export class AgentSocketServerSession {
  readonly #transport: AgentSocketTransport
  readonly #options: AgentSocketServerOptions
  readonly #store: AgentSocketEventStore
  readonly #turns = new Set<string>()
  #clientId: string | undefined
  #socketId: string | undefined
  #last = 0
  #early: (() => void)[] = []
  /** What came or is to be kept, one after the other. */
  #work: Promise<void> = Promise.resolve()

  constructor(transport: AgentSocketTransport, options: AgentSocketServerOptions) {
    this.#transport = transport
    this.#options = options
    this.#store = options.store ?? new MemoryEventStore()
    transport.onMessage((data) => this.#then(() => this.#hear(data)))
  }

  /** Keeps an event, and then sends it. What is emitted before the client said hello waits for that, and has no number yet. */
  emit<T>(type: AgentSocketEventType, payload?: T, meta: AgentSocketMeta = {}): AgentSocketEnvelope<T> {
    if (!isEventType(type)) throw new Error(`${type} is no event`)
    if (this.#clientId === undefined) {
      if (this.#early.length >= EARLY_MAX) throw new Error(`${EARLY_MAX} events wait for a hello already`)
      this.#early.push(() => this.emit(type, payload, meta))
      return makeEnvelope(type, payload, meta)
    }
    const prev = this.#last
    this.#last += 1
    const envelope = this.#own(makeEnvelope(type, payload, { ...meta, seq: this.#last }))
    this.#then(async () => {
      await this.#store.append(envelope)
      this.#put({ ...envelope, prev } as AgentSocketEnvelope)
    })
    return envelope
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
      case 'state_request':
        return this.#snapshot()
      case 'replay_request':
        return this.#replay(envelope.payload as { since?: number; until?: number; max?: number } | undefined)
      case 'turn_start':
        return this.#start(envelope)
      case 'turn_aborted':
        this.#run(() => this.#options.handlers.onAbortTurn?.(this.#about(envelope, 'turnId')))
        return
      case 'approval_resolve':
        this.#run(() => this.#options.handlers.onApprovalResolve?.(this.#about(envelope, 'operationId')))
        return
    }
  }

  async #hello(envelope: AgentSocketEnvelope): Promise<void> {
    if (this.#clientId !== undefined || !envelope.clientId) {
      this.#transport.close(this.#clientId === undefined ? 1007 : 1008, 'hello: once, and with a clientId')
      return
    }
    this.#clientId = envelope.clientId
    this.#socketId = envelope.socketId ?? crypto.randomUUID()
    this.#last = await this.#store.latestSeq(envelope.clientId)
    const payload = { version: 1, latestSeq: this.#last, heartbeatMs: HEARTBEAT_MS, silenceMs: HEARTBEAT_MS * 3 }
    this.#put(this.#own(makeEnvelope('welcome', payload)))
    const hello = (envelope.payload ?? {}) as { runtimeGeneration?: string | null; versions?: number[] }
    const from = hello.runtimeGeneration ?? envelope.runtimeGeneration ?? null
    const to = this.#options.runtimeGeneration
    if (from !== null && from !== to) this.#put(this.#own(makeEnvelope('runtime_generation_changed', { from, to })))
    await this.#snapshot()
    this.#early.splice(0).forEach((emit) => emit())
  }

  async #snapshot(): Promise<void> {
    const state = await this.#options.handlers.getState(this.#clientId ?? '')
    this.#put(this.#own(makeEnvelope('state_snapshot', { ...state, seq: this.#last })))
  }

  async #replay(asked: { since?: number; until?: number; max?: number } = {}): Promise<void> {
    const { since = 0, until = this.#last, max = 10_000 } = asked
    const all = await this.#store.getSince(this.#clientId ?? '', since)
    const wanted = all.filter(({ seq = 0 }) => seq <= until)
    const events = wanted.slice(0, max)
    const rest = events.length < wanted.length
    const first = wanted[0]?.seq ?? since + 1
    const payload: Record<string, unknown> = { since, until: rest ? events.at(-1)?.seq : Math.max(since, until), more: false, events }
    if (rest) payload['rest'] = true
    if (first > since + 1) payload['gone'] = [since, first - 1]
    this.#put(this.#own(makeEnvelope('replay_events', payload)))
    if (payload['gone']) await this.#snapshot()
  }

  async #start(envelope: AgentSocketEnvelope): Promise<void> {
    const { turnId } = envelope
    if (turnId !== undefined) {
      // It runs already, or it ran: that is what the asker wants to know.
      if (this.#turns.has(turnId)) return this.#snapshot()
      const kept = await this.#store.getSince(this.#clientId ?? '', 0)
      if (kept.some((event) => event.turnId === turnId)) return this.#snapshot()
      this.#turns.add(turnId)
      const oldest = this.#turns.values().next().value
      if (this.#turns.size > TURNS_MAX && oldest !== undefined) this.#turns.delete(oldest)
    }
    const emit = ({ type, payload, turnId: turn, operationId, ts }: EmittedEvent): void => {
      const meta: AgentSocketMeta = {}
      if (turn !== undefined) meta.turnId = turn
      if (operationId !== undefined) meta.operationId = operationId
      if (ts !== undefined) meta.ts = ts
      this.emit(type, payload, meta)
    }
    this.#run(() => this.#options.handlers.onStartTurn?.({ ...this.#about(envelope, 'turnId'), emit }))
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
    try {
      this.#transport.send(serializeEnvelope(envelope))
    } catch {
      // Whoever is gone gets it when it is back.
    }
  }
}

export function createAgentSocketServerSession(
  transport: AgentSocketTransport,
  options: AgentSocketServerOptions,
): AgentSocketServerSession {
  return new AgentSocketServerSession(transport, options)
}

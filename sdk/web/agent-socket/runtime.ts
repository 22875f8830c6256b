/**
 * A runtime of a Trunkline server, over one connection for all clients that its credential serves. What it emits is numbered and said
 * again until the server has it on disk; what it is asked, it is asked once.
 */

import {
  AGENT_SOCKET_VERSION,
  isEventType,
  makeEnvelope,
  parseEnvelope,
  serializeEnvelope,
  type AgentSocketEnvelope,
  type AgentSocketEventType,
  type AgentSocketMeta,
} from './envelope.js'
import { FINAL, SILENT_BEATS } from './life.js'
import { isTransport, webSocketTransport, type AgentSocketTransport, type WebSocketLike } from './transport.js'

/** What a client asks. */
export type RuntimeAsk = {
  clientId: string
  /** Which of the client's sockets said it; empty for what is said again by the server. */
  socketId: string
  turnId?: string
  operationId?: string
  payload: unknown
  /** Says something in the client's stream: of this turn and operation, unless `meta` says otherwise. */
  emit: <T>(type: AgentSocketEventType, payload?: T, meta?: AgentSocketMeta) => void
}

export type AgentSocketRuntimeHandlers = {
  /** Once for each turn. If it fails, the turn ends with `turn_error`. */
  onStartTurn: (ask: RuntimeAsk) => void | Promise<void>
  onAbortTurn?: (ask: RuntimeAsk) => void | Promise<void>
  onApprovalResolve?: (ask: RuntimeAsk) => void | Promise<void>
  /** Any other event of a client. */
  onEvent?: (type: AgentSocketEventType, ask: RuntimeAsk) => void | Promise<void>
}

export type AgentSocketRuntimeOptions = {
  /** Another one with every start of the program. */
  runtimeGeneration: string
  /** Makes a connection to `/agent-socket`, with a credential that serves clients (`trunkline token create … --runtime '*'`). */
  transport: () => AgentSocketTransport | WebSocketLike
  handlers: AgentSocketRuntimeHandlers
  /** Turns of the generation before that go on; the others are told lost. */
  recoveredTurns?: readonly string[]
  /** Pauses between attempts to connect: the first one, and the longest. 200 ms and 10 s, if not given. */
  pauseMs?: number
  pauseMaxMs?: number
  /** Called when the server let it in, and when the connection is lost. */
  onConnected?: (isConnected: boolean) => void
  /** The server will not have it: it does not come back by itself. */
  onRefused?: (close: { code: number; reason: string }) => void
}

/** What waits for the server's word, at most: events, and characters of them. */
const UNKEPT_MAX = 10_000
const UNKEPT_CHARS_MAX = 8 * 1024 * 1024
/** Asks that are remembered, so that none is handled twice. */
const ASKS_MAX = 10_000
/** A server that does not let it in within so long is tried again, in milliseconds. */
const HELLO_MS = 10_000

export class AgentSocketRuntime {
  readonly #options: AgentSocketRuntimeOptions
  readonly #asks = new Set<number>()
  /** What the server has not said that it keeps, in order. */
  #unkept: { seq: number; text: string }[] = []
  #unkeptChars = 0
  #seq = 0
  #transport: AgentSocketTransport | undefined
  #isIn = false
  #isClosed = false
  #heartbeatMs = 15_000
  #heardAt = 0
  #pauseMs: number
  #beats: ReturnType<typeof setInterval> | undefined
  #retry: ReturnType<typeof setTimeout> | undefined
  #waiters: (() => void)[] = []

  constructor(options: AgentSocketRuntimeOptions) {
    this.#options = options
    this.#pauseMs = options.pauseMs ?? 200
  }

  /** Whether the server let it in, and the connection is there. */
  get connected(): boolean {
    return this.#isIn
  }

  /** Connects, and comes back by itself when the connection is lost. */
  connect(): void {
    this.#isClosed = false
    this.#connect()
  }

  /**
   * Says something in a client's stream, also while there is no connection: then it waits for one.
   *
   * @throws {Error} if it is no event, or 10,000 events, or 8 MiB of them, are not kept yet.
   */
  emit<T>(clientId: string, type: AgentSocketEventType, payload?: T, meta: AgentSocketMeta = {}): void {
    if (!isEventType(type)) throw new Error(`${type} is no event`)
    const { runtimeGeneration } = this.#options
    const seq = this.#seq + 1
    const text = serializeEnvelope(makeEnvelope(type, payload, { ...meta, clientId, runtimeGeneration, seq }))
    const isFull = this.#unkept.length >= UNKEPT_MAX || this.#unkeptChars + text.length > UNKEPT_CHARS_MAX
    if (isFull) throw new Error(`${this.#unkept.length} events with ${this.#unkeptChars} characters are not kept yet`)
    this.#seq = seq
    this.#unkept.push({ seq, text })
    this.#unkeptChars += text.length
    if (this.#isIn) this.#send(text)
  }

  /** Resolves when the server has everything that was emitted so far. */
  flushed(): Promise<void> {
    return this.#unkept.length === 0 ? Promise.resolve() : new Promise((resolve) => this.#waiters.push(resolve))
  }

  /** Ends the connection, for good. What is not kept yet is lost: wait for `flushed` before. */
  close(): void {
    this.#end()
    this.#transport?.close(1000, 'the runtime ends')
  }

  #connect(): void {
    clearTimeout(this.#retry)
    let connection: AgentSocketTransport | WebSocketLike
    try {
      connection = this.#options.transport()
    } catch {
      // The program's own way to connect failed; it may not the next time.
      return this.#left(1006, '')
    }
    const transport = isTransport(connection) ? connection : webSocketTransport(connection)
    this.#transport = transport
    this.#heardAt = Date.now()
    transport.onMessage((data) => transport === this.#transport && this.#hear(data))
    transport.onClose((event) => {
      const { code = 1006, reason = '' } = (event ?? {}) as { code?: number; reason?: string }
      if (transport === this.#transport) this.#left(code, String(reason))
    })
    // A close follows, which says all that there is to say.
    transport.onError?.(() => undefined)
    this.#beat(HELLO_MS / SILENT_BEATS)
    const { runtimeGeneration, recoveredTurns = [] } = this.#options
    this.#put(makeEnvelope('hello', { role: 'runtime', runtimeGeneration, recoveredTurns, versions: [AGENT_SOCKET_VERSION] }))
  }

  #hear(data: string | ArrayBuffer | Uint8Array): void {
    this.#heardAt = Date.now()
    let envelope: AgentSocketEnvelope
    try {
      envelope = parseEnvelope(data)
    } catch (error) {
      this.#transport?.close(1007, String((error as Error).message).slice(0, 100))
      return
    }
    if (envelope.type === 'welcome') return this.#welcome(envelope.payload as { heartbeatMs?: number; latestSeq?: number } | undefined)
    if (envelope.type === 'ack') return this.#keeps(envelope.ack ?? 0)
    if (isEventType(envelope.type)) this.#asked(envelope as AgentSocketEnvelope & { ask?: number })
  }

  #welcome({ heartbeatMs, latestSeq = 0 }: { heartbeatMs?: number; latestSeq?: number } = {}): void {
    if (heartbeatMs !== undefined && heartbeatMs > 0) this.#heartbeatMs = heartbeatMs
    this.#beat(this.#heartbeatMs)
    this.#isIn = true
    this.#pauseMs = this.#options.pauseMs ?? 200
    this.#keeps(latestSeq)
    this.#unkept.forEach(({ text }) => this.#send(text))
    this.#options.onConnected?.(true)
  }

  /** The server keeps everything up to a number. */
  #keeps(seq: number): void {
    const first = this.#unkept.findIndex((event) => event.seq > seq)
    for (const { text } of this.#unkept.splice(0, first < 0 ? this.#unkept.length : first)) this.#unkeptChars -= text.length
    if (this.#unkept.length === 0) this.#waiters.splice(0).forEach((resolve) => resolve())
  }

  #asked(envelope: AgentSocketEnvelope & { ask?: number }): void {
    const { ask: number, type, clientId = '', socketId = '', turnId, operationId, payload } = envelope
    const begins = type === 'turn_start' && turnId !== undefined
    // That it has a turn, it says by the turn's first event: until then, another runtime may have to begin it.
    if (number !== undefined && !begins) this.#put({ ...makeEnvelope('ack'), ask: number } as AgentSocketEnvelope)
    if (number !== undefined && !this.#isNew(number)) return
    const about = { ...(turnId === undefined ? {} : { turnId }), ...(operationId === undefined ? {} : { operationId }) }
    const emit: RuntimeAsk['emit'] = (type, payload, meta) => this.emit(clientId, type, payload, { ...about, ...meta })
    void this.#run(type, { clientId, socketId, payload, emit, ...about })
  }

  async #run(type: AgentSocketEventType, ask: RuntimeAsk): Promise<void> {
    const { handlers } = this.#options
    try {
      if (type === 'turn_start') await handlers.onStartTurn(ask)
      else if (type === 'turn_aborted') await handlers.onAbortTurn?.(ask)
      else if (type === 'approval_resolve') await handlers.onApprovalResolve?.(ask)
      else await handlers.onEvent?.(type, ask)
    } catch (error) {
      console.error(error)
      if (type === 'turn_start') this.#fail(ask, error)
    }
  }

  #fail(ask: RuntimeAsk, error: unknown): void {
    try {
      ask.emit('turn_error', { error: String(error).slice(0, 500) })
    } catch (full) {
      // The turn stays open until the next runtime says that it is lost.
      console.error(full)
    }
  }

  #isNew(number: number): boolean {
    if (this.#asks.has(number)) return false
    this.#asks.add(number)
    const oldest = this.#asks.values().next().value
    if (this.#asks.size > ASKS_MAX && oldest !== undefined) this.#asks.delete(oldest)
    return true
  }

  #put(envelope: AgentSocketEnvelope): void {
    this.#send(serializeEnvelope(envelope))
  }

  #send(text: string): void {
    try {
      this.#transport?.send(text)
    } catch {
      // It is closed: its close event comes, and events are sent again over the next connection.
    }
  }

  #beat(ms: number): void {
    clearInterval(this.#beats)
    this.#beats = setInterval(() => {
      if (Date.now() - this.#heardAt < ms * SILENT_BEATS) return this.#put(makeEnvelope('heartbeat'))
      // The connection is there, and dead.
      const transport = this.#transport
      this.#left(1006, '')
      transport?.close(4001, 'nothing was heard')
    }, ms)
  }

  #end(): void {
    this.#isClosed = true
    clearInterval(this.#beats)
    clearTimeout(this.#retry)
  }

  #left(code: number, reason: string): void {
    clearInterval(this.#beats)
    this.#transport = undefined
    const wasIn = this.#isIn
    this.#isIn = false
    if (wasIn) this.#options.onConnected?.(false)
    if (this.#isClosed) return
    if (FINAL.has(code)) {
      this.#end()
      return this.#options.onRefused?.({ code, reason })
    }
    clearTimeout(this.#retry)
    this.#retry = setTimeout(() => this.#isClosed || this.#connect(), this.#pauseMs * (1 - Math.random() / 2))
    this.#pauseMs = Math.min(this.#pauseMs * 2, this.#options.pauseMaxMs ?? 10_000)
  }
}

/** The UI's side: every event once and in order, whatever happens to the socket. */

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
import { newKey } from '../conversation/key.js'
import { FINAL, SILENT_BEATS } from './life.js'
import { foldRuntimeState, type AgentRuntimeState } from './state.js'
import { isTransport, webSocketTransport, type AgentSocketTransport, type WebSocketLike } from './transport.js'

export type { AgentSocketEnvelope, AgentSocketEventType, AgentSocketTransport, AgentRuntimeState, WebSocketLike }

type Connection = AgentSocketTransport | WebSocketLike

export type AgentSocketClientOptions = {
  /** Whose stream it shows. */
  clientId: string
  /** At a Trunkline server: the agent that is to be its runtime, such as `ag::prod::chat::one`. */
  agent?: string
  /** A connection; or what makes one, which is then asked again, after a pause, whenever a connection is lost. */
  transport: Connection | (() => Connection)
  lastSeenSeq?: number
  runtimeGeneration?: string | null
  /** It says what it had after so many events, and with each heartbeat; 0 is never by itself. */
  ackEvery?: number
  /** The first pause before it connects again, and the longest, in milliseconds. */
  pauseMs?: number
  pauseMaxMs?: number
}

type Handler = (event: AgentSocketEnvelope<never>) => void

/** Events that wait for what is before them; requests that are not answered. */
const HELD_MAX = 1000
const PENDING_MAX = 256

/** Longest wait for a sign of life after the network changed or the page was shown: a large replay may be on a slow line. */
const PROBE_MS = 3000

const ENDS: ReadonlySet<string> = new Set(['turn_done', 'turn_error', 'turn_aborted', 'turn_lost'])

type WelcomePayload = { latestSeq?: number; heartbeatMs?: number; acksRequests?: boolean }

/** A request that the server has not answered, and heartbeats since it was said over this connection. */
type Pending = { said: AgentSocketEnvelope; beats: number }

type ReplayPayload = { since?: number; until?: number; more?: boolean; rest?: boolean; gone?: [number, number]; events?: unknown[] }

export class AgentSocketClient {
  /** The last event that the handlers had. To be set before a connection is made, or asked for again from there. */
  lastSeenSeq: number

  readonly #options: AgentSocketClientOptions
  readonly #handlers = new Map<string, Handler[]>()
  #transport: AgentSocketTransport | undefined
  #socketId: string | undefined
  #generation: string | null
  #isIn = false
  #isReplaying = false
  #held: AgentSocketEnvelope[] = []
  #pending: Pending[] = []
  /** Whether the server answers each request by its id, and takes it once. */
  #acksRequests = false
  /** `#heard` at the last heartbeat. */
  #heardBefore = 0
  #state: AgentRuntimeState | undefined
  #stateSeq = 0
  #unacked = 0
  #heardAt = 0
  #saidAt = 0
  #heard = 0
  #heartbeatMs = 15_000
  /** Whether the other side sends heartbeats: the published package has none, and is not lost when it is quiet. */
  #hasBeats = false
  #beats: ReturnType<typeof setInterval> | undefined
  #retry: ReturnType<typeof setTimeout> | undefined
  #probing: ReturnType<typeof setTimeout> | undefined
  #unlisten: (() => void)[] = []
  #pauseMs: number
  #isClosed = false

  constructor(options: AgentSocketClientOptions) {
    this.#options = options
    this.lastSeenSeq = options.lastSeenSeq ?? 0
    this.#generation = options.runtimeGeneration ?? null
    this.#pauseMs = options.pauseMs ?? 200
  }

  /** The last event that the handlers had. */
  get seq(): number {
    return this.lastSeenSeq
  }

  /** The runtime that it knows. */
  get generation(): string | null {
    return this.#generation
  }

  /** How the runtime is, if that is known. */
  get state(): AgentRuntimeState | undefined {
    return this.#state
  }

  /** Whether it was let in, and the connection is there. */
  get connected(): boolean {
    return this.#isIn
  }

  /** Calls `handler` for each envelope of a type, or of every type for `*`: events once each, in order. */
  on<T>(type: AgentSocketEnvelope<T>['type'] | '*', handler: (event: AgentSocketEnvelope<T>) => void): void {
    const handlers = this.#handlers.get(type) ?? []
    this.#handlers.set(type, [...handlers, handler as Handler])
  }

  /** Connects, and says hello. */
  connect(): void {
    this.#isClosed = false
    clearTimeout(this.#retry)
    this.#listen()
    const { transport: given } = this.#options
    const connection = typeof given === 'function' ? given() : given
    const transport = isTransport(connection) ? connection : webSocketTransport(connection)
    if (transport !== this.#transport) {
      transport.onMessage((data) => transport === this.#transport && this.handleRaw(data))
      transport.onClose((event) => transport === this.#transport && this.#left(event))
      // A close follows, which says all that there is to say.
      transport.onError?.(() => undefined)
    }
    this.#transport = transport
    this.#heardAt = Date.now()
    this.#beat()
    const { agent } = this.#options
    const known = { lastSeenSeq: this.lastSeenSeq, runtimeGeneration: this.#generation, versions: [AGENT_SOCKET_VERSION] }
    const payload = agent === undefined ? known : { ...known, agent }
    this.#put(makeEnvelope('hello', payload))
  }

  /** Ends the connection, for good. */
  close(): void {
    this.#end()
    this.#transport?.close(1000, 'the client ends')
  }

  requestState(): void {
    this.#put(makeEnvelope('state_request'))
  }

  /** Asks for what was missed. What was seen already is not handled again, unless `lastSeenSeq` was set back. */
  requestReplay(since = this.lastSeenSeq): void {
    this.#isReplaying = true
    this.#put(makeEnvelope('replay_request', { since }))
  }

  /** Begins a turn. It runs once. */
  startTurn(payload: unknown, turnId: string): void {
    this.send('turn_start', payload, { turnId })
  }

  abortTurn(turnId: string): void {
    this.send('turn_aborted', undefined, { turnId })
  }

  ack(seq = this.lastSeenSeq): void {
    this.#unacked = 0
    this.#put(makeEnvelope('ack', undefined, { ack: seq }))
  }

  /**
   * Says anything. An event is a request: it waits for a connection, and is said again, also over the next one, until the server answers it,
   * which takes it once. A server of another make, which acknowledges no requests, may take it again after a lost connection. What is no event
   * is said now or not at all.
   *
   * @throws {Error} if 256 requests are not answered.
   */
  send<T>(type: AgentSocketEventType, payload?: T, meta: AgentSocketMeta = {}): void {
    const said: AgentSocketEnvelope = makeEnvelope(type, payload, meta)
    if (isEventType(type)) {
      if (this.#pending.length >= PENDING_MAX) throw new Error(`${PENDING_MAX} requests are not answered`)
      said.requestId = newKey()
      this.#pending.push({ said, beats: 0 })
    }
    if (this.#isIn) this.#put(said)
  }

  /** A frame came. Called by the transport. */
  handleRaw(raw: string | ArrayBuffer | Uint8Array): void {
    this.#heardAt = Date.now()
    this.#heard += 1
    let envelope: AgentSocketEnvelope
    try {
      envelope = parseEnvelope(raw)
    } catch (error) {
      this.#end()
      this.#transport?.close(4007, String(error).slice(0, 100))
      return
    }
    if (envelope.type === 'welcome') this.#welcomed(envelope)
    else if (envelope.type === 'state_snapshot') this.#snapshot(envelope)
    else if (envelope.type === 'ack') this.#pending = this.#pending.filter(({ said }) => said.requestId !== envelope.requestId)
    else if (envelope.type === 'replay_events') this.#replayed(envelope.payload as ReplayPayload | undefined)
    else if (envelope.type === 'heartbeat') {
      const latest = (envelope.payload as { latestSeq?: number } | undefined)?.latestSeq
      if (latest !== undefined && latest > this.lastSeenSeq) this.#askForMissed()
      // Timers of hidden pages run once a minute; what comes is handled at once.
      if (Date.now() - this.#saidAt >= this.#heartbeatMs) this.#put(makeEnvelope('heartbeat'))
    }
    if (envelope.seq !== undefined && isEventType(envelope.type)) {
      this.#event(envelope)
      return
    }
    if (envelope.type === 'runtime_generation_changed') {
      this.#knows(envelope)
      this.#askForMissed()
    }
    this.#handle(envelope)
  }

  #welcomed(envelope: AgentSocketEnvelope): void {
    this.#isIn = true
    this.#pauseMs = this.#options.pauseMs ?? 200
    this.#socketId = envelope.socketId
    this.#knows(envelope)
    const { latestSeq, heartbeatMs, acksRequests = false } = (envelope.payload ?? {}) as WelcomePayload
    this.#acksRequests = acksRequests
    this.#hasBeats = heartbeatMs !== undefined && heartbeatMs > 0
    if (heartbeatMs !== undefined && heartbeatMs > 0 && heartbeatMs !== this.#heartbeatMs) {
      this.#heartbeatMs = heartbeatMs
      this.#beat()
    }
    if (latestSeq !== undefined && latestSeq < this.lastSeenSeq) {
      // Its numbers begin again: it is another stream than the one that was seen.
      this.lastSeenSeq = 0
      this.#state = undefined
    }
    // Whoever does not say how far it is may have something.
    if (latestSeq === undefined || latestSeq > this.lastSeenSeq) this.#askForMissed()
    for (const { said } of this.#pending) this.#put(said)
  }

  #snapshot(envelope: AgentSocketEnvelope): void {
    const { seq, ...state } = envelope.payload as AgentRuntimeState & { seq?: number }
    this.#state = state
    this.#stateSeq = seq ?? this.lastSeenSeq
  }

  #replayed(part: ReplayPayload | undefined): void {
    for (const raw of part?.events ?? []) {
      const event = parseEnvelope(JSON.stringify(raw))
      if (event.seq !== undefined && event.seq > this.lastSeenSeq) this.#accept(event)
    }
    if ((part?.since ?? 0) > this.lastSeenSeq) {
      // Told of what is gone further on, while what is before it is on its way, or has to be asked for.
      this.#askForMissed()
      return
    }
    this.lastSeenSeq = Math.max(this.lastSeenSeq, part?.until ?? 0)
    // What followed from what is gone comes with a fresh one.
    if (part?.gone) this.#state = undefined
    if (part?.rest) this.requestReplay()
    else if (!part?.more) {
      this.#isReplaying = false
      for (const event of this.#held.splice(0)) this.#event(event)
    }
  }

  /** An event that was not asked for. */
  #event(event: AgentSocketEnvelope): void {
    const seq = event.seq ?? 0
    if (seq <= this.lastSeenSeq) return
    const { prev } = event as { prev?: number }
    if (!this.#isReplaying && (prev === undefined || prev <= this.lastSeenSeq)) {
      this.#accept(event)
      return
    }
    if (this.#held.length < HELD_MAX && (this.#held.at(-1)?.seq ?? 0) < seq) this.#held.push(event)
    this.#askForMissed()
  }

  #accept(event: AgentSocketEnvelope): void {
    this.lastSeenSeq = event.seq ?? this.lastSeenSeq
    this.#knows(event)
    if (this.#state && this.lastSeenSeq > this.#stateSeq) this.#state = foldRuntimeState(this.#state, event)
    this.#pending = this.#pending.filter(({ said }) => !answers(event, said, !this.#acksRequests))
    this.#handle(event)
    this.#unacked += 1
    const every = this.#options.ackEvery ?? 16
    if (every > 0 && this.#unacked >= every) this.ack()
  }

  #handle(envelope: AgentSocketEnvelope): void {
    for (const type of [envelope.type, '*']) {
      for (const handler of this.#handlers.get(type) ?? []) {
        try {
          handler(envelope as AgentSocketEnvelope<never>)
        } catch (error) {
          // One that fails spoils nothing for the others, and is not hidden either.
          queueMicrotask(() => {
            throw error
          })
        }
      }
    }
  }

  #knows(envelope: AgentSocketEnvelope): void {
    if (envelope.runtimeGeneration !== undefined) this.#generation = envelope.runtimeGeneration
  }

  #askForMissed(): void {
    if (!this.#isReplaying) this.requestReplay()
  }

  /** For good. */
  #end(): void {
    this.#isClosed = true
    clearInterval(this.#beats)
    clearTimeout(this.#retry)
    clearTimeout(this.#probing)
    this.#unlisten.splice(0).forEach((unlisten) => unlisten())
  }

  #put(envelope: AgentSocketEnvelope): void {
    this.#saidAt = Date.now()
    const own = { ...envelope, clientId: this.#options.clientId }
    if (this.#socketId !== undefined) own.socketId = this.#socketId
    try {
      this.#transport?.send(serializeEnvelope(own))
    } catch {
      // It is closed, which is told another way, and what matters is said again.
    }
  }

  #beat(): void {
    clearInterval(this.#beats)
    this.#beats = setInterval(() => {
      const mustBeHeard = this.#hasBeats || !this.#isIn
      if (mustBeHeard && Date.now() - this.#heardAt >= this.#heartbeatMs * SILENT_BEATS) return this.#lost()
      this.#put(makeEnvelope('heartbeat'))
      if (!this.#isIn) return
      if (this.#unacked > 0 && this.#options.ackEvery !== 0) this.ack()
      // What got lost on the way is said again.
      if (this.#isReplaying) this.requestReplay()
      if (this.#state === undefined) this.requestState()
      this.#sayAgain()
    }, this.#heartbeatMs)
    // A program that has nothing else to do may end.
    ;(this.#beats as { unref?: () => void }).unref?.()
  }

  /** At a heartbeat: what is not answered. */
  #sayAgain(): void {
    const isRepeated = ({ said }: Pending): boolean => this.#acksRequests || said.type === 'turn_start'
    const hasHeard = this.#heard > this.#heardBefore
    this.#heardBefore = this.#heard
    // A server that acknowledges nothing had what was said long before it was heard. Nothing may ever answer that.
    this.#pending = this.#pending.filter((pending) => isRepeated(pending) || pending.beats === 0 || !hasHeard)
    for (const pending of this.#pending) {
      if (pending.beats > 0 && isRepeated(pending)) this.#put(pending.said)
      pending.beats += 1
    }
  }

  /** The connection is there, and dead. */
  #lost(): void {
    const transport = this.#transport
    // The first attempt comes at once.
    this.#pauseMs = this.#options.pauseMs ?? 200
    this.#left(undefined)
    transport?.close(4001, 'nothing was heard')
  }

  /** In a browser: what tells that a connection may be dead, or that another one may be had. */
  #listen(): void {
    if (this.#unlisten.length > 0) return
    const listen = (target: EventTarget | undefined, name: string, handler: () => void): void => {
      target?.addEventListener(name, handler)
      this.#unlisten.push(() => target?.removeEventListener(name, handler))
    }
    const page = typeof document === 'undefined' ? undefined : document
    const view = typeof window === 'undefined' ? undefined : window
    const network = typeof navigator === 'undefined' ? undefined : (navigator as { connection?: EventTarget }).connection
    const shown = (event: PageTransitionEvent): void => {
      if (event.persisted) this.#probe()
    }
    listen(page, 'visibilitychange', () => page?.visibilityState === 'visible' && this.#probe())
    listen(view, 'online', () => this.#probe())
    // Out of the browser's cache: a page that was just loaded has a new connection.
    view?.addEventListener('pageshow', shown)
    this.#unlisten.push(() => view?.removeEventListener('pageshow', shown))
    listen(network, 'change', () => this.#probe())
  }

  /** Connects now if it waits to; otherwise wants a sign of life, soon. */
  #probe(): void {
    // Without another connection to be had, this one is as good as any.
    if (this.#isClosed || typeof this.#options.transport !== 'function') return
    const transport = this.#transport
    if (transport === undefined) {
      this.#pauseMs = this.#options.pauseMs ?? 200
      this.#retryNow()
      return
    }
    // One that is being made has its time already.
    if (!this.#isIn || this.#probing !== undefined) return
    const heard = this.#heard
    this.requestReplay()
    this.#probing = setTimeout(() => {
      this.#probing = undefined
      if (this.#transport === transport && this.#heard === heard) this.#lost()
    }, PROBE_MS)
  }

  #retryNow(): void {
    try {
      this.connect()
    } catch (error) {
      // The program's own way to connect failed; it may not the next time.
      this.#left(error)
    }
  }

  #left(event: unknown): void {
    clearInterval(this.#beats)
    clearTimeout(this.#probing)
    this.#probing = undefined
    this.#transport = undefined
    this.#isIn = false
    this.#isReplaying = false
    this.#held = []
    for (const pending of this.#pending) pending.beats = 0
    const code = (event as { code?: number } | undefined)?.code ?? 1006
    if (FINAL.has(code)) this.#end()
    if (this.#isClosed || typeof this.#options.transport !== 'function') return
    clearTimeout(this.#retry)
    this.#retry = setTimeout(() => this.#isClosed || this.#retryNow(), this.#pauseMs * (1 - Math.random() / 2))
    this.#pauseMs = Math.min(this.#pauseMs * 2, this.#options.pauseMaxMs ?? 10_000)
  }
}

/** Whether an event says what became of what was said. A server that acknowledges requests says itself which it took. */
function answers(event: AgentSocketEnvelope, said: AgentSocketEnvelope, guesses: boolean): boolean {
  if (said.type === 'turn_start') return said.turnId === undefined ? guesses : said.turnId === event.turnId
  if (said.type === 'turn_aborted') return ENDS.has(event.type) && said.turnId === event.turnId
  return guesses && said.type === 'approval_resolve' && said.operationId !== undefined && said.operationId === event.operationId
}

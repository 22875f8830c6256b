/** Conversations with an agent: every message once and in order, over reloads, other tabs, lost connections and restarts. */

import { browserHost, type Host, type Life } from './host.js'
import { Http, refusal, retryAfter } from './http.js'
import { BACKOFF_MAX_MS, BACKOFF_MS, IDLE, step, type Action, type Event as MachineEvent, type State } from './machine.js'
import { Outbox, type Pending } from './outbox.js'
import { readEvents, type ServerEvent } from './sse.js'
import { Tab, type Channel } from './tabs.js'
import { TokenError, Tokens } from './token.js'
import {
  RequestError,
  type AttachmentPolicy,
  type ConvoHead,
  type ConvoState,
  type DeltaEvent,
  type Events,
  type Lockout,
  type Message,
  type ReadyEvent,
  type Status,
} from './types.js'

export type ConversationClientOptions = {
  /** With which agent: its id in the app. */
  agentId: string
  /** A fresh token of the user, from the app's own backend. */
  fetchJwt: () => Promise<string>
  /** Where Trunkline is; the page's own server, if not given. */
  baseUrl?: string
  /** Says what it does. */
  debug?: boolean
  /** Longest wait for a token; 10 s, if not given. */
  fetchJwtTimeoutMs?: number
  /** Instead of the browser's own. */
  fetch?: typeof fetch
  /** What it takes from where it runs, if that is no browser; see `@trunkline/web/react-native`. */
  host?: Host
}

export type Session = { convoId: string; attachmentPolicy: AttachmentPolicy; lockout: Lockout }

export type OpenOptions = {
  convoId: string
  /** So many of the last messages, and not all of them. */
  history?: number
}

export class ConversationClient {
  /** With which agent. */
  readonly agentId: string
  readonly #options: ConversationClientOptions
  readonly #http: Http

  constructor(options: ConversationClientOptions) {
    this.#options = options
    this.agentId = options.agentId
    const tokens = new Tokens(options.fetchJwt, options.fetchJwtTimeoutMs ?? 10_000)
    this.#http = new Http(options.baseUrl ?? '', tokens, options.fetch ?? ((input, init) => fetch(input, init)), options.host?.openStream)
  }

  /** Begins a conversation. */
  async startSession(): Promise<Session> {
    type Begun = { convo_id: string; attachment_policy: AttachmentPolicy; lockout: Lockout }
    const begun = await this.#http.json<Begun>('/sessions', { method: 'POST' })
    return { convoId: begun.convo_id, attachmentPolicy: begun.attachment_policy, lockout: begun.lockout }
  }

  /** The user's conversations with this agent, newest first. */
  async listConvos(page: { limit?: number; before?: string } = {}): Promise<ConvoHead[]> {
    const listed = await this.#http.json<{ agent_convos: ConvoHead[] }>(`/agent_convos${query(page)}`)
    return listed.agent_convos
  }

  /** Opens a conversation. Handlers that are added before the next tick miss nothing. */
  openConvo(options: OpenOptions): Promise<Convo> {
    return Promise.resolve(new Convo(this.#http, this.#options, options))
  }
}

function query(params: Record<string, string | number | undefined>): string {
  const given = Object.entries(params).filter(([, value]) => value !== undefined)
  return given.length > 0 ? `?${given.map(([name, value]) => `${name}=${encodeURIComponent(String(value))}`).join('&')}` : ''
}

type Handler<K extends keyof Events> = (event: Events[K]) => void

/** Whoever is told to wait for longer than this is told so, and is not waited for; in milliseconds. */
const WAIT_MAX_MS = 60_000
/** How long an upload may take. */
const UPLOAD_MS = 15 * 60_000
/** Messages of a page at most, as the server has it. */
const PAGE = 10_000
/** Messages whose ids are remembered. */
const SEEN_MAX = 50_000
/** Without a sign of life for so long, a stream is taken for lost: the server sends something every 15 s. */
const SILENCE_MS = 40_000
const CLEARS_TYPING = new Set(['message', 'turn_done', 'error', 'convo_state'])

const STATUS: Record<State['name'], Status> = {
  idle: 'connecting', electing: 'connecting', following: 'live', connecting: 'connecting', open: 'live', waiting: 'waiting',
  paused: 'paused', offline: 'offline', closed: 'closed',
}

type Waiter = { resolve: (sent: { messageId: string }) => void; reject: (error: Error) => void }

export class Convo {
  readonly convoId: string
  readonly agentId: string
  readonly #http: Http
  readonly #options: ConversationClientOptions
  readonly #history: number | undefined
  readonly #handlers = new Map<string, Set<(event: never) => void>>()
  readonly #tab: Tab
  readonly #outbox: Outbox
  readonly #waiters = new Map<string, Waiter>()
  readonly #seen = new Set<string>()
  readonly #partials = new Map<string, { next: number; text: string }>()
  readonly #life: Life | undefined
  readonly #unlisten: (() => void) | undefined
  #machine: State = IDLE
  #status: Status = 'connecting'
  /** Where this tab is in the stream; another one that takes over goes on there. */
  #lastEventId: string | undefined
  #lastMessageId: string | undefined
  #stream: AbortController | undefined
  #timer: ReturnType<typeof setTimeout> | undefined
  #silence: ReturnType<typeof setTimeout> | undefined
  #newToken = false
  #isLoaded = false
  #reconciling: Promise<void> | undefined
  /** What was asked for may be older than what is missing. */
  #reconcilesAgain = false
  /** What came while something before it may be missing. */
  #held: Events['message'][] = []
  #isSending = false
  readonly #wakers = new Set<() => void>()
  /** How often the conversation was said to be something else. */
  #changes = 0
  /** Why the stream will not come back. */
  #refusal: Error | undefined
  #state: ConvoState | undefined
  #isTyping = false

  constructor(http: Http, options: ConversationClientOptions, open: OpenOptions) {
    this.convoId = open.convoId
    this.agentId = options.agentId
    this.#http = http
    this.#options = options
    this.#history = open.history
    const name = `trunkline:${options.agentId}:${open.convoId}`
    const host = options.host ?? browserHost()
    this.#life = host.life
    this.#outbox = new Outbox(host.storage, `${name}:outbox`)
    this.#tab = new Tab({
      channel: channel(name),
      elected: () => this.#on({ type: 'elected' }),
      demoted: () => this.#on({ type: 'demoted' }),
      heard: (what) => this.#heard(what),
      asked: () => this.#passStatus(),
    })
    this.#unlisten = this.#listen()
    // Whoever opened it adds its handlers first.
    setTimeout(() => {
      this.#on({ type: this.#life?.isHidden() ? 'hidden' : 'start' })
      void this.#reconcile()
      void this.#flush()
    })
  }

  /** How the stream is. */
  get status(): Status {
    return this.#status
  }

  /** How the conversation is, as far as is known. */
  get state(): ConvoState | undefined {
    return this.#state
  }

  /** What waits to be sent. */
  get pending(): readonly Pending[] {
    return this.#outbox.pending
  }

  /** Whether this tab has the stream, which it does for all tabs on this conversation. */
  get isLeader(): boolean {
    return this.#tab.leads
  }

  /** Calls for every event of a kind, until what it answers is called. */
  on<K extends keyof Events>(event: K, handler: Handler<K>): () => void {
    const handlers = this.#handlers.get(event) ?? new Set()
    this.#handlers.set(event, handlers)
    handlers.add(handler)
    return () => void handlers.delete(handler)
  }

  /**
   * Says something. Resolves when the server has it; until then it is tried again, also after a reload of the page. Rejects
   * with a `RequestError` if the server refuses it for good.
   */
  async send(text: string, options: { messageId?: string } = {}): Promise<{ messageId: string }> {
    if (this.#machine.name === 'closed') throw this.#refusal ?? new Error('the conversation was closed by this page')
    const pending = this.#outbox.add(text, options.messageId)
    const sent = new Promise<{ messageId: string }>((resolve, reject) => this.#waiters.set(pending.key, { resolve, reject }))
    this.#emit('outbox', this.#outbox.pending)
    void this.#flush()
    return sent
  }

  /** Uploads files for one message; `send` with the id that it answers says it. */
  async upload(files: Iterable<File | Blob>): Promise<{ messageId: string }> {
    const form = new FormData()
    for (const file of files) form.append('files[]', file, file instanceof File ? file.name : 'file')
    const draft = await this.#http.json<{ message_id: string }>(`${this.#path}/upload_file`, { method: 'POST', body: form, patienceMs: UPLOAD_MS })
    return { messageId: draft.message_id }
  }

  /** Messages from before one of them, oldest first. They are not told to handlers. */
  async loadBefore(messageId: string, limit = 50): Promise<Message[]> {
    const page = await this.#http.json<{ messages: Message[] }>(`${this.#path}${query({ before: messageId, limit })}`)
    return page.messages
  }

  /** Ends the stream for this tab. What is not sent yet stays until the conversation is opened again. */
  close(): void {
    this.#on({ type: 'close' })
    this.#tab.close()
    this.#unlisten?.()
    this.#giveUp(new Error('the conversation was closed by this page'))
  }

  /** Nothing is sent any more; what waits stays for another time. */
  #giveUp(why: Error): void {
    this.#hurry()
    for (const { reject } of this.#waiters.values()) reject(why)
    this.#waiters.clear()
  }

  /** Whatever waits, or may wait in vain, is tried at once. */
  #hurry(): void {
    this.#http.hurry()
    this.#wakers.forEach((wake) => wake())
  }

  get #path(): string {
    return `/agent_convos/${encodeURIComponent(this.convoId)}`
  }

  #listen(): (() => void) | undefined {
    return this.#life?.listen((event) => {
      this.#on({ type: event })
      if (event !== 'visible' && event !== 'online') return
      // What the other tabs were told in the meantime, and whatever went over a wire that may be another one now.
      this.#hurry()
      void this.#reconcile()
    })
  }

  #on(event: MachineEvent): void {
    const [state, actions] = step(this.#machine, event, Math.random())
    if (this.#options.debug) console.debug('trunkline', this.#machine.name, event.type, '→', state.name)
    this.#machine = state
    actions.forEach((action) => this.#act(action))
    // Whoever follows is told.
    if (state.name !== 'following') this.#is(STATUS[state.name])
  }

  #is(status: Status): void {
    if (this.#status === status) return
    this.#status = status
    if (this.#tab.leads) this.#passStatus()
    this.#emit('status', status)
  }

  /** Whoever follows is as well as whoever leads. */
  #passStatus(): void {
    this.#tab.pass({ name: 'status', id: undefined, data: JSON.stringify(this.#status) } satisfies ServerEvent)
  }

  #act(action: Action): void {
    switch (action.do) {
      case 'elect':
        return this.#tab.elect()
      case 'resign':
        clearTimeout(this.#timer)
        return this.#tab.resign()
      case 'open':
        this.#newToken = action.newToken
        return void this.#open()
      case 'cut':
        clearTimeout(this.#silence)
        return this.#stream?.abort()
      case 'wait':
        clearTimeout(this.#timer)
        this.#timer = setTimeout(() => this.#on({ type: 'timer' }), action.ms)
        return
      case 'fail':
        this.#refusal = new RequestError(action.status, String(action.status), `the stream was refused: ${action.status}`)
        this.#fail('stream', this.#refusal)
        this.#giveUp(this.#refusal)
    }
  }

  async #open(): Promise<void> {
    this.#stream?.abort()
    const stream = (this.#stream = new AbortController())
    const isCurrent = () => this.#stream === stream && !stream.signal.aborted
    if (this.#newToken) this.#http.refuse()
    let closing: string | undefined
    try {
      const headers: Record<string, string> = { accept: 'text/event-stream' }
      if (this.#lastEventId) headers['last-event-id'] = this.#lastEventId
      this.#watch(stream)
      const response = await this.#http.stream(`${this.#path}/events?deltas=1`, { headers, signal: stream.signal })
      // It is not read.
      if (!isCurrent()) return stream.abort()
      if (!response.ok) {
        const after = retryAfter(response)
        if (response.status >= 400 && response.status < 500) this.#debug(await refusal(response))
        return this.#on({ type: 'refused', status: response.status, ...(after === undefined ? {} : { retryAfterMs: after }) })
      }
      await readEvents(response, (event) => {
        if (!isCurrent()) return
        this.#watch(stream)
        if (event.name === 'closed') closing = (JSON.parse(event.data) as { reason?: string }).reason
        this.#received(event)
      })
      if (isCurrent()) this.#on({ type: 'ended', reason: closing })
    } catch (error) {
      if (!isCurrent()) return
      this.#debug(error)
      if (error instanceof TokenError) this.#fail('token', error)
      this.#on({ type: 'failed' })
    } finally {
      if (this.#stream === stream) clearTimeout(this.#silence)
    }
  }

  /** Takes a stream that says nothing for lost. */
  #watch(stream: AbortController): void {
    clearTimeout(this.#silence)
    this.#silence = setTimeout(() => {
      if (this.#stream !== stream) return
      stream.abort()
      this.#on({ type: 'failed' })
    }, SILENCE_MS)
  }

  /** An event of the stream: for this tab, and for the others. */
  #received(event: ServerEvent): void {
    if (event.name === 'ping') return
    this.#tab.pass(event)
    if (event.name === 'ready') this.#on({ type: 'ready' })
    this.#show(event)
  }

  #heard(what: unknown): void {
    // Only who follows: whoever leads has it from the stream itself.
    if (!this.#tab.leads && this.#machine.name !== 'closed') this.#show(what as ServerEvent)
  }

  #show(event: ServerEvent): void {
    let data: { type?: string }
    try {
      data = JSON.parse(event.data) as { type?: string }
    } catch (error) {
      return this.#debug(error)
    }
    if (event.name === 'ready' && !(data as ReadyEvent).resumed) {
      // What was between the streams is in the history.
      void this.#reconcile()
      this.#partials.clear()
    }
    if (event.id) this.#lastEventId = event.id
    if (this.#isTyping && CLEARS_TYPING.has(event.name)) {
      this.#isTyping = false
      const stopped = { type: 'typing', kind: 'typing', state: 'stop', label: '', convo_id: this.convoId } as const
      this.#emit('typing', stopped)
    }
    switch (event.name) {
      case 'message':
        if (this.#reconciling || !this.#isLoaded) return void this.#held.push(data as Events['message'])
        return this.#message((data as Events['message']).message, data as Events['message'])
      case 'delta':
        return this.#delta(data as DeltaEvent)
      case 'typing':
        this.#isTyping = (data as Events['typing']).state === 'start'
        return this.#emit('typing', data as Events['typing'])
      case 'convo_state':
        this.#changes += 1
        this.#state = (data as Events['convo_state']).state
        return this.#emit('convo_state', data as Events['convo_state'])
      case 'turn_done':
        if (!['ok', 'rate_limited'].includes((data as Events['turn_done']).reason)) this.#partials.clear()
        return this.#emit('turn_done', data as Events['turn_done'])
      case 'error':
        return this.#fail('agent', new Error('the agent failed'))
      case 'ready':
        return this.#emit('ready', data as Events['ready'])
      case 'closed':
        return this.#emit('closed', data as Events['closed'])
      case 'status':
        return this.#machine.name === 'following' ? this.#is(data as unknown as Status) : undefined
    }
  }

  #message(message: Message, event?: Events['message']): void {
    this.#partials.delete(message.id)
    if (this.#seen.has(message.id)) return
    this.#seen.add(message.id)
    if (this.#seen.size > SEEN_MAX) this.#seen.delete(this.#seen.values().next().value ?? '')
    this.#lastMessageId = message.id
    this.#emit('message', event ?? { type: 'message', action: 'create', agent_id: this.agentId, convo_id: this.convoId, message })
  }

  #delta(piece: DeltaEvent): void {
    const { message_id: messageId, index, text: delta, done } = piece
    if (done) {
      this.#partials.delete(messageId)
      return this.#emit('token', { messageId, delta: '', text: '', done })
    }
    // A first piece begins anew: so does an agent that was started again.
    const partial = (index > 0 && this.#partials.get(messageId)) || { next: 0, text: '' }
    // What is behind a piece that this tab missed is shown when it is whole.
    if (index !== partial.next || this.#seen.has(messageId)) return
    const text = partial.text + delta
    this.#partials.set(messageId, { next: index + 1, text })
    this.#emit('token', { messageId, delta, text })
  }

  /** Shows what was said and was not seen yet. */
  #reconcile(): Promise<void> {
    this.#reconcilesAgain = true
    this.#reconciling ??= this.#catchUp().finally(() => {
      this.#reconciling = undefined
      this.#release()
    })
    return this.#reconciling
  }

  /** Shows what was held back. */
  #release(): void {
    this.#held.splice(0).forEach((event) => this.#message(event.message, event))
  }

  #isClosed(): boolean {
    return this.#machine.name === 'closed'
  }

  async #catchUp(): Promise<void> {
    while (this.#reconcilesAgain && this.#machine.name !== 'closed') {
      this.#reconcilesAgain = false
      await this.#fetchHistory()
    }
  }

  async #fetchHistory(): Promise<void> {
    for (let attempt = 0; this.#machine.name !== 'closed'; attempt += 1) {
      try {
        type Page = { state: ConvoState; messages: Message[] }
        const after = this.#isLoaded ? this.#lastMessageId : undefined
        const limit = after || !this.#history ? undefined : this.#history
        const changes = this.#changes
        const page = await this.#http.json<Page>(`${this.#path}${query({ after, limit })}`, { hurries: true })
        if (this.#isClosed()) return
        this.#isLoaded = true
        // What came over the stream meanwhile is newer.
        if (changes === this.#changes && this.#state !== page.state) {
          const prev = this.#state
          this.#state = page.state
          const event = { type: 'convo_state', agent_id: this.agentId, convo_id: this.convoId, state: page.state } as const
          this.#emit('convo_state', { ...event, prev_state: prev ?? page.state, closed_user_message: null })
        }
        page.messages.forEach((message) => this.#message(message))
        // A full page has more behind it.
        this.#reconcilesAgain ||= after !== undefined && page.messages.length >= PAGE
        return
      } catch (error) {
        this.#debug(error)
        if (error instanceof RequestError && !error.isRetryable) {
          // The message that it began with is gone: all of it, then.
          if (error.status === 400 && this.#lastMessageId) {
            this.#lastMessageId = undefined
            continue
          }
          return this.#fail('history', error)
        }
        // What comes is shown, though something before it is missing: longer than this nobody waits.
        if (this.#isLoaded) this.#release()
        await this.#pause(Math.min(BACKOFF_MS * 2 ** attempt, BACKOFF_MAX_MS))
      }
    }
  }

  /** Sends what waits, one after the other. */
  async #flush(): Promise<void> {
    if (this.#isSending) return
    this.#isSending = true
    try {
      for (let attempt = 0; this.#machine.name !== 'closed'; ) {
        const pending = this.#outbox.pending[0]
        if (!pending) return
        if (this.#outbox.isOld(pending)) {
          this.#settle(pending.key, (waiter) => waiter.reject(new Error('it waited for too long to be sent')))
          continue
        }
        try {
          const sent = await this.#post(pending)
          this.#settle(pending.key, (waiter) => waiter.resolve(sent))
          attempt = 0
        } catch (error) {
          this.#debug(error)
          const isFinal =
            error instanceof RequestError && ((!error.isRetryable && error.status !== 401) || (error.retryAfterMs ?? 0) > WAIT_MAX_MS)
          if (isFinal) {
            if (!this.#waiters.has(pending.key)) this.#fail('send', error)
            this.#settle(pending.key, (waiter) => waiter.reject(error))
            continue
          }
          const backoff = Math.min(BACKOFF_MS * 2 ** attempt, BACKOFF_MAX_MS)
          attempt += 1
          await this.#pause((error instanceof RequestError ? error.retryAfterMs : undefined) ?? backoff)
        }
      }
    } finally {
      this.#isSending = false
    }
  }

  async #post(pending: Pending): Promise<{ messageId: string }> {
    const { key, text, messageId } = pending
    const sent = await this.#http.json<{ message_id: string }>(`${this.#path}/stream_message`, {
      method: 'POST',
      headers: { 'content-type': 'application/json', 'idempotency-key': key },
      body: JSON.stringify({ text, ...(messageId ? { message_id: messageId } : {}) }),
      hurries: true,
    })
    return { messageId: sent.message_id }
  }

  #settle(key: string, how: (waiter: Waiter) => void): void {
    this.#outbox.done(key)
    const waiter = this.#waiters.get(key)
    this.#waiters.delete(key)
    if (waiter) how(waiter)
    this.#emit('outbox', this.#outbox.pending)
  }

  /** Waits, or until there is reason to try at once. */
  #pause(ms: number): Promise<void> {
    return new Promise((resolve) => {
      const wake = () => {
        clearTimeout(timer)
        this.#wakers.delete(wake)
        resolve()
      }
      const timer = setTimeout(wake, ms)
      this.#wakers.add(wake)
    })
  }

  #fail(phase: Events['error']['phase'], error: Error): void {
    this.#emit('error', { error, phase })
  }

  #debug(what: unknown): void {
    if (this.#options.debug) console.debug('trunkline', what)
  }

  #emit<K extends keyof Events>(name: K, event: Events[K]): void {
    for (const handler of [...(this.#handlers.get(name) ?? [])]) {
      try {
        ;(handler as Handler<K>)(event)
      } catch (error) {
        // A page's mistake is the page's.
        console.error(error)
      }
    }
  }
}

/** The other tabs; none, where the browser has no way to reach them. */
function channel(name: string): Channel {
  if (typeof BroadcastChannel !== 'undefined') return new BroadcastChannel(name) as Channel
  return { postMessage: () => undefined, onmessage: null, close: () => undefined }
}

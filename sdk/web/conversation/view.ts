/** What a chat shows: a list that grows, what is being said, and how it all is. Each change is a new object. */

import type { Convo } from './client.js'
import type { ConvoState, Message, Status, TypingEvent } from './types.js'

export type View = {
  readonly messages: readonly Message[]
  /** What is being said, by the id of the message that it will be. */
  readonly partials: ReadonlyMap<string, string>
  /** What waits to be sent. */
  readonly pending: readonly { key: string; text: string }[]
  /** Who types or thinks, if anybody does. */
  readonly typing: Pick<TypingEvent, 'kind' | 'label'> | undefined
  readonly state: ConvoState | undefined
  /** What the user is told of that. */
  readonly notice: string | undefined
  readonly status: Status
  readonly error: Error | undefined
}

const EMPTY: View = {
  messages: [], partials: new Map(), pending: [], typing: undefined, state: undefined, notice: undefined,
  status: 'connecting', error: undefined,
}

/** Keeps a view of a conversation. */
export class ConvoView {
  #view: View
  readonly #listeners = new Set<() => void>()
  readonly #unsubscribe: (() => void)[]
  #isTold = false

  constructor(convo: Convo) {
    this.#view = { ...EMPTY, pending: convo.pending, status: convo.status, state: convo.state }
    this.#unsubscribe = [
      convo.on('message', ({ message }) => this.#messageCame(message)),
      convo.on('token', ({ messageId, text, done }) => {
        const partials = new Map(this.#view.partials)
        if (done) partials.delete(messageId)
        else partials.set(messageId, text)
        this.#change({ partials, typing: undefined })
      }),
      convo.on('typing', ({ state, kind, label }) => this.#change({ typing: state === 'start' ? { kind, label } : undefined })),
      convo.on('convo_state', ({ state, closed_user_message }) => this.#change({ state, notice: closed_user_message ?? undefined })),
      // A message that was refused says nothing of the answer to another one.
      convo.on('turn_done', ({ reason }) => reason !== 'ok' && reason !== 'rate_limited' && this.#change({ partials: new Map(), typing: undefined })),
      convo.on('outbox', (pending) => this.#change({ pending })),
      convo.on('status', (status) => this.#change({ status })),
      convo.on('error', ({ error }) => this.#change({ error })),
    ]
  }

  /** The same object until something changes. */
  get = (): View => this.#view

  /** Calls after changes, until what it answers is called. */
  subscribe = (listener: () => void): (() => void) => {
    this.#listeners.add(listener)
    return () => void this.#listeners.delete(listener)
  }

  /** Puts messages of before at the beginning. */
  prepend(messages: readonly Message[]): void {
    const known = new Set(this.#view.messages.map(({ id }) => id))
    this.#change({ messages: [...messages.filter(({ id }) => !known.has(id)), ...this.#view.messages] })
  }

  close(): void {
    this.#unsubscribe.forEach((unsubscribe) => unsubscribe())
    this.#listeners.clear()
  }

  #came: Message[] = []

  /** A long history comes as many messages at once, and is one change. */
  #messageCame(message: Message): void {
    this.#came.push(message)
    if (this.#came.length === 1) queueMicrotask(() => this.#take())
  }

  #take(): void {
    const came = this.#came
    this.#came = []
    const partials = new Map(this.#view.partials)
    came.forEach(({ id }) => partials.delete(id))
    this.#change({ messages: [...this.#view.messages, ...came], partials, typing: undefined, error: undefined })
  }

  #change(change: Partial<View>): void {
    this.#view = { ...this.#view, ...change }
    if (this.#isTold) return
    this.#isTold = true
    queueMicrotask(() => {
      this.#isTold = false
      this.#listeners.forEach((listener) => listener())
    })
  }
}

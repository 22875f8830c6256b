/** What was written and is not accepted yet: sent in order, once, whatever happens in between. */

import { newKey } from './key.js'

export type Pending = {
  /** By which the server knows it when it comes twice. */
  key: string
  text: string
  /** What was uploaded before. */
  messageId?: string
  /** When it was written, in Unix milliseconds. */
  at: number
}

/** Older than this, it is not sent any more: the server forgets keys after a day. */
const FORGET_MS = 20 * 60 * 60_000
const PENDING_MAX = 100

export interface Store {
  readonly length: number
  key(index: number): string | null
  getItem(key: string): string | null
  setItem(key: string, value: string): void
  removeItem(key: string): void
}

/**
 * What waits, in the order in which it was written; kept over a reload. Each entry is kept by itself, because tabs share the
 * store: one that is opened takes over what it finds, and what two tabs send comes to the server under one key.
 */
export class Outbox {
  readonly #store: Store | undefined
  readonly #name: string
  #pending: Pending[]

  constructor(store: Store | undefined, name: string) {
    this.#store = store
    this.#name = name
    this.#pending = this.#load()
  }

  get pending(): readonly Pending[] {
    return this.#pending
  }

  /** Whether the server may have forgotten its key. */
  isOld(pending: Pending): boolean {
    return pending.at < Date.now() - FORGET_MS
  }

  /** Adds one; answers it. */
  add(text: string, messageId?: string): Pending {
    if (this.#pending.length >= PENDING_MAX) throw new Error('too much waits to be sent')
    const pending: Pending = { key: newKey(), text, at: Date.now(), ...(messageId ? { messageId } : {}) }
    this.#pending = [...this.#pending, pending]
    this.#write(() => this.#store?.setItem(this.#place(pending.key), JSON.stringify(pending)))
    return pending
  }

  /** It was accepted, or never will be. */
  done(key: string): void {
    this.#pending = this.#pending.filter((pending) => pending.key !== key)
    this.#write(() => this.#store?.removeItem(this.#place(key)))
  }

  #place(key: string): string {
    return `${this.#name}:${key}`
  }

  #load(): Pending[] {
    const found: Pending[] = []
    this.#write(() => {
      const places = Array.from({ length: this.#store?.length ?? 0 }, (_, n) => this.#store?.key(n) ?? '')
      for (const place of places.filter((place) => place.startsWith(`${this.#name}:`))) {
        const pending = read(this.#store?.getItem(place) ?? '')
        if (pending && pending.at > Date.now() - FORGET_MS) found.push(pending)
        else this.#store?.removeItem(place)
      }
    })
    return found.sort((a, b) => a.at - b.at)
  }

  /** A full or forbidden store: everything is sent all the same, if the page stays. */
  #write(how: () => void): void {
    try {
      how()
    } catch {
      return
    }
  }
}

function read(text: string): Pending | undefined {
  try {
    const pending = JSON.parse(text) as Pending
    return typeof pending.key === 'string' && typeof pending.text === 'string' ? pending : undefined
  } catch {
    return undefined
  }
}

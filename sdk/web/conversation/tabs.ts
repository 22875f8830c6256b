/** Which of the tabs on one conversation has the stream: the others hear from it what it hears. */

/** The published figures, in milliseconds. */
export const HEARTBEAT_MS = 1000
export const SILENCE_MS = 3000
export const ELECTION_MS = 300

type Said =
  | { say: 'who' }
  | { say: 'me' }
  | { say: 'resign' }
  | { say: 'pass'; what: unknown }

type Envelope = Said & { from: string; leads: boolean }

export interface Channel {
  postMessage(message: unknown): void
  onmessage: ((event: { data: unknown }) => void) | null
  close(): void
}

type Options = {
  channel: Channel
  id?: string
  elected: () => void
  demoted: () => void
  /** What the tab with the stream passes on. */
  heard: (what: unknown) => void
  /** Somebody came, and should know how the stream is. */
  asked: () => void
}

/** One tab among others. Of two that claim it at once, the one with the smaller id keeps it. */
export class Tab {
  readonly #options: Options
  readonly #id: string
  #leads = false
  #follows = false
  #takesPart = false
  #timer: ReturnType<typeof setTimeout> | undefined
  #beat: ReturnType<typeof setInterval> | undefined

  constructor(options: Options) {
    this.#options = options
    this.#id = options.id ?? `${Date.now().toString(36)}-${Math.random().toString(36).slice(2)}`
    options.channel.onmessage = ({ data }) => this.#hear(data as Envelope)
  }

  get leads(): boolean {
    return this.#leads
  }

  /** Takes part: leads, if nobody says within a moment that it does. */
  elect(): void {
    this.#takesPart = true
    this.#follows = false
    this.#after(ELECTION_MS)
    this.#say({ say: 'who' })
  }

  /** Leaves it to others, who hear of it at once. */
  resign(): void {
    clearTimeout(this.#timer)
    clearInterval(this.#beat)
    this.#takesPart = false
    if (this.#leads) this.#say({ say: 'resign' })
    this.#leads = false
  }

  /** Tells the other tabs. */
  pass(what: unknown): void {
    this.#say({ say: 'pass', what })
  }

  close(): void {
    this.resign()
    this.#options.channel.onmessage = null
    this.#options.channel.close()
  }

  #say(said: Said): void {
    this.#options.channel.postMessage({ ...said, from: this.#id, leads: this.#leads } satisfies Envelope)
  }

  /** Leads, unless somebody who does is heard before. */
  #after(ms: number): void {
    clearTimeout(this.#timer)
    this.#timer = setTimeout(() => this.#lead(), ms)
  }

  #lead(): void {
    this.#leads = true
    this.#follows = false
    clearInterval(this.#beat)
    this.#beat = setInterval(() => this.#say({ say: 'me' }), HEARTBEAT_MS)
    this.#options.elected()
    this.#say({ say: 'me' })
  }

  #follow(): void {
    const followed = this.#follows
    this.#leads = false
    this.#follows = true
    clearInterval(this.#beat)
    // A moment of chance, so that not all who miss it claim it at once.
    this.#after(SILENCE_MS + Math.random() * 200)
    if (!followed) this.#options.demoted()
  }

  #hear(data: Envelope): void {
    if (!data || data.from === this.#id) return
    if (data.say === 'pass') this.#options.heard(data.what)
    if (!this.#takesPart) return
    if (data.say === 'resign') {
      if (!this.#leads) this.#after(Math.random() * 100)
      return
    }
    if (data.say === 'who' && this.#leads) {
      this.#say({ say: 'me' })
      return this.#options.asked()
    }
    if (data.say === 'who' || !data.leads) return
    if (!this.#leads) {
      this.#follow()
      return
    }
    // Two lead.
    if (data.from < this.#id) this.#follow()
    else this.#say({ say: 'me' })
  }
}

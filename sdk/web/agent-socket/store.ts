/** Where a runtime keeps events, so that those who were away get them. One process writes a client's stream: it gives the numbers. */

import type { AgentSocketEnvelope } from './envelope.js'

export interface AgentSocketEventStore {
  append(event: AgentSocketEnvelope): Promise<void> | void
  getSince(clientId: string, seq: number): Promise<AgentSocketEnvelope[]> | AgentSocketEnvelope[]
  latestSeq(clientId: string): Promise<number> | number
  /** Events behind `since`, up to and with `until`, at most `max`. */
  getSinceRange?(
    clientId: string,
    since: number,
    until?: number,
    max?: number,
  ): Promise<AgentSocketEnvelope[]> | AgentSocketEnvelope[]
  trim?(clientId: string): Promise<void> | void
}

/** First in, first out, in memory; 500 events a client, unless somebody says otherwise. */
export class MemoryEventStore implements AgentSocketEventStore {
  readonly #max: number
  readonly #streams = new Map<string, { events: AgentSocketEnvelope[]; latest: number }>()

  constructor(options: { maxEvents?: number } = {}) {
    this.#max = options.maxEvents ?? 500
  }

  /** The number for the client's next event. */
  nextSeq(clientId: string): number {
    return this.#stream(clientId).latest + 1
  }

  append(event: AgentSocketEnvelope): void {
    if (event.clientId === undefined || event.seq === undefined) throw new Error('an event has a clientId and a seq')
    const stream = this.#stream(event.clientId)
    if (event.seq <= stream.latest) throw new Error(`seq: ${event.seq} is not behind ${stream.latest}`)
    stream.latest = event.seq
    stream.events.push(event)
    if (stream.events.length > this.#max) stream.events.shift()
  }

  getSince(clientId: string, seq: number): AgentSocketEnvelope[] {
    return this.getSinceRange(clientId, seq)
  }

  getSinceRange(clientId: string, since: number, until = Infinity, max = Infinity): AgentSocketEnvelope[] {
    const events = this.#stream(clientId).events.filter(({ seq = 0 }) => seq > since && seq <= until)
    return events.slice(0, max)
  }

  latestSeq(clientId: string): number {
    return this.#stream(clientId).latest
  }

  /** Forgets a client's events, or everybody's. Their numbers are not used again. */
  clear(clientId?: string): void {
    for (const [id, stream] of this.#streams) if (clientId === undefined || clientId === id) stream.events = []
  }

  #stream(clientId: string): { events: AgentSocketEnvelope[]; latest: number } {
    let stream = this.#streams.get(clientId)
    if (stream === undefined) this.#streams.set(clientId, (stream = { events: [], latest: 0 }))
    return stream
  }
}

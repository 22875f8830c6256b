/** Reads server-sent events from a response. Browsers' own `EventSource` sends no header. */

import type { StreamResponse } from './host.js'

export type ServerEvent = { name: string; id: string | undefined; data: string }

/** Characters of one event; a server that sends more is not ours. */
const EVENT_CHARS_MAX = 16 * 1024 * 1024

export class EventParser {
  #rest = ''
  #name = ''
  #id: string | undefined
  #data: string[] = []
  #size = 0

  /** The events that are whole now. */
  push(text: string): ServerEvent[] {
    const events: ServerEvent[] = []
    const lines = (this.#rest + text).split(/\r\n|\n|\r(?!$)/)
    this.#rest = lines.pop() ?? ''
    for (const line of lines) {
      if (line === '') {
        if (this.#data.length > 0) events.push({ name: this.#name || 'message', id: this.#id, data: this.#data.join('\n') })
        this.#name = ''
        this.#data = []
        this.#size = 0
        continue
      }
      const colon = line.indexOf(':')
      const field = colon < 0 ? line : line.slice(0, colon)
      const value = colon < 0 ? '' : line.slice(colon + 1).replace(/^ /, '')
      if (field === 'event') this.#name = value
      else if (field === 'data') this.#data.push(value)
      else if (field === 'id') this.#id = value
      this.#size += line.length
    }
    if (this.#size + this.#rest.length > EVENT_CHARS_MAX) throw new Error('an event is too large')
    return events
  }
}

/** Calls for each event of a response, until it ends. */
export async function readEvents(response: Pick<StreamResponse, 'read'> | Response, each: (event: ServerEvent) => void): Promise<void> {
  const parser = new EventParser()
  const take = (text: string) => parser.push(text).forEach(each)
  await ('read' in response ? response.read(take) : readText(response, take))
}

async function readText(response: Response, each: (text: string) => void): Promise<void> {
  if (!response.body) return
  const reader = response.body.getReader()
  const decoder = new TextDecoder()
  try {
    for (;;) {
      const { done, value } = await reader.read()
      if (done) return
      each(decoder.decode(value, { stream: true }))
    }
  } finally {
    // Whoever reads no further does not keep the connection.
    void reader.cancel().catch(() => undefined)
  }
}

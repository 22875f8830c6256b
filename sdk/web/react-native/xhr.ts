/** Streams over `XMLHttpRequest`, which React Native hands over as they come; its `fetch` does not. */

import type { StreamRequest, StreamResponse } from '../conversation/host.js'

const HEADERS_RECEIVED = 2
const LOADING = 3

/** What a stream hands over, to a reader that may come later. */
class Text {
  #read = 0
  #take: ((text: string) => void) | undefined
  #end: { resolve: () => void; reject: (error: Error) => void } | undefined
  #outcome: Error | 'complete' | undefined

  /** Takes what is new of all text so far. */
  push(all: string): void {
    if (!this.#take || this.#outcome instanceof Error) return
    const text = all.slice(this.#read)
    this.#read = all.length
    if (text !== '') this.#take(text)
  }

  finish(outcome: Error | 'complete'): void {
    if (this.#outcome !== undefined) return
    this.#outcome = outcome
    if (outcome instanceof Error) this.#end?.reject(outcome)
    else this.#end?.resolve()
  }

  /** Resolves at the end. */
  finished(): Promise<void> {
    return new Promise((resolve, reject) => {
      if (this.#outcome === undefined) this.#end = { resolve, reject }
      else if (this.#outcome instanceof Error) reject(this.#outcome)
      else resolve()
    })
  }

  async read(all: () => string, take: (text: string) => void): Promise<void> {
    this.#take = take
    this.push(all())
    await this.finished()
  }
}

export function openStream(url: string, { headers, signal }: StreamRequest): Promise<StreamResponse> {
  return new Promise((resolve, reject) => {
    const aborted = () => new Error('the request was aborted')
    // The token was fetched meanwhile.
    if (signal.aborted) return reject(aborted())
    const request = new XMLHttpRequest()
    const text = new Text()
    const abort = () => request.abort()
    const finish = (outcome: Error | 'complete') => {
      signal.removeEventListener('abort', abort)
      text.finish(outcome)
      // Does nothing once the answer has begun.
      if (outcome instanceof Error) reject(outcome)
    }
    // A reader that fails ends the stream, as it ends one that `fetch` hands over.
    const guarded = (run: () => void) => {
      try {
        run()
      } catch (error) {
        finish(error instanceof Error ? error : new Error(String(error)))
        request.abort()
      }
    }
    let response: StreamResponse | undefined
    // Listening to this is what has React Native hand over pieces. When a connection breaks, it calls once more, with the words of the
    // failure as text: only what comes while it loads is of the stream.
    request.onreadystatechange = () => {
      if (request.readyState === HEADERS_RECEIVED && !response) resolve((response = answered(request, text)))
      if (request.readyState === LOADING) guarded(() => text.push(request.responseText))
    }
    request.onload = () => {
      response ??= answered(request, text)
      resolve(response)
      guarded(() => text.push(request.responseText))
      finish('complete')
    }
    request.onerror = () => finish(new TypeError('the connection failed'))
    request.onabort = () => finish(aborted())
    request.ontimeout = () => finish(new TypeError('the connection timed out'))
    request.open('GET', url)
    for (const [name, value] of Object.entries(headers)) request.setRequestHeader(name, value)
    signal.addEventListener('abort', abort)
    request.send()
  })
}

/** As it is when the headers are there: a connection that breaks later takes the status back. */
function answered(request: XMLHttpRequest, text: Text): StreamResponse {
  const { status, statusText } = request
  const retryAfter = request.getResponseHeader('retry-after')
  return {
    ok: status >= 200 && status < 300,
    status,
    statusText,
    headers: { get: (name) => (name === 'retry-after' ? retryAfter : request.getResponseHeader(name)) },
    async json() {
      await text.finished()
      return JSON.parse(request.responseText) as unknown
    },
    read: (take) => text.read(() => request.responseText, take),
  }
}

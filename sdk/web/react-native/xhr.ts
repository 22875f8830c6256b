/** Streams over `XMLHttpRequest`, which React Native hands over as they come; its `fetch` does not. */

import type { StreamRequest, StreamResponse } from '../conversation/host.js'

const HEADERS_RECEIVED = 2
const DONE = 4

export function openStream(url: string, { headers, signal }: StreamRequest): Promise<StreamResponse> {
  return new Promise((resolve, reject) => {
    const request = new XMLHttpRequest()
    let read = 0
    let told: ((text: string) => void) | undefined
    let isOver = false
    let end: { resolve: () => void; reject: (error: Error) => void } | undefined
    let failure: Error | undefined
    const pass = () => {
      if (!told) return
      const text = request.responseText.slice(read)
      read += text.length
      if (text !== '') told(text)
    }
    const finish = (error?: Error) => {
      if (isOver) return
      isOver = true
      failure = error
      if (error) reject(error)
      if (failure) end?.reject(failure)
      else end?.resolve()
    }
    const over = () =>
      new Promise<void>((done, failed) => {
        if (!isOver) end = { resolve: done, reject: failed }
        else if (failure) failed(failure)
        else done()
      })
    const response: StreamResponse = {
      get ok() {
        return request.status >= 200 && request.status < 300
      },
      get status() {
        return request.status
      },
      get statusText() {
        return request.statusText
      },
      headers: { get: (name) => request.getResponseHeader(name) },
      async json() {
        await over()
        return JSON.parse(request.responseText) as unknown
      },
      async read(each) {
        told = each
        pass()
        await over()
      },
    }
    // Listening to this is what has React Native hand over pieces.
    request.onreadystatechange = () => {
      if (request.readyState >= HEADERS_RECEIVED && request.status > 0) resolve(response)
      if (request.readyState > HEADERS_RECEIVED) pass()
      if (request.readyState === DONE && request.status > 0) finish()
    }
    request.onerror = () => finish(new TypeError('the connection failed'))
    request.onabort = () => finish(new Error('it was ended from here'))
    request.ontimeout = () => finish(new TypeError('the connection timed out'))
    request.open('GET', url)
    for (const [name, value] of Object.entries(headers)) request.setRequestHeader(name, value)
    signal.addEventListener('abort', () => request.abort())
    request.send()
  })
}

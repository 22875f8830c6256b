/** Streams over a request that behaves as React Native's does, which no browser's does. */

import assert from 'node:assert/strict'
import { afterEach, beforeEach, test } from 'node:test'

import { openStream } from '../react-native/xhr.js'

/** When a connection breaks, React Native calls once more for a change of state, with the words of the failure as text and the status kept. */
class NativeRequest {
  static sent: NativeRequest[] = []
  readyState = 0
  status = 0
  statusText = ''
  responseText = ''
  isAborted = false
  onreadystatechange: (() => void) | null = null
  onload: (() => void) | null = null
  onerror: (() => void) | null = null
  onabort: (() => void) | null = null
  ontimeout: (() => void) | null = null
  open(): void {}
  setRequestHeader(): void {}
  getResponseHeader(): string | null {
    return null
  }
  send(): void {
    NativeRequest.sent.push(this)
  }
  abort(): void {
    this.isAborted = true
    this.onabort?.()
  }
  #is(state: number): void {
    this.readyState = state
    this.onreadystatechange?.()
  }
  begin(status: number): void {
    this.status = status
    this.#is(2)
  }
  load(text: string): void {
    this.responseText += text
    this.#is(3)
  }
  end(): void {
    this.#is(4)
    this.onload?.()
  }
  break(): void {
    this.responseText = 'The network connection was lost.'
    this.#is(4)
    this.onerror?.()
  }
}

const real = (globalThis as { XMLHttpRequest?: unknown }).XMLHttpRequest

beforeEach(() => {
  NativeRequest.sent = []
  Object.assign(globalThis, { XMLHttpRequest: NativeRequest })
})
afterEach(() => void Object.assign(globalThis, { XMLHttpRequest: real }))

const ask = () => ({ headers: {}, signal: new AbortController().signal })
const sent = () => NativeRequest.sent[0]!

test('pieces come as they come, once, also those before the reader', async () => {
  const opening = openStream('/', ask())
  sent().begin(200)
  const stream = await opening
  sent().load('one ')
  const pieces: string[] = []
  const reading = stream.read((text) => pieces.push(text))
  sent().load('two')
  sent().end()
  await reading
  assert.deepEqual([stream.ok, pieces], [true, ['one ', 'two']])
})

test('a connection that breaks is no end, and its words are no text', async () => {
  const opening = openStream('/', ask())
  sent().begin(200)
  const stream = await opening
  const pieces: string[] = []
  const reading = stream.read((text) => pieces.push(text))
  sent().load('one ')
  sent().break()
  await assert.rejects(reading, /connection failed/)
  assert.deepEqual(pieces, ['one '])
})

test('a refusal keeps its status, and says what it says', async () => {
  const opening = openStream('/', ask())
  sent().begin(429)
  const stream = await opening
  sent().load('{"error":1}')
  sent().end()
  sent().status = 0
  assert.deepEqual([stream.ok, stream.status, await stream.json()], [false, 429, { error: 1 }])
})

test('what was given up before it was sent is not sent, and what is given up later ends', async () => {
  const over = new AbortController()
  over.abort()
  await assert.rejects(openStream('/', { headers: {}, signal: over.signal }), /aborted/)
  assert.equal(NativeRequest.sent.length, 0)
  const later = new AbortController()
  const opening = openStream('/', { headers: {}, signal: later.signal })
  sent().begin(200)
  const reading = (await opening).read(() => undefined)
  later.abort()
  await assert.rejects(reading, /aborted/)
  assert.ok(sent().isAborted)
})

test('a reader that fails ends the stream', async () => {
  const opening = openStream('/', ask())
  sent().begin(200)
  const reading = (await opening).read(() => {
    throw new Error('too large')
  })
  sent().load('x')
  await assert.rejects(reading, /too large/)
  assert.ok(sent().isAborted)
})

/** The parts of a conversation that need no browser. */

import assert from 'node:assert/strict'
import { readFileSync } from 'node:fs'
import { createRequire } from 'node:module'
import { fileURLToPath } from 'node:url'
import { mock, test } from 'node:test'
import { gzipSync } from 'node:zlib'

import { Outbox, type Store } from '../conversation/outbox.js'
import { EventParser } from '../conversation/sse.js'
import { Tab, type Channel } from '../conversation/tabs.js'
import { TokenError, Tokens, expiresAt } from '../conversation/token.js'
import { apply, type Artifact } from '../sandbox/index.js'

test('events are read however they are cut', () => {
  const text = ': hi\n\nevent: a\nid: 1\ndata: {"x":\ndata: 1}\n\ndata:é\r\n\r\nid: 2\n\nevent: b\rdata: z\r\revent: cut\ndata: off'
  const expected = [
    { name: 'a', id: '1', data: '{"x":\n1}' },
    { name: 'message', id: '1', data: 'é' },
    { name: 'b', id: '2', data: 'z' },
  ]
  for (let size = 1; size <= text.length; size += 1) {
    const parser = new EventParser()
    const events = []
    for (let at = 0; at < text.length; at += size) events.push(...parser.push(text.slice(at, at + size)))
    assert.deepEqual(events, expected, `pieces of ${size}`)
  }
})

function jwt(exp: number): string {
  return `x.${btoa(JSON.stringify({ exp })).replace(/=+$/, '')}.y`
}

test('a token is fetched once for all who ask, and kept while it is good', async () => {
  let count = 0
  const tokens = new Tokens(async () => (count += 1, jwt(Date.now() / 1000 + 900 + count)), 1000)
  const [one, two] = await Promise.all([tokens.get(), tokens.get()])
  assert.equal(one, two)
  assert.equal(await tokens.get(), one)
  tokens.drop()
  assert.notEqual(await tokens.get(), one)
  assert.equal(count, 2)
  const short = new Tokens(async () => (count += 1, jwt(Date.now() / 1000 + 299)), 1000)
  assert.equal(await short.get(), await short.get(), 'a short one is kept for half of its life')
  const late = new Tokens(() => new Promise(() => undefined), 5)
  await assert.rejects(late.get(), TokenError)
  await assert.rejects(new Tokens(() => Promise.reject(new Error('no')), 1000).get(), TokenError)
  assert.equal(expiresAt(jwt(7)), 7000)
  assert.ok(expiresAt('no token') > Date.now())
})

test('one tab leads, and another one when it is gone', () => {
  mock.timers.enable({ apis: ['setTimeout', 'setInterval'] })
  mock.method(Math, 'random', () => 0.5)
  // A millisecond at a time, so that what follows from one timer comes in its turn.
  const tick = (ms: number) => Array.from({ length: ms }, () => mock.timers.tick(1))
  const all = new Set<Channel>()
  const heard: Record<string, unknown[]> = {}
  const leaders = new Set<string>()
  const open = (id: string) => {
    const channel: Channel = {
      onmessage: null,
      // As browsers do it: a moment later.
      postMessage: (data) => void setTimeout(() => all.forEach((other) => other !== channel && other.onmessage?.({ data })), 1),
      close: () => void all.delete(channel),
    }
    all.add(channel)
    heard[id] = []
    const tab = new Tab({
      channel, id,
      elected: () => void leaders.add(id),
      demoted: () => void leaders.delete(id),
      heard: (what) => heard[id]?.push(what),
      asked: () => undefined,
    })
    tab.elect()
    return { tab, channel }
  }
  const b = open('b')
  assert.equal(leaders.size, 0)
  tick(300)
  assert.deepEqual([...leaders], ['b'])
  const [a, c] = [open('a'), open('c')]
  tick(10_000)
  assert.deepEqual([...leaders], ['b'], 'whoever comes later follows')
  b.tab.pass('news')
  tick(1)
  assert.deepEqual([heard['a'], heard['b'], heard['c']], [['news'], [], ['news']])
  // Who says goodbye is followed at once, and only once.
  b.tab.close()
  leaders.delete('b')
  tick(200)
  assert.equal(leaders.size, 1)
  // Who does not is missed after three seconds.
  const [leader, other] = leaders.has('a') ? [a, c] : [c, a]
  all.delete(leader.channel)
  leader.channel.postMessage = () => undefined
  leaders.clear()
  tick(2900)
  assert.equal(leaders.size, 0)
  tick(500)
  assert.equal(leaders.size, 1)
  assert.ok(other.tab.leads)
  // Of two that claim it at once, the one with the smaller id keeps it.
  all.clear()
  leaders.clear()
  open('y')
  open('x')
  tick(310)
  assert.deepEqual([...leaders], ['x'])
  mock.reset()
})

function store(): Store {
  const kept = new Map<string, string>()
  return {
    get length() {
      return kept.size
    },
    key: (n) => [...kept.keys()][n] ?? null,
    getItem: (key) => kept.get(key) ?? null,
    setItem: (key, value) => void kept.set(key, value),
    removeItem: (key) => void kept.delete(key),
  }
}

test('what waits to be sent outlives its page', () => {
  const kept = store()
  kept.setItem('box:old', JSON.stringify({ key: 'old', text: 'x', at: Date.now() - 21 * 3600_000 }))
  kept.setItem('box:bad', '{')
  kept.setItem('elsewhere', 'x')
  const [one, two] = [new Outbox(kept, 'box'), new Outbox(kept, 'box')]
  const first = one.add('first')
  two.add('second', 'draft')
  const next = new Outbox(kept, 'box')
  assert.deepEqual(next.pending.map(({ text }) => text).sort(), ['first', 'second'])
  one.done(first.key)
  assert.deepEqual(new Outbox(kept, 'box').pending.map(({ messageId }) => messageId), ['draft'])
  assert.equal(kept.getItem('elsewhere'), 'x')
  const forbidden = { ...store(), setItem: () => assert.fail('full') }
  assert.equal(new Outbox(forbidden, 'box').add('x').text, 'x')
  const full = new Outbox(undefined, 'box')
  for (let n = 0; n < 100; n += 1) full.add('x')
  assert.throws(() => full.add('x'), /too much/)
})

test('artifacts grow', () => {
  const artifacts = new Map<number, Artifact>()
  const artifact = { seq: 1, kind: 'message', text: 'a', createdAt: 1, updatedAt: 1 }
  apply(artifacts, 'artifact_created', { artifact })
  apply(artifacts, 'artifact_updated', { seq: 1, field: 'text', append: 'b', updatedAt: 2 })
  apply(artifacts, 'artifact_updated', { seq: 1, field: 'status', set: 'done', updatedAt: 3 })
  apply(artifacts, 'artifact_updated', { seq: 9, field: 'text', append: 'b', updatedAt: 2 })
  assert.deepEqual([...artifacts.values()], [{ ...artifact, text: 'ab', status: 'done', updatedAt: 3 }])
})

test('it is small, and there for every kind of program', async () => {
  const dist = fileURLToPath(new URL('../../dist/', import.meta.url))
  const script = gzipSync(readFileSync(`${dist}trunkline.js`), { level: 9 }).length
  assert.ok(script < 15_000, `the script tag is ${script} bytes`)
  const required = createRequire(import.meta.url)(`${dist}cjs/conversation.cjs`) as Record<string, unknown>
  const imported = (await import(`${dist}conversation/index.js`)) as Record<string, unknown>
  for (const module of [required, imported]) assert.equal(typeof module['ConversationClient'], 'function')
  createRequire(import.meta.url)(`${dist}cjs/react.cjs`)
  createRequire(import.meta.url)(`${dist}cjs/sandbox.cjs`)
})

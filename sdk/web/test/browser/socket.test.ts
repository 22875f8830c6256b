/** The page of the quick start in a real browser, with a real server and a real runtime. Run by `cargo xtask test web`. */

import assert from 'node:assert/strict'
import { spawn, type ChildProcess } from 'node:child_process'
import type { Server } from 'node:http'
import { after, before, test } from 'node:test'

import type { Browser, Page } from 'playwright-core'
import { WebSocket } from 'ws'

import { agentSocketWsConnector } from '../../agent-socket/adapters/ws.js'
import { AgentSocketClient, AgentSocketRuntime, type AgentSocketEnvelope } from '../../agent-socket/index.js'
import { browser as launch, clean, env, kill, pages, start, Wire } from './harness.js'

let [trunkline, runtime]: (ChildProcess | undefined)[] = []
let browser: Browser
let files: Server
let [origin, http] = ['', '127.0.0.1:0']

async function serve(): Promise<void> {
  const args = ['serve', '--dev', '--grpc', '127.0.0.1:0', '--ops', '127.0.0.1:0', '--http', http]
  const [server, ready] = await start(args, /http=(\S+)/, { TRUNKLINE__HTTP__ALLOWED_ORIGINS: JSON.stringify([origin]) })
  trunkline = server
  http = ready[1]!
}

function run(): void {
  runtime = spawn(env('TRUNKLINE_RUNTIME'), [`ws://${http}/agent-socket`], { stdio: 'ignore' })
}

before(async () => {
  ;[files, origin] = await pages()
  await serve()
  run()
  browser = await launch()
})

after(async () => {
  await browser.close()
  await kill(runtime)
  await kill(trunkline)
  files.close()
  clean()
})

async function open(page: Page, address = http, client = 'web-a'): Promise<Page> {
  await page.goto(`${origin}/examples/agent-socket.html?server=http://${address}&client=${client}`)
  await page.getByText('connected').waitFor()
  return page
}

async function say(page: Page, text: string): Promise<void> {
  await page.getByLabel('Message').fill(text)
  await page.getByRole('button', { name: 'Send' }).click()
}

function turns(page: Page): Promise<string[]> {
  return page.locator('li[data-status=done]').allTextContents()
}

async function has(page: Page, expected: string[]): Promise<void> {
  await page.waitForFunction((count) => document.querySelectorAll('li[data-status=done]').length >= count, expected.length)
  assert.deepEqual(await turns(page), expected)
}

test('a page, a second tab, a reload, and a server that was killed', { timeout: 60_000 }, async () => {
  const context = await browser.newContext()
  const page = await open(await context.newPage())
  await say(page, 'one')
  await has(page, ['you said: one'])
  const tab = await open(await context.newPage())
  await has(tab, ['you said: one'])
  await say(tab, 'two')
  for (const each of [page, tab]) await has(each, ['you said: one', 'you said: two'])
  await page.reload()
  await has(page, ['you said: one', 'you said: two'])

  // What is said while the server is away is said when it is back, and once.
  await kill(trunkline)
  await say(page, 'three')
  await serve()
  for (const each of [page, tab]) await has(each, ['you said: one', 'you said: two', 'you said: three'])

  // Another runtime goes on, and the page knows.
  await kill(runtime)
  await say(tab, 'four')
  run()
  for (const each of [page, tab]) {
    await has(each, ['you said: one', 'you said: two', 'you said: three', 'you said: four'])
    await each.locator('#status[data-generation]').waitFor()
    assert.equal(await each.locator('#status').getAttribute('data-stale'), '')
  }
  await context.close()
})

test('a wire that died is noticed when the network changes or the page is shown', { timeout: 60_000 }, async () => {
  const wire = await new Wire(() => http).open()
  const page = await open(await browser.newPage(), wire.address, 'web-wire')
  const other = await open(await browser.newPage(), http, 'web-wire')
  for (const [number, event] of ['online', 'visibilitychange'].entries()) {
    await say(page, `before ${event}`)
    await has(page, Array.from({ length: 2 * number + 1 }, (_, n) => `you said: ${['before online', 'after online', 'before visibilitychange'][n]}`))
    wire.die()
    await say(other, `after ${event}`)
    const begun = Date.now()
    await page.evaluate((name) => (name === 'online' ? window : document).dispatchEvent(new Event(name)), event)
    await page.waitForFunction((count) => document.querySelectorAll('li[data-status=done]').length >= count, 2 * number + 2)
    assert.ok(Date.now() - begun < 6000, `${Date.now() - begun} ms after ${event}`)
  }
  await page.close()
  await other.close()
  wire.close()
})

test('a runtime in TypeScript: each turn once, over killed servers, and what it emits meanwhile', { timeout: 60_000 }, async () => {
  const handled: string[] = []
  const transport = agentSocketWsConnector(() => new WebSocket(`ws://${http}/agent-socket`))
  const made = new AgentSocketRuntime({
    runtimeGeneration: `ts-${Date.now()}`, transport, pauseMs: 20, pauseMaxMs: 200,
    handlers: {
      async onStartTurn({ turnId = '', payload, emit }) {
        const { text } = payload as { text: string }
        handled.push(text)
        if (text === 'fails') throw new Error('no such thing')
        emit('turn_running')
        if (text === 'two') await kill(trunkline)
        for (const word of ['ts', 'said', text]) emit('turn_text_delta', { delta: `${word} ` })
        emit('turn_done', {}, { turnId })
      },
      onAbortTurn: ({ turnId = '' }) => void handled.push(`abort ${turnId}`),
    },
  })
  await kill(runtime)
  made.connect()
  const seen: AgentSocketEnvelope[] = []
  const client = new AgentSocketClient({ clientId: 'ts', transport, pauseMs: 20, pauseMaxMs: 200 })
  client.on('*', (event) => event.seq !== undefined && seen.push(event))
  client.connect()
  const has = async (type: string, count: number) => {
    for (const begun = Date.now(); seen.filter((event) => event.type === type).length < count; ) {
      assert.ok(Date.now() - begun < 20_000, `${count} ${type}: ${JSON.stringify(seen.map((event) => event.type))}`)
      await new Promise((done) => setTimeout(done, 10))
    }
  }
  client.startTurn({ text: 'one' }, 'ts-1')
  await has('turn_done', 1)
  // The server is killed in the middle of a turn, and comes back.
  client.startTurn({ text: 'two' }, 'ts-2')
  await new Promise((done) => trunkline!.once('exit', done))
  await serve()
  await has('turn_done', 2)
  await made.flushed()
  client.startTurn({ text: 'fails' }, 'ts-3')
  await has('turn_error', 1)
  client.abortTurn('ts-3')
  for (const begun = Date.now(); !handled.includes('abort ts-3'); ) {
    assert.ok(Date.now() - begun < 20_000)
    await new Promise((done) => setTimeout(done, 10))
  }
  assert.deepEqual(handled, ['one', 'two', 'fails', 'abort ts-3'])
  const said = seen.filter((event) => event.type === 'turn_text_delta')
  assert.equal(said.map(({ payload }) => (payload as { delta: string }).delta).join(''), 'ts said one ts said two ')
  client.close()
  made.close()
  run()
})

test('a page of a foreign origin is refused', async () => {
  const page = await browser.newPage()
  await page.goto(`${origin.replace('127.0.0.1', 'localhost')}/examples/agent-socket.html`)
  const code = await page.evaluate(
    (url) => new Promise((done) => new WebSocket(url).addEventListener('close', (event) => done(event.code))),
    `ws://${http}/agent-socket`,
  )
  assert.equal(code, 1006)
})

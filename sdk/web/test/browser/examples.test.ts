/** The examples, as a reader runs them, and the React Native entry. */

import assert from 'node:assert/strict'
import { spawn, type ChildProcess } from 'node:child_process'
import type { Server } from 'node:http'
import { createServer, type AddressInfo } from 'node:net'
import { once } from 'node:events'
import { createInterface } from 'node:readline'
import { after, before, test } from 'node:test'

import { buildSync, type BuildOptions } from 'esbuild'
import type { Browser, Page } from 'playwright-core'

import type { Convo } from '../../conversation/index.js'
import { accessible, APP, browser as launch, clean, kill, pages, ROOT, World } from './harness.js'

let [browser, files]: [Browser, Server] = [] as never
let [origin, world]: [string, World] = [] as never

before(async () => {
  ;[files, origin] = await pages()
  world = new World(origin, 'examples')
  await world.serve()
  world.answer('--fast')
  browser = await launch()
})

after(async () => {
  await browser.close()
  await world.end()
  files.close()
  clean()
})

function bundled(options: BuildOptions): string {
  const built = buildSync({
    bundle: true, format: 'iife', write: false, target: 'es2022', jsx: 'automatic', define: { 'process.env.NODE_ENV': '"development"' },
    alias: { '@trunkline/web': `${ROOT}dist/conversation/index.js`, '@trunkline/web/react': `${ROOT}dist/react/index.js` },
    ...options,
  })
  return built.outputFiles![0]!.text
}

/** Says something, sees it and its answer once, and again after a reload. */
async function talks(page: Page, text: string): Promise<void> {
  const answer = page.locator('li.ai_agent', { hasText: `You said: “${text}”` })
  await page.getByLabel('Message').fill(text)
  await page.getByRole('button', { name: 'Send' }).click()
  await answer.waitFor()
  await page.reload()
  await answer.waitFor()
  assert.deepEqual(await page.locator('li.appuser').allTextContents(), [text])
  assert.equal(await answer.count(), 1)
  await accessible(page)
}

test('the plain page', { timeout: 60_000 }, async () => {
  const page = await (await browser.newContext()).newPage()
  const address = `?server=http://${world.http}&agent=${APP.agentId}&token=${encodeURIComponent('/token?user=vanilla')}`
  await page.goto(`${origin}/examples/vanilla.html${address}`)
  await page.locator('#state[data-stream="live"]').waitFor()
  await talks(page, 'from a plain page')
})

test('the React component, also where every effect runs twice', { timeout: 60_000 }, async () => {
  const page = await (await browser.newContext()).newPage()
  const main = `
    import { StrictMode } from 'react'
    import { createRoot } from 'react-dom/client'
    import { SupportChat } from './react'
    const chat = <SupportChat baseUrl="http://${world.http}" agentId="${APP.agentId}" tokenUrl="/token?user=reactive" />
    const main = document.body.appendChild(document.createElement('main'))
    main.append(Object.assign(document.createElement('h1'), { textContent: 'Support' }), document.createElement('div'))
    createRoot(main.lastElementChild).render(<StrictMode>{chat}</StrictMode>)`
  const script = bundled({ stdin: { contents: main, resolveDir: `${ROOT}examples`, loader: 'tsx' } })
  await page.addInitScript(`addEventListener('DOMContentLoaded', () => {${script}})`)
  await page.goto(`${origin}/nothing`)
  await page.locator('[data-stream="live"]').waitFor()
  await talks(page, 'from React')
  const begun = await world.ask<{ agent_convos: unknown[] }>('reactive', '/agent_convos')
  assert.equal(begun.agent_convos.length, 1)
})

test('the Next.js app', { timeout: 180_000 }, async () => {
  const port = await freePort()
  const allowed = new World(`http://127.0.0.1:${port}`, 'next')
  let app: ChildProcess | undefined
  try {
    await allowed.serve()
    allowed.answer('--fast')
    app = await next(['start', '--port', String(port), '--hostname', '127.0.0.1'], {
      TRUNKLINE_URL: `http://${allowed.http}`, TRUNKLINE_AGENT_ID: APP.agentId, TRUNKLINE_APP_KEY: APP.key, TRUNKLINE_APP_SECRET: APP.secret,
    })
    const context = await browser.newContext()
    const page = await context.newPage()
    const refused = await context.request.get(`http://127.0.0.1:${port}/api/trunkline/jwt`)
    assert.equal(refused.status(), 401, 'nobody is signed in')
    await context.addCookies([{ name: 'user', value: 'nextuser', url: `http://127.0.0.1:${port}` }])
    await page.goto(`http://127.0.0.1:${port}/`)
    await page.getByRole('status').filter({ hasText: 'live' }).waitFor()
    await talks(page, 'from Next.js')
  } finally {
    await kill(app)
    await allowed.end()
  }
})

test('a React Native app: streams over XHR, the app behind others, without a network, started again', { timeout: 60_000 }, async () => {
  type Native = typeof import('./native.js')['native']
  type Globals = { native: Native; convo: Convo }
  const context = await browser.newContext()
  const page = await context.newPage()
  const script = bundled({ entryPoints: [`${ROOT}test/browser/native.ts`] })
  // It has no other tabs to tell.
  await page.addInitScript(`delete globalThis.BroadcastChannel; ${script}`)
  await page.goto(`${origin}/nothing`)
  const open = async (convoId?: string) =>
    page.evaluate(async ([base, agentId, convoId]) => {
      const globals = globalThis as unknown as Globals
      const realFetch = fetch
      // Its fetch hands over nothing before the end: a stream would never come.
      globalThis.fetch = (input, init) =>
        String(input).includes('/events') ? new Promise(() => undefined) : realFetch(input, init)
      globals.convo = await globals.native.open(base!, agentId!, 'native', convoId)
      return globals.convo.convoId
    }, [`http://${world.http}`, APP.agentId, convoId] as const)
  const say = (text: string) => page.evaluate(async (text) => (globalThis as unknown as Globals).convo.send(text), text)
  const sees = (texts: number) =>
    page.waitForFunction((texts) => (globalThis as unknown as Globals).native.texts.length >= texts, texts)
  const is = (status: string) =>
    page.waitForFunction((status) => (globalThis as unknown as Globals).convo.status === status, status)
  const convoId = await open()
  await is('live')
  await say('one')
  await sees(2)
  const names = await page.evaluate(() => [...(globalThis as unknown as Globals).native.names].sort())
  assert.deepEqual(names, ['convo_state', 'message', 'ready', 'token', 'turn_done', 'typing'])
  // Behind another app, nothing is streamed; in front of it again, what came meanwhile is there.
  // A glance at the app switcher, and a measurement of the network, change nothing: what is under way goes on.
  let posts = 0
  await context.route('**/stream_message', async (route) => {
    posts += 1
    await new Promise((done) => setTimeout(done, 400))
    await route.continue()
  })
  const sending = say('slow')
  await page.waitForFunction(() => (globalThis as unknown as Globals).convo.pending.length === 1)
  for (const how of ['inactive', 'active'] as const) {
    await page.evaluate((how) => (globalThis as unknown as Globals).native.state(how), how)
    await page.evaluate(() => (globalThis as unknown as Globals).native.network(true))
  }
  await sending
  assert.equal(posts, 1)
  await context.unroute('**/stream_message')
  await sees(4)
  await page.evaluate(() => (globalThis as unknown as Globals).native.state('background'))
  await is('paused')
  await world.ask('native', `/agent_convos/${convoId}/stream_message`, { text: 'two' })
  await page.evaluate(() => (globalThis as unknown as Globals).native.state('active'))
  await sees(6)
  await page.evaluate(() => (globalThis as unknown as Globals).native.network(false))
  await is('offline')
  await page.evaluate(() => (globalThis as unknown as Globals).native.network(true))
  await is('live')
  // What was not sent when the app ended is sent when it is there again.
  await context.route('**/stream_message', (route) => route.abort())
  void say('three').catch(() => undefined)
  await page.waitForFunction(() => Object.keys(localStorage).some((key) => key.startsWith('trunkline:')))
  await page.reload()
  await context.unroute('**/stream_message')
  await open(convoId)
  await sees(8)
  const texts = await page.evaluate(() => (globalThis as unknown as Globals).native.texts)
  assert.deepEqual(texts.filter((_, at) => at % 2 === 0), ['one', 'slow', 'two', 'three'])
})

async function freePort(): Promise<number> {
  const listener = createServer().listen(0, '127.0.0.1')
  await once(listener, 'listening')
  const { port } = listener.address() as AddressInfo
  listener.close()
  await once(listener, 'close')
  return port
}

/** `next`, until it says that it is ready. */
async function next(args: string[], more: Record<string, string>): Promise<ChildProcess> {
  const cwd = `${ROOT}examples/nextjs`
  const child = spawn(process.execPath, ['node_modules/next/dist/bin/next', ...args], {
    cwd, env: { ...process.env, NODE_ENV: 'production', NEXT_TELEMETRY_DISABLED: '1', ...more }, stdio: ['ignore', 'pipe', 'inherit'],
  })
  for await (const line of createInterface(child.stdout)) {
    if (line.includes('Ready')) {
      child.stdout.resume()
      return child
    }
  }
  return assert.fail('next ended before it was ready')
}

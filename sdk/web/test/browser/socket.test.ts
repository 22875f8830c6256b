/** The page of the quick start in a real browser, with a real server and a real runtime. Run by `cargo xtask test web`. */

import assert from 'node:assert/strict'
import { spawn, type ChildProcess } from 'node:child_process'
import { once } from 'node:events'
import { mkdtempSync, readFileSync, rmSync } from 'node:fs'
import { createServer } from 'node:http'
import type { AddressInfo } from 'node:net'
import { tmpdir } from 'node:os'
import { join, normalize } from 'node:path'
import { createInterface } from 'node:readline'
import { after, before, test } from 'node:test'
import { fileURLToPath } from 'node:url'

import { chromium, type Browser, type Page } from 'playwright-core'

const ROOT = fileURLToPath(new URL('../../../', import.meta.url))
const TYPES: Record<string, string> = { html: 'text/html', js: 'text/javascript' }
/** Without these, a browser in a closed network waits for its maker's hosts. */
const QUIET = [
  '--no-sandbox',
  '--disable-gpu',
  '--disable-quic',
  '--no-first-run',
  '--disable-background-networking',
  '--disable-component-update',
  '--disable-sync',
]

function env(name: string): string {
  const value = process.env[name]
  assert.ok(value, `${name} is set by cargo xtask test`)
  return value
}

const dir = mkdtempSync(join(tmpdir(), 'trunkline-web-'))
/** This page's own server: an origin that is not Trunkline's. */
const files = createServer((request, response) => {
  const path = normalize(new URL(request.url ?? '/', 'http://x').pathname)
  try {
    response.setHeader('content-type', TYPES[path.split('.').at(-1) ?? ''] ?? 'text/plain')
    response.end(readFileSync(join(ROOT, path)))
  } catch {
    response.writeHead(404).end()
  }
})
let [trunkline, runtime]: (ChildProcess | undefined)[] = []
let browser: Browser
let [origin, http] = ['', '127.0.0.1:0']

async function serve(): Promise<void> {
  trunkline = spawn(env('TRUNKLINE_BIN'), ['serve', '--dev', '--grpc', '127.0.0.1:0', '--ops', '127.0.0.1:0', '--http', http], {
    cwd: dir,
    env: { ...process.env, TRUNKLINE__HTTP__ALLOWED_ORIGINS: JSON.stringify([origin]), TRUNKLINE_LOG: 'error' },
    stdio: ['ignore', 'pipe', 'inherit'],
  })
  assert.ok(trunkline.stdout)
  const [line] = (await once(createInterface(trunkline.stdout), 'line')) as [string]
  http = /http=(\S+)/.exec(line)?.[1] ?? assert.fail(line)
}

async function kill(child: ChildProcess | undefined): Promise<void> {
  if (!child || child.exitCode !== null || child.signalCode !== null) return
  child.kill('SIGKILL')
  await once(child, 'exit')
}

function run(): void {
  runtime = spawn(env('TRUNKLINE_RUNTIME'), [`ws://${http}/agent-socket`], { stdio: 'ignore' })
}

before(async () => {
  files.listen(0, '127.0.0.1')
  await once(files, 'listening')
  origin = `http://127.0.0.1:${(files.address() as AddressInfo).port}`
  await serve()
  run()
  browser = await chromium.launch({ executablePath: env('TRUNKLINE_CHROMIUM'), args: QUIET })
})

after(async () => {
  await browser.close()
  await kill(runtime)
  await kill(trunkline)
  files.close()
  rmSync(dir, { recursive: true })
})

async function open(page: Page): Promise<Page> {
  await page.goto(`${origin}/examples/agent-socket.html?server=http://${http}`)
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

test('a page of a foreign origin is refused', async () => {
  const page = await browser.newPage()
  await page.goto(`${origin.replace('127.0.0.1', 'localhost')}/examples/agent-socket.html`)
  const code = await page.evaluate(
    (url) => new Promise((done) => new WebSocket(url).addEventListener('close', (event) => done(event.code))),
    `ws://${http}/agent-socket`,
  )
  assert.equal(code, 1006)
})

/** What tests in a browser need: a server, an agent, pages of an origin of their own, and a browser. */

import assert from 'node:assert/strict'
import { spawn, type ChildProcess } from 'node:child_process'
import { createHmac } from 'node:crypto'
import { once } from 'node:events'
import { mkdirSync, mkdtempSync, readFileSync, rmSync } from 'node:fs'
import { createServer, type Server } from 'node:http'
import { connect, createServer as listen, type AddressInfo, type Server as Listener, type Socket } from 'node:net'
import { tmpdir } from 'node:os'
import { join, normalize } from 'node:path'
import { createInterface } from 'node:readline'
import { fileURLToPath } from 'node:url'

import { chromium, type Browser, type Page } from 'playwright-core'

export const ROOT = fileURLToPath(new URL('../../../', import.meta.url))
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

export function env(name: string): string {
  const value = process.env[name]
  assert.ok(value, `${name} is set by cargo xtask test`)
  return value
}

export const dir = mkdtempSync(join(tmpdir(), 'trunkline-web-'))

export function browser(): Promise<Browser> {
  return chromium.launch({ executablePath: env('TRUNKLINE_CHROMIUM'), args: QUIET })
}

/** What people look at afterwards. */
export async function screenshot(page: Page, name: string): Promise<void> {
  const shots = env('TRUNKLINE_SCREENSHOTS')
  mkdirSync(shots, { recursive: true })
  await page.screenshot({ path: join(shots, `${name}.png`) })
}

/** What axe has against a page as it is: nothing. */
export async function accessible(page: Page): Promise<void> {
  await page.addScriptTag({ path: fileURLToPath(import.meta.resolve('axe-core/axe.min.js')) })
  const found = await page.evaluate(async () => {
    const { axe } = globalThis as unknown as { axe: typeof import('axe-core') }
    const { violations } = await axe.run(document, { runOnly: ['wcag2a', 'wcag2aa', 'wcag21a', 'wcag21aa', 'wcag22aa', 'best-practice'] })
    return violations.map(({ id, nodes }) => `${id}: ${nodes.map(({ target }) => target.join(' ')).join(', ')}`)
  })
  assert.deepEqual(found, [])
}

export async function kill(child: ChildProcess | undefined): Promise<void> {
  if (!child || child.exitCode !== null || child.signalCode !== null) return
  child.kill('SIGKILL')
  await once(child, 'exit')
}

/** Starts a program, and waits for the line that matches. */
export async function start(args: string[], line: RegExp, more: Record<string, string> = {}): Promise<[ChildProcess, RegExpExecArray]> {
  const child = spawn(env('TRUNKLINE_BIN'), args, {
    cwd: dir,
    env: { ...process.env, TRUNKLINE_LOG: 'error', ...more },
    stdio: ['ignore', 'pipe', 'inherit'],
  })
  assert.ok(child.stdout)
  for await (const text of createInterface(child.stdout)) {
    const found = line.exec(text)
    if (found) {
      child.stdout.resume()
      return [child, found]
    }
  }
  return assert.fail(`${args[0]} ended before ${line}`)
}

export const APP = { key: 'app_test', secret: '0123456789abcdef0123456789abcdef', agentId: '00000000-0000-4000-8000-00000000000a' }

/** A token as the app's backend signs it. */
export function sign(user: string, seconds = 900): string {
  const part = (json: object) => Buffer.from(JSON.stringify(json)).toString('base64url')
  const now = Math.floor(Date.now() / 1000)
  const claims = {
    iss: APP.key, aud: 'valet-sdk', company_api_key: APP.key, agent_uuid: APP.agentId, source_key: user, iat: now, exp: now + seconds,
  }
  const said = `${part({ alg: 'HS256', typ: 'JWT' })}.${part(claims)}`
  return `${said}.${createHmac('sha256', APP.secret).update(said).digest('base64url')}`
}

/** Pages, and tokens for them, from an origin that is not Trunkline's. */
export async function pages(): Promise<[Server, string]> {
  const server = createServer((request, response) => {
    const url = new URL(request.url ?? '/', 'http://x')
    if (url.pathname === '/token') {
      response.end(sign(url.searchParams.get('user') ?? 'ann', Number(url.searchParams.get('seconds') ?? 900)))
      return
    }
    if (url.pathname === '/nothing') {
      response.setHeader('content-type', 'text/html')
      response.end('<!doctype html><html lang="en"><title>A page</title>')
      return
    }
    const path = normalize(url.pathname)
    try {
      response.setHeader('content-type', TYPES[path.split('.').at(-1) ?? ''] ?? 'text/plain')
      response.end(readFileSync(join(ROOT, path)))
    } catch {
      response.writeHead(404).end()
    }
  })
  server.listen(0, '127.0.0.1')
  await once(server, 'listening')
  return [server, `http://127.0.0.1:${(server.address() as AddressInfo).port}`]
}

/** A server with one app, and an agent; at the same addresses when they are started again. */
export class World {
  #server: ChildProcess | undefined
  #agent: ChildProcess | undefined
  readonly #origin: string
  readonly #data: string
  #grpc = '127.0.0.1:0'
  http = '127.0.0.1:0'

  constructor(origin: string, name: string) {
    this.#origin = origin
    this.#data = join(dir, name)
  }

  async serve(): Promise<void> {
    const agent = `{ id = "${APP.agentId}", identity = "ag::demo::assistant::one", name = "Ada" }`
    const apps = `[{ name = "test", key = "${APP.key}", secret = "${APP.secret}", origins = ["${this.#origin}"], agents = [${agent}] }]`
    const args = ['serve', '--dev', '--grpc', this.#grpc, '--ops', '127.0.0.1:0', '--http', this.http, '--data-dir', this.#data]
    const limits = { TRUNKLINE__CONVERSATION__MESSAGES_PER_MINUTE: '0', TRUNKLINE__CONVERSATION__SESSIONS_PER_MINUTE: '0' }
    const [server, ready] = await start(args, /grpc=(\S+) http=(\S+)/, { ...limits, TRUNKLINE__APPS: apps })
    this.#server = server
    this.#grpc = ready[1]!
    this.http = ready[2]!
  }

  /** An agent that says everything at once. */
  answer(...how: string[]): void {
    const args = ['demo', 'agent', '--server', `http://${this.#grpc}`, '--http', `http://${this.http}`, ...how]
    this.#agent = spawn(env('TRUNKLINE_BIN'), args, { env: { ...process.env, TRUNKLINE_LOG: 'error' }, stdio: 'ignore' })
  }

  killServer(): Promise<void> {
    return kill(this.#server)
  }

  killAgent(): Promise<void> {
    return kill(this.#agent)
  }

  async restart(): Promise<void> {
    await this.killServer()
    await this.serve()
  }

  async end(): Promise<void> {
    await this.killAgent()
    await this.killServer()
  }

  /** Asks as a user. */
  async ask<T>(user: string, path: string, body?: object, headers: Record<string, string> = {}): Promise<T> {
    const response = await fetch(`http://${this.http}/api/v2${path}`, {
      method: body === undefined ? 'GET' : 'POST',
      headers: { authorization: `Bearer ${sign(user)}`, 'content-type': 'application/json', ...headers },
      ...(body === undefined ? {} : { body: JSON.stringify(body) }),
    })
    assert.ok(response.ok, `${path}: ${response.status} ${await response.clone().text()}`)
    return (await response.json()) as T
  }
}

/** What lies between a browser and a server, and fails as it is told. */
export class Wire {
  readonly #listener: Listener
  readonly #ends = new Set<Socket>()
  address = ''

  /** `passes` is asked about each piece that a browser sends; what it answers is what becomes of the connection behind it. */
  constructor(target: () => string, passes: (piece: Buffer) => 'goes on' | 'breaks before the answer' = () => 'goes on') {
    this.#listener = listen((near) => {
      const [host, port] = target().split(':')
      const far = connect(Number(port), host)
      let isBroken = false
      for (const [from, to] of [[near, far], [far, near]] as const) {
        this.#ends.add(from)
        from.on('error', () => undefined)
        from.on('close', () => (this.#ends.delete(from), to.destroy()))
      }
      near.on('data', (piece) => {
        isBroken ||= passes(piece) !== 'goes on'
        far.write(piece)
      })
      far.on('data', (piece) => (isBroken ? near.destroy() : near.write(piece)))
    })
  }

  async open(): Promise<this> {
    this.#listener.listen(0, '127.0.0.1')
    await once(this.#listener, 'listening')
    this.address = `127.0.0.1:${(this.#listener.address() as AddressInfo).port}`
    return this
  }

  /** From now on, nothing comes over the connections that there are, and neither end hears of it. */
  die(): void {
    for (const end of this.#ends) end.removeAllListeners('data').resume()
  }

  close(): void {
    this.#listener.close()
    for (const end of this.#ends) end.destroy()
  }
}

export function clean(): void {
  rmSync(dir, { recursive: true, force: true })
}

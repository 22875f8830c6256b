/** Sandboxes: what they make, as it comes into being, and what they are told. */

import { newKey } from '../conversation/key.js'
import { readEvents } from '../conversation/sse.js'

export type Status = 'bootstrapping' | 'live' | 'idle' | 'disconnected'
export type SandboxSession = { id: string; project?: string; status: Status; summary?: string; createdAt: number }
/** `seq` orders them and is theirs for ever; other fields are by kind. */
export type Artifact = { seq: number; kind: string; status?: string; createdAt: number; updatedAt: number; [field: string]: unknown }

export type SandboxClientOptions = {
  /** Where Trunkline is; the page's own server, if not given. */
  baseUrl?: string
  /** A bearer token, or what answers one; none, for a server that needs none. */
  token?: string | (() => Promise<string>)
  fetch?: typeof fetch
}

type Update = { seq: number; field: string; append?: string; set?: unknown; updatedAt: number }
type Told = { artifact?: Artifact } & Partial<Update>

const BACKOFF_MS = 250
const BACKOFF_MAX_MS = 30_000
/** The server says something every 15 s. */
const SILENCE_MS = 40_000

export class SandboxClient {
  readonly #base: string
  readonly #options: SandboxClientOptions

  constructor(options: SandboxClientOptions = {}) {
    this.#options = options
    this.#base = (options.baseUrl ?? '').replace(/\/+$/, '')
  }

  /** All sessions, or those of a project, oldest first. */
  async sessions(project?: string): Promise<SandboxSession[]> {
    const query = project === undefined ? '' : `?project=${encodeURIComponent(project)}`
    return (await this.#ask(`/sessions${query}`)).json() as Promise<SandboxSession[]>
  }

  async session(id: string): Promise<SandboxSession> {
    return (await this.#ask(path(id))).json() as Promise<SandboxSession>
  }

  /** Tells a sandbox what to do: under a key, once. Without one, the browser at least repeats nothing by itself that arrived. */
  async prompt(id: string, text: string, key = newKey()): Promise<void> {
    const headers = { 'content-type': 'application/json', 'idempotency-key': key }
    await this.#ask(`${path(id)}/commands`, { method: 'POST', headers, body: JSON.stringify({ type: 'prompt', text }) })
  }

  /** Shows what a sandbox makes, and goes on over lost connections, until it is closed. */
  watch(id: string, changed: (artifacts: readonly Artifact[], isLive: boolean) => void): { close(): void } {
    const over = new AbortController()
    void this.#watch(id, changed, over)
    return { close: () => over.abort() }
  }

  async #watch(id: string, changed: (artifacts: readonly Artifact[], isLive: boolean) => void, over: AbortController): Promise<void> {
    let artifacts = new Map<number, Artifact>()
    const show = (isLive: boolean) => {
      try {
        changed([...artifacts.values()].sort((a, b) => a.seq - b.seq), isLive)
      } catch (error) {
        // A page's mistake is the page's.
        console.error(error)
      }
    }
    for (let attempt = 0; !over.signal.aborted; attempt += 1) {
      const stream = new AbortController()
      const cut = () => stream.abort()
      over.signal.addEventListener('abort', cut)
      let silence: ReturnType<typeof setTimeout> | undefined
      const alive = () => {
        clearTimeout(silence)
        silence = setTimeout(cut, SILENCE_MS)
      }
      try {
        alive()
        const response = await this.#ask(`${path(id)}/stream`, { headers: { accept: 'text/event-stream' }, signal: stream.signal })
        // A stream begins with all that there is.
        artifacts = new Map()
        show(true)
        await readEvents(response, ({ name, data }) => {
          attempt = 0
          alive()
          if (name === 'session_removed') artifacts = new Map()
          else apply(artifacts, name, JSON.parse(data) as Told)
          show(true)
        })
      } catch {
        // It is tried again.
      } finally {
        clearTimeout(silence)
        cut()
        over.signal.removeEventListener('abort', cut)
      }
      if (over.signal.aborted) return
      show(false)
      const wait = Math.min(BACKOFF_MS * 2 ** attempt, BACKOFF_MAX_MS)
      await new Promise((resolve) => setTimeout(resolve, wait / 2 + (wait / 2) * Math.random()))
    }
  }

  async #ask(target: string, request: RequestInit = {}): Promise<Response> {
    const { token } = this.#options
    const headers = new Headers(request.headers)
    const bearer = typeof token === 'function' ? await token() : token
    if (bearer) headers.set('authorization', `Bearer ${bearer}`)
    const response = await (this.#options.fetch ?? fetch)(`${this.#base}${target}`, { ...request, headers, cache: 'no-store' })
    if (response.ok) return response
    const said = (await response.json().catch(() => ({}))) as { error?: { message?: string } }
    throw new Error(said.error?.message ?? `status ${response.status}`)
  }
}

function path(id: string): string {
  return `/sessions/${encodeURIComponent(id)}`
}

/** What an event makes of what is there. */
export function apply(artifacts: Map<number, Artifact>, name: string, told: Told): void {
  if (told.artifact) {
    artifacts.set(told.artifact.seq, told.artifact)
    return
  }
  const before = name === 'artifact_updated' && told.seq !== undefined ? artifacts.get(told.seq) : undefined
  if (!before || !told.field) return
  const value = told.append === undefined ? told.set : `${String(before[told.field] ?? '')}${told.append}`
  artifacts.set(before.seq, { ...before, [told.field]: value, updatedAt: told.updatedAt ?? before.updatedAt })
}

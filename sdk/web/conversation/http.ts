/** Requests with a token: once more with a new one if it was refused. */

import type { Host, StreamResponse } from './host.js'
import { Tokens } from './token.js'
import { RequestError } from './types.js'

export type Request = { method?: string; headers?: Record<string, string>; body?: BodyInit; signal?: AbortSignal }

/** How long an answer may take, in milliseconds: connections die without a word. */
const PATIENCE_MS = 30_000

export class Http {
  readonly #base: string
  readonly #tokens: Tokens
  readonly #fetch: typeof fetch
  readonly #openStream: Host['openStream']

  constructor(base: string, tokens: Tokens, fetchWith: typeof fetch, openStream?: Host['openStream']) {
    this.#base = base.replace(/\/+$/, '')
    this.#tokens = tokens
    this.#fetch = fetchWith
    this.#openStream = openStream
  }

  /** As `raw`, for an answer that goes on. */
  async stream(path: string, request: { headers: Record<string, string>; signal: AbortSignal }): Promise<StreamResponse | Response> {
    if (!this.#openStream) return this.raw(path, request)
    const headers = { ...request.headers, authorization: `Bearer ${await this.#tokens.get()}` }
    return this.#openStream(`${this.#base}/api/v2${path}`, { headers, signal: request.signal })
  }

  /** The answer, whatever it is, to a token that was good a moment ago. */
  async raw(path: string, request: Request = {}): Promise<Response> {
    const token = await this.#tokens.get()
    const headers = { ...request.headers, authorization: `Bearer ${token}` }
    return this.#fetch(`${this.#base}/api/v2${path}`, { ...request, headers, cache: 'no-store' })
  }

  /** A new token is taken for the next request. */
  refuse(): void {
    this.#tokens.drop()
  }

  /** Ends what is under way, as if it had failed: what it goes over may be dead. */
  readonly #underWay = new Set<AbortController>()

  hurry(): void {
    this.#underWay.forEach((request) => request.abort())
  }

  async json<T>(path: string, request: Request & { patienceMs?: number; hurries?: boolean } = {}): Promise<T> {
    const { patienceMs = PATIENCE_MS, hurries, ...asked } = request
    const over = new AbortController()
    const timer = setTimeout(() => over.abort(), patienceMs)
    // Only what is asked again when it fails.
    if (hurries) this.#underWay.add(over)
    try {
      return await this.#json<T>(path, { ...asked, signal: over.signal })
    } finally {
      clearTimeout(timer)
      this.#underWay.delete(over)
    }
  }

  async #json<T>(path: string, request: Request): Promise<T> {
    let response = await this.raw(path, request)
    if (response.status === 401) {
      this.refuse()
      response = await this.raw(path, request)
    }
    if (!response.ok) throw await refusal(response)
    return (await response.json()) as T
  }
}

type Refusal = Pick<StreamResponse, 'status' | 'statusText' | 'headers' | 'json'>

/** What a refusal says. */
export async function refusal(response: Refusal): Promise<RequestError> {
  let [code, message] = [String(response.status), response.statusText || `status ${response.status}`]
  try {
    const body = (await response.json()) as { error?: { code?: string; message?: string }; message?: string; status?: string }
    code = body.error?.code ?? body.status ?? code
    message = body.error?.message ?? body.message ?? message
  } catch {
    // It says nothing more.
  }
  return new RequestError(response.status, code, message, retryAfter(response))
}

/** How long to wait, in milliseconds. */
export function retryAfter(response: Pick<Refusal, 'headers'>): number | undefined {
  const seconds = Number(response.headers.get('retry-after') ?? NaN)
  return Number.isFinite(seconds) && seconds >= 0 ? seconds * 1000 : undefined
}

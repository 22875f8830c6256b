/** The token of whoever uses the page: kept while it is good, fetched once for all who ask at the same time. */

/** A token is kept while more than this remains, or half of a short one's life. The published figure. */
const KEEP_MS = 5 * 60_000

/** No token came. */
export class TokenError extends Error {}

export class Tokens {
  readonly #fetch: () => Promise<string>
  readonly #timeoutMs: number
  #token: string | undefined
  #keepUntil = 0
  #fetching: Promise<string> | undefined

  constructor(fetch: () => Promise<string>, timeoutMs: number) {
    this.#fetch = fetch
    this.#timeoutMs = timeoutMs
  }

  /** A token that is good for a while; a new one, if the last one was refused. */
  get(refused?: string): Promise<string> {
    if (this.#token && refused !== this.#token && Date.now() < this.#keepUntil) return Promise.resolve(this.#token)
    this.#fetching ??= this.#fetchOne().finally(() => (this.#fetching = undefined))
    return this.#fetching
  }

  /** The next one is a new one. */
  drop(): void {
    this.#token = undefined
  }

  async #fetchOne(): Promise<string> {
    let timer: ReturnType<typeof setTimeout> | undefined
    const late = new Promise<never>((_, reject) => {
      timer = setTimeout(() => reject(new TokenError(`no token came within ${this.#timeoutMs} ms`)), this.#timeoutMs)
    })
    const fetching = Promise.resolve().then(this.#fetch)
    try {
      const failed = (error: unknown) => Promise.reject(new TokenError(`no token: ${String(error)}`))
      const token = (await Promise.race([fetching.catch(failed), late])).trim()
      const now = Date.now()
      const life = expiresAt(token) - now
      this.#token = token
      this.#keepUntil = now + life - Math.min(KEEP_MS, life / 2)
      return token
    } finally {
      clearTimeout(timer)
    }
  }
}

/** When a token ends, in Unix milliseconds; in a minute, if it does not say so. */
export function expiresAt(token: string): number {
  try {
    const claims = (token.split('.')[1] ?? '').replace(/-/g, '+').replace(/_/g, '/')
    const { exp } = JSON.parse(atob(claims)) as { exp?: unknown }
    if (typeof exp === 'number') return exp * 1000
  } catch {
    // It is what its maker says that it is.
  }
  return Date.now() + 60_000
}

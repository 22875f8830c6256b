/** What a client takes from where it runs. Browsers have all of it; other hosts hand it in. */

import type { Store } from './outbox.js'

export type LifeEvent = 'hidden' | 'visible' | 'online' | 'offline'

/** Whether the page or the app is in view, and whether there is a network. */
export interface Life {
  isHidden(): boolean
  /** Calls for each change. Returns an unsubscribe function. */
  listen(on: (event: LifeEvent) => void): () => void
}

/** An answer that goes on. */
export interface StreamResponse {
  readonly ok: boolean
  readonly status: number
  readonly statusText: string
  readonly headers: { get(name: string): string | null }
  json(): Promise<unknown>
  /** Calls for each piece of text, until it ends. Rejects if it breaks. */
  read(each: (text: string) => void): Promise<void>
}

export type StreamRequest = { headers: Record<string, string>; signal: AbortSignal }

export interface Host {
  life?: Life
  /** Where messages are kept until they are sent. Without it, they are gone with the program. */
  storage?: Store
  /** Opens a stream, where `fetch` hands over nothing before the end. */
  openStream?: (url: string, request: StreamRequest) => Promise<StreamResponse>
}

/** The browser's, as far as this is one. */
export function browserHost(): Host {
  const storage = localStore()
  return { life: pageLife, ...(storage ? { storage } : {}) }
}

function localStore(): Store | undefined {
  try {
    return typeof localStorage === 'undefined' ? undefined : localStorage
  } catch {
    return undefined
  }
}

const pageLife: Life = {
  isHidden: () => typeof document !== 'undefined' && document.visibilityState === 'hidden',
  listen(on) {
    const unlisten: (() => void)[] = []
    const listen = (target: EventTarget | undefined, name: string, change: (event: Event) => LifeEvent | undefined) => {
      // Some hosts have a `window` without events.
      if (typeof target?.addEventListener !== 'function') return
      const handler = (event: Event) => {
        const changed = change(event)
        if (changed) on(changed)
      }
      target.addEventListener(name, handler)
      unlisten.push(() => target.removeEventListener(name, handler))
    }
    const page = typeof document === 'undefined' ? undefined : document
    const view = typeof window === 'undefined' ? undefined : window
    const seen = () => (pageLife.isHidden() ? 'hidden' : 'visible')
    listen(page, 'visibilitychange', seen)
    listen(view, 'pagehide', () => 'hidden')
    // A page that is shown for the first time has not changed.
    listen(view, 'pageshow', (event) => ((event as PageTransitionEvent).persisted ? seen() : undefined))
    listen(view, 'online', () => 'online')
    listen(view, 'offline', () => 'offline')
    return () => unlisten.forEach((each) => each())
  },
}

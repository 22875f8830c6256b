/**
 * Conversations in a React Native app: the same client, with what its host has instead of a browser. Its `fetch` hands over nothing before
 * the end, so streams come over `XMLHttpRequest`; messages wait in the app's own storage; the app's state says whether anybody looks.
 */

import type { Host, Life } from '../conversation/host.js'
import type { Store } from '../conversation/outbox.js'
import { openStream } from './xhr.js'

export * from '../conversation/index.js'
export { useConversation, useSession, type Conversation, type UseSessionOptions, type UseSessionResult } from '../react/index.js'

/** `AppState` of `react-native`. */
export interface AppStateLike {
  readonly currentState: string
  addEventListener(type: 'change', on: (state: string) => void): { remove(): void }
}

/** `@react-native-async-storage/async-storage`, or anything like it. */
export interface AsyncStorageLike {
  getAllKeys(): Promise<readonly string[]>
  getItem(key: string): Promise<string | null>
  setItem(key: string, value: string): Promise<void>
  removeItem(key: string): Promise<void>
}

/** `@react-native-community/netinfo`, or anything like it. */
export interface NetInfoLike {
  addEventListener(on: (state: { isConnected: boolean | null }) => void): () => void
}

export type HostParts = { appState: AppStateLike; storage?: AsyncStorageLike; netInfo?: NetInfoLike }

/** All names in the client's storage begin so. */
const PREFIX = 'trunkline:'

/** For `new ConversationClient({ host, … })`: once an app, before its first conversation is opened. */
export async function reactNativeHost(parts: HostParts): Promise<Host> {
  const storage = parts.storage && (await openStore(parts.storage))
  return { life: life(parts), openStream, ...(storage ? { storage } : {}) }
}

function life({ appState, netInfo }: HostParts): Life {
  // While a call or the app switcher covers it, the app is `inactive`, and comes back at once.
  const isHidden = (state: string) => state === 'background'
  return {
    isHidden: () => isHidden(appState.currentState),
    // Both hosts call for what is no change, too: the app switcher passes by, the network is measured.
    listen(on) {
      let wasHidden = isHidden(appState.currentState)
      const states = appState.addEventListener('change', (state) => {
        if (isHidden(state) === wasHidden) return
        wasHidden = !wasHidden
        on(wasHidden ? 'hidden' : 'visible')
      })
      let wasConnected = true
      const unsubscribe = netInfo?.addEventListener(({ isConnected }) => {
        if (isConnected === null || isConnected === wasConnected) return
        wasConnected = isConnected
        on(isConnected ? 'online' : 'offline')
      })
      return () => {
        states.remove()
        unsubscribe?.()
      }
    },
  }
}

/** What was kept, read once; from then on written through, one change after the other. */
async function openStore(kept: AsyncStorageLike): Promise<Store> {
  const all = new Map<string, string>()
  try {
    for (const key of (await kept.getAllKeys()).filter((key) => key.startsWith(PREFIX))) {
      const value = await kept.getItem(key)
      if (value !== null) all.set(key, value)
    }
  } catch {
    // What waits from before is lost; everything else works.
  }
  let written = Promise.resolve()
  const write = (how: () => Promise<void>) => {
    // A full store loses what waits when the app ends, and nothing before.
    written = written.then(how).catch(() => undefined)
  }
  return {
    get length() {
      return all.size
    },
    key: (index) => [...all.keys()][index] ?? null,
    getItem: (key) => all.get(key) ?? null,
    setItem(key, value) {
      all.set(key, value)
      write(() => kept.setItem(key, value))
    },
    removeItem(key) {
      all.delete(key)
      write(() => kept.removeItem(key))
    },
  }
}

/** The React Native entry with hosts' parts that a test moves. Bundled for a page of the tests. */

import { ConversationClient, reactNativeHost, type AppStateLike, type Convo, type NetInfoLike } from '../../react-native/index.js'

const listeners = { state: new Set<(state: string) => void>(), net: new Set<(net: { isConnected: boolean | null }) => void>() }

const appState: AppStateLike & { currentState: string } = {
  currentState: 'active',
  addEventListener(_, on) {
    listeners.state.add(on)
    return { remove: () => void listeners.state.delete(on) }
  },
}

const netInfo: NetInfoLike = {
  addEventListener(on) {
    listeners.net.add(on)
    return () => void listeners.net.delete(on)
  },
}

/** Asynchronous, as an app's is; kept by the page, which survives a reload. */
const storage = {
  getAllKeys: async () => Object.keys(localStorage),
  getItem: async (key: string) => localStorage.getItem(key),
  setItem: async (key: string, value: string) => localStorage.setItem(key, value),
  removeItem: async (key: string) => localStorage.removeItem(key),
}

export const native = {
  texts: [] as string[],
  names: new Set<string>(),
  statuses: [] as string[],

  async open(baseUrl: string, agentId: string, user: string, convoId?: string): Promise<Convo> {
    const host = await reactNativeHost({ appState, netInfo, storage })
    const fetchJwt = async () => (await fetch(`/token?user=${user}`)).text()
    const client = new ConversationClient({ agentId, fetchJwt, baseUrl, host })
    const convo = await client.openConvo({ convoId: convoId ?? (await client.startSession()).convoId })
    convo.on('message', ({ message }) => this.texts.push(message.content))
    convo.on('status', (status) => this.statuses.push(status))
    for (const name of ['message', 'typing', 'convo_state', 'turn_done', 'ready', 'token'] as const) convo.on(name, () => this.names.add(name))
    return convo
  },

  state(state: string): void {
    appState.currentState = state
    listeners.state.forEach((on) => on(state))
  },

  network(isConnected: boolean): void {
    listeners.net.forEach((on) => on({ isConnected }))
  },
}

Object.assign(globalThis, { native })

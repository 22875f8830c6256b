/**
 * The contract of the released browser SDK, as it is written down: one stream over `fetch`, a reconcile of the whole conversation
 * after each `ready`, ids remembered, a token refreshed when it is refused. Bundled for a page of the tests.
 */

import { fetchEventSource } from '@microsoft/fetch-event-source'

type Seen = { name: string; data: Record<string, unknown> }

class Stop extends Error {}

export async function stock(base: string, tokenUrl: string, convoId?: string) {
  const [events, messages, seen]: [Seen[], string[], Set<string>] = [[], [], new Set()]
  let token = await (await fetch(tokenUrl)).text()
  const ask = async (path: string, init: RequestInit = {}) => {
    const headers = { authorization: `Bearer ${token}`, 'content-type': 'application/json' }
    const response = await fetch(`${base}/api/v2${path}`, { ...init, headers })
    return { status: response.status, retryAfter: response.headers.get('retry-after'), body: (await response.json()) as unknown }
  }
  const convo = convoId ?? ((await ask('/sessions', { method: 'POST' })).body as { convo_id: string }).convo_id
  const take = (message: { id: string; content: string }) => {
    if (seen.has(message.id)) return
    seen.add(message.id)
    messages.push(message.content)
  }
  const stop = new AbortController()
  let status = 0
  const opened = fetchEventSource(`${base}/api/v2/agent_convos/${convo}/events`, {
    signal: stop.signal,
    openWhenHidden: true,
    headers: { accept: 'text/event-stream' },
    fetch: (input, init) => fetch(input, { ...init, headers: { ...(init?.headers as Record<string, string>), authorization: `Bearer ${token}` } }),
    async onopen(response) {
      status = response.status
      if (response.status === 401) token = await (await fetch(tokenUrl)).text()
      if (!response.ok && response.status !== 401 && response.status < 500) throw new Stop()
      if (!response.ok) throw new Error('again')
    },
    onmessage({ event, data }) {
      const parsed = JSON.parse(data) as Record<string, unknown>
      if (parsed['type'] !== event) throw new Stop('the data does not name its event')
      events.push({ name: event, data: parsed })
      if (event === 'message') take(parsed['message'] as { id: string; content: string })
      if (event === 'ready') void ask(`/agent_convos/${convo}`).then(({ body }) => (body as { messages: never[] }).messages.forEach(take))
    },
    onclose() {
      throw new Error('again')
    },
    onerror(error) {
      if (error instanceof Stop) throw error
      return 100
    },
  }).catch(() => undefined)
  return {
    convo, events, messages, ask, opened,
    status: () => status,
    send: (text: string) => ask(`/agent_convos/${convo}/stream_message`, { method: 'POST', body: JSON.stringify({ text }) }),
    stop: () => stop.abort(),
  }
}

Object.assign(globalThis, { stock })

/** The table of what a tab does about its stream, cell by cell. */

import assert from 'node:assert/strict'
import { test } from 'node:test'

import { BACKOFF_MAX_MS, EVENTS, IDLE, NAMES, step, type Action, type Event, type Name, type State } from '../conversation/machine.js'

const at = (name: Name, attempts = 0, refusals = 0): State => ({ name, attempts, refusals })

function written(actions: readonly Action[]): string {
  return actions.map((action) => ('ms' in action ? `wait ${action.ms}` : 'newToken' in action ? (action.newToken ? 'open anew' : 'open') : 'status' in action ? `fail ${action.status}` : action.do)).join(', ')
}

/** One of each kind; those that have more to say have rows of their own below. */
const ONE: Record<Event['type'], Event> = {
  start: { type: 'start' }, elected: { type: 'elected' }, demoted: { type: 'demoted' }, ready: { type: 'ready' },
  ended: { type: 'ended', reason: undefined }, refused: { type: 'refused', status: 503 }, failed: { type: 'failed' },
  timer: { type: 'timer' }, hidden: { type: 'hidden' }, visible: { type: 'visible' }, online: { type: 'online' },
  offline: { type: 'offline' }, close: { type: 'close' },
}

/** What becomes of each state with each event, and what is done; what is not here changes nothing. */
const TABLE: Partial<Record<Name, Partial<Record<Event['type'], [Name, string]>>>> = {
  idle: { start: ['electing', 'elect'], hidden: ['paused', ''], close: ['closed', ''] },
  electing: {
    elected: ['connecting', 'open'], demoted: ['following', ''], hidden: ['paused', 'resign'], offline: ['offline', 'resign'],
    close: ['closed', 'resign'],
  },
  following: {
    elected: ['connecting', 'open'], demoted: ['following', ''], hidden: ['paused', 'resign'], offline: ['offline', 'resign'],
    close: ['closed', 'resign'],
  },
  connecting: {
    demoted: ['following', 'cut'], ready: ['open', ''], ended: ['waiting', 'wait 250'], refused: ['waiting', 'wait 250'],
    failed: ['waiting', 'wait 250'], hidden: ['paused', 'cut, resign'], offline: ['offline', 'cut, resign'],
    close: ['closed', 'cut, resign'],
  },
  open: {
    demoted: ['following', 'cut'], ended: ['waiting', 'wait 250'], failed: ['waiting', 'wait 250'],
    hidden: ['paused', 'cut, resign'], offline: ['offline', 'cut, resign'], close: ['closed', 'cut, resign'],
  },
  waiting: {
    demoted: ['following', ''], timer: ['connecting', 'open'], online: ['connecting', 'open'], hidden: ['paused', 'resign'],
    offline: ['offline', 'resign'], close: ['closed', 'resign'],
  },
  paused: { visible: ['electing', 'elect'], close: ['closed', ''] },
  offline: { online: ['electing', 'elect'], hidden: ['paused', ''], close: ['closed', ''] },
}

test('every event in every state', () => {
  for (const name of NAMES) {
    for (const type of EVENTS) {
      const [expected, actions] = TABLE[name]?.[type] ?? [name, '']
      const [state, done] = step(at(name), ONE[type])
      assert.deepEqual([state.name, written(done)], [expected, actions], `${name} ${type}`)
    }
  }
})

test('what the server says decides when it comes back', () => {
  const rows: [State, Event, Name, string][] = [
    [at('open'), { type: 'ended', reason: 'server_cap' }, 'connecting', 'open'],
    [at('open'), { type: 'ended', reason: 'shutdown' }, 'connecting', 'open'],
    [at('open'), { type: 'ended', reason: 'auth_expiring' }, 'connecting', 'open anew'],
    [at('open'), { type: 'ended', reason: 'stalled' }, 'waiting', 'wait 250'],
    // Before it was ready, a server that ends it at once is not asked at once.
    [at('connecting', 1), { type: 'ended', reason: 'shutdown' }, 'waiting', 'wait 500'],
    [at('connecting'), { type: 'refused', status: 401 }, 'connecting', 'open anew'],
    [at('connecting', 0, 1), { type: 'refused', status: 401 }, 'connecting', 'open anew'],
    [at('connecting', 0, 2), { type: 'refused', status: 401 }, 'closed', 'resign, fail 401'],
    [at('connecting'), { type: 'refused', status: 429, retryAfterMs: 7000 }, 'waiting', 'wait 7000'],
    [at('connecting'), { type: 'refused', status: 429, retryAfterMs: 70_000 }, 'waiting', 'wait 30000'],
    [at('connecting'), { type: 'refused', status: 429 }, 'waiting', 'wait 30000'],
    [at('connecting'), { type: 'refused', status: 408 }, 'waiting', 'wait 250'],
    [at('connecting'), { type: 'refused', status: 500 }, 'waiting', 'wait 250'],
    ...[400, 403, 404, 409, 410].map((status): [State, Event, Name, string] => [at('connecting'), { type: 'refused', status }, 'closed', `resign, fail ${status}`]),
  ]
  for (const [before, event, name, actions] of rows) {
    const [state, done] = step(before, event)
    assert.deepEqual([state.name, written(done)], [name, actions], JSON.stringify([before, event]))
  }
})

test('waits double up to half a minute, half of each by chance, and begin anew', () => {
  const waits: string[] = []
  let state: State = at('connecting')
  for (let n = 0; n < 9; n += 1) {
    const [waiting, actions] = step(state, { type: 'failed' })
    waits.push(written(actions))
    state = step(waiting, { type: 'timer' })[0]
  }
  assert.deepEqual(waits, [250, 500, 1000, 2000, 4000, 8000, 16_000, BACKOFF_MAX_MS, BACKOFF_MAX_MS].map((ms) => `wait ${ms}`))
  assert.equal(written(step(state, { type: 'failed' }, 0)[1]), 'wait 15000')
  const [open] = step(state, { type: 'ready' })
  assert.equal(written(step(open, { type: 'failed' })[1]), 'wait 250')
  assert.deepEqual(IDLE, at('idle'))
})

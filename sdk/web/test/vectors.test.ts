/** The vectors that every implementation of the protocol answers to: conformance/agent-socket. */

import assert from 'node:assert/strict'
import { readFileSync } from 'node:fs'
import { test } from 'node:test'

import {
  AGENT_SOCKET_EVENT_TYPES,
  detectStaleUi,
  EnvelopeError,
  foldRuntimeState,
  initialRuntimeState,
  isAgentSocketEnvelope,
  parseEnvelope,
  serializeEnvelope,
  shouldClearThinking,
  type AgentRuntimeState,
  type AgentSocketEnvelope,
  type LocalUiState,
  type StaleUiDetection,
} from '../agent-socket/index.js'

function vectors<T>(name: string): T {
  return JSON.parse(readFileSync(new URL(`../../../../conformance/agent-socket/${name}`, import.meta.url), 'utf8')) as T
}

test('envelopes are read and written', () => {
  const { good, bad } = vectors<{ good: string[]; bad: { frame: string; field: string }[] }>('envelopes.json')
  for (const frame of good) {
    const envelope = parseEnvelope(frame)
    assert.ok(isAgentSocketEnvelope(envelope))
    assert.deepEqual(parseEnvelope(new TextEncoder().encode(frame)), envelope)
    assert.deepEqual(parseEnvelope(serializeEnvelope(envelope)), envelope)
    const { ts, ...fields } = JSON.parse(frame) as Record<string, unknown>
    const expected = Object.fromEntries(Object.entries(fields).filter(([, value]) => value !== null))
    assert.deepEqual({ ...envelope }, { ...expected, ts: Math.trunc(ts as number) })
  }
  for (const { frame, field } of bad) {
    assert.throws(
      () => parseEnvelope(frame),
      (error) => error instanceof EnvelopeError && error.field === field && error.message.startsWith(field),
      frame,
    )
  }
})

test('there are thirty-one types', () => assert.equal(AGENT_SOCKET_EVENT_TYPES.length, 31))

test('what a UI shows is compared by the table', () => {
  type Case = { local: LocalUiState; state: AgentRuntimeState; detected: StaleUiDetection; clearThinking: boolean }
  for (const { local, state, detected, clearThinking } of vectors<Case[]>('stale.json')) {
    assert.deepEqual(detectStaleUi(local, state), detected)
    assert.equal(shouldClearThinking(local, state), clearThinking)
  }
})

test('the state follows from the events', () => {
  type Case = { name: string; events: AgentSocketEnvelope[]; state: AgentRuntimeState }
  for (const { name, events, state } of vectors<Case[]>('folds.json')) {
    const folded = events.map((event) => parseEnvelope(JSON.stringify(event))).reduce(foldRuntimeState, initialRuntimeState())
    assert.deepEqual(folded, state, name)
  }
})

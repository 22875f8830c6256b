/** How the runtime is, folded from what it said: pure, and total on any payload. */

import { isEventType, type AgentSocketEnvelope } from './envelope.js'

export type AgentTurnState = {
  id: string
  status: 'queued' | 'running' | 'done' | 'error' | 'aborted' | 'lost'
  phase?: string
  startedAt?: number
  updatedAt?: number
  error?: string | null
}

export type AgentToolState = {
  id?: string
  name?: string
  status: 'idle' | 'waiting_approval' | 'running' | 'done' | 'failed' | 'lost'
  path?: string | null
  command?: string | null
  startedAt?: number | null
  updatedAt?: number | null
  resultSeen?: boolean
  retryable?: boolean
  error?: string | null
  outputPreview?: string | null
}

export type AgentRuntimeState = {
  runtimeGeneration: string
  activeTurn: AgentTurnState | null
  tool: AgentToolState
  brainQueue?: unknown[]
  lastLostTool?: AgentToolState | null
}

/** Bytes of a tool's output that its state shows, and turns that wait of which it tells. */
const PREVIEW_BYTES_MAX = 512
const QUEUE_MAX = 100

/** How it is before anything was said. */
export function initialRuntimeState(runtimeGeneration = ''): AgentRuntimeState {
  return { runtimeGeneration, activeTurn: null, tool: { status: 'idle' } }
}

/** How it is after one more envelope. Those that are no events change nothing. */
export function foldRuntimeState(before: AgentRuntimeState, envelope: AgentSocketEnvelope): AgentRuntimeState {
  if (!isEventType(envelope.type)) return before
  const state = structuredClone(before)
  if (envelope.runtimeGeneration !== undefined) state.runtimeGeneration = envelope.runtimeGeneration
  switch (envelope.type) {
    case 'turn_queued':
      queued(state, envelope)
      break
    case 'turn_start':
    case 'turn_running':
    case 'turn_phase':
    case 'turn_text_delta':
      runs(state, envelope)
      break
    case 'turn_done':
    case 'turn_error':
    case 'turn_aborted':
    case 'turn_lost':
      ended(state, envelope)
      break
    case 'tool_start':
      toolStarted(state, envelope)
      break
    case 'tool_waiting_approval':
    case 'tool_result':
    case 'tool_failed':
    case 'tool_lost':
    case 'tool_retry_available':
      toolIs(state, envelope)
      break
    case 'approval_request':
      if (state.tool.status === 'running' && isOf(state.tool, envelope)) {
        Object.assign(state.tool, { status: 'waiting_approval', updatedAt: envelope.ts })
      }
      break
    case 'approval_result':
      if (state.tool.status === 'waiting_approval' && isOf(state.tool, envelope)) {
        const isDenied = field(envelope.payload, 'approved') === false
        Object.assign(state.tool, { status: isDenied ? 'failed' : 'running', updatedAt: envelope.ts })
      }
      break
    case 'runtime_generation_changed':
    case 'runtime_recovered': {
      const generation = text(envelope.payload, 'runtimeGeneration', 'to')
      if (envelope.runtimeGeneration === undefined && generation !== undefined) state.runtimeGeneration = generation
      break
    }
  }
  return state
}

function queued(state: AgentRuntimeState, envelope: AgentSocketEnvelope): void {
  const id = envelope.turnId ?? ''
  if (state.activeTurn === null) {
    state.activeTurn = begun('queued', envelope)
  } else if (state.activeTurn.id === id) {
    state.activeTurn.updatedAt = envelope.ts
  } else {
    const queue = (state.brainQueue ??= [])
    if (queue.length < QUEUE_MAX && !queue.includes(id)) queue.push(id)
  }
}

function runs(state: AgentRuntimeState, envelope: AgentSocketEnvelope): void {
  // Some pieces do not say of which turn they are.
  if (state.activeTurn === null || (envelope.turnId !== undefined && envelope.turnId !== state.activeTurn.id)) {
    forget(state, envelope.turnId ?? '')
    state.activeTurn = begun('running', envelope)
  }
  state.activeTurn.status = 'running'
  state.activeTurn.updatedAt = envelope.ts
  if (envelope.type === 'turn_phase') {
    const phase = text(envelope.payload, 'phase', 'name') ?? (typeof envelope.payload === 'string' ? envelope.payload : undefined)
    if (phase === undefined) delete state.activeTurn.phase
    else state.activeTurn.phase = phase
  }
}

function ended(state: AgentRuntimeState, envelope: AgentSocketEnvelope): void {
  if (state.activeTurn !== null && (envelope.turnId === undefined || envelope.turnId === state.activeTurn.id)) {
    state.activeTurn = null
    // Nothing runs without a turn.
    if (state.tool.status === 'running' || state.tool.status === 'waiting_approval') state.tool = { status: 'idle' }
  }
  if (envelope.turnId !== undefined) forget(state, envelope.turnId)
}

function forget(state: AgentRuntimeState, turn: string): void {
  if (state.brainQueue === undefined) return
  state.brainQueue = state.brainQueue.filter((queued) => queued !== turn)
  if (state.brainQueue.length === 0) delete state.brainQueue
}

function begun(status: AgentTurnState['status'], envelope: AgentSocketEnvelope): AgentTurnState {
  return { id: envelope.turnId ?? '', status, startedAt: envelope.ts, updatedAt: envelope.ts }
}

function toolStarted(state: AgentRuntimeState, envelope: AgentSocketEnvelope): void {
  const input = field(envelope.payload, 'input')
  const found = {
    id: envelope.operationId,
    name: text(envelope.payload, 'name', 'tool'),
    path: text(envelope.payload, 'path') ?? text(input, 'path'),
    command: text(envelope.payload, 'command') ?? text(input, 'command'),
  }
  state.tool = { status: 'running', startedAt: envelope.ts, updatedAt: envelope.ts, ...present(found) }
}

function toolIs(state: AgentRuntimeState, envelope: AgentSocketEnvelope): void {
  // What is said of an earlier run changes nothing of this one.
  if (envelope.operationId !== undefined && state.tool.id !== undefined && envelope.operationId !== state.tool.id) return
  const tool = state.tool
  tool.updatedAt = envelope.ts
  Object.assign(tool, present({ id: tool.id ?? envelope.operationId, name: tool.name ?? text(envelope.payload, 'name', 'tool') }))
  switch (envelope.type) {
    case 'tool_waiting_approval':
      tool.status = 'waiting_approval'
      break
    case 'tool_result': {
      Object.assign(tool, { status: 'done', resultSeen: true })
      const output = text(envelope.payload, 'outputPreview', 'output', 'result', 'text')
      if (output === undefined) delete tool.outputPreview
      else tool.outputPreview = preview(output)
      break
    }
    case 'tool_failed': {
      tool.status = 'failed'
      const error = text(envelope.payload, 'error', 'message')
      if (error === undefined) delete tool.error
      else tool.error = error
      const retryable = field(envelope.payload, 'retryable')
      if (typeof retryable === 'boolean') tool.retryable = retryable
      break
    }
    case 'tool_retry_available':
      tool.retryable = true
      break
    default:
      tool.status = 'lost'
      state.lastLostTool = { ...tool }
  }
}

function isOf(tool: AgentToolState, envelope: AgentSocketEnvelope): boolean {
  return envelope.operationId === undefined || tool.id === undefined || envelope.operationId === tool.id
}

function field(value: unknown, name: string): unknown {
  if (typeof value !== 'object' || value === null || Array.isArray(value)) return undefined
  return Object.hasOwn(value, name) ? (value as Record<string, unknown>)[name] : undefined
}

/** The first of these fields that is text. */
function text(value: unknown, ...names: string[]): string | undefined {
  return names.map((name) => field(value, name)).find((found) => typeof found === 'string') as string | undefined
}

function present<T extends object>(fields: T): Partial<{ [K in keyof T]: NonNullable<T[K]> }> {
  return Object.fromEntries(Object.entries(fields).filter(([, value]) => value !== undefined)) as Partial<{
    [K in keyof T]: NonNullable<T[K]>
  }>
}

/** As many whole characters as fit into the bytes. */
function preview(output: string): string {
  const bytes = new TextEncoder().encode(output)
  if (bytes.length <= PREVIEW_BYTES_MAX) return output
  let end = PREVIEW_BYTES_MAX
  while (((bytes[end] ?? 0) & 0xc0) === 0x80) end -= 1
  return new TextDecoder().decode(bytes.subarray(0, end))
}

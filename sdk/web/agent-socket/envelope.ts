/** What is said: one JSON object a frame. See docs/protocol/agent-socket.md. */

export const AGENT_SOCKET_PROTOCOL = 'agent-socket' as const
export const AGENT_SOCKET_VERSION = 1 as const

/** All types. The set is closed. The first eight are said once; the others are events: kept, numbered, replayed. */
export const AGENT_SOCKET_EVENT_TYPES = [
  'hello',
  'welcome',
  'heartbeat',
  'ack',
  'state_request',
  'state_snapshot',
  'replay_request',
  'replay_events',
  'turn_start',
  'turn_queued',
  'turn_running',
  'turn_phase',
  'turn_text_delta',
  'turn_done',
  'turn_error',
  'turn_aborted',
  'turn_lost',
  'tool_start',
  'tool_waiting_approval',
  'tool_result',
  'tool_failed',
  'tool_lost',
  'tool_retry_available',
  'approval_request',
  'approval_resolve',
  'approval_result',
  'attachment_uploading',
  'attachment_ready',
  'attachment_error',
  'runtime_generation_changed',
  'runtime_recovered',
] as const

export type AgentSocketEventType = (typeof AGENT_SOCKET_EVENT_TYPES)[number]

export type AgentSocketEnvelope<T = unknown> = {
  protocol: typeof AGENT_SOCKET_PROTOCOL
  version: typeof AGENT_SOCKET_VERSION
  type: AgentSocketEventType
  clientId?: string
  socketId?: string
  runtimeGeneration?: string
  turnId?: string
  operationId?: string
  /** Of an event that a client says: by which the server takes it once, however often it is said. Of an `ack`: that one. */
  requestId?: string
  /** Its number in the client's stream: larger than all before. */
  seq?: number
  /** Everything up to here was had. */
  ack?: number
  /** Unix milliseconds. */
  ts: number
  payload?: T
}

export type AgentSocketMeta = {
  ts?: number
  clientId?: string
  turnId?: string
  operationId?: string
  seq?: number
  ack?: number
  runtimeGeneration?: string
}

/** Why a frame is no envelope: `field` names what is wrong, or is `frame` for what is no JSON object. */
export class EnvelopeError extends Error {
  constructor(
    readonly field: string,
    why: string,
  ) {
    super(`${field}: ${why}`)
    this.name = 'EnvelopeError'
  }
}

const TYPES: ReadonlySet<unknown> = new Set(AGENT_SOCKET_EVENT_TYPES)
const TEXTS = ['clientId', 'socketId', 'runtimeGeneration', 'turnId', 'operationId', 'requestId'] as const
const NUMBERS = ['seq', 'ack'] as const

/** Whether envelopes of a type are events. */
export function isEventType(type: AgentSocketEventType): boolean {
  return AGENT_SOCKET_EVENT_TYPES.indexOf(type) >= 8
}

export function makeEnvelope<T>(
  type: AgentSocketEventType,
  payload?: T,
  meta: AgentSocketMeta = {},
): AgentSocketEnvelope<T> {
  const envelope: AgentSocketEnvelope<T> = {
    protocol: AGENT_SOCKET_PROTOCOL,
    version: AGENT_SOCKET_VERSION,
    type,
    ...meta,
    ts: meta.ts ?? Date.now(),
  }
  if (payload !== undefined) envelope.payload = payload
  return envelope
}

export function isAgentSocketEnvelope(value: unknown): value is AgentSocketEnvelope {
  return problem(value) === undefined
}

/**
 * Reads an envelope from a frame. Fields that are null are left out; those that this version does not know are kept.
 *
 * @throws {EnvelopeError} which names the field.
 */
export function parseEnvelope(raw: string | ArrayBuffer | Uint8Array): AgentSocketEnvelope {
  let value: unknown
  try {
    value = JSON.parse(typeof raw === 'string' ? raw : new TextDecoder('utf-8', { fatal: true }).decode(raw))
  } catch (error) {
    throw new EnvelopeError('frame', `no JSON: ${String(error)}`)
  }
  const found = problem(value)
  if (found) throw found
  const envelope = value as Record<string, unknown>
  for (const [name, field] of Object.entries(envelope)) if (field === null) delete envelope[name]
  envelope['ts'] = Math.trunc(envelope['ts'] as number)
  return envelope as AgentSocketEnvelope
}

export function serializeEnvelope(envelope: AgentSocketEnvelope): string {
  return JSON.stringify(envelope)
}

function problem(value: unknown): EnvelopeError | undefined {
  if (typeof value !== 'object' || value === null || Array.isArray(value)) {
    return new EnvelopeError('frame', 'no JSON object')
  }
  const envelope = value as Record<string, unknown>
  if (envelope['protocol'] !== AGENT_SOCKET_PROTOCOL) return new EnvelopeError('protocol', `not "${AGENT_SOCKET_PROTOCOL}"`)
  if (envelope['version'] !== AGENT_SOCKET_VERSION) return new EnvelopeError('version', `not ${AGENT_SOCKET_VERSION}`)
  if (!TYPES.has(envelope['type'])) return new EnvelopeError('type', "none of the protocol's types")
  for (const name of TEXTS) {
    const field = envelope[name]
    if (field !== undefined && field !== null && typeof field !== 'string') return new EnvelopeError(name, 'no text')
  }
  for (const name of NUMBERS) {
    const field = envelope[name]
    if (field !== undefined && field !== null && !(Number.isSafeInteger(field) && (field as number) >= 0)) {
      return new EnvelopeError(name, 'no whole number from 0 to 2^53-1')
    }
  }
  return Number.isFinite(envelope['ts']) ? undefined : new EnvelopeError('ts', 'no number')
}

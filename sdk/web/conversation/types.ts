/** What travels, and what handlers get. The names of fields on the wire are published. */

export type ConvoState =
  | 'open' | 'escalated' | 'resolved' | 'auto_resolved' | 'assumed_resolved' | 'rage_locked' | 'attempted_hack' | 'pending_feedback'

export type From = 'appuser' | 'ai_agent' | 'human_agent'

export type Participant = { id: string; kind: From; name: string | null; photo_url: string | null; initial: string | null }

export type MessageFile = { url: string; filename: string; content_type: string; byte_size: number }

export type Message = {
  id: string
  content: string
  from: From
  turn_number: number
  created_at: string
  participant: Participant | null
  files: MessageFile[]
}

export type AttachmentPolicy = {
  max_files_per_message: number
  max_files_per_convo: number
  max_file_size_bytes: number
  allowed_mime_types: string[]
}

export type Lockout = {
  locked_out: boolean
  expires_at: string | null
  permanent: boolean
  reason: 'permanent' | 'rage' | 'hack' | null
  user_message: string | null
}

export type ConvoHead = { id: string; state: ConvoState; closed: boolean; created_at: string; last_message_at: string | null }

export type MessageEvent = { type: 'message'; action: 'create'; agent_id: string; convo_id: string; message: Message }
export type TypingEvent = { type: 'typing'; kind: 'thinking' | 'typing'; state: 'start' | 'stop'; label: string; convo_id: string }
export type ConvoStateEvent = {
  type: 'convo_state'; agent_id: string; convo_id: string; state: ConvoState; prev_state: ConvoState; closed_user_message: string | null
}
export type TurnDoneEvent = {
  type: 'turn_done'; convo_id: string; at: number; retry_after_seconds?: number
  reason: 'ok' | 'blocked' | 'rate_limited' | 'closed' | 'unavailable' | 'temporary_failure'
}
export type AgentErrorEvent = { type: 'error'; convo_id: string; reason: 'temporary_failure'; at: number }
export type ReadyEvent = { type: 'ready'; conn_id: string; resumed?: boolean }
export type ClosedEvent = { type: 'closed'; reason: string }
/** A piece of what is being said: `index` counts a message's pieces from 0. */
export type DeltaEvent = { type: 'delta'; convo_id: string; message_id: string; index: number; text: string; done?: boolean }
/** What is being said, as far as it is known; with `done`, nothing more comes of it. */
export type TokenEvent = { messageId: string; delta: string; text: string; done?: boolean }
/** Why the conversation does not go on by itself. */
export type ErrorEvent = { error: Error; phase: 'token' | 'stream' | 'history' | 'send' | 'agent' }

export type Events = {
  message: MessageEvent
  typing: TypingEvent
  convo_state: ConvoStateEvent
  turn_done: TurnDoneEvent
  ready: ReadyEvent
  closed: ClosedEvent
  token: TokenEvent
  error: ErrorEvent
  /** The stream is there, is being made, or will not be any more. */
  status: Status
  /** What waits to be sent has changed. */
  outbox: readonly { key: string; text: string; at: number }[]
}

export type Status = 'connecting' | 'live' | 'waiting' | 'paused' | 'offline' | 'closed'

/** What the server refused, and may say more of. */
export class RequestError extends Error {
  readonly status: number
  readonly code: string
  readonly retryAfterMs: number | undefined

  constructor(status: number, code: string, message: string, retryAfterMs?: number) {
    super(message)
    this.name = 'RequestError'
    this.status = status
    this.code = code
    this.retryAfterMs = retryAfterMs
  }

  /** Whether the same request may succeed later. */
  get isRetryable(): boolean {
    return this.status === 408 || this.status === 429 || this.status >= 500
  }
}

/** Conversations of an app's users with agents. */

export { ConversationClient, Convo, type ConversationClientOptions, type OpenOptions, type Session } from './client.js'
export type { Host, Life, LifeEvent, StreamRequest, StreamResponse } from './host.js'
export type { Store } from './outbox.js'
export { ConvoView, type View } from './view.js'
export {
  RequestError,
  type AgentErrorEvent,
  type AttachmentPolicy,
  type ClosedEvent,
  type ConvoHead,
  type ConvoState,
  type ConvoStateEvent,
  type DeltaEvent,
  type ErrorEvent,
  type Events,
  type From,
  type Lockout,
  type Message,
  type MessageEvent,
  type MessageFile,
  type Participant,
  type ReadyEvent,
  type Status,
  type TokenEvent,
  type TurnDoneEvent,
  type TypingEvent,
} from './types.js'

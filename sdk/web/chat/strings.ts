/** What the chat says in its own words. Give others for another language. */
export type Strings = {
  title: string
  message: string
  placeholder: string
  send: string
  attach: string
  remove: (name: string) => string
  earlier: string
  you: string
  assistant: string
  /** Before the first message. */
  greeting: string
  sending: string
  /** What was written and waits for the connection. */
  waits: string
  thinking: string
  joined: (name: string) => string
  connecting: string
  offline: string
  waiting: string
  ended: string
  /** The conversation that the page names is not there. */
  missing: string
  /** Somebody will take over. */
  escalated: string
  startOver: string
  jump: string
  /** Why something was not sent, or there is no connection. */
  notSent: string
  tooMany: string
  fileRefused: string
  notConnected: string
}

export const ENGLISH: Strings = {
  title: 'Chat',
  message: 'Message',
  placeholder: 'Write a message…',
  send: 'Send',
  attach: 'Attach files',
  remove: (name) => `Remove ${name}`,
  earlier: 'Earlier messages',
  you: 'You',
  assistant: 'Assistant',
  greeting: 'Write something to begin.',
  sending: 'Sending…',
  waits: 'Waits for the connection',
  thinking: 'is typing…',
  joined: (name) => `${name} has joined`,
  connecting: 'Connecting…',
  offline: 'You are offline. What you write is sent when you are back.',
  waiting: 'The connection was lost. Trying again…',
  ended: 'This conversation has ended.',
  missing: 'This conversation is not there any more.',
  escalated: 'Someone from the team will join this conversation.',
  startOver: 'Start a new one',
  jump: 'New messages',
  notSent: 'Your message was not sent. Please try again.',
  tooMany: 'You have sent many messages. Please wait a moment and try again.',
  fileRefused: 'This file cannot be sent here.',
  notConnected: 'There is no connection to the chat at the moment. Trying again…',
}

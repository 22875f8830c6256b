/** What the chat says in its own words. Give others for another language. */
export type Strings = {
  title: string
  open: string
  close: string
  message: string
  placeholder: string
  send: string
  attach: string
  remove: (name: string) => string
  earlier: string
  you: string
  assistant: string
  sending: string
  thinking: string
  connecting: string
  offline: string
  waiting: string
  ended: string
  startOver: string
  failed: (why: string) => string
  jump: string
}

export const ENGLISH: Strings = {
  title: 'Chat',
  open: 'Open chat',
  close: 'Close chat',
  message: 'Message',
  placeholder: 'Write a message…',
  send: 'Send',
  attach: 'Attach files',
  remove: (name) => `Remove ${name}`,
  earlier: 'Earlier messages',
  you: 'You',
  assistant: 'Assistant',
  sending: 'Sending…',
  thinking: 'is typing…',
  connecting: 'Connecting…',
  offline: 'You are offline. What you write is sent when you are back.',
  waiting: 'The connection was lost. Trying again…',
  ended: 'This conversation has ended.',
  startOver: 'Start a new one',
  failed: (why) => `Not sent: ${why}`,
  jump: 'New messages',
}

/** A conversation in a React component. */

import { useCallback, useEffect, useState, useSyncExternalStore } from 'react'

import { ConvoView, type ConversationClient, type Convo, type View } from '../conversation/index.js'

export type Conversation = View & {
  /** Says something; rejects if the server refuses it for good. */
  send: (text: string, options?: { messageId?: string }) => Promise<{ messageId: string }>
  /** Uploads files for one message, which `send` says. */
  upload: (files: Iterable<File | Blob>) => Promise<{ messageId: string }>
  /** The conversation itself, as soon as it is open. */
  convo: Convo | undefined
}

const NOTHING: View = {
  messages: [], partials: new Map(), pending: [], typing: undefined, state: undefined, notice: undefined,
  status: 'connecting', error: undefined,
}

export type UseSessionOptions = {
  /** Whose conversation it is, where more than one user has this tab, one after the other: what the app calls the user. */
  user?: string
}

export type UseSessionResult = {
  /** The conversation, as soon as it has begun. */
  convoId: string | undefined
  /** Why none could be begun. */
  error: Error | undefined
  /** Begins another one, for all components with this agent and user. */
  restart: () => void
}

/** What is kept under a name, or is being begun: one conversation for all components that ask. */
const sessions = new Map<string, { begun: Promise<string>; listeners: Set<() => void> }>()

/**
 * The conversation of this tab with the client's agent: the same after a reload, and begun if there is none. Where there is no
 * `sessionStorage`, as in React Native, it lasts as long as the program; keep `convoId` yourself to go on with it.
 */
export function useSession(client: ConversationClient, options: UseSessionOptions = {}): UseSessionResult {
  const storageKey = `trunkline:${client.agentId}:${options.user ?? ''}:convo`
  type Found = { client: ConversationClient; storageKey: string; convoId?: string; error?: Error }
  const [found, setFound] = useState<Found>()
  const [attempt, setAttempt] = useState(0)
  useEffect(() => {
    let isOver = false
    const session = begin(client, storageKey)
    const listener = () => setAttempt((before) => before + 1)
    session.listeners.add(listener)
    session.begun.then(
      (convoId) => void (isOver || setFound({ client, storageKey, convoId })),
      (failure: unknown) => {
        const error = failure instanceof Error ? failure : new Error(String(failure))
        if (!isOver) setFound({ client, storageKey, error })
      },
    )
    return () => {
      isOver = true
      session.listeners.delete(listener)
    }
  }, [client, storageKey, attempt])
  const restart = useCallback(() => {
    const session = sessions.get(storageKey)
    sessions.delete(storageKey)
    keep(storageKey, undefined)
    setFound(undefined)
    session?.listeners.forEach((listener) => listener())
  }, [storageKey])
  // What another client or user had is not this one's.
  const own = found?.client === client && found.storageKey === storageKey ? found : undefined
  return { convoId: own?.convoId, error: own?.error, restart }
}

function begin(client: ConversationClient, storageKey: string): { begun: Promise<string>; listeners: Set<() => void> } {
  const known = sessions.get(storageKey)
  if (known) return known
  const kept = tabStorage()?.getItem(storageKey)
  const begun = kept ? Promise.resolve(kept) : client.startSession().then(({ convoId }) => (keep(storageKey, convoId), convoId))
  const session = { begun, listeners: new Set<() => void>() }
  sessions.set(storageKey, session)
  // The next one that asks tries again.
  begun.catch(() => sessions.get(storageKey) === session && sessions.delete(storageKey))
  return session
}

/** Of the tab, not of the browser. Nothing where a page may keep nothing. */
function tabStorage(): Storage | undefined {
  try {
    return typeof sessionStorage === 'undefined' ? undefined : sessionStorage
  } catch {
    return undefined
  }
}

function keep(storageKey: string, convoId: string | undefined): void {
  try {
    if (convoId === undefined) tabStorage()?.removeItem(storageKey)
    else tabStorage()?.setItem(storageKey, convoId)
  } catch {
    // A full store: another conversation after a reload.
  }
}

const none = () => () => undefined
const nothing = () => NOTHING

/**
 * Opens a conversation for as long as the component is there. `client` and `convoId` say which: a new one of either opens
 * another one.
 */
export function useConversation(client: ConversationClient, convoId: string | undefined, options: { history?: number } = {}): Conversation {
  const [opened, setOpened] = useState<{ convo: Convo; view: ConvoView }>()
  const { history } = options
  useEffect(() => {
    if (!convoId) return undefined
    let isOver = false
    let mine: { convo: Convo; view: ConvoView } | undefined
    void client.openConvo({ convoId, ...(history === undefined ? {} : { history }) }).then((convo) => {
      if (isOver) return convo.close()
      mine = { convo, view: new ConvoView(convo) }
      setOpened(mine)
    })
    return () => {
      isOver = true
      mine?.view.close()
      mine?.convo.close()
      setOpened(undefined)
    }
  }, [client, convoId, history])
  const view = useSyncExternalStore(opened?.view.subscribe ?? none, opened?.view.get ?? nothing, nothing)
  const convo = opened?.convo
  const send = useCallback<Conversation['send']>(
    (text, how) => convo?.send(text, how) ?? Promise.reject(new Error('the conversation is not open yet')),
    [convo],
  )
  const upload = useCallback<Conversation['upload']>(
    (files) => convo?.upload(files) ?? Promise.reject(new Error('the conversation is not open yet')),
    [convo],
  )
  return { ...view, send, upload, convo }
}

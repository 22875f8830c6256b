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

export type Session = {
  /** The conversation, as soon as it has begun. */
  convoId: string | undefined
  /** Why none could be begun. */
  error: Error | undefined
  /** Begins another one. */
  restart: () => void
}

/** What is being begun, so that an effect that runs twice begins one conversation. */
const beginning = new WeakMap<ConversationClient, Promise<string>>()

/** The conversation of this tab with the client's agent: the same after a reload, and begun if there is none. */
export function useSession(client: ConversationClient): Session {
  const [convoId, setConvoId] = useState<string>()
  const [error, setError] = useState<Error>()
  const [attempt, setAttempt] = useState(0)
  useEffect(() => {
    let isOver = false
    setError(undefined)
    begin(client).then(
      (id) => void (isOver || setConvoId(id)),
      (failure: unknown) => void (isOver || setError(failure instanceof Error ? failure : new Error(String(failure)))),
    )
    return () => {
      isOver = true
    }
  }, [client, attempt])
  const restart = useCallback(() => {
    keep(client, undefined)
    setConvoId(undefined)
    setAttempt((before) => before + 1)
  }, [client])
  return { convoId, error, restart }
}

function begin(client: ConversationClient): Promise<string> {
  const known = kept(client)
  if (known) return Promise.resolve(known)
  const session = beginning.get(client) ?? client.startSession().then(({ convoId }) => (keep(client, convoId), convoId))
  beginning.set(client, session)
  return session.finally(() => beginning.delete(client))
}

/** Of the tab, not of the browser: two tabs are two conversations. Nothing where a page may keep nothing. */
function tabStorage(): Storage | undefined {
  try {
    return typeof sessionStorage === 'undefined' ? undefined : sessionStorage
  } catch {
    return undefined
  }
}

const place = (client: ConversationClient) => `trunkline:${client.agentId}:convo`

function kept(client: ConversationClient): string | undefined {
  return tabStorage()?.getItem(place(client)) ?? undefined
}

function keep(client: ConversationClient, convoId: string | undefined): void {
  try {
    if (convoId === undefined) tabStorage()?.removeItem(place(client))
    else tabStorage()?.setItem(place(client), convoId)
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

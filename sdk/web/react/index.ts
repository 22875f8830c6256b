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

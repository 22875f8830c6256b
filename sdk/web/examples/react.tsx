/** A conversation as a React component: everything of it but its looks. */

import { useMemo, useState, type FormEvent } from 'react'

import { ConversationClient } from '@trunkline/web'
import { useConversation, useSession } from '@trunkline/web/react'

type Props = {
  /** Where Trunkline is. */
  baseUrl: string
  /** With which agent: its id in the app. */
  agentId: string
  /** Where the app's backend signs tokens for its user. */
  tokenUrl: string
}

export function SupportChat({ baseUrl, agentId, tokenUrl }: Props) {
  const client = useMemo(
    () => new ConversationClient({ agentId, baseUrl, fetchJwt: () => fetchToken(tokenUrl) }),
    [agentId, baseUrl, tokenUrl],
  )
  const { convoId, restart, error: sessionError } = useSession(client)
  const { messages, partials, pending, typing, state, notice, status, error, send } = useConversation(client, convoId)
  const [text, setText] = useState('')
  const [refusal, setRefusal] = useState<Error>()
  const failure = sessionError ?? error ?? refusal

  const submit = (event: FormEvent) => {
    event.preventDefault()
    setText('')
    setRefusal(undefined)
    // What is refused is not lost.
    send(text).catch((why: Error) => {
      setText((written) => written || text)
      setRefusal(why)
    })
  }

  return (
    <section aria-label="Support">
      <p role="status" data-stream={status}>
        {notice ?? state ?? status}
      </p>
      <ol aria-live="polite">
        {messages.map((message) => (
          <li key={message.id} className={message.from}>
            {message.content}
          </li>
        ))}
        {[...partials].map(([id, piece]) => (
          <li key={id} className="ai_agent">
            {piece}
          </li>
        ))}
        {pending.map((message) => (
          <li key={message.key} className="appuser" aria-busy="true">
            {message.text}
          </li>
        ))}
      </ol>
      {typing && <p>{typing.label ?? 'Typing…'}</p>}
      {failure && (
        <p role="alert">
          {failure.message} <button onClick={restart}>Begin another conversation</button>
        </p>
      )}
      <form onSubmit={submit}>
        <label>
          Message <input value={text} onChange={(event) => setText(event.target.value)} required />
        </label>
        <button>Send</button>
      </form>
    </section>
  )
}

async function fetchToken(url: string): Promise<string> {
  const answer = await fetch(url)
  if (!answer.ok) throw new Error(`no token: ${answer.status}`)
  return answer.text()
}

'use client'

import { useMemo, useState, type FormEvent } from 'react'

import { ConversationClient } from '@trunkline/web'
import { useConversation, useSession } from '@trunkline/web/react'

/** The least that a conversation needs; ../../react.tsx shows what else there is. */
export function SupportChat({ baseUrl, agentId, tokenUrl }: { baseUrl: string; agentId: string; tokenUrl: string }) {
  const client = useMemo(
    () => new ConversationClient({ agentId, baseUrl, fetchJwt: () => fetchToken(tokenUrl) }),
    [agentId, baseUrl, tokenUrl],
  )
  const { convoId, error: sessionError } = useSession(client)
  const { messages, status, error, send } = useConversation(client, convoId)
  const [refusal, setRefusal] = useState<Error>()
  const failure = sessionError ?? error ?? refusal

  const submit = (event: FormEvent<HTMLFormElement>) => {
    event.preventDefault()
    const form = event.currentTarget
    setRefusal(undefined)
    send(String(new FormData(form).get('text'))).then(() => form.reset(), setRefusal)
  }

  return (
    <section aria-label="Support">
      <p role="status">{status}</p>
      <ol aria-live="polite">
        {messages.map(({ id, from, content }) => (
          <li key={id} className={from}>
            {content}
          </li>
        ))}
      </ol>
      {failure && <p role="alert">{failure.message}</p>}
      <form onSubmit={submit}>
        <label>
          Message <input name="text" autoComplete="off" required />
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

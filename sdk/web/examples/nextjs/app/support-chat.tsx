'use client'

import { useMemo, type FormEvent } from 'react'

import { ConversationClient } from '@trunkline/web'
import { useConversation, useSession } from '@trunkline/web/react'

/** The least that a conversation needs; ../../react.tsx shows what else there is. */
export function SupportChat({ baseUrl, agentId, tokenUrl }: { baseUrl: string; agentId: string; tokenUrl: string }) {
  const client = useMemo(
    () => new ConversationClient({ agentId, baseUrl, fetchJwt: async () => (await fetch(tokenUrl)).text() }),
    [agentId, baseUrl, tokenUrl],
  )
  const { convoId } = useSession(client)
  const { messages, status, send } = useConversation(client, convoId)

  const submit = (event: FormEvent<HTMLFormElement>) => {
    event.preventDefault()
    const form = event.currentTarget
    void send(String(new FormData(form).get('text'))).catch(() => undefined)
    form.reset()
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
      <form onSubmit={submit}>
        <label>
          Message <input name="text" autoComplete="off" required />
        </label>
        <button>Send</button>
      </form>
    </section>
  )
}

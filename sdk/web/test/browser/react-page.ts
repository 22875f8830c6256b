/** A chat as a React component. Bundled for a page of the tests. */

import { createElement, StrictMode, useMemo, useState } from 'react'
import { createRoot } from 'react-dom/client'

import { ConversationClient } from '../../conversation/index.js'
import { useConversation } from '../../react/index.js'

type Props = { base: string; agentId: string; convoId: string }

function Chat({ base, agentId, convoId }: Props) {
  const client = useMemo(() => {
    const fetchJwt = async () => (await fetch('/token?user=react')).text()
    return new ConversationClient({ agentId, baseUrl: base, fetchJwt })
  }, [base, agentId])
  const { messages, partials, status, send } = useConversation(client, convoId)
  return createElement(
    'div',
    null,
    createElement('p', { id: 'status' }, status),
    createElement('ul', null, ...messages.map(({ id, content, from }) => createElement('li', { key: id, className: from }, content))),
    createElement('p', { id: 'partial' }, [...partials.values()].join('')),
    createElement('button', { onClick: () => void send(`message ${messages.length}`) }, 'Say'),
  )
}

function Page(props: Props) {
  const [isOpen, setOpen] = useState(true)
  const toggle = createElement('button', { onClick: () => setOpen(!isOpen) }, isOpen ? 'Hide' : 'Show')
  return createElement('main', null, toggle, isOpen ? createElement(Chat, props) : null)
}

/** Strict, so that every effect runs twice. */
export function render(props: Props): void {
  const root = document.body.appendChild(document.createElement('div'))
  createRoot(root).render(createElement(StrictMode, null, createElement(Page, props)))
}

Object.assign(globalThis, { render })

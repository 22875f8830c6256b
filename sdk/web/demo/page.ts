/** The page of `trunkline demo`: a chat, a sandbox beside it, and buttons that break things. */

import '../chat/index.js'
import type { TrunklineChat } from '../chat/index.js'
import { SandboxClient, type Artifact } from '../sandbox/index.js'

type Config = { server: string; agentId: string; session: string }
type Standing = { server: boolean; agent: boolean; sandbox: boolean }

/** How often it is looked at who is there. */
const LOOK_MS = 500

function find<T extends HTMLElement>(id: string): T {
  const found = document.getElementById(id)
  if (!found) throw new Error(`the page has no #${id}`)
  return found as T
}

function note(text: string): void {
  const item = document.createElement('li')
  item.textContent = `${new Date().toLocaleTimeString()} ${text}`
  find('events').prepend(item)
}

function show({ server, agent, sandbox }: Standing): void {
  for (const [name, isThere] of Object.entries({ server, agent, sandbox })) {
    const pill = find(`is-${name}`)
    pill.dataset['there'] = String(isThere)
    pill.textContent = `${name} ${isThere ? 'is running' : 'is away'}`
  }
  const away = server && !agent ? 'The agent is away. What you write waits for it, and it answers when it is back.' : ''
  // It is read aloud when it changes.
  if (find('away').textContent !== away) find('away').textContent = away
}

async function look(): Promise<void> {
  try {
    show((await (await fetch('/status')).json()) as Standing)
  } catch {
    show({ server: false, agent: false, sandbox: false })
  }
  setTimeout(() => void look(), LOOK_MS)
}

const SHOWN: Record<string, (artifact: Artifact) => string> = {
  user_prompt: ({ text }) => String(text),
  text: ({ text }) => String(text),
  tool: ({ name, input, output }) => `$ ${String(input ?? name)}\n${String(output ?? '')}`,
  file_change: ({ path, diff }) => `${String(path)}\n${String(diff)}`,
  plan: ({ steps }) => (Array.isArray(steps) ? steps.map((step, n) => `${n + 1}. ${String(step)}`).join('\n') : ''),
}

const NAMES: Record<string, string> = { user_prompt: 'asked', text: 'says', tool: 'runs', file_change: 'wrote', plan: 'plans' }

/** Each artifact is an element of its own, that grows with it. */
function showArtifacts(artifacts: readonly Artifact[], isLive: boolean): void {
  const list = find('artifacts')
  list.dataset['live'] = String(isLive)
  const isNear = list.scrollHeight - list.scrollTop - list.clientHeight < 80
  const wanted = artifacts.filter(({ kind }) => kind in SHOWN)
  const known = new Map([...list.children].map((child) => [(child as HTMLElement).dataset['seq'], child as HTMLElement]))
  for (const artifact of wanted) {
    let item = known.get(String(artifact.seq))
    if (!item) {
      item = document.createElement('li')
      item.dataset['seq'] = String(artifact.seq)
      item.append(document.createElement('b'), document.createElement('pre'))
      list.append(item)
    }
    item.dataset['status'] = String(artifact.status ?? '')
    item.children[0]!.textContent = NAMES[artifact.kind] ?? artifact.kind
    item.children[1]!.textContent = SHOWN[artifact.kind]!(artifact)
    known.delete(String(artifact.seq))
  }
  known.forEach((gone) => gone.remove())
  find('nothing').hidden = wanted.length > 0
  if (isNear) list.scrollTop = list.scrollHeight
}

async function main(): Promise<void> {
  const { server, agentId, session } = (await (await fetch('/config')).json()) as Config
  const chat = find<TrunklineChat>('chat')
  chat.setAttribute('base-url', server)
  chat.setAttribute('agent-id', agentId)
  chat.setAttribute('token-url', '/token?user=visitor')
  chat.addEventListener('opened', () => {
    const { convo } = chat
    convo?.on('status', (status) => status === 'live' && note('this page is connected'))
    convo?.on('status', (status) => status === 'waiting' && note('this page lost the server, and tries again'))
    convo?.on('turn_done', ({ reason }) => reason !== 'ok' && note(`a turn ended: ${reason}`))
  })
  new SandboxClient({ baseUrl: server }).watch(session, showArtifacts)
  find('kill').addEventListener('click', () => {
    note('the agent is killed; it is started again in two seconds')
    void fetch('/kill-agent', { method: 'POST' })
  })
  find('restart').addEventListener('click', () => {
    note('the server is killed, and started again')
    void fetch('/restart-server', { method: 'POST' }).then(async (response) => {
      const { ms } = (await response.json()) as { ms: number }
      note(`the server is back after ${ms} ms`)
    })
  })
  void look()
}

void main()

/**
 * `<trunkline-chat base-url agent-id token-url convo-id? theme? history? greeting?>`: a chat with an agent. For other ways to get a token
 * and for another language, set `fetchJwt` and `strings`.
 */

import { ConversationClient, ConvoView, RequestError, type Convo, type Message, type View } from '../conversation/index.js'
import { element, grow, isOneRun, message, nameOf, note, partial, pending } from './messages.js'
import { ENGLISH, type Strings } from './strings.js'
import { STYLE } from './style.js'

/** Messages that are shown at first, and more of before each time they are asked for. */
const PAGE = 50
/** So near to its end, in pixels, a list follows what comes. */
const NEAR_END = 80

/** A paper clip; not a character, for which a font may have no picture. */
const CLIP =
  '<svg viewBox="0 0 24 24" width="20" height="20" fill="none" stroke="currentColor" stroke-width="2" stroke-linecap="round" aria-hidden="true"><path d="M20 11.5 12 19.5a5 5 0 0 1-7-7l8.5-8.5a3.3 3.3 0 0 1 4.7 4.7l-8.5 8.4a1.7 1.7 0 0 1-2.3-2.3l7.8-7.8"/></svg>'

type Opened = { client: ConversationClient; convo: Convo; view: ConvoView }

/** Why something does not go on: by its end, an error's text goes, too. */
type Failing = 'connection' | 'message'

/** One thing in the log. */
type Entry = { id: string; make: () => HTMLElement; said?: Message }

export class TrunklineChat extends HTMLElement {
  static readonly observedAttributes = ['base-url', 'agent-id', 'token-url', 'convo-id']

  /** Answers a fresh token; instead of `token-url`. */
  fetchJwt: (() => Promise<string>) | undefined
  #strings: Strings = ENGLISH
  #opened: Opened | undefined
  #opening = 0
  #opensSoon = false
  readonly #root = this.attachShadow({ mode: 'open' })
  readonly #title = element('h2')
  readonly #status = element('span', { className: 'status' }, { role: 'status' })
  readonly #log = element('div', { className: 'log', tabIndex: 0 }, { role: 'log', 'aria-live': 'polite', 'aria-relevant': 'additions' })
  readonly #earlier = element('button', { className: 'plain', type: 'button', hidden: true })
  readonly #typing = element('div', { className: 'typing' }, { role: 'status' })
  readonly #jump = element('button', { type: 'button', className: 'jump', hidden: true })
  readonly #greeting = element('p', { className: 'note', hidden: true })
  readonly #error = element('div', { className: 'error', hidden: true }, { role: 'alert' })
  readonly #notice = element('div', { className: 'notice', hidden: true }, { role: 'status' })
  readonly #drafts = element('ul', { className: 'drafts', hidden: true })
  readonly #form = element('form')
  readonly #text = element('textarea', { rows: 1 }, { 'enterkeyhint': 'send' })
  readonly #file = element('input', { type: 'file', multiple: true, hidden: true })
  readonly #attach = element('button', { type: 'button', className: 'plain', innerHTML: CLIP })
  readonly #send = element('button', { type: 'submit' })
  readonly #shown = new Map<string, HTMLElement>()
  #files: File[] = []
  #failing: Failing | undefined
  /** The last thing that was said is in sight, and stays so. */
  #isAtEnd = true
  #isSaying = false
  #hasEarlier = true

  constructor() {
    super()
    const header = element('header')
    header.append(this.#title, this.#status)
    this.#form.append(this.#file, this.#attach, this.#text, this.#send)
    const frame = element('section', { className: 'frame' })
    this.#log.append(this.#earlier, this.#greeting)
    const middle = element('div', { className: 'middle' })
    middle.append(this.#log, this.#jump)
    frame.append(header, middle, this.#typing, this.#error, this.#notice, this.#drafts, this.#form)
    this.#root.append(element('style', { textContent: STYLE }), frame)
    this.#words()
    this.#form.addEventListener('submit', (event) => {
      event.preventDefault()
      void this.#say()
    })
    this.#text.addEventListener('keydown', (event) => {
      // While an input method composes, Enter is its own.
      if (event.key !== 'Enter' || event.shiftKey || event.isComposing) return
      event.preventDefault()
      this.#form.requestSubmit()
    })
    this.#text.addEventListener('input', () => {
      this.#fit()
      if (this.#failing === 'message') this.#recovered('message')
    })
    this.#log.addEventListener('scroll', () => {
      this.#isAtEnd = this.#log.scrollHeight - this.#log.scrollTop - this.#log.clientHeight < NEAR_END
      if (this.#isAtEnd) this.#jump.hidden = true
    })
    this.#jump.addEventListener('click', () => {
      this.#scroll()
      this.#text.focus()
    })
    // Whatever grows below it, and pictures that are there later.
    new ResizeObserver(() => this.#isAtEnd && this.#scroll()).observe(this.#log)
    this.#log.addEventListener('load', () => this.#isAtEnd && this.#scroll(), true)
    this.#attach.addEventListener('click', () => this.#file.click())
    this.#file.addEventListener('change', () => this.#choose([...(this.#file.files ?? [])]))
    this.#earlier.addEventListener('click', () => void this.#loadEarlier())
  }

  /** What it says in its own words. */
  get strings(): Strings {
    return this.#strings
  }

  set strings(strings: Partial<Strings>) {
    this.#strings = { ...ENGLISH, ...strings }
    this.#words()
    if (this.#opened) this.#render(this.#opened.view.get())
  }

  /** The conversation that is open. */
  get convo(): Convo | undefined {
    return this.#opened?.convo
  }

  connectedCallback(): void {
    this.#openSoon()
  }

  disconnectedCallback(): void {
    this.#close()
  }

  attributeChangedCallback(name: string, before: string | null, after: string | null): void {
    if (!this.isConnected || before === after) return
    // It is its own that it keeps.
    if (name === 'convo-id' && after === this.#opened?.convo.convoId) return
    this.#openSoon()
  }

  /** Once, however many attributes are set: each alone would begin a conversation. */
  #openSoon(): void {
    if (this.#opensSoon) return
    this.#opensSoon = true
    queueMicrotask(() => {
      this.#opensSoon = false
      if (this.isConnected) void this.#open()
    })
  }

  override focus(options?: FocusOptions): void {
    this.#text.focus(options)
  }

  /** Begins another conversation; done when it is there. */
  async startOver(): Promise<void> {
    try {
      localStorage.removeItem(this.#place)
    } catch {
      // There is nothing to forget.
    }
    const opened = new Promise((resolve) => this.addEventListener('opened', resolve, { once: true }))
    // At once, so that the focus is never nowhere.
    this.#close()
    this.focus()
    this.removeAttribute('convo-id')
    this.#openSoon()
    await opened
  }

  get #place(): string {
    return `trunkline:${this.getAttribute('agent-id') ?? ''}:convo`
  }

  #words(): void {
    const say = this.#strings
    this.#title.textContent = this.getAttribute('title-text') ?? say.title
    this.#log.setAttribute('aria-label', say.title)
    this.#earlier.textContent = say.earlier
    this.#text.setAttribute('aria-label', say.message)
    this.#text.placeholder = say.placeholder
    this.#send.textContent = say.send
    this.#attach.setAttribute('aria-label', say.attach)
    this.#attach.title = say.attach
    this.#jump.textContent = say.jump
    this.#greeting.textContent = this.getAttribute('greeting') ?? say.greeting
  }

  async #open(): Promise<void> {
    this.#close()
    const opening = ++this.#opening
    const agentId = this.getAttribute('agent-id')
    const tokenUrl = this.getAttribute('token-url')
    const fromUrl = async () => {
      const response = await fetch(tokenUrl ?? '')
      if (!response.ok) throw new Error(`the token's address answered ${response.status}`)
      return response.text()
    }
    const fetchJwt = this.fetchJwt ?? (tokenUrl ? fromUrl : undefined)
    if (!agentId || !fetchJwt) return
    this.#status.textContent = this.#strings.connecting
    const client = new ConversationClient({ agentId, fetchJwt, baseUrl: this.getAttribute('base-url') ?? '' })
    for (let wait = 250; ; wait = Math.min(wait * 2, 30_000)) {
      try {
        const convoId = await this.#convoId(client)
        if (opening !== this.#opening) return
        this.#remember(convoId)
        const convo = await client.openConvo({ convoId, history: Number(this.getAttribute('history') ?? PAGE) })
        const view = new ConvoView(convo)
        this.#opened = { client, convo, view }
        this.#hasEarlier = true
        view.subscribe(() => this.#render(view.get()))
        this.#render(view.get())
        this.dispatchEvent(new CustomEvent('opened', { detail: { convoId } }))
        return
      } catch (error) {
        if (opening !== this.#opening) return
        if (error instanceof RequestError && error.status === 404) return this.#over(this.#strings.missing)
        this.#fail('connection', this.#strings.notConnected, error)
        await new Promise((resolve) => setTimeout(resolve, wait))
        if (opening !== this.#opening) return
      }
    }
  }

  /** The conversation that the attribute names, the one that this browser had last, or a new one. */
  async #convoId(client: ConversationClient): Promise<string> {
    const named = this.getAttribute('convo-id')
    if (named) return named
    try {
      const known = localStorage.getItem(this.#place)
      const all = known ? await client.listConvos({ limit: 50 }) : []
      if (known && all.some(({ id, closed }) => id === known && !closed)) return known
    } catch (error) {
      if (!(error instanceof DOMException)) throw error
    }
    return (await client.startSession()).convoId
  }

  #remember(convoId: string): void {
    if (this.hasAttribute('convo-id')) return
    try {
      localStorage.setItem(this.#place, convoId)
    } catch {
      // The next page begins anew.
    }
  }

  #close(): void {
    this.#opening += 1
    this.#opened?.view.close()
    this.#opened?.convo.close()
    this.#opened = undefined
    this.#shown.forEach((shown) => shown.remove())
    this.#shown.clear()
    this.#failing = undefined
    this.#error.hidden = this.#notice.hidden = this.#greeting.hidden = true
    this.#form.hidden = false
    this.#isAtEnd = true
  }

  async #say(): Promise<void> {
    const opened = this.#opened
    const text = this.#text.value
    const files = this.#files
    if (!opened || this.#isSaying || (text.trim() === '' && files.length === 0)) return
    this.#recovered('message')
    this.#text.value = ''
    this.#choose(undefined)
    this.#fit()
    try {
      const draft = files.length > 0 ? await this.#upload(opened, files) : undefined
      this.#scroll()
      await opened.convo.send(text, draft ?? {})
    } catch (error) {
      // Of another conversation than this one, by now.
      if (opened !== this.#opened) return
      // What was written is not lost.
      if (this.#text.value === '') this.#text.value = text
      if (this.#files.length === 0 && files.length > 0) this.#choose(files)
      this.#fit()
      this.#fail('message', this.#why(error), error)
    }
  }

  /** In the words of whoever writes, not of whoever made the page. */
  #why(error: unknown): string {
    const status = error instanceof RequestError ? error.status : 0
    if (status === 429) return this.#strings.tooMany
    return status === 413 || status === 415 || status === 422 ? this.#strings.fileRefused : this.#strings.notSent
  }

  async #upload({ convo }: Opened, files: File[]): Promise<{ messageId: string }> {
    this.#isSaying = this.#send.disabled = true
    try {
      return await convo.upload(files)
    } finally {
      this.#isSaying = this.#send.disabled = false
    }
  }

  /** Adds files to what will be sent; with nothing, there are none. */
  #choose(files: File[] | undefined): void {
    this.#files = files ? [...this.#files, ...files] : []
    this.#file.value = ''
    this.#drafts.hidden = this.#files.length === 0
    this.#drafts.replaceChildren(
      ...this.#files.map((file) => {
        const item = element('li', { textContent: file.name })
        const remove = element('button', { type: 'button', className: 'plain', textContent: '✕' }, { 'aria-label': this.#strings.remove(file.name) })
        remove.addEventListener('click', () => {
          this.#files = this.#files.filter((other) => other !== file)
          this.#choose([])
          this.#text.focus()
        })
        item.append(remove)
        return item
      }),
    )
  }

  /** What developers want to know of it is in the browser's log. */
  #fail(failing: Failing, words: string, error: unknown): void {
    console.warn('trunkline-chat:', error)
    this.#failing = failing
    this.#error.hidden = false
    this.#error.textContent = words
  }

  #recovered(failing: Failing): void {
    if (this.#failing !== failing) return
    this.#failing = undefined
    this.#error.hidden = true
  }

  #fit(): void {
    this.#text.style.blockSize = 'auto'
    this.#text.style.blockSize = `${this.#text.scrollHeight + 2}px`
  }

  #scroll(): void {
    this.#log.scrollTop = this.#log.scrollHeight
    this.#isAtEnd = true
    this.#jump.hidden = true
  }

  async #loadEarlier(): Promise<void> {
    const opened = this.#opened
    const first = opened?.view.get().messages[0]
    if (!opened || !first) return
    this.#earlier.disabled = true
    try {
      const height = this.#log.scrollHeight
      const messages = await opened.convo.loadBefore(first.id, PAGE)
      this.#hasEarlier = messages.length === PAGE
      opened.view.prepend(messages)
      this.#render(opened.view.get())
      this.#log.scrollTop += this.#log.scrollHeight - height
    } catch (error) {
      this.#fail('connection', this.#strings.notConnected, error)
    } finally {
      this.#earlier.disabled = false
    }
  }

  #render(view: View): void {
    const say = this.#strings
    const wasAtEnd = this.#isAtEnd
    const hasMore = this.#arrange(this.#entries(view), view)
    this.#runs(view.messages)
    this.#greeting.hidden = view.messages.length + view.pending.length + view.partials.size > 0 || view.status === 'connecting'
    this.#earlier.hidden = !(this.#hasEarlier && view.messages.length >= Number(this.getAttribute('history') ?? PAGE))
    const { typing } = view
    this.#typing.textContent = typing ? typing.label || `${say.assistant} ${say.thinking}` : ''
    const statuses = { connecting: say.connecting, live: '', waiting: say.waiting, paused: '', offline: say.offline, closed: '' }
    this.#status.textContent = statuses[view.status]
    if (view.status === 'live') this.#recovered('connection')
    this.#end(view)
    if (view.error && view.status === 'closed' && this.#notice.hidden) this.#fail('connection', say.notConnected, view.error)
    if (wasAtEnd) this.#scroll()
    else if (hasMore) this.#jump.hidden = false
  }

  /** What the log shows, in order. */
  #entries(view: View): Entry[] {
    const say = this.#strings
    const sent = new Set(view.messages.map(({ id }) => id))
    const all: Entry[] = []
    let speaker: Message | undefined
    for (const said of view.messages) {
      if (said.from === 'human_agent' && said.participant?.id !== speaker?.participant?.id) {
        all.push({ id: `joined:${said.id}`, make: () => note(say.joined(nameOf(said, say))) })
      }
      if (said.from !== 'appuser') speaker = said
      all.push({ id: said.id, make: () => message(said, say), said })
    }
    for (const [id, text] of view.partials) if (!sent.has(id)) all.push({ id: `partial:${id}`, make: () => partial(text, say) })
    const waits = view.status !== 'live'
    for (const { key, text } of view.pending) all.push({ id: `pending:${key}:${waits}`, make: () => pending(text, say, waits) })
    return all
  }

  /** Puts them into the log, and takes out what is not there any more; answers whether others said something new at its end. */
  #arrange(all: Entry[], view: View): boolean {
    const wanted = new Set(all.map(({ id }) => id))
    for (const [id, shown] of this.#shown) {
      if (wanted.has(id)) continue
      shown.remove()
      this.#shown.delete(id)
    }
    let before: Element = this.#earlier
    let hasMore = false
    for (const { id, make, said } of all) {
      let shown = this.#shown.get(id)
      hasMore = shown ? false : hasMore || (said !== undefined && said.from !== 'appuser')
      if (!shown) this.#shown.set(id, (shown = make()))
      else if (id.startsWith('partial:')) grow(shown, view.partials.get(id.slice(8)) ?? '')
      if (before.nextElementSibling !== shown) before.after(shown)
      before = shown
    }
    return hasMore
  }

  /** Of what one says in a row, the first has the picture, and the last the name and the time. */
  #runs(messages: readonly Message[]): void {
    messages.forEach((said, n) => {
      const shown = this.#shown.get(said.id)
      shown?.toggleAttribute('data-begins', !isOneRun(messages[n - 1], said))
      shown?.toggleAttribute('data-ends', !isOneRun(said, messages[n + 1]))
    })
  }

  /** What is left to do when nothing can be said any more; and what is said of how the conversation stands. */
  #end(view: View): void {
    const isOver = view.state !== undefined && !['open', 'escalated', 'pending_feedback'].includes(view.state)
    const isMissing = view.status === 'closed' && view.error instanceof RequestError && view.error.status === 404
    if (isOver || isMissing) return this.#over(isMissing ? this.#strings.missing : view.notice ?? this.#strings.ended)
    this.#form.hidden = false
    const told = view.state === 'escalated' ? view.notice ?? this.#strings.escalated : undefined
    this.#notice.hidden = told === undefined
    if (told !== undefined && this.#notice.textContent !== told) this.#notice.replaceChildren(element('span', { textContent: told }))
  }

  /** Nothing can be said here any more; another conversation can be begun. */
  #over(why: string): void {
    if (this.#form.hidden && !this.#notice.hidden) return
    const hadFocus = this.#form.contains(this.#root.activeElement)
    this.#form.hidden = true
    this.#notice.hidden = false
    this.#status.textContent = ''
    const again = element('button', { type: 'button', className: 'plain', textContent: this.#strings.startOver })
    again.addEventListener('click', () => void this.startOver())
    this.#notice.replaceChildren(element('span', { textContent: why }), again)
    if (hadFocus) again.focus()
  }
}

/** Defines the element, once. */
export function define(name = 'trunkline-chat'): void {
  if (!customElements.get(name)) customElements.define(name, TrunklineChat)
}

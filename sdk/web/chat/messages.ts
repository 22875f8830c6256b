/** What each thing in the log of a chat looks like. */

import type { Message, Participant } from '../conversation/index.js'
import { linked, markdown } from './markdown.js'
import type { Strings } from './strings.js'

export function element<K extends keyof HTMLElementTagNameMap>(name: K, set: Partial<HTMLElementTagNameMap[K]> = {}, attributes: Record<string, string> = {}): HTMLElementTagNameMap[K] {
  const made = Object.assign(document.createElement(name), set)
  for (const [attribute, value] of Object.entries(attributes)) made.setAttribute(attribute, value)
  return made
}

/** Whether two messages are shown as one run: with one name and time, and one picture. */
export function isOneRun(one: Message | undefined, next: Message | undefined): boolean {
  if (!one || !next || one.from !== next.from || one.participant?.id !== next.participant?.id) return false
  return Date.parse(next.created_at) - Date.parse(one.created_at) < 5 * 60_000
}

export function nameOf({ from, participant }: Message, say: Strings): string {
  return from === 'appuser' ? say.you : participant?.name || say.assistant
}

export function message(message: Message, say: Strings): HTMLElement {
  const { from, participant, content, created_at: at, files } = message
  const name = nameOf(message, say)
  const shown = bubble(from, content, name)
  if (from !== 'appuser') shown.prepend(face(participant, name))
  const time = element('time', { dateTime: at, textContent: new Date(at).toLocaleTimeString([], { hour: '2-digit', minute: '2-digit' }) })
  const meta = element('div', { className: 'meta' })
  meta.append(`${name} · `, time)
  shown.append(meta)
  if (files.length > 0) {
    const list = element('ul', { className: 'files' })
    list.append(...files.map(attachment))
    shown.querySelector('.bubble')!.append(list)
  }
  return shown
}

/** Whoever speaks: a photo, or the beginning of the name. */
function face(participant: Participant | null, name: string): HTMLElement {
  const shown = element('span', { className: 'face' }, { 'aria-hidden': 'true' })
  const initial = participant?.initial || [...name][0] || ''
  shown.textContent = initial
  if (participant?.photo_url) {
    const photo = element('img', { src: participant.photo_url, alt: '', loading: 'lazy' })
    photo.addEventListener('error', () => photo.remove())
    shown.append(photo)
  }
  return shown
}

function attachment({ url, filename, content_type: type }: Message['files'][number]): HTMLElement {
  const item = element('li')
  const link = element('a', { href: url, target: '_blank', rel: 'noopener noreferrer' })
  if (type.startsWith('image/')) link.append(element('img', { src: url, alt: filename, loading: 'lazy' }))
  else link.textContent = filename
  item.append(link)
  return item
}

/** What grows is not read aloud piece by piece: the whole is, when it is there. */
export function partial(text: string, say: Strings): HTMLElement {
  const shown = bubble('ai_agent', text, say.assistant)
  shown.dataset['partial'] = ''
  shown.setAttribute('aria-hidden', 'true')
  return shown
}

export function grow(shown: HTMLElement, text: string): void {
  shown.querySelector('.bubble')!.replaceChildren(...markdown(text))
}

export function pending(text: string, say: Strings, waits: boolean): HTMLElement {
  const shown = bubble('appuser', text, say.you)
  shown.dataset['pending'] = ''
  shown.append(element('div', { className: 'meta', textContent: waits ? say.waits : say.sending }))
  return shown
}

/** Something that nobody says. */
export function note(text: string): HTMLElement {
  return element('div', { className: 'note', textContent: text })
}

function bubble(from: string, content: string, name: string): HTMLElement {
  const shown = element('div', { className: 'message' }, { 'data-from': from })
  const inside = element('div', { className: 'bubble', dir: 'auto' })
  inside.append(...(from === 'appuser' ? linked(content) : markdown(content)))
  shown.append(element('span', { className: 'hidden', textContent: `${name}: ` }), inside)
  return shown
}

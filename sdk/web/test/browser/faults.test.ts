/** Two hundred faults at random while three tabs talk: whatever was accepted is there once, and every tab shows the same. */

import assert from 'node:assert/strict'
import type { Server } from 'node:http'
import { after, before, test } from 'node:test'

import type { Browser, BrowserContext, Page } from 'playwright-core'

import type { Convo, Message } from '../../conversation/index.js'
import { APP, browser as launch, clean, pages, ROOT, World } from './harness.js'

const FAULTS = 200
const TABS = 3
/** Tokens end in the middle of it. */
const TOKEN_SECONDS = 4

let [browser, files]: [Browser, Server] = [] as never
let [origin, world]: [string, World] = [] as never

before(async () => {
  ;[files, origin] = await pages()
  world = new World(origin, 'faults')
  await world.serve()
  browser = await launch()
})

after(async () => {
  await browser.close()
  await world.end()
  files.close()
  clean()
})

type Kept = { texts: string[]; accepted: string[]; refused: string[]; convo: Convo; stop: boolean }

/** A tab that says something whenever the last thing was accepted. */
async function talk(context: BrowserContext, convoId: string, name: string): Promise<Page> {
  const page = await context.newPage()
  await page.goto(`${origin}/nothing`)
  await page.addScriptTag({ path: `${ROOT}dist/trunkline.js` })
  await page.evaluate(
    async ([base, convoId, agentId, name, seconds]) => {
      const { Trunkline } = globalThis as unknown as { Trunkline: typeof import('../../conversation/index.js') }
      const fetchJwt = async () => (await fetch(`/token?user=faults&seconds=${seconds}`)).text()
      const client = new Trunkline.ConversationClient({ agentId, fetchJwt, baseUrl: base })
      const convo = await client.openConvo({ convoId })
      const kept: Kept = { texts: [], accepted: [], refused: [], convo, stop: false }
      Object.assign(globalThis, { kept })
      convo.on('message', ({ message }) => kept.texts.push(message.content))
      void (async () => {
        for (let n = 0; !kept.stop; n += 1) {
          const text = `${name} ${n}`
          await convo.send(text).then(() => kept.accepted.push(text), (error: Error) => kept.refused.push(`${text}: ${error.message}`))
          await new Promise((resolve) => setTimeout(resolve, 20 + Math.random() * 60))
        }
      })()
    },
    [`http://${world.http}`, convoId, APP.agentId, name, String(TOKEN_SECONDS)] as const,
  )
  return page
}

const kept = <T>(page: Page, get: (kept: Kept) => T) => page.evaluate(`(${get.toString()})(globalThis.kept)`) as Promise<T>

test('nothing is lost or doubled over two hundred faults', { timeout: 420_000 }, async () => {
  const context = await browser.newContext()
  const { convo_id: convo } = await world.ask<{ convo_id: string }>('faults', '/sessions', {})
  const tabs: Page[] = []
  const accepted: string[] = []
  let names = 0
  const begin = async () => tabs.push(await talk(context, convo, `tab${(names += 1)}`))
  for (let n = 0; n < TABS; n += 1) await begin()
  const counts: Record<string, number> = {}
  const pause = (ms: number) => new Promise((resolve) => setTimeout(resolve, ms))
  for (let n = 0; n < FAULTS; n += 1) {
    const fault = ['tab', 'server', 'network', 'stream', 'token'][Math.floor(Math.random() * 5)]!
    counts[fault] = (counts[fault] ?? 0) + 1
    if (fault === 'tab') {
      const [page] = tabs.splice(Math.floor(Math.random() * tabs.length), 1)
      accepted.push(...(await kept(page!, ({ accepted }) => accepted)))
      await page!.close()
      await begin()
    } else if (fault === 'server') {
      await world.killServer()
      await pause(Math.random() * 300)
      await world.serve()
    } else if (fault === 'network') {
      await context.setOffline(true)
      await pause(Math.random() * 400)
      await context.setOffline(false)
    } else if (fault === 'stream') {
      // Whoever has the stream looks away for a moment.
      const page = tabs[Math.floor(Math.random() * tabs.length)]!
      await page.evaluate(() => window.dispatchEvent(new Event('pagehide')))
      await pause(Math.random() * 200)
      await page.evaluate(() => window.dispatchEvent(new Event('pageshow')))
    } else {
      // Long enough for tokens to end.
      await pause(600)
    }
    await pause(Math.random() * 150)
  }
  for (const page of tabs) await kept(page, (kept) => (kept.stop = true))
  for (const page of tabs) {
    await page.waitForFunction(`globalThis.kept.convo.pending.length === 0`, undefined, { timeout: 60_000 })
    accepted.push(...(await kept(page, ({ accepted }) => accepted)))
    assert.deepEqual(await kept(page, ({ refused }) => refused), [])
  }
  const { messages } = await world.ask<{ messages: Message[] }>('faults', `/agent_convos/${convo}`)
  const texts = messages.map(({ content }) => content)
  console.log(`${JSON.stringify(counts)}: ${texts.length} messages, ${accepted.length} of them known to be accepted`)
  assert.equal(new Set(texts).size, texts.length, 'nothing is said twice')
  assert.equal(new Set(messages.map(({ id }) => id)).size, texts.length)
  const there = new Set(texts)
  assert.deepEqual(accepted.filter((text) => !there.has(text)), [], 'what was accepted is there')
  assert.ok(accepted.length > FAULTS, 'they talked')
  // Each tab's own come in their order, and every tab shows all of it, in the order in which it lies.
  for (let name = 1; name <= names; name += 1) {
    const own = texts.filter((text) => text.startsWith(`tab${name} `)).map((text) => Number(text.split(' ')[1]))
    assert.deepEqual(own, [...own].sort((a, b) => a - b), `tab${name}`)
  }
  for (const page of tabs) {
    await page.waitForFunction(`globalThis.kept.texts.length >= ${texts.length}`, undefined, { timeout: 30_000 }).catch(() => undefined)
    assert.deepEqual(await kept(page, ({ texts }) => texts), texts)
  }
  await context.close()
})

/** Conversations in a real browser: the released SDK's contract, our SDK over tabs, faults and long histories, and the chat. */

import assert from 'node:assert/strict'
import type { Server } from 'node:http'
import { after, afterEach, before, test } from 'node:test'

import { buildSync } from 'esbuild'
import type { Browser, BrowserContext, Page } from 'playwright-core'

import type { ConversationClient, Convo, Message, Status } from '../../conversation/index.js'
import { accessible, APP, browser as launch, clean, pages, ROOT, screenshot, Wire, World } from './harness.js'

let [browser, files]: [Browser, Server] = [] as never
let [origin, world]: [string, World] = [] as never
const bundled = (name: string) => buildSync({
  entryPoints: [`${ROOT}test/browser/${name}`], bundle: true, format: 'iife', write: false, target: 'es2022',
  define: { 'process.env.NODE_ENV': '"development"' },
}).outputFiles[0]!.text
const stockScript = bundled('stock.ts')

before(async () => {
  ;[files, origin] = await pages()
  world = new World(origin, 'conversations')
  await world.serve()
  browser = await launch()
})

afterEach(async () => {
  await world.killAgent()
  await Promise.all(browser.contexts().map((context) => context.close()))
})

after(async () => {
  await browser.close()
  await world.end()
  files.close()
  clean()
})

/** What the scripts put on a page. */
type Kept = { texts: string[]; tokens: string[]; statuses: Status[]; errors: string[]; readies: number; convo: Convo; client: ConversationClient }
type Globals = { Trunkline: typeof import('../../conversation/index.js'); kept: Kept; stock: typeof import('./stock.js')['stock'] }

async function blank(context: BrowserContext): Promise<Page> {
  const page = await context.newPage()
  await page.goto(`${origin}/nothing`)
  return page
}

/** A page of the app with our SDK, on a conversation of a user. */
async function open(context: BrowserContext, user: string, convoId?: string, seconds = 900): Promise<Page> {
  const page = await blank(context)
  await page.addScriptTag({ path: `${ROOT}dist/trunkline.js` })
  await page.evaluate(
    async ([base, user, convoId, seconds, agentId]) => {
      const { Trunkline } = globalThis as unknown as Globals
      const fetchJwt = async () => (await fetch(`/token?user=${user}&seconds=${seconds}`)).text()
      const client = new Trunkline.ConversationClient({ agentId: agentId!, fetchJwt, baseUrl: base! })
      const convo = await client.openConvo({ convoId: convoId ?? (await client.startSession()).convoId })
      const kept: Kept = { texts: [], tokens: [], statuses: [], errors: [], readies: 0, convo, client }
      convo.on('message', ({ message }) => kept.texts.push(message.content))
      convo.on('token', ({ text, done }) => done || kept.tokens.push(text))
      convo.on('status', (status) => kept.statuses.push(status))
      convo.on('error', ({ phase, error }) => kept.errors.push(`${phase} ${error.message}`))
      convo.on('ready', () => (kept.readies += 1))
      Object.assign(globalThis, { kept })
    },
    [`http://${world.http}`, user, convoId, String(seconds), APP.agentId] as const,
  )
  return page
}

function kept<T>(page: Page, get: (kept: Kept) => T): Promise<T> {
  return page.evaluate(`(${get.toString()})(globalThis.kept)`) as Promise<T>
}

async function until<T>(page: Page, what: string, get: (kept: Kept) => T, timeout = 20_000): Promise<void> {
  await page.waitForFunction(`(${get.toString()})(globalThis.kept)`, undefined, { timeout }).catch(async (error: Error) => {
    const state = await kept(page, ({ texts, statuses, errors }) => ({ texts: texts.slice(-5), statuses, errors }))
    assert.fail(`${what}: ${error.message} ${JSON.stringify(state)}`)
  })
}

const say = (page: Page, text: string) =>
  page.evaluate((text) => (globalThis as unknown as Globals).kept.convo.send(text), text)

const live = (page: Page) => until(page, 'live', ({ convo }) => convo.status === 'live')
const idOf = (page: Page) => kept(page, ({ convo }) => convo.convoId)

test('the contract of the released SDK', { timeout: 60_000 }, async () => {
  world.answer('--fast')
  const context = await browser.newContext()
  const page = await blank(context)
  await page.addScriptTag({ content: stockScript })
  const base = `http://${world.http}`
  page.on('console', (message) => console.log(message.text()))
  await page.evaluate(async (base) => {
    Object.assign(globalThis, { one: await (globalThis as unknown as Globals).stock(base, '/token?user=stock') })
  }, base)
  type One = { one: Awaited<ReturnType<Globals['stock']>> }
  const one = <T>(get: (one: One['one']) => T) => page.evaluate(`(${get.toString()})(globalThis.one)`) as Promise<T>
  const wait = (get: (one: One['one']) => boolean) => page.waitForFunction(`(${get.toString()})(globalThis.one)`)
  await wait(({ events }) => events.some(({ name }) => name === 'ready'))
  assert.equal(((await one(({ send }) => send('hello'))) as { status: number }).status, 200)
  await wait(({ events }) => events.some(({ name }) => name === 'turn_done'))
  const names = await one(({ events }) => events.map(({ name }) => name).filter((name) => name !== 'ping'))
  assert.deepEqual(names, ['ready', 'message', 'typing', 'typing', 'message', 'turn_done'], 'no pieces for who does not ask')
  const messages = await one(({ messages }) => messages)
  assert.equal(messages[0], 'hello')
  assert.match(messages[1]!, /^You said: “hello”/)
  // A server that is killed is found again, and nothing is missing or doubled.
  await world.killServer()
  await world.serve()
  await wait(({ events }) => events.filter(({ name }) => name === 'ready').length === 2)
  await one(({ send }) => send('again'))
  await wait(({ messages }) => messages.length === 4)
  // The third stream of this user is refused, and the page may read for how long.
  const third = await page.evaluate(async (base) => {
    const { stock, one } = globalThis as unknown as Globals & One
    const two = await stock(base, '/token?user=stock', one.convo)
    while (two.status() !== 200) await new Promise((resolve) => setTimeout(resolve, 10))
    const refused = await one.ask(`/agent_convos/${one.convo}/events`)
    two.stop()
    return { status: refused.status, retryAfter: refused.retryAfter }
  }, base)
  assert.deepEqual(third, { status: 429, retryAfter: '30' })
  await world.killAgent()
  await context.close()
})

test('a page of a foreign origin gets nothing', async () => {
  const page = await browser.newPage()
  await page.goto(`${origin.replace('127.0.0.1', 'localhost')}/nothing`)
  const refused = await page.evaluate(async (base) => {
    const token = await (await fetch('/token')).text()
    const ask = { method: 'POST', headers: { authorization: `Bearer ${token}` } }
    return fetch(`${base}/api/v2/sessions`, ask).then(() => 'answered', (error: Error) => error.name)
  }, `http://${world.http}`)
  assert.equal(refused, 'TypeError')
  await page.close()
})

test('what Chromium says again because its connection broke is said once', { timeout: 60_000 }, async () => {
  let posts = 0
  const wire = await new Wire(
    () => world.http,
    (piece) => {
      if (!piece.includes('stream_message') || !piece.includes('POST /')) return 'goes on'
      posts += 1
      return posts % 2 === 1 ? 'breaks before the answer' : 'goes on'
    },
  ).open()
  const page = await browser.newPage()
  await page.goto(`${origin}/nothing`)
  const said = await page.evaluate(
    async (base) => {
      const token = await (await fetch('/token?user=again')).text()
      const headers = { authorization: `Bearer ${token}`, 'content-type': 'application/json' }
      const begun = await fetch(`${base}/sessions`, { method: 'POST', headers })
      const { convo_id } = (await begun.json()) as { convo_id: string }
      const ids: string[] = []
      for (const text of ['one', 'two', 'three']) {
        const sent = await fetch(`${base}/agent_convos/${convo_id}/stream_message`, { method: 'POST', headers, body: JSON.stringify({ text }) })
        ids.push(((await sent.json()) as { message_id: string }).message_id)
      }
      const shown = await fetch(`${base}/agent_convos/${convo_id}`, { headers })
      const { messages } = (await shown.json()) as { messages: { id: string; from: string; content: string }[] }
      const own = messages.filter(({ from }) => from === 'appuser')
      return { ids, own: own.map(({ id, content }) => ({ id, content })) }
    },
    `http://${wire.address}/api/v2`,
  )
  assert.equal(posts, 6, 'Chromium says each again')
  assert.deepEqual(said.own.map(({ content }) => content), ['one', 'two', 'three'])
  assert.deepEqual(said.own.map(({ id }) => id), said.ids)
  await page.close()
  wire.close()
})

test('tokens come as they are said, and tabs share one stream', { timeout: 90_000 }, async () => {
  world.answer()
  const context = await browser.newContext()
  const first = await open(context, 'tabs')
  await live(first)
  const convo = await idOf(first)
  const [second, third] = [await open(context, 'tabs', convo), await open(context, 'tabs', convo)]
  await Promise.all([live(second), live(third)])
  await say(second, 'hello')
  for (const page of [first, second, third]) {
    await until(page, 'the answer', ({ texts }) => texts.length === 2)
    const tokens = await kept(page, ({ tokens }) => tokens)
    assert.ok(tokens.length > 20, `${tokens.length} pieces`)
    assert.ok(tokens.every((text, n) => n === 0 || text.startsWith(tokens[n - 1]!)), 'each goes on from the last')
  }
  const leaders = async () => {
    const all = await Promise.all(context.pages().map((page) => kept(page, ({ convo }) => convo.isLeader)))
    return all.filter(Boolean).length
  }
  assert.equal(await leaders(), 1)
  assert.equal(await kept(first, ({ convo }) => convo.isLeader), true)
  // Whoever has the stream goes, and another one has it soon.
  const begun = Date.now()
  await first.close()
  while ((await leaders()) !== 1) assert.ok(Date.now() - begun < 4000, 'nobody takes over')
  await until(second, 'live', ({ convo }) => convo.status === 'live')
  await world.killAgent()
  await say(third, 'still there?')
  for (const page of [second, third]) await until(page, 'what was said', ({ texts }) => texts.at(-1) === 'still there?')
  // A reload shows all of it again, once.
  await third.close()
  const again = await open(context, 'tabs', convo)
  await until(again, 'the history', ({ texts }) => texts.length === 3)
  await context.close()
})

test('what is said without a network, or a server, is said later and once', { timeout: 90_000 }, async () => {
  const context = await browser.newContext()
  const page = await open(context, 'away')
  await live(page)
  await say(page, 'one')
  await context.setOffline(true)
  await until(page, 'offline', ({ convo }) => convo.status === 'offline')
  const two = say(page, 'two')
  await until(page, 'what waits', ({ convo }) => convo.pending.length === 1)
  await context.setOffline(false)
  await two
  await live(page)
  await world.killServer()
  const three = say(page, 'three')
  await until(page, 'the loss', ({ convo }) => convo.status === 'waiting')
  await world.serve()
  await three
  await live(page)
  await until(page, 'all of it', ({ texts }) => texts.length === 3)
  // What waits outlives its page.
  await world.killServer()
  void say(page, 'four').catch(() => undefined)
  await until(page, 'what waits', ({ convo }) => convo.pending.length === 1)
  const convo = await idOf(page)
  await page.close()
  await world.serve()
  const next = await open(context, 'away', convo)
  await until(next, 'all of it', ({ texts }) => texts.length === 4)
  assert.deepEqual(await kept(next, ({ texts }) => texts), ['one', 'two', 'three', 'four'])
  await context.close()
})

test('a stream goes on when its token ends', { timeout: 60_000 }, async () => {
  const context = await browser.newContext()
  const page = await open(context, 'short', undefined, 3)
  await until(page, 'a third token', ({ readies }) => readies >= 3)
  await say(page, 'hello')
  await until(page, 'what was said', ({ texts }) => texts.length === 1)
  assert.deepEqual(await kept(page, ({ errors }) => errors), [])
  await context.close()
})

test('what a user attaches is shown, and what it may not is refused', { timeout: 60_000 }, async () => {
  const context = await browser.newContext()
  const page = await open(context, 'files')
  await live(page)
  const sent = await page.evaluate(async () => {
    const { convo } = (globalThis as unknown as Globals).kept
    const messages: Message[] = []
    convo.on('message', ({ message }) => messages.push(message))
    const draft = await convo.upload([new File(['hello'], 'a b.txt', { type: 'text/plain' })])
    await convo.send('look', draft)
    while (messages.length === 0) await new Promise((resolve) => setTimeout(resolve, 10))
    const file = messages[0]!.files[0]!
    const refused = await convo.upload([new File(['MZ'], 'a.exe')]).catch((error: { status: number }) => error.status)
    return { name: file.filename, content: await (await fetch(file.url)).text(), refused }
  })
  assert.deepEqual(sent, { name: 'a b.txt', content: 'hello', refused: 415 })
  await context.close()
})

test('the chat is used by keyboard, read aloud, and looks well', { timeout: 90_000 }, async () => {
  world.answer('--fast')
  const context = await browser.newContext({ colorScheme: 'light', viewport: { width: 420, height: 640 } })
  const page = await blank(context)
  await page.addScriptTag({ path: `${ROOT}dist/trunkline.js` })
  await page.evaluate(([base, agentId]) => {
    document.body.innerHTML = `<main><h1>A page</h1><trunkline-chat style="height: 600px" base-url="${base}" agent-id="${agentId}" token-url="/token?user=chat"></trunkline-chat></main>`
  }, [`http://${world.http}`, APP.agentId] as const)
  await page.getByRole('log', { name: 'Chat' }).waitFor()
  const log = page.getByRole('log')
  const text = page.getByRole('textbox', { name: 'Message' })
  await text.waitFor()
  await text.fill('Hello from the keyboard')
  await text.press('Shift+Enter')
  await page.keyboard.type('in two lines')
  await text.press('Enter')
  // Not what is on its way, which is replaced by what was said.
  await log.locator('.message[data-from=appuser]:not([data-pending])').getByText('Hello from the keyboard\nin two lines').waitFor()
  await log.getByText('You said: “Hello from the keyboard').waitFor()
  assert.equal(await text.inputValue(), '')
  assert.equal(await log.getAttribute('aria-live'), 'polite')
  await accessible(page)
  await screenshot(page, 'chat-light')
  await page.emulateMedia({ colorScheme: 'dark' })
  await accessible(page)
  await screenshot(page, 'chat-dark')
  await page.emulateMedia({ forcedColors: 'active' })
  await screenshot(page, 'chat-forced-colors')
  await page.emulateMedia({ forcedColors: 'none' })
  await page.setViewportSize({ width: 390, height: 700 })
  await screenshot(page, 'chat-390')
  // From right to left, in another language.
  await page.evaluate(() => {
    document.documentElement.dir = 'rtl'
    Object.assign(document.querySelector('trunkline-chat')!, { strings: { title: 'محادثة', send: 'إرسال', placeholder: 'اكتب رسالة…', you: 'أنت' } })
  })
  await page.getByRole('button', { name: 'إرسال' }).waitFor()
  await text.fill('مرحبا')
  await text.press('Enter')
  const said = log.locator('.message[data-from=appuser]:not([data-pending])', { hasText: 'مرحبا' })
  await said.waitFor()
  const own = await said.boundingBox()
  const frame = await log.boundingBox()
  assert.ok(own && frame && own.x - frame.x < frame.width / 2, "one's own words are at the end of the line, which is on the left")
  await screenshot(page, 'chat-rtl')
  // It is the same conversation after a reload.
  await page.reload()
  await page.addScriptTag({ path: `${ROOT}dist/trunkline.js` })
  await page.evaluate(([base, agentId]) => {
    document.body.innerHTML = `<trunkline-chat base-url="${base}" agent-id="${agentId}" token-url="/token?user=chat"></trunkline-chat>`
  }, [`http://${world.http}`, APP.agentId] as const)
  await page.getByRole('log').getByText('مرحبا', { exact: true }).waitFor()
  // Everything is reached by the keyboard alone.
  await page.getByRole('textbox').focus()
  const reached = []
  for (let n = 0; n < 3; n += 1) {
    reached.push(await page.evaluate(() => document.querySelector('trunkline-chat')!.shadowRoot!.activeElement?.tagName))
    await page.keyboard.press(n === 0 ? 'Tab' : 'Shift+Tab')
  }
  assert.deepEqual(reached, ['TEXTAREA', 'BUTTON', 'TEXTAREA'])
  await world.killAgent()
  await context.close()
})

/** A page with a chat and a main landmark, as pages are. */
async function chat(context: BrowserContext, user: string, attributes = ''): Promise<Page> {
  const page = await blank(context)
  await page.addScriptTag({ path: `${ROOT}dist/trunkline.js` })
  await page.evaluate(([base, agentId, user, attributes]) => {
    document.body.innerHTML = `<main><h1>A page</h1><trunkline-chat style="height: 500px" base-url="${base}" agent-id="${agentId}" token-url="/token?user=${user}" ${attributes}></trunkline-chat></main>`
  }, [`http://${world.http}`, APP.agentId, user, attributes] as const)
  return page
}

test('what agents write is shown as it is meant, and nothing of it is a program', { timeout: 60_000 }, async () => {
  world.answer('--fast')
  const page = await chat(await browser.newContext(), 'markdown')
  const text = page.getByRole('textbox', { name: 'Message' })
  await page.getByText('Write something to begin.').waitFor()
  await text.fill('see **this** and `x < y` at https://example.org/a?b=c. [not](javascript:alert(1)) <img src=x onerror=alert(1)>')
  await text.press('Enter')
  const answer = page.locator('.message[data-from=ai_agent]:not([data-partial]) .bubble')
  await answer.locator('strong', { hasText: 'this' }).waitFor()
  assert.equal(await answer.locator('code').textContent(), 'x < y')
  assert.equal(await answer.locator('a').getAttribute('href'), 'https://example.org/a?b=c')
  assert.equal(await answer.locator('a').count(), 1)
  assert.equal(await answer.locator('img').count(), 0)
  const own = page.locator('.message[data-from=appuser]:not([data-pending]) .bubble')
  assert.ok((await own.textContent())?.startsWith('see **this** and `x < y`'), 'what is written stays as it was')
  await accessible(page)
  await screenshot(page, 'chat-markdown')
})

test('the time to show a text grows with the text and not with its square', async () => {
  const page = await blank(await browser.newContext())
  const slow = await page.evaluate(async () => {
    const { markdown } = (await import('/dist/chat/markdown.js' as string)) as { markdown: (text: string) => Node[] }
    const hostile: ((size: number) => string)[] = [
      (size) => `# ${' '.repeat(size)}\u2028x`, (size) => `- ${' '.repeat(size)}\u2028x`, (size) => `\`\`\`${' '.repeat(size)}!`,
      (size) => `#${'#'.repeat(size)}`, (size) => `# a${'#'.repeat(size)}b`, (size) => `# a${' #'.repeat(size / 2)}b`,
    ]
    for (const piece of ['*', '**', '_', '`', '~~', '[', '[a](', 'http://', '*a **b ', '> ', '- ', '``` ', '#  # ']) {
      hostile.push((size) => piece.repeat(size / piece.length))
      hostile.push((size) => `${piece}\n`.repeat(size / (piece.length + 1)))
      hostile.push((size) => `${piece.repeat(200)}\n`.repeat(Math.max(1, size / (piece.length * 200 + 1))))
    }
    /** The best of three, in milliseconds: what else the machine does only makes it longer. */
    const time = (text: string) => Math.min(...[1, 2, 3].map(() => {
      const begun = performance.now()
      markdown(text)
      return performance.now() - begun
    }))
    const measured = hostile.map((make) => ({ text: make(16).slice(0, 12), half: time(make(16_000)), whole: time(make(32_000)) }))
    return measured.filter(({ half, whole }) => whole > 100 && whole > 3 * half)
  })
  assert.deepEqual(slow, [])
})

test('what was said last stays in sight, and what is new is told', { timeout: 60_000 }, async () => {
  world.answer('--fast')
  const page = await chat(await browser.newContext({ viewport: { width: 390, height: 700 } }), 'scrolls')
  const text = page.getByRole('textbox', { name: 'Message' })
  const answers = page.locator('.message[data-from=ai_agent]:not([data-partial])')
  for (let n = 1; n <= 8; n += 1) {
    await text.fill(`message ${n}`)
    await text.press('Enter')
    await page.waitForFunction((count) => document.querySelector('trunkline-chat')!.shadowRoot!.querySelectorAll('.message[data-from=ai_agent]:not([data-partial])').length >= count, n)
  }
  const isInSight = () => page.evaluate(() => {
    const log = document.querySelector('trunkline-chat')!.shadowRoot!.querySelector('.log')!
    return log.scrollHeight - log.scrollTop - log.clientHeight < 5
  })
  assert.ok(await isInSight())
  await text.fill('one\ntwo\nthree\nfour\nfive')
  await page.waitForTimeout(100)
  assert.ok(await isInSight(), 'also when the composer grows')
  await text.fill('')
  // Who reads what was before is not taken away from it.
  await page.getByRole('log').evaluate((log) => (log.scrollTop = 0))
  const jump = page.getByRole('button', { name: 'New messages' })
  assert.ok(await jump.isHidden())
  await world.ask('scrolls', `/agent_convos/${await page.evaluate(() => (document.querySelector('trunkline-chat') as unknown as { convo: Convo }).convo.convoId)}/stream_message`, { text: 'from elsewhere' })
  await jump.waitFor()
  assert.equal(await page.getByRole('log').evaluate((log) => log.scrollTop), 0)
  await screenshot(page, 'chat-new-messages')
  await jump.click()
  assert.ok(await isInSight())
  assert.ok(await jump.isHidden())
  assert.ok((await answers.count()) >= 8)
})

test('a chat that cannot go on says what can be done', { timeout: 60_000 }, async () => {
  world.answer('--fast')
  const context = await browser.newContext()
  // A conversation that is not there.
  const lost = await chat(context, 'lost', 'convo-id="11111111-1111-4111-8111-111111111111"')
  await lost.getByText('This conversation is not there any more.').waitFor()
  assert.ok(await lost.getByRole('textbox').isHidden())
  await accessible(lost)
  await lost.getByRole('button', { name: 'Start a new one' }).click()
  await lost.getByRole('textbox').waitFor()
  assert.equal(await lost.evaluate(() => document.querySelector('trunkline-chat')!.shadowRoot!.activeElement?.tagName), 'TEXTAREA')
  // A server that is away for a while: what it says of that goes with it.
  const away = await chat(context, 'away-chat')
  await away.getByText('Write something to begin.').waitFor()
  await world.killServer()
  await away.getByText('The connection was lost. Trying again…').waitFor()
  await away.getByRole('textbox').fill('meanwhile')
  await away.getByRole('textbox').press('Enter')
  await away.getByText('Waits for the connection').waitFor()
  await screenshot(away, 'chat-away')
  await world.serve()
  await away.locator('.message[data-from=appuser]:not([data-pending])', { hasText: 'meanwhile' }).waitFor()
  assert.ok(await away.getByRole('alert').isHidden())
  assert.equal(await away.locator('.status').textContent(), '')
})

test('a React component shows a conversation for as long as it is there', { timeout: 60_000 }, async () => {
  world.answer()
  const context = await browser.newContext()
  const page = await blank(context)
  const { convo_id: convoId } = await world.ask<{ convo_id: string }>('react', '/sessions', {})
  await page.addScriptTag({ content: bundled('react-page.ts') })
  await page.evaluate((props) => (globalThis as unknown as { render: (props: object) => void }).render(props), {
    base: `http://${world.http}`, agentId: APP.agentId, convoId,
  })
  await page.locator('#status', { hasText: 'live' }).waitFor()
  await page.getByRole('button', { name: 'Say' }).click()
  await page.locator('#partial', { hasText: 'You said' }).waitFor()
  await page.locator('li.ai_agent', { hasText: 'You said: “message 0”' }).waitFor()
  assert.equal(await page.locator('#partial').textContent(), '')
  await page.getByRole('button', { name: 'Hide' }).click()
  await page.getByRole('button', { name: 'Show' }).click()
  await page.locator('li.ai_agent').waitFor()
  assert.equal(await page.locator('li').count(), 2)
  await context.close()
})

// The last one: no agent answers all of these.
test('ten thousand messages are shown in their order', { timeout: 120_000 }, async () => {
  const context = await browser.newContext()
  const page = await open(context, 'long')
  const convo = await idOf(page)
  await page.close()
  for (let from = 0; from < 10_000; from += 1) {
    // Some at a time, each behind the last.
    if (from % 100 === 0) await Promise.all(Array.from({ length: 100 }, (_, n) => world.ask('long', `/agent_convos/${convo}/stream_message`, { text: String(from + n) })))
  }
  const begun = Date.now()
  const again = await open(context, 'long', convo)
  await until(again, 'the history', ({ texts }) => texts.length === 10_000, 30_000)
  console.log(`10,000 messages were shown after ${Date.now() - begun} ms`)
  const texts = await kept(again, ({ texts }) => texts)
  assert.equal(new Set(texts).size, 10_000)
  const { messages } = await world.ask<{ messages: Message[] }>('long', `/agent_convos/${convo}`)
  assert.deepEqual(texts, messages.map(({ content }) => content))
  await context.close()
})

/** `trunkline demo` as a newcomer sees it: write, watch, break things, and nothing is lost. */

import assert from 'node:assert/strict'
import type { ChildProcess } from 'node:child_process'
import { once } from 'node:events'
import { after, before, test } from 'node:test'

import type { Browser, Page } from 'playwright-core'

import { accessible, browser as launch, clean, screenshot, start } from './harness.js'

let [browser, demo, address]: [Browser, ChildProcess, string] = [] as never

before(async () => {
  const [child, ready] = await start(['demo', '--listen', '127.0.0.1:0'], /page=(\S+)/)
  ;[demo, address] = [child, ready[1]!]
  browser = await launch()
})

after(async () => {
  await browser.close()
  demo.kill('SIGTERM')
  await once(demo, 'exit')
  clean()
})

const text = (page: Page) => page.getByRole('textbox', { name: 'Message' })
const said = (page: Page, from: string) => page.locator(`.message[data-from=${from}]:not([data-partial]):not([data-pending]) .bubble`)

test('a newcomer chats, watches, and breaks things', { timeout: 120_000 }, async () => {
  const context = await browser.newContext({ viewport: { width: 1200, height: 900 } })
  const page = await context.newPage()
  await page.goto(address)
  await said(page, 'ai_agent').getByText('Hello! Ask me anything').waitFor()
  for (const name of ['server', 'agent', 'sandbox']) await page.getByText(`${name} is running`).waitFor()
  await text(page).fill('build me a small page about rivers')
  await text(page).press('Enter')
  // What it says comes as it is said, and the sandbox works beside it.
  await page.locator('.message[data-partial]').waitFor()
  await page.locator('#artifacts li').nth(2).waitFor()
  await screenshot(page, 'demo-streaming')
  const tab = await context.newPage()
  await tab.goto(address)
  await said(tab, 'appuser').getByText('build me a small page about rivers').waitFor()
  for (const each of [page, tab]) await said(each, 'ai_agent').getByText('You said: “build me a small page').waitFor()
  await page.locator('#artifacts').getByText('words.txt').first().waitFor()

  // The agent is killed in the middle of a sentence, and begins it anew.
  await text(page).fill('and one about lakes')
  await text(page).press('Enter')
  await page.locator('.message[data-partial]').waitFor()
  await page.getByRole('button', { name: 'Stop the agent' }).click()
  await page.locator('#is-agent', { hasText: 'agent is away' }).waitFor()
  await page.getByText('The agent is away. What you write waits for it').waitFor()
  await page.locator('#is-agent', { hasText: 'agent is running' }).waitFor()
  for (const each of [page, tab]) await said(each, 'ai_agent').getByText('You said: “and one about lakes').waitFor()

  // The server is killed while it speaks, and what is written meanwhile is said afterwards.
  await text(page).fill('now the sea')
  await text(page).press('Enter')
  await page.locator('.message[data-partial]').waitFor()
  await page.getByRole('button', { name: 'Restart the server' }).click()
  await text(tab).fill('written while it was away')
  await text(tab).press('Enter')
  await page.getByText('the server is back after').waitFor()
  for (const each of [page, tab]) {
    await said(each, 'ai_agent').getByText('You said: “now the sea').waitFor()
    await said(each, 'ai_agent').getByText('You said: “written while it was away').waitFor({ timeout: 60_000 })
  }
  const shown = await said(page, 'appuser').allTextContents()
  assert.deepEqual(shown, ['build me a small page about rivers', 'and one about lakes', 'now the sea', 'written while it was away'])
  assert.equal((await said(page, 'ai_agent').allTextContents()).length, 5, 'each answered once')
  assert.deepEqual(await said(tab, 'ai_agent').allTextContents(), await said(page, 'ai_agent').allTextContents())
  await screenshot(page, 'demo-after')
  await context.close()
})

test('it is used on any screen, in any colours, by keyboard', { timeout: 60_000 }, async () => {
  for (const [name, options] of Object.entries({
    light: { viewport: { width: 1200, height: 800 } },
    dark: { viewport: { width: 1200, height: 800 }, colorScheme: 'dark' as const },
    forced: { viewport: { width: 1200, height: 800 }, forcedColors: 'active' as const },
    low: { viewport: { width: 1100, height: 560 } },
    phone: { viewport: { width: 390, height: 844 } },
  })) {
    const context = await browser.newContext(options)
    const page = await context.newPage()
    await page.goto(address)
    await said(page, 'ai_agent').first().waitFor()
    if (name !== 'forced') await accessible(page)
    const send = await page.getByRole('button', { name: 'Send' }).boundingBox()
    assert.ok(send && (name === 'phone' || send.y + send.height <= options.viewport.height), `${name}: Send is in sight`)
    assert.ok(await page.evaluate(() => document.documentElement.scrollWidth <= innerWidth), `${name}: nothing is beside the page`)
    await page.locator('#artifacts').focus()
    assert.equal(await page.evaluate(() => document.activeElement?.id), 'artifacts')
    await screenshot(page, `demo-${name}`)
    await context.close()
  }
})

test('other pages do not break it', async () => {
  const refused = await fetch(`${address}/kill-agent`, { method: 'POST', headers: { origin: 'https://evil.example.org' } })
  assert.equal(refused.status, 403)
})

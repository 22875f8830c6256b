/**
 * What agents write, as elements: paragraphs, lists, quotations, code, emphasis and links. A part of Markdown that is as small as the rest
 * of the chat. Elements are made, never parsed from HTML, so that what is said can be nothing else.
 */

/** Longer text, longer lines, and what is within so much else, are shown as they are: what is said decides how long this takes. */
const TEXT_MAX = 32_768
const LINE_MAX = 2_048
const DEPTH_MAX = 4

// Each is found or not in time that grows with the line: nothing that repeats is followed by what fits it, too.
const FENCE = /^ {0,3}(`{3,}|~{3,}) *(?:[\w+#.-]+ *)?$/
const ITEM = /^\s*(?:[-*+•]|(\d{1,9})[.)])\s+(\S.*)$/
const HEADING = /^#{1,6}\s+(\S.*)$/
const QUOTE = /^\s{0,3}>\s?(.*)$/
const ADDRESS = /https?:\/\/[^\s<>"'\])]*[^\s<>"'\]).,;:!?]/g
const INLINE = new RegExp(
  '(`+)(.+?)\\1(?!`)|(\\*\\*|__)(?=\\S)(.+?)\\3|(?<![\\w*])([*_])(?=[^\\s*_])(.+?)\\5(?![\\w*])|~~(.+?)~~' +
    `|\\[([^\\]]+)\\]\\(([^\\s)]+)\\)|${ADDRESS.source}`,
  'g',
)

/** A heading's text, without the marks and spaces that may end it. */
function withoutEnd(line: string): string {
  let end = line.length
  while (end > 0 && '# \t'.includes(line[end - 1]!)) end -= 1
  return line.slice(0, end)
}

function made<K extends keyof HTMLElementTagNameMap>(name: K, content: Node[]): HTMLElementTagNameMap[K] {
  const element = document.createElement(name)
  element.append(...content)
  return element
}

function text(content: string): Text {
  return document.createTextNode(content)
}

/** A link to a page or an address; nothing else is followed from a chat. */
function link(href: string, content: Node[]): Node {
  if (!/^(https?:\/\/|mailto:)/i.test(href)) return made('span', content)
  return Object.assign(made('a', content), { href, target: '_blank', rel: 'noopener noreferrer' })
}

function inline(line: string, depth = 0): Node[] {
  if (line.length > LINE_MAX || depth > DEPTH_MAX) return [text(line)]
  const all: Node[] = []
  let end = 0
  for (const found of line.matchAll(INLINE)) {
    const [whole, , code, , strong, , emphasis, struck, label, href] = found
    if (found.index > end) all.push(text(line.slice(end, found.index)))
    end = found.index + whole.length
    if (code !== undefined) all.push(made('code', [text(code)]))
    else if (strong !== undefined) all.push(made('strong', inline(strong, depth + 1)))
    else if (emphasis !== undefined) all.push(made('em', inline(emphasis, depth + 1)))
    else if (struck !== undefined) all.push(made('s', inline(struck, depth + 1)))
    else if (label !== undefined && href !== undefined) all.push(link(href, [text(label)]))
    else all.push(link(whole, [text(whole)]))
  }
  if (end < line.length) all.push(text(line.slice(end)))
  return all
}

/** Text with its links and nothing else: what people write, they write as it is meant. */
export function linked(content: string): Node[] {
  const all: Node[] = []
  let end = 0
  for (const found of content.length > TEXT_MAX ? [] : content.matchAll(ADDRESS)) {
    all.push(text(content.slice(end, found.index)), link(found[0], [text(found[0])]))
    end = found.index + found[0].length
  }
  all.push(text(content.slice(end)))
  return all
}

/** Each line on one of its own, as it was said. */
function paragraph(lines: string[]): Node {
  return made('p', lines.flatMap((line, n) => [...(n > 0 ? [document.createElement('br')] : []), ...inline(line)]))
}

/** The elements of a text. */
export function markdown(content: string): Node[] {
  if (content.length > TEXT_MAX) return [made('p', [text(content)])]
  const lines = content.split(/\r?\n/)
  const all: Node[] = []
  for (let at = 0; at < lines.length; ) {
    const begun = at
    const take = (is: (line: string) => boolean): string[] => {
      while (at < lines.length && is(lines[at]!)) at += 1
      return lines.slice(begun, at)
    }
    const line = lines[at]!
    const fence = FENCE.exec(line)
    const item = ITEM.exec(line)
    const heading = HEADING.exec(line)
    if (fence) {
      at += 1
      const code = take((other) => !(other.trim().startsWith(fence[1]!) && FENCE.test(other))).slice(1)
      // One that has no end goes on to the end.
      at += 1
      all.push(made('pre', [made('code', [text(code.join('\n'))])]))
    } else if (item) {
      const items = take((other) => ITEM.test(other) || (/^\s{2,}\S/.test(other) && other !== line))
      const list = items.reduce<string[][]>((before, other) => {
        const next = ITEM.exec(other)
        if (next) before.push([next[2]!])
        else before.at(-1)?.push(other.trim())
        return before
      }, [])
      const element = made(item[1] === undefined ? 'ul' : 'ol', list.map((parts) => made('li', inline(parts.join(' ')))))
      if (element instanceof HTMLOListElement) element.start = Number(item[1])
      all.push(element)
    } else if (heading) {
      at += 1
      all.push(made('p', [made('strong', inline(withoutEnd(heading[1]!)))]))
    } else if (QUOTE.test(line)) {
      const quoted = take((other) => QUOTE.test(other)).map((other) => QUOTE.exec(other)![1]!)
      all.push(made('blockquote', [paragraph(quoted)]))
    } else if (line.trim() === '') {
      at += 1
    } else {
      all.push(paragraph(take((other) => other.trim() !== '' && ![FENCE, ITEM, HEADING, QUOTE].some((begins) => begins.test(other)))))
    }
  }
  return all
}

/** What carries frames: anything with two ends that keeps their order. */

export type AgentSocketTransport = {
  send(data: string): void
  close(code?: number, reason?: string): void
  onMessage(cb: (data: string | ArrayBuffer | Uint8Array) => void): void
  onClose(cb: (event?: unknown) => void): void
  onError?(cb: (error: unknown) => void): void
}

/** Two ends in one program: what one sends, the other gets a moment later. */
export class InMemoryTransport implements AgentSocketTransport {
  #peer: InMemoryTransport | undefined
  #isOpen = true
  readonly #messages: ((data: string) => void)[] = []
  readonly #closes: ((event?: unknown) => void)[] = []

  static pair(): [InMemoryTransport, InMemoryTransport] {
    const [one, other] = [new InMemoryTransport(), new InMemoryTransport()]
    one.#peer = other
    other.#peer = one
    return [one, other]
  }

  send(data: string): void {
    if (!this.#isOpen) throw new Error('the transport is closed')
    const peer = this.#peer
    queueMicrotask(() => {
      if (peer !== undefined && peer.#isOpen) peer.#messages.forEach((cb) => cb(data))
    })
  }

  close(code = 1000, reason = ''): void {
    for (const end of [this, this.#peer]) {
      if (end === undefined || !end.#isOpen) continue
      end.#isOpen = false
      queueMicrotask(() => end.#closes.forEach((cb) => cb({ code, reason })))
    }
  }

  onMessage(cb: (data: string | ArrayBuffer | Uint8Array) => void): void {
    this.#messages.push(cb)
  }

  onClose(cb: (event?: unknown) => void): void {
    this.#closes.push(cb)
  }
}

/** What of a WebSocket is needed: a browser's, or that of a library. */
export type WebSocketLike = {
  readonly readyState: number
  binaryType?: string
  readonly bufferedAmount?: number
  send(data: string): void
  close(code?: number, reason?: string): void
  // Events of browsers and of libraries differ in type.
  addEventListener(type: 'open' | 'message' | 'close' | 'error', listener: (event: any) => void): void
}

/** What waits for a socket that takes too little, at most: then it is closed, and its peer comes back for what it missed. */
export const BUFFERED_BYTES_MAX = 16 * 1024 * 1024

/** Browsers' sockets take codes from 3000 on only: there the protocol's are 2,000 more. */
function close(socket: WebSocketLike, code?: number, reason?: string): void {
  try {
    socket.close(code, reason)
  } catch {
    socket.close(code === undefined ? undefined : code + 2000, reason)
  }
}

/** A WebSocket as a transport. What is sent before it is open waits. */
export function webSocketTransport(socket: WebSocketLike): AgentSocketTransport {
  const waiting: string[] = []
  if ('binaryType' in socket) socket.binaryType = 'arraybuffer'
  socket.addEventListener('open', () => waiting.splice(0).forEach((data) => socket.send(data)))
  return {
    send(data) {
      if (socket.readyState === 0) waiting.push(data)
      else if (socket.readyState === 1 && (socket.bufferedAmount ?? 0) > BUFFERED_BYTES_MAX) {
        close(socket, 1013, 'it takes too little')
        throw new Error('the socket takes too little')
      } else if (socket.readyState === 1) socket.send(data)
      else throw new Error('the socket is closed')
    },
    close: (code, reason) => close(socket, code, reason),
    onMessage: (cb) => socket.addEventListener('message', (event: { data: string | ArrayBuffer }) => cb(event.data)),
    onClose: (cb) => socket.addEventListener('close', (event: unknown) => cb(event)),
    onError: (cb) => socket.addEventListener('error', (event: unknown) => cb(event)),
  }
}

export function isTransport(value: AgentSocketTransport | WebSocketLike): value is AgentSocketTransport {
  return 'onMessage' in value
}

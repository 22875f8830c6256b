/** What a tab does about its stream, as a table: pure. What it decides on is told to it; what is to be done is answered. */

/** The published figures, in milliseconds. */
export const BACKOFF_MS = 250
export const BACKOFF_MAX_MS = 30_000
export const RETRY_AFTER_MAX_MS = 30_000
/** So often in a row a token is refused before it is given up. */
export const REFUSALS_MAX = 3

export type Name = 'idle' | 'electing' | 'following' | 'connecting' | 'open' | 'waiting' | 'paused' | 'offline' | 'closed'

export const NAMES: readonly Name[] = ['idle', 'electing', 'following', 'connecting', 'open', 'waiting', 'paused', 'offline', 'closed']

export type State = {
  readonly name: Name
  /** Attempts since the stream was open. */
  readonly attempts: number
  /** Refused tokens in a row. */
  readonly refusals: number
}

export type Event =
  | { type: 'start' }
  /** This tab has the stream, or another one has. */
  | { type: 'elected' }
  | { type: 'demoted' }
  /** The stream says that it is there. */
  | { type: 'ready' }
  /** The server ended it, and said why, or did not. */
  | { type: 'ended'; reason: string | undefined }
  /** The answer was no stream: its status, and how long to wait, if it said so. */
  | { type: 'refused'; status: number; retryAfterMs?: number }
  /** There was no answer, or no token. */
  | { type: 'failed' }
  /** The wait is over. */
  | { type: 'timer' }
  | { type: 'hidden' }
  | { type: 'visible' }
  | { type: 'online' }
  | { type: 'offline' }
  | { type: 'close' }

export const EVENTS: readonly Event['type'][] = [
  'start', 'elected', 'demoted', 'ready', 'ended', 'refused', 'failed', 'timer', 'hidden', 'visible', 'online', 'offline', 'close',
]

export type Action =
  /** Ask the other tabs who has the stream; give it up. */
  | { do: 'elect' }
  | { do: 'resign' }
  /** Open the stream, with a new token if the last one is no good. */
  | { do: 'open'; newToken: boolean }
  | { do: 'cut' }
  | { do: 'wait'; ms: number }
  /** It will not come back: tell the program. */
  | { do: 'fail'; status: number }

export const IDLE: State = { name: 'idle', attempts: 0, refusals: 0 }

/** Which of its states hold what has to be let go. */
const HAS_STREAM: ReadonlySet<Name> = new Set(['connecting', 'open'])
const HAS_PART: ReadonlySet<Name> = new Set(['electing', 'following', 'connecting', 'open', 'waiting'])

const opening = (state: State, newToken = false): [State, Action[]] => [{ ...state, name: 'connecting' }, [{ do: 'open', newToken }]]

function waiting(state: State, random: number, ms?: number): [State, Action[]] {
  const backoff = Math.min(BACKOFF_MS * 2 ** state.attempts, BACKOFF_MAX_MS)
  // Half of it is chance, so that many tabs do not come back at once.
  const wait = ms ?? Math.round(backoff / 2 + (backoff / 2) * random)
  return [{ ...state, name: 'waiting', attempts: state.attempts + 1 }, [{ do: 'wait', ms: wait }]]
}

function refused(state: State, event: Extract<Event, { type: 'refused' }>, random: number): [State, Action[]] {
  const { status } = event
  if (status === 401) {
    const refusals = state.refusals + 1
    if (refusals >= REFUSALS_MAX) return [{ ...state, name: 'closed', refusals }, [{ do: 'resign' }, { do: 'fail', status }]]
    return opening({ ...state, refusals }, true)
  }
  if (status === 429) return waiting(state, random, Math.min(event.retryAfterMs ?? BACKOFF_MAX_MS, RETRY_AFTER_MAX_MS))
  if (status === 408 || status >= 500) return waiting(state, random)
  return [{ ...state, name: 'closed' }, [{ do: 'resign' }, { do: 'fail', status }]]
}

/** Leaves the stream to others, for as long as something lasts. */
function leave(state: State, name: 'paused' | 'offline' | 'closed'): [State, Action[]] {
  const actions: Action[] = []
  if (HAS_STREAM.has(state.name)) actions.push({ do: 'cut' })
  if (HAS_PART.has(state.name)) actions.push({ do: 'resign' })
  return [{ ...state, name, attempts: 0 }, actions]
}

/** What follows from an event. `random` is from 0 to 1. What means nothing in a state changes nothing. */
export function step(state: State, event: Event, random = 1): [State, Action[]] {
  if (state.name === 'closed') return [state, []]
  switch (event.type) {
    case 'close':
      return leave(state, 'closed')
    case 'hidden':
      return state.name === 'paused' ? [state, []] : leave(state, 'paused')
    case 'offline':
      return HAS_PART.has(state.name) ? leave(state, 'offline') : [state, []]
    case 'start':
      return state.name === 'idle' ? [{ ...state, name: 'electing' }, [{ do: 'elect' }]] : [state, []]
    case 'visible':
      return state.name === 'paused' ? [{ ...state, name: 'electing' }, [{ do: 'elect' }]] : [state, []]
    case 'online':
      if (state.name === 'offline') return [{ ...state, name: 'electing' }, [{ do: 'elect' }]]
      // No need to wait any longer.
      return state.name === 'waiting' ? opening(state) : [state, []]
    case 'elected':
      return state.name === 'electing' || state.name === 'following' ? opening({ ...state, attempts: 0 }) : [state, []]
    case 'demoted':
      if (HAS_STREAM.has(state.name)) return [{ ...state, name: 'following' }, [{ do: 'cut' }]]
      return HAS_PART.has(state.name) ? [{ ...state, name: 'following' }, []] : [state, []]
    case 'timer':
      return state.name === 'waiting' ? opening(state) : [state, []]
    case 'ready':
      return state.name === 'connecting' ? [{ name: 'open', attempts: 0, refusals: 0 }, []] : [state, []]
    case 'refused':
      return state.name === 'connecting' ? refused(state, event, random) : [state, []]
    case 'failed':
      return HAS_STREAM.has(state.name) ? waiting(state, random) : [state, []]
    case 'ended':
      if (!HAS_STREAM.has(state.name)) return [state, []]
      if (state.name === 'open' && event.reason === 'auth_expiring') return opening(state, true)
      if (state.name === 'open' && (event.reason === 'server_cap' || event.reason === 'shutdown')) return opening(state)
      return waiting(state, random)
  }
}

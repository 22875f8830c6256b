/** When a connection is over, and whether it is made again: the same for everything that connects. */

/** Heartbeats of silence that end a connection. */
export const SILENT_BEATS = 3

/** Close codes after which nothing comes back: it would say the same again. */
export const FINAL: ReadonlySet<number> = new Set([1002, 1007, 1009])

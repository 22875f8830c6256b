/** Events in a database of SQLite: those who were away get them after a restart, too. */

import type { AgentSocketEnvelope } from './envelope.js'
import type { AgentSocketEventStore } from './store.js'

/** What of a database is needed: `DatabaseSync` of `node:sqlite`, `Database` of `better-sqlite3` and of `bun:sqlite` have it. */
export interface SqlDatabase {
  exec(sql: string): unknown
  prepare(sql: string): {
    run(...params: (string | number)[]): unknown
    all(...params: (string | number)[]): unknown[]
  }
}

const SCHEMA = `
  CREATE TABLE IF NOT EXISTS agent_socket_streams (client TEXT PRIMARY KEY, latest INTEGER NOT NULL) WITHOUT ROWID;
  CREATE TABLE IF NOT EXISTS agent_socket_events (client TEXT NOT NULL, seq INTEGER NOT NULL, event TEXT NOT NULL,
    PRIMARY KEY (client, seq)) WITHOUT ROWID;`

/**
 * First in, first out; the last 500 events a client, or `maxEvents`. An event is kept when `append` returns, as durably as
 * the database is set (`PRAGMA synchronous`). Numbers are not used again, also of events that are gone.
 */
export class SqlEventStore implements AgentSocketEventStore {
  readonly #db: SqlDatabase
  readonly #max: number

  constructor(db: SqlDatabase, options: { maxEvents?: number } = {}) {
    this.#db = db
    this.#max = options.maxEvents ?? 500
    db.exec(SCHEMA)
  }

  append(event: AgentSocketEnvelope): void {
    const { clientId, seq } = event
    if (clientId === undefined || seq === undefined) throw new Error('an event has a clientId and a seq')
    this.#db.exec('BEGIN IMMEDIATE')
    try {
      const latest = this.latestSeq(clientId)
      if (seq <= latest) throw new Error(`seq: ${seq} is not behind ${latest}`)
      this.#run('INSERT OR REPLACE INTO agent_socket_streams (client, latest) VALUES (?, ?)', clientId, seq)
      this.#run('INSERT INTO agent_socket_events (client, seq, event) VALUES (?, ?, ?)', clientId, seq, JSON.stringify(event))
      const kept = 'SELECT seq FROM agent_socket_events WHERE client = ? ORDER BY seq DESC LIMIT 1 OFFSET ?'
      this.#run(`DELETE FROM agent_socket_events WHERE client = ? AND seq <= (${kept})`, clientId, clientId, this.#max)
      this.#db.exec('COMMIT')
    } catch (error) {
      this.#rollBack()
      throw error
    }
  }

  #rollBack(): void {
    try {
      this.#db.exec('ROLLBACK')
    } catch {
      // A full disk has rolled it back already; that is what the caller hears of.
    }
  }

  getSince(clientId: string, seq: number): AgentSocketEnvelope[] {
    return this.getSinceRange(clientId, seq)
  }

  getSinceRange(clientId: string, since: number, until = Number.MAX_SAFE_INTEGER, max = -1): AgentSocketEnvelope[] {
    const sql = 'SELECT event FROM agent_socket_events WHERE client = ? AND seq > ? AND seq <= ? ORDER BY seq LIMIT ?'
    const rows = this.#db.prepare(sql).all(clientId, since, Math.min(until, Number.MAX_SAFE_INTEGER), Number.isFinite(max) ? max : -1)
    return rows.map((row) => JSON.parse((row as { event: string }).event) as AgentSocketEnvelope)
  }

  latestSeq(clientId: string): number {
    const rows = this.#db.prepare('SELECT latest FROM agent_socket_streams WHERE client = ?').all(clientId)
    return (rows[0] as { latest: number } | undefined)?.latest ?? 0
  }

  /** Forgets a client's events, or everybody's. Their numbers are not used again. */
  clear(clientId?: string): void {
    if (clientId === undefined) this.#db.exec('DELETE FROM agent_socket_events')
    else this.#run('DELETE FROM agent_socket_events WHERE client = ?', clientId)
  }

  #run(sql: string, ...params: (string | number)[]): void {
    this.#db.prepare(sql).run(...params)
  }
}

/** The runtime's side, for one connection: events are kept before they are sent, and a turn that is begun twice runs once. */
import { isEventType, makeEnvelope, parseEnvelope, serializeEnvelope, } from './envelope.js';
import { MemoryEventStore } from './store.js';
const HEARTBEAT_MS = 15_000;
const TURNS_MAX = 1000;
const EARLY_MAX = 1000;
export class AgentSocketServerSession {
    #transport;
    #options;
    #store;
    #turns = new Set();
    #clientId;
    #socketId;
    #last = 0;
    #early = [];
    /** What came or is to be kept, one after the other. */
    #work = Promise.resolve();
    constructor(transport, options) {
        this.#transport = transport;
        this.#options = options;
        this.#store = options.store ?? new MemoryEventStore();
        transport.onMessage((data) => this.#then(() => this.#hear(data)));
    }
    /** Keeps an event, and then sends it. What is emitted before the client said hello waits for that, and has no number yet. */
    emit(type, payload, meta = {}) {
        if (!isEventType(type))
            throw new Error(`${type} is no event`);
        if (this.#clientId === undefined) {
            if (this.#early.length >= EARLY_MAX)
                throw new Error(`${EARLY_MAX} events wait for a hello already`);
            this.#early.push(() => this.emit(type, payload, meta));
            return makeEnvelope(type, payload, meta);
        }
        const prev = this.#last;
        this.#last += 1;
        const envelope = this.#own(makeEnvelope(type, payload, { ...meta, seq: this.#last }));
        this.#then(async () => {
            await this.#store.append(envelope);
            this.#put({ ...envelope, prev });
        });
        return envelope;
    }
    #then(work) {
        this.#work = this.#work.then(work).catch((error) => this.#transport.close(1011, String(error).slice(0, 100)));
    }
    async #hear(data) {
        let envelope;
        try {
            envelope = parseEnvelope(data);
        }
        catch (error) {
            const field = error.field;
            const code = field === 'protocol' || field === 'version' ? 1002 : 1007;
            this.#transport.close(code, String(error.message).slice(0, 100));
            return;
        }
        if (envelope.type === 'hello')
            return this.#hello(envelope);
        if (this.#clientId === undefined) {
            this.#transport.close(1008, `${envelope.type} before hello`);
            return;
        }
        switch (envelope.type) {
            case 'state_request':
                return this.#snapshot();
            case 'replay_request':
                return this.#replay(envelope.payload);
            case 'turn_start':
                return this.#start(envelope);
            case 'turn_aborted':
                this.#run(() => this.#options.handlers.onAbortTurn?.(this.#about(envelope, 'turnId')));
                return;
            case 'approval_resolve':
                this.#run(() => this.#options.handlers.onApprovalResolve?.(this.#about(envelope, 'operationId')));
                return;
        }
    }
    async #hello(envelope) {
        if (this.#clientId !== undefined || !envelope.clientId) {
            this.#transport.close(this.#clientId === undefined ? 1007 : 1008, 'hello: once, and with a clientId');
            return;
        }
        this.#clientId = envelope.clientId;
        this.#socketId = envelope.socketId ?? crypto.randomUUID();
        this.#last = await this.#store.latestSeq(envelope.clientId);
        const payload = { version: 1, latestSeq: this.#last, heartbeatMs: HEARTBEAT_MS, silenceMs: HEARTBEAT_MS * 3 };
        this.#put(this.#own(makeEnvelope('welcome', payload)));
        const hello = (envelope.payload ?? {});
        const from = hello.runtimeGeneration ?? envelope.runtimeGeneration ?? null;
        const to = this.#options.runtimeGeneration;
        if (from !== null && from !== to)
            this.#put(this.#own(makeEnvelope('runtime_generation_changed', { from, to })));
        await this.#snapshot();
        this.#early.splice(0).forEach((emit) => emit());
    }
    async #snapshot() {
        const state = await this.#options.handlers.getState(this.#clientId ?? '');
        this.#put(this.#own(makeEnvelope('state_snapshot', { ...state, seq: this.#last })));
    }
    async #replay(asked = {}) {
        const { since = 0, until = this.#last, max = 10_000 } = asked;
        const all = await this.#store.getSince(this.#clientId ?? '', since);
        const wanted = all.filter(({ seq = 0 }) => seq <= until);
        const events = wanted.slice(0, max);
        const rest = events.length < wanted.length;
        const first = wanted[0]?.seq ?? since + 1;
        const payload = { since, until: rest ? events.at(-1)?.seq : Math.max(since, until), more: false, events };
        if (rest)
            payload['rest'] = true;
        if (first > since + 1)
            payload['gone'] = [since, first - 1];
        this.#put(this.#own(makeEnvelope('replay_events', payload)));
        if (payload['gone'])
            await this.#snapshot();
    }
    async #start(envelope) {
        const { turnId } = envelope;
        if (turnId !== undefined) {
            // It runs already, or it ran: that is what the asker wants to know.
            if (this.#turns.has(turnId))
                return this.#snapshot();
            const kept = await this.#store.getSince(this.#clientId ?? '', 0);
            if (kept.some((event) => event.turnId === turnId))
                return this.#snapshot();
            this.#turns.add(turnId);
            const oldest = this.#turns.values().next().value;
            if (this.#turns.size > TURNS_MAX && oldest !== undefined)
                this.#turns.delete(oldest);
        }
        const emit = ({ type, payload, turnId: turn, operationId, ts }) => {
            const meta = {};
            if (turn !== undefined)
                meta.turnId = turn;
            if (operationId !== undefined)
                meta.operationId = operationId;
            if (ts !== undefined)
                meta.ts = ts;
            this.emit(type, payload, meta);
        };
        this.#run(() => this.#options.handlers.onStartTurn?.({ ...this.#about(envelope, 'turnId'), emit }));
    }
    #about(envelope, what) {
        const about = { clientId: this.#clientId, payload: envelope.payload };
        if (envelope[what] !== undefined)
            about[what] = envelope[what];
        return about;
    }
    /** Runs a handler, which what comes next does not wait for. */
    #run(handler) {
        void Promise.resolve()
            .then(handler)
            .catch((error) => this.#transport.close(1011, String(error).slice(0, 100)));
    }
    #own(envelope) {
        const own = { runtimeGeneration: this.#options.runtimeGeneration, ...envelope };
        if (this.#clientId !== undefined)
            own.clientId = this.#clientId;
        if (this.#socketId !== undefined && !isEventType(envelope.type))
            own.socketId = this.#socketId;
        return own;
    }
    #put(envelope) {
        try {
            this.#transport.send(serializeEnvelope(envelope));
        }
        catch {
            // Whoever is gone gets it when it is back.
        }
    }
}
export function createAgentSocketServerSession(transport, options) {
    return new AgentSocketServerSession(transport, options);
}
//# sourceMappingURL=server.js.map
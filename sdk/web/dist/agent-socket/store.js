/** Where a runtime keeps events, so that whoever was away gets them. */
/** First in, first out, in memory; 500 events a client, unless somebody says otherwise. */
export class MemoryEventStore {
    #max;
    #streams = new Map();
    constructor(options = {}) {
        this.#max = options.maxEvents ?? 500;
    }
    /** The number for the client's next event. */
    nextSeq(clientId) {
        return this.#stream(clientId).latest + 1;
    }
    append(event) {
        if (event.clientId === undefined || event.seq === undefined)
            throw new Error('an event has a clientId and a seq');
        const stream = this.#stream(event.clientId);
        if (event.seq <= stream.latest)
            throw new Error(`seq: ${event.seq} is not behind ${stream.latest}`);
        stream.latest = event.seq;
        stream.events.push(event);
        if (stream.events.length > this.#max)
            stream.events.shift();
    }
    getSince(clientId, seq) {
        return this.getSinceRange(clientId, seq);
    }
    getSinceRange(clientId, since, until = Infinity, max = Infinity) {
        const events = this.#stream(clientId).events.filter(({ seq = 0 }) => seq > since && seq <= until);
        return events.slice(0, max);
    }
    latestSeq(clientId) {
        return this.#stream(clientId).latest;
    }
    /** Forgets a client's events, or everybody's. Their numbers are not used again. */
    clear(clientId) {
        for (const [id, stream] of this.#streams)
            if (clientId === undefined || clientId === id)
                stream.events = [];
    }
    #stream(clientId) {
        let stream = this.#streams.get(clientId);
        if (stream === undefined)
            this.#streams.set(clientId, (stream = { events: [], latest: 0 }));
        return stream;
    }
}
//# sourceMappingURL=store.js.map
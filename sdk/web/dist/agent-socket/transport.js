/** What carries frames: anything with two ends that keeps their order. */
/** Two ends in one program: what one sends, the other gets a moment later. */
export class InMemoryTransport {
    #peer;
    #isOpen = true;
    #messages = [];
    #closes = [];
    static pair() {
        const [one, other] = [new InMemoryTransport(), new InMemoryTransport()];
        one.#peer = other;
        other.#peer = one;
        return [one, other];
    }
    send(data) {
        if (!this.#isOpen)
            throw new Error('the transport is closed');
        const peer = this.#peer;
        queueMicrotask(() => {
            if (peer !== undefined && peer.#isOpen)
                peer.#messages.forEach((cb) => cb(data));
        });
    }
    close(code = 1000, reason = '') {
        for (const end of [this, this.#peer]) {
            if (end === undefined || !end.#isOpen)
                continue;
            end.#isOpen = false;
            queueMicrotask(() => end.#closes.forEach((cb) => cb({ code, reason })));
        }
    }
    onMessage(cb) {
        this.#messages.push(cb);
    }
    onClose(cb) {
        this.#closes.push(cb);
    }
}
/** A WebSocket as a transport. What is sent before it is open waits. */
export function webSocketTransport(socket) {
    const waiting = [];
    if ('binaryType' in socket)
        socket.binaryType = 'arraybuffer';
    socket.addEventListener('open', () => waiting.splice(0).forEach((data) => socket.send(data)));
    return {
        send(data) {
            if (socket.readyState === 0)
                waiting.push(data);
            else if (socket.readyState === 1)
                socket.send(data);
            else
                throw new Error('the socket is closed');
        },
        close: (code, reason) => socket.close(code, reason),
        onMessage: (cb) => socket.addEventListener('message', (event) => cb(event.data)),
        onClose: (cb) => socket.addEventListener('close', (event) => cb(event)),
        onError: (cb) => socket.addEventListener('error', (event) => cb(event)),
    };
}
export function isTransport(value) {
    return 'onMessage' in value;
}
//# sourceMappingURL=transport.js.map
/** WebSockets of browsers. */
import { webSocketTransport } from '../transport.js';
/** The address of a path of this page's server, for `new WebSocket(…)`. Full addresses are passed through. */
export function agentSocketBrowserTransport(path) {
    const base = typeof location === 'undefined' ? 'ws://localhost' : location.href;
    return new URL(path, base).href.replace(/^http/, 'ws');
}
/** What makes connections to a path of this page's server: with it, a client comes back by itself. */
export function agentSocketBrowserConnector(path) {
    return () => webSocketTransport(new WebSocket(agentSocketBrowserTransport(path)));
}
//# sourceMappingURL=browser.js.map
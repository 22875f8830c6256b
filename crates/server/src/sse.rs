//! Server-sent events: how they are written, and what keeps a stream of them open.

use std::{convert::Infallible, time::Duration};

use axum::{
    body::Body,
    http::header,
    response::{IntoResponse as _, Response},
};
use bytes::{BufMut as _, Bytes, BytesMut};
use futures_util::Stream;
use serde::Serialize;

/// A stream that has nothing to say says so this often, so that nobody in between takes it for dead.
pub(crate) const PING_PAUSE: Duration = Duration::from_secs(15);

/// What it says then.
pub(crate) const PING: Bytes = Bytes::from_static(b": ping\n\n");

/// What a stream begins with: how long clients wait before they come back, in milliseconds.
pub(crate) const HELLO: Bytes = Bytes::from_static(b"retry: 1000\n\n");

/// Bytes after which events are sent, though there are more.
pub(crate) const CHUNK_BYTES: usize = 64 * 1024;

/// Writes one event. Its data is one line, because JSON has none of its own.
pub(crate) fn event(out: &mut BytesMut, name: &str, id: Option<u64>, data: &impl Serialize) {
    let start = out.len();
    out.put_slice(b"event: ");
    out.put_slice(name.as_bytes());
    if let Some(id) = id {
        out.put_slice(b"\nid: ");
        out.put_slice(id.to_string().as_bytes());
    }
    out.put_slice(b"\ndata: ");
    if let Err(error) = serde_json::to_writer(out.writer(), data) {
        // Half an event would spoil the next one.
        out.truncate(start);
        return tracing::error!(%error, name, "an event cannot be written");
    }
    out.put_slice(b"\n\n");
}

/// Writes one event whose data is JSON already, on any number of lines.
pub(crate) fn raw_event(out: &mut BytesMut, name: &str, id: u64, data: &[u8]) {
    out.put_slice(format!("event: {name}\nid: {id}\n").as_bytes());
    for line in data.split(|byte| matches!(byte, b'\n' | b'\r')).filter(|line| !line.is_empty()) {
        out.put_slice(b"data: ");
        out.put_slice(line);
        out.put_slice(b"\n");
    }
    out.put_slice(b"\n");
}

/// The response that streams events.
pub(crate) fn response(events: impl Stream<Item = Bytes> + Send + 'static) -> Response {
    let headers = [
        (header::CONTENT_TYPE, "text/event-stream"),
        (header::CACHE_CONTROL, "no-cache, no-transform"),
        (header::HeaderName::from_static("x-accel-buffering"), "no"),
    ];
    let body = Body::from_stream(futures_util::StreamExt::map(events, Ok::<_, Infallible>));
    (headers, body).into_response()
}

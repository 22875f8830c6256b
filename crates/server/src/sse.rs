//! Server-sent events: how they are written, and what keeps a stream of them open.

use std::{
    collections::{HashMap, hash_map::Entry},
    convert::Infallible,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use axum::{
    body::Body,
    http::header,
    response::{IntoResponse as _, Response},
};
use bytes::{BufMut as _, Bytes, BytesMut};
use futures_util::Stream;
use prometheus_client::metrics::{family::Family, gauge::Gauge};
use serde::Serialize;
use trunkline_core::{Error, Kind, caller::Caller, limits::CONNECTIONS_RETRY};

use crate::metrics::Tells;

/// Who has how many streams open. Clones share it.
#[derive(Clone)]
pub(crate) struct Streams(Arc<Open>);

struct Open {
    /// Of one token; 0 is no limit.
    most: u32,
    tokens: Mutex<HashMap<Box<str>, u32>>,
    gauge: Family<Tells, Gauge>,
}

/// A stream, as long as it is open.
pub(crate) struct Held {
    streams: Streams,
    token: Option<Box<str>>,
    tells: &'static str,
}

impl Streams {
    pub(crate) fn new(most: u32, gauge: Family<Tells, Gauge>) -> Self {
        Self(Arc::new(Open { most, tokens: Mutex::default(), gauge }))
    }

    /// Another one of somebody. Whoever needs no token has no limit: such a server serves one machine.
    pub(crate) fn open(&self, caller: &Caller, tells: &'static str) -> Result<Held, Error> {
        let token: Option<Box<str>> = caller.credential.token.as_deref().map(Into::into);
        if let Some(token) = &token {
            let mut tokens = self.tokens();
            let count = tokens.entry(token.clone()).or_insert(0);
            if self.0.most > 0 && *count >= self.0.most {
                let message = "more streams than limits.event_streams_per_token for this token";
                let retry_after = Some(CONNECTIONS_RETRY);
                return Err(Error { retry_after, ..Error::new(Kind::Exhausted, "ERR_QUOTA_001", message) });
            }
            *count += 1;
        }
        self.0.gauge.get_or_create(&Tells { tells }).inc();
        Ok(Held { streams: self.clone(), token, tells })
    }

    /// Another one of somebody who has other limits.
    pub(crate) fn count(&self, tells: &'static str) -> Held {
        self.0.gauge.get_or_create(&Tells { tells }).inc();
        Held { streams: self.clone(), token: None, tells }
    }

    fn tokens(&self) -> MutexGuard<'_, HashMap<Box<str>, u32>> {
        self.0.tokens.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        let Self { streams, token, tells } = self;
        streams.0.gauge.get_or_create(&Tells { tells }).dec();
        if let Some(token) = token
            && let Entry::Occupied(mut entry) = streams.tokens().entry(std::mem::take(token))
        {
            *entry.get_mut() -= 1;
            if *entry.get() == 0 {
                entry.remove();
            }
        }
    }
}

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
    event_at(out, name, id.map(|id| id.to_string()).as_deref(), data);
}

/// As [`event`], with an id that is any text on one line.
pub(crate) fn event_at(out: &mut BytesMut, name: &str, id: Option<&str>, data: &impl Serialize) {
    let start = out.len();
    out.put_slice(b"event: ");
    out.put_slice(name.as_bytes());
    if let Some(id) = id {
        out.put_slice(b"\nid: ");
        out.put_slice(id.as_bytes());
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

//! A stream of what happens in a conversation.

use std::{pin::Pin, sync::Arc, time::Duration};

use bytes::{Bytes, BytesMut};
use futures_util::stream::{self, Stream};
use serde::Serialize;
use tokio::{
    sync::watch,
    time::{Instant, Sleep, sleep_until},
};
use trunkline_core::conversation::{
    Delta, Place, Seat, Seen, Watch,
    files::{FOR_VIEWERS, Links},
    said::{Activity, Phase, Typing},
    state::{Event, Reason, State},
};
use trunkline_store::log::Cursor;

use super::{
    Surface,
    shown::Shown,
    token::{self, Admitted},
};
use crate::sse::{self, Held};

/// A client takes a new token when less than this remains of its own, in seconds. The published figure.
const EXPIRING: i64 = 300;

/// Somebody who watches a conversation.
pub(super) struct Viewer {
    surface: Arc<Surface>,
    seat: Seat,
    asks: Admitted,
    /// Of apps: then it is looked at whether the token is still good.
    changes: watch::Receiver<u64>,
    watch: Watch,
    place: Arc<Place>,
    base: Box<str>,
    until: Until,
    phase: Stage,
    ping: Pin<Box<Sleep>>,
    _held: Held,
}

/// When a stream ends, and why.
pub(super) struct Until {
    at: Instant,
    why: Close,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Stage {
    New,
    Open,
    /// Its last words were said.
    Over,
}

/// Why the server ends a stream. The published words.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Close {
    /// It was open for as long as one may be.
    ServerCap,
    /// The server stops.
    Shutdown,
    /// The token ends soon, or is not good any more: another one is needed.
    AuthExpiring,
    /// It did not take what it was sent.
    Stalled,
}

impl Until {
    /// The end of a stream whose token ends then: just behind the mark at which the client takes a new one, so that it does
    /// not come back with the same; and if that is over already, with the token.
    pub(super) fn new(stream_seconds: u64, expires_at: i64, now: i64) -> Self {
        let left = expires_at.saturating_sub(now);
        let to_token = if left >= EXPIRING { left - EXPIRING + 1 } else { left.max(0) };
        let (to_token, to_cap) = (Duration::from_secs(to_token.unsigned_abs()), Duration::from_secs(stream_seconds));
        let (after, why) =
            if to_cap <= to_token { (to_cap, Close::ServerCap) } else { (to_token, Close::AuthExpiring) };
        Self { at: Instant::now() + after, why }
    }
}

impl Viewer {
    pub(super) fn new(
        surface: Arc<Surface>,
        (seat, asks): (Seat, Admitted),
        watch: Watch,
        place: Arc<Place>,
        base: String,
        held: Held,
    ) -> Self {
        let ping = Box::pin(sleep_until(Instant::now()));
        let conversations = &surface.conversations;
        let changes = conversations.apps().changes();
        let until = Until::new(conversations.options().stream_seconds, asks.expires_at, token::now());
        Self {
            surface,
            seat,
            asks,
            changes,
            watch,
            place,
            base: base.into(),
            until,
            phase: Stage::New,
            ping,
            _held: held,
        }
    }

    pub(super) fn into_stream(self) -> impl Stream<Item = Bytes> + Send {
        // It is kept once, and not in each future again.
        stream::unfold(self, |mut viewer| async move {
            let chunk = viewer.next().await?;
            Some((chunk, viewer))
        })
    }

    /// The next chunk. Being asked for it means that the transport took the last one.
    async fn next(&mut self) -> Option<Bytes> {
        let is_held = self.place.took();
        let chunk = match self.phase {
            Stage::Over => return None,
            _ if !is_held => self.close(Close::Stalled),
            // The app may have changed since the token was looked at.
            Stage::New if !self.is_good() => self.close(Close::AuthExpiring),
            Stage::New => {
                self.phase = Stage::Open;
                self.hello()
            }
            Stage::Open => self.chunk().await?,
        };
        self.place.owes();
        Some(chunk)
    }

    fn hello(&mut self) -> Bytes {
        #[derive(Serialize)]
        struct Ready<'a> {
            r#type: &'static str,
            conn_id: &'a str,
            resumed: bool,
        }
        // Nothing before it: there are readers that take every empty line for an event.
        let mut out = BytesMut::new();
        let conn_id = uuid::Uuid::now_v7().to_string();
        let ready = Ready { r#type: "ready", conn_id: &conn_id, resumed: self.watch.is_resumed() };
        // A client that hears nothing else comes back to this place.
        sse::event_at(&mut out, "ready", Some(&self.watch.begins().to_string()), &ready);
        out.freeze()
    }

    /// What is next, or nothing if the conversation is gone.
    async fn chunk(&mut self) -> Option<Bytes> {
        // One timer for both: whatever is sooner.
        let (pings_at, stop) = (Instant::now() + sse::PING_PAUSE, self.surface.web.stop.clone());
        self.ping.as_mut().reset(pings_at.min(self.until.at));
        tokio::select! {
            seen = self.watch.next() => match seen {
                Ok(seen) => self.show(&seen),
                Err(error) => {
                    tracing::debug!(%error, "a stream of a conversation ends");
                    None
                }
            },
            () = &mut self.ping => {
                if Instant::now() >= self.until.at { Some(self.close(self.until.why)) } else { Some(PING) }
            }
            () = changed(&mut self.changes) => match self.is_good() {
                true => Some(SILENCE),
                false => Some(self.close(Close::AuthExpiring)),
            },
            () = stop.cancelled() => Some(self.close(Close::Shutdown)),
        }
    }

    fn is_good(&self) -> bool {
        self.asks.is_good(self.surface.conversations.apps())
    }

    fn close(&mut self, reason: Close) -> Bytes {
        #[derive(Serialize)]
        struct Closed {
            r#type: &'static str,
            reason: Close,
        }
        self.phase = Stage::Over;
        let mut out = BytesMut::new();
        sse::event(&mut out, "closed", None, &Closed { r#type: "closed", reason });
        out.freeze()
    }

    fn show(&mut self, seen: &[Seen]) -> Option<Bytes> {
        let mut out = BytesMut::new();
        let conversations = &self.surface.conversations;
        let view = View { seat: &self.seat, links: conversations.links(), base: &self.base };
        for each in seen {
            match each {
                Seen::Event(cursor, event) => view.event(&mut out, *cursor, event),
                Seen::Delta(cursor, delta) => view.delta(&mut out, *cursor, delta),
                Seen::Typing(typing) => view.typing(&mut out, typing),
                Seen::Over => return None,
            }
        }
        // Events that are not shown; an empty chunk would end the body.
        Some(if out.is_empty() { SILENCE } else { out.freeze() })
    }
}

/// Says that the stream is alive. The published event, for whoever looks for that.
const PING: Bytes = Bytes::from_static(b"event: ping\ndata: {\"type\":\"ping\"}\n\n");

/// Says nothing, and is no event to anybody.
const SILENCE: Bytes = Bytes::from_static(b":\n");

/// How events look to whoever watches.
struct View<'a> {
    seat: &'a Seat,
    links: &'a Links,
    base: &'a str,
}

#[derive(Serialize)]
struct Message<'a> {
    r#type: &'static str,
    action: &'static str,
    agent_id: uuid::Uuid,
    convo_id: uuid::Uuid,
    message: Shown<'a>,
}

#[derive(Serialize)]
struct Changed<'a> {
    r#type: &'static str,
    agent_id: uuid::Uuid,
    convo_id: uuid::Uuid,
    state: State,
    prev_state: State,
    closed_user_message: Option<&'a str>,
}

#[derive(Serialize)]
struct TurnDone {
    r#type: &'static str,
    convo_id: uuid::Uuid,
    reason: Reason,
    at: i64,
    #[serde(skip_serializing_if = "Option::is_none")]
    retry_after_seconds: Option<u64>,
}

#[derive(Serialize)]
struct Types<'a> {
    r#type: &'static str,
    convo_id: uuid::Uuid,
    kind: Activity,
    state: Phase,
    label: &'a str,
}

#[derive(Serialize)]
struct Piece<'a> {
    r#type: &'static str,
    convo_id: uuid::Uuid,
    message_id: uuid::Uuid,
    index: u64,
    text: &'a str,
    /// Nothing follows: the whole was said.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    done: bool,
}

impl View<'_> {
    fn event(&self, out: &mut BytesMut, cursor: Cursor, event: &Event) {
        let (agent_id, convo_id) = (self.seat.row().agent, self.seat.row().id);
        let cursor = Some(cursor.to_string());
        let id = cursor.as_deref();
        match event {
            Event::Message(message) => {
                let message = Shown::new(message, self.links, self.base, FOR_VIEWERS);
                let shown = Message { r#type: "message", action: "create", agent_id, convo_id, message };
                sse::event_at(out, "message", id, &shown);
            }
            Event::State { state, prev_state, closed_user_message } => {
                let (state, prev_state) = (*state, *prev_state);
                let closed_user_message = closed_user_message.as_deref();
                let r#type = "convo_state";
                let shown = Changed { r#type, agent_id, convo_id, state, prev_state, closed_user_message };
                sse::event_at(out, r#type, id, &shown);
            }
            Event::TurnDone { reason, at, retry_after_seconds } => {
                let (reason, at, retry_after_seconds) = (*reason, *at, *retry_after_seconds);
                let shown = TurnDone { r#type: "turn_done", convo_id, reason, at, retry_after_seconds };
                sse::event_at(out, "turn_done", id, &shown);
            }
            Event::Failed { at } => {
                let (reason, at, retry_after_seconds) = (Reason::TemporaryFailure, *at, None);
                sse::event_at(
                    out,
                    "error",
                    id,
                    &TurnDone { r#type: "error", convo_id, reason, at, retry_after_seconds },
                );
            }
            Event::Joined(_) | Event::Left(_) => {}
        }
    }

    fn delta(&self, out: &mut BytesMut, cursor: Cursor, delta: &Delta) {
        let (convo_id, message_id, index) = (self.seat.row().id, delta.message_id, delta.index);
        let piece = Piece { r#type: "delta", convo_id, message_id, index, text: &delta.text, done: delta.is_end };
        sse::event_at(out, "delta", Some(&cursor.to_string()), &piece);
    }

    fn typing(&self, out: &mut BytesMut, typing: &Typing) {
        let Typing { kind, state, label } = typing;
        let convo_id = self.seat.row().id;
        sse::event(out, "typing", None, &Types { r#type: "typing", convo_id, kind: *kind, state: *state, label });
    }
}

/// Waits for a change of apps; for ever, when there are none any more.
async fn changed(changes: &mut watch::Receiver<u64>) {
    if changes.changed().await.is_err() {
        std::future::pending::<()>().await;
    }
}

#[cfg(test)]
mod tests {
    use super::{Close, Duration, Instant, Until};

    #[tokio::test(start_paused = true)]
    async fn streams_end_when_the_client_would_take_a_new_token() {
        for (left, cap, seconds, why) in [
            (900, 3600, 601, Close::AuthExpiring),
            (301, 3600, 2, Close::AuthExpiring),
            (300, 3600, 1, Close::AuthExpiring),
            (299, 3600, 299, Close::AuthExpiring),
            (10, 3600, 10, Close::AuthExpiring),
            (-10, 3600, 0, Close::AuthExpiring),
            (86_400, 3600, 3600, Close::ServerCap),
            (900, 5, 5, Close::ServerCap),
        ] {
            let until = Until::new(cap, 1_000_000 + left, 1_000_000);
            assert_eq!((until.at - Instant::now(), until.why), (Duration::from_secs(seconds), why), "{left} {cap}");
        }
    }
}

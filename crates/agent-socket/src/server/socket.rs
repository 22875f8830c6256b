//! One socket: what it asks, and what it is sent.

use std::{sync::Arc, time::Duration};

use serde_json::{Value, json};
use tokio::{
    sync::{mpsc, watch},
    time::{Instant, sleep_until, timeout},
};

use super::{
    Ask, Handlers, Server,
    desk::{Desk, Taken},
};
use crate::{
    close::{Close, code},
    envelope::{Envelope, Type},
    link::{Due, Hello, Link, Replay, ReplayEvents, SILENT_BEATS, Said, join, parts, replay_frame},
    store::{EventStore, Range, StoreError},
    transport::{Frame, Receiver, Sender, send},
};

/// Events that are read and sent at once.
const SEND_AT_ONCE: usize = 256;

/// Bytes of payloads in the answer to one request for replay, about; who wants more asks again.
const REPLAY_BYTES_MAX: usize = 4 * 1024 * 1024;

/// Requests that are done and whose asker was not answered; handlers of more wait.
const DONE_MAX: usize = 64;

/// Whoever is this many events behind does not keep up, and gets pieces of text joined.
const BEHIND: usize = 32;

pub(super) async fn serve<H: Handlers, S: Sender, R: Receiver>(
    server: &Server<H>,
    sender: S,
    mut receiver: R,
) -> Result<(), Close> {
    let begun = Instant::now();
    let link = Link::new(server.hub.0.options.terms, 0);
    let (done, mut is_done) = mpsc::channel(DONE_MAX);
    let mut socket = Socket { server, sender, link, begun, client: None, done };
    let ended = socket.run(&mut receiver, &mut is_done).await;
    if let Some(client) = &socket.client {
        client.desk.leaves(&client.socket_id);
    }
    if let Err(close) = &ended {
        // It has no longer for this than for anything else.
        let _ = timeout(socket.patience(), socket.sender.close(close.clone())).await;
        receiver.drain().await;
    }
    ended
}

struct Socket<'a, H, S> {
    server: &'a Server<H>,
    sender: S,
    link: Link,
    begun: Instant,
    client: Option<Client>,
    /// Requests that are done.
    done: mpsc::Sender<String>,
}

/// Who is at the other end.
struct Client {
    id: String,
    socket_id: String,
    desk: Arc<Desk>,
    /// The last event that was sent without being asked for.
    sent: u64,
    latest: watch::Receiver<u64>,
}

fn failed(error: &StoreError) -> Close {
    tracing::error!(%error, "the event store failed");
    Close::new(code::FAILED, "the event store failed")
}

impl<H: Handlers, S: Sender> Socket<'_, H, S> {
    async fn run(&mut self, receiver: &mut impl Receiver, done: &mut mpsc::Receiver<String>) -> Result<(), Close> {
        loop {
            let at = match self.link.due(self.now()) {
                Due::At(at) => self.begun + Duration::from_millis(at),
                Due::Close(close) => return Err(close),
                Due::Heartbeat => {
                    self.beat().await?;
                    continue;
                }
            };
            tokio::select! {
                frame = receiver.next() => match frame {
                    Some(Ok(Frame::Envelope(frame))) => {
                        let said = self.link.hear(&frame, self.now())?;
                        self.answer(said).await?;
                    }
                    Some(Ok(Frame::TooLarge(why))) => return Err(Close::new(code::TOO_LARGE, why)),
                    Some(Ok(Frame::NotText(why))) => return Err(Close::new(code::UNREADABLE, why)),
                    Some(Ok(Frame::Alive)) => self.link.alive(self.now()),
                    // Whoever breaks or closes comes back if it likes.
                    Some(Ok(Frame::Closed(_)) | Err(_)) | None => return Ok(()),
                },
                () = moved(&mut self.client) => self.catch_up().await?,
                Some(request) = done.recv() => self.acknowledge(request).await?,
                () = sleep_until(at) => {}
            }
        }
    }

    fn now(&self) -> u64 {
        u64::try_from(self.begun.elapsed().as_millis()).unwrap_or(u64::MAX)
    }

    /// How long the other end may take no frame.
    fn patience(&self) -> Duration {
        Duration::from_millis(self.server.hub.0.options.terms.heartbeat_ms * SILENT_BEATS)
    }

    async fn send(&mut self, frames: Vec<String>) -> Result<(), Close> {
        let patience = self.patience();
        send(&mut self.sender, frames, patience).await?;
        self.link.told(self.now());
        Ok(())
    }

    async fn say(&mut self, mut envelope: Envelope) -> Result<(), Close> {
        if let Some(client) = &self.client {
            (envelope.client_id, envelope.socket_id) = (Some(client.id.clone()), Some(client.socket_id.clone()));
        }
        envelope.runtime_generation = Some(self.server.hub.0.options.runtime_generation.clone());
        self.send(vec![envelope.to_json()]).await
    }

    async fn beat(&mut self) -> Result<(), Close> {
        // Browsers answer the transport's question by themselves, whatever speaks there.
        let _ = timeout(self.patience(), self.sender.ping()).await;
        self.link.asked(self.now());
        let latest = self.client.as_ref().map_or(0, |client| client.sent);
        self.say(Envelope::new(Type::Heartbeat).with(&json!({"latestSeq": latest}))).await
    }

    async fn answer(&mut self, said: Said) -> Result<(), Close> {
        match said {
            Said::Hello(hello, envelope) => self.welcome(hello, envelope).await,
            Said::State => self.snapshot().await,
            Said::Replay(asked) => self.replay(asked).await,
            Said::Ack(seq) => self.acked(seq).await,
            Said::Event(envelope) => self.asked(envelope).await,
            Said::Has(_) | Said::Nothing => Ok(()),
        }
    }

    async fn welcome(&mut self, hello: Hello, envelope: Envelope) -> Result<(), Close> {
        let id = envelope.client_id.filter(|id| !id.is_empty());
        let id = id.ok_or_else(|| Close::new(code::UNREADABLE, "clientId: missing"))?;
        let desk = self.server.hub.desk(&id).await.map_err(|e| failed(&e))?;
        let socket_id = envelope.socket_id.unwrap_or_else(|| uuid::Uuid::now_v7().to_string());
        let mut latest = desk.latest();
        let sent = *latest.borrow_and_update();
        // Until it says more, it had what it says here.
        let all = desk.comes(&socket_id, hello.last_seen_seq.unwrap_or(0).min(sent));
        self.server.hub.0.store.trim(&id, all).await.map_err(|e| failed(&e))?;
        let welcome = self.link.welcome(&hello, sent);
        self.client = Some(Client { id, socket_id, desk, sent, latest });
        self.say(Envelope::new(Type::Welcome).with(&welcome)).await?;
        let own = &self.server.hub.0.options.runtime_generation;
        // Whoever speaks of versions asks for what it missed, and finds it there.
        if let Some(from) = hello.runtime_generation.filter(|from| from != own && hello.versions.is_empty()) {
            let payload = json!({"from": from, "to": own});
            self.say(Envelope::new(Type::RuntimeGenerationChanged).with(&payload)).await?;
        }
        self.snapshot().await
    }

    async fn snapshot(&mut self) -> Result<(), Close> {
        let Some(client) = &self.client else { return Ok(()) };
        let (folded, seq) = client.desk.state().await;
        let state = self.server.handlers.state(&client.id).await.unwrap_or(folded);
        let mut payload = serde_json::to_value(state).unwrap_or_default();
        payload["seq"] = seq.into();
        self.say(Envelope::new(Type::StateSnapshot).with(&payload)).await
    }

    async fn acked(&mut self, seq: u64) -> Result<(), Close> {
        let Some(client) = &self.client else { return Ok(()) };
        match client.desk.acked(&client.socket_id, seq) {
            Some(all) => self.server.hub.0.store.trim(&client.id, Some(all)).await.map_err(|e| failed(&e)),
            None => Ok(()),
        }
    }

    /// What was missed, up to what is sent without being asked for.
    async fn replay(&mut self, asked: Replay) -> Result<(), Close> {
        let Some(client) = &self.client else { return Ok(()) };
        let terms = self.server.hub.0.options.terms;
        let until = asked.until.unwrap_or(client.sent).min(client.sent);
        let max = asked.max.unwrap_or(terms.replay_events_max).min(terms.replay_events_max);
        let store = &self.server.hub.0.store;
        let range = part_of(&**store, &client.id, asked.since, until, max).await.map_err(|e| failed(&e))?;
        let last = range.events.last().and_then(|event| event.seq);
        let of = ReplayEvents {
            since: asked.since,
            until: if range.more { last.unwrap_or(asked.since) } else { until.max(asked.since) },
            gone: range.gone_through.map(|through| (asked.since, through)),
            more: false,
            rest: range.more,
        };
        let events = range.events.iter().map(|event| (event.seq.unwrap_or(0), event.to_json())).collect();
        let id = client.id.clone();
        let parts = parts(&of, events, terms.frame_bytes_max);
        self.send(parts.iter().map(|(part, events)| replay_frame(&id, part, events)).collect()).await?;
        if of.gone.is_some() { self.snapshot().await } else { Ok(()) }
    }

    /// Sends what is new.
    async fn catch_up(&mut self) -> Result<(), Close> {
        let Some(client) = &mut self.client else { return Ok(()) };
        client.latest.borrow_and_update();
        let (id, since) = (client.id.clone(), client.sent);
        let store = &self.server.hub.0.store;
        let range = store.get_since_range(&id, since, None, SEND_AT_ONCE).await.map_err(|e| failed(&e))?;
        let Some(last) = range.events.last().and_then(|event| event.seq) else { return Ok(()) };
        if range.more {
            client.latest.mark_changed();
        }
        client.sent = last;
        if let Some(through) = range.gone_through {
            let gone = ReplayEvents { since, until: through, gone: Some((since, through)), ..ReplayEvents::default() };
            self.send(vec![replay_frame(&id, &gone, &[])]).await?;
            self.snapshot().await?;
        }
        let is_behind = range.events.len() >= BEHIND;
        let joined_bytes_max = self.server.hub.0.options.terms.joined_bytes_max;
        let events = if is_behind { join(range.events, joined_bytes_max) } else { range.events };
        let mut before = range.gone_through.unwrap_or(since);
        let frames = events.into_iter().map(|mut event| {
            event.extra.add("prev", &Value::from(std::mem::replace(&mut before, event.seq.unwrap_or(0))));
            event.to_json()
        });
        let frames = frames.collect();
        self.send(frames).await
    }

    /// Something for the runtime.
    async fn asked(&mut self, envelope: Envelope) -> Result<(), Close> {
        let Some(client) = &self.client else { return Ok(()) };
        let (kind, request, desk) = (envelope.kind, envelope.request_id.clone(), client.desk.clone());
        let taken = desk.take(&envelope).await;
        if taken == Taken::Now {
            let ask = Ask { client_id: client.id.clone(), socket_id: client.socket_id.clone(), envelope };
            let (handlers, emitter, done) = (self.server.handlers.clone(), self.server.emitter(), self.done.clone());
            self.server.tasks.spawn(async move {
                handlers.asked(ask, emitter).await;
                if let Some(request) = request {
                    desk.done(&request).await;
                    // A client whose socket ended says it again.
                    let _ = done.send(request).await;
                }
            });
            return Ok(());
        }
        if kind == Type::TurnStart {
            // It runs already, or it ran: that is what the asker wants to know.
            self.snapshot().await?;
        }
        match request {
            Some(request) if taken == Taken::Done => self.acknowledge(request).await,
            _ => Ok(()),
        }
    }

    async fn acknowledge(&mut self, request: String) -> Result<(), Close> {
        self.say(Envelope { request_id: Some(request), ..Envelope::new(Type::Ack) }).await
    }
}

/// Events of a client, no more than are sent at once without being asked for again.
async fn part_of(
    store: &dyn EventStore,
    client: &str,
    since: u64,
    until: u64,
    max: usize,
) -> Result<Range, StoreError> {
    let (mut all, mut bytes, mut from) = (Range::default(), 0, since);
    loop {
        let at_once = SEND_AT_ONCE.min(max - all.events.len());
        let mut range = store.get_since_range(client, from, Some(until), at_once).await?;
        all.gone_through = all.gone_through.or(range.gone_through);
        bytes +=
            range.events.iter().filter_map(|event| event.payload.as_ref()).map(|json| json.get().len()).sum::<usize>();
        from = range.events.last().and_then(|event| event.seq).unwrap_or(from);
        all.events.append(&mut range.events);
        all.more = range.more;
        if !range.more || all.events.len() >= max || bytes >= REPLAY_BYTES_MAX {
            return Ok(all);
        }
    }
}

/// Waits until there is something new for the client.
async fn moved(client: &mut Option<Client>) {
    let Some(client) = client else { return std::future::pending().await };
    if client.latest.changed().await.is_err() {
        std::future::pending::<()>().await;
    }
}

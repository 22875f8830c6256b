//! Somebody who shows a client's stream, and asks its runtime.

use std::sync::Arc;

use serde_json::{Value, json};
use tokio::time::{Instant, sleep, sleep_until};
use trunkline_agent_socket::{
    Close, Envelope, Type, envelope,
    link::{Hello, Replay, ReplayEvents, Said, join, parts, replay_frame},
    transport::{Receiver, Sender},
};
use trunkline_core::{
    limits::TokenBucket,
    socket::{Aim, Ask, Asked, Need, Permit},
};
use trunkline_store::log::{Item, Reader, Record};

use super::{
    Socket,
    desk::{self, Desk},
    failed, stops,
};

/// Events that are read and sent at once.
const SEND_AT_ONCE: usize = 256;

/// Whoever is this many events behind does not keep up, and gets pieces of text joined.
const BEHIND: usize = 128;

struct Ui<'a, S> {
    socket: &'a mut Socket<S>,
    permit: Permit,
    socket_id: String,
    desk: Arc<Desk>,
    reader: Reader,
    /// The last event that was sent without being asked for.
    sent: u64,
    generation: String,
}

pub(super) async fn serve<S: Sender>(
    socket: &mut Socket<S>,
    receiver: &mut impl Receiver,
    hello: &Hello,
    said: Envelope,
) -> Result<(), Close> {
    let shared = socket.shared.clone();
    let client = said.client_id.unwrap_or_default();
    let permit = shared.sockets.enter(&socket.caller, &client, Need::Show).map_err(|e| failed(&e))?;
    let desk = shared.desks.desk(&permit);
    if let Some(generation) = shared.sockets.generation(&client) {
        desk.settle(&shared.sockets, &generation, &Default::default()).await.map_err(|e| failed(&e))?;
    }
    let (state, sent) = desk.state(&shared.sockets).await.map_err(|e| failed(&e))?;
    let reader = shared.sockets.follow(&permit, sent).map_err(|e| failed(&e))?;
    let socket_id = said.socket_id.unwrap_or_else(|| uuid::Uuid::now_v7().to_string());
    let generation = state.runtime_generation.clone();
    let mut ui = Ui { socket, permit, socket_id, desk, reader, sent, generation };
    ui.welcome(hello).await?;
    ui.run(receiver).await
}

impl<S: Sender> Ui<'_, S> {
    async fn run(&mut self, receiver: &mut impl Receiver) -> Result<(), Close> {
        let limits = self.socket.shared.web.limits;
        let mut bucket = TokenBucket::new(limits.messages_per_second, limits.message_burst, Instant::now().into_std());
        let mut items = Vec::new();
        loop {
            let (client, sent) = (self.permit.client().to_owned(), self.sent);
            self.socket
                .beat(|| {
                    let beat = Envelope::new(Type::Heartbeat).with(&json!({"latestSeq": sent}));
                    Envelope { client_id: Some(client), ..beat }
                })
                .await?;
            let due = self.socket.until_due()?;
            tokio::select! {
                frame = receiver.next() => {
                    match self.socket.hear(frame)? {
                        Some(said) => self.answer(said).await?,
                        None => return Ok(()),
                    }
                    // Whoever says too much is heard more slowly.
                    let now = Instant::now().into_std();
                    if let Some(Err(wait)) = bucket.as_mut().map(|bucket| bucket.take(now)) {
                        sleep(wait).await;
                    }
                }
                read = self.reader.next_batch(SEND_AT_ONCE, &mut items) => {
                    read.map_err(|e| failed(&e.into()))?;
                    self.pass_on(&mut items).await?;
                }
                () = sleep_until(due) => {}
                () = &mut self.socket.ending => return Err(stops()),
            }
        }
    }

    async fn say(&mut self, mut envelope: Envelope) -> Result<(), Close> {
        envelope.client_id = Some(self.permit.client().to_owned());
        envelope.socket_id = Some(self.socket_id.clone());
        envelope.runtime_generation = Some(self.generation.clone()).filter(|generation| !generation.is_empty());
        self.socket.send(vec![envelope.to_json()]).await
    }

    async fn welcome(&mut self, hello: &Hello) -> Result<(), Close> {
        let mut payload = serde_json::to_value(self.socket.link.welcome(hello, self.sent)).unwrap_or_default();
        if let Some(had) = self.desk.had(&self.socket_id) {
            payload["ackedSeq"] = had.into();
        }
        self.say(Envelope::new(Type::Welcome).with(&payload)).await?;
        let own = self.generation.clone();
        // Whoever speaks of versions asks for what it missed, and finds it there.
        let known = hello.runtime_generation.as_ref().filter(|known| **known != own && !own.is_empty());
        if let Some(from) = known.filter(|_| hello.versions.is_empty()) {
            let payload = json!({"from": from, "to": own});
            self.say(Envelope::new(Type::RuntimeGenerationChanged).with(&payload)).await?;
        }
        self.snapshot().await
    }

    async fn snapshot(&mut self) -> Result<(), Close> {
        let shared = self.socket.shared.clone();
        let (state, seq) = self.desk.state(&shared.sockets).await.map_err(|e| failed(&e))?;
        self.generation.clone_from(&state.runtime_generation);
        let mut payload = serde_json::to_value(state).unwrap_or_default();
        payload["seq"] = seq.into();
        let is_there = shared.sockets.generation(self.permit.client()).is_some();
        payload["runtime"] = if is_there { "attached" } else { "away" }.into();
        self.say(Envelope::new(Type::StateSnapshot).with(&payload)).await
    }

    async fn answer(&mut self, said: Said) -> Result<(), Close> {
        match said {
            Said::State => self.snapshot().await,
            Said::Replay(asked) => self.replay(&asked).await,
            Said::Ack(seq) => {
                self.desk.acked(&self.socket_id, seq.min(self.sent));
                Ok(())
            }
            Said::Event(envelope) => self.asked(envelope).await,
            Said::Hello(..) | Said::Nothing => Ok(()),
        }
    }

    /// What is new, to be sent.
    async fn pass_on(&mut self, items: &mut Vec<Item>) -> Result<(), Close> {
        let is_behind = items.len() >= BEHIND;
        let (mut frames, mut joins) = (Vec::with_capacity(items.len()), Vec::new());
        for item in items.drain(..) {
            match item {
                Item::Record(record) if is_behind => joins.extend(desk::read(&record)),
                Item::Record(record) => frames.push(self.frame(&record)),
                Item::Gap(gap) => {
                    let (since, until) = (self.sent, gap.through.0);
                    let part = ReplayEvents { since, until, gone: Some((since, until)), ..ReplayEvents::default() };
                    frames.push(replay_frame(self.permit.client(), &part, &[]));
                    self.sent = until;
                }
                Item::Transient(_) | Item::End { .. } => {}
            }
        }
        let joined_bytes_max = self.socket.shared.terms.joined_bytes_max;
        for mut event in join(joins, joined_bytes_max) {
            event.extra.add("prev", &Value::from(self.sent));
            self.sent = event.seq.unwrap_or(self.sent);
            event.client_id = Some(self.permit.client().to_owned());
            frames.push(event.to_json());
        }
        self.socket.send(frames).await
    }

    /// A record as its frame.
    fn frame(&mut self, record: &Record) -> String {
        let (body, seq) = (desk::text(record), record.offset.0);
        let mut frame = String::with_capacity(128 + body.len());
        envelope::begin(&mut frame, Some(self.permit.client()), None);
        frame.extend([",\"seq\":", &seq.to_string(), ",\"prev\":", &self.sent.to_string(), body]);
        self.sent = seq;
        frame
    }

    /// What was missed, up to what is sent without being asked for.
    async fn replay(&mut self, asked: &Replay) -> Result<(), Close> {
        let shared = self.socket.shared.clone();
        let until = asked.until.unwrap_or(self.sent).min(self.sent);
        let max = asked.max.unwrap_or(usize::MAX).min(shared.terms.replay_events_max);
        let mut reader = shared.sockets.follow(&self.permit, asked.since).map_err(|e| failed(&e))?;
        let (mut events, mut items, mut gone, mut rest) = (Vec::new(), Vec::new(), None, false);
        'reading: loop {
            reader.available_batch(SEND_AT_ONCE, &mut items).await.map_err(|e| failed(&e.into()))?;
            if items.is_empty() {
                break;
            }
            for item in items.drain(..) {
                match item {
                    Item::Record(record) if record.offset.0 > until => break 'reading,
                    Item::Record(_) if events.len() >= max => {
                        rest = true;
                        break 'reading;
                    }
                    Item::Record(record) => {
                        let mut frame = String::with_capacity(128 + record.payload.len());
                        envelope::begin(&mut frame, Some(self.permit.client()), None);
                        frame.extend([",\"seq\":", &record.offset.0.to_string(), desk::text(&record)]);
                        events.push((record.offset.0, frame));
                    }
                    Item::Gap(gap) => gone = Some((asked.since, gap.through.0)),
                    Item::Transient(_) | Item::End { .. } => {}
                }
            }
        }
        let last = events.last().map_or(asked.since, |(seq, _)| *seq);
        let until = if rest { last } else { until.max(asked.since) };
        let of = ReplayEvents { since: asked.since, until, gone, more: false, rest };
        let client = self.permit.client().to_owned();
        for (part, events) in parts(&of, events, shared.terms.frame_bytes_max) {
            self.socket.send(vec![replay_frame(&client, &part, &events)]).await?;
        }
        if of.gone.is_some() { self.snapshot().await } else { Ok(()) }
    }

    /// Something for the runtime.
    async fn asked(&mut self, envelope: Envelope) -> Result<(), Close> {
        let sockets = self.socket.shared.sockets.clone();
        let Envelope { kind, turn_id, payload, .. } = &envelope;
        let event = |kind| Envelope { turn_id: turn_id.clone(), payload: payload.clone(), ..Envelope::new(kind) };
        let (aim, told) = match kind {
            Type::TurnStart if sockets.generation(self.permit.client()).is_none() => {
                (Aim::Begin, Some(event(Type::TurnQueued)))
            }
            Type::TurnStart => (Aim::Begin, None),
            Type::TurnAborted => (Aim::Stop, Some(event(Type::TurnAborted))),
            _ => (Aim::Other, None),
        };
        let mut body = String::new();
        envelope.body(&mut body);
        let ask = Ask {
            number: 0,
            client: self.permit.client().to_owned(),
            socket: self.socket_id.clone(),
            kind: kind.to_string(),
            turn: envelope.turn_id.clone().unwrap_or_default(),
            body,
        };
        let asked = sockets.ask(&self.permit, ask, aim, told.as_ref().map(desk::body)).await.map_err(|e| failed(&e))?;
        // It runs already, or it ran: that is what the asker wants to know.
        if asked == Asked::Known { self.snapshot().await } else { Ok(()) }
    }
}

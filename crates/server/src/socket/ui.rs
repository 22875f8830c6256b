//! Somebody who shows a client's stream, and asks its runtime.

use std::{collections::VecDeque, pin::pin, sync::Arc, time::Duration};

use serde_json::{Value, json};
use tokio::{
    sync::mpsc,
    time::{Instant, sleep, sleep_until},
};
use trunkline_agent_socket::{
    Close, Envelope, Type,
    close::code,
    envelope,
    link::{Hello, Replay, ReplayEvents, Said, join, replay_frame},
    transport::{Receiver, Sender},
};
use trunkline_core::{
    Error, Kind,
    limits::TokenBucket,
    socket::{Aim, Ask, Asked, Need, Permit, Sockets},
};
use trunkline_store::log::{Item, Reader};

use super::{
    Socket,
    agent::{ANSWERS_MAX, Line},
    desk::{Desk, SocketId},
    ends, failed, record,
};

/// Records that are read and sent at once.
const SEND_AT_ONCE: usize = 64;

/// Bytes of events in all frames that answer one request for replay, about; who wants more asks again.
const REPLAY_BYTES_MAX: usize = 8 * 1024 * 1024;

/// Whoever takes so long to take what it is sent does not keep up, and gets pieces of text joined.
const SLOW: Duration = Duration::from_millis(50);

/// The least time between two times at which what a socket had is kept.
const ACKS_PAUSE: Duration = Duration::from_secs(5);

/// What the socket said that it had.
#[derive(Clone, Copy, Default)]
struct Acks {
    had: u64,
    kept: u64,
    kept_at: Option<Instant>,
}

struct Ui<'a, S> {
    socket: &'a mut Socket<S>,
    permit: Permit,
    socket_id: SocketId,
    desk: Arc<Desk>,
    reader: Reader,
    /// The last event that was sent without being asked for.
    sent: u64,
    generation: String,
    is_slow: bool,
    acks: Acks,
    /// To the agent that it asked for, if it did.
    line: Option<Arc<Line>>,
    /// Of that line, to what was asked here.
    answers: mpsc::Sender<Envelope>,
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
    if let Some((generation, recovered)) = shared.sockets.generation(&client) {
        desk.settle(&shared.sockets, &generation, &recovered).await.map_err(|e| failed(&e))?;
    }
    let (mut line, mut early) = (None, None);
    if let Some(agent) = &hello.agent {
        match opened(socket, receiver, &desk, agent, &mut early).await? {
            Some(opened) => line = Some(opened),
            None => return Ok(()),
        }
    }
    let (state, sent) = desk.state(&shared.sockets).await.map_err(|e| failed(&e))?;
    let reader = shared.sockets.follow(&permit, record::offset(sent)).map_err(|e| failed(&e))?;
    let socket_id = desk.comes(said.socket_id);
    let acks = Acks::default();
    let generation = state.runtime_generation.clone();
    let (answers, mut answered) = mpsc::channel(ANSWERS_MAX);
    let mut ui = Ui { socket, permit, socket_id, desk, reader, sent, generation, is_slow: false, acks, line, answers };
    ui.welcome(hello).await?;
    if let Some(said) = early {
        ui.answer(said).await?;
    }
    let ended = ui.run(receiver, &mut answered).await;
    ui.keep_acks();
    ended
}

/// The line to the agent that was asked for; nothing if the other end goes away before it is open. One thing that is said
/// meanwhile is kept for later, and nothing after it is read.
async fn opened<S: Sender>(
    socket: &mut Socket<S>,
    receiver: &mut impl Receiver,
    desk: &Arc<Desk>,
    agent: &str,
    early: &mut Option<Said>,
) -> Result<Option<Arc<Line>>, Close> {
    let (shared, caller) = (socket.shared.clone(), socket.caller.clone());
    let mut opening = pin!(Line::open(&shared, &caller, desk, agent));
    loop {
        tokio::select! {
            line = &mut opening => return line.map(Some).map_err(|e| failed(&e)),
            frame = receiver.next(), if early.is_none() => match socket.hear(frame)? {
                Some(Said::Nothing) => {}
                Some(said) => *early = Some(said),
                None => return Ok(None),
            },
            ending = &mut socket.ending => return Err(ends(ending)),
        }
    }
}

impl<S: Sender> Ui<'_, S> {
    async fn run(
        &mut self,
        receiver: &mut impl Receiver,
        answered: &mut mpsc::Receiver<Envelope>,
    ) -> Result<(), Close> {
        let limits = self.socket.shared.web.limits;
        let mut bucket = TokenBucket::new(limits.messages_per_second, limits.message_burst, Instant::now().into_std());
        let mut items = Vec::new();
        loop {
            let beat = || {
                let beat = Envelope::new(Type::Heartbeat).with(&json!({"latestSeq": self.sent}));
                Envelope { client_id: Some(self.permit.client().to_owned()), ..beat }
            };
            self.socket.beat(beat).await?;
            let due = self.socket.until_due()?;
            tokio::select! {
                frame = receiver.next() => {
                    match self.socket.hear(frame)? {
                        Some(said) => self.answer(said).await?,
                        None => return Ok(()),
                    }
                    // One that says too much is heard more slowly.
                    while let Some(Err(wait)) = bucket.as_mut().map(|bucket| bucket.take(Instant::now().into_std())) {
                        sleep(wait).await;
                    }
                }
                read = self.reader.next_batch(SEND_AT_ONCE, &mut items) => {
                    read.map_err(|e| failed(&e.into()))?;
                    self.pass_on(&mut items).await?;
                }
                Some(answer) = answered.recv() => self.say(answer).await?,
                () = sleep_until(due) => {}
                () = ended(self.line.as_deref()) => return Err(Close::new(code::FAILED, "the line to the agent has ended")),
                ending = &mut self.socket.ending => return Err(ends(ending)),
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
        let had = self.socket.shared.sockets.had(&self.permit, &self.socket_id).await.map_err(|e| failed(&e))?;
        if let Some(had) = had {
            payload["ackedSeq"] = had.min(self.sent).into();
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
        let is_there = self.line.is_some() || shared.sockets.generation(self.permit.client()).is_some();
        payload["runtime"] = if is_there { "attached" } else { "away" }.into();
        self.say(Envelope::new(Type::StateSnapshot).with(&payload)).await
    }

    async fn answer(&mut self, said: Said) -> Result<(), Close> {
        match said {
            Said::State => self.snapshot().await,
            Said::Replay(asked) => self.replay(&asked).await,
            Said::Ack(seq) => {
                self.acks.had = self.acks.had.max(seq.min(self.sent));
                if self.acks.kept_at.is_none_or(|kept| kept.elapsed() >= ACKS_PAUSE) {
                    self.keep_acks();
                }
                Ok(())
            }
            Said::Event(envelope) => self.asked(envelope).await,
            Said::Hello(..) | Said::Has(_) | Said::Nothing => Ok(()),
        }
    }

    /// What it had is known to its socket when that comes back, also after a restart.
    fn keep_acks(&mut self) {
        let Acks { had, kept, .. } = self.acks;
        if had <= kept {
            return;
        }
        self.acks = Acks { had, kept: had, kept_at: Some(Instant::now()) };
        let (shared, permit, socket) =
            (self.socket.shared.clone(), self.desk.permit().clone(), self.socket_id.to_string());
        // Nobody waits for the ledger. It is told less than it had if that fails, which does no harm.
        self.socket.shared.tasks.spawn(async move {
            if let Err(error) = shared.sockets.put_had(&permit, &socket, had).await {
                tracing::debug!(%error, client = permit.client(), "what a socket had is not kept");
            }
        });
    }

    /// What is new, to be sent.
    async fn pass_on(&mut self, items: &mut Vec<Item>) -> Result<(), Close> {
        let (mut frames, mut joins, mut is_gone) = (Vec::new(), Vec::new(), false);
        for item in items.drain(..) {
            match item {
                Item::Record(record) if self.is_slow => {
                    joins.extend(record::events(&record).filter_map(|(seq, body)| record::read(seq, body)));
                }
                Item::Record(record) => {
                    for (seq, body) in record::events(&record) {
                        let before = std::mem::replace(&mut self.sent, seq);
                        frames.push(frame(self.permit.client(), seq, Some(before), body));
                    }
                }
                Item::Gap(gap) => {
                    frames.append(&mut self.joined(std::mem::take(&mut joins)));
                    is_gone = true;
                    let (since, until) = (self.sent, record::last_of(gap.through));
                    let part = ReplayEvents { since, until, gone: Some((since, until)), ..ReplayEvents::default() };
                    frames.push(replay_frame(self.permit.client(), &part, &[]));
                    self.sent = until;
                }
                Item::Transient(_) | Item::End { .. } => {}
            }
        }
        frames.append(&mut self.joined(joins));
        let begun = Instant::now();
        self.socket.send(frames).await?;
        self.is_slow = begun.elapsed() >= SLOW;
        if is_gone { self.snapshot().await } else { Ok(()) }
    }

    /// For somebody who does not keep up.
    fn joined(&mut self, events: Vec<Envelope>) -> Vec<String> {
        let mut frames = Vec::new();
        for mut event in join(events, self.socket.shared.terms.joined_bytes_max) {
            event.extra.add("prev", &Value::from(self.sent));
            self.sent = event.seq.unwrap_or(self.sent);
            event.client_id = Some(self.permit.client().to_owned());
            frames.push(event.to_json());
        }
        frames
    }

    /// What was missed, up to what is sent without being asked for; sent as it is read, so that whoever takes it slowly holds no
    /// more than a frame.
    async fn replay(&mut self, asked: &Replay) -> Result<(), Close> {
        let until = asked.until.unwrap_or(self.sent).min(self.sent);
        let max = asked.max.unwrap_or(usize::MAX).min(self.socket.shared.terms.replay_events_max);
        let missed = Missed::new(&self.socket.shared.sockets, &self.permit, (asked.since, until, max));
        let mut missed = missed.map_err(|e| failed(&e))?;
        let mut is_gone = false;
        loop {
            let part = missed.part(self.socket.shared.terms.frame_bytes_max).await;
            let (part, events) = part.map_err(|e| failed(&e))?;
            is_gone |= part.gone.is_some();
            self.socket.send(vec![replay_frame(self.permit.client(), &part, &events)]).await?;
            if !part.more {
                break;
            }
        }
        if is_gone { self.snapshot().await } else { Ok(()) }
    }

    /// Something for the runtime.
    async fn asked(&mut self, envelope: Envelope) -> Result<(), Close> {
        if let Some(line) = &self.line {
            return line.ask(envelope, &self.answers).await.map_err(|e| failed(&e));
        }
        let sockets = self.socket.shared.sockets.clone();
        let Envelope { kind, turn_id, payload, .. } = &envelope;
        let event = |kind| Envelope { turn_id: turn_id.clone(), payload: payload.clone(), ..Envelope::new(kind) };
        let (aim, told) = match kind {
            // Also where there is a runtime: it may leave before it has said anything of it.
            Type::TurnStart => (Aim::Begin, Some(event(Type::TurnQueued))),
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
            request: envelope.request_id.clone().unwrap_or_default(),
            body,
        };
        let asked = match sockets.ask(&self.permit, ask, aim, told.as_ref().map(record::alone)).await {
            // Said again at once, it would be refused again.
            Err(error) if envelope.request_id.is_some() && matches!(error.kind, Kind::Exhausted | Kind::Invalid) => {
                let why = json!({"error": error.message, "code": error.code});
                return self.say(acknowledged(envelope.request_id.unwrap_or_default()).with(&why)).await;
            }
            asked => asked.map_err(|e| failed(&e))?,
        };
        if asked == Asked::Known && *kind == Type::TurnStart {
            // It runs already, or it ran: that is what the asker wants to know.
            self.snapshot().await?;
        }
        match envelope.request_id {
            Some(request) => self.say(acknowledged(request)).await,
            None => Ok(()),
        }
    }
}

/// What a client missed: what is behind one event and not behind another, a frame at a time.
struct Missed {
    reader: Reader,
    client: String,
    /// The last event of the part before, and so where this one begins.
    since: u64,
    until: u64,
    /// Events and bytes that may still be sent.
    events_left: usize,
    bytes_left: usize,
    /// Read, and not sent yet.
    read: VecDeque<(u64, String)>,
    gone: Option<(u64, u64)>,
    is_read: bool,
}

impl Missed {
    fn new(sockets: &Sockets, permit: &Permit, (since, until, max): (u64, u64, usize)) -> Result<Self, Error> {
        // The record of the last one that was seen may have more.
        let reader = sockets.follow(permit, record::offset(since).saturating_sub(1))?;
        let (client, until) = (permit.client().to_owned(), until.max(since));
        let (events_left, bytes_left) = (max, REPLAY_BYTES_MAX);
        let (read, gone, is_read) = (VecDeque::new(), None, false);
        Ok(Self { reader, client, since, until, events_left, bytes_left, read, gone, is_read })
    }

    /// The next part, and its events as their frames.
    async fn part(&mut self, frame_bytes_max: usize) -> Result<(ReplayEvents, Vec<String>), Error> {
        // What a frame has besides.
        let room = frame_bytes_max.saturating_sub(1024);
        let (mut events, mut bytes, mut last) = (Vec::new(), 0, self.since);
        let (more, rest) = loop {
            self.fill().await?;
            let Some((seq, frame)) = self.read.front() else { break (false, false) };
            if self.events_left == 0 || self.bytes_left == 0 {
                break (false, true);
            }
            // One that is too large for any frame would have been refused when it came.
            if bytes + frame.len() + 1 > room && !events.is_empty() {
                break (true, false);
            }
            (bytes, last) = (bytes + frame.len() + 1, *seq);
            self.events_left -= 1;
            self.bytes_left = self.bytes_left.saturating_sub(frame.len());
            events.extend(self.read.pop_front().map(|(_, frame)| frame));
        };
        let until = if more || rest { last } else { self.until };
        let since = std::mem::replace(&mut self.since, last);
        Ok((ReplayEvents { since, until, gone: self.gone.take(), more, rest }, events))
    }

    /// Reads on, if nothing is left of what was read.
    async fn fill(&mut self) -> Result<(), Error> {
        let mut items = Vec::new();
        while self.read.is_empty() && !self.is_read {
            self.reader.available_batch(SEND_AT_ONCE, &mut items).await?;
            self.is_read = items.is_empty();
            for item in items.drain(..) {
                match item {
                    Item::Record(record) => {
                        let missed = record::events(&record).filter(|(seq, _)| *seq > self.since);
                        for (seq, body) in missed {
                            if seq > self.until {
                                self.is_read = true;
                                break;
                            }
                            self.read.push_back((seq, frame(&self.client, seq, None, body)));
                        }
                    }
                    Item::Gap(gap) if record::last_of(gap.through) > self.since => {
                        self.gone = Some((self.since, record::last_of(gap.through)));
                    }
                    Item::Gap(_) | Item::Transient(_) | Item::End { .. } => {}
                }
            }
        }
        Ok(())
    }
}

/// An event as its frame.
fn frame(client: &str, seq: u64, prev: Option<u64>, body: &str) -> String {
    let mut frame = String::with_capacity(128 + body.len());
    envelope::begin(&mut frame, Some(client), None);
    frame.extend([",\"seq\":", &seq.to_string()]);
    if let Some(prev) = prev {
        frame.extend([",\"prev\":", &prev.to_string()]);
    }
    frame.push_str(body);
    frame
}

/// That a request was taken.
pub(super) fn acknowledged(request: String) -> Envelope {
    Envelope { request_id: Some(request), ..Envelope::new(Type::Ack) }
}

/// Waits until the line to the agent ends, if there is one.
async fn ended(line: Option<&Line>) {
    match line {
        Some(line) => line.ended().await,
        None => std::future::pending().await,
    }
}

//! What a client knows and does, without a socket and without a clock.

use std::{collections::VecDeque, time::Duration};

use super::{Options, View};
use crate::{
    close::Close,
    envelope::{Envelope, Type, VERSION, parse},
    link::{Hello, Replay, ReplayEvents, Role, Welcome},
    state::RuntimeState,
};

/// Events that wait for what is before them. What is beyond it is asked for again.
const HELD_MAX: usize = 1000;

/// Requests that the server has not answered; who makes more waits.
const PENDING_MAX: usize = 256;

/// What follows from something.
#[derive(Debug)]
pub(super) enum Effect {
    /// Handlers are to see this.
    Handle(Envelope),
    /// The server is to be told this.
    Send(Envelope),
}

/// A request that the server has not answered.
struct Pending {
    said: Envelope,
    /// Heartbeats since it was said over this connection.
    beats: u32,
}

pub(super) struct Core {
    client_id: String,
    agent: Option<String>,
    socket_id: Option<String>,
    generation: Option<String>,
    seen: u64,
    ack_every: u32,
    unacked: u32,
    is_in: bool,
    /// What was missed is on its way.
    is_replaying: bool,
    held: VecDeque<Envelope>,
    pending: Vec<Pending>,
    /// Whether the server answers each request by its id.
    acks_requests: bool,
    /// Anything came since the last heartbeat.
    has_heard: bool,
    state: Option<RuntimeState>,
    /// The last event that is in the state.
    state_seq: u64,
    /// The server's heartbeat, as long as nobody took note of it.
    terms: Option<Duration>,
}

impl Core {
    pub(super) fn new(options: &Options) -> Self {
        Self {
            client_id: options.client_id.clone(),
            agent: options.agent.clone(),
            socket_id: None,
            generation: options.runtime_generation.clone(),
            seen: options.last_seen_seq,
            ack_every: options.ack_every,
            unacked: 0,
            is_in: false,
            is_replaying: false,
            held: VecDeque::new(),
            pending: Vec::new(),
            acks_requests: false,
            has_heard: false,
            state: None,
            state_seq: 0,
            terms: None,
        }
    }

    pub(super) fn view(&self) -> View {
        let (generation, state) = (self.generation.clone(), self.state.clone());
        View { is_connected: self.is_in, seq: self.seen, generation, state }
    }

    /// The server's heartbeat, once.
    pub(super) fn takes_terms(&mut self) -> Option<Duration> {
        self.terms.take()
    }

    /// What the server is told first.
    pub(super) fn hello(&self) -> Envelope {
        let hello = Hello {
            last_seen_seq: Some(self.seen),
            runtime_generation: self.generation.clone(),
            role: Role::Ui,
            versions: vec![VERSION],
            agent: self.agent.clone(),
            recovered_turns: Vec::new(),
        };
        self.own(Envelope::new(Type::Hello).with(&hello))
    }

    /// The connection ended; answers whether the client had been let in.
    pub(super) fn leave(&mut self) -> bool {
        self.is_replaying = false;
        self.has_heard = false;
        self.held.clear();
        self.pending.iter_mut().for_each(|pending| pending.beats = 0);
        std::mem::take(&mut self.is_in)
    }

    pub(super) fn is_in(&self) -> bool {
        self.is_in
    }

    pub(super) fn has_room(&self) -> bool {
        self.pending.len() < PENDING_MAX
    }

    /// Whether the server will still answer something that was asked.
    pub(super) fn expects_answers(&self) -> bool {
        self.is_in && self.acks_requests && !self.pending.is_empty()
    }

    /// The program wants something said.
    pub(super) fn order(&mut self, envelope: Envelope) -> Vec<Effect> {
        let mut said = self.own(envelope);
        if said.kind.is_event() {
            said.request_id.get_or_insert_with(|| uuid::Uuid::now_v7().to_string());
            self.pending.push(Pending { said: said.clone(), beats: 0 });
        }
        // What is no event means something only now.
        if !self.is_in {
            return Vec::new();
        }
        self.is_replaying |= said.kind == Type::ReplayRequest;
        vec![Effect::Send(said)]
    }

    /// A heartbeat's time is over.
    pub(super) fn beat(&mut self) -> Vec<Effect> {
        let mut effects = vec![Effect::Send(self.own(Envelope::new(Type::Heartbeat)))];
        if self.unacked > 0 && self.ack_every > 0 {
            effects.push(self.ack());
        }
        // What got lost on the way is said again.
        if self.is_replaying {
            effects.push(self.replay());
        }
        if self.state.is_none() {
            effects.push(Effect::Send(self.own(Envelope::new(Type::StateRequest))));
        }
        let has_heard = std::mem::take(&mut self.has_heard);
        let is_repeated = |said: &Envelope| self.acks_requests || said.kind == Type::TurnStart;
        // A server that acknowledges nothing had what was said long before it was heard. Nothing may ever answer that.
        self.pending.retain(|pending| is_repeated(&pending.said) || pending.beats == 0 || !has_heard);
        for pending in &mut self.pending {
            if pending.beats > 0 && is_repeated(&pending.said) {
                effects.push(Effect::Send(pending.said.clone()));
            }
            pending.beats += 1;
        }
        effects
    }

    /// A frame came.
    pub(super) fn hear(&mut self, frame: &[u8]) -> Result<Vec<Effect>, Close> {
        let envelope = parse(frame)?;
        self.has_heard = true;
        let mut effects = Vec::new();
        match envelope.kind {
            Type::Ack if envelope.request_id.is_some() => {
                self.pending.retain(|pending| pending.said.request_id != envelope.request_id);
            }
            Type::Welcome => self.welcomed(&envelope, &mut effects),
            Type::StateSnapshot => self.snapshot(&envelope),
            Type::ReplayEvents => {
                self.replayed(&envelope, &mut effects)?;
            }
            Type::Heartbeat => {
                let latest = envelope.value().get("latestSeq").and_then(serde_json::Value::as_u64);
                if latest.is_some_and(|latest| latest > self.seen) {
                    self.ask_for_missed(&mut effects);
                }
            }
            _ => {}
        }
        match envelope.seq {
            Some(seq) if envelope.kind.is_event() => self.event(seq, envelope, &mut effects),
            _ => {
                if envelope.kind == Type::RuntimeGenerationChanged {
                    self.knows(&envelope);
                    self.ask_for_missed(&mut effects);
                }
                effects.push(Effect::Handle(envelope));
            }
        }
        Ok(effects)
    }

    fn welcomed(&mut self, envelope: &Envelope, effects: &mut Vec<Effect>) {
        self.is_in = true;
        self.socket_id.clone_from(&envelope.socket_id);
        self.knows(envelope);
        let welcome = envelope.read::<Welcome>().unwrap_or_default();
        if welcome.heartbeat_ms > 0 {
            self.terms = Some(Duration::from_millis(welcome.heartbeat_ms));
        }
        if welcome.latest_seq.is_some_and(|latest| latest < self.seen) {
            // Its numbers begin again: it is another stream than the one that was seen.
            (self.seen, self.state, self.state_seq) = (0, None, 0);
        }
        // Whoever does not say how far it is may have something.
        if welcome.latest_seq.is_none_or(|latest| latest > self.seen) {
            self.ask_for_missed(effects);
        }
        self.acks_requests = welcome.acks_requests;
        effects.extend(self.pending.iter().map(|pending| Effect::Send(pending.said.clone())));
    }

    fn snapshot(&mut self, envelope: &Envelope) {
        if let Some(state) = envelope.read::<RuntimeState>() {
            self.state_seq = envelope.value()["seq"].as_u64().unwrap_or(self.seen);
            self.state = Some(state);
        }
    }

    fn replayed(&mut self, envelope: &Envelope, effects: &mut Vec<Effect>) -> Result<(), Close> {
        let payload = envelope.payload.as_ref().map_or("{}", |payload| payload.get());
        let events = events_of(payload);
        let part = serde_json::from_str::<ReplayEvents>(payload).unwrap_or_default();
        // It was asked for from further back, or an answer came twice: what is between is not missing.
        for event in events {
            let event = parse(event.get().as_bytes())?;
            if let Some(seq) = event.seq
                && seq > self.seen
            {
                self.accept(seq, event, effects);
            }
        }
        if part.since > self.seen {
            // Told of what is gone further on, while what is before it is on its way, or has to be asked for.
            self.ask_for_missed(effects);
            return Ok(());
        }
        self.seen = self.seen.max(part.until);
        if part.gone.is_some() {
            // What followed from what is gone comes with a fresh one.
            self.state = None;
        }
        if part.rest {
            effects.push(self.replay());
        } else if !part.more {
            self.is_replaying = false;
            self.release(effects);
        }
        Ok(())
    }

    /// An event that was not asked for.
    fn event(&mut self, seq: u64, event: Envelope, effects: &mut Vec<Effect>) {
        if seq <= self.seen {
            return;
        }
        let is_next = event.extra.get("prev").and_then(|prev| prev.as_u64()).is_none_or(|prev| prev <= self.seen);
        if is_next && !self.is_replaying {
            self.accept(seq, event, effects);
            return;
        }
        if self.held.len() < HELD_MAX && self.held.back().is_none_or(|last| last.seq < Some(seq)) {
            self.held.push_back(event);
        }
        self.ask_for_missed(effects);
    }

    /// Takes what waited for what was missed.
    fn release(&mut self, effects: &mut Vec<Effect>) {
        for event in std::mem::take(&mut self.held) {
            self.event(event.seq.unwrap_or(0), event, effects);
        }
    }

    fn accept(&mut self, seq: u64, event: Envelope, effects: &mut Vec<Effect>) {
        self.seen = seq;
        self.knows(&event);
        if let Some(state) = &mut self.state
            && seq > self.state_seq
        {
            state.apply(&event);
        }
        self.settle(&event);
        effects.push(Effect::Handle(event));
        self.unacked += 1;
        if self.ack_every > 0 && self.unacked >= self.ack_every {
            effects.push(self.ack());
        }
    }

    /// Forgets what was said and is answered by this.
    fn settle(&mut self, event: &Envelope) {
        // A server that acknowledges requests says itself which it took.
        let guesses = !self.acks_requests;
        let is_answered = |said: &Envelope| match said.kind {
            Type::TurnStart if said.turn_id.is_none() => guesses,
            Type::TurnStart => said.turn_id == event.turn_id,
            Type::TurnAborted => event.kind.ends_turn() && said.turn_id == event.turn_id,
            Type::ApprovalResolve => guesses && said.operation_id.is_some() && said.operation_id == event.operation_id,
            _ => false,
        };
        self.pending.retain(|pending| !is_answered(&pending.said));
    }

    fn knows(&mut self, envelope: &Envelope) {
        if envelope.runtime_generation.is_some() {
            self.generation.clone_from(&envelope.runtime_generation);
        }
    }

    fn ask_for_missed(&mut self, effects: &mut Vec<Effect>) {
        if !std::mem::replace(&mut self.is_replaying, true) {
            effects.push(self.replay());
        }
    }

    fn replay(&self) -> Effect {
        let asked = Replay { since: self.seen, until: None, max: None };
        Effect::Send(self.own(Envelope::new(Type::ReplayRequest).with(&asked)))
    }

    fn ack(&mut self) -> Effect {
        self.unacked = 0;
        Effect::Send(self.own(Envelope { ack: Some(self.seen), ..Envelope::new(Type::Ack) }))
    }

    fn own(&self, mut envelope: Envelope) -> Envelope {
        envelope.client_id = Some(self.client_id.clone());
        envelope.socket_id.clone_from(&self.socket_id);
        envelope
    }
}

/// The events of a `replay_events`, as they stand in it.
fn events_of(payload: &str) -> Vec<&serde_json::value::RawValue> {
    #[derive(Default, serde::Deserialize)]
    #[serde(default)]
    struct Events<'a> {
        #[serde(borrow)]
        events: Vec<&'a serde_json::value::RawValue>,
    }
    serde_json::from_str::<Events<'_>>(payload).unwrap_or_default().events
}

//! Who writes to a conversation: one task for each that is written to, so that every record knows where the conversation
//! stands. What comes while it writes is written together.

use std::{
    collections::HashMap,
    sync::{
        Arc, OnceLock,
        atomic::{AtomicBool, Ordering::SeqCst},
    },
    time::Duration,
};

use tokio::{
    sync::{OwnedSemaphorePermit, Semaphore, mpsc, oneshot},
    time::timeout,
};
use trunkline_store::log::{Append, ContentDigest, Item, Offset, Topic};
use uuid::Uuid;

use super::{
    Conversations, Row, iso, missing,
    record::{self, Delta},
    said::{Activity, Phase, Said, Text, Typing},
    state::{Act, Event, File, Kind, Message, Participant, Reason, Refused, Standing, decide},
};
use crate::{
    app::{Agent, Payload},
    error::{Error, Kind as ErrorKind},
    gate::ConversationPermit,
    json::{Cut, Half},
    message::{CHAT, Envelope, json},
    session::Heard,
    topic::{conversation_deltas, conversation_events},
};

/// What waits to be written to one conversation, and its bytes besides the last one's; whoever has more waits.
const OPS_MAX: usize = 64;
const OPS_BYTES_MAX: usize = 2 * 1024 * 1024;

/// Bytes that are written at once, about.
const BATCH_BYTES: usize = 1024 * 1024;

/// Messages of one conversation that are being streamed at once, and their bytes besides the longest one's. Of more, the oldest is
/// forgotten: its agent went away in the middle of it.
const STREAMS_MAX: usize = 16;
const STREAMS_BYTES_MAX: usize = 1024 * 1024;

/// What is being streamed is forgotten when nobody says anything for so long; it is in the log.
const STREAMS_IDLE: Duration = Duration::from_secs(60);

/// A conversation that is in use.
pub(super) struct Desk {
    pub(super) row: Row,
    ops: OnceLock<mpsc::Sender<Op>>,
    /// Bytes that may still wait.
    room: Arc<Semaphore>,
    /// It is erased: nothing is written any more.
    is_gone: AtomicBool,
}

/// Who takes part besides the user.
#[derive(Clone, Debug)]
pub(super) struct Party {
    /// Where it is.
    pub(super) lane: String,
    pub(super) participant: Participant,
}

/// A message of the user.
#[derive(Debug)]
pub(super) struct Post {
    pub(super) id: Uuid,
    pub(super) content: String,
    pub(super) files: Vec<File>,
    /// It may come twice.
    pub(super) is_named: bool,
}

/// What may come twice and is to take effect once: its name, and what it says.
#[derive(Clone, Debug)]
pub(super) struct Once {
    pub(super) name: String,
    pub(super) content: ContentDigest,
}

impl Post {
    fn once(&self) -> Option<Once> {
        let content = || ContentDigest::of(&[self.content.as_bytes()]);
        self.is_named.then(|| Once { name: dedup(self.id), content: content() })
    }
}

/// Something that is to be done.
#[derive(Debug)]
pub(super) enum What {
    Post(Post),
    /// Something that somebody else says; under a name, once; and how far it had heard by then.
    Say(Party, Said, Option<Box<Once>>, Option<Box<Heard>>),
    /// Something of the server's own.
    Act(Act),
}

pub(super) struct Op {
    /// Keeps the conversation in use, so that nobody else writes.
    desk: Arc<Desk>,
    what: What,
    answer: oneshot::Sender<Result<(), Error>>,
    _room: OwnedSemaphorePermit,
}

/// What an act becomes.
#[derive(Default)]
struct Prepared {
    appends: Vec<Append>,
    events: Vec<Event>,
    /// The end of what was streamed, which is told also if the whole was said before.
    end: Option<Append>,
}

/// A message that is being streamed.
struct Streamed {
    message_id: Uuid,
    text: String,
    /// Half a character at the end of the text, which is not in it.
    half: Option<Half>,
    count: u64,
    /// The place of its beginning among the others.
    order: u64,
}

impl Desk {
    pub(super) fn new(row: Row) -> Self {
        let room = Arc::new(Semaphore::new(OPS_BYTES_MAX));
        Self { row, ops: OnceLock::new(), room, is_gone: AtomicBool::new(false) }
    }

    pub(super) fn is_gone(&self) -> bool {
        self.is_gone.load(SeqCst)
    }

    /// Nothing is written any more.
    pub(super) fn forget(&self) {
        self.is_gone.store(true, SeqCst);
    }

    /// Nothing is written behind this.
    pub(super) async fn close(self: &Arc<Self>, conversations: &Conversations) -> Result<(), Error> {
        self.is_gone.store(true, SeqCst);
        // Behind what is being written.
        match self.run(conversations, What::Act(Act::EndTurn(Reason::Closed, None))).await {
            Err(error) if error.kind == ErrorKind::NotFound => Ok(()),
            closed => closed,
        }
    }

    /// Has something done, in the order of the calls; what this resolves to says when it is durable. It is done though nobody
    /// waits for that.
    pub(super) async fn submit(
        self: &Arc<Self>,
        conversations: &Conversations,
        what: What,
    ) -> Result<oneshot::Receiver<Result<(), Error>>, Error> {
        let ops = self.ops.get_or_init(|| {
            let (sender, ops) = mpsc::channel(OPS_MAX);
            let writer = Writer::new(conversations.clone(), self.row.clone());
            conversations.spawn(writer.run(ops));
            sender
        });
        let (answer, answered) = oneshot::channel();
        let stops = || Error::new(ErrorKind::Unavailable, "ERR_UNAVAILABLE", "the server stops");
        let bytes = u32::try_from(what.bytes().clamp(1, OPS_BYTES_MAX)).unwrap_or(u32::MAX);
        let room = self.room.clone().acquire_many_owned(bytes).await.map_err(|_| stops())?;
        ops.send(Op { desk: self.clone(), what, answer, _room: room }).await.map_err(|_| stops())?;
        Ok(answered)
    }

    /// As [`Desk::submit`], until it is durable.
    pub(super) async fn run(self: &Arc<Self>, conversations: &Conversations, what: What) -> Result<(), Error> {
        let answered = self.submit(conversations, what).await?;
        let gone = |_| Error::new(ErrorKind::Unavailable, "ERR_UNAVAILABLE", "the server stops");
        answered.await.map_err(gone)?
    }
}

struct Writer {
    conversations: Conversations,
    row: Row,
    permit: ConversationPermit,
    lane: String,
    /// Nothing when it has to be looked up.
    standing: Option<Standing>,
    /// What is being streamed, by who and by what that one calls it. Nothing when it has to be looked up.
    streams: Option<HashMap<(String, String), Streamed>>,
}

impl Writer {
    fn new(conversations: Conversations, row: Row) -> Self {
        let permit = ConversationPermit::own(row.id);
        let lane = row.lane();
        Self { conversations, row, permit, lane, standing: None, streams: None }
    }

    async fn run(mut self, mut ops: mpsc::Receiver<Op>) {
        let (mut waiting, stop) = (Vec::new(), self.conversations.stop().clone());
        loop {
            // What waits is written; whoever comes later hears that the server stops.
            match stop.run_until_cancelled(self.receive(&mut ops, &mut waiting)).await {
                Some(0) => return,
                Some(_) => {}
                None => {
                    ops.close();
                    if ops.recv_many(&mut waiting, OPS_MAX).await == 0 {
                        return;
                    }
                }
            }
            let mut rest = waiting.drain(..).peekable();
            while let Some(first) = rest.next() {
                let mut together = vec![first];
                while let Some(next) = rest.next_if(|next| !together[0].what.is_named() && !next.what.is_named()) {
                    together.push(next);
                }
                self.write(together).await;
            }
        }
    }

    /// Waits for something to do; answers how much that is, 0 for never again. Cancel-safe.
    async fn receive(&mut self, ops: &mut mpsc::Receiver<Op>, waiting: &mut Vec<Op>) -> usize {
        if self.streams.as_ref().is_some_and(|streams| !streams.is_empty()) {
            match timeout(STREAMS_IDLE, ops.recv_many(waiting, OPS_MAX)).await {
                Ok(count) => return count,
                Err(_) => self.streams = None,
            }
        }
        ops.recv_many(waiting, OPS_MAX).await
    }

    /// Writes what goes together: one thing that may come twice, or several others.
    async fn write(&mut self, ops: Vec<Op>) {
        let mut ops = ops.into_iter().peekable();
        while ops.peek().is_some() {
            let (mut appends, mut taken, mut bytes) = (Vec::new(), Vec::new(), 0);
            let mut standing = match self.load().await {
                Ok(standing) => standing,
                Err(error) => return ops.for_each(|op| op.answer(Err(error.clone()))),
            };
            while bytes < BATCH_BYTES
                && let Some(op) = ops.next()
            {
                if op.desk.is_gone() {
                    op.answer(Err(missing()));
                    continue;
                }
                match self.prepare(&op.what, &mut standing).await {
                    Ok(Prepared { appends: own, .. }) if own.is_empty() => op.answer(Ok(())),
                    Ok(prepared) => {
                        bytes += prepared.appends.iter().map(Append::bytes).sum::<usize>();
                        let Prepared { appends: own, events, end } = prepared;
                        appends.extend(own);
                        taken.push((op, events, end));
                    }
                    Err(error) => {
                        // It may be refused because it took effect when it came first.
                        let before = self.done_before(&op.what).await;
                        op.answer(before.unwrap_or(Err(error)));
                    }
                }
            }
            if taken.is_empty() {
                continue;
            }
            match self.conversations.gate().append_to_conversation(&self.permit, appends).await {
                Ok(appended) if appended.first().is_some_and(|first| first.duplicate) => {
                    // It was alone, and changes nothing.
                    let offset = appended[0].offset;
                    for (op, _, end) in taken {
                        let answer = self.confirm(&op.what, offset, end).await;
                        op.answer(answer);
                    }
                }
                Ok(_) => {
                    self.standing = Some(standing);
                    for (op, events, _) in taken {
                        self.told(&events);
                        op.answer(Ok(()));
                    }
                }
                Err(error) => {
                    if error.code != super::KEY_REUSED {
                        tracing::warn!(%error, conversation = %self.row.id, "nothing was written to a conversation");
                    }
                    (self.standing, self.streams) = (None, None);
                    taken.into_iter().for_each(|(op, ..)| op.answer(Err(error.clone())));
                }
            }
        }
    }

    /// Where it stands, by its last record.
    async fn load(&mut self) -> Result<Standing, Error> {
        if let Some(standing) = &self.standing {
            return Ok(standing.clone());
        }
        let standing = self.conversations.standing(&self.permit).await?;
        self.standing = Some(standing.clone());
        Ok(standing)
    }

    async fn prepare(&mut self, what: &What, standing: &mut Standing) -> Result<Prepared, Error> {
        match what {
            What::Post(post) => {
                let message = Message {
                    id: post.id,
                    content: post.content.clone(),
                    from: Kind::User,
                    turn_number: 0,
                    created_at: String::new(),
                    participant: None,
                    files: post.files.clone(),
                };
                let act = Act::Say { message: message.into(), more: false };
                self.act(act, standing, None, post.once())
            }
            What::Act(act) => self.act(act.clone(), standing, None, None),
            What::Say(party, said, once, heard) => {
                let mut prepared = self.say(party, said, standing, once.as_deref().cloned()).await?;
                // Pieces of an answer prove nothing before its end.
                let heard = heard.as_ref().filter(|_| !prepared.events.is_empty());
                prepared.appends.extend(heard.map(|heard| heard.append().with_first()));
                Ok(prepared)
            }
        }
    }

    async fn say(
        &mut self,
        party: &Party,
        said: &Said,
        standing: &mut Standing,
        once: Option<Once>,
    ) -> Result<Prepared, Error> {
        if let Some(once) = &once
            && self.is_piece_known(said, once).await?
        {
            return Ok(Prepared::default());
        }
        match said {
            Said::Text(text) => {
                let streamed = match &text.id {
                    Some(id) => self.streams().await?.remove(&(party.lane.clone(), id.clone())),
                    None => None,
                };
                let end = match (&text.id, &streamed) {
                    (Some(id), Some(streamed)) => Some(self.end(party, id, streamed)?),
                    _ => None,
                };
                let id = streamed.map_or_else(Uuid::now_v7, |streamed| streamed.message_id);
                let mut prepared = self.text(party, text, id, standing, once)?;
                prepared.appends.extend(end.clone().map(Append::with_first));
                prepared.end = end;
                Ok(prepared)
            }
            Said::Delta { id, text, is_start } => self.delta(party, (id, text), *is_start, once).await,
            Said::Done { id, more } => {
                let Some(mut streamed) = self.streams().await?.remove(&(party.lane.clone(), id.clone())) else {
                    let why = format!("nothing was streamed as {id:?}");
                    return Err(Error::new(ErrorKind::Invalid, "ERR_INVALID_ARGUMENT", why));
                };
                let end = self.end(party, id, &streamed)?;
                if streamed.half.is_some() {
                    streamed.text.push(char::REPLACEMENT_CHARACTER);
                }
                let text = Text { text: streamed.text, more: *more, ..Text::default() };
                let mut prepared = self.text(party, &text, streamed.message_id, standing, once)?;
                prepared.appends.push(end.clone().with_first());
                prepared.end = Some(end);
                Ok(prepared)
            }
            Said::EndTurn(reason) => self.act(Act::EndTurn(*reason, None), standing, None, once),
            Said::Be(state, words) => self.act(Act::Be(*state, words.clone()), standing, None, once),
            Said::Join => self.act(Act::Join(party.lane.clone()), standing, None, once),
            Said::Leave => self.act(Act::Leave(party.lane.clone()), standing, None, once),
            Said::LockOut(lock_out) => match lock_out.state() {
                Some(state) => self.act(Act::Be(state, lock_out.user_message.clone()), standing, None, once),
                None => Ok(Prepared::default()),
            },
            // It is no record.
            Said::Typing(_) => Ok(Prepared::default()),
        }
    }

    fn text(
        &self,
        party: &Party,
        text: &Text,
        id: Uuid,
        standing: &mut Standing,
        once: Option<Once>,
    ) -> Result<Prepared, Error> {
        let mut participant = party.participant.clone();
        if let Some(name) = &text.name {
            participant = Participant::new(&participant.id, participant.kind, name, participant.photo_url);
        }
        participant.photo_url = text.photo_url.clone().or(participant.photo_url);
        let message = Message {
            id,
            content: text.text.clone(),
            from: participant.kind,
            turn_number: 0,
            created_at: String::new(),
            participant: Some(participant),
            files: Vec::new(),
        };
        self.act(Act::Say { message: message.into(), more: text.more }, standing, Some(party), once)
    }

    /// What follows from an act, for the conversation and for whoever hears it.
    fn act(
        &self,
        mut act: Act,
        standing: &mut Standing,
        by: Option<&Party>,
        once: Option<Once>,
    ) -> Result<Prepared, Error> {
        let now = self.conversations.now().max(standing.last_message_ms);
        if let Act::Say { message, .. } = &mut act {
            message.created_at = iso(now);
        }
        let events = decide(standing, act, now).map_err(refused)?;
        let (topic, mut appends) = (conversation_events(self.row.id)?, Vec::new());
        for event in &events {
            standing.apply(event, now);
            appends.push(Append::new(&topic, record::encode(standing, event)?));
            if let Event::Message(message) = event {
                self.copies(message, standing, by, &mut appends)?;
            }
        }
        if let Some(once) = once {
            // The first one has the name; what follows from it may be something else by now.
            let mut rest = appends.into_iter();
            let first = rest.next().map(|first| first.dedup_with(once.name, once.content));
            appends = first.into_iter().chain(rest.map(Append::with_first)).collect();
        }
        Ok(Prepared { appends, events, end: None })
    }

    /// What the agent and the operators are told of a message.
    fn copies(
        &self,
        message: &Message,
        standing: &Standing,
        by: Option<&Party>,
        appends: &mut Vec<Append>,
    ) -> Result<(), Error> {
        let Some((_, agent)) = self.conversations.apps().agent(&self.row.app, self.row.agent) else {
            return Ok(());
        };
        let workspace = agent.workspace();
        let about = self.conversations.about(&self.row, message)?;
        let mut copy = |lane: &str, payload: &[u8], about: &_| {
            let envelope = Envelope::with_metadata(&self.lane, workspace, CHAT, payload, about)?;
            appends.push(Append::new(&Topic::new(lane)?, envelope));
            Ok::<_, Error>(())
        };
        if message.from == Kind::User {
            let (payload, content_type) = payload_for(&agent, self.row.id, message, &about)?;
            let mut about = about.clone();
            about.insert("content_type".to_owned(), content_type.to_owned());
            copy(&agent.identity, &payload, &about)?;
        }
        let own = by.map(|party| party.lane.as_str());
        let others = standing.operators.iter().filter(|lane| Some(lane.as_str()) != own);
        // Whoever may not write there any more does not hear it either.
        for lane in others.filter(|lane| self.conversations.may_take_part(&self.row, &agent, lane)) {
            copy(lane, message.content.as_bytes(), &about)?;
        }
        Ok(())
    }

    /// Whether this is a piece that was told under its name already: told again, it would be in the text twice. Refuses a name
    /// that was given to something else. Pieces lie beside the rest, so that the log alone does not see either.
    async fn is_piece_known(&self, said: &Said, Once { name, content }: &Once) -> Result<bool, Error> {
        let gate = self.conversations.gate();
        let is_piece = matches!(said, Said::Delta { .. });
        Ok(gate.find_piece(&self.permit, name, *content).await?.is_some()
            || is_piece && gate.find_said(&self.permit, name, *content).await?.is_some())
    }

    async fn delta(
        &mut self,
        party: &Party,
        (id, piece): (&str, &Cut),
        is_start: bool,
        once: Option<Once>,
    ) -> Result<Prepared, Error> {
        let most = self.conversations.text_bytes_max();
        let key = (party.lane.clone(), id.to_owned());
        let (topic, permit) = (conversation_deltas(self.row.id)?, self.permit.clone());
        let streams = self.streams().await?;
        forget_streams(streams, &key, piece.text.len());
        let order = streams.values().map(|streamed| streamed.order + 1).max().unwrap_or(0);
        let fresh = || Streamed { message_id: Uuid::now_v7(), text: String::new(), half: None, count: 0, order };
        let streamed = streams.entry(key.clone()).or_insert_with(fresh);
        if is_start {
            (streamed.count, streamed.text, streamed.half) = (0, String::new(), None);
        }
        let text = joined(streamed.half, piece);
        if streamed.text.len() + text.len() > most {
            let why = format!("what was streamed as {id:?} has more than {most} bytes");
            return Err(Error::new(ErrorKind::Invalid, "ERR_PAYLOAD_TOO_LARGE", why));
        }
        let (message_id, index) = (streamed.message_id, streamed.count);
        streamed.text.push_str(&text);
        (streamed.half, streamed.count) = (piece.ends, streamed.count + 1);
        let delta = Delta { message_id, index, text, half: piece.ends, is_end: false, by: key };
        if index == 0 {
            // Whoever sees no pieces sees that there will be something.
            let label = party.participant.name.clone().unwrap_or_default();
            let typing = Typing { kind: Activity::Typing, state: Phase::Start, label };
            self.conversations.publish(&permit, &typing)?;
        }
        let append = Append::new(&topic, json(&delta)?);
        let append = match once {
            Some(once) => append.dedup_with(once.name, once.content),
            None => append,
        };
        Ok(Prepared { appends: vec![append], ..Prepared::default() })
    }

    fn end(&self, party: &Party, id: &str, streamed: &Streamed) -> Result<Append, Error> {
        let by = (party.lane.clone(), id.to_owned());
        let (message_id, index) = (streamed.message_id, streamed.count);
        let end = Delta { message_id, index, text: String::new(), half: None, is_end: true, by };
        Ok(Append::new(&conversation_deltas(self.row.id)?, json(&end)?))
    }

    /// What is being streamed: after a restart, what was before.
    async fn streams(&mut self) -> Result<&mut HashMap<(String, String), Streamed>, Error> {
        if self.streams.is_none() {
            let mut reader = self.conversations.gate().conversation_deltas(&self.permit)?;
            let (mut streams, mut items, mut order) = (HashMap::new(), Vec::new(), 0);
            loop {
                reader.available_batch(256, &mut items).await?;
                if items.is_empty() {
                    break;
                }
                for item in items.drain(..) {
                    let Item::Record(record) = item else { continue };
                    let Ok(Delta { message_id, index, text, half, is_end, by }) = record::delta(&record) else {
                        continue;
                    };
                    if is_end {
                        streams.remove(&by);
                        continue;
                    }
                    order += 1;
                    forget_streams(&mut streams, &by, text.len());
                    let fresh = || Streamed { message_id, text: String::new(), half: None, count: 0, order };
                    let streamed = streams.entry(by).or_insert_with(fresh);
                    if index == 0 {
                        streamed.text.clear();
                    }
                    streamed.text.push_str(&text);
                    (streamed.half, streamed.count) = (half, index + 1);
                }
            }
            self.streams = Some(streams);
        }
        Ok(self.streams.get_or_insert_default())
    }

    /// What became of it when it came first, if it has a name and did.
    async fn done_before(&self, what: &What) -> Option<Result<(), Error>> {
        let once = match what {
            What::Post(post) => post.once(),
            What::Say(_, _, once, _) => once.as_deref().cloned(),
            What::Act(_) => None,
        };
        let Once { name, content } = once?;
        let found = self.conversations.gate().find_said(&self.permit, &name, content).await;
        found.map(|offset| offset.map(|_| ())).transpose()
    }

    /// What was written already, and came again: the same, or something else under its name.
    async fn confirm(&self, what: &What, offset: Offset, end: Option<Append>) -> Result<(), Error> {
        if let Some(end) = end {
            self.conversations.gate().append_to_conversation(&self.permit, vec![end]).await?;
        }
        let What::Post(post) = what else { return Ok(()) };
        self.conversations.confirm(&self.permit, offset, &post.content).await
    }

    /// Others are to know what was written.
    fn told(&self, events: &[Event]) {
        for event in events {
            match event {
                Event::Message(message) if message.from == Kind::User => {
                    self.conversations.turn_begun(&self.row, message.turn_number);
                }
                Event::TurnDone { .. } => self.conversations.turn_ended(&self.row),
                Event::State { state, .. } if !state.is_closed() => self.conversations.opened(self.row.id),
                _ => {}
            }
        }
    }
}

/// A piece of text, after the half of a character that the previous one may have ended with.
fn joined(half: Option<Half>, piece: &Cut) -> String {
    let between = match (half, piece.begins) {
        (None, None) => return piece.text.clone(),
        (Some(first), Some(second)) => first.join(second).map_or("\u{fffd}\u{fffd}".to_owned(), String::from),
        _ => char::REPLACEMENT_CHARACTER.to_string(),
    };
    between + &piece.text
}

/// Makes room for more of what is being streamed, or for another one.
fn forget_streams(streams: &mut HashMap<(String, String), Streamed>, of: &(String, String), more: usize) {
    let others = |streams: &HashMap<(String, String), Streamed>| {
        let others = streams.iter().filter(|(key, _)| *key != of).map(|(_, streamed)| streamed.text.len());
        others.fold((0, 0), |(count, bytes), text| (count + 1, bytes + text))
    };
    loop {
        let (count, bytes) = others(streams);
        // Whichever is longest may be as long as a message may be.
        let longest = streams.values().map(|streamed| streamed.text.len()).max().unwrap_or(0).max(more);
        let own = streams.get(of).map_or(0, |streamed| streamed.text.len()) + more;
        if count < STREAMS_MAX && bytes + own - longest.min(bytes + own) <= STREAMS_BYTES_MAX {
            return;
        }
        let oldest = streams.iter().filter(|(key, _)| *key != of).min_by_key(|(_, streamed)| streamed.order);
        let Some(oldest) = oldest.map(|(key, _)| key.clone()) else { return };
        streams.remove(&oldest);
    }
}

/// By which a message of a user is known to have been said.
pub(super) fn dedup(id: Uuid) -> String {
    format!("m:{id}")
}

impl What {
    /// How much is said.
    fn bytes(&self) -> usize {
        match self {
            Self::Post(post) => post.content.len(),
            Self::Say(_, Said::Text(Text { text, .. }) | Said::Delta { text: Cut { text, .. }, .. }, ..) => text.len(),
            Self::Say(..) | Self::Act(_) => 0,
        }
    }

    /// Whether it may come twice, and is to take effect once.
    fn is_named(&self) -> bool {
        match self {
            Self::Post(post) => post.is_named,
            Self::Say(_, _, once, _) => once.is_some(),
            Self::Act(_) => false,
        }
    }
}

impl Op {
    fn answer(self, answer: Result<(), Error>) {
        // Nobody need wait for it.
        let _ = self.answer.send(answer);
    }
}

/// What an agent is told of a user's message, and what that is.
fn payload_for(
    agent: &Agent,
    id: Uuid,
    message: &Message,
    about: &std::collections::BTreeMap<String, String>,
) -> Result<(Vec<u8>, &'static str), Error> {
    if agent.payload == Payload::Text {
        return Ok((message.content.clone().into_bytes(), "text/plain"));
    }
    let files: serde_json::Value = about
        .get("files")
        .and_then(|files| serde_json::from_str(files).ok())
        .unwrap_or_else(|| Vec::<()>::new().into());
    let told = serde_json::json!({
        "text": message.content,
        "convo_id": id,
        "message_id": message.id,
        "turn_number": message.turn_number,
        "files": files,
    });
    Ok((json(&told)?, "application/json"))
}

fn refused(refused: Refused) -> Error {
    match refused {
        Refused::Closed(state) => {
            let state = serde_json::to_value(state).unwrap_or_default();
            let why = format!("the conversation is closed: {}", state.as_str().unwrap_or_default());
            Error::new(ErrorKind::Precondition, super::CLOSED, why)
        }
        Refused::Crowded => {
            Error::new(ErrorKind::Exhausted, "ERR_QUOTA_001", "so many operators are in the conversation already")
        }
    }
}

#[cfg(test)]
mod tests {
    use crate::conversation::state::State;

    #[test]
    fn refusals_name_the_state() {
        let error = super::refused(super::Refused::Closed(State::AutoResolved));
        assert_eq!(error.message, "the conversation is closed: auto_resolved");
    }
}

//! One task owns a stream: it reads frames in order, delivers what is said to the identity, and ends both together.

mod deliver;

use std::{
    collections::VecDeque,
    future::{Future, poll_fn},
    ops::ControlFlow,
    pin::Pin,
    sync::{Arc, atomic::Ordering::Relaxed},
    task::{Context, Poll},
    time::Duration,
};

use futures_util::{
    FutureExt as _, StreamExt as _,
    future::BoxFuture,
    stream::{FuturesOrdered, FuturesUnordered},
};
use tonic::{Status, body::Body, metadata::MetadataMap};
use trunkline_core::{
    Error,
    message::{Sender, Sent, not_written},
    session::Session,
    task::{Desk, Leave},
    topic::own_lane,
    work::WorkGroup,
};
use trunkline_proto::v1::{
    ErrorResponse, Signal, UpstreamMessage, downstream_message::Payload as Down, signal::SignalType,
};
use trunkline_store::{
    lease::Loss,
    log::{self, Item, Offset, Record},
};

use super::{
    Gateway, Peer,
    acks::Acks,
    budget::{Budget, Debt},
    convert,
    follow::Following,
    handshake, inbound,
    outbound::{Frame, Outbound},
    saves::Saves,
    upstream::{self, Upstream},
};
use crate::{
    auth::Ended,
    error::{code_name, response, status},
    metrics::Code,
};

/// Replies that may wait for the transport; then no frame is read until the client reads its own. Their bytes are limited by
/// [`Budget`].
const REPLIES_MAX: usize = 256;

/// Messages of one client that may be on their way to the disk at once.
const MESSAGES_MAX: usize = 4096;

/// Other requests of one client that may be under way at once. Fewer, because each has an answer. Its bytes are counted before
/// they are there, by what it may be at most.
const PENDING_MAX: usize = 1024;

/// Frames handled in one go; meanwhile nothing is delivered.
const FRAMES_MAX: usize = 128;

/// Records read in one go.
const RECORDS_MAX: usize = 128;

/// Longest wait for the transport to take the last words of the server.
const GOODBYE_TIMEOUT: Duration = Duration::from_secs(1);

/// Serves one stream from its first frame to its end.
pub(super) async fn run(gateway: Arc<Gateway>, metadata: MetadataMap, peer: Peer, body: Body, outbound: Outbound) {
    let (mut inbound, ahead) = upstream::split(body, gateway.read_ahead.clone(), peer.address);
    let served = ahead.beside(serve(&gateway, &metadata, &peer, &mut inbound, &outbound)).await;
    if let Err(status) = served {
        // One that reads nothing does not hear how it ended.
        let _ = tokio::time::timeout(GOODBYE_TIMEOUT, outbound.end(status)).await;
    }
}

async fn serve(
    gateway: &Gateway,
    metadata: &MetadataMap,
    peer: &Peer,
    inbound: &mut Upstream,
    outbound: &Outbound,
) -> Result<(), Status> {
    let stopping = gateway.stop.clone();
    let agreed = tokio::select! {
        agreed = Box::pin(handshake::shake(gateway, metadata, peer, inbound, outbound)) => agreed,
        () = stopping.cancelled() => Err(Status::unavailable("server shutting down")),
    };
    let code = agreed.as_ref().err().map_or(tonic::Code::Ok, Status::code);
    gateway.metrics.handshakes.get_or_create(&Code { code: code_name(code) }).inc();
    let handshake::Agreed { session, desk, acks } = agreed?;
    inbound.admit(gateway.limits.frame_bytes_max);
    if acks {
        outbound.in_flight().stop_tracking();
    }
    session.set_transport(outbound.transport());
    if let Some(address) = peer.address {
        session.came_from(address);
    }
    let sender =
        Sender::new(gateway.sessions.clone(), gateway.tasks.clone(), &session, &gateway.limits, convert::metric);
    let lane = own_lane(&session.caller.identity).map_err(|e| status(&e))?.map(|lane| lane.to_string());
    let budget = Budget::new(gateway.replies.share_of(&session.caller));
    let mut connection = Connection {
        gateway,
        session,
        desk,
        following: Following::default(),
        sender: sender.map_err(|e| status(&e))?,
        outbound,
        lane: lane.unwrap_or_default(),
        frames: VecDeque::new(),
        budget,
        sent: VecDeque::new(),
        messages: 0,
        pending: FuturesOrdered::new(),
        writes_pending: 0,
        items: Vec::new(),
        saves: Saves::new(),
        saving: None,
        last: Offset::START,
        acks: acks.then(Box::default),
        is_lost: false,
    };
    if let Some(snapshot) = Box::pin(handshake::snapshot(gateway, &connection.session, &connection.desk)).await {
        connection.reply(snapshot);
    }
    let ended = connection.talk(inbound).await;
    // Whoever says goodbye is done; a server that stops is not a goodbye.
    let how = match &ended {
        _ if gateway.stop.is_cancelled() => Leave::Stop,
        Ok(()) => Leave::Goodbye,
        Err(_) => Leave::Lost,
    };
    Box::pin(connection.part(how)).await;
    ended
}

/// A stream after its handshake.
pub(super) struct Connection<'a> {
    pub(super) gateway: &'a Gateway,
    pub(super) session: Session,
    /// Where its tasks come from.
    pub(super) desk: Desk,
    /// The tasks that it follows.
    pub(super) following: Following,
    pub(super) sender: Sender,
    outbound: &'a Outbound,
    /// What the transport has no room for yet.
    frames: VecDeque<Frame>,
    /// What the replies among them may take, with those that the transport has and those that are expected.
    budget: Arc<Budget>,
    /// Messages on their way to the disk, in their order there. Answered only if they fail.
    sent: VecDeque<Sent>,
    /// How many those are.
    messages: usize,
    /// Requests that are under way, in the order in which they came; they are answered in it too.
    pending: FuturesOrdered<Pending>,
    /// How many of them change the ledger.
    writes_pending: usize,
    /// The name of its own lane; empty without one.
    lane: String,
    items: Vec<Item>,
    /// When it is made durable how far it was delivered to.
    saves: Saves,
    /// While that is done.
    saving: Option<Saving>,
    /// The last record that was delivered.
    last: Offset,
    /// For a client that acknowledges what it gets.
    pub(super) acks: Option<Box<Acks>>,
    /// Its end of the transport is gone, without a goodbye.
    is_lost: bool,
}

/// Makes durable how far a session was delivered to; see [`Session::saving`].
type Saving = BoxFuture<'static, Result<u64, Error>>;

/// What ends a stream from outside.
enum Ending {
    /// Somebody else has the identity now, or nobody may.
    Lost(Loss),
    /// What its client came in with is not good any more.
    Expired(Ended),
    /// The server stops.
    Stop,
    /// The transport is closed.
    Gone,
}

/// A request under way, whose answer is these frames.
pub(super) struct Request {
    pub(super) replies: BoxFuture<'static, Vec<Down>>,
    /// It may change the ledger.
    pub(super) is_write: bool,
    /// Bytes that the answer may have.
    pub(super) bytes_max: usize,
}

/// A request under way, with what its answer may take of the budget.
struct Pending {
    request: Request,
    debt: Option<Debt>,
}

/// What came of a request.
struct Done {
    replies: Vec<Down>,
    was_write: bool,
    /// Given back when the replies themselves are counted.
    debt: Option<Debt>,
}

impl Future for Pending {
    type Output = Done;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Done> {
        let replies = std::task::ready!(self.request.replies.as_mut().poll(cx));
        Poll::Ready(Done { replies, was_write: self.request.is_write, debt: self.debt.take() })
    }
}

impl Connection<'_> {
    /// Until the client says goodbye (`Ok`), or the server or the transport ends it.
    async fn talk(&mut self, inbound: &mut Upstream) -> Result<(), Status> {
        let mut endings = self.endings();
        loop {
            self.hand_over();
            let idle = self.frames.is_empty();
            tokio::select! {
                Some(ending) = endings.next() => return Box::pin(self.end(ending)).await,
                outcome = outcome(&mut self.sent), if !self.sent.is_empty() => self.answer(outcome),
                Some(done) = self.pending.next(), if !self.pending.is_empty() => self.done(done),
                room = self.outbound.room(), if !idle => {
                    if let Some(room) = room {
                        room.send(std::mem::take(&mut self.frames));
                    }
                }
                frame = inbound.message(), if self.reads_on() => {
                    if self.take(frame, inbound).await?.is_break() {
                        return Ok(());
                    }
                }
                read = self.session.reader.next_batch(RECORDS_MAX, &mut self.items), if idle && self.takes_records() => {
                    read.map_err(|e| log_status(&e))?;
                    self.deliver();
                }
                mail = self.desk.next(), if idle => self.deliver_mail(mail),
                (group, record) = pull(self.session.work.clone()), if idle && self.takes_work() => {
                    self.deliver_work(group, record)?;
                }
                () = self.outbound.in_flight().room_for_work(), if idle && self.is_work_full() => {}
                () = self.budget.freed(), if self.budget.is_spent() => {}
                () = self.saves.due(), if self.saves.is_open() && self.saving.is_none() => self.begin_save(),
                saved = finished(&mut self.saving), if self.saving.is_some() => self.end_save(saved),
            }
        }
    }

    /// What ends a stream from outside. In a set, so that each is looked at when it has happened and not in every turn.
    fn endings(&self) -> FuturesUnordered<BoxFuture<'static, Ending>> {
        let (lost, stop) = (self.session.lease.lost(), self.gateway.stop.clone());
        let endings = FuturesUnordered::from_iter([
            lost.map(Ending::Lost).boxed(),
            async move { stop.cancelled().await }.map(|()| Ending::Stop).boxed(),
            self.outbound.gone().map(|()| Ending::Gone).boxed(),
        ]);
        // One that is revoked ends the session by its lease.
        let caller = &self.session.caller;
        if caller.credential.expires_at.is_some() {
            let (auth, caller) = (self.gateway.auth.clone(), caller.clone());
            endings.push(async move { auth.expired(&caller).await }.map(Ending::Expired).boxed());
        }
        endings
    }

    async fn end(&mut self, ending: Ending) -> Result<(), Status> {
        match ending {
            Ending::Lost(loss) => Err(self.displaced(loss).await),
            Ending::Expired(ended) => {
                self.signal(SignalType::ForceDisconnect, ended.to_string()).await;
                Err(Status::unauthenticated(ended.to_string()))
            }
            // Published clients take the signal for the end and stay away; a stream that breaks brings them back.
            Ending::Stop if self.acks.is_none() => Err(Status::unavailable("server shutting down")),
            Ending::Stop => {
                self.signal(SignalType::GracefulDisconnect, "server shutting down".to_owned()).await;
                Ok(())
            }
            Ending::Gone => {
                self.is_lost = true;
                Err(Status::cancelled("client is gone"))
            }
        }
    }

    /// Gives the transport what waits for it, if it has room.
    fn hand_over(&mut self) {
        if !self.frames.is_empty()
            && let Some(room) = self.outbound.room_now()
        {
            room.send(std::mem::take(&mut self.frames));
        }
    }

    /// Whether the client may ask for more.
    fn reads_on(&self) -> bool {
        self.frames.len() < REPLIES_MAX
            && self.messages < MESSAGES_MAX
            && self.pending.len() < PENDING_MAX
            && !self.budget.is_spent()
    }

    /// Handles a frame and those that have come behind it. Their messages are submitted together.
    async fn take(
        &mut self,
        frame: Result<Option<UpstreamMessage>, Status>,
        inbound: &mut Upstream,
    ) -> Result<ControlFlow<()>, Status> {
        self.session.note_activity();
        let taken = self.take_all(frame, inbound).await;
        self.submit().await;
        taken
    }

    async fn take_all(
        &mut self,
        mut frame: Result<Option<UpstreamMessage>, Status>,
        inbound: &mut Upstream,
    ) -> Result<ControlFlow<()>, Status> {
        let mut handled = 0;
        loop {
            // One that sends what cannot be read has not died.
            self.is_lost |= frame.as_ref().is_err_and(|error| error.code() != tonic::Code::OutOfRange);
            match frame.map_err(handshake::transport_error)? {
                Some(frame) if self.session.lease.is_held() => inbound::handle(self, frame).await?,
                Some(_) => {}
                None => return Ok(ControlFlow::Break(())),
            }
            handled += 1;
            if handled == FRAMES_MAX || !self.reads_on() {
                return Ok(ControlFlow::Continue(()));
            }
            match inbound.come() {
                Some(next) => frame = next,
                None => return Ok(ControlFlow::Continue(())),
            }
        }
    }

    pub(super) async fn submit_if_full(&mut self) {
        if self.sender.is_full() {
            self.submit().await;
        }
    }

    /// Sends the messages that were accepted on their way to the disk.
    pub(super) async fn submit(&mut self) {
        match self.sender.submit().await {
            Ok(Some(sent)) => {
                self.messages += sent.count();
                self.gateway.metrics.accepted.inc_by(sent.count() as u64);
                self.session.meter.accepted.fetch_add(sent.count() as u64, Relaxed);
                self.sent.push_back(sent);
            }
            Ok(None) => {}
            Err((keys, error)) => self.lost(keys.into_iter().map(|key| (key, error.clone())).collect()),
        }
    }

    fn answer(&mut self, (count, lost): Outcome) {
        self.messages -= count;
        self.lost(lost);
    }

    fn lost(&mut self, lost: Vec<(Box<str>, log::Error)>) {
        // A key that was used for something else is its sender's mistake.
        if let Some((_, error)) = lost.iter().find(|(_, error)| !matches!(error, log::Error::DedupReused { .. })) {
            tracing::warn!(%error, count = lost.len(), identity = %self.session.caller.identity, "messages not appended");
        }
        lost.into_iter().for_each(|(key, error)| self.refuse_message(&not_written(&error), &key));
    }

    /// Refuses a message by what its sender calls it.
    pub(super) fn refuse_message(&mut self, error: &Error, key: &str) {
        self.gateway.metrics.refuse(error.code);
        let error = ErrorResponse { request_id: key.to_owned(), ..response(error) };
        self.reply(Down::Error(error.into()));
    }

    pub(super) fn reply(&mut self, payload: Down) {
        self.frames.push_back(Frame::reply(payload, &self.budget));
    }

    pub(super) fn refuse(&mut self, error: &Error) {
        self.refuse_message(error, "");
    }

    /// Refuses an operation that is not built, in these frames.
    pub(super) fn refuse_unbuilt(&mut self, frames: Vec<Down>) {
        if !frames.is_empty() {
            self.gateway.metrics.refuse("ERR_NOT_IMPLEMENTED");
        }
        frames.into_iter().for_each(|frame| self.reply(frame));
    }

    /// Notes a request that is under way.
    pub(super) fn wait_for(&mut self, request: Request) {
        self.writes_pending += usize::from(request.is_write);
        let debt = Some(self.budget.take(request.bytes_max));
        self.pending.push_back(Pending { request, debt });
    }

    /// Whether a request under way may change the ledger.
    pub(super) fn is_writing(&self) -> bool {
        self.writes_pending > 0
    }

    /// Waits until every request before this frame is done, so that frames take effect in order.
    pub(super) async fn settle(&mut self) {
        self.submit().await;
        while !self.sent.is_empty() {
            let outcome = outcome(&mut self.sent).await;
            self.answer(outcome);
        }
        while let Some(done) = self.pending.next().await {
            self.done(done);
        }
    }

    fn done(&mut self, done: Done) {
        let Done { replies, was_write, debt } = done;
        self.writes_pending -= usize::from(was_write);
        replies.into_iter().for_each(|reply| self.reply(reply));
        drop(debt);
    }

    fn takes_records(&self) -> bool {
        self.acks.as_ref().is_none_or(|acks| acks.takes_records())
    }

    fn takes_work(&self) -> bool {
        self.session.work.is_some() && self.acks.as_ref().is_none_or(|acks| acks.takes_work()) && !self.is_work_full()
    }

    /// Whether no more shared work is taken until some has arrived.
    fn is_work_full(&self) -> bool {
        self.session.work.is_some() && self.outbound.in_flight().is_work_full()
    }

    /// An acknowledgement moved the position.
    pub(super) fn acknowledged(&mut self) {
        self.saves.delivered();
        self.note_unacknowledged();
    }

    /// Deliveries go on meanwhile.
    fn begin_save(&mut self) {
        if self.session.has_news() {
            self.saves.close();
            self.saving = Some(self.session.saving().boxed());
        } else if self.is_settled() {
            self.saves.close();
        } else {
            self.saves.postpone();
        }
    }

    fn end_save(&mut self, saved: Result<u64, Error>) {
        match saved {
            Ok(mark) => self.session.saved(mark),
            Err(error) => {
                tracing::warn!(%error, identity = %self.session.caller.identity, "positions not saved; retrying in 2 s");
                return self.saves.failed();
            }
        }
        // What was taken meanwhile, or could not be saved.
        if self.session.has_news() || !self.is_settled() {
            self.saves.delivered();
        }
    }

    /// Whether all that was delivered has arrived. A client that acknowledges tells when a position moves.
    fn is_settled(&self) -> bool {
        let is_work_out = || self.session.work.as_ref().is_some_and(|work| work.is_out());
        self.acks.is_some() || self.session.delivery(self.last).is_done() && !is_work_out()
    }

    async fn save(&mut self) {
        if let Err(error) = self.session.save().await {
            tracing::warn!(%error, identity = %self.session.caller.identity, "positions not saved at the end of a session");
        }
    }

    /// Its client is gone with what it had not acknowledged.
    async fn count_loss(&mut self) {
        let Some(acks) = &mut self.acks else { return };
        match self.session.lost_over(acks.oldest()).await {
            Ok(dead) => {
                self.gateway.metrics.dead_letters.inc_by(u64::from(dead.lane) + u64::from(dead.shared));
                acks.give_up(&dead);
            }
            Err(error) => {
                tracing::warn!(%error, identity = %self.session.caller.identity, "a lost session is not counted");
            }
        }
    }

    /// The last words to a session that is over.
    async fn displaced(&mut self, loss: Loss) -> Status {
        match loss {
            Loss::Transferred | Loss::Replaced => Status::cancelled("session resumed by another connection"),
            Loss::Revoked => {
                let farewell = self.gateway.sessions.presence().farewell(&self.session.caller.identity);
                let reason = farewell.filter(|reason| !reason.is_empty());
                let reason = reason.unwrap_or_else(|| "disconnected by administrator".to_owned());
                self.signal(SignalType::ForceDisconnect, reason).await;
                Status::cancelled("session disconnected by administrator")
            }
            Loss::Fenced => Status::unavailable("this node lost touch with its cluster; reconnect"),
        }
    }

    async fn signal(&mut self, kind: SignalType, reason: String) {
        let frame = Frame::uncounted(Down::Signal(Signal { r#type: kind.into(), reason }.into()));
        // A client that does not read misses the signal; the end of the stream tells it as well.
        let _ = tokio::time::timeout(GOODBYE_TIMEOUT, self.outbound.send(frame)).await;
    }

    /// The last of a session: what was accepted is on disk and what was taken is remembered, before anybody else can
    /// hold the identity and before the client sees the stream end.
    async fn part(mut self, how: Leave) {
        self.settle().await;
        self.session.wait_settled().await;
        self.outbound.in_flight().close();
        if how == Leave::Lost && self.is_lost {
            self.count_loss().await;
        }
        self.save().await;
        let Self { session, desk, frames, .. } = self;
        // Tasks among them that did not go out go to others.
        drop(frames);
        desk.leave(how).await;
        drop(session);
    }
}

/// How many messages were sent, and which of them were lost.
type Outcome = (usize, Vec<(Box<str>, log::Error)>);

/// What came of the first. Cancel-safe; never ready if there is none.
fn outcome(sent: &mut VecDeque<Sent>) -> impl Future<Output = Outcome> {
    poll_fn(|cx| {
        let Some(first) = sent.front_mut() else { return Poll::Pending };
        let count = first.count();
        let outcome = Pin::new(first).poll(cx).map(|lost| (count, lost));
        if outcome.is_ready() {
            sent.pop_front();
        }
        outcome
    })
}

/// What came of a save, which is forgotten then. Cancel-safe; never ready if there is none.
async fn finished(saving: &mut Option<Saving>) -> Result<u64, Error> {
    match saving {
        Some(running) => {
            let saved = running.await;
            *saving = None;
            saved
        }
        None => std::future::pending().await,
    }
}

/// The next piece of the group's work. Cancel-safe.
async fn pull(group: Option<Arc<WorkGroup>>) -> (Arc<WorkGroup>, Result<Arc<Record>, Error>) {
    match group {
        Some(group) => {
            let record = group.pull().await;
            (group, record)
        }
        None => std::future::pending().await,
    }
}

fn log_status(error: &log::Error) -> Status {
    match error {
        log::Error::Stopped => Status::unavailable("server shutting down"),
        other => status(&other.clone().into()),
    }
}

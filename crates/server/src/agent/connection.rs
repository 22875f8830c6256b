//! One task owns a stream: it reads frames in order, delivers what is said to the identity, and ends both together.

use std::{
    collections::VecDeque,
    future::Future,
    net::IpAddr,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
};

use futures_util::{StreamExt as _, future::BoxFuture, stream::FuturesOrdered};
use tokio::time::MissedTickBehavior;
use tonic::{Status, Streaming, metadata::MetadataMap};
use trunkline_core::{
    Error,
    message::{Envelope, Sender, publish_failed},
    session::Session,
    topic::own_lane,
    work::WorkGroup,
};
use trunkline_proto::v1::{Signal, UpstreamMessage, downstream_message::Payload as Down, signal::SignalType};
use trunkline_store::{
    lease::Loss,
    log::{self, Item, Record, Submitted},
};

use super::{
    Gateway, convert, handshake, inbound,
    outbound::{Frame, Outbound},
};
use crate::error::{response, status};

/// Replies that may wait for the transport; then no frame is read until the client reads its own.
const REPLIES_MAX: usize = 256;

/// Requests of one client that may be under way at once.
const PENDING_MAX: usize = 1024;

/// Records read in one go.
const RECORDS_MAX: usize = 64;

/// How often progress is made durable while there is any. A crash of the server repeats what was delivered since.
const SAVE_INTERVAL: Duration = Duration::from_secs(2);

/// Longest wait for the transport to take the last words of the server.
const GOODBYE_TIMEOUT: Duration = Duration::from_secs(1);

/// Serves one stream from its first frame to its end.
pub(super) async fn run(
    gateway: Gateway,
    metadata: MetadataMap,
    peer: Option<IpAddr>,
    mut inbound: Streaming<UpstreamMessage>,
    outbound: Outbound,
) {
    let served = serve(&gateway, &metadata, peer, &mut inbound, &outbound).await;
    if let Err(status) = served {
        // A client that is gone does not hear how it ended.
        let _ = tokio::time::timeout(GOODBYE_TIMEOUT, outbound.send(Box::new(Err(status)))).await;
    }
}

async fn serve(
    gateway: &Gateway,
    metadata: &MetadataMap,
    peer: Option<IpAddr>,
    inbound: &mut Streaming<UpstreamMessage>,
    outbound: &Outbound,
) -> Result<(), Status> {
    let stopping = gateway.stop.clone();
    let session = tokio::select! {
        session = Box::pin(handshake::shake(gateway, metadata, peer, inbound, outbound)) => session?,
        () = stopping.cancelled() => return Err(Status::unavailable("server shutting down")),
    };
    let sender = Sender::new(gateway.sessions.clone(), &session, &gateway.limits, convert::metric);
    let lane = own_lane(&session.caller.identity).map_err(|e| status(&e))?.map(|lane| lane.to_string());
    let mut connection = Connection {
        gateway,
        session,
        sender: sender.map_err(|e| status(&e))?,
        outbound,
        lane: lane.unwrap_or_default(),
        frames: VecDeque::new(),
        pending: FuturesOrdered::new(),
        writes_pending: 0,
        items: Vec::new(),
    };
    if let Some(snapshot) = Box::pin(handshake::snapshot(gateway, &connection.session)).await {
        connection.reply(snapshot);
    }
    let ended = connection.talk(inbound).await;
    connection.part().await;
    ended
}

/// A stream after its handshake.
pub(super) struct Connection<'a> {
    pub(super) gateway: &'a Gateway,
    pub(super) session: Session,
    pub(super) sender: Sender,
    outbound: &'a Outbound,
    /// What the transport has no room for yet.
    frames: VecDeque<Frame>,
    /// Requests that are under way, in the order in which they came; they are answered in it too.
    pending: FuturesOrdered<Pending>,
    /// How many of them change the ledger.
    writes_pending: usize,
    /// The name of its own lane; empty without one.
    lane: String,
    items: Vec<Item>,
}

/// A request under way.
pub(super) enum Pending {
    /// A message; answered only if it fails.
    Message(Submitted),
    /// A request whose answer is these frames.
    Reply(BoxFuture<'static, Vec<Down>>),
    /// The same, and it may change the ledger.
    Write(BoxFuture<'static, Vec<Down>>),
}

/// What came of a request.
pub(super) enum Done {
    Message(Result<log::Appended, log::Error>),
    Reply(Vec<Down>),
    Write(Vec<Down>),
}

impl Future for Pending {
    type Output = Done;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Done> {
        match self.get_mut() {
            Self::Message(submitted) => Pin::new(submitted).poll(cx).map(Done::Message),
            Self::Reply(reply) => reply.as_mut().poll(cx).map(Done::Reply),
            Self::Write(reply) => reply.as_mut().poll(cx).map(Done::Write),
        }
    }
}

impl Connection<'_> {
    /// Until the client says goodbye (`Ok`), or the server or the transport ends it.
    async fn talk(&mut self, inbound: &mut Streaming<UpstreamMessage>) -> Result<(), Status> {
        let mut saves = tokio::time::interval(SAVE_INTERVAL);
        saves.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            let idle = self.frames.is_empty();
            let reads_on = self.frames.len() < REPLIES_MAX && self.pending.len() < PENDING_MAX;
            tokio::select! {
                loss = self.session.lease.lost() => return Err(self.displaced(loss).await),
                () = self.gateway.stop.cancelled() => return self.say_goodbye().await,
                () = self.outbound.closed() => return Err(Status::cancelled("client is gone")),
                Some(done) = self.pending.next(), if !self.pending.is_empty() => self.done(done),
                permit = self.outbound.reserve(), if !idle => {
                    if let (Ok(permit), Some(frame)) = (permit, self.frames.pop_front()) {
                        permit.send(Box::new(Ok(frame)));
                    }
                }
                frame = inbound.message(), if reads_on => match frame.map_err(handshake::transport_error)? {
                    Some(frame) if self.session.lease.is_held() => inbound::handle(self, frame).await?,
                    Some(_) => {}
                    None => return Ok(()),
                },
                read = self.session.reader.next_batch(RECORDS_MAX, &mut self.items), if idle => {
                    read.map_err(|e| log_status(&e))?;
                    self.deliver();
                }
                (group, record) = pull(self.session.work.clone()), if idle && self.session.work.is_some() => {
                    self.deliver_work(group, record)?;
                }
                _ = saves.tick(), if self.session.has_news() => self.save().await,
            }
        }
    }

    pub(super) fn reply(&mut self, payload: Down) {
        self.frames.push_back(Frame::reply(payload));
    }

    pub(super) fn refuse(&mut self, error: &Error) {
        self.reply(Down::Error(response(error)));
    }

    /// Notes a request that is under way.
    pub(super) fn wait_for(&mut self, pending: Pending) {
        self.writes_pending += usize::from(matches!(pending, Pending::Write(_)));
        self.pending.push_back(pending);
    }

    /// Whether a request under way may change the ledger.
    pub(super) fn is_writing(&self) -> bool {
        self.writes_pending > 0
    }

    /// Waits until every request before this frame is done, so that frames take effect in order.
    pub(super) async fn settle(&mut self) {
        while let Some(done) = self.pending.next().await {
            self.done(done);
        }
    }

    fn done(&mut self, done: Done) {
        match done {
            Done::Message(Ok(_)) => {}
            Done::Message(Err(error)) => self.refuse(&publish_failed(&error)),
            Done::Reply(replies) => replies.into_iter().for_each(|reply| self.reply(reply)),
            Done::Write(replies) => {
                self.writes_pending -= 1;
                replies.into_iter().for_each(|reply| self.reply(reply));
            }
        }
    }

    fn deliver(&mut self) {
        for item in self.items.drain(..) {
            match item {
                Item::Record(record) => match convert::record(&record, &self.lane) {
                    Ok(Some(payload)) => {
                        let taken = self.session.taken_handle();
                        self.frames.push_back(Frame::lane(payload, taken, record.offset));
                    }
                    Ok(None) => {}
                    Err(error) => tracing::error!(%error, "skipped"),
                },
                Item::Gap(gap) => {
                    let identity = &self.session.caller.identity;
                    tracing::warn!(%identity, topic = %gap.topic, through = %gap.through, "history was trimmed unread");
                }
                Item::Transient(_) | Item::End { .. } => {}
            }
        }
    }

    fn deliver_work(&mut self, group: Arc<WorkGroup>, record: Result<Arc<Record>, Error>) -> Result<(), Status> {
        let record = record.map_err(|e| status(&e))?;
        match Envelope::decode(&record) {
            Ok(envelope) => self.frames.push_back(Frame::work(Down::Msg(convert::incoming(envelope)), group, record)),
            Err(error) => {
                group.done(record.offset);
                tracing::error!(%error, "skipped");
            }
        }
        Ok(())
    }

    async fn save(&mut self) {
        if let Err(error) = self.session.save().await {
            tracing::warn!(%error, identity = %self.session.caller.identity, "progress not saved; it is tried again");
        }
    }

    async fn say_goodbye(&mut self) -> Result<(), Status> {
        self.signal(SignalType::GracefulDisconnect, "server shutting down".to_owned()).await;
        Ok(())
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
        let frame = Frame::reply(Down::Signal(Signal { r#type: kind.into(), reason }));
        // A client that does not read misses the signal; the end of the stream tells it as well.
        let _ = tokio::time::timeout(GOODBYE_TIMEOUT, self.outbound.send(Box::new(Ok(frame)))).await;
    }

    /// The last of a session: what was accepted is on disk and what was taken is remembered, before anybody else can
    /// hold the identity and before the client sees the stream end.
    async fn part(mut self) {
        self.settle().await;
        self.save().await;
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

//! One task owns a stream: it reads frames in order, delivers what is said to the identity, and ends both together.

use std::{collections::VecDeque, sync::Arc, time::Duration};

use futures_util::{StreamExt as _, stream::FuturesOrdered};
use tokio::time::MissedTickBehavior;
use tonic::{Status, Streaming, metadata::MetadataMap};
use trunkline_core::{
    Error,
    message::{Envelope, Sender, publish_failed},
    session::Session,
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

/// Messages of one client that may be on their way to the disk at once.
const APPENDS_MAX: usize = 1024;

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
    mut inbound: Streaming<UpstreamMessage>,
    outbound: Outbound,
) {
    let served = serve(&gateway, &metadata, &mut inbound, &outbound).await;
    if let Err(status) = served {
        // A client that is gone does not hear how it ended.
        let _ = tokio::time::timeout(GOODBYE_TIMEOUT, outbound.send(Err(status))).await;
    }
}

async fn serve(
    gateway: &Gateway,
    metadata: &MetadataMap,
    inbound: &mut Streaming<UpstreamMessage>,
    outbound: &Outbound,
) -> Result<(), Status> {
    let stopping = gateway.stop.clone();
    let session = tokio::select! {
        session = handshake::shake(gateway, metadata, inbound, outbound) => session?,
        () = stopping.cancelled() => return Err(Status::unavailable("server shutting down")),
    };
    let sender = Sender::new(gateway.gate.clone(), &session, &gateway.limits).map_err(|e| status(&e))?;
    let mut connection = Connection {
        gateway,
        session,
        sender,
        outbound,
        frames: VecDeque::new(),
        appends: FuturesOrdered::new(),
        items: Vec::new(),
    };
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
    /// Messages on their way to the disk, in the order in which they were sent.
    appends: FuturesOrdered<Submitted>,
    items: Vec<Item>,
}

impl Connection<'_> {
    /// Until the client says goodbye (`Ok`), or the server or the transport ends it.
    async fn talk(&mut self, inbound: &mut Streaming<UpstreamMessage>) -> Result<(), Status> {
        let mut saves = tokio::time::interval(SAVE_INTERVAL);
        saves.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            let idle = self.frames.is_empty();
            let reads_on = self.frames.len() < REPLIES_MAX && self.appends.len() < APPENDS_MAX;
            tokio::select! {
                loss = self.session.lease.lost() => return Err(displaced(loss)),
                () = self.gateway.stop.cancelled() => return self.say_goodbye().await,
                () = self.outbound.closed() => return Err(Status::cancelled("client is gone")),
                Some(appended) = self.appends.next(), if !self.appends.is_empty() => self.appended(appended),
                permit = self.outbound.reserve(), if !idle => {
                    if let (Ok(permit), Some(frame)) = (permit, self.frames.pop_front()) {
                        permit.send(Ok(frame));
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

    /// Notes a message that is on its way to the disk.
    pub(super) fn await_append(&mut self, submitted: Submitted) {
        self.appends.push_back(submitted);
    }

    /// Waits until every message before this frame is on disk, so that frames take effect in order.
    pub(super) async fn settle(&mut self) {
        while let Some(appended) = self.appends.next().await {
            self.appended(appended);
        }
    }

    fn appended(&mut self, appended: Result<log::Appended, log::Error>) {
        if let Err(error) = appended {
            self.refuse(&publish_failed(&error));
        }
    }

    fn deliver(&mut self) {
        for item in self.items.drain(..) {
            match item {
                Item::Record(record) => match Envelope::decode(&record) {
                    Ok(envelope) => {
                        let taken = self.session.taken_handle();
                        self.frames.push_back(Frame::lane(
                            Down::Msg(convert::incoming(envelope)),
                            taken,
                            record.offset,
                        ));
                    }
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
        let signal =
            Signal { r#type: SignalType::GracefulDisconnect.into(), reason: "server shutting down".to_owned() };
        let frame = Frame::reply(Down::Signal(signal));
        // A client that does not read misses the signal; the end of the stream tells it as well.
        let _ = tokio::time::timeout(GOODBYE_TIMEOUT, self.outbound.send(Ok(frame))).await;
        Ok(())
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

fn displaced(loss: Loss) -> Status {
    match loss {
        Loss::Transferred | Loss::Replaced => Status::cancelled("session resumed by another connection"),
        Loss::Revoked => Status::cancelled("session disconnected by administrator"),
        Loss::Fenced => Status::unavailable("this node lost touch with its cluster; reconnect"),
    }
}

fn log_status(error: &log::Error) -> Status {
    match error {
        log::Error::Stopped => Status::unavailable("server shutting down"),
        other => status(&other.clone().into()),
    }
}

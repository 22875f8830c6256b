//! What a client is given: records of its lanes, shared work, tasks, and what happens to them.

use std::sync::{Arc, atomic::Ordering::Relaxed};

use futures_util::FutureExt as _;
use prost::Message as _;
use tonic::Status;
use trunkline_core::{
    Error, Kind,
    identity::Identity,
    limits::FRAME_OUT_BYTES_MAX,
    message::Envelope,
    task::{Mail, Operation},
    topic::{is_progress, is_task_events, is_task_messages},
    work::WorkGroup,
};
use trunkline_proto::v1::{ProgressUpdate, TaskHibernated, downstream_message::Payload as Down};
use trunkline_store::log::{Gap, Item, Record};

use super::{
    super::{
        convert,
        outbound::{Frame, Work},
    },
    Connection, Request,
};
use crate::error::{response, status};

/// Bytes of a frame beside the record that it delivers.
const DELIVERY_OVERHEAD_BYTES: usize = 4096;

impl Connection<'_> {
    pub(super) fn deliver(&mut self) {
        let mut delivered = 0;
        let mut items = std::mem::take(&mut self.items);
        for item in items.drain(..) {
            match item {
                Item::Record(record) => delivered += u64::from(self.deliver_record(&record)),
                Item::Gap(gap) => self.deliver_gap(&gap),
                Item::Transient(_) | Item::End { .. } => {}
            }
        }
        // Its room is used again.
        self.items = items;
        self.session.meter.read.store(self.session.reader.cursor().offset.0, Relaxed);
        self.delivered(delivered);
    }

    fn delivered(&mut self, count: u64) {
        self.gateway.metrics.delivered.inc_by(count);
        if count > 0 {
            self.saves.delivered();
        }
        let meter = &self.session.meter;
        meter.delivered.fetch_add(count, Relaxed);
        self.note_unacknowledged();
    }

    pub(super) fn note_unacknowledged(&self) {
        if let Some(acks) = &self.acks {
            self.session.meter.unacknowledged.store(acks.count(), Relaxed);
        }
    }

    /// Answers whether it was for this client.
    fn deliver_record(&mut self, record: &Record) -> bool {
        if is_task_events(&record.topic) {
            return self.deliver_events(record);
        }
        if is_task_messages(&record.topic) {
            return self.deliver_said(record);
        }
        if !fits(record) {
            self.skip(record);
            return false;
        }
        match convert::record(record, &self.lane) {
            Ok(Some(payload)) => {
                match &payload {
                    Down::Msg(message) => self.desk.heard(&message.source_topic, &message.payload),
                    Down::ProgressUpdate(update) => self.take_part(update),
                    _ => {}
                }
                let delivery = self.session.delivery(record.offset);
                self.last = record.offset;
                self.frames.push_back(match &mut self.acks {
                    Some(acks) => {
                        acks.delivered(delivery, record.payload.len());
                        Frame::unacknowledged(payload, record.offset, false)
                    }
                    None => Frame::lane(payload, delivery),
                });
                true
            }
            Ok(None) => false,
            Err(error) => {
                tracing::error!(%error, "skipped");
                false
            }
        }
    }

    /// Says that a record does not fit a frame, which would end the stream, now and whenever the client comes back.
    fn skip(&mut self, record: &Record) {
        let (identity, offset, bytes) = (&self.session.caller.identity, record.offset, record.payload.len());
        tracing::error!(%identity, topic = %record.topic, %offset, bytes, "record exceeds the frame limit; skipped");
        if !is_progress(&record.topic) {
            self.reply(Down::Error(response(&too_large("message", bytes, "skipped")).into()));
        }
    }

    /// As [`Connection::skip`]: the attempt at the task fails.
    fn fail(&mut self, task: &str, bytes: usize) {
        let identity = &self.session.caller.identity;
        tracing::error!(%identity, task, bytes, "task exceeds the frame limit; its attempt fails");
        let error = too_large("task", bytes, "its attempt fails");
        let (tasks, caller) = (self.gateway.tasks.clone(), self.session.caller.clone());
        let (id, why) = (task.to_owned(), error.message.to_string());
        let reply = Down::Error(response(&error).into());
        let replies = async move {
            let failed = match tasks.operate(&caller, &id, Operation::Fail(why), 0).await {
                Ok(done) => done.await.map(drop),
                Err(error) => Err(error),
            };
            if let Err(error) = failed {
                tracing::warn!(%error, task = id, "its attempt ends with the session");
            }
            vec![reply]
        };
        self.wait_for(Request { replies: replies.boxed(), is_write: true, bytes_max: DELIVERY_OVERHEAD_BYTES });
    }

    /// What was said about a task that the user takes part in. Its own words come back to nobody.
    fn deliver_said(&mut self, record: &Record) -> bool {
        match Envelope::decode(record) {
            Ok(envelope) if envelope.source == self.lane => false,
            Ok(envelope) => {
                self.reply(Down::Msg(convert::incoming(envelope)));
                true
            }
            Err(error) => {
                tracing::error!(%error, "skipped");
                false
            }
        }
    }

    /// A user hears what is said about its task from when it runs until it has ended.
    fn take_part(&mut self, update: &ProgressUpdate) {
        let (Identity::User { .. }, Some(status)) = (&self.session.caller.identity, update.metadata.get("status"))
        else {
            return;
        };
        // Only the server has no source.
        let Some(task) = update.task_id.parse().ok().filter(|_| update.source.is_empty()) else { return };
        let done = match status.as_str() {
            "running" => self.session.attend_task(&update.workspace, task),
            "completed" | "failed" | "cancelled" | "rejected" => self.session.leave_task(&update.workspace, task),
            _ => Ok(()),
        };
        if let Err(error) = done {
            tracing::error!(%error, "a user does not hear of its task");
        }
    }

    /// What happened to a task that the client follows. How far it was told is not remembered.
    fn deliver_events(&mut self, record: &Record) -> bool {
        match self.following.deliver(&mut self.session, record) {
            Ok(events) => {
                let is_followed = !events.is_empty();
                events.into_iter().for_each(|event| self.reply(event));
                is_followed
            }
            Err(error) => {
                tracing::error!(%error, "skipped");
                false
            }
        }
    }

    /// What the client is to do, or to know of what it does.
    pub(super) fn deliver_mail(&mut self, mail: Mail) {
        match mail {
            Mail::Handout(handout) => {
                let (assignment, receipt) = convert::tasks::assignment(*handout);
                let bytes = assignment.encoded_len();
                if bytes > FRAME_OUT_BYTES_MAX - DELIVERY_OVERHEAD_BYTES {
                    // Not if it is another's by now.
                    if receipt.take() {
                        self.fail(&assignment.task_id, bytes);
                    }
                    return;
                }
                self.frames.push_back(Frame::task(Down::TaskAssignment(assignment.into()), receipt));
            }
            Mail::Event(event) | Mail::Lost(event) => {
                self.reply(Down::TaskEvent(convert::tasks::event(*event, String::new()).into()));
            }
            Mail::Hibernated(task, hibernation) => {
                let descriptor = Some(convert::tasks::descriptor(&hibernation));
                let hibernated = TaskHibernated { task_id: task.to_string(), descriptor };
                self.reply(Down::TaskHibernated(hibernated.into()));
            }
        }
    }

    /// Never in silence; but progress that is gone is no progress any more.
    fn deliver_gap(&mut self, gap: &Gap) {
        let (identity, topic, through) = (&self.session.caller.identity, &gap.topic, gap.through);
        tracing::warn!(%identity, %topic, %through, "history was trimmed unread");
        if !is_progress(topic) {
            let message =
                format!("messages to {topic} were removed by retention before they were delivered, through {through}");
            let error = response(&Error::new(Kind::Precondition, "ERR_HISTORY_TRIMMED", message));
            self.reply(Down::Error(error.into()));
        }
    }

    pub(super) fn deliver_work(
        &mut self,
        group: Arc<WorkGroup>,
        record: Result<Arc<Record>, Error>,
    ) -> Result<(), Status> {
        let record = record.map_err(|e| status(&e))?;
        if !fits(&record) {
            group.done(record.offset);
            self.saves.delivered();
            self.skip(&record);
            return Ok(());
        }
        match Envelope::decode(&record) {
            Ok(envelope) => {
                let (payload, offset) = (Down::Msg(convert::incoming(envelope)), record.offset);
                let work = Work::new(group, record);
                self.frames.push_back(match &mut self.acks {
                    Some(acks) => {
                        acks.shared(offset, work);
                        Frame::unacknowledged(payload, offset, true)
                    }
                    None => Frame::work(payload, work),
                });
                self.delivered(1);
            }
            Err(error) => {
                group.done(record.offset);
                tracing::error!(%error, "skipped");
            }
        }
        Ok(())
    }
}

/// Whether a record fits a frame to a client.
fn fits(record: &Record) -> bool {
    record.payload.len() <= FRAME_OUT_BYTES_MAX - DELIVERY_OVERHEAD_BYTES
}

fn too_large(what: &str, bytes: usize, outcome: &str) -> Error {
    let message = format!("{what} of {bytes} bytes exceeds the frame limit of {FRAME_OUT_BYTES_MAX}; {outcome}");
    Error::new(Kind::Precondition, "ERR_MESSAGE_TOO_LARGE", message)
}

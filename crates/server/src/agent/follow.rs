//! What a client follows: the events of tasks.

use std::collections::HashMap;

use trunkline_core::{
    Error, Kind,
    session::Session,
    task::{Event, TaskEvent, Tasks},
    topic::task_events,
};
use trunkline_proto::v1::{
    TaskSubscriptionOperation, TaskSubscriptionOperationResponse, downstream_message::Payload as Down,
    task_subscription_operation::OpType,
};
use trunkline_store::log::{READER_TOPICS_MAX, Record, Topic};
use uuid::Uuid;

use super::convert;
use crate::error::response;

/// Subscriptions of one client.
const SUBSCRIPTIONS_MAX: usize = 1000;

/// Descendants that a subscription begins with. The published figure.
const DESCENDANTS_MAX: i64 = 256;

/// Lanes that one client follows, of all its subscriptions: what one reader follows, with room for the client's other lanes.
const LANES_MAX: usize = READER_TOPICS_MAX - 96;

/// Subscriptions of one client to one task: each of its events is a frame for each of them.
const SUBSCRIBERS_MAX: usize = 16;

/// The subscriptions of a client, by the topic of the events.
#[derive(Default)]
pub(super) struct Following {
    lanes: HashMap<Topic, Vec<Subscriber>>,
    count: usize,
}

#[derive(Clone)]
struct Subscriber {
    id: String,
    /// Events from then on, in Unix milliseconds.
    since_ms: i64,
    recursive: bool,
    /// The last one that it got.
    last: u64,
}

impl Following {
    /// The events that this record is, for those who follow it. Who cannot follow a new child as well hears so, and
    /// everything else.
    pub(super) fn deliver(&mut self, session: &mut Session, record: &Record) -> Result<Vec<Down>, Error> {
        let Some(subscribers) = self.lanes.get_mut(&record.topic) else { return Ok(Vec::new()) };
        let event = TaskEvent::decode(record)?;
        let (mut frames, mut heirs) = (Vec::new(), Vec::new());
        for subscriber in subscribers {
            // Somebody else may have wanted what came before.
            if record.offset.0 <= subscriber.last || event.at_ms < subscriber.since_ms {
                continue;
            }
            subscriber.last = record.offset.0;
            frames.push(Down::TaskEvent(Box::new(convert::tasks::event(event.clone(), subscriber.id.clone()))));
            if subscriber.recursive {
                heirs.push(Subscriber { last: 0, ..subscriber.clone() });
            }
        }
        if let Event::Child { task, workspace, lifecycle, .. } = &event.event
            && lifecycle == "spawned"
            && *workspace == event.workspace
        {
            let followed = heirs.into_iter().map(|heir| self.follow(session, workspace, *task, heir, true));
            let refused = followed.filter_map(Result::err).next();
            frames.extend(refused.map(|error| Down::Error(Box::new(response(&error)))));
        }
        Ok(frames)
    }

    pub(super) async fn handle(
        &mut self,
        session: &mut Session,
        tasks: &Tasks,
        operation: TaskSubscriptionOperation,
    ) -> TaskSubscriptionOperationResponse {
        let (client_request_id, task_id) = (operation.client_request_id.clone(), operation.task_id.clone());
        let empty = TaskSubscriptionOperationResponse { client_request_id, task_id, ..Default::default() };
        let done = match OpType::try_from(operation.op) {
            Ok(OpType::Subscribe) => self.subscribe(session, tasks, operation).await,
            Ok(OpType::Unsubscribe) if operation.subscription_id.is_empty() => {
                Err(invalid("subscription_id is required for UNSUBSCRIBE"))
            }
            Ok(OpType::Unsubscribe) => {
                self.unsubscribe(session, &operation.subscription_id);
                Ok(operation.subscription_id)
            }
            _ => Err(invalid("unknown task subscription operation")),
        };
        match done {
            Ok(subscription_id) => TaskSubscriptionOperationResponse { success: true, subscription_id, ..empty },
            Err(error) => TaskSubscriptionOperationResponse { error: error.to_string(), ..empty },
        }
    }

    async fn subscribe(
        &mut self,
        session: &mut Session,
        tasks: &Tasks,
        operation: TaskSubscriptionOperation,
    ) -> Result<String, Error> {
        if operation.task_id.is_empty() {
            return Err(invalid("task_id is required"));
        }
        if self.count >= SUBSCRIPTIONS_MAX {
            let message = format!("one connection may have {SUBSCRIPTIONS_MAX} subscriptions");
            return Err(Error::new(Kind::Exhausted, "ERR_QUOTA", message));
        }
        let task = tasks.get(&session.caller, &operation.task_id).await?;
        let since_ms = operation.start_timestamp_unix_ms.max(0);
        let recursive = operation.recursive;
        let subscriber = Subscriber { id: Uuid::new_v4().to_string(), since_ms, recursive, last: 0 };
        let replays = since_ms > 0;
        let children = if recursive { tasks.descendants(&task, DESCENDANTS_MAX).await? } else { Vec::new() };
        self.follow(session, &task.workspace, task.id, subscriber.clone(), replays)?;
        self.count += 1;
        for child in children {
            if let Err(error) = self.follow(session, &task.workspace, child, subscriber.clone(), replays) {
                self.unsubscribe(session, &subscriber.id);
                return Err(error);
            }
        }
        Ok(subscriber.id)
    }

    fn follow(
        &mut self,
        session: &mut Session,
        workspace: &str,
        task: Uuid,
        mut subscriber: Subscriber,
        replays: bool,
    ) -> Result<(), Error> {
        if self.lanes.len() >= LANES_MAX {
            let message = format!("one connection may follow {LANES_MAX} tasks");
            return Err(Error::new(Kind::Exhausted, "ERR_QUOTA", message));
        }
        let known = self.lanes.get(&task_events(workspace, task)?);
        if known.is_some_and(|lane| lane.len() >= SUBSCRIBERS_MAX) {
            let message = format!("one connection may have {SUBSCRIBERS_MAX} subscriptions to one task");
            return Err(Error::new(Kind::Exhausted, "ERR_QUOTA", message));
        }
        let topic = session.follow_task(workspace, task, replays)?;
        if !replays {
            subscriber.last = session.tail().0;
        }
        let lane = self.lanes.entry(topic).or_default();
        if lane.iter().all(|other| other.id != subscriber.id) {
            lane.push(subscriber);
        }
        Ok(())
    }

    fn unsubscribe(&mut self, session: &mut Session, id: &str) {
        let mut was_there = false;
        self.lanes.retain(|topic, lane| {
            let before = lane.len();
            lane.retain(|subscriber| subscriber.id != id);
            was_there |= lane.len() < before;
            if lane.is_empty() {
                session.unfollow_task(topic);
            }
            !lane.is_empty()
        });
        self.count -= usize::from(was_there);
    }
}

fn invalid(message: &'static str) -> Error {
    Error::new(Kind::Invalid, "ERR_INVALID_ARGUMENT", message)
}

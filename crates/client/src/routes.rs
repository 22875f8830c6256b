//! What belongs to somebody for longer than one answer: tasks that are followed, proxied calls, tunnels; and what has to be said
//! again after a reconnect.

use std::{
    collections::{HashMap, HashSet},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::SystemTime,
};

use prost::Message as _;
use tokio::sync::Notify;
use trunkline_proto::v1::{
    AuthorityGrantRevocation, ErrorResponse, SwitchWorkspace, TaskEvent, TaskSubscriptionOperation,
    downstream_message::Payload as Down, task_subscription_operation::OpType, upstream_message::Payload as Up,
};

use crate::{
    connection::{
        feed::{Mark, Queued},
        lane::{Lane, Overflow, Pressure, Weight},
    },
    error::{Error, Kind},
};

/// Events of one task that are not taken yet: who falls behind further than 64 times this hears no more.
const EVENTS: usize = 64;

#[derive(Default)]
pub(crate) struct Routes {
    inner: Mutex<Table>,
}

#[derive(Default)]
struct Table {
    /// Where a user is.
    workspace: Option<String>,
    /// Where it wants to go, and what the server has against it.
    going: Option<(String, Option<Error>)>,
    /// By the id of the request that began it.
    follows: HashMap<String, Follow>,
    /// From the server's name of a subscription to ours.
    subscriptions: HashMap<String, String>,
    /// The server's names of those that nobody here wants any more, until it is told.
    unwanted: HashSet<String>,
    /// By the id of the call or tunnel.
    calls: HashMap<String, Arc<Lane<Frame>>>,
    /// Who serves what others call here.
    server: Option<Arc<Lane<Frame>>>,
    /// Who wants to know of grants that are void.
    revocations: Vec<std::sync::Weak<dyn Revoked>>,
    is_over: bool,
    /// A workspace was asked for again after a reconnect, or for the first time.
    is_back: bool,
}

/// Wants to know of grants that are void.
pub(crate) trait Revoked: Send + Sync {
    fn revoked(&self, revocation: &AuthorityGrantRevocation);
}

/// What comes for a call.
pub(crate) enum Frame {
    Down(Down),
    /// The connection broke, or the call was refused: nothing comes any more.
    Failed(Error),
}

/// Bytes of bodies and tunnels that one call, tunnel or server may have waiting; over this it fails.
const FRAMES_BYTES: usize = 32 * 1024 * 1024;

impl Frame {
    fn bytes(&self) -> usize {
        match self {
            Self::Down(Down::ProxyHttpRequest(frame)) => frame.encoded_len(),
            Self::Down(Down::ProxyHttpResponse(frame)) => frame.encoded_len(),
            Self::Down(Down::ProxyHttpBodyChunk(frame)) => frame.data.len(),
            Self::Down(Down::TunnelData(frame)) => frame.data.len(),
            Self::Down(_) | Self::Failed(_) => 0,
        }
    }
}

/// A way for frames: bounded by their number and their bytes.
pub(crate) fn frames(what: &'static str, bound: usize, room: &Arc<Notify>) -> Arc<Lane<Frame>> {
    let weight = Weight { of: Frame::bytes, soft: usize::MAX, hard: FRAMES_BYTES };
    Lane::with(what, bound, Overflow::Unheard, Arc::clone(room), |_| {}, weight)
}

struct Follow {
    task: String,
    recursive: bool,
    lane: Arc<Lane<TaskEvent>>,
    subscription: String,
    /// When the last event was, and which ones were then: so that a new subscription begins there and repeats none.
    last_ms: i64,
    last: Vec<TaskEvent>,
}

impl Routes {
    /// Short and without a wait inside; a panic inside leaves nothing half done.
    fn lock(&self) -> MutexGuard<'_, Table> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What is said first on a new connection.
    pub(crate) fn restore(&self) -> Vec<Queued> {
        let mut table = self.lock();
        table.subscriptions.clear();
        table.unwanted.clear();
        table.is_back = true;
        let wanted = table.going.as_ref().map(|(wanted, _)| wanted.clone());
        let workspace = wanted.or_else(|| table.workspace.clone()).map(|workspace| switch(&workspace));
        let follows = table.follows.iter().map(|(id, follow)| {
            let start_timestamp_unix_ms = follow.last_ms;
            Up::TaskSubscriptionOp(Box::new(TaskSubscriptionOperation {
                op: OpType::Subscribe.into(),
                task_id: follow.task.clone(),
                recursive: follow.recursive,
                client_request_id: id.clone(),
                start_timestamp_unix_ms,
                ..TaskSubscriptionOperation::default()
            }))
        });
        workspace.into_iter().chain(follows).map(|payload| Queued { payload, mark: Mark::Nothing }).collect()
    }

    pub(crate) fn set_workspace(&self, workspace: &str) {
        self.lock().workspace = Some(workspace.to_owned());
    }

    /// A user wants to go to a workspace.
    pub(crate) fn goes(&self, workspace: &str) {
        let mut table = self.lock();
        (table.going, table.is_back) = (Some((workspace.to_owned(), None)), false);
    }

    /// It does not want to any more.
    pub(crate) fn stays(&self) {
        self.lock().going = None;
    }

    /// The server has handled it: the user is there, or stays where it was.
    pub(crate) fn went(&self) -> Result<(), Error> {
        let mut table = self.lock();
        match table.going.take() {
            Some((_, Some(refusal))) => Err(refusal),
            Some((workspace, None)) => {
                table.workspace = Some(workspace).filter(|workspace| !workspace.is_empty());
                Ok(())
            }
            None => Ok(()),
        }
    }

    /// A refusal without an id may be of a switch: it says so. Then nothing is asked for again.
    pub(crate) fn switch_refused(&self, error: &Error) -> bool {
        let mut table = self.lock();
        let is_back = table.is_back;
        let wanted = table.going.as_ref().map(|(wanted, _)| wanted).or(table.workspace.as_ref());
        let names = |wanted: &String| error.to_string().ends_with(&format!("workspace {wanted}"));
        let is_switch = error.code() == "ERR_WORKSPACE_SWITCH_FAILED"
            || (error.kind() == Kind::Denied && error.to_string().contains("access") && wanted.is_some_and(names));
        match &mut table.going {
            Some((_, refusal)) if is_switch => {
                *refusal = Some(error.clone());
                true
            }
            None if is_switch && is_back => {
                table.workspace = None;
                false
            }
            _ => false,
        }
    }

    pub(crate) fn workspace(&self) -> Option<String> {
        self.lock().workspace.clone()
    }

    /// Begins to follow a task, under the id of the request for it: from a time on, in Unix milliseconds, or from now.
    pub(crate) fn follow(
        &self,
        id: &str,
        task: &str,
        recursive: bool,
        since_ms: Option<i64>,
        room: &Arc<Notify>,
    ) -> Arc<Lane<TaskEvent>> {
        let lane = Lane::new("events of a task", EVENTS, Arc::clone(room));
        let (task, subscription, last) = (task.to_owned(), String::new(), Vec::new());
        // By this side's clock, so that what happens during a break before the first event is told too.
        let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        let last_ms = since_ms.unwrap_or_else(|| i64::try_from(now.as_millis()).unwrap_or(0));
        let follow = Follow { task, recursive, lane: Arc::clone(&lane), subscription, last_ms, last };
        self.lock().follows.insert(id.to_owned(), follow);
        lane
    }

    /// The server's name for it. It is not wanted any more if whoever asked is gone.
    pub(crate) fn subscribed(&self, id: &str, subscription: &str, refused: Option<&str>) {
        let mut table = self.lock();
        if let Some(why) = refused {
            if let Some(follow) = table.follows.remove(id) {
                tracing::debug!(task = follow.task, why, "a task cannot be followed");
                follow.lane.end();
            }
            return;
        }
        if let Some(follow) = table.follows.get_mut(id) {
            subscription.clone_into(&mut follow.subscription);
            table.subscriptions.insert(subscription.to_owned(), id.to_owned());
        } else if !id.is_empty() && !subscription.is_empty() {
            // Without an id it is the answer to the end of one.
            table.unwanted.insert(subscription.to_owned());
        }
    }

    /// Ends it.
    pub(crate) fn unfollow(&self, id: &str) {
        let mut table = self.lock();
        let Some(follow) = table.follows.remove(id) else { return };
        if table.subscriptions.remove(&follow.subscription).is_some() {
            table.unwanted.insert(follow.subscription);
        }
    }

    /// Tells the server what is not wanted any more, as far as `tell` can.
    pub(crate) fn tell_unwanted(&self, tell: impl Fn(Up) -> bool) {
        self.lock().unwanted.retain(|subscription| {
            let operation = TaskSubscriptionOperation {
                op: OpType::Unsubscribe.into(),
                subscription_id: subscription.clone(),
                ..TaskSubscriptionOperation::default()
            };
            !tell(Up::TaskSubscriptionOp(Box::new(operation)))
        });
    }

    /// Gives the event back if nobody here follows it.
    pub(crate) fn task_event(&self, event: TaskEvent) -> Option<TaskEvent> {
        let mut table = self.lock();
        if table.unwanted.contains(&event.subscription_id) {
            return None;
        }
        let Some(id) = table.subscriptions.get(&event.subscription_id).cloned() else { return Some(event) };
        let event_of = event.subscription_id.clone();
        let Some(follow) = table.follows.get_mut(&id) else { return Some(event) };
        // The name is another one after a reconnect.
        let same = |known: &TaskEvent| {
            TaskEvent { subscription_id: String::new(), ..known.clone() }
                == TaskEvent { subscription_id: String::new(), ..event.clone() }
        };
        if event.emitted_at_unix_ms == follow.last_ms && follow.last.iter().any(same) {
            return None;
        }
        if event.emitted_at_unix_ms != follow.last_ms {
            (follow.last_ms, follow.last) = (event.emitted_at_unix_ms, Vec::new());
        }
        if follow.last.len() < 64 {
            follow.last.push(event.clone());
        }
        if follow.lane.push(event) == Pressure::Hard {
            tracing::warn!(task = follow.task, "who follows a task takes its events too slowly: it hears no more");
            follow.lane.end();
            table.follows.remove(&id);
            table.subscriptions.remove(&event_of);
            table.unwanted.insert(event_of);
        }
        None
    }

    /// Opens a way for what comes for a call or a tunnel.
    pub(crate) fn open(&self, id: &str, bound: usize, room: &Arc<Notify>) -> Arc<Lane<Frame>> {
        let lane = frames("frames of a call", bound, room);
        let mut table = self.lock();
        if table.is_over {
            lane.end();
        }
        table.calls.insert(id.to_owned(), Arc::clone(&lane));
        drop(table);
        // Somebody waits for an answer now: it is read on.
        room.notify_one();
        lane
    }

    /// Whether somebody still wants what a frame begins or goes on with.
    pub(crate) fn wants(&self, frame: &Up) -> bool {
        let id = match frame {
            Up::ProxyHttpRequest(frame) => &frame.request_id,
            Up::ProxyHttpBodyChunk(frame) if frame.is_request => &frame.request_id,
            _ => return true,
        };
        self.lock().calls.contains_key(id)
    }

    /// Whether somebody waits for what comes of a call, a tunnel or a task.
    pub(crate) fn is_waiting(&self) -> bool {
        let table = self.lock();
        !table.calls.is_empty() || !table.follows.is_empty()
    }

    pub(crate) fn close(&self, id: &str) {
        self.lock().calls.remove(id);
    }

    /// From now on, what others call here goes there.
    pub(crate) fn serve(&self, lane: &Arc<Lane<Frame>>) {
        let before = self.lock().server.replace(Arc::clone(lane));
        if let Some(before) = before {
            before.end();
        }
    }

    /// What others call here goes nowhere, if it still went there.
    pub(crate) fn unserve(&self, lane: &Arc<Lane<Frame>>) {
        let mut table = self.lock();
        if table.server.as_ref().is_some_and(|server| Arc::ptr_eq(server, lane)) {
            table.server = None;
        }
        drop(table);
        lane.end();
    }

    pub(crate) fn watch_revocations(&self, watcher: std::sync::Weak<dyn Revoked>) {
        let mut table = self.lock();
        table.revocations.retain(|known| known.strong_count() > 0);
        table.revocations.push(watcher);
    }

    pub(crate) fn revoked(&self, revocation: &AuthorityGrantRevocation) {
        let watchers: Vec<_> = self.lock().revocations.iter().filter_map(std::sync::Weak::upgrade).collect();
        watchers.iter().for_each(|watcher| watcher.revoked(revocation));
    }

    /// A frame of a call, a tunnel, or for who serves.
    pub(crate) fn frame(&self, down: Down) {
        let mut table = self.lock();
        let id = match &down {
            Down::ProxyHttpResponse(frame) => &frame.request_id,
            Down::ProxyHttpBodyChunk(frame) => &frame.request_id,
            Down::TunnelAck(frame) => &frame.tunnel_id,
            Down::TunnelClose(frame) => &frame.tunnel_id,
            Down::TunnelData(frame) => &frame.tunnel_id,
            _ => "",
        };
        if let Some(call) = table.calls.get(id).cloned() {
            if call.push(Frame::Down(down)) == Pressure::Hard {
                table.calls.retain(|_, other| !Arc::ptr_eq(other, &call));
                call.push(Frame::Failed(Error::new(Kind::Exhausted, "what came was not read fast enough")));
                call.end();
            }
        } else if let Some(server) = &table.server {
            if server.push(Frame::Down(down)) == Pressure::Hard {
                // It cannot keep up: everything that it serves fails, and what waits is forgotten.
                server.retain(|_| false);
                let why = "frames of calls came faster than they could be handled";
                server.push(Frame::Failed(Error::new(Kind::Exhausted, why)));
            }
        } else {
            tracing::debug!("a frame came for nobody");
        }
    }

    /// A refusal of a call.
    pub(crate) fn refused(&self, error: &ErrorResponse) -> bool {
        let Some(call) = self.lock().calls.remove(&error.request_id) else { return false };
        call.push(Frame::Failed(Error::from_response(error)));
        call.end();
        true
    }

    /// The connection broke: calls and tunnels do not survive it.
    pub(crate) fn broken(&self, why: &Error) {
        let (calls, server) = {
            let mut table = self.lock();
            (std::mem::take(&mut table.calls), table.server.clone())
        };
        if let Some(server) = server {
            server.push(Frame::Failed(why.clone()));
        }
        for call in calls.into_values() {
            let message = format!("the connection broke: {why}");
            let error = Error::new(Kind::Interrupted, message).with_source(why.clone());
            call.push(Frame::Failed(error));
            call.end();
        }
    }

    /// The end.
    pub(crate) fn end(&self) {
        let mut table = self.lock();
        table.is_over = true;
        for follow in table.follows.values() {
            follow.lane.end();
        }
        if let Some(server) = &table.server {
            server.end();
        }
    }
}

/// To be on a workspace.
pub(crate) fn switch(workspace: &str) -> Up {
    Up::SwitchWorkspace(Box::new(SwitchWorkspace { new_workspace_id: workspace.to_owned() }))
}

//! Who is there, what each is told, and what becomes of what it has when it goes.

use std::{
    collections::{HashMap, HashSet},
    sync::Arc,
    time::Duration,
};

use tokio::task::JoinHandle;
use trunkline_store::ledger::{self, ReadTx, WriteTx};
use uuid::Uuid;

use super::{
    Mail, Mode, Task, TaskEvent, Tasks, Times, Wait,
    assign::{Place, Workers},
    decide::{Context, Request},
    held::{self, Leaving},
    mailbox::{Given, Mailbox, lock},
    open::OpenTasks,
    operate::{Changed, step},
    own_queue, pool_queue,
    sql::{self, HeldAt},
    start_queue,
};
use crate::{
    error::Error,
    identity::Identity,
    token::{Secret, digest},
};

/// How long a token for an agent's start is good, in milliseconds. The published figure.
pub(super) const TOKEN_MS: i64 = 24 * 3600 * 1000;

/// Pause after the ledger refused.
const RETRY_PAUSE: Duration = Duration::from_millis(200);

/// Other workers that are tried when the first is the one that failed what waits.
const OTHERS_MAX: usize = 8;

/// Everybody who is there.
pub(super) struct Floor {
    pub(super) workers: Workers,
    pub(super) mailboxes: HashMap<String, Arc<Mailbox>>,
    pub(super) open: OpenTasks,
    /// Who is being started, so that not every message to it asks.
    pub(super) starting: HashSet<String>,
    /// Who has left, as long as its tasks do not say so.
    leaving: HashMap<String, Departures>,
    /// Losses that sessions have heard of, as long as the ledger does not say so.
    losses_told: HashMap<String, HashSet<Uuid>>,
}

/// Sessions of one identity that have left, and whose tasks do not all say so yet.
#[derive(Default)]
struct Departures {
    count: usize,
    /// How often it has come back meanwhile.
    returns: u64,
}

impl Floor {
    pub(super) fn new(room: usize) -> Self {
        let (mailboxes, starting, open) = (HashMap::new(), HashSet::new(), OpenTasks::default());
        let (leaving, losses_told) = (HashMap::new(), HashMap::new());
        Self { workers: Workers::new(room), mailboxes, open, starting, leaving, losses_told }
    }

    /// What somebody's leaving means for its tasks is written.
    fn left(&mut self, identity: &str) {
        if let Some(departures) = self.leaving.get_mut(identity) {
            departures.count -= 1;
            if departures.count == 0 {
                self.leaving.remove(identity);
            }
        }
    }

    /// The ledger says that a session has heard of a loss, or does not take it.
    fn noted_loss(&mut self, identity: &str, task: Uuid) {
        if let Some(told) = self.losses_told.get_mut(identity) {
            told.remove(&task);
            if told.is_empty() {
                self.losses_told.remove(identity);
            }
        }
    }

    /// Whether somebody is here, or was since it left, when it had come back so often.
    pub(super) fn is_back(&self, identity: &str, returns: u64) -> bool {
        let was_here = || self.leaving.get(identity).is_none_or(|departures| departures.returns != returns);
        self.workers.is_there(identity) || was_here()
    }

    /// Somebody does not have a task any more.
    pub(super) fn release(&mut self, identity: &str, task: Uuid) {
        self.workers.release(identity, task);
        if let Some(mailbox) = self.mailboxes.get(identity) {
            mailbox.take_back(task);
        }
    }
}

/// How somebody comes.
#[derive(Clone, Debug, Default)]
pub struct Arrival {
    /// It goes on where a session of its was a moment ago.
    pub resumed: bool,
    /// It is a process that was here before, whether or not its session is still there.
    pub is_same: bool,
    /// It takes no tasks that are for any of its implementation.
    pub declines_pool: bool,
    /// What an orchestrator can start.
    pub profiles: Vec<String>,
    /// The task whose token it came in with.
    pub task: Option<Uuid>,
}

/// How a session ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Leave {
    /// Its client said goodbye: the task that it stood for is done.
    Goodbye,
    /// It is ended from here: the server stops.
    Stop,
    /// Its client is gone.
    Lost,
}

/// A session's place among those who do tasks. [`Desk::leave`] ends it.
pub struct Desk {
    pub(super) tasks: Tasks,
    pub(super) identity: String,
    session: String,
    pub(super) mailbox: Arc<Mailbox>,
    caught_up: u64,
    /// Where what it has and was not told of goes on, if the mailbox had no room for it.
    behind: Option<HeldAt>,
    /// What the ledger says of it is known here. Until then it may have what nobody noted.
    is_settled: bool,
    /// The task that the session stands for, if it stands for one.
    pub bound: Option<Box<Task>>,
}

impl Tasks {
    /// Somebody is there: it has again what it had, and gets what waits for it.
    ///
    /// # Errors
    /// [`crate::Kind::Unavailable`].
    pub async fn arrive(&self, identity: &Identity, session: &str, arrival: Arrival) -> Result<Desk, Error> {
        let name = identity.to_string();
        let mailbox = {
            let mut floor = self.floor();
            let before = floor.mailboxes.get(&name).filter(|_| arrival.resumed);
            let mailbox = Mailbox::new(before.map(|before| &**before));
            floor.mailboxes.insert(name.clone(), mailbox.clone());
            floor.starting.remove(&name);
            if let Some(departures) = floor.leaving.get_mut(&name) {
                departures.returns += 1;
            }
            floor.workers.enter(&name, session, takes(identity, &arrival));
            mailbox
        };
        let mut desk = Desk {
            tasks: self.clone(),
            identity: name.clone(),
            session: session.to_owned(),
            mailbox,
            caught_up: 0,
            behind: None,
            is_settled: false,
            bound: None,
        };
        // Who is refused leaves by dropping its desk.
        desk.take_up(&arrival).await?;
        let tasks = self.clone();
        self.spawn_job(async move { tasks.serve_worker(&name).await });
        Ok(desk)
    }

    /// What an orchestrator that is there can start.
    #[must_use]
    pub fn profiles(&self, orchestrator: &str) -> Vec<String> {
        let floor = self.floor();
        let all = floor.workers.takes(orchestrator).iter().filter_map(|queue| queue.strip_prefix("start::"));
        all.map(ToOwned::to_owned).collect()
    }

    /// What it has, what it stands for, and what waits for it alone.
    async fn take_up(&self, name: &str, arrival: &Arrival) -> Result<Option<Box<Task>>, Error> {
        let (identity, own) = (name.to_owned(), own_queue(name));
        // Before looking: what is noted meanwhile may have been read.
        let told = self.floor().losses_told.get(name).cloned().unwrap_or_default();
        // Behind what is still being written of its leaving.
        let found = if self.floor().leaving.contains_key(name) {
            let found = self.write(move |tx| {
                let (identity, own) = (identity.clone(), own.clone());
                Box::pin(async move { Ok(found(tx.as_read(), &identity, &own).await?) })
            });
            found.await?
        } else {
            let found = self.read(move |tx| {
                let (identity, own) = (identity.clone(), own.clone());
                Box::pin(async move { Ok(found(tx, &identity, &own).await?) })
            });
            found.await?
        };
        if let Some(mailbox) = self.floor().mailboxes.get(name) {
            lock(&mailbox.inside).inputs.extend(found.inputs);
            let untold = found.losses.into_iter().filter(|event| !told.contains(&event.task));
            untold.for_each(|event| mailbox.tell(Mail::Lost(event.into())));
        }
        let bound = arrival.task.or(found.start.as_ref().map(|start| start.id));
        if found.held.is_empty() && bound.is_none() && !found.is_waiting {
            return Ok(None);
        }
        // Before what takes a while: what ends meanwhile is released, and stays so.
        self.floor().workers.hold_all(name, found.held.iter().map(|(id, _)| *id));
        let away = found.held.iter().filter(|(_, is_away)| *is_away).map(|(id, _)| *id).collect();
        let (stands_for, changes) = held::come_back(self, name, (away, arrival.is_same), bound).await?;
        if found.is_waiting {
            self.floor().workers.note(&own_queue(name));
        }
        for changed in changes {
            self.settle(changed).await;
        }
        Ok(stands_for.map(Box::new))
    }

    /// Gives what waits in a queue to those who have room.
    pub(super) async fn serve_queue(&self, queue: &str) {
        // Places with workers that failed what comes next; kept, so that another one is looked for.
        let mut kept: Vec<Place> = Vec::new();
        loop {
            let place = if kept.len() < OTHERS_MAX { self.floor().workers.reserve(queue) } else { None };
            let is_last = match place {
                Some(place) => match self.serve(&place).await {
                    Served::Something => false,
                    Served::NotForIt => {
                        kept.push(place);
                        false
                    }
                    Served::Nothing => {
                        kept.push(place);
                        true
                    }
                },
                None => true,
            };
            if is_last {
                let mut floor = self.floor();
                // Each of them, whatever the others say.
                let added = kept.drain(..).filter(|place| floor.workers.give_up(place)).count();
                if added == 0 {
                    return;
                }
            }
        }
    }

    /// Gives a worker what waits for it, as long as it has room.
    pub(super) async fn serve_worker(&self, identity: &str) {
        let mut except = Vec::new();
        loop {
            let Some(place) = self.floor().workers.reserve_for(identity, &except) else { return };
            let served = self.serve(&place).await;
            if !matches!(served, Served::Something) && !self.floor().workers.give_up(&place) {
                except.push(place.queue);
            }
        }
    }

    /// A place was for nothing; who was added meanwhile gets it.
    pub(super) fn give_up(&self, place: &Place) {
        if self.floor().workers.give_up(place) {
            let (tasks, queue) = (self.clone(), place.queue.clone());
            self.spawn_job(async move { tasks.serve_queue(&queue).await });
        }
    }

    /// Gives the worker of a place what comes next.
    async fn serve(&self, place: &Place) -> Served {
        match self.claim(place).await {
            Ok(Served::Nothing) => {
                self.floor().workers.found_empty(place);
                Served::Nothing
            }
            Ok(served) => served,
            Err(error) => {
                // The queue stays noted.
                tracing::warn!(%error, queue = place.queue, "task not handed out; trying again");
                self.look_again();
                Served::Nothing
            }
        }
    }

    async fn claim(&self, place: &Place) -> Result<Served, Error> {
        let (queue, identity, times) = (place.queue.clone(), place.identity.clone(), self.0.times);
        let context = self.context(true);
        let secret = if queue.starts_with("start::") { Some(Secret::task_token()?) } else { None };
        let hash = secret.as_ref().map(|secret| digest(secret.reveal()));
        let claim = self.write(move |tx| {
            let (queue, identity, hash) = (queue.clone(), identity.clone(), hash.clone());
            Box::pin(async move { claim(tx, &queue, &identity, hash.as_deref(), context, times).await })
        });
        match claim.await? {
            Ok((changed, payload)) => {
                let mut floor = self.floor();
                floor.workers.fill(place, changed.after.id);
                drop(floor);
                self.watch(&changed.after);
                self.hand(changed.after, payload, secret);
                Ok(Served::Something)
            }
            Err(true) => Ok(Served::NotForIt),
            Err(false) => Ok(Served::Nothing),
        }
    }

    /// A task was put into its queue: whoever has room gets it.
    pub(super) async fn offer(&self, task: &Task) {
        self.watch(task);
        self.floor().workers.note(&task.queue);
        self.serve_queue(&task.queue).await;
    }

    /// Tells a worker of a task that it has; if it is away, it is told when it comes.
    pub(super) fn hand(&self, task: Task, payload: Vec<u8>, token: Option<Secret>) {
        let mailbox = self.floor().mailboxes.get(&task.assignee).cloned();
        match mailbox {
            Some(mailbox) => mailbox.hand(task, payload, token),
            None => self.gone(&task),
        }
    }

    /// Somebody was given a task and left before it was told.
    pub(super) fn gone(&self, task: &Task) {
        let mut floor = self.floor();
        drop(self.leaves(&mut floor, task.assignee.clone(), vec![task.id], (None, Leave::Stop)));
    }

    /// Somebody has left: what it was not told goes to others, the rest waits for it. It happens whether or not anybody waits
    /// for the answer.
    fn leaves(
        &self,
        floor: &mut Floor,
        identity: String,
        untold: Vec<Uuid>,
        (done, how): (Option<Uuid>, Leave),
    ) -> JoinHandle<()> {
        let departures = floor.leaving.entry(identity.clone()).or_default();
        departures.count += 1;
        let returns = departures.returns;
        let tasks = self.clone();
        self.spawn_job(async move {
            let is_lost = how == Leave::Lost;
            let leaving = Leaving { identity: identity.clone(), returns, untold, done, is_lost };
            let left = held::leave(&tasks, leaving).await;
            tasks.floor().left(&identity);
            if let Err(error) = left {
                // The rows still say that it is there; the next start of the server finds them.
                tracing::error!(%error, identity, "tasks of somebody who left are not noted");
            }
        })
    }
}

/// What came of looking for something for a worker.
enum Served {
    Something,
    Nothing,
    /// It waits, but not for this worker.
    NotForIt,
}

/// What a principal takes from queues.
fn takes(identity: &Identity, arrival: &Arrival) -> Vec<String> {
    let own = own_queue(&identity.to_string());
    match identity {
        Identity::Agent(named) => vec![own, pool_queue(&named.workspace, &named.implementation)],
        Identity::Service(unplaced) if !arrival.declines_pool => {
            vec![own, format!("pool::{}::", unplaced.implementation)]
        }
        Identity::Orchestrator(_) => {
            std::iter::once(own).chain(arrival.profiles.iter().map(|profile| start_queue(profile))).collect()
        }
        _ => vec![own],
    }
}

/// What the ledger says of somebody who comes.
struct Found {
    inputs: HashMap<Uuid, Wait>,
    /// Whether it is taken for gone from each.
    held: Vec<(Uuid, bool)>,
    start: Option<Task>,
    is_waiting: bool,
    /// What it lost while it was away.
    losses: Vec<TaskEvent>,
}

async fn found(tx: &mut ReadTx, identity: &str, own: &str) -> Result<Found, ledger::Error> {
    let inputs = sql::awaiting_input(tx, identity).await?.into_iter();
    Ok(Found {
        inputs: inputs.filter_map(|task| Some((task.id, task.wait?))).collect(),
        held: sql::held_ids(tx, identity).await?,
        start: sql::start_of(tx, identity).await?,
        is_waiting: sql::is_waiting(tx, own).await?,
        losses: sql::losses(tx, identity).await?,
    })
}

/// What comes next for a worker; or whether something waits that is not for it.
async fn claim(
    tx: &mut WriteTx,
    queue: &str,
    identity: &str,
    hash: Option<&str>,
    context: Context,
    times: Times,
) -> Result<Result<(Changed, Vec<u8>), bool>, Error> {
    let Some(task) = sql::head(tx.as_read(), queue, identity).await? else {
        return Ok(Err(sql::is_waiting(tx.as_read(), queue).await?));
    };
    let request = match task.mode {
        Mode::Startup => Request::Launch { by: identity.to_owned() },
        _ => Request::Assign { to: identity.to_owned() },
    };
    let changed = step(tx, &task, &request, context, &times).await?;
    if let Some(hash) = hash {
        // The orchestrator that was asked before does not start it any more.
        sql::revoke_tokens(tx, task.id).await?;
        sql::put_token(tx, hash, &task, &task.target, context.now.saturating_add(TOKEN_MS)).await?;
    }
    let payload = sql::payload(tx.as_read(), task.id).await?;
    Ok(Ok((changed, payload)))
}

impl Desk {
    async fn take_up(&mut self, arrival: &Arrival) -> Result<(), Error> {
        self.bound = self.tasks.take_up(&self.identity, arrival).await?;
        self.is_settled = true;
        self.mailbox.want();
        Ok(())
    }

    /// The next thing to be told. Cancel-safe.
    pub async fn next(&mut self) -> Mail {
        loop {
            match self.try_next().await {
                Ok(Some(mail)) => return mail,
                Ok(None) => self.mailbox.arrived().await,
                Err(error) => {
                    tracing::warn!(%error, identity = self.identity, "tasks are not handed out; trying again");
                    tokio::time::sleep(RETRY_PAUSE).await;
                }
            }
        }
    }

    /// As [`Desk::next`], if there is something by now.
    ///
    /// # Errors
    /// [`crate::Kind::Unavailable`]; nothing is lost.
    pub async fn try_next(&mut self) -> Result<Option<Mail>, Error> {
        loop {
            if let Some(mail) = self.mailbox.next() {
                return Ok(Some(self.told(mail)));
            }
            let wanted = self.mailbox.wanted();
            let after = match self.behind.take() {
                // From the start if something was added, because it may be more urgent.
                _ if wanted != self.caught_up => None,
                None => return Ok(None),
                after => after,
            };
            // Looked for again if this does not end well.
            self.behind = Some(HeldAt::start());
            // Rare, and large: not a part of every connection.
            self.behind = Box::pin(self.catch_up(after)).await?;
            self.caught_up = wanted;
        }
    }

    /// What somebody lost is told once its session takes it.
    fn told(&self, mail: Mail) -> Mail {
        let Mail::Lost(event) = mail else { return mail };
        let (tasks, identity, task) = (self.tasks.clone(), self.identity.clone(), event.task);
        self.tasks.floor().losses_told.entry(identity.clone()).or_default().insert(task);
        self.tasks.spawn_job(async move {
            let name = identity.clone();
            let told = tasks.write(move |tx| {
                let identity = name.clone();
                Box::pin(async move { Ok(sql::remove_loss(tx, &identity, task).await?) })
            });
            let told = told.await;
            tasks.floor().noted_loss(&identity, task);
            if let Err(error) = told {
                tracing::debug!(%error, identity, "it is told again what it lost");
            }
        });
        Mail::Event(event)
    }

    /// Ends it.
    pub async fn leave(mut self, how: Leave) {
        if let Some(left) = self.end(how) {
            // It happens whether or not anybody waits.
            let _ = left.await;
        }
    }

    /// Nobody is here any more, unless a successor is.
    fn end(&mut self, how: Leave) -> Option<JoinHandle<()>> {
        let mut floor = self.tasks.floor();
        let (has, given) = self.forget(&mut floor)?;
        if has.is_empty() && self.is_settled {
            return None;
        }
        let untold = has.into_iter().filter(|task| !given.get(task).is_some_and(|given| given.is_taken)).collect();
        let done = self.bound.as_ref().filter(|_| how == Leave::Goodbye).map(|task| task.id);
        Some(self.tasks.leaves(&mut floor, self.identity.clone(), untold, (done, how)))
    }

    /// Answers what the identity had, and what of it the session was handed.
    fn forget(&self, floor: &mut Floor) -> Option<(HashSet<Uuid>, HashMap<Uuid, Given>)> {
        let has = floor.workers.leave(&self.identity, &self.session)?;
        floor.mailboxes.remove(&self.identity);
        Some((has, self.mailbox.close()))
    }
}

impl Drop for Desk {
    fn drop(&mut self) {
        // Without its runtime the process is about to end, and the next one takes everybody for gone.
        if tokio::runtime::Handle::try_current().is_ok() {
            drop(self.end(Leave::Lost));
        }
        self.mailbox.clear();
    }
}

//! A session: an identity's lease, the reader of its lanes, and how far it got.
//!
//! Attaching takes the lease, or takes it over from the session that the client resumes, and opens a reader on the
//! identity's lanes where the identity stopped. Lanes differ in where they begin for somebody new:
//!
//! | lane | begins | remembered |
//! | --- | --- | --- |
//! | one's own (`ag` `tu` `ta` `us`, the singletons' receivers) | with all that is retained | yes, but for `ta` |
//! | `uu` and `pg::us` of a user | at the tail, later where the window stopped | yes |
//! | `gu`, `uw` and `pg` of a user's workspace | at the tail, later where the window stopped on that workspace | yes, by workspace |
//! | `pg` of an agent's workspace | at the tail, later where the agent stopped | yes |
//! | `ga` of an agent, and `tb` of a task where that is a broadcast | at the tail, always: old broadcasts are not for newcomers | no |
//!
//! Lanes that begin at the tail have a row before the client is told that it is attached, so that a crash skips nothing of
//! what is said from then on.
//!
//! A record is delivered when it has arrived at the client, as far as the transport can tell ([`Session::delivery`]);
//! [`Session::save`] makes that durable. A crash repeats what was delivered since the last save, and skips nothing. What an identity
//! answers into a conversation carries how far it had heard, in the same append, so that a crash does not repeat what was answered.

mod absent;
pub mod dead_letter;
mod seats;
pub(crate) mod sql;
mod taken;

use std::{
    cmp::Reverse,
    net::IpAddr,
    sync::{
        Arc,
        atomic::Ordering::{Relaxed, SeqCst},
    },
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use trunkline_store::{
    lease::{self, Lease},
    log::{Append, Epoch, Offset, Reader, Topic},
};
use uuid::Uuid;

pub use absent::Absentees;
use seats::{Seat, Seats};
use sql::Position;
pub(crate) use sql::{MIGRATIONS, owners};
pub(crate) use taken::Taken;
pub use taken::Transport;

use crate::{
    caller::{Caller, Credential},
    error::{Error, Kind},
    gate::{Administer, Attend, AttendPermit, Enter, Gate, Keep, KeepPermit, QueryConnection},
    identity::{self, Identity, Named, PrincipalKind},
    presence::{self, Connection, Meter, Presence},
    token::opens,
    topic::{Target, heard, no_service, own_lane, progress_for, progress_in, task_events, task_messages},
    work::{WorkGroup, WorkGroups},
};

/// As far as it is counted how many records are still to come for a session.
pub const LAG_MAX: usize = 10_000;

/// As many sessions are looked at when operators ask how they stand: a look into the index takes some 5 µs.
const STANDINGS_MAX: usize = 10_000;

/// Scope of the lane that is an identity's own.
const OWN: &str = "own";

/// Scope of a user's lane over all workspaces.
const WIDE: &str = "wide";

/// Scope of what a group of tasks works off together.
const GROUP: &str = "group";

/// Scope of the lane of progress in an agent's workspace.
const PROGRESS: &str = "progress";

/// The sessions of this process. Clones share them.
#[derive(Clone)]
pub struct Sessions {
    gate: Gate,
    seats: Seats,
    presence: Presence,
    groups: WorkGroups,
    broadcast_tasks: Arc<[glob::Pattern]>,
    lost_sessions_max: u32,
}

/// How sessions are.
#[derive(Clone, Debug, Default)]
pub struct Options {
    /// Connections of principals that live in one workspace; 0 is no limit.
    pub connections_per_workspace: u32,
    /// Patterns of workspaces in which `tb` goes to every task of an implementation that is there, as the published server
    /// does it, and not to one of them, as the published documentation says.
    pub broadcast_tasks: Vec<glob::Pattern>,
    /// Sessions that are lost over a message before it is a [dead letter](dead_letter); 0 is never.
    pub lost_sessions_max: u32,
}

/// An attached identity. Dropping it releases the lease; call [`Session::save`] first.
pub struct Session {
    /// Who is attached.
    pub caller: Caller,
    /// What the client is told about its connection.
    pub welcome: Welcome,
    /// Ends when somebody else takes the identity.
    pub lease: Lease,
    /// Yields what is said to the identity.
    pub reader: Reader,
    /// The share of a non-unique task in the work of its implementation.
    pub work: Option<Arc<WorkGroup>>,
    gate: Gate,
    keep: KeepPermit,
    attend: AttendPermit,
    epoch: Epoch,
    taken: Arc<Taken>,
    /// What operators see of it.
    pub meter: Arc<Meter>,
    /// The mark as of the last save.
    saved: u64,
    lanes: Vec<Lanes>,
    workspace: Option<String>,
    presence: Presence,
    /// See [`Options::lost_sessions_max`].
    lost_sessions_max: u32,
    _seat: Option<Seat>,
}

/// How a session stands, for operators.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Standing {
    /// Whose it is.
    pub connection: Arc<Connection>,
    /// Messages and reports of progress that were taken from it.
    pub accepted: u64,
    /// Messages and reports of progress that it was given.
    pub delivered: u64,
    /// Of those, what it has to acknowledge and did not yet.
    pub unacknowledged: u64,
    /// Records of its lanes, and of work that it shares, that were not read for it yet: up to [`LAG_MAX`]. Some of them may be
    /// for others.
    pub lag: u64,
}

/// About a connection, for its client.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Welcome {
    /// The client resumed a session that was still attached.
    pub resumed: bool,
    /// How often it did so since `initial_connection_ms`.
    pub reconnections: u32,
    /// When the identity was first attached, Unix milliseconds; kept over resumptions.
    pub initial_connection_ms: u64,
}

/// How far an identity had heard its own lane. It goes with what the identity answers, and counts as what was delivered before it
/// does.
#[derive(Clone, Debug)]
pub struct Heard {
    topic: Topic,
    position: u64,
}

impl Heard {
    pub(crate) fn append(&self) -> Append {
        Append::new(&self.topic, self.position.to_be_bytes().to_vec())
    }

    fn decode(payload: &[u8]) -> Option<u64> {
        payload.try_into().ok().map(u64::from_be_bytes)
    }
}

/// Lanes whose position is remembered together.
struct Lanes {
    scope: String,
    topics: Vec<Topic>,
    /// They were read from here on.
    from: u64,
    /// While they are behind the other lanes.
    behind: Option<Behind>,
}

/// Lanes that were joined where they had stopped, behind what the reader had handed out of the others by then. Their
/// history comes before anything else, with offsets up to `joined_at`.
struct Behind {
    joined_at: u64,
    taken: Arc<Taken>,
}

impl Lanes {
    /// How far they were delivered, when everything else was up to `taken`.
    fn position(&self, taken: u64) -> u64 {
        match &self.behind {
            Some(behind) if taken <= behind.joined_at => behind.taken.now().max(self.from),
            _ => taken.max(self.from),
        }
    }
}

impl Sessions {
    /// The sessions behind `gate`.
    #[must_use]
    pub fn new(gate: Gate, options: Options) -> Self {
        Self {
            groups: WorkGroups::new(gate.clone()),
            gate,
            seats: Seats::new(options.connections_per_workspace),
            presence: Presence::default(),
            broadcast_tasks: options.broadcast_tasks.into(),
            lost_sessions_max: options.lost_sessions_max,
        }
    }

    /// The gate that they are behind.
    #[must_use]
    pub fn gate(&self) -> &Gate {
        &self.gate
    }

    /// Who is attached.
    #[must_use]
    pub fn presence(&self) -> &Presence {
        &self.presence
    }

    /// One of the connected services of an implementation.
    pub(crate) fn pick_service(&self, implementation: &str) -> Result<Target, Error> {
        match self.presence.pick_service(implementation) {
            Some(Identity::Service(service)) => Ok(Target::service(&service)),
            _ => Err(no_service(implementation)),
        }
    }

    /// Ends a session: its client is told the reason and does not come back by itself.
    ///
    /// # Errors
    /// [`Kind::Denied`], [`Kind::NotFound`].
    pub async fn disconnect(&self, caller: &Caller, session: &str, reason: &str) -> Result<(), Error> {
        let permit = self.gate.authorize(caller, Administer("sessions"))?;
        let missing = || Error::new(Kind::NotFound, "ERR_NOT_FOUND", format!("session not found: {session}"));
        let identity = self.presence.bid_farewell(session, reason).ok_or_else(missing)?;
        if self.gate.revoke(&permit, &identity, session).await? { Ok(()) } else { Err(missing()) }
    }

    /// The sessions that fit, by identity.
    ///
    /// # Errors
    /// [`Kind::Denied`].
    pub fn list(&self, caller: &Caller, filter: &presence::Filter) -> Result<Vec<Connection>, Error> {
        self.gate.authorize(caller, Administer("sessions"))?;
        Ok(self.presence.list(filter))
    }

    /// How the sessions stand: those with the most to come first, then those that did the most, and of those as many as are
    /// wanted; and how many there are.
    ///
    /// # Errors
    /// [`Kind::Denied`], [`Kind::Unavailable`].
    pub async fn standings(&self, caller: &Caller, most: usize) -> Result<(Vec<Standing>, usize), Error> {
        let permit = self.gate.authorize(caller, Administer("sessions"))?;
        let mut sessions = self.presence.meters();
        let total = sessions.len();
        // Whoever did the most is looked at, if there are more than that can be.
        sessions.sort_by_cached_key(|(_, meter)| Reverse(meter.traffic()));
        sessions.truncate(STANDINGS_MAX);
        let to_come: Vec<_> = sessions.iter().map(|(_, meter)| meter.to_come()).collect();
        let wanted = to_come.iter().flat_map(|(behind, _)| behind.iter().cloned()).collect();
        let mut unread = self.gate.unread(&permit, wanted, LAG_MAX).await?.into_iter();
        let mut all = Vec::with_capacity(sessions.len());
        for ((connection, meter), (behind, returned)) in sessions.into_iter().zip(to_come) {
            let lag = unread.by_ref().take(behind.len()).sum::<u64>() + returned;
            let [accepted, delivered, unacknowledged] =
                [&meter.accepted, &meter.delivered, &meter.unacknowledged].map(|count| count.load(SeqCst));
            all.push(Standing { connection, accepted, delivered, unacknowledged, lag: lag.min(LAG_MAX as u64) });
        }
        // Stable: among equals those that did the most.
        all.sort_by_key(|standing| Reverse(standing.lag));
        all.truncate(most);
        Ok((all, total))
    }

    /// The session with this id.
    ///
    /// # Errors
    /// [`Kind::Denied`], [`Kind::NotFound`].
    pub fn get(&self, caller: &Caller, session: &str) -> Result<Connection, Error> {
        self.gate.authorize(caller, Administer("sessions"))?;
        let missing = || Error::new(Kind::NotFound, "ERR_NOT_FOUND", format!("session not found: {session}"));
        self.presence.get(session).ok_or_else(missing)
    }

    /// Whether a principal is connected, and when it was last, in Unix seconds: one's own always, others by capability. One that is not
    /// known was there at 0.
    ///
    /// # Errors
    /// [`Kind::Denied`], [`Kind::Unavailable`].
    pub async fn last_seen(&self, caller: &Caller, kind: PrincipalKind, id: &str) -> Result<(bool, i64), Error> {
        self.gate.authorize(caller, QueryConnection { kind, id })?;
        if self.presence.is_connected(kind, id) {
            return Ok((true, sql::now()));
        }
        // A user was there in any of its windows.
        let windows = matches!(kind, PrincipalKind::User).then(|| format!("us::{id}::")).unwrap_or_default();
        let id = id.to_owned();
        let at = self.gate.glance(move |tx| sql::last_saved(tx, id.clone(), windows.clone())).await?;
        Ok((false, at))
    }

    /// Attaches `identity`, in place of the session `resume` if that one holds it, and in place of one with the same credential
    /// whose client gives no sign of life for 2 s.
    ///
    /// # Errors
    /// [`Kind::Exists`] if another session holds the identity, [`Kind::Exhausted`] if its workspace has no seat left,
    /// [`Kind::Unavailable`] if the store does not answer.
    pub async fn attach(&self, identity: Identity, credential: Credential, resume: &str) -> Result<Session, Error> {
        // The published Go client takes the session's id for the one that was assigned, and tells others to write to it.
        let id = match &identity {
            Identity::Task(named) => named.specifier.clone(),
            _ => Uuid::new_v4().to_string(),
        };
        let caller = Caller::new(identity, id, credential);
        let attend = self.gate.authorize(&caller, Attend)?;
        let keep = self.gate.authorize(&caller, Keep)?;
        let Held { lease, welcome, is_successor } = self.hold(&caller, &attend, resume).await?;
        let seat = caller.identity.workspace().map(|workspace| self.seats.take(workspace, is_successor));
        let seat = seat.transpose()?;
        let before = self.taken_before(&caller.identity, resume, welcome).await;
        let tail = self.gate.tail(&attend);
        let broadcast = self.broadcast_of(&caller.identity)?;
        if !resume.is_empty() {
            dead_letter::take_back_loss(&self.gate, &caller.identity, resume).await?;
        }
        let work = match broadcast {
            Some(_) => None,
            None => self.groups.join(&caller.identity, &attend, &keep).await?,
        };
        let mut session = Session {
            reader: self.gate.reader(&attend),
            meter: Arc::new(Meter::new(work.clone())),
            work,
            gate: self.gate.clone(),
            epoch: tail.epoch,
            taken: Arc::new(Taken::new(before)),
            saved: before,
            lanes: Vec::new(),
            workspace: None,
            presence: self.presence.clone(),
            lost_sessions_max: self.lost_sessions_max,
            _seat: seat,
            caller,
            welcome,
            lease,
            keep,
            attend,
        };
        if session.follow_lanes(before).await? {
            session.save().await?;
        }
        if let Some(all) = broadcast {
            session.reader.follow_from_tail(&all)?;
            session.meter.reads(&all, tail.offset.0, None);
        }
        let connection = Connection {
            session: session.caller.session.clone(),
            identity: session.caller.identity.clone(),
            workspace: session.workspace().map(ToOwned::to_owned),
            connected_at_ms: now_ms(),
            token: session.caller.credential.token.clone(),
            task: session.caller.credential.task,
            fencing_epoch: session.lease.holder().epoch.0,
            reconnections: session.welcome.reconnections,
            address: None,
            heard_at_ms: 0,
        };
        self.presence.enter(connection, session.taken.clone(), session.meter.clone());
        Ok(session)
    }

    /// How far the session got that was taken over, which may have delivered more than it saved.
    async fn taken_before(&self, identity: &Identity, resume: &str, welcome: Welcome) -> u64 {
        // A task under an assigned id comes back under another one; its session has the name of the id.
        if let (Identity::Task(named), false) = (identity, resume.is_empty())
            && let Some(former) =
                self.presence.taken(&Identity::Task(Named { specifier: resume.to_owned(), ..named.clone() }))
        {
            former.resume();
        }
        let Some(taken) = self.presence.taken(identity) else { return 0 };
        if welcome.resumed {
            taken.resume();
        }
        taken.settled().await
    }

    /// What goes to every task of this one's implementation, where it does.
    fn broadcast_of(&self, identity: &Identity) -> Result<Option<Topic>, Error> {
        let Identity::Task(named) = identity else { return Ok(None) };
        if !opens(&self.broadcast_tasks, &named.workspace) {
            return Ok(None);
        }
        let (workspace, implementation) = (named.workspace.clone(), named.implementation.clone());
        Target::AnyTask { workspace, implementation }.topic().map(Some)
    }

    async fn hold(&self, caller: &Caller, attend: &AttendPermit, resume: &str) -> Result<Held, Error> {
        if !resume.is_empty() {
            let again = |note: &[u8]| Welcome::resumed(note).encode();
            match self.gate.take_over(attend, resume, &caller.session, again).await {
                Ok(lease) => {
                    let welcome = Welcome::decode(&lease.holder().note, true);
                    return Ok(Held { lease, welcome, is_successor: true });
                }
                Err(lease::Error::NotHolder { .. }) => {}
                Err(error) => return Err(error.into()),
            }
        }
        let welcome = Welcome::first();
        match self.gate.hold(attend, &caller.session, welcome.encode()).await {
            Ok(lease) => Ok(Held { lease, welcome, is_successor: false }),
            Err(lease::Error::Held { holder, .. }) => self.succeed(caller, attend, &holder).await,
            Err(error) => Err(error.into()),
        }
    }

    /// Takes the place of a session whose client gives no sign of life, such as one whose machine vanished: what wants its place
    /// may be started once, and not come again.
    async fn succeed(&self, caller: &Caller, attend: &AttendPermit, holder: &lease::Holder) -> Result<Held, Error> {
        let since_ms = Welcome::decode(&holder.note, false).initial_connection_ms;
        let exists = || already_connected(&caller.identity, since_ms);
        let (connection, taken) = self.presence.holder(&caller.identity).ok_or_else(exists)?;
        let has_same_credential =
            connection.token == caller.credential.token && connection.task == caller.credential.task;
        if connection.session != holder.session || !has_same_credential || !taken.is_silent().await {
            return Err(exists());
        }
        let welcome = Welcome::first();
        let successor = self.gate.take_over(attend, &holder.session, &caller.session, move |_| welcome.encode()).await;
        let held = match successor {
            Ok(lease) => Ok(Held { lease, welcome, is_successor: true }),
            // It ended meanwhile.
            Err(lease::Error::NotHolder { .. }) => {
                let lease = self.gate.hold(attend, &caller.session, welcome.encode()).await;
                lease.map(|lease| Held { lease, welcome, is_successor: false })
            }
            Err(error) => Err(error),
        };
        held.map_err(|error| match error {
            lease::Error::Held { .. } => exists(),
            error => error.into(),
        })
    }
}

/// An identity's lease, as its session has got it.
struct Held {
    lease: Lease,
    welcome: Welcome,
    /// Another session ends by it.
    is_successor: bool,
}

/// The beginning of the text is the published contract's.
fn already_connected(identity: &Identity, since_ms: u64) -> Error {
    let since = humantime::format_rfc3339_seconds(UNIX_EPOCH + Duration::from_millis(since_ms));
    let message = format!(
        "DuplicateIdentityError: identity ({identity}) already connected since {since}; `trunkline session list` shows it, \
         `trunkline session disconnect` ends it"
    );
    Error::new(Kind::Exists, "ERR_DUPLICATE_IDENTITY", message)
}

impl Session {
    /// Answers whether that has to be saved: lanes that begin at the tail, and those of somebody who was away for long.
    async fn follow_lanes(&mut self, before: u64) -> Result<bool, Error> {
        let tail = self.gate.tail(&self.attend).offset.0;
        let mut is_due = false;
        if let Some(own) = own_lane(&self.caller.identity)? {
            if matches!(self.caller.identity, Identity::Task(_)) {
                // Nobody comes back under an assigned id.
                self.reader.follow_from_start(&own)?;
                self.meter.reads(&own, 0, None);
                return Ok(false);
            }
            let remembered = self.remembered(OWN).await?;
            is_due = remembered.is_some_and(Position::is_old);
            let from = remembered.map_or(0, |own| own.offset).max(before).max(self.heard_before().await?);
            self.follow(OWN.to_owned(), vec![own], from)?;
        }
        let (scope, topics) = match &self.caller.identity {
            Identity::Agent(named) => {
                let all = Target::AllAgents { workspace: named.workspace.clone() }.topic()?;
                let progress = progress_in(&named.workspace)?;
                self.reader.follow_from_tail(&all)?;
                self.meter.reads(&all, tail, None);
                (PROGRESS, vec![progress])
            }
            Identity::User { user, .. } => {
                (WIDE, vec![Target::User { user: user.clone() }.topic()?, progress_for(user)?])
            }
            _ => return Ok(is_due),
        };
        let remembered = self.remembered(scope).await?;
        self.follow(scope.to_owned(), topics, remembered.map_or(tail, |lanes| lanes.offset.max(before)))?;
        Ok(is_due || remembered.is_none_or(Position::is_old))
    }

    /// How far the identity had heard when it last answered.
    async fn heard_before(&self) -> Result<u64, Error> {
        let last = self.gate.last(&self.attend, &heard(&self.caller.identity)?).await?;
        Ok(last.and_then(|record| Heard::decode(&record.payload)).unwrap_or(0))
    }

    /// How far it has heard its own lane; nothing for who has none that is remembered. Waits up to 100 ms for deliveries in flight.
    /// Cancel-safe.
    ///
    /// # Errors
    /// None in practice; see [`own_lane`].
    pub async fn heard(&self) -> Result<Option<Heard>, Error> {
        let Some(own) = self.lanes.iter().find(|lanes| lanes.scope == OWN) else { return Ok(None) };
        let position = own.position(self.taken.heard().await);
        Ok(Some(Heard { topic: heard(&self.caller.identity)?, position }))
    }

    fn follow(&mut self, scope: String, topics: Vec<Topic>, from: u64) -> Result<(), Error> {
        for topic in &topics {
            self.reader.follow_from(topic, Offset(from))?;
        }
        // As the reader takes it.
        let from = from.min(self.gate.tail(&self.attend).offset.0);
        let joined_at = self.reader.cursor().offset.0;
        let behind = (from < joined_at).then(|| Behind { joined_at, taken: Arc::default() });
        for topic in &topics {
            self.meter.reads(topic, from, behind.as_ref().map(|behind| (joined_at, behind.taken.clone())));
        }
        self.lanes.push(Lanes { scope, topics, from, behind });
        Ok(())
    }

    /// Notes where its client is, for operators.
    pub fn came_from(&self, address: IpAddr) {
        self.presence.came_from(&self.caller.identity, address);
    }

    /// Notes that its client said something.
    pub fn note_activity(&self) {
        self.meter.heard_at_ms.store(now_ms(), Relaxed);
    }

    /// Which log the offsets of its deliveries belong to.
    #[must_use]
    pub fn log_epoch(&self) -> String {
        self.gate.tail(&self.attend).epoch.0.simple().to_string()
    }

    /// Moves a user to another workspace: everything is checked and looked up first, then the lanes change at once.
    /// Empty leaves the workspace; the one that the user is on already changes nothing.
    ///
    /// # Errors
    /// `ERR_INVALID_PRINCIPAL` for everybody but users, [`Kind::Invalid`] for a bad name; the user stays where it was.
    pub async fn switch_workspace(&mut self, workspace: &str) -> Result<(), Error> {
        let Identity::User { user, .. } = self.caller.identity.clone() else {
            return Err(Error::new(Kind::Denied, "ERR_INVALID_PRINCIPAL", "only users can switch workspaces"));
        };
        let wanted = if workspace.is_empty() { None } else { Some(identity::workspace(workspace)?) };
        if wanted == self.workspace {
            return Ok(());
        }
        if let Some(workspace) = &wanted {
            self.gate.authorize(&self.caller, Enter(workspace))?;
        }
        let (mut joining, mut begins) = (None, None);
        if let Some(workspace) = &wanted {
            let all = Target::AllUsers { workspace: workspace.clone() }.topic()?;
            let mine = Target::UserIn { user, workspace: workspace.clone() }.topic()?;
            let scope = format!("workspace:{workspace}");
            let tail = self.gate.tail(&self.attend).offset.0;
            let remembered = self.remembered(&scope).await?;
            let from = remembered.map_or(tail, |lanes| lanes.offset);
            begins = remembered.is_none_or(Position::is_old).then(|| (scope.clone(), from as i64));
            joining = Some((scope, vec![all, mine, progress_in(workspace)?], from));
        }
        self.saved = self.save_with(begins).await?;
        if let Some(at) = self.lanes.iter().position(|lanes| lanes.scope.starts_with("workspace:")) {
            let left = self.lanes.swap_remove(at);
            left.topics.iter().for_each(|topic| self.reader.unfollow(topic));
            self.meter.reads_no_more(&left.topics);
        }
        if let Some((scope, topics, from)) = joining {
            self.follow(scope, topics, from)?;
        }
        self.presence.moved(&self.caller.identity, wanted.clone());
        self.workspace = wanted;
        Ok(())
    }

    /// Follows what happens to a task: all of it, or from here on.
    ///
    /// # Errors
    /// None in practice; see [`own_lane`].
    pub fn follow_task(&mut self, workspace: &str, task: Uuid, replays: bool) -> Result<Topic, Error> {
        let topic = task_events(workspace, task)?;
        if replays {
            self.reader.unfollow(&topic);
            self.reader.follow_from_start(&topic)?;
        } else if !self.reader.follows(&topic) {
            self.reader.follow_from_tail(&topic)?;
        }
        Ok(topic)
    }

    /// Follows what is said about a task, from its beginning.
    ///
    /// # Errors
    /// None in practice; see [`own_lane`].
    pub fn attend_task(&mut self, workspace: &str, task: Uuid) -> Result<(), Error> {
        let topic = task_messages(workspace, task)?;
        if !self.reader.follows(&topic) {
            self.reader.follow_from_start(&topic)?;
        }
        Ok(())
    }

    /// No longer.
    ///
    /// # Errors
    /// None in practice; see [`own_lane`].
    pub fn leave_task(&mut self, workspace: &str, task: Uuid) -> Result<(), Error> {
        self.reader.unfollow(&task_messages(workspace, task)?);
        Ok(())
    }

    /// No longer.
    pub fn unfollow_task(&mut self, topic: &Topic) {
        self.reader.unfollow(topic);
    }

    /// Where the log ends now.
    #[must_use]
    pub fn tail(&self) -> Offset {
        self.gate.tail(&self.attend).offset
    }

    /// The workspace that the principal acts in.
    #[must_use]
    pub fn workspace(&self) -> Option<&str> {
        self.caller.identity.workspace().or(self.workspace.as_deref())
    }

    /// What notes that a record which the reader just yielded was delivered.
    #[must_use]
    pub fn delivery(&self, offset: Offset) -> Delivery {
        let behind = self.lanes.iter().filter_map(|lanes| lanes.behind.as_ref());
        let behind = behind.filter(|behind| offset.0 <= behind.joined_at).map(|behind| &behind.taken).next();
        Delivery { taken: behind.unwrap_or(&self.taken).clone(), offset: offset.0 }
    }

    /// Sets the transport whose deliveries arrive after it took them; without one, the caller calls [`Delivery::done`] itself. The
    /// session's successor may use it while this session goes on. Later calls change nothing.
    pub fn set_transport(&self, transport: impl Transport + 'static) {
        self.taken.set_transport(transport);
    }

    /// Waits up to 500 ms until deliveries in flight have arrived, or cannot any more: for a session that ends.
    pub async fn wait_settled(&self) {
        self.taken.settled().await;
    }

    /// Makes durable how far the identity got; does nothing if that has not changed.
    ///
    /// # Errors
    /// [`Kind::Unavailable`]; the next save tries again.
    pub async fn save(&mut self) -> Result<(), Error> {
        self.saved = self.save_with(None).await?;
        Ok(())
    }

    /// As [`Session::save`], without holding the session meanwhile: what it resolves to is for [`Session::saved`].
    pub fn saving(&self) -> impl Future<Output = Result<u64, Error>> + Send + use<> {
        self.save_with(None)
    }

    /// Notes that a save has succeeded.
    pub fn saved(&mut self, mark: u64) {
        self.saved = mark;
    }

    /// Also where lanes begin that are not followed yet.
    fn save_with(&self, begins: Option<(String, i64)>) -> impl Future<Output = Result<u64, Error>> + Send + use<> {
        let (mark, taken) = (self.mark(), self.taken.now());
        let own = self.lanes.iter().map(|lanes| (lanes.scope.clone(), lanes.position(taken) as i64));
        let positions: Vec<_> = own.chain(begins).collect();
        let (epoch, now) = (self.epoch.0.simple().to_string(), sql::now());
        let (gate, keep, work) = (self.gate.clone(), self.keep.clone(), self.work.clone());
        async move {
            if !positions.is_empty() {
                gate.write(&keep, move |tx, owner| sql::save(tx, owner, epoch.clone(), positions.clone(), now)).await?;
            }
            if let Some(work) = work {
                work.save(&gate, &keep).await?;
            }
            Ok(mark)
        }
    }

    /// Whether something was taken since the last save.
    #[must_use]
    pub fn has_news(&self) -> bool {
        self.mark() != self.saved || self.work.as_ref().is_some_and(|work| work.has_news())
    }

    /// Changes with every delivery.
    fn mark(&self) -> u64 {
        // First: it notes deliveries of `behind`, too.
        let taken = self.taken.now();
        let behind = self.lanes.iter().filter_map(|lanes| lanes.behind.as_ref());
        behind.map(|behind| behind.taken.now()).fold(taken, u64::saturating_add)
    }

    /// What this session needs to be told from its identity's others.
    #[must_use]
    pub fn id(&self) -> &str {
        &self.caller.session
    }

    async fn remembered(&self, scope: &str) -> Result<Option<Position>, Error> {
        load(&self.gate, &self.keep, scope, &self.epoch.0.simple().to_string()).await
    }
}

async fn load(gate: &Gate, keep: &KeepPermit, scope: &str, epoch: &str) -> Result<Option<Position>, Error> {
    let (scope, epoch) = (scope.to_owned(), epoch.to_owned());
    Ok(gate.read(keep, move |tx, owner| sql::load(tx, owner, scope.clone(), epoch.clone())).await?)
}

/// Where a group of tasks stopped; groups share one name among their members, whoever asks.
pub(crate) async fn load_position(
    gate: &Gate,
    keep: &KeepPermit,
    group: &str,
    epoch: &str,
) -> Result<Option<u64>, Error> {
    let (group, epoch) = (group.to_owned(), epoch.to_owned());
    let found =
        gate.read(keep, move |tx, _member| sql::load(tx, group.clone(), GROUP.to_owned(), epoch.clone())).await?;
    Ok(found.map(|position| position.offset))
}

/// See [`load_position`].
pub(crate) async fn save_position(
    gate: &Gate,
    keep: &KeepPermit,
    group: &str,
    epoch: &str,
    position: u64,
) -> Result<(), Error> {
    let (group, epoch, positions) = (group.to_owned(), epoch.to_owned(), vec![(GROUP.to_owned(), position as i64)]);
    let now = sql::now();
    let save = gate.write(keep, move |tx, _member| sql::save(tx, group.clone(), epoch.clone(), positions.clone(), now));
    Ok(save.await?)
}

impl Drop for Session {
    fn drop(&mut self) {
        self.presence.leave(&self.caller.identity, &self.caller.session);
        self.taken.end();
    }
}

/// See [`Session::delivery`].
pub struct Delivery {
    taken: Arc<Taken>,
    offset: u64,
}

impl Delivery {
    /// Notes that it was delivered, with everything that was yielded before it.
    pub fn done(self) {
        self.taken.note(self.offset);
    }

    /// Whether it was delivered.
    #[must_use]
    pub fn is_done(&self) -> bool {
        self.taken.is_past(self.offset)
    }

    /// Whether `later`, which was yielded after this delivery, being done includes this one.
    #[must_use]
    pub fn is_within(&self, later: &Self) -> bool {
        Arc::ptr_eq(&self.taken, &later.taken)
    }

    /// The record's offset.
    #[must_use]
    pub fn offset(&self) -> Offset {
        Offset(self.offset)
    }
}

impl Welcome {
    fn first() -> Self {
        Self { resumed: false, reconnections: 0, initial_connection_ms: now_ms() }
    }

    fn resumed(note: &[u8]) -> Self {
        let before = Self::decode(note, true);
        Self { reconnections: before.reconnections.saturating_add(1), ..before }
    }

    fn encode(self) -> Vec<u8> {
        [&self.initial_connection_ms.to_be_bytes()[..], &self.reconnections.to_be_bytes()].concat()
    }

    fn decode(note: &[u8], resumed: bool) -> Self {
        let parse = || {
            let (initial, rest) = note.split_first_chunk()?;
            Some((u64::from_be_bytes(*initial), u32::from_be_bytes(*rest.first_chunk()?)))
        };
        let (initial_connection_ms, reconnections) = parse().unwrap_or_default();
        Self { resumed, reconnections, initial_connection_ms }
    }
}

fn now_ms() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |age| age.as_millis() as u64)
}

#[cfg(test)]
mod tests {
    use super::Welcome;

    #[test]
    fn the_note_counts_reconnections_and_keeps_the_beginning() {
        let first = Welcome { resumed: false, reconnections: 0, initial_connection_ms: 1234 };
        let second = Welcome::resumed(&first.encode());
        assert_eq!(second, Welcome { resumed: true, reconnections: 1, initial_connection_ms: 1234 });
        assert_eq!(Welcome::resumed(&second.encode()).reconnections, 2);
    }
}

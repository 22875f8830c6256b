//! Starts agents that are needed and not there, and looks after them.
//!
//! An [`Orchestrator`] is told what to start; [`run`] has a [`Launch`] start it, a bounded number at a time, starts what fails
//! again, tells the server when it gives up, and ends everything when it is stopped. [`Process`] starts a process, [`Processes`] one
//! of several by what is asked for.
//!
//! ```no_run
//! # async fn f() -> trunkline_client::Result<()> {
//! use trunkline_client::{Orchestrator, orchestrate::{self, Options, Process}};
//! let orchestrator = Orchestrator::builder("local").profile("process").api_key("…").connect().await?;
//! let crew = orchestrate::run(&orchestrator, Process::module("python3", "my.agent"), Options::default());
//! orchestrator.ended().await;
//! crew.stop().await;
//! # Ok(()) }
//! ```

mod process;

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, SystemTime},
};

use tokio::{
    sync::Semaphore,
    task::JoinSet,
    time::{Instant, sleep},
};
use tokio_util::sync::CancellationToken;

use crate::{
    connection::lane::Received,
    error::{Error, Kind, Result},
    options::url,
    principal::Orchestrator,
    task::Assignment,
};
pub use process::{Limits, Line, Process, Processes};

/// What is to be started. Its [`Debug`](std::fmt::Debug) does not show the token.
#[derive(Clone, Debug)]
pub struct Start {
    assignment: Assignment,
    gateway: String,
}

impl Start {
    /// Everything that the server says.
    #[must_use]
    pub fn assignment(&self) -> &Assignment {
        &self.assignment
    }

    /// Whom the agent is to be: `ag::{workspace}::{implementation}::{specifier}`.
    #[must_use]
    pub fn identity(&self) -> String {
        let Assignment(it) = &self.assignment;
        format!("ag::{}::{}::{}", it.workspace, it.target_implementation, it.specifier)
    }

    /// What the agent's environment has: `AETHER_GATEWAY`, `AETHER_WORKSPACE`, `AETHER_IMPLEMENTATION`, `AETHER_SPECIFIER`,
    /// `AETHER_AUTH_TOKEN` (the published names, which [`Agent::from_env`](crate::Agent::from_env) reads), `AETHER_TASK_ID`,
    /// `AETHER_PROFILE`, `AETHER_TLS_ENABLED` if the server takes TLS, and `AETHER_LP_{NAME}` for each other launch parameter,
    /// in capitals.
    #[must_use]
    pub fn environment(&self) -> HashMap<String, String> {
        let Assignment(it) = &self.assignment;
        let mut environment: HashMap<String, String> = it
            .launch_params
            .iter()
            .filter(|(name, _)| *name != "auth_token")
            .map(|(name, value)| {
                let name = name.to_uppercase().replace(|c: char| !c.is_ascii_alphanumeric(), "_");
                (format!("AETHER_LP_{name}"), value.clone())
            })
            .collect();
        // Published clients take it without a scheme.
        let (scheme, gateway) = self.gateway.split_once("://").unwrap_or(("http", &self.gateway));
        if scheme == "https" {
            environment.insert("AETHER_TLS_ENABLED".to_owned(), "true".to_owned());
        }
        let own = [
            ("AETHER_GATEWAY", gateway),
            ("AETHER_WORKSPACE", &it.workspace),
            ("AETHER_IMPLEMENTATION", &it.target_implementation),
            ("AETHER_SPECIFIER", &it.specifier),
            ("AETHER_AUTH_TOKEN", self.assignment.auth_token().unwrap_or_default()),
            ("AETHER_TASK_ID", &it.task_id),
            ("AETHER_PROFILE", &it.profile),
        ];
        environment.extend(own.map(|(name, value)| (name.to_owned(), value.to_owned())));
        environment
    }
}

/// Starts something, such as a process, a container, or a machine.
pub trait Launch: Send + Sync + 'static {
    /// Starts what is asked for, and returns when it has ended: `Ok` if it is done, an error if it failed or could not be started.
    /// When `stop` is cancelled, it ends what it started, and returns.
    fn launch(&self, start: Start, stop: CancellationToken) -> impl Future<Output = Result<()>> + Send;
}

/// How a crew is looked after.
#[derive(Clone, Debug)]
pub struct Options {
    /// How many run at a time; further starts wait. 16 without more words.
    pub at_once: usize,
    /// How often what failed is started again before the server is told. 3 without more words.
    pub restarts: u32,
    /// The wait before that; doubled each time. 200 ms without more words.
    pub restart_delay: Duration,
    /// What ran for so long before it failed begins its count of failures anew. A minute without more words.
    pub settled: Duration,
}

impl Default for Options {
    fn default() -> Self {
        let (restart_delay, settled) = (Duration::from_millis(200), Duration::from_secs(60));
        Self { at_once: 16, restarts: 3, restart_delay, settled }
    }
}

/// Reasons of failures, in bytes: the server's limit.
const REASON_BYTES_MAX: usize = 4096;

/// How often the server is told that a start failed, if it does not take it: over more than half an hour.
const TELLINGS: u32 = 64;

/// The longest wait before something is started again, or the server is told once more.
const DELAY_MAX: Duration = Duration::from_secs(30);

/// Something that runs.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Running {
    /// The task that stands for the start.
    pub task_id: String,
    /// Whom the agent is to be.
    pub identity: String,
    /// When it was started first.
    pub started_at: SystemTime,
    /// How often it was started again.
    pub restarts: u32,
}

/// Everything that was started. Dropping it stops all of it.
#[must_use = "a crew is stopped when this is dropped"]
pub struct Crew {
    shared: Arc<Shared>,
    done: tokio::sync::watch::Receiver<bool>,
}

struct Shared {
    orchestrator: Orchestrator,
    options: Options,
    running: Mutex<HashMap<String, Running>>,
    stop: CancellationToken,
}

impl Shared {
    /// Short and without a wait inside; a panic inside leaves nothing half done.
    fn running(&self) -> MutexGuard<'_, HashMap<String, Running>> {
        self.running.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Crew {
    /// What runs now, or waits to be started again.
    #[must_use]
    pub fn running(&self) -> Vec<Running> {
        self.shared.running().values().cloned().collect()
    }

    /// Ends everything, and waits until it has.
    pub async fn stop(mut self) {
        self.shared.stop.cancel();
        // The task is gone if the client has ended, and then everything has.
        let _ = self.done.wait_for(|done| *done).await;
    }
}

impl Drop for Crew {
    fn drop(&mut self) {
        self.shared.stop.cancel();
    }
}

/// Starts whatever the server asks for, until the crew is stopped or the client ends for good. What runs goes on over a break of the
/// connection.
pub fn run(orchestrator: &Orchestrator, launcher: impl Launch, options: Options) -> Crew {
    let stop = CancellationToken::new();
    let orchestrator = orchestrator.clone();
    let assignments = orchestrator.assignments();
    let core = Arc::clone(&orchestrator.core);
    let shared = Arc::new(Shared { orchestrator, options, running: Mutex::default(), stop });
    let (tell, done) = tokio::sync::watch::channel(false);
    core.spawn({
        let (shared, launcher) = (Arc::clone(&shared), Arc::new(launcher));
        async move {
            attend(shared, launcher, assignments).await;
            tell.send_replace(true);
        }
    });
    Crew { shared, done }
}

async fn attend<L: Launch>(shared: Arc<Shared>, launcher: Arc<L>, mut assignments: Received<Assignment>) {
    let room = Arc::new(Semaphore::new(shared.options.at_once.max(1)));
    let mut crew = JoinSet::new();
    loop {
        tokio::select! {
            () = shared.stop.cancelled() => break,
            Some(_) = crew.join_next(), if !crew.is_empty() => {}
            assignment = assignments.next() => match assignment {
                // The same start may be told again after a reconnect.
                Some(it) if shared.running().contains_key(&it.task_id) => {}
                Some(it) => {
                    begin(&shared, &it);
                    let gateway = url(&shared.orchestrator.core.options).unwrap_or_default();
                    let start = Start { assignment: it, gateway };
                    crew.spawn(member(Arc::clone(&shared), Arc::clone(&launcher), Arc::clone(&room), start));
                }
                None => break,
            },
        }
    }
    shared.stop.cancel();
    while crew.join_next().await.is_some() {}
}

fn begin(shared: &Shared, it: &Assignment) {
    let identity = format!("ag::{}::{}::{}", it.workspace, it.target_implementation, it.specifier);
    let running = Running { task_id: it.task_id.clone(), identity, started_at: SystemTime::now(), restarts: 0 };
    shared.running().insert(it.task_id.clone(), running);
}

/// Takes a start out of what runs, also if what launches it panics.
struct Ended<'a>(&'a Shared, &'a str);

impl Drop for Ended<'_> {
    fn drop(&mut self) {
        self.0.running().remove(self.1);
    }
}

/// One start, from its first attempt to its end.
async fn member<L: Launch>(shared: Arc<Shared>, launcher: Arc<L>, room: Arc<Semaphore>, start: Start) {
    let (task_id, identity) = (start.assignment.task_id.clone(), start.identity());
    let _ended = Ended(&shared, &task_id);
    let lived = shared.stop.run_until_cancelled(room.acquire_owned()).await;
    let Some(Ok(place)) = lived else { return };
    let (mut delay, mut failures) = (shared.options.restart_delay, 0);
    loop {
        let begun = Instant::now();
        let ended = launcher.launch(start.clone(), shared.stop.child_token()).await;
        let Err(error) = ended else { return };
        if shared.stop.is_cancelled() {
            return;
        }
        if begun.elapsed() >= shared.options.settled {
            (delay, failures) = (shared.options.restart_delay, 0);
        }
        failures += 1;
        if failures > shared.options.restarts {
            tracing::error!(%error, identity, failures, "what was started failed too often");
            drop(place);
            return give_up(&shared, &task_id, &reason(&error)).await;
        }
        tracing::warn!(%error, identity, failures, ?delay, "what was started failed; it is started again");
        if let Some(running) = shared.running().get_mut(&task_id) {
            running.restarts += 1;
        }
        if shared.stop.run_until_cancelled(sleep(delay)).await.is_none() {
            return;
        }
        delay = (delay * 2).min(DELAY_MAX);
    }
}

/// Why something failed, as far as servers take it.
fn reason(error: &Error) -> String {
    let text = error.to_string().replace('\0', "\u{fffd}");
    let end = (0..=text.len().min(REASON_BYTES_MAX)).rev().find(|end| text.is_char_boundary(*end)).unwrap_or(0);
    text[..end].to_owned()
}

/// Tells the server, and again over breaks of the connection, until it knows.
async fn give_up(shared: &Shared, task_id: &str, why: &str) {
    let mut delay = shared.options.restart_delay;
    for _ in 0..TELLINGS {
        let Err(error) = shared.orchestrator.tasks().fail(task_id, why).await else { return };
        // Others tell that it has ended otherwise, or that the client has. A refusal in words may be of the moment.
        let may_pass = error.is_retryable() || matches!(error.kind(), Kind::Refused | Kind::Internal);
        if !may_pass {
            tracing::warn!(%error, task_id, "the server was not told that a start failed");
            return;
        }
        if shared.stop.run_until_cancelled(sleep(delay)).await.is_none() {
            return;
        }
        delay = (delay * 2).min(DELAY_MAX);
    }
    tracing::warn!(task_id, "the server was not told that a start failed, however often it was tried");
}

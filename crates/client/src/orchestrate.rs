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

use std::{
    collections::HashMap,
    ffi::OsString,
    fmt,
    fs::{File, OpenOptions},
    path::{Path, PathBuf},
    process::{ExitStatus, Stdio},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, SystemTime},
};

#[cfg(unix)]
use rustix::process::{Pid, Signal, WaitOptions, kill_process_group, test_kill_process_group, waitpgid};
use tokio::{
    io::{AsyncBufReadExt as _, AsyncRead, BufReader},
    process::{Child, Command},
    sync::Semaphore,
    task::JoinSet,
    time::{Instant, sleep, timeout},
};
use tokio_util::sync::CancellationToken;

use crate::{
    connection::lane::Received,
    error::{Error, Kind, Result},
    options::url,
    principal::Orchestrator,
    task::Assignment,
};

/// What is to be started. Its [`Debug`](fmt::Debug) does not show the token.
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

/// How often it is looked at whether a group of processes has ended.
const LOOK_EVERY: Duration = Duration::from_millis(20);

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

/// A line that a process printed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Line {
    /// Whose: `ag::…`.
    pub identity: String,
    /// Printed where errors go.
    pub is_error: bool,
    /// Without its end; what is no UTF-8 is replaced.
    pub text: String,
}

type Output = Arc<dyn Fn(Line) + Send + Sync>;

/// Starts a process for every agent.
#[derive(Clone)]
pub struct Process {
    program: OsString,
    arguments: Vec<OsString>,
    environment: Vec<(OsString, OsString)>,
    directory: Option<PathBuf>,
    output: Option<Output>,
    log_directory: Option<PathBuf>,
    limits: Limits,
    terminate_timeout: Duration,
    kill_timeout: Duration,
}

/// What the system lets a process have, from a moment after it was started. For Linux; elsewhere a limit is an error when something
/// is started, as is one above the system's own.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Limits {
    /// Bytes of address space.
    pub address_space: Option<u64>,
    /// Files, sockets among them.
    pub open_files: Option<u64>,
}

impl Process {
    /// Any program.
    #[must_use]
    pub fn new(program: impl Into<OsString>) -> Self {
        Self {
            program: program.into(),
            arguments: Vec::new(),
            environment: Vec::new(),
            directory: None,
            output: None,
            log_directory: None,
            limits: Limits::default(),
            // The published figures.
            terminate_timeout: Duration::from_secs(5),
            kill_timeout: Duration::from_secs(2),
        }
    }

    /// A script of an interpreter.
    #[must_use]
    pub fn script(interpreter: impl Into<OsString>, path: impl Into<OsString>) -> Self {
        Self::new(interpreter).argument(path)
    }

    /// A module of an interpreter, as by `python3 -m`.
    #[must_use]
    pub fn module(interpreter: impl Into<OsString>, name: impl Into<OsString>) -> Self {
        Self::new(interpreter).argument("-m").argument(name)
    }

    /// With one more argument.
    #[must_use]
    pub fn argument(mut self, argument: impl Into<OsString>) -> Self {
        self.arguments.push(argument.into());
        self
    }

    /// With a variable in its environment, besides [`Start::environment`].
    #[must_use]
    pub fn variable(mut self, name: impl Into<OsString>, value: impl Into<OsString>) -> Self {
        self.environment.push((name.into(), value.into()));
        self
    }

    /// In a directory.
    #[must_use]
    pub fn directory(mut self, directory: impl Into<PathBuf>) -> Self {
        self.directory = Some(directory.into());
        self
    }

    /// Gives each line that it prints to a function. Without this, it prints where this program prints.
    #[must_use]
    pub fn output(mut self, output: impl Fn(Line) + Send + Sync + 'static) -> Self {
        self.output = Some(Arc::new(output));
        self
    }

    /// Appends what it prints to a file of each agent's own, `{workspace}.{implementation}.{specifier}.log`. The directory is made
    /// if it is not there. Goes before [`Process::output`].
    #[must_use]
    pub fn log_directory(mut self, directory: impl Into<PathBuf>) -> Self {
        self.log_directory = Some(directory.into());
        self
    }

    /// What the system lets it have.
    #[must_use]
    pub fn limits(mut self, limits: Limits) -> Self {
        self.limits = limits;
        self
    }

    /// How long it may take to end when it is told to, before it is killed: 5 s without this.
    #[must_use]
    pub fn terminate_timeout(mut self, timeout: Duration) -> Self {
        self.terminate_timeout = timeout;
        self
    }

    fn spawn(&self, start: &Start) -> Result<Child> {
        let mut command = Command::new(&self.program);
        command.args(&self.arguments).kill_on_drop(true).stdin(Stdio::null());
        // An agent gets in by its token, and not as who started it.
        for name in ["TRUNKLINE_SERVER", "TRUNKLINE_API_KEY", "AETHER_API_KEY"] {
            command.env_remove(name);
        }
        command.envs(start.environment());
        command.envs(self.environment.iter().map(|(name, value)| (name, value)));
        if let Some(directory) = &self.directory {
            command.current_dir(directory);
        }
        let program = self.program.to_string_lossy();
        let failed = |e: std::io::Error| {
            Error::new(Kind::Unavailable, format!("{program} cannot be started: {e}")).with_source(e)
        };
        if let Some(directory) = &self.log_directory {
            let file = log_file(directory, &start.identity()).map_err(failed)?;
            command.stdout(file.try_clone().map_err(failed)?).stderr(file);
        } else if self.output.is_some() {
            command.stdout(Stdio::piped()).stderr(Stdio::piped());
        }
        // A group of its own, so that whom it starts hears its end too.
        #[cfg(unix)]
        command.process_group(0);
        let mut child = command.spawn().map_err(failed)?;
        // It is not left alone with more than it may have.
        limit(&child, self.limits).inspect_err(|_| drop(child.start_kill())).map_err(failed)?;
        Ok(child)
    }

    /// Ends it and whom it started: tells them to, and kills whoever is left after a while.
    async fn end(&self, child: &mut Child, group: &mut Group) {
        group.terminate(child);
        let gone = async {
            let ended = child.wait().await;
            group.gone().await;
            ended
        };
        if timeout(self.terminate_timeout, gone).await.is_err() {
            group.kill();
            // It is gone if this fails, and as it should be.
            let _ = child.start_kill();
            let _ = timeout(self.kill_timeout, child.wait()).await;
        }
        // Its number may be somebody else's from now on.
        group.forget();
    }
}

impl Launch for Process {
    async fn launch(&self, start: Start, stop: CancellationToken) -> Result<()> {
        let mut child = self.spawn(&start)?;
        let mut lines = JoinSet::new();
        if let Some(output) = &self.output {
            if let Some(stdout) = child.stdout.take() {
                lines.spawn(read(stdout, start.identity(), false, Arc::clone(output)));
            }
            if let Some(stderr) = child.stderr.take() {
                lines.spawn(read(stderr, start.identity(), true, Arc::clone(output)));
            }
        }
        let mut group = Group::of(&child);
        let ended = tokio::select! {
            ended = child.wait() => Some(ended),
            () = stop.cancelled() => None,
        };
        // Whom it started ends with it.
        self.end(&mut child, &mut group).await;
        // What was printed last is still in the pipe; somebody who left the group may hold that open.
        let _ = timeout(self.kill_timeout, async { while lines.join_next().await.is_some() {} }).await;
        let lost = |e: std::io::Error| Error::new(Kind::Internal, format!("a process was lost: {e}")).with_source(e);
        ended.map_or(Ok(()), |ended| ended.map_err(lost).and_then(judged))
    }
}

fn judged(status: ExitStatus) -> Result<()> {
    if status.success() { Ok(()) } else { Err(Error::new(Kind::Refused, format!("the process ended with {status}"))) }
}

/// A process, and whom it started.
#[cfg(unix)]
struct Group(Option<Pid>);

#[cfg(unix)]
impl Group {
    fn of(child: &Child) -> Self {
        Self(child.id().and_then(|id| Pid::from_raw(id.cast_signed())))
    }

    fn forget(&mut self) {
        self.0 = None;
    }

    fn terminate(&self, _child: &mut Child) {
        if let Some(pid) = self.0 {
            // They are gone if this fails, and as they should be.
            let _ = kill_process_group(pid, Signal::TERM);
        }
    }

    /// Returns when nobody of it is left. Its number is nobody else's before.
    async fn gone(&self) {
        while let Some(pid) = self.0 {
            // Where nobody else buries orphans, such as for the first process of a container, they are ours.
            while let Ok(Some(_)) = waitpgid(pid, WaitOptions::NOHANG) {}
            if test_kill_process_group(pid).is_err() {
                return;
            }
            sleep(LOOK_EVERY).await;
        }
    }

    /// Whoever is left.
    fn kill(&self) {
        if let Some(pid) = self.0 {
            let _ = kill_process_group(pid, Signal::KILL);
        }
    }
}

/// Nobody is left, also if whoever waits is dropped.
#[cfg(unix)]
impl Drop for Group {
    fn drop(&mut self) {
        self.kill();
    }
}

/// A process; whom it started is not known here.
#[cfg(not(unix))]
struct Group;

#[cfg(not(unix))]
impl Group {
    fn of(_child: &Child) -> Self {
        Self
    }

    fn forget(&mut self) {}

    fn terminate(&self, child: &mut Child) {
        let _ = child.start_kill();
    }

    async fn gone(&self) {}

    fn kill(&self) {}
}

#[cfg(target_os = "linux")]
fn limit(child: &Child, limits: Limits) -> std::io::Result<()> {
    use rustix::process::{Resource, Rlimit, prlimit};
    let Some(pid) = child.id().and_then(|id| Pid::from_raw(id.cast_signed())) else { return Ok(()) };
    for (resource, most) in [(Resource::As, limits.address_space), (Resource::Nofile, limits.open_files)] {
        if most.is_some() {
            prlimit(Some(pid), resource, Rlimit { current: most, maximum: most })?;
        }
    }
    Ok(())
}

#[cfg(not(target_os = "linux"))]
fn limit(_child: &Child, limits: Limits) -> std::io::Result<()> {
    if limits == Limits::default() { Ok(()) } else { Err(std::io::ErrorKind::Unsupported.into()) }
}

fn log_file(directory: &Path, identity: &str) -> std::io::Result<File> {
    std::fs::create_dir_all(directory)?;
    // Names may contain anything but a separator of the system's.
    let name = identity.strip_prefix("ag::").unwrap_or(identity).replace("::", ".").replace(['/', '\\'], "_");
    OpenOptions::new().create(true).append(true).open(directory.join(format!("{name}.log")))
}

/// Longest line of a process; what is longer is cut into several.
const LINE_BYTES_MAX: u64 = 64 * 1024;

async fn read(from: impl AsyncRead + Unpin, identity: String, is_error: bool, output: Output) {
    use tokio::io::AsyncReadExt as _;
    let mut from = BufReader::new(from);
    let mut line = Vec::new();
    while let Ok(1..) = (&mut from).take(LINE_BYTES_MAX).read_until(b'\n', &mut line).await {
        let text = String::from_utf8_lossy(line.trim_ascii_end()).into_owned();
        output(Line { identity: identity.clone(), is_error, text });
        line.clear();
    }
}

impl fmt::Debug for Process {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Process {{ {:?} {:?} }}", self.program, self.arguments)
    }
}

/// Starts one of several programs, by the implementation that is asked for, or else by the profile.
#[derive(Clone, Debug, Default)]
pub struct Processes {
    implementations: HashMap<String, Process>,
    profiles: HashMap<String, Process>,
}

impl Processes {
    /// None yet.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// What agents of an implementation are.
    #[must_use]
    pub fn implementation(mut self, name: impl Into<String>, process: Process) -> Self {
        self.implementations.insert(name.into(), process);
        self
    }

    /// What all other agents of a profile are.
    #[must_use]
    pub fn profile(mut self, name: impl Into<String>, process: Process) -> Self {
        self.profiles.insert(name.into(), process);
        self
    }
}

impl Launch for Processes {
    async fn launch(&self, start: Start, stop: CancellationToken) -> Result<()> {
        let it = &start.assignment;
        let found = self.implementations.get(&it.target_implementation).or_else(|| self.profiles.get(&it.profile));
        let Some(process) = found else {
            let message = format!("no program for {} of profile {}", it.target_implementation, it.profile);
            return Err(Error::new(Kind::NotFound, message));
        };
        process.launch(start, stop).await
    }
}

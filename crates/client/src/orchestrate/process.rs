//! Agents as processes of this machine: started, limited, listened to, and ended with whom they started.

use std::{
    collections::HashMap,
    ffi::OsString,
    fmt,
    fs::{File, OpenOptions},
    path::{Path, PathBuf},
    process::{ExitStatus, Stdio},
    sync::Arc,
    time::Duration,
};

#[cfg(unix)]
use rustix::process::{Pid, Signal, WaitOptions, kill_process_group, test_kill_process_group, waitpgid};
use tokio::{
    io::{AsyncBufReadExt as _, AsyncRead, BufReader},
    process::{Child, Command},
    task::JoinSet,
    time::{sleep, timeout},
};
use tokio_util::sync::CancellationToken;

use super::{Launch, Start};
use crate::error::{Error, Kind, Result};

/// How often it is looked at whether a group of processes has ended.
const LOOK_EVERY: Duration = Duration::from_millis(20);

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

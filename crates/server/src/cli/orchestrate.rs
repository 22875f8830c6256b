//! `orchestrate`: an orchestrator that starts local processes.
//!
//! Each start that the server hands out becomes one process, whose environment says whom it is to be and how it gets in. A
//! process that fails is started again, with growing pauses; when it has failed too often, the server is told, and a new
//! message to the agent may ask again. Processes outlive a lost connection and end with this program.

use std::{
    collections::HashSet,
    fs::{self, File, OpenOptions},
    os::fd::AsFd as _,
    path::PathBuf,
    process::Stdio,
    sync::Arc,
    time::Duration,
};

use rustix::process::{Pid, Resource, Rlimit, Signal, kill_process, prlimit};
use tokio::{
    process::{Child, Command},
    signal::unix::{SignalKind, signal},
    sync::{Semaphore, mpsc},
    task::JoinSet,
};
use tokio_util::sync::CancellationToken;
use trunkline_core::identity::Identity;
use trunkline_proto::v1::{
    OrchestratorIdentity, TaskAssignment, TaskOperation, downstream_message::Payload as Down,
    init_connection::ClientType, task_operation::OpType, upstream_message::Payload as Up,
};

use super::{
    Done, block_on,
    client::{Connect, Stream},
    say,
};

/// How long a process may take to end when it is told to, before it is killed. The published clients' figure.
const TERM_PATIENCE: Duration = Duration::from_secs(5);

/// First pause before a process is started again; doubled each time.
const RESTART_PAUSE: Duration = Duration::from_millis(200);

/// First pause before the server is tried again, and the longest.
const RECONNECT_PAUSE: Duration = Duration::from_millis(200);
const RECONNECT_PAUSE_MAX: Duration = Duration::from_secs(10);

#[derive(clap::Args)]
pub(crate) struct Orchestrate {
    /// What it can start: agents that are registered with this profile; may be repeated.
    #[arg(long = "profile", value_name = "NAME", required = true)]
    profiles: Vec<String>,
    /// What it is called, before `::`.
    #[arg(long, default_value = "local")]
    name: String,
    /// Which one of that name it is [default: a random one].
    #[arg(long)]
    specifier: Option<String>,
    /// Processes at a time; further starts wait.
    #[arg(long, value_name = "COUNT", default_value_t = 16)]
    processes: usize,
    /// How often a process that failed is started again.
    #[arg(long, value_name = "COUNT", default_value_t = 3)]
    restarts: u32,
    /// Where what processes print goes, a file each [default: to where this program's errors go].
    #[arg(long, value_name = "DIR")]
    log_dir: Option<PathBuf>,
    /// Address space that a process may have.
    #[arg(long, value_name = "MIB")]
    memory_mib: Option<u64>,
    /// Files that a process may have open.
    #[arg(long, value_name = "COUNT")]
    open_files: Option<u64>,
    #[command(flatten)]
    connect: Connect,
    /// The program and its arguments. Its environment has AETHER_GATEWAY, AETHER_WORKSPACE, AETHER_IMPLEMENTATION,
    /// AETHER_SPECIFIER, AETHER_AUTH_TOKEN, AETHER_TASK_ID, AETHER_PROFILE, and AETHER_LP_{NAME} for each launch parameter.
    #[arg(last = true, required = true, value_name = "COMMAND")]
    command: Vec<String>,
}

pub(crate) fn run(args: Orchestrate) -> Done {
    block_on(orchestrate(Arc::new(args)))
}

async fn orchestrate(args: Arc<Orchestrate>) -> Done {
    let specifier = args.specifier.clone().unwrap_or_else(|| uuid::Uuid::new_v4().simple().to_string());
    let identity = Identity::orchestrator(&args.name, &specifier)?;
    if let Some(dir) = &args.log_dir {
        fs::create_dir_all(dir).map_err(|e| format!("{}: {e}", dir.display()))?;
    }
    let (mut interrupt, mut terminate) = (signal(SignalKind::interrupt())?, signal(SignalKind::terminate())?);
    let mut crew = Crew::new(args.clone());
    let done = tokio::select! {
        done = stay(&args, &identity, &mut crew) => done,
        _ = interrupt.recv() => Ok(()),
        _ = terminate.recv() => Ok(()),
    };
    crew.end().await;
    done
}

/// Connects again and again. Ends only if the first time fails, when whoever started it is there to hear it.
async fn stay(args: &Orchestrate, identity: &Identity, crew: &mut Crew) -> Done {
    let who = ClientType::Orchestrator(OrchestratorIdentity {
        implementation: args.name.clone(),
        specifier: identity.specifier().to_owned(),
        supported_profiles: args.profiles.clone(),
    });
    let (mut pause, mut was_there) = (RECONNECT_PAUSE, false);
    loop {
        let served = match args.connect.attach_as(who.clone()).await {
            Ok(stream) => {
                if !was_there {
                    say(format_args!("ready as {identity} for {}", args.profiles.join(" ")));
                }
                (pause, was_there) = (RECONNECT_PAUSE, true);
                serve(stream, crew).await
            }
            Err(error) if !was_there => return Err(error),
            Err(error) => Err(error),
        };
        let why = served.err().map_or_else(|| "the server ended the stream".to_owned(), |error| error.to_string());
        tracing::warn!("{why}; trying again in {pause:?}, processes go on");
        tokio::time::sleep(pause).await;
        pause = (pause * 2).min(RECONNECT_PAUSE_MAX);
    }
}

/// One connection, to its end.
async fn serve(mut stream: Stream, crew: &mut Crew) -> Done {
    loop {
        crew.report(&stream).await?;
        tokio::select! {
            frame = stream.next() => if let Down::TaskAssignment(start) = frame? {
                crew.start(*start);
            },
            Some(ended) = crew.reports.recv() => crew.ended(ended),
        }
    }
}

/// The processes.
struct Crew {
    args: Arc<Orchestrate>,
    room: Arc<Semaphore>,
    /// By the tasks that stand for them.
    running: HashSet<String>,
    /// What the server is to know and was not told yet.
    failed: Vec<TaskOperation>,
    work: JoinSet<()>,
    stop: CancellationToken,
    report: mpsc::Sender<Ended>,
    reports: mpsc::Receiver<Ended>,
}

/// A process that is not started again.
struct Ended {
    task_id: String,
    /// Why, if it failed.
    failure: Option<String>,
}

impl Crew {
    fn new(args: Arc<Orchestrate>) -> Self {
        let (report, reports) = mpsc::channel(64);
        let room = Arc::new(Semaphore::new(args.processes.max(1)));
        let (running, failed, work) = (HashSet::new(), Vec::new(), JoinSet::new());
        Self { args, room, running, failed, work, stop: CancellationToken::new(), report, reports }
    }

    /// The same start may be handed out again, after a connection was lost.
    fn start(&mut self, start: TaskAssignment) {
        while self.work.try_join_next().is_some() {}
        if !self.running.insert(start.task_id.clone()) {
            return;
        }
        let (args, room, stop, report) = (self.args.clone(), self.room.clone(), self.stop.clone(), self.report.clone());
        self.work.spawn(async move {
            let Ok(_room) = room.acquire_owned().await else { return };
            let failure = keep_running(&args, &start, &stop).await;
            // Nobody asks any more if the program ends.
            let _ = report.send(Ended { task_id: start.task_id, failure }).await;
        });
    }

    fn ended(&mut self, ended: Ended) {
        self.running.remove(&ended.task_id);
        if let Some(reason) = ended.failure {
            let op = OpType::Fail.into();
            self.failed.push(TaskOperation { op, task_id: ended.task_id, reason, ..TaskOperation::default() });
        }
    }

    /// Tells the server what failed, perhaps before this connection. Telling it twice does no harm.
    async fn report(&mut self, stream: &Stream) -> Done {
        while let Some(fail) = self.failed.first() {
            stream.put(Up::TaskOp(fail.clone().into())).await?;
            self.failed.remove(0);
        }
        Ok(())
    }

    /// Every process is told to end, and killed if it does not.
    async fn end(mut self) {
        self.stop.cancel();
        while self.work.join_next().await.is_some() {}
    }
}

/// Starts the process, and again when it failed; answers why not any more, if that is a failure.
async fn keep_running(args: &Orchestrate, start: &TaskAssignment, stop: &CancellationToken) -> Option<String> {
    let name = format!("{}.{}.{}", start.workspace, start.target_implementation, start.specifier);
    let mut pause = RESTART_PAUSE;
    for restart in 0..=args.restarts {
        let mut child = match spawn(args, start, &name) {
            Ok(child) => child,
            Err(error) => return Some(format!("cannot start {:?}: {error}", args.command.join(" "))),
        };
        tracing::info!(agent = name, pid = child.id(), restart, "started");
        let status = tokio::select! {
            status = child.wait() => status,
            () = stop.cancelled() => {
                end(&mut child).await;
                return None;
            }
        };
        match status {
            Ok(status) if status.success() => {
                tracing::info!(agent = name, "ended");
                return None;
            }
            Ok(status) => tracing::warn!(agent = name, %status, "failed"),
            Err(error) => tracing::warn!(agent = name, %error, "lost sight of"),
        }
        tokio::select! {
            () = tokio::time::sleep(pause) => pause *= 2,
            () = stop.cancelled() => return None,
        }
    }
    Some(format!("its process failed {} times", args.restarts + 1))
}

fn spawn(args: &Orchestrate, start: &TaskAssignment, name: &str) -> std::io::Result<Child> {
    let token = start.launch_params.get("auth_token").map(String::as_str).unwrap_or_default();
    let mut command = Command::new(&args.command[0]);
    command.args(&args.command[1..]).kill_on_drop(true).stdin(Stdio::null());
    // What connected once is an address.
    command.env("AETHER_GATEWAY", args.connect.address().unwrap_or_default());
    command.env("AETHER_WORKSPACE", &start.workspace);
    command.env("AETHER_IMPLEMENTATION", &start.target_implementation);
    command.env("AETHER_SPECIFIER", &start.specifier);
    command.env("AETHER_AUTH_TOKEN", token);
    command.env("AETHER_TASK_ID", &start.task_id);
    command.env("AETHER_PROFILE", &start.profile);
    // The orchestrator's own key is not its processes'.
    command.env_remove("TRUNKLINE_API_KEY");
    for (key, value) in start.launch_params.iter().filter(|(key, value)| *key != "auth_token" && !value.contains('\0'))
    {
        let plain = |c: char| if c.is_ascii_alphanumeric() { c.to_ascii_uppercase() } else { '_' };
        command.env(format!("AETHER_LP_{}", key.chars().map(plain).collect::<String>()), value);
    }
    let (out, err) = output(args, name)?;
    let child = command.stdout(out).stderr(err).spawn()?;
    if let Some(pid) = child.id().and_then(|id| Pid::from_raw(id as i32)) {
        limit(pid, Resource::As, args.memory_mib.map(|mib| mib.saturating_mul(1024 * 1024)))?;
        limit(pid, Resource::Nofile, args.open_files)?;
    }
    Ok(child)
}

/// Where what a process prints goes: both of its streams to one file, or to our errors.
fn output(args: &Orchestrate, name: &str) -> std::io::Result<(Stdio, Stdio)> {
    let Some(dir) = &args.log_dir else {
        let own = || Ok::<_, std::io::Error>(File::from(std::io::stderr().as_fd().try_clone_to_owned()?));
        return Ok((own()?.into(), own()?.into()));
    };
    // Names may contain anything but a separator of the system's.
    let name: String = name.chars().map(|c| if c == '/' || c == '\\' { '_' } else { c }).collect();
    let file = OpenOptions::new().create(true).append(true).open(dir.join(format!("{name}.log")))?;
    Ok((file.try_clone()?.into(), file.into()))
}

fn limit(pid: Pid, resource: Resource, most: Option<u64>) -> std::io::Result<()> {
    if let Some(most) = most {
        prlimit(Some(pid), resource, Rlimit { current: Some(most), maximum: Some(most) })?;
    }
    Ok(())
}

async fn end(child: &mut Child) {
    if let Some(pid) = child.id().and_then(|id| Pid::from_raw(id as i32)) {
        // It may have ended by itself.
        let _ = kill_process(pid, Signal::TERM);
    }
    if tokio::time::timeout(TERM_PATIENCE, child.wait()).await.is_err() {
        let _ = child.kill().await;
    }
}

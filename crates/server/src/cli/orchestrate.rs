//! `orchestrate`: an orchestrator that starts local processes.
//!
//! Each start that the server hands out becomes one process, whose environment says whom it is to be and how it gets in. A
//! process that fails is started again, with growing pauses; when it has failed too often, the server is told, and a new
//! message to the agent may ask again. Processes outlive a lost connection and end with this program.

use std::{
    io::Write as _,
    path::PathBuf,
    sync::{
        atomic::{AtomicU64, Ordering::Relaxed},
        mpsc::{SyncSender, sync_channel},
    },
    time::Duration,
};

use tokio::{
    signal::unix::{SignalKind, signal},
    sync::oneshot,
    time::timeout,
};
use trunkline_client::{
    Orchestrator, Reconnect,
    orchestrate::{self, Limits, Line, Options, Process},
};

use super::{Done, Fault, announce, block_on, client::Connect, output::plain};

/// Lines that wait to be printed.
const LINES_MAX: usize = 1024;

/// How long what was printed last may take to go out.
const LAST_WORDS: Duration = Duration::from_secs(1);

/// The longest pause before the server is tried again.
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
    block_on(async { Ok(orchestrate(args).await?) })
}

async fn orchestrate(args: Orchestrate) -> Result<(), Fault> {
    let specifier = args.specifier.clone().unwrap_or_else(|| uuid::Uuid::new_v4().simple().to_string());
    let mut who = args.connect.with(Orchestrator::builder(&args.name).specifier(&specifier))?;
    for profile in &args.profiles {
        who = who.profile(profile);
    }
    let (mut interrupt, mut terminate) = (signal(SignalKind::interrupt())?, signal(SignalKind::terminate())?);
    // Processes have groups of their own, which a terminal that is closed does not reach.
    let mut hangup = if is_hangup_ignored() { None } else { Some(signal(SignalKind::hangup())?) };
    let hung_up = async {
        match &mut hangup {
            Some(hangup) => hangup.recv().await,
            None => std::future::pending().await,
        }
    };
    // Whoever started this is there to hear why it cannot begin; later it comes back whenever it can.
    let patience = Reconnect { longest: RECONNECT_PAUSE_MAX, ..Reconnect::forever() };
    let orchestrator = who.reconnect(patience.once_connected()).connect().await?;
    announce(format_args!("ready as orc::{}::{specifier} for {}", args.name, args.profiles.join(" ")));
    let options = Options { at_once: args.processes, restarts: args.restarts, ..Options::default() };
    let (tell, printed) = oneshot::channel();
    let crew = orchestrate::run(&orchestrator, process(&args, tell), options);
    let ended = tokio::select! {
        error = orchestrator.ended() => Err(error.into()),
        _ = interrupt.recv() => Ok(()),
        _ = terminate.recv() => Ok(()),
        _ = hung_up => Ok(()),
    };
    crew.stop().await;
    orchestrator.close().await;
    // The last words of the processes, unless nobody reads them. Without a printer there is nothing to wait for.
    let _ = timeout(LAST_WORDS, printed).await;
    ended
}

/// Whoever started this wants it to survive its terminal, as by `nohup`.
fn is_hangup_ignored() -> bool {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let ignored = status.lines().find_map(|line| u64::from_str_radix(line.strip_prefix("SigIgn:")?.trim(), 16).ok());
    // The first signal is this one.
    ignored.is_some_and(|signals| signals & 1 != 0)
}

fn process(args: &Orchestrate, printed: oneshot::Sender<()>) -> Process {
    let limits = Limits {
        address_space: args.memory_mib.map(|mib| mib.saturating_mul(1024 * 1024)),
        open_files: args.open_files,
    };
    let mut process = Process::new(&args.command[0]).limits(limits);
    for argument in &args.command[1..] {
        process = process.argument(argument);
    }
    match &args.log_dir {
        Some(directory) => process.log_directory(directory),
        None => {
            let printer = Printer::start(printed);
            process.output(move |line| printer.print(&line))
        }
    }
}

/// What agents print goes where this program's errors go: its own output is for whoever started it. By a thread, so that a
/// reader that stops holds up no process; what finds no room is dropped, and counted.
struct Printer {
    lines: SyncSender<String>,
    dropped: AtomicU64,
}

impl Printer {
    fn start(printed: oneshot::Sender<()>) -> Self {
        let (lines, inbox) = sync_channel::<String>(LINES_MAX);
        std::thread::spawn(move || {
            for line in inbox {
                // Nobody reads it, and the processes go on all the same.
                let _ = writeln!(std::io::stderr(), "{line}");
            }
            // Whoever waits for this may have gone.
            let _ = printed.send(());
        });
        Self { lines, dropped: AtomicU64::new(0) }
    }

    fn print(&self, line: &Line) {
        let count = self.dropped.swap(0, Relaxed);
        let dropped = if count > 0 { format!(" ({count} lines before this were dropped)") } else { String::new() };
        let text = format!("{} {}{dropped}", line.identity, plain(&line.text));
        if self.lines.try_send(text).is_err() {
            self.dropped.fetch_add(count + 1, Relaxed);
        }
    }
}

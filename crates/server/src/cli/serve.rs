//! `serve`, `config`, `doctor`: what takes the server's settings.

use std::{
    net::SocketAddr,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::Duration,
};

use futures_util::FutureExt as _;
use nix::sys::signal::{SigSet, Signal as SignalNumber};
use sd_notify::NotifyState;
use tokio::signal::unix::{Signal, SignalKind, signal};
use trunkline::{
    Config, ListenSockets, Server,
    config::{ConfigError, Durability},
    doctor::{Verdict, examine},
};

use super::{Done, Fault, announce, say};

/// How long a server of which a part has failed may take to stop, besides what it gives its connections: what is left of it
/// may wait for that part.
const STOP_AFTER_FAULT: Duration = Duration::from_secs(5);

/// Longest time for the program that is to take over to check the settings.
const CHECK_TIMEOUT: Duration = Duration::from_secs(10);

/// Flags that say what the file and the variables do not.
#[derive(clap::Args)]
pub(crate) struct Settings {
    /// Where everything is kept [default: ./trunkline-data].
    #[arg(long, value_name = "DIR")]
    data_dir: Option<PathBuf>,
    /// What a write survives once it is acknowledged [default: machine].
    #[arg(long, value_name = "WHAT")]
    durability: Option<Durability>,
    /// Address for agents, tasks and services; port 0 picks a free one [default: 127.0.0.1:50051].
    #[arg(long, value_name = "ADDR")]
    grpc: Option<SocketAddr>,
    /// Address for browsers and sandboxes [default: 127.0.0.1:4800].
    #[arg(long, value_name = "ADDR")]
    http: Option<SocketAddr>,
    /// Address for operators [default: 127.0.0.1:9090].
    #[arg(long, value_name = "ADDR")]
    ops: Option<SocketAddr>,
    /// A TOML file; flags and TRUNKLINE__SECTION__KEY variables go before it.
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
}

#[derive(clap::Args)]
pub(crate) struct Serve {
    /// Admit everybody without credentials. For development, on this machine only.
    #[arg(long)]
    dev: bool,
    /// Check the settings and end; nothing is opened or bound.
    #[arg(long)]
    check: bool,
    #[command(flatten)]
    settings: Settings,
}

/// Why a server ends.
enum End {
    Stop,
    /// A program takes over.
    Upgrade,
    Fault(trunkline::Fault),
}

/// The signals that the process handles.
struct Signals {
    interrupt: Signal,
    terminate: Signal,
    upgrade: Signal,
}

impl Settings {
    pub(crate) fn load(&self) -> Result<Config, ConfigError> {
        let mut config = Config::load(self.config.as_deref(), std::env::vars())?;
        config.data_dir = self.data_dir.clone().unwrap_or(config.data_dir);
        config.durability = self.durability.unwrap_or(config.durability);
        config.listen.grpc = self.grpc.unwrap_or(config.listen.grpc);
        config.listen.http = self.http.unwrap_or(config.listen.http);
        config.listen.ops = self.ops.unwrap_or(config.listen.ops);
        Ok(config)
    }
}

pub(crate) fn run(args: &Serve) -> Done {
    let mut config = args.settings.load()?;
    config.dev |= args.dev;
    if args.check {
        return Ok(Server::check(&config)?);
    }
    let program = program()?;
    // Before there are threads: it takes variables out of the environment.
    let sockets = ListenSockets::inherit(&config.listen)?;
    trunkline::raise_descriptor_limit();
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    let done = runtime.block_on(serve(config, sockets, &program));
    // Not longer, for a thread that does not end.
    runtime.shutdown_timeout(STOP_AFTER_FAULT);
    done
}

/// The path by which this program was started, which may be a link to another one by the time that it is run again.
fn program() -> std::io::Result<PathBuf> {
    let started_as = std::env::args_os().next().map(PathBuf::from);
    match started_as.filter(|path| path.components().count() > 1) {
        Some(path) => std::path::absolute(path),
        None => std::env::current_exe(),
    }
}

/// Runs a server to its end, and then `program` if that is to take over.
async fn serve(config: Config, sockets: ListenSockets, program: &Path) -> Done {
    let mut signals = Signals::listen()?;
    let patience = Duration::from_secs(config.shutdown.timeout_seconds).saturating_add(STOP_AFTER_FAULT);
    let mut server = Server::start_on(sockets, config).await?;
    ready(&mut server);
    match signals.end(&server, program).await {
        End::Stop => {
            tracing::info!("stopping");
            notify(&[NotifyState::Stopping]);
            server.stop().await;
            Ok(())
        }
        End::Upgrade => {
            tracing::info!(program = %program.display(), "stopping; a program takes over, and clients wait for it");
            notify_of_upgrade();
            let sockets = server.hand_over().await;
            if signals.stops().now_or_never().is_some() {
                notify(&[NotifyState::Stopping]);
                return Ok(());
            }
            let mut command = Command::new(program);
            command.args(std::env::args_os().skip(1));
            // One that comes before the program handles it would end the process: it waits, as this is kept when it runs.
            SigSet::from(SignalNumber::SIGUSR2).thread_block()?;
            Err(format!("cannot run {}: {}", program.display(), sockets.exec(command)).into())
        }
        End::Fault(fault) => {
            tracing::error!(%fault, "stopping, because a part of the server has failed");
            notify(&[NotifyState::Stopping]);
            if tokio::time::timeout(patience, server.stop()).await.is_err() {
                tracing::error!("the server did not stop in time; ending the process");
            }
            Err(Fault::Failed(fault).into())
        }
    }
}

impl Signals {
    /// On the process's first thread, where one that came while the program was run waits.
    fn listen() -> std::io::Result<Self> {
        let signals = Self {
            interrupt: signal(SignalKind::interrupt())?,
            terminate: signal(SignalKind::terminate())?,
            upgrade: signal(SignalKind::user_defined2())?,
        };
        SigSet::from(SignalNumber::SIGUSR2).thread_unblock()?;
        Ok(signals)
    }

    /// Waits until the process is to end.
    async fn stops(&mut self) {
        tokio::select! {
            _ = self.interrupt.recv() => {}
            _ = self.terminate.recv() => {}
        }
    }

    /// Waits for the server's end. A program that could not take over changes nothing.
    async fn end(&mut self, server: &Server, program: &Path) -> End {
        loop {
            tokio::select! {
                _ = self.interrupt.recv() => return End::Stop,
                _ = self.terminate.recv() => return End::Stop,
                fault = server.failed() => return End::Fault(fault),
                _ = self.upgrade.recv() => {}
            }
            let checked = tokio::select! {
                checked = can_serve(program) => checked,
                () = self.stops() => return End::Stop,
            };
            match checked {
                Ok(()) => return End::Upgrade,
                Err(error) => {
                    tracing::error!(program = %program.display(), %error, "no upgrade; this server goes on");
                }
            }
        }
    }
}

/// Whether a program starts and takes the settings of this one.
async fn can_serve(program: &Path) -> Result<(), Box<dyn std::error::Error>> {
    let mut command = tokio::process::Command::new(program);
    command.args(std::env::args_os().skip(1)).arg("--check").kill_on_drop(true);
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped());
    let output = tokio::time::timeout(CHECK_TIMEOUT, command.output()).await;
    let output = output.map_err(|_| format!("it did not end its check within {} s", CHECK_TIMEOUT.as_secs()))??;
    if output.status.success() {
        return Ok(());
    }
    let said = String::from_utf8_lossy(&output.stderr);
    Err(format!("{}: {}", output.status, said.trim().lines().last().unwrap_or_default()).into())
}

/// Sends the state to the service manager, if there is one; the server does not depend on it.
fn notify(state: &[NotifyState<'_>]) {
    warn_of_failure(sd_notify::notify(state));
}

/// As systemd wants it of a service that reloads: with the time.
fn notify_of_upgrade() {
    let now = NotifyState::monotonic_usec_now();
    warn_of_failure(now.and_then(|now| sd_notify::notify(&[NotifyState::Reloading, now])));
}

fn warn_of_failure(notified: std::io::Result<()>) {
    if let Err(error) = notified {
        tracing::warn!(%error, "the service manager cannot be notified");
    }
}

/// The one line on standard output: whoever started the server waits for it. At the first start without `--dev` there is
/// one before it, with the administrator's key; not on standard error, because that is kept as a log.
fn ready(server: &mut Server) {
    if let Some(key) = server.take_admin_key() {
        announce(format_args!("admin-key {} (shown once; send it as x-api-key)", key.reveal()));
    }
    let addresses = server.addresses();
    announce(format_args!("ready grpc={} http={} ops={}", addresses.grpc, addresses.http, addresses.ops));
    notify(&[NotifyState::Ready]);
}

pub(crate) fn show(args: &Settings) -> Done {
    say(toml::to_string(&args.load()?)?.trim_end());
    Ok(())
}

pub(crate) fn doctor(args: &Settings) -> Done {
    let findings = examine(&args.load()?);
    findings.iter().for_each(say);
    let bad = findings.iter().filter(|finding| matches!(finding.verdict, Verdict::Bad(..))).count();
    if bad > 0 {
        Err(format!("{bad} of {} findings keep a server from running here", findings.len()).into())
    } else {
        Ok(())
    }
}

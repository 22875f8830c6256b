//! `serve`, `config`, `doctor`: what takes the server's settings.

use std::{net::SocketAddr, path::PathBuf, time::Duration};

use tokio::signal::unix::{SignalKind, signal};
use trunkline::{
    Config, Server,
    config::{ConfigError, Durability},
    doctor::{Verdict, examine},
};

use super::{Done, Fault, announce, say};

/// How long a server of which a part has failed may take to stop, besides what it gives its connections: what is left of it
/// may wait for that part.
const STOP_AFTER_FAULT: Duration = Duration::from_secs(5);

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
    #[command(flatten)]
    settings: Settings,
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
    trunkline::raise_descriptor_limit();
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    let done = runtime.block_on(serve(config));
    // Not longer, for a thread that does not end.
    runtime.shutdown_timeout(STOP_AFTER_FAULT);
    done
}

async fn serve(config: Config) -> Done {
    let (mut interrupt, mut terminate) = (signal(SignalKind::interrupt())?, signal(SignalKind::terminate())?);
    let patience = Duration::from_secs(config.shutdown.timeout_seconds).saturating_add(STOP_AFTER_FAULT);
    let mut server = Server::start(config).await?;
    ready(&mut server);
    let fault = tokio::select! {
        _ = interrupt.recv() => None,
        _ = terminate.recv() => None,
        fault = server.failed() => Some(fault),
    };
    let Some(fault) = fault else {
        tracing::info!("stopping");
        server.stop().await;
        return Ok(());
    };
    tracing::error!(%fault, "stopping, because a part of the server has failed");
    if tokio::time::timeout(patience, server.stop()).await.is_err() {
        tracing::error!("the server did not stop in time; ending the process");
    }
    Err(Fault::Failed(fault).into())
}

/// The one line on standard output: whoever started the server waits for it. At the first start without `--dev` there is
/// one before it, with the administrator's key; not on standard error, because that is kept as a log.
fn ready(server: &mut Server) {
    if let Some(key) = server.take_admin_key() {
        announce(format_args!("admin-key {} (shown once; send it as x-api-key)", key.reveal()));
    }
    let addresses = server.addresses();
    announce(format_args!("ready grpc={} http={} ops={}", addresses.grpc, addresses.http, addresses.ops));
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

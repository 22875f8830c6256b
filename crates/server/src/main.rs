//! The binary: parse, build, run, drain.

use std::{io::IsTerminal as _, net::SocketAddr, path::PathBuf, process::ExitCode};

use clap::{Parser, Subcommand};
use tokio::signal::unix::{SignalKind, signal};
use trunkline::{Config, Server, config::Durability};

/// The allocator matters here: records are allocated by one thread and freed by others.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

#[derive(Parser)]
#[command(name = "trunkline", version, about = "One server that every participant of an agent system plugs into")]
struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Runs the server until it is told to stop.
    Serve(Serve),
}

#[derive(clap::Args)]
struct Serve {
    /// Admit everybody without credentials. For development, on this machine only.
    #[arg(long)]
    dev: bool,
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

fn main() -> ExitCode {
    let Command::Serve(args) = Args::parse().command;
    tracing_subscriber::fmt()
        .with_writer(std::io::stderr)
        .with_ansi(std::io::stderr().is_terminal())
        .with_env_filter(
            tracing_subscriber::EnvFilter::try_from_env("TRUNKLINE_LOG")
                .unwrap_or_else(|_| "info,fjall=warn,lsm_tree=warn".into()),
        )
        .init();
    match run(args) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            tracing::error!("{error}");
            ExitCode::FAILURE
        }
    }
}

fn run(args: Serve) -> Result<(), Box<dyn std::error::Error>> {
    let mut config = Config::load(args.config.as_deref(), std::env::vars())?;
    config.dev |= args.dev;
    config.data_dir = args.data_dir.unwrap_or(config.data_dir);
    config.durability = args.durability.unwrap_or(config.durability);
    config.listen.grpc = args.grpc.unwrap_or(config.listen.grpc);
    config.listen.http = args.http.unwrap_or(config.listen.http);
    config.listen.ops = args.ops.unwrap_or(config.listen.ops);
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    runtime.block_on(serve(config))
}

async fn serve(config: Config) -> Result<(), Box<dyn std::error::Error>> {
    let (mut interrupt, mut terminate) = (signal(SignalKind::interrupt())?, signal(SignalKind::terminate())?);
    let mut server = Server::start(config).await?;
    ready(&mut server);
    tokio::select! {
        _ = interrupt.recv() => {}
        _ = terminate.recv() => {}
    }
    tracing::info!("stopping");
    server.stop().await;
    Ok(())
}

/// The one line on standard output: whoever started the server waits for it. At the first start without `--dev` there is
/// one before it, with the administrator's key; not on standard error, because that is kept as a log.
#[allow(clippy::print_stdout, reason = "the line is meant for the program that started the server")]
fn ready(server: &mut Server) {
    if let Some(key) = server.take_admin_key() {
        println!("admin-key {} (shown once; send it as x-api-key)", key.reveal());
    }
    let addresses = server.addresses();
    println!("ready grpc={} http={} ops={}", addresses.grpc, addresses.http, addresses.ops);
}

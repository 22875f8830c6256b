//! The binary: parse, and do what was asked for.

mod cli;

use std::{io::IsTerminal as _, process::ExitCode};

use clap::{Parser, Subcommand};

/// The allocator matters here: records are allocated by one thread and freed by others.
#[global_allocator]
static ALLOCATOR: tikv_jemallocator::Jemalloc = tikv_jemallocator::Jemalloc;

#[derive(Parser)]
#[command(name = "trunkline", version, about = "One server that every participant of an agent system plugs into")]
struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Runs the server until it is told to stop.
    Serve(cli::serve::Serve),
    /// Shows what it is: a chat with an agent, a sandbox beside it, and a page to break both.
    Demo(cli::demo::Demo),
    /// Prints the settings that are in force, as a file that could be given back.
    Config(cli::serve::Settings),
    /// Looks at what the server needs here, and says how to mend what is missing.
    Doctor(cli::serve::Settings),
    /// Makes, lists and revokes API keys.
    #[command(subcommand)]
    Token(cli::token::Token),
    /// Manages apps, whose end users talk with agents in their browsers.
    #[command(subcommand)]
    App(cli::app::Apps),
    /// Sends one message, and returns when it is durable.
    Send(cli::messages::Send),
    /// Prints what is sent to a topic, without taking it from anybody.
    Tail(cli::messages::Tail),
    /// Makes tasks, shows them, follows them, and changes them.
    #[command(subcommand)]
    Task(cli::tasks::Task),
    /// Starts a local process for every agent that is asked for.
    Orchestrate(cli::orchestrate::Orchestrate),
    /// Works as a sandbox.
    #[command(subcommand)]
    Sandbox(cli::sandbox::Sandbox),
}

/// As lines for people, or as JSON for machines, by `TRUNKLINE_LOG_FORMAT`.
fn log_to_stderr() {
    let filter = tracing_subscriber::EnvFilter::try_from_env("TRUNKLINE_LOG");
    let filter = filter.unwrap_or_else(|_| "info,fjall=warn,lsm_tree=warn".into());
    let log = tracing_subscriber::fmt().with_writer(std::io::stderr).with_env_filter(filter);
    match std::env::var("TRUNKLINE_LOG_FORMAT").as_deref() {
        Ok("json") => log.json().flatten_event(true).init(),
        _ => log.with_ansi(std::io::stderr().is_terminal()).init(),
    }
}

fn main() -> ExitCode {
    let command = Args::parse().command;
    log_to_stderr();
    let done = match command {
        Command::Serve(args) => cli::serve::run(&args),
        Command::Demo(args) => cli::demo::run(args),
        Command::Config(args) => cli::serve::show(&args),
        Command::Doctor(args) => cli::serve::doctor(&args),
        Command::Token(args) => cli::token::run(args),
        Command::App(args) => cli::app::run(args),
        Command::Send(args) => cli::messages::send(args),
        Command::Tail(args) => cli::messages::tail(args),
        Command::Task(args) => cli::tasks::run(args),
        Command::Orchestrate(args) => cli::orchestrate::run(args),
        Command::Sandbox(args) => cli::sandbox::run(args),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            tracing::error!("{error}");
            ExitCode::FAILURE
        }
    }
}

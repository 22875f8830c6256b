//! The binary: parse, and do what was asked for.

mod cli;

use std::process::ExitCode;

use clap::{CommandFactory as _, Parser, Subcommand};

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
    /// Shows a server as it stands, live: connections, rates, lag and leases.
    Top(cli::top::Top),
    /// Looks at keys, and changes them.
    #[command(subcommand)]
    Kv(cli::kv::Kv),
    /// Looks at what a principal remembers for its successor, and changes it.
    #[command(subcommand)]
    Checkpoint(cli::kv::Checkpoint),
    /// Manages the agents that orchestrators can start.
    #[command(subcommand)]
    Agent(cli::admin::Agent),
    /// Manages workspaces.
    #[command(subcommand)]
    Workspace(cli::admin::Workspace),
    /// Shows who is connected, and disconnects them.
    #[command(subcommand)]
    Session(cli::admin::Session),
    /// Manages who may do what.
    #[command(subcommand)]
    Acl(cli::admin::Acl),
    /// Shows what was done, by whom.
    Audit(cli::admin::Audit),
    /// Prints what a shell needs to complete commands.
    Completions(cli::manual::Completions),
    /// Writes manual pages.
    Man(cli::manual::Man),
    /// Makes tasks, shows them, follows them, and changes them.
    #[command(subcommand)]
    Task(cli::tasks::Task),
    /// Starts a local process for every agent that is asked for.
    Orchestrate(cli::orchestrate::Orchestrate),
    /// Works as a sandbox.
    #[command(subcommand)]
    Sandbox(cli::sandbox::Sandbox),
}

fn main() -> ExitCode {
    let command = Args::parse().command;
    // Without a thread there is no server either.
    let Ok(log) = cli::log::Log::to_stderr() else { return ExitCode::FAILURE };
    let done = match command {
        Command::Serve(args) => cli::serve::run(&args),
        Command::Demo(args) => cli::demo::run(args),
        Command::Config(args) => cli::serve::show(&args),
        Command::Doctor(args) => cli::serve::doctor(&args),
        Command::Token(args) => cli::token::run(args),
        Command::App(args) => cli::app::run(args),
        Command::Send(args) => cli::messages::send(args),
        Command::Tail(args) => cli::messages::tail(args),
        Command::Top(args) => cli::top::run(&args),
        Command::Kv(args) => cli::kv::run(args),
        Command::Checkpoint(args) => cli::kv::run_checkpoint(args),
        Command::Agent(args) => cli::admin::agent(args),
        Command::Workspace(args) => cli::admin::workspace(args),
        Command::Session(args) => cli::admin::session(args),
        Command::Acl(args) => cli::admin::acl(args),
        Command::Audit(args) => cli::admin::audit(&args),
        Command::Completions(args) => cli::manual::completions(&args, Args::command()),
        Command::Man(args) => cli::manual::man(&args, Args::command()),
        Command::Task(args) => cli::tasks::run(args),
        Command::Orchestrate(args) => cli::orchestrate::run(args),
        Command::Sandbox(args) => cli::sandbox::run(args),
    };
    let code = match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            tracing::error!("{error}");
            ExitCode::from(cli::exit_code(error.as_ref()))
        }
    };
    log.finish();
    code
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_command_can_be_parsed_and_has_a_page() {
        Args::command().debug_assert();
        let dir = tempfile::tempdir().unwrap();
        clap_mangen::generate_to(Args::command(), dir.path()).unwrap();
        assert!(dir.path().join("trunkline-kv-put.1").exists());
    }

    #[test]
    fn a_key_may_begin_with_a_hyphen() {
        assert!(Args::try_parse_from(["trunkline", "token", "list", "--api-key", "-a-"]).is_ok());
    }
}

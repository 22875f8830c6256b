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
    /// Shows messages that clients were lost over, and has them delivered again.
    #[command(subcommand)]
    DeadLetter(cli::dead_letters::DeadLetter),
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
    // A server's log is read by programs, and has everything that it says.
    let logs = matches!(command, Command::Serve(_));
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
        Command::DeadLetter(args) => cli::dead_letters::run(args),
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
            if logs {
                tracing::error!("{error}");
            } else {
                cli::complain(error.as_ref());
            }
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

    /// What a command takes at least, and every option that it has besides, one at a time: each is read as what it was declared.
    #[test]
    fn every_option_of_every_command_is_read_as_it_is_declared() {
        let mut count = 0;
        for (path, command) in leaves(vec!["trunkline".to_owned()], &Args::command()) {
            let needed: Vec<String> =
                command.get_arguments().filter(|arg| arg.is_required_set()).flat_map(given).collect();
            for option in command.get_opts().filter(|option| !option.is_required_set()) {
                let line = path.iter().cloned().chain(needed.clone()).chain(given(option));
                // What goes together with others is refused, which reads it all the same.
                let _ = Args::try_parse_from(line);
                count += 1;
            }
        }
        assert!(count > 100, "{count} options");
        for list in
            [&["token", "list"][..], &["session", "list"], &["kv", "list", "--workspace", "w"], &["task", "list"]]
        {
            for watch in [&["--watch"][..], &["--watch", "5"]] {
                let line = ["trunkline"].iter().chain(list).chain(watch);
                assert!(Args::try_parse_from(line).is_ok(), "{list:?}");
            }
        }
    }

    fn leaves(path: Vec<String>, command: &clap::Command) -> Vec<(Vec<String>, clap::Command)> {
        let below = command
            .get_subcommands()
            .flat_map(|below| leaves(path.iter().cloned().chain([below.get_name().to_owned()]).collect(), below));
        let below: Vec<_> = below.collect();
        if below.is_empty() { vec![(path, command.clone())] } else { below }
    }

    /// An argument with a value that fits.
    fn given(arg: &clap::Arg) -> Vec<String> {
        let value =
            arg.get_possible_values().first().map_or_else(|| "1".to_owned(), |value| value.get_name().to_owned());
        let takes = arg.get_action().takes_values();
        let name = arg.get_long().map(|long| format!("--{long}")).or(arg.get_short().map(|short| format!("-{short}")));
        name.into_iter().chain(takes.then_some(value)).collect()
    }

    #[test]
    fn a_key_may_begin_with_a_hyphen() {
        assert!(Args::try_parse_from(["trunkline", "token", "list", "--api-key", "-a-"]).is_ok());
    }
}

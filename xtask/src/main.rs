//! The project's own commands. `cargo xtask test` is what the README calls the test command and what CI runs.

#![allow(clippy::print_stdout, clippy::print_stderr, reason = "a command for people at a terminal")]

mod conformance;
mod fuzz;
mod run;
mod test;
mod tidy;
mod tools;
mod web;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

#[derive(Parser)]
#[command(name = "cargo xtask", about = "Trunkline's own commands")]
struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Everything that must hold: format, lints, tests, docs, dependencies, house rules, conformance.
    Test {
        /// Only these steps, in order; all of them if none is named.
        steps: Vec<test::Step>,
    },
    /// The house rules: who may name whom, and no function over its limit.
    Tidy,
    /// A long life of a server, compressed.
    Soak {
        /// How long.
        #[arg(long, default_value_t = 1200)]
        seconds: u64,
    },
    /// A hundred clients of the Rust SDK while connections are cut and the server is killed.
    Faults {
        /// How long.
        #[arg(long, default_value_t = 600)]
        seconds: u64,
    },
    /// Hostile bytes for each reader of bytes, guided by coverage, from a kept corpus; new inputs stay below `target`.
    Fuzz {
        /// How long for each target.
        #[arg(long, default_value_t = fuzz::SECONDS)]
        seconds: u32,
        /// Where it begins; 0 is somewhere else each time.
        #[arg(long, default_value_t = 0)]
        seed: u32,
        /// Only these targets; all of them if none is named.
        targets: Vec<String>,
    },
    /// Runs the benches and prints their table: `agent`, `client`, `conversation`, `core`, `hostile`, `sandbox`, `socket`, `store` or `tasks`, and
    /// sections of it.
    Bench {
        /// Which bench.
        name: String,
        /// What to pass on to it.
        args: Vec<String>,
    },
}

fn main() -> ExitCode {
    let outcome = match Args::parse().command {
        Command::Test { steps } => test::run(&steps),
        Command::Tidy => tidy::run(),
        Command::Soak { seconds } => {
            let mut soak = run::cargo(&["test", "--quiet", "--release", "--package", "trunkline", "--test", "soak"]);
            soak.env("TRUNKLINE_SOAK_SECONDS", seconds.to_string());
            run::checked(soak)
        }
        Command::Faults { seconds } => {
            let mut faults =
                run::cargo(&["test", "--quiet", "--release", "--package", "trunkline-client", "--test", "faults"]);
            faults.env("TRUNKLINE_FAULTS_SECONDS", seconds.to_string());
            run::checked(faults)
        }
        Command::Fuzz { seconds, seed, targets } => fuzz::run(&targets, seconds, seed),
        Command::Bench { name, args } => {
            let mut bench = match name.as_str() {
                "agent" | "conversation" | "hostile" | "sandbox" | "socket" | "tasks" => {
                    run::cargo(&["bench", "--quiet", "--package", "trunkline", "--bench", &name, "--"])
                }
                name => run::cargo(&["bench", "--quiet", "--package", &format!("trunkline-{name}"), "--benches", "--"]),
            };
            bench.args(args);
            run::checked(bench)
        }
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("xtask: {error}");
            ExitCode::FAILURE
        }
    }
}

//! The commands.

use std::io::Read as _;

pub(crate) mod app;
pub(crate) mod client;
pub(crate) mod demo;
pub(crate) mod messages;
pub(crate) mod orchestrate;
pub(crate) mod sandbox;
pub(crate) mod serve;
pub(crate) mod tasks;
pub(crate) mod token;

/// What a command ends with; the error is for people.
pub(crate) type Done = Result<(), Box<dyn std::error::Error>>;

/// Prints a line of a command's result.
#[allow(clippy::print_stdout, reason = "what a command answers belongs on standard output")]
pub(crate) fn say(line: impl std::fmt::Display) {
    println!("{line}");
}

/// What an argument says, or standard input for `-`.
pub(crate) fn payload(argument: String) -> std::io::Result<Vec<u8>> {
    if argument != "-" {
        return Ok(argument.into_bytes());
    }
    let mut input = Vec::new();
    std::io::stdin().lock().read_to_end(&mut input)?;
    Ok(input)
}

/// Runs a command that waits for the network. One thread is enough.
pub(crate) fn block_on(run: impl Future<Output = Done>) -> Done {
    tokio::runtime::Builder::new_current_thread().enable_all().build()?.block_on(run)
}

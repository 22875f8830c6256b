//! The commands.

use std::io::{Read as _, Write as _};

pub(crate) mod admin;
pub(crate) mod app;
pub(crate) mod client;
pub(crate) mod dead_letters;
pub(crate) mod demo;
pub(crate) mod kv;
pub(crate) mod log;
pub(crate) mod manual;
pub(crate) mod messages;
pub(crate) mod orchestrate;
pub(crate) mod output;
pub(crate) mod profile;
pub(crate) mod sandbox;
pub(crate) mod serve;
pub(crate) mod tasks;
pub(crate) mod token;
pub(crate) mod top;

/// What a command ends with; the error is for people.
pub(crate) type Done = Result<(), Box<dyn std::error::Error>>;

/// What went wrong, where a script wants to know.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Fault {
    /// The command cannot be meant so.
    #[error("{0}")]
    Usage(String),
    /// There is no such thing.
    #[error("{0}")]
    NotFound(String),
    /// What the server or the way to it had against it.
    #[error("{0}{hint}", hint = hint(.0))]
    Client(#[from] trunkline_client::Error),
    /// What was waited for came to a bad end.
    #[error("{0}")]
    Ended(String),
    /// Another program does what this one did.
    #[error("another program works as this sandbox now")]
    Replaced,
    /// The server ended what was to go on.
    #[error("the server ended it: it stops, the key is not good any more, or there is nothing more to come")]
    Gone,
    /// A part of the server that this process ran has failed.
    #[error("server failed: {0}")]
    Failed(trunkline::Fault),
    /// A file or a stream.
    #[error(transparent)]
    Io(#[from] std::io::Error),
}

impl Fault {
    pub(crate) fn usage(message: impl Into<String>) -> Self {
        Self::Usage(message.into())
    }

    pub(crate) fn not_found(message: impl Into<String>) -> Self {
        Self::NotFound(message.into())
    }
}

/// What most people need to look at when nobody answers.
fn hint(error: &trunkline_client::Error) -> &'static str {
    if error.to_string().contains("cannot connect to") { "; is a server running there?" } else { "" }
}

/// What a command ends with, for scripts: 2 for what cannot be meant so, 3 for what is not there, 4 for what may not be, 5 for a
/// server that is not there or does not answer, 6 for a sandbox that another program works as, 70 (`EX_SOFTWARE`) for a server of
/// which a part has failed, 1 for everything else.
pub(crate) fn exit_code(error: &(dyn std::error::Error + 'static)) -> u8 {
    use trunkline_client::Kind;
    let kind = match error.downcast_ref::<Fault>() {
        Some(Fault::Usage(_)) => return 2,
        Some(Fault::NotFound(_)) => return 3,
        Some(Fault::Gone) => return 5,
        Some(Fault::Replaced) => return 6,
        Some(Fault::Failed(_)) => return 70,
        Some(Fault::Client(error)) => error.kind(),
        Some(Fault::Ended(_) | Fault::Io(_)) => return 1,
        None => match error.downcast_ref::<trunkline_client::Error>() {
            Some(error) => error.kind(),
            None => return 1,
        },
    };
    match kind {
        Kind::Invalid => 2,
        Kind::NotFound => 3,
        Kind::Denied | Kind::Unauthenticated => 4,
        Kind::Unavailable | Kind::Timeout | Kind::Interrupted => 5,
        _ => 1,
    }
}

/// Prints as it is, without an end of line. Ends the program if nobody reads any more: it has what it wanted.
#[allow(clippy::disallowed_methods, reason = "a command has nothing to drain that somebody still waits for")]
pub(crate) fn put(text: &str) {
    let mut out = std::io::stdout().lock();
    match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
        Ok(()) => {}
        Err(error) if error.kind() == std::io::ErrorKind::BrokenPipe => std::process::exit(0),
        Err(error) => {
            tracing::error!("cannot print: {error}");
            std::process::exit(1);
        }
    }
}

/// Tells people why a command did not do what it was asked, in one line.
pub(crate) fn complain(error: &(dyn std::error::Error + 'static)) {
    let text = error.to_string();
    let line: Vec<&str> = text.split_whitespace().collect();
    // Whoever reads neither cannot be told.
    let _ = writeln!(std::io::stderr(), "error: {}", line.join(" "));
}

/// Prints a line of a command's result.
pub(crate) fn say(line: impl std::fmt::Display) {
    put(&format!("{line}\n"));
}

/// Tells whoever started a program that goes on, if it listens.
pub(crate) fn announce(line: impl std::fmt::Display) {
    let mut out = std::io::stdout().lock();
    // It goes on all the same.
    let _ = writeln!(out, "{line}").and_then(|()| out.flush());
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

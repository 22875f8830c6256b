//! Running other programs, and where things are.

use std::{
    error::Error,
    path::{Path, PathBuf},
    process::Command,
};

pub(crate) type Result<T = ()> = std::result::Result<T, Box<dyn Error>>;

/// The repository's root.
pub(crate) fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap_or(Path::new("."))
}

/// Where builds go, and with them everything that the test command installs.
pub(crate) fn target() -> PathBuf {
    std::env::var_os("CARGO_TARGET_DIR").map_or_else(|| root().join("target"), PathBuf::from)
}

/// `cargo` with these arguments, in the root.
pub(crate) fn cargo(args: &[&str]) -> Command {
    let mut command = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    command.args(args).current_dir(root());
    command
}

/// Runs it with its output shown; an error names the command and how it ended.
pub(crate) fn checked(mut command: Command) -> Result {
    let status = command.status().map_err(|e| format!("{}: {e}", described(&command)))?;
    if status.success() { Ok(()) } else { Err(format!("{} failed: {status}", described(&command)).into()) }
}

/// Runs it and answers what it printed.
pub(crate) fn output(mut command: Command) -> Result<String> {
    let output = command.output().map_err(|e| format!("{}: {e}", described(&command)))?;
    if !output.status.success() {
        let printed = String::from_utf8_lossy(&output.stderr).into_owned();
        return Err(format!("{} failed: {}\n{printed}", described(&command), output.status).into());
    }
    Ok(String::from_utf8(output.stdout)?)
}

fn described(command: &Command) -> String {
    let args: Vec<_> = command.get_args().map(std::ffi::OsStr::to_string_lossy).collect();
    format!("{} {}", command.get_program().to_string_lossy(), args.join(" "))
}

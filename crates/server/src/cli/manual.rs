//! `completions` and `man`: what shells and readers want of the commands.

use std::{io, path::PathBuf};

use clap_complete::Shell;

use super::{Done, say};

#[derive(clap::Args)]
pub(crate) struct Completions {
    /// For which shell.
    shell: Shell,
}

#[derive(clap::Args)]
pub(crate) struct Man {
    /// Where the pages go, one for each command.
    dir: PathBuf,
}

pub(crate) fn completions(args: &Completions, mut command: clap::Command) -> Done {
    clap_complete::generate(args.shell, &mut command, "trunkline", &mut io::stdout());
    Ok(())
}

pub(crate) fn man(args: &Man, command: clap::Command) -> Done {
    std::fs::create_dir_all(&args.dir)?;
    clap_mangen::generate_to(command, &args.dir)?;
    say(format_args!("wrote to {}", args.dir.display()));
    Ok(())
}

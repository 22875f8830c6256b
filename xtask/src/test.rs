//! `cargo xtask test`: every check there is, in the order in which they fail fastest.

use std::time::Instant;

use clap::ValueEnum as _;

use crate::{
    conformance, fuzz,
    run::{Result, cargo, checked},
    tidy, tools, web,
};

#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum Step {
    /// rustfmt agrees.
    Format,
    /// The house rules.
    Tidy,
    /// Clippy, warnings as errors.
    Lint,
    /// Every test of every crate.
    Unit,
    /// The documentation builds without warnings.
    Docs,
    /// Licences, sources and duplicates of the dependencies.
    Deny,
    /// The published client against a running server.
    Conformance,
    /// The browser SDK, also in a real browser; and the examples.
    Web,
    /// A minute of hostile bytes for each reader of bytes.
    Fuzz,
}

pub(crate) fn run(steps: &[Step]) -> Result {
    let all = Step::value_variants();
    let steps = if steps.is_empty() { all } else { steps };
    let mut times = Vec::new();
    for step in steps {
        println!("\n== {step:?}");
        let begun = Instant::now();
        step.run().map_err(|error| format!("{step:?}: {error}"))?;
        times.push((step, begun.elapsed()));
    }
    println!();
    for (step, time) in &times {
        println!("{:<12} {:>6.1} s", format!("{step:?}"), time.as_secs_f64());
    }
    println!("{} passed, 0 failed", times.len());
    Ok(())
}

impl Step {
    fn run(self) -> Result {
        match self {
            Self::Format => checked(cargo(&["fmt", "--all", "--check"])),
            Self::Tidy => tidy::run(),
            Self::Lint => {
                tools::make()?;
                let all = ["clippy", "--workspace", "--all-targets", "--all-features", "--quiet"];
                checked(cargo(&[&all[..], &["--", "--deny", "warnings"]].concat()))
            }
            Self::Unit => {
                let mut test = cargo(&["test", "--workspace", "--all-features", "--no-fail-fast"]);
                test.envs(tools::postgres()?);
                tools::strace()?;
                checked(test)
            }
            Self::Docs => {
                let mut doc = cargo(&["doc", "--workspace", "--all-features", "--no-deps", "--quiet"]);
                doc.env("RUSTDOCFLAGS", "--deny warnings");
                checked(doc)
            }
            Self::Deny => {
                let mut deny = std::process::Command::new(tools::cargo_deny()?);
                // Advisories need a database from the network; licences, sources and bans need nothing.
                deny.args(["--all-features", "check", "--hide-inclusion-graph", "bans", "licenses", "sources"]);
                deny.current_dir(crate::run::root());
                checked(deny)
            }
            Self::Conformance => conformance::run(),
            Self::Web => web::run(),
            Self::Fuzz => fuzz::run(&[], fuzz::SECONDS, fuzz::SEED),
        }
    }
}

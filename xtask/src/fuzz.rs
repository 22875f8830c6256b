//! Fuzzing by libFuzzer, guided by coverage, from a kept corpus. With the stable toolchain: what it needs of the compiler is a
//! pass of LLVM and no sanitizer, which `#![forbid(unsafe_code)]` leaves nothing to find for.

use std::fs;

use crate::{
    run::{Result, cargo, checked, root, target},
    tools,
};

/// How the code is built so that the fuzzer sees where it goes.
const COVERAGE: [&str; 5] = [
    "-Cpasses=sancov-module",
    "-Cllvm-args=-sanitizer-coverage-level=4",
    "-Cllvm-args=-sanitizer-coverage-inline-8bit-counters",
    "-Cllvm-args=-sanitizer-coverage-pc-table",
    "-Ccodegen-units=1",
];

const SECONDS: u32 = 60;

/// Longest input; longer ones go through the same code again.
const BYTES_MAX: u32 = 4096;

pub(crate) fn run() -> Result {
    tools::cpp()?;
    let (built, found) = (target().join("fuzz"), target().join("fuzz-found"));
    fs::create_dir_all(&found)?;
    // For an explicit target, so that build scripts are built without.
    let triple = host()?;
    let mut build =
        cargo(&["build", "--quiet", "--release", "--package", "trunkline-agent-socket-fuzz", "--target", &triple]);
    build.arg("--target-dir").arg(&built).env("RUSTFLAGS", COVERAGE.join(" "));
    checked(build)?;
    let mut parse = std::process::Command::new(built.join(&triple).join("release").join("parse"));
    parse.arg(format!("-max_total_time={SECONDS}")).arg(format!("-max_len={BYTES_MAX}"));
    parse.args(["-print_final_stats=1", "-verbosity=0"]).arg(format!("-artifact_prefix={}/", found.display()));
    // What is new goes into the first.
    parse.arg(&found).arg(root().join("crates/agent-socket/fuzz/corpus/parse"));
    checked(parse)
}

fn host() -> Result<String> {
    let version = std::process::Command::new("rustc").args(["--version", "--verbose"]).output()?;
    let text = String::from_utf8_lossy(&version.stdout).into_owned();
    let host = text.lines().find_map(|line| line.strip_prefix("host: "));
    Ok(host.ok_or("rustc does not say what it builds for")?.to_owned())
}

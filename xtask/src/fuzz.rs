//! Fuzzing by libFuzzer, guided by coverage, from a kept corpus. With the stable toolchain: what it needs of the compiler is a
//! pass of LLVM and no sanitizer, which `#![forbid(unsafe_code)]` leaves nothing to find for.

use std::{fs, path::Path};

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

/// How long each target runs in `cargo xtask test`.
pub(crate) const SECONDS: u32 = 60;

/// Where it begins in `cargo xtask test`, so that one run does as the other; 0 is somewhere else each time.
pub(crate) const SEED: u32 = 1;

/// Longest input; longer ones go through the same code again.
const BYTES_MAX: u32 = 4096;

/// Runs `targets`, one after the other, for `seconds` each, from `seed`; all of them if none is named.
pub(crate) fn run(targets: &[String], seconds: u32, seed: u32) -> Result {
    tools::cpp()?;
    let all = names(&root().join("fuzz/src"))?;
    if let Some(unknown) = targets.iter().find(|name| !all.contains(name)) {
        return Err(format!("no fuzz target {unknown:?}: there are {}", all.join(", ")).into());
    }
    let built = target().join("fuzz");
    // For an explicit target, so that build scripts are built without.
    let triple = host()?;
    let mut build =
        cargo(&["build", "--quiet", "--profile", "fuzz", "--package", "trunkline-fuzz", "--target", &triple]);
    build.arg("--target-dir").arg(&built).env("RUSTFLAGS", COVERAGE.join(" "));
    checked(build)?;
    for name in if targets.is_empty() { &all } else { targets } {
        println!("-- {name}, {seconds} s");
        let found = target().join("fuzz-found").join(name);
        fs::create_dir_all(&found)?;
        let mut fuzz = std::process::Command::new(built.join(&triple).join("fuzz").join(name));
        fuzz.arg(format!("-max_total_time={seconds}"))
            .arg(format!("-seed={seed}"))
            .arg(format!("-max_len={BYTES_MAX}"));
        fuzz.args(["-print_final_stats=1", "-verbosity=0"]).arg(format!("-artifact_prefix={}/", found.display()));
        // What is new goes into the first.
        fuzz.arg(&found).arg(root().join("fuzz/corpus").join(name));
        // Servers in the target say what they refuse; that is the point.
        fuzz.env("TRUNKLINE_LOG", "off");
        checked(fuzz)?;
    }
    Ok(())
}

/// The targets: a file each.
fn names(dir: &Path) -> Result<Vec<String>> {
    let mut names = Vec::new();
    for entry in fs::read_dir(dir)? {
        let path = entry?.path();
        names.extend(path.file_stem().and_then(|name| name.to_str()).map(ToOwned::to_owned));
    }
    names.sort();
    Ok(names)
}

fn host() -> Result<String> {
    let version = std::process::Command::new("rustc").args(["--version", "--verbose"]).output()?;
    let text = String::from_utf8_lossy(&version.stdout).into_owned();
    let host = text.lines().find_map(|line| line.strip_prefix("host: "));
    Ok(host.ok_or("rustc does not say what it builds for")?.to_owned())
}

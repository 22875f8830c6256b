//! What the test command needs besides the toolchain, and how it gets it: found on the machine, or installed below
//! `target`, or by the system's package manager.

use std::{
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use crate::run::{Result, cargo, checked, target};

/// The version that `deny.toml` is written for.
const CARGO_DENY: &str = "0.20.2";

/// Where systems have it.
const CHROMIUMS: [&str; 3] = ["/usr/bin/chromium", "/usr/bin/chromium-browser", "/usr/bin/google-chrome"];

/// cargo-deny of the pinned version, built once.
pub(crate) fn cargo_deny() -> Result<PathBuf> {
    let root = target().join("tools");
    let program = root.join("bin").join("cargo-deny");
    let current = Command::new(&program).arg("--version").output();
    if !current.is_ok_and(|out| String::from_utf8_lossy(&out.stdout).contains(CARGO_DENY)) {
        println!("building cargo-deny {CARGO_DENY}, once");
        let mut install = cargo(&["install", "cargo-deny", "--locked", "--quiet", "--version", CARGO_DENY]);
        // A debug build of it takes half as long to make and is fast enough.
        install.args(["--debug", "--no-default-features", "--root"]).arg(&root);
        checked(install)?;
    }
    Ok(program)
}

/// A Python that can make virtual environments.
pub(crate) fn python() -> Result<PathBuf> {
    let works = |program: &Path| {
        let mut probe = Command::new(program);
        probe.args(["-c", "import venv, ensurepip"]).stdout(Stdio::null()).stderr(Stdio::null());
        probe.status().is_ok_and(|status| status.success())
    };
    let program = PathBuf::from("python3");
    if !works(&program) {
        apt_install("python3", &["python3", "python3-venv"])?;
    }
    if works(&program) { Ok(program) } else { Err("python3 with venv is needed for the conformance step".into()) }
}

/// What the allocator is built with, besides a C compiler.
pub(crate) fn make() -> Result {
    if !is_there("make") {
        apt_install("make", &["make"])?;
    }
    if is_there("make") { Ok(()) } else { Err("make is needed to build the server".into()) }
}

/// What the tests of the store record and disturb system calls with.
pub(crate) fn strace() -> Result {
    if !is_there("strace") {
        apt_install("strace", &["strace"])?;
    }
    if is_there("strace") { Ok(()) } else { Err("strace is needed for the tests of the store".into()) }
}

/// What libFuzzer is built with.
pub(crate) fn cpp() -> Result {
    if !is_there("c++") {
        apt_install("a C++ compiler", &["g++"])?;
    }
    if is_there("c++") { Ok(()) } else { Err("a C++ compiler is needed to build the fuzzer".into()) }
}

/// Node.js with npm, of a version that the stories run on.
pub(crate) fn node() -> Result {
    let is_complete = || is_there("node") && is_there("npm");
    if !is_complete() {
        apt_install("Node.js", &["nodejs", "npm"])?;
    }
    if is_complete() { Ok(()) } else { Err("node and npm are needed for the conformance and web steps".into()) }
}

/// A browser.
pub(crate) fn chromium() -> Result<PathBuf> {
    let found = || CHROMIUMS.iter().map(PathBuf::from).find(|program| program.is_file());
    if found().is_none() {
        apt_install("Chromium", &["chromium"])?;
    }
    found().ok_or_else(|| "Chromium is needed for the tests of the browser SDK".into())
}

/// The environment that tells the tests where PostgreSQL's programs are; the tests start a private server of their own.
pub(crate) fn postgres() -> Result<Option<(&'static str, PathBuf)>> {
    let mut found = postgres_bin();
    if found.is_none() {
        apt_install("PostgreSQL", &["postgresql"])?;
        found = postgres_bin();
    }
    let bin = found.ok_or("PostgreSQL's initdb and postgres are needed for the tests of the ledger")?;
    Ok(Some(("TRUNKLINE_TEST_POSTGRES_BIN", bin)))
}

fn postgres_bin() -> Option<PathBuf> {
    let given = std::env::var_os("TRUNKLINE_TEST_POSTGRES_BIN").map(PathBuf::from);
    let on_path =
        std::env::var_os("PATH").into_iter().flat_map(|path| std::env::split_paths(&path).collect::<Vec<_>>());
    let mut packaged: Vec<PathBuf> = std::fs::read_dir("/usr/lib/postgresql")
        .map(|versions| versions.flatten().map(|version| version.path().join("bin")).collect())
        .unwrap_or_default();
    packaged.sort();
    let mut all = given.into_iter().chain(packaged.into_iter().rev()).chain(on_path);
    all.find(|bin| bin.join("initdb").is_file() && bin.join("postgres").is_file())
}

/// Whether a program can be run.
fn is_there(program: &str) -> bool {
    let mut probe = Command::new(program);
    probe.arg("--version").stdout(Stdio::null()).stderr(Stdio::null());
    probe.status().is_ok_and(|status| status.success())
}

fn apt_install(what: &str, packages: &[&str]) -> Result {
    println!("installing {what}, once");
    let mut update = Command::new("apt-get");
    update.args(["update", "--quiet=2"]);
    checked(update).map_err(|error| format!("{what} is not installed and cannot be: {error}"))?;
    let mut install = Command::new("apt-get");
    install.args(["install", "--yes", "--quiet=2", "--no-install-recommends"]).args(packages);
    checked(install).map_err(|error| format!("{what} is not installed and cannot be: {error}").into())
}

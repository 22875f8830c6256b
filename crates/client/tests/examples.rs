//! Each program in `examples/`, run against a server.

#![allow(
    clippy::disallowed_methods,
    clippy::expect_used,
    clippy::panic,
    clippy::print_stdout,
    clippy::unwrap_used,
    reason = "test code"
)]

use std::{process::Stdio, time::Duration};

#[tokio::test]
async fn every_example_runs_to_its_end() {
    let server = trunkline::Server::builder().start().await.unwrap();
    let address = server.addresses().grpc.to_string();
    // Beside this program.
    let programs = std::env::current_exe().unwrap().parent().unwrap().parent().unwrap().join("examples");
    let sources = std::fs::read_dir(concat!(env!("CARGO_MANIFEST_DIR"), "/examples")).unwrap();
    let mut names: Vec<_> = sources.map(|entry| entry.unwrap().path().file_stem().unwrap().to_owned()).collect();
    names.sort();
    assert!(names.len() > 10);
    // Cargo builds examples with all tests of a package, but not for this one alone.
    if !names.iter().all(|name| programs.join(name).exists()) {
        let mut build = tokio::process::Command::new(env!("CARGO"));
        build.args(["build", "--quiet", "--package", "trunkline-client", "--examples"]);
        assert!(build.status().await.unwrap().success());
    }
    for name in names {
        let mut command = tokio::process::Command::new(programs.join(&name));
        command.env("TRUNKLINE_SERVER", &address).stdout(Stdio::piped()).stderr(Stdio::piped()).kill_on_drop(true);
        let ended = tokio::time::timeout(Duration::from_secs(20), command.output()).await;
        let output = ended.unwrap_or_else(|_| panic!("{name:?} ends")).unwrap();
        let (out, err) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
        assert!(output.status.success() && (!out.is_empty() || name == "checkpoints"), "{name:?}: {out}\n{err}");
        println!("== {name:?}\n{out}");
    }
    server.close().await;
}

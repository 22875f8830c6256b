//! Agents that are started when they are needed, as processes.

use std::{os::unix::fs::PermissionsExt as _, time::Duration};

use tokio::sync::mpsc;
use trunkline_client::{
    Orchestrator, Reconnect,
    admin::AgentRegistrationInfo,
    orchestrate::{self, Limits, Options, Process, Processes},
    task::TaskStatus,
};

use crate::server::{World, soon};

async fn orchestrator(world: &World, implementation: &str) -> Orchestrator {
    let orchestrator = world.connect(Orchestrator::builder("local").profile("process")).await;
    let agent = AgentRegistrationInfo {
        implementation: implementation.into(),
        orchestrator_profile: "process".into(),
        launch_params: [("Max-Tokens".to_owned(), "5".to_owned())].into(),
        ..AgentRegistrationInfo::default()
    };
    orchestrator.admin().register_agent(agent).await.unwrap();
    orchestrator
}

fn script(dir: &std::path::Path, name: &str, text: &str) -> Process {
    let path = dir.join(name);
    std::fs::write(&path, format!("#!/bin/sh\n{text}\n")).unwrap();
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).unwrap();
    Process::new("/bin/sh").argument(path)
}

#[tokio::test]
async fn a_process_is_told_whom_it_is_to_be_and_ends_when_it_is_told() {
    let (world, dir) = (World::begin().await, tempfile::tempdir().unwrap());
    let orchestrator = orchestrator(&world, "support").await;
    let (lines, mut printed) = mpsc::channel(64);
    let process = script(
        dir.path(),
        "agent.sh",
        "trap 'echo bye; exit 0' TERM\necho $AETHER_WORKSPACE $AETHER_IMPLEMENTATION $AETHER_SPECIFIER $AETHER_LP_MAX_TOKENS\n\
         test -n \"$AETHER_AUTH_TOKEN\" && echo has a token\nwhile :; do sleep 0.05; done",
    );
    let process = process.output(move |line| lines.try_send(line).unwrap());
    let crew = orchestrate::run(&orchestrator, process, Options::default());
    let other = world.agent("other").await;
    other.send_to_agent("ws", "support", "main", "Wake up").await.unwrap();
    let first = soon(printed.recv()).await.unwrap();
    assert_eq!((first.identity.as_str(), first.text.as_str()), ("ag::ws::support::main", "ws support main 5"));
    assert_eq!(soon(printed.recv()).await.unwrap().text, "has a token");
    assert_eq!(crew.running().len(), 1);
    soon(crew.stop()).await;
    // Shells may say that what they waited for was terminated.
    while soon(printed.recv()).await.unwrap().text != "bye" {}
    other.close().await;
    orchestrator.close().await;
    world.end().await;
}

#[tokio::test]
async fn what_fails_is_started_again_and_then_the_server_is_told() {
    let (world, dir) = (World::begin().await, tempfile::tempdir().unwrap());
    let orchestrator = orchestrator(&world, "broken").await;
    let (lines, mut printed) = mpsc::channel(64);
    let process =
        script(dir.path(), "broken.sh", "echo trying; exit 3").output(move |line| lines.try_send(line).unwrap());
    let launcher = Processes::new().implementation("broken", process);
    let options = Options { restarts: 2, restart_delay: Duration::from_millis(5), ..Options::default() };
    let crew = orchestrate::run(&orchestrator, launcher, options);
    let task = orchestrator.admin().launch_agent("broken", "ws", "main", Default::default()).await.unwrap();
    for _ in 0..3 {
        assert_eq!(soon(printed.recv()).await.unwrap().text, "trying");
    }
    let failed = async {
        loop {
            let task = orchestrator.tasks().get(&task).await.unwrap();
            if task.status() == TaskStatus::Failed || task.attempt > 1 {
                return task;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    let failed = soon(failed).await;
    assert!(failed.error.contains("ended with"), "{failed:?}");
    soon(crew.stop()).await;
    world.end().await;
}

#[tokio::test]
async fn nothing_is_left_when_the_client_ends() {
    let (world, dir) = (World::begin().await, tempfile::tempdir().unwrap());
    let builder = Orchestrator::builder("local").profile("process").reconnect(Reconnect::never());
    let orchestrator = world.connect(builder).await;
    let mark = dir.path().join("mark");
    let text = format!("trap 'rm {0}; exit 0' TERM\ntouch {0}\nwhile :; do sleep 0.05; done", mark.display());
    let crew = orchestrate::run(&orchestrator, script(dir.path(), "a.sh", &text), Options::default());
    let agent = AgentRegistrationInfo {
        implementation: "x".into(),
        orchestrator_profile: "process".into(),
        ..AgentRegistrationInfo::default()
    };
    orchestrator.admin().register_agent(agent).await.unwrap();
    orchestrator.admin().launch_agent("x", "ws", "main", Default::default()).await.unwrap();
    let until = |there: bool| {
        let mark = mark.clone();
        async move {
            while mark.exists() != there {
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        }
    };
    soon(until(true)).await;
    orchestrator.close().await;
    soon(until(false)).await;
    assert!(crew.running().is_empty());
    world.end().await;
}

#[tokio::test]
async fn whom_a_process_started_ends_with_it_and_has_its_limits() {
    let (world, dir) = (World::begin().await, tempfile::tempdir().unwrap());
    let orchestrator = orchestrator(&world, "wrapper").await;
    let (lines, mut printed) = mpsc::channel(64);
    // It ends by itself, and leaves somebody behind who takes a moment to end.
    let text = "sleep 0.3\n(trap 'sleep 0.1; echo left; exit 0' TERM; touch $0.ready; while :; do sleep 0.05; done) &\n\
        echo $!\nulimit -n\nwhile ! test -e $0.ready; do sleep 0.02; done; exit 1";
    let limits = Limits { open_files: Some(77), ..Limits::default() };
    let process = script(dir.path(), "wrapper.sh", text).limits(limits);
    let process = process.output(move |line| lines.try_send(line).unwrap());
    let crew = orchestrate::run(&orchestrator, process, Options { restarts: 0, ..Options::default() });
    orchestrator.admin().launch_agent("wrapper", "ws", "main", Default::default()).await.unwrap();
    let left_behind = soon(printed.recv()).await.unwrap().text;
    assert_eq!(soon(printed.recv()).await.unwrap().text, "77");
    // It had its time; shells may say that what they waited for was terminated.
    while soon(printed.recv()).await.unwrap().text != "left" {}
    let stat = std::path::Path::new("/proc").join(left_behind).join("stat");
    // It may lie there unburied for a moment.
    let lives = || std::fs::read_to_string(&stat).is_ok_and(|stat| !stat.contains(") Z "));
    while lives() {
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    soon(crew.stop()).await;
    world.end().await;
}

//! The commands, as a person at a terminal uses them.

use std::{
    io::{BufRead as _, BufReader},
    path::Path,
    process::{Command, Output, Stdio},
    time::Duration,
};

use tokio::{io::AsyncReadExt as _, time::timeout};
use trunkline::{Config, Server};
use trunkline_proto::v1::{
    CreateTaskRequest, ExtensionDeclaration, ProgressReport, TaskOperation, downstream_message::Payload as Down,
    task_operation::OpType, upstream_message::Payload as Up,
};

use crate::client::{ACK_EXTENSION, Client, agent, lane};

struct Terminal {
    dir: tempfile::TempDir,
    server: String,
    key: String,
}

impl Terminal {
    fn run(&self, args: &[&str]) -> Output {
        let mut command = Command::new(env!("CARGO_BIN_EXE_trunkline"));
        command.args(args).env("TRUNKLINE_SERVER", &self.server).env("TRUNKLINE_API_KEY", &self.key);
        command.env("TRUNKLINE_LOG", "error").current_dir(self.dir.path()).output().unwrap()
    }

    /// What it printed.
    fn says(&self, args: &[&str]) -> String {
        let output = self.run(args);
        assert!(output.status.success(), "{args:?}: {}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).unwrap()
    }

    /// What it complained about.
    fn fails(&self, args: &[&str]) -> String {
        let output = self.run(args);
        assert!(!output.status.success(), "{args:?}");
        String::from_utf8(output.stderr).unwrap()
    }
}

async fn start(dir: &Path) -> Server {
    Server::start(Config { data_dir: dir.join("trunkline-data"), ..Config::on_free_ports() }).await.unwrap()
}

fn terminal(dir: tempfile::TempDir, server: &mut Server) -> Terminal {
    let key = server.take_admin_key().unwrap().reveal().to_owned();
    Terminal { dir, server: format!("http://{}", server.addresses().grpc), key }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn keys_are_made_listed_and_revoked() {
    let dir = tempfile::tempdir().unwrap();
    let mut server = start(dir.path()).await;
    let grpc = server.addresses().grpc;
    let mut terminal = terminal(dir, &mut server);
    let said = terminal.says(&["token", "create", "bot", "--kind", "agent", "--for", "ag::ws::impl::*"]);
    let (secret, rest) = said.split_once(' ').unwrap();
    let id = rest.trim_end().trim_end_matches(')').rsplit(' ').next().unwrap();
    let mut init = agent("one");
    init.credentials.insert("x-api-key".to_owned(), secret.to_owned());
    let mut one = Client::connect(grpc, init.clone()).await.unwrap();
    let list = terminal.says(&["token", "list"]);
    assert!(list.contains(id) && list.contains("ag::ws::impl::*") && !list.contains(secret), "{list}");
    assert!(terminal.says(&["token", "list", "--json"]).contains("\"state\":\"active\""));
    terminal.says(&["token", "revoke", id]);
    one.end().await;
    assert!(Client::connect(grpc, init).await.is_err());
    assert!(!terminal.says(&["token", "list"]).contains(id));
    assert!(terminal.says(&["token", "list", "--all"]).contains(id));
    assert!(terminal.fails(&["token", "create", "x", "--kind", "wizard"]).contains("wizard"));
    assert!(terminal.fails(&["token", "revoke", "nothing"]).contains("token not found: nothing"));
    // The key is lost: a running server's directory is not touched, a stopped one's gives another.
    terminal.key = "lost".to_owned();
    assert!(terminal.fails(&["token", "list"]).contains("token not found or expired/revoked"));
    assert!(terminal.fails(&["token", "admin"]).contains("in use by process"));
    server.stop().await;
    let said = terminal.says(&["token", "admin"]);
    terminal.key = said.split(' ').nth(1).unwrap().to_owned();
    let server = start(terminal.dir.path()).await;
    terminal.server = format!("http://{}", server.addresses().grpc);
    assert!(terminal.says(&["token", "list"]).contains("admin"));
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_sent_is_seen_and_still_delivered() {
    let dir = tempfile::tempdir().unwrap();
    let mut server = start(dir.path()).await;
    let grpc = server.addresses().grpc;
    let mut terminal = terminal(dir, &mut server);
    let said = terminal.says(&["send", &lane("one"), "7"]);
    assert!(said.starts_with("sent to ag::ws::impl::one as ag::ws::trunkline-cli::"), "{said}");
    terminal.says(&["send", &lane("one"), "a\u{1b}[2Jb", "--type", "control", "--as", "ag::ws::impl::two"]);
    let seen = terminal.says(&["tail", &lane("one"), "--from-start", "--count", "2"]);
    let lines: Vec<&str> = seen.lines().collect();
    assert!(lines[0].ends_with(" CHAT 7"), "{seen}");
    assert!(
        lines[1].ends_with(" ag::ws::impl::two CONTROL a\u{fffd}[2Jb"),
        "nothing reaches the terminal's controls: {seen}"
    );
    let mut init = agent("one");
    init.credentials.insert("x-api-key".to_owned(), terminal.key.clone());
    assert_eq!(Client::connect(grpc, init).await.unwrap().numbers(1).await, [7]);
    assert!(terminal.fails(&["send", "nowhere", "x"]).contains("invalid target topic"));
    assert!(terminal.fails(&["send", &lane("one"), "x", "--type", "shout"]).contains("shout"));
    assert!(terminal.fails(&["send", "pg::ws", "x"]).contains("not authorized"));
    // Only the administrator looks into topics.
    let said = terminal.says(&["token", "create", "bot", "--kind", "agent"]);
    let admin = std::mem::replace(&mut terminal.key, said.split(' ').next().unwrap().to_owned());
    assert_eq!(terminal.run(&["tail", &lane("one"), "--count", "1"]).status.code(), Some(4));
    terminal.key = String::new();
    assert_eq!(terminal.run(&["tail", &lane("one"), "--count", "1"]).status.code(), Some(4));
    terminal.key = admin;
    let json = terminal.says(&["tail", &lane("one"), "--from-start", "--count", "1", "--json"]);
    let json: serde_json::Value = serde_json::from_str(&json).unwrap();
    assert_eq!((&json["payload"], &json["type"]), (&7.into(), &"CHAT".into()), "{json}");
    terminal.server = "http://127.0.0.1:1".to_owned();
    assert!(terminal.fails(&["tail", &lane("one")]).contains("is a server running there?"));
    server.stop().await;
}

#[test]
fn settings_are_shown_as_they_would_be_read() {
    let dir = tempfile::tempdir().unwrap();
    let terminal = Terminal { dir, server: String::new(), key: String::new() };
    let shown = terminal.says(&["config", "--durability", "process", "--grpc", "127.0.0.1:7"]);
    assert!(shown.contains("durability = \"process\"") && shown.contains("grpc = \"127.0.0.1:7\""), "{shown}");
    std::fs::write(terminal.dir.path().join("again.toml"), &shown).unwrap();
    assert_eq!(terminal.says(&["config", "--config", "again.toml"]), shown);
    let all = ["doctor", "--grpc", "127.0.0.1:0", "--http", "127.0.0.1:0", "--ops", "127.0.0.1:0"];
    // A machine may be slow or small, which is worth a warning. Whatever keeps a server from starting ends with an error.
    let found = terminal.says(&all);
    assert!(found.lines().filter(|line| line.starts_with("ok ")).count() >= 5 && !found.contains("FAIL"), "{found}");
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = taken.local_addr().unwrap().to_string();
    let output = terminal.run(&["doctor", "--grpc", &address, "--http", "127.0.0.1:0", "--ops", "127.0.0.1:0"]);
    assert!(!output.status.success() && String::from_utf8_lossy(&output.stdout).contains("choose another with --grpc"));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn tasks_are_made_shown_followed_and_changed() {
    let dir = tempfile::tempdir().unwrap();
    let mut server = start(dir.path()).await;
    let grpc = server.addresses().grpc;
    let terminal = terminal(dir, &mut server);
    let make = |more: &[&str]| {
        let args = [&["task", "create", "dig", "-w", "ws", "--pool", "impl", "--json"], more].concat();
        let task: serde_json::Value = serde_json::from_str(&terminal.says(&args)).unwrap();
        task["task_id"].as_str().unwrap().to_owned()
    };
    let id = make(&["--metadata", "depth=3", "--priority", "high", "--attempts", "2", "--idempotency-key", "k"]);
    assert_eq!(make(&["--idempotency-key", "k"]), id);
    let listed = terminal.says(&["task", "list", "-w", "ws", "--status", "queued"]);
    let words: Vec<&str> = listed.split_whitespace().collect();
    assert_eq!(words[..7], ["TASK", "STATUS", "WORKSPACE", "TYPE", "ASSIGNED", "TO", "ERROR"]);
    assert_eq!(words[7..], [&id, "queued", "ws", "dig", "-", "-", "1", "of", "1"]);
    assert!(terminal.says(&["task", "list", "-w", "ws", "--json"]).contains(&format!("\"task_id\":\"{id}\"")));
    let shown = terminal.says(&["task", "show", &id]);
    assert!(shown.contains("metadata: depth=3"), "{shown}");

    let mut init = agent("one");
    init.credentials.insert("x-api-key".to_owned(), terminal.key.clone());
    let mut worker = Client::connect(grpc, init).await.unwrap();
    let operate =
        |op: OpType| Up::TaskOp(TaskOperation { op: op.into(), task_id: id.clone(), ..Default::default() }.into());
    let report = ProgressReport { task_id: id.clone(), completion: 0.4, summary: "half".into(), ..Default::default() };
    let (task_type, parent_task_id, request_id) = ("shovel".into(), id.clone(), "child".into());
    let child = CreateTaskRequest { task_type, parent_task_id, request_id, ..Default::default() };
    for step in [operate(OpType::Claim), Up::Progress(report.into()), Up::CreateTask(child.into())] {
        worker.put(step).await;
    }
    while !matches!(worker.next().await.unwrap(), Some(Down::CreateTask(_))) {}
    let shown = terminal.says(&["task", "show", &id]);
    assert!(shown.contains("running ws dig ag::ws::impl::one") && shown.contains("└ "), "{shown}");
    worker.put(operate(OpType::Complete)).await;
    let watched = terminal.says(&["task", "watch", &id]);
    for line in ["queued", "running", "[########------------] 40 %  half", "spawned", "completed"] {
        assert!(watched.contains(line), "{line}: {watched}");
    }
    assert!(terminal.fails(&["task", "cancel", &id]).contains("already completed/failed/cancelled"));
    let other = make(&[]);
    assert!(terminal.says(&["task", "cancel", &other, "--reason", "rain"]).contains("(rain)"));
    assert!(terminal.fails(&["task", "watch", &other]).contains("cancelled: rain"));
    terminal.says(&["task", "retry", &other]);
    terminal.says(&["task", "fail", &other, "--reason", "cave-in"]);
    assert!(terminal.fails(&["task", "create", "dig", "-w", "ws"]).contains("--pool"));
    assert!(terminal.fails(&["task", "show", "nonsense"]).contains("task not found"));
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn state_and_administration_are_a_command_away() {
    let dir = tempfile::tempdir().unwrap();
    let mut server = start(dir.path()).await;
    let terminal = terminal(dir, &mut server);
    let own = ["--scope", "global-exclusive", "--as", "ag::ws::impl::a"];
    let kv = |args: &[&'static str]| [&["kv"], args, &own].concat();
    assert_eq!(terminal.says(&kv(&["put", "greeting", "hello\nworld"])), "set greeting\n");
    assert_eq!(terminal.says(&kv(&["get", "greeting"])), "hello\nworld\n");
    assert_eq!(
        terminal.says(&kv(&["get", "greeting", "--json"])),
        "{\"key\":\"greeting\",\"value\":\"hello\\nworld\"}\n"
    );
    assert_eq!(terminal.says(&kv(&["increment", "count", "5"])), "5\n");
    assert_eq!(terminal.says(&kv(&["increment", "count", "-2"])), "3\n");
    terminal.says(&kv(&["delete", "greeting"]));
    terminal.says(&["checkpoint", "save", "state", "five", "--as", "ag::ws::impl::a"]);
    assert_eq!(terminal.says(&["checkpoint", "load", "state", "--as", "ag::ws::impl::a"]), "five\n");
    terminal.says(&["workspace", "create", "prod", "--display-name", "Production"]);
    let listed = terminal.says(&["workspace", "list"]);
    assert!(listed.starts_with("WORKSPACE") && listed.contains("prod") && listed.contains("Production"), "{listed}");
    terminal.says(&["agent", "register", "support", "--profile", "docker", "--param", "image=x"]);
    assert!(terminal.says(&["agent", "list", "--json"]).contains("\"profile\":\"docker\""));
    let rule = terminal.says(&["acl", "grant", "user:alice", "workspace:prod", "write", "--json"]);
    let rule: serde_json::Value = serde_json::from_str(&rule).unwrap();
    assert_eq!((&rule["whom"], &rule["level"]), (&"user:alice".into(), &"READWRITE".into()));
    terminal.says(&["acl", "revoke", rule["rule"].as_str().unwrap()]);
    assert!(terminal.says(&["acl", "fallback", "bridge_workspace", "write"]).contains("READWRITE"));
    assert!(terminal.says(&["acl", "fallback", "bridge_workspace", "--json"]).contains("\"READWRITE\""));
    assert!(terminal.fails(&["acl", "fallback", "workflow_engine_workspace"]).contains("not found"));
    assert!(terminal.says(&["session", "list"]).contains("orc::trunkline-cli::"));
    terminal.says(&["audit", "--limit", "1"]);
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn scripts_can_tell_why_a_command_failed_and_profiles_say_where_the_server_is() {
    let dir = tempfile::tempdir().unwrap();
    let mut server = start(dir.path()).await;
    let mut terminal = terminal(dir, &mut server);
    let code = |terminal: &Terminal, args: &[&str]| terminal.run(args).status.code();
    let get = ["kv", "get", "nothing", "--scope", "global-exclusive", "--as", "ag::ws::impl::a"];
    assert_eq!(code(&terminal, &get), Some(3));
    assert_eq!(code(&terminal, &["kv", "get", "x", "--scope", "nowhere"]), Some(2));
    assert_eq!(code(&terminal, &["workspace"]), Some(2));
    let key = std::mem::replace(&mut terminal.key, "wrong".to_owned());
    assert_eq!(code(&terminal, &["session", "list"]), Some(4));
    // The flags' variables go before the profile; without them it says it all.
    let profile = format!("[profiles.here]\nserver = {:?}\napi_key = {key:?}\n", terminal.server);
    std::fs::write(terminal.dir.path().join("cli.toml"), profile).unwrap();
    let run = |args: &[&str]| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_trunkline"));
        command.args(args).env("TRUNKLINE_CLI_CONFIG", "cli.toml").env("TRUNKLINE_LOG", "error");
        command.env_remove("TRUNKLINE_SERVER").env_remove("TRUNKLINE_API_KEY");
        command.current_dir(terminal.dir.path()).output().unwrap()
    };
    assert!(run(&["session", "list", "--server-profile", "here"]).status.success());
    let unknown = run(&["session", "list", "--server-profile", "there"]);
    assert!(String::from_utf8_lossy(&unknown.stderr).contains("\"there\""), "{unknown:?}");
    server.stop().await;
    assert_eq!(run(&["session", "list", "--server-profile", "here"]).status.code(), Some(5));
    let completions = run(&["completions", "bash"]);
    assert!(String::from_utf8_lossy(&completions.stdout).contains("checkpoint"));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_server_is_watched_as_it_stands() {
    let dir = tempfile::tempdir().unwrap();
    let mut server = start(dir.path()).await;
    let grpc = server.addresses().grpc;
    let terminal = terminal(dir, &mut server);
    let connect = async |specifier: &str, key: &str| {
        let mut init = agent(specifier);
        init.credentials.insert("x-api-key".to_owned(), key.to_owned());
        Client::connect(grpc, init).await.unwrap()
    };
    let key = terminal.key.clone();
    // One that was given what it was sent, and one that is away from its lane: it acknowledges nothing.
    let mut reads = connect("reads", &key).await;
    for n in 0..5 {
        terminal.says(&["send", &lane("reads"), &n.to_string()]);
    }
    assert_eq!(reads.numbers(5).await, [0, 1, 2, 3, 4]);
    // One that acknowledges nothing, and is given no more than so much; one that only tells others how it goes on.
    let mut holds = {
        let mut init = agent("holds");
        init.credentials.insert("x-api-key".to_owned(), key.clone());
        init.extensions = vec![ExtensionDeclaration { uri: ACK_EXTENSION.into(), ..Default::default() }];
        Client::connect(grpc, init).await.unwrap()
    };
    let tells = connect("tells", &key).await;
    for n in 0..5000_u32 {
        let summary = n.to_string();
        let report = ProgressReport { summary, recipient: lane("holds"), ..Default::default() };
        tells.put(Up::Progress(report.into())).await;
    }
    for _ in 0..4096 {
        holds.next().await.unwrap();
    }
    let look = || {
        let json = terminal.says(&["top", "--json", "--count", "1", "--interval", "200"]);
        serde_json::from_str::<serde_json::Value>(&json).unwrap()
    };
    // Until everything was read that can be.
    let seen = loop {
        let seen = look();
        let mut all = seen["sessions"].as_array().unwrap().iter();
        let (is_held, is_told) = (lane("holds"), lane("tells"));
        if all.all(|one| {
            (one["identity"] == is_held.as_str() || one["lag"] == 0)
                && (one["identity"] != is_told.as_str() || one["accepted"] == 5000)
        }) {
            break seen;
        }
    };
    let session = seen["sessions"].as_array().unwrap().iter().find(|one| one["identity"] == lane("reads").as_str());
    let session = session.unwrap_or_else(|| panic!("{seen}"));
    assert_eq!((&session["delivered"], &session["lag"]), (&5.into(), &0.into()), "{seen}");
    assert!(session["fencing_epoch"].as_u64().unwrap() > 0 && session["workspace"] == "ws");
    let of = |identity: &str| {
        let all = seen["sessions"].as_array().unwrap();
        all.iter().find(|one| one["identity"] == lane(identity).as_str()).unwrap_or_else(|| panic!("{seen}"))
    };
    let (held, lag) = (of("holds")["unacknowledged"].as_u64().unwrap(), of("holds")["lag"].as_u64().unwrap());
    assert!(held >= 4096 && lag > 0 && held + lag == 5000, "{held} {lag}: {seen}");
    assert_eq!((&of("tells")["accepted"], &of("tells")["lag"]), (&5000.into(), &0.into()), "{seen}");
    assert_eq!((&seen["connections"]["agent"], &seen["sessions_total"]), (&3.into(), &3.into()));
    assert!(seen["accepted_per_s"].as_f64().unwrap() >= 0.0 && seen["records"].as_u64().unwrap() >= 5);
    // Not on a terminal, it prints what a terminal would show.
    let table = terminal.says(&["top", "--interval", "200", "--sort", "name"]);
    assert!(table.starts_with("trunkline ") && table.contains("IDENTITY") && table.contains(&lane("reads")), "{table}");
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_watches_is_an_administrator_and_stays_one() {
    let dir = tempfile::tempdir().unwrap();
    let mut server = start(dir.path()).await;
    let mut terminal = terminal(dir, &mut server);
    let said = terminal.says(&["token", "create", "bot", "--kind", "agent", "--json"]);
    let bot: serde_json::Value = serde_json::from_str(&said).unwrap();
    let keys = terminal.says(&["token", "list", "--json"]);
    let keys = keys.lines().map(|line| serde_json::from_str::<serde_json::Value>(line).unwrap());
    let own = keys.into_iter().find(|key| key["id"] != bot["id"]).unwrap();
    let mut watches = Command::new(env!("CARGO_BIN_EXE_trunkline"))
        .args(["top", "--json", "--interval", "200"])
        .env("TRUNKLINE_SERVER", &terminal.server)
        .env("TRUNKLINE_API_KEY", &terminal.key)
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let mut line = String::new();
    let mut lines = BufReader::new(watches.stdout.take().unwrap());
    lines.read_line(&mut line).unwrap();
    // It may not hear of its own end.
    terminal.run(&["token", "revoke", own["id"].as_str().unwrap()]);
    while lines.read_line(&mut line).unwrap() > 0 {}
    assert_eq!(watches.wait().unwrap().code(), Some(4));
    bot["secret"].as_str().unwrap().clone_into(&mut terminal.key);
    assert_eq!(terminal.run(&["top"]).status.code(), Some(4));
    assert_eq!(terminal.run(&["top", "--interval", "1"]).status.code(), Some(2));
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn agents_that_are_asked_for_become_processes_that_end_with_their_orchestrator() {
    let dir = tempfile::tempdir().unwrap();
    let mut server = start(dir.path()).await;
    let terminal = terminal(dir, &mut server);
    let script = "echo $AETHER_WORKSPACE $AETHER_SPECIFIER $AETHER_GATEWAY $AETHER_LP_SIZE; echo ${TRUNKLINE_API_KEY:-no key}; \
        sleep 600 & echo $!; wait";
    let mut orchestrator = Command::new(env!("CARGO_BIN_EXE_trunkline"))
        .args([
            "orchestrate",
            "--profile",
            "shell",
            "--log-dir",
            "logs",
            "--memory-mib",
            "4000",
            "--",
            "sh",
            "-c",
            script,
        ])
        .env("TRUNKLINE_SERVER", &terminal.server)
        .env("TRUNKLINE_API_KEY", &terminal.key)
        .current_dir(terminal.dir.path())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut said = String::new();
    BufReader::new(orchestrator.stdout.take().unwrap()).read_line(&mut said).unwrap();
    assert!(said.starts_with("ready as orc::local::") && said.ends_with(" for shell\n"), "{said}");
    terminal.says(&["agent", "register", "support", "--profile", "shell", "--param", "size=big"]);
    terminal.says(&["agent", "launch", "support", "--workspace", "prod", "--specifier", "main"]);
    let log = terminal.dir.path().join("logs").join("prod.support.main.log");
    let until = async |done: &dyn Fn(&str) -> bool| {
        let text = || std::fs::read_to_string(&log).unwrap_or_default();
        while !done(&text()) {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        text()
    };
    let text = until(&|text| text.lines().count() == 3).await;
    let address = terminal.server.trim_start_matches("http://");
    let lines: Vec<&str> = text.lines().collect();
    assert_eq!(lines[..2], [format!("prod main {address} big"), "no key".to_owned()]);
    let grandchild = Path::new("/proc").join(lines[2]);
    assert!(grandchild.exists());
    let terminated = Command::new("kill").arg(orchestrator.id().to_string()).status().unwrap();
    assert!(terminated.success() && orchestrator.wait().unwrap().success());
    // It may lie there unburied for a moment.
    let lives = || std::fs::read_to_string(grandchild.join("stat")).is_ok_and(|stat| !stat.contains(") Z "));
    while lives() {
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    let refused = terminal.fails(&["orchestrate", "--profile", "x", "--server", "http://127.0.0.1:1", "--", "true"]);
    assert!(refused.contains("is a server running there?"), "{refused}");
    server.stop().await;
}

/// The lines of the README that a user types.
fn readme_lines() -> Vec<String> {
    let readme = std::fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("../../README.md")).unwrap();
    let blocks = readme.split("\n```sh\n").skip(1).map(|rest| rest.split("\n```").next().unwrap());
    let lines = blocks.flat_map(str::lines).filter(|line| line.starts_with("trunkline ")).map(ToOwned::to_owned);
    lines.map(|line| line.replace("> /etc/bash_completion.d/trunkline", "> completions")).collect()
}

/// What a shell makes of a line that a user types. Those that go on are taken to work once they print.
async fn type_in(terminal: &Terminal, desk: &Path, http: &str, line: &str) -> Result<(), String> {
    let program = Path::new(env!("CARGO_BIN_EXE_trunkline")).parent().unwrap().display();
    let path = format!("{program}:{}", std::env::var("PATH").unwrap());
    let mut child = tokio::process::Command::new("sh")
        .args(["-c", &format!("exec {line}")])
        .env("PATH", path)
        .env("TRUNKLINE_SERVER", &terminal.server)
        .env("TRUNKLINE_API_KEY", &terminal.key)
        .env("TRUNKLINE_HTTP", http)
        .env("TRUNKLINE_TOKEN", &terminal.key)
        .env("TRUNKLINE_LOG", "error")
        .current_dir(desk)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .kill_on_drop(true)
        .spawn()
        .unwrap();
    let (mut out, mut err) = (child.stdout.take().unwrap(), child.stderr.take().unwrap());
    let (mut printed, mut complained) = (Vec::new(), String::new());
    if ["--watch", " tail ", " sandbox run ", " orchestrate "].iter().any(|goes_on| line.contains(goes_on)) {
        let first = timeout(Duration::from_secs(10), out.read_buf(&mut printed)).await;
        let goes_on = child.try_wait().unwrap().is_none();
        return if goes_on && matches!(first, Ok(Ok(1..))) {
            Ok(())
        } else {
            Err(format!("{line}: ends or prints nothing"))
        };
    }
    let ends = async { tokio::join!(child.wait(), out.read_to_end(&mut printed), err.read_to_string(&mut complained)) };
    let Ok((status, ..)) = timeout(Duration::from_secs(30), ends).await else { return Err(format!("{line}: hangs")) };
    let code = status.unwrap().code();
    // Whether a server could run here depends on what else does.
    let is_fine = code == Some(0) || line.contains(" doctor") && code == Some(1);
    if is_fine { Ok(()) } else { Err(format!("{line}: {code:?} {complained}")) }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_command_of_the_readme_works_as_it_stands_there() {
    let dir = tempfile::tempdir().unwrap();
    let mut server = start(dir.path()).await;
    let http = format!("http://{}", server.addresses().http);
    let terminal = terminal(dir, &mut server);
    let desk = terminal.dir.path().join("desk");
    std::fs::create_dir(&desk).unwrap();
    std::fs::write(desk.join("agent"), "#!/bin/sh\nexec cat\n").unwrap();
    std::fs::set_permissions(desk.join("agent"), std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
    let greeting = ["kv", "put", "greeting", "hello", "--as", "ag::demo::greeter::bob", "--scope", "global-exclusive"];
    terminal.says(&greeting);
    let lines = readme_lines();
    assert!(lines.len() > 20, "{lines:?}");
    let mut wrong = Vec::new();
    for line in &lines {
        wrong.extend(type_in(&terminal, &desk, &http, line).await.err());
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
    server.stop().await;
}

//! The commands, as a person at a terminal uses them.

use std::{
    path::Path,
    process::{Command, Output},
};

use trunkline::{Config, Server};

use crate::client::{Client, agent, lane};

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
    assert!(terminal.fails(&["tail", &lane("one"), "--count", "1"]).contains("PermissionDenied"));
    terminal.key = String::new();
    assert!(terminal.fails(&["tail", &lane("one"), "--count", "1"]).contains("Unauthenticated"));
    terminal.key = admin;
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
    assert!(
        terminal
            .says(&all)
            .lines()
            .all(|line| line.starts_with("ok ") || line.contains("open files") || line.starts_with(' '))
    );
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = taken.local_addr().unwrap().to_string();
    let output = terminal.run(&["doctor", "--grpc", &address, "--http", "127.0.0.1:0", "--ops", "127.0.0.1:0"]);
    assert!(!output.status.success() && String::from_utf8_lossy(&output.stdout).contains("choose another with --grpc"));
}

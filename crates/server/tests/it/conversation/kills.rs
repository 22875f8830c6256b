//! What was acknowledged is there after the server was killed, once.

use serde_json::json;

use super::{begin, say, show, texts};
use crate::{process::Process, sandbox::Web};

/// A process has no settings but its own: the app is made, and its token signed, by the command line.
fn trunkline(args: &[&str], process: &Process) -> String {
    let mut command = std::process::Command::new(env!("CARGO_BIN_EXE_trunkline"));
    command.args(args).args(["--server", &format!("http://{}", process.grpc)]).env("TRUNKLINE_LOG", "error");
    let done = command.output().unwrap();
    assert!(done.status.success(), "{args:?}: {}", String::from_utf8_lossy(&done.stderr));
    String::from_utf8(done.stdout).unwrap().trim().to_owned()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_was_accepted_survives_a_kill() {
    let dir = tempfile::tempdir().unwrap();
    let process = Process::start(dir.path());
    let made = trunkline(&["app", "create", "shop", "--origin", "https://shop.example.org"], &process);
    assert!(made.contains("key app_") && made.contains("shown once"), "{made}");
    let agent = trunkline(&["app", "agent", "shop", "ag::ws::impl::one", "--name", "Ada"], &process);
    let token = trunkline(&["app", "token", "shop", &agent, "ann"], &process);
    let ann = Web::new(process.http).with(&token);
    let convo = begin(&ann).await;
    for n in 0..20 {
        assert_eq!(say(&ann, &convo, &n.to_string()).await.0, 200);
    }
    process.kill();
    let process = Process::start(dir.path());
    let ann = Web::new(process.http).with(&token);
    let expected: Vec<String> = (0..20).map(|n| n.to_string()).collect();
    assert_eq!(texts(&show(&ann, &convo).await), expected);
    // Its secret is another one now; tokens of the one before are good until that is retired.
    let listed = trunkline(&["app", "list"], &process);
    assert!(listed.contains("one secret  https://shop.example.org") && listed.contains(&agent), "{listed}");
    trunkline(&["app", "rotate", "shop"], &process);
    let newer = Web::new(process.http).with(&trunkline(&["app", "token", "shop", &agent, "ann"], &process));
    assert_eq!(say(&ann, &convo, "old").await.0, 200);
    assert_eq!(say(&newer, &convo, "new").await.0, 200);
    trunkline(&["app", "retire", "shop"], &process);
    assert_eq!(say(&ann, &convo, "old").await.0, 401);
    assert_eq!(say(&newer, &convo, "new").await.0, 200);
    // Who is erased leaves nothing behind.
    assert_eq!(trunkline(&["app", "erase", "shop", "ann"], &process), "erased 1 conversations");
    assert_eq!(say(&newer, &convo, "hello?").await.0, 404);
    assert_eq!(newer.get("/api/v2/agent_convos").await.1, json!({"agent_convos": []}));
    trunkline(&["app", "remove", "shop"], &process);
    assert_eq!(newer.get("/api/v2/agent_convos").await.0, 401);
}

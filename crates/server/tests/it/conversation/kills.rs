//! What was acknowledged is there after the server was killed, once.

use serde_json::json;

use trunkline_proto::v1::{MessageType, SendMessage, upstream_message::Payload as Up};

use super::{begin, say, show, texts, watch};
use crate::{
    client::{Client, agent},
    process::Process,
    sandbox::Web,
};

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

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_agent_is_not_asked_again_what_it_had_answered() {
    let dir = tempfile::tempdir().unwrap();
    let mut process = Process::start(dir.path());
    trunkline(&["app", "create", "shop", "--origin", "https://shop.example.org"], &process);
    let bot = trunkline(&["app", "agent", "shop", "ag::ws::impl::one", "--name", "Ada"], &process);
    let token = trunkline(&["app", "token", "shop", &bot, "ann"], &process);
    let ann = |process: &Process| Web::new(process.http).with(&token);
    let convo = begin(&ann(&process)).await;
    for question in 0..5 {
        let mut one = Client::connect(process.grpc, agent("one")).await.unwrap();
        let mut tab = watch(&ann(&process), &convo).await;
        say(&ann(&process), &convo, &question.to_string()).await;
        // Not one that it answered before.
        let asked = one.message().await;
        assert_eq!(std::str::from_utf8(&asked.payload).unwrap(), question.to_string());
        let answer = SendMessage {
            target_topic: asked.source_topic,
            payload: format!("answer {question}").into(),
            message_type: MessageType::Chat.into(),
            ..SendMessage::default()
        };
        one.put(Up::Send(answer)).await;
        // The end of the turn before comes first.
        let mut heard = String::new();
        while heard != format!("answer {question}") {
            let event = tab.next().await.unwrap();
            heard = event.data["message"]["content"].as_str().unwrap_or_default().to_owned();
        }
        process.kill();
        process = Process::start(dir.path());
    }
}

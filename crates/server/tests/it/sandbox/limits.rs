//! What is too much is refused, and is counted.

use std::{
    net::SocketAddr,
    path::Path,
    process::Stdio,
    time::{Duration, Instant},
};

use serde_json::json;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
};
use trunkline::{Config, Server};
use trunkline_core::limits::Limits;

use super::{PATIENCE, Web};
use crate::{
    ops,
    upgrade::stories::{DOWN, UP, Wire},
};

async fn server(dir: &Path, limits: Limits) -> Server {
    Server::start(Config { data_dir: dir.to_owned(), dev: true, limits, ..Config::on_free_ports() }).await.unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_tells_too_often_is_told_to_wait() {
    let dir = tempfile::tempdir().unwrap();
    let server = server(dir.path(), Limits { messages_per_second: 1, message_burst: 3, ..Limits::default() }).await;
    let web = Web::new(server.addresses().http);
    web.make("s").await;
    web.make("other").await;
    let event = json!({"type": "text", "text": "x"}).to_string();
    for _ in 0..3 {
        assert_eq!(web.post("/sessions/s/events", event.clone()).await.0, 202);
    }
    let refused = web.request(reqwest::Method::POST, "/sessions/s/events").body(event.clone()).send().await.unwrap();
    assert_eq!((refused.status().as_u16(), refused.headers()["retry-after"].to_str().unwrap()), (429, "1"));
    assert!(refused.text().await.unwrap().contains("\"code\":\"rate_limited\""));
    assert_eq!(web.artifacts("s").await.len(), 3);
    assert_eq!(web.post("/sessions/other/events", event).await.0, 202, "only that one");
    server.stop().await;
}

/// What a connection of one's own is answered.
async fn ask(address: SocketAddr) -> (TcpStream, String) {
    let mut stream = TcpStream::connect(address).await.unwrap();
    let mut answer = vec![0; 64];
    // One that is too many may be closed before it has said anything.
    let _ = stream.write_all(format!("GET /sessions HTTP/1.1\r\nhost: {address}\r\n\r\n").as_bytes()).await;
    let read = stream.read(&mut answer).await.unwrap_or(0);
    (stream, String::from_utf8_lossy(&answer[..read]).into_owned())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn so_many_connections_and_no_more() {
    let dir = tempfile::tempdir().unwrap();
    let server = server(dir.path(), Limits { http_connections: 2, ..Limits::default() }).await;
    let http = server.addresses().http;
    let stream = async || {
        let mut stream = TcpStream::connect(http).await.unwrap();
        let request = format!("GET /sessions/stream HTTP/1.1\r\nhost: {http}\r\n\r\n");
        stream.write_all(request.as_bytes()).await.unwrap();
        let mut answer = [0; 12];
        stream.read_exact(&mut answer).await.unwrap();
        assert_eq!(&answer, b"HTTP/1.1 200");
        stream
    };
    let one = stream().await;
    // Without a request under way, a connection makes room.
    let (mut idle, answer) = ask(http).await;
    assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
    let _two = stream().await;
    let closed = async { while idle.read(&mut [0; 1024]).await.unwrap_or(0) > 0 {} };
    tokio::time::timeout(PATIENCE, closed).await.unwrap();
    let (_, answer) = ask(http).await;
    assert!(answer.is_empty() || answer.starts_with("HTTP/1.1 503"), "{answer}");
    drop(one);
    let comes_in = async {
        while !ask(http).await.1.starts_with("HTTP/1.1 200") {
            tokio::task::yield_now().await;
        }
    };
    tokio::time::timeout(PATIENCE, comes_in).await.unwrap();
    let (_, figures) = ops::get(server.addresses().ops, "/metrics").await;
    let refused = figures.lines().find_map(|line| line.strip_prefix("trunkline_http_connections_refused_total "));
    assert!(refused.unwrap().parse::<u64>().unwrap() > 0);
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn whoever_admits_everybody_is_reached_under_its_own_name() {
    let dir = tempfile::tempdir().unwrap();
    let server = server(dir.path(), Limits::default()).await;
    let web = Web::new(server.addresses().http);
    let port = server.addresses().http.port();
    for (host, status) in [
        (format!("localhost:{port}"), 200),
        (format!("127.0.0.1:{port}"), 200),
        (format!("[::1]:{port}"), 200),
        (format!("pointed.here.example:{port}"), 403),
        ("127.0.0.1.example".into(), 403),
        ("10.0.0.1".into(), 403),
    ] {
        let request = web.request(reqwest::Method::GET, "/sessions").header("host", host.clone());
        assert_eq!(request.send().await.unwrap().status().as_u16(), status, "{host}");
    }
    server.stop().await;
}

/// A page of another site that names what is here as its picture, its frame or its next page. Browsers send no origin then.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn pages_of_other_sites_take_no_stream_over() {
    let dir = tempfile::tempdir().unwrap();
    let server = server(dir.path(), Limits::default()).await;
    let web = Web::new(server.addresses().http);
    web.make("s").await;
    let mut commands = web.open("/sessions/s/commands").await;
    web.becomes("s", "live").await;
    for (site, mode, dest, path, status) in [
        ("cross-site", "no-cors", "image", "/sessions/s/commands", 403),
        ("same-site", "no-cors", "image", "/sessions/s/commands", 403),
        ("cross-site", "navigate", "iframe", "/sessions/s/commands", 403),
        ("cross-site", "navigate", "document", "/sessions/s/commands", 403),
        ("cross-site", "navigate", "iframe", "/sessions", 403),
        ("cross-site", "navigate", "document", "/sessions", 200),
        ("none", "navigate", "document", "/sessions", 200),
    ] {
        let request = web.request(reqwest::Method::GET, path).header("sec-fetch-site", site);
        let answer = request.header("sec-fetch-mode", mode).header("sec-fetch-dest", dest).send().await.unwrap();
        assert_eq!(answer.status().as_u16(), status, "{site} {mode} {dest} {path}");
    }
    // Whoever had the stream has it.
    assert_eq!(web.post("/sessions/s/commands", r#"{"type": "abort"}"#).await.0, 202);
    assert_eq!(commands.expect("command").await.data, json!({"type": "abort"}));
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn figures_tell_what_there_is() {
    let dir = tempfile::tempdir().unwrap();
    let server = server(dir.path(), Limits::default()).await;
    let web = Web::new(server.addresses().http);
    web.make("s").await;
    web.make("t").await;
    let mut commands = web.open("/sessions/s/commands").await;
    web.becomes("s", "live").await;
    web.tell("s", json!([{"type": "text", "text": "a"}, {"type": "text", "text": "b"}])).await;
    let mut watch = web.open("/sessions/s/stream").await;
    for _ in 0..2 {
        watch.expect("artifact_snapshot").await;
    }
    assert_eq!(web.get("/sessions/none").await.0, 404);
    let figures = async || ops::get(server.addresses().ops, "/metrics").await.1;
    let text = figures().await;
    for line in [
        "trunkline_sandboxes{status=\"live\"} 1",
        "trunkline_sandboxes{status=\"bootstrapping\"} 1",
        "trunkline_sandboxes{status=\"idle\"} 0",
        "trunkline_sandbox_events_total 2",
        "trunkline_event_streams{tells=\"artifacts\"} 1",
        "trunkline_event_streams{tells=\"commands\"} 1",
        "trunkline_http_answers_total{status=\"201\"} 2",
        "trunkline_http_answers_total{status=\"404\"} 1",
    ] {
        assert!(text.lines().any(|found| found == line), "{line}\n{text}");
    }
    assert_eq!(web.delete("/sessions/s").await.0, 204);
    commands.ends().await;
    watch.expect("session_removed").await;
    watch.ends().await;
    let none = async {
        while !figures().await.contains("trunkline_event_streams{tells=\"artifacts\"} 0") {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    tokio::time::timeout(PATIENCE, none).await.unwrap();
    server.stop().await;
}

/// Its end may come before it is noted that it was there.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stream_that_ends_at_once_has_ended() {
    let dir = tempfile::tempdir().unwrap();
    let server = server(dir.path(), Limits::default()).await;
    let http = server.addresses().http;
    let web = Web::new(http);
    let ids: Vec<_> = (0..150_u64).map(|n| format!("s{n}")).collect();
    for id in &ids {
        web.make(id).await;
        // An event takes it out of the timer that would remove it.
        web.tell(id, json!({"type": "heartbeat"})).await;
    }
    for (n, id) in ids.iter().enumerate() {
        let mut stream = TcpStream::connect(http).await.unwrap();
        let request = format!("GET /sessions/{id}/commands HTTP/1.1\r\nhost: {http}\r\n\r\n");
        stream.write_all(request.as_bytes()).await.unwrap();
        // Somewhere in the middle of it.
        tokio::time::sleep(Duration::from_micros(20 * n as u64)).await;
        drop(stream);
    }
    // One that stays, and so comes last.
    let mut last = web.open("/sessions/s0/commands").await;
    web.becomes("s0", "live").await;
    assert_eq!(web.prompt("s0", "x").await, 202);
    assert_eq!(last.command().await.1, "x");
    for id in &ids[1..] {
        let begun = Instant::now();
        while web.status(id).await == "live" {
            assert!(begun.elapsed() < PATIENCE, "{id} is live, and nobody is there");
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_program_that_ends_no_line_is_cut_and_goes_on() {
    let dir = tempfile::tempdir().unwrap();
    let server = server(dir.path(), Limits::default()).await;
    let web = Web::new(server.addresses().http);
    // Each of these takes six bytes in JSON.
    let script = "head -c 700000 /dev/zero | tr '\\0' '\\001'; echo; echo behind; printf unended";
    let mut program = tokio::process::Command::new(env!("CARGO_BIN_EXE_trunkline"));
    program.args(["sandbox", "run", "s", "--http", &web.base, "--", "sh", "-c", script]).kill_on_drop(true);
    let ended = tokio::time::timeout(PATIENCE, program.output()).await.unwrap().unwrap();
    assert!(ended.status.success(), "{}", String::from_utf8_lossy(&ended.stderr));
    let text = web.artifacts("s").await.iter().filter_map(|shown| shown["text"].as_str()).collect::<Vec<_>>().join("|");
    assert!(text.starts_with(&"\u{1}".repeat(512 * 1024)));
    assert!(text.contains("\u{1} [the rest of this line was left out]\nbehind\nunended"), "{}", &text[512 * 1024..]);
    server.stop().await;
}

/// `trunkline sandbox run s`, with a program that does nothing but take its orders.
fn sandbox_run(base: &str, silence: &str) -> tokio::process::Child {
    let mut program = tokio::process::Command::new(env!("CARGO_BIN_EXE_trunkline"));
    program.args(["sandbox", "run", "s", "--http", base, "--silence", silence, "--", "cat"]);
    program.stdout(Stdio::null()).stderr(Stdio::null()).kill_on_drop(true).spawn().unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn of_two_programs_that_work_as_one_sandbox_the_first_is_told_and_ends() {
    let dir = tempfile::tempdir().unwrap();
    let server = server(dir.path(), Limits::default()).await;
    let web = Web::new(server.addresses().http);
    let mut first = sandbox_run(&web.base, "40");
    web.becomes("s", "live").await;
    let mut stock = web.open("/sessions/s/commands").await;
    // It does not come back and take the commands again.
    let ended = tokio::time::timeout(PATIENCE, first.wait()).await.unwrap().unwrap();
    assert_eq!(ended.code(), Some(6));
    for n in 0..10 {
        assert_eq!(web.prompt("s", &n.to_string()).await, 202);
        assert_eq!(stock.command().await.1, n.to_string());
    }
    let mut second = sandbox_run(&web.base, "40");
    assert_eq!(stock.expect("replaced").await.data, json!({"reason": "another stream took over"}));
    stock.ends().await;
    assert!(second.try_wait().unwrap().is_none());
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_program_notices_a_wire_that_died_without_a_word() {
    let dir = tempfile::tempdir().unwrap();
    let server = server(dir.path(), Limits::default()).await;
    let web = Web::new(server.addresses().http);
    let wire = Wire::to(server.addresses().http);
    // As many seconds as a busy machine may take for what it says then.
    let _program = sandbox_run(&format!("http://{}", wire.address), "3");
    web.becomes("s", "live").await;
    wire.breaks(UP);
    wire.breaks(DOWN);
    assert_eq!(web.prompt("s", "hello").await, 202);
    // It comes again by itself, on another connection.
    let (begun, before) = (Instant::now(), wire.connections());
    while wire.connections() == before {
        assert!(begun.elapsed() < PATIENCE, "it waits for a server that it does not hear");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    wire.heals();
    let hears = async |text: &str| web.artifacts("s").await.iter().any(|shown| shown.to_string().contains(text));
    while !hears("hello").await {
        assert!(begun.elapsed() < PATIENCE, "{:?}", web.artifacts("s").await);
    }
    server.stop().await;
}

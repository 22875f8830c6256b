//! What users attach.

use std::net::SocketAddr;

use reqwest::{
    Method,
    multipart::{Form, Part},
};
use serde_json::{Value, json};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
};
use trunkline_core::conversation::Options;

use super::{OTHER_AGENT, SECRET, begin, claims, hs256, say, server_with, show, sign};
use crate::{
    client::{Client, agent},
    sandbox::Web,
};

const PNG: &[u8] = b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR";

fn part(name: &str, kind: &str, content: impl Into<Vec<u8>>) -> Part {
    Part::bytes(content.into()).file_name(name.to_owned()).mime_str(kind).unwrap()
}

async fn upload(web: &Web, convo: &str, parts: Vec<Part>) -> (u16, Value) {
    let form = parts.into_iter().fold(Form::new().text("note", "x"), |form, part| form.part("files[]", part));
    web.ask(web.request(Method::POST, &format!("/api/v2/agent_convos/{convo}/upload_file")).multipart(form)).await
}

fn kept(dir: &std::path::Path) -> usize {
    let Ok(entries) = std::fs::read_dir(dir) else { return 0 };
    entries.map(|entry| entry.unwrap().path()).map(|path| if path.is_dir() { kept(&path) } else { 1 }).sum()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn files_are_attached_shown_and_fetched() {
    let dir = tempfile::tempdir().unwrap();
    let server = server_with(dir.path(), Options::default()).await;
    let http = server.addresses().http;
    let token = |name: &str| Web::new(http).with(&sign(&hs256(), &claims(name, OTHER_AGENT), SECRET));
    let (ann, bob) = (token("ann"), token("bob"));
    let convo = begin(&ann).await;
    let large: Vec<u8> = PNG.iter().copied().chain((0..90_000_u32).map(|n| (n % 251) as u8)).collect();
    let parts = vec![part("pic ture.png", "image/png", large.clone()), part("../a.txt", "text/plain", "hello")];
    let (status, draft) = upload(&ann, &convo, parts).await;
    assert_eq!(status, 200, "{draft}");
    assert_eq!(show(&ann, &convo).await["messages"].as_array().unwrap().len(), 1, "it is not said yet");
    let send = json!({"text": "look", "message_id": draft["message_id"]}).to_string();
    let path = format!("/api/v2/agent_convos/{convo}/stream_message");
    assert_eq!(bob.post(&path, send.clone()).await.0, 404);
    for _ in 0..2 {
        let (status, said) = ann.post(&path, send.clone()).await;
        assert_eq!((status, &said["message_id"]), (200, &draft["message_id"]));
    }
    let shown = show(&ann, &convo).await;
    let messages = shown["messages"].as_array().unwrap();
    assert_eq!((messages.len(), &messages[1]["id"]), (2, &draft["message_id"]));
    let files = messages[1]["files"].as_array().unwrap();
    assert_eq!((&files[0]["filename"], &files[0]["byte_size"]), (&json!("pic ture.png"), &json!(large.len())));
    assert_eq!((&files[1]["filename"], &files[1]["content_type"]), (&json!("a.txt"), &json!("text/plain")));
    // A link needs no token; the bare address needs the user's.
    let url = files[0]["url"].as_str().unwrap();
    let bare = url.strip_prefix(&format!("http://{http}")).unwrap();
    let response = reqwest::get(url).await.unwrap();
    let header = |name: &str| response.headers()[name].to_str().unwrap().to_owned();
    assert_eq!((header("content-type"), header("x-content-type-options")), ("image/png".into(), "nosniff".into()));
    assert_eq!(header("content-disposition"), "inline; filename*=UTF-8''pic%20ture%2Epng");
    assert_eq!(response.bytes().await.unwrap(), large);
    // As iOS plays what it is shown.
    let ask = async |name: &str, value: &str| {
        let asked = reqwest::Client::new().get(url).header(name, value).send().await.unwrap();
        let of = |name: &str| asked.headers().get(name).map_or("", |value| value.to_str().unwrap()).to_owned();
        let headers = (asked.status().as_u16(), of("content-range"), of("etag"), of("accept-ranges"));
        (headers, asked.bytes().await.unwrap())
    };
    let size = large.len();
    let ((status, range, tag, ranges), content) = ask("range", "bytes=0-1").await;
    assert_eq!((status, range, ranges.as_str()), (206, format!("bytes 0-1/{size}"), "bytes"));
    assert_eq!(content, large[..2]);
    let ((status, range, ..), content) = ask("range", "bytes=70000-").await;
    assert_eq!((status, range), (206, format!("bytes 70000-{}/{size}", size - 1)));
    assert_eq!(content, large[70_000..]);
    let ((status, range, ..), content) = ask("range", &format!("bytes={size}-")).await;
    assert_eq!((status, range), (416, format!("bytes */{size}")));
    assert_eq!(serde_json::from_slice::<Value>(&content).unwrap()["error"]["code"], "range");
    assert_eq!(ask("if-none-match", &tag).await.0.0, 304);
    let (path_only, query) = bare.split_once('?').unwrap();
    let web = Web::new(http);
    assert_eq!(web.get(path_only).await.0, 401);
    assert_eq!(ann.get(path_only).await.0, 200);
    assert_eq!(bob.get(path_only).await.0, 404);
    assert_eq!(web.get(&format!("{path_only}?{query}x")).await.0, 404);
    let (_, signature) = query.split_once("&signature=").unwrap();
    assert_eq!(web.get(&format!("{path_only}?expires=99999999999&signature={signature}")).await.0, 404);
    assert_eq!(web.get(&format!("{path_only}?expires=1&signature={signature}")).await.0, 404);
    // The agent is told where they are.
    let mut two = Client::connect(server.addresses().grpc, agent("two")).await.unwrap();
    let told: Value = serde_json::from_slice(&two.message().await.payload).unwrap();
    let fetched = reqwest::get(told["files"][1]["url"].as_str().unwrap()).await.unwrap();
    assert_eq!(fetched.headers()["content-disposition"], "attachment; filename*=UTF-8''a%2Etxt");
    assert_eq!(fetched.text().await.unwrap(), "hello");
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_may_not_be_attached_leaves_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let server = server_with(dir.path(), Options { draft_hours: 0, ..Options::default() }).await;
    let http = server.addresses().http;
    let ann = Web::new(http).with(&sign(&hs256(), &claims("ann", OTHER_AGENT), SECRET));
    let convo = begin(&ann).await;
    let text = |name: &str| part(name, "text/plain", "hello");
    for (parts, expected) in [
        (vec![part("a.png", "image/png", [PNG, &[0; 100_000]].concat())], 413),
        (vec![text("a.txt"), part("b.png", "image/png", [PNG, &[0; 100_000]].concat())], 413),
        (vec![part("a.png", "image/png", "MZ\u{1}\0\0\0\0\0")], 415),
        (vec![part("a.pdf", "application/pdf", "%PDF-1.7")], 415),
        (vec![part("a.html", "text/html", "<script>")], 415),
        (vec![text("1"), text("2"), text("3")], 422),
        (Vec::new(), 400),
    ] {
        let (status, refused) = upload(&ann, &convo, parts).await;
        assert_eq!(status, expected, "{refused}");
    }
    let path = format!("/api/v2/agent_convos/{convo}/upload_file");
    assert_eq!(ann.post(&path, "x").await.0, 400);
    assert_eq!(kept(&dir.path().join("files")), 0, "nothing is left");
    // Three for the conversation, of two each.
    assert_eq!(upload(&ann, &convo, vec![text("1"), text("2")]).await.0, 200);
    let (status, last) = upload(&ann, &convo, vec![text("3")]).await;
    assert_eq!(status, 200);
    assert_eq!(upload(&ann, &convo, vec![text("4")]).await.0, 422);
    assert_eq!(kept(&dir.path().join("files")), 3);
    let send = json!({"text": "", "message_id": last["message_id"]}).to_string();
    let (status, said) = ann.post(&format!("/api/v2/agent_convos/{convo}/stream_message"), send).await;
    assert_eq!(status, 200, "files say enough: {said}");
    server.stop().await;
    // Drafts that were not sent go with the first sweep.
    let server = server_with(dir.path(), Options { draft_hours: 0, ..Options::default() }).await;
    let begun = std::time::Instant::now();
    while kept(&dir.path().join("files")) != 1 {
        assert!(begun.elapsed() < std::time::Duration::from_secs(20), "drafts stay");
        tokio::time::sleep(std::time::Duration::from_millis(5)).await;
    }
    let ann = Web::new(server.addresses().http).with(&sign(&hs256(), &claims("ann", OTHER_AGENT), SECRET));
    assert_eq!(upload(&ann, &convo, vec![text("4")]).await.0, 200);
    assert_eq!(say(&ann, &convo, "bye").await.0, 200);
    server.stop().await;
}

/// An upload that says nothing for now, as a connection of its own.
async fn begin_upload(http: SocketAddr, token: &str, convo: &str, body: &[u8]) -> TcpStream {
    let mut stream = TcpStream::connect(http).await.unwrap();
    let head = format!(
        "POST /api/v2/agent_convos/{convo}/upload_file HTTP/1.1\r\nhost: {http}\r\nauthorization: Bearer {token}\r\n\
         content-type: multipart/form-data; boundary=b\r\ncontent-length: 1000000\r\n\r\n"
    );
    stream.write_all(head.as_bytes()).await.unwrap();
    // Whoever is refused may be cut before all is said.
    let _ = stream.write_all(body).await;
    stream
}

async fn answer(stream: &mut TcpStream) -> String {
    let (mut answer, mut some) = (Vec::new(), vec![0; 1024]);
    while !answer.ends_with(b"}") {
        let read = tokio::time::timeout(std::time::Duration::from_secs(20), stream.read(&mut some)).await;
        match read.unwrap().unwrap() {
            0 => break,
            read => answer.extend_from_slice(&some[..read]),
        }
    }
    String::from_utf8_lossy(&answer).into_owned()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nobody_keeps_others_from_uploading() {
    let dir = tempfile::tempdir().unwrap();
    let server = server_with(dir.path(), Options::default()).await;
    let http = server.addresses().http;
    let token = |name: &str| sign(&hs256(), &claims(name, OTHER_AGENT), SECRET);
    let (ann, bob) = (Web::new(http).with(&token("ann")), Web::new(http).with(&token("bob")));
    let convo = begin(&ann).await;
    let part = b"--b\r\ncontent-disposition: form-data; name=\"files[]\"; filename=\"a.txt\"\r\ncontent-type: text/plain\r\n\r\nhel";
    let begun = std::time::Instant::now();
    let is_in_time = || assert!(begun.elapsed() < std::time::Duration::from_secs(20), "slots are not counted");
    // An upload of nothing tells whether there is a slot for one; it may have taken that of one that is held.
    let mut held = Vec::new();
    while upload(&ann, &convo, Vec::new()).await.0 != 429 {
        is_in_time();
        let convo = begin(&ann).await;
        held.push(begin_upload(http, &token("ann"), &convo, part).await);
    }
    assert!(held.len() >= 4);
    let of_bob = begin(&bob).await;
    let (status, draft) = upload(&bob, &of_bob, vec![self::part("b.txt", "text/plain", "hello")]).await;
    assert_eq!(status, 200, "{draft}");
    drop(held);
    while upload(&ann, &convo, Vec::new()).await.0 != 400 {
        is_in_time();
        tokio::time::sleep(std::time::Duration::from_millis(5)).await;
    }
    // What belongs to no part is not collected.
    for body in [vec![b'x'; 300_000], [b"--b\r\nx: ".to_vec(), vec![b'y'; 300_000]].concat()] {
        let mut endless = begin_upload(http, &token("bob"), &of_bob, &body).await;
        drop(endless.shutdown().await);
        let answer = answer(&mut endless).await;
        assert!(answer.starts_with("HTTP/1.1 400") && answer.contains("belong to no part"), "{answer}");
    }
    server.stop().await;
}

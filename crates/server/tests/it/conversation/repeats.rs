//! What a browser says again by itself, because a connection broke before it had its answer.

use std::{net::SocketAddr, time::Duration};

use serde_json::{Value, json};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
    time::{sleep, timeout},
};

use super::{ORIGIN, begin, claims, hs256, server, show, sign, user};
use crate::{conversation::SECRET, sandbox::Web};

const PATIENCE: Duration = Duration::from_secs(20);

/// One user's browser, or a client that is none.
struct Sender {
    http: SocketAddr,
    token: String,
    path: String,
    origin: Option<&'static str>,
}

impl Sender {
    fn new(http: SocketAddr, convo: &str) -> Self {
        let token = sign(&hs256(), &claims("ann", super::AGENT), SECRET);
        Self { http, token, path: format!("/api/v2/agent_convos/{convo}/stream_message"), origin: Some(ORIGIN) }
    }

    async fn connect(&self) -> TcpStream {
        TcpStream::connect(self.http).await.unwrap()
    }

    /// A connection that was used before, as those are on which a browser says something again.
    async fn reconnect(&self) -> TcpStream {
        let (mut connection, Self { token, path, .. }) = (self.connect().await, self);
        let list = path.split_once("agent_convos").map(|(base, _)| format!("{base}agent_convos?limit=1")).unwrap();
        let head = format!("GET {list} HTTP/1.1\r\nhost: localhost\r\nauthorization: Bearer {token}\r\n\r\n");
        connection.write_all(head.as_bytes()).await.unwrap();
        Self::body(&mut connection).await;
        connection
    }

    async fn put(&self, connection: &mut TcpStream, text: &str) {
        let Self { token, path, origin, .. } = self;
        let body = json!({"text": text}).to_string();
        let origin = origin.map(|origin| format!("origin: {origin}\r\n")).unwrap_or_default();
        let head = format!(
            "POST {path} HTTP/1.1\r\nhost: localhost\r\nauthorization: Bearer {token}\r\n{origin}content-type: \
             application/json\r\ncontent-length: {}\r\n\r\n",
            body.len()
        );
        connection.write_all((head + &body).as_bytes()).await.unwrap();
    }

    /// The body of an answer.
    async fn body(connection: &mut TcpStream) -> Value {
        let (mut read, mut piece) = (Vec::new(), [0; 4096]);
        loop {
            let count = timeout(PATIENCE, connection.read(&mut piece)).await.unwrap().unwrap();
            assert_ne!(count, 0, "{}", String::from_utf8_lossy(&read));
            read.extend_from_slice(&piece[..count]);
            let text = String::from_utf8_lossy(&read);
            if let Some((head, body)) = text.split_once("\r\n\r\n")
                && let Ok(body) = serde_json::from_str::<Value>(body)
            {
                assert!(head.starts_with("HTTP/1.1 200"), "{head} {body}");
                return body;
            }
        }
    }

    /// The id of the message.
    async fn answer(connection: &mut TcpStream) -> String {
        Self::body(connection).await["message_id"].as_str().unwrap().to_owned()
    }

    async fn say(&self, text: &str) -> String {
        let mut connection = self.connect().await;
        self.put(&mut connection, text).await;
        Self::answer(&mut connection).await
    }
}

/// What is in the conversation with that text.
async fn count(web: &Web, convo: &str, text: &str) -> usize {
    let shown = show(web, convo).await;
    shown["messages"].as_array().unwrap().iter().filter(|message| message["content"] == text).count()
}

async fn until_said(web: &Web, convo: &str, text: &str) {
    let said = async {
        while count(web, convo, text).await == 0 {
            sleep(Duration::from_millis(2)).await;
        }
    };
    timeout(PATIENCE, said).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_a_browser_says_again_over_another_connection_is_said_once() {
    let dir = tempfile::tempdir().unwrap();
    let server = server(dir.path()).await;
    let http = server.addresses().http;
    let ann = user(http, "ann");
    let convo = begin(&ann).await;
    let browser = Sender::new(http, &convo);
    // Its connection breaks at any time between the request and the answer, also of what it says again.
    for round in 0..20 {
        let text = format!("broken {round}");
        for _ in 0..2 {
            let mut connection = browser.reconnect().await;
            browser.put(&mut connection, &text).await;
            sleep(Duration::from_micros(round * 500)).await;
            drop(connection);
        }
        browser.say(&text).await;
        assert_eq!(count(&ann, &convo, &text).await, 1, "{text}");
    }
    // With an answer that was never read, and a reset.
    let mut connection = browser.reconnect().await;
    browser.put(&mut connection, "reset").await;
    until_said(&ann, &convo, "reset").await;
    connection.set_zero_linger().unwrap();
    drop(connection);
    let first = browser.say("reset").await;
    assert_eq!(show(&ann, &convo).await["messages"].as_array().unwrap().last().unwrap()["id"], *first);
    server.stop().await;
    // A server that was started again, while the browser waited for it.
    let server = self::server(dir.path()).await;
    let browser = Sender { http: server.addresses().http, ..browser };
    assert_eq!(browser.say("reset").await, first);
    assert_eq!(count(&user(browser.http, "ann"), &convo, "reset").await, 1);
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_says_the_same_twice_has_said_it_twice() {
    let dir = tempfile::tempdir().unwrap();
    let server = server(dir.path()).await;
    let http = server.addresses().http;
    let ann = user(http, "ann");
    let convo = begin(&ann).await;
    let browser = Sender::new(http, &convo);
    let twice = async |text: &str| assert_eq!(count(&ann, &convo, text).await, 2, "{text}");
    let mut connection = browser.connect().await;
    for _ in 0..2 {
        browser.put(&mut connection, "over one connection").await;
        Sender::answer(&mut connection).await;
    }
    twice("over one connection").await;
    let mut others = Vec::new();
    for _ in 0..2 {
        let mut connection = browser.connect().await;
        browser.put(&mut connection, "over two").await;
        Sender::answer(&mut connection).await;
        others.push(connection);
    }
    twice("over two").await;
    // A proxy that has a connection for each request, and ends it.
    for _ in 0..2 {
        browser.say("behind a proxy").await;
        sleep(Duration::from_millis(20)).await;
    }
    twice("behind a proxy").await;
    // It had its answer: it went on to something else.
    let mut connection = browser.connect().await;
    for text in ["before something else", "something else"] {
        browser.put(&mut connection, text).await;
        Sender::answer(&mut connection).await;
    }
    drop(connection);
    browser.say("before something else").await;
    twice("before something else").await;
    // No browser: it says nothing again by itself.
    let program = Sender { origin: None, ..browser };
    for _ in 0..2 {
        program.say("from a program").await;
    }
    twice("from a program").await;
    server.stop().await;
}

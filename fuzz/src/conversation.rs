//! Sends any queries, keys and bodies to the conversation surface of a server: it never panics, refuses in the documented
//! form, and a message that it accepted is what the conversation says last.
//!
//! An input is a route's number (1 byte), then lines: a query, an idempotency key, a `Last-Event-ID`; and a body.

#![no_main]
#![allow(clippy::panic, clippy::unwrap_used, clippy::expect_used, reason = "that is how a fuzzer is told")]

use std::{cell::RefCell, time::SystemTime};

use base64::{Engine as _, engine::general_purpose::URL_SAFE_NO_PAD};
use libfuzzer_sys::fuzz_target;
use reqwest::{
    Client, Method, Response, StatusCode,
    header::{HeaderName, HeaderValue},
};
use ring::hmac;
use serde_json::{Value, json};
use tokio::runtime::Runtime;
use trunkline::{Config, Server, config::Durability};
use trunkline_core::{conversation, limits::Limits};

const KEY: &str = "app_fuzz";
const SECRET: &str = "0123456789abcdef0123456789abcdef";
const AGENT: &str = "11111111-1111-4111-8111-111111111111";

/// Inputs for one server, and for one conversation, so that what they leave there does not add up.
const INPUTS_MAX: usize = 20_000;
const MESSAGES_MAX: usize = 50;

struct Bench {
    runtime: Runtime,
    server: Option<Server>,
    dir: tempfile::TempDir,
    base: String,
    token: String,
    client: Client,
    conversation: String,
    messages: usize,
    inputs: usize,
}

thread_local! {
    static BENCH: RefCell<Option<Bench>> = const { RefCell::new(None) };
}

fuzz_target!(|input: &[u8]| {
    let Some((route, input)) = input.split_first() else { return };
    BENCH.with_borrow_mut(|bench| {
        if bench.as_ref().is_some_and(|bench| bench.inputs >= INPUTS_MAX)
            && let Some(Bench { runtime, server, dir, .. }) = bench.take()
        {
            runtime.block_on(server.expect("a server").stop());
            drop(dir);
        }
        bench.get_or_insert_with(Bench::new).run(*route, input);
    });
});

impl Bench {
    fn new() -> Self {
        let (runtime, dir) = (Runtime::new().unwrap(), tempfile::tempdir().unwrap());
        let apps = json!([{"name": "fuzz", "key": KEY, "secret": SECRET, "origins": ["https://fuzz.example.org"],
            "agents": [{"id": AGENT, "identity": "ag::ws::impl::one", "name": "Ada"}]}]);
        let (messages_per_minute, sessions_per_minute) = (0, 0);
        let config = Config {
            data_dir: dir.path().to_owned(),
            dev: true,
            limits: Limits { messages_per_second: 0, ..Limits::default() },
            durability: Durability::Process,
            apps: serde_json::from_value(apps).unwrap(),
            conversation: conversation::Options { messages_per_minute, sessions_per_minute, ..Default::default() },
            ..Config::on_free_ports()
        };
        let server = runtime.block_on(Server::start(config)).unwrap();
        let base = format!("http://{}/api/v2", server.addresses().http);
        // The client wants one, even for plain HTTP; the server before this one may have installed it.
        let _ = rustls::crypto::ring::default_provider().install_default();
        let (client, conversation) = (Client::builder().no_proxy().build().unwrap(), String::new());
        let (token, server) = (token(), Some(server));
        Self { runtime, server, dir, base, token, client, conversation, messages: MESSAGES_MAX, inputs: 0 }
    }

    fn run(&mut self, route: u8, input: &[u8]) {
        self.inputs += 1;
        let runtime = self.runtime.handle().clone();
        runtime.block_on(async {
            if self.messages == MESSAGES_MAX {
                let begun = json(self.request(Method::POST, "sessions").send().await.unwrap()).await;
                begun["convo_id"].as_str().expect("an id").clone_into(&mut self.conversation);
                self.messages = 0;
            }
            self.exchange(route, input).await;
        });
    }

    async fn exchange(&mut self, route: u8, input: &[u8]) {
        let mut parts = input.splitn(4, |byte| *byte == b'\n');
        let mut line = || parts.next().unwrap_or_default();
        let (query, key, last_event, body) = (String::from_utf8_lossy(line()), line(), line(), line());
        let convo = &self.conversation;
        let (method, path) = match route % 6 {
            0 => (Method::POST, format!("agent_convos/{convo}/stream_message?{query}")),
            1 => (Method::GET, format!("agent_convos/{convo}?{query}")),
            2 => (Method::GET, format!("agent_convos?{query}")),
            3 => (Method::GET, format!("agent_convos/{convo}/events?{query}")),
            4 => (Method::POST, format!("agent_convos/{convo}/upload_file?{query}")),
            _ => (Method::GET, format!("agent_convos/{query}")),
        };
        let says = method == Method::POST && route.is_multiple_of(6);
        let mut request = self.request(method, &path).body(body.to_vec());
        for (name, value) in [("idempotency-key", key), ("last-event-id", last_event)] {
            if let (false, Ok(value)) = (value.is_empty(), HeaderValue::from_bytes(value)) {
                request = request.header(HeaderName::from_static(name), value);
            }
        }
        if route % 6 == 4 {
            request = request.header("content-type", "multipart/form-data; boundary=x");
        }
        let Ok(response) = request.send().await else { panic!("no answer to {path}") };
        let status = response.status();
        assert!(!status.is_server_error(), "{path}: {status}");
        if !status.is_success() {
            let refusal = json(response).await;
            let is_documented = refusal["error"]["code"].is_string() && refusal["error"]["message"].is_string();
            assert!(is_documented || status == StatusCode::TOO_MANY_REQUESTS, "{path}: {status}: {refusal}");
            return;
        }
        if route % 6 == 3 {
            return;
        }
        let answer = json(response).await;
        if says {
            self.messages += 1;
            self.check_said(body, &answer).await;
        }
    }

    /// What was accepted is there, once, as it was sent.
    async fn check_said(&self, body: &[u8], answer: &Value) {
        // A field that nobody reads may be what no text can be.
        let Ok(said) = serde_json::from_slice::<Value>(body) else { return };
        let path = format!("agent_convos/{}", self.conversation);
        let whole = json(self.request(Method::GET, &path).send().await.unwrap()).await;
        let messages = whole["messages"].as_array().expect("messages");
        let found: Vec<_> = messages.iter().filter(|message| message["id"] == answer["message_id"]).collect();
        assert_eq!(found.len(), 1, "{answer} in {whole}");
        assert_eq!(found[0]["content"], said["text"], "{answer} in {whole}");
    }

    fn request(&self, method: Method, path: &str) -> reqwest::RequestBuilder {
        self.client.request(method, format!("{}/{path}", self.base)).bearer_auth(&self.token)
    }
}

async fn json(response: Response) -> Value {
    let bytes = response.bytes().await.unwrap();
    serde_json::from_slice(&bytes).unwrap_or_else(|error| panic!("{error}: {}", String::from_utf8_lossy(&bytes)))
}

/// A token as an app's backend signs it.
fn token() -> String {
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap().as_secs();
    let claims = json!({"iss": KEY, "aud": "valet-sdk", "company_api_key": KEY, "agent_uuid": AGENT,
        "source_key": "ann", "iat": now, "exp": now + 24 * 3600 - 60});
    let part = |json: &Value| URL_SAFE_NO_PAD.encode(json.to_string());
    let signed = format!("{}.{}", part(&json!({"alg": "HS256", "typ": "JWT"})), part(&claims));
    let key = hmac::Key::new(hmac::HMAC_SHA256, SECRET.as_bytes());
    format!("{signed}.{}", URL_SAFE_NO_PAD.encode(hmac::sign(&key, signed.as_bytes())))
}

//! `sandbox run`: a local program as a sandbox.
//!
//! Prompts go to its standard input, a line each. What it prints is told as events: a line that is a JSON object with a
//! `type` as it is, any other as text. A turn begins with a prompt, and ends when the program says so (`turn_end`), or, if it
//! tells no events of its own, when it was silent for a while.

use std::{
    path::PathBuf,
    process::{ExitStatus, Stdio},
    time::Duration,
};

use eventsource_stream::Eventsource as _;
use futures_util::StreamExt as _;
use reqwest::{StatusCode, header};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};
use tokio::{
    io::{AsyncBufReadExt as _, AsyncWriteExt as _, BufReader},
    process::{Child, ChildStdin, ChildStdout, Command},
    signal::unix::{SignalKind, signal},
    sync::mpsc,
    time::{Instant, sleep, sleep_until, timeout},
};

use super::{Done, Fault, announce, block_on};

type Error = Box<dyn std::error::Error>;

/// Lines that come within this go in one request.
const GATHER: Duration = Duration::from_millis(20);

/// Bytes of one such request, below the server's limit of 1 MiB.
const GATHER_BYTES: usize = 256 * 1024;

/// Longest line of the program. An event of it has room in one request with those before it.
const LINE_BYTES_MAX: usize = 512 * 1024;

/// Text of one event: JSON may need six bytes for each of its own.
const TEXT_BYTES_MAX: usize = 64 * 1024;

/// First pause before the server is tried again, and the longest.
const PAUSE: Duration = Duration::from_millis(200);
const PAUSE_MAX: Duration = Duration::from_secs(10);

/// Silence that ends the turn of a program that tells no events of its own.
const SILENCE: Duration = Duration::from_secs(1);

/// How long the program may take to end when it is told to.
const TERM_PATIENCE: Duration = Duration::from_secs(5);

#[derive(clap::Subcommand)]
pub(crate) enum Sandbox {
    /// Runs a program as a sandbox: prompts go to its standard input, what it prints is seen by who watches.
    Run(Run),
}

#[derive(clap::Args)]
pub(crate) struct Run {
    /// The session; made if it is not there and the token allows it.
    id: String,
    /// The project that it is made in.
    #[arg(long, value_name = "NAME")]
    project: Option<String>,
    /// The server's address for browsers and sandboxes.
    #[arg(long, value_name = "URL", env = "TRUNKLINE_HTTP", default_value = "http://127.0.0.1:4800")]
    http: String,
    /// The sandbox's token; not needed for a server with --dev.
    #[arg(long, value_name = "TOKEN", env = "TRUNKLINE_TOKEN", hide_env_values = true)]
    token: Option<String>,
    /// A PEM file with the roots to trust, for an https:// address.
    #[arg(long, value_name = "FILE")]
    ca: Option<PathBuf>,
    /// After how long without a sign of life a connection to the server is taken for lost.
    #[arg(long, value_name = "SECONDS", default_value = "40", value_parser = clap::value_parser!(u64).range(1..))]
    silence: u64,
    /// The program and its arguments. Its environment has TRUNKLINE_SESSION.
    #[arg(last = true, required = true, value_name = "COMMAND")]
    command: Vec<String>,
}

pub(crate) fn run(sandbox: Sandbox) -> Done {
    let Sandbox::Run(args) = sandbox;
    block_on(async { Box::pin(sandbox_run(args)).await })
}

async fn sandbox_run(args: Run) -> Done {
    let server = Server::new(&args)?;
    server.make(args.project.as_deref()).await?;
    let (told, tells) = mpsc::channel(256);
    let (ordered, orders) = mpsc::channel(16);
    let child = spawn(&args)?;
    announce(format_args!("session {} at {}", args.id, args.http));
    let mut telling = std::pin::pin!(tell(server.clone(), tells));
    let status = tokio::select! {
        status = converse(child, orders, told) => status?,
        told = &mut telling => return Err(told.err().unwrap_or_default().into()),
        why = listen(server.clone(), ordered) => return Err(why),
    };
    // It is told the rest, unless it is away: then nobody waits for it.
    timeout(TERM_PATIENCE, telling).await.map_err(|_| "the server does not hear what was said last")??;
    if status.success() { Ok(()) } else { Err(format!("the program ended: {status}").into()) }
}

/// Between the program and the server, until the program ends.
async fn converse(
    mut child: Child,
    mut orders: mpsc::Receiver<Value>,
    told: mpsc::Sender<Value>,
) -> std::io::Result<ExitStatus> {
    let (Some(mut stdin), Some(stdout)) = (child.stdin.take(), child.stdout.take()) else {
        return Err(std::io::Error::other("the program has no input or output"));
    };
    let (mut interrupt, mut terminate) = (signal(SignalKind::interrupt())?, signal(SignalKind::terminate())?);
    let mut turn = Turn::default();
    let mut lines = Lines { output: BufReader::new(stdout), line: Vec::new(), is_cut: false };
    let status = loop {
        tokio::select! {
            line = lines.next() => match line {
                Some(line) => turn.hears(&line, &told).await,
                // It said its last word.
                None => break end_of(&mut child).await?,
            },
            Some(order) = orders.recv() => turn.obeys(order, &mut stdin, &child, &told).await?,
            () = turn.is_silent() => turn.ends(&told).await,
            _ = interrupt.recv() => break ended(&mut child).await?,
            _ = terminate.recv() => break ended(&mut child).await?,
        }
    };
    turn.ends(&told).await;
    // Who tells ends only behind this.
    let _ = told.send(json!({"type": "status", "text": format!("the program ended: {status}")})).await;
    Ok(status)
}

/// What the program prints, by lines.
struct Lines {
    output: BufReader<ChildStdout>,
    /// What there is of the next one.
    line: Vec<u8>,
    /// The rest of it is left out.
    is_cut: bool,
}

impl Lines {
    /// The next line, without its end. Cancel-safe.
    async fn next(&mut self) -> Option<String> {
        loop {
            let read = self.output.fill_buf().await.unwrap_or_default();
            let end = read.iter().position(|byte| *byte == b'\n');
            let of_line = &read[..end.unwrap_or(read.len())];
            let kept = &of_line[..of_line.len().min(LINE_BYTES_MAX - self.line.len())];
            self.line.extend_from_slice(kept);
            self.is_cut |= kept.len() < of_line.len();
            let (used, is_over) = (of_line.len() + usize::from(end.is_some()), read.is_empty());
            self.output.consume(used);
            if end.is_some() || is_over && !self.line.is_empty() {
                let mut line = String::from_utf8_lossy(&std::mem::take(&mut self.line)).into_owned();
                if std::mem::take(&mut self.is_cut) {
                    line.push_str(" [the rest of this line was left out]");
                }
                return Some(line);
            }
            if is_over {
                return None;
            }
        }
    }
}

fn spawn(args: &Run) -> Result<Child, Error> {
    let mut command = Command::new(&args.command[0]);
    command.args(&args.command[1..]).stdin(Stdio::piped()).stdout(Stdio::piped()).kill_on_drop(true);
    // The sandbox's token is not the program's.
    command.env("TRUNKLINE_SESSION", &args.id).env_remove("TRUNKLINE_TOKEN");
    Ok(command.spawn().map_err(|e| format!("cannot start {:?}: {e}", args.command.join(" ")))?)
}

async fn end_of(child: &mut Child) -> std::io::Result<ExitStatus> {
    match timeout(TERM_PATIENCE, child.wait()).await {
        Ok(status) => status,
        Err(_) => ended(child).await,
    }
}

async fn ended(child: &mut Child) -> std::io::Result<ExitStatus> {
    send(child, Signal::TERM);
    if let Ok(status) = timeout(TERM_PATIENCE, child.wait()).await {
        return status;
    }
    child.kill().await?;
    child.wait().await
}

fn send(child: &Child, signal: Signal) {
    if let Some(pid) = child.id().and_then(|id| Pid::from_raw(id as i32)) {
        // It may have ended by itself.
        let _ = kill_process(pid, signal);
    }
}

/// Where the program is.
#[derive(Default)]
struct Turn {
    is_running: bool,
    /// It tells its own turns.
    tells_turns: bool,
    silent_at: Option<Instant>,
}

impl Turn {
    async fn hears(&mut self, line: &str, told: &mpsc::Sender<Value>) {
        // What was no text became longer as text.
        let event = Some(line)
            .filter(|line| line.len() <= LINE_BYTES_MAX)
            .and_then(|line| serde_json::from_str::<Value>(line).ok());
        let event = event.filter(|event| event.get("type").is_some_and(Value::is_string));
        self.silent_at = Some(Instant::now() + SILENCE);
        let Some(event) = event else {
            let (line, mut rest) = (format!("{line}\n"), 0);
            while rest < line.len() {
                let end = line.floor_char_boundary(rest + TEXT_BYTES_MAX);
                let _ = told.send(json!({"type": "text_delta", "delta": line[rest..end]})).await;
                rest = end;
            }
            return;
        };
        match event["type"].as_str() {
            Some("turn_start") => (self.is_running, self.tells_turns) = (true, true),
            Some("turn_end") => (self.is_running, self.tells_turns) = (false, true),
            _ => {}
        }
        // Who tells ends only with this program.
        let _ = told.send(event).await;
    }

    async fn obeys(
        &mut self,
        order: Value,
        stdin: &mut ChildStdin,
        child: &Child,
        told: &mpsc::Sender<Value>,
    ) -> std::io::Result<()> {
        if order["type"] == "abort" {
            send(child, Signal::INT);
            return Ok(());
        }
        let text = order["text"].as_str().unwrap_or_default();
        self.ends(told).await;
        let _ = told.send(json!({"type": "user_prompt", "text": text})).await;
        if !self.tells_turns {
            let _ = told.send(json!({"type": "turn_start"})).await;
            self.is_running = true;
        }
        stdin.write_all(format!("{text}\n").as_bytes()).await?;
        stdin.flush().await?;
        Ok(())
    }

    /// Ends what the program does not end itself.
    async fn ends(&mut self, told: &mpsc::Sender<Value>) {
        self.silent_at = None;
        if std::mem::take(&mut self.is_running) {
            let _ = told.send(json!({"type": "turn_end"})).await;
        }
    }

    async fn is_silent(&self) {
        match self.silent_at {
            Some(at) if self.is_running && !self.tells_turns => sleep_until(at).await,
            _ => std::future::pending().await,
        }
    }
}

/// The session on the server.
#[derive(Clone)]
struct Server {
    session: String,
    token: Option<String>,
    client: reqwest::Client,
}

impl Server {
    fn new(args: &Run) -> Result<Self, Error> {
        // The one cryptography that everything here uses; it may be set already.
        let _ = rustls::crypto::ring::default_provider().install_default();
        // A connection that died without a word is noticed by its silence: streams say something every 15 s.
        let silence = Duration::from_secs(args.silence);
        let mut builder = reqwest::Client::builder().read_timeout(silence).connect_timeout(silence);
        if let Some(ca) = &args.ca {
            let pem = std::fs::read(ca).map_err(|e| format!("{}: {e}", ca.display()))?;
            builder = builder.tls_certs_merge(reqwest::Certificate::from_pem_bundle(&pem)?);
        }
        let session = format!("{}/sessions/{}", args.http.trim_end_matches('/'), args.id);
        Ok(Self { session, token: args.token.clone(), client: builder.build()? })
    }

    fn request(&self, method: reqwest::Method, path: &str) -> reqwest::RequestBuilder {
        let request = self.client.request(method, format!("{}{path}", self.session));
        match &self.token {
            Some(token) => request.bearer_auth(token),
            None => request,
        }
    }

    /// Makes the session; a token that may only be a sandbox finds it made.
    async fn make(&self, project: Option<&str>) -> Done {
        let body = json!({ "project": project }).to_string();
        let made = self.request(reqwest::Method::POST, "").body(body).send().await;
        let made =
            made.map_err(|e| format!("cannot connect to {}: {}; is a server running there?", self.session, cause(&e)))?;
        if made.status().is_success() || matches!(made.status(), StatusCode::FORBIDDEN | StatusCode::NOT_FOUND) {
            return Ok(());
        }
        Err(refusal(made).await)
    }
}

fn cause(error: &dyn std::error::Error) -> String {
    let mut cause = error;
    while let Some(deeper) = cause.source() {
        cause = deeper;
    }
    cause.to_string()
}

async fn refusal(response: reqwest::Response) -> Error {
    let status = response.status();
    let body: Value = response.json().await.unwrap_or_default();
    format!("{status}: {}", body["error"]["message"].as_str().unwrap_or_default()).into()
}

/// Tells the server, in order, and again until it is heard.
async fn tell(server: Server, mut tells: mpsc::Receiver<Value>) -> Result<(), String> {
    while let Some(first) = tells.recv().await {
        let (mut size, mut events) = (first.to_string().len(), vec![first]);
        let until = Instant::now() + GATHER;
        while size < GATHER_BYTES
            && let Ok(Some(event)) = tokio::time::timeout_at(until, tells.recv()).await
        {
            size += event.to_string().len();
            events.push(event);
        }
        let (body, key) = (Value::from(events).to_string(), uuid::Uuid::new_v4().to_string());
        let mut pause = PAUSE;
        loop {
            let request = server.request(reqwest::Method::POST, "/events").header("idempotency-key", &key);
            let why = match request.body(body.clone()).send().await {
                Ok(told) if told.status().is_success() => break,
                Ok(told) if told.status().is_client_error() && told.status() != StatusCode::TOO_MANY_REQUESTS => {
                    return Err(refusal(told).await.to_string());
                }
                Ok(told) => told.status().to_string(),
                Err(error) => cause(&error),
            };
            tracing::warn!("{why}; trying again in {pause:?}");
            sleep(pause).await;
            pause = (pause * 2).min(PAUSE_MAX);
        }
    }
    Ok(())
}

/// Hears what the server orders, and comes back when the stream ends. Ends when there is no session any more, or another program took
/// over.
async fn listen(server: Server, ordered: mpsc::Sender<Value>) -> Error {
    let (mut last, mut pause) = (None::<String>, PAUSE);
    loop {
        let mut request = server.request(reqwest::Method::GET, "/commands").header(header::ACCEPT, "text/event-stream");
        if let Some(last) = &last {
            request = request.header("last-event-id", last);
        }
        match request.send().await {
            Ok(response) if response.status().is_success() => {
                pause = PAUSE;
                // What comes before the first command it hears comes again.
                let begins = response.headers().get("last-event-id").and_then(|id| id.to_str().ok());
                last = last.or(begins.map(ToOwned::to_owned));
                let mut events = response.bytes_stream().eventsource();
                while let Some(Ok(event)) = events.next().await {
                    if event.event == "replaced" {
                        return Fault::Replaced.into();
                    }
                    if let Ok(order) = serde_json::from_str(&event.data)
                        && ordered.send(order).await.is_err()
                    {
                        return "the program takes no more".into();
                    }
                    last = Some(event.id);
                }
            }
            Ok(response) if response.status().is_client_error() => {
                return format!("the session is gone, or this may not be its sandbox: {}", refusal(response).await)
                    .into();
            }
            Ok(response) => tracing::warn!("{}; trying again in {pause:?}", response.status()),
            Err(error) => tracing::warn!("{}; trying again in {pause:?}", cause(&error)),
        }
        sleep(pause).await;
        pause = (pause * 2).min(PAUSE_MAX);
    }
}

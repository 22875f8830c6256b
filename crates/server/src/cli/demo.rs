//! `demo`: a server, an agent and a sandbox as processes of their own, and a page that shows them together.

pub(crate) mod agent;
mod work;

use std::{
    net::SocketAddr,
    path::PathBuf,
    process::Stdio,
    sync::Arc,
    time::{Duration, Instant},
};

use axum::{
    Json, Router,
    extract::{Query, State},
    http::{HeaderMap, StatusCode, header},
    response::{Html, IntoResponse as _, Response},
    routing::{get, post},
};
use serde::{Deserialize, Serialize};
use serde_json::json;
use tokio::{
    io::{AsyncBufReadExt as _, BufReader},
    net::TcpListener,
    process::{Child, Command},
    signal::unix::{SignalKind, signal},
    sync::Mutex,
    time::sleep,
};
use trunkline::demo::sign;

use super::{Done, announce, block_on};

/// Who is who in the demo.
const WORKSPACE: &str = "demo";
const SPECIFIER: &str = "one";
const AGENT: &str = "ag::demo::assistant::one";
const AGENT_ID: &str = "00000000-0000-4000-8000-000000000001";
const APP_KEY: &str = "app_demo";
const SESSION: &str = "demo";

/// How long the agent stays away when it was killed, so that one sees it.
const AWAY: Duration = Duration::from_secs(2);

/// How long a page's token is good, in seconds.
const TOKEN_SECONDS: u32 = 900;

const PAGE: &str = include_str!("demo/page.html");
const SCRIPT: &str = include_str!("demo/page.js");

#[derive(clap::Args)]
#[command(args_conflicts_with_subcommands = true)]
pub(crate) struct Demo {
    #[command(subcommand)]
    part: Option<Part>,
    /// Address of the page; port 0 picks a free one.
    #[arg(long, value_name = "ADDR", default_value = "127.0.0.1:4810")]
    listen: SocketAddr,
    /// Where everything is kept, to go on another time [default: a directory that goes with the demo].
    #[arg(long, value_name = "DIR")]
    data_dir: Option<PathBuf>,
    /// Agent and sandbox do everything at once.
    #[arg(long)]
    fast: bool,
}

#[derive(clap::Subcommand)]
enum Part {
    /// The agent of the demo.
    #[command(hide = true)]
    Agent(agent::Agent),
    /// What the sandbox of the demo runs.
    #[command(hide = true)]
    Work {
        /// It does everything at once.
        #[arg(long)]
        fast: bool,
    },
}

pub(crate) fn run(demo: Demo) -> Done {
    match demo.part {
        Some(Part::Agent(agent)) => agent::run(&agent),
        Some(Part::Work { fast }) => work::run(fast),
        None => block_on(async { Box::pin(show(demo)).await }),
    }
}

/// The processes, and what they are told.
struct Stage {
    dir: PathBuf,
    page: SocketAddr,
    secret: String,
    is_fast: bool,
    cast: Mutex<Cast>,
}

/// Who is there. The server keeps its addresses over its restarts.
struct Cast {
    server: Child,
    grpc: SocketAddr,
    http: SocketAddr,
    agent: Option<Child>,
    sandbox: Option<Child>,
    /// When the agent comes again.
    agent_due: Option<Instant>,
    is_over: bool,
}

async fn show(demo: Demo) -> Done {
    let own = tempfile::tempdir()?;
    let dir = demo.data_dir.clone().unwrap_or_else(|| own.path().to_owned());
    let listener =
        TcpListener::bind(demo.listen).await.map_err(|e| format!("cannot listen on {}: {e}", demo.listen))?;
    let page = listener.local_addr()?;
    let secret = format!("{}{}", uuid::Uuid::new_v4().simple(), uuid::Uuid::new_v4().simple());
    let free: SocketAddr = ([127, 0, 0, 1], 0).into();
    let (server, grpc, http) = serve(&dir, page, &secret, free, free).await?;
    let cast = Cast { server, grpc, http, agent: None, sandbox: None, agent_due: Some(Instant::now()), is_over: false };
    let stage = Arc::new(Stage { dir, page, secret, is_fast: demo.fast, cast: Mutex::new(cast) });
    announce(format_args!("ready page=http://localhost:{}", page.port()));
    announce("Open it in a browser. Ctrl-C ends the demo.");
    let (mut interrupt, mut terminate) = (signal(SignalKind::interrupt())?, signal(SignalKind::terminate())?);
    let router = Router::new()
        .route("/", get(index))
        .route("/page.js", get(script))
        .route("/config", get(config))
        .route("/token", get(token))
        .route("/status", get(status))
        .route("/kill-agent", post(kill_agent))
        .route("/restart-server", post(restart_server))
        .with_state(stage.clone());
    tokio::select! {
        served = axum::serve(listener, router).into_future() => served?,
        () = keep(stage.clone()) => {}
        _ = interrupt.recv() => {}
        _ = terminate.recv() => {}
    }
    let mut cast = stage.cast.lock().await;
    cast.is_over = true;
    for child in [cast.agent.take(), cast.sandbox.take()].into_iter().flatten() {
        drop(child);
    }
    cast.server.kill().await?;
    Ok(())
}

fn this() -> Result<Command, std::io::Error> {
    let mut command = Command::new(std::env::current_exe()?);
    command.kill_on_drop(true).stdin(Stdio::null()).stdout(Stdio::null());
    command.env("TRUNKLINE_LOG", std::env::var("TRUNKLINE_LOG").unwrap_or_else(|_| "error".to_owned()));
    Ok(command)
}

/// Starts the server and waits until it listens.
async fn serve(
    dir: &std::path::Path,
    page: SocketAddr,
    secret: &str,
    grpc: SocketAddr,
    http: SocketAddr,
) -> Result<(Child, SocketAddr, SocketAddr), Box<dyn std::error::Error>> {
    let origins = [format!("http://localhost:{}", page.port()), format!("http://{page}")];
    let greeting = "Hello! Ask me anything, for example: “build me a small page about rivers”.";
    let agent = format!(r#"{{ id = "{AGENT_ID}", identity = "{AGENT}", name = "Ada", greeting = "{greeting}" }}"#);
    let app = format!(
        r#"[{{ name = "demo", key = "{APP_KEY}", secret = "{secret}", origins = {origins:?}, agents = [{agent}] }}]"#
    );
    let mut command = this()?;
    command.args(["serve", "--dev", "--ops", "127.0.0.1:0"]);
    command.args(["--grpc", &grpc.to_string(), "--http", &http.to_string(), "--data-dir"]).arg(dir);
    command.env("TRUNKLINE__APPS", app).env("TRUNKLINE__HTTP__ALLOWED_ORIGINS", format!("{origins:?}"));
    command.env("TRUNKLINE__CONVERSATION__MESSAGES_PER_MINUTE", "0").stdout(Stdio::piped());
    let mut child = command.spawn()?;
    let out = child.stdout.take().ok_or("the server says nothing")?;
    let mut lines = BufReader::new(out).lines();
    while let Some(line) = lines.next_line().await? {
        let word = |name: &str| line.split_whitespace().find_map(|word| word.strip_prefix(name)?.parse().ok());
        if let (Some(grpc), Some(http)) = (word("grpc="), word("http=")) {
            return Ok((child, grpc, http));
        }
    }
    Err("the server did not start".into())
}

/// Starts whoever is not there.
async fn keep(stage: Arc<Stage>) {
    loop {
        {
            let mut cast = stage.cast.lock().await;
            if cast.is_over {
                return;
            }
            if let Err(error) = start_server(&stage, &mut cast).await {
                tracing::error!("{error}; trying again");
            }
            if let Err(error) = start_missing(&stage, &mut cast) {
                tracing::error!("{error}");
            }
        }
        sleep(Duration::from_millis(50)).await;
    }
}

/// Starts the server where it was, if it is gone.
async fn start_server(stage: &Stage, cast: &mut Cast) -> Result<(), Box<dyn std::error::Error>> {
    if !matches!(cast.server.try_wait(), Ok(None)) {
        (cast.server, ..) = serve(&stage.dir, stage.page, &stage.secret, cast.grpc, cast.http).await?;
    }
    Ok(())
}

fn start_missing(stage: &Stage, cast: &mut Cast) -> Result<(), std::io::Error> {
    let is_gone = |child: &mut Option<Child>| child.as_mut().is_none_or(|child| !matches!(child.try_wait(), Ok(None)));
    let http = format!("http://{}", cast.http);
    let fast = stage.is_fast.then_some("--fast");
    if is_gone(&mut cast.agent) {
        let due = *cast.agent_due.get_or_insert_with(|| Instant::now() + AWAY);
        if Instant::now() >= due {
            let mut command = this()?;
            command.args(["demo", "agent", "--http", &http, "--server", &format!("http://{}", cast.grpc)]).args(fast);
            (cast.agent, cast.agent_due) = (Some(command.spawn()?), None);
        }
    }
    if is_gone(&mut cast.sandbox) {
        let mut command = this()?;
        command.args(["sandbox", "run", SESSION, "--http", &http, "--"]);
        command.arg(std::env::current_exe()?).args(["demo", "work"]).args(fast);
        cast.sandbox = Some(command.spawn()?);
    }
    Ok(())
}

async fn index() -> Html<&'static str> {
    Html(PAGE)
}

async fn script() -> Response {
    ([(header::CONTENT_TYPE, "text/javascript")], SCRIPT).into_response()
}

async fn config(State(stage): State<Arc<Stage>>) -> Response {
    let http = stage.cast.lock().await.http;
    Json(json!({"server": format!("http://{http}"), "agentId": AGENT_ID, "session": SESSION})).into_response()
}

#[derive(Deserialize)]
struct Asks {
    user: Option<String>,
    seconds: Option<u32>,
}

/// What an app's backend does for whoever is logged in there.
async fn token(State(stage): State<Arc<Stage>>, Query(asks): Query<Asks>) -> Response {
    let user = asks.user.unwrap_or_else(|| "visitor".to_owned());
    match sign(APP_KEY, &stage.secret, AGENT_ID, &user, asks.seconds.unwrap_or(TOKEN_SECONDS)) {
        Ok(token) => token.into_response(),
        Err(error) => (StatusCode::BAD_REQUEST, error.to_string()).into_response(),
    }
}

#[derive(Serialize)]
struct Standing {
    agent: bool,
    server: bool,
    sandbox: bool,
}

async fn status(State(stage): State<Arc<Stage>>) -> Json<Standing> {
    let mut cast = stage.cast.lock().await;
    let is_there = |child: &mut Child| matches!(child.try_wait(), Ok(None));
    Json(Standing {
        server: is_there(&mut cast.server),
        agent: cast.agent.as_mut().is_some_and(is_there),
        sandbox: cast.sandbox.as_mut().is_some_and(is_there),
    })
}

/// Other pages may send requests here, though they cannot read the answers.
fn is_from_the_page(stage: &Stage, headers: &HeaderMap) -> bool {
    let origin = headers.get(header::ORIGIN).and_then(|origin| origin.to_str().ok()).unwrap_or_default();
    [format!("http://localhost:{}", stage.page.port()), format!("http://{}", stage.page)]
        .iter()
        .any(|own| own == origin)
}

async fn kill_agent(State(stage): State<Arc<Stage>>, headers: HeaderMap) -> StatusCode {
    if !is_from_the_page(&stage, &headers) {
        return StatusCode::FORBIDDEN;
    }
    let mut cast = stage.cast.lock().await;
    cast.agent_due = Some(Instant::now() + AWAY);
    let Some(mut agent) = cast.agent.take() else { return StatusCode::CONFLICT };
    // SIGKILL: it cannot say goodbye.
    if agent.kill().await.is_ok() { StatusCode::NO_CONTENT } else { StatusCode::INTERNAL_SERVER_ERROR }
}

async fn restart_server(State(stage): State<Arc<Stage>>, headers: HeaderMap) -> Response {
    if !is_from_the_page(&stage, &headers) {
        return StatusCode::FORBIDDEN.into_response();
    }
    let begun = Instant::now();
    {
        let mut cast = stage.cast.lock().await;
        if let Err(error) = cast.server.kill().await {
            return (StatusCode::INTERNAL_SERVER_ERROR, error.to_string()).into_response();
        }
    }
    // It is started again by whoever keeps everybody there, also if nobody waits for it here.
    while !matches!(stage.cast.lock().await.server.try_wait(), Ok(None)) {
        sleep(Duration::from_millis(20)).await;
    }
    Json(json!({"ms": begun.elapsed().as_millis() as u64})).into_response()
}

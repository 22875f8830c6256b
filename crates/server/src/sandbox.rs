//! The sandbox surface: `/sessions` and what is under it. See docs/protocol/sandbox.md.

use std::{collections::VecDeque, convert::Infallible, sync::Arc};

use axum::{
    Json, Router,
    body::Body,
    extract::State,
    http::{StatusCode, header},
    response::{IntoResponse as _, Response},
    routing::{MethodRouter, get, post},
};
use bytes::{BufMut as _, Bytes, BytesMut};
use futures_util::{
    future::BoxFuture,
    stream::{self, Stream},
};
use serde::Serialize;
use tokio::time::{Instant, Interval, MissedTickBehavior, interval_at};
use trunkline_core::{
    Error, Kind,
    caller::Caller,
    json,
    sandbox::{
        Duty, Events, Need, News, Order, Roll, Sandbox, Sandboxes, Seat, Sight, Watch,
        artifacts::{Artifact, Change, How, Pieces, Update},
        state::Status,
    },
};
use uuid::Uuid;

use crate::{
    error::Refusal,
    http::{self, Asked, Ending, LAST_EVENT_ID, PathId, Web},
    repeats::Post,
    sse::{self, Held},
};

/// Bytes of a command, and of what a new session is made from.
const COMMAND_BYTES_MAX: usize = 256 * 1024;

/// Steps that are shown together, in bytes: larger ones are shared by all viewers and not copied.
const TOGETHER_BYTES: usize = 16 * 1024;

/// Most events take no more, besides their text.
const EVENT_BYTES: usize = 256;

struct Surface {
    sandboxes: Sandboxes,
    web: Web,
}

pub(crate) fn router(sandboxes: Sandboxes, web: Web) -> Router {
    let streams = |get: MethodRouter<Arc<Surface>>, allow| get.head(move || async move { http::no_head(allow) });
    Router::new()
        .route("/sessions", get(list))
        .route("/sessions/stream", streams(get(roll), "GET").post(reserved).delete(reserved))
        .route("/sessions/{id}", get(show).post(create).delete(remove))
        .route("/sessions/{id}/commands", streams(get(attend), "GET, POST").post(command))
        .route("/sessions/{id}/events", post(tell))
        .route("/sessions/{id}/artifacts", get(artifacts))
        .route("/sessions/{id}/stream", streams(get(watch), "GET"))
        .with_state(Arc::new(Surface { sandboxes, web }))
}

type Answer<T> = Result<T, Refusal>;

async fn list(State(surface): State<Arc<Surface>>, asked: Asked) -> Answer<Json<Vec<Sandbox>>> {
    let caller = asked.caller(&surface.web).await?;
    Ok(Json(surface.sandboxes.list(&caller, asked.param("project")).await?))
}

async fn show(State(surface): State<Arc<Surface>>, PathId(id): PathId, asked: Asked) -> Answer<Json<Sandbox>> {
    let caller = asked.caller(&surface.web).await?;
    let seat = surface.sandboxes.find(&caller, &id, Need::Read).await?;
    Ok(Json(seat.sandbox().clone()))
}

async fn create(
    State(surface): State<Arc<Surface>>,
    PathId(id): PathId,
    asked: Asked,
    body: Body,
) -> Answer<(StatusCode, Json<Sandbox>)> {
    let (caller, body) = http::body_of(asked.caller(&surface.web).await, body, COMMAND_BYTES_MAX).await?;
    let project = match asked.param("project") {
        Some(project) => Some(project.to_owned()),
        None => project_of(&body)?,
    };
    let (sandbox, is_new) = surface.sandboxes.create(&caller, &id, project.as_deref()).await?;
    Ok((if is_new { StatusCode::CREATED } else { StatusCode::OK }, Json(sandbox)))
}

/// `stream` is a path here, and therefore no id.
async fn reserved() -> Refusal {
    Refusal(invalid("\"stream\" is no id of a session".to_owned()))
}

fn project_of(body: &[u8]) -> Result<Option<String>, Error> {
    #[derive(Default, serde::Deserialize)]
    struct Wanted {
        #[serde(default)]
        project: Option<String>,
    }
    if body.trim_ascii().is_empty() {
        return Ok(None);
    }
    let wanted: Wanted = json::object(body).map_err(|e| invalid(format!("the body cannot be read: {e}")))?;
    Ok(wanted.project)
}

async fn remove(State(surface): State<Arc<Surface>>, PathId(id): PathId, asked: Asked) -> Answer<StatusCode> {
    let caller = asked.caller(&surface.web).await?;
    let seat = surface.sandboxes.find(&caller, &id, Need::Write).await?;
    surface.sandboxes.remove(&seat).await?;
    Ok(StatusCode::NO_CONTENT)
}

/// The session that a request is for, if its caller may have it.
async fn found(surface: &Surface, asked: &Asked, id: &str, need: Need) -> Result<Seat, Error> {
    let caller = asked.caller(&surface.web).await?;
    surface.sandboxes.find(&caller, id, need).await
}

async fn command(
    State(surface): State<Arc<Surface>>,
    PathId(id): PathId,
    asked: Asked,
    body: Body,
) -> Answer<StatusCode> {
    let (seat, body) = http::body_of(found(&surface, &asked, &id, Need::Write).await, body, COMMAND_BYTES_MAX).await?;
    let key = asked.idempotency_key()?.to_owned();
    let caller = asked.header(&header::AUTHORIZATION).unwrap_or_default();
    let post = Post::new(&format!("{id} {}", seat.began()), caller, &body);
    let order = Order::parse(body)?;
    let sandboxes = surface.sandboxes.clone();
    let work = async move { sandboxes.command(&seat, order, &key).await.map(|()| Uuid::nil()) };
    surface.web.repeats.once(post, asked.exchange(), work).await?;
    Ok(StatusCode::ACCEPTED)
}

async fn tell(State(surface): State<Arc<Surface>>, PathId(id): PathId, asked: Asked, body: Body) -> Answer<StatusCode> {
    let most = surface.web.limits.payload_bytes_max;
    let (seat, body) = http::body_of(found(&surface, &asked, &id, Need::Act).await, body, most).await?;
    let (key, events) = (asked.idempotency_key()?, Events::parse(body)?);
    let count = events.count();
    surface.sandboxes.tell(&seat, events, key).await?;
    surface.web.metrics.sandbox_events.inc_by(count);
    Ok(StatusCode::ACCEPTED)
}

async fn artifacts(State(surface): State<Arc<Surface>>, PathId(id): PathId, asked: Asked) -> Answer<Response> {
    let caller = asked.caller(&surface.web).await?;
    let seat = surface.sandboxes.find(&caller, &id, Need::Read).await?;
    let all =
        List { rest: surface.sandboxes.artifacts(&seat).await?.into(), pieces: None, has_begun: false, is_over: false };
    let body = Body::from_stream(stream::StreamExt::fuse(stream::unfold(all, List::next)));
    Ok(([(header::CONTENT_TYPE, "application/json")], body).into_response())
}

/// Artifacts as one JSON array, made as the transport takes it.
struct List {
    rest: VecDeque<Arc<Artifact>>,
    pieces: Option<Pieces>,
    has_begun: bool,
    is_over: bool,
}

impl List {
    async fn next(mut self) -> Option<(Result<Bytes, Infallible>, Self)> {
        if self.is_over {
            return None;
        }
        let mut out = BytesMut::new();
        while out.len() < sse::CHUNK_BYTES && !self.is_over {
            if let Some(pieces) = &mut self.pieces {
                if !pieces.write(&mut out, sse::CHUNK_BYTES) {
                    self.pieces = None;
                }
                continue;
            }
            let next = self.rest.pop_front();
            out.put_slice(match (std::mem::replace(&mut self.has_begun, true), &next) {
                (false, Some(_)) => b"[",
                (false, None) => b"[]",
                (true, Some(_)) => b",",
                (true, None) => b"]",
            });
            self.is_over = next.is_none();
            self.pieces = next.map(Pieces::new);
        }
        Some((Ok(out.freeze()), self))
    }
}

async fn watch(State(surface): State<Arc<Surface>>, PathId(id): PathId, asked: Asked) -> Answer<Response> {
    let caller = asked.viewer(&surface.web).await?;
    let seat = surface.sandboxes.find(&caller, &id, Need::Read).await?;
    let held = surface.web.streams.open(&caller, "artifacts")?;
    let (last_seen, is_others) = last_seen(asked.last_event(), seat.began());
    let watch = surface.sandboxes.watch(&seat, last_seen).await?;
    let open = Open::new(&surface.web, caller, held);
    let (history, steps, began) = (VecDeque::new(), VecDeque::new(), seat.began());
    let viewer = Viewer { id, began, is_others, watch, history, pieces: None, steps, open };
    // The state is kept once, and not in each future again.
    Ok(sse::response(stream::unfold(viewer, |mut viewer| async move {
        let some = viewer.next().await?;
        Some((some, viewer))
    })))
}

async fn roll(State(surface): State<Arc<Surface>>, asked: Asked) -> Answer<Response> {
    let caller = asked.viewer(&surface.web).await?;
    let held = surface.web.streams.open(&caller, "sessions")?;
    let roll = surface.sandboxes.roll(&caller, asked.param("project")).await?;
    let viewer = ListViewer { roll, pending: VecDeque::new(), open: Open::new(&surface.web, caller, held) };
    Ok(sse::response(stream::unfold(viewer, |mut viewer| async move {
        let some = viewer.next().await?;
        Some((some, viewer))
    })))
}

async fn attend(State(surface): State<Arc<Surface>>, PathId(id): PathId, asked: Asked) -> Answer<Response> {
    // It takes the stream over from whoever has it.
    asked.check_own_site()?;
    let caller = asked.viewer(&surface.web).await?;
    let seat = surface.sandboxes.find(&caller, &id, Need::Act).await?;
    let held = surface.web.streams.open(&caller, "commands")?;
    let duty = surface.sandboxes.attend(&seat, asked.last_event_id()).await?;
    let begins = [(LAST_EVENT_ID, duty.begins().to_string())];
    Ok((begins, sse::response(commands(duty, Open::new(&surface.web, caller, held)))).into_response())
}

/// What keeps a stream open, and what ends it.
struct Open {
    pings: Interval,
    /// The server stops, or the token ended. One for the whole stream, so that not every event waits anew.
    ending: BoxFuture<'static, Ending>,
    /// Its client was told why it ends.
    is_over: bool,
    /// Nothing was sent yet.
    is_new: bool,
    _held: Held,
}

/// What a stream does when there is nothing else to do.
enum Otherwise {
    Ping,
    End(Ending),
}

impl Open {
    fn new(web: &Web, caller: Arc<Caller>, held: Held) -> Self {
        let mut pings = interval_at(Instant::now() + sse::PING_PAUSE, sse::PING_PAUSE);
        pings.set_missed_tick_behavior(MissedTickBehavior::Delay);
        Self { pings, ending: Box::pin(http::ending(web, caller)), is_over: false, is_new: true, _held: held }
    }

    /// What a stream begins with.
    fn hello(&mut self) -> Option<Bytes> {
        std::mem::take(&mut self.is_new).then_some(sse::HELLO)
    }

    /// Waits until it is time for a ping, the server stops, or the token ended. Cancel-safe.
    async fn otherwise(&mut self) -> Otherwise {
        tokio::select! {
            _ = self.pings.tick() => Otherwise::Ping,
            ending = &mut self.ending => Otherwise::End(ending),
        }
    }

    /// What a viewer's stream ends with: a page whose token is not good any more asks for another one.
    fn goodbye(&mut self, ending: Ending) -> Bytes {
        #[derive(Serialize)]
        struct Closed {
            reason: &'static str,
        }
        self.is_over = true;
        let reason = match ending {
            Ending::Shutdown => "shutdown",
            Ending::Credential(_) => "auth_expiring",
        };
        let mut out = BytesMut::new();
        sse::event(&mut out, "closed", None, &Closed { reason });
        out.freeze()
    }
}

/// The id of an event about an artifact: its number, and where its sandbox began.
fn event_id(seq: u64, began: u64) -> String {
    format!("{seq}.{began}")
}

/// The artifact that a viewer saw last, and whether that was one of another sandbox, which had this one's id before. Its number
/// alone is this one's.
fn last_seen(event_id: Option<&str>, began: u64) -> (Option<u64>, bool) {
    let Some(event_id) = event_id else { return (None, false) };
    let (seq, of) = event_id.split_once('.').map_or((event_id, None), |(seq, of)| (seq, Some(of)));
    match (seq.parse().ok(), of.map(str::parse::<u64>)) {
        (seq, None) => (seq, false),
        (seq, Some(Ok(of))) if of == began => (seq, false),
        (Some(_), Some(Ok(_))) => (None, true),
        _ => (None, false),
    }
}

/// Somebody who looks at a sandbox.
struct Viewer {
    id: String,
    began: u64,
    /// What it saw before was of another sandbox, and it was not told.
    is_others: bool,
    watch: Watch,
    /// What is to be shown first.
    history: VecDeque<Arc<Artifact>>,
    /// The artifact that is being shown: a large one is made as the transport takes it.
    pieces: Option<Pieces>,
    /// Steps that are to be shown, shared by all viewers.
    steps: VecDeque<Bytes>,
    open: Open,
}

impl Viewer {
    async fn next(&mut self) -> Option<Bytes> {
        if let Some(hello) = self.open.hello() {
            return Some(hello);
        }
        if self.open.is_over {
            return None;
        }
        if std::mem::take(&mut self.is_others) {
            return Some(self.removed());
        }
        loop {
            if self.pieces.is_some() || !self.history.is_empty() {
                return Some(self.page());
            }
            if let Some(steps) = self.some_steps() {
                return Some(steps);
            }
            let sight = tokio::select! {
                sight = self.watch.next() => sight,
                otherwise = self.open.otherwise() => match otherwise {
                    Otherwise::Ping => return Some(sse::PING),
                    Otherwise::End(ending) => return Some(self.open.goodbye(ending)),
                },
            };
            match sight {
                Sight::Snapshot(artifacts) => self.history.extend(artifacts),
                Sight::Steps(steps) => {
                    let began = self.began;
                    self.steps.extend(steps.iter().map(|step| step.encoded(|changes| encode(changes, began))));
                }
                Sight::Removed => {
                    self.open.is_over = true;
                    return Some(self.removed());
                }
                Sight::Over => return None,
            }
        }
    }

    /// What it saw until now is gone.
    fn removed(&self) -> Bytes {
        let mut out = BytesMut::new();
        sse::event(&mut out, "session_removed", None, &Removed { id: &self.id });
        out.freeze()
    }

    /// The next step, or several small ones.
    fn some_steps(&mut self) -> Option<Bytes> {
        let mut bytes = 0;
        let small = self.steps.iter().take_while(|step| {
            let fits = bytes + step.len() <= TOGETHER_BYTES;
            bytes += if fits { step.len() } else { 0 };
            fits
        });
        let together = small.count();
        if together < 2 {
            return self.steps.pop_front();
        }
        let mut out = BytesMut::with_capacity(bytes);
        self.steps.drain(..together).for_each(|step| out.extend_from_slice(&step));
        Some(out.freeze())
    }

    /// Some of what was before.
    fn page(&mut self) -> Bytes {
        let mut out = BytesMut::new();
        while out.len() < sse::CHUNK_BYTES {
            if let Some(pieces) = &mut self.pieces {
                if !pieces.write(&mut out, sse::CHUNK_BYTES) {
                    out.put_slice(b"}\n\n");
                    self.pieces = None;
                }
                continue;
            }
            let Some(artifact) = self.history.pop_front() else { break };
            let id = event_id(artifact.seq, self.began);
            out.put_slice(format!("event: artifact_snapshot\nid: {id}\ndata: {{\"artifact\":").as_bytes());
            self.pieces = Some(Pieces::new(artifact));
        }
        out.freeze()
    }
}

#[derive(Serialize)]
struct Shown<'a> {
    artifact: &'a Artifact,
}

/// What changed, as every viewer is told it.
fn encode(changes: &[Change], began: u64) -> Bytes {
    let text = |change: &Change| match change {
        Change::Updated(Update { how: How::Append(text), .. }) => text.len(),
        _ => 0,
    };
    let mut out = BytesMut::with_capacity(changes.iter().map(|change| EVENT_BYTES + text(change)).sum());
    for change in changes {
        match change {
            Change::Created(artifact) => {
                let id = event_id(artifact.seq, began);
                sse::event_at(&mut out, "artifact_created", Some(&id), &Shown { artifact });
            }
            Change::Updated(update) => {
                sse::event_at(&mut out, "artifact_updated", Some(&event_id(update.seq, began)), update);
            }
        }
    }
    out.freeze()
}

#[derive(Serialize)]
struct Told<'a> {
    session: &'a Sandbox,
}

#[derive(Serialize)]
struct Updated<'a> {
    id: &'a str,
    fields: Fields<'a>,
}

#[derive(Serialize)]
struct Fields<'a> {
    #[serde(skip_serializing_if = "Option::is_none")]
    status: Option<Status>,
    #[serde(skip_serializing_if = "Option::is_none")]
    summary: Option<&'a str>,
}

#[derive(Serialize)]
struct Removed<'a> {
    id: &'a str,
}

/// A stream of the list of sandboxes.
struct ListViewer {
    roll: Roll,
    pending: VecDeque<News>,
    open: Open,
}

impl ListViewer {
    async fn next(&mut self) -> Option<Bytes> {
        if let Some(hello) = self.open.hello() {
            return Some(hello);
        }
        if self.open.is_over {
            return None;
        }
        if self.pending.is_empty() {
            let all = tokio::select! {
                all = self.roll.next() => all,
                otherwise = self.open.otherwise() => match otherwise {
                    Otherwise::Ping => return Some(sse::PING),
                    Otherwise::End(ending) => return Some(self.open.goodbye(ending)),
                },
            };
            match all {
                Ok(all) => self.pending.extend(all),
                Err(error) => {
                    tracing::debug!(%error, "a stream of sessions ends");
                    return None;
                }
            }
        }
        let mut out = BytesMut::new();
        while out.len() < sse::CHUNK_BYTES
            && let Some(one) = self.pending.pop_front()
        {
            tell_news(&mut out, &one);
        }
        Some(out.freeze())
    }
}

fn tell_news(out: &mut BytesMut, one: &News) {
    match one {
        News::Snapshot(session) => sse::event(out, "session_snapshot", None, &Told { session }),
        News::SnapshotEnd(sessions) => {
            sse::event(out, "session_snapshot_end", None, &serde_json::json!({"sessions": sessions}));
        }
        News::Created(session) => sse::event(out, "session_created", None, &Told { session }),
        News::Updated { id, status, summary } => {
            let fields = Fields { status: *status, summary: summary.as_deref() };
            sse::event(out, "session_updated", None, &Updated { id, fields });
        }
        News::Removed { id } => sse::event(out, "session_removed", None, &Removed { id }),
    }
}

/// What a command stream ends with when another one took over. Two programs that both come back at once would take it from each other
/// without end.
const REPLACED: Bytes =
    Bytes::from_static(b"retry: 60000\nevent: replaced\ndata: {\"reason\":\"another stream took over\"}\n\n");

/// What a sandbox is told. Pulled by the transport: what it did not pull was not told.
fn commands(duty: Duty, open: Open) -> impl Stream<Item = Bytes> {
    stream::unfold((duty, open), |(mut duty, mut open)| async move {
        if open.hello().is_some() {
            // An id without data is kept by clients, and is no event: what is sent into a broken wire comes again.
            let hello = format!("retry: 1000\nid: {}\n\n", duty.begins());
            return Some((hello.into(), (duty, open)));
        }
        if open.is_over {
            return None;
        }
        let command = tokio::select! {
            command = duty.next() => command,
            otherwise = open.otherwise() => match otherwise {
                Otherwise::Ping => return Some((sse::PING, (duty, open))),
                Otherwise::End(_) => return None,
            },
        };
        let command = command.unwrap_or_else(|error| {
            tracing::warn!(%error, "a command stream ends");
            None
        });
        // One that was read as another stream took over goes to that one.
        let Some(command) = command.filter(|command| duty.take(command.offset)) else {
            open.is_over = true;
            return duty.is_replaced().then_some((REPLACED, (duty, open)));
        };
        let mut out = BytesMut::new();
        sse::raw_event(&mut out, "command", command.offset, &command.body);
        Some((out.freeze(), (duty, open)))
    })
}

fn invalid(message: String) -> Error {
    Error::new(Kind::Invalid, "ERR_INVALID_ARGUMENT", message)
}

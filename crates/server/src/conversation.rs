//! The conversation surface: `/api/v2`. See docs/protocol/conversation.md.

mod incoming;
mod pages;
mod shown;
mod stream;
pub(crate) mod token;
mod upload;

use std::sync::Arc;

use axum::{
    Extension, Json, Router,
    body::Body,
    extract::State,
    http::{HeaderMap, HeaderValue, StatusCode, header},
    middleware,
    response::{IntoResponse as _, Response},
    routing::{get, post},
};
use bytes::{BufMut as _, Bytes, BytesMut};
use futures_util::{StreamExt as _, stream as streams};
use serde::{Deserialize, Serialize};
use trunkline_core::{
    Error, Kind,
    app::AttachmentPolicy,
    conversation::{
        Conversations, History, LIMITED, Lockout, Page, Row, Seat,
        files::FOR_VIEWERS,
        iso,
        said::Why,
        state::{Kind as Teller, Standing, State as Stands},
    },
    json,
};
use trunkline_store::log::Clock;
use uuid::Uuid;

use self::{incoming::Slots, shown::Shown, stream::Viewer, token::Admitted};
use crate::{
    error::Refusal,
    http::{self, Asked, PathId, Web},
    repeats::{Post, WINDOW},
    sse,
};

/// Conversations of a list, and messages of a page, at most, and if nothing is said.
const LIST_MAX: usize = 200;
const LIST: usize = 100;
const PAGE_MAX: usize = 10_000;

/// Bytes of a request besides its text, which JSON may make six times as long.
const BESIDES: usize = 4096;

struct Surface {
    conversations: Conversations,
    web: Web,
    uploads: Slots,
    /// When this server began, in Unix milliseconds.
    begun_ms: u64,
    /// Of this server's own pages, as proxies show them.
    public_origin: Option<HeaderValue>,
}

type Answer<T> = Result<T, Refusal>;

pub(crate) fn router(conversations: Conversations, web: Web) -> Router {
    // It was checked with the other settings.
    let public_origin = http::public_origin(&conversations.options().public_url).ok().flatten();
    let begun_ms = Clock::system().now_ms();
    let surface = Arc::new(Surface { conversations, web, uploads: Slots::default(), begun_ms, public_origin });
    Router::new()
        .route("/api/v2/sessions", post(begin))
        .route("/api/v2/agent_convos", get(list))
        .route("/api/v2/agent_convos/{id}", get(show))
        .route("/api/v2/agent_convos/{id}/events", get(watch).head(|| async { http::no_head("GET") }))
        .route("/api/v2/agent_convos/{id}/stream_message", post(say))
        .route("/api/v2/agent_convos/{id}/upload_file", post(upload::upload))
        .route("/api/v2/files/{id}", get(upload::fetch))
        .fallback(http::not_found)
        .method_not_allowed_fallback(http::not_allowed)
        .layer(http::compression())
        .layer(middleware::from_fn_with_state(surface.clone(), pages::admit))
        .with_state(surface)
}

fn unauthenticated() -> Error {
    Error::new(Kind::Unauthenticated, "ERR_UNAUTHENTICATED", "a bearer token is required")
}

fn admitted(admitted: Option<Extension<Admitted>>) -> Result<Admitted, Error> {
    admitted.map(|Extension(admitted)| admitted).ok_or_else(unauthenticated)
}

async fn seat(surface: &Surface, asks: Option<Extension<Admitted>>, id: &str) -> Result<Seat, Error> {
    surface.conversations.find(&admitted(asks)?.visitor, id).await
}

#[derive(Serialize)]
struct Begun {
    convo_id: Uuid,
    attachment_policy: AttachmentPolicy,
    lockout: LockedOut,
}

/// The published fields.
#[derive(Default, Serialize)]
struct LockedOut {
    locked_out: bool,
    expires_at: Option<String>,
    permanent: bool,
    reason: Option<Why>,
    user_message: Option<String>,
}

impl From<Lockout> for LockedOut {
    fn from(lockout: Lockout) -> Self {
        Self {
            locked_out: true,
            permanent: lockout.expires_at.is_none(),
            expires_at: lockout.expires_at.map(|at| iso(at.saturating_mul(1000))),
            reason: Some(lockout.reason),
            user_message: lockout.user_message,
        }
    }
}

async fn begin(State(surface): State<Arc<Surface>>, asks: Option<Extension<Admitted>>) -> Answer<Json<Begun>> {
    let visitor = admitted(asks)?.visitor;
    let row = surface.conversations.create(&visitor).await?;
    let lockout = surface.conversations.lockout(&visitor).map(LockedOut::from).unwrap_or_default();
    Ok(Json(Begun { convo_id: row.id, attachment_policy: visitor.agent().attachments.clone(), lockout }))
}

/// A conversation, with where it stands: the published fields, and one of ours.
#[derive(Serialize)]
struct Whereabouts<'a> {
    #[serde(flatten)]
    head: &'a Head,
    /// A stream that begins behind this misses nothing of what happens after this answer.
    last_event_id: String,
}

/// A conversation, without what was said. The published fields.
#[derive(Serialize)]
struct Head {
    id: Uuid,
    state: Stands,
    closed: bool,
    created_at: String,
    last_message_at: Option<String>,
}

impl Head {
    fn new(row: &Row, standing: &Standing) -> Self {
        let last = standing.last_message_ms;
        Self {
            id: row.id,
            state: standing.state,
            closed: standing.state.is_closed(),
            created_at: iso(row.created_at),
            last_message_at: (last > 0).then(|| iso(last)),
        }
    }
}

#[derive(Serialize)]
struct Listed {
    agent_convos: Vec<Head>,
}

fn number(asked: &Asked, name: &str, most: usize) -> Result<Option<usize>, Error> {
    let Some(text) = asked.param(name) else { return Ok(None) };
    let number = text.parse().ok().filter(|number| (1..=most).contains(number));
    let wrong = || Error::new(Kind::Invalid, "ERR_INVALID_ARGUMENT", format!("{name}: a number from 1 to {most}"));
    number.ok_or_else(wrong).map(Some)
}

fn id(asked: &Asked, name: &str) -> Result<Option<Uuid>, Error> {
    let wrong = |_| Error::new(Kind::Invalid, "ERR_INVALID_ARGUMENT", format!("{name}: no id"));
    asked.param(name).map(|text| Uuid::try_parse(text).map_err(wrong)).transpose()
}

async fn list(
    State(surface): State<Arc<Surface>>,
    asks: Option<Extension<Admitted>>,
    asked: Asked,
) -> Answer<Json<Listed>> {
    let visitor = admitted(asks)?.visitor;
    let (limit, before) = (number(&asked, "limit", LIST_MAX)?.unwrap_or(LIST), id(&asked, "before")?);
    let all = surface.conversations.list(&visitor, before, limit).await?;
    Ok(Json(Listed { agent_convos: all.iter().map(|(row, standing)| Head::new(row, standing)).collect() }))
}

async fn show(
    State(surface): State<Arc<Surface>>,
    PathId(convo): PathId,
    asks: Option<Extension<Admitted>>,
    asked: Asked,
) -> Answer<Response> {
    let seat = seat(&surface, asks, &convo).await?;
    let (after, before) = (id(&asked, "after")?, id(&asked, "before")?);
    let limit = number(&asked, "limit", PAGE_MAX)?;
    let base = base(&surface, &asked);
    // Before anything is read: what happens meanwhile is sent twice rather than not at all.
    let last_event_id = surface.conversations.place_of_last(seat.permit()).await?.to_string();
    // Links to files are the same for an hour.
    let tag = format!("W/\"{last_event_id}-{}\"", token::now().div_euclid(FOR_VIEWERS));
    if asked.header(&header::IF_NONE_MATCH).is_some_and(|known| http::is_listed(known, &tag)) {
        return Ok((tagged(&tag), http::not_modified()).into_response());
    }
    let standing = surface.conversations.standing(seat.permit()).await?;
    let head = Whereabouts { head: &Head::new(seat.row(), &standing), last_event_id };
    let history = match (after, before, limit) {
        (None, None, None) => Some(surface.conversations.history(seat.permit())?),
        (Some(after), None, limit) => {
            let most = limit.unwrap_or(PAGE_MAX);
            Some(surface.conversations.history_after(seat.permit(), after, most).await?)
        }
        _ => None,
    };
    let body = if let Some(history) = history {
        let whole = Whole { surface, history, base, opening: Some(opening(&head)?), has_any: false, is_over: false };
        Body::from_stream(streams::unfold(whole, Whole::next).fuse())
    } else {
        let page = Page { after, before, limit: limit.unwrap_or(PAGE_MAX) };
        let messages = surface.conversations.page(seat.permit(), page).await?;
        let mut out = opening(&head)?;
        for (n, message) in messages.iter().enumerate() {
            write(&surface, &mut out, message, n > 0, &base)?;
        }
        out.put_slice(b"]}");
        Body::from(out.freeze())
    };
    Ok((tagged(&tag), [(header::CONTENT_TYPE, "application/json")], body).into_response())
}

/// So that browsers keep an answer, and ask whether it is still so.
fn tagged(tag: &str) -> HeaderMap {
    let tag = HeaderValue::try_from(tag).ok().map(|tag| (header::ETAG, tag));
    let kept = [(header::CACHE_CONTROL, HeaderValue::from_static("private, no-cache"))];
    // Another token may see something else.
    let by_token = [(header::VARY, HeaderValue::from_static("authorization"))];
    kept.into_iter().chain(by_token).chain(tag).collect()
}

/// What an answer begins with: what is known of the conversation, and room for what was said.
fn opening(head: &Whereabouts<'_>) -> Result<BytesMut, Error> {
    let json = serde_json::to_vec(head).map_err(|e| unwritable(&e))?;
    let mut out = BytesMut::from(json.strip_suffix(b"}").unwrap_or_default());
    out.put_slice(b",\"messages\":[");
    Ok(out)
}

fn unwritable(error: &serde_json::Error) -> Error {
    Error::new(Kind::Internal, "ERR_INTERNAL", error.to_string())
}

fn write(
    surface: &Surface,
    out: &mut BytesMut,
    message: &trunkline_core::conversation::state::Message,
    is_next: bool,
    base: &str,
) -> Result<(), Error> {
    if is_next {
        out.put_u8(b',');
    }
    let shown = Shown::new(message, surface.conversations.links(), base, FOR_VIEWERS);
    serde_json::to_writer(out.writer(), &shown).map_err(|e| unwritable(&e))
}

/// A conversation from its beginning, as it is read.
struct Whole {
    surface: Arc<Surface>,
    history: History,
    base: String,
    opening: Option<BytesMut>,
    has_any: bool,
    is_over: bool,
}

impl Whole {
    async fn next(mut self) -> Option<(Result<Bytes, Error>, Self)> {
        if self.is_over {
            return None;
        }
        let mut out = self.opening.take().unwrap_or_default();
        while out.len() < sse::CHUNK_BYTES && !self.is_over {
            let messages = match self.history.next().await {
                Ok(messages) => messages,
                Err(error) => {
                    // Half an answer is none: the transport breaks off.
                    self.is_over = true;
                    return Some((Err(error), self));
                }
            };
            self.is_over = messages.is_empty();
            for message in &messages {
                if let Err(error) = write(&self.surface, &mut out, message, self.has_any, &self.base) {
                    self.is_over = true;
                    return Some((Err(error), self));
                }
                self.has_any = true;
            }
        }
        if self.is_over {
            out.put_slice(b"]}");
        }
        Some((Ok(out.freeze()), self))
    }
}

async fn watch(
    State(surface): State<Arc<Surface>>,
    PathId(convo): PathId,
    asks: Option<Extension<Admitted>>,
    asked: Asked,
) -> Answer<Response> {
    let asks = admitted(asks)?;
    let seat = surface.conversations.find(&asks.visitor, &convo).await?;
    let place = surface.conversations.place(&asks.visitor).await?;
    let held = surface.web.streams.count("conversation");
    let deltas = asked.param("deltas").is_some_and(|value| value == "1");
    let watch = surface.conversations.watch(seat.permit(), asked.last_event(), deltas).await?;
    let base = base(&surface, &asked);
    Ok(sse::response(Viewer::new(surface, (seat, asks), watch, place, base, held).into_stream()))
}

#[derive(Deserialize)]
struct Said {
    #[serde(default, deserialize_with = "json::lossy")]
    text: String,
    #[serde(default)]
    message_id: Option<Uuid>,
}

#[derive(Serialize)]
struct Accepted {
    message_id: Uuid,
    status: &'static str,
}

async fn say(
    State(surface): State<Arc<Surface>>,
    PathId(convo): PathId,
    asks: Option<Extension<Admitted>>,
    asked: Asked,
    body: Body,
) -> Answer<Response> {
    let most = surface.conversations.options().message_bytes_max.saturating_mul(6) + BESIDES;
    let (seat, body) = http::body_of(seat(&surface, asks, &convo).await, body, most).await?;
    let seat = Arc::new(seat);
    let unreadable = |e| Error::new(Kind::Invalid, "ERR_INVALID_ARGUMENT", format!("the body cannot be read: {e}"));
    let said: Said = json::object(&body).map_err(unreadable)?;
    let key = asked.idempotency_key()?.to_owned();
    let exchange = asked.exchange().filter(|_| said.message_id.is_none());
    if exchange.is_some()
        && let Some(id) = before_the_start(&surface, &seat, &said.text).await?
    {
        return Ok(accepted(id));
    }
    let post = Post::new(&seat.row().id.to_string(), &seat.row().user, said.text.as_bytes());
    let (poster, posting) = (surface.conversations.clone(), seat.clone());
    let work = async move { poster.post(&posting, &said.text, said.message_id, &key).await };
    match surface.web.repeats.once(post, exchange, work).await {
        Ok(message_id) => Ok(accepted(message_id)),
        Err(error) if error.code == LIMITED => limited(&surface, &seat, &error).await,
        Err(error) => Err(error.into()),
    }
}

fn accepted(message_id: Uuid) -> Response {
    Json(Accepted { message_id, status: "accepted" }).into_response()
}

/// The last message, if it says the same and came so shortly before this server began that its answer may have been lost with the
/// former process: a browser that waited for the new one says it again.
async fn before_the_start(surface: &Surface, seat: &Seat, text: &str) -> Result<Option<Uuid>, Error> {
    let window_ms = u64::try_from(WINDOW.as_millis()).unwrap_or(u64::MAX);
    let is_over = Clock::system().now_ms() > surface.begun_ms.saturating_add(window_ms);
    if is_over {
        return Ok(None);
    }
    let page = surface.conversations.page(seat.permit(), Page { after: None, before: None, limit: 1 }).await?;
    let said_ms = |id: Uuid| {
        id.get_timestamp().map(|at| at.to_unix().0.saturating_mul(1000) + u64::from(at.to_unix().1 / 1_000_000))
    };
    let times = surface.begun_ms.saturating_sub(window_ms)..surface.begun_ms;
    let last = page.last().filter(|last| last.from == Teller::User && last.content == text);
    Ok(last.map(|last| last.id).filter(|id| said_ms(*id).is_some_and(|at| times.contains(&at))))
}

/// What somebody is told who says too much. The published fields.
#[derive(Serialize)]
struct Limited<'a> {
    status: &'static str,
    convo_id: Uuid,
    state: Stands,
    retry_after_seconds: u64,
    message: &'a str,
}

async fn limited(surface: &Surface, seat: &Seat, error: &Error) -> Answer<Response> {
    let state = surface.conversations.standing(seat.permit()).await?.state;
    let retry_after_seconds = error.retry_after.map_or(1, |wait| wait.as_secs_f64().ceil().max(1.0) as u64);
    let (convo_id, message) = (seat.row().id, error.message.as_ref());
    let limited = Limited { status: "rate_limited", convo_id, state, retry_after_seconds, message };
    let after = [(header::RETRY_AFTER, retry_after_seconds.to_string())];
    Ok((StatusCode::TOO_MANY_REQUESTS, after, Json(limited)).into_response())
}

/// Where links begin: as it is set, or as the request says.
fn base(surface: &Surface, asked: &Asked) -> String {
    let set = &surface.conversations.options().public_url;
    if set.is_empty() { asked.own_address(surface.web.is_tls) } else { set.trim_end_matches('/').to_owned() }
}

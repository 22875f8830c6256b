//! Answers calls that come through the fabric.

use std::{
    collections::HashMap,
    fmt,
    pin::Pin,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    task::{Context, Poll},
    time::Duration,
};

use bytes::Bytes;
use futures_util::FutureExt as _;
use http::{HeaderMap, HeaderName, HeaderValue, Method, Uri};
use http_body::Frame as HttpFrame;
use prost::Message as _;
use tokio_util::sync::CancellationToken;
use tower_service::Service;
use trunkline_proto::v1::{
    AuthorizationContext, PrincipalRef, ProxyError, ProxyHttpBodyChunk, ProxyHttpRequest, ProxyHttpResponse,
    ResolvedAuthorityInfo, TunnelData, TunnelOpen, downstream_message::Payload as Down, proxy_error::Kind as ProxyKind,
    upstream_message::Payload as Up,
};

use super::{Body, Limits, body::Pieces, flat, gather, send_chunks, unflat};
use crate::{
    connection::{
        Client,
        feed::Mark,
        lane::{Lane, Overflow, Pressure, Received, Weight},
    },
    error::{Error, Kind, Result},
    routes::{Frame, frames},
    tunnel::{self, Incoming},
};

/// Calls that are answered at once, at most; those beyond are refused.
const CALLS_MAX: usize = 256;

/// Tunnels that are open at once, at most; those beyond are refused.
const TUNNELS_MAX: usize = 256;

/// Frames of calls that are not looked at yet, and of one tunnel that are not read yet: at 64 times this, or 32 MiB, they fail.
const FRAMES: usize = 1024;

/// Pieces of a request's body that are not read yet, and their bytes: at 64 times this, or so many bytes, the call fails.
const PIECES: usize = 128;
const PIECES_BYTES: usize = 32 * 1024 * 1024;

/// Refusals that wait for room to go out, beside what is being answered; then nothing more is looked at.
const REFUSALS_MAX: usize = 256;

/// How long a call may be worked on, if it does not say: the published ceiling.
const CEILING: Duration = Duration::from_secs(180);

/// What is done about the headers that say who calls, `X-Auth-*` and `X-Aether-*`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum HeaderMode {
    /// They are the server's, which takes out what a caller puts there. They are kept.
    #[default]
    Passthrough,
    /// They are taken out, and made anew from what the server says beside the headers. Of a call that is not on somebody's behalf,
    /// that is little more than that.
    Strict,
}

/// How calls are answered.
///
/// ```no_run
/// # async fn f(service: trunkline_client::Service) {
/// use axum::{Router, routing::get};
/// use trunkline_client::http::Serve;
/// let router = Router::new().route("/v1/health", get(|| async { "well" }));
/// let serving = service.serve(Serve::new(router).allow_paths(["/v1/*"]));
/// # }
/// ```
#[must_use = "calls are answered when it is given to serve"]
pub struct Serve {
    handler: Handler,
    allow: Option<Vec<String>>,
    headers: HeaderMode,
    tenant: Option<String>,
    allow_partial: bool,
    tunnels: Option<TunnelHandler>,
}

type Answer = Pin<Box<dyn Future<Output = http::Response<Body>> + Send>>;
type Handler = Arc<dyn Fn(http::Request<Body>) -> Answer + Send + Sync>;
type TunnelHandler = Arc<dyn Fn(Incoming) -> Pin<Box<dyn Future<Output = ()> + Send>> + Send + Sync>;

impl Serve {
    /// With any HTTP service, such as an `axum::Router`. A panic in it answers with 500.
    pub fn new<S, B>(service: S) -> Self
    where
        S: Service<http::Request<Body>, Response = http::Response<B>> + Clone + Send + Sync + 'static,
        S::Future: Send + 'static,
        S::Error: fmt::Display + Send,
        B: http_body::Body<Data = Bytes> + Send + 'static,
        B::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
    {
        let handler: Handler = Arc::new(move |request| {
            let mut service = service.clone();
            let answers = async move {
                match std::future::poll_fn(|cx| service.poll_ready(cx)).await {
                    Ok(()) => service.call(request).await,
                    Err(error) => Err(error),
                }
            };
            async move {
                match std::panic::AssertUnwindSafe(answers).catch_unwind().await {
                    Ok(Ok(response)) => response.map(Body::of),
                    Ok(Err(error)) => {
                        tracing::error!(%error, "a call was not answered");
                        failed()
                    }
                    Err(_) => {
                        tracing::error!("a handler panicked over a call");
                        failed()
                    }
                }
            }
            .boxed()
        });
        Self { handler, allow: None, headers: HeaderMode::default(), tenant: None, allow_partial: false, tunnels: None }
    }

    /// With no HTTP at all: every call is answered with 404.
    pub fn nothing() -> Self {
        Self::new(tower_fn(|_| async {
            let mut response = http::Response::new(Body::empty());
            *response.status_mut() = http::StatusCode::NOT_FOUND;
            response
        }))
    }

    /// Only these paths, without their queries. A `*` stands for anything; others are refused before they are answered.
    pub fn allow_paths<T: Into<String>>(mut self, patterns: impl IntoIterator<Item = T>) -> Self {
        self.allow = Some(patterns.into_iter().map(Into::into).collect());
        self
    }

    /// What is done about the headers that say who calls.
    pub fn header_mode(mut self, mode: HeaderMode) -> Self {
        self.headers = mode;
        self
    }

    /// The tenant that [`HeaderMode::Strict`] names.
    pub fn tenant(mut self, id: impl Into<String>) -> Self {
        self.tenant = Some(id.into());
        self
    }

    /// Also answers calls on somebody's behalf of which the server does not say how far that goes. Without this they are refused.
    pub fn allow_partial(mut self) -> Self {
        self.allow_partial = true;
        self
    }

    /// Also takes tunnels; the handler decides about each.
    pub fn tunnels<F, R>(mut self, handler: F) -> Self
    where
        F: Fn(Incoming) -> R + Send + Sync + 'static,
        R: Future<Output = ()> + Send + 'static,
    {
        self.tunnels = Some(Arc::new(move |incoming| handler(incoming).boxed()));
        self
    }
}

/// A function as a service.
fn tower_fn<F, R>(function: F) -> FnService<F>
where
    F: Fn(http::Request<Body>) -> R,
{
    FnService(function)
}

#[derive(Clone)]
struct FnService<F>(F);

impl<F, R> Service<http::Request<Body>> for FnService<F>
where
    F: Fn(http::Request<Body>) -> R,
    R: Future<Output = http::Response<Body>> + Send + 'static,
{
    type Response = http::Response<Body>;
    type Error = std::convert::Infallible;
    type Future = Pin<Box<dyn Future<Output = std::result::Result<http::Response<Body>, Self::Error>> + Send>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<std::result::Result<(), Self::Error>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: http::Request<Body>) -> Self::Future {
        let answer = (self.0)(request);
        Box::pin(async move { Ok(answer.await) })
    }
}

fn failed() -> http::Response<Body> {
    let mut response = http::Response::new(Body::full("internal server error"));
    *response.status_mut() = http::StatusCode::INTERNAL_SERVER_ERROR;
    response
}

/// Answers calls until it is dropped or the client ends.
#[must_use = "calls are answered until this is dropped"]
pub struct Serving {
    client: Client,
    lane: Arc<Lane<Frame>>,
}

impl Serving {
    /// Answers calls until the client ends, and says why it did.
    pub async fn ended(&self) -> Error {
        self.client.ended().await
    }
}

impl Drop for Serving {
    fn drop(&mut self) {
        self.client.core.routes.unserve(&self.lane);
    }
}

impl Client {
    /// Answers HTTP calls with any service of the kind, such as an `axum::Router`: on a [`Service`](crate::Service), and on whoever
    /// else can be called.
    pub fn serve_http<S, B>(&self, service: S) -> Serving
    where
        S: Service<http::Request<Body>, Response = http::Response<B>> + Clone + Send + Sync + 'static,
        S::Future: Send + 'static,
        S::Error: fmt::Display + Send,
        B: http_body::Body<Data = Bytes> + Send + 'static,
        B::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
    {
        self.serve(Serve::new(service))
    }

    /// As [`Client::serve_http`], with more to say. What served before does not any more.
    pub fn serve(&self, serve: Serve) -> Serving {
        let lane = frames("calls", FRAMES, &self.core.room);
        let received = Received::of(&lane);
        self.core.routes.serve(&lane);
        let desk = Arc::new(Desk { client: self.clone(), serve, calls: Mutex::default(), tunnels: Mutex::default() });
        // Ends with its lane.
        self.core.spawn(desk.run(received));
        Serving { client: self.clone(), lane }
    }
}

/// What is being answered.
struct Desk {
    client: Client,
    serve: Serve,
    calls: Mutex<HashMap<String, Answering>>,
    tunnels: Mutex<HashMap<String, Arc<Lane<Frame>>>>,
}

struct Answering {
    body: Option<Arc<Lane<ProxyHttpBodyChunk>>>,
    cancel: CancellationToken,
}

impl Desk {
    /// Short and without a wait inside; a panic inside leaves nothing half done.
    fn calls(&self) -> MutexGuard<'_, HashMap<String, Answering>> {
        self.calls.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn tunnels(&self) -> MutexGuard<'_, HashMap<String, Arc<Lane<Frame>>>> {
        self.tunnels.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Frames in the order in which they came, each to its call or tunnel.
    async fn run(self: Arc<Self>, mut frames: Received<Frame>) {
        let mut running = tokio::task::JoinSet::new();
        loop {
            tokio::select! {
                frame = frames.next() => match frame {
                    Some(Frame::Down(frame)) => self.take(frame, &mut running).await,
                    Some(Frame::Failed(why)) => self.broken(&why),
                    None => return self.broken(&crate::connection::closed()),
                },
                Some(_) = running.join_next(), if !running.is_empty() => {}
            }
        }
    }

    /// The connection broke, or nothing is served any more: nobody waits for answers, and no tunnel goes on.
    fn broken(&self, why: &Error) {
        for call in std::mem::take(&mut *self.calls()).into_values() {
            call.cancel.cancel();
        }
        for tunnel in std::mem::take(&mut *self.tunnels()).into_values() {
            tunnel.push(Frame::Failed(why.clone()));
            tunnel.end();
        }
    }

    async fn take(self: &Arc<Self>, frame: Down, running: &mut tokio::task::JoinSet<()>) {
        match frame {
            Down::ProxyHttpRequest(request) => self.request(*request, running).await,
            Down::ProxyHttpBodyChunk(chunk) if chunk.is_request => {
                let body = self.calls().get(&chunk.request_id).and_then(|call| call.body.clone());
                if let Some(body) = body
                    && body.push(*chunk) == Pressure::Hard
                {
                    // What comes then is refused: the body has broken off.
                    body.end();
                }
            }
            // Whoever called is gone.
            Down::ProxyHttpResponse(response) => {
                if let Some(call) = self.calls().remove(&response.request_id) {
                    call.cancel.cancel();
                }
            }
            Down::TunnelData(data) => self.tunnel(data, running).await,
            Down::TunnelAck(ack) => self.pass(&ack.tunnel_id.clone(), Down::TunnelAck(ack)),
            Down::TunnelClose(close) => self.pass(&close.tunnel_id.clone(), Down::TunnelClose(close)),
            _ => {}
        }
    }

    /// Hands a frame to its tunnel. One whose owner falls too far behind fails.
    fn pass(&self, id: &str, frame: Down) {
        let mut tunnels = self.tunnels();
        let Some(tunnel) = tunnels.get(id) else { return };
        if tunnel.push(Frame::Down(frame)) == Pressure::Hard {
            let why = Error::new(Kind::Exhausted, "what came through a tunnel was not read fast enough");
            tunnel.push(Frame::Failed(why));
            tunnel.end();
            tunnels.remove(id);
        }
    }

    /// The first frame of a tunnel says what it is; the published server wraps it so.
    async fn tunnel(self: &Arc<Self>, data: Box<TunnelData>, running: &mut tokio::task::JoinSet<()>) {
        if self.tunnels().contains_key(&data.tunnel_id) {
            return self.pass(&data.tunnel_id.clone(), Down::TunnelData(data));
        }
        let opened = TunnelOpen::decode(data.data.clone()).ok().filter(|open| open.tunnel_id == data.tunnel_id);
        let (Some(open), Some(handler)) = (opened, self.serve.tunnels.clone()) else {
            let close = tunnel::refusal(data.tunnel_id, tunnel::Reason::PeerReset, "no active tunnel for id");
            return self.say(close, running).await;
        };
        if self.tunnels().len() >= TUNNELS_MAX {
            let why = format!("{TUNNELS_MAX} tunnels are open already");
            return self.say(tunnel::refusal(data.tunnel_id, tunnel::Reason::Quota, &why), running).await;
        }
        let lane = frames("frames of a tunnel", FRAMES, &self.client.core.room);
        let received = Received::of(&lane);
        let id = open.tunnel_id.clone();
        self.tunnels().insert(id.clone(), lane);
        let desk = Arc::clone(self);
        let forget = Forget(Arc::clone(self), id);
        let incoming = Incoming::new(self.client.clone(), open, received, Box::new(forget));
        running.spawn(async move {
            (handler)(incoming).await;
            drop(desk);
        });
    }

    async fn request(self: &Arc<Self>, request: ProxyHttpRequest, running: &mut tokio::task::JoinSet<()>) {
        let id = request.request_id.clone();
        let refused = self.refusal(&request);
        if let Some((kind, why)) = refused {
            return self.say(refusal(&id, kind, &why), running).await;
        }
        let cancel = CancellationToken::new();
        let room = &self.client.core.room;
        let weight =
            || Weight { of: |piece: &ProxyHttpBodyChunk| piece.data.len(), soft: usize::MAX, hard: PIECES_BYTES };
        let lane = request
            .body_chunked
            .then(|| Lane::with("pieces of a body", PIECES, Overflow::Unheard, Arc::clone(room), |_| {}, weight()));
        let pieces = lane.as_ref().map(Received::of);
        self.calls().insert(id.clone(), Answering { body: lane, cancel: cancel.clone() });
        let (desk, forget) = (Arc::clone(self), ForgetCall(Arc::clone(self), id.clone()));
        running.spawn(async move {
            // Answers end, also if what makes them panics.
            let answer = std::panic::AssertUnwindSafe(desk.answer(request, pieces)).catch_unwind();
            let answered = cancel.run_until_cancelled(answer).await;
            drop(forget);
            let failed = match answered {
                Some(Ok(Err(error))) => error,
                Some(Err(_)) => Error::new(Kind::Internal, "what answers broke"),
                Some(Ok(Ok(()))) | None => return,
            };
            tracing::debug!(error = %failed, "a call was not answered to its end");
            let kind = match failed.kind() {
                Kind::Timeout => ProxyKind::Timeout,
                Kind::Exhausted => ProxyKind::PayloadTooLarge,
                _ => ProxyKind::UpstreamReset,
            };
            // In order behind what of the answer went out already.
            say(&desk.client, refusal(&id, kind, &failed.to_string())).await;
        });
    }

    /// Says something without holding the others up, unless there is too much that waits to be said.
    async fn say(&self, what: Up, running: &mut tokio::task::JoinSet<()>) {
        if running.len() < CALLS_MAX + TUNNELS_MAX + REFUSALS_MAX {
            let client = self.client.clone();
            running.spawn(async move { say(&client, what).await });
        } else {
            say(&self.client, what).await;
        }
    }

    /// What is not answered at all.
    fn refusal(&self, request: &ProxyHttpRequest) -> Option<(ProxyKind, String)> {
        let path = request.path.split('?').next().unwrap_or_default();
        let is_allowed = |allow: &Vec<String>| allow.iter().any(|pattern| fits(pattern, path));
        let (method, has_method) = (&request.method, Method::from_bytes(request.method.as_bytes()).is_ok());
        let is_dots = |part: &str| matches!(part.to_ascii_lowercase().replace("%2e", ".").as_str(), "." | "..");
        let is_odd = !path.starts_with('/') || path.split('/').any(is_dots);
        if !has_method || is_odd || request.path.parse::<Uri>().is_err() {
            return Some((ProxyKind::DecodeFailed, format!("{method:?} {:?} is no request", request.path)));
        }
        if !self.serve.allow.as_ref().is_none_or(is_allowed) {
            return Some((ProxyKind::AclDenied, format!("no terminator permits {method} {path}")));
        }
        let authorization = request.authorization.as_ref();
        let is_partial = authorization.is_some_and(|it| it.authority_mode == ON_BEHALF && it.resolved.is_none());
        if is_partial && !self.serve.allow_partial {
            return Some((ProxyKind::AclDenied, "the server does not say how far the authority goes".to_owned()));
        }
        if self.calls().len() >= CALLS_MAX {
            return Some((ProxyKind::SidecarUnavailable, format!("{CALLS_MAX} calls are being answered already")));
        }
        None
    }

    async fn answer(&self, request: ProxyHttpRequest, pieces: Option<Received<ProxyHttpBodyChunk>>) -> Result<()> {
        let patience = u64::try_from(request.timeout_ms).ok().filter(|ms| *ms > 0).map(Duration::from_millis);
        let patience = patience.unwrap_or(CEILING).min(CEILING);
        let late = || Error::new(Kind::Timeout, format!("no answer after {patience:?}"));
        let streams = request.stream_response_indefinitely;
        let id = request.request_id.clone();
        let limits = Limits {
            flush: streams,
            idle: streams.then(|| idle(request.stream_idle_timeout_ms)),
            bytes: u64::try_from(request.max_response_body_bytes).ok().filter(|bytes| *bytes > 0),
        };
        let begun = tokio::time::Instant::now();
        let handler = (self.serve.handler)(self.read(request, pieces)?);
        let response = tokio::time::timeout(patience, handler).await.map_err(|_| late())?;
        if streams {
            return self.send(&id, response, limits).await;
        }
        let sent = tokio::time::timeout_at(begun + patience, self.send(&id, response, limits)).await;
        sent.unwrap_or_else(|_| Err(late()))
    }

    async fn send(&self, id: &str, response: http::Response<Body>, limits: Limits) -> Result<()> {
        let (parts, body) = response.into_parts();
        let mut body = Box::pin(body);
        let (first, is_over) = if limits.flush { Default::default() } else { gather(&mut body).await? };
        limits.check(first.len() as u64)?;
        let mut head = ProxyHttpResponse {
            request_id: id.to_owned(),
            status_code: parts.status.as_u16().into(),
            headers: flat(&parts.headers),
            body_chunked: !is_over,
            ..ProxyHttpResponse::default()
        };
        let core = &self.client.core;
        if is_over {
            head.body = first.freeze();
            return core.put(Up::ProxyHttpResponse(Box::new(head)), Mark::Nothing, core.options.send_timeout).await;
        }
        core.put_bulk(Up::ProxyHttpResponse(Box::new(head))).await?;
        send_chunks(&self.client, id, false, first, body, limits).await
    }

    fn read(
        &self,
        request: ProxyHttpRequest,
        pieces: Option<Received<ProxyHttpBodyChunk>>,
    ) -> Result<http::Request<Body>> {
        let mut headers = unflat(&request.headers);
        if self.serve.headers == HeaderMode::Strict {
            mint(&mut headers, &request, self.serve.tenant.as_deref());
        }
        let body = match pieces {
            Some(pieces) => Body::of(Chunked { pieces, order: Pieces::default(), is_over: false }),
            None => Body::full(request.body),
        };
        let invalid = |e: http::Error| Error::invalid(format!("a call is no request: {e}")).with_source(e);
        let built = http::Request::builder().method(request.method.as_str()).uri(request.path.as_str());
        let mut read = built.body(body).map_err(invalid)?;
        *read.headers_mut() = headers;
        Ok(read)
    }
}

/// How long an answer that goes on may be silent. The published figure if it is not said.
fn idle(ms: i64) -> Duration {
    u64::try_from(ms).ok().filter(|ms| *ms > 0).map_or(Duration::from_secs(30), Duration::from_millis)
}

/// Takes a call out of the desk when it is over.
struct ForgetCall(Arc<Desk>, String);

impl Drop for ForgetCall {
    fn drop(&mut self) {
        self.0.calls().remove(&self.1);
    }
}

/// Takes a tunnel out of the desk when it is over.
struct Forget(Arc<Desk>, String);

impl Drop for Forget {
    fn drop(&mut self) {
        self.0.tunnels().remove(&self.1);
    }
}

fn refusal(id: &str, kind: ProxyKind, why: &str) -> Up {
    let error = Some(ProxyError { kind: kind.into(), message: why.to_owned() });
    Up::ProxyHttpResponse(Box::new(ProxyHttpResponse {
        request_id: id.to_owned(),
        error,
        ..ProxyHttpResponse::default()
    }))
}

async fn say(client: &Client, what: Up) {
    if let Err(error) = client.core.put_bulk(what).await {
        tracing::debug!(%error, "a refusal did not go out");
    }
}

/// A body in pieces, as it is sent here.
struct Chunked {
    pieces: Received<ProxyHttpBodyChunk>,
    order: Pieces,
    is_over: bool,
}

impl http_body::Body for Chunked {
    type Data = Bytes;
    type Error = Error;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<HttpFrame<Bytes>>>> {
        loop {
            if self.is_over {
                return Poll::Ready(None);
            }
            if let Some((data, fin)) = self.order.pop() {
                self.is_over = fin;
                if !data.is_empty() {
                    return Poll::Ready(Some(Ok(HttpFrame::data(data))));
                }
                continue;
            }
            let chunk = match futures_util::Stream::poll_next(Pin::new(&mut self.pieces), cx) {
                Poll::Pending => return Poll::Pending,
                Poll::Ready(chunk) => chunk,
            };
            let failed = match chunk {
                Some(chunk) => self.order.push(chunk).err(),
                None => Some(Error::new(Kind::Interrupted, "the body broke off, or was read too slowly")),
            };
            if let Some(error) = failed {
                self.is_over = true;
                return Poll::Ready(Some(Err(error)));
            }
        }
    }
}

const ON_BEHALF: &str = "on_behalf_of";

/// The headers that say who calls, anew.
fn mint(headers: &mut HeaderMap, request: &ProxyHttpRequest, tenant: Option<&str>) {
    let claimed: Vec<HeaderName> = headers.keys().filter(|name| is_claim(name.as_str())).cloned().collect();
    for name in claimed {
        headers.remove(name);
    }
    let mut set = |name: &'static str, value: &str| {
        if let (false, Ok(value)) = (value.is_empty(), HeaderValue::from_str(value)) {
            headers.insert(HeaderName::from_static(name), value);
        }
    };
    set("x-auth-tenant-id", tenant.unwrap_or_default());
    let on_behalf = request.authorization.as_ref().filter(|it| it.authority_mode == ON_BEHALF);
    let Some(AuthorizationContext { subject, grant_id, resolved, .. }) = on_behalf else {
        set("x-auth-authority-mode", "direct");
        return;
    };
    set("x-auth-authority-mode", ON_BEHALF);
    set("x-auth-grant-id", grant_id);
    if let Some(PrincipalRef { principal_type, principal_id }) = subject {
        set("x-auth-subject-type", principal_type);
        set("x-auth-subject-id", principal_id);
        set("x-auth-principal-type", principal_type);
        set("x-auth-user-id", principal_id);
    }
    if let Some(ResolvedAuthorityInfo {
        root_subject,
        audience_type,
        audience_id,
        max_access_level,
        workspace_scope,
        ..
    }) = resolved
    {
        set("x-auth-max-access-level", &max_access_level.to_string());
        set("x-auth-workspace-scope", &workspace_scope.join(","));
        set("x-auth-audience-type", audience_type);
        set("x-auth-audience-id", audience_id);
        if let Some(root) = root_subject {
            set("x-auth-root-subject-type", &root.principal_type);
            set("x-auth-root-subject-id", &root.principal_id);
        }
    }
}

fn is_claim(name: &str) -> bool {
    name.starts_with("x-auth-") || name.starts_with("x-aether-")
}

/// Whether a path fits a pattern, in which `*` stands for anything.
fn fits(pattern: &str, path: &str) -> bool {
    let mut parts = pattern.split('*');
    let Some(mut rest) = path.strip_prefix(parts.next().unwrap_or_default()) else { return false };
    let parts: Vec<&str> = parts.collect();
    let Some((last, middle)) = parts.split_last() else { return rest.is_empty() };
    for part in middle {
        let Some(at) = rest.find(part) else { return false };
        rest = &rest[at + part.len()..];
    }
    rest.ends_with(last)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_star_stands_for_anything() {
        let cases = [
            ("/*", "/", true),
            ("/*", "/a/b", true),
            ("/v1/*", "/v1/a/b", true),
            ("/v1/*", "/v2/a", false),
            ("/v1/*/end", "/v1/a/b/end", true),
            ("/v1/*/end", "/v1/end", false),
            ("/exact", "/exact", true),
            ("/exact", "/exactly", false),
            ("*", "/anything", true),
        ];
        for (pattern, path, expected) in cases {
            assert_eq!(fits(pattern, path), expected, "{pattern} {path}");
        }
    }

    #[test]
    fn strict_headers_cannot_be_claimed() {
        let mut headers = HeaderMap::new();
        headers.insert("x-auth-user-id", HeaderValue::from_static("root"));
        headers.insert("x-aether-actor-topic", HeaderValue::from_static("ag::a::b::c"));
        headers.insert("accept", HeaderValue::from_static("*/*"));
        let subject = Some(PrincipalRef { principal_type: "user".into(), principal_id: "alice".into() });
        let on_behalf = AuthorizationContext { authority_mode: ON_BEHALF.into(), subject, ..Default::default() };
        let request = ProxyHttpRequest { authorization: Some(on_behalf), ..ProxyHttpRequest::default() };
        mint(&mut headers, &request, Some("acme"));
        assert_eq!(headers["x-auth-user-id"], "alice");
        assert_eq!(headers["x-auth-tenant-id"], "acme");
        assert_eq!(headers["x-auth-authority-mode"], "on_behalf_of");
        assert!(!headers.contains_key("x-aether-actor-topic") && headers.contains_key("accept"));
        mint(&mut headers, &ProxyHttpRequest::default(), None);
        assert_eq!(headers["x-auth-authority-mode"], "direct");
        assert!(!headers.contains_key("x-auth-user-id"));
    }
}

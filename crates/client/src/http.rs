//! HTTP over the fabric: calls to services, and services that answer them.
//!
//! A call goes to a topic, such as `sv::memory::default`, through the same connection as everything else; the server says who
//! calls in headers that nobody can forge. [`Http`] is a [`tower_service::Service`], so that whatever wraps those wraps this;
//! [`Http::get`] and its sisters make calls in a few words. [`Client::serve_http`] answers calls with any service of the kind, such
//! as an `axum::Router`.
//!
//! Bodies over 256 KiB go in pieces of that, in both directions. A header has one value in the contract: repeated ones are joined
//! with `, `, but for cookies that are set, of which the last one is kept. A call does not survive a break of the connection.

mod body;
mod serve;

use std::{
    collections::HashMap,
    fmt,
    pin::Pin,
    task::{Context, Poll},
    time::Duration,
};

use bytes::{Bytes, BytesMut};
use http::{HeaderMap, HeaderName, HeaderValue, Method, StatusCode, Uri};
use http_body_util::BodyExt as _;
use serde::{Serialize, de::DeserializeOwned};
use trunkline_proto::v1::{
    AuthorizationContext, ProxyError, ProxyHttpBodyChunk, ProxyHttpRequest, ProxyHttpResponse,
    downstream_message::Payload as Down, proxy_error, upstream_message::Payload as Up,
};

pub use self::{
    body::Body,
    serve::{HeaderMode, Serve, Serving},
};
use crate::{
    connection::{Client, feed::Mark, lane::Received},
    error::{Error, Kind, Result},
    message::to_json,
    routes::Frame,
    task::millis,
    topic::Topic,
};

/// Largest piece of a body. The published figure.
pub(crate) const CHUNK: usize = 256 * 1024;

/// How long a call may take. The published figure.
const TIMEOUT: Duration = Duration::from_secs(30);

/// Frames of one call that are not taken yet. There is no way to hold up the other side of a proxied body, so that a call whose
/// reader falls behind further than 64 times this (32 MiB in whole pieces) fails, and no other does.
const FRAMES: usize = 2;

/// A place that calls go to. Cheap to clone; many calls can be under way at once.
///
/// ```no_run
/// # async fn f(agent: trunkline_client::Agent) -> trunkline_client::Result<()> {
/// use trunkline_client::Topic;
/// let memory = agent.http(Topic::any_service("memory")?);
/// let found: serde_json::Value = memory.get("/v1/memories/abc").send().await?.json().await?;
/// # Ok(()) }
/// ```
#[derive(Clone, Debug)]
pub struct Http {
    client: Client,
    template: ProxyHttpRequest,
    timeout: Duration,
}

impl Client {
    /// A place that HTTP calls go to.
    #[must_use]
    pub fn http(&self, to: impl Into<Topic>) -> Http {
        let template = ProxyHttpRequest { target_topic: to.into().as_str().to_owned(), ..ProxyHttpRequest::default() };
        Http { client: self.clone(), template, timeout: TIMEOUT }
    }
}

impl Http {
    /// How long a call may take: 30 s without this. Of an answer that is [streamed](RequestBuilder::stream), it is the time until it
    /// begins.
    #[must_use]
    pub fn timeout(mut self, timeout: Duration) -> Self {
        self.timeout = timeout;
        self
    }

    /// On behalf of somebody else, by a grant.
    #[must_use]
    pub fn authorized(mut self, authorization: impl Into<AuthorizationContext>) -> Self {
        self.template.authorization = Some(authorization.into());
        self
    }

    /// The workspace that the caller acts for.
    #[must_use]
    pub fn for_workspace(mut self, workspace: impl Into<String>) -> Self {
        self.template.app_workspace = workspace.into();
        self
    }

    /// One of several backends behind the target.
    #[must_use]
    pub fn backend(mut self, name: impl Into<String>) -> Self {
        self.template.backend_name = name.into();
        self
    }

    /// Whoever answers may follow redirects by itself. Without this they come back.
    #[must_use]
    pub fn follow_redirects(mut self) -> Self {
        self.template.follow_redirects = true;
        self
    }

    /// Anything else that the contract has.
    #[must_use]
    pub fn with(mut self, change: impl FnOnce(&mut ProxyHttpRequest)) -> Self {
        change(&mut self.template);
        self
    }

    /// A call in a few words. The path is with its query; host and scheme of a whole URL are ignored.
    pub fn request(&self, method: Method, path: impl AsRef<str>) -> RequestBuilder {
        let path = match path.as_ref().parse::<Uri>() {
            Ok(uri) => Ok(uri),
            Err(e) => Err(Error::invalid(format!("path {:?}: {e}", path.as_ref())).with_source(e)),
        };
        RequestBuilder { http: self.clone(), method, path, headers: HeaderMap::new(), body: Ok(Body::empty()) }
    }

    /// A call with `GET`.
    pub fn get(&self, path: impl AsRef<str>) -> RequestBuilder {
        self.request(Method::GET, path)
    }

    /// A call with `POST`.
    pub fn post(&self, path: impl AsRef<str>) -> RequestBuilder {
        self.request(Method::POST, path)
    }

    /// A call with `PUT`.
    pub fn put(&self, path: impl AsRef<str>) -> RequestBuilder {
        self.request(Method::PUT, path)
    }

    /// A call with `DELETE`.
    pub fn delete(&self, path: impl AsRef<str>) -> RequestBuilder {
        self.request(Method::DELETE, path)
    }

    /// Makes a call. The answer's body comes as it is read.
    ///
    /// # Errors
    /// By kind: [`Kind::Denied`], [`Kind::Unavailable`] if nobody is there to answer, [`Kind::Timeout`], [`Kind::Interrupted`],
    /// [`Kind::Exhausted`] for a body that is too large. An answer with a status of 400 or more is an answer.
    pub async fn call<B>(&self, request: http::Request<B>) -> Result<http::Response<Body>>
    where
        B: http_body::Body<Data = Bytes> + Send + 'static,
        B::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
    {
        let called = tokio::time::timeout(self.timeout, self.begin(request)).await;
        called.unwrap_or_else(|_| {
            Err(Error::new(Kind::Timeout, format!("no answer to an HTTP call after {:?}", self.timeout)))
        })
    }

    async fn begin<B>(&self, request: http::Request<B>) -> Result<http::Response<Body>>
    where
        B: http_body::Body<Data = Bytes> + Send + 'static,
        B::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
    {
        let (parts, body) = request.into_parts();
        let mut body = Box::pin(body);
        let core = &self.client.core;
        let request_id = uuid::Uuid::new_v4().to_string();
        let path = parts.uri.path_and_query().map_or("/", |path| path.as_str()).to_owned();
        let (first, is_whole) = gather(&mut body).await?;
        let mut head = ProxyHttpRequest {
            request_id: request_id.clone(),
            method: parts.method.as_str().to_owned(),
            path,
            headers: flat(&parts.headers),
            timeout_ms: millis(self.timeout),
            body_chunked: !is_whole,
            ..self.template.clone()
        };
        let frames = Received::of(&core.routes.open(&request_id, FRAMES, &core.room));
        let streams = head.stream_response_indefinitely;
        let ms = u64::try_from(head.stream_idle_timeout_ms).ok().filter(|ms| *ms > 0);
        let limits = Limits {
            flush: false,
            idle: streams.then(|| ms.map_or(TIMEOUT, Duration::from_millis)),
            bytes: u64::try_from(head.max_response_body_bytes).ok().filter(|bytes| *bytes > 0),
        };
        let until = (!streams).then(|| tokio::time::Instant::now().checked_add(self.timeout)).flatten();
        let call = Call { client: self.client.clone(), id: request_id, frames, limits, until };
        if is_whole {
            head.body = first.freeze();
            core.put(Up::ProxyHttpRequest(Box::new(head)), Mark::Nothing, core.options.send_timeout).await?;
        } else {
            core.put_bulk(Up::ProxyHttpRequest(Box::new(head))).await?;
            send_chunks(&self.client, &call.id, true, first, body, Limits::default()).await?;
        }
        call.answer().await
    }
}

/// Reads until there is more than one piece, or the end; answers whether it was the end.
pub(crate) async fn gather<B>(body: &mut Pin<Box<B>>) -> Result<(BytesMut, bool)>
where
    B: http_body::Body<Data = Bytes>,
    B::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
{
    let mut read = BytesMut::new();
    while read.len() <= CHUNK {
        match next_data(body).await? {
            Some(data) => read.extend_from_slice(&data),
            None => return Ok((read, true)),
        }
    }
    Ok((read, false))
}

/// What a body must keep to that goes in pieces.
#[derive(Clone, Copy, Default)]
pub(crate) struct Limits {
    /// Each piece goes at once, however small.
    pub(crate) flush: bool,
    /// How long it may be silent.
    pub(crate) idle: Option<Duration>,
    /// How much it may be.
    pub(crate) bytes: Option<u64>,
}

impl Limits {
    pub(crate) fn check(&self, bytes: u64) -> Result<()> {
        match self.bytes {
            Some(most) if bytes > most => {
                Err(Error::new(Kind::Exhausted, format!("a body of more than {most} bytes, which was the limit")))
            }
            _ => Ok(()),
        }
    }

    /// The next of what comes, if it comes in time.
    async fn within<T>(&self, next: impl Future<Output = Result<T>>) -> Result<T> {
        match self.idle {
            Some(idle) => {
                let late = || Error::new(Kind::Timeout, format!("nothing came for {idle:?}"));
                tokio::time::timeout(idle, next).await.unwrap_or_else(|_| Err(late()))
            }
            None => next.await,
        }
    }
}

async fn next_data<B>(body: &mut Pin<Box<B>>) -> Result<Option<Bytes>>
where
    B: http_body::Body<Data = Bytes>,
    B::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
{
    while let Some(frame) = body.frame().await {
        let frame = frame.map_err(|e| Error::invalid(format!("a body could not be read: {}", e.into())))?;
        // Trailers have no place in the contract.
        if let Ok(data) = frame.into_data()
            && !data.is_empty()
        {
            return Ok(Some(data));
        }
    }
    Ok(None)
}

/// Sends what was read of a body and what is left of it, in pieces; the last one says so.
pub(crate) async fn send_chunks<B>(
    client: &Client,
    id: &str,
    is_request: bool,
    mut read: BytesMut,
    mut body: Pin<Box<B>>,
    limits: Limits,
) -> Result<()>
where
    B: http_body::Body<Data = Bytes>,
    B::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
{
    let (mut seq, mut total) = (0, read.len() as u64);
    let mut send = async |data: Bytes, fin: bool| {
        let chunk = ProxyHttpBodyChunk { request_id: id.to_owned(), is_request, seq, data, fin };
        seq += 1;
        client.core.put_bulk(Up::ProxyHttpBodyChunk(Box::new(chunk))).await
    };
    loop {
        while read.len() >= CHUNK || (limits.flush && !read.is_empty()) {
            let piece = read.split_to(read.len().min(CHUNK)).freeze();
            send(piece, false).await?;
        }
        match limits.within(next_data(&mut body)).await? {
            Some(data) => {
                total += data.len() as u64;
                limits.check(total)?;
                read.extend_from_slice(&data);
            }
            None => return send(read.freeze(), true).await,
        }
    }
}

/// A call that is under way.
pub(crate) struct Call {
    client: Client,
    id: String,
    frames: Received<Frame>,
    limits: Limits,
    /// When the whole answer has to be there.
    until: Option<tokio::time::Instant>,
}

impl Call {
    async fn answer(mut self) -> Result<http::Response<Body>> {
        let mut early = Vec::new();
        loop {
            match self.frames.next().await {
                Some(Frame::Down(Down::ProxyHttpResponse(head))) => {
                    let ProxyHttpResponse { status_code, headers, body, body_chunked, error, .. } = *head;
                    if let Some(error) = error {
                        return Err(proxy_error(&error));
                    }
                    let body = if body_chunked { Body::incoming(self, early) } else { Body::full(body) };
                    return response(status_code, &headers, body);
                }
                // The published server does not keep the two in order.
                Some(Frame::Down(Down::ProxyHttpBodyChunk(chunk))) if early.len() < 64 => early.push(*chunk),
                Some(Frame::Failed(error)) => return Err(error),
                Some(Frame::Down(_)) => {}
                None => return Err(self.client.core.over().unwrap_or_else(crate::connection::closed)),
            }
        }
    }
}

impl Drop for Call {
    fn drop(&mut self) {
        self.client.core.routes.close(&self.id);
    }
}

/// What somebody on the way has against a call.
pub(crate) fn proxy_error(error: &ProxyError) -> Error {
    use proxy_error::Kind as P;
    let kind = match error.kind() {
        P::AclDenied => Kind::Denied,
        P::Timeout => Kind::Timeout,
        P::DialFailed | P::SidecarUnavailable => Kind::Unavailable,
        P::UpstreamReset => Kind::Interrupted,
        P::PayloadTooLarge => Kind::Exhausted,
        P::DecodeFailed => Kind::Invalid,
        P::Unknown => Kind::Refused,
    };
    Error::from_proxy(kind, error.kind().as_str_name(), &error.message)
}

fn response(status: i32, headers: &HashMap<String, String>, body: Body) -> Result<http::Response<Body>> {
    let status = u16::try_from(status).ok().and_then(|status| StatusCode::from_u16(status).ok());
    let status = status.ok_or_else(|| Error::new(Kind::Internal, "an answer to an HTTP call has no status"))?;
    let mut response = http::Response::new(body);
    *response.status_mut() = status;
    *response.headers_mut() = unflat(headers);
    Ok(response)
}

/// One value a name.
pub(crate) fn flat(headers: &HeaderMap) -> HashMap<String, String> {
    let mut flat: HashMap<String, String> = HashMap::new();
    for (name, value) in headers {
        let value = String::from_utf8_lossy(value.as_bytes());
        let is_cookie = name == http::header::SET_COOKIE;
        let joined = flat.entry(name.as_str().to_owned()).or_default();
        if joined.is_empty() || is_cookie {
            *joined = value.into_owned();
        } else {
            joined.push_str(", ");
            joined.push_str(&value);
        }
    }
    flat
}

/// What is no header is left out.
pub(crate) fn unflat(headers: &HashMap<String, String>) -> HeaderMap {
    let read = headers.iter().filter_map(|(name, value)| {
        Some((HeaderName::from_bytes(name.as_bytes()).ok()?, HeaderValue::from_bytes(value.as_bytes()).ok()?))
    });
    read.collect()
}

impl<B> tower_service::Service<http::Request<B>> for Http
where
    B: http_body::Body<Data = Bytes> + Send + 'static,
    B::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
{
    type Response = http::Response<Body>;
    type Error = Error;
    type Future = Pin<Box<dyn Future<Output = Result<Self::Response>> + Send>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: http::Request<B>) -> Self::Future {
        let http = self.clone();
        Box::pin(async move { Http::call(&http, request).await })
    }
}

/// A call that is being put together.
#[must_use = "a call is made by send"]
pub struct RequestBuilder {
    http: Http,
    method: Method,
    path: Result<Uri>,
    headers: HeaderMap,
    body: Result<Body>,
}

impl RequestBuilder {
    /// With a header. One that cannot be one fails the call.
    pub fn header(mut self, name: &str, value: &str) -> Self {
        match (HeaderName::from_bytes(name.as_bytes()), HeaderValue::from_str(value)) {
            (Ok(name), Ok(value)) => {
                self.headers.append(name, value);
            }
            _ => self.path = Err(Error::invalid(format!("{name:?} cannot be a header"))),
        }
        self
    }

    /// With a body.
    pub fn body(mut self, body: impl Into<Bytes>) -> Self {
        self.body = Ok(Body::full(body.into()));
        self
    }

    /// With a body that is made while it is sent.
    pub fn body_stream<B>(mut self, body: B) -> Self
    where
        B: http_body::Body<Data = Bytes> + Send + 'static,
        B::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
    {
        self.body = Ok(Body::of(body));
        self
    }

    /// With a value as JSON.
    pub fn json(mut self, value: &(impl Serialize + ?Sized)) -> Self {
        self.headers.insert(http::header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
        self.body = to_json(value).map(Body::full);
        self
    }

    /// The answer goes on for as long as it likes, such as a stream of events. It may be silent for so long; 30 s for zero, the
    /// published figure.
    pub fn stream(mut self, idle: Duration) -> Self {
        self.http.template.stream_response_indefinitely = true;
        self.http.template.stream_idle_timeout_ms = millis(idle);
        self
    }

    /// An answer with more bytes than this fails.
    pub fn limit(mut self, bytes: u64) -> Self {
        self.http.template.max_response_body_bytes = i64::try_from(bytes).unwrap_or(i64::MAX);
        self
    }

    /// Makes the call.
    ///
    /// # Errors
    /// As [`Http::call`]; [`Kind::Invalid`] for a path, a header or a body that cannot be one.
    pub async fn send(self) -> Result<Response> {
        let mut request = http::Request::new(self.body?);
        (*request.method_mut(), *request.uri_mut(), *request.headers_mut()) = (self.method, self.path?, self.headers);
        let (parts, body) = self.http.call(request).await?.into_parts();
        Ok(Response { parts, body })
    }
}

/// The answer to a call.
pub struct Response {
    parts: http::response::Parts,
    body: Body,
}

impl Response {
    /// Its status.
    #[must_use]
    pub fn status(&self) -> StatusCode {
        self.parts.status
    }

    /// Its headers.
    #[must_use]
    pub fn headers(&self) -> &HeaderMap {
        &self.parts.headers
    }

    /// The next piece of its body, or `None` at its end.
    ///
    /// # Errors
    /// If the body broke off.
    pub async fn chunk(&mut self) -> Result<Option<Bytes>> {
        while let Some(frame) = self.body.frame().await {
            if let Ok(data) = frame?.into_data() {
                return Ok(Some(data));
            }
        }
        Ok(None)
    }

    /// Its whole body.
    ///
    /// # Errors
    /// If the body broke off.
    pub async fn bytes(self) -> Result<Bytes> {
        Ok(self.body.collect().await?.to_bytes())
    }

    /// Its whole body as text; what is no UTF-8 is replaced.
    ///
    /// # Errors
    /// If the body broke off.
    pub async fn text(self) -> Result<String> {
        Ok(String::from_utf8_lossy(&self.bytes().await?).into_owned())
    }

    /// Its whole body, read as JSON.
    ///
    /// # Errors
    /// If the body broke off, or is not what was expected.
    pub async fn json<T: DeserializeOwned>(self) -> Result<T> {
        let status = self.status();
        serde_json::from_slice(&self.bytes().await?)
            .map_err(|e| Error::invalid(format!("an answer with status {status}: {e}")).with_source(e))
    }

    /// As the `http` crate has it.
    #[must_use]
    pub fn into_http(self) -> http::Response<Body> {
        http::Response::from_parts(self.parts, self.body)
    }
}

impl fmt::Debug for Response {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Response {{ {}, {:?} }}", self.parts.status, self.parts.headers)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn headers_have_one_value_and_cookies_the_last() {
        let mut headers = HeaderMap::new();
        for (name, value) in [("accept", "a"), ("accept", "b"), ("set-cookie", "x=1"), ("set-cookie", "y=2")] {
            headers.append(name, HeaderValue::from_static(value));
        }
        let flat = flat(&headers);
        assert_eq!((flat["accept"].as_str(), flat["set-cookie"].as_str()), ("a, b", "y=2"));
        let odd = HashMap::from([("no header".to_owned(), "x".to_owned()), ("ok".to_owned(), "y".to_owned())]);
        assert_eq!(unflat(&odd).len(), 1);
    }
}

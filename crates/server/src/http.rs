//! What the HTTP surfaces share: who is asking, how large a body may be, which pages may ask.

use std::{net::IpAddr, sync::Arc, time::Duration};

use axum::{
    Router,
    body::Body,
    extract::{FromRequestParts, Path, Request, State},
    http::{
        Extensions, HeaderMap, HeaderName, HeaderValue, Method, StatusCode, Uri, Version, header, request::Parts,
        uri::Authority,
    },
    middleware::{self, Next},
    response::{IntoResponse as _, Response},
};
use bytes::{Bytes, BytesMut};
use futures_util::StreamExt as _;
use tokio_util::sync::CancellationToken;
use tower_http::{
    compression::{CompressionLayer, Predicate, predicate::SizeAbove},
    cors::{AllowOrigin, CorsLayer},
};
use trunkline_core::{Error, Kind, caller::Caller, limits::Limits};
use url::{Origin, Url};

use crate::{
    auth::{Auth, Ended},
    config::ConfigError,
    error::{NOT_ALLOWED, Refusal, TOO_LARGE, TOO_SLOW},
    listen::{Exchange, Peer},
    metrics::Metrics,
    repeats::Repeats,
    sse::Streams,
};

/// Header by which a request that is sent again takes effect once.
const IDEMPOTENCY_KEY: HeaderName = HeaderName::from_static("idempotency-key");

/// Smaller answers fit a packet as they are.
const COMPRESSED_BYTES_MIN: u16 = 1024;

/// Longest of those, in bytes.
const KEY_BYTES_MAX: usize = 256;

/// How long a body may take: the largest one at 9 kB a second.
const BODY_TIMEOUT: Duration = Duration::from_secs(120);

/// Bytes of a body that are read to be thrown away.
const DRAIN_BYTES_MAX: usize = 16 * 1024 * 1024;

/// How long the body of a request that is refused may take: its client hears so while it still sends, if it looks.
const DRAIN_TIMEOUT: Duration = Duration::from_secs(10);

/// By which browsers say what a request is for.
const SEC_FETCH_SITE: HeaderName = HeaderName::from_static("sec-fetch-site");
const SEC_FETCH_MODE: HeaderName = HeaderName::from_static("sec-fetch-mode");
const SEC_FETCH_DEST: HeaderName = HeaderName::from_static("sec-fetch-dest");

/// By which a browser's event stream says what it had last.
pub(crate) const LAST_EVENT_ID: HeaderName = HeaderName::from_static("last-event-id");

/// Under which the users of apps ask.
const APPS: &str = "/api/v2/";

/// The cookie that carries a token where a browser sends no header.
const COOKIE: &str = "trunkline_token";

/// What every surface needs.
#[derive(Clone)]
pub(crate) struct Web {
    pub(crate) auth: Auth,
    pub(crate) limits: Limits,
    pub(crate) stop: CancellationToken,
    pub(crate) metrics: Arc<Metrics>,
    pub(crate) streams: Streams,
    pub(crate) repeats: Repeats,
    /// Browsers come with TLS.
    pub(crate) is_tls: bool,
}

/// What a request says besides its body. Whom it is from is not looked at yet.
pub(crate) struct Asked {
    headers: HeaderMap,
    query: Vec<(String, String)>,
    /// Whom it is for, where HTTP/2 says that in the address.
    authority: Option<String>,
    peer: Option<Peer>,
    /// Of what a browser sends.
    exchange: Option<Exchange>,
}

impl<S: Send + Sync> FromRequestParts<S> for Asked {
    type Rejection = std::convert::Infallible;

    async fn from_request_parts(parts: &mut Parts, _state: &S) -> Result<Self, Self::Rejection> {
        let peer = parts.extensions.get::<Peer>().copied();
        let exchange = parts.extensions.get::<Exchange>().cloned();
        let query = match parts.uri.query() {
            Some(_) => axum::extract::Query::try_from_uri(&parts.uri).map(|query| query.0).unwrap_or_default(),
            None => Vec::new(),
        };
        // Nobody looks for them behind this.
        let authority = parts.uri.authority().map(ToString::to_string);
        Ok(Self { headers: std::mem::take(&mut parts.headers), query, authority, peer, exchange })
    }
}

/// An id in a request's path. What is not text is the id of nothing, and is refused as any other, in its turn.
pub(crate) struct PathId(pub(crate) String);

impl<S: Send + Sync> FromRequestParts<S> for PathId {
    type Rejection = std::convert::Infallible;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, Self::Rejection> {
        let id = Path::<String>::from_request_parts(parts, state).await.map(|Path(id)| id);
        Ok(Self(id.unwrap_or_else(|_| char::REPLACEMENT_CHARACTER.to_string())))
    }
}

impl Asked {
    /// A parameter of the address.
    pub(crate) fn param(&self, name: &str) -> Option<&str> {
        self.query.iter().find(|(key, _)| key == name).map(|(_, value)| value.as_str())
    }

    /// What tells whether a browser sends this again; nothing of other clients, and of what has a key already.
    pub(crate) fn exchange(&self) -> Option<Exchange> {
        self.exchange.clone().filter(|_| !self.headers.contains_key(IDEMPOTENCY_KEY))
    }

    /// What a header says, if that is text.
    pub(crate) fn header(&self, name: &HeaderName) -> Option<&str> {
        self.headers.get(name)?.to_str().ok()
    }

    /// Who is asking: by the `Authorization` header.
    pub(crate) async fn caller(&self, web: &Web) -> Result<Arc<Caller>, Error> {
        self.admit(web, self.header_token()?).await
    }

    /// Who is asking for a stream of events: also by `access_token` in the address, or by a cookie, because a browser's event
    /// streams send no header of one's own.
    pub(crate) async fn viewer(&self, web: &Web) -> Result<Arc<Caller>, Error> {
        let token = self.header_token()?.or_else(|| self.param("access_token")).or_else(|| self.cookie());
        self.admit(web, token).await
    }

    async fn admit(&self, web: &Web, token: Option<&str>) -> Result<Arc<Caller>, Error> {
        web.auth.bearer(token.filter(|token| !token.is_empty()), self.peer.map(|peer| peer.0)).await
    }

    fn header_token(&self) -> Result<Option<&str>, Error> {
        let Some(value) = self.headers.get(header::AUTHORIZATION) else { return Ok(None) };
        let token = value.to_str().ok().and_then(|value| {
            let (scheme, token) = value.split_once(' ')?;
            scheme.eq_ignore_ascii_case("bearer").then_some(token.trim())
        });
        let refused = "the Authorization header is not \"Bearer\" and a token";
        token.map(Some).ok_or_else(|| Error::new(Kind::Unauthenticated, "ERR_UNAUTHENTICATED", refused))
    }

    fn cookie(&self) -> Option<&str> {
        let all = self.headers.get_all(header::COOKIE).iter().filter_map(|value| value.to_str().ok());
        let mut all = all.flat_map(|value| value.split(';')).filter_map(|cookie| cookie.trim().split_once('='));
        all.find(|(name, _)| *name == COOKIE).map(|(_, value)| value)
    }

    /// The request's name for itself, empty for none.
    pub(crate) fn idempotency_key(&self) -> Result<&str, Error> {
        let Some(value) = self.headers.get(IDEMPOTENCY_KEY) else { return Ok("") };
        let key = value.to_str().ok().filter(|key| key.len() <= KEY_BYTES_MAX);
        key.ok_or_else(|| {
            let message = format!("an Idempotency-Key is text of at most {KEY_BYTES_MAX} bytes");
            Error::new(Kind::Invalid, "ERR_INVALID_ARGUMENT", message)
        })
    }

    /// The id of the last event that a stream's client had: from the header, or from the address for clients that send no header of
    /// their own.
    pub(crate) fn last_event(&self) -> Option<&str> {
        let header = self.headers.get(LAST_EVENT_ID).and_then(|value| value.to_str().ok());
        header.or_else(|| self.param("lastEventId")).map(str::trim).filter(|id| !id.is_empty())
    }

    /// How whoever asks reached this server.
    pub(crate) fn own_address(&self, is_tls: bool) -> String {
        let host = self.headers.get(header::HOST).and_then(|host| host.to_str().ok());
        let host = host.or(self.authority.as_deref()).unwrap_or("localhost");
        format!("{}://{host}", if is_tls { "https" } else { "http" })
    }

    /// Refuses what a page of another site makes a browser ask without saying so, as for a picture or by a link. For requests
    /// that change something although they only read.
    pub(crate) fn check_own_site(&self) -> Result<(), Error> {
        if is_of_another_site(&self.headers) { Err(of_another_site()) } else { Ok(()) }
    }

    /// The number of the last event that a stream's client had; nothing for what is no number.
    pub(crate) fn last_event_id(&self) -> Option<u64> {
        self.last_event()?.parse().ok()
    }
}

/// A body for whom it is already known that it may send one; for whom it may not, the refusal. Nothing of a body is kept before
/// that.
pub(crate) async fn body_of<T>(known: Result<T, Error>, from: Body, most: usize) -> Result<(T, Bytes), Error> {
    match known {
        Ok(known) => Ok((known, body(from, most).await?)),
        Err(refusal) => {
            // Too long, too large or broken: it is refused all the same.
            let _ = tokio::time::timeout(DRAIN_TIMEOUT, whole(from, 0)).await;
            Err(refusal)
        }
    }
}

/// A body, if it is not too large. What is too large is read to its end all the same, up to [`DRAIN_BYTES_MAX`]: a client
/// that is still sending does not hear an answer.
pub(crate) async fn body(body: Body, most: usize) -> Result<Bytes, Error> {
    let read = tokio::time::timeout(BODY_TIMEOUT, whole(body, most)).await;
    read.unwrap_or_else(|_| {
        let message = format!("the body did not come within {} s", BODY_TIMEOUT.as_secs());
        Err(Error::new(Kind::Invalid, TOO_SLOW, message))
    })
}

async fn whole(body: Body, most: usize) -> Result<Bytes, Error> {
    let (mut frames, mut kept, mut size) = (body.into_data_stream(), BytesMut::new(), 0);
    while let Some(frame) = frames.next().await {
        let broken = |e| Error::new(Kind::Invalid, "ERR_INVALID_ARGUMENT", format!("the body cannot be read: {e}"));
        let frame = frame.map_err(broken)?;
        size += frame.len();
        if size <= most {
            // Copied, for the frame may be a byte of a larger buffer.
            kept.extend_from_slice(&frame);
        } else if size > DRAIN_BYTES_MAX {
            break;
        }
    }
    if size > most {
        return Err(Error::new(Kind::Invalid, TOO_LARGE, format!("the body has more than {most} bytes")));
    }
    Ok(kept.freeze())
}

/// Why an open stream ends, as its client is told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Ending {
    /// The server stops.
    Shutdown,
    /// What the caller came in with is not good any more: another token is needed.
    Credential(Ended),
}

impl std::fmt::Display for Ending {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Shutdown => f.write_str("server shutting down"),
            Self::Credential(ended) => ended.fmt(f),
        }
    }
}

/// Returns when the server stops, or when what the caller came in with is not good any more.
pub(crate) fn ending(web: &Web, caller: Arc<Caller>) -> impl Future<Output = Ending> + Send + use<> {
    let (auth, stop) = (web.auth.clone(), web.stop.clone());
    async move {
        tokio::select! {
            () = stop.cancelled() => Ending::Shutdown,
            ended = auth.ended(&caller) => Ending::Credential(ended),
        }
    }
}

/// The origins that the settings allow, as browsers write them.
pub(crate) fn origins(allowed: &[String]) -> Result<Vec<HeaderValue>, ConfigError> {
    let origin = |text: &String| {
        let url = Url::parse(text)
            .ok()
            .filter(|url| url.as_str().trim_end_matches('/') == origin_of(url) && !text.contains('*'));
        url.and_then(|url| HeaderValue::try_from(origin_of(&url)).ok()).ok_or_else(|| {
            let why = format!("http.allowed_origins: {text:?} is no origin such as https://app.example.org");
            ConfigError::Content(why)
        })
    };
    allowed.iter().map(origin).collect()
}

/// The origin of the address at which browsers find this server; nothing if none is set.
pub(crate) fn public_origin(public_url: &str) -> Result<Option<HeaderValue>, ConfigError> {
    if public_url.is_empty() {
        return Ok(None);
    }
    let is_address =
        |url: &Url| matches!(url.scheme(), "http" | "https") && url.query().is_none() && url.fragment().is_none();
    let origin = Url::parse(public_url).ok().filter(is_address).map(|url| origin_of(&url));
    origin.and_then(|origin| HeaderValue::try_from(origin).ok()).map(Some).ok_or_else(|| {
        let why = format!("conversation.public_url: {public_url:?} is no address such as https://chat.example.org");
        ConfigError::Content(why)
    })
}

/// As a browser writes it: in lower case, without the scheme's own port. Apps' own schemes have a host and no more.
fn origin_of(url: &Url) -> String {
    match url.origin() {
        Origin::Opaque(_) => {
            let port = url.port().map(|port| format!(":{port}")).unwrap_or_default();
            format!("{}://{}{port}", url.scheme(), url.host_str().unwrap_or_default())
        }
        origin => origin.ascii_serialization(),
    }
}

/// Which pages may use the surfaces.
pub(crate) struct Pages {
    /// Of other servers, and of this one as proxies show it.
    pub(crate) origins: Vec<HeaderValue>,
    /// Whoever reaches this server by another name than this machine's own is refused. Who admits everybody on this machine
    /// does not mean pages whose name somebody points at it.
    pub(crate) own_hosts_only: bool,
}

/// The surfaces, for pages of this server and of the allowed origins.
pub(crate) fn site(surfaces: Router, pages: Pages) -> Site {
    let Pages { origins, own_hosts_only } = pages;
    let cors = CorsLayer::new()
        .allow_origin(AllowOrigin::list(origins.clone()))
        .allow_methods([Method::GET, Method::POST, Method::DELETE])
        .allow_headers([header::AUTHORIZATION, header::CONTENT_TYPE, IDEMPOTENCY_KEY, LAST_EVENT_ID])
        .allow_credentials(true)
        .max_age(Duration::from_secs(3600));
    let plain = surfaces.fallback(not_found).method_not_allowed_fallback(not_allowed);
    let own_pages = middleware::from_fn_with_state(Arc::<[HeaderValue]>::from(origins), own_pages);
    let plain = plain.layer(compression());
    let for_pages = plain.clone().layer(cors).layer(own_pages);
    let embedded = Router::new().fallback(async || Refusal(of_another_site()));
    // Whoever is no page does not pay for them.
    let elsewhere = own_hosts_only.then(elsewhere);
    Site { plain, for_pages, apps: None, embedded: Some(embedded), elsewhere }
}

/// JSON is compressed for clients that take it so. Streams and files are not: they would wait, and most files are compressed already.
pub(crate) fn compression() -> CompressionLayer<impl Predicate> {
    let is_json = |_: StatusCode, _: Version, headers: &HeaderMap, _: &Extensions| {
        headers.get(header::CONTENT_TYPE).is_some_and(|kind| kind.as_bytes().starts_with(b"application/json"))
            && !headers.contains_key(header::ACCEPT_RANGES)
    };
    CompressionLayer::new().compress_when(SizeAbove::new(COMPRESSED_BYTES_MIN).and(is_json))
}

/// For whoever names another host than this machine.
fn elsewhere() -> Router {
    Router::new().fallback(async || {
        let message = "with --dev, this server is reached as localhost or by a loopback address only";
        Refusal(Error::new(Kind::Denied, "ERR_HOST", message))
    })
}

/// What a listener serves, by who asks.
#[derive(Clone)]
pub(crate) struct Site {
    plain: Router,
    for_pages: Router,
    /// What looks after its pages by itself.
    apps: Option<Router>,
    /// For what pages of other sites embed, where that matters.
    embedded: Option<Router>,
    /// For whoever does not mean this machine, where that matters.
    elsewhere: Option<Router>,
}

impl Site {
    /// The same for everybody; with `own_hosts_only` as in [`Pages::own_hosts_only`].
    pub(crate) fn same(router: Router, own_hosts_only: bool) -> Self {
        let elsewhere = own_hosts_only.then(elsewhere);
        Self { plain: router.clone(), for_pages: router, apps: None, embedded: None, elsewhere }
    }

    /// With what is under [`APPS`], which looks after its pages by itself.
    pub(crate) fn with_apps(self, apps: Router) -> Self {
        Self { apps: Some(apps), ..self }
    }

    /// What answers a request.
    pub(crate) fn router(&self, headers: &HeaderMap, uri: &Uri) -> &Router {
        match &self.elsewhere {
            Some(elsewhere) if !is_for_loopback(headers, uri) => elsewhere,
            _ if uri.path().starts_with(APPS) => self.apps.as_ref().unwrap_or(&self.plain),
            _ if headers.contains_key(header::ORIGIN) => &self.for_pages,
            _ if is_of_another_site(headers) && (!is_link(headers) || changes_something(uri.path())) => {
                self.embedded.as_ref().unwrap_or(&self.plain)
            }
            _ => &self.plain,
        }
    }
}

/// Whether a browser asks because of a page of another site, which says nothing of it: where pages say who they are, that counts.
fn is_of_another_site(headers: &HeaderMap) -> bool {
    let site = headers.get(SEC_FETCH_SITE);
    !headers.contains_key(header::ORIGIN) && site.is_some_and(|site| site != "same-origin" && site != "none")
}

/// Whether a person follows a link, which shows the answer in place of the other page and not in it.
fn is_link(headers: &HeaderMap) -> bool {
    let is_whole = headers.get(SEC_FETCH_DEST).is_none_or(|dest| dest == "document");
    is_whole && headers.get(SEC_FETCH_MODE).is_some_and(|mode| mode == "navigate")
}

/// Whether to GET a path does more than to read: who opens a sandbox's stream of commands takes it over.
fn changes_something(path: &str) -> bool {
    path.ends_with("/commands")
}

fn of_another_site() -> Error {
    Error::new(Kind::Denied, "ERR_ORIGIN", "pages of other sites may not embed this server's resources")
}

/// Whether a request names this machine, or nothing.
fn is_for_loopback(headers: &HeaderMap, uri: &Uri) -> bool {
    let host = headers.get(header::HOST).map(|host| host.to_str().unwrap_or("?"));
    let Some(host) = host.or(uri.authority().map(Authority::as_str)) else { return true };
    let Ok(authority) = host.parse::<Authority>() else { return false };
    let host = authority.host().trim_start_matches('[').trim_end_matches(']');
    host.eq_ignore_ascii_case("localhost") || host.parse::<IpAddr>().is_ok_and(|address| address.is_loopback())
}

/// A page of somebody else can send requests that browsers do not ask about before, with the cookies that they have for this
/// server: such a page is refused.
async fn own_pages(State(origins): State<Arc<[HeaderValue]>>, request: Request, next: Next) -> Response {
    if let Some(origin) = request.headers().get(header::ORIGIN)
        && !origins.contains(origin)
        && !is_own(origin, request.headers().get(header::HOST), request.uri().authority().map(Authority::as_str))
    {
        let (origin, host) = (origin.to_str().unwrap_or("?"), request.headers().get(header::HOST));
        let host = host.and_then(|host| host.to_str().ok()).unwrap_or("?");
        let message = format!(
            "pages of {origin} may not use this server, which was asked as {host}: add the origin to http.allowed_origins, or set \
             conversation.public_url if a proxy changes the host"
        );
        return Refusal(Error::new(Kind::Denied, "ERR_ORIGIN", message)).into_response();
    }
    next.run(request).await
}

/// Whether a page is this server's own.
pub(crate) fn is_own(origin: &HeaderValue, host: Option<&HeaderValue>, authority: Option<&str>) -> bool {
    let origin = origin.to_str().unwrap_or_default();
    let Some((_, origin)) = origin.split_once("://") else { return false };
    host.is_some_and(|host| host.as_bytes() == origin.as_bytes()) || authority == Some(origin)
}

pub(crate) async fn not_found() -> Refusal {
    Refusal(Error::new(Kind::NotFound, "ERR_NOT_FOUND", "there is nothing at this path"))
}

/// Whether a tag is among those that `If-None-Match` lists, compared as weak ones (RFC 9110, section 13.1.2).
pub(crate) fn is_listed(listed: &str, tag: &str) -> bool {
    let bare = |tag: &str| tag.trim().trim_start_matches("W/").to_owned();
    listed.trim() == "*" || listed.split(',').any(|each| bare(each) == bare(tag))
}

/// Says that what a client has is still so. Without a length: it would be taken for that of what the client has (RFC 9110, 8.6).
pub(crate) fn not_modified() -> Response {
    let nothing = futures_util::stream::empty::<Result<Bytes, std::convert::Infallible>>();
    (StatusCode::NOT_MODIFIED, Body::from_stream(nothing)).into_response()
}

/// The answer to HEAD for a stream, which has no end that could be left out.
pub(crate) fn no_head(allow: &'static str) -> (StatusCode, [(HeaderName, &'static str); 1]) {
    (StatusCode::METHOD_NOT_ALLOWED, [(header::ALLOW, allow)])
}

/// The answer says by `allow` which methods there are.
pub(crate) async fn not_allowed() -> Refusal {
    Refusal(Error::new(Kind::Invalid, NOT_ALLOWED, "this path takes no such method"))
}

#[cfg(test)]
mod tests {
    use std::convert::Infallible;

    use axum::{body::Body, response::IntoResponse as _};
    use bytes::Bytes;
    use futures_util::{StreamExt as _, stream};
    use tokio::time::Instant;

    use super::{BODY_TIMEOUT, DRAIN_TIMEOUT, body, body_of, origins, public_origin};
    use crate::error::Refusal;

    #[test]
    fn origins_are_written_as_browsers_do() {
        for (set, sent) in [
            ("https://app.example.org", Some("https://app.example.org")),
            ("HTTPS://App.Example.org:443", Some("https://app.example.org")),
            ("http://127.0.0.1:3000/", Some("http://127.0.0.1:3000")),
            ("http://[::1]:80", Some("http://[::1]")),
            ("https://b\u{fc}cher.example", Some("https://xn--bcher-kva.example")),
            ("tauri://localhost", Some("tauri://localhost")),
            ("app://localhost:8080", Some("app://localhost:8080")),
            ("https://*.example.org", None),
            ("https://app.example.org/path", None),
            ("https://app.example.org?query", None),
            ("app.example.org", None),
            ("*", None),
            ("null", None),
            ("mailto:a@b", None),
        ] {
            let found = origins(&[set.to_owned()]).ok().map(|all| all[0].to_str().unwrap().to_owned());
            assert_eq!(found.as_deref(), sent, "{set}");
        }
        for (set, origin) in [
            ("https://Chat.example.org:443/", Some("https://chat.example.org")),
            ("https://example.org/chat/", Some("https://example.org")),
            ("http://127.0.0.1:4800", Some("http://127.0.0.1:4800")),
            ("chat.example.org", None),
            ("ftp://chat.example.org", None),
            ("https://", None),
            ("https://chat.example.org?a=b", None),
        ] {
            let found = public_origin(set).ok().map(|found| found.unwrap().to_str().unwrap().to_owned());
            assert_eq!(found.as_deref(), origin, "{set}");
        }
        assert_eq!(public_origin("").unwrap(), None);
    }

    #[tokio::test(start_paused = true)]
    async fn a_body_comes_in_time_or_not_at_all() {
        let begins = stream::iter([Ok::<_, Infallible>(Bytes::from_static(b"[")), Ok(Bytes::from_static(b"]"))]);
        assert_eq!(body(Body::from_stream(begins.clone()), 2).await.unwrap(), "[]");
        let (too_large, begun) = (body(Body::from_stream(begins.clone()), 1).await, Instant::now());
        assert_eq!(Refusal(too_large.unwrap_err()).into_response().status(), 413);
        let stays_away = body(Body::from_stream(begins.chain(stream::pending())), 2).await;
        assert_eq!(Refusal(stays_away.unwrap_err()).into_response().status(), 408);
        assert_eq!(begun.elapsed(), BODY_TIMEOUT);
    }

    #[tokio::test(start_paused = true)]
    async fn a_body_is_not_waited_for_once_it_is_refused() {
        let denied = || Err::<(), _>(trunkline_core::Error::new(trunkline_core::Kind::Unauthenticated, "ERR", "no"));
        let stays_away = Body::from_stream(stream::pending::<Result<Bytes, Infallible>>());
        let begun = Instant::now();
        assert_eq!(body_of(denied(), stays_away, 2).await.unwrap_err().message, "no");
        assert_eq!(begun.elapsed(), DRAIN_TIMEOUT);
        let (known, read) = body_of(Ok(1), Body::from("[]"), 2).await.unwrap();
        assert_eq!((known, read), (1, Bytes::from_static(b"[]")));
    }
}

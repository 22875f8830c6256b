//! Which pages may ask, and who does: before any route.

use std::sync::Arc;

use axum::{
    extract::{Request, State},
    http::{HeaderMap, HeaderName, HeaderValue, Method, StatusCode, header, uri::Authority},
    middleware::Next,
    response::{IntoResponse as _, Response},
};
use trunkline_core::{Error, Kind};

use super::{Surface, token};
use crate::{error::Refusal, http::is_own};

/// What pages may send. The published list, and what browsers' own programs send.
const ALLOWED_HEADERS: &str = "authorization, content-type, accept, idempotency-key, last-event-id, cache-control";

/// How long browsers may remember that, in seconds.
const REMEMBERED: &str = "600";

/// Admits whoever has a token, from a page of its app or from no page at all.
pub(super) async fn admit(State(surface): State<Arc<Surface>>, mut request: Request, next: Next) -> Response {
    let origin = request.headers().get(header::ORIGIN).cloned();
    let is_own = origin.as_ref().is_some_and(|origin| {
        surface.public_origin.as_ref() == Some(origin)
            || is_own(origin, request.headers().get(header::HOST), request.uri().authority().map(Authority::as_str))
    });
    let foreign = origin.as_ref().filter(|_| !is_own).map(|origin| origin.to_str().unwrap_or("?").to_owned());
    let apps = surface.conversations.apps();
    if request.method() == Method::OPTIONS {
        let known = foreign.is_some_and(|origin| apps.knows_origin(&origin));
        return preflight(origin.filter(|_| known));
    }
    let asked = bearer(request.headers()).map(|token| token::admit(apps, token));
    // For whose pages the answer is, whatever it is. Who is not known to be of an app learns nothing of any.
    let app = match &asked {
        Some(Ok(admitted)) => Some(admitted.visitor.app()),
        Some(Err((_, app))) => app.as_deref(),
        None => None,
    };
    let is_known = foreign.as_ref().is_none_or(|origin| match app {
        Some(app) => app.origins.contains(origin),
        None => apps.knows_origin(origin),
    });
    let response = if !is_known {
        Refusal(Error::new(Kind::Denied, "ERR_ORIGIN", "pages of this origin may not use this app")).into_response()
    } else {
        match asked {
            Some(Ok(admitted)) => {
                request.extensions_mut().insert(admitted.on_page(foreign.clone()));
                next.run(request).await
            }
            Some(Err((error, _))) => Refusal(error).into_response(),
            None => next.run(request).await,
        }
    };
    with_origin(response, origin.filter(|_| is_known && foreign.is_some()))
}

fn bearer(headers: &HeaderMap) -> Option<&str> {
    let (scheme, token) = headers.get(header::AUTHORIZATION)?.to_str().ok()?.split_once(' ')?;
    scheme.eq_ignore_ascii_case("bearer").then_some(token.trim())
}

fn preflight(origin: Option<HeaderValue>) -> Response {
    let status = if origin.is_some() { StatusCode::NO_CONTENT } else { StatusCode::FORBIDDEN };
    let mut response = with_origin(status.into_response(), origin);
    if status == StatusCode::NO_CONTENT {
        let headers = response.headers_mut();
        let allow = |name: HeaderName, value: &'static str| (name, HeaderValue::from_static(value));
        headers.extend([
            allow(header::ACCESS_CONTROL_ALLOW_METHODS, "GET, POST"),
            allow(header::ACCESS_CONTROL_ALLOW_HEADERS, ALLOWED_HEADERS),
            allow(header::ACCESS_CONTROL_MAX_AGE, REMEMBERED),
        ]);
    }
    response
}

fn with_origin(mut response: Response, origin: Option<HeaderValue>) -> Response {
    let headers = response.headers_mut();
    headers.append(header::VARY, HeaderValue::from_static("origin"));
    if let Some(origin) = origin {
        headers.insert(header::ACCESS_CONTROL_ALLOW_ORIGIN, origin);
        headers.insert(header::ACCESS_CONTROL_EXPOSE_HEADERS, HeaderValue::from_static("retry-after"));
    }
    response
}

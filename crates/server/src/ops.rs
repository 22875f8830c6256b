//! The listener for operators, and what the HTTP listener answers until its surfaces are there.

use axum::{Json, Router, http::StatusCode, routing::get};

/// `GET /healthz`: the process serves.
pub(crate) fn router() -> Router {
    Router::new().route("/healthz", get(|| async { "ok\n" })).fallback(not_found)
}

/// The HTTP surfaces: none yet.
pub(crate) fn no_surfaces() -> Router {
    Router::new().fallback(not_found)
}

#[derive(serde::Serialize)]
struct Problem {
    error: Detail,
}

#[derive(serde::Serialize)]
struct Detail {
    code: &'static str,
    message: &'static str,
}

async fn not_found() -> (StatusCode, Json<Problem>) {
    let error = Detail { code: "not_found", message: "there is nothing at this path" };
    (StatusCode::NOT_FOUND, Json(Problem { error }))
}

//! The one table from an error's kind to what each wire calls it.

use axum::{
    Json,
    http::{HeaderValue, StatusCode, header},
    response::{IntoResponse, Response},
};
use tonic::{Code, Status};
use trunkline_core::{
    Error, Kind,
    conversation::{EMPTY, KEY_REUSED, files},
    sandbox::UNKNOWN_COMMAND,
};
use trunkline_proto::v1::ErrorResponse;

/// The gRPC code of a kind.
pub(crate) fn grpc_code(kind: Kind) -> Code {
    match kind {
        Kind::Invalid => Code::InvalidArgument,
        Kind::Unauthenticated => Code::Unauthenticated,
        Kind::Denied => Code::PermissionDenied,
        Kind::NotFound => Code::NotFound,
        Kind::Exists => Code::AlreadyExists,
        Kind::Precondition => Code::FailedPrecondition,
        Kind::Exhausted => Code::ResourceExhausted,
        Kind::Unavailable => Code::Unavailable,
        Kind::Timeout => Code::DeadlineExceeded,
        Kind::Cancelled => Code::Cancelled,
        Kind::Unimplemented => Code::Unimplemented,
        Kind::Internal => Code::Internal,
    }
}

/// The HTTP status of an error: its kind's, but for a few that HTTP tells apart.
pub(crate) fn http_status(error: &Error) -> StatusCode {
    match error.code {
        UNKNOWN_COMMAND | EMPTY | KEY_REUSED | files::TOO_MANY => return StatusCode::UNPROCESSABLE_ENTITY,
        files::UNSUPPORTED => return StatusCode::UNSUPPORTED_MEDIA_TYPE,
        TOO_LARGE | files::TOO_LARGE => return StatusCode::PAYLOAD_TOO_LARGE,
        NO_SUCH_RANGE => return StatusCode::RANGE_NOT_SATISFIABLE,
        NOT_ALLOWED => return StatusCode::METHOD_NOT_ALLOWED,
        TOO_SLOW => return StatusCode::REQUEST_TIMEOUT,
        _ => {}
    }
    match error.kind {
        Kind::Invalid => StatusCode::BAD_REQUEST,
        Kind::Unauthenticated => StatusCode::UNAUTHORIZED,
        Kind::Denied => StatusCode::FORBIDDEN,
        Kind::NotFound => StatusCode::NOT_FOUND,
        Kind::Exists | Kind::Precondition => StatusCode::CONFLICT,
        Kind::Exhausted => StatusCode::TOO_MANY_REQUESTS,
        Kind::Unavailable | Kind::Cancelled => StatusCode::SERVICE_UNAVAILABLE,
        Kind::Timeout => StatusCode::GATEWAY_TIMEOUT,
        Kind::Unimplemented => StatusCode::NOT_IMPLEMENTED,
        Kind::Internal => StatusCode::INTERNAL_SERVER_ERROR,
    }
}

/// The code of a body that is larger than it may be.
pub(crate) const TOO_LARGE: &str = "ERR_TOO_LARGE";

/// The code of bytes that a file does not have.
pub(crate) const NO_SUCH_RANGE: &str = "ERR_RANGE";

/// The code of a method that a path does not take.
pub(crate) const NOT_ALLOWED: &str = "ERR_METHOD_NOT_ALLOWED";

/// The code of a body that takes longer than it may.
pub(crate) const TOO_SLOW: &str = "ERR_TOO_SLOW";

/// An error as HTTP tells it: `{"error": {"code", "message"}}`.
pub(crate) struct Refusal(pub(crate) Error);

impl From<Error> for Refusal {
    fn from(error: Error) -> Self {
        Self(error)
    }
}

#[derive(serde::Serialize)]
struct Problem {
    error: Detail,
}

#[derive(serde::Serialize)]
struct Detail {
    code: String,
    message: String,
}

impl IntoResponse for Refusal {
    fn into_response(self) -> Response {
        let Self(error) = self;
        let status = http_status(&error);
        if status.is_server_error() {
            tracing::warn!(code = error.code, %error, "a request failed");
        }
        // `ERR_NOT_FOUND` is `not_found` here, as in the published interfaces.
        let code = error.code.strip_prefix("ERR_").unwrap_or(error.code).to_ascii_lowercase();
        let problem = Problem { error: Detail { code, message: error.message.into_owned() } };
        let mut response = (status, Json(problem)).into_response();
        if status == StatusCode::UNAUTHORIZED {
            response.headers_mut().insert(header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
        }
        if let Some(after) = error.retry_after {
            let seconds = after.as_secs_f64().ceil().max(1.0) as u64;
            response.headers_mut().insert(header::RETRY_AFTER, seconds.into());
        }
        response
    }
}

/// A status's name in figures.
pub(crate) fn code_name(code: Code) -> &'static str {
    match code {
        Code::Ok => "ok",
        Code::Cancelled => "cancelled",
        Code::Unknown => "unknown",
        Code::InvalidArgument => "invalid_argument",
        Code::DeadlineExceeded => "deadline_exceeded",
        Code::NotFound => "not_found",
        Code::AlreadyExists => "already_exists",
        Code::PermissionDenied => "permission_denied",
        Code::ResourceExhausted => "resource_exhausted",
        Code::FailedPrecondition => "failed_precondition",
        Code::Aborted => "aborted",
        Code::OutOfRange => "out_of_range",
        Code::Unimplemented => "unimplemented",
        Code::Internal => "internal",
        Code::Unavailable => "unavailable",
        Code::DataLoss => "data_loss",
        Code::Unauthenticated => "unauthenticated",
    }
}

/// In a status's metadata: how long to wait, in milliseconds. A name of the gRPC retry design, which libraries know.
const PUSHBACK: &str = "grpc-retry-pushback-ms";

/// An error that ends a stream.
pub(crate) fn status(error: &Error) -> Status {
    let mut status = Status::new(grpc_code(error.kind), error.message.clone());
    if let Some(after) = error.retry_after {
        status.metadata_mut().insert(PUSHBACK, (after.as_millis() as u64).into());
    }
    status
}

/// An error that the stream survives.
pub(crate) fn response(error: &Error) -> ErrorResponse {
    ErrorResponse {
        code: error.code.to_owned(),
        message: error.message.clone().into_owned(),
        retryable: error.is_retryable(),
        retry_after_ms: error.retry_after.map_or(0, |after| after.as_millis() as i64),
        request_id: String::new(),
    }
}

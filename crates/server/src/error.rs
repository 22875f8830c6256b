//! The one table from an error's kind to what each wire calls it.

use tonic::{Code, Status};
use trunkline_core::{Error, Kind};
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

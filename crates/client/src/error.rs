//! One error for everything that can go wrong on this side of the wire or the other.

use std::{borrow::Cow, error::Error as StdError, fmt, sync::Arc, time::Duration};

use tonic::{Code, Status};
use trunkline_proto::v1::ErrorResponse;

/// What to make of an error.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Kind {
    /// The request is malformed; repeating it is pointless.
    Invalid,
    /// The server does not know who is asking: no credential, or a bad one.
    Unauthenticated,
    /// The caller may not.
    Denied,
    /// There is no such thing, or the caller may not know of it.
    NotFound,
    /// It exists already.
    Exists,
    /// Somebody else is connected under this identity.
    Duplicate,
    /// The state of things forbids it for now, or an extension that is required is not there.
    Precondition,
    /// A limit was hit; wait for [`Error::retry_after`].
    Exhausted,
    /// Nobody can be reached, or something that is needed is away.
    Unavailable,
    /// No answer came in time. Whether it was carried out is not known.
    Timeout,
    /// The connection broke while the request was under way. Whether it was carried out is not known.
    Interrupted,
    /// The server ended this client's session for good.
    Disconnected,
    /// This client was closed, or gave up.
    Closed,
    /// Not offered by this server.
    Unimplemented,
    /// Refused, in words that fit no other kind.
    Refused,
    /// What was said made no sense: a defect of one of the two sides.
    Internal,
}

/// A refusal or a failure.
///
/// Its [`Display`](fmt::Display) is a sentence for people; machines look at [`Error::kind`] and [`Error::code`].
#[derive(Clone)]
pub struct Error {
    /// Boxed, so that a result that is mostly good stays small.
    inner: Box<Inner>,
}

#[derive(Clone)]
struct Inner {
    kind: Kind,
    code: Cow<'static, str>,
    message: String,
    retryable: bool,
    retry_after: Option<Duration>,
    source: Option<Arc<dyn StdError + Send + Sync>>,
}

impl Error {
    pub(crate) fn new(kind: Kind, message: impl Into<String>) -> Self {
        let retryable = matches!(kind, Kind::Exhausted | Kind::Unavailable | Kind::Timeout | Kind::Interrupted);
        let (code, message) = (Cow::Borrowed(code_of(kind)), message.into());
        Self { inner: Box::new(Inner { kind, code, message, retryable, retry_after: None, source: None }) }
    }

    pub(crate) fn invalid(message: impl Into<String>) -> Self {
        Self::new(Kind::Invalid, message)
    }

    pub(crate) fn with_source(mut self, source: impl StdError + Send + Sync + 'static) -> Self {
        self.inner.source = Some(Arc::new(source));
        self
    }

    /// What to make of it.
    #[must_use]
    pub fn kind(&self) -> Kind {
        self.inner.kind
    }

    /// The server's code, such as `ERR_QUOTA_001`, or one of this library's. Codes keep their meaning.
    #[must_use]
    pub fn code(&self) -> &str {
        &self.inner.code
    }

    /// Whether the same request can succeed later. After [`Kind::Timeout`] and [`Kind::Interrupted`] it may have been carried
    /// out already.
    #[must_use]
    pub fn is_retryable(&self) -> bool {
        self.inner.retryable
    }

    /// How long the server asks to wait before the next attempt.
    #[must_use]
    pub fn retry_after(&self) -> Option<Duration> {
        self.inner.retry_after
    }

    /// What ended a stream.
    pub(crate) fn from_status(status: &Status) -> Self {
        let kind = match status.code() {
            Code::InvalidArgument | Code::OutOfRange => Kind::Invalid,
            Code::Unauthenticated => Kind::Unauthenticated,
            Code::PermissionDenied => Kind::Denied,
            Code::NotFound => Kind::NotFound,
            Code::AlreadyExists => Kind::Duplicate,
            Code::FailedPrecondition => Kind::Precondition,
            Code::ResourceExhausted => Kind::Exhausted,
            Code::DeadlineExceeded => Kind::Timeout,
            Code::Unimplemented => Kind::Unimplemented,
            // The transport's own failures are of these codes, besides the server's.
            Code::Unavailable | Code::Unknown | Code::Cancelled | Code::Aborted | Code::Internal => Kind::Unavailable,
            Code::DataLoss | Code::Ok => Kind::Internal,
        };
        let after = status.metadata().get(PUSHBACK).and_then(|value| value.to_str().ok()?.parse().ok());
        let mut error = Self::new(kind, status.message()).with_source(status.clone());
        error.inner.retry_after = after.map(Duration::from_millis);
        error
    }

    /// What a stream survived.
    pub(crate) fn from_response(response: &ErrorResponse) -> Self {
        let mut error = Self::new(kind_of_code(&response.code), response.message.clone());
        error.inner.code = Cow::Owned(response.code.clone());
        error.inner.retryable = response.retryable;
        error.inner.retry_after =
            u64::try_from(response.retry_after_ms).ok().filter(|after| *after > 0).map(Duration::from_millis);
        if error.kind() == Kind::Refused {
            error.inner.kind =
                if response.retryable { Kind::Unavailable } else { Self::from_words(&response.message).kind() };
        }
        error
    }

    /// What a reply says that has no code: the kind is told by the published words.
    pub(crate) fn from_words(words: &str) -> Self {
        let lower = words.to_ascii_lowercase();
        let has = |parts: &[&str]| parts.iter().any(|part| lower.contains(part));
        let kind = if has(&["already completed", "in use", "not allowed in state"]) {
            Kind::Precondition
        } else if has(&["not found", "no such", "does not exist"]) {
            Kind::NotFound
        } else if has(&[
            "permission",
            "not authorized",
            "denied",
            "privileges",
            "insufficient",
            "an admin_acl grant",
            " takes ",
        ]) {
            Kind::Denied
        } else if has(&["already exists", "already in use"]) {
            Kind::Exists
        } else if has(&["not supported", "not implemented"]) {
            Kind::Unimplemented
        } else if has(&["invalid", "required", "must "]) {
            Kind::Invalid
        } else {
            Kind::Refused
        };
        Self::new(kind, if words.is_empty() { "the server refused, and did not say why" } else { words })
    }

    /// What somebody on the way has against a call, under the contract's name for it.
    pub(crate) fn from_proxy(kind: Kind, code: &'static str, words: &str) -> Self {
        let mut error = Self::new(kind, if words.is_empty() { code } else { words });
        error.inner.code = Cow::Borrowed(code);
        error
    }

    /// What a reply says in a code and words.
    pub(crate) fn from_code(code: &str, words: &str) -> Self {
        if code.is_empty() {
            return Self::from_words(words);
        }
        let kind = match kind_of_code(code) {
            Kind::Refused => Self::from_words(words).kind(),
            kind => kind,
        };
        let mut error = Self::new(kind, words);
        error.inner.code = Cow::Owned(code.to_owned());
        error
    }
}

/// In a status's metadata: how long to wait, in milliseconds. A name of the gRPC retry design.
const PUSHBACK: &str = "grpc-retry-pushback-ms";

/// The codes of errors that begin here.
fn code_of(kind: Kind) -> &'static str {
    match kind {
        Kind::Invalid => "ERR_INVALID_ARGUMENT",
        Kind::Unauthenticated => "ERR_UNAUTHENTICATED",
        Kind::Denied => "ERR_PERMISSION_DENIED",
        Kind::NotFound => "ERR_NOT_FOUND",
        Kind::Exists => "ERR_ALREADY_EXISTS",
        Kind::Duplicate => "ERR_DUPLICATE_IDENTITY",
        Kind::Precondition => "ERR_PRECONDITION",
        Kind::Exhausted => "ERR_EXHAUSTED",
        Kind::Unavailable => "ERR_UNAVAILABLE",
        Kind::Timeout => "ERR_TIMEOUT",
        Kind::Interrupted => "ERR_INTERRUPTED",
        Kind::Disconnected => "ERR_DISCONNECTED",
        Kind::Closed => "ERR_CLOSED",
        Kind::Unimplemented => "ERR_NOT_IMPLEMENTED",
        Kind::Refused => "ERR_REFUSED",
        Kind::Internal => "ERR_INTERNAL",
    }
}

/// The published rule: what a code contains, in this order, whatever its case.
fn kind_of_code(code: &str) -> Kind {
    let code = code.to_ascii_uppercase();
    let table = [
        ("PERMISSION", Kind::Denied),
        ("DENIED", Kind::Denied),
        ("FORBIDDEN", Kind::Denied),
        ("UNAUTHENTICATED", Kind::Unauthenticated),
        ("NOT_FOUND", Kind::NotFound),
        ("INVALID", Kind::Invalid),
        ("TOO_LARGE", Kind::Invalid),
        ("NOT_IMPLEMENTED", Kind::Unimplemented),
        ("UNIMPLEMENTED", Kind::Unimplemented),
        ("ALREADY_EXISTS", Kind::Exists),
        ("QUOTA", Kind::Exhausted),
        ("RATE", Kind::Exhausted),
        ("EXHAUSTED", Kind::Exhausted),
        ("EXTENSION", Kind::Precondition),
        ("PRECONDITION", Kind::Precondition),
        ("UNAVAILABLE", Kind::Unavailable),
        ("TIMEOUT", Kind::Timeout),
        ("INTERNAL", Kind::Internal),
    ];
    table.iter().find(|(part, _)| code.contains(part)).map_or(Kind::Refused, |(_, kind)| *kind)
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.inner.message)
    }
}

impl fmt::Debug for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Inner { kind, code, message, retryable, retry_after, .. } = &*self.inner;
        let mut shown = f.debug_struct("Error");
        shown.field("kind", kind).field("code", code).field("message", message).field("retryable", retryable);
        if let Some(after) = retry_after {
            shown.field("retry_after", after);
        }
        shown.finish()
    }
}

impl StdError for Error {
    fn source(&self) -> Option<&(dyn StdError + 'static)> {
        self.inner.source.as_deref().map(|source| source as &(dyn StdError + 'static))
    }
}

/// What an operation answers.
pub type Result<T, E = Error> = std::result::Result<T, E>;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn codes_tell_the_kind_as_the_published_clients_read_them() {
        let cases = [
            ("ERR_PERMISSION_DENIED", Kind::Denied),
            ("UNAUTHENTICATED", Kind::Unauthenticated),
            ("ERR_NOT_FOUND", Kind::NotFound),
            ("ERR_INVALID_TOPIC", Kind::Invalid),
            ("KV_ERROR", Kind::Refused),
            ("ERR_QUOTA_001", Kind::Exhausted),
            ("ERR_EXTENSION_UNSUPPORTED", Kind::Precondition),
            ("err_permission_not_found", Kind::Denied),
        ];
        for (code, kind) in cases {
            assert_eq!(kind_of_code(code), kind, "{code}");
        }
    }

    #[test]
    fn words_tell_the_kind_where_there_is_no_code() {
        let cases = [
            ("task not found", Kind::NotFound),
            ("admin sessions operations require system-level privileges", Kind::Denied),
            ("workspace already exists", Kind::Exists),
            ("create_request is required", Kind::Invalid),
            ("task not found or already completed/cancelled", Kind::Precondition),
            ("insufficient access on workspace \"ws\" for this ACL operation (need MANAGE)", Kind::Denied),
            ("looking at system takes READ on admin/system", Kind::Denied),
            ("", Kind::Refused),
        ];
        for (words, kind) in cases {
            assert_eq!(Error::from_words(words).kind(), kind, "{words}");
        }
    }

    #[test]
    fn an_error_that_a_stream_survived_keeps_what_the_server_said_of_it() {
        let response = ErrorResponse {
            code: "ERR_QUOTA_002".into(),
            message: "too fast".into(),
            retryable: true,
            retry_after_ms: 250,
            ..ErrorResponse::default()
        };
        let error = Error::from_response(&response);
        assert_eq!((error.kind(), error.code(), error.is_retryable()), (Kind::Exhausted, "ERR_QUOTA_002", true));
        assert_eq!(error.retry_after(), Some(Duration::from_millis(250)));
        assert_eq!(error.to_string(), "too fast");
    }
}

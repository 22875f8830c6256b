//! Why a socket is closed, by the codes of WebSocket.

use std::fmt;

use crate::envelope::ParseError;

/// Longest reason that fits a closing frame, in bytes (RFC 6455, 5.5.1).
const REASON_BYTES_MAX: usize = 123;

/// Why a socket is closed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Close {
    /// One of [`code`].
    pub code: u16,
    /// For people.
    pub reason: String,
}

/// What each code means here.
pub mod code {
    /// All is said.
    pub const NORMAL: u16 = 1000;
    /// Nothing was heard for three heartbeats, or whoever closes goes away. To be connected again.
    pub const AWAY: u16 = 1001;
    /// Another protocol, or a version that is not spoken.
    pub const PROTOCOL: u16 = 1002;
    /// A frame that cannot be read; the reason names the field.
    pub const UNREADABLE: u16 = 1007;
    /// Something that is not allowed, or not yet: all before `hello`.
    pub const POLICY: u16 = 1008;
    /// A frame that is too large.
    pub const TOO_LARGE: u16 = 1009;
    /// What was asked for failed. To be connected again.
    pub const FAILED: u16 = 1011;
    /// Too much of something. To be connected again, later.
    pub const BUSY: u16 = 1013;
}

impl Close {
    /// With a code and a reason, of which as much is kept as fits.
    #[must_use]
    pub fn new(code: u16, reason: impl Into<String>) -> Self {
        let mut reason = reason.into();
        reason.truncate(reason.floor_char_boundary(REASON_BYTES_MAX));
        Self { code, reason }
    }

    /// Whether it makes sense to come back: whoever sent what cannot be read would send it again.
    #[must_use]
    pub fn may_return(&self) -> bool {
        !matches!(self.code, code::PROTOCOL | code::UNREADABLE | code::TOO_LARGE)
    }
}

impl fmt::Display for Close {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}", self.code, self.reason)
    }
}

impl std::error::Error for Close {}

impl From<ParseError> for Close {
    fn from(error: ParseError) -> Self {
        let code = match error {
            ParseError::Protocol | ParseError::Version => code::PROTOCOL,
            ParseError::NoObject(_) | ParseError::Field { .. } => code::UNREADABLE,
        };
        Self::new(code, error.to_string())
    }
}

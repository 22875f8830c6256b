//! What happens to a sandbox, and what becomes of it: pure.
//!
//! | status | opened | closed | turn begins | turn ends | its time is up |
//! | --- | --- | --- | --- | --- | --- |
//! | bootstrapping | live | | | | removed |
//! | live | live | disconnected | live | idle | disconnected |
//! | idle | live | disconnected | live | idle | disconnected |
//! | disconnected | live | | | | |
//!
//! Its time is up when a bootstrapping sandbox has told nothing for long enough, and when one that had a stream did not
//! come back after the server was started again.

use serde::{Deserialize, Serialize};

/// How a sandbox is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Status {
    /// It was made here, and has not come yet.
    Bootstrapping,
    /// It is there and busy, as far as is known.
    Live,
    /// It is there, and its last turn has ended.
    Idle,
    /// It was there.
    Disconnected,
}

impl Status {
    /// All of them.
    /// All of them.
    pub const ALL: [Self; 4] = [Self::Bootstrapping, Self::Live, Self::Idle, Self::Disconnected];

    /// Its published word.
    #[must_use]
    pub fn word(self) -> &'static str {
        match self {
            Self::Bootstrapping => "bootstrapping",
            Self::Live => "live",
            Self::Idle => "idle",
            Self::Disconnected => "disconnected",
        }
    }

    /// The status of a word.
    #[must_use]
    pub fn parse(word: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|status| status.word() == word)
    }

    /// Whether it takes commands.
    #[must_use]
    pub fn takes_commands(self) -> bool {
        matches!(self, Self::Live | Self::Idle)
    }

    /// What it is after something happened; nothing if it is removed.
    #[must_use]
    pub fn after(self, what: &Happening) -> Option<Self> {
        Some(match (what, self) {
            (Happening::TimeUp, Self::Bootstrapping) => return None,
            (Happening::Opened, _) | (Happening::TurnStarted, Self::Idle) => Self::Live,
            (Happening::Closed | Happening::TimeUp, Self::Live | Self::Idle) => Self::Disconnected,
            (Happening::TurnEnded, Self::Live) => Self::Idle,
            (_, same) => same,
        })
    }
}

/// What happens to a sandbox.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Happening {
    /// Its command stream opened.
    Opened,
    /// Its command stream closed, and no other took its place.
    Closed,
    /// It began a turn.
    TurnStarted,
    /// It ended a turn.
    TurnEnded,
    /// It said what it is about.
    Summary(String),
    /// It was given some time, which is over.
    TimeUp,
}

#[cfg(test)]
mod tests {
    use super::{Happening, Status};

    #[test]
    fn statuses_follow_the_table() {
        use Status::{Bootstrapping, Disconnected, Idle, Live};
        let columns =
            [Happening::Opened, Happening::Closed, Happening::TurnStarted, Happening::TurnEnded, Happening::TimeUp];
        let some = |status| Some(status);
        let b = some(Bootstrapping);
        let (l, i, d) = (some(Live), some(Idle), some(Disconnected));
        let table = [
            (Bootstrapping, [l, b, b, b, None]),
            (Live, [l, d, l, i, d]),
            (Idle, [l, d, l, i, d]),
            (Disconnected, [l, d, d, d, d]),
        ];
        for (status, row) in table {
            for (what, expected) in columns.iter().zip(row) {
                assert_eq!(status.after(what), expected, "{status:?} {what:?}");
            }
            assert_eq!(Status::parse(status.word()), Some(status));
            assert_eq!(status.takes_commands(), matches!(status, Live | Idle));
        }
    }
}

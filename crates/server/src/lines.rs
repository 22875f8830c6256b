//! Lines of the log about what may happen thousands of times a second.

use std::time::Duration;

use tokio::time::Instant;

/// At most one line about the same trouble in this time.
const LINE_INTERVAL: Duration = Duration::from_secs(1);

/// Lines about the same trouble, one in [`LINE_INTERVAL`].
#[derive(Debug, Default)]
pub(crate) struct Lines {
    last: Option<Instant>,
    since: u64,
}

impl Lines {
    pub(crate) const fn new() -> Self {
        Self { last: None, since: 0 }
    }

    /// How often it happened since the last line, if it is time for the next one.
    pub(crate) fn next(&mut self) -> Option<u64> {
        self.since += 1;
        if self.last.is_some_and(|last| last.elapsed() < LINE_INTERVAL) {
            return None;
        }
        self.last = Some(Instant::now());
        Some(std::mem::take(&mut self.since))
    }
}

#[cfg(test)]
mod tests {
    use super::{LINE_INTERVAL, Lines};

    #[tokio::test(start_paused = true)]
    async fn trouble_is_logged_once_a_second() {
        let mut lines = Lines::default();
        assert_eq!([lines.next(), lines.next(), lines.next()], [Some(1), None, None]);
        tokio::time::advance(LINE_INTERVAL).await;
        assert_eq!([lines.next(), lines.next()], [Some(3), None]);
    }
}

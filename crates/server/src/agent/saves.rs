//! When it is made durable how far a client was delivered to: soon after the last delivery, and now and then while they go on.

use std::{pin::Pin, time::Duration};

use tokio::time::{Instant, Sleep, sleep_until};

/// How long nothing has to be delivered until positions are saved. A crash of the server repeats what was delivered since.
const QUIET: Duration = Duration::from_millis(50);

/// How long deliveries may go on without it: a save is a transaction, which a stream of messages shall not wait for often. Also the
/// longest pause between two looks at whether what was delivered has arrived.
const BUSY: Duration = Duration::from_secs(2);

/// The clock of one client's saves. A delivery costs it a look at the time.
pub(super) struct Saves {
    timer: Pin<Box<Sleep>>,
    /// When the first and the last delivery was that is not saved; nothing if there is none.
    open: Option<Open>,
    /// A save has failed: until then it is not tried again.
    not_before: Option<Instant>,
}

#[derive(Clone, Copy)]
struct Open {
    first: Instant,
    last: Instant,
    /// Until the next look.
    pause: Duration,
}

impl Open {
    fn due(&self) -> Instant {
        (self.last + self.pause).min(self.first + BUSY.max(self.pause))
    }
}

impl Saves {
    pub(super) fn new() -> Self {
        Self { timer: Box::pin(sleep_until(Instant::now())), open: None, not_before: None }
    }

    /// Something was delivered, or acknowledged.
    pub(super) fn delivered(&mut self) {
        let now = Instant::now();
        match &mut self.open {
            Some(open) if open.pause == QUIET => open.last = now,
            _ => {
                self.open = Some(Open { first: now, last: now, pause: QUIET });
                self.set_timer();
            }
        }
    }

    /// When the next save is due, if anything is open.
    fn next(&self) -> Option<Instant> {
        let due = self.open?.due();
        Some(self.not_before.map_or(due, |not_before| due.max(not_before)))
    }

    fn set_timer(&mut self) {
        if let Some(due) = self.next() {
            self.timer.as_mut().reset(due);
        }
    }

    /// Whether something may have to be saved.
    pub(super) fn is_open(&self) -> bool {
        self.open.is_some()
    }

    /// Resolves when positions should be saved. Cancel-safe; call it only if something is open.
    pub(super) async fn due(&mut self) {
        loop {
            self.timer.as_mut().await;
            match self.next() {
                // It went on meanwhile.
                Some(due) if due > Instant::now() => self.timer.as_mut().reset(due),
                _ => return,
            }
        }
    }

    /// A save begins, or there is nothing left to save.
    pub(super) fn close(&mut self) {
        (self.open, self.not_before) = (None, None);
    }

    /// A save has failed and is tried again, not at once.
    pub(super) fn failed(&mut self) {
        self.not_before = Some(Instant::now() + BUSY);
        self.delivered();
        self.set_timer();
    }

    /// What was delivered has not arrived yet: looks again later and later.
    pub(super) fn postpone(&mut self) {
        if let Some(open) = &mut self.open {
            let now = Instant::now();
            let pause = (open.pause * 2).min(BUSY);
            *open = Open { first: now, last: now, pause };
            self.set_timer();
        }
    }
}

#[cfg(test)]
mod tests {
    use futures_util::FutureExt as _;

    use super::{BUSY, Duration, Instant, QUIET, Saves};

    /// How long until the next save is due.
    async fn due(saves: &mut Saves) -> Duration {
        let begun = Instant::now();
        saves.due().await;
        begun.elapsed()
    }

    #[tokio::test(start_paused = true)]
    async fn a_save_is_due_soon_after_the_last_delivery_and_now_and_then_in_a_stream() {
        let mut saves = Saves::new();
        assert!(!saves.is_open());
        saves.delivered();
        assert!(saves.due().now_or_never().is_none());
        assert!(due(&mut saves).await.abs_diff(QUIET) < Duration::from_millis(5));
        saves.close();
        let begun = Instant::now();
        saves.delivered();
        while saves.due().now_or_never().is_none() {
            tokio::time::advance(Duration::from_millis(10)).await;
            saves.delivered();
        }
        assert!(begun.elapsed().abs_diff(BUSY) < Duration::from_millis(50), "{:?}", begun.elapsed());
    }

    #[tokio::test(start_paused = true)]
    async fn a_save_that_failed_is_not_tried_again_at_once() {
        let mut saves = Saves::new();
        saves.failed();
        saves.delivered();
        assert!(due(&mut saves).await.abs_diff(BUSY) < Duration::from_millis(5));
        saves.close();
        saves.delivered();
        assert!(due(&mut saves).await.abs_diff(QUIET) < Duration::from_millis(5));
    }

    #[tokio::test(start_paused = true)]
    async fn what_the_transport_does_not_take_is_looked_at_more_and_more_rarely() {
        let mut saves = Saves::new();
        saves.delivered();
        let mut pauses = Vec::new();
        for _ in 0..8 {
            pauses.push(due(&mut saves).await);
            saves.postpone();
        }
        assert!(pauses.windows(2).all(|pair| pair[0] <= pair[1] + Duration::from_millis(2)), "{pauses:?}");
        assert!(pauses[7].abs_diff(BUSY) < Duration::from_millis(5), "{pauses:?}");
        saves.delivered();
        saves.close();
        saves.delivered();
        assert!(due(&mut saves).await.abs_diff(QUIET) < Duration::from_millis(5), "a delivery makes it soon again");
    }
}

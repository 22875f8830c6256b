//! Conversations in which nothing happens any more: their state after a while, if the settings say so.
//!
//! A row says when a conversation is looked at next, and the log when something happened last. So a message costs nothing here: a
//! conversation that was not quiet for long enough is looked at again when it may be.

use std::time::Duration;

use trunkline_store::log::Offset;
use uuid::Uuid;

use super::{
    Conversations, Permit, Row,
    desk::What,
    record, sql,
    state::{Act, Standing, State},
};
use crate::error::Error;

/// Conversations that are looked at in one go.
const LOOKS_MAX: i64 = 100;

/// Between looks.
const PAUSE: Duration = Duration::from_secs(1);

/// When one that is closed is looked at again, in milliseconds: whether an agent opened it, and that was not noted.
const CLOSED_MS: i64 = 30 * 24 * 3600 * 1000;

/// When one that was settled is looked at once more, and one that could not be read, in milliseconds.
const AFTER_SETTLING_MS: i64 = 1000;
const AFTER_ERROR_MS: i64 = 3600 * 1000;

/// How long nothing may have happened, in milliseconds; 0 is for ever.
#[derive(Clone, Copy)]
struct Patience {
    open: i64,
    feedback: i64,
}

/// The next state of a conversation in which something happened last at `at`, or when to look again. Pure.
fn look(standing: &Standing, at: i64, now: i64, patience: Patience) -> Result<State, i64> {
    let (most, becomes) = match standing.state {
        State::Open => (patience.open, State::AssumedResolved),
        State::PendingFeedback => (patience.feedback, State::AutoResolved),
        // A person was asked to help: only a person knows.
        _ => (0, standing.state),
    };
    if most == 0 {
        return Err(now.saturating_add(CLOSED_MS));
    }
    // The user waits for an answer; that has its own time.
    let since = if standing.is_turn_open { now } else { at };
    if since.saturating_add(most) <= now { Ok(becomes) } else { Err(since.saturating_add(most)) }
}

impl Conversations {
    /// Gives conversations in which nothing happens the state that the settings say. Does not end, also if there is nothing to do.
    pub async fn settle_quiet(self) {
        let options = self.options();
        let ms = |minutes: u32| i64::from(minutes).saturating_mul(60_000);
        let patience = Patience { open: ms(options.assumed_resolved_minutes), feedback: ms(options.feedback_minutes) };
        if patience.open == 0 && patience.feedback == 0 {
            return std::future::pending().await;
        }
        let mut looks = tokio::time::interval(PAUSE);
        loop {
            looks.tick().await;
            // By a clock that is not set yet, everything may be old.
            if !self.0.clock.is_settled() {
                continue;
            }
            while self.look_at_quiet(patience).await.unwrap_or_else(|error| {
                tracing::warn!(%error, "quiet conversations stay as they are; the next look tries again");
                false
            }) {}
        }
    }

    /// Answers whether there may be more.
    async fn look_at_quiet(&self, patience: Patience) -> Result<bool, Error> {
        let now = self.now();
        let due = self.gate().glance(move |tx| sql::to_look_at(tx, now, LOOKS_MAX)).await?;
        let is_full = due.len() as i64 == LOOKS_MAX;
        for (row, before) in due {
            let next = self.look_at(&row, now, patience).await.unwrap_or_else(|error| {
                tracing::warn!(%error, conversation = %row.id, "it cannot be looked at; again in an hour");
                now.saturating_add(AFTER_ERROR_MS)
            });
            self.look_again(row.id, Some(before), next).await?;
        }
        Ok(is_full)
    }

    /// Settles one, if it is time; answers when to look again.
    async fn look_at(&self, row: &Row, now: i64, patience: Patience) -> Result<i64, Error> {
        let (standing, at) = self.last_of(row).await?;
        let state = match look(&standing, at, now, patience) {
            Err(next) => return Ok(next),
            Ok(state) => state,
        };
        if let Some(desk) = self.look_up(row.id).await? {
            desk.run(self, What::Act(Act::Settle(state, standing.into()))).await?;
        }
        // Whether something happened meanwhile.
        Ok(now.saturating_add(AFTER_SETTLING_MS))
    }

    /// An agent or an operator opened a conversation again.
    pub(super) fn opened(&self, id: Uuid) {
        let options = self.options();
        if options.assumed_resolved_minutes > 0 || options.feedback_minutes > 0 {
            let this = self.clone();
            self.spawn(async move {
                if let Err(error) = this.look_again(id, None, 0).await {
                    tracing::warn!(%error, conversation = %id, "it is looked at within 30 days");
                }
            });
        }
    }

    async fn look_again(&self, id: Uuid, before: Option<i64>, at: i64) -> Result<(), Error> {
        self.gate().housekeep(move |tx| sql::look_again(tx, id, before, at)).await
    }

    /// Where it stands, and when something happened last.
    async fn last_of(&self, row: &Row) -> Result<(Standing, i64), Error> {
        let permit = Permit::own(row.id);
        let tail = self.gate().conversation_status(&permit).await?.tail;
        let last = if tail == Offset::START { None } else { self.record_at(&permit, tail).await? };
        let Some(last) = last else { return Ok((Standing::default(), row.created_at)) };
        Ok((record::standing(&last)?, i64::try_from(last.timestamp_ms).unwrap_or(i64::MAX)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_quiet_for_long_has_ended_and_what_waits_for_an_answer_has_not() {
        let patience = Patience { open: 100, feedback: 50 };
        let never = Patience { open: 0, feedback: 0 };
        let later = 1000 + CLOSED_MS;
        let cases = [
            (State::Open, false, 900, Ok(State::AssumedResolved)),
            (State::Open, false, 901, Err(1001)),
            (State::Open, true, 1, Err(1100)),
            (State::PendingFeedback, false, 950, Ok(State::AutoResolved)),
            (State::PendingFeedback, false, 960, Err(1010)),
            (State::Escalated, false, 1, Err(later)),
            (State::Resolved, false, 1, Err(later)),
            (State::AssumedResolved, false, 1, Err(later)),
        ];
        for (state, is_turn_open, at, expected) in cases {
            let standing = Standing { state, is_turn_open, ..Standing::default() };
            assert_eq!(look(&standing, at, 1000, patience), expected, "{standing:?}");
            assert_eq!(look(&standing, at, 1000, never), Err(later));
        }
    }
}

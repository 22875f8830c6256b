//! How long to wait before a task is tried again.

use serde::{Deserialize, Serialize};

/// First wait of an exponential policy that names none. The published figure.
const BASE_MS: i64 = 1000;

/// Largest exponent: 2^62 still fits. The published figure.
const EXPONENT_MAX: u32 = 62;

/// Tries where none are named. The published figure.
pub(super) const ATTEMPTS: i64 = 3;

/// How waits grow.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Backoff {
    /// Twice as long each time.
    #[default]
    Exponential,
    /// Always the same.
    Fixed,
    /// As listed; the last entry repeats.
    Schedule,
}

/// When a task is tried again, and how often.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct RetryPolicy {
    /// Tries in all; 3 if not positive.
    pub max_attempts: i64,
    /// How waits grow.
    pub backoff: Backoff,
    /// The first wait.
    pub initial_delay_ms: i64,
    /// The longest wait, if positive.
    pub max_delay_ms: i64,
    /// Share of a wait, 0 to 1, by which it varies both ways. Applied after the longest wait.
    pub jitter: f64,
    /// The waits of [`Backoff::Schedule`].
    pub schedule_ms: Vec<i64>,
}

impl RetryPolicy {
    /// Tries in all.
    #[must_use]
    pub fn attempts(&self) -> i64 {
        if self.max_attempts > 0 { self.max_attempts } else { ATTEMPTS }
    }

    /// The wait before the `retry`th retry, counted from 1, in milliseconds. `roll` is between -1 and 1.
    #[must_use]
    pub fn delay_ms(&self, retry: i64, roll: f64) -> i64 {
        let retry = retry.max(1);
        let delay = match self.backoff {
            Backoff::Fixed => self.initial_delay_ms,
            Backoff::Exponential => {
                let base = if self.initial_delay_ms > 0 { self.initial_delay_ms } else { BASE_MS };
                let exponent = u32::try_from(retry - 1).unwrap_or(u32::MAX).min(EXPONENT_MAX);
                let delay = base.saturating_mul(1_i64 << exponent);
                if self.max_delay_ms > 0 { delay.min(self.max_delay_ms) } else { delay }
            }
            Backoff::Schedule => {
                let at = usize::try_from(retry - 1).unwrap_or(usize::MAX).min(self.schedule_ms.len().saturating_sub(1));
                self.schedule_ms.get(at).copied().unwrap_or(self.initial_delay_ms)
            }
        };
        let (delay, jitter) = (delay.max(0), if self.jitter.is_nan() { 0.0 } else { self.jitter.clamp(0.0, 1.0) });
        if delay == 0 || jitter == 0.0 { delay } else { (delay as f64 * (1.0 + jitter * roll.clamp(-1.0, 1.0))) as i64 }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::{Backoff, RetryPolicy};

    fn delays(policy: &RetryPolicy) -> Vec<i64> {
        (1..=5).map(|retry| policy.delay_ms(retry, 0.0)).collect()
    }

    #[test]
    fn waits_are_as_published() {
        let fixed = RetryPolicy { backoff: Backoff::Fixed, initial_delay_ms: 250, ..RetryPolicy::default() };
        assert_eq!(delays(&fixed), [250; 5]);
        assert_eq!(delays(&RetryPolicy { backoff: Backoff::Fixed, ..RetryPolicy::default() }), [0; 5]);
        assert_eq!(delays(&RetryPolicy::default()), [1000, 2000, 4000, 8000, 16000]);
        let capped = RetryPolicy { initial_delay_ms: 100, max_delay_ms: 500, ..RetryPolicy::default() };
        assert_eq!(delays(&capped), [100, 200, 400, 500, 500]);
        let schedule =
            RetryPolicy { backoff: Backoff::Schedule, schedule_ms: vec![5, 10, -3], ..RetryPolicy::default() };
        assert_eq!(delays(&schedule), [5, 10, 0, 0, 0]);
        let empty = RetryPolicy { backoff: Backoff::Schedule, ..capped };
        assert_eq!(delays(&empty), [100; 5]);
        assert_eq!(RetryPolicy::default().delay_ms(1000, 0.0), i64::MAX);
        assert_eq!((RetryPolicy::default().attempts(), fixed.attempts()), (3, 3));
    }

    proptest! {
        #[test]
        fn jitter_stays_within_its_share(delay in 0..1_000_000_i64, jitter in -1.0..2.0, roll in -1.0..1.0) {
            let policy = RetryPolicy { backoff: Backoff::Fixed, initial_delay_ms: delay, jitter, ..RetryPolicy::default() };
            let share = jitter.clamp(0.0, 1.0);
            let found = policy.delay_ms(1, roll) as f64;
            prop_assert!(found >= delay as f64 * (1.0 - share) - 1.0 && found <= delay as f64 * (1.0 + share) + 1.0);
        }
    }
}

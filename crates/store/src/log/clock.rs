//! The time, and what is done when the machine's clock jumps.
//!
//! What expires by the wall clock expires at once when that is wrong: a bad virtual machine or time server that is a day
//! ahead for seconds would trim what waits and end what has hours left. So a step ahead of the wall clock against the
//! monotonic one is not believed before it lasts: until then time goes on as it went. A step back is believed at once: it ends
//! nothing, and most often a clock that was ahead when the process began is set right. Until that had time to happen,
//! [`Clock::is_settled`] says so.

use std::{
    fmt, fs,
    sync::{
        Arc, LazyLock, Mutex, PoisonError,
        atomic::{AtomicBool, AtomicI64, AtomicU64, Ordering::Relaxed},
    },
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

/// A difference between the clocks that grows by more than this at once is a step. Time servers move a running clock by
/// less, or by slewing it.
const STEP_MIN_MS: u64 = 60_000;

/// A step that lasts this long is believed: the clock is right now, or nobody is going to mend it.
const BELIEVED_AFTER: Duration = Duration::from_mins(5);

/// Tells the time, in Unix milliseconds. Replaceable, so that tests own time and try bad clocks.
#[derive(Clone)]
pub struct Clock {
    now_ms: Arc<dyn Fn() -> u64 + Send + Sync>,
    is_settled: Arc<dyn Fn() -> bool + Send + Sync>,
}

static SYSTEM: LazyLock<Arc<Steady>> = LazyLock::new(|| {
    let begun = Instant::now();
    let wall = || SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |age| age.as_millis() as u64);
    Arc::new(Steady::new(wall, move || begun.elapsed(), uptime))
});

static SYSTEM_CLOCK: LazyLock<Clock> = LazyLock::new(|| {
    let steady = SYSTEM.clone();
    Clock { is_settled: Arc::new(|| SYSTEM.is_settled()), ..Clock::new(move || steady.now_ms()) }
});

impl Clock {
    /// The machine's clock. Steps ahead of more than a minute are not followed for five minutes; see [`Clock::steps`].
    #[must_use]
    pub fn system() -> Self {
        SYSTEM_CLOCK.clone()
    }

    /// A clock of your own.
    pub fn new(now_ms: impl Fn() -> u64 + Send + Sync + 'static) -> Self {
        Self { now_ms: Arc::new(now_ms), is_settled: Arc::new(|| true) }
    }

    /// Whether the clock can be taken for right: a machine's is set by a time server after it started, and until this process
    /// is five minutes old that may be still to come. What was there before should not be thought to be old by it.
    #[must_use]
    pub fn is_settled(&self) -> bool {
        (self.is_settled)()
    }

    /// Unix milliseconds.
    #[must_use]
    pub fn now_ms(&self) -> u64 {
        (self.now_ms)()
    }

    /// How many steps of the machine's clock were noticed by those who asked [`Clock::system`] for the time.
    #[must_use]
    pub fn steps() -> u64 {
        SYSTEM.steps.load(Relaxed)
    }
}

impl fmt::Debug for Clock {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Clock({})", self.now_ms())
    }
}

/// How long the machine is up, time in which it slept included, where it tells.
fn uptime() -> Option<Duration> {
    let text = fs::read_to_string("/proc/uptime").ok()?;
    Duration::try_from_secs_f64(text.split_whitespace().next()?.parse().ok()?).ok()
}

impl Slow {
    /// Whether this lead is the one that was left by a step back a moment ago.
    fn is_return(&self, found: i64, monotonic: Duration) -> bool {
        self.left.is_some_and(|(lead, at)| {
            lead.abs_diff(found) <= STEP_MIN_MS && monotonic.saturating_sub(at) < BELIEVED_AFTER
        })
    }
}

type Source<T> = Box<dyn Fn() -> T + Send + Sync>;

/// A wall clock that is held against a monotonic one.
struct Steady {
    wall_ms: Source<u64>,
    monotonic: Source<Duration>,
    uptime: Source<Option<Duration>>,
    /// The wall clock's lead over the monotonic one, as it is believed.
    lead_ms: AtomicI64,
    /// There is a step that is not believed yet.
    is_stepped: AtomicBool,
    steps: AtomicU64,
    slow: Mutex<Slow>,
}

#[derive(Default)]
struct Slow {
    /// When the step was noticed, by the monotonic clock.
    stepped_at: Option<Duration>,
    /// How much of the machine's life the monotonic clock had not counted when the two were last compared.
    slept: Option<Duration>,
    /// The lead before the last step back, and when that was.
    left: Option<(i64, Duration)>,
}

impl Steady {
    fn new(
        wall_ms: impl Fn() -> u64 + Send + Sync + 'static,
        monotonic: impl Fn() -> Duration + Send + Sync + 'static,
        uptime: impl Fn() -> Option<Duration> + Send + Sync + 'static,
    ) -> Self {
        let lead_ms = lead(wall_ms(), monotonic());
        let slept = uptime().map(|up| up.saturating_sub(monotonic()));
        Self {
            wall_ms: Box::new(wall_ms),
            monotonic: Box::new(monotonic),
            uptime: Box::new(uptime),
            lead_ms: AtomicI64::new(lead_ms),
            is_stepped: AtomicBool::new(false),
            steps: AtomicU64::new(0),
            slow: Mutex::new(Slow { stepped_at: None, slept, left: None }),
        }
    }

    fn now_ms(&self) -> u64 {
        let (wall_ms, monotonic) = ((self.wall_ms)(), (self.monotonic)());
        let (found, believed) = (lead(wall_ms, monotonic), self.lead_ms.load(Relaxed));
        if found.abs_diff(believed) > STEP_MIN_MS {
            return self.stepped(found, wall_ms, monotonic);
        }
        // It is slewed, in pieces far below a step.
        if found != believed {
            self.lead_ms.store(found, Relaxed);
        }
        if self.is_stepped.load(Relaxed) {
            self.came_back();
        }
        wall_ms
    }

    fn is_settled(&self) -> bool {
        (self.monotonic)() >= BELIEVED_AFTER && !self.is_stepped.load(Relaxed)
    }

    /// The time while the clocks have parted.
    fn stepped(&self, found: i64, wall_ms: u64, monotonic: Duration) -> u64 {
        let mut slow = self.slow.lock().unwrap_or_else(PoisonError::into_inner);
        // Another thread may have settled it meanwhile.
        let believed = self.lead_ms.load(Relaxed);
        if found.abs_diff(believed) <= STEP_MIN_MS {
            return wall_ms;
        }
        let by_seconds = (found - believed) / 1000;
        if found < believed || slow.is_return(found, monotonic) {
            self.steps.fetch_add(1, Relaxed);
            tracing::warn!(by_seconds, "the machine's clock stepped back, or returned from such a step");
            slow.left = Some((believed, monotonic));
            return self.believe(&mut slow, found, wall_ms);
        }
        let since = if let Some(since) = slow.stepped_at {
            since
        } else {
            if self.has_slept(&mut slow, found.abs_diff(believed), monotonic) {
                return self.believe(&mut slow, found, wall_ms);
            }
            self.steps.fetch_add(1, Relaxed);
            self.is_stepped.store(true, Relaxed);
            tracing::warn!(
                by_seconds,
                "the machine's clock stepped ahead; until that has lasted {} s, time goes on as it went and nothing expires by it",
                BELIEVED_AFTER.as_secs()
            );
            *slow.stepped_at.insert(monotonic)
        };
        if monotonic.saturating_sub(since) < BELIEVED_AFTER {
            let now_ms = believed.saturating_add_unsigned(millis(monotonic));
            return u64::try_from(now_ms).unwrap_or(0);
        }
        tracing::warn!(by_seconds, "the machine's clock is believed again");
        self.believe(&mut slow, found, wall_ms)
    }

    fn believe(&self, slow: &mut Slow, found: i64, wall_ms: u64) -> u64 {
        slow.stepped_at = None;
        self.is_stepped.store(false, Relaxed);
        self.lead_ms.store(found, Relaxed);
        wall_ms
    }

    /// Whether the step is as long as the machine slept, which the monotonic clock does not count.
    fn has_slept(&self, slow: &mut Slow, step_ms: u64, monotonic: Duration) -> bool {
        let slept = (self.uptime)().map(|up| up.saturating_sub(monotonic));
        let before = std::mem::replace(&mut slow.slept, slept);
        let fresh = slept.zip(before).map(|(slept, before)| millis(slept.saturating_sub(before)));
        fresh.is_some_and(|fresh| fresh.abs_diff(step_ms) <= STEP_MIN_MS)
    }

    fn came_back(&self) {
        let mut slow = self.slow.lock().unwrap_or_else(PoisonError::into_inner);
        if slow.stepped_at.take().is_some() {
            tracing::warn!("the machine's clock came back from its step");
        }
        self.is_stepped.store(false, Relaxed);
    }
}

fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

fn lead(wall_ms: u64, monotonic: Duration) -> i64 {
    i64::try_from(wall_ms).unwrap_or(i64::MAX).saturating_sub_unsigned(millis(monotonic))
}

#[cfg(test)]
mod tests {
    use std::{
        sync::{
            Arc,
            atomic::{AtomicU64, Ordering::SeqCst},
        },
        time::Duration,
    };

    use super::{BELIEVED_AFTER, Steady};

    const HOUR_MS: u64 = 3_600_000;

    /// A machine whose clocks are set by hand.
    #[derive(Clone, Default)]
    struct Machine {
        wall: Arc<AtomicU64>,
        monotonic: Arc<AtomicU64>,
        slept: Arc<AtomicU64>,
    }

    impl Machine {
        fn steady(&self) -> Steady {
            self.wall.store(1_000 * HOUR_MS, SeqCst);
            let (wall, monotonic, up) = (self.clone(), self.clone(), self.clone());
            let ms = |value: &AtomicU64| Duration::from_millis(value.load(SeqCst));
            let uptime = move || Some(ms(&up.monotonic) + ms(&up.slept));
            Steady::new(move || wall.wall.load(SeqCst), move || ms(&monotonic.monotonic), uptime)
        }

        fn pass(&self, ms: u64) {
            self.wall.fetch_add(ms, SeqCst);
            self.monotonic.fetch_add(ms, SeqCst);
        }
    }

    #[test]
    fn a_step_that_does_not_last_is_not_followed() {
        let machine = Machine::default();
        let steady = machine.steady();
        machine.pass(1_000);
        assert_eq!(steady.now_ms(), 1_000 * HOUR_MS + 1_000);
        let before = steady.now_ms();
        machine.wall.fetch_add(25 * HOUR_MS, SeqCst);
        machine.pass(5_000);
        assert_eq!(steady.now_ms(), before + 5_000, "as it went");
        machine.wall.fetch_sub(25 * HOUR_MS, SeqCst);
        machine.pass(5_000);
        assert_eq!(steady.now_ms(), before + 10_000);
        assert_eq!(steady.steps.load(SeqCst), 1);
    }

    #[test]
    fn a_step_back_is_followed_and_so_is_its_return() {
        let machine = Machine::default();
        let steady = machine.steady();
        let before = steady.now_ms();
        machine.wall.fetch_sub(25 * HOUR_MS, SeqCst);
        machine.pass(5_000);
        assert_eq!(steady.now_ms(), before - 25 * HOUR_MS + 5_000);
        machine.wall.fetch_add(25 * HOUR_MS, SeqCst);
        machine.pass(5_000);
        assert_eq!(steady.now_ms(), before + 10_000);
        // Another step ahead is none that returns.
        machine.wall.fetch_add(25 * HOUR_MS, SeqCst);
        assert_eq!(steady.now_ms(), before + 10_000);
    }

    #[test]
    fn a_clock_that_was_just_looked_at_first_is_not_settled() {
        let machine = Machine::default();
        let steady = machine.steady();
        assert!(!steady.is_settled());
        machine.pass(BELIEVED_AFTER.as_millis() as u64);
        steady.now_ms();
        assert!(steady.is_settled());
        machine.wall.fetch_add(25 * HOUR_MS, SeqCst);
        steady.now_ms();
        assert!(!steady.is_settled());
    }

    #[test]
    fn a_step_that_lasts_is_believed() {
        let machine = Machine::default();
        let steady = machine.steady();
        machine.wall.fetch_add(25 * HOUR_MS, SeqCst);
        let before = steady.now_ms();
        assert_eq!(before, 1_000 * HOUR_MS);
        machine.pass(BELIEVED_AFTER.as_millis() as u64);
        assert_eq!(steady.now_ms(), machine.wall.load(SeqCst));
        machine.pass(1_000);
        assert_eq!(steady.now_ms(), machine.wall.load(SeqCst), "and goes on from there");
    }

    #[test]
    fn small_corrections_and_sleep_are_followed_at_once() {
        let machine = Machine::default();
        let steady = machine.steady();
        for _ in 0..100 {
            machine.pass(1_000);
            machine.wall.fetch_add(20_000, SeqCst);
            assert_eq!(steady.now_ms(), machine.wall.load(SeqCst));
        }
        machine.wall.fetch_add(10 * HOUR_MS, SeqCst);
        machine.slept.fetch_add(10 * HOUR_MS, SeqCst);
        assert_eq!(steady.now_ms(), machine.wall.load(SeqCst));
        assert_eq!(steady.steps.load(SeqCst), 0);
    }
}

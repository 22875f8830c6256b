//! How figures are made of times.

use std::time::Duration;

use crate::MEASURE;

/// Calls `step` until [`MEASURE`] is over; answers how many units it did a second.
pub(crate) fn rate(mut step: impl FnMut() -> usize) -> f64 {
    let begun = std::time::Instant::now();
    let mut units = 0;
    while begun.elapsed() < MEASURE {
        units += step();
    }
    units as f64 / begun.elapsed().as_secs_f64()
}

/// The value below which `share` of the sorted latencies lie.
pub(crate) fn percentile(sorted: &[Duration], share: f64) -> Duration {
    sorted[((sorted.len() - 1) as f64 * share) as usize]
}

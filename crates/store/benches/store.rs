//! The store's bench: one table, each figure beside the physical or library limit of the same run.
//!
//! Run by `cargo xtask bench store [section …]`; sections are named in `main`. Writes `target/bench/store.json`.

#![allow(
    clippy::disallowed_methods,
    clippy::expect_used,
    clippy::panic,
    clippy::print_stdout,
    clippy::unwrap_used,
    reason = "bench code"
)]

#[path = "store/append.rs"]
mod append;
#[path = "store/ledger.rs"]
mod ledger;
#[path = "store/read.rs"]
mod read;
#[path = "store/report.rs"]
mod report;
#[path = "store/scale.rs"]
mod scale;
#[path = "store/timing.rs"]
mod timing;

use report::Report;

/// As in the server.
#[global_allocator]
static ALLOCATOR: tikv_jemallocator::Jemalloc = tikv_jemallocator::Jemalloc;

/// How long one throughput figure is measured.
const MEASURE: std::time::Duration = std::time::Duration::from_millis(1000);

fn main() {
    let wanted: Vec<String> = std::env::args().skip(1).filter(|arg| !arg.starts_with('-')).collect();
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
    runtime.block_on(scale::fill_if_asked());
    let mut report = Report::default();
    let mut section = |name: &str, run: &mut dyn FnMut(&mut Report)| {
        if wanted.is_empty() || wanted.iter().any(|w| w == name) {
            run(&mut report);
        }
    };
    section("append", &mut |report| runtime.block_on(append::run(report)));
    section("read", &mut |report| runtime.block_on(read::run(report)));
    section("ledger", &mut |report| runtime.block_on(ledger::run(report)));
    section("topics", &mut |report| runtime.block_on(scale::idle_topics(report)));
    section("readers", &mut |report| runtime.block_on(scale::idle_readers(report)));
    section("reopen", &mut |report| runtime.block_on(scale::reopening(report)));
    report.write_json("store");
}

//! The log's suite on the embedded back end.

#![allow(clippy::unwrap_used, reason = "test code")]

use trunkline_store::{
    conformance::log::Home,
    log::{Log, Options},
    log_suite,
};

struct Embedded(tempfile::TempDir);

impl Home for Embedded {
    async fn open(&self, options: Options) -> Log {
        Log::open(self.0.path(), options).unwrap()
    }
}

log_suite!(Embedded(tempfile::tempdir().unwrap()));

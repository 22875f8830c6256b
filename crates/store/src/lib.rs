//! Trunkline's store: the log and the leases and the ledger behind it.

pub mod lease;
pub mod ledger;
pub mod log;
#[cfg(feature = "test-util")]
pub mod conformance;

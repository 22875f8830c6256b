//! The leases' suite on the embedded back end.

#![allow(clippy::unwrap_used, reason = "test code")]

use trunkline_store::{lease::Leases, lease_suite};

lease_suite!(Leases::in_memory());

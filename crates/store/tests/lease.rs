//! The leases' suite on the embedded back end.

use trunkline_store::{lease::Leases, lease_suite};

lease_suite!(Leases::in_memory());

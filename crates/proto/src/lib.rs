//! The contract that agents, tasks, users, orchestrators, engines, bridges and services speak with Trunkline, compiled
//! from `proto/`. Nothing else lives here: no helpers, no I/O.

pub use self::{aether::v1, trunkline::v1 as own};

/// `aether.v1`: messages, the client and the server of its one service.
#[allow(
    missing_docs,
    unreachable_pub,
    unused_qualifications,
    clippy::all,
    clippy::pedantic,
    clippy::restriction,
    reason = "generated code; its documentation is the comments of the .proto file"
)]
mod aether {
    /// The published contract.
    pub mod v1 {
        tonic::include_proto!("aether.v1");

        /// Both packages as an encoded `FileDescriptorSet`.
        pub const DESCRIPTORS: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/contract.bin"));
    }
}

/// `trunkline.v1`: what goes beyond it.
#[allow(
    missing_docs,
    unreachable_pub,
    unused_qualifications,
    clippy::all,
    clippy::pedantic,
    clippy::restriction,
    reason = "generated code; its documentation is the comments of the .proto file"
)]
mod trunkline {
    /// Extensions, and the operators' service.
    pub mod v1 {
        tonic::include_proto!("trunkline.v1");
    }
}

//! The contract that agents, tasks, users, orchestrators, engines, bridges and services speak with Trunkline, compiled
//! from `proto/`: the published one as [`v1`], and what goes beyond it as [`own`]. Nothing else lives here: no helpers, no
//! I/O.

pub use generated::{aether::v1, trunkline::v1 as own};

#[allow(
    missing_docs,
    unreachable_pub,
    unused_qualifications,
    clippy::all,
    clippy::pedantic,
    clippy::restriction,
    reason = "generated code; its documentation is the comments of the .proto files"
)]
mod generated {
    pub mod aether {
        /// `aether.v1`: messages, the client and the server of its one service.
        pub mod v1 {
            tonic::include_proto!("aether.v1");

            /// Both packages as an encoded `FileDescriptorSet`.
            pub const DESCRIPTORS: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/contract.bin"));
        }
    }

    pub mod trunkline {
        /// `trunkline.v1`: extensions, and the operators' service.
        pub mod v1 {
            tonic::include_proto!("trunkline.v1");
        }
    }
}

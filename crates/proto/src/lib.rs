//! The contract that agents, tasks, users, orchestrators, engines, bridges and services speak with Trunkline, compiled
//! from `proto/aether/v1/aether.proto`. Nothing else lives here: no helpers, no I/O.

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
pub mod v1 {
    tonic::include_proto!("aether.v1");

    /// The contract as an encoded `FileDescriptorSet`.
    pub const DESCRIPTORS: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/aether.v1.bin"));
}

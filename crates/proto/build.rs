//! Compiles the contract with a protobuf compiler in Rust, so that no `protoc` is needed.

use std::{env, error::Error, fs, path::PathBuf};

use prost::Message as _;

fn main() -> Result<(), Box<dyn Error>> {
    println!("cargo:rerun-if-changed=proto");
    let descriptors = protox::compile(["aether/v1/aether.proto"], ["proto"])?;
    let out = PathBuf::from(env::var_os("OUT_DIR").ok_or("cargo sets OUT_DIR")?);
    fs::write(out.join("aether.v1.bin"), descriptors.encode_to_vec())?;
    // Payloads are handed from socket to log without a copy.
    tonic_prost_build::configure().build_transport(false).bytes(".aether.v1").compile_fds(descriptors)?;
    Ok(())
}

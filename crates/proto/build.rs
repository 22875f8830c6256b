//! Compiles the contract with a protobuf compiler in Rust, so that no `protoc` is needed.

use std::{env, error::Error, fs, path::PathBuf};

use prost::Message as _;
use prost_types::{DescriptorProto, FieldDescriptorProto, FileDescriptorSet, field_descriptor_proto};

fn main() -> Result<(), Box<dyn Error>> {
    println!("cargo:rerun-if-changed=proto");
    let descriptors = protox::compile(["aether/v1/aether.proto"], ["proto"])?;
    let out = PathBuf::from(env::var_os("OUT_DIR").ok_or("cargo sets OUT_DIR")?);
    fs::write(out.join("contract.bin"), descriptors.encode_to_vec())?;
    // Payloads are handed from socket to log without a copy.
    let mut config = tonic_prost_build::configure().build_transport(false).bytes(".");
    for path in boxed(&descriptors) {
        config = config.boxed(path);
    }
    config.compile_fds(descriptors)?;
    Ok(())
}

/// The frames of both directions.
const FRAMES: [&str; 2] = ["UpstreamMessage", "DownstreamMessage"];

/// What makes up the traffic. A frame has room for one of these in itself and for everything else on the heap, so that the
/// rare and large does not make the frequent and small slow to move.
const FREQUENT: [&str; 2] = ["SendMessage", "IncomingMessage"];

/// The fields that are kept on the heap.
fn boxed(descriptors: &FileDescriptorSet) -> Vec<String> {
    let messages: Vec<&DescriptorProto> = descriptors.file.iter().flat_map(|file| &file.message_type).collect();
    let is_frequent =
        |field: &FieldDescriptorProto| FREQUENT.iter().any(|name| field.type_name() == format!(".aether.v1.{name}"));
    let in_frames = messages.iter().filter(|message| FRAMES.contains(&message.name())).flat_map(|message| {
        let fields = message.field.iter().filter(|field| field.oneof_index.is_some() && !is_frequent(field));
        fields.map(|field| format!(".aether.v1.{}.payload.{}", message.name(), field.name()))
    });
    let in_frequent = messages.iter().filter(|message| FREQUENT.contains(&message.name())).flat_map(|message| {
        let fields = message.field.iter().filter(|field| {
            field.label() == field_descriptor_proto::Label::Optional
                && field.r#type() == field_descriptor_proto::Type::Message
        });
        fields.map(|field| format!(".aether.v1.{}.{}", message.name(), field.name()))
    });
    in_frames.chain(in_frequent).collect()
}

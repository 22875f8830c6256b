//! The compiled contract and the published table say the same, in both directions.

#![allow(clippy::unwrap_used, reason = "test code")]

use std::collections::BTreeSet;

use prost::Message as _;
use prost_types::{
    DescriptorProto, EnumDescriptorProto, FieldDescriptorProto, FileDescriptorSet,
    field_descriptor_proto::{Label, Type},
};

/// Numbers from here on are ours and not in the published table.
const OURS_FROM: i32 = 1000;

/// A line of the table: kind, container, name, number, type, label, oneof.
type Row = [String; 7];

#[test]
fn the_compiled_contract_is_the_published_one() {
    let compiled = compiled();
    let published = published();
    let missing: Vec<_> = published.difference(&compiled).collect();
    let added: Vec<_> = compiled.difference(&published).collect();
    assert!(missing.is_empty() && added.is_empty(), "missing: {missing:#?}\nadded: {added:#?}");
    assert!(published.len() > 1400, "the table is not cut short");
}

fn published() -> BTreeSet<Row> {
    let mut table = csv::Reader::from_path(concat!(env!("CARGO_MANIFEST_DIR"), "/contract.csv")).unwrap();
    table.deserialize().map(Result::unwrap).collect()
}

fn compiled() -> BTreeSet<Row> {
    let set = FileDescriptorSet::decode(trunkline_proto::v1::DESCRIPTORS).unwrap();
    let mut rows = BTreeSet::new();
    for file in set.file.iter().filter(|file| file.package() == "aether.v1") {
        file.message_type.iter().for_each(|message| message_rows(message, "", &mut rows));
        file.enum_type.iter().for_each(|each| enum_rows(each, "", &mut rows));
        for service in &file.service {
            for method in &service.method {
                let types = format!("{} -> {}", local(method.input_type()), local(method.output_type()));
                let streams = [method.client_streaming(), method.server_streaming()];
                let [up, down] = streams.map(|stream| if stream { "stream" } else { "" });
                rows.insert(row(["rpc", service.name(), method.name(), "", &types, &format!("{up}/{down}"), ""]));
            }
        }
    }
    rows
}

fn message_rows(message: &DescriptorProto, parent: &str, rows: &mut BTreeSet<Row>) {
    let container = format!("{parent}{}", message.name());
    let inner = format!("{container}.");
    for field in message.field.iter().filter(|field| field.number() < OURS_FROM) {
        let map = message.nested_type.iter().find(|nested| {
            nested.options.as_ref().is_some_and(prost_types::MessageOptions::map_entry)
                && field.type_name().ends_with(&format!(".{container}.{}", nested.name()))
        });
        let kind = match map {
            Some(entry) => format!("map<{},{}>", type_name(&entry.field[0]), type_name(&entry.field[1])),
            None => type_name(field),
        };
        let label = if field.label() == Label::Repeated && map.is_none() { "repeated" } else { "" };
        let oneof = field.oneof_index.and_then(|index| message.oneof_decl.get(index as usize));
        let oneof = oneof.map_or("", |oneof| oneof.name());
        rows.insert(row(["field", &container, field.name(), &field.number().to_string(), &kind, label, oneof]));
    }
    for nested in &message.nested_type {
        if !nested.options.as_ref().is_some_and(prost_types::MessageOptions::map_entry) {
            message_rows(nested, &inner, rows);
        }
    }
    message.enum_type.iter().for_each(|each| enum_rows(each, &inner, rows));
}

fn enum_rows(each: &EnumDescriptorProto, parent: &str, rows: &mut BTreeSet<Row>) {
    let container = format!("{parent}{}", each.name());
    for value in each.value.iter().filter(|value| value.number() < OURS_FROM) {
        rows.insert(row(["enum", &container, value.name(), &value.number().to_string(), "", "", ""]));
    }
}

fn type_name(field: &FieldDescriptorProto) -> String {
    match field.r#type() {
        Type::Message => local(field.type_name()),
        Type::Enum => format!("enum {}", local(field.type_name())),
        scalar => format!("{scalar:?}").to_lowercase(),
    }
}

fn local(name: &str) -> String {
    name.trim_start_matches(".aether.v1.").to_owned()
}

fn row(fields: [&str; 7]) -> Row {
    fields.map(str::to_owned)
}

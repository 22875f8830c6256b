//! The house rules of ARCHITECTURE.md that neither cargo nor clippy keeps.
//!
//! - The driver of a database is named by `store` alone, wire types by `proto`, `server` and `client`.
//! - Surfaces of the server do not import each other.
//! - SQL stands in `sql.rs` files, in migrations and in `store`.
//! - Functions do not grow: one over the limit may stay as long as it is, listed in `tidy-ratchet.txt`, but not longer.

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
};

use syn::{spanned::Spanned as _, visit::Visit};

use crate::run::{Result, root};

/// Lines of a function from its name to its last brace. A screen.
const FUNCTION_LINES_MAX: usize = 70;

/// Functions that were longer when the limit came, with their length: `path::name lines`.
const RATCHET: &str = "xtask/tidy-ratchet.txt";

/// Crates that may be named only below these folders.
const NAMED_ONLY_BELOW: [(&str, &[&str]); 7] = [
    ("fjall", &["crates/store"]),
    ("rusqlite", &["crates/store", "crates/agent-socket"]),
    ("tokio_postgres", &["crates/store"]),
    ("async_nats", &["crates/store"]),
    ("tonic", &["crates/proto", "crates/server", "crates/client", "fuzz"]),
    ("axum", &["crates/server", "crates/client"]),
    ("trunkline_proto", &["crates/proto", "crates/server", "crates/client", "fuzz"]),
];

/// Modules of the server that must not name each other.
const SURFACES: [&str; 5] = ["agent", "conversation", "sandbox", "socket", "stream"];

pub(crate) fn run() -> Result {
    let ratchet = read_ratchet()?;
    let mut problems = Vec::new();
    let mut long = BTreeMap::new();
    for path in rust_files()? {
        let name = path.strip_prefix(root())?.to_string_lossy().into_owned();
        let text = fs::read_to_string(&path)?;
        let file = syn::parse_file(&text).map_err(|e| format!("{name}: {e}"))?;
        let mut seen = Seen::default();
        seen.visit_file(&file);
        problems.extend(check_names(&name, &seen.paths));
        problems.extend(check_sql(&name, &seen.strings));
        for (function, lines) in seen.functions.into_iter().filter(|(_, lines)| *lines > FUNCTION_LINES_MAX) {
            long.insert(format!("{name}::{function}"), lines);
        }
    }
    for (function, lines) in &long {
        match ratchet.get(function) {
            Some(allowed) if lines <= allowed => {}
            Some(allowed) => {
                problems.push(format!("{function} has {lines} lines; it may have {allowed} and must not grow"));
            }
            None => problems.push(format!("{function} has {lines} lines; a function may have {FUNCTION_LINES_MAX}")),
        }
    }
    for function in ratchet.keys().filter(|function| !long.contains_key(*function)) {
        problems.push(format!("{function} is no longer too long: take it out of {RATCHET}"));
    }
    if problems.is_empty() { Ok(()) } else { Err(problems.join("\n").into()) }
}

fn read_ratchet() -> Result<BTreeMap<String, usize>> {
    let text = fs::read_to_string(root().join(RATCHET))?;
    let lines = text.lines().filter(|line| !line.is_empty() && !line.starts_with('#'));
    lines
        .map(|line| {
            let (name, lines) = line.rsplit_once(' ').ok_or_else(|| format!("{RATCHET}: {line:?}"))?;
            Ok((name.to_owned(), lines.parse()?))
        })
        .collect()
}

fn rust_files() -> Result<Vec<PathBuf>> {
    let mut files = Vec::new();
    let mut folders = vec![root().join("crates"), root().join("fuzz"), root().join("xtask")];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(folder)? {
            let path = entry?.path();
            if path.is_dir() {
                folders.push(path);
            } else if path.extension().is_some_and(|extension| extension == "rs") {
                files.push(path);
            }
        }
    }
    files.sort();
    Ok(files)
}

fn check_names(file: &str, paths: &[Vec<String>]) -> Vec<String> {
    let mut problems = Vec::new();
    for path in paths {
        let Some(first) = path.first() else { continue };
        for (name, folders) in NAMED_ONLY_BELOW {
            if first == name && !folders.iter().any(|folder| file.starts_with(folder)) {
                problems.push(format!("{file} names {name}; only {} may", folders.join(", ")));
            }
        }
        if let Some(surface) = surface_of(file)
            && first == "crate"
            && let Some(other) = path.get(1)
            && SURFACES.contains(&other.as_str())
            && other != surface
        {
            problems.push(format!("{file} names the surface {other}; surfaces share auth, error, http and sse only"));
        }
    }
    problems.sort();
    problems.dedup();
    problems
}

fn surface_of(file: &str) -> Option<&str> {
    let inside = file.strip_prefix("crates/server/src/")?;
    let name = inside.split('/').next()?.trim_end_matches(".rs");
    SURFACES.contains(&name).then_some(name)
}

fn check_sql(file: &str, strings: &[String]) -> Option<String> {
    let allowed = Path::new(file).file_name().is_some_and(|name| name == "sql.rs")
        || file.starts_with("crates/store/")
        || file.starts_with("xtask/");
    let is_sql = |text: &&String| {
        ["SELECT ", "INSERT INTO ", "UPDATE ", "DELETE FROM "].iter().any(|word| text.trim_start().starts_with(word))
    };
    strings.iter().find(is_sql).filter(|_| !allowed).map(|text| {
        let start: String = text.trim_start().chars().take(30).collect();
        format!("{file} holds SQL ({start:?}); it belongs in a sql.rs")
    })
}

/// What a file says, as far as the rules ask.
#[derive(Default)]
struct Seen {
    paths: Vec<Vec<String>>,
    strings: Vec<String>,
    functions: Vec<(String, usize)>,
}

impl Seen {
    fn function(&mut self, signature: &syn::Signature, block: &syn::Block) {
        let lines = block.span().end().line - signature.span().start().line + 1;
        self.functions.push((signature.ident.to_string(), lines));
    }

    fn use_tree(&mut self, tree: &syn::UseTree, mut prefix: Vec<String>) {
        match tree {
            syn::UseTree::Path(path) => {
                prefix.push(path.ident.to_string());
                self.use_tree(&path.tree, prefix);
            }
            syn::UseTree::Group(group) => group.items.iter().for_each(|item| self.use_tree(item, prefix.clone())),
            syn::UseTree::Name(name) => {
                prefix.push(name.ident.to_string());
                self.paths.push(prefix);
            }
            syn::UseTree::Rename(rename) => {
                prefix.push(rename.ident.to_string());
                self.paths.push(prefix);
            }
            syn::UseTree::Glob(_) => self.paths.push(prefix),
        }
    }
}

impl<'ast> Visit<'ast> for Seen {
    fn visit_item_use(&mut self, item: &'ast syn::ItemUse) {
        self.use_tree(&item.tree, Vec::new());
    }

    fn visit_path(&mut self, path: &'ast syn::Path) {
        self.paths.push(path.segments.iter().map(|segment| segment.ident.to_string()).collect());
        syn::visit::visit_path(self, path);
    }

    fn visit_lit_str(&mut self, text: &'ast syn::LitStr) {
        self.strings.push(text.value());
    }

    fn visit_item_fn(&mut self, item: &'ast syn::ItemFn) {
        self.function(&item.sig, &item.block);
        syn::visit::visit_item_fn(self, item);
    }

    fn visit_impl_item_fn(&mut self, item: &'ast syn::ImplItemFn) {
        self.function(&item.sig, &item.block);
        syn::visit::visit_impl_item_fn(self, item);
    }
}

#[cfg(test)]
mod tests {
    use super::{Seen, Visit, check_names, check_sql};

    fn seen(text: &str) -> Seen {
        let mut seen = Seen::default();
        seen.visit_file(&syn::parse_file(text).unwrap());
        seen
    }

    #[test]
    fn a_driver_outside_the_store_is_found() {
        let paths = seen("use rusqlite::{Connection, params as p};").paths;
        assert_eq!(check_names("crates/core/src/kv.rs", &paths).len(), 1);
        assert_eq!(check_names("crates/store/src/ledger.rs", &paths).len(), 0);
        assert_eq!(check_names("crates/core/src/kv.rs", &seen("fn f() { tonic::Status::ok(\"\"); }").paths).len(), 1);
    }

    #[test]
    fn surfaces_do_not_know_each_other() {
        let paths = seen("use crate::{error, sandbox::Thing};").paths;
        assert_eq!(check_names("crates/server/src/agent/inbound.rs", &paths).len(), 1);
        assert_eq!(check_names("crates/server/src/sandbox.rs", &paths).len(), 0);
        assert_eq!(check_names("crates/server/src/app.rs", &paths).len(), 0);
    }

    #[test]
    fn sql_belongs_in_its_file() {
        let strings = seen("const Q: &str = \" SELECT 1\";").strings;
        assert!(check_sql("crates/core/src/kv.rs", &strings).is_some());
        assert!(check_sql("crates/core/src/kv/sql.rs", &strings).is_none());
    }

    #[test]
    fn functions_are_measured() {
        let seen = seen("fn a() {\n\n}\nstruct S;\nimpl S {\nfn b() {}\n}");
        assert_eq!(seen.functions, [("a".to_owned(), 3), ("b".to_owned(), 1)]);
    }
}

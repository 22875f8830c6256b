//! The first start of a log: all or nothing.
//!
//! A crash or a full disk can end the engine's own creation anywhere, and what that leaves it neither opens nor makes anew.
//! So a log is made in a directory inside of its own, made durable there, and moved to its place; the engine's version
//! marker moves last. A directory without that marker was never written to, and its creation begins again.

use std::{fs, io, path::Path};

use super::{
    Error,
    engine::{corrupt, io_error},
    journal,
};
use crate::durable;

/// Where a log is made.
const NEW: &str = "new";

/// The engine's marker of a directory that is complete.
const MARKER: &str = "version";

/// What the engine and this module make, besides journals.
const MADE: [&str; 7] = [NEW, "keyspaces", "index", "lock", "seal", "seal.new", MARKER];

/// More than creation itself leaves in a journal.
const FIRST_BATCH_BYTES_MAX: u64 = 4096;

/// Makes the log in `dir` by `make`, which is given an empty directory, unless there is one.
///
/// # Errors
/// [`Error::Unavailable`] if the disk refuses: the next call begins again. [`Error::Corrupt`] if the marker is gone from a
/// log that was written to.
pub(super) fn ensure(dir: &Path, make: impl FnOnce(&Path) -> Result<(), Error>) -> Result<(), Error> {
    let refused = |e| io_error(dir, &e);
    fs::create_dir_all(dir).map_err(refused)?;
    if is_complete(dir).map_err(refused)? {
        // All that a crash can leave of it is the empty directory.
        return durable::remove_tree(&dir.join(NEW)).map_err(refused);
    }
    if journal::used_bytes(dir).map_err(refused)? > FIRST_BATCH_BYTES_MAX {
        let reason = format!("{} holds records, but its file {MARKER:?} is missing or empty", dir.display());
        return Err(corrupt(reason));
    }
    clear(dir).map_err(refused)?;
    let new = dir.join(NEW);
    fs::create_dir(&new).map_err(refused)?;
    let made = make(&new).and_then(|()| take_over(&new, dir).map_err(refused));
    if made.is_err() {
        // A full disk is to be left no fuller. What remains is removed by the next start.
        let _ = clear(dir);
    }
    made
}

fn is_complete(dir: &Path) -> io::Result<bool> {
    match fs::read(dir.join(MARKER)) {
        Ok(bytes) => Ok(bytes.iter().any(|byte| *byte != 0)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(error) => Err(error),
    }
}

/// Removes what an earlier creation left.
fn clear(dir: &Path) -> io::Result<()> {
    for journal in journal::journals(dir)? {
        fs::remove_file(journal)?;
    }
    for name in MADE {
        let path = dir.join(name);
        match fs::symlink_metadata(&path) {
            Ok(found) if found.is_dir() => fs::remove_dir_all(&path)?,
            Ok(_) => fs::remove_file(&path)?,
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

fn take_over(new: &Path, dir: &Path) -> io::Result<()> {
    durable::sync_tree(new)?;
    for entry in fs::read_dir(new)? {
        let entry = entry?;
        if entry.file_name() != MARKER {
            fs::rename(entry.path(), dir.join(entry.file_name()))?;
        }
    }
    durable::sync_dir(dir)?;
    fs::rename(new.join(MARKER), dir.join(MARKER))?;
    fs::remove_dir(new)?;
    durable::sync_dir(dir)?;
    dir.parent().map_or(Ok(()), durable::sync_dir)
}

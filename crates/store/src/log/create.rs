//! The first start of a log: all or nothing.
//!
//! A crash or a full disk can end the engine's own creation anywhere, and what that leaves it neither opens nor makes anew.
//! So a directory has a mark of ours while the log in it is made: one with that mark was never written to, and its creation
//! begins again. The log that was made is used as it is. Opened once more, the engine would append to its first journal,
//! and each sync of that would write the file's size, too; a new journal has its size from the beginning.

use std::{fs, io, path::Path};

use super::{
    Error,
    engine::{corrupt, io_error},
    journal,
};
use crate::durable;

/// Is there while a log is made.
const MAKING: &str = "making";

/// Where logs were made once, to be moved to their place.
const NEW: &str = "new";

/// The engine's marker of a directory that is complete.
const MARKER: &str = "version";

/// What else the engine and this module make, besides journals.
const MADE: [&str; 6] = [NEW, "keyspaces", "index", "lock", "seal", "seal.new"];

/// More than creation itself leaves in a journal.
const FIRST_BATCH_BYTES_MAX: u64 = 4096;

/// Opens the log in `dir` by `open`, in an empty directory if there is none.
///
/// # Errors
/// [`Error::Unavailable`] if the disk refuses: the next call begins again. [`Error::Corrupt`] if a log that was written to
/// has lost the engine's marker or has a mark.
pub(super) fn open_or_make<T>(dir: &Path, open: impl FnOnce() -> Result<T, Error>) -> Result<T, Error> {
    let refused = |e| io_error(dir, &e);
    fs::create_dir_all(dir).map_err(refused)?;
    if is_complete(dir).map_err(refused)? {
        // All that a crash can leave of it is the empty directory.
        durable::remove_tree(&dir.join(NEW)).map_err(refused)?;
        return open();
    }
    if was_written_to(dir).map_err(refused)? {
        let why = if dir.join(MAKING).exists() {
            format!("it has a file {MAKING:?} as if it had not been made yet")
        } else {
            format!("its file {MARKER:?} is missing or empty")
        };
        return Err(corrupt(format!("{} holds records, but {why}", dir.display())));
    }
    let made = begin(dir).map_err(refused).and_then(|()| open());
    let made = made.and_then(|made| finish(dir).map(|()| made).map_err(refused));
    if made.is_err() {
        // A full disk is to be left no fuller. What remains is removed by the next start.
        let _ = clear(dir);
    }
    made
}

/// Removes what an earlier creation left, and marks the directory.
fn begin(dir: &Path) -> io::Result<()> {
    clear(dir)?;
    fs::File::create(dir.join(MAKING))?;
    durable::sync_dir(dir)?;
    dir.parent().map_or(Ok(()), durable::sync_dir)
}

/// Makes durable what was made, and then that it is complete.
fn finish(dir: &Path) -> io::Result<()> {
    durable::sync_tree(dir)?;
    fs::remove_file(dir.join(MAKING))?;
    durable::sync_dir(dir)
}

fn is_complete(dir: &Path) -> io::Result<bool> {
    if dir.join(MAKING).try_exists()? {
        return Ok(false);
    }
    match fs::read(dir.join(MARKER)) {
        Ok(bytes) => Ok(bytes.iter().any(|byte| *byte != 0)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(error) => Err(error),
    }
}

/// Whether there is more than creation leaves: one journal, with little in it.
fn was_written_to(dir: &Path) -> io::Result<bool> {
    Ok(journal::journals(dir)?.len() > 1 || journal::used_bytes(dir)? > FIRST_BATCH_BYTES_MAX)
}

/// Removes what an earlier creation left: first what says that it is complete, and last what says that it is not.
fn clear(dir: &Path) -> io::Result<()> {
    remove(&dir.join(MARKER))?;
    durable::sync_dir(dir)?;
    for journal in journal::journals(dir)? {
        fs::remove_file(journal)?;
    }
    MADE.iter().try_for_each(|name| remove(&dir.join(name)))?;
    durable::sync_dir(dir)?;
    remove(&dir.join(MAKING))
}

/// Removes a file or a directory, if there is one.
fn remove(path: &Path) -> io::Result<()> {
    match fs::symlink_metadata(path) {
        Ok(found) if found.is_dir() => fs::remove_dir_all(path),
        Ok(_) => fs::remove_file(path),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(error) => Err(error),
    }
}

//! Journals as they were before their torn ends were cut off, for as long as it is not certain that nothing acknowledged is
//! cut off with them.
//!
//! Where no whole batch is left in any journal, its stamps do not say how far the log was: what was acknowledged may be in
//! tables, which only the opened engine can tell. So the journals are copied, cut and opened; then the copies go, or go back.

use std::{
    fs, io,
    path::{Path, PathBuf},
};

use crate::durable;

const COPIES: &str = "torn";

/// While they are written, and while they are removed.
const UNUSED: &str = "torn.unused";

/// Puts back what an earlier start copied and did not get to decide.
pub(super) fn put_back(dir: &Path) -> io::Result<()> {
    durable::remove_tree(&dir.join(UNUSED))?;
    let copies = dir.join(COPIES);
    let entries = match fs::read_dir(&copies) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        entries => entries?,
    };
    for entry in entries {
        let entry = entry?;
        fs::rename(entry.path(), dir.join(entry.file_name()))?;
    }
    durable::sync_dir(dir)?;
    fs::remove_dir(&copies)?;
    durable::sync_dir(dir)
}

/// Copies journals of `dir`, durably: all or none.
pub(super) fn copy<'p>(dir: &Path, journals: impl Iterator<Item = &'p PathBuf>) -> io::Result<()> {
    let unused = dir.join(UNUSED);
    fs::create_dir(&unused)?;
    for journal in journals {
        let name = journal.file_name().ok_or(io::ErrorKind::InvalidInput)?;
        fs::copy(journal, unused.join(name))?;
    }
    durable::sync_tree(&unused)?;
    fs::rename(&unused, dir.join(COPIES))?;
    durable::sync_dir(dir)
}

/// Removes the copies: what was cut off is gone for good. Once this begins, none is put back.
pub(super) fn remove(dir: &Path) -> io::Result<()> {
    fs::rename(dir.join(COPIES), dir.join(UNUSED))?;
    durable::sync_dir(dir)?;
    durable::remove_tree(&dir.join(UNUSED))
}

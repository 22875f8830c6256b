//! What lies in a data directory is its owner's alone: the secrets of apps are among it, in clear.

use std::{
    fs::{self, DirBuilder, File},
    io,
    os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _, PermissionsExt as _},
    path::Path,
};

use crate::{OpenError, durable, io_error};

/// Permissions of everybody but the owner.
const OTHERS: u32 = 0o077;

/// Directories and files that hold what is kept. SQLite gives its journals the permissions of its file.
const DIRECTORIES: [&str; 2] = ["log", "files"];
const FILES: [&str; 3] = ["ledger.sqlite", "ledger.sqlite-wal", "ledger.sqlite-shm"];

/// Makes a directory that only its owner can look into; one that is there already is closed to others. A directory that
/// belongs to somebody else, as a mounted volume can, is left as it is: see [`close_contents`].
pub(crate) fn make(dir: &Path) -> Result<(), OpenError> {
    create(dir).map_err(|e| io_error(dir, e))?;
    match close(dir) {
        Ok(true) => {
            tracing::warn!(dir = %dir.display(), "data directory was open to other users; it is closed to them now");
        }
        Ok(false) => {}
        Err(error) => tracing::warn!(
            %error, dir = %dir.display(),
            "data directory is open to other users and cannot be closed; what is in it is closed to them"
        ),
    }
    Ok(())
}

/// Makes the directory, and its ancestors, unless they are there; durably.
fn create(dir: &Path) -> io::Result<()> {
    let missing: Vec<&Path> = dir.ancestors().take_while(|dir| !dir.exists()).collect();
    DirBuilder::new().recursive(true).mode(0o700).create(dir)?;
    missing.into_iter().filter_map(Path::parent).try_for_each(durable::sync_dir)
}

/// Makes what the store keeps in `dir`, empty, if it is not there yet, and closes it to others: also a directory that others
/// can look into holds nothing that they can read.
pub(crate) fn close_contents(dir: &Path) -> Result<(), OpenError> {
    for path in DIRECTORIES.map(|name| dir.join(name)) {
        let made = DirBuilder::new().recursive(true).mode(0o700).create(&path);
        made.and_then(|()| close(&path)).map_err(|e| io_error(&path, e))?;
    }
    let ledger = dir.join(FILES[0]);
    let made = File::options().append(true).create(true).mode(0o600).open(&ledger);
    made.map_err(|e| io_error(&ledger, e))?;
    for path in FILES.map(|name| dir.join(name)) {
        match close(&path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(io_error(&path, error)),
            _ => {}
        }
    }
    Ok(())
}

/// Takes all permissions from others; answers whether they had any.
fn close(path: &Path) -> io::Result<bool> {
    let mode = fs::metadata(path)?.permissions().mode();
    if mode & OTHERS == 0 {
        return Ok(false);
    }
    fs::set_permissions(path, fs::Permissions::from_mode(mode & !OTHERS))?;
    Ok(true)
}

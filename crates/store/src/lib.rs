//! Trunkline's store: what is kept, and nothing about what it means.
//!
//! - [`log`]: topics of records, appended durably, read forward, replayable.
//! - [`ledger`]: rows that are looked up and changed, and the outbox that makes records of them.
//! - [`lease`]: who holds a key right now.
//! - [`files`]: what is too large for a record.
//! - [`fault`]: background threads that failed for good.
//!
//! [`Store::open`] gives all of them over one data directory. This crate knows nothing of agents, HTTP or gRPC.

#[cfg(feature = "test-util")]
pub mod conformance;
mod durable;
pub mod fault;
pub mod files;
pub mod lease;
pub mod ledger;
pub mod log;
mod private;

use std::{
    fs::{self, File},
    io::{self, Read as _, Seek as _, Write as _},
    path::{Path, PathBuf},
    sync::Arc,
};

use files::{Bucket, Files};
use lease::Leases;
use ledger::{Ledger, Migration};
use log::Log;

/// Version of the data directory's layout. One that says a higher number was written by a newer version.
const FORMAT: u32 = 1;

/// Log, leases, ledger and files over one data directory; clones share them.
#[derive(Clone)]
pub struct Store {
    /// The log.
    pub log: Log,
    /// The leases of this process.
    pub leases: Leases,
    /// The ledger.
    pub ledger: Ledger,
    /// The files.
    pub files: Files,
    dir: Arc<Path>,
    _lock: Arc<DirectoryLock>,
}

/// What a write survives once it is acknowledged.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Durability {
    /// The end of the machine, without warning: every batch is fsynced before it is acknowledged.
    #[default]
    Machine,
    /// The end of the process, without warning. The operating system writes to the disk when it likes: if the machine ends
    /// as well, the latest writes may be missing; what a crash tore is cut off at the next start.
    Process,
}

/// How a store is opened.
#[derive(Clone, Debug, Default)]
pub struct Options {
    /// The log's options.
    pub log: log::Options,
    /// The ledger's options.
    pub ledger: ledger::Options,
    /// The ledger's schema.
    pub migrations: Vec<Migration>,
    /// Where files are kept instead of in the directory.
    pub bucket: Option<Bucket>,
}

/// Why a store was not opened.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum OpenError {
    /// Another process has the directory open.
    #[error("data directory {} is in use by process {pid}", dir.display())]
    InUse {
        /// The directory.
        dir: PathBuf,
        /// Which process, in its own words.
        pid: String,
    },
    /// A newer version wrote the directory.
    #[error("data directory {} has format {found}; this version reads up to {FORMAT}", dir.display())]
    NewerFormat {
        /// The directory.
        dir: PathBuf,
        /// What it says.
        found: String,
    },
    /// The directory or a file in it cannot be used.
    #[error("data directory {}: {source}", path.display())]
    Io {
        /// The file or directory.
        path: PathBuf,
        /// What the operating system said.
        source: io::Error,
    },
    /// The log cannot be opened.
    #[error(transparent)]
    Log(#[from] log::Error),
    /// The ledger cannot be opened.
    #[error(transparent)]
    Ledger(#[from] ledger::Error),
    /// Files cannot be kept.
    #[error(transparent)]
    Files(#[from] files::Error),
}

impl Store {
    /// Opens the embedded store in `dir`, or creates it. The directory belongs to this process until the last clone and
    /// reader are gone. Blocks, normally well under a second.
    ///
    /// # Errors
    /// [`OpenError`]; nothing was changed in a directory that is in use or newer.
    pub fn open(dir: &Path, options: Options) -> Result<Self, OpenError> {
        private::make(dir)?;
        let lock = DirectoryLock::take(dir)?;
        check_format(dir)?;
        private::close_contents(dir)?;
        let fsync = options.log.durability == Durability::Machine;
        let log = Log::open(&dir.join("log"), options.log)?;
        let ledger = Ledger::open_sqlite(&dir.join("ledger.sqlite"), &options.migrations, options.ledger)?;
        let files = match &options.bucket {
            Some(bucket) => Files::in_bucket(bucket)?,
            None => Files::in_directory(&dir.join("files"), fsync)?,
        };
        // What was made in it just now.
        durable::sync_dir(dir).map_err(|e| io_error(dir, e))?;
        Ok(Self { log, leases: Leases::in_memory(), ledger, files, dir: dir.into(), _lock: Arc::new(lock) })
    }

    /// Bytes that this process may still write to the file system of the data directory.
    ///
    /// # Errors
    /// What the operating system says.
    pub fn free_bytes(&self) -> io::Result<u64> {
        let stat = rustix::fs::statvfs(&*self.dir)?;
        Ok(stat.f_bavail.saturating_mul(stat.f_frsize))
    }

    /// A value that makes a panic of `part`, whose task or thread has it, a fault that [`Store::failed`] tells of: for what goes on
    /// besides and would be missing without anybody's being told.
    #[must_use]
    pub fn guard(&self, part: &'static str) -> fault::Guard {
        self.ledger.guard(part)
    }

    /// Waits until a thread of the log or of the ledger has failed for good: what it served is not served any more, and the
    /// process should end with the reason.
    pub async fn failed(&self) -> fault::Fault {
        tokio::select! {
            fault = self.ledger.failed() => fault,
            fault = self.log.failed() => fault,
        }
    }

    /// Finishes what waits and closes everything; later calls are answered with an error that says so.
    pub async fn stop(&self) {
        self.ledger.stop().await;
        self.log.stop().await;
    }
}

/// An advisory lock on a file that holds the owner's process id.
struct DirectoryLock {
    _file: File,
}

impl DirectoryLock {
    fn take(dir: &Path) -> Result<Self, OpenError> {
        let path = dir.join("LOCK");
        let open = File::options().read(true).write(true).create(true).truncate(false).open(&path);
        let mut file = open.map_err(|e| io_error(&path, e))?;
        match file.try_lock() {
            Ok(()) => {}
            Err(fs::TryLockError::WouldBlock) => {
                let mut pid = String::new();
                file.read_to_string(&mut pid).map_err(|e| io_error(&path, e))?;
                return Err(OpenError::InUse { dir: dir.to_owned(), pid: pid.trim().to_owned() });
            }
            Err(fs::TryLockError::Error(e)) => return Err(io_error(&path, e)),
        }
        let mut write = || {
            file.set_len(0)?;
            file.rewind()?;
            writeln!(file, "{}", std::process::id())
        };
        write().map_err(|e| io_error(&path, e))?;
        Ok(Self { _file: file })
    }
}

fn check_format(dir: &Path) -> Result<(), OpenError> {
    let path = dir.join("FORMAT");
    let found = match fs::read(&path) {
        Ok(found) => found,
        Err(e) if e.kind() == io::ErrorKind::NotFound => Vec::new(),
        Err(e) => return Err(io_error(&path, e)),
    };
    // Earlier versions did not sync it, so a power loss can have left nothing of it, or zeros.
    if found.iter().all(|byte| *byte == 0 || byte.is_ascii_whitespace()) {
        return durable::write(&path, format!("{FORMAT}\n").as_bytes()).map_err(|e| io_error(&path, e));
    }
    let found = String::from_utf8_lossy(&found).trim().to_owned();
    if found.parse().is_ok_and(|found: u32| found <= FORMAT) {
        return Ok(());
    }
    Err(OpenError::NewerFormat { dir: dir.to_owned(), found })
}

fn io_error(path: &Path, source: io::Error) -> OpenError {
    OpenError::Io { path: path.to_owned(), source }
}

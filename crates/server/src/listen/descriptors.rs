//! File descriptors of the process: how many there are, and how many of them connections may hold.

use rustix::process::{Resource, getrlimit, setrlimit};

/// Descriptors that the store, the log of the process and operators need beside the connections of clients.
pub(crate) const RESERVED: u64 = 512;

/// Raises the soft limit of open files to the hard one. The default of many systems, 1024, is for programs that use `select`.
/// For the program itself, not for those that have a server inside.
pub fn raise_limit() {
    let limit = getrlimit(Resource::Nofile);
    let raised = rustix::process::Rlimit { current: limit.maximum, maximum: limit.maximum };
    if limit.current != limit.maximum
        && let Err(error) = setrlimit(Resource::Nofile, raised)
    {
        tracing::warn!(%error, "cannot raise the limit of open files to the hard limit");
    }
}

/// Connections of clients that the process has descriptors for, while at least half of them, up to [`RESERVED`], stay free.
pub(super) fn connections_max() -> usize {
    let Some(most) = getrlimit(Resource::Nofile).current else { return usize::MAX };
    usize::try_from(most - RESERVED.min(most / 2)).unwrap_or(usize::MAX)
}

//! Whether a server could run here, and how to mend what keeps it from it.

use std::{
    fmt, fs,
    io::Write as _,
    net::{SocketAddr, TcpListener},
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
    time::{Duration, Instant, SystemTime},
};

use rustix::process::{Resource, getrlimit};

use trunkline_core::limits::Limits;

use crate::{config::Config, listen::DESCRIPTORS_RESERVED, tls::Tls};

/// Less free space than this is a failure: the next compaction may not fit.
const FREE_BYTES_MIN: u64 = 256 * 1024 * 1024;

/// Less than this is worth a word.
const FREE_BYTES_GOOD: u64 = 2 * 1024 * 1024 * 1024;

/// A disk that takes longer to confirm a write makes every message wait for it.
const FSYNC_GOOD: Duration = Duration::from_millis(10);

/// A difference of clocks that a file system's rounding explains.
const CLOCK_SLACK: Duration = Duration::from_secs(2);

/// One thing that was looked at.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Finding {
    /// What was looked at.
    pub what: &'static str,
    /// How it is.
    pub verdict: Verdict,
}

/// How something is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// Well.
    Good(String),
    /// It works, but not as well as it could; with what to do.
    Poor(String, String),
    /// A server will not start, or not work; with what to do.
    Bad(String, String),
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.verdict {
            Verdict::Good(how) => write!(f, "ok    {}: {how}", self.what),
            Verdict::Poor(how, mend) => write!(f, "warn  {}: {how}\n      to mend it: {mend}", self.what),
            Verdict::Bad(how, mend) => write!(f, "FAIL  {}: {how}\n      to mend it: {mend}", self.what),
        }
    }
}

/// Looks at everything that `config` relies on. Changes nothing but a probe file in the data directory, which it removes.
/// Blocks for some milliseconds.
#[must_use]
pub fn examine(config: &Config) -> Vec<Finding> {
    let running = holder(&config.data_dir);
    let finding = |what, verdict| Finding { what, verdict };
    vec![
        finding("data directory", directory(&config.data_dir, running.as_deref())),
        finding("data directory's permissions", permissions(&config.data_dir)),
        finding("disk", disk(&config.data_dir)),
        finding("gRPC address", address(config.listen.grpc, "--grpc", running.as_deref())),
        finding("HTTP address", address(config.listen.http, "--http", running.as_deref())),
        finding("operators' address", address(config.listen.ops, "--ops", running.as_deref())),
        finding("clock", clock(&config.data_dir)),
        finding("open files", files(&config.limits)),
        finding("certificates", certificates(config)),
    ]
}

/// The process that has the directory open.
fn holder(dir: &Path) -> Option<String> {
    let file = fs::File::open(dir.join("LOCK")).ok()?;
    match file.try_lock_shared() {
        Err(fs::TryLockError::WouldBlock) => fs::read_to_string(dir.join("LOCK")).ok().map(|pid| pid.trim().to_owned()),
        _ => None,
    }
}

/// The directory, or the nearest one above it that exists.
fn existing(dir: &Path) -> &Path {
    let mut ancestors = dir.ancestors().filter(|above| !above.as_os_str().is_empty());
    ancestors.find(|above| above.is_dir()).unwrap_or(Path::new("."))
}

/// A file that is nobody else's: what is there already is left alone.
fn probe(dir: &Path) -> PathBuf {
    dir.join(format!(".trunkline-probe-{}", std::process::id()))
}

fn directory(dir: &Path, running: Option<&str>) -> Verdict {
    let shown = dir.display();
    if dir.exists() && !dir.is_dir() {
        return Verdict::Bad(format!("{shown} is a file"), "choose another with --data-dir".to_owned());
    }
    if let Some(pid) = running {
        return Verdict::Good(format!("{shown}, in use by process {pid}"));
    }
    let probe = probe(existing(dir));
    let written = fs::File::create_new(&probe).and_then(|mut file| file.write_all(&[0; 4096]));
    // What was not written need not be removed.
    let _ = fs::remove_file(&probe);
    match written {
        Ok(()) if dir.exists() => Verdict::Good(format!("{shown} can be written")),
        Ok(()) => Verdict::Good(format!("{shown} is not there yet and can be made")),
        Err(error) => Verdict::Bad(format!("{shown}: {error}"), "give this user the right to write there".to_owned()),
    }
}

/// A server closes the directory to others when it starts, if it may.
fn permissions(dir: &Path) -> Verdict {
    let mode = match fs::metadata(dir) {
        Ok(found) => found.permissions().mode() & 0o777,
        Err(_) => return Verdict::Good("it is not there yet and will be its owner's alone".to_owned()),
    };
    if mode & 0o077 == 0 {
        return Verdict::Good(format!("{mode:o}, its owner's alone"));
    }
    let how =
        format!("{} has mode {mode:o}: other users can look into it, and the secrets of apps are in it", dir.display());
    Verdict::Poor(how, format!("chmod 700 {}", dir.display()))
}

fn disk(dir: &Path) -> Verdict {
    let at = existing(dir);
    let free = match rustix::fs::statvfs(at) {
        Ok(stat) => stat.f_bavail.saturating_mul(stat.f_frsize),
        Err(error) => return Verdict::Bad(format!("{}: {error}", at.display()), "look at the file system".to_owned()),
    };
    let mib = free / 1024 / 1024;
    let room = "make room, or keep less with retention.lanes_hours".to_owned();
    if free < FREE_BYTES_MIN {
        return Verdict::Bad(format!("{mib} MiB free"), room);
    }
    let took = match fsync_time(&probe(at)) {
        Ok(took) => took,
        Err(error) => return Verdict::Bad(format!("{}: {error}", at.display()), "look at the file system".to_owned()),
    };
    let how = format!("{mib} MiB free, a write is on disk in {} us", took.as_micros());
    if free < FREE_BYTES_GOOD {
        return Verdict::Poor(how, room);
    }
    if took > FSYNC_GOOD {
        return Verdict::Poor(how, "use a faster disk, or --durability process if you may lose the latest".to_owned());
    }
    Verdict::Good(how)
}

/// The middle one of nine.
fn fsync_time(path: &Path) -> std::io::Result<Duration> {
    let measure = || {
        let mut file = fs::File::create_new(path)?;
        let mut times = Vec::new();
        for _ in 0..9 {
            let begun = Instant::now();
            file.write_all(&[0; 4096])?;
            file.sync_data()?;
            times.push(begun.elapsed());
        }
        times.sort_unstable();
        Ok(times[times.len() / 2])
    };
    let measured = measure();
    // As above.
    let _ = fs::remove_file(path);
    measured
}

fn address(address: SocketAddr, flag: &str, running: Option<&str>) -> Verdict {
    match TcpListener::bind(address) {
        Ok(_) => Verdict::Good(format!("{address} is free")),
        Err(error) if error.kind() == std::io::ErrorKind::AddrInUse && running.is_some() => {
            Verdict::Good(format!("{address} is taken, and a server runs on the data directory"))
        }
        Err(error) => {
            Verdict::Bad(format!("{address}: {error}"), format!("choose another with {flag}, or stop what holds it"))
        }
    }
}

/// Records are never stamped earlier than the ones before, so a clock that went back stands still until it has caught up.
fn clock(dir: &Path) -> Verdict {
    let now = SystemTime::now();
    let newest = newest_file(&dir.join("log")).into_iter().chain(newest_file(dir)).max();
    let behind = newest.and_then(|newest| newest.duration_since(now).ok()).unwrap_or_default();
    if behind > CLOCK_SLACK {
        let how = format!("{} s behind the data's last change", behind.as_secs());
        return Verdict::Bad(how, "set the clock, and keep it with NTP".to_owned());
    }
    Verdict::Good("not behind the data".to_owned())
}

fn newest_file(dir: &Path) -> Option<SystemTime> {
    let entries = fs::read_dir(dir).ok()?;
    entries.filter_map(|entry| entry.ok()?.metadata().ok()?.modified().ok()).max()
}

fn files(limits: &Limits) -> Verdict {
    // 0 is no limit.
    let kinds = [limits.grpc_connections, limits.http_connections];
    let is_unlimited = kinds.contains(&0);
    let connections = kinds.iter().fold(0_u32, |sum, most| sum.saturating_add(*most));
    let limit = getrlimit(Resource::Nofile);
    let wanted = u64::from(connections) + DESCRIPTORS_RESERVED;
    // The server raises its own limit as far as it may.
    match limit.maximum {
        Some(most) if most < DESCRIPTORS_RESERVED => {
            Verdict::Bad(format!("{most} at most"), format!("ulimit -Hn {wanted}"))
        }
        Some(most) if is_unlimited || most < wanted => Verdict::Poor(
            format!("{most} at most, so about {} connections", most.saturating_sub(DESCRIPTORS_RESERVED)),
            format!("ulimit -Hn {wanted}, or LimitNOFILE in a service's unit, if you expect more"),
        ),
        Some(most) => Verdict::Good(format!("{most} at most")),
        None => Verdict::Good("no limit".to_owned()),
    }
}

fn certificates(config: &Config) -> Verdict {
    match Tls::load(&config.tls) {
        Ok(Some(_)) => Verdict::Good("can be used".to_owned()),
        Ok(None) => Verdict::Good("none; connections are in plain text".to_owned()),
        Err(error) => Verdict::Bad(error.to_string(), "name readable PEM files in [tls]".to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use super::{Config, Finding, Verdict, examine};

    fn bad(config: &Config) -> Vec<&'static str> {
        let is_bad = |finding: &Finding| matches!(finding.verdict, Verdict::Bad(..));
        examine(config).into_iter().filter(is_bad).map(|finding| finding.what).collect()
    }

    #[test]
    fn what_keeps_a_server_from_running_is_found() {
        let dir = tempfile::tempdir().unwrap();
        let good = Config { data_dir: dir.path().join("new/data"), ..Config::on_free_ports() };
        assert_eq!(bad(&good), Vec::<&str>::new());
        assert!(!dir.path().join("new").exists() && std::fs::read_dir(dir.path()).unwrap().next().is_none());

        let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let mut config = good.clone();
        config.listen.http = taken.local_addr().unwrap();
        config.tls.cert = "/no/such/file".into();
        assert_eq!(bad(&config), ["HTTP address", "certificates"]);

        let file = dir.path().join("file");
        std::fs::write(&file, "").unwrap();
        assert_eq!(bad(&Config { data_dir: file, ..good.clone() }), ["data directory"]);

        let data = dir.path().join("data");
        std::fs::create_dir_all(data.join("log")).unwrap();
        let ahead = std::time::SystemTime::now() + std::time::Duration::from_secs(3600);
        std::fs::File::create(data.join("log/0")).unwrap().set_modified(ahead).unwrap();
        assert_eq!(bad(&Config { data_dir: data, ..good }), ["clock"]);
    }
}

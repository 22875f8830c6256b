//! A private PostgreSQL for tests: in a temporary directory, on a socket of its own, stopped with the process.

use std::{
    fs,
    os::unix::{fs::chown, process::CommandExt as _},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::{
        OnceLock,
        atomic::{AtomicU32, Ordering::Relaxed},
    },
    time::Duration,
};

use tempfile::TempDir;
use tokio::{
    io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _},
    net::{TcpListener, UnixStream},
    sync::watch,
    task::JoinSet,
};
use tokio_util::task::AbortOnDropHandle;

/// Where `initdb` and `postgres` are; `cargo xtask test` sets it.
const BIN: &str = "TRUNKLINE_TEST_POSTGRES_BIN";

/// PostgreSQL does not run as root: then it runs as nobody.
const NOBODY: u32 = 65534;

struct Server {
    dir: TempDir,
    /// A shell that stops the server when its input ends, that is, when this process does, however it does.
    _keeper: Child,
}

static SERVER: OnceLock<Server> = OnceLock::new();

/// The connection URL of an empty database of one's own. The server is started with the first.
///
/// # Panics
/// If there is no PostgreSQL on this machine, or it does not start.
pub async fn database() -> String {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    let server = SERVER.get_or_init(start);
    let admin = format!("host={} user=trunkline dbname=postgres", server.dir.path().display());
    let (client, connection) = connect(&admin).await;
    let connection = tokio::spawn(connection);
    let name = format!("test_{}", NEXT.fetch_add(1, Relaxed));
    client.batch_execute(&format!("CREATE DATABASE {name}")).await.unwrap();
    drop(client);
    connection.await.unwrap().unwrap();
    format!("host={} user=trunkline dbname={name}", server.dir.path().display())
}

/// A way to a database that can be held up, as a network can: nothing is refused, nothing gets through.
pub struct Gateway {
    url: String,
    passes: watch::Sender<bool>,
    cuts: watch::Sender<()>,
    _accepts: AbortOnDropHandle<()>,
}

impl Gateway {
    /// A way to the database at `url`, which came from [`database`].
    pub async fn open(url: &str) -> Self {
        let server = SERVER.get_or_init(start);
        let socket = server.dir.path().join(".s.PGSQL.5432");
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let dbname = url.split(' ').find(|part| part.starts_with("dbname=")).unwrap();
        let (passes, passing) = watch::channel(true);
        let (cuts, cut) = watch::channel(());
        let accepts = tokio::spawn(async move {
            let mut pipes = JoinSet::new();
            loop {
                let (client, _) = listener.accept().await.unwrap();
                let (client_reads, client_writes) = client.into_split();
                let (server_reads, server_writes) = UnixStream::connect(&socket).await.unwrap().into_split();
                pipes.spawn(until_cut(pipe(client_reads, server_writes, passing.clone()), cut.clone()));
                pipes.spawn(until_cut(pipe(server_reads, client_writes, passing.clone()), cut.clone()));
            }
        });
        let url = format!("host=127.0.0.1 port={port} user=trunkline {dbname}");
        Self { url, passes, cuts, _accepts: AbortOnDropHandle::new(accepts) }
    }

    /// The connection URL that leads through here.
    #[must_use]
    pub fn url(&self) -> &str {
        &self.url
    }

    /// From now on bytes wait here.
    pub fn hold(&self) {
        self.passes.send_replace(false);
    }

    /// From now on bytes get through, those that waited first.
    pub fn pass(&self) {
        self.passes.send_replace(true);
    }

    /// Breaks all connections; new ones can be made.
    pub fn cut(&self) {
        self.cuts.send_replace(());
    }
}

async fn until_cut(pipe: impl Future<Output = ()>, mut cut: watch::Receiver<()>) {
    cut.mark_unchanged();
    tokio::select! {
        () = pipe => {}
        _ = cut.changed() => {}
    }
}

async fn pipe(mut from: impl AsyncRead + Unpin, mut to: impl AsyncWrite + Unpin, mut passes: watch::Receiver<bool>) {
    let mut buffer = vec![0; 16 * 1024];
    while let Ok(read @ 1..) = from.read(&mut buffer).await {
        if passes.wait_for(|passes| *passes).await.is_err() || to.write_all(&buffer[..read]).await.is_err() {
            return;
        }
    }
}

type Connecting = tokio_postgres::Connection<tokio_postgres::Socket, tokio_postgres::tls::NoTlsStream>;

/// Waits until the server takes connections.
async fn connect(url: &str) -> (tokio_postgres::Client, Connecting) {
    let attempts = async {
        loop {
            if let Ok(connected) = tokio_postgres::connect(url, tokio_postgres::NoTls).await {
                return connected;
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(60), attempts).await.expect("PostgreSQL starts within a minute")
}

fn start() -> Server {
    let bin = bin();
    let dir = tempfile::tempdir().unwrap();
    let is_root = fs::metadata("/proc/self").is_ok_and(|m| std::os::unix::fs::MetadataExt::uid(&m) == 0);
    let as_whom = |command: &mut Command| {
        command.current_dir(dir.path());
        if is_root {
            command.uid(NOBODY).gid(NOBODY);
        }
    };
    if is_root {
        chown(dir.path(), Some(NOBODY), Some(NOBODY)).unwrap();
    }
    let data = dir.path().join("data");
    let mut initdb = Command::new(bin.join("initdb"));
    initdb.args(["--username=trunkline", "--auth=trust", "--no-sync", "--encoding=UTF8", "--locale=C", "--pgdata"]);
    as_whom(initdb.arg(&data));
    let output = initdb.output().unwrap();
    assert!(output.status.success(), "initdb: {}", String::from_utf8_lossy(&output.stderr));
    let mut keeper = Command::new("/bin/sh");
    keeper.args(["-c", "\"$0\" \"$@\" </dev/null & read -r _; kill -INT $!; wait"]).arg(bin.join("postgres"));
    keeper.arg("-D").arg(&data).arg("-k").arg(dir.path());
    keeper.args(["-c", "listen_addresses=", "-c", "logging_collector=off", "-c", "max_connections=400"]);
    as_whom(keeper.stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::null()));
    let keeper = keeper.spawn().unwrap();
    Server { dir, _keeper: keeper }
}

fn bin() -> PathBuf {
    let packaged = fs::read_dir("/usr/lib/postgresql").into_iter().flatten().flatten().map(|v| v.path().join("bin"));
    let given = std::env::var_os(BIN).map(PathBuf::from);
    let has_server = |bin: &PathBuf| is_file(bin, "initdb") && is_file(bin, "postgres");
    let found = given.into_iter().chain(packaged).find(has_server);
    found.unwrap_or_else(|| panic!("no PostgreSQL found; run cargo xtask test, or set {BIN}"))
}

fn is_file(dir: &Path, name: &str) -> bool {
    dir.join(name).is_file()
}

//! Disks that refuse: full, forbidden, torn. A clear error, the process lives, nothing acknowledged is lost.

#![allow(clippy::disallowed_methods, clippy::expect_used, clippy::panic, clippy::unwrap_used, reason = "test code")]

use std::{
    fs,
    os::unix::{fs::PermissionsExt as _, process::CommandExt as _},
    path::{Path, PathBuf},
    process::Command,
    time::{Duration, Instant},
};

use trunkline_store::{
    OpenError, Store,
    ledger::{self, Ledger, Migration, Outgoing, Relay, RelayError},
    log::{Append, Error, Item, Log, Options, Topic},
};

/// Set for the copies of this program that run under a limit of their own.
const CHILD: &str = "TRUNKLINE_TEST_CHILD_DIR";

/// Runs one test of this program in a child, with `prepare` done by a shell before it.
fn in_child(test: &str, dir: &Path, prepare: &str, uid: Option<u32>) {
    let script = format!("{prepare}; exec \"$0\" \"$@\"");
    let mut command = Command::new("/bin/bash");
    command.args(["-c", &script]).arg(std::env::current_exe().unwrap());
    command.args(["--exact", test, "--nocapture"]).env(CHILD, dir);
    if let Some(uid) = uid {
        command.uid(uid).current_dir("/");
    }
    let output = command.output().unwrap();
    assert!(
        output.status.success(),
        "{}{}",
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
}

fn child_dir() -> Option<PathBuf> {
    std::env::var_os(CHILD).map(PathBuf::from)
}

async fn payloads(log: &Log, topic: &Topic) -> Vec<usize> {
    let mut reader = log.reader();
    reader.follow_from_start(topic).unwrap();
    let mut all = Vec::new();
    loop {
        let mut items = Vec::new();
        reader.available_batch(1024, &mut items).await.unwrap();
        if items.is_empty() {
            return all;
        }
        for item in items {
            let Item::Record(record) = item else { panic!("{item:?}") };
            all.push(std::str::from_utf8(&record.payload[..8]).unwrap().parse().unwrap());
        }
    }
}

/// The log's journal is preallocated to 64 MiB; a limit on the size of files behaves as a full disk beyond that.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_full_disk_is_an_error_and_heals() {
    let Some(dir) = child_dir() else {
        let dir = tempfile::tempdir().unwrap();
        // SIGXFSZ would kill; ignored, the write fails. 64 MiB in blocks of 1 KiB, soft, so that it can be raised.
        let prepare = "trap '' XFSZ; ulimit -S -f 65536";
        tokio::task::block_in_place(|| in_child("a_full_disk_is_an_error_and_heals", dir.path(), prepare, None));
        return;
    };
    let log = Log::open(&dir, Options::default()).unwrap();
    let topic = Topic::new("t").unwrap();
    let payload = |n: usize| format!("{n:08}{}", "x".repeat(512 * 1024));
    let mut acknowledged = 0;
    let error = loop {
        // Distinct bytes would be kinder to nobody: what counts is that the journal grows.
        match log.append(Append::new(&topic, noise(payload(acknowledged)))).await {
            Ok(_) => acknowledged += 1,
            Err(error) => break error,
        }
        assert!(acknowledged < 2000, "the limit was never met");
    };
    assert!(matches!(&error, Error::Unavailable { .. }) && error.is_retryable(), "{error}");
    assert!(acknowledged > 50);
    // While it cannot be opened again, reads go on from what was there, and whoever asks is told that it takes no writes.
    fs::create_dir(dir.join("probe")).unwrap();
    refused_for_a_while(&log, &topic, acknowledged).await;

    // The same process goes on once there is room, also if nobody appends.
    let raised = Command::new("prlimit").arg(format!("--pid={}", std::process::id())).arg("--fsize=unlimited").status();
    assert!(raised.unwrap().success());
    fs::remove_dir(dir.join("probe")).unwrap();
    healed(&log).await;
    log.append(Append::new(&topic, payload(99_999_999))).await.unwrap();
    let found = payloads(&log, &topic).await;
    assert!(found.iter().copied().eq((0..acknowledged).chain([99_999_999])), "{found:?}");
    log.stop().await;
    let log = Log::open(&dir, Options::default()).unwrap();
    assert_eq!(payloads(&log, &topic).await, found);
    log.stop().await;
}

/// What is acknowledged can be read at any time, and no write is taken.
async fn refused_for_a_while(log: &Log, topic: &Topic, acknowledged: usize) {
    // Several times the pause between two attempts to open it again; there is nothing to wait for.
    let end = Instant::now() + Duration::from_millis(500);
    while Instant::now() < end {
        let found = tokio::time::timeout(Duration::from_secs(5), payloads(log, topic)).await.expect("reads go on");
        assert!(found.into_iter().eq(0..acknowledged));
        assert!(matches!(log.check().await, Err(Error::Unavailable { .. })));
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

async fn healed(log: &Log) {
    let healed = async {
        while log.check().await.is_err() {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(30), healed).await.expect("writes are taken again");
}

/// After a sync that failed, the page cache shows a batch that the disk may not have. It is not built upon.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_batch_whose_sync_failed_is_gone() {
    let Some(dir) = child_dir() else {
        let dir = tempfile::tempdir().unwrap();
        tokio::task::block_in_place(|| {
            let inject = ["-f", "-qq", "-o", "/dev/null", "-e", "trace=fdatasync", "-e"];
            let mut strace = Command::new("strace");
            // The fifth of each thread: the writer's are its commits.
            strace.args(inject).arg("inject=fdatasync:error=EIO:when=5").arg(std::env::current_exe().unwrap());
            strace.args(["--exact", "a_batch_whose_sync_failed_is_gone", "--nocapture"]).env(CHILD, dir.path());
            let output = strace.output().expect("strace is installed");
            let text = String::from_utf8_lossy(&output.stdout) + String::from_utf8_lossy(&output.stderr);
            assert!(output.status.success(), "{text}");
        });
        return;
    };
    let log = Log::open(&dir, Options::default()).unwrap();
    let topic = Topic::new("t").unwrap();
    let mut kept = Vec::new();
    for n in 0..20 {
        match log.append(Append::new(&topic, format!("{n:08}"))).await {
            Ok(_) => kept.push(n),
            Err(error) => {
                assert!(matches!(error, Error::Unavailable { .. }), "{error}");
                healed(&log).await;
            }
        }
    }
    assert_eq!(kept.len(), 19, "one sync failed");
    assert_eq!(payloads(&log, &topic).await, kept);
    log.stop().await;
    let log = Log::open(&dir, Options::default()).unwrap();
    assert_eq!(log.repair(), None);
    assert_eq!(payloads(&log, &topic).await, kept);
    log.stop().await;
}

/// When the engine was closed and cannot be opened, reads are refused and do not wait.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_log_that_cannot_be_opened_again_says_so_and_heals() {
    let Some(dir) = child_dir() else {
        let dir = tempfile::tempdir().unwrap();
        let prepare = "trap '' XFSZ; ulimit -S -f 65536";
        let test = "a_log_that_cannot_be_opened_again_says_so_and_heals";
        tokio::task::block_in_place(|| in_child(test, dir.path(), prepare, None));
        return;
    };
    let log = Log::open(&dir, Options::default()).unwrap();
    let topic = Topic::new("t").unwrap();
    let mut acknowledged = 0;
    // A directory where a journal should be: the probe succeeds and opening fails.
    fs::create_dir(dir.join("99.jnl")).unwrap();
    let payload = |n: usize| noise(format!("{n:08}{}", "x".repeat(2 * 1024 * 1024)));
    while log.append(Append::new(&topic, payload(acknowledged))).await.is_ok() {
        acknowledged += 1;
        assert!(acknowledged < 500, "the limit was never met");
    }
    let refused = async {
        while log.status(&topic).await.is_ok() {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(10), refused).await.expect("reads are refused");
    let status = tokio::time::timeout(Duration::from_secs(1), log.status(&topic)).await.expect("at once");
    assert!(matches!(status, Err(Error::Unavailable { .. })), "{status:?}");
    fs::remove_dir(dir.join("99.jnl")).unwrap();
    healed(&log).await;
    assert!(payloads(&log, &topic).await.into_iter().eq(0..acknowledged));
    log.stop().await;
}

/// A first start on a disk that is almost full leaves nothing that a later one stumbles over.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_first_start_on_a_full_disk_can_be_repeated() {
    if let Some(dir) = child_dir() {
        let refused = Store::open(&dir, trunkline_store::Options::default()).err().expect("no room");
        assert!(matches!(refused, OpenError::Log(Error::Unavailable { .. })), "{refused}");
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    // The journal is preallocated to 64 MiB.
    let test = "a_first_start_on_a_full_disk_can_be_repeated";
    tokio::task::block_in_place(|| in_child(test, dir.path(), "trap '' XFSZ; ulimit -S -f 20000", None));
    let store = Store::open(dir.path(), trunkline_store::Options::default()).unwrap();
    store.log.append(Append::new(&Topic::new("t").unwrap(), "taken")).await.unwrap();
    store.stop().await;
}

/// Rows go to SQLite's write-ahead log first, which meets the limit.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_full_disk_is_an_error_for_the_ledger_and_heals() {
    const SCHEMA: &[Migration] = &[Migration { name: "0001", sql: "CREATE TABLE t (n BIGINT NOT NULL, data BYTES)" }];
    let Some(dir) = child_dir() else {
        let dir = tempfile::tempdir().unwrap();
        let prepare = "trap '' XFSZ; ulimit -S -f 8192";
        let test = "a_full_disk_is_an_error_for_the_ledger_and_heals";
        tokio::task::block_in_place(|| in_child(test, dir.path(), prepare, None));
        return;
    };
    let path = dir.join("ledger.sqlite");
    let ledger = Ledger::open_sqlite(&path, SCHEMA, ledger::Options::default()).unwrap();
    let insert = async |n: i64| -> Result<u64, ledger::Error> {
        let write = ledger.write(move |tx| {
            Box::pin(
                async move { tx.execute("INSERT INTO t VALUES ($1, $2)", &[n.into(), vec![7; 200_000].into()]).await },
            )
        });
        write.await
    };
    let mut acknowledged = 0;
    let error = loop {
        match insert(acknowledged).await {
            Ok(_) => acknowledged += 1,
            Err(error) => break error,
        }
        assert!(acknowledged < 1000, "the limit was never met");
    };
    assert!(matches!(error, ledger::Error::Unavailable { .. }), "{error}");
    assert!(acknowledged > 10);

    let raised = Command::new("prlimit").arg(format!("--pid={}", std::process::id())).arg("--fsize=unlimited").status();
    assert!(raised.unwrap().success());
    assert_eq!(insert(acknowledged).await.unwrap(), 1, "the same process goes on once there is room");
    ledger.stop().await;
    let ledger = Ledger::open_sqlite(&path, SCHEMA, ledger::Options::default()).unwrap();
    let rows = ledger.read(|tx| Box::pin(async move { tx.query("SELECT n FROM t ORDER BY n", &[]).await })).await;
    let rows: Vec<_> = rows.unwrap_or_else(|e: ledger::Error| panic!("{e}"));
    assert!(rows.iter().map(|row| row.int(0).unwrap()).eq(0..=acknowledged));
}

/// Damage says nothing about what waits to be appended: it stays, in order, until the log is repaired.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn outbox_rows_wait_while_the_log_is_damaged() {
    let Some(dir) = child_dir() else {
        let dir = tempfile::tempdir().unwrap();
        let prepare = "trap '' XFSZ; ulimit -S -f 65536";
        tokio::task::block_in_place(|| {
            in_child("outbox_rows_wait_while_the_log_is_damaged", dir.path(), prepare, None);
        });
        return;
    };
    let ledger = Ledger::open_sqlite(&dir.join("ledger.sqlite"), &[], ledger::Options::default()).unwrap();
    let log = Log::open(&dir.join("log"), Options::default()).unwrap();
    let topic = Topic::new("t").unwrap();
    let payload = |n: usize| noise(format!("{n:08}{}", "x".repeat(512 * 1024)));
    while log.append(Append::new(&topic, payload(1))).await.is_ok() {}
    // The log is opened again for the next append, and finds this in front of what was acknowledged.
    let journal = journal(&dir.join("log"));
    let whole = fs::read(&journal).unwrap();
    let mut damaged = whole.clone();
    damaged[1_000_000..1_000_100].fill(0xff);
    fs::write(&journal, &damaged).unwrap();
    let raised = Command::new("prlimit").arg(format!("--pid={}", std::process::id())).arg("--fsize=unlimited").status();
    assert!(raised.unwrap().success());
    let is_corrupt = async {
        while !matches!(log.append(Append::new(&topic, payload(2))).await, Err(Error::Corrupt { .. })) {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(30), is_corrupt).await.expect("the damage is found");

    let notices = Topic::new("notices").unwrap();
    for payload in ["00000001", "00000002"] {
        let outgoing = Outgoing { topic: notices.clone(), payload: payload.into() };
        let sent: Result<(), ledger::Error> = ledger
            .write(move |tx| {
                let outgoing = outgoing.clone();
                Box::pin(async move { tx.send(&outgoing).await })
            })
            .await;
        sent.unwrap();
    }
    let relay = Relay::new(ledger.clone(), log.clone());
    let refused = relay.step().await;
    assert!(matches!(refused, Err(RelayError::Log(Error::Corrupt { .. }))), "{refused:?}");

    fs::write(&journal, &whole).unwrap();
    let relayed = async {
        while relay.step().await.is_err() {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(30), relayed).await.expect("rows are relayed again");
    assert_eq!(payloads(&log, &notices).await, [1, 2]);
    log.stop().await;
}

/// Incompressible, so that the journal grows by what is appended.
fn noise(text: String) -> Vec<u8> {
    let mut bytes = text.into_bytes();
    let mut seed = 7_u32;
    for byte in &mut bytes[8..] {
        seed = seed.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        *byte = (seed >> 24) as u8;
    }
    bytes
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_forbidden_directory_is_named() {
    let Some(dir) = child_dir() else {
        let dir = tempfile::tempdir().unwrap();
        let inside = dir.path().join("inside");
        fs::create_dir(&inside).unwrap();
        fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o755)).unwrap();
        fs::set_permissions(&inside, fs::Permissions::from_mode(0o555)).unwrap();
        // Nothing is forbidden to root, so the child is nobody.
        let is_root = fs::metadata("/proc/self").is_ok_and(|m| std::os::unix::fs::MetadataExt::uid(&m) == 0);
        let uid = is_root.then_some(65534);
        tokio::task::block_in_place(|| in_child_readable("a_forbidden_directory_is_named", &inside, uid));
        return;
    };
    let refused = Store::open(&dir, trunkline_store::Options::default()).err().expect("an error");
    let text = refused.to_string();
    assert!(matches!(refused, OpenError::Io { .. }), "{text}");
    assert!(text.contains(dir.to_str().unwrap()) && text.to_lowercase().contains("permission denied"), "{text}");
    let refused = Log::open(&dir.join("log"), Options::default()).err().expect("an error").to_string();
    assert!(refused.to_lowercase().contains("permission denied"), "{refused}");
}

/// The test program itself may lie where nobody else may look: a copy beside the directory can be run.
fn in_child_readable(test: &str, dir: &Path, uid: Option<u32>) {
    let copy = dir.parent().unwrap().join("program");
    fs::copy(std::env::current_exe().unwrap(), &copy).unwrap();
    fs::set_permissions(&copy, fs::Permissions::from_mode(0o755)).unwrap();
    let mut command = Command::new(copy);
    command.args(["--exact", test, "--nocapture"]).env(CHILD, dir);
    if let Some(uid) = uid {
        command.uid(uid).current_dir("/");
    }
    let output = command.output().unwrap();
    assert!(
        output.status.success(),
        "{}{}",
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
}

fn journal(dir: &Path) -> PathBuf {
    let journals = fs::read_dir(dir).unwrap().flatten().map(|entry| entry.path());
    journals.filter(|path| path.extension().is_some_and(|e| e == "jnl")).max().unwrap()
}

/// Damages the journal's last batch in every way that a power failure can, and opens again.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_torn_tail_is_cut_off_and_reported() {
    let dir = tempfile::tempdir().unwrap();
    let topic = Topic::new("t").unwrap();
    let log = Log::open(dir.path(), Options::default()).unwrap();
    for n in 0..20 {
        log.append(Append::new(&topic, format!("{n:08}"))).await.unwrap();
    }
    log.stop().await;
    let whole = copy(dir.path());
    let used = used(&journal(whole.path()));
    for (what, cut, flip) in [("cut", 5, None), ("cut in the payload", 60, None), ("zeroed inside", 0, Some(40))] {
        let torn = copy(whole.path());
        let path = journal(torn.path());
        let mut bytes = fs::read(&path).unwrap();
        bytes[used - cut..].fill(0);
        if let Some(back) = flip {
            bytes[used - back] ^= 0xff;
        }
        fs::write(&path, bytes).unwrap();
        let log = Log::open(torn.path(), Options::default()).unwrap_or_else(|e| panic!("{what}: {e}"));
        assert!(log.repair().is_some_and(|repair| repair.bytes > 0), "{what}");
        assert_eq!(payloads(&log, &topic).await, (0..19).collect::<Vec<_>>(), "{what}");
        log.append(Append::new(&topic, "00000019")).await.unwrap();
        assert_eq!(payloads(&log, &topic).await, (0..20).collect::<Vec<_>>(), "{what}");
        log.stop().await;
        let log = Log::open(torn.path(), Options::default()).unwrap();
        assert_eq!(log.repair(), None, "{what}: a repaired log is whole");
        log.stop().await;
    }
}

/// Payloads lie in the journal as they were sent: whatever is in them, a torn batch is one.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_a_client_wrote_does_not_decide() {
    let empty_batch = b"FJL\x03\x01\0\0\0\0\x2a\0\0\0\0\0\0\0\x03\xc2\x94\xd3\x38\x05\x80\x06\x2dFJL\x03";
    // Each trailer is followed by items up to the end of all.
    let start = b"FJL\x03\x01\xff\xff\xff\xff\x2a\0\0\0\0\0\0\0";
    let item = b"\x02\0\0\x01\0\0\0\0\0\0\0\0\0\x11\0\0\0\x11\0\0\0";
    let many = [&start[..], item].concat().repeat(7 * 1024 * 1024 / (start.len() + item.len()));
    for (what, hostile) in [("a batch", empty_batch.to_vec()), ("many beginnings", many)] {
        let dir = tempfile::tempdir().unwrap();
        let topic = Topic::new("t").unwrap();
        let log = Log::open(dir.path(), Options::default()).unwrap();
        log.append(Append::new(&topic, "00000000")).await.unwrap();
        log.append(Append::new(&topic, [&b"00000001"[..], &hostile, &[b'y'; 100]].concat())).await.unwrap();
        log.stop().await;
        let path = journal(dir.path());
        let mut bytes = fs::read(&path).unwrap();
        let end = used(&path);
        bytes[end - 5..].fill(0);
        fs::write(&path, bytes).unwrap();
        let log = Log::open(dir.path(), Options::default()).unwrap_or_else(|e| panic!("{what}: {e}"));
        assert!(log.repair().is_some_and(|repair| repair.bytes > 100), "{what}");
        assert_eq!(payloads(&log, &topic).await, [0], "{what}");
        log.stop().await;
    }
}

/// A journal can be followed by an empty one when its last batch failed.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_torn_end_before_an_empty_journal_is_cut_off() {
    let dir = tempfile::tempdir().unwrap();
    let topic = Topic::new("t").unwrap();
    let log = Log::open(dir.path(), Options::default()).unwrap();
    for n in 0..20 {
        log.append(Append::new(&topic, format!("{n:08}"))).await.unwrap();
    }
    log.stop().await;
    let path = journal(dir.path());
    let mut bytes = fs::read(&path).unwrap();
    let end = used(&path);
    bytes[end - 5..].fill(0);
    fs::write(&path, bytes).unwrap();
    fs::write(dir.path().join("1.jnl"), [0; 65536]).unwrap();
    let log = Log::open(dir.path(), Options::default()).unwrap();
    assert!(log.repair().is_some());
    assert_eq!(payloads(&log, &topic).await, (0..19).collect::<Vec<_>>());
    log.stop().await;
}

/// Damage before the last batch is not a torn tail: it would take acknowledged records with it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn damage_in_the_middle_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let topic = Topic::new("t").unwrap();
    let log = Log::open(dir.path(), Options::default()).unwrap();
    for n in 0..20 {
        log.append(Append::new(&topic, format!("{n:08}{}", "y".repeat(100)))).await.unwrap();
    }
    log.stop().await;
    let path = journal(dir.path());
    let mut bytes = fs::read(&path).unwrap();
    let middle = used(&path) / 2;
    let inside = bytes[middle..].windows(8).position(|w| w == b"yyyyyyyy").unwrap() + middle;
    bytes[inside] ^= 0xff;
    fs::write(&path, bytes).unwrap();
    assert!(matches!(Log::open(dir.path(), Options::default()), Err(Error::Corrupt { .. })));
}

fn used(journal: &Path) -> usize {
    fs::read(journal).unwrap().iter().rposition(|byte| *byte != 0).unwrap() + 1
}

fn copy(from: &Path) -> tempfile::TempDir {
    let to = tempfile::tempdir().unwrap();
    let status = Command::new("cp").arg("-a").arg(from.join(".")).arg(to.path()).status().unwrap();
    assert!(status.success());
    to
}

/// After a restore from a backup, say.
#[tokio::test]
async fn an_index_of_another_log_is_made_anew() {
    let topic = Topic::new("t").unwrap();
    let (first, second) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    for (dir, records) in [(&first, 10), (&second, 5)] {
        let log = Log::open(dir.path(), Options::default()).unwrap();
        for n in 0..records {
            log.append(Append::new(&topic, format!("{n:08}"))).await.unwrap();
        }
        log.stop().await;
    }
    fs::remove_dir_all(second.path().join("index")).unwrap();
    fs::rename(first.path().join("index"), second.path().join("index")).unwrap();
    // Once when it is found, and once more when what replaced it is.
    for _ in 0..2 {
        let log = Log::open(second.path(), Options::default()).unwrap();
        assert_eq!(payloads(&log, &topic).await, [0, 1, 2, 3, 4]);
        log.stop().await;
    }
}

/// The index is a database of its own, and what it needs is not what an append needs. Lists that it could not write are made
/// again, and none after them is taken for all there is.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn lists_that_could_not_be_written_are_made_again() {
    let Some(dir) = child_dir() else {
        let dir = tempfile::tempdir().unwrap();
        return in_child("lists_that_could_not_be_written_are_made_again", dir.path(), "ulimit -Sn 256", None);
    };
    let options = || Options { chunk_records: 50, window_bytes_max: 1000, ..Options::default() };
    let (topic, log) = (Topic::new("t").unwrap(), Log::open(&dir, options()).unwrap());
    let append = async |n: usize| log.append(Append::new(&topic, format!("{n:08}"))).await;
    // The journal is open; a table of lists is a new file.
    let files: Vec<_> = std::iter::from_fn(|| fs::File::open("/dev/null").ok()).collect();
    let mut acknowledged = Vec::new();
    for n in 0..200 {
        match append(n).await {
            Ok(_) => acknowledged.push(n),
            Err(error) => {
                assert!(matches!(error, Error::Unavailable { .. }), "{error}");
                break;
            }
        }
    }
    assert!(acknowledged.len() >= 50, "{}", acknowledged.len());
    drop(files);
    let until = Instant::now() + Duration::from_secs(20);
    for n in 200..400 {
        while let Err(error) = append(n).await {
            assert!(matches!(error, Error::Unavailable { .. }) && Instant::now() < until, "{error}");
        }
        acknowledged.push(n);
    }
    assert_eq!(payloads(&log, &topic).await, acknowledged);
    log.stop().await;
    let log = Log::open(&dir, options()).unwrap();
    assert_eq!(payloads(&log, &topic).await, acknowledged);
    log.stop().await;
}

/// The engine removes journals once it has tables of them. Then the only journal may begin with the batch that a power loss
/// tore, and only the tables tell how far the log was.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_batch_that_is_torn_at_the_beginning_of_the_only_journal_is_cut_off() {
    let (dir, topic) = (tempfile::tempdir().unwrap(), Topic::new("t").unwrap());
    let log = Log::open(dir.path(), Options::default()).unwrap();
    for n in 0..20 {
        log.append(Append::new(&topic, format!("{n:08}"))).await.unwrap();
    }
    log.stop().await;
    // As it is after the engine has begun another journal.
    fs::write(dir.path().join("1.jnl"), [0; 65536]).unwrap();
    let log = Log::open(dir.path(), Options::default()).unwrap();
    until_tables_have_it_all(dir.path()).await;
    let large =
        async |n: usize| log.append(Append::new(&topic, format!("{n:08}{}", "z".repeat(20_000)))).await.unwrap();
    large(20).await;
    // It could not be acknowledged yet, as far as the directory says.
    let one = copy(dir.path());
    large(21).await;
    log.stop().await;

    let path = tear(one.path()).0;
    let log = Log::open(one.path(), Options::default()).unwrap();
    assert_eq!(log.repair().map(|repair| &repair.file), Some(&path));
    assert_eq!(payloads(&log, &topic).await, (0..20).collect::<Vec<_>>());
    log.append(Append::new(&topic, "00000020")).await.unwrap();
    log.stop().await;
    let log = Log::open(one.path(), Options::default()).unwrap();
    assert_eq!(payloads(&log, &topic).await, (0..21).collect::<Vec<_>>());
    log.stop().await;

    // Behind the second, the first is known to have been acknowledged.
    let (path, whole) = tear(dir.path());
    for _ in 0..2 {
        assert!(matches!(Log::open(dir.path(), Options::default()), Err(Error::Corrupt { .. })));
    }
    // Whoever mends it has it all.
    fs::write(&path, whole).unwrap();
    let log = Log::open(dir.path(), Options::default()).unwrap();
    assert_eq!(payloads(&log, &topic).await, (0..22).collect::<Vec<_>>());
    log.stop().await;
}

/// Waits until the journals hold nothing that the tables do not.
async fn until_tables_have_it_all(dir: &Path) {
    let until = Instant::now() + Duration::from_secs(20);
    let journals = || fs::read_dir(dir).unwrap().flatten().filter(|e| e.path().extension().is_some_and(|e| e == "jnl"));
    while journals().count() > 1 || fs::read(journal(dir)).unwrap().iter().any(|byte| *byte != 0) {
        assert!(Instant::now() < until, "the engine does not write tables");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

/// Loses the journal's first page; answers what there was before.
fn tear(dir: &Path) -> (PathBuf, Vec<u8>) {
    let path = journal(dir);
    let whole = fs::read(&path).unwrap();
    let mut torn = whole.clone();
    torn[..4096].fill(0);
    fs::write(&path, torn).unwrap();
    (path, whole)
}

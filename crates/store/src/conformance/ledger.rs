//! What every ledger does, and the outbox with it.

use std::{
    future::Future,
    sync::atomic::{AtomicUsize, Ordering::SeqCst},
};

use crate::{
    ledger::{Error, Ledger, Migration, Outgoing, Relay, Value},
    log::{Append, Item, Log, Options, Topic},
};

/// A place where a ledger can be opened, again and again. The previous one must be stopped first.
pub trait Home: Send + Sync {
    fn open(&self, migrations: &'static [Migration]) -> impl Future<Output = Result<Ledger, Error>> + Send;
}

/// One test per function of this suite, on the [`Home`] that `$home` evaluates to.
#[macro_export]
macro_rules! ledger_suite {
    ($home:expr) => {
        $crate::ledger_suite!(@tests $home;
            values_come_back_as_they_went, an_error_undoes_everything, a_constraint_is_named, upserts_and_returning,
            compare_and_set_has_one_winner, increments_do_not_get_lost, reads_see_what_was_written_before,
            a_dropped_asker_does_not_undo, waiting_for_something_else_is_refused, mistakes_are_named,
            rows_survive_reopening, changed_or_unknown_migrations_are_refused, new_migrations_are_applied,
            outbox_rows_become_records_in_order, an_undone_transaction_sends_nothing, a_repeated_relay_doubles_nothing,
            a_closed_topic_does_not_hold_up_the_others, a_row_that_cannot_be_read_does_not_hold_up_the_others,
            the_relay_wakes_though_nobody_waits_for_the_write, one_go_of_the_relay_is_bounded_in_bytes, who_waits_for_the_outbox_comes_behind_it, a_panic_is_answered_and_leaves_nothing,
            look_ups_do_not_wait_for_scans, stopping_tells_everybody,
        );
    };
    (@tests $home:expr; $($name:ident,)+) => {
        $(#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
        async fn $name() {
            $crate::conformance::ledger::$name(&$home).await;
        })+
    };
}

pub const SCHEMA: &[Migration] = &[Migration {
    name: "0001_things",
    sql: "CREATE TABLE things (name TEXT PRIMARY KEY, count BIGINT NOT NULL, ratio DOUBLE PRECISION, data BYTES)",
}];

const INSERT: &str = "INSERT INTO things (name, count) VALUES ($1, $2)";
const COUNT: &str = "SELECT count FROM things WHERE name = $1";

async fn insert(ledger: &Ledger, name: &'static str, count: i64) -> Result<u64, Error> {
    ledger.write(move |tx| Box::pin(async move { tx.execute(INSERT, &[name.into(), count.into()]).await })).await
}

async fn count(ledger: &Ledger, name: &'static str) -> Option<i64> {
    let row = ledger.read(move |tx| Box::pin(async move { tx.query_opt(COUNT, &[name.into()]).await })).await;
    row.unwrap().map(|row| row.int(0).unwrap())
}

pub async fn values_come_back_as_they_went(home: &impl Home) {
    let ledger = home.open(SCHEMA).await.unwrap();
    let rows = vec![
        vec!["plain".into(), 1.into(), 0.5.into(), (&b"\x00\xff"[..]).into()],
        vec!["é 😀 '\"".into(), i64::MIN.into(), f64::MAX.into(), Vec::new().into()],
        vec!["nulls".into(), i64::MAX.into(), Value::Null, Value::Null],
    ];
    for row in rows.clone() {
        let row = row.clone();
        ledger
            .write(move |tx| {
                let row = row.clone();
                Box::pin(async move { tx.execute("INSERT INTO things VALUES ($1, $2, $3, $4)", &row).await })
            })
            .await
            .unwrap();
    }
    let select = "SELECT name, count, ratio, data FROM things WHERE $2 <= count AND name <> $1 ORDER BY count";
    let found = ledger
        .read(move |tx| Box::pin(async move { tx.query(select, &["nobody".into(), i64::MIN.into()]).await }))
        .await
        .unwrap();
    let found: Vec<_> = found.into_iter().map(|row| row.0).collect();
    assert_eq!(found, [rows[1].clone(), rows[0].clone(), rows[2].clone()]);
}

pub async fn an_error_undoes_everything(home: &impl Home) {
    let ledger = home.open(SCHEMA).await.unwrap();
    let refused: Result<(), Error> = ledger
        .write(|tx| {
            Box::pin(async move {
                tx.execute(INSERT, &["a".into(), 1.into()]).await?;
                Err(Error::Waited)
            })
        })
        .await;
    assert!(matches!(refused, Err(Error::Waited)));
    assert_eq!(count(&ledger, "a").await, None);
}

pub async fn a_constraint_is_named(home: &impl Home) {
    let ledger = home.open(SCHEMA).await.unwrap();
    insert(&ledger, "a", 1).await.unwrap();
    assert!(matches!(insert(&ledger, "a", 2).await, Err(Error::Constraint { .. })));
    assert_eq!(count(&ledger, "a").await, Some(1));
}

pub async fn upserts_and_returning(home: &impl Home) {
    let ledger = home.open(SCHEMA).await.unwrap();
    let upsert = "INSERT INTO things (name, count) VALUES ($1, $2)
        ON CONFLICT (name) DO UPDATE SET count = excluded.count WHERE things.count < excluded.count RETURNING count";
    for (given, expected) in [(5, Some(5)), (7, Some(7)), (6, None)] {
        let row = ledger
            .write(move |tx| Box::pin(async move { tx.query_opt(upsert, &["a".into(), given.into()]).await }))
            .await
            .unwrap();
        assert_eq!(row.map(|row| row.int(0).unwrap()), expected);
    }
    assert_eq!(count(&ledger, "a").await, Some(7));
}

pub async fn compare_and_set_has_one_winner(home: &impl Home) {
    let ledger = home.open(SCHEMA).await.unwrap();
    insert(&ledger, "a", 0).await.unwrap();
    let set = "UPDATE things SET count = $1 WHERE name = $2 AND count = 0";
    let attempts = (1..=20_i64).map(|n| {
        let ledger = ledger.clone();
        tokio::spawn(async move {
            ledger.write(move |tx| Box::pin(async move { tx.execute(set, &[n.into(), "a".into()]).await })).await
        })
    });
    let mut changed: u64 = 0;
    for attempt in attempts.collect::<Vec<_>>() {
        changed += attempt.await.unwrap().unwrap_or_else(|e: Error| panic!("{e}"));
    }
    assert_eq!(changed, 1);
}

pub async fn increments_do_not_get_lost(home: &impl Home) {
    let ledger = home.open(SCHEMA).await.unwrap();
    insert(&ledger, "a", 0).await.unwrap();
    let tasks: Vec<_> = (0..8)
        .map(|_| {
            let ledger = ledger.clone();
            tokio::spawn(async move {
                for _ in 0..25 {
                    ledger
                        .write(|tx| {
                            Box::pin(async move {
                                let row = tx.query_opt(COUNT, &["a".into()]).await?;
                                let next = row.map_or(Ok(0), |row| row.int(0))? + 1;
                                tx.execute("UPDATE things SET count = $2 WHERE name = $1", &["a".into(), next.into()])
                                    .await
                            })
                        })
                        .await
                        .unwrap_or_else(|e: Error| panic!("{e}"));
                }
            })
        })
        .collect();
    for task in tasks {
        task.await.unwrap();
    }
    assert_eq!(count(&ledger, "a").await, Some(200));
}

pub async fn reads_see_what_was_written_before(home: &impl Home) {
    let ledger = home.open(SCHEMA).await.unwrap();
    insert(&ledger, "a", 0).await.unwrap();
    for n in 1..100_i64 {
        let set = "UPDATE things SET count = $1";
        ledger
            .write(move |tx| Box::pin(async move { tx.execute(set, &[n.into()]).await }))
            .await
            .unwrap_or_else(|e: Error| panic!("{e}"));
        assert_eq!(count(&ledger, "a").await, Some(n));
    }
}

pub async fn a_dropped_asker_does_not_undo(home: &impl Home) {
    let ledger = home.open(SCHEMA).await.unwrap();
    {
        let write = insert(&ledger, "a", 1);
        tokio::pin!(write);
        // One poll hands the transaction over.
        assert!(std::future::poll_fn(|cx| std::task::Poll::Ready(write.as_mut().poll(cx).is_pending())).await);
    }
    ledger.stop().await;
    let ledger = home.open(SCHEMA).await.unwrap();
    assert_eq!(count(&ledger, "a").await, Some(1));
}

pub async fn waiting_for_something_else_is_refused(home: &impl Home) {
    let ledger = home.open(SCHEMA).await.unwrap();
    let refused: Result<(), Error> = ledger
        .write(|tx| {
            Box::pin(async move {
                tx.execute(INSERT, &["a".into(), 1.into()]).await?;
                tokio::task::yield_now().await;
                Ok(())
            })
        })
        .await;
    assert!(matches!(refused, Err(Error::Waited)));
    assert_eq!(count(&ledger, "a").await, None);
}

pub async fn mistakes_are_named(home: &impl Home) {
    let ledger = home.open(SCHEMA).await.unwrap();
    let wrong = ledger.read(|tx| Box::pin(async move { tx.query("SELECT nothing FROM nowhere", &[]).await })).await;
    assert!(matches!(wrong, Err(Error::Statement { .. })));
    insert(&ledger, "a", 1).await.unwrap();
    let row = ledger.read(|tx| Box::pin(async move { tx.query_opt(COUNT, &["a".into()]).await })).await;
    let row = row.unwrap_or_else(|e: Error| panic!("{e}")).unwrap();
    assert!(matches!(row.text(0), Err(Error::Statement { .. })));
    assert!(matches!(row.int(1), Err(Error::Statement { .. })));
}

pub async fn rows_survive_reopening(home: &impl Home) {
    let ledger = home.open(SCHEMA).await.unwrap();
    insert(&ledger, "a", 1).await.unwrap();
    ledger.stop().await;
    let ledger = home.open(SCHEMA).await.unwrap();
    assert_eq!(count(&ledger, "a").await, Some(1));
}

pub async fn changed_or_unknown_migrations_are_refused(home: &impl Home) {
    const CHANGED: &[Migration] = &[Migration { name: "0001_things", sql: "CREATE TABLE things (name TEXT)" }];
    home.open(SCHEMA).await.unwrap().stop().await;
    for other in [CHANGED, &[]] {
        let refused = home.open(other).await.err();
        assert!(matches!(refused, Some(Error::Schema { reason }) if reason.contains("0001_things")));
    }
    home.open(SCHEMA).await.unwrap();
}

pub async fn new_migrations_are_applied(home: &impl Home) {
    const GROWN: &[Migration] =
        &[SCHEMA[0], Migration { name: "0002_more", sql: "CREATE TABLE more (id AUTO_ID, name TEXT NOT NULL)" }];
    let ledger = home.open(SCHEMA).await.unwrap();
    insert(&ledger, "a", 1).await.unwrap();
    ledger.stop().await;
    let ledger = home.open(GROWN).await.unwrap();
    assert_eq!(count(&ledger, "a").await, Some(1));
    let insert = "INSERT INTO more (name) VALUES ($1) RETURNING id";
    for expected in [1, 2] {
        let row = ledger.write(move |tx| Box::pin(async move { tx.query_opt(insert, &["x".into()]).await })).await;
        assert_eq!(row.unwrap_or_else(|e: Error| panic!("{e}")).unwrap().int(0).unwrap(), expected);
    }
}

fn outgoing(topic: &Topic, payload: &str) -> Outgoing {
    Outgoing { topic: topic.clone(), payload: payload.to_owned().into() }
}

async fn send(ledger: &Ledger, topic: &Topic, payload: &str) {
    let outgoing = outgoing(topic, payload);
    ledger
        .write(move |tx| {
            let outgoing = outgoing.clone();
            Box::pin(async move { tx.send(&outgoing).await })
        })
        .await
        .unwrap_or_else(|e: Error| panic!("{e}"));
}

async fn payloads(log: &Log, topic: &Topic, count: usize) -> Vec<String> {
    let mut reader = log.reader();
    reader.follow_from_start(topic).unwrap();
    let mut all = Vec::new();
    while all.len() < count {
        let item = tokio::time::timeout(std::time::Duration::from_secs(20), reader.next()).await.expect("a record");
        if let Item::Record(record) = item.unwrap() {
            all.push(String::from_utf8_lossy(&record.payload).into_owned());
        }
    }
    let mut more = Vec::new();
    reader.available_batch(1, &mut more).await.unwrap();
    assert_eq!(more, [], "no record more than rows");
    all
}

fn open_log() -> (tempfile::TempDir, Log) {
    let dir = tempfile::tempdir().unwrap();
    let log = Log::open(dir.path(), Options::default()).unwrap();
    (dir, log)
}

pub async fn outbox_rows_become_records_in_order(home: &impl Home) {
    let ledger = home.open(SCHEMA).await.unwrap();
    let (_dir, log) = open_log();
    let topic = Topic::new("t").unwrap();
    send(&ledger, &topic, "0").await;
    let relay = tokio::spawn(Relay::new(ledger.clone(), log.clone()).run());
    for n in 1..600 {
        send(&ledger, &topic, &n.to_string()).await;
    }
    assert_eq!(payloads(&log, &topic, 600).await, (0..600).map(|n| n.to_string()).collect::<Vec<_>>());
    relay.abort();
}

/// Rows that piled up while the log took no appends.
pub async fn one_go_of_the_relay_is_bounded_in_bytes(home: &impl Home) {
    let ledger = home.open(SCHEMA).await.unwrap();
    let (_dir, log) = open_log();
    let topic = Topic::new("t").unwrap();
    let large = "x".repeat(3 * 1024 * 1024);
    for payload in ["0", &large, &large, &large, "4", "5"] {
        send(&ledger, &topic, payload).await;
    }
    let relay = Relay::new(ledger.clone(), log.clone());
    assert_eq!((relay.step().await.unwrap(), relay.step().await.unwrap(), relay.step().await.unwrap()), (4, 2, 0));
    let sizes: Vec<_> = payloads(&log, &topic, 6).await.iter().map(String::len).collect();
    assert_eq!(sizes, [1, large.len(), large.len(), large.len(), 1, 1]);
}

/// Something that is appended past the outbox, behind what a transaction sent before.
pub async fn who_waits_for_the_outbox_comes_behind_it(home: &impl Home) {
    let ledger = home.open(SCHEMA).await.unwrap();
    let (_dir, log) = open_log();
    let topic = Topic::new("t").unwrap();
    ledger.outbox_relayed().await;
    let mut relay = tokio::task::JoinSet::new();
    relay.spawn(Relay::new(ledger.clone(), log.clone()).run());
    for n in 0..100 {
        send(&ledger, &topic, &format!("{}", 2 * n)).await;
        ledger.outbox_relayed().await;
        log.append(Append::new(&topic, format!("{}", 2 * n + 1))).await.unwrap();
    }
    assert_eq!(payloads(&log, &topic, 200).await, (0..200).map(|n| n.to_string()).collect::<Vec<_>>());
}

pub async fn an_undone_transaction_sends_nothing(home: &impl Home) {
    let ledger = home.open(SCHEMA).await.unwrap();
    let (_dir, log) = open_log();
    let topic = Topic::new("t").unwrap();
    let sent = outgoing(&topic, "never");
    let refused: Result<(), Error> = ledger
        .write(move |tx| {
            let sent = sent.clone();
            Box::pin(async move {
                tx.send(&sent).await?;
                Err(Error::Waited)
            })
        })
        .await;
    assert!(refused.is_err());
    send(&ledger, &topic, "this one").await;
    assert_eq!(Relay::new(ledger.clone(), log.clone()).step().await.unwrap(), 1);
    assert_eq!(payloads(&log, &topic, 1).await, ["this one"]);
}

/// A relay that dies between the append and the removal of the rows leaves them to the next one.
pub async fn a_repeated_relay_doubles_nothing(home: &impl Home) {
    let ledger = home.open(SCHEMA).await.unwrap();
    let (_dir, log) = open_log();
    let topic = Topic::new("t").unwrap();
    for n in 0..10 {
        send(&ledger, &topic, &n.to_string()).await;
    }
    // Stops the relay at every await point that a step has, so that some stop between append and removal.
    for polls in 1..40 {
        let relay = Relay::new(ledger.clone(), log.clone());
        let step = relay.step();
        tokio::pin!(step);
        let polled = AtomicUsize::new(0);
        std::future::poll_fn(|cx| {
            let done = step.as_mut().poll(cx).is_ready();
            let stop = polled.fetch_add(1, SeqCst) + 1 >= polls;
            if done || stop { std::task::Poll::Ready(()) } else { std::task::Poll::Pending }
        })
        .await;
    }
    while Relay::new(ledger.clone(), log.clone()).step().await.unwrap() > 0 {}
    assert_eq!(payloads(&log, &topic, 10).await, (0..10).map(|n| n.to_string()).collect::<Vec<_>>());
}

pub async fn a_closed_topic_does_not_hold_up_the_others(home: &impl Home) {
    let ledger = home.open(SCHEMA).await.unwrap();
    let (_dir, log) = open_log();
    let (closed, open) = (Topic::new("closed").unwrap(), Topic::new("open").unwrap());
    log.close(&closed).await.unwrap();
    send(&ledger, &closed, "late").await;
    send(&ledger, &open, "fine").await;
    assert_eq!(Relay::new(ledger.clone(), log.clone()).step().await.unwrap(), 2);
    assert_eq!(payloads(&log, &open, 1).await, ["fine"]);
}

/// No version writes such a row; one that another version or a person left must not stop the relay.
pub async fn a_row_that_cannot_be_read_does_not_hold_up_the_others(home: &impl Home) {
    let ledger = home.open(SCHEMA).await.unwrap();
    let (_dir, log) = open_log();
    let topic = Topic::new("t").unwrap();
    send(&ledger, &topic, "before").await;
    let nameless = "INSERT INTO outbox (topic, payload) VALUES ('', $1)";
    let payload: Value = (&b"?"[..]).into();
    ledger
        .write(move |tx| {
            let payload = payload.clone();
            Box::pin(async move { tx.execute(nameless, &[payload]).await })
        })
        .await
        .unwrap_or_else(|e: Error| panic!("{e}"));
    send(&ledger, &topic, "after").await;
    assert_eq!(Relay::new(ledger.clone(), log.clone()).step().await.unwrap(), 3);
    assert_eq!(payloads(&log, &topic, 2).await, ["before", "after"]);
    assert_eq!(Relay::new(ledger.clone(), log.clone()).step().await.unwrap(), 0);
}

/// The caller of a write can go before it has ended, as the handler of an HTTP request does with its client.
pub async fn the_relay_wakes_though_nobody_waits_for_the_write(home: &impl Home) {
    let ledger = home.open(SCHEMA).await.unwrap();
    let (_dir, log) = open_log();
    let topic = Topic::new("t").unwrap();
    let relay = tokio::spawn(Relay::new(ledger.clone(), log.clone()).run());
    for n in 0..20 {
        send(&ledger, &topic, &format!("{n} waited for")).await;
        let count = 2 * n + 1;
        assert_eq!(payloads(&log, &topic, count).await.len(), count, "the relay is asleep by now, or about to be");
        let sent = outgoing(&topic, "dropped");
        let write = ledger.write(move |tx| {
            let sent = sent.clone();
            Box::pin(async move { tx.send(&sent).await })
        });
        {
            tokio::pin!(write);
            // One poll hands the transaction over.
            let poll = |cx: &mut std::task::Context<'_>| {
                let polled: std::task::Poll<Result<(), Error>> = write.as_mut().poll(cx);
                std::task::Poll::Ready(polled.is_pending())
            };
            std::future::poll_fn(poll).await;
        }
        assert_eq!(payloads(&log, &topic, count + 1).await.last().map(String::as_str), Some("dropped"));
    }
    relay.abort();
}

pub async fn a_panic_is_answered_and_leaves_nothing(home: &impl Home) {
    let ledger = home.open(SCHEMA).await.unwrap();
    let panicked: Result<(), Error> = ledger
        .write(|tx| {
            Box::pin(async move {
                tx.execute(INSERT, &["a".into(), 1.into()]).await?;
                panic!("on purpose")
            })
        })
        .await;
    assert!(matches!(panicked, Err(Error::Panicked)), "{panicked:?}");
    let panicked: Result<(), Error> = ledger.read(|_| Box::pin(async move { panic!("on purpose") })).await;
    assert!(matches!(panicked, Err(Error::Panicked)), "{panicked:?}");
    assert_eq!(count(&ledger, "a").await, None);
    insert(&ledger, "a", 2).await.unwrap();
    assert_eq!(count(&ledger, "a").await, Some(2));
}

/// As many scans as may run and some that wait for those, all of them stuck: a look-up is answered meanwhile.
pub async fn look_ups_do_not_wait_for_scans(home: &impl Home) {
    let ledger = home.open(SCHEMA).await.unwrap();
    insert(&ledger, "a", 1).await.unwrap();
    let (started, mut starts) = tokio::sync::mpsc::channel(16);
    let (release, released) = std::sync::mpsc::channel::<()>();
    let released = std::sync::Arc::new(std::sync::Mutex::new(released));
    let scans: Vec<_> = (0..8)
        .map(|_| {
            let (ledger, started, released) = (ledger.clone(), started.clone(), released.clone());
            tokio::spawn(async move {
                ledger
                    .scan(move |tx| {
                        let (started, released) = (started.clone(), released.clone());
                        Box::pin(async move {
                            // The first one that is told to go on holds up the thread that it runs on, as a long query does.
                            let _ = started.try_send(());
                            tokio::task::block_in_place(|| released.lock().unwrap().recv()).unwrap();
                            tx.query_opt(COUNT, &["a".into()]).await
                        })
                    })
                    .await
            })
        })
        .collect();
    starts.recv().await.unwrap();
    starts.recv().await.unwrap();
    let look_up = tokio::time::timeout(std::time::Duration::from_secs(20), count(&ledger, "a"));
    assert_eq!(look_up.await.expect("an answer while scans run"), Some(1));
    for _ in &scans {
        release.send(()).unwrap();
    }
    for scan in scans {
        let row: Result<_, Error> = scan.await.unwrap();
        assert_eq!(row.unwrap().unwrap().int(0).unwrap(), 1);
    }
}

pub async fn stopping_tells_everybody(home: &impl Home) {
    let ledger = home.open(SCHEMA).await.unwrap();
    let other = ledger.clone();
    ledger.stop().await;
    assert!(matches!(insert(&other, "a", 1).await, Err(Error::Stopped)));
    let read = other.read(|tx| Box::pin(async move { tx.query(COUNT, &["a".into()]).await })).await;
    assert!(matches!(read, Err(Error::Stopped)));
    ledger.stop().await;
}

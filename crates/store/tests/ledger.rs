//! The ledger's suite on each back end.

#![allow(clippy::unwrap_used, clippy::panic, clippy::disallowed_methods, reason = "test code")]

mod sqlite {
    use trunkline_store::{
        conformance::ledger::{Home, SCHEMA},
        ledger::{Error, Ledger, Migration, Options, TxFuture, WriteTx},
        ledger_suite,
    };

    struct InFile(tempfile::TempDir);

    impl Home for InFile {
        async fn open(&self, migrations: &'static [Migration]) -> Result<Ledger, Error> {
            Ledger::open_sqlite(&self.0.path().join("ledger.sqlite"), migrations, Options::default())
        }
    }

    ledger_suite!(InFile(tempfile::tempdir().unwrap()));

    const INSERT: &str = "INSERT INTO things (name, count, data) VALUES ($1, 1, $2)";

    fn insert<'a>(tx: &'a mut WriteTx, name: &'static str, bytes: usize) -> TxFuture<'a, u64, Error> {
        Box::pin(async move { tx.execute(INSERT, &[name.into(), vec![7; bytes].into()]).await })
    }

    /// SQLite rolls the whole transaction back when a single-row insert meets a full disk. What the group held before is gone
    /// then, and what runs after it is not in a transaction any more.
    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn a_group_that_sqlite_rolled_back_is_refused_as_a_whole() {
        let ledger = InFile(tempfile::tempdir().unwrap());
        let ledger = ledger.open(SCHEMA).await.unwrap();
        // The file may not grow by more than a few pages, as on a full disk.
        let limit: Result<_, Error> = ledger
            .write(|tx| {
                Box::pin(async move {
                    let pages = tx.query("PRAGMA page_count", &[]).await?[0].int(0)?;
                    assert!(pages < 100, "{pages}");
                    tx.query("PRAGMA max_page_count = 100", &[]).await
                })
            })
            .await;
        limit.unwrap();
        // The writer is held up until all others are in its queue, so that they become one group.
        let (release, released) = std::sync::mpsc::channel::<()>();
        let released = std::sync::Mutex::new(released);
        let (started, mut starts) = tokio::sync::mpsc::channel(1);
        let blocker = ledger
            .submit(move |_| {
                started.try_send(()).unwrap();
                released.lock().unwrap().recv().unwrap();
                Box::pin(async move { Ok::<_, Error>(()) })
            })
            .await
            .unwrap();
        starts.recv().await.unwrap();
        let mut group = Vec::new();
        for (name, bytes) in [("before", 10), ("large", 10_000_000), ("after", 10), ("last", 10)] {
            let submitted = ledger.submit(move |tx| insert(tx, name, bytes)).await.unwrap();
            group.push((name, submitted));
        }
        release.send(()).unwrap();
        blocker.ended().await.unwrap();
        for (name, submitted) in group {
            let ended = submitted.ended().await;
            assert!(matches!(ended, Err(Error::Unavailable { .. })), "{name}: {ended:?}");
        }
        let names: Result<_, Error> =
            ledger.read(|tx| Box::pin(async move { tx.query("SELECT name FROM things", &[]).await })).await;
        assert_eq!(names.unwrap(), [], "what was refused is not there");
        // The next group is one as any other.
        assert_eq!(ledger.write(|tx| insert(tx, "next", 10)).await.unwrap(), 1);
    }
}

mod postgres {
    use trunkline_store::{
        conformance::{
            ledger::{Home, SCHEMA},
            postgres::{Gateway, database},
        },
        ledger::{Error, Ledger, Migration, Options, Outgoing, Relay},
        ledger_suite,
        log::{self, Item, Log, Topic},
    };

    /// A database of its own, made with the first opening.
    #[derive(Default)]
    struct InDatabase(tokio::sync::OnceCell<String>);

    impl Home for InDatabase {
        async fn open(&self, migrations: &'static [Migration]) -> Result<Ledger, Error> {
            let url = self.0.get_or_init(database).await;
            Ledger::open_postgres(url, migrations, Options::default()).await
        }
    }

    ledger_suite!(InDatabase::default());

    async fn node(url: &str) -> Ledger {
        Ledger::open_postgres(url, SCHEMA, Options::default()).await.unwrap()
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn nodes_that_start_together_migrate_once() {
        let url = database().await;
        let nodes: Vec<_> =
            (0..8).map(|_| url.clone()).map(|url| tokio::spawn(async move { node(&url).await })).collect();
        for node in nodes {
            node.await.unwrap().stop().await;
        }
    }

    #[tokio::test]
    async fn what_another_node_sends_is_relayed() {
        let url = database().await;
        let dir = tempfile::tempdir().unwrap();
        let log = Log::open(dir.path(), log::Options::default()).unwrap();
        let relay = tokio::spawn(Relay::new(node(&url).await, log.clone()).run());
        let topic = Topic::new("t").unwrap();
        let outgoing = Outgoing { topic: topic.clone(), payload: "from afar".into() };
        let sent: Result<(), Error> = node(&url)
            .await
            .write(move |tx| {
                let outgoing = outgoing.clone();
                Box::pin(async move { tx.send(&outgoing).await })
            })
            .await;
        sent.unwrap();
        let mut reader = log.reader();
        reader.follow_from_start(&topic).unwrap();
        let Item::Record(record) = reader.next().await.unwrap() else { panic!("not a record") };
        assert_eq!(record.payload, "from afar");
        relay.abort();
    }

    #[tokio::test]
    async fn broken_connections_are_replaced_and_lose_nothing_that_was_acknowledged() {
        const INSERT: &str = "INSERT INTO things (name, count) VALUES ($1, 0)";
        let gateway = Gateway::open(&database().await).await;
        let ledger = node(gateway.url()).await;
        let mut acknowledged = Vec::new();
        for n in 0..200 {
            if n % 10 == 5 {
                gateway.cut();
            }
            let name = format!("{n}");
            let wrote: Result<u64, Error> = ledger
                .write({
                    let name = name.clone();
                    move |tx| {
                        let name = name.as_str().into();
                        Box::pin(async move { tx.execute(INSERT, &[name]).await })
                    }
                })
                .await;
            match wrote {
                Ok(_) => acknowledged.push(name),
                Err(error) => assert!(matches!(error, Error::Unavailable { .. }), "{error}"),
            }
        }
        assert!(acknowledged.len() >= 150, "{} of 200 were acknowledged", acknowledged.len());
        let rows = ledger.read(|tx| Box::pin(async move { tx.query("SELECT name FROM things", &[]).await })).await;
        let rows: Vec<_> = rows.unwrap_or_else(|e: Error| panic!("{e}"));
        let names: Vec<_> = rows.iter().map(|row| row.text(0).unwrap()).collect();
        assert!(acknowledged.iter().all(|name| names.contains(&name.as_str())));
    }

    #[tokio::test]
    async fn a_server_that_is_not_there_is_named() {
        let url = "host=/nonexistent user=trunkline dbname=nothing";
        let refused = Ledger::open_postgres(url, SCHEMA, Options::default()).await.err();
        assert!(matches!(refused, Some(Error::Unavailable { .. })), "{refused:?}");
    }
}

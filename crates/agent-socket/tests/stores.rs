//! One suite for every store.

#![allow(clippy::unwrap_used, clippy::panic, reason = "tests")]

use serde_json::json;
use trunkline_agent_socket::{
    Envelope, Meta, Type, make,
    store::{EventStore, Keep, MemoryStore, Range},
};

const KEEP: Keep = Keep { events: 5, events_behind: 8 };

fn event(client: &str, text: &str) -> Envelope {
    let mut event = make(Type::TurnTextDelta, &json!({"delta": text}), Meta::turn("t")).unwrap();
    event.client_id = Some(client.to_owned());
    event
}

async fn append(store: &dyn EventStore, client: &str, count: usize) -> u64 {
    let mut last = 0;
    for number in 0..count {
        let kept = store.append(event(client, &number.to_string())).await.unwrap();
        assert!(kept.seq > Some(last), "numbers grow");
        last = kept.seq.unwrap();
    }
    last
}

fn numbers(range: &Range) -> Vec<u64> {
    range.events.iter().filter_map(|event| event.seq).collect()
}

async fn suite(store: &dyn EventStore) {
    assert_eq!(store.latest_seq("a").await.unwrap(), 0);
    assert_eq!(store.get_since_range("a", 0, None, 10).await.unwrap(), Range::default());
    let last = append(store, "a", 4).await;
    let other = append(store, "b", 1).await;
    let all = store.get_since_range("a", 0, None, 10).await.unwrap();
    assert_eq!((all.events.len(), all.gone_through, all.more), (4, None, false));
    assert_eq!(all.events[1].value()["delta"], "1");
    assert_eq!(all.events[1].client_id.as_deref(), Some("a"));
    assert_eq!(numbers(&store.get_since_range("b", 0, None, 10).await.unwrap()), [other]);
    let seqs = numbers(&all);

    // Parts.
    let range = store.get_since_range("a", seqs[0], Some(seqs[2]), 10).await.unwrap();
    assert_eq!((numbers(&range), range.more), (seqs[1..3].to_vec(), false));
    let range = store.get_since_range("a", 0, None, 2).await.unwrap();
    assert_eq!((numbers(&range), range.more), (seqs[..2].to_vec(), true));
    assert_eq!(store.get_since("a", last).await.unwrap(), []);
    assert_eq!(store.get_since("a", last + 100).await.unwrap(), []);

    // Without anybody who wants them, only so many are kept.
    let last = append(store, "a", 4).await;
    store.trim("a", None).await.unwrap();
    let range = store.get_since_range("a", 0, None, 100).await.unwrap();
    assert_eq!(range.events.len(), KEEP.events);
    let gone = numbers(&range)[0] - 1;
    assert_eq!(range.gone_through, Some(gone));
    assert_eq!(store.get_since_range("a", gone, None, 100).await.unwrap().gone_through, None);

    // Whoever is slow keeps more, within a bound.
    store.trim("a", Some(last)).await.unwrap();
    append(store, "a", 7).await;
    store.trim("a", Some(last)).await.unwrap();
    let range = store.get_since_range("a", last, None, 100).await.unwrap();
    assert_eq!((range.events.len(), range.gone_through), (7, None));
    append(store, "a", 5).await;
    store.trim("a", Some(last)).await.unwrap();
    let range = store.get_since_range("a", last, None, 100).await.unwrap();
    assert_eq!(range.events.len(), KEEP.events_behind);
    assert_eq!(range.gone_through, Some(numbers(&range)[0] - 1));
    assert_eq!(numbers(&store.get_since_range("b", 0, None, 10).await.unwrap()), [other], "only that client's");
    assert!(store.append(Envelope::new(Type::TurnDone)).await.is_err(), "an event belongs to a client");
}

#[tokio::test]
async fn in_memory() {
    suite(&MemoryStore::new(KEEP)).await;
    let store = MemoryStore::default();
    let last = append(&store, "a", 700).await;
    assert_eq!(store.get_since("a", 0).await.unwrap().len(), 500, "the published figure");
    store.clear(Some("a"));
    let range = store.get_since_range("a", 0, None, 10).await.unwrap();
    assert_eq!((range.events.len(), range.gone_through), (0, Some(last)));
    assert_eq!(append(&store, "a", 1).await, last + 1);
}

#[cfg(feature = "sqlite")]
#[tokio::test]
async fn in_a_file() {
    use trunkline_agent_socket::store::SqliteStore;

    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("events.db");
    suite(&SqliteStore::open(&path, KEEP).unwrap()).await;
    // It is there when it is opened again, and numbers go on.
    let store = SqliteStore::open(&path, KEEP).unwrap();
    let latest = store.latest_seq("a").await.unwrap();
    let kept = store.get_since("a", 0).await.unwrap();
    assert_eq!(kept.last().unwrap().seq, Some(latest));
    assert_eq!(append(&store, "a", 1).await, latest + 1);
    // Nobody needs to ask for it to be trimmed.
    append(&store, "c", 250).await;
    assert!(store.get_since("c", 0).await.unwrap().len() < 110);
    std::fs::write(dir.path().join("no.db"), "this is no database at all, but some text").unwrap();
    assert!(SqliteStore::open(&dir.path().join("no.db"), KEEP).is_err());
}

//! What every log does.

use std::{
    future::Future,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering::SeqCst},
    },
    time::Duration,
};

use bytes::Bytes;

use crate::log::{
    Append, Appended, Class, Clock, ContentDigest, Cursor, Ending, Epoch, Error, Item, Log, Offset, Options, Reader,
    Retention, Topic,
};

/// A place where a log can be opened, again and again. The previous one must be stopped first.
pub trait Home: Send + Sync {
    fn open(&self, options: Options) -> impl Future<Output = Log> + Send;
}

/// One test per function of this suite, on the [`Home`] that `$home` evaluates to.
#[macro_export]
macro_rules! log_suite {
    ($home:expr) => {
        $crate::log_suite!(@tests $home;
            appended_records_are_read_in_order, offsets_increase_over_all_topics, a_reader_waits_at_the_tail,
            several_topics_are_merged_in_offset_order, the_tail_skips_history, a_topic_added_later_yields_its_history,
            an_unfollowed_topic_is_silent, a_cursor_resumes_behind_what_was_read, foreign_cursors_are_refused,
            everything_survives_reopening, a_batch_is_all_or_nothing, an_expected_tail_admits_one_writer,
            a_dedup_id_is_written_once, dedup_ids_survive_reopening_and_are_forgotten_after_their_window,
            a_closed_topic_ends, a_deleted_topic_ends_and_starts_anew, trimming_leaves_a_gap, a_live_reader_meets_a_gap,
            a_gap_keeps_its_place_between_topics, retention_by_age_count_and_size, the_end_is_never_trimmed,
            transients_reach_live_readers_only, slow_readers_lose_transients_never_records,
            a_small_window_sends_readers_to_disk, cancelled_reads_lose_nothing, many_readers_see_the_same,
            concurrent_appends_keep_each_senders_order, time_never_goes_back, limits_are_named,
            stopping_tells_everybody, what_is_unread_is_counted, a_dedup_id_is_new_once_its_record_is_gone,
            dedup_ids_are_forgotten_although_the_log_is_reopened_often, a_fork_refuses_the_cursors_from_before,
            a_position_beyond_the_tail_is_the_tail,
        );
    };
    (@tests $home:expr; $($name:ident,)+) => {
        $(#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
        async fn $name() {
            $crate::conformance::log::$name(&$home).await;
        })+
    };
}

fn topic(name: &str) -> Topic {
    Topic::new(name).unwrap()
}

async fn append(log: &Log, topic: &Topic, payload: &str) -> Offset {
    log.append(Append::new(topic, payload.to_owned())).await.unwrap().offset
}

async fn append_many(log: &Log, topic: &Topic, range: std::ops::Range<u32>) -> Vec<Offset> {
    let appends = range.map(|n| Append::new(topic, n.to_string())).collect();
    log.append_batch(appends).await.unwrap().iter().map(|a| a.offset).collect()
}

/// The next item, or a panic: a reader that hangs is a failure, not a timeout of the whole run.
async fn next(reader: &mut Reader) -> Item {
    tokio::time::timeout(Duration::from_secs(20), reader.next()).await.expect("an item within 20 s").unwrap()
}

async fn text(reader: &mut Reader) -> String {
    match next(reader).await {
        Item::Record(record) => String::from_utf8(record.payload.to_vec()).unwrap(),
        other => panic!("expected a record, got {other:?}"),
    }
}

async fn texts(reader: &mut Reader, count: usize) -> Vec<String> {
    let mut all = Vec::new();
    for _ in 0..count {
        all.push(text(reader).await);
    }
    all
}

fn numbers(range: std::ops::Range<u32>) -> Vec<String> {
    range.map(|n| n.to_string()).collect()
}

/// There is nothing up to the tail.
async fn assert_caught_up(reader: &mut Reader) {
    let mut rest = Vec::new();
    reader.available_batch(10, &mut rest).await.unwrap();
    assert_eq!(rest, []);
}

fn from_start(log: &Log, topics: &[&Topic]) -> Reader {
    let mut reader = log.reader();
    for topic in topics {
        reader.follow_from_start(topic).unwrap();
    }
    reader
}

pub async fn appended_records_are_read_in_order(home: &impl Home) {
    let log = home.open(Options::default()).await;
    let t = topic("t");
    append_many(&log, &t, 0..3000).await;
    for n in 3000..3010 {
        append(&log, &t, &n.to_string()).await;
    }
    let mut reader = from_start(&log, &[&t]);
    assert_eq!(texts(&mut reader, 3010).await, numbers(0..3010));
    assert_caught_up(&mut reader).await;
}

pub async fn what_is_unread_is_counted(home: &impl Home) {
    let log = home.open(Options::default()).await;
    let (t, other) = (topic("t"), topic("other"));
    let old = append_many(&log, &t, 0..30).await;
    append_many(&log, &other, 0..7).await;
    let unread = async |log: &Log, after: Offset, most: usize| {
        let wanted = vec![(t.clone(), after), (other.clone(), Offset::START), (topic("none"), Offset::START)];
        log.unread(wanted, most).await.unwrap()
    };
    assert_eq!(unread(&log, Offset::START, 100).await, [30, 7, 0]);
    assert_eq!(unread(&log, old[19], 100).await, [10, 7, 0]);
    assert_eq!(unread(&log, old[9], 5).await, [5, 5, 0]);
    // Whether somebody listens makes no difference.
    let _reader = from_start(&log, &[&t]);
    assert_eq!(unread(&log, old[19], 100).await, [10, 7, 0]);
    let new = append_many(&log, &t, 30..40).await;
    assert_eq!(unread(&log, old[29], 100).await, [10, 7, 0]);
    assert_eq!(unread(&log, new[8], 100).await, [1, 7, 0]);
    log.trim(&t, new[3]).await.unwrap();
    assert_eq!(unread(&log, old[3], 100).await, [6, 7, 0]);
    assert_eq!(unread(&log, old[29], 100).await, [6, 7, 0]);
    log.stop().await;
    let log = home.open(Options::default()).await;
    assert_eq!(unread(&log, new[6], 100).await, [3, 7, 0]);
}

pub async fn offsets_increase_over_all_topics(home: &impl Home) {
    let log = home.open(Options::default()).await;
    let mut last = Offset::START;
    for n in 0..50 {
        let offset = append(&log, &topic(&format!("t{}", n % 7)), "x").await;
        assert!(offset > last);
        assert_eq!(log.tail().offset, offset, "a record is visible when its append returns");
        last = offset;
    }
}

pub async fn a_reader_waits_at_the_tail(home: &impl Home) {
    let log = home.open(Options::default()).await;
    let t = topic("t");
    let mut reader = from_start(&log, &[&t]);
    let waiting = tokio::spawn(async move { (text(&mut reader).await, reader) });
    tokio::task::yield_now().await;
    append(&log, &topic("other"), "not for you").await;
    append(&log, &t, "hello").await;
    let (first, mut reader) = waiting.await.unwrap();
    assert_eq!(first, "hello");
    for n in 0..200 {
        append(&log, &t, &n.to_string()).await;
        assert_eq!(text(&mut reader).await, n.to_string());
    }
}

pub async fn several_topics_are_merged_in_offset_order(home: &impl Home) {
    let log = home.open(Options::default()).await;
    let topics: Vec<_> = (0..20).map(|n| topic(&format!("t{n}"))).collect();
    let mut live = from_start(&log, &topics.iter().collect::<Vec<_>>());
    let mut expected = Vec::new();
    for n in 0..2000_usize {
        let t = &topics[n * 7 % 20];
        expected.push((append(&log, t, &n.to_string()).await, t.clone()));
    }
    let late = from_start(&log, &topics.iter().collect::<Vec<_>>());
    for mut reader in [late, std::mem::replace(&mut live, log.reader())] {
        for (offset, topic) in &expected {
            let Item::Record(record) = next(&mut reader).await else { panic!("a record") };
            assert_eq!((&record.offset, &record.topic), (offset, topic));
        }
        assert_caught_up(&mut reader).await;
    }
}

pub async fn the_tail_skips_history(home: &impl Home) {
    let log = home.open(Options::default()).await;
    let t = topic("t");
    append_many(&log, &t, 0..10).await;
    let mut reader = log.reader();
    reader.follow_from_tail(&t).unwrap();
    append_many(&log, &t, 10..12).await;
    assert_eq!(texts(&mut reader, 2).await, numbers(10..12));
}

pub async fn a_topic_added_later_yields_its_history(home: &impl Home) {
    let log = home.open(Options::default()).await;
    let (a, b) = (topic("a"), topic("b"));
    append_many(&log, &b, 0..5).await;
    append_many(&log, &a, 100..105).await;
    let mut reader = from_start(&log, &[&a]);
    assert_eq!(texts(&mut reader, 5).await, numbers(100..105));
    let before = reader.cursor();
    reader.follow_from_start(&b).unwrap();
    append_many(&log, &a, 105..106).await;
    assert_eq!(texts(&mut reader, 5).await, numbers(0..5));
    assert_eq!(reader.cursor(), before, "older history does not move the cursor back");
    assert_eq!(text(&mut reader).await, "105");
}

pub async fn an_unfollowed_topic_is_silent(home: &impl Home) {
    let log = home.open(Options::default()).await;
    let (a, b) = (topic("a"), topic("b"));
    let mut reader = from_start(&log, &[&a, &b]);
    for n in 0..10 {
        append(&log, if n % 2 == 0 { &a } else { &b }, &n.to_string()).await;
    }
    assert_eq!(text(&mut reader).await, "0");
    reader.unfollow(&b);
    assert_eq!(texts(&mut reader, 4).await, ["2", "4", "6", "8"]);
    append(&log, &b, "unheard").await;
    assert_caught_up(&mut reader).await;
    assert!(reader.follows(&a) && !reader.follows(&b));
}

pub async fn a_cursor_resumes_behind_what_was_read(home: &impl Home) {
    let log = home.open(Options::default()).await;
    let (a, b) = (topic("a"), topic("b"));
    for n in 0..40 {
        append(&log, if n % 3 == 0 { &a } else { &b }, &n.to_string()).await;
    }
    let mut first = from_start(&log, &[&a, &b]);
    assert_eq!(texts(&mut first, 15).await, numbers(0..15));
    let printed = first.cursor().to_string();
    drop(first);
    let mut second = log.reader_at(printed.parse().unwrap()).unwrap();
    second.follow(&a).unwrap();
    second.follow(&b).unwrap();
    assert_eq!(texts(&mut second, 25).await, numbers(15..40));
}

pub async fn foreign_cursors_are_refused(home: &impl Home) {
    let log = home.open(Options::default()).await;
    append(&log, &topic("t"), "x").await;
    let tail = log.tail();
    let foreign = Cursor { epoch: Epoch(uuid::Uuid::from_u128(7)), ..tail };
    assert!(matches!(log.reader_at(foreign), Err(Error::EpochMismatch { .. })));
    let beyond = Cursor { offset: Offset(tail.offset.0 + 1), ..tail };
    assert!(matches!(log.reader_at(beyond), Err(Error::BeyondTail { .. })));
    for bad in ["", "-", "1", "x-1", &format!("{}-", uuid::Uuid::nil().simple()), &format!("{}-1", uuid::Uuid::nil())] {
        assert!(matches!(bad.parse::<Cursor>(), Err(Error::InvalidCursor)), "{bad}");
    }
}

pub async fn everything_survives_reopening(home: &impl Home) {
    let t = topic("t");
    let (epoch, cursor) = {
        let log = home.open(Options::default()).await;
        append_many(&log, &t, 0..100).await;
        log.stop().await;
        (log.epoch(), log.tail())
    };
    let log = home.open(Options::default()).await;
    assert_eq!((log.epoch(), log.tail()), (epoch, cursor));
    assert!(append(&log, &t, "100").await > cursor.offset);
    assert_eq!(texts(&mut from_start(&log, &[&t]), 101).await, numbers(0..101));
}

pub async fn a_batch_is_all_or_nothing(home: &impl Home) {
    let log = home.open(Options::default()).await;
    let (open, closed) = (topic("open"), topic("closed"));
    log.close(&closed).await.unwrap();
    let refused = log.append_batch(vec![Append::new(&open, "1"), Append::new(&closed, "2")]).await;
    assert!(matches!(refused, Err(Error::Closed { topic }) if topic == closed));
    assert_eq!(log.status(&open).await.unwrap().records, 0);
    // What goes with the first one is not written again with it, nor anything that it has become.
    let led = |first: &'static str| vec![Append::new(&open, first).dedup("led"), Append::new(&open, "x").with_first()];
    let more = [led("1"), vec![Append::new(&open, "y").with_first()]].concat();
    let first = log.append_batch(led("1")).await.unwrap();
    let again = log.append_batch(more).await.unwrap();
    assert!(again.iter().all(|each| each.duplicate && each.offset == first[0].offset), "{again:?}");
    assert_eq!(log.status(&open).await.unwrap().records, 2);
    assert_eq!(log.find_dedup(&open, "led").await.unwrap(), Some(first[0].offset));
    assert_eq!(log.find_dedup(&open, "other").await.unwrap(), None);
    log.delete(&open).await.unwrap();
    let ok = log.append_batch(vec![Append::new(&open, "1").dedup("a"), Append::new(&open, "2").dedup("a")]).await;
    let ok = ok.unwrap();
    assert_eq!((ok[0].duplicate, ok[1].duplicate, ok[1].offset), (false, true, ok[0].offset));
    assert_eq!(log.status(&open).await.unwrap().records, 1);
}

pub async fn an_expected_tail_admits_one_writer(home: &impl Home) {
    let log = home.open(Options::default()).await;
    let t = topic("t");
    let first = log.append(Append::new(&t, "1").expect_tail(Offset::START)).await.unwrap().offset;
    let late = log.append(Append::new(&t, "2").expect_tail(Offset::START)).await;
    assert!(matches!(late, Err(Error::TailMoved { actual, .. }) if actual == first));
    let attempts = (0..20).map(|n| {
        let (log, append) = (log.clone(), Append::new(&t, n.to_string()).expect_tail(first));
        tokio::spawn(async move { log.append(append).await })
    });
    let mut winners = 0;
    for attempt in attempts.collect::<Vec<_>>() {
        winners += usize::from(attempt.await.unwrap().is_ok());
    }
    assert_eq!(winners, 1);
}

pub async fn a_dedup_id_is_written_once(home: &impl Home) {
    let log = home.open(Options::default()).await;
    let (a, b) = (topic("a"), topic("b"));
    let first = log.append(Append::new(&a, "1").dedup("id")).await.unwrap();
    assert!(!first.duplicate);
    append(&log, &a, "2").await;
    let again = log.append(Append::new(&a, "other payload").dedup("id")).await.unwrap();
    assert_eq!((again.offset, again.duplicate), (first.offset, true));
    assert!(!log.append(Append::new(&b, "1").dedup("id")).await.unwrap().duplicate, "ids are per topic");
    ids_are_for_one_content(&log, &topic("c")).await;
    let racing = (0..20).map(|_| {
        let (log, append) = (log.clone(), Append::new(&a, "3").dedup("racing"));
        tokio::spawn(async move { log.append(append).await.unwrap() })
    });
    let mut written = 0;
    for appended in racing.collect::<Vec<_>>() {
        written += usize::from(!appended.await.unwrap().duplicate);
    }
    assert_eq!(written, 1);
    log.close(&a).await.unwrap();
    assert!(log.append(Append::new(&a, "1").dedup("id")).await.unwrap().duplicate, "also once the topic is closed");
    assert_eq!(texts(&mut from_start(&log, &[&a]), 3).await, ["1", "2", "3"]);
}

async fn ids_are_for_one_content(log: &Log, topic: &Topic) {
    let digest = |content: &[u8]| ContentDigest::of(&[b"kind", content]);
    let append = |content: &'static str| Append::new(topic, content).dedup_with("named", digest(content.as_bytes()));
    let first = log.append(append("one")).await.unwrap();
    let again = log.append(append("one")).await.unwrap();
    assert!(again.duplicate && again.offset == first.offset);
    let is_reused = |outcome: &Result<Appended, Error>| matches!(outcome, Err(Error::DedupReused { offset, .. }) if *offset == first.offset);
    assert!(is_reused(&log.append(append("other")).await));
    // Each of many on its own, of a batch all or none; also of what is not on the disk yet.
    let fresh = |content: &'static str| Append::new(topic, content).dedup_with("fresh", digest(content.as_bytes()));
    let each = vec![append("one"), append("other"), fresh("x"), fresh("y"), fresh("x")];
    let each = log.submit_each(each).await.unwrap().await.unwrap();
    assert!(each[0].as_ref().unwrap().duplicate && is_reused(&each[1]) && !each[2].as_ref().unwrap().duplicate);
    assert!(matches!(each[3], Err(Error::DedupReused { .. })) && each[4].as_ref().unwrap().duplicate);
    let tail = log.tail();
    for batch in [
        vec![append("one"), append("other")],
        vec![
            Append::new(topic, "x").dedup_with("in a batch", digest(b"x")),
            Append::new(topic, "y").dedup_with("in a batch", digest(b"y")),
        ],
    ] {
        assert!(matches!(log.append_batch(batch).await, Err(Error::DedupReused { .. })));
    }
    assert_eq!(log.tail(), tail);
    assert_eq!(log.find_dedup_with(topic, "named", digest(b"one")).await.unwrap(), Some(first.offset));
    assert!(matches!(log.find_dedup_with(topic, "named", digest(b"x")).await, Err(Error::DedupReused { .. })));
    assert_eq!(log.find_dedup_with(topic, "unnamed", digest(b"x")).await.unwrap(), None);
    // An id that was given without content is the same as anything.
    let plain = log.append(Append::new(topic, "plain").dedup("plain")).await.unwrap();
    let named = log.append(Append::new(topic, "p").dedup_with("plain", digest(b"p"))).await.unwrap();
    assert!(named.duplicate && named.offset == plain.offset);
}

pub async fn dedup_ids_survive_reopening_and_are_forgotten_after_their_window(home: &impl Home) {
    let now = Arc::new(AtomicU64::new(1_000_000));
    let clock = now.clone();
    let options = Options {
        clock: Clock::new(move || clock.load(SeqCst)),
        dedup_window: Duration::from_millis(500),
        ..Options::default()
    };
    let t = topic("t");
    let log = home.open(options.clone()).await;
    log.append(Append::new(&t, "1").dedup("id")).await.unwrap();
    log.stop().await;
    now.fetch_add(1_000_000, SeqCst);
    let log = home.open(options).await;
    assert_eq!(log.sweep().await.unwrap().dedup_ids, 0, "the window starts anew with every opening");
    assert!(log.append(Append::new(&t, "1").dedup("id")).await.unwrap().duplicate);
    // The window counts the time that the log is open, which only passes by passing.
    let forgotten = async {
        while log.sweep().await.unwrap().dedup_ids == 0 {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(20), forgotten).await.unwrap();
    assert!(!log.append(Append::new(&t, "2").dedup("id")).await.unwrap().duplicate);
}

pub async fn dedup_ids_are_forgotten_although_the_log_is_reopened_often(home: &impl Home) {
    let now = Arc::new(AtomicU64::new(1_000_000));
    let clock = now.clone();
    let options = Options { clock: Clock::new(move || clock.load(SeqCst)), ..Options::default() };
    let half_a_window = options.dedup_window.as_millis() as u64 / 2 + 1;
    let t = topic("t");
    for day in 0..4 {
        let log = home.open(options.clone()).await;
        log.append(Append::new(&t, "1").dedup(format!("id {day}"))).await.unwrap();
        let forgotten = log.sweep().await.unwrap().dedup_ids;
        assert_eq!(forgotten, u64::from(day == 3), "day {day}");
        log.stop().await;
        now.fetch_add(half_a_window, SeqCst);
    }
}

pub async fn a_dedup_id_is_new_once_its_record_is_gone(home: &impl Home) {
    let log = home.open(Options::default()).await;
    let t = topic("t");
    let first = log.append(Append::new(&t, "1").dedup("id")).await.unwrap();
    log.trim(&t, first.offset).await.unwrap();
    assert_eq!(log.find_dedup(&t, "id").await.unwrap(), None);
    let second = log.append(Append::new(&t, "2").dedup("id")).await.unwrap();
    assert!(!second.duplicate, "trimmed");
    assert_eq!(log.find_dedup(&t, "id").await.unwrap(), Some(second.offset));
    assert!(log.append(Append::new(&t, "2").dedup("id")).await.unwrap().duplicate);
    log.delete(&t).await.unwrap();
    assert!(!log.append(Append::new(&t, "3").dedup("id")).await.unwrap().duplicate, "deleted");
    let mut reader = log.reader();
    reader.follow_from(&t, second.offset).unwrap();
    // Behind what tells that the others are gone.
    let last = loop {
        if let Item::Record(record) = next(&mut reader).await {
            break record;
        }
    };
    assert_eq!(&last.payload[..], b"3");
}

pub async fn a_fork_refuses_the_cursors_from_before(home: &impl Home) {
    let log = home.open(Options::default()).await;
    let t = topic("t");
    append(&log, &t, "1").await;
    let before = log.tail();
    assert_eq!(log.forked_from(), None);
    log.fork().await.unwrap();
    assert_ne!(log.epoch(), before.epoch);
    assert!(matches!(log.reader_at(before), Err(Error::EpochMismatch { .. })));
    append(&log, &t, "2").await;
    let forked = log.tail();
    log.stop().await;
    let log = home.open(Options::default()).await;
    assert_eq!((log.tail(), log.forked_from()), (forked, Some(before)));
    assert_eq!(texts(&mut from_start(&log, &[&t]), 2).await, ["1", "2"], "what there was is there");
}

pub async fn a_position_beyond_the_tail_is_the_tail(home: &impl Home) {
    let log = home.open(Options::default()).await;
    let t = topic("t");
    append(&log, &t, "1").await;
    let mut reader = log.reader();
    reader.follow_from(&t, Offset(1_000)).unwrap();
    assert_eq!(log.clamped(), 1);
    append(&log, &t, "2").await;
    assert_eq!(text(&mut reader).await, "2");
}

pub async fn a_closed_topic_ends(home: &impl Home) {
    let t = topic("t");
    let log = home.open(Options::default()).await;
    let mut live = from_start(&log, &[&t]);
    append(&log, &t, "last").await;
    let end = log.close(&t).await.unwrap();
    assert_eq!(log.close(&t).await.unwrap(), end);
    assert!(matches!(log.append(Append::new(&t, "late")).await, Err(Error::Closed { .. })));
    let expected = Item::End { topic: t.clone(), offset: end, why: Ending::Closed };
    assert_eq!(text(&mut live).await, "last");
    assert_eq!(next(&mut live).await, expected);
    drop(live);
    log.stop().await;
    let log = home.open(Options::default()).await;
    assert!(matches!(log.append(Append::new(&t, "late")).await, Err(Error::Closed { .. })));
    assert!(log.status(&t).await.unwrap().closed);
    let mut late = from_start(&log, &[&t]);
    assert_eq!(text(&mut late).await, "last");
    assert_eq!(next(&mut late).await, expected);
}

pub async fn a_deleted_topic_ends_and_starts_anew(home: &impl Home) {
    let log = home.open(Options::default()).await;
    let t = topic("t");
    assert!(!log.delete(&t).await.unwrap(), "nothing to delete");
    append_many(&log, &t, 0..10).await;
    let mut live = from_start(&log, &[&t]);
    let mut behind = from_start(&log, &[&t]);
    assert_eq!(texts(&mut live, 10).await, numbers(0..10));
    log.close(&t).await.unwrap();
    assert!(matches!(next(&mut live).await, Item::End { why: Ending::Closed, .. }));
    assert!(log.delete(&t).await.unwrap());
    assert!(!log.delete(&t).await.unwrap());
    assert!(matches!(next(&mut live).await, Item::End { why: Ending::Deleted, .. }));
    assert!(matches!(next(&mut behind).await, Item::Gap(gap) if gap.after == Offset::START));
    assert!(matches!(next(&mut behind).await, Item::End { why: Ending::Deleted, .. }));
    append(&log, &t, "anew").await;
    for reader in [&mut live, &mut behind] {
        assert_eq!(text(reader).await, "anew");
        assert_caught_up(reader).await;
    }
    let mut later = from_start(&log, &[&t]);
    assert!(matches!(next(&mut later).await, Item::Gap(_)));
    assert_eq!(text(&mut later).await, "anew");
    assert_eq!(log.status(&t).await.unwrap().records, 1);
}

pub async fn trimming_leaves_a_gap(home: &impl Home) {
    let (t, other) = (topic("t"), topic("other"));
    let log = home.open(Options::default()).await;
    let offsets = append_many(&log, &t, 0..4000).await;
    append(&log, &other, "untouched").await;
    assert_eq!(log.trim(&t, offsets[2999]).await.unwrap(), offsets[2999]);
    assert_eq!(log.trim(&t, offsets[10]).await.unwrap(), offsets[2999], "trimming never goes back");
    let status = log.status(&t).await.unwrap();
    assert_eq!((status.records, status.trimmed_to), (1000, offsets[2999]));
    let mut reader = from_start(&log, &[&t, &other]);
    let Item::Gap(gap) = next(&mut reader).await else { panic!("a gap") };
    assert_eq!((gap.after, gap.through), (Offset::START, offsets[2999]));
    assert_eq!(texts(&mut reader, 1000).await, numbers(3000..4000));
    assert_eq!(text(&mut reader).await, "untouched");

    let exactly_there = Cursor { offset: offsets[2999], ..log.tail() };
    let mut reader = log.reader_at(exactly_there).unwrap();
    reader.follow(&t).unwrap();
    assert_eq!(text(&mut reader).await, "3000", "whoever has read what was trimmed misses nothing");

    log.trim(&t, log.tail().offset).await.unwrap();
    log.stop().await;
    let log = home.open(Options::default()).await;
    let status = log.status(&t).await.unwrap();
    assert_eq!((status.records, status.bytes, status.trimmed_to), (0, 0, offsets[3999]));
    let mut reader = from_start(&log, &[&t]);
    assert!(matches!(next(&mut reader).await, Item::Gap(gap) if gap.through == offsets[3999]));
    append(&log, &t, "4000").await;
    assert_eq!(text(&mut reader).await, "4000");
    assert_eq!(log.status(&t).await.unwrap().records, 1);
}

pub async fn a_live_reader_meets_a_gap(home: &impl Home) {
    let log = home.open(Options::default()).await;
    let t = topic("t");
    let mut reader = from_start(&log, &[&t]);
    assert_caught_up(&mut reader).await;
    let offsets = append_many(&log, &t, 0..10).await;
    log.trim(&t, offsets[4]).await.unwrap();
    assert!(matches!(next(&mut reader).await, Item::Gap(gap) if gap.through == offsets[4]));
    assert_eq!(texts(&mut reader, 5).await, numbers(5..10));
    log.trim(&t, offsets[9]).await.unwrap();
    assert_caught_up(&mut reader).await;
}

pub async fn a_gap_keeps_its_place_between_topics(home: &impl Home) {
    let log = home.open(Options::default()).await;
    let (a, b) = (topic("a"), topic("b"));
    let mut live = from_start(&log, &[&a, &b]);
    assert_caught_up(&mut live).await;
    append(&log, &a, "before").await;
    let lost = append(&log, &b, "lost").await;
    append(&log, &a, "after").await;
    log.trim(&b, lost).await.unwrap();
    // A cursor taken after any item must not skip what the other topic still has to say.
    for mut reader in [live, from_start(&log, &[&a, &b])] {
        assert_eq!(text(&mut reader).await, "before");
        let resumed_at = reader.cursor();
        assert!(matches!(next(&mut reader).await, Item::Gap(gap) if gap.through == lost));
        assert_eq!(text(&mut reader).await, "after");
        let mut resumed = log.reader_at(resumed_at).unwrap();
        resumed.follow(&a).unwrap();
        assert_eq!(text(&mut resumed).await, "after");
    }
}

pub async fn retention_by_age_count_and_size(home: &impl Home) {
    let now = Arc::new(AtomicU64::new(1_000));
    let clock = now.clone();
    let options = Options {
        clock: Clock::new(move || clock.load(SeqCst)),
        classify: |name| Class(u8::try_from(name.find('-').unwrap_or(9)).unwrap_or(9)),
        classes: vec![
            Retention::default(),
            Retention { age: Some(Duration::from_secs(1)), ..Retention::default() },
            Retention { records: Some(5), ..Retention::default() },
            Retention { bytes: Some(12), ..Retention::default() },
        ],
        ..Options::default()
    };
    let log = home.open(options).await;
    let (age, count, size, kept) = (topic("a-age"), topic("bb-count"), topic("ccc-size"), topic("kept"));
    for n in 10..20 {
        for t in [&age, &count, &size, &kept] {
            append(&log, t, &n.to_string()).await;
        }
        now.fetch_add(200, SeqCst);
    }
    let swept = log.sweep().await.unwrap();
    assert_eq!((swept.topics, swept.trimmed), (4, 3));
    let left = [(&age, 15..20), (&count, 15..20), (&size, 14..20), (&kept, 10..20)];
    for (t, expected) in left {
        let mut reader = from_start(&log, &[t]);
        if expected.start > 10 {
            assert!(matches!(next(&mut reader).await, Item::Gap(_)), "{t}");
        }
        assert_eq!(texts(&mut reader, expected.len()).await, numbers(expected), "{t}");
    }
    assert_eq!(log.sweep().await.unwrap().trimmed, 0, "a second sweep finds nothing");
    now.fetch_add(3_600_000, SeqCst);
    log.sweep().await.unwrap();
    assert_eq!(log.status(&age).await.unwrap().records, 0);
    assert_eq!(log.status(&kept).await.unwrap().records, 10);
}

pub async fn the_end_is_never_trimmed(home: &impl Home) {
    let log = home.open(Options::default()).await;
    let t = topic("t");
    let last = append(&log, &t, "1").await;
    let end = log.close(&t).await.unwrap();
    assert_eq!(log.trim(&t, end).await.unwrap(), last);
    let mut reader = from_start(&log, &[&t]);
    assert!(matches!(next(&mut reader).await, Item::Gap(_)));
    assert!(matches!(next(&mut reader).await, Item::End { why: Ending::Closed, .. }));
}

pub async fn transients_reach_live_readers_only(home: &impl Home) {
    let log = home.open(Options::default()).await;
    let t = topic("t");
    log.publish(&t, "nobody listens").unwrap();
    let mut reader = from_start(&log, &[&t]);
    assert_caught_up(&mut reader).await;
    append(&log, &t, "1").await;
    log.publish(&t, "typing").unwrap();
    append(&log, &t, "2").await;
    assert_eq!(text(&mut reader).await, "1");
    let Item::Transient(transient) = next(&mut reader).await else { panic!("a transient between the records") };
    assert_eq!(transient.payload, Bytes::from_static(b"typing"));
    assert_eq!(text(&mut reader).await, "2");
    log.publish(&t, "alone").unwrap();
    assert!(matches!(next(&mut reader).await, Item::Transient(t) if t.payload == "alone"));
    assert_eq!(texts(&mut from_start(&log, &[&t]), 2).await, ["1", "2"], "nothing of it is stored");
}

pub async fn slow_readers_lose_transients_never_records(home: &impl Home) {
    let log = home.open(Options::default()).await;
    let t = topic("t");
    let mut reader = from_start(&log, &[&t]);
    assert_caught_up(&mut reader).await;
    for n in 0..2000 {
        append(&log, &t, &n.to_string()).await;
        log.publish(&t, n.to_string()).unwrap();
    }
    let (mut records, mut transients) = (Vec::new(), Vec::new());
    while records.len() < 2000 || transients.last().is_none_or(|last| last != "1999") {
        match next(&mut reader).await {
            Item::Record(record) => records.push(String::from_utf8_lossy(&record.payload).into_owned()),
            Item::Transient(t) => transients.push(String::from_utf8_lossy(&t.payload).into_owned()),
            other => panic!("{other:?}"),
        }
    }
    assert_eq!(records, numbers(0..2000));
    assert!(transients.len() < 2000, "what is remembered for slow readers is bounded");
    assert_eq!(transients, numbers(2000 - transients.len() as u32..2000), "the newest are kept, in order");
}

pub async fn a_small_window_sends_readers_to_disk(home: &impl Home) {
    let log = home.open(Options { window_bytes_max: 4096, ..Options::default() }).await;
    let topics: Vec<_> = (0..5).map(|n| topic(&format!("t{n}"))).collect();
    let refs: Vec<_> = topics.iter().collect();
    let mut readers: Vec<_> = (0..4).map(|_| from_start(&log, &refs)).collect();
    let mut expected = Vec::new();
    for n in 0..3000_usize {
        let (t, payload) = (&topics[n % 5], format!("{n} {}", "x".repeat(n % 90)));
        append(&log, t, &payload).await;
        expected.push(payload);
        if n % 100 == 0 {
            // One keeps up, one falls behind a little, two are far behind.
            let read = texts(&mut readers[0], if n == 0 { 1 } else { 100 }).await;
            assert_eq!(read, expected[n + 1 - read.len()..=n]);
        }
    }
    for reader in &mut readers[1..] {
        assert_eq!(texts(reader, 3000).await, expected);
    }
}

pub async fn cancelled_reads_lose_nothing(home: &impl Home) {
    let log = home.open(Options { window_bytes_max: 2000, ..Options::default() }).await;
    let t = topic("t");
    let mut reader = from_start(&log, &[&t]);
    let writer = {
        let (log, t) = (log.clone(), t.clone());
        tokio::spawn(async move {
            for n in 0..1000 {
                append(&log, &t, &n.to_string()).await;
            }
        })
    };
    let mut all = Vec::new();
    let mut polls = 0_u32;
    while all.len() < 1000 {
        polls += 1;
        // A budget of polls, not of time: the read is dropped at every await point that it has.
        let budget = tokio::time::timeout(Duration::from_micros(u64::from(polls % 5) * 20), reader.next());
        if let Ok(item) = budget.await
            && let Item::Record(record) = item.unwrap()
        {
            all.push(String::from_utf8_lossy(&record.payload).into_owned());
        }
    }
    writer.await.unwrap();
    assert_eq!(all, numbers(0..1000));
}

pub async fn many_readers_see_the_same(home: &impl Home) {
    let log = home.open(Options::default()).await;
    let t = topic("t");
    let readers: Vec<_> = (0..100)
        .map(|_| {
            let mut reader = from_start(&log, &[&t]);
            tokio::spawn(async move { texts(&mut reader, 500).await })
        })
        .collect();
    for n in 0..500 {
        append(&log, &t, &n.to_string()).await;
    }
    for reader in readers {
        assert_eq!(reader.await.unwrap(), numbers(0..500));
    }
}

pub async fn concurrent_appends_keep_each_senders_order(home: &impl Home) {
    let log = home.open(Options::default()).await;
    let topics: Vec<_> = (0..10).map(|n| topic(&format!("t{n}"))).collect();
    let mut live = from_start(&log, &topics.iter().collect::<Vec<_>>());
    let senders: Vec<_> = (0..64_usize)
        .map(|sender| {
            let (log, t) = (log.clone(), topics[sender % 10].clone());
            tokio::spawn(async move {
                for n in 0..50 {
                    append(&log, &t, &format!("{sender}:{n}")).await;
                }
            })
        })
        .collect();
    let mut next_of = [0; 64];
    let mut last = Offset::START;
    for _ in 0..64 * 50 {
        let Item::Record(record) = next(&mut live).await else { panic!("a record") };
        assert!(record.offset > last);
        last = record.offset;
        let payload = String::from_utf8_lossy(&record.payload).into_owned();
        let (sender, n) = payload.split_once(':').unwrap();
        let expected = &mut next_of[sender.parse::<usize>().unwrap()];
        assert_eq!(n.parse::<u32>().unwrap(), *expected);
        *expected += 1;
    }
    for sender in senders {
        sender.await.unwrap();
    }
    assert_caught_up(&mut live).await;
}

pub async fn time_never_goes_back(home: &impl Home) {
    let now = Arc::new(AtomicU64::new(5_000));
    let clock = now.clone();
    let options = Options { clock: Clock::new(move || clock.load(SeqCst)), ..Options::default() };
    let t = topic("t");
    let log = home.open(options.clone()).await;
    append(&log, &t, "1").await;
    now.store(1_000, SeqCst);
    append(&log, &t, "2").await;
    log.stop().await;
    let log = home.open(options).await;
    append(&log, &t, "3").await;
    now.store(6_000, SeqCst);
    append(&log, &t, "4").await;
    let mut reader = from_start(&log, &[&t]);
    for expected in [5_000, 5_000, 5_000, 6_000] {
        let Item::Record(record) = next(&mut reader).await else { panic!("a record") };
        assert_eq!(record.timestamp_ms, expected);
    }
}

pub async fn limits_are_named(home: &impl Home) {
    use crate::log::{BATCH_RECORDS_MAX, PAYLOAD_BYTES_MAX, READER_TOPICS_MAX, TOPIC_BYTES_MAX};
    let log = home.open(Options::default()).await;
    let t = topic("t");
    assert!(matches!(Topic::new(""), Err(Error::InvalidTopic { bytes: 0 })));
    assert!(matches!(Topic::new(&"x".repeat(TOPIC_BYTES_MAX + 1)), Err(Error::InvalidTopic { .. })));
    append(&log, &topic(&"x".repeat(TOPIC_BYTES_MAX)), "longest name").await;
    let too_large = vec![0; PAYLOAD_BYTES_MAX + 1];
    assert!(matches!(log.publish(&t, too_large.clone()), Err(Error::TooLarge { .. })));
    assert!(matches!(log.append(Append::new(&t, too_large)).await, Err(Error::TooLarge { .. })));
    log.append(Append::new(&t, vec![1; PAYLOAD_BYTES_MAX])).await.unwrap();
    let too_many = vec![Append::new(&t, ""); BATCH_RECORDS_MAX + 1];
    assert!(matches!(log.append_batch(too_many).await, Err(Error::TooLarge { .. })));
    assert!(matches!(log.append_batch(Vec::new()).await, Err(Error::Empty)));
    let mut reader = log.reader();
    for n in 0..READER_TOPICS_MAX {
        reader.follow(&topic(&n.to_string())).unwrap();
    }
    assert!(matches!(reader.follow(&topic("one more")), Err(Error::TooManyTopics)));
    reader.follow(&topic("7")).expect("following twice is following");
}

pub async fn stopping_tells_everybody(home: &impl Home) {
    let log = home.open(Options::default()).await;
    let t = topic("t");
    let mut reader = from_start(&log, &[&t]);
    assert_caught_up(&mut reader).await;
    let waiting = tokio::spawn(async move { reader.next().await });
    log.stop().await;
    assert!(matches!(waiting.await.unwrap(), Err(Error::Stopped)));
    assert!(matches!(log.append(Append::new(&t, "late")).await, Err(Error::Stopped)));
    log.stop().await;
}

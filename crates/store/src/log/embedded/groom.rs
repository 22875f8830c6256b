//! Retention: finding what to trim, topic by topic, without walking records.

use super::{
    super::{
        Class, Error, Options, Retention, Swept, Topic,
        engine::{Engine, TopicRow, TopicState, engine_error},
    },
    Log,
    writer::{Command, Request},
};

/// Topics that one step looks at before it lets others read from the disk.
const PAGE_TOPICS: usize = 256;

/// Records of a topic that are skipped at once when the last of them is to be trimmed.
const STRETCH_RECORDS: usize = 4096;

/// What a step found: for each topic what to trim it to, or only that removed records still take space.
struct Page {
    last_name: Option<Vec<u8>>,
    looked_at: u64,
    trims: Vec<(Topic, u64)>,
    unpurged: Vec<Topic>,
}

impl Log {
    /// Trims every topic to the [`Retention`] of its class, forgets old dedup ids, and goes on removing what an earlier
    /// sweep trimmed. Costs a few seeks a topic, whatever it holds. One sweep at a time is enough; more do no harm.
    ///
    /// # Errors
    /// [`Error::Unavailable`] when the disk refuses; what was trimmed until then stays trimmed.
    pub async fn sweep(&self) -> Result<Swept, Error> {
        let now_ms = self.options.clock.now_ms();
        let mut swept = Swept::default();
        let mut after = Vec::new();
        loop {
            let options = self.options.clone();
            let page = self.on_disk(move |engine| page(engine, &after, &options, now_ms)).await?;
            swept.topics += page.looked_at;
            for (topic, through) in page.trims {
                self.trim(&topic, super::Offset(through)).await?;
                swept.trimmed += 1;
            }
            for topic in page.unpurged {
                let request = Request { command: Command::Purge { topic }, permit: None };
                self.queue.send(request).await.map_err(|_| Error::Stopped)?;
            }
            match page.last_name {
                Some(name) => after = name,
                None => break,
            }
        }
        swept.dedup_ids = self.forget_dedup_ids(now_ms).await?;
        Ok(swept)
    }

    /// Ids are kept for a full window after the log was opened: a producer that was down as long as the log was can
    /// still repeat its last append without doubling it.
    async fn forget_dedup_ids(&self, now_ms: u64) -> Result<u64, Error> {
        if self.opened.elapsed() < self.options.dedup_window {
            return Ok(0);
        }
        let before_ms = now_ms.saturating_sub(self.options.dedup_window.as_millis() as u64);
        let mut total = 0;
        loop {
            let forgotten = self.request(1, 0, |answer| Command::ForgetDedup { before_ms, answer }).await?;
            total += forgotten;
            if forgotten == 0 {
                return Ok(total);
            }
        }
    }
}

fn page(engine: &Engine, after: &[u8], options: &Options, now_ms: u64) -> Result<Page, Error> {
    let mut page = Page { last_name: None, looked_at: 0, trims: Vec::new(), unpurged: Vec::new() };
    let range = (std::ops::Bound::Excluded(after), std::ops::Bound::Unbounded);
    for guard in engine.topics.range::<&[u8], _>(range).take(PAGE_TOPICS) {
        let (name, row) = guard.into_inner().map_err(|e| engine_error(&e))?;
        let row = TopicRow::decode(&row)?;
        page.last_name = Some(name.to_vec());
        page.looked_at += 1;
        let Some(topic) = std::str::from_utf8(&name).ok().and_then(|name| Topic::new(name).ok()) else { continue };
        let retention = retention(options, row.class);
        let state = engine.state(&topic)?;
        match last_to_trim(engine, &topic, &state, &retention, now_ms)? {
            Some(through) => page.trims.push((topic, through)),
            None if row.trimmed().purged_to < row.trimmed().to => page.unpurged.push(topic),
            None => {}
        }
    }
    Ok(page)
}

fn retention(options: &Options, class: Class) -> Retention {
    options.classes.get(usize::from(class.0)).copied().unwrap_or_default()
}

/// The last record that exceeds a limit. Age, count and size all grow along a topic, so what exceeds a limit is a
/// prefix of it: whole stretches are skipped by their last record, and the end is found by halving.
fn last_to_trim(
    engine: &Engine,
    topic: &Topic,
    state: &TopicState,
    retention: &Retention,
    now_ms: u64,
) -> Result<Option<u64>, Error> {
    if *retention == Retention::default() {
        return Ok(None);
    }
    let oldest_ms = retention.age.map_or(0, |age| now_ms.saturating_sub(age.as_millis() as u64));
    let records_to = retention.records.map_or(0, |max| state.records.saturating_sub(max));
    let bytes_to = retention.bytes.map_or(0, |max| state.bytes.saturating_sub(max));
    let exceeds = |offset: &u64| -> Result<bool, Error> {
        let Some(record) = engine.get(*offset)? else { return Ok(true) };
        let beyond = record.timestamp_ms < oldest_ms || record.records <= records_to || record.bytes <= bytes_to;
        Ok(beyond && !record.is_end)
    };
    let (mut after, mut found) = (state.row.trimmed().to, None);
    loop {
        let stretch = engine.offsets(topic.key(), after, state.tail, STRETCH_RECORDS)?;
        let Some(last) = stretch.last() else { return Ok(found) };
        if exceeds(last)? {
            found = Some(*last);
            after = *last;
            continue;
        }
        let (mut low, mut high) = (0, stretch.len() - 1);
        while low < high {
            let middle = low.midpoint(high);
            if exceeds(&stretch[middle])? {
                low = middle + 1;
            } else {
                high = middle;
            }
        }
        return Ok(low.checked_sub(1).map(|index| stretch[index]).or(found));
    }
}

//! Retention: finding what to trim without walking topics or records.
//!
//! A topic is noted under the time of its oldest record, when it gets its first; and under 0, when it exceeds a limit or
//! trimmed records of it have to be purged. A sweep looks at what was noted under 0, and under times that its class keeps
//! nothing from any more, and notes those topics anew. So it costs as much as there is to trim, however many topics
//! there are. Only when the limits are others than in the last sweep, all topics are looked at.

use super::{
    super::{
        Class, Error, Options, Retention, Swept, Topic,
        engine::{Engine, corrupt, engine_error},
        rows::{TopicRow, TopicState},
    },
    Log,
    plan::Looked,
    writer::{Command, Request},
};

/// Topics that one step looks at before it lets others read from the disk.
const PAGE_TOPICS: usize = 256;

/// Records of a topic that are skipped at once when the last of them is to be trimmed.
const STRETCH_RECORDS: usize = 4096;

/// A topic to be looked at.
struct Look {
    topic: Topic,
    class: Class,
    /// The time that it was noted under, if it was.
    noted: Option<u64>,
}

/// What there is to do for it.
#[derive(Default)]
struct Finding {
    trim: Option<u64>,
    is_unpurged: bool,
}

impl Log {
    /// Trims every topic to the [`Retention`] of its class, forgets old dedup ids, goes on removing what an earlier sweep
    /// trimmed, and forgets topics that were empty for as long as their records are kept: who comes back to one of those with
    /// an older cursor gets no gap. Costs a few seeks for each topic with something to trim. One sweep at a time is enough;
    /// more do no harm.
    ///
    /// # Errors
    /// [`Error::Unavailable`] when the disk refuses; what was trimmed until then stays trimmed.
    pub async fn sweep(&self) -> Result<Swept, Error> {
        let now_ms = match self.options.clock.is_settled() {
            true => self.options.clock.now_ms(),
            false => self.counted_ms(self.options.clock.now_ms()),
        };
        let mut swept = Swept::default();
        let limits = encode(&self.options.classes);
        if self.on_disk(Engine::retention).await?.as_ref() == Some(&limits) {
            let options = self.options.clone();
            for class in self.on_disk(move |engine| due_classes(engine, &options, now_ms)).await? {
                self.sweep_due(class, now_ms, &mut swept).await?;
            }
        } else {
            self.sweep_all(now_ms, &mut swept).await?;
            let looks = Vec::new();
            self.request(0, 0, |answer| Command::Looked { looks, walked: Some(limits), answer }).await?;
        }
        swept.dedup_ids = self.forget_dedup_ids(now_ms).await?;
        Ok(swept)
    }

    async fn sweep_due(&self, class: Class, now_ms: u64, swept: &mut Swept) -> Result<(), Error> {
        let before = due_before(&self.options, class, now_ms);
        let mut last: Option<(u64, Topic)> = None;
        loop {
            let after = last.take();
            let due = self.on_disk(move |engine| {
                engine.due(class, after.as_ref().map(|(at, topic)| (*at, topic)), before, PAGE_TOPICS)
            });
            let due = due.await?;
            last = due.last().cloned();
            if due.is_empty() {
                return Ok(());
            }
            let looks = due.into_iter().map(|(at, topic)| Look { topic, class, noted: Some(at) });
            self.look(looks.collect(), now_ms, swept).await?;
        }
    }

    async fn sweep_all(&self, now_ms: u64, swept: &mut Swept) -> Result<(), Error> {
        let mut after = Vec::new();
        loop {
            let page = self.on_disk(move |engine| page(engine, &after)).await?;
            let Some(last) = page.last() else { return Ok(()) };
            after = last.topic.as_str().as_bytes().to_vec();
            self.look(page, now_ms, swept).await?;
        }
    }

    async fn look(&self, looks: Vec<Look>, now_ms: u64, swept: &mut Swept) -> Result<(), Error> {
        swept.topics += looks.len() as u64;
        let options = self.options.clone();
        let found = self.on_disk(move |engine| {
            let found: Result<Vec<_>, Error> = looks
                .into_iter()
                .map(|look| {
                    let finding = find(engine, &look, &options, now_ms)?;
                    Ok((look, finding))
                })
                .collect();
            found
        });
        let found = found.await?;
        for (Look { topic, .. }, finding) in &found {
            if let Some(through) = finding.trim {
                self.trim(topic, super::Offset(through)).await?;
                swept.trimmed += 1;
            } else if finding.is_unpurged {
                let request = Request { command: Command::Purge { topic: topic.clone() }, permit: None };
                self.queue.send(request).await.map_err(|_| Error::Stopped)?;
            }
        }
        let options = self.options.clone();
        let looked = self.on_disk(move |engine| {
            let looked = found.into_iter().map(|(look, finding)| looked(engine, look, &finding, &options));
            looked.collect::<Result<Vec<_>, Error>>()
        });
        let looks = looked.await?;
        swept.forgotten += looks.iter().filter(|look| look.is_over).count() as u64;
        self.request(0, 0, |answer| Command::Looked { looks, walked: None, answer }).await
    }

    /// The time without that in which the log was not open.
    fn counted_ms(&self, now_ms: u64) -> u64 {
        now_ms.min(self.last_ms.saturating_add(self.opened.elapsed().as_millis() as u64))
    }

    /// The time in which the log was not open does not count: a producer that was down as long as the log was can still
    /// repeat its last append without doubling it.
    async fn forget_dedup_ids(&self, now_ms: u64) -> Result<u64, Error> {
        let window = self.options.dedup_window;
        let counted_ms = if self.opened.elapsed() < window { self.counted_ms(now_ms) } else { now_ms };
        let before_ms = counted_ms.saturating_sub(window.as_millis() as u64);
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

/// What a class has noted under earlier times is due.
fn due_before(options: &Options, class: Class, now_ms: u64) -> u64 {
    options.retention(class).oldest_ms(now_ms).max(1)
}

fn due_classes(engine: &Engine, options: &Options, now_ms: u64) -> Result<Vec<Class>, Error> {
    let mut classes = Vec::new();
    for class in (0..=u8::MAX).map(Class) {
        if !engine.due(class, None, due_before(options, class, now_ms), 1)?.is_empty() {
            classes.push(class);
        }
    }
    Ok(classes)
}

/// The next topics behind one, in the order of their names.
fn page(engine: &Engine, after: &[u8]) -> Result<Vec<Look>, Error> {
    let range = (std::ops::Bound::Excluded(after), std::ops::Bound::Unbounded);
    let page = engine.topics.range::<&[u8], _>(range).take(PAGE_TOPICS).map(|guard| {
        let (name, row) = guard.into_inner().map_err(|e| engine_error(&e))?;
        let topic = std::str::from_utf8(&name).ok().and_then(|name| Topic::new(name).ok());
        let topic = topic.ok_or_else(|| corrupt(format!("topic under key {name:02x?}")))?;
        Ok(Look { topic, class: TopicRow::decode(&row)?.class, noted: None })
    });
    page.collect()
}

fn find(engine: &Engine, look: &Look, options: &Options, now_ms: u64) -> Result<Finding, Error> {
    let state = engine.state(&look.topic)?;
    if !state.exists {
        return Ok(Finding::default());
    }
    let trim = last_to_trim(engine, &look.topic, &state, &options.retention(look.class), now_ms)?;
    Ok(Finding { trim, is_unpurged: state.row.is_unpurged() })
}

/// After it was trimmed: when it has to be looked at again.
fn looked(engine: &Engine, look: Look, finding: &Finding, options: &Options) -> Result<Looked, Error> {
    let Look { topic, class, noted } = look;
    let (mut again, mut is_over) = (None, false);
    // What was noted under 0 is noted under its time, too.
    if noted != Some(0)
        && options.retention(class).age.is_some()
        && let Some(row) = engine.row(&topic)?
    {
        match engine.first(topic.key(), row.begins_behind())? {
            Some(first) => again = Some(first.timestamp_ms).filter(|_| !first.is_end),
            // It is kept for a while, for those who come back to it.
            None if noted.is_none() || finding.trim.is_some() || row.is_unpurged() => {
                again = Some(options.clock.now_ms());
            }
            None => is_over = !row.closed,
        }
    }
    Ok(Looked { topic, class, noted, again, is_over })
}

/// Limits, so that others are told from them.
fn encode(classes: &[Retention]) -> Vec<u8> {
    let numbers = classes.iter().flat_map(|class| {
        let age_ms = class.age.map(|age| age.as_millis() as u64);
        [age_ms, class.bytes, class.records]
    });
    numbers.flat_map(|number| number.unwrap_or(u64::MAX).to_be_bytes()).collect()
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
    let oldest_ms = retention.oldest_ms(now_ms);
    let records_to = retention.records.map_or(0, |max| state.records.saturating_sub(max));
    let bytes_to = retention.bytes.map_or(0, |max| state.bytes.saturating_sub(max));
    let exceeds = |offset: &u64| -> Result<bool, Error> {
        let Some(record) = engine.get(*offset)? else { return Ok(true) };
        let bytes_before = record.bytes - record.payload.len() as u64;
        let beyond = record.timestamp_ms < oldest_ms || record.records <= records_to || bytes_before < bytes_to;
        Ok(beyond && !record.is_end)
    };
    let (mut after, mut found) = (state.row.begins_behind(), None);
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

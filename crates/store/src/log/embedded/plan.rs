//! Planning a group: each command against the topics' state, into one batch.

use std::collections::HashMap;

use super::super::{
    Append, Appended, Class, ContentDigest, Ending, Error, Offset, Options, Topic, TopicKey, digest,
    engine::{Engine, engine_error},
    rows::{Life, StoredRecord, Tail, TopicRow, TopicState, Trimmed, UsedId},
    window::{KeyHasher, Visible},
};

/// Dedup ids that one command forgets at most; the sweep asks again.
const FORGET_IDS: usize = 1000;

/// The state of the topics that were used lately. Others are read from disk when next used.
#[derive(Default)]
pub(super) struct States(HashMap<TopicKey, TopicState, KeyHasher>);

/// One batch in the making. Dropping it without [`Group::commit`] must be followed by forgetting the states.
pub(super) struct Group<'a> {
    engine: &'a Engine,
    batch: fjall::OwnedWriteBatch,
    states: &'a mut States,
    tail: Tail,
    options: &'a Options,
    /// Dedup ids of this batch, which the engine does not show yet.
    fresh_ids: HashMap<[u8; 32], UsedId>,
    visible: Vec<Visible>,
    trimmed: Vec<(Topic, u64)>,
    purges: Vec<(Topic, TopicRow)>,
    dirty: bool,
}

/// A topic that a sweep looked at.
pub(super) struct Looked {
    pub(super) topic: Topic,
    pub(super) class: Class,
    /// The time that it was noted under, if it was.
    pub(super) noted: Option<u64>,
    /// The time to note it under.
    pub(super) again: Option<u64>,
    /// It was empty for long enough to forget it.
    pub(super) is_over: bool,
}

/// What a committed batch changed.
pub(super) struct Done {
    pub(super) tail: Tail,
    pub(super) visible: Vec<Visible>,
    pub(super) trimmed: Vec<(Topic, u64)>,
    pub(super) purges: Vec<(Topic, TopicRow)>,
}

impl States {
    fn load(&mut self, engine: &Engine, topic: &Topic) -> Result<&mut TopicState, Error> {
        use std::collections::hash_map::Entry;
        match self.0.entry(topic.key()) {
            Entry::Occupied(entry) => Ok(entry.into_mut()),
            Entry::Vacant(entry) => Ok(entry.insert(engine.state(topic)?)),
        }
    }

    /// Brings the states of these topics into the processor's caches. With a million topics each is a cache miss or two;
    /// asked for in a loop that does nothing else, many are under way at once, where planning would wait for each.
    fn warm<'t>(&self, topics: impl Iterator<Item = &'t Topic>) {
        let tails = topics.map(|topic| self.0.get(&topic.key()).map_or(0, |state| state.tail));
        std::hint::black_box(tails.fold(0, u64::wrapping_add));
    }

    /// Forgets everything when there is too much; what is in use comes back at about ten microseconds a topic.
    pub(super) fn shrink(&mut self, topics_max: usize) {
        if self.0.len() > topics_max {
            self.0 = HashMap::default();
        }
    }

    pub(super) fn purged(&mut self, topic: &Topic, through: u64) {
        if let Some(state) = self.0.get_mut(&topic.key()) {
            state.row.set_purged_to(state.row.trimmed().purged_to.max(through));
        }
    }
}

impl<'a> Group<'a> {
    /// With room for so many appends; more may come.
    pub(super) fn new(
        engine: &'a Engine,
        states: &'a mut States,
        tail: Tail,
        options: &'a Options,
        appends: usize,
    ) -> Self {
        // A clock that goes back must not make history look younger than it is: time stands still instead.
        let tail = Tail { timestamp_ms: tail.timestamp_ms.max(options.clock.now_ms()), ..tail };
        Self {
            engine,
            batch: engine.batch(appends),
            states,
            tail,
            options,
            fresh_ids: HashMap::new(),
            visible: Vec::with_capacity(appends),
            trimmed: Vec::new(),
            purges: Vec::new(),
            dirty: false,
        }
    }

    pub(super) fn append(&mut self, append: &Append) -> Result<Appended, Error> {
        let duplicate_of = self.check(append)?;
        Ok(self.write(append, duplicate_of))
    }

    /// To be called with what is about to be appended.
    pub(super) fn warm<'t>(&self, topics: impl Iterator<Item = &'t Topic>) {
        self.states.warm(topics);
    }

    /// All or none: every check comes before the first write.
    pub(super) fn append_all(&mut self, appends: &[Append]) -> Result<Vec<Appended>, Error> {
        self.warm(appends.iter().map(|append| &append.topic));
        let checked: Vec<_> = appends.iter().map(|append| self.check(append)).collect::<Result<_, _>>()?;
        check_within(appends)?;
        let mut done: Vec<Appended> = Vec::with_capacity(appends.len());
        for (append, duplicate_of) in appends.iter().zip(checked) {
            let first = done.first().copied().filter(|first| append.with_first && first.duplicate);
            done.push(first.unwrap_or_else(|| self.write(append, duplicate_of)));
        }
        Ok(done)
    }

    /// Whether the append may be written; where its dedup id went before, if it did.
    fn check(&mut self, append: &Append) -> Result<Option<u64>, Error> {
        let state = self.states.load(self.engine, &append.topic)?;
        if let Some(id) = &append.dedup {
            let (key, begins_behind) = (dedup_key(&append.topic, id), state.row.begins_behind());
            // What was trimmed or deleted since is not there to be a duplicate of.
            let is_kept = |used: &UsedId| used.offset > begins_behind;
            let known = self.engine.known_id(&key)?.filter(|used| state.exists && is_kept(used));
            if let Some(known) = known.or_else(|| self.fresh_ids.get(&key).copied().filter(is_kept)) {
                return known.check(&append.topic, append.content).map(|known| Some(known.offset));
            }
        }
        if state.row.closed {
            return Err(Error::Closed { topic: append.topic.clone() });
        }
        match append.expected_tail {
            Some(expected) if expected.0 != state.tail => {
                Err(Error::TailMoved { topic: append.topic.clone(), expected, actual: Offset(state.tail) })
            }
            _ => Ok(None),
        }
    }

    fn write(&mut self, append: &Append, duplicate_of: Option<u64>) -> Appended {
        if let Some(id) = &append.dedup {
            let key = dedup_key(&append.topic, id);
            let begins_behind = || self.states.0.get(&append.topic.key()).map_or(0, |state| state.row.begins_behind());
            let fresh = self.fresh_ids.get(&key).map(|used| used.offset).filter(|offset| *offset > begins_behind());
            if let Some(offset) = duplicate_of.or(fresh) {
                return Appended { offset: Offset(offset), duplicate: true };
            }
            self.remember(key, append.content);
        }
        let offset = self.push(&append.topic, None, append.payload.clone());
        Appended { offset: Offset(offset), duplicate: false }
    }

    fn remember(&mut self, key: [u8; 32], content: Option<ContentDigest>) {
        let used = UsedId { offset: self.tail.offset + 1, at_ms: self.tail.timestamp_ms, content };
        let mut age_key = self.tail.timestamp_ms.to_be_bytes().to_vec();
        age_key.extend(key);
        self.batch.insert(&self.engine.dedup, key, used.encode());
        self.batch.insert(&self.engine.dedup_age, age_key, []);
        self.fresh_ids.insert(key, used);
    }

    /// Gives the record its place. `check` loaded the topic's state, so nothing can fail here.
    fn push(&mut self, topic: &Topic, end: Option<Ending>, payload: bytes::Bytes) -> u64 {
        self.tail.offset += 1;
        self.dirty = true;
        let offset = self.tail.offset;
        let state = self.states.0.entry(topic.key()).or_default();
        if !state.exists || state.row.deleted {
            state.exists = true;
            state.row.deleted = false;
            state.row.class = (self.options.classify)(topic.as_str());
            state.row.since = offset - 1;
            self.engine.put_row(&mut self.batch, topic, &state.row);
        }
        let previous_tail = std::mem::replace(&mut state.tail, offset);
        let timestamp_ms = self.tail.timestamp_ms;
        if end.is_none() {
            let limits = self.options.retention(state.row.class);
            let before = state.retained();
            state.records += 1;
            state.bytes += payload.len() as u64;
            if before.0 == 0 && limits.age.is_some() {
                self.engine.put_due(&mut self.batch, state.row.class, timestamp_ms, topic);
            }
            if limits.exceeded_by(state.retained()) && !limits.exceeded_by(before) {
                self.engine.put_due(&mut self.batch, state.row.class, 0, topic);
            }
        }
        let payload = if end == Some(Ending::Deleted) {
            payload
        } else {
            let (records, bytes, is_end) = (state.records, state.bytes, end.is_some());
            let stored = StoredRecord { offset, topic: topic.key(), is_end, timestamp_ms, records, bytes, payload };
            self.engine.put_record(&mut self.batch, &stored)
        };
        self.visible.push(Visible { topic: topic.clone(), offset, previous_tail, timestamp_ms, end, payload });
        offset
    }

    pub(super) fn trim(&mut self, topic: &Topic, through: u64) -> Result<Offset, Error> {
        let state = self.states.load(self.engine, topic)?;
        let trimmed = state.row.trimmed();
        let trimmed_to = trimmed.to;
        if !state.exists || through <= trimmed_to {
            return Ok(Offset(trimmed_to));
        }
        let behind = state.row.begins_behind();
        let mut last = self.engine.last(topic.key(), behind, through)?;
        if let Some(end) = last.as_ref().filter(|record| record.is_end) {
            last = self.engine.last(topic.key(), behind, end.offset - 1)?;
        }
        let Some(last) = last else { return Ok(Offset(trimmed_to)) };
        state.row.set_trimmed(Trimmed { to: last.offset, records: last.records, bytes: last.bytes, ..trimmed });
        let row = state.row.clone();
        self.trimmed_row(topic, row, last.offset);
        Ok(Offset(last.offset))
    }

    fn trimmed_row(&mut self, topic: &Topic, row: TopicRow, visible_to: u64) {
        self.dirty = true;
        self.engine.put_row(&mut self.batch, topic, &row);
        // Should purging it end early, a sweep goes on with it.
        self.engine.put_due(&mut self.batch, row.class, 0, topic);
        self.trimmed.push((topic.clone(), visible_to));
        self.purges.push((topic.clone(), row));
    }

    pub(super) fn close(&mut self, topic: &Topic) -> Result<Offset, Error> {
        let state = self.states.load(self.engine, topic)?;
        if state.row.closed {
            return Ok(Offset(state.tail));
        }
        let offset = self.push(topic, Some(Ending::Closed), bytes::Bytes::new());
        let state = self.states.0.entry(topic.key()).or_default();
        state.row.closed = true;
        self.engine.put_row(&mut self.batch, topic, &state.row);
        Ok(Offset(offset))
    }

    pub(super) fn delete(&mut self, topic: &Topic) -> Result<bool, Error> {
        let state = self.states.load(self.engine, topic)?;
        if !state.exists || state.row.deleted {
            return Ok(false);
        }
        let last = state.tail;
        let offset = self.push(topic, Some(Ending::Deleted), bytes::Bytes::new());
        let state = self.states.0.entry(topic.key()).or_default();
        state.row.closed = false;
        state.row.deleted = true;
        let (records, bytes, before) = (state.records, state.bytes, state.row.trimmed());
        state.row.set_trimmed(Trimmed { to: offset, records, bytes, ..before });
        let row = state.row.clone();
        self.trimmed_row(topic, row, last);
        Ok(true)
    }

    /// Forgets some of the dedup ids from before `before_ms`; answers how many.
    pub(super) fn forget_dedup(&mut self, before_ms: u64) -> Result<u64, Error> {
        let mut forgotten = 0;
        for guard in self.engine.dedup_age.range(..before_ms.to_be_bytes()).take(FORGET_IDS) {
            let age_key = guard.key().map_err(|e| engine_error(&e))?;
            let (at, key) = age_key.split_at(8);
            // Unless the id was used again since, for another record.
            let known = self.engine.dedup.get(key).map_err(|e| engine_error(&e))?;
            let is_old = known.is_some_and(|value| value.len() < 16 || value[8..16] == *at);
            if is_old && !self.fresh_ids.contains_key(key) {
                self.batch.remove(&self.engine.dedup, key);
            }
            self.batch.remove(&self.engine.dedup_age, age_key);
            self.dirty = true;
            forgotten += 1;
        }
        Ok(forgotten)
    }

    /// Notes when topics that a sweep looked at are to be looked at again. What concerns them now stays noted.
    pub(super) fn looked(&mut self, looks: Vec<Looked>) -> Result<(), Error> {
        self.dirty |= !looks.is_empty();
        for Looked { topic, class, noted, again, is_over } in looks {
            let is_due = if noted == Some(0) {
                let state = self.states.load(self.engine, &topic)?;
                state.row.is_unpurged() || self.options.retention(class).exceeded_by(state.retained())
            } else {
                false
            };
            if let Some(at) = noted.filter(|_| !is_due) {
                self.engine.remove_due(&mut self.batch, class, at, &topic);
            }
            if let Some(at) = again {
                self.engine.put_due(&mut self.batch, class, at, &topic);
            }
            if is_over && self.states.load(self.engine, &topic)?.is_spent() {
                self.engine.remove_row(&mut self.batch, &topic);
                self.engine.lists.forget_all(topic.key())?;
                // The engine shows the row until the commit.
                self.states.0.insert(topic.key(), TopicState::default());
            }
        }
        Ok(())
    }

    /// All topics were looked at with these limits.
    pub(super) fn walked(&mut self, limits: &[u8]) {
        self.dirty = true;
        self.engine.put_retention(&mut self.batch, limits);
    }

    /// Makes the batch one that is written, also if nothing else is in it.
    pub(super) fn write_tail(&mut self) {
        self.dirty = true;
    }

    pub(super) fn fork(&mut self, life: Life) {
        self.dirty = true;
        self.engine.put_life(&mut self.batch, life);
    }

    pub(super) fn row(&mut self, topic: &Topic) -> Result<TopicRow, Error> {
        Ok(self.states.load(self.engine, topic)?.row.clone())
    }

    /// One batch, one fsync.
    pub(super) fn commit(mut self) -> Result<Done, fjall::Error> {
        if self.dirty {
            self.tail.stamp = self.engine.next_stamp(self.tail);
            self.engine.put_tail(&mut self.batch, self.tail);
            self.engine.commit(self.batch)?;
        }
        Ok(Done { tail: self.tail, visible: self.visible, trimmed: self.trimmed, purges: self.purges })
    }
}

/// That no id is used twice among these for different things.
fn check_within(appends: &[Append]) -> Result<(), Error> {
    let mut used: HashMap<[u8; 32], UsedId> = HashMap::new();
    for append in appends {
        let Some(id) = &append.dedup else { continue };
        let own = UsedId { offset: 0, at_ms: 0, content: append.content };
        used.entry(dedup_key(&append.topic, id)).or_insert(own).check(&append.topic, append.content)?;
    }
    Ok(())
}

pub(super) fn dedup_key(topic: &Topic, id: &str) -> [u8; 32] {
    let mut key = [0; 32];
    key[..16].copy_from_slice(&topic.key().0);
    key[16..].copy_from_slice(&digest(id.as_bytes()));
    key
}

#[cfg(test)]
mod tests {
    use std::sync::{
        Arc,
        atomic::{AtomicU64, Ordering::SeqCst},
    };

    use super::super::super::Clock;
    use super::*;

    /// A sweep and an append in one group.
    #[test]
    fn an_id_that_is_used_again_is_not_forgotten_with_its_first_use() {
        let dir = tempfile::tempdir().unwrap();
        let now = Arc::new(AtomicU64::new(1_000));
        let clock = Clock::new({
            let now = now.clone();
            move || now.load(SeqCst)
        });
        let options = Options { clock, ..Options::default() };
        let (engine, _) = Engine::open(dir.path(), &options).unwrap();
        let topic = Topic::new("t").unwrap();
        let append = Append::new(&topic, "x").dedup("id");
        let (mut states, mut tail) = (States::default(), engine.tail().unwrap());
        let mut group = |run: &dyn Fn(&mut Group<'_>)| {
            let mut group = Group::new(&engine, &mut states, tail, &options, 1);
            run(&mut group);
            let done = group.commit().unwrap();
            tail = done.tail;
            let records = done.visible.iter().map(|v| (v.topic.key(), v.offset, v.payload.len()));
            drop(engine.recent.note(records));
        };
        group(&|group| assert!(!group.append(&append).unwrap().duplicate));
        group(&|group| assert_eq!(group.trim(&topic, 1).unwrap(), Offset(1)));
        now.store(9_000, SeqCst);
        group(&|group| {
            assert!(!group.append(&append).unwrap().duplicate, "its record is gone");
            assert_eq!(group.forget_dedup(5_000).unwrap(), 1);
        });
        group(&|group| assert!(group.append(&append).unwrap().duplicate));
    }
}

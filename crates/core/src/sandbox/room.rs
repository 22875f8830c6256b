//! How much one sandbox may tell: memory for its artifacts, their number, and what is kept on disk.
//!
//! What an event comes to is known once it is folded, and it is folded when somebody looks. So what was told since then is
//! counted as what it comes to at most; only when that does not fit, it is folded, to know.

use std::sync::Arc;

use super::{Active, Events, Options, Sandboxes, Standing, checkpoint, lock, read::EVENT_BYTES, scene::Size};
use crate::error::{Error, Kind};

const MIB: u64 = 1024 * 1024;

/// Events that are told while nobody looks, and their bytes, before they are folded all the same: it bounds what the next one
/// to look waits for.
const UNFOLDED_MAX: u64 = 4000;
const UNFOLDED_BYTES_MAX: u64 = 16 * MIB;

/// Bytes of the shortest event, with what is between two: so many may be in what is only known by its bytes. As many bytes of
/// short fields come to less.
const EVENT_BYTES_MIN: u64 = 13;

/// What is kept free for signs, so that a sandbox that may tell nothing else can say that its turn ended.
const RESERVE: Size = Size { bytes: MIB, count: 1000 };

/// What one sandbox has told, as far as is known here.
#[derive(Default)]
pub(super) struct Room {
    /// Its artifacts when they were last looked at; nothing before that.
    size: Option<Size>,
    /// What was told since, at most.
    told: Size,
    /// The same since it was last folded because nobody looked.
    unfolded: Size,
    /// Bytes on disk of its events, and of its commands, at most: what was written already or could not be is counted, too, until
    /// they are counted again.
    events_bytes: Option<u64>,
    commands_bytes: Option<u64>,
}

/// What is about to be told.
struct Wanted {
    /// Its bytes on disk.
    body: u64,
    /// What it comes to at most, once it is folded.
    size: Size,
    /// By how much it may exceed the limits.
    reserve: Size,
}

impl Wanted {
    fn new(events: &Events) -> Self {
        let (body, count) = (events.body.len() as u64, events.count);
        let size = Size { bytes: body + events.overhead as u64, count };
        Self { body, size, reserve: if events.is_small_sign() { RESERVE } else { Size::default() } }
    }
}

impl Room {
    /// Whether enough is known to say that there is no room.
    fn is_known(&self) -> bool {
        self.size.is_some() && self.events_bytes.is_some()
    }

    /// Takes room, as far as is known; answers whether it is time to fold what nobody looks at.
    fn take(&mut self, wanted: &Wanted, limits: &Options) -> Result<bool, Error> {
        let (known, disk) = (self.size.unwrap_or_default(), self.events_bytes.unwrap_or_default());
        let size = Size { bytes: known.bytes + self.told.bytes, count: known.count + self.told.count };
        let Wanted { body, size: more, reserve } = wanted;
        let (most_bytes, most_count) = (limits.artifacts_mib_max.saturating_mul(MIB), limits.artifacts_max);
        let is_large = most_bytes > 0 && size.bytes + more.bytes > most_bytes.saturating_add(reserve.bytes);
        let are_many = most_count > 0 && size.count + more.count > most_count.saturating_add(reserve.count);
        if is_large || are_many {
            let why = format!(
                "the session has {} artifacts of {} MiB: the limits are sandbox.artifacts_max ({most_count}) and \
                 sandbox.artifacts_mib_max ({})",
                size.count,
                size.bytes.div_ceil(MIB),
                limits.artifacts_mib_max,
            );
            return Err(Error::new(Kind::Exhausted, "ERR_QUOTA_001", why));
        }
        check_disk("events", disk, *body, reserve.bytes, limits)?;
        self.told.add(*more);
        self.unfolded.add(*more);
        self.events_bytes = Some(disk + body);
        Ok(self.unfolded.count > UNFOLDED_MAX || self.unfolded.bytes > UNFOLDED_BYTES_MAX)
    }

    /// Takes room for a command; answers whether it is known how much there is.
    fn take_command(&mut self, wanted: u64, limits: &Options) -> Result<bool, Error> {
        let Some(bytes) = &mut self.commands_bytes else { return Ok(false) };
        check_disk("commands", *bytes, wanted, 0, limits)?;
        *bytes += wanted;
        Ok(true)
    }
}

fn check_disk(what: &str, bytes: u64, wanted: u64, reserve: u64, limits: &Options) -> Result<(), Error> {
    let most = limits.events_mib_max;
    if most == 0 || bytes + wanted <= most.saturating_mul(MIB).saturating_add(reserve) {
        return Ok(());
    }
    let why = format!("the session's {what} take {} MiB: the limit is sandbox.events_mib_max ({most})", bytes / MIB);
    Err(Error::new(Kind::Exhausted, "ERR_QUOTA_001", why))
}

impl Sandboxes {
    /// Takes account of what is about to be told.
    ///
    /// # Errors
    /// [`Kind::Exhausted`] if it is more than the sandbox may tell, [`Kind::Unavailable`].
    pub(super) async fn make_room(&self, of: &Standing, active: &Arc<Active>, events: &Events) -> Result<(), Error> {
        let (wanted, limits) = (Wanted::new(events), &self.0.options);
        let taken = {
            let mut room = lock(&active.room);
            room.is_known().then(|| room.take(&wanted, limits))
        };
        let taken = match taken {
            Some(taken) => taken,
            None => {
                self.know(of, active).await?;
                lock(&active.room).take(&wanted, limits)
            }
        };
        let is_time = match taken {
            Ok(is_time) => is_time,
            Err(_) => {
                // What was told since it was last folded may come to less, and not all of it may have been written.
                self.look(of, active).await?;
                let events_bytes = self.0.gate.sandbox_events(&of.sandbox.id).await?.bytes;
                lock(&active.room).events_bytes = Some(events_bytes);
                lock(&active.room).take(&wanted, limits)?
            }
        };
        if is_time {
            self.fold_unseen(of, active);
        }
        Ok(())
    }

    /// Sees to it that something is known of what a sandbox told: what that comes to at most, by its checkpoint and by what
    /// was told since.
    async fn know(&self, of: &Standing, active: &Active) -> Result<(), Error> {
        let id = &of.sandbox.id;
        let told = self.0.gate.sandbox_events(id).await?.bytes;
        let mark = checkpoint::mark(&self.0.gate, id).await?;
        let mark = mark.filter(|mark| mark.epoch == self.0.gate.id() && mark.folded_to >= of.since && mark.told > 0);
        let (kept, behind) = match mark {
            Some(mark) => {
                let kept = Size { bytes: mark.bytes.unsigned_abs(), count: mark.artifacts.unsigned_abs() };
                (kept, told.saturating_sub(mark.told.unsigned_abs()))
            }
            None => (Size::default(), told),
        };
        let count = behind / EVENT_BYTES_MIN;
        let size = Size { bytes: kept.bytes + behind + count * EVENT_BYTES as u64, count: kept.count + count };
        let mut room = lock(&active.room);
        room.size.get_or_insert(size);
        room.events_bytes.get_or_insert(told);
        Ok(())
    }

    /// Looks what a sandbox's artifacts come to, with everything that was acknowledged before.
    async fn look(&self, of: &Standing, active: &Active) -> Result<(), Error> {
        let size = self.scene(of).await?.size();
        let mut room = lock(&active.room);
        (room.size, room.told, room.unfolded) = (Some(size), Size::default(), Size::default());
        Ok(())
    }

    /// Folds what nobody looks at, so that somebody can.
    fn fold_unseen(&self, standing: &Standing, active: &Arc<Active>) {
        lock(&active.room).unfolded = Size::default();
        let (sandboxes, standing, active) = (self.clone(), standing.clone(), active.clone());
        self.0.tracker.spawn(async move {
            if let Err(error) = sandboxes.look(&standing, &active).await
                && error.kind != Kind::NotFound
            {
                tracing::warn!(%error, sandbox = standing.sandbox.id, "not folded yet; the next one to look waits for it");
            }
        });
    }

    /// Takes account of a command.
    ///
    /// # Errors
    /// [`Kind::Exhausted`] if it is more than a sandbox may be told, [`Kind::Unavailable`].
    pub(super) async fn make_room_for_command(&self, id: &str, active: &Active, wanted: usize) -> Result<(), Error> {
        let (wanted, limits) = (wanted as u64, &self.0.options);
        if lock(&active.room).take_command(wanted, limits).is_ok_and(|is_taken| is_taken) {
            return Ok(());
        }
        // What is not known yet, or was counted and not written.
        let bytes = self.0.gate.sandbox_commands(id).await?.bytes;
        let mut room = lock(&active.room);
        room.commands_bytes = Some(bytes);
        room.take_command(wanted, limits).map(drop)
    }
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;
    use serde_json::{Value, json};

    use super::{Events, Options, Room, Size, Wanted};
    use crate::sandbox::artifacts::Fold;

    #[test]
    fn what_is_told_comes_to_no_more_than_room_was_taken_for() {
        let wide: serde_json::Map<_, _> = (0..20_000).map(|n| (format!("{n:x}"), json!(1))).collect();
        let mut tool = wide.clone();
        tool.insert("type".to_owned(), json!("tool_start"));
        let deep = json!({"type": "tool_start", "input": wide});
        let long = "i".repeat(10_000);
        let reserved = json!({"type": "plan", "seq": 1, "kind": "k", "status": [], "extra": {"a": 1}});
        let delta = |id: &Value| json!({"type": "tool_output_delta", "id": id, "delta": "x"});
        let all = [
            "user_prompt",
            "text_delta",
            "thinking_delta",
            "text",
            "thinking",
            "tool_start",
            "tool_input_delta",
            "tool_output_delta",
            "tool_end",
            "file_change",
            "plan",
            "usage",
            "status",
            "question",
            "answer",
            "approval_request",
            "approval",
            "error",
            "turn_start",
            "turn_end",
            "summary",
            "heartbeat",
            "x",
        ];
        for told in [
            tool.into(),
            deep,
            json!({"type": "tool_start", "id": long}),
            json!({"type": "turn_start", "turnId": long}),
            json!([reserved, {"type": "text_delta", "seq": 1}, {"type": "approval", "id": 7, "decision": "yes"}]),
            json!([delta(&json!(1)), delta(&json!(1)), delta(&json!(2)), {"type": "x", "delta": "y"}]),
            (0..50).map(|n| delta(&json!(format!("{long}{n}")))).collect(),
            all.iter().map(|kind| json!({"type": kind})).collect(),
            (0..500).map(|n| json!({"type": "x", "n": n})).collect(),
        ] {
            let body = Bytes::from(told.to_string());
            let (events, mut fold) = (Events::parse(body).unwrap(), Fold::default());
            events.apply_to(&mut fold, 1);
            let (taken, comes_to) = (Wanted::new(&events).size.bytes, fold.bytes() as u64);
            assert!(comes_to <= taken, "{comes_to} and not {taken}: {:.200}", told.to_string());
        }
        // What is joined takes what it is kept in.
        let pieces: Value = (0..10_000).map(|_| json!({"type": "text_delta", "delta": "x"})).collect();
        for body in [pieces.to_string(), format!(" {pieces}")] {
            let taken = Wanted::new(&Events::parse(Bytes::from(body)).unwrap()).size.bytes;
            assert!(taken < 15_000, "{taken}");
        }
    }

    #[test]
    fn many_small_fields_are_as_large_as_they_become() {
        let fields: serde_json::Map<_, _> = (0..20_000).map(|n| (n.to_string(), json!(1))).collect();
        let mut event = json!({"type": "tool_start"});
        event.as_object_mut().unwrap().extend(fields);
        let wanted = Wanted::new(&Events::parse(Bytes::from(event.to_string())).unwrap());
        assert!(wanted.body < 1 << 20);
        let mut room = Room { size: Some(Size::default()), events_bytes: Some(0), ..Room::default() };
        let limits = |artifacts_mib_max| Options { artifacts_mib_max, ..Options::default() };
        assert!(room.take(&wanted, &limits(2)).is_err());
        assert!(room.take(&wanted, &limits(4)).is_ok());
    }
}

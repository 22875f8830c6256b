//! What somebody sees who watches a conversation, and what was said before.

use std::{collections::VecDeque, str::FromStr as _};

use serde::{Deserialize, Serialize};
use trunkline_store::log::{Cursor, Item, Offset, Reader};
use uuid::Uuid;

use super::{
    Conversations, Permit,
    record::{self, Delta},
    said::Typing,
    state::{Event, Message, Reason},
};
use crate::{
    error::{Error, Kind},
    topic::is_conversation_deltas,
};

/// Records that are read at once.
const AT_ONCE: usize = 64;

/// Bytes of text in the messages of one page, unless a single message has more.
const PAGE_BYTES_MAX: usize = 4 * 1024 * 1024;

/// What is published, and not kept.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Passing {
    /// Somebody types, or stops.
    Typing(Typing),
    /// A turn came to nothing.
    TurnDone { reason: Reason, at: i64, retry_after_seconds: Option<u64> },
}

/// What somebody sees.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Seen {
    /// What happened, and where that is.
    Event(Cursor, Event),
    /// A piece of what is being said, and where that is.
    Delta(Cursor, Delta),
    /// Somebody types, or stops.
    Typing(Typing),
    /// It was erased.
    Over,
}

/// Somebody who watches.
pub struct Watch {
    reader: Reader,
    items: Vec<Item>,
    resumed: bool,
    begins: Cursor,
}

/// How long ago the end of a turn may have been that a stream begins with when it does not say where its client was. Published
/// clients never say so, and come back within 30 s.
const MISSED_SECONDS: i64 = 60;

impl Conversations {
    /// Watches a conversation: from behind where the watcher was last, if it says so and that is known, or else from now on; then the
    /// end of the last turn comes first, if nothing happened since and that was less than a minute ago. With `deltas`, also what is
    /// being said, from its beginning.
    ///
    /// # Errors
    /// [`Kind::Unavailable`].
    pub async fn watch(&self, permit: &Permit, last: Option<&str>, deltas: bool) -> Result<Watch, Error> {
        let tail = self.gate().conversations_tail();
        let known = last.and_then(|text| Cursor::from_str(text).ok());
        let known = known.filter(|cursor| cursor.epoch == tail.epoch && cursor.offset <= tail.offset);
        let after = match known {
            Some(known) => known.offset,
            None => self.before_recent_end(permit).await?.unwrap_or(tail.offset),
        };
        let pieces_after = match (deltas, known) {
            (false, _) => None,
            (true, Some(known)) => Some(known.offset),
            // What is being said began behind what was said.
            (true, None) => Some(self.gate().conversation_status(permit).await?.tail),
        };
        let reader = self.gate().follow_conversation(permit, after, pieces_after)?;
        // With the pieces that come first, too.
        let begins = Cursor { offset: pieces_after.map_or(after, |pieces| pieces.min(after)), ..tail };
        Ok(Watch { reader, items: Vec::new(), resumed: known.is_some(), begins })
    }

    /// The place of the last thing that happened in a conversation: changes with everything that does.
    ///
    /// # Errors
    /// [`Kind::Unavailable`].
    pub async fn place_of_last(&self, permit: &Permit) -> Result<Cursor, Error> {
        let offset = self.gate().conversation_status(permit).await?.tail;
        Ok(Cursor { offset, ..self.gate().conversations_tail() })
    }

    /// Just before the last thing that happened, if that is the end of a turn a short time ago.
    async fn before_recent_end(&self, permit: &Permit) -> Result<Option<Offset>, Error> {
        let last = self.gate().conversation_status(permit).await?.tail;
        if last == Offset::START {
            return Ok(None);
        }
        let Some(Event::TurnDone { at, .. } | Event::Failed { at }) = self.event_at(permit, last).await? else {
            return Ok(None);
        };
        let is_recent = self.now().div_euclid(1000).saturating_sub(at) <= MISSED_SECONDS;
        Ok(is_recent.then(|| Offset(last.0.saturating_sub(1))))
    }

    /// What was said in a conversation, oldest first.
    ///
    /// # Errors
    /// [`Kind::Unavailable`].
    pub fn history(&self, permit: &Permit) -> Result<History, Error> {
        let until = self.gate().conversations_tail().offset;
        let reader = self.gate().follow_conversation(permit, Offset::START, None)?;
        Ok(History { reader, items: Vec::new(), until, first: Vec::new(), left: usize::MAX })
    }

    /// What was said behind a message, oldest first: so many messages at most.
    ///
    /// # Errors
    /// [`Kind::Invalid`] for a message that is not there, [`Kind::Unavailable`].
    pub async fn history_after(&self, permit: &Permit, after: Uuid, most: usize) -> Result<History, Error> {
        let mut history = self.history(permit)?;
        loop {
            let mut messages = history.next().await?;
            if messages.is_empty() {
                return Err(not_there());
            }
            if let Some(at) = messages.iter().position(|message| message.id == after) {
                history.first = messages.split_off(at + 1);
                history.left = most;
                return Ok(history);
            }
        }
    }

    /// The messages behind one of them, or the last ones before one or at all: so many at most, and fewer if they are long.
    ///
    /// # Errors
    /// [`Kind::Invalid`] for a message that is not there, [`Kind::Unavailable`].
    pub async fn page(&self, permit: &Permit, page: Page) -> Result<Vec<Message>, Error> {
        let (mut history, mut paging) = (self.history(permit)?, Paging::new(page));
        loop {
            let messages = history.next().await?;
            if messages.is_empty() || !messages.into_iter().all(|message| paging.take(message)) {
                return paging.end();
            }
        }
    }
}

/// A page, as the messages of a conversation go by.
struct Paging {
    page: Page,
    kept: VecDeque<Message>,
    bytes: usize,
    /// The message that it is behind went by.
    is_behind: bool,
    /// The message that it is before came, or there was no need to look for it.
    is_over: bool,
}

impl Paging {
    fn new(page: Page) -> Self {
        let (is_behind, is_over) = (page.after.is_none(), page.before.is_none());
        Self { page, kept: VecDeque::new(), bytes: 0, is_behind, is_over }
    }

    /// Looks at the next message; answers whether it wants another one.
    fn take(&mut self, message: Message) -> bool {
        let Page { after, before, limit } = self.page;
        if before == Some(message.id) {
            self.is_over = true;
            return false;
        }
        if !self.is_behind {
            self.is_behind = after == Some(message.id);
            return true;
        }
        self.bytes += message.content.len();
        self.kept.push_back(message);
        while self.kept.len() > limit || self.kept.len() > 1 && self.bytes > PAGE_BYTES_MAX {
            // Who goes forward sees the rest on the next page, who goes back on the one before.
            let gone = if after.is_some() { self.kept.pop_back() } else { self.kept.pop_front() };
            self.bytes -= gone.map_or(0, |gone| gone.content.len());
            if after.is_some() {
                self.is_over = true;
                return false;
            }
        }
        true
    }

    fn end(self) -> Result<Vec<Message>, Error> {
        if self.is_behind && self.is_over { Ok(self.kept.into()) } else { Err(not_there()) }
    }
}

fn not_there() -> Error {
    Error::new(Kind::Invalid, "ERR_INVALID_ARGUMENT", "after, before: no message of this conversation")
}

/// Some of what was said.
#[derive(Clone, Copy, Debug)]
pub struct Page {
    /// What is behind this message.
    pub after: Option<Uuid>,
    /// What is before this message.
    pub before: Option<Uuid>,
    /// So many at most: behind `after` the first ones, otherwise the last.
    pub limit: usize,
}

/// What was said, as it is read.
pub struct History {
    reader: Reader,
    items: Vec<Item>,
    until: Offset,
    /// What was read before it was asked for.
    first: Vec<Message>,
    /// Messages that are still to be told.
    left: usize,
}

impl History {
    /// Some more of it; nothing at the end.
    ///
    /// # Errors
    /// [`Kind::Unavailable`].
    pub async fn next(&mut self) -> Result<Vec<Message>, Error> {
        let mut messages = std::mem::take(&mut self.first);
        while messages.is_empty() && self.left > 0 {
            self.reader.available_batch(AT_ONCE, &mut self.items).await?;
            if self.items.is_empty() {
                break;
            }
            for item in self.items.drain(..) {
                // What comes while it is read is told to those who watch.
                if let Item::Record(record) = item
                    && record.offset <= self.until
                    && let Event::Message(message) = record::event(&record)?
                {
                    messages.push(*message);
                }
            }
        }
        messages.truncate(self.left);
        self.left -= messages.len();
        Ok(messages)
    }
}

impl Watch {
    /// Whether it goes on where the watcher was.
    #[must_use]
    pub fn is_resumed(&self) -> bool {
        self.resumed
    }

    /// The place after which it begins: a watcher that names this misses nothing, whatever it got.
    #[must_use]
    pub fn begins(&self) -> Cursor {
        self.begins
    }

    /// What is next, as much as is there; waits for it. Cancel-safe.
    ///
    /// # Errors
    /// [`Kind::Unavailable`].
    pub async fn next(&mut self) -> Result<Vec<Seen>, Error> {
        let mut seen = Vec::new();
        while seen.is_empty() {
            self.reader.next_batch(AT_ONCE, &mut self.items).await?;
            let epoch = self.reader.cursor().epoch;
            for item in self.items.drain(..) {
                match item {
                    Item::Record(record) => {
                        let cursor = Cursor { epoch, offset: record.offset };
                        if is_conversation_deltas(&record.topic) {
                            seen.push(Seen::Delta(cursor, record::delta(&record)?));
                        } else {
                            seen.push(Seen::Event(cursor, record::event(&record)?));
                        }
                    }
                    Item::Transient(passing) => match serde_json::from_slice(&passing.payload) {
                        Ok(Passing::Typing(typing)) => seen.push(Seen::Typing(typing)),
                        Ok(Passing::TurnDone { reason, at, retry_after_seconds }) => {
                            let event = Event::TurnDone { reason, at, retry_after_seconds };
                            seen.push(Seen::Event(Cursor { epoch, offset: passing.after }, event));
                        }
                        Err(error) => tracing::error!(%error, "what was published cannot be read"),
                    },
                    // Pieces of what was said long ago.
                    Item::Gap(_) => {}
                    Item::End { .. } => seen.push(Seen::Over),
                }
            }
        }
        Ok(seen)
    }
}

#[cfg(test)]
mod tests {
    use uuid::Uuid;

    use super::{Message, PAGE_BYTES_MAX, Page, Paging};
    use crate::conversation::state::Kind;

    fn message(number: u128, bytes: usize) -> Message {
        let (id, content) = (Uuid::from_u128(number), "x".repeat(bytes));
        let (created_at, participant, files) = (String::new(), None, Vec::new());
        Message { id, content, from: Kind::Agent, turn_number: 0, created_at, participant, files }
    }

    /// The page of messages 1, 2, 3 … of these sizes; nothing if a message is not there.
    fn page(sizes: &[usize], after: Option<u128>, before: Option<u128>, limit: usize) -> Option<Vec<u128>> {
        let mut paging =
            Paging::new(Page { after: after.map(Uuid::from_u128), before: before.map(Uuid::from_u128), limit });
        let mut messages = (1..).zip(sizes).map(|(number, bytes)| message(number, *bytes));
        let _ = messages.all(|message| paging.take(message));
        paging.end().ok().map(|page| page.iter().map(|message| message.id.as_u128()).collect())
    }

    #[test]
    fn pages_go_on_where_the_last_one_ended() {
        assert_eq!(page(&[1; 6], None, None, 2), Some(vec![5, 6]));
        assert_eq!(page(&[1; 6], None, Some(5), 2), Some(vec![3, 4]));
        assert_eq!(page(&[1; 6], Some(1), None, 2), Some(vec![2, 3]));
        assert_eq!(page(&[1; 6], Some(1), Some(3), 9), Some(vec![2]));
        assert_eq!(page(&[1; 6], Some(1), Some(5), 2), Some(vec![2, 3]), "it is full before it comes there");
        assert_eq!(page(&[1; 6], Some(6), None, 2), Some(vec![]));
        for (after, before) in [(Some(7), None), (None, Some(7)), (Some(5), Some(3)), (Some(5), Some(7))] {
            assert_eq!(page(&[1; 6], after, before, 2), None, "{after:?} {before:?}");
        }
    }

    #[test]
    fn long_messages_make_pages_shorter_at_their_far_end() {
        let half = PAGE_BYTES_MAX / 2;
        assert_eq!(page(&[1, half, half, 1, half], Some(1), None, 9), Some(vec![2, 3]));
        assert_eq!(page(&[1, half, half, 1, half], Some(1), Some(5), 9), Some(vec![2, 3]));
        assert_eq!(page(&[1, half, half, 1, half], Some(3), None, 9), Some(vec![4, 5]));
        assert_eq!(page(&[1, half, half, 1, half], None, None, 9), Some(vec![4, 5]));
        assert_eq!(page(&[1, 3 * half, 1], Some(1), None, 9), Some(vec![2]), "one goes, however long");
        assert_eq!(page(&[1, 3 * half], None, None, 9), Some(vec![2]));
    }
}

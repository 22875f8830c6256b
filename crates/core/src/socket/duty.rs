//! A runtime while it is there: what clients ask reaches it, and what it says nothing of reaches the next one.

use std::{
    collections::{HashMap, HashSet},
    sync::{Arc, Mutex, MutexGuard, PoisonError, atomic::Ordering::SeqCst},
};

use tokio::sync::Notify;

use super::{Ask, Need, Sockets, sql};
use crate::{caller::Caller, error::Error, gate::UseSocket};

/// Requests that are looked at for a runtime at once, and bytes of those that are handed to it, besides the last one.
const ASKS_AT_ONCE: i64 = 256;
const HAND_BYTES: i64 = 4 * 1024 * 1024;

/// What is known of a runtime.
pub(super) struct Post {
    pub(super) caller: Caller,
    /// Something may be for it.
    pub(super) asked: Notify,
    looked: Mutex<Looked>,
    pub(super) generation: String,
    pub(super) recovered: HashSet<String>,
    /// What it was sent, by client and turn, until it says something of it.
    handed: Mutex<HashMap<(String, String), Vec<i64>>>,
}

/// How far a runtime read what was asked.
#[derive(Clone, Copy, Default)]
struct Looked {
    /// The number of the last request that it read.
    to: i64,
    /// Grows whenever it has to read again from an earlier number: a read that began before that does not move `to`.
    round: u64,
}

/// A runtime while it is there.
pub struct Duty {
    sockets: Sockets,
    post: Arc<Post>,
}

impl Post {
    pub(super) fn new(caller: Caller, generation: String, recovered: HashSet<String>) -> Self {
        let asked = Notify::new();
        asked.notify_one();
        Self { caller, asked, looked: Mutex::default(), generation, recovered, handed: Mutex::default() }
    }

    pub(super) fn serves(&self, client: &str) -> bool {
        UseSocket { client, need: Need::Serve }.fits(&self.caller)
    }
}

impl Duty {
    pub(super) fn new(sockets: Sockets, post: Arc<Post>) -> Self {
        Self { sockets, post }
    }

    /// Whether it is this runtime that serves a client now.
    #[must_use]
    pub fn serves(&self, client: &str) -> bool {
        self.sockets.serving(client).is_some_and(|post| Arc::ptr_eq(&post, &self.post))
    }

    /// What clients asked, for this runtime alone; waits for something. What it says nothing of, the next one gets.
    ///
    /// # Errors
    /// [`crate::Kind::Unavailable`].
    pub async fn next(&self) -> Result<Vec<Ask>, Error> {
        loop {
            let Looked { to: after, round } = *self.post.looked();
            let found = self.sockets.0.gate.glance(move |tx| sql::waiting(tx, after, ASKS_AT_ONCE)).await?;
            if found.is_empty() {
                self.post.asked.notified().await;
                continue;
            }
            let (own, last) = self.own(found);
            self.post.looked_through(last, round);
            if own.is_empty() {
                continue;
            }
            // Noted before it is so: whoever goes in between gives back what it may have.
            self.post.handed().insert(Default::default(), own.clone());
            let claimed = self.sockets.0.gate.housekeep(move |tx| sql::claim(tx, own.clone())).await?;
            {
                let mut handed = self.post.handed();
                for ask in &claimed {
                    handed.entry((ask.client.clone(), ask.turn.clone())).or_default().push(ask.number);
                }
                handed.remove(&Default::default());
            }
            if !claimed.is_empty() {
                return Ok(claimed);
            }
        }
    }

    /// Those of them that are for this runtime, as many as it is handed at once, and the last one that was looked at.
    fn own(&self, found: Vec<sql::Waiting>) -> (Vec<i64>, i64) {
        let (mut serving, mut own, mut bytes, mut last) = (HashMap::new(), Vec::new(), 0, 0);
        for waiting in found {
            let is_own = *serving.entry(waiting.client).or_insert_with_key(|client| self.serves(client));
            if is_own && bytes >= HAND_BYTES {
                break;
            }
            last = waiting.number;
            if is_own {
                bytes += waiting.bytes;
                own.push(waiting.number);
            }
        }
        (own, last)
    }

    /// The runtime said something of a client's turn: it has what was asked of that.
    pub fn heard_of(&self, client: &str, turn: &str) {
        let numbers = {
            let mut handed = self.post.handed();
            if handed.is_empty() {
                return;
            }
            handed.remove(&(client.to_owned(), turn.to_owned())).unwrap_or_default()
        };
        self.settle(numbers);
    }

    /// The runtime said that it has something that was asked.
    pub fn has(&self, number: i64) {
        if self.forget(number) {
            self.settle(vec![number]);
        }
    }

    /// Answers whether it was sent that.
    fn forget(&self, number: i64) -> bool {
        let mut found = false;
        self.post.handed().retain(|_, numbers| {
            let count = numbers.len();
            numbers.retain(|own| *own != number);
            found |= numbers.len() < count;
            !numbers.is_empty()
        });
        found
    }

    fn settle(&self, numbers: Vec<i64>) {
        if numbers.is_empty() {
            return;
        }
        let sockets = self.sockets.clone();
        self.sockets.0.tracker.spawn(async move {
            if let Err(error) = sockets.0.gate.housekeep(move |tx| sql::took(tx, numbers.clone())).await {
                tracing::warn!(%error, "after a restart a runtime is asked again what it has");
            }
        });
    }
}

impl Post {
    fn looked(&self) -> MutexGuard<'_, Looked> {
        self.looked.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Everything up to `number` was read, unless it has to be read again since `round`.
    fn looked_through(&self, number: i64, round: u64) {
        let mut looked = self.looked();
        if looked.round == round {
            looked.to = number;
        }
    }

    /// Reads again from this request on, which may be this runtime's now.
    fn look_from(&self, number: i64) {
        {
            let mut looked = self.looked();
            *looked = Looked { to: looked.to.min(number - 1), round: looked.round + 1 };
        }
        self.asked.notify_one();
    }

    fn handed(&self) -> MutexGuard<'_, HashMap<(String, String), Vec<i64>>> {
        self.handed.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Sockets {
    /// Has those who serve clients now read what waits for them, after somebody went. One pass over what waits, however many
    /// go at once, and nobody reads what is not its own.
    async fn hand_over(&self) -> Result<(), Error> {
        if self.0.hands_over.swap(true, SeqCst) {
            // One that has not read yet sees the same.
            return Ok(());
        }
        let _pass = self.0.hand_over.lock().await;
        self.0.hands_over.store(false, SeqCst);
        for (client, first) in self.0.gate.glance(sql::first_waiting).await? {
            if let Some(post) = self.serving(&client) {
                post.look_from(first);
            }
        }
        Ok(())
    }
}

impl Drop for Duty {
    fn drop(&mut self) {
        self.sockets.posts().retain(|post| !Arc::ptr_eq(post, &self.post));
        self.sockets.0.changes.fetch_add(1, SeqCst);
        let back: Vec<i64> = self.post.handed().drain().flat_map(|(_, numbers)| numbers).collect();
        // Without its runtime the process is about to end, and the next one finds them.
        if tokio::runtime::Handle::try_current().is_err() {
            return;
        }
        let sockets = self.sockets.clone();
        self.sockets.0.tracker.spawn(async move {
            if !back.is_empty()
                && let Err(error) = sockets.0.gate.housekeep(move |tx| sql::release(tx, Some(back.clone()))).await
            {
                tracing::error!(%error, "what a runtime was asked waits for the next start of the server");
            }
            // What was for this one may be for another one now.
            if let Err(error) = sockets.hand_over().await {
                tracing::warn!(%error, "what waits is looked for from the beginning");
                sockets.posts().iter().for_each(|post| post.look_from(1));
            }
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{caller::Credential, identity::Identity};

    /// Somebody goes while another one reads what waits: what is released meanwhile is read again.
    #[test]
    fn a_read_that_began_before_a_hand_over_hides_nothing_of_it() {
        let caller = Caller::new(Identity::agent("w", "i", "s").unwrap(), "x".to_owned(), Credential::none(true));
        let post = Post::new(caller, "g".to_owned(), HashSet::new());
        let Looked { to, round } = *post.looked();
        assert_eq!(to, 0);
        post.look_from(3);
        post.looked_through(7, round);
        assert_eq!(post.looked().to, 0, "3 was not there when it was read");
        let Looked { round, .. } = *post.looked();
        post.looked_through(7, round);
        assert_eq!(post.looked().to, 7);
        post.look_from(5);
        assert_eq!(post.looked().to, 4);
    }
}

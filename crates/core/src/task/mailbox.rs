//! What a session is to be told of tasks, and what came of telling it.

use std::{
    collections::{HashMap, VecDeque},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering::SeqCst},
    },
};

use tokio::sync::Notify;
use uuid::Uuid;

use super::{Hibernation, Task, TaskEvent, Wait};
use crate::token::Secret;

/// What waits for a session at most; the rest stays in the ledger until there is room.
const MAIL_MAX: usize = 64;

/// What a session is to be told.
pub(super) struct Mailbox {
    pub(super) inside: Mutex<Inside>,
    /// Raised when there is something.
    arrived: Notify,
    /// Counts the times when the ledger had something that is not in here.
    wanted: AtomicU64,
}

#[derive(Default)]
pub(super) struct Inside {
    mail: VecDeque<Mail>,
    /// Tasks that the session was handed.
    given: HashMap<Uuid, Given>,
    /// Counts those.
    handouts: u64,
    /// What of the identity's waits for a message.
    pub(super) inputs: HashMap<Uuid, Wait>,
}

/// A task that a session was handed: by which handout, and whether its transport took it.
#[derive(Clone, Copy)]
pub(super) struct Given {
    handout: u64,
    pub(super) is_taken: bool,
}

/// Something for a session.
pub enum Mail {
    /// A task.
    Handout(Box<Handout>),
    /// What became of a task that it has, or had.
    Event(Box<TaskEvent>),
    /// What became of a task that it had when it left. [`Desk`](super::Desk) makes an event of it.
    Lost(Box<TaskEvent>),
    /// It need not stay for this task.
    Hibernated(Uuid, Box<Hibernation>),
}

/// A task for its worker.
pub struct Handout {
    /// The task.
    pub task: Task,
    /// Its payload.
    pub payload: Vec<u8>,
    /// With which the agent that is to be started comes in.
    pub token: Option<Secret>,
    /// To be kept until the transport took it.
    pub receipt: Receipt,
}

/// That a task is on its way to its worker. Dropped before the transport took it, it is handed out again.
pub struct Receipt {
    mailbox: Arc<Mailbox>,
    task: Uuid,
    handout: u64,
    is_taken: bool,
}

impl Receipt {
    /// The transport takes it now. Answers whether the task is still the session's; if not, it must not be told.
    #[must_use]
    pub fn take(mut self) -> bool {
        self.is_taken = true;
        match lock(&self.mailbox.inside).given.get_mut(&self.task) {
            Some(given) if given.handout == self.handout => {
                given.is_taken = true;
                true
            }
            _ => false,
        }
    }
}

impl Drop for Receipt {
    fn drop(&mut self) {
        if self.is_taken {
            return;
        }
        let mut inside = lock(&self.mailbox.inside);
        if inside.given.get(&self.task).is_some_and(|given| given.handout == self.handout) {
            inside.given.remove(&self.task);
            drop(inside);
            self.mailbox.want();
        }
    }
}

impl Mailbox {
    /// For a session that goes on where `before` was: what the transport of that one took is not handed out again.
    pub(super) fn new(before: Option<&Self>) -> Arc<Self> {
        let given = before.map(|before| lock(&before.inside).given.clone()).unwrap_or_default();
        let taken = given.into_iter().filter(|(_, given)| given.is_taken);
        // Handouts of this one count from 1.
        let given = taken.map(|(task, given)| (task, Given { handout: 0, ..given })).collect();
        let inside = Mutex::new(Inside { given, ..Inside::default() });
        Arc::new(Self { inside, arrived: Notify::new(), wanted: AtomicU64::new(0) })
    }

    /// The ledger has something for the session.
    pub(super) fn want(&self) {
        self.wanted.fetch_add(1, SeqCst);
        self.arrived.notify_one();
    }

    /// How often the ledger had something.
    pub(super) fn wanted(&self) -> u64 {
        self.wanted.load(SeqCst)
    }

    /// Waits until something may have come. Cancel-safe.
    pub(super) async fn arrived(&self) {
        self.arrived.notified().await;
    }

    /// What came first.
    pub(super) fn next(&self) -> Option<Mail> {
        lock(&self.inside).mail.pop_front()
    }

    /// Whether the session was handed a task.
    pub(super) fn has(&self, task: Uuid) -> bool {
        lock(&self.inside).given.contains_key(&task)
    }

    /// Whether tasks have to stay in the ledger for now.
    pub(super) fn is_full(&self) -> bool {
        lock(&self.inside).mail.len() >= MAIL_MAX
    }

    /// The session is over; answers what it was handed.
    pub(super) fn close(&self) -> HashMap<Uuid, Given> {
        std::mem::take(&mut lock(&self.inside).given)
    }

    /// Throws away what was not told.
    pub(super) fn clear(&self) {
        let mail = std::mem::take(&mut lock(&self.inside).mail);
        // Outside of the lock, which the receipts among it take. They hold their mailbox, too.
        drop(mail);
    }

    /// Puts a task, if there is room and it is not there yet.
    pub(super) fn hand(self: &Arc<Self>, task: Task, payload: Vec<u8>, token: Option<Secret>) {
        let mut inside = lock(&self.inside);
        if inside.given.contains_key(&task.id) {
            return;
        }
        if inside.mail.len() >= MAIL_MAX {
            drop(inside);
            return self.want();
        }
        inside.handouts += 1;
        let handout = inside.handouts;
        inside.given.insert(task.id, Given { handout, is_taken: false });
        let receipt = Receipt { mailbox: self.clone(), task: task.id, handout, is_taken: false };
        inside.mail.push_back(Mail::Handout(Box::new(Handout { task, payload, token, receipt })));
        drop(inside);
        self.arrived.notify_one();
    }

    /// The task is not the session's any more.
    pub(super) fn take_back(&self, task: Uuid) {
        let mut inside = lock(&self.inside);
        if inside.given.remove(&task).is_none_or(|given| given.is_taken) {
            return;
        }
        let is_it = |mail: &Mail| matches!(mail, Mail::Handout(handout) if handout.task.id == task);
        let gone = inside.mail.iter().position(is_it).and_then(|at| inside.mail.remove(at));
        // Its receipt takes the lock.
        drop(inside);
        drop(gone);
    }

    /// Puts news; those that find no room are gone, because the task itself tells the same.
    pub(super) fn tell(&self, mail: Mail) {
        let mut inside = lock(&self.inside);
        if inside.mail.len() < 2 * MAIL_MAX {
            inside.mail.push_back(mail);
        }
        drop(inside);
        self.arrived.notify_one();
    }
}

/// A panic while holding the lock cannot leave half a change: each section is a few moves.
pub(super) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

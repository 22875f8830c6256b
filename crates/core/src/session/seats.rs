//! How many connections the principals of a workspace have.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use crate::{
    error::{Error, Kind},
    limits::CONNECTIONS_RETRY,
};

/// The seats of every workspace. Clones share them.
#[derive(Clone, Default)]
pub(super) struct Seats {
    taken: Arc<Mutex<HashMap<String, u32>>>,
    /// A workspace's seats; 0 is no limit.
    most: u32,
}

/// One seat; free again when dropped.
pub(super) struct Seat {
    seats: Seats,
    workspace: String,
}

impl Seats {
    pub(super) fn new(most: u32) -> Self {
        Self { taken: Arc::default(), most }
    }

    /// Takes a seat; `again` for somebody whose own, older seat is about to be free.
    pub(super) fn take(&self, workspace: &str, again: bool) -> Result<Seat, Error> {
        let mut taken = lock(&self.taken);
        let count = taken.get(workspace).copied().unwrap_or(0);
        if self.most > 0 && count >= self.most && !again {
            let most = self.most;
            let message =
                format!("quota exceeded for connections in workspace '{workspace}': current {count}, limit {most}");
            let refused = Error::new(Kind::Exhausted, "ERR_QUOTA_001", message);
            return Err(Error { retry_after: Some(CONNECTIONS_RETRY), ..refused });
        }
        *taken.entry(workspace.to_owned()).or_default() += 1;
        Ok(Seat { seats: self.clone(), workspace: workspace.to_owned() })
    }
}

impl Drop for Seat {
    fn drop(&mut self) {
        let mut taken = lock(&self.seats.taken);
        if let Some(count) = taken.get_mut(&self.workspace) {
            *count -= 1;
            if *count == 0 {
                taken.remove(&self.workspace);
            }
        }
    }
}

/// A panic while holding the lock cannot leave half a change: each section is one change of the map.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::{Kind, Seats};

    #[test]
    fn a_seat_is_free_when_it_is_left() {
        let seats = Seats::new(2);
        let (one, _two) = (seats.take("w", false).unwrap(), seats.take("w", false).unwrap());
        let refused = seats.take("w", false).err().unwrap();
        assert_eq!((refused.kind, refused.retry_after.is_some()), (Kind::Exhausted, true));
        assert_eq!(refused.message, "quota exceeded for connections in workspace 'w': current 2, limit 2");
        seats.take("other", false).unwrap();
        let again = seats.take("w", true).unwrap();
        drop((one, again));
        seats.take("w", false).unwrap();
        assert_eq!(seats.taken.lock().unwrap().len(), 1, "who left is forgotten");
        let unlimited = Seats::new(0);
        let _all: Vec<_> = (0..100).map(|_| unlimited.take("w", false).unwrap()).collect();
    }
}

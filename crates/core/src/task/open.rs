//! How many tasks of each workspace have not ended: what a workspace can make others keep is bounded.

use std::collections::HashMap;

use super::{Mode, Task};
use crate::error::{Error, Kind};

/// Open tasks by workspace. Starts of agents are not among them: there is one for each agent.
#[derive(Default)]
pub(super) struct OpenTasks(HashMap<String, u64>);

impl OpenTasks {
    /// As the ledger says.
    pub(super) fn load(&mut self, counts: impl IntoIterator<Item = (String, u64)>) {
        self.0.clear();
        counts.into_iter().for_each(|(workspace, count)| *self.0.entry(workspace).or_default() += count);
    }

    /// Whether another one may be made.
    ///
    /// # Errors
    /// `ERR_QUOTA_001`.
    pub(super) fn check(&self, workspace: &str, most: u64) -> Result<(), Error> {
        let open = self.0.get(workspace).copied().unwrap_or(0);
        if most == 0 || open < most {
            return Ok(());
        }
        let message =
            format!("quota exceeded for tasks in workspace '{workspace}': {open} have not ended, limit {most}");
        Err(Error::new(Kind::Exhausted, "ERR_QUOTA_001", message))
    }

    /// Notes what became of a task; `before` is nothing for a new one.
    pub(super) fn note(&mut self, before: Option<&Task>, after: &Task) {
        if after.mode == Mode::Startup {
            return;
        }
        let (was_open, is_open) = (before.is_some_and(|task| !task.state.is_terminal()), !after.state.is_terminal());
        if was_open == is_open {
            return;
        }
        match self.0.get_mut(&after.workspace) {
            Some(count) if is_open => *count += 1,
            Some(count) if *count > 1 => *count -= 1,
            Some(_) => drop(self.0.remove(&after.workspace)),
            None if is_open => drop(self.0.insert(after.workspace.clone(), 1)),
            None => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::task::state::State;

    #[test]
    fn what_has_ended_makes_room() {
        let mut open = OpenTasks::default();
        let task = |state| Task { workspace: "w".into(), state, ..Task::blank(0, Mode::Pool) };
        let (new, ended) = (task(State::Pending), task(State::DeadLetter));
        open.load([("w".to_owned(), 1), ("w".to_owned(), 1)]);
        assert!(open.check("w", 2).is_err() && open.check("w", 0).is_ok() && open.check("v", 1).is_ok());
        open.note(Some(&new), &ended);
        assert!(open.check("w", 2).is_ok());
        // Tried again.
        open.note(Some(&ended), &new);
        assert!(open.check("w", 2).is_err());
        open.note(Some(&new), &task(State::Running));
        open.note(Some(&ended), &task(State::Cancelled));
        assert!(open.check("w", 3).is_ok() && open.check("w", 2).is_err(), "neither changes anything");
        open.note(None, &Task { mode: Mode::Startup, ..new.clone() });
        assert!(open.check("w", 3).is_ok(), "starts do not count");
        for _ in 0..3 {
            open.note(Some(&new), &ended);
        }
        assert!(open.check("w", 1).is_ok() && open.0.is_empty());
    }
}

//! Who is there to work, how much each has, and who gets the next task: plain data, decided without waiting for anything.
//!
//! A queue is where pending tasks wait (`pool::{implementation}::{workspace}`, `to::{identity}`, `start::{profile}`). A worker
//! takes from queues by name, or, as services do, from those of all workspaces. Of the workers with room, the one that has
//! least gets the next task, and among those the one that has waited longest.
//!
//! No task is forgotten: who leaves a task pending notes the queue and then looks for room; who gets room looks for noted
//! queues. Both under one lock, so that one of them sees the other.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};

use uuid::Uuid;

/// The workers of this node.
#[derive(Debug)]
pub(super) struct Workers {
    room: usize,
    workers: HashMap<String, Worker>,
    /// Of each queue, the workers that have room: by how much they have, and since when they wait.
    free: HashMap<String, BTreeSet<(usize, u64, String)>>,
    /// Queues in which something may wait, each with a number that changes when something is added.
    waiting: BTreeMap<String, u64>,
    next: u64,
}

#[derive(Debug)]
struct Worker {
    session: String,
    /// Names of queues; those that end in `::` are prefixes.
    takes: Vec<String>,
    has: HashSet<Uuid>,
    /// Places that are kept for tasks on their way to it.
    reserved: usize,
    /// When it was last given something.
    last: u64,
    /// The last queue that it was given something from, so that the next one has its turn.
    last_queue: String,
}

impl Worker {
    fn load(&self) -> usize {
        self.has.len() + self.reserved
    }
}

/// A place that is kept for a task from a queue.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Place {
    /// Whose.
    pub(super) identity: String,
    /// Where the task comes from.
    pub(super) queue: String,
    /// As the queue was when it was looked at.
    seen: u64,
}

impl Workers {
    /// Nobody yet; each has room for so many tasks that were not meant for it alone.
    pub(super) fn new(room: usize) -> Self {
        Self { room, workers: HashMap::new(), free: HashMap::new(), waiting: BTreeMap::new(), next: 0 }
    }

    /// Somebody is there. It has what a session of its had before on this node, and `has`.
    pub(super) fn enter(&mut self, identity: &str, session: &str, takes: Vec<String>) {
        let before = self.remove(identity);
        let mut worker = before.unwrap_or(Worker {
            session: String::new(),
            takes: Vec::new(),
            has: HashSet::new(),
            reserved: 0,
            last: self.tick(),
            last_queue: String::new(),
        });
        session.clone_into(&mut worker.session);
        worker.takes = takes;
        self.insert(identity, worker);
    }

    /// A session ended; answers what its identity had, unless somebody else has that identity now.
    pub(super) fn leave(&mut self, identity: &str, session: &str) -> Option<HashSet<Uuid>> {
        if self.workers.get(identity)?.session != session {
            return None;
        }
        Some(self.remove(identity)?.has)
    }

    /// Whether somebody is there.
    pub(super) fn is_there(&self, identity: &str) -> bool {
        self.workers.contains_key(identity)
    }

    /// What a worker takes from.
    pub(super) fn takes(&self, identity: &str) -> &[String] {
        self.workers.get(identity).map_or(&[], |worker| &worker.takes)
    }

    /// Notes what somebody has, if it is there.
    pub(super) fn hold(&mut self, identity: &str, task: Uuid) {
        self.change(identity, |worker, _| worker.has.insert(task));
    }

    /// As [`Workers::hold`], for all of these.
    pub(super) fn hold_all(&mut self, identity: &str, tasks: impl Iterator<Item = Uuid>) {
        self.change(identity, |worker, _| worker.has.extend(tasks));
    }

    /// Notes what somebody does not have any more; answers whether that may leave room.
    pub(super) fn release(&mut self, identity: &str, task: Uuid) -> bool {
        self.change(identity, |worker, _| worker.has.remove(&task)).unwrap_or(false)
    }

    /// Something was added to a queue.
    pub(super) fn note(&mut self, queue: &str) {
        let tick = self.tick();
        match self.waiting.get_mut(queue) {
            Some(number) => *number = tick,
            None => drop(self.waiting.insert(queue.to_owned(), tick)),
        }
    }

    /// Whether something may wait in a queue.
    pub(super) fn is_waiting(&self, queue: &str) -> bool {
        self.waiting.contains_key(queue)
    }

    /// The queues in which something may wait.
    pub(super) fn all_waiting(&self) -> Vec<String> {
        self.waiting.keys().cloned().collect()
    }

    /// Keeps a place for a task of this queue with the worker that should get it.
    pub(super) fn reserve(&mut self, queue: &str) -> Option<Place> {
        if let Some(identity) = queue.strip_prefix(OWN) {
            self.workers.get(identity).filter(|worker| worker.load() < self.room)?;
            return Some(self.reserve_with(identity.to_owned(), queue));
        }
        let wide = wide(queue);
        // Those of the workspace come before those of all workspaces.
        let found = [Some(queue), wide].into_iter().flatten().find_map(|name| self.free.get(name)?.first());
        let identity = found?.2.clone();
        Some(self.reserve_with(identity, queue))
    }

    /// Keeps a place with this worker, if it has room and something may wait for it in a queue that is not among `except`.
    pub(super) fn reserve_for(&mut self, identity: &str, except: &[String]) -> Option<Place> {
        let worker = self.workers.get(identity)?;
        if worker.load() >= self.room {
            return None;
        }
        let mut found: Vec<&String> = Vec::new();
        for name in &worker.takes {
            if name.ends_with("::") {
                let all = self.waiting.range::<String, _>(name..).map(|(queue, _)| queue);
                let all = all.take_while(|queue| queue.starts_with(name.as_str()));
                // In turn: the first behind the one that it was last given something from, or the first of all.
                let mut all = all.filter(|queue| !except.contains(queue));
                let first = all.clone().next();
                found.extend(all.find(|queue| **queue > worker.last_queue).or(first));
            } else if let Some((queue, _)) = self.waiting.get_key_value(name)
                && !except.contains(queue)
            {
                found.push(queue);
            }
        }
        let queue = (*found.first()?).clone();
        Some(self.reserve_with(identity.to_owned(), &queue))
    }

    fn reserve_with(&mut self, identity: String, queue: &str) -> Place {
        self.change(&identity, |worker, tick| {
            worker.reserved += 1;
            worker.last = tick;
            queue.clone_into(&mut worker.last_queue);
        });
        let seen = self.waiting.get(queue).copied().unwrap_or(0);
        Place { identity, queue: queue.to_owned(), seen }
    }

    /// The place was for this task.
    pub(super) fn fill(&mut self, place: &Place, task: Uuid) {
        self.change(&place.identity, |worker, _| {
            worker.reserved = worker.reserved.saturating_sub(1);
            worker.has.insert(task);
        });
    }

    /// The place was for nothing. Answers whether something was added to its queue meanwhile: whoever added it may have found
    /// no room because of this place, so that the queue has to be looked at again.
    pub(super) fn give_up(&mut self, place: &Place) -> bool {
        self.change(&place.identity, |worker, _| worker.reserved = worker.reserved.saturating_sub(1));
        self.waiting.get(&place.queue).is_some_and(|number| *number != place.seen)
    }

    /// The queue held nothing for whoever the place was kept with. If nothing was added since and it is so for all, it is not
    /// looked at again.
    pub(super) fn found_empty(&mut self, place: &Place) {
        if self.waiting.get(&place.queue) == Some(&place.seen) {
            self.waiting.remove(&place.queue);
        }
    }

    /// Workers that have much more than another one that takes from the same queues and has room, and how many tasks they would
    /// have less if both had the same.
    pub(super) fn overloaded(&self) -> Vec<(String, usize)> {
        let mut all = Vec::new();
        for (identity, worker) in &self.workers {
            // As [`Workers::reserve`] finds the next one.
            let next = |name: &str| self.free.get(name)?.first().map(|(load, ..)| *load);
            let least = shared(&worker.takes).filter_map(|name| next(name).or_else(|| next(wide(name)?))).min();
            if let Some(least) = least
                && worker.load() > least + 1
            {
                all.push((identity.clone(), (worker.load() - least) / 2));
            }
        }
        all
    }

    fn tick(&mut self) -> u64 {
        self.next += 1;
        self.next
    }

    fn change<T>(&mut self, identity: &str, change: impl FnOnce(&mut Worker, u64) -> T) -> Option<T> {
        let mut worker = self.remove(identity)?;
        let answer = change(&mut worker, self.next + 1);
        self.next += 1;
        self.insert(identity, worker);
        Some(answer)
    }

    fn remove(&mut self, identity: &str) -> Option<Worker> {
        let worker = self.workers.remove(identity)?;
        let place = (worker.load(), worker.last, identity.to_owned());
        for name in shared(&worker.takes) {
            if let Some(free) = self.free.get_mut(name) {
                free.remove(&place);
                if free.is_empty() {
                    self.free.remove(name);
                }
            }
        }
        Some(worker)
    }

    fn insert(&mut self, identity: &str, worker: Worker) {
        if worker.load() < self.room {
            let place = (worker.load(), worker.last, identity.to_owned());
            for name in shared(&worker.takes) {
                self.free.entry(name.clone()).or_default().insert(place.clone());
            }
        }
        self.workers.insert(identity.to_owned(), worker);
    }
}

/// How the names of queues begin that one worker alone takes from; behind it comes the worker's.
const OWN: &str = "to::";

/// The queues that several may take from.
fn shared(takes: &[String]) -> impl Iterator<Item = &String> {
    takes.iter().filter(|name| !name.starts_with(OWN))
}

/// What those who take from all workspaces call a queue: `pool::{implementation}::`.
fn wide(queue: &str) -> Option<&str> {
    let rest = queue.strip_prefix("pool::")?;
    let end = rest.rfind("::")? + "pool::".len() + "::".len();
    queue.get(..end)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use uuid::Uuid;

    use super::{Workers, wide};

    const QUEUE: &str = "pool::miner::ws";

    fn id(n: u128) -> Uuid {
        Uuid::from_u128(n)
    }

    fn crew(room: usize, names: &[&str]) -> Workers {
        let mut workers = Workers::new(room);
        names.iter().for_each(|name| workers.enter(name, "s", vec![QUEUE.to_owned()]));
        workers
    }

    #[test]
    fn the_least_loaded_gets_the_next_and_nobody_more_than_it_has_room_for() {
        let mut workers = crew(3, &["a", "b"]);
        workers.hold("a", id(1));
        let mut given = Vec::new();
        while let Some(place) = workers.reserve(QUEUE) {
            workers.fill(&place, id(10 + given.len() as u128));
            given.push(place.identity);
        }
        assert_eq!(given.iter().filter(|name| *name == "a").count(), 2);
        assert_eq!(given.iter().filter(|name| *name == "b").count(), 3);
        assert_eq!(given[0], "b", "it had nothing");
        assert!(workers.release("a", id(1)) && !workers.release("a", id(1)));
        assert_eq!(workers.reserve(QUEUE).unwrap().identity, "a");
    }

    #[test]
    fn those_of_the_workspace_come_before_those_of_all() {
        let mut workers = Workers::new(1);
        workers.enter("service", "s", vec!["pool::miner::".into()]);
        workers.enter("agent", "s", vec![QUEUE.into()]);
        workers.enter("carpenter", "s", vec!["pool::miner2::".into()]);
        let order: Vec<_> = std::iter::from_fn(|| workers.reserve(QUEUE)).map(|place| place.identity).collect();
        assert_eq!(order, ["agent", "service"]);
    }

    #[test]
    fn a_service_takes_from_workspaces_in_turn() {
        let mut workers = Workers::new(100);
        workers.enter("service", "s", vec!["pool::miner::".into()]);
        ["pool::miner::a", "pool::miner::b", "pool::miner::c", "pool::other::a"].iter().for_each(|q| workers.note(q));
        let order: Vec<_> = (0..5).map(|_| workers.reserve_for("service", &[]).unwrap().queue).collect();
        assert_eq!(order, ["a", "b", "c", "a", "b"].map(|w| format!("pool::miner::{w}")));
    }

    #[test]
    fn a_queue_is_looked_at_until_it_was_found_empty() {
        let mut workers = crew(2, &["a"]);
        assert_eq!(workers.reserve_for("a", &[]), None);
        workers.note(QUEUE);
        let place = workers.reserve_for("a", &[]).unwrap();
        workers.note(QUEUE);
        workers.found_empty(&place);
        workers.give_up(&place);
        let place = workers.reserve_for("a", &[]).expect("something was added meanwhile");
        workers.found_empty(&place);
        workers.give_up(&place);
        assert_eq!(workers.reserve_for("a", &[]), None);
    }

    #[test]
    fn who_left_late_leaves_the_successor_alone() {
        let mut workers = crew(2, &["a"]);
        workers.hold("a", id(1));
        workers.enter("a", "later", vec![QUEUE.into()]);
        assert_eq!(workers.leave("a", "s"), None);
        assert_eq!(workers.leave("a", "later").unwrap().len(), 1, "what the session before it had");
        assert!(workers.free.is_empty() && !workers.is_there("a"));
    }

    #[test]
    fn the_wide_name_of_a_queue() {
        assert_eq!(wide("pool::miner::ws"), Some("pool::miner::"));
        assert_eq!(wide("pool::a:b::w:s"), Some("pool::a:b::"));
        assert_eq!(wide("to::ag::w::i::s"), None);
    }

    proptest! {
        /// Whatever happens, the sets of free workers are what the workers say.
        #[test]
        fn free_workers_are_those_with_room(steps in prop::collection::vec((0..7_u8, 0..4_usize, 0..6_u128), 0..200)) {
            let names = ["a", "b", "c", "d"];
            let (mut workers, mut places) = (Workers::new(3), Vec::new());
            for (step, who, task) in steps {
                match step {
                    0 => workers.enter(names[who], "s", vec![QUEUE.into(), format!("to::{who}")]),
                    1 => drop(workers.leave(names[who], "s")),
                    2 => places.extend(workers.reserve(QUEUE)),
                    3 => if let Some(place) = places.pop() { workers.fill(&place, id(task)) },
                    4 => if let Some(place) = places.pop() { workers.give_up(&place); },
                    5 => drop(workers.release(names[who], id(task))),
                    _ => workers.hold(names[who], id(task)),
                }
                for name in names {
                    let is_free = workers.free.get(QUEUE).is_some_and(|free| free.iter().any(|(.., n)| n == name));
                    let has_room = workers.workers.get(name).is_some_and(|worker| worker.load() < 3);
                    prop_assert_eq!(is_free, has_room);
                }
            }
        }
    }
}

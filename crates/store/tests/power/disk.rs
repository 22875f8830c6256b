//! A disk that may lose what was not synced.
//!
//! Data of a file is certain after a sync of that file; before it, each page that was written is there or not, the last one
//! possibly in part. An entry of a directory is certain after a sync of the directory, or of the file itself, as with the file
//! systems of Linux; before it, changes of one directory are there up to some point. A rename between two directories
//! happens in both or in neither.

use std::{
    cell::Cell,
    collections::{BTreeMap, HashSet},
    fs,
    path::{Path, PathBuf},
};

use super::trace::{At, Call};

const PAGE: usize = 4096;

/// Repeatable randomness.
pub(crate) struct Dice {
    pub(crate) seed: u64,
    state: Cell<u64>,
}

impl Dice {
    pub(crate) fn new(seed: u64) -> Self {
        Self { seed, state: Cell::new(seed | 1) }
    }

    pub(crate) fn below(&self, end: usize) -> usize {
        // SplitMix64.
        let state = self.state.get().wrapping_add(0x9e37_79b9_7f4a_7c15);
        self.state.set(state);
        let mut z = (state ^ (state >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        usize::try_from((z ^ (z >> 31)) % end.max(1) as u64).unwrap()
    }

    fn percent(&self, percent: usize) -> bool {
        self.below(100) < percent
    }
}

type Inode = usize;

#[derive(Clone, Default)]
struct Content {
    bytes: Vec<u8>,
    /// Beyond the bytes there are zeros.
    length: u64,
}

impl Content {
    fn write(&mut self, at: u64, bytes: &[u8]) {
        let (start, end) = (usize::try_from(at).unwrap(), usize::try_from(at).unwrap() + bytes.len());
        if self.bytes.len() < end {
            self.bytes.resize(end, 0);
        }
        self.bytes[start..end].copy_from_slice(bytes);
        self.length = self.length.max(end as u64);
    }

    fn resize(&mut self, length: u64) {
        self.bytes.truncate(usize::try_from(length).unwrap());
        self.length = length;
    }
}

#[derive(Clone)]
enum Change {
    Write { at: u64, bytes: Vec<u8> },
    Resize { length: u64 },
}

#[derive(Clone)]
struct Pending<T> {
    change: T,
    /// Its place among all calls.
    number: usize,
}

#[derive(Default)]
struct File {
    /// As the system shows it.
    length: u64,
    certain: Content,
    pending: Vec<Pending<Change>>,
}

/// A change of names: what an entry becomes, in each directory that is concerned.
#[derive(Clone)]
struct Entries(Vec<(Inode, String, Option<Inode>)>);

/// Directories and files; files are those that have content.
pub(crate) struct Disk {
    root: PathBuf,
    files: BTreeMap<Inode, File>,
    /// As the system shows them.
    shown: BTreeMap<Inode, BTreeMap<String, Inode>>,
    certain: BTreeMap<Inode, BTreeMap<String, Inode>>,
    pending: Vec<Pending<Entries>>,
    next: Inode,
    calls: usize,
}

/// Above the directory that is watched: certain from the beginning.
const ROOT: Inode = 0;

impl Disk {
    /// What is at `dir`, or nothing; all of it certain.
    pub(crate) fn load(dir: &Path) -> Self {
        let root = dir.parent().unwrap().to_owned();
        let empty = || BTreeMap::from([(ROOT, BTreeMap::new())]);
        let mut disk = Self {
            root,
            files: BTreeMap::new(),
            shown: empty(),
            certain: empty(),
            pending: Vec::new(),
            next: 1,
            calls: 0,
        };
        if dir.exists() {
            disk.load_dir(dir);
            disk.certain.clone_from(&disk.shown);
            disk.pending.clear();
            disk.calls = 0;
        }
        disk
    }

    fn load_dir(&mut self, dir: &Path) {
        self.apply(&Call::MakeDir { path: dir.to_owned() });
        for entry in fs::read_dir(dir).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                self.load_dir(&path);
            } else {
                self.apply(&Call::Open { path: path.clone(), truncates: false });
                let inode = self.find(&path).unwrap();
                let (mut bytes, length) = (fs::read(&path).unwrap(), fs::metadata(&path).unwrap().len());
                bytes.truncate(bytes.iter().rposition(|byte| *byte != 0).map_or(0, |last| last + 1));
                *self.files.get_mut(&inode).unwrap() =
                    File { length, certain: Content { bytes, length }, pending: Vec::new() };
            }
        }
    }

    /// The directory of a path and its name there.
    fn parent(&self, path: &Path) -> (Inode, String) {
        let parent = self.find(path.parent().unwrap()).unwrap_or_else(|| panic!("no directory of {}", path.display()));
        (parent, path.file_name().unwrap().to_str().unwrap().to_owned())
    }

    fn find(&self, path: &Path) -> Option<Inode> {
        let names = path.strip_prefix(&self.root).unwrap_or_else(|_| panic!("{} is elsewhere", path.display()));
        names.iter().try_fold(ROOT, |at, name| self.shown.get(&at)?.get(name.to_str().unwrap()).copied())
    }

    fn change(&mut self, entries: Vec<(Inode, String, Option<Inode>)>) {
        for (dir, name, inode) in &entries {
            let shown = self.shown.get_mut(dir).unwrap();
            match inode {
                Some(inode) => shown.insert(name.clone(), *inode),
                None => shown.remove(name),
            };
        }
        if entries.iter().all(|(dir, ..)| *dir == ROOT) {
            // What is above is not recorded; that the directory itself is there is not asked here.
            apply(&mut self.certain, &Entries(entries));
            return;
        }
        self.pending.push(Pending { change: Entries(entries), number: self.calls });
    }

    fn new_inode(&mut self) -> Inode {
        self.next += 1;
        self.next - 1
    }

    /// Plays one call.
    pub(crate) fn apply(&mut self, call: &Call) {
        self.calls += 1;
        match call {
            Call::Open { path, truncates } => {
                let inode = self.find(path).unwrap_or_else(|| {
                    let (dir, name) = self.parent(path);
                    let inode = self.new_inode();
                    self.files.insert(inode, File::default());
                    self.change(vec![(dir, name, Some(inode))]);
                    inode
                });
                if *truncates && self.files[&inode].length > 0 {
                    self.resize(inode, 0);
                }
            }
            Call::Write { path, at, bytes } => {
                // Of a file that was removed, nothing can be seen.
                let Some(inode) = self.find(path) else { return };
                let number = self.calls;
                let file = self.files.get_mut(&inode).unwrap();
                let at = match at {
                    At::Offset(at) => *at,
                    At::End => file.length,
                };
                file.length = file.length.max(at + bytes.len() as u64);
                file.pending.push(Pending { change: Change::Write { at, bytes: bytes.clone() }, number });
            }
            Call::Resize { path, length } => {
                if let Some(inode) = self.find(path) {
                    self.resize(inode, *length);
                }
            }
            Call::Sync { path, began } => self.sync(path, *began),
            Call::Rename { from, to } => {
                let inode = self.find(from).unwrap();
                let ((old, old_name), (new, new_name)) = (self.parent(from), self.parent(to));
                self.change(vec![(old, old_name, None), (new, new_name, Some(inode))]);
            }
            Call::MakeDir { path } => {
                let (dir, name) = self.parent(path);
                let inode = self.new_inode();
                self.shown.insert(inode, BTreeMap::new());
                self.certain.insert(inode, BTreeMap::new());
                self.change(vec![(dir, name, Some(inode))]);
            }
            Call::Remove { path } => {
                let (dir, name) = self.parent(path);
                self.change(vec![(dir, name, None)]);
            }
        }
    }

    fn resize(&mut self, inode: Inode, length: u64) {
        let number = self.calls;
        let file = self.files.get_mut(&inode).unwrap();
        file.length = length;
        file.pending.push(Pending { change: Change::Resize { length }, number });
    }

    /// What was done before the sync began is certain when it has ended.
    fn sync(&mut self, path: &Path, began: usize) {
        let Some(inode) = self.find(path) else { return };
        let dirs = if let Some(file) = self.files.get_mut(&inode) {
            let (done, later) = std::mem::take(&mut file.pending).into_iter().partition(|p| p.number <= began);
            file.pending = later;
            let done: Vec<Pending<Change>> = done;
            for Pending { change, .. } in done {
                match change {
                    Change::Write { at, bytes } => file.certain.write(at, &bytes),
                    Change::Resize { length } => file.certain.resize(length),
                }
            }
            // Its own entry goes with it, and what came before that in the same directory.
            let named = |p: &&Pending<Entries>| p.change.0.iter().any(|(.., of)| *of == Some(inode));
            let Some(last) = self.pending.iter().filter(named).map(|p| p.number).max() else { return };
            self.settle(self.parent(path).0, last.min(began));
            return;
        } else {
            inode
        };
        self.settle(dirs, began);
    }

    /// Changes of a directory up to a call become certain, with those of other directories that they hang on.
    fn settle(&mut self, dir: Inode, upto: usize) {
        let mut wanted = BTreeMap::from([(dir, upto)]);
        let mut kept = HashSet::new();
        for pending in self.pending.iter().rev() {
            let entries = &pending.change.0;
            if entries.iter().any(|(dir, ..)| wanted.get(dir).is_some_and(|upto| pending.number <= *upto)) {
                kept.insert(pending.number);
                for (dir, ..) in entries {
                    let upto = wanted.entry(*dir).or_default();
                    *upto = pending.number.max(*upto);
                }
            }
        }
        let (done, later) = std::mem::take(&mut self.pending).into_iter().partition(|p| kept.contains(&p.number));
        self.pending = later;
        let done: Vec<Pending<Entries>> = done;
        done.iter().for_each(|pending| apply(&mut self.certain, &pending.change));
    }

    /// The directory as it may be after the power went now.
    pub(crate) fn after_power_loss(&self, dice: &Dice) -> tempfile::TempDir {
        let mut dirs = self.certain.clone();
        // From nothing that was not synced to all of it.
        let (names, data) = ([0, 50, 90, 100][dice.below(4)], [0, 50, 95, 100][dice.below(4)]);
        let mut stopped = HashSet::new();
        for pending in &self.pending {
            let entries = &pending.change.0;
            let is_lost = entries.iter().any(|(dir, ..)| stopped.contains(dir)) || !dice.percent(names);
            if is_lost {
                stopped.extend(entries.iter().map(|(dir, ..)| *dir));
            } else {
                apply(&mut dirs, &pending.change);
            }
        }
        let to = super::scratch();
        fs::create_dir_all(to.path().join("data")).unwrap();
        self.write_dir(ROOT, &dirs, to.path(), data, dice);
        to
    }

    fn write_dir(
        &self,
        dir: Inode,
        dirs: &BTreeMap<Inode, BTreeMap<String, Inode>>,
        to: &Path,
        data: usize,
        dice: &Dice,
    ) {
        for (name, inode) in &dirs[&dir] {
            let path = to.join(name);
            if let Some(file) = self.files.get(inode) {
                let content = file.after_power_loss(data, dice);
                fs::write(&path, &content.bytes).unwrap();
                fs::OpenOptions::new().write(true).open(&path).unwrap().set_len(content.length).unwrap();
            } else {
                fs::create_dir_all(&path).unwrap();
                self.write_dir(*inode, dirs, &path, data, dice);
            }
        }
    }
}

fn apply(dirs: &mut BTreeMap<Inode, BTreeMap<String, Inode>>, change: &Entries) {
    for (dir, name, inode) in &change.0 {
        let dir = dirs.entry(*dir).or_default();
        match inode {
            Some(inode) => dir.insert(name.clone(), *inode),
            None => dir.remove(name),
        };
    }
}

impl File {
    fn after_power_loss(&self, percent: usize, dice: &Dice) -> Content {
        let mut content = self.certain.clone();
        for Pending { change, .. } in &self.pending {
            match change {
                Change::Resize { length } if dice.percent(percent) => content.resize(*length),
                Change::Resize { .. } => {}
                Change::Write { at, bytes } => {
                    let mut start = 0;
                    while start < bytes.len() {
                        // Up to the end of a page of the file.
                        let page = PAGE - (usize::try_from(*at).unwrap() + start) % PAGE;
                        let end = bytes.len().min(start + page);
                        if dice.percent(percent) {
                            content.write(at + start as u64, &bytes[start..end]);
                        } else if dice.percent(20) {
                            let torn = start + dice.below(end - start);
                            content.write(at + start as u64, &bytes[start..torn]);
                        }
                        start = end;
                    }
                }
            }
        }
        content
    }
}

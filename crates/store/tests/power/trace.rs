//! What `strace` recorded, as far as it concerns one directory and what the child said.

use std::{
    collections::HashMap,
    path::{Path, PathBuf},
};

/// All calls that change files, and those that tell which file a descriptor is of.
pub(crate) const CALLS: &str = "trace=openat,close,lseek,write,pwrite64,writev,pwritev,fsync,fdatasync,sync_file_range,ftruncate,\
    truncate,fallocate,rename,renameat,renameat2,unlink,unlinkat,mkdir,mkdirat,rmdir,link,linkat,symlink,symlinkat,\
    copy_file_range,dup,dup2,dup3";

/// One call on the directory, in the order in which calls ended; writes where they began, since a power loss can meet them
/// under way.
#[derive(Debug)]
pub(crate) enum Call {
    /// A file was opened and is there now; emptied if `truncates`.
    Open {
        path: PathBuf,
        truncates: bool,
    },
    Write {
        path: PathBuf,
        at: At,
        bytes: Vec<u8>,
    },
    Resize {
        path: PathBuf,
        length: u64,
    },
    /// A sync that began when so many calls had been applied.
    Sync {
        path: PathBuf,
        began: usize,
    },
    Rename {
        from: PathBuf,
        to: PathBuf,
    },
    MakeDir {
        path: PathBuf,
    },
    Remove {
        path: PathBuf,
    },
}

#[derive(Debug)]
pub(crate) enum At {
    Offset(u64),
    End,
}

#[derive(Debug)]
pub(crate) enum Event {
    Call(Call),
    /// A line that the child printed.
    Said(String),
}

pub(crate) struct Trace {
    pub(crate) events: Vec<Event>,
}

#[derive(Default)]
struct Descriptor {
    position: u64,
    appends: bool,
}

impl Trace {
    /// Understands a recording of a child on `dir`; panics on a call that it does not know what to make of.
    pub(crate) fn read(text: &str, dir: &Path) -> Self {
        let mut reading = Reading { dir: dir.to_owned(), ..Reading::default() };
        let mut unfinished: HashMap<&str, (String, usize)> = HashMap::new();
        for line in text.lines() {
            let Some((pid, rest)) = line.split_once(' ') else { continue };
            let rest = rest.trim_start();
            if rest.starts_with("+++") || rest.starts_with("---") {
                continue;
            }
            if let Some(begun) = rest.strip_suffix("<unfinished ...>") {
                reading.begin(begun);
                unfinished.insert(pid, (begun.to_owned(), reading.calls));
                continue;
            }
            let (whole, began) = if let Some(resumed) = rest.strip_prefix("<... ") {
                let (begun, began) = unfinished.remove(pid).expect("a call that began");
                let (_, tail) = resumed.split_once("resumed>").unwrap();
                (begun + tail, began)
            } else {
                reading.begin(rest);
                (rest.to_owned(), reading.calls)
            };
            reading.end(&whole, began);
        }
        Self { events: reading.events }
    }
}

#[derive(Default)]
struct Reading {
    dir: PathBuf,
    events: Vec<Event>,
    /// Calls so far, without what was said.
    calls: usize,
    open: HashMap<String, Descriptor>,
}

impl Reading {
    fn push(&mut self, call: Call) {
        self.calls += 1;
        self.events.push(Event::Call(call));
    }

    fn is_ours(&self, path: &Path) -> bool {
        path.starts_with(&self.dir)
    }

    /// What takes effect when a call begins.
    fn begin(&mut self, text: &str) {
        let Some((name, args)) = text.split_once('(') else { return };
        match name {
            "close" => drop(self.open.remove(&number(args))),
            "write" | "pwrite64" => self.write(name, args),
            "writev" | "pwritev" | "copy_file_range" | "sync_file_range" | "dup" | "dup2" | "dup3" => {
                let ours = self.dir.to_string_lossy().into_owned();
                assert!(!plain(args).contains(&ours), "not understood: {}", plain(text));
            }
            _ => {}
        }
    }

    fn write(&mut self, name: &str, args: &str) {
        let (fd, path) = descriptor(args);
        let strings = strings(args);
        let bytes = strings.into_iter().next().unwrap_or_default();
        if fd == "1" {
            for line in String::from_utf8_lossy(&bytes).lines() {
                self.events.push(Event::Said(line.to_owned()));
            }
            return;
        }
        if !self.is_ours(&path) {
            return;
        }
        let at = if name == "pwrite64" {
            let offset = args.rsplit(", ").next().unwrap();
            At::Offset(number(offset).parse().unwrap())
        } else {
            let descriptor = self.open.entry(fd).or_default();
            if descriptor.appends {
                At::End
            } else {
                let at = descriptor.position;
                descriptor.position += bytes.len() as u64;
                At::Offset(at)
            }
        };
        self.push(Call::Write { path, at, bytes });
    }

    /// What takes effect when a call ends.
    fn end(&mut self, text: &str, began: usize) {
        let Some((name, args)) = text.split_once('(') else { return };
        let (args, answer) = args.rsplit_once(" = ").expect("an answer");
        if answer.starts_with('-') || answer.starts_with('?') {
            return;
        }
        let path = |index: usize| PathBuf::from(String::from_utf8(strings(args)[index].clone()).unwrap());
        match name {
            "openat" => {
                let (flags, path) = (plain(args), path(0));
                let (fd, _) = descriptor(answer);
                self.open.insert(fd, Descriptor { position: 0, appends: flags.contains("O_APPEND") });
                if self.is_ours(&path) && !flags.contains("O_DIRECTORY") && flags.contains("O_CREAT") {
                    self.push(Call::Open { path, truncates: flags.contains("O_TRUNC") });
                }
            }
            "lseek" => {
                let (fd, _) = descriptor(args);
                self.open.entry(fd).or_default().position = number(answer).parse().unwrap();
            }
            "fsync" | "fdatasync" => {
                let (_, path) = descriptor(args);
                if self.is_ours(&path) {
                    self.push(Call::Sync { path, began });
                }
            }
            "ftruncate" | "fallocate" => {
                let (_, path) = descriptor(args);
                if self.is_ours(&path) {
                    let numbers: Vec<u64> = args.split(", ").skip(1).filter_map(|n| number(n).parse().ok()).collect();
                    let length = if name == "ftruncate" { numbers[0] } else { numbers.iter().rev().take(2).sum() };
                    self.push(Call::Resize { path, length });
                }
            }
            "rename" | "renameat" | "renameat2" => {
                let (from, to) = (path(0), path(1));
                if self.is_ours(&from) || self.is_ours(&to) {
                    self.push(Call::Rename { from, to });
                }
            }
            "mkdir" | "mkdirat" if self.is_ours(&path(0)) => self.push(Call::MakeDir { path: path(0) }),
            "unlink" | "rmdir" if self.is_ours(&path(0)) => self.push(Call::Remove { path: path(0) }),
            "unlinkat" => {
                let (_, at) = descriptor(args);
                let path = at.join(path(0));
                if self.is_ours(&path) {
                    self.push(Call::Remove { path });
                }
            }
            "truncate" | "link" | "linkat" | "symlink" | "symlinkat" => {
                assert!(!self.is_ours(&path(0)), "not understood: {}", plain(text));
            }
            _ => {}
        }
    }
}

/// The digits that a text begins with.
fn number(text: &str) -> String {
    text.trim_start().chars().take_while(char::is_ascii_digit).collect()
}

/// A descriptor and the path that it is of: `11</data/0.jnl>`.
fn descriptor(text: &str) -> (String, PathBuf) {
    let text = text.trim_start();
    let (fd, rest) = text.split_once('<').unwrap_or((text, ""));
    let path = rest.split_once('>').map_or("", |(path, _)| path);
    let path = String::from_utf8(unescape(path)).unwrap();
    (number(fd), PathBuf::from(path.trim_end_matches(" (deleted)")))
}

/// The quoted strings of a call.
fn strings(text: &str) -> Vec<Vec<u8>> {
    text.split('"').skip(1).step_by(2).map(unescape).collect()
}

fn plain(text: &str) -> String {
    String::from_utf8_lossy(&unescape(text)).into_owned()
}

fn unescape(text: &str) -> Vec<u8> {
    let (bytes, mut at, mut out) = (text.as_bytes(), 0, Vec::with_capacity(text.len() / 4));
    let digit = |byte: u8| (byte as char).to_digit(16).unwrap() as u8;
    while at < bytes.len() {
        if bytes[at..].starts_with(b"\\x") && at + 3 < bytes.len() {
            out.push(digit(bytes[at + 2]) << 4 | digit(bytes[at + 3]));
            at += 4;
        } else {
            out.push(bytes[at]);
            at += 1;
        }
    }
    out
}

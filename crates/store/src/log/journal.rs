//! Checking the engine's journals before it opens them.
//!
//! The engine cuts a journal at the first batch that it cannot read, wherever that is. That is right for a batch that was
//! not acknowledged, which a crash can tear; anywhere else it would silently drop batches that were. So the journals are
//! read here first: what a crash tore is cut off and reported, any other damage is refused and left as it is.
//!
//! Format (the engine's 3): a batch is a start (tag 1, number of items u32, sequence number u64), its items (tag 2: type
//! u8, compression u8, keyspace u64, lengths of key u16, value u32 and stored value u32, key, stored value; or tag 4:
//! keyspace u64), and an end (tag 3, XXH3 of the items u64, the word `FJL\x03`). Little-endian. Files are preallocated
//! with zeros.
//!
//! # How damage is told from a torn end
//!
//! Payloads lie in the journal as clients sent them, so nothing that a client can write may decide. Each batch that makes
//! something durable ends with a [`Stamp`]: its number, the number of the last batch that had been synced when it was
//! written, and the log's [`Seal`], 16 random bytes that never leave the directory. Behind damage, one stamp that says that
//! a later batch than the last whole one had been synced proves that acknowledged records lie in the damage. Without such
//! a stamp nothing behind it was acknowledged. If there is no whole batch with a stamp, because the engine removes journals
//! once it has tables of them, the tables have to say how far the log was: see [`Cut::reaches`].

use std::{
    fs, io,
    os::unix::fs::FileExt as _,
    path::{Path, PathBuf},
};

use uuid::Uuid;
use xxhash_rust::xxh3::Xxh3;

use super::{
    Error,
    engine::{corrupt, io_error},
    torn,
};
use crate::durable;

const TRAILER: &[u8] = b"FJL\x03";

/// The end of a batch: tag, checksum, trailer.
const END_BYTES: usize = 1 + 8 + TRAILER.len();

/// A [`Stamp`] as stored, seal included.
pub(super) const STAMP_BYTES: usize = 32;

const SEAL_FILE: &str = "seal";

/// A journal that ended in the middle of a batch, as a crash can leave it: the batch was never acknowledged, and was
/// cut off.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Repair {
    /// The file that was repaired; the first, if several were.
    pub file: PathBuf,
    /// Bytes that were cut off.
    pub bytes: u64,
}

/// What [`Check::run`] cut off.
pub(super) struct Cut {
    pub(super) repair: Repair,
    /// The tables have to hold everything up to this batch; else acknowledged records lay in what was cut off, which is then to
    /// be put back with [`torn::put_back`]. 0 if that is certain, and nothing can be put back.
    pub(super) reaches: u64,
}

/// The log's secret, which tells its batches from what clients wrote.
#[derive(Clone, Copy)]
pub(super) struct Seal([u8; 16]);

/// What a batch says of itself and of those before it. Numbers count the stamped batches of a log, from 1.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Stamp {
    pub(super) number: u64,
    /// The last batch that was certainly on the disk when this one was written.
    pub(super) synced: u64,
}

impl Seal {
    /// The seal of the log in `dir`; a new one if it has none.
    pub(super) fn load(dir: &Path) -> Result<Self, Error> {
        let path = dir.join(SEAL_FILE);
        match fs::read(&path) {
            Ok(found) if found.len() == 16 => {
                let mut seal = [0; 16];
                seal.copy_from_slice(&found);
                return Ok(Self(seal));
            }
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(io_error(&path, &error)),
            _ => {}
        }
        let seal = *Uuid::new_v4().as_bytes();
        durable::write(&path, &seal).map_err(|e| io_error(&path, &e))?;
        Ok(Self(seal))
    }

    /// To be the end of the value of the batch's last item.
    pub(super) fn stamp(&self, stamp: Stamp) -> [u8; STAMP_BYTES] {
        let mut bytes = [0; STAMP_BYTES];
        bytes[..8].copy_from_slice(&stamp.number.to_be_bytes());
        bytes[8..16].copy_from_slice(&stamp.synced.to_be_bytes());
        bytes[16..].copy_from_slice(&self.0);
        bytes
    }

    /// The stamp that `bytes` end with, if they end with this log's seal.
    fn read(&self, bytes: &[u8]) -> Option<Stamp> {
        let stamp = bytes.last_chunk::<STAMP_BYTES>().filter(|stamp| stamp[16..] == self.0)?;
        Stamp::decode(stamp)
    }

    /// The stamps of all batches whose ends lie in `bytes`, whether or not the rest of them is there. Linear.
    fn find<'a>(&'a self, bytes: &'a [u8]) -> impl Iterator<Item = Stamp> + 'a {
        let ends = bytes.windows(STAMP_BYTES + END_BYTES).filter(|window| {
            window[STAMP_BYTES] == 3 && window.ends_with(TRAILER) && window[16..STAMP_BYTES] == self.0
        });
        ends.filter_map(Stamp::decode)
    }
}

impl Stamp {
    /// Of the batch that is written next.
    pub(super) fn next(self, syncs: bool) -> Self {
        Self { number: self.number + 1, synced: if syncs { self.number } else { self.synced } }
    }

    /// All up to this batch is on the disk.
    pub(super) fn settled(self) -> Self {
        Self { synced: self.number, ..self }
    }

    pub(super) fn decode(bytes: &[u8]) -> Option<Self> {
        let (number, rest) = bytes.split_first_chunk()?;
        Some(Self { number: u64::from_be_bytes(*number), synced: u64::from_be_bytes(*rest.first_chunk()?) })
    }
}

/// How journals are checked.
pub(super) struct Check<'a> {
    pub(super) seal: &'a Seal,
    /// The last batch that was acknowledged, for a log that is reopened after a failed write. What follows it is cut off
    /// even if it looks whole: after a failed fsync, what the page cache holds and what the disk holds may differ, and a
    /// later fsync does not say so.
    pub(super) acknowledged: Option<u64>,
    /// Write what no stamp proves to be on the disk once more, before it is built upon: an fsync that failed in an earlier
    /// process leaves pages that look clean.
    pub(super) settle: bool,
    /// There are tables that can be asked. Otherwise what they would have to decide is damage.
    pub(super) has_tables: bool,
}

/// A place in the journals: one past the last byte that is kept.
#[derive(Default)]
struct Place {
    journal: usize,
    end: usize,
    /// Of the last stamped batch before it.
    stamp: Stamp,
    /// In the same journal: where the first batch begins that no stamp says to be synced.
    unsettled: usize,
}

/// One whole batch as found.
struct Batch {
    length: usize,
    stamp: Option<Stamp>,
}

impl Check<'_> {
    /// Checks the journals in `dir`, if there are any, and cuts off what was not acknowledged and cannot be kept.
    ///
    /// # Errors
    /// [`Error::Corrupt`] for any other damage; nothing is changed then.
    pub(super) fn run(&self, dir: &Path) -> Result<Option<Cut>, Error> {
        torn::put_back(dir).map_err(|e| io_error(dir, &e))?;
        let paths = journals(dir).map_err(|e| io_error(dir, &e))?;
        let (mut kept, mut is_whole) = (Place::default(), true);
        for (journal, path) in paths.iter().enumerate() {
            let bytes = read(path)?;
            is_whole = self.walk(&bytes, journal, &mut kept) >= used(&bytes);
            if !is_whole {
                break;
            }
        }
        // What is whole goes on to be kept, unless more is known than that.
        let is_certain = is_whole && self.acknowledged.is_none();
        let cut = if is_certain { None } else { self.cut_behind(&kept, dir, &paths)? };
        if let Some(path) = paths.get(kept.journal).filter(|_| self.settle) {
            settle(path, kept.unsettled, kept.end).map_err(|e| io_error(path, &e))?;
        }
        Ok(cut)
    }

    /// Moves `kept` over the whole batches of one journal; answers where the last of those ends that lie one after the
    /// other from the beginning.
    fn walk(&self, bytes: &[u8], journal: usize, kept: &mut Place) -> usize {
        let (mut at, mut unsettled, mut stamped_end) = (0, 0, 0);
        while let Some(batch) = self.batch(&bytes[at..]) {
            let end = at + batch.length;
            match (batch.stamp, self.acknowledged) {
                (Some(stamp), Some(acknowledged)) if stamp.number > acknowledged => return at,
                (Some(stamp), _) => {
                    if stamp.synced >= kept.stamp.number {
                        unsettled = stamped_end;
                    }
                    stamped_end = end;
                    *kept = Place { journal, end, stamp, unsettled };
                }
                (None, _) => *kept = Place { journal, end, stamp: kept.stamp, unsettled },
            }
            at = end;
        }
        at
    }

    fn cut_behind(&self, kept: &Place, dir: &Path, paths: &[PathBuf]) -> Result<Option<Cut>, Error> {
        let (mut cuts, mut reaches, mut first) = (Vec::new(), 0, u64::MAX);
        for (journal, path) in paths.iter().enumerate().skip(kept.journal) {
            let bytes = read(path)?;
            let (end, used) = (if journal == kept.journal { kept.end } else { 0 }, used(&bytes));
            if used <= end {
                continue;
            }
            let stamps = self.seal.find(&bytes[end..]).inspect(|stamp| first = first.min(stamp.number));
            let acknowledged = stamps.filter_map(|stamp| self.acknowledged_by(kept.stamp, stamp)).max();
            reaches = reaches.max(acknowledged.unwrap_or(0));
            let may_be_in_tables = self.has_tables && self.acknowledged.is_none() && kept.stamp.number == 0;
            // A batch that was acknowledged and is still in a journal need not be in all tables.
            if reaches > 0 && (!may_be_in_tables || first <= reaches) {
                let reason =
                    format!("journal {} is damaged at byte {end}, before acknowledged records", path.display());
                return Err(corrupt(reason));
            }
            cuts.push((path, end, (used - end) as u64));
        }
        let Some((file, ..)) = cuts.first() else { return Ok(None) };
        let repair = Repair { file: (*file).clone(), bytes: cuts.iter().map(|(_, _, bytes)| bytes).sum() };
        if reaches > 0 {
            torn::copy(dir, cuts.iter().map(|(path, ..)| *path)).map_err(|e| io_error(dir, &e))?;
        }
        // The last one first: should this end early, what is left is behind the damage all the same.
        for (path, end, _) in cuts.into_iter().rev() {
            cut(path, end as u64).map_err(|e| io_error(path, &e))?;
        }
        Ok(Some(Cut { repair, reaches }))
    }

    /// The last batch of which a stamp behind the last one that is kept says that it was acknowledged, although it is not kept.
    fn acknowledged_by(&self, kept: Stamp, behind: Stamp) -> Option<u64> {
        match self.acknowledged {
            Some(acknowledged) => (behind.number <= acknowledged).then_some(behind.number),
            None => (behind.synced > kept.number).then_some(behind.synced),
        }
    }

    /// The whole batch that `bytes` begin with.
    fn batch(&self, bytes: &[u8]) -> Option<Batch> {
        let mut rest = Cursor { bytes, at: 0 };
        if rest.take(1)? != [1] {
            return None;
        }
        let items = rest.u32()?;
        rest.take(8)?;
        let mut hash = Xxh3::default();
        let mut last_value: &[u8] = &[];
        for _ in 0..items {
            let start = rest.at;
            match rest.take(1)? {
                [2] => {
                    rest.take(1 + 1 + 8)?;
                    let key = rest.u16()? as usize;
                    rest.take(4)?;
                    let value = rest.u32()? as usize;
                    rest.take(key)?;
                    last_value = rest.take(value)?;
                }
                [4] => drop(rest.take(8)?),
                _ => return None,
            }
            hash.update(&bytes[start..rest.at]);
        }
        let is_end = rest.take(1)? == [3] && rest.take(8)? == hash.digest().to_le_bytes() && rest.take(4)? == TRAILER;
        is_end.then(|| Batch { length: rest.at, stamp: self.seal.read(last_value) })
    }
}

/// Checks the journals of the log in `dir` as opening it does, and repairs them: for tests of any bytes.
///
/// # Errors
/// [`Error::Corrupt`] where the log would not open.
#[cfg(feature = "test-util")]
pub fn check_journals(dir: &Path) -> Result<Option<Repair>, Error> {
    let seal = Seal::load(dir)?;
    let cut = Check { seal: &seal, acknowledged: None, settle: false, has_tables: false }.run(dir)?;
    Ok(cut.map(|cut| cut.repair))
}

/// The journals by number, oldest first.
pub(super) fn journals(dir: &Path) -> io::Result<Vec<PathBuf>> {
    let mut journals = Vec::new();
    for entry in fs::read_dir(dir)? {
        let path = entry?.path();
        let number = path.file_name().and_then(|name| name.to_str()?.strip_suffix(".jnl")?.parse::<u64>().ok());
        journals.extend(number.map(|number| (number, path)));
    }
    journals.sort();
    Ok(journals.into_iter().map(|(_, path)| path).collect())
}

/// How much the journals in `dir` hold.
pub(super) fn used_bytes(dir: &Path) -> io::Result<u64> {
    journals(dir)?.iter().try_fold(0, |sum, path| Ok(sum + used(&read_data(path)?) as u64))
}

/// One past the last byte that is not zero. By pages first: most of a journal is preallocated.
fn used(bytes: &[u8]) -> usize {
    const PAGE: usize = 4096;
    let page = bytes.chunks(PAGE).rposition(|page| page != &[0; PAGE][..page.len()]).unwrap_or(0);
    let end = bytes.len().min((page + 1) * PAGE);
    bytes[..end].iter().rposition(|byte| *byte != 0).map_or(0, |last| last + 1)
}

struct Cursor<'a> {
    bytes: &'a [u8],
    at: usize,
}

impl<'a> Cursor<'a> {
    fn take(&mut self, length: usize) -> Option<&'a [u8]> {
        let taken = self.bytes.get(self.at..self.at.checked_add(length)?)?;
        self.at += length;
        Some(taken)
    }

    fn u16(&mut self) -> Option<u16> {
        Some(u16::from_le_bytes(*self.take(2)?.first_chunk()?))
    }

    fn u32(&mut self) -> Option<u32> {
        Some(u32::from_le_bytes(*self.take(4)?.first_chunk()?))
    }
}

fn cut(path: &Path, length: u64) -> io::Result<()> {
    let file = fs::OpenOptions::new().write(true).open(path)?;
    file.set_len(length)?;
    file.sync_all()
}

/// Writes the bytes of a stretch to where they are already.
fn settle(path: &Path, from: usize, to: usize) -> io::Result<()> {
    if from >= to {
        return Ok(());
    }
    let file = fs::OpenOptions::new().read(true).write(true).open(path)?;
    let mut bytes = vec![0; to - from];
    file.read_exact_at(&mut bytes, from as u64)?;
    file.write_all_at(&bytes, from as u64)?;
    file.sync_all()
}

fn read(path: &Path) -> Result<Vec<u8>, Error> {
    read_data(path).map_err(|e| io_error(path, &e))
}

/// A file up to its last data. What is preallocated behind that is a hole, and need not be looked at.
fn read_data(path: &Path) -> io::Result<Vec<u8>> {
    let file = fs::File::open(path)?;
    let length = file.metadata()?.len();
    let mut bytes = Vec::new();
    let mut at = 0;
    while at < length {
        let Some(data) = next_data(&file, at)? else { break };
        let hole = next_hole(&file, data, length)?;
        bytes.resize(as_index(hole)?, 0);
        file.read_exact_at(&mut bytes[as_index(data)?..], data)?;
        at = hole;
    }
    Ok(bytes)
}

#[cfg(target_os = "linux")]
fn next_data(file: &fs::File, from: u64) -> io::Result<Option<u64>> {
    match rustix::fs::seek(file, rustix::fs::SeekFrom::Data(from)) {
        Ok(data) => Ok(Some(data)),
        Err(rustix::io::Errno::NXIO) => Ok(None),
        // The file system does not know.
        Err(rustix::io::Errno::INVAL | rustix::io::Errno::OPNOTSUPP) => Ok(Some(from)),
        Err(error) => Err(error.into()),
    }
}

#[cfg(target_os = "linux")]
fn next_hole(file: &fs::File, from: u64, length: u64) -> io::Result<u64> {
    match rustix::fs::seek(file, rustix::fs::SeekFrom::Hole(from)) {
        Ok(hole) => Ok(hole.min(length)),
        Err(rustix::io::Errno::INVAL | rustix::io::Errno::OPNOTSUPP) => Ok(length),
        Err(error) => Err(error.into()),
    }
}

#[cfg(not(target_os = "linux"))]
fn next_data(_file: &fs::File, from: u64) -> io::Result<Option<u64>> {
    Ok(Some(from))
}

#[cfg(not(target_os = "linux"))]
fn next_hole(_file: &fs::File, _from: u64, length: u64) -> io::Result<u64> {
    Ok(length)
}

fn as_index(at: u64) -> io::Result<usize> {
    usize::try_from(at).map_err(io::Error::other)
}

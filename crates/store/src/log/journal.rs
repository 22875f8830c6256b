//! Checking the engine's journals before it opens them.
//!
//! The engine cuts a journal at the first batch that it cannot read, wherever that is. That is right for the last
//! batch, which a crash can tear before its fsync returned; anywhere else it would silently drop batches that were
//! acknowledged. So a journal is read here first: a torn last batch is cut off and reported, any other damage is
//! refused and left as it is.
//!
//! Format (the engine's 3): a batch is a start (tag 1, number of items u32, sequence number u64), its items (tag 2: type
//! u8, compression u8, keyspace u64, lengths of key u16, value u32 and stored value u32, key, stored value; or tag 4:
//! keyspace u64), and an end (tag 3, XXH3 of the items u64, the word `FJL\x03`). Little-endian. Files are preallocated
//! with zeros.

use std::{
    fs, io,
    path::{Path, PathBuf},
};

use xxhash_rust::xxh3::Xxh3;

use super::{
    Error,
    engine::{corrupt, io_error},
};

const TRAILER: &[u8] = b"FJL\x03";

/// A journal that ended in the middle of a batch, as a crash can leave it: the batch was never acknowledged, and was
/// cut off.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Repair {
    /// The file that was repaired.
    pub file: PathBuf,
    /// Bytes of the torn batch that were cut off.
    pub bytes: u64,
}

/// Checks the journals in `dir`, if there are any, and cuts a torn batch off the end of the last one.
///
/// # Errors
/// [`Error::Corrupt`] for any other damage; nothing is changed then.
pub(super) fn check(dir: &Path) -> Result<Option<Repair>, Error> {
    let journals = journals(dir).map_err(|e| io_error(dir, &e))?;
    let mut repair = None;
    for (index, path) in journals.iter().enumerate() {
        let bytes = fs::read(path).map_err(|e| io_error(path, &e))?;
        let used = used(&bytes);
        let whole = whole_batches(&bytes);
        if whole >= used {
            continue;
        }
        if index + 1 < journals.len() || holds_a_batch(&bytes[whole..used]) {
            let reason = format!("journal {} is damaged at byte {whole}, before acknowledged records", path.display());
            return Err(corrupt(reason));
        }
        cut(path, whole as u64).map_err(|e| io_error(path, &e))?;
        repair = Some(Repair { file: path.clone(), bytes: (used - whole) as u64 });
    }
    Ok(repair)
}

/// The journals by number, oldest first.
fn journals(dir: &Path) -> io::Result<Vec<PathBuf>> {
    let mut journals = Vec::new();
    for entry in fs::read_dir(dir)? {
        let path = entry?.path();
        let number = path.file_name().and_then(|name| name.to_str()?.strip_suffix(".jnl")?.parse::<u64>().ok());
        journals.extend(number.map(|number| (number, path)));
    }
    journals.sort();
    Ok(journals.into_iter().map(|(_, path)| path).collect())
}

/// One past the last byte that is not zero. By pages first: most of a journal is preallocated.
fn used(bytes: &[u8]) -> usize {
    const PAGE: usize = 4096;
    let page = bytes.chunks(PAGE).rposition(|page| page != &[0; PAGE][..page.len()]).unwrap_or(0);
    let end = bytes.len().min((page + 1) * PAGE);
    bytes[..end].iter().rposition(|byte| *byte != 0).map_or(0, |last| last + 1)
}

/// Where the last of the whole batches ends that lie one after the other from the beginning.
fn whole_batches(bytes: &[u8]) -> usize {
    let mut end = 0;
    while let Some(length) = batch(&bytes[end..]) {
        end += length;
    }
    end
}

/// Whether a whole batch begins behind some trailer, that is, where one can begin.
fn holds_a_batch(bytes: &[u8]) -> bool {
    let trailers = bytes.windows(TRAILER.len()).enumerate().filter(|(_, window)| *window == TRAILER);
    trailers.map(|(at, _)| at + TRAILER.len()).any(|at| batch(&bytes[at..]).is_some())
}

/// The length of the whole batch that `bytes` begin with.
fn batch(bytes: &[u8]) -> Option<usize> {
    let mut rest = Cursor { bytes, at: 0 };
    if rest.take(1)? != [1] {
        return None;
    }
    let items = rest.u32()?;
    rest.take(8)?;
    let mut hash = Xxh3::default();
    for _ in 0..items {
        let start = rest.at;
        match rest.take(1)? {
            [2] => {
                rest.take(1 + 1 + 8)?;
                let key = rest.u16()? as usize;
                rest.take(4)?;
                let value = rest.u32()? as usize;
                rest.take(key.checked_add(value)?)?;
            }
            [4] => drop(rest.take(8)?),
            _ => return None,
        }
        hash.update(&bytes[start..rest.at]);
    }
    let is_end = rest.take(1)? == [3] && rest.take(8)? == hash.digest().to_le_bytes() && rest.take(4)? == TRAILER;
    is_end.then_some(rest.at)
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

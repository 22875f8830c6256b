//! Any bytes as a journal of the log, and as what a client wrote into one: the check never panics, what it repaired it finds
//! whole, and no payload makes it refuse a journal whose last batch is torn.
//!
//! An input is a place to tear at (2 bytes, little-endian) and a payload; or, after two zeros, a journal.

#![no_main]
#![allow(clippy::panic, clippy::unwrap_used, reason = "that is how a fuzzer is told")]

use std::{fs, path::Path, sync::LazyLock};

use libfuzzer_sys::fuzz_target;
use trunkline_store::log::{Error, check_journals};
use xxhash_rust::xxh3::Xxh3;

/// The log's secret.
const SEAL: [u8; 16] = *b"\x9b\x04\xe1\x77\x5d\xc2\x38\xaf\x10\xd6\x42\x8e\xfb\x63\x29\xb5";

static DIR: LazyLock<tempfile::TempDir> = LazyLock::new(|| {
    // In memory, where there is such a place: files are synced.
    let shm = Path::new("/dev/shm");
    let dir = if shm.is_dir() { tempfile::tempdir_in(shm) } else { tempfile::tempdir() };
    let dir = dir.unwrap();
    fs::write(dir.path().join("seal"), SEAL).unwrap();
    dir
});

fuzz_target!(|input: &[u8]| {
    let Some((tear, rest)) = input.split_first_chunk() else { return };
    let (path, tear) = (DIR.path().join("0.jnl"), usize::from(u16::from_le_bytes(*tear)));
    if tear == 0 {
        fs::write(&path, rest).unwrap();
        match check_journals(DIR.path()) {
            Ok(_) => assert_eq!(check_journals(DIR.path()).unwrap(), None, "it was repaired"),
            Err(Error::Corrupt { .. }) => {}
            Err(error) => panic!("{error}"),
        }
        return;
    }
    let (whole, last) = (batch(1, 0, b"acknowledged"), batch(2, 1, rest));
    let torn = &last[..tear % last.len()];
    fs::write(&path, [&whole[..], torn, &[0; 64]].concat()).unwrap();
    let repaired = check_journals(DIR.path()).unwrap();
    let is_torn = torn.iter().any(|byte| *byte != 0);
    assert_eq!(repaired.is_some(), is_torn);
    if is_torn {
        assert_eq!(fs::read(&path).unwrap(), whole);
    }
});

/// A batch of one item with its stamp, as the engine writes it.
fn batch(number: u64, synced: u64, payload: &[u8]) -> Vec<u8> {
    let value = [payload, &number.to_be_bytes(), &synced.to_be_bytes(), &SEAL].concat();
    let length = u32::try_from(value.len()).unwrap().to_le_bytes();
    let head = [&[2, 0, 0][..], &1u64.to_le_bytes(), &3u16.to_le_bytes(), &length, &length].concat();
    let item = [&head[..], b"key", &value].concat();
    let mut hash = Xxh3::default();
    hash.update(&item);
    let start = [&[1][..], &1u32.to_le_bytes(), &number.to_le_bytes()].concat();
    [&start[..], &item, &[3], &hash.digest().to_le_bytes(), b"FJL\x03"].concat()
}

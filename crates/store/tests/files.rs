//! Files are whole or not there.

#![allow(clippy::unwrap_used, reason = "test code")]

use futures_util::TryStreamExt as _;
use trunkline_store::files::Files;

async fn content(files: &Files, name: &str) -> Option<Vec<u8>> {
    let (size, content) = read(files, name, None).await?;
    assert_eq!(size, content.len() as u64);
    Some(content)
}

async fn read(files: &Files, name: &str, bytes: Option<std::ops::Range<u64>>) -> Option<(u64, Vec<u8>)> {
    let (size, parts) = files.read(name, bytes).await.unwrap()?;
    let content = parts.try_fold(Vec::new(), async |mut all, part| {
        all.extend_from_slice(&part);
        Ok(all)
    });
    Some((size, content.await.unwrap()))
}

fn count(dir: &std::path::Path) -> usize {
    let entries = std::fs::read_dir(dir).unwrap();
    entries.map(|entry| entry.unwrap()).map(|entry| if entry.path().is_dir() { count(&entry.path()) } else { 1 }).sum()
}

#[tokio::test]
async fn a_file_is_whole_or_not_there() {
    let dir = tempfile::tempdir().unwrap();
    let files = Files::in_directory(dir.path(), true).unwrap();
    assert_eq!(content(&files, "a/b").await, None);
    // More than is held at once.
    let large: Vec<u8> = (0..12_000_000_u32).map(|n| (n % 251) as u8).collect();
    let mut upload = files.create("a/b");
    for part in large.chunks(700_001) {
        upload.write(part).await.unwrap();
        assert_eq!(content(&files, "a/b").await, None, "not before it is finished");
    }
    assert_eq!(upload.finish().await.unwrap(), large.len() as u64);
    assert_eq!(content(&files, "a/b").await.unwrap(), large);
    for part in [0..1, 5_000_000..11_000_000, 11_999_999..12_000_000] {
        let expected = large[part.start as usize..part.end as usize].to_vec();
        assert_eq!(read(&files, "a/b", Some(part)).await.unwrap(), (12_000_000, expected));
    }
    // Small, and in the place of another.
    let mut upload = files.create("a/b");
    upload.write(b"small").await.unwrap();
    upload.finish().await.unwrap();
    assert_eq!(content(&files, "a/b").await.unwrap(), b"small");
    assert_eq!(files.create("empty").finish().await.unwrap(), 0);
    assert_eq!(content(&files, "empty").await.unwrap(), b"");
    files.remove("a/b").await.unwrap();
    files.remove("a/b").await.unwrap();
    assert_eq!(content(&files, "a/b").await, None);
}

#[tokio::test]
async fn what_is_not_finished_leaves_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let files = Files::in_directory(dir.path(), false).unwrap();
    let large = vec![7; 12_000_000];
    let mut upload = files.create("left");
    upload.write(&large).await.unwrap();
    upload.abort().await;
    let mut upload = files.create("dropped");
    upload.write(&large).await.unwrap();
    drop(upload);
    assert_eq!(content(&files, "left").await, None);
    assert_eq!(content(&files, "dropped").await, None);
    // What a dropped one had under way ends by itself.
    let until = std::time::Instant::now() + std::time::Duration::from_secs(10);
    while count(dir.path()) > 0 {
        assert!(std::time::Instant::now() < until, "{} files are left", count(dir.path()));
        tokio::task::yield_now().await;
    }
}

//! Files: content that is too large for a record, kept under a key of the owner's choice, written as it comes and read as it
//! is taken. Nothing here holds a file whole in memory.
//!
//! - **Durable**: once [`Upload::finish`] returns, the file survives what the rest of the store does. Before that, nobody
//!   sees any of it.
//! - **Cancellation**: an [`Upload`] that is dropped leaves no file.
//! - Two places: a directory beside the log, or a bucket of an S3-compatible service.

use std::{ops::Range, path::Path, sync::Arc};

use bytes::Bytes;
use futures_util::{Stream, StreamExt as _};
use object_store::{
    GetOptions, GetRange, ObjectStore, ObjectStoreExt as _, aws::AmazonS3Builder, buffered::BufWriter,
    local::LocalFileSystem, path::Path as Key,
};
use tokio::io::AsyncWriteExt as _;

/// What is held of an upload before it goes on: S3 takes no smaller parts than this but for the last; a disk takes any.
const PART_BYTES: usize = 5 * 1024 * 1024;
const DISK_PART_BYTES: usize = 256 * 1024;

/// Parts of one upload that are under way at once.
const PARTS_MAX: usize = 2;

/// A bucket of an S3-compatible service.
#[derive(Clone, Default, PartialEq, Eq, serde::Deserialize, serde::Serialize)]
#[serde(deny_unknown_fields, default)]
pub struct Bucket {
    /// Its name.
    pub name: String,
    /// The service's address, such as `https://s3.example.org`; empty for Amazon's own.
    pub endpoint: String,
    /// Where it is; most services other than Amazon's take any.
    pub region: String,
    /// Whose key.
    pub access_key: String,
    /// Its secret; never shown.
    #[serde(serialize_with = "hidden")]
    pub secret_key: String,
    /// What keys begin with there.
    pub prefix: String,
}

/// A secret that is there is shown as such, and never itself.
fn hidden<S: serde::Serializer>(secret: &str, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_str(if secret.is_empty() { "" } else { "(hidden)" })
}

impl std::fmt::Debug for Bucket {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Bucket({} at {:?})", self.name, self.endpoint)
    }
}

/// The files of a store. Clones share them.
#[derive(Clone)]
pub struct Files {
    store: Arc<dyn ObjectStore>,
    prefix: Key,
    part_bytes: usize,
}

/// A file that is being written.
pub struct Upload {
    writer: BufWriter,
    bytes: u64,
}

/// What went wrong with a file.
#[derive(Clone, Debug, thiserror::Error)]
#[error("files: {reason}")]
pub struct Error {
    /// In the words of the place.
    pub reason: Arc<str>,
}

impl From<object_store::Error> for Error {
    fn from(error: object_store::Error) -> Self {
        Self { reason: error.to_string().into() }
    }
}

impl From<std::io::Error> for Error {
    fn from(error: std::io::Error) -> Self {
        Self { reason: error.to_string().into() }
    }
}

impl Files {
    /// Files in a directory, which is made. With `fsync`, each is on the disk when it is finished.
    ///
    /// # Errors
    /// If the directory cannot be used.
    pub fn in_directory(dir: &Path, fsync: bool) -> Result<Self, Error> {
        std::fs::create_dir_all(dir)?;
        let store = LocalFileSystem::new_with_prefix(dir)?.with_fsync(fsync).with_automatic_cleanup(true);
        Ok(Self { store: Arc::new(store), prefix: Key::default(), part_bytes: DISK_PART_BYTES })
    }

    /// Files in a bucket. Nothing is asked of the service yet.
    ///
    /// # Errors
    /// If what is said of the bucket makes no sense.
    pub fn in_bucket(bucket: &Bucket) -> Result<Self, Error> {
        // The one cryptography that everything here uses; the program may have set it already.
        let _ = rustls::crypto::ring::default_provider().install_default();
        let region = if bucket.region.is_empty() { "us-east-1" } else { &bucket.region };
        let mut builder = AmazonS3Builder::new()
            .with_bucket_name(&bucket.name)
            .with_region(region)
            .with_access_key_id(&bucket.access_key)
            .with_secret_access_key(&bucket.secret_key);
        if !bucket.endpoint.is_empty() {
            let is_plain = bucket.endpoint.starts_with("http://");
            builder = builder.with_endpoint(&bucket.endpoint).with_allow_http(is_plain);
        }
        Ok(Self {
            store: Arc::new(builder.build()?),
            prefix: Key::from(bucket.prefix.as_str()),
            part_bytes: PART_BYTES,
        })
    }

    fn key(&self, name: &str) -> Key {
        Key::from_iter(self.prefix.parts().chain(Key::from(name).parts()))
    }

    /// Begins a file. What was there under this name is replaced when it is finished.
    #[must_use]
    pub fn create(&self, name: &str) -> Upload {
        let writer = BufWriter::with_capacity(self.store.clone(), self.key(name), self.part_bytes);
        Upload { writer: writer.with_max_concurrency(PARTS_MAX), bytes: 0 }
    }

    /// Reads a file, or these bytes of it: the size of the whole in bytes, and the content. Nothing if there is none.
    ///
    /// # Errors
    /// If the place does not answer, or the bytes begin behind the end; the content may also end with an error.
    pub async fn read(
        &self,
        name: &str,
        bytes: Option<Range<u64>>,
    ) -> Result<Option<(u64, impl Stream<Item = Result<Bytes, Error>> + Send + use<>)>, Error> {
        let options = GetOptions { range: bytes.map(GetRange::Bounded), ..GetOptions::default() };
        match self.store.get_opts(&self.key(name), options).await {
            Ok(found) => Ok(Some((found.meta.size, found.into_stream().map(|part| part.map_err(Error::from))))),
            Err(object_store::Error::NotFound { .. }) => Ok(None),
            Err(error) => Err(error.into()),
        }
    }

    /// Removes a file, if there is one.
    ///
    /// # Errors
    /// If the place does not answer.
    pub async fn remove(&self, name: &str) -> Result<(), Error> {
        match self.store.delete(&self.key(name)).await {
            Ok(()) | Err(object_store::Error::NotFound { .. }) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }
}

impl Upload {
    /// Adds to the file; waits while the place takes what came before.
    ///
    /// # Errors
    /// If the place does not take it.
    pub async fn write(&mut self, part: &[u8]) -> Result<(), Error> {
        self.writer.write_all(part).await?;
        self.bytes += part.len() as u64;
        Ok(())
    }

    /// Bytes so far.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Makes it a file; answers its size in bytes.
    ///
    /// # Errors
    /// If the place did not take it: then there is none.
    pub async fn finish(mut self) -> Result<u64, Error> {
        self.writer.shutdown().await?;
        Ok(self.bytes)
    }

    /// Leaves no file. Kinder than dropping it to a place that keeps parts until somebody says so.
    pub async fn abort(mut self) {
        if let Err(error) = self.writer.abort().await {
            tracing::debug!(%error, "an upload was not cleaned up");
        }
    }
}

//! The embedded back end: one writer thread, group commit, fjall.
//!
//! The writer takes what waits in its queue, plans it against the topics' state, commits it as one batch with one
//! fsync, makes it visible and answers. When a commit fails, nothing of it is acknowledged; reads go on, and the writer
//! opens the engine again as soon as the disk takes writes.

mod groom;
mod plan;
mod reopen;
mod writer;

use std::{
    future::Future,
    path::Path,
    pin::Pin,
    sync::{
        Arc, Mutex,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    task::{Context, Poll},
    time::Instant,
};

use bytes::Bytes;
use tokio::sync::{Semaphore, mpsc, oneshot, watch};
use uuid::Uuid;

use super::{
    Append, Appended, BATCH_BYTES_MAX, BATCH_RECORDS_MAX, Cursor, Epoch, Error, Offset, Options, PAYLOAD_BYTES_MAX,
    Reader, Topic, TopicStatus,
    engine::{Engine, corrupt},
    index::Indexer,
    journal::Repair,
    rows::Life,
    window::{Windows, lock},
};
use crate::fault::{Fault, Faults};
use writer::{Command, Request, Writer};

/// Reads from the disk at one time, over all readers. Each holds a blocking thread for a few milliseconds; more of
/// them than the disk serves in parallel would only queue in the kernel.
const DISK_READS_MAX: usize = 8;

/// One append's share of the queue besides its payload, so that empty payloads are bounded too.
const APPEND_OVERHEAD_BYTES: usize = 64;

/// A handle on the log; clones share it. See the [module documentation](super) for the contract.
#[derive(Clone)]
pub struct Log {
    shared: Arc<Shared>,
    queue: mpsc::Sender<Request>,
    queue_bytes: Arc<Semaphore>,
    repair: Option<Repair>,
    opened: Instant,
    /// The time of the last batch from before it was opened.
    last_ms: u64,
    options: Arc<Options>,
    faults: Faults,
}

/// What the handles, the readers and the writer share.
pub(super) struct Shared {
    life: Mutex<Life>,
    /// Positions beyond the tail that readers were given.
    clamped: AtomicU64,
    pub(super) windows: Windows,
    pub(super) disk_reads: Arc<Semaphore>,
    engine: watch::Sender<OpenEngine>,
}

/// The engine as readers find it.
pub(super) enum OpenEngine {
    /// Holding it keeps it from being closed.
    Open(Arc<Engine>),
    /// It is being opened again, or the log stopped.
    Closed,
    /// It was closed to be opened again, and that failed.
    Failed(Error),
}

impl Shared {
    pub(super) fn epoch(&self) -> Epoch {
        self.life().epoch
    }

    fn life(&self) -> Life {
        *lock(&self.life)
    }

    /// The position, or the tail if it lies beyond: offsets that this log never gave would hide what it gives next.
    pub(super) fn clamp(&self, topic: &Topic, position: Offset) -> Offset {
        let tail = self.windows.watermark();
        if position.0 <= tail {
            return position;
        }
        self.clamped.fetch_add(1, Relaxed);
        tracing::warn!(%topic, %position, tail, "position is beyond the log's tail; reading begins at the tail");
        Offset(tail)
    }

    /// The engine; waits while it is being opened again. Holding it keeps it from being closed.
    ///
    /// # Errors
    /// [`Error::Unavailable`] or [`Error::Corrupt`] while it cannot be opened, [`Error::Stopped`].
    pub(super) async fn engine(&self) -> Result<Arc<Engine>, Error> {
        let mut engine = self.engine.subscribe();
        let is_settled =
            |engine: &OpenEngine| !matches!(engine, OpenEngine::Closed) || self.windows.check_running().is_err();
        let settled = engine.wait_for(is_settled).await.map_err(|_| Error::Stopped)?;
        match &*settled {
            OpenEngine::Open(engine) => Ok(engine.clone()),
            OpenEngine::Failed(error) => Err(error.clone()),
            OpenEngine::Closed => Err(Error::Stopped),
        }
    }
}

impl Log {
    /// Opens the log in `dir`, or creates it, and starts its writer. A batch that a crash tore is cut off; what was
    /// acknowledged is there. Blocks while recent batches are replayed (well under a second).
    ///
    /// # Errors
    /// [`Error::Unavailable`] if the directory cannot be used or is in use, [`Error::Corrupt`] if what is in it is
    /// damaged or was written by another version.
    pub fn open(dir: &Path, options: Options) -> Result<Self, Error> {
        let (engine, repair) = Engine::open(dir, &options)?;
        if let Some(repair) = &repair {
            tracing::warn!(file = %repair.file.display(), bytes = repair.bytes, "cut a torn batch off the log");
        }
        let engine = Arc::new(engine);
        let mut tail = engine.tail()?;
        // Opening synced what it found.
        tail.stamp = tail.stamp.settled();
        let shared = Arc::new(Shared {
            life: Mutex::new(engine.life),
            clamped: AtomicU64::new(0),
            windows: Windows::new(tail.offset),
            disk_reads: Arc::new(Semaphore::new(DISK_READS_MAX)),
            engine: watch::Sender::new(OpenEngine::Open(engine.clone())),
        });
        let (queue, requests) = mpsc::channel(options.queue_appends_max.max(1));
        let queue_bytes = Arc::new(Semaphore::new(options.queue_bytes_max));
        let options = Arc::new(options);
        let no_thread = |e| Error::Unavailable { reason: format!("cannot start a thread: {e}").into() };
        let faults = Faults::default();
        let indexer = Indexer::start(&faults).map_err(no_thread)?;
        let writer = Writer::new(shared.clone(), engine, tail, dir, options.clone(), requests, indexer);
        let on_panic = faults.guard("log writer");
        let write = move || {
            let _on_panic = on_panic;
            writer.run();
        };
        std::thread::Builder::new().name("trunkline-log".into()).spawn(write).map_err(no_thread)?;
        let (opened, last_ms) = (Instant::now(), tail.timestamp_ms);
        Ok(Self { shared, queue, queue_bytes, repair, opened, last_ms, options, faults })
    }

    /// Waits until its writer has failed for good: appends are then answered with [`Error::Stopped`], and the process
    /// should end with the reason.
    pub async fn failed(&self) -> Fault {
        self.faults.reported().await
    }

    /// What had to be repaired, if anything, when this log was opened.
    #[must_use]
    pub fn repair(&self) -> Option<&Repair> {
        self.repair.as_ref()
    }

    /// This log's epoch.
    #[must_use]
    pub fn epoch(&self) -> Epoch {
        self.shared.epoch()
    }

    /// Gives the log another epoch, durably: for a log that others know further than it goes, because it was taken back to
    /// an earlier state. Cursors from before are refused from now on, and not taken for ones of what is appended next.
    /// Readers keep the epoch that they were made under, so this is for before there are any.
    ///
    /// # Errors
    /// [`Error::Unavailable`]; the epoch is then the same as before.
    pub async fn fork(&self) -> Result<(), Error> {
        let life = Life { epoch: Epoch(Uuid::new_v4()), forked_from: Some(self.tail()) };
        self.request(0, 0, |answer| Command::Fork { life, answer }).await?;
        *lock(&self.shared.life) = life;
        Ok(())
    }

    /// Where the epoch before this one ended, if [`Log::fork`] began this one: up to there, its offsets mean the same.
    #[must_use]
    pub fn forked_from(&self) -> Option<Cursor> {
        self.shared.life().forked_from
    }

    /// How often readers were given positions beyond the tail; see [`Reader::follow_from`].
    #[must_use]
    pub fn clamped(&self) -> u64 {
        self.shared.clamped.load(Relaxed)
    }

    /// The last visible offset: everything up to here can be read.
    #[must_use]
    pub fn tail(&self) -> Cursor {
        Cursor { epoch: self.shared.epoch(), offset: Offset(self.shared.windows.watermark()) }
    }

    /// Memory that the log's engine holds to write and to read faster. Bounded, and 0 while it is being reopened.
    #[must_use]
    pub fn buffered_bytes(&self) -> u64 {
        match &*self.shared.engine.borrow() {
            OpenEngine::Open(engine) => engine.buffered_bytes(),
            _ => 0,
        }
    }

    /// Returns when the disk was seen to take a write: one that is made for this call, or one of the last second. As
    /// durable as an append, but nothing is appended.
    ///
    /// # Errors
    /// [`Error::Unavailable`] or [`Error::Corrupt`] while appends are refused with it, [`Error::Stopped`].
    pub async fn check(&self) -> Result<(), Error> {
        self.request(0, 0, |answer| Command::Check { answer }).await
    }

    /// Appends one record; durable when it returns. Waits while the queue is full.
    ///
    /// Cancellation: see the [module documentation](super).
    ///
    /// # Errors
    /// [`Error::Closed`], [`Error::TailMoved`], [`Error::TooLarge`] leave the log as it was. After
    /// [`Error::Unavailable`] the record is not acknowledged, but may be found later (the disk failed in between);
    /// retry with a dedup id.
    pub async fn append(&self, append: Append) -> Result<Appended, Error> {
        self.submit(append).await?.await
    }

    /// The first half of [`Log::append`]: returns once the record is in the queue, where its place among this caller's
    /// records is fixed. Awaiting the answer says when it is durable.
    ///
    /// # Errors
    /// [`Error::TooLarge`], [`Error::Stopped`]; all others come with the answer.
    pub async fn submit(&self, append: Append) -> Result<Submitted, Error> {
        check_payload(&append)?;
        let bytes = append.payload.len();
        Ok(Submitted(self.enqueue(1, bytes, |answer| Command::Append { append, answer }).await?))
    }

    /// As [`Log::submit`], for many at once: each is written or refused on its own, in order. Cheaper than one by one.
    ///
    /// # Errors
    /// [`Error::TooLarge`] if any of them is, [`Error::Stopped`]; all others come with the answer, one for each.
    pub async fn submit_each(&self, appends: Vec<Append>) -> Result<SubmittedEach, Error> {
        appends.iter().try_for_each(check_payload)?;
        let (count, bytes) = (appends.len(), payload_bytes(&appends));
        let answered = self.enqueue(count, bytes, |answer| Command::AppendEach { appends, answer }).await?;
        Ok(SubmittedEach { count, answered })
    }

    /// Appends all records in order, or none; durable when it returns.
    ///
    /// # Errors
    /// As [`Log::append`], for the first record that is refused; [`Error::Empty`] for no records.
    pub async fn append_batch(&self, appends: Vec<Append>) -> Result<Vec<Appended>, Error> {
        appends.iter().try_for_each(check_payload)?;
        let bytes = payload_bytes(&appends);
        let limits = [("records", appends.len(), BATCH_RECORDS_MAX), ("bytes in one batch", bytes, BATCH_BYTES_MAX)];
        if let Some((unit, actual, max)) = limits.into_iter().find(|(_, actual, max)| actual > max) {
            return Err(Error::TooLarge { unit, actual, max });
        }
        if appends.is_empty() {
            return Err(Error::Empty);
        }
        self.request(appends.len(), bytes, |answer| Command::AppendBatch { appends, answer }).await
    }

    /// Hands `payload` to those who read `topic` at the tail right now: at most once, nothing is stored, never waits.
    /// A reader that is behind does not get it.
    ///
    /// # Errors
    /// [`Error::TooLarge`].
    pub fn publish(&self, topic: &Topic, payload: impl Into<Bytes>) -> Result<(), Error> {
        let payload = payload.into();
        check_payload_bytes(payload.len())?;
        if let Some(live) = self.shared.windows.live(topic) {
            live.push_transient(payload, self.shared.windows.watermark());
        }
        Ok(())
    }

    /// A reader whose cursor is the tail. It follows nothing yet.
    #[must_use]
    pub fn reader(&self) -> Reader {
        Reader::new(self.shared.clone(), self.shared.windows.watermark())
    }

    /// A reader that resumes behind `cursor`. It follows nothing yet.
    ///
    /// # Errors
    /// [`Error::EpochMismatch`] or [`Error::BeyondTail`] if the cursor is not of this log.
    pub fn reader_at(&self, cursor: Cursor) -> Result<Reader, Error> {
        let tail = self.tail();
        if cursor.epoch != tail.epoch {
            return Err(Error::EpochMismatch { given: cursor.epoch, current: tail.epoch });
        }
        if cursor.offset > tail.offset {
            return Err(Error::BeyondTail { given: cursor.offset, tail: tail.offset });
        }
        Ok(Reader::new(self.shared.clone(), cursor.offset.0))
    }

    /// Where `topic` stands on disk.
    ///
    /// # Errors
    /// [`Error::Unavailable`] or [`Error::Corrupt`] if the disk cannot be read.
    pub async fn status(&self, topic: &Topic) -> Result<TopicStatus, Error> {
        let topic = topic.clone();
        let (state, last_ms) = self.on_disk(move |engine| engine.state_and_time(&topic)).await?;
        Ok(TopicStatus {
            last_ms,
            tail: Offset(state.tail),
            trimmed_to: Offset(state.row.trimmed().to),
            records: state.records - state.row.trimmed().records,
            bytes: state.bytes - state.row.trimmed().bytes,
            closed: state.row.closed,
        })
    }

    /// How many retained records each topic has behind an offset; more than `most` count as `most`. Cheap while somebody reads the
    /// topic near its end, a look into the index otherwise.
    ///
    /// # Errors
    /// [`Error::Unavailable`] or [`Error::Corrupt`] if the disk cannot be read.
    pub async fn unread(&self, wanted: Vec<(Topic, Offset)>, most: usize) -> Result<Vec<u64>, Error> {
        let shared = self.shared.clone();
        self.on_disk(move |engine| {
            let count = |(topic, after): &(Topic, Offset)| {
                let live = shared.windows.live(topic);
                match live.and_then(|live| live.count(after.0)) {
                    Some(count) => Ok(count.min(most) as u64),
                    None => engine.unread(topic, after.0, most),
                }
            };
            wanted.iter().map(count).collect()
        })
        .await
    }

    /// Where the record with this dedup id is, if the topic holds it and its id is still known.
    ///
    /// # Errors
    /// [`Error::Unavailable`] if the disk cannot be read.
    pub async fn find_dedup(&self, topic: &Topic, id: &str) -> Result<Option<Offset>, Error> {
        let (key, topic) = (plan::dedup_key(topic, id), topic.clone());
        let find = move |engine: &Engine| Ok(engine.kept_id(&key, &topic)?.map(|used| Offset(used.offset)));
        self.on_disk(find).await
    }

    /// As [`Log::find_dedup`], for an id that was given [with content](Append::dedup_with).
    ///
    /// # Errors
    /// Also [`Error::DedupReused`] if it was used for something else.
    pub async fn find_dedup_with(
        &self,
        topic: &Topic,
        id: &str,
        content: super::ContentDigest,
    ) -> Result<Option<Offset>, Error> {
        let (key, topic) = (plan::dedup_key(topic, id), topic.clone());
        let find = move |engine: &Engine| {
            let used = engine.kept_id(&key, &topic)?;
            let used = used.map(|used| used.check(&topic, Some(content))).transpose()?;
            Ok(used.map(|used| Offset(used.offset)))
        };
        self.on_disk(find).await
    }

    /// Forgets the topic's records up to and including `through`; readers below get a gap. Durable when it returns;
    /// disk space follows later. The end of a closed topic is never trimmed. Answers what the topic was trimmed to.
    ///
    /// # Errors
    /// [`Error::Unavailable`].
    pub async fn trim(&self, topic: &Topic, through: Offset) -> Result<Offset, Error> {
        let topic = topic.clone();
        self.request(1, 0, |answer| Command::Trim { topic, through: through.0, answer }).await
    }

    /// Ends the topic: no append is taken any more, readers get [`super::Item::End`] behind the last record. Closing a
    /// closed topic answers the same offset again.
    ///
    /// # Errors
    /// [`Error::Unavailable`].
    pub async fn close(&self, topic: &Topic) -> Result<Offset, Error> {
        let topic = topic.clone();
        self.request(1, 0, |answer| Command::Close { topic, answer }).await
    }

    /// Removes the topic with all that it holds: those who read it get [`super::Item::End`], those who come later with
    /// an older cursor a gap. A later append starts it anew, also if it was closed. Answers false if there was none.
    ///
    /// # Errors
    /// [`Error::Unavailable`].
    pub async fn delete(&self, topic: &Topic) -> Result<bool, Error> {
        let topic = topic.clone();
        self.request(1, 0, |answer| Command::Delete { topic, answer }).await
    }

    /// Writes out what waits and stops the writer; returns when the directory is free again. Other handles and readers
    /// get [`Error::Stopped`].
    pub async fn stop(&self) {
        let (answer, stopped) = oneshot::channel();
        if self.queue.send(Request { command: Command::Stop { answer }, permit: None }).await.is_ok() {
            // An error here means that the writer is gone, which is what was asked for.
            let _ = stopped.await;
        }
        self.queue_bytes.close();
    }

    /// Lets the writer commit nothing until what this answers is dropped, as a disk does that does not answer. Returns once the
    /// writer stands still.
    #[cfg(feature = "test-util")]
    pub async fn hold(&self) -> impl Drop + Send + use<> {
        struct Hold(Option<std::sync::mpsc::SyncSender<()>>);
        impl Drop for Hold {
            fn drop(&mut self) {
                self.0.take();
            }
        }
        let (hold, until) = std::sync::mpsc::sync_channel(0);
        let (held, is_held) = oneshot::channel();
        // An error means that the writer is gone, and commits nothing either.
        let _ = self.queue.send(Request { command: Command::Hold { held, until }, permit: None }).await;
        let _ = is_held.await;
        Hold(Some(hold))
    }

    async fn request<T>(
        &self,
        records: usize,
        payload_bytes: usize,
        command: impl FnOnce(oneshot::Sender<Result<T, Error>>) -> Command,
    ) -> Result<T, Error> {
        self.enqueue(records, payload_bytes, command).await?.await.map_err(|_| Error::Stopped)?
    }

    async fn enqueue<T>(
        &self,
        records: usize,
        payload_bytes: usize,
        command: impl FnOnce(oneshot::Sender<Result<T, Error>>) -> Command,
    ) -> Result<oneshot::Receiver<Result<T, Error>>, Error> {
        let share = (payload_bytes + records * APPEND_OVERHEAD_BYTES).min(self.options.queue_bytes_max);
        let share = u32::try_from(share).unwrap_or(u32::MAX);
        let permit = self.queue_bytes.clone().acquire_many_owned(share).await.map_err(|_| Error::Stopped)?;
        let (answer, answered) = oneshot::channel();
        let request = Request { command: command(answer), permit: Some(permit) };
        self.queue.send(request).await.map_err(|_| Error::Stopped)?;
        Ok(answered)
    }

    /// Runs a read on a blocking thread, within the bound on disk reads.
    async fn on_disk<T: Send + 'static>(
        &self,
        read: impl FnOnce(&Engine) -> Result<T, Error> + Send + 'static,
    ) -> Result<T, Error> {
        let permit = self.shared.disk_reads.clone().acquire_owned().await.map_err(|_| Error::Stopped)?;
        let engine = self.shared.engine().await?;
        let joined = tokio::task::spawn_blocking(move || {
            let answer = read(&engine);
            drop((engine, permit));
            answer
        });
        joined.await.map_err(|e| corrupt(format!("reading from disk failed: {e}")))?
    }
}

/// An append that is queued: resolves when it is durable, or refused. Dropping it does not take the append back.
pub struct Submitted(oneshot::Receiver<Result<Appended, Error>>);

impl Future for Submitted {
    type Output = Result<Appended, Error>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        Pin::new(&mut self.0).poll(cx).map(|answer| answer.unwrap_or(Err(Error::Stopped)))
    }
}

/// Appends that are queued: resolves when all that were accepted are durable, with an answer for each, in order. Dropping
/// it takes none of them back.
pub struct SubmittedEach {
    count: usize,
    answered: oneshot::Receiver<Result<Vec<Result<Appended, Error>>, Error>>,
}

impl SubmittedEach {
    /// How many they are.
    #[must_use]
    pub fn count(&self) -> usize {
        self.count
    }
}

impl Future for SubmittedEach {
    type Output = Result<Vec<Result<Appended, Error>>, Error>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        Pin::new(&mut self.answered).poll(cx).map(|answer| answer.unwrap_or(Err(Error::Stopped)))
    }
}

pub(super) fn payload_bytes(appends: &[Append]) -> usize {
    appends.iter().map(|append| append.payload.len()).sum()
}

fn check_payload(append: &Append) -> Result<(), Error> {
    check_payload_bytes(append.payload.len())
}

fn check_payload_bytes(actual: usize) -> Result<(), Error> {
    if actual > PAYLOAD_BYTES_MAX {
        return Err(Error::TooLarge { unit: "payload bytes", actual, max: PAYLOAD_BYTES_MAX });
    }
    Ok(())
}

//! Room for uploads, and what is taken of them: no user, app or slow sender keeps others out, and nothing of a body is held but
//! the piece that is being looked at.

use std::{
    collections::HashMap,
    pin::Pin,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    task::{Context, Poll},
    time::{Duration, Instant},
};

use axum::{body::BodyDataStream, http::HeaderMap};
use bytes::Bytes;
use futures_util::{Stream, StreamExt as _};
use trunkline_core::{Error, Kind, app::Visitor};

/// Uploads that are under way at once, each of which holds a few parts in memory; of one app, and of one user before one
/// agent; and when to try again.
const ALL_MAX: u32 = 64;
const APP_MAX: u32 = 48;
const USER_MAX: u32 = 4;
const RETRY: Duration = Duration::from_secs(1);

/// Bytes of a body that were read and of which nothing was made: what waits to be looked at, and all that is no part's, or is
/// not known for it, in the whole of it. What comes at once may be more by one piece of the transport.
const BETWEEN_BYTES_MAX: usize = 64 * 1024;

/// How slow a sender may be, in bytes a second, once it was waited for so long altogether. Slower than the slowest of mobile
/// networks.
const RATE_MIN: u64 = 2048;
const RATE_GRACE: Duration = Duration::from_secs(30);

/// Who has uploads under way. Clones share it.
#[derive(Clone, Default)]
pub(super) struct Slots(Arc<Mutex<Taken>>);

#[derive(Default)]
struct Taken {
    all: u32,
    apps: HashMap<String, u32>,
    users: HashMap<(String, String), u32>,
}

/// An upload, as long as it is under way.
pub(super) struct Slot {
    slots: Slots,
    app: String,
    user: (String, String),
}

impl Slots {
    fn taken(&self) -> MutexGuard<'_, Taken> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Another upload of a user.
    ///
    /// # Errors
    /// [`Kind::Exhausted`], with when to try again.
    pub(super) fn take(&self, visitor: &Visitor) -> Result<Slot, Error> {
        let app = visitor.app().name.clone();
        let user = (app.clone(), format!("{}::{}", visitor.agent().id, visitor.user));
        let mut taken = self.taken();
        let count = |count: Option<&u32>| count.copied().unwrap_or(0);
        let (of_app, of_user) = (count(taken.apps.get(&app)), count(taken.users.get(&user)));
        for (under_way, most, whose) in [
            (of_user, USER_MAX, "of this user"),
            (of_app, APP_MAX, "of this app"),
            (taken.all, ALL_MAX, "of all users"),
        ] {
            if under_way >= most {
                let why = format!("{under_way} uploads {whose} are under way: the limit is {most}");
                return Err(Error { retry_after: Some(RETRY), ..Error::new(Kind::Exhausted, "ERR_QUOTA_001", why) });
            }
        }
        taken.all += 1;
        *taken.apps.entry(app.clone()).or_default() += 1;
        *taken.users.entry(user.clone()).or_default() += 1;
        drop(taken);
        Ok(Slot { slots: self.clone(), app, user })
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        let mut taken = self.slots.taken();
        taken.all -= 1;
        if taken.apps.get(&self.app).is_some_and(|count| *count <= 1) {
            taken.apps.remove(&self.app);
        } else if let Some(count) = taken.apps.get_mut(&self.app) {
            *count -= 1;
        }
        if taken.users.get(&self.user).is_some_and(|count| *count <= 1) {
            taken.users.remove(&self.user);
        } else if let Some(count) = taken.users.get_mut(&self.user) {
            *count -= 1;
        }
    }
}

/// The body of an upload as it comes. Clones read the same.
#[derive(Clone)]
pub(super) struct Feed(Arc<Mutex<State>>);

struct State {
    body: BodyDataStream,
    /// Bytes that were handed out and of which nothing was made.
    between: usize,
    /// Whoever reads was asked to make something of it.
    is_paused: bool,
    bytes: u64,
    /// How long the sender was waited for, and since when it is.
    waited: Duration,
    waits_since: Option<Instant>,
}

/// Why a body is not read on.
#[derive(Debug, thiserror::Error)]
pub(super) enum Broken {
    #[error("{0}")]
    Transport(#[from] axum::Error),
    #[error("more than {BETWEEN_BYTES_MAX} bytes that belong to no part")]
    Between,
    #[error("fewer than {RATE_MIN} bytes a second")]
    Slow,
}

impl Feed {
    pub(super) fn new(body: BodyDataStream) -> Self {
        let (waited, waits_since) = (Duration::ZERO, None);
        Self(Arc::new(Mutex::new(State { body, between: 0, is_paused: false, bytes: 0, waited, waits_since })))
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// So many of the bytes that were handed out were a part's.
    pub(super) fn goes_on(&self, bytes: usize) {
        let mut state = self.state();
        state.between = state.between.saturating_sub(bytes);
        state.is_paused = false;
    }

    /// A part began, with what is before its content.
    pub(super) fn begins(&self, boundary: &str, headers: &HeaderMap) {
        // As short as they can be written, so that nothing that waits is taken for them.
        let headers = headers.iter().map(|(name, value)| name.as_str().len() + value.len() + ":\r\n".len());
        self.goes_on("\r\n--\r\n\r\n".len() + boundary.len() + headers.sum::<usize>());
    }

    /// Bytes that were handed out.
    #[cfg(test)]
    pub(super) fn bytes(&self) -> u64 {
        self.state().bytes
    }

    /// Reads what is left and throws it away.
    pub(super) async fn drain(&self) {
        loop {
            let next = std::future::poll_fn(|cx| self.state().body.poll_next_unpin(cx)).await;
            if !matches!(next, Some(Ok(_))) {
                return;
            }
        }
    }
}

impl Stream for Feed {
    type Item = Result<Bytes, Broken>;

    fn poll_next(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        self.state().poll(cx, Instant::now())
    }
}

impl State {
    fn poll(&mut self, cx: &mut Context<'_>, now: Instant) -> Poll<Option<Result<Bytes, Broken>>> {
        if self.between >= BETWEEN_BYTES_MAX {
            if std::mem::replace(&mut self.is_paused, true) {
                return Poll::Ready(Some(Err(Broken::Between)));
            }
            // Whoever reads everything that there is looks at it first.
            cx.waker().wake_by_ref();
            return Poll::Pending;
        }
        let next = self.body.poll_next_unpin(cx);
        let Poll::Ready(next) = next else {
            self.waits_since.get_or_insert(now);
            return Poll::Pending;
        };
        if let Some(since) = self.waits_since.take() {
            self.waited += now.saturating_duration_since(since);
        }
        Poll::Ready(next.map(|piece| {
            let piece = piece?;
            self.bytes += piece.len() as u64;
            self.between += piece.len();
            if self.waited > RATE_GRACE && self.bytes < self.waited.as_secs() * RATE_MIN {
                return Err(Broken::Slow);
            }
            Ok(piece)
        }))
    }
}

#[cfg(test)]
mod tests {
    use std::task::Waker;

    use axum::body::Body;
    use futures_util::stream;

    use super::{BETWEEN_BYTES_MAX, Broken, Bytes, Context, Duration, Feed, Instant, Poll, RATE_GRACE};

    fn feed(pieces: Vec<Option<usize>>) -> Feed {
        // A sender that has nothing for now, and then goes on.
        let mut pieces = pieces.into_iter();
        let body = stream::poll_fn(move |_| match pieces.next() {
            Some(Some(size)) => Poll::Ready(Some(Ok::<_, std::io::Error>(Bytes::from(vec![b'x'; size])))),
            Some(None) => Poll::Pending,
            None => Poll::Ready(None),
        });
        Feed::new(Body::from_stream(body).into_data_stream())
    }

    #[test]
    fn what_belongs_to_no_part_is_bounded() {
        let mut cx = Context::from_waker(Waker::noop());
        let now = Instant::now();
        let feed = feed(vec![Some(BETWEEN_BYTES_MAX / 2); 8]);
        let mut poll = || feed.state().poll(&mut cx, now);
        assert!(matches!(poll(), Poll::Ready(Some(Ok(_)))));
        assert!(matches!(poll(), Poll::Ready(Some(Ok(_)))));
        assert!(poll().is_pending(), "whoever reads looks at it first");
        // What was not a part's is still there.
        feed.goes_on(BETWEEN_BYTES_MAX / 2);
        assert!(matches!(poll(), Poll::Ready(Some(Ok(_)))));
        assert!(poll().is_pending());
        assert!(matches!(poll(), Poll::Ready(Some(Err(Broken::Between)))));
    }

    #[test]
    fn who_sends_slowly_is_cut_and_who_is_kept_waiting_is_not() {
        let mut cx = Context::from_waker(Waker::noop());
        let start = Instant::now();
        let at = |seconds| start + Duration::from_secs(seconds);
        let grace = RATE_GRACE.as_secs();
        let slow = feed(vec![None, Some(1), None, Some(1)]);
        assert!(slow.state().poll(&mut cx, at(0)).is_pending());
        assert!(matches!(slow.state().poll(&mut cx, at(grace)), Poll::Ready(Some(Ok(_)))));
        assert!(slow.state().poll(&mut cx, at(grace)).is_pending());
        assert!(matches!(slow.state().poll(&mut cx, at(grace + 1)), Poll::Ready(Some(Err(Broken::Slow)))));
        // The time in which nobody asked is the server's own.
        let kept_waiting = feed(vec![Some(1), Some(1)]);
        assert!(matches!(kept_waiting.state().poll(&mut cx, at(0)), Poll::Ready(Some(Ok(_)))));
        assert!(matches!(kept_waiting.state().poll(&mut cx, at(10 * grace)), Poll::Ready(Some(Ok(_)))));
    }
}

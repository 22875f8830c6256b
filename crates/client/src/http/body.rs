//! Bodies: what is there, what is made, and what comes.

use std::{
    collections::BTreeMap,
    fmt,
    pin::Pin,
    task::{Context, Poll},
    time::Duration,
};

use bytes::Bytes;
use futures_util::Stream as _;
use http_body::{Frame as HttpFrame, SizeHint};
use http_body_util::{BodyExt as _, combinators::UnsyncBoxBody};
use tokio::time::{Instant, Sleep, sleep, sleep_until};
use trunkline_proto::v1::{ProxyHttpBodyChunk, downstream_message::Payload as Down};

use super::{Call, proxy_error};
use crate::{
    error::{Error, Kind},
    routes::Frame,
};

/// Pieces that came before one that is missing, at most.
const AHEAD_MAX: usize = 64;

/// A body. Reading it is how an answer comes; dropping it ends the call on this side.
pub struct Body(Inner);

enum Inner {
    Full(Option<Bytes>),
    Made(UnsyncBoxBody<Bytes, Error>),
    Incoming(Box<Incoming>),
}

/// Pieces of a body in their order.
#[derive(Default)]
pub(super) struct Pieces {
    next: u32,
    ahead: BTreeMap<u32, ProxyHttpBodyChunk>,
}

struct Incoming {
    call: Call,
    pieces: Pieces,
    is_over: bool,
    /// How much came.
    bytes: u64,
    /// When something has to have come.
    timer: Pin<Box<Sleep>>,
}

impl Body {
    /// Nothing.
    #[must_use]
    pub fn empty() -> Self {
        Self(Inner::Full(None))
    }

    /// What is there.
    #[must_use]
    pub fn full(bytes: impl Into<Bytes>) -> Self {
        Self(Inner::Full(Some(bytes.into()).filter(|bytes| !bytes.is_empty())))
    }

    /// Any other body.
    pub fn of<B>(body: B) -> Self
    where
        B: http_body::Body<Data = Bytes> + Send + 'static,
        B::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
    {
        let failed = |e: B::Error| Error::invalid(format!("a body could not be read: {}", e.into()));
        Self(Inner::Made(body.map_err(failed).boxed_unsync()))
    }

    pub(super) fn incoming(call: Call, early: Vec<ProxyHttpBodyChunk>) -> Self {
        let mut pieces = Pieces::default();
        for mut chunk in early {
            // Peers that do not count number all of them 0.
            while pieces.ahead.contains_key(&chunk.seq) {
                chunk.seq = chunk.seq.saturating_add(1);
            }
            pieces.ahead.insert(chunk.seq, chunk);
        }
        let far = Duration::from_secs(365 * 24 * 3600);
        let timer = match (call.until, call.limits.idle) {
            (Some(until), _) => sleep_until(until),
            (None, idle) => sleep(idle.unwrap_or(far)),
        };
        Self(Inner::Incoming(Box::new(Incoming { call, pieces, is_over: false, bytes: 0, timer: Box::pin(timer) })))
    }
}

impl Pieces {
    /// A piece came. Some peers do not count: what is numbered 0 later on is taken in the order in which it comes.
    pub(super) fn push(&mut self, mut chunk: ProxyHttpBodyChunk) -> Result<(), Error> {
        if chunk.seq < self.next {
            if chunk.seq > 0 {
                return Ok(());
            }
            chunk.seq = self.ahead.last_key_value().map_or(self.next, |(last, _)| last.saturating_add(1));
        }
        self.ahead.insert(chunk.seq, chunk);
        if self.ahead.len() > AHEAD_MAX {
            let message = format!("piece {} of a body is missing", self.next);
            return Err(Error::new(Kind::Interrupted, message));
        }
        Ok(())
    }

    /// The next piece, if it is there, and whether it is the last.
    pub(super) fn pop(&mut self) -> Option<(Bytes, bool)> {
        let chunk = self.ahead.remove(&self.next)?;
        self.next = self.next.saturating_add(1);
        Some((chunk.data, chunk.fin))
    }
}

impl Incoming {
    fn poll(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Bytes, Error>>> {
        loop {
            if self.is_over {
                return Poll::Ready(None);
            }
            if let Some((data, fin)) = self.pieces.pop() {
                self.is_over = fin;
                self.bytes += data.len() as u64;
                if let Err(error) = self.call.limits.check(self.bytes) {
                    self.is_over = true;
                    return Poll::Ready(Some(Err(error)));
                }
                if data.is_empty() {
                    continue;
                }
                return Poll::Ready(Some(Ok(data)));
            }
            let frame = match Pin::new(&mut self.call.frames).poll_next(cx) {
                Poll::Ready(frame) => frame,
                Poll::Pending if self.timer.as_mut().poll(cx).is_ready() => {
                    self.is_over = true;
                    let error = Error::new(Kind::Timeout, "an answer began, and did not go on in time");
                    return Poll::Ready(Some(Err(error)));
                }
                Poll::Pending => return Poll::Pending,
            };
            if let Some(idle) = self.call.limits.idle {
                self.timer.as_mut().reset(Instant::now() + idle);
            }
            let failed = match frame {
                Some(Frame::Down(Down::ProxyHttpBodyChunk(chunk))) => self.pieces.push(*chunk).err(),
                // A second answer says how the first one failed.
                Some(Frame::Down(Down::ProxyHttpResponse(head))) => head.error.as_ref().map(proxy_error),
                Some(Frame::Down(_)) => None,
                Some(Frame::Failed(error)) => Some(error),
                None => Some(Error::new(Kind::Interrupted, "the client ended before the body did")),
            };
            if let Some(error) = failed {
                self.is_over = true;
                return Poll::Ready(Some(Err(error)));
            }
        }
    }
}

impl http_body::Body for Body {
    type Data = Bytes;
    type Error = Error;

    fn poll_frame(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<HttpFrame<Bytes>, Error>>> {
        match &mut self.get_mut().0 {
            Inner::Full(bytes) => Poll::Ready(bytes.take().map(|bytes| Ok(HttpFrame::data(bytes)))),
            Inner::Made(body) => Pin::new(body).poll_frame(cx),
            Inner::Incoming(incoming) => incoming.poll(cx).map(|next| next.map(|piece| piece.map(HttpFrame::data))),
        }
    }

    fn is_end_stream(&self) -> bool {
        match &self.0 {
            Inner::Full(bytes) => bytes.is_none(),
            Inner::Made(body) => body.is_end_stream(),
            Inner::Incoming(incoming) => incoming.is_over,
        }
    }

    fn size_hint(&self) -> SizeHint {
        match &self.0 {
            Inner::Full(bytes) => SizeHint::with_exact(bytes.as_ref().map_or(0, |bytes| bytes.len() as u64)),
            Inner::Made(body) => body.size_hint(),
            Inner::Incoming(_) => SizeHint::default(),
        }
    }
}

impl Default for Body {
    fn default() -> Self {
        Self::empty()
    }
}

impl<T: Into<Bytes>> From<T> for Body {
    fn from(bytes: T) -> Self {
        Self::full(bytes)
    }
}

impl fmt::Debug for Body {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match &self.0 {
            Inner::Full(_) => "Body::Full",
            Inner::Made(_) => "Body::Made",
            Inner::Incoming(_) => "Body::Incoming",
        })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn chunk(seq: u32, data: &str, fin: bool) -> ProxyHttpBodyChunk {
        ProxyHttpBodyChunk { seq, data: Bytes::copy_from_slice(data.as_bytes()), fin, ..Default::default() }
    }

    fn all(pieces: &mut Pieces) -> (String, bool) {
        let (mut text, mut is_over) = (String::new(), false);
        while let Some((data, fin)) = pieces.pop() {
            text.push_str(std::str::from_utf8(&data).unwrap());
            is_over |= fin;
        }
        (text, is_over)
    }

    #[test]
    fn peers_that_do_not_count_are_taken_as_they_come() {
        let mut pieces = Pieces::default();
        let mut text = String::new();
        for (data, fin) in [("a", false), ("b", false), ("c", true)] {
            pieces.push(chunk(0, data, fin)).unwrap();
            text.push_str(&all(&mut pieces).0);
        }
        assert_eq!(text, "abc");
    }

    #[test]
    fn a_missing_piece_is_an_error_and_not_a_shorter_body() {
        let mut pieces = Pieces::default();
        let refused = (1..100).map(|seq| pieces.push(chunk(seq, "x", false))).find_map(Result::err);
        assert_eq!(refused.unwrap().kind(), Kind::Interrupted);
        assert_eq!(all(&mut pieces).0, "");
    }

    proptest! {
        #[test]
        fn pieces_come_out_in_order_whatever_order_they_came_in(order in Just((0..40_u32).collect::<Vec<_>>()).prop_shuffle()) {
            let mut pieces = Pieces::default();
            let mut text = String::new();
            for seq in order {
                pieces.push(chunk(seq, &format!("{seq},"), seq == 39)).unwrap();
                text.push_str(&all(&mut pieces).0);
            }
            let expected: String = (0..40).map(|seq| format!("{seq},")).collect();
            prop_assert_eq!(text, expected);
        }
    }
}

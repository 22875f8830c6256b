//! The bodies of gRPC calls: requests that come in time, and answers that end when the server stops.

use std::{
    pin::Pin,
    task::{Context, Poll, ready},
    time::Duration,
};

use bytes::Bytes;
use hyper::body::{Frame, SizeHint};
use tokio::time::{Sleep, sleep};
use tokio_util::sync::{CancellationToken, WaitForCancellationFutureOwned};
use tonic::{Status, body::Body};

/// A request that ends with `DEADLINE_EXCEEDED` if it has not come whole in time: what is decoded is kept until then, and the
/// connection is busy.
pub(super) struct Timely<B> {
    body: B,
    patience: Duration,
    late: Pin<Box<Sleep>>,
}

impl<B> Timely<B> {
    pub(super) fn new(body: B, patience: Duration) -> Self {
        Self { body, patience, late: Box::pin(sleep(patience)) }
    }
}

impl<B: hyper::body::Body<Data = Bytes, Error: Into<tower::BoxError>> + Unpin> hyper::body::Body for Timely<B> {
    type Data = Bytes;
    type Error = tower::BoxError;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Self::Error>>> {
        // Before what comes: a byte now and then makes no request.
        if self.late.as_mut().poll(cx).is_ready() {
            let message = format!("the request did not come within {} s", self.patience.as_secs());
            return Poll::Ready(Some(Err(Status::deadline_exceeded(message).into())));
        }
        let frame = ready!(Pin::new(&mut self.body).poll_frame(cx));
        Poll::Ready(frame.map(|frame| frame.map_err(Into::into)))
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

/// An answer without an end that ends with `UNAVAILABLE` when the server stops.
pub(super) struct UntilStop {
    body: Body,
    stop: Pin<Box<WaitForCancellationFutureOwned>>,
    is_over: bool,
}

impl UntilStop {
    pub(super) fn new(body: Body, stop: CancellationToken) -> Self {
        Self { body, stop: Box::pin(stop.cancelled_owned()), is_over: false }
    }
}

impl hyper::body::Body for UntilStop {
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        if self.is_over {
            return Poll::Ready(None);
        }
        if let Poll::Ready(frame) = Pin::new(&mut self.body).poll_frame(cx) {
            return Poll::Ready(frame);
        }
        ready!(self.stop.as_mut().poll(cx));
        self.is_over = true;
        let mut trailers = axum::http::HeaderMap::new();
        let added = Status::unavailable("server shutting down").add_header(&mut trailers);
        Poll::Ready(Some(added.map(|()| Frame::trailers(trailers))))
    }

    fn is_end_stream(&self) -> bool {
        self.is_over || self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        SizeHint::default()
    }
}

#[cfg(test)]
mod tests {
    use std::convert::Infallible;

    use futures_util::{Stream, StreamExt as _, stream};
    use tonic::Code;

    use super::*;

    async fn read(pieces: impl Stream<Item = Bytes> + Send + 'static) -> Result<Bytes, Code> {
        let body = axum::body::Body::from_stream(pieces.map(Ok::<_, Infallible>));
        let read = axum::body::to_bytes(axum::body::Body::new(Timely::new(body, Duration::from_secs(30))), usize::MAX);
        read.await.map_err(|e| Status::from_error(e.into()).code())
    }

    #[tokio::test(start_paused = true)]
    async fn a_request_that_does_not_come_in_time_ends() {
        let byte = Bytes::from_static(b"1");
        assert_eq!(read(stream::iter([byte.clone(), byte.clone()])).await.unwrap(), "11");
        assert_eq!(read(stream::pending()).await, Err(Code::DeadlineExceeded));
        let drops = stream::repeat(byte).then(|byte| async {
            sleep(Duration::from_secs(1)).await;
            byte
        });
        assert_eq!(read(drops).await, Err(Code::DeadlineExceeded));
    }
}

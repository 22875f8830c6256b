//! What users attach, on its way in and out. Neither way holds a file whole.

use std::{sync::Arc, time::Duration};

use axum::{
    Extension, Json,
    body::Body,
    extract::{Query, State, rejection::QueryRejection},
    http::{HeaderMap, HeaderValue, header},
    response::{IntoResponse as _, Response},
};
use bytes::Bytes;
use multer::{Constraints, Field, Multipart, SizeLimit};
use percent_encoding::{NON_ALPHANUMERIC, utf8_percent_encode};
use serde::{Deserialize, Serialize};
use tokio::time::timeout;
use trunkline_core::{
    Error, Kind,
    conversation::{
        Seat,
        files::{Asker, Incoming, Kept},
    },
};
use uuid::Uuid;

use crate::http::PathId;

use super::{
    Answer, Surface,
    incoming::{Broken, Feed},
    token::Admitted,
    unauthenticated,
};

/// Names of the parts that are files. The published one, and what programs make of it.
const NAMES: [&str; 3] = ["files[]", "files", "file"];

/// How long nothing may come of an upload, and how long it may take altogether.
const SILENCE: Duration = Duration::from_secs(30);
const ALTOGETHER: Duration = Duration::from_secs(15 * 60);

/// Bytes of an upload besides its files.
const BESIDES: u64 = 64 * 1024;

#[derive(Serialize)]
pub(super) struct Draft {
    message_id: Uuid,
}

pub(super) async fn upload(
    State(surface): State<Arc<Surface>>,
    PathId(id): PathId,
    admitted: Option<Extension<Admitted>>,
    headers: HeaderMap,
    body: Body,
) -> Answer<Json<Draft>> {
    let asks = super::admitted(admitted)?;
    let seat = surface.conversations.find(&asks.visitor, &id).await?;
    let kind = headers.get(header::CONTENT_TYPE).and_then(|kind| kind.to_str().ok()).unwrap_or_default();
    let boundary = multer::parse_boundary(kind).map_err(|e| unreadable(&e))?;
    let policy = &seat.visitor().agent().attachments;
    let most = policy.max_file_size_bytes.saturating_mul(u64::from(policy.max_files_per_message).saturating_add(1));
    let limit = SizeLimit::new().whole_stream(most.saturating_add(BESIDES));
    let feed = Feed::new(body.into_data_stream());
    let parts = Multipart::with_constraints(feed.clone(), &*boundary, Constraints::new().size_limit(limit));
    let parts = Parts { parts, boundary, feed };
    let draft = Uuid::now_v7();
    let _slot = surface.uploads.take(seat.visitor())?;
    let taken = take(&surface, &seat, draft, parts);
    let taken = timeout(ALTOGETHER, taken).await.unwrap_or_else(|_| Err(late()));
    // It may have taken longer than the user's right.
    let taken =
        taken.and_then(|count| asks.is_good(surface.conversations.apps()).then_some(count).ok_or_else(unauthenticated));
    let count = match taken {
        Ok(count) if count > 0 => count,
        other => {
            surface.conversations.abandon(&seat, draft).await;
            let none = || Error::new(Kind::Invalid, "ERR_INVALID_ARGUMENT", "the body has no part files[]");
            return Err(other.err().unwrap_or_else(none).into());
        }
    };
    tracing::debug!(%draft, count, "files were uploaded");
    Ok(Json(Draft { message_id: draft }))
}

/// Takes every file; answers how many those were. What follows a file that is refused is read and thrown away: a browser that is
/// still sending does not hear an answer.
async fn take(surface: &Surface, seat: &Seat, draft: Uuid, mut parts: Parts<'_>) -> Result<usize, Error> {
    let taken = take_each(surface, seat, draft, &mut parts).await;
    if taken.is_err() {
        // What was read of it goes first.
        let Parts { feed, .. } = parts;
        // Whoever takes longer does not hear it.
        let _ = timeout(SILENCE, feed.drain()).await;
    }
    taken
}

/// A body in parts.
struct Parts<'a> {
    parts: Multipart<'a>,
    boundary: String,
    feed: Feed,
}

impl<'a> Parts<'a> {
    /// The next part.
    async fn next(&mut self) -> Result<Option<Field<'a>>, Error> {
        // However many come at once, others have their turn.
        tokio::task::coop::consume_budget().await;
        let field = timeout(SILENCE, self.parts.next_field()).await.map_err(|_| late())?.map_err(|e| unreadable(&e))?;
        if let Some(field) = &field {
            self.feed.begins(&self.boundary, field.headers());
        }
        Ok(field)
    }
}

async fn take_each(surface: &Surface, seat: &Seat, draft: Uuid, parts: &mut Parts<'_>) -> Result<usize, Error> {
    let mut count = 0;
    while let Some(mut field) = parts.next().await? {
        let feed = &parts.feed;
        if !field.name().is_some_and(|name| NAMES.contains(&name)) || field.file_name().is_none() {
            while next(feed, &mut field).await?.is_some() {}
            continue;
        }
        let (name, kind) = (field.file_name().unwrap_or_default(), field.content_type().map(ToString::to_string));
        let mut incoming = surface.conversations.receive(seat, draft, name, &kind.unwrap_or_default()).await?;
        match fill(&mut incoming, feed, field).await {
            Ok(()) => incoming.finish().await?,
            Err(error) => {
                incoming.abandon().await;
                return Err(error);
            }
        }
        count += 1;
    }
    Ok(count)
}

async fn fill(incoming: &mut Incoming, feed: &Feed, mut field: Field<'_>) -> Result<(), Error> {
    while let Some(piece) = next(feed, &mut field).await? {
        incoming.write(&piece).await?;
    }
    Ok(())
}

/// The next piece of a part.
async fn next(feed: &Feed, field: &mut Field<'_>) -> Result<Option<Bytes>, Error> {
    let piece = timeout(SILENCE, field.chunk()).await.map_err(|_| late())?.map_err(|e| unreadable(&e))?;
    feed.goes_on(piece.as_ref().map_or(0, Bytes::len));
    Ok(piece)
}

fn late() -> Error {
    Error::new(Kind::Invalid, crate::error::TOO_SLOW, "the upload took too long")
}

fn unreadable(error: &multer::Error) -> Error {
    match error {
        multer::Error::StreamSizeExceeded { limit } | multer::Error::FieldSizeExceeded { limit, .. } => {
            Error::new(Kind::Invalid, crate::error::TOO_LARGE, format!("the upload has more than {limit} bytes"))
        }
        multer::Error::StreamReadFailed(error) if matches!(error.downcast_ref(), Some(Broken::Slow)) => late(),
        multer::Error::StreamReadFailed(error) => {
            Error::new(Kind::Invalid, "ERR_INVALID_ARGUMENT", format!("the upload cannot be read: {error}"))
        }
        other => Error::new(Kind::Invalid, "ERR_INVALID_ARGUMENT", format!("the upload cannot be read: {other}")),
    }
}

#[derive(Default, Deserialize)]
pub(super) struct Link {
    expires: Option<i64>,
    signature: Option<String>,
}

pub(super) async fn fetch(
    State(surface): State<Arc<Surface>>,
    PathId(id): PathId,
    link: Result<Query<Link>, QueryRejection>,
    admitted: Option<Extension<Admitted>>,
) -> Answer<Response> {
    // What cannot be read signs nothing.
    let Query(link) = link.unwrap_or_default();
    let (kept, content) = match (&link, &admitted) {
        (Link { expires: Some(expires), signature: Some(signature) }, _) => {
            surface.conversations.fetch(&id, Asker::Link(*expires, signature)).await?
        }
        (_, Some(Extension(admitted))) => surface.conversations.fetch(&id, Asker::Visitor(&admitted.visitor)).await?,
        _ => return Err(unauthenticated().into()),
    };
    let mut response = Body::from_stream(content).into_response();
    let headers = response.headers_mut();
    let text = |text: String| HeaderValue::try_from(text).unwrap_or(HeaderValue::from_static(""));
    headers.insert(header::CONTENT_TYPE, text(kept.content_type.clone()));
    headers.insert(header::CONTENT_LENGTH, kept.byte_size.into());
    headers.insert(header::CONTENT_DISPOSITION, text(disposition(&kept)));
    for (name, value) in [
        (header::X_CONTENT_TYPE_OPTIONS, "nosniff"),
        // Whatever it is, it runs nothing.
        (header::CONTENT_SECURITY_POLICY, "default-src 'none'; sandbox"),
        (header::CACHE_CONTROL, "private, max-age=3600"),
        (header::HeaderName::from_static("cross-origin-resource-policy"), "cross-origin"),
    ] {
        headers.insert(name, HeaderValue::from_static(value));
    }
    Ok(response)
}

/// Pictures, sounds and films are shown; everything else is saved.
fn disposition(kept: &Kept) -> String {
    let kind = &kept.content_type;
    let is_shown =
        ["image/", "audio/", "video/"].iter().any(|family| kind.starts_with(family)) && kind != "image/svg+xml";
    let how = if is_shown { "inline" } else { "attachment" };
    format!("{how}; filename*=UTF-8''{}", utf8_percent_encode(&kept.filename, NON_ALPHANUMERIC))
}

#[cfg(test)]
mod tests {
    use futures_util::stream;

    use super::{Body, Bytes, Feed, Multipart, Parts, next};

    /// Bytes of a piece of the transport.
    const PIECE: usize = 16 * 1024;

    fn parts(body: &[u8]) -> Parts<'static> {
        let pieces = body.chunks(PIECE).map(|piece| Ok::<_, std::io::Error>(Bytes::copy_from_slice(piece)));
        let body = Body::from_stream(stream::iter(pieces.collect::<Vec<_>>()));
        let feed = Feed::new(body.into_data_stream());
        let parts = Multipart::new(feed.clone(), "X");
        Parts { parts, boundary: "X".to_owned(), feed }
    }

    #[tokio::test]
    async fn however_small_parts_are_what_waits_is_bounded() {
        let part = "--X\r\nContent-Disposition: form-data; name=\"a\"\r\n\r\nx\r\n";
        let count = 40_000;
        let mut parts = parts((part.repeat(count) + "--X--\r\n").as_bytes());
        let (mut seen, mut most) = (0, 0);
        while let Some(mut field) = parts.next().await.unwrap() {
            while next(&parts.feed, &mut field).await.unwrap().is_some() {}
            seen += 1;
            most = most.max(parts.feed.bytes().saturating_sub((seen * part.len()) as u64));
        }
        assert_eq!(seen, count);
        assert!(most <= 100 * 1024, "{most} bytes were read ahead");
    }

    #[tokio::test]
    async fn parts_of_any_size_are_read() {
        let sizes = [0, 1, PIECE - 1, 300_000, 0, 1_000_000, 5];
        let part = |size: &usize| {
            let head = "--X\r\nContent-Disposition:  form-data; name=\"a\"\r\nX-More:y\r\n\r\n";
            [head.as_bytes(), &vec![b'\r'; *size], b"\r\n"].concat()
        };
        let body = sizes.iter().map(part).chain([b"--X--".to_vec()]).collect::<Vec<_>>().concat();
        let (mut parts, mut read) = (parts(&body), Vec::new());
        while let Some(mut field) = parts.next().await.unwrap() {
            let mut bytes = 0;
            while let Some(piece) = next(&parts.feed, &mut field).await.unwrap() {
                bytes += piece.len();
            }
            read.push(bytes);
        }
        assert_eq!(read, sizes);
    }
}

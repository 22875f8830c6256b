//! What users attach, on its way in and out. Neither way holds a file whole.

use std::{ops::Range, sync::Arc, time::Duration};

use axum::{
    Extension, Json,
    body::Body,
    extract::{Query, State, rejection::QueryRejection},
    http::{HeaderMap, HeaderValue, StatusCode, header},
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

use crate::{
    error::{NO_SUCH_RANGE, Refusal},
    http::{PathId, is_listed, not_modified},
};

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
    headers: HeaderMap,
) -> Answer<Response> {
    // What cannot be read signs nothing.
    let Query(link) = link.unwrap_or_default();
    let asker = match (&link, &admitted) {
        (Link { expires: Some(expires), signature: Some(signature) }, _) => Asker::Link(*expires, signature),
        (_, Some(Extension(admitted))) => Asker::Visitor(&admitted.visitor),
        _ => return Err(unauthenticated().into()),
    };
    let kept = surface.conversations.find_file(&id, asker).await?;
    let tag = entity_tag(&kept);
    let mut response = match wanted(&headers, kept.byte_size, &tag) {
        Wanted::Nothing => not_modified(),
        Wanted::Unsatisfiable => return Ok(unsatisfiable(kept.byte_size)),
        Wanted::Whole => content(&surface, &kept, None).await?,
        Wanted::Part(bytes) => content(&surface, &kept, Some(bytes)).await?,
    };
    let headers = response.headers_mut();
    let text = |text: String| HeaderValue::try_from(text).unwrap_or(HeaderValue::from_static(""));
    headers.insert(header::CONTENT_TYPE, text(kept.content_type.clone()));
    headers.insert(header::CONTENT_DISPOSITION, text(disposition(&kept)));
    headers.insert(header::ETAG, text(tag));
    for (name, value) in [
        (header::ACCEPT_RANGES, "bytes"),
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

/// The answer, but for what it says of the file itself.
async fn content(surface: &Surface, kept: &Kept, bytes: Option<Range<u64>>) -> Answer<Response> {
    let size = kept.byte_size;
    let content = Body::from_stream(surface.conversations.content(kept, bytes.clone()).await?);
    Ok(match bytes {
        None => ([(header::CONTENT_LENGTH, size)], content).into_response(),
        Some(bytes) => {
            let length = [(header::CONTENT_LENGTH, bytes.end - bytes.start)];
            let range = [(header::CONTENT_RANGE, format!("bytes {}-{}/{size}", bytes.start, bytes.end - 1))];
            (StatusCode::PARTIAL_CONTENT, length, range, content).into_response()
        }
    })
}

fn unsatisfiable(size: u64) -> Response {
    let why = format!("the file has {size} bytes, and none of those that were asked for");
    let refusal = Refusal(Error::new(Kind::Invalid, NO_SUCH_RANGE, why));
    ([(header::CONTENT_RANGE, format!("bytes */{size}"))], refusal).into_response()
}

/// What a request for a file is answered with.
#[derive(Debug, PartialEq)]
enum Wanted {
    Whole,
    Part(Range<u64>),
    /// It has the file.
    Nothing,
    /// No byte of what it asks for.
    Unsatisfiable,
}

/// A file's content never changes.
fn entity_tag(kept: &Kept) -> String {
    format!("\"{}\"", kept.id())
}

/// By RFC 9110, sections 13 and 14. Of several ranges the whole is sent, and so it is for one that cannot be read.
fn wanted(headers: &HeaderMap, size: u64, tag: &str) -> Wanted {
    let header = |name| headers.get(name).and_then(|value: &HeaderValue| value.to_str().ok());
    if header(header::IF_NONE_MATCH).is_some_and(|known| is_listed(known, tag)) {
        return Wanted::Nothing;
    }
    // A date says nothing of a file without one.
    let Some(range) = header(header::RANGE).filter(|_| header(header::IF_RANGE).is_none_or(|known| known == tag))
    else {
        return Wanted::Whole;
    };
    let Ok(parsed) = http_range_header::parse_range_header(range) else { return Wanted::Whole };
    match parsed.validate(size).as_deref() {
        Ok([one]) => Wanted::Part(*one.start()..one.end().saturating_add(1)),
        Ok(_) => Wanted::Whole,
        Err(_) => Wanted::Unsatisfiable,
    }
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

    use super::{Body, Bytes, Feed, HeaderMap, Multipart, Parts, Wanted, header, next, wanted};

    /// Bytes of a piece of the transport.
    const PIECE: usize = 16 * 1024;

    fn parts(body: &[u8]) -> Parts<'static> {
        let pieces = body.chunks(PIECE).map(|piece| Ok::<_, std::io::Error>(Bytes::copy_from_slice(piece)));
        let body = Body::from_stream(stream::iter(pieces.collect::<Vec<_>>()));
        let feed = Feed::new(body.into_data_stream());
        let parts = Multipart::new(feed.clone(), "X");
        Parts { parts, boundary: "X".to_owned(), feed }
    }

    #[test]
    fn a_range_is_served_if_it_is_one_and_there() {
        let tag = "\"1\"";
        let ask = |all: &[(header::HeaderName, &str)]| {
            let headers = all.iter().map(|(name, value)| (name.clone(), value.parse().unwrap()));
            wanted(&headers.collect::<HeaderMap>(), 100, tag)
        };
        for (range, expected) in [
            ("bytes=0-1", Wanted::Part(0..2)),
            ("bytes=10-", Wanted::Part(10..100)),
            ("bytes=-10", Wanted::Part(90..100)),
            ("bytes=99-99", Wanted::Part(99..100)),
            ("bytes=0-999", Wanted::Part(0..100)),
            ("bytes=-999", Wanted::Part(0..100)),
            ("bytes=100-", Wanted::Unsatisfiable),
            ("bytes=0-1,5-6", Wanted::Whole),
            ("lines=0-1", Wanted::Whole),
            ("bytes=x-1", Wanted::Whole),
        ] {
            assert_eq!(ask(&[(header::RANGE, range)]), expected, "{range}");
        }
        let part = (header::RANGE, "bytes=0-1");
        assert_eq!(ask(&[]), Wanted::Whole);
        assert_eq!(ask(&[part.clone(), (header::IF_RANGE, tag)]), Wanted::Part(0..2));
        for other in ["\"2\"", "Wed, 21 Oct 2015 07:28:00 GMT"] {
            assert_eq!(ask(&[part.clone(), (header::IF_RANGE, other)]), Wanted::Whole, "{other}");
        }
        assert_eq!(ask(&[part, (header::IF_NONE_MATCH, "\"0\", W/\"1\"")]), Wanted::Nothing);
        assert_eq!(ask(&[(header::IF_NONE_MATCH, "\"0\"")]), Wanted::Whole);
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

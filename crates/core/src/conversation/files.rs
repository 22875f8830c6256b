//! What users attach: drafts, files, and the links by which they are fetched.

use std::ops::Range;

use base64::{Engine as _, engine::general_purpose::URL_SAFE_NO_PAD};
use bytes::Bytes;
use futures_util::{Stream, StreamExt as _};
use ring::hmac;
use serde::Serialize;
use trunkline_store::{files::Upload, log::Clock};
use uuid::Uuid;

use super::{Conversations, Permit, Seat, missing, sql, state::File};
use crate::{
    app::Visitor,
    error::{Error, Kind},
    gate::Gate,
    token::Secret,
};

/// How long a link is good for somebody who watches, and can ask for another one; and for agents, whose messages are kept for
/// a day. In seconds.
pub const FOR_VIEWERS: i64 = 60 * 60;
pub(super) const FOR_AGENTS: i64 = 25 * 60 * 60;

/// First bytes of a file by which it is known what it is.
const SNIFFED_BYTES: usize = 8 * 1024;

/// Longest name of a file, in bytes.
const NAME_BYTES_MAX: usize = 255;

/// The codes of a file that may not be attached.
pub const TOO_LARGE: &str = "ERR_FILE_TOO_LARGE";
/// Of one of another kind than may be attached.
pub const UNSUPPORTED: &str = "ERR_FILE_TYPE";
/// Of one that is one too many.
pub const TOO_MANY: &str = "ERR_FILES";

/// A file as it is kept.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Kept {
    pub(super) id: Uuid,
    pub(super) conversation: Uuid,
    pub(super) message: Uuid,
    /// What its sender called it.
    pub filename: String,
    /// What it is.
    pub content_type: String,
    /// How large it is.
    pub byte_size: u64,
    pub(super) is_whole: bool,
}

impl Kept {
    /// Unique, and its content is the same for ever.
    #[must_use]
    pub fn id(&self) -> Uuid {
        self.id
    }

    /// Where its content is.
    fn place(&self) -> String {
        format!("conversations/{}/{}", self.conversation, self.id)
    }

    fn shown(self) -> File {
        File { id: self.id, filename: self.filename, content_type: self.content_type, byte_size: self.byte_size }
    }
}

/// A file with its link, as it is shown.
#[derive(Debug, Serialize)]
pub struct Shown<'a> {
    /// Where it is.
    pub url: String,
    /// See [`File::filename`].
    pub filename: &'a str,
    /// See [`File::content_type`].
    pub content_type: &'a str,
    /// See [`File::byte_size`].
    pub byte_size: u64,
}

/// Signs links, so that whoever was shown one can follow it for a while.
pub struct Links {
    key: hmac::Key,
    clock: Clock,
}

impl Links {
    pub(super) async fn open(gate: &Gate, clock: Clock) -> Result<Self, Error> {
        let new = Secret::random()?.reveal().to_owned();
        let secret = gate.housekeep(move |tx| sql::key(tx, "links", new.clone())).await?;
        Ok(Self { key: hmac::Key::new(hmac::HMAC_SHA256, secret.as_bytes()), clock })
    }

    fn now(&self) -> i64 {
        i64::try_from(self.clock.now_ms() / 1000).unwrap_or(i64::MAX)
    }

    /// Files with links that are good for so many seconds, and a while longer: links of the same hour are the same, so that
    /// browsers keep what they fetched.
    #[must_use]
    pub fn shown<'a>(&self, files: &'a [File], base: &str, seconds: i64) -> Vec<Shown<'a>> {
        let expires = (self.now() + seconds).div_euclid(FOR_VIEWERS) * FOR_VIEWERS + FOR_VIEWERS;
        let shown = |file: &'a File| {
            let signature = URL_SAFE_NO_PAD.encode(hmac::sign(&self.key, said(file.id, expires).as_bytes()));
            let url = format!("{base}/api/v2/files/{}?expires={expires}&signature={signature}", file.id);
            Shown { url, filename: &file.filename, content_type: &file.content_type, byte_size: file.byte_size }
        };
        files.iter().map(shown).collect()
    }

    /// Whether a link is one of ours, and still good.
    fn is_good(&self, file: Uuid, expires: i64, signature: &str) -> bool {
        let Ok(signature) = URL_SAFE_NO_PAD.decode(signature) else { return false };
        hmac::verify(&self.key, said(file, expires).as_bytes(), &signature).is_ok() && expires > self.now()
    }
}

fn said(file: Uuid, expires: i64) -> String {
    format!("{file}\n{expires}")
}

/// Who asks for a file.
pub enum Asker<'a> {
    /// Somebody with a link, which ends at this second.
    Link(i64, &'a str),
    /// Somebody with a token.
    Visitor(&'a Visitor),
}

/// A file that comes.
pub struct Incoming {
    conversations: Conversations,
    seat: Seat,
    kept: Kept,
    /// What its sender says that it is.
    declared: String,
    begin: Vec<u8>,
    /// Begun once it is known what it is.
    upload: Option<Upload>,
}

impl Conversations {
    /// The links of this server.
    #[must_use]
    pub fn links(&self) -> &Links {
        &self.0.links
    }

    /// Takes a file for a draft, which comes into being with its first.
    ///
    /// # Errors
    /// [`TOO_MANY`] by the agent's policy; [`Kind::Unavailable`].
    pub async fn receive(&self, seat: &Seat, draft: Uuid, filename: &str, declared: &str) -> Result<Incoming, Error> {
        let policy = &seat.visitor.agent().attachments;
        let kept = Kept {
            id: Uuid::now_v7(),
            conversation: seat.row().id,
            message: draft,
            filename: tidy(filename),
            content_type: String::new(),
            byte_size: 0,
            is_whole: false,
        };
        let most = (i64::from(policy.max_files_per_message), i64::from(policy.max_files_per_convo));
        let (row, now) = (kept.clone(), self.now());
        if !self.gate().housekeep(move |tx| sql::begin_file(tx, row.clone(), now, most)).await? {
            let why = format!("files: {} for a message and {} for a conversation may be attached", most.0, most.1);
            return Err(Error::new(Kind::Invalid, TOO_MANY, why));
        }
        let (seat, declared) = (seat.clone(), essence(declared));
        Ok(Incoming { conversations: self.clone(), seat, kept, declared, begin: Vec::new(), upload: None })
    }

    /// What is of a draft that came to nothing goes.
    pub async fn abandon(&self, seat: &Seat, draft: Uuid) {
        let abandoned = async {
            self.remove_files(seat.permit(), Some(draft)).await?;
            self.gate().housekeep(move |tx| sql::drop_draft(tx, draft)).await
        };
        if let Err(error) = abandoned.await {
            tracing::debug!(%error, %draft, "what is left of an upload goes with the next sweep");
        }
    }

    /// The files of a draft, which is sent now.
    pub(super) async fn send_draft(&self, seat: &Seat, draft: Uuid) -> Result<Vec<File>, Error> {
        let conversation = seat.row().id;
        if !self.gate().housekeep(move |tx| sql::send_draft(tx, draft, conversation)).await? {
            return Err(Error::new(Kind::NotFound, "ERR_NOT_FOUND", "message_id: there is no such draft"));
        }
        let files = self.gate().glance(move |tx| sql::files(tx, conversation, Some(draft))).await?;
        Ok(files.into_iter().filter(|kept| kept.is_whole).map(Kept::shown).collect())
    }

    /// A file, for [`Conversations::content`].
    ///
    /// # Errors
    /// [`Kind::NotFound`], also for those who may not have it; [`Kind::Unavailable`].
    pub async fn find_file(&self, file: &str, asker: Asker<'_>) -> Result<Kept, Error> {
        let id = Uuid::try_parse(file).map_err(|_| missing())?;
        if let Asker::Link(expires, signature) = asker
            && !self.links().is_good(id, expires, signature)
        {
            return Err(missing());
        }
        let kept = self.gate().glance(move |tx| sql::file(tx, id)).await?;
        let kept = kept.filter(|kept| kept.is_whole).ok_or_else(missing)?;
        if let Asker::Visitor(visitor) = asker {
            self.find(visitor, &kept.conversation.to_string()).await?;
        }
        Ok(kept)
    }

    /// The content of a file, or these bytes of it.
    ///
    /// # Errors
    /// [`Kind::NotFound`] if it was removed meanwhile; [`Kind::Unavailable`].
    pub async fn content(
        &self,
        kept: &Kept,
        bytes: Option<Range<u64>>,
    ) -> Result<impl Stream<Item = Result<Bytes, Error>> + Send + use<>, Error> {
        let permit = Permit::own(kept.conversation);
        let content = self.gate().conversation_files(&permit).read(&kept.place(), bytes).await?;
        let (_, content) = content.ok_or_else(missing)?;
        Ok(content.map(|part| part.map_err(Error::from)))
    }

    /// Removes the content of a conversation's files, or of those of one message.
    pub(super) async fn remove_files(&self, permit: &Permit, message: Option<Uuid>) -> Result<(), Error> {
        let id = permit.id();
        for kept in self.gate().glance(move |tx| sql::files(tx, id, message)).await? {
            self.gate().conversation_files(permit).remove(&kept.place()).await?;
        }
        Ok(())
    }

    /// Forgets drafts that were never sent.
    pub(super) async fn sweep_drafts(&self, now: i64) -> Result<(), Error> {
        let hours = i64::try_from(self.options().draft_hours).unwrap_or(i64::MAX);
        let before = now.saturating_sub(hours.saturating_mul(3_600_000));
        for (draft, conversation) in self.gate().glance(move |tx| sql::stale_drafts(tx, before)).await? {
            // From now on it cannot be sent; what is sent in this moment keeps its files.
            if !self.gate().housekeep(move |tx| sql::end_draft(tx, draft)).await? {
                continue;
            }
            // The content first: its rows are how it is found, should this end in between.
            self.remove_files(&Permit::own(conversation), Some(draft)).await?;
            self.gate().housekeep(move |tx| sql::drop_draft(tx, draft)).await?;
        }
        Ok(())
    }
}

impl Incoming {
    /// Adds to the file.
    ///
    /// # Errors
    /// [`TOO_LARGE`] or [`UNSUPPORTED`] by the agent's policy; [`Kind::Unavailable`].
    pub async fn write(&mut self, part: &[u8]) -> Result<(), Error> {
        let most = self.seat.visitor.agent().attachments.max_file_size_bytes;
        self.kept.byte_size += part.len() as u64;
        if self.kept.byte_size > most {
            return Err(Error::new(
                Kind::Invalid,
                TOO_LARGE,
                format!("{}: more than {most} bytes", self.kept.filename),
            ));
        }
        if let Some(upload) = &mut self.upload {
            return upload.write(part).await.map_err(Error::from);
        }
        self.begin.extend_from_slice(part);
        if self.begin.len() >= SNIFFED_BYTES { self.begin().await } else { Ok(()) }
    }

    /// It is known what it is.
    async fn begin(&mut self) -> Result<(), Error> {
        let policy = &self.seat.visitor.agent().attachments;
        let kind = sniff(&self.begin, &self.declared);
        let kind = kind.filter(|kind| policy.allows(kind)).ok_or_else(|| {
            let (name, allowed) = (&self.kept.filename, policy.allowed_mime_types.join(", "));
            Error::new(
                Kind::Invalid,
                UNSUPPORTED,
                format!("{name}: allowed are {allowed}, and a file is what it begins as"),
            )
        })?;
        self.kept.content_type = kind;
        let mut upload = self.conversations.gate().conversation_files(self.seat.permit()).create(&self.kept.place());
        upload.write(&std::mem::take(&mut self.begin)).await?;
        self.upload = Some(upload);
        Ok(())
    }

    /// It is whole.
    ///
    /// # Errors
    /// As [`Incoming::write`].
    pub async fn finish(mut self) -> Result<(), Error> {
        if self.upload.is_none() {
            self.begin().await?;
        }
        let Some(upload) = self.upload.take() else { return Ok(()) };
        upload.finish().await?;
        let Kept { id, content_type, byte_size, .. } = self.kept.clone();
        let bytes = i64::try_from(byte_size).unwrap_or(i64::MAX);
        let gate = self.conversations.gate();
        if gate.housekeep(move |tx| sql::end_file(tx, id, content_type.clone(), bytes)).await? {
            return Ok(());
        }
        // The conversation was erased meanwhile.
        gate.conversation_files(self.seat.permit()).remove(&self.kept.place()).await?;
        Err(missing())
    }

    /// It came to nothing.
    pub async fn abandon(self) {
        if let Some(upload) = self.upload {
            upload.abort().await;
        }
        let id = self.kept.id;
        if let Err(error) = self.conversations.gate().housekeep(move |tx| sql::forget_file(tx, id)).await {
            tracing::debug!(%error, "what is left of an upload goes with its draft");
        }
    }
}

/// A type without its parameters.
fn essence(declared: &str) -> String {
    declared.split(';').next().unwrap_or_default().trim().to_ascii_lowercase()
}

/// A name without any path, without what ends lines, and not too long.
fn tidy(filename: &str) -> String {
    let name = filename.rsplit(['/', '\\']).next().unwrap_or_default();
    let name: String = name.chars().filter(|c| !c.is_control()).collect();
    let mut end = name.len().min(NAME_BYTES_MAX);
    while !name.is_char_boundary(end) {
        end -= 1;
    }
    let name = name[..end].trim();
    if name.is_empty() { "file".to_owned() } else { name.to_owned() }
}

/// What a file is. What has signs of its own is what these say; text has none, and is then what its sender says, if it is
/// text. Nothing if it is neither.
fn sniff(begin: &[u8], declared: &str) -> Option<String> {
    if let Some(found) = infer::get(begin) {
        let found = found.mime_type();
        // A page that runs programs is not what anybody means by text.
        return (!found.starts_with("text/")).then(|| found.to_owned());
    }
    let is_text = match str::from_utf8(begin) {
        Ok(_) => true,
        // A character may be cut in two.
        Err(e) => e.error_len().is_none() && begin.len() >= SNIFFED_BYTES,
    };
    let is_text = is_text && !begin.contains(&0);
    let says_text = declared.starts_with("text/") && declared != "text/html"
        || matches!(declared, "application/json" | "application/x-ndjson");
    match (is_text, says_text) {
        (true, true) => Some(declared.to_owned()),
        (true, false) if declared.is_empty() || declared == "application/octet-stream" => Some("text/plain".to_owned()),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::{essence, sniff, tidy};

    #[test]
    fn files_are_what_they_begin_as() {
        let png = b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR";
        for (begin, declared, expected) in [
            (&png[..], "image/png", Some("image/png")),
            (&png[..], "text/plain", Some("image/png")),
            (b"%PDF-1.7\n", "image/png", Some("application/pdf")),
            (b"MZ\x90\0\x03\0\0\0", "image/png", Some("application/vnd.microsoft.portable-executable")),
            (b"hello", "text/plain", Some("text/plain")),
            (b"a,b\n1,2", "text/csv", Some("text/csv")),
            (b"hello", "", Some("text/plain")),
            (b"", "text/plain", Some("text/plain")),
            (b"hello", "image/png", None),
            (b"hello", "text/html", None),
            (b"<!DOCTYPE html><script>", "text/plain", None),
            (b"<svg xmlns=\"http://www.w3.org/2000/svg\" onload=\"x()\"/>", "image/svg+xml", None),
            (b"\0\x01\x02\x03", "text/plain", None),
            (b"\xff\xfe\xfd", "text/plain", None),
        ] {
            assert_eq!(sniff(begin, declared).as_deref(), expected, "{declared} {begin:?}");
        }
        assert_eq!(essence("Text/Plain; charset=utf-8"), "text/plain");
    }

    #[test]
    fn names_are_names() {
        for (given, expected) in [
            ("a.txt", "a.txt"),
            ("../../etc/passwd", "passwd"),
            ("C:\\x\\y.png", "y.png"),
            ("a\r\nSet-Cookie: x", "aSet-Cookie: x"),
            ("", "file"),
            ("..", ".."),
        ] {
            assert_eq!(tidy(given), expected);
        }
        assert_eq!(tidy(&"é".repeat(300)).len(), 254);
    }
}

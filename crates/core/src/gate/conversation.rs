//! The door to conversations.

use bytes::Bytes;
use trunkline_store::{
    files::Files,
    lease::{self, Lease, Policy},
    log::{Append, Appended, ContentDigest, Cursor, Offset, Reader, Topic, TopicStatus},
};
use uuid::Uuid;

use super::Gate;
use crate::{
    app::Visitor,
    conversation::Row,
    error::{Error, Kind},
    topic::{conversation_deltas, conversation_events},
};

/// To use a conversation as the user whose it is.
pub struct UseConversation<'a> {
    pub(crate) visitor: &'a Visitor,
    pub(crate) row: &'a Row,
}

/// To take part in a conversation that goes to an agent.
pub struct TakePart<'a> {
    pub(crate) row: &'a Row,
    /// Whose it is.
    pub(crate) agent: &'a str,
    /// Where that is.
    pub(crate) workspace: &'a str,
}

/// Allows what was asked for, on one conversation.
#[derive(Clone, Debug)]
pub struct ConversationPermit {
    pub(super) id: Uuid,
}

/// How many streams of one user before one agent are open at once. The published figure: two tabs may have one each until
/// they agree on which of them listens.
const STREAMS: std::num::NonZeroU32 = std::num::NonZeroU32::MIN.saturating_add(1);

impl ConversationPermit {
    /// Which conversation.
    #[must_use]
    pub fn id(&self) -> Uuid {
        self.id
    }

    /// For what the server itself does in a conversation.
    pub(crate) fn own(id: Uuid) -> Self {
        Self { id }
    }
}

impl Gate {
    /// Appends to a conversation and to whoever hears it: all, or nothing.
    pub(crate) async fn append_to_conversation(
        &self,
        _permit: &ConversationPermit,
        appends: Vec<Append>,
    ) -> Result<Vec<Appended>, Error> {
        Ok(self.0.store.log.append_batch(appends).await?)
    }

    /// Where something is that was said under a name, if it was.
    pub(crate) async fn find_in_conversation(
        &self,
        permit: &ConversationPermit,
        name: &str,
    ) -> Result<Option<Offset>, Error> {
        Ok(self.0.store.log.find_dedup(&conversation_events(permit.id)?, name).await?)
    }

    /// As [`Gate::find_in_conversation`], and refuses a name that was given to something else.
    pub(crate) async fn find_said(
        &self,
        permit: &ConversationPermit,
        name: &str,
        content: ContentDigest,
    ) -> Result<Option<Offset>, Error> {
        Ok(self.0.store.log.find_dedup_with(&conversation_events(permit.id)?, name, content).await?)
    }

    /// As [`Gate::find_said`], of pieces of what is being said.
    pub(crate) async fn find_piece(
        &self,
        permit: &ConversationPermit,
        name: &str,
        content: ContentDigest,
    ) -> Result<Option<Offset>, Error> {
        Ok(self.0.store.log.find_dedup_with(&conversation_deltas(permit.id)?, name, content).await?)
    }

    /// Hands something to whoever watches a conversation right now.
    pub(crate) fn publish_to_conversation(&self, permit: &ConversationPermit, said: Vec<u8>) -> Result<(), Error> {
        Ok(self.0.store.log.publish(&conversation_events(permit.id)?, said)?)
    }

    pub(crate) async fn conversation_status(&self, permit: &ConversationPermit) -> Result<TopicStatus, Error> {
        Ok(self.0.store.log.status(&conversation_events(permit.id)?).await?)
    }

    /// What happens in a conversation from behind an offset; with what is being said, from behind another one.
    pub(crate) fn follow_conversation(
        &self,
        permit: &ConversationPermit,
        after: Offset,
        deltas_after: Option<Offset>,
    ) -> Result<Reader, Error> {
        let mut reader = self.0.store.log.reader();
        reader.follow_from(&conversation_events(permit.id)?, after)?;
        if let Some(after) = deltas_after {
            reader.follow_from(&conversation_deltas(permit.id)?, after)?;
        }
        Ok(reader)
    }

    /// What was being said in a conversation, as far as it is retained.
    pub(crate) fn conversation_deltas(&self, permit: &ConversationPermit) -> Result<Reader, Error> {
        let mut reader = self.0.store.log.reader();
        reader.follow_from_start(&conversation_deltas(permit.id)?)?;
        Ok(reader)
    }

    /// Where the log ends now.
    pub(crate) fn conversations_tail(&self) -> Cursor {
        self.0.store.log.tail()
    }

    /// One of the places for streams of a user before an agent.
    pub(crate) async fn hold_stream(&self, visitor: &Visitor, session: &str) -> Result<Lease, Error> {
        let key = format!("cv::{}::{}::{}", visitor.app().name, visitor.agent().id, visitor.user);
        match self.0.store.leases.acquire(&key, session, Policy::Slots(STREAMS), Bytes::new()).await {
            Err(lease::Error::Held { .. }) => {
                let why = format!("{STREAMS} streams of this user before this agent are open");
                Err(Error::new(Kind::Exhausted, "ERR_STREAMS", why))
            }
            held => Ok(held?),
        }
    }

    /// Files of conversations.
    pub(crate) fn conversation_files(&self, _permit: &ConversationPermit) -> &Files {
        &self.0.store.files
    }

    /// Removes what was said in a conversation.
    pub(crate) async fn forget_conversation(&self, permit: &ConversationPermit) -> Result<(), Error> {
        let topics: [Topic; 2] = [conversation_events(permit.id)?, conversation_deltas(permit.id)?];
        for topic in &topics {
            self.0.store.log.delete(topic).await?;
        }
        Ok(())
    }
}
